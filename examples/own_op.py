"""Quantize the operands of a function of your own.

python examples/own_op.py

octav_fx knows the matmuls and convolutions of PyTorch. A product that is computed in another way, here a convolution
by FFT, is one rule: which arguments are operands, and which axis of the weight has a clip for each of its channels.
"""

import torch
from torch import Tensor, nn

import octav_fx


def fft_conv(x: Tensor, w: Tensor) -> Tensor:
    """Convolve signals x [N, C, T] with filters w [C, T] around the end, by the product of their spectra."""
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w), n=x.shape[-1])


class LongConv(nn.Module):
    """A long filter for each channel, then a mixture of the channels: [N, C, T] -> [N, C, T]."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(channels, length) / length**0.5)
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Filter, then mix."""
        return self.mix(fft_conv(x, self.filters).mT).mT


# Bias, mask or anything else that is no operand has no entry, and stays as it is.
FFT_CONV = octav_fx.Rule(
    "fft_conv",
    (octav_fx.activation(0, "x"), octav_fx.weight(1, "w", channel=0)),
    # The graph keeps calls of this function as they are, and does not look inside.
    target=fft_conv,
)


def main() -> nn.Module:
    """Return the model with all four operands quantized."""
    torch.manual_seed(0)
    model, x = LongConv(channels=8, length=64), torch.randn(4, 8, 64)

    without = octav_fx.quantize(model, x)
    print("Without a rule the FFTs are not matmuls, and stay float:\n")
    print(octav_fx.table(without))

    q = octav_fx.quantize(model, x, rules=[FFT_CONV])
    print("\nWith it:\n")
    print(octav_fx.table(q))

    # Gradients pass the quantizers of your function as they pass those of any other.
    q(x).square().mean().backward()
    assert q.get_parameter("filters").grad is not None
    return q


if __name__ == "__main__":
    main()
