"""What pytest-benchmark times here, and how: `python -m pytest benchmarks/ --benchmark-only -n0`, on a CPU or on a GPU.

Sizes are those of a model: MINISP_BENCH_SIZES=135M,1B,7B, by default 135M on a CPU and 7B on a GPU. With
--benchmark-json=FILE all numbers are kept, with the machine's description.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import harness
from cases import Case, Place, Shape, check, checked_shape
from synthetic import SHAPES

from minisp.config import MinifyConfig
from minisp.device import compute_device, compute_dtype
from minisp.errors import BackendError

DEVICE = compute_device(MinifyConfig())
# More than any GPU's second-level cache.
FLUSH_BYTES = 2**28
# Seconds of one contender, about; it is called 3 to 20 times.
BUDGET = 0.5


def absent(name: str, place: Place) -> str:
    """Why a contender does not exist here."""
    if name == "minisp triton" and place.device.type == "cpu":
        return "no GPU here: Triton's kernels need one"
    if name.startswith("minisp"):
        return f"{name} has no kernel of this operation for {place.device}"
    return f"this opponent needs another type or device than {place.dtype} on {place.device}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every benchmark runs in every size."""
    if "size" in metafunc.fixturenames:
        default = "135M" if DEVICE.type == "cpu" else "7B"
        metafunc.parametrize("size", os.environ.get("MINISP_BENCH_SIZES", default).split(","))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def place() -> Place:
    """The device and the type that minisp takes by itself on this machine."""
    return Place(DEVICE, compute_dtype(MinifyConfig(), DEVICE))


@pytest.fixture
def shapes(size: str) -> dict[str, Shape]:
    """Shapes of the operations in a model of `synthetic.SHAPES`, four fifths of the units kept, as `operations` names
    them.
    """
    d, m, _, heads, key_heads, vocabulary, _ = SHAPES[size]
    tokens, length = (2048, 512) if DEVICE.type == "cpu" else (8192, 2048)
    kept, passing = 4 * m // 5, {"m": m, "T": tokens}
    headed = {"B": tokens // length, "L": length, "H": heads, "K": key_heads, "D": d // heads}
    found = {"gram": passing, "cross": {"m": kept, "d": d, "T": tokens}, "mirror": {"m": m}, "saliency": passing}
    found |= {"activation": passing, "rms_norm": {"d": d, "T": tokens}, "rotary": headed, "attention": headed}
    return found | {"cross_entropy": {"V": vocabulary, "T": tokens // 8}, "ridge_solve": {"m": m, "n": kept, "d": d}}


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    """timed(call, before, **facts): time a call, what `before` puts back and a cold cache not being counted."""

    def measure(call: Callable[[], object], before: Callable[[], object], **facts: Any) -> None:
        flush = torch.empty(FLUSH_BYTES if DEVICE.type == "cuda" else 0, dtype=torch.uint8, device=DEVICE)

        def prepare() -> None:
            before()
            flush.fill_(1)
            harness.synchronize(DEVICE)

        def finished() -> None:
            call()
            harness.synchronize(DEVICE)

        for _ in range(2):
            prepare()
            start = time.perf_counter()
            finished()
            once = time.perf_counter() - start
        benchmark.extra_info.update(facts)
        benchmark.pedantic(finished, setup=prepare, rounds=max(3, min(20, int(BUDGET / once))))

    return measure


@pytest.fixture
def contend(timed: Callable[..., None], benchmark: Any) -> Callable[..., None]:
    """contend(build, shape, place, name): check a contender of a case against the reference, then time it."""

    def measure(build: Callable[[Shape, Place], Case], shape: Shape, place: Place, name: str) -> None:
        small = build(checked_shape(shape), place)
        if name not in small.contenders:
            pytest.skip(absent(name, place))
        try:
            error = check(small, name)
        except BackendError as refused:
            pytest.skip(str(refused))
        case = build(shape, place)
        benchmark.group = f"{build.__name__} {', '.join(f'{key} = {value}' for key, value in shape.items())}"
        facts = {"operation": build.__name__, "contender": name, "dtype": str(case.dtype), **shape}
        work = {"flops": case.flops, "bytes": case.num_bytes, "error of what is allowed": error}
        timed(case.contenders[name], case.before, **facts, **work)

    return measure


def pytest_benchmark_update_json(config: Any, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Beside what pytest-benchmark writes: the machine as all results have it, and the rows of `ridge.table`."""
    output_json["machine"] = harness.machine()
    rows = [one.extra_info | {"seconds": list(one.stats.data)} for one in benchmarks if "gram_bytes" in one.extra_info]
    output_json["solves"] = rows
