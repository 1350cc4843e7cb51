"""Run models: compiled programs over slots, and the scheduler that puts requests into the slots."""
