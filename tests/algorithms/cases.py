"""Weights, inputs and small models that the tests of the algorithms share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mono_quant.calibration import Batch
from mono_quant.core import LayerScheme

INT4 = LayerScheme("weight_only", bits=4, symmetric=False, group_size=16)
INT4_SYMMETRIC = LayerScheme("weight_only", bits=4, group_size=16)
INT4_CHANNEL = LayerScheme("weight_only", bits=4, symmetric=False)
INT8 = LayerScheme()
INT8_ASYMMETRIC = LayerScheme(symmetric=False)
INT8_TENSOR = LayerScheme(per_channel=False)
SCHEMES = (INT4, INT4_SYMMETRIC, INT4_CHANNEL, INT8, INT8_ASYMMETRIC, INT8_TENSOR)


def weights(seed: int, out_features: int = 12, in_features: int = 48) -> Tensor:
    """Answer a matrix with a few large values, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(out_features, in_features, generator=generator)
    spikes = torch.rand(matrix.shape, generator=generator) < 0.02
    return torch.where(spikes, matrix * 6, matrix)


def correlated_rows(seed: int, count: int = 200, width: int = 48) -> Tensor:
    """Answer inputs whose channels have things in common, and of which a few are large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 3, width, generator=generator)
    rows = torch.randn(count, width // 3, generator=generator) @ mixing
    rows += 0.1 * torch.randn(count, width, generator=generator)
    rows[:, 5] *= 20
    return rows


def moments(rows: Tensor) -> Tensor:
    return rows.t() @ rows / len(rows)


class Block(nn.Module):
    """A transformer block: attention with fewer key and value heads than queries, and a gated MLP."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width // 2)
        self.v = nn.Linear(width, width // 2)
        self.o = nn.Linear(width, width)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (self._split(layer(h)) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        mixed = torch.softmax(q @ k.transpose(2, 3) / self.size**0.5, dim=-1) @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(torch.sigmoid(self.gate(h)) * self.up(h))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.size)).transpose(1, 2)


class LanguageModel(nn.Module):
    """An embedding, blocks, and an output layer with the embedding's weight."""

    def __init__(self, blocks: int = 2, width: int = 32, vocabulary: int = 50) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def language_model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel().eval()
    with torch.no_grad():
        for block in model.blocks:
            # Outlier channels, which scaling is for.
            block.norm1.weight[3] = 12.0
            block.norm2.weight[7] = 15.0
            block.up.weight[5] *= 20
    return model


def token_batches(count: int = 6, length: int = 24, samples: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [Batch((torch.randint(0, 50, (samples, length), generator=generator),), {}) for _ in range(count)]
