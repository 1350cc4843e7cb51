"""OpenAI's dialect over HTTP and websockets, on our sessions."""
