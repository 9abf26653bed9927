"""Kernels are compiled once, kept whole, and what is missing is said."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raysparse import native
from raysparse.errors import UsageError

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
def test_a_damaged_library_is_made_anew(source: Path) -> None:
    native.load(source)
    (path,) = kept(source)
    path.unlink()  # not in place: this process has it mapped
    path.write_bytes(b"\x7fELF half a file")
    native._loaded.cache_clear()
    assert native.load(source).answer() == 42


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
