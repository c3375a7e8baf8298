"""The README's part on inversion: ``python -m robust.experiments.privacy.inversion_page [--write]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust.digest import read_json
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.pages import Page

FOLDER = Path(__file__).parent
README, RECORD = FOLDER / "README.md", FOLDER / "inversion.json"


def row(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the record says of a row, such as "lenet-relu-plain"."""
    found: Mapping[str, Any] = next(part for part in record["rows"] if part["row"] == name)
    return found


def findings(record: Mapping[str, Any]) -> list[str]:
    """What the record shows, a line each."""
    found = []
    for model in dict.fromkeys(part["model"] for part in record["rows"]):
        plain = row(record, f"{model}-plain")
        noised = [part for part in record["rows"] if part["model"] == model and part["protocol"]["noise"]]
        best = max(noised, key=lambda part: part["gain"])
        found.append(
            f"{model}: {plain['psnr']:.1f} dB from the plain gradient (median; quartiles "
            f"{plain['quartiles'][0]:.1f} to {plain['quartiles'][1]:.1f}). Under noise of "
            f"{best['protocol']['noise']:g} of the clip no attack is more than {best['gain']:+.1f} dB above the guess "
            f"({best['what']}); more steps and starts change the median from "
            f"{row(record, f'{model}-noised')['psnr']:.1f} to {row(record, f'{model}-more')['psnr']:.1f} dB."
        )
    guess = record["rows"][0]
    found.append(
        f"The guess: the {guess['guess']} of {record['held_out']} other images, {guess['guess_psnr']:.1f} dB (median), "
        "the best of mean image, median image, mean colour and mid-grey on those others."
    )
    return found


def tell(record: Mapping[str, Any]) -> str:
    """The findings, a table of all rows, and what it was measured with."""
    heads = [
        "network",
        "gradient",
        "attack",
        "PSNR (quartiles)",
        "above the guess",
        "SSIM",
        "guess's",
        "seconds an image",
    ]
    cells = [
        [
            part["model"], part["what"], _attack(part),
            f"{part['psnr']:.1f} dB ({part['quartiles'][0]:.1f} to {part['quartiles'][1]:.1f})",
            f"{part['gain']:+.1f} dB", f"{part['ssim']:.3f}", f"{part['guess_ssim']:.3f}",
            f"{part['attack_seconds'] / record['n']:.1f}",
        ]
        for part in record["rows"]
    ]  # fmt: skip
    lines = "\n".join(f"- {line}" for line in findings(record))
    about = (
        f"{record['n']} images, {record['threads']} threads ({record['device']['name']}), torch "
        f"{record['versions']['torch']}, {record['commit']}, {record['date'][:10]}."
    )
    return f"{lines}\n\n{markdown(heads, cells)}\n\n{about}"


def _attack(part: Mapping[str, Any]) -> str:
    restarts = part["restarts"]
    return f"`{part['attack']}`, {part['steps']} steps" + (f", {restarts} starts" if restarts > 1 else "")


def section() -> str:
    """All that the record says, or that there is none."""
    return tell(read_json(RECORD)) if RECORD.exists() else "no record yet"


PAGE = Page("robust.experiments.privacy.inversion_page", README, "inversion", section)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
