"""What a researcher adds: one file per idea, chosen by a Hydra group of the same name."""
