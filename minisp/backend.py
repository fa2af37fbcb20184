"""Who computes an operation: the choice behind every `impl` argument."""

from typing import Literal

from minisp.errors import BackendError

Impl = Literal["auto", "torch", "native", "triton"]


def choose(op: str, impl: Impl, *, native: bool = False, triton: bool = False) -> Impl:
    """Who computes: the caller's choice where it can serve, or the best of those that can."""
    able: list[Impl] = ["torch"]
    able += ["native"] if native else []
    able += ["triton"] if triton else []
    if impl == "auto":
        return able[-1]
    if impl not in able:
        raise BackendError(
            f"Operation {op}: expected an implementation that serves these tensors ({', '.join(able)}), got {impl!r}. "
            "Pass impl='auto', build the extension, or move the tensors."
        )
    return impl
