"""The part of a README that is made from records: printed, or put between its marks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from robust.digest import write_atomic
from robust.errors import RobustError, RunError


@dataclass(frozen=True)
class Page:
    """A README and what is made anew in it.

    Attributes:
        module: how it is run, for the line on its usage.
        readme: the file; mark: the word in its two marks.
        section: gives the part between them.
        draw: makes the figures beside it, whenever it is written.
    """

    module: str
    readme: Path
    mark: str
    section: Callable[[], str]
    draw: Callable[[], None] | None = None

    @property
    def begin(self) -> str:
        """The mark before the part."""
        return f"<!-- {self.mark}: begin -->"

    def fill(self, text: str) -> str:
        """The README's text with the present part between its marks."""
        return self.put(text, self.section())

    def put(self, text: str, part: str) -> str:
        """The README's text with a part between its marks.

        Raises:
            RunError: it lacks the marks.
        """
        finish = f"<!-- {self.mark}: end -->"
        head, begin, rest = text.partition(self.begin)
        _, end, tail = rest.partition(finish)
        if not begin or not end:
            raise RunError(f"the README lacks the marks {self.begin} and {finish}")
        return f"{head}{begin}\n\n{part}\n\n{end}{tail}"

    def main(self, arguments: list[str]) -> int:
        """Prints the part; with ``--write`` it replaces the README's."""
        if arguments not in ([], ["--write"]):
            print(f"usage: python -m {self.module} [--write]", file=sys.stderr)
            return 2
        try:
            if not arguments:
                print(self.section())
                return 0
            write_atomic(self.readme, self.fill(self.readme.read_text(encoding="utf-8")).encode())
            if self.draw is not None:
                self.draw()
        except RobustError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        return 0
