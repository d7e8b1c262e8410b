"""What commands tell about a run: its steps and notes in order, its totals, the runs it started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from looplet.messages import encode
from looplet.scope import final_output_of
from looplet.telemetry import semconv
from looplet.telemetry.otlp_decode import EventRecord
from looplet.telemetry.reader import SpanNode
from looplet.telemetry.runs import INTERRUPTED, RunView
from looplet.types import Step


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that happened in a run: a step, or a note about a hook, a retry, a reply."""

    turn: int
    """0 outside of turns, and in traces that do not tell"""
    at_ns: int
    step: Step | None = None
    note: str = ""
    is_bad: bool = False


def rows_of(run: RunView) -> list[Row]:
    """Return steps and notes in the order in which they happened."""
    begun = step_times(run)
    rows = [Row(*begun.get(step.number, (0, run.root.record.start_ns)), step=step) for step in run.steps]
    for node in run.spans:
        rows += [
            Row(node.turn_number, event.time_ns, note=words, is_bad=semconv.ERROR_TYPE in event.attributes)
            for event in node.events
            if (words := words_of(event))
        ]
        if semconv.COMPACT_REASON in node.attributes:
            rows.append(Row(node.turn_number, node.record.start_ns, note=compaction(node), is_bad=node.is_error))
        if node.is_error and not run.is_ours and node.attributes.get(semconv.OPERATION_NAME) == semconv.CHAT:
            words = f"{node.name} failed: {reason_of(node)}"  # in a run of ours, a step says so
            rows.append(Row(node.turn_number, node.record.end_ns, note=words, is_bad=True))
    return sorted(rows, key=lambda row: row.at_ns)


def compaction(node: SpanNode) -> str:
    """Return a line about what a compaction did."""
    facts = node.attributes
    why = f"compaction ({facts[semconv.COMPACT_REASON]})"
    if node.is_error:
        return f"{why} failed: {reason_of(node)}"
    if not facts.get(semconv.COMPACT_COMPACTED):
        return f"{why}: nothing could go"
    messages = f"{facts.get(semconv.COMPACT_MESSAGES_BEFORE, '?')} → {facts.get(semconv.COMPACT_MESSAGES_AFTER, '?')}"
    tokens = f"{facts.get(semconv.COMPACT_TOKENS_BEFORE, '?')} → {facts.get(semconv.COMPACT_TOKENS_AFTER, '?')}"
    return f"{why}: {messages} messages, about {tokens} tokens"


def answer_of(run: RunView) -> str:
    """Return what the run came to, in words: what `done` was given, else, of a foreign run, the last answer."""
    output = final_output_of(run.steps, run.stop_reason)
    if not output:
        last = run.answer(run.chats[-1]) if run.chats and not run.is_ours else []
        return " ".join(message.text for message in last).strip()
    answer = output.get("answer")
    return answer if isinstance(answer, str) and len(output) == 1 else encode(output).decode()


def step_times(run: RunView) -> dict[int, tuple[int, int]]:
    """Return step number → its turn and when it began, in nanoseconds."""
    times: dict[int, tuple[int, int]] = {}
    for place, node in enumerate(filter(_is_tool_call, run.own), 1):
        times[int(node.attributes.get(semconv.STEP_NUMBER, place))] = node.turn_number, node.record.start_ns
    for node in run.spans:
        for event in node.events:
            if event.name == semconv.EVENT_STEP:
                number = int(event.attributes.get(semconv.STEP_NUMBER, 0))
                times.setdefault(number, (node.turn_number, event.time_ns))
    return times


def _is_tool_call(node: SpanNode) -> bool:
    return semconv.EXECUTE_TOOL in (node.attributes.get(semconv.OPERATION_NAME), node.name.split(" ")[0])


def words_of(event: EventRecord) -> str:
    """Return a line about an event; an empty one for those that other lines tell, and for those of others."""
    data = event.attributes
    hook = f"hook {data.get(semconv.HOOK_NAME, '')}.{data.get(semconv.HOOK_METHOD, '')}"
    match event.name:
        case semconv.EVENT_HOOK:
            said = data.get(semconv.HOOK_DECISION) or data.get(semconv.ERROR_TYPE, "")
            return f"{hook}: {said}" + (f" — {data[semconv.HOOK_REASON]}" if semconv.HOOK_REASON in data else "")
        case semconv.EVENT_HOOK_SKIPPED:
            return f"{hook} was not asked: the run was left in a hurry"
        case semconv.EVENT_PARSE_FAILURE:
            return f"no tool call in the reply (attempt {data.get(semconv.PARSE_ATTEMPT, '?')})"
        case semconv.EVENT_CALL_DROPPED:
            return f"call {data.get(semconv.TOOL_CALL_ID, '')} was not run"
        case semconv.EVENT_APPROVAL_REQUESTED:
            asked = data.get(semconv.APPROVAL_QUESTION)
            return f"approval of {data.get(semconv.TOOL_NAME, 'a call')} asked for" + (f": {asked}" if asked else "")
        case semconv.EVENT_APPROVAL_ANSWERED:
            return f"approval of {data.get(semconv.TOOL_CALL_ID, 'a call')}: {data.get(semconv.APPROVAL_VERDICT, '?')}"
        case semconv.EVENT_STEP:
            return ""
    return _plain_words(event) if event.name.startswith("looplet.") else ""


def _plain_words(event: EventRecord) -> str:
    rest = ", ".join(f"{key.removeprefix('looplet.')}={value}" for key, value in event.attributes.items())
    return ": ".join(filter(None, (event.name.removeprefix("looplet."), rest)))


def reason_of(node: SpanNode) -> str:
    """Return why a span failed."""
    kind = str(node.attributes.get(semconv.ERROR_TYPE, "error"))
    return f"{kind} — {node.record.status_message}" if node.record.status_message else kind


def missing_of(run: RunView) -> list[str]:
    """Return what the file does not tell of a run, in sentences."""
    said = []
    if run.stop_reason == INTERRUPTED:
        said.append("interrupted: the end of the run is not in the file; it was killed, or it still goes on")
    said += [
        f"{call.tool} ({call.call_id}) began and has no end: whether it had its effect is not known"
        for call in run.unfinished_calls
    ]
    if made_up := sum(node.synthetic for node in run.spans):
        said.append(f"{made_up} of {len(run.spans)} spans are missing and were inferred from the others")
    return said


# --- totals -----------------------------------------------------------------------------------------------------------


def models_of(run: RunView) -> list[str]:
    """Return the names of the models that were asked."""
    keys = (semconv.RESPONSE_MODEL, semconv.REQUEST_MODEL)
    named = [next((str(chat.attributes[key]) for key in keys if chat.attributes.get(key)), "") for chat in run.chats]
    return list(dict.fromkeys(filter(None, named)))


def turns_of(run: RunView) -> int:
    """Return the number of turns; where the trace does not number them, of model calls."""
    return len({node.turn_number for node in run.spans if node.turn_number}) or len(run.chats)


def unreported(run: RunView) -> int:
    """Return how many model calls told no usage."""
    return sum(semconv.INPUT_TOKENS not in chat.attributes for chat in run.chats)


def unpriced(run: RunView) -> int:
    """Return how many model calls have no known price."""
    return sum(semconv.COST_USD not in chat.attributes for chat in run.chats)


def started(run: RunView) -> datetime:
    """Return when the run began."""
    return datetime.fromtimestamp(run.root.record.start_ns / 1e9, UTC)


# --- runs and spans as trees ------------------------------------------------------------------------------------------


def parent_of(run: RunView) -> tuple[str, int]:
    """Return the id of the run above and the step that started this one; `("", 0)` for a run on its own."""
    step = 0
    for node in run.root.ancestors():
        step = step or int(node.attributes.get(semconv.STEP_NUMBER, 0))
        if node.run_id and node.run_id != run.run_id:
            return node.run_id, step
    return str(run.manifest.get(semconv.PARENT_RUN_ID, "")), step


def families(runs: Iterable[RunView]) -> dict[str, list[RunView]]:
    """Return run id → the runs that it started; `""` → those whose parent is not among the runs."""
    runs = list(runs)
    parents = {run.run_id: parent_of(run)[0] for run in runs}
    found: dict[str, list[RunView]] = {"": []}
    for run in runs:
        parent = parents[run.run_id]
        is_below = parent in parents and not _starts_itself(run.run_id, parents)
        found.setdefault(parent if is_below else "", []).append(run)
    return found


def _starts_itself(run_id: str, parents: Mapping[str, str]) -> bool:
    """Tell whether a run is among those above it, as only a damaged file has it."""
    above, seen = parents[run_id], set()
    while above in parents and above not in seen:
        if above == run_id:
            return True
        seen.add(above)
        above = parents[above]
    return False


def roots_of(run: RunView) -> list[SpanNode]:
    """Return the spans of a run that are inside no other of it."""
    own = set(map(id, run.spans))
    return [
        node for node in run.spans if id(node.parent) not in own and not any(id(n) in own for n in node.ancestors())
    ]


def children_in(run: RunView, node: SpanNode) -> list[SpanNode]:
    """Return a span's children without those of sub-runs."""
    return [child for child in node.children if child.run_id in ("", run.run_id)]
