"""SparseDM (Wang et al. 2024, arXiv 2404.10445): N:M masks by magnitude over dense weights, improved straight-through.

The gradient of a masked weight is dL/dw = dL/dw~ + λ (1 - m) w, w~ = m w (SR-STE, Zhou et al. 2021); plain: λ = 0.
The moving average is of the dense weights and has the trained weights' masks; SparseDM's code takes the average's own.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raysparse.sparse.method import Method
from raysparse.sparse.settings import Sparse

STAGES = {"fixed": "", "progressive": "31:32,15:16,7:8,3:4"}  # before the pattern that S and m say


class Settings(Sparse):
    sparsity: float = 0.5  # 1 - N / M
    pattern: Literal["nm"] = "nm"  # the only one: groups of m inputs, (1 - S) m stay; 2:4 as published
    refresh_interval: int = Field(1, ge=1)  # k: masks are computed anew every so many optimizer steps
    ste: Literal["sr", "plain"] = "sr"
    sr_lambda: float = Field(2e-4, ge=0)  # λ; of sr
    stages: str = "fixed"  # fixed, progressive, or patterns to go through before the last, such as 7:8,3:4
    stage_steps: int = Field(100_000, ge=1)  # optimizer steps of each stage but the last
    teacher: str | None = None  # a dense checkpoint of raysparse, or a diffusers folder
    start: Literal["scratch", "teacher"] = "scratch"  # teacher: from its weights, as published
    loss: Literal["noise", "teacher", "both"] = "noise"  # both: noise + teacher_weight x teacher
    teacher_weight: float = Field(0.1, gt=0)
    teacher_bf16: bool = False  # the teacher's forward pass in bf16

    @field_validator("stages", mode="before")
    @classmethod
    def _are_patterns(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in STAGES and not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", value):
            raise ValueError(f"stages is {value!r}; give fixed, progressive, or patterns such as 7:8,3:4")
        if isinstance(value, int):  # YAML 1.1 reads 3:4 as a time
            raise ValueError(f"stages is the number {value}: write a pattern in quotes, such as '3:4'")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.teacher is None and (self.start == "teacher" or self.loss != "noise"):
            raise ValueError(f"start {self.start!r} and loss {self.loss!r} need a teacher: give teacher, a folder")
        before = 1.0
        for n, m in self.patterns():
            if not 1 <= n <= m or n / m > before:
                raise ValueError(f"stages {self.stages!r}: {n}:{m} must leave 1 to {m}, and no more than what precedes")
            before = n / m
        return self

    def patterns(self) -> list[tuple[int, int]]:
        """(N, M) of every stage, the last one too."""
        listed = STAGES.get(self.stages, self.stages)
        found = [tuple(map(int, text.split(":"))) for text in listed.split(",") if text]
        return [*((n, m) for n, m in found), (round((1 - self.sparsity) * self.m), self.m)]

    def stage(self, step: int) -> int:
        """Index of the stage after so many optimizer steps."""
        return min(step // self.stage_steps, len(self.patterns()) - 1)

    def unused(self) -> set[str]:
        """What the pattern, the straight-through estimator, the stages and the teacher do not use."""
        found = {"sr_lambda"} if self.ste == "plain" else set()
        found |= {"stage_steps"} if len(self.patterns()) == 1 else set()
        found |= {"teacher_weight"} if self.loss != "both" else set()
        found |= {"teacher_bf16"} if self.loss == "noise" else set()
        found |= {"teacher"} if self.loss == "noise" and self.start == "scratch" else set()
        return super().unused() | found


METHOD = Method(straight_through=True)
