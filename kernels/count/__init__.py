"""Count: add up what a decode step's sparse rows kept, by layer and KV head and by row."""
