"""What every test shares: no network, no random choice without a seed."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: the processes share the cores, and most tests are of tiny tensors.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many tiny tensors, where threads cost several times what they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """script(name): a module of benchmarks/, imported as its own scripts import it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of calibration text that nothing is wrong with."""
    path = tmp_path / "text.txt"
    path.write_text("a sentence of no consequence. " * 20)
    return path


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Where an output would be: an empty folder."""
    path = tmp_path / "there"
    path.mkdir()
    return path
