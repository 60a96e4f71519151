"""Compile kernels/decode_cpu.c with the machine's C compiler, once, and load it.

The compiled file is kept in the user's cache folder under a name made of all that it depends on,
beside a file with its checksum: a file that is cut short or changed is compiled again. Where there
is no compiler, or it has no OpenMP, or fails, there is no library and no message: decoding has
other ways.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch

from llama_common.errors import InputError
from llama_common.files import atomic_write

from ..common.processor import processor
from ..common.state_file import read_state, write_state
from ..common.user_cache import user_cache

BITS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 16}  # of -DSTORED
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-march=native", "-fopenmp", "-shared", "-fPIC")
SECONDS = 60  # after which a compiler is taken for one that hangs

Decode = Callable[[int], int]  # takes the address of a Step; returns 0 if all was well


@functools.cache
def load(dtype: torch.dtype) -> Decode | None:
    """Return the compiled decoding step for weights of a dtype; None where there is none.

    The first compiler that makes one is taken: Clang may be there without OpenMP's library.
    """
    if dtype not in BITS:
        return None
    found = {os.path.realpath(path): path for path in map(shutil.which, COMPILERS) if path}
    made = (_load(dtype, compiler) for compiler in found.values())
    return next(filter(None, made), None)


def _load(dtype: torch.dtype, compiler: str) -> Decode | None:
    """Return the step that a compiler makes, or made before; None where it makes none."""
    source = files("llama_torch.kernels").joinpath("decode_cpu.c").read_bytes()
    flags = (*FLAGS, f"-DSTORED={BITS[dtype]}")
    key = repr((source, flags, os.path.realpath(compiler), processor())).encode()
    name = f"decode-{BITS[dtype]}-{hashlib.sha256(key).hexdigest()[:24]}.so"
    try:
        return _kept(user_cache() / "native" / name, compiler, flags, source)
    except (OSError, InputError):
        pass  # the folder cannot be written, or what lies there is no library
    except subprocess.SubprocessError:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:  # a loaded file may be removed
            path = Path(folder) / name
            _compile(path, compiler, flags, source)
            return _open(path)
    except (OSError, subprocess.SubprocessError):
        return None


def _kept(path: Path, compiler: str, flags: tuple[str, ...], source: bytes) -> Decode:
    """Return the step of the library at ``path``, which is compiled if need be."""
    sums = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_own(path.parent)
    if not _is_whole(path, sums):
        atomic_write(path, lambda temporary: _compile(temporary, compiler, flags, source))
        path.chmod(0o600)  # whatever the user's mask: see _require_own
        write_state(sums, {"library": _checksum(path)})
    return _open(path)


def _require_own(path: Path) -> None:
    """Raise OSError for a folder, or a library, that another user could put code into."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} is not this user's own")


def _is_whole(path: Path, sums: Path) -> bool:
    """Return whether a library is as it was compiled; one cut short would kill the process."""
    try:
        _require_own(path)
        return read_state(sums, "it is written again")[0].get("library") == _checksum(path)
    except (OSError, InputError):
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(path: Path, compiler: str, flags: tuple[str, ...], source: bytes) -> None:
    """Compile a library; raises SubprocessError where the compiler refuses, OSError without one."""
    command = [compiler, *flags, "-x", "c", "-", "-o", str(path), "-lm"]
    subprocess.run(command, input=source, capture_output=True, check=True, timeout=SECONDS)


def _open(path: Path) -> Decode:
    decode = ctypes.CDLL(str(path)).decode
    decode.argtypes, decode.restype = [ctypes.c_void_p], ctypes.c_int
    return decode
