from pathlib import Path

import pytest

from tests.pipeline.deploy.artifacts import SERVE, make_artifact


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of ONNX Runtime."""
    settings = {"quant.recipe": "none", "build.graph_level": "all", "engine.arena": True, "engine.spinning": False, **SERVE}
    return make_artifact(tmp_path_factory.mktemp("onnxruntime"), "onnxruntime", settings)


@pytest.fixture(scope="session")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of an engine in torch."""
    return make_artifact(tmp_path_factory.mktemp("eager"), "eager", {"quant.recipe": "none", "build.precision": "fp32", **SERVE})
