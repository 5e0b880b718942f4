"""Folding: found where it leaves the model's function alone, and nowhere else."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mono_quant.algorithms.folding import apply_fold, find_folds
from mono_quant.calibration import Batch
from tests.algorithms.cases import language_model, token_batches


def _folds(model: nn.Module, batch: Batch) -> dict[str, list[str]]:
    return {fold.source: sorted(fold.consumers) for fold in find_folds(model, batch)}


def _image_free_batch(width: int = 8) -> Batch:
    return Batch((torch.randn(4, width),), {})


def test_the_sources_of_a_transformer_block_are_found() -> None:
    found = _folds(language_model(), token_batches()[0])
    for block in ("blocks.0", "blocks.1"):
        assert found[f"{block}.norm1"] == [f"{block}.k", f"{block}.q", f"{block}.v"]
        assert found[f"{block}.norm2"] == [f"{block}.gate", f"{block}.up"]
        assert found[f"{block}.up"] == [f"{block}.down"]
        assert found[f"{block}.v"] == [f"{block}.o"]
    assert len(found) == 8


def test_folding_leaves_the_function_unchanged() -> None:
    model = language_model()
    batches = token_batches()
    folds = find_folds(model, batches[0])
    folded = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for fold in folds:
        width = len(folded.get_submodule(fold.source).weight)
        apply_fold(folded, fold, torch.exp(torch.randn(width, generator=generator)))
    for batch in batches:
        expected = model(*batch.args).detach()
        assert torch.allclose(folded(*batch.args), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_looking_does_not_modify_the_model() -> None:
    model = language_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    find_folds(model, token_batches()[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_parameters_shared_with_another_model_are_not_written_to() -> None:
    model = language_model()
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for fold in find_folds(shared, token_batches()[0]):
        apply_fold(shared, fold, torch.full((len(shared.get_submodule(fold.source).weight),), 2.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class _PostNorm(nn.Module):
    """The norm's output is also what the next norm adds to, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.last(x + self.linear(x))


def test_a_source_with_another_reader_is_left_alone() -> None:
    torch.manual_seed(0)
    assert _folds(_PostNorm(), _image_free_batch()) == {}


def test_relu_passes_a_scaling_and_gelu_does_not() -> None:
    torch.manual_seed(0)
    for activation, expected in ((nn.ReLU(), {"0": ["2"]}), (nn.GELU(), {}), (nn.Tanh(), {})):
        model = nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 8))
        assert _folds(model, _image_free_batch()) == expected


def test_linear_layers_whose_own_forward_was_replaced_are_left_alone() -> None:
    for replaced, found in (("0", {"2": ["4"]}), ("2", {}), ("4", {"0": ["2"]})):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
        layer = model.get_submodule(replaced)
        layer.forward = lambda x, forward=layer.forward: forward(x + 1) + 1
        assert _folds(model, _image_free_batch()) == found


def test_tied_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert _folds(model, _image_free_batch()) == {"0": ["1"]}
    model[3].weight = model[1].weight
    assert _folds(model, _image_free_batch()) == {}


class _OffsetNorm(nn.Module):
    """A norm whose gain is 1 + weight: scaling the weight does not scale its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (8,)) * (1 + self.weight)


def test_a_norm_whose_weight_does_not_scale_its_output_is_left_alone() -> None:
    torch.manual_seed(0)
    assert _folds(nn.Sequential(_OffsetNorm(), nn.Linear(8, 8)), _image_free_batch()) == {}


class _Experts(nn.Module):
    """The second expert is not reached by positive inputs, and still reads what the norm answers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.sum() < 0)](self.norm(x))


def test_an_expert_that_was_not_reached_forbids_folding_before_it() -> None:
    torch.manual_seed(0)
    model = _Experts()
    assert _folds(model, Batch((torch.rand(4, 8),), {})) == {}


def test_a_layer_called_twice_is_scaled_for_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x)) + self.linear(self.norm(x + 1))

    torch.manual_seed(0)
    assert _folds(Twice(), _image_free_batch()) == {"norm": ["linear"]}
