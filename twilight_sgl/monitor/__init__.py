"""A live view of a server, from outside of it: `python -m twilight_sgl.monitor`."""
