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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from naive import EVALUATION
from opponents import OPPONENTS, Layer, cut_model_, look_at
from texts import calibration_windows, data_arguments, evaluation_texts, measured_on
from torch import Tensor
from transformers import AutoTokenizer

from minisp.config import MinifyConfig
from minisp.device import compute_dtype
from minisp.evaluate.perplexity import perplexity
from minisp.methods.statistics import Statistics
from minisp.models.layers import fast_layers
from minisp.models.objective import Objective
from minisp.models.skeleton import frozen, load_model
from minisp.models.stream import Stream
from minisp.phases.batches import Batches, refit_windows
from minisp.phases.decide import decide
from minisp.phases.refit import refit_structures
from minisp.phases.run import Run
from minisp.phases.saliency import saliency_sweep
from minisp.store.checkpoint import Checkpoint
from minisp.store.names import Record

CPU = torch.device("cpu")
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)

OURS: dict[str, dict[str, Any]] = {
    "minisp: score only": {"reconstruct": False, "correct_drift": False, "allocation": "score"},
    "minisp: + refit": {"correct_drift": False, "allocation": "score"},
    "minisp: + correction": {"allocation": "score"},
    "minisp: + trial cuts": {"allocation": "measured"},
}


@dataclass(frozen=True)
class Kit:
    """What all rows share: the dense model, its records, its layers for the opponents, texts, windows."""

    model: Any
    run: Run
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


def collect(model: Any, windows: Tensor, cache: Path) -> tuple[Run, list[Tensor], float]:
    """Records of every structure's statistics, the mean activations (m,), and the seconds that they took."""
    run, stream = Run.in_memory(), Stream.from_module(model)
    name = cache / f"{harness.digest([*model.parameters(), windows])}.pt"
    if name.exists():
        saved = torch.load(name, weights_only=True)
        for structure, (tokens, saliency, gram) in zip(stream.structures, saved["layers"], strict=True):
            run.keep_statistics(structure, Statistics(tokens, saliency, gram, tokens))
        return run, saved["means"], saved["seconds"]
    start = time.perf_counter()
    with frozen(model):
        segments = [range(len(stream.layers))]
        saliency_sweep(stream, Batches.scoring(windows.split(1)), segments, run, gram=True)
    seconds = time.perf_counter() - start
    # The means, which FLAP alone needs, and its time has no share in.
    means = mean_inputs(stream, windows)
    found = [run.statistics(structure, gram=True) for structure in stream.structures]
    layers = [(x.num_tokens, x.saliency, x.gram) for x in found]
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({"layers": layers, "means": means, "seconds": seconds}, name)
    return run, means, seconds


def with_own_labels(run: Run, model: Any, windows: Tensor, cache: Path) -> tuple[Run, float]:
    """The records with the saliency that minisp's default labels give, and the seconds that it took."""
    config, stream, own = MinifyConfig(), Stream.from_module(model), Run.in_memory()
    name = cache / f"{harness.digest([*model.parameters(), windows])}_{config.labels}.pt"
    if not name.exists():
        start = time.perf_counter()
        with frozen(model):
            segments, objective = [range(len(stream.layers))], Objective(config.labels, config.seed)
            batches = Batches.scoring(windows.split(1))
            saliency_sweep(stream, batches, segments, own, objective=objective, gram=False)
        sums = [own.statistics(structure, gram=False).saliency for structure in stream.structures]
        torch.save({"saliency": sums, "seconds": time.perf_counter() - start}, name)
    saved = torch.load(name, weights_only=True)
    for structure, saliency in zip(stream.structures, saved["saliency"], strict=True):
        found = run.statistics(structure, gram=True)
        own.keep_statistics(structure, replace(found, saliency=saliency))
    return own, saved["seconds"]


@torch.no_grad()
def mean_inputs(stream: Stream, windows: Tensor) -> list[Tensor]:
    """The mean input (u·c,) of every structure's consumer."""
    model = stream.model
    downs = [stream.layers[x.layer].get_submodule(x.consumer) for x in stream.structures]
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
    config, model = MinifyConfig(keep=keep, **options), kit.fresh()
    stream = Stream.from_module(model, config.structures)
    for structure in stream.structures:
        kit.run.shared.drop(Record.RESULT.of(structure.layer, structure.name))
    batches = kit.windows[refit_windows(*kit.windows.shape, config)].split(1)
    with frozen(model):
        refit_structures(stream, batches, decide(stream, kit.windows, config, kit.run), config, kit.run)
    return model


def theirs(kit: Kit, keep: float, name: str) -> Any:
    """A copy of the model after an opponent."""
    model = kit.fresh()
    cut_model_(model, OPPONENTS[name](kit.layers, keep))
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
    run, means, seconds = collect(model, windows, arguments.cache)
    layers = look_at(model, run, means)
    own, _ = with_own_labels(run, model, windows, arguments.cache)
    kit = Kit(model, own, layers, windows, texts)
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
