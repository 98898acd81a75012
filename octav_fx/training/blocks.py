"""Which modules of a model are blocks: graphs of their own, called as modules inside the user's own Python."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from torch import nn

from octav_fx.compat.checkpoints import wraps_a_checkpoint
from octav_fx.errors import OctavError

# What quantize() takes: "auto", or classes and names of modules; None leaves the choice to default_blocks.
Blocks = str | Sequence[str | type[nn.Module]]

# Attributes by which libraries let a module recompute what is below it.
_RECOMPUTES: Final = ("gradient_checkpointing", "grad_checkpointing")


def find_blocks(model: nn.Module, blocks: Blocks | None) -> dict[str, nn.Module]:
    """Return the blocks by name; an empty dict where the whole model is to be one graph.

    Raises OctavError for a name or class that no module of the model has, and for one that is the model itself.
    """
    if blocks is None:
        return _auto(model) if _wants_blocks(model) else {}
    if blocks == "auto":
        return _auto(model)
    if isinstance(blocks, (str, type)):
        raise OctavError(f'blocks={blocks!r}: "auto", or a list of classes or names of modules, such as [{blocks!r}]')
    modules, found = dict(model.named_modules()), dict[str, nn.Module]()
    for block in blocks:
        if isinstance(block, str):
            chosen = {block: modules[block]} if block in modules else {}
        elif isinstance(block, type) and issubclass(block, nn.Module):
            chosen = {name: module for name, module in modules.items() if isinstance(module, block)}
        else:
            raise OctavError(f"blocks: {block!r} is no name and no class of modules")
        if not chosen or "" in chosen:
            what = "the model itself" if chosen else "no module of it"
            raise OctavError(f"blocks: {block!r} is {what}; {type(model).__name__} has {_some_names(modules)}")
        found |= chosen
    return found


def _some_names(modules: dict[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if name and any(True for _ in module.children())]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _wants_blocks(model: nn.Module) -> bool:
    """Tell whether a model recomputes blocks, or is or wraps one of transformers, whose Python should go on running."""
    return any(_is_of_transformers(module) or _recomputes(module) for module in model.modules())


def _is_of_transformers(module: nn.Module) -> bool:
    kinds = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__]
    return ("transformers", "PreTrainedModel") in kinds


def _recomputes(module: nn.Module) -> bool:
    return wraps_a_checkpoint(module) or any(vars(module).get(name) is True for name in _RECOMPUTES)


def _auto(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules of which a container holds several of one class, and those that are recomputed."""
    return dict(_repeated("", model))


def _repeated(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = {f"{path}.{name}".lstrip("."): child for name, child in module.named_children()}
    kinds = Counter(type(child) for child in named.values())
    is_container = isinstance(module, (nn.ModuleList, nn.Sequential))
    for name, child in named.items():
        recomputes_below = any(hasattr(child, attribute) for attribute in _RECOMPUTES) and _has_repeated(child)
        is_block = is_container and kinds[type(child)] > 1 and any(True for _ in child.children())
        if wraps_a_checkpoint(module) or (is_block and not recomputes_below):
            yield name, child
        else:
            yield from _repeated(name, child)


def _has_repeated(module: nn.Module) -> bool:
    return next(_repeated("", module), None) is not None
