"""Engine core and worker in processes of their own: they must know MTGR where no entry point is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = """
import json
import sys
from pathlib import Path
import numpy as np
from model.oracle import oracle_scores
from tests.factories import random_request
from tests.pipeline.backends.vllm.engines import open_engine

def main():
    request = random_request(np.random.default_rng(0), static=40, realtime=20, candidates=7)
    with open_engine(Path(sys.argv[1]), in_process=False, **json.loads(sys.argv[2])) as engine:
        for cached in (0, 48):
            (answer,) = engine.score([request])
            assert answer.cached == cached, answer.cached
            assert abs(answer.scores - oracle_scores(engine.model, request)).max() < 1e-4
    print("scores are right")

if __name__ == "__main__":
    main()
"""


def run(folder: Path, plugins: str = "mtgr", **changes: Any) -> None:
    """Score, with these settings of the engine and of vLLM's plugins those named."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    wanted = {"VLLM_PLUGINS": plugins, "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_SIM_MULTI_NUMA": "1"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **wanted}
    ran = subprocess.run([sys.executable, script, folder, json.dumps(changes)], env=environment, capture_output=True, text=True, timeout=250)
    assert "scores are right" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-3000:]


@pytest.mark.parametrize("plugins", ["", "mtgr"], ids=["no entry point", "entry point if installed"])
def test_scores_across_processes(plugins: str, tmp_path: Path) -> None:
    run(tmp_path, plugins)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs a CUDA device a rank")
@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_heads_divided_among_two_ranks(eager: bool, tmp_path: Path) -> None:
    run(tmp_path, tensor_parallel_size=2, enforce_eager=eager)
