"""torch.ops.octav.grouped_mm."""
