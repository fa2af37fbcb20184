"""kernels/gram.py against the float64 reference, and what the compilers make of it."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from minisp import reference
from minisp.kernels import gram as kernel
from minisp.kernels import gram_tma

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def poisoned_gram(width: int, device: str) -> Tensor:
    """A symmetric-to-be matrix: random on and below the diagonal, NaN above, where nothing may be read."""
    lower = torch.randn(width, width, device=device)
    return lower.masked_fill_(torch.ones_like(lower, dtype=torch.bool).triu(1), float("nan"))


def assert_is_updated(gram: Tensor, before: Tensor, x: Tensor) -> None:
    """Lower triangle: |ours − fp64| ≤ |float32 eager − fp64| + eps·√terms·Σ|terms|. Upper triangle: still poisoned."""
    exact = before.double() + reference.gram(x.double())
    eager = before + x.float().T @ x.float()
    scale = before.abs().double() + reference.gram(x.abs().double())
    slack = torch.finfo(torch.float32).eps * (x.shape[0] + 1) ** 0.5 * scale
    excess = (gram - exact).abs() - (eager - exact).abs() - slack
    assert (excess.tril() <= 0).all()
    is_upper = torch.ones_like(gram, dtype=torch.bool).triu(1)
    assert torch.equal(gram.isnan(), is_upper)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 33, 64, 130])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_update_is_right_for_ragged_shapes(width: int, num_tokens: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(num_tokens, width, device=device).to(dtype)
    gram = poisoned_gram(width, device)
    before = gram.clone()
    kernel.gram_update_(gram, x)
    assert_is_updated(gram, before, x)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_matrices_use_larger_tiles(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = kernel.config(200, dtype)
    monkeypatch.setattr(kernel, "NARROW", 200)
    assert (kernel.config(200, dtype) == narrow) == (dtype == torch.float32)
    x = torch.randn(70, 200, device=device).to(dtype)
    gram = poisoned_gram(200, device)
    before = gram.clone()
    kernel.gram_update_(gram, x)
    assert_is_updated(gram, before, x)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 8), (70, 128), (64, 136), (130, 264), (65, 640)])
def test_descriptor_update_is_right(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(num_tokens, width, device=device).to(dtype)
    gram = poisoned_gram(width, device)
    if device == "cuda" and not gram_tma.serves(gram, x):
        pytest.skip("this GPU has no tensor memory accelerator that serves these tiles")
    before = gram.clone()
    gram_tma.gram_update_(gram, x)
    assert_is_updated(gram, before, x)


@triton.jit
def staircase_kernel(p_row, p_col, TILES: tl.constexpr):
    i = tl.arange(0, TILES)
    row, col = gram_tma._staircase(i)
    tl.store(p_row + i, row)
    tl.store(p_col + i, col)


@pytest.mark.kernel
def test_the_staircase_index_is_exact(device: str) -> None:
    rows, cols = (torch.empty(2**14, dtype=torch.int32, device=device) for _ in range(2))
    staircase_kernel[(1,)](rows, cols, TILES=2**14)
    expected = [(r, c) for r in range(256) for c in range(r // 2 + 1)][: 2**14]
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == expected


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_takes_any_strides(dtype: torch.dtype, device: str) -> None:
    wide = torch.randn(140, 300, device=device).to(dtype)
    for x in (wide[::2, 5:75], wide[:70, ::4], wide.T[:70, :70], wide[:1].expand(70, -1)[:, :70]):
        gram = poisoned_gram(x.shape[1], device)
        before = gram.clone()
        kernel.gram_update_(gram, x)
        assert_is_updated(gram, before, x)


@pytest.mark.kernel
@pytest.mark.parametrize(("num_tokens", "stride"), [(5, 2**29), (65, 2**25)])
def test_addresses_beyond_int32(num_tokens: int, stride: int, device: str) -> None:
    # The last token lies 2³¹ elements in, within the first tile of tokens or in the second. Only the pages that hold
    # tokens are touched.
    width = 3
    storage = torch.empty((num_tokens - 1) * stride + width, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((num_tokens, width), (stride, 1))
    x.copy_(torch.randn(num_tokens, width))
    gram = poisoned_gram(width, device)
    before = gram.clone()
    kernel.gram_update_(gram, x)
    assert_is_updated(gram, before, x)


@pytest.mark.kernel
def test_long_inputs_are_split_into_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "TOKENS_PER_LAUNCH", 48)
    x = torch.randn(100, 20, device=device).to(torch.bfloat16)
    gram = poisoned_gram(20, device)
    before, pieces = gram.clone(), gram.clone()
    kernel.gram_update_(gram, x)
    assert_is_updated(gram, before, x)
    for piece in x.split(48):
        kernel.gram_update_(pieces, piece)
    assert torch.equal(gram.tril(), pieces.tril())


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(0, 70), (5, 0), (0, 0)])
def test_nothing_to_add_changes_nothing(shape: tuple[int, int], device: str) -> None:
    gram = poisoned_gram(shape[1], device)
    before = gram.clone()
    kernel.gram_update_(gram, torch.empty(shape, dtype=torch.bfloat16, device=device))
    assert torch.equal(gram.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


@pytest.mark.kernel
@pytest.mark.parametrize("width", [0, 1, 2, 64, 65, 200])
def test_mirror_overwrites_the_poison_exactly(width: int, device: str) -> None:
    gram = poisoned_gram(width, device)
    lower = gram.tril().nan_to_num(nan=0.0)
    expected = lower + lower.tril(-1).T
    assert kernel.mirror_(gram) is gram
    assert torch.equal(gram, expected)


@pytest.mark.kernel
def test_every_tile_of_the_triangle_is_visited_once(device: str) -> None:
    # With one token of ones every visit adds exactly one; 12 rows of tiles exercise the index well past its starts.
    width = 12 * 64
    gram = torch.zeros(width, width, device=device)
    kernel.gram_update_(gram, torch.ones(1, width, dtype=torch.bfloat16, device=device))
    assert torch.equal(gram, torch.ones_like(gram).tril())


@triton.jit
def triangle_kernel(p_index, p_row, p_col, TILE: tl.constexpr):
    offsets = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, col = kernel._triangle(tl.load(p_index + offsets))
    tl.store(p_row + offsets, row)
    tl.store(p_col + offsets, col)


@pytest.mark.kernel
def test_the_triangular_index_is_exact(device: str) -> None:
    # Around the start of every row, far beyond where 8i + 1 is exact in float32.
    rows = torch.arange(1, 8193, dtype=torch.int32, device=device)
    starts = rows * (rows + 1) // 2
    index = torch.cat([starts - 1, starts])
    row, col = torch.empty_like(index), torch.empty_like(index)
    triangle_kernel[(index.numel() // 1024,)](index, row, col, TILE=1024)
    assert torch.equal(row, torch.cat([rows - 1, rows]))
    assert torch.equal(col, torch.cat([rows - 1, torch.zeros_like(rows)]))


@pytest.mark.parametrize(
    ("gram", "x"),
    [
        (torch.zeros(4, 5), torch.zeros(3, 4)),
        (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 4)),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(3, 4)),
        (torch.zeros(4, 4), torch.zeros(3, 5)),
        (torch.zeros(4, 4), torch.zeros(4)),
        (torch.zeros(4, 4), torch.zeros(3, 4, dtype=torch.int32)),
        (torch.zeros(4, 4), torch.zeros(3, 4, device="meta")),
    ],
)
def test_bad_arguments_are_refused(gram: Tensor, x: Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        kernel.gram_update_(gram, x)
    assert not gram.any()


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize(
    ("width", "dtype", "layout"),
    [
        (1536, torch.bfloat16, "row-major"),
        (11008, torch.bfloat16, "row-major"),
        (11008, torch.bfloat16, "column-major"),
        (11008, torch.bfloat16, "strided"),
        (11008, torch.float16, "row-major"),
        (11008, torch.float32, "row-major"),
        (11008, torch.float32, "strided"),
    ],
)
def test_update_compiles_without_spills(
    width: int, dtype: torch.dtype, layout: str, capability: int, compile_for: Callable
) -> None:
    options = kernel.config(width, dtype, unit_stride=layout == "row-major")
    constants = {name: options.pop(name) for name in ("TILE", "TILE_T")}
    # The launcher turns a stride of one into a constant.
    constants |= {"row-major": {"stride_unit": 1}, "column-major": {"stride_token": 1}, "strided": {}}[layout]
    signature = {"p_gram": "*fp32", "p_x": TRITON_NAMES[dtype]}
    signature |= dict.fromkeys(("num_tokens", "width", "stride_token", "stride_unit"), "i32")
    aligned = tuple(name for name in signature if name not in constants and layout != "strided")
    compiled = compile_for(capability, kernel.gram_update_kernel, signature, constants, aligned, **options)
    compiled.assert_fits(capability)
    matrix_unit = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}[capability]
    # IEEE float32 products do not exist on the matrix units: finding one would mean TF32.
    assert (matrix_unit in compiled.sass) == (dtype != torch.float32)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_mirror_compiles_without_spills(capability: int, compile_for: Callable) -> None:
    signature = {"p_gram": "*fp32", "width": "i32"}
    compiled = compile_for(capability, kernel.mirror_kernel, signature, {"TILE": 64}, ("p_gram", "width"), num_warps=4)
    compiled.assert_fits(capability)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("capability", [90, 100])
def test_descriptor_update_compiles_without_spills(capability: int, dtype: str, compile_for: Callable) -> None:
    rows, tokens = gram_tma.TILE["TILE_R"], gram_tma.TILE["TILE_T"]
    signature = {
        "d_row": f"tensordesc<{dtype}[{tokens}, {rows}]>",
        "d_col": f"tensordesc<{dtype}[{tokens}, {2 * rows}]>",
        "d_gram": f"tensordesc<fp32[{rows}, {rows // 2}]>",
        "num_tokens": "i32",
    }
    compiled = compile_for(
        capability, gram_tma.gram_update_tma_kernel, signature, gram_tma.TILE, (), **gram_tma.OPTIONS
    )
    compiled.assert_fits(capability)
    assert {90: "HGMMA", 100: "UTCHMMA"}[capability] in compiled.sass
    assert "UTMALDG" in compiled.sass, "the copy engine brings the operands"
