"""What benchmarks/fid.py measures: a trial of ChiroDiff, its data, its training step and its evaluator, without Ray."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from raysparse import config, rng
from raysparse.config import TrialConfig
from raysparse.data.loader import batch_indices
from raysparse.data.sketch import Examples
from raysparse.diffusion.losses import eps_mse
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.metrics import fidelity
from raysparse.metrics.extractors import glyph_cnn
from raysparse.metrics.extractors._base import extract
from raysparse.metrics.protocol import Protocol
from raysparse.metrics.reference import Reference
from raysparse.models import chirodiff
from raysparse.sparse import SparseEngine
from raysparse.train.conditions import on_device, placed
from raysparse.train.evaluate import Evaluator
from raysparse.train.runtime import autocast

SKETCHES = {"train": 8000, "validation": 1024, "reference": 10_358}  # doodles; the reference is as large as KanjiVG's


@dataclasses.dataclass(frozen=True)
class Data:
    training: Examples
    validation: Examples
    reference: Reference
    extractor: Any


def doodles(split: str, count: int) -> Examples:
    """Made-up sketches; at spacing .03 they are as long as KanjiVG's at .05 (88 points)."""
    from raysparse.data.preprocess import Strokes, normalise
    from raysparse.data.synthetic import doodles as drawn

    seed = list(SKETCHES).index(split)
    made = normalise(Strokes.of(drawn(count, seed)), spacing=0.03)
    offsets = np.concatenate([[0], np.cumsum(made.lengths)])
    return Examples(made.points, offsets, None, 0, "abs", f"doodles-{seed}-{count}")


def data(options: argparse.Namespace) -> Data:
    if options.kanjivg:
        from raysparse.data import prepared

        with tempfile.TemporaryDirectory() as root:
            folder = prepared.prepare("kanjivg", {}, options.kanjivg, root)
            found = {split: prepared.open_split(folder, split) for split in SKETCHES}
            found = {  # out of the folder, which goes
                split: dataclasses.replace(e, points=np.array(e.points), offsets=np.array(e.offsets))
                for split, e in found.items()
            }
    else:
        counts = dict.fromkeys(SKETCHES, options.sketches) if options.sketches else SKETCHES
        found = {split: doodles(split, count) for split, count in counts.items()}
    extractor = glyph_cnn.build(device=options.device)
    real = found["reference"]
    starts = range(0, len(real), options.batch)
    images = (real.images(np.arange(start, min(start + options.batch, len(real)))) for start in starts)
    features = extract(extractor, images).numpy()
    return Data(found["train"], found["validation"], Reference(features, with_root(features)), extractor)


def with_root(features: np.ndarray[Any, Any]) -> fidelity.Statistics:
    """Statistics whose root is made, by numpy where there is no scipy."""
    found = fidelity.statistics(features)
    try:
        found.root  # noqa: B018 - made now, and kept
    except ModuleNotFoundError:
        values, vectors = np.linalg.eigh(found.covariance)
        root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
        found = fidelity.Statistics(found.mean, found.count, root=root)
    return found


def trial(options: argparse.Namespace, **changes: Any) -> TrialConfig:
    """The paper's trial on KanjiVG, at the size that is asked for. changes: section -> values."""
    content: dict[str, dict[str, Any]] = {
        "model": {"options": {"hidden": options.hidden, "layers": options.layers}},
        "train": {"threads": options.threads, "batch_size": options.batch_size},
        "evaluate": {"batch_size": options.batch, "kid_subsets": options.kid_subsets},
    }
    for name, values in changes.items():
        content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
    return config.parse(content)


def evaluator(of: TrialConfig, known: Data, device: str) -> Evaluator:
    settings, count = of.evaluate, len(known.reference.features)
    protocol = Protocol(
        extractor=known.extractor.name,
        weights_hash=known.extractor.weights_hash,
        layer=known.extractor.layer,
        generated=settings.generated,
        reference_examples=count,
        reference_hash="benchmark",
        resize=known.extractor.resize,
        ddim_steps=settings.ddim_steps,
        eta=settings.eta,
        ema=True,
        kid_subsets=settings.kid_subsets,
        kid_subset_size=min(settings.kid_subset_size, settings.generated, count),
    )
    return Evaluator(
        of,
        training=known.training,
        validation=known.validation,
        extractor=known.extractor,
        reference=known.reference,
        image_shape=(1, 64, 64),
        noise_schedule=NoiseSchedule(),
        protocol=protocol,
        device=torch.device(device),
    )


class Runner:
    """A model under masks, and its training step as a trial does it, the running mean of the weights included."""

    def __init__(self, of: TrialConfig, known: Data, device: str) -> None:
        self.of, self.known, self.device, self.step = of, known, torch.device(device), 0
        self.model = chirodiff.build(chirodiff.Config(**of.model.options), seed=0).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
        settings = of.sparse.settings().model_dump()
        settings.pop("update_end_fraction", None)
        self.engine = SparseEngine(self.model, self.optimizer, method=of.sparse.method, **settings, seed=0)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)  # masked as the model now is
        self.network: Callable[..., Tensor] = self.model
        if of.train.runtime == "sparse":
            self.network = chirodiff.sparse_step(self.model, self.engine.masks)

    def train(self, steps: int) -> None:
        size, schedule, place = self.of.train.batch_size, NoiseSchedule(), self.device
        for _ in range(steps):
            batch = self.known.training.batch(batch_indices(len(self.known.training), size, 0, self.step))
            x, cond = on_device(batch["x"], place), placed(batch["cond"], place)
            draw = rng.generator(0, "fid benchmark", step=self.step, device=str(place))
            timesteps = torch.randint(schedule.timesteps, (size,), generator=draw, device=place)
            eps = torch.randn(x.shape, generator=draw, device=place)
            self.optimizer.zero_grad()
            with autocast(self.of.train.precision, place):
                prediction = self.network(schedule.add_noise(x, eps, timesteps), timesteps, **cond)
                loss = eps_mse(prediction, eps, cond["lengths"])
            loss.backward()  # type: ignore[no-untyped-call]
            self.engine.mask_gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()
            self.step += 1
            with torch.no_grad():
                pairs = (list(self.average.parameters()), list(self.model.parameters()))
                torch._foreach_lerp_(*pairs, 1 - min(0.9999, (1 + self.step) / (10 + self.step)))
            self.engine.after_step()
            self.engine.after_average(dict(self.average.named_parameters()))

    def step_s(self, clock: Callable[[], float]) -> float:
        """Of one step among many: after an evaluation two wait for memory (S = .9: 174 ms instead of 87). On a GPU the
        host starts a step while the one before runs, so there it is the mean of ten."""
        steps = 10 if self.device.type == "cuda" else 1
        self.train(2)
        self._wait()
        start = clock()
        self.train(steps)
        self._wait()
        return (clock() - start) / steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Bf16GRU(nn.Module):
    """What autocast makes of nn.GRU on a GPU: weights, inputs and states in bf16."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.gru = nn.GRU(gru.input_size, gru.hidden_size, gru.num_layers, bidirectional=True)
        self.gru.load_state_dict(gru.state_dict())
        self.gru.bfloat16().requires_grad_(False)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        with torch.autocast("cpu", enabled=False):
            found, _ = self.gru(packed._replace(data=packed.data.bfloat16()))
        return found._replace(data=found.data.float())
