"""Benchmarks against the reference packages, each measurement in its own process: see `__main__` and `gpu`."""
