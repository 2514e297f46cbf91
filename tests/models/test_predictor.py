import math

import pytest
import torch
import torch.nn.functional as F
from transformers import VJEPA2Config, VJEPA2Model

from tubelet import hub
from tubelet.layers.diffusion import TimeEmbedding, ddim_step, noise_alphas
from tubelet.models.predictor import VisionTransformerPredictor

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "embed_dim": 40,
    "predictor_embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}


def small(**arguments):
    torch.manual_seed(0)
    model = VisionTransformerPredictor(**{**SMALL, "init_std": 0.1, **arguments}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "mask_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch=3, context=9, target=6):
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(32, generator=generator) for _ in range(batch)])
    masks = order[:, :context].sort().values, order[:, context : context + target].sort().values
    features = [torch.randn(batch, mask.shape[1], 40, generator=generator) for mask in masks]
    return *features, *masks


@pytest.mark.parametrize("mask_index", [0, 1])
def test_equals_transformers_with_masks(tmp_path, mask_index):
    torch.manual_seed(0)
    reference = VJEPA2Model(
        VJEPA2Config(
            crop_size=64, patch_size=16, frames_per_clip=8, tubelet_size=2, hidden_size=96, num_attention_heads=3,
            num_hidden_layers=1, pred_hidden_size=48, pred_num_attention_heads=2, pred_num_hidden_layers=3,
            pred_num_mask_tokens=2, initializer_range=0.1,
        )
    ).eval()  # fmt: skip
    for name, parameter in reference.named_parameters():
        if name.endswith("bias") or "mask_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path)
    model = hub.load_predictor(tmp_path).eval()
    features = torch.randn(2, 64, 96)
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    context, target = order[:, :20].sort().values, order[:, 20:50].sort().values
    embeddings = reference.predictor.embeddings
    embed = embeddings.forward
    embeddings.forward = lambda *args: embed(*args, mask_index=mask_index)
    with torch.no_grad():
        expected = reference.predictor(features, [context], [target]).last_hidden_state
        visible = features.gather(1, context[..., None].expand(-1, -1, 96))
        assert expected.std() > 0.1
        torch.testing.assert_close(model(visible, None, context, target, mask_index), expected, atol=1e-5, rtol=0)


def test_mask_tokens_equal_a_loop():
    """Embed each token, add its position, run the blocks, return the masked tokens."""
    model = small(use_mask_tokens=True, num_mask_tokens=3)
    context, _, masks_context, masks_target = inputs()
    for clip in range(3):
        tokens = [
            model.predictor_embed(context[clip, i]) + model.positions.pos_embed[0, index]
            for i, index in enumerate(masks_context[clip])
        ]
        tokens += [model.mask_tokens[2][0, 0] + model.positions.pos_embed[0, index] for index in masks_target[clip]]
        x = torch.stack(tokens)[None]
        for block in model.predictor_blocks:
            x = block(x)
        expected = model.predictor_proj(model.predictor_norm(x))[0, 9:]
        torch.testing.assert_close(model(context, None, masks_context, masks_target, 2)[clip], expected)


def test_mask_token_initialisation():
    arguments = {**SMALL, "use_mask_tokens": True, "num_mask_tokens": 2}
    assert all(token.eq(0).all() for token in VisionTransformerPredictor(**arguments).mask_tokens)
    drawn = VisionTransformerPredictor(**arguments, zero_init_mask_tokens=False).mask_tokens
    assert all(0.005 < token.std() < 0.05 for token in drawn)


def test_mask_index_selects_the_mask_token_and_is_checked():
    model, (context, _, masks_context, masks_target) = small(use_mask_tokens=True, num_mask_tokens=2), inputs()
    first, second = (model(context, None, masks_context, masks_target, index) for index in (0, 1))
    assert not torch.allclose(first, second)
    with pytest.raises(IndexError):
        model(context, None, masks_context, masks_target, 2)


@pytest.mark.parametrize("use_rope", [False, True])
def test_predictions_do_not_depend_on_the_order_of_tokens(use_rope):
    model, (context, _, masks_context, masks_target) = small(use_mask_tokens=True, use_rope=use_rope), inputs()
    order, shuffled = torch.randperm(9), torch.randperm(6)
    expected = model(context, None, masks_context, masks_target)[:, shuffled]
    predicted = model(context[:, order], None, masks_context[:, order], masks_target[:, shuffled])
    torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [10, 1000])
def test_schedules_equal_loops(steps):
    def cosine_level(i):
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = {
        "vjepa": [0.5 + i * (1.0 - 0.5) / steps for i in range(steps)],
        "linear": [0.1 / steps + (20 / steps - 0.1 / steps) * i / (steps - 1) for i in range(steps)],
        "cosine": [min(1 - cosine_level(i + 1) / cosine_level(i), 0.999) for i in range(steps)],
    }
    betas["linear"] = [min(beta, 1.0) for beta in betas["linear"]] if steps > 20 else None
    for schedule, values in betas.items():
        if values is None:
            continue
        alphas, alpha = [], 1.0
        for beta in values:
            alpha *= 1.0 - beta
            alphas.append(alpha)
        expected = torch.tensor(alphas, dtype=torch.float64)
        torch.testing.assert_close(noise_alphas(schedule, steps), expected, atol=1e-12, rtol=1e-9)


def test_most_steps_of_the_usual_schedules_retain_the_target():
    """In the published schedule only about 20 steps do."""
    fraction = {
        name: (noise_alphas(name, 1000) > 1e-3).double().mean().item() for name in ("vjepa", "linear", "cosine")
    }
    assert fraction["vjepa"] < 0.02
    assert min(fraction["linear"], fraction["cosine"]) > 0.8
    given = noise_alphas("linear", 4, (0.1, 0.4))
    torch.testing.assert_close(given, torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6]).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 10, (0.1, 0.2)), "not used by the cosine schedule"),
        (("linear", 10, (0.3, 0.2)), "expected 0 < first"),
        (("vjepa", 10, (0.5, 1.5)), "expected 0 < first"),
        (("sigmoid", 10), "expected cosine, linear or vjepa"),
    ],
)
def test_invalid_noise_options_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise_alphas(*arguments)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "vjepa"])
def test_noised_targets_equal_a_loop(schedule):
    model = small(noise_schedule=schedule)
    context, target, masks_context, masks_target = inputs()
    noise, timestep = torch.randn(3, 6, 24), torch.tensor([0, 1, 700])
    predicted = model(context, target, masks_context, masks_target, noise=noise, timestep=timestep)
    alphas = noise_alphas(schedule, 1000).float()
    for clip in range(3):
        latent = F.layer_norm(model.predictor_embed(target[clip]), (24,))
        alpha = alphas[timestep[clip]]
        noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise[clip]
        if schedule != "vjepa":
            noised = noised + model.time_embed(timestep[clip : clip + 1])
        x = torch.cat([model.predictor_embed(context[clip]), noised])
        x = (x + model.positions.pos_embed[0, torch.cat([masks_context[clip], masks_target[clip]])])[None]
        for block in model.predictor_blocks:
            x = block(x)
        torch.testing.assert_close(predicted[clip], model.predictor_proj(model.predictor_norm(x))[0, 9:])


def test_only_the_published_variant_does_not_receive_the_time_step():
    context, target, masks_context, masks_target = inputs()
    for schedule in ("cosine", "linear", "vjepa"):
        model = small(noise_schedule=schedule)
        model.alphas.fill_(0.5)  # equal noise levels, so that only the time embedding differs
        early, late = (
            model(
                context, target, masks_context, masks_target, noise=torch.ones(3, 6, 24), timestep=torch.full((3,), t)
            )
            for t in (1, 900)
        )
        assert torch.equal(early, late) == (schedule == "vjepa")


def test_time_embeddings_are_distinct():
    embed = TimeEmbedding(24)
    embed.mlp = torch.nn.Identity()
    codes = embed(torch.arange(1000))
    assert (torch.cdist(codes, codes) + torch.eye(1000)).min() > 1e-3


def test_noise_is_drawn_from_the_global_generator():
    model, (context, target, masks_context, masks_target) = small(), inputs()
    torch.manual_seed(3)
    first = model(context, target, masks_context, masks_target)
    assert not torch.equal(first, model(context, target, masks_context, masks_target))
    torch.manual_seed(3)
    assert torch.equal(first, model(context, target, masks_context, masks_target))


@pytest.mark.parametrize(("schedule", "steps"), [("cosine", 1), ("cosine", 7), ("linear", 1000), ("linear", 20)])
def test_ddim_with_an_oracle_recovers_the_target(schedule, steps):
    model, (context, target, masks_context, masks_target) = small(noise_schedule=schedule), inputs()
    model.double()
    context, target = context.double(), target.double()
    alphas = noise_alphas(schedule, 1000)
    model.alphas = alphas
    latent = F.layer_norm(model.predictor_embed(target), (24,)).repeat(2, 1, 1)
    path = []

    def oracle(embedded, x, timestep, masks_context, masks_target):
        path.append((timestep[0].item(), x))
        return target.repeat(2, 1, 1)

    model._denoise = oracle
    sampled = model.sample(context, masks_context, masks_target, steps, draws=2)
    torch.testing.assert_close(sampled, target.expand(2, -1, -1, -1))
    assert [t for t, _ in path] == sorted({t for t, _ in path}, reverse=True)
    assert len(path) == steps
    assert path[0][0] == 999
    start = path[0][1]
    alpha = alphas[999]
    noise = (start - alpha.sqrt() * latent) / (1 - alpha).sqrt()
    for timestep, x in path:  # the same noise in every step, at the level of the step
        expected = alphas[timestep].sqrt() * latent + (1 - alphas[timestep]).sqrt() * noise
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


def with_gaussian_targets(schedule, mean, std):
    """A predictor whose latents are its features, which are normal given the context, and whose estimate is exact."""
    model = small(noise_schedule=schedule, embed_dim=24)
    model.predictor_embed = torch.nn.Identity()
    model._latent = lambda features: features

    def posterior_mean(embedded, x, timestep, masks_context, masks_target):
        alpha = model.alphas[timestep[0]]
        gain = alpha.sqrt() * std**2 / (alpha * std**2 + 1 - alpha)
        return mean + gain * (x - alpha.sqrt() * mean)

    model._denoise = posterior_mean
    return model


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_samples_have_the_distribution_of_gaussian_targets(schedule, eta):
    mean, std = torch.linspace(-2, 2, 24), torch.linspace(0.3, 2.0, 24)
    model, (_, _, masks_context, masks_target) = with_gaussian_targets(schedule, mean, std), inputs()
    g = torch.Generator().manual_seed(0)
    context = torch.zeros(3, 9, 24)
    samples = model.sample(context, masks_context, masks_target, 200, 400, g, eta).flatten(0, 2)  # 7200 draws
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.09)
    torch.testing.assert_close(samples.std(0), std, rtol=0.06, atol=0)
    correlation = torch.corrcoef(samples.T) - torch.eye(24)
    assert correlation.abs().max() < 0.06


def test_one_step_gives_no_spread_beyond_that_of_the_noise():
    mean, std = torch.zeros(24), torch.ones(24)
    model, (_, _, masks_context, masks_target) = with_gaussian_targets("cosine", mean, std), inputs()
    context = torch.zeros(3, 9, 24)
    assert model.sample(context, masks_context, masks_target, 1, 20).std() < 1e-3
    assert model.sample(context, masks_context, masks_target, 100, 20).std() == pytest.approx(1.0, abs=0.05)


def test_ddim_step_against_the_equations():
    g = torch.Generator().manual_seed(0)
    x, clean = torch.randn(2, 5, generator=g), torch.randn(2, 5, generator=g)
    alpha, following = torch.tensor(0.3), torch.tensor(0.6)
    new = torch.randn(2, 5, generator=torch.Generator().manual_seed(7))
    for eta in (0.0, 0.3, 1.0):
        sigma = eta * math.sqrt((1 - 0.6) / (1 - 0.3)) * math.sqrt(1 - 0.3 / 0.6)
        noise = (x - math.sqrt(0.3) * clean) / math.sqrt(0.7)
        expected = math.sqrt(0.6) * clean + math.sqrt(1 - 0.6 - sigma**2) * noise + sigma * new
        stepped = ddim_step(x, clean, alpha, following, eta, torch.Generator().manual_seed(7))
        torch.testing.assert_close(stepped, expected)


def test_a_predictor_without_time_steps_is_sampled_where_targets_can_be_seen():
    model, (context, _, masks_context, masks_target) = small(noise_schedule="vjepa"), inputs()
    used = model._sampling_timesteps(1000)
    assert used == sorted(used, reverse=True) == list(range(len(used) - 1, -1, -1))
    assert len(used) < 20
    assert model.alphas[used[0]] > 1e-6 >= model.alphas[used[0] + 1]
    assert len(model._sampling_timesteps(5)) == 5
    for eta in (0.0, 1.0):
        assert model.sample(context, masks_context, masks_target, 50, eta=eta).isfinite().all()


def test_sampling_is_reproducible():
    model, (context, _, masks_context, masks_target) = small(), inputs()
    first, again = (
        model.sample(context, masks_context, masks_target, 4, draws=3, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert first.shape == (3, 3, 6, 40)
    assert torch.equal(first, again)
    ancestral = [
        model.sample(context, masks_context, masks_target, 4, 3, torch.Generator().manual_seed(5), eta=1.0)
        for _ in range(2)
    ]
    assert torch.equal(*ancestral)
    assert not torch.allclose(ancestral[0], first)
    assert not torch.allclose(first[0], first[1])
    assert not first.requires_grad


def test_samples_depend_only_on_the_context_of_their_clip():
    model, (context, _, masks_context, masks_target) = small(), inputs()
    both = model.sample(context, masks_context, masks_target, 3, 2, torch.Generator().manual_seed(5))
    changed = context.clone()
    changed[1] += 1.0
    other = model.sample(changed, masks_context, masks_target, 3, 2, torch.Generator().manual_seed(5))
    torch.testing.assert_close(other[:, [0, 2]], both[:, [0, 2]])
    assert not torch.allclose(other[:, 1], both[:, 1])


def test_calls_that_do_not_match_the_mode_raise():
    context, _, masks_context, masks_target = inputs()
    with pytest.raises(ValueError, match="mask tokens cannot be sampled"):
        small(use_mask_tokens=True).sample(context, masks_context, masks_target, 3)
    with pytest.raises(ValueError, match="noises its targets"):
        small()(context, None, masks_context, masks_target)
    with pytest.raises(ValueError, match="between 1 and noise_steps .1000."):
        small().sample(context, masks_context, masks_target, 0)


@pytest.mark.parametrize("use_mask_tokens", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_mask_tokens):
    context, target, masks_context, masks_target = inputs()
    gradients = []
    for use_checkpointing in (False, True):
        model = small(use_mask_tokens=use_mask_tokens, use_activation_checkpointing=use_checkpointing).train()
        torch.manual_seed(0)
        model(context, target, masks_context, masks_target).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
