"""What a function's docstring says about its parameters."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable

# indentation, names, first line of the text
_REST_ENTRY = re.compile(r"( *):(?:param|parameter|arg|argument)\s+(?:[^:]*\s)?\*{0,2}(\w+):\s*(.*)")
_GOOGLE_ENTRY = re.compile(r"( *)\*{0,2}(\w+)\s*(?:\(.*?\))?\s*:\s*(.*)")
_NUMPY_ENTRY = re.compile(r"( *)(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?()$")
_GOOGLE_HEAD = re.compile(r"(?:Args|Arguments|Parameters|Params):\s*$")


def docstring_texts(doc: str) -> dict[str, str]:
    """Return parameter name to description, from a cleaned docstring in Google, NumPy or reST form."""
    lines = doc.splitlines()
    texts = _entries(lines, _REST_ENTRY)
    for i, line in enumerate(lines):
        if _GOOGLE_HEAD.match(line):
            section = itertools.takewhile(lambda text: not text or text[0] == " ", lines[i + 1 :])
            texts |= _entries(section, _GOOGLE_ENTRY)
        elif line.strip() == "Parameters" and lines[i + 1 : i + 2] and set(lines[i + 1].strip()) == {"-"}:
            heads = (j for j in range(i + 2, len(lines)) if set(lines[j].strip()) == {"-"})
            texts |= _entries(lines[i + 2 : next(heads, len(lines) + 1) - 1], _NUMPY_ENTRY)
    return texts


def _entries(lines: Iterable[str], pattern: re.Pattern[str]) -> dict[str, str]:
    """Join each entry with the lines below it that are indented further."""
    texts: dict[str, list[str]] = {}
    names: list[str] = []
    indent = sys.maxsize
    for line in filter(str.strip, lines):
        if len(line) - len(line.lstrip()) > indent:
            for name in names:
                texts[name].append(line.strip())
        elif match := pattern.match(line):
            names, indent = re.findall(r"\w+", match[2]), len(match[1])
            texts |= {name: [match[3]] for name in names}
        else:
            indent = sys.maxsize
    return {name: " ".join(filter(None, parts)) for name, parts in texts.items()}
