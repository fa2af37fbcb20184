"""What a run would do, from shapes alone: sizes, work, memory, and how many layers to hold at once."""

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from minisp.architecture import CausalLM, architecture_of, decoder_layers, layer_widths, unit_axes
from minisp.config import MinifyConfig
from minisp.errors import CalibrationError, ConfigError
from minisp.selection import allocate_widths, default_alignment, uniform_widths
from minisp.stream import LOGIT_BYTES

# Share of the free memory that a run may plan with; the rest is for the allocator and the other processes.
MEMORY_SHARE = 0.5
TOKENS_PER_BATCH = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Plan:
    """What `minify` would do with this model and config.

    Attributes:
        config: the options.
        model: folder, file, hub id, or class name of an in-memory model.
        model_type: transformers family.
        widths: width m of every layer before.
        kept_units: most units kept in all.
        alignment: widths are multiples of it.
        parameters, parameters_after: counts; after is an upper bound.
        parameters_per_unit: what one unit costs.
        bytes, bytes_after: weights on disk in the stored type; after is an upper bound.
        batch: calibration windows per micro-batch.
        segments: layers held together, in forward order.
        device, dtype: where and in what type it computes.
        flops: floating-point operations of the sweeps.
        memory: bytes by purpose, the estimated peak of each; the process itself not counted.
    """

    config: MinifyConfig
    model: str
    model_type: str
    widths: tuple[int, ...]
    kept_units: int
    alignment: int
    parameters: int
    parameters_after: int
    parameters_per_unit: int
    bytes: int
    bytes_after: int
    batch: int
    segments: tuple[range, ...]
    device: str
    dtype: str
    flops: float
    memory: dict[str, int]

    @property
    def num_tokens(self) -> int:
        """Calibration tokens."""
        return self.config.num_windows * self.config.window

    @property
    def scratch_bytes(self) -> int:
        """Disk that statistics take between the sweeps: a float32 Gram matrix a layer, where there is an output."""
        dense = self.config.inputs == "dense" and self.config.keep < 1
        return sum(4 * width * width for width in self.widths) if dense else 0


def make_plan(
    name: str, model: CausalLM, config: MinifyConfig, device: torch.device, dtype: torch.dtype, stored_bytes: int
) -> Plan:
    """Plan a run on a model whose weights may be on the meta device.

    Args:
        name: how to call the model.
        model: a transformers causal language model.
        config: the options.
        device, dtype: where and in what type it will compute.
        stored_bytes: size of its weights as stored.

    Raises:
        ConfigError: no width satisfies keep, alignment and bounds.
        CalibrationError: windows longer than the model's positions.
    """
    row = architecture_of(model.config)
    widths = layer_widths(model, row)
    check_window(model.config, config.window)
    alignment = config.alignment or default_alignment(min(widths))
    kept_units = _kept_units(widths, config, alignment)
    parameters = sum(p.numel() for p in model.parameters())
    layers = decoder_layers(model, row)
    per_unit = sum(layers[0].get_parameter(n).numel() for n in unit_axes(layers[0], row)) // widths[0]
    after = parameters - per_unit * (sum(widths) - kept_units)
    batch = config.batch or max(1, TOKENS_PER_BATCH.get(device.type, 8192) // config.window)
    segment, memory = _choose_segment(model, config, batch, device, dtype)
    segments = tuple(range(i, min(i + segment, len(layers))) for i in range(0, len(layers), segment))
    return Plan(
        config=config,
        model=name,
        model_type=model.config.model_type,
        widths=tuple(widths),
        kept_units=kept_units,
        alignment=alignment,
        parameters=parameters,
        parameters_after=after,
        parameters_per_unit=per_unit,
        bytes=stored_bytes,
        bytes_after=round(stored_bytes * after / parameters),
        batch=batch,
        segments=segments,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        flops=_flops(model, config, len(segments)),
        memory=memory,
    )


def compute_device(config: MinifyConfig) -> torch.device:
    """The device that the config names, or the first GPU, or the CPU.

    Raises:
        ConfigError: the name is no torch device, or that device is not there.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(
            f"Option device: expected a torch device such as cpu or cuda:0, got {config.device!r}."
        ) from None
    try:
        # The meta device takes part in everything and computes nothing.
        usable = device.type != "meta" and torch.empty(1, device=device).is_floating_point()
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f"Option device: expected a device of this machine, got {config.device!r}, but torch can compute only on "
            f"the CPU and {found} GPUs here. Pass one of these, or auto."
        )
    return device


def compute_dtype(config: MinifyConfig, device: torch.device) -> torch.dtype:
    """The type that the config names, or bfloat16 where the device computes in it, or float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def fits_in_memory(num_bytes: int) -> bool:
    """Whether so many bytes fit the share of the free host memory that a run may use."""
    return bool(num_bytes <= MEMORY_SHARE * psutil.virtual_memory().available)


def check_window(model_config: Any, window: int) -> None:
    """Raise `CalibrationError` where windows are longer than the model's positions."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise CalibrationError(
            f"Calibration window: expected at most {positions} tokens (the model's positions), got {window}. "
            "Pass a shorter window."
        )
    if window < 2:
        raise CalibrationError(f"Calibration window: expected at least 2 tokens (one to predict), got {window}.")


def _kept_units(widths: list[int], config: MinifyConfig, alignment: int) -> int:
    if config.keep < 1 and alignment >= min(widths):
        raise ConfigError(
            f"Alignment: expected less than the layer width {min(widths)}, got {alignment}. Pass a smaller alignment."
        )
    if config.widths == "uniform":
        return sum(uniform_widths(widths, config.keep, alignment=alignment))
    # Whatever the saliency will be: refused now rather than after the sweep where no widths fit the budget.
    allocate_widths(
        [torch.zeros(width) for width in widths], config.keep, alignment=alignment, min_keep=config.min_keep
    )
    return int(config.keep * sum(widths) + 1e-9)


def _choose_segment(
    model: CausalLM, config: MinifyConfig, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[int, dict[str, int]]:
    """The most layers at once that fit the memory share, and the memory by purpose with that many."""
    row = architecture_of(model.config)
    num_layers = len(decoder_layers(model, row))
    free = _free_memory(device)
    for count in range(1, num_layers + 1):
        segment = config.segment or -(-num_layers // count)
        memory = _memory(model, config, batch, segment, dtype)
        if config.segment is not None or sum(memory.values()) <= MEMORY_SHARE * free or segment == 1:
            break
    return min(segment, num_layers), memory


def _free_memory(device: torch.device) -> int:
    """Bytes that this process can still have: what is free, within the share that it was given of a GPU."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free, int(share * total) - torch.cuda.memory_reserved(device))


def _memory(model: CausalLM, config: MinifyConfig, batch: int, segment: int, dtype: torch.dtype) -> dict[str, int]:
    row = architecture_of(model.config)
    layers = decoder_layers(model, row)
    width, hidden = max(layer_widths(model, row)), model.config.hidden_size
    per_layer = sum(p.numel() for p in layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - per_layer * len(layers)
    tokens, item = config.num_windows * config.window, dtype.itemsize
    boundaries = -(-len(layers) // segment)
    # What autograd keeps per token of a layer: both norms (float32 twice and once in the compute type each), about
    # eight tensors of the hidden size around attention, and the two pre-activations of the MLP.
    kept_per_token = 2 * (8 + item) * hidden + 8 * item * hidden + 2 * item * width
    return {
        "embeddings and head": outside * item,
        "layers held": segment * per_layer * item,
        "Gram matrices": segment * width**2 * 4 if config.inputs == "dense" else width**2 * 4,
        "activations": segment * batch * config.window * kept_per_token,
        "boundary states": boundaries * tokens * hidden * item,
        "logits": LOGIT_BYTES * 2,
    }


def _flops(model: CausalLM, config: MinifyConfig, num_segments: int) -> float:
    row = architecture_of(model.config)
    layers, widths = decoder_layers(model, row), layer_widths(model, row)
    tokens = config.num_windows * config.window
    inside = sum(p.numel() for p in layers.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    recompute = 1 - 1 / num_segments
    gram = sum(m * m for m in widths)
    total = tokens * (2 * inside * (2 + recompute) + 4 * head + gram)
    if config.inputs == "pruned":
        total += tokens * 2 * inside * (1 + config.keep)
    return float(total)
