"""RigL-DM (Evci et al. 2020): prune the smallest magnitudes, grow where the dense gradient is largest."""

from raysparse.sparse.method import Method

SETTINGS = frozenset(
    {"sparsity", "allocation", "prune_ratio", "update_interval", "prune_schedule", "update_end_fraction"}
)
METHOD = Method(prune="magnitude", grow="gradient")
