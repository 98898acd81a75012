"""torch.ops.octav.product_of_codes."""
