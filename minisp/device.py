"""Where and in what type to compute, and how much memory is there for it."""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch

from minisp.config import MinifyConfig
from minisp.errors import ConfigError, one_line
from minisp.resources import Resources
from minisp.units import parse_size

CPU = torch.device("cpu")
# Share of the free memory that a run may plan with where no limit is given; the rest is for other processes, of which a
# GPU has fewer.
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.85}
# Of a GPU's memory that was given, what is left for the libraries' workspaces, and the share that the allocator's gaps
# may take.
LIBRARY_BYTES, GAPS = 128 * 2**20, 0.08
# malloc.h: parameters of mallopt. Blocks from 4 MB on cost more to compute on than to map anew; smaller ones that are
# free at the end of the heap stay for the next layer, up to this many bytes.
M_MMAP_THRESHOLD, PROMPT_BYTES = -3, 4 * 2**20
M_TRIM_THRESHOLD, HEAP_BYTES = -1, 32 * 2**20


def compute_device(config: MinifyConfig) -> torch.device:
    """The device that the config names, or the first GPU, or the CPU.

    Raises:
        ConfigError: the name is no torch device, or that device is not there.
    """
    if config.device == "auto":
        return _own_gpu() if torch.cuda.is_available() else CPU
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(
            f"Option device: expected a torch device such as cpu or cuda:0, got {config.device!r}."
        ) from None
    try:
        # The meta device takes part in everything and computes nothing.
        usable = device.type != "meta" and torch.empty(1, device=device).is_floating_point()
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f"Option device: expected a device of this machine, got {config.device!r}, but torch can compute only on "
            f"the CPU and {found} GPUs here. Pass one of these, or auto."
        )
    return _own_gpu() if config.device == "cuda" else device


def _own_gpu() -> torch.device:
    """torchrun numbers the processes of a machine, one for each GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def free_main_memory() -> int:
    """Bytes of main memory that are free for this process, beside the others that torchrun has started here."""
    available: int = psutil.virtual_memory().available
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def compute_dtype(config: MinifyConfig, device: torch.device) -> torch.dtype:
    """The type that the config names, or bfloat16 where the device computes in it, or float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products of a size that is large for the device, the fastest of a few; takes under a second."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        # Reading one value waits for a GPU.
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def free_promptly() -> None:
    """Have the C library give large blocks back to the system as soon as they are freed, for the rest of the process.

    By default, glibc keeps freed blocks of up to 32 MB; where a run must stay within a limit, they would count.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, PROMPT_BYTES)
        # Where it is not set, the other parameter sets it to 128 KB, and every layer faults its memory in anew.
        library.mallopt(M_TRIM_THRESHOLD, HEAP_BYTES)


def trim_memory() -> None:
    """Give what is free in the C library's heap back to the system, where the library can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def computing_on(device: torch.device, resources: Resources) -> Iterator[None]:
    """Within the block, a GPU is the current one, and its allocator refuses more than `device_memory`.

    Raises:
        ConfigError: the GPU's memory ran out in the block.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    try:
        with torch.cuda.device(device):
            if resources.device_memory is not None:
                total = torch.cuda.get_device_properties(device).total_memory
                share = min(before, parse_size(resources.device_memory) / total)
                torch.cuda.set_per_process_memory_fraction(share, device)
            yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"Memory of {device}: expected the planned bytes to do, but {one_line(error)[:300]} Pass a smaller "
            "device_memory to be planned with, a smaller batch or shorter windows, and continue with resume."
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def memory_limit(resources: Resources, device: torch.device, base: int) -> tuple[str, int, int]:
    """What bounds the computing memory: in words, in bytes, and the bytes of it that the process itself takes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        free = min(free, int(share * total) - torch.cuda.memory_reserved(device))
        if resources.device_memory is None:
            return f"Memory of {device}", int(MEMORY_SHARE["cuda"] * free), 0
        given = min(parse_size(resources.device_memory), free)
        return "Option device_memory", given, int(GAPS * given) + LIBRARY_BYTES
    if resources.host_memory is None:
        return "Main memory", int(MEMORY_SHARE["cpu"] * free_main_memory()) + base, base
    return "Option host_memory", parse_size(resources.host_memory), base
