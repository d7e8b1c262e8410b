"""What telemetry lost: counted by cause, logged once each, never raised into a run."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("looplet")

_lock = threading.RLock()  # the collector may end a run in the middle of it
drops: dict[str, int] = {}
"""what telemetry lost in this process, by cause; nothing is lost silently"""


def count_drop(cause: str, detail: object = "") -> None:
    """Count something that telemetry lost; log the first of each cause."""
    with _lock:
        drops[cause] = times = drops.get(cause, 0) + 1
    if times == 1:
        logger.warning("looplet telemetry: %s (%s); the run goes on, further ones are only counted", cause, detail)
