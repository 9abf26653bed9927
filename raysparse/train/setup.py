"""From a TrialConfig to a Trainer: the only place where data, model, sparsity, diffusion and metrics meet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raysparse import plugins
from raysparse.config import TrialConfig
from raysparse.data import prepared
from raysparse.data.sketch import Examples
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError
from raysparse.metrics import flops
from raysparse.metrics.extractors._base import Extractor, extract
from raysparse.metrics.protocol import Protocol
from raysparse.metrics.reference import Reference, reference
from raysparse.results import Facts
from raysparse.sparse.engine import SparseEngine
from raysparse.train import checks, memory, runtime, teacher
from raysparse.train.checks import model_options
from raysparse.train.costs import Costs, costs, update_end_step
from raysparse.train.evaluate import Evaluator
from raysparse.train.first_stage import FirstStage
from raysparse.train.loop import Trainer
from raysparse.train.versions import versions

Progress = Callable[[int, int], None]  # (done, total)
Run = prepared.Run


def check(config: TrialConfig) -> None:
    """What can be said of a trial before anything starts. UsageError for what would end it later."""
    check_evaluation(config)
    teacher.load(config)


def check_evaluation(config: TrialConfig) -> None:
    """As `check`, of a model that is trained: the teacher that it learned from may be gone."""
    checks.check_settings(config)
    _extractor(config, "cpu")


def prepare_data(config: TrialConfig, progress: Progress | None = None, run: Run = prepared.in_order) -> Path:
    """The prepared data set of a trial, made now unless it is there, with the reference statistics of its extractor.

    Call it in the driver: trials that start together then only read. run: how the shards of pictures are worked off.
    UsageError as `prepared.prepare`, and where the set is not what the trial asks for.
    """
    folder = _folder(config, progress, run)
    training = _training(config, folder)
    checks.check_data(config, training)
    _reference(config, folder, _extractor(config, "cpu"))
    return folder


def build(config: TrialConfig, *, device: str = "cpu", rank: int = 0, world_size: int = 1) -> Trainer:
    """One rank's Trainer at step 0. With world_size > 1 the process group must be there already.

    Sets the number of CPU threads of this process (train.threads): sums depend on it, and so does a resume bit for bit.
    """
    if config.train.cuda_graph and world_size > 1:
        raise UsageError(f"train.cuda_graph is for one worker, the trial has {world_size}; leave it out")
    torch.set_num_threads(config.train.threads)
    place = torch.device(device)
    memory.forget_peak(place)
    folder = _folder(config)
    training = _training(config, folder)
    model = plugins.load("models", config.model.name).build(model_options(config), seed=config.seed).to(place)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    taught = teacher.load(config)
    if taught is not None and config.sparse.setting("start") == "teacher":
        model.load_state_dict(taught.state_dict())
    optimizer = _optimizer(config, model)
    engine = _engine(config, model, optimizer)
    runtime.check_trial(model, engine, config)
    return Trainer(
        config,
        model=model,
        optimizer=optimizer,
        engine=engine,
        examples=training,
        origin=_origin(config, training),
        noise_schedule=NoiseSchedule(**config.diffusion.model_dump()),
        evaluator=evaluator(config, device=device, rank=rank, world_size=world_size),
        costs=costs(config, model_options(config), _mean_points(training)),
        teacher=teacher.of(config, taught, place),
        device=place,
        rank=rank,
        world_size=world_size,
    )


def evaluator(config: TrialConfig, *, device: str = "cpu", rank: int = 0, world_size: int = 1) -> Evaluator:
    """One rank's Evaluator of a trial's models; the data must be prepared."""
    folder = _folder(config)
    extractor = _extractor(config, device)
    decode = FirstStage.of(config.first_stage, device).decode if config.first_stage else None
    return Evaluator(
        config,
        training=_with_decoder(_training(config, folder), decode),
        validation=prepared.open_split(folder, "validation"),
        extractor=extractor,
        reference=_reference(config, folder, extractor),
        image_shape=tuple(prepared.open_split(folder, "reference").images([0]).shape[1:]),
        noise_schedule=NoiseSchedule(**config.diffusion.model_dump()),
        protocol=_protocol(config, folder, extractor),
        device=torch.device(device),
        rank=rank,
        world_size=world_size,
    )


def facts(config: TrialConfig, *, sweep: str, stage: str, world_size: int, command: str) -> Facts:
    """What a trial's records say besides its reports. Prepares the data unless that is done; needs no device."""
    folder = _folder(config)
    cost = costs(config, model_options(config), _mean_points(_training(config, folder)))
    sparse, true, steps = config.sparse, flops.TRUE, config.train.steps
    extractor, cheaper = _extractor(config, "cpu"), config.intermediate
    # Its KID is not measured.
    intermediate = cheaper and dataclasses.replace(
        _protocol(cheaper, folder, extractor), kid_subsets=None, kid_subset_size=None
    )
    return Facts(
        sweep=sweep,
        trial_id=config.trial_id,
        stage=stage,
        method=sparse.method,
        seed=config.seed,
        model=config.model.name,
        dataset=config.data.name,
        allocation=sparse.allocation,
        sparsity=sparse.sparsity or 0.0,
        prune_ratio=sparse.prune_ratio,
        update_interval_steps=sparse.update_interval,
        total_steps=steps,
        batch_size=config.train.batch_size,
        world_size=world_size,
        params_total=cost.params_total,
        params_active=cost.params_active,
        flops_inference_paper=cost.inference(cost.paper),
        flops_inference_true=cost.inference(true),
        flops_train_paper=cost.train(cost.paper, steps),
        flops_train_true=cost.train(true, steps),
        flops_inference_dense_paper=cost.inference(cost.paper, dense=True),
        flops_inference_dense_true=cost.inference(true, dense=True),
        flops_train_dense_paper=cost.train(cost.paper, steps, dense=True),
        flops_train_dense_true=cost.train(true, steps, dense=True),
        protocol=_protocol(config, folder, extractor).json(),
        config=config.dump_json(),
        versions=json.dumps(versions(), sort_keys=True),
        command=command,
        intermediate_protocol=intermediate.json() if intermediate else None,
        defaults=json.dumps({f"sparse.{name}": value for name, value in sparse.left_out().items()}, sort_keys=True),
    )


def protocol(config: TrialConfig) -> Protocol:
    """What the FIDs of a trial are; the data must be prepared."""
    return _protocol(config, _folder(config), _extractor(config, "cpu"))


def estimate(config: TrialConfig, mean_points: float | None = None) -> Costs:
    """Parameters and FLOPs of a trial, without its data where that would have to be downloaded first.

    mean_points: of a training sketch; None: of the data where it is at hand, else what the data set's SPEC says.
    UsageError where the trial's masks do not go together with its model or timesteps.
    """
    checks.check_ranges(config)
    if mean_points is None:
        spec = plugins.load("datasets", config.data.name).SPEC
        known = getattr(spec, "mean_points", None)  # None: the data is embedded
        if len(checks.value_shape(config)) == 3:
            mean_points = 1.0  # an image costs what it costs
        elif known is not None and config.data.source is None:
            spacing = prepared.check_options(config.data.name, config.data.options).model_dump().get("spacing", 0.05)
            mean_points = known * 0.05 / spacing  # measured on KanjiVG: 88.6 at .05, 44.2 at .1
        else:
            mean_points = _mean_points(_training(config, _folder(config)))
    return costs(config, model_options(config), mean_points)


def training(config: TrialConfig) -> Any:
    """The training examples of a trial; the data must be prepared."""
    return _training(config, _folder(config))


def first_stage(config: TrialConfig) -> FirstStage | None:
    """What encodes the trial's pictures, on the CPU; None: they are trained on as pixels."""
    return FirstStage.of(config.first_stage) if config.first_stage else None


_known_folders: dict[str, Path] = {}  # a trial asks several times, and listing ImageNet's files takes seconds


def _folder(config: TrialConfig, progress: Progress | None = None, run: Run = prepared.in_order) -> Path:
    data, encoder = config.data, first_stage(config)
    root = Path(data.root) if data.root else prepared.default_root()
    key = f"{data.model_dump_json(exclude={'train_examples'})} {root} {encoder and encoder.identity}"
    known = _known_folders.get(key)
    if known is None or not (known / "manifest.json").is_file():
        source = Path(data.source) if data.source else None
        known = prepared.prepare(
            data.name, data.options, source=source, root=root, progress=progress, encoder=encoder, run=run
        )
        _known_folders[key] = known
    return known


def _training(config: TrialConfig, folder: Path) -> Any:
    """The training examples. UsageError where there are fewer than asked for."""
    examples, count = prepared.open_split(folder, "train"), config.data.train_examples
    if count is None:
        return examples
    if count > len(examples):
        raise UsageError(
            f"data.train_examples is {count}, but the data set has only {len(examples)}; lower it or leave it out"
        )
    return examples.first(count)


def _origin(config: TrialConfig, training: Any) -> dict[str, str | None]:
    """What was trained on, wherever it lies: hashes of the sketches or pictures, and of what encoded them. Not of the
    latents, which another machine rounds otherwise."""
    stage = first_stage(config)
    return {"examples": training.images_hash, "first_stage": stage and stage.identity}


def _with_decoder(examples: Any, decode: Callable[[torch.Tensor], torch.Tensor] | None) -> Any:
    return dataclasses.replace(examples, decode=decode) if decode else examples


def _mean_points(training: Any) -> float:
    """Of a training sketch; 1 for images, whose cost does not depend on it."""
    return float(training.lengths.mean()) if isinstance(training, Examples) else 1.0


def _optimizer(config: TrialConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    chosen = config.optimizer
    if chosen.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), chosen.lr, momentum=chosen.betas[0], weight_decay=chosen.weight_decay
        )
    return torch.optim.AdamW(
        model.parameters(), chosen.lr, betas=chosen.betas, weight_decay=chosen.weight_decay, fused=True
    )


def _engine(config: TrialConfig, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> SparseEngine:
    settings = config.sparse.settings().model_dump()
    if settings.pop("update_end_fraction", None) is not None:
        settings["update_end_step"] = update_end_step(config)
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    return SparseEngine(
        model, optimizer, method=config.sparse.method, **settings, seed=config.seed, process_group=group
    )


def _extractor(config: TrialConfig, device: str) -> Extractor:
    weights = Path(config.evaluate.weights) if config.evaluate.weights else None
    found: Extractor = plugins.load("extractors", config.evaluate.extractor).build(weights, device)
    return found


def _reference(config: TrialConfig, folder: Path, extractor: Extractor) -> Reference:
    """Features and statistics of the reference images, kept beside the prepared data."""
    examples = prepared.open_split(folder, "reference")
    count, size = _reference_count(config, examples), config.evaluate.batch_size

    def features() -> torch.Tensor:
        starts = range(0, count, size)
        return extract(extractor, (examples.images(torch.arange(s, min(s + size, count))) for s in starts))

    # Beside the folder, not in it: what is prepared is never changed.
    cache = folder.parent / "reference"
    return reference(cache, extractor, content_hash=examples.images_hash, count=count, features=features)


def _reference_count(config: TrialConfig, examples: Any) -> int:
    count = config.evaluate.references
    if count is not None and count > len(examples):
        raise UsageError(
            f"evaluate.references is {count}, but the data set has only {len(examples)} reference examples; lower it "
            "or leave it out"
        )
    return len(examples) if count is None else count


def _protocol(config: TrialConfig, folder: Path, extractor: Extractor) -> Protocol:
    """What the trial's FIDs are: trials with equal text compare."""
    settings, examples = config.evaluate, prepared.open_split(folder, "reference")
    count = _reference_count(config, examples)
    return Protocol(
        extractor=extractor.name,
        weights_hash=extractor.weights_hash,
        layer=extractor.layer,
        generated=settings.generated,
        reference_examples=count,
        reference_hash=examples.images_hash,
        resize=extractor.resize,
        ddim_steps=settings.ddim_steps,
        eta=settings.eta,
        timestep_spacing=settings.timestep_spacing,
        guidance=settings.guidance,
        ema=True,
        kid_subsets=settings.kid_subsets,
        kid_subset_size=min(settings.kid_subset_size, settings.generated, count),
    )
