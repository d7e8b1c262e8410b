"""`Redactor`: puts `[email]`, `[phone]`, `[card]` and `[key]` in the place of what must not be seen.

    composable_loop(..., hooks=[Redactor()])          # or LoopConfig(redact=Redactor()), ProvenanceSink(redact=...)
    Redactor({**PATTERNS, "badge": r"B-[0-9]{6}"})    # one more

Patterns are no proof: a name, an address, a password that looks like a word stay.  Every pattern takes time in
proportion to the length of the text, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from looplet.errors import ConfigError

Pattern: TypeAlias = "str | re.Pattern[str] | Callable[[str, str], str]"
"""a regular expression, or a function (text, replacement) -> text"""

_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r".*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)",  # one that is cut off goes to the end of the text
    re.DOTALL,
)
_KEY: Final = re.compile(
    r"""(?<![A-Za-z0-9])
    (?: (?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}+                                  # OpenAI, Anthropic, Stripe
      | gh[opsur]_[A-Za-z0-9]{20,}+ | github_pat_[A-Za-z0-9_]{20,}+ | glpat-[A-Za-z0-9_-]{16,}+
      | (?:AKIA|ASIA)[A-Z0-9]{16,}+                                         # AWS
      | AIza[A-Za-z0-9_-]{30,}+                                              # Google
      | xox[abeoprs]-[A-Za-z0-9-]{10,}+                                      # Slack
      | hf_[A-Za-z0-9]{30,}+
      | eyJ[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+(?:\.[A-Za-z0-9_-]++)?   # JSON web tokens
      | (?i:bearer)\s{1,4}(?=[A-Za-z._~+/-]{0,200}[0-9])[A-Za-z0-9._~+/-]{16,}+={0,2}
    )""",
    re.VERBOSE,
)
_EMAIL: Final = re.compile(r"[\w.%+-]++(@(?:[\w-]++\.)+[^\W\d_]{2,}+)?")
"""every run of characters that may stand before an @, and the rest of the address if there is one"""
_PHONE: Final = re.compile(
    r"\+[1-9](?:[ ().-]{0,2}[0-9]){7,14}(?![0-9])"  # +49 171 2345678
    r"|(?:\([2-9][0-9]{2}\)[ -]?|(?<![\w.+-])[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}(?![\w-])"  # (555) 234-5678
)
_MANY_DIGITS: Final = re.compile(r"(?:[0-9][ -]?){13}")
_DIGITS: Final = re.compile(r"[0-9]+")
_CARD_LENGTHS: Final = range(13, 20)
_CARD_GROUP: Final = 3
"""digits that a group of a card number has at least"""
_PASSES: Final = 8
"""how often a text is looked through for what came to light when something else in it was replaced"""


def hide_emails(text: str, replacement: str) -> str:
    """Return `text` without e-mail addresses."""
    if "@" not in text:
        return text
    return _EMAIL.sub(lambda match: replacement if match[1] else match[0], text)


def hide_cards(text: str, replacement: str) -> str:
    """Return `text` without what can be a card number: 13 to 19 digits, first 2 to 6, with a right check digit."""
    if not _MANY_DIGITS.search(text):
        return text
    groups = [match.span() for match in _DIGITS.finditer(text)]
    shown, out, at = 0, [], 0
    while at < len(groups):
        end = _card_end(text, groups, at)
        if end:
            out += [text[shown : groups[at][0]], replacement]
            shown = groups[end - 1][1]
        at = end or at + 1
    return "".join([*out, text[shown:]])


def _card_end(text: str, groups: list[tuple[int, int]], first: int) -> int:
    """Return after which group the card number ends that begins with `first`, 0 when none does."""
    digits, found, before = "", 0, groups[first][0]
    for at in range(first, len(groups)):
        start, end = groups[at]
        if text[before:start] not in ("", " ", "-") or end - start < _CARD_GROUP:
            break
        digits, before = digits + text[start:end], end
        if len(digits) not in _CARD_LENGTHS:
            if len(digits) > _CARD_LENGTHS.stop:
                break
        elif digits[0] in "23456" and _checks(digits):
            found = at + 1
    return found


def _checks(digits: str) -> bool:
    """Tell whether the last digit is right (Luhn, ISO/IEC 7812-1)."""
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


PATTERNS: Final[Mapping[str, Pattern]] = MappingProxyType(
    {"private_key": _PRIVATE_KEY, "key": _KEY, "email": hide_emails, "card": hide_cards, "phone": _PHONE}
)
"""what a `Redactor` replaces unless told otherwise, in this order"""


class Redactor:
    """A function from str to str that hides what matches its patterns; also an object for `hooks=[...]`.

    patterns: by name; what matches `badge` becomes `[badge]`.  They take the place of `PATTERNS`.  What stands in such
    brackets already is left alone, so redacting twice is redacting once.

    Raises ConfigError for a pattern that cannot be used.
    """

    def __init__(self, patterns: Mapping[str, Pattern] | None = None) -> None:
        if patterns is not None and not isinstance(patterns, Mapping):
            raise ConfigError(
                f"patterns must be a dict of names and patterns, not {type(patterns).__name__}: "
                'Redactor({**PATTERNS, "badge": r"B-[0-9]{6}"})'
            )
        chosen = PATTERNS if patterns is None else patterns
        self._rules = [(f"[{name}]", _function(name, pattern)) for name, pattern in chosen.items()]
        names = "|".join(re.escape(token) for token, _ in self._rules)
        self._tokens = re.compile(f"({names})") if names else re.compile(r"(?!)()")

    @property
    def looplet_redact(self) -> Redactor:
        """Return what the run redacts with."""
        return self

    def __call__(self, text: str) -> str:
        """Return `text` with everything replaced that a pattern finds."""
        for _ in range(_PASSES):
            redacted = text
            for token, hide in self._rules:
                pieces = self._tokens.split(redacted)
                pieces[::2] = [hide(piece, token) for piece in pieces[::2]]
                redacted = "".join(pieces)
            if redacted == text:
                break
            text = redacted
        return text


def _function(name: str, pattern: Pattern) -> Callable[[str, str], str]:
    if not isinstance(name, str) or not re.fullmatch(r"[\w -]+", name):
        raise ConfigError(f"the name of a pattern is made of letters, digits, spaces, - and _; it is not {name!r}")
    if callable(pattern):
        return pattern
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"pattern {name!r} is no regular expression: {error}") from error

    def hide(text: str, replacement: str) -> str:
        return compiled.sub(lambda match: replacement if match[0] else "", text)

    return hide
