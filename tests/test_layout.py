"""How long things may get: what a newcomer reads in one go stays readable in one go."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import looplet

PACKAGE = Path(looplet.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_is_longer_than_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_function_of_the_loop_is_longer_than_60_lines():
    core = ("loop", "asking", "modelcall", "dispatch", "admission", "execution", "steering", "ending", "setup", "run")
    for name in core:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        lengths = {f.name: f.end_lineno - f.lineno + 1 for f in ast.walk(tree) if isinstance(f, FUNCTION)}
        assert {function: lines for function, lines in lengths.items() if lines > 60} == {}, name
