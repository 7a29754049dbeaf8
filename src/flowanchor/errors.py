"""Errors that a user can act on: one sentence that says what was wrong, where, and what to type instead."""


class FlowAnchorError(Exception):
    """Base of every error that the programs print as one sentence, without a traceback, before exit code 1."""


class ConfigError(FlowAnchorError):
    """A setting, or a combination of settings, that cannot be run."""


class DataError(FlowAnchorError):
    """Data that is missing, empty, unlabelled or of another shape than the run expects."""


class CheckpointError(FlowAnchorError):
    """A checkpoint that is missing, foreign, or does not fit the network it is loaded into."""


class NonFiniteLossError(FlowAnchorError):
    """Too many steps in a row whose loss or gradient was not finite."""


class RankDisagreement(FlowAnchorError):
    """Processes of one run that do not do the same: other settings, gradients or weights."""
