"""torch.ops.octav.fake_quantize."""
