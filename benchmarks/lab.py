"""What the rows of ablation.py share: the dense model, its statistics and those of other texts, and a plain refit."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import harness
import opponents
import torch
from quality import OURS, Kit, collect, load_dense, refitted
from texts import evaluation_texts
from torch import Tensor
from transformers import AutoTokenizer

from minisp.config import MinifyConfig
from minisp.methods.selection import allocate_widths, default_alignment, select
from minisp.methods.statistics import LayerStatistics
from minisp.models.families import architecture_of
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.phases.batches import Batches
from minisp.phases.run import Workplace
from minisp.phases.saliency import saliency_sweep
from minisp.text.calibration import interleave, load_calibration
from minisp.text.written import continue_texts, random_starts

PLAIN = OURS["minisp: + refit"]
# Windows of what needs a sweep of its own.
SUBSET = 128
CURVE = (16, 32, 64, SUBSET)


class Lab:
    """The dense model with its statistics, and everything that further statistics need."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.cache, self.keep, self.tokenizer = (
            arguments.cache,
            arguments.keep,
            AutoTokenizer.from_pretrained(arguments.model),
        )
        self.model = load_dense(arguments.model)
        # Half of the windows of quality.py: rows are compared with each other, on the same windows.
        self.texts = {name: (ids, n // 2) for name, (ids, n) in evaluation_texts(arguments, self.tokenizer).items()}
        self.calibration = self.read(arguments.calibration, arguments.windows)
        # Subsets are nested, so that a larger one costs only what is new in it.
        order = torch.randperm(len(self.calibration), generator=torch.Generator().manual_seed(0))
        self.windows = self.calibration[order]

    def read(self, source: Any, count: int) -> Tensor:
        """(at most `count`, L) windows of one source."""
        length = self.arguments.window
        return load_calibration(source, self.tokenizer, num_windows=count, window=length).windows

    @cached_property
    def text(self) -> Kit:
        """Calibrated on the text."""
        return self._kit(self.calibration)

    def _kit(self, windows: Tensor) -> Kit:
        work, means, _ = collect(self.model, windows, self.cache)
        records = [work.statistics(index, gram=True) for index in range(len(means))]
        layers = opponents.look_at(self.model, architecture_of(self.model.config), records, means)
        return Kit(self.model, work, layers, windows, self.texts)

    def mixed(self) -> tuple[Kit, list[Tensor]]:
        """Calibrated on three domains; and the windows (N, L) of each."""
        others = [self.read(f"builtin:{name}", SUBSET // 2) for name in ("documentation", "code")]
        parts = [self.calibration, *others]
        return self._kit(interleave(parts)), parts

    def sweep(
        self, windows: Tensor, *, gram: bool = True, sampled: bool = False, model: Any = None
    ) -> list[LayerStatistics]:
        """Every layer's statistics on windows (N, L); those of the dense model are kept in the cache."""
        key = harness.digest([*self.model.parameters(), windows])
        name = self.cache / f"{key}_{'sampled' if sampled else 'text'}_{gram}.pt"
        if model is None and name.exists():
            return [LayerStatistics(*record) for record in torch.load(name, weights_only=True)]
        work, subject = Workplace.in_memory(), model or self.model
        stream = Stream.from_module(subject)
        stream.label_seed = 0 if sampled else None
        count = len(stream.layers)
        with frozen(subject):
            saliency_sweep(stream, Batches.scoring(windows.split(1)), [range(count)], work, gram=gram)
        found = [work.statistics(index, gram=gram) for index in range(count)]
        if model is None:
            torch.save([(x.num_tokens, x.saliency, x.gram) for x in found], name)
        return found

    def written(self, temperature: float) -> Tensor:
        """Text that the model writes itself from random first tokens, (SUBSET, L)."""
        model, length = self.model, self.windows.shape[1]
        name = self.cache / f"{harness.digest(model.parameters())}_written_{length}_{temperature}.pt"
        if not name.exists():
            generator = torch.Generator().manual_seed(0)
            starts = random_starts(self.tokenizer, model.config.vocab_size, (SUBSET, length), generator)
            torch.save(continue_texts(model, starts, torch.full((SUBSET,), temperature), generator), name)
        windows: Tensor = torch.load(name, weights_only=True)
        return windows

    def subset(self, count: int) -> list[LayerStatistics]:
        """Statistics of the first `count` windows, one of CURVE, added up from slices."""
        edges = [0, *(c for c in CURVE if c <= count)]
        parts = [self.sweep(self.windows[start:stop]) for start, stop in pairwise(edges)]
        return [added(layer) for layer in zip(*parts, strict=True)]


def added(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """The sums of several texts together."""
    gram = torch.stack([part.gram for part in parts if part.gram is not None]).sum(0)
    return LayerStatistics(sum(p.num_tokens for p in parts), sum((p.saliency for p in parts), torch.zeros(())), gram)


def on(kit: Kit, records: Sequence[LayerStatistics], model: Any = None) -> Kit:
    """The kit with other statistics, and with another model if that has been cut before."""
    model = model or kit.model
    work = Workplace.in_memory()
    for index, statistics in enumerate(records):
        work.keep_statistics(index, statistics)
    # FLAP alone needs them.
    means = [layer.mean for layer in kit.layers] or [torch.zeros(len(x.saliency[0])) for x in records]
    layers = opponents.look_at(model, architecture_of(model.config), records, means)
    return replace(kit, model=model, work=work, layers=layers)


def refit(kit: Kit, kept: Sequence[Tensor]) -> Any:
    """A copy of the model with these units, refitted as the plain row."""
    return refitted(kit, kept, MinifyConfig(**PLAIN))


def widths_of(scores: Sequence[Tensor], keep: float, min_keep: float = 0.1) -> list[int]:
    """The plain row's widths for these scores."""
    alignment = default_alignment(min(map(len, scores)))
    return allocate_widths(scores, keep, alignment=alignment, min_keep=min_keep)


def ranked(kit: Kit, scores: Sequence[Tensor], keep: float) -> Any:
    """One ranking by any scores, then the refit."""
    return refit(kit, select(scores, widths_of(scores, keep)))
