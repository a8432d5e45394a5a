"""native_source.py as a library: compiled once a machine by the C compiler that is there, and kept.

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

from .native_source import SOURCE

# in this order; the first that works. Without OpenMP a step runs on one thread
FLAGS = (("-fopenmp", "-march=native"), ("-fopenmp",), ("-fopenmp-simd", "-march=native"), ())
SECONDS = 60  # a compiler takes about one


def library() -> ctypes.CDLL | None:
    """The library, compiled by the first call on a machine (a second), or None where it cannot be had."""
    return _load()[0]


def why_not() -> str | None:
    """Why there is no library, in words, or None where there is one."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if sys.platform not in ("linux", "darwin"):
        return None, f"it is not built on {sys.platform}"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        return None, "there is no C compiler (cc, gcc, clang)"
    said = ""
    for flags in FLAGS:
        try:
            path = _folder() / f"step-{_key(compiler, flags)}.so"
            if not path.exists():
                _compile(compiler, flags, path)
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


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Of all that the machine code depends on: homes are shared by machines with other processors."""
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(repr((SOURCE, compiler, flags, platform.machine(), features)).encode()).hexdigest()[:16]


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Under another name, then renamed: processes that start together do not read half a file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder) / "step.c", Path(folder) / "step.so"
        source.write_text(SOURCE)
        words = [compiler, "-O3", "-fno-math-errno", *flags, "-shared", "-fPIC", str(source), "-o", str(built), "-lm"]
        subprocess.run(words, check=True, capture_output=True, timeout=SECONDS)
        built.replace(path)
