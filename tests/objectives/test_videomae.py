"""VideoMAE against transformers' VideoMAEForPreTraining and a slow, obvious version."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from tubelet.data import Batch
from tubelet.grid import ClipShape
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.objectives.videomae import VideoMAE
from tubelet.training.objective import StepRng

CLIP = ClipShape(num_frames=4, crop_size=16, patch_size=8, tubelet_size=2)
SIZES = {"img_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RNG = StepRng(seed=0, step=0, first_sample=0)


def make_videomae(**options):
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-12)
    encoder = VisionTransformer(**SIZES, embed_dim=24, depth=2, num_heads=2, norm_layer=norm)
    decoder = VisionTransformerPredictor(
        **SIZES, embed_dim=24, predictor_embed_dim=16, depth=2, num_heads=2, norm_layer=norm, use_mask_tokens=True,
        num_mask_tokens=1, zero_init_mask_tokens=False, out_dim=2 * 8 * 8 * 3,
    )  # fmt: skip
    for module in (encoder, decoder):  # so that norms and biases matter
        for parameter in module.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return VideoMAE(encoder, decoder, CLIP, mean=MEAN, std=STD, **options)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    clips = torch.randint(256, (3, 3, 4, 16, 16), generator=generator, dtype=torch.uint8)
    # Tubes: the same columns in both time slots of 4 tokens.
    columns = torch.stack([torch.randperm(4, generator=generator) for _ in range(3)])
    context, target = (torch.cat([part, part + 4], dim=1).sort(1).values for part in (columns[:, :1], columns[:, 1:]))
    index = torch.arange(3)
    return Batch({"clip": clips}, {"label": index}, index, ("",) * 3, index, 0).with_masks([context], [target])


def to_transformers(objective):
    """transformers' model with the objective's weights and positions."""
    encoder, decoder = objective.encoder, objective.decoder
    model = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=16, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=24, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=96, decoder_hidden_size=16, decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2, decoder_intermediate_size=64, use_mean_pooling=False, norm_pix_loss=True,
        )
    ).eval()  # fmt: skip

    def copy_blocks(theirs, blocks):
        for layer, block in zip(theirs, blocks, strict=True):
            width = block.attn.proj.in_features
            attention = layer.attention.attention if hasattr(layer.attention, "attention") else layer.attention
            q, k, v = block.attn.qkv.weight.data.split(width)
            block.attn.qkv.bias.data[width : 2 * width] = 0  # theirs has no bias of the keys
            q_bias, _, v_bias = block.attn.qkv.bias.data.split(width)
            for linear, weight in zip((attention.query, attention.key, attention.value), (q, k, v), strict=True):
                linear.weight.data.copy_(weight)
            attention.query.bias.data.copy_(q_bias)
            attention.value.bias.data.copy_(v_bias)
            pairs = {
                layer.layernorm_before: block.norm1,
                layer.layernorm_after: block.norm2,
                layer.attention.output.dense: block.attn.proj,
                layer.intermediate.dense: block.mlp.fc1,
                layer.output.dense: block.mlp.fc2,
            }
            for to, source in pairs.items():
                to.load_state_dict(source.state_dict())

    with torch.no_grad():
        model.videomae.embeddings.patch_embeddings.projection.load_state_dict(encoder.patch_embed.proj.state_dict())
        model.videomae.embeddings.position_embeddings = encoder.positions.pos_embed.reshape(1, 8, 24)
        copy_blocks(model.videomae.encoder.layer, encoder.blocks)
        model.videomae.layernorm.load_state_dict(encoder.norm.state_dict())
        decoder.predictor_embed.bias.zero_()  # theirs has none
        model.encoder_to_decoder.weight.copy_(decoder.predictor_embed.weight)
        model.mask_token.copy_(decoder.mask_tokens[0])
        model.position_embeddings = decoder.positions.pos_embed.reshape(1, 8, 16)
        copy_blocks(model.decoder.decoder_layers, decoder.predictor_blocks)
        model.decoder.norm.load_state_dict(decoder.predictor_norm.state_dict())
        model.decoder.head.load_state_dict(decoder.predictor_proj.state_dict())
    return model


def test_loss_is_that_of_transformers(batch):
    objective = make_videomae()
    model = to_transformers(objective)
    mask = torch.ones(3, 8, dtype=torch.bool).scatter(1, batch.masks_context[0], False)
    pixels = (batch.clips.float() / 255 - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
    with torch.no_grad():
        expected = model(pixels.transpose(1, 2), bool_masked_pos=mask).loss
        loss = objective(batch, RNG)["loss"]
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-5)


def test_targets_against_a_loop(batch):
    targets = make_videomae().targets(batch.clips)
    video = batch.clips.float() / 255
    for b, token in ((0, 0), (1, 5), (2, 7)):
        t, y, x = token // 4, token // 2 % 2, token % 2
        patch = video[b, :, 2 * t : 2 * t + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        patch = torch.stack([(c - c.mean()) / (c.std() + 1e-6) for c in patch])
        torch.testing.assert_close(targets[b, token].view(2, 8, 8, 3), patch.permute(1, 2, 3, 0))
    raw = make_videomae(normalize_targets=False).targets(batch.clips)
    assert torch.equal(raw[0, 0].view(2, 8, 8, 3), video[0, :, :2, :8, :8].permute(1, 2, 3, 0))


def test_hidden_pixels_do_not_reach_the_encoder(batch):
    objective = make_videomae()
    hidden = batch.clips.clone()
    hidden[:, :, :, 8:, :] = 0  # rows of the columns 2 and 3
    context = torch.tensor([[0, 1, 4, 5]]).expand(3, -1)
    with torch.no_grad():
        tokens = [objective.encoder(clips.float() / 255, context) for clips in (batch.clips, hidden)]
    assert torch.equal(*tokens)
