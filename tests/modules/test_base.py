"""The contract of every quantized layer, whatever its kind and scheme."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import mono_quant
from mono_quant import ops
from mono_quant.core import LayerScheme, QuantizedTensor
from mono_quant.errors import InputTypeError, QuantizationError
from mono_quant.modules import QuantizedModule, counterpart_for_scheme
from mono_quant.modules.base import require_module, scheme_from_dtype
from tests.modules.layers import ASYMMETRIC, CASES, CASES_AND_SCHEMES, HALF, INT4, SYMMETRIC, Case, case_id, quantize

every_layer = pytest.mark.parametrize(("case", "scheme"), CASES_AND_SCHEMES, ids=case_id)
# Graphs are slow to capture: the widest signature of each kind, and each way of computing once.
captured_layers = pytest.mark.parametrize(
    ("case", "scheme"),
    [
        pair
        for pair in CASES_AND_SCHEMES
        if pair[1] == ASYMMETRIC or (pair[0].name == "linear" and pair[1] in (HALF, INT4))
    ],
    ids=case_id,
)
every_case = pytest.mark.parametrize("case", CASES, ids=case_id)


@every_layer
def test_the_original_is_not_modified_and_shares_no_memory(case: Case, scheme: LayerScheme) -> None:
    for dtype in (torch.float32, torch.float16):
        original = case.make().to(dtype)
        before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
        layer = quantize(original, scheme)
        for parameter in original.parameters():
            assert parameter.requires_grad
        for name, tensor in original.state_dict().items():
            assert torch.equal(tensor, before[name])
        theirs = {tensor.untyped_storage().data_ptr() for tensor in original.parameters()}
        assert theirs.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in layer.buffers())


@every_layer
def test_layers_made_in_inference_mode_hold_ordinary_tensors(case: Case, scheme: LayerScheme) -> None:
    with torch.inference_mode():
        layer = case.quantized(scheme)
    assert not any(tensor.is_inference() for tensor in layer.buffers())


@every_layer
def test_there_are_buffers_and_no_parameters(case: Case, scheme: LayerScheme) -> None:
    layer = case.quantized(scheme)
    assert list(layer.parameters()) == []
    assert set(dict(layer.named_buffers())) == set(layer.state_dict())
    assert all(tensor is not None for tensor in layer._buffers.values())
    assert not any(tensor.requires_grad for tensor in layer.buffers())


@every_layer
def test_the_weight_reads_as_the_float_one(case: Case, scheme: LayerScheme) -> None:
    original = case.make()
    layer = quantize(original, scheme)
    assert layer.weight.shape == original.weight.shape
    assert layer.weight.dtype == original.weight.dtype
    quantized = layer._quantized_weight
    if isinstance(quantized, QuantizedTensor):
        assert quantized.symmetric == scheme.symmetric
        # Half a step each for the value and for the zero point.
        steps = 0.5 if scheme.symmetric else 1.0
        rows = (layer.weight - original.weight).abs().flatten(1).reshape(*quantized.scale.shape, -1)
        assert (rows <= quantized.scale.unsqueeze(-1) * (steps + 1e-4)).all()
    else:
        assert torch.equal(layer.weight, original.weight.half().float())


@every_layer
def test_like_answers_the_same_buffers_without_memory(case: Case, scheme: LayerScheme) -> None:
    original = case.make()
    quantized_type = counterpart_for_scheme(original, scheme)
    assert quantized_type is not None
    empty = quantized_type.like(original.to("meta"), scheme)
    full = case.quantized(scheme)
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in full.named_buffers()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.named_buffers()} == described
    assert empty.codes.is_meta
    # A checkpoint goes in by assignment, without memory for the zeros it replaces.
    empty.load_state_dict(full.state_dict(), assign=True)
    x = case.inputs(3)
    assert torch.equal(empty.train(full.training)(x), full(x))


@every_layer
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_out_and_in(case: Case, scheme: LayerScheme, assign: bool) -> None:
    layer, other = case.quantized(scheme), case.quantized(scheme)
    x = case.inputs(3)
    assert not torch.equal(layer(x), other(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(layer(x), other(x))


@every_layer
def test_a_float_weight_is_refused_by_name(case: Case, scheme: LayerScheme) -> None:
    layer = nn.Sequential(case.quantized(scheme))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        layer.load_state_dict(nn.Sequential(case.make()).state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items() if "weight" in name)


@every_layer
def test_a_deep_copy_and_a_pickle_answer_the_same_and_share_nothing(case: Case, scheme: LayerScheme) -> None:
    layer = case.quantized(scheme)
    x = case.inputs(3)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert repr(other) == repr(layer)
        for tensor in other.buffers():
            tensor.zero_()
        assert torch.equal(layer(x), expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_moves_the_float_dtype_and_never_the_codes(
    case: Case, scheme: LayerScheme, dtype: torch.dtype, backend: str
) -> None:
    layer = case.quantized(scheme)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers() if name != "bias"}
    layer.to(dtype)
    assert layer.float_dtype == dtype
    assert layer.weight.dtype == dtype
    for name, tensor in layer.named_buffers():
        if name == "bias":
            assert tensor.dtype == dtype
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    x = case.inputs(3)
    assert layer(x.to(dtype) if x.is_floating_point() else x).dtype == dtype
    assert layer.to_float().weight.dtype == dtype


@every_layer
def test_the_way_back_is_the_standard_layer_with_the_dequantized_weight(case: Case, scheme: LayerScheme) -> None:
    original = case.make().eval()
    layer = quantize(original, scheme)
    back = layer.to_float()
    assert type(back) is type(original)
    assert repr(back) == repr(original)
    assert not back.training
    assert isinstance(back.weight, nn.Parameter)
    assert torch.equal(back.weight, layer.weight)
    assert set(back.state_dict()) == set(original.state_dict())
    # The layer is not modified when its twin is.
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())


@every_case
def test_quantizing_what_was_dequantized_changes_nothing(case: Case) -> None:
    layer = case.quantized(SYMMETRIC)
    again = quantize(layer.to_float(), SYMMETRIC)
    assert torch.equal(again.codes, layer.codes)


@every_layer
def test_a_float_weight_cannot_be_assigned(case: Case, scheme: LayerScheme) -> None:
    layer = case.quantized(scheme)
    x = case.inputs(2)
    expected = layer(x)
    for value in (layer.weight.clone(), nn.Parameter(layer.weight)):
        with pytest.raises(InputTypeError, match="cannot be set"):
            layer.weight = value
    assert torch.equal(layer(x), expected)


@every_case
def test_codes_can_be_assigned_before_and_after_it_ran(case: Case) -> None:
    layer, x = case.quantized(SYMMETRIC), case.inputs(2)
    for divisor in (2, 3):
        codes = torch.div(layer.codes, divisor, rounding_mode="trunc")
        layer.weight = codes
        assert torch.equal(layer.codes, codes)
        twin = copy.deepcopy(layer)
        assert torch.equal(layer(x), twin(x))
    with pytest.raises(InputTypeError, match="cannot be set"):
        layer.weight = layer.codes[:1]
    assert torch.equal(layer(x), twin(x))


@every_case
def test_training_mode_is_kept(case: Case) -> None:
    assert quantize(case.make().eval(), SYMMETRIC).training is False
    assert quantize(case.make().train(), SYMMETRIC).training is True


@every_case
def test_a_weight_quantized_before_is_used_as_it_is(case: Case) -> None:
    original = case.make()
    quantized_type = counterpart_for_scheme(original, ASYMMETRIC)
    assert quantized_type is not None
    weight = quantized_type.quantize_weight(original, ASYMMETRIC)
    layer = quantized_type.from_float(original, ASYMMETRIC, weight)
    assert isinstance(weight, QuantizedTensor)
    assert layer.codes is weight.codes


@every_case
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, HALF], ids=case_id)
def test_a_weight_that_is_not_finite_is_an_error(case: Case, scheme: LayerScheme, value: float) -> None:
    original = case.make()
    with torch.no_grad():
        original.weight.view(-1)[5] = value
    with pytest.raises(QuantizationError, match="NaN"):
        quantize(original, scheme)


@every_case
def test_a_layer_is_not_quantized_twice(case: Case) -> None:
    layer = case.quantized(SYMMETRIC)
    assert counterpart_for_scheme(layer, SYMMETRIC) is None
    reason = type(layer).unsupported_reason(layer)
    assert reason is not None
    assert "already" in reason
    with pytest.raises((QuantizationError, InputTypeError)):
        type(layer).from_float(layer, SYMMETRIC)


@every_case
def test_every_backend_gives_what_the_specification_gives(case: Case, backend: str) -> None:
    for scheme in case.schemes:
        layer = case.quantized(scheme)
        x = case.inputs(4)
        actual = layer(x)
        with ops.use_backend("reference"):
            expected = layer(x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@captured_layers
def test_eight_threads_get_the_answers_of_one(case: Case, scheme: LayerScheme) -> None:
    layer = case.quantized(scheme)
    inputs = [case.inputs(1 + i % 4) for i in range(32)]
    expected = [copy.deepcopy(layer)(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(layer, inputs))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.takes_floats()], ids=case_id)
def test_an_input_that_requires_grad_passes(case: Case, backend: str) -> None:
    for scheme in case.schemes:
        layer = case.quantized(scheme)
        x = case.inputs(2)
        assert torch.equal(layer(x.clone().requires_grad_()).detach(), layer(x))


@captured_layers
def test_one_compiled_graph_holds_the_layer(case: Case, scheme: LayerScheme) -> None:
    torch._dynamo.reset()
    layer = case.quantized(scheme).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = case.inputs(3)
    assert torch.equal(compiled(x), layer(x))


@captured_layers
def test_an_exported_program_takes_any_batch(case: Case, scheme: LayerScheme) -> None:
    layer = case.quantized(scheme).eval()
    shapes = {0: torch.export.Dim("batch", max=64)}
    program = torch.export.export(layer, (case.inputs(3),), dynamic_shapes=(shapes,))
    for batch in (1, 6):
        x = case.inputs(batch)
        assert torch.equal(program.module()(x), layer(x))


@every_layer
def test_all_buffers_move_together(case: Case, scheme: LayerScheme) -> None:
    moved = case.quantized(scheme).to("meta")
    assert all(tensor.is_meta for tensor in moved.buffers())
    assert moved.float_dtype == torch.float32


def test_the_abstract_layer_refuses_to_be_used() -> None:
    with pytest.raises(NotImplementedError):
        QuantizedModule.like(nn.Linear(1, 1), SYMMETRIC)


def test_schemes_come_from_dtypes() -> None:
    assert scheme_from_dtype(torch.qint8, True) == SYMMETRIC
    assert scheme_from_dtype(torch.int8, False) == ASYMMETRIC
    assert scheme_from_dtype(torch.float16, False) == HALF
    with pytest.raises(InputTypeError, match="float64"):
        scheme_from_dtype(torch.float64, False)


def test_a_module_of_another_type_is_named() -> None:
    with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Linear, found Conv1d"):
        require_module(nn.Conv1d(1, 1, 1), nn.Linear)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("schemes", [("symmetric", "asymmetric"), ("asymmetric", "symmetric")])
def test_codes_are_never_read_with_the_zero_points_of_another_scheme(bits: int, schemes: tuple[str, str]) -> None:
    first, second = (
        mono_quant.quantize(nn.Sequential(nn.Linear(32, 8)), bits=bits, scheme=scheme).model for scheme in schemes
    )
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"0.weight is {schemes[0]}, and the layer is {schemes[1]}"):
            second.load_state_dict(first.state_dict(), strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.state_dict().items())
