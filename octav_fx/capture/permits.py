"""Where modules that graphs hold may be called and hooked."""

from collections.abc import Iterator
from contextlib import contextmanager

# How many permitted() are entered.
_permits = 0


@contextmanager
def permitted() -> Iterator[None]:
    """Let held modules be called and hooked inside: the float model runs, or is captured."""
    global _permits
    _permits += 1
    try:
        yield
    finally:
        _permits -= 1


def is_permitted() -> bool:
    """Tell whether this runs inside of permitted()."""
    return bool(_permits)
