"""torch.compile(model, backend="octav"): quantize what Dynamo captured, and lower it with Inductor."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

import octav_fx
from octav_fx.backend import inductor
from octav_fx.backend.state import without_guards
from octav_fx.capture.from_dynamo import find_opaque, from_dynamo, has_quantizers, is_within_quantized, lift_hints
from octav_fx.compat.inductor import (
    CustomGraphPass,
    ShortenTraceback,
    compile_fx,
    get_hash_for_files,
    list_mode_options,
    list_options,
)
from octav_fx.config import Config
from octav_fx.errors import OctavError
from octav_fx.ir.edits import Edit, Kind
from octav_fx.ir.pipeline import Pass, run
from octav_fx.passes import FUSE, lower_passes, prepare_passes

_log = logging.getLogger("octav_fx")

# Options of lowering, with what each may be, the default first.
_LOWERING: Final = {
    "integer": ("off", "auto"),
    "keep": ("codes", "levels"),
    "backward": ("same", "bfloat16"),
    "solve": ("exact", "step"),
}
# Options of the backend itself: the fields of Config, those of lowering, and options of Inductor under one key.
_OPTIONS: Final = (*(field.name for field in dataclasses.fields(Config)), *_LOWERING, "inductor")


class _Refusal(OctavError, ShortenTraceback):
    """An OctavError that Dynamo passes on as it is, instead of wrapping it into an error of its own."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


def octav(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Return the backend. A graph with quantizers in it is lowered; any other is quantized first.

    options: the fields of octav_fx.Config, which say how a float model is quantized; "integer", "auto" to have forward
    multiply integer codes on a CPU where that takes less time, or "off"; "keep", "levels" to hold those of activations
    for backward instead of writing them again from their "codes"; "backward", "bfloat16" to have backward multiply
    codes and gradients in that dtype where a model is float32, or "same"; "solve", "step" for clips of activations one
    step of the recursion away from those of the last call, or "exact"; "inductor", a dict of options for Inductor.
    mode: one of Inductor's. Raises OctavError for an option or a mode that does not exist.
    """
    try:
        config, lower, patches = _settings(options, mode)
        is_quantized = has_quantizers(gm) or is_within_quantized()
        gm, hints = (gm, []) if is_quantized else _quantize(gm, list(example_inputs), config)
    except OctavError as error:
        raise _Refusal(str(error)) from error
    without_guards(gm)
    inductor.register()
    patches = _layouts(example_inputs) | patches
    patches |= {"joint_custom_pre_pass": _Stage(lower), "post_grad_custom_post_pass": _Stage(FUSE)}
    compiled: Any = compile_fx(gm, [*example_inputs, *hints], config_patches=patches)
    return functools.partial(_with_hints, compiled, hints) if hints else compiled


def _with_hints(compiled: Callable[..., Any], hints: list[Tensor], *args: Any) -> Any:
    return compiled(*args, *hints)


def _settings(options: Mapping[str, Any] | None, mode: str | None) -> tuple[Config, tuple[Pass, ...], dict[str, Any]]:
    """Return what to quantize with, what to lower with, and what to tell Inductor."""
    options = dict(options or {})
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise OctavError(f"options has no {', '.join(unknown)}; backend 'octav' takes {', '.join(_OPTIONS)}")
    patches = options.pop("inductor", {})
    known = set(list_options())
    if not isinstance(patches, Mapping) or (unknown := sorted(set(patches) - known)):
        detail = f"no option {', '.join(unknown)}" if isinstance(patches, Mapping) else f"no dict but {patches!r}"
        raise OctavError(f"options['inductor']: {detail}; torch._inductor.list_options() lists what there is")
    modes = list_mode_options()
    if mode is not None and mode not in modes:
        raise OctavError(f"mode={mode!r}: one of {', '.join(modes)}")
    lowering = {name: options.pop(name, values[0]) for name, values in _LOWERING.items()}
    for name, value in lowering.items():
        if value not in _LOWERING[name]:
            raise OctavError(f"options[{name!r}]={value!r}: one of {', '.join(map(repr, _LOWERING[name]))}")
    # No float keys or float mode have to be kept here, and training mode is compiled by itself.
    options.setdefault("fold_batchnorm", True)
    return Config(**options), lower_passes(**lowering), {**modes.get(mode or "default", {}), **patches}


def _layouts(example_inputs: Sequence[Any]) -> dict[str, Any]:
    """Convolutions on a CPU run channels last, their gradients too.

    By itself Inductor decides this for each graph by the convolutions in it, and a backward graph has only gradients of
    convolutions. It then goes by strides, and those of a depthwise weight [C, 1, 3, 3] do not tell (torch 2.13): each
    gradient got three copies into another layout, in which it took three to five times as long.
    """
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    one_dnn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return {"force_layout_optimization": True} if on_cpu and one_dnn else {}


# Hints outlive a recompilation and a second compilation of the same model. They belong to it: the first parameter of a
# graph stands for the model, and weakly, so that both can go.
_HINTS: Final = WeakIdKeyDictionary()


def _quantize(gm: fx.GraphModule, example_inputs: list[Any], config: Config) -> tuple[fx.GraphModule, list[Tensor]]:
    """Run PREPARE on a copy of a float graph; return it and its hints, which have become its last inputs."""
    if config.learned is not None:
        raise OctavError(
            f"clip={config.learned!r} is learned, and compiling a float model has no place for parameters: compile "
            f"octav_fx.quantize(model, inputs, octav_fx.Config(clip={config.learned!r})) instead"
        )
    if config.sync_clip:
        raise OctavError(
            "sync_clip=True: a float model that is compiled does not say which of its calls are training; compile what "
            "octav_fx.quantize returned instead"
        )
    gm = from_dynamo(gm)
    _tell([*find_opaque(gm), *run(gm, prepare_passes(config))])
    anchor = next((value for value in example_inputs if isinstance(value, torch.nn.Parameter)), None)
    known = {} if anchor is None else _HINTS.setdefault(anchor, {})
    hints = []
    for name, quantizer in lift_hints(gm).items():
        hint = known.setdefault(name, quantizer.hint)
        if hint.shape != quantizer.hint.shape or hint.device != quantizer.hint.device:
            hint = known[name] = quantizer.hint
        hints.append(hint)
    return gm, hints


def _tell(edits: list[Edit]) -> None:
    """Write what stays float, and why, to the log "octav_fx": a compiled model has no table."""
    for edit in edits:
        if not edit.declined:
            continue
        level = logging.WARNING if edit.kind is Kind.UNSUPPORTED else logging.INFO
        _log.log(level, "%s stays as it is: %s", f"{edit.node} {edit.operand or ''}".strip(), edit.detail)


class _Stage(CustomGraphPass):
    """A tuple of passes as Inductor calls them."""

    def __init__(self, passes: tuple[Pass, ...]) -> None:
        self._passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        assert graph.owning_module is not None
        run(graph.owning_module, self._passes)

    def uuid(self) -> Any:
        """Return the key of Inductor's cache of compiled graphs: the passes, and the sources of all that they ask."""
        # passes/ by itself: in a checkout it is a link, which rglob does not follow.
        folders = [Path(str(package.__file__)).parent for package in (octav_fx, octav_fx.passes)]
        files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")]
        return get_hash_for_files(tuple(map(str, sorted(files))), " ".join(p.__name__ for p in self._passes))
