"""Tool calls out of plain text, for models without native tool calling.

Such models answer with JSON, often inside prose or a code fence, and often slightly broken.  A reply that is exactly
one JSON value takes the fast path; any other is searched for `{` and `[`, and what starts there is read by a parser
that forgives what models get wrong (raw newlines in strings, trailing commas, other quotes, Python literals, comments,
unquoted keys, brackets missing at the end), and only where strict JSON would fail, so valid JSON has one reading.
Nothing is invented: a string that was cut off, or an object that names no tool, is a `ParseFailure`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeAlias

from looplet.errors import LoopletError
from looplet.types import ToolCall, cut

EXPECTED = '{"tool": "<tool name>", "args": {"<argument>": <value>}, "reasoning": "<why>"}'
"""the shape that models are asked for; every `ParseFailure` ends with it"""

RAW_ARG = "_raw_arg"
"""the argument's name when a model gave a bare value instead of an object of arguments"""

_NAME_KEYS = ("tool", "name", "function")
_ARGS_KEYS = ("args", "arguments", "parameters", "input")
_BATCH_KEYS = ("tools", "tool_calls")
_REASONING_KEYS = ("reasoning", "thinking", "thought")
_ID_KEYS = ("call_id", "id")
_ABOUT_KEYS = frozenset((*_REASONING_KEYS, *_ID_KEYS, "theory"))
_CALL_KEYS = frozenset((*_NAME_KEYS, *_ARGS_KEYS, *_BATCH_KEYS, *_REASONING_KEYS))

_CUT = "\0"
"""what belongs into no JSON: missing brackets are forgiven at the end of a text, and here it does not end"""
_MAX_DEPTH = 200
_ATTEMPT_COST = 16


class ParseFailure(LoopletError):
    """A reply without a readable tool call; the message is fit to be sent back to the model.

    `excerpt` is the start of the reply, on one line.
    """

    def __init__(self, excerpt: str, reason: str) -> None:
        super().__init__(f"Could not parse JSON: {excerpt}\nProblem: {reason}.\nReply with one JSON object: {EXPECTED}")
        self.excerpt = excerpt


def parse_tool_calls(text: str, known: Collection[str] = (), *, is_cut: bool = False) -> list[ToolCall]:
    """Return the tool calls in a model's reply, in order, at least one.

    is_cut: an output limit ended the reply, so a call that is not closed is not complete.
    `known` names the tools there are.  Where a reply holds several candidates those that name a known tool are kept,
    or the first one if none does; `search({...})` is read as a call only if `search` is known.  `call_id` is empty
    where the model gave none.  Time is linear in the length of `text`.

    Raises `ParseFailure` if there is no call, and nothing else.
    """
    import msgspec

    try:
        return _calls_in(msgspec.json.decode(text))
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError, _Broken):
        pass  # the search finds it again, and says where it is
    text = _without_lone_surrogates(text)
    search = _Search(f"{text}{_CUT}" if is_cut else text, known)
    search.run()
    if not search.found:
        raise _failure(text, search.problem)
    kept = [calls for calls in search.found if any(call.tool in known for call in calls)] or search.found[:1]
    return [call for calls in (kept if known else search.found) for call in calls]


def _failure(text: str, problem: _Broken) -> ParseFailure:
    excerpt = cut(" ".join(text.lstrip()[:400].split()), 120) or "(an empty reply)"
    if problem.position < 0:
        return ParseFailure(excerpt, problem.reason)
    line = text.count("\n", 0, problem.position) + 1
    column = problem.position - text.rfind("\n", 0, problem.position)
    return ParseFailure(excerpt, f"{problem.reason} (line {line}, column {column})")


def _calls_in(value: Any) -> list[ToolCall]:
    """Return the calls that a JSON value stands for; raise `_Broken` if it is no call and no batch of calls."""
    if isinstance(value, list):
        return _batch(value, {}, "the array")
    if not isinstance(value, dict):
        raise _Broken("the JSON value is not an object", rank=1)
    if not isinstance(value.get("tool"), str):
        for key in _BATCH_KEYS:
            if isinstance(value.get(key), list):
                return _batch(value[key], value, repr(key))
    return [_call(value)]


def _batch(items: list[Any], about: Mapping[str, Any], name: str) -> list[ToolCall]:
    if not items:
        raise _Broken(f"{name} is empty", rank=2)
    calls = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise _Broken(f"item {number} of {name} is not an object", rank=1)
        try:
            calls.append(_call(item))
        except _Broken as error:
            raise _Broken(f"item {number} of {name}: {error.reason}", rank=2) from None
    return _hand_down(about, calls)


def _hand_down(about: Mapping[str, Any], calls: list[ToolCall]) -> list[ToolCall]:
    """Give what a batch says about itself to the first call that does not say it."""
    said: dict[str, Any] = {"reasoning": _first_string(about, _REASONING_KEYS), "metadata": _metadata(about)}
    for field, value in said.items():
        index = next((i for i, call in enumerate(calls) if not getattr(call, field)), None)
        if value and index is not None:
            calls[index] = replace(calls[index], **{field: value})
    return calls


def _call(item: dict[str, Any]) -> ToolCall:
    inner = item.get("function")
    if isinstance(inner, dict):  # OpenAI: {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}
        item = {key: value for key, value in item.items() if key in _ABOUT_KEYS} | inner
    for key in _NAME_KEYS:
        name = item.get(key)
        if isinstance(name, str) and (name := name.strip()):
            reasoning, call_id = _first_string(item, _REASONING_KEYS), _first_string(item, _ID_KEYS)
            return ToolCall(name, _args(item, key), reasoning, call_id, _metadata(item))
    raise _Broken("the object does not name a tool under 'tool'", rank=2)


def _first_string(item: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    for key in keys:
        if isinstance(value := item.get(key), str) and value:
            return value
    return ""


def _metadata(item: Mapping[str, Any]) -> dict[str, Any]:
    theory = _first_string(item, ("theory",))
    return {"theory": theory} if theory else {}


def _args(item: dict[str, Any], name_key: str) -> dict[str, Any]:
    for key in _ARGS_KEYS:
        if key in item:
            return _named_args(item[key])
    taken = {name_key, *_REASONING_KEYS, "theory", *(key for key in _ID_KEYS if isinstance(item.get(key), str))}
    return {key: value for key, value in item.items() if key not in taken}


def _named_args(value: Any) -> dict[str, Any]:
    """Return the arguments; a string may hold an object (OpenAI's `arguments` are such strings)."""
    if isinstance(value, dict):
        return value
    if value is None or value == "":
        return {}
    if isinstance(value, str) and (text := value.strip()).startswith("{") and text.endswith("}"):
        with suppress(_Broken):
            reader = _Reader(text, 0)
            if isinstance(decoded := reader.read(), dict) and reader.position == len(text):
                return decoded
    return {RAW_ARG: value}


_START = re.compile(r"[{\[]")
_NOT_NAME = re.compile(r"[^\w.:/-]")
_THOUGHT = re.compile(r"\s*<(think|thinking)>.*?</\1>", re.DOTALL)
_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\Z)|[{}\[\]]', re.DOTALL)


class _Broken(Exception):
    """Why something is not a call: 0 nothing there, 1 not JSON, 2 JSON without a tool's name, 3 a call cut or garbled.

    `position` is an index into the text, -1 where the whole text is meant.
    """

    def __init__(self, reason: str, position: int = -1, rank: int = 1) -> None:
        self.reason, self.position, self.rank = reason, position, rank


class _Search:
    """Tries every `{` and `[` of a text in turn; `found` holds the calls of each candidate, `problem` the worst news.

    A start that fails is tried again from the next bracket, which adversarial input makes quadratic; `fuel`, in
    characters read, ends that.
    """

    def __init__(self, text: str, known: Collection[str]) -> None:
        self.text = text
        self.known = known
        self.found: list[list[ToolCall]] = []
        self.problem = _Broken("there is no JSON object in it", rank=0)
        self.fuel = 2 * len(text) + 100_000

    def run(self) -> None:
        thought = _THOUGHT.match(self.text)
        position = thought.end() if thought else 0
        while self.fuel > 0 and (start := _START.search(self.text, position)):
            position = self._try(start.start())

    def _try(self, start: int) -> int:
        """Look for calls at `start`; return where the search goes on."""
        reader = _Reader(self.text, start)
        try:
            value = reader.read()
        except _Broken as error:
            resume = self._after_broken(reader, error, start)
        else:
            resume = reader.position
            self._collect(value, start)
        self.fuel -= max(reader.position, resume) - start + _ATTEMPT_COST
        return resume

    def _collect(self, value: Any, start: int) -> None:
        calls: list[ToolCall] = []
        try:
            calls = _calls_in(value)
        except _Broken as error:
            self._note(_Broken(error.reason, start, error.rank))
        if isinstance(value, dict) and not any(call.tool in self.known for call in calls):
            name, parenthesis = self._name_before(start)
            if name in self.known and (parenthesis or not calls):
                calls = [ToolCall(name, value)]
        if calls:
            self.found.append(calls)

    def _name_before(self, start: int) -> tuple[str, bool]:
        """Return the word before `start`, and whether a parenthesis stands between: `search({`, `search {`."""
        head = self.text[max(start - 100, 0) : start].rstrip() if self.known else ""
        return _NOT_NAME.split(head.removesuffix("(").rstrip())[-1], head.endswith("(")

    def _after_broken(self, reader: _Reader, error: _Broken, start: int) -> int:
        if isinstance(reader.root, dict) and not _CALL_KEYS.isdisjoint((*reader.root, *reader.keys)):
            self._note(_Broken(error.reason, error.position, rank=3))
            # what looks like a call inside the arguments of a garbled call must not run in its place
            return self._end_of_brackets(error.position, len(reader.open))
        self._note(error)
        return reader.position if len(reader.open) == _MAX_DEPTH else start + 1

    def _end_of_brackets(self, position: int, depth: int) -> int:
        """Return where `depth` brackets that are open at `position` are closed."""
        for match in _BRACKET.finditer(self.text, position):
            depth += (match[0] in "{[") - (match[0] in "}]")
            if depth == 0:
                return match.end()
        return len(self.text)

    def _note(self, problem: _Broken) -> None:
        if problem.rank > self.problem.rank:
            self.problem = problem


_TOKEN = re.compile(
    r"""
    (?: [\s\ufeff] | //[^\n]*+ | \#[^\n]*+ )*+
    (?:
        (?P<end> \Z | ``` | </ )
      | (?P<mark> [{}\[\],:] )
      | (?P<text> "(?:[^"\\]++|\\.)*+" | '(?:[^'\\]++|\\.)*+'
                | [“”](?:[^“”\\]++|\\.)*+[“”] | [‘’](?:[^‘’\\]++|\\.)*+[‘’] )
      | (?P<word> [\w.+$-]++ )
      | (?P<junk> . )
    )
    """,
    re.VERBOSE | re.DOTALL,
)
_QUOTES = "\"'“”‘’"
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NO_JSON = {word: word for word in ("NaN", "Infinity", "-Infinity")}
_LITERALS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None, **_NO_JSON}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", **{c: c for c in "\"'\\/"}}

_Container: TypeAlias = dict[str, Any] | list[Any]
_Expect: TypeAlias = Callable[[str, str], "_Expect"]


class _Reader:
    """Reads the object or array at `start`, with a stack of its own, each character once.

    `open` holds the containers not closed yet, outermost first; `position` is behind what was read.
    """

    def __init__(self, text: str, start: int) -> None:
        self.text = text
        self.position = self.token_start = start
        self.root: _Container = {}
        self.open: list[_Container] = []
        self.keys: list[str] = []

    def read(self) -> _Container:
        """Return the value; raise `_Broken` if it cannot be understood."""
        expect: _Expect = self._value
        for match in _TOKEN.finditer(self.text, self.position):
            kind = match.lastgroup or ""
            self.token_start, self.position = match.span(kind)
            expect = expect(kind, match[kind])
            if not self.open:
                break
        return self.root

    def _value(self, kind: str, lexeme: str) -> _Expect:
        if kind == "mark" and lexeme in "{[":
            return self._opened({} if lexeme == "{" else [])
        if lexeme == "]" and isinstance(self.open[-1], list):
            return self._closed(lexeme)
        if kind == "text":
            return self._added(_unescape(lexeme[1:-1]))
        if kind == "word":
            return self._added(self._literal(lexeme))
        raise self._unexpected(kind, lexeme, "a value")

    def _key(self, kind: str, lexeme: str) -> _Expect:
        if lexeme == "}":
            return self._closed(lexeme)
        if kind not in ("text", "word"):
            raise self._unexpected(kind, lexeme, "a key")
        self.keys.append(_unescape(lexeme[1:-1]) if kind == "text" else lexeme)
        return self._colon

    def _colon(self, kind: str, lexeme: str) -> _Expect:
        if lexeme != ":":
            raise self._unexpected(kind, lexeme, "':'")
        return self._value

    def _comma_or_end(self, kind: str, lexeme: str) -> _Expect:
        if lexeme == ",":
            return self._key if isinstance(self.open[-1], dict) else self._value
        if kind == "end":  # only brackets are missing: everything that was begun is complete
            self.open.clear()
            return self._value
        return self._closed(lexeme, kind)

    def _opened(self, container: _Container) -> _Expect:
        if len(self.open) == _MAX_DEPTH:
            raise _Broken(f"the JSON is nested deeper than {_MAX_DEPTH} levels", self.token_start)
        if self.open:
            self._added(container)
        else:
            self.root = container
        self.open.append(container)
        return self._key if isinstance(container, dict) else self._value

    def _closed(self, lexeme: str, kind: str = "mark") -> _Expect:
        closer = "}" if isinstance(self.open[-1], dict) else "]"
        if lexeme != closer:
            raise self._unexpected(kind, lexeme, f"',' or '{closer}'")
        self.open.pop()
        return self._comma_or_end

    def _added(self, value: Any) -> _Expect:
        if isinstance(top := self.open[-1], dict):
            top[self.keys.pop()] = value
        else:
            top.append(value)
        return self._comma_or_end

    def _literal(self, word: str) -> Any:
        """Return what an unquoted word means; numbers that Python or JSON cannot hold stay text."""
        if word in _LITERALS:
            return _LITERALS[word]
        match = _NUMBER.fullmatch(word)
        if match is None:
            raise self._unexpected("word", word, "a value")
        if match.lastindex:
            return float(word) if math.isfinite(float(word)) else word
        try:
            return int(word)
        except ValueError:  # more digits than sys.get_int_max_str_digits()
            return word

    def _unexpected(self, kind: str, lexeme: str, wanted: str) -> _Broken:
        if kind == "junk" and lexeme in _QUOTES:
            self.position = len(self.text)  # that is how far the look for its end went
            return _Broken("a string is not closed", self.token_start)
        if kind == "end":
            return _Broken(f"the JSON ends where {wanted} should follow", self.token_start)
        return _Broken(f"expected {wanted}, found {cut(lexeme, 40)!r}", self.token_start)


def _unescape(text: str) -> str:
    """Decode the escapes of JSON and Python; unknown ones, as in a regular expression, stay as written."""
    return _without_lone_surrogates(_ESCAPE.sub(_unescape_one, text)) if "\\" in text else text


def _unescape_one(match: re.Match[str]) -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPES.get(code, match[0])


def _without_lone_surrogates(text: str) -> str:
    """Join surrogate pairs, and replace halves, which no UTF-8 file could hold."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
