"""Streaming layers: convolutions, attention, quantisation and sampling, without a model's name on them."""
