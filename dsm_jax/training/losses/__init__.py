"""Losses, one module for each kind of network: speech-to-text, text-to-speech, codec."""
