"""Transformers in small, in the spellings that people use: fused, written out, and PyTorch's own modules."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WORDS, _WIDTH, _HEADS = 50, 16, 4


def words(length: int = 8) -> Tensor:
    return torch.randint(0, _WORDS, (2, length))


def tokens(length: int = 8) -> Tensor:
    return torch.randn(2, length, _WIDTH)


def masked_words() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 6:] = 0
    return words(), mask


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (_HEADS, -1)).transpose(1, 2)


class Encoder(nn.Module):
    """As BERT: attention written out, a padding mask, layer norms behind, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(_WORDS, _WIDTH), nn.Embedding(16, _WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(2))
        self.up, self.down, self.head = nn.Linear(_WIDTH, 32), nn.Linear(32, _WIDTH), nn.Linear(_WIDTH, 3)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Words and their mask [B, T] -> [B, 3]."""
        x = self.words(words) + self.positions.weight[: words.shape[1]]
        q, k, v = (_heads(layer(x)) for layer in (self.query, self.key, self.value))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(mask[:, None, None, :] == 0, -1e4)
        x = self.norms[0](x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = self.norms[1](x + self.down(F.gelu(self.up(x))))
        out: Tensor = self.head(torch.tanh(x[:, 0]))
        return out


class Decoder(nn.Module):
    """As GPT: causal, fused, one projection for q, k and v, the output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(_WORDS, _WIDTH), nn.Parameter(0.1 * torch.randn(16, _WIDTH))
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        """Words [B, T] -> [B, T, words]."""
        x = self.words(words) + self.positions[: words.shape[1]]
        q, k, v = (_heads(part) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = self.head(x)
        return out


class Rotary(nn.Module):
    """As Llama: rotated positions, fewer heads for keys and values, a gated layer, an RMS norm, no biases."""

    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(_WIDTH)
        self.query, self.out = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(_WIDTH, _WIDTH // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(_WIDTH, 24, bias=False) for _ in range(2))
        self.down = nn.Linear(24, _WIDTH, bias=False)
        self.register_buffer("rates", 100.0 ** (-torch.arange(2) / 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, T, width] -> the same shape."""
        angles = torch.arange(x.shape[1])[:, None] * self.rates
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        y = self.norm(x)
        q = _heads(self.query(y))
        k, v = (layer(y).unflatten(-1, (_HEADS // 2, -1)).transpose(1, 2) for layer in (self.key, self.value))
        q, k = (part * cos + torch.cat([-part[..., 2:], part[..., :2]], -1) * sin for part in (q, k))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Routed(nn.Module):
    """Experts, each of which gets the tokens that choose it: a loop over what the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(_WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(_WIDTH, 24), nn.GELU(), nn.Linear(24, _WIDTH)) for _ in "abc"
        )

    def forward(self, x: Tensor) -> Tensor:
        """X [B, T, width] -> the same shape."""
        flat = x.flatten(0, 1)
        chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(flat[rows]))
        return out.view_as(x)


class Attended(nn.Module):
    """PyTorch's attention module, with or without the weights as a second output."""

    def __init__(self, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, batch_first=True, **options)
        self.head, self.need_weights = nn.Linear(_WIDTH, 3), need_weights

    def forward(self, x: Tensor) -> Any:
        """X [B, T, width] -> [B, T, 3], and the weights [B, T, T] or None."""
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return self.head(x + y), weights


class Relative(nn.Module):
    """As T5: a learned bias for each distance, no scaling; baddbmm and einsum as in other models of that time."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(15, _HEADS)
        self.q, self.k, self.v, self.o = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """X [B, T <= 8, width] -> the same shape."""
        places = torch.arange(x.shape[1])
        bias = self.bias(places[:, None] - places + 7).permute(2, 0, 1)
        q, k, v = (_heads(layer(x)).flatten(0, 1) for layer in (self.q, self.k, self.v))
        weights = torch.baddbmm(bias.repeat(len(x), 1, 1), q, k.transpose(1, 2)).softmax(-1)
        y = torch.einsum("bij,bjd->bid", weights, v).unflatten(0, (len(x), _HEADS))
        out: Tensor = x + self.o(y.transpose(1, 2).flatten(2))
        return out


def encoder_layers(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 24, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def translation() -> nn.Module:
    return nn.Transformer(_WIDTH, _HEADS, 1, 1, 24, dropout=0.1, batch_first=True)
