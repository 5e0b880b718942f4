"""The ways to run a language model token by token that are compared.

A decoder starts from a prompt, answers one greedy token for each :meth:`Decoder.step`, and after :data:`HORIZON` tokens
goes back to the prompt, so that it can be called for ever with a cache of about the same length.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import mono_quant
from benchmarks import smollm2
from mono_quant.modules.call_arguments import cache_name_among

#: Tokens of the prompt, and tokens decoded before going back to it.
PROMPT = 64
HORIZON = 64


class Decoder(Protocol):
    """A language model that holds a prompt."""

    def step(self) -> int:
        """Decode one token."""

    def prefill(self, window: Tensor) -> int:
        """Read ``window`` (int64 ``[length]``) into an empty cache of its own and answer the token that follows."""


def _cache_name(model: nn.Module) -> str:
    """Answer the name that the transformers of ``model`` has for the argument that is a cache."""
    name = cache_name_among(inspect.signature(model.forward).parameters)
    assert name is not None
    return name


class EagerDecoder:
    """A transformers model as it is, with the cache that it makes itself."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self._model: Any = model
        self._cache_name = _cache_name(model)
        self._prompt_cache = DynamicCache()
        self._first = self._next(prompt[None], self._prompt_cache)
        self._restart()

    def _restart(self) -> None:
        self._cache = copy.deepcopy(self._prompt_cache)
        self._token, self._left = self._first, HORIZON

    def _next(self, ids: Tensor, cache: Any) -> Tensor:
        with torch.inference_mode():
            out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
            token: Tensor = out.logits[:, -1:].argmax(-1)
        return token

    def step(self) -> int:
        if not self._left:
            self._restart()
        self._token = self._next(self._token, self._cache)
        self._left -= 1
        return int(self._token)

    def prefill(self, window: Tensor) -> int:
        return int(self._next(window[None], DynamicCache()))


class CompiledDecoder:
    """The same model under ``torch.compile``, with a cache of fixed size as it asks for; the prompt is read eagerly."""

    def __init__(self, model: nn.Module, prompt: Tensor, backend: str = "inductor") -> None:
        self._model: Any = model
        self._cache_name = _cache_name(model)
        self._compiled: Any = torch.compile(model, backend=backend, dynamic=False)
        self._prompt = prompt[None]
        config: Any = model.config
        self._cache: Any = StaticCache(config, max_cache_len=len(prompt) + HORIZON)
        self._restart()

    def _restart(self) -> None:
        self._cache.reset()
        self._position = self._prompt.shape[1]
        self._token = self._next(self._model, self._prompt, torch.arange(self._position)[None])

    def _next(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad():
            kept = {self._cache_name: self._cache, "use_cache": True}
            out = model(input_ids=ids, position_ids=positions, logits_to_keep=1, **kept)
            token: Tensor = out.logits[:, -1:].argmax(-1)
        return token

    def step(self) -> int:
        if self._position == self._prompt.shape[1] + HORIZON:
            self._restart()
        self._token = self._next(self._compiled, self._token, torch.tensor([[self._position]]))
        self._position += 1
        return int(self._token)

    def prefill(self, window: Tensor) -> int:
        raise NotImplementedError("a compiled model reads its prompt eagerly")


@dataclass(frozen=True)
class Recipe:
    """How a decoder is made.

    Attributes:
        title: Its name in tables.
        build: From the float32 model and a prompt to the decoder and the bytes of its weights; the model is not
            changed.
        distributions: Whose versions the results record.
        prefills: Whether reading a prompt is measured too.
    """

    title: str
    build: Callable[[nn.Module, Tensor], tuple[Decoder, int]]
    distributions: tuple[str, ...] = ("torch", "transformers")
    prefills: bool = True


def weight_bytes(model: nn.Module) -> int:
    """Answer the bytes of all weights, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _eager(change: Callable[[nn.Module], nn.Module], model: nn.Module, prompt: Tensor) -> tuple[Decoder, int]:
    changed = change(model)
    decoder = EagerDecoder(changed, prompt)
    return decoder, weight_bytes(changed)


def _compiled(change: Callable[[nn.Module], nn.Module], model: nn.Module, prompt: Tensor) -> tuple[Decoder, int]:
    changed = change(model)
    decoder = CompiledDecoder(changed, prompt)
    return decoder, weight_bytes(changed)


def _same(model: nn.Module) -> nn.Module:
    return model


def _half(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(torch.bfloat16)


def _quantized(model: nn.Module, **options: Any) -> nn.Module:
    quantized: nn.Module = mono_quant.quantize(model, run_validation=False, **options).model
    return quantized


def _llama(kind: str, model: nn.Module, prompt: Tensor) -> tuple[Decoder, int]:
    # Not installed with the other peers: imported where it is asked for, and its absence is one of the results.
    from benchmarks.llama import LlamaDecoder, requantize

    with tempfile.TemporaryDirectory() as directory:
        file = smollm2.weights_file() if kind == "Q4_1" else requantize(Path(directory), kind)
        return LlamaDecoder(file, prompt), file.stat().st_size


def _ours(**options: Any) -> Callable[[nn.Module, Tensor], tuple[Decoder, int]]:
    return partial(_eager, partial(_quantized, **options))


_OURS = ("mono-quant", "torch", "transformers")

#: What is compared, in the order of the tables. The first is what the others are divided by.
RECIPES: dict[str, Recipe] = {
    "torch_float32": Recipe("torch float32", partial(_eager, _same)),
    "torch_bfloat16": Recipe("torch bfloat16", partial(_eager, _half)),
    "int8": Recipe("mono_quant int8", _ours(), _OURS),
    "int8_bfloat16": Recipe("mono_quant int8, rest bfloat16", _ours(compute_dtype=torch.bfloat16), _OURS),
    "int8_weights": Recipe("mono_quant int8 weights, groups of 64", _ours(group_size=64), _OURS),
    "int4_weights": Recipe("mono_quant int4 weights, groups of 64", _ours(bits=4, group_size=64), _OURS),
    "int4_weights_bfloat16": Recipe(
        "mono_quant int4 weights, rest bfloat16", _ours(bits=4, group_size=64, compute_dtype=torch.bfloat16), _OURS
    ),
    "torch_float32_compiled": Recipe("torch float32, compiled", partial(_compiled, _same), prefills=False),
    "int8_compiled": Recipe("mono_quant int8, compiled", partial(_compiled, _quantized), _OURS, prefills=False),
    "int4_weights_compiled": Recipe(
        "mono_quant int4 weights, compiled", partial(_compiled, partial(_quantized, bits=4, group_size=64)), _OURS,
        prefills=False,
    ),
    "llama_cpp_q8_0": Recipe("llama.cpp Q8_0", partial(_llama, "Q8_0"), ("llama-cpp-python",)),
    "llama_cpp_q4_1": Recipe("llama.cpp Q4_1", partial(_llama, "Q4_1"), ("llama-cpp-python",)),
}  # fmt: skip
BASELINE = next(iter(RECIPES))
