"""Modules that were put in the places of others since quantize(), or compute their weights, which no graph knows."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from octav_fx.compat.modules import children_of
from octav_fx.errors import OctavError
from octav_fx.nn.fake_quantizer import QUANTIZERS

# Where a module keeps its Structure.
STRUCTURE: Final = "octav_structure"


@dataclass(eq=False)
class Structure:
    """The children of a module and of those below it; modules that keep their own are not looked into."""

    children: list[tuple[nn.Module, dict[str, nn.Module | None]]]
    # Whether any of them was given a child since somebody looked: what compiled code asks in each call.
    is_touched: bool = False
    # Those whose weights are computed in another way now, by other hooks of torch.nn.utils or none.
    reweighted: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        for module, _ in self.children:
            _STRUCTURES.setdefault(module, weakref.WeakSet()).add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @torch.compiler.assume_constant_result
    def is_changed(self) -> bool:
        """Tell whether any module has other children or weights; compiled code asks once, is_touched in each call."""
        # A loop over many modules that runs in every call.
        return bool(self.reweighted) or any(children_of(module) != known for module, known in self.children)


# By module, those that it is in. Neither keeps the other.
_STRUCTURES: Final = weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Structure]]()


def _touch(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if torch.compiler.is_compiling():
        # Dynamo follows where forward makes a list of some of its layers, and looks no module up in a weak dict.
        if (own := vars(module).get(STRUCTURE)) is not None:
            own.is_touched = True
        return
    for structure in _STRUCTURES.get(module, ()):
        structure.is_touched = True


register_module_module_registration_hook(_touch)


def reweight(module: nn.Module) -> None:
    """Let who knows a module know that other hooks than before compute its weights."""
    for structure in _STRUCTURES.get(module, ()):
        structure.reweighted.append(module)
        structure.is_touched = True


def remember_structure(root: nn.Module) -> None:
    """Let a module know what it is made of, unless it does already."""
    # Plain modules copy and pickle it with all else that they hold.
    vars(root).setdefault(STRUCTURE, Structure([(m, dict(children_of(m))) for m in _own_modules(root)]))


def is_changed(root: nn.Module) -> bool:
    """Tell whether modules below one that knows what it was made of were replaced, added or removed.

    Compiled code guards one bool, which a new child sets; what a graph reads of a removed one is guarded anyway.
    """
    structure: Structure | None = vars(root).get(STRUCTURE)
    if structure is None:
        return False
    return (torch.compiler.is_compiling() and structure.is_touched) or structure.is_changed()


def looked_at(root: nn.Module) -> bool:
    """Tell whether modules below are really others, and let it count as looked at."""
    structure: Structure = vars(root)[STRUCTURE]
    structure.is_touched = False
    return structure.is_changed()


def replaced(root: nn.Module) -> list[str]:
    """Return the names of the places where other modules are than were there, or their weights are other ones."""
    structure: Structure = vars(root)[STRUCTURE]
    paths = {module: path for path, module in root.named_modules()}
    found = [paths[module] for module in dict.fromkeys(structure.reweighted) if module in paths]
    for module, known in structure.children:
        now = children_of(module)
        names = [name for name in {**known, **now} if known.get(name) is not now.get(name)]
        # What is below a replaced module is told by the name of that.
        found += [f"{paths[module]}.{name}".lstrip(".") for name in names if module in paths]
    return found


def check_unchanged(q: nn.Module) -> None:
    """Raise OctavError if modules in q were replaced, and q not called since."""
    for module in q.modules():
        if is_changed(module):
            raise OctavError(
                f"{', '.join(replaced(module))} of {type(module).__name__} is another one than octav_fx.quantize "
                "saw: call the model with a batch, which quantizes what is there now"
            )


def _own_modules(module: nn.Module, is_root: bool = True) -> Iterator[nn.Module]:
    if is_root or STRUCTURE not in vars(module):
        yield module
        for name, child in children_of(module).items():
            # Further graphs bring further quantizers. Of a scripted module nothing can be replaced.
            if child is not None and name != QUANTIZERS and not isinstance(child, torch.jit.ScriptModule):
                yield from _own_modules(child, False)
