"""torch.ops.octav.quantize."""
