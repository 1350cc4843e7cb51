"""Speed side by side with the reference packages, each measurement in a process of its own: see `__main__` and `gpu`."""
