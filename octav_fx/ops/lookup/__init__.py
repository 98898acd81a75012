"""torch.ops.octav.lookup."""
