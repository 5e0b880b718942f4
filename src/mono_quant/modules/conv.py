"""Convolutions that store and compute in int8 and are still PyTorch's own convolution types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from mono_quant.core.layer_scheme import LayerScheme
from mono_quant.core.mappers import QINT8
from mono_quant.errors import InputError
from mono_quant.modules.base import QuantizedModule, dequantize_codes, require_module, scheme_from_dtype
from mono_quant.modules.gradients import Product, Stored, are_recorded, straight_through

# What the float layer's own code, its subclasses' readers and its extra_repr know of it.
_GEOMETRY: Final = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)

_CONVOLUTIONS: Final[tuple[Callable[..., Tensor], ...]] = (F.conv1d, F.conv2d, F.conv3d)
_BACK: Final[tuple[Callable[..., Tensor], ...]] = (grad.conv1d_input, grad.conv2d_input, grad.conv3d_input)


def _copy_geometry(source: nn.Module, target: nn.Module) -> None:
    for name in _GEOMETRY:
        value = getattr(source, name)
        setattr(target, name, list(value) if isinstance(value, list) else value)


def _convolve_half(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Convolve with a float16 weight in float32; ``geometry`` is stride, padding, dilation and groups."""
    convolve = _CONVOLUTIONS[weight.dim() - 3]
    return convolve(x.float(), weight.float(), None if bias is None else bias.float(), *geometry).to(x.dtype)


@dataclass(frozen=True)
class _Convolution(Product):
    """``conv_dynamic`` on codes, scales and zero points; in float32 on a float16 weight, without scales."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    channel_dim: ClassVar[int] = 1

    def compute(self, x: Tensor, bias: Tensor | None, stored: Stored, activation: str) -> Tensor:
        codes, scale, zero_point = stored
        assert codes is not None
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if scale is None:
            return _convolve_half(x, codes, bias, *geometry)
        out: Tensor = torch.ops.mono_quant.conv_dynamic(x, codes, scale, zero_point, bias, *geometry)
        return out

    def weight(self, stored: Stored) -> Tensor:
        codes, scale, zero_point = stored
        assert codes is not None
        return codes.float() if scale is None else dequantize_codes(codes, scale, zero_point)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        convolve = _CONVOLUTIONS[weight.dim() - 3]
        return convolve(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def multiply_back(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        back = _BACK[weight.dim() - 3]
        return back(list(shape), weight, gradient, self.stride, self.padding, self.dilation, self.groups)

    def map_batch(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.unflatten(function(x.flatten(0, 1)), 0, x.shape[:2])


class _QuantizedConv(QuantizedModule):
    """Convolutions of one to three spatial dimensions.

    Each sample of the input is quantized on the fly (asymmetric, 8 bits), convolved with the int8 weight, and scaled
    once at the end, so that a sample's result never depends on the other samples. With ``dtype=torch.float16`` the
    weight is stored in half precision and the arithmetic is float32.

    Shapes: input ``[batch, in_channels, *spatial]`` or ``[in_channels, *spatial]`` of float32, bfloat16 or float16
    and any strides; the output has the same dtype and is contiguous. The arguments are those of the float layer;
    ``dtype`` is ``torch.qint8`` or ``torch.float16``, and ``symmetric`` says whether the weight has no zero points.
    A layer made this way has a weight of zeros; :meth:`from_float` takes over the weight of a float layer.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        dtype: torch.dtype = QINT8,
        symmetric: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        options: dict[str, Any] = {"padding_mode": padding_mode, "device": "meta"}
        # The float class checks the arguments and knows what follows from them.
        model = self.float_type(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options
        )
        _copy_geometry(model, self)
        self.float_dtype = torch.get_default_dtype()
        float_bias = torch.zeros(out_channels) if bias else None
        self._register_tensors(tuple(self.stored_weight(model).shape), float_bias, scheme_from_dtype(dtype, symmetric))

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        reason = super().unsupported_reason(module)
        weight = cls.stored_weight(module) if reason is None else None
        if weight is not None and weight.numel() == 0:
            return f"its weight is empty ({list(weight.shape)}), which PyTorch does not convolve with either"
        return reason

    @classmethod
    def like(cls, module: nn.Module, scheme: LayerScheme) -> Self:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        _copy_geometry(module, layer)
        weight = cls.stored_weight(module)
        layer.float_dtype = weight.dtype
        bias: Any = module.bias
        with torch.device("meta"):
            empty = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype)
            layer._register_tensors(tuple(weight.shape), empty, scheme)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        self._check_input(input, spatial)
        x = input if input.dim() == spatial + 2 else input.unsqueeze(0)
        x, padding = self._padded(x)
        bias, codes, scale = self.bias, self.codes, self.weight_scale
        if are_recorded(x, bias):
            product = _Convolution(self.stride, padding, self.dilation, self.groups)
            out = straight_through(product, x, bias, (codes, scale, self.weight_zero_point))
        elif scale is None:
            out = _convolve_half(x, codes, bias, self.stride, padding, self.dilation, self.groups)
        else:
            out = torch.ops.mono_quant.conv_dynamic(
                x, codes, scale, self.weight_zero_point, bias, self.stride, padding, self.dilation, self.groups
            )
        return out if input.dim() == spatial + 2 else out.squeeze(0)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Answer the input and the padding with zeros that is left to the operator, one number a dimension."""
        pads = self._reversed_padding_repeated_twice
        even = pads[::2] == pads[1::2]
        if self.padding_mode == "zeros" and even:
            return x, tuple(pads[::-2])
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, pads, mode=mode), (0,) * len(self.kernel_size)

    def _check_input(self, input: Tensor, spatial: int) -> None:
        # Kernels take sizes on trust: with a wrong one they fail in their own words, or answer an empty tensor.
        if input.dim() not in (spatial + 1, spatial + 2) or input.shape[-spatial - 1] != self.in_channels:
            dims = ", ".join(("length", "height, width", "depth, height, width")[spatial - 1 : spatial])
            raise InputError(
                f"{type(self).__name__} expects [batch, {self.in_channels}, {dims}] or [{self.in_channels}, {dims}], "
                f"found {list(input.shape)}"
            )
        if torch.compiler.is_compiling():
            return  # a comparison of sizes that may vary would narrow the exported program
        pads = self._reversed_padding_repeated_twice
        for dim in range(spatial):
            reach = self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
            back = 2 * (spatial - 1 - dim)
            size = input.shape[dim - spatial] + pads[back] + pads[back + 1]
            if size < reach:
                raise InputError(
                    f"{type(self).__name__} has a kernel that reaches over {reach} positions, found an input of shape "
                    f"{list(input.shape)}, which has {size} with its padding"
                )

    def to_float(self) -> nn.Module:
        conv: Any = self.float_type.__new__(self.float_type)
        nn.Module.__init__(conv)
        _copy_geometry(self, conv)
        conv.weight = nn.Parameter(self.weight)
        conv.register_parameter("bias", None if self.bias is None else nn.Parameter(self.bias.clone()))
        return cast(nn.Module, conv.train(self.training))

    def extra_repr(self) -> str:
        # The float class's own, which mypy finds hidden by the bases' common ancestor.
        geometry: str = super().extra_repr()
        return f"{geometry}, {self.scheme}"


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):  # type: ignore[misc,override]
    """Stands in for :class:`torch.nn.Conv1d`, and is one; ``weight`` reads as the dequantized float weight.

    Shapes: input ``[batch, in_channels, length]`` or ``[in_channels, length]`` of float32, bfloat16 or float16; the
    output has the same dtype.
    """

    float_type: ClassVar[type[nn.Module]] = nn.Conv1d


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):  # type: ignore[misc,override]
    """Stands in for :class:`torch.nn.Conv2d`, and is one; ``weight`` reads as the dequantized float weight.

    Shapes: input ``[batch, in_channels, height, width]`` or ``[in_channels, height, width]`` of float32, bfloat16 or
    float16; the output has the same dtype.
    """

    float_type: ClassVar[type[nn.Module]] = nn.Conv2d

    @classmethod
    def from_conv2d(cls, module: nn.Conv2d, symmetric: bool = False, dtype: torch.dtype = QINT8) -> Self:
        """Answer a quantized copy of ``module``, which is not modified.

        Raises:
            InputTypeError: ``module`` is not a 2d convolution, or ``dtype`` not one of this class.
            QuantizationError: Its weight holds NaN or infinite values.
        """
        return cls.from_float(require_module(module, nn.Conv2d), scheme_from_dtype(dtype, symmetric))


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):  # type: ignore[misc,override]
    """Stands in for :class:`torch.nn.Conv3d`, and is one; ``weight`` reads as the dequantized float weight.

    Shapes: input ``[batch, in_channels, depth, height, width]`` or ``[in_channels, depth, height, width]`` of float32,
    bfloat16 or float16; the output has the same dtype.
    """

    float_type: ClassVar[type[nn.Module]] = nn.Conv3d


def quantize_conv1d_module(module: nn.Conv1d, dtype: torch.dtype = QINT8, symmetric: bool = False) -> QuantizedConv1d:
    """Answer a :class:`QuantizedConv1d` with the weight of ``module``; as :func:`quantize_conv2d_module`."""
    return QuantizedConv1d.from_float(require_module(module, nn.Conv1d), scheme_from_dtype(dtype, symmetric))


def quantize_conv2d_module(module: nn.Conv2d, dtype: torch.dtype = QINT8, symmetric: bool = False) -> QuantizedConv2d:
    """Answer a :class:`QuantizedConv2d`, still an ``nn.Conv2d``, with the weight of ``module``, which is not modified.

    Args:
        module: The float layer.
        dtype: ``torch.qint8`` or ``torch.float16``.
        symmetric: Whether the weight is quantized without zero points.

    Raises:
        InputTypeError: ``module`` is not such a layer, or ``dtype`` is neither of these.
        QuantizationError: The weight holds NaN or infinite values, or is not initialised yet (lazy layers), or
            ``module`` is quantized already.
    """
    return QuantizedConv2d.from_float(require_module(module, nn.Conv2d), scheme_from_dtype(dtype, symmetric))


def quantize_conv3d_module(module: nn.Conv3d, dtype: torch.dtype = QINT8, symmetric: bool = False) -> QuantizedConv3d:
    """Answer a :class:`QuantizedConv3d` with the weight of ``module``; as :func:`quantize_conv2d_module`."""
    return QuantizedConv3d.from_float(require_module(module, nn.Conv3d), scheme_from_dtype(dtype, symmetric))
