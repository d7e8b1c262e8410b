"""The examples run: as modules, as scripts, with a script instead of a model and against an endpoint."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support import python

import looplet.examples
from looplet.testing import OpenAIServer

ROOT = Path(__file__).resolve().parent.parent
HELLO = Path(looplet.examples.__file__).parent / "hello_world.py"
GREETINGS = [
    "#1 ✓ greet(name='Alice') → greeting: Hello, Alice!",
    "#2 ✓ greet(name='Bob') → greeting: Hello, Bob!",
    "#3 ✓ greet(name='Carol') → greeting: Hello, Carol!",
    "#4 ✓ done(answer='Alice, Bob and Carol are greeted.') → 2 keys",
]


def timeless(output: str) -> list[str]:
    """Return the lines without their durations."""
    return [re.sub(r" \[\d+ms\]$", "", line) for line in output.splitlines()]


def code_lines(path: Path) -> set[int]:
    """Return the numbers of the lines that hold code: no blank lines, comments or docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    places = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docstrings = [node.body[0] for node in ast.walk(tree) if isinstance(node, places) and ast.get_docstring(node)]
    skipped = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    numbered = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return {number for number, line in numbered if line.strip() and not line.strip().startswith("#")} - skipped


def test_hello_world_has_at_most_30_lines_of_code():
    assert len(code_lines(HELLO)) <= 30


def test_hello_world_runs_without_a_model():
    done = python("-m", "looplet.examples.hello_world", "--scripted")
    assert (done.returncode, done.stderr) == (0, "")
    assert timeless(done.stdout) == GREETINGS


def test_hello_world_stops_at_max_steps():
    done = python("-m", "looplet.examples.hello_world", "--scripted", "--max-steps", "2")
    assert timeless(done.stdout) == GREETINGS[:2]


def test_hello_world_without_an_endpoint_names_the_way_out():
    done = python("-m", "looplet.examples.hello_world")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no endpoint" in done.stderr
    assert "--scripted" in done.stderr


POLICY = [[("greet", {"name": name})] for name in ("Alice", "Bob", "Carol")]
POLICY += [[("done", {"answer": "Alice, Bob and Carol are greeted."})]]


def test_hello_world_talks_to_an_endpoint_of_the_environment():
    with OpenAIServer(policy=POLICY) as server:
        done = python("-m", "looplet.examples.hello_world", **server.env())
        assert not server.errors
    assert (done.returncode, done.stderr) == (0, "")
    assert timeless(done.stdout) == GREETINGS


def test_hello_world_takes_endpoint_and_model_as_options():
    with OpenAIServer(policy=POLICY) as server:
        options = ("--base-url", server.base_url, "--model", "mine")
        done = python("-m", "looplet.examples.hello_world", *options, OPENAI_API_KEY="any")
        assert {request.body["model"] for request in server.requests} == {"mine"}
    assert (done.returncode, timeless(done.stdout)) == (0, GREETINGS)


@pytest.fixture
def dep_doctor() -> Path:
    path = ROOT / "examples" / "dep_doctor"
    if not path.exists():
        pytest.skip("examples/ is in the checkout only")
    return path


def test_dep_doctor_runs_as_a_script(dep_doctor, tmp_path):
    done = python(dep_doctor / "agent.py", dep_doctor / "demo_project", "--scripted", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "DEPENDENCY DOCTOR   demo_project",
        "CVE-2020-14343",
        "✓ eval_audit_completed",
        "looplet show traces/",
    ):
        assert words in done.stdout
    (folder,) = (tmp_path / "traces").iterdir()
    assert (folder / "trace.jsonl").exists()


def test_dep_doctor_as_a_script_tells_wrong_usage(dep_doctor, tmp_path):
    done = python(dep_doctor / "agent.py", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage: agent.py [OPTIONS] [PATH]" in done.stderr
