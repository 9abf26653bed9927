"""SET (Mocanu et al. 2018): prune the smallest positive and the largest negative weights, grow at random."""

from raysparse.sparse.method import Method
from raysparse.sparse.settings import Dynamic as Settings

__all__ = ["METHOD", "Settings"]
METHOD = Method(prune="sign_balanced", grow="random")
