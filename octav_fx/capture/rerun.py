"""Running a model once without leaving a trace."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from octav_fx.capture.chance import same_random_numbers
from octav_fx.capture.contents import Contents
from octav_fx.capture.inputs import Inputs, same_kind, sample_call, tensors_of
from octav_fx.capture.module_state import own_copy, preserved_attributes
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.permits import permitted
from octav_fx.clips.distributed import no_sync
from octav_fx.compat.graphs import replaced_while_loop
from octav_fx.compat.tensors import is_functorch_wrapped, pytree, transforms, without_transforms
from octav_fx.ir.macs import MacCounter
from octav_fx.nn import FakeQuantizer

# Larger numbers stand for minus infinity in masks.
_MASKED: Final = 1e30
# A text of so many letters is read in an error.
_LONG: Final = 80
# Rounding moves an index (argmax) to its neighbour so often at most.
_RARELY: Final = 0.1


def has_data(module: nn.Module, inputs: Any) -> bool:
    """Tell whether nothing is on the meta device, so that the module can run."""
    return not any(t.is_meta for t in (*module.parameters(), *module.buffers(), *tensors_of(inputs)))


def run_once(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    forward: Callable[..., Any] | None = None,
    *,
    gradients: bool = False,
) -> Any:
    """Return the outputs of one forward in the module's own mode; state, random states and inputs are as before.

    Only the hints of quantizers change. forward: what to call in place of the module. gradients: the gradient mode.
    """
    contents = Contents.of(module)
    with preserved_tensors(module, contents), preserved_attributes(module, contents):
        own_args, own_kwargs = own_copy((args, dict(kwargs)))
        return run_keeping_state(module, own_args, own_kwargs, forward, gradients=gradients, contents=contents)


@contextmanager
def preserved_tensors(module: nn.Module, contents: Contents | None = None) -> Iterator[Callable[[], bool]]:
    """Put back, afterwards, what the tensors of modules held that forward may write into; hints may change.

    Those are buffers, plain attributes, and the parameters that a graph writes into. contents: what the modules hold,
    where somebody has looked. Gives a function that tells whether they hold what they held.
    """
    contents = contents or Contents.of(module)
    hints = {m.hint for m in contents.modules if isinstance(m, FakeQuantizer)}
    written = [p for m in contents.modules if (graphs := graphs_of(m)) is not None for p in graphs.written_parameters()]
    kept = [t for t in (*contents.state_tensors(), *written) if t not in hints and not t.is_inference()]
    before = {t: t.detach().clone() for t in kept}

    def are_kept() -> bool:
        return all(_is_kept(tensor, old) for tensor, old in before.items())

    try:
        yield are_kept
    finally:
        with torch.no_grad():
            for tensor, old in before.items():
                # An expanded one cannot be written, and nobody has. Past autograd, for which it holds what it held: the
                # statistics of a batch norm that ran before, in the forward that needs a new graph.
                if not _is_kept(tensor, old):
                    tensor.data.copy_(old)


def _is_kept(tensor: Tensor, old: Tensor) -> bool:
    """Tell whether a tensor is known to hold what it held: sparse ones cannot be compared."""
    return not tensor.is_meta and tensor.layout is torch.strided and torch.equal(tensor, old)


def run_keeping_state(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    forward: Callable[..., Any] | None = None,
    *,
    gradients: bool = False,
    contents: Contents | None = None,
) -> Any:
    """Run a forward like run_once, but keep what it sets on its modules and writes into its inputs.

    contents: what the modules hold, where somebody has looked.
    """
    # Where no GPU has begun to work, nothing is on one, and nobody needs to look.
    tensors = itertools.chain(module.parameters(), module.buffers()) if torch.cuda.is_initialized() else ()
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    with (
        torch.set_grad_enabled(gradients),
        torch.random.fork_rng(devices=sorted(devices)),
        same_random_numbers(module, contents),
        no_sync(),
    ):
        return (forward or module)(*args, **kwargs)


@contextmanager
def preserved_modes(module: nn.Module) -> Iterator[None]:
    """Put back, afterwards, the mode of every module, frozen BatchNorms too."""
    modes = {m: m.training for m in module.modules()}
    try:
        yield
    finally:
        for m, training in modes.items():
            if graphs_of(m) is not None:
                m.train(training)
        for m, training in modes.items():
            m.training = training


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Set every module to eval mode inside."""
    with preserved_modes(module):
        module.eval()
        yield


@contextmanager
def without_quantizers(module: nn.Module) -> Iterator[None]:
    """Let every quantizer return its input inside: the rewritten graph computes in float."""
    # Those of an outer such region are silent already.
    quantizers = [m for m in module.modules() if isinstance(m, FakeQuantizer) and "forward" not in vars(m)]
    for quantizer in quantizers:
        quantizer.__dict__["forward"] = lambda x: x
    try:
        yield
    finally:
        for quantizer in quantizers:
            del quantizer.__dict__["forward"]


@contextmanager
def unwritten_as_nan() -> Iterator[None]:
    """Let memory that no op writes hold NaN inside: rows beyond the last group of a grouped product, say.

    What it holds otherwise is chance, and two runs of one model differ there.
    """
    # torch names what it holds nowhere that a type checker sees.
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    is_on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Not that some op has no such algorithm.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=warns)
        memory.fill_uninitialized_memory = fill


def macs_by_module(root: nn.Module, call: Inputs) -> list[tuple[str, int]]:
    """Count what each innermost module multiplies, in the order in which they do: (path, multiply-accumulates)."""
    found: list[tuple[str, int]] = []
    inside = [""]
    counted = 0

    def settle() -> None:
        nonlocal counted
        if counter.macs > counted:
            found.append((inside[-1], counter.macs - counted))
            counted = counter.macs

    def enter(path: str) -> None:
        settle()
        inside.append(path)

    def leave() -> None:
        settle()
        inside.pop()

    with (
        MacCounter() as counter,
        _plain_control(),
        _hooked(dict(root.named_modules()), lambda path, _: enter(path), lambda path, failed: leave()),
    ):
        run_once(root, *call)
        settle()
    return found


def record_calls(
    module: nn.Module, calls: Iterable[Inputs], children: Mapping[str, nn.Module], transformed: set[str] | None = None
) -> dict[str, list[Inputs]]:
    """Record how a module calls its children: the first Inputs of each kind that its own calls lead to.

    A call that fails is none that a child could be captured with, nor is any of one that a branch of torch.cond calls,
    a while_loop, or a transform of torch.func; but of what vmap calls, with parameters that all samples share, it is
    that of the first sample. transformed: gets the names of what is called inside of a transform.
    """
    found: dict[str, list[Inputs]] = {name: [] for name in children}
    unfit: set[str] = set()
    begun: dict[str, list[Inputs | None]] = {name: [] for name in children}

    def enter(name: str, made: Inputs) -> None:
        kinds = transforms()
        if kinds and transformed is not None:
            transformed.add(name)
        has_own_parameters = any(map(is_functorch_wrapped, children[name].parameters()))
        is_hidden = bool(branches) or bool(kinds - {"Vmap"}) or has_own_parameters
        if is_hidden:
            unfit.add(name)
        with without_transforms():
            sample = sample_call(made)
            is_known = is_hidden or any(same_kind(sample, known) for known in found[name])
            begun[name].append(None if is_known else own_copy(sample))

    def leave(name: str, failed: bool) -> None:
        made = begun[name].pop()
        if made is not None and not failed:
            found[name].append(made)

    with _plain_control() as branches, _hooked(children, enter, leave):
        for call in calls:
            run_once(module, *call)
    return {name: [] if name in unfit else calls for name, calls in found.items()}


@contextmanager
def _plain_control() -> Iterator[list[Any]]:
    """Let torch.cond and while_loop go on in Python inside: they compile what they are given, past hooks and counters.

    Yields the predicates of the branches, and the conditions of the loops, that are being run.
    """
    original, running = torch.cond, list[Any]()

    def choose(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
        running.append(pred)
        try:
            return true_fn(*operands) if pred else false_fn(*operands)
        finally:
            running.pop()

    def loop(cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Any) -> Any:
        running.append(cond_fn)
        try:
            while cond_fn(*carried):
                carried = body_fn(*carried)
        finally:
            running.pop()
        return carried

    torch.cond = choose
    try:
        with replaced_while_loop(loop):
            yield running
    finally:
        torch.cond = original


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], enter: Callable[[str, Inputs], None], leave: Callable[[str, bool], None]
) -> Iterator[None]:
    """Run enter(path, call) before each call of the modules inside, and leave(path, whether it failed) after it."""
    handles = []
    for path, module in modules.items():
        if path and not isinstance(module, torch.jit.ScriptModule):
            succeeded: list[nn.Module] = []

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                enter(path, Inputs(args, kwargs))

            def success(m: nn.Module, args: Any, result: Any, succeeded: list[nn.Module] = succeeded) -> None:
                succeeded.append(m)

            def after(
                _: nn.Module, args: Any, result: Any, path: str = path, succeeded: list[nn.Module] = succeeded
            ) -> None:
                leave(path, not succeeded)
                succeeded.clear()

            with permitted():
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(success))
                handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference_where_written(expected: Any, found: Any) -> str | None:
    """Say how results under unwritten_as_nan() differ, but for what is NaN in the first; or return None."""
    expected_leaves, spec = pytree.tree_flatten(expected)
    found_leaves, found_spec = pytree.tree_flatten(found)
    if spec != found_spec:
        return difference(expected, found)

    def written(e: Any, f: Any) -> Any:
        are_alike = isinstance(e, Tensor) and isinstance(f, Tensor) and e.shape == f.shape and e.dtype == f.dtype
        return torch.where(e.isnan(), e, f) if are_alike and e.layout is f.layout is torch.strided else f

    return difference(expected_leaves, [written(e, f) for e, f in zip(expected_leaves, found_leaves, strict=True)])


def _written(spec: Any) -> str:
    """Return a structure in one line: long ones by the number of their values."""
    text = " ".join(str(spec).split())
    return text if len(text) <= _LONG else f"a structure of {spec.num_leaves} values"


def difference(expected: Any, found: Any) -> str | None:
    """Say how two results of a model differ by more than rounding, or return None. NaN equals NaN."""
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    found_leaves, found_spec = pytree.tree_flatten(found)
    if expected_spec != found_spec:
        return f"its result is {_written(found_spec)} instead of {_written(expected_spec)}"
    for e, f in zip(expected_leaves, found_leaves, strict=True):
        if isinstance(e, Tensor) and isinstance(f, Tensor) and e.layout is f.layout is not torch.strided:
            # Few functions of torch know what is sparse.
            e, f = e.to_dense(), f.to_dense()
        if not isinstance(e, Tensor) or not isinstance(f, Tensor):
            if type(e) is not type(f):
                return f"it returns {f!r} instead of {e!r}"
        elif e.shape != f.shape or e.dtype != f.dtype:
            return f"it returns {f.dtype} {tuple(f.shape)} instead of {e.dtype} {tuple(e.shape)}"
        elif not torch.equal(e, f) and e.is_floating_point():
            # Fused inference paths of torch (attention) round otherwise; another branch taken differs by far more.
            e, f = e.double(), f.double()
            # Masks and what is no number count by their places: beside them all else would be nothing.
            ordinary = e.abs() < _MASKED
            if not torch.equal(ordinary, f.abs() < _MASKED):
                return f"its result of shape {tuple(e.shape)} is inf, NaN or masked in other places"
            e, f = e[ordinary], f[ordinary]
            if (e - f).norm() > 1e-2 * e.norm():
                return f"its result of shape {tuple(ordinary.shape)} is off by {float((e - f).norm() / e.norm()):.1%}"
        elif not e.is_floating_point() and (e != f).double().mean() > _RARELY:
            return f"its result of shape {tuple(e.shape)} and {e.dtype} is another one"
    return None
