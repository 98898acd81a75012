"""Random numbers of Python and NumPy, and of generators that modules hold: what forward draws differs in each call."""

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from octav_fx.capture.contents import Contents
from octav_fx.errors import NotCaptured

SEEDS: Final = "seeds torch's generator, which a graph does not"
# A seed that no forward uses.
_NOBODYS: Final = 0x6F63_7461_765F_6678


@contextmanager
def same_random_numbers(root: nn.Module, contents: Contents | None = None) -> Iterator[None]:
    """Put back, afterwards, every random state but torch's own, which has fork_rng.

    contents: what the modules hold, where somebody has looked.
    """
    with _kept_states(contents or Contents.of(root)):
        yield


@contextmanager
def without_chance(root: nn.Module) -> Iterator[None]:
    """Raise NotCaptured where a random number is drawn inside, or torch's generator is seeded; states are put back.

    What a graph will draw by torch is not drawn inside.
    """
    with _kept_states(Contents.of(root)) as before:
        with _own_seed() as is_seeded:
            yield
            if is_seeded():
                raise NotCaptured(f"forward {SEEDS}")
        is_drawn = any(pickle.dumps(_state(source)) != pickle.dumps(state) for source, state in before)
    if is_drawn:
        raise NotCaptured("forward draws random numbers of Python or NumPy, which are others in each call")


@contextmanager
def _own_seed() -> Iterator[Callable[[], bool]]:
    """Give torch's generator a state of nobody's inside, and a function that tells whether it has another one."""
    generator = torch.default_generator
    before = generator.get_state()
    own = generator.manual_seed(_NOBODYS).get_state()
    try:
        yield lambda: not torch.equal(generator.get_state(), own)
    finally:
        generator.set_state(before)


@contextmanager
def _kept_states(contents: Contents) -> Iterator[list[tuple[Any, Any]]]:
    """Give the sources of random numbers, each with its state, and put the states back afterwards."""
    before = _states(contents)
    try:
        yield before
    finally:
        _restore(before)


def _states(contents: Contents) -> list[tuple[Any, Any]]:
    """Return the sources of random numbers, each with its state."""
    numpy = sys.modules.get("numpy")
    # Both modules have the functions of their generators.
    shared = [random] if numpy is None else [random, numpy.random]
    return [(source, _state(source)) for source in (*shared, *filter(_is_generator, contents.values()))]


def _is_generator(value: Any) -> bool:
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)
    is_numpys = type(value).__module__.startswith("numpy.random.")
    return isinstance(value, torch.Generator) or (is_numpys and hasattr(value, "standard_normal"))


def _state(source: Any) -> Any:
    if hasattr(source, "getstate"):
        return source.getstate()
    return source.get_state() if hasattr(source, "get_state") else source.bit_generator.state


def _restore(states: list[tuple[Any, Any]]) -> None:
    for source, state in states:
        if hasattr(source, "setstate"):
            source.setstate(state)
        elif hasattr(source, "set_state"):
            source.set_state(state)
        else:
            source.bit_generator.state = state
