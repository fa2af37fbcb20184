"""How much generic text, and which: `python benchmarks/blend.py MODEL --calibration a --text b --neutral FOLDER`.

A model is calibrated on a text and on generic text beside it: what it writes itself, Python's documentation, Python's
sources. What that costs at home is measured on --text; what it saves abroad, on the texts of --neutral, which must be
of domains that no source covers. Statistics are sums over tokens, so those of every mixture follow from those of its
pieces, which are collected once and kept under --cache. All rows rank by `fisher` over all layers and refit on the
dense model's activations, as the plain row of ablation.py, unless they say otherwise. Finished rows are in the result
file, benchmarks/results/blend_MACHINE.json, at once, and a run that is repeated goes on from there.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import harness
import ideas
import torch
from lab import PLAIN, Lab, added, on, ranked
from quality import Kit, ours
from texts import data_arguments, measured_on, written_windows
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.methods.statistics import LayerStatistics
from minisp.phases.run import Workplace
from minisp.text.windows import spread

# Windows of a piece of the text, and of one of generic text.
OWN, GENERIC = 16, 8
# Pieces: of the text; and by source of generic text, written by the model first.
PIECES = {"text": 18, "written": 4, "documentation": 2, "code": 2}
Mixture = Mapping[str, Sequence[int]]
"""Source → numbers of its pieces."""


def mixture(own: int, written: int = 0, documentation: int = 0, code: int = 0) -> Mixture:
    """The first so many pieces of every source."""
    counts = {"text": own, "written": written, "documentation": documentation, "code": code}
    return {name: range(count) for name, count in counts.items() if count}


def windows_of(pieces: Mixture) -> str:
    """As 128 + 16 written + 8 documentation."""
    sizes = {name: len(numbers) * (OWN if name == "text" else GENERIC) for name, numbers in pieces.items()}
    return " + ".join(f"{size} {name}" for name, size in sizes.items())


class Pieces:
    """Statistics of the pieces, and of what is mixed from them."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.kit = Kit(lab.model, Workplace.in_memory(), [], lab.windows, lab.texts)

    @cached_property
    def windows(self) -> dict[str, list[Tensor]]:
        """Source → its pieces (n, L)."""
        lab, length = self.lab, self.lab.windows.shape[1]
        texts = {"text": lab.calibration}
        for name in ("documentation", "code"):
            texts[name] = lab.read(f"builtin:{name}", GENERIC * PIECES[name])
        count = GENERIC * PIECES["written"]
        texts["written"] = written_windows(lab.cache, lab.tokenizer, lab.model, count, length)
        # Pieces of the text are consecutive; those of generic text take its windows by turns, so that all are alike.
        return {
            name: list(found[: OWN * PIECES[name]].split(OWN))
            if name == "text"
            else [found[number :: PIECES[name]] for number in range(PIECES[name])]
            for name, found in texts.items()
        }

    def statistics(self, pieces: Mixture) -> list[LayerStatistics]:
        """Every layer's sums over some pieces."""
        found = [self.lab.sweep(self.windows[name][number]) for name, numbers in pieces.items() for number in numbers]
        return [added(layer) for layer in zip(*found, strict=True)]

    def model(self, pieces: Mixture, keep: float, options: Mapping[str, Any], scores: Any = None) -> Any:
        """The model cut with the statistics of some pieces; `scores` are those of other ones."""
        kit = on(self.kit, self.statistics(pieces))
        return ranked(kit, scores, keep) if scores is not None else ours(kit, keep, {**PLAIN, **options})

    def scores(self, pieces: Mixture, *, sampled: bool = False) -> list[Tensor]:
        """Saliency (m,) of every layer, summed over the tokens of some pieces; `sampled`: labels drawn by the model."""
        if not sampled:
            return [layer.score("fisher") * max(layer.num_scored, 1) for layer in self.statistics(pieces)]
        windows = torch.cat([self.windows[name][number] for name, numbers in pieces.items() for number in numbers])
        return [layer.score("fisher") for layer in self.lab.sweep(windows, gram=False, sampled=True)]


Row = tuple[str, Mixture, Callable[[Pieces], Any]]
"""A name, what it calibrates on, and what makes its model."""


def rows(keep: float) -> Iterator[Row]:
    """All rows: shares, sources, what generic text feeds, and what else might pay beside it."""

    def plain(name: str, pieces: Mixture, **options: Any) -> Row:
        return name, pieces, lambda all_pieces: all_pieces.model(pieces, keep, options)

    def scored(name: str, pieces: Mixture, scores: Callable[[Pieces], list[Tensor]]) -> Row:
        return name, pieces, lambda all_pieces: all_pieces.model(pieces, keep, {}, scores(all_pieces))

    whole = mixture(8)
    for added_text in ((0, 0, 0), (2, 1, 1), (4, 1, 1), (4, 2, 2)):
        yield plain("joined", mixture(8, *added_text))
    for own, *generic in (
        (7, 1, 1, 0),
        (6, 2, 1, 1),
        (5, 4, 1, 1),
        (4, 4, 2, 2),
        (2, 4, 2, 2),
        (1, 4, 2, 2),
        (0, 4, 2, 2),
    ):
        yield plain("replaced", mixture(own, *generic))
    yield plain("source", mixture(8, 4))
    yield plain("source", mixture(8, 0, 2, 2))
    default = mixture(8, 4, 1, 1)
    yield scored("generic text feeds the scores alone", whole, lambda p: p.scores(default))
    yield scored("generic text feeds the Gram matrices alone", default, lambda p: p.scores(whole))
    for how in ("mean of shares", "worst share"):
        yield scored(f"scores per domain, {how}", default, lambda p, how=how: combined(p, default, how))
    for bound in (0.4, 0.6):
        yield plain(f"widths at least {bound:.0%}", default, min_keep=bound)
    for damping in (0.01, 0.2):
        yield plain(f"damping {damping}", default, damping=damping)
    for own, *generic in ((1, 1, 0, 0), (2, 1, 0, 0), (4, 2, 0, 0)):
        yield plain("fewer windows", mixture(own, *generic))
    spread_out = {**default, "text": spread(PIECES["text"], 8)}
    yield plain("text spread over all of it", {"text": spread_out["text"]})
    yield plain("text spread over all of it", spread_out)
    yield plain("all of the text", {**default, "text": range(PIECES["text"])})
    yield scored("labels drawn by the model", default, lambda p: p.scores(default, sampled=True))


def combined(pieces: Pieces, wanted: Mixture, how: str) -> list[Tensor]:
    """Scores of every source by itself, combined as ideas.DOMAINS says."""
    return ideas.DOMAINS[how]([pieces.scores({name: numbers}) for name, numbers in wanted.items()])


def show(result: dict[str, Any]) -> None:
    """The table: ratios to the dense model."""
    table = []
    for key, perplexity in result["rows"].items():
        table.append([key, *(f"{perplexity[domain] / dense:.4f}" for domain, dense in result["dense"].items())])
    harness.print_table("Perplexity / dense", ["windows", *result["dense"]], table)


def main() -> None:
    """Measure what is not in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--keep", type=float, default=0.8, help="share of the units, 0.8 by default")
    parser.add_argument("--choose", nargs="+", default=("german", "licences"), help="texts of --neutral to measure on")
    arguments = parser.parse_args()

    lab = Lab(arguments)
    lab.texts = {name: lab.texts[name] for name in ("text", *arguments.choose)}
    name = harness.result_name("blend", arguments.label)
    identity = {
        **measured_on(lab.model, lab.calibration, lab.texts),
        "plain": MinifyConfig(**PLAIN, generic=0.0).as_dict(),
    }
    result = harness.resume_json(name, identity)
    pieces = Pieces(lab)
    if not result:
        result = {"measured on": identity, "dense": pieces.kit.perplexities(lab.model), "rows": {}}
    for kind, wanted, make in rows(arguments.keep):
        cell = f"{100 * arguments.keep:.4g}% {kind}: {windows_of(wanted)}"
        if cell not in result["rows"]:
            began = time.perf_counter()
            result["rows"][cell] = pieces.kit.perplexities(make(pieces))
            harness.write_json(name, result)
            print(f"{cell}, {time.perf_counter() - began:.0f} s", flush=True)
    show(result)


if __name__ == "__main__":
    main()
