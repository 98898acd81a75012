"""torch.ops.octav.optimal_clip."""
