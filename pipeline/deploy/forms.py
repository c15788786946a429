"""`python -m pipeline export ARTIFACT OUT form=...`: which forms there are, and what all of them have in common.

Every form is made of a verified artifact, is written whole or not at all, and never over something else. What a form consists of is in the module
of its name; the programs that travel with it are in `shipped`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline import artifact
from pipeline.artifact import Manifest
from pipeline.deploy import onnx_file, python, triton
from pipeline.errors import UserError

COPY = "artifact"
Fill = Callable[[Path, Path, Manifest, int], None]
"""(artifact, the empty folder to fill, its manifest, instances)."""

FORMS: Mapping[str, Fill] = {
    "triton": triton.fill,
    "python": lambda source, part, manifest, _: python.fill(source, part, manifest),
    "onnx": lambda source, part, manifest, _: onnx_file.fill(source, part, manifest),
}
USAGE = f"python -m pipeline export ARTIFACT DESTINATION [form={'|'.join((COPY, *FORMS))}] [instances=N]"


def export(path: Path, destination: Path, form: str = COPY, instances: int = 1) -> Path:
    """Write the artifact at `path` to `destination` in one of the forms; `instances` are processes that Triton starts, each with an engine.

    Raises UserError for a form there is not, ArtifactError for a broken artifact or one whose engine has no such form, MachineError when the disk is
    full.
    """
    if form == COPY:
        return artifact.export(path, destination)
    if form not in FORMS:
        raise UserError(f"form is one of {', '.join((COPY, *FORMS))}, got '{form}'; usage: {USAGE}")
    manifest = artifact.verify(path)
    artifact.require_free(destination)
    with artifact.whole_folder(destination) as part:
        FORMS[form](path, part, manifest, instances)
    return destination


def parse(arguments: Sequence[str]) -> tuple[Path, Path, str, int]:
    """The command line's words as `export` takes them. Raises UserError."""
    options = dict(word.split("=", 1) for word in arguments if re.match(r"\w+=", word))
    paths = [word for word in arguments if not re.match(r"\w+=", word)]
    if len(paths) != 2:
        raise UserError(f"export takes two paths, ARTIFACT and DESTINATION, got {len(paths)}: {USAGE}")
    if unknown := sorted(set(options) - {"form", "instances"}):
        raise UserError(f"export takes form and instances, got '{unknown[0]}': {USAGE}")
    form, instances = options.get("form", COPY), options.get("instances", "1")
    if "instances" in options and form != "triton":
        raise UserError(f"instances are processes of form=triton, got form={form}; leave instances out")
    if not (instances.isdecimal() and int(instances)):
        raise UserError(f"instances is a whole number of at least 1, got '{instances}': {USAGE}")
    return Path(paths[0]), Path(paths[1]), form, int(instances)
