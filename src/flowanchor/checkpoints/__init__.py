"""Reading checkpoints safely, and the models they hold."""

from flowanchor.checkpoints.load import (
    LoadedModel,
    initialise_student,
    latest_checkpoint,
    load_model,
    read_checkpoint,
)

__all__ = ["LoadedModel", "initialise_student", "latest_checkpoint", "load_model", "read_checkpoint"]
