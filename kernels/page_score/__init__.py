"""Page score: Quest's upper bound on the logits of a page, from its summary."""
