"""Every error that looplet raises on purpose.

LoopletError
├── ConfigError         the caller's mistake; says what to write instead
│   └── MissingExtra    a package that an optional part of looplet needs; also an ImportError
├── BackendError        the provider failed            .status  .retryable  .retry_after_s
│   └── ContextOverflow the request is longer than the model's window
├── BudgetExhausted     a model call that the run's budget no longer allows   .limit
├── ToolError           raised by a tool author to talk to the model   .kind  .retriable
└── TraceError          a trace file that cannot be read or written    .path  .line
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any


class LoopletError(Exception):
    """Base of all errors below; nothing else is raised on purpose."""


class ConfigError(LoopletError, TypeError, ValueError):
    """The caller's mistake; the message says what to write instead."""


class MissingExtra(ConfigError, ImportError):
    """A package that an optional part of looplet needs is not installed."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtra:
        """Return the error that says how to install the extra."""
        return cls(f'the {package} package is missing: pip install "looplet[{extra}]"')


class BackendError(LoopletError):
    """The model's provider failed.

    `status` is the HTTP status if there was one, `kind` a low-cardinality name for spans and metrics
    (`rate_limit`, `timeout`, `network`, `server_error`, ...), `retry_after_s` what the provider asked for, in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        kind: str = "backend_error",
        retryable: bool = False,
        retry_after_s: float | None = None,
        usage: Any = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.usage = usage
        """a `looplet.Usage`, where the provider charged for the failed attempt and said so"""


class ContextOverflow(BackendError):
    """The request is longer than the model's context window."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message, status=status, kind="context_overflow")


class BudgetExhausted(LoopletError):
    """The run's budget allows no further model call; `limit` names what is used up: tokens, usd, seconds, ..."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"the run's budget is used up: {limit}")
        self.limit = limit


class ErrorKind(StrEnum):
    """Why a tool call has no result; the `error.type` of its span."""

    PERMISSION_DENIED = "permission_denied"
    TIMEOUT = "timeout"
    VALIDATION = "validation"
    EXECUTION = "execution"
    PARSE = "parse"
    CONTEXT_OVERFLOW = "context_overflow"
    RATE_LIMIT = "rate_limit"
    NETWORK = "network"
    CANCELLED = "cancelled"


class ToolError(LoopletError):
    """What went wrong in a tool call, in words for the model.  A tool raises it; `ToolResult.error_detail` holds it.

    Two of them are equal when they say the same thing, so that a result read back from a trace equals the live one.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: ErrorKind | str = ErrorKind.EXECUTION,
        retriable: bool = False,
        context: Mapping[str, Any] | None = None,
        recovery_hint: Any = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind = ErrorKind(kind)
        self.retriable = retriable
        self.context = dict(context or {})
        self.recovery_hint = recovery_hint

    def to_dict(self) -> dict[str, Any]:
        """Return the parts that are recorded; `from_dict` is the inverse."""
        return {
            "message": self.message,
            "kind": str(self.kind),
            "retriable": self.retriable,
            "context": self.context,
            "recovery_hint": self.recovery_hint,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ToolError:
        """Build the error that `to_dict` described."""
        return cls(
            data["message"],
            kind=data.get("kind", ErrorKind.EXECUTION),
            retriable=bool(data.get("retriable")),
            context=data.get("context"),
            recovery_hint=data.get("recovery_hint"),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ToolError) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.message, self.kind))


class TraceError(LoopletError):
    """A trace file that cannot be read or written; `path` and `line` (from 1, 0 if unknown) say where."""

    def __init__(self, message: str, *, path: str = "", line: int = 0) -> None:
        where = f"{path}:{line}: " if line else f"{path}: " if path else ""
        super().__init__(where + message)
        self.path = path
        self.line = line


def words_of(error: BaseException) -> str:
    """Return `str(error)`, or a stand-in where the exception's own `__str__` raises."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - foreign code
        return f"<unreadable {type(error).__name__}>"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, or an empty string."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
