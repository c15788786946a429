"""One AOTInductor package, run through its own C interface.

Torch's Python door to a package holds the interpreter's lock for the whole run, so that nobody could submit a request, or even notice the
time, while a batch computes; and importing it costs seconds. ctypes lets go of the lock. What is in the package is `compiled`'s affair.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


class Package:
    """An open package on the CPU. Not for two threads at once."""

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises ArtifactError where it is not a package."""
        import torch  # the library needs torch's to be loaded

        self._aoti = torch._C._aoti
        self.metadata, self._library = _open(path)
        self._container = ctypes.c_void_p()
        self._call("ContainerCreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None)

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The package's one output. Raises RuntimeError where the program refuses the inputs; it says why on stderr."""
        handles = self._aoti.unsafe_alloc_void_ptrs_from_tensors(list(inputs))  # the run takes these, whatever comes of it
        pointers = (ctypes.c_void_p * len(handles))(*(_pointer(handle, None) for handle in handles))
        output = (ctypes.c_void_p * 1)()
        self._call("ContainerRun", self._container, pointers, ctypes.c_size_t(len(handles)), output, ctypes.c_size_t(1), None, None)
        (tensor,) = self._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(output[0], None, None)])
        result: Tensor = tensor
        return result

    def weight_types(self) -> dict[str, str]:
        """Name of each weight -> 'fp32', 'bf16' or 'other'."""
        numbers = {int(self._library.aoti_torch_dtype_float32()): "fp32", int(self._library.aoti_torch_dtype_bfloat16()): "bf16"}
        count = ctypes.c_size_t()
        self._call("ContainerGetNumConstants", self._container, ctypes.byref(count))
        types = {}
        for index in range(count.value):
            name, kind = ctypes.c_char_p(), ctypes.c_int32()
            self._call("ContainerGetConstantOriginalFQN", self._container, ctypes.c_size_t(index), ctypes.byref(name))
            self._call("ContainerGetConstantDtype", self._container, ctypes.c_size_t(index), ctypes.byref(kind))
            types[(name.value or b"").decode()] = numbers.get(kind.value, "other")
        return types

    def set_threads(self, count: int) -> None:
        """Threads of the package's own loops when this thread runs it: its OpenMP may be another copy than torch's."""
        self._library.omp_set_num_threads(ctypes.c_int(count))

    def threads(self) -> int:
        """What `set_threads` came to, for this thread."""
        return int(self._library.omp_get_max_threads())

    def close(self) -> None:
        """Free the weights and unload the code. Idempotent."""
        if self._container:
            self._call("ContainerDelete", self._container)
            self._container = ctypes.c_void_p()
            _unload(self._library)

    def _call(self, function: str, *arguments: Any) -> None:
        if getattr(self._library, f"AOTInductorModel{function}")(*arguments):
            raise RuntimeError(f"the compiled program failed in {function}; what it said is on stderr, in the log")


def _open(path: Path) -> tuple[Mapping[str, str], ctypes.CDLL]:
    try:
        with zipfile.ZipFile(path) as package, tempfile.TemporaryDirectory(prefix="aoti-") as folder:
            names = package.namelist()
            library = next(name for name in names if name.endswith(".so"))
            metadata = json.loads(package.read(next(name for name in names if name.endswith("wrapper_metadata.json"))))
            # An open library outlives its file.
            return metadata, ctypes.CDLL(package.extract(library, folder))
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError) as error:
        raise ArtifactError(f"{path} is not a compiled package that opens here ({error}); build it again on this machine") from error


def _unload(library: ctypes.CDLL) -> None:
    close = ctypes.CDLL(None).dlclose
    close.argtypes = [ctypes.c_void_p]
    close(library._handle)


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
