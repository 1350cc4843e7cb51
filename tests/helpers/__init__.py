"""Helpers of several tests: small models, checkpoints and tokenizers, and the check of the streaming contract."""
