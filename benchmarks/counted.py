"""How many graphs torch.compile hands to the backend, without the time that lowering them takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from octav_fx.backend import entry


@contextmanager
def graphs_made() -> Iterator[list[Any]]:
    """The graphs that are compiled inside; each runs as it is instead of through Inductor."""
    made: list[Any] = []

    def keep(gm: Any, example_inputs: Any, **options: Any) -> Any:
        made.append(gm)
        return gm

    with patch.object(entry, "compile_fx", keep):
        yield made
