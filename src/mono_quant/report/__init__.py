"""What people look at: metrics, checks of a quantized model, and the comparison with its original."""

from mono_quant.report.comparison import Comparison, Latency, LayerError, compare_models, measure_latency
from mono_quant.report.inputs import example_inputs, load_inputs
from mono_quant.report.inspection import FileSummary, inspect_file, validate_checkpoint
from mono_quant.report.metrics import (
    calculate_model_size,
    calculate_sqnr,
    cosine_similarity,
    decibels,
    max_abs_error,
    model_bytes,
    nearest_neighbour_agreement,
    sqnr_db,
)
from mono_quant.report.outputs import Inputs, OutputError, compare_outputs, named_tensors
from mono_quant.report.search import SearchPoint, SearchReport
from mono_quant.report.sensitivity import (
    FormatEffect,
    LayerSensitivity,
    SensitivityReport,
    TensorError,
    UniformEffect,
)
from mono_quant.report.validation import ValidationResult, check_accuracy_warnings, validate_quantization
from mono_quant.report.weights import quantized_layers, stored_weight

__all__ = [
    "Comparison",
    "FileSummary",
    "FormatEffect",
    "Inputs",
    "Latency",
    "LayerError",
    "LayerSensitivity",
    "OutputError",
    "SearchPoint",
    "SearchReport",
    "SensitivityReport",
    "TensorError",
    "UniformEffect",
    "ValidationResult",
    "calculate_model_size",
    "calculate_sqnr",
    "check_accuracy_warnings",
    "compare_models",
    "compare_outputs",
    "cosine_similarity",
    "decibels",
    "example_inputs",
    "inspect_file",
    "load_inputs",
    "max_abs_error",
    "measure_latency",
    "model_bytes",
    "named_tensors",
    "nearest_neighbour_agreement",
    "quantized_layers",
    "sqnr_db",
    "stored_weight",
    "validate_checkpoint",
    "validate_quantization",
]
