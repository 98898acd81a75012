"""torch.ops.octav.integer_codes."""
