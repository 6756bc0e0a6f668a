"""Top-p: the tokens that hold mass p, per query head, and their union over a group."""
