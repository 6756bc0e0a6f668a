"""Select: the candidate pages of every KV head, within the budget B0."""
