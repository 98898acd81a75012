"""torch.ops.octav.ratio."""
