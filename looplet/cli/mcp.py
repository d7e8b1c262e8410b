"""`looplet mcp`: tools for other programs, over the Model Context Protocol."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import click

from looplet.cli import Misuse
from looplet.errors import ConfigError, did_you_mean, words_of
from looplet.tools import BaseToolRegistry, ToolSpec, tools_from

EPILOG: Final = """
\b
TOOLS is one of
  my_tools.py                every @tool of the file, or its one registry
  my_tools.py:tools          what `tools` is there: a BaseToolRegistry, a list
                             of functions and ToolSpecs, or one of them
  my_package.my_tools        the same of a module that Python can import
  my_package.my_tools:tools
Tools that end a run (`done`) are left out.
\b
A client starts the server itself; most want this in their configuration:
  {"mcpServers": {"mine": {"command": "looplet",
                           "args": ["mcp", "serve", "/path/to/my_tools.py"]}}}
Another agent of yours:
  MCPToolAdapter("looplet mcp serve my_tools.py")
  MCPToolAdapter(url="http://127.0.0.1:8000/mcp")      with --http 8000
\b
Needs the extra: pip install "looplet[mcp]"
Exit code: 0 the client hung up; 2 wrong usage, or TOOLS cannot be loaded;
130 interrupted.
"""


@click.group("mcp", short_help="Serve tools over the Model Context Protocol.")
def mcp_group() -> None:
    """Serve tools over the Model Context Protocol."""


@mcp_group.command("serve", epilog=EPILOG, short_help="Serve functions as MCP tools.")
@click.argument("tools")
@click.option(
    "--http", "port", type=click.IntRange(0, 65535), help="Serve HTTP on this port of 127.0.0.1; 0: any free."
)
@click.option("--name", default=None, help="What the server calls itself.  [default: TOOLS without path and ending]")
def serve_command(tools: str, port: int | None, name: str | None) -> None:
    """Serve the tools that TOOLS names to an MCP client, on stdin and stdout or with --http.

    Arguments are checked against each tool's schema; what is wrong with them goes back to the model in words, and so
    does what a tool raises.  What a tool prints goes to stderr.  A client's trace is continued while a tool runs.
    """
    registry = load_tools(tools)
    try:
        from looplet import mcp_server
    except ImportError as error:
        from looplet.mcp import EXTRA

        raise Misuse(EXTRA) from error

    server = mcp_server.ToolServer(registry, name or _plain_name(tools))
    if port is None:
        # A thread waits for stdin and cannot be interrupted, so Ctrl-C ends the process and not the event loop.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        mcp_server.serve_stdio(server)
    else:
        served = ", ".join(server.tool_names)
        mcp_server.serve_http(server, port, lambda url: click.echo(f"serving {served} at {url}", err=True))


def load_tools(target: str) -> BaseToolRegistry:
    """Return the tools that `module:name`, `file.py:name`, a module or a file names; raises ConfigError."""
    place, name = split_target(target)
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    found = _collected(module, target) if not name else _named(module, name, target)
    if isinstance(found, BaseToolRegistry):
        return found
    try:
        return tools_from(found if isinstance(found, (list, tuple)) else [found])
    except ConfigError as error:
        raise ConfigError(f"{target}: {error}") from error


def split_target(target: str) -> tuple[str, str]:
    """Return module or file, and the name in it, empty without one; the colon of a drive is none of ours."""
    if target.endswith(".py"):
        return target, ""
    place, colon, name = target.rpartition(":")
    return (place, name) if colon else (name, "")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and type hints look there
    sys.path.insert(0, str(path.resolve().parent))
    with _blaming(str(path)):
        spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    with _blaming(name):
        return importlib.import_module(name)


@contextmanager
def _blaming(place: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{place} cannot be loaded: {type(error).__name__}: {words_of(error)}") from error


def _named(module: ModuleType, name: str, target: str) -> Any:
    if not hasattr(module, name):
        raise ConfigError(f"{target}: there is no {name!r}{did_you_mean(name, vars(module))}")
    found = getattr(module, name)
    items = found if isinstance(found, (list, tuple)) else [found]
    if isinstance(found, BaseToolRegistry) or (items and all(map(callable, items))):
        return found
    raise ConfigError(f"{target} is no BaseToolRegistry, function, ToolSpec, or list of those, but {found!r}")


def _collected(module: ModuleType, target: str) -> Any:
    specs = [value for value in vars(module).values() if isinstance(value, ToolSpec)]
    registries = {id(value): value for value in vars(module).values() if isinstance(value, BaseToolRegistry)}
    if len(registries) == 1 and not specs:
        return next(iter(registries.values()))
    if specs:
        return list({id(spec): spec for spec in specs}.values())
    raise ConfigError(f"{target} has no @tool and not one registry; name what to serve: {target}:NAME")


def _plain_name(target: str) -> str:
    return Path(split_target(target)[0]).stem
