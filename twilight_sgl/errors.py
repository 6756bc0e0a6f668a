"""Errors that users can act on."""


class TwilightError(ValueError):
    """Something the user asked for cannot be done; the message names the flag and the remedy."""
