"""The recipes as rows: data, net, schedule. They were chosen in float, and are the same for every method."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import nn

from benchmarks.study.data import Data
from benchmarks.study.digits import Digits
from benchmarks.study.glyphs import CHARACTERS, Glyphs
from benchmarks.study.nets import EfficientNet, Inception, MobileNet, ResNet, Transformer
from benchmarks.study.run import Run
from benchmarks.study.text import SYMBOLS, Text
from octav_fx import OctavError


@dataclass(frozen=True)
class Recipe:
    """One data set, one net and the schedule for both."""

    # Of a seed and what it is judged by, which is the same for all seeds.
    data: Callable[[int, str], Data]
    net: Callable[[], nn.Module]
    # "accuracy" in percent, more is better; "bits per byte", less is better.
    score: str
    steps: int
    # "sgd": Nesterov momentum 0.9; "adamw".
    optimizer: str
    # The highest: it rises evenly over warm_up steps and then falls to zero as a cosine does.
    learning_rate: float
    weight_decay: float
    warm_up: int
    # Of a run that starts from the trained float net.
    retrain_steps: int
    retrain_learning_rate: float
    label_smoothing: float = 0.0
    # How often that is read, the last time after the last step.
    evaluations: int = 4

    def schedule(self, run: Run) -> "Recipe":
        """Return the recipe of a run: that for retraining where it starts from a trained net."""
        if run.start == "scratch":
            return self
        return replace(
            self, steps=self.retrain_steps, learning_rate=self.retrain_learning_rate, warm_up=self.retrain_steps // 20
        )


_RESNET: Final = Recipe(
    data=lambda seed, judged: Glyphs(seed, judged=judged, batch=128, views=12),
    net=lambda: ResNet(len(CHARACTERS), width=16, stride=2),
    score="accuracy",
    steps=320,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    warm_up=32,
    retrain_steps=100,
    retrain_learning_rate=0.01,
    label_smoothing=0.1,
)
# Little weight decay, as in the paper (appendix E.1): depthwise filters have nine weights.
_MOBILENET: Final = replace(
    _RESNET,
    data=lambda seed, judged: Glyphs(seed, judged=judged, batch=32, views=12),
    net=lambda: MobileNet(len(CHARACTERS), width=16, stride=2),
    steps=1200,
    warm_up=100,
    weight_decay=4e-5,
    retrain_steps=400,
)
_TEXT: Final = Recipe(
    data=lambda seed, judged: Text(seed, judged=judged, batch=8, length=128, windows=256),
    net=lambda: Transformer(SYMBOLS, width=128, depth=2, heads=4, length=128),
    score="bits per byte",
    steps=1000,
    optimizer="adamw",
    learning_rate=2e-3,
    weight_decay=0.01,
    warm_up=50,
    retrain_steps=300,
    retrain_learning_rate=4e-4,
)
_DIGITS: Final = replace(
    _RESNET,
    data=lambda seed, judged: Digits(seed, judged=judged, batch=32),
    net=lambda: ResNet(10, width=4, stride=2),
    steps=60,
    warm_up=6,
    retrain_steps=20,
)

# Half the steps: of nets that take twice as long.
_SHORTER: Final[dict[str, Any]] = {"steps": 600, "warm_up": 50, "retrain_steps": 200}
# What the large recipes of glyphs share.
_LARGE: Final[dict[str, Any]] = {
    "data": lambda seed, judged: Glyphs(seed, judged=judged, batch=512, views=100),
    "steps": 20_000,
    "warm_up": 1_000,
    "retrain_steps": 4_000,
    "learning_rate": 0.4,
    "retrain_learning_rate": 0.04,
}
# (recipe, net, size); the first net of a recipe is its default. The large rows differ in arguments only.
RECIPES: Final[dict[tuple[str, str, str], Recipe]] = {
    ("glyphs", "resnet", "small"): _RESNET,
    ("glyphs", "mobilenet", "small"): _MOBILENET,
    ("glyphs", "efficientnet", "small"): replace(
        _MOBILENET, net=lambda: EfficientNet(len(CHARACTERS), width=16, stride=2), **_SHORTER
    ),
    ("glyphs", "inception", "small"): replace(
        _MOBILENET, net=lambda: Inception(len(CHARACTERS), width=8, stride=2), **_SHORTER
    ),
    ("text", "transformer", "small"): _TEXT,
    # A third of the time: for explanations, of which each takes several runs.
    ("text", "transformer", "tiny"): replace(
        _TEXT,
        data=lambda seed, judged: Text(seed, judged=judged, batch=8, length=64, windows=512),
        net=lambda: Transformer(SYMBOLS, width=64, depth=2, heads=2, length=64),
        steps=800,
        retrain_steps=240,
    ),
    ("digits", "resnet", "small"): _DIGITS,
    ("digits", "mobilenet", "small"): replace(_DIGITS, net=lambda: MobileNet(10, width=4)),
    ("digits", "efficientnet", "small"): replace(_DIGITS, net=lambda: EfficientNet(10, width=4)),
    ("digits", "inception", "small"): replace(_DIGITS, net=lambda: Inception(10, width=4)),
    ("glyphs", "resnet", "large"): replace(_RESNET, net=lambda: ResNet(len(CHARACTERS), width=64), **_LARGE),
    ("glyphs", "mobilenet", "large"): replace(_MOBILENET, net=lambda: MobileNet(len(CHARACTERS), width=48), **_LARGE),
    ("glyphs", "efficientnet", "large"): replace(
        _MOBILENET, net=lambda: EfficientNet(len(CHARACTERS), width=48), **_LARGE
    ),
    ("glyphs", "inception", "large"): replace(_MOBILENET, net=lambda: Inception(len(CHARACTERS), width=32), **_LARGE),
    ("text", "transformer", "large"): replace(
        _TEXT,
        data=lambda seed, judged: Text(seed, judged=judged, batch=64, length=1024, windows=512),
        net=lambda: Transformer(SYMBOLS, width=768, depth=12, heads=12, length=1024),
        steps=20_000,
        warm_up=1_000,
        retrain_steps=4_000,
        learning_rate=6e-4,
        retrain_learning_rate=6e-5,
        weight_decay=0.1,
    ),
}


def names() -> list[str]:
    """Return the recipes."""
    return list(dict.fromkeys(recipe for recipe, _, _ in RECIPES))


def nets(recipe: str) -> list[str]:
    """Return the nets of a recipe, its default first."""
    return list(dict.fromkeys(net for name, net, _ in RECIPES if name == recipe))


def of(run: Run) -> Recipe:
    """Return the recipe of a run. Raises OctavError if there is no such row."""
    key = (run.recipe, run.net, run.size)
    if key not in RECIPES:
        raise OctavError(f"no recipe {' '.join(key)}; there are {', '.join(' '.join(row) for row in RECIPES)}")
    return RECIPES[key].schedule(run)
