"""`raysparse prepare` for pictures: by name and by sweep file, damaged ones named, without Ray (that: tests/sweep)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysparse import cli, config, space
from raysparse.config import FirstStageConfig
from raysparse.data import prepared
from raysparse.models import autoencoder
from raysparse.sweep import encode
from raysparse.terminal import _Pace
from raysparse.train.first_stage import FirstStage

Run = Callable[..., tuple[int, str, str]]
OPTIONS = ["--set", "size_px=16", "--set", "validation_examples=8"]
SWEEP = """
name: tiny
base:
  data: {name: imagefolder, options: {size_px: 16, validation_examples: 8, flips: true}}
  first_stage: {name: autoencoder, options: %s}
  train: {steps: 8, batch_size: 4}
grid: {dense: {}}
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """40 pictures of 16 x 16."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SWEEP % json.dumps(autoencoder.SMALL))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `raysparse prepare` where Ray is not installed; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("RAYSPARSE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raysparse", "prepare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.mark.parametrize("words", [[], ["--cpus", "1"]])
def test_by_name_as_pixels_without_ray(run: Run, pictures: Path, words: list[str]) -> None:
    code, out, err = run("imagefolder", "--path", pictures, *OPTIONS, *words)
    assert (code, err) == (0, "")
    assert prepared.open_split(Path(out.strip()), "train").value_shape == (3, 16, 16)
    assert len(prepared.open_split(Path(out.strip()), "train")) == 32


def test_a_sweep_file_prepares_what_its_trials_will_ask_for(run: Run, pictures: Path, sweep_file: Path) -> None:
    code, out, _ = run("tiny.yaml", "--data", pictures.name, "--json")  # a relative path, as one types it
    assert code == 0
    facts = json.loads(out)
    trial = space.parsed_base(space.load(sweep_file, {"base.data.source": str(pictures)}))
    encoder = FirstStage.of(trial.first_stage)
    assert facts["examples"] == {"train": 32, "validation": 8, "reference": 32}
    assert (facts["encoder"], facts["latent_shape"]) == (encoder.identity, [3, 8, 8])

    def refuse(*_: object) -> None:
        raise AssertionError("something was left to encode")

    again = prepared.prepare("imagefolder", trial.data.options, pictures, encoder=encoder, run=refuse)
    assert again == Path(facts["folder"])
    assert prepared.open_split(again, "train").flips


def test_weights_of_the_first_stage_are_given_on_the_command_line(
    run: Run, pictures: Path, sweep_file: Path, tmp_path: Path
) -> None:
    model = autoencoder.build(autoencoder.Config(**autoencoder.SMALL), seed=7)
    model.vq.save_pretrained(tmp_path / "vqvae")
    code, out, _ = run("tiny.yaml", "--path", pictures, "--first-stage", "vqvae", "--json")
    assert (code, json.loads(out)["encoder"]) == (0, autoencoder.identity(model))
    code, _, err = run(
        "tiny.yaml", "--path", pictures, "--first-stage", "vqvae", "--set", f"first_stage.sha256={'0' * 64}"
    )
    assert code == 2
    assert "first_stage.sha256" in err


def test_damaged_pictures_are_counted_and_the_first_ten_named(run: Run, pictures: Path) -> None:
    for number in range(12):
        (pictures / f"broken{number:02}.png").write_bytes(b"no picture")
    code, out, err = run("imagefolder", "--path", pictures, *OPTIONS, "--json")
    assert code == 0
    assert len(json.loads(out)["damaged"]) == 12
    lines = err.splitlines()
    assert lines[0].startswith("12 damaged pictures were left out")
    assert len([line for line in lines if "broken" in line]) == 10
    assert lines[-1] == "  and 2 more"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imagefoldr"], "did you mean 'imagefolder'"),
        (["imagefolder", "--set", "sizepx=16"], "did you mean 'size_px'"),
        (["imagefolder", "--path", "pictures", "--set", "size_px=15"], "resize: centre"),
        (["imagefolder", "--path", "pictures", *OPTIONS, "--first-stage", "absent.ckpt"], "absent.ckpt"),
        (["hershey", "--first-stage", "absent.ckpt"], "absent.ckpt"),
        (["absent.yaml"], "cannot read absent.yaml"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(run: Run, pictures: Path, words: list[str], message: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert message in err


def test_sketches_have_no_first_stage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sketches.yaml").write_text(SWEEP.replace("imagefolder", "hershey") % json.dumps(autoencoder.SMALL))
    code, _, err = run("sketches.yaml", "--set", "data.options={}")
    assert code == 2
    assert "holds sketches" in err


def test_files_that_are_skipped_are_counted(run: Run, pictures: Path) -> None:
    for folder in ("train", "val"):
        (pictures / folder).mkdir()
        for path in sorted(pictures.glob("*.png"))[:10]:
            path.rename(pictures / folder / path.name)
    for name in ("train/moving.gif", "train/raw.tiff", "val/README.txt"):
        (pictures / name).write_bytes(b"any")
    code, out, err = run("imagefolder", "--path", pictures, "--set", "size_px=16", "--json")
    assert code == 0
    assert json.loads(out)["other_files"] == 3
    assert err == "3 other files were skipped: only .bmp, .jpeg, .jpg, .png, .webp are read as pictures\n"


@pytest.mark.parametrize(("name", "file"), [("hershey", "points.npy"), ("imagefolder", "train.arrow")])
def test_a_prepared_set_that_is_damaged_is_told_with_what_to_do(run: Run, pictures: Path, name: str, file: str) -> None:
    words = [name, *(["--path", pictures, *OPTIONS] if name == "imagefolder" else [])]
    stored = Path(run(*words)[1].strip()) / file
    stored.write_bytes(stored.read_bytes()[:-9])
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert f"{stored} is damaged" in err
    assert "delete" in err
    assert "Traceback" not in err


def test_ctrl_c_exits_with_130(run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "prepare", interrupted)
    code, _, err = run("imagefolder", "--path", pictures, *OPTIONS)
    assert code == 130
    assert "the same command goes on" in err


def test_ray_is_used_for_pictures_with_several_cpus_or_an_address(
    monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path
) -> None:
    asked: list[dict[str, object]] = []

    def run_on(log: Path, **options: object) -> prepared.Run:
        asked.append(options)
        return prepared.in_order

    monkeypatch.setattr(encode, "run_on", run_on)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = {"name": "imagefolder", "source": str(pictures), "root": str(tmp_path / "data")}
    data["options"] = {"size_px": 16, "validation_examples": 8}  # type: ignore[assignment]
    pixels = config.parse({"data": data}, "test")
    latents = pixels.model_copy(update={"first_stage": FirstStageConfig(options=autoencoder.SMALL)})
    encode.prepare(pixels, cpus=1)
    assert asked == []
    encode.prepare(pixels, cpus=2)
    encode.prepare(latents, cpus=2)
    encode.prepare(pixels, cpus=1, address="ray://head")
    assert [(one["num_cpus"], one["memory"], one["address"]) for one in asked] == [
        (2, 0, None),
        (2, encode.ENCODING_BYTES, None),
        (1, 0, "ray://head"),
    ]


def test_pace_leaves_out_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr("raysparse.terminal.time.monotonic", lambda: next(clock))
    pace = _Pace()
    assert pace.after(900, 1000) == ""  # shards of a prepare that was killed
    assert pace.after(905, 1000) == "0.5/s, 3 min left"
    assert pace.after(1, 50) == ""  # another job
    assert pace.after(41, 50) == "4/s, 2 s left"
    assert pace.after(50, 50) == "2.5/s, 0 s left"
