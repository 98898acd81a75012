"""Freeze the clips of a trained model, store its weights as integers, and write a file that onnxruntime runs.

python examples/deploy_onnx.py model.onnx

pip install 'octav_fx[onnx]' onnxruntime
"""

import sys
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

import octav_fx


def net() -> nn.Sequential:
    """Return any module of yours: images [N, 3, 32, 32] -> logits [N, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def main(path: Path) -> octav_fx.Deployment:
    """Return what is stored for each operand, and how far the outputs are from the frozen model's."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    q = octav_fx.quantize(net(), images)

    # In place of your training, a few steps on noise.
    optimizer = torch.optim.SGD(octav_fx.param_groups(q, 1e-4), 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        q(torch.randn(8, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    q.eval()

    # Until now each tensor's clip was found when it was met. From here on there are static ones: for an activation the
    # average over some batches of data, for a weight that of its own.
    octav_fx.calibrate(q, [torch.randn(8, 3, 32, 32) for _ in range(4)])
    octav_fx.freeze(q)

    # A copy that stores integers and multiplies them, batch norm folded into scales and biases. Biases are rounded to
    # the grid of the sums that they are added to, so the numbers are close to those of q, not equal.
    integers = octav_fx.convert(q)
    with torch.no_grad():
        difference = (integers(images) - q(images)).abs().max() / q(images).abs().max()
    print(f"converted: {difference:.1e} of the largest logit from the model that was trained")

    # QuantizeLinear and DequantizeLinear of the standard; the size of the batch is free.
    octav_fx.export_onnx(q, images, path)
    outputs = run(path, images[:3])
    print(f"{path}: logits {list(outputs.shape)}")

    found = octav_fx.deployment(q, images, path)
    print(found)
    return found


def run(path: Path, images: Tensor) -> Tensor:
    """Return the outputs of the file as those who have it compute them: nothing of octav_fx is needed for it."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: images.numpy()})[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
