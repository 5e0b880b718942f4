"""The options of ``quantize`` in one frozen value, with the names of mono-quant 1.1 resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mono_quant.api.bits import DEFAULT_BITS, EVERYTHING, STAY_FLOAT, BitRules
from mono_quant.config import QuantizationConfig
from mono_quant.core.layer_scheme import FLOAT16, INT8_DYNAMIC, WEIGHT_ONLY, LayerScheme
from mono_quant.core.mappers import QINT8, QUINT8
from mono_quant.errors import ConfigurationError, InputTypeError

#: A layer is chosen by its exact name, a glob over names, or a module type.
Selector = str | type[nn.Module]
Selectors = Selector | Iterable[Selector]

ON_FAILURE = ("error", "warn", "ignore")

# Inputs in a group where the caller leaves it open: the widest that divides the layer.
DEFAULT_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Options:
    """What to do, resolved and checked; see :func:`mono_quant.quantize` for the meaning of each field."""

    bits: int = 8
    bit_rules: BitRules | None = None
    symmetric: bool = True
    per_channel: bool = True
    group_size: int | None = None
    include: tuple[Selector, ...] = ()
    skip: tuple[Selector, ...] = ()
    lenient_skip: tuple[Selector, ...] = ()
    lenient_include: tuple[Selector, ...] = ()
    min_parameters: int = 0
    compute_dtype: torch.dtype | None = None
    fuse_activations: bool = True
    inplace: bool = False
    run_validation: bool = True
    on_failure: str = "error"
    accuracy_warning: str = "warn"
    sqnr_warning_threshold: float = 20.0
    sqnr_error_threshold: float = 10.0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16):
            raise ConfigurationError(
                f"bits={self.bits!r} is not supported; expected 4, 8 or 16",
                suggestion="Use bits=8 for int8, bits=4 for int4 weights, bits=16 for float16 weights.",
            )
        if self.group_size is not None:
            if self.bit_rules is None and self.bits == 16:
                raise ConfigurationError("group_size has no meaning for bits=16: float16 weights have no scale")
            if self.bit_rules is not None and not self.bit_rules.say(4):
                raise ConfigurationError("group_size is that of 4-bit layers, and no rule of bits asks for 4")
            if not isinstance(self.group_size, int) or self.group_size < 1:
                raise ConfigurationError(f"group_size={self.group_size!r} is not a positive integer")
        four_bits = self.bits == 4 if self.bit_rules is None else self.bit_rules.say(4)
        if not self.per_channel and (four_bits or self.group_size is not None):
            raise ConfigurationError("per_channel=False contradicts groups: 4-bit weights have a scale per group")
        if self.min_parameters < 0:
            raise ConfigurationError(f"min_parameters={self.min_parameters} is negative")
        if self.compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ConfigurationError(
                f"compute_dtype={self.compute_dtype} is not one of torch.float32, torch.bfloat16, torch.float16"
            )
        for name in ("on_failure", "accuracy_warning"):
            if getattr(self, name) not in ON_FAILURE:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} is not one of {', '.join(ON_FAILURE)}")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.bits == 16 else QINT8

    def bits_for(self, layer: str) -> tuple[str | None, int]:
        """Answer the rule that gives a layer its bits, ``None`` for the default, and the bits; 32 means float.

        Raises:
            ConfigurationError: Two rules contradict each other on it.
        """
        return (None, self.bits) if self.bit_rules is None else self.bit_rules.find(layer)

    def packs(self, bits: int) -> bool:
        """Say whether layers of so many bits have packed weights, where they can."""
        return bits == 4 or (bits == 8 and self.group_size is not None and self.bit_rules is None)

    def scheme_for(self, weight_shape: torch.Size, bits: int, weight_only_possible: bool) -> LayerScheme:
        """Answer the scheme of a layer.

        Args:
            weight_shape: Shape of its stored weight, output channels first.
            bits: Its bits, as :meth:`bits_for` answers them; not 32.
            weight_only_possible: Whether the layer can store 4-bit codes; the others stay at 8 bits.

        Raises:
            ConfigurationError: The given ``group_size`` does not divide the layer's inputs.
        """
        if bits == 16:
            return LayerScheme(FLOAT16, bits=16)
        if not weight_only_possible or not self.packs(bits):
            return LayerScheme(INT8_DYNAMIC, symmetric=self.symmetric, per_channel=self.per_channel)
        return LayerScheme(
            WEIGHT_ONLY, bits=bits, symmetric=self.symmetric, group_size=self._group_size(weight_shape[1])
        )

    def _group_size(self, in_features: int) -> int | None:
        if self.group_size is None:
            return next((size for size in DEFAULT_GROUP_SIZES if in_features and in_features % size == 0), None)
        if in_features % self.group_size:
            raise ConfigurationError(
                f"group_size={self.group_size} does not divide its {in_features} inputs",
                suggestion=f"Choose a divisor of {in_features}, or name the layer in skip=.",
            )
        return self.group_size


def resolve_options(
    *,
    bits: int | Mapping[str, int],
    scheme: str,
    include: Selectors | None,
    skip: Selectors | None,
    min_parameters: int,
    dtype: torch.dtype | None = None,
    symmetric: bool | None = None,
    per_channel: bool | None = None,
    config: QuantizationConfig | None = None,
    layer_names: Iterable[str] | None = None,
    layer_types: Selectors | None = None,
    skip_names: Iterable[str] | None = None,
    skip_types: Selectors | None = None,
    skip_layer_names: Iterable[str] | None = None,
    skip_layer_types: Selectors | None = None,
    modules_to_not_convert: Iterable[str] | None = None,
    skip_param_threshold: int | None = None,
    **rest: Any,
) -> Options:
    """Bring the options of a call, including those named as in mono-quant 1.1, into one value.

    Raises:
        ConfigurationError: A value is impossible, or two options contradict each other.
        InputTypeError: A selector is neither a name nor a module type.
    """
    for option in (include, layer_names, layer_types):
        if option is not None and not _selectors(option):
            raise ConfigurationError(
                "include names no layer at all", suggestion="Leave it out to quantize every layer that can be."
            )
    uniform, rules = _split_bits(bits)
    if rules is not None and (config is not None or dtype == torch.float16):
        given = "config" if config is not None else f"dtype={dtype}"
        raise ConfigurationError(f"{given} gives all layers the same bits, and bits names single layers")
    if scheme not in ("symmetric", "asymmetric"):
        raise ConfigurationError(f"scheme={scheme!r} is not one of symmetric, asymmetric")
    if config is not None:
        # As in 1.1 the object wins over the call's single options.
        dtype, uniform, per_channel = config.dtype, config.bits, config.per_channel
        symmetric = config.symmetric if config.symmetric is not None else symmetric
    if dtype is not None:
        uniform = _bits_of(dtype, uniform)
        if dtype == QUINT8 and symmetric is None:
            symmetric = False
    if symmetric is None:
        symmetric = scheme == "symmetric"
    notes: tuple[str, ...] = ()
    if rules is None and uniform == 16 and not symmetric:
        notes = ("asymmetric has no meaning for bits=16: float16 weights have no zero points",)
    if skip_param_threshold is not None:
        if min_parameters:
            raise ConfigurationError("min_parameters and its older name skip_param_threshold were both given")
        min_parameters = skip_param_threshold
    named_skips = [*_names(modules_to_not_convert), *_names(skip_layer_names), *_names(skip_names)]
    return Options(
        bits=uniform,
        bit_rules=rules,
        symmetric=symmetric,
        per_channel=True if per_channel is None else per_channel,
        include=_selectors(include),
        skip=_selectors(skip),
        lenient_include=(*_names(layer_names), *_selectors(layer_types)),
        lenient_skip=(*named_skips, *_selectors(skip_types), *_selectors(skip_layer_types)),
        min_parameters=min_parameters,
        notes=notes,
        **rest,
    )


def _split_bits(bits: int | Mapping[str, int]) -> tuple[int, BitRules | None]:
    """Answer the bits of layers that no rule names, and the rules if there are any."""
    if not isinstance(bits, Mapping):
        return bits, None
    rules = BitRules.from_mapping(bits)
    everywhere = dict(rules.rules).get(EVERYTHING, DEFAULT_BITS)
    return DEFAULT_BITS if everywhere == STAY_FLOAT else everywhere, rules


def _bits_of(dtype: torch.dtype, bits: int) -> int:
    if dtype == torch.float16:
        if bits == 4:
            raise ConfigurationError("bits=4 and dtype=torch.float16 contradict each other")
        return 16
    if dtype in (QINT8, QUINT8, torch.int8):
        if bits == 16:
            raise ConfigurationError(f"bits=16 and dtype={dtype} contradict each other")
        return bits
    raise ConfigurationError(f"dtype={dtype} is not one of torch.qint8, torch.quint8, torch.float16")


def _names(names: Iterable[str] | None) -> tuple[Selector, ...]:
    """1.1 and transformers name a layer by its last part too: ``lm_head`` stands for ``model.lm_head``."""
    return tuple(
        pattern for name in _selectors(names) for pattern in ((name, f"*.{name}") if isinstance(name, str) else (name,))
    )


def _selectors(selectors: Selectors | None) -> tuple[Selector, ...]:
    if selectors is None:
        return ()
    if isinstance(selectors, str | type) or not isinstance(selectors, Iterable):
        selectors = (selectors,)
    chosen = tuple(selectors)
    for selector in chosen:
        if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
            raise InputTypeError(
                f"layers are chosen by a name, a glob or a module type, found {selector!r}",
                suggestion='For example skip=["lm_head", "encoder.*.output", torch.nn.Embedding].',
            )
    return chosen
