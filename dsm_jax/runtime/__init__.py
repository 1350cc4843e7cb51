"""Runs models: compiled programs over slots, and the one scheduler that puts requests into them."""
