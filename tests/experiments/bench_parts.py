"""Tiny work and fake peers for the tests of benchmarks."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from robust import Classifier, Linf, load_data, load_model
from robust.attacks import PGD
from robust.experiments.benchmarks import attacks
from robust.experiments.benchmarks.harness import Work
from robust.experiments.benchmarks.peers import Descent, Peer

CPU = torch.device("cpu")
EPS = 0.3


def subject(n: int = 4) -> tuple[Classifier, Tensor, Tensor]:
    """The shipped digits model and its first samples."""
    return (load_model("zoo:digits", device="cpu"), *load_data("digits", n=n).tensors())


def work(**wishes: Any) -> Work:
    """A tiny piece of work, told to nobody."""
    return Work(**{"load": subject, "eps": EPS, "repeats": 1, "say": lambda line: None, **wishes})


def strong(module: Any, descent: Descent, shape: tuple[int, ...]) -> Any:
    """A fake peer that is a good one: our own PGD on the plain module."""
    return lambda x, y: PGD(threat=Linf(descent.eps), steps=5)(Classifier(module), x, y, precision="original")


def idle(module: Any, descent: Descent, shape: tuple[int, ...]) -> Any:
    """A fake peer that does nothing."""
    return lambda x, y: x.clone()


def broken(module: Any, descent: Descent, shape: tuple[int, ...]) -> Any:
    """A fake peer that cannot be built."""
    raise ValueError("no such thing\nas this")


PEERS = {"strong": Peer("torch", "strong", strong), "idle": Peer("torch", "idle", idle)}


def small(**fields: Any) -> attacks.Attacks:
    """The benchmark of PGD with fake peers."""
    return attacks.Attacks(**{"libraries": PEERS, "batches": (2, 4), **fields})


def copied(record: Any) -> Any:
    """What is left of a record in a file."""
    return json.loads(json.dumps(record, allow_nan=False))
