"""Estimates what an error at a layer's output does to the model's output, from gradients of random directions.

To first order an error ``d`` of a layer's output moves the model's output by ``J d``. For a random vector ``v`` of
independent signs, ``(v' J d)**2`` has the expectation ``|J d|**2`` (Hutchinson, "A stochastic estimator of the trace of
the influence matrix", 1990), and ``v' J`` is one backward pass for all layers together. Samples do not influence each
other, so each sample of a batch is a probe of its own.

For logits the same with ``v`` the gradient of ``log p(c)`` for a class ``c`` drawn from the model's own distribution
``p``: then the expectation is ``d' J' F J d`` with the Fisher information ``F`` of the distribution, which is twice the
Kullback-Leibler divergence to second order (Amari, "Natural gradient works efficiently in learning", 1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mono_quant.api.error_sums import Outputs

# An estimate from n probes has a relative standard deviation of about sqrt(2 / n).
_WANTED_PROBES: Final = 64
_MOST_BACKWARD_PASSES: Final = 16


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a float layer.

    Attributes:
        layer: Its name.
        args, kwargs: What it was called with; copies.
        output: What it answered.
        offset: Zeros that were added to the output; their gradient is that of the output.
    """

    layer: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class Gradient:
    """What one backward pass brought.

    Attributes:
        calls: The gradient at each call's output, ``None`` where none arrived.
        likelihood: Whether its direction was one of the logits' divergence.
    """

    calls: list[Tensor | None]
    likelihood: bool


class Probes:
    """Random directions of a model's outputs.

    Args:
        seed: Fixes them.
        outputs: Which tensors of an answer count, and their scale.
        samples: Calibration samples in all: the fewer there are, the more directions each of them gets.
    """

    def __init__(self, seed: int, outputs: Outputs, samples: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._outputs = outputs
        self._count = max(1, min(_MOST_BACKWARD_PASSES, -(-_WANTED_PROBES // max(1, samples))))

    def gradients(self, answer: dict[str, Tensor], calls: list[Call]) -> list[Gradient]:
        """Answer one gradient for each probe; with logits, as many again for their divergence."""
        tensors = {name: tensor for name, tensor in answer.items() if tensor.requires_grad}
        if not tensors or not calls:
            return []
        offsets = [call.offset for call in calls]
        result: list[Gradient] = []
        for _ in range(self._count):
            signs = [self._signs(tensor) * self._outputs.factors[name] for name, tensor in tensors.items()]
            result.append(Gradient(_backward(list(tensors.values()), offsets, signs), likelihood=False))
        logits = tensors.get(self._outputs.logits or "")
        for _ in range(self._count if logits is not None else 0):
            assert logits is not None
            direction = self._likelihood_direction(logits)
            result.append(Gradient(_backward([logits], offsets, [direction]), likelihood=True))
        return result

    def _signs(self, tensor: Tensor) -> Tensor:
        bits = torch.randint(2, tensor.shape, generator=self._generator)
        return (bits * 2 - 1).to(tensor)

    def _likelihood_direction(self, logits: Tensor) -> Tensor:
        probabilities = logits.detach().float().softmax(dim=-1)
        flat = probabilities.flatten(0, -2).cpu()
        drawn = torch.multinomial(flat, 1, generator=self._generator)
        direction = torch.zeros_like(flat).scatter_(1, drawn, 1.0) - flat
        return direction.reshape(logits.shape).to(logits)


def _backward(outputs: list[Tensor], offsets: list[Tensor], directions: list[Tensor]) -> list[Tensor | None]:
    try:
        found = torch.autograd.grad(outputs, offsets, directions, retain_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError):
        # An operator without a derivative: the layers are tried one by one instead.
        return [None] * len(offsets)
    return list(found)


class UnitError:
    """Collects what the errors of one unit's calls in one batch come to at the model's output.

    Args:
        gradients: Of all calls of the batch.

    Attributes:
        probed: Whether a gradient arrived at one of its calls.
    """

    def __init__(self, gradients: Sequence[Gradient]) -> None:
        self.probed = False
        self._gradients = gradients
        self._products: list[Tensor | None] = [None] * len(gradients)

    def add_call(self, position: int, difference: Tensor, samples: int) -> None:
        """Add the error of the call at ``position``: errors of several calls may cancel, or add up."""
        for index, gradient in enumerate(self._gradients):
            direction = gradient.calls[position]
            if direction is None:
                continue
            self.probed = True
            product, before = _by_sample(direction.float() * difference, samples), self._products[index]
            if before is not None and len(before) != len(product):
                product, before = product.sum().reshape(1), before.sum().reshape(1)
            self._products[index] = product if before is None else before + product

    def noise(self) -> float:
        """Answer the estimated energy of the error of the model's output."""
        return self._mean_square(likelihood=False)

    def divergence(self) -> float:
        """Answer the estimated divergence of the logits, in nats, summed over positions."""
        return self._mean_square(likelihood=True) / 2

    def _mean_square(self, likelihood: bool) -> float:
        squares = [
            0.0 if product is None else float(product.square().sum())
            for gradient, product in zip(self._gradients, self._products, strict=True)
            if gradient.likelihood == likelihood
        ]
        return sum(squares) / max(1, len(squares))


def _by_sample(product: Tensor, samples: int) -> Tensor:
    """Answer the sum for each sample; where the first dimension is not that of the samples, one sum for all."""
    if product.dim() and product.shape[0] == samples:
        return product.flatten(1).sum(dim=1, dtype=torch.float64) if product.dim() > 1 else product.double()
    return product.sum(dtype=torch.float64).reshape(1)
