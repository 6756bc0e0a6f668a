"""Slots: where a decode step's new tokens go in the KV cache."""
