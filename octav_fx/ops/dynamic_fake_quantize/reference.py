"""dynamic_fake_quantize, in pure torch: the definition."""

from torch import Tensor

from octav_fx.ops.fake_quantize.reference import fake_quantize
from octav_fx.ops.optimal_clip.reference import optimal_clip


def dynamic_fake_quantize(x: Tensor, hint: Tensor, spec: str, method: str, gradient: str) -> tuple[Tensor, Tensor]:
    """Map x [...], hint [] or [C] -> (x on the grid of its own optimal clip [...], that clip [] or [C] float32)."""
    clip = optimal_clip(x, hint, spec, method)
    return fake_quantize(x, clip, spec, gradient), clip
