"""MTGR's configuration in the clothes that vLLM and transformers expect. Imported only inside vLLM's processes."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from model.config import ModelConfig
from pipeline.backends.engine import schema
from pipeline.backends.vllm.payload import VOCABULARY
from pipeline.contracts import FeatureSchema

MODEL_TYPE, ARCHITECTURE = "mtgr", "MTGRForRanking"


class MTGRConfig(PretrainedConfig):  # type: ignore[misc]
    """`mtgr` holds the checkpoint's own config.json; the rest is what vLLM reads of any model."""

    model_type = MODEL_TYPE

    def __init__(self, mtgr: dict[str, Any] | None = None, **others: Any) -> None:
        self.mtgr = mtgr or {}
        if mtgr:
            model = mtgr["model"]
            others |= {
                "architectures": [ARCHITECTURE],
                "vocab_size": VOCABULARY,
                "hidden_size": model["d_model"],
                "num_hidden_layers": model["layers"],
                "num_attention_heads": model["heads"],
                "num_key_value_heads": model["heads"],
                "max_position_embeddings": model["max_seq_len"],
            }
        super().__init__(**others)

    @property
    def network(self) -> ModelConfig:
        """The model's own configuration."""
        return ModelConfig(**self.mtgr["model"])

    @property
    def features(self) -> FeatureSchema:
        """What the model reads."""
        return schema(self.mtgr["schema"])
