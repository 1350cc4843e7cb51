"""Losses, one module per kind of model: speech-to-text, text-to-speech, conversational speech, codec."""
