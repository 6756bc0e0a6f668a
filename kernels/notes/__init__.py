"""Notes: end seals and begin requests anew, as the scheduler noted since the last decode step."""
