"""Where and in what type to compute, and how much memory is there for it."""

import ctypes
import os
from contextlib import suppress

import psutil
import torch

from minisp.config import MinifyConfig, Resources, parse_size
from minisp.errors import ConfigError

CPU = torch.device("cpu")
# Share of the free memory that a run may plan with where no limit is given; the rest is for the other processes.
MEMORY_SHARE = 0.5
# malloc.h: the parameter of mallopt. Blocks from 4 MB on cost more to compute on than to map anew.
M_MMAP_THRESHOLD, PROMPT_BYTES = -3, 4 * 2**20


def compute_device(config: MinifyConfig) -> torch.device:
    """The device that the config names, or the first GPU, or the CPU.

    Raises:
        ConfigError: the name is no torch device, or that device is not there.
    """
    if config.device == "auto":
        # torchrun numbers the processes of a machine, one for each GPU.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else CPU
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
    return device


def compute_dtype(config: MinifyConfig, device: torch.device) -> torch.dtype:
    """The type that the config names, or bfloat16 where the device computes in it, or float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def fits_in_memory(num_bytes: int) -> bool:
    """Whether so many bytes fit the share of the free host memory that a run may use."""
    return bool(num_bytes <= MEMORY_SHARE * psutil.virtual_memory().available)


def free_promptly() -> None:
    """Have the C library give large blocks back to the system as soon as they are freed, for the rest of the process.

    By default, glibc keeps freed blocks of up to 32 MB; where a run must stay within a limit, they would count.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, PROMPT_BYTES)


def trim_memory() -> None:
    """Give what is free in the C library's heap back to the system, where the library can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_limit(resources: Resources, device: torch.device, base: int) -> tuple[str, int]:
    """What bounds the computing memory beside what the process has already: in words, and in bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        free = min(free, int(share * total) - torch.cuda.memory_reserved(device))
        if resources.device_memory is None:
            return f"Memory of {device}", int(MEMORY_SHARE * free)
        return "Option device_memory", min(parse_size(resources.device_memory), free)
    if resources.host_memory is None:
        return "Main memory", int(MEMORY_SHARE * psutil.virtual_memory().available)
    return "Option host_memory", parse_size(resources.host_memory) - base
