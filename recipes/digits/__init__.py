"""Train and evaluate the embedded models `digits` and `digits-tts`. Run `python -m recipes.digits --help`."""
