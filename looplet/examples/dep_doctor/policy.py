"""A stand-in for the model: rules that read the conversation and decide the next calls.

Nothing is scripted: each decision follows from what the tools have really returned so far, as a model's would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from looplet.examples.dep_doctor.model import SEVERITIES
from looplet.messages import Message
from looplet.testing.backends import PolicyBackend
from looplet.types import Reply, ToolCall

CHECKS: Final = {
    "check_security": "known vulnerabilities",
    "check_licences": "licences",
    "check_maintenance": "maintenance",
    "check_imports": "imports",
}
"""check → what it looks at, in words"""


def rule_based_backend() -> PolicyBackend:
    """Return a backend that needs no model."""
    return PolicyBackend(reply, model="rules")


def reply(messages: Sequence[Message]) -> Reply:
    """Return the next calls; rules use no tokens, so no usage is reported."""
    return Reply(tool_calls=tuple(decide(history(messages))), finish_reason="tool_call")


@dataclass(frozen=True, slots=True)
class PastCall:
    """One call that was made, and what the tool answered."""

    tool: str
    args: dict[str, Any]
    result: Any

    @property
    def is_failure(self) -> bool:
        """Tell whether the call did not succeed; a file that cannot be read is described, with its path."""
        return isinstance(self.result, dict) and "error" in self.result and "path" not in self.result

    def get(self, key: str, default: Any) -> Any:
        """Return an entry of the answer, the default when there is none of that type."""
        value = self.result.get(key, default) if isinstance(self.result, dict) else default
        return value if isinstance(value, type(default)) else default


def history(messages: Sequence[Message]) -> list[PastCall]:
    """Return the calls of a conversation that have an answer, oldest answer first."""
    calls = {call.call_id: call for message in messages for call in message.tool_calls}
    answers = [part for message in messages for part in message.parts if part["type"] == "tool_call_response"]
    known = [(calls[part["id"]], part["response"]) for part in answers if part["id"] in calls]
    return [PastCall(call.tool, call.args, response) for call, response in known]


def decide(calls: Sequence[PastCall]) -> list[ToolCall]:
    """Return what to do next: look, read, check, report, finish."""
    found = last(calls, "detect_files")
    if found is None:
        return [ToolCall("detect_files", reasoning="see which dependency files there are")]
    asked = {entry.args.get("path") for entry in calls if entry.tool == "parse_file"}
    unread = [path for path in detected(found) if path not in asked]
    if unread:
        return [ToolCall("parse_file", {"path": path}, "read what it asks for") for path in unread]
    made = {entry.tool for entry in calls}
    if open_checks := [name for name in sensible_checks(found, calls) if name not in made]:
        return [ToolCall(name, reasoning=f"look at {CHECKS[name]}") for name in open_checks]
    report = last(calls, "write_report")
    if report is None or report.is_failure:
        return [ToolCall("write_report", {"summary": summary(calls)}, "everything that makes sense was checked")]
    return [ToolCall("done", {"answer": answer(report, calls)}, "the report is written")]


def last(calls: Sequence[PastCall], tool: str) -> PastCall | None:
    """Return the latest call of a tool."""
    return next((entry for entry in reversed(calls) if entry.tool == tool), None)


def detected(found: PastCall) -> list[str]:
    """Return the paths that detect_files listed."""
    return [str(file["path"]) for file in found.get("files", [])]


def sensible_checks(found: PastCall, calls: Sequence[PastCall]) -> list[str]:
    """Return the checks that have something to look at: packages for the first three, Python files for the last."""
    has_packages = any(entry.get("dependencies", []) or entry.get("locked", []) for entry in parsed(calls))
    checks = ["check_security", "check_licences", "check_maintenance"] if has_packages else []
    return checks + (["check_imports"] if found.get("python_files", 0) else [])


def parsed(calls: Sequence[PastCall]) -> list[PastCall]:
    """Return the files that were read, broken ones included."""
    return [entry for entry in calls if entry.tool == "parse_file" and not entry.is_failure]


def summary(calls: Sequence[PastCall]) -> str:
    """Return some sentences on what the calls have found, for the head of the report."""
    sentences = [_on_files(parsed(calls))]
    sentences += [_on_broken(entry) for entry in parsed(calls) if entry.get("error", "")]
    sentences += [_on_check(entry) for entry in calls if entry.tool in CHECKS]
    failed = [entry for entry in calls if entry.is_failure]
    sentences += [f"{entry.tool} failed: {entry.result['error']}." for entry in failed]
    return " ".join(sentences)


def answer(report: PastCall, calls: Sequence[PastCall]) -> str:
    """Return the grades and what to repair first."""
    grades = ", ".join(f"{part} {says['grade']}" for part, says in report.get("parts", {}).items())
    worst = sorted(_findings(calls), key=lambda finding: SEVERITIES.index(finding["severity"]))[:1]
    first = [f"Repair first: {finding['where']} — {finding['fact']}" for finding in worst]
    return " ".join([f"Grades: {grades}.", *(first or ["Nothing was found that needs a repair."])])


def _on_files(files: Sequence[PastCall]) -> str:
    if not files:
        return "There is no dependency file in this folder."
    ecosystems = " and ".join(sorted({entry.get("ecosystem", "") for entry in files}))
    return f"{_count(len(files), 'dependency file')} of {ecosystems} read."


def _on_broken(entry: PastCall) -> str:
    line = entry.get("line", 0)
    where = f"{entry.get('path', '')}:{line}" if line else entry.get("path", "")
    return f"{where} cannot be read, so what it asks for is unknown."


def _on_check(entry: PastCall) -> str:
    found = entry.get("findings", [])
    subject = CHECKS[entry.tool].capitalize()
    if not found:
        return f"{subject}: not known." if entry.is_failure else f"{subject}: nothing found."
    worst = min(found, key=lambda finding: SEVERITIES.index(finding["severity"]))
    number = len(found) + entry.get("left_out", 0)
    return f"{subject}: {_count(number, 'finding')}, the worst is {worst['severity']} ({worst['package'].strip('()')})."


def _findings(calls: Sequence[PastCall]) -> list[dict[str, Any]]:
    """Return what the checks found, and the files that cannot be read as the findings that they are."""
    found = [finding for entry in calls if entry.tool in CHECKS for finding in entry.get("findings", [])]
    broken = [entry for entry in parsed(calls) if entry.get("error", "")]
    return found + [
        {"severity": "high", "where": entry.get("path", ""), "fact": entry.get("error", "")} for entry in broken
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
