"""torch.ops.octav.divide."""
