import numpy as np
import pytest
import scipy.linalg
import torch

from tubelet.generation.frechet import FeatureMoments, frechet_distance


def moments(*batches):
    result = FeatureMoments(batches[0].shape[1])
    for batch in batches:
        result.update(batch)
    return result


def features(count, dim, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, dim, generator=generator) @ torch.randn(dim, dim, generator=generator)
    return mixed * scale + shift


def test_as_the_definition_with_scipy():
    a, b = features(40, 6, seed=0), features(30, 6, seed=1, shift=0.5)
    c, d = np.cov(a.double().numpy(), rowvar=False), np.cov(b.double().numpy(), rowvar=False)
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    expected = shift + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(expected, rel=1e-6)


def test_known_distances():
    a = features(50, 4, seed=0)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(moments(a), moments(a + 2)) == pytest.approx(4 * 2**2, rel=1e-5)
    variance = a.double().var(0).sum().item()  # of 3 a: (3 - 1)^2 tr C, and the shift of the mean
    shift = 4 * a.double().mean(0).square().sum().item()
    assert frechet_distance(moments(a), moments(3 * a)) == pytest.approx(4 * variance + shift, rel=1e-5)


def test_with_fewer_clips_than_features():
    a, b = features(5, 12, seed=0), features(5, 12, seed=1)
    c, d = np.cov(a.double().numpy(), rowvar=False), np.cov(b.double().numpy(), rowvar=False)
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    nuclear = np.linalg.norm(scipy.linalg.sqrtm(c).real @ scipy.linalg.sqrtm(d).real, "nuc")
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(shift + np.trace(c + d) - 2 * nuclear, rel=1e-3)
    with pytest.raises(ValueError, match="at least two clips"):
        frechet_distance(moments(a[:1]), moments(b))


def test_batches_and_processes_add_up():
    a = features(20, 4, seed=0)
    whole, parts = moments(a), moments(a[:7], a[7:])
    torch.testing.assert_close(parts.covariance, whole.covariance)
    first, second = moments(a[:7]), moments(a[7:])
    others = iter([second.count, second.sum, second.products])
    first.gather(lambda own: own + next(others), torch.device("cpu"))
    torch.testing.assert_close(first.mean, whole.mean)
    torch.testing.assert_close(first.covariance, torch.from_numpy(np.cov(a.double().numpy(), rowvar=False)))
