"""torch.ops.octav.dynamic_fake_quantize."""
