"""Which modules a model is made of, as a graph of it was captured; a layer put in place of another is another model."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from octav_fx.capture.kinds import PLAIN
from octav_fx.compat.modules import children_of
from octav_fx.ir.ops import op_of_module
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.nn.fake_quantizer import QUANTIZERS


@dataclass(frozen=True, slots=True)
class Structure:
    """The children of every module, and what layers have that graphs hold as constants (a stride), with both dicts."""

    children: tuple[tuple[dict[str, Any], dict[str, Any]], ...]
    settings: tuple[tuple[dict[str, Any], str, Any], ...]

    @classmethod
    def of(cls, root: nn.Module) -> "Structure":
        """Return the present structure of a module, its quantizers aside."""
        own = {
            id(part)
            for quantizers in [children_of(root).get(QUANTIZERS)]
            if quantizers
            for part in quantizers.modules()
        }
        modules = [module for module in root.modules() if id(module) not in own]
        held = [children_of(module) for module in modules]
        layers = [vars(module) for module in modules if op_of_module(module) in CONTRACTIONS]
        settings = [(attributes, name, attributes[name]) for attributes in layers for name in attributes]
        return cls(
            tuple((children, dict(children)) for children in held if children),
            tuple(row for row in settings if row[1] != "training" and _is_setting(row[2])),
        )

    def change(self) -> str | None:
        """Say which module was replaced, or which setting of a layer, or return None."""
        for children, before in self.children:
            if children != before:
                names = [name for name in {**before, **children} if children.get(name) is not before.get(name)]
                return f"the module {names[0]} was replaced"
        for attributes, name, before in self.settings:
            if (now := attributes.get(name)) is not before and now != before:
                return f"{name} of a layer was {before!r} at capture and is {now!r} now"
        return None


def _is_setting(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(isinstance(item, PLAIN) for item in value))
