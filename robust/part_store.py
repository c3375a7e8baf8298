"""The folder of a run that grows part by part: parts are there whole or not at all, and are never made twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from robust.checkpoint import write_tensors
from robust.digest import file_digest, read_json, write_atomic, write_json
from robust.errors import RunError

PLAN, SECONDS = "plan.json", "seconds.json"


def planned(attacks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Attacks' settings by the names that the table gives them, JSON-ready."""
    found = {name: {"attack": attack.name, **attack.config()} for name, attack in attacks.items()}
    return dict(json.loads(json.dumps(found)))


def part_of(folder: str, told: Mapping[str, Any]) -> str:
    """The name of the part that an attack with such settings makes."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return f"{folder}/{told['attack']}-{digest[:12]}"


class PartStore:
    """The parts of one run, in a folder or nowhere.

    Args:
        out: the folder; None keeps parts in memory only.
        identity: what the run is about. resume: whether the folder may hold a part of it already.
        attacks: settings by name; those of a run to resume may be fewer, but no others.
        folders: where parts lie below the run's folder.

    Raises:
        RunError: the folder holds something and `resume` is not given, or something else.
    """

    def __init__(
        self,
        out: Path | None,
        identity: Mapping[str, Any],
        resume: bool,
        attacks: Mapping[str, Mapping[str, Any]],
        folders: Sequence[str],
    ) -> None:
        self.out, self._memory = out, dict[str, dict[str, Tensor]]()
        self._spent, self._within = 0.0, 0.0
        if out is None:
            return
        if out.exists() and any(out.iterdir()):
            if not resume:
                raise RunError(
                    f"{out} already holds something; add --resume to go on, or choose another --out"
                )
            before = read_json(out / PLAN)
            _compare(before, identity, "")
            kept = before.get("attacks", {})
            _compare({**attacks, **kept}, attacks, "the attack ")
            attacks = {**kept, **attacks}
        for name in folders:
            (out / name).mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, {**identity, "attacks": {name: dict(told) for name, told in attacks.items()}})
        if (out / SECONDS).exists():
            self._spent = float(read_json(out / SECONDS)["seconds"])

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A part: the one that is kept, or else what `make` makes."""
        if name in self._memory:
            return self._memory[name]
        place = None if self.out is None else self.out / f"{name}.safetensors"
        if place is not None and place.exists():
            from safetensors.torch import load_file

            return load_file(place)
        begun, outside = time.perf_counter(), self._within
        self._within = 0.0
        found = make()
        if place is None:
            self._memory[name] = found
        else:
            write_tensors(place, found)
        took = time.perf_counter() - begun
        self.note(took - self._within)  # parts that it made on the way have booked theirs
        self._within = outside + took
        return found

    def seconds(self, now: float) -> float:
        """What the run took in all its sessions, of which this one took `now`."""
        return now if self.out is None else self._spent

    def note(self, seconds: float) -> None:
        """Books what a part took; nothing where nothing is kept."""
        if self.out is None:
            return
        self._spent += seconds
        write_json(self.out / SECONDS, {"seconds": self._spent})

    def finish(self, name: str, found: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Writes the record, files beside it, and the hashes of all of them."""
        assert self.out is not None
        write_json(self.out / name, found)
        for other, content in files.items():
            write_atomic(self.out / other, content)
        write_json(
            self.out / "digests.json", {key: file_digest(self.out / key) for key in (name, *files, PLAN)}
        )


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise RunError(
                f"the run to resume has {what}{key}={before.get(key)}, and this one {value}; choose another --out"
            )
