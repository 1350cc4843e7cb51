"""Text-to-speech: from a script of turns to the tokens of the speech that says it."""
