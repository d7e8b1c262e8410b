"""Reading runs with several segments, several batches in a turn, and model calls for several purposes."""

from __future__ import annotations

import pytest
from handmade import RUN_ID, TRACE_ID, Spans, step_event

from looplet import (
    ApprovalHook,
    EvalContext,
    HookDecision,
    ProvenanceSink,
    Reply,
    ToolCall,
    ToolContext,
    Trace,
    Usage,
    composable_loop,
    tool,
    tools_from,
)
from looplet.evals.context import load_contexts
from looplet.telemetry import semconv
from looplet.testing import ScriptedBackend

PAUSED = "waiting_for_approval"


def segments(shift: int = 0, reason: str = "done") -> Spans:
    """Return a run that makes a step, pauses in its second turn, and goes on there; `shift` moves its second clock."""
    spans = Spans()
    spans.add(semconv.START, 2, 1, (1, 1), {semconv.TASK: '{"goal": "g"}', semconv.FORMAT: "1"})
    turn(spans, 10, 1, 10, number=1, step=1, tokens=5)
    spans.chat(21, 20, (31, 32), 2, tokens=7, new="ask", said="do it")
    spans.phase(semconv.PRE_DISPATCH, 22, 20, (33, 34), 2)
    spans.turn(20, 1, (30, 35), 2)
    spans.add(semconv.END, 3, 1, (36, 37), {semconv.SESSION_LOG: "notes of the first"})
    spans.root(1, (0, 40), reason=PAUSED)
    spans.add(semconv.START, 102, 101, (1001 + shift, 1001 + shift), {semconv.TASK: '{"goal": "g"}'})
    held(spans, 120, 101, 1010 + shift)
    turn(spans, 130, 101, 1030 + shift, number=3, step=3, tokens=9)
    spans.add(semconv.END, 103, 101, (1060 + shift, 1061 + shift))
    spans.root(101, (1000 + shift, 1070 + shift), segment=2, reason=reason, parent=1)
    return spans


def turn(spans: Spans, base: int, parent: int, at: int, *, number: int, step: int, tokens: int) -> None:
    spans.chat(base + 1, base, (at + 1, at + 2), number, tokens=tokens, new=f"new {number}", said=f"said {number}")
    batch(spans, base + 2, base, at + 3, number, step)
    spans.turn(base, parent, (at, at + 9), number)


def batch(spans: Spans, base: int, parent: int, at: int, number: int, *steps: int) -> None:
    """Add a dispatch of some calls and its review: five nanoseconds, ids from `base`."""
    for place, step in enumerate(steps):
        spans.tool(base + 2 + place, base, (at + 1, at + 2), number, step)
    spans.phase(semconv.DISPATCH, base, parent, (at, at + 3), number)
    spans.phase(semconv.POST_DISPATCH, base + 1, parent, (at + 4, at + 5), number)


def held(spans: Spans, base: int, parent: int, at: int) -> None:
    """Add the rest of turn 2: its calls, without a request."""
    batch(spans, base + 2, base, at + 1, 2, 2)
    spans.turn(base, parent, (at, at + 9), 2)


def tokens_of(view) -> list[int]:
    return [step.usage.input_tokens for step in view.steps]


# --- segments ---------------------------------------------------------------------------------------------------------


def test_a_run_of_two_segments_is_one_run(tmp_path):
    view = segments().view(tmp_path)
    assert (view.run_id, view.trace_id, view.agent) == (RUN_ID, TRACE_ID, "hand")
    assert [int(root.span_id, 16) for root in view.segments] == [1, 101]
    assert (view.root, view.last) == (view.segments[0], view.segments[1])
    assert view.last.parent is view.root
    assert view.stop_reason == "done"
    assert view.task == {"goal": "g"}
    assert view.manifest[semconv.FORMAT] == "1"
    assert view.usage.input_tokens == 21
    assert [step.number for step in view.steps] == [1, 2, 3]
    assert view.duration_s == 1070e-9
    assert not any(node.synthetic for node in view.spans)


def test_what_a_paused_turn_used_goes_to_the_step_that_the_next_segment_makes(tmp_path):
    view = segments().view(tmp_path)
    assert tokens_of(view) == [5, 7, 9]
    assert [step.prompt.partition("\n")[2] for step in view.steps] == ["new 1", "ask", "new 3"]


@pytest.mark.parametrize("shift", [-900, -1000, -500], ids=str)
def test_segments_are_told_in_order_although_their_clocks_differ(tmp_path, shift):
    view, straight = segments(shift).view(tmp_path), segments().view(tmp_path)
    assert view.steps == straight.steps
    assert [message.text for message in view.conversation()] == ["new 3", "said 3"]
    assert (view.stop_reason, view.session_log_text) == ("done", straight.session_log_text)


def test_a_paused_run_waits(tmp_path):
    spans = segments()
    spans.lines = [line for line in spans.lines if int(line[1]["spanId"], 16) < 100]
    view = spans.view(tmp_path)
    assert (view.stop_reason, len(view.segments), len(view.steps)) == (PAUSED, 1, 1)
    assert view.session_log_text == "notes of the first"


def test_notes_of_an_earlier_segment_do_not_stand_for_the_last(tmp_path):
    log = segments().view(tmp_path).session_log_text
    assert [line.split()[0] for line in log.splitlines()[2:]] == ["S1:", "S2:", "S3:"]


def test_a_run_whose_last_segment_was_killed_is_interrupted(tmp_path):
    view = segments().without(101, 103, 130).view(tmp_path)
    assert view.stop_reason == "interrupted"
    assert [root.synthetic for root in view.segments] == [False, True]
    assert view.last.parent is view.root
    assert view.last.attributes[semconv.SEGMENT_NUMBER] == 2
    assert tokens_of(view) == [5, 7, 9]
    places = {int(n.span_id, 16): n.parent and int(n.parent.span_id, 16) for n in view.spans}
    assert (places[102], places[120], places[130], places[131]) == (101, 101, 101, 130)


def test_a_segment_that_goes_on_after_a_kill_has_the_lost_one_above_it(tmp_path):
    view = segments().without(1, 3, 20).view(tmp_path)
    assert [root.synthetic for root in view.segments] == [True, False]
    assert (view.stop_reason, view.task) == ("done", {"goal": "g"})
    assert tokens_of(view) == [5, 7, 9]
    (lost,) = (node for node in view.spans if node.synthetic and node.name == semconv.TURN)
    assert (lost.parent, lost.turn_number) == (view.root, 2)
    assert [int(child.span_id, 16) for child in lost.children] == [21, 22]


def test_segments_are_one_top_level_run(tmp_path):
    file = segments().write(tmp_path)
    ((label, context),) = load_contexts(file)
    assert (label, context.stop_reason, context.step_count) == ("trace.jsonl", "done", 3)
    assert EvalContext.from_trace(file) == context
    (view,) = Trace.load(file).runs
    assert EvalContext.from_view(view) == context


def test_a_call_that_a_later_segment_finished_is_not_unfinished(tmp_path):
    spans = segments()
    mark = {semconv.TOOL_NAME: "count", semconv.TOOL_CALL_ID: "call_2"}
    spans.add(semconv.TOOL_START, 50, 20, (34, 34), {**mark, semconv.TURN_NUMBER: 2})
    spans.add(semconv.TOOL_START, 51, 20, (34, 34), {**mark, semconv.TOOL_CALL_ID: "lost", semconv.TURN_NUMBER: 2})
    assert [call.call_id for call in spans.view(tmp_path).unfinished_calls] == ["lost"]


class AsksAHuman:
    def check_permission(self, call, state):
        return HookDecision(permission="ask") if call.tool == "delete" else None


@pytest.mark.parametrize("source", ["run", "file"])
def test_a_real_run_that_paused_twice_says_the_same_as_its_file(tmp_path, source):
    @tool
    def ask(text: str, ctx: ToolContext) -> str:
        """Ask the model."""
        return ctx.llm.generate(text)

    @tool
    def delete(name: str) -> str:
        """Delete something."""
        return f"deleted {name}"

    def reply(tokens, *calls):
        return Reply("said", tuple(ToolCall(name, dict(args)) for name, args in calls), Usage(tokens, 1))

    replies = [
        reply(1, ("ask", {"text": "a"}), ("delete", {"name": "a"}), ("ask", {"text": "b"})),
        *[reply(10), reply(100)],
        reply(1000, ("delete", {"name": "b"}), ("ask", {"text": "c"})),
        *[reply(10_000), reply(100_000, ("done", {"answer": "x"}))],
    ]
    rest: dict = {"task": {"goal": "g"}}
    llm = ScriptedBackend(replies)
    for paused in (True, True, False):
        tools = tools_from([ask, delete], include_done=True)
        hooks = [AsksAHuman(), ApprovalHook(), ProvenanceSink(tmp_path)]
        run = composable_loop(llm, tools=tools, hooks=hooks, **rest)
        list(run)
        assert run.stop_reason == ("waiting_for_approval" if paused else "done")
        assert EvalContext.from_run(run) == EvalContext.from_trace(tmp_path)
        rest = {"resume": run if source == "run" else tmp_path, "verdict": "approve"}
    (view,) = Trace.load(tmp_path).runs
    assert [root.attributes[semconv.SEGMENT_NUMBER] for root in view.segments] == [1, 2, 3]
    assert tokens_of(view) == [11, 0, 100, 1000, 10_000, 100_000]
    assert view.last.attributes[semconv.RUN_INPUT_TOKENS] == view.usage.input_tokens == 111_111
    assert len(view.request(view.agent_chats[-1])) == len(view.conversation()) - 1


# --- whose usage it is ------------------------------------------------------------------------------------------------


def one_run(spans: Spans, tmp_path, reason: str = "done"):
    spans.root(1, (0, 1000), reason=reason)
    return spans.view(tmp_path)


def test_a_chat_inside_a_tool_counts_for_the_batch_it_was_made_in(tmp_path):
    spans = Spans()
    spans.chat(11, 10, (11, 12), 1, tokens=1, new="first")
    spans.chat(31, 22, (21, 22), 1, tokens=10, new="by the tool of the first batch", purpose="tool")
    batch(spans, 20, 10, 20, 1, 1)
    spans.chat(51, 42, (41, 42), 1, tokens=100, new="by the tools of the second batch", purpose="tool")
    batch(spans, 40, 10, 40, 1, 2, 3)
    spans.chat(61, 60, (55, 56), 1, tokens=1000, new="by nobody's step", purpose="judge")
    spans.turn(10, 1, (10, 60), 1)
    turn(spans, 70, 1, 70, number=2, step=4, tokens=10000)
    view = one_run(spans, tmp_path)
    assert tokens_of(view) == [11, 100, 0, 11000]
    assert view.usage.input_tokens == 11111
    assert [bool(step.prompt) for step in view.steps] == [True, False, False, True]


def test_steps_told_by_events_take_what_ended_before_them(tmp_path):
    spans = Spans()
    spans.chat(11, 10, (11, 12), 1, tokens=1, new="first")
    spans.phase(semconv.POST_DISPATCH, 12, 10, (14, 20), 1, step_event(1, 15), step_event(2, 18))
    spans.chat(13, 99, (21, 22), 1, tokens=10, new="in between", purpose="tool")
    batch(spans, 20, 10, 23, 1, 3)
    spans.turn(10, 1, (10, 40), 1)
    spans.chat(51, 50, (51, 52), 2, tokens=100, new="fails", failed="no route")
    spans.turn(50, 1, (50, 60), 2, step_event(4, 55, "__llm_error__"))
    view = one_run(spans, tmp_path, "llm_error")
    assert tokens_of(view) == [1, 0, 10, 100]
    assert [step.tool_result.error for step in view.steps] == ["refused", "refused", None, "refused"]


def test_a_step_is_made_before_those_that_come_after_it(tmp_path):
    spans = Spans()
    spans.chat(11, 10, (11, 12), 1, tokens=1, new="first")
    spans.tool(22, 20, (21, 22), 1, 1)
    spans.phase(semconv.DISPATCH, 20, 10, (20, 23), 1)
    spans.chat(31, 30, (26, 27), 1, tokens=10, new="while the second one is looked at", purpose="judge")
    spans.phase(semconv.POST_DISPATCH, 30, 10, (24, 30), 1, step_event(2, 25))
    batch(spans, 40, 10, 40, 1, 3)
    spans.turn(10, 1, (10, 50), 1)
    assert tokens_of(one_run(spans, tmp_path)) == [1, 0, 10]


def test_turns_without_a_step_leave_their_usage_to_the_next_one(tmp_path):
    spans = Spans()
    spans.chat(11, 10, (11, 12), 1, tokens=1, new="no call in the reply")
    spans.turn(10, 1, (10, 15), 1)
    turn(spans, 20, 1, 20, number=2, step=1, tokens=10)
    view = one_run(spans, tmp_path)
    assert tokens_of(view) == [11]
    assert view.steps[0].prompt.endswith("new 2")


def test_a_tool_whose_turn_was_killed_keeps_its_step_and_usage(tmp_path):
    spans = Spans()
    spans.chat(11, 10, (11, 12), 1, tokens=1, new="first")
    spans.tool(22, 20, (21, 22), 1, 1)
    view = spans.view(tmp_path)
    assert tokens_of(view) == [1]
    (tool,) = (node for node in view.spans if node.operation == semconv.EXECUTE_TOOL)
    assert [above.name for above in tool.ancestors()][:2] == [semconv.DISPATCH, semconv.TURN]


# --- model calls for several purposes ---------------------------------------------------------------------------------


def test_only_the_loops_own_requests_are_the_conversation(tmp_path):
    spans = Spans()
    spans.chat(12, 11, (11, 12), 1, tokens=1, new="sum up", said="summed up", purpose="compaction")
    spans.phase(semconv.PRE_PROMPT, 11, 10, (10, 13), 1)
    spans.chat(13, 10, (14, 15), 1, tokens=10, new="what now", said="this")
    batch(spans, 20, 10, 20, 1, 1)
    spans.turn(10, 1, (10, 30), 1)
    spans.chat(41, 40, (41, 42), tokens=100, new="a hook asks at the end", said="an answer")
    spans.add(semconv.END, 40, 1, (40, 45))
    view = one_run(spans, tmp_path)
    assert [message.text for message in view.conversation()] == ["what now", "this"]
    assert [step.prompt for step in view.steps] == ["═══ 1 user ═══\nwhat now"]
    assert [len(view.chats), len(view.agent_chats), view.usage.input_tokens] == [3, 1, 111]
    assert tokens_of(view) == [11]
    assert sorted(message.text for message in view.message_log.values())[0] == "a hook asks at the end"


def test_the_reply_of_a_turn_is_the_last_that_did_not_fail(tmp_path):
    spans = Spans()
    spans.chat(11, 10, (11, 12), 1, new="fall back", failed="overloaded")
    spans.chat(12, 10, (13, 14), 1, new="fall back", again=True, said="by the other model")
    batch(spans, 20, 10, 20, 1, 1)
    spans.turn(10, 1, (10, 30), 1)
    spans.chat(41, 40, (41, 42), 2, new="too long", failed="context_overflow")
    spans.chat(42, 40, (43, 44), 2, new="shorter", said="cut off")
    spans.chat(43, 40, (45, 46), 2, new="continue", said="to the end")
    batch(spans, 50, 40, 50, 2, 2)
    spans.turn(40, 1, (40, 60), 2)
    spans.chat(71, 70, (71, 72), 3, new="last", said="cut off, too")
    spans.chat(72, 70, (73, 74), 3, new="continue", failed="no route")
    spans.turn(70, 1, (70, 80), 3)
    view = one_run(spans, tmp_path)
    assert {t: view.answer(chat)[0].text for t, chat in view.replies.items()} == {
        1: "by the other model",
        2: "to the end",
        3: "cut off, too",
    }
    assert [message.text for message in view.conversation()] == ["last", "cut off, too"]
    assert [step.prompt.partition("\n")[2] for step in view.steps] == ["fall back", "continue"]


def test_a_call_that_failed_last_is_the_end_of_the_conversation(tmp_path):
    spans = Spans()
    turn(spans, 10, 1, 10, number=1, step=1, tokens=1)
    spans.chat(31, 30, (31, 32), 2, new="anybody?", failed="no route")
    spans.turn(30, 1, (30, 40), 2)
    assert [message.text for message in one_run(spans, tmp_path).conversation()] == ["anybody?"]


# --- spans of others inside a run -------------------------------------------------------------------------------------


def test_an_instrumented_client_inside_the_backend_counts_nothing_twice(tmp_path):
    spans = Spans()
    told = {semconv.OPERATION_NAME: semconv.CHAT, semconv.INPUT_TOKENS: 5, semconv.TURN_NUMBER: 1}
    spans.add("chat m", 12, 11, (12, 13), told, scope="instrumentation.of.a.client")
    spans.chat(11, 10, (11, 14), 1, tokens=5, new="first")
    batch(spans, 20, 10, 20, 1, 1)
    spans.turn(10, 1, (10, 30), 1)
    view = one_run(spans, tmp_path)
    assert [len(view.chats), view.usage.input_tokens, *tokens_of(view)] == [1, 5, 5]


def test_an_instrumented_agent_inside_a_tool_is_no_part_of_the_run(tmp_path):
    spans = Spans()
    turn(spans, 10, 1, 10, number=1, step=1, tokens=1)
    for number, name in ((50, semconv.INVOKE_AGENT), (51, semconv.CHAT), (52, semconv.EXECUTE_TOOL)):
        told = {semconv.OPERATION_NAME: name, semconv.STOP_REASON: "theirs", semconv.TOOL_CALL_RESULT: "1"}
        spans.add(f"{name} other", number, 14, (14, 15), told, scope="another.framework")
    view = one_run(spans, tmp_path)
    assert (len(view.steps), len(view.chats), len(view.segments), view.stop_reason) == (1, 1, 1, "done")
    assert len(view.spans) == len(view.own) + 3


def test_a_run_whose_exporter_lost_the_scopes_is_still_read(tmp_path):
    spans = segments()
    spans.lines = [("", span) for _, span in spans.lines]
    view = spans.view(tmp_path)
    assert (tokens_of(view), view.task, len(view.segments)) == ([5, 7, 9], {"goal": "g"}, 2)
