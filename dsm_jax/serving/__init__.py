"""Serve models: slots that clients' sessions share, the dialects of moshi-server and of OpenAI, and clients of both."""
