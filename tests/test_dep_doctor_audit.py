"""The Dependency Doctor's audit: what it reads, what it finds, and how that becomes a grade."""

from __future__ import annotations

import inspect
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.examples.dep_doctor.advisories import Advisory, Affected, load_advisories
from looplet.examples.dep_doctor.manifests import parse
from looplet.examples.dep_doctor.model import NPM, PYPI, Finding
from looplet.examples.dep_doctor.online import Online
from looplet.examples.dep_doctor.project import Project, walk
from looplet.examples.dep_doctor.report import WIDTH, Findings, grade
from looplet.examples.dep_doctor.spdx import category, goes_with, identify
from looplet.examples.dep_doctor.tools import make_tools
from looplet.examples.dep_doctor.versions import NpmRange, Semver, pinned_version

DEMO = Path(__file__).parent.parent / "examples" / "dep_doctor" / "demo_project"
needs_demo = pytest.mark.skipif(not DEMO.exists(), reason="examples/ is in the checkout only")
CHECKS = ("check_security", "check_licences", "check_maintenance", "check_imports")

Files = dict[str, str]


def write(folder: Path, files: Files) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def tools(folder: Path, findings: Findings | None = None, **settings_: Any) -> dict[str, Callable[..., dict[str, Any]]]:
    project = Project(folder, **{"use_installed": False, **settings_})
    return {tool.__name__: tool for tool in make_tools(project, findings)}


def audit(folder: Path, **settings_: Any) -> list[Finding]:
    """Run every check and return the evidence of the report."""
    findings = Findings()
    box = tools(folder, findings, **settings_)
    for name in CHECKS:
        box[name]()
    box["write_report"]()
    assert findings.card is not None
    return [finding for part in findings.card.parts for finding in part.evidence]


def kinds(evidence: list[Finding], *, quiet: bool = False) -> set[tuple[str, str, str, str]]:
    """Return (severity, kind, package, place), without the clean ones unless `quiet`."""
    return {(f.severity, f.kind, f.package, f.place) for f in evidence if quiet or f.severity != "info"}


# --- the demo project -------------------------------------------------------------------------------------------


@needs_demo
def test_demo_project_has_one_finding_of_each_kind() -> None:
    assert kinds(audit(DEMO)) == {
        ("critical", "affected", "PyYAML", "pyproject.toml:8"),
        ("critical", "affected", "minimist", "package-lock.json:28"),
        ("high", "affected", "lodash", "package.json:8"),
        ("low", "allows_affected", "requests", "pyproject.toml:9"),
        ("unknown", "unknown_version", "click", "pyproject.toml:11"),
        ("high", "licence_conflict", "example-copyleft-charts", "package-lock.json:17"),
        ("unknown", "unknown_licence", "PyYAML", "pyproject.toml:8"),
        ("unknown", "unknown_licence", "requests", "pyproject.toml:9"),
        ("unknown", "unknown_licence", "pydantic", "pyproject.toml:10"),
        ("unknown", "unknown_licence", "click", "pyproject.toml:11"),
        ("unknown", "unknown_licence", "nose", "pyproject.toml:15"),
        ("high", "unmaintained", "request", "package.json:9"),
        ("high", "unmaintained", "nose", "pyproject.toml:15"),
        ("moderate", "no_lock_file", "(project)", "pyproject.toml:1"),
        ("moderate", "unbounded", "requests", "pyproject.toml:9"),
        ("moderate", "undeclared_import", "dateutil", "src/weather_notes/notes.py:9"),
        ("low", "prerelease_pin", "pydantic", "pyproject.toml:10"),
        ("low", "pinned_without_lock", "PyYAML", "pyproject.toml:8"),
        ("low", "pinned_without_lock", "pydantic", "pyproject.toml:10"),
        ("low", "pinned_without_lock", "nose", "pyproject.toml:15"),
        ("low", "unused_dependency", "click", "pyproject.toml:11"),
    }


@needs_demo
def test_demo_report_is_the_same_each_time_and_keeps_to_its_width() -> None:
    def text() -> str:
        box = tools(DEMO)
        for name in CHECKS:
            box[name]()
        return str(box["write_report"]("Two sentences. " * 20)["text"])

    first = text()
    assert first == text()
    assert max(map(len, first.splitlines())) <= WIDTH
    for part in ("SECURITY      F", "LICENCE       D", "MAINTENANCE   D"):
        assert part in first


@needs_demo
def test_installed_packages_do_not_change_what_a_pin_or_lock_decides() -> None:
    fixed = {"PyYAML", "pydantic", "nose", "lodash", "request", "minimist", "example-copyleft-charts"}

    def of_fixed(*, use_installed: bool) -> set[Finding]:
        return {f for f in audit(DEMO, use_installed=use_installed) if f.package in fixed and f.part != "maintenance"}

    assert of_fixed(use_installed=True) == of_fixed(use_installed=False)


def test_installed_version_is_only_a_hint(tmp_path: Path) -> None:
    write(tmp_path, {"requirements.txt": "packaging\n"})
    found = [f for f in audit(tmp_path, use_installed=True) if f.kind == "hint_clean"]
    assert [f.fact.startswith("hint: this interpreter has packaging ") for f in found] == [True]


# --- grades -----------------------------------------------------------------------------------------------------


@needs_demo
def test_grades_can_be_computed_again_from_the_evidence() -> None:
    findings = Findings()
    box = tools(DEMO, findings)
    box["check_security"]()
    shown = box["write_report"]()["parts"]
    assert findings.card is not None
    for name, part in json.loads(json.dumps(findings.card.to_dict()))["parts"].items():
        assert part["grade"] == grade([Finding(**entry) for entry in part["evidence"]]) == shown[name]["grade"]
    assert {name: part["grade"] for name, part in shown.items()} == {
        "security": "F",
        "licence": "unknown",
        "maintenance": "unknown",
    }


@pytest.mark.parametrize(
    ("severities", "expected"),
    [
        ("", "unknown"),
        ("unknown", "unknown"),
        ("info", "A"),
        ("info unknown", "unknown"),
        ("info info unknown", "A"),
        ("unknown unknown low", "B"),
        ("moderate low info", "C"),
        ("high high", "D"),
        ("info critical", "F"),
    ],
)
def test_worst_known_finding_decides_the_grade(severities: str, expected: str) -> None:
    assert grade([Finding("security", "k", s, "p", "f", "x") for s in severities.split()]) == expected  # type: ignore[arg-type]


def test_unchecked_packages_are_unknown_until_they_are_checked(tmp_path: Path) -> None:
    write(tmp_path, {"requirements.txt": "requests==2.32.0\nflask==3.0.0\n"})
    box = tools(tmp_path)
    box["check_security"](["requests"])
    assert box["write_report"]()["parts"]["security"]["grade"] == "unknown"
    box["check_security"](["Flask"])
    assert box["write_report"]()["parts"]["security"] == {
        "grade": "A",
        "reason": "no known advisory in the snapshot (2 checked)",
    }


def test_empty_folder_has_no_grades(tmp_path: Path) -> None:
    box = tools(tmp_path)
    assert box["detect_files"]() == {"files": [], "files_in_project": 0, "python_files": 0}
    for name in CHECKS:
        box[name]()
    assert {part["grade"] for part in box["write_report"]()["parts"].values()} == {"unknown"}


# --- finding files ----------------------------------------------------------------------------------------------


def test_detect_files_knows_each_kind_and_skips_environments(tmp_path: Path) -> None:
    named = {
        "pyproject.toml": "pyproject",
        "setup.cfg": "setup.cfg",
        "Pipfile": "Pipfile",
        "Pipfile.lock": "Pipfile.lock",
        "uv.lock": "uv.lock",
        "poetry.lock": "poetry.lock",
        "pdm.lock": "pdm.lock",
        "pylock.dev.toml": "pylock.toml",
        "requirements.txt": "requirements",
        "dev-requirements.txt": "requirements",
        "requirements/base.txt": "requirements",
        "constraints.txt": "constraints",
        "web/package.json": "package.json",
        "web/package-lock.json": "package-lock.json",
        "web/yarn.lock": "yarn.lock",
    }
    skipped = ["node_modules/a/package.json", ".venv/pyproject.toml", "env/lib/setup.cfg", "notes.txt"]
    write(tmp_path, dict.fromkeys([*named, *skipped, "env/pyvenv.cfg"], ""))
    found = tools(tmp_path)["detect_files"]()["files"]
    assert {entry["path"]: entry["kind"] for entry in found} == named


def test_folder_with_5000_files_is_walked_once_and_capped(tmp_path: Path) -> None:
    for number in range(50):
        folder = tmp_path / f"d{number:02}"
        folder.mkdir()
        for name in range(100):
            (folder / f"{name}.dat").touch()
    write(tmp_path, {"pyproject.toml": "[project]\nname = 'x'\n"})
    assert tools(tmp_path)["detect_files"]()["files_in_project"] == 5001
    capped = tools(tmp_path, max_files=100)
    assert capped["detect_files"]()["note"] == "the folder has more than 100 files; the rest was not looked at"
    assert "more than 100 files" in capped["write_report"]()["text"]


def test_symlink_loop_ends_and_links_to_the_outside_are_not_listed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"requirements.txt": "requests\n"})
    inside = write(tmp_path / "inside", {"a/pyproject.toml": ""})
    (inside / "a" / "loop").symlink_to(inside)
    (inside / "requirements.txt").symlink_to(outside / "requirements.txt")
    (inside / "self").symlink_to(inside / "self")
    assert [entry["path"] for entry in tools(inside)["detect_files"]()["files"]] == ["a/pyproject.toml"]


@pytest.mark.parametrize("path", ["../secret/pyproject.toml", "/etc/hosts", "link/pyproject.toml", "a\0b"])
def test_path_outside_the_project_is_refused(tmp_path: Path, path: str) -> None:
    secret = write(tmp_path / "secret", {"pyproject.toml": "[project]\n"})
    inside = write(tmp_path / "inside", {"pyproject.toml": ""})
    (inside / "link").symlink_to(secret)
    with pytest.raises(ToolError) as caught:
        tools(inside)["parse_file"](path)
    assert caught.value.kind in {ErrorKind.PERMISSION_DENIED, ErrorKind.VALIDATION}
    assert ("is outside the project folder" in caught.value.message) == ("\0" not in path)


def test_missing_project_folder_and_unknown_file_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass the folder of a project"):
        Project(tmp_path / "nowhere")
    write(tmp_path, {"notes.txt": "x"})
    for path in ("notes.txt", "nowhere.toml"):
        with pytest.raises(ToolError, match="call detect_files"):
            tools(tmp_path)["parse_file"](path)


# --- broken files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "error", "line"),
    [
        ("pyproject.toml", b'[project]\nname = "x"\nversion = \n', "not valid TOML", 3),
        ("pyproject.toml", b"[project", "not valid TOML", 1),
        ("pyproject.toml", b"a = 1\nb = '\xff'\n", "not UTF-8", 2),
        ("package.json", b'{\n  "name": "x",\n  oops}', "not valid JSON", 3),
        ("package.json", b"[1]", "must hold a JSON object", 1),
        ("package-lock.json", b"[" * 100_000, "not usable JSON", None),
        ("uv.lock", b"package = 3\n", "array of tables", None),
        ("setup.cfg", b"install_requires =\n", "not a valid setup.cfg", 1),
    ],
)
def test_broken_file_is_a_finding_and_no_crash(
    tmp_path: Path, name: str, content: bytes, error: str, line: int | None
) -> None:
    (tmp_path / name).write_bytes(content)
    parsed = tools(tmp_path)["parse_file"](name)
    assert error in parsed["error"]
    if line is not None:
        assert parsed["line"] == line
    evidence = audit(tmp_path)
    assert {(f.part, f.severity, f.kind, f.line) for f in evidence} == {
        ("maintenance", "high", "broken_file", parsed["line"]),
        ("security", "unknown", "unread_file", parsed["line"]),
        ("licence", "unknown", "unread_file", parsed["line"]),
    }


def test_one_bad_entry_does_not_hide_the_others(tmp_path: Path) -> None:
    text = '[project]\nname = "x"\ndependencies = [\n  "requests==2.30.0",\n  "not a requirement",\n  3,\n]\n'
    write(tmp_path, {"pyproject.toml": text})
    parsed = tools(tmp_path)["parse_file"]("pyproject.toml")
    assert [(d["name"], d["version"], d["line"]) for d in parsed["dependencies"]] == [("requests", "2.30.0", 4)]
    assert [(p["line"], p["error"][:30]) for p in parsed["problems"]] == [
        (5, "'not a requirement' is not a v"),
        (None, "project.dependencies holds 3, "),
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["", "x", "^1", "==1", "git+https://h/x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abversionurlname"), inner, max_size=2),
    max_leaves=5,
)
PLACES = [
    ("package.json", ("dependencies",)),
    ("package.json", ("dependencies", "a")),
    ("package.json", ("license",)),
    ("package-lock.json", ("packages",)),
    ("package-lock.json", ("packages", "node_modules/a")),
    ("package-lock.json", ("dependencies", "a")),
    ("package-lock.json", ("dependencies", "a", "dependencies")),
    ("Pipfile.lock", ("default",)),
    ("Pipfile.lock", ("develop", "a")),
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_json_of_any_shape_is_read_without_a_crash(
    tmp_path: Path, place: tuple[str, tuple[str, ...]], value: Any
) -> None:
    name, keys = place
    for key in reversed(keys):
        value = {key: value}
    (tmp_path / name).write_text(json.dumps(value))
    parsed = parse(tmp_path, name, name, NPM)
    assert all(isinstance(entry.name, str) for entry in parsed.dependencies + parsed.locked)


TOML_PLACES = [
    "project",
    "project.dependencies",
    "project.name",
    "project.license",
    "project.dynamic",
    "project.classifiers",
    "project.optional-dependencies",
    "project.optional-dependencies.a",
    "dependency-groups",
    "dependency-groups.a",
    "build-system.requires",
    "tool.uv.dev-dependencies",
    "tool.pdm.dev-dependencies",
    "tool.poetry.dependencies",
    "tool.poetry.dependencies.a",
    "tool.poetry.group",
    "tool.poetry.group.a",
]


@pytest.mark.parametrize("place", TOML_PLACES)
@pytest.mark.parametrize(
    "value", ["3", "true", "[]", "[[]]", "[{}]", "{}", "{ version = 3, extras = 4 }", "'x'", "['x==1']"]
)
def test_toml_of_any_shape_is_read_without_a_crash(tmp_path: Path, place: str, value: str) -> None:
    write(tmp_path, {"pyproject.toml": f"{place} = {value}\n"})
    parsed = parse(tmp_path, "pyproject.toml", "pyproject", PYPI)
    assert parsed.error is None
    assert all(isinstance(entry.name, str) for entry in parsed.dependencies)


# --- manifests --------------------------------------------------------------------------------------------------


def entries(folder: Path, path: str) -> list[tuple[Any, ...]]:
    found = tools(folder)["parse_file"](path)["dependencies"]
    return [(d["name"], d["specifier"], d["version"], d["group"], d["line"]) for d in found]


def test_pyproject_tables_are_read_with_groups_and_lines(tmp_path: Path) -> None:
    text = """\
[build-system]
requires = ["hatchling>=1.24"]
[project]
name = "me"
dependencies = ["Requests[socks]>=2,<3 ; python_version > '3.8'", "a @ https://h/a.whl"]
[project.optional-dependencies]
fast = ["orjson==3.0"]
all = ["me[fast]"]
[dependency-groups]
dev = ["pytest", { include-group = "lint" }]
lint = ["ruff~=0.9"]
[tool.poetry.dependencies]
python = "^3.11"
flask = "^2.0"
django = { version = "~4.2", extras = ["bcrypt"] }
rich = "13.7.0"
"""
    write(tmp_path, {"pyproject.toml": text})
    assert entries(tmp_path, "pyproject.toml") == [
        ("Requests", "<3,>=2", None, "main", 5),
        ("a", "", None, "main", 5),
        ("orjson", "==3.0", "3.0", "fast", 7),
        ("pytest", "", None, "dev", 10),
        ("ruff", "~=0.9", None, "lint", 11),
        ("hatchling", ">=1.24", None, "build", 2),
        ("flask", ">=2.0,<3", None, "main", 14),
        ("django", ">=4.2,<4.3", None, "main", 15),
        ("rich", "==13.7.0", "13.7.0", "main", 16),
    ]


def test_requirements_file_oddities(tmp_path: Path) -> None:
    files = {
        "requirements.txt": """\
# a comment
-r more/base.txt
-c constraints.txt
--index-url https://example.invalid/simple
Flask [async] == 2.0.1  # trailing comment
urllib3==1.26.5 \\
    --hash=sha256:aaaa \\
    --hash=sha256:bbbb
requests >=2 ; python_version < "4"
-e .
-e git+https://example.invalid/r.git@v1#egg=tool
named @ https://example.invalid/named-1.0.zip
./wheels/Some_Wheel-1.2.3-py3-none-any.whl
https://example.invalid/nameless
-r ../outside.txt
-r missing.txt
bad requirement here
""",
        "more/base.txt": "-r ../requirements.txt\nsix==1.16.0\n",
        "constraints.txt": "requests==2.20.0\nnobody==1\n",
    }
    write(tmp_path, files)
    parsed = tools(tmp_path)["parse_file"]("requirements.txt")
    assert [(d["name"], d["version"], d["file"], d["line"]) for d in parsed["dependencies"]] == [
        ("six", "1.16.0", "more/base.txt", 2),
        ("Flask", "2.0.1", "requirements.txt", 5),
        ("urllib3", "1.26.5", "requirements.txt", 6),
        ("requests", None, "requirements.txt", 9),
        ("tool", None, "requirements.txt", 11),
        ("named", None, "requirements.txt", 12),
        ("some-wheel", "1.2.3", "requirements.txt", 13),
    ]
    assert [(entry["name"], entry["version"]) for entry in parsed["locked"]] == [
        ("requests", "2.20.0"),
        ("nobody", "1"),
    ]
    assert [(p["file"], p["line"]) for p in parsed["problems"]] == [
        ("more/base.txt", 1),
        ("requirements.txt", 14),
        ("requirements.txt", 15),
        ("requirements.txt", 16),
        ("requirements.txt", 17),
    ]
    assert "is outside the project folder" in parsed["problems"][2]["error"]
    affected = {(f.package, f.place) for f in audit(tmp_path) if f.kind == "affected"}
    assert affected == {
        ("Flask", "requirements.txt:5"),
        ("urllib3", "requirements.txt:6"),
        ("requests", "constraints.txt:1"),
    }


def test_requirements_with_hashes_are_a_lock_file(tmp_path: Path) -> None:
    write(tmp_path, {"requirements.txt": "six==1.16.0 --hash=sha256:aa\n"})
    assert ("moderate", "no_lock_file") not in {(f.severity, f.kind) for f in audit(tmp_path)}
    write(tmp_path, {"requirements.txt": "six==1.16.0\n"})
    assert ("moderate", "no_lock_file") in {(f.severity, f.kind) for f in audit(tmp_path)}


def test_setup_cfg_and_pipfile(tmp_path: Path) -> None:
    files = {
        "setup.cfg": "[metadata]\nlicense = MIT\n[options]\ninstall_requires =\n  a==1\n  b\n"
        "[options.extras_require]\nx = c>2\n",
        "Pipfile": '[packages]\nd = "*"\ne = "==1.0"\n[dev-packages]\nf = {version = "~=2.0"}\n',
    }
    write(tmp_path, files)
    assert entries(tmp_path, "setup.cfg") == [
        ("a", "==1", "1", "main", 5),
        ("b", "", None, "main", 6),
        ("c", ">2", None, "x", 8),
    ]
    assert entries(tmp_path, "Pipfile") == [
        ("d", "", None, "main", 2),
        ("e", "==1.0", "1.0", "main", 3),
        ("f", "~=2.0", None, "dev", 5),
    ]
    assert tools(tmp_path)["check_licences"]()["project_licence"] == "MIT"


# --- locks ------------------------------------------------------------------------------------------------------

LOCK_V1 = """\
{
  "lockfileVersion": 1,
  "dependencies": {
    "a": {
      "version": "1.0.0",
      "requires": {
        "minimist": "0.2.0"
      },
      "dependencies": {
        "minimist": {
          "version": "0.2.0"
        }
      }
    },
    "minimist": {
      "version": "1.2.8"
    },
    "local": {
      "version": "file:../local"
    }
  }
}
"""
LOCK_V3 = """\
{
  "lockfileVersion": 3,
  "packages": {
    "": {"name": "me", "version": "1.0.0", "license": "MIT"},
    "node_modules/a": {"version": "1.0.0", "license": "ISC"},
    "node_modules/a/node_modules/minimist": {
      "version": "0.2.0"
    },
    "node_modules/@s/b": {"version": "2.0.0", "deprecated": "no longer"},
    "node_modules/linked": {"resolved": "packages/linked", "link": true},
    "packages/linked": {"version": "1.0.0"}
  }
}
"""


def locked(folder: Path, name: str) -> list[tuple[str, str, int | None]]:
    return [(e["name"], e["version"], e["line"]) for e in tools(folder)["parse_file"](name)["locked"]]


def test_npm_lock_version_1_is_read_through_its_levels(tmp_path: Path) -> None:
    write(tmp_path, {"package-lock.json": LOCK_V1})
    expected = [("a", "1.0.0", 4), ("minimist", "0.2.0", 10), ("minimist", "1.2.8", 15)]
    assert locked(tmp_path, "package-lock.json") == expected
    affected = [(f.package, f.line) for f in audit(tmp_path) if f.kind == "affected"]
    assert affected == [("minimist", 10)]


def test_npm_lock_version_3_has_licences_and_deprecations(tmp_path: Path) -> None:
    write(tmp_path, {"package-lock.json": LOCK_V3})
    expected = [("a", "1.0.0", 5), ("minimist", "0.2.0", 6), ("@s/b", "2.0.0", 9)]
    assert locked(tmp_path, "package-lock.json") == expected
    evidence = kinds(audit(tmp_path), quiet=True)
    assert ("low", "deprecated", "@s/b", "package-lock.json:9") in evidence
    assert ("info", "permissive", "a", "package-lock.json:5") in evidence


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "uv.lock",
            '[[package]]\nname = "me"\nversion = "1"\nsource = { editable = "." }\n\n'
            '[[package]]\nname = "six"\nversion = "1.16.0"\n',
        ),
        ("poetry.lock", '# made by a tool\n\n\n\n\n[[package]]\nname = "six"\nversion = "1.16.0"\n'),
        ("pylock.toml", 'lock-version = "1.0"\n\n\n\n\n[[packages]]\nname = "six"\nversion = "1.16.0"\n'),
        ("Pipfile.lock", '{\n"_meta": {},\n"default": {\n\n\n\n"six": {"version": "==1.16.0"}}}\n'),
    ],
)
def test_python_locks_name_version_and_line(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, {name: text})
    assert locked(tmp_path, name) == [("six", "1.16.0", 7)]


def test_lock_decides_the_version_of_a_manifest_below_it_only(tmp_path: Path) -> None:
    lock = '[[package]]\nname = "requests"\nversion = "2.32.0"\n'
    manifest = '[project]\nname = "x"\ndependencies = ["requests"]\n'
    write(tmp_path, {"a/uv.lock": lock, "a/pyproject.toml": manifest, "b/pyproject.toml": manifest})
    evidence = kinds(audit(tmp_path), quiet=True)
    assert ("info", "clean", "requests", "a/uv.lock:2") in evidence
    assert {entry[3] for entry in evidence if entry[1] == "allows_affected"} == {"b/pyproject.toml:3"}
    assert {entry[3] for entry in evidence if entry[1] == "no_lock_file"} == {"b/pyproject.toml:1"}


def test_upload_time_in_a_lock_is_reported(tmp_path: Path) -> None:
    text = '[[package]]\nname = "six"\nversion = "1.16.0"\nsdist = { upload-time = "2021-05-05T14:18:18Z" }\n'
    write(tmp_path, {"uv.lock": text})
    assert tools(tmp_path)["check_maintenance"]()["released"] == {"six": "2021-05-05"}


# --- versions and advisories --------------------------------------------------------------------------------------

RELEASES = st.builds(
    lambda numbers, tail: ".".join(map(str, numbers)) + tail,
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.sampled_from(["", "", "", "a1", "rc2", ".post1", ".dev3"]),
)


BOUNDS = RELEASES.map(lambda text: f"1{text}")
"""of advisories; without "0", which has a meaning of its own there"""


@given(bounds=st.lists(BOUNDS, min_size=2, max_size=4, unique_by=Version), version=BOUNDS, data=st.data())
def test_ranges_match_as_specifier_sets_do(bounds: list[str], version: str, data: st.DataObject) -> None:
    ordered = sorted(bounds, key=Version)
    pairs = list(zip(ordered[::2], ordered[1::2], strict=False))
    events = [event for low, high in pairs for event in (("introduced", low), ("fixed", high))]
    affected = Affected(PYPI, "x", (tuple(data.draw(st.permutations(events))),))

    def at_least(bound: str) -> bool:
        return SpecifierSet(f">={bound}").contains(version, prereleases=True)

    assert affected.affects(version) == any(at_least(low) and not at_least(high) for low, high in pairs)


@given(low=BOUNDS, high=BOUNDS, version=BOUNDS)
def test_last_affected_is_affected_itself(low: str, high: str, version: str) -> None:
    low, high = sorted((low, high), key=Version)
    affected = Affected(PYPI, "x", ((("introduced", low), ("last_affected", high)),))
    assert affected.affects(version) == SpecifierSet(f">={low},<={high}").contains(version, prereleases=True)


def test_introduced_in_0_is_before_every_version() -> None:
    affected = Affected(PYPI, "x", ((("introduced", "0"), ("last_affected", "0")),))
    assert [affected.affects(version) for version in ("0.dev1", "0", "0.0.1")] == [True, True, False]


PLAIN = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(lambda numbers: ".".join(map(str, numbers)))
GRID = [".".join(map(str, numbers)) for numbers in itertools.product(range(5), range(5), range(5), range(2))]


@given(
    specifier=st.lists(
        st.tuples(st.sampled_from([">=", ">", "<", "<=", "!=", "~="]), PLAIN).map(
            lambda pair: pair[0] + (pair[1] + ".0" if pair[0] == "~=" else pair[1])
        ),
        max_size=3,
    ).map(",".join),
    bounds=st.lists(PLAIN, min_size=2, max_size=2, unique_by=Version).map(lambda pair: sorted(pair, key=Version)),
)
def test_specifier_allows_affected_versions_when_it_admits_one(specifier: str, bounds: list[str]) -> None:
    affected = Affected(PYPI, "x", ((("introduced", bounds[0]), ("fixed", bounds[1])),))
    admits = any(SpecifierSet(specifier).contains(version) and affected.affects(version) for version in GRID)
    assert affected.allowed_by(specifier) == admits


@pytest.mark.parametrize(
    ("ecosystem", "specifier", "allowed"),
    [
        (PYPI, "", True),
        (PYPI, ">=5.4", False),
        (PYPI, ">5.1,<5.2", True),
        (PYPI, "~=5.3.1", True),
        (PYPI, "==6.*", False),
        (NPM, "^5.0.0", True),
        (NPM, "^6", False),
        (NPM, ">=5.4.0 || 5.3.x", True),
        (NPM, "latest", False),
    ],
)
def test_allowed_by_an_open_specifier(ecosystem: str, specifier: str, allowed: bool) -> None:
    affected = Affected(ecosystem, "x", ((("introduced", "0"), ("fixed", "5.4.0")),))
    assert affected.allowed_by(specifier) == allowed


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("^1.2.3", "1.2.3 1.9.0", "1.2.2 2.0.0 1.3.0-beta"),
        ("^0.2.3", "0.2.3 0.2.9", "0.3.0"),
        ("^0.0.3", "0.0.3", "0.0.4"),
        ("^0.0", "0.0.9", "0.1.0"),
        ("~1.2", "1.2.0 1.2.9", "1.3.0"),
        ("~1", "1.9.9", "2.0.0"),
        ("1.2.x", "1.2.7", "1.3.0 1.1.0"),
        ("*", "0.0.1 9.9.9", "1.0.0-rc.1"),
        ("", "1.0.0", "1.0.0-rc.1"),
        (">1.2 <=2", "1.3.0 2.9.9", "1.2.9 3.0.0"),
        (">= 1.0.0 < 2", "1.0.0", "2.0.0"),
        ("1.2 - 2.3", "1.2.0 2.3.9", "2.4.0 1.1.9"),
        ("<1 || >=3", "0.9.0 3.0.0", "1.0.0 2.0.0"),
        ("1.0.0-beta.2 || >=1.0.0", "1.0.0-beta.2 1.0.0", "1.0.0-beta.1"),
        (">1.0.0-beta.2 <2", "1.0.0-beta.11 1.0.0", "1.0.0-beta.2 1.1.0-beta.3"),
        ("=v1.2.3+build", "1.2.3", "1.2.4"),
    ],
)
def test_npm_ranges(text: str, inside: str, outside: str) -> None:
    wanted = NpmRange(text)
    assert [v for v in inside.split() if not wanted.contains(v)] == []
    assert [v for v in outside.split() if wanted.contains(v)] == []


def test_npm_versions_sort_in_the_order_of_the_semver_specification() -> None:
    tails = ["-alpha", "-alpha.1", "-alpha.beta", "-beta.2", "-beta.11", "-rc.1", ""]
    keys = [Semver.parse(f"1.0.0{tail}") for tail in tails] + [Semver.parse("1.0.1")]
    assert all(low < high for low, high in itertools.pairwise(keys))
    assert [pinned_version(NPM, text) for text in ("1.2.3", "v1.2.3", "1.2", "^1.2.3")] == [
        "1.2.3",
        "1.2.3",
        None,
        None,
    ]


def test_shipped_snapshot_is_readable_small_and_knows_its_facts() -> None:
    folder = resources.files("looplet.examples.dep_doctor") / "data" / "advisories"
    names = [entry.name for entry in folder.iterdir()]
    index = load_advisories()
    assert index.count == len(names) == 16
    known = [
        (PYPI, "pyyaml", "5.3.1", "5.4"),
        (PYPI, "requests", "2.3.0", "2.31.0"),
        (PYPI, "urllib3", "1.26.16", "1.26.17"),
        (PYPI, "urllib3", "2.0.5", "2.0.6"),
        (PYPI, "jinja2", "3.1.2", "3.1.3"),
        (PYPI, "flask", "2.3.1", "2.3.2"),
        (PYPI, "certifi", "2023.5.7", "2023.7.22"),
        (PYPI, "pillow", "10.0.0", "10.0.1"),
        (PYPI, "setuptools", "65.5.0", "65.5.1"),
        (PYPI, "django", "4.0.5", "4.0.6"),
        (PYPI, "werkzeug", "2.2.2", "2.2.3"),
        (NPM, "lodash", "4.17.20", "4.17.21"),
        (NPM, "minimist", "0.2.3", "0.2.4"),
        (NPM, "json5", "2.2.1", "2.2.2"),
        (NPM, "node-fetch", "3.1.0", "3.1.1"),
        (NPM, "axios", "0.21.0", "0.21.1"),
        (NPM, "semver", "6.3.0", "6.3.1"),
    ]
    for ecosystem, name, affected, fixed in known:
        assert len(index.matching(ecosystem, name, affected)) == 1, name
        assert index.matching(ecosystem, name, fixed) == [], name


def test_own_advisories_replace_the_snapshot_and_bad_ones_are_named(tmp_path: Path) -> None:
    record = {
        "id": "X-1",
        "affected": [{"package": {"ecosystem": "PyPI", "name": "Six"}, "versions": ["1.16"]}],
    }
    write(tmp_path, {"osv/x.json": json.dumps(record), "p/requirements.txt": "six==1.16.0\nPyYAML==5.3.1\n"})
    write(tmp_path, {"osv/y.json": json.dumps({**record, "id": "X-2", "withdrawn": "2024-01-01T00:00:00Z"})})
    found = [
        (f.package, f.reference, f.severity)
        for f in audit(tmp_path / "p", advisories_dir=tmp_path / "osv")
        if f.reference
    ]
    assert found == [("six", "X-1", "moderate")]
    for text in ("{", "[]", '{"id": 1, "affected": [{"package": {}}]}'):
        write(tmp_path, {"osv/z.json": text})
        with pytest.raises(ConfigError, match=r"z\.json is not a usable OSV advisory"):
            load_advisories(tmp_path / "osv")
    with pytest.raises(ConfigError, match="there is no folder"):
        load_advisories(tmp_path / "nowhere")


def test_version_that_cannot_be_compared_is_unknown(tmp_path: Path) -> None:
    write(tmp_path, {"requirements.txt": "pyyaml===some.thing\n"})
    assert [(f.kind, f.severity) for f in audit(tmp_path) if f.part == "security"] == [("unknown_version", "unknown")]


def test_unknown_names_are_answered_with_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path, {"requirements.txt": "requests==2.32.0\n"})
    result = tools(tmp_path)["check_security"](["reqests", "Requests"])
    assert result["packages"] == tools(tmp_path)["check_security"]([])["packages"] == 1
    assert result["not_found"] == ["'reqests' is not a dependency of this project; did you mean 'requests'?"]


# --- licences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "identifier", "kind"),
    [
        ("License :: OSI Approved :: MIT License", "MIT", "permissive"),
        ("Apache License, Version 2.0", "Apache-2.0", "permissive"),
        ("BSD-3-Clause AND MIT", "BSD-3-Clause AND MIT", "permissive"),
        ("(MIT OR GPL-3.0-only)", "(MIT OR GPL-3.0-only)", "permissive"),
        ("MIT AND GPL-3.0-only", "MIT AND GPL-3.0-only", "strong copyleft"),
        ("GNU General Public License v3 or later (GPLv3+)", "GPL-3.0-or-later", "strong copyleft"),
        ("GNU Library or Lesser General Public License (LGPL)", "LGPL", "weak copyleft"),
        ("Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0", "weak copyleft"),
        ("UNLICENSED", "UNLICENSED", "proprietary"),
        ("SEE LICENSE IN LICENSE.txt", "SEE LICENSE IN LICENSE.txt", "unknown"),
        ("MIT OR (", "MIT OR (", "unknown"),
        ("MIT License\n\nCopyright\n\nPermission is hereby granted, free of charge, to", "MIT", "permissive"),
    ],
)
def test_licence_names_become_identifiers_and_categories(stated: str, identifier: str, kind: str) -> None:
    assert (identify(stated), category(identify(stated))) == (identifier, kind)


@pytest.mark.parametrize(
    ("package", "project", "fits"),
    [
        ("MIT", "Apache-2.0", True),
        ("MPL-2.0", "MIT", True),
        ("GPL-3.0-only", "MIT", False),
        ("MIT OR GPL-3.0-only", "MIT", True),
        ("MIT AND GPL-3.0-only", "MIT", False),
        ("GPL-3.0-only", "GPL-3.0-or-later", True),
        ("GPL-2.0-only", "GPL-3.0-only", False),
        ("GPL-2.0-or-later", "GPL-3.0-only", True),
        ("Apache-2.0", "GPL-2.0-only", False),
        ("Apache-2.0", "GPL-2.0-or-later", True),
        ("GPL-3.0-only", "MIT OR Apache-2.0", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "MIT", None),
        ("AGPL-3.0-only", "GPL-3.0-only", None),
        ("Own-Licence", "MIT", None),
        ("GPL-3.0-only", "Own-Licence", None),
    ],
)
def test_licences_that_go_together(package: str, project: str, fits: bool | None) -> None:
    assert goes_with(package, project) is fits


def licence_of(folder: Path, text: str, **extra: str) -> set[tuple[str, str, str]]:
    lock = {"packages": {"node_modules/a": {"version": "1.0.0", "license": text}}}
    write(folder, {"package-lock.json": json.dumps(lock), **extra})
    return {(f.severity, f.kind, f.package) for f in audit(folder) if f.part == "licence"}


def test_project_licence_comes_from_its_file_or_is_missing(tmp_path: Path) -> None:
    missing = ("low", "no_project_licence", "(project)")
    assert licence_of(tmp_path, "GPL-3.0") == {missing, ("unknown", "not_judged", "a")}
    assert licence_of(tmp_path, "MIT") == {missing, ("info", "permissive", "a")}
    apache = "                Apache License\n          Version 2.0, January 2004\n"
    assert licence_of(tmp_path, "GPL-3.0", LICENSE=apache) == {("high", "licence_conflict", "a")}
    assert licence_of(tmp_path, "Own words", LICENSE=apache) == {("unknown", "unclear_licence", "a")}


def test_conflict_of_a_development_tool_weighs_less(tmp_path: Path) -> None:
    manifest = json.dumps({"license": "MIT", "devDependencies": {"a": "1.0.0"}})
    assert licence_of(tmp_path, "GPL-3.0", **{"package.json": manifest}) == {("low", "licence_conflict", "a")}


def test_licence_in_node_modules_is_found(tmp_path: Path) -> None:
    manifest = json.dumps({"license": "MIT", "dependencies": {"a": "1.0.0"}})
    module = json.dumps({"licenses": [{"type": "MIT"}, {"type": "GPL-2.0"}]})
    write(tmp_path, {"package.json": manifest, "node_modules/a/package.json": module})
    found = {(f.kind, f.file) for f in audit(tmp_path) if f.part == "licence"}
    assert found == {("permissive", "node_modules/a/package.json")}


# --- maintenance and imports --------------------------------------------------------------------------------------


def test_ranges_weigh_less_below_a_lock_file(tmp_path: Path) -> None:
    write(
        tmp_path, {"package.json": json.dumps({"dependencies": {"a": "*", "b": ">=1", "c": "^1", "d": "1.0.0-rc.1"}})}
    )

    def verdicts() -> dict[str, tuple[str, str]]:
        wanted = {"unbounded", "no_upper_bound", "bounded", "pinned", "pinned_without_lock"}
        return {f.package: (f.kind, f.severity) for f in audit(tmp_path) if f.kind in wanted}

    assert verdicts() == {
        "a": ("unbounded", "moderate"),
        "b": ("no_upper_bound", "low"),
        "c": ("bounded", "info"),
        "d": ("pinned_without_lock", "low"),
    }
    write(tmp_path, {"yarn.lock": ""})
    assert verdicts() == {
        "a": ("unbounded", "low"),
        "b": ("no_upper_bound", "info"),
        "c": ("bounded", "info"),
        "d": ("pinned", "info"),
    }


def imports_of(folder: Path, files: Files, **settings_: Any) -> set[tuple[str, str, str, str]]:
    write(folder, files)
    box = tools(folder, findings := Findings(), **settings_)
    box["check_imports"]()
    return kinds(list(findings), quiet=True)


def test_imports_are_compared_with_the_manifest(tmp_path: Path) -> None:
    manifest = """\
[project]
name = "me"
dependencies = ["PyYAML", "google-cloud-storage", "never"]
optional-dependencies.fast = ["orjson"]
dependency-groups = {}
[tool.uv]
dev-dependencies = ["pytest", "freezegun"]
"""
    code = """\
import os, yaml, orjson, me.other
from google.cloud import storage
from . import sibling
import freezegun
import PIL.Image
if TYPE_CHECKING:
    import numpy
try:
    import tomli
except ImportError:
    import tomllib
try:
    import lxml
except KeyError:
    pass
"""
    files = {
        "pyproject.toml": manifest,
        "src/me/__init__.py": code,
        "src/me/other.py": "",
        "src/me/broken.py": "x = (\n",
    }
    files |= {"tests/test_me.py": "import pytest, helpers, hypothesis\n", "tests/helpers.py": ""}
    assert imports_of(tmp_path, files) == {
        ("low", "unused_dependency", "never", "pyproject.toml:3"),
        ("low", "import_of_dev_package", "freezegun", "src/me/__init__.py:4"),
        ("moderate", "undeclared_import", "PIL", "src/me/__init__.py:5"),
        ("info", "optional_import", "numpy", "src/me/__init__.py:7"),
        ("info", "optional_import", "tomli", "src/me/__init__.py:9"),
        ("moderate", "undeclared_import", "lxml", "src/me/__init__.py:13"),
        ("low", "unread_source", "(project)", "src/me/broken.py:1"),
        ("moderate", "undeclared_import", "hypothesis", "tests/test_me.py:1"),
    }


def test_python_files_beyond_the_cap_leave_unused_packages_unjudged(tmp_path: Path) -> None:
    files = {"requirements.txt": "six\n", "a.py": "", "b.py": "import six\n"}
    assert imports_of(tmp_path, files, max_python_files=1) == set()
    assert (
        tools(tmp_path, max_python_files=1)["check_imports"]()["note"] == "only the first 1 of 2 Python files were read"
    )


def test_odd_python_files_are_findings(tmp_path: Path) -> None:
    (tmp_path / "null.py").write_bytes(b"x = 1\0")
    (tmp_path / "latin.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "escape.py").write_bytes(b"x = '\\d'\n")
    assert {entry[1:3] for entry in imports_of(tmp_path, {})} == {("unread_source", "(project)")}
    assert tools(tmp_path)["check_imports"]()["python_files"] == 3
    assert len(tools(tmp_path)["check_imports"]()["findings"]) == 2


# --- the tools as such --------------------------------------------------------------------------------------------


def test_tools_are_typed_and_described(tmp_path: Path) -> None:
    box = tools(tmp_path)
    assert list(box) == ["detect_files", "parse_file", *CHECKS, "write_report"]
    for tool in box.values():
        documentation = inspect.getdoc(tool) or ""
        for name, parameter in inspect.signature(tool).parameters.items():
            assert parameter.annotation is not inspect.Parameter.empty
            assert f"\n    {name}: " in documentation


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {"requirements.txt": "".join(f"p{n}==1.0rc1\n" for n in range(100))})
    box = tools(tmp_path)
    parsed = box["parse_file"]("requirements.txt")
    assert (len(parsed["dependencies"]), parsed["left_out"]) == (60, 40)
    result = box["check_maintenance"]()
    assert (len(result["findings"]), result["left_out"]) == (60, 141)


# --- online -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, Any]], dict[str, tuple[int, Any]]]]:
    """A local server: its address, the requests it saw, and path → (status, answer), to be filled."""
    seen: list[tuple[str, Any]] = []
    answers: dict[str, tuple[int, Any]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: Any) -> None:
            seen.append((self.path, body))
            status, data = answers.get(self.path, (404, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data if isinstance(data, bytes) else json.dumps(data).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}", seen, answers
        finally:
            httpd.shutdown()
            thread.join()


def osv_record(identifier: str, alias: str, severity: str) -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9.0"}]}]
    return {
        "id": identifier,
        "aliases": [alias],
        "summary": "s",
        "affected": [{"package": {"ecosystem": "PyPI", "name": "six"}, "ranges": ranges}],
        "database_specific": {"severity": severity},
    }


def test_osv_and_index_are_asked_when_online(tmp_path: Path, server: Any) -> None:
    url, seen, answers = server
    answers["/v1/query"] = (
        200,
        {"vulns": [osv_record("GHSA-1", "CVE-1", "HIGH"), osv_record("PYSEC-1", "CVE-1", "LOW")]},
    )
    answers["/pypi/six/json"] = (200, {"releases": {"1": [{"upload_time_iso_8601": "2015-01-02T03:04:05Z"}], "2": []}})
    write(tmp_path, {"requirements.txt": "Six==1.16.0\n"})
    evidence = audit(tmp_path, online=Online(osv_url=url, index_url=url))
    assert {(f.kind, f.severity, f.reference) for f in evidence if f.part == "security"} == {
        ("affected", "high", "GHSA-1")
    }
    assert [f.severity for f in evidence if f.kind == "stale"] == ["low"]
    assert seen == [
        ("/v1/query", {"package": {"name": "Six", "ecosystem": "PyPI"}, "version": "1.16.0"}),
        ("/pypi/six/json", None),
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((500, {}), "HTTP status 500"),
        ((200, b"<html>"), "not a JSON answer"),
        ((200, []), "not a JSON object"),
        ((200, {"vulns": [{"id": 1, "affected": 3}]}), "a record cannot be used"),
        ((200, {"next_page_token": "again"}), "more than 10 pages"),
    ],
)
def test_bad_answer_is_unknown_and_never_clean(tmp_path: Path, server: Any, answer: Any, reason: str) -> None:
    url, _, answers = server
    answers["/v1/query"] = answer
    write(tmp_path, {"requirements.txt": "six==1.16.0\n"})
    found = [f for f in audit(tmp_path, online=Online(osv_url=url)) if f.part == "security"]
    assert [(f.kind, f.severity, reason in f.fact) for f in found] == [("not_asked", "unknown", True)]


def test_unreachable_server_is_not_asked_for_every_package(tmp_path: Path, server: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    online = Online(osv_url=url, timeout_s=5)
    write(tmp_path, {"requirements.txt": "".join(f"p{n}==1\n" for n in range(9))})
    found = [f for f in audit(tmp_path, online=online) if f.part == "security"]
    assert {(f.kind, f.severity) for f in found} == {("not_asked", "unknown")}
    assert len(found) == 9
    assert len(online._failures) == 2


def test_only_web_addresses_are_fetched() -> None:
    with pytest.raises(ToolError, match="must start with https"):
        Online(osv_url="file:///tmp").advisories(PYPI, "six", "1")


def test_osv_record_without_a_rating_counts_as_moderate() -> None:
    record = osv_record("X", "CVE-2", "")
    assert Advisory.from_osv(record).severity == "moderate"
    assert Advisory.from_osv(record).label == "CVE-2"


def test_folders_that_the_project_excludes_are_left_out(tmp_path):
    (tmp_path / "samples" / "broken").mkdir(parents=True)
    (tmp_path / "samples" / "broken" / "requirements.txt").write_text("a==1\n")
    (tmp_path / "requirements.txt").write_text("b==1\n")
    (tmp_path / "pyproject.toml").write_text('[tool.dep-doctor]\nexclude = ["samples/broken/"]\n')
    assert [str(path) for path in walk(Project(tmp_path)).files] == ["pyproject.toml", "requirements.txt"]
    (tmp_path / "pyproject.toml").write_text("[tool.dep-doctor]\nexclude = 3\n")
    assert len(walk(Project(tmp_path)).files) == 3
