"""The models of a run: which backend answers calls of which purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from looplet.backends.adapter import Model
from looplet.backends.candidates import Candidate, candidates
from looplet.config import LoopConfig
from looplet.errors import ConfigError

AGENT: Final = "agent"
SUBAGENT: Final = "subagent"


class Option(NamedTuple):
    """A backend that may answer a call: its rules, and how it is asked."""

    candidate: Candidate
    model: Model


class Models:
    """Finds the backends for a purpose, each of them inspected once.

    A run that a tool of another run started asks as `subagent`; in its own trace its calls are those of an agent.
    `clean` maps the tool definitions that are sent.
    """

    def __init__(
        self,
        llm: Any,
        config: LoopConfig,
        *,
        sync: bool,
        is_subagent: bool = False,
        clean: Callable[[Any], Any] | None = None,
    ) -> None:
        self.llm = llm
        self._config = config
        self._sync = sync
        self._clean = clean
        self._agent = SUBAGENT if is_subagent else AGENT
        self._known: dict[int, Model] = {}
        self._options: dict[str, list[Option]] = {}
        self.primary = self.of(AGENT)[0].model
        """the model that the loop asks first"""
        for option in self.of(AGENT):
            self._require_same_protocol(option.model)

    def routed(self, purpose: str) -> str:
        """Return the purpose by which routers know a call."""
        return self._agent if purpose == AGENT else purpose

    def of(self, purpose: str) -> list[Option]:
        """Return who may answer, in the order in which they are asked.  Raises ConfigError for what is no backend."""
        options = self._options.get(purpose)
        if options is None:
            found = candidates(self.llm, self.routed(purpose))
            options = self._options[purpose] = [Option(candidate, self._model(candidate.llm)) for candidate in found]
        return options

    def _model(self, llm: Any) -> Model:
        model = self._known.get(id(llm))
        if model is None:
            model = self._known[id(llm)] = Model(llm, self._config, sync=self._sync, clean=self._clean)
        return model

    def _require_same_protocol(self, model: Model) -> None:
        if model.native != self.primary.native:
            one, other = sorted((self.primary, model), key=lambda m: m.native, reverse=True)
            raise ConfigError(
                f"{type(one.llm).__name__} calls tools natively and its fall-back {type(other.llm).__name__} in text: "
                "give both the same way, or pass LoopConfig(use_native_tools=False)"
            )
