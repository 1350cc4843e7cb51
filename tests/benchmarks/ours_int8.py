"""The timed steps of this library with int8 weights in the layers of its language models."""

import functools

from tests.benchmarks import ours

make = functools.partial(ours.make, quantize="int8")
