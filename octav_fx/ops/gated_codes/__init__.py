"""torch.ops.octav.gated_codes."""
