"""Hold recipes: how the embedded models are made. Not part of the library."""
