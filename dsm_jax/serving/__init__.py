"""Servers of models: the wire formats of their clients."""
