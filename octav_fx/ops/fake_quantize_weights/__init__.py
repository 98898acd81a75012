"""torch.ops.octav.fake_quantize_weights."""
