"""kernels/gram.py and kernels/gram_tma.py against the float64 reference."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from minisp.kernels import cross, gram_tma
from minisp.kernels import gram as kernel
from minisp.ops import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def poisoned_gram(width: int, device: str) -> Tensor:
    """A symmetric-to-be matrix: random on and below the diagonal, NaN above, which must not spread."""
    lower = torch.randn(width, width, device=device)
    return lower.masked_fill_(torch.ones_like(lower, dtype=torch.bool).triu(1), float("nan"))


def assert_is_updated(gram: Tensor, before: Tensor, x: Tensor) -> None:
    """Lower triangle: |ours − fp64| ≤ |eager − fp64| + eps·√terms·Σ|terms|. Upper triangle: still poisoned."""
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
@pytest.mark.parametrize("width", [1, 63, 64, 65, 128, 176, 200])
def test_update_is_right_for_ragged_shapes(width: int, num_tokens: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(num_tokens, width, device=device).to(dtype)
    gram = poisoned_gram(width, device)
    before = gram.clone()
    kernel.gram_update_(gram, x)
    assert_is_updated(gram, before, x)


@pytest.mark.kernel
@pytest.mark.usefixtures("large_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(79, 20), (80, 80), (300, 131), (333, 272)])
def test_split_update_is_right_and_repeatable(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(num_tokens, width, device=device).to(dtype)
    gram = poisoned_gram(width, device)
    before, again = gram.clone(), gram.clone()
    kernel.gram_update_(gram, x)
    assert_is_updated(gram, before, x)
    kernel.gram_update_(again, x)
    assert torch.equal(gram.tril().nan_to_num(nan=0.0), again.tril().nan_to_num(nan=0.0))


@pytest.mark.kernel
@pytest.mark.usefixtures("large_gpu")
@pytest.mark.parametrize("num_tokens", [30, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_above_the_diagonal_keeps_its_value(dtype: torch.dtype, num_tokens: int, device: str) -> None:
    # NaN shows what spreads; a number shows what is added.
    gram = torch.full((144, 144), 7.0, device=device)
    kernel.gram_update_(gram, torch.ones(num_tokens, 144, device=device).to(dtype))
    assert torch.equal(gram, torch.full_like(gram, 7.0) + torch.full_like(gram, num_tokens).tril())


def test_splits_fill_the_gpu_and_bound_the_workspace() -> None:
    for processors in (1, 58, 108, 132, 192):
        for tiles in (1, 2, 15, 78, 263, 264, 300, 5000):
            for num_tokens in (1, 63, 1024, 2048, 8192, 16384):
                splits, tokens = cross.split_tokens(tiles, num_tokens, processors)
                assert (splits - 1) * tokens < num_tokens <= splits * tokens, "every split has tokens, and all have one"
                assert tokens % 64 == 0
                assert splits == 1 or tokens >= cross.TOKENS_PER_SPLIT
                assert splits == 1 or splits * tiles <= 2 * processors
    assert cross.split_tokens(78, 8192, 132)[0] == 3
    assert cross.split_tokens(300, 8192, 132)[0] == 1


@pytest.mark.kernel
@pytest.mark.parametrize("input_precision", cross.PRECISIONS)
def test_every_precision_is_close_to_what_it_says(input_precision: str, device: str) -> None:
    # The interpreter multiplies all of them as float32; on a GPU each has its own error.
    x = torch.randn(130, 200, device=device)
    gram = torch.zeros(200, 200, device=device)
    kernel.gram_update_(gram, x, input_precision=input_precision)
    exact, scale = reference.gram(x.double()), reference.gram(x.double().abs())
    allowed = {"ieee": 2**-23, "tf32": 2**-9, "tf32x3": 2**-19}[input_precision]
    assert ((gram - exact).abs().tril() <= allowed * 131**0.5 * scale).all()
    assert not gram.triu(1).any()


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


@pytest.mark.kernel
def test_wide_matrices_take_the_descriptors(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(kernel, "NARROW", 64)
    monkeypatch.setattr(cross, "TOKENS_PER_LAUNCH", 48)
    monkeypatch.setattr(gram_tma, "serves", lambda gram, x: True)
    monkeypatch.setattr(gram_tma, "gram_update_", lambda gram, x: taken.append(len(x)))
    x = torch.randn(100, 72, device=device).to(torch.bfloat16)
    for width in (64, 72):
        kernel.gram_update_(torch.zeros(width, width, device=device), x[:, :width])
    assert taken == [48, 48, 4]


@triton.jit
def place_kernel(p_row, p_col, num_tiles, num_rows, TILES: tl.constexpr, GROUP: tl.constexpr):
    i = tl.program_id(0) * TILES + tl.arange(0, TILES)
    row, col = gram_tma._place(tl.minimum(i, num_tiles - 1), num_rows, GROUP)
    tl.store(p_row + i, row)
    tl.store(p_col + i, col)


@pytest.mark.kernel
# As many rows of tiles as 28672 units have, and one more than 70B models need; every remainder of a group.
@pytest.mark.parametrize("num_rows", [*range(1, 36), 86, 112, 224, 225])
def test_every_place_of_the_staircase_is_taken_once_and_in_groups(num_rows: int, device: str) -> None:
    tiles, group = sum(r // 2 + 1 for r in range(num_rows)), gram_tma.TILE["GROUP"]
    programs = -(-tiles // 128)
    rows, cols = (torch.empty(programs * 128, dtype=torch.int32, device=device) for _ in range(2))
    place_kernel[(programs,)](rows, cols, tiles, num_rows, TILES=128, GROUP=group)
    places = list(zip(rows[:tiles].tolist(), cols[:tiles].tolist(), strict=True))
    assert sorted(places) == [(r, c) for r in range(num_rows) for c in range(r // 2 + 1)]
    assert [r // group for r, _ in places] == sorted(r // group for r, _ in places)


def x_columns_per_wave(num_rows: int, group: int, programs: int) -> float:
    """Columns of X that programs of one wave read between them, on average: what the memory has to deliver."""
    order: list[tuple[int, int]] = []
    for start in range(0, num_rows, group):
        members = range(start, min(start + group, num_rows))
        order += [(r, c) for c in range(start // 2 + 1) for r in members]
        order += [(r, c) for r in members for c in range(start // 2 + 1, r // 2 + 1)]
    waves = [order[i : i + programs] for i in range(0, len(order), programs)]
    return sum(128 * len({r for r, _ in w}) + 256 * len({c for _, c in w}) for w in waves) / len(waves)


def test_groups_keep_the_operands_in_the_cache() -> None:
    # 28672 units on an H100 (132 multiprocessors): row by row, a wave reads almost everything left of the diagonal.
    grouped, by_rows = (x_columns_per_wave(224, group, 132) for group in (gram_tma.TILE["GROUP"], 1))
    assert grouped < 0.25 * by_rows


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
    monkeypatch.setattr(cross, "TOKENS_PER_LAUNCH", 48)
    x = torch.randn(100, 20, device=device).to(torch.bfloat16)
    gram = poisoned_gram(20, device)
    before, pieces = gram.clone(), gram.clone()
    kernel.gram_update_(gram, x)
    assert_is_updated(gram, before, x)
    for start in range(0, 100, 48):
        part = slice(start, start + 48)
        kernel.gram_update_(pieces, x[part])
    assert torch.equal(gram.tril(), pieces.tril())


@pytest.mark.kernel
@pytest.mark.usefixtures("large_gpu")
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
@pytest.mark.parametrize("tile", [64, 128])
def test_every_tile_of_the_triangle_is_visited_once(tile: int, device: str) -> None:
    # With one token of ones every visit adds exactly one; 12 rows of tiles exercise the index well past its starts.
    width = 12 * tile
    gram = torch.zeros(width, width, device=device)
    dtype = torch.float32 if tile == 64 else torch.bfloat16
    assert cross.config(dtype)["TILE"] == tile
    assert cross.config(dtype, aligned=False)["TILE"] == 64
    kernel.gram_update_(gram, torch.ones(1, width, dtype=dtype, device=device))
    assert torch.equal(gram, torch.ones_like(gram).tril())


@triton.jit
def triangle_kernel(p_index, p_row, p_col, TILE: tl.constexpr):
    offsets = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, col = cross.triangle(tl.load(p_index + offsets))
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
    ("gram", "x", "options"),
    [
        (torch.zeros(4, 5), torch.zeros(3, 4), {}),
        (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 4), {}),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(3, 4), {}),
        (torch.zeros(()), torch.zeros(3, 4), {}),
        (torch.zeros(4, 4), torch.zeros(3, 5), {}),
        (torch.zeros(4, 4), torch.zeros(4), {}),
        (torch.zeros(4, 4), torch.zeros(()), {}),
        (torch.zeros(4, 4), torch.zeros(3, 4, dtype=torch.int32), {}),
        (torch.zeros(4, 4), torch.zeros(3, 4, device="meta"), {}),
        (torch.zeros(4, 4), torch.zeros(3, 4), {"input_precision": "bf16x9"}),
    ],
)
def test_bad_arguments_are_refused(gram: Tensor, x: Tensor, options: dict) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got .*\. [A-Z]"):
        kernel.gram_update_(gram, x, **options)
    assert not gram.any()
