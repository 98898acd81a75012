"""A call that no graph holds for: one graph more, the module's own Python, or all anew where modules were replaced."""

import warnings
from typing import Final, cast

from torch import nn

from octav_fx.capture.classes import users_class
from octav_fx.capture.counts import kept_counts
from octav_fx.capture.hooks import set_aside
from octav_fx.capture.inputs import Inputs, sample_call
from octav_fx.capture.modules import QuantizedModule, graphs_in, graphs_of
from octav_fx.capture.partial import PartialModule
from octav_fx.capture.replaced import STRUCTURE, is_changed, replaced
from octav_fx.capture.rerun import has_data, macs_by_module, record_calls, run_once
from octav_fx.capture.whole import make_users_own, users_own
from octav_fx.clips.distributed import no_sync
from octav_fx.compat.modules import is_compiled
from octav_fx.compat.tensors import is_functorch_wrapped, normal_tensors, without_transforms, without_users_modes
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.nn import FakeQuantizer
from octav_fx.training.by_parts import PartsQuantizer, is_at, mark_outermost, restore, tree_of
from octav_fx.training.known_quantizers import quantizers_by_operand, take_quantizers
from octav_fx.training.one_graph import NeedsCalls, Recipe, add_records, check_equal, prepare_module
from octav_fx.training.own_python import own_python
from octav_fx.training.self_check import check_in_turn

# So many graphs a module may have for each mode.
MOST_GRAPHS: Final = 8


def capture_again(quantized: QuantizedModule, call: Inputs) -> None:
    """Capture a graph for a call, with the quantizers and parameters that are there; else prepare its own Python.

    No mode of dispatch of the user's, such as a FlopCounterMode around the call, sees the runs that this takes. An
    error of the model's own on these inputs is raised as it is. Raises OctavError where no graph holds the call and
    nothing below the module can be quantized by itself, and where modules below were replaced and no graph holds the
    new ones.
    """
    if any(map(is_functorch_wrapped, quantized.owner.parameters())):
        raise OctavError(
            f"{quantized.user_class.__name__}: no graph holds for this call ({quantized.why_not(*call)}), and none can "
            "be captured inside of a transform of torch.func that gives it parameters: call the model once outside "
            "with such inputs, or give octav_fx.quantize an example of them (examples=[...])"
        )
    with without_users_modes(), without_transforms(), kept_counts(quantized.owner):
        _capture_again(quantized, sample_call(call))


def _capture_again(quantized: QuantizedModule, call: Inputs) -> None:
    if is_changed(quantized.owner):
        _quantize_anew(quantized, call)
        return
    recipe: Recipe = quantized.recipe
    mode, name = quantized.training, recipe.position.path or quantized.user_class.__name__
    graphs = quantized.graphs_of(mode)
    before = {m for m in quantized.modules() if isinstance(m, FakeQuantizer)}
    # Forward may ask for the gradient mode. Its own hooks run around this call.
    with normal_tensors(), no_sync(), set_aside(quantized.owner, True):
        try:
            if len(graphs) >= MOST_GRAPHS:
                raise NotCaptured(_too_many(quantized, call, name))
            recipe.add_graph(quantized, call)
        except OctavError as error:
            if has_data(quantized.owner, call):
                run_once(quantized.owner, *call, quantized.float_forward)
            own = own_python(quantized, call, recipe, error)
            for part in own.parts:
                part.capture_again = capture_again
            quantized.run_own_python(own)
            note = f"{name}: calls unlike the example run its own Python, over quantized children: {error}"
            add_records(quantized, mode, own.rows, [note])
            warnings.warn(note, stacklevel=2)
    _tell_new(quantized.owner, before, name)


def _quantize_anew(quantized: QuantizedModule, call: Inputs) -> None:
    """Make the graphs of a module of what it is made of now; quantizers of operands outside of what is new are kept."""
    owner, recipe = quantized.owner, quantized.recipe
    modules = dict(owner.named_modules())
    for path in replaced(owner):
        if path in modules and is_compiled(modules[path]):
            raise OctavError(
                f"{recipe.position.named(path)} was given to torch.compile, and is a part of a graph: compile the "
                "whole model (q.compile()), or quantize with blocks=, of which each can be compiled by itself"
            )
    places = [recipe.position.named(path) for path in replaced(owner)]
    before = {m for m in owner.modules() if isinstance(m, FakeQuantizer)}
    known = {
        (site, operand): quantizer
        for (site, operand), quantizer in quantizers_by_operand(quantized).items()
        if not any(is_at(site, place) for place in places)
    }
    tree, below = tree_of(owner), users_class(type(owner))
    make_users_own(owner)
    with normal_tensors(), no_sync():
        try:
            try:
                prepare_module(owner, call, recipe.config, recipe.position, recipe.user, both_modes=False)
                check_equal(owner, call)
                if not recipe.position.is_op:
                    check_in_turn(owner, call, recipe.config.fold_batchnorm)
            except NeedsCalls as reason:
                # Adapters in a model that is recomputed: from now on its own Python, over quantized children.
                parts = _parts_of(owner, call, recipe)
                parts.find_settings(owner, call, recipe.position.path)
                parts.descend(owner, [call], recipe.position.path, str(reason))
        except OctavError as error:
            restore(tree)
            raise OctavError(
                f"{', '.join(places)}: another one than octav_fx.quantize saw, and no graph holds it: {error}; put "
                "it there first, and quantize then"
            ) from error
    if below is not quantized.user_class:
        # Its forward, if it has one, is what calls this.
        owner.__class__ = below
    for anew in graphs_in(owner):
        anew.capture_again = capture_again
        take_quantizers(anew, known)
    if (whole := graphs_of(owner)) is not None:
        whole.examples = quantized.examples
    elif isinstance(owner, PartialModule) and not recipe.position.path:
        mark_outermost(owner, quantized.examples, parts)
    _tell_new(owner, before, recipe.position.path or quantized.user_class.__name__)


def _parts_of(owner: nn.Module, call: Inputs, recipe: Recipe) -> PartsQuantizer:
    """Return what quantizes the children of a module that runs its own Python."""
    path = recipe.position.path
    with users_own(owner):
        work = macs_by_module(owner, call)
    return PartsQuantizer(
        recipe.config,
        recipe.user,
        macs_by_module=[(f"{path}.{at}".strip("."), macs) for at, macs in work],
        workers={id(owner.get_submodule(at)) for at, _ in work},
    )


def quantize_replaced(module: PartialModule, call: Inputs) -> None:
    """Quantize what was put in the places of children of a module that runs its own Python.

    No mode of dispatch of the user's sees the runs that this takes. Raises OctavError where it cannot be: it would
    compute in float.
    """
    with without_users_modes(), kept_counts(cast(nn.Module, module)):
        _quantize_replaced(module, call)


def _quantize_replaced(module: PartialModule, call: Inputs) -> None:
    info, owner = module.octav_partial, cast(nn.Module, module)
    before = {m for m in owner.modules() if isinstance(m, FakeQuantizer)}
    recipe: Recipe = info.recipe
    path = recipe.position.path
    parts = _parts_of(owner, call, recipe)
    _quantize_below(owner, call)
    structure = vars(owner).pop(STRUCTURE)
    with normal_tensors(), no_sync():
        try:
            parts.descend(owner, [call], path, info.reason)
        except OctavError:
            vars(owner)[STRUCTURE] = structure
            raise
    if not path:
        mark_outermost(owner, info.example, parts)
    for graphs in graphs_in(owner):
        graphs.capture_again = capture_again
    _tell_new(owner, before, path or type(owner).__name__)


def _quantize_below(owner: nn.Module, call: Inputs) -> None:
    """Quantize anew, the innermost first, those modules below one whose own children were replaced."""
    changed = {path: module for path, module in owner.named_modules() if module is not owner and is_changed(module)}
    with users_own(owner):
        calls = record_calls(owner, [call], changed)
    for path, module in reversed(changed.items()):
        for made in calls[path][:1]:
            if (graphs := graphs_of(module)) is not None:
                _quantize_anew(graphs, made)
            elif is_changed(module) and isinstance(module, PartialModule):
                _quantize_replaced(module, made)


PartialModule.quantize_replaced = staticmethod(quantize_replaced)


def _too_many(quantized: QuantizedModule, call: Inputs, name: str) -> str:
    fault = quantized.why_not(*call)
    return (
        f"{len(quantized.graphs_of(quantized.training))} graphs were captured, and none holds for this call ({fault})"
    )


def _tell_new(owner: nn.Module, before: set[FakeQuantizer], name: str) -> None:
    """Warn of quantizers that freezing or an optimizer could not know of."""
    new = {path: m for path, m in owner.named_modules() if isinstance(m, FakeQuantizer) and m not in before}
    frozen = any(m.clip is not None for m in before)
    learned = [path for path, m in new.items() if m.learned is not None]
    if new and (frozen or learned):
        what = "finds its clip anew in each call: calibrate and freeze again" if frozen else "is in no optimizer yet"
        warnings.warn(f"{name}: a new graph was captured, and its quantizer {next(iter(new))} {what}", stacklevel=2)
