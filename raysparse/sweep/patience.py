"""Storage that fails for a while: a trial, and the driver, wait and try again instead of dying with it."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable

import safetensors

DELAYS_S = (1.0, 5.0, 30.0, 120.0)  # in all less than the 30 min that other ranks wait in a collective
# What goes away by itself or by somebody's hand: a full disk or quota, a device or a network mount that is lost.
PASSING = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EROFS, errno.EAGAIN, errno.EBUSY,
    errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EREMOTEIO,
}  # fmt: skip


def patiently(work: Callable[[], object], what: str, *, needed: bool, done: str = "written") -> bool:
    """Do `work`, again after each of DELAYS_S where storage fails. -> whether it was done in the end.

    what: `checkpoint of step 40`, for the one message that is said. needed: raise the last error instead of False.
    done: or read.
    """
    for delay_s in (*DELAYS_S, None):
        try:
            work()
        # safetensors says I/O errors as its own class
        except (OSError, safetensors.SafetensorError) as error:
            if isinstance(error, OSError) and not passing(error):
                raise  # a mistake, such as a file where a folder should be: it will not pass
            if delay_s is None:
                if needed:
                    raise
                _say(f"{what} could not be {done} ({_reason(error)}); the trial goes on without it")
                return False
            if delay_s == DELAYS_S[0]:
                _say(
                    f"{what} could not be {done} ({_reason(error)}); trying again for {sum(DELAYS_S):.0f} s: free "
                    "some space or bring the storage back"
                )
            time.sleep(delay_s)
        else:
            return True
    raise AssertionError


def passing(error: BaseException | None) -> bool:
    """Whether it is storage that may come back."""
    return isinstance(error, OSError) and error.errno in PASSING


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _say(text: str) -> None:
    # A trial's stderr is its log, RESULTS/trials/<id>/log.txt; the driver's is the terminal.
    print(text, file=sys.stderr, flush=True)  # noqa: T201
