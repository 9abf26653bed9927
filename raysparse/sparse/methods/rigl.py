"""RigL-DM (Evci et al. 2020): prune the smallest magnitudes, grow where the dense gradient is largest."""

from raysparse.sparse.method import Method
from raysparse.sparse.settings import Dynamic as Settings

__all__ = ["METHOD", "Settings"]
METHOD = Method(prune="magnitude", grow="gradient", needs="gradient")
