"""Which quantized layer stands in for which float layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mono_quant.modules import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLinear,
    QuantizedModule,
    WeightOnlyLinear,
    counterpart,
    counterpart_for_scheme,
    register,
    registry,
)
from tests.modules.layers import ASYMMETRIC, HALF, INT4, SYMMETRIC

PAIRS = (
    (nn.Linear(2, 2), QuantizedLinear),
    (nn.Conv1d(2, 2, 1), QuantizedConv1d),
    (nn.Conv2d(2, 2, 1), QuantizedConv2d),
    (nn.Conv3d(2, 2, 1), QuantizedConv3d),
    (nn.Embedding(2, 2), QuantizedEmbedding),
    (nn.EmbeddingBag(2, 2), QuantizedEmbeddingBag),
)


@pytest.fixture(autouse=True)
def same_registry_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BY_TYPE", dict(registry._BY_TYPE))
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))


@pytest.mark.parametrize(("module", "expected"), PAIRS)
def test_each_layer_has_its_counterpart(module: nn.Module, expected: type[QuantizedModule]) -> None:
    assert counterpart(module) is expected
    for scheme in (SYMMETRIC, ASYMMETRIC, HALF):
        assert counterpart_for_scheme(module, scheme) is expected
    assert expected.float_type is type(module)
    assert type(module) in registry.registered_types()


def test_only_linear_layers_have_packed_weights() -> None:
    for module, _ in PAIRS:
        expected = WeightOnlyLinear if isinstance(module, nn.Linear) else None
        assert counterpart_for_scheme(module, INT4) is expected


def test_subclasses_are_not_swapped_by_surprise() -> None:
    class Negated(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return -super().forward(input)

    assert counterpart(Negated(2, 2)) is None
    assert counterpart_for_scheme(Negated(2, 2), INT4) is None
    attention = nn.MultiheadAttention(4, 2)
    # It reads its projection's weight itself, and so would run in float32 whatever the projection is.
    assert counterpart(attention.out_proj) is None


def test_nor_is_a_layer_whose_own_forward_was_replaced() -> None:
    for module, expected in PAIRS:
        forward = module.forward
        module.forward = lambda *args, forward=forward: -forward(*args)
        assert registry.has_own_forward(module)
        assert counterpart(module) is None
        assert counterpart_for_scheme(module, INT4) is None
        del module.forward
        assert counterpart(module) is expected


def test_other_layers_have_none() -> None:
    for module in (nn.LayerNorm(3), nn.ReLU(), nn.Bilinear(2, 2, 2), nn.LSTM(2, 2), nn.ConvTranspose2d(2, 2, 2)):
        assert counterpart(module) is None


def test_a_type_can_be_registered_itself_or_by_its_name() -> None:
    class Own(nn.Linear):
        pass

    class Named(nn.Linear):
        pass

    register(Own, QuantizedLinear)
    register(f"{Named.__module__}.{Named.__qualname__}", QuantizedLinear)
    assert counterpart(Own(2, 2)) is QuantizedLinear
    assert counterpart(Named(2, 2)) is QuantizedLinear
    assert Own in registry.registered_types()
