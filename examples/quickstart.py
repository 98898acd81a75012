"""Train a small network in float, quantize it to 4 bits in one line, and train on.

python examples/quickstart.py

The digits are scikit-learn's: pip install 'octav_fx[demo]'.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx


class Net(nn.Module):
    """Any module of yours: images [N, 1, 8, 8] -> logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.head(self.tail(self.body(self.stem(x))).mean((2, 3)))


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float) -> None:
    """Train with the loop that you have: nothing in it knows of quantization."""
    # Weights decay; biases, norms and learned clips do not. model.parameters() would do, too.
    optimizer = torch.optim.SGD(octav_fx.param_groups(model, 1e-4), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of the images that are classified right."""
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(steps: int = 300) -> tuple[float, float, float]:
    """Return the test accuracy in float, at 4 bits before training, and at 4 bits after it."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits)
    # Every fourth image is for testing.
    is_test = torch.arange(len(images)) % 4 == 0
    training, testing = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])

    model = Net()
    train(model, *training, steps, lr=0.1)
    in_float = accuracy(model, *testing)

    # A few inputs show what flows through the model. The model itself is not changed.
    q = octav_fx.quantize(model, images[:64])
    before = accuracy(q, *testing)
    train(q, *training, steps // 2, lr=0.02)
    after = accuracy(q, *testing)

    # A row for each operand of each matmul and convolution: bits, clip, error, cost, or why it stays float.
    print(octav_fx.table(q))
    print(f"\ntest accuracy: {in_float:.1%} in float, {before:.1%} at 4 bits, {after:.1%} at 4 bits and trained")

    # The keys are the float model's, both ways.
    model.load_state_dict(q.state_dict(), strict=True)
    return in_float, before, after


if __name__ == "__main__":
    main()
