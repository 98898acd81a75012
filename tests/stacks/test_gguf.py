"""GGUF files read by the gguf package, and run by llama.cpp: equal weights, equal tokens of a text, its next tokens."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octav_fx import Config, OctavError, calibrate, export_gguf, freeze, quantize, zoo
from octav_fx.deploy.layers import linear_layers
from octav_fx.deploy.targets.gguf_tokenizer import CUTS

pytestmark = pytest.mark.stacks

SIZES = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2},
}
# The name of llama.cpp, the way a text is cut, and settings.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("llama", "llama-bpe", {}),
    "Mistral": ("llama", "gpt-2", {"sliding_window": None}),
    "Qwen2": ("qwen2", "qwen2", {}),
    "Qwen3": ("qwen3", "qwen2", {"head_dim": 32}),
}
HALF = {"lm_head": {"scale_format": "float16"}}
CONFIGS = {
    "groups": Config(4, None, weight_granularity="group-32", scale_format="float16", overrides=HALF),
    "channels": Config(4, None, scale_format="float16", overrides=HALF),
    "six bits": Config(6, None, scale_format="float16", overrides=HALF),
    "mxfp4": Config(
        *(4, None),
        **{"weight_format": "e2m1", "weight_granularity": "group-32", "scale_format": "e8m0"},
        overrides=HALF,
    ),
}
TEXT = "Quantize 1234 models, isn't it? Größe: naïve 東京 \n\n  def f(x):\n    return x"
# What llama.cpp says of a file in a process of its own, which an assertion of it would end.
RUN = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 64, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
asked = {"max_tokens": 1, "logprobs": 512, "n_probs": 512, "temperature": 0.0}
found = []
for prompt in json.loads(sys.argv[2]):
    answer = server.handle_completions({"prompt": prompt, **asked})
    answer = answer[-1] if isinstance(answer, (list, tuple)) else answer
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    said = answer["choices"][0]["logprobs"]
    rows = {row["id"]: row["logprob"] for row in said["content"][0]["top_logprobs"]} if said else None
    found.append([answer["usage"]["prompt_tokens"], rows])
open(sys.argv[3], "w").write(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def libraries() -> None:
    zoo.torchvision()
    for name in ("transformers", "gguf", "xllamacpp"):
        pytest.importorskip(name)


def tokenizer_of(cut: str, size: int = 500) -> Any:
    """A byte-level tokenizer that has learned pairs from the documentation."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pattern, takes_whole = next(key for key, name in CUTS.items() if name == cut)
    made = Tokenizer(models.BPE(ignore_merges=takes_whole))
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, into_bytes])
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    texts = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    made.train_from_iterator([path.read_text() for path in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>")


def frozen(kind: str, config: Config, tokens: Tensor, **settings: Any) -> tuple[Any, Any]:
    """Return a float model, and what was frozen of it."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**{**SIZES, **KINDS[kind][2], **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    for name, value in model.named_parameters():
        # They begin at zero, wherever they are put.
        if name.endswith("bias"):
            nn.init.normal_(value)
    q = quantize(model, {"input_ids": tokens}, config)
    return model, freeze(calibrate(q, [{"input_ids": tokens}]))


def as_blocks(x: Tensor) -> Tensor:
    """Round activations as llama.cpp does on a CPU: to 8 bits in blocks of 32, with the largest magnitude at 127."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0).round()
    return (codes * scale.half().float()).flatten(-2)


def with_blocks(model: nn.Module, q: nn.Module) -> nn.Module:
    """Give a float model the levels of q for weights, and round activations before each of these layers."""
    for layer in linear_layers(q):
        module = model.get_submodule(layer.name)
        # A parameter of its own: one that is tied stays that of the embedding.
        module.weight = nn.Parameter(layer.weight())
        module.register_forward_pre_hook(lambda _, given: as_blocks(given[0]))
    return model


def answers(path: Path, prompts: list[Any], folder: Path) -> list[Any]:
    out = folder / "answers.json"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), json.dumps(prompts), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def written(path: Path) -> dict[str, Tensor]:
    import gguf

    found = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type)) for t in found}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_finds_the_weights_to_the_bit(kind: str, name: str, tmp_path: Path) -> None:
    import gguf

    tokens = torch.arange(24).reshape(2, 12)
    model, q = frozen(kind, CONFIGS[name], tokens)
    export_gguf(q, tmp_path / "model.gguf")
    found = written(tmp_path / "model.gguf")
    names = gguf.get_tensor_name_map({name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[KINDS[kind][0]], 2)
    expected = dict(model.state_dict())
    expected |= {f"{layer.name}.weight": layer.weight() for layer in linear_layers(q)}
    assert len(found) == len(expected)
    for key, value in expected.items():
        stored = found[names.get_name(key, try_suffixes=(".weight", ".bias"))]
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        if KINDS[kind][0] == "llama" and heads:
            # What is rotated together lies side by side.
            stored = stored.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(stored, value), key


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_goes_on_with_a_text_as_the_model_does(kind: str, name: str, tied: bool, tmp_path: Path) -> None:
    assert_goes_on(tmp_path, kind, CONFIGS[name], tie_word_embeddings=tied)


def test_biases_of_all_layers_and_rotations_that_are_slower(tmp_path: Path) -> None:
    slow = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert_goes_on(tmp_path, "Llama", CONFIGS["groups"], attention_bias=True, mlp_bias=True, **slow)


def assert_goes_on(tmp_path: Path, kind: str, config: Config, **settings: Any) -> None:
    """Assert that llama.cpp has the tokens of a text that transformers has, and the next ones that q has."""
    tokenizer = tokenizer_of(KINDS[kind][1])
    numbers = tokenizer(TEXT)["input_ids"]
    tokens = torch.tensor([numbers])
    model, q = frozen(kind, config, tokens, **settings)
    export_gguf(q, tmp_path / "model.gguf", tokenizer=tokenizer)
    lengths = (len(numbers), 50, 44, 37, 30, 20)
    prompts = [TEXT, *(numbers[:length] for length in lengths)]
    (count, by_text), *found = answers(tmp_path / "model.gguf", prompts, tmp_path)
    assert (count, by_text) == tuple(found[0]) and count == len(numbers)
    with torch.no_grad():
        exact, rounded = (m(input_ids=tokens).logits[0].log_softmax(-1) for m in (q, with_blocks(model, q)))
    # Where the likeliest token is a part of a letter it says nothing.
    said = [(length - 1, rows) for length, (_, rows) in zip(lengths, found, strict=True) if rows]
    assert len(said) >= 2
    for place, rows in said:
        likely = exact[place].topk(50).indices
        theirs = torch.tensor([rows[str(token)] for token in likely.tolist()])
        # Its activations are rounded in blocks, so that it is as far from q as that leads: codes at ties move, since
        # keys and values are float16 there, and two such models differ by as much again.
        assert (theirs - exact[place, likely]).norm() < 2 * (rounded - exact)[place, likely].norm()


def test_what_llama_cpp_would_compute_otherwise(tmp_path: Path) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    config = CONFIGS["groups"]
    for settings, named in (
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, r"scaled \(linear\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ):
        _, q = frozen("Llama", config, tokens, **settings)
        with pytest.raises(OctavError, match=named):
            export_gguf(q, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_that_cuts_in_another_way(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokens = torch.arange(24).reshape(2, 12)
    _, q = frozen("Llama", CONFIGS["groups"], tokens)
    tokenizer = tokenizer_of("qwen2")
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, into_bytes])
    with pytest.raises(OctavError, match="cuts a text otherwise"):
        export_gguf(q, tmp_path / "model.gguf", tokenizer=tokenizer)
    with pytest.raises(OctavError, match="702 tokens, and the model knows 512"):
        export_gguf(q, tmp_path / "model.gguf", tokenizer=tokenizer_of("qwen2", 700))
    assert not any(tmp_path.iterdir())
