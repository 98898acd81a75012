"""torch.compile(model, backend="octav"): found by the name of this package's entry point."""

from octav_fx.backend.entry import octav

__all__ = ["octav"]
