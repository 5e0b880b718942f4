"""What every test shares: how many examples hypothesis tries, the backends, and a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing.context import set_spawning_popen

import pytest
import torch
from hypothesis import HealthCheck, settings

from mono_quant import ops
from mono_quant.ops import native
from tests.spawning import SpawnedChild

# Derandomized, so that a change is judged by the same examples as its parent; "search" looks for new ones.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        # A backend is chosen once for a test and stays the same for all its examples.
        HealthCheck.function_scoped_fixture,
    ],
}
settings.register_profile("ci", derandomize=True, database=None, max_examples=25, **_COMMON)
settings.register_profile("search", max_examples=500, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20240229)


@pytest.fixture(params=ops.available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each backend that this machine has."""
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def native_backend() -> Iterator[None]:
    """Run the test on the native kernels."""
    if not native.is_loaded():
        pytest.skip(native.reason_not_loaded())
    with ops.use_backend("native"):
        yield


@pytest.fixture
def spawned_child() -> Iterator[SpawnedChild]:
    """Pickle as if for a spawned process, which maps the tensors' memory by descriptors."""
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":
        pytest.skip("memory is not shared by descriptors")
    child = SpawnedChild()
    set_spawning_popen(child)  # type: ignore[arg-type]
    yield child
    set_spawning_popen(None)
