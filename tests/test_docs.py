"""The README and the docs: every Python block runs, in order, against a real server; every link leads somewhere."""

import inspect
import re
from pathlib import Path

import pytest

from looplet.testing import OpenAIServer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"]

if not (ROOT / "README.md").exists():
    pytest.skip("the documents are tested in a checkout only", allow_module_level=True)


def greeter(request):
    """Greet Alice, then Bob, then finish: decided by what the conversation holds."""
    done = sum(message["role"] == "tool" for message in request.messages)
    return [("greet", {"name": ["Alice", "Bob"][done]})] if done < 2 else [("done", {"answer": "greeted"})]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_tests(space: dict, folder: Path) -> None:
    """Run the tests that a block defines, each once, as pytest would."""
    for name in [name for name in space if name.startswith("test_")]:
        test = space.pop(name)
        test(**{"tmp_path": folder / name} if "tmp_path" in inspect.signature(test).parameters else {})


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with OpenAIServer(policy=greeter) as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        space: dict = {"__name__": "docs"}
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), space)
            run_tests(space, tmp_path)
        assert not server.errors
    assert "✓ greet(name='Alice')" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_names_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [text.count(f"<!-- ci:{name} -->") for name in ("demo", "test")] == [1, 1]
