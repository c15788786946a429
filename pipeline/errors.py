"""Failures sorted by who must act: the settings, the user, or us.

Every message carries the rule, the value that broke it and the way out. Anything raised that is not one of these is a bug
of ours, and a trial that ends with one is FAILED.
"""

from __future__ import annotations


class AutotuneError(Exception):
    """Base of every error this project raises on purpose."""


class SettingsError(AutotuneError):
    """The settings cannot work here: the trial is INFEASIBLE."""

    def __init__(self, message: str, kind: str = "refused") -> None:
        """`kind` is how, one of contracts.FAULTS."""
        super().__init__(message)
        self.kind = kind


class UserError(AutotuneError):
    """The user must act: a wrong override, a missing column, a corrupt file. Printed as one message, no traceback."""


class InvalidRequest(UserError):
    """A ranking request breaks the model's schema or limits."""


class DataError(UserError):
    """A data source does not have the documented form."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, corrupt, or of another model."""


class ArtifactError(UserError):
    """A deployable artifact is incomplete, corrupt, or does not reproduce its golden scores."""


class Overloaded(AutotuneError):
    """The session's queue is full; the caller should retry later or send less."""


class MachineError(AutotuneError):
    """The machine's fault (disk full, device lost, window disturbed): the trial is FAILED and is never told to the sampler."""
