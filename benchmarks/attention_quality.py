"""MLPs alone, with key/value groups, with query heads, and opponents that cut both, at equal numbers of parameters:
`python benchmarks/attention_quality.py MODEL --calibration a --text b --neutral DATA --windows 32 --generic 0.25`.

A row removes a share of the parameters outside of the embeddings, from whatever structures it may cut. All rows share
statistics (kept under --cache) and are evaluated alike: perplexity over that of the dense model, windows of 1024
tokens, on the text given, on source code, and on the neutral texts `german` and `licences`. Every finished row is in
the result file at once, and a run that is repeated goes on from there.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attention_opponents
import harness
import torch
from attention_opponents import Part
from opponents import cut_model_
from quality import Kit, load_dense, mean_inputs, ours
from texts import calibration_windows, data_arguments, evaluation_texts, measured_on
from torch import Tensor
from transformers import AutoTokenizer

from minisp.config import MinifyConfig
from minisp.methods.statistics import Statistics
from minisp.models.objective import Objective
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.phases.batches import Batches
from minisp.phases.run import Run
from minisp.phases.saliency import saliency_sweep

REMOVED = (0.1, 0.2, 0.3)
# Domain → windows of 1024 that are evaluated.
DOMAINS = {"text": 8, "german": 4, "code": 4, "licences": 4}
GROUPS = ("mlp", "attention")
OURS: dict[str, tuple[str, ...]] = {
    "minisp: MLPs": ("mlp",),
    "minisp: MLPs and groups": GROUPS,
    "minisp: MLPs and queries": ("mlp", "queries"),
}


def collect(model: Any, windows: Tensor, cache: Path) -> tuple[Run, list[Tensor]]:
    """Records of the statistics of MLPs, groups and query heads, and the mean inputs (u·c,) of MLPs and groups."""
    run, config = Run.in_memory(), MinifyConfig()
    name = cache / f"attention_{harness.digest([*model.parameters(), windows])}.pt"
    streams = [Stream.from_module(model, GROUPS), Stream.from_module(model, ("queries",))]
    structures = [structure for stream in streams for structure in stream.structures]
    if not name.exists():
        with frozen(model):
            for stream in streams:
                segments, batches = [range(len(stream.layers))], Batches.scoring(windows.split(1))
                saliency_sweep(
                    stream, batches, segments, run, objective=Objective(config.labels, config.seed), gram=True
                )
            means = mean_inputs(streams[0], windows)
        found = [run.statistics(structure, gram=True) for structure in structures]
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"sums": [(x.num_tokens, x.saliency, x.gram, x.num_scored) for x in found], "means": means}, name)
        return run, means
    saved = torch.load(name, weights_only=True)
    for structure, sums in zip(structures, saved["sums"], strict=True):
        run.keep_statistics(structure, Statistics(*sums))
    return run, saved["means"]


def look_at(model: Any, run: Run, means: list[Tensor]) -> list[Part]:
    """MLPs and groups of a dense model, for the opponents."""
    stream = Stream.from_module(model, GROUPS)
    return [
        Part(structure, stream.weight(structure).float(), run.statistics(structure, gram=True), mean)
        for structure, mean in zip(stream.structures, means, strict=True)
    ]


def keep_of(model: Any, names: tuple[str, ...], removed: float) -> float:
    """The share of these structures' parameters that stays where `removed` of all outside of the embeddings go."""
    total = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    if not model.config.tie_word_embeddings:
        total -= model.get_output_embeddings().weight.numel()
    cuttable = sum(x.num_units * x.parameters for x in Stream.from_module(model, names).structures)
    return 1 - removed * total / cuttable


def measure_row(kit: Kit, parts: list[Part], name: str, removed: float) -> dict[str, Any]:
    """Parameters that are left, units kept of each kind, and perplexities."""
    keep = keep_of(kit.model, OURS.get(name, GROUPS), removed)
    if name in OURS:
        model = ours(kit, keep, {"structures": OURS[name]})
    else:
        model = kit.fresh()
        cut_model_(model, attention_opponents.OPPONENTS[name](parts, keep), GROUPS)
    left = Stream.from_module(model, GROUPS).structures
    heads = [structure.heads(structure.num_units) for structure in left if structure.head_dim]
    kept = {
        "MLP units": sum(structure.num_units for structure in left if not structure.head_dim),
        "query heads": sum(queries for queries, _ in heads),
        "key heads": sum(keys for _, keys in heads),
    }
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "kept": kept, "perplexity": kit.perplexities(model)}


def cells(result: dict[str, Any]) -> Iterator[list[object]]:
    """The rows of the table: ratios to the dense model by domain, and what is left."""
    for key, row in result["rows"].items():
        values = (row["perplexity"][domain] / dense for domain, dense in result["dense"].items())
        yield [key, *(f"{value:.3f}" for value in values), row["parameters"], *row["kept"].values()]


def columns(result: dict[str, Any]) -> list[str]:
    """The heads of the table."""
    return ["removed, method", *result["dense"], "parameters", "MLP units", "query heads", "key heads"]


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    windows = ", ".join(f"{domain} {count}" for domain, count in DOMAINS.items())
    head = f"Calibrated on {result['tokens']:,} tokens; windows of 1024 evaluated: {windows}. Share of the parameters "
    return f"{head}outside of the embeddings that is removed:\n\n{harness.markdown(columns(result), cells(result))}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--generic", type=float, default=0.25, help="share of generic text in the windows, as minify's")
    parser.add_argument("--removed", type=float, nargs="+", default=REMOVED, help="shares of the parameters that go")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load_dense(arguments.model)
    given = evaluation_texts(arguments, tokenizer)
    texts = {domain: (given[domain][0], count) for domain, count in DOMAINS.items()}
    windows = calibration_windows(arguments, tokenizer, model)
    name = harness.result_name("attention_quality", arguments.label)
    identity = measured_on(model, windows, texts)
    result = harness.resume_json(name, identity)
    run, means = collect(model, windows, arguments.cache)
    kit, parts = Kit(model, run, [], windows, texts), look_at(model, run, means)
    if not result:
        result = {"measured on": identity, "tokens": windows.numel(), "dense": kit.perplexities(model), "rows": {}}
    for removed in arguments.removed:
        for method in (*OURS, *attention_opponents.OPPONENTS):
            cell = f"{100 * removed:.4g}% {method}"
            if cell not in result["rows"]:
                place = [*OURS, *attention_opponents.OPPONENTS].index(method)
                result["rows"][cell] = {"removed": removed, "place": place, **measure_row(kit, parts, method, removed)}
                harness.write_json(name, result)
    harness.print_table("Perplexity / dense", columns(result), cells(result))


if __name__ == "__main__":
    main()
