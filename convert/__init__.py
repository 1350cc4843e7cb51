"""Conversion between the published checkpoint layouts and this library's parameters, by one table per layout."""

from dsm_jax.convert.conversion import convert

__all__ = ["convert"]
