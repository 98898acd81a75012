"""torch.ops.octav.quantize_rows."""
