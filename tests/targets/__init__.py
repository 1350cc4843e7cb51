"""Compile the library's programs for devices that are not there, and check what the compiler made of them.

`make test-targets` runs these tests; `python -m tests.targets` prints the memory that the published models need.
"""
