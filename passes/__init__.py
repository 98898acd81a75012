"""Every rewrite, one file each, and the ordered lists of them. Installed as octav_fx.passes."""

if __name__ != "octav_fx.passes":
    raise ImportError("this folder is the package octav_fx.passes; import it under that name")

import functools
from typing import Any, Final

from octav_fx.config import Config
from octav_fx.ir.pipeline import Pass
from octav_fx.passes.convert.batchnorm_to_affine import batchnorm_to_affine
from octav_fx.passes.convert.bounds_as_numbers import bounds_as_numbers
from octav_fx.passes.convert.check_writes import check_writes
from octav_fx.passes.convert.clamps_into_layers import clamps_into_layers
from octav_fx.passes.convert.codes_between_layers import codes_between_layers
from octav_fx.passes.convert.codes_of_cats import codes_of_cats
from octav_fx.passes.convert.codes_of_sums import codes_of_sums
from octav_fx.passes.convert.combine_codes import combine_codes
from octav_fx.passes.convert.drop_identities import drop_identities
from octav_fx.passes.convert.fold_affine_into_scale import fold_affine_into_scale
from octav_fx.passes.convert.functions_of_codes import functions_of_codes
from octav_fx.passes.convert.gates_on_codes import gates_on_codes
from octav_fx.passes.convert.integer_layers import integer_layers
from octav_fx.passes.convert.make_activations_static import make_activations_static
from octav_fx.passes.convert.moves_on_codes import moves_on_codes
from octav_fx.passes.convert.multiply_codes import multiply_codes
from octav_fx.passes.convert.pack_weights import pack_weights
from octav_fx.passes.convert.pools_of_layers import pools_of_layers
from octav_fx.passes.convert.products_as_linear import products_as_linear
from octav_fx.passes.convert.products_outside_autocast import products_outside_autocast
from octav_fx.passes.convert.quantizers_before_cats import quantizers_before_cats
from octav_fx.passes.convert.quantizers_behind_moves import quantizers_behind_moves
from octav_fx.passes.convert.round_biases import round_biases
from octav_fx.passes.convert.saturate_codes import saturate_codes
from octav_fx.passes.convert.tables_into_layers import tables_into_layers
from octav_fx.passes.convert.views_as_reshapes import views_as_reshapes
from octav_fx.passes.lower.bfloat16_backward import bfloat16_backward
from octav_fx.passes.lower.codes_in_forward import codes_in_forward
from octav_fx.passes.lower.filters_channels_last import filters_channels_last
from octav_fx.passes.lower.fuse_weight_quantizers import fuse_weight_quantizers
from octav_fx.passes.lower.integer_matmul import integer_matmul
from octav_fx.passes.lower.keep_levels import keep_levels
from octav_fx.passes.lower.levels_as_read import levels_as_read
from octav_fx.passes.lower.mask_from_codes import mask_from_codes
from octav_fx.passes.lower.mask_from_value import mask_from_value
from octav_fx.passes.lower.mask_in_place import mask_in_place
from octav_fx.passes.lower.permute_summands import permute_summands
from octav_fx.passes.lower.pool_gradients import pool_gradients
from octav_fx.passes.lower.rows_in_one_pass import rows_in_one_pass
from octav_fx.passes.lower.save_codes import save_codes
from octav_fx.passes.lower.save_pooled_codes import save_pooled_codes
from octav_fx.passes.lower.select_gradients import select_gradients
from octav_fx.passes.lower.solve_by_one_step import solve_by_one_step
from octav_fx.passes.lower.split_quantizers import split_quantizers
from octav_fx.passes.lower.strided_gradients import strided_gradients
from octav_fx.passes.lower.update_at_once import update_at_once
from octav_fx.passes.lower.write_out import write_out
from octav_fx.passes.prepare.canonicalize import canonicalize
from octav_fx.passes.prepare.choose import choose_spec
from octav_fx.passes.prepare.decompose_attention import decompose_attention
from octav_fx.passes.prepare.deduplicate_quantizers import deduplicate_quantizers
from octav_fx.passes.prepare.expand_products import expand_products
from octav_fx.passes.prepare.fold_batchnorm import fold_batchnorm
from octav_fx.passes.prepare.quantize_operands import Choose, Place, quantize_operands
from octav_fx.passes.prepare.quantize_residuals import quantize_residuals

# The order in which quantize() runs them.
PREPARE: Final[tuple[Any, ...]] = (
    expand_products,  # first: what it makes is canonicalized like what forward calls
    canonicalize,  # one spelling for each op; everything below matches on it
    decompose_attention,  # before quantizing, if asked for: its matmuls are then operands like any
    fold_batchnorm,  # before quantizing, if asked for: the folded weight is the one to clip
    quantize_operands,  # one quantizer before each operand
    deduplicate_quantizers,  # one quantizer for each value, where several operands got equal ones
    quantize_residuals,  # last, if asked for: it chooses among the quantizers that a value has by then
)

# What the backend runs on the joint graph of forward and backward, and on a graph for inference. The partitioner comes
# next: it decides by size and by what can be recomputed what is kept between the two halves.
LOWER: Final[tuple[Pass, ...]] = (
    split_quantizers,  # first: the parts are what all others are about
    save_codes,  # what backward needs of a quantized value is decided before anyone asks for it in another form
    save_pooled_codes,  # after save_codes, whose levels it follows
    mask_in_place,  # after save_codes: it asks the codes that are kept
    mask_from_value,  # after mask_in_place, of which nothing is recomputed
    mask_from_codes,  # the masks that are left
    levels_as_read,  # after save_codes; before filters_channels_last, which asks who reads the levels of a weight
    keep_levels,  # if asked for, after levels_as_read: in the dtype in which they are read
    codes_in_forward,  # if asked for, before filters_channels_last: both ask who reads the levels of a weight
    filters_channels_last,  # after save_codes, whose tags go over to what it makes of a weight
    bfloat16_backward,  # if asked for, after levels_as_read, which leaves it float32, and after filters_channels_last
    integer_matmul,  # after save_codes, whose codes it multiplies
    fuse_weight_quantizers,  # of the weights whose levels are still needed
    solve_by_one_step,  # if asked for, last: nobody asks for the solve of an activation any more
)

# What the backend runs on each half, when it is decided what is kept between them.
FUSE: Final[tuple[Pass, ...]] = (
    pool_gradients,  # any time
    strided_gradients,  # any time
    select_gradients,  # any time
    permute_summands,  # after select_gradients, of whose slices the sums are
    update_at_once,  # before write_out: it looks for clips, not for what they are written out as
    rows_in_one_pass,  # after update_at_once, which asks for solves
    write_out,  # ops that Inductor does not look into, as ops that it fuses
)

# What convert() and the exporters run on the eval graph of a frozen model: its operands are integers and scales then.
CONVERT: Final[tuple[Any, ...]] = (
    pack_weights,  # first: it tells weights from activations by what their quantizers read
    quantizers_behind_moves,  # before make_activations_static, and all that asks the operands of layers
    products_as_linear,  # after pack_weights, whose codes it transposes; before all that asks for layers
    make_activations_static,  # the quantizers that are left
    drop_identities,  # before saturate_codes: a clamp is right before its quantizer then
    bounds_as_numbers,  # before saturate_codes, which asks for numbers
    batchnorm_to_affine,  # any time: no code depends on it
    fold_affine_into_scale,  # after batchnorm_to_affine and pack_weights, whose results it puts together
    saturate_codes,  # after make_activations_static: the quantizers that saturate
    quantizers_before_cats,  # after saturate_codes: the copies saturate as their quantizer does
    saturate_codes,  # once more: the copies stand before clamps of the parts
    round_biases,  # after all that asks for scales: those of weights and the ranges of codes are known
    views_as_reshapes,  # any time: to the table both are one op
)

# What convert(integers=False) runs after these: the definition of their arithmetic, which a file leaves to its runtime.
COMPUTE: Final[tuple[Any, ...]] = (
    multiply_codes,  # all of it at once: a layer has to know the quantizer that reads it
)

# What convert() runs instead: the same arithmetic by oneDNN, where the CPU has it.
INTEGERS: Final[tuple[Any, ...]] = (
    check_writes,  # first: of what the user wrote
    combine_codes,  # before the layers: sums and means between quantizers, which layers read and write as codes
    integer_layers,  # the layers themselves, with float results
    moves_on_codes,  # before codes_of_cats: it asks what becomes codes
    codes_of_cats,  # before functions_of_codes: a part may be a function of codes
    moves_on_codes,  # once more: the parts
    functions_of_codes,  # before codes_between_layers: what such a function reads are codes of a layer, too
    gates_on_codes,  # as functions_of_codes
    clamps_into_layers,  # before codes are looked for behind the layer, and not behind its relu
    codes_between_layers,  # the codes that one layer's result alone decides
    codes_of_sums,  # and those of two, where the sum is in float
    pools_of_layers,  # those that codes_between_layers left
    tables_into_layers,  # whoever asks for a lookup has found it
    products_outside_autocast,  # last: no row of the table knows what it calls
)


def prepare_passes(config: Config, choose: Choose | None = None) -> list[Pass]:
    """Return those of PREPARE that a Config asks for; choose, if given, decides for each operand in place of it."""
    choose = choose or functools.partial(choose_spec, config)
    bound: dict[Any, Pass] = {p: functools.partial(p, choose=choose) for p in (quantize_operands, quantize_residuals)}
    left_out = {
        fold_batchnorm: not config.fold_batchnorm,
        decompose_attention: config.attention != "full",
        quantize_residuals: config.residual_bits is None,
    }
    return [bound.get(p, p) for p in PREPARE if not left_out.get(p, False)]


def lower_passes(
    integer: str = "off", keep: str = "codes", backward: str = "same", solve: str = "exact"
) -> tuple[Pass, ...]:
    """Return those of LOWER that options of the backend ask for.

    integer="auto" is codes_in_forward, keep="levels" keep_levels, backward="bfloat16" bfloat16_backward, solve="step"
    solve_by_one_step.
    """
    left_out: dict[Pass, bool] = {
        codes_in_forward: integer != "auto",
        keep_levels: keep != "levels",
        bfloat16_backward: backward != "bfloat16",
        solve_by_one_step: solve != "step",
    }
    return tuple(p for p in LOWER if not left_out.get(p, False))


__all__ = [
    "COMPUTE",
    "CONVERT",
    "FUSE",
    "INTEGERS",
    "LOWER",
    "PREPARE",
    "Choose",
    "Place",
    "batchnorm_to_affine",
    "bfloat16_backward",
    "bounds_as_numbers",
    "canonicalize",
    "check_writes",
    "choose_spec",
    "clamps_into_layers",
    "codes_between_layers",
    "codes_in_forward",
    "codes_of_cats",
    "codes_of_sums",
    "combine_codes",
    "decompose_attention",
    "deduplicate_quantizers",
    "drop_identities",
    "expand_products",
    "filters_channels_last",
    "fold_affine_into_scale",
    "fold_batchnorm",
    "functions_of_codes",
    "fuse_weight_quantizers",
    "gates_on_codes",
    "integer_layers",
    "integer_matmul",
    "keep_levels",
    "levels_as_read",
    "lower_passes",
    "make_activations_static",
    "mask_from_codes",
    "mask_from_value",
    "mask_in_place",
    "moves_on_codes",
    "multiply_codes",
    "pack_weights",
    "permute_summands",
    "pool_gradients",
    "pools_of_layers",
    "prepare_passes",
    "products_as_linear",
    "products_outside_autocast",
    "quantize_operands",
    "quantize_residuals",
    "quantizers_before_cats",
    "quantizers_behind_moves",
    "round_biases",
    "rows_in_one_pass",
    "saturate_codes",
    "save_codes",
    "save_pooled_codes",
    "select_gradients",
    "solve_by_one_step",
    "split_quantizers",
    "strided_gradients",
    "tables_into_layers",
    "update_at_once",
    "views_as_reshapes",
    "write_out",
]
