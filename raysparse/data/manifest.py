"""What the manifest of a prepared folder says, as far as it is read again; other keys are for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raysparse.data.sketch import Representation
from raysparse.errors import UsageError, usage_error_from

SPLITS = ("train", "validation", "reference")


def complaint(content: Any) -> str | None:
    """The first of what is wrong with the content of a manifest.json; None: nothing is."""
    kind: type[BaseModel] = _Pictures if isinstance(content, dict) and is_image(content) else _Sketches
    try:
        kind.model_validate_json(json.dumps(content))  # whose complaints are in JSON's words
    except ValidationError as error:
        return str(usage_error_from(error, "", kind)).splitlines()[0].removeprefix(": ")
    return None


def damaged(folder: Path, why: object) -> UsageError:
    """That of a prepared folder's manifest."""
    return UsageError(f"{folder / 'manifest.json'} is damaged ({why}); {again(folder)}")


def again(folder: Path) -> str:
    """What to do where a file of a prepared folder is damaged."""
    return f"delete the folder {folder} and run `raysparse prepare` again"


def is_image(content: dict[str, Any]) -> bool:
    """Whether the folder holds pictures; else sketches."""
    return content.get("kind") == "image"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class _File(_Part):
    bytes: int
    sha256: str


class _LeftOut(_Part):
    id: str
    reason: str


class _Manifest(_Part):
    classes: list[str]
    facts: dict[str, Any] = Field(default_factory=dict)

    @field_validator("facts")
    @classmethod
    def _counted(cls, facts: dict[str, Any]) -> dict[str, Any]:
        for name, count in facts.items():
            if name.startswith("other_files") and type(count) is not int:
                raise ValueError(f"{name} is a number of files, got {count!r}")
        return facts

    @field_validator("splits", check_fields=False)
    @classmethod
    def _all(cls, splits: dict[str, Any]) -> dict[str, Any]:
        if missing := [name for name in SPLITS if name not in splits]:
            raise ValueError(f"{', '.join(missing)} missing")
        return splits


class _Range(_Part):
    start: int = Field(ge=0)
    stop: int
    sha256: str

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if self.start >= self.stop:
            raise ValueError(f"start must be below stop, got {self.start} and {self.stop}")
        return self


class _SketchOptions(_Part):
    representation: Representation


class _Sketches(_Manifest):
    arrays: dict[str, _File]
    splits: dict[str, _Range]
    options: _SketchOptions

    @field_validator("arrays")
    @classmethod
    def _those(cls, arrays: dict[str, _File]) -> dict[str, _File]:
        if arrays.keys() | {"labels"} != {"points", "offsets", "labels"}:
            raise ValueError(f"those are points, offsets and, in a set with classes, labels; got {', '.join(arrays)}")
        return arrays


class _Rows(_Part):
    table: str  # the split in whose Arrow file they are
    rows: int = Field(ge=1)
    shards: list[str]
    sha256: str
    images_sha256: str


class _PictureOptions(_Part):
    size_px: int
    flips: bool
    conditional: bool


class _Pictures(_Manifest):
    size_px: int
    encoder: str | None
    latent_shape: list[int] | None
    damaged: list[_LeftOut]
    files: dict[str, _File]
    splits: dict[str, _Rows]
    options: _PictureOptions

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.size_px != self.options.size_px:
            raise ValueError(f"size_px is {self.size_px}, options.size_px {self.options.size_px}")
        return self

    @model_validator(mode="after")
    def _tables_and_shards_are_there(self) -> Self:
        for name, split in self.splits.items():
            kept = self.splits.get(split.table)
            if kept is None or kept.table != split.table or split.rows > kept.rows:
                raise ValueError(f"splits.{name}: {split.rows} rows of {split.table!r}, which has not as many")
            if absent := [shard for shard in split.shards if shard not in self.files]:
                raise ValueError(f"splits.{name}: {absent[0]!r} is not among the files")
        return self
