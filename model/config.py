"""The model's frozen configuration and its four sizes.

Every field changes the numbers, so it lives in the checkpoint and no tuner touches it.
Sources: MTGR arXiv 2505.18654, HSTU arXiv 2402.17152; fields marked *ours* are this project's choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

KINDS = ("user", "static", "realtime", "candidate")
"""Token kinds U, S, R, C; their index selects the row of a group layer norm."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and mathematics of one MTGR network."""

    d_model: int
    """Width; divisible by `heads`."""
    layers: int
    heads: int
    max_seq_len: int
    """Most tokens of one request: n_u + n_s + n_r + K."""
    scaling_seqlen: int
    """N of the attention's 1/N. Fixed, so that candidates stay independent of how many came along."""
    embedding_dim: int = 32
    """Columns of every embedding table. *Ours*."""
    embedding_std: float = 0.02
    """Spread of a fresh table. *Ours*."""
    layer: Literal["hstu", "gated_conv"] = "hstu"
    """Block: MTGR's HSTU variant, or the comparison transformer (`gated_conv`). The latter is *ours*."""
    d_ff: int = 0
    """Inner width of gated_conv's feed-forward; 0 with hstu."""
    trunk: Literal["mlp", "mmoe"] = "mlp"
    """Shared part of the heads: the paper's MLP, or a mixture of experts (*ours*)."""
    experts: int = 4
    """Experts of the mmoe trunk; without meaning for mlp."""
    share_seq_mlp: bool = True
    """S and R events share one input MLP."""
    token_gate: bool = False
    """Learned mask variant of the design card. *Ours*."""
    group_norm: bool = True
    """Norm parameters per token kind; False is the ablation with one shared pair."""
    dynamic_mask: bool = True
    """MTGR's mask; False is the ablation in which every history token, static ones too, sees only what came before it in the request.
    Candidates keep their own view (strictly earlier R and themselves) in both: seeing more would leak labels in training."""
    cross_features: bool = True
    """Candidates carry user-item features; False is the ablation."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.d_model % self.heads:
            raise ValueError(f"d_model must be divisible by heads, got d_model={self.d_model}, heads={self.heads}; change either")
        if (self.layer == "gated_conv") != (self.d_ff > 0):
            raise ValueError(f"d_ff belongs to layer=gated_conv and must be positive there and 0 elsewhere, got layer={self.layer}, d_ff={self.d_ff}")
        for name in ("d_model", "layers", "heads", "max_seq_len", "scaling_seqlen", "embedding_dim", "experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(d_model=64, layers=3, heads=2, max_seq_len=256, scaling_seqlen=256),
    "small": ModelConfig(d_model=512, layers=12, heads=8, max_seq_len=1024, scaling_seqlen=1024, embedding_dim=64),
    "base": ModelConfig(d_model=768, layers=18, heads=12, max_seq_len=1536, scaling_seqlen=1536, embedding_dim=64),
    "large": ModelConfig(d_model=1024, layers=24, heads=16, max_seq_len=2048, scaling_seqlen=2048, embedding_dim=64),
}


def resolve(section: Mapping[str, Any]) -> ModelConfig:
    """{'size': 'tiny', **fields to change} -> ModelConfig. Raises ValueError naming what is wrong."""
    changes = dict(section)
    size = changes.pop("size", "tiny")
    if size not in SIZES:
        raise ValueError(f"model.size is one of {', '.join(SIZES)}, got {size!r}")
    unknown = sorted(set(changes) - {f.name for f in fields(ModelConfig)})
    if unknown:
        raise ValueError(f"model.{unknown[0]} is not a field of the model; there are {', '.join(f.name for f in fields(ModelConfig))}")
    return replace(SIZES[size], **changes)
