"""Conversion between the published checkpoint layouts and this library's parameters, one table per layout."""
