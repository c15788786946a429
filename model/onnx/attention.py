"""Attention as two operators of a domain of ours, each with a body of standard ones.

A runtime without a kernel for them reads the bodies, functions of the same file; one that has kernels takes the file without. The bodies are
traced from the network's own attention, so that there is one text of what it computes: here is only how the operators' inputs become a `Layout`.
They are made for one network, whose widths, heads and alpha are constants in them; the attributes say the same to kernels.

HstuAttention(qkv [T, 3 * width], history_index [B, Hp], history_limit [B, Hp], candidate_index [B, Kp], candidate_limit [B, Kp]) -> [T, width]
HstuCandidateAttention(candidate_q [C, width], kv [T, 2 * width], history_index, candidate_index, candidate_limit) -> [C, width]

Indices point at rows of T, or hold T where padded; limits are 0 there. Row n of C is that of the n-th candidate index that is not padded. Rows that
no index names may hold anything, as may what comes out of them.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from torch import Tensor, nn

from model.batch import PackedBatch
from model.hstu import HistoryCandidateAttention
from model.masks import Layout, causal, interval
from model.network import MTGR
from model.onnx.trace import OPSET, trace

DOMAIN, VERSION = "mtgr", 1
INDICES = ("history_index", "history_limit", "candidate_index", "candidate_limit")
ALL, LAST = "HstuAttention", "HstuCandidateAttention"
INPUTS = {ALL: ("qkv", *INDICES), LAST: ("candidate_q", "kv", "history_index", "candidate_index", "candidate_limit")}

ROWS = {"qkv": ("T",), "kv": ("T",), "candidate_q": ("C",), "history_index": ("B", "Hp"), "history_limit": ("B", "Hp")}
AXES = {**ROWS, "out": ("rows",), "candidate_index": ("B", "Kp"), "candidate_limit": ("B", "Kp")}


def replace(model: MTGR) -> None:
    """Make the attention of `model` operators, for tracing alone: it computes zeros from here on. Raises ValueError for what is none of ours."""
    indices: dict[str, Tensor] = {}

    def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        fields = dict(zip(PackedBatch.__dataclass_fields__, inputs, strict=True))
        indices.update({name: fields[name] for name in INDICES})
        if not model.config.dynamic_mask:
            indices["history_limit"] = causal(indices["history_limit"])

    for block, attention in zip(model.blocks, _attentions(model), strict=True):
        block.attention = _Operators(attention, indices)
    model.register_forward_pre_hook(take)


def _attentions(model: MTGR) -> list[HistoryCandidateAttention]:
    found: list[Any] = [block.attention for block in model.blocks]
    for attention in found:
        if type(attention) is not HistoryCandidateAttention:
            raise ValueError(f"the operators are attention of layer=hstu in floats, got {type(attention).__name__}; export it inline")
    return found


class _Operators(nn.Module):
    """Stands in for HistoryCandidateAttention."""

    def __init__(self, attention: HistoryCandidateAttention, indices: dict[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices
        self.said = (attention.heads, attention.alpha, attention.heads * attention.head_width)

    def forward(self, qkv: Tensor, layout: Layout) -> Tensor:
        """As HistoryCandidateAttention, of zeros."""
        return _All.apply(*self._inputs(ALL, qkv=qkv), *self.said)

    def last(self, candidate_q: Tensor, kv: Tensor, layout: Layout) -> Tensor:
        """As HistoryCandidateAttention, of zeros."""
        return _Last.apply(*self._inputs(LAST, candidate_q=candidate_q, kv=kv), *self.said)

    def _inputs(self, operator: str, **rows: Tensor) -> list[Tensor]:
        return [{**self.indices, **rows}[name] for name in INPUTS[operator]]


class _All(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *rest: Any) -> Tensor:
        return qkv.new_zeros(qkv.shape[0], rest[-1])

    @staticmethod
    def symbolic(g: Any, qkv: Any, *rest: Any) -> Any:
        return _node(g, ALL, qkv, *rest)


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, candidate_q: Tensor, *rest: Any) -> Tensor:
        return torch.zeros_like(candidate_q)

    @staticmethod
    def symbolic(g: Any, candidate_q: Any, *rest: Any) -> Any:
        return _node(g, LAST, candidate_q, *rest)


def _node(g: Any, name: str, rows: Any, *rest: Any) -> Any:
    *indices, heads, alpha, width = rest
    out = g.op(f"{DOMAIN}::{name}", rows, *indices, heads_i=heads, alpha_f=alpha)
    out.setType(rows.type().with_sizes([None, width]))  # which no reader could infer where there is no body
    return out


class _Body(nn.Module):
    """An operator from its inputs, by the network's own attention."""

    def __init__(self, attention: HistoryCandidateAttention, operator: str) -> None:
        super().__init__()
        self.attention, self.operator = attention, operator

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs of the operator in order."""
        given = dict(zip(INPUTS[self.operator], inputs, strict=True))
        if self.operator == ALL:
            return self.attention(given["qkv"], _layout(given["qkv"], given))
        return self.attention.last(given["candidate_q"], given["kv"], _layout(given["kv"], given, given["candidate_q"]))


def _layout(rows: Tensor, given: dict[str, Tensor], candidates: Tensor | None = None) -> Layout:
    """The part of a `Layout` that serving reads."""
    total, (requests, history) = rows.shape[0], given["history_index"].shape
    keys = torch.arange(history, device=rows.device)
    places = torch.cat([given["history_index"].reshape(-1), given["candidate_index"].reshape(-1)])
    none = torch.empty(0)
    number, back = none, none
    if candidates is not None:
        valid = given["candidate_index"].reshape(-1) < total
        number = (torch.cumsum(valid.long(), dim=0) - 1).clamp(min=0)
        back = _inverse(torch.where(valid, number, candidates.shape[0]), candidates.shape[0])
    return Layout(
        requests=requests,
        history=history,
        candidates=given["candidate_index"].shape[1],
        rows=places.clamp(max=total - 1),
        unpad=_inverse(places, total),
        filled=none,
        history_mask=interval(given["history_limit"], keys, rows.dtype) if "history_limit" in given else none,
        candidate_mask=interval(given["candidate_limit"], keys, rows.dtype),
        candidate_limit=given["candidate_limit"],
        candidate_rows=none,
        candidate_places=number,
        candidate_unpad=back,
    )


def _inverse(rows: Tensor, total: int) -> Tensor:
    """[total] the place that holds each of the rows 0 to total - 1; 0 for a row in none. What lies beyond `total` is left out."""
    return torch.zeros(total + 1, dtype=torch.long).scatter(0, rows.clamp(max=total), torch.arange(rows.shape[0]))[:total]


def functions(model: MTGR) -> list[onnx.FunctionProto]:
    """The bodies of both operators for a network in the type of its dense weights; call before `replace`, and refused alike."""
    first = _attentions(model)[0]
    return [_function(first, model.config.d_model, name, model.dtype) for name in INPUTS]


def _function(attention: HistoryCandidateAttention, width: int, name: str, dtype: torch.dtype) -> onnx.FunctionProto:
    graph = trace(_Body(attention, name), _example(name, width, dtype), INPUTS[name], "out", AXES).graph
    constants = [onnx.helper.make_node("Constant", [], [tensor.name], name=f"constant_{tensor.name}", value=tensor) for tensor in graph.initializer]
    domains = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_function(DOMAIN, name, INPUTS[name], ["out"], [*constants, *graph.node], domains, ["heads", "alpha"])


def _example(name: str, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Two requests, of 3 and 1 history rows and 2 and 4 candidates; no two lengths are the same."""
    history = torch.tensor([[0, 1, 2], [5, 10, 10]])
    candidates = torch.tensor([[3, 4, 10, 10, 10], [6, 7, 8, 9, 10]])
    given = {
        "qkv": torch.zeros(10, 3 * width, dtype=dtype),
        "kv": torch.zeros(10, 2 * width, dtype=dtype),
        "candidate_q": torch.zeros(6, width, dtype=dtype),
        "history_index": history,
        "history_limit": torch.tensor([[1, 2, 3], [1, 0, 0]]),
        "candidate_index": candidates,
        "candidate_limit": torch.where(candidates < 10, torch.tensor([[3], [1]]), 0),
    }
    return [given[name] for name in INPUTS[name]]
