"""Encoder layers of transformers that can run as one operator."""

from __future__ import annotations

from typing import Final

from torch import nn

from mono_quant.integrations.whole_layers import adds_bools, attention_settings, why_not_whole
from mono_quant.modules.encoder_layer import EncoderLayout
from mono_quant.modules.encoder_stack import EncoderStack
from mono_quant.modules.fused_layer import register_layout
from mono_quant.modules.layer_operands import Setting
from mono_quant.modules.layer_stack import StackLayout, register_stack


def _refuse_bert(layer: nn.Module) -> str | None:
    if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
        return "it is the layer of a decoder"
    if getattr(layer, "chunk_size_feed_forward", 0):
        return "its feed-forward part works in chunks"
    return why_not_whole(layer.get_submodule("attention.self"))


def _bert_settings(layer: nn.Module) -> list[Setting]:
    own = ("is_decoder", "add_cross_attention", "chunk_size_feed_forward")
    return [*((layer.__dict__, name) for name in own), *attention_settings(layer.get_submodule("attention.self"))]


def _refuse_distilbert(layer: nn.Module) -> str | None:
    if getattr(layer.ffn, "chunk_size_feed_forward", 0):
        return "its feed-forward part works in chunks"
    return why_not_whole(layer.get_submodule("attention"))


def _distilbert_settings(layer: nn.Module) -> list[Setting]:
    ffn, attention = (layer.get_submodule(name) for name in ("ffn", "attention"))
    return [(ffn.__dict__, "chunk_size_feed_forward"), *attention_settings(attention)]


#: BERT and the models whose layers are its layers under another name.
_BERT: Final = EncoderLayout(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    attention_norm="attention.output.LayerNorm",
    output_norm="output.LayerNorm",
    heads="attention.self.num_attention_heads",
    scale="attention.self.scaling",
    adds_bools=lambda layer: adds_bools(layer.get_submodule("attention.self")),
    refuse=_refuse_bert,
    refuse_settings=_bert_settings,
)
_DISTILBERT: Final = EncoderLayout(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    activation="ffn.activation",
    attention_norm="sa_layer_norm",
    output_norm="output_layer_norm",
    heads="attention.n_heads",
    scale="attention.scaling",
    adds_bools=lambda layer: adds_bools(layer.get_submodule("attention")),
    refuse=_refuse_distilbert,
    refuse_settings=_distilbert_settings,
)

_LAYER_LIST: Final = StackLayout("layer")
# For each family its module and the names of its layers and of what calls them.
for _module, _layer, _encoder, _layout in (
    ("bert", "BertLayer", "BertEncoder", _BERT),
    ("roberta", "RobertaLayer", "RobertaEncoder", _BERT),
    ("xlm_roberta", "XLMRobertaLayer", "XLMRobertaEncoder", _BERT),
    ("camembert", "CamembertLayer", "CamembertEncoder", _BERT),
    ("electra", "ElectraLayer", "ElectraEncoder", _BERT),
    ("distilbert", "TransformerBlock", "Transformer", _DISTILBERT),
):
    _path = f"transformers.models.{_module}.modeling_{_module}"
    register_layout(f"{_path}.{_layer}", _layout)
    register_stack(f"{_path}.{_encoder}", EncoderStack, _LAYER_LIST)
