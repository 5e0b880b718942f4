"""The one call: ``quantize``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant import integrations as integrations  # registers layers of other libraries
from mono_quant.algorithms import AlgorithmOptions
from mono_quant.api.layers import quantize_layers
from mono_quant.api.method import (
    LAYERS,
    SEARCH,
    Budget,
    Calibration,
    EvalFn,
    Request,
    StaticChoices,
    choose_method,
)
from mono_quant.api.options import Selectors, resolve_options
from mono_quant.api.progress import progress_bar
from mono_quant.api.replace import Progress
from mono_quant.api.result import QuantizationResult
from mono_quant.api.search import search_precision
from mono_quant.api.static import quantize_with_calibration
from mono_quant.config import QuantizationConfig
from mono_quant.errors import InputTypeError
from mono_quant.io import load_source

Model = nn.Module | Mapping[str, Tensor] | str | Path


def quantize(
    model: Model,
    bits: int | Mapping[str, int] = 8,
    dynamic: bool | None = None,
    scheme: str = "symmetric",
    calibration_data: Any = None,
    show_progress: bool = False,
    *,
    include: Selectors | None = None,
    skip: Selectors | None = None,
    min_parameters: int = 0,
    group_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    fuse_activations: bool = True,
    inplace: bool = False,
    algorithm: str | Sequence[str] | None = None,
    algorithm_options: AlgorithmOptions | None = None,
    observer: str | None = None,
    equalize: bool | None = None,
    correct_bias: bool | None = None,
    eval_fn: EvalFn | None = None,
    max_drop: float | None = None,
    min_sqnr_db: float | None = None,
    max_bytes: int | None = None,
    objective: str | None = None,
    formats: Sequence[str] | str | None = None,
    seed: int | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    run_validation: bool = True,
    on_failure: str = "error",
    accuracy_warning: str = "warn",
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
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
    num_calibration_samples: int | None = None,
) -> QuantizationResult:
    """Quantize a model; unless ``inplace`` is set, a copy, and the original is never touched.

    Linear, convolution and embedding layers are replaced by layers of the same behaviour that store integers. With
    ``bits=8`` linear layers and convolutions also compute in integers: their inputs are quantized as they come,
    each row (each sample of a convolution) on its own, so no calibration data is needed.

    With ``calibration_data`` (and ``bits=8``) the ranges of inputs and outputs are fixed instead: the model becomes a
    graph whose activations stay 8-bit from layer to layer, with batch norms folded and activations fused. It is called
    as the model is, takes any batch size, and serves convolutional networks best. What cannot be captured as a graph
    is quantized layer by layer, and ``info.not_captured`` says why.

    Args:
        model: A module; a state dict; or a path to a ``.safetensors`` file, a ``.pt`` file of plain tensors, or a
            transformers directory.
        bits: 8 (int8), 4 (int4 weights in groups, float arithmetic) or 16 (float16 weights, float32 arithmetic). Or a
            mapping from names or globs of layers to 4, 8, 16 or 32 (stay in float): a layer's own name comes before
            that of a block around it, a name before a glob, any other glob before ``"*"``. Layers that it does not
            name have 8 bits. Globs that contradict each other on a layer are an error.
        dynamic: ``True`` for dynamic quantization, also the default without calibration data; ``False`` for static.
        scheme: ``"symmetric"`` weights, or ``"asymmetric"`` ones with zero points.
        calibration_data: Inputs like those that the model will meet: a tensor, a mapping of tensors, a DataLoader, or
            an iterable of tensors, tuples, mappings or (inputs, labels) pairs, each a batch. With ``bits=8`` they ask
            for static quantization; ``bits=4``, ``group_size`` and ``algorithm`` use them to choose better codes.
        show_progress: Show a progress bar on standard error.
        include: Quantize only these layers: exact names (of a layer, or of a block for all layers inside), globs, or
            module types.
        skip: Leave these layers in float; as ``include``.
        min_parameters: Leave layers with fewer weights in float.
        group_size: Inputs that share one scale. With ``bits=4`` the default is the widest of 128, 64 and 32 that
            divides a layer's inputs; with ``bits=8`` it asks for weight-only int8. With a mapping it is that of the
            4-bit layers.
        compute_dtype: Cast what stays in float, for example to ``torch.bfloat16``; floating-point inputs of the
            model must then have that dtype.
        fuse_activations: Let an int8 linear layer compute the ReLU, GELU or SiLU module that follows it, where it is
            certain that nothing else reads its output.
        inplace: Quantize ``model`` itself, freeing each float weight as soon as it is replaced.
        observer: Static: how the range of an activation follows from its values; one of
            :data:`mono_quant.calibration.OBSERVERS`.
        equalize: Static: balance the weight ranges of successive layers first.
        correct_bias: Static: take the mean error of rounded weights out of the biases.
        eval_fn: Measures a model: takes the module and answers a plain number, higher for better. It is called for the
            float model and for some quantized ones, all in evaluation mode without gradients and with the same state
            of the random generators, and must leave the model as it is.
        max_drop: Search: how far ``eval_fn`` may fall below its value for the float model. Needs ``calibration_data``,
            as every search does, to measure how sensitive each layer is (:func:`mono_quant.sensitivity`).
        min_sqnr_db: Search: the least signal-to-noise ratio of the model's outputs on the calibration data, in
            decibels.
        max_bytes: Search: the most bytes of all parameters and buffers. Alone it asks for the most accurate model of
            that size; with another target for the smallest that keeps both.
        objective: Search: what to make small, ``"latency"`` (the times of the layers, measured on the first
            calibration batch; the default without ``max_bytes``) or ``"bytes"``.
        formats: Search: what it may choose from besides float; see :func:`mono_quant.sensitivity`. All by default.
        seed: Search: fixes every random choice; 0 by default. Measured times are not in its power: with
            ``objective="bytes"`` two runs answer the same, with ``"latency"`` if they share a ``resume`` file.
        resume: Search: a file that is replaced after each measurement. If it exists the search goes on from it, also
            with another target; one that is damaged or of another model, data, measure or seed is refused.
        progress: Called after each layer with the number done, the number in all and the layer's name; while
            calibrating after each batch, with numbers of samples; while searching after each measurement, with what
            it found and about how many seconds are left.
        run_validation: Measure the error of each weight, for ``info`` and for the two thresholds.
        on_failure: What happens when the weights' ratio falls below ``sqnr_error_threshold``: ``"error"``,
            ``"warn"`` or ``"ignore"``.
        accuracy_warning: The same for ``sqnr_warning_threshold``; ``"warn"`` adds to the result's warnings. Static: it
            also decides what happens when the model's answers on the calibration data fall below
            ``sqnr_error_threshold``.
        sqnr_warning_threshold: Signal-to-quantization-noise ratio of all weights together, in decibels.
        sqnr_error_threshold: As above.
        dtype: ``torch.qint8``, ``torch.quint8`` (asymmetric) or ``torch.float16``; another way to say ``bits``.
        symmetric: Another way to say ``scheme``; wins over it.
        per_channel: ``False`` for one scale per tensor instead of one per output channel.
        config: The number format in one object; wins over the single options.
        layer_names, layer_types: 1.1's names of ``include``.
        skip_names, skip_types, skip_layer_names, skip_layer_types, modules_to_not_convert: 1.1's names of ``skip``. A
            name also stands for a last part (``"lm_head"`` for ``"model.lm_head"``) and may match nothing.
        skip_param_threshold: 1.1's name of ``min_parameters``.
        num_calibration_samples: Use at most this many samples of the calibration data; static: 150, algorithms: 128.

    Returns:
        The quantized model with what was done and what was not, and why. For a state dict the model is a state dict.

    Raises:
        ConfigurationError: An option is impossible, contradicts another, or names layers that do not exist.
        InputError: The model or the path cannot be used as given; ``InputTypeError`` if it is of the wrong type.
        CheckpointError: The file cannot be read.
        QuantizationError: A weight is not finite (its layer is named), or there is nothing to quantize.
        BudgetError: A search found nothing within its budget; says what the best was and how to relax the target.
        ValidationError: The error of the weights is beyond a threshold that is set to ``"error"``.
    """
    options = resolve_options(
        bits=bits, scheme=scheme, include=include, skip=skip, min_parameters=min_parameters, group_size=group_size,
        compute_dtype=compute_dtype, fuse_activations=fuse_activations, inplace=inplace,
        run_validation=run_validation, on_failure=on_failure, accuracy_warning=accuracy_warning,
        sqnr_warning_threshold=sqnr_warning_threshold, sqnr_error_threshold=sqnr_error_threshold, dtype=dtype,
        symmetric=symmetric, per_channel=per_channel, config=config, layer_names=layer_names,
        layer_types=layer_types, skip_names=skip_names, skip_types=skip_types, skip_layer_names=skip_layer_names,
        skip_layer_types=skip_layer_types, modules_to_not_convert=modules_to_not_convert,
        skip_param_threshold=skip_param_threshold,
    )  # fmt: skip
    request = Request(
        bits=options.bits, several_bits=options.bit_rules is not None, group_size=options.group_size, dynamic=dynamic,
        algorithm=algorithm, algorithm_options=algorithm_options,
        calibration=Calibration(calibration_data, num_calibration_samples),
        static=StaticChoices(observer, equalize, correct_bias),
        budget=Budget(eval_fn, max_drop, min_sqnr_db, max_bytes, objective, formats, seed, resume),
    )  # fmt: skip
    method = choose_method(request)
    source = load_source(model) if isinstance(model, str | Path) else model
    with progress_bar(progress, show_progress) as report:
        if method == LAYERS:
            return quantize_layers(source, options, request, report)
        if not isinstance(source, nn.Module):
            raise InputTypeError(
                f"calibration and search run the model, and a {type(source).__name__} cannot be run",
                suggestion="Pass the torch.nn.Module, or a transformers directory.",
            )
        if method == SEARCH:
            return search_precision(source, options, request, report)
        return quantize_with_calibration(source, options, request.calibration, request.static, report)
