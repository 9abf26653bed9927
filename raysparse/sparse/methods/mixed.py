"""Prune the smallest magnitudes; grow some at random, as MagRan, and the others by the dense gradient, as RigL."""

from pydantic import Field

from raysparse.sparse.method import Method
from raysparse.sparse.settings import Dynamic


class Settings(Dynamic):
    random_share: float = Field(0.5, ge=0, le=1)  # of the grown; 0 is RigL, 1 is MagRan


METHOD = Method(prune="magnitude", grow="mixed", needs="gradient")
