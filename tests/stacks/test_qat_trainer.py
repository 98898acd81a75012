"""QATMixin: a teacher's share in the loss, phases, and checkpoints that go on to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from benchmarks.counted import graphs_made
from octav_fx import OctavError
from octav_fx.integrations.transformers import QATMixin, distillation_loss
from octav_fx.nn import FakeQuantizer
from tests.support.pretrained import WORDS, build

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.stacks


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(3, WORDS, (count, 8))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


OF_ARGUMENTS = ("gradient_accumulation_steps", "torch_compile_backend")


def trainer(folder: Path, model: nn.Module | None, steps: int = 4, batch: int = 4, **settings: Any) -> Any:
    pytest.importorskip("accelerate")
    of_arguments = {name: settings.pop(name) for name in OF_ARGUMENTS if name in settings}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        max_steps=steps,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **of_arguments,
    )

    class QATTrainer(QATMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    return QATTrainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(), **settings)


@pytest.mark.compile
@pytest.mark.parametrize("made_by", ["model", "model_init"])
def test_arguments_may_name_our_backend(made_by: str, tmp_path: Path) -> None:
    losses = []
    for backend in (None, "octav"):
        torch.compiler.reset()
        settings = {"model": quantized()} if made_by == "model" else {"model": None, "model_init": quantized}
        # Each graph runs as it is.
        with graphs_made() as made:
            run = trainer(tmp_path, steps=2, torch_compile_backend=backend, **settings)
            assert run.args.torch_compile_backend == backend
            losses.append(run.train().training_loss)
        assert bool(made) == (backend is not None)
    assert losses[0] == losses[1]


def quantized() -> nn.Module:
    torch.manual_seed(1)
    return octav_fx.quantize(build("LlamaForCausalLM"), {k: torch.stack([r[k] for r in rows(4)]) for k in rows(1)[0]})


def test_a_teacher_has_its_share_of_the_loss(tmp_path: Path) -> None:
    q, teacher = quantized().train(), build("LlamaForCausalLM")
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in rows(1)[0]}
    run = trainer(tmp_path, q, teacher=teacher, share=0.25, temperature=2.0)
    outputs = q(**batch)
    logits, wanted = outputs.logits, teacher(**batch).logits
    divergence = F.kl_div(
        F.log_softmax(logits / 2, -1), F.log_softmax(wanted / 2, -1), reduction="none", log_target=True
    )
    expected = 0.75 * outputs.loss + 0.25 * 4 * divergence.sum(-1).mean()
    torch.testing.assert_close(run.compute_loss(q, dict(batch)), expected)
    # Evaluation is that of the task.
    with torch.no_grad():
        torch.testing.assert_close(run.compute_loss(q.eval(), dict(batch)), q(**batch).loss)
    assert run.train().training_loss > 0
    # It stays the user's, and learns nothing.
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_the_share_of_a_teacher_does_not_depend_on_accumulation(tmp_path: Path) -> None:
    found = []
    for batch, accumulation in ((8, 1), (4, 2)):
        torch.manual_seed(1)
        # Float: clips are those of a part of a batch.
        model, teacher = build("LlamaForCausalLM"), build("LlamaForCausalLM")
        settings = {"gradient_accumulation_steps": accumulation, "teacher": teacher, "share": 1.0}
        trainer(tmp_path, model, steps=1, batch=batch, **settings).train()
        found.append(model.state_dict())
    for name, value in found[0].items():
        # Adam's first step is the sign of the gradient: where that is nearly 0 the order of sums decides.
        assert (found[1][name] - value).abs().gt(1e-3).float().mean() < 0.02, name


def test_phases_begin_once_at_their_steps(tmp_path: Path) -> None:
    seen: list[Any] = []
    q = quantized()
    phases = [(0, lambda m: seen.append(("0", m is q))), (0.5, octav_fx.freeze), (3, lambda m: seen.append("3"))]
    trainer(tmp_path, q, phases=phases).train()
    assert seen == [("0", True), "3"]
    assert all(m.clip is not None for m in q.modules() if isinstance(m, FakeQuantizer))


@pytest.mark.parametrize("phases", [(), ((0.25, octav_fx.freeze),)])
def test_a_run_that_is_resumed_is_the_run(phases: Any, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "one", quantized(), phases=phases)
    straight.train()
    resumed = trainer(tmp_path / "two", quantized(), phases=phases)
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    # Where searches start, too.
    found = octav_fx.state(resumed.model)
    for name, values in octav_fx.state(straight.model).items():
        assert all(torch.equal(torch.as_tensor(found[name][k]), torch.as_tensor(v)) for k, v in values.items())


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OctavError, match="share=2"):
        trainer(tmp_path, quantized(), share=2)
    with pytest.raises(OctavError, match=r"phases: \(1\.5, <built-in function len>\): a step or a share"):
        trainer(tmp_path, quantized(), phases=[(1.5, len)])
    with pytest.raises(OctavError, match=r"teacher's logits have shape \(2, 3\), those of the model \(2, 4\)"):
        distillation_loss(torch.zeros(2, 4), torch.zeros(2, 3))
