"""What is left of a model with zeros in its linear maps: `sparse_quality.py MODEL --calibration a --text b`.

Every row is a run of `minify` in memory with the same calibration windows, and is evaluated alike: perplexity over that
of the dense model, by domain. Magnitude, Wanda and SparseGPT take their statistics from the dense model, all layers at
once; as published, Wanda and SparseGPT take them from the layers below as they are already pruned. Every finished row
is in the result file at once, and a run that is repeated goes on from there.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import harness
import torch
from naive import EVALUATION
from quality import load_dense
from texts import calibration_windows, data_arguments, evaluation_texts, measured_on
from transformers import AutoTokenizer

from minisp import fast
from minisp.evaluate.perplexity import perplexity
from minisp.models.layers import fast_layers

SURGEON = {"method": "surgeon"}
ROWS: dict[str, dict[str, Any]] = {
    f"{pattern}, {label}": {"pattern": pattern, "keep": keep, **options}
    for pattern, keep in (("2:4", 0.5), ("unstructured", 0.5), ("unstructured", 0.4), ("rows-columns", 0.8))
    for label, options in {
        "magnitude": {"method": "magnitude"},
        "Wanda": {"method": "wanda"},
        "SparseGPT": {"method": "sparsegpt"},
        **{f"surgeon, {n} shot{'s' * (n > 1)}": {**SURGEON, "shots": n} for n in (1, 5, 20)},
    }.items()
    if pattern != "rows-columns" or options["method"] == "surgeon"
    for label in [f"{label}" if keep == 0.5 else f"{keep:.0%} kept, {label}"]
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--generic", type=float, default=0.25, help="share of generic text, %(default)s by default")
    parser.add_argument("--evaluate", type=int, default=EVALUATION[0], help="windows of 1024 of each domain, at most")
    parser.add_argument("--only", nargs="+", help="parts of row names; a row has to have all of one of them")
    arguments = parser.parse_args()
    tokenizer, dense = AutoTokenizer.from_pretrained(arguments.model), load_dense(arguments.model)
    texts = {k: (ids, min(n, arguments.evaluate)) for k, (ids, n) in evaluation_texts(arguments, tokenizer).items()}
    windows = calibration_windows(arguments, tokenizer, dense)
    name = harness.result_name("sparse_quality", arguments.label)
    identity = measured_on(dense, windows, texts)

    def perplexities(model: Any) -> dict[str, float]:
        with fast_layers(model):
            return {
                k: perplexity(model, ids, window=EVALUATION[1], max_windows=n).value for k, (ids, n) in texts.items()
            }

    result = harness.resume_json(name, identity)
    if not result:
        result = {"measured on": identity, "tokens": windows.numel(), "dense": perplexities(dense), "rows": {}}
    del dense
    for label, options in ROWS.items():
        if label in result["rows"] or not any(part in label for part in arguments.only or [""]):
            continue
        base, model = harness.start_peak(torch.device("cpu")), load_dense(arguments.model)
        start = time.perf_counter()
        report = fast.minify(model, calibration=windows, **options)
        seconds = time.perf_counter() - start
        zeros = sum(x.zeros for x in report.maps) / sum(x.weights for x in report.maps)
        peak = harness.peak(torch.device("cpu")) - base
        row = {"options": options, "zeros": zeros, "seconds": seconds, "peak_bytes": peak}
        result["rows"][label] = {**row, "perplexity": perplexities(model)}
        harness.write_json(name, result)
        print(
            label,
            {k: round(v / result["dense"][k], 4) for k, v in result["rows"][label]["perplexity"].items()},
            flush=True,
        )
    for part in table(result):
        print(part, end="")


def table(result: dict[str, Any]) -> Iterator[str]:
    """Ratios to the dense model by domain, and zeros among the weights."""
    dense = result["dense"]
    yield f"Calibrated on {result['tokens']:,} tokens. Perplexity of the dense model: "
    yield ", ".join(f"{domain} {value:.3f}" for domain, value in dense.items()) + ".\n\n"
    rows = (
        [label, f"{cell['zeros']:.1%}", *(f"{cell['perplexity'][k] / v:.3f}" for k, v in dense.items())]
        for label, cell in result["rows"].items()
    )
    yield harness.markdown(["pattern, method", "zeros", *dense], rows)


if __name__ == "__main__":
    main()
