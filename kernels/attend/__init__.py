"""Attend: exact attention over ragged sets of kept tokens."""
