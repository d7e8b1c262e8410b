"""Scoring runs: live, or read back from their traces."""
