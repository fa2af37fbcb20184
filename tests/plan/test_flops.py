"""The planned floating-point operations against those that torch carries out, counted in a whole run."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from minisp import fast
from minisp.ops import native, portable
from minisp.report.report import MinifyReport
from tests.tiny import tiny_model
from tests.toys import windows

# What a run says about few tokens does not matter here.
FEW = "ignore:.* calibration tokens are few:UserWarning"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(FEW)]
# Wide enough for norms and the last token of a window, which no plan counts, to be within a few per cent.
LAYERS, HIDDEN, WIDTH, VOCABULARY, WINDOWS, LENGTH = 4, 64, 192, 512, 6, 48
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
    # Torch sees no product of the C++ kernels. Tiles as wide as the layer would compute all of a Gram matrix where a
    # plan counts one half.
    monkeypatch.setattr(native, "serves_gram", lambda x: False)
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


@pytest.mark.parametrize("segment", [1, 2, LAYERS])
def test_the_sweep_s_forward_backward_and_gram_matrices(segment: int) -> None:
    flops, report = counted(keep=1.0, correct_drift=False, allocation="score", segment=segment)
    assert len(report.plan.segments) == LAYERS // segment
    # One per cent is less than any part of it: recomputing, head, Gram matrices.
    assert flops == pytest.approx(report.plan.flops, rel=0.01)
    assert report.plan.solve_flops == 0


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"refit_on": "pruned", "allocation": "score"}, 0.1),
        ({"correct_drift": True, "allocation": "score"}, 0.1),
        ({"correct_drift": False, "allocation": "measured"}, 0.05),
    ],
)
def test_what_else_runs(options: dict[str, Any], tolerance: float) -> None:
    """The refit sweep's passes, Gram matrices and cross products, and the trial cuts.

    A plan takes every layer to keep the same share, and adds up whole passes only.
    """
    swept, base = counted(keep=0.5, correct_drift=False, allocation="score")
    flops, report = counted(keep=0.5, **options)
    planned = report.plan.flops - base.plan.flops
    if options.get("refit_on") == "pruned":
        # Its Gram matrices are the refit sweep's instead of the saliency sweep's.
        assert flops - swept == pytest.approx(planned, rel=tolerance)
    else:
        # Refits of trial cuts are solves.
        solves = report.plan.solve_flops - base.plan.solve_flops
        assert planned * (1 - tolerance) < flops - swept < (planned + solves) * (1 + tolerance)
    assert planned > 0.4 * base.plan.flops
