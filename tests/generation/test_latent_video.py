import pytest
import torch

from tubelet.data import Batch
from tubelet.generation.latent_video import LatentConfig, LatentVideoModel
from tubelet.objectives.latent_prediction import WEIGHTS, LatentPrediction
from tubelet.training.objective import StepRng

SMALL = {"channels": 4, "codec_width": 8, "width": 8, "depth": 1, "sampling_steps": 4}


def make(**changes):
    torch.manual_seed(0)
    return LatentVideoModel(LatentConfig(**SMALL | changes), channels=1, num_frames=3, num_target_frames=2)


@pytest.fixture
def model():
    return make()


@pytest.fixture
def seen():
    return torch.rand(2, 1, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_frames_keep_their_order_in_the_latents(model, seen):
    latents = model.encode(seen)
    assert latents.shape == (2, 3 * 4, 4, 6)
    for t in range(3):
        torch.testing.assert_close(latents[:, 4 * t : 4 * t + 4], model.codec.encode(seen[:, :, t]))
        frame = model.codec.decode(latents[:, 4 * t : 4 * t + 4])
        torch.testing.assert_close(model.decode(latents)[:, :, t], frame)
    per_token = latents.unflatten(1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(per_token.mean(1), torch.zeros(2, 3, 4, 6), atol=1e-5, rtol=0)
    variance = per_token.var(1, correction=0)
    assert variance.max() < 1 + 1e-4
    assert variance.median() > 0.95


def test_from_pure_noise_the_mean_is_predicted_whatever_the_noise(model, seen):
    past = model.encode(seen)
    last = torch.full((2,), model.config.noise_steps - 1)
    for seed in range(3):
        noise = torch.randn(2, 2 * 4, 4, 6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(model.estimate(past, noise, last), model.predict_mean(past), atol=1e-3, rtol=0)
    early = torch.zeros(2, dtype=torch.long)
    assert (model.estimate(past, noise, early) - model.estimate(past, -noise, early)).abs().max() > 0.05


def test_draws_differ_and_each_is_always_the_same(model, seen):
    assert model.is_stochastic
    assert torch.equal(model(seen, draw=1), model(seen, draw=1))
    assert not torch.equal(model(seen, draw=1), model(seen, draw=2))
    assert not torch.equal(model(seen, draw=1), model(seen))
    assert torch.equal(model(seen), model.decode(model.predict_mean(model.encode(seen))).sigmoid())


def test_without_random_noise_levels_every_draw_is_the_mean(seen):
    model = make(mean_fraction=1.0)
    assert not model.is_stochastic
    assert torch.equal(model(seen, draw=1), model(seen))
    assert {model.noise_step(position / 10) for position in range(10)} == {999}


def test_noise_levels(model):
    steps = torch.tensor([model.noise_step(position / 1000) for position in range(1000)])
    assert (steps == 999).float().mean() == pytest.approx(0.5, abs=0.002)
    others = steps[:500].float()
    assert others.min() == 0
    assert others.mean() == pytest.approx(499, abs=2)


def test_samples_have_the_distribution_of_the_latents(monkeypatch):
    """For latents ~ N(mean, deviation^2) the best estimate is known; with it, samples have that distribution."""
    mean, deviation = 0.7, 0.4
    model = make(sampling_steps=200)

    def best(past, scaled, timestep):
        alpha = model.alphas[timestep, None, None, None]
        noised = scaled / alpha.sqrt()
        gain = deviation**2 * alpha.sqrt() / (alpha * deviation**2 + 1 - alpha)
        return mean + gain * (noised - alpha.sqrt() * mean)

    monkeypatch.setattr(model.predictor, "forward", best)
    samples = model.sample(torch.zeros(50, 12, 8, 8), draw=0)
    assert samples.shape == (50, 8, 8, 8)
    assert samples.mean() == pytest.approx(mean, abs=0.01)
    assert samples.std() == pytest.approx(deviation, rel=0.03)
    assert (model.predict_mean(torch.zeros(1, 12, 8, 8)) - mean).abs().max() < 1e-3


def test_encoder_and_decoder_do_not_serve_the_prediction(model, seen):
    future = torch.rand(2, 1, 2, 16, 24)
    noise = torch.randn(2, 8, 4, 6)

    def losses():
        model.zero_grad(set_to_none=True)
        return model.losses(seen, future, noise, torch.tensor([10, 999]), noise)

    def learning():
        parts = {"encoder": model.codec.encoder, "decoder": model.codec.decoder, "predictor": model.predictor}
        return {name for name, part in parts.items() if any(p.grad is not None for p in part.parameters())}

    expected = {
        "loss_pixels": {"encoder", "decoder"},
        "loss_latents": {"predictor"},
        "loss_painted": {"decoder", "predictor"},
    }
    for name, parts in expected.items():
        losses()[name].backward()
        assert learning() == parts, name


def test_the_loss_does_not_depend_on_how_a_batch_is_split(model):
    clips = torch.randint(256, (4, 3, 5, 16, 16), dtype=torch.uint8)
    objective = LatentPrediction(model, num_frames=3, channels=1)

    def batch(rows):
        index = torch.arange(len(clips))[rows]
        return Batch({"clip": clips[rows]}, {}, index, ("",) * len(index), index, 7)

    rng = StepRng(seed=3, step=7, first_sample=0)
    whole = objective(batch(slice(None)), rng)
    assert set(whole) == {"loss", *WEIGHTS}
    halves = [objective(batch(slice(0, 2)), rng), objective(batch(slice(2, 4)), rng.skip(2))]
    for name, value in whole.items():
        torch.testing.assert_close(value, (halves[0][name] + halves[1][name]) / 2)
    assert not torch.equal(whole["loss"], objective(batch(slice(None)), StepRng(3, 8, 0))["loss"])


def test_the_encoder_is_trained_on_the_frames_that_follow(model, seen):
    """A few steps on one clip: it learns to paint it, and to predict it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    future = (seen[:, :, :2] > 0.5).float()
    last = torch.full((2,), 999)
    history = []
    for _ in range(60):
        noise = torch.zeros(2, 8, 4, 6)
        losses = model.losses(seen, future, noise, last, noise)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    for name in ("loss_pixels", "loss_painted"):
        assert history[-1][name] < 0.7 * history[0][name], name
