"""`robust list KIND`: what there is by name, with the first line of its documentation."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli.options import Json, print_table
from robust.errors import UnknownName
from robust.registry import Registry, card, room, unknown
from robust.suites import DESCRIPTIONS

if TYPE_CHECKING:
    from rich.table import Table

# What people may ask for: the room that holds it, and one line that says what it is for.
KINDS = {
    "attacks": ("attacks", "evasion: what `robust attack` and `robust eval --suite` run"),
    "suites": ("suites", "lists of attacks that make a verdict"),
    "losses": ("losses", "what gradient attacks maximise"),
    "models": ("zoo", "MODEL as zoo:NAME, or deployed"),
    "data": ("data", "DATA by name, folder or file"),
    "defenses": ("defenses", "wrappers around a model"),
    "recipes": ("defenses.training", "training methods, for `robust train --recipe`"),
    "accountants": (
        "defenses.privacy.accountants",
        "what private training costs, for `robust privacy epsilon`",
    ),
    "metrics": ("metrics", "measures of attacks and defences"),
    "corruptions": ("corruptions", "natural corruptions of images"),
    "poisoning": ("attacks.poisoning", "attacks on the training data"),
    "privacy-attacks": ("attacks.privacy", "what a model leaks about its training data"),
    "strategies": ("federated.strategies", "federated algorithms"),
    "aggregators": ("federated.aggregation", "one federated update from many"),
    "malicious": ("federated.malicious", "malicious federated clients"),
    "compression": ("federated.compression", "smaller federated updates"),
    "partitions": ("federated.partitions", "how data is spread over clients"),
    "engines": ("federated.engines", "how federated clients are run"),
    "benchmarks": ("experiments.benchmarks", "what `robust bench` measures"),
}

_PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}")
# Classes of cost: the most model passes a sample that survives takes at default settings; "high" is above them.
COSTS = ((100, "low"), (2_000, "medium"))

Kind = Annotated[str | None, typer.Argument(metavar="KIND", help="One of " + ", ".join(KINDS) + ".")]


def list_names(kind: Kind = None, as_json: Json = False) -> None:
    """List attacks, defenses, recipes, models, data and every other kind of thing by name."""
    if kind is None:
        rows = [{"name": name, "card": line} for name, (_, line) in KINDS.items()]
        title = "kind"
    elif kind in KINDS:
        rows, title = rows_of(kind), kind
    else:
        raise UnknownName(unknown("kind", kind, list(KINDS)))
    if as_json:
        print(json.dumps({"kind": kind or "kinds", "rows": rows}, ensure_ascii=False))
    elif rows:
        print_table(_table(title, rows))
    else:
        print(f"no {kind} in this version yet")


def rows_of(kind: str) -> list[dict[str, Any]]:
    """One row per name of a kind: its card and, for attacks, norms, knowledge, paper and class of cost.

    Of recipes the paper, how many gradients a step takes for each sample, and whether they can be trained privately.
    """
    if kind == "models":
        return _models()
    if kind == "suites":
        return [{"name": name, "card": line} for name, line in DESCRIPTIONS.items()]
    registry = room(KINDS[kind][0])
    return [_row(registry, name) for name in registry]


def _row(registry: Registry, name: str) -> dict[str, Any]:
    item = registry.load(name)
    row: dict[str, Any] = {"name": name, "card": card(item)}
    if hasattr(item, "norms"):
        row["norms"] = list(item.norms)
    if hasattr(item, "knowledge"):
        row["knowledge"] = item.knowledge
    if hasattr(item, "attacked_by"):
        row |= {"kind": item.kind, "attacked by": item.attacked_by(), "paper": _papers(row["card"])}
    if hasattr(item, "guarantee"):
        row |= {"kind": item.kind, "guarantee": item.guarantee, "paper": _papers(row["card"])}
    if hasattr(item, "samplings"):
        row |= {"sampling": list(item.samplings), "paper": _papers(row["card"])}
        row |= {"number": "upper bound" if item.guaranteed else "approximation"}
    if hasattr(item, "passes"):
        row |= {"paper": _papers(row["card"]), "cost": _cost_class(item.passes())}
    if hasattr(item, "gradients"):
        row |= {"paper": _papers(row["card"]), "gradients": item.gradients()}
    if hasattr(item, "sees"):
        models = item().needs() if hasattr(item, "needs") else 0
        row |= {
            "kind": item.kind,
            "sees": item.sees,
            "reference models": f"{models} or more" if models else "none",
        }
        row |= {"paper": _papers(row["card"])}
    if hasattr(item, "unprivate"):
        row |= {"private": "no" if item.unprivate() else "yes"}
    return row


def _papers(line: str) -> str:
    """The papers that a card names: their arXiv numbers, or author and year where there are none."""
    cited = re.search(r"\(([^()]* \d{4})[^()]*\)", line)
    return ", ".join(_PAPER.findall(line)) or (cited[1] if cited else "")


def _cost_class(passes: float) -> str:
    """What a sample that survives costs at default settings: model passes, a gradient counting as three."""
    return next((name for limit, name in COSTS if passes <= limit), "high")


def _models() -> list[dict[str, Any]]:
    """Shipped models first, then the architectures that need weights from a file, then deployed ones."""
    from robust.models import DEPLOYED
    from robust.models import REGISTRY as KINDS_OF_MODEL
    from robust.zoo import ENTRIES, REGISTRY

    shipped = [
        {"name": f"zoo:{name}", "card": entry.card, "data": entry.data, "weights": "shipped"}
        for name, entry in ENTRIES.items()
    ]
    bare = [
        {"name": f"zoo:{name}", "card": card(REGISTRY.load(name)), "data": "", "weights": "--weights FILE"}
        for name in REGISTRY
        if name not in ENTRIES
    ]
    bare.append(
        {
            "name": "groupnorm:MODEL",
            "card": card(KINDS_OF_MODEL.load("groupnorm")),
            "data": "",
            "weights": "--weights FILE",
        }
    )
    forms = {"onnx": "onnx:FILE", "http": "http://HOST:PORT", "https": "https://HOST"}
    deployed = [
        {"name": forms[kind], "card": card(DEPLOYED.load(kind)), "data": "", "weights": "its own"}
        for kind in DEPLOYED
    ]
    return shipped + bare + deployed


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = list(
        dict.fromkeys(key for row in rows for key in row if key not in ("card", "paper", "guarantee"))
    )
    for column in columns:
        table.add_column(title if column == "name" else column, no_wrap=column == "name")
    table.add_column("what it is", overflow="fold")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*(" ".join(c) if isinstance(c, list) else str(c) for c in cells), row["card"])
    return table
