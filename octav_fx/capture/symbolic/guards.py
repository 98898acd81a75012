"""Facts that a captured graph takes for granted, checked each time it runs."""

from typing import Any

from torch import fx

from octav_fx.errors import OctavError


@fx.node.has_side_effect
def guard_equal(value: Any, expected: Any, where: str) -> None:
    """Raise OctavError when a value that decided a branch at capture is another one now."""
    if value is not expected and value != expected:
        raise OctavError(
            f"{where}: the captured graph holds for the value {expected!r} there, these inputs give {value!r}; "
            "call octav_fx.quantize again with inputs like these"
        )
