"""What a piece of code would ask of a device, counted on any device: launches, bytes, and waits of the host.

A dispatch mode sees every operation that torch carries out, also on the meta device and under autograd. Views launch
nothing. Bytes are those of the distinct elements of every tensor that an operation reads or writes.
"""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result the host needs before it can go on.
SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select")

# Operations that launch nothing, though their schemas do not say so.
FREE = (
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
)


class Counted(TorchDispatchMode):
    """Within the block, counts what torch carries out.

    Attributes:
        launches: operations that are no views, by name.
        bytes: bytes read and written by them.
        syncs: operations that make the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[str, int] = {}
        self.bytes = 0
        self.syncs = 0

    @property
    def num_launches(self) -> int:
        """All launches."""
        return sum(self.launches.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.syncs += name in SYNCS
        if not _is_view(func) and name not in SYNCS:
            self.launches[name] = self.launches.get(name, 0) + 1
            self.bytes += sum(_bytes(leaf) for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        return result


def _is_view(func: Any) -> bool:
    """Whether the results alias arguments that are not written, or memory is only set aside."""
    returns = func._schema.returns
    aliases = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return aliases or func._schema.name in FREE


def _bytes(tensor: Tensor) -> int:
    # An axis of stride 0 repeats the same element.
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()
