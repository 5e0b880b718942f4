"""How layers are named by a caller: by their own name, that of a block around them, or a glob."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from mono_quant.errors import ConfigurationError


def matches_name(pattern: str, name: str) -> bool:
    """Say whether a name or glob means the layer ``name``, by its own name or that of a module that contains it."""
    return any(fnmatchcase(ancestor, pattern) for ancestor in _ancestors(name))


def names_exactly(pattern: str, name: str) -> bool:
    """Say whether ``pattern`` is the name of the layer ``name``, or of a module that contains it."""
    return pattern in _ancestors(name)


def require_matches(option: str, patterns: Iterable[str], names: list[str]) -> None:
    """Refuse a name or glob that matches none of ``names``.

    Args:
        option: Where the patterns come from.
        patterns: Names and globs.
        names: All names of the model.

    Raises:
        ConfigurationError: One matches nothing.
    """
    for pattern in patterns:
        if not any(matches_name(pattern, name) for name in names):
            raise ConfigurationError(
                f"{option} names {pattern!r}, which matches nothing in the model", suggestion=_closest(pattern, names)
            )


def shortened(names: list[str]) -> str:
    """Answer the first few names, and how many more there are; a model may have hundreds."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def layers_are(names: list[str]) -> str:
    """Answer ``"1 layer is"`` or ``"5 layers are"``."""
    return "1 layer is" if len(names) == 1 else f"{len(names)} layers are"


def _ancestors(name: str) -> Iterator[str]:
    yield name
    name = name.rpartition(".")[0]
    while name:
        yield name
        name = name.rpartition(".")[0]


def _closest(pattern: str, names: list[str]) -> str:
    last = pattern.rpartition(".")[2].strip("*")
    similar = sorted(name for name in names if last and last in name)[:3] or [name for name in names if name][:3]
    return f"Names in it are, for example, {', '.join(map(repr, similar))}."
