"""Gradients with respect to the inputs of quantized layers are those of the float layers with dequantized weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import mono_quant
from mono_quant import ops
from mono_quant.core import LayerScheme
from mono_quant.core.layer_scheme import BFLOAT16
from mono_quant.errors import InputError
from mono_quant.modules import QuantizedLinear, QuantizedModule, fuse_pair
from tests.modules.layers import ASYMMETRIC, CASES, CASES_AND_SCHEMES, HALF, INT4, SYMMETRIC, Case, case_id, quantize

pytestmark = [
    # PyTorch's own modules for tangents still compile with it, and one of the tests traces.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

ROUNDED = LayerScheme(BFLOAT16, bits=16)
FLOAT_CASES = (*((c, s) for c, s in CASES_AND_SCHEMES if c.takes_floats()), (CASES[0], ROUNDED))
every_layer = pytest.mark.parametrize(("case", "scheme"), FLOAT_CASES, ids=case_id)
# Graphs are slow to capture: each way of computing once.
one_of_each_kind = pytest.mark.parametrize(
    ("case", "scheme"),
    [pair for pair in FLOAT_CASES if pair[1] == ASYMMETRIC or pair[1] in (INT4, ROUNDED) or pair[0].name == "linear"],
    ids=case_id,
)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
}


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    function(x).backward(direction)
    assert x.grad is not None
    return x.grad


def assert_same_gradient(actual: Tensor, expected: Tensor) -> None:
    """Compare sums of products: float32's rounding, then that of the gradient's dtype."""
    assert expected.abs().max() > 0
    relative = max(1e-5, 2 * torch.finfo(actual.dtype).eps)
    atol = relative * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=atol)


def fused(activation: str, scheme: LayerScheme = ASYMMETRIC) -> tuple[QuantizedLinear, Callable[[Tensor], Tensor]]:
    """Answer a layer that computes an activation, and what it computes where rounding has derivative 1."""
    model = nn.Sequential(quantize(nn.Linear(24, 10), scheme), ACTIVATIONS[activation]())
    fuse_pair(model, "0", "1")
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    assert layer.activation == activation
    plain, twin, function = copy.deepcopy(layer), layer.to_float(), ACTIVATIONS[activation]()
    plain.activation = "none"

    def straight_through(x: Tensor) -> Tensor:
        smooth = twin(x.float())
        # The value of the quantized layer, the derivative of the float one.
        before = smooth + (plain(x.detach().float()) - smooth).detach()
        answer: Tensor = function(before)
        return answer.to(x.dtype)

    return layer, straight_through


@every_layer
@settings(max_examples=5)
@given(
    batch=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    contiguous=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_gradient_is_that_of_the_float_layer(
    case: Case, scheme: LayerScheme, backend: str, batch: int, dtype: torch.dtype, contiguous: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = case.quantized(scheme)
    x = case.inputs(batch).to(dtype)
    if not contiguous:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    direction = torch.randn_like(layer(x))
    actual = gradient(layer, x, direction)
    assert actual.dtype == dtype
    assert_same_gradient(actual, gradient(layer.to_float().double(), x.double(), direction.double()))


@given(leading=st.lists(st.integers(0, 3), max_size=4), scheme=st.sampled_from([SYMMETRIC, ASYMMETRIC, HALF, INT4]))
def test_linear_layers_take_any_leading_dimensions(backend: str, leading: list[int], scheme: LayerScheme) -> None:
    layer = quantize(nn.Linear(24, 10), scheme)
    x = torch.randn(*leading, 24)
    direction = torch.randn(*leading, 10)
    actual = gradient(layer, x, direction)
    assert actual.shape == x.shape
    torch.testing.assert_close(actual, direction @ layer.weight)


@given(
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    dims=st.integers(1, 3),
    single=st.booleans(),
)
def test_convolutions_of_every_geometry(
    backend: str, stride: int, padding: int | str, dilation: int, groups: int, mode: str, dims: int, single: bool
) -> None:
    if (padding == "same" and stride != 1) or (mode == "reflect" and dims == 3):
        return  # PyTorch has none
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = quantize(kind(4, 6, 3, stride, padding, dilation, groups, padding_mode=mode), ASYMMETRIC)
    x = torch.randn(*([] if single else [2]), 4, *[7, 6, 8][:dims])
    direction = torch.randn_like(layer(x))
    expected = gradient(layer.to_float().double(), x.double(), direction.double())
    assert_same_gradient(gradient(layer, x, direction), expected)


@given(
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scheme=st.sampled_from([SYMMETRIC, ASYMMETRIC, ROUNDED]),
)
def test_activations_are_derived_at_what_the_quantized_layer_computes(
    backend: str, activation: str, dtype: torch.dtype, scheme: LayerScheme
) -> None:
    layer, expected = fused(activation, scheme)
    x, direction = torch.randn(3, 5, 24).to(dtype), torch.randn(3, 5, 10).to(dtype)
    assert_same_gradient(gradient(layer, x, direction), gradient(expected, x, direction))


@every_layer
def test_the_answer_is_the_same_whether_or_not_a_gradient_is_recorded(
    case: Case, scheme: LayerScheme, backend: str
) -> None:
    layer, x = case.quantized(scheme), case.inputs(3)
    answer = layer(x.clone().requires_grad_())
    assert answer.requires_grad
    assert torch.equal(answer.detach(), layer(x))
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_activation_is_computed_the_same_whether_or_not_a_gradient_is_recorded(
    activation: str, backend: str
) -> None:
    layer, _ = fused(activation)
    x = torch.randn(3, 24)
    assert torch.equal(layer(x.clone().requires_grad_()).detach(), layer(x))


@every_layer
def test_no_float_copy_of_the_weight_is_kept(case: Case, scheme: LayerScheme, backend: str) -> None:
    layer, x = case.quantized(scheme), case.inputs(3).requires_grad_()
    layer(case.inputs(3))  # packs
    # The input: PyTorch keeps it for the way back of padding.
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.buffers())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= own


def test_a_model_passes_gradients_to_what_is_trained_below_it(backend: str) -> None:
    below, head = nn.Linear(16, 24), nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 10)).eval()
    frozen = mono_quant.quantize(head).model
    x, y = torch.randn(64, 16), torch.randint(0, 10, (64,))
    optimizer = torch.optim.Adam(below.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(frozen(below(x)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, HALF, INT4, ROUNDED], ids=case_id)
def test_a_bias_that_someone_made_trainable_gets_its_gradient(scheme: LayerScheme, backend: str) -> None:
    layer = quantize(nn.Linear(24, 10), scheme)
    layer.bias = nn.Parameter(layer.bias.clone())
    layer(torch.randn(2, 3, 24)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((10,), 6.0))


def test_a_trainable_bias_of_a_convolution_gets_its_gradient(backend: str) -> None:
    layer = quantize(nn.Conv2d(4, 6, 3), ASYMMETRIC)
    layer.bias = nn.Parameter(layer.bias.clone())
    layer(torch.randn(2, 4, 5, 6)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 2.0 * 3 * 4))


def test_weights_written_to_before_the_way_back_are_noticed(backend: str) -> None:
    layer = quantize(nn.Linear(24, 10), INT4)
    answer = layer(torch.randn(3, 24, requires_grad=True))
    layer.weight_packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        answer.sum().backward()


class TestTransforms:
    """``torch.func`` and forward-mode derivatives, none of which shows on ``requires_grad`` alone."""

    @every_layer
    def test_of_layers_are_those_of_the_float_layer(self, case: Case, scheme: LayerScheme, backend: str) -> None:
        layer, x = case.quantized(scheme), case.inputs(2)
        twin, tangent = layer.to_float(), torch.randn_like(case.inputs(2))

        def total(of: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda sample: of(sample).sum()

        for ours, theirs in (
            (jacrev(layer)(x), jacrev(twin)(x)),
            (jacfwd(layer)(x), jacfwd(twin)(x)),
            (jvp(layer, (x,), (tangent,))[1], jvp(twin, (x,), (tangent,))[1]),
            (grad(total(layer))(x), grad(total(twin))(x)),
            (vmap(grad(total(layer)))(x), vmap(grad(total(twin)))(x)),
            (vmap(grad(total(layer)), in_dims=1)(x.unsqueeze(1)), vmap(grad(total(twin)), in_dims=1)(x.unsqueeze(1))),
        ):
            assert_same_gradient(ours, theirs)

    @pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
    def test_of_activations_reach_any_order(self, activation: str, backend: str) -> None:
        layer, _ = fused(activation)
        # Where rounding is the identity there is nothing but the float layer.
        x = (torch.randint(0, 256, (24,)) - 100).float() / 64
        x[0], x[1] = -100 / 64, 155 / 64
        twin = nn.Sequential(layer.to_float(), ACTIVATIONS[activation]())

        def total(of: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda sample: of(sample).square().sum()

        expected = hessian(total(twin))(x)
        for ours in (
            hessian(total(layer))(x),
            jacrev(jacrev(total(layer)))(x),
            jacrev(jacfwd(total(layer)))(x),
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(jacfwd(layer)(x), jacrev(twin)(x), rtol=1e-4, atol=1e-4)

    def test_second_derivatives_by_autograd(self, backend: str) -> None:
        layer, expected = fused("gelu")
        x = torch.randn(3, 24)

        def penalty(function: Callable[[Tensor], Tensor]) -> Tensor:
            point = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(function(point).sum(), point, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), point)
            return second

        torch.testing.assert_close(penalty(layer), penalty(expected), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("activation", ["none", "gelu"])
    def test_with_respect_to_a_bias(self, activation: str, backend: str) -> None:
        layer = quantize(nn.Linear(24, 10), ASYMMETRIC) if activation == "none" else fused(activation)[0]
        x, tangent = torch.randn(3, 24), torch.randn(10)
        state = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}

        def answer(bias: Tensor) -> Tensor:
            found: Tensor = functional_call(layer, {**state, "bias": bias}, (x,))
            return found

        backward = jacrev(answer)(layer.bias)
        torch.testing.assert_close(jacfwd(answer)(layer.bias), backward)
        torch.testing.assert_close(jvp(answer, (layer.bias,), (tangent,))[1], backward @ tangent)
        if activation == "none":
            assert torch.equal(backward, torch.eye(10).expand(3, 10, 10))

    def test_of_several_layers_at_once_are_refused(self) -> None:
        layers = [quantize(nn.Conv1d(4, 6, 3), ASYMMETRIC) for _ in range(3)]
        stacked = {name: torch.stack([layer.state_dict()[name] for layer in layers]) for name in layers[0].state_dict()}
        x = torch.randn(2, 4, 9)

        def total(state: dict[str, Tensor], x: Tensor) -> Tensor:
            answer: Tensor = functional_call(layers[0], state, (x,)).sum()
            return answer

        with pytest.raises(InputError, match="several layers"):
            vmap(grad(total, argnums=1), in_dims=(0, None))(stacked, x)


class TestSurroundings:
    """Where layers meet the rest of PyTorch."""

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed_activations(self, reentrant: bool, backend: str) -> None:
        model = mono_quant.quantize(nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 10)).eval()).model
        x, direction = torch.randn(3, 24), torch.randn(3, 10)
        expected = gradient(model, x, direction)

        def recomputed(x: Tensor) -> Tensor:
            answer: Tensor = checkpoint(model, x, use_reentrant=reentrant)
            return answer

        assert torch.equal(gradient(recomputed, x, direction), expected)

    @one_of_each_kind
    def test_autocast_changes_nothing(self, case: Case, scheme: LayerScheme, backend: str) -> None:
        layer, x = case.quantized(scheme), case.inputs(3)
        direction = torch.randn_like(layer(x))
        expected = gradient(layer, x, direction)
        with torch.autocast("cpu"):
            assert torch.equal(gradient(layer, x, direction), expected)

    @one_of_each_kind
    def test_compiled_layers(self, case: Case, scheme: LayerScheme) -> None:
        torch._dynamo.reset()
        layer, x = case.quantized(scheme), case.inputs(3)
        direction = torch.randn_like(layer(x))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_same_gradient(gradient(compiled, x, direction), gradient(layer, x, direction))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
    def test_compiled_activations(self, activation: str, dtype: torch.dtype) -> None:
        torch._dynamo.reset()
        layer, _ = fused(activation)
        x, direction = torch.randn(3, 24).to(dtype), torch.randn(3, 10).to(dtype)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert compiled(x.clone().requires_grad_()).dtype == dtype
        assert_same_gradient(gradient(compiled, x, direction), gradient(layer, x, direction))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_programs_without_python_hold_operators_alone(self) -> None:
        layer, x = quantize(nn.Linear(24, 10), ASYMMETRIC), torch.randn(3, 24, requires_grad=True)
        for strict in (False, True):
            program = torch.export.export(layer, (x,), strict=strict)
            targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            assert targets == ["mono_quant.linear_dynamic.default"]
        traced = torch.jit.trace(layer, (x,))  # type: ignore[no-untyped-call]
        assert "PythonOp" not in str(traced.graph)
        assert "^" not in str(traced.graph)
        assert torch.equal(traced(x), layer(x))

    def test_transformers_conv1d(self, backend: str) -> None:
        conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(10, 24)
        model = mono_quant.quantize(nn.Sequential(conv), min_parameters=0).model
        assert isinstance(model[0], QuantizedModule)
        x, direction = torch.randn(2, 3, 24), torch.randn(2, 3, 10)
        torch.testing.assert_close(gradient(model, x, direction), direction @ model[0].weight.t())

    def test_a_copy_that_ran_with_gradients_is_an_ordinary_layer(self) -> None:
        layer, x = quantize(nn.Linear(24, 10), ASYMMETRIC), torch.randn(3, 24, requires_grad=True)
        expected = layer(x)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


def test_a_quantized_bert_passes_the_gradient_of_the_float_model_on() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    result = mono_quant.quantize(model)
    small = result.model
    assert len(result.info.fused_layers) == 2
    embedded, direction = torch.randn(2, 7, 64), torch.randn(2, 7, 64)

    def run(of: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: of(inputs_embeds=x).last_hidden_state

    def assert_close(actual: Tensor, expected: Tensor) -> None:
        assert F.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.99

    for backend in ops.available_backends():
        with ops.use_backend(backend):
            assert_close(gradient(run(small), embedded, direction), gradient(run(model), embedded, direction))
            with torch.no_grad():  # where nothing but tangents keeps layers from running whole
                ours, theirs = (jvp(run(of), (embedded,), (direction,))[1] for of in (small, model))
            assert_close(ours, theirs)


def test_functional_call_takes_the_state_of_a_bert_that_runs_whole() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    )
    small = mono_quant.quantize(transformers.BertModel(config).eval()).model
    embedded, state = torch.randn(2, 7, 64), dict(small.state_dict())
    name = "encoder.layer.0.output.dense.bias"

    def run(bias: Tensor) -> Tensor:
        answer = functional_call(small, {**state, name: bias}, (), {"inputs_embeds": embedded})
        hidden: Tensor = answer.last_hidden_state
        return hidden

    with torch.no_grad():
        expected = small(inputs_embeds=embedded).last_hidden_state
        for _ in range(2):
            torch.testing.assert_close(run(state[name]), expected)
            torch.testing.assert_close(small(inputs_embeds=embedded).last_hidden_state, expected)
        assert not torch.allclose(run(torch.randn(64)), expected)
    assert grad(lambda bias: run(bias).pow(3).sum())(state[name]).abs().max() > 0
