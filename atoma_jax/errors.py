"""Every exception that a user of the engine may see.

Messages name the field, the value, the limit and what to change.
"""

from typing import Any


class AtomaError(Exception):
    """Base of all errors of this project."""


class UserError(AtomaError, ValueError):
    """The caller asked for something that cannot be: a server answers 400, the command line exits with 2.

    Attributes:
        field: the setting, parameter or file part at fault, as the caller spells it.
        value: what was given.
    """

    def __init__(self, field: str, value: Any, problem: str):
        """`problem` says what the limit is and what to change; the message reads "field: problem, got value."."""
        self.field = field
        self.value = value
        shown = repr(value)
        if len(shown) > 200:  # a 60 MB prompt must not come back in its own error
            shown = shown[:197] + "..."
        super().__init__(f"{field}: {problem}, got {shown}.")


class ConfigError(UserError):
    """A setting of the engine is outside its limits, or two settings contradict each other."""


class ParameterError(UserError):
    """A sampling parameter or a prompt of one request is outside its limits.

    Unlike its base, the message is given whole: clients of other engines match on the wording.
    """

    def __init__(self, field: str, value: Any, message: str):
        AtomaError.__init__(self, message)
        self.field = field
        self.value = value


class ModelNotFoundError(UserError):
    """No model is where the name points; the message lists every place that was looked at."""


class UnsupportedModelError(UserError):
    """The model's architecture, tensor type or feature is not implemented; the message lists what is."""


class TemplateError(UserError):
    """A chat template is missing, invalid, or exceeded its time or size limit."""


class WeightFileError(UserError):
    """A weight file is damaged, truncated or contradicts itself. `field` names the file, tensor and header field."""


class DownloadError(AtomaError):
    """A model could not be fetched: no network, no such file, or a checksum that does not match."""


class Overloaded(AtomaError):  # noqa: N818  the field's word for a 503, not a fault of the program
    """The engine's queue is full; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(AtomaError):
    """A step failed after its state was donated: the engine cannot go on and must be built anew."""
