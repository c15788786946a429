"""Scores the golden requests with the ONNX file beside this one, and compares them with the scores that were shipped."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Exit code: 0 where every score of a trained head is within the tolerance."""
    layout, golden = json.loads((HERE / "layout.json").read_text()), np.load(HERE / "golden.npz")
    session = onnxruntime.InferenceSession(str(HERE / "graph.onnx"), providers=["CPUExecutionProvider"])
    scores = session.run(None, {value["name"]: golden[value["name"]] for value in layout["inputs"]})[0]
    columns = list(layout["heads"].values())
    largest = float(np.abs(scores - golden["scores"])[:, columns].max())
    print(f"{len(scores)} candidates, largest difference {largest:.1e}, at most {layout['tolerance']:g} is allowed")
    return 0 if largest <= layout["tolerance"] else 1


if __name__ == "__main__":
    sys.exit(main())
