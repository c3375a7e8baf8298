"""What a caller asks of a deployed model, beyond its spec."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from robust.errors import ConfigError
from robust.oracle import Answers


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """How an http(s) model is asked.

    Attributes:
        timeout: seconds to wait for an answer; a batch whose answer does not come in time counts as spent.
        retries: how often a batch is sent again that got no answer, waiting twice as long each time (0.1 s, 0.2 s, …).
        rate: the most points per second; None for no limit.
        batch: the most points in one request.
        auth: the NAME of the environment variable whose value is sent as the Authorization header.
    """

    timeout: float = 30.0
    retries: int = 8
    rate: float | None = None
    batch: int = 256
    auth: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"timeout={self.timeout:g} is no time to wait; give seconds above 0")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ConfigError(f"rate={self.rate:g} sends nothing; give points per second above 0")
        if self.retries < 0 or self.batch < 1:
            raise ConfigError(f"retries={self.retries} and batch={self.batch} must be at least 0 and 1")
        if self.auth is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.auth):
            # its text is not repeated: it may be the secret itself
            raise ConfigError("auth wants the NAME of an environment variable, never the secret itself")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of `robust.models.load_model` that a deployed model knows."""

    answers: Answers | None = None
    budget: int | None = None
    classes: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    device: str | None = None
    endpoint: Endpoint = field(default_factory=Endpoint)
