"""Several surrogates as one classifier (Liu et al. 2017, arXiv:1611.02770; Dong et al. 2018, arXiv:1710.06081)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.errors import ModelError, RobustError

How = Literal["logits", "probabilities", "loss"]


class Members(nn.Module):
    """The members' answers fused, from x in the box; each member normalises for itself.

    Dong et al. 2018, section 3.3, with equal weights. "logits": their mean. "probabilities": the logarithm of the mean
    probability. "loss": log-probabilities m_c, the mean of the members', so that the cross-entropy is the mean of their
    cross-entropies. These do not sum to one as probabilities; what is missing goes to one more class, which nobody is
    labelled with: the log-softmax then leaves them as they are.
    """

    def __init__(self, members: Sequence[Classifier], how: How) -> None:
        super().__init__()
        self.how = how
        self.members = nn.ModuleList([member.module for member in members])
        for k, member in enumerate(members):
            self.register_buffer(f"mean{k}", member.mean.clone())
            self.register_buffer(f"std{k}", member.std.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes), or (N, classes + 1) of "loss"."""
        answers = [
            member((x - getattr(self, f"mean{k}")) / getattr(self, f"std{k}"))
            for k, member in enumerate(self.members)
        ]
        logits = torch.stack(answers)
        if self.how == "logits":
            return logits.mean(0)
        each = logits.log_softmax(2)
        if self.how == "probabilities":
            return each.logsumexp(0) - torch.log(torch.tensor(float(len(answers))))
        mean = each.mean(0)
        rest = (1 - mean.exp().sum(1, keepdim=True)).clamp_min(1e-12).log()
        return torch.cat((mean, rest), 1)


def ensemble(members: Sequence[Classifier], how: How = "logits", name: str | None = None) -> Classifier:
    """Several classifiers as one to attack; one alone is returned as it is.

    Args:
        members: of one box and one number of classes, on one device; their modules are shared, not copied.
        how: "logits", "probabilities" or "loss": what is averaged, see `Members`.
        name: what reports call it.

    Raises:
        RobustError: no member, an unknown `how`, or members that do not fit each other.
    """
    if how not in get_args(How):
        raise RobustError(f"ensemble={how!r} is unknown; use {', '.join(get_args(How))}")
    if not members:
        raise RobustError("an ensemble needs at least one model")
    first = members[0]
    if len(members) == 1:
        return first
    for member in members[1:]:
        if member.bounds != first.bounds or member.device != first.device:
            raise ModelError(
                f"{member.name} (bounds={member.bounds}, {member.device}) cannot be fused with {first.name} "
                f"(bounds={first.bounds}, {first.device}); give models of one box on one device"
            )
        known = (first.known_classes, member.known_classes)
        if None not in known and known[0] != known[1]:
            raise ModelError(
                f"{first.name} has {known[0]} classes and {member.name} {known[1]}; give models of the same classes"
            )
    fused = Members(members, how)
    fused.training = fused.members.training = False  # a member in training mode keeps it, and is warned of
    label = name or "+".join(member.name for member in members)
    return Classifier(fused, bounds=first.bounds, device=first.device, name=label)
