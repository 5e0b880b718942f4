"""Crops are made of real photographs, always the same ones, and calibration sees none that are judged."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from benchmarks import photographs


def test_calibration_and_judgement_share_no_photograph() -> None:
    assert not set(photographs.CALIBRATION) & set(photographs.JUDGED)
    # The other half of the stereo pair shows the same scene.
    assert "motorcycle_right.png" not in photographs.CALIBRATION


def test_crops_are_the_same_every_time_and_no_two_are_alike() -> None:
    first, again = photographs.crops(photographs.JUDGED, 16, seed=3), photographs.crops(photographs.JUDGED, 16, seed=3)
    assert torch.equal(first, again)
    assert first.shape == (16, 3, 224, 224)
    assert all(not torch.equal(first[i], first[j]) for i in range(16) for j in range(i))


def test_values_are_pixels_about_zero() -> None:
    crops = photographs.calibration_crops(6)
    # Interpolation stays between the pixels that it reads.
    assert -127 / 128 - 1e-5 <= float(crops.min()) < -0.5
    assert 0.5 < float(crops.max()) <= 1 + 1e-5


def test_a_grey_photograph_has_three_equal_planes() -> None:
    image = photographs.photograph("camera.png")
    assert torch.equal(image[0], image[2])
    assert image.dtype == torch.uint8
