"""Seal: build a full page's summary from its keys."""
