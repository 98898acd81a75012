"""Small models that several test files share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """A convolution, a batch norm and a linear layer: [B, 3, H, W] -> [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class Tiny(nn.Module):
    """Weights and input that need no random numbers: the values in the table are the same on every machine."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2, bias=False)
        self.fc = nn.Linear(8, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[0.9, -0.3, 0.2, -0.5], [0.05, 0.1, -0.4, 0.15]]).view(2, 1, 2, 2))
            self.fc.weight.copy_((torch.arange(24.0).view(3, 8) * 7 % 11 - 5) / 10)
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


def tiny_input() -> Tensor:
    return torch.tensor([0.1, -1.5, 0.7, 2.0, -0.2, 0.0, 0.4, -0.9, 6.0]).view(1, 1, 3, 3)
