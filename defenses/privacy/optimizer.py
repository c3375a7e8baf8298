"""Any optimizer made private: it gets the noisy sum of clipped gradients in `p.grad` (DP-SGD, Abadi et al. 2016,
arXiv:1607.00133)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robust.defenses.privacy.clipping import Clipping, joint
from robust.defenses.privacy.gradients.parts import Part, Shares
from robust.defenses.privacy.noise import KeyedNoise, Noise, Schedule, multiplier_at
from robust.errors import ConfigError, ModelError, RunError

StepHook = Callable[["PrivateOptimizer"], None]


class PrivateOptimizer(Optimizer):
    """An optimizer that sees only Σ clip(g_i) + noise, over the expected batch size where the loss is a mean.

    **Guarantee.** Each step is the Gaussian mechanism of noise multiplier `noise_multiplier_at(step)` on a sum to which
    one sample adds at most the sensitivity, up to rounding; adaptive clipping's count is covered by it. Nothing else of
    the samples reaches the weights. What is not covered: whatever else a program does with its data.

    | case | what happens |
    | --- | --- |
    | an empty batch | a step on noise alone |
    | a batch in parts | sums are gathered, one step follows the last part |
    | a gradient that is not finite | that sample adds nothing |
    | `step` without a backward pass | an error |
    | `zero_grad` before `step` | drops what was gathered since the last part ended |
    | a gradient from outside of a layer | an error that names the parameter |

    Attributes:
        original_optimizer: the one that was wrapped.
        max_grad_norm: the present bound, which adaptive clipping moves.
        steps: steps taken.
        expected_batch_size: what a sum is divided by, whatever the batch's real size, which is private.
        sample_rate: probability of each sample in a step; None where batches are no Poisson samples.
        history: (noise multiplier, sample rate, steps) in order, for accountants.
        looks: samples of each backward pass since `zero_grad` or `step`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        noise_multiplier: float | Schedule,
        clipping: Clipping,
        noise: Noise,
        expected_batch_size: float,
        loss_reduction: str = "mean",
        sample_rate: float | None = None,
    ) -> None:
        # `Optimizer.__init__` would take parameters over; they stay with the wrapped one.
        if not expected_batch_size > 0:
            raise ConfigError(f"expected_batch_size={expected_batch_size}: above 0 is wanted")
        if loss_reduction not in ("mean", "sum"):
            raise ConfigError(f"loss_reduction={loss_reduction!r} is unknown; say mean or sum")
        clipping.gradient_noise(multiplier_at(noise_multiplier, 0))
        self.original_optimizer = optimizer
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.noise_multiplier, self.clipping, self.noise = noise_multiplier, clipping, noise
        self.expected_batch_size, self.loss_reduction = expected_batch_size, loss_reduction
        self.sample_rate = sample_rate
        self.max_grad_norm, self.steps = clipping.max_grad_norm, 0
        self.history: list[tuple[float, float | None, int]] = []
        self.step_hook: StepHook | None = None
        self.is_last = True
        self._fresh: Tensor | None = None
        self._total: Tensor | None = None
        self._fresh_count = self._count = 0.0
        self.looks: list[int] = []
        self._given: dict[int, tuple[Tensor, int]] = {}
        self._empty = False
        self.engine: Any = None  # `make_private` puts it here

    # -- what users of optimizers expect ------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Sets the wrapped optimizer's."""
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        """Sets the wrapped optimizer's."""
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        """Sets the wrapped optimizer's."""
        self.original_optimizer.defaults = defaults

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.original_optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the model was made private with the parameters it had."""
        raise ConfigError(
            "a private optimizer takes no further parameters; call make_private with all of them"
        )

    def attach_step_hook(self, hook: StepHook) -> None:
        """A function called before each step is taken, so that a ledger can book it first; what it raises stops it."""
        self.step_hook = hook

    # -- noise --------------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int | None:
        """What keys the noise; None where it comes from a cryptographic generator."""
        return self.noise.seed if isinstance(self.noise, KeyedNoise) else None

    def noise_multiplier_at(self, step: int) -> float:
        """The noise multiplier of the whole step, from 0: what an accountant counts."""
        return multiplier_at(self.noise_multiplier, step)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the next step's sum."""
        z = self.clipping.gradient_noise(self.noise_multiplier_at(self.steps))
        return z * self.clipping.sensitivity(self.max_grad_norm)

    # -- gradients ----------------------------------------------------------------------------------------------

    def consume(self, rows: int, parts: Sequence[Part]) -> None:
        """Clips the gradients of one backward pass and gathers their sum."""
        self.looks.append(rows)
        scale = float(rows) if self.loss_reduction == "mean" else 1.0  # undoes the loss's mean
        norms = torch.stack([part.norm() for part in parts]) * scale
        lengths, factor = self.clipping.lengths(norms, self.max_grad_norm)
        each = [Shares(one) for one in lengths] if lengths.ndim == 2 else [Shares(lengths)] * len(parts)
        sums = [part.weighted(one).flatten() for part, one in zip(parts, each, strict=True)]
        dtype = torch.float64 if any(one.dtype == torch.float64 for one in sums) else torch.float32
        flat = torch.cat([one.to(dtype) for one in sums]).mul_(factor * scale)
        self._fresh = flat if self._fresh is None else self._fresh.add_(flat)
        if self.clipping.counts:
            self._fresh_count += float((joint(norms) <= self.max_grad_norm).double().sum()) - rows / 2

    def consume_empty(self) -> None:
        """Notes that the model was called with an empty batch, which has no backward pass worth the name."""
        self._empty = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients that were not stepped on; the sums of a batch's earlier parts stay."""
        self._fresh, self._fresh_count = None, 0.0
        self._given, self.looks = {}, []
        self.original_optimizer.zero_grad(set_to_none)

    def expect(self, last: bool) -> None:
        """Says whether the samples that come next are the last of their batch."""
        self.is_last = last

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after the last part of a batch; before it, the part's sum is only kept.

        Raises:
            RunError: there was no backward pass, and no empty batch either.
            ModelError: a parameter got a gradient from outside of its layer, whose samples cannot be told apart.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._fresh is None and not self._empty:
            raise RunError(
                "step() without gradients: call backward() on the loss of the model in training mode first"
            )
        self._refuse_strangers()
        self._gather()
        if not self.is_last:
            return loss
        self._book()
        self._privatise()
        self.original_optimizer.step()
        self.steps += 1
        return loss

    def _gather(self) -> None:
        if self._fresh is not None:
            self._total = self._fresh if self._total is None else self._total.add_(self._fresh)
        self._count += self._fresh_count
        self._fresh, self._fresh_count, self._empty, self.looks = None, 0.0, False, []

    def _book(self) -> None:
        if self.step_hook is not None:
            self.step_hook(self)
        entry = (self.noise_multiplier_at(self.steps), self.sample_rate)
        if self.history and self.history[-1][:2] == entry:
            self.history[-1] = (*entry, self.history[-1][2] + 1)
        else:
            self.history.append((*entry, 1))

    def _privatise(self) -> None:
        """Puts the noisy sum, or mean, into every parameter's `grad`."""
        sizes = [p.numel() for p in self.parameters]
        flat = self._total
        if flat is None:
            dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32
            flat = torch.zeros(sum(sizes), dtype=dtype, device=self.parameters[0].device)
        std = self.noise_std
        if std > 0:
            flat = self.noise.add(flat, std, self.steps)
        if self.loss_reduction == "mean":
            flat = flat / self.expected_batch_size
        for parameter, part in zip(self.parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view(parameter.shape).to(parameter.dtype)
            self._given[id(parameter)] = (parameter.grad, parameter.grad._version)
        normal = self.noise.normal(self.steps, self._count) if std > 0 and self.clipping.counts else 0.0
        self.max_grad_norm = self.clipping.moved(
            self.max_grad_norm, self._count, self.expected_batch_size, normal
        )
        self._total, self._count = None, 0.0

    def _refuse_strangers(self) -> None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            grad = parameter.grad
            if grad is None:
                continue
            known = self._given.get(id(parameter))
            if known is not None and known[0] is grad and known[1] == grad._version:
                continue
            if bool(grad.any()):
                raise ModelError(
                    f"parameter {name} got a gradient from outside of its layer's forward in training mode (a penalty "
                    "on weights, a functional use, or a backward pass in evaluation mode), which cannot be clipped by "
                    "samples"
                )

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and what the next private step depends on, under "private".

        It holds the seed of the noise, if it was keyed: keep it as secret as the data.
        """
        own = {
            "steps": self.steps,
            "seed": self.seed,
            "by_sum": isinstance(self.noise, KeyedNoise) and self.noise.by_sum,
            "max_grad_norm": self.max_grad_norm,
            "history": [list(entry) for entry in self.history],
        }
        return {**self.original_optimizer.state_dict(), "private": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, with the same noise if it is keyed.

        Raises:
            RunError: the state is not one of a private optimizer, or one with other noise.
        """
        own = state_dict.get("private")
        if own is None:
            raise RunError("this state was not saved by a private optimizer; it has no entry 'private'")
        if (own["seed"] is None) != (self.seed is None):
            raise RunError("the state and this optimizer differ in secure_mode; make both with the same")
        self.original_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "private"})
        self.steps, self.max_grad_norm = int(own["steps"]), float(own["max_grad_norm"])
        self.history = [(float(z), q, int(n)) for z, q, n in own["history"]]
        if isinstance(self.noise, KeyedNoise):
            self.noise.seed, self.noise.by_sum = int(own["seed"]), bool(own.get("by_sum"))
        self._fresh = self._total = None
        self._fresh_count = self._count = 0.0
