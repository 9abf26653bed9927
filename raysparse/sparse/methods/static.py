"""Static-DM: a random sparse mask, drawn once and kept."""

from raysparse.sparse.method import Method

SETTINGS = frozenset({"sparsity", "allocation"})
METHOD = Method()
