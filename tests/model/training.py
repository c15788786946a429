"""Samples with something to learn: shared by the tests of training and comparison, and by the child process they kill."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from model.config import ModelConfig
from model.train import TrainConfig, fit
from pipeline.contracts import FeatureSchema, LabelledRequest
from tests.factories import SCHEMA, random_request

MODEL = ModelConfig(d_model=16, layers=2, heads=2, max_seq_len=64, scaling_seqlen=64, embedding_dim=8)
TRAIN = TrainConfig(
    epochs=3, batch_tokens=256, learning_rate=5e-3, table_rate=5e-2, threads=1, patience=0, save_every_s=0.0, unknown_share=0.1, unknown_rows=50
)


def learnable(count: int, seed: int, schema: FeatureSchema = SCHEMA) -> list[LabelledRequest]:
    """Users of mixed history. Each item has a quality and the first cross feature helps; engagement is rarer, monetization never known."""
    quality = np.random.default_rng(99).normal(size=schema.candidate[0].rows)
    rng = np.random.default_rng(seed)
    samples = []
    for user in range(count):
        static, realtime, k = (int(n) for n in rng.integers(0, 14, 3))
        request = random_request(rng, static=static, realtime=realtime, candidates=k + 1, serving=False, user_key=user)
        logit = 1.5 * quality[request.candidates[:, 0]] + request.cross[:, 0]
        labels = (rng.random((k + 1, 4)) < 1 / (1 + np.exp(-logit[:, None] - [0.0, -1.0, 0.5, 0.0]))).astype(np.float32)
        known = np.tile([True, True, rng.random() < 0.8, False], (k + 1, 1))
        samples.append(LabelledRequest(request=request, labels=labels, known=known, time=np.arange(k + 1)))
    return samples


def run(
    state: Path, config: TrainConfig = TRAIN, samples: Sequence[LabelledRequest] | None = None, told: list[str] | None = None
) -> dict[str, torch.Tensor]:
    """Train on 300 users and return the weights."""
    schema = FeatureSchema(user=SCHEMA.user, event=SCHEMA.event, candidate=SCHEMA.candidate, cross=SCHEMA.cross, heads=SCHEMA.heads[:3])
    lines = told if told is not None else []
    network, _ = fit(
        config, MODEL, schema, samples or learnable(300, 0), learnable(60, 1), state, lambda share, text: lines.append(f"{share:.3f} {text}")
    )
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


class _Printing(list[str]):
    def append(self, line: str) -> None:
        print(line, flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), told=_Printing())
