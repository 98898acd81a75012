"""Adapters of PEFT: a model that has them is quantized, adapters and all."""

import pytest
import torch
from torch import nn

import octav_fx
from tests.support.pretrained import build, text

pytest.importorskip("transformers")

pytestmark = pytest.mark.stacks


def adapted(model: nn.Module) -> nn.Module:
    # build() has made torchvision importable, which PEFT imports through transformers.
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def test_a_model_with_adapters_is_quantized_wholly_and_only_adapters_train() -> None:
    model, inputs = adapted(build("LlamaForCausalLM")), text()
    q = octav_fx.quantize(model, inputs, blocks="auto")
    assert isinstance(q, type(model)) and octav_fx.coverage(q).skipped == []
    q(**inputs).logits.square().mean().backward()
    trained = {name for name, p in q.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in q.named_parameters() if "lora_" in name}
    expected = model.eval()(**inputs).logits
    with octav_fx.float_mode(q.eval()):
        assert torch.equal(q(**inputs).logits, expected)
