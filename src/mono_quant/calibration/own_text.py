"""Calibration data for language models without any data: text that the model writes itself.

Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (2023), and Williams,
Chrysostomou and Aletras, "Self-calibration for Language Model Quantization and Pruning" (2024): each token is drawn
from what the model answers to those before it. Only text of this kind leads to inputs like those of real text; tokens
drawn evenly from the vocabulary do not.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
from torch import Tensor, nn

from mono_quant.calibration.batches import Batch, tensors_in
from mono_quant.calibration.runner import call_model, evaluating
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.modules.call_arguments import cache_name_among

# Texts that are written together, and texts in one batch of what is answered.
_AT_A_TIME: Final = 16
_PER_BATCH: Final = 4


def sample_tokens(
    model: nn.Module, samples: int = 32, length: int = 256, *, seed: int = 0
) -> list[dict[str, Any] | Tensor]:
    """Let a language model write text of its own, to calibrate it with.

    Args:
        model: Takes token ids ``[batch, length]`` and answers logits ``[batch, length, vocabulary]``, alone or first
            in what it answers; each token's logits must depend on the tokens before it only. Models of transformers
            keep keys and values from token to token; others compute each text anew for each of its tokens.
        samples: Texts.
        length: Tokens of a text, the first of which is drawn evenly from the vocabulary; at least 2.
        seed: The same seed always gives the same text.

    Returns:
        Batches for ``calibration_data``: int64 ids, for models of transformers as keyword arguments.

    Raises:
        ConfigurationError: A number is too small.
        InputError: The model has no embedding, fails on token ids, or does not answer logits for each of them.
    """
    for name, value, least in (("samples", samples, 1), ("length", length, 2)):
        if type(value) is not int or value < least:
            raise ConfigurationError(f"{name}={value!r} is not an integer of at least {least}")
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    if not vocabulary:
        raise InputError(
            f"{type(model).__name__} has no embedding of tokens, so it cannot write text",
            suggestion="Pass calibration data of the model's task.",
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    writer = _Writer(model, vocabulary, generator)
    ids = torch.randint(0, vocabulary, (samples, length), generator=generator).to(device)
    with evaluating(model):
        for texts in ids.split(_AT_A_TIME):
            writer.write(texts)
    return [writer.arguments(part, cache=False) for part in ids.split(_PER_BATCH)]


class _Writer:
    """Writes texts token by token."""

    def __init__(self, model: nn.Module, vocabulary: int, generator: torch.Generator) -> None:
        self._model, self._vocabulary, self._generator = model, vocabulary, generator
        names = inspect.signature(model.forward).parameters
        self._named = "input_ids" in names
        # Models name what they answer as they name what they take.
        self._cache_name = cache_name_among(names) if "use_cache" in names else None

    def arguments(self, ids: Tensor, cache: bool) -> dict[str, Any] | Tensor:
        """Answer what the model is called with; without ``cache`` it is not to keep keys and values."""
        if not self._named:
            return ids
        return {"input_ids": ids, "use_cache": cache} if self._cache_name else {"input_ids": ids}

    def write(self, texts: Tensor) -> None:
        """Fill in all tokens but the first of each text, ``[texts, length]``."""
        kept: Any = None
        for position in range(1, texts.shape[1]):
            name = self._cache_name
            read = texts[:, position - 1 : position] if name else texts[:, :position]
            given = self.arguments(read, cache=True)
            batch = Batch((), given) if isinstance(given, dict) else Batch((given,), {})
            if name and kept is not None:
                batch.kwargs[name] = kept
            answer = call_model(self._model, batch, 0)
            kept = getattr(answer, name, None) if name else None
            self._cache_name = name if kept is not None else None
            texts[:, position] = self._draw(answer, read)

    def _draw(self, answer: Any, ids: Tensor) -> Tensor:
        logits = next(tensors_in(answer), None)
        if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
            found = "no tensor" if logits is None else f"a tensor {list(logits.shape)}"
            raise InputError(
                f"{type(self._model).__name__} answers {found} to ids {list(ids.shape)}; expected logits for each",
                suggestion="Pass calibration data of the model's task.",
            )
        likely = logits[:, -1, : self._vocabulary].float().softmax(dim=1).cpu()
        return torch.multinomial(likely, 1, generator=self._generator)[:, 0].to(ids.device)


__all__ = ["sample_tokens"]
