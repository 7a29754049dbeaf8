"""The rows of `make gpu-check`: one file per family, each row through the product's own code."""
