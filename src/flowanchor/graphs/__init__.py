"""The training step, captured once and replayed as a CUDA graph (docs/performance.md)."""
