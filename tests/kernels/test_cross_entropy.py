"""kernels/cross_entropy.py against the float64 reference."""

import pytest
import torch

from minisp.kernels import cross_entropy as kernel
from minisp.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE_V = kernel.TILE["TILE_V"]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 5, TILE_V - 1, TILE_V, TILE_V + 1, 3 * TILE_V + 7])
def test_gradient_is_right(vocabulary: int, dtype: torch.dtype, device: str) -> None:
    room = torch.full((6, vocabulary + 3), float("nan"), dtype=dtype, device=device)
    logits = room[:, :vocabulary]
    logits.copy_(torch.randn(6, vocabulary) * 8)
    targets = torch.randint(vocabulary, (6,), device=device)
    targets[0], targets[1] = 0, vocabulary - 1
    loss, gradient = kernel.cross_entropy_gradient(logits, targets)
    exact_loss, exact = reference.cross_entropy_gradient(logits.double(), targets)
    _, eager = reference.cross_entropy_gradient(logits.float(), targets)
    assert gradient.dtype == dtype
    assert float(loss.sum(dtype=torch.float64)) == pytest.approx(float(exact_loss), rel=1e-5, abs=1e-5)
    slack = torch.finfo(dtype).eps * exact.abs() + torch.finfo(torch.float32).eps * vocabulary**0.5
    slack += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((gradient.double() - exact).abs() <= (eager.double() - exact).abs() + slack).all()


@pytest.mark.kernel
def test_extreme_logits(device: str) -> None:
    infinity = float("inf")
    logits = torch.full((5, TILE_V + 9), -infinity, device=device)
    logits[0, 3] = logits[0, TILE_V + 2] = 1e30
    logits[1, TILE_V + 4] = -1e30
    logits[2] = torch.nan
    logits[3, 7], logits[3, 8] = torch.nan, 1.0
    logits[4, 9] = infinity
    loss, gradient = kernel.cross_entropy_gradient(logits, torch.full((5,), 3, device=device))
    assert float(loss[0]) == pytest.approx(0.6931472)
    assert gradient[0, [3, TILE_V + 2, 5]].tolist() == pytest.approx([-0.5, 0.5, 0.0])
    assert float(loss[1]) == infinity
    assert gradient[1, [3, TILE_V + 4]].tolist() == [-1.0, 1.0]
    # What is no number does not turn into one.
    assert not loss[2:].isfinite().any()
    assert gradient[2:4].isnan().all()
    assert gradient[4, 9].isnan()


@pytest.mark.kernel
def test_no_tokens(device: str) -> None:
    loss, gradient = kernel.cross_entropy_gradient(
        torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)
    )
    assert (loss.shape, gradient.shape) == ((0,), (0, 5))


@pytest.mark.kernel
def test_addresses_beyond_int32(device: str) -> None:
    storage = torch.empty(4 * 2**29 + 3, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((5, 3), (2**29, 1))
    logits.copy_(torch.randn(5, 3))
    targets = torch.tensor([0, 1, 2, 0, 1], device=device)
    _, gradient = kernel.cross_entropy_gradient(logits, targets)
    _, exact = reference.cross_entropy_gradient(logits.double(), targets)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(5, 3).T, torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64, device="meta")),
    ],
)
def test_bad_arguments_are_refused(logits: torch.Tensor, targets: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got .*\. C"):
        kernel.cross_entropy_gradient(logits, targets)
