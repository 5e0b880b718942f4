"""What calibration data may be, and what is refused by name."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mono_quant.calibration import Batch, count_samples, iterate_batches
from mono_quant.errors import ConfigurationError, InputError, InputTypeError


class TakesTwo(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class TakesOptionalSecond(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


class TakesFlag(nn.Module):
    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        return x


class TakesKeywords(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids * attention_mask


class TakesAnything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


class NamedPair(NamedTuple):
    first: Tensor
    second: Tensor


ONE = nn.Linear(4, 2)


def rows(*lengths: int) -> list[Tensor]:
    return [torch.randn(length, 4) for length in lengths]


def joined(data: Any, limit: int | None = None, model: nn.Module | None = None) -> Tensor:
    return torch.cat([batch.args[0] for batch in iterate_batches(data, limit, model)])


@given(samples=st.integers(1, 100), limit=st.none() | st.integers(1, 120))
def test_a_tensor_is_cut_into_batches_that_hold_it_whole(samples: int, limit: int | None) -> None:
    data = torch.randn(samples, 3)
    batches = list(iterate_batches(data, limit))
    assert all(batch.samples <= 32 for batch in batches)
    torch.testing.assert_close(torch.cat([b.args[0] for b in batches]), data[:limit], rtol=0, atol=0)
    assert count_samples(data, limit) == min(samples, limit or samples)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), limit=st.integers(1, 40))
def test_the_limit_counts_samples_and_cuts_the_last_batch(lengths: list[int], limit: int) -> None:
    data = rows(*lengths)
    assert len(joined(data, limit)) == min(limit, sum(lengths)) == count_samples(data, limit)
    torch.testing.assert_close(joined(data, limit), torch.cat(data)[:limit], rtol=0, atol=0)


def test_the_limit_stops_reading_the_data() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.zeros(3, 4)

    assert len(joined(endless(), 7)) == 7
    assert count_samples(endless(), 7) is None


def test_a_loader_of_inputs_and_labels_gives_the_inputs() -> None:
    inputs = torch.randn(10, 4)
    loader = DataLoader(TensorDataset(inputs, torch.arange(10)), batch_size=3)
    torch.testing.assert_close(joined(loader, model=ONE), inputs)
    assert count_samples(loader) == 10


def test_the_samples_of_a_loader_that_drops_the_last_batch_are_not_guessed() -> None:
    assert count_samples(DataLoader(TensorDataset(torch.zeros(10, 4)), batch_size=3, drop_last=True)) is None


@pytest.mark.parametrize("model", [TakesTwo(), TakesOptionalSecond(), TakesAnything(), None])
def test_a_pair_that_the_model_can_take_is_two_inputs(model: nn.Module | None) -> None:
    pair = (torch.randn(2, 4), torch.randn(2, 4))
    (batch,) = iterate_batches([pair], model=model)
    assert len(batch.args) == 2


@pytest.mark.parametrize("model", [ONE, nn.Sequential(ONE), TakesFlag()])
def test_a_pair_that_the_model_cannot_take_is_inputs_and_labels(model: nn.Module) -> None:
    (batch,) = iterate_batches([[torch.randn(2, 4), torch.tensor([0, 1])]], model=model)
    assert [tuple(a.shape) for a in batch.args] == [(2, 4)]


def test_the_inputs_of_a_pair_may_be_a_mapping() -> None:
    (batch,) = iterate_batches([({"x": torch.ones(2, 4), "labels": torch.ones(2)}, torch.zeros(2))], model=TakesFlag())
    assert batch.args == ()
    assert set(batch.kwargs) == {"x"}


def test_a_named_tuple_keeps_its_type_when_it_is_cut() -> None:
    pair = NamedPair(torch.zeros(4, 4), torch.zeros(4, 4))
    (batch,) = iterate_batches([(pair,)], 3, TakesAnything())
    assert isinstance(batch.args[0], NamedPair)
    assert batch.samples == 3


def test_more_values_than_the_model_takes_are_refused_by_number() -> None:
    with pytest.raises(InputError, match=r"batch 1 holds 3 values.*takes 1"):
        list(iterate_batches([torch.zeros(1, 4), (torch.zeros(1, 4),) * 3], model=ONE))


@pytest.mark.parametrize("mapping", [dict, OrderedDict, UserDict])
def test_a_mapping_gives_keyword_arguments_cut_together(mapping: Any) -> None:
    ids = torch.arange(80).reshape(40, 2)
    data = mapping({"input_ids": ids, "attention_mask": torch.ones(40, 2)})
    batches = list(iterate_batches(data, 36, TakesKeywords()))
    assert [b.samples for b in batches] == [32, 4]
    torch.testing.assert_close(torch.cat([b.kwargs["input_ids"] for b in batches]), ids[:36])
    assert all(b.kwargs["attention_mask"].shape == b.kwargs["input_ids"].shape for b in batches)


def test_labels_in_a_mapping_are_left_out_where_the_model_has_no_such_parameter() -> None:
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "labels": torch.ones(2)}
    assert "labels" not in next(iterate_batches([batch], model=TakesKeywords())).kwargs
    assert "labels" in next(iterate_batches([batch], model=TakesAnything())).kwargs


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(InputError, match=r"pixel_values.*TakesKeywords"):
        list(iterate_batches([{"pixel_values": torch.ones(2, 3)}], model=TakesKeywords()))


def test_a_tokenizers_answer_is_a_mapping() -> None:
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": torch.ones(3, 2), "attention_mask": torch.ones(3, 2)})
    for data in (encoding, [encoding]):
        (batch,) = iterate_batches(data, model=TakesKeywords())
        assert set(batch.kwargs) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("data", [[], torch.zeros(0, 4), iter(()), DataLoader([])])
def test_no_data_is_an_error(data: Any) -> None:
    with pytest.raises(InputError, match="empty"):
        list(iterate_batches(data))


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")])
def test_numbers_that_are_not_finite_are_named_by_batch(value: float, word: str) -> None:
    data = rows(2, 2, 2)
    data[2][1, 3] = value
    with pytest.raises(InputError, match=f"batch 2 holds {word}"):
        list(iterate_batches(data))


def test_a_batch_without_samples_is_named() -> None:
    with pytest.raises(InputError, match="batch 1 holds no samples"):
        list(iterate_batches(rows(2, 0)))


def test_a_batch_without_values_is_named() -> None:
    with pytest.raises(InputError, match=r"batch 1 holds no values.*meta"):
        list(iterate_batches([torch.zeros(2, 4), torch.zeros(2, 4, device="meta")]))


def test_a_batch_without_tensors_is_named() -> None:
    with pytest.raises(InputError, match="batch 0 holds no tensor"):
        list(iterate_batches([{"x": 3}]))


@pytest.mark.parametrize("data", [None, 3, "images.npy", b"x", torch.nn.ReLU()])
def test_data_of_another_type_is_named(data: Any) -> None:
    with pytest.raises(InputTypeError, match=type(data).__name__):
        iterate_batches(data)


@pytest.mark.parametrize("batch", [None, 3, "text"])
def test_a_batch_of_another_type_is_named(batch: Any) -> None:
    with pytest.raises(InputTypeError, match=f"batch 1 is a {type(batch).__name__}"):
        list(iterate_batches([torch.zeros(2, 4), batch]))


def test_a_dataset_is_refused_because_its_items_are_samples() -> None:
    with pytest.raises(InputTypeError, match="DataLoader"):
        iterate_batches(TensorDataset(torch.zeros(3, 4)))


def test_tensors_of_different_lengths_in_a_mapping_are_refused() -> None:
    with pytest.raises(InputError, match="differ"):
        list(iterate_batches({"x": torch.zeros(3), "y": torch.zeros(4)}))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_must_be_positive(limit: int) -> None:
    with pytest.raises(ConfigurationError, match="limit"):
        iterate_batches(torch.zeros(2, 2), limit)


def test_the_data_is_never_written_to_and_never_copied() -> None:
    data = rows(3)
    (batch,) = iterate_batches(data)
    assert batch.args[0] is data[0]


@pytest.mark.parametrize("model", [TakesTwo(), TakesFlag(), TakesKeywords(), None])
def test_a_batch_is_its_own_arguments(model: nn.Module | None) -> None:
    batches = [Batch((torch.ones(2, 3),), {"y": torch.zeros(2, 3)}), Batch((torch.ones(1, 3),), {})]
    found = list(iterate_batches(batches, model=model))
    assert all(answered is batch for batch, answered in zip(batches, found, strict=True))
