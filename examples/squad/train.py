"""The paper's recipe for BERT on SQuAD v1.1 (arXiv 2206.06501, appendix E).

torchrun --nproc-per-node=1 -m examples.squad.train DATA --model FOLDER --out OUT

The same command again goes on from OUT/checkpoint.pt, also after it was killed.
"""

import argparse
import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from examples.common import options as common
from examples.common.checkpoint import Row
from examples.common.distributed import Ranks, parallelize
from examples.common.loop import Task, pact_decay, train
from examples.common.samplers import once, training, validation
from examples.squad.data import Question, Window, Windows, read, windows
from examples.squad.score import answer, scores
from octav_fx import OctavError, param_groups, zoo

# arXiv 2206.06501, appendix E: two epochs in batches of four on one GPU.
LR: Final = 3e-5
BATCH: Final = 4
EPOCHS: Final = 2
# Of BERT's own recipe; the paper does not say.
WEIGHT_DECAY: Final = 0.01
WARM_UP: Final = 0.1
MAX_NORM: Final = 1.0

_INPUTS: Final = ("input_ids", "token_type_ids", "attention_mask")
_LAYOUTS: Final = {
    "DATA": ("train-v1.1.json", "dev-v1.1.json"),
    "--model FOLDER": ("config.json", "vocab.txt or tokenizer.json", "model.safetensors or pytorch_model.bin"),
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Train as the arguments say; return the curve. An OctavError ends the process without a traceback."""
    return common.start("squad", run, _parser().parse_args(arguments))


def run(options: argparse.Namespace, ranks: Ranks) -> list[Row]:
    """Train on a process group that stands."""
    _check_folder(options.data, "DATA")
    _check_folder(options.model, "--model FOLDER")
    batch, epochs = options.batch or BATCH, options.epochs or EPOCHS
    learning, held_out = (read(options.data / name) for name in _LAYOUTS["DATA"])
    model, tokenizer = _pretrained(options)
    if options.max_seq > model.config.max_position_embeddings:
        raise OctavError(f"--max-seq {options.max_seq}: the model has {model.config.max_position_embeddings} positions")
    examples = Windows(windows(learning, tokenizer, options.max_seq, is_training=True))
    unseen = Windows(windows(held_out, tokenizer, options.max_seq, is_training=False))
    without = sum(window.answer == (0, 0) for window in examples.windows)
    ranks.say(f"{len(learning)} questions, {len(examples)} windows, {without} of them without their answer")
    lr = common.learning_rate(options.lr, LR, BATCH, batch, ranks)
    first = torch.stack([examples[i][0] for i in range(min(batch, len(examples)))])
    # The paper quantizes both operands of both products of the attention, the softmax output among them.
    model.to(ranks.device).train()
    q = common.quantized(model, _called(first, ranks), options, ranks, attention="full")
    called = parallelize(q, options.parallel, ranks, compiled=options.compile)
    optimizer = torch.optim.AdamW(param_groups(q, WEIGHT_DECAY), lr)
    steps = len(training(examples, ranks, batch, options.seed, 0))

    def batches(first: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for epoch in range(first // steps, epochs):
            yield from training(examples, ranks, batch, options.seed, epoch, max(0, first - epoch * steps))

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(ranks.device.type, torch.bfloat16, enabled=options.bf16)

    def inputs(batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        return _called(batch[0], ranks)

    def loss(called: nn.Module, inputs: dict[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        with autocast():
            found = called(**inputs)
        logits = torch.stack([found["start_logits"], found["end_logits"]], 1).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[1].to(ranks.device).flatten())

    def evaluate(called: nn.Module) -> dict[str, float]:
        with torch.no_grad(), autocast():
            return scores(held_out, answers(called, unseen, held_out, ranks, batch))

    task = Task(
        steps=epochs * steps,
        batches=batches,
        inputs=inputs,
        loss=loss,
        learning_rate=lambda step: learning_rate(step, epochs * steps, lr),
        evaluate=evaluate,
        # Once an epoch.
        evaluate_after=range(steps, epochs * steps + 1, steps),
        row_every=steps,
        seed=options.seed,
        settings=common.settings(options, epochs=epochs, lr=lr, global_batch=batch * ranks.world),
        max_norm=MAX_NORM,
        penalty=pact_decay(q, WEIGHT_DECAY),
    )
    return train(task, options.out, q, called, optimizer, ranks, options.save_every)


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Return the learning rate of a step: up to lr in the first tenth of the steps, then linearly down to zero."""
    warm = WARM_UP * steps
    return lr * min((step + 1) / warm, 1.0, (steps - step) / (steps - warm))


def answers(
    called: nn.Module, unseen: Windows, questions: Sequence[Question], ranks: Ranks, batch: int
) -> dict[int, str]:
    """Return place of a question -> the best answer of all its windows, the same on every rank."""
    own: list[tuple[int, float, int, str]] = []
    for step, (inputs, _, places) in enumerate(validation(unseen, ranks, batch)):
        found = called(**_called(inputs, ranks))
        start, end = found["start_logits"].float().cpu(), found["end_logits"].float().cpu()
        real = once(step, batch, len(inputs), ranks, len(unseen))
        for i in real.nonzero().flatten().tolist():
            window: Window = unseen.windows[int(places[i])]
            best = answer(window, questions[window.question].context, start[i], end[i])
            if best is not None:
                own.append((window.question, -best[0], int(places[i]), best[1]))
    everywhere: list[Any] = [None] * ranks.world
    dist.all_gather_object(everywhere, own)
    # Best first; of two that are as good the earlier window.
    ordered = sorted(found for share in everywhere for found in share)
    return {question: text for question, _, _, text in reversed(ordered)}


def _called(inputs: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """Return [N, 3, max_seq] as the keyword arguments of BERT."""
    return dict(zip(_INPUTS, inputs.to(ranks.device).unbind(1), strict=True))


def _pretrained(options: argparse.Namespace) -> tuple[Any, Any]:
    # transformers imports torchvision where it finds one, which fails beside a CPU-only torch.
    with suppress(OctavError):
        zoo.torchvision()
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise OctavError("transformers is not installed: pip install 'octav_fx[zoo]'") from error
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(options.model), local_files_only=True)
    if not tokenizer.is_fast:
        raise OctavError(f"{options.model}: its tokenizer has no fast version, which knows the characters of a token")
    # A pretrained BERT has no head for answers: it begins with random weights.
    torch.manual_seed(options.seed)
    model = transformers.BertForQuestionAnswering.from_pretrained(str(options.model), local_files_only=True)
    return model, tokenizer


def _check_folder(folder: Path, what: str) -> None:
    wanted = _LAYOUTS[what]
    for names in wanted:
        if not any((folder / name).is_file() for name in names.split(" or ")):
            listing = "\n".join(f"  {what.split()[-1]}/{other}" for other in wanted)
            raise OctavError(f"no {names} in {folder}\nexpected:\n{listing}")


def _parser() -> argparse.ArgumentParser:
    parser = common.parser("squad", "The recipe of arXiv 2206.06501, appendix E, for BERT on SQuAD v1.1.")
    parser.add_argument("data", type=Path, help="folder with train-v1.1.json and dev-v1.1.json")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a BERT as transformers saves it")
    parser.add_argument("--max-seq", type=int, default=384, help="tokens of a window (default 384)")
    return parser


if __name__ == "__main__":
    main()
