"""How much memory this process has."""

from __future__ import annotations

import mmap
from pathlib import Path


def resident_bytes() -> int:
    """Return the bytes in main memory; 0 where the system has no `/proc` to tell."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * mmap.PAGESIZE if told.exists() else 0
