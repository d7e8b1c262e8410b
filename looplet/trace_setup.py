"""From the arguments of a loop to its `RunTrace`: the sinks, the user's tracer, and the boundaries before them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace

from looplet._version import __version__
from looplet.backends.candidates import parts
from looplet.boundary import Boundary, Redact
from looplet.config import LoopConfig
from looplet.errors import ConfigError
from looplet.hooks import REDACT, SINK, HookSet
from looplet.ledger import Ledger
from looplet.segments import Paused
from looplet.telemetry import semconv
from looplet.telemetry.recorder import Recorder, Resource, Scope, new_id
from looplet.telemetry.router import route
from looplet.telemetry.spans import RunTrace

UNFIT: Final = "unfit_for"
"""a method of sinks: `unfit_for(run_id, path)` says why the sink cannot go on with a paused run, "" if it can"""
CAPTURE_CONTENT: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"


def sinks_of(llm: Any, hooks: HookSet, above: Recorder | None, paused: Paused | None) -> list[Any]:
    """Return the sinks of a run; raises ConfigError for a sink that cannot go on with the paused run.

    A paused run always goes on in its own file: else the file would still say that the run waits.
    """
    if paused is None:
        return _found_sinks(llm, hooks.brought(SINK), above)
    given = _found_sinks(llm, hooks.brought(SINK)) or list(paused.sinks)
    if words := next(filter(None, (_unfit(sink, paused) for sink in given)), ""):
        raise ConfigError(f"{words}; leave the sink out of hooks=[...] and llm=...")
    inherited = [sink for sink in _found_sinks(None, (), above) if not _unfit(sink, paused)]
    sinks = list({id(sink): sink for sink in (*inherited, *given)}.values())
    if paused.path is not None and not any(hasattr(sink, UNFIT) for sink in sinks):
        from looplet.telemetry.provenance import ProvenanceSink

        sinks.append(ProvenanceSink(paused.path.parent))
    return sinks


def _unfit(sink: Any, paused: Paused) -> str:
    ask = getattr(sink, UNFIT, None)
    return "" if ask is None else str(ask(paused.run_id, paused.path))


def _found_sinks(llm: Any, brought: Sequence[Any] = (), above: Recorder | None = None) -> list[Any]:
    """Return the sinks of the run above, those that hooks brought and those around or inside the backend, each once."""
    inherited = above.sinks if above is not None and not above.closed else ()
    found: dict[int, Any] = {id(sink): sink for sink in inherited}
    around = [getattr(part, "__dict__", {}).get(SINK) for part in parts(llm)]
    found |= {id(sink): sink for sink in (*brought, *around) if sink is not None}
    return list(found.values())


def boundaries_of(
    settings: LoopConfig, hooks: HookSet, sinks: Sequence[Any], above: Recorder | None
) -> tuple[Boundary, Boundary | None]:
    """Return the boundary of the run, and one for what is recorded only (`redact_upstream=False`)."""
    early = [settings.redact, *hooks.brought(REDACT), *(above.boundary.redactors if above is not None else ())]
    late: list[Redact | None] = []
    for sink in sinks:
        (early if getattr(sink, "redact_upstream", True) else late).append(getattr(sink, "redact", None))
    return Boundary(*dict.fromkeys(early)), Boundary(*dict.fromkeys(late)) if any(late) else None


def trace_of(
    settings: LoopConfig,
    boundary: Boundary,
    late: Boundary | None,
    sinks: Sequence[Any],
    hooks: HookSet,
    tracer_provider: Any,
    above: Recorder | None,
    paused: Paused | None,
) -> RunTrace:
    """Return what records the phases of a run: its `RunTrace`, with a recorder for sinks and tracer."""
    provider = tracer_provider if tracer_provider is not None else trace.get_tracer_provider()
    tracer = above.tracer if tracer_provider is None and above is not None else _tracer(provider)
    if tracer is not None and sinks:
        route(provider)
    base = otel_context.get_current() if paused is None else _below_first_segment(paused)
    recorder = Recorder(
        run_id=new_id() if paused is None else paused.run_id,
        boundary=boundary,
        late=late,
        sinks=sinks,
        tracer=tracer,
        context=base,
        resource=above.resource if above is not None and tracer_provider is None else _resource_of(provider),
        scope=_scope(),
        capture_content=_captures_content(settings, above),
        ledger=Ledger(above.ledger if above is not None else None),
    )
    return RunTrace(recorder, settings.agent_name, [bound.function for bound in hooks.observers])


def _below_first_segment(paused: Paused) -> otel_context.Context:
    """Return the context in which a later segment's span stands below the first one's."""
    return trace.set_span_in_context(trace.NonRecordingSpan(paused.context))


def _tracer(provider: Any) -> trace.Tracer | None:
    """Return the user's tracer, None when no provider was ever set: there would be nobody to tell."""
    if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return None
    tracer: trace.Tracer = provider.get_tracer(semconv.SCOPE, __version__, schema_url=semconv.SCHEMA_URL)
    return tracer


def _captures_content(settings: LoopConfig, above: Recorder | None = None) -> bool:
    """Tell whether the tracer provider may see what was said (GenAI conventions: off unless asked for).

    A sub-agent captures no more than the run above it.
    """
    if above is not None and not above.captures:
        return False
    if settings.capture_content is not None:
        return settings.capture_content
    return os.environ.get(CAPTURE_CONTENT, "").strip().lower() in ("span_only", "span_and_event", "true", "1")


def _resource_of(provider: Any) -> Any:
    return getattr(provider, "resource", None) or _default_resource()


@cache
def _scope() -> Scope:
    return Scope(__version__)


@cache
def _default_resource() -> Resource:
    """Return the resource of spans where no provider has one."""
    return Resource(
        {
            semconv.SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or "looplet",
            semconv.SDK_NAME: semconv.SCOPE,
            semconv.SDK_LANGUAGE: "python",
            semconv.SDK_VERSION: __version__,
        }
    )
