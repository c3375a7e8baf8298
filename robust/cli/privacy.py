"""`robust privacy …`: a table of lazily loaded commands about private training and what models leak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import typer

from robust.cli.main import LazyGroup
from robust.registry import Registry

COMMANDS = Registry(
    "privacy command",
    {
        "epsilon": "robust.cli.privacy_epsilon:privacy_epsilon",
        "mia": "robust.cli.privacy_mia:privacy_mia",
        "invert": "robust.cli.privacy_invert:privacy_invert",
    },
)
# One line each for `robust privacy --help`.
HELP = {
    "epsilon": "What a private training costs by every accountant, or what a budget allows.",
    "mia": "Which training samples a model gives away, by membership attacks.",
    "invert": "What can be seen again of training images in gradients, or of classes in confidences.",
}


class PrivacyGroup(LazyGroup):
    """The commands about privacy."""

    table: ClassVar[Registry] = COMMANDS
    lines: ClassVar[Mapping[str, str]] = HELP


app = typer.Typer(
    cls=PrivacyGroup,
    add_completion=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group(ctx: typer.Context) -> None:
    """What private training costs, and what models leak."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
