"""torch.ops.octav.integer_conv."""
