"""Estimate: attention logits of the candidates' tokens."""
