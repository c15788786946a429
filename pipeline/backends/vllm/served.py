"""The folder that vLLM opens: our checkpoint's weights beside a config.json in the form vLLM reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from model.checkpoint import WEIGHTS, read_config, require_finite, verify
from pipeline.backends.vllm.payload import VOCABULARY
from pipeline.backends.vllm.plugin import MODEL
from pipeline.errors import ArtifactError


def write(checkpoint: Path, out: Path) -> None:
    """Make `out`, a folder that may exist, from a checkpoint. Raises CheckpointError where that is not whole or holds a NaN."""
    verify(checkpoint)
    require_finite(checkpoint)
    config, schema = read_config(checkpoint)
    fields = {
        "architectures": [MODEL],
        "model_type": "mtgr",
        "mtgr_model": config.to_dict(),
        "mtgr_schema": asdict(schema),
        # What vLLM itself looks for.
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_seq_len,
        "vocab_size": VOCABULARY,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(fields, indent=1))
    try:
        os.link(checkpoint / WEIGHTS, out / WEIGHTS)  # gigabytes of tables, and neither file is ever changed in place
    except OSError:
        shutil.copyfile(checkpoint / WEIGHTS, out / WEIGHTS)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, to be kept in engine.json."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def require_whole(folder: Path, expected: Mapping[str, int]) -> None:
    """Raise ArtifactError where a file is missing or of another size: vLLM would start, and end with a word on its own parts."""
    for name, size in expected.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            was = "no such file" if found is None else f"{found} bytes"
            raise ArtifactError(f"{folder / name} is not what was built: expected {size} bytes, found {was}; build it again")
