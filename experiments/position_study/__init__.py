"""What position embeddings learn in an encoder and in a decoder."""
