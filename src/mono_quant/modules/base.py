"""What all quantized layers share: their buffers, how they move between devices, how they read as float layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mono_quant.core.layer_scheme import BFLOAT16, FLOAT16, LayerScheme
from mono_quant.core.mappers import QINT8
from mono_quant.core.quantized_tensor import QuantizedTensor
from mono_quant.core.quantizers import (
    quantize_weight_bf16,
    quantize_weight_fp16,
    quantize_weight_int8,
    quantize_weight_int8_per_tensor,
)
from mono_quant.errors import InputTypeError, QuantizationError
from mono_quant.modules.swapped_tensors import let_go_before_swaps


class QuantizedModule(nn.Module):
    """A layer that stores its weight as integers (or float16) and reads as its float original.

    Its buffers are named and laid out as in a checkpoint: ``weight`` (int8 codes, or float16), ``weight_scale``
    (float32) and, when asymmetric, ``weight_zero_point`` (int8), with one entry per output channel and as many
    dimensions as the weight; ``bias`` stays in the float dtype that it had. There are no parameters: gradients pass
    through to the input (:mod:`mono_quant.modules.gradients`), and weights get none.

    Attributes:
        scheme: How the layer is quantized.
        float_dtype: The dtype that the weight had, in which ``weight`` reads and to which the layer reverts.
    """

    #: The exact float type that this class stands in for.
    float_type: ClassVar[type[nn.Module]]

    scheme: LayerScheme
    float_dtype: torch.dtype
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    bias: Any

    def _register_tensors(self, shape: tuple[int, ...], bias: Tensor | None, scheme: LayerScheme) -> None:
        """Register buffers for a weight of ``shape``: all zeros until a weight is set."""
        self.scheme = scheme
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        has_scale = not scheme.stores_floats
        has_zero_point = has_scale and not scheme.symmetric
        self.set_tensor("weight", torch.zeros(shape, dtype=storage_dtype(scheme)))
        self.set_tensor("weight_scale", torch.ones(per_channel) if has_scale else None)
        self.set_tensor("weight_zero_point", torch.zeros(per_channel, dtype=torch.int8) if has_zero_point else None)
        self.set_tensor("bias", None if bias is None else bias.detach().clone())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor):
            self._check_new_codes(value)
            self.set_tensor("weight", value)
        else:
            super().__setattr__(name, value)

    def _check_new_codes(self, value: Tensor) -> None:
        """Raise unless ``value`` can stand in the place of the stored weight.

        nn.Module would put floats where the codes are, or drop the codes for a parameter, without a word.
        """
        stored, shape = storage_dtype(self.scheme), tuple(self.codes.shape)
        if isinstance(value, nn.Parameter) or value.dtype != stored or tuple(value.shape) != shape:
            raise InputTypeError(
                f"the weight of a {type(self).__name__} is stored as {stored} of shape {shape} and cannot be set to a "
                f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}",
                suggestion="Change the float layer and quantize it again.",
            )

    def set_tensor(self, name: str, tensor: Tensor | None) -> None:
        """Store a buffer, or the absence of one as a plain ``None``.

        ``register_buffer`` refuses a name that the class also has as a property, and torch.export miscounts buffers
        that are registered as ``None``.
        """
        if tensor is None:
            self._buffers.pop(name, None)
            self.__dict__[name] = None
        else:
            self.__dict__.pop(name, None)
            self._buffers[name] = tensor

    @classmethod
    def like(cls, module: nn.Module, scheme: LayerScheme) -> Self:
        """Answer a layer with the geometry of ``module`` and no weight yet: its buffers are on the ``meta`` device.

        Args:
            module: A float layer of :attr:`float_type`.
            scheme: How the new layer is quantized.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how it is made")

    @classmethod
    def from_float(
        cls, module: nn.Module, scheme: LayerScheme, quantized: QuantizedTensor | Tensor | None = None
    ) -> Self:
        """Answer a quantized copy of a float layer; ``module`` is not modified.

        Args:
            module: A layer whose type is exactly :attr:`float_type` or derives from it.
            scheme: How to quantize it.
            quantized: The weight if it was quantized already (tied weights), in the scheme's format.

        Raises:
            InputTypeError: ``module`` is of another type.
            QuantizationError: Its weight is not finite, or :meth:`unsupported_reason` has an objection.
            ConfigurationError: The scheme does not fit the weight's shape.
        """
        cls._require_float_type(module)
        reason = cls.unsupported_reason(module)
        if reason is not None:
            raise QuantizationError(f"{type(module).__name__} cannot be quantized: {reason}")
        with ordinary_tensors():
            layer = cls.like(module, scheme)
            bias = getattr(module, "bias", None)
            layer.set_tensor("bias", None if bias is None else bias.detach().clone())
            layer._set_weight(cls.quantize_weight(module, scheme) if quantized is None else quantized)
        layer.train(module.training)
        return layer

    @classmethod
    def _require_float_type(cls, module: nn.Module) -> None:
        if not isinstance(module, cls.float_type):
            raise InputTypeError(f"{cls.__name__} replaces {cls.float_type.__name__}, found {type(module).__name__}")

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """Say why this class cannot stand in for ``module`` although the type fits; ``None`` if it can."""
        if isinstance(module, QuantizedModule):
            return "it is quantized already"
        if is_lazy(getattr(module, "weight", None)):  # type: ignore[arg-type]
            return "its weight is not initialised yet: run the model once"
        return None

    @classmethod
    def quantize_weight(cls, module: nn.Module, scheme: LayerScheme) -> QuantizedTensor | Tensor:
        """Answer the weight of a float layer as ``scheme`` stores it."""
        return quantize_by_scheme(cls.stored_weight(module), scheme)

    @classmethod
    def weight_error(cls, module: nn.Module, quantized: QuantizedTensor | Tensor) -> tuple[float, float]:
        """Answer the sum of squares of a float layer's weight and of what quantizing it changed."""
        return error_energy(cls.stored_weight(module), quantized)

    @classmethod
    def stored_weight(cls, module: nn.Module) -> Tensor:
        """Answer a float layer's weight in the layout that the quantized layer stores, output channels first."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.detach()

    def _set_weight(self, weight: QuantizedTensor | Tensor) -> None:
        if isinstance(weight, Tensor):
            self.set_tensor("weight", weight)
            return
        per_channel = (weight.shape[0], *[1] * (weight.dim() - 1))
        zero_point = None if weight.zero_point is None else weight.zero_point.reshape(per_channel)
        self.set_tensor("weight", weight.codes)
        self.set_tensor("weight_scale", weight.scale.reshape(per_channel))
        self.set_tensor("weight_zero_point", zero_point)

    @property
    def codes(self) -> Tensor:
        """The stored weight: int8 codes, or the float16 weight."""
        codes = self._buffers["weight"]
        assert codes is not None
        return codes

    @property
    def dtype(self) -> torch.dtype:
        """``torch.qint8``, ``torch.float16`` or ``torch.bfloat16``: what the weight is stored as."""
        return storage_dtype(self.scheme) if self.scheme.stores_floats else QINT8

    @property
    def symmetric(self) -> bool:
        """Whether the weight has no zero points."""
        return self.scheme.symmetric

    @property
    def _quantized_weight(self) -> QuantizedTensor | Tensor:
        """The weight as a :class:`QuantizedTensor` (float16 layers: the float16 tensor)."""
        if self.weight_scale is None:
            return self.codes
        return _with_scale(self.codes, self.weight_scale, self.weight_zero_point)

    @property
    def weight(self) -> Tensor:
        """The weight in :attr:`float_dtype`, computed at each reading."""
        quantized = self._quantized_weight
        return (
            quantized.dequantize(self.float_dtype)
            if isinstance(quantized, QuantizedTensor)
            else (quantized.to(self.float_dtype))
        )

    def to_float(self) -> nn.Module:
        """Answer a standard layer with the dequantized weight; this one is not modified."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it stands for")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Codes and scales only mean something together: .half() or .to(bfloat16) may move them, never round them.
        before = {name: self._buffers.get(name) for name in ("weight", "weight_scale")}
        let_go_before_swaps()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = self._buffers.get(name)
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype, device=self.codes.device)).dtype
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        found = state_dict.get(f"{prefix}weight")
        if isinstance(found, Tensor) and found.dtype != self.codes.dtype:
            # copy_ would turn floats into meaningless codes without a word.
            error_msgs.append(
                f"{prefix}weight holds {found.dtype}, expected {self.codes.dtype} codes of a quantized layer; "
                "load float weights before quantizing the model."
            )
            return
        has_codes = f"{prefix}weight" in state_dict or f"{prefix}weight_packed" in state_dict
        has_zero_point = f"{prefix}weight_zero_point" in state_dict
        if has_codes and not self.scheme.stores_floats and has_zero_point == self.scheme.symmetric:
            # Without strict the codes of one kind would be read with the zero points of the other.
            given, own = ("asymmetric", "symmetric") if has_zero_point else ("symmetric", "asymmetric")
            error_msgs.append(
                f"{prefix}weight is {given}, and the layer is {own}; quantize the model with that scheme."
            )
            return
        let_go_before_swaps(self._buffers.values())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def has_own_forward(module: nn.Module) -> bool:
    """Say whether ``forward`` was replaced on this very module, as libraries do that move or log what it computes.

    Like a subclass, it may compute something else; a layer in its place would drop what it does.
    """
    return "forward" in module.__dict__


def has_foreign_forward(kind: type[nn.Module]) -> bool:
    """Say whether others put another ``forward`` into a class, which may compute something else.

    Decorators that name what they wrap are looked through.
    """
    if kind.forward is nn.Module.forward:
        return False
    forward = inspect.unwrap(kind.forward)
    found = getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)
    return found not in {(base.__module__, f"{base.__qualname__}.forward") for base in kind.__mro__}


def _with_scale(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> QuantizedTensor:
    return QuantizedTensor(codes, scale.reshape(-1), None if zero_point is None else zero_point.reshape(-1), axis=0)


def dequantize_codes(codes: Tensor | None, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """Answer a weight in float32 from the tensors that an int8 layer stores."""
    assert codes is not None
    assert scale is not None
    return _with_scale(codes, scale, zero_point).dequantize()


def storage_dtype(scheme: LayerScheme) -> torch.dtype:
    """Answer the dtype in which 8-bit codes, or a weight of 16 bits, are stored."""
    return {FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}.get(scheme.kind, torch.int8)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that count their versions, although the caller may be in inference mode.

    What backends derive from a weight is kept until it is written to, and no one can see that of an inference tensor.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def quantize_by_scheme(weight: Tensor, scheme: LayerScheme) -> QuantizedTensor | Tensor:
    """Answer ``weight`` (output channels first) as ``scheme`` stores it, in 8 or 16 bits.

    Raises:
        QuantizationError: It holds NaN or infinite values.
    """
    with ordinary_tensors():
        if scheme.kind == FLOAT16:
            return quantize_weight_fp16(weight)
        if scheme.kind == BFLOAT16:
            return quantize_weight_bf16(weight)
        if scheme.per_channel:
            return quantize_weight_int8(weight, scheme.symmetric)
        return quantize_weight_int8_per_tensor(weight, scheme.symmetric)


def error_energy(weight: Tensor, quantized: QuantizedTensor | Tensor) -> tuple[float, float]:
    """Answer the sum of squares of ``weight`` and of what :func:`quantize_by_scheme` changed of it."""
    if isinstance(quantized, QuantizedTensor):
        return quantized.error_energy(weight.flatten(1) if quantized.dim() < weight.dim() else weight)
    exact = weight.detach().float()
    return float(exact.square().sum()), float((quantized.float() - exact).square_().sum())


def scheme_from_dtype(dtype: torch.dtype, symmetric: bool) -> LayerScheme:
    """Answer the scheme that a factory's ``dtype`` and ``symmetric`` stand for.

    Raises:
        InputTypeError: ``dtype`` is neither an 8-bit integer nor float16.
    """
    if dtype == torch.float16:
        return LayerScheme(FLOAT16, bits=16)
    if dtype in (QINT8, torch.int8):
        return LayerScheme(symmetric=symmetric)
    raise InputTypeError(f"cannot store a layer as {dtype}; expected torch.qint8 or torch.float16")


def require_module(module: object, expected: type[nn.Module]) -> nn.Module:
    """Answer ``module`` if it is an ``expected``.

    Raises:
        InputTypeError: It is something else.
    """
    if not isinstance(module, expected):
        raise InputTypeError(f"expected a torch.nn.{expected.__name__}, found {type(module).__name__}")
    return module
