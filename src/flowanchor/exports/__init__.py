"""Trained networks as what other libraries open: folders of diffusers pipelines."""
