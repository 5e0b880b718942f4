"""quantize(): the copy, what is replaced and what is not, and what bad input gets."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mono_quant
from mono_quant import quantize
from mono_quant.core import LayerScheme
from mono_quant.errors import (
    CheckpointError,
    ConfigurationError,
    InputError,
    InputTypeError,
    QuantizationError,
    ValidationError,
)
from mono_quant.modules import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear, QuantizedModule, WeightOnlyLinear
from mono_quant.report import model_bytes, sqnr_db


class Block(nn.Module):
    """A residual block with a norm, nested containers and a layer that is reached twice."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mix = nn.Linear(width, width, bias=False)
        self.mix_again = self.mix

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix_again(self.inner(self.norm(self.mix(x))))


class TiedLanguageModel(nn.Module):
    """An embedding whose weight is also that of the output layer."""

    def __init__(self, vocabulary: int = 40, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())


@pytest.mark.parametrize(("bits", "least_db"), [(8, 30.0), (4, 12.0), (16, 60.0)])
def test_the_copy_answers_nearly_the_same_and_the_original_is_not_touched(bits: int, least_db: float) -> None:
    model = nn.Sequential(Block(), nn.Sequential(Block(), Block())).eval()
    before, x = snapshot(model), torch.randn(5, 32)
    result = quantize(model, bits=bits)
    assert_untouched(model, before)
    assert sqnr_db(model(x), result.model(x)) > least_db
    assert result.info.bytes_after < result.info.bytes_before
    assert result.info.bytes_before == model_bytes(model)
    assert result.info.bytes_after == model_bytes(result.model)


def test_nested_layers_of_any_depth_are_replaced() -> None:
    model: nn.Module = nn.Linear(8, 8)
    for _ in range(6):
        model = nn.Sequential(model)
    result = quantize(model)
    assert result.info.selected_layers == ["0.0.0.0.0.0"]
    assert isinstance(result.model.get_submodule("0.0.0.0.0.0"), QuantizedLinear)


def test_a_bare_layer_is_a_model() -> None:
    layer = nn.Linear(8, 4)
    result = quantize(layer)
    assert isinstance(result.model, QuantizedLinear)
    assert result.info.selected_layers == [""]
    assert isinstance(quantize(layer, inplace=True).model, QuantizedLinear)


def test_a_module_reached_twice_is_quantized_once_and_stays_one() -> None:
    result = quantize(Block())
    assert result.model.mix is result.model.mix_again
    assert [name for name in result.info.selected_layers if name.startswith("mix")] == ["mix"]


def test_tied_weights_are_quantized_once_and_stay_tied() -> None:
    model = TiedLanguageModel().eval()
    tokens = torch.randint(0, 40, (2, 7))
    result = quantize(model)
    assert isinstance(result.model.embed, QuantizedEmbedding)
    assert isinstance(result.model.head, QuantizedLinear)
    assert result.model.embed.codes is result.model.head.codes
    result.model(tokens)  # also after the kernels have chosen their layout
    assert result.model.embed.codes is result.model.head.codes
    assert {result.info.layers["embed"].bytes_after > 0, result.info.layers["head"].bytes_after > 0} == {True, False}
    assert result.info.bytes_after == model_bytes(result.model)


def test_tied_weights_of_different_kinds_share_one_format_with_4_bits_too() -> None:
    result = quantize(TiedLanguageModel(), bits=4)
    assert result.model.embed.codes is result.model.head.codes
    assert result.info.layers["head"].scheme.bits == 8
    assert isinstance(result.model.blocks[0].mix, WeightOnlyLinear)
    assert any("8 bits" in warning and "head" in warning for warning in result.warnings)


def test_parametrized_layers_are_quantized_with_the_weight_they_compute() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 4)).eval()
    expected = model(torch.ones(1, 16))
    result = quantize(model)
    assert isinstance(result.model[0], QuantizedLinear)
    assert sqnr_db(expected, result.model(torch.ones(1, 16))) > 30
    assert result.info.skip_reasons == {}


def test_hooks_of_a_replaced_layer_keep_working() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    seen: list[torch.Size] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    quantize(model).model(torch.ones(3, 8))
    assert seen == [torch.Size((3, 8))]


def test_inplace_works_on_the_model_itself() -> None:
    model = nn.Sequential(Block(), nn.Conv2d(3, 4, 3))
    result = quantize(model, inplace=True)
    assert result.model is model
    assert isinstance(model[0].mix, QuantizedLinear)
    assert model[0].mix is model[0].mix_again
    assert isinstance(model[1], QuantizedConv2d)


def test_inplace_refuses_before_it_changes_anything() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(QuantizationError, match="'1'"):
        quantize(model, inplace=True)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, before["0.weight"])


def test_every_layer_that_stays_in_float_has_its_reason() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(8, 8), nn.LayerNorm(8), Special(8, 8), nn.Linear(8, 2), nn.Embedding(9, 8, max_norm=1.0)
    )
    info = quantize(model, min_parameters=20).info
    assert info.selected_layers == ["0"]
    assert info.skipped_layers == ["1", "2", "3", "4"]
    reasons = info.skip_reasons
    assert "LayerNorm has no quantized counterpart" in reasons["1"]
    assert "subclass of Linear" in reasons["2"]
    assert "16 parameters" in reasons["3"]
    assert "max_norm" in reasons["4"]


def replace_forward(module: nn.Module) -> None:
    """Let a module answer ten times what it answered, as hooks of other libraries change what modules do."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: 10 * forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(32, 32), torch.randn(5, 32)),
        (nn.Conv1d(4, 8, 3), torch.randn(2, 4, 9)),
        (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9)),
        (nn.Embedding(20, 16), torch.arange(12)),
        (nn.EmbeddingBag(20, 16), torch.arange(12).reshape(3, 4)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 16}, {"inplace": True}])
def test_a_layer_whose_own_forward_was_replaced_stays_as_it_is(
    layer: nn.Module, x: Tensor, options: dict[str, object]
) -> None:
    model = nn.ModuleDict({"layer": copy.deepcopy(layer), "other": nn.Linear(32, 32)}).eval()
    replace_forward(model["layer"])
    expected = model["layer"](x)
    result = quantize(model, **options)
    assert result.info.selected_layers == ["other"]
    assert "its forward was replaced" in result.info.skip_reasons["layer"]
    assert type(result.model["layer"]) is type(layer)
    assert torch.equal(result.model["layer"](x), expected)


def test_a_replaced_forward_is_no_reason_where_there_is_another() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    replace_forward(model[1])
    replace_forward(model[2])
    reasons = quantize(model, skip="2").info.skip_reasons
    assert reasons == {"1": "LayerNorm has no quantized counterpart", "2": "skip names '2'"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"skip": ["mix"]}, ["inner.0", "inner.2"]),
        ({"skip": "inner"}, ["mix"]),
        ({"skip": ["inner.*"]}, ["mix"]),
        ({"skip": ["*.2", "mix"]}, ["inner.0"]),
        ({"include": ["inner.0"]}, ["inner.0"]),
        ({"include": ["inner"]}, ["inner.0", "inner.2"]),
        ({"include": ["inner"], "skip": ["inner.2"]}, ["inner.0"]),
        ({"include": nn.Linear}, ["inner.0", "inner.2", "mix"]),
        ({"include": [nn.Sequential]}, None),
        ({"skip": [nn.Linear]}, None),
        ({"min_parameters": 2000}, ["inner.0", "inner.2"]),
    ],
)
def test_layers_are_chosen_by_name_glob_block_type_and_size(
    options: dict[str, object], expected: list[str] | None
) -> None:
    if expected is None:
        with pytest.raises(QuantizationError, match="nothing to quantize"):
            quantize(Block(), **options)  # type: ignore[arg-type]
        return
    assert quantize(Block(), **options).info.selected_layers == expected  # type: ignore[arg-type]


def test_info_holds_sizes_errors_and_time() -> None:
    info = quantize(Block()).info
    assert info.original_size_mb == info.bytes_before / 2**20
    assert info.compression_ratio == info.bytes_before / info.bytes_after
    assert info.sqnr_db is not None
    assert 30 < info.sqnr_db < 60
    assert info.seconds > 0
    assert info.layers["mix"].scheme == LayerScheme()
    assert info.layers["mix"].bytes_before == 32 * 32 * 4
    assert quantize(Block(), run_validation=False).info.sqnr_db is None


def test_compute_dtype_casts_what_stays_in_float() -> None:
    model = TiedLanguageModel().eval()
    tokens = torch.randint(0, 40, (2, 7))
    result = quantize(model, compute_dtype=torch.bfloat16)
    out = result.model(tokens)
    assert out.dtype == torch.bfloat16
    assert result.model.blocks[0].norm.weight.dtype == torch.bfloat16
    assert result.model.embed.weight_scale.dtype == torch.float32
    assert sqnr_db(model(tokens), out.float()) > 20


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weight_and_bias_read_in_the_compute_dtype(bits: int) -> None:
    layer = quantize(nn.Linear(32, 8), bits=bits, compute_dtype=torch.bfloat16).model
    out = nn.functional.linear(torch.randn(2, 32, dtype=torch.bfloat16), layer.weight, layer.bias)
    assert out.dtype == torch.bfloat16


def test_progress_reports_every_layer() -> None:
    calls: list[tuple[int, int, str]] = []
    quantize(Block(), progress=lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(1, 3), (2, 3), (3, 3)]
    assert {name for _, _, name in calls} == {"mix", "inner.0", "inner.2"}


def test_a_progress_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    quantize(Block(), show_progress=True)
    assert capsys.readouterr().out == ""


def test_a_model_in_training_mode_is_said_to_be() -> None:
    assert any("eval()" in warning for warning in quantize(Block().train()).warnings)
    assert not any("eval()" in warning for warning in quantize(Block().eval()).warnings)


def test_quantizing_twice_says_that_nothing_is_left() -> None:
    result = quantize(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(QuantizationError, match="quantized already"):
        quantize(result.model)


def test_a_group_size_applies_to_linear_layers_and_the_rest_is_named() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Conv2d(3, 4, 3))
    for bits in (4, 8):
        result = quantize(model, bits=bits, group_size=32)
        assert result.info.layers["0"].scheme == LayerScheme("weight_only", bits=bits, group_size=32)
        assert result.info.layers["1"].scheme.kind == "int8_dynamic"
        assert any("in 8 bits" in warning for warning in result.warnings)


def test_without_a_group_size_the_widest_that_fits_is_taken() -> None:
    model = nn.Sequential(nn.Linear(256, 8), nn.Linear(192, 8), nn.Linear(96, 8), nn.Linear(50, 8))
    result = quantize(model, bits=4)
    assert [layer.scheme.group_size for layer in result.info.layers.values()] == [128, 64, 32, None]
    assert any("one 4-bit scale per output channel" in warning for warning in result.warnings)


def test_per_tensor_scales() -> None:
    result = quantize(nn.Sequential(nn.Linear(16, 8)), per_channel=False)
    assert len(result.model[0].weight_scale.unique()) == 1


def test_a_state_dict_becomes_a_quantized_state_dict_that_loads() -> None:
    model = Block().eval()
    result = quantize(model.state_dict())
    assert isinstance(result.model, dict)
    assert result.model["mix.weight"].dtype == torch.int8
    other = quantize(Block().eval()).model
    other.load_state_dict(result.model)
    x = torch.randn(3, 32)
    assert sqnr_db(model(x), other(x)) > 30
    assert result.info.skip_reasons == {"norm": "its weight has 1 dimension, layers with channels have at least 2"}


def test_a_path_is_loaded(tmp_path: Path) -> None:
    model = Block()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "m.safetensors")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    for name in ("m.safetensors", "m.pt"):
        assert quantize(tmp_path / name).model["inner.0.weight"].dtype == torch.int8
        assert quantize(str(tmp_path / name), bits=4).model["inner.0.weight_packed"].dtype == torch.int32


def test_a_file_that_needs_unpickling_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        quantize(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"bits": 3}, ConfigurationError, "expected 4, 8 or 16"),
        ({"bits": "8"}, ConfigurationError, "'8'"),
        ({"scheme": "affine"}, ConfigurationError, "affine"),
        ({"skip": ["nope"]}, ConfigurationError, "'nope'"),
        ({"include": ["inner.7"]}, ConfigurationError, "'inner.7'"),
        ({"include": []}, ConfigurationError, "no layer at all"),
        ({"skip": 3}, InputTypeError, "found 3"),
        ({"bits": 4, "group_size": 24}, ConfigurationError, "layer 'inner.0': group_size=24 does not divide its 32"),
        ({"bits": 4, "group_size": 0}, ConfigurationError, "not a positive integer"),
        ({"bits": 16, "group_size": 32}, ConfigurationError, "no meaning"),
        ({"bits": 4, "per_channel": False}, ConfigurationError, "contradicts"),
        ({"bits": 4, "dtype": torch.float16}, ConfigurationError, "contradict"),
        ({"dtype": torch.int32}, ConfigurationError, "torch.int32"),
        ({"compute_dtype": torch.int8}, ConfigurationError, "compute_dtype"),
        ({"min_parameters": -1}, ConfigurationError, "negative"),
        ({"min_parameters": 1, "skip_param_threshold": 2}, ConfigurationError, "both"),
        ({"on_failure": "explode"}, ConfigurationError, "explode"),
        ({"dynamic": False}, InputError, "calibration_data"),
        ({"dynamic": True, "calibration_data": [torch.ones(1)]}, ConfigurationError, "contradict"),
        ({"num_calibration_samples": 5}, ConfigurationError, "without calibration_data"),
        ({"sqnr_error_threshold": 300.0}, ValidationError, "below 300 dB"),
    ],
)
def test_each_impossible_option_gets_one_clear_error(
    options: dict[str, object], error: type[Exception], says: str
) -> None:
    model = Block()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        quantize(model, **options)  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert_untouched(model, before)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="group_siz"):
        quantize(Block(), group_siz=32)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_names_its_layer(value: float) -> None:
    model = nn.Sequential(Block(), Block())
    with torch.no_grad():
        model[1].inner[2].weight[3, 5] = value
    with pytest.raises(QuantizationError, match=r"'1\.inner\.2': 1 of its 2048 weights"):
        quantize(model)
    with pytest.raises(QuantizationError, match=r"1\.inner\.2"):
        quantize(model.state_dict())
    assert quantize(model, skip=["1.inner.2"]).info.skip_reasons["1.inner.2"].startswith("skip names")


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.ReLU()), nn.LayerNorm(4), nn.Sequential(), {}, {"bias": torch.ones(3)}]
)
def test_a_model_with_nothing_to_quantize_is_an_error(model: object) -> None:
    with pytest.raises(QuantizationError, match="nothing to quantize"):
        quantize(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [None, 3, [nn.Linear(2, 2)], torch.ones(3)])
def test_something_else_than_a_model_is_an_error(model: object) -> None:
    with pytest.raises(InputTypeError):
        quantize(model)  # type: ignore[arg-type]


def test_meta_weights_and_compiled_models_are_refused() -> None:
    with torch.device("meta"):
        empty = nn.Linear(3, 3)
    with pytest.raises(QuantizationError, match="meta"):
        quantize(empty)
    with pytest.raises(InputTypeError, match="compile the result"):
        quantize(torch.compile(nn.Linear(3, 3), backend="eager"))  # type: ignore[arg-type]


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.lock = __import__("threading").Lock()
    with pytest.raises(InputError, match="inplace=True"):
        quantize(model)
    assert quantize(model, inplace=True).model is model


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-30, 1e-42])
def test_constant_zero_and_denormal_channels_come_out_right(value: float) -> None:
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight[2] = value
    x = torch.randn(4, 12)
    for options in ({}, {"scheme": "asymmetric"}, {"bits": 16} if abs(value) >= 1 or value == 0 else {}):
        out = quantize(layer, **options).model(x)  # type: ignore[arg-type]
        assert torch.allclose(out, layer(x), atol=0.15)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_zero_sized_layers_work(inputs: int, outputs: int) -> None:
    layer = nn.Linear(inputs, outputs)
    out = quantize(layer).model(torch.ones(3, inputs))
    assert torch.allclose(out, layer(torch.ones(3, inputs)))


def test_activations_are_fused_where_that_is_certain_and_come_back() -> None:
    model = Block().eval()
    result = quantize(model)
    x = torch.randn(6, 32)
    assert result.model.inner[0].activation == "gelu"
    plain = quantize(model, fuse_activations=False)
    assert plain.model.inner[0].activation == "none"
    assert torch.allclose(result.model(x), plain.model(x), atol=1e-5)
    reverted = mono_quant.revert_to_standard_modules(result.model)
    assert type(reverted.inner[1]) is nn.GELU
    assert result.model.inner[0].activation == "gelu"
    assert torch.allclose(reverted(x), mono_quant.revert_to_standard_modules(plain.model)(x))


def test_an_activation_whose_own_forward_was_replaced_is_not_fused() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()).eval()
    replace_forward(model[1])
    result = quantize(model)
    assert [result.model[index].activation for index in (0, 2)] == ["none", "relu"]
    x = torch.randn(6, 16)
    assert sqnr_db(model(x), result.model(x)) > 30
    with pytest.raises(InputError, match="ReLU"):
        mono_quant.fuse_pair(result.model, "0", "1")


def test_the_copy_can_be_copied_and_moved_on() -> None:
    result = quantize(TiedLanguageModel().eval())
    tokens = torch.randint(0, 40, (1, 5))
    expected = result.model(tokens)
    assert torch.equal(copy.deepcopy(result.model)(tokens), expected)
    half = copy.deepcopy(result.model).to(torch.bfloat16)
    assert half(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_float64_model_answers_float64(bits: int) -> None:
    model = nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 8)).double().eval()
    tokens = torch.arange(9)
    out = quantize(model, bits=bits).model(tokens)
    assert out.dtype == torch.float64
    assert sqnr_db(model(tokens), out) > 12


def test_inplace_reaches_layers_that_are_also_held_in_lists_and_dicts() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.also = [self.layer]
            self.named = {"layer": self.layer}

    model = Holder()
    quantize(model, inplace=True)
    assert isinstance(model.layer, QuantizedLinear)
    assert model.also[0] is model.layer
    assert model.named["layer"] is model.layer


def test_zero_points_asked_for_with_float16_are_answered_with_a_warning() -> None:
    assert any("bits=16" in warning for warning in quantize(Block(), bits=16, scheme="asymmetric").warnings)
    assert not any("bits=16" in warning for warning in quantize(Block(), bits=16).warnings)


def test_sparse_tensors_stay_as_they_are_and_cannot_be_saved(tmp_path: Path) -> None:
    sparse = torch.eye(4).to_sparse()
    result = quantize({"a.weight": sparse, "b.weight": torch.randn(8, 8), "c": sparse})
    assert result.info.skip_reasons == {"a": "its weight has the layout sparse_coo"}
    assert torch.equal(result.model["c"].to_dense(), torch.eye(4))
    with pytest.raises(CheckpointError, match=r"'a\.weight' cannot be saved: it has the layout"):
        result.save(tmp_path / "m.safetensors")
