"""What importing looplet loads, and what it must not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import looplet

SHORT = {"Prune": "PruneToolResults", "Summarize": "SummarizeCompact", "Truncate": "TruncateCompact"}
HEAVY = ("openai", "opentelemetry.sdk", "asyncio", "structlog", "prometheus_client")
LOOP = "from looplet import composable_loop, LoopConfig, DefaultState, tool, tools_from"


def loaded_by(program: str, folder) -> set[str]:
    """Return the modules that a fresh interpreter has after `program`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", f"{program}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=folder, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_looplet_loads_no_dependency(tmp_path):
    ours = loaded_by("import looplet", tmp_path) - loaded_by("import __future__, collections.abc, typing", tmp_path)
    assert ours == {"looplet", "looplet._lazy", "looplet._version"}


def test_importing_the_loop_loads_nothing_heavy(tmp_path):
    loaded = loaded_by(LOOP, tmp_path)
    assert "looplet.run" in loaded
    assert loaded.isdisjoint({*HEAVY, "pydantic", "rich", "click", "yaml", "genai_prices"})


def test_a_recorded_run_of_a_typed_tool_loads_nothing_heavy(tmp_path):
    program = f"""{LOOP}, MockLLMBackend, ProvenanceSink
@tool
def greet(name: str, times: int = 1, tags: list[str] | None = None) -> dict:
    "Greet someone."
    return {{"greeting": f"Hello, {{name}}!" * times}}
tools = tools_from([greet], include_done=True)
replies = ['{{"tool": "greet", "args": {{"name": "Bob"}}}}', '{{"tool": "done", "args": {{"answer": "ok"}}}}']
sink = ProvenanceSink("run")
steps = list(composable_loop(MockLLMBackend(replies), {{"goal": "greet"}}, tools, hooks=[sink]))
assert [step.tool_result.error for step in steps] == [None, None], steps
"""
    loaded = loaded_by(program, tmp_path)
    assert (tmp_path / "run" / "trace.jsonl").stat().st_size > 0
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("name", looplet.__all__)
def test_every_public_name_resolves(name):
    value = getattr(looplet, name)
    assert getattr(value, "__name__", name) in (name, SHORT.get(name))


def test_public_names_are_listed_once_and_for_completion():
    assert len(set(looplet.__all__)) == len(looplet.__all__)
    assert set(looplet.__all__) <= set(dir(looplet))


def test_a_misspelt_name_gets_a_hint():
    with pytest.raises(AttributeError, match="no attribute 'composable_lop'; did you mean 'composable_loop'"):
        looplet.composable_lop  # noqa: B018 - the look-up is the test
    with pytest.raises(ImportError, match="cannot import name 'ToolSpek'"):
        from looplet import ToolSpek  # noqa: F401


def test_a_name_like_no_other_gets_no_hint():
    with pytest.raises(AttributeError, match=r"no attribute 'zzz'$"):
        looplet.zzz  # noqa: B018
