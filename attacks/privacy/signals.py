"""What a model's logits tell of a sample, without loss of digits where probabilities are 0 or 1.

All take logits (N, classes) and labels (N,), compute in float64, and give (N,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_odds(logits: Tensor) -> Tensor:
    """(N, classes) log p_i − log(1 − p_i) = z_i − logsumexp of the other logits."""
    z = logits.double()
    top = z.argmax(1, keepdim=True)
    others = z.scatter(1, top, -torch.inf)
    # Of all but the largest, 1 - p_i loses no digits; of the largest, the others are summed by themselves.
    log_p = z.log_softmax(1)
    rest = torch.log(-torch.expm1(log_p.scatter(1, top, -1.0)))
    of_top = z.gather(1, top) - others.logsumexp(1, keepdim=True)
    return (log_p - rest).scatter(1, top, of_top)


def scaled(logits: Tensor, y: Tensor) -> Tensor:
    """φ = log p_y − log(1 − p_y), the logit scaling of Carlini et al. 2022 (arXiv:2112.03570), stable."""
    z = logits.double()
    own = z.gather(1, y[:, None])[:, 0]
    return own - z.scatter(1, y[:, None], -torch.inf).logsumexp(1)


def log_probability(logits: Tensor, y: Tensor) -> Tensor:
    """log p_y, minus the cross-entropy."""
    return logits.double().log_softmax(1).gather(1, y[:, None])[:, 0]


def probability(logits: Tensor, y: Tensor) -> Tensor:
    """p_y."""
    return log_probability(logits, y).exp()


def taylor(
    logits: Tensor, y: Tensor, margin: float = 0.6, temperature: float = 2.0, order: int = 4
) -> Tensor:
    """Soft-margin Taylor softmax (Banerjee et al. 2020, arXiv:2011.11538), which RMIA's paper takes in place of p_y."""
    z = logits.double() / temperature

    def power(values: Tensor) -> Tensor:
        term, total = torch.ones_like(values), torch.ones_like(values)
        for k in range(1, order + 1):
            term = term * values / k
            total = total + term
        return total

    own = power(z.gather(1, y[:, None])[:, 0] - margin)
    others = power(z).scatter(1, y[:, None], 0.0).sum(1)
    return own / (own + others)


def negative_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Σ p log p, at most 0, which is a certain answer whatever the label."""
    log_p = logits.double().log_softmax(1)
    return (log_p.exp() * log_p).sum(1)


def negative_modified_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """(1 − p_y) log p_y + Σ_{i≠y} p_i log(1 − p_i): minus Song & Mittal's entropy; 0 if right for certain."""
    log_p = logits.double().log_softmax(1)
    log_rest = log_p - log_odds(logits)  # log(1 - p)
    own = (log_rest.exp() * log_p).gather(1, y[:, None])[:, 0]
    others = (log_p.exp() * log_rest).scatter(1, y[:, None], 0.0).sum(1)
    return own + others


def top_log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """The largest posterior, as its log-odds, which order alike and keep apart what rounds to 1."""
    return log_odds(logits).amax(1)
