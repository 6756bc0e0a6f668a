"""Page summaries: where they live, when they are sealed and how they are audited."""
