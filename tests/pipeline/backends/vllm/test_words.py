"""Whose fault it was, from what vLLM's processes wrote before they ended."""

from __future__ import annotations

import pytest

from pipeline.backends.vllm.words import Words
from pipeline.errors import MachineError, SettingsError

HEAD = "ERROR 10:00:00 [core.py] "


class EngineDeadError(Exception):
    """As vLLM's: it says nothing."""


def said(*lines: str) -> Words:
    words = Words()
    with words.errors.open("a") as file:
        file.writelines(f"{HEAD}{line}\n" for line in lines)
    return words


@pytest.mark.parametrize(
    ("lines", "starting", "kind", "text"),
    [
        (("ValueError: block size 24", "RuntimeError: Engine core initialization failed."), True, SettingsError, "refuses.*block size 24"),
        (("pydantic.ValidationError: 1 error",), True, SettingsError, "refuses.*1 error"),
        (("ValueError: a step computes a request to its end",), False, MachineError, "died: ValueError: a step"),
        (("torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB", "EngineDeadError: see above"), False, SettingsError, "out of memory.*2 GiB"),
        (("ValueError: No available memory for the cache blocks.",), True, SettingsError, "out of memory under"),
        (("RuntimeError: cancelled",), False, MachineError, "died: a process of it was killed"),
        ((), True, MachineError, "did not start: RuntimeError: seen in front"),
    ],
)  # fmt: skip
def test_faults_are_sorted(lines: tuple[str, ...], starting: bool, kind: type[Exception], text: str) -> None:
    words = said(*lines)
    with pytest.raises(kind, match=text):
        raise words.sorted_by_fault(RuntimeError("seen in front") if starting else EngineDeadError(), starting)
    assert Words().last() == ("", "")  # what an earlier engine said is not the next one's
    assert words.errors.parent.is_dir()


def test_a_refusal_of_the_front_end_itself_is_the_settings_fault() -> None:
    with pytest.raises(SettingsError, match="max_num_batched_tokens"):
        raise Words().sorted_by_fault(ValueError("max_num_batched_tokens (128) is smaller\n than max_model_len"), starting=True)


def test_a_core_in_this_process_needs_no_log() -> None:
    with pytest.raises(MachineError, match="died: RuntimeError: CUDA error: misaligned address; load it again"):
        raise Words().sorted_by_fault(RuntimeError("CUDA error: misaligned address"))
