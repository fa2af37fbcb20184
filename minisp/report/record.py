"""What a run took, beside its result: `minisp_run.json` in the folder.

It stands apart from the manifest and its checksums: two runs with one seed write the same bytes, but never take the
same time.
"""

import platform

import torch
import transformers

from minisp.phases.run import Phase
from minisp.plan.plan import Plan, expected_seconds
from minisp.report.report import MinifyReport
from minisp.store.writer import output_file, write_json

RUN_NAME = "minisp_run.json"
# What is measured as one, and the phases of the plan inside it.
PARTS: dict[str, tuple[Phase, ...]] = {
    "loading": (),
    "calibration text": (Phase.TEXT,),
    "saliency sweep": (Phase.SWEEP, Phase.HEAD),
    "decision": (Phase.DECISION, Phase.TRIALS, Phase.TRIAL_OUTPUTS),
    "refit": (Phase.REFIT, Phase.REFIT_SWEEP),
    "sweeps and updates": (Phase.SWEEP, Phase.HEAD, Phase.UPDATE),
    "writing": (Phase.WRITING,),
}
# Shorter runs are over before the rates are measured that an expected time follows from.
LONG_SECONDS = 5.0


def record_run(report: MinifyReport) -> None:
    """Write the record of a run into its result's folder.

    Raises:
        OutputError: it cannot be written.
    """
    assert report.out is not None
    plan = report.plan
    expected = expected_seconds(plan) if sum(report.seconds.values()) > LONG_SECONDS else {}
    facts = {
        "device": plan.device,
        "dtype": plan.dtype,
        "batch": plan.batch,
        "segments": len(plan.segments),
        "implementations": plan.implementations,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        },
        "phases": [
            {
                "name": name,
                "seconds": seconds,
                "expected_seconds": sum(expected.get(part, 0.0) for part in PARTS[name]) or None,
                "memory": report.memory[name],
                "planned_memory": _planned(plan, PARTS[name]),
            }
            for name, seconds in report.seconds.items()
        ],
    }
    with output_file(report.out / RUN_NAME) as path:
        write_json(path, facts)


def _planned(plan: Plan, parts: tuple[Phase, ...]) -> int | None:
    """Bytes that the plan has for the phases inside a part: of the whole process where a CPU computes."""
    peaks = plan.layout.peaks
    sizes = [sum(peaks[part].values()) for part in parts if part in peaks]
    return max(sizes) + (plan.base_memory if plan.device == "cpu" else 0) if sizes else None
