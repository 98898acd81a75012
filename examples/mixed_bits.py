"""Give the layers that mind it least fewer bits, and the others more.

python examples/mixed_bits.py

Each layer by itself is quantized coarsely, and how much the loss rises says how much it minds. The digits are
scikit-learn's: pip install 'octav_fx[demo]'.
"""

from dataclasses import replace

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx

FEW, MANY = 2, 4


def net() -> nn.Sequential:
    """Return any module of yours: images [N, 1, 8, 8] -> logits [N, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float) -> None:
    """Train for some steps of 64 images."""
    optimizer = torch.optim.AdamW(octav_fx.param_groups(model, 0.01), lr)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def rise(model: nn.Module, images: Tensor, labels: Tensor, config: octav_fx.Config) -> float:
    """Return by how much the loss is higher with this Config than in float."""
    q = octav_fx.quantize(model, images, config)
    loss = F.cross_entropy(q(images), labels)
    with octav_fx.float_mode(q):
        return float(loss - F.cross_entropy(q(images), labels))


def main(steps: int = 300) -> octav_fx.Config:
    """Return the Config that was found."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits)
    model = net()
    train(model, images, labels, steps, lr=2e-3)
    # A part of the training data decides, so that the test set stays unseen.
    sample = images[:256], labels[:256]

    # The names are those of the table: the module's path, here "0", "2", "4", "7" and "9".
    layers = list(dict.fromkeys(row.node for row in octav_fx.rows(octav_fx.quantize(model, images[:64]))))
    coarse = {"weight_bits": FEW, "activation_bits": FEW}
    # The others have 8 bits meanwhile. edge_bits=None: the first and the last layer are layers like the others.
    fine = octav_fx.Config(weight_bits=8, activation_bits=8, edge_bits=None)
    minds = {}
    for layer in layers:
        minds[layer] = rise(model, *sample, replace(fine, overrides={layer: coarse}))
        print(f"layer {layer} at {FEW} bits: loss {minds[layer]:+.4f}")

    # The half that minds least gets few bits.
    patient = sorted(layers, key=minds.__getitem__)[: len(layers) // 2]
    many = octav_fx.Config(weight_bits=MANY, activation_bits=MANY, edge_bits=None)
    mixed = replace(many, overrides=dict.fromkeys(patient, coarse))
    # The other way round, to see that the choice matters.
    impatient = sorted(layers, key=minds.__getitem__)[len(layers) - len(patient) :]
    wrong = replace(many, overrides=dict.fromkeys(impatient, coarse))
    print(f"\n{FEW} bits for {', '.join(patient)}: loss {rise(model, *sample, mixed):+.4f}")
    print(f"{FEW} bits for {', '.join(impatient)}: loss {rise(model, *sample, wrong):+.4f}")

    q = octav_fx.quantize(model, images[:64], mixed)
    train(q, images, labels, steps // 2, lr=5e-4)
    print(f"\n{octav_fx.table(q)}")
    return mixed


if __name__ == "__main__":
    main()
