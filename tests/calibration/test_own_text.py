"""Text that a model writes itself: it follows the model, and models that cannot write are refused."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mono_quant
from mono_quant.calibration import sample_tokens
from mono_quant.errors import ConfigurationError, InputError
from tests.algorithms.cases import language_model


class Counting(nn.Module):
    """Always expects the number after the last one."""

    def __init__(self, size: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, 4)

    def forward(self, ids: Tensor) -> Tensor:
        size = self.embedding.num_embeddings
        return 100.0 * nn.functional.one_hot((ids + 1) % size, size)


def test_text_follows_the_model() -> None:
    batches = sample_tokens(Counting(), samples=6, length=9)
    assert [len(batch) for batch in batches] == [4, 2]
    for text in torch.cat(batches):
        assert torch.equal(text, (text[0] + torch.arange(9)) % 10)


def test_the_seed_decides() -> None:
    model = language_model()
    first, again, other = (torch.cat(sample_tokens(model, 4, 8, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_generator_is_left_alone() -> None:
    model = language_model()
    state = torch.get_rng_state()
    sample_tokens(model, 2, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cache_of_keys_and_values_changes_nothing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(input_ids=ids, use_cache=False).logits
            return logits

    kept = sample_tokens(model, 3, 10)
    assert all(batch["use_cache"] is False for batch in kept)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in kept]), torch.cat(sample_tokens(Plain(), 3, 10)))


class Answer(NamedTuple):
    """Logits, and the numbers that were read so far, as a cache of either name."""

    logits: Tensor
    cache: Tensor
    past_key_values: Tensor


class Summing(nn.Module):
    """Always expects the last digit of the sum of all numbers so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.lengths: set[int] = set()

    def answer(self, ids: Tensor, read: Tensor | None) -> Answer:
        self.lengths.add(ids.shape[1])
        read = ids if read is None else torch.cat([read, ids], dim=1)
        logits = 100.0 * nn.functional.one_hot(read.sum(1, keepdim=True) % 10, 10)
        return Answer(logits.expand(-1, ids.shape[1], -1), read, read)


class NewName(Summing):
    def forward(self, input_ids: Tensor, cache: Tensor | None = None, use_cache: bool = False) -> Answer:
        return self.answer(input_ids, cache)


class OldName(Summing):
    def forward(self, input_ids: Tensor, past_key_values: Tensor | None = None, use_cache: bool = False) -> Answer:
        return self.answer(input_ids, past_key_values)


@pytest.mark.parametrize("kind", [NewName, OldName])
def test_a_cache_of_either_name_spares_reading_a_text_anew(kind: type[Summing]) -> None:
    model = kind()
    for batch in sample_tokens(model, 3, 6):
        assert isinstance(batch, dict)
        ids = batch["input_ids"]
        assert torch.equal(ids[:, 1:], ids.cumsum(1)[:, :-1] % 10)
    assert model.lengths == {1}


def test_the_text_calibrates() -> None:
    model = language_model()
    result = mono_quant.quantize(
        model, bits=4, group_size=16, algorithm="gptq", calibration_data=sample_tokens(model, 8, 16)
    )
    assert result.info.calibration_samples_used == 8


def test_models_that_cannot_write_are_refused() -> None:
    with pytest.raises(InputError, match="no embedding of tokens"):
        sample_tokens(nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"a tensor \[2, 4\]"):
        sample_tokens(nn.Sequential(nn.EmbeddingBag(10, 4), Pooled()), 2, 4)
    with pytest.raises(ConfigurationError, match="length=1"):
        sample_tokens(Counting(), length=1)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x
