"""Ask the OSV API, and a package index with a JSON interface; only when the audit is told to use the network."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from looplet.errors import ErrorKind, ToolError
from looplet.examples.dep_doctor.advisories import Advisory
from looplet.examples.dep_doctor.model import normalize

MAX_ANSWER_BYTES = 50_000_000
MAX_PAGES = 10
MAX_FAILURES = 2


@dataclass(frozen=True, slots=True)
class Online:
    """Where to ask.  Every method raises `ToolError` (network, retriable) when there is no usable answer."""

    osv_url: str = "https://api.osv.dev"
    index_url: str | None = None
    """a Python index that answers `GET {index_url}/pypi/{name}/json`; None: days of release stay unknown"""
    timeout_s: float = 10.0
    _failures: list[ToolError] = field(default_factory=list, compare=False, repr=False)
    """of the connection; after `MAX_FAILURES` nobody is asked again, so that an audit does not wait for each package"""

    def advisories(self, ecosystem: str, name: str, version: str) -> list[Advisory]:
        """Return the OSV records that affect one version."""
        query = {"package": {"name": name, "ecosystem": ecosystem}, "version": version}
        url = f"{self.osv_url.rstrip('/')}/v1/query"
        found: list[Advisory] = []
        for _ in range(MAX_PAGES):
            answer = self._fetch(url, json.dumps(query).encode())
            found += _records(url, answer)
            token = answer.get("next_page_token")
            if not token:
                return found
            query["page_token"] = token
        raise _failure(url, f"more than {MAX_PAGES} pages of advisories")

    def last_release(self, name: str) -> str | None:
        """Return the day of the latest upload of a Python package, `YYYY-MM-DD`; None when it is not known."""
        if self.index_url is None:
            return None
        project = urllib.parse.quote(normalize("PyPI", name))
        url = f"{self.index_url.rstrip('/')}/pypi/{project}/json"
        releases = self._fetch(url).get("releases")
        files = [file for release in releases.values() for file in release] if isinstance(releases, dict) else []
        times = [str(file.get("upload_time_iso_8601") or file.get("upload_time") or "")[:10] for file in files]
        return max((day for day in times if re.fullmatch(r"\d{4}-\d\d-\d\d", day)), default=None)

    def _fetch(self, url: str, body: bytes | None = None) -> dict[str, Any]:
        if not url.startswith(("https://", "http://")):
            raise _failure(url, "the address must start with https:// or http://")
        if len(self._failures) >= MAX_FAILURES:
            raise self._failures[-1]
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                data = json.loads(answer.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            error.close()
            raise _failure(url, f"HTTP status {error.code}") from error
        except OSError as error:  # no connection, or a time-out
            self._failures.append(_failure(url, str(getattr(error, "reason", error))))
            raise self._failures[-1] from error
        except (ValueError, http.client.HTTPException) as error:
            raise _failure(url, f"not a JSON answer: {error}") from error
        if not isinstance(data, dict):
            raise _failure(url, "the answer is not a JSON object")
        return data


def _records(url: str, answer: Mapping[str, Any]) -> list[Advisory]:
    try:
        records = [record for record in answer.get("vulns") or () if not record.get("withdrawn")]
        return [Advisory.from_osv(record) for record in records]
    except (ValueError, AttributeError, TypeError) as error:
        raise _failure(url, f"a record cannot be used: {error}") from error


def _failure(url: str, reason: str) -> ToolError:
    return ToolError(f"no usable answer from {url}: {reason}", kind=ErrorKind.NETWORK, retriable=True)
