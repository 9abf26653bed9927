"""Dense: no mask; the baseline that sparse runs are compared with."""

from raysparse.sparse.method import Method
from raysparse.sparse.settings import Dense as Settings

__all__ = ["METHOD", "Settings"]
METHOD = Method(sparse=False)
