import math

import pytest

from tubelet.training.schedules import RateConfig, cosine, linear, warmup_cosine


def test_linear_and_cosine_meet_their_ends():
    for schedule in (linear, cosine):
        assert schedule(0, 10, 1.0, 3.0) == 1.0
        assert schedule(10, 10, 1.0, 3.0) == schedule(99, 10, 1.0, 3.0) == 3.0
        assert schedule(5, 10, 1.0, 3.0) == pytest.approx(2.0)


def test_warmup_cosine_against_torch():
    """The same numbers as torch's own schedulers in sequence."""
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, end_factor=1.0, total_iters=4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.1)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], milestones=[4])
    for step in range(10):
        ours = warmup_cosine(step, warmup=4, total=10, start=0.2, peak=1.0, final=0.1)
        assert math.isclose(ours, optimizer.param_groups[0]["lr"], rel_tol=1e-6), step
        optimizer.step()
        both.step()


def test_no_warmup():
    assert warmup_cosine(0, 0, 10, 0.5, 1.0, 0.0) == 1.0


def test_warm_up_ends_before_the_run():
    rates = RateConfig(start_lr=0.0, lr=1.0, final_lr=0.0, warmup=20, weight_decay=0.0)
    rates.check_warmup(20, "steps")
    with pytest.raises(ValueError, match="20.* steps of warm-up do not fit into 19 steps"):
        rates.check_warmup(19, "steps")
