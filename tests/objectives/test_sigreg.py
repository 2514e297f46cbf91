"""SIGReg against its definition, and statistics of several processes against those of one."""

import numpy as np
import pytest
import torch

from tests.processes import run as run_on_processes
from tubelet.objectives.losses.projector import BatchNorm, Projector
from tubelet.objectives.losses.sigreg import SIGRegOptions, sigreg
from tubelet.runtime.seeds import torch_generator
from tubelet.training.objective import StepRng

RNG = StepRng(seed=3, step=5, first_sample=0)
# Of features that are all zero: twice the integral of (1 - exp(-t²/2))² exp(-t²/2) from 0 to 3.
COLLAPSED = 0.402


def directions(dim, count, dtype=torch.float32):
    drawn = torch.randn(dim, count, generator=torch_generator(RNG.seed, RNG.step, "sigreg"), dtype=dtype)
    return (drawn / drawn.norm(dim=0)).T


def epps_pulley(x, knots, t_max):
    """B times the integral of |φ_B(t) - φ(t)|² φ(t) from -t_max to t_max."""
    t = np.linspace(-t_max, t_max, 2 * knots - 1)
    empirical = np.array([np.mean(np.exp(1j * s * x)) for s in t])
    integrand = np.abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
    return len(x) * np.sum((integrand[1:] + integrand[:-1]) / 2 * np.diff(t))


@pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (9, 2.0), (2, 1.0)])
def test_statistic_against_an_integral_for_each_direction(knots, t_max):
    features = torch.randn(2, 12, 7, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.3
    expected = [
        epps_pulley((view @ direction).double().numpy(), knots, t_max)
        for view in features
        for direction in directions(7, 5)
    ]
    options = SIGRegOptions(num_directions=5, knots=knots, t_max=t_max)
    assert float(sigreg(features, RNG, options)) == pytest.approx(np.mean(expected), rel=1e-5)
    per_clip = options.model_copy(update={"times_batch": False})
    assert float(sigreg(features, RNG, per_clip)) == pytest.approx(np.mean(expected) / 12, rel=1e-5)


def test_many_knots_give_the_closed_form_of_epps_and_pulley():
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for direction in directions(4, 3, torch.float64):
        x = (features @ direction).numpy()
        pairs = np.exp(-((x[:, None] - x) ** 2) / 2).sum() / len(x)
        value = pairs - np.sqrt(2) * np.exp(-(x**2) / 4).sum() + len(x) / np.sqrt(3)
        values.append(np.sqrt(2 * np.pi) * value)
    result = sigreg(features, RNG, SIGRegOptions(num_directions=3, knots=200, t_max=9.0))
    assert float(result) == pytest.approx(np.mean(values), rel=1e-9)


def test_gradient_is_that_of_finite_differences():
    features = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sigreg(x, RNG, SIGRegOptions(num_directions=3)), features)


@pytest.mark.parametrize("clips", [16, 256])
def test_value_of_normal_and_of_collapsed_features(clips):
    options = SIGRegOptions()
    normal = torch.randn(40, clips, 32, generator=torch.Generator().manual_seed(0))
    assert float(sigreg(normal, RNG, options)) == pytest.approx(1.053, rel=0.04)
    assert float(sigreg(torch.zeros(1, clips, 32), RNG, options)) == pytest.approx(COLLAPSED * clips, rel=1e-2)
    one_dimension = normal * torch.tensor([1.0] + [0.0] * 31)
    assert float(sigreg(one_dimension, RNG, options)) > 0.1 * COLLAPSED * clips + 1.053


def test_directions_depend_on_seed_and_step_alone():
    features = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    options = SIGRegOptions(num_directions=2)
    first = sigreg(features, RNG, options)
    torch.manual_seed(9)
    assert sigreg(features, RNG.skip(4), options) == first
    assert sigreg(features, StepRng(seed=3, step=6, first_sample=0), options) != first
    assert sigreg(features, StepRng(seed=4, step=5, first_sample=0), options) != first


def test_autocast_does_not_lower_the_precision():
    features = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    expected = sigreg(features, RNG, SIGRegOptions())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sigreg(features, RNG, SIGRegOptions()), expected)


def test_batch_norm_is_that_of_torch_in_training():
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
    ours, theirs = BatchNorm(5), torch.nn.BatchNorm1d(5)
    for norm in (ours, theirs):
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    out = ours.eval()(a)  # evaluation is no different
    expected = theirs(b.flatten(0, 1)).view_as(b)
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def loss_and_gradients(features):
    """SIGReg of projections and a loss of each process's own clips; the loss and the gradients of all weights."""
    torch.manual_seed(0)
    projector = Projector(6, 8, 5)
    z = projector(features)
    loss = z.square().mean() + sigreg(z, RNG, SIGRegOptions(num_directions=16))
    loss.backward()
    return torch.cat([loss.detach()[None], *[p.grad.flatten() for p in projector.parameters()]])


def check_part(task, world):
    features, expected = task
    rows = features.shape[1] // world.world_size
    result = loss_and_gradients(features[:, rows * world.rank : rows * (world.rank + 1)])
    torch.testing.assert_close(world.mean(result), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_compute_loss_and_gradients_of_one(processes):
    features = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    run_on_processes(check_part, (features, loss_and_gradients(features)), processes)
