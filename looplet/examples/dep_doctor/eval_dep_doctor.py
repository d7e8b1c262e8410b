"""Is an audit by the Dependency Doctor good?  Three evaluators over what its trace tells.

looplet eval traces/ --evals eval_dep_doctor.py -v
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from looplet.evals.context import EvalContext
from looplet.evals.score import EvalResult, eval_mark
from looplet.examples.dep_doctor.report import GRADES, UNKNOWN

PART_OF: Final = {
    "check_security": "security",
    "check_licences": "licence",
    "check_maintenance": "maintenance",
    "check_imports": "maintenance",
}
WORST_FIRST: Final = (*GRADES.values(), "A")


@eval_mark("outcome")
def eval_audit_completed(ctx: EvalContext) -> EvalResult:
    """The run ended with an accepted answer, and a report was written before."""
    if not ctx.completed:
        return EvalResult(score=0.0, explanation=f"the run ended with {ctx.stop_reason}")
    written = bool(results_of(ctx, "write_report"))
    return EvalResult(score=float(written), explanation="done, with a report" if written else "no report was written")


@eval_mark("coverage")
def eval_detected_files_were_read(ctx: EvalContext) -> EvalResult:
    """The share of the dependency files that detect_files listed and parse_file has read."""
    listings = results_of(ctx, "detect_files")
    if not listings:
        return EvalResult(score=0.0, explanation="detect_files was never called")
    detected = {str(file["path"]) for file in listings[-1]["files"]}
    missed = sorted(detected - {str(result["path"]) for result in results_of(ctx, "parse_file")})
    if missed:
        read = len(detected) - len(missed)
        return EvalResult(score=read / len(detected), explanation=f"not read: {', '.join(missed)}")
    return EvalResult(score=1.0, explanation=f"{len(detected)} of {len(detected)} files")


@eval_mark("evidence")
def eval_grades_follow_from_evidence(ctx: EvalContext) -> EvalResult:
    """Every grade of the report is the one that the findings of the other steps lead to."""
    reports = results_of(ctx, "write_report")
    if not reports:
        return EvalResult(score=0.0, explanation="no report was written")
    grades = {part: str(says["grade"]) for part, says in reports[-1]["parts"].items()}
    unfounded = [f"{part} {grade}" for part, grade in grades.items() if not is_founded(ctx, part, grade)]
    if unfounded:
        return EvalResult(score=0.0, label="fail", explanation=f"without evidence: {', '.join(unfounded)}")
    said = ", ".join(f"{part} {grade}" for part, grade in grades.items())
    return EvalResult(score=1.0, explanation=said)


def is_founded(ctx: EvalContext, part: str, grade: str) -> bool:
    """Tell whether the steps hold the evidence for a grade.

    The worst finding decides.  Where a tool left findings out of its answer, the grade may be worse than what it shows.
    """
    checks = [result for tool, own in PART_OF.items() if own == part for result in results_of(ctx, tool)]
    found = [finding["severity"] for result in checks for finding in result["findings"]]
    if part == "maintenance":
        found += severities_of_files(results_of(ctx, "parse_file"))
    worst = next((letter for severity, letter in GRADES.items() if severity in found), None)
    if worst is None:
        return grade == UNKNOWN or (grade == "A" and any(result["clean"] for result in checks))
    if any("left_out" in result for result in (*checks, *results_of(ctx, "detect_files"))):
        return grade in WORST_FIRST[: WORST_FIRST.index(worst) + 1]
    return grade == worst


def severities_of_files(files: Sequence[dict[str, Any]]) -> list[str]:
    """Return how much broken files, and entries that could not be understood, weigh."""
    broken = ["high" for file in files if "error" in file]
    return broken + ["low" for file in files if file.get("problems")]


def results_of(ctx: EvalContext, tool: str) -> list[dict[str, Any]]:
    """Return what the successful calls of a tool returned, in order."""
    return [s.tool_result.data for s in ctx.steps if s.tool_call.tool == tool and s.tool_result.error is None]
