"""Calibration: the data, the run over it, and the observers that watch."""

from mono_quant.calibration.batches import Batch
from mono_quant.calibration.data import CalibrationData, count_samples, iterate_batches
from mono_quant.calibration.observers import (
    OBSERVERS,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    PercentileObserver,
    create_observer,
)
from mono_quant.calibration.own_text import sample_tokens
from mono_quant.calibration.runner import (
    CalibrationProgress,
    call_model,
    evaluating,
    run_batches,
    run_calibration,
    watching,
)

__all__ = [
    "OBSERVERS",
    "Batch",
    "CalibrationData",
    "CalibrationProgress",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PercentileObserver",
    "call_model",
    "count_samples",
    "create_observer",
    "evaluating",
    "iterate_batches",
    "run_batches",
    "run_calibration",
    "sample_tokens",
    "watching",
]
