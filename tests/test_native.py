"""Kernels are compiled once, kept whole, and what is missing is said."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import raysparse.models
from raysparse import native
from raysparse.data import prepared
from raysparse.errors import UsageError
from raysparse.files import sha256
from raysparse.models import _compiled_gru

SOURCE = '#include "two.h"\nextern "C" int answer() { return 20 * TWO + 2; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYSPARSE_NATIVE", str(tmp_path / "native"))
    (tmp_path / "two.h").write_text("#define TWO 2\n")
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def kept(source: Path) -> list[Path]:
    return sorted((source.parent / "native").iterdir())


@pytest.mark.usefixtures("compiler")
def test_compiled_once_and_again_when_a_source_changes(source: Path) -> None:
    assert native.load(source).answer() == 42
    (first,) = kept(source)
    made = first.stat().st_mtime_ns
    native._loaded.cache_clear()  # as a new process
    assert native.load(source).answer() == 42
    assert first.stat().st_mtime_ns == made
    native._loaded.cache_clear()
    (source.parent / "two.h").write_text("#define TWO 1\n")
    assert native.load(source).answer() == 22
    assert len(kept(source)) == 2


@pytest.mark.usefixtures("compiler")
def test_a_library_of_other_instructions_is_not_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.load(source)
    monkeypatch.setattr(native, "_instructions", lambda: ("-DOTHER_CPU",))
    native.load(source)
    assert len(kept(source)) == 2


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("keep", [0, 17, 0.3, 0.7, 0.999])
def test_a_library_that_was_cut_short_is_made_anew(source: Path, keep: float) -> None:
    """Loading one ended the process with a bus error."""
    native.load(source)
    (path,) = kept(source)
    whole = path.read_bytes()
    path.unlink()  # not in place: this process has it mapped
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    native._loaded.cache_clear()
    assert native.load(source).answer() == 42
    assert path.read_bytes() == whole
    assert kept(source) == [path]


@pytest.mark.usefixtures("compiler")
def test_a_library_that_this_system_cannot_load_is_made_anew(source: Path) -> None:
    native.load(source)
    (path,) = kept(source)
    other = path.with_name(path.name[: -len(path.suffix) - 16] + sha256(source)[:16] + ".so")
    shutil.copy(source, other)  # its name is right, it is no library
    path.unlink()
    native._loaded.cache_clear()
    assert native.load(source).answer() == 42
    assert kept(source) == sorted([path, other])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("how", ["writable", "link"])
def test_a_library_that_others_may_have_written_is_made_anew(source: Path, how: str) -> None:
    """Its folder may have been open to all until now."""
    native.load(source)
    (path,) = kept(source)
    if how == "link":
        path.rename(source.parent / "elsewhere.so")
        path.symlink_to(source.parent / "elsewhere.so")
    else:
        path.chmod(0o666)
    native._loaded.cache_clear()
    assert native.load(source).answer() == 42
    assert path.lstat().st_mode & 0o777 == 0o644
    assert not path.is_symlink()


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user whom the system does not know, in a container."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("RAYSPARSE_NATIVE", "RAYSPARSE_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize(
    ("of", "variable"), [(native.default_root, "RAYSPARSE_NATIVE"), (prepared.default_root, "RAYSPARSE_DATA")]
)
def test_a_folder_that_is_named_needs_no_home(
    of: Callable[[], Path], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=f"no home folder: set {variable} to a folder of yours"):
        of()
    monkeypatch.setenv(variable, "/there")
    assert of() == Path("/there")


@pytest.mark.usefixtures("no_home")
def test_without_a_home_the_gru_is_pytorchs() -> None:
    _compiled_gru._library.cache_clear()
    try:
        assert not _compiled_gru.serves(torch.ones(1))
    finally:
        _compiled_gru._library.cache_clear()


@pytest.mark.usefixtures("compiler")
def test_two_that_compile_together_both_get_it(source: Path) -> None:
    command = native._compiler(), native._FLAGS
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: native._loaded.__wrapped__(source, *command, native.default_root()), range(2)))
    assert [library.answer() for library in found] == [42, 42]
    assert len(kept(source)) == 1


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(source.parent))
    with pytest.raises(UsageError, match=r"neither c\+\+, g\+\+ nor clang\+\+ is there.*install g\+\+"):
        native.load(source)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(UsageError, match="CXX is 'no-such-compiler -m64', which is not there"):
        native.load(source)


@pytest.mark.usefixtures("compiler")
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(source: Path) -> None:
    source.write_text("this is no C++\n")
    with pytest.raises(UsageError, match=r"(?s)cannot compile answer\.cpp .*It said: .*answer\.cpp:1"):
        native.load(source)
    assert kept(source) == []


@pytest.mark.parametrize(
    ("said", "advice", "asked"),
    [("x.cpp:1: error", "set CXX to another", 1), ("No space left on device", "free space in ", 2)],
)
def test_a_compiler_that_fails_is_asked_once_but_a_full_disk_is_no_fault_of_its(
    source: Path, monkeypatch: pytest.MonkeyPatch, said: str, advice: str, asked: int
) -> None:
    compiler, calls = source.parent / "compiler", source.parent / "calls"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] || echo >> {calls}\necho '{said}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"cannot compile answer\.cpp \(exit 1\); {advice}.*It said: {said}"):
            native.load(source)
    assert len(calls.read_text()) == asked


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there may be no folder that root cannot write to")
def test_for_a_folder_that_takes_no_files_nothing_is_compiled(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took 8 s, and again at each evaluation of a trial."""
    compiler, called = source.parent / "compiler", source.parent / "called"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] || touch {called}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("RAYSPARSE_NATIVE", "/proc/self")
    with pytest.raises(UsageError, match=r"cannot write /proc/self.*set RAYSPARSE_NATIVE"):
        native.load(source)
    assert not called.exists()


def test_a_process_that_is_killed_while_it_compiles_leaves_nothing_in_the_cache(source: Path) -> None:
    compiler, cache = source.parent / "compiler", source.parent / "native"
    compiler.write_text("#!/bin/sh\nkill -9 $PPID\n")
    compiler.chmod(0o755)
    cache.mkdir()
    code = "import sys; from pathlib import Path; from raysparse import native\n"
    code += (
        "source, compiler, cache = sys.argv[1:]; native._compile(Path(source), (compiler,), (), Path(cache), 'answer')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, compiler, cache],
        env=os.environ | {"TMPDIR": str(source.parent)},
        check=False,
    )
    assert done.returncode == -9
    assert kept(source) == []


@pytest.mark.usefixtures("compiler")
def test_a_folder_that_others_may_write_to_is_refused(source: Path) -> None:
    folder = source.parent / "native"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UsageError, match=r"other users may write to it .*chmod 700"):
        native.load(source)
    folder.chmod(0o700)
    assert native.load(source).answer() == 42
    assert os.stat(folder).st_mode & 0o077 == 0


THREADS_SOURCE = """
#include "threads.h"
extern "C" void run(int64_t parts, int32_t threads, int32_t* done, int32_t* by) {
  over_threads(parts, threads, [&](int64_t part, int thread) { ++done[part], by[part] = thread; });
}
"""


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("pytorchs", [True, False])
@pytest.mark.parametrize(("parts", "threads"), [(0, 3), (1, 3), (2, 3), (1000, 1), (1000, 2), (1000, 5)])
def test_each_part_is_done_once_on_pytorchs_threads_and_on_others(
    source: Path, parts: int, threads: int, pytorchs: bool
) -> None:
    shutil.copy(Path(raysparse.models.__path__[0]) / "native" / "threads.h", source.parent)
    source.write_text(THREADS_SOURCE)
    library = native.load(source)
    if not pytorchs:
        library.raysparse_use_pool(None)
    done, by = torch.zeros(parts + 1, dtype=torch.int32), torch.zeros(parts + 1, dtype=torch.int32)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (done, by))
    library.run(ctypes.c_int64(parts), ctypes.c_int32(threads), *pointers)
    assert done.tolist() == [1] * parts + [0]
    assert 0 <= int(by.min()) <= int(by.max()) < threads


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch may have no OpenMP of this kind")
def test_pytorchs_threads_are_found() -> None:
    assert (native._pool() is not None) == ("OpenMP" in torch.__config__.parallel_info().split("ATen parallel", 1)[1])
