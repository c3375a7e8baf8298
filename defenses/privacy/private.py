"""`make_private`: a model, an optimizer and a loader for differentially private training (Abadi et al. 2016).

**Guarantee.** Each step is a Gaussian mechanism on a Poisson sample, under adding or removing one sample;
`optimizer.history` tells an accountant. It does not hold if a sample enters two backward passes between two steps, if
the loss of one sample depends on another, or if whoever sees the weights knows the seed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from robust.defenses.privacy.checks import check
from robust.defenses.privacy.clipping import CLIPPINGS, Clipping, PerLayer
from robust.defenses.privacy.gradients.engine import Engine, Tap
from robust.defenses.privacy.noise import KeyedNoise, Noise, Schedule, SecureNoise
from robust.defenses.privacy.optimizer import PrivateOptimizer
from robust.defenses.privacy.sampling import PrivateLoader
from robust.errors import ConfigError, ModelError
from robust.registry import unknown

M = TypeVar("M", bound=nn.Module)
EngineName = Literal["auto", "opacus"]


def make_private(
    model: M,
    optimizer: Optimizer,
    loader: DataLoader[Any] | None,
    *,
    noise_multiplier: float | Schedule,
    max_grad_norm: float | Sequence[float] = 1.0,
    clipping: str | Clipping = "flat",
    poisson_sampling: bool = True,
    expected_batch_size: float | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    max_physical_batch_size: int | None = None,
    engine: EngineName = "auto",
    seed: int | None = None,
    secure_mode: bool = False,
) -> tuple[M, PrivateOptimizer, PrivateLoader | None]:
    """Makes any optimizer private; the training loop stays as it is. Names are Opacus's where the meaning is.

    The model is changed in place: while it trains, its layers keep samples apart.

    Args:
        model: without batch normalisation (see `fix`); its input's first dimension is the batch.
        optimizer: over all trainable parameters; not one that calls a closure several times.
        loader: its batch size decides the sample rate, 1 / len(loader); None for a loop that makes its own batches.
        noise_multiplier: noise over sensitivity, a number or a function of the step, such as `StepDecay`.
        max_grad_norm: the bound on a sample's gradient; for "per_layer" one for each parameter or one for all together.
        clipping: "flat", "per_layer", "automatic", "adaptive", or an instance with more options.
        poisson_sampling: False keeps the loader's own batches, which accountants must count differently.
        expected_batch_size: what sums are divided by; by default the data's size times the sample rate.
        loss_reduction: how the loss joins its samples, "mean" or "sum".
        max_physical_batch_size: samples in memory at a time: larger batches come in parts. The sum is the same.
        engine: "auto", or "opacus" for layers that have no rule here, such as opacus's DPLSTM.
        seed: keys noise and samples; by default a fresh secret, which the optimizer's state keeps for a resume.
        secure_mode: noise and samples from the operating system's cryptographic generator instead.

    Returns:
        The model, the private optimizer, and the loader of parts of batches (None without a loader).

    Raises:
        ModelError: a parameter has no per-sample gradient; the line names it.
        ConfigError: an option that makes no sense.
    """
    if engine not in ("auto", "opacus"):
        raise ConfigError(unknown("engine", engine, ["auto", "opacus"]))
    if isinstance(optimizer, PrivateOptimizer) or any(isinstance(m.forward, Tap) for m in model.modules()):
        raise ModelError("the model or the optimizer is private already; make_private goes once over each")
    method, noise = _clipping(clipping, max_grad_norm), _noise(seed, secure_mode)
    parameters, batches = check(model, optimizer), None
    if loader is not None:
        batches = PrivateLoader(loader, noise if poisson_sampling else None, max_physical_batch_size)
    expected = _expected(batches, loader, expected_batch_size)
    rate = None if batches is None else batches.sample_rate
    private = PrivateOptimizer(
        optimizer, parameters, noise_multiplier, method, noise, expected, loss_reduction, rate
    )
    if batches is not None:
        batches.notify = private.expect
    return _attach(model, parameters, private, engine), private, batches


def _attach(model: M, parameters: dict[str, nn.Parameter], private: PrivateOptimizer, engine: str) -> M:
    """The model that is to be called, with the engine that feeds the optimizer."""
    if engine == "opacus":
        from robust.defenses.privacy.gradients.peer import OpacusEngine

        private.engine = OpacusEngine(model, parameters, private)
        wrapped: M = private.engine.module
        return wrapped
    private.engine = Engine(model, parameters, private)
    return model


def _noise(seed: int | None, secure_mode: bool) -> Noise:
    if secure_mode:
        if seed is not None:
            raise ConfigError(f"seed={seed} keys nothing in secure_mode; leave one of them out")
        return SecureNoise()
    return KeyedNoise(secrets.randbits(63), by_sum=True) if seed is None else KeyedNoise(seed)


def _clipping(clipping: str | Clipping, bound: float | Sequence[float]) -> Clipping:
    if isinstance(clipping, Clipping):
        return clipping
    if clipping not in CLIPPINGS:
        raise ConfigError(unknown("clipping", clipping, list(CLIPPINGS)))
    if isinstance(bound, Sequence):
        if clipping != "per_layer":
            raise ConfigError(
                f"max_grad_norm is a list, and clipping={clipping} takes one number; say per_layer, or one bound"
            )
        return PerLayer(max_grad_norms=tuple(float(one) for one in bound))
    return CLIPPINGS[clipping](max_grad_norm=float(bound))


def _expected(private: PrivateLoader | None, loader: DataLoader[Any] | None, given: float | None) -> float:
    if given is not None:
        return given
    if private is None or loader is None:
        raise ConfigError(
            "expected_batch_size is missing: without a loader, say how many samples a step has on average"
        )
    if private.sample_rate is not None:
        return private.size * private.sample_rate
    size = loader.batch_size
    if size is None:
        raise ConfigError("expected_batch_size is missing, and the loader has no batch_size; say it")
    return size
