"""GPTQ: codes that make up for each other's rounding, given what the layer's inputs have in common.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022): the columns of a weight are rounded one after the other, and what the rounding of one did to the
output is made good by the columns that follow, as far as their inputs are correlated. What follows here goes beyond
the paper: the scales are fitted to the codes, and the codes are revised one column at a time with all others in
view (coordinate descent: Behdin et al., "QuantEase", 2023). Every step can only lower the error.

The error of a weight ``W [out, in]`` is ``trace((W - Q) H (W - Q)')`` with ``H [in, in]`` the mean of ``x x'`` over
the inputs ``x``: the mean square of what quantizing it does to the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from mono_quant.algorithms.grid import Grid
from mono_quant.algorithms.hqq import fit_grid
from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.errors import ConfigurationError, QuantizationError

# Columns whose effect on the rest is applied in one product.
_BLOCK: Final = 128
# Fitted scales further than this from where they started belong to a system that is nearly singular.
_SCALE_LIMITS: Final = (0.5, 1.5)


@dataclass(frozen=True)
class GPTQOptions:
    """How GPTQ is run.

    Attributes:
        damping: What is added to the diagonal of ``H``, as a part of its mean.
        activation_order: Round the columns with the largest inputs first.
        revisions: Rounds of fitting the scales and revising the codes after the paper's pass; 0 leaves them out.
        damping_limit: Where growing the damping ends if ``H`` is not positive definite.
    """

    damping: float = 0.01
    activation_order: bool = True
    revisions: int = 2
    damping_limit: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= self.damping_limit:
            raise ConfigurationError(f"damping={self.damping} is not in [0, {self.damping_limit}]")
        if self.revisions < 0:
            raise ConfigurationError(f"revisions={self.revisions} is negative")


@dataclass(frozen=True)
class Rounded:
    """A quantized matrix.

    Attributes:
        grid: Its scales and zero points.
        codes: float32 integers ``[out, in]``.
        damping: The damping that made ``H`` positive definite.
    """

    grid: Grid
    codes: Tensor
    damping: float = 0.0


def output_error(matrix: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Answer the mean square by which each output changes if ``values`` replace ``matrix``: float32 ``[out]``."""
    error = matrix.float() - values
    return ((error @ hessian) * error).sum(dim=1)


def quantize_gptq(matrix: Tensor, hessian: Tensor, scheme: LayerScheme, options: GPTQOptions | None = None) -> Rounded:
    """Quantize ``matrix`` for the inputs that ``hessian`` describes.

    Args:
        matrix: Floating point ``[out, in]``.
        hessian: float32 ``[in, in]``, the mean of ``x x'`` over the layer's inputs.
        scheme: An integer scheme.
        options: Defaults to :class:`GPTQOptions`.

    Returns:
        Codes whose :func:`output_error` is, in each row, not larger than that of round-to-nearest on the grids of
        :meth:`Grid.from_range` and :func:`fit_grid`.

    Raises:
        QuantizationError: ``hessian`` is not finite, is zero, or is not positive definite under any damping allowed.
        ConfigurationError: The group size does not divide ``in``.
    """
    options = options or GPTQOptions()
    weight = matrix.detach().float()
    damped, factor, damping, order = _factorize(hessian, options)
    # What rounding a column costs once the columns after it have made good what they can.
    importance = torch.empty_like(damped.diagonal())
    importance[order] = factor.diagonal().pow(-2)
    grid = fit_grid(weight, scheme, importance)
    best = _Best(weight, hessian, Grid.from_range(weight, scheme))
    best.offer(grid, grid.round(weight))
    codes = _compensate(weight, factor, order, grid)
    best.offer(grid, codes)
    for _ in range(options.revisions):
        if scheme.per_channel:
            grid = _fit_scale(weight, damped, grid, codes)
        codes = _revise(weight, damped, grid, codes)
        best.offer(grid, codes)
    return Rounded(best.grid, best.codes, damping)


class _Best:
    """The best rows of several quantizations of one matrix; rows do not depend on each other."""

    def __init__(self, weight: Tensor, hessian: Tensor, start: Grid) -> None:
        self._weight, self._hessian = weight, hessian
        self.grid = replace(start, scale=start.scale.clone())
        self.codes = start.round(weight)
        self._error = output_error(weight, start.values(self.codes), hessian)

    def offer(self, grid: Grid, codes: Tensor) -> None:
        """Take over the rows in which this quantization is better."""
        error = output_error(self._weight, grid.values(codes), self._hessian)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        rows = better.unsqueeze(1)
        self.codes = torch.where(rows, codes, self.codes)
        zero_point = self.grid.zero_point
        if zero_point is not None and grid.zero_point is not None:
            zero_point = torch.where(rows, grid.zero_point, zero_point)
        self.grid = replace(self.grid, scale=torch.where(rows, grid.scale, self.grid.scale), zero_point=zero_point)


def _factorize(hessian: Tensor, options: GPTQOptions) -> tuple[Tensor, Tensor, float, Tensor]:
    """Answer the damped matrix, the upper Cholesky factor of its inverse in the order of columns, the damping, and
    that order.

    Raises:
        QuantizationError: See :func:`quantize_gptq`.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) if diagonal.numel() else 0.0
    if not bool(torch.isfinite(hessian).all()):
        raise QuantizationError("the inputs' second moments are not finite")
    if mean <= 0.0:
        raise QuantizationError("the inputs seen were all zero")
    order = torch.arange(len(diagonal), device=hessian.device)
    if options.activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    damping = options.damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not int(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(factor).all()):
                return damped, factor, damping, order
        if damping >= options.damping_limit:
            raise QuantizationError(
                f"the inputs' second moments are not positive definite even with a damping of {damping:g}"
            )
        damping = min(max(damping * 10, 1e-3), options.damping_limit)


def _compensate(weight: Tensor, factor: Tensor, order: Tensor, grid: Grid) -> Tensor:
    """The paper's pass: answer codes ``[out, in]``."""
    columns = weight.shape[1]
    scale, zero_point = (None if part is None else part[:, order] for part in grid.columns())
    assert scale is not None
    rest = weight[:, order]
    codes = torch.empty_like(rest)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block = rest[:, start:stop].clone()
        errors = torch.empty_like(block)
        for index in range(stop - start):
            column = start + index
            target = block[:, index]
            code = target / scale[:, column]
            if zero_point is not None:
                code += zero_point[:, column]
            code = code.round_().clamp_(grid.qmin, grid.qmax)
            codes[:, column] = code
            steps = code if zero_point is None else code - zero_point[:, column]
            error = (target - steps * scale[:, column]) / factor[column, column]
            errors[:, index] = error
            if index + 1 < stop - start:
                block[:, index + 1 :].addr_(error, factor[column, column + 1 : stop], alpha=-1)
        rest[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def _fit_scale(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """Answer the grid with the scales that minimise the error of the given codes.

    For each output the error is a quadratic function of its groups' scales, so one linear system a row answers them.
    """
    groups, size = grid.scale.shape[1], grid.group_size
    _, zero_point = grid.columns()
    steps = codes if zero_point is None else codes - zero_point
    rows = len(weight)
    system = torch.empty(rows, groups, groups, device=weight.device)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        system[:, group] = ((steps[:, part] @ hessian[part]) * steps).reshape(rows, groups, size).sum(dim=2)
    target = ((weight @ hessian) * steps).reshape(rows, groups, size).sum(dim=2)
    # A group whose codes are all zero leaves a row of zeros; the ridge keeps its scale where it is.
    ridge = system.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) * 1e-6
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    fitted, failed = torch.linalg.solve_ex(system, (target + ridge * grid.scale).unsqueeze(-1))
    fitted = fitted.squeeze(-1)
    low, high = _SCALE_LIMITS
    sound = (fitted >= low * grid.scale) & (fitted <= high * grid.scale) & fitted.isfinite()
    usable = sound.all(dim=1, keepdim=True) & (failed == 0).unsqueeze(1)
    return replace(grid, scale=torch.where(usable, fitted, grid.scale))


def _revise(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """Answer codes each of which was rounded anew with all others in view, one sweep over the columns."""
    columns = weight.shape[1]
    scale, _ = grid.columns()
    codes = codes.clone()
    diagonal = hessian.diagonal()
    # Half the error's gradient by each weight; every change of a code is carried over to it.
    gradient = (weight - grid.values(codes)) @ hessian
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block = gradient[:, start:stop].clone()
        changes = torch.empty_like(block)
        for index in range(stop - start):
            column = start + index
            # In steps of the grid the zero points cancel: only the distance from the present code counts.
            step = scale[:, column]
            code = codes[:, column] + (block[:, index] / (diagonal[column] * step)).round_()
            code.clamp_(grid.qmin, grid.qmax)
            change = (code - codes[:, column]) * step
            codes[:, column] = code
            changes[:, index] = change
            block.addr_(change, hessian[column, start:stop], alpha=-1)
        gradient.addmm_(changes, hessian[start:stop], alpha=-1)
    return codes
