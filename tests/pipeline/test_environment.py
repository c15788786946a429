"""The fingerprint names what figures depend on, cheaply, and says what changed."""

import subprocess
import sys

from pipeline.environment import differences, fingerprint


def test_fingerprint_names_machine_and_versions() -> None:
    found = fingerprint()
    assert found["package.torch"].startswith("2.")
    assert int(found["cores"]) >= 1
    assert found["gpu"]


def test_fingerprint_does_not_import_torch() -> None:
    code = "import sys; from pipeline.environment import fingerprint; fingerprint(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_differences_are_named() -> None:
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b: was 2, is 3", "c: was absent, is 4"]
    assert differences({"a": "1"}, {"a": "1"}) == []
