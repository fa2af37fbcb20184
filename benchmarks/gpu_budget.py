"""Where the time of a run on one H100 would go, phase by phase: derived from shapes and rates, nothing is measured.

    python benchmarks/gpu_budget.py         # writes docs/gpu_budgets.md

Defaults (trial cuts, refit, drift correction) on 128 windows of 2048 tokens, from a checkpoint on disk to another one.
T tokens, d hidden size, m units, n kept units. Work is counted in `work` as the phases' demands count it, which a test
compares. A phase takes as long as its computation, or as its disk, whichever is longer, for both run side by side.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic import SHAPES

from minisp.phases.batches import correction_count
from minisp.phases.trials import TRIAL_CUT, trial_tokens

TARGET = Path(__file__).parent.parent / "docs" / "gpu_budgets.md"
WINDOWS, WINDOW, KEEP = 128, 2048, 0.8
# Bytes that norms, rotary and residuals move for every token, hidden element and layer, fused and not (counted on the
# meta device for what is not), and bytes that activation and saliency move for every token and unit.
FUSED = {"forward": 30, "backward": 60}
EAGER = {"forward": 124, "backward": 256}
UNIT_BYTES = {"forward": 6, "backward": 12}
# Of an H100 SXM, in FLOP/s and bytes/s: cuBLAS with 8192 and 2048 tokens at once, flash attention, minisp's Gram kernel
# (60 % and 42 % of 790 TFLOP/s), XᵀY, torch's factorisation and triangular solves, element-wise passes; of its machine:
# one disk.
RATES = {
    "products, 8192 tokens": 690e12, "products, 2048 tokens": 630e12, "attention forward": 320e12,
    "attention backward": 250e12, "Gram, 8192 tokens": 475e12, "Gram, 2048 tokens": 330e12, "XᵀY": 650e12,
    "Cholesky of torch": 24e12, "triangular solves of torch": 38e12, "float32 products": 48e12,
    "element-wise": 2.6e12, "activation": 2.35e12, "disk read": 3e9, "disk write": 2e9,
}  # fmt: skip
BYTES = ("element-wise", "activation", "disk read", "disk write")
# How much faster than torch.linalg the ridge solver is at least, with its checks: docs/derived-solver.md.
SOLVER = 1.75


HEAD = """# Time budgets on a GPU

Derived by `python benchmarks/gpu_budget.py` from shapes and assumed rates. **Nothing here was measured**: no GPU was at
hand, and every figure may be wrong by a quarter. `benchmarks/gpu_suite.py` measures what is assumed.

Defaults (trial cuts, refit, drift correction) on 128 windows of 2048 tokens, 80 % kept, from a checkpoint on disk to
another one. A phase takes as long as its computation or its disk, whichever is longer: weights, states and statistics
are read ahead and written behind, and copies to and from the device (PCIe 50 GB/s, a few seconds in all) have streams
of their own. Assumed beside that: fused norms and rotary, {forward} bytes a token, hidden element and layer forward and
{backward} backward; states in memory as far as they fit; two passes a window in the correction, the second at the kept
width, and the third formed as a product; a ridge solver ×{solver} of torch.linalg; digests taken while writing. Left
out: imports and compiling kernels on a machine that has none in its cache, 5 to 8 s.

{rates}
"""


@dataclass(frozen=True)
class Case:
    """A model on a device: layers held at once, tokens of a micro-batch, bytes of main memory for what waits, target.

    `cached` says that the system keeps the checkpoint's files in main memory once they were read.
    """

    size: str
    title: str
    segment: int
    batch: int
    room: float
    cached: bool
    goal: float


CASES = (
    Case("7B", "7B, one H100 of 80 GB", 32, 8192, 64e9, True, 40),
    Case("70B", "70B in 24 GB of an H100, states in 128 GB of main memory", 2, 2048, 100e9, False, 480),
)


@dataclass(frozen=True)
class Phase:
    """Seconds of computation by purpose, and bytes through the disk meanwhile."""

    name: str
    parts: dict[str, float]
    read: float = 0.0
    written: float = 0.0

    @property
    def disk(self) -> float:
        """Seconds of the disk."""
        return self.read / RATES["disk read"] + self.written / RATES["disk write"]

    @property
    def seconds(self) -> float:
        """Of the longer of both."""
        return max(sum(self.parts.values()), self.disk)


def weights(size: str, kept: float = 1.0) -> tuple[float, float, float]:
    """Parameters of attention and of the MLP of a layer, and of embeddings and head together."""
    d, m, _, heads, groups, vocabulary, tied = SHAPES[size]
    return 2 * d * d * (1 + groups / heads), 3 * d * m * kept, vocabulary * d * (1 if tied else 2)


def work(size: str, segments: int, tokens: int = WINDOWS * WINDOW) -> dict[str, float]:
    """Floating-point operations of the sweep: products of layers and head, Gram matrices; and of attention beside."""
    d, m, layers, _, _, vocabulary, _ = SHAPES[size]
    inside = sum(weights(size)[:2]) * layers
    passes = 2 + (1 - 1 / segments)
    return {
        "products": tokens * (2 * inside * passes + 4 * vocabulary * d),
        "Gram": float(tokens * m * m * layers),
        "attention forward": (passes - 1) * 2 * tokens * WINDOW * d * layers,
        "attention backward": 5.0 * tokens * WINDOW * d * layers,
    }


def solve(size: str, kept: float, *, refit: bool = True) -> float:
    """Seconds of one layer's solve; of a refit with W_P G_PS."""
    d, m = SHAPES[size][:2]
    n = kept * m
    torch = n**3 / 3 / RATES["Cholesky of torch"] + 2 * n * n * d / RATES["triangular solves of torch"]
    return torch / SOLVER + (2 * (m - n) * n * d / RATES["float32 products"] if refit else 0.0)


def passing(case: Case, tokens: float, norms: dict[str, int], kept: float = 1.0) -> dict[str, float]:
    """Seconds of tokens passing all layers forward once."""
    d, m, layers = SHAPES[case.size][:3]
    attention, mlp, _ = weights(case.size, kept)
    return {
        "products": 2 * tokens * (attention + mlp) * layers / RATES[f"products, {case.batch} tokens"],
        "attention": 2 * tokens * WINDOW * d * layers / RATES["attention forward"],
        "norms, rotary": norms["forward"] * tokens * d * layers / RATES["element-wise"],
        "activation": UNIT_BYTES["forward"] * tokens * m * kept * layers / RATES["activation"],
    }


def phases(
    case: Case, norms: dict[str, int] = FUSED, *, writes_behind: bool = False, saliency: int = WINDOWS
) -> list[Phase]:
    """Of a run with the defaults.

    Args:
        norms: bytes that norms and rotary move, `FUSED` or `EAGER`.
        writes_behind: whether layers are written as they are refitted, and not after the last one.
        saliency: windows of the saliency sweep.
    """
    d, m, layers = SHAPES[case.size][:3]
    tokens, n, segments = saliency * WINDOW, KEEP * m, -(-layers // case.segment)
    attention, mlp, ends = weights(case.size)
    checkpoint = 2 * ((attention + mlp) * layers + ends)
    result = 2 * ((attention + KEEP * mlp) * layers + ends)
    again = 0.0 if case.cached else checkpoint
    boundaries = 2 * tokens * d * (segments - 1)
    spilled, grams = max(0.0, boundaries - case.room), 2.0 * m * m * layers
    products, gram = RATES[f"products, {case.batch} tokens"], RATES[f"Gram, {case.batch} tokens"]
    done, forward = work(case.size, segments, tokens), passing(case, tokens * (segments - 1) / segments, norms)
    sweep = passing(case, tokens, norms)
    backward = {
        "products": done["products"] / products - forward["products"],
        "attention": sweep["attention"] + done["attention backward"] / RATES["attention backward"],
        "norms, rotary": (norms["forward"] + norms["backward"]) * tokens * d * layers / RATES["element-wise"],
        "activation": sum(UNIT_BYTES.values()) * tokens * m * layers / RATES["activation"],
        "Gram": done["Gram"] / gram,
    }
    trials = trial_tokens(WINDOWS * WINDOW, layers)
    heals = correction_count(WINDOWS, WINDOW) * WINDOW
    dense, cut = passing(case, heals, norms), passing(case, heals, norms, KEEP)
    heal = {name: dense[name] + cut[name] for name in dense}
    heal["Gram, XᵀE"] = heals * layers * (n * n / gram + 2 * n * d / RATES["XᵀY"])
    # What the correction adds to the states: X_S Δᵀ, in place of a third pass.
    heal["third pass as a product"] = 2 * heals * n * d * layers / products
    heal["solves"] = layers * (solve(case.size, KEEP) + solve(case.size, KEEP, refit=False))
    tried = {name: spent * layers / 2 for name, spent in passing(case, trials, norms).items()}
    tried["solves"] = layers * solve(case.size, 1 - TRIAL_CUT)
    held = 0.0 if grams <= case.room else grams
    return [
        Phase("first segment read", {}, read=checkpoint / segments),
        *([Phase("sweep, forward", forward, read=checkpoint, written=spilled)] if segments > 1 else []),
        Phase("sweep, backward", backward, read=again + spilled, written=grams),
        Phase("trial cuts", tried, read=again + held),
        Phase("refit and correction", heal, read=again + held, written=result if writes_behind else 0.0),
        *([] if writes_behind else [Phase("result written", {}, read=again, written=result)]),
    ]


def seconds(case: Case, norms: dict[str, int] = FUSED, **how: Any) -> float:
    """Of all phases."""
    return sum(phase.seconds for phase in phases(case, norms, **how))


def section(case: Case) -> str:
    """One case as Markdown: its phases, whether it keeps to its target, and what is missing or could be saved."""
    found = phases(case)
    rows = [
        f"| {phase.name} | {' · '.join(f'{name} {spent:.1f}' for name, spent in phase.parts.items())} | "
        f"{phase.disk:.1f} | {phase.seconds:.1f} |"
        for phase in found
    ]
    total = seconds(case)
    head = ["| phase | computation, s | disk, s | phase, s |", "| --- | --- | ---: | ---: |"]
    table = "\n".join([*head, *rows, f"| **all** | | | **{total:.0f}** |"])
    idle = total - sum(sum(phase.parts.values()) for phase in found)
    verdict = "reached" if total <= case.goal else f"missed by {total - case.goal:.0f} s"
    variants = {
        "layers written as they are refitted, not after the last one": seconds(case, writes_behind=True),
        "saliency on 64 windows": seconds(case, saliency=64),
        "both": seconds(case, writes_behind=True, saliency=64),
        "norms and rotary in transformers' eager operations": seconds(case, EAGER),
    }
    other = "\n".join(f"- {name}: {spent:.0f} s" for name, spent in variants.items())
    return f"""## {case.title}

{table}

Target {case.goal:.0f} s: {verdict} (derived). The GPU waits for the disk {idle:.0f} s of it. Otherwise, or instead:

{other}
"""


def render() -> str:
    """The whole page."""
    units = {True: (1e12, "T"), False: (1e9, "G")}
    rows = [
        f"| {name} | {rate / units[rate > 1e11][0]:g} {units[rate > 1e11][1]}{'B' if name in BYTES else 'FLOP'}/s |"
        for name, rate in RATES.items()
    ]
    rates = "\n".join(["| assumed of an H100 | rate |", "| --- | ---: |", *rows])
    return "\n".join([HEAD.format(rates=rates, solver=SOLVER, **FUSED), *map(section, CASES)])


def main() -> None:
    """Write the page."""
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), "utf-8")
    print(TARGET)


if __name__ == "__main__":
    main()
