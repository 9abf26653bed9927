"""Static-DM: a random sparse mask, drawn once and kept."""

from raysparse.sparse.method import Method
from raysparse.sparse.settings import Sparse as Settings

__all__ = ["METHOD", "Settings"]
METHOD = Method()
