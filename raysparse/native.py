"""C++ kernels, compiled for this machine's CPU when they are first used, and kept.

A kernel is one source file without PyTorch's headers, called through ctypes: it compiles in 3 s where a PyTorch
extension takes 30, needs no ninja, and serves any version of PyTorch. A library lies in the user's cache folder under a
name that says what it was made from: the sources, the compiler and the instructions that PyTorch finds in this CPU. So
a home folder shared by different machines holds one for each, and none runs where it cannot. The name says what is in
the library, too: one that a disk cut short would end the process, with a bus error, where it is loaded or later.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from raysparse.errors import UsageError
from raysparse.files import atomic_path, cache_folder, sha256

COMPILE_S = 300  # a compiler that takes longer hangs
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
_INSTRUCTIONS = {  # by PyTorch's word for what the CPU has; any other: what the compiler takes for granted
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
_ERROR_LINES = 5  # of the compiler's complaint
_DIGITS = 16  # of a digest, in a name


class CompilerFails(UsageError):
    """The compiler does not take a source, or hangs on it: one process does not ask it twice."""


def default_root() -> Path:
    """Where compiled kernels lie: $RAYSPARSE_NATIVE, or raysparse/native in the user's cache folder."""
    return cache_folder("RAYSPARSE_NATIVE", "native")


def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ file, compiled unless it is there already. The headers beside the file belong to it.

    Processes that need it at the same time each compile it, and the last one's file stays: all are the same.
    A kernel that runs on several threads gets PyTorch's (models/native/threads.h).
    UsageError: no compiler, one that fails, or a cache folder that is nowhere or that others may write to, each with
    what to do.
    """
    library = _loaded(source, _compiler(), (*_FLAGS, *_instructions()), default_root())
    if isinstance(library, CompilerFails):
        raise CompilerFails(str(library))
    if hasattr(library, "raysparse_use_pool"):
        library.raysparse_use_pool(_pool())
    return library


@functools.cache
def _loaded(source: Path, compiler: tuple[str, ...], flags: tuple[str, ...], root: Path) -> ctypes.CDLL | CompilerFails:
    """An error is an answer too, which is kept: with `auto` a trial asks again at each evaluation."""
    made_from = (compiler, _version(compiler), flags, platform.system(), platform.machine())
    _check_folder(root)
    name = f"{source.stem}-{_digest(source, made_from)}"
    for path in filter(_is_whole_and_ours, root.glob(f"{name}-*.so")):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            pass  # made on a machine with other system libraries: made anew
    try:
        path = _compile(source, compiler, flags, root, name)
    except CompilerFails as error:
        return error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UsageError(f"{path} was compiled but cannot be loaded: {error}; is {root} mounted noexec?") from error


@functools.cache
def _pool() -> ctypes.c_void_p | None:
    """The entry to the threads of PyTorch's OpenMP; None where it has another way, as on macOS."""
    import torch

    try:
        core = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # it is loaded: nothing is run
        return ctypes.cast(core.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def _instructions() -> tuple[str, ...]:
    import torch

    return _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())


def _compiler() -> tuple[str, ...]:
    """The C++ compiler: $CXX, else the system's. UsageError where there is none."""
    asked = os.environ.get("CXX")
    try:
        choices = [tuple(shlex.split(asked))] if asked else [("c++",), ("g++",), ("clang++",)]
    except ValueError as error:
        raise UsageError(f"CXX is {asked!r}, which is no command: {error}") from error
    for choice in choices:
        if choice and shutil.which(choice[0]):
            return choice
    tried = f"CXX is {asked!r}, which is not there" if asked else "neither c++, g++ nor clang++ is there"
    raise UsageError(f"a C++ compiler is missing ({tried}): install g++ or clang++, or set CXX to one")


def _digest(source: Path, made_from: tuple[object, ...]) -> str:
    """Of all that decides what the library does."""
    digest = hashlib.sha256(repr(made_from).encode())
    for part in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(part.name.encode() + b"\0" + part.read_bytes())
    return digest.hexdigest()[:_DIGITS]


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    """Its first line says it; empty where it says nothing, which compiling will tell."""
    try:
        said = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=COMPILE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.partition("\n")[0]


def _check_folder(root: Path) -> None:
    """Make it, for this user alone. What lies in it is executed, so nobody else may write there."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.stat()
    except OSError as error:
        raise UsageError(f"cannot make {root}: {error.strerror}; set RAYSPARSE_NATIVE to a folder of yours") from error
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"{root} holds compiled code, but other users may write to it (mode {stat.filemode(found.st_mode)}, owner "
            f"{found.st_uid}); empty it and chmod 700 it, or set RAYSPARSE_NATIVE to a folder of yours"
        )


def _is_whole_and_ours(path: Path) -> bool:
    """Whether it holds what its name says, and nobody else can have written it: its folder may have been open."""
    try:
        found = path.lstat()
        mine = found.st_uid in (os.geteuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return stat.S_ISREG(found.st_mode) and mine and path.stem.endswith(f"-{sha256(path)[:_DIGITS]}")
    except OSError:
        return False


def _compile(source: Path, compiler: tuple[str, ...], flags: tuple[str, ...], root: Path, name: str) -> Path:
    """The library of a source, whole in the folder `root`. UsageError: it cannot be compiled or written."""
    try:
        with tempfile.TemporaryFile(dir=root):  # else the compiler works for nothing, at each evaluation again
            pass
        with tempfile.TemporaryDirectory(prefix="raysparse-") as place:  # not beside: a killed process leaves it there
            made = Path(place) / "made.so"
            done = subprocess.run(
                [*compiler, *flags, str(source), "-o", str(made)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMPILE_S,
                check=False,
            )
            if done.returncode:
                raise _complaint(source, compiler, done)
            path = root / f"{name}-{sha256(made)[:_DIGITS]}.so"
            with atomic_path(path) as temporary:
                shutil.copyfile(made, temporary)
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename or root}: {error.strerror}; free space, or set RAYSPARSE_NATIVE (where "
            "libraries are kept) or TMPDIR (where they are made) to a folder of yours"
        ) from error
    except subprocess.TimeoutExpired as error:
        said = f"{compiler[0]} did not compile {source.name} in {COMPILE_S} s; set CXX to another"
        raise CompilerFails(said) from error
    return path


def _complaint(source: Path, compiler: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> UsageError:
    said = "\n".join((done.stderr or done.stdout).strip().splitlines()[:_ERROR_LINES])
    full = os.strerror(errno.ENOSPC) in said
    todo = f"free space in {tempfile.gettempdir()}" if full else "set CXX to another compiler, GCC or clang"
    what = f"{shlex.join(compiler)} cannot compile {source.name} (exit {done.returncode})"
    return (UsageError if full else CompilerFails)(f"{what}; {todo}. It said: {said or 'nothing'}")
