"""Every Triton kernel as its launcher compiles it, in every form, and what is asked of the machine code of each.

`compiled.py` compiles this list for GPUs that are not there, and `test_compiles.py` lets nothing through that would be
slow or refused on a machine that nobody tried.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from minisp.kernels import cross, cross_entropy, gram, gram_tma, norm, rotary, saliency

# The GPU generations, by compute capability.
CAPABILITIES = (80, 89, 90, 100, 120)
COPY_ENGINE = "cp.async.bulk.tensor"
# Loads and stores of 16 bytes a thread or more, in PTX.
WIDE = ("ld.global.v4", "st.global.v4")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS: dict[str, dict[str, int]] = {
    "aligned": {"stride_x_unit": 1, "stride_y_unit": 1},
    "unaligned": {"stride_x_unit": 1, "stride_y_unit": 1},
    "strided": {},
}
# Integers that Triton makes constants where they are 1, and whose being 1 is no matter of the layout.
ONES = {"num_tokens", "num_rows", "num_cols", "num_partials", "width", "vocabulary"}
ONES |= {"stride_token", "stride_out", "stride_x_token", "stride_y_token"}


@dataclass(frozen=True)
class Shipped:
    """One kernel as a launcher would compile it.

    Attributes:
        name: kernel and variant.
        kernel: the jitted function.
        signature: type of every argument that is no constant.
        constants: compile-time constants, launch options left out.
        options: num_warps and num_stages.
        aligned: arguments that are multiples of 16, as the launcher finds out from their values.
        capabilities: the GPUs it is launched on.
        needs: PTX instructions that must appear, {matrix} standing for the matrix unit's.
        forbids: the same for what must not appear.
        at_once: programs that a multiprocessor of sm_90 must be able to run at once, by their registers.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...]
    capabilities: tuple[int, ...] = CAPABILITIES
    needs: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    at_once: int = 1


def products() -> Iterator[Shipped]:
    """The kernel behind the Gram update and the cross product, in every type, precision, layout and form."""
    integers = ("num_tokens", "tokens_per_split", "num_rows", "num_cols")
    integers += ("stride_x_token", "stride_x_unit", "stride_y_token", "stride_y_unit")
    for lower in (True, False):
        for dtype in TYPES:
            for precision in cross.PRECISIONS if dtype == "fp32" else ("ieee",):
                for layout, strides in LAYOUTS.items():
                    constants: dict[str, Any] = cross.config(
                        TYPES[dtype], aligned=layout == "aligned", input_precision=precision
                    )
                    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
                    constants |= {"LOWER": lower, "PRECISION": precision, **strides}
                    # IEEE float32 products do not exist on the matrix units: finding one would mean TF32.
                    on_matrix_units = dtype != "fp32" or precision != "ieee"
                    words = ["gram" if lower else "cross", dtype, *([precision] if dtype == "fp32" else [])]
                    yield Shipped(
                        name=" ".join([*words, layout]),
                        kernel=cross.cross_update_kernel,
                        signature={"p_out": "*fp32", "p_x": f"*{dtype}", "p_y": f"*{dtype}"}
                        | {"p_partial": "*fp32"}
                        | {name: "i32" for name in integers if name not in strides},
                        constants=constants,
                        options=options,
                        aligned=()
                        if layout != "aligned"
                        else ("p_out", "p_x", "p_y", "p_partial", "num_rows", "num_cols", *integers[4:]),
                        needs=("{matrix}",) * on_matrix_units + WIDE * (layout == "aligned"),
                        forbids=() if on_matrix_units else ("mma.",),
                        at_once=cross.PROGRAMS_PER_MULTIPROCESSOR,
                    )


def around_products() -> Iterator[Shipped]:
    """What goes with the products: partial sums, the mirror step, and the Gram update by descriptors."""
    pointers, sizes = {"p_out": "*fp32", "p_partial": "*fp32"}, ("num_partials", "num_rows", "num_cols")
    for lower in (True, False):
        for tile in sorted({cross.config(dtype)["TILE"] for dtype in TYPES.values()}):
            name = f"partial sums of {'gram' if lower else 'cross'}, tile {tile}"
            constants = {"LOWER": lower, "TILE": tile}
            signature = pointers | dict.fromkeys(sizes, "i32")
            aligned = (*pointers, "num_rows", "num_cols")
            options = {"num_warps": 8}
            yield Shipped(name, cross.add_partials_kernel, signature, constants, options, aligned, needs=WIDE)
            yield Shipped(f"{name}, unaligned", cross.add_partials_kernel, signature, constants, options, ())
    signature, options = {"p_gram": "*fp32", "width": "i32"}, {"num_warps": 4}
    yield Shipped("mirror", gram.mirror_kernel, signature, {"TILE": 64}, options, ("p_gram", "width"), needs=WIDE)
    yield Shipped("mirror unaligned", gram.mirror_kernel, signature, {"TILE": 64}, options, ("p_gram",))
    rows, tokens = gram_tma.TILE["TILE_R"], gram_tma.TILE["TILE_T"]
    for dtype in ("bf16", "fp16"):
        signature = {
            "d_row": f"tensordesc<{dtype}[{tokens}, {rows}]>",
            "d_col": f"tensordesc<{dtype}[{tokens}, {2 * rows}]>",
            "d_gram": f"tensordesc<fp32[{rows}, {rows // 2}]>",
            "num_tokens": "i32",
            "num_rows": "i32",
        }
        yield Shipped(
            f"gram {dtype} by descriptors", gram_tma.gram_update_tma_kernel, signature, dict(gram_tma.TILE),
            gram_tma.OPTIONS, (), capabilities=(90, 100), needs=("{matrix}", COPY_ENGINE),
        )  # fmt: skip


def passes() -> Iterator[Shipped]:
    """The element-wise passes, in every type, activation and form."""
    options = {"num_warps": saliency.TILE["num_warps"]}
    tile = {name: saliency.TILE[name] for name in ("TILE_T", "TILE_M")}
    sizes = dict.fromkeys(("num_tokens", "width", "stride_token"), "i32")
    for dtype in TYPES:
        for kind, number in saliency.KINDS.items():
            for has_up in (True, False):
                name = f"{dtype} {kind}{' gated' if has_up else ''}"
                constants = {"KIND": number, "HAS_UP": has_up, **tile}
                signature = dict.fromkeys(("p_gate", "p_up", "p_grad"), f"*{dtype}") | {"p_sums": "*fp32"} | sizes
                backward = constants | {"TOKENS": saliency.TOKENS_PER_PROGRAM}
                yield Shipped(
                    f"saliency {name}", saliency.activation_backward_kernel, signature, backward, options,
                    tuple(name for name in signature if name != "num_tokens"), needs=WIDE,
                )  # fmt: skip
                yield Shipped(
                    f"saliency {name} unaligned", saliency.activation_backward_kernel, signature,
                    backward | {"TILE_M": saliency.TILE_UNALIGNED["TILE_M"]}, options, (),
                )  # fmt: skip
                signature = dict.fromkeys(("p_gate", "p_up", "p_out"), f"*{dtype}") | sizes | {"stride_out": "i32"}
                yield Shipped(
                    f"activation {name}", saliency.activation_kernel, signature, constants, options,
                    tuple(name for name in signature if name != "num_tokens"), needs=WIDE,
                )  # fmt: skip
        signature = {"p_logits": f"*{dtype}", "p_target": "*i64", "p_gradient": f"*{dtype}", "p_loss": "*fp32"}
        signature |= {"vocabulary": "i32", "stride_token": "i32"}
        tile_v, warps = ({name: cross_entropy.TILE[name]} for name in ("TILE_V", "num_warps"))
        kernel = cross_entropy.cross_entropy_gradient_kernel
        yield Shipped(f"cross entropy {dtype}", kernel, signature, tile_v, warps, tuple(signature), needs=WIDE)
        yield Shipped(f"cross entropy {dtype} unaligned", kernel, signature, tile_v, warps, ())


def ones(entries: Sequence[Shipped]) -> Iterator[Shipped]:
    """Forms in which a size or a stride is 1, a constant then: of one activation, in bfloat16 and float32."""
    for entry in entries:
        if "fp16" in entry.name or "tf32" in entry.name or entry.constants.get("KIND", 0) != 0:
            continue
        for name in sorted(ONES & {*entry.signature} - {*entry.aligned}):
            signature = {key: kind for key, kind in entry.signature.items() if key != name}
            constants = entry.constants | {name: 1}
            yield replace(
                entry, name=f"{entry.name}, {name} = 1", signature=signature, constants=constants,
                capabilities=(90,), needs=(), at_once=1,
            )  # fmt: skip


def in_layers() -> Iterator[Shipped]:
    """RMSNorm of rows as short as one head and as wide as a program holds, and the rotary embedding."""
    for dtype in TYPES:
        rows = {"p_x": f"*{dtype}", "p_weight": f"*{dtype}", "p_out": f"*{dtype}", "p_inverse": "*fp32"}
        rows |= {"num_rows": "i32", "width": "i32", "offset": "fp32"}
        for width, layout in ((128, "aligned"), (576, "unaligned"), (4096, "aligned"), (norm.WIDEST, "aligned")):
            constants = norm.tile(width)
            options = {"num_warps": constants.pop("num_warps")}
            aligned = ("p_grad", *(name for name in rows if name not in ("num_rows", "offset")))
            for name, kernel, more in (
                ("norm", norm.rms_norm_kernel, {"eps": "fp32"}),
                ("norm backward", norm.rms_norm_backward_kernel, {"p_grad": f"*{dtype}"}),
            ):
                yield Shipped(
                    f"{name} {dtype} {width} {layout}", kernel, rows | more, constants, options,
                    tuple(name for name in aligned if name in rows | more) if layout == "aligned" else (),
                    needs=WIDE if layout == "aligned" else (),
                )  # fmt: skip
        names = rotary.rotate_kernel.arg_names
        sizes = [name for name in names if name.startswith(("num_", "stride_")) or name == "half"]
        signature = {name: f"*{dtype}" for name in names if name.startswith("p_")} | dict.fromkeys(sizes, "i32")
        for dim, layout in ((64, "aligned"), (128, "aligned"), (80, "unaligned")):
            for backward in (False, True):
                constants = rotary.tile(dim) | {"BACKWARD": backward}
                options = {"num_warps": constants.pop("num_warps")}
                yield Shipped(
                    f"rotary{' backward' if backward else ''} {dtype} {dim} {layout}", rotary.rotate_kernel, signature,
                    constants, options,
                    tuple(n for n in signature if not n.startswith("num_")) if layout == "aligned" else (),
                    needs=WIDE if layout == "aligned" else (),
                )  # fmt: skip


def shipped() -> list[Shipped]:
    """Every kernel in every form that a launcher asks for."""
    entries = [*products(), *around_products(), *passes(), *in_layers()]
    return [*entries, *ones(entries)]
