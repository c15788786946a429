"""From our checkpoint to the folder that vLLM opens: the same weights, and a config.json that names our classes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def write(checkpoint: Path, out: Path) -> None:
    """`out` gets config.json and model.safetensors. The checkpoint is verified first. Raises CheckpointError where it is broken."""
    from model.checkpoint import CONFIG, WEIGHTS, read_config, verify

    verify(checkpoint)
    read_config(checkpoint)
    own = json.loads((checkpoint / CONFIG).read_text())
    own.pop("extra", None)
    model = own["model"]
    described = {
        "architectures": ["MTGRForRanking"],
        "model_type": "mtgr",
        "mtgr": own,
        "hidden_size": model["d_model"],
        "torch_dtype": "float32",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(described, indent=1))
    try:
        os.link(checkpoint / WEIGHTS, out / WEIGHTS)  # gigabytes of tables, and neither file is ever changed in place
    except OSError:
        shutil.copyfile(checkpoint / WEIGHTS, out / WEIGHTS)
