"""How models run: compiled programs over slots, and the one scheduler that puts requests into them."""
