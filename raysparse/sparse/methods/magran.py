"""MagRan-DM: prune the smallest magnitudes, grow at random."""

from raysparse.sparse.method import Method
from raysparse.sparse.settings import Dynamic as Settings

__all__ = ["METHOD", "Settings"]
METHOD = Method(prune="magnitude", grow="random")
