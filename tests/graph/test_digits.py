"""A network trained on scikit-learn's digits keeps its accuracy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mono_quant.graph import quantize_static


def test_a_network_trained_on_digits_loses_at_most_three_thousandths() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, groups=32, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
        nn.Conv2d(32, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for epoch in range(6):
        for rows in train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))].split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()
    quantized, report = quantize_static(model, images[train[:150]])
    with torch.no_grad():
        accuracies = [float((m(images[test]).argmax(1) == labels[test]).float().mean()) for m in (model, quantized)]
    assert report.captured
    assert accuracies[0] > 0.9
    assert accuracies[1] >= accuracies[0] - 0.003
