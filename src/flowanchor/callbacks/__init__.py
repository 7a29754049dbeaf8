"""Lightning callbacks of a training run: progress, throughput, sample grids and checkpoints with stable names."""
