"""Bits for single layers: rules by name or glob, and which of them holds for a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mono_quant.api.names import matches_name, names_exactly
from mono_quant.errors import ConfigurationError

#: What a rule may say: 32 leaves a layer in float.
RULE_BITS: Final = (4, 8, 16, 32)
STAY_FLOAT: Final = 32
#: Bits of layers that no rule names.
DEFAULT_BITS: Final = 8
EVERYTHING: Final = "*"


@dataclass(frozen=True)
class BitRules:
    """Bits by name or glob.

    The name of the layer itself comes before that of a block around it (the innermost first), a name before a glob,
    and any other glob before ``"*"``. Layers that no rule names have :data:`DEFAULT_BITS` bits.

    Attributes:
        rules: Pairs of a name or glob and 4, 8, 16 or 32 (stay in float).

    Raises:
        ConfigurationError: There is no rule, two have the same name, a name is no text, or the bits are others.
    """

    rules: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise ConfigurationError("bits is a mapping without any rule", suggestion='For example {"lm_head": 16}.')
        seen: dict[str, int] = {}
        for pattern, bits in self.rules:
            if not isinstance(pattern, str) or not pattern:
                raise ConfigurationError(f"bits maps names or globs of layers to bits, found the key {pattern!r}")
            if type(bits) is not int or bits not in RULE_BITS:
                raise ConfigurationError(
                    f"bits[{pattern!r}]={bits!r} is not one of 4, 8, 16, 32",
                    suggestion="4 packs int4 weights, 8 is int8, 16 float16 weights; 32 leaves the layer in float.",
                )
            if pattern in seen:
                raise ConfigurationError(f"bits names {pattern!r} twice, with {seen[pattern]} and {bits} bits")
            seen[pattern] = bits

    @classmethod
    def from_mapping(cls, bits: Mapping[str, int]) -> BitRules:
        return cls(tuple(bits.items()))

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(pattern for pattern, _ in self.rules)

    def say(self, bits: int) -> bool:
        """Say whether some rule asks for so many bits."""
        return any(found == bits for _, found in self.rules)

    def find(self, layer: str) -> tuple[str | None, int]:
        """Answer the rule that holds for a layer, ``None`` if none does, and its bits.

        Raises:
            ConfigurationError: Two globs contradict each other, and no rule before them decides.
        """
        rules = dict(self.rules)
        exact = [pattern for pattern in rules if names_exactly(pattern, layer)]
        if exact:
            innermost = max(exact, key=len)
            return innermost, rules[innermost]
        globs = [pattern for pattern in rules if pattern != EVERYTHING and matches_name(pattern, layer)]
        for pattern in globs[1:]:
            if rules[pattern] != rules[globs[0]]:
                raise ConfigurationError(
                    f"layer {layer!r}: two rules of bits contradict each other, {globs[0]!r} with "
                    f"{rules[globs[0]]} and {pattern!r} with {rules[pattern]}",
                    suggestion="Add a rule with the layer's own name, which comes before globs.",
                )
        if globs:
            return globs[0], rules[globs[0]]
        return (EVERYTHING, rules[EVERYTHING]) if EVERYTHING in rules else (None, DEFAULT_BITS)
