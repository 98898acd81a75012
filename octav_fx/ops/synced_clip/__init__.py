"""torch.ops.octav.synced_clip."""
