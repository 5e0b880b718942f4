"""The scheme objects answer what the scale functions answer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mono_quant.core import (
    AsymmetricScheme,
    QuantizationScheme,
    SymmetricScheme,
    calculate_scale_zp_per_channel,
    calculate_scale_zp_per_tensor,
)
from mono_quant.errors import InputError, InputTypeError, QuantizationError
from tests.core.strategies import arbitrary

SCHEMES = ((SymmetricScheme, True), (AsymmetricScheme, False))


@pytest.mark.parametrize(("scheme", "symmetric"), SCHEMES)
@given(weight=arbitrary(), data=st.data())
def test_a_scheme_is_the_scale_function_of_its_name(
    scheme: type[SymmetricScheme] | type[AsymmetricScheme], symmetric: bool, weight: Tensor, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-weight.dim(), weight.dim() - 1))
    for ours, theirs in (
        (scheme().calculate(weight), calculate_scale_zp_per_tensor(weight, symmetric=symmetric)),
        (scheme().calculate(weight, axis), calculate_scale_zp_per_channel(weight, symmetric=symmetric, axis=axis)),
        (scheme(0, 255).calculate(weight), calculate_scale_zp_per_tensor(weight, torch.quint8, symmetric)),
    ):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[0].shape == theirs[0].shape


@pytest.mark.parametrize(("scheme", "symmetric"), SCHEMES)
class TestEachScheme:
    def test_is_a_scheme_for_signed_eight_bits(self, scheme: type[SymmetricScheme], symmetric: bool) -> None:
        assert isinstance(scheme(), QuantizationScheme)
        assert (scheme().qmin, scheme().qmax) == (-128, 127)
        assert scheme() == scheme(qmin=-128, qmax=127)

    def test_cannot_be_changed_afterwards(self, scheme: type[SymmetricScheme], symmetric: bool) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            scheme().qmin = 0  # type: ignore[misc]

    def test_refuses_what_has_no_range(self, scheme: type[SymmetricScheme], symmetric: bool) -> None:
        with pytest.raises(QuantizationError):
            scheme().calculate(torch.tensor([1.0, torch.nan]))
        with pytest.raises(InputTypeError):
            scheme().calculate(torch.tensor([1, 2]))
        with pytest.raises(InputError, match="axis 1"):
            scheme().calculate(torch.tensor([1.0]), axis=1)

    def test_gives_an_empty_tensor_valid_parameters(self, scheme: type[SymmetricScheme], symmetric: bool) -> None:
        for axis in (None, 0):
            scale, zero_point = scheme().calculate(torch.empty(0, 3), axis)
            assert bool((scale > 0).all())
            assert scale.shape == zero_point.shape


def test_the_base_class_is_abstract() -> None:
    with pytest.raises(TypeError):
        QuantizationScheme()  # type: ignore[abstract]
