"""Row-wise Adam against a dense double of its formula, and the schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model.optimiser import RowwiseAdam, optimisers, schedule, set_rate, tables


class Bag(nn.Module):
    """Two tables and a linear layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(50, 8, sparse=sparse)
        self.actions = nn.Embedding(5, 8, sparse=sparse)
        self.read = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.read(torch.tanh(self.items(ids) + self.actions(ids % 5))).square().mean()


def _oracle(start: torch.Tensor, gradients: list[torch.Tensor], lr: float, beta: float = 0.999, eps: float = 1e-8) -> torch.Tensor:
    """Row by row, in float64."""
    table, uses, square = start.double().clone(), [0] * len(start), [0.0] * len(start)
    for gradient in gradients:
        for row in range(len(table)):
            if gradient[row].abs().sum() == 0:
                continue
            uses[row] += 1
            square[row] = beta * square[row] + (1 - beta) * float(gradient[row].double().square().mean())
            table[row] -= lr * gradient[row].double() / ((square[row] / (1 - beta ** uses[row])) ** 0.5 + eps)
    return table


@pytest.mark.parametrize("sparse", [False, True])
def test_agrees_with_the_dense_oracle_and_touches_only_used_rows(sparse: bool) -> None:
    bag = Bag(sparse)
    start = bag.items.weight.detach().clone()
    optimiser = RowwiseAdam([bag.items.weight, bag.actions.weight], lr=0.1)
    gradients = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        ids = torch.randint(0, 40, (16,), generator=generator)  # repeats within a batch; rows 40 to 49 are never used
        optimiser.zero_grad(set_to_none=True)
        bag(ids).backward()
        gradient = bag.items.weight.grad
        assert gradient is not None
        assert gradient.is_sparse == sparse
        gradients.append(gradient.to_dense().clone() if sparse else gradient.clone())
        optimiser.step()
    torch.testing.assert_close(bag.items.weight.detach().double(), _oracle(start, gradients, 0.1), atol=5e-6, rtol=0)
    assert torch.equal(bag.items.weight[40:], start[40:])
    assert float((bag.items.weight[:40] - start[:40]).detach().abs().max()) > 0.1


def test_a_sparse_step_touches_the_used_rows_and_makes_nothing_of_the_tables_size() -> None:
    """Changed rows are the used ones, all of them and no others; the state is two floats a row; memory follows the batch."""
    rows, used = 200_000, 64
    table = nn.Embedding(rows, 64, sparse=True)
    start, size = table.weight.detach().clone(), table.weight.numel() * 4
    optimiser = RowwiseAdam([table.weight], lr=0.1)

    def step(ids: torch.Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        table(ids).square().sum().backward()
        optimiser.step()

    first, second = (torch.randint(0, rows, (2 * used,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    step(first)
    changed = (table.weight.detach() != start).any(dim=1).nonzero()[:, 0]
    assert torch.equal(changed, first.unique())
    assert {name: value.shape for name, value in optimiser.state[table.weight].items()} == {"uses": (rows,), "square": (rows,)}
    assert torch.equal(optimiser.state[table.weight]["uses"].nonzero()[:, 0], first.unique())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step(second)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in seen.key_averages())
    assert 4 * 64 * used < taken < size / 20


def test_rows_of_a_small_table_that_were_not_used_stay_bit_for_bit() -> None:
    """Also rows used before, and rows never used, whose clock stands at 0."""
    table = nn.Embedding(6, 4)
    optimiser = RowwiseAdam([table.weight], lr=0.1)
    for ids in ([0, 1], [1, 2]):
        before = table.weight.detach().clone()
        optimiser.zero_grad(set_to_none=True)
        table(torch.tensor(ids)).square().sum().backward()
        optimiser.step()
        assert (table.weight.detach() != before).any(dim=1).nonzero()[:, 0].tolist() == ids
    assert optimiser.state[table.weight]["uses"].tolist() == [1, 2, 1, 0, 0, 0]
    assert optimiser.state[table.weight]["square"][3:].tolist() == [0, 0, 0]


def test_sparse_and_dense_gradients_train_alike() -> None:
    dense, sparse = Bag(False), Bag(True)
    for bag in (dense, sparse):
        pair = optimisers(bag, learning_rate=0.01, table_rate=0.05, weight_decay=0.1, sparse_rows=0 if bag is sparse else 1000)
        for step in range(5):
            for optimiser in pair:
                optimiser.zero_grad(set_to_none=True)
            bag(torch.arange(step, step + 12) % 50).backward()
            for optimiser in pair:
                optimiser.step()
    for a, b in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_every_parameter_has_one_optimiser_and_vectors_no_decay() -> None:
    bag = Bag(False)
    pair = optimisers(bag, learning_rate=0.01, table_rate=0.05, weight_decay=0.1)
    owned = [id(p) for optimiser in pair for group in optimiser.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in bag.parameters())
    assert len(tables(bag)) == 2
    decays = {p.ndim: group["weight_decay"] for group in pair[0].param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


def test_large_tables_get_sparse_gradients() -> None:
    bag = Bag(False)
    optimisers(bag, learning_rate=0.01, table_rate=0.05, weight_decay=0.0, sparse_rows=10)
    assert [table.sparse for table in tables(bag)] == [True, False]


def test_state_round_trip_continues_bit_for_bit() -> None:
    bag = Bag(False)
    first = RowwiseAdam([bag.items.weight], lr=0.1)
    bag(torch.arange(10)).backward()
    first.step()
    saved, weight = copy.deepcopy(first.state_dict()), bag.items.weight.detach().clone()
    first.step()
    wanted = bag.items.weight.detach().clone()
    with torch.no_grad():
        bag.items.weight.copy_(weight)
    second = RowwiseAdam([bag.items.weight], lr=0.1)
    second.load_state_dict(saved)
    second.step()
    assert torch.equal(bag.items.weight.detach(), wanted)


def test_schedule_climbs_then_falls_to_zero() -> None:
    for decay in ("linear", "cosine"):
        values = [schedule(i / 100, 0.1, decay) for i in range(101)]  # type: ignore[arg-type]
        assert values[0] == 0
        assert values[10] == 1
        assert values[100] == pytest.approx(0)
        assert values[:11] == sorted(values[:11])
        assert values[10:] == sorted(values[10:], reverse=True)
        assert values[55] == pytest.approx(0.5)
    assert schedule(0.0, 0.0, "linear") == 1
    assert schedule(1.7, 0.1, "linear") == 0


def test_rates_scale_from_the_first_one() -> None:
    pair = optimisers(Bag(False), learning_rate=0.01, table_rate=0.05, weight_decay=0.0)
    set_rate(pair, 0.5)
    set_rate(pair, 0.25)
    assert [group["lr"] for optimiser in pair for group in optimiser.param_groups] == pytest.approx([0.0025, 0.0025, 0.0125])
    with pytest.raises(ValueError, match="lr must be positive"):
        RowwiseAdam([nn.Parameter(torch.ones(2, 2))], lr=0)
