"""C sources as libraries, each compiled once a machine, when it is first asked for, by the compiler that is there.

    step         native_source.py, the decoding step         compiled in a second
                 native_steps_source.py, its state spaces
                 native_linear_source.py, its products
                 native_layers_source.py, the rest of it
    operators    native_operators_source.py, S4's operators  in four
                 native_scan_source.py, and its chunk scan
    diagonal     native_diagonal_source.py, S4D's            in one
    ssd          native_ssd_source.py, SSD's chunk scan      in two
    systems      native_systems_source.py, S4's and S4D's    in less

In front of some stand native_vectors_source.py, registers, exp and erf, and native_products_source.py, small matrices.

No compiler, or one that fails: there is no library, `why_not()` says so, and PyTorch runs instead.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from .native_diagonal_source import SOURCE as DIAGONAL
from .native_layers_source import SOURCE as LAYERS
from .native_linear_source import SOURCE as LINEAR
from .native_operators_source import SOURCE as OPERATORS
from .native_products_source import SOURCE as PRODUCTS
from .native_scan_source import SOURCE as SCAN
from .native_source import SOURCE as STEP
from .native_ssd_source import SOURCE as SSD
from .native_steps_source import SOURCE as STEPS
from .native_systems_source import SOURCE as SYSTEMS
from .native_vectors_source import SOURCE as VECTORS

SOURCES = {
    "step": VECTORS + LINEAR + LAYERS + STEPS + STEP,
    "operators": VECTORS + PRODUCTS + OPERATORS + SCAN,
    "diagonal": DIAGONAL,
    "ssd": VECTORS + PRODUCTS + SSD,
    "systems": SYSTEMS,
}

# in this order; the first that works. Without OpenMP a step runs on one thread
FLAGS = (("-fopenmp", "-march=native"), ("-fopenmp",), ("-fopenmp-simd", "-march=native"), ())
SECONDS = 60  # for a compiler


def library(name: str = "step") -> ctypes.CDLL | None:
    """The library of one of SOURCES, or None where it cannot be had."""
    return _load(name)[0]


def why_not(name: str = "step") -> str | None:
    """Why there is no library, in words, or None where there is one."""
    return _load(name)[1]


_forked: list[bool] = []  # in a child of a fork, where the parent's threads are not
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def number_of_threads() -> int:
    """As many as PyTorch's; one in a child of a fork."""
    return 1 if _forked else torch.get_num_threads()


def floats(*shape: int) -> torch.Tensor:
    """Memory for a library's numbers, whatever dtype and device the caller has made PyTorch's defaults."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def doubles(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64, device="cpu")


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def for_c(argument: torch.Tensor | int | None):
    """An argument as the libraries' functions take it."""
    return address(argument) if argument is None or torch.is_tensor(argument) else ctypes.c_int64(argument)


@cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    if sys.platform not in ("linux", "darwin"):
        return None, f"it is not built on {sys.platform}"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        return None, "there is no C compiler (cc, gcc, clang)"
    said = ""
    for flags in FLAGS:
        try:
            path = _folder() / f"{name}-{_key(SOURCES[name], compiler, flags)}.so"
            if not path.exists():
                _compile(SOURCES[name], compiler, flags, path)
            return ctypes.CDLL(str(path)), None
        except subprocess.CalledProcessError as error:
            said = said or error.stderr.decode(errors="replace").strip().splitlines()[-1]
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home
            said = said or str(error)
    return None, f"{compiler} did not build it: {said}"


class _Argument(ctypes.Union):
    _fields_ = [("i", ctypes.c_int64), ("f", ctypes.c_float), ("p", ctypes.c_void_p)]


class _Call(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("arguments", ctypes.c_void_p)]


def bind(calls: list[tuple[str, tuple]], threads: int) -> Callable[[], None]:
    """Calls of the library's functions, (name, arguments) each, as one that takes no arguments.

    arguments: addresses as `ctypes.c_void_p`, int and float; who binds them keeps what the addresses point to.
    """
    arguments = [_argument(argument) for _, of_call in calls for argument in of_call]
    row = (_Argument * len(arguments))(*arguments)
    table, address = (_Call * len(calls))(), ctypes.addressof(row)
    for entry, (name, of_call) in zip(table, calls, strict=True):
        entry.function = ctypes.cast(getattr(library(), f"call_{name}"), ctypes.c_void_p).value
        entry.arguments = address
        address += len(of_call) * ctypes.sizeof(_Argument)
    table.row = row  # lives as long as what points to it
    return partial(library().run, ctypes.c_int64(len(calls)), table, ctypes.c_int64(threads))


def _argument(value) -> _Argument:
    if isinstance(value, ctypes.c_void_p):
        return _Argument(p=value.value)
    return _Argument(f=value) if isinstance(value, float) else _Argument(i=value)


def _folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ssm_lm"


def _key(source: str, compiler: str, flags: tuple[str, ...]) -> str:
    """Of all that the machine code depends on: homes are shared by machines with other processors."""
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(repr((source, compiler, flags, platform.machine(), features)).encode()).hexdigest()[:16]


def _compile(text: str, compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Under another name, then renamed: processes that start together do not read half a file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder) / "source.c", Path(folder) / "built.so"
        source.write_text(text)
        words = [compiler, "-O3", "-fno-math-errno", *flags, "-shared", "-fPIC", str(source), "-o", str(built), "-lm"]
        subprocess.run(words, check=True, capture_output=True, timeout=SECONDS)
        built.replace(path)
