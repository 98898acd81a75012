"""Whether every torchvision classification model compiles to one graph, once: no graph break, no recompilation.

On the meta device: Dynamo traces and the backend quantizes as always, only nothing is computed, and the graph runs as
it is instead of through Inductor. Three training steps; after the first, recompiling is an error. Every row is written
when it is there, and kept as long as the sources of octav_fx stay what they are.
"""

from typing import Any

import torch
from tabulate import tabulate

import octav_fx
from benchmarks import result
from benchmarks.counted import graphs_made
from octav_fx import zoo

# Smaller inputs than these models' own are too small for one of their poolings, or not what their position codes fit.
_PIXELS = {"inception_v3": 299, "swin": 224, "maxvit_t": 224, "vit": 224}


def main(rounds: int) -> None:
    """Try every model, quantized first and quantized by the backend, and write results/graphs.json."""
    models, sources = zoo.torchvision().models, result.sources()
    kept = result.read("graphs") if (result.RESULTS / "graphs.json").exists() else {}
    rows = kept["rows"] if kept.get("sources") == sources else []
    for name in models.list_models(module=models):
        if all(row["model"] != name for row in rows):
            rows.append(_row(name))
            result.write("graphs", {"sources": sources, "rows": rows})
    print(tabulate(rows, headers="keys"))


def _row(name: str) -> dict[str, Any]:
    pixels = next((size for prefix, size in _PIXELS.items() if name.startswith(prefix)), 96)
    # RegNets compute their widths with tensors: none can be made on the meta device.
    x, model = torch.randn(2, 3, pixels, pixels, device="meta"), zoo.load(name).to("meta")
    with torch.device("meta"):
        quantized = octav_fx.quantize(model, x)
    row = {"model": name, "quantized": _graphs(quantized, x), "float": _graphs(model, x)}
    print(row, flush=True)
    return row


def _graphs(model: torch.nn.Module, x: torch.Tensor) -> int | str:
    """How many graphs three training steps took, or why they failed."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="octav", fullgraph=True)
    try:
        with graphs_made() as made:
            _step(compiled, x)
            with torch._dynamo.config.patch(error_on_recompile=True):
                _step(compiled, x)
                _step(compiled, x)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return len(made)


def _step(compiled: Any, x: torch.Tensor) -> None:
    output = compiled(x)
    # inception and googlenet return an auxiliary output too.
    outputs = output if isinstance(output, tuple) else (output,)
    torch.stack([out.sum() for out in outputs]).sum().backward()
