"""Engine `eager` as a member of several: it starts in a second, and takes requests as engine vllm's sessions do."""

from __future__ import annotations

from concurrent.futures import Future
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backends import eager
from pipeline.backends.vllm.payload import Flat
from pipeline.contracts import RankingRequest, Scores, Settings


class EagerMember:
    """contracts.Backend, as far as members need it."""

    def load(self, folder: Path, settings: Settings) -> Any:
        session: Any = eager.BACKEND.load(folder, settings)

        def accept(flat: Flat) -> Future[Scores]:
            future: Future[Scores] = session.submit(restored(flat))
            return future

        session.accept = accept
        return session


def restored(flat: Flat) -> RankingRequest:
    """The request again, without its arrival."""
    ids, at, parts, told = np.frombuffer(flat.ids, np.int32).astype(np.int64), 0, [], flat.lengths
    events = told.static + told.realtime, told.event_columns
    for shape in ((told.user,), events, (told.candidates, told.candidate_columns), (told.candidates,)):
        parts.append(ids[at : at + prod(shape)].reshape(shape))
        at += prod(shape)
    user, history, candidates, visible = parts
    cross = np.frombuffer(flat.cross, np.float32).reshape(told.candidates, told.cross_columns)
    return RankingRequest(
        user=user, events=history, static_count=told.static, candidates=candidates, cross=cross, visible=visible, user_key=flat.user_key
    )


BACKEND = EagerMember()
