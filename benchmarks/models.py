"""The models that are measured, with a batch and its targets."""

import torch
from torch import Tensor, nn

from octav_fx import zoo

MODELS = ("resnet18", "mobilenet_v2", "encoder")


class Encoder(nn.Module):
    """Four transformer layers, 256 wide with 4 heads, and a classifier over the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """X [batch, tokens, 256] -> [batch, 1000]."""
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


def load(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in train mode, a batch, and its targets.

    16 images of 96 px, 8 sequences of 128 tokens, or, for "mlp-WIDTH", 1024 rows for four layers of that width.
    """
    torch.manual_seed(0)
    if name.startswith("mlp-"):
        width = int(name.removeprefix("mlp-"))
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*layers), torch.randn(1024, width), torch.randint(0, width, (1024,))
    if name == "encoder":
        return Encoder(), torch.randn(8, 128, 256), torch.randint(0, 1000, (8,))
    return zoo.load(name), torch.randn(16, 3, 96, 96), torch.randint(0, 1000, (16,))
