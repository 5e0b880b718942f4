"""Chooses the scale of a fold's inputs, for all layers that read them together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mono_quant.algorithms.awq import search_awq_scale
from mono_quant.algorithms.folding import Fold
from mono_quant.algorithms.samples import InputSamples
from mono_quant.algorithms.smoothquant import search_smoothing_scale
from mono_quant.algorithms.targets import Target


def choose_scale(
    scaling: str, model: nn.Module, targets: dict[str, Target], fold: Fold, sample: InputSamples
) -> Tensor | None:
    """Answer by what the outputs of a fold's source are to be divided, float32 ``[channels]``.

    Args:
        scaling: ``"awq"`` or ``"smoothquant"``.
        model: Holds the source.
        targets: The layers that are quantized; other consumers of the fold have no say.
        fold: The source and its consumers.
        sample: Inputs of the consumers.

    Returns:
        ``None`` if no scale tried lowers the error, or nothing was seen.
    """
    consumers = [targets[name] for name in fold.consumers if name in targets]
    channels = fold.consumers[consumers[0].name]
    same = [target for target in consumers if torch.equal(fold.consumers[target.name], channels)]
    if not len(sample.rows):
        return None
    width = len(model.get_submodule(fold.source)._parameters["weight"])  # type: ignore[arg-type]

    def per_channel(scale: Tensor) -> Tensor:
        # Inputs that stem from one channel of the source must share its scale: their geometric mean.
        total = torch.zeros(width, device=scale.device).index_add_(0, channels, scale.log())
        count = torch.zeros(width, device=scale.device).index_add_(0, channels, torch.ones_like(scale))
        return torch.exp(total / count.clamp_(min=1))

    search = search_awq_scale if scaling == "awq" else search_smoothing_scale
    matrices = [target.matrix for target in same]
    schemes = [target.scheme for target in same]
    scale = search(matrices, schemes, sample.rows, lambda proposal: per_channel(proposal)[channels])
    return None if scale is None else per_channel(scale)
