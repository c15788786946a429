"""How much of returning users' histories vLLM finds again, by pool, block and window: prints lines, writes results.json.

    python reports/vllm-cache/measure.py OUT [--tiny]

No model runs: the visits of a data set's last tenth, in order of time, go through vLLM's own KVCacheManager with our spec, manager and marks, one request
after the other, and the tenth before warms it up. A tier in the host's memory is vLLM's CPUOffloadingManager, asked in the order in which its
connector asks. Needs an interpreter with vLLM, for CPUs or not; `--tiny` runs all of it in seconds. `report.py` beside this makes report.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import vllm  # noqa: E402
from vllm import PoolingParams  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor  # noqa: E402
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key  # noqa: E402
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

from model.config import SIZES  # noqa: E402
from model.datasets.config import DataConfig  # noqa: E402
from model.datasets.log import GAP_ROWS, SESSION_GAP_S, EventLog, gap_bucket, user_starts  # noqa: E402
from model.datasets.samples import Columns, part_of, strictly_earlier  # noqa: E402
from pipeline.backends.vllm.inside.cache import HistorySpec, history_hasher  # noqa: E402
from pipeline.backends.vllm.payload import KEY, MARK, encode  # noqa: E402
from pipeline.backends.vllm.plugin import register  # noqa: E402
from pipeline.contracts import RankingRequest  # noqa: E402

LARGE = SIZES["large"]
TOKEN = 2 * LARGE.d_model * LARGE.layers
"""Keys and values of a token of the large size; in bf16 twice as many bytes, in fp8 as many."""
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.1)
"""Of all histories: what the pool holds."""
BLOCKS = (16, 64, 128)
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set, the window its histories are cut to, and when users come."""

    name: str
    config: DataConfig
    candidates: tuple[int, int]
    visits: str
    """moment: each second with an event; page: the first of every ten events; session: the first event after a pause of an hour."""


@dataclass(frozen=True)
class Visit:
    """A request, without what only a model reads."""

    user: int
    salt: str
    payload: bytes
    history: int
    tokens: int
    reusable: int
    """Leading tokens that are the user's last visit's, under the same static part."""
    moved: int
    """Tokens that were in the last visit too, but under another static part."""
    grown: int
    """Events since the last visit."""
    again: bool
    counted: bool


def columns_of(log: EventLog, config: DataConfig) -> Columns:
    """As `dataset.prepare` makes them, without statistics: nothing here reads them."""
    same = np.append(False, log.user[1:] == log.user[:-1])
    gap = np.where(same, np.diff(log.time, prepend=log.time[0]), -1)
    none = np.zeros((len(log), 0), np.float32)
    return Columns(
        schema=None,  # type: ignore[arg-type]
        user=log.user, item=log.item, time=log.time, order=log.order, action=log.action, gap=np.minimum(gap_bucket(gap), GAP_ROWS - 1).astype(np.uint8),
        labels=log.labels, known=log.known, cross=none, user_start=user_starts(log.user, log.users), user_ids=log.user_table.astype(np.int64),
        item_ids=np.concatenate([np.arange(log.items + 1)[:, None], log.item_table], axis=1).astype(np.int64), horizon_s=log.horizon_s, part_end=(),
        max_static=config.max_static, chunk=config.chunk,
    )  # fmt: skip


def moments(columns: Columns, visits: str) -> np.ndarray:
    """Rows of the log at which a user comes, in order of time."""
    user, time_s = columns.user, columns.time
    first = np.append(True, user[1:] != user[:-1])
    opens = first | np.append(True, np.diff(time_s) > (SESSION_GAP_S if visits == "session" else 0))
    if visits == "page":
        number = np.arange(len(user)) - columns.user_start[user]
        opens = number % 10 == 0
    late = part_of(columns.order, "validation") | part_of(columns.order, "test")
    rows = np.flatnonzero(opens & late)
    return rows[np.argsort(columns.order[rows], kind="stable")]


def visits_of(source: Source, log: EventLog) -> list[Visit]:
    """What serving would see."""
    columns = columns_of(log, source.config)
    counted, stops = part_of(columns.order, "test"), strictly_earlier(columns.user, columns.time)
    rng = np.random.default_rng(0)
    low, high = source.candidates
    before: dict[int, tuple[str, int, int, int]] = {}  # salt, history, first event, end of events
    made = []
    for row in moments(columns, source.visits).tolist():
        user, stop = int(columns.user[row]), int(stops[row])
        events, static = columns.history(user, stop)
        count = int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
        request = RankingRequest(
            user=columns.user_ids[user], events=events, static_count=static, candidates=np.zeros((count, 1), np.int64),
            cross=np.zeros((count, 0), np.float32), visible=np.full(count, len(events) - static),
        )  # fmt: skip
        prompt = encode(request)
        history, first = request.tokens - count, stop - len(events)
        marks = 16 * (history // MARK)
        slim = prompt.payload[: 7 * 4] + prompt.payload[len(prompt.payload) - marks :]
        salt, known, begin, end = before.get(user, ("", 0, 0, 0))
        kept = len(request.user) + max(0, end - max(first, begin))
        same = salt == prompt.salt
        made.append(
            Visit(
                user=user, salt=f"{user:08x}{prompt.salt}", payload=slim, history=history, tokens=request.tokens, reusable=min(known, history) if same else 0,
                moved=kept if salt and not same else 0, grown=stop - end if salt else 0, again=bool(salt), counted=bool(counted[row]),
            )
        )  # fmt: skip
        before[user] = prompt.salt, history, first, stop
    return made


def stock_hasher(block: int) -> Any:
    """As vLLM's own: every whole block of the prompt has a hash. Candidates are never the same twice."""
    rng = np.random.default_rng(1)
    ours = history_hasher(block)

    def hashes(request: Request) -> list[bytes]:
        found = ours(request)
        return found + [rng.bytes(32) for _ in range(request.num_tokens // block - len(found))]

    return hashes


class Pool:
    """vLLM's manager of `blocks` blocks, with a tier of `host` blocks behind it."""

    def __init__(self, block: int, blocks: int, stock: bool = False, host: int = 0) -> None:
        kind = FullAttentionSpec if stock else HistorySpec
        spec = kind(block_size=block, num_kv_heads=LARGE.heads, head_size=LARGE.d_model // LARGE.heads, dtype=torch.bfloat16)
        tensors = [KVCacheTensor(size=spec.page_size_bytes * blocks, shared_by=["layer"])]
        config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, max_model_len=8192, scheduler_block_size=block, hash_block_size=block)
        self.block, self.hasher = block, stock_hasher(block) if stock else history_hasher(block)
        self.host = CPUOffloadingManager(num_blocks=host) if host else None
        self.context, self.stored = ReqContext(req_id="replay"), 0

    def serve(self, visit: Visit, number: int) -> tuple[int, int]:
        """Tokens of the history (found in the pool, loaded from the host)."""
        params = PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={KEY: visit.payload})
        request = Request(str(number), [0] * visit.tokens, None, params, cache_salt=visit.salt, block_hasher=self.hasher)
        blocks, found = self.manager.get_computed_blocks(request)[:2]
        keys = [make_offload_key(found_by, 0) for found_by in request.block_hashes]
        loaded = self._loaded(keys, found // self.block) * self.block if self.host else 0
        slots = self.manager.allocate_slots(
            request, visit.tokens - found - loaded, num_new_computed_tokens=found, new_computed_blocks=blocks, num_external_computed_tokens=loaded
        )
        assert slots is not None, f"a pool holds the longest request, got {visit.tokens} tokens"
        if self.host:
            self._store(keys[(found + loaded) // self.block if loaded else 0 :])
        self.manager.free(request)
        return found, loaded

    def _loaded(self, keys: list[Any], found: int) -> int:
        """Blocks after the `found` ones, in the host."""
        count = 0
        for key in keys[found:]:
            if self.host.lookup(key, self.context) is not LookupResult.HIT:
                break
            count += 1
        self.host.touch(keys, self.context)
        self.host.prepare_load(keys[found : found + count], self.context)
        self.host.complete_load(keys[found : found + count], self.context)
        return count

    def _store(self, keys: list[Any]) -> None:
        new = self.host.prepare_store(keys, self.context) if keys else None
        if new and new.keys_to_store:
            self.stored += len(new.keys_to_store)
            self.host.complete_store(new.keys_to_store, self.context)


class Replay:
    """All that is asked of one source."""

    def __init__(self, source: Source, log: EventLog) -> None:
        self.source, self.visits = source, visits_of(source, log)
        last = {visit.user: visit.history for visit in self.visits}
        self.users, self.all = len(last), sum(last.values())
        self.counted = [visit for visit in self.visits if visit.counted]
        self.history = sum(visit.history for visit in self.counted)
        self.known: dict[Any, Row] = {}

    def facts(self, block: int = MARK) -> Row:
        """Of the visits; shares are of all history tokens."""
        first = sum(v.history for v in self.counted if not v.again)
        moved = sum(v.moved for v in self.counted)
        reusable = sum(v.reusable for v in self.counted)
        whole = sum(v.reusable // block * block for v in self.counted)
        return {
            "source": self.source.name, "visits": self.source.visits, "max_static": self.source.config.max_static, "chunk": self.source.config.chunk,
            "requests": len(self.counted), "users": self.users, "all_tokens": self.all, "mean_history": self.history / len(self.counted),
            "mean_growth": sum(v.grown for v in self.counted) / sum(v.again for v in self.counted),
            "returning": sum(v.again for v in self.counted) / len(self.counted), "moves": sum(bool(v.moved) for v in self.counted) / len(self.counted),
            "block": block, "first": first / self.history, "moved": moved / self.history, "rounding": (reusable - whole) / self.history,
            "new": 1 - (first + moved + reusable) / self.history, "ceiling": whole / self.history,
        }  # fmt: skip

    def row(self, block: int, share: float, stock: bool = False, host: float = 0.0) -> Row:
        """A pool of `share` of all histories, and `host` of them in the host."""
        blocks = int(share * self.all) // block
        key = block, blocks, stock, host
        if key not in self.known:
            self.known[key] = self._run(block, blocks, stock, int(host * self.all) // block)
        asked = {"block": block, "share": share, "stock": stock, "host": host}
        return {"source": self.source.name, "visits": self.source.visits, "chunk": self.source.config.chunk, **asked, **self.known[key]}

    def _run(self, block: int, blocks: int, stock: bool, host: int) -> Row:
        least = max(-(-visit.tokens // block) for visit in self.visits) + 1
        pool, begin = Pool(block, max(blocks, least), stock, host), time.perf_counter()
        found = loaded = warm = 0
        for number, visit in enumerate(self.visits):
            here, there = pool.serve(visit, number)
            found, loaded = found + visit.counted * here, loaded + visit.counted * there
            warm = warm if visit.counted else pool.stored
        stores = (pool.stored - warm) * block
        return {
            "pool_tokens": max(blocks, least) * block, "found": found / self.history, "loaded": loaded / self.history, "stored": stores / self.history,
            "replay_s": round(time.perf_counter() - begin, 1),
        }  # fmt: skip


def cases(replay: Replay, grid: str) -> Iterator[Row]:
    """All of them, or pools of one block size alone. fp8 pages of a share are bf16 pages of twice the share."""
    wanted = sorted({min(1.5, factor * share) for share in SHARES for factor in (1, 2)})
    for block in BLOCKS if grid == "all" else (64,):
        for share in wanted:
            yield replay.row(block, share)
    if grid == "pools":
        return
    for share in SHARES:
        yield replay.row(64, share, stock=True)
    for share in (0.05, 0.1, 0.25, 0.5):
        for host in (0.25, 0.5, 0.75, 1.1):
            yield replay.row(64, share, host=host)


def sources(tiny: bool) -> list[tuple[Source, str]]:
    """(source, its cases)."""
    lens, made = DataConfig(name="movielens"), DataConfig(name="synthetic", events=40_000 if tiny else 1_200_000, events_per_user=2000)
    large = window(512)
    every = [
        (Source("synthetic", replace(made, **large), (128, 128), "session"), "all"),
        (Source("movielens", replace(lens, **large), (128, 128), "session"), "all"),
        (Source("movielens", replace(lens, **large), (128, 128), "page"), "pools"),
        (Source("movielens", replace(lens, **large), (128, 128), "moment"), "pools"),
        (Source("movielens", lens, (16, 64), "session"), "all"),
        (Source("movielens", lens, (16, 64), "page"), "pools"),
        (Source("movielens", lens, (16, 64), "moment"), "pools"),
    ]
    return every[:1] if tiny else every


def window(chunk: int) -> dict[str, int]:
    """What the large size has room for: 8 user tokens, S, R, and candidates, of which a training sample has as many as a chunk."""
    return {"max_static": LARGE.max_seq_len - 8 - chunk - max(chunk, 128), "chunk": chunk}


def windows(tiny: bool) -> list[Source]:
    """The same visits under the data set's own window and under those of the large size: ceilings only."""
    found = []
    for name, own in (("movielens", {}), ("synthetic", {"events": 1_200_000, "events_per_user": 2000})):
        config = DataConfig(name=name, **own)
        for visits in ("moment", "page", "session"):
            found += [Source(name, config, (16, 64), visits)]
            found += [Source(name, replace(config, **window(chunk)), (128, 128), visits) for chunk in (64, 256, 512)]
    return [] if tiny else found


def main(arguments: Sequence[str]) -> None:
    out, tiny = Path(arguments[0]), "--tiny" in arguments
    out.mkdir(parents=True, exist_ok=True)
    register()
    results: Row = {"vllm": vllm.__version__, "bytes_per_token": {"bf16": 2 * TOKEN, "fp8": TOKEN}, "windows": [], "facts": [], "rows": []}
    logs: dict[Any, EventLog] = {}

    def log_of(config: DataConfig) -> EventLog:
        key = config.name, config.events
        if key not in logs:
            logs[key] = import_module(f"model.datasets.{config.name}").load(config)
        return logs[key]

    def keep(section: str, row: Row) -> None:
        results[section].append(row)
        print(section, {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    for source in windows(tiny):
        keep("windows", Replay(source, log_of(source.config)).facts())
    for source, grid in sources(tiny):
        replay = Replay(source, log_of(source.config))
        for block in BLOCKS:
            keep("facts", replay.facts(block))
        for row in cases(replay, grid):
            keep("rows", row)


if __name__ == "__main__":
    main(sys.argv[1:])
