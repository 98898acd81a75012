"""Python that a tracer cannot see, made visible while it runs: factories, isinstance, the training flag."""

import contextlib
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx.capture.symbolic.proxies import PROXIES, TrainingFlag
from octav_fx.compat.tensors import pytree

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

# What these make belongs to one call of forward: made at capture, it would keep what was drawn or written then.
_FACTORIES: Final = (
    *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "zeros", "tril_indices", "triu_indices"),
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "tensor", "as_tensor"),
)
# These want the number itself, or a dtype, and refuse a proxy for it.
_OF_PROXY: Final = ("finfo", "iinfo")
PLAIN: Final = (type(None), bool, int, float, str, torch.dtype, torch.device)
_LITERAL: Final = (*PLAIN, complex, torch.layout, torch.memory_format, torch.Generator)


@contextlib.contextmanager
def symbolic_torch(tracer: "ValueTracer") -> Iterator[None]:
    """Make nodes, while tracing, of functions of torch that refuse proxies or that must run anew with the graph."""

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves = pytree.tree_leaves((args, kwargs))
            if tracer.evaluating or not all(isinstance(leaf, _LITERAL) or type(leaf) in PROXIES for leaf in leaves):
                return original(*args, **kwargs)
            return tracer.create_proxy("call_function", original, args, kwargs)

        return call

    def of_proxy(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if any(type(arg) in PROXIES for arg in args):
                return tracer.create_proxy("call_function", original, args, {})
            return original(*args)

        return call

    def is_tensor(x: Any) -> bool:
        return isinstance(x.value if type(x) in PROXIES else x, Tensor)

    originals = {name: getattr(torch, name) for name in (*_FACTORIES, *_OF_PROXY, "is_tensor")}
    patched = {name: factory(originals[name]) for name in _FACTORIES}
    patched |= {name: of_proxy(originals[name]) for name in _OF_PROXY}
    patched["is_tensor"] = is_tensor
    try:
        for name, function in patched.items():
            setattr(torch, name, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextlib.contextmanager
def training_flags(tracer: "ValueTracer", root: nn.Module) -> Iterator[None]:
    """Make module.training a flag that the tracer sees; afterwards, whatever happened, it is the bool again."""
    # nn.Module keeps it as a plain attribute; a scripted module does not, and has no Python code to read it.
    modes = {module: module.training for module in root.modules() if "training" in module.__dict__}
    try:
        for name, module in root.named_modules():
            if module not in modes:
                continue
            module.__dict__["training"] = TrainingFlag(tracer, f"{name}.training".lstrip("."), module.training)
        yield
    finally:
        for module, training in modes.items():
            module.__dict__["training"] = training


@contextlib.contextmanager
def plain_training(module: nn.Module | None) -> Iterator[None]:
    """Show real bools while a leaf module is evaluated: compiled functions take nothing else."""
    modules = [] if module is None else [m for m in module.modules() if "training" in m.__dict__]
    flags = {m: m.__dict__["training"] for m in modules}
    for m, flag in flags.items():
        m.__dict__["training"] = bool(getattr(flag, "value", flag))
    try:
        yield
    finally:
        for m, flag in flags.items():
            m.__dict__["training"] = flag


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging a traceback of each shape error, which reach the user as one OctavError."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


@contextlib.contextmanager
def symbolic_isinstance(root: nn.Module) -> Iterator[None]:
    """Let isinstance(x, Tensor) be True of a proxy for a tensor, in torch.nn.functional and files of forward methods.

    Shadowed in those files rather than answered by the proxy: torch's C++ would take such a proxy for a tensor.
    """

    def symbolic(x: Any, kinds: Any) -> bool:
        return isinstance(x, kinds) or (type(x) in PROXIES and isinstance(x.value, kinds))

    # A scripted module has no Python code.
    forwards = (inspect.getattr_static(type(m), "forward", None) for m in root.modules())
    files = {id(f.__globals__): f.__globals__ for f in forwards if isinstance(f, types.FunctionType)}
    files[id(vars(F))] = vars(F)
    shadowed = [names for names in files.values() if "isinstance" not in names]
    try:
        for names in shadowed:
            names["isinstance"] = symbolic
        yield
    finally:
        for names in shadowed:
            del names["isinstance"]
