"""Trees of tensors, fake tensors, dispatch."""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import detect_fake_mode
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _disable_current_modes as without_modes

__all__ = [
    "CHECKS",
    "NEEDS_DATA",
    "TORCH_GROUPED_MM",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "assert_true",
    "body_of",
    "composed",
    "copy_hooks",
    "detect_fake_mode",
    "dtypes_around",
    "functional",
    "has_vnni",
    "is_functorch_wrapped",
    "is_higher_order",
    "is_sharded",
    "make_fake",
    "mean_of_samples",
    "multiplies_unsigned_bytes",
    "normal_tensors",
    "packet_of",
    "pytree",
    "replace_extended_shape",
    "sample_of",
    "schema_of",
    "storage_id",
    "transform",
    "transforms",
    "validates_distributions",
    "version_of",
    "versions_of",
    "without_mode",
    "without_modes",
    "without_transforms",
    "without_users_modes",
]

# F.grouped_mm under its older name.
TORCH_GROUPED_MM: Final = torch._grouped_mm

# Functions that raise where a condition, the argument "cond" or "i" >= 0, does not hold.
CHECKS: Final = (
    *("_check", "_check_with", "_check_is_size", "_check_index", "_check_value", "_check_type"),
    *("_check_not_implemented", "_check_tensor_all", "_check_tensor_all_with"),
)

# torch.cond and its kin; to Dynamo checkpoint is one, too.
HigherOrderOperator: Final = torch._ops.HigherOrderOperator


def replace_extended_shape(function: Any) -> Any:
    """Let distributions find the shape of their samples by function(distribution, sample_shape); return what did."""
    original = torch.distributions.Distribution._extended_shape
    torch.distributions.Distribution._extended_shape = function  # type: ignore[method-assign]
    return original


def validates_distributions() -> bool:
    """Tell whether distributions check their arguments."""
    return bool(torch.distributions.Distribution._validate_args)


# assert as a graph can hold it.
assert_true = torch._assert

# What a fake tensor raises where only data could tell the answer.
NEEDS_DATA: Final = (DataDependentOutputException, DynamicOutputShapeException)


def storage_id(tensor: Tensor) -> int:
    """Return a number that two tensors share exactly where they share memory; fake tensors have one, too."""
    return int(tensor.untyped_storage()._cdata)


def make_fake(
    mode: FakeTensorMode,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    memory: Tensor | None = None,
    offset: int = 0,
) -> FakeTensor:
    """Return a fake tensor, in the memory of another one if that is given, as the mode itself makes them."""
    with in_kernel_invocation_manager(mode):
        made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if memory is not None:
        storage = memory.untyped_storage()
        with in_kernel_invocation_manager(mode):
            made.set_(storage, offset, shape, stride)
    return FakeTensor(mode, made, device)


def is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor is a plain one that make_fake_of() knows all of, and fills its memory."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.is_leaf
    if not is_plain or tensor.is_meta or tensor.is_quantized or is_functorch_wrapped(tensor):
        return False
    # Of these the mode makes others: views of fake tensors, and fake gradients.
    if tensor._is_view() or tensor.is_inference() or tensor.grad is not None or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def make_fake_of(mode: FakeTensorMode, tensor: Tensor, memory: Tensor | None = None) -> FakeTensor:
    """Return a fake tensor for a dense one, as mode.from_tensor() does in five times as long and remembers."""
    offset = int(tensor.storage_offset())
    made = make_fake(mode, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, memory, offset)
    made.requires_grad = tensor.requires_grad
    if isinstance(tensor, nn.Parameter):
        made._is_param = True
    return made


def transform() -> str | None:
    """Return the name of the innermost transform of torch.func that runs (Grad, Jvp, Vmap), or None.

    What torch.autograd.forward_ad computes is Jvp, too.
    """
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None:
        return "Jvp" if _is_forward_mode() else None
    return str(interpreter.key().name)


def transforms() -> set[str]:
    """Return the names of all transforms of torch.func that run, and Jvp in a level of torch.autograd.forward_ad."""
    stack = torch._C._functorch.get_interpreter_stack()
    return {str(interpreter.key().name) for interpreter in stack or ()} | ({"Jvp"} if _is_forward_mode() else set())


def _is_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Tell whether a tensor belongs to a transform of torch.func, and must not outlive it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def sample_of(tensor: Tensor) -> Tensor:
    """Return what a transform of torch.func stands for: of a batch the first sample, of all others the tensor below."""
    functorch = torch._C._functorch
    while is_functorch_wrapped(tensor):
        is_batch, axis = functorch.is_batchedtensor(tensor), functorch.maybe_get_bdim(tensor)
        tensor = functorch.get_unwrapped(tensor)
        if is_batch:
            tensor = tensor.select(axis, 0)
    return tensor


def mean_of_samples(tensor: Tensor) -> Tensor:
    """Return the mean over the samples of all batches that vmap runs."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(tensor):
        axis = functorch.maybe_get_bdim(tensor)
        tensor = functorch.get_unwrapped(tensor)
        with without_transforms():
            tensor = tensor.mean(axis)
    return tensor


def without_transforms() -> AbstractContextManager[Any]:
    """Let no transform of torch.func run inside; the others go on afterwards."""
    found: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, of which each rank has a part."""
    # Importing it takes long, and what nobody has imported nobody has made.
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def is_higher_order(op: Any) -> bool:
    """Tell whether an op takes functions or graphs among its arguments."""
    return isinstance(op, HigherOrderOperator)


def packet_of(op: Any) -> Any:
    """Return the op that an overload belongs to."""
    return op._overloadpacket


def functional(packet: Any) -> Any:
    """Return the op that addmm_ and its like are the in-place form of, or the op itself."""
    name = str(packet.__name__)
    return getattr(torch.ops.aten, name.removesuffix("_"), packet) if name.endswith("_") else packet


def composed(op: OpOverload, args: Any, kwargs: Any) -> Any:
    """Run an op as those that it is composed of; NotImplemented for one that has kernels of its own."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), composite):
        # Python's own way, if it has one, is a formula for what kernels do.
        return NotImplemented
    # Python's way through a recurrent layer knows each of its steps; all others take far longer than the kernel's.
    has_steps = op.name().partition("::")[2].partition(".")[0] in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    return op.decompose(*args, **kwargs) if has_steps else op._op_dk(composite, *args, **kwargs)


def body_of(op: OpOverload) -> Any:
    """Return the Python function of an op that torch.library.custom_op made of it and that writes nothing, or None."""
    is_ours = op.namespace in ("aten", "prim", "prims", "octav")
    definition = None if is_ours or op._schema.is_mutable else OPDEFS.get(op._schema.name)
    return None if definition is None else definition._init_fn


def schema_of(op: OpOverload) -> torch.FunctionSchema:
    """Return the schema of an op: its arguments with their names and defaults."""
    return op._schema


def is_mutable(function: Any) -> bool:
    """Tell whether a function is an op whose schema says that it writes into an argument."""
    if isinstance(function, OpOverloadPacket):
        return any(getattr(function, name)._schema.is_mutable for name in function.overloads())
    return isinstance(function, OpOverload) and function._schema.is_mutable


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written into; 0 of one made in inference mode, which keeps no count."""
    return versions_of((tensor,))[0]


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor has been written into, in one go: a list takes less time than calls."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def dtypes_around() -> tuple[Any, ...]:
    """Return what decides the dtypes of results besides those of arguments: autocast, and the default dtype."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return *autocast, torch.get_default_dtype()


def has_vnni() -> bool:
    """Tell whether the CPU adds up products of 8-bit integers in 32 bits."""
    return bool(torch.cpu._is_vnni_supported())


@functools.cache
def multiplies_unsigned_bytes() -> bool:
    """Tell whether torch's matmul of integers takes unsigned ones on a CPU; that of 2.11 does not."""
    try:
        torch._int_mm(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int8))
    except RuntimeError:
        return False
    return True


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Make tensors that training can use inside, under torch.inference_mode, too; the gradient mode stays."""
    # Leaving inference mode turns gradients on.
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return channels_last for images that lie so, contiguous for all else; of one channel the strides decide."""
    is_last = x.dim() == 4 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging a traceback of each shape error on fake tensors, which reach the user as one text."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def without_mode(mode: TorchFunctionMode) -> contextlib.AbstractContextManager[Any]:
    """Take a mode of torch functions away inside, if it is the innermost."""
    return _pop_mode_temporarily() if _get_current_function_mode() is mode else contextlib.nullcontext()


def without_users_modes() -> contextlib.AbstractContextManager[Any]:
    """Take the modes of dispatch away inside, which count or keep what ops compute, unless one of them is torch's."""
    is_torchs = any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())
    return contextlib.nullcontext() if is_torchs else without_modes()


def copy_hooks(tensor: Tensor, other: Tensor, copied: Callable[[Any], Any]) -> None:
    """Put the hooks on the gradient of a leaf on another one, each as a function gives it."""
    asks = other.requires_grad
    for name, register in (
        ("_backward_hooks", other.register_hook),
        ("_post_accumulate_grad_hooks", other.register_post_accumulate_grad_hook),
    ):
        for hook in (getattr(tensor, name) or {}).values():
            # A frozen one keeps the hooks that it has, and takes no new ones.
            other.requires_grad_()
            register(copied(hook))
    other.requires_grad_(asks)
