"""The public face: `minify` makes a language model smaller, `plan` says what that would mean. Start reading here.

The path of one run:

    open the source ► plan ► calibrate ► saliency sweep ► decide ► refit ► write

A checkpoint on disk is streamed: only a segment of its layers has weights in memory, and what waits is in a scratch
folder, from which a run that was stopped goes on. A model in memory is cut in place.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minisp.config import MinifyConfig, split_options
from minisp.device import CPU, compute_device, compute_dtype, computing_on, free_promptly
from minisp.errors import ConfigError, UnsupportedModelError
from minisp.evaluate.perplexity import checkpoint_bytes
from minisp.export.folder import describe, write
from minisp.models.objective import Objective
from minisp.models.skeleton import frozen, load_model, skeleton
from minisp.models.stream import Stream
from minisp.phases.batches import make_batches
from minisp.phases.boundaries import Sweep
from minisp.phases.calibrate import calibrate
from minisp.phases.decide import decide
from minisp.phases.refit import refit_structures
from minisp.phases.run import Phase, Progress, Run
from minisp.phases.saliency import saliency_sweep
from minisp.phases.shots import sparse_edits, sparsify
from minisp.plan.plan import Plan
from minisp.plan.planner import Source, make_plan
from minisp.ranks import Ranks, joined
from minisp.report.meter import Meter
from minisp.report.progress import progress_bar
from minisp.report.report import MinifyReport, make_report
from minisp.resources import Resources
from minisp.store.checkpoint import Checkpoint
from minisp.store.claim import open_scratch
from minisp.store.hub import load_tokenizer, local_folder
from minisp.store.tiers import Room, Tiers
from minisp.store.writer import check_output, output_folder
from minisp.text.calibration import Calibration

__all__ = ["minify", "plan", "MinifyReport", "Plan"]


def minify(
    model: str | Path | nn.Module,
    *,
    keep: float = 0.8,
    out: str | Path | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> MinifyReport:
    """Cut the units that matter least and refit what is left.

    Method: Taylor saliency over calibration text, one global ranking, ridge reconstruction (Khasia, 2026, "Model
    Minification: A Taylor-Ridge Framework for Structured Compression").

    Args:
        model: a Hugging Face folder, a hub id, a GGUF file, or a transformers model in memory (cut in place).
        keep: share of the parameters that may be cut, and stays: of the MLP units, by default; in (0, 1].
        out: folder to write, which must be new or empty. Without it the result stays in memory (`report.model`).
        calibration: text to calibrate on: a file (.txt, .jsonl), documents (iterable of strings), tokens
            (integer tensor (N, L)), "hf:NAME", or a weighted mixture {source: weight}. A share of generic text joins
            it, see `MinifyConfig.generic`, but not ready-made windows (N, L). None is generic text alone; with
            `resume` or `reuse`, it is the text of the earlier run.
        tokenizer: for a model in memory and text to calibrate on; a checkpoint brings its own.
        progress: called with (phase, done, total); None draws bars where standard error is a terminal.
        **options: see `MinifyConfig` for the method and `Resources` for limits, scratch folder, resume and reuse.

    Returns:
        What was done: see `MinifyReport`.

    Raises:
        MinispError: one of its subclasses, see `minisp.errors`; nothing is then left at `out`, and what was finished
            of a checkpoint's run waits in the scratch folder for `resume`. A model in memory may then be cut in part.
    """
    options = _for_windows(calibration, options)
    config, resources = split_options(keep=keep, **options)
    meter = Meter()
    with ExitStack() as stack:
        checkpoint = None if isinstance(model, nn.Module) else Checkpoint.open(local_folder(model))
        ranks = stack.enter_context(joined(CPU if checkpoint is None else compute_device(config)))
        made_plan = _plan(model, checkpoint, config, resources, writes=out is not None, ranks=ranks)
        stack.enter_context(computing_on(torch.device(made_plan.device), resources))
        target = check_output(out, made_plan.bytes_after) if out is not None else None
        identity = _identity(checkpoint, made_plan, ranks) if checkpoint is not None else None
        shared, own = stack.enter_context(open_scratch(target, resources, identity, ranks, made_plan.disk_room))
        shared.behind(made_plan.behind)
        tiers = Tiers(own, torch.device(made_plan.device), Room())
        run = Run(shared, tiers, ranks, progress or stack.enter_context(progress_bar(quiet=not ranks.first)))
        with meter.phase("loading"):
            stream = _open(model, checkpoint, made_plan)
            stack.enter_context(frozen(stream.model))
            if tokenizer is None and checkpoint is not None:
                tokenizer = load_tokenizer(checkpoint.folder)
        text = _run_phases(stream, calibration, tokenizer, made_plan, run, meter)
        with meter.phase("writing"):
            folder = stack.enter_context(output_folder(target)) if target is not None and ranks.first else None
            cuts, shots = made_plan.config.cuts, made_plan.config.shots
            results = [run.result(structure) for structure in stream.structures] if cuts else []
            changes_in = partial(sparse_edits, run, made_plan.maps, shots)
            digests, needs_code = write(stream, results, run.weight, changes_in, folder)
        report = make_report(stream, made_plan, run, text, meter, target, needs_code=needs_code)
        if folder is not None:
            report = replace(report, bytes=checkpoint_bytes(folder))
            describe(folder, report, checkpoint, tokenizer, digests)
    return report


def plan(model: str | Path | nn.Module, *, keep: float = 0.8, **options: Any) -> Plan:
    """What `minify` would do with the same options and an output folder, from shapes alone: no weight is read.

    Raises:
        MinispError: the run would be refused for its arguments, its checkpoint, or its memory limit.
    """
    config, resources = split_options(keep=keep, **options)
    checkpoint = None if isinstance(model, nn.Module) else Checkpoint.open(local_folder(model))
    return _plan(model, checkpoint, config, resources, writes=True, ranks=Ranks())


def _for_windows(calibration: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the number and length of ready-made windows (N, L), which are taken as they are."""
    if not isinstance(calibration, Tensor) or calibration.dim() != 2:
        return options
    count, length = (max(1, size) for size in calibration.shape)
    options = {"num_windows": count, "window": length, "generic": 0.0, **options}
    if options["window"] != length:
        raise ConfigError(
            f"Option window: expected {length}, the length of the windows that were passed, got "
            f"{options['window']}. Leave it out, or pass the tokens as one flat tensor."
        )
    return options


def _run_phases(stream: Stream, calibration: Any, tokenizer: Any, plan: Plan, run: Run, meter: Meter) -> Calibration:
    """Leave a result of every structure, and say what was calibrated on; `meter` measures each phase."""
    config, tiers = plan.config, run.own
    with meter.phase("calibration text"):
        text = calibrate(stream, calibration, tokenizer, config, run, write_room=plan.write_room)
    batches = make_batches(text.windows, config, plan.batch, run.ranks)
    objective = Objective(config.labels, config.seed)
    if not config.cuts:
        with meter.phase("sweeps and updates"):
            tiers.room = plan.rooms.get(Phase.SWEEP, Room())
            # Gradients are formed for scored windows alone.
            scored = [config.sees_gradients] * len(batches.ids)
            sweep = Sweep(stream, replace(batches, scored=scored), run, objective, unscored=True)
            sparsify(sweep, plan.segments, plan.maps, config)
            stream.release()
        return text
    with meter.phase("saliency sweep"):
        tiers.room = plan.rooms.get(Phase.SWEEP, Room())
        dense = plan.layout.dense is not None and tiers.free_bytes() >= 4 * plan.dense_bytes
        gram = config.collects_gram
        gradients = config.method == "surgeon"
        saliency_sweep(
            stream, batches, plan.segments, run, objective=objective, gram=gram, gradients=gradients, dense=dense
        )
        stream.release(plan.layout.layer_slots)
    with meter.phase("decision"):
        tiers.room = plan.rooms.get(Phase.TRIALS, Room())
        kept = decide(stream, text.windows, config, run)
        stream.release()
    with meter.phase("refit"):
        tiers.room = plan.rooms.get(Phase.REFIT_SWEEP, Room())
        refit_structures(stream, batches.refit, kept, config, run)
        stream.release()
    return text


def _plan(
    model: Any, checkpoint: Checkpoint | None, config: MinifyConfig, resources: Resources, *, writes: bool, ranks: Ranks
) -> Plan:
    if ranks.size > 1 and (checkpoint is None or not writes or config.num_windows < ranks.size):
        raise ConfigError(
            f"Run of {ranks.size} processes: expected a checkpoint on disk, an output folder, and a window for each "
            f"process, got {'a model in memory' if checkpoint is None else 'a checkpoint'}, "
            f"{'an' if writes else 'no'} output folder and {config.num_windows} windows. Give it these, or run one "
            "process."
        )
    if checkpoint is not None:
        device = compute_device(config)
        # A hub id names its model; of a folder or file, the last part of the path does.
        path = Path(model).expanduser()
        name = path.absolute().name if path.exists() else str(model)
        source = Source(
            name, skeleton(checkpoint), device, compute_dtype(config, device), checkpoint, streams=writes, writes=writes
        )
        own = make_plan(source, config, resources, ranks=ranks.size)
        # Processes that held other segments would not meet; each may have found other memory free.
        return replace(ranks.of_first(own), device=own.device)
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedModelError(
            f"Model: expected a transformers causal language model, got {type(model).__name__} without a language "
            "head. Load it with AutoModelForCausalLM."
        )
    parameter = next(model.parameters())
    name = Path(getattr(model.config, "name_or_path", "")).name or type(model).__name__
    source = Source(name, model, parameter.device, parameter.dtype, None, streams=False, writes=writes)
    return make_plan(source, config, resources)


def _identity(checkpoint: Checkpoint, plan: Plan, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """What decides this run's statistics and its results, and how both are rounded."""
    identity = plan.config.identity()
    source = {"source": checkpoint.fingerprint(), "files changed at (ns)": checkpoint.modified()}
    compute = {"device": torch.device(plan.device).type, "dtype": plan.dtype, "batch": plan.batch}
    return {
        "statistics": {**identity["statistics"], **source, **compute},
        "results": identity["results"],
        "rounding": {"head_on_disk": plan.layout.stream_vocabulary, "processes": ranks.size},
    }


def _open(model: Any, checkpoint: Checkpoint | None, plan: Plan) -> Stream:
    if checkpoint is None:
        return Stream.from_module(model, plan.config.structures)
    device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
    if not plan.streams:
        return Stream.from_module(load_model(checkpoint, device, dtype), plan.config.structures)
    layout = plan.layout
    if len(plan.segments) > 1:
        free_promptly()
    return Stream.from_checkpoint(
        checkpoint,
        device,
        dtype,
        num_slots=layout.num_slots,
        stream_vocabulary=layout.stream_vocabulary,
        structures=plan.config.structures,
    )
