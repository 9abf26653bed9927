"""TrialConfig: everything that decides what one trial computes. Imports no torch.

Defaults are ChiroDiff's on KanjiVG (PAPER: the sparse paper's section 4.1; Ge et al. 2020 for evaluation).
Options of a data set or a model are declared in that plugin's own file and checked there.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from raysparse import plugins
from raysparse.errors import UsageError, unknown, usage_error_from
from raysparse.section import Section
from raysparse.sparse import settings
from raysparse.sparse.settings import LARGEST

# Where things lie on one machine, and how fast it is: never part of what a trial is.
PATHS = (("data", "source"), ("data", "root"), ("evaluate", "weights"))
PLACES = (*PATHS, ("evaluate", "runtime"), ("train", "threads"), ("train", "runtime"), ("train", "cuda_graph"))
LEFT_OUT = "left out"  # a teacher's path in the settings of an exported model: another machine has no such folder
# Settings that came later, and what was done before: there, the ids of known trials stay what they were.
LATER = (
    ("evaluate", "intermediate", None),
    ("evaluate", "validation_examples", 1_024),
    ("evaluate", "precision", None),
)

# The settings of the first version. They are in every trial's content, null where the method has none; a later setting
# is there where it differs from its default. So the ids of known trials stay what they were.
FIRST_SETTINGS = (
    "sparsity",
    "allocation",
    "prune_ratio",
    "update_interval",
    "prune_schedule",
    "update_end_fraction",
)


def method_settings(method: str) -> frozenset[str]:
    """The names of the settings that a method has. ValueError (for pydantic) where the method is unknown."""
    try:
        return frozenset(settings.of_method(method).model_fields)
    except UsageError as error:
        raise ValueError(str(error)) from error


def all_settings() -> frozenset[str]:
    """The names of all settings that any method has."""
    return _all_settings(tuple(plugins.names("methods")))


@functools.cache  # every trial asks twice
def _all_settings(methods: tuple[str, ...]) -> frozenset[str]:
    return frozenset().union(*(method_settings(name) for name in methods))


class DataConfig(Section):
    name: str = "hershey"  # a file in raysparse/data/datasets/
    source: str | None = None  # raw file or folder; None: embedded, or downloaded by `raysparse prepare`
    root: str | None = None  # where prepared arrays lie; None: $RAYSPARSE_DATA or the user's cache folder
    train_examples: int | None = Field(None, ge=1)  # use only the first so many training examples
    options: dict[str, Any] = Field(default_factory=dict)  # of the data set; see its file


class ModelConfig(Section):
    name: str = "chirodiff"  # a file in raysparse/models/
    options: dict[str, Any] = Field(default_factory=dict)  # of the model; see its file


class FirstStageConfig(Section):
    """What turns pictures into latents and back, frozen and dense (PAPER: Latent Diffusion's VQ-f4)."""

    name: str = "autoencoder"  # a file in raysparse/models/ whose KIND is "first_stage"
    # A diffusers folder, a Hub id, or a CompVis model.ckpt; None: random weights, which serve tests only.
    weights: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")  # its identity; other weights are refused
    options: dict[str, Any] = Field(default_factory=dict)  # of its Config; see its file


class SparseConfig(Section):
    """The method and its settings, which the method's file declares (raysparse/sparse/settings.py).

    What the method does not have is None, and an error if given. Settings beside those below are read with `setting`.
    """

    model_config = ConfigDict(extra="allow")

    method: str = "dense"  # a file in raysparse/sparse/methods/
    sparsity: float | None = None  # S, share of maskable weights at zero, [0, 1)
    allocation: str | None = None  # densities per layer; erk: ER for linear, ERK for conv
    prune_ratio: float | None = None  # p, share of active weights replaced per topology update, (0, 1]
    update_interval: int | None = None  # ΔTe, optimizer steps (800 ChiroDiff, 1100 Latent Diffusion)
    prune_schedule: str | None = None  # of p over training
    update_end_fraction: float | None = None  # no topology update after this share of the steps

    @model_validator(mode="before")
    @classmethod
    def _only_what_the_method_has(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        method = data.get("method", "dense")
        if not isinstance(method, str):
            raise ValueError(f"method must be a name, got {method!r}")
        has, known = method_settings(method), all_settings()
        given = {name: value for name, value in data.items() if name != "method" and value is not None}
        for name, value in given.items():
            if name not in known:
                raise ValueError(unknown("key", name, known | {"method"}))
            if name not in has:
                those = ", ".join(sorted(has)) or "no settings"
                raise ValueError(f"method {method!r} has no {name!r} (got {value!r}); it has {those}")
        kind = settings.of_method(method)
        try:
            checked = kind(**given).relevant()
        except ValidationError as error:
            raise ValueError(str(usage_error_from(error, "", kind)).replace("\n: ", "; ").removeprefix(": ")) from None
        fields = checked.model_dump(mode="json")
        later = {name for name in fields if name not in FIRST_SETTINGS}
        usual = {name for name in later if getattr(checked, name) == kind.model_fields[name].default}
        return {"method": method} | {name: value for name, value in fields.items() if name not in usual}

    def setting(self, name: str) -> Any:
        """A setting's value, its default where none was given; None where the method does not have it."""
        return getattr(self.settings(), name, None)

    def left_out(self) -> dict[str, Any]:
        """The settings with an effect that are not in here, for they have their default."""
        chosen = self.settings()
        absent = chosen.model_dump(mode="json", exclude={*FIRST_SETTINGS, *(self.model_extra or {}), *chosen.unused()})
        return {name: value for name, value in absent.items() if value is not None}

    def settings(self) -> settings.Dense:
        """All settings of the method, as its file declares them."""
        given = self.model_dump(exclude={"method"}, exclude_none=True)
        return settings.of_method(self.method)(**given)


class DiffusionConfig(Section):
    timesteps: int = Field(1000, ge=1, le=10**6)  # T
    beta_schedule: Literal["linear", "scaled_linear"] = (
        "linear"  # scaled_linear: linear in sqrt(beta), as Latent Diffusion
    )
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(2e-2, gt=0, lt=1)


MOST_THREADS = 1024  # PyTorch takes any number and crashes where the system gives no more
MOST_SAMPLES = 10**7  # drawn at once
MOST_TOGETHER = 10**6  # examples in a batch: far above what anybody trains with, and what memory holds
LARGEST_SWEEP = 10**5  # trials: ten times what `raysparse plan` simulates
Recorded = Annotated[int, Field(le=LARGEST)]  # or writing a trial's record fails
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # adamw; sgd takes the first as its momentum
    clip_norm: float | None = Field(0.1, gt=0)  # global gradient norm; None: no clipping
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)  # linear, from 0


class TrainConfig(Section):
    steps: Recorded = Field(40_800, ge=1)  # optimizer steps; KanjiVG: 600 epochs of 68 (what Table 2's FLOPs imply)
    # Examples per optimizer step, over all workers and accumulation steps
    batch_size: int = Field(128, ge=1, le=MOST_TOGETHER)
    accumulate: int = Field(1, ge=1)  # backward passes per optimizer step
    ema_decay: float = Field(0.9999, ge=0, lt=1)  # warmed up as min(decay, (1 + n) / (10 + n))
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights stay fp32
    channels_last: bool = False  # memory format of image models; faster convolutions on GPUs, other rounding
    compile: bool = False  # torch.compile the network (see a model's NOT_COMPILED); masks stay outside the graph
    # Record the network's forward and backward once and replay them, on CUDA (elsewhere nothing changes), one worker:
    # for models so small that starting their kernels takes longer than running them. With `compile` it is the compiled
    # network that is recorded, and a sparse one's beside it; without, the network of `runtime: dense` alone
    cuda_graph: bool = False
    label_dropout: float = Field(0.0, ge=0, lt=1)  # share of labels replaced by the null class; .1 for guidance
    threads: int = Field(1, ge=1, le=MOST_THREADS)  # CPU threads of a worker
    # What trains: PyTorch, or kernels that leave zero weights out, forward and backward (equal to rounding); auto:
    # those where they can run and are faster
    runtime: Literal["dense", "sparse", "auto"] = "dense"

    @model_validator(mode="after")
    def _whole_parts(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self

    @model_validator(mode="after")
    def _one_recording(self) -> Self:
        if self.cuda_graph and self.accumulate > 1:  # each backward pass writes its gradients to the same place
            raise ValueError(f"cuda_graph is true, but accumulate is {self.accumulate}; leave one of the two out")
        return self

    def share(self, workers: int) -> int:
        """Examples of one worker in one backward pass. UsageError where the batch does not divide."""
        if self.batch_size % (workers * self.accumulate):
            raise UsageError(
                f"train.batch_size {self.batch_size} cannot be shared by {workers} workers x {self.accumulate} "
                f"accumulation steps; make it a multiple of {workers * self.accumulate}"
            )
        return self.batch_size // (workers * self.accumulate)


class IntermediateConfig(Section):
    """The cheaper protocol of the evaluations before the last step."""

    generated: int = Field(1_000, ge=2, le=MOST_SAMPLES)  # samples per FID
    ddim_steps: int = Field(20, ge=1)


class EvaluateConfig(Section):
    every_steps: int = Field(2_040, ge=1)  # a Report and a checkpoint at each multiple, and at the last step
    extractor: str = "glyph_cnn"  # a file in raysparse/metrics/extractors/
    weights: str | None = None  # file of an extractor that needs one
    generated: int = Field(10_000, ge=2, le=MOST_SAMPLES)  # samples per FID
    references: int | None = Field(None, ge=2)  # use only the first so many reference examples
    ddim_steps: int = Field(50, ge=1)
    eta: float = Field(0.0, ge=0, le=1)
    # leading: ChiroDiff; original: Latent Diffusion's own, where 150 asked for are 167 done (PAPER: Latent Diffusion)
    timestep_spacing: Literal["leading", "trailing", "original"] = "leading"
    guidance: float | None = Field(None, ge=0)  # classifier-free guidance scale; None: the conditional model alone
    # Samples drawn and extracted at a time; a GPU denoises several such at once
    batch_size: int = Field(256, ge=1, le=MOST_TOGETHER)
    # What evaluates: PyTorch, or kernels that skip zero weights (equal to rounding); auto: those where they can run
    runtime: Literal["dense", "sparse", "auto"] = "dense"
    # In what sampling and the validation loss are computed; None: train.precision. bf16 changes a FID by less than the
    # sampling noise does (docs/measured.md)
    precision: Literal["fp32", "bf16"] | None = None
    validation_examples: int = Field(1_024, ge=1)  # at most so many: the first ones of the split
    kid_subsets: int = Field(100, ge=1, le=10**6)
    kid_subset_size: int = Field(1000, ge=2)
    grid: int = Field(16, ge=0, le=10**4)  # samples kept as a picture in each record
    # By which trials are compared while they train (ASHA, curves): a FID of its own, measured at the last step too,
    # never compared with the trial's FID, which is measured there alone. None: each evaluation is a full one
    intermediate: IntermediateConfig | None = None

    @model_validator(mode="after")
    def _cheaper(self) -> Self:
        for name in ("generated", "ddim_steps") if self.intermediate else ():
            mine, own = getattr(self.intermediate, name), getattr(self, name)
            if mine > own:
                raise ValueError(
                    f"intermediate.{name} {mine} is above {name} {own}; the intermediate FID is the cheap one"
                )
        return self


class TrialConfig(Section):
    seed: Recorded = Field(0, ge=0)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    first_stage: FirstStageConfig | None = None  # None: images are trained on as pixels, sketches as points
    sparse: SparseConfig = Field(default_factory=SparseConfig)  # not at import: it loads the method's file
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def trial_id(self) -> str:
        """`method-` and ten hex digits of what the trial computes, seed included; paths and threads are left out."""
        digest = hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()
        return f"{self.sparse.method}-{digest[:10]}"

    def content(self) -> dict[str, Any]:
        """What is computed, as plain data: all settings but the places."""
        content = self.model_dump(mode="json")
        if self.first_stage is not None and self.first_stage.sha256 is not None:
            del content["first_stage"]["weights"]  # then the hash says which they are
        for section, name in PLACES:
            del content[section][name]
        return as_before(content, LATER)

    @property
    def sampling_precision(self) -> str:
        """fp32 or bf16."""
        return self.evaluate.precision or self.train.precision

    @property
    def intermediate(self) -> TrialConfig | None:
        """The trial as its evaluations before the last step see it; None: as they all do."""
        cheaper = self.evaluate.intermediate
        if cheaper is None:
            return None
        evaluate = self.evaluate.model_copy(update={**cheaper.model_dump(), "intermediate": None})
        return self.model_copy(update={"evaluate": evaluate})

    def dump_json(self) -> str:
        """Canonical JSON; `parse(json.loads(text))` gives the same trial back."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


def as_before(content: dict[str, Any], later: Collection[tuple[str, str, Any]]) -> dict[str, Any]:
    """Settings without those of `later` (section, name, default) that have their default, as if they were unknown."""
    return {
        section: {name: value for name, value in part.items() if (section, name, value) not in later}
        if isinstance(part, dict)
        else part
        for section, part in content.items()
    }


def parse(data: Mapping[str, Any], where: str = "trial") -> TrialConfig:
    """A checked trial. UsageError with a line per complaint."""
    try:
        return TrialConfig.model_validate(data)
    except ValidationError as error:
        raise usage_error_from(error, where, TrialConfig) from None


def with_value(data: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with the value at a dotted path replaced, e.g. `with_value(d, "optimizer.lr", 4e-3)`."""
    head, _, rest = path.partition(".")
    if rest and not isinstance(data.get(head) or {}, Mapping):
        raise UsageError(f"{path}: {head!r} is a value, not a section")
    return {**data, head: with_value(data.get(head) or {}, rest, value) if rest else value}


def field_at(path: str) -> Any:
    """The field at a dotted path of TrialConfig, None for what plugins declare. UsageError for an unknown one."""
    section: Any = TrialConfig
    names = path.split(".")
    if names[0] == "sparse" and len(names) == 2 and names[1] in all_settings():
        return None
    for position, name in enumerate(names):
        if name not in section.model_fields:
            raise UsageError(unknown("key", name, section.model_fields) + f" (in {path!r})")
        field = section.model_fields[name]
        if name == "options" and position + 1 < len(names):
            return None
        if position + 1 < len(names):
            if not hasattr(field.annotation, "model_fields"):
                raise UsageError(f"{path}: {name!r} is a value, not a section")
            section = field.annotation
    return field
