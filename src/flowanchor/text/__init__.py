"""Text encoders: prompts to the embeddings that a text-conditioned backbone reads."""
