"""llama.cpp as a peer, through ``llama-cpp-python``, on the packaged GGUF file."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import torch
from torch import Tensor

from benchmarks import smollm2

_TYPES = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def requantize(directory: Path, kind: str) -> Path:
    """Write the packaged model as a GGUF file of another type into ``directory``.

    The packaged weights have four bits: more bits add nothing to their accuracy, and serve to compare speed.
    """
    target = directory / f"{kind}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = _TYPES[kind]
    options.allow_requantize = True
    options.nthread = torch.get_num_threads()
    source = str(smollm2.weights_file()).encode()
    if llama_cpp.llama_model_quantize(source, str(target).encode(), ctypes.byref(options)) != 0:
        raise OSError(f"llama.cpp could not write {target}")
    return target


class LlamaDecoder:
    """llama.cpp with as many threads as PyTorch; see :class:`benchmarks.decoders.Decoder`."""

    def __init__(self, file: Path, prompt: Tensor, horizon: int = 64) -> None:
        threads = torch.get_num_threads()
        self._model = llama_cpp.Llama(
            str(file), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._prompt, self._horizon = prompt.tolist(), horizon
        self._restart()

    def _restart(self) -> None:
        self._model.reset()
        self._model.eval(self._prompt)
        self._token, self._left = self._best(), self._horizon

    def _best(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._model._ctx.ctx, -1)
        vocabulary = self._model.n_vocab()
        return int(torch.frombuffer((ctypes.c_float * vocabulary).from_address(
            ctypes.addressof(logits.contents)), dtype=torch.float32).argmax())  # fmt: skip

    def step(self) -> int:
        if not self._left:
            self._restart()
        self._model.eval([self._token])
        self._token = self._best()
        self._left -= 1
        return self._token

    def prefill(self, window: Tensor) -> int:
        # What was in the context is read again before the next step.
        self._left = 0
        self._model.reset()
        self._model.eval(window.tolist())
        return self._best()
