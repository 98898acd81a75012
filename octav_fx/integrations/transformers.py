"""transformers' Trainer for quantized models: a teacher, phases, checkpoints that go on to the last bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx.errors import OctavError
from octav_fx.training.state import load_state, state

# The file in a checkpoint's folder that holds octav_fx.state(q), for each rank.
_STATE: Final = "octav_state_{}.pt"

# Of torch.compile.
_BACKEND: Final = "octav"

# From which step on, or which share of all steps, and what is then done to the model, once.
Phase = tuple[int | float, Callable[[nn.Module], Any]]


class QATMixin:
    """Stands before Trainer, or a Trainer of another library, among the bases of a class.

    class QATTrainer(QATMixin, transformers.Trainer): ...

    teacher: a model that takes what the trained one takes and returns logits, such as the float model. In training the
    loss is (1 - share) * loss + share * distillation_loss(logits, logits of the teacher). The teacher is put into eval
    mode and onto the device of the Trainer, as that does with its model.
    phases: pairs of a step, or of a share of all steps as a float from 0 to 1, and a function that is then called with
    the model, once, before that step: (0.9, octav_fx.freeze) trains the last tenth with static clips. A run that is
    resumed calls those that are still to come; what earlier ones changed in the state_dict is loaded with it.
    Checkpoints have octav_fx.state(q) beside the weights, and resuming reads it.
    TrainingArguments(torch_compile_backend="octav"), which Trainer itself refuses, compiles the model.

    Raises OctavError for a share or a phase that cannot be.
    """

    # What Trainer has.
    args: Any
    state: Any
    model: Any
    is_in_train: bool

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        share: float = 0.5,
        temperature: float = 1.0,
        phases: Sequence[Phase] = (),
        **kwargs: Any,
    ) -> None:
        if not 0 <= share <= 1 or not temperature > 0:
            raise OctavError(f"share={share}, temperature={temperature}: a share from 0 to 1, a temperature above 0")
        for at, function in phases:
            if at < 0 or (isinstance(at, float) and at > 1) or not callable(function):
                raise OctavError(f"phases: ({at!r}, {function!r}): a step or a share of all as a float, and a function")
        super().__init__(*args, **kwargs)
        self.teacher = None if teacher is None else teacher.eval().to(self.args.device)
        self.share, self.temperature = share, temperature
        self._to_come = list(phases)
        self._first_step: int | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, whose list of backends is closed: it is not told of "octav", with which we compile."""
        backend = self.args.torch_compile_backend
        if backend == _BACKEND:
            self._compile(self.model)
            self.args.torch_compile_backend = "no"
        try:
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
        finally:
            self.args.torch_compile_backend = backend

    def call_model_init(self, trial: Any = None) -> Any:
        """Return a model from the user's model_init."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        if self.args.torch_compile_backend == _BACKEND:
            self._compile(model)
        return model

    def _compile(self, model: nn.Module | None) -> None:
        # It comes later where there is a model_init.
        if model is not None:
            model.compile(backend=_BACKEND, mode=self.args.torch_compile_mode)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Begin the phases whose step has come, and do the step."""
        step, total = self.state.global_step, self.state.max_steps
        if self._first_step is None:
            self._first_step = step
        for phase in list(self._to_come):
            at, function = phase
            begin = round(at * total) if isinstance(at, float) else at
            if begin <= step:
                self._to_come.remove(phase)
                # Of a run that was resumed behind it, the state has it.
                if begin >= self._first_step:
                    function(self.model)
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, in training with the teacher's share in it."""
        given = dict(inputs)
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if self.teacher is not None and model.training:
            with torch.no_grad():
                wanted = self.teacher(**given).logits
            term = distillation_loss(outputs.logits, wanted, self.temperature, given.get("attention_mask"))
            loss = (1 - self.share) * loss + self.share * term * self._scale(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _scale(self, num_items_in_batch: Any) -> float:
        """Return what makes a mean over a part of a batch one over the batch, where Trainer does not divide by it."""
        trainer: Any = self
        accepts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        return 1 / trainer.current_gradient_accumulation_steps if accepts and num_items_in_batch is not None else 1.0

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        torch.save(state(self.model), folder / _STATE.format(self.args.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        file = Path(resume_from_checkpoint) / _STATE.format(self.args.process_index)
        # Of a checkpoint of plain Trainer there is none.
        if file.exists():
            load_state(self.model, torch.load(file, map_location="cpu", weights_only=True))


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return the mean KL divergence from the teacher's distributions, times temperature squared (arXiv 1503.02531), [].

    logits, teacher_logits [..., classes]; mask [...] leaves out what is 0 in it, and does nothing in another shape.
    Raises OctavError for logits of two shapes.
    """
    if logits.shape != teacher_logits.shape:
        raise OctavError(
            f"the teacher's logits have shape {tuple(teacher_logits.shape)}, those of the model "
            f"{tuple(logits.shape)}: give a teacher of the same classes"
        )
    ours = F.log_softmax(logits.float() / temperature, -1)
    theirs = F.log_softmax(teacher_logits.float() / temperature, -1)
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if mask is None or mask.shape != divergence.shape:
        return divergence.mean() * temperature**2
    weights = mask.to(divergence.dtype)
    return (divergence * weights).sum() / weights.sum().clamp(min=1) * temperature**2
