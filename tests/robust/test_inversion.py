"""What an observer sees of a training step: by closed forms, and noise of the right scale; and how scores are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust import Classifier
from robust.errors import ConfigError, DataError, ModelError
from robust.inversion import Protocol, Watched, trained_names
from robust.inversion_scores import Guess, best_guess, compared, still_falling, summary, thinned


def subject(seed: int = 0) -> tuple[Classifier, Watched, Tensor, Tensor]:
    """A net with batch normalisation, its watched form in float64, and four samples."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
        x, y = torch.rand(4, 1, 6, 6), torch.randint(0, 5, (4,))
    clf = Classifier(net.eval(), mean=0.4, std=0.2, device="cpu")
    return clf, Watched(clf, torch.float64), x, y


def autograd(clf: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """The mean gradient by plain autograd."""
    loss = F.cross_entropy(clf.training_logits(x), y)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(clf.module.parameters()))])


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def test_a_plain_observation_is_the_gradient_of_the_mean_loss() -> None:
    clf, watched, x, y = subject()
    parts = Protocol(batch=4).observe(watched, x, y)
    assert [part.shape for part in parts] == [part.shape for part in clf.module.parameters()]
    torch.testing.assert_close(flat(parts).float(), autograd(clf, x, y), rtol=1e-4, atol=1e-6)


def test_clipping_bounds_each_sample_and_is_what_an_attacker_expects() -> None:
    clf, watched, x, y = subject()
    single = torch.stack([autograd(clf, x[k : k + 1], y[k : k + 1]) for k in range(4)]).double()
    clip = float(single.norm(dim=1).median())
    protocol = Protocol(batch=4, clip=clip)
    wanted = (single * (clip / single.norm(dim=1)).clamp_max(1)[:, None]).mean(0)
    found = flat(protocol.observe(watched, x, y))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    with clf.session():
        expected = protocol.expected(watched, x.double(), F.one_hot(y, 5).double())
    torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-6)


def test_noise_has_the_scale_of_the_clip_and_is_keyed() -> None:
    _, watched, x, y = subject()
    quiet = flat(Protocol(batch=4, clip=0.5).observe(watched, x, y))
    protocol = Protocol(batch=4, clip=0.5, noise=2.0)
    draws = torch.stack([flat(protocol.observe(watched, x, y, seed=1, index=k)) - quiet for k in range(30)])
    right, count = 2.0 * 0.5 / 4, draws.numel()
    scale = float(draws.square().mean().sqrt())
    assert abs(scale / right - 1) < 5 / (2 * count) ** 0.5
    assert not any(abs(scale / (right * wrong) - 1) < 5 / (2 * count) ** 0.5 for wrong in (2 / 3, 3 / 2))
    assert abs(float(draws.mean())) < 5 * right / count**0.5
    again = flat(protocol.observe(watched, x, y, seed=1, index=7)) - quiet
    assert torch.equal(again, draws[7])
    assert not torch.equal(flat(protocol.observe(watched, x, y, seed=2, index=7)) - quiet, draws[7])


def test_an_update_of_local_steps_is_that_of_gradient_descent() -> None:
    clf, watched, x, y = subject()
    first = torch.cat([part.detach().flatten() for part in clf.module.parameters()])
    found = flat(Protocol(batch=4, steps=3, lr=0.2).observe(watched, x, y)).float()
    optimizer = torch.optim.SGD(clf.module.parameters(), 0.2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(clf.training_logits(x), y).backward()
        optimizer.step()
    last = torch.cat([part.detach().flatten() for part in clf.module.parameters()])
    torch.testing.assert_close(found, (first - last) / 0.6, rtol=1e-3, atol=1e-5)


def test_compression_sends_the_largest_entries_and_rounds_within_a_step() -> None:
    _, watched, x, y = subject()
    whole = flat(Protocol(batch=4).observe(watched, x, y))
    sparse = flat(Protocol(batch=4, keep=0.1).observe(watched, x, y))
    sent = sparse != 0
    assert int(sent.sum()) == round(0.1 * len(whole))
    assert whole[sent].abs().min() >= whole[~sent].abs().max()
    torch.testing.assert_close(sparse[sent], whole[sent], rtol=1e-5, atol=1e-8)
    rounded = flat(Protocol(batch=4, bits=8).observe(watched, x, y))
    assert 0 < float((rounded - whole).abs().max()) <= float(whole.abs().max()) / 127 * 1.001
    both = flat(Protocol(batch=4, keep=0.1, bits=4).observe(watched, x, y))
    assert not bool(both[~sent].any())


def test_frozen_parameters_are_not_observed() -> None:
    clf, _, x, y = subject()
    for name, value in clf.module.named_parameters():
        value.requires_grad_(name.startswith("4"))
    assert trained_names(clf) == ["4.weight", "4.bias"]
    assert [part.shape for part in Protocol(batch=4).observe(Watched(clf), x, y)] == [(5, 64), (5,)]
    with pytest.raises(ModelError, match="has no parameters"):
        Watched(Classifier(nn.Flatten(), device="cpu"))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"batch": 0}, "batch=0"),
        ({"steps": 0}, "steps=0"),
        ({"clip": 0.0}, "clip=0.0 bounds nothing"),
        ({"noise": 0.1}, "noise=0.1 is a multiple of clip=None"),
        ({"clip": 1.0, "noise": -1.0}, "noise=-1.0"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"bits": 3}, "bits=3"),
    ],
)
def test_impossible_protocols_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Protocol(**settings)


def test_a_step_takes_as_many_samples_as_it_says() -> None:
    _, watched, x, y = subject()
    with pytest.raises(ConfigError, match="4 samples, labels \\(4,\\): a step takes batch=1 of each"):
        Protocol().observe(watched, x, y)


def test_the_guess_is_the_best_of_those_that_look_at_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.rand(1, 8, 8, generator=generator)
    near = (shape + 0.05 * torch.randn(50, 1, 8, 8, generator=generator)).clamp(0, 1)
    assert best_guess(near).name in ("mean image", "median image")
    flat = torch.full((50, 1, 8, 8), 0.5)
    assert torch.allclose(best_guess(flat).image, flat[0])
    far = 2 * near - 1
    torch.testing.assert_close(best_guess(far, (-1, 1)).image, 2 * best_guess(near).image - 1)
    with pytest.raises(DataError, match="no held-out images"):
        best_guess(near[:0])


def test_scores_are_medians_and_labels_are_counted_where_they_are_told() -> None:
    true = torch.zeros(2, 1, 12, 12)
    true[1] = 1
    guess = Guess("mid-grey", torch.full((1, 12, 12), 0.5))
    told, order = compared(true.flip(0) * 0.9, true, guess, (0.0, 1.0))
    assert order.tolist() == [1, 0]
    assert [row["psnr"] for row in told] == pytest.approx([120, 20], abs=1e-4)
    assert [row["guess_psnr"] for row in told] == pytest.approx([6.0206, 6.0206], abs=1e-3)
    found = summary([{**told[0], "label": 1, "told": 1}, {**told[1], "label": 2, "told": -1}])
    assert found["psnr"] == pytest.approx(70, abs=1e-4)
    assert found["gain"] == pytest.approx(70 - 6.0206, abs=1e-3)
    assert found["labels_right"] == 1


def test_a_curve_tells_whether_an_attack_stopped_early() -> None:
    steps = torch.arange(1, 101).float()
    assert still_falling((1 / steps)[None]) == pytest.approx(1 - 90 / 100, abs=0.02)
    assert still_falling(torch.ones(1, 100)) == 0
    curve = thinned(torch.stack([1 / steps, torch.full((100,), torch.nan)]))
    assert curve["steps"][-1] == 100
    assert curve["objective"][-1] == pytest.approx(0.01)
    assert len(curve["steps"]) == 60
