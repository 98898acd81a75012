"""quantize(): capture a copy of the model, run the passes, fill the hints. float_mode(): the way back, for a while."""

import contextlib
import gc
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from octav_fx.capture.counts import kept_counts
from octav_fx.capture.inputs import Inputs, as_inputs
from octav_fx.capture.module_state import deep_copy
from octav_fx.capture.modules import graphs_in, graphs_of, quantized_modules
from octav_fx.capture.partial import float_records
from octav_fx.capture.rerun import has_data, preserved_modes, run_once
from octav_fx.compat.modules import is_compiled
from octav_fx.compat.tensors import is_sharded, normal_tensors, without_users_modes
from octav_fx.config import Config, fits
from octav_fx.errors import OctavError
from octav_fx.ir.op import Op
from octav_fx.ir.ops import UserRules
from octav_fx.ir.records import NOT_CALLED, Record
from octav_fx.nn import FakeQuantizer
from octav_fx.training.again import capture_again
from octav_fx.training.blocks import Blocks, find_blocks
from octav_fx.training.by_parts import quantize_by_parts
from octav_fx.training.capturing import arguments_of
from octav_fx.training.progress import progress, step

# So many times the objects that are there otherwise before garbage is collected.
_RARER: Final = 10
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def quantize(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    config: Config | Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    rules: Sequence[Op] = (),
    leaves: Sequence[type[nn.Module]] = (),
    recurrent: str = "float",
    blocks: Blocks | None = None,
    examples: Sequence[Any] = (),
) -> nn.Module:
    """Copy the model, with a fake-quantizer before every matmul and convolution operand, ready to train.

    example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; a batch like those to come. It
    decides which way Python branches go, fills the hints, and is what table() measures; it is run a few times.
    config: a Config, or a dict of its fields.
    rules: an octav_fx.Rule for each function of your own (or op of torch.ops) whose operands are to be quantized.
    leaves: classes of modules to leave as they are, float.
    recurrent: "float" leaves LSTM, GRU, RNN and their cells as they are; "unrolled" writes them as linear layers, one
    for each step of the example, which are quantized like any others. Packed sequences stay float.
    blocks: which modules are graphs of their own, called as modules by the Python around them: classes or names of
    modules, or "auto", the repeated blocks of the model. Hooks on blocks fire, and they can be checkpointed, compiled
    and sharded one by one. The default is "auto" for models of transformers and for those with activation
    checkpointing, and () for all others: the whole model in one graph.
    examples: further calls of other kinds, each given as example_inputs is: other optional arguments, a sequence of
    one token. A graph for each is captured now, which is done anyhow when such a call comes.
    What has hooks already, on its forward or its backward, is a graph of its own, too, so that they run in each call.
    Returns a module of the model's own class, in the same mode, on the same devices, with every float state_dict key
    and its value. Its forward is a graph; or, with blocks and where no single graph holds the model's Python code, the
    model's own over graphs below. What stays float is in table(q), with the file and line that stopped the capture.
    Calling what a graph holds in another way, and hooks on it, raise OctavError.
    Raises OctavError for a model of which nothing can be captured, for operands that are not floating point, and with
    strict=True if anything that multiplies stays float in the present mode, or, in a model in parts, was not run.
    """
    if not isinstance(config, Config):
        config = Config.from_dict(config or {})
    _check_model(model)
    config = _with_names(config, model)
    example = as_inputs(example_inputs)
    # Wrong arguments are the caller's error, not something to descend from.
    arguments_of(model, example)
    user = _user_rules(rules, leaves, recurrent)
    with progress("octav_fx.quantize"), _without_old_garbage(), without_users_modes(), normal_tensors():
        copied = _copy(model)
        with kept_counts(copied):
            quantized = quantize_by_parts(copied, example, config, user, find_blocks(copied, blocks).values())
            _check_choices(quantized, model, config, rules, strict)
            if has_data(quantized, example):
                step("filling hints of", "")
                run_once(quantized, *example)
                for further in map(as_inputs, examples):
                    arguments_of(model, further)
                    run_once(quantized, *further)
                _begin_learned(quantized, example)
    _put_back(model, quantized)
    return quantized


@contextmanager
def _without_old_garbage() -> Iterator[None]:
    """Let the garbage collector pass over what is there already, such as all that the libraries have made.

    It runs less often inside: graphs are many small objects that stay.
    """
    # Somebody else's would be given back, too.
    if gc.get_freeze_count():
        yield
        return
    first, *others = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_RARER * first, *others)
    try:
        yield
    finally:
        gc.set_threshold(first, *others)
        gc.unfreeze()


def _check_choices(quantized: nn.Module, model: nn.Module, config: Config, rules: Sequence[Op], strict: bool) -> None:
    """Check that what the caller asked for is there: overrides, rules, and with strict that nothing stays float."""
    graphs = quantized_modules(quantized)
    for part in graphs:
        part.capture_again = capture_again
    captured = [row for part in graphs for mode in part.all_records.values() for row in mode]
    _check_overrides(config, [*captured, *float_records(quantized)])
    for rule in rules:
        if all(row.op != rule.name for row in captured):
            raise OctavError(
                f"rules: no graph calls {rule.target}, whose rule is {rule.name!r}; a function is seen where a forward "
                "calls it by a global name that does not begin with an underscore"
            )
    if not any(row.quantizer for row in captured):
        why = dict.fromkeys(str(row.reason) for row in (*captured, *float_records(quantized)))
        warnings.warn(
            f"nothing of this {type(model).__name__} is quantized: {'; '.join(why) or 'it multiplies no matrices'}",
            stacklevel=3,
        )
    if strict:
        # What no graph calls yet is quantized by the graph of the first call that leads there.
        held = (row for part in graphs for row in part.records if row.reason != NOT_CALLED)
        _check_strict([*float_records(quantized), *held])


def _put_back(model: nn.Module, quantized: nn.Module) -> None:
    """Give q the state of the model again, where a forward has written into parameters: a teacher that follows."""
    with torch.no_grad():
        for name, held in itertools.chain(model.named_parameters(), model.named_buffers()):
            owner, _, last = name.rpartition(".")
            own = getattr(quantized.get_submodule(owner), last)
            is_dense = held.layout is torch.strided and not held.is_meta
            # Of another shape it is a table that forward has made, and that the graph reads.
            is_same = isinstance(own, Tensor) and own.shape == held.shape
            if is_dense and is_same and not torch.equal(own, held):
                own.data.copy_(held)


@contextmanager
def float_mode(q: nn.Module) -> Iterator[None]:
    """Let q and every quantized module in it compute inside what the float model computes, bit for bit."""
    with ExitStack() as stack:
        # Float is what modules compute that were replaced since, too.
        for module in graphs_in(q) or quantized_modules(q):
            stack.enter_context(module.as_float())
        yield


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise OctavError(f"quantize takes an nn.Module, not {type(model).__name__}")
    if isinstance(model, _WRAPPERS):
        raise OctavError(
            "quantize the module first and wrap it in DistributedDataParallel afterwards: pass model.module"
        )
    if is_compiled(model):
        raise OctavError("quantize the module first and compile it afterwards: pass model._orig_mod")
    if isinstance(model, torch.jit.ScriptModule):
        raise OctavError("a scripted module has no Python code to capture: quantize the module that was scripted")
    if "forward" in vars(model):
        raise OctavError(f"forward of this {type(model).__name__} was replaced on the instance: define it in the class")
    if any(graphs_of(module) is not None for module in model.modules()):
        raise OctavError("the model, or a part of it, is quantized already")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise OctavError(f"{name} has no shape yet: run the model once before quantizing it")
        if is_sharded(parameter):
            raise OctavError(
                f"{name} is a DTensor: quantize the module first, with blocks=, and shard its blocks by "
                "torch.distributed.fsdp.fully_shard afterwards; tensor parallelism no graph runs"
            )


def _begin_learned(q: nn.Module, example: Inputs) -> None:
    """Mark the learned clips that the example inputs have reached as begun, in both modes where each has a graph."""
    learned = [m for m in q.modules() if isinstance(m, FakeQuantizer) and m.learned is not None]
    for quantizer in learned:
        quantizer.initialized = bool(quantizer.hint.any())
    if all(quantizer.initialized for quantizer in learned):
        return
    # Where the other mode does not run on the example inputs, its quantizers begin with the first data they get.
    with contextlib.suppress(Exception), preserved_modes(q):
        run_once(q.train(not q.training), *example)
    for quantizer in learned:
        quantizer.initialized = bool(quantizer.hint.any())


def _user_rules(rules: Sequence[Op], leaves: Sequence[type[nn.Module]], recurrent: str) -> UserRules:
    if recurrent not in ("float", "unrolled"):
        raise OctavError(f'recurrent: {recurrent!r} is neither "float" nor "unrolled"')
    for rule in rules:
        if not isinstance(rule, Op) or not callable(rule.target):
            raise OctavError(f"rules: {rule!r} is no octav_fx.Rule with a function as its target")
    if isinstance(leaves, type):
        raise OctavError(f"leaves={leaves!r}: a list of classes, [{leaves.__name__}]")
    for leaf in leaves:
        if not (isinstance(leaf, type) and issubclass(leaf, nn.Module)):
            raise OctavError(f"leaves: {leaf!r} is no class of modules")
    return UserRules(tuple(rules), tuple(leaves), recurrent == "unrolled")


def _copy(model: nn.Module) -> nn.Module:
    try:
        return deep_copy(model)
    except Exception as error:
        raise OctavError(
            f"{type(model).__name__} cannot be copied (copy.deepcopy), and quantize changes only a copy: {error}"
        ) from error


def _check_overrides(config: Config, found: list[Record]) -> None:
    places = {(record.site, record.operand) for record in found}
    for pattern in map(str, config.overrides):
        # A glob may lose every node to a later or exact one; a pattern that fits no node at all is a typing error.
        if not any(fits(pattern, *place) for place in places):
            by_operand = "/" in pattern
            there = {f"{site}/{operand}" if by_operand and operand else site for site, operand in places}
            raise OctavError(f"overrides[{pattern!r}] fits no node; there are {', '.join(sorted(there))}")


def _with_names(config: Config, model: nn.Module) -> Config:
    """Write the names of its modules for each class that a Config has overrides for."""
    overrides: dict[str | type, Mapping[str, Any] | None] = {}
    for pattern, settings in config.overrides.items():
        if isinstance(pattern, type):
            names = [name or "*" for name, module in model.named_modules() if isinstance(module, pattern)]
            if not names:
                raise OctavError(f"overrides[{pattern.__name__}]: no module of this {type(model).__name__} is one")
            pattern = "|".join(names)
        overrides[pattern] = settings
    return replace(config, overrides=overrides)


def _check_strict(rows: list[Record]) -> None:
    float_records = [row for row in rows if row.quantizer is None]
    if float_records:
        listing = "\n".join(f"  {row.site} {row.operand or ''}: {row.reason}" for row in float_records)
        raise OctavError(f"strict=True, and {len(float_records)} operands stay float:\n{listing}")
