"""What the accuracy gate said of the fused engine's precisions on a trained model: trials of studies on this GPU -> section gate of results.json.

python -m pipeline tune experiment=gpu                          # makes runs/gpu; as often as wanted, under other names
python reports/h200-kernels/gate.py runs/STUDY [runs/STUDY ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
NUMERICS = {"build.precision": "precision", "build.residual": "residual", "quant.recipe": "recipe"}


def trials(study: Path) -> list[dict[str, Any]]:
    """Measured trials of the engine `fused`: numerics, upper 95 % bounds of what they lose to fp32, peak."""
    rows = []
    for folder in sorted((study / "trials").iterdir()):
        if not (folder / "result.json").is_file():
            continue
        candidate, result = (json.loads((folder / name).read_text()) for name in ("candidate.json", "result.json"))
        metrics = result["metrics"]
        if candidate["backend"] == "fused" and metrics:
            row = {ours: result["effective"][theirs] for theirs, ours in NUMERICS.items()}
            losses = {name: value for name, value in metrics.items() if "loss_upper" in name}
            rows.append(row | {"losses": losses, "peak_rps": metrics["throughput_rps/peak"], "auc": metrics["auc/recommendation"]})
    return rows


def main(studies: list[Path]) -> None:
    """Add them to results.json."""
    found = json.loads(RESULTS.read_text())
    found["gate"] = [{"study": number, **row} for number, study in enumerate(studies, 1) for row in trials(study)]
    RESULTS.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
