"""Small networks that between them hold everything a static graph knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def settled(model: nn.Module, *shape: int) -> nn.Module:
    """Give batch norms statistics and weights that are not trivial."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, *shape, generator=generator))
    return model.eval()


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs)]  # type: ignore[arg-type]


class Residual(nn.Module):
    """A bottleneck with a branch, as in ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(inputs, 8, 1), nn.ReLU(inplace=True),
            *conv_bn(8, 8, 3, padding=1, stride=stride), nn.ReLU(inplace=True),
            *conv_bn(8, outputs, 1),
        )  # fmt: skip
        self.branch = nn.Sequential(*conv_bn(inputs, outputs, 1, stride=stride)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.branch(x))


class Residuals(nn.Module):
    """A small ResNet: stem, max pooling, two bottlenecks, mean, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 24, 2))
        self.classifier = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]


class Inverted(nn.Module):
    """What mobile networks do: depthwise, uneven padding, gates, hard functions, a sum without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16, 3, stride=2), nn.Hardswish())
        self.expand = nn.Sequential(*conv_bn(16, 32, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(*conv_bn(32, 32, 5, padding=2, groups=32), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Sequential(*conv_bn(32, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(F.pad(x, [0, 1, 0, 1]))
        x = self.depthwise(self.expand(stem))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.project(x * gate) + stem
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """What Inception and DenseNet do: joins, average pooling, dilation, groups, a norm before its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.right = nn.Conv2d(8, 12, 1, groups=2)
        self.norm = nn.BatchNorm2d(28)
        self.last = nn.Conv2d(28, 6, 3, padding="same")
        self.head = nn.Sequential(nn.Linear(6 * 16, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.first(x)), 2)
        x = torch.cat([F.relu(self.left(x)), self.right(x), x], 1)
        x = F.leaky_relu(self.last(F.relu(self.norm(x))), 0.1)
        return self.head(F.max_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]


class Volumes(nn.Module):
    """Convolutions of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU6(), nn.MaxPool3d(2))
        self.second = nn.Conv3d(6, 4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.hardswish(self.second(self.first(x)))
        return {"features": features, "mean": features.mean((2, 3, 4))}


class Signals(nn.Module):
    """Convolutions of one dimension, and an answer in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU())
        self.second = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        z = self.second(y) + y
        return z.softmax(2) * weights, z


class Decides(nn.Module):
    """A model that cannot be captured: what it does depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 8, 3), nn.Linear(3, 3)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.circular(self.conv(x)).relu()
        if bool(y.detach().sum() < 0):
            y = -y
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def small() -> nn.Sequential:
    """Two convolutions, the first with a ReLU."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
