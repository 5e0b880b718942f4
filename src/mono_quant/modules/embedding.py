"""Lookup tables that are stored in int8."""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.core.mappers import QINT8
from mono_quant.errors import InputError
from mono_quant.modules.base import QuantizedModule, require_module, scheme_from_dtype
from mono_quant.modules.inputs import describe, require_indices


class _QuantizedTable(QuantizedModule):
    """What embeddings and bags of embeddings share: a table of codes and the lookup of rows."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    # How gradients of the float layer are computed: of no effect here, kept for the way back.
    scale_grad_by_freq: bool
    sparse: bool

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        if getattr(module, "max_norm", None) is not None:
            return f"max_norm={module.max_norm} rescales the rows of its weight in place whenever they are looked up"
        return super().unsupported_reason(module)

    @classmethod
    def like(cls, module: nn.Module, scheme: LayerScheme) -> Self:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._copy_options(module)
        weight = cls.stored_weight(module)
        layer.float_dtype = weight.dtype
        with torch.device("meta"):
            layer._register_tensors(tuple(weight.shape), None, scheme)
        return layer

    def _copy_options(self, module: nn.Module) -> None:
        source: Any = module
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx = source.padding_idx
        self.scale_grad_by_freq, self.sparse = source.scale_grad_by_freq, source.sparse

    def _look_up(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Answer the rows at ``indices``, ``[..., embedding_dim]`` in ``dtype``.

        Raises:
            InputTypeError: The indices are not int32 or int64.
            IndexError: An index is negative or beyond the table, as in ``nn.Embedding``.
        """
        require_indices(self, indices)
        if self.weight_scale is None:
            return F.embedding(indices, self.codes).to(dtype)
        if dtype == torch.float64:
            return self._look_up(indices, torch.float32).double()  # float32 is all that there is to know
        try:
            rows: Tensor = torch.ops.mono_quant.embedding(
                indices, self.codes, self.weight_scale, self.weight_zero_point, dtype
            )
        except RuntimeError as error:
            # Native kernels cannot raise Python's own exception types.
            if "out of range" in str(error):
                raise IndexError(f"{describe(self)}: {str(error).removeprefix('mono_quant: ')}") from error
            raise
        return rows


class QuantizedEmbedding(_QuantizedTable):
    """Stands in for :class:`torch.nn.Embedding` with int8 rows, each with its own scale.

    Rows are dequantized as they are looked up; with ``dtype=torch.float16`` the table is stored in half precision.

    Shapes: indices ``[...]`` of int32 or int64; output ``[..., embedding_dim]`` of :attr:`float_dtype`, the dtype of
    the float layer's weight, which follows ``.to(dtype)``.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Size of each row.
        padding_idx: The row that training would leave alone; of no effect here.
        dtype: ``torch.qint8`` or ``torch.float16``.
        symmetric: Whether the rows have no zero points.

    A layer made this way has a weight of zeros; :meth:`from_embedding` takes over the weight of a float layer.
    """

    float_type: ClassVar[type[nn.Module]] = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = QINT8,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self._copy_options(nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta"))
        self.float_dtype = torch.get_default_dtype()
        self._register_tensors((num_embeddings, embedding_dim), None, scheme_from_dtype(dtype, symmetric))

    @classmethod
    def from_embedding(cls, module: nn.Embedding, symmetric: bool = False, dtype: torch.dtype = QINT8) -> Self:
        """Answer a quantized copy of ``module``, which is not modified.

        Raises:
            InputTypeError: ``module`` is not an embedding, or ``dtype`` not one of this class.
            QuantizationError: Its weight holds NaN or infinite values, or it has a ``max_norm``.
        """
        return cls.from_float(require_module(module, nn.Embedding), scheme_from_dtype(dtype, symmetric))

    def forward(self, input: Tensor) -> Tensor:
        return self._look_up(input, self.float_dtype)

    def to_float(self) -> nn.Module:
        return nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse, _weight=self.weight,
        ).train(self.training)  # fmt: skip

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self.scheme}"


class QuantizedEmbeddingBag(_QuantizedTable):
    """Stands in for :class:`torch.nn.EmbeddingBag` with int8 rows, each with its own scale.

    Only the rows of the bags are dequantized; they are reduced in float32 and rounded once.

    Shapes: indices ``[bags, n]``, or ``[n]`` with ``offsets`` ``[bags]`` (``[bags + 1]`` with
    ``include_last_offset``), int32 or int64; ``per_sample_weights`` as the indices; output ``[bags, embedding_dim]``
    of :attr:`float_dtype`.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Size of each row.
        mode: ``sum``, ``mean`` or ``max``.
        include_last_offset: Whether ``offsets`` ends with the number of indices.
        padding_idx: The row that is left out of every bag.
        dtype: ``torch.qint8`` or ``torch.float16``.
        symmetric: Whether the rows have no zero points.

    Raises (when called):
        InputError: ``per_sample_weights`` of another shape than the indices, or with a ``mode`` other than ``sum``.
        IndexError: An index is negative or beyond the table.
    """

    float_type: ClassVar[type[nn.Module]] = nn.EmbeddingBag

    mode: str
    include_last_offset: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: torch.dtype = QINT8,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"include_last_offset": include_last_offset, "padding_idx": padding_idx}
        self._copy_options(nn.EmbeddingBag(num_embeddings, embedding_dim, mode=mode, device="meta", **options))
        self.float_dtype = torch.get_default_dtype()
        self._register_tensors((num_embeddings, embedding_dim), None, scheme_from_dtype(dtype, symmetric))

    @classmethod
    def from_embedding_bag(cls, module: nn.EmbeddingBag, symmetric: bool = False, dtype: torch.dtype = QINT8) -> Self:
        """Answer a quantized copy of ``module``, which is not modified.

        Raises:
            InputTypeError: ``module`` is not a bag of embeddings, or ``dtype`` not one of this class.
            QuantizationError: Its weight holds NaN or infinite values, or it has a ``max_norm``.
        """
        return cls.from_float(require_module(module, nn.EmbeddingBag), scheme_from_dtype(dtype, symmetric))

    def _copy_options(self, module: nn.Module) -> None:
        super()._copy_options(module)
        source: Any = module
        self.mode, self.include_last_offset = source.mode, source.include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        weights = per_sample_weights
        if weights is not None and (self.mode != "sum" or weights.shape != input.shape):
            raise InputError(
                f"per_sample_weights need mode='sum' and the shape of the indices {list(input.shape)}, "
                f"found mode={self.mode!r} and {list(weights.shape)}"
            )
        rows = self._look_up(input.reshape(-1), torch.float32)
        weights = None if weights is None else weights.float()
        if self.padding_idx is None:
            out = self._reduce(rows, input, offsets, self.mode, weights)
        else:
            out = self._reduce_without_padding(rows, input, offsets, weights)
        return out.to(self.float_dtype)

    def _reduce(
        self, rows: Tensor, input: Tensor, offsets: Tensor | None, mode: str, weights: Tensor | None = None
    ) -> Tensor:
        positions = torch.arange(input.numel(), dtype=input.dtype, device=input.device).reshape(input.shape)
        return F.embedding_bag(
            positions, rows, offsets, mode=mode, per_sample_weights=weights,
            include_last_offset=self.include_last_offset,
        )  # fmt: skip

    def _reduce_without_padding(
        self, rows: Tensor, input: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        # F.embedding_bag's own padding_idx would make the number of rows a constant of an exported program.
        present = input.ne(cast(int, self.padding_idx))
        column = present.reshape(-1, 1)
        if self.mode == "max":
            out = self._reduce(rows.masked_fill(~column, -torch.inf), input, offsets, "max")
            # A bag of nothing but padding answers zeros, as an empty one does.
            return out.masked_fill(out == -torch.inf, 0.0)
        kept = present.float() if weights is None else torch.where(present, weights, 0.0)
        out = self._reduce(rows, input, offsets, "sum", kept)
        if self.mode == "mean":
            out = out / self._reduce(column.float(), input, offsets, "sum").clamp(min=1)
        return out

    def to_float(self) -> nn.Module:
        return nn.EmbeddingBag(
            self.num_embeddings, self.embedding_dim, mode=self.mode, scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse, include_last_offset=self.include_last_offset, padding_idx=self.padding_idx,
            _weight=self.weight,
        ).train(self.training)  # fmt: skip

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}, {padding}{self.scheme}"


def quantize_embedding_module(
    module: nn.Embedding, dtype: torch.dtype = QINT8, symmetric: bool = False
) -> QuantizedEmbedding:
    """Answer a :class:`QuantizedEmbedding` with the weight of ``module``, which is not modified.

    Args:
        module: The float layer.
        dtype: ``torch.qint8`` or ``torch.float16``.
        symmetric: Whether the rows are quantized without zero points.

    Raises:
        InputTypeError: ``module`` is not an embedding, or ``dtype`` is neither of these.
        QuantizationError: The weight holds NaN or infinite values, or the layer has a ``max_norm``.
    """
    return QuantizedEmbedding.from_embedding(module, symmetric, dtype)


def quantize_embedding_bag_module(
    module: nn.EmbeddingBag, dtype: torch.dtype = QINT8, symmetric: bool = False
) -> QuantizedEmbeddingBag:
    """Answer a :class:`QuantizedEmbeddingBag` with the weight of ``module``; as :func:`quantize_embedding_module`."""
    return QuantizedEmbeddingBag.from_embedding_bag(module, symmetric, dtype)
