"""Train MTGR on a prepared data set: user-level samples, masked losses of several heads, a budget in passes or seconds.

Per head the loss is the binary cross-entropy, averaged over the step's candidates with a known label; heads are summed with their weights.
A mean per user first, as the paper writes it, lets users of few candidates speak louder: on MovieLens-1M it cost .001 to .003 AUC. With a
budget in passes the result is a function of data, settings and seed on CPU, also across a kill and restart. With a budget in seconds the
schedule follows the clock, so the weights depend on the machine's speed.
Left out: metrics (`metrics`), the order of batches and what they hide (`loader`), what is kept for a restart (`resume`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from model import checkpoint
from model.batch import pack, pack_for_kernels
from model.config import ModelConfig
from model.datasets import open_dataset
from model.kernels.tiles import HEAD_WIDTHS
from model.loader import Hiding, Pack, by_length, epoch_batches, lengths, packed
from model.metrics import evaluate
from model.network import MTGR
from model.optimiser import optimisers, schedule, set_rate
from model.resume import drop_state, load_state, save_state
from pipeline.contracts import HEADS, FeatureSchema, LabelledRequest, RankingRequest
from pipeline.errors import UserError

Progress = Callable[[float, str], None]
SAVING_SHARE = 0.1
"""Of the training's time, the most that saving states may take: with tables of gigabytes one takes longer than what it would save."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. None of it is needed to use the model."""

    epochs: int = 2
    """Passes over the training samples."""
    seconds: float = 0.0
    """Budget of training wall time, validations included, the last evaluation not; 0 means none. With one, weights depend on the machine's speed."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW, for dense weights."""
    table_rate: float = 2e-2
    """Peak rate of the row-wise Adam, for embedding tables."""
    weight_decay: float = 0.01
    """Of dense matrices, decoupled."""
    warmup: float = 0.05
    """Share of the training in which rates climb from 0."""
    decay: Literal["cosine", "linear"] = "linear"
    """How rates fall to 0 at the end."""
    clip_norm: float = 1.0
    """Longest gradient of the dense weights; 0 means any."""
    batch_tokens: int = 2048
    """Most tokens of one step."""
    bucket: int = 16
    """Padded lengths inside a batch are multiples of this."""
    unknown_share: float = 0.1
    """Share of the ids of large tables shown as unknown during training: it regularises them and gives id 0 a meaning."""
    unknown_rows: int = 1000
    """Tables with more rows are large."""
    hidden_share: float = 0.3
    """Share of the requests, for each of `hidden_columns`, that train with it at 0."""
    hidden_columns: tuple[str, ...] = ("user_", "session_")
    """Beginnings of the names of cross features to hide by turns. These sum up the user and the session: a model learns by heart what they
    meant for users of the past, where the history holds for new ones. Hiding them was worth .008 AUC on MovieLens-1M."""
    head_weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of a head's loss, 1 where not named."""
    seed: int = 0
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"
    """auto takes CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of matrix products; auto is bf16 on CUDA and fp32 on CPU. Weights stay fp32."""
    validations: int = 1
    """Validations per pass."""
    patience: int = 2
    """Validations in a row without a better GAUC that end the training; 0 means never. The best weights are kept in any case."""
    save_every_s: float = 30.0
    """Seconds between resumable states, or more where they are so large that saving would take over a tenth of the time; 0 is after every step."""

    @property
    def where(self) -> torch.device:
        """What `device` means on this machine."""
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "bucket", "validations"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "table_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name} must be positive, got {getattr(self, name)}")
        for name in ("seconds", "weight_decay", "clip_norm", "threads", "patience", "save_every_s"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "unknown_share", "hidden_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"train.{name} is a share in [0, 1), got {getattr(self, name)}")
        for name, legal in (("decay", ("cosine", "linear")), ("precision", ("auto", "fp32", "bf16"))):
            if getattr(self, name) not in legal:
                raise UserError(f"train.{name} is one of {', '.join(legal)}, got {getattr(self, name)!r}")
        unknown = sorted(set(self.head_weights) - set(HEADS))
        if unknown:
            raise UserError(f"train.head_weights names heads out of {', '.join(HEADS)}, got {unknown[0]!r}")


def resolve_train(section: Mapping[str, Any]) -> TrainConfig:
    """{'epochs': 3, ...} -> TrainConfig. Raises UserError naming what is wrong."""
    names = [f.name for f in fields(TrainConfig)]
    unknown = sorted(set(section) - set(names))
    if unknown:
        raise UserError(f"train.{unknown[0]} is not a setting of the training; there are {', '.join(names)}")
    columns = section.get("hidden_columns", TrainConfig.hidden_columns)
    return TrainConfig(**{**section, "hidden_columns": tuple(columns)})


def train(config: TrainConfig, model: ModelConfig, data: Path, out: Path, progress: Progress) -> dict[str, float]:
    """Train on the prepared data set in `data`, write a checkpoint into `out`, return its figures.

    Figures: validation/ and test/ auc, gauc, ne and logloss per head, seconds, events_per_second, parameters, epochs, and where the true
    probabilities are known test/auc_below_bayes, what is missing to the best AUC there can be. An interrupted run
    continues from the state it left beside `out`. Raises UserError when the loss is no number or that state is of another training.
    """
    dataset = open_dataset(data)
    started = time.perf_counter()
    state = out.with_name(f"{out.name}.training")
    network, figures = fit(config, model, dataset.schema, dataset.samples("train"), dataset.samples("validation"), state, progress)
    progress(1.0, "scoring the test events")
    for part in ("validation", "test"):
        samples = dataset.samples(part)
        scored = evaluate(samples, score(network, samples, 4 * config.batch_tokens), dataset.schema.heads)
        figures |= {f"{part}/{name}": value for name, value in scored.items()}
    for head, best in dataset.summary.get("bayes_auc", {}).items():
        figures[f"test/auc_below_bayes/{head}"] = best - figures[f"test/auc/{head}"]
    figures["seconds"] = time.perf_counter() - started
    checkpoint.save(out, network, {"train": asdict(config), "metrics": figures, "data": dict(dataset.summary)})
    drop_state(state)
    return figures


def fit(
    config: TrainConfig,
    model: ModelConfig,
    schema: FeatureSchema,
    samples: Sequence[LabelledRequest],
    validation: Sequence[LabelledRequest],
    state: Path,
    progress: Progress,
) -> tuple[MTGR, dict[str, float]]:
    """`train` on samples in memory, without test figures or checkpoint: the best network on `validation`, and how it went.

    `state` is a folder of its own for what a restart needs; `drop_state` removes it.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with config.where:  # made where it is needed: a CPU takes a minute to draw tables of billions of numbers
        network = MTGR(model, schema)
    run = _Run(config, network, samples, validation, state, progress)
    for epoch in range(run.epoch, config.epochs):
        run.one_pass(epoch)
        if run.over:
            break
    if run.best:
        network.load_state_dict(run.best)
    return network.eval(), run.figures()


class _Run:
    """A training under way: the network, its optimisers, and where it stands."""

    def __init__(
        self,
        config: TrainConfig,
        network: MTGR,
        samples: Sequence[LabelledRequest],
        validation: Sequence[LabelledRequest],
        state: Path,
        progress: Progress,
    ) -> None:
        self.config, self.network, self.state, self.progress = config, network, state, progress
        self.samples, self.validation = samples, validation
        self.sizes = lengths([s.request for s in samples])
        self.device = next(network.parameters()).device
        self.columns = [HEADS.index(head) for head in network.schema.heads]
        self.weights = torch.tensor([config.head_weights.get(head, 1.0) for head in network.schema.heads], device=self.device)
        self.pack = packing(network, config.bucket)
        self.hiding = Hiding.of(network.schema, config.unknown_share, config.unknown_rows, config.hidden_share, config.hidden_columns)
        self.optimisers = optimisers(network, learning_rate=config.learning_rate, table_rate=config.table_rate, weight_decay=config.weight_decay)
        self.dense = [p for group in self.optimisers[0].param_groups for p in group["params"]]
        self.goal = f"gauc/{network.schema.heads[0]}"
        self.epoch = self.batch = self.step = self.events = self.stale = 0
        self.done = self.elapsed = 0.0
        self.best_value, self.best_done = -1.0, 0.0
        self.best: dict[str, torch.Tensor] = {}  # on the CPU; empty while there is none and when the network itself is the best
        self.over = False
        self.identity = _identity(config, network, self.sizes)
        position = load_state(state, self.identity, network, self.optimisers)
        if position:
            vars(self).update(position)
            progress(self.done, f"continuing after step {self.step}")
        self.saved_at = self.told_at = time.perf_counter()
        self.saving_s = 0.0
        self.clock = time.perf_counter() - self.elapsed

    def one_pass(self, epoch: int) -> None:
        """The steps of one epoch that are not yet done."""
        batches = epoch_batches(self.sizes, self.config.batch_tokens, self.config.seed, epoch)
        due = {round(len(batches) * (i + 1) / self.config.validations) for i in range(self.config.validations)}
        losses: list[torch.Tensor] = []
        first, self.epoch = self.batch, epoch
        stream = packed(self.samples, batches[first:], self.device, self.pack, (self.config.seed, epoch), self.hiding)
        for number, (batch, labels, known) in enumerate(stream, start=first + 1):
            set_rate(self.optimisers, schedule(self.done, self.config.warmup, self.config.decay))
            losses.append(self._learn(batch, labels, known))
            self.step, self.batch, self.events = self.step + 1, number, self.events + len(labels)
            self.elapsed = time.perf_counter() - self.clock
            self.done = (epoch + number / len(batches)) / self.config.epochs
            if self.config.seconds:
                self.done = max(self.done, self.elapsed / self.config.seconds)
            if number in due or self.done >= 1:
                self._mean_loss(losses)
                self._validate()
            self.over = self.over or self.done >= 1
            if number == len(batches):
                self.epoch, self.batch = epoch + 1, 0
            self._report(losses)
            if self.over:
                return

    def _learn(self, batch: Any, labels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        self.network.train()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        with _autocast(self.config.precision, self.device):
            logits = batch.logits(self.network)
        loss = masked_loss(logits[:, self.columns], labels[:, self.columns], known[:, self.columns], self.weights)
        loss.backward()
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.dense, self.config.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        return loss.detach()

    def _validate(self) -> None:
        scores = score(self.network, self.validation, 4 * self.config.batch_tokens, self.config.precision)
        value = evaluate(self.validation, scores, self.network.schema.heads).get(self.goal, 0.0)
        self.stale += 1
        if value > self.best_value:
            self.best = {} if self.done >= 1 else _kept(self.network, self.best)
            self.best_value, self.best_done, self.stale = value, self.done, 0
        self.over = bool(self.config.patience) and self.stale >= self.config.patience
        self.progress(min(self.done, 1.0), f"validation {self.goal} {value:.4f}, best {self.best_value:.4f}")

    def _report(self, losses: list[torch.Tensor]) -> None:
        """Once a second check the loss and show where we are; once in a while keep the state."""
        now = time.perf_counter()
        last = self.over or not self.batch
        save = now - self.saved_at >= max(self.config.save_every_s, self.saving_s * (1 / SAVING_SHARE - 1))
        if not (last or save or now - self.told_at >= 1):
            return
        loss = self._mean_loss(losses)
        losses.clear()
        self.told_at = now
        left = self.elapsed * (1 - self.done) / max(self.done, 1e-9)
        self.progress(
            min(self.done, 1.0),
            f"pass {self.step and self.done * self.config.epochs:.2f} of {self.config.epochs}, loss {loss:.4f}, "
            f"{self.events / self.elapsed:,.0f} events/s, {left:.0f} s left",
        )
        if save and not self.over:
            names = ("epoch", "batch", "step", "events", "stale", "done", "elapsed", "best_value", "best_done", "best", "over")
            save_state(self.state, self.identity, self.network, self.optimisers, {name: getattr(self, name) for name in names})
            self.saved_at = time.perf_counter()
            self.saving_s = self.saved_at - now if self.config.save_every_s else 0.0

    def _mean_loss(self, losses: list[torch.Tensor]) -> float:
        """Of the steps since the last report. Raises UserError when it is no number, before anything bad is judged or kept."""
        loss = float(torch.stack(losses).mean())
        if not np.isfinite(loss):
            raise UserError(
                f"the loss became {loss} near step {self.step}; lower train.learning_rate (now {self.config.learning_rate:g}) or "
                f"train.table_rate (now {self.config.table_rate:g}), or look for extreme cross features"
            )
        return loss

    def figures(self) -> dict[str, float]:
        """How it went; see `train`."""
        return {
            "train_seconds": self.elapsed,
            "events_per_second": self.events / max(self.elapsed, 1e-9),
            "steps": float(self.step),
            "epochs": self.done * self.config.epochs,
            "best_epoch": self.best_done * self.config.epochs,
            "parameters": float(sum(p.numel() for p in self.network.parameters())),
        }


def _kept(network: MTGR, last: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of the weights on the CPU, in the memory of the `last` one: gigabytes of fresh pages cost as much as the copy."""
    kept = {}
    for name, tensor in network.state_dict().items():
        kept[name] = last[name].copy_(tensor) if name in last else tensor.detach().to("cpu", copy=True)
    return kept


def masked_loss(logits: torch.Tensor, labels: torch.Tensor, known: torch.Tensor, head_weights: torch.Tensor) -> torch.Tensor:
    """sum over heads of w_t * mean of BCE where `known` is 1; all [C, heads] float, w [heads]. A head without a known label adds 0."""
    losses = functional.binary_cross_entropy_with_logits(logits, labels, weight=known, reduction="none").sum(dim=0)
    return (head_weights * losses / known.sum(dim=0).clamp(min=1)).sum()


def packing(network: MTGR, bucket: int) -> Pack:
    """How batches are packed for a network where it is: for the kernels on a GPU that has Triton, else in rectangles of multiples of `bucket`."""
    device = next(network.parameters()).device
    config = network.config
    if device.type == "cuda" and config.layer == "hstu" and config.d_model // config.heads in HEAD_WIDTHS and find_spec("triton"):
        return partial(pack_for_kernels, dynamic=config.dynamic_mask)
    return partial(pack, bucket=bucket)


@torch.no_grad()
def score(
    model: MTGR, samples: Sequence[LabelledRequest] | Sequence[RankingRequest], batch_tokens: int = 16_384, precision: str = "fp32"
) -> list[NDArray[np.float32]]:
    """[K, 4] probabilities of each sample, in their order."""
    model.eval()
    device = next(model.parameters()).device
    pack = packing(model, 16)
    requests = [item.request if isinstance(item, LabelledRequest) else item for item in samples]
    scores: list[NDArray[np.float32]] = [np.empty((0, len(HEADS)), dtype=np.float32)] * len(requests)
    for rows in by_length(lengths(requests), batch_tokens):
        chosen = [requests[i] for i in rows.tolist()]
        with _autocast(precision, device):
            result = torch.sigmoid(pack(chosen).to(device).logits(model).float()).cpu().numpy()
        ends = np.cumsum([len(r.candidates) for r in chosen])[:-1]
        for i, part in zip(rows.tolist(), np.split(result, ends), strict=True):
            scores[i] = part
    return scores


def _autocast(precision: str, device: torch.device) -> Any:
    wanted = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def _identity(config: TrainConfig, network: MTGR, sizes: NDArray[np.int64]) -> str:
    """What must not change between a run and its continuation."""
    told = {k: v for k, v in asdict(config).items() if k not in ("save_every_s", "threads")}
    text = json.dumps([told, network.config.to_dict(), asdict(network.schema)], sort_keys=True)
    return hashlib.sha256(text.encode() + sizes.tobytes()).hexdigest()
