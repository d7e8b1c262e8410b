"""The readable folder around a trace: rendered from it, for people and for `diff`.

trajectory.json          the run as one document, with ids and times
steps/step_01.json       each step; the same for two identical runs
call_00_prompt.txt       what a model call was sent; from the 51st on, what was new in it ...
call_00_response.txt     ... and what it answered; the same for two identical runs
manifest.jsonl           one line for each model call, with ids and times
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import msgspec

from looplet.prompt import render
from looplet.telemetry import semconv
from looplet.telemetry.nodes import AGENT, SpanNode
from looplet.telemetry.reader import Trace
from looplet.telemetry.runs import RunView, usage_of
from looplet.types import Step

WHOLE_PROMPTS: Final = 50
"""how many prompts are written whole: each is longer than the one before, and the trace has them all"""

_OURS: Final = re.compile(r"(trajectory\.json|manifest\.jsonl|call_\d+_(prompt|response)\.txt|steps/step_\d+\.json)$")


def write_folder(trace_file: Path) -> None:
    """Render the folder of the first top-level run in a trace."""
    trace = Trace.load(trace_file)
    if not trace.runs:
        return
    folder, run = trace_file.parent, trace.runs[0]
    clear_folder(folder)
    (folder / "steps").mkdir(exist_ok=True)
    _write(folder / "trajectory.json", _trajectory(run))
    for step in run.steps:
        _write(folder / "steps" / f"step_{step.number:02d}.json", _step(step))
    lines = []
    for number, chat in enumerate(run.chats):
        (folder / f"call_{number:02d}_prompt.txt").write_text(_prompt(run, chat, number), encoding="utf-8")
        (folder / f"call_{number:02d}_response.txt").write_text(_response(run, chat, number), encoding="utf-8")
        lines.append(msgspec.json.encode(_call(chat, number)))
    (folder / "manifest.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def clear_folder(folder: Path) -> None:
    """Remove the derived files of an earlier run, and nothing else."""
    for path in [*folder.glob("*"), *folder.glob("steps/*")]:
        if path.is_file() and _OURS.match(path.relative_to(folder).as_posix()):
            path.unlink()


def _write(path: Path, value: Any) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _trajectory(run: RunView) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "trace_id": run.trace_id,
        "agent": run.agent,
        "started_at": run.root.record.start_ns / 1e9,
        "ended_at": run.last.record.end_ns / 1e9,
        "task": run.task,
        "termination_reason": run.stop_reason,
        "step_count": len(run.steps),
        "llm_call_count": len(run.chats),
        "usage": {"input_tokens": run.usage.input_tokens, "output_tokens": run.usage.output_tokens,
                  "cost_usd": run.usage.cost_usd},
        "steps": [{**_step(step), "duration_ms": step.tool_result.duration_ms} for step in run.steps],
        "llm_calls": [_call(chat, number) for number, chat in enumerate(run.chats)],
    }  # fmt: skip


def _step(step: Step) -> dict[str, Any]:
    result = step.tool_result.to_dict()
    del result["duration_ms"]
    pretty = step.pretty()
    if step.tool_result.duration_ms > 0:
        pretty = pretty.rpartition(" [")[0]
    return {"step_num": step.number, "pretty": pretty, "tool_call": step.tool_call.to_dict(), "tool_result": result}


def _call(chat: SpanNode, number: int) -> dict[str, Any]:
    usage, told = usage_of(chat), chat.attributes
    return {
        "index": number,
        "span_id": chat.span_id,
        "timestamp": chat.record.start_ns / 1e9,
        "duration_ms": chat.duration_s * 1000,
        "model": told.get(semconv.RESPONSE_MODEL) or told.get(semconv.REQUEST_MODEL, ""),
        "method": told.get(semconv.PROTOCOL, ""),
        "purpose": told.get(semconv.CHAT_PURPOSE, AGENT),
        "turn": chat.turn_number,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_usd": usage.cost_usd,
        "error": told.get(semconv.ERROR_TYPE),
    }


def _prompt(run: RunView, chat: SpanNode, number: int) -> str:
    told = chat.attributes
    purpose = f" purpose={told[semconv.CHAT_PURPOSE]}" if semconv.CHAT_PURPOSE in told else ""
    head = f"# call {number:02d} — method={told.get(semconv.PROTOCOL, '')} turn={chat.turn_number}{purpose}\n"
    if number < WHOLE_PROMPTS:
        return f"{head}{render(run.request(chat))}\n"
    whole = f"run = Trace.load('trace.jsonl').runs[0]; render(run.request(run.chats[{number}]))"
    new = render(run.new_messages(chat), told.get(semconv.INPUT_FIRST, 0))
    return f"{head}# only what is new, under the numbers of the run's log; for the whole prompt: {whole}\n{new}\n"


def _response(run: RunView, chat: SpanNode, number: int) -> str:
    lines = [f"# call {number:02d} — error={chat.attributes.get(semconv.ERROR_TYPE, 'no')}"]
    if said := run.answer(chat):
        lines.append(render(said))
    elif chat.record.status_message:
        lines.append(chat.record.status_message)
    return "\n".join(lines) + "\n"
