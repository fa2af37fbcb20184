"""The planned floating-point operations against those that torch carries out, counted in a whole run."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from minisp import fast, portable
from minisp.report import MinifyReport
from minisp.stream import Stream
from tests.models import tiny_model
from tests.toys import windows

pytestmark = pytest.mark.usefixtures("one_thread")
# Wide enough for norms and the last token of a window, which no plan counts, to be within a few per cent.
LAYERS, HIDDEN, WIDTH, VOCABULARY, WINDOWS, LENGTH = 4, 64, 192, 512, 6, 48
TOKENS = WINDOWS * LENGTH
ATTENTION = 3 * HIDDEN * HIDDEN
GRAM_TILE = 8
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles as wide as the layer would compute all of a Gram matrix where a plan counts one half.
    monkeypatch.setattr(portable, "GRAM_TILE", GRAM_TILE)


class Products(TorchDispatchMode):
    """Counts the operations of matrix products by torch's own formulas; those inside attention are left out.

    `FlopCounterMode` does the same, but its tracking of modules refuses `torch.autograd.grad` for a leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removesuffix("_")
        if name in ("aten::mm", "aten::addmm"):
            formula = flop_registry[getattr(torch.ops.aten, name.removeprefix("aten::"))]
            self.flops += formula(*args, out_val=result)
        return result


def counted(**options: Any) -> tuple[int, MinifyReport]:
    """Operations of all matrix products of a run that torch carries out, and the report."""
    model, ids = tiny_model("llama", **SHAPE), windows(WINDOWS, LENGTH)
    with Products() as products:
        report = fast.minify(model, calibration=ids, alignment=4, batch=2, **options)
    return products.flops, report
