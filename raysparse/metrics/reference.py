"""Features and statistics of the reference images, computed once per (images, extractor) and kept on disk.

The cache is keyed by content, not by a name that other data could carry too; a file that is damaged, cut short or of
another key is computed again. Several trials may write one file at once: each writes a whole one and the last stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from raysparse.files import atomic_path
from raysparse.metrics.extractors._base import Extractor
from raysparse.metrics.fidelity import Statistics, statistics

LAYOUT = "raysparse reference 1"  # a part of every key: change it with the file's layout or the statistics' maths


@dataclasses.dataclass(frozen=True)
class Reference:
    """features: float32 [N, D], for KID; statistics: of them, for FID."""

    features: NDArray[np.float32]
    statistics: Statistics


def reference(
    cache: Path | None,
    extractor: Extractor,
    *,
    content_hash: str,
    count: int,
    features: Callable[[], torch.Tensor],
) -> Reference:
    """The reference of `extractor` for the images with `content_hash`, from the folder `cache` or computed into it.

    content_hash: of the images' content; count: how many of them; features: called only when there is no good file,
    gives float32 [count, feature_dim]. cache None: computed each time.
    """
    key = {
        "layout": LAYOUT,
        "images": content_hash,
        "count": str(count),
        "extractor": extractor.name,
        "weights": extractor.weights_hash,
        "layer": extractor.layer,
        "resize": extractor.resize,
    }
    path = cache / f"reference-{_digest(json.dumps(key, sort_keys=True).encode())[:32]}.safetensors" if cache else None
    found = _read(path, key) if path else None
    if found is not None:
        return found
    values = features().cpu().numpy().astype(np.float32, copy=False)
    if values.shape != (count, extractor.feature_dim):
        raise ValueError(f"expected {count} x {extractor.feature_dim} features, got {values.shape}")
    fresh = Reference(values, statistics(values))
    if path:
        _write(path, key, fresh)
    return fresh


def _write(path: Path, key: Mapping[str, str], found: Reference) -> None:
    parts = {"features": found.features, "mean": found.statistics.mean, "root": found.statistics.root}
    tensors: dict[str, NDArray[Any]] = {name: np.ascontiguousarray(value) for name, value in parts.items()}
    with atomic_path(path) as temporary:
        # Not save_file, whose error of a full disk is no OSError.
        temporary.write_bytes(safetensors.numpy.save(tensors, metadata={**key, "digest": _content(tensors)}))


def _read(path: Path, key: Mapping[str, str]) -> Reference | None:
    """None where there is no file, or one that is damaged or of another key."""
    try:
        with safetensors.safe_open(path, framework="numpy") as stored:
            facts = dict(stored.metadata() or {})
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError):
        return None
    if facts != {**key, "digest": _content(tensors)}:
        return None
    return Reference(tensors["features"], Statistics(tensors["mean"], len(tensors["features"]), root=tensors["root"]))


def _content(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()
