from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    cuda: bool
    cuda_archs: list[str]
    instruction_sets: list[str]
    levels: list[str]
    machine_level: str

def build_info() -> BuildInfo:
    """How the extension was built, and the instruction sets (avx512f, amx_bf16, ...) of the processor it runs on."""

def active_level() -> str:
    """The processor level that the kernels use. Raises ValueError where MINISP_MAX_CPU_ISA names none."""

def cuda_device_count() -> int:
    """CUDA devices that can be used now; 0 without a driver or in a CPU-only build. Never raises."""

# Addresses are those of contiguous CPU tensors; `minisp.ops.native` is the only caller and checks them.
def activation_backward(
    gate: int, up: int, grad_x: int, sums: int, rows: int, columns: int, is_bf16: bool, kind: int, threads: int
) -> None: ...
def cross_entropy(
    logits: int, targets: int, gradient: int, rows: int, columns: int, is_bf16: bool, threads: int
) -> float: ...
def cholesky_count(size: int, count: int, is_double: bool, pieces: bool) -> dict[str, int]:
    """What the CUDA solver would launch; see csrc/cholesky_count.h."""

def gram_update(gram: int, x: int, num_tokens: int, width: int, is_bf16: bool, threads: int) -> None: ...

# Tensors (batch, heads, tokens, dim): address, and strides of the first three axes in elements.
_Strided = tuple[int, int, int, int]

def rms_norm(
    hidden: int, weight: int, eps: float, out: int, inverse: int, shape: tuple[int, int, bool, float], threads: int
) -> None: ...
def rms_norm_backward(
    grad: int,
    hidden: int,
    weight: int,
    inverse: int,
    grad_hidden: int,
    shape: tuple[int, int, bool, float],
    threads: int,
) -> None: ...
def rotate(
    query: tuple[_Strided, _Strided],
    key: tuple[_Strided, _Strided],
    heads: tuple[int, int],
    cosine: tuple[int, int, int],
    sine: tuple[int, int, int],
    shape: tuple[int, int, int, bool, bool],
    threads: int,
) -> None: ...
