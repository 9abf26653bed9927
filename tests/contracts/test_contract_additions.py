"""What it costs to add a method or a pattern: one file, which config, sweeps, engine and costs then know."""

from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn

from raysparse import config, plugins, space
from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine, methods, patterns

METHOD = """
    from pydantic import Field

    from raysparse.sparse.method import Method
    from raysparse.sparse.settings import Dynamic


    class Settings(Dynamic):
        heat: float = Field(1.0, gt=0)


    METHOD = Method(prune="magnitude", grow="random")
"""
PATTERN = """
    from raysparse.sparse.pattern import Pattern, matrix, nothing_to_check

    SETTINGS = frozenset({"other_layers"})
    FIXED = {}
    MATRICES_ONLY = True
    check = nothing_to_check


    class Rows(Pattern):
        def __init__(self, shape):
            super().__init__(shape)
            self.units = (shape[0],)

        def total(self, values):
            return values.reshape(self.shape[0], -1).sum(1)

        def spread(self, units):
            return units[:, None].expand(self.shape[0], self.size).reshape(self.shape)

        def of_mask(self, mask):
            return mask.reshape(self.shape[0], -1)[:, 0]


    def of(shape, settings):
        return Rows(shape)
"""


@pytest.fixture
def added(tmp_path, monkeypatch):
    for package, name, text in ((methods, "hot", METHOD), (patterns, "rows", PATTERN)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


def test_a_method_is_one_file_with_its_own_setting(added):
    assert "hot" in plugins.names("methods")
    cold, hot = (config.parse({"sparse": {"method": "hot", "heat": heat}}) for heat in (1.0, 2.0))
    assert cold.trial_id != hot.trial_id
    assert (cold.sparse.setting("heat"), hot.sparse.setting("heat")) == (1.0, 2.0)
    assert cold == config.parse({"sparse": {"method": "hot"}}), "a default is no other trial"
    sweep = space.parse({"name": "s", "grid": {"hot": {"heat": [1.0, 2.0], "pattern": ["rows"]}}}, "s.yaml")
    assert len(space.grid_points(sweep)) == 3
    with pytest.raises(UsageError, match="heat: got 0"):
        config.parse({"sparse": {"method": "hot", "heat": 0}})
    with pytest.raises(UsageError, match="'rigl' has no 'heat'"):
        config.parse({"sparse": {"method": "rigl", "heat": 2.0}})


@pytest.mark.parametrize("method", ["hot", "rigl"])
def test_a_pattern_is_one_file(added, method):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = SparseEngine(model, optimizer, method=method, pattern="rows", sparsity=0.5, update_interval=1)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()
    assert engine.updates == 10
    for name, mask in engine.masks.items():
        assert (mask.all(1) | ~mask.any(1)).all()
        assert int(mask.sum()) == engine.layout.counts[name]
