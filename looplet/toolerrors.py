"""What an exception in a tool means: for the model, and for whether the call is made again."""

from __future__ import annotations

import os
import re
from pathlib import Path
from traceback import walk_tb
from types import CodeType
from typing import Final

from looplet.errors import ErrorKind, ToolError, words_of

MAX_DELAY_S: Final = 5.0
"""between two attempts"""
MAX_ASKED_DELAY_S: Final = 60.0
"""the longest wait that a tool may ask for; what takes longer is for the model to decide"""

_ENGINE: Final = f"{Path(__file__).parent}{os.sep}"
_EXAMPLES: Final = f"{_ENGINE}examples{os.sep}"
_RATE_LIMIT: Final = re.compile(r"rate ?limit|too many requests|\b(?:http|status|code|error)\W{0,3}429\b")
_CONTEXT: Final = ("context length", "context_length", "maximum context")
_NEVER_AGAIN: Final = frozenset({ErrorKind.VALIDATION, ErrorKind.PERMISSION_DENIED, ErrorKind.CANCELLED})


def to_tool_error(error: BaseException) -> ToolError:
    """Return what an exception in a tool means for the model: its kind, and whether to try again.

    `context["at"]` says where the tool's code raised, for its author: "agent.py:12 in greet".
    """
    if isinstance(error, ToolError):
        return error
    words = f"{type(error).__name__}: {words_of(error)}"
    kind, retriable = _classify(error, words.lower())
    at = _place_of(error)
    return ToolError(words, kind=kind, retriable=retriable, context={"at": at} if at else None)


def retry_delay_s(error: ToolError, attempt: int, *, idempotent: bool) -> float | None:
    """Return the seconds to wait before the call is made again, None when it must not be.

    attempt: how often it was made, from 1.  The delays are 0.05, 0.2, 0.8, 3.2, 5, 5, ... unless the tool says
    `ToolError(context={"retry_after_s": ...})`.  A call that took too long may have had its effect, so only an
    idempotent one is repeated.
    """
    if not error.retriable or error.kind in _NEVER_AGAIN or (error.kind is ErrorKind.TIMEOUT and not idempotent):
        return None
    asked = error.context.get("retry_after_s")
    if isinstance(asked, (int, float)) and asked >= 0:
        return float(asked) if asked <= MAX_ASKED_DELAY_S else None
    return float(min(MAX_DELAY_S, 0.05 * 4 ** min(attempt - 1, 9)))


def _place_of(error: BaseException) -> str:
    """Return the line that an error comes from: the last one in the file of the tool, not in a library it called."""
    lines = [(frame.f_code, line) for frame, line in walk_tb(error.__traceback__) if not _is_engine(frame.f_code)]
    lines = [(code, line) for code, line in lines if code.co_filename == lines[0][0].co_filename]
    if not lines:
        return ""
    code, line = lines[-1]
    return f"{Path(code.co_filename).name}:{line} in {code.co_name}"


def _is_engine(code: CodeType) -> bool:
    return code.co_filename.startswith(_ENGINE) and not code.co_filename.startswith(_EXAMPLES)


def _classify(error: BaseException, words: str) -> tuple[ErrorKind, bool]:
    by_class: list[tuple[type[BaseException], ErrorKind, bool]] = [
        (TimeoutError, ErrorKind.TIMEOUT, True),
        (PermissionError, ErrorKind.PERMISSION_DENIED, False),
        (ConnectionError, ErrorKind.NETWORK, True),
    ]
    for kind, name, retriable in by_class:
        if isinstance(error, kind):
            return name, retriable
    if _RATE_LIMIT.search(words):
        return ErrorKind.RATE_LIMIT, True
    if any(mark in words for mark in _CONTEXT):
        return ErrorKind.CONTEXT_OVERFLOW, False
    if "parseerror" in words or "decodeerror" in words:
        return ErrorKind.PARSE, False
    if isinstance(error, (ValueError, TypeError, KeyError)):
        return ErrorKind.VALIDATION, False
    return ErrorKind.EXECUTION, False
