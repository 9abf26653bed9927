"""The peak of memory is a trial's own."""

from __future__ import annotations

import os

import pytest
import torch

from raysparse.train import memory, setup

CPU = torch.device("cpu")


def test_the_peak_of_a_trial_is_not_that_of_what_its_process_did_before(tiny):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system forgets no peak")
    trial, size = tiny({"train.steps": 1}), 300 * 2**20
    list(setup.build(trial).run())  # takes what libraries take once
    torch.ones(size, dtype=torch.uint8)
    before = memory.peak_bytes(CPU)
    (report,) = setup.build(trial).run()
    assert report.peak_memory_bytes < before - size / 2
    torch.ones(size, dtype=torch.uint8)
    assert memory.peak_bytes(CPU) > report.peak_memory_bytes + size / 2


def test_a_system_that_forgets_no_peak_tells_the_one_of_the_process(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "write_text", missing)
    monkeypatch.setattr(memory.Path, "read_text", missing)
    memory.forget_peak(CPU)
    assert memory.peak_bytes(CPU) > 50 * 2**20


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_a_trial_s_own(tiny):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.ones(2**30, dtype=torch.uint8, device="cuda")
    (report,) = setup.build(tiny({"train.steps": 1}), device="cuda").run()
    assert report.peak_memory_bytes < 2**30
