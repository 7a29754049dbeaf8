"""Reading checkpoints safely, and the models they hold."""

from flowanchor.checkpoints.find import latest_checkpoint
from flowanchor.checkpoints.load import LoadedModel, initialise_student, load_model
from flowanchor.checkpoints.read import read_checkpoint

__all__ = ["LoadedModel", "initialise_student", "latest_checkpoint", "load_model", "read_checkpoint"]
