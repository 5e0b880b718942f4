"""How one layer is quantized: the frozen description that layers carry and checkpoints store."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from mono_quant.errors import ConfigurationError

INT8_DYNAMIC: Final = "int8_dynamic"
INT8_STATIC: Final = "int8_static"
WEIGHT_ONLY: Final = "weight_only"
FLOAT16: Final = "float16"
BFLOAT16: Final = "bfloat16"
KINDS: Final = (INT8_DYNAMIC, INT8_STATIC, WEIGHT_ONLY, FLOAT16, BFLOAT16)


@dataclass(frozen=True)
class LayerScheme:
    """The arithmetic of one quantized layer.

    Attributes:
        kind: ``int8_dynamic`` (8-bit weights, inputs quantized on the fly, integer products), ``int8_static`` (the
            same with scales of the inputs that calibration fixed), ``weight_only`` (packed weights of ``bits`` bits,
            float arithmetic), ``float16`` (weights stored in half precision) or ``bfloat16`` (weights stored, and
            products of linear layers computed, in bfloat16).
        bits: Bits of a weight: 8, 4 or 16.
        symmetric: Whether the weight has no zero points.
        group_size: Inputs that share one scale; ``None`` for one scale per output channel.
        per_channel: ``False`` if all channels share one range.
    """

    kind: str = INT8_DYNAMIC
    bits: int = 8
    symmetric: bool = True
    group_size: int | None = None
    per_channel: bool = True

    def __post_init__(self) -> None:
        # The values may come from a file, so their types are no more certain than their ranges.
        allowed = {INT8_DYNAMIC: (8,), INT8_STATIC: (8,), WEIGHT_ONLY: (4, 8), FLOAT16: (16,), BFLOAT16: (16,)}
        if self.kind not in KINDS:
            raise ConfigurationError(f"scheme kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.bits not in allowed[self.kind]:
            raise ConfigurationError(f"a {self.kind} layer cannot have {self.bits} bits; expected {allowed[self.kind]}")
        if self.group_size is not None and self.kind != WEIGHT_ONLY:
            raise ConfigurationError(f"group_size belongs to {WEIGHT_ONLY} layers, found it with {self.kind}")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ConfigurationError(f"group_size={self.group_size!r} is not a positive integer")
        for name in ("symmetric", "per_channel"):
            if type(getattr(self, name)) is not bool:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} of a scheme is neither True nor False")
        if self.kind == INT8_STATIC and not (self.symmetric and self.per_channel):
            raise ConfigurationError(f"the weight of a {INT8_STATIC} layer is symmetric with a scale for each channel")

    @property
    def stores_floats(self) -> bool:
        """Whether the weight is stored as floats of 16 bits: it has no codes, scales and zero points."""
        return self.kind in (FLOAT16, BFLOAT16)

    def to_dict(self) -> dict[str, Any]:
        """Answer the scheme as plain values for a checkpoint's header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerScheme:
        """Undo :meth:`to_dict`.

        Raises:
            ConfigurationError: A field is unknown or has an impossible value.
        """
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigurationError(f"a layer's scheme has unknown fields {sorted(unknown)}")
        return cls(**values)

    def __str__(self) -> str:
        if self.stores_floats:
            return self.kind
        granularity = f"groups of {self.group_size}" if self.group_size else "channels"
        if not self.per_channel:
            granularity = "tensor"
        names = {INT8_DYNAMIC: "int8 dynamic", INT8_STATIC: "int8 static", WEIGHT_ONLY: f"int{self.bits} weights"}
        name = names[self.kind]
        return f"{name}, {'symmetric' if self.symmetric else 'asymmetric'}, {granularity}"
