"""The answer log: what was sent to a model elsewhere and what it said, so that no kill pays for an answer twice.

It holds the one group of a run's journal that is under way. Before a batch is sent, an *intent* is written and flushed
to disk: which points, how many, under which key. The answer follows it. A resumed run asks the same batches in the
same order, since attacks are deterministic: answered ones are taken from the log, and the batch that was in flight is
sent again under its old key, and counted once more. The journal's commit ends the group, and only then the log is
dropped; a log of a committed group says nothing any more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust.digest import flush_folder, write_atomic
from robust.errors import RunError

ANSWERS = "answers.jsonl"


@dataclass
class Sent:
    """A batch that was sent.

    Attributes:
        key: its idempotency key; digest: of its points; points: how many.
        sends: how often it was sent and may have been processed.
        answer: (points, classes) or (points,), None if none came.
        end: where its lines end in the file.
    """

    key: str
    digest: str
    points: int
    sends: int = 0
    answer: Tensor | None = None
    end: int = 0


@dataclass
class _Page:
    """What a log's file holds: its group, points lost to it, where the first line ends, and the batches in order."""

    group: str | None = None
    lost: int = 0
    begin: int = 0
    end: int = 0
    batches: list[Sent] = field(default_factory=list)


class AnswerLog:
    """The log in a run's folder.

    Args:
        out: the run folder.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / ANSWERS
        self.group = ""
        self._page = _Page()
        self._next = 0

    def begin(self, group: str, committed: Container[str]) -> int:
        """Opens the log for a group; returns the points that were sent in vain, which are spent all the same.

        Args:
            group: the journal's key of the group; committed: those that the journal holds already.
        """
        self.group, self._next = group, 0
        self._page = page = _read(self.path)
        if page.group is None or page.group in committed:
            self._page = _Page()
            self.drop()
            return 0
        if page.group != group:  # another run of this folder ended in another group
            self.settle()
        elif page.end < self.path.stat().st_size:
            os.truncate(self.path, page.end)  # a torn line: nothing may be appended to it
        return self._page.lost

    def recall(self, x: Tensor) -> Sent | None:
        """The batch x (N, C, H, W), if it is the one that was sent at this place of the group; else None."""
        batches = self._page.batches
        if self._next == len(batches) or batches[self._next].digest != batch_digest(x):
            return None
        self._next += 1
        return batches[self._next - 1]

    def settle(self) -> int:
        """Gives up the batches that were not recalled; returns their points, which were spent in vain.

        The log keeps that number, and the batches before them.
        """
        page, rest = self._page, self._page.batches[self._next :]
        if not rest and page.group in (None, self.group):
            return 0
        points = sum(sent.sends * sent.points for sent in rest)
        kept = page.batches[: self._next]
        raw = self.path.read_bytes()[page.begin : kept[-1].end if kept else page.begin]
        header = _line({"group": self.group, "lost": page.lost + points})
        write_atomic(self.path, header + raw)
        self._page = _Page(self.group, page.lost + points, len(header), len(header) + len(raw), kept)
        return points

    def intend(self, key: str, x: Tensor) -> None:
        """Notes, for good, that a batch is about to be sent."""
        content = _line({"sent": key, "points": len(x), "digest": batch_digest(x)})
        if not self.path.exists() or not self.path.stat().st_size:
            content = _line({"group": self.group, "lost": 0}) + content
        self._append(content, flush=True)

    def void(self, key: str) -> None:
        """Notes that the last sending of a batch was refused before anything was processed."""
        self._append(_line({"void": key}))

    def answer(self, key: str, answer: Tensor) -> None:
        """Notes an answer; the next intent flushes it to disk with itself."""
        self._append(_line({"answer": key, **_encode(answer)}))

    def drop(self) -> None:
        """Forgets the group, after the journal's commit."""
        with suppress(FileNotFoundError):
            os.truncate(self.path, 0)

    def _append(self, content: bytes, flush: bool = False) -> None:
        size = self.path.stat().st_size if self.path.exists() else None
        try:
            with self.path.open("ab") as stream:
                stream.write(content)
                stream.flush()
                if flush:
                    os.fsync(stream.fileno())
            if size is None:
                flush_folder(self.path.parent)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size or 0)
            # no OSError of its own: those of a backend are reasons to try again
            raise RunError(
                f"cannot write {self.path}: {error.strerror or error}; free space, then --resume"
            ) from error


def batch_digest(x: Tensor) -> str:
    """sha256 (hex) over a batch's shape and float32 values."""
    hasher = hashlib.sha256(repr(tuple(x.shape)).encode())
    hasher.update(x.detach().cpu().float().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _line(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _encode(answer: Tensor) -> dict[str, Any]:
    """An answer's values bit for bit."""
    values = answer.detach().cpu().numpy()
    values = values.astype("<i8" if values.dtype.kind in "iu" else "<f4")
    return {
        "shape": list(values.shape),
        "type": values.dtype.str,
        "data": base64.b64encode(values.tobytes()).decode(),
    }


def _decode(record: dict[str, Any]) -> Tensor:
    raw = base64.b64decode(record["data"], validate=True)
    values = np.frombuffer(raw, dtype=record["type"]).reshape(record["shape"])
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))


def _read(path: Path) -> _Page:
    """Reads a log up to its first line that is torn or makes no sense."""
    page = _Page()
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return page
    with stream:
        for line in stream:
            try:
                record = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                _take(page, record)
            except (ValueError, LookupError, TypeError, AssertionError):
                break
            page.end += len(line)
            if page.batches:
                page.batches[-1].end = page.end
            else:
                page.begin = page.end
    return page


def _take(page: _Page, record: dict[str, Any]) -> None:
    """Adds a line to what was read."""
    if page.group is None:
        page.group, page.lost = record["group"], record["lost"]
        return
    if "sent" in record:
        last = page.batches[-1] if page.batches else None
        if last is None or last.key != record["sent"]:
            last = Sent(record["sent"], record["digest"], record["points"])
            page.batches.append(last)
        last.sends += 1
        return
    last = page.batches[-1]
    assert record.get("void", record.get("answer")) == last.key
    if "void" in record:
        last.sends -= 1
    else:
        last.answer = _decode(record)
