"""Grades by rule, and the card that shows them.

The grade of a part follows from its evidence alone:

* the worst known finding decides: critical → F, high → D, moderate → C, low → B, none of these → A;
* facts that could not be established (`unknown`) never worsen a grade, but they can prevent an A: when there is
  nothing but unknown facts, or as many of them as clean ones, the grade is "unknown";
* a part that was not checked is "unknown".
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from looplet.examples.dep_doctor.model import PARTS, SEVERITIES, Finding, Part, Severity

GRADES: dict[Severity, str] = {"critical": "F", "high": "D", "moderate": "C", "low": "B"}
UNKNOWN = "unknown"
WIDTH = 100
MAX_CLEAN_LINES = 5
DISCLAIMER = (
    "The advisory snapshot is not complete, licences are a first look and not legal advice, and what could not be "
    "established without a network is marked '?'."
)
_MARKS = {"info": "ok", "unknown": "?"}
_CLEAN = {
    "security": "no known advisory in the snapshot",
    "licence": "no conflict seen",
    "maintenance": "nothing to remark",
}


class Findings:
    """The evidence gathered so far, each piece once."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}
        self.card: ReportCard | None = None
        """the last report that was written"""

    def add(self, findings: Iterable[Finding]) -> list[Finding]:
        """Keep the findings and return them as a list."""
        added = list(findings)
        self._found.update(dict.fromkeys(added))
        return added

    def __iter__(self) -> Iterator[Finding]:
        return iter(list(self._found))


def grade(evidence: Sequence[Finding]) -> str:
    """Return `A` to `F`, or `unknown`, for the evidence of one part; the rule is in the module's docstring."""
    counts = Counter(finding.severity for finding in evidence)
    worst = next((severity for severity in GRADES if counts[severity]), None)
    if worst:
        return GRADES[worst]
    return "A" if counts["info"] > counts["unknown"] else UNKNOWN


def reason(part: Part, evidence: Sequence[Finding]) -> str:
    """Return one line that says why a part has its grade."""
    counts = Counter(finding.severity for finding in evidence)
    if not evidence:
        return "nothing was checked"
    said = [f"{counts[severity]} {severity}" for severity in GRADES if counts[severity]]
    unknown = f"; {counts['unknown']} unknown" if counts["unknown"] else ""
    if said:
        return ", ".join(said) + unknown
    if not counts["info"]:
        return f"all {counts['unknown']} facts are unknown"
    return f"{_CLEAN[part]} ({counts['info']} checked{unknown})"


@dataclass(frozen=True, slots=True)
class PartCard:
    """One part of the report: its grade is `grade(evidence)`."""

    name: Part
    grade: str
    reason: str
    evidence: tuple[Finding, ...]

    @classmethod
    def of(cls, part: Part, evidence: Sequence[Finding]) -> PartCard:
        """Grade one part by its share of the evidence, and put the worst first."""
        own = [finding for finding in evidence if finding.part == part]
        own.sort(key=lambda finding: SEVERITIES.index(finding.severity))
        return cls(part, grade(own), reason(part, own), tuple(own))

    def to_dict(self) -> dict[str, Any]:
        """Return the part with all of its evidence."""
        return {
            "grade": self.grade,
            "reason": self.reason,
            "evidence": [finding.to_dict() for finding in self.evidence],
        }

    def lines(self) -> list[str]:
        """Return the part as text: a heading and a line for each piece of evidence."""
        lines = [f"{self.name.upper():<14}{self.grade:<9}{self.reason}"]
        clean = [finding for finding in self.evidence if finding.severity == "info"]
        shown = [finding for finding in self.evidence if finding.severity != "info"] + clean[:MAX_CLEAN_LINES]
        for finding in shown:
            lines += _evidence_line(finding)
        if len(clean) > MAX_CLEAN_LINES:
            lines.append(f"  {'ok':<10}and {len(clean) - MAX_CLEAN_LINES} more without a remark")
        return lines


def _evidence_line(finding: Finding) -> list[str]:
    mark = _MARKS.get(finding.severity, finding.severity)
    text = f"{finding.place} — {finding.fact}"
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {mark:<10}", subsequent_indent=" " * 14, break_on_hyphens=False
    )


@dataclass(frozen=True, slots=True)
class ReportCard:
    """The result of an audit in three parts."""

    project: str
    parts: tuple[PartCard, ...]
    summary: str = ""
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, project: str, evidence: Sequence[Finding], summary: str = "", notes: Sequence[str] = ()) -> ReportCard:
        """Grade everything that was found."""
        return cls(project, tuple(PartCard.of(part, evidence) for part in PARTS), summary, tuple(notes))

    @property
    def grades(self) -> dict[str, str]:
        """Return part → grade."""
        return {part.name: part.grade for part in self.parts}

    def to_dict(self) -> dict[str, Any]:
        """Return the whole card as a JSON-like dict."""
        return {
            "project": self.project,
            "summary": self.summary,
            "parts": {part.name: part.to_dict() for part in self.parts},
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the card for reading, at most 100 columns wide (a longer word is broken)."""
        rule = "─" * WIDTH
        lines = [*textwrap.wrap(f"DEPENDENCY DOCTOR   {self.project}", WIDTH), rule]
        for paragraph in self.summary.splitlines():
            lines += textwrap.wrap(paragraph, WIDTH)
        lines += [rule] if self.summary.strip() else []
        for part in self.parts:
            lines += [*part.lines(), ""]
        for note in self.notes:
            lines += textwrap.wrap(f"Note: {note}", WIDTH, subsequent_indent="      ")
        return "\n".join([*lines, *textwrap.wrap(DISCLAIMER, WIDTH)]) + "\n"
