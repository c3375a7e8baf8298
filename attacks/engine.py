"""The one loop of all stepwise attacks: fixed batch shapes, refilled from a queue of jobs.

Rows that finish hand their best point to the trial and take the next job; once a sample is broken (or finished) its
other jobs are cancelled. Batches keep one of a few sizes and are padded, so that numbers do not depend on how many
rows are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust.attacks.query import Answer, Query
from robust.attacks.rule import Jobs, Rule, Setting, State, choose
from robust.attacks.trial import Trial
from robust.classifier import Classifier
from robust.errors import BudgetExceeded
from robust.footprint import largest_batch, measure
from robust.rng import JOB_BITS, identities
from robust.twin import fast_bfloat16, worth_compiling

_REPORT_EVERY = 8
WORTH_A_TWIN = 5_000  # steps of single rows: what making and checking a twin costs is then a few percent


def buckets(trial: Trial) -> list[int]:
    """Batch sizes for a trial's model and samples, the largest first, from the model's measured footprint."""
    found = measure(trial.model, trial.x) if isinstance(trial.model, Classifier) else None
    largest = 32 if found is None else largest_batch(found, trial.x.device)
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

    As the trial's precision says, a bfloat16 twin scouts, a float32 twin decides, and the original confirms.
    """
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
    except BudgetExceeded:
        engine.flush()
        trial.note("budget_spent", 1)


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
    return found is not None and worth_compiling(work * rule.passes * found.flops)


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
    """One run of a rule over a queue."""

    def __init__(self, rule: Rule, trial: Trial, jobs: Jobs, limit: int | None = None) -> None:
        self.rule, self.trial, self.jobs, self.limit = rule, trial, jobs, limit
        self.scouting = False
        if trial.twin is not None:
            trial.twin.compiling = _repays(rule, trial, len(jobs.row) * (limit or rule.steps))
        self.next = 0
        self.state: State = {}
        self.sizes = buckets(trial)
        self.active = torch.zeros(0, dtype=torch.bool)
        self.finished_jobs = 0

    def run(self) -> None:
        """Until no job is left."""
        turn = 0
        while self._fill():
            query = self.rule.query(self.state)
            if len(self.active) == self.sizes[0]:
                self.trial.prepare(query, self.state)
            answer = self.trial.answer(query, self.state, self.active)
            self._track(query, answer, turn)
            self.state.update(self.rule.step(self.state, answer))
            self._retire(self._done().cpu() & self.active)
            if turn % _REPORT_EVERY == 0:
                self._report()
            turn += 1

    def _done(self) -> Tensor:
        done = self.rule.done(self.state)
        return done if self.limit is None else done | (self.state["t"] >= self.limit)

    def flush(self) -> None:
        """Hands over what the rows have, when the run ends early."""
        self._retire(self.active.clone())

    # -- rows ---------------------------------------------------------------------------------------------------

    def _rows(self, rows: Tensor, jobs: Jobs) -> State:
        trial = self.trial
        index = trial.index.to(trial.x.device)[rows]
        state = {
            "row": rows,
            "x": trial.x[rows],
            "y": trial.y[rows],
            "target": jobs.target,
            "identity": identities(index, jobs.number),
            "hit": torch.zeros(len(rows), dtype=torch.bool, device=rows.device),
            "sure": torch.zeros(len(rows), dtype=torch.bool, device=rows.device),
            "score": torch.full((len(rows),), -torch.inf, device=rows.device),
            "best": trial.x[rows],
            "first": torch.full((len(rows),), torch.nan, device=rows.device),
        }
        eps = trial.threat.take(rows).eps
        if isinstance(eps, Tensor) and eps.dim():
            state["eps"] = eps.to(trial.x)
        if self.rule.needs_reference:
            state["reference"] = trial.clean[rows]
        return state

    def _fill(self) -> bool:
        """Gives free slots new jobs, shrinks the batch when the queue is empty; whether any row is active."""
        busy = int(self.active.sum())
        free = (self.sizes[0] if not self.state else len(self.active)) - busy
        taken = self._take(free) if free else []
        if not busy and not taken:
            return False
        if taken:
            self._seat(torch.tensor(taken, device=self.jobs.row.device), busy)
        elif self.next >= len(self.jobs.row):
            self._shrink(busy)
        return True

    def _take(self, count: int) -> list[int]:
        """The next jobs whose samples still need work."""
        finished = self.trial.finished()
        taken: list[int] = []
        while self.next < len(self.jobs.row) and len(taken) < count:
            if not bool(finished[self.jobs.row[self.next]]):
                taken.append(self.next)
            else:
                self.finished_jobs += 1
            self.next += 1
        return taken

    def _seat(self, taken: Tensor, busy: int) -> None:
        jobs = self.jobs.take(taken)
        new = self._rows(jobs.row, jobs)
        new.update(self.rule.start(new))
        if not self.state:
            size = next(size for size in reversed(self.sizes) if size >= len(taken))
            order = torch.arange(size, device=taken.device).clamp_max(len(taken) - 1)
            self.state = {name: value[order].clone() for name, value in new.items()}
            self.active = torch.arange(size) < len(taken)
            return
        slots = (~self.active).nonzero()[: len(taken), 0]
        for name, value in new.items():
            self.state[name][slots.to(value.device)] = value
        self.active[slots] = True

    def _shrink(self, busy: int) -> None:
        """Moves the last rows into the smallest batch that holds them."""
        size = next((size for size in reversed(self.sizes) if size >= busy), self.sizes[0])
        if size >= len(self.active):
            return
        order = torch.argsort(~self.active, stable=True)[:size]
        self.state = {name: value[order.to(value.device)] for name, value in self.state.items()}
        self.active = self.active[order]

    # -- outcomes -----------------------------------------------------------------------------------------------

    def _track(self, query: Query, answer: Answer, turn: int) -> None:
        """Keeps each row's best queried point: a clear hit before a marginal one before none, then the score."""
        trial, state = self.trial, self.state
        if answer.gradient is not None:
            self._watch(answer.gradient, turn)
        hit, sure = trial.judge(state["row"], query.x, answer.scores)
        inside = torch.ones_like(hit)
        if not self.rule.feasible:
            if self.rule.loss is None and not bool(hit.any()):
                return  # a rule without a loss has nothing to keep but hits
            inside = self.rule.setting.ball(state).inside(query.x, state["x"], trial.bounds)
            hit, sure = hit & inside, sure & inside
        if trial.until == "smallest":
            score = -trial.threat.distance(query.x, state["x"]).float()
        else:
            loss = answer.loss if answer.loss is not None else hit.float()
            score = loss if loss.dim() == 1 else loss.amax(1)
            state["first"] = torch.where(state["first"].isnan(), score, state["first"])
        better = self._better(hit, sure, score) & inside
        if trial.twin is not None and trial.until != "strongest":
            claims = better & hit & self.active.to(better.device)  # what pads the batch claims nothing
            hit, sure = trial.confirm(claims, state["row"], query.x, hit, sure)
            better = self._better(hit, sure, score) & inside
        if bool(better.any()):
            state["best"] = choose(better, query.x.detach(), state["best"])
            for name, value in (("hit", hit), ("sure", sure), ("score", score)):
                state[name] = torch.where(better, value, state[name])
        if trial.until == "broken":
            self._retire(state["sure"].cpu() & self.active)

    def _better(self, hit: Tensor, sure: Tensor, score: Tensor) -> Tensor:
        """(B,) rows whose point now beats their best one; in "smallest" only what is hit counts."""
        state = self.state
        rank, before = hit.int() + sure.int(), state["hit"].int() + state["sure"].int()
        better = (rank > before) | ((rank == before) & (score > state["score"]))
        return better & hit if self.trial.until == "smallest" else better

    def _watch(self, gradient: Tensor, turn: int) -> None:
        """Counts rows without any gradient, now and then: a sign of masking."""
        if turn % 10 == 0:
            zero = (gradient.flatten(1) == 0).all(1).cpu()
            self.trial.note("gradients", int(self.active.sum()))
            self.trial.note("zero_gradients", int((zero & self.active).sum()))

    def _retire(self, over: Tensor) -> None:
        """Ends rows that are over, and the other jobs of samples that need none any more."""
        if not bool(over.any()):
            return
        state = self.state
        rows = over.nonzero()[:, 0].to(state["x"].device)
        self.trial.offer(*(state[name][rows] for name in ("row", "best", "hit", "sure", "score")))
        self._sum_up(rows)
        self.active &= ~over
        self.finished_jobs += len(rows)
        cancelled = self.trial.finished()[state["row"]].cpu() & self.active
        self.finished_jobs += int(cancelled.sum())
        self.active &= ~cancelled

    def _sum_up(self, rows: Tensor) -> None:
        """Counts of finished searches that failed: did the loss rise, and how much of eps did the best point use."""
        trial, state = self.trial, self.state
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
        total = max(len(self.jobs.row), 1)
        under_way = (
            float(self.state["t"].float()[self.active.to(self.state["t"].device)].sum())
            if self.state
            else 0.0
        )
        self.trial.progress(min(1.0, (self.finished_jobs + under_way / max(self.rule.steps, 1)) / total))
