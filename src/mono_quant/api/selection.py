"""Which layers of a model are quantized, to what, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from mono_quant.api.bits import STAY_FLOAT
from mono_quant.api.names import layers_are, matches_name, require_matches, shortened
from mono_quant.api.options import Options, Selector
from mono_quant.core.layer_scheme import WEIGHT_ONLY, LayerScheme
from mono_quant.errors import ConfigurationError, QuantizationError
from mono_quant.modules import (
    REPLACED_FORWARD,
    QuantizedModule,
    counterpart_for_scheme,
    counterpart_of_type,
    has_own_forward,
)


@dataclass(frozen=True)
class Candidate:
    """A layer that will be replaced."""

    name: str
    module: nn.Module
    quantized_type: type[QuantizedModule]
    scheme: LayerScheme


@dataclass
class Selection:
    """The outcome: layers to replace in the model's order, and for every other layer with weights the reason."""

    chosen: list[Candidate] = field(default_factory=list)
    skip_reasons: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def select_layers(model: nn.Module, options: Options) -> Selection:
    """Choose the layers of ``model`` that ``options`` ask for.

    Raises:
        ConfigurationError: A name or glob of ``include`` or ``skip`` matches nothing, or a group size does not fit.
        QuantizationError: A chosen weight is not finite, or has no data (``meta`` device).
    """
    require_name_matches(options, [name for name, _ in model.named_modules()])
    selection = Selection(warnings=_unmatched_types(options, list(model.modules())))
    tied = _tied_to_others(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            selection.skip_reasons[name] = "is quantized already"
            continue
        if not _holds_weights(module) or ".parametrizations." in f".{name}.":
            continue  # a parametrization belongs to the layer whose weight it computes
        candidate = _consider(name, module, options, id(_weight(module)) in tied)
        if isinstance(candidate, Candidate):
            _require_finite(candidate)
            selection.chosen.append(candidate)
        else:
            selection.skip_reasons[name] = candidate
    _note_wider_layers(selection, options)
    return selection


def reasons_to_skip(model: nn.Module, options: Options) -> tuple[dict[str, str], list[str]]:
    """Answer why ``options`` leave layers in float, by name, and warnings about options that mean nothing here.

    Raises:
        ConfigurationError: A name or glob of ``include`` or ``skip`` matches nothing.
        QuantizationError: A layer's weight has no values yet.
    """
    require_name_matches(options, [name for name, _ in model.named_modules()])
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _holds_weights(module) or ".parametrizations." in f".{name}.":
            continue
        for parameter in module.parameters(recurse=False):
            _require_values(name, parameter)
        reason = _reason_by_selectors(name, module, options)
        weight = _weight(module)
        if reason is None and weight is not None and weight.numel() < options.min_parameters:
            reason = f"it has {weight.numel()} parameters, fewer than min_parameters={options.min_parameters}"
        if reason is not None:
            reasons[name] = reason
    return reasons, _unmatched_types(options, list(model.modules()))


def assign_schemes(
    selection: Selection, schemes: Mapping[str, LayerScheme | None], why_float: Mapping[str, str]
) -> None:
    """Change the schemes of chosen layers; see :func:`mono_quant.api.layers.quantize_by_schemes`.

    Args:
        selection: Changed in place.
        schemes: For a layer's name its scheme, or ``None`` to leave it in float.
        why_float: For such a layer, the reason.

    Raises:
        ConfigurationError: A name is not that of a chosen layer, or its layer cannot be stored so.
    """
    unknown = schemes.keys() - {candidate.name for candidate in selection.chosen}
    if unknown:
        name = min(unknown)
        found = selection.skip_reasons.get(name)
        raise ConfigurationError(
            f"layer {name!r} is given a scheme and cannot be quantized: {found or 'the model has no such layer'}"
        )
    chosen, selection.chosen = selection.chosen, []
    for candidate in chosen:
        scheme = schemes.get(candidate.name, candidate.scheme)
        if scheme is None:
            selection.skip_reasons[candidate.name] = why_float.get(candidate.name, "the plan leaves it in float")
        else:
            selection.chosen.append(_with_scheme(candidate, scheme))


def _with_scheme(candidate: Candidate, scheme: LayerScheme) -> Candidate:
    quantized_type = counterpart_for_scheme(candidate.module, scheme)
    if quantized_type is None:
        raise ConfigurationError(
            f"layer {candidate.name!r} ({type(candidate.module).__name__}) cannot be stored as {scheme}"
        )
    weight = _weight(candidate.module)
    assert weight is not None
    if scheme.group_size is not None and weight.shape[1] % scheme.group_size:
        raise ConfigurationError(
            f"layer {candidate.name!r}: group_size={scheme.group_size} does not divide its {weight.shape[1]} inputs"
        )
    return replace(candidate, quantized_type=quantized_type, scheme=scheme)


def _consider(name: str, module: nn.Module, options: Options, tied: bool) -> Candidate | str:
    """Answer the replacement of one layer, or the reason why it stays."""
    reason = _reason_by_selectors(name, module, options)
    if reason is not None:
        return reason
    float_type = type_before_parametrizations(module)
    weight = _weight(module)
    if weight is None:
        return f"{float_type.__name__} has no quantized counterpart"
    if isinstance(weight, UninitializedParameter):
        return "its weight is not initialised yet: run the model once"
    # A weight that a skipped partner or an embedding shares must have one format for both: 8 bits.
    scheme = options.scheme_for(torch.Size((0, 0)), options.bits, weight_only_possible=False)
    quantized_type = counterpart_for_scheme(module, scheme)
    if quantized_type is None:
        return _reason_without_counterpart(module)
    if not weight.is_floating_point():
        return f"its weight holds {weight.dtype}, not floating-point numbers"
    if "weight" not in module._parameters and not is_parametrized(module, "weight"):
        return "its weight is computed by a hook: remove weight_norm or spectral_norm first"
    if weight.numel() < options.min_parameters:
        return f"it has {weight.numel()} parameters, fewer than min_parameters={options.min_parameters}"
    unsupported = quantized_type.unsupported_reason(module)
    if unsupported is not None:
        return unsupported
    rule, bits = options.bits_for(name)
    if bits == STAY_FLOAT:
        return f"bits says 32 for {rule!r}: float"
    scheme = _scheme(name, module, options, bits, tied)
    return Candidate(name, module, counterpart_for_scheme(module, scheme) or quantized_type, scheme)


def _scheme(name: str, module: nn.Module, options: Options, bits: int, tied: bool) -> LayerScheme:
    weight_only = LayerScheme(WEIGHT_ONLY, bits=8)
    possible = not tied and counterpart_for_scheme(module, weight_only) is not None
    weight = _weight(module)
    assert weight is not None
    try:
        return options.scheme_for(weight.shape, bits, possible)
    except ConfigurationError as error:
        raise ConfigurationError(f"layer {name!r}: {error.message}", suggestion=error.suggestion) from None


def _reason_without_counterpart(module: nn.Module) -> str:
    float_type = type_before_parametrizations(module)
    if has_own_forward(module) and counterpart_of_type(float_type) is not None:
        return REPLACED_FORWARD
    for base in float_type.__mro__[1:]:
        if issubclass(base, nn.Module) and base in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding):
            return (
                f"{float_type.__name__} is a subclass of {base.__name__} and may use its weight in another way "
                "(mono_quant.modules.register takes it in)"
            )
    return f"{float_type.__name__} has no quantized counterpart"


def _reason_by_selectors(name: str, module: nn.Module, options: Options) -> str | None:
    for selector in (*options.skip, *options.lenient_skip):
        if _matches(selector, name, module):
            return f"skip names {_describe(selector)}"
    include = (*options.include, *options.lenient_include)
    if include and not any(_matches(selector, name, module) for selector in include):
        return "include does not name it"
    return None


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    return matches_name(selector, name) if isinstance(selector, str) else isinstance(module, selector)


def _describe(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else selector.__name__


def require_name_matches(options: Options, names: list[str]) -> None:
    """Refuse a name or glob of ``include``, ``skip`` or ``bits`` that matches none of ``names``.

    Raises:
        ConfigurationError: One matches nothing.
    """
    for option, selectors in (("skip", options.skip), ("include", options.include)):
        require_matches(option, [selector for selector in selectors if isinstance(selector, str)], names)
    if options.bit_rules is not None:
        require_matches("bits", options.bit_rules.patterns, names)


def _unmatched_types(options: Options, modules: list[nn.Module]) -> list[str]:
    return [
        f"{option} names {selector.__name__}, and the model has no such module"
        for option, selectors in (("skip", options.skip), ("include", options.include))
        for selector in selectors
        if isinstance(selector, type) and not any(isinstance(module, selector) for module in modules)
    ]


def _weight(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _holds_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or is_parametrized(module)


def _tied_to_others(model: nn.Module) -> set[int]:
    """Answer the ids of parameters that modules of different types share, such as an embedding and an output layer."""
    owners: dict[int, set[type[nn.Module]]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(type(module))
    return {key for key, types in owners.items() if len(types) > 1}


def _require_values(name: str, weight: Tensor) -> None:
    if isinstance(weight, UninitializedParameter):
        raise QuantizationError(f"layer {name!r}: its weight is not initialised yet: run the model once")
    if weight.is_meta:
        raise QuantizationError(
            f"layer {name!r}: its weight is on the meta device and has no values",
            suggestion="Load the weights before quantizing.",
        )


def _require_finite(candidate: Candidate) -> None:
    weight = _weight(candidate.module)
    assert weight is not None
    _require_values(candidate.name, weight)
    # aminmax passes NaN on and needs no temporary of the weight's size.
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all()):
        broken = int((~torch.isfinite(weight.detach())).sum())
        raise QuantizationError(
            f"layer {candidate.name!r}: {broken} of its {weight.numel()} weights are NaN or infinite",
            suggestion="Repair the checkpoint, or leave the layer in float with skip=.",
        )


def _note_wider_layers(selection: Selection, options: Options) -> None:
    """Say once which layers are wider, or have coarser scales, than the options read at first sight."""
    packed = [c for c in selection.chosen if options.packs(options.bits_for(c.name)[1])]
    wider = [c.name for c in packed if c.scheme.kind != WEIGHT_ONLY]
    if wider:
        selection.warnings.append(
            f"{layers_are(wider)} stored in 8 bits with one scale per channel, because only linear layers "
            f"that share no weight with another kind of layer can be packed in groups: {shortened(wider)}"
        )
    ungrouped = [c.name for c in packed if c.scheme.bits == 4 and c.scheme.group_size is None]
    if ungrouped:
        selection.warnings.append(
            f"{layers_are(ungrouped)} stored with one 4-bit scale per output channel, because none of 128, 64 and 32 "
            f"divides the inputs: {shortened(ungrouped)}"
        )


def parted_weights(model: nn.Module, selection: Selection) -> list[str]:
    """Say which layers of ``model`` share a weight and will be stored in different formats, one sentence for each."""
    schemes = {candidate.name: str(candidate.scheme) for candidate in selection.chosen}
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and (name in schemes or name in selection.skip_reasons):
            sharing.setdefault(id(weight), []).append(name)
    return [
        f"{' and '.join(map(repr, names))} share one weight, which is now stored once for each format: "
        f"{', '.join(sorted({schemes.get(name, 'float') for name in names}))}"
        for names in sharing.values()
        if len({schemes.get(name) for name in names}) > 1
    ]
