"""torch.ops.octav.integer_linear."""
