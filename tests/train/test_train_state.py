"""Checkpoints: whole or absent, checked before use, never a pickle."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from raysparse.errors import UsageError
from raysparse.train import setup, state


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Where the first test leaves the checkpoint that all begin with."""
    return tmp_path_factory.mktemp("made") / "step-000000004"


@pytest.fixture
def checkpoint(tiny, rigl, tmp_path, made) -> Path:
    if not made.exists():
        trainer = setup.build(tiny(rigl))
        next(trainer.run())
        state.save(trainer, made)
    return shutil.copytree(made, tmp_path / "trial" / made.name)


FILES = ["weights.safetensors", "ema.safetensors", "engine.safetensors", "optimizer.safetensors", "manifest.json"]


def everything(trainer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    state._pack([trainer.step, state._parts(trainer)], "all", tensors)
    return tensors


def assert_refused_unchanged(trainer, folder: Path, message: str) -> None:
    before = everything(trainer)
    with pytest.raises(UsageError, match=message):
        state.load(trainer, folder)
    after = everything(trainer)
    assert trainer.step == 0
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_by_name(tiny, rigl, checkpoint, name):
    path, trainer = checkpoint / name, setup.build(tiny(rigl))
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:-1], whole + b"x", b"", None):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        assert_refused_unchanged(trainer, checkpoint, name.replace(".", r"\."))
    draw = random.Random(0)
    for _ in range(40):  # single bits, anywhere
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if name == "manifest.json" and says_the_same(data, whole):  # 1E-08, or a last digit that is rounded away
            continue
        path.write_bytes(data)
        with pytest.raises(UsageError, match=name.replace(".", r"\.")):
            state.load(trainer, checkpoint)
    path.write_bytes(whole)
    state.load(trainer, checkpoint)
    assert trainer.step == 4


def says_the_same(data: bytes, whole: bytes) -> bool:
    try:
        return json.loads(data) == json.loads(whole)
    except ValueError:
        return False


def seal(folder: Path, change) -> None:
    """The manifest changed and its own hash made right, as somebody would who means harm."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())["content"]
    changed = change(content)
    content = content if changed is None else changed
    text = json.dumps(content, sort_keys=True).encode()
    path.write_text(json.dumps({"content": content, "sha256": state._sha256(text)}))


def put(*path, value):
    """A change of the manifest: this value there."""

    def change(content):
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def retensor(part, change):
    """A change of one part's tensors, its hash made right."""

    def changed(content, folder):
        path = folder / f"{part}.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors, next(iter(sorted(tensors))))
        safetensors.torch.save_file(tensors, path)
        content["sha256"][path.name] = state._sha256(path.read_bytes())

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [1], "of something else"),
        (lambda c: {}, "of something else"),
        (lambda c: c.pop("trees") and None, "of something else"),
        (put("step", value="4"), "of something else"),
        (put("step", value=-3), "step -3 is not one of"),
        (put("step", value=10**9), "step 1000000000 is not one of"),
        (put("sha256", value={}), r"weights\.safetensors is damaged"),
        (put("trees", value={}), "has no weights"),
        (put("trees", "weights", value={"tensor": "../../etc/passwd"}), r"does not describe weights"),
        (put("trees", "weights", value={"a": 1, "b": 2}), r"does not describe weights"),
        (put("trees", "weights", value={"dict": [[{"dict": []}, 1]]}), r"does not describe weights"),
        (put("trees", "weights", value=[1]), "no tensors by name"),
        (put("trees", "ema", value={"dict": []}), "averages: missing"),
        (put("trees", "optimizer", value={"dict": []}), "no state of AdamW"),
        (put("trees", "engine", value=None), "part engine is of something else"),
        (put("totals", value={"__class__": "os.system"}), "totals: it has not the fields"),
        (put("totals", "train_s", value="rm"), "train_s is 'rm', not float"),
        (lambda c: c["totals"].update(extra=1), "totals: it has not the fields"),
    ],
)
def test_a_hostile_manifest_that_is_whole_is_refused(tiny, rigl, checkpoint, change, message):
    seal(checkpoint, change)
    assert_refused_unchanged(setup.build(tiny(rigl)), checkpoint, message)


def test_json_that_nests_without_end_is_refused(tiny, rigl, checkpoint):
    (checkpoint / "manifest.json").write_text('{"content":' + "[" * 10**5)
    assert_refused_unchanged(setup.build(tiny(rigl)), checkpoint, r"manifest\.json is damaged")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weights", lambda t, n: t.update({n: t[n].double()}), "weights: .* is float64"),
        ("ema", lambda t, n: t.update({n: t[n][:1].contiguous()}), "averages: .* is float32"),
        (
            "optimizer",
            lambda t, n: t.update({n: torch.zeros(2, 2, 2, 2)}),
            r"of parameter \d+ is float32 \[2, 2, 2, 2\]",
        ),
        ("engine", lambda t, n: t.update({n: ~t[n]}), "active weights"),
        ("engine", lambda t, n: t.update({n: t[n].float()}), "torch.float32"),
    ],
)
def test_hostile_tensors_that_are_whole_are_refused(tiny, rigl, checkpoint, part, change, message):
    seal(checkpoint, lambda content: retensor(part, change)(content, checkpoint))
    assert_refused_unchanged(setup.build(tiny(rigl)), checkpoint, message)


def test_a_pickle_under_a_checkpoints_name_is_not_run(tiny, rigl, checkpoint, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for data in (pickle.dumps(Runs()), b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{}"):
        (checkpoint / "weights.safetensors").write_bytes(data)
        seal(checkpoint, put("sha256", "weights.safetensors", value=state._sha256(data)))
        assert_refused_unchanged(setup.build(tiny(rigl)), checkpoint, r"weights\.safetensors is damaged")
    assert not (tmp_path / "ran").exists()


def test_another_trial_is_refused_with_the_setting_that_differs(tiny, rigl, checkpoint):
    trainer = setup.build(tiny(rigl, {"optimizer.lr": 0.5}))
    with pytest.raises(UsageError, match=r"optimizer\.lr 0\.003 there, 0\.5 here"):
        state.load(trainer, checkpoint)


def test_where_the_data_lies_and_threads_do_not_matter(tiny, rigl, checkpoint):
    trainer = setup.build(tiny(rigl, {"train.threads": 2}))
    state.load(trainer, checkpoint)
    assert trainer.step == 4
    torch.set_num_threads(1)


def test_another_format_is_refused(tiny, rigl, checkpoint):
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())["content"] | {"format": 99}
    text = json.dumps(content, sort_keys=True).encode()
    path.write_text(json.dumps({"content": content, "sha256": state._sha256(text)}))
    with pytest.raises(UsageError, match="format 99"):
        state.load(setup.build(tiny(rigl)), checkpoint)


def test_a_save_that_fails_leaves_the_one_before(tiny, rigl, checkpoint, monkeypatch):
    trainer = setup.build(tiny(rigl))
    state.load(trainer, checkpoint)
    write_bytes, calls = Path.write_bytes, []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write_bytes(*args)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        state.save(trainer, checkpoint.parent / "step-000000008")
    calls.clear()
    with pytest.raises(OSError, match="No space left"):
        state.save(trainer, checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-000000004"]
    state.load(setup.build(tiny(rigl)), checkpoint)


def test_a_full_disk_is_an_os_error(tiny, rigl, tmp_path):
    trainer = setup.build(tiny(rigl))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            state.save(trainer, tmp_path / "step-000000000")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_before_has_no_seconds_of_compilation(tiny, rigl, checkpoint):
    trainer = setup.build(tiny(rigl))
    seal(checkpoint, lambda content: content["totals"].__delitem__("compile_s"))
    state.load(trainer, checkpoint)
    assert (trainer.step, trainer.totals.compile_s) == (4, 0.0)


def test_a_resume_takes_no_other_data(tiny, rigl, checkpoint):
    trainer = setup.build(tiny(rigl))
    kept = dict(trainer.origin)
    assert state.manifest(checkpoint)["origin"] == kept
    for what in ("examples", "first_stage"):
        trainer.origin = kept | {what: "another"}
        assert_refused_unchanged(trainer, checkpoint, f"trained on other data: its {what} had another content; give")
    seal(checkpoint, lambda content: content.__delitem__("origin"))  # as checkpoints were before
    state.load(trainer, checkpoint)
    assert trainer.step == 4


def test_saving_twice_replaces_and_an_empty_folder_is_filled(tiny, rigl, checkpoint):
    trainer = setup.build(tiny(rigl))
    state.save(trainer, checkpoint)
    assert state.manifest(checkpoint)["step"] == 0
    made = checkpoint.parent / "made"  # as Ray's temporary folders
    made.mkdir()
    state.save(trainer, made)
    assert sorted(path.name for path in made.iterdir()) == sorted(FILES)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["made", "step-000000004"]


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_step_that_is_saved_again_has_a_whole_checkpoint_wherever_the_process_ends(
    tiny, rigl, checkpoint, monkeypatch, renames
):
    """Renames: the old one aside, the new one into its place, the old one away; then its files are removed."""
    trainer, left, rename = setup.build(tiny(rigl)), [renames], Path.rename

    def end_after(path: Path, target: Path) -> Path:
        if not left[0]:
            os._exit(0)
        left[0] -= 1
        return rename(path, target)

    state.load(trainer, checkpoint)
    trainer.totals.evaluate_s = 7.0  # by which the two differ
    if not (child := os.fork()):
        monkeypatch.setattr(Path, "rename", end_after)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: os._exit(0))
        state.save(trainer, checkpoint)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert state.latest(checkpoint.parent) == checkpoint
    state.load(trainer, checkpoint)
    assert (trainer.totals.evaluate_s == 7.0) == (renames > 1)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    state.save(trainer, checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_latest_ignores_and_removes_what_was_not_finished(tiny, rigl, checkpoint):
    parent = checkpoint.parent
    (parent / ".writing-x7").mkdir()
    (parent / ".writing-x7" / "weights.safetensors").write_bytes(b"half")
    later = state.save(setup.build(tiny(rigl)), state.at_step(parent, 12))
    assert state.latest(parent) == later
    assert not (parent / ".writing-x7").exists()
    state.keep_latest(parent, 1)
    assert [path.name for path in parent.iterdir()] == ["step-000000012"]
    assert state.latest(parent / "nowhere") is None


def test_what_a_person_keeps_beside_the_checkpoints_is_none_of_them_and_stays(tmp_path):
    names = ["step-000000060", "step-000000060.bak", "step-000000120", "step-000000180", "step-000000180.bak", "step-x"]
    for name in names:
        (tmp_path / name).mkdir()
    assert state.latest(tmp_path) == tmp_path / "step-000000180"
    state.keep_latest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]


def test_trees_come_back_as_they_were():
    tree = {"a": [1, 2.5, None, True, "x"], 3: {"t": torch.arange(3), "pair": (0.1, float("inf"))}}
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(state._pack(tree, "root", tensors)))
    back = state._unpack(packed, tensors)
    assert torch.equal(back[3].pop("t"), tree[3].pop("t"))
    assert back == tree
    with pytest.raises(TypeError, match=r"root\.a"):
        state._pack({"a": object()}, "root", {})
