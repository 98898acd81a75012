"""torch.ops.octav.int_matmul."""
