"""MTGR's HSTU block: pointwise attention without softmax, gated, then normalised; no feed-forward.

Attention works in two rectangles, history x history and candidates x history, and gives each candidate its own row on the
diagonal; candidates x candidates never exists. After the last layer only candidates are read, so that layer makes only
candidate queries and no history x history rectangle. Norms and the residual rows are float32 whatever the weights are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.batch import JaggedLayout
from model.config import KINDS, ModelConfig
from model.embeddings import project
from model.masks import Layout, take_rows


class GroupLayerNorm(nn.Module):
    """Layer norm with one gamma and beta per token kind (not the per-head norm other HSTU code calls group norm)."""

    def __init__(self, width: int, eps: float, per_kind: bool) -> None:
        super().__init__()
        self.width = width  # a number, not x.shape[-1]: a traced shape would not be constant in an exported graph
        self.eps = eps
        self.per_kind = per_kind
        rows = len(KINDS) if per_kind else 1
        self.gamma = nn.Parameter(torch.ones(rows, width))
        self.beta = nn.Parameter(torch.zeros(rows, width))

    def by_kernel(self, x: Tensor, kind: Tensor, gate: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """The norm of x, or of x * factor * gate, in the type that the next product takes; `kind` is int32."""
        from model.kernels import ops  # needs Triton, which only machines with a GPU have

        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        gamma, beta = (pair.float().expand(len(KINDS), -1).contiguous() for pair in (self.gamma, self.beta))
        if gate is None:
            return ops.group_norm(x, kind, gamma, beta, self.eps, dtype, None)[0]
        return ops.gated_norm(x, gate, factor, kind, gamma, beta, self.eps, dtype, None)[0]

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        """[n, width] float32 rows of the given kinds [n] -> float32."""
        unit = functional.layer_norm(x, (self.width,), eps=self.eps)
        gamma, beta = self.gamma.float(), self.beta.float()
        if self.per_kind:
            gamma, beta = functional.embedding(kind, gamma), functional.embedding(kind, beta)
        return torch.addcmul(beta, unit, gamma)


def pointwise(scores: Tensor, mask: Tensor) -> Tensor:
    """silu(scores) * mask, in place of fresh memory where autograd allows."""
    return functional.silu(scores).mul_(mask.to(scores.dtype))


class HistoryCandidateAttention(nn.Module):
    """sum_j silu(alpha q_i k_j) v_j over the tokens each row sees, before the 1/N. By the kernels where the layout is theirs."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.alpha = self.head_width**-0.5

    def forward(self, qkv: Tensor, layout: Layout | JaggedLayout) -> Tensor:
        """[T, 3 * width] rows of all tokens -> [T, width]."""
        if isinstance(layout, JaggedLayout):
            q, k, v = qkv.chunk(3, dim=1)
            return self._kernel(q, k, v, layout.tiles, layout.key_tiles, layout)
        padded = take_rows(qkv, layout.rows, layout.unpad)
        q, k, v = self._split(padded[: layout.places], layout.requests, layout.history, "qkv")
        own_q, own_k, own_v = self._split(padded[layout.places :], layout.requests, layout.candidates, "qkv")
        history = torch.matmul(self.factor("p", pointwise(torch.matmul(q * self.alpha, k.transpose(-1, -2)), layout.history_mask)), v)
        candidates = self._candidates(own_q, own_k, own_v, k, v, layout)
        return take_rows(torch.cat([self._join(history), self._join(candidates)]), layout.unpad, layout.rows, layout.filled)

    def last(self, candidate_q: Tensor, kv: Tensor, layout: Layout | JaggedLayout) -> Tensor:
        """[C, width] queries and [T, 2 * width] keys and values -> [C, width]: only the candidates' rows."""
        if isinstance(layout, JaggedLayout):
            k, v = kv.chunk(2, dim=1)
            q = torch.zeros_like(k).index_copy(0, layout.candidate_rows, candidate_q)  # the gradient wants queries beside their keys
            return self._kernel(q, k, v, layout.candidate_tiles, layout.candidate_key_tiles, layout).index_select(0, layout.candidate_rows)
        padded = take_rows(kv, layout.rows, layout.unpad)
        k, v = self._split(padded[: layout.places], layout.requests, layout.history, "kv")
        own_k, own_v = self._split(padded[layout.places :], layout.requests, layout.candidates, "kv")
        (own_q,) = self._split(take_rows(candidate_q, layout.candidate_places, layout.candidate_unpad), layout.requests, layout.candidates, "q")
        candidates = self._join(self._candidates(own_q, own_k, own_v, k, v, layout))
        return take_rows(candidates, layout.candidate_unpad, layout.candidate_places, layout.filled[layout.places :])

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, key_tiles: Tensor, layout: JaggedLayout) -> Tensor:
        from model.kernels import ops  # needs Triton, which only machines with a GPU have

        return ops.attention(q, k, v, tiles, key_tiles, layout.limit, self.heads, layout.block, self.alpha, 1.0, False)

    def _candidates(self, own_q: Tensor, own_k: Tensor, own_v: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """[B, heads, Kp, head width]: the history each candidate sees, and itself."""
        own_q = own_q * self.alpha
        seen = torch.matmul(self.factor("p", pointwise(torch.matmul(own_q, k.transpose(-1, -2)), layout.candidate_mask)), v)
        return seen + self.factor("p", functional.silu((own_q * own_k).sum(dim=-1, keepdim=True))) * own_v

    def factor(self, name: str, x: Tensor) -> Tensor:
        """q, k, v or p = silu(alpha q k) * mask on its way into a product, [B, heads, rows, columns]: where a quantised network rounds it."""
        return x

    def _split(self, rows: Tensor, requests: int, length: int, names: str) -> tuple[Tensor, ...]:
        """[B * length, parts * width] -> parts of those names, [B, heads, length, head width]."""
        parts = rows.view(requests, length, len(names) * self.heads, self.head_width).transpose(1, 2).split([self.heads] * len(names), dim=1)
        return tuple(self.factor(name, part) for name, part in zip(names, parts, strict=True))

    def _join(self, x: Tensor) -> Tensor:
        """[B, heads, length, head width] -> [B * length, width]."""
        return x.transpose(1, 2).reshape(-1, self.heads * self.head_width)


class HstuBlock(nn.Module):
    """One layer. The last one projects U and Q apart from K and V, because only candidates need the former."""

    def __init__(self, config: ModelConfig, last: bool) -> None:
        super().__init__()
        width = config.d_model
        self.width = width
        self.inverse_n = 1 / config.scaling_seqlen
        self.norm1 = GroupLayerNorm(width, config.norm_eps, config.group_norm)
        self.norm2 = GroupLayerNorm(width, config.norm_eps, config.group_norm)
        if last:
            self.uq = nn.Linear(width, 2 * width)
            self.kv = nn.Linear(width, 2 * width)
        else:
            self.uqkv = nn.Linear(width, 4 * width)
        self.attention = HistoryCandidateAttention(config.heads, width)
        self.merge = nn.Linear(width, width)

    def forward(self, x: Tensor, kind: Tensor, layout: Layout | JaggedLayout, last: bool) -> Tensor:
        """[T, width] float32 -> the same, or the candidates' [C, width] in the last layer."""
        if isinstance(layout, JaggedLayout):
            return self._by_kernels(x, kind, layout, last)
        if last:
            return self._last(x, kind, layout)
        u, qkv = functional.silu(project(self.uqkv, self.norm1(x, kind))).split([self.width, 3 * self.width], dim=-1)
        return self._gate(x, u, self.attention(qkv, layout), kind)

    def _by_kernels(self, x: Tensor, kind: Tensor, layout: JaggedLayout, last: bool) -> Tensor:
        """The same with norms, gate and attention by the kernels: what lies between two products is read and written once."""
        normed = self.norm1.by_kernel(x, kind)
        if last:
            rows = layout.candidate_rows
            x, kind = x.index_select(0, rows), kind.index_select(0, rows)
            u, q = functional.silu(self.uq(normed.index_select(0, rows))).split(self.width, dim=-1)
            attended = self.attention.last(q, functional.silu(self.kv(normed)), layout)
        else:
            u, qkv = functional.silu(self.uqkv(normed)).split([self.width, 3 * self.width], dim=-1)
            attended = self.attention(qkv, layout)
        return x + self.merge(self.norm2.by_kernel(attended, kind, u, self.inverse_n)).float()

    def _last(self, x: Tensor, kind: Tensor, layout: Layout) -> Tensor:
        normed = self.norm1(x, kind)
        rows = layout.candidate_rows
        u, q = functional.silu(project(self.uq, functional.embedding(rows, normed))).split(self.width, dim=-1)
        attended = self.attention.last(q, functional.silu(project(self.kv, normed)), layout)
        return self._gate(functional.embedding(rows, x), u, attended, kind.index_select(0, rows))

    def _gate(self, x: Tensor, u: Tensor, attended: Tensor, kind: Tensor) -> Tensor:
        """Residual of the gated rows. 1/N comes after the product with V, in float32: before it, half precision would lose small scores."""
        gated = attended.float() * self.inverse_n * u.float()
        return x + project(self.merge, self.norm2(gated, kind)).float()
