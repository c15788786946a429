"""JSON by feature names <-> requests and scores by column order: the only place that knows the wire format.

    {"user": {"age": 3}, "events": {"item": [7, 9], "action": [1, 2]}, "static_count": 0,
     "candidates": {"item": [4, 5]}, "cross": {"recency": [0.1, 0.0]}}

`events`, `candidates` and `cross` are columns, or lists of objects, one a row. Events run oldest to newest. Whether ids are in
range and the request is short enough is checked by `pipeline.requests.validate`, as for every other caller of an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import HEADS, FeatureSchema, RankingRequest, Scores
from pipeline.errors import InvalidRequest

FIELDS = ("user", "events", "static_count", "candidates", "cross")


def decode(payload: object, schema: FeatureSchema, chunk: int = 0) -> RankingRequest:
    """A request from parsed JSON. Raises InvalidRequest with the rule, the value and the way out.

    `chunk`: without a static_count, the events since the last multiple of it are real-time; 0 asks the caller to say.
    """
    if not isinstance(payload, Mapping):
        raise InvalidRequest(f"the body must be an object with {', '.join(FIELDS)}, got {_name(payload)}; GET /v1/model shows one")
    unknown = sorted(str(name) for name in payload if name not in FIELDS)
    if unknown:
        raise InvalidRequest(f"the body takes {', '.join(FIELDS)}, got '{unknown[0]}' as well; leave it out")
    user = _columns("user", _row(payload.get("user", {})), [f.name for f in schema.user])
    events = _table("events", payload.get("events", []), [f.name for f in schema.event])
    candidates = _table("candidates", payload.get("candidates", []), [f.name for f in schema.candidate])
    cross = _table("cross", payload.get("cross", []), list(schema.cross))
    n, k = _length(events), _length(candidates)
    static = static_count(payload.get("static_count"), n, chunk)
    # Checked here because `visible` below depends on it; `validate` would be too late.
    if not 0 <= static <= n:
        raise InvalidRequest(f"static_count must be between 0 and the number of events {n}, got {static}")
    if schema.cross and _length(cross) != k:
        raise InvalidRequest(f"cross needs one row a candidate, {k} here, got {_length(cross)}")
    return RankingRequest(
        user=_ids("user", user, 1)[0],
        events=_ids("events", events, n),
        static_count=static,
        candidates=_ids("candidates", candidates, k),
        cross=_numbers(cross, k),
        visible=np.full(k, n - static, np.int64),
    )


def encode(scores: Scores, heads: Sequence[str]) -> dict[str, list[float]]:
    """[K, heads] -> head -> K probabilities, trained heads only."""
    return {head: [round(float(v), 7) for v in scores[:, HEADS.index(head)]] for head in heads}


def example(schema: FeatureSchema) -> dict[str, Any]:
    """A body that any model of this schema accepts: one unknown user, two unknown events, two unknown candidates."""
    return {
        "user": {f.name: 0 for f in schema.user},
        "events": {f.name: [0, 0] for f in schema.event},
        "static_count": 0,
        "candidates": {f.name: [0, 0] for f in schema.candidate},
        "cross": {name: [0.0, 0.0] for name in schema.cross},
    }


Column = Sequence[Any]


def _row(value: object) -> dict[str, Column]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"user must be an object of feature names and ids, got {_name(value)}")
    return {str(name): [item] for name, item in value.items()}


def _table(what: str, value: object, names: Sequence[str]) -> dict[str, Column]:
    """Columns from columns or rows, all of one length, in the schema's order."""
    if isinstance(value, Mapping):
        for name, column in value.items():
            if not isinstance(column, list):
                raise InvalidRequest(f"{what} '{name}' must be a list, one value a row, got {_name(column)}")
        columns = {str(name): column for name, column in value.items()}
    elif isinstance(value, list):
        for i, row in enumerate(value):
            if not isinstance(row, Mapping):
                raise InvalidRequest(f"{what} must be columns or a list of objects, row {i} is {_name(row)}")
            if set(row) != set(value[0]):
                raise InvalidRequest(f"every row of {what} needs the same names, row {i} has {sorted(row)}, row 0 has {sorted(value[0])}")
        columns = {str(name): [row[name] for row in value] for name in (value[0] if value else ())}
    else:
        raise InvalidRequest(f"{what} must be columns or a list of objects, got {_name(value)}")
    if not any(len(column) for column in columns.values()):
        columns = {name: columns.get(name, []) for name in (*names, *columns)}  # nothing sent: an empty table, whatever its form
    ordered = _columns(what, columns, names)
    lengths = {name: len(column) for name, column in ordered.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidRequest(f"the columns of {what} must be of one length, got {lengths}")
    return ordered


def _columns(what: str, columns: Mapping[str, Column], names: Sequence[str]) -> dict[str, Column]:
    for name in columns:
        if name not in names:
            raise InvalidRequest(f"{what} takes the features {', '.join(names) or '(none)'}, got '{name}'; GET /v1/model lists them")
    for name in names:
        if name not in columns:
            raise InvalidRequest(f"{what} needs the feature '{name}', got {', '.join(columns) or 'none'}; send 0 where it is unknown")
    return {name: columns[name] for name in names}


def _length(columns: Mapping[str, Column]) -> int:
    return len(next(iter(columns.values()), ()))


def _ids(what: str, columns: Mapping[str, Column], rows: int) -> NDArray[np.int64]:
    """[rows, columns]; JSON numbers with a point, booleans and strings are refused, because each hides a mistake of the caller."""
    for name, column in columns.items():
        for i, value in enumerate(column):
            if type(value) is not int or abs(value) >= 2**62:
                raise InvalidRequest(f"{what} '{name}' takes whole numbers, got {_name(value)} at position {i}; send ids, 0 where unknown")
    return np.array(list(columns.values()), np.int64).reshape(len(columns), rows).T.copy()


def _numbers(columns: Mapping[str, Column], rows: int) -> NDArray[np.float32]:
    for name, column in columns.items():
        for i, value in enumerate(column):
            if type(value) not in (int, float) or abs(value) > 3e38:
                raise InvalidRequest(f"cross '{name}' takes finite numbers, got {_name(value)} at position {i}; send 0 where unknown")
    return np.array(list(columns.values()), np.float32).reshape(len(columns), rows).T.copy()


def static_count(value: object, events: int, chunk: int) -> int:
    """How many of the oldest events are long-term history: as the caller says, or by the chunk. Raises InvalidRequest."""
    if value is None:
        if chunk:
            return events - events % chunk
        if events:
            raise InvalidRequest("static_count must say how many of the oldest events are long-term history, got none; the others are real-time")
        return 0
    if type(value) is not int:
        raise InvalidRequest(f"static_count must be a whole number, got {_name(value)}")
    return value


def _name(value: object) -> str:
    """A value in a message: short, and with its type where that is the point."""
    if value is None:
        return "null"
    if isinstance(value, (Mapping, list)):
        return "an object" if isinstance(value, Mapping) else "a list"
    return f"{value!r:.60}"
