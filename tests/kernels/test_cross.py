"""kernels/cross.py against the float64 reference; what it shares with the Gram update is tested there too."""

import pytest
import torch
from torch import Tensor

from minisp.kernels import cross as kernel
from minisp.ops import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_is_updated(cross: Tensor, before: Tensor, x: Tensor, y: Tensor) -> None:
    """|ours − fp64| ≤ |eager − fp64| + eps·√terms·Σ|terms|."""
    exact = before.double() + reference.cross(x.double(), y.double())
    eager = before + x.float().T @ y.float()
    scale = before.abs() + reference.cross(x.double().abs(), y.double().abs())
    slack = torch.finfo(torch.float32).eps * (len(x) + 1) ** 0.5 * scale
    assert ((cross - exact).abs() <= (eager - exact).abs() + slack).all()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 64, 131])
@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (3, 130), (129, 5), (65, 64), (128, 200), (144, 80)])
def test_update_is_right_for_ragged_shapes(
    width: int, hidden: int, num_tokens: int, dtype: torch.dtype, device: str
) -> None:
    x, y = (torch.randn(num_tokens, n, device=device).to(dtype) for n in (width, hidden))
    cross = torch.randn(width, hidden, device=device)
    before = cross.clone()
    kernel.cross_update_(cross, x, y)
    assert_is_updated(cross, before, x, y)


@pytest.mark.kernel
@pytest.mark.usefixtures("large_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_update_is_right_and_repeatable(dtype: torch.dtype, device: str) -> None:
    x, y = (torch.randn(301, n, device=device).to(dtype) for n in (160, 80))
    cross = torch.randn(160, 80, device=device)
    before, again = cross.clone(), cross.clone()
    kernel.cross_update_(cross, x, y)
    assert_is_updated(cross, before, x, y)
    kernel.cross_update_(again, x, y)
    assert torch.equal(cross, again)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_takes_any_strides(dtype: torch.dtype, device: str) -> None:
    wide = torch.randn(140, 300, device=device).to(dtype)
    sides = (wide[::2, 5:75], wide[:70, ::4], wide.T[:70, :90], wide[:1].expand(70, -1)[:, :30])
    for x, y in zip(sides, sides[1:] + sides[:1], strict=True):
        cross = torch.randn(x.shape[1], y.shape[1], device=device)
        before = cross.clone()
        kernel.cross_update_(cross, x, y)
        assert_is_updated(cross, before, x, y)


@pytest.mark.kernel
def test_nothing_is_written_beside_the_matrix(device: str) -> None:
    room = torch.full((3, 70, 90), torch.nan, device=device)
    room[1] = 0
    kernel.cross_update_(room[1], torch.ones(5, 70, device=device), torch.ones(5, 90, device=device))
    assert torch.equal(room[1], torch.full((70, 90), 5.0, device=device))
    assert room[0].isnan().all() and room[2].isnan().all()


@pytest.mark.kernel
def test_addresses_beyond_int32(device: str) -> None:
    # The last token of y lies 2³¹ elements in; only the pages that hold tokens are touched.
    storage = torch.empty(4 * 2**29 + 3, dtype=torch.bfloat16, device=device)
    y = storage.as_strided((5, 3), (2**29, 1))
    y.copy_(torch.randn(5, 3))
    x = torch.randn(5, 7, device=device).to(torch.bfloat16)
    cross = torch.zeros(7, 3, device=device)
    kernel.cross_update_(cross, x, y)
    assert_is_updated(cross, torch.zeros_like(cross), x, y)


@pytest.mark.kernel
@pytest.mark.parametrize(("num_tokens", "width", "hidden"), [(0, 7, 5), (4, 0, 5), (4, 7, 0)])
def test_nothing_to_add_changes_nothing(num_tokens: int, width: int, hidden: int, device: str) -> None:
    cross = torch.randn(width, hidden, device=device)
    before = cross.clone()
    kernel.cross_update_(
        cross, torch.empty(num_tokens, width, device=device), torch.empty(num_tokens, hidden, device=device)
    )
    assert torch.equal(cross, before)


@pytest.mark.parametrize(
    ("cross", "x", "y"),
    [
        (torch.zeros(4, 5, dtype=torch.float64), torch.zeros(3, 4), torch.zeros(3, 5)),
        (torch.zeros(5, 4).T, torch.zeros(3, 4), torch.zeros(3, 5)),
        (torch.zeros(4), torch.zeros(3, 4), torch.zeros(3, 5)),
        (torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(3, 5)),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3, 4)),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(2, 5)),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3, 5, dtype=torch.float16)),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3, 5, device="meta")),
        (torch.zeros(4, 5), torch.zeros(()), torch.zeros(3, 5)),
    ],
)
def test_bad_arguments_are_refused(cross: Tensor, x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got .*\. [A-Z]"):
        kernel.cross_update_(cross, x, y)
    assert not cross.any()
