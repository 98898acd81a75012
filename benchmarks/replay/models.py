"""The models of the replay: about seventy small ones that differ in what they ask of the compiler."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from benchmarks import zoo_transformers
from benchmarks.replay import attention, hostile
from benchmarks.replay.internals import zoo
from octav_fx import Config, Rule, activation, weight

_DEFAULT: Final = Config()
_FOUR: Final = Config(edge_bits=None)
_FOLDED: Final = Config(fold_batchnorm=True)
_FULL: Final = Config(attention="full")


@dataclass(frozen=True)
class Model:
    """A model by its name: what makes it with its inputs, how it is quantized, and what else is recorded of it."""

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    config: Config = _DEFAULT
    rules: tuple[Rule, ...] = ()
    leaves: tuple[type[nn.Module], ...] = ()
    # The mode it is quantized in.
    training: bool = True
    # Also what LOWER leaves of its compiled graphs, and of those of the float model, which the backend quantizes.
    lowered: bool = False
    float_lowered: bool = False
    onnx: bool = False
    # A library that need not be installed.
    needs: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether it can be made in this environment."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def _image(name: str, pixels: int = 64, **options: Any) -> tuple[nn.Module, Any]:
    return zoo.load(name, num_classes=10, **options), torch.randn(2, 3, pixels, pixels)


def _video(name: str) -> tuple[nn.Module, Any]:
    return zoo.load(name, num_classes=10), torch.randn(1, 3, 4, 32, 32)


def _detector(name: str) -> tuple[nn.Module, Any]:
    return zoo.load(name, num_classes=4, min_size=96, max_size=96), ([torch.rand(3, 96, 96)],)


def _flow(name: str) -> tuple[nn.Module, Any]:
    return zoo.load(name), (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128), 2)


def _vision_transformer() -> tuple[nn.Module, Any]:
    kind = zoo.torchvision().models.VisionTransformer
    net = kind(32, 8, num_layers=2, num_heads=4, hidden_dim=16, mlp_dim=32, num_classes=5)
    # It begins at zero.
    nn.init.normal_(net.heads.head.weight)
    return net, torch.randn(2, 3, 32, 32)


def _swin(kind: str) -> tuple[nn.Module, Any]:
    models = zoo.torchvision().models.swin_transformer
    block = models.SwinTransformerBlockV2 if kind == "v2" else models.SwinTransformerBlock
    merging = models.PatchMergingV2 if kind == "v2" else models.PatchMerging
    net = models.SwinTransformer(
        [4, 4], 8, [2, 1], [2, 4], [4, 4], num_classes=5, block=block, downsample_layer=merging
    )
    return net, torch.randn(2, 3, 32, 32)


def _of_transformers(name: str) -> tuple[nn.Module, Any]:
    # It imports torchvision, which needs help beside a CPU-only torch.
    zoo.torchvision()
    return zoo_transformers.make(name)


def _model(name: str, builder: Callable[..., Any], *arguments: Any, **settings: Any) -> Model:
    return Model(name, functools.partial(builder, *arguments), **settings)


def _pair(make: Callable[[], nn.Module], inputs: Callable[[], Any]) -> tuple[nn.Module, Any]:
    # A statement each: the order of random numbers is part of what is recorded.
    net = make()
    return net, inputs()


def _between(function: Callable[..., Any], **parts: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
    made = {name: part() for name, part in parts.items()}
    return hostile.Around(function, **made), torch.randn(2, 8, 5)


def _lines() -> Any:
    return torch.randn(2, 8, 5)


def _rows() -> Any:
    return torch.randn(2, 5, 8)


_SHIFTED: Final = Rule("shifted", (activation(0, "x"), weight(1, "w", channel=1)), target=hostile.shifted)

_TORCHVISION: Final = (
    _model("resnet18", _image, "resnet18", 32, lowered=True, float_lowered=True, onnx=True),
    _model("resnet18 folded", _image, "resnet18", 32, config=_FOLDED, training=False, lowered=True),
    _model(
        "resnet18 overrides",
        _image,
        "resnet18",
        32,
        config=Config(overrides={"layer4.*": {"weight_bits": 8}, "layer1.0.conv1": None, "layer2.*": {"clip": "max"}}),
    ),
    _model("resnext50_32x4d", _image, "resnext50_32x4d", 32, config=_FOUR),
    _model("mobilenet_v2", _image, "mobilenet_v2", 32, lowered=True, onnx=True),
    _model("mobilenet_v2 folded", _image, "mobilenet_v2", 32, config=_FOLDED, training=False),
    _model("mobilenet_v3_small", _image, "mobilenet_v3_small", config=Config(clip="lsq"), lowered=True),
    _model("efficientnet_b0", _image, "efficientnet_b0", 32, config=Config(clip="pact")),
    _model("densenet121", _image, "densenet121", 32),
    _model("googlenet", functools.partial(_image, init_weights=False), "googlenet"),
    _model("shufflenet_v2_x0_5", _image, "shufflenet_v2_x0_5", config=Config(clip="mse"), onnx=True),
    _model("squeezenet1_1", _image, "squeezenet1_1", config=Config(clip="percentile"), lowered=True, onnx=True),
    _model("mnasnet0_5", _image, "mnasnet0_5"),
    _model("regnet_y_400mf", _image, "regnet_y_400mf", 32, training=False),
    _model("convnext_tiny", _image, "convnext_tiny", 32),
    _model("vgg11_bn", functools.partial(_image, init_weights=False), "vgg11_bn", 32, config=_FOLDED, training=False),
    _model("lraspp_mobilenet_v3_large", functools.partial(_image, weights_backbone=None), "lraspp_mobilenet_v3_large"),
    _model("fcn_resnet50", functools.partial(_image, aux_loss=True), "fcn_resnet50", 32),
    _model("r3d_18", _video, "r3d_18"),
    _model("raft_small", _flow, "raft_small", training=False),
    _model("fasterrcnn_mobilenet_v3_large_320_fpn", _detector, "fasterrcnn_mobilenet_v3_large_320_fpn", training=False),
    _model("vit", _vision_transformer, lowered=True, onnx=True),
    _model("vit full attention", _vision_transformer, config=_FULL),
    _model("swin", _swin, "v1", lowered=True),
    _model("swin_v2", _swin, "v2", config=_FULL),
)

_ATTENTION: Final = (
    _model("encoder", _pair, attention.Encoder, attention.masked_words, lowered=True, float_lowered=True, onnx=True),
    _model("decoder", _pair, attention.Decoder, attention.words, lowered=True, float_lowered=True, onnx=True),
    _model("decoder full attention", _pair, attention.Decoder, attention.words, config=_FULL, lowered=True),
    _model("rotary", _pair, attention.Rotary, attention.tokens, config=Config(clip="octav-tight"), onnx=True),
    _model("routed", _pair, attention.Routed, attention.tokens, lowered=True),
    _model("relative", _pair, attention.Relative, attention.tokens, config=_FOUR, onnx=True),
    _model("attended", _pair, functools.partial(attention.Attended, False), attention.tokens, float_lowered=True),
    _model("attended with weights", _pair, functools.partial(attention.Attended, True), attention.tokens),
    _model(
        "attended with bias", _pair, functools.partial(attention.Attended, False, add_bias_kv=True), attention.tokens
    ),
    _model("encoder layers", _pair, attention.encoder_layers, attention.tokens, lowered=True),
    _model(
        "encoder layers eval",
        _pair,
        functools.partial(attention.encoder_layers, norm_first=True, activation="gelu"),
        attention.tokens,
        config=_FULL,
        training=False,
    ),
    _model("translation", _pair, attention.translation, lambda: (attention.tokens(), attention.tokens(5))),
)

_HOSTILE: Final = (
    _model("branch on data", _between, hostile.branch_on_data, lowered=True),
    _model("branch in the open", _between, hostile.branch_in_the_open, lowered=True, float_lowered=True),
    _model("branch on data leaves", _between, hostile.branch_on_data, leaves=(hostile.Block,)),
    _model("loop over values", _between, hostile.loop_over_values),
    _model("loop over unbind", _between, hostile.loop_over_unbind),
    _model("numpy", _between, hostile.with_numpy),
    _model("generator", _between, hostile.generator),
    _model("generator on data", _between, hostile.generator_on_data, training=False),
    _model("without gradients", _between, hostile.without_gradients),
    _model("partly without gradients", _between, hostile.partly_without_gradients),
    _model("autocast", _between, hostile.in_bfloat16),
    _model("autograd function", _between, hostile.autograd_function),
    _model("checkpoint", _between, hostile.checkpointed),
    _model("ways to call", _between, hostile.ways_to_call),
    _model("method of a child", _between, hostile.method_of_a_child),
    _model(
        "recurrent child", functools.partial(_between, lstm=lambda: nn.LSTM(8, 8, batch_first=True)), hostile.recurrent
    ),
    _model("einsum", _between, hostile.einsums, config=_FOUR),
    _model("spellings of products", _between, hostile.spellings_of_products, config=Config(weight_gradient="ste")),
    _model("in place", _between, hostile.written_in_place),
    _model("cached table", _between, hostile.cached_table),
    _model("branch on size", _between, hostile.branch_on_size),
    _model("branch on mode", functools.partial(_between, other=hostile.Block), hostile.doubled_in_training),
    _model("functional norm", functools.partial(_between, norm=lambda: nn.BatchNorm1d(8)), hostile.functional_norm),
    _model("hooks", _pair, hostile.hooked, _lines),
    _model("tied", _pair, hostile.tied, _lines, config=Config(clip="octav-grid")),
    _model(
        "structured",
        _pair,
        hostile.Structured,
        lambda: {"x": torch.randn(2, 5, 8), "cache": {"past": torch.randn(2, 3, 8)}, "output_features": True},
    ),
    _model("convolutions", _pair, hostile.Grouped, lambda: torch.randn(2, 4, 12, 12), lowered=True, onnx=True),
    _model("parts of parts", _pair, hostile.Outer, _lines, config=Config(overrides={"layers.*": {"weight_bits": 3}})),
    _model("auxiliary head", _pair, hostile.Auxiliary, _lines, lowered=True),
    _model("auxiliary head folded", _pair, hostile.Auxiliary, _lines, config=_FOLDED, training=False),
    _model("own rule", _pair, hostile.Shifting, _rows, rules=(_SHIFTED,)),
    _model("own leaf", _pair, hostile.Shifting, _rows, leaves=(hostile.Block,)),
    _model("decorated", _pair, hostile.Decorated, _rows),
)

# One of each kind; the zoo has more.
_OF_TRANSFORMERS: Final = (
    *("BertForSequenceClassification", "DistilBertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"),
    *("Qwen3ForCausalLM", "MixtralForCausalLM", "Gemma2ForCausalLM", "OPTForCausalLM", "T5ForConditionalGeneration"),
    *("ViTForImageClassification", "SwinForImageClassification", "WhisperForConditionalGeneration"),
)

MODELS: Final = (
    *_TORCHVISION,
    *_ATTENTION,
    *_HOSTILE,
    *(_model(name, _of_transformers, name, needs="transformers") for name in _OF_TRANSFORMERS),
)
