from __future__ import annotations

import pytest
import torch

from raysparse.diffusion.losses import eps_mse, eps_mse_per_example


def test_a_long_sketch_counts_as_much_as_a_short_one() -> None:
    prediction = torch.zeros(2, 4, 3)
    eps = torch.zeros(2, 4, 3)
    eps[0, 0] = torch.tensor([1.0, 2.0, 3.0])  # one point: mean of 1, 4, 9
    eps[1, :, 0] = 3.0  # four points: 9 / 3 each
    lengths = torch.tensor([1, 4])
    assert eps_mse_per_example(prediction, eps, lengths).tolist() == pytest.approx([14 / 3, 3.0])
    assert float(eps_mse(prediction, eps, lengths)) == pytest.approx((14 / 3 + 3) / 2)


def test_what_lies_beyond_a_length_has_no_influence() -> None:
    prediction = torch.zeros(2, 4, 3, requires_grad=True)
    eps = torch.ones(2, 4, 3)
    eps[0, 2:] = float("nan")
    loss = eps_mse(prediction, eps, torch.tensor([2, 4]))
    loss.backward()
    assert loss.detach().item() == 1.0
    assert prediction.grad is not None
    assert not prediction.grad[0, 2:].any()
    assert torch.isfinite(prediction.grad).all()


def test_images_count_every_value() -> None:
    eps = torch.arange(24.0).view(2, 3, 2, 2)
    assert float(eps_mse(torch.zeros_like(eps), eps)) == pytest.approx(float((eps**2).mean()))
    assert eps_mse_per_example(torch.zeros_like(eps), eps).shape == (2,)


def test_bf16_predictions_are_compared_in_float32() -> None:
    loss = eps_mse(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.full((1, 2, 3), 1.0009765625))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1.0009765625**2)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        eps_mse(torch.zeros(2, 4, 3), torch.zeros(2, 4, 1))
