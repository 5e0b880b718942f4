"""One call of the operator that computes all layers of an encoder."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from mono_quant.modules.encoder_layer import EncoderLayout, inputs_of_call
from mono_quant.modules.fused_layer import FusedLayer, why_parts
from mono_quant.modules.layer_operands import Operands
from mono_quant.modules.layer_stack import LayerStack
from mono_quant.modules.stack_operands import hand_over
from mono_quant.ops import native


class EncoderStack(LayerStack):
    """What an encoder becomes whose layers can run as one operator.

    Its ``forward`` goes over the list of its layers. Compiled graphs call each layer: there Python has no part in it.
    """

    layer_layout = EncoderLayout
    goes_by_slices = False
    compiles = False

    def run_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first: Any = self.all_layers()[0]
        given = inputs_of_call(first, args, kwargs) if isinstance(first, FusedLayer) else None
        if given is None:
            return NotImplemented
        x, mask = given
        operands = self.operands()
        if operands is None or x.shape[2] != operands.contents.linears[0].in_features:
            return NotImplemented
        if first.adds_mask_of_bools(mask, operands.contents):
            return NotImplemented
        reason = why_parts(operands.contents)
        if reason is not None:
            return reason
        return operands.call(torch.ops.mono_quant.encoder_layers.default, x, mask)

    def gather(self) -> Any:
        return hand_over(self.all_layers(), _sizes, _hold, native.release_encoder_layers)


def _sizes(operands: Operands) -> Hashable:
    return operands.linears[0].in_features


def _hold(weights: list[Tensor], first: Operands, eps: list[float]) -> int:
    constants = first.constants
    held: int = torch.ops.mono_quant.hold_encoder_layers.default(
        weights, constants["heads"], constants["scale"], eps, constants["activation"]
    )
    return held
