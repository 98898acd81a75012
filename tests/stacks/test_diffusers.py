"""diffusers: a step of training, pipelines that sample, save_pretrained and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import octav_fx
from octav_fx import OctavError, zoo

pytestmark = pytest.mark.stacks

SMALL = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (8, 16)}
UNET = {**SMALL, "norm_num_groups": 4, "attention_head_dim": 4}
# Class -> its configuration.
MODELS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **UNET,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": {
        **UNET,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
    },
    "DiTTransformer2DModel": {
        **{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "sample_size": 16},
        **{"patch_size": 4, "num_embeds_ada_norm": 10},
    },
}


@pytest.fixture(scope="module")
def diffusers() -> Any:
    zoo.torchvision()
    return pytest.importorskip("diffusers")


def inputs(name: str) -> dict[str, torch.Tensor]:
    sample, timestep = torch.randn(2, 3, 16, 16), torch.randint(0, 100, (2,))
    if name == "DiTTransformer2DModel":
        return {"hidden_states": sample, "timestep": timestep, "class_labels": torch.randint(0, 10, (2,))}
    condition = {"encoder_hidden_states": torch.randn(2, 5, 8)} if name == "UNet2DConditionModel" else {}
    return {"sample": sample, "timestep": timestep, **condition}


def quantized(diffusers: Any, name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    example = inputs(name)
    return octav_fx.quantize(getattr(diffusers, name)(**MODELS[name]), example), example


@pytest.mark.parametrize("name", MODELS)
def test_train_save_and_load(diffusers: Any, name: str, tmp_path: Path) -> None:
    q, example = quantized(diffusers, name)
    assert octav_fx.coverage(q).skipped == []
    optimizer, scheduler = torch.optim.AdamW(q.parameters(), 1e-3), diffusers.DDPMScheduler(100)
    image = next(key for key in example if key in ("sample", "hidden_states"))
    for checkpointing in (False, True):
        if checkpointing:
            q.enable_gradient_checkpointing()
        noise = torch.randn_like(example[image])
        noisy = scheduler.add_noise(example[image], noise, example["timestep"])
        F.mse_loss(q(**{**example, image: noisy}).sample[:, :3], noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    q.save_pretrained(tmp_path)
    loaded = getattr(diffusers, name).from_pretrained(tmp_path).eval()
    with octav_fx.float_mode(q.eval()):
        assert torch.equal(q(**example).sample, loaded(**example).sample)


def test_pipelines_sample_with_a_quantized_model(diffusers: Any, tmp_path: Path) -> None:
    q, _ = quantized(diffusers, "UNet2DModel")
    q.eval()
    for pipeline, scheduler in (("DDPMPipeline", "DDPMScheduler"), ("DDIMPipeline", "DDIMScheduler")):
        run = getattr(diffusers, pipeline)(unet=q, scheduler=getattr(diffusers, scheduler)(100))
        run.set_progress_bar_config(disable=True)
        seeds = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "np"}
        images = run(**seeds).images
        assert images.shape == (1, 16, 16, 3)
        with octav_fx.float_mode(q):
            seeds["generator"] = torch.Generator().manual_seed(0)
            assert (run(**seeds).images != images).any()
    run.save_pretrained(tmp_path)
    assert isinstance(getattr(diffusers, pipeline).from_pretrained(tmp_path).unet, diffusers.UNet2DModel)


def test_adapters_in_a_model_that_recomputes(diffusers: Any) -> None:
    peft = pytest.importorskip("peft")
    q, example = quantized(diffusers, "UNet2DConditionModel")
    q.enable_gradient_checkpointing()
    q.requires_grad_(False)
    q.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    q.train()(**example).sample.square().mean().backward()
    trained = {name for name, p in q.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in q.named_parameters() if "lora_" in name}
    assert octav_fx.coverage(q).skipped == []


@pytest.mark.parametrize("blocks", ["auto", ()])
def test_methods_of_an_autoencoder(diffusers: Any, blocks: Any) -> None:
    sides = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2, **sides).eval()
    x = torch.randn(2, 3, 16, 16)
    q = octav_fx.quantize(model, x, blocks=blocks)
    assert octav_fx.coverage(q).skipped == []
    if blocks == ():
        with pytest.raises(OctavError, match=r"encoder\.conv_in of AutoencoderKL would compute in float here"):
            q.encode(x)
        return
    latent = q.encode(x).latent_dist.mode()
    assert torch.equal(q.decode(latent).sample, q(x).sample)
    with octav_fx.float_mode(q):
        assert torch.equal(q.encode(x).latent_dist.mode(), model.encode(x).latent_dist.mode())
