"""Transformers of the diffusers library as chains of stages: one adapter (`network`), and a description per class."""
