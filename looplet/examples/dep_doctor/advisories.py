"""Match versions against advisories in the OSV format.

A range is a list of events; sorted by version, `introduced` turns "affected" on, and `fixed`, `limit` and passing
`last_affected` turn it off (https://ossf.github.io/osv-schema/, "Evaluation").  Ranges of type GIT are left out: they
name commits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from looplet.errors import ConfigError
from looplet.examples.dep_doctor.model import PYPI, Severity, normalize
from looplet.examples.dep_doctor.versions import just_above, parse_range, version_key

Event = tuple[str, str]
"""`introduced`, `fixed`, `last_affected` or `limit`, and the version"""

_RATINGS: dict[str, Severity] = {
    "critical": "critical",
    "high": "high",
    "moderate": "moderate",
    "medium": "moderate",
    "low": "low",
}
_EVENT_ORDER = ("fixed", "limit", "introduced", "last_affected")


@dataclass(frozen=True, slots=True)
class Affected:
    """The versions of one package that one advisory is about."""

    ecosystem: str
    key: str
    ranges: tuple[tuple[Event, ...], ...]
    versions: tuple[str, ...] = ()

    def affects(self, version: str) -> bool:
        """Tell whether `version` is affected; `ValueError` when it cannot be compared."""
        if version in self.versions:
            return True
        key = version_key(self.ecosystem, version)
        if any(key == version_key(self.ecosystem, listed) for listed in self.versions if self._is_version(listed)):
            return True
        return any(self._in_range(events, key) for events in self.ranges)

    def fixed_in(self, version: str | None = None) -> str | None:
        """Return the first fixed version after `version` (of all when None), None when there is no fix."""
        fixes = [bound for events in self.ranges for kind, bound in events if kind == "fixed"]
        if version is not None:
            key = version_key(self.ecosystem, version)
            fixes = [bound for bound in fixes if version_key(self.ecosystem, bound) > key]
        return min(fixes, key=lambda bound: version_key(self.ecosystem, bound), default=None)

    def allowed_by(self, specifier: str) -> bool:
        """Tell whether a specifier allows an affected version.

        Where two unions of intervals meet, they meet at one of their ends or just above one, so these are tried.
        """
        wanted = parse_range(self.ecosystem, specifier)
        if wanted is None:
            return False
        ends = [*wanted.bounds(), *self.versions, *(bound for events in self.ranges for _, bound in events)]
        usable = [end for end in ends if self._is_version(end)]
        tried = ["0", *usable, *(just_above(self.ecosystem, end) for end in usable)]
        return any(wanted.contains(version) and self.affects(version) for version in tried)

    def _is_version(self, text: str) -> bool:
        try:
            version_key(self.ecosystem, text)
        except ValueError:
            return False
        return True

    def _in_range(self, events: tuple[Event, ...], key: Any) -> bool:
        affected = False
        for kind, bound in sorted(events, key=self._event_key):
            at = version_key(self.ecosystem, bound)
            if kind == "introduced":
                affected = affected or bound == "0" or key >= at
            elif kind == "last_affected":
                affected = affected and key <= at
            else:
                affected = affected and key < at
        return affected

    def _event_key(self, event: Event) -> tuple[Any, ...]:
        """Sort `introduced: 0` before everything; at one version, an end before a new beginning."""
        if event == ("introduced", "0"):
            return (0,)
        kind, bound = event
        return (1, version_key(self.ecosystem, bound), _EVENT_ORDER.index(kind))


@dataclass(frozen=True, slots=True)
class Advisory:
    """One OSV record, cut down to what a match needs."""

    id: str
    aliases: tuple[str, ...]
    summary: str
    severity: Severity
    """`moderate` when the record does not say"""
    affected: tuple[Affected, ...]

    @property
    def label(self) -> str:
        """Return the CVE number where there is one."""
        return next((alias for alias in (self.id, *self.aliases) if alias.startswith("CVE-")), self.id)

    @classmethod
    def from_osv(cls, record: Mapping[str, Any]) -> Advisory:
        """Read one OSV record; `ValueError` when a part that matching needs is missing or cannot be compared."""
        try:
            rating = str(record.get("database_specific", {}).get("severity", "")).lower()
            return cls(
                id=str(record["id"]),
                aliases=tuple(record.get("aliases") or ()),
                summary=str(record.get("summary") or record.get("details", "")).strip().split("\n")[0],
                severity=_RATINGS.get(rating, "moderate"),
                affected=tuple(_affected(entry) for entry in record.get("affected", ()) if "package" in entry),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an OSV record: {error!r}") from error


def _affected(entry: Mapping[str, Any]) -> Affected:
    package = entry["package"]
    ecosystem = str(package["ecosystem"]).split(":")[0]
    ranges = tuple(
        tuple((kind, str(bound)) for event in found["events"] for kind, bound in event.items() if kind in _EVENT_ORDER)
        for found in entry.get("ranges", ())
        if found["type"] in {"ECOSYSTEM", "SEMVER"}
    )
    if ecosystem in {PYPI, "npm"}:
        for bound in (bound for events in ranges for _, bound in events):
            version_key(ecosystem, bound)
    return Affected(ecosystem, normalize(ecosystem, package["name"]), ranges, tuple(entry.get("versions") or ()))


class AdvisoryIndex:
    """Advisories by package."""

    def __init__(self, advisories: Iterable[Advisory]) -> None:
        self.count = 0
        self._entries: dict[tuple[str, str], list[tuple[Advisory, Affected]]] = {}
        for advisory in advisories:
            self.count += 1
            for affected in advisory.affected:
                self._entries.setdefault((affected.ecosystem, affected.key), []).append((advisory, affected))

    def about(self, ecosystem: str, key: str) -> list[tuple[Advisory, Affected]]:
        """Return the advisories about one package, with the part that is about it."""
        return self._entries.get((ecosystem, key), [])

    def matching(self, ecosystem: str, key: str, version: str) -> list[tuple[Advisory, Affected]]:
        """Return the advisories that affect one version; `ValueError` when it cannot be compared."""
        version_key(ecosystem, version)
        return [(advisory, affected) for advisory, affected in self.about(ecosystem, key) if affected.affects(version)]


def load_advisories(folder: Path | None = None) -> AdvisoryIndex:
    """Read the OSV files of a folder, or the shipped snapshot; `ConfigError` names a file that cannot be used."""
    return AdvisoryIndex(_records(folder))


def _records(folder: Path | None) -> Iterator[Advisory]:
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"there is no folder {str(folder)!r}; pass a folder of OSV files, or nothing for the snapshot"
        )
    source = Path(folder) if folder else resources.files("looplet.examples.dep_doctor") / "data" / "advisories"
    for file in sorted(source.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".json"):
            continue
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            advisory = Advisory.from_osv(record)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{file.name} is not a usable OSV advisory: {error}") from error
        if not record.get("withdrawn"):
            yield advisory


def merge_aliases(advisories: Iterable[Advisory]) -> list[Advisory]:
    """Return one advisory for each flaw: records that share an identifier are one, and the first is kept."""
    kept: list[Advisory] = []
    seen: set[str] = set()
    for advisory in advisories:
        names = {advisory.id, *advisory.aliases}
        if not names & seen:
            kept.append(advisory)
        seen |= names
    return kept
