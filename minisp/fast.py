"""The public face: `minify` makes a language model smaller, `plan` says what that would mean. Start reading here.

The path of one run:

    open the source ► plan ► calibrate ► saliency sweep ► select ► reconstruct ► write

A checkpoint on disk is streamed: only a segment of its layers has weights in memory. A model in memory is cut in place.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minisp.architecture import CausalLM, cut_, record_widths_
from minisp.calibration import Calibration, load_calibration, write_windows
from minisp.checkpoint import Checkpoint
from minisp.config import MinifyConfig
from minisp.errors import UnsupportedModelError
from minisp.evaluate import checkpoint_bytes
from minisp.export.folder import describe, export_checkpoint, export_module
from minisp.hub import load_tokenizer, local_folder
from minisp.planner import Plan, compute_device, compute_dtype, fits_in_memory, make_plan
from minisp.reconstruction import Reconstruction, reconstruct
from minisp.report import MinifyReport, make_report, progress_bar
from minisp.scratch import Scratch, scratch_folder
from minisp.selection import allocate_widths, select, uniform_widths
from minisp.stream import Stream, frozen, load_model, skeleton
from minisp.sweep import Progress, heal_sweep, saliency_sweep
from minisp.writer import check_output, output_folder


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
    """Cut the MLP units that matter least and refit what is left.

    Method: Taylor saliency over calibration text, one global ranking, ridge reconstruction (Khasia, 2026, "Model
    Minification: A Taylor-Ridge Framework for Structured Compression").

    Args:
        model: a Hugging Face folder, a hub id, a GGUF file, or a transformers model in memory (cut in place).
        keep: fraction of MLP units kept, in (0, 1].
        out: folder to write, which must be new or empty. Without it the result stays in memory (`report.model`).
        calibration: text to calibrate on: a file (.txt, .jsonl), documents (iterable of strings), tokens
            (integer tensor (N, L)), "hf:NAME", or a weighted mixture {source: weight}. None mixes text that the model
            writes itself with Python's documentation.
        tokenizer: for a model in memory and text to calibrate on; a checkpoint brings its own.
        progress: called with (phase, done, total); None draws bars where standard error is a terminal.
        **options: see `MinifyConfig`.

    Returns:
        What was done: see `MinifyReport`.

    Raises:
        MinispError: one of its subclasses, see `minisp.errors`; nothing is then left at `out`.
    """
    if isinstance(calibration, Tensor) and calibration.dim() == 2:
        # Ready-made windows bring their own number and length.
        options = {"num_windows": max(1, calibration.shape[0]), "window": max(1, calibration.shape[1]), **options}
    config = MinifyConfig.from_options(keep=keep, **options)
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        progress = progress or stack.enter_context(progress_bar())
        checkpoint = None if isinstance(model, nn.Module) else Checkpoint.open(local_folder(model))
        made_plan = _plan(model, checkpoint, config)
        target = check_output(out, made_plan.bytes_after + made_plan.scratch_bytes) if out is not None else None
        with _timed(seconds, "loading"):
            stream = _open(model, checkpoint, config, in_memory=target is None)
            stack.enter_context(frozen(stream.model))
            if tokenizer is None and checkpoint is not None:
                tokenizer = load_tokenizer(checkpoint.folder)
        with _timed(seconds, "calibration text"):
            text = _calibrate(stream, calibration, tokenizer, config, progress)
        batches = list(text.windows.split(made_plan.batch))
        scratch = Scratch(stack.enter_context(scratch_folder(target)))
        with _timed(seconds, "saliency sweep"):
            scores = _collect_scores(stream, batches, made_plan, scratch, progress)
            kept = _select(scores, made_plan)
        with _timed(seconds, "reconstruction and writing"):
            if config.inputs == "dense":
                results = _reconstruct_dense(stream, kept, scratch, config, progress)
            else:
                results = heal_sweep(stream, batches, kept, config, progress)
            folder = stack.enter_context(output_folder(target)) if target is not None else None
            layers = _finish(stream, kept, results, folder)
        report = make_report(stream, made_plan, layers, text, seconds, target)
        if folder is not None:
            report = replace(report, bytes=checkpoint_bytes(folder))
            describe(folder, report, checkpoint, tokenizer)
    return report


def plan(model: str | Path | nn.Module, *, keep: float = 0.8, **options: Any) -> Plan:
    """What `minify` would do with the same arguments, from shapes alone: no weight is read.

    Raises:
        MinispError: the run would be refused for its arguments or its checkpoint.
    """
    config = MinifyConfig.from_options(keep=keep, **options)
    return _plan(model, None if isinstance(model, nn.Module) else Checkpoint.open(local_folder(model)), config)


def _plan(model: Any, checkpoint: Checkpoint | None, config: MinifyConfig) -> Plan:
    if checkpoint is not None:
        device = compute_device(config)
        # A hub id names its model; of a folder or file, the last part of the path does.
        name = Path(model).expanduser().absolute().name if Path(model).expanduser().exists() else str(model)
        return make_plan(
            name, skeleton(checkpoint), config, device, compute_dtype(config, device), checkpoint.num_bytes
        )
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedModelError(
            f"Model: expected a transformers causal language model, got {type(model).__name__} without a language "
            "head. Load it with AutoModelForCausalLM."
        )
    parameter = next(model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    name = Path(getattr(model.config, "name_or_path", "")).name or type(model).__name__
    return make_plan(name, model, config, parameter.device, parameter.dtype, size)


def _open(model: Any, checkpoint: Checkpoint | None, config: MinifyConfig, *, in_memory: bool) -> Stream:
    if checkpoint is None:
        return Stream.from_module(model)
    device = compute_device(config)
    dtype = compute_dtype(config, device)
    if in_memory:
        return Stream.from_module(load_model(checkpoint, device, dtype))
    return Stream.from_checkpoint(checkpoint, device, dtype)


def _calibrate(stream: Stream, source: Any, tokenizer: Any, config: MinifyConfig, progress: Progress) -> Calibration:
    """The calibration windows; where no source is given, the model writes some itself, if it fits in memory whole."""
    fits = stream.checkpoint is None or fits_in_memory(stream.checkpoint.num_bytes)
    if source is None:
        own = "text that the model writes itself and " if fits else ""
        warnings.warn(
            f"No calibration text was given: calibrating on {own}the documentation that comes with Python. Text like "
            "what the model will see, from several domains, gives a better result.",
            stacklevel=3,
        )

    def write(num_windows: int, window: int) -> Tensor:
        model: CausalLM = stream.model
        if stream.checkpoint is not None:
            model = load_model(stream.checkpoint, stream.device, stream.dtype)
        windows: Tensor = write_windows(
            model,
            tokenizer,
            num_windows=num_windows,
            window=window,
            seed=config.seed,
            on_progress=lambda done, total: progress("writing calibration text", done, total),
        )
        return windows

    return load_calibration(
        source,
        tokenizer,
        num_windows=config.num_windows,
        window=config.window,
        vocab_size=stream.model.config.vocab_size,
        max_positions=getattr(stream.model.config, "max_position_embeddings", None),
        writer=write if fits else None,
    )


def _collect_scores(
    stream: Stream, batches: Sequence[Tensor], plan: Plan, scratch: Scratch, progress: Progress
) -> list[Tensor]:
    """Run the saliency sweep; statistics go to the scratch folder, the scores (m,) per layer come back."""
    scores: dict[int, Tensor] = {}
    config = plan.config
    gram = config.inputs == "dense" and config.keep < 1
    for layer, statistics in saliency_sweep(stream, batches, plan.segments, gram=gram, progress=progress):
        scores[layer] = statistics.score(config.saliency)
        scratch.put(layer, statistics)
    return [scores[layer] for layer in sorted(scores)]


def _select(scores: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The kept units (n,) of every layer."""
    config = plan.config
    if config.widths == "uniform":
        widths = uniform_widths(plan.widths, config.keep, alignment=plan.alignment)
    else:
        widths = allocate_widths(scores, config.keep, alignment=plan.alignment, min_keep=config.min_keep)
    return select(scores, widths)


def _reconstruct_dense(
    stream: Stream, kept: Sequence[Tensor], scratch: Scratch, config: MinifyConfig, progress: Progress
) -> Iterator[Reconstruction]:
    """Every layer's reconstruction from the Gram matrices of the dense model, first layer first."""
    for layer, indices in enumerate(kept):
        statistics = scratch.take(layer, stream.device)
        result = reconstruct(layer, statistics, indices, stream.down_weight(layer), config)
        if stream.checkpoint is None and result.down is not None:
            cut_(stream.layers[layer], stream.row, indices.to(stream.device), result.down)
        yield result
        progress("reconstruction", layer + 1, len(kept))


def _finish(
    stream: Stream, kept: Sequence[Tensor], results: Iterator[Reconstruction], folder: Path | None
) -> list[Reconstruction]:
    """Draw the results through, into the folder where there is one; a layer's weights are forgotten once written."""
    done: list[Reconstruction] = []

    def remembered() -> Iterator[Reconstruction]:
        for result in results:
            done.append(replace(result, down=None))
            yield result

    if stream.checkpoint is not None:
        assert folder is not None
        export_checkpoint(folder, stream.checkpoint, stream.model, kept, remembered())
        return done
    for _ in remembered():
        pass
    record_widths_(stream.model, stream.row, [len(indices) for indices in kept])
    if folder is not None:
        export_module(folder, stream.model, [len(indices) for indices in kept])
    return done


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = time.perf_counter() - start
