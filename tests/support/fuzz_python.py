"""Models as users write them: classes with options, state and hooks, and steps in which they are called and changed.

    python -m tests.support.faults python --minutes 10 [--seed 0]

A program is the text of a file: classes, the last of which is Net, and STEPS. Every variable of a forward is
[B, T, 8], so that any statement can follow any other. A step that begins with "r = " is a call. Float itself runs the
steps of a program, or it is none.
"""

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """A construct: lines of forward, and what they need.

    {v}, {w}: variables; {n}: a new one; {l}, {m}: layers; {e}, {f}: expressions; {i}: a number of its own.
    """

    body: str
    init: str = ""
    # A parameter of forward with its default, and what a call may give.
    given: str = ""
    calls: tuple[str, ...] = ()
    # What users do between calls to the module that they call {m}.
    changes: tuple[str, ...] = ()
    # What stands above the class.
    above: str = ""
    # A further result, by name.
    result: str = ""


EXPRESSIONS = (
    *("self.{l}({v})",) * 4,
    *("F.linear({v}, self.{l}.weight)", "self.{l}(self.{m}({v}).relu())", "torch.tanh({v})", "{v}.sigmoid()"),
    *("F.gelu({v})", "F.softmax({v}, -1)", "{v} + {w}", "{v} * {w}", "{v} - {w}.mean(1, keepdim=True)", "-{v}"),
    *("({v} @ {w}.transpose(1, 2)).softmax(-1) @ {v}", "F.scaled_dot_product_attention({v}, {w}, {w})"),
    *("self.norm({v})", "{v} * self.scale", "{v}.reshape({v}.shape[0], -1, 8)", "{v}.flip(1)", "{v}.clone()"),
    *("torch.where({v} > 0, {v}, {w})", "{v}.detach() + {w}", "{v} * {v}.shape[1] / 8"),
)

ROWS = (
    # Arguments.
    Row(
        "if flag{i}:\n    {n} = {e}\nelse:\n    {n} = {f}",
        given="flag{i}=False",
        calls=("flag{i}=True", "flag{i}=False", "flag{i}=None"),
    ),
    Row(
        "{n} = {e}\nif extra{i} is not None:\n    {n} = {n} + self.{l}(extra{i})",
        given="extra{i}=None",
        calls=("extra{i}=y", "extra{i}=x * 2", "extra{i}=None"),
    ),
    Row(
        "for _ in range(k{i}):\n    {v} = torch.tanh(self.{l}({v}))",
        given="k{i}=1",
        calls=("k{i}=2", "k{i}=0", "k{i}=3", "k{i}=True"),
    ),
    Row(
        "{n} = {e}\nif mask{i} is not None:\n    {n} = {n}.masked_fill(mask{i}[..., None], 0.0)",
        given="mask{i}=None",
        calls=("mask{i}=mask", "mask{i}=~mask", "mask{i}=None"),
    ),
    Row(
        "{n} = F.scaled_dot_product_attention(self.{l}({v}), {w}, {w}, is_causal=causal{i})",
        given="causal{i}=True",
        calls=("causal{i}=False",),
    ),
    Row(
        "options = {{'scale': 1.0, **(options{i} or {{}})}}\n{n} = {e} * options['scale']\n"
        "if 'bias' in options:\n    {n} = {n} + options['bias']",
        given="options{i}=None",
        calls=("options{i}={{'scale': 2.0}}", "options{i}=dict(bias=y)", "options{i}={{'bias': 1, 'scale': 0.5}}"),
    ),
    Row(
        "match mode{i}:\n    case 'a':\n        {n} = {e}\n    case 'b' | 'c':\n        {n} = {f}\n"
        "    case _:\n        {n} = {v} * 2",
        given="mode{i}='a'",
        calls=("mode{i}='b'", "mode{i}='d'"),
    ),
    Row(
        "{n} = self.{l}({v})\nfor t in more{i}:\n    {n} = {n} + self.{m}(t)",
        given="more{i}=()",
        calls=("more{i}=(y,)", "more{i}=[x, y]", "more{i}=()"),
    ),
    Row("{n} = {e} * factor{i}", given="factor{i}=1.0", calls=("factor{i}=0.5", "factor{i}=2", "factor{i}=y[:1, :1]")),
    Row(
        "{n} = self.{l}({v})\nif given{i} is not None:\n    {n} = {n} * given{i}.factor\n"
        "    if given{i}.mask is not None:\n        {n} = {n} * given{i}.mask[..., None]",
        given="given{i}=None",
        calls=("given{i}=Given(y, None, 2.0)", "given{i}=Given(x, mask=mask)"),
    ),
    Row("{n} = {e}[:, :until{i}].mean(1, keepdim=True) + {w}", given="until{i}=None", calls=("until{i}=2",)),
    Row("{n} = {e}.to(dtype{i}).float()", given="dtype{i}=torch.float64", calls=("dtype{i}=torch.bfloat16",)),
    Row("{n} = function{i}(self.{l}({v}))", given="function{i}=torch.tanh", calls=("function{i}=F.relu",)),
    # Caches.
    Row(
        "keys = self.{l}({v})\nif past{i} is not None:\n    keys = torch.cat((past{i}, keys), 1)\n"
        "{n} = F.scaled_dot_product_attention({v}, keys, keys)",
        given="past{i}=None",
        calls=("past{i}=past(r, 'past{i}', x)", "past{i}=y[:, :2]"),
        result="past{i}=keys.detach()",
    ),
    Row(
        "if self.kept{i} is None or self.kept{i}.shape != {v}.shape:\n    self.kept{i} = ({e}).detach()\n"
        "{n} = {v} + self.kept{i}",
        init="self.kept{i} = None",
        changes=("{m}.kept{i} = None",),
    ),
    Row(
        "if cache{i} is not None:\n    cache{i}['k'] = {e}.detach()\n{n} = {v} + 1",
        given="cache{i}=None",
        calls=("cache{i}={{}}", "cache{i}={{'k': y}}"),
    ),
    Row("{n} = {e}\nself.last{i} = {n}.detach()", init="self.last{i} = None"),
    Row("{n} = {e}\nself.loss{i} = {n}.square().mean()", init="self.loss{i} = 0.0", result="loss{i}=self.loss{i}"),
    # Attributes.
    Row("{n} = {e} * self.tau{i}", init="self.tau{i} = 1.0", changes=("{m}.tau{i} *= 0.5", "{m}.tau{i} = 2")),
    Row(
        "for _ in range(self.depth{i}):\n    {v} = torch.tanh(self.{l}({v}))",
        init="self.depth{i} = 1",
        changes=("{m}.depth{i} = 2", "{m}.depth{i} -= 1"),
    ),
    Row(
        "{n} = {e} if self.on{i} else {f}",
        init="self.on{i} = True",
        changes=("{m}.on{i} = False", "{m}.on{i} = not {m}.on{i}"),
    ),
    Row(
        "for name in self.order{i}:\n    {v} = getattr(self, name)({v})",
        init="self.order{i} = ['{l}', '{m}']",
        changes=("{m}.order{i} = ['c']", "{m}.order{i}.append('a')", "{m}.order{i}.reverse()"),
    ),
    Row(
        "{n} = {e} * self.options{i}['scale']",
        init="self.options{i} = {{'scale': 1.0}}",
        changes=("{m}.options{i}['scale'] = 0.5", "{m}.options{i} = dict(scale=3)"),
    ),
    Row("{n} = self.{l}({v}).tanh()", changes=("{m}.{l} = nn.Linear(8, 8)", "{m}.{l} = nn.Identity()")),
    Row(
        "{n} = self.{l}({v})",
        changes=("{m}.{l}.requires_grad_(False)", "{m}.{l}.requires_grad_(True)", "{m}.requires_grad_(False)"),
    ),
    Row(
        "{n} = self.{l}({v})",
        changes=("with torch.no_grad(): {m}.{l}.weight.mul_(0.5)", "{m}.{l}.weight = nn.Parameter(torch.rand(8, 8))"),
    ),
    Row("{n} = self.{l}({v})", changes=("{m}.eval()", "{m}.train()", "{m}.norm.eval()", "{m}.zero_grad()")),
    Row("{n} = self.act{i}(self.{l}({v}))", init="self.act{i} = F.relu", changes=("{m}.act{i} = torch.tanh",)),
    Row(
        "{n} = {e} if self.{l}.weight.requires_grad else {f}",
        changes=("{m}.{l}.requires_grad_(False)", "{m}.{l}.weight.requires_grad = True"),
    ),
    Row("self.count{i} += 1\n{n} = {e} * self.count{i}", init="self.count{i} = 0"),
    Row(
        "{n} = {e} / (1 + Kind{i}.factor)", above="class Kind{i}:\n    factor = 1.0", changes=("Kind{i}.factor = 0.5",)
    ),
    Row("{n} = {e} * FACTOR{i}", above="FACTOR{i} = 1.0", changes=("FACTOR{i} = 0.5",)),
    Row(
        "{n} = {e} * OPTIONS{i}['scale']", above="OPTIONS{i} = dict(scale=1.0)", changes=("OPTIONS{i}['scale'] = 0.5",)
    ),
    Row("global CALLS{i}\nCALLS{i} += 1\n{n} = {e}\nif CALLS{i} > 3:\n    {n} = {n} * 2", above="CALLS{i} = 0"),
    Row("self.seen{i}.append({v}.shape[1])\n{n} = {e}", init="self.seen{i} = []"),
    # Modules of their own.
    Row("{n} = self.gate{i}({v}) + self.gate{i}({w}, 0.5, flip=True)", init="self.gate{i} = Gate()"),
    Row(
        "{n} = self.gate{i}({v}, {w}, times=2) + self.gate{i}({w}, mask={v}[..., 0] > 0)", init="self.gate{i} = Gate()"
    ),
    Row(
        "{n} = self.pieces{i}(Given({v}, None, 2.0)).y + self.pieces{i}(Given({w}, {v}[..., 0] > 0)).y",
        init="self.pieces{i} = Pieces()",
    ),
    Row("left, (right, *_) = self.halves{i}([{v}, {w}])\n{n} = left * right", init="self.halves{i} = Halves()"),
    Row("{n} = self.halves{i}(dict(a={v}, b={w}))[0]", init="self.halves{i} = Halves()"),
    Row(
        "{n} = self.gate{i}({v})",
        init="self.gate{i} = Gate()",
        changes=("{m}.gate{i} = Gate(0.5)", "{m}.gate{i}.eval()", "{m}.gate{i}.gain = 0.5", "{m}.gate{i}.train()"),
    ),
    Row("{n} = self.kept{i}({v}, fresh=True)\n{n} = {n} + self.kept{i}({v})", init="self.kept{i} = Kept()"),
    Row(
        "for at, layer in enumerate(self.layers{i}):\n    if at == 1:\n        continue\n    {v} = layer({v})\n"
        "    if at >= self.until{i}:\n        break",
        init="self.layers{i} = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))\nself.until{i} = 2",
        changes=("{m}.until{i} = 0", "{m}.until{i} = 9", "{m}.layers{i}.append(nn.Linear(8, 8))"),
    ),
    Row(
        "{n} = self.named{i}[name{i}]({v})",
        init="self.named{i} = nn.ModuleDict(dict(p=nn.Linear(8, 8), q=Gate(), r=nn.Identity()))",
        given="name{i}='p'",
        calls=("name{i}='q'", "name{i}='r'"),
    ),
    Row(
        "for name, layer in self.named{i}.items():\n    if name != skip{i}:\n        {v} = layer({v})",
        init="self.named{i} = nn.ModuleDict(dict(p=nn.Linear(8, 8), q=Gate()))",
        given="skip{i}=None",
        calls=("skip{i}='p'", "skip{i}='q'"),
    ),
    Row(
        "{n} = self.body{i}[:2]({v}) + self.body{i}[-1]({w})",
        init="self.body{i} = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))",
        changes=("{m}.body{i}[0] = nn.Linear(8, 8)", "{m}.body{i}.append(nn.Tanh())"),
    ),
    Row(
        "for layer in reversed(self.layers{i}[1:]):\n    {v} = {v} + layer({v})",
        init="self.layers{i} = nn.ModuleList([nn.Linear(8, 8), Gate(), nn.Linear(8, 8)])",
    ),
    # Hooks.
    Row("{n} = self.{l}({v})", init="self.{l}.register_forward_hook(lambda module, given, out: out * 2)"),
    Row("{n} = self.{l}({v})", init="self.{l}.register_forward_pre_hook(lambda module, given: (given[0] + 1,))"),
    Row(
        "{n} = self.gate{i}({v}, 0.5)",
        init="self.gate{i} = Gate()\nself.gate{i}.register_full_backward_hook(twice)",
    ),
    Row(
        "{n} = self.gate{i}({v}, scale=0.5)",
        init="self.gate{i} = Gate()\nself.gate{i}.register_forward_pre_hook(doubled, with_kwargs=True)",
    ),
    Row("{n} = {e}\nif {n}.requires_grad:\n    {n}.register_hook(lambda g: g * 2)"),
    Row("{n} = self.{l}({v})", init="self.{l}.weight.register_hook(lambda g: g * 2)"),
    # Weights that are computed.
    Row("{n} = self.w{i}({v})", init="self.w{i} = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))"),
    Row("{n} = self.w{i}({v})", init="self.w{i} = nn.utils.weight_norm(nn.Linear(8, 8))"),
    Row("{n} = self.w{i}({v})", init="self.w{i} = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))"),
    Row(
        "{n} = self.w{i}({v}) + self.w{i}({w})",
        init="self.w{i} = nn.Linear(8, 8)\n"
        "nn.utils.parametrize.register_parametrization(self.w{i}, 'weight', Symmetric())",
    ),
    Row(
        "{n} = self.w{i}({v})",
        init="self.w{i} = nn.Linear(8, 8)\nnn.utils.prune.l1_unstructured(self.w{i}, 'weight', 0.5)",
    ),
    Row("{n} = F.linear({v}, self.{l}.weight + self.{m}.weight, self.{l}.bias)"),
    Row("{n} = {v} @ (self.{l}.weight * self.scale)"),
    Row("{n} = self.tied{i}({v})", init="self.tied{i} = nn.Linear(8, 8)\nself.tied{i}.weight = self.{l}.weight"),
    # Recomputed.
    Row("{n} = checkpoint(self.gate{i}, {v}, 0.5, use_reentrant=False)", init="self.gate{i} = Gate()"),
    Row("{n} = checkpoint(lambda t: self.{l}(t).relu(), {v}, use_reentrant=False)"),
    Row("{n} = checkpoint(self.gate{i}, {v}, use_reentrant=True)", init="self.gate{i} = Gate()"),
    # Other layers.
    Row(
        "{n}, self.state{i} = self.gru{i}({v})\nself.state{i} = self.state{i}.detach()",
        init="self.gru{i} = nn.GRU(8, 8, batch_first=True)\nself.state{i} = None",
    ),
    Row("{n} = self.lstm{i}({v})[0]", init="self.lstm{i} = nn.LSTM(8, 4, bidirectional=True, batch_first=True)"),
    Row(
        "h, outs = None, []\nfor t in {v}.unbind(1):\n    h = self.cell{i}(t, h)\n    outs.append(h)\n"
        "{n} = torch.stack(outs, 1)",
        init="self.cell{i} = nn.GRUCell(8, 8)",
    ),
    Row("{n} = self.conv{i}({v}[:, None]).mean(1)", init="self.conv{i} = nn.Conv2d(1, 3, 3, padding=1)"),
    Row(
        "z = self.conv{i}({v}.mT[..., None])\n{n} = F.adaptive_avg_pool2d(z, (z.shape[2], 1)).flatten(2).mT",
        init="self.conv{i} = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=2)",
    ),
    Row(
        "z = F.max_pool1d(self.conv{i}({v}.mT), 2, ceil_mode=True)\n{n} = F.interpolate(z, {v}.shape[1]).mT",
        init="self.conv{i} = nn.Conv1d(8, 8, 3, padding='same')",
    ),
    Row(
        "{n} = self.bn{i}(self.{l}({v}).mT).mT",
        init="self.bn{i} = nn.BatchNorm1d(8)",
        changes=("{m}.bn{i}.eval()", "{m}.bn{i}.train()", "{m}.bn{i}.momentum = 0.5"),
    ),
    Row(
        "{n} = {e} if ids{i} is None else self.embedding{i}(ids{i}) + {v}",
        init="self.embedding{i} = nn.Embedding(5, 8)",
        given="ids{i}=None",
        calls=("ids{i}=ids", "ids{i}=ids.int()"),
    ),
    Row(
        "{n} = F.linear({v}, self.embedding{i}.weight) @ self.embedding{i}.weight",
        init="self.embedding{i} = nn.Embedding(5, 8)",
    ),
    Row(
        "{n} = self.attention{i}({v}, {w}, {w}, key_padding_mask=pad{i}, need_weights=False)[0]",
        init="self.attention{i} = nn.MultiheadAttention(8, 2, batch_first=True)",
        given="pad{i}=None",
        calls=("pad{i}=torch.arange(x.shape[1])[None] > torch.arange(x.shape[0])[:, None]",),
    ),
    Row(
        "{n} = self.encoder{i}({v})",
        init="self.encoder{i} = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)",
    ),
    Row("{n} = F.dropout(self.{l}({v}), 0.5, self.training)"),
    Row(
        "{n} = self.drop{i}({e})",
        init="self.drop{i} = nn.Dropout(0.5)",
        changes=("{m}.drop{i}.p = 0.1", "{m}.drop{i}.eval()"),
    ),
    Row(
        "causal = torch.ones({v}.shape[1], {v}.shape[1], dtype=torch.bool).tril()\n"
        "{n} = F.scaled_dot_product_attention({v}, {w}, self.{l}({w}), causal)"
    ),
    Row("b, t, _ = {v}.shape\n{n} = self.{l}({v}).view(b, t, 2, 4).transpose(1, 2).flatten(2).reshape(b, t, 8)"),
    # In place, and dtypes.
    Row("with torch.no_grad():\n    {v}[:, :1].mul_(0.5)"),
    Row("{n} = {v}.clone()\n{n}[:, 0] += {w}[:, 0]\n{n}[..., 4:].mul_(2)"),
    Row("{v} += {e}"),
    Row("{n} = {e}\n{n} *= 0.5\n{n} = self.{l}({n})"),
    Row("with torch.autocast('cpu', torch.bfloat16):\n    {n} = self.{l}({v})\n{n} = {n}.float()"),
    Row("{n} = ({v}.double() @ self.{l}.weight.double()).float()"),
    Row("{n} = F.linear({v}.bfloat16(), self.{l}.weight.bfloat16()).float()"),
    Row("self.mean.mul_(0.9).add_({v}.detach().mean((0, 1)), alpha=0.1)\n{n} = {e} + self.mean"),
    Row("with torch.no_grad():\n    self.mean.copy_({v}.mean((0, 1)))\n{n} = {e} - self.mean.clone()"),
    # Python.
    Row("{n} = sum(f({v}) for f in (self.{l}, self.{m}))"),
    Row("{n} = torch.stack([layer(t) for layer in (self.{l}, self.{m}) for t in {v}.unbind(1)], 1)[:, :{v}.shape[1]]"),
    Row("def scaled(t, by=2.0):\n    return self.{l}(t) * by\n{n} = scaled({v}) + scaled({w}, by=0.5)"),
    Row("total = {v}\ndef add(t):\n    nonlocal total\n    total = total + t\nadd(self.{l}({w}))\n{n} = total"),
    Row("{n} = functools.reduce(lambda t, f: f(t), [self.{l}, torch.tanh, self.{m}], {v})"),
    Row("{n} = functools.partial(F.linear, weight=self.{l}.weight)({v})"),
    Row("def parts(t):\n    for at in range(2):\n        yield self.{l}(t) * at\n{n} = sum(parts({v}), {w})"),
    Row("match {v}.shape:\n    case (_, t, 8) if t > 5:\n        {n} = {e}\n    case _:\n        {n} = {f}"),
    Row("try:\n    {n} = {v}.view(-1, 7, 8).mean(1)[:, None] + {w}\nexcept RuntimeError:\n    {n} = {e}"),
    Row("try:\n    {n} = self.missing({v})\nexcept AttributeError:\n    {n} = {e}"),
    Row("try:\n    {n} = {e}\nfinally:\n    self.done{i} = True", init="self.done{i} = False"),
    Row("at = 0\nwhile True:\n    {v} = self.{l}({v}).tanh()\n    at += 1\n    if at >= {v}.shape[0]:\n        break"),
    Row("if (t := self.{l}({v})).shape[0] > 1:\n    {n} = t * 2\nelse:\n    {n} = t"),
    Row("{n} = getattr(self, 'missing', self.{l})({v}) if hasattr(self, '{m}') else {v}"),
    Row("assert {v}.shape[-1] == 8, {v}\n{n} = self.doubled * self.{l}({v})"),
    Row("{n} = self.lift({v}, self.{l}) + type(self).shifted({w})"),
    Row("{n} = self.recursed({v}, 2)"),
    Row(
        "{n} = dict(zip(('p', 'q'), {v}.chunk(2, -1)))\n"
        "{n} = torch.cat([{n}[k] for k in sorted({n}, reverse=True)], -1) + self.{l}({w})"
    ),
    Row("{n} = Scaled(2.0)(self.{l}({v}))"),
    Row("with Doubling() as double:\n    {n} = double(self.{l}({v}))"),
    Row("with torch.set_grad_enabled(self.training):\n    {n} = self.{l}({v})"),
    Row("with torch.enable_grad():\n    {n} = self.{l}({v})"),
    Row("{n} = without_gradient(self.{l}, {v}) + {w}"),
    Row("{n} = self.{l}({v}) if torch.is_grad_enabled() else {e}"),
    Row("if self.training:\n    {v} = {e}\nelse:\n    {v} = {f}"),
    Row("if {v}.detach().mean() > 0:\n    {n} = {e}\nelse:\n    {n} = {f}"),
    Row("{n} = {e} * (1 + int(({v} > 0).sum() > 20))"),
    Row("keep = {v}[..., 0] > 0\n{n} = torch.zeros_like({v})\n{n}[keep] = self.{l}({v}[keep])"),
    Row("{n} = self.{l}({v}) + torch.rand(()) + torch.randn_like({w}) * 0.1"),
    Row("if torch.rand(()) < 0.5:\n    {v} = self.{l}({v})"),
    # Transforms.
    Row("{n} = torch.vmap(lambda t: self.{l}(t) * 2)({v})"),
    Row("{n} = torch.func.grad(lambda t: self.{l}(t).square().sum())({v})"),
    Row("{n} = torch.func.functional_call(self.{l}, {{'weight': self.{m}.weight * 2}}, ({v},))"),
    Row(
        "with torch.enable_grad():\n    t = {v}.detach().requires_grad_()\n"
        "    {n} = torch.autograd.grad(self.{l}(t).tanh().sum(), t, create_graph=True)[0]"
    ),
    Row("{n} = torch.utils._pytree.tree_map(self.{l}, dict(p={v}))['p']"),
)


class Given(NamedTuple):
    """Arguments in one."""

    x: Tensor
    mask: Tensor | None = None
    factor: float = 1.0


@dataclass
class Out:
    """Results in one."""

    y: Tensor
    extra: Tensor | None = None


class Gate(nn.Module):
    """A module with options."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(8, 8), gain

    def forward(self, x: Tensor, scale: Any = None, *, mask: Any = None, flip: bool = False, times: int = 1) -> Tensor:
        z: Tensor = self.fc(x)
        if scale is not None:
            z = z * scale
        if mask is not None:
            z = z.masked_fill(mask[..., None], 0.0)
        if flip:
            z = z.flip(1)
        for _ in range(times):
            z = torch.tanh(z) * self.gain
        return z if self.training else z * 0.5


class Pieces(nn.Module):
    """From a named tuple to a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, given: Given) -> Out:
        y = self.fc(given.x) * given.factor
        return Out(y) if given.mask is None else Out(y * given.mask[..., None], y.detach())


class Halves(nn.Module):
    """From a list or a dict to a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, given: Any) -> Any:
        left, right = given.values() if isinstance(given, dict) else given
        return self.fc(left), (right, None, {"a": self.fc(right)})


class Kept(nn.Module):
    """Remembers until it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, fresh: bool = False) -> Tensor:
        if fresh or self.kept is None:
            self.kept = self.fc(x)
        return self.kept * 2


class Symmetric(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return w + w.T


class Scaled:
    """An object that is called."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by


class Doubling:
    """A context manager of the user's."""

    def __enter__(self) -> Scaled:
        return Scaled(2.0)

    def __exit__(self, *error: object) -> None:
        pass


def doubled(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args[0] * 2, *args[1:]), kwargs


def twice(module: nn.Module, given: Any, out: Any) -> Any:
    return tuple(None if gradient is None else 2 * gradient for gradient in given)


@torch.no_grad()
def without_gradient(function: Any, x: Tensor) -> Any:
    return function(x)


class Base(nn.Module):
    """What every class of a program has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.rand(8))
        self.register_buffer("mean", torch.zeros(8))

    @property
    def doubled(self) -> int:
        return 2

    @staticmethod
    def lift(x: Tensor, layer: nn.Module) -> Any:
        return layer(x) + 1

    @classmethod
    def shifted(cls, x: Tensor) -> Tensor:
        return x - len(cls.__name__)

    def recursed(self, x: Tensor, depth: int) -> Any:
        return x if depth == 0 else self.recursed(self.a(x).tanh(), depth - 1)


@dataclass
class _Class:
    """A class that was written: what it may be called with, and how users change it."""

    text: str
    calls: list[str]
    changes: list[str]
    results: list[str]


class _Writer:
    """Writes one class after the other."""

    def __init__(self, seed: int) -> None:
        self.drawn = random.Random(seed)
        self.above: list[str] = []
        self.number = 0

    def expression(self, names: list[str], depth: int = 0) -> str:
        parts = {"v": self.drawn.choice(names), "w": self.drawn.choice(names)}
        if depth < 2 and self.drawn.random() < 0.25:
            parts["v"] = f"({self.expression(names, depth + 1)})"
        return self.drawn.choice(EXPRESSIONS).format(**parts, l=self.drawn.choice("abc"), m=self.drawn.choice("abc"))

    def write(self, name: str, rows: int, inner: _Class | None = None) -> _Class:
        """Write a class of so many rows, which calls one that was written before."""
        made = _Class("", [], [], [])
        init = ["super().__init__()"] + ["self.inner = Inner()"] * (inner is not None)
        given, names, body, methods = ["x", "y"], ["x", "y"], [], []
        for _ in range(rows):
            self.number += 1
            body += self._row(self.drawn.choice(ROWS), made, names, given, init, methods)
            if inner is not None and self.drawn.random() < 0.5:
                body.append(f"u{self.number} = self.inner({self.call(names, inner, 'mask', 'ids', 'past(')})")
                body[-1] += "['out']" * bool(inner.results)
                names.append(f"u{self.number}")
        body = [line for line in body if "global " in line] + [line for line in body if "global " not in line]
        last, other = names[-1], self.drawn.choice(names)
        ends = [f"return {last}"]
        if name == "Net":
            ends += [f"return {last}, {other}", f"return dict(a={last}, b=[1, None])", f"return Out({last}, {other})"]
        if made.results:
            ends = [f"return dict(out={last}, {', '.join(made.results)})"]
        body.append(self.drawn.choice(ends))
        functions = [("__init__", "self", init), *methods, ("forward", ", ".join(["self", *given]), body)]
        made.text = f"class {name}(Base):\n" + "\n".join(
            "\n".join([f"    def {function}({arguments}):", *(f"        {line}" for line in lines), ""])
            for function, arguments, lines in functions
        )
        if inner is not None:
            made.changes += [change.replace("{m}", "{m}.inner") for change in inner.changes]
        return made

    def _row(self, row: Row, made: _Class, names: list[str], given: list[str], init: list[str], methods: Any) -> Any:
        v, w, new = self.drawn.choice(names), self.drawn.choice(names), f"z{self.number}"
        e, f, layers = self.expression(names), self.expression(names), self.drawn.sample("abc", 2)
        parts = {"v": v, "w": w, "n": new, "i": self.number, "e": e, "f": f, "l": layers[0]}

        def filled(text: str, m: str = layers[1]) -> str:
            return text.format(**parts, m=m)

        lines, kind, arguments = filled(row.body).splitlines(), self.drawn.random(), list(names)
        init += filled(row.init).splitlines()
        self.above += filled(row.above).splitlines()
        made.calls += map(filled, row.calls)
        made.changes += [filled(text, "{m}") for text in row.changes]
        made.results += [filled(row.result)] * bool(row.result)
        if row.given:
            given.append(filled(row.given))
            arguments.append(given[-1].partition("=")[0])
        if "{n}" not in row.body:
            around = self.drawn.choice(("for _ in range(2):", "if self.training:", "with torch.enable_grad():"))
            return [around, *(f"    {line}" for line in lines)] if kind < 0.3 else lines
        names.append(new)
        if kind < 0.15 and not row.result:
            methods.append((f"step{self.number}", ", ".join(["self", *arguments]), [*lines, f"return {new}"]))
            return [f"{new} = self.step{self.number}({', '.join(arguments)})"]
        return lines

    def call(self, names: Any, called: _Class, *unknown: str) -> str:
        """Write the arguments of a call, of which none speaks of what is unknown there."""
        known = [call for call in called.calls if not any(word in call.partition("=")[2] for word in unknown)]
        chosen = {call.partition("=")[0]: call for call in known if self.drawn.random() < 0.4}
        return ", ".join([self.drawn.choice(names), self.drawn.choice(names), *chosen.values()])

    def steps(self, net: _Class) -> list[str]:
        """Write the steps: a call, and then calls, changes, and a few steps of training."""
        written = ["r = m(x, y)"]
        for _ in range(self.drawn.randint(3, 7)):
            kind = self.drawn.random()
            if kind < 0.35 and net.changes:
                written.append(self.drawn.choice(net.changes).format(m="m"))
            elif kind < 0.45:
                written.append(self.drawn.choice(("m.eval()", "m.train()", "train(m, x, y)")))
            else:
                sized = self.drawn.random() < 0.4
                written += [
                    self.drawn.choice(("x, y = sized(3, 7)", "x, y = sized(1, 4)", "x, y = sized(2, 6)"))
                ] * sized
            if written[-1][:3] != "r =":
                written.append(f"r = m({self.call(('x', 'y'), net)})")
        return written


def program(seed: int) -> str:
    """Write the text of a file."""
    writer = _Writer(seed)
    inner = writer.write("Inner", writer.drawn.randint(1, 3)) if writer.drawn.random() < 0.6 else None
    net = writer.write("Net", writer.drawn.randint(2, 4), inner)
    steps = "\n".join(f"    {step!r}," for step in writer.steps(net))
    classes = [inner.text] if inner is not None else []
    return "\n".join([*writer.above, "", *classes, net.text, f"STEPS = [\n{steps}\n]"])
