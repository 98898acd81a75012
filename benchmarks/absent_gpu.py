"""What Inductor generates for a GPU that is not here: the code of both halves of a compiled step, which nothing runs.

The step is traced on the CPU. When AOTAutograd hands the joint graph to the first pass, every fake value in it is moved
to the GPU (autograd itself needs a build with CUDA); from there on passes, partitioner and Inductor work for it.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils import _triton as triton_of_torch

from octav_fx.backend import entry
from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of

GPU = torch.device("cuda", 0)
# Of an H100, as far as Inductor asks.
PROPERTIES = SimpleNamespace(
    name="absent",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    shared_memory_per_block_optin=232448,
)

# Of the sectors of 32 bytes, 16 elements of half precision, in which memory is read and written, those with a clipped
# element in them: at 4 bits a normal variable is clipped beyond 2.56 standard deviations, one in 97.
SECTORS_CLIPPED = 1 - math.erf(2.564 / math.sqrt(2)) ** 16

# What torch asks once and remembers.
_KNOWN = (triton_of_torch.has_triton, triton_of_torch.triton_backend, triton_of_torch.triton_hash_with_backend)


@contextlib.contextmanager
def absent_gpu() -> Iterator[None]:
    """Let torch, Inductor and Triton believe that there is one."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import reinplace
    from triton.backends import compiler
    from triton.runtime import driver

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *of: PROPERTIES,
        "get_device_capability": lambda *of: (9, 0),
        "synchronize": lambda *of: None,
        "_exchange_device": lambda *of: 0,
        "_maybe_exchange_device": lambda *of: 0,
        "get_rng_state": lambda *of: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *of: None,
    }
    of_inductor: dict[str, Any] = {
        "get_device_properties": lambda *of: PROPERTIES,
        "get_compute_capability": lambda *of: 90,
        "is_available": lambda: True,
        "is_triton_capable": lambda *of: True,
        "raise_if_triton_unavailable": lambda *of: None,
    }
    target = compiler.GPUTarget("cuda", 90, 32)
    before = driver._active
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name, value in of_inductor.items():
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(value)))
        stack.enter_context(
            patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(lambda *of: PROPERTIES))
        )
        stack.enter_context(patch.object(CudaInterface.Worker, "current_device", staticmethod(lambda *of: 0)))
        # It copies fake values in place, which a build without CUDA refuses.
        stack.enter_context(patch.object(reinplace, "_inplace_generalized_scatter", lambda into, *of: into))
        for known in _KNOWN:
            known.cache_clear()
        driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_active_torch_device=lambda: GPU))
        try:
            yield
        finally:
            driver._active = before
            for known in _KNOWN:
                known.cache_clear()


def _moved(value: Any) -> Any:
    """Fake tensors of a tree, on the GPU."""

    def of_gpu(tensor: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return tensor
        with tensor.fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)

    return pytree.tree_map(of_gpu, value)


def move(graph: fx.Graph) -> None:
    """Let every fake value of an aten graph lie on the GPU, and what it allocates."""
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = _moved(node.meta["val"])
        node.meta.pop("tensor_meta", None)
        node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda of: GPU, (node.args, node.kwargs))


@dataclass(frozen=True, slots=True)
class Generated:
    """What Inductor generates for a half of a step."""

    # The wrapper, with the sources of the kernels in it.
    code: str
    # What all kernels and ops read and write in memory.
    bytes: int
    # Of how many elements each activation is that has a clip of its own.
    activations: tuple[int, ...]


# What quantizers of activations have in the nets that are counted.
_OF_ACTIVATIONS = ("tensor", "token")


def _activations(graph: fx.Graph) -> list[int]:
    """Return the sizes of what is quantized with one clip, or one for each token: weights have theirs by channel."""
    quantizers = graph.find_nodes(op="call_function", target=torch.ops.octav.dynamic_fake_quantize.default)
    calls = [arguments_of(node) for node in quantizers]
    return [call.x.meta["val"].numel() for call in calls if spec_of(call.spec).granularity.kind in _OF_ACTIVATIONS]


def _bytes_of(node: Any) -> int:
    """Return what a kernel or an op reads and writes, each buffer once; of zero_clipped_, what it touches."""
    if getattr(node.node, "op_overload", None) is not torch.ops.octav.zero_clipped_.default:
        return int(node.get_read_write_buffers_sizes())
    grad, codes = (math.prod(map(int, given.get_size())) * given.get_dtype().itemsize for given in node.node.inputs)
    return codes + round(SECTORS_CLIPPED * 2 * grad)


def generated(
    model: nn.Module,
    *inputs: Tensor,
    backend: Any = "octav",
    options: dict[str, Any] | None = None,
    autocast: bool = False,
) -> list[Generated]:
    """Return what Inductor generates for a training step: forward, and backward. options are the backend's."""
    import torch._functorch.config as aot_config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering

    halves: list[Generated] = []
    activations: list[int] = []

    def keep(self: GraphLowering) -> Any:
        code = self.codegen()[0].value
        moved = sum(map(_bytes_of, self.scheduler.nodes))
        halves.append(Generated(code, moved, tuple(activations)))
        return SimpleNamespace(call=lambda *arguments: None, __file__=__file__, key="absent")

    def inner(gm: fx.GraphModule, example_inputs: Any, **options: Any) -> Any:
        fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        with absent_gpu():
            return compile_fx_inner(gm, fakes, **options)

    class Joint:
        """The first pass: moves the graph, then does what the backend wanted."""

        def __init__(self, then: Any) -> None:
            self.then = then

        def __call__(self, graph: fx.Graph) -> None:
            activations[:] = _activations(graph)
            move(graph)
            if self.then is not None:
                with absent_gpu():
                    self.then(graph)

        def uuid(self) -> Any:
            return None

    def compile_for_gpu(gm: fx.GraphModule, example_inputs: Any, config_patches: Any = None) -> Any:
        patches = {
            **(config_patches or {}),
            "fx_graph_cache": False,
            "triton.cudagraphs": False,
            "joint_graph_constant_folding": False,
        }
        patches["joint_custom_pre_pass"] = Joint(patches.get("joint_custom_pre_pass"))
        patches.pop("force_layout_optimization", None)
        return compile_fx(gm, example_inputs, inner_compile=inner, config_patches=patches)

    torch._dynamo.reset()
    settings = aot_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False)
    with (
        patch.object(GraphLowering, "compile_to_module", keep),
        # It starts to compile a kernel as soon as there is one, and asks the driver.
        patch.object(AsyncCompile, "triton", lambda *of, **options: None),
        patch.object(entry, "compile_fx", compile_for_gpu),
        settings,
    ):
        if backend == "octav":
            compiled = torch.compile(model, backend="octav", options=options)
        else:
            compiled = torch.compile(model, backend=compile_for_gpu)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compiled(*inputs)
    torch._dynamo.reset()
    return halves


@dataclass(frozen=True, slots=True)
class Launches:
    """What one wrapper launches: Triton kernels of Inductor's, ops of ours, and everything else that is called."""

    kernels: list[str]
    ops: list[str]
    extern: list[str]


def launches(half: Generated) -> Launches:
    """Read the calls in the wrapper that Inductor generates."""
    body = half.code[half.code.index("def call(") :]
    return Launches(
        re.findall(r"(triton_\w+)\.run\(", body),
        re.findall(r"torch\.ops\.octav\.(\w+)\.(?:default|out)\(", body),
        re.findall(r"extern_kernels\.(\w+)\(", body),
    )
