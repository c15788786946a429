"""MTGR's configuration in the clothes vLLM knows: a Hugging Face config that holds our model and schema, and the few figures vLLM reads itself."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from model.config import ModelConfig
from pipeline.contracts import Feature, FeatureSchema


class MtgrConfig(PretrainedConfig):
    """`served.write` makes its file. `mtgr_model` and `mtgr_schema` are a checkpoint's own `model` and `schema`."""

    model_type = "mtgr"

    def __init__(self, mtgr_model: dict[str, Any] | None = None, mtgr_schema: dict[str, Any] | None = None, **others: Any) -> None:
        self.mtgr_model = mtgr_model or {}
        self.mtgr_schema = mtgr_schema or {}
        super().__init__(**others)

    @property
    def network(self) -> ModelConfig:
        """Shape and mathematics."""
        return ModelConfig(**self.mtgr_model)

    @property
    def features(self) -> FeatureSchema:
        """What the model reads."""
        groups = {group: tuple(Feature(**feature) for feature in self.mtgr_schema[group]) for group in ("user", "event", "candidate")}
        return FeatureSchema(**groups, cross=tuple(self.mtgr_schema["cross"]), heads=tuple(self.mtgr_schema["heads"]))
