"""A step of private training against a plain one, opacus's modes and a short loop of torch.func, in one run."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.defenses.privacy import make_private
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    alternate,
    fastest,
    ratios,
    timing_row,
)

PLAIN, OURS, VMAP = "plain", "ours", "vmap loop"
MODES = {"opacus-hooks": "hooks", "opacus-functorch": "functorch", "opacus-ew": "ew", "opacus-ghost": "ghost"}
NOISE, BOUND, RATE = 1.0, 1.0, 0.01
_ERROR = 1e-4  # of our clipped sum against a float64 loop, relative
_CHECKED = 8  # samples of that loop


@dataclass(frozen=True)
class Subject:
    """A network, the shape of its inputs and how many it gets in a step."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batch: int


def small_cnn() -> nn.Module:
    """The network of opacus's MNIST example: 26,010 parameters."""
    first = [nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)]
    second = [nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(16, after), nn.GroupNorm(16, after)])
        self.short: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.short = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(16, after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's two convolutions and its shortcut."""
        inner = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(inner + self.short(x))


def resnet20_gn() -> nn.Module:
    """ResNet-20 with GroupNorm of 16 groups: 272,474 parameters with its shortcuts."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(16, 16), nn.ReLU()]
    before = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for number in range(3):
            layers.append(_Block(before, width, stride if number == 0 else 1))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


SUBJECTS = {"cnn": Subject(small_cnn, (1, 28, 28), 256), "resnet20": Subject(resnet20_gn, (3, 32, 32), 128)}


@dataclass(frozen=True)
class Private(Benchmark):
    """Steps of DP-SGD: ours, opacus's modes and fifteen lines of torch.func, beside a plain step of SGD.

    A small CNN on MNIST's shapes, 256 samples a step, and ResNet-20 with GroupNorm on CIFAR's, 128: float32,
    contiguous, flat clipping, noise, no Poisson sampling, everybody the same batch.

    Attributes:
        subjects: by name; all by default.
        layout: of inputs and weights, for everybody.
    """

    name: ClassVar[str] = "privacy"
    peers: ClassVar[tuple[str, ...]] = tuple(MODES)
    samples: ClassVar[int] = 0
    rounds: ClassVar[int] = 15
    subjects: tuple[str, ...] = tuple(SUBJECTS)
    layout: torch.memory_format = torch.contiguous_format

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        wanted = [name for name in MODES if not work.only or name in work.only]
        skipped = {}
        if importlib.util.find_spec("opacus") is None:
            skipped = {name: f"{name}: opacus is not installed" for name in wanted}
            wanted = []
        timings: dict[str, Any] = {}
        order: list[str] = []
        faster: dict[str, Any] = {}
        costs: dict[str, Any] = {}
        best: dict[str, str | None] = {}
        for name in self.subjects:
            task = _Task(SUBJECTS[name], work, self.layout)
            entries = [
                Contestant(f"{name}, {PLAIN}", task.plain()),
                Contestant(f"{name}, {OURS}", task.ours(), ours=True, check=task.judge),
                Contestant(f"{name}, {VMAP}", task.vmap()),
            ]
            for peer in wanted:
                try:
                    step = task.peer(MODES[peer])
                    with hushed():
                        step()
                except Exception as error:  # noqa: BLE001  a peer's own code
                    skipped[f"{name}, {peer}"] = f"{name}, {peer}: {type(error).__name__}"
                    continue
                entries.append(Contestant(f"{name}, {peer}", step))
            with hushed():
                found, turns = alternate(entries, work.repeats, work.device, work.say)
            timings |= found
            order += turns
            ours, plain, *rivals = [one.name for one in (entries[1], entries[0], *entries[2:])]
            costs |= {one.name: ratios(found, {plain: one.name})[plain] for one in entries[1:]}
            best[name] = fastest(found, [rival for rival in rivals if VMAP not in rival])
            if best[name] is not None:
                faster |= ratios(found, {ours: str(best[name])})
        return {
            "dp": {
                "noise_multiplier": NOISE,
                "max_grad_norm": BOUND,
                "clipping": "flat",
                "layout": str(self.layout),
            },
            "subjects": {
                name: {"batch": SUBJECTS[name].batch, "shape": SUBJECTS[name].shape} for name in self.subjects
            },
            "contestants": timings,
            "order": order,
            "costs": costs,
            "best_peer": best,
            "ratios": faster,
            "skipped": skipped,
        }

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        heads = ["step of", "seconds", "first call", "of a plain step", "faster than opacus's best", "error"]
        rows = []
        for name, timing in record["contestants"].items():
            cost, ratio = record["costs"].get(name), record["ratios"].get(name)
            cells = timing_row({**record, "ratios": {}}, name)[:3]
            cells += [
                "" if cost is None else f"{cost['median']:.2f}×",
                "" if ratio is None else f"{ratio['median']:.2f}×",
            ]
            rows.append([*cells, f"{timing['error']:.1e}" if "error" in timing else ""])
        return heads, rows


class _Task:
    """One batch and one network for everybody, each on a copy of its own."""

    def __init__(self, subject: Subject, work: Work, layout: torch.memory_format) -> None:
        torch.manual_seed(work.seed)
        self.model = subject.make().to(work.device, memory_format=layout)  # type: ignore[call-overload]
        self.x = torch.rand(subject.batch, *subject.shape).to(work.device, memory_format=layout)
        self.y = torch.randint(0, 10, (subject.batch,)).to(work.device)

    def copy(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The network before its first step, and SGD over it."""
        model = copy.deepcopy(self.model).train()
        return model, torch.optim.SGD(model.parameters(), RATE)

    def loop(self, model: Any, optimizer: Any, criterion: Any = F.cross_entropy) -> Callable[[], Any]:
        """A step as people write it."""

        def call() -> None:
            optimizer.zero_grad()
            criterion(model(self.x), self.y).backward()
            optimizer.step()

        return call

    def plain(self) -> Callable[[], Any]:
        """A step without privacy."""
        return self.loop(*self.copy())

    def ours(self) -> Callable[[], Any]:
        """A step of this toolkit."""
        model, optimizer = self.copy()
        batch = len(self.x)
        _, private, _ = make_private(
            model, optimizer, None, noise_multiplier=NOISE, max_grad_norm=BOUND, expected_batch_size=batch
        )
        return self.loop(model, private)

    def judge(self, _: Any) -> dict[str, Any]:
        """Our clipped sum must be that of a loop over samples in float64."""
        model, optimizer = self.copy()
        x, y = self.x[:_CHECKED], self.y[:_CHECKED]
        expected = loop_sum(model, x, y)
        _, private, _ = make_private(
            model, optimizer, None, noise_multiplier=0, max_grad_norm=BOUND, expected_batch_size=1
        )
        F.cross_entropy(model(x), y).backward()
        private.step()
        found = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        error = float((found - expected).norm() / expected.norm())
        if not error <= _ERROR:
            raise WrongResult(f"ours: its clipped sum is {error:.1e} from a loop's over samples in float64")
        return {"error": error}

    def peer(self, mode: str) -> Callable[[], Any]:
        """A step of opacus in one of its modes."""
        with hushed():
            from opacus import PrivacyEngine

            model, optimizer = self.copy()
            data = torch.utils.data.TensorDataset(self.x, self.y)
            loader = torch.utils.data.DataLoader(data, len(self.x))
            ghost: dict[str, Any] = {"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}
            made = PrivacyEngine().make_private(
                module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=NOISE, max_grad_norm=BOUND,
                poisson_sampling=False, grad_sample_mode=mode, **ghost,
            )  # fmt: skip
        return self.loop(made[0], made[1], made[2] if mode == "ghost" else F.cross_entropy)

    def vmap(self) -> Callable[[], Any]:
        """DP-SGD as torch.func's tutorial leads to it."""
        model, optimizer = self.copy()
        parameters = dict(model.named_parameters())

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, values, (x[None],)), y[None])

        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

        def call() -> None:
            values = {name: p.detach() for name, p in parameters.items()}
            gradients = each(values, self.x, self.y)
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
            factors = (BOUND / (norms + 1e-6)).clamp(max=1)
            for name, p in parameters.items():
                summed = torch.einsum("b,b...->...", factors, gradients[name])
                p.grad = (summed + NOISE * BOUND * torch.randn_like(p)) / len(self.x)
            optimizer.step()

        return call


def loop_sum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Σ min(1, bound / ‖g‖) g over samples, by a loop in float64, as one vector."""
    exact = copy.deepcopy(model).double()
    rows: Sequence[int] = range(len(x))
    total = torch.zeros(sum(p.numel() for p in exact.parameters()), dtype=torch.float64, device=x.device)
    for row in rows:
        value = F.cross_entropy(exact(x[row : row + 1].double()), y[row : row + 1])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(exact.parameters()))])
        total += gradient * min(1.0, BOUND / float(gradient.norm()))
    return total


@contextmanager
def hushed() -> Iterator[None]:
    """Silences what opacus warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
