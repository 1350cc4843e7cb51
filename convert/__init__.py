"""Conversion between the published checkpoint layouts and this library's parameters, by one table per layout."""

import sys
import types

from dsm_jax.convert.conversion import convert

__all__ = ["convert"]


class _Callable(types.ModuleType):
    """This package, callable as its function: once it is imported, `dsm_jax.convert` is the package."""

    __call__ = staticmethod(convert)


sys.modules[__name__].__class__ = _Callable
