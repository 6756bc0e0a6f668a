"""Long-context tasks against a live server, scored as published, and reports of them."""
