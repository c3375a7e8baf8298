"""The `robust` command: a table of lazily loaded commands, and errors as one line with an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import typer
import typer.main
from typer.core import TyperGroup

from robust import __version__
from robust.cli.interrupt import Interrupted
from robust.errors import RobustError
from robust.registry import Registry

DONE, BAD_INPUT = 0, 2
_OUT_OF_MEMORY = "out of memory; fewer samples (--n) or a smaller model would fit"

COMMANDS = Registry(
    "command",
    {
        "eval": "robust.cli.eval:evaluate_model",
        "attack": "robust.cli.attack:attack_model",
        "transfer": "robust.cli.transfer:transfer",
        "matrix": "robust.cli.matrix:matrix",
        "train": "robust.cli.train:train",
        "certify": "robust.cli.certify:certify",
        "detect": "robust.cli.detect:detect",
        "privacy": "robust.cli.privacy:app",
        "report": "robust.cli.report:render_report",
        "serve": "robust.cli.serve:serve_model",
        "bench": "robust.cli.bench:bench",
        "list": "robust.cli.list:list_names",
    },
)
# One line each for `robust --help`, which so needs none of the modules.
HELP = {
    "eval": "Measure how robust a model is, with evidence others can check.",
    "attack": "Run one attack and report success, distances and cost.",
    "transfer": "Measure which model's adversarial points fool which other.",
    "matrix": "Measure models and defenses against suites and a patch.",
    "train": "Train a model by a recipe.",
    "certify": "Certify radii that no attack can beat, with their confidence.",
    "detect": "Measure detectors, also against an attacker who knows them.",
    "privacy": "What private training costs, and what models leak.",
    "report": "Write a run's report again, and verify its evidence.",
    "serve": "Serve a model's answers over HTTP, to be attacked over a socket.",
    "bench": "Measure ours against other libraries, correctness first.",
    "list": "List attacks, models, data and every other kind of thing by name.",
}
# Typer and click keep the base of their usage errors under different addresses; this one exists in both.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


class LazyGroup(TyperGroup):
    """A command group whose rows are imported on first use, so that `robust --version` pays for none of them.

    Attributes:
        table: its commands; lines: one line each, for the help.
    """

    table: ClassVar[Registry] = COMMANDS
    lines: ClassVar[Mapping[str, str]] = HELP

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the table's order."""
        return list(self.table)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands' lines of the help text."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lines[name]) for name in self.table])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what Typer itself would answer in silence becomes a line, or no error at all."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe can still be answered, and not at exit
        except KeyboardInterrupt:
            raise Interrupted("stopped by the keyboard") from None
        except BrokenPipeError:
            # The reader went away (`robust list attacks | head`); nothing more may be flushed into the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        return result

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name."""
        return build(cmd_name, self.table)


def build(name: str, table: Registry = COMMANDS) -> Any:
    """The command of a row of a table, made of its function or sub-application."""
    item = table.load(name)
    if isinstance(item, typer.Typer):
        return typer.main.get_command(item)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(item)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The values that one command's arguments stand for, by parameter, without running it."""
    name, *rest = arguments
    values: dict[str, Any] = build(name).make_context(name, rest).params
    return values


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
        return _fail(str(error), error.exit_code)
    except _USAGE_ERROR as error:
        return _fail(_usage(error), BAD_INPUT)
    except MemoryError:
        return _fail(_OUT_OF_MEMORY, BAD_INPUT)
    except RuntimeError as error:
        if (
            type(error).__name__ == "BackendError"
        ):  # of robust.cuda_ops, which is imported only where it is used
            return _fail(str(error), BAD_INPUT)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, for an accelerator's memory
            raise
        return _fail(_OUT_OF_MEMORY, BAD_INPUT)
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
