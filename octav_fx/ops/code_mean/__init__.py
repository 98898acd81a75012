"""torch.ops.octav.code_mean."""
