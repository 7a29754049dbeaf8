"""Metrics of generated images: torch-fidelity's, on features that fit the data."""
