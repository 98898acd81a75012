"""The parameters of forward, and the call that its values make."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from octav_fx.errors import OctavError


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of forward behind self. Raises OctavError for those that fx would write in another order.

    Decorators hide them, and fx itself patches the code of the outermost, which has none of them.
    """
    parameters = list(inspect.signature(inspect.unwrap(function)).parameters.values())[1:]
    collected = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if collected and keyword_only:
        raise OctavError(
            f"forward(*{collected[0]}, {keyword_only[0]}=...) cannot be captured: keyword-only parameters after "
            f"*{collected[0]}: take {keyword_only[0]} out, or give it a default before *{collected[0]}"
        )
    return parameters


def takes_by_keyword(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> bool:
    """Tell whether what decorates forward takes **kwargs: such code looks for arguments by name."""
    outer = inspect.signature(function, follow_wrapped=False).parameters.values()
    return _has(outer, "VAR_KEYWORD") and not _has(parameters, "VAR_POSITIONAL")


def as_call(
    parameters: Sequence[inspect.Parameter], values: Sequence[Any], by_keyword: bool
) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and keyword arguments that give each parameter its value."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for parameter, value in zip(parameters, values, strict=True):
        match parameter.kind.name:
            case "VAR_POSITIONAL":
                positional.extend(value)
            case "VAR_KEYWORD":
                keywords |= value
            case "POSITIONAL_ONLY":
                positional.append(value)
            case "POSITIONAL_OR_KEYWORD" if not by_keyword:
                positional.append(value)
            case _:
                keywords[parameter.name] = value
    return positional, keywords


def _has(parameters: Iterable[inspect.Parameter], kind: str) -> bool:
    return any(parameter.kind.name == kind for parameter in parameters)
