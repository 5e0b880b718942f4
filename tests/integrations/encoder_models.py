"""Small encoders of transformers with random weights, and what to compare them by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import mono_quant
from mono_quant.modules import FusedLayer, restore_layers

LAYERS = 2


def bert(**options: Any) -> Any:
    return _build(BertModel, BertConfig, **options)


def distilbert(**options: Any) -> Any:
    config = DistilBertConfig(
        vocab_size=40, dim=36, n_layers=LAYERS, n_heads=3, hidden_dim=70, max_position_embeddings=24, **options
    )
    return _lively(DistilBertModel(config))


def _build(model: Callable[[Any], nn.Module], config: Callable[..., Any], **options: Any) -> Any:
    sizes = {
        "vocab_size": 40, "hidden_size": 36, "num_hidden_layers": LAYERS, "num_attention_heads": 3,
        "intermediate_size": 70, "max_position_embeddings": 24,
    }  # fmt: skip
    return _lively(model(config(**sizes | options)))


def _lively(model: nn.Module) -> nn.Module:
    """Give a model weights that do something: those of a fresh one hardly change their input."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise / 6)
            else:
                parameter.add_(noise / 4 if name.endswith("bias") else noise.abs() / 4)
    return model.eval()


ENCODERS: dict[str, Callable[..., Any]] = {
    "Bert": bert,
    "Roberta": lambda **options: _build(RobertaModel, RobertaConfig, **options),
    "XLMRoberta": lambda **options: _build(XLMRobertaModel, XLMRobertaConfig, **options),
    "Camembert": lambda **options: _build(CamembertModel, CamembertConfig, **options),
    "Electra": lambda **options: _build(ElectraModel, ElectraConfig, **{"embedding_size": 20} | options),
    "DistilBert": distilbert,
}


def quantized(model: nn.Module, **options: Any) -> Any:
    return mono_quant.quantize(model, **options).model


def words(samples: int = 3, length: int = 11) -> Tensor:
    return torch.randint(2, 40, (samples, length), generator=torch.Generator().manual_seed(samples + length))


def padding(samples: int = 3, length: int = 11) -> Tensor:
    """The attention mask of sequences that get shorter from sample to sample."""
    return (torch.arange(length) < length - 3 * torch.arange(samples)[:, None]).long()


def part_by_part(model: nn.Module) -> Any:
    """Answer a copy in which no layer is fused."""
    twin = copy.deepcopy(model)
    restore_layers(twin)
    return twin


def fused_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FusedLayer)]


class Counter(TorchDispatchMode):
    """Counts the calls of ``encoder_layer``, and of all layers together."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.together = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.mono_quant.encoder_layer.default
        self.together += func is torch.ops.mono_quant.encoder_layers.default
        return func(*args, **kwargs or {})


def hidden(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Answer the last hidden states, without gradients."""
    with torch.no_grad():
        answer: Tensor = model(*args, **kwargs).last_hidden_state
    return answer


def count(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Answer how many layers run as one call, be it of their own or of all of them."""
    with Counter() as counter:
        hidden(model, *args, **kwargs)
    return counter.calls + counter.together * len(fused_names(model))


def close(first: Tensor, second: Tensor) -> bool:
    """Whether rows are equal but for codes that rounding has flipped.

    One code more or less is a 255th of a row's range, and norms keep the proportion of such a change to the row. Most
    rows have none.
    """
    range_ = second.amax(-1) - second.amin(-1)
    apart = (first - second).abs().amax(-1) / range_
    return bool((apart < 4 / 255).all()) and float(apart.median()) < 1 / 255


def run(layer: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, bool]:
    """Answer a layer's output and whether it ran as one call."""
    with Counter() as counter:
        answer: Tensor = layer(*args, **kwargs)
    return answer, counter.calls == 1


def from_parts(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    answer: Tensor = part_by_part(layer)(*args, **kwargs)
    return answer
