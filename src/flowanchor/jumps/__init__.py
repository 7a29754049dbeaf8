"""What training and sampling share about jumps: grids of times, where jumps end, guidance, precision."""
