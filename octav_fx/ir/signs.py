"""When the result of an op is never below zero, NaN aside, as functions that rows of ops name.

A SignRule takes the arguments of a call by name, and a function that says whether an argument is known to be never
below zero.
"""

from collections.abc import Callable, Mapping
from typing import Any

IsNonnegative = Callable[[Any], bool]
SignRule = Callable[[Mapping[str, Any], IsNonnegative], bool]


def always(given: Mapping[str, Any], is_nonnegative: IsNonnegative) -> bool:
    """Return True: no result is below zero, whatever goes in."""
    return True


def as_input(given: Mapping[str, Any], is_nonnegative: IsNonnegative) -> bool:
    """Return whether the first input is never below zero: the op moves, selects, averages or scales up."""
    return is_nonnegative(next(iter(given.values())))


def as_all(*names: str) -> SignRule:
    """Return the rule of an op that is never below zero if none of these arguments is."""

    def rule(given: Mapping[str, Any], is_nonnegative: IsNonnegative) -> bool:
        return all(is_nonnegative(given[name]) for name in names)

    return rule


def product(given: Mapping[str, Any], is_nonnegative: IsNonnegative) -> bool:
    """Return whether it is a square, or both factors are never below zero."""
    first, second = given["input"], given["other"]
    return first is second or (is_nonnegative(first) and is_nonnegative(second))


def clamp(given: Mapping[str, Any], is_nonnegative: IsNonnegative) -> bool:
    """Return whether the lower bound is not below zero, or the input is not."""
    return _is_number_from_zero(given["min"]) or is_nonnegative(given["input"])


def power(given: Mapping[str, Any], is_nonnegative: IsNonnegative) -> bool:
    """Return whether the exponent is even, or the base is never below zero."""
    exponent = given["exponent"]
    return (isinstance(exponent, int) and exponent % 2 == 0) or is_nonnegative(given["input"])


def interpolate(given: Mapping[str, Any], is_nonnegative: IsNonnegative) -> bool:
    """Return whether the input is never below zero and the kernel, unlike a bicubic one, has no negative lobes."""
    return given["mode"] != "bicubic" and is_nonnegative(given["input"])


def pad(given: Mapping[str, Any], is_nonnegative: IsNonnegative) -> bool:
    """Return whether neither the input nor what is put around it is below zero."""
    fill = given["value"]
    return (fill is None or _is_number_from_zero(fill)) and is_nonnegative(given["input"])


def _is_number_from_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 0
