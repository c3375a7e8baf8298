"""The `robust` command: a table of lazily loaded commands, and errors as one line with an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from robust import __version__
from robust.errors import RobustError
from robust.registry import Registry

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

COMMANDS = Registry(
    "command",
    {
        "eval": "robust.cli.eval:evaluate_model",
        "attack": "robust.cli.attack:attack_model",
        "train": "robust.cli.train:train",
        "report": "robust.cli.report:render_report",
        "list": "robust.cli.list:list_names",
    },
)
# Typer and click keep the base of their usage errors under different addresses; this one exists in both.
_USAGE_ERROR = typer.BadParameter.__bases__[0]


class LazyGroup(TyperGroup):
    """A command group whose rows are imported on first use, so that `robust --version` pays for none of them."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        """The names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - click's signature
        """The command of that name, built from its function (or sub-application) in the table."""
        item = COMMANDS.load(cmd_name)
        if isinstance(item, typer.Typer):
            return typer.main.get_command(item)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, no_args_is_help=False)(item)
        return typer.main.get_command(single)


app = typer.Typer(cls=LazyGroup, add_completion=False, invoke_without_command=True, rich_markup_mode=None)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"robust {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """How far can a trained model be trusted under attack? Start with: robust eval"""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    try:
        code = app(args=arguments, prog_name="robust", standalone_mode=False)
    except RobustError as error:
        return _fail(str(error), getattr(error, "exit_code", BAD_INPUT))
    except _USAGE_ERROR as error:
        return _fail(_usage(error), BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("stopped by the keyboard", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`robust list attacks | head`); nothing may flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except MemoryError:
        return _fail("out of memory; fewer samples (--n) or a smaller model would fit", BAD_INPUT)
    except OSError as error:
        return _fail(_system(error), BAD_INPUT)
    return code if isinstance(code, int) else DONE


def _fail(line: str, code: int) -> int:
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    """Typer's own complaint about the command line, as one line that says where the help is."""
    path = error.ctx.command_path if getattr(error, "ctx", None) else "robust"
    return f"{error.format_message().rstrip('.')}; see `{path} --help`"


def _system(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{place}the disk is full; free some space, then go on with --resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}not permitted; choose a file or folder that you may read and write"
    return f"{place}{error.strerror or error}"


def main() -> None:
    """Entry point of the `robust` command."""
    sys.exit(run())

