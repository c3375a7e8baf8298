"""Transfer: points crafted on models that the attacker has, and judged by the one under attack."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor

from robust.attacks.base import Attack, Knowledge
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State
from robust.attacks.transfer.ensembles import How, Members, ensemble
from robust.attacks.transfer.pairs import queried_pairs
from robust.attacks.transfer.substitutes import Lesson, distil, untrained
from robust.attacks.trial import Trial, targets_of
from robust.classifier import Classifier
from robust.errors import ModelError, RobustError, ThreatError
from robust.losses import cross_entropy
from robust.models.named import parse_model
from robust.oracle import Oracle
from robust.registry import room
from robust.rng import derive, seeded
from robust.rows import Source

if TYPE_CHECKING:
    from robust.twin import Precision


class Judged(Rule):
    """One question for each sample: does the target misclassify the point that was made for it?"""

    passes = 1
    steady = True
    loss = staticmethod(cross_entropy)

    def __init__(self, setting: Setting, points: Tensor) -> None:
        super().__init__(setting)
        self.points = points

    def query(self, state: State) -> Query:
        """The points, by the sample's place."""
        return Query(self.points[state["row"]], "logits", loss=cross_entropy)

    def step(self, state: State, answer: Answer) -> State:
        """Done after one answer."""
        return {"t": state["t"] + 1}


@dataclass(frozen=True, kw_only=True)
class Surrogate(Attack):
    """Transfer from surrogates, given or distilled from queries (Papernot et al. 2017, arXiv:1602.02697).

    White-box attacks make a point for every sample on the surrogate, an ensemble where there are several; the target
    is asked once about each, and keeps what it misclassifies. Without `models`, a substitute is distilled from the
    target's own answers first. `prepare` does that once, on images that the attacker has (`evaluate` and `robust
    attack` give the samples under attack, without labels); `run` alone does it anew each time, on synthetic images. It
    costs exactly `queries`, whatever the number of samples, on top of one query a sample and inner attack, and one for
    the clean point. The surrogates' own passes are in the notes, not in the target's counts.

    Attributes:
        inner: the white-box attacks by their registry names, a comma list; each on what is left.
        steps: of those that have steps; other fields of theirs keep their defaults.
        models: Classifiers, or texts as `robust.models.named.parse_model` reads them; none for a substitute.
        ensemble: what is averaged over several models: "logits", "probabilities" or "loss".
        queries: pairs asked of the target for a substitute, at least 2.
        architecture: of the substitute, see `robust.attacks.transfer.substitutes.Lesson`.
        epochs: of its training.
        temperature: of the distilled scores.
    """

    knowledge: ClassVar[Knowledge] = "transfer"
    heuristic: ClassVar[bool] = True
    inner: str = "mifgsm,difgsm,vmifgsm"
    steps: int = 10
    models: tuple[Any, ...] = ()
    ensemble: How = "logits"
    queries: int = 1000
    architecture: str = "auto"
    epochs: int = 30
    temperature: float = 1.0

    @property
    def names(self) -> list[str]:
        """The inner attacks."""
        return _names(self.inner)

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """Those of the inner attacks on the surrogate, and one of the target for each."""
        steps: int = chosen.get("steps", cls.steps)
        kinds = [room("attacks").load(name) for name in _names(chosen.get("inner", cls.inner))]
        return float(sum(1 + kind.passes(**_steps(kind, steps)) for kind in kinds))

    def preparation(self) -> int:
        """See `Attack.preparation`."""
        return 0 if self.models else self.queries

    def validate(self, model: Classifier | Oracle, x: Tensor, y: Tensor, targets: Tensor | None) -> None:
        """See `Attack.validate`."""
        super().validate(model, x, y, targets)
        self._check()
        if isinstance(model, Oracle) and model.left < self.preparation() + len(x):
            raise RobustError(
                f"the query budget has {int(model.left)} left, but a substitute needs {self.preparation()} and "
                f"{len(x)} samples one each; lower queries, or give surrogate models"
            )
        for member in self.models:
            if isinstance(member, Classifier) and member.bounds != model.bounds:
                raise ModelError(
                    f"the surrogate {member.name} has bounds={member.bounds}, the target {model.bounds}; "
                    "give one of the same box"
                )

    def _check(self) -> None:
        """Raises one line for hyper-parameters that no search can have."""
        if not self.names or self.steps < 1:
            raise RobustError(
                f"inner={self.inner!r}, steps={self.steps}: name an attack, and at least 1 step"
            )
        for name in self.names:
            kind = room("attacks").load(name)
            if kind.knowledge != "white" or kind.minimum_norm or kind.semantic:
                raise RobustError(
                    f"inner={name!r} cannot be crafted with; use a white-box attack of a fixed budget, as mifgsm"
                )
            if self.threat.norm not in kind.norms:
                raise ThreatError(f"{name} has no {self.threat.norm} form; it knows {', '.join(kind.norms)}")
        if not self.models and (self.queries < 2 or self.epochs < 1):
            raise RobustError(
                f"queries={self.queries}, epochs={self.epochs}: a substitute needs at least 2, and 1"
            )
        self._lesson(0)

    def prepare(
        self,
        model: Classifier | Oracle,
        pool: Tensor | Source,
        *,
        seed: int = 0,
        known: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """The attack with its one surrogate: the given models fused, or a substitute; see `Attack.prepare`."""
        if self.models:
            return replace(self, models=(self._given(model),))
        self._check()
        first = pool[:1] if isinstance(pool, Tensor) else pool.batch([0])[0]
        shape = tuple(first.shape[1:])
        substitute = (
            self._learn(model, pool, shape, seed) if not known else self._recall(model, shape, known, seed)
        )
        return replace(self, models=(substitute,))

    def learned(self) -> dict[str, Tensor]:
        """The substitute's weights, normalisation and number of classes."""
        [clf] = self.models
        state = {name: value.detach().cpu().clone() for name, value in clf.module.state_dict().items()}
        about = {"mean": clf.mean.flatten(), "std": clf.std.flatten(), "classes": torch.tensor(clf.classes)}
        return state | {f"#{name}": value.cpu() for name, value in about.items()}

    def _recall(
        self, model: Classifier | Oracle, shape: tuple[int, ...], known: Mapping[str, Tensor], seed: int
    ) -> Classifier:
        """The substitute that `learned` has told of."""
        statistics = known["#mean"].tolist(), known["#std"].tolist()
        classes = int(known["#classes"])
        clf = untrained(shape, classes, self._lesson(seed), model.bounds, statistics, model.device)
        clf.module.load_state_dict({name: value for name, value in known.items() if name[0] != "#"})
        return clf

    def config(self) -> dict[str, Any]:
        """See `Attack.config`; classifiers are told by their digests."""
        models = tuple(clf.digest() if isinstance(clf, Classifier) else clf for clf in self.models)
        return {**super().config(), "models": models}

    def _lesson(self, seed: int) -> Lesson:
        return Lesson(
            architecture=self.architecture, epochs=self.epochs, temperature=self.temperature, seed=seed
        )

    def _learn(
        self, model: Classifier | Oracle, pool: Tensor | Source | None, shape: tuple[int, ...], seed: int
    ) -> Classifier:
        """A substitute distilled from `queries` answers; what a randomised model draws is keyed."""
        oracle = Oracle(model) if isinstance(model, Classifier) else model
        random = isinstance(model, Classifier) and model.randomised
        with seeded(derive(seed, "substitute", "model"), model.device) if random else nullcontext():
            pairs = queried_pairs(oracle, pool, self.queries, seed=seed, shape=shape)
        return distil(pairs, bounds=model.bounds, device=model.device, lesson=self._lesson(seed))

    def _given(self, model: Classifier | Oracle) -> Classifier:
        """The given models as one, in the target's box."""
        members = [
            member
            if isinstance(member, Classifier)
            else parse_model(str(member)).load(bounds=model.bounds, device=model.device)
            for member in self.models
        ]
        return ensemble(members, self.ensemble)

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        setting = setting_of(trial)
        if self.models:
            clf = self._given(trial.model)
        else:
            clf = self._learn(trial.model, None, tuple(trial.x.shape[1:]), trial.seed)
            trial.queries += self.queries
        _check_classes(clf, trial)
        before, precision = replace(clf.cost), trial.precision
        trial.precision = "original"  # one pass of the target for each point repays no twin
        for name in self.names:
            rows = (~trial.finished()).nonzero()[:, 0]
            if len(rows) == 0 or trial.notes.get("budget_spent"):
                break
            points = trial.x.clone()
            points[rows] = self._craft(name, clf, trial, rows, precision)
            jobs = make_jobs(trial)
            run_rule(Judged(setting, points), trial, jobs.take(rows.to(jobs.row.device)))
        trial.note("surrogate_forwards", clf.cost.forwards - before.forwards)
        trial.note("surrogate_backwards", clf.cost.backwards - before.backwards)

    def _craft(self, name: str, clf: Classifier, trial: Trial, rows: Tensor, precision: str) -> Tensor:
        """(M, C, H, W) the strongest points on the surrogate for some of the samples."""
        kind = room("attacks").load(name)
        inner: Attack = kind(threat=trial.threat.take(rows), **_steps(kind, self.steps))
        result = inner.run(
            clf,
            trial.x[rows],
            trial.y[rows],
            targets=targets_of(trial.targets, rows),
            seed=trial.seed,
            index=trial.index[rows.cpu()],
            mask=targets_of(trial.mask, rows),
            precision=cast("Precision", precision),
        )
        return result.x_adv


def _names(inner: str) -> list[str]:
    return [part.strip() for part in inner.split(",") if part.strip()]


def _steps(kind: type[Attack], steps: int) -> dict[str, int]:
    """`steps` as the field of an inner attack, where it has one."""
    return {"steps": steps} if "steps" in kind.__dataclass_fields__ else {}


def _check_classes(clf: Classifier, trial: Trial) -> None:
    """Raises one line for a surrogate that answers with other classes than the target."""
    width = clf.logits(trial.x[:1]).shape[1]
    if isinstance(clf.module, Members) and clf.module.how == "loss":
        width -= 1
    if width != trial.classes:
        raise ModelError(
            f"the surrogate {clf.name} has {width} classes, the target {trial.classes}; give one of the same classes"
        )
