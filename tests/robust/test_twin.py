"""The twin: the same function as its original, given up where it is not, and never the one that decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from robust import Classifier, Linf, evaluate, load_model, losses, programs, twin
from robust.attacks import get
from robust.classifier import RobustWarning
from robust.errors import RobustError
from robust.folding import fold
from robust.twin import Twin, compare, make_twin


def seasoned(module: nn.Module) -> nn.Module:
    """A module whose normalisations have statistics, weights and biases worth folding."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.5, 0.5)
    return module.eval()


class Small(nn.Module):
    """Convolution, normalisation, a linear layer with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear, self.norm = nn.Linear(8 * 6 * 6, 10), nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.bn(self.conv(x)).relu().flatten(1)))


class Viewing(Small):
    """Flattens with view, which fails on channels-last activations."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.bn(self.conv(x)).relu().view(x.shape[0], -1)))


class Branching(Small):
    """Looks at its data, so that it cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Shared(nn.Module):
    """One convolution under two normalisations, and one whose output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other, self.third = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.conv(self.first(self.conv(x))))
        x = self.other(x)
        return (x + self.third(x)).mean((2, 3))


POINTS = torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("build", "folded"), [(Small, 2), (Viewing, 2), (Branching, 0), (Shared, 0)], ids=lambda v: str(v)[-30:]
)
def test_twin_is_the_same_function(build: Callable[[], nn.Module], folded: int) -> None:
    clf = Classifier(seasoned(build()), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    before = {name: value.clone() for name, value in clf.module.state_dict().items()}
    made = make_twin(clf, POINTS)
    assert made is not None
    assert len(made.folded) == folded
    assert made.channels_last == (build is not Viewing)
    x, logits = [POINTS.clone().requires_grad_(True) for _ in range(2)], []
    for model, point in zip((clf, made), x, strict=True):
        logits.append(model(point))
        logits[-1].square().sum().backward()
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(x[0].grad, x[1].grad, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in clf.module.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet", "vit_b_16"])
def test_torchvision_models_have_twins(name: str) -> None:
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    module = seasoned(torchvision.models.get_model(name, weights=None, num_classes=7, **extra))
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    size = 224 if name == "vit_b_16" else 64
    x = torch.rand(2, 3, size, size)
    made, folded = fold(module)
    with torch.no_grad():
        expected, found = module(x), made(x)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    # DenseNet normalises before it convolves: only a convolution that a normalisation follows can take it in.
    assert len(folded) == {"densenet121": 59}.get(name, norms)


def test_passes_of_a_twin_are_its_original_s() -> None:
    clf = Classifier(seasoned(Small()))
    made = make_twin(clf, POINTS)
    assert made is not None
    assert clf.cost.forwards == 0, "checking it costs the verdict nothing"
    made.logits(POINTS)
    assert clf.cost.forwards == len(POINTS)


def test_twin_follows_its_original_s_weights() -> None:
    clf = Classifier(seasoned(Small()))
    first = make_twin(clf, POINTS)
    assert make_twin(clf, POINTS) is first
    with torch.no_grad():
        clf.module.get_parameter("linear.weight").mul_(-1)
    second = make_twin(clf, POINTS)
    assert second is not None
    assert second is not first
    assert torch.allclose(second.logits(POINTS), clf.logits(POINTS), atol=1e-4)


class Doubled(nn.Module):
    """Gives other logits to any copy of itself than it gives itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = Small(), 1.0

    def __deepcopy__(self, memo: object) -> Doubled:
        other = Doubled()
        other.inner.load_state_dict(self.inner.state_dict())
        other.factor = 2.0
        return other.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


def test_twin_that_disagrees_is_given_up_with_a_warning() -> None:
    clf = Classifier(seasoned(Doubled()))
    with pytest.warns(RobustWarning, match=r"no float32 twin .*logits differ"):
        assert make_twin(clf, POINTS) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_twin(clf, POINTS) is None, "one warning is enough"


def test_twin_that_cannot_be_copied_is_given_up_with_a_warning() -> None:
    class Lonely(Small):
        def __deepcopy__(self, memo: object) -> Lonely:
            raise TypeError("there is one of me")

    clf = Classifier(seasoned(Lonely()))
    with pytest.warns(RobustWarning, match="there is one of me"):
        assert make_twin(clf, POINTS) is None
    attack = get("pgd")(threat=Linf(0.03), steps=3)
    y = clf.logits(POINTS).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustWarning)
        fast = attack(clf, POINTS, y, precision="bfloat16")
    assert torch.equal(fast, attack(clf, POINTS, y, precision="original"))


def test_model_that_masks_its_gradient_has_no_twin_with_another() -> None:
    clf = Classifier(seasoned(Small()))
    other = Twin(clf)
    other.module.forward = lambda z, honest=other.module.forward: honest(z.detach()) + 0 * z.sum()
    assert compare(clf, other, POINTS).gradients == 0.0


def test_what_a_twin_claims_counts_only_if_the_original_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    clf = Classifier(seasoned(Small()))
    y = clf.logits(POINTS).argmax(1)
    honest = Twin.__call__
    checking = Twin(clf)

    def boasting(self: Twin, x: Tensor) -> Tensor:
        return -honest(self, x)  # everything looks broken

    monkeypatch.setattr(Twin, "__call__", boasting)
    monkeypatch.setattr(twin, "_checked", lambda original, made, x: None)
    assert bool((checking.logits(POINTS).argmax(1) != y).all())
    for precision in ("float32", "bfloat16"):
        verdict = evaluate(
            clf, POINTS, y, threat=Linf(1e-6), suite="pgd,apgd-ce,square,fab", precision=precision
        )
        assert verdict.robust_accuracy == 1.0, precision
        for until in ("strongest", "broken", "smallest"):
            result = get("pgd")(threat=Linf(1e-6), steps=6, until=until).run(
                clf, POINTS, y, precision=precision
            )
            assert not result.success.any(), (precision, until)


@pytest.mark.parametrize("eps", [0.01, 0.03, 0.2])
def test_every_precision_gives_the_same_verdict_on_a_trained_model(eps: float) -> None:
    clf = load_model("zoo:digits")
    x, y = _digits(40)
    found = {
        precision: evaluate(clf, x, y, threat=Linf(eps), suite="quick", precision=precision)
        for precision in ("original", "float32", "bfloat16")
    }
    assert found["bfloat16"].manifest["precision"] == "bfloat16"
    assert set(found["bfloat16"].manifest["twins"]) == {"float32", "bfloat16"}
    reference = found["original"]
    for name, verdict in found.items():
        assert int((verdict.robust != reference.robust).sum()) <= 1, name
        verdict.verify(clf, x, y)


def test_strongest_attack_in_bfloat16_loses_nothing_that_float32_finds() -> None:
    clf = load_model("zoo:digits")
    x, y = _digits(60)
    attack = get("pgd")(threat=Linf(0.06), steps=20)
    plain = attack.run(clf, x, y, precision="original")
    fast = attack.run(clf, x, y, precision="bfloat16")
    assert 0 < int(plain.success.sum()) < len(x)
    assert int((plain.success & ~fast.success).sum()) <= 1
    assert bool((clf.logits(fast.x_adv).argmax(1) != y).eq(fast.success).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cross-entropy", "targeted-dlr", "kl", None])
def test_compiled_program_is_the_same_function(name: str | None, dtype: torch.dtype) -> None:
    clf = Classifier(seasoned(Small()), mean=0.5, std=0.25)
    made = make_twin(clf, POINTS, dtype)
    assert made is not None
    rows: dict[str, Tensor] = {}
    loss = None if name is None else losses.get(name)
    if loss is not None:
        rows["y"] = clf.logits(POINTS).argmax(1)
        if name == "targeted-dlr":
            rows["targets"] = (rows["y"] + 1) % 10
        if name == "kl":
            rows["reference"] = clf.logits(POINTS)
    moved = POINTS.flip(0)  # far from where the reference is taken
    assert loss is None or made.gradient(loss, moved, **rows) is None, "nothing is compiled unasked"
    plain = made.logits(moved)
    assert made.compile(loss, POINTS, **rows)
    assert loss is None or made.gradient(loss, moved, **rows) is None, "it answers only where it is wanted"
    made.compiling = True
    before = clf.cost.forwards
    if loss is None:
        assert torch.allclose(made.logits(moved), plain, rtol=1e-4, atol=0.1 if dtype.itemsize == 2 else 1e-5)
    else:
        found = made.gradient(loss, moved, **rows)
        assert found is not None
        x = moved.clone().requires_grad_(True)
        logits = made(x)
        value, upstream = losses.with_gradient(loss, logits.detach(), **rows)
        logits.backward(upstream)
        for ours, theirs in zip(found, (logits.detach(), value, x.grad), strict=True):
            scale = float(theirs.abs().max())
            assert float((ours - theirs).abs().max()) <= scale * (0.1 if dtype.itemsize == 2 else 1e-4)
        assert found[2].stride() == moved.stride()
    assert clf.cost.forwards > before
    assert sum(part["programs"] for part in twin.describe_twins(clf).values()) == 1


def test_program_that_disagrees_or_fails_leaves_the_twin_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    clf = Classifier(seasoned(Small()))
    y = clf.logits(POINTS).argmax(1)
    made = make_twin(clf, POINTS)
    assert made is not None
    monkeypatch.setattr(
        programs, "_compiled", lambda graph: lambda *given: [2 * out for out in graph(*given)]
    )
    with pytest.warns(RobustWarning, match="could not be compiled .*off by"):
        assert not made.compile(losses.cross_entropy, POINTS, y=y)
    assert made.gradient(losses.cross_entropy, POINTS, y=y) is None

    def broken(graph: object) -> None:
        raise OSError("no compiler here")

    monkeypatch.setattr(programs, "_compiled", broken)
    with pytest.warns(RobustWarning, match="no compiler here"):
        assert not made.compile(None, POINTS)


@pytest.mark.parametrize("name", ["pgd", "apgd-t", "fab-t", "square"])
def test_compiled_attack_finds_what_the_plain_one_finds(name: str) -> None:
    clf = load_model("zoo:digits")
    x, y = _digits(80)
    fields = {"queries": 60} if name == "square" else {"steps": 8}
    attack = get(name)(threat=Linf(0.08), until="broken", **fields)
    plain = attack.run(clf, x, y, precision="original")
    fast = attack.run(clf, x, y, precision="float32", compiled=True)
    assert sum(part["programs"] for part in twin.describe_twins(clf).values()) >= 1
    assert int((fast.success != plain.success).sum()) <= 2
    claimed = len(x)  # the original looks at what the twin found
    assert abs(fast.cost.forwards - plain.cost.forwards) <= 0.1 * plain.cost.forwards + claimed


def test_unknown_precision_is_one_line() -> None:
    clf = Classifier(seasoned(Small()))
    with pytest.raises(RobustError, match="unknown precision 'float16'"):
        get("pgd")(threat=Linf(0.1))(clf, POINTS, torch.zeros(16, dtype=torch.long), precision="float16")


def _digits(n: int) -> tuple[Tensor, Tensor]:
    from robust import load_data

    return load_data("digits", n=n).tensors()
