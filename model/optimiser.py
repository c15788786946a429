"""The two optimisers of training and the learning-rate schedule.

Dense weights take AdamW. Embedding tables take a row-wise Adam: two numbers a row, and a step costs only the rows a batch used, so a
table of a billion rows trains like one of a thousand. Its rate does not fall with a row's uses as Adagrad's does, which was worth .004 to
.007 AUC on MovieLens-1M. Which parameters are tables is told by `nn.Embedding`, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

SPARSE_ROWS = 65_536
"""Tables with more rows get sparse gradients; below, a dense gradient of the whole table is cheaper than sorting the ids used."""


class RowwiseAdam(torch.optim.Optimizer):
    """Adam without momentum, its second moment one number a row; a row's clock ticks only in the steps that use it.

    For a used row with gradient g: t += 1, V = beta * V + (1 - beta) * mean(g^2), w -= lr * g / (sqrt(V / (1 - beta^t)) + eps). Takes
    sparse gradients (touches the rows present, nothing else) or dense ones (a row of zeros is a row not used: it stays as it is).
    Parameters are [rows, columns].
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, beta: float = 0.999, eps: float = 1e-8) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loss is never evaluated twice here"
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, group["lr"], group["beta"], group["eps"])

    def _update(self, table: nn.Parameter, lr: float, beta: float, eps: float) -> None:
        state = self.state[table]
        if not state:
            state["uses"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
            state["square"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
        gradient = table.grad
        assert gradient is not None
        if not gradient.is_sparse:
            # Every row is worked on, used or not: to pick rows by `nonzero` would make the host wait for the GPU.
            squares = gradient.square().mean(dim=1)
            used = squares != 0
            state["uses"] += used
            state["square"] = torch.where(used, torch.lerp(squares, state["square"], beta), state["square"])
            spread = torch.where(used, _spread(state["square"], state["uses"], beta, eps), 1.0)
            table.add_(gradient / spread[:, None], alpha=-lr)
            return
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        uses = state["uses"][rows] + 1
        moment = torch.lerp(values.square().mean(dim=1), state["square"][rows], beta)
        state["uses"][rows], state["square"][rows] = uses, moment
        table.index_add_(0, rows, values / _spread(moment, uses, beta, eps)[:, None], alpha=-lr)


def _spread(moment: torch.Tensor, uses: torch.Tensor, beta: float, eps: float) -> torch.Tensor:
    """What a row's gradient is divided by."""
    return (moment / (1 - beta**uses)).sqrt() + eps


def tables(model: nn.Module) -> list[nn.Embedding]:
    """The embedding tables of a model, each once."""
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def optimisers(
    model: nn.Module, *, learning_rate: float, table_rate: float, weight_decay: float, sparse_rows: int = SPARSE_ROWS
) -> list[torch.optim.Optimizer]:
    """AdamW over the dense weights (no decay on vectors: biases and norms) and RowwiseAdam over the tables."""
    found = tables(model)
    for table in found:
        table.sparse = table.num_embeddings > sparse_rows
    skip = {id(table.weight) for table in found}
    table_weights = [p for p in model.parameters() if id(p) in skip]
    dense = [p for p in model.parameters() if id(p) not in skip and p.requires_grad]
    groups = [
        {"params": [p for p in dense if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in dense if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.98), fused=True)
    return [adam, RowwiseAdam(table_weights, lr=table_rate)] if table_weights else [adam]


def set_rate(optimisers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's rate to `factor` times the one it was made with."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def schedule(done: float, warmup: float, decay: Literal["cosine", "linear"]) -> float:
    """Factor on the learning rate at share `done` of the training: linear warm-up over share `warmup`, then down to 0 at 1."""
    done = min(max(done, 0.0), 1.0)
    if done < warmup:
        return done / warmup
    left = (1 - done) / (1 - warmup)
    return left if decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
