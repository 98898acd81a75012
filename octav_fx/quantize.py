"""quantize(): capture a copy of the model, run the passes, fill the hints. float_mode(): the way back, for a while."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from octav_fx.config import Config
from octav_fx.errors import OctavError
from octav_fx.graph.capture import Capture, capture
from octav_fx.graph.module import QuantizedModule, quantized_modules
from octav_fx.graph.observe import as_call, difference, has_data, run_once, without_quantizers
from octav_fx.graph.pipeline import run
from octav_fx.graph.record import Record, records
from octav_fx.passes.quantize_operands import remove_unused

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def quantize(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    config: Config | None = None,
    *,
    strict: bool = False,
) -> QuantizedModule:
    """A copy of the model with a fake-quantizer before every matmul and convolution operand, ready to train.

    example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; a batch like those to come. It
    decides which way Python branches go, fills the hints, and is what table() measures; it is run once.
    Returns an fx.GraphModule in the same mode, on the same devices, with every float state_dict key and its value.
    Raises OctavError for a model that cannot be captured (with the file and line that stopped it), for operands that
    are not floating point, and with strict=True if any multiply-accumulate stays float.
    """
    config = Config() if config is None else config
    _check_model(model)
    args, kwargs = as_call(example_inputs)
    arguments = _bind(model, args, kwargs)
    float_module = _copy(model)
    graphs, missing, notes = _graphs(float_module, arguments)
    quantized = QuantizedModule(float_module, graphs, {})
    found: dict[bool, list[Record]] = {}
    for mode in quantized.modes:
        quantized.graph = graphs[mode]
        edits = run(quantized, config.passes())
        found[mode] = records(graphs[mode], edits)
        notes += [f"{edit.node}: {edit.detail}" for edit in edits if edit.declined and edit.detail.startswith("not ")]
    quantized.graph = graphs[model.training]
    quantized.meta["octav"] = {
        "config": config.to_dict(),
        "records": {mode: found.get(mode, found[model.training]) for mode in graphs},
        "notes": list(dict.fromkeys(notes)),
        "missing": missing,
    }
    quantized.examples = (args, kwargs)
    _check_overrides(config, found)
    remove_unused(quantized, list(graphs.values()))
    _drop_values(graphs)
    if strict:
        _check_strict(found[model.training])
    if has_data(quantized, (args, kwargs)):
        _check_captured(quantized, args, kwargs)
        run_once(quantized, args, kwargs)
    return quantized


@contextmanager
def float_mode(q: nn.Module) -> Iterator[None]:
    """Inside, q and every quantized module in it compute what the float model computes, bit for bit."""
    with ExitStack() as stack:
        for module in quantized_modules(q):
            stack.enter_context(module.as_float())
        yield


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise OctavError(f"quantize takes an nn.Module, not {type(model).__name__}")
    if isinstance(model, _WRAPPERS):
        raise OctavError(
            f"quantize the module first and wrap it in {type(model).__name__} afterwards: pass model.module"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise OctavError("quantize the module first and compile it afterwards: pass model._orig_mod")
    if "forward" in vars(model):
        raise OctavError(f"forward of this {type(model).__name__} was replaced on the instance: define it in the class")
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise OctavError("the model, or a part of it, is quantized already")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise OctavError(f"{name} has no shape yet: run the model once before quantizing it")


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise OctavError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise OctavError(
            f"{type(model).__name__} cannot be copied (copy.deepcopy), and quantize changes only a copy: {error}"
        ) from error


def _graphs(module: nn.Module, arguments: Mapping[str, Any]) -> tuple[dict[bool, fx.Graph], str | None, list[str]]:
    """A graph for each mode; why the other mode has none, if it needs its own and cannot be captured; notes."""
    mode = module.training
    captured = _capture(module, arguments, mode)
    graphs = {mode: captured.graph, (not mode): captured.graph}
    if captured.depends_on_training:
        try:
            graphs[not mode] = _capture(module, arguments, not mode).graph
        except OctavError as error:
            # Often inputs too small for an auxiliary head. The captured mode works; train() or eval() will say this.
            del graphs[not mode]
            missing = f"{'eval' if mode else 'training'} mode is not captured: {error}"
            return graphs, missing, [*captured.notes, missing]
    return graphs, None, list(captured.notes)


def _capture(module: nn.Module, arguments: Mapping[str, Any], mode: bool) -> Capture:
    """Capture in one mode; afterwards each module is in the mode it was in, frozen BatchNorms too."""
    modes = {m: m.training for m in module.modules()}
    if module.training != mode:
        module.train(mode)
    try:
        return capture(module, arguments)
    finally:
        for m, training in modes.items():
            m.training = training


def _check_captured(quantized: QuantizedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The rewritten graph without its quantizers has to compute what the float model computes."""
    with quantized.as_float():
        expected = run_once(quantized, args, kwargs)
    with without_quantizers(quantized):
        found = run_once(quantized, args, kwargs)
    if detail := difference(expected, found):
        raise OctavError(
            f"the captured graph does not compute what the model's forward does: {detail}. Python code in forward may "
            "look at something a graph does not have, such as the identity of a dtype; make it explicit there"
        )


def _check_overrides(config: Config, found: Mapping[bool, list[Record]]) -> None:
    sites = {record.site for rows in found.values() for record in rows}
    matched = {config.pattern_for(site) for site in sites}
    for pattern in config.overrides:
        # A glob may lose every node to a later or exact one; a pattern that fits no node at all is a typing error.
        if pattern not in matched and not any(_fits(site, pattern) for site in sites):
            raise OctavError(f"overrides[{pattern!r}] fits no node; there are {', '.join(sorted(sites))}")


def _fits(site: str, pattern: str) -> bool:
    return Config(overrides={pattern: None}).pattern_for(site) is not None


def _drop_values(graphs: Mapping[bool, fx.Graph]) -> None:
    """Fake tensors were for the passes; kept, they would stand in the way of copying and pickling."""
    for graph in graphs.values():
        for node in graph.nodes:
            node.meta = {"site": node.meta["site"]} if "site" in node.meta else {}


def _check_strict(rows: list[Record]) -> None:
    floats = [row for row in rows if row.quantizer is None]
    if floats:
        listing = "\n".join(f"  {row.site} {row.operand or ''}: {row.reason}" for row in floats)
        raise OctavError(f"strict=True, and {len(floats)} operands stay float:\n{listing}")
