"""transformers and a detector with cached anchors: every call that the float model takes, after one example."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import zoo
from octav_fx.capture.rerun import without_quantizers

pytestmark = pytest.mark.models

WORDS = 50
SMALL = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    # transformers imports it, and without its binary ops it fails to be imported.
    zoo.torchvision()
    match name:
        case "bert":
            config = transformers.BertConfig(**SMALL, **LAYERS, hidden_size=16, intermediate_size=24)
            return transformers.BertForSequenceClassification(config).eval()  # type: ignore[no-any-return]
        case "gpt2":
            config = transformers.GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2, n_positions=40, use_cache=False)
            return transformers.GPT2LMHeadModel(config).eval()  # type: ignore[no-any-return]
    config = transformers.LlamaConfig(
        **SMALL, **LAYERS, hidden_size=16, intermediate_size=24, num_key_value_heads=1, use_cache=False
    )
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-any-return]


def words(batch: int, length: int, padding: int | None = 0) -> dict[str, Any]:
    ids = torch.randint(3, WORDS, (batch, length))
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_other_lengths_batches_and_arguments(name: str) -> None:
    float_model = transformer(name)
    q = octav_fx.quantize(float_model, words(2, 7))
    first = len(q.graphs_of(False))
    for call in (words(3, 7), words(2, 11), words(1, 9), words(2, 9, 3)):
        compare(q, float_model, call)
    assert len(q.graphs_of(False)) == first == 1
    others = [words(2, 1), words(1, 1), words(2, 9, None), {**words(2, 9), "output_hidden_states": True}]
    ids = words(2, 5)["input_ids"]
    others.append({"input_ids": ids, "labels": torch.tensor([0, 1]) if name == "bert" else ids})
    with warnings.catch_warnings():
        # None of these may end in the model's own Python.
        warnings.filterwarnings("error", message=".*own Python.*")
        for call in others:
            compare(q, float_model, call)


def compare(q: nn.Module, float_model: nn.Module, call: dict[str, Any]) -> None:
    expected = float_model(**call)
    q(**call)
    with without_quantizers(q):
        found = q(**call)
    assert set(found.keys()) == set(expected.keys())
    # The same float sums in the same order, but for fused attention.
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


class Detector(nn.Module):
    """Keeps the anchors of the last image size on itself, as YOLO's head does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.Conv2d(8, 4, 1)
        self.shape: Any = None
        self.anchors = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.shape != shape:
            self.shape = shape
            rows, columns = torch.arange(shape[2]), torch.arange(shape[3])
            self.anchors = (rows[:, None] * 100 + columns).flatten().to(x.dtype)
        return self.boxes(x).flatten(2) + self.anchors


def test_cached_anchors_are_those_of_each_image_size() -> None:
    float_model = Detector().eval()
    q = octav_fx.quantize(float_model, torch.randn(1, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for size in ((16, 16), (24, 16), (16, 24), (16, 16), (24, 24), (16, 24)):
            x = torch.randn(2, 3, *size)
            with octav_fx.float_mode(q):
                torch.testing.assert_close(q(x), float_model(x))
            q(x)
            with without_quantizers(q):
                torch.testing.assert_close(q(x), float_model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.compile
def test_a_cache_is_written_once_eager_and_compiled() -> None:
    # Whether a block has more keys than queries is known when its cache is written, and only then.
    transformers = pytest.importorskip("transformers")
    zoo.torchvision()
    config = transformers.LlamaConfig(
        **{**SMALL, **LAYERS, "num_hidden_layers": 2}, hidden_size=16, intermediate_size=24, num_key_value_heads=1
    )
    q = octav_fx.quantize(transformers.LlamaForCausalLM(config).eval(), words(2, 7, None))
    compiled = torch.compile(q, backend="octav")
    with torch.no_grad():
        for batch, length in ((2, 7), (2, 5), (3, 9), (1, 1)):
            call = words(batch, length, None)
            expected, found = q(**call), compiled(**call)
            assert expected.past_key_values.get_seq_length() == found.past_key_values.get_seq_length() == length
            # Sums in another order, over rows of 24 numbers at most, of values below 1.
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=24 * 2**-24)
