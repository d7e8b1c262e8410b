"""The command line: `looplet COMMAND`, also `python -m looplet COMMAND`.

The module of a command is imported when the command is used; its line in `looplet --help` stands here.
Exit codes: 0 done; 1 it ran, and the answer is no; 2 wrong usage or unreadable input; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from typing import IO, Any, Final

import click

from looplet._version import __version__
from looplet.errors import ConfigError, LoopletError, TraceError, did_you_mean

# command → where it is, and its line in the list of commands
COMMANDS: Final = {
    "demo": ("looplet.cli.demo:demo_command", "Audit the dependencies of a project, step by step."),
    "show": ("looplet.cli.show:show_command", "Show what happened in a trace."),
    "eval": ("looplet.cli.evals:eval_command", "Score traces with eval_* functions."),
    "mcp": ("looplet.cli.mcp:mcp_group", "Serve tools over the Model Context Protocol."),
}


class Failure(click.ClickException):
    """Ends a command with one line on stderr."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line."""
        click.echo(f"error: {self.message}", file=file, err=True)


class Misuse(Failure):
    """Wrong usage, or input that cannot be read."""

    exit_code = 2


class Interrupted(Failure):
    """Ctrl-C."""

    exit_code = 130  # what shells report for a process that SIGINT ended


@contextmanager
def reported_failures() -> Iterator[None]:
    """Turn looplet's errors and Ctrl-C into a `Failure`, and let no stream refuse a character that it cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    except (ConfigError, TraceError) as error:
        raise Misuse(str(error)) from error
    except LoopletError as error:
        raise Failure(str(error)) from error
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None


class Command(click.Command):
    """A command that can also stand alone, as in `examples/`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with reported_failures():
            return super().invoke(ctx)


class Commands(click.Group):
    """The group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names; a usage error with the nearest name otherwise."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            ctx.fail(f"there is no command {one_line(name)!r}{did_you_mean(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with reported_failures():
            return super().invoke(ctx)


EPILOG: Final = """
\b
Examples:
  looplet demo                        an agent at work; no model needed
  looplet show traces/run_1           what happened in a run
  looplet eval traces/                score runs with the eval_*.py files here
  looplet mcp serve my_tools.py       your functions as an MCP server
"""


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="looplet", message="%(prog)s %(version)s")
def main() -> None:
    """Run agents, and look at what they did: every run is one trace file."""


def one_line(text: str) -> str:
    """Return text fit for a terminal: one line, no control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
