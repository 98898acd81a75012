"""The paper's schedules on ImageNet (arXiv 2206.06501, appendix E.1), a row for each model and start."""

from dataclasses import dataclass
from typing import Final

from octav_fx import OctavError

FROM_SCRATCH: Final = "from-scratch"
RETRAIN: Final = "retrain"


@dataclass(frozen=True, slots=True)
class Recipe:
    """SGD with momentum; the learning rate is divided by ten every so many epochs."""

    lr: float
    gpus: int
    # Images per GPU.
    batch: int
    epochs: int
    # Epochs between two divisions by ten.
    every: int
    weight_decay: float
    momentum: float = 0.9

    @property
    def global_batch(self) -> int:
        """Images of one step."""
        return self.gpus * self.batch

    def lr_at(self, epoch: int, lr: float) -> float:
        """The learning rate of an epoch (from 0) of a run that began with lr."""
        return lr * 0.1 ** (epoch // self.every)


# Two things are not known of the paper: the momentum of the ResNets, here that of the MobileNets, and of retraining the
# batch per GPU and the weight decay, here those from scratch.
RECIPES: Final = {
    ("resnet18", FROM_SCRATCH): Recipe(0.1, 8, 64, 150, 30, 1e-4),
    ("resnet50", FROM_SCRATCH): Recipe(0.1, 8, 64, 150, 30, 1e-4),
    ("resnet101", FROM_SCRATCH): Recipe(0.1, 8, 64, 80, 30, 1e-4),
    ("mobilenet_v2", FROM_SCRATCH): Recipe(0.2, 8, 128, 300, 100, 4e-5),
    ("mobilenet_v3_large", FROM_SCRATCH): Recipe(0.2, 8, 128, 300, 100, 1e-5),
    ("mobilenet_v3_small", FROM_SCRATCH): Recipe(0.2, 8, 128, 300, 100, 1e-5),
    ("resnet18", RETRAIN): Recipe(1e-4, 4, 64, 30, 10, 1e-4),
    ("resnet50", RETRAIN): Recipe(1e-4, 4, 64, 15, 5, 1e-4),
    ("resnet101", RETRAIN): Recipe(1e-4, 4, 64, 15, 5, 1e-4),
    ("mobilenet_v2", RETRAIN): Recipe(1e-2, 4, 128, 30, 10, 4e-5),
    ("mobilenet_v3_large", RETRAIN): Recipe(1e-2, 4, 128, 30, 10, 1e-5),
    ("mobilenet_v3_small", RETRAIN): Recipe(1e-2, 4, 128, 30, 10, 1e-5),
}


def recipe_of(name: str, start: str) -> Recipe:
    """The row of a model. Raises OctavError for a model that the paper has no schedule for."""
    if (name, start) not in RECIPES:
        known = ", ".join(model for model, other in RECIPES if other == start)
        raise OctavError(f"no {start} recipe {name!r}; there are {known}: name the one to follow with --recipe")
    return RECIPES[name, start]
