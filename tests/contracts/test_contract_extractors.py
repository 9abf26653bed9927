"""What every extractor must do; a new file in raysparse/metrics/extractors joins by existing.

An extractor with weights of its own to get (NEEDS_WEIGHTS or DOWNLOADS) joins by a function in RANDOM_WEIGHTS that
writes a file of the right architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysparse import plugins
from raysparse.errors import UsageError
from raysparse.metrics.extractors import inception, sketch_inception
from raysparse.metrics.extractors._base import extract


def lively(network: nn.Module) -> dict[str, Any]:
    """Random weights under which an image still shows in the last layer."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.state_dict()


def inception_weights(path: Path) -> None:
    import io

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: Any) -> None:
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.save(lively(Unloaded("x", ["2048"], feature_extractor_weights_path=nothing)), path)


def sketch_inception_weights(path: Path) -> None:
    torch.save(lively(sketch_inception.network()), path)


RANDOM_WEIGHTS: dict[str, Callable[[Path], None]] = {
    "inception": inception_weights,
    "sketch_inception": sketch_inception_weights,
}
NAMES = plugins.names("extractors")


@pytest.fixture(scope="module", params=NAMES)
def extractor(request, tmp_path_factory):
    module = plugins.load("extractors", request.param)
    if not (module.NEEDS_WEIGHTS or module.DOWNLOADS):
        return module.build()
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    RANDOM_WEIGHTS[request.param](path)
    return module.build(path)


def images(count: int, channels: int = 1, size: int = 64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    ground = torch.full((count, channels, size, size), 255, dtype=torch.uint8)
    for image in ground:
        top, left = torch.randint(size // 2, (2,), generator=draw).tolist()
        image[:, top : top + 20, left : left + 2] = 0
        image[:, top + 9 : top + 11, left : left + 25] = torch.randint(200, (channels, 1, 1), generator=draw).byte()
    return ground


def test_features_have_the_stated_shape_and_carry_no_gradient(extractor):
    features = extractor(images(3))
    assert features.shape == (3, extractor.feature_dim)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.isfinite(features).all()
    assert extractor.name in NAMES
    for fact in (extractor.weights_hash, extractor.layer, extractor.resize):
        assert isinstance(fact, str)
        assert fact


def test_deterministic_and_different_for_different_images(extractor):
    batch = images(3)
    assert torch.equal(extractor(batch), extractor(batch))
    spread = extractor(batch).std(dim=0).max()
    assert spread > 1e-3 * extractor(batch).abs().max()


def test_the_batch_an_image_is_in_does_not_matter(extractor):
    batch = images(3)
    whole, single = extractor(batch), extract(extractor, batch.split(1))
    assert torch.allclose(whole, single, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_gray_in_three_channels_is_gray(extractor):
    batch = images(2)
    one, three = extractor(batch), extractor(batch.expand(-1, 3, -1, -1))
    assert torch.allclose(one, three, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_colours_and_other_sizes_are_taken(extractor):
    assert extractor(images(2, channels=3, size=48)).shape == (2, extractor.feature_dim)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 1, 64, 64), torch.zeros(1, 64, 64, dtype=torch.uint8), torch.zeros(2, 2, 9, 9, dtype=torch.uint8)],
    ids=["float", "no batch", "two channels"],
)
def test_other_input_is_refused(extractor, wrong):
    with pytest.raises(UsageError, match=r"takes uint8 images \[B, 1 or 3, H, W\]"):
        extractor(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_foreign_file_is_the_users_error(name, tmp_path):
    module = plugins.load("extractors", name)
    with pytest.raises(UsageError):
        module.build(tmp_path / "absent.pth")
    torch.save({"stranger.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UsageError):
        module.build(tmp_path / "other.pth")
    (tmp_path / "damaged.pth").write_bytes(b"\x80\x02damaged")
    with pytest.raises(UsageError):
        module.build(tmp_path / "damaged.pth")
    if module.NEEDS_WEIGHTS:
        with pytest.raises(UsageError, match="give its path"):
            module.build()


class Planted:
    def __reduce__(self):
        return (Path.touch, (Path("planted"),))


@pytest.mark.parametrize("name", sorted(RANDOM_WEIGHTS))
def test_a_pickle_with_code_is_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"code": Planted()}, tmp_path / "evil.pth")
    with pytest.raises(UsageError, match="plain tensors"):
        plugins.load("extractors", name).build(tmp_path / "evil.pth")
    assert not (tmp_path / "planted").exists()


def test_inception_without_a_network_says_where_to_get_the_weights(tmp_path, monkeypatch):
    import urllib.error

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception.urllib.request, "urlopen", offline)
    with pytest.raises(UsageError, match=r"could not be downloaded .*github\.com/toshas.*`weights`"):
        inception.build()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_inception_checks_the_known_file(tmp_path, monkeypatch):
    import io

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception.urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO(b"cut short"))
    with pytest.raises(UsageError, match=r"sha256 .* expected 6726825d"):
        inception.build()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / inception.FILE).write_bytes(b"cut short")
    with pytest.raises(UsageError, match=r"sha256 .* expected 6726825d"):
        inception.build(tmp_path / inception.FILE)
