"""The forms in which an artifact is handed on: a copy, a Triton model repository, plain Python, an ONNX file."""
