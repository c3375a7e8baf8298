"""`robust report RUN`: a run's report written again, or its evidence checked, from what the run folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options, settings
from robust.errors import RunError, VerificationError

if TYPE_CHECKING:
    from robust.verdict import Verdict

REPORT = "report.html"

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check the evidence with the model and the data, and write nothing.")
]


def render_report(
    run: Run,
    model: options.Model = None,
    data: options.DataName = None,
    verify: Verify = False,
    weights: options.Weights = None,
    device: options.Device = None,
    data_root: options.DataRoot = None,
    defense: settings.Defenses = None,
    as_json: options.Json = False,
) -> None:
    """Write a run's report again, or verify its evidence; model and data are those of the run's own command."""
    from robust.verdict import Verdict

    if not run.is_dir():
        raise RunError(f"{run} is no run folder; name the folder that `robust eval` wrote")
    _check_files(run, with_report=verify)
    verdict = Verdict.load(run)
    here: dict[str, Any] = {
        "model": model, "data": data, "weights": weights, "device": device, "data_root": data_root,
        "defense": defense or None,
    }  # fmt: skip
    subject = _subject(verdict, {name: value for name, value in here.items() if value is not None})
    found = _verify(verdict, subject) if verify else _render(verdict, subject)
    if as_json:
        print(json.dumps({**found, "out": str(run)}))
    elif verify:
        print(
            f"verified: {found['samples']} samples, {found['examples']} adversarial examples, every file as it was"
        )
        for row in found["marginal_differences"]:
            print(f"sample {row} is within float noise and comes out differently here")
    else:
        print(found["report"])


def _verify(verdict: Verdict, subject: options.Subject) -> dict[str, Any]:
    model, data = subject.load()
    return verdict.verify(model, data)


def _render(verdict: Verdict, subject: options.Subject) -> dict[str, Any]:
    """A new report.html, and its digest in the place of the old one's."""
    from robust.digest import file_digest, read_json, write_json
    from robust.report import write_report

    assert verdict.out is not None
    data = subject.load_data(tuple(verdict.manifest["model"]["bounds"]))
    _check_data(verdict, data)
    path = write_report(verdict, data, None, None, verdict.out / REPORT)
    digests = verdict.out / "digests.json"
    write_json(digests, {**read_json(digests), REPORT: file_digest(path)})
    return {"report": str(path)}


def _check_data(verdict: Verdict, data: Any) -> None:
    """Refuse to show images that are not those that were evaluated."""
    from robust.digest import sample_digest

    if len(data) != len(verdict):
        raise VerificationError(
            f"{data.name} has {len(data)} samples here, the verdict is about {len(verdict)}"
        )
    for row in verdict.adversarial_index.tolist():
        x, y = data[row]
        if sample_digest(x, y) != verdict.samples.digest[row]:
            raise VerificationError(f"sample {row} of {data.name} is not the one that was evaluated")


def _check_files(run: Path, *, with_report: bool) -> None:
    """What `robust.verify` checks first; a report that is about to be replaced may be lost or altered."""
    from robust.digest import file_digest, read_json
    from robust.verify import check_files

    if not (run / "digests.json").exists():
        raise RunError(f"{run} is not a finished run; the command that began it, with --resume, goes on")
    if with_report:
        check_files(run)
    for name, digest in read_json(run / "digests.json").items():
        path = run / name
        if name != REPORT and not (path.is_file() and file_digest(path) == digest):
            raise VerificationError(f"{path} was altered: its sha256 differs from digests.json")


def _subject(verdict: Verdict, here: dict[str, Any]) -> options.Subject:
    """The model and data of the command that made the verdict, with what is given here in their place."""
    from robust.cli.main import parse

    _, *arguments = verdict.manifest["command"] or [""]
    if arguments[:1] != ["eval"]:
        if "model" not in here or "data" not in here:
            raise RunError(f"{verdict.out} was not made by `robust eval`; give MODEL and --data")
        arguments = ["eval"]
    given = parse(arguments)
    names = (
        "model",
        "data",
        "weights",
        "mean",
        "std",
        "bounds",
        "device",
        "data_root",
        "norm",
        "eps",
        "n",
        "seed",
        "answers",
        "classes",
        "endpoint",
        "defense",
    )
    chosen = {**{name: given[name] for name in names}, **here, "n": len(verdict)}
    if "model" in here:  # which need not be deployed as the other one was
        chosen |= {"answers": None, "endpoint": None}
    return options.make_subject(**chosen)
