"""timm's own pieces on what quantize() returns: optimizer groups, EMA, checkpoints, heads, recomputation."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import OctavError, zoo
from tests.support.blocks import saved_bytes

pytestmark = pytest.mark.stacks

KINDS = {
    "vit_tiny_patch16_224": {
        **{"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 5},
    },
    "test_resnet": {"num_classes": 5},
}


@pytest.fixture(scope="module")
def timm() -> Any:
    zoo.torchvision()
    for part in ("optim", "utils"):
        pytest.importorskip(f"timm.{part}")
    return importlib.import_module("timm")


def made(timm: Any, name: str) -> nn.Module:
    return timm.create_model(name, **KINDS[name])


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Any]:
    names = {p: name for name, p in model.named_parameters()}
    keys = ("weight_decay", "lr_scale")
    return [([group.get(key) for key in keys], [names[p] for p in group["params"]]) for group in optimizer.param_groups]


@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.75}])
@pytest.mark.parametrize("name", KINDS)
def test_groups_by_the_methods_of_the_model(timm: Any, name: str, settings: dict[str, float]) -> None:
    model = made(timm, name)
    q = octav_fx.quantize(model, images())
    of_model, of_q = (timm.optim.create_optimizer_v2(m, "adamw", weight_decay=0.05, **settings) for m in (model, q))
    assert groups(of_q, q) == groups(of_model, model)


@pytest.mark.parametrize("name", KINDS)
def test_train_average_save_and_resume(timm: Any, name: str, tmp_path: Path) -> None:
    q, x = octav_fx.quantize(made(timm, name), images()), images()
    ema = timm.utils.ModelEmaV3(q, decay=0.5)
    optimizer = timm.optim.create_optimizer_v2(q, "adamw", lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        q(x).square().mean().backward()
        optimizer.step()
        ema.update(q)
    assert octav_fx.coverage(ema.module).share == 1
    assert not torch.equal(ema.module.eval()(x), q.eval()(x))
    timm.utils.CheckpointSaver(q, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(3, 0.5)
    again = octav_fx.quantize(made(timm, name), images()).eval()
    file = str(tmp_path / "last.pth.tar")
    assert timm.models.resume_checkpoint(again, file, timm.optim.create_optimizer_v2(again, "adamw")) == 4
    loaded = made(timm, name).eval()
    timm.models.load_checkpoint(loaded, file)
    with octav_fx.float_mode(q), octav_fx.float_mode(again):
        assert torch.equal(again(x), q(x)) and torch.equal(loaded(x), q(x))


@pytest.mark.parametrize("blocks", [None, "auto"])
@pytest.mark.parametrize("name", KINDS)
def test_a_head_that_is_reset(timm: Any, name: str, blocks: str | None) -> None:
    q, x = octav_fx.quantize(made(timm, name), images(), blocks=blocks), images()
    q.reset_classifier(7)
    q(x).sum().backward()
    assert q(x).shape == (2, 7) and q.get_classifier().weight.grad is not None
    found = octav_fx.coverage(q)
    assert found.skipped == [] and any(row.node == q.default_cfg["classifier"] for row in octav_fx.rows(q))
    features = octav_fx.quantize(made(timm, name), x)
    features.reset_classifier(0)
    assert features(x).shape == (2, q.num_features)
    before = made(timm, name)
    before.reset_classifier(9)
    assert octav_fx.quantize(before, x)(x).shape == (2, 9)


@pytest.mark.filterwarnings("ignore:.*recomputed in backward")
def test_recomputation_before_and_after(timm: Any) -> None:
    x = torch.randn(8, 3, 32, 32)
    kept = {}
    for when in ("never", "before", "after"):
        model = made(timm, "vit_tiny_patch16_224").train()
        if when == "before":
            model.set_grad_checkpointing()
        q = octav_fx.quantize(model, x)
        if when == "after":
            q.set_grad_checkpointing()
        kept[when] = saved_bytes(q, x, q)
    model.set_grad_checkpointing()
    # A single graph keeps all; recomputing, the model runs its own Python, whose layers outside of blocks are few.
    assert kept["after"] == kept["before"] < kept["never"] / 2
    assert kept["after"] <= 1.2 * saved_bytes(model, x, model)


def test_features_run_over_blocks_and_are_refused_in_one_graph(timm: Any) -> None:
    model, x = made(timm, "vit_tiny_patch16_224"), images()
    q = octav_fx.quantize(model, x, blocks="auto")
    assert torch.equal(q.forward_head(q.forward_features(x)), q(x))
    with octav_fx.float_mode(q):
        assert torch.equal(q.forward_features(x), model.forward_features(x))
    with pytest.raises(OctavError, match="would compute in float here"):
        octav_fx.quantize(model, x).forward_features(x)
