"""torch.ops.octav.dequantize."""
