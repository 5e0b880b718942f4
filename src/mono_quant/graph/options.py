"""What static quantization can be told, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from mono_quant.calibration import OBSERVERS, CalibrationProgress
from mono_quant.core import Cut
from mono_quant.errors import ConfigurationError


@dataclass(frozen=True)
class StaticOptions:
    """Options of :func:`mono_quant.graph.quantize_static`.

    Attributes:
        observer: How the range of an activation follows from the values seen; one of
            :data:`mono_quant.calibration.OBSERVERS`.
        calibration_samples: Use at most this many samples; ``None`` for all.
        equalize: Balance the weight ranges of successive layers before quantizing (cross-layer equalization).
        correct_bias: Take the mean error that rounding the weights makes out of the biases.
        skip: Names of layers that stay in float.
        capture: Try to capture the model as a graph; ``False`` quantizes layer by layer at once.
        progress: Called after each batch.
    """

    observer: str = "mse"
    calibration_samples: int | None = 150
    equalize: bool = False
    correct_bias: bool = True
    skip: frozenset[str] = frozenset()
    capture: bool = True
    progress: CalibrationProgress | None = None

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ConfigurationError(f"observer={self.observer!r} is not one of {', '.join(OBSERVERS)}")
        if self.calibration_samples is not None and self.calibration_samples < 1:
            raise ConfigurationError(f"calibration_samples={self.calibration_samples} is not positive")


@dataclass
class StaticReport:
    """What a static quantization did.

    Attributes:
        captured: Whether the model runs as one graph; otherwise layer by layer.
        reason: Why it was not captured; empty if it was.
        layers: Names of the layers with 8-bit weights, in order.
        energies: For each of them the sum of squares of its weight, as the graph holds it after folding, and that of
            what rounding changed.
        skipped: For each layer with weights that stayed in float, why.
        cuts: Operations that run in float and why, in order; moves of data are left out.
        samples: Calibration samples used.
        dynamic_sizes: Whether inputs of other sizes (not only other batches) are accepted.
        capture_seconds: What finding the graph, folding and fusing took; 0 if there was no attempt.
        calibration_seconds: What running the calibration data and watching its values took; 0 layer by layer.
        sqnr_db: Signal-to-noise ratio of the model's answers on the first calibration samples, in decibels; ``None``
            if it answers only zeros there.
        warnings: What the caller should know, one sentence each.
    """

    captured: bool = False
    reason: str = ""
    layers: list[str] = field(default_factory=list)
    energies: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    samples: int = 0
    dynamic_sizes: bool = False
    capture_seconds: float = 0.0
    calibration_seconds: float = 0.0
    sqnr_db: float | None = None
    warnings: list[str] = field(default_factory=list)
