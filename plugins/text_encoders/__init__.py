"""Text encoders (`text_encoder=`): prompts to the embeddings that a network of texts reads."""
