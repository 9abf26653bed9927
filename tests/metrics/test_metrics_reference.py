"""The reference cache: one computation per content, and a file that is not right is computed again."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from raysparse.metrics import fidelity
from raysparse.metrics.fidelity import fid, statistics
from raysparse.metrics.reference import reference


class Counting:
    """An extractor's facts, and features that count how often they are asked for."""

    name, weights_hash, layer, resize, feature_dim = "tiny", "w1", "last", "none", 6

    def __init__(self, n: int = 9) -> None:
        self.n, self.calls = n, 0

    def features(self) -> torch.Tensor:
        self.calls += 1
        return torch.randn(self.n, self.feature_dim, generator=torch.Generator().manual_seed(0))


def ask(extractor, cache, content="c1"):
    return reference(cache, extractor, content_hash=content, count=extractor.n, features=extractor.features)


def test_computed_once_and_read_back_exactly(tmp_path):
    extractor = Counting()
    first, second = ask(extractor, tmp_path), ask(extractor, tmp_path)
    assert extractor.calls == 1
    assert np.array_equal(first.features, second.features)
    assert first.features.dtype == np.float32
    assert np.array_equal(first.statistics.root, second.statistics.root)
    assert second.statistics.count == 9
    assert fid(second.statistics, statistics(extractor.features())) < 1e-9
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_its_root_is_made_once_and_no_trial_makes_it_again(tmp_path, monkeypatch):
    extractor, made, real = Counting(), [], fidelity._root
    monkeypatch.setattr(fidelity, "_root", lambda covariance: made.append(1) or real(covariance))
    ask(extractor, tmp_path)
    draw = torch.Generator().manual_seed(1)
    for _ in range(2):  # trials, each of three evaluations
        of_trial = ask(extractor, tmp_path)
        values = [fid(statistics(torch.randn(30, 6, generator=draw)), of_trial.statistics) for _ in range(3)]
    assert min(values) > 0
    assert made == [1]


@pytest.mark.parametrize("change", ["content", "name", "weights_hash", "layer", "resize", "n"])
def test_other_content_or_extractor_is_another_entry(tmp_path, change):
    ask(Counting(), tmp_path)
    other = Counting()
    if change != "content":
        setattr(other, change, 8 if change == "n" else "other")
    ask(other, tmp_path, "c2" if change == "content" else "c1")
    assert other.calls == 1
    assert len(list(tmp_path.iterdir())) == 2


def flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-8], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    extractor = Counting()
    good = ask(extractor, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = ask(extractor, tmp_path)
    assert extractor.calls == 2
    assert np.array_equal(good.features, again.features)
    ask(extractor, tmp_path)
    assert extractor.calls == 2, "the file was not mended"


def test_a_whole_file_of_another_key_under_this_name_is_not_used(tmp_path):
    extractor, other = Counting(), Counting()
    ask(extractor, tmp_path)
    (path,) = tmp_path.iterdir()
    ask(other, tmp_path / "b", "c2")
    (strange,) = (tmp_path / "b").iterdir()
    path.write_bytes(strange.read_bytes())
    ask(extractor, tmp_path)
    assert extractor.calls == 2


def test_without_a_folder_nothing_is_kept_and_a_failed_computation_leaves_nothing(tmp_path):
    extractor = Counting()
    ask(extractor, None)
    ask(extractor, None)
    assert extractor.calls == 2
    with pytest.raises(ValueError, match="expected 7 x 6"):
        reference(tmp_path, extractor, content_hash="c", count=7, features=extractor.features)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_file_and_is_an_os_error_that_names_it(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/reference-\w+.safetensors'"):
            ask(Counting(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())
