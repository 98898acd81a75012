"""What forward keeps past its call outside of its modules: a graph has no memory.

SEEN.append(x.shape[1]), TABLE[n] = y, Config.length = n, stats.begun = time.time(), def forward(self, x, seen=[])

What stands for a value while forward is traced must not stay there: the user's Python would compute with it later.
"""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from octav_fx.capture.contents import CONTAINERS, is_users_class, is_users_object
from octav_fx.capture.module_state import refill
from octav_fx.capture.symbolic.clocks import Moment, globals_of, is_users
from octav_fx.capture.symbolic.proxies import PROXIES
from octav_fx.compat.tensors import pytree
from octav_fx.errors import OctavError

_STAND_INS: Final = (*PROXIES, Moment)
# So deep below a global: STATS["lengths"].append(n). Larger tables are not looked into.
_DEEP: Final = 3
_SMALL: Final = 64


@contextmanager
def nothing_kept(root: nn.Module) -> Iterator[None]:
    """Put back what was in globals, in classes and objects there, and in containers of defaults and closures.

    That is done where forward has put in what stands for a value; raises OctavError then. All else stays as it is.
    """
    before = [(where, place, _content(place)) for where, place in _places(root)]
    kept = list[str]()
    try:
        yield
    finally:
        for where, place, content in before:
            if _put_back(place, content):
                kept.append(where)
    if kept:
        raise OctavError(f"forward keeps what is of its call alone in {kept[0]}, and a graph has no memory")


def _places(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (what it is for a reader, place): containers, the attributes of objects, and classes."""
    functions = [f for kind in {type(m) for m in root.modules()} for f in vars(kind).values() if is_users(f)]
    for names in globals_of(root).values():
        yield f"the globals of {names.get('__name__')}", names
        functions += filter(is_users, names.values())
        for name, value in names.items():
            if isinstance(value, type) and is_users_class(value):
                yield f"the class {name}", value
            else:
                yield from ((name, place) for place in _below(value))
    for function in functions:
        cells = (cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType())
        for value in (*(function.__defaults__ or ()), *cells):
            yield from ((f"a default or the closure of {function.__qualname__}", place) for place in _below(value))


def _below(value: Any, depth: int = _DEEP) -> Iterator[Any]:
    """Yield a container, or the attributes of an object, and those in it."""
    place = vars(value) if is_users_object(value) else value
    if type(place) in CONTAINERS:
        yield place
        if depth and len(place) <= _SMALL:
            for item in place.values() if isinstance(place, dict) else place:
                yield from _below(item, depth - 1)


def _content(place: Any) -> Any:
    return dict(vars(place)) if isinstance(place, type) else copy.copy(place)


def _put_back(place: Any, content: Any) -> bool:
    """Put back what stand-ins took the place of; tell whether there were any."""
    if not isinstance(content, dict):
        known = set(map(id, content))
        is_changed = any(id(item) not in known and _has_stand_in(item) for item in place)
        if is_changed:
            refill(place, content)
        return is_changed
    now = dict(vars(place)) if isinstance(place, type) else place
    changed = [key for key, value in now.items() if content.get(key, now) is not value and _has_stand_in((key, value))]
    for key in changed:
        if isinstance(place, type):
            setattr(place, key, content[key]) if key in content else delattr(place, key)
        elif key in content:
            place[key] = content[key]
        else:
            del place[key]
    return bool(changed)


def _has_stand_in(value: Any) -> bool:
    return any(type(leaf) in _STAND_INS for leaf in pytree.tree_leaves(value))
