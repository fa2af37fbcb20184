"""What every method leaves of a model, by domain: `python benchmarks/quality.py MODEL --calibration a --text b`.

All rows share one set of statistics (kept under --cache) and are evaluated alike: perplexity over that of the dense
model, windows of 1024 tokens, on the text given, on Python's documentation, on source code, and on the texts of a
folder (--neutral). With --generic 0.2 a fifth of the calibration windows is generic text, as in `minify`; what is
evaluated on is not among them. Every finished row is in the result file at once, and a run that is repeated goes on
from there; rows of minisp whose options have changed since are measured anew. All 50 rows took 88 minutes on 2 cores
for a model of 135M; the file is benchmarks/results/quality_text_MACHINE.json, or quality_generic_. Seconds do not count
the statistics, and trial cuts only in the first row that needs them; memory is what comes on top of the dense model,
the copy that is cut included.

Not in the table: SliceGPT (Ashkboos et al., 2024), which cuts the hidden size instead of units and needs a rotation in
every residual connection that stock classes do not have; no equal budget could be drawn up that is fair to both.
"""

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from naive import EVALUATION
from opponents import OPPONENTS, Layer, apply_, look_at
from texts import calibration_windows, data_arguments, evaluation_texts, measured_on
from torch import Tensor
from transformers import AutoTokenizer

from minisp.config import MinifyConfig
from minisp.device import compute_dtype
from minisp.evaluate.perplexity import perplexity
from minisp.methods.reconstruction import reconstruct
from minisp.methods.selection import allocate_widths, default_alignment, select
from minisp.methods.statistics import LayerStatistics
from minisp.models.families import architecture_of, cut_, decoder_layers
from minisp.models.layers import fast_layers
from minisp.models.skeleton import frozen, load_model
from minisp.models.stream import Stream
from minisp.phases.batches import Batches, heal_windows
from minisp.phases.refit import heal_sweep
from minisp.phases.run import Workplace, record
from minisp.phases.saliency import saliency_sweep
from minisp.phases.trials import layer_ratios
from minisp.store.checkpoint import Checkpoint

CPU = torch.device("cpu")
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)

OURS: dict[str, dict[str, Any]] = {
    "minisp: score only": {"reconstruct": False, "inputs": "dense", "allocation": "score"},
    "minisp: + refit": {"inputs": "dense", "allocation": "score"},
    "minisp: + trial cuts": {"inputs": "dense", "allocation": "measured"},
    "minisp: + correction": {"inputs": "both", "allocation": "measured"},
}


@dataclass(frozen=True)
class Kit:
    """What all rows share: the dense model, its records, its layers for the opponents, texts, windows."""

    model: Any
    work: Workplace
    layers: list[Layer]
    windows: Tensor
    texts: dict[str, tuple[Tensor, int]]

    def fresh(self) -> Any:
        """A copy of the dense model."""
        return copy.deepcopy(self.model)

    def perplexities(self, model: Any) -> dict[str, float]:
        """Perplexity of a model on every domain."""
        with fast_layers(model):
            return {
                name: perplexity(model, ids, window=EVALUATION[1], max_windows=n).value
                for name, (ids, n) in self.texts.items()
            }


def load_dense(name: str) -> Any:
    """The dense model, in the type that this processor computes fastest."""
    return load_model(Checkpoint.open(name), CPU, compute_dtype(MinifyConfig(), CPU))


def collect(model: Any, windows: Tensor, cache: Path) -> tuple[Workplace, list[Tensor], float]:
    """Records of every layer's statistics, the mean activations (m,), and the seconds that they took."""
    work = Workplace.in_memory()
    name = cache / f"{harness.digest([*model.parameters(), windows])}.pt"
    row = architecture_of(model.config)
    count = len(decoder_layers(model, row))
    if name.exists():
        saved = torch.load(name, weights_only=True)
        for index, (tokens, saliency, gram) in enumerate(saved["layers"]):
            work.keep_statistics(index, LayerStatistics(tokens, saliency, gram, tokens))
        return work, saved["means"], saved["seconds"]
    start = time.perf_counter()
    with frozen(model):
        saliency_sweep(Stream.from_module(model), Batches.scoring(windows.split(1)), [range(count)], work, gram=True)
    seconds = time.perf_counter() - start
    # The means, which FLAP alone needs, and its time has no share in.
    means = _means(model, row, windows)
    found = [work.statistics(index, gram=True) for index in range(count)]
    layers = [(x.num_tokens, x.saliency, x.gram) for x in found]
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({"layers": layers, "means": means, "seconds": seconds}, name)
    return work, means, seconds


@torch.no_grad()
def _means(model: Any, row: Any, windows: Tensor) -> list[Tensor]:
    downs = [layer.get_submodule(row.down) for layer in decoder_layers(model, row)]
    sums = [torch.zeros(down.in_features) for down in downs]

    def add(total: Tensor, _: Any, inputs: tuple[Tensor, ...]) -> None:
        total += inputs[0].float().flatten(0, -2).sum(0)

    handles = [d.register_forward_pre_hook(partial(add, total)) for d, total in zip(downs, sums, strict=True)]
    with fast_layers(model):
        for ids in windows.split(1):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return [total / windows.numel() for total in sums]


def ours(kit: Kit, keep: float, options: dict[str, Any]) -> Any:
    """A copy of the model, minified by the engine with these options from the statistics at hand."""
    config = MinifyConfig(keep=keep, **options)
    scores = [layer.statistics.score(config.saliency) for layer in kit.layers]
    if config.measures:
        with frozen(kit.model):
            measured = layer_ratios(Stream.from_module(kit.model), kit.windows, scores, config, kit.work)
        scores = [score * ratio for score, ratio in zip(scores, measured, strict=True)]
    alignment = config.alignment or default_alignment(min(len(score) for score in scores))
    kept = select(scores, allocate_widths(scores, keep, alignment=alignment, min_keep=config.min_keep))
    if not config.heals:
        return refitted(kit, kept, config)
    model = kit.fresh()
    for layer in range(len(kept)):
        kit.work.shared.drop(record("result", layer))
    with frozen(model):
        batches = kit.windows[heal_windows(*kit.windows.shape, config)].split(1)
        heal_sweep(Stream.from_module(model), batches, kept, config, kit.work)
    return model


def refitted(kit: Kit, kept: Sequence[Tensor], config: MinifyConfig) -> Any:
    """A copy of the model with these units, refitted on the dense model's activations."""
    model = kit.fresh()
    stream = Stream.from_module(model)
    with frozen(model):
        for index, layer in enumerate(kit.layers):
            result = reconstruct(index, layer.statistics, kept[index], stream.down_weight(index), config)
            if result.down is not None:
                cut_(stream.layers[index], stream.row, kept[index], result.down)
    return model


def theirs(kit: Kit, keep: float, name: str) -> Any:
    """A copy of the model after an opponent."""
    model = kit.fresh()
    apply_(model, architecture_of(model.config), OPPONENTS[name](kit.layers, keep))
    return model


def options_of(name: str, keep: float) -> dict[str, Any] | None:
    """All options of a row of minisp's; None for the others."""
    return MinifyConfig(keep=keep, **OURS[name]).as_dict() if name in OURS else None


def measure_row(kit: Kit, name: str, keep: float) -> dict[str, Any]:
    """One cell of the table: seconds beside the statistics, peak memory beside the model, perplexities."""
    base = harness.start_peak(CPU)
    start = time.perf_counter()
    model = ours(kit, keep, OURS[name]) if name in OURS else theirs(kit, keep, name)
    seconds, peak = time.perf_counter() - start, harness.peak(CPU) - base
    return {"seconds": seconds, "peak_bytes": peak, "perplexity": kit.perplexities(model)}


def show(result: dict[str, Any]) -> None:
    """The table: ratios to the dense model by domain."""
    dense, rows = result["dense"], []
    domains = list(dense)
    for key, cell in sorted(result["rows"].items(), key=lambda item: (-item[1]["keep"], item[1]["place"])):
        values = [cell["perplexity"][domain] / dense[domain] for domain in domains]
        mean = sum(values) / len(values)
        # A row that was held up has no seconds.
        seconds = "" if cell["seconds"] is None else f"{cell['seconds']:.0f}"
        rows.append([key, *(f"{v:.4f}" for v in (*values, mean)), seconds, cell["peak_bytes"] >> 20])
    title = "dense: " + ", ".join(f"{domain} {value:.3f}" for domain, value in dense.items())
    columns = ["kept, method", *domains, "mean", "seconds", "peak MiB"]
    spent = "not timed" if result["seconds"] is None else f"{result['seconds']:.0f} s"
    harness.print_table(f"Perplexity / dense ({title}); statistics {spent}", columns, rows)


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """(row, keep) of everything that was asked for."""
    names = [*OPPONENTS, *OURS]
    wanted = names if arguments.only is None else [n for n in names if any(part in n for part in arguments.only)]
    for keep in arguments.keep:
        for name in wanted:
            yield name, keep


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--generic", type=float, default=0.0, help="share of generic text in the windows, as minify's")
    parser.add_argument(
        "--keep", type=float, nargs="+", default=KEEPS, help="shares of the units, 0.9 to 0.5 by default"
    )
    parser.add_argument("--only", nargs="+", help="parts of row names")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load_dense(arguments.model)
    texts = evaluation_texts(arguments, tokenizer)
    windows = calibration_windows(arguments, tokenizer, model)
    kind = "generic" if arguments.generic else "text"
    name = harness.result_name(f"quality_{kind}", arguments.label)
    # Before the sweep: rows of something else are refused at once.
    identity = measured_on(model, windows, texts)
    result = harness.resume_json(name, identity)
    work, means, seconds = collect(model, windows, arguments.cache)
    row = architecture_of(model.config)
    statistics = [work.statistics(index, gram=True) for index in range(len(means))]
    layers = look_at(model, row, statistics, means)
    kit = Kit(model, work, layers, windows, texts)
    if not result:
        dense = kit.perplexities(model)
        result = {"measured on": identity, "tokens": windows.numel(), "seconds": seconds, "dense": dense, "rows": {}}
    for method, keep in cells(arguments):
        cell = f"{100 * keep:.4g}% {method}"
        options = options_of(method, keep)
        if cell not in result["rows"] or result["rows"][cell]["options"] != options:
            about = {"keep": keep, "place": [*OPPONENTS, *OURS].index(method), "options": options}
            result["rows"][cell] = {**about, **measure_row(kit, method, keep)}
            harness.write_json(name, result)
    show(result)


if __name__ == "__main__":
    main()
