"""`looplet mcp serve` without the SDK: what to serve, what is refused, what the help says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import python

from looplet import ConfigError
from looplet.cli import main
from looplet.cli.mcp import load_tools, split_target

SERVED = Path(__file__).parent / "mcp_servers" / "served.py"
NAMES = ["greet", "later", "refuse", "warn", "current_trace", "thread", "stuck", "count", "copy", "obey", "meet"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", NAMES),
        (":everything", [*NAMES, "done", "finish"]),
        (":listed", ["greet", "plain"]),
        (":greet", ["greet"]),
        (":plain", ["plain"]),
    ],
)
def test_tools_are_found_by_file_and_name(name, expected):
    assert load_tools(f"{SERVED}{name}").tool_names == expected


def test_tools_are_found_by_module_and_name(monkeypatch, tmp_path):
    (tmp_path / "some_tools_of_mine.py").write_text("def one() -> int:\n    'One.'\n    return 1\ntools = [one]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_tools("some_tools_of_mine:tools").tool_names == ["one"]
    assert load_tools("some_tools_of_mine.py:one").tool_names == ["one"]


def test_a_module_with_one_registry_and_no_tools_of_its_own_serves_that(tmp_path):
    file = tmp_path / "kit.py"
    file.write_text(
        "from looplet import tools_from\ndef one() -> int:\n    'One.'\n    return 1\nkit = tools_from([one])\n"
    )
    assert load_tools(str(file)).tool_names == ["one"]


def test_the_colon_of_a_drive_separates_nothing():
    assert split_target(r"C:\my\tools.py") == (r"C:\my\tools.py", "")
    assert split_target(r"C:\my\tools.py:kit") == (r"C:\my\tools.py", "kit")
    assert split_target("my.tools") == ("my.tools", "")
    assert split_target("my.tools:kit") == ("my.tools", "kit")


REFUSED = {
    "no file": ("no_such_file.py", "there is no file 'no_such_file.py'"),
    "no module": ("no_such_module:tools", "no_such_module cannot be loaded: ModuleNotFoundError"),
    "no name": (f"{SERVED}:everythin", "there is no 'everythin'; did you mean 'everything'?"),
    "a number": (f"{SERVED}:number", "is no BaseToolRegistry, function, ToolSpec, or list of those, but 7"),
    "no tools": ("looplet.errors", "looplet.errors has no @tool and not one registry; name what to serve"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_wrong_usage(what):
    target, words = REFUSED[what]
    result = CliRunner().invoke(main, ["mcp", "serve", target])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ")


def test_a_file_that_fails_is_blamed(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('out of order')")
    with pytest.raises(ConfigError, match=r"broken\.py cannot be loaded: RuntimeError: out of order"):
        load_tools(str(file))


def test_help_teaches_targets_and_clients():
    result = CliRunner().invoke(main, ["mcp", "serve", "--help"])
    assert result.exit_code == 0
    for words in ("my_tools.py:tools", '"mcpServers"', "MCPToolAdapter(", "--http", 'pip install "looplet[mcp]"'):
        assert words in result.stdout


BLOCKED = "import sys; sys.modules['mcp'] = None; "


def test_without_the_package_the_error_names_the_extra():
    program = BLOCKED + "from looplet import MCPToolAdapter; MCPToolAdapter('x')"
    done = python("-c", program)
    assert done.stderr.splitlines()[-1] == 'ImportError: MCP needs an extra package: pip install "looplet[mcp]"'
    program = BLOCKED + f"from looplet.cli import main; main(['mcp', 'serve', {str(SERVED)!r}])"
    done = python("-c", program)
    assert done.stderr == 'error: MCP needs an extra package: pip install "looplet[mcp]"\n'
    assert done.returncode == 2


def test_the_adapter_and_the_help_load_no_package():
    program = "import sys; from looplet import MCPToolAdapter; import looplet.cli.mcp; print('mcp' in sys.modules)"
    assert python("-c", program).stdout == "False\n"
