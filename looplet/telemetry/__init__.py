"""Spans, files and readers: how a run is recorded and read back."""
