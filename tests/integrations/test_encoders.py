"""Encoders of transformers: which layers run as one call, that they answer the same, and the ways back."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mono_quant
from mono_quant import ops
from mono_quant.io import load_model
from mono_quant.modules import FusedLayer, convert_to_pytorch_native, notices, why_not_fused
from mono_quant.ops import native
from tests.integrations.encoder_models import (
    ENCODERS,
    LAYERS,
    bert,
    close,
    count,
    distilbert,
    fused_names,
    hidden,
    padding,
    part_by_part,
    quantized,
    words,
)
from tests.io.models import same_bits

needs_native = pytest.mark.skipif(not native.is_loaded(), reason=native.reason_not_loaded())


@pytest.fixture(autouse=True)
def native_backend() -> Any:
    """Whatever backend the environment names: only the native one runs layers as one call."""
    with ops.use_backend("native" if native.is_loaded() else ops.get_backend()):
        yield


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
class TestEveryFamily:
    def test_all_layers_are_fused_and_stay_what_they_were(self, make: Callable[..., Any]) -> None:
        model = make()
        small = quantized(model)
        assert len(fused_names(small)) == LAYERS
        for name in fused_names(small):
            layer, before = small.get_submodule(name), model.get_submodule(name)
            assert isinstance(layer, type(before))
            assert type(layer).__name__ == f"Fused{type(before).__name__}"
            assert type(before) is not type(layer), "the original is never touched"

    @needs_native
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_answers_are_those_of_the_parts(self, make: Callable[..., Any], implementation: str) -> None:
        small = quantized(make(attn_implementation=implementation))
        twin = part_by_part(small)
        for samples, length in ((1, 1), (3, 11), (2, 20)):
            ids, mask = words(samples, length), padding(samples, length).clamp(min=0)
            mask[:, 0] = 1
            assert count(small, ids) == count(small, ids, attention_mask=mask) == LAYERS
            assert count(twin, ids) == 0
            assert close(hidden(small, ids), hidden(twin, ids))
            assert close(hidden(small, ids, attention_mask=mask), hidden(twin, ids, attention_mask=mask))

    def test_the_float_model_is_near(self, make: Callable[..., Any]) -> None:
        model = make()
        wanted, found = hidden(model, words()), hidden(quantized(model), words())
        assert float((found - wanted).norm() / wanted.norm()) < 0.1

    @needs_native
    def test_a_sentence_does_not_depend_on_its_batch(self, make: Callable[..., Any]) -> None:
        small = quantized(make(attn_implementation="eager"))
        ids, mask = words(), padding()
        together = hidden(small, ids, attention_mask=mask)
        for i in range(len(ids)):
            alone = hidden(small, ids[i : i + 1], attention_mask=mask[i : i + 1])
            assert same_bits(alone[0], together[i])

    def test_saved_and_loaded_models_are_fused_too(self, make: Callable[..., Any], tmp_path: Path) -> None:
        result = mono_quant.quantize(make())
        wanted = hidden(result.model, words(), attention_mask=padding())
        result.save(tmp_path / "model.safetensors")
        for architecture in (make(), result.model, part_by_part(result.model)):
            loaded = load_model(tmp_path / "model.safetensors", architecture)
            assert fused_names(loaded) == fused_names(result.model)
            assert same_bits(hidden(loaded, words(), attention_mask=padding()), wanted)

    def test_compiled_graphs_run_whole_layers_and_exported_ones_the_parts(
        self, make: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(notices, "_reported", set())
        small = quantized(make())
        twin = part_by_part(small)
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        assert same_bits(hidden(compiled, words()), hidden(small, words()))
        with caplog.at_level("WARNING", logger="mono_quant"):
            exported = torch.export.export(small, (words(),)).module()
        assert not [record for record in caplog.records if record.name == "mono_quant"]
        assert close(hidden(exported, words()), hidden(twin, words()))  # which compute activations apart


@needs_native
class TestWhatIsAskedFor:
    def test_hidden_states_of_all_layers(self) -> None:
        small = quantized(bert())
        twin = part_by_part(small)
        with torch.no_grad():
            found, wanted = (m(words(), output_hidden_states=True) for m in (small, twin))
        assert len(found.hidden_states) == len(wanted.hidden_states) == LAYERS + 1
        assert all(close(a, b) for a, b in zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True))
        assert count(small, words(), output_hidden_states=True) == LAYERS

    @pytest.mark.parametrize("make", [bert, distilbert])
    @pytest.mark.parametrize("by_configuration", [True, False])
    def test_attentions(self, make: Callable[..., Any], by_configuration: bool) -> None:
        small = quantized(make(attn_implementation="eager"))
        asked: dict[str, Any] = {} if by_configuration else {"output_attentions": True}
        small.config.output_attentions = by_configuration
        twin = part_by_part(small)
        with torch.no_grad():
            found, wanted = (m(words(), **asked) for m in (small, twin))
        assert len(found.attentions) == LAYERS
        assert all(same_bits(a, b) for a, b in zip(found.attentions, wanted.attentions, strict=True))
        # transformers leaves its hooks in the model; they do nothing unless attentions are asked for.
        small.config.output_attentions = False
        assert count(small, words()) == LAYERS
        assert count(small, words(), **{**asked, "output_attentions": True}) == 0

    def test_a_tuple_instead_of_an_output_object(self) -> None:
        small = quantized(bert())
        with torch.no_grad():
            assert same_bits(small(words(), return_dict=False)[0], hidden(small, words()))

    def test_a_whole_classifier(self) -> None:
        config = bert().config
        small = quantized(BertForSequenceClassification(config).eval())
        assert fused_names(small) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
        with torch.no_grad():
            assert small(words(), attention_mask=padding()).logits.shape == (3, 2)


class TestWhatIsNotFused:
    def test_a_decoder(self) -> None:
        small = quantized(bert(is_decoder=True))
        assert fused_names(small) == []
        assert why_not_fused(small.encoder.layer[0]) == "it is the layer of a decoder"
        assert hidden(small, words()).shape == (3, 11, 36)

    @pytest.mark.parametrize("make", [bert, distilbert])
    def test_a_feed_forward_part_in_chunks(self, make: Callable[..., Any]) -> None:
        result = mono_quant.quantize(make(chunk_size_feed_forward=1))
        assert result.info.fused_layers == []
        assert set(result.info.unfused_layers.values()) == {"its feed-forward part works in chunks"}

    @pytest.mark.parametrize("inner", ["attention.self.key", "attention.output.dense", "output.dense"])
    def test_a_layer_with_a_float_part(self, inner: str) -> None:
        result = mono_quant.quantize(bert(), skip=[f"encoder.layer.0.{inner}"])
        assert result.info.fused_layers == fused_names(result.model) == ["encoder.layer.1"]
        assert result.info.unfused_layers == {"encoder.layer.0": f"{inner} is not an int8 linear layer"}

    @pytest.mark.parametrize("options", [{"bits": 4, "group_size": 2}, {"bits": 16}, {"group_size": 2}])
    def test_other_formats(self, options: dict[str, Any]) -> None:
        result = mono_quant.quantize(bert(), **options)
        assert fused_names(result.model) == []
        assert all("is not an int8 linear layer" in reason for reason in result.info.unfused_layers.values())
        assert len(result.info.unfused_layers) == LAYERS

    def test_norms_in_float16(self) -> None:
        result = mono_quant.quantize(bert(), compute_dtype=torch.float16)
        reason = "attention.output.LayerNorm is not float32 or bfloat16"
        assert set(result.info.unfused_layers.values()) == {reason}

    def test_norms_of_two_dtypes(self) -> None:
        model = bert()
        model.encoder.layer[0].output.LayerNorm.bfloat16()
        result = mono_quant.quantize(model)
        assert result.info.unfused_layers == {"encoder.layer.0": "its norms are of two dtypes"}

    def test_an_activation_that_no_kernel_computes(self) -> None:
        result = mono_quant.quantize(bert(hidden_act="tanh"))
        wanted = "intermediate.intermediate_act_fn is not computed by intermediate.dense"
        assert set(result.info.unfused_layers.values()) == {wanted}

    @pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu"])
    def test_every_activation_that_a_kernel_computes_is_fused(self, activation: str) -> None:
        small = quantized(bert(hidden_act=activation))
        assert len(fused_names(small)) == LAYERS
        assert close(hidden(small, words()), hidden(part_by_part(small), words()))

    def test_without_fused_activations(self, tmp_path: Path) -> None:
        result = mono_quant.quantize(bert(), fuse_activations=False)
        assert fused_names(result.model) == result.info.fused_layers == []
        assert set(result.info.unfused_layers.values()) == {"fuse_activations=False"}
        result.save(tmp_path / "model.safetensors")
        for architecture in (bert(), quantized(bert())):
            loaded = load_model(tmp_path / "model.safetensors", architecture)
            assert fused_names(loaded) == []
            assert same_bits(hidden(loaded, words()), hidden(result.model, words()))

    def test_attention_that_someone_else_wrote(self) -> None:
        ALL_ATTENTION_FUNCTIONS.register("mine", ALL_ATTENTION_FUNCTIONS["sdpa"])
        try:
            result = mono_quant.quantize(bert(attn_implementation="mine"))
        finally:
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop("mine")
        assert set(result.info.unfused_layers.values()) == {"its attention is 'mine', expected 'sdpa' or 'eager'"}

    @needs_native
    @pytest.mark.filterwarnings("ignore")  # PyTorch's, about how transformers calls it
    def test_masks_of_flexible_attention_go_to_the_parts(self) -> None:
        small = quantized(bert())
        small.set_attn_implementation("flex_attention")
        assert hidden(small, words()).shape == (3, 11, 36)

    def test_layers_of_older_releases_which_answer_tuples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.3")
        result = mono_quant.quantize(bert())
        assert set(result.info.unfused_layers.values()) == {
            "it is a layer of transformers 4.57.3, expected 5.0 or newer"
        }

    def test_a_class_that_derives_from_one_that_is_known(self) -> None:
        class Louder(type(bert().encoder.layer[0])):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Tensor:
                return 2 * super().forward(*args, **kwargs)

        model = bert()
        model.encoder.layer[0].__class__ = Louder
        assert fused_names(quantized(model)) == ["encoder.layer.1"]


class TestWays:
    """What else can be done with a model goes on as before."""

    def test_info_names_the_layers(self) -> None:
        result = mono_quant.quantize(bert())
        assert result.info.fused_layers == fused_names(result.model) == ["encoder.layer.0", "encoder.layer.1"]
        assert result.info.unfused_layers == {}

    def test_in_place(self) -> None:
        model = bert()
        wanted = hidden(quantized(model), words())
        result = mono_quant.quantize(model, inplace=True)
        assert result.model is model
        assert len(fused_names(model)) == LAYERS
        assert same_bits(hidden(model, words()), wanted)

    def test_asymmetric_weights(self) -> None:
        small = quantized(bert(), scheme="asymmetric")
        assert close(hidden(small, words()), hidden(part_by_part(small), words()))

    @pytest.mark.parametrize("revert", [mono_quant.revert_to_standard_modules, convert_to_pytorch_native])
    @pytest.mark.parametrize("inplace", [True, False])
    def test_the_way_back(self, revert: Callable[..., Any], inplace: bool) -> None:
        model = bert()
        small = quantized(model)
        hidden(small, words())
        standard = revert(small, inplace=inplace)
        assert [type(m) for m in standard.modules()] == [type(m) for m in model.modules()]
        assert len(fused_names(small)) == (0 if inplace else LAYERS)
        assert float((hidden(standard, words()) - hidden(model, words())).norm()) < 3
        assert not any("_fused_operands" in module.__dict__ for module in standard.modules())

    def test_to_floats(self) -> None:
        assert fused_names(mono_quant.dequantize_model(quantized(bert()))) == []

    def test_the_original_is_validated_against_the_fused_model(self) -> None:
        model = bert()
        result = mono_quant.quantize(model)
        assert result.validate(original=model, inputs={"input_ids": words()}).sqnr_db > 15

    @pytest.mark.slow
    def test_a_search_under_a_budget(self) -> None:
        model = bert()
        ids = words(8, 11)
        result = mono_quant.quantize(model, calibration_data=[{"input_ids": ids}], max_bytes=25_000)
        assert result.info.bytes_after <= 25_000
        assert sorted([*result.info.fused_layers, *result.info.unfused_layers]) == [
            "encoder.layer.0",
            "encoder.layer.1",
        ]
        assert fused_names(result.model) == result.info.fused_layers
        assert fused_names(model) == []

    def test_saving_for_other_engines(self, tmp_path: Path) -> None:
        result = mono_quant.quantize(bert())
        result.save(tmp_path / "directory")
        architectures = json.loads((tmp_path / "directory" / "config.json").read_text())["architectures"]
        assert architectures == [BertModel.__name__]
        loaded = load_model(tmp_path / "directory")
        assert len(fused_names(loaded)) == LAYERS
        assert same_bits(hidden(loaded, words()), hidden(result.model, words()))

    def test_a_layer_that_two_places_share(self) -> None:
        model = bert()
        model.encoder.layer[1] = model.encoder.layer[0]
        small = quantized(model)
        assert small.encoder.layer[0] is small.encoder.layer[1]
        assert isinstance(small.encoder.layer[0], FusedLayer)
        assert close(hidden(small, words()), hidden(part_by_part(small), words()))

    def test_layers_that_share_weights_run_part_by_part(self) -> None:
        model = bert()
        model.encoder.layer[1].attention.self.key.weight = model.encoder.layer[0].attention.self.key.weight
        result = mono_quant.quantize(model)
        assert set(result.info.unfused_layers.values()) == {"attention.self.key shares its weight with another layer"}
        twin: nn.Module = copy.deepcopy(result.model)
        assert same_bits(hidden(twin, words()), hidden(result.model, words()))
