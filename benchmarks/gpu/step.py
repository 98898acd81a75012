"""What a training step costs in time and memory: float Inductor, OCTAV as one would write it first, and octav."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import variants
from benchmarks.gpu.timing import median_ms, peak_memory
from octav_fx import zoo

FLOAT = "float Inductor"
# Names in benchmarks/variants.py.
VARIANTS = (FLOAT, "octav compiled", "octav compiled, levels kept, solve by one step")
# Kernels that are listed.
MOST = 60
# Of memory that a model trains in. So many are prepared at a time as fit the GPU.
GB = 14
CLASSES = 1000
REPEATS = 10


class Bert(nn.Module):
    """An encoder of BERT-base's dimensions out of torch's own layers, for where transformers is not installed."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(30522, 768), nn.Embedding(512, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(768, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [batch, tokens] -> [batch, classes]."""
        embedded = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        logits: Tensor = self.head(self.encoder(embedded)[:, 0])
        return logits


class TransformersBert(nn.Module):
    """BERT-base of transformers, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        self.bert = transformers.BertModel(transformers.BertConfig())
        self.head = nn.Linear(768, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [batch, tokens] -> [batch, classes]."""
        logits: Tensor = self.head(self.bert(ids).pooler_output)
        return logits


def _bert() -> tuple[nn.Module, str]:
    try:
        return TransformersBert(), ""
    except ImportError as error:
        return Bert(), f"nn.TransformerEncoder of BERT-base's dimensions, as transformers cannot be imported: {error}"


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, CLASSES))


@dataclass(frozen=True, slots=True)
class Model:
    """A model, and a batch for it on a device."""

    load: Callable[[], tuple[nn.Module, str]]
    batch: Callable[[str], Tensor]


def _images(count: int, size: int = 224) -> Callable[[str], Tensor]:
    return lambda device: torch.randn(count, 3, size, size, device=device).to(memory_format=torch.channels_last)


# Of each command.
MODELS = {
    "resnet50": {"resnet50, 256 images": Model(lambda: (zoo.load("resnet50"), ""), _images(256))},
    "transformers": {
        "vit_b_16, 128 images": Model(lambda: (zoo.load("vit_b_16"), ""), _images(128)),
        "BERT-base, 32 x 384 tokens": Model(_bert, lambda device: torch.randint(0, 30522, (32, 384), device=device)),
    },
}
# To try this file without a GPU.
TINY = {"tiny": Model(lambda: (_tiny(), ""), _images(4, 8))}


def models_of(name: str, device: str) -> dict[str, Model]:
    """Return the models whose steps a command times, nvidia-h200-resnet50 -> those of resnet50."""
    return MODELS[name.rpartition("-")[2]] if device == "cuda" else TINY


def room(device: str) -> int:
    """Return how many models fit a device at a time."""
    return max(1, int(torch.cuda.get_device_properties(0).total_memory / 1e9 / GB)) if device == "cuda" else 2


def measure(
    name: str, variant: str, device: str, repeats: int = REPEATS, hold: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """The row of one model and variant: bfloat16 autocast, SGD with momentum; MB include parameters and gradients.

    hold is called when all is compiled, before the clock runs.
    """
    torch.manual_seed(0)
    chosen = {**TINY, **{name: model for models in MODELS.values() for name, model in models.items()}}[name]
    model, note = chosen.load()
    # mypy does not know that Module.to takes a memory format, too.
    model, x = model.to(device=device, memory_format=torch.channels_last), chosen.batch(device)  # type: ignore[call-overload]
    target = torch.randint(0, CLASSES, (len(x),), device=device)
    of = variants.VARIANTS[variant]
    prepared = of.prepare(model, x)
    forward: Any = prepared
    if of.backend is not None:
        # None is for torch's own backends, which do not look at what they do not know.
        forward = torch.compile(prepared, backend=of.backend, options=of.options)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(forward(x), target)
        loss.backward()
        optimizer.step()

    # A call whose modes another one set may be compiled again.
    for _ in range(2):
        step()
    hold()
    with peak_memory(device) as peak:
        ms = median_ms(step, device, repeats)
    row: dict[str, Any] = {"model": name, "variant": variant, "ms": round(ms, 3), "mb": peak[0], "note": note}
    if device == "cuda":
        found = kernels(step)
        busy = sum(kernel["ms"] for kernel in found)
        row |= {"busy_ms": round(busy, 3), "launches": sum(kernel["launches"] for kernel in found)}
        row["kernels"] = found[:MOST]
    yield row


def kernels(run: Callable[[], None]) -> list[dict[str, Any]]:
    """Return the kernels of one run, where the GPU spends most of its time first: name, launches, milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    found = sorted(profiled.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    return [
        {"kernel": event.key[:120], "launches": event.count, "ms": round(event.self_device_time_total / 1e3, 4)}
        for event in found
        if event.self_device_time_total
    ]


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time and memory over those of float Inductor, where that was measured."""
    floats = {row["model"]: row for row in rows if row["variant"] == FLOAT and "ms" in row}
    return [
        {
            **row,
            "ratio": round(row["ms"] / floats[row["model"]]["ms"], 3),
            "memory": round(row["mb"] / (floats[row["model"]]["mb"] or 1), 3),
        }
        if "ms" in row and row["model"] in floats
        else row
        for row in rows
    ]
