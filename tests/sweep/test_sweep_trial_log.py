"""A trial's own log: whatever the process says, whoever says it, however it ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from raysparse.sweep import trial_log


def said_by(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A process that trains "t" with `code` as its train_rank."""
    script = f"""
import os, sys, ctypes, logging, warnings
from pathlib import Path
from raysparse.sweep import trial_log

@trial_log.kept
def train_rank(config, say, *, rank=0):
{textwrap.indent(textwrap.dedent(code), "    ")}

print("before", flush=True)
try:
    train_rank({{"results": {str(tmp_path)!r}, "trial_id": "t"}}, lambda metrics: None)
finally:
    print("after", flush=True)
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def lines(tmp_path: Path) -> str:
    return "\n".join(trial_log.tail(tmp_path / "trials" / "t"))


def test_what_python_c_and_children_say_is_kept_and_goes_on_to_where_it_went(tmp_path: Path) -> None:
    ended = said_by(
        tmp_path,
        """
        print("from python")
        logging.getLogger("x").warning("from logging")
        os.system("echo from a child")
        ctypes.CDLL(None).write(2, b"from C\\n", 7)
        say({"step": 4, "train_loss": 0.5, "fid": 12.25, "density": 0.5})
        """,
    )
    for text in ("from python", "from logging", "from a child", "from C", "step 4: loss 0.5, FID 12.25, density 0.5"):
        assert text in lines(tmp_path)
        assert text in ended.stderr
    assert ended.stdout == "before\nafter\n"
    assert "before" not in lines(tmp_path)


def test_a_process_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    ended = said_by(tmp_path, "os.write(2, b'terminate called\\n'); os.abort()")
    assert ended.returncode < 0
    assert "terminate called" in lines(tmp_path)


def test_what_is_raised_is_kept_with_its_traceback(tmp_path: Path) -> None:
    ended = said_by(tmp_path, "raise ValueError('no such thing')")
    assert ended.returncode == 1
    assert "Traceback (most recent call last)" in lines(tmp_path)
    assert lines(tmp_path).endswith("ValueError: no such thing")


def test_a_log_stays_small_and_keeps_its_end(tmp_path: Path) -> None:
    said_by(
        tmp_path,
        """
        import time
        for number in range(20000):
            print("line", number, "x" * 50)
        time.sleep(1.5)
        print("the last")
        """,
    )
    path = trial_log.path_of(tmp_path / "trials" / "t")
    assert path.stat().st_size <= trial_log.LIMIT_BYTES
    assert lines(tmp_path).endswith("the last")
    assert "line 19999" in lines(tmp_path)
    assert len(trial_log.tail(path.parent)) == 20


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_the_log_does_not_stop_the_trial(tmp_path: Path) -> None:
    (tmp_path / "trials" / "t").mkdir(parents=True)
    trial_log.path_of(tmp_path / "trials" / "t").symlink_to("/dev/full")
    ended = said_by(tmp_path, "print('no room'); warnings.warn('none'); say({'step': 1}); os.write(9, b'')")
    assert "Bad file descriptor" in ended.stderr  # its own error, the only one
    assert ended.stdout == "before\nafter\n"


def test_a_log_that_cannot_be_opened_does_not_stop_the_trial(tmp_path: Path) -> None:
    (tmp_path / "trials" / "t" / "log.txt").mkdir(parents=True)
    assert said_by(tmp_path, "print('heard')").stdout == "before\nheard\nafter\n"


def test_an_error_beside_a_log_follows_it_and_nothing_in_a_log_steers_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("loss 3\n\x1b[2Jred \x1b[31m\n")
    (tmp_path / "error.txt").write_text("Traceback (most recent call last):\nOSError: disk full\n")
    assert trial_log.tail(tmp_path) == [
        "loss 3",
        " [2Jred  [31m",
        "Traceback (most recent call last):",
        "OSError: disk full",
    ]
    assert trial_log.tail(tmp_path, 1) == ["OSError: disk full"]
    assert trial_log.tail(tmp_path / "absent") == []
