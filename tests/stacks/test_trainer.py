"""transformers' own Trainer, generate and checkpointing on what quantize() returns, as a user writes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import OctavError
from octav_fx.capture.rerun import without_quantizers
from tests.support.blocks import saved_bytes
from tests.support.pretrained import GROUPED, WORDS, build, made, text, words

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.stacks


def rows(count: int = 8, length: int = 8) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [{"input_ids": torch.randint(3, WORDS, (length,)), "labels": torch.tensor(i % 2)} for i in range(count)]


def texts(count: int = 8, length: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(count, length)]


def pictures(count: int = 8) -> list[dict[str, Tensor]]:
    return [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(i % 2)} for i in range(count)]


def sounds(count: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_features": torch.randn(8, 32), "labels": row["labels"]} for row in texts(count, 5)]


# Class -> the rows of its data set.
DATA: dict[str, Any] = {
    "BertForSequenceClassification": rows,
    "GPT2LMHeadModel": texts,
    "LlamaForCausalLM": texts,
}
# Those whose Trainer differs in its inputs or in what is inside.
FURTHER: dict[str, Any] = {
    "Qwen3ForCausalLM": texts,
    "MixtralForCausalLM": texts,
    "ViTForImageClassification": pictures,
    "WhisperForConditionalGeneration": sounds,
}


def waves(count: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_values": torch.randn(800), "labels": torch.tensor(i % 2)} for i in range(count)]


def segments(count: int = 8) -> list[dict[str, Tensor]]:
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(0, 2, (32, 32))} for _ in range(count)]


def pairs(count: int = 8) -> list[dict[str, Any]]:
    texts_of = [{"input_ids": row["input_ids"]} for row in rows(count)]
    return [{**row, "pixel_values": torch.randn(3, 16, 16), "return_loss": True} for row in texts_of]


_LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_WAVES = {
    **_LAYERS,
    **{"vocab_size": 20, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "layerdrop": 0.0},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    **{"classifier_proj_size": 8, "mask_time_prob": 0.3, "mask_time_length": 2, "mask_time_min_masks": 1},
}
_STAGES = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "strides": [4, 2]},
    **{"patch_sizes": [7, 3], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
}
_BOTH = {
    "text_config": {**_LAYERS, "vocab_size": WORDS, "max_position_embeddings": 32, "eos_token_id": WORDS - 1},
    "vision_config": {**_LAYERS, "image_size": 16, "patch_size": 4},
    "projection_dim": 8,
}
# Those that record outputs, or ask for gradients, by hooks on their own modules: configuration, rows, float products.
HOOKED: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    "SegformerForSemanticSegmentation": (_STAGES, segments, []),
    "Wav2Vec2ForSequenceClassification": (_WAVES, waves, []),
    "HubertForSequenceClassification": (_WAVES, waves, []),
    # The product of its two embeddings is in the Python around the blocks.
    "CLIPModel": (_BOTH, pairs, ["forward"]),
}


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: torch.stack(held) if isinstance(held[0], Tensor) else held[0] for key, held in columns.items()}


def trainer(q: nn.Module, data: list[dict[str, Tensor]], folder: Path, **settings: Any) -> Any:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_steps": 1,
            **settings,
        },
    )
    return transformers.Trainer(model=q, args=arguments, train_dataset=data, eval_dataset=data, data_collator=together)


def quantized(name: str) -> nn.Module:
    batch = {key: torch.stack([row[key] for row in DATA[name](4)]) for key in ("input_ids", "labels")}
    return octav_fx.quantize(build(name), batch)


@pytest.mark.parametrize("name", DATA)
def test_train_evaluate_predict_save_resume_and_load(name: str, tmp_path: Path) -> None:
    q, data = quantized(name), DATA[name]()
    run = trainer(q, data, tmp_path)
    before = {key: value.clone() for key, value in q.state_dict().items()}
    assert run.train().training_loss > 0
    assert any(not torch.equal(value, before[key]) for key, value in q.state_dict().items())
    assert run.evaluate()["eval_loss"] > 0
    without_labels = [{"input_ids": row["input_ids"]} for row in data]
    assert len(run.predict(without_labels).predictions) == len(data)
    run.save_model(str(tmp_path / "saved"))
    loaded = type(build(name)).from_pretrained(tmp_path / "saved").eval()
    with octav_fx.float_mode(q.eval()):
        assert torch.equal(loaded(data[0]["input_ids"][None]).logits, q(data[0]["input_ids"][None]).logits)
    again = trainer(quantized(name), data, tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 3


@pytest.mark.parametrize("name", FURTHER)
def test_text_pictures_and_sound(name: str, tmp_path: Path) -> None:
    data = FURTHER[name]()
    batch = {key: torch.stack([row[key] for row in data[:2]]) for key in data[0]}
    q = octav_fx.quantize(build(name), batch)
    run = trainer(q, data, tmp_path, save_strategy="no", gradient_checkpointing=True)
    assert run.train().training_loss > 0 and run.evaluate()["eval_loss"] > 0
    assert octav_fx.coverage(q).skipped == []
    run.save_model(str(tmp_path / "saved"))
    loaded = type(build(name)).from_pretrained(tmp_path / "saved").eval()
    with octav_fx.float_mode(q.eval()):
        assert torch.equal(loaded(**batch).logits, q(**batch).logits)


@pytest.mark.parametrize("name", HOOKED)
def test_models_that_hook_their_own_modules(name: str, tmp_path: Path) -> None:
    settings, data, in_float = HOOKED[name]
    torch.manual_seed(0)
    model, batch = made(name, settings), together(data()[:2])
    q = octav_fx.quantize(model, batch)
    assert [site for site, _, _ in octav_fx.coverage(q).skipped] == in_float
    for checkpointing in (False, True):
        run = trainer(q, data(), tmp_path, save_strategy="no", gradient_checkpointing=checkpointing)
        assert run.train().training_loss > 0
    # Trainer has turned caches off, and calibrating goes by that.
    octav_fx.freeze(octav_fx.calibrate(q, [batch])).eval()
    expected, found = q(**batch), octav_fx.convert(q)(**batch)
    for key in expected:
        if isinstance(expected[key], Tensor):
            # A code at a tie may differ by one.
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0.05 * float(expected[key].abs().max()))
    with pytest.raises(OctavError, match="is part of a graph, which hands no attentions out"):
        q(**batch, output_attentions=True)


@pytest.mark.compile
def test_the_octav_backend(tmp_path: Path) -> None:
    q = octav_fx.quantize(build("BertForSequenceClassification", num_hidden_layers=1), together(rows()[:2]))
    # torch_compile_backend takes what accelerate lists.
    q.compile(backend="octav")
    assert trainer(q, rows(), tmp_path, save_strategy="no", max_steps=1).train().training_loss > 0


SETTINGS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_trainer(setting: str, name: str, tmp_path: Path) -> None:
    run = trainer(quantized(name), DATA[name](), tmp_path, save_strategy="no", **SETTINGS[setting])
    assert run.train().training_loss > 0


@pytest.mark.parametrize("name", DATA)
def test_checkpointing_keeps_what_float_keeps(name: str) -> None:
    ids = torch.randint(3, WORDS, (16, 32))
    model, inputs = build(name, num_hidden_layers=6).train(), {"input_ids": ids, "use_cache": False}
    q = octav_fx.quantize(model, inputs)

    def kept(m: nn.Module) -> int:
        return saved_bytes(lambda x: m(**x).logits, inputs, m)

    plain = kept(q)
    q.gradient_checkpointing_enable()
    model.gradient_checkpointing_enable()
    assert kept(q) < plain / 2 and kept(q) <= 1.2 * kept(model)
    # Dropout draws the same numbers.
    torch.manual_seed(1)
    q(**inputs).logits.sum().backward()
    recomputed = [p.grad.clone() for p in q.parameters()]
    q.zero_grad()
    q.gradient_checkpointing_disable()
    torch.manual_seed(1)
    q(**inputs).logits.sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(q.parameters(), recomputed, strict=True))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_generate_with_a_cache_is_floats_token_for_token(name: str) -> None:
    model, inputs = build(name).eval(), text()
    q = octav_fx.quantize(model, inputs)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **settings)
    with without_quantizers(q):
        assert torch.equal(q.generate(**inputs, **settings), expected)
    with octav_fx.float_mode(q):
        assert torch.equal(q.generate(**inputs, **settings), expected)
    assert q.generate(**inputs, **settings).shape == expected.shape
    octav_fx.freeze(octav_fx.calibrate(q, [inputs]))
    converted = octav_fx.convert(q)
    defined = octav_fx.convert(q, integers=False)
    scores = {"return_dict_in_generate": True, "output_scores": True, **settings}
    for batch in (inputs, {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}):
        assert torch.equal(converted.generate(**batch, **settings), q.generate(**batch, **settings))
        # With the cache, which is another graph, the frozen model computes integers, too.
        both = zip(q.generate(**batch, **scores).scores, defined.generate(**batch, **scores).scores, strict=True)
        assert all(torch.equal(found, expected) for found, expected in both)


def windowed() -> nn.Module:
    return made("MistralForCausalLM", {**GROUPED, "sliding_window": 4})


@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"use_cache": False}, {}])
@pytest.mark.parametrize("build_", [windowed, lambda: build("OPTForCausalLM")], ids=["sliding", "learned positions"])
def test_every_cache_gives_floats_tokens(build_: Any, cache: dict[str, Any]) -> None:
    model, inputs = build_().eval(), {"input_ids": text()["input_ids"]}
    q = octav_fx.quantize(model, inputs)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **cache}
    expected = model.generate(**inputs, **settings)
    with without_quantizers(q):
        assert torch.equal(q.generate(**inputs, **settings), expected)
    assert q.generate(**inputs, **settings).shape == expected.shape and octav_fx.coverage(q).skipped == []


def test_sequences_to_sequences_are_generated_in_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    data = [{**row, "labels": row["input_ids"][:5]} for row in texts()]
    model = build("T5ForConditionalGeneration", decoder_start_token_id=0)
    q = octav_fx.quantize(model, together(data[:2]))
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        **{"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"},
        **{"predict_with_generate": True, "generation_max_length": 6},
    )
    run = transformers.Seq2SeqTrainer(model=q, args=arguments, train_dataset=data, data_collator=together)
    assert run.train().training_loss > 0 and len(run.predict(data).predictions) == len(data)
    model.load_state_dict(q.state_dict())
    beams = {"num_beams": 2, "max_new_tokens": 5}
    ids = words()
    with octav_fx.float_mode(q.eval()):
        assert torch.equal(q.generate(ids, **beams), model.eval().generate(ids, **beams))
    # The cache of what the encoder gave is read by its own names.
    q.generate(ids, **beams)
    assert octav_fx.coverage(q).skipped == []
