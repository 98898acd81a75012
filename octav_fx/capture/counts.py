"""What forward counts past its modules, put back after it was run for its graphs: a global, a variable of a closure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from octav_fx.capture.constants import Held
from octav_fx.capture.find_constants import constants_of
from octav_fx.capture.kinds import MISSING
from octav_fx.capture.module_state import refill
from octav_fx.capture.modules import graphs_in

_CONTAINERS: Final = (list, dict, set)
# True and False are what is set once: that a table of a file is filled.
_COUNTS: Final = (int, float, *_CONTAINERS)


@contextmanager
def kept_counts(root: nn.Module) -> Iterator[None]:
    """Put back the numbers, and the lists of such, that forward has moved on, unless a graph holds for what they are.

    They are those that code of the module names in files, closures and objects. What modules themselves hold the graphs
    ask for, and store.
    """
    before, own = constants_of(root), set(root.modules())
    try:
        yield
    finally:
        past = [row for row in before.attributes if not (isinstance(row.holder, nn.Module) and row.holder in own)]
        _put_back(root, [(False, row) for row in past] + [(True, row) for row in before.items])


def _put_back(root: nn.Module, rows: list[tuple[bool, Held]]) -> None:
    moved = list[tuple[bool, Any, Any, Any]]()
    for is_item, (_, holder, names, values) in rows:
        for name, old in zip(names, values, strict=True):
            now = holder.get(name, MISSING) if is_item else getattr(holder, name, MISSING)
            # Of a zero the kind is held.
            was = 0.0 if type(now) is float and type(old) is tuple else old
            if type(now) in _COUNTS and type(was) is type(now) and now != was:
                moved.append((is_item, holder, name, _set(is_item, holder, name, was)))
    if any(graphs.constants_changed() for graphs in graphs_in(root)):
        for is_item, holder, name, now in moved:
            _set(is_item, holder, name, now)


def _set(is_item: bool, holder: Any, name: Any, value: Any) -> Any:
    """Set a value in its place, or what is in a container; return what was there."""
    now = holder[name] if is_item else getattr(holder, name)
    if type(now) in _CONTAINERS:
        content = now.copy()
        refill(now, value)
        return content
    if is_item:
        holder[name] = value
    else:
        setattr(holder, name, value)
    return now
