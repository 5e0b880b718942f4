"""Calibration: the data, the run over it, and the observers that watch."""

from mono_quant.calibration.batches import Batch
from mono_quant.calibration.data import CalibrationData, count_samples, iterate_batches

__all__ = ["Batch", "CalibrationData", "count_samples", "iterate_batches"]
