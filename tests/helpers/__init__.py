"""What several tests share: small models, checkpoints and tokenizers made on the spot, and the streaming check."""
