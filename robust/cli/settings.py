"""`KEY=VALUE` on the command line: defences, and how a model is asked that gives answers only."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from robust.errors import ConfigError, UnknownName
from robust.registry import room, unknown

if TYPE_CHECKING:
    from robust.defense import Defense

ANSWERS = ("scores", "labels")

Answers = Annotated[
    str | None,
    typer.Option(
        "--answers",
        metavar="KIND",
        help="See the model's answers only, and no gradients: its scores, or its labels. "
        "Deployed models (onnx:, http) are seen so in any case, by their scores if nothing is said.",
        show_default=False,
    ),
]
Budget = Annotated[
    int | None,
    typer.Option("--budget", metavar="N", help="The most queries in all.", show_default=False),
]
Classes = Annotated[
    int | None,
    typer.Option(
        "--classes",
        metavar="N",
        help="How many classes a model has that gives labels. Default: the data's.",
        show_default=False,
    ),
]
Endpoint = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="KEY=VALUE",
        help="How an http(s) model is asked: timeout (seconds), retries, rate (points per second), batch (points), "
        "auth (the NAME of the environment variable that holds the Authorization header); may be repeated.",
        show_default=False,
    ),
]
Defenses = Annotated[
    list[str] | None,
    typer.Option(
        "--defense",
        metavar="NAME[:KEY=VALUE,...]",
        help="Put the model behind a defense, such as median-smooth or bit-depth:bits=4; may be repeated: inputs "
        "meet them in the order given. It is attacked as it declares; see `robust list defenses`.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class BlackBox:
    """What the command line says about a model that gives answers only: checked, but nothing asked yet."""

    answers: str | None = None
    budget: int | None = None
    classes: int | None = None
    endpoint: Mapping[str, Any] | None = None

    @property
    def wanted(self) -> bool:
        """Whether it makes an oracle of any model."""
        return self.answers is not None or self.budget is not None

    def suite(self) -> str:
        """The suite that such a model can answer."""
        return "decision" if self.answers == "labels" else "score"


def black_box(
    answers: str | None, budget: int | None, classes: int | None, endpoint: Sequence[str] | None
) -> BlackBox:
    """Checks the four options; a fault is one `ConfigError` line."""
    if answers is not None and answers not in ANSWERS:
        raise ConfigError("--answers: " + unknown("kind of answers", answers, list(ANSWERS)))
    if budget is not None and budget < 1:
        raise ConfigError(f"--budget: {budget} allows no query; give a positive number")
    if classes is not None and classes < 2:
        raise ConfigError(f"--classes: {classes} is too few to tell apart; give at least 2")
    settings = None
    if endpoint:
        from robust.config import from_mapping
        from robust.models.deployed import Endpoint as Settings

        settings = parse_settings(endpoint, "--endpoint")
        if not isinstance(settings.get("auth", ""), str):
            raise ConfigError(
                "--endpoint: auth wants the NAME of an environment variable, never the secret itself"
            )
        from_mapping(settings, Settings, "--endpoint")
    return BlackBox(answers, budget, classes, settings)


def refuse_answers(name: str) -> NoReturn:
    """Raises the line for an attack that cannot do with answers alone."""
    raise ConfigError(f"{name} needs gradients; leave out --answers, --budget, --classes and --endpoint")


def spread(texts: Sequence[str]) -> list[str]:
    """Names of comma lists one by one; what has settings stands alone."""
    return [
        part.strip()
        for text in texts
        for part in ([text] if ":" in text else text.split(","))
        if part.strip()
    ]


def parted(text: str, option: str) -> tuple[str, dict[str, Any]]:
    """``"lid:neighbours=10"`` as a name and its settings."""
    name, colon, rest = (part.strip() for part in text.partition(":"))
    return name, parse_settings(rest.split(","), option) if colon else {}


def parse_settings(settings: Sequence[str], option: str) -> dict[str, Any]:
    """``["steps=20", "loss=margin"]`` as a mapping: values as TOML writes them, any other text as it is."""
    table: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not key or not text:
            examples = {"--set": "steps=20", "--endpoint": "timeout=10", "--attack": "pgd:steps=40"}
            example = {**examples, "--detector": "lid:neighbours=10"}.get(option, "bit-depth:bits=4")
            raise ConfigError(f"{option}: {setting!r} is not KEY=VALUE; write it like {example}")
        if key in table:
            raise ConfigError(f"{option}: {key} is given twice")
        try:
            table[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            table[key] = text
    return table


def make_defenses(texts: Sequence[str] | None) -> tuple[Defense, ...]:
    """``["median-smooth", "bit-depth:bits=4"]`` as defences; an unknown name or an impossible value is one line."""
    found: list[Defense] = []
    for text in texts or []:
        name, given = parted(text, "--defense")
        try:
            kind = room("defenses").load(name)
        except UnknownName as error:
            raise UnknownName(f"--defense: {error}") from None
        if kind.kind != "transform":
            use = f"detect --detector {name}" if kind.kind == "detector" else f"certify --method {name}"
            raise ConfigError(f"--defense: {name} wraps no model; it is for robust {use}")
        found.append(_built(given, kind, name, "--defense"))
    return tuple(found)


def make_privacy_attacks(kind: str, texts: Sequence[str], *, every: bool = False) -> dict[str, Any]:
    """``["rmia:references=2", "loss,entropy"]`` as attacks by the names that a table gives them.

    Args:
        kind: "membership" or "inversion".
        every: whether "all" is all of them.

    Raises:
        ConfigError, UnknownName: one line.
    """
    registry, found = room("attacks.privacy"), dict[str, Any]()
    known = [row for row in registry if getattr(registry.load(row), "kind", None) == kind]
    for text in spread(texts):
        name, given = parted(text, "--attack")
        whole = every and name == "all"
        if not whole and name not in known:
            raise UnknownName("--attack: " + unknown(f"{kind} attack", name, known))
        for row in known if whole else [name]:
            label = " ".join([row, *(f"{key}={value}" for key, value in given.items())])
            if label in found and not whole:
                raise ConfigError(f"--attack: {label} is given twice")
            found[label] = _built(given, registry.load(row), row, "--attack")
    return found


def _built(given: Mapping[str, Any], kind: Any, name: str, option: str) -> Any:
    """What an option names, with its settings."""
    from robust.config import from_mapping

    try:
        return from_mapping(given, kind, f"{option} {name}")
    except ConfigError as error:  # its own errors begin with its name
        raise ConfigError(str(error).replace(f"{name}: {name}: ", f"{name}: ")) from None


def averaged(kind: Any, settings: Sequence[str], defenses: Sequence[Defense]) -> list[str]:
    """An attack's settings; gradients of a randomised defence are averaged unless the settings say how."""
    from robust.adaptive import EOT

    wanted = any(item.randomised for item in defenses) and kind.knowledge == "white"
    able = kind.__dataclass_fields__.get("copies")
    told = any(setting.partition("=")[0].strip() == "copies" for setting in settings)
    return [*settings, f"copies={EOT}"] if wanted and able and able.default == 1 and not told else [*settings]
