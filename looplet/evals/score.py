"""What an evaluator says about one run: `EvalResult`, the marks on evaluators, and how return values become results.

A verdict is a score in 0..1.  Whatever gives none (nothing returned, an exception, a missing judge, a label without a
score) can never pass: evals fail closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Final, TypeVar

from looplet.boundary import Boundary
from looplet.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

PASS_LABELS: Final = frozenset({"pass", "correct", "yes"})
FAIL_LABELS: Final = frozenset({"fail", "incorrect", "no"})
SCORE_KEYS: Final = ("score", "f1", "accuracy", "overall")
"""the entries of a returned dict that can be its score, the first one present"""
DEFAULT_THRESHOLD: Final = 0.5
ROUNDING: Final = 1e-9
"""the average of three times 0.7 is a little less than 0.7, and still meets a threshold of 0.7"""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The verdict of one evaluator on one run."""

    name: str = ""
    score: float | None = None
    """in 0..1; None when there is no verdict"""
    label: str | None = None
    """`error` and `skipped` mean that the evaluator gave no verdict"""
    metrics: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    explanation: str = ""
    duration_ms: float = 0.0

    @classmethod
    def from_return(cls, value: Any, *, name: str = "") -> EvalResult:
        """Return the result that an evaluator's return value stands for; a value that is none is an `error` result.

        bool → 1.0 or 0.0; number in 0..1 → score; str → label; dict → metrics, with the score from `SCORE_KEYS`.
        """
        try:
            result = _normalised(value)
        except ValueError as error:
            result = cls(label="error", explanation=str(error))
        return result if result.name else replace(result, name=name)

    @property
    def error(self) -> str | None:
        """Why the evaluator gave no verdict (it raised, it was skipped), else None."""
        if self.label not in ("error", "skipped"):
            return None
        return self.explanation or self.label

    @property
    def complaint(self) -> str | None:
        """Why this result can pass no threshold, whatever the threshold: an error, or no score."""
        if self.error is not None or self.score is not None:
            return self.error
        given = f"label {self.label!r}" if self.label else f"metrics {sorted(map(str, self.metrics))}"
        return f"{given} without a score: return a number in 0..1, True or False, 'pass' or 'fail'"

    @property
    def passed(self) -> bool:
        """Tell whether the result meets the default threshold."""
        return self.meets(DEFAULT_THRESHOLD)

    def meets(self, threshold: float) -> bool:
        """Tell whether the score is at least `threshold`; a label that says `fail` never meets one."""
        if self.error is not None or label_score(self.label) == 0.0:
            return False
        score = label_score(self.label) if self.score is None else self.score
        return score is not None and at_least(score, threshold)

    def pretty(self) -> str:
        """Return one line for people: `✓ eval_answer  1.00  pass`."""
        mark = "!" if self.error is not None else "✓" if self.passed else "✗"
        score = "   -" if self.score is None else f"{self.score:.2f}"
        return "  ".join(part for part in (f"{mark} {self.name:<40}", score, self.label, self.explanation) if part)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-like dict."""
        clean = Boundary().clean
        return {
            "name": self.name,
            "score": self.score,
            "label": self.label,
            "passed": self.passed,
            "metrics": clean(self.metrics),
            "details": clean(self.details),
            "explanation": clean(self.explanation),
            "duration_ms": round(self.duration_ms, 3),
        }


def eval_mark(*tags: str, required: bool = True) -> Callable[[F], F]:
    """Tag an evaluator for `include` and `exclude`; `required=False` shows its score but lets it decide nothing.

    The function itself is returned.  Marks add up: the tags of two decorators are united.
    Raises ConfigError for a tag that is no string, such as the function in `@eval_mark` without parentheses.
    """
    wrong = [tag for tag in tags if not isinstance(tag, str) or not tag]
    if wrong:
        raise ConfigError(f"eval_mark takes tags, not {wrong[0]!r}; write @eval_mark('verdict') or @eval_mark()")

    def mark(evaluator: F) -> F:
        evaluator.eval_tags = tags_of(evaluator) | set(tags)  # type: ignore[attr-defined]
        evaluator.eval_required = required and is_required(evaluator)  # type: ignore[attr-defined]
        return evaluator

    return mark


def tags_of(evaluator: Callable[..., Any]) -> frozenset[str]:
    """Return the tags that `eval_mark` gave."""
    return frozenset(getattr(evaluator, "eval_tags", ()))


def is_required(evaluator: Callable[..., Any]) -> bool:
    """Tell whether the evaluator decides over passing; it does unless it was marked `required=False`."""
    return bool(getattr(evaluator, "eval_required", True))


def at_least(score: float, threshold: float) -> bool:
    """Tell whether `score` reaches `threshold`, rounding errors aside."""
    return score >= threshold - ROUNDING


def label_score(label: str | None) -> float | None:
    """Return 1.0 for a label that says pass, 0.0 for one that says fail, None for any other."""
    word = (label or "").strip().casefold()
    return 1.0 if word in PASS_LABELS else 0.0 if word in FAIL_LABELS else None


def _normalised(value: Any) -> EvalResult:
    """Raises ValueError, in words for the evaluator's author, when `value` is no result."""
    match value:
        case None:
            raise ValueError("returned nothing: end every path of the evaluator with `return ...`")
        case EvalResult():
            score = label_score(value.label) if value.score is None else _checked(value.score)
            return replace(value, score=score)
        case bool():
            return EvalResult(score=float(value), label="pass" if value else "fail")
        case str():
            return _from_label(value.strip())
        case Real():
            return EvalResult(score=_checked(value))
        case Mapping():
            return _from_metrics(value)
    raise ValueError(
        f"returned a {type(value).__name__}: return True or False, a number in 0..1, a label, a dict or an EvalResult"
    )


def _from_label(label: str) -> EvalResult:
    if not label:
        raise ValueError("returned an empty string: return a label such as 'pass' or 'fail'")
    return EvalResult(score=label_score(label), label=label)


def _from_metrics(metrics: Mapping[Any, Any]) -> EvalResult:
    """A `label` and an `explanation` in words are taken over, every entry stays a metric."""
    words = {key: metrics[key] for key in ("label", "explanation") if isinstance(metrics.get(key), str)}
    key = next((key for key in SCORE_KEYS if key in metrics), None)
    score = label_score(words.get("label")) if key is None else _checked(metrics[key], f"{key!r} is ")
    return EvalResult(score=score, metrics={str(name): value for name, value in metrics.items()}, **words)


def _checked(value: Any, what: str = "returned ") -> float:
    """Return `value` as a score; it is never clipped, since a score out of range is a bug of the evaluator."""
    if not isinstance(value, Real):
        raise ValueError(f"{what}{value!r}, which is no number: a score lies in 0..1")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not 0 <= score <= 1:  # so is NaN
        raise ValueError(f"{what}{value!r}: a score lies in 0..1, divide by the best value that is possible")
    return score
