"""Dependency Doctor: an agent that audits the dependency files of a project and writes a report card.

for step in make_run(Project(Path(".")), llm):
    print(step.pretty())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from looplet.config import LoopConfig
from looplet.examples.dep_doctor.project import Project
from looplet.examples.dep_doctor.report import Findings
from looplet.examples.dep_doctor.tools import make_tools
from looplet.run import Run, composable_loop
from looplet.tools import BaseToolRegistry, tool, tools_from

AGENT: Final = "dep_doctor"
MAX_STEPS: Final = 100
"""enough to read each of the 60 files that detect_files lists"""
PARALLEL: Final = frozenset({"detect_files", "parse_file"})
"""tools that only read files and keep nothing"""
GOAL: Final = (
    "Audit the dependencies of this project for security, licence and maintenance risks, and write a report card."
)
SYSTEM_PROMPT: Final = """\
You are the Dependency Doctor. You examine one project folder with the tools you are given.

1. Call detect_files, then parse_file for every file that it lists.
2. Call the checks that fit what was found: check_security, check_licences and check_maintenance when there are \
packages, check_imports when there are Python files. Independent calls may be made in one reply.
3. Call write_report with a summary of two or three sentences. The grades follow from the evidence by fixed rules.
4. Call done with the answer: the grades, and what to repair first.

Say only what the tools have told you. A file that cannot be read is a finding, not a reason to stop."""


class ReportFirst:
    """Accepts no `done` before there is a report card."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def check_done(self, state: Any, session_log: Any, context: Any, step_num: int) -> str | None:
        """Return what is missing, None when nothing is."""
        return None if self._findings.card is not None else "there is no report card yet: call write_report first"


def make_registry(project: Project, findings: Findings) -> BaseToolRegistry:
    """Return the tools of an audit, `done` included.  Raises ConfigError when the advisories cannot be used."""
    made = [tool(concurrent_safe=f.__name__ in PARALLEL)(f) for f in make_tools(project, findings)]
    return tools_from(made, include_done=True)


def make_run(
    project: Project,
    llm: Any,
    *,
    findings: Findings | None = None,
    hooks: Sequence[Any] = (),
    max_steps: int = MAX_STEPS,
) -> Run:
    """Return the run of an audit; iterate over it to make it happen.

    `findings` collects the evidence and, in `.card`, the report card.
    """
    evidence = findings if findings is not None else Findings()
    return composable_loop(
        llm,
        task={"goal": GOAL, "project": project.path.name or "/"},
        tools=make_registry(project, evidence),
        hooks=[ReportFirst(evidence), *hooks],
        config=LoopConfig(system_prompt=SYSTEM_PROMPT, agent_name=AGENT, max_steps=max_steps),
    )
