"""The comparison transformer of the design card: softmax attention, ReLU feed-forward, sigmoid gate, width-3 convolution over time.

It keeps MTGR's mask and token kinds, so that the two differ in the layer alone. The convolution is causal, and a candidate's reaches
over the newest history it may see and itself; so candidates stay independent and history rows never depend on what follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import ModelConfig
from model.embeddings import project
from model.hstu import GroupLayerNorm
from model.masks import Layout, take_rows

HIDDEN = -1e9
"""Score of a key that is not seen: finite, so that a padded row with no key at all gives no NaN."""


class SoftmaxAttention(nn.Module):
    """Multi-head attention over the mask's two intervals."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.alpha = self.head_width**-0.5

    def forward(self, qkv: Tensor, layout: Layout) -> Tensor:
        """[T, 3 * width] -> [T, width]."""
        padded = take_rows(qkv, layout.rows, layout.unpad)
        q, k, v = self._split(padded[: layout.places], layout.requests, layout.history)
        own_q, own_k, own_v = self._split(padded[layout.places :], layout.requests, layout.candidates)
        history = torch.matmul(self._weights(torch.matmul(q * self.alpha, k.transpose(-1, -2)), layout.history_mask), v)
        own_q = own_q * self.alpha
        seen = torch.matmul(own_q, k.transpose(-1, -2)).float().masked_fill(layout.candidate_mask == 0, HIDDEN)
        own = (own_q * own_k).sum(dim=-1, keepdim=True).float()
        weights = torch.softmax(torch.cat([seen, own], dim=-1), dim=-1).to(v.dtype)
        candidates = torch.matmul(weights[..., :-1], v) + weights[..., -1:] * own_v
        return take_rows(torch.cat([self._join(history), self._join(candidates)]), layout.unpad, layout.rows, layout.filled)

    def _weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(scores.float().masked_fill(mask == 0, HIDDEN), dim=-1).to(scores.dtype)

    def _split(self, rows: Tensor, requests: int, length: int) -> tuple[Tensor, ...]:
        return rows.view(requests, length, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4).unbind(0)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(-1, self.heads * self.head_width)


def taps(x: Tensor, layout: Layout) -> Tensor:
    """[T, width] -> [T, 3 * width]: the rows two and one before, zero before the first, and the row itself.

    Before a candidate come the newest two history tokens it sees, not its neighbours.
    """
    width = x.shape[-1]
    padded = take_rows(x, layout.rows, layout.unpad)
    history = padded[: layout.places].view(layout.requests, layout.history, width)
    candidates = padded[layout.places :].view(layout.requests, layout.candidates, width)
    before = functional.pad(history, (0, 0, 2, 0))
    columns = layout.candidate_limit[:, :, None].expand(-1, -1, width)
    history = torch.cat([before[:, :-2], before[:, 1:-1], history], dim=-1)
    candidates = torch.cat([before.gather(1, columns), before.gather(1, columns + 1), candidates], dim=-1)
    return take_rows(torch.cat([history.flatten(0, 1), candidates.flatten(0, 1)]), layout.unpad, layout.rows, layout.filled)


class GatedConvBlock(nn.Module):
    """One layer, pre-norm, each part with its residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.norm1, self.norm2, self.norm3 = (GroupLayerNorm(width, config.norm_eps, config.group_norm) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.attention = SoftmaxAttention(config.heads, width)
        self.merge = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, config.d_ff), nn.ReLU(), nn.Linear(config.d_ff, width))
        self.temporal_gate = nn.Linear(width, width)
        self.temporal_mix = nn.Linear(3 * width, width)

    def forward(self, x: Tensor, kind: Tensor, layout: Layout, last: bool) -> Tensor:
        """[T, width] float32 -> the same, or the candidates' [C, width] in the last layer.

        The convolution reaches into the history, so that only its own result can be cut to the candidates.
        """
        x = x + project(self.merge, self.attention(project(self.qkv, self.norm1(x, kind)), layout)).float()
        x = x + project(self.feed_forward, self.norm2(x, kind)).float()
        normed = self.norm3(x, kind)
        gated = normed * torch.sigmoid(project(self.temporal_gate, normed).float())
        mixed = taps(gated, layout)
        if last:
            x, mixed = functional.embedding(layout.candidate_rows, x), functional.embedding(layout.candidate_rows, mixed)
        return x + project(self.temporal_mix, mixed).float()
