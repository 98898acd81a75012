"""What other libraries make of a float model for quantization-aware training: 4-bit weights, 4-bit activations.

Each peer keeps its own defaults but for the bits and what a comment gives a reason for. Libraries are imported where
they are used: one that is not installed is an ImportError of its own row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Peer:
    """A library's way from a float model in train mode to one that trains with fake quantization."""

    name: str
    # May change the model it is given; the tensor is a batch like those to come.
    prepare: Callable[[nn.Module, Tensor], nn.Module]
    # What is quantized, and how finely.
    note: str
    is_weight_quantizer: Callable[[nn.Module], bool]

    def weights(self, prepared: nn.Module) -> int:
        """How many weights of a model that prepare returned are quantized."""
        return sum(map(self.is_weight_quantizer, prepared.modules()))


def _fx(model: nn.Module, x: Tensor) -> nn.Module:
    from torch.ao.quantization import QConfig, QConfigMapping, get_default_qat_qconfig
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    default = get_default_qat_qconfig("x86")
    # The default has a range for CPUs without VNNI: half the values, here 3 bits.
    activation = default.activation.with_args(quant_max=15, reduce_range=False)
    config = QConfig(activation, default.weight.with_args(quant_min=-8, quant_max=7))
    return prepare_qat_fx(model, QConfigMapping().set_global(config), (x,))


def _pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization.pt2e import allow_exported_model_train_eval, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    default = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    activation = replace(default.input_activation, quant_max=15)
    weight = replace(default.weight, quant_min=-8, quant_max=7)
    config = replace(default, input_activation=activation, output_activation=activation, weight=weight)
    # Only a strict export tells the calls of a shared ReLU apart; without, the quantizer raises on ResNet's.
    exported = torch.export.export(model, (x,), strict=True).module()
    prepared = prepare_qat_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    return allow_exported_model_train_eval(move_exported_model_to_train(prepared))


def _linear_layers(model: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    int4 = torch.int4  # type: ignore[attr-defined]  # torch's stubs lack it
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(int4, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(int4, "per_channel", is_symmetric=True),
        step="prepare",
    )
    # By type: nn.MultiheadAttention reads the weight of its out_proj, a subclass, past any quantizer in the layer.
    quantize_(model, config, lambda module, name: type(module) is nn.Linear)
    return model


def _brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    from brevitas import nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    # The default collects statistics for 300 steps, with a kthvalue in each, before the scales are trained.
    activation = Int8ActPerTensorFloat.let(bit_width=4, collect_stats_steps=1)
    unsigned = Uint8ActPerTensorFloat.let(bit_width=4, collect_stats_steps=1)
    layer = {
        "input_quant": activation,
        "weight_quant": Int8WeightPerChannelFloat.let(bit_width=4),
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    attention = {
        **{f"in_proj_{key}": value for key, value in layer.items() if key != "return_quant_tensor"},
        **{f"out_proj_{key}": value for key, value in layer.items() if key != "return_quant_tensor"},
        "q_scaled_quant": activation,
        "k_transposed_quant": activation,
        "v_quant": activation,
        "attn_output_weights_quant": unsigned,
        "return_quant_tensor": False,
    }
    layers = {
        nn.Conv2d: (qnn.QuantConv2d, layer),
        nn.Linear: (qnn.QuantLinear, layer),
        nn.MultiheadAttention: (qnn.QuantMultiheadAttention, attention),
    }
    prepared: nn.Module = layerwise_quantize(model, layers)
    for module in prepared.modules():
        if isinstance(module, qnn.QuantMultiheadAttention):
            module.register_forward_pre_hook(_without_is_causal, with_kwargs=True)
    return prepared


def _without_is_causal(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # Brevitas's attention does not know the argument, a hint about attn_mask that nn.TransformerEncoderLayer gives.
    return args, {key: value for key, value in kwargs.items() if key != "is_causal"}


def _is_per_channel(module: nn.Module) -> bool:
    return bool(getattr(module, "is_per_channel", False))


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "torch.ao FX QAT",
            _fx,
            "weights int4 per channel, activations uint4 per tensor after every op, moving averages of min and max; "
            "in nn.TransformerEncoder, a leaf of its tracer, only the weights of the feed-forward layers",
            _is_per_channel,
        ),
        Peer(
            "torchao PT2E QAT",
            _pt2e,
            "X86InductorQuantizer: weights int4 per channel, inputs of convolutions and linear layers uint4 per tensor "
            "and of the ops between, moving averages of min and max; all of nn.MultiheadAttention stays float",
            _is_per_channel,
        ),
        Peer(
            "torchao quantize_ QAT",
            _linear_layers,
            "linear layers only (1 in ResNet-18, 1 in MobileNetV2, 9 of the 17 in the transformer): weights int4 per "
            "channel, inputs int4 per token, from min and max at every step; no convolution, no nn.MultiheadAttention",
            lambda module: hasattr(module, "weight_fake_quantizer"),
        ),
        Peer(
            "Brevitas",
            _brevitas,
            "weights int4 (-7..7) per channel from their maxima, inputs of convolutions, linear layers and attention's "
            "matmuls int4 per tensor with a trained scale, set from the first batch (default: the first 300)",
            lambda module: type(module).__name__ == "WeightQuantProxyFromInjector",
        ),
    )
}
