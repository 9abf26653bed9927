"""ChiroDiff: a bidirectional GRU that predicts the noise of a sketch, point by point (Das et al., ICLR 2023).

A point's 13 inputs: 5 of its noisy numbers, by the option `inputs`, and 8 features of the timestep t: [sin, cos](2 pi 4
W u) with 4 frequencies W ~ N(0, 1) drawn once and frozen. Then the GRU, Linear(2 h, h), and Linear(h + 8, 3) on that
and the time features; no activation between.

    abs     x, y, pen, and the velocity: the difference to the point before, of the first one to the point at 0 that is
            left out. For sketches of `representation: abs`
    del     x, y, which are differences, pen, and the position: their sum up to the point. For sketches of
            `representation: del`
    plain   x, y, pen, and the difference to the point before, 0 at the first, of sketches of either representation: as
            it was before there was this option, and as what was trained then needs it

With abs and del, u = (t + 1) / T, and a class's embedding goes into the last layer too: so it is in the authors' code
(dasayan05/chirodiff, main.py and models/score.py), whose network computes the same of the same weights, but for the
order of the inputs with del. With plain, u = t / T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from raysparse import rng
from raysparse.errors import UsageError
from raysparse.models._packed_gru import PackedGRU
from raysparse.section import Section

if TYPE_CHECKING:
    from raysparse.models._sparse_training import SparseStep

KIND = "denoiser"
PAPER_CONVENTION = "chirodiff"  # of raysparse.metrics.flops
SMALL: dict[str, Any] = {"hidden": 8, "layers": 2}  # a Config for tests of what every model must do
NOT_COMPILED = "runs its GRU through kernels of its own and looks at lengths on the host, where the compiler stops"

CHANNELS = 3  # x, y, pen
BY_POINT = 5  # inputs that differ from point to point; they come first
_MOST_TOGETHER = 4096  # sketches
_BYTES_TOGETHER = 5 * 2**28  # 1.25 GiB: 2,118 sketches at h = 96 and 165 points; an eighth of a 16 GiB GPU has 2
_FREQUENCIES = 4
_TIME_SCALE = 4.0


class Config(Section):
    """The defaults are the paper's for KanjiVG (416,859 parameters).

    QuickDraw: hidden 128, layers 3 (736,027); VMNIST: hidden 48, layers 2 (65,019).
    """

    hidden: int = Field(96, ge=1, le=4096)  # h, width of each direction
    layers: int = Field(3, ge=1, le=64)
    timesteps: int = Field(1000, ge=1, le=10**6)  # T of the noise schedule; scales t in the time features
    num_classes: int | None = Field(None, ge=1, le=10**6)  # of a class-conditional model; None: unconditional
    label_features: int = Field(16, ge=1, le=4096)  # width of a class's embedding, appended to every point's inputs
    inputs: Literal["plain", "abs", "del"] = "plain"  # see the head of this file


def build(config: Config, seed: int) -> ChiroDiff:
    """A model on the default device; its weights and frequencies are a function of (config, seed) alone."""
    with torch.device("meta"):  # the layers' own initialisation would draw from the global generator
        model = ChiroDiff(config)
    model = model.to_empty(device=torch.get_default_device())
    model.initialise(rng.generator(seed, "model"))
    return model


def example(config: Config, batch: int, points: int, device: str = "cpu") -> dict[str, Tensor]:
    """Keyword arguments of a forward pass over `batch` sketches of `points` points, all 0."""
    given = {
        "x": torch.zeros(batch, points, CHANNELS, device=device),
        "timesteps": torch.zeros(batch, dtype=torch.int64, device=device),
        "lengths": torch.full((batch,), points, dtype=torch.int64, device=device),
    }
    if config.num_classes is not None:
        given["labels"] = torch.zeros(batch, dtype=torch.int64, device=device)
    return given


def sampled_together(config: Config, shape: Sequence[int]) -> int:
    """How many sketches a GPU is best given at a time in sampling. shape: [B, L, 3] of some of them.

    A program of the GRU's kernels takes 16 sketches in one direction, a multiprocessor of an H200, which has 132 of
    them, one program of h = 96: 256 sketches leave three quarters of it idle. 32 times 128 took 4 times as long as 128.
    """
    by_sketch = shape[1] * 10 * config.hidden * 4  # bytes: a layer's states before and after, W_ih x between them
    return min(_MOST_TOGETHER, _BYTES_TOGETHER // by_sketch)


def sparse_runtime(model: nn.Module) -> nn.Module:
    """The same prediction by a compiled kernel that skips zero weights, for sampling on a CPU.

    UsageError: not a plain ChiroDiff of float32 on the CPU, or no compiler.
    """
    from raysparse.models._sparse_chirodiff import SparseChiroDiff

    return SparseChiroDiff(model)


def sparse_step(model: nn.Module, masks: Mapping[str, Tensor]) -> SparseStep:
    """The same prediction for training on a CPU: its gradient touches the active weights only. Errors as above."""
    from raysparse.models._sparse_training import SparseStep

    return SparseStep(model, masks)


class ChiroDiff(nn.Module):
    """forward(x float32 [B, L, 3], timesteps int64 [B], lengths int64 [B], labels int64 [B]) -> float32 [B, L, 3].

    The prediction is of eps, for x, y and pen. Points beyond a sketch's length are never read and come out as 0.
    """

    frequencies: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        time_features = 2 * _FREQUENCIES
        inputs, by_sketch = BY_POINT + time_features, time_features
        if config.num_classes is not None:
            self.labels = nn.Embedding(config.num_classes, config.label_features)
            inputs += config.label_features
            by_sketch += config.label_features if config.inputs != "plain" else 0
        self.register_buffer("frequencies", torch.zeros(_FREQUENCIES))
        self.gru = PackedGRU(inputs, config.hidden, config.layers)
        self.mix = nn.Linear(2 * config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden + by_sketch, CHANNELS)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Frequencies and class embeddings ~ N(0, 1); the rest uniform within 1/sqrt(fan in), as PyTorch's layers."""
        bounds = {self.gru: self.config.hidden, self.mix: self.mix.in_features, self.out: self.out.in_features}
        self.frequencies.copy_(torch.randn(_FREQUENCIES, generator=generator, device="cpu"))
        for module, fan_in in bounds.items():
            for parameter in module.parameters():
                draw = torch.rand(parameter.shape, generator=generator, device="cpu")
                parameter.copy_((2 * draw - 1) / math.sqrt(fan_in))
        if self.config.num_classes is not None:
            self.labels.weight.copy_(torch.randn(self.labels.weight.shape, generator=generator, device="cpu"))

    def forward(
        self, x: Tensor, timesteps: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """lengths: each in 1 .. L, best on the host; None: all L. labels: where, and only where, the model has classes.

        The prediction is float32 also under autocast. ValueError: a length out of range. UsageError: labels.
        """
        self._check_labels(labels)
        if isinstance(self.gru, PackedGRU) and self.gru.takes_padded(x):
            return self._padded(x, timesteps, lengths, labels)
        rows, batch_sizes = _packing(x, lengths)
        points = self.by_point(x).flatten(0, 1).index_select(0, rows)
        sketch = rows // x.shape[1]
        to_gru, to_out = (features.index_select(0, sketch) for features in self.by_sketch(timesteps, labels))
        hidden = self.gru(PackedSequence(torch.cat((points, to_gru), 1), batch_sizes)).data
        prediction = self.out(torch.cat((self.mix(hidden), to_out), 1)).float()
        return x.new_zeros(x.shape).flatten(0, 1).index_copy(0, rows, prediction).view(x.shape)

    def _padded(self, x: Tensor, timesteps: Tensor, lengths: Tensor | None, labels: Tensor | None) -> Tensor:
        """forward on CUDA: the same work whatever the lengths, and no waiting for the device."""
        batch, points, _ = x.shape
        if lengths is None:
            lengths = torch.full((batch,), points)
        elif lengths.device.type == "cpu":
            _check_lengths(x, lengths)
        lengths = lengths.to(x.device, torch.int32, non_blocking=True).clamp(max=points)
        inside = (torch.arange(points, device=x.device) < lengths[:, None])[..., None]
        to_gru, to_out = (features[:, None].expand(-1, points, -1) for features in self.by_sketch(timesteps, labels))
        inputs = torch.cat((self.by_point(torch.where(inside, x, 0.0)), to_gru), 2)
        hidden = self.gru.padded(inputs, lengths)
        prediction = self.out(torch.cat((self.mix(hidden), to_out), 2)).float()
        return torch.where(inside, prediction, 0.0)

    def by_point(self, x: Tensor) -> Tensor:
        """[B, L, 3] -> [B, L, 5]: what differs from point to point; beyond a sketch's length whatever comes out."""
        place = x[:, :, :2]
        if self.config.inputs == "del":
            return torch.cat((x, place.cumsum(1)), 2)
        first = torch.zeros_like(place[:, :1]) if self.config.inputs == "plain" else place[:, :1]
        return torch.cat((x, torch.cat((first, place[:, 1:] - place[:, :-1]), 1)), 2)

    def by_sketch(self, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Time and class, the same for all points of a sketch: float32 [B, n] for the GRU, for the last layer."""
        time = self._time_features(timesteps)
        if labels is None:
            return time, time
        both = torch.cat((time, self.labels(labels)), 1)
        return both, time if self.config.inputs == "plain" else both

    def _time_features(self, timesteps: Tensor) -> Tensor:
        """int64 [B] -> float32 [B, 8]."""
        first = 0 if self.config.inputs == "plain" else 1
        phase = ((timesteps + first)[:, None] / self.config.timesteps) * (2 * math.pi * _TIME_SCALE * self.frequencies)
        return torch.cat((phase.sin(), phase.cos()), 1)

    def _check_labels(self, labels: Tensor | None) -> None:
        classes = self.config.num_classes
        if labels is not None and classes is None:
            raise UsageError(
                "the model has no classes but was given labels; set its option num_classes, or use data without labels"
            )
        if labels is None and classes is not None:
            raise UsageError(f"the model has num_classes={classes} but was given no labels; use a data set with labels")
        if labels is not None and classes is not None and labels.device.type == "cpu" and int(labels.max()) >= classes:
            raise UsageError(f"labels must be in 0 .. {classes - 1}, got {int(labels.max())}; raise num_classes")


def _packing(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """How to pack x [B, L, ...]: rows int64 [points] of its first two dimensions, flattened, and batch_sizes (host).

    Time-major, longest sketch first. The host needs the lengths, to cut time into steps: on a GPU they would be waited
    for, so keep them on the host. Meta tensors have no values: there all sketches have all points.
    """
    batch, points, _ = x.shape
    with torch.device("cpu"):
        whole = lengths is None or lengths.is_meta
        host = torch.full((batch,), points) if whole else cast(Tensor, lengths).cpu()
        _check_lengths(x, host)
        host, order = host.sort(descending=True, stable=True)
        running = torch.arange(int(host[0]))[:, None] < host
        time, place = running.nonzero(as_tuple=True)
        rows = order[place] * points + time
    return rows.to(x.device, non_blocking=True), running.sum(1)


def _check_lengths(x: Tensor, lengths: Tensor) -> None:
    """lengths: on the host."""
    batch, points, _ = x.shape
    if lengths.shape != (batch,) or int(lengths.min()) < 1 or int(lengths.max()) > points:
        raise ValueError(f"lengths must be {batch} numbers in 1 .. {points}, got {lengths.tolist()}")
