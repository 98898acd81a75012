"""The one error type users see."""


class OctavError(RuntimeError):
    """Something about the model, its inputs or the configuration has to change.

    The message names the node or argument, its shape or value, and what to do about it.
    """


class NotCaptured(OctavError):
    """A module whose forward no graph can hold; its children are quantized one by one instead."""
