"""Every span name, attribute key and event name that looplet writes: the one table.

`gen_ai.*` names are those of the GenAI semantic conventions, open-telemetry/semantic-conventions-genai at commit
fe5608e (2026-08-03, status: development); where they have no word, the name starts with `looplet.`.
"""

from __future__ import annotations

from typing import Final

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/gen-ai-dev/1.42.0-dev"
SCOPE: Final = "looplet"

# --- span names -----------------------------------------------------------------------------------------------------
INVOKE_AGENT: Final = "invoke_agent"  # "invoke_agent {gen_ai.agent.name}"
CHAT: Final = "chat"  # "chat {gen_ai.request.model}"
EXECUTE_TOOL: Final = "execute_tool"  # "execute_tool {gen_ai.tool.name}"
PRE_LOOP: Final = "looplet.pre_loop"
START: Final = "looplet.start"
TURN: Final = "looplet.turn"
PRE_PROMPT: Final = "looplet.pre_prompt"
PRE_DISPATCH: Final = "looplet.pre_dispatch"
CHECK_DONE: Final = "looplet.check_done"
DISPATCH: Final = "looplet.dispatch"
TOOL_START: Final = "looplet.tool.start"
POST_DISPATCH: Final = "looplet.post_dispatch"
SHOULD_STOP: Final = "looplet.should_stop"
COMPACT: Final = "looplet.compact"
END: Final = "looplet.end"

# --- GenAI attributes -----------------------------------------------------------------------------------------------
OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
AGENT_NAME: Final = "gen_ai.agent.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_STREAM: Final = "gen_ai.request.stream"
TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"  # seconds
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS: Final = "gen_ai.usage.cache_creation.input_tokens"
REASONING_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
TOOL_DEFINITIONS: Final = "gen_ai.tool.definitions"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
TOOL_CALL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_CALL_RESULT: Final = "gen_ai.tool.call.result"
MCP_METHOD_NAME: Final = "mcp.method.name"
MCP_PROTOCOL_VERSION: Final = "mcp.protocol.version"
MCP_SESSION_ID: Final = "mcp.session.id"
JSONRPC_REQUEST_ID: Final = "jsonrpc.request.id"
RPC_STATUS_CODE: Final = "rpc.response.status_code"  # of a JSON-RPC error

# --- general attributes ---------------------------------------------------------------------------------------------
ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
NETWORK_TRANSPORT: Final = "network.transport"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
EXCEPTION_STACKTRACE: Final = "exception.stacktrace"
SERVICE_NAME: Final = "service.name"
SDK_NAME: Final = "telemetry.sdk.name"
SDK_LANGUAGE: Final = "telemetry.sdk.language"
SDK_VERSION: Final = "telemetry.sdk.version"

# --- our attributes -------------------------------------------------------------------------------------------------
RUN_ID: Final = "looplet.run.id"
TURN_NUMBER: Final = "looplet.turn.number"
STEP_NUMBER: Final = "looplet.step.number"
SEGMENT_NUMBER: Final = "looplet.segment.number"
STOP_REASON: Final = "looplet.stop_reason"
STEP_COUNT: Final = "looplet.step.count"
TURN_COUNT: Final = "looplet.turn.count"
FORMAT: Final = "looplet.format"
VERSION: Final = "looplet.version"
TASK: Final = "looplet.task"
CONFIG: Final = "looplet.config"
HOOKS: Final = "looplet.hooks"
DONE_TOOLS: Final = "looplet.done_tools"
SESSION_LOG: Final = "looplet.session_log"
REPLAYABLE: Final = "looplet.replayable"
INPUT_REFS: Final = "looplet.input.refs"
INPUT_SHA256: Final = "looplet.input.sha256"
INPUT_FIRST: Final = "looplet.input.first"  # number of the first entry in gen_ai.input.messages
INPUT_REQUEST: Final = "looplet.input.request"  # number of the request within its log
PROTOCOL: Final = "looplet.chat.protocol"  # chat, generate_with_tools or generate
USAGE_REPORTED: Final = "looplet.usage.reported"
COST_USD: Final = "looplet.usage.cost_usd"
RUN_INPUT_TOKENS: Final = "looplet.usage.input_tokens"
RUN_OUTPUT_TOKENS: Final = "looplet.usage.output_tokens"
RUN_COST_USD: Final = "looplet.usage.run.cost_usd"
TOTAL_INPUT_TOKENS: Final = "looplet.usage.total.input_tokens"
TOTAL_OUTPUT_TOKENS: Final = "looplet.usage.total.output_tokens"
TOTAL_COST_USD: Final = "looplet.usage.total.cost_usd"
UNREPORTED_CALLS: Final = "looplet.usage.unreported_calls"
ARGUMENTS_SHA256: Final = "looplet.tool.arguments.sha256"
TOOL_ABANDONED: Final = "looplet.tool.abandoned"
TOOL_WITHHELD: Final = "looplet.tool.withheld"  # the result is told only as a request sends it
TOOL_RESULT: Final = "looplet.tool.result"  # what a ToolResult holds beside data, as JSON
TOOL_CALL: Final = "looplet.tool.call"  # what a ToolCall holds beside name, id and arguments, as JSON
STEP_RECORD: Final = "looplet.step.record"  # a whole step as JSON, where no execute_tool span tells it
PARENT_RUN_ID: Final = "looplet.parent.run.id"
PARENT_CALL_ID: Final = "looplet.parent.call.id"
HOOK_NAME: Final = "looplet.hook.name"
HOOK_METHOD: Final = "looplet.hook.method"
HOOK_DECISION: Final = "looplet.hook.decision"
HOOK_REASON: Final = "looplet.hook.reason"
HOOK_DURATION: Final = "looplet.hook.duration_s"
REQUEST_REWRITTEN: Final = "looplet.request.rewritten"
PARSE_ATTEMPT: Final = "looplet.parse.attempt"
PROGRESS_STAGE: Final = "looplet.tool.progress.stage"
PROGRESS_DATA: Final = "looplet.tool.progress.data"
COMPACT_REASON: Final = "looplet.compact.reason"  # threshold, overflow, or the hook that asked
COMPACT_SERVICE: Final = "looplet.compact.service"
COMPACT_COMPACTED: Final = "looplet.compact.compacted"  # whether the next request is smaller
COMPACT_MESSAGES_BEFORE: Final = "looplet.compact.messages.before"
COMPACT_MESSAGES_AFTER: Final = "looplet.compact.messages.after"
COMPACT_TOKENS_BEFORE: Final = "looplet.compact.tokens.before"  # of the next request, estimated
COMPACT_TOKENS_AFTER: Final = "looplet.compact.tokens.after"
COMPACT_STAGES: Final = "looplet.compact.stages"  # the services that changed something, in order
COMPACT_WARNINGS: Final = "looplet.compact.warnings"
CHAT_PURPOSE: Final = "looplet.chat.purpose"  # compaction, tool, judge; an agent's own calls have none
ATTEMPT: Final = "looplet.attempt"  # from 1
RETRY_DELAY: Final = "looplet.retry.delay_s"
RATE_LIMIT_NAME: Final = "looplet.rate_limit.name"
RATE_LIMIT_WAIT: Final = "looplet.rate_limit.wait_s"
BUDGET_EXHAUSTED: Final = "looplet.budget.exhausted"  # tokens, usd, seconds, steps, model_calls or tool_calls
BUDGET_REMAINING: Final = "looplet.budget.remaining"  # a prefix: one attribute for each of those
BUDGET_UNCHECKED: Final = "looplet.budget.unchecked"  # a prefix: model calls that a limit could not count
APPROVAL_QUESTION: Final = "looplet.approval.question"
APPROVAL_VERDICT: Final = "looplet.approval.verdict"
PAUSE: Final = "looplet.pause"  # what a paused run needs to go on, as JSON

# --- event names ----------------------------------------------------------------------------------------------------
EVENT_EXCEPTION: Final = "exception"
EVENT_HOOK: Final = "looplet.hook"
EVENT_HOOK_SKIPPED: Final = "looplet.hook.skipped"
EVENT_STEP: Final = "looplet.step"
EVENT_PARSE_FAILURE: Final = "looplet.parse_failure"
EVENT_CALL_DROPPED: Final = "looplet.call.dropped"
EVENT_PROGRESS: Final = "looplet.tool.progress"
EVENT_TOOL_RETRY: Final = "looplet.tool.retry"
EVENT_RETRY: Final = "looplet.retry"
EVENT_RATE_LIMITED: Final = "looplet.rate_limited"
EVENT_FALLBACK: Final = "looplet.fallback"
EVENT_CONTINUATION: Final = "looplet.continuation"
EVENT_APPROVAL_REQUESTED: Final = "looplet.approval.requested"
EVENT_APPROVAL_ANSWERED: Final = "looplet.approval.answered"

# --- values ---------------------------------------------------------------------------------------------------------
UNKNOWN_TOOL: Final = "_unknown"
OTHER_ERROR: Final = "_OTHER"
FORMAT_VERSION: Final = "1"

# --- in the file, beside the spans ----------------------------------------------------------------------------------
RECOVERED: Final = "looplet.recovered"  # on a line of its own: what stands before it is damaged, and known to be
RESUMED: Final = "looplet.resumed"  # on a line of its own: the id of a segment's span; somebody goes on from its pause
CLAIM: Final = "looplet.claim"  # on that line: a random text, by which whoever wrote it knows it again

# Attribute and event keys that hold what people, models and tools said.  They go to the run's own sinks; the user's
# tracer gets them only when content capture is on (GenAI conventions, "Capturing instructions, inputs and outputs").
CONTENT: Final = frozenset(
    {
        INPUT_MESSAGES,
        OUTPUT_MESSAGES,
        TOOL_DEFINITIONS,
        TOOL_CALL_ARGUMENTS,
        TOOL_CALL_RESULT,
        TASK,
        SESSION_LOG,
        TOOL_RESULT,
        TOOL_CALL,
        STEP_RECORD,
        HOOK_REASON,
        EXCEPTION_MESSAGE,
        EXCEPTION_STACKTRACE,
        PROGRESS_STAGE,
        PROGRESS_DATA,
        APPROVAL_QUESTION,
        APPROVAL_VERDICT,
        PAUSE,
    }
)
