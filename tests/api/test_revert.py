"""The way back to standard layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mono_quant import dequantize_model, quantize, revert_to_standard_modules
from mono_quant.errors import InputTypeError
from mono_quant.modules import QuantizedModule
from tests.api.test_quantize import Block, TiedLanguageModel


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("run_before", [False, True])
def test_a_reverted_model_has_standard_layers_with_the_dequantized_weights(bits: int, run_before: bool) -> None:
    quantized = quantize(nn.Sequential(Block(), nn.Conv2d(3, 4, 3), nn.Embedding(5, 6)), bits=bits).model
    if run_before:
        quantized[0](torch.ones(2, 32))
    reverted = revert_to_standard_modules(quantized)
    assert not any(isinstance(module, QuantizedModule) for module in reverted.modules())
    assert [type(module) for module in reverted] == [Block, nn.Conv2d, nn.Embedding]
    assert torch.equal(reverted[0].inner[0].weight, quantized[0].inner[0].weight)
    assert reverted[0].mix is reverted[0].mix_again
    assert any(isinstance(module, QuantizedModule) for module in quantized.modules())


def test_inplace_reverts_the_model_itself() -> None:
    quantized = quantize(Block()).model
    assert revert_to_standard_modules(quantized, inplace=True) is quantized
    assert type(quantized.mix) is nn.Linear
    assert quantized.mix is quantized.mix_again
    assert type(quantized.inner[1]) is nn.GELU


def test_tied_weights_are_tied_again() -> None:
    reverted = revert_to_standard_modules(quantize(TiedLanguageModel()).model)
    assert reverted.embed.weight is reverted.head.weight


def test_weights_that_were_not_tied_stay_apart() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    quantized = quantize(model).model
    quantized(torch.ones(1, 16))
    reverted = revert_to_standard_modules(quantized)
    assert reverted[0].weight is not reverted[1].weight
    assert not torch.equal(reverted[0].weight, reverted[1].weight)


def test_dequantize_model_answers_float32_throughout() -> None:
    result = quantize(TiedLanguageModel(), compute_dtype=torch.bfloat16)
    model = dequantize_model(result.model)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_state_dict_comes_back_with_its_names_and_nearly_its_values(bits: int) -> None:
    state = TiedLanguageModel().state_dict()
    back = dequantize_model(quantize(state, bits=bits).model)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == torch.float32
        assert (back[name] - tensor).abs().max() <= tensor.abs().max() / 7


@pytest.mark.parametrize("model", [None, 3, "model.pt"])
def test_something_else_is_refused(model: object) -> None:
    with pytest.raises(InputTypeError):
        revert_to_standard_modules(model)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError):
        dequantize_model(model)  # type: ignore[call-overload]
