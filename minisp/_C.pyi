from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    cuda: bool
    cuda_archs: list[str]
    instruction_sets: list[str]

def build_info() -> BuildInfo:
    """How the extension was built, and the instruction sets (avx512f, amx_bf16, ...) of the processor it runs on."""

def cuda_device_count() -> int:
    """CUDA devices that can be used now; 0 without a driver or in a CPU-only build. Never raises."""
