"""Recipes that train the embedded models; not part of the library."""
