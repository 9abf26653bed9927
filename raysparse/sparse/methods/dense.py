"""Dense: no mask; the baseline that sparse runs are compared with."""

from raysparse.sparse.method import Method

SETTINGS: frozenset[str] = frozenset()
METHOD = Method(sparse=False)
