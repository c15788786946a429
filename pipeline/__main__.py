"""`python -m pipeline COMMAND ...`: the word picks a function, the rest are Hydra overrides.

Each command is a thin door: what it does can be had by calling the function behind it. A UserError is printed as one message
without a traceback (exit 2); anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench import EXPERIMENTS, about, experiment
from pipeline.errors import AutotuneError, UserError

if TYPE_CHECKING:
    from pipeline.terminal import View

ROOT = Path(__file__).resolve().parents[1]

Door = Callable[[Sequence[str]], int]


def data(arguments: Sequence[str]) -> int:
    """Prepare the data set and print its users, split and rates."""
    from pipeline import stages
    from pipeline.config import compose
    from pipeline.terminal import print_table

    config, _ = compose(arguments, "data")
    with _view("data") as view, view.stage("data"):
        prepared = stages.prepare(config, view.line)
    print_table("data", prepared.summary)
    print(prepared.folder)
    return 0


def train(arguments: Sequence[str]) -> int:
    """Train a checkpoint, resumable, logged to MLflow. Use train=full for the long schedule."""
    from pipeline import stages
    from pipeline.config import compose
    from pipeline.terminal import print_table
    from pipeline.tracking import default_uri, log_training

    config, _ = compose(arguments, "train")
    with _view("data", "training") as view:
        with view.stage("data"):
            prepared = stages.prepare(config, view.line)
        with view.stage("training"):
            checkpoint = stages.train(config, prepared, view.line)
    if config.tracking.enabled:
        uri = config.tracking.uri or default_uri(Path(config.paths.runs))
        name = f"{config.data.get('name', '')} {config.model.get('size', '')}"
        parameters = {f"{section}.{key}": value for section in ("data", "model", "train") for key, value in getattr(config, section).items()}
        log_training(name, parameters, checkpoint.metrics, [checkpoint.folder / "config.json"], uri, config.tracking.experiment)
    print_table("training", checkpoint.metrics)
    print(checkpoint.folder)
    return 0


def quantize(arguments: Sequence[str]) -> int:
    """Make the quantised checkpoints that the search may choose from."""
    from pipeline import stages
    from pipeline.config import compose

    config, _ = compose(arguments, "quantize")
    with _view("quantisation") as view, view.stage("quantisation"):
        made = stages.quantise_all(config, view.line)
    for recipe, found in made.items():
        print(f"{recipe}: {found}")
    return 0


def tune(arguments: Sequence[str]) -> int:
    """All of it: data, train, quantise, search, confirm, publish."""
    from pipeline.config import compose
    from pipeline.tune import tune

    config, text = compose(arguments, "tune")
    return tune(config, text)


def bench(arguments: Sequence[str]) -> int:
    """Measure the engines at their defaults and the pinned settings, as a trial does; `bench WORD` measures the tuner itself."""
    from pipeline.bench.engines import bench
    from pipeline.config import compose
    from pipeline.contracts import Outcome
    from pipeline.terminal import print_table

    if arguments and arguments[0] in EXPERIMENTS:
        return experiment(arguments[0], arguments[1:])
    config, _ = compose(arguments, "bench")
    with _view("bench") as view, view.stage("bench"):
        found = bench(config, view.line)
    for backend, measurement in found.items():
        print_table(f"{backend}: {measurement.outcome} {measurement.reason}".rstrip(), measurement.metrics)
    return 0 if all(m.outcome is Outcome.MEASURED for m in found.values()) else 1


def confirm(arguments: Sequence[str]) -> int:
    """Measure a finished study's winner against its baseline again, in fresh processes; takes the study's own overrides."""
    from pipeline.config import compose
    from pipeline.tune import reconfirm

    config, text = compose(arguments, "confirm")
    return reconfirm(config, text)


def report(arguments: Sequence[str]) -> int:
    """Write the report of a study again, finished or not (study.name=...)."""
    from pipeline import report as reports
    from pipeline.config import compose

    config, _ = compose(arguments, "report")
    print(reports.write(Path(config.paths.runs) / config.study.name, Path(config.paths.reports) / config.study.name))
    return 0


def export(arguments: Sequence[str]) -> int:
    """Copy an artifact, or make a Triton model repository, plain Python or an ONNX file of it: export ARTIFACT DESTINATION [form=artifact].

    form=triton [instances=N]   model repository for Triton Inference Server: config.pbtxt, model.py for its Python backend, warm-up requests
    form=python                 score.py and the sources it takes: no more packages than the engine needs
    form=onnx                   the ONNX file, its inputs described, golden requests packed for it, an example
    """
    from pipeline import artifact
    from pipeline.deploy import forms

    path, destination, form, instances = forms.parse(arguments)
    written = forms.export(path, destination, form, instances)
    for line in artifact.differences(artifact.read_manifest(path)):
        print(f"measured elsewhere: {line}")
    print(written)
    return 0


def serve(arguments: Sequence[str]) -> int:
    """Serve an artifact over HTTP: serve ARTIFACT [HOST] [PORT]."""
    # In its own process, because this one may not load engines, and in the interpreter that has this one.
    from pipeline import artifact, interpreters

    python = sys.executable
    with contextlib.suppress(UserError, IndexError):  # no artifact, or none named: the server says it better
        python = interpreters.of({}, artifact.read_manifest(Path(arguments[0])).backend) or python
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    os.execve(python, [python, "-m", "pipeline.serve", *arguments], environment)


def doctor(arguments: Sequence[str]) -> int:
    """Say what this machine can run and how to get the rest."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pipeline.config import compose
    from pipeline.doctor import examine

    config, _ = compose(arguments, "doctor")
    table = Table("", "", "", box=None, show_header=False)
    for finding in examine(Path(config.paths.runs), config.backends):
        table.add_row("[green]yes[/]" if finding.ok else "[yellow]no[/]", finding.name, escape(finding.detail))
    Console().print(table)
    return 0


def _view(*stages: str) -> View:
    from pipeline.terminal import View

    return View(stages)


COMMANDS: dict[str, Door] = {f.__name__: f for f in (data, train, quantize, tune, bench, confirm, export, serve, report, doctor)}
PLAIN = ("export", "serve")
"""Commands that take paths, not overrides."""


def overrides_help() -> str:
    """The groups with their choices and every value with its default, read from conf/."""
    from pipeline.config import CONF, compose

    _, text = compose([])
    groups = sorted(folder for folder in CONF.iterdir() if folder.is_dir() and not folder.name.startswith("_"))
    lines = ["groups, group=choice:"]
    lines += [f"  {group.name}={'|'.join(sorted(p.stem for p in group.glob('*.yaml')))}" for group in groups if any(group.glob("*.yaml"))]
    lines += ["", "values, path.to.value=new (+settings.<knob>=value pins a knob):"]
    lines += [f"  {line}" for line in text.splitlines() if not line.startswith("command")]
    return "\n".join(lines)


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(door.__doc__ or '').splitlines()[0]}" for name, door in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m pipeline COMMAND [group=choice] [group.key=value] ...", "", *lines, "", "COMMAND --help lists its overrides."]
    )


def main(arguments: Sequence[str]) -> int:
    """Exit code of one command line."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    word, rest = arguments[0], arguments[1:]
    door = COMMANDS.get(word)
    if door is None:
        print(f"'{word}' is not a command\n\n{usage()}", file=sys.stderr)
        return 2
    if any(argument in ("-h", "--help") for argument in rest):
        if word == "bench" and rest[0] in EXPERIMENTS:
            print(about(rest[0]))
            return 0
        print(f"python -m pipeline {word}\n\n{door.__doc__}")
        if word == "bench":
            print(f"\nWORD is {', '.join(EXPERIMENTS)}; bench WORD --help says what each does")
        if word not in PLAIN:
            print(f"\n{overrides_help()}")
        return 0
    try:
        return door(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AutotuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
