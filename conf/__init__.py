"""What a run is: one folder per choice, one file per option (Hydra groups)."""
