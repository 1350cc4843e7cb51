"""Streaming layers that belong to no one model: convolutions, attention, quantisation and sampling."""
