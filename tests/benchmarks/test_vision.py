"""The networks are what their names say, and figures compare like with like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from benchmarks import vision
from benchmarks.vision_engines import BASELINES, load_engine
from benchmarks.vision_models import ResNet50, keep_model


def test_resnet50_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = ResNet50()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 53


def test_accuracy_of_the_same_and_of_an_opposite_answer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    calls = {"same": model, "other": lambda x: -model(x)}
    found = vision._accuracies(model, calls, torch.randn(20, 3, 2, 2))
    assert found["same"] == {"agreement": 1.0, "snr_db": pytest.approx(300)}
    assert found["other"]["agreement"] == 0.0
    # The noise is twice the signal.
    assert found["other"]["snr_db"] == pytest.approx(-6.02, abs=0.01)


@pytest.mark.parametrize("key", [*BASELINES, "torch_bfloat16"])
def test_the_engines_of_pytorch_answer_what_the_model_does(key: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        answer = load_engine(key, lambda: model, tmp_path)(x)
        torch.testing.assert_close(answer, model.float()(x), rtol=0.02, atol=0.02)


def test_kept_weights_make_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import vision_models

    monkeypatch.setitem(
        vision_models.NETWORKS, "small", vision_models.Network(nn.Identity, lambda: nn.Linear(3, 2), labelled=False)
    )
    model = nn.Linear(3, 2)
    keep_model(model, tmp_path)
    assert torch.equal(vision_models.load_model("small", tmp_path).weight, model.weight)
