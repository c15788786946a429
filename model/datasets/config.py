"""Which data set to prepare and how to cut it into samples: the `data` section of the configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

NAMES = ("movielens", "parquet", "kuairand", "synthetic")


def default_cache() -> str:
    """$MTGR_CACHE, else the user's cache folder."""
    return os.environ.get("MTGR_CACHE") or str(Path.home() / ".cache" / "mtgr-autotune")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A source and its limits."""

    name: str = "movielens"
    """One of NAMES."""
    path: str = ""
    """File, folder or glob of parquet and kuairand; unused elsewhere."""
    cache: str = ""
    """Where fetched files are kept; empty means $MTGR_CACHE, else ~/.cache/mtgr-autotune."""
    max_static: int = 124
    """Most S events of a sample: the newest before its chunk."""
    chunk: int = 64
    """Events of a sample's R part; S moves on in steps of this size. An engine that keeps histories finds nothing of a user whose S has moved: about
    growth between visits / chunk of all visits (reports/vllm-cache)."""
    max_candidates: int = 64
    """Most candidates of a serving request."""
    return_days: float = 0.0
    """Retention is a return within this many days; 0 means the source's own rule (7, kuairand 1)."""
    seed: int = 0
    """Of the synthetic events and of which calibration samples are drawn."""
    events: int = 200_000
    """Synthetic: how many events, 10^3 to 10^8."""
    events_per_user: int = 200
    """Synthetic: the mean; users = events / events_per_user."""
    items: int = 0
    """Synthetic: catalogue size; 0 means 1 item for 1,000 events, between 50 and 20,000."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"data.name is one of {', '.join(NAMES)}, got {self.name!r}")
        if self.name in ("parquet", "kuairand") and not self.path:
            raise UserError(f"data.name={self.name} reads your own files: set data.path to a file, a folder or a glob")
        for name, least in (("max_static", 0), ("chunk", 1), ("max_candidates", 1), ("events_per_user", 20), ("items", 0), ("return_days", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        if not 1000 <= self.events <= 100_000_000:
            raise UserError(f"data.events must be between 10^3 and 10^8, got {self.events}")
        if self.events < self.events_per_user:
            raise UserError(f"data.events must be at least data.events_per_user, got {self.events} and {self.events_per_user}")

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache or default_cache()).expanduser()

    def max_tokens(self, user_tokens: int) -> int:
        """Longest sample or serving request: U, S, a full R and as many candidates."""
        return user_tokens + self.max_static + self.chunk + max(self.chunk, self.max_candidates)

    def return_s(self, own_days: float) -> int:
        """Seconds of the retention rule, given the source's own."""
        return round((self.return_days or own_days) * 86_400)
