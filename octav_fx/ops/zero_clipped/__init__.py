"""torch.ops.octav.zero_clipped_."""
