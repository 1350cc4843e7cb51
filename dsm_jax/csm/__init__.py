"""Conversational speech."""
