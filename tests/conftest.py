"""Fixtures that several test files share."""

import os

import pytest
import torch

from axmoe_lite import datasets
from axmoe_lite.runs import rehearsal

pytest_plugins = ["trust"]


def pytest_configure(config):
    """Test processes side by side share the cores: two pools of threads on the same cores wait for each other."""
    side_by_side = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if side_by_side > 1:
        threads = max(1, (os.cpu_count() or 1) // side_by_side)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # and for the processes that a test starts


@pytest.fixture
def draw():
    """draw(shape): random int8 operands from the whole range, the same at every run."""
    generator = torch.Generator().manual_seed(20260505)
    return lambda *shape: torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


@pytest.fixture(scope="session")
def textures():
    """A small image set that can be learned in seconds: 4 classes of 16 x 16 textures."""
    return datasets.synthetic(classes=4, size=16, n_train=256, n_test=64, seed=1)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """AXMOE_HOME points into a temporary folder: nothing in the checkout is touched."""
    monkeypatch.setenv("AXMOE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def toy(tmp_path):
    """toy(*cells, name=): the path of a small notebook whose first cell holds the parameters."""

    return lambda *cells, name="toy": rehearsal.notebook(tmp_path / f"{name}.ipynb", *cells)
