"""moshi-server's dialect: its messages, and its routes on our sessions."""
