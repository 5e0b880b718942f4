"""Decoders answer what the model's own generation answers, for ever."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import decoding, smollm2
from benchmarks.decoders import BASELINE, HORIZON, RECIPES, CompiledDecoder, Decoder, EagerDecoder, Recipe, weight_bytes

PROMPT = torch.arange(3, 11)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def generated(model: nn.Module) -> list[int]:
    with torch.inference_mode():
        ids = model.generate(PROMPT[None], max_new_tokens=HORIZON + 1, do_sample=False, pad_token_id=0)
    return ids[0, len(PROMPT) :].tolist()


def _decoders(model: nn.Module) -> tuple[Decoder, Decoder]:
    return EagerDecoder(model, PROMPT), CompiledDecoder(model, PROMPT, backend="eager")


@pytest.mark.parametrize("kind", [0, 1], ids=("eager", "compiled"))
def test_steps_answer_the_tokens_of_greedy_generation_and_start_again(
    model: nn.Module, generated: list[int], kind: int
) -> None:
    decoder = _decoders(model)[kind]
    # The first token comes from the prompt; steps answer those after it.
    rest = generated[1:]
    assert [decoder.step() for _ in range(HORIZON + 3)] == rest + rest[:3]


def test_reading_a_prompt_answers_the_next_token_and_leaves_decoding_alone(
    model: nn.Module, generated: list[int]
) -> None:
    decoder = EagerDecoder(model, PROMPT)
    decoder.step()
    assert decoder.prefill(PROMPT) == generated[0]
    assert decoder.step() == generated[2]


def test_shared_weights_count_once(model: nn.Module) -> None:
    assert weight_bytes(model) < sum(p.nbytes for p in model.state_dict().values())


def test_recipes_leave_the_model_alone(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for key in ("torch_bfloat16", "int8", "int8_bfloat16"):
        RECIPES[key].build(model, PROMPT)[0].step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_cannot_be_built_is_left_out_with_its_reason(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> tuple[Decoder, int]:
        raise ModuleNotFoundError("No module named 'llama_cpp'")

    monkeypatch.setattr(decoding, "RECIPES", {**RECIPES, "llama_cpp_q8_0": Recipe("llama.cpp", fail)})
    monkeypatch.setattr(smollm2, "evaluation_windows", lambda count: PROMPT[None])
    log = Console(quiet=True)
    decoders, sizes, skipped = decoding._build((BASELINE, "llama_cpp_q8_0"), model, log)
    assert list(decoders) == list(sizes) == [BASELINE]
    assert skipped == {"llama_cpp_q8_0": "is not there: ModuleNotFoundError: No module named 'llama_cpp'"}
