"""Captioned images into files of latents and text embeddings."""
