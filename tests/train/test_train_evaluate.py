"""The validation loss: of which examples, under which noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysparse.diffusion import losses
from raysparse.errors import UsageError
from raysparse.metrics.extractors._base import extract
from raysparse.train import setup


@pytest.mark.parametrize("batch_size", [16, 130, 256])
def test_a_validation_loss_does_not_depend_on_how_many_examples_run_at_a_time(tiny, batch_size):
    trainer = setup.build(tiny({"evaluate.validation_examples": 200, "evaluate.batch_size": batch_size}))
    evaluator, model = trainer.evaluator, trainer.ema.evaluation_model()
    found = []
    for first in range(0, 200, 64):  # groups of 64, whose longest sketches differ
        x, eps, t, cond = evaluator._noised(first, min(first + 64, 200))
        with torch.no_grad():
            prediction = model(evaluator.noise_schedule.add_noise(x, eps, t), t, **cond)
        found += losses.eps_mse_per_example(prediction, eps, cond["lengths"]).tolist()
    assert len(found) == 200
    assert evaluator.validation_loss(model) == pytest.approx(np.mean(found), rel=1e-6)


def test_there_are_at_most_as_many_validation_examples_as_asked_for(tiny):
    trainer = setup.build(tiny())
    evaluator, model = trainer.evaluator, trainer.ema.evaluation_model()
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for asked in (1, 100, 10**6):
        settings = evaluator.config.evaluate.model_copy(update={"validation_examples": asked})
        evaluator.config = evaluator.config.model_copy(update={"evaluate": settings})
        seen.clear()
        evaluator.validation_loss(model)
        assert sum(seen) == min(asked, len(evaluator.validation))
    hook.remove()


@pytest.fixture
def rounded(monkeypatch):
    """A process that trains in TF32. -> how float32 is computed now, of convolutions and of products."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield lambda: (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision(before)


def test_features_of_samples_and_of_references_are_in_full_float32_and_training_is_not(tiny, monkeypatch, rounded):
    trainer, seen = setup.build(tiny()), {"extractor": set(), "network": set()}
    evaluator, model = trainer.evaluator, trainer.ema.evaluation_model()
    forward = type(evaluator.extractor).__call__

    def watched(extractor, images):
        seen["extractor"].add(rounded())
        return forward(extractor, images)

    monkeypatch.setattr(type(evaluator.extractor), "__call__", watched)
    model.register_forward_pre_hook(lambda *_: seen["network"].add(rounded()))
    evaluator.evaluate(model)
    assert seen == {"extractor": {(False, "highest")}, "network": {(True, "high")}}
    seen["extractor"].clear()
    extract(evaluator.extractor, [torch.zeros(1, 1, 64, 64, dtype=torch.uint8)])
    assert seen["extractor"] == {(False, "highest")}
    with pytest.raises(UsageError, match="uint8"):
        extract(evaluator.extractor, [torch.zeros(1, 1, 64, 64)])
    assert rounded() == (True, "high")
