"""Read weather notes from a YAML file and fetch the forecast beside them."""

from __future__ import annotations

from pathlib import Path

import requests
import yaml
from dateutil import parser
from pydantic import BaseModel


class Note(BaseModel):
    """One note: the day as the author wrote it, and what the weather was like."""

    day: str
    text: str


def read_notes(path: Path) -> list[Note]:
    """Return the notes of a YAML file, earliest first."""
    notes = [Note(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]
    return sorted(notes, key=lambda note: parser.parse(note.day))


def fetch_forecast(url: str) -> str:
    """Return the forecast that a service gives as text."""
    return requests.get(url, timeout=10).text
