"""The journal of a run: what was found, written so that a kill at any moment loses only the group under way.

A *group* is one attack on one chunk of samples. Its evidence goes to a numbered shard that is renamed into place; then
its records and a closing ``commit`` line are appended to ``samples.jsonl`` and flushed to disk. Reading stops at the
last commit, so that a group counts once or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from robust.answers import ANSWERS
from robust.cost import Cost
from robust.digest import flush_folder, read_json, write_atomic, write_json
from robust.errors import RunError

Record = dict[str, Any]
PLAN, SAMPLES, EVIDENCE = "plan.json", "samples.jsonl", "evidence"
PREPARED = "prepare"  # the name under which what attacks learn before the first sample is charged


@dataclass
class Pages:
    """Whole groups, as ``samples.jsonl`` holds them.

    Attributes:
        groups: each group's records by its key, in order; commits: their closing lines.
        end: length in bytes of the whole groups; what follows belongs to none.
    """

    groups: dict[str, list[Record]] = field(default_factory=dict)
    commits: list[Record] = field(default_factory=list)
    end: int = 0


def read_pages(raw: bytes) -> Pages:
    """Reads up to the last commit; a torn or foreign line ends the reading."""
    pages, position, pending = Pages(), 0, list[Record]()
    for line in raw.splitlines(keepends=True):
        position += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        if "commit" not in record:
            pending.append(record)
            continue
        pages.groups[record["commit"]["key"]] = pending
        pages.commits.append(record["commit"])
        pages.end, pending = position, []
    return pages


def stage_table(commits: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per radius and attack: attempted, broken, cost, summed over the chunks."""
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    for commit in commits:
        row = rows.setdefault(
            (commit["attack"], commit["eps"]),
            {"attack": commit["attack"], "eps": commit["eps"], "attempted": 0, "broken": 0, "cost": Cost()},
        )
        row["attempted"] += commit["attempted"]
        row["broken"] += commit["broken"]
        row["cost"] += Cost(**commit["cost"])
    return [{**row, "cost": row["cost"].to_dict()} for row in rows.values()]


def total_cost(commits: Sequence[Record]) -> Cost:
    """The sum of all groups' costs."""
    return sum((Cost(**commit["cost"]) for commit in commits), Cost())


def require_same(stored: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raises `RunError` unless the plan of a run to resume is the stored one."""
    for key, value in plan.items():
        if stored.get(key) == json.loads(json.dumps(value)):
            continue
        if key in ("model", "data"):
            raise RunError(f"the run to resume is about another {key}; choose another folder")
        raise RunError(
            f"the run to resume has {key}={stored.get(key)!r}, not {value!r}; choose another folder"
        )


class Journal:
    """Groups in memory (``out=None``) or in a run folder.

    Attributes:
        groups: the committed groups' records by key, in order; commits: their closing lines.
        started: when the run began, also across resumes.
    """

    def __init__(self, out: Path | None, plan: dict[str, Any], resume: bool = False) -> None:
        self.out = out
        self.groups: dict[str, list[Record]] = {}
        self.commits: list[Record] = []
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._known: dict[int, tuple[dict[str, Tensor], Cost]] = {}
        self._shards = 0
        if out is None:
            return
        if resume and (out / PLAN).exists():
            self._reopen(out, plan)
        else:
            self._open(out, plan)

    def _open(self, out: Path, plan: dict[str, Any]) -> None:
        """A new folder; what a kill at this very moment left behind does not count as something."""
        if out.exists() and (not out.is_dir() or any(path.name != f".{PLAN}.part" for path in out.iterdir())):
            hint = "add --resume to continue it" if (out / PLAN).exists() else "choose another folder"
            raise RunError(f"{out} already holds something; {hint}")
        new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / PLAN, {**plan, "started": self.started})
        except (OSError, RunError) as error:
            if new:
                with suppress(OSError):
                    out.rmdir()
            reason = error.strerror if isinstance(error, OSError) else error
            raise RunError(f"cannot write to {out}: {reason}") from error
        self._make_room(out)

    def _reopen(self, out: Path, plan: dict[str, Any]) -> None:
        """Whole groups are taken over; what follows the last commit is cut off."""
        stored = read_json(out / PLAN)
        require_same(stored, plan)
        self.started = stored.get("started", self.started)
        self._make_room(out)
        try:
            raw = (out / SAMPLES).read_bytes() if (out / SAMPLES).exists() else b""
            pages = read_pages(raw)
            if pages.end < len(raw):
                os.truncate(out / SAMPLES, pages.end)
        except OSError as error:
            raise RunError(f"cannot continue {out}: {error.strerror or error}") from error
        self.groups, self.commits = pages.groups, pages.commits
        self._shards = sum(commit["shard"] is not None for commit in self.commits)
        for shard in range(self._shards):
            if not self._shard(shard).is_file():
                raise RunError(
                    f"{self._shard(shard)} is missing: the run cannot be continued; choose another folder"
                )

    @staticmethod
    def _make_room(out: Path) -> None:
        try:
            (out / EVIDENCE).mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write to {out}: {error.strerror or error}") from error

    def commit(self, commit: Record, records: Sequence[Record], index: Tensor, evidence: Tensor) -> None:
        """Makes a group permanent.

        Args:
            commit: the group's summary; needs "key".
            index: (M,) sample positions; evidence: (M, C, H, W) their adversarial points.
        """
        shard = self._shards if len(index) else None
        commit = {**commit, "shard": shard}
        if shard is not None:
            self._store(shard, index, evidence)
        if self.out is not None:
            lines = [*records, {"commit": commit}]
            self._append(self.out / SAMPLES, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.groups[commit["key"]] = list(records)
        self.commits.append(commit)
        self._shards += shard is not None

    def _store(self, shard: int, index: Tensor, evidence: Tensor) -> None:
        if self.out is None:
            self._memory.append((index.cpu(), evidence.cpu()))
            return
        tensors = {"index": index.cpu().contiguous(), "adversarial": evidence.cpu().contiguous()}
        write_atomic(self._shard(shard), save(tensors))

    def _shard(self, shard: int) -> Path:
        assert self.out is not None
        return self.out / EVIDENCE / f"{shard:06d}.safetensors"

    @staticmethod
    def _append(path: Path, content: bytes) -> None:
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            if not size:
                flush_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise RunError(
                f"cannot write {path}: {error.strerror or error}; free space, then --resume"
            ) from error

    def keep(self, number: int, learned: dict[str, Tensor], cost: Cost) -> tuple[dict[str, Tensor], Cost]:
        """Keeps what the attack of a stage learnt and what that took, before it is charged: nothing is learnt twice."""
        if self.out is not None:
            tensors = {name: value.contiguous() for name, value in learned.items()}
            write_atomic(self._learned(number), save(tensors, {"cost": json.dumps(cost.to_dict())}))
        self._known[number] = learned, cost
        return learned, cost

    def known(self, number: int) -> tuple[dict[str, Tensor], Cost] | None:
        """What `keep` has kept of a stage, in this process or the one that was killed; else None."""
        if number not in self._known and self.out is not None and self._learned(number).is_file():
            path = self._learned(number)
            try:
                with safe_open(path, "pt") as file:
                    cost = Cost(**json.loads(file.metadata()["cost"]))
                    self._known[number] = {name: file.get_tensor(name) for name in file.keys()}, cost  # noqa: SIM118
            except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
                raise RunError(f"{path} cannot be read: {error}") from error
        return self._known.get(number)

    def _learned(self, number: int) -> Path:
        assert self.out is not None
        return self.out / EVIDENCE / f"learned-{number}.safetensors"

    def cost(self) -> Cost:
        """What all groups took."""
        return total_cost(self.commits)

    def repeated(self) -> int:
        """Points that all groups sent once more, which their costs hold."""
        return sum(commit.get("repeated", 0) for commit in self.commits)

    def evidence(self) -> tuple[Tensor, Tensor]:
        """Positions (M,) ascending and points (M, C, H, W) of all groups, which break a sample at most once."""
        parts = self._memory if self.out is None else [self._read(shard) for shard in range(self._shards)]
        if not parts:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        index = torch.cat([part[0] for part in parts])
        order = index.argsort()
        return index[order], torch.cat([part[1] for part in parts])[order]

    def _read(self, shard: int) -> tuple[Tensor, Tensor]:
        path = self._shard(shard)
        try:
            tensors = load_file(path)
            return tensors["index"], tensors["adversarial"]
        except (OSError, KeyError, SafetensorError) as error:
            raise RunError(f"the evidence {path} cannot be read: {error}") from error


def sweep(out: Path) -> None:
    """Removes from a finished run's folder what only a running job needs."""
    shutil.rmtree(out / EVIDENCE, ignore_errors=True)
    with suppress(OSError):
        (out / PLAN).unlink(missing_ok=True)
        (out / ANSWERS).unlink(missing_ok=True)
        for path in out.glob("*.part"):
            path.unlink()
