"""Drawing tokens from a model's own distribution."""

import pytest
import torch

from minisp import fast
from minisp.errors import NumericalError
from minisp.models.objective import Objective
from minisp.models.stream import Stream
from minisp.ops.sampling import DRAWN_ELEMENTS, draw_labels, label_numbers
from tests.counting import Counted
from tests.tiny import tiny_model


def test_labels_follow_the_distribution_of_the_logits() -> None:
    logits = torch.tensor([2.0, -1.0, float("-inf"), 0.5, 1.0])
    count = 20000
    drawn = draw_labels(logits.expand(100, count // 100, 5), (torch.arange(count).view(100, -1) + 0.5) / count)
    assert drawn.shape == (100, count // 100)
    shares = torch.bincount(drawn.flatten(), minlength=5) / count
    # Evenly spread numbers: every share is right to one of them.
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=2 / count)


def test_the_largest_number_draws_a_token_that_exists() -> None:
    below_one = torch.tensor([1 - 2**-24])
    assert draw_labels(torch.zeros(1, 50000), below_one).item() == 49999


def test_the_host_waits_once_for_many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRAWN_ELEMENTS, "cpu", 4 * 50)
    logits, numbers = torch.randn(3, 40, 50), torch.rand(3, 40)
    with Counted() as counted:
        drawn = draw_labels(logits, numbers)
    assert counted.syncs == 1
    monkeypatch.setitem(DRAWN_ELEMENTS, "cpu", 2**21)
    assert torch.equal(drawn, draw_labels(logits, numbers))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_wherever_they_are(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DRAWN_ELEMENTS, "cpu", 50)
    logits = torch.randn(9, 50)
    logits[4, 7] = value
    with pytest.raises(NumericalError, match="Expected finite logits"):
        draw_labels(logits, torch.rand(9))


def test_the_numbers_of_a_window_depend_on_it_and_the_seed_alone() -> None:
    ids = torch.arange(24).view(3, 8)
    numbers = label_numbers(ids, 0)
    torch.testing.assert_close(numbers[1:2], label_numbers(ids[1:2], 0), rtol=0, atol=0)
    assert not numbers.equal(label_numbers(ids, 1))
    assert len(numbers.unique()) == 24 and float(numbers.min()) >= 0 and float(numbers.max()) < 1


def test_the_gradient_over_many_draws_is_none() -> None:
    """The expected score of a distribution under itself is zero, and the labels of a text have another one."""
    model = tiny_model("llama").requires_grad_(False)
    ids = torch.randint(model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(1, 24, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    stream = Stream.from_module(model)
    _, of_text = stream.loss_gradient(hidden, ids, Objective())
    total = torch.zeros_like(of_text)
    for seed in range(200):
        total += stream.loss_gradient(hidden, ids, Objective("sampled", seed))[1]
    assert (total / 200).norm() < 0.2 * of_text.norm()


def test_minify_takes_labels_of_either_kind() -> None:
    ids = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))
    kept = {}
    for labels in ("text", "sampled"):
        for seed in (0, 1):
            report = fast.minify(tiny_model("llama"), keep=0.5, calibration=ids, labels=labels, seed=seed, alignment=1)
            kept[labels, seed] = [layer.tolist() for layer in report.kept]
    assert kept["text", 0] == kept["text", 1]
    assert kept["sampled", 0] != kept["sampled", 1] != kept["text", 0]


def test_both_kinds_of_labels_add_up_in_one_pass() -> None:
    """Over the signs of a window, the square of the joint gradient is the sum of the squares of either kind."""
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    following = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))
    both, numbers = Objective("both", 3), torch.rand(2, 5, generator=torch.Generator().manual_seed(2))
    text_loss, of_text = Objective().gradient(logits, following, None, None)
    _, of_drawn = Objective("sampled", 3).gradient(logits, following, numbers, None)
    found = []
    for sign in (1.0, -1.0):
        loss, gradient = both.gradient(logits, following, numbers, torch.tensor([sign, -sign]))
        assert loss == text_loss
        torch.testing.assert_close(gradient[0], of_text[0] + sign * of_drawn[0])
        torch.testing.assert_close(gradient[1], of_text[1] - sign * of_drawn[1])
        found.append(gradient)
    mean = (found[0].square() + found[1].square()) / 2
    torch.testing.assert_close(mean, of_text.square() + of_drawn.square())


def test_the_signs_of_windows_are_their_own_and_balanced() -> None:
    ids = torch.arange(4000).reshape(1000, 4)
    both = Objective("both", 5)
    signs = both.signs(both.numbers(ids))
    assert signs is not None and set(signs.tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.1
    part = both.signs(both.numbers(ids[10:20]))
    assert part is not None and torch.equal(part, signs[10:20])
    assert Objective("sampled", 5).signs(Objective("sampled", 5).numbers(ids)) is None
