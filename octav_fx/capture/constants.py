"""What a graph holds as constants, and users may set anew: the stride of a convolution, a global that forward names.

Each is asked at every call, and where the call is compiled, by the compiler's own guards. find_constants.py finds them.
"""

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from octav_fx.capture.kinds import MISSING, kind_of


class Held(NamedTuple):
    """Plain values of one holder by name: its attributes or its items."""

    where: str
    holder: Any
    names: tuple[Any, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Constants:
    """Plain values that graphs do not read again, each by where it is found."""

    attributes: tuple[Held, ...]
    items: tuple[Held, ...]
    # Attributes that are tensors and modules, which count by being themselves.
    objects: tuple[Held, ...]
    # Questions by name, each with the answer.
    answers: tuple[tuple[str, Callable[[], Any], Any], ...]
    # Variables of the context, each with its value.
    variables: tuple[tuple[contextvars.ContextVar[Any], Any], ...]
    # Functions that keep what they have returned.
    caches: tuple[Any, ...]
    # What the modules below hold by name, each with the forward among it: somebody may set another one.
    forwards: tuple[tuple[dict[str, Any], Any], ...]

    def change(self) -> str | None:
        """Say which is another one now, or return None."""
        # Plain loops, which a compiler follows.
        for where, holder, names, values in self.attributes:
            for name, before in zip(names, values, strict=True):
                if (now := getattr(holder, name, MISSING)) != before and _is_other(now, before):
                    return _told(name, where, before, now)
        for where, holder, names, values in self.items:
            for name, before in zip(names, values, strict=True):
                if (now := holder.get(name, MISSING)) != before and _is_other(now, before):
                    return _told(name, where, before, now)
        for where, holder, names, values in self.objects:
            for name, before in zip(names, values, strict=True):
                if getattr(holder, name, MISSING) is not before:
                    return f"{name} of {where} is another one than at capture"
        for name, question, before in self.answers:
            if (now := question()) != before:
                return _told(name, "torch", before, now)
        for variable, before in self.variables:
            if (now := variable.get(MISSING)) != before:
                return _told("a variable", "the context", before, now)
        return "forward of a module is another one than at capture" if self._is_patched() else None

    @torch.compiler.assume_constant_result
    def _is_patched(self) -> bool:
        """Tell whether a module has another forward of its own; compiled code asks once, as modules are many."""
        return any(held.get("forward") is not before for held, before in self.forwards)

    @contextmanager
    def without_caches(self) -> Iterator[None]:
        """Let functions remember nothing from before inside, and nothing of what they return inside afterwards."""
        for cache in self.caches:
            cache.cache_clear()
        try:
            yield
        finally:
            for cache in self.caches:
                cache.cache_clear()


def _is_other(now: Any, before: Any) -> bool:
    """Tell whether a value that is not what is held for it is not of the kind that is held: a partial, a zero, nan."""
    return not isinstance(now, (functools.partial, float)) or kind_of(now) != before


def _told(name: str, where: str, before: Any, now: Any) -> str:
    # What a compiler takes a number for may have no text.
    return name if torch.compiler.is_compiling() else f"{name} of {where}: {before!r} at capture, {now!r} now"
