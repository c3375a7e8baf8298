"""Square attack: random search over squares (Andriushchenko et al. 2020, arXiv:1912.00049; in l1 arXiv:2103.01208)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Knowledge
from robust.attacks.blackbox.pyramids import bump_table, grid_start, window_values
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, choose
from robust.attacks.trial import Trial
from robust.errors import DataError, RobustError
from robust.losses import get as get_loss
from robust.rng import Draws

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_CHUNK = 64  # steps whose draws are made at once
# A proposal that changes nothing needs no answer: where 1 row in so many has one, they try the next.
_IDLE = 8


def area_fraction(step: Tensor, p_init: float, rescale: float) -> Tensor:
    """The fraction of pixels a square covers at a step: p_init, halved at the paper's nine steps of 10,000."""
    scaled = (step * rescale).floor()
    passed = sum((scaled > mark).float() for mark in _HALVINGS)
    return p_init * torch.pow(2.0, -torch.as_tensor(passed))


class SquareRule(Rule):
    """Section 3 of the paper, every row with its own square; a proposal stays if it raises the margin loss.

    No bfloat16 twin screens the proposals. That was measured on a CIFAR ResNet-20: its noise, 0.07 of the margin, is as
    large as what a late proposal changes, so a screen that lost a tenth of the improvements still passed on a third of
    the proposals, and saved a fifth of the time.
    """

    def __init__(
        self, setting: Setting, queries: int, p_init: float, rescale: bool, shape: tuple[int, ...]
    ) -> None:
        super().__init__(setting)
        self.steps, self.p_init = queries, p_init
        self.passes = 1
        self.rescale = 10_000 / queries if rescale else 1.0
        self.channels, self.height, self.width = shape
        self.loss = get_loss("margin")
        area = area_fraction(torch.arange(queries + 2), p_init, self.rescale) * self.height * self.width
        self.sides = self._sides(area.sqrt().round().long()).to(torch.long)

    def _sides(self, wished: Tensor) -> Tensor:
        """(S,) side of the square at each step, from the square root of its area."""
        return wished.clamp(1, min(self.height, self.width))

    def numbers(self) -> int:
        """Random words a step takes: two corners and a sign per channel."""
        return 2 + self.channels

    def start(self, state: State) -> State:
        """Vertical stripes at the ball's edge."""
        x, own = state["x"], super().start(state)
        stripes = self.setting.draws(state, "square-start").signs(self.channels, 1, self.width).to(x)
        own["at"] = self._inside(x + self.setting.eps(state) * stripes, state)
        own["kept"] = x.clone()
        own["kept_loss"] = torch.full((len(x),), -torch.inf, device=x.device)
        own["drawn"] = torch.zeros_like(own["t"])
        own["words"] = self._draw(state, own["t"])
        return own

    def _draw(self, state: State, step: Tensor) -> Tensor:
        """(B, chunk, numbers) words for steps step … step + chunk − 1; made in one call, keyed per step."""
        identity = state["identity"].repeat_interleave(_CHUNK)
        steps = (step[:, None] + torch.arange(_CHUNK, device=step.device)).flatten()
        words = Draws(self.setting.seed, "square", identity, steps).bits(self.numbers())
        return words.view(len(step), _CHUNK, -1)

    def _inside(self, points: Tensor, state: State) -> Tensor:
        return self.setting.ball(state).project(points, state["x"], self.setting.bounds)

    def query(self, state: State) -> Query:
        """The proposal's scores."""
        return Query(state["at"], "logits", loss=self.loss)

    def step(self, state: State, answer: Answer) -> State:
        """Keeps the proposal where it is better, and makes the next one."""
        assert answer.loss is not None
        better = answer.loss > state["kept_loss"]
        changed: State = {
            "kept": choose(better, state["at"], state["kept"]),
            "kept_loss": torch.where(better, answer.loss, state["kept_loss"]),
            "t": state["t"] + 1,
        }
        new = self._proposed({**state, **changed})
        same = (new["at"] == changed["kept"]).flatten(1).all(1) & (new["t"] < self.steps)
        if int(same.sum()) * _IDLE > len(same):
            new = self._proposed(new | {"t": new["t"] + same})
        return changed | {name: new[name] for name in ("at", "t", "drawn", "words")}

    def _proposed(self, state: State) -> State:
        """The state with the proposal of each row's step, and fresh words where they have run out."""
        if bool((state["t"] - state["drawn"] >= _CHUNK).any()):
            state |= {"drawn": state["t"], "words": self._draw(state, state["t"])}
        return state | {"at": self._inside(self.propose(state), state)}

    def words(self, state: State) -> Tensor:
        """(B, numbers) words of each row's step."""
        offset = (state["t"] - state["drawn"])[:, None, None].expand(-1, 1, state["words"].shape[2])
        return state["words"].gather(1, offset)[:, 0]

    def side(self, state: State) -> Tensor:
        """(B,) side of each row's square."""
        self.sides = self.sides.to(state["t"].device)
        return self.sides[state["t"].clamp_max(self.steps)]  # rows that pad the batch run on

    def corner(self, words: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) top and left of a square, uniform over the places where it fits."""
        top = (words[:, 0] * (self.height - side + 1)) >> 32
        left = (words[:, 1] * (self.width - side + 1)) >> 32
        return top, left

    def propose(self, state: State) -> Tensor:
        """linf: every channel of the square moves by 2 eps up or down (then is cut back to the ball's edge)."""
        words, side = self.words(state), self.side(state)
        top, left = self.corner(words, side)
        signs = (words[:, 2:] >> 31).float().mul(2).sub(1)[:, :, None, None]
        move = signs * (2 * self.setting.eps(state)) * _covered(top, side, self.height)[:, None, :, None]
        return torch.addcmul(state["kept"], move, _covered(left, side, self.width)[:, None, None, :])


def _covered(first: Tensor, side: Tensor, length: int) -> Tensor:
    """(B, length) 1 on the lines first … first + side − 1, else 0."""
    lines = torch.arange(length, device=first.device)[None] - first[:, None]
    return ((lines >= 0) & (lines < side[:, None])).float()


class BumpSquareRule(SquareRule):
    """The l2 form (paper, alg. 3), and the l1 form of Croce & Hein 2021: mass moves from one window to another.

    Each window's new content is its normalised old content plus a signed bump; the budget it gets is its own mass,
    the mass taken from the second window, and what the ball has left.
    """

    def __init__(
        self, setting: Setting, queries: int, p_init: float, rescale: bool, shape: tuple[int, ...]
    ) -> None:
        self.power = 2 if setting.threat.norm == "l2" else 1
        super().__init__(setting, queries, p_init, rescale, shape)
        self.table = bump_table(self._largest(), self.power)

    def _largest(self) -> int:
        side = round(math.sqrt(self.p_init * self.height * self.width))
        return self._odd(min(side, self.height, self.width))

    def _odd(self, side: int) -> int:
        side = max(side, 3) | 1
        return side if side <= min(self.height, self.width) else max(min(self.height, self.width) - 1 | 1, 1)

    def numbers(self) -> int:
        """Two windows, a turn, and a sign per channel."""
        return 5 + self.channels

    def start(self, state: State) -> State:
        """A grid of signed bumps at the ball's edge."""
        own = super().start(state)
        x = state["x"]
        tiles = grid_start(self.height, self.width, self.power).to(x)
        signs = self.setting.draws(state, "square-grid").signs(self.channels, 5, 5).to(x)
        own["at"] = self._scaled(x, grid_signs(tiles, signs), state)
        return own

    def _length(self, delta: Tensor, dims: tuple[int, ...]) -> Tensor:
        powered = delta.abs() if self.power == 1 else delta.square()
        total = powered.sum(dims, keepdim=True)
        return total if self.power == 1 else total.sqrt()

    def _scaled(self, x: Tensor, delta: Tensor, state: State) -> Tensor:
        """x plus delta at the ball's edge, cut to ball ∩ box."""
        length = self._length(delta, (1, 2, 3)).clamp_min(1e-12)
        return self._inside(x + delta / length * self.setting.eps(state), state)

    def _sides(self, wished: Tensor) -> Tensor:
        """Odd sides of at least 3 pixels, where the image has them."""
        return (wished.clamp_min(3) | 1).clamp_max(self._largest())

    def propose(self, state: State) -> Tensor:
        """One exchange of mass between two windows."""
        x, words, side = state["x"], self.words(state), self.side(state)
        delta = state["kept"] - x
        bump, first = window_values(self.table, side, self.corner(words, side), words[:, 4], x.shape[-2:])
        second = window_values(self.table, side, self.corner(words[:, 2:], side), words[:, 4], x.shape[-2:])[
            1
        ]
        signs = (words[:, 5:] >> 31).float().mul(2).sub(1)[:, :, None, None]
        eps = self.setting.eps(state)
        either = torch.maximum(first, second)
        old = delta * first
        fresh = bump * signs + old / self._length(old, (2, 3)).clamp_min(1e-12)
        fresh = fresh * first
        fresh = fresh / self._length(fresh, (2, 3)).clamp_min(1e-12)
        taken = self._length(delta * either, (2, 3))
        whole = self._length(delta, (1, 2, 3))
        spare = (eps.pow(self.power) - whole.pow(self.power)).clamp_min(0) / x.shape[1]
        budget = (spare + taken.pow(self.power)).pow(1 / self.power)
        moved = delta * (1 - either) + fresh * budget
        return self._scaled(x, moved, state)


def grid_signs(tiles: Tensor, signs: Tensor) -> Tensor:
    """(B, C, H, W): the bumps of `tiles` (25, H, W), one of a 5 × 5 grid each, with signs (B, C, 5, 5)."""
    return torch.einsum("bck,khw->bchw", signs.flatten(2), tiles)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack (Andriushchenko et al. 2020, arXiv:1912.00049; in l1 Croce & Hein 2021, arXiv:2103.01208).

    A score-based random search that needs no gradient, batched over the samples.

    Attributes:
        queries: the most queries per sample and restart.
        restarts: independent searches.
        p_init: the first square's share of the image.
        rescale: stretch the schedule of square sizes, made for 10,000 queries, over `queries`; AutoAttack does not.
    """

    knowledge: ClassVar[Knowledge] = "score"
    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8
    rescale: bool = False

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.queries < 1 or self.restarts < 1 or not 0 < self.p_init <= 1:
            raise RobustError(
                f"queries={self.queries}, restarts={self.restarts}, p_init={self.p_init}: at least 1, 1, and in (0, 1]"
            )
        if trial.x.dim() != 4:
            raise DataError(f"square needs images (N, C, H, W); x is {tuple(trial.x.shape)}")
        kind = SquareRule if self.threat.norm == "linf" else BumpSquareRule
        rule = kind(setting_of(trial), self.queries, self.p_init, self.rescale, tuple(trial.x.shape[1:]))
        run_rule(rule, trial, make_jobs(trial, self.restarts))
