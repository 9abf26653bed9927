"""Samples of a model on disk as images: what `raysparse sample` writes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysparse import files, plugins
from raysparse.config import TrialConfig
from raysparse.data import image
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError
from raysparse.train import checks, restored, setup
from raysparse.train.evaluate import grid_png
from raysparse.train.first_stage import FirstStage
from raysparse.train.reevaluate import changed
from raysparse.train.sampling import ImageSource, Sampler, Source

SHEET = 256  # samples on the sheet at most


def draw(
    checkpoint: Path,
    count: int,
    *,
    changes: Mapping[str, Any] | None = None,
    seed: int | None = None,
    labels: Sequence[int] | None = None,
    device: str = "cpu",
) -> Iterator[Tensor]:
    """`count` samples of a model's averaged weights: uint8 [B, C, H, W], batch by batch.

    changes: {dotted path: value} as in an evaluation, such as evaluate.ddim_steps. seed: of the noise, the trial's own
    where None. labels: of a class-conditional model, one or one for each sample; None: drawn. Pictures need no data
    set; sketches take their lengths from the trial's, which is prepared now unless it is there. No extractor is asked
    for, and no teacher. UsageError: a class out of range, a setting, a damaged file.
    """
    model = restored.load(checkpoint, device)
    trial = changed(model.config, changes or {})
    checks.check_sampling(trial)
    classes = getattr(checks.model_options(trial), "num_classes", None)
    _check_labels(labels, classes, trial.model.name)
    source = _source(trial, classes, device)
    if seed is not None:
        trial = trial.model_copy(update={"seed": seed})
    sampler = Sampler(trial, source, NoiseSchedule(**trial.diffusion.model_dump()), torch.device(device))
    yield from sampler.images(model.network, count, labels)


def write(images: Iterator[Tensor], folder: Path, on_done: Callable[[int], None] = lambda _: None) -> Path:
    """Write FOLDER/00000.png ... and FOLDER/sheet.png with the first SHEET of them; -> the sheet.

    A new folder is written beside its place and renamed, so it is whole or absent; an empty one stays, for it may be a
    link, a mount or where the user stands, and gets the sheet last. UsageError where it is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; give another folder")
    home = folder if folder.is_dir() else folder.parent
    files.check_writable(home)
    temporary = Path(tempfile.mkdtemp(dir=home, prefix=".drawing-"))
    try:
        kept: list[Tensor] = []
        done = 0
        for batch in images:
            for picture in batch:
                (temporary / f"{done:05d}.png").write_bytes(grid_png(picture[None]))
                done += 1
            kept.append(batch[: max(0, SHEET - sum(map(len, kept)))])
            on_done(done)
        (temporary / "sheet.png").write_bytes(grid_png(torch.cat(kept)))
        if home is folder:
            for path in sorted(temporary.iterdir()):
                path.replace(folder / path.name)
        else:
            temporary.chmod(0o755)  # mkdtemp makes 0700
            temporary.replace(folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; check permissions and free space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / "sheet.png"


def _source(trial: TrialConfig, classes: int | None, device: str) -> Source:
    if plugins.load("datasets", trial.data.name).SPEC.kind != "image":
        found: Source = setup.training(trial)
        checks.check_data(trial, found)
        return found
    shape = checks.value_shape(trial)
    decode: Callable[[Tensor], Tensor] = image.to_pixels
    if trial.first_stage is not None:
        decode = FirstStage.of(trial.first_stage, device).decode
    return ImageSource(shape, classes, decode)


def _check_labels(labels: Sequence[int] | None, classes: int | None, model: str) -> None:
    if labels is None:
        return
    if classes is None:
        raise UsageError(f"the model ({model}) has no classes, but labels {list(labels)} were given; leave them out")
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise UsageError(f"label {wrong[0]} is out of range: the model has the classes 0 .. {classes - 1}")
