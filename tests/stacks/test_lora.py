"""Adapters of PEFT: put on before quantize or after it, merged, and trained by TRL."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octav_fx
from octav_fx import OctavError
from tests.support.pretrained import WORDS, build, text

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.stacks


def peft() -> Any:
    # build() has made torchvision importable, which PEFT imports through transformers.
    build("LlamaForCausalLM")
    return pytest.importorskip("peft")


def adapters() -> Any:
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft().LoraConfig(r=2, **settings)


def adapted(model: nn.Module) -> nn.Module:
    return peft().get_peft_model(model, adapters())


def trained(q: nn.Module) -> set[str]:
    q(**text()).logits.square().mean().backward()
    return {name for name, p in q.named_parameters() if p.grad is not None}


def test_a_model_with_adapters_is_quantized_wholly_and_only_adapters_train(tmp_path: Path) -> None:
    model, inputs = adapted(build("LlamaForCausalLM")), text()
    q = octav_fx.quantize(model, inputs)
    assert isinstance(q, type(model)) and octav_fx.coverage(q).skipped == []
    assert trained(q) == {name for name, _ in q.named_parameters() if "lora_" in name}
    expected = model.eval()(**inputs).logits
    with octav_fx.float_mode(q.eval()):
        assert torch.equal(q(**inputs).logits, expected)
    with q.disable_adapter():
        without = q(**inputs).logits
        with octav_fx.float_mode(q), model.disable_adapter():
            assert torch.equal(q(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(without, q(**inputs).logits)
    assert q.generate(**inputs, max_new_tokens=3).shape == (2, 11)
    q.save_pretrained(tmp_path)
    again = peft().PeftModel.from_pretrained(build("LlamaForCausalLM"), tmp_path)
    kept = {name: value for name, value in again.state_dict().items() if "lora_" in name}
    assert kept and all(torch.equal(value, q.state_dict()[name]) for name, value in kept.items())


def test_adapters_put_on_afterwards_are_quantized_and_alone_train() -> None:
    q = octav_fx.quantize(build("LlamaForCausalLM"), text())
    model = adapted(q)
    assert trained(model) == {name for name, _ in model.named_parameters() if "lora_" in name}
    found = octav_fx.coverage(model)
    assert found.skipped == [] and found.quantized_macs > 0
    assert any(re.search(r"q_proj\.lora_A", row.node) and row.bits for row in octav_fx.rows(model))


# Kind of adapter -> its settings.
KINDS: dict[str, dict[str, Any]] = {
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LoraConfig": {"r": 2, "target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
    "VeraConfig": {"r": 2, "target_modules": ["q_proj", "o_proj"]},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_train_alone(kind: str, is_before: bool, tmp_path: Path) -> None:
    config = getattr(peft(), kind)(task_type="CAUSAL_LM", **KINDS[kind])
    model, inputs = build("LlamaForCausalLM"), {**text(), "labels": text()["input_ids"]}
    if is_before:
        q = octav_fx.quantize(peft().get_peft_model(model, config), inputs)
    else:
        q = peft().get_peft_model(octav_fx.quantize(model, inputs), config)
    wanted = {name for name, p in q.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in q.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in q.parameters() if p.requires_grad], 0.1)
    # The first step of a LoRA changes its second factor alone.
    for _ in range(2):
        q(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {name for name, p in q.named_parameters() if not torch.equal(p, before[name])} == wanted
    assert octav_fx.coverage(q).share == 1
    q.save_pretrained(tmp_path)


@pytest.mark.parametrize("is_before", [True, False])
def test_merged_adapters_are_quantized_weights(is_before: bool) -> None:
    model, inputs = build("LlamaForCausalLM").eval(), text()
    if is_before:
        q = octav_fx.quantize(adapted(model), inputs)
    else:
        q = adapted(octav_fx.quantize(model, inputs))
        q(**inputs)
    with octav_fx.float_mode(q):
        expected = q(**inputs).logits
    merged = q.merge_and_unload()
    with octav_fx.float_mode(merged):
        # (W + BA) x in place of W x + B (A x): four layers of two dozen products each round otherwise.
        assert torch.allclose(merged(**inputs).logits, expected, atol=1e-5)
    merged(**inputs)
    assert octav_fx.coverage(merged).skipped == []
    assert not any("lora_" in row.node for row in octav_fx.rows(merged))


def test_what_a_merge_leaves_of_a_single_graph_is_refused() -> None:
    q = octav_fx.quantize(adapted(build("LlamaForCausalLM")), text(), blocks=())
    merged = q.merge_and_unload()
    with pytest.raises(OctavError, match=r"q_proj\.base_layer of PeftModelForCausalLM would compute in float here"):
        merged(**text())


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("setting", [{}, {"packing": True}, {"gradient_checkpointing": True}, {"bf16": True}])
@pytest.mark.parametrize("with_adapters", [False, True])
def test_trl_trains_a_quantized_model(with_adapters: bool, setting: dict[str, bool], tmp_path: Path) -> None:
    config = adapters() if with_adapters else None
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    torch.manual_seed(0)
    rows = [torch.randint(3, WORDS, (length,)).tolist() for length in (4, 6, 8, 10, 12, 7, 5, 9)]
    q = octav_fx.quantize(build("LlamaForCausalLM"), {**text(), "labels": text()["input_ids"]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "max_length": 16,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **setting,
        },
    )
    trainer = trl.SFTTrainer(
        model=q,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer(),
        peft_config=config,
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.train().training_loss > 0
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and (not with_adapters or all("lora_" in name for name in moved))
    assert octav_fx.coverage(trainer.model).skipped == []
