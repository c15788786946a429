"""Logistic regression on running rates: what any model of this data has to beat.

Six numbers per event (the user's and the item's smoothed rate of the head, their logits, the log counts of both), all from strictly
earlier events. It reads no sequence and no id.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.datasets.dataset import Dataset
from model.datasets.samples import PARTS, Samples, part_of
from pipeline.contracts import HEADS


def regression_scores(dataset: Dataset) -> list[NDArray[np.float32]]:
    """[K, heads] probabilities for each sample of `dataset.samples("test")`, in their order; heads without a signal are 0.

    A head is fitted on the training events whose answer was known by the end of training.
    """
    from sklearn.linear_model import LogisticRegression

    columns, names = dataset.columns, dataset.schema.cross
    train, test = part_of(columns.order, "train"), part_of(columns.order, "test")
    scores = np.zeros((len(columns), len(HEADS)), np.float32)
    for head in dataset.schema.heads:
        column = HEADS.index(head)
        logits = columns.cross[:, [names.index(f"user_rate/{head}"), names.index(f"item_rate/{head}")]]
        counts = columns.cross[:, [names.index("user_count"), names.index("item_count")]]
        inputs = np.concatenate([1 / (1 + np.exp(-logits)), logits, counts], axis=1)
        answered = train & columns.known[:, column] & (columns.time + columns.horizon_s[column] <= columns.part_end[PARTS.index("train")])
        labels = columns.labels[answered, column]
        if labels.min(initial=1) == labels.max(initial=0):
            scores[test, column] = labels.mean() if len(labels) else 0.5
            continue
        fitted = LogisticRegression(max_iter=1000).fit(inputs[answered], labels)
        scores[test, column] = fitted.predict_proba(inputs[test])[:, 1]
    samples = dataset.samples("test")
    assert isinstance(samples, Samples)
    return [scores[start:stop] for *_, start, stop in samples.spans]
