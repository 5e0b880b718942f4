"""Which of the ways to quantize a call asks for, and whether its options fit that way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import nn

from mono_quant.algorithms import AlgorithmOptions, needs_data, parse_algorithm
from mono_quant.errors import ConfigurationError, InputError, InputTypeError

#: Layer by layer: inputs of int8 layers are quantized as they come.
LAYERS: Final = "layers"
#: Ranges of activations come from calibration data.
STATIC: Final = "static"
#: Precision is chosen for each layer under a budget.
SEARCH: Final = "search"

#: What packed weights get where there are calibration data and nothing else is asked for.
DEFAULT_WITH_DATA: Final = ("gptq",)

#: What a search makes small: the bytes of the model, or the time of its layers.
BYTES: Final = "bytes"
LATENCY: Final = "latency"

#: Measures a model; higher is better.
EvalFn = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Calibration:
    """Calibration data and how much of it is used.

    Attributes:
        data: See :func:`mono_quant.calibration.iterate_batches`; ``None`` if there is none.
        samples: Use at most this many samples; ``None`` for the default of what uses them.
    """

    data: Any = None
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.samples is None:
            return
        if self.data is None:
            raise ConfigurationError("num_calibration_samples was given without calibration_data")
        if type(self.samples) is not int or self.samples < 1:
            raise ConfigurationError(f"num_calibration_samples={self.samples!r} is not a positive integer")


@dataclass(frozen=True)
class StaticChoices:
    """What a call says about static quantization; ``None`` leaves it to the default.

    Attributes:
        observer: How the range of an activation follows from its values.
        equalize: Balance the weight ranges of successive layers first.
        correct_bias: Take the mean error of rounded weights out of the biases.
    """

    observer: str | None = None
    equalize: bool | None = None
    correct_bias: bool | None = None

    def given(self) -> dict[str, Any]:
        """Answer what was chosen, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Budget:
    """What a search has to keep to, and how it measures.

    Attributes:
        eval_fn: Measures a model; higher is better.
        max_drop: How far the measure may fall below that of the float model.
        min_sqnr_db: The least signal-to-noise ratio of the model's answers on the calibration data, in decibels.
        max_bytes: The most bytes of parameters and buffers.
        objective: What is made small, ``"bytes"`` or ``"latency"``.
        formats: What may be chosen for a layer.
        seed: Fixes every random choice.
        resume: A file in which the search keeps what it has measured, and from which it goes on.
    """

    eval_fn: EvalFn | None = None
    max_drop: float | None = None
    min_sqnr_db: float | None = None
    max_bytes: int | None = None
    objective: str | None = None
    formats: Sequence[str] | str | None = None
    seed: int | None = None
    resume: str | Path | None = None

    def __post_init__(self) -> None:
        _require_number("max_drop", self.max_drop, least=0.0)
        _require_number("min_sqnr_db", self.min_sqnr_db)
        for name, least in (("max_bytes", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value < 2**63):
                raise ConfigurationError(f"{name}={value!r} is not an integer of at least {least}")
        if self.objective not in (None, BYTES, LATENCY):
            raise ConfigurationError(f"objective={self.objective!r} is not one of {BYTES}, {LATENCY}")
        if self.eval_fn is not None and not callable(self.eval_fn):
            raise InputTypeError(
                f"eval_fn is a {type(self.eval_fn).__name__}; expected a function from a model to a number"
            )
        if self.resume is not None and not isinstance(self.resume, str | Path):
            raise InputTypeError(f"resume is a {type(self.resume).__name__}; expected the path of a file")

    def require_complete(self) -> None:
        """Refuse a target without its measure, and a measure without its target.

        Raises:
            ConfigurationError: As it says.
        """
        if self.max_drop is not None and self.eval_fn is None:
            raise ConfigurationError(
                "max_drop is the drop of what eval_fn measures, and there is no eval_fn",
                suggestion="Pass eval_fn=, a function that takes the model and answers a number, higher for better; or "
                "use min_sqnr_db=.",
            )
        if self.eval_fn is not None and self.max_drop is None and self.max_bytes is None:
            raise ConfigurationError(
                "eval_fn was given, and nothing asks what it measures",
                suggestion="Pass max_drop=, how far the measure may fall below the float model's.",
            )
        if self.max_bytes is not None and self.objective == LATENCY:
            raise ConfigurationError(
                'objective="latency" and max_bytes contradict each other: the fastest formats are not the smallest',
                suggestion="Leave objective out.",
            )

    @property
    def chosen_objective(self) -> str:
        """What is made small where the call leaves it open: bytes where it limits them, else time."""
        return self.objective or (LATENCY if self.max_bytes is None else BYTES)

    @property
    def wanted(self) -> bool:
        return any(value is not None for value in (self.max_drop, self.min_sqnr_db, self.max_bytes))

    def given(self) -> dict[str, Any]:
        """Answer what was chosen, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Request:
    """The part of a call that decides how to quantize; see :func:`mono_quant.quantize` for the fields.

    Attributes:
        bits: Those of the layers that no rule names.
        several_bits: Whether layers have bits of their own.
    """

    bits: int = 8
    several_bits: bool = False
    group_size: int | None = None
    dynamic: bool | None = None
    calibration: Calibration = field(default_factory=Calibration)
    algorithm: str | Sequence[str] | None = None
    algorithm_options: AlgorithmOptions | None = None
    static: StaticChoices = field(default_factory=StaticChoices)
    budget: Budget = field(default_factory=Budget)

    @property
    def weight_only(self) -> bool:
        """Whether the call asks for packed weights or for several precisions, which static graphs do not have."""
        return self.bits != 8 or self.several_bits or self.group_size is not None


def choose_method(request: Request) -> str:
    """Answer ``LAYERS``, ``STATIC`` or ``SEARCH``.

    Raises:
        ConfigurationError: Options contradict each other, or belong to another way than the one that was chosen.
        InputError: Data that the call needs is missing.
    """
    method = _method(request)
    if method != STATIC and request.static.given():
        raise ConfigurationError(
            f"{_names(request.static.given())} is an option of static quantization, which the call does not ask for",
            suggestion="Pass calibration_data without algorithm=, bits=4 or group_size=.",
        )
    if method != SEARCH and request.budget.given():
        raise ConfigurationError(
            f"{_names(request.budget.given())} is an option of a search, and the search has no target",
            suggestion="Pass max_drop= (with eval_fn=), min_sqnr_db= or max_bytes=.",
        )
    if method == LAYERS and not choose_algorithm(request) and request.algorithm_options is not None:
        raise ConfigurationError("algorithm_options was given without algorithm")
    return method


def _method(request: Request) -> str:
    has_data = request.calibration.data is not None
    if request.budget.wanted:
        request.budget.require_complete()
        return SEARCH
    if request.algorithm is not None:
        _require_fit(request, has_data)
        return LAYERS
    if not has_data:
        if request.dynamic is False:
            raise InputError(
                "dynamic=False asks for static quantization, which needs calibration_data",
                suggestion="Leave dynamic out, or set dynamic=True.",
            )
        return LAYERS
    half = request.bits == 16 and not request.several_bits
    if half or (request.dynamic and not request.weight_only):
        raise ConfigurationError(
            f"{'bits=16' if half else 'dynamic=True'} and calibration_data contradict each other: "
            "nothing would use the data",
            suggestion='Leave calibration_data out, or name an algorithm that uses it: algorithm="smoothquant".',
        )
    return LAYERS if request.weight_only else STATIC


def choose_algorithm(request: Request) -> tuple[str, ...]:
    """Answer the algorithms of a call in the order in which they run.

    Packed weights and calibration data without ``algorithm`` mean GPTQ: what else could the data be for?

    Raises:
        ConfigurationError: A name is unknown, or two exclude each other.
    """
    if request.algorithm is not None:
        return parse_algorithm(request.algorithm)
    uses_data = request.calibration.data is not None and request.weight_only
    return DEFAULT_WITH_DATA if uses_data else ()


def _require_fit(request: Request, has_data: bool) -> None:
    steps = parse_algorithm(request.algorithm or ())
    if request.dynamic is False:
        raise ConfigurationError(
            f"algorithm={'+'.join(steps)!r} and dynamic=False contradict each other: algorithms choose weights, and "
            "inputs are quantized as they come",
            suggestion="Leave dynamic out, or leave algorithm out for static quantization.",
        )
    if needs_data(steps) and not has_data:
        raise ConfigurationError(
            f"algorithm={'+'.join(steps)!r} needs calibration_data",
            suggestion='Pass it, or use algorithm="hqq", which needs none.',
        )
    if has_data and not needs_data(steps):
        raise ConfigurationError(
            f"algorithm={'+'.join(steps)!r} uses no data, and calibration_data was given",
            suggestion='Leave it out, or use an algorithm that uses it, for example "gptq".',
        )


def _require_number(name: str, value: object, least: float = -math.inf) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        expected = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
        raise ConfigurationError(f"{name}={value!r} is not {expected}")


def _names(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}=" for name in given)
