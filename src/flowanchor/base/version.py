"""The version of this package: pyproject.toml reads it here, and so does everything else."""

VERSION = "0.2.0"
