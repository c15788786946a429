"""Accuracy of an engine through the very session that is timed, against the fp32 reference's scores of the same requests.

Per trained head: AUC, GAUC, normalised entropy, log loss, calibration, how far the mean score drifted, and 95 % one-sided bounds of what AUC and
GAUC lose against the reference (`model.paired`). Identical scores lose exactly nothing. Accuracy depends on numerics alone, so the figures are
kept under the engine's build key; the parity sample is scored in every trial all the same, because serving knobs must not change scores.

What ranks too few users wrongly to move an AUC is caught score by score (`check_scores`): an engine that rounds nothing must give the reference's
on the whole quality set, one that rounds must treat no request unlike the others, unless its recipe does: a rare request beyond the range that
calibration saw is clipped by every engine alike. Where a quantised engine is far from the reference it must be near the fake-quantised network of
its checkpoint, whose files are held by their hashes.

Left out: what loss is too much (`gate`), and how far an engine may stray from the oracle (`backends.tolerance`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.cache import Cache, digest
from pipeline.contracts import HEADS, LabelledRequest, RankingRequest, Scores, Session, Settings
from pipeline.errors import MachineError, SettingsError
from pipeline.records import read_json, write_json
from pipeline.requests import load_labelled, load_requests
from pipeline.workload import GOLDEN, PARITY, QUALITY

FloatArray = NDArray[np.float64]
FromRounded = Callable[[float], float]
"""Largest difference from the fake-quantised network's scores, of the requests that differ by more than what is given from the reference's."""
REFERENCE = "reference.npz"
IN_FLIGHT = 64
TOP = 10
EXACT = ("fp32",)
"""Precisions that owe the reference's score to every request. Others round, and the largest of 100,000 differences may exceed their tolerance."""
OUTLIER = 15.0
"""... but not by this many times what they do to the median request: int8 and bf16 on MovieLens gave 2.3 to 8.0, a damaged row of a table more. So
did requests that int8 clips (17 there, 42 on a small synthetic model), which the fake-quantised network tells apart."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Accuracy:
    """What one engine's numerics are worth."""

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    parity: Scores
    """[sum K, heads] scores of the parity sample when it was scored with the quality set."""
    scores: Path
    """npz of both."""


def score(session: Session, requests: Sequence[RankingRequest]) -> list[Scores]:
    """Scores of each request, a bounded number of them in flight. Raises SettingsError where one is not finite."""
    limit = min(IN_FLIGHT, int(session.effective.get("serve.queue_limit", IN_FLIGHT)))
    waiting: deque[Future[Scores]] = deque()
    scores: list[Scores] = []
    for request in requests:
        if len(waiting) == limit:
            scores.append(waiting.popleft().result())
        waiting.append(session.submit(request))
    scores += [future.result() for future in waiting]
    for request, given in zip(requests, scores, strict=True):
        if given.shape != (len(request.candidates), len(HEADS)) or not np.isfinite(given).all():
            wrong = f"the engine must give finite scores [{len(request.candidates)}, {len(HEADS)}], got {given.shape} with bad values"
            raise SettingsError(wrong, "wrong")
    return scores


def accuracy_key(inputs: Path, heads: Sequence[str], engine_key: str) -> str:
    """Names the figures of one engine's numerics on one folder of inputs; this file counts, a figure computed otherwise is another one."""
    files = [inputs / name for name in (QUALITY, PARITY, REFERENCE)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise MachineError(f"{inputs} misses {', '.join(missing)}; run the jobs `inputs` and `reference` on that folder first")
    return Cache.key({"engine": engine_key, "files": digest(*files), "heads": list(heads), "code": digest(Path(__file__))})


def accuracy(session: Session, inputs: Path, heads: Sequence[str], cache: Cache, key: str) -> Accuracy:
    """Score the quality set, or find the figures under `accuracy_key`."""

    def make(out: Path) -> None:
        samples = load_labelled(inputs / QUALITY)
        parity = score(session, load_requests(inputs / PARITY))
        began = time.perf_counter()
        scores = score(session, [sample.request for sample in samples])
        seconds = time.perf_counter() - began
        metrics, intervals = compare(samples, scores, split(reference(inputs, "quality"), samples), heads)
        np.savez(out / "scores.npz", quality=np.concatenate(scores), parity=np.concatenate(parity))
        write_json(out / "figures.json", {"metrics": metrics | {"time_s/quality": seconds}, "intervals": intervals})

    return _read(cache.folder("accuracy", key, make))


def known_accuracy(cache: Cache, key: str) -> Accuracy | None:
    """What a trial of the same numerics found before, if any did."""
    folder = cache.find("accuracy", key)
    return _read(folder) if folder else None


def _read(folder: Path) -> Accuracy:
    figures = read_json(folder / "figures.json")
    with np.load(folder / "scores.npz") as kept:
        parity = kept["parity"]
    intervals = {name: (float(low), float(high)) for name, (low, high) in figures["intervals"].items()}
    return Accuracy(metrics=figures["metrics"], intervals=intervals, parity=parity, scores=folder / "scores.npz")


def reference(inputs: Path, name: str) -> Scores:
    """[sum K, heads] reference scores of the quality, parity or golden set. Raises MachineError where job `reference` has not run."""
    try:
        with np.load(inputs / REFERENCE) as columns:
            scores: Scores = columns[name]
            return scores
    except (OSError, KeyError, ValueError) as error:
        raise MachineError(f"{inputs / REFERENCE} has no scores of '{name}' ({error}); run the job `reference` on that folder first") from error


def check_parity(live: Sequence[Scores], expected: Scores, settings: Settings, what: str) -> float:
    """Largest difference from `expected`. Raises SettingsError where it is more than numerics explain."""
    from pipeline.backends import tolerance

    scores = np.concatenate(live)
    if scores.shape != expected.shape:
        raise MachineError(f"parity scores must be {list(expected.shape)} as of {what}, got {list(scores.shape)}; make the inputs again")
    difference, limit = float(np.abs(scores - expected).max()), tolerance.SCORE[tolerance.precision(settings)]
    if difference > limit:
        raise SettingsError(
            f"scores of the parity sample differ by up to {difference:.2g} from {what}, at most {limit:g} may be: "
            "the engine computes something else under these settings",
            "wrong",
        )
    return difference


def check_scores(metrics: Mapping[str, float], settings: Settings, from_rounded: FromRounded) -> None:
    """Refuse an engine that gave some request of the quality set scores that its precision does not explain. Raises SettingsError.

    One damaged row of an embedding table, met by one user in a thousand, shows here and in no AUC. `from_rounded` is asked where a quantised engine
    would be refused, and there alone.
    """
    from pipeline.backends import tolerance

    precision = tolerance.precision(settings)
    worst, median, limit = metrics["score_diff/max"], metrics["score_diff/p50"], tolerance.SCORE[precision]
    beyond = limit if precision in EXACT else max(limit, OUTLIER * median)
    if worst <= beyond:
        return
    found = f"scores of the quality set differ by up to {worst:.2g} from the reference, in the median request by {median:.2g}"
    if settings.get("quant.recipe", "none") == "none":
        raise SettingsError(f"{found}; at most {limit:g} may be in {precision}: the engine computes something else for some requests", "wrong")
    unexplained, limit = from_rounded(beyond), tolerance.of_rounded(settings)
    if unexplained > limit:
        raise SettingsError(
            f"{found}; those beyond {beyond:.2g} differ by up to {unexplained:.2g} from the fake-quantised network of the checkpoint too, at most "
            f"{limit:.2g} may be: the engine computes something else for some requests; take another engine for this recipe, or quant.recipe=none",
            "wrong",
        )


def differences(scores: Sequence[Scores], expected: Sequence[Scores], heads: Sequence[str]) -> FloatArray:
    """[requests] largest difference of a trained head's score in each."""
    columns = [HEADS.index(head) for head in heads]
    return np.array([np.abs(a - b)[:, columns].max() for a, b in zip(scores, expected, strict=True)], np.float64)


def from_rounded(session: Session, inputs: Path, given: Scores, heads: Sequence[str], beyond: float) -> dict[str, float]:
    """How far an engine's scores of the quality set, `given` [sum K, heads], are from those of a session of the fake-quantised network.

    Only requests that differ by more than `beyond` from the reference are scored.
    """
    samples = load_labelled(inputs / QUALITY)
    scores = split(given, samples)
    far = np.flatnonzero(differences(scores, split(reference(inputs, "quality"), samples), heads) > beyond)
    rounded = score(session, [samples[i].request for i in far])
    return {"requests": float(len(far)), "score_diff/rounded": float(differences([scores[i] for i in far], rounded, heads).max())}


def compare(
    samples: Sequence[LabelledRequest], scores: Sequence[Scores], expected: Sequence[Scores], heads: Sequence[str]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """All figures of `scores` against the `expected` ones of the reference. A figure that is not defined is left out."""
    from model.metrics import evaluate, head_columns

    metrics = evaluate(samples, scores, heads)
    intervals: dict[str, tuple[float, float]] = {}
    theirs = head_columns(samples, expected, heads)
    for head, (labels, values, users) in head_columns(samples, scores, heads).items():
        found = _head(labels, theirs[head][1], values, users, {kind for kind in ("auc", "gauc") if f"{kind}/{head}" in metrics})
        metrics |= {f"{kind}/{head}": value for kind, value in found[0].items()}
        intervals |= {f"{kind}/{head}": pair for kind, pair in found[1].items() if np.isfinite(pair).all()}
    worst = differences(scores, expected, heads)
    metrics["score_diff/max"], metrics["score_diff/p50"] = float(worst.max()), float(np.median(worst))
    agreement = top_agreement(scores, expected, [HEADS.index(head) for head in heads])
    if np.isfinite(agreement):
        metrics[f"topk_agreement/{TOP}"] = agreement
    return metrics, intervals


def _head(
    labels: NDArray[np.bool_], expected: FloatArray, values: FloatArray, users: NDArray[np.int64], defined: set[str]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Figures and intervals of one head, by kind; of AUC and GAUC those that are `defined`."""
    from model import metrics as of
    from model import paired

    drift, drift_interval = paired.calibration_drift(expected, values, users)
    errors = paired.calibration_errors(labels, expected, values, users)
    figures = {"calibration_drift": drift, "ece_drift": errors["ece_drift"][0]}
    intervals = {
        "logloss": of.log_loss_interval(labels, values, users),
        "ne": of.normalised_entropy_interval(labels, values, users),
        "calibration_bias": of.mean_interval(values - labels, users),
        "calibration_drift": drift_interval,
        **{kind: interval for kind, (_, interval) in errors.items()},
    }
    losses = {}
    if "auc" in defined:
        intervals["auc"], losses["auc"] = of.auc_interval(labels, values, users), paired.auc_loss(labels, expected, values, users)
    if "gauc" in defined:
        intervals["gauc"], losses["gauc"] = of.gauc_interval(labels, values, users), paired.gauc_loss(labels, expected, values, users)
    for kind, loss in losses.items():
        figures |= {
            f"{kind}_loss": loss.value,
            f"{kind}_loss_lower": loss.lower,
            f"{kind}_loss_upper": loss.upper,
            f"{kind}_users": float(loss.users),
        }
    return figures, intervals


def top_agreement(scores: Sequence[Scores], expected: Sequence[Scores], columns: Sequence[int]) -> float:
    """Share of the reference's ten best candidates that are among ours, over requests of more than ten; NaN without any."""
    shares = []
    for ours, theirs in zip(scores, expected, strict=True):
        if len(ours) > TOP:
            best = [np.argsort(-table, axis=0, kind="stable")[:TOP] for table in (ours, theirs)]
            shares += [len(np.intersect1d(best[0][:, column], best[1][:, column])) / TOP for column in columns]
    return float(np.mean(shares)) if shares else float("nan")


def split(flat: Scores, samples: Sequence[LabelledRequest] | Sequence[RankingRequest]) -> list[Scores]:
    """[sum K, heads] -> one array a request."""
    counts = [len(item.labels) if isinstance(item, LabelledRequest) else len(item.candidates) for item in samples]
    if sum(counts) != len(flat):
        raise MachineError(f"there must be one score a candidate, {sum(counts)} here, got {len(flat)}; make the inputs and reference again")
    return np.split(flat, np.cumsum(counts)[:-1])


def make_reference(session: Session, inputs: Path, out: Path) -> dict[str, float]:
    """Write reference.npz: the session's scores of the quality, parity and golden sets, [sum K, heads] each. Returns the largest of each."""
    quality = [sample.request for sample in load_labelled(inputs / QUALITY)]
    sets = {"quality": quality, "parity": load_requests(inputs / PARITY), "golden": load_requests(inputs / GOLDEN)}
    scores = {name: np.concatenate(score(session, requests)) for name, requests in sets.items()}
    np.savez(out / REFERENCE, **scores)  # type: ignore[arg-type]
    return {f"candidates/{name}": float(len(values)) for name, values in scores.items()}
