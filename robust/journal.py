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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from robust.digest import read_json, write_atomic, write_json
from robust.errors import RunError

Record = dict[str, Any]
PLAN, SAMPLES, EVIDENCE = "plan.json", "samples.jsonl", "evidence"
FINAL = ("manifest.json", "adversarial.safetensors", "digests.json")


class Journal:
    """Groups in memory (``out=None``) or in a run folder.

    Attributes:
        groups: the committed groups' records by key, in order.
    """

    def __init__(self, out: Path | None, plan: dict[str, Any], resume: bool = False) -> None:
        self.out = out
        self.groups: dict[str, list[Record]] = {}
        self.commits: list[Record] = []
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._shards = 0
        if out is not None:
            self._open(out, plan, resume)

    def _open(self, out: Path, plan: dict[str, Any], resume: bool) -> None:
        if (out / PLAN).exists() and resume:
            self._same(read_json(out / PLAN), plan)
            self._replay(out / SAMPLES)
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            hint = "add --resume to continue it" if (out / PLAN).exists() else "choose another folder"
            raise RunError(f"{out} already holds something; {hint}")
        try:
            (out / EVIDENCE).mkdir(parents=True)
        except OSError as error:
            raise RunError(f"cannot write to {out}: {error.strerror or error}") from error
        write_json(out / PLAN, plan)

    @staticmethod
    def _same(stored: dict[str, Any], plan: dict[str, Any]) -> None:
        for key, value in plan.items():
            if stored.get(key) != json.loads(json.dumps(value)):
                raise RunError(f"the run to resume has {key}={stored.get(key)!r}, not {value!r}; choose another folder")

    def _replay(self, path: Path) -> None:
        """Reads whole groups and cuts off what follows the last commit."""
        raw = path.read_bytes() if path.exists() else b""
        end, position, pending = 0, 0, []
        for line in raw.splitlines(keepends=True):
            position += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                break
            if "commit" not in record:
                pending.append(record)
                continue
            self._remember(record["commit"], pending)
            pending, end = [], position
        if end < len(raw):
            with path.open("r+b") as stream:
                stream.truncate(end)
        self._shards = sum(1 for commit in self.commits if commit["shard"] is not None)

    def _remember(self, commit: Record, records: list[Record]) -> None:
        self.groups[commit["key"]] = records
        self.commits.append(commit)

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
        self._remember(commit, list(records))

    def _store(self, shard: int, index: Tensor, evidence: Tensor) -> None:
        self._shards += 1
        if self.out is None:
            self._memory.append((index.cpu(), evidence.cpu()))
            return
        tensors = {"index": index.cpu().contiguous(), "adversarial": evidence.cpu().contiguous()}
        write_atomic(self.out / EVIDENCE / f"{shard:06d}.safetensors", save(tensors))

    @staticmethod
    def _append(path: Path, content: bytes) -> None:
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            if path.exists():
                os.truncate(path, size)
            raise RunError(f"cannot write {path}: {error.strerror or error}; free space, then --resume") from error

    def evidence(self) -> tuple[Tensor, Tensor]:
        """Positions (M,) and points (M, C, H, W) of all groups; the last one of a sample counts."""
        parts = self._memory if self.out is None else [self._read(k) for k in range(self._shards)]
        if not parts:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _read(self, shard: int) -> tuple[Tensor, Tensor]:
        assert self.out is not None
        path = self.out / EVIDENCE / f"{shard:06d}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"the evidence {path} cannot be read: {error}") from error
        return tensors["index"], tensors["adversarial"]

    def clear(self) -> None:
        """Removes what only a running job needs."""
        if self.out is not None:
            shutil.rmtree(self.out / EVIDENCE, ignore_errors=True)
            (self.out / PLAN).unlink(missing_ok=True)
