"""The one loop of all stepwise attacks: fixed batch shapes, refilled from a queue of jobs.

Rows that finish hand their best point to the trial and take the next job; once a sample is broken (or finished) its
other jobs are cancelled. Batches keep one of a few sizes and are padded, so that numbers do not depend on how many
rows are left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robust.attacks.query import Answer, Query
from robust.attacks.rule import Jobs, Rule, Setting, choose
from robust.attacks.seats import Seats
from robust.attacks.several import Points, answer_several, best_of, spread, within_budget
from robust.attacks.trial import Trial
from robust.classifier import Classifier
from robust.errors import BudgetExceeded
from robust.footprint import largest_batch, measure
from robust.rng import JOB_BITS
from robust.track import Track
from robust.twin import fast_bfloat16, worth_compiling

POLL = {"cpu": 1, "cuda": 8}  # turns between two looks at a device's flags
_REPORT_EVERY = 8
_WATCH_EVERY = 10
WORTH_A_TWIN = 5_000  # steps of single rows: what making and checking a twin costs is then a few percent


def buckets(trial: Trial, count: int | None = None) -> list[int]:
    """Batch sizes for a trial's model and samples, the largest first, from the model's measured footprint.

    With `count`, the jobs to come, the largest is no wider than an even share of the batches that they fill: 89 jobs
    in batches of at most 64 run as two of 48 and not as 64 and 25 padded to 64.
    """
    found = measure(trial.model, trial.x) if isinstance(trial.model, Classifier) else None
    largest = 32 if found is None else largest_batch(found, trial.x.device)
    if count:
        share = -(-count // -(-count // largest))
        largest = min(largest, max(-(-share // 4) * 4, 4))
    return sorted({largest, max(largest // 4, 4), 4}, reverse=True)


def setting_of(trial: Trial) -> Setting:
    """What a rule's rows share, from the trial."""
    return Setting(trial.threat, trial.bounds, trial.seed, trial.classes, trial.targets is not None)


def make_jobs(trial: Trial, restarts: int = 1, targets: Tensor | None = None) -> Jobs:
    """Jobs of every sample: target-major over (T, N) `targets`, then restarts; the trial's own target if it has one."""
    count = len(trial.x)
    device = trial.x.device
    if targets is None:
        goal = trial.targets if trial.targets is not None else torch.full((count,), -1, device=device)
        targets = goal[None]
    rounds = targets.repeat(restarts, 1)
    number = torch.arange(len(rounds), device=device)[:, None].expand(-1, count)
    rows = torch.arange(count, device=device).expand(len(rounds), -1)
    assert len(rounds) < 1 << JOB_BITS
    return Jobs(rows.flatten(), rounds.flatten(), number.flatten())


def run_rule(rule: Rule, trial: Trial, jobs: Jobs) -> None:
    """Runs all jobs to their end, a cancellation, or the end of the oracle's budget.

    As the trial's precision says, a bfloat16 twin scouts, a float32 twin decides, and the original confirms; on a bare
    trial whoever answers it has the only word.
    """
    if trial.bare:
        _Engine(rule, trial, jobs, limit=rule.steps - 1 if rule.looks_last else None).run()
        return
    precision, whole = _resolve(rule, trial, jobs), jobs
    if precision == "bfloat16" and rule.scouted and trial.use_twin(torch.bfloat16):
        jobs = _scout(rule, trial, jobs)
    if precision == "original" or not trial.use_twin(torch.float32):
        trial.twin = None
    if trial.until == "strongest":
        _offer_clean(rule, trial, whole)
    engine = _Engine(rule, trial, jobs)
    try:
        engine.run()
        _repeat_denied(rule, trial, jobs)
    except BudgetExceeded:
        engine.flush()
        trial.note("budget_spent", 1)


def _repeat_denied(rule: Rule, trial: Trial, jobs: Jobs) -> None:
    """Where the original denies the smallest perturbation that a twin found, the original itself searches."""
    if trial.until != "smallest" or trial.twin is None:
        return
    found = trial.hit.clone()
    trial.recheck()
    denied = found & ~trial.hit
    if bool(denied.any()):
        trial.note("twin_denied", int(denied.sum()))
        trial.twin = None
        _Engine(rule, trial, jobs.take(denied[jobs.row].nonzero()[:, 0])).run()


def _resolve(rule: Rule, trial: Trial, jobs: Jobs) -> str:
    """What "auto" stands for: twins where the work repays making them, scouts where bfloat16 is fast."""
    if trial.precision != "auto":
        return trial.precision
    if len(jobs.row) * rule.steps < WORTH_A_TWIN:
        return "original"
    return "bfloat16" if fast_bfloat16(trial.x.device) else "float32"


def _repays(rule: Rule, trial: Trial, work: int) -> bool:
    """Whether so many steps of rows are long enough for compiled programs, unless the trial says so itself."""
    if trial.compiled is not None:
        return trial.compiled
    if trial.x.device.type == "cuda":
        return work >= WORTH_A_TWIN
    found = measure(trial.model, trial.x) if isinstance(trial.model, Classifier) else None
    return found is not None and worth_compiling(work * rule.passes * found.flops, rule.passes > 1)


def _scout(rule: Rule, trial: Trial, jobs: Jobs) -> Jobs:
    """Lets the bfloat16 twin search first; returns the jobs of the samples that the original says still stand.

    Where a success is enough, scouts take a sample's first job and the first steps of it: they are there for the weak
    points. Else they do the whole work, which is repeated only where they fail.
    """
    enough = trial.until == "broken"
    first = jobs.take((jobs.number == 0).nonzero()[:, 0]) if enough else jobs
    scouts = _Engine(rule, trial, first, limit=max(5, rule.steps // 10) if enough else None)
    scouts.scouting = True
    scouts.run()
    trial.recheck()
    trial.twin = None
    return jobs.take((~trial.sure[jobs.row]).nonzero()[:, 0])


def _offer_clean(rule: Rule, trial: Trial, jobs: Jobs) -> None:
    """The clean points, so that no result is weaker than they are; `jobs` begin with one of each sample."""
    if rule.loss is None:
        return
    rows = torch.arange(len(trial.x), device=trial.x.device)
    target = jobs.target[: len(rows)]
    aimed = target if bool((target >= 0).all()) else None
    hit, sure = trial.judge(rows, trial.x, trial.clean)
    trial.offer(rows, trial.x, hit, sure, rule.loss(trial.clean, trial.y, aimed, trial.clean))


class _Engine:
    """One run of a rule over a queue.

    On a GPU nothing waits for the device between looks at its flags, `POLL` turns apart or when a row's steps are over.
    """

    def __init__(self, rule: Rule, trial: Trial, jobs: Jobs, limit: int | None = None) -> None:
        self.rule, self.trial = rule, trial
        self.limit = rule.steps if limit is None else min(limit, rule.steps)
        self.scouting = False
        count = int((~trial.finished()[jobs.row]).sum())
        if trial.twin is not None:
            trial.twin.compiling = _repays(rule, trial, len(jobs.row) * self.limit)
            count *= not trial.twin.compiling  # programs are made for few shapes
        self.seats = Seats(rule, trial, jobs, buckets(trial, count))
        smallest = trial.until == "smallest"  # the next step follows from each hit
        self.poll = 1 if smallest else POLL.get(trial.x.device.type, 1)

    def run(self) -> None:
        """Until no job is left."""
        turn, seats = 0, self.seats
        while seats.fill():
            self.rule.clock = seats.clock if self.rule.steady else None
            query = self._masked(self.rule.query(seats.state))
            points = within_budget(query, seats.state, self.rule.budget)
            answer = self._ask(query, points)
            self._track(query, points, answer, turn)
            self._count(points)
            if self.trial.track is not None:
                self._write(self.trial.track, points, answer)
            seats.state.update(self.rule.step(seats.state, answer))
            seats.clock += 1
            turn += 1
            self._look(turn)
            if turn % _REPORT_EVERY == 1:
                self._report()

    def _masked(self, query: Query) -> Query:
        """The query with every point as the sample is, except where it may change."""
        state = self.seats.state
        if "mask" not in state:
            return query
        each = len(query.x) // len(state["row"])
        x, mask = spread(state["x"], each), spread(state["mask"], each)
        return replace(query, x=torch.where(mask, query.x, x))

    def _ask(self, query: Query, points: Points) -> Answer:
        """The subject's answer; no gradient leads out of the mask."""
        seats, trial = self.seats, self.trial
        if points.plain:
            if len(seats.active) == seats.sizes[0]:
                trial.prepare(query, seats.state)
            answer = trial.answer(query, seats.state, seats.active)
        else:
            answer = answer_several(trial, query, points, seats.state, seats.active, seats.sizes[0])
        if "mask" in seats.state and answer.gradient is not None:
            mask = spread(seats.state["mask"], points.each)
            mask = mask[:, None] if answer.gradient.dim() > mask.dim() else mask
            answer = replace(answer, gradient=answer.gradient * mask)
        return answer

    def _count(self, points: Points) -> None:
        """Books what was asked, per job and per sample."""
        state, trial = self.seats.state, self.trial
        counts = points.counts(len(state["row"]))
        state["spent"] = state["spent"] + counts
        if trial.counting:
            trial.spent.index_add_(0, state["row"], counts * self.seats.active.to(state["row"]))

    def flush(self) -> None:
        """Hands over what the rows have, when the run ends early."""
        self._retire(self.seats.active.clone())

    def _look(self, turn: int) -> None:
        """Ends the rows that are done or, where that is enough, broken; between polls only those whose time is up."""
        seats, due = self.seats, turn % self.poll == 0
        over = torch.zeros_like(seats.active)
        if self.rule.steady:
            over = seats.clock >= self.limit
        elif due:
            over = self._done().cpu()
        over = over & seats.active
        if not due and not bool(over.any()):
            return
        if self.poll > 1:
            self._confirm_best()
        if self.trial.until == "broken":
            over |= seats.state["sure"].cpu() & seats.active
        self._retire(over)

    def _done(self) -> Tensor:
        return self.rule.done(self.seats.state) | (self.seats.state["t"] >= self.limit)

    # -- outcomes -----------------------------------------------------------------------------------------------

    def _track(self, query: Query, points: Points, answer: Answer, turn: int) -> None:
        """Keeps each row's best queried point: a clear hit before a marginal one before none, then the score."""
        trial, state, waits = self.trial, self.seats.state, self.poll == 1
        if answer.gradient is not None:
            self._watch(answer.gradient, turn)
        judged = self._judged(query, points, answer, waits)
        if judged is None:
            return
        x, hit, sure, score = judged
        if trial.until != "smallest":
            fresh = state["first"].isnan() & (score > -torch.inf)
            state["first"] = torch.where(fresh, score, state["first"])
        over = torch.zeros_like(hit)
        if not waits and not self.rule.steady:
            over = self._done()  # between polls rows run on when they are done
        better = self._better(hit, sure, score) & ~over
        if waits and trial.twin is not None and trial.until != "strongest":
            claims = better & hit & self.seats.active.to(better.device)  # what pads the batch claims nothing
            if (
                trial.until == "smallest"
            ):  # a search goes on whatever the original says; it is asked at the end
                claims &= ~sure
            hit, sure = trial.confirm(claims, state["row"], x, hit, sure)
            better = self._better(hit, sure, score) & ~over
        if not waits or bool(better.any()):
            state["best"] = choose(better, x.detach(), state["best"])
            for name, value in (("hit", hit), ("sure", sure), ("score", score)):
                state[name] = torch.where(better, value, state[name])

    def _judged(
        self, query: Query, points: Points, answer: Answer, waits: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Each row's best point of those it asked: (B, …), misclassified, clearly so, and its score.

        A point outside the threat, or not asked, scores minus infinity. None where a rule without a loss, which keeps
        nothing but hits, has none.
        """
        trial, state, each = self.trial, self.seats.state, points.each
        row, clean = spread(state["row"], each), spread(state["x"], each)
        hit, sure = trial.judge(row, query.x, answer.scores, waits)
        inside = torch.ones_like(hit) if points.asked is None else points.asked
        if waits and self.rule.loss is None and not bool((hit & inside).any()):
            return None
        if not self.rule.feasible:
            ball = self.rule.setting.ball({"eps": spread(state["eps"], each)} if "eps" in state else {})
            inside = inside & ball.inside(query.x, clean, trial.bounds)
        hit, sure = hit & inside, sure & inside
        if trial.until == "smallest":
            score = -trial.threat.distance(query.x, clean).float()
        else:
            loss = answer.loss if answer.loss is not None else hit.float()
            score = loss if loss.dim() == 1 else loss.amax(1)
        score = torch.where(inside, score, -torch.inf)
        if each == 1:
            return query.x, hit, sure, score
        best = best_of(hit.int() + sure.int(), score, each)
        return query.x[best], hit[best], sure[best], score[best]

    def _write(self, track: Track, points: Points, answer: Answer) -> None:
        """One entry of the track per active row; of several points, what is said about the first."""
        trial, state = self.trial, self.seats.state
        active = self.seats.active.to(state["row"].device).clone()
        each, empty = points.each, torch.full_like(state["score"], torch.nan)
        loss = empty if answer.loss is None else answer.loss.view(len(empty), -1)[:, 0]
        norm = empty if answer.gradient is None else answer.gradient.view(len(empty), -1).norm(dim=1)
        distance = self.rule.setting.ball(state).distance(state["best"], state["x"])
        columns = {
            "sample": state["row"],
            "job": state["identity"] & ((1 << JOB_BITS) - 1),
            "step": state["t"],
            "queries": state["spent"],
            "loss": loss,
            "gradient_norm": norm,
            "prediction": answer.scores[::each].argmax(1),
            "success": state["hit"],
            "distance": torch.where(state["hit"], distance, torch.inf),
        }
        if track.mode == "best":  # of a fixed budget the first success, of a minimum norm every better one
            best = columns["distance" if trial.until == "smallest" else "success"].double()
            active &= best != state["noted"]
            state["noted"] = best
        track.add(**{name: value[active] for name, value in columns.items()})

    def _confirm_best(self) -> None:
        """Asks the original about the twin's claims since the last look; what it denies is forgotten."""
        trial, state = self.trial, self.seats.state
        if trial.twin is None or trial.until == "strongest":
            return
        claims = state["hit"] & self.seats.active.to(state["hit"].device)
        hit, sure = trial.confirm(claims, state["row"], state["best"], state["hit"], state["sure"])
        state["score"] = torch.where(claims & ~hit, -torch.inf, state["score"])
        state["hit"], state["sure"] = hit, sure

    def _better(self, hit: Tensor, sure: Tensor, score: Tensor) -> Tensor:
        """(B,) rows whose point now beats their best one; in "smallest" only what is hit counts."""
        state = self.seats.state
        rank, before = hit.int() + sure.int(), state["hit"].int() + state["sure"].int()
        better = (rank > before) | ((rank == before) & (score > state["score"]))
        return better & hit if self.trial.until == "smallest" else better

    def _watch(self, gradient: Tensor, turn: int) -> None:
        """Counts rows without any gradient, now and then: a sign of masking."""
        if turn % _WATCH_EVERY == 0:
            zero = (gradient.reshape(len(self.seats.active), -1) == 0).all(1).cpu()
            self.trial.note("gradients", int(self.seats.active.sum()))
            self.trial.note("zero_gradients", int((zero & self.seats.active).sum()))

    def _retire(self, over: Tensor) -> None:
        """Ends rows that are over, and the other jobs of samples that need none any more."""
        if not bool(over.any()):
            return
        state = self.seats.state
        rows = over.nonzero()[:, 0].to(state["x"].device)
        if (
            self.trial.bare and self.rule.looks_last
        ):  # nobody looks: the last point it is, as the papers have it
            self.trial.best[state["row"][rows]] = state["at"][rows]
            self.seats.leave(over)
            return
        self.trial.offer(*(state[name][rows] for name in ("row", "best", "hit", "sure", "score")))
        self._sum_up(rows)
        self.seats.leave(over)

    def _sum_up(self, rows: Tensor) -> None:
        """Counts of finished searches that failed: did the loss rise, and how much of eps did the best point use."""
        trial, state = self.trial, self.seats.state
        rows = rows[~state["hit"][rows]]
        if trial.until == "smallest" or self.rule.loss is None or self.scouting or not len(rows):
            return
        trial.note("searches", len(rows))
        trial.note("risen", int((state["score"][rows] > state["first"][rows]).sum()))
        if self.rule.feasible:
            used = trial.threat.take(state["row"][rows]).distance(state["best"][rows], state["x"][rows])
            eps = self.rule.setting.eps(state).flatten()[rows].double()
            trial.note("budget_rows", len(rows))
            trial.note("budget_used", float((used / eps).sum()))

    def _report(self) -> None:
        seats = self.seats
        under_way = float(seats.clock[seats.active].clamp_max(self.limit).sum()) / max(self.limit, 1)
        self.trial.progress(min(1.0, (seats.finished + under_way) / max(len(seats), 1)))
