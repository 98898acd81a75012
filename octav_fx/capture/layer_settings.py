"""What a graph holds as a constant of a layer: the stride of a convolution, which users may set anew."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from octav_fx.capture.kinds import PLAIN
from octav_fx.ir.ops import op_of_module
from octav_fx.ir.table.contractions import CONTRACTIONS


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """The plain attributes of the layers that graphs spell as functions: where each is, its name and value."""

    rows: tuple[tuple[dict[str, Any], str, Any], ...]

    @classmethod
    def of(cls, root: nn.Module) -> "LayerSettings":
        """Return the present ones of all layers in a module."""
        held = [vars(module) for module in root.modules() if op_of_module(module) in CONTRACTIONS]
        rows = [(attributes, name, value) for attributes in held for name, value in attributes.items()]
        return cls(tuple(row for row in rows if row[1] != "training" and _is_setting(row[2])))

    def change(self) -> str | None:
        """Say which is another one now, or return None."""
        for attributes, name, before in self.rows:
            if (now := attributes.get(name)) is not before and now != before:
                return f"{name} of a layer: {before!r} at capture, {now!r} now"
        return None


def _is_setting(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(isinstance(item, PLAIN) for item in value))
