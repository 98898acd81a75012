"""torch.ops.octav.recode."""
