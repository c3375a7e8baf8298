"""Where models that are trained together are kept: finished ones once and for all, those in training by checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from robust.checkpoint import write_tensors
from robust.digest import read_json, write_json
from robust.errors import RunError
from robust.stacked_engines import Stream

PLAN = "plan.json"


@dataclass(frozen=True)
class Kept:
    """A finished model: its state, its mean loss in every epoch, and what it took."""

    state: dict[str, Tensor]
    losses: list[float]
    seconds: float


@dataclass
class Shelf:
    """Finished models and checkpoints, in a folder or in memory.

    Attributes:
        folder: None keeps models in memory only. identity: what the training is about. resume: whether the folder may
            hold a part of it already.

    Raises:
        RunError: the folder holds models of another training, or `resume` is not given.
    """

    folder: Path | None
    identity: Mapping[str, object]
    resume: bool
    memory: dict[int, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        plan = self.folder / PLAN
        if plan.exists():
            if not self.resume:
                raise RunError(f"{self.folder} already holds models; resume, or choose another out folder")
            before = read_json(plan)
            for name, value in self.identity.items():
                if before.get(name) != value:
                    raise RunError(
                        f"{self.folder} holds models with {name}={before.get(name)}, not {value}; choose another out"
                    )
        write_json(plan, self.identity)

    def holds(self, stream: Stream) -> bool:
        """Whether a model is finished."""
        return stream.key in self.memory or (self.folder is not None and self._path(stream).exists())

    def put(self, stream: Stream, kept: Kept) -> None:
        """Keeps a finished model."""
        if self.folder is None:
            self.memory[stream.key] = kept
            return
        record = {"own": _own(stream), "losses": kept.losses, "seconds": kept.seconds}
        write_tensors(self._path(stream), kept.state, {"format": "pt", "record": json.dumps(record)})

    def take(self, stream: Stream) -> Kept:
        """A finished model.

        Raises:
            RunError: the one in the folder was trained on other rows, or for another number of steps.
        """
        if stream.key in self.memory:
            return self.memory[stream.key]
        with safe_open(self._path(stream), framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if record["own"] != _own(stream):
            raise RunError(
                f"{self._path(stream)} was trained on other rows or steps; choose another out folder"
            )
        self.memory[stream.key] = Kept(state, record["losses"], record["seconds"])
        return self.memory[stream.key]

    def seconds(self) -> float:
        """What the models in memory took."""
        return sum(kept.seconds for kept in self.memory.values())

    def save(
        self, streams: Sequence[Stream], step: int, tensors: Mapping[str, Tensor], seconds: float
    ) -> None:
        """A checkpoint of models in training."""
        if self.folder is not None:
            place = {"own": [_own(s) for s in streams], "step": step, "seconds": seconds}
            write_tensors(self._checkpoint(streams), tensors, {"format": "pt", "place": json.dumps(place)})

    def load(self, streams: Sequence[Stream]) -> tuple[int, float, dict[str, Tensor]] | None:
        """The step, the seconds and the tensors of their checkpoint; None where there is none of just these."""
        path = None if self.folder is None else self._checkpoint(streams)
        if path is None or not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            place = json.loads(file.metadata()["place"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if place["own"] != [_own(s) for s in streams]:
            return None
        return place["step"], place["seconds"], tensors

    def drop(self, streams: Sequence[Stream]) -> None:
        """Forgets their checkpoint."""
        if self.folder is not None:
            self._checkpoint(streams).unlink(missing_ok=True)

    def _path(self, stream: Stream) -> Path:
        assert self.folder is not None
        return self.folder / f"model-{stream.key:05d}.safetensors"

    def _checkpoint(self, streams: Sequence[Stream]) -> Path:
        assert self.folder is not None
        return self.folder / f"checkpoint-{streams[0].key:05d}.safetensors"


def _own(stream: Stream) -> str:
    """What a model has for itself: key, steps and rows, as a digest."""
    rows = stream.rows.cpu().numpy().tobytes()
    return hashlib.sha256(f"{stream.key}/{stream.steps}/".encode() + rows).hexdigest()[:32]
