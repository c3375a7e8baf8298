"""Questions to the model under attack and their answers: the only place where attacks run a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.errors import RobustError
from robust.losses import Loss, combined_targeted, with_gradient
from robust.oracle import Oracle
from robust.twin import Twin

Want = Literal["logits", "labels", "loss_grad", "difference_grad"]


@dataclass(frozen=True)
class Query:
    """What a rule wants to know about a batch of points.

    Attributes:
        x: (B, C, H, W) points in the box.
        want: "logits"; "labels"; "loss_grad": `loss` and its gradient; "difference_grad": for each class of
            `against`, z_class − z_y and its gradient.
        copies: forwards to average over (expectation over a randomised model).
        loss: the loss for "loss_grad", and the value tracked for "logits" if given.
        against: (B, T) classes for "difference_grad".
        asked: (len(x),) bool: the points that are wanted; None for all. A rule may ask several points of each row: x
            is then (B · k, C, H, W), a row's points side by side, and so is the answer; `against` stays one per row.
    """

    x: Tensor
    want: Want
    copies: int = 1
    loss: Loss | None = None
    against: Tensor | None = None
    asked: Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """What the model said: `scores` (B, K), `loss` (B,), `gradient` (B, C, H, W) or (B, T, C, H, W), as asked."""

    scores: Tensor
    loss: Tensor | None = None
    gradient: Tensor | None = None


def ask(
    model: Classifier | Twin | Oracle, query: Query, rows: dict[str, Tensor], active: Tensor | None
) -> tuple[Answer, int]:
    """Answers a query and says how many black-box queries it took.

    Args:
        rows: the engine's row state: `y` (B,), `target` (B,) where jobs aim, `reference` (B, K) where losses need it.
        active: (B,) bool; padding rows are computed (a fixed shape) but not counted, and never sent to an oracle.
    """
    if isinstance(model, Oracle):
        return _ask_oracle(model, query, rows, active)
    spare = 0 if active is None else len(query.x) - int(active.sum())
    model.cost.forwards -= spare * query.copies
    if query.want in ("logits", "labels"):
        total = model.logits(query.x)
        for _ in range(query.copies - 1):
            total = total + model.logits(query.x)
        scores = total / query.copies
        return Answer(scores, _loss(query.loss, scores, rows)), len(query.x) - spare
    times = 1 if query.against is None else query.against.shape[1]
    model.cost.backwards += (len(query.x) - spare) * query.copies * times
    return _gradient(model, query, rows), 0


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's or the machine's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def split(
    query: Query, rows: dict[str, Tensor], active: Tensor | None, size: int
) -> Iterator[tuple[Query, dict[str, Tensor], Tensor | None]]:
    """The same question about parts of at most `size` points, with their rows."""
    for start in range(0, len(query.x), size):
        part = slice(start, start + size)
        against = None if query.against is None else query.against[part]
        yield (
            replace(query, x=query.x[part], against=against),
            {name: value[part] for name, value in rows.items()},
            None if active is None else active[part],
        )


def join(parts: Sequence[Answer]) -> Answer:
    """The answers to parts as the answer to the whole."""

    def whole(values: list[Tensor | None]) -> Tensor | None:
        held = [value for value in values if value is not None]
        return torch.cat(held) if held else None

    return Answer(
        torch.cat([part.scores for part in parts]),
        whole([part.loss for part in parts]),
        whole([part.gradient for part in parts]),
    )


def _ask_oracle(
    oracle: Oracle, query: Query, rows: dict[str, Tensor], active: Tensor | None
) -> tuple[Answer, int]:
    if query.want not in ("logits", "labels"):
        raise RobustError("this attack needs gradients, which an Oracle does not give")
    sent = query.x if active is None else query.x[active]
    if query.want == "labels" or oracle.answers == "labels":
        labels = oracle.labels(sent)
        width = oracle.classes
        said = torch.nn.functional.one_hot(labels.clamp_min(0), width).float()
        said[labels < 0] = torch.nan
    else:
        said = oracle.scores(sent)
    scores = said if active is None else said.new_zeros(len(query.x), said.shape[1])
    if active is not None:
        scores[active.to(said.device)] = said
    return Answer(scores, _loss(query.loss, scores, rows)), len(sent)


def _loss(loss: Loss | None, scores: Tensor, rows: dict[str, Tensor]) -> Tensor | None:
    if loss is None:
        return None
    return loss(scores, rows["y"], rows.get("target"), rows.get("reference"))


def _gradient(model: Classifier | Twin, query: Query, rows: dict[str, Tensor]) -> Answer:
    """Average of scores, loss and input gradient over the copies; rows that are not finite get a zero gradient."""
    if isinstance(model, Twin) and (quick := _by_program(model, query, rows)) is not None:
        return quick
    sums: list[Tensor] = []
    for _ in range(query.copies):
        x = query.x.detach().requires_grad_(True)
        logits = model(x)
        detached = logits.detach()
        if query.against is None:
            assert query.loss is not None
            value, upstream = with_gradient(
                query.loss, detached, rows["y"], rows.get("target"), rows.get("reference")
            )
            (gradient,) = torch.autograd.grad((logits * upstream).sum(), x)
            parts = [detached, value, gradient]
        else:
            parts = [detached, *_differences(logits, x, query.against, rows["y"])]
        sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]
    scores, value, gradient = (part / query.copies for part in sums)
    return Answer(scores, value, gradient.contiguous().nan_to_num(0.0, 0.0, 0.0))


def _asked(query: Query, rows: dict[str, Tensor]) -> tuple[Loss | None, dict[str, Tensor | None]] | None:
    """A query as a program's loss and arguments; None where no program answers such a query."""
    if query.want in ("logits", "labels"):
        return None, {}
    if query.copies != 1 or (query.against is not None and query.against.shape[1] != 1):
        return None
    loss, aimed = query.loss, rows.get("target")
    if query.against is not None:
        loss, aimed = combined_targeted, query.against[:, 0]  # z_target − z_y
    return loss, {"y": rows["y"], "targets": aimed, "reference": rows.get("reference")}


def prepare(twin: Twin, query: Query, rows: dict[str, Tensor]) -> bool:
    """Compiles what a query like this asks of a twin; whether that went well."""
    asked = _asked(query, rows)
    return asked is not None and twin.compile(asked[0], query.x, **asked[1])


def _by_program(twin: Twin, query: Query, rows: dict[str, Tensor]) -> Answer | None:
    """The answer of a compiled program, where the twin has one for this question."""
    asked = _asked(query, rows)
    if asked is None or asked[0] is None:
        return None
    found = twin.gradient(asked[0], query.x, **asked[1])
    if found is None:
        return None
    scores, value, gradient = found
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    if query.against is not None:
        return Answer(scores, value[:, None], gradient[:, None])
    return Answer(scores, value, gradient)


def _differences(logits: Tensor, x: Tensor, against: Tensor, y: Tensor) -> list[Tensor]:
    """For each column of `against` the value and the gradient of z_class − z_y: (B, T) and (B, T, C, H, W)."""
    gradients = []
    columns = against.shape[1]
    own = torch.nn.functional.one_hot(y, logits.shape[1]).to(logits)
    for t in range(columns):
        upstream = torch.nn.functional.one_hot(against[:, t], logits.shape[1]).to(logits) - own
        (gradient,) = torch.autograd.grad((logits * upstream).sum(), x, retain_graph=t + 1 < columns)
        gradients.append(gradient)
    values = logits.detach().gather(1, against) - logits.detach().gather(1, y[:, None])
    return [values, torch.stack(gradients, dim=1)]
