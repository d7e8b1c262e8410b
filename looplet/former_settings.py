"""Settings of the original looplet that `LoopConfig` does not have, for errors that say what to write instead."""

from __future__ import annotations

from typing import Final

INSTEAD: Final = {
    "recovery_temperature": "a corrective turn is asked like any other, temperature= counts for it",
    "done_tool_schemas": "give the done tool its parameters, tools_from([...], include_done=True, "
    "done_parameters={...}), or the loop an output_type=",
    "output_schema": "composable_loop takes a type, output_type=Order; for a JSON Schema, register the done tool with "
    "tools_from([...], include_done=True, done_parameters={...})",
    "tool_result_persist_dir": "the trace holds whole results, hooks=[ProvenanceSink(dir)]; tool_result_max_chars= is "
    "what the model sees of one",
    "build_briefing": "a hook's pre_prompt(state, session_log, context, step_num) returns what the request is to say",
    "build_prompt": "a hook's pre_prompt gets the request as its third argument and may return it rewritten",
    "render_messages_override": "a hook's pre_prompt gets the request as its third argument: "
    "return context.rewrite(function)",
    "build_trace": "the trace is a file, hooks=[ProvenanceSink(dir)], and what the run came to is run.result",
    "extract_entities": "a hook's post_dispatch may call session_log.record(..., entities=[...])",
    "extract_step_metadata": "a hook's post_dispatch may call session_log.record(..., findings=[...])",
    "domain": "what a DomainAdapter did, hooks do: pre_prompt, post_dispatch, on_loop_end",
    "reactive_recovery": "leave it out, a request that is too long is always made shorter and sent once more",
    "recovery_registry": "parse_recovery= is how often a reply without a tool call is corrected; "
    "failing models are for ResilientBackend(llm, ...)",
    "max_briefing_tokens": "nothing cuts what hooks add to a request, let them return less",
    "context_window_steps": "compact_service=PruneToolResults(keep_recent=5) clears the results before the last five",
    "context_inline_per_step_chars": "tool_result_max_chars= is what the model sees of one result",
    "context_window_total_chars": "context_window= is in tokens; older results go before it is full",
    "router": "pass the router as the loop's llm=",
    "cache_policy": "it belongs to the backend, AnthropicBackend(..., cache=CachePolicy())",
    "tracer": "composable_loop takes a tracer_provider=; a trace file needs none, hooks=[ProvenanceSink(dir)]",
    "checkpoint_dir": "there are no checkpoints yet; hooks=[ProvenanceSink(dir)] writes the trace as the run goes, and "
    "a run that waits for an approval goes on with composable_loop(resume=dir)",
    "initial_checkpoint": "a run that waits for an approval goes on with composable_loop(resume=...)",
}
"""name of the setting → what to write instead"""
