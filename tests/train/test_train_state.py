"""Checkpoints: whole or absent, checked before use, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from raysparse.errors import UsageError
from raysparse.train import setup, state


@pytest.fixture
def checkpoint(tiny, rigl, tmp_path) -> Path:
    trainer = setup.build(tiny(rigl))
    next(trainer.run())
    return state.save(trainer, tmp_path / "trial" / "step-000000004")


FILES = ["weights.safetensors", "ema.safetensors", "engine.safetensors", "optimizer.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "absent"])
def test_damage_is_refused_by_name(tiny, rigl, checkpoint, name, damage):
    path = checkpoint / name
    data = bytearray(path.read_bytes())
    if damage == "absent":
        path.unlink()
    else:
        data[len(data) * 2 // 3] ^= 1
        path.write_bytes({"truncated": data[: len(data) // 2], "one bit": data, "empty": b""}[damage])
    trainer = setup.build(tiny(rigl))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(UsageError, match=name):
        state.load(trainer, checkpoint)
    assert trainer.step == 0
    assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())


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
    save_file, calls = safetensors.torch.save_file, []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(*args)

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        state.save(trainer, checkpoint.parent / "step-000000008")
    calls.clear()
    with pytest.raises(OSError, match="No space left"):
        state.save(trainer, checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-000000004"]
    state.load(setup.build(tiny(rigl)), checkpoint)


def test_saving_twice_replaces_and_an_empty_folder_is_filled(tiny, rigl, checkpoint):
    trainer = setup.build(tiny(rigl))
    state.save(trainer, checkpoint)
    assert state.manifest(checkpoint)["step"] == 0
    made = checkpoint.parent / "made"  # as Ray's temporary folders
    made.mkdir()
    state.save(trainer, made)
    assert sorted(path.name for path in made.iterdir()) == sorted(FILES)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["made", "step-000000004"]


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


def test_trees_come_back_as_they_were():
    tree = {"a": [1, 2.5, None, True, "x"], 3: {"t": torch.arange(3), "pair": (0.1, float("inf"))}}
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(state._pack(tree, "root", tensors)))
    back = state._unpack(packed, tensors)
    assert torch.equal(back[3].pop("t"), tree[3].pop("t"))
    assert back == tree
    with pytest.raises(TypeError, match=r"root\.a"):
        state._pack({"a": object()}, "root", {})
