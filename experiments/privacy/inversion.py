"""What can be seen again of 20 CIFAR-10 images in gradients of two small networks, plain and noised.

    python -m robust.experiments.privacy.inversion OUT RECORD [--data imagefolder:DIR] [--n 20] [--restarts 4]

OUT keeps every recovered image, and for each row of the table a report with pictures: a killed run goes on with the
same command. RECORD becomes inversion.json. The private gradient is that of DP-SGD on one image: clipped to norm 1,
with noise of a tenth of the clip. There the attacker is given the label, and tries besides twice the steps from several
starts, and a start from the best guess with a strong prior: one that stops early would prove nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robust.attacks.privacy import get
from robust.classifier import Classifier
from robust.conditions import conditions
from robust.data import load_data
from robust.detection import Samples
from robust.digest import write_json
from robust.errors import DataError, RobustError
from robust.inversion import Protocol
from robust.inversion_run import Question, run_inversion
from robust.rng import derive
from robust.zoo import get as architecture

SEED, N, HELD_OUT = 0, 20, 500
PLAIN, NOISED = Protocol(), Protocol(clip=1.0, noise=0.1)
STEPS: Mapping[str, tuple[str, int]] = {
    "lenet-sigmoid": ("idlg", 1000),
    "lenet-relu": ("inverting-gradients", 600),
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """A row of the table: a network, what is observed of it, and an attack."""

    name: str
    model: str
    attack: Any
    protocol: Protocol
    what: str

    @property
    def known(self) -> bool:
        """Whether the attacker is given the label, which noise may hide."""
        return self.protocol.noise > 0


def rows(restarts: int, share: float = 1.0) -> list[Row]:
    """All rows; `share` of the usual steps, for a trial."""
    found = []
    for model, (name, usual) in STEPS.items():
        steps = max(1, round(share * usual))
        attack, begun = get(name), get("inverting-gradients")
        guessing = begun(steps=max(1, round(share * 600)), start="prior", tv=1.0)
        found += [
            Row(f"{model}-plain", model, attack(steps=steps), PLAIN, "plain"),
            Row(f"{model}-noised", model, attack(steps=steps), NOISED, "noised"),
            Row(
                f"{model}-more", model, attack(steps=2 * steps, restarts=restarts), NOISED,
                f"noised, {restarts} starts of twice the steps",
            ),
            Row(f"{model}-prior", model, guessing, NOISED, "noised, from the guess, a strong prior"),
        ]  # fmt: skip
    return found


def build(model: str) -> Classifier:
    """The network with first weights, as both papers take it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(SEED, "inversion/weights"))
        return Classifier(architecture(model)().eval(), device="cpu", name=model)


def measure(row: Row, samples: Samples, held_out: Samples, out: Path, say: Say) -> dict[str, Any]:
    """One row, in a folder of its own."""
    question = Question(
        build(row.model), samples, held_out, {row.attack.name: row.attack}, row.protocol, row.known, SEED,
        {"untrained": True},
    )  # fmt: skip
    said = time.monotonic()

    def tell(done: float, text: str) -> None:
        nonlocal said
        if time.monotonic() - said > 20:
            said = time.monotonic()
            say(f"{row.name} {done:4.0%}")

    found = run_inversion(question, out=out, resume=out.exists(), command=sys.argv, progress=tell)
    told = found["attacks"][0]
    say(
        f"{row.name:22} {told['psnr']:5.1f} dB, guess {told['guess_psnr']:.1f} dB, {told['attack_seconds']:.0f} seconds"
    )
    return {
        "row": row.name, "model": row.model, "what": row.what, "known_labels": row.known,
        "protocol": row.protocol.config(), "guess": found["guess"]["name"], **told,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m robust.experiments.privacy.inversion", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--n", type=int, default=N)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--restarts", type=int, default=4, help="where noise is met with more")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual steps, for a trial")
    parser.add_argument("--only", help="rows whose names begin so, for a trial; no record is written")
    given = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        data = load_data(given.data, n=given.n + given.held_out, root=given.data_root)
        if len(data) <= given.n:
            raise DataError(f"--n: {given.data} has {len(data)} samples, which leaves none for a guess")
        x, y = data.tensors()
        samples, held_out = Samples(x[: given.n], y[: given.n]), Samples(x[given.n :], y[given.n :])
        wanted = [row for row in rows(given.restarts, given.share) if row.name.startswith(given.only or "")]
        found = [measure(row, samples, held_out, given.out / row.name, say) for row in wanted]
        if given.only is None:
            kept = {"n": len(samples.x), "held_out": len(held_out.x), "threads": torch.get_num_threads()}
            write_json(given.record, {**conditions(torch.device("cpu")), **kept, "rows": found})
    except RobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
