"""Batches of samples that are drawn in one pass: what each is alone, and each drawn once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysparse.config import TrialConfig
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.models import chirodiff
from raysparse.train import evaluate, setup
from raysparse.train.sampling import Sampler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def sampler_of(trial: TrialConfig, device: torch.device = CPU) -> Sampler:
    return Sampler(trial, setup.evaluator(trial).sampler.source, NoiseSchedule(), device)


def model_of(trial: TrialConfig) -> chirodiff.ChiroDiff:
    return chirodiff.build(chirodiff.Config(**trial.model.options), seed=0)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every device takes three batches in a pass; how many a pass had."""
    seen: list[int] = []
    whole = Sampler.denoised
    monkeypatch.setattr(Sampler, "at_a_time", lambda _: 3)
    monkeypatch.setattr(
        Sampler, "denoised", lambda self, model, starts: (seen.append(len(starts)), whole(self, model, starts))[1]
    )
    return seen


def test_several_batches_in_a_pass_are_what_each_is_alone(tiny):
    trial = tiny()
    sampler, model = sampler_of(trial), model_of(trial)
    starts = [sampler.start(number, count) for number, count in ((0, 16), (1, 16), (2, 5))]
    assert len({start.noise.shape[1] for start in starts}) > 1  # one is longer than another
    found = sampler.denoised(model, starts)
    for start, x in zip(starts, found, strict=True):
        alone, cond = sampler.batch(model, start.number, len(start.noise))
        assert torch.equal(cond["lengths"], start.cond["lengths"])
        assert x.shape == alone.shape
        within = torch.arange(x.shape[1]) < cond["lengths"][:, None]
        assert torch.allclose(x[within], alone[within], rtol=0, atol=1e-4 * float(alone[within].abs().max()))


def test_a_pass_takes_sketches_of_a_length_side_by_side(tiny):
    trial, given_lengths = tiny(), []
    sampler, model = sampler_of(trial), model_of(trial)
    model.register_forward_pre_hook(lambda *a: given_lengths.append(a[2]["lengths"].tolist()), with_kwargs=True)
    sampler.denoised(model, [sampler.start(number, 16) for number in (0, 1)])
    assert len(given_lengths) == trial.evaluate.ddim_steps
    assert all(lengths == sorted(lengths, reverse=True) for lengths in given_lengths)


def test_an_evaluation_by_several_batches(tiny, together):
    trial = tiny({"evaluate.generated": 100, "evaluate.batch_size": 16})
    evaluator, model = setup.evaluator(trial), model_of(trial).eval()
    found = evaluator.sample_features(model, evaluator.sampler)
    assert together == [3, 3, 1]  # of seven batches
    features, images = found[:2]
    want = [evaluator.sampler.batch(model, number, min(16, 100 - 16 * number)) for number in range(7)]
    drawn = torch.cat([evaluator.sampler.source.to_images(*one) for one in want])
    # A point that rounding puts on the other side of a sixteenth of a pixel is drawn there.
    assert float((images != drawn[: len(images)]).float().mean()) < 0.01
    assert torch.allclose(features, evaluator.extractor(drawn), rtol=0, atol=0.01 * float(features.abs().max()))


def test_pictures_by_several_batches(tiny, together):
    trial = tiny({"evaluate.batch_size": 8})
    sampler, model = sampler_of(trial), model_of(trial)
    batches = list(sampler.images(model, 30))
    assert together == [3, 1]
    assert [len(batch) for batch in batches] == [8, 8, 8, 6]


def test_how_many_fill_a_gpu(tiny, pictures):
    options = {"model.options": {"hidden": 96, "layers": 3}, "evaluate.batch_size": 256}
    sampler = sampler_of(tiny(options), CUDA)
    points = sampler.start(0, 256).noise.shape[1]
    assert sampler.at_a_time() == min(4096, 5 * 2**28 // (points * 3840)) // 256 > 4
    assert sampler_of(tiny(options), CPU).at_a_time() == 1
    assert sampler_of(tiny(options, {"evaluate.eta": 0.5}), CUDA).at_a_time() == 1
    assert sampler_of(tiny(options, {"evaluate.batch_size": 5000}), CUDA).at_a_time() == 1
    assert sampler_of(pictures(), CUDA).at_a_time() == 1
    assert chirodiff.sampled_together(chirodiff.Config(), (256, 165, 3)) == 2118


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 9))
def test_every_batch_is_in_one_pass_of_one_rank(batches, at_a_time, ranks):
    each = [evaluate.passes(batches, at_a_time, rank, ranks) for rank in range(ranks)]
    assert len({len(one) for one in each}) == 1  # all meet in every pass
    numbers = list(itertools.chain.from_iterable(itertools.chain.from_iterable(zip(*each, strict=True))))
    assert numbers == list(range(batches))
    most = max(len(one) for of_rank in each for one in of_rank)
    assert most <= at_a_time
    assert len(each[0]) == -(-batches // (at_a_time * ranks))


@pytest.mark.gpu
def test_a_gpu_draws_the_same_by_many(tiny):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    trial = tiny({"model.options": {"hidden": 48, "layers": 2}, "evaluate.batch_size": 64})
    sampler, model = sampler_of(trial, CUDA), model_of(trial).cuda()
    starts = [sampler.start(number, 64) for number in range(sampler.at_a_time())]
    assert len(starts) > 8
    for start, x in zip(starts, sampler.denoised(model, starts), strict=True):
        alone, cond = sampler.batch(model, start.number, 64)
        within = (torch.arange(x.shape[1]) < cond["lengths"][:, None]).cuda()
        assert torch.allclose(x[within], alone[within], rtol=0, atol=1e-2 * float(alone[within].abs().max()))
