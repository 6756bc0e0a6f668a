"""Page score: by the box of a page's keys, as Quest's bound on its logits; a part of select."""
