"""Crops of the photographs that come inside scikit-image and scikit-learn; nothing is downloaded.

Calibration and judgement use different photographs, not only different crops: the two pictures of the motorcycle show
one scene and stand on one side.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import skimage
import sklearn
import torch
import torch.nn.functional as F
from skimage.io import imread
from torch import Tensor

SIZE = 224
JUDGED = ("astronaut.png", "coffee.png", "china.jpg", "motorcycle_left.png", "camera.png", "brick.png", "gravel.png")
CALIBRATION = ("chelsea.png", "flower.jpg", "rocket.jpg", "coins.png", "clock_motion.png", "grass.png")

_FOLDERS = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")


@cache
def photograph(name: str) -> Tensor:
    """Answer one photograph as uint8 ``[3, height, width]``; a grey one has three equal planes."""
    path = next(folder / name for folder in _FOLDERS if (folder / name).exists())
    pixels = np.asarray(imread(path))
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1)))


def crops(names: tuple[str, ...], count: int, seed: int = 0) -> Tensor:
    """Answer ``count`` square crops, taken from each of ``names`` in turn, every other one mirrored.

    A side is drawn between 224 pixels and the photograph's shorter side, and scaled to 224. Values are those that
    EfficientNet-Lite was trained with: ``(pixel - 127) / 128``.

    Returns:
        float32 ``[count, 3, 224, 224]``.
    """
    generator = torch.Generator().manual_seed(seed)
    result = torch.empty(count, 3, SIZE, SIZE)
    for index in range(count):
        image = photograph(names[index % len(names)])
        height, width = image.shape[1:]
        side, top, left = (float(value) for value in torch.rand(3, generator=generator))
        size = SIZE + int(side * (min(height, width) - SIZE + 1))
        y, x = int(top * (height - size + 1)), int(left * (width - size + 1))
        crop = image[:, y : y + size, x : x + size].float().unsqueeze(0)
        scaled = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        result[index] = scaled[0].flip(-1) if index // len(names) % 2 else scaled[0]
    return result.sub_(127).div_(128)


def judged_crops(count: int = 512) -> Tensor:
    """Answer the crops that accuracy is measured on."""
    return crops(JUDGED, count)


def calibration_crops(count: int = 100) -> Tensor:
    """Answer the crops that engines may see first."""
    return crops(CALIBRATION, count, seed=1)
