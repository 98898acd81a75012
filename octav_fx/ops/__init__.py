"""torch.ops.octav.*: importing this package registers the ops. One folder for each.

reference.py is the definition in pure torch, kernel.cpp the CPU passes, kernel.py those in Triton, op.py the schema,
shapes and gradient.
"""

import octav_fx.ops.code_mean.op
import octav_fx.ops.code_sum.op
import octav_fx.ops.dequantize.op
import octav_fx.ops.divide.op
import octav_fx.ops.dynamic_fake_quantize.op
import octav_fx.ops.fake_quantize.op
import octav_fx.ops.fake_quantize_filters.op
import octav_fx.ops.fake_quantize_weights.op
import octav_fx.ops.gated_codes.op
import octav_fx.ops.grouped_mm.op
import octav_fx.ops.int_matmul.op
import octav_fx.ops.integer_codes.op
import octav_fx.ops.integer_conv.op
import octav_fx.ops.integer_linear.op
import octav_fx.ops.integer_sum.op
import octav_fx.ops.learned_fake_quantize.op
import octav_fx.ops.lookup.op
import octav_fx.ops.max_pool.op
import octav_fx.ops.max_pool_gradient.op
import octav_fx.ops.optimal_clip.op
import octav_fx.ops.product_of_codes.op
import octav_fx.ops.quantize.op
import octav_fx.ops.quantize_rows.op
import octav_fx.ops.ratio.op
import octav_fx.ops.synced_clip.op
import octav_fx.ops.zero_clipped.op  # noqa: F401
