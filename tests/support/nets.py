"""Small models that several test files share."""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """A convolution, a batch norm and a linear layer: [B, 3, H, W] -> [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))
