"""What every idea is worth beside minisp's defaults: `python benchmarks/ablation.py MODEL --calibration a --text b`.

One budget of units for all rows, evaluated as in quality.py, on half of its windows: ratio of perplexity to the dense
model's on text, on documentation and on source code. Unless a row says otherwise it calibrates on all of the text,
ranks by `fisher` over all layers, and refits on the dense model's activations: cheap rows, in which what differs is the
idea alone. What needs more than the row's group shares is collected once and kept under --cache. Finished rows are in
the result file, benchmarks/results/ablation_MACHINE.json, at once, and a run that is repeated goes on from there.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
import ideas
import opponents
import refits as further
import torch
from lab import CURVE, PLAIN, SUBSET, Lab, on, ranked, refit, widths_of
from quality import Kit, ours
from texts import data_arguments, measured_on
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.methods.selection import default_alignment, select, uniform_widths
from minisp.phases.batches import heal_windows

Rows = Iterator[tuple[str, Callable[[], Any]]]
"""Names of rows, and what makes their models."""


def reference(lab: Lab) -> Rows:
    """What all other rows are compared with."""
    yield "plain: fisher, all of the text, refit on dense inputs", lambda: ours(lab.text, lab.keep, PLAIN)
    yield "minisp's defaults", lambda: ours(lab.text, lab.keep, {})


def scores(lab: Lab) -> Rows:
    """What a unit is worth."""
    kit, keep = lab.text, lab.keep
    for kind in ("taylor", "signed"):
        yield f"score {kind}", lambda kind=kind: ours(kit, keep, {**PLAIN, "saliency": kind})

    def shared(power: float) -> list[Tensor]:
        return [x.statistics.score("fisher") * ideas.unexplained(x.gram, 0.05) ** power for x in kit.layers]

    yield "score fisher × share unexplained", lambda: ranked(kit, shared(1.0), keep)
    yield "score fisher × root of the share unexplained", lambda: ranked(kit, shared(0.5), keep)

    def labels(sampled: bool) -> Any:
        sums = lab.sweep(lab.windows[:SUBSET], gram=False, sampled=sampled)
        return ranked(kit, [x.score("fisher") for x in sums], keep)

    yield f"score fisher of {SUBSET} windows", lambda: labels(False)
    yield f"score fisher of {SUBSET} windows, sampled labels", lambda: labels(True)


def selection(lab: Lab) -> Rows:
    """Which units, and how many of which layer."""
    kit, keep = lab.text, lab.keep
    values = [x.statistics.score("fisher") for x in kit.layers]
    widths = widths_of(values, keep)
    full = [len(value) for value in values]
    alignment = default_alignment(min(full))
    yield "widths uniform", lambda: refit(kit, select(values, uniform_widths(full, keep, alignment=alignment)))
    for bound in (0.4, 0.6):
        yield f"widths at least {bound:.0%}", lambda b=bound: refit(kit, select(values, widths_of(values, keep, b)))
    yield "widths of FLAP", lambda: refit(kit, select(values, [len(c.kept) for c in opponents.flap(kit.layers, keep)]))
    yield "widths by trial cuts", lambda: ours(kit, keep, {**PLAIN, "allocation": "measured"})
    each = list(zip(kit.layers, values, widths, strict=True))
    yield (
        "units by elimination, output error",
        lambda: refit(kit, [opponents.eliminate(x.gram, x.down, n, damping=0.01) for x, _, n in each]),
    )
    yield (
        "units by elimination, fisher × share unexplained",
        lambda: refit(kit, [ideas.eliminate_salient(x.gram, v, n, damping=0.05) for x, v, n in each]),
    )
    kept = select(values, widths)
    yield (
        "units by swaps, output error",
        lambda: refit(
            kit, [ideas.swap(x.gram, x.down, k, damping=0.05) for x, k in zip(kit.layers, kept, strict=True)]
        ),
    )


def shots(lab: Lab) -> Rows:
    """A second estimate, from other windows, on the partly cut model; one shot of as many is among the texts."""
    keep, half = lab.keep, SUBSET // 2

    def two() -> Any:
        first = ours(on(lab.text, lab.subset(half)), keep**0.5, PLAIN)
        second = on(lab.text, lab.sweep(lab.windows[half:SUBSET], model=first), first)
        return ours(second, keep * _units(lab.text) / _units(second), PLAIN)

    yield f"two shots of {half} windows", two


def _units(kit: Kit) -> int:
    return sum(layer.down.shape[1] for layer in kit.layers)


def refits(lab: Lab) -> Rows:
    """What the kept units are refitted to."""
    kit, keep = lab.text, lab.keep
    made: dict[str, Any] = {}

    def model(inputs: str) -> Any:
        if inputs not in made:
            made[inputs] = ours(kit, keep, {**PLAIN, "inputs": inputs})
        return made[inputs]

    yield "refit none", lambda: ours(kit, keep, {**PLAIN, "reconstruct": False})
    for inputs in ("pruned", "both"):
        yield f"refit on {inputs} inputs", lambda inputs=inputs: model(inputs)
    for pair in (("dense", "pruned"), ("dense", "both")):
        yield f"refit, mean of {' and '.join(pair)}", lambda pair=pair: _mean(*map(model, pair))
    yield "refit, shrunk to zero", lambda: ours(kit, keep, {**PLAIN, "shrink_to": "zero", "damping": 1e-4})
    for names in ((further.ATTENTION,), (further.ATTENTION, further.MLP)):
        yield (
            f"refit, drift corrected in {' and '.join(names)}",
            lambda names=names: _corrected(kit, model("dense"), names),
        )
    yield f"refit, gate and up too, {SUBSET // 2} windows", lambda: _refitted_inside(lab, model("dense"))
    for damping in (0.005, 0.5, "auto"):
        yield f"refit, damping {damping}", lambda damping=damping: ours(kit, keep, {**PLAIN, "damping": damping})


def _corrected(kit: Kit, cut: Any, names: Sequence[str]) -> Any:
    cut = copy.deepcopy(cut)
    config = MinifyConfig()
    further.correct_drift_(
        kit.model, cut, kit.windows[heal_windows(*kit.windows.shape, config)], names, config.correction_damping
    )
    return cut


def _refitted_inside(lab: Lab, cut: Any) -> Any:
    cut = copy.deepcopy(cut)
    further.refit_inside_(lab.text.model, cut, lab.windows[: SUBSET // 2], 0.05)
    return cut


@torch.no_grad()
def _mean(first: Any, second: Any) -> Any:
    """A model with the mean of both models' weights; they differ in the down projections alone."""
    blend = copy.deepcopy(first)
    for mine, other in zip(blend.parameters(), second.parameters(), strict=True):
        mine.lerp_(other, 0.5)
    return blend


def domains(lab: Lab) -> Rows:
    """Scores of three domains, combined; Gram matrices of all three together."""
    kit, parts = lab.mixed()
    each = [[x.statistics.score("fisher") * x.statistics.num_tokens for x in lab.text.layers]]
    each += [[x.score("fisher") * x.num_tokens for x in lab.sweep(part, gram=False)] for part in parts[1:]]
    for name, combine in ideas.DOMAINS.items():
        yield f"three domains, {name}", lambda combine=combine: ranked(kit, combine(each), lab.keep)


def texts(lab: Lab) -> Rows:
    """How much text, and whose."""
    for count in CURVE:
        yield f"text, {count} windows", lambda n=count: ours(on(lab.text, lab.subset(n)), lab.keep, PLAIN)
    for temperature in (1.0, 0.7):
        yield (
            f"written by the model at temperature {temperature}, {SUBSET} windows",
            lambda t=temperature: ours(on(lab.text, lab.sweep(lab.written(t))), lab.keep, PLAIN),
        )


GROUPS = {x.__name__: x for x in (reference, scores, selection, refits, texts, shots, domains)}


def show(result: dict[str, Any]) -> None:
    """The table: ratios to the dense model, and their mean."""
    rows = []
    for key, perplexity in result["rows"].items():
        ratios = [perplexity[domain] / dense for domain, dense in result["dense"].items()]
        rows.append([key, *(f"{ratio:.4f}" for ratio in (*ratios, sum(ratios) / len(ratios)))])
    harness.print_table("Perplexity / dense", ["kept, idea", *result["dense"], "mean"], rows)


def main() -> None:
    """Measure what is not in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--keep", type=float, default=0.8, help="share of the units, 0.8 by default")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="of rows, all by default")
    arguments = parser.parse_args()

    lab = Lab(arguments)
    name = harness.result_name("ablation", arguments.label)
    identity = {**measured_on(lab.model, lab.calibration, lab.texts), "defaults": MinifyConfig().as_dict()}
    result = harness.resume_json(name, identity)
    if not result:
        result = {"measured on": identity, "dense": lab.text.perplexities(lab.text.model), "rows": {}}
    for group in arguments.groups:
        for idea, make in GROUPS[group](lab):
            cell = f"{100 * lab.keep:.4g}% {idea}"
            if cell not in result["rows"]:
                result["rows"][cell] = lab.text.perplexities(make())
                harness.write_json(name, result)
                print(cell, flush=True)
    show(result)


if __name__ == "__main__":
    main()
