"""How long quantize() takes, beside the model's own forward."""

import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import octav_fx
from benchmarks import result
from octav_fx import zoo
from octav_fx.capture.inputs import as_inputs


def main(rounds: int) -> None:
    """Measure large models on one thread, and write results/capture.json."""
    torch.set_num_threads(1)
    rows = [_row(name, *make(), rounds) for name, make in MODELS.items()]
    result.write("capture", {"setting": {"threads": 1, "rounds": rounds, "clock": "processor time"}, "rows": rows})
    print(tabulate(rows, headers="keys"))


def _row(name: str, model: nn.Module, inputs: Any, rounds: int) -> dict[str, Any]:
    args, kwargs = as_inputs(inputs)
    with torch.no_grad():
        forward = _best(lambda: model(*args, **kwargs), rounds)
    quantize = _best(lambda: octav_fx.quantize(model, inputs, blocks=()), rounds)
    return {"model": name, "forward s": round(forward, 2), "quantize s": round(quantize, 2)}


def _best(run: Callable[[], Any], rounds: int) -> float:
    """Of processor time: one thread runs, and what else the machine does is left out."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def _resnet50() -> tuple[nn.Module, Tensor]:
    return zoo.load("resnet50").eval(), torch.randn(2, 3, 224, 224)


def _bert_base() -> tuple[nn.Module, dict[str, Tensor]]:
    # Before transformers, which imports it, too.
    zoo.torchvision()
    from transformers import BertConfig, BertModel

    words = torch.randint(0, 1000, (2, 128))
    return BertModel(BertConfig()).eval(), {"input_ids": words, "attention_mask": torch.ones_like(words)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"resnet50": _resnet50, "bert-base": _bert_base}
