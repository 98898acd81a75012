"""torch.ops.octav.learned_fake_quantize."""
