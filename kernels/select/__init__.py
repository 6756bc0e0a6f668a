"""Select: score pages and choose every KV head's candidates, within the budget B0."""
