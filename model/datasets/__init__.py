"""Event logs and the ranking samples made from them."""

from model.datasets.config import DataConfig
from model.datasets.dataset import Dataset, open_dataset, prepare

__all__ = ["DataConfig", "Dataset", "open_dataset", "prepare"]
