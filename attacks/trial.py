"""What an attack works on: samples, the subject's answers, and the best point of every sample so far.

A `Trial` counts, verifies claims on the original model in float32, and tells which samples still need work. The
engine runs stepwise rules on it; a method that is no stepwise rule asks `answer` and `offer` itself. Where a twin
answers in the original's place, the original confirms what counts as found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robust.attacks.query import Answer, Query, ask, join, out_of_memory, prepare, split
from robust.classifier import FLOAT_NOISE, Classifier, clear, misclassified
from robust.decide import decide
from robust.errors import RobustError
from robust.oracle import Oracle
from robust.rng import derive, seeded
from robust.targets import named_targets
from robust.track import Track
from robust.twin import Twin, make_twin

if TYPE_CHECKING:
    from robust.attacks.base import Attack

Hook = Callable[[float], None]
Veto = Callable[[Tensor, Tensor], Tensor]


class Trial:
    """The state of one attack on N samples.

    Attributes:
        x, y, index: the samples, on the model's device, x in float32; `targets` (N,) or None.
        found: (N,) bool: a point inside the threat is misclassified, clearly in "broken" and "smallest".
    """

    def __init__(
        self,
        attack: Attack,
        model: Classifier | Oracle,
        x: Tensor,
        y: Tensor,
        *,
        targets: Tensor | None = None,
        seed: int = 0,
        index: Tensor | None = None,
    ) -> None:
        device = model.device
        self.model, self.threat, self.until, self.seed = model, attack.threat, attack.until, seed
        self.bounds = model.bounds
        self.x, self.y = x.to(device, torch.float32), y.to(device).long()
        self.targets = None if targets is None else targets.to(device).long()
        self.index = torch.arange(len(x)) if index is None else index.cpu().long()
        self.best = self.x.clone()
        self.hit = torch.zeros(len(x), dtype=torch.bool, device=device)
        self.sure = torch.zeros_like(self.hit)
        self.score = torch.full((len(x),), -torch.inf, device=device)
        self.told = torch.zeros_like(self.hit)  # the original itself has called `best` misclassified, clearly
        self.queries = 0
        self.counting = attack.knowledge != "white"
        self.spent = torch.zeros(len(x), dtype=torch.long, device=device)  # points asked about each sample
        self.mask: Tensor | None = None  # (N, C, H, W) bool: where a sample may change
        self.begin: Tensor | None = None  # (N, C, H, W) where rules start that start beyond the boundary
        self.track: Track | None = None
        self.notes: dict[str, float] = {}
        self.hook: Hook | None = None
        self._clean: Tensor | None = None
        self._wrong: tuple[Tensor, Tensor] | None = None
        self.precision = "original"
        self.twin: Twin | None = None  # answers in the model's place
        self.compiled: bool | None = None  # whether its answers are compiled; None where the work repays it
        self.bare = False  # nothing is asked but what the search asks: no clean points offered, no last word
        self.most = 1 << 30  # points at once; less after memory ran out
        self.veto: Veto | None = (
            None  # of points and their rows: which a detector stops, so that they are no hits
        )

    def name_targets(self, name: str | None) -> None:
        """Sets the classes that a name of `robust.targets` stands for; None leaves the targets as they are."""
        if name is None:
            return
        if name != "random" and isinstance(self.model, Oracle) and self.model.answers == "labels":
            raise RobustError(f"targets={name!r} needs scores, and the oracle gives labels; use 'random'")
        self.targets = named_targets(name, self.clean, self.y, self.seed, self.index)

    def use_twin(self, dtype: torch.dtype) -> bool:
        """Has a twin in this arithmetic answer from now on; False, and the original does, where there is none."""
        self.twin = make_twin(self.model, self.x, dtype) if isinstance(self.model, Classifier) else None
        return self.twin is not None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluation mode, and the model's own randomness keyed by the seed."""
        if not isinstance(self.model, Classifier):
            yield
            return
        keyed = (
            seeded(derive(self.seed, "model"), self.model.device) if self.model.randomised else nullcontext()
        )
        with self.model.session(), keyed:
            yield

    @property
    def clean(self) -> Tensor:
        """(N, K) scores of the clean points, asked for once."""
        if self._clean is None:
            twin, self.twin = self.twin, self.twin if self.bare else None
            parts = [self.answer(Query(part, "logits")).scores for part in self.x.split(64)]
            self._clean, self.twin = torch.cat(parts), twin
        return self._clean

    @property
    def wrong(self) -> tuple[Tensor, Tensor]:
        """(N,) bool twice: the clean point is a hit already, and clearly so; of a randomised model by its majority."""
        if self._wrong is None:
            twin, self.twin = self.twin, None
            self._wrong = self.judge(torch.arange(len(self.x), device=self.x.device), self.x, self.clean)
            self.twin = twin
            if self.veto is not None:
                passed = ~self.veto(self.x, torch.arange(len(self.x), device=self.x.device))
                self._wrong = self._wrong[0] & passed, self._wrong[1] & passed
        return self._wrong

    @property
    def classes(self) -> int:
        """The model's number of classes."""
        return self.model.classes if self.bare else self.clean.shape[1]

    def answer(
        self, query: Query, rows: dict[str, Tensor] | None = None, active: Tensor | None = None
    ) -> Answer:
        """The subject's answer, counted; see `query.ask`."""
        if len(query.x) <= self.most:
            try:
                answer, asked = ask(self.twin or self.model, query, rows or {}, active)
            except RuntimeError as error:
                if len(query.x) == 1 or not out_of_memory(error):
                    raise
                self.most = (len(query.x) + 1) // 2
            else:
                self.queries += asked
                return answer
        if self.x.device.type == "cuda":
            torch.cuda.empty_cache()
        parts = [
            self.answer(*part) for part in split(query, rows or {}, active, min(self.most, len(query.x)))
        ]
        return join(parts)

    def prepare(self, query: Query, rows: dict[str, Tensor]) -> None:
        """Has the twin compile what a query like this asks, if it should and has not yet."""
        if self.twin is not None and self.twin.compiling:
            prepare(self.twin, query, rows)

    def searching(self) -> bool:
        """Takes the clean points as the first offer; whether any sample still needs work."""
        if self.until == "strongest":
            return True
        hit, sure = self.wrong
        self.hit, self.sure = hit.clone(), sure.clone()
        self.told = self.sure.clone()
        self.score = torch.where(hit, 0.0, -torch.inf)
        return not bool(self.finished().all())

    def finished(self) -> Tensor:
        """(N,) bool: samples that need no further job."""
        if self.until == "broken":
            return self.sure
        if self.until == "smallest":
            return self.wrong[0]
        return torch.zeros_like(self.hit)

    def offer(self, rows: Tensor, points: Tensor, hit: Tensor, sure: Tensor, score: Tensor) -> None:
        """Keeps each point that beats the best of its sample: a sure hit before a marginal one before none, then score.

        Args:
            rows: (M,) positions, repeats allowed; points: (M, …) inside the threat.
            hit, sure: (M,) bool misclassified, and clearly so; score: (M,) larger is better.
        """
        held: dict[int, list[int]] = {}
        for m, row in enumerate(rows.tolist()):
            held.setdefault(row, []).append(m)
        ours = list(zip(hit.tolist(), sure.tolist(), score.tolist(), strict=True))
        known = (part[rows].tolist() for part in (self.hit, self.sure, self.score))
        theirs = list(zip(*known, strict=True))
        winners = [max(members, key=ours.__getitem__) for members in held.values()]
        better = torch.tensor(
            [m for m in winners if ours[m] > theirs[m]], device=rows.device, dtype=torch.long
        )
        places = rows[better]
        self.best[places] = points[better]
        self.hit[places], self.sure[places], self.score[places] = hit[better], sure[better], score[better]
        self.told[places] = sure[better] & (self.until == "broken")

    def judge(
        self, rows: Tensor, points: Tensor, scores: Tensor, waits: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Whether points are misclassified, and clearly so; a randomised model is asked for its majority.

        `waits` is whether the host may look at the device's numbers to spare work.
        """
        targets = None if self.targets is None else self.targets[rows]
        hit = misclassified(scores, self.y[rows], targets)
        if waits and not bool(hit.any()):
            return hit, hit
        noise = FLOAT_NOISE if self.twin is None else self.twin.noise
        sure = hit & clear(scores, self.y[rows], targets, noise)
        if isinstance(self.model, Classifier) and self.model.randomised and bool(hit.any()):
            some = hit.nonzero()[:, 0]
            index = self.index.to(rows.device)[rows[some]]
            majority = decide(
                self.model, points[some], self.y[rows[some]], targets_of(targets, some), index, self.seed
            )
            hit, sure = hit.clone(), sure.clone()
            hit[some], sure[some] = majority.hit, majority.hit
        return hit, sure

    def confirm(
        self, claims: Tensor, rows: Tensor, points: Tensor, hit: Tensor, sure: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`hit` and `sure` with the original's word on the rows of `claims` (B,), where a twin claimed them."""
        if self.twin is None or not bool(claims.any()):
            return hit, sure
        some = claims.nonzero()[:, 0]
        assert isinstance(self.model, Classifier)
        logits = torch.cat([self.model.logits(part) for part in points[some].split(64)])
        y, targets = self.y[rows[some]], targets_of(targets_of(self.targets, rows), some)
        hit, sure = hit.clone(), sure.clone()
        hit[some] = misclassified(logits, y, targets)
        sure[some] = hit[some] & clear(logits, y, targets)
        return hit, sure

    def recheck(self) -> None:
        """Has the original look at what a twin found and it has not told yet; what it denies was never found."""
        rows = torch.arange(len(self.x), device=self.x.device)
        found = self.hit & ~self.told
        self.hit, self.sure = self.confirm(found, rows, self.best, self.hit, self.sure)
        denied = found & ~self.hit
        self.told |= found & self.sure
        self.score = torch.where(denied, -torch.inf, self.score)
        self.best = torch.where(denied.view(-1, *[1] * (self.x.dim() - 1)), self.x, self.best)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The best points and whether the original model misclassifies them.

        It is asked once more, except where it has told so already.
        """
        if self.until == "strongest" and not self.bare:
            self._recall_clean()
        if self.bare or isinstance(self.model, Oracle):
            return self.best, self.hit
        rest = (~self.told).nonzero()[:, 0]
        index = self.index.to(self.x.device)[rest]
        targets = targets_of(self.targets, rest)
        verdict = decide(self.model, self.best[rest], self.y[rest], targets, index, self.seed)
        hit = self.told.clone()
        hit[rest] = verdict.hit
        if self.veto is not None:
            hit &= ~self.veto(self.best, torch.arange(len(hit), device=hit.device))
        success = hit & self.threat.inside(self.best, self.x, self.bounds)
        lost = ~success if self.until == "smallest" else torch.zeros_like(success)
        best = torch.where(lost.view(-1, *[1] * (self.x.dim() - 1)), self.x, self.best)
        return best, success

    def _recall_clean(self) -> None:
        """A sample whose search never beat nothing at all stays at its clean point."""
        never = self.score == -torch.inf
        self.best = torch.where(never.view(-1, *[1] * (self.x.dim() - 1)), self.x, self.best)

    def part(self, attack: Attack, rows: Tensor) -> Trial:
        """A trial of another attack on some of the samples, sharing this one's model and counts of clean points."""
        picked = targets_of(self.targets, rows)
        index = self.index[rows.cpu()]
        other = Trial(
            attack, self.model, self.x[rows], self.y[rows], targets=picked, seed=self.seed, index=index
        )
        other._clean = self.clean[rows]
        other._wrong = None if self._wrong is None else (self._wrong[0][rows], self._wrong[1][rows])
        other.hook, other.precision, other.compiled = self.hook, self.precision, self.compiled
        other.mask, other.begin = targets_of(self.mask, rows), targets_of(self.begin, rows)
        other.track = None if self.track is None else Track(self.track.mode)
        return other

    def absorb(self, rows: Tensor, other: Trial) -> None:
        """Takes what another trial found on `rows`, with its counts."""
        self.offer(rows, other.best, other.hit, other.sure, other.score)
        self.queries += other.queries
        self.spent[rows] += other.spent
        if self.track is not None and other.track is not None:
            self.track.take(other.track, rows)
        for name, count in other.notes.items():
            self.note(name, count)

    def note(self, name: str, count: float) -> None:
        """Adds to a count that doubts are raised from."""
        self.notes[name] = self.notes.get(name, 0.0) + count

    def progress(self, fraction: float) -> None:
        """Tells the hook, if any, how much of the attack is done."""
        if self.hook is not None:
            self.hook(fraction)


def targets_of(targets: Tensor | None, rows: Tensor) -> Tensor | None:
    """Some rows of targets that may be absent."""
    return None if targets is None else targets[rows]
