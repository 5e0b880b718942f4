"""quantize(model, calibration_data=...): static graphs, what is said of them, and what bad input does."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mono_quant
from mono_quant import (
    ConfigurationError,
    InputError,
    InputTypeError,
    LayerScheme,
    QuantizationError,
    ValidationError,
    quantize,
)
from mono_quant.core import Cut
from mono_quant.graph import StaticGraph
from tests.graph.networks import Decides, small
from tests.static_models import Made, decibels, made, network

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["graph", "cut", "layers"])
def example(request: pytest.FixtureRequest) -> Made:
    return made(request.param)


def test_it_answers_nearly_the_same(example: Made) -> None:
    with torch.no_grad():
        assert decibels(example.model(example.data), example.answers) > 35


@pytest.mark.parametrize("name", ["graph", "cut", "layers"])
def test_the_original_is_not_touched(name: str) -> None:
    fresh, _ = network(name)
    example = made(name)
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(example.model.state_dict()[key], tensor)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in example.model.modules())


@pytest.mark.parametrize("batch", [0, 1, 3, 40])
def test_any_batch_size_gives_the_answers_of_single_samples(batch: int) -> None:
    quantized = made("graph").result.model
    images = torch.randn(batch, 3, 24, 24)
    together = quantized(images)
    assert together.shape == (batch, 5)
    alone = [quantized(image[None]) for image in images]
    assert torch.equal(together, torch.cat([torch.empty(0, 5), *alone]))


def test_other_image_sizes_are_right_where_the_model_takes_them() -> None:
    example = made("graph")
    for size in ((17, 31), (48, 48)):
        images = torch.randn(4, 3, *size)
        with torch.no_grad():
            assert decibels(example.model(images), example.result.model(images)) > 25


def test_the_info_adds_up(example: Made) -> None:
    info = example.result.info
    assert list(info.layers) == info.selected_layers
    assert all(layer.scheme in (LayerScheme("int8_static"), LayerScheme()) for layer in info.layers.values())
    assert all(layer.sqnr_db is not None and layer.sqnr_db > 35 for layer in info.layers.values())
    assert info.skipped_layers == list(info.skip_reasons)
    assert not set(info.skipped_layers) & set(info.selected_layers)
    assert info.calibration_samples_used == 16
    assert info.bytes_after < info.bytes_before
    assert info.compression_ratio == info.bytes_before / info.bytes_after
    assert info.sqnr_db is not None
    assert info.sqnr_db > 35
    assert info.output_sqnr_db is not None
    assert info.output_sqnr_db > 35
    assert info.symmetric
    assert info.seconds > 0


def test_cuts_and_layers_in_float_are_named_with_their_reasons() -> None:
    info = made("cut").result.info
    assert info.not_captured is None
    assert Cut("norm", "aten.layer_norm.default", "it has no 8-bit form") in info.cuts
    assert info.skip_reasons["norm"] == "LayerNorm: it has no 8-bit form"
    assert info.skip_reasons["table"] == "Embedding: it has no 8-bit form"
    assert info.skip_reasons["spare"] == "the model does not use it"
    assert info.layers["last"].scheme == LayerScheme()
    assert not any("Norm2d" in reason for reason in info.skip_reasons.values())
    assert made("graph").result.info.cuts == []
    assert made("graph").result.info.skip_reasons == {}


def test_a_model_that_cannot_be_captured_says_so_in_info_and_warnings() -> None:
    example = made("layers")
    info = example.result.info
    assert info.not_captured is not None
    assert "depends on the values of tensors" in info.not_captured
    assert any(info.not_captured in warning for warning in example.result.warnings)
    assert info.skip_reasons == {
        "unused": "the calibration data never reached it", "circular": "its padding mode is circular",
    }  # fmt: skip
    assert type(example.result.model) is Decides


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: forward(3 * x) - x.mean()


def test_a_graph_does_what_a_forward_does_that_was_put_in_a_layers_place() -> None:
    model = small().eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ReLU):
            replace_forward(layer)
    result = quantize(model, calibration_data=IMAGES)
    assert result.info.not_captured is None
    assert decibels(model(IMAGES), result.model(IMAGES)) > 25


def test_a_layer_alone_stays_in_float_whose_forward_was_replaced() -> None:
    model = Decides().eval()
    replace_forward(model.conv)
    result = quantize(model, calibration_data=IMAGES)
    assert result.info.not_captured is not None
    assert "its forward was replaced" in result.info.skip_reasons["conv"]
    assert type(result.model.conv) is nn.Conv2d
    assert decibels(model(IMAGES), result.model(IMAGES)) > 25


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"skip": "2"}, {"2": "skip names '2'"}),
        ({"include": "0"}, {"2": "include does not name it"}),
        ({"layer_names": ["0"]}, {"2": "include does not name it"}),
        ({"modules_to_not_convert": ["2", "lm_head"]}, {"2": "skip names '2'"}),
        ({"min_parameters": 100}, {"2": "it has 32 parameters, fewer than min_parameters=100"}),
    ],
)
def test_layers_are_chosen_as_for_other_quantizations(options: dict[str, Any], reasons: dict[str, str]) -> None:
    info = quantize(small(), calibration_data=IMAGES, **options).info
    assert info.selected_layers == ["0"]
    assert info.skip_reasons == reasons


def test_types_choose_layers_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 4)).eval()
    info = quantize(model, calibration_data=IMAGES, skip=[nn.Linear, nn.Embedding]).info
    assert info.skip_reasons == {"2": "skip names Linear"}
    assert info.warnings == ["skip names Embedding, and the model has no such module"]


@pytest.mark.parametrize(
    "data",
    [
        [IMAGES],
        [(IMAGES, torch.zeros(12))],
        [{"input": IMAGES}],
        {"input": IMAGES},
        DataLoader(TensorDataset(IMAGES, torch.zeros(12)), batch_size=4),
        iter([IMAGES[:5], IMAGES[5:]]),
    ],
    ids=["list", "pairs", "mappings", "mapping", "loader", "iterator"],
)
def test_every_form_of_data_calibrates(data: Any) -> None:
    assert quantize(small(), calibration_data=data).info.calibration_samples_used == 12


def test_samples_are_limited_and_progress_counts_them() -> None:
    seen: list[tuple[int, int, str]] = []
    batches = (IMAGES[i : i + 4] for i in (0, 4, 8))
    result = quantize(
        small(), calibration_data=batches, num_calibration_samples=10, progress=lambda *call: seen.append(call)
    )
    assert seen == [(4, 10, "calibration"), (8, 10, "calibration"), (10, 10, "calibration")]
    assert result.info.calibration_samples_used == 10
    seen.clear()
    quantize(small(), calibration_data=iter([IMAGES]), progress=lambda *call: seen.append(call))
    assert seen[-1] == (12, 12, "calibration")


def test_a_progress_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    quantize(small(), calibration_data=IMAGES, show_progress=True)
    assert capsys.readouterr().out == ""


def test_choices_reach_the_graph() -> None:
    model, data = small(), IMAGES
    answers = [
        quantize(model, calibration_data=data, **options).model(data)
        for options in ({}, {"observer": "minmax"}, {"correct_bias": False}, {"equalize": True})
    ]
    for index, answer in enumerate(answers[1:], start=1):
        assert not torch.equal(answer, answers[0]), index


class Interrupts(nn.Module):
    """Fails the second time that it is really run."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.conv, self.error, self.calls = nn.Conv2d(3, 4, 3), error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            raise self.error
        if bool(x.sum() > 1e9):
            return x
        return self.conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone"), ValueError("no")])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(error: BaseException) -> None:
    model = Interrupts(error).train()
    model.conv.register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def batches() -> Iterator[Tensor]:
        yield IMAGES[:4]
        model.calls = 9
        yield IMAGES[4:]

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError
    with pytest.raises(expected):
        quantize(model, calibration_data=batches())
    assert all(module.training for module in model.modules())
    assert len(model.conv._forward_hooks) == 1
    assert not model.conv._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], InputError, "empty"),
        (iter(()), InputError, "empty"),
        (torch.empty(0, 3, 8, 8), InputError, "empty"),
        ([IMAGES, IMAGES * torch.nan], InputError, "batch 1 holds NaN"),
        ([IMAGES / 0], InputError, "batch 0 holds"),
        (torch.randn(4, 5, 8, 8), InputError, "batch 0 .*5, 8, 8"),
        ([IMAGES, IMAGES[:, :2]], InputError, "batch 1"),
        (IMAGES.double(), InputError, "batch 0 .float64"),
        ([IMAGES, IMAGES.to(torch.uint8)], InputError, "batch 1"),
        (IMAGES.to("meta"), InputError, "batch 0 holds no values"),
        ("images.npy", InputTypeError, "str"),
        (7, InputTypeError, "int"),
        ([["a", "b"]], InputError, "batch 0"),
        ([{"image": IMAGES}], InputError, "'image'.*forward does not take"),
    ],
)
def test_data_that_cannot_be_used_is_named(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(small(), calibration_data=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "asymmetric"}, "asymmetric weights"),
        ({"per_channel": False}, "per_channel=False"),
        ({"compute_dtype": torch.bfloat16}, "compute_dtype=torch.bfloat16"),
        ({"fuse_activations": False}, "fuse_activations=False"),
        ({"inplace": True}, "inplace=True"),
        ({"dynamic": True}, "dynamic=True"),
        ({"bits": 16}, "bits=16"),
        ({"observer": "best"}, "observer='best'"),
        ({"num_calibration_samples": 0}, "num_calibration_samples=0"),
        ({"skip": ["nothing"]}, "'nothing'"),
    ],
)
def test_options_that_static_graphs_do_not_have_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quantize(small(), calibration_data=IMAGES, **options)


def test_no_data_for_static_quantization_is_refused() -> None:
    with pytest.raises(InputError, match="needs calibration_data"):
        quantize(small(), dynamic=False)
    with pytest.raises(ConfigurationError, match="observer=, equalize= is an option of static quantization"):
        quantize(small(), observer="mse", equalize=True)
    with pytest.raises(InputTypeError, match="cannot be run"):
        quantize(small().state_dict(), calibration_data=IMAGES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ReLU(), "no layer"),
        (lambda: small().to("meta"), "'0'.*meta"),
        (lambda: nn.LazyConv2d(4, 1), "not initialised"),
        (lambda: quantize(small()).model, "'0' is quantized already"),
        (lambda: quantize(small(), calibration_data=IMAGES).model, "quantized already"),
        (lambda: nn.Sequential(made("layers").result.model), "quantized already"),
    ],
)
def test_models_without_float_layers_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize(make(), calibration_data=IMAGES)


def test_a_static_model_is_not_quantized_dynamically_either() -> None:
    for name in ("graph", "layers"):
        with pytest.raises(QuantizationError, match="quantized already"):
            quantize(made(name).result.model)


def test_a_weight_that_is_not_finite_names_its_layer() -> None:
    model = small()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match="'2'"):
        quantize(model, calibration_data=IMAGES)


def test_thresholds_apply_to_weights_and_answers() -> None:
    def call(**options: Any) -> mono_quant.QuantizationResult:
        return quantize(small(), calibration_data=IMAGES, **options)

    with pytest.raises(ValidationError, match="weights"):
        call(sqnr_error_threshold=200.0)
    result = call(sqnr_error_threshold=200.0, on_failure="warn")
    assert [warning.split(" is ")[0] for warning in result.warnings] == [
        "the weights' signal-to-quantization-noise ratio",
        "the signal-to-noise ratio of the model's answers",
    ]
    assert call(sqnr_error_threshold=200.0, on_failure="ignore", accuracy_warning="ignore").warnings == []
    with pytest.raises(ValidationError, match="answers"):
        call(sqnr_error_threshold=200.0, on_failure="ignore", accuracy_warning="error")
    assert call(run_validation=False).info.sqnr_db is None


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: model.half(),
        lambda model: model.to(torch.bfloat16), lambda model: model.double(), lambda model: model.train(),
    ],
    ids=["copy", "pickle", "half", "bfloat16", "double", "train"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["graph", "cut"])
def test_a_graph_keeps_its_answers_through_copies_and_casts(name: str, change: Callable[[Any], nn.Module]) -> None:
    example = made(name)
    assert torch.equal(change(copy.deepcopy(example.result.model))(example.data), example.answers)


def test_static_layers_go_back_to_standard_ones_and_graphs_refuse() -> None:
    layers, graph = made("layers"), made("graph")
    standard = mono_quant.revert_to_standard_modules(layers.result.model)
    assert [type(module) for module in standard.modules()] == [type(module) for module in layers.model.modules()]
    with torch.no_grad():
        assert decibels(layers.model(layers.data), standard(layers.data)) > 35
    assert all(p.dtype == torch.float32 for p in mono_quant.dequantize_model(layers.result.model).parameters())
    for revert in (mono_quant.revert_to_standard_modules, mono_quant.dequantize_model):
        with pytest.raises(InputError, match="cannot be turned back"):
            revert(graph.result.model)


def test_static_layers_read_like_the_float_layers() -> None:
    model = Decides().eval()
    calls: list[int] = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    quantized = quantize(model, calibration_data=torch.randn(4, 3, 12, 12)).model
    calls.clear()
    quantized(torch.randn(2, 3, 12, 12))
    assert len(calls) == 1
    assert quantized.conv.stride == (1, 1)
    assert quantized.head.in_features == 8
    torch.testing.assert_close(quantized.conv.weight, model.conv.weight, atol=0.01, rtol=0)
    assert quantized.conv.bias.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 4, 24, 24), (2, 1, 24, 24), (3, 24, 24), (2, 3, 0, 0)])
def test_inputs_that_do_not_fit_are_one_clear_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="static"):
        made("graph").result.model(torch.randn(*shape))


def test_integers_and_other_arguments_are_refused() -> None:
    graph = made("graph").result.model
    with pytest.raises(InputError, match="floating-point"):
        graph(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
    with pytest.raises(InputError, match="takes x, found nothing"):
        graph()


def test_a_model_of_transformers_is_one_graph_with_named_answers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config).eval()
    data = {"pixel_values": torch.randn(8, 3, 32, 32)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        result = quantize(model, calibration_data=data)
    assert isinstance(result.model, StaticGraph)
    answer = result.model(**data)
    assert torch.equal(answer.logits, answer["logits"])
    assert torch.equal(answer[0], answer.logits)
    with pytest.raises(AttributeError, match="logits"):
        answer.scores  # noqa: B018
    with torch.no_grad():
        assert decibels(model(**data).logits, answer.logits) > 20


class Tokens(nn.Module):
    """A small vision transformer: patches, attention, parameters of its own, linear layers on rows of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.gate, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.gate(self.patches(x).relu().flatten(2).transpose(1, 2))
        tokens = torch.cat([self.first.expand(x.shape[0], -1, -1), tokens], 1)
        return self.head(self.layer(tokens)[:, 0])  # type: ignore[no-any-return]


class Segments(nn.Module):
    """An encoder and decoder: a transposed convolution, a join with an earlier layer, a bilinear enlargement."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x).relu()
        low = self.deep(high).relu()
        joined = torch.cat([high, self.up(low)], 1)
        return self.out(joined) + nn.functional.interpolate(low, scale_factor=2.0, mode="bilinear")[:, :2]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "skipped"),
    [
        (Tokens, {"": "the parameters that Tokens itself holds stay in float",
                  "layer.norm1": "LayerNorm: it has no 8-bit form", "layer.norm2": "LayerNorm: it has no 8-bit form"}),
        (Segments, {}),
    ],
)  # fmt: skip
def test_networks_of_other_kinds_are_one_graph_with_cuts(kind: type[nn.Module], skipped: dict[str, str]) -> None:
    torch.manual_seed(0)
    model, images = kind().eval(), torch.randn(16, 3, 16, 16)
    info = (result := quantize(model, calibration_data=images)).info
    assert info.not_captured is None
    assert info.skip_reasons == skipped
    assert info.cuts
    for batch in (0, 1, 16):
        with torch.no_grad():
            expected, found = model(images[:batch]), result.model(images[:batch])
        assert found.shape == expected.shape
        assert not batch or decibels(expected, found) > 25
