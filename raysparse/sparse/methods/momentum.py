"""Prune the smallest magnitudes, grow where the averaged gradient is largest (as in Dettmers & Zettlemoyer 2019, SNFS).

Their optimizer's momentum is dense; ours is 0 where a weight is pruned, so an average of its own is kept. SNFS also
moves weights between layers by their momentum, which this does not: every layer keeps its count.
"""

from pydantic import Field

from raysparse.sparse.method import Method
from raysparse.sparse.settings import Dynamic


class Settings(Dynamic):
    gradient_momentum: float = Field(0.9, ge=0, lt=1)  # a step's gradient counts (1 - this) this^(steps since)


METHOD = Method(prune="magnitude", grow="gradient", needs="momentum")
