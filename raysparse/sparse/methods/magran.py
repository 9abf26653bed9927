"""MagRan-DM: prune the smallest magnitudes, grow at random."""

from raysparse.sparse.method import Method

SETTINGS = frozenset(
    {"sparsity", "allocation", "prune_ratio", "update_interval", "prune_schedule", "update_end_fraction"}
)
METHOD = Method(prune="magnitude", grow="random")
