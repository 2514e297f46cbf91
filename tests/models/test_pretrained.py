import inspect

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torchvision.models import video

from tubelet.grid import ClipShape
from tubelet.models import ENCODERS, build_encoder, pretrained
from tubelet.models.pretrained import R3D, S3D, FramewiseViT, VideoSwin

# Library model, adapter, and a clip size that the forward pass of the library accepts.
LIBRARY = {
    "video_swin_tiny": (lambda n: video.swin3d_t(num_classes=n), VideoSwin, (4, 64, 32)),
    "r3d_18": (lambda n: video.r3d_18(num_classes=n), R3D, (9, 32, 48)),
    "s3d": (lambda n: video.s3d(num_classes=n), S3D, (16, 224, 224)),
}
SIZES = {"img_size": 32, "num_frames": 8, "patch_size": 16, "tubelet_size": 2}
ALL = [*LIBRARY, "mvit_v2_small", "image_vit_tiny"]


def clips(batch=1, frames=8, height=32, width=32, seed=1):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))


def make(name, **arguments):
    torch.manual_seed(0)
    factory = getattr(pretrained, name)
    sizes = {size: value for size, value in SIZES.items() if size in inspect.signature(factory).parameters}
    return factory(**{**sizes, **arguments}).eval()


@pytest.mark.parametrize("name", LIBRARY)
def test_logits_equal_the_library_model_with_weights_from_a_file(name, tmp_path):
    torch.manual_seed(1)
    build, adapter, size = LIBRARY[name]
    reference = build(5).eval()
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    model = adapter(num_classes=5, weights=str(tmp_path / "weights.pth")).eval()
    x = clips(1, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("video_swin_small", video.swin3d_s),
        ("video_swin_base", video.swin3d_b),
        ("mvit_v2_small", video.mvit_v2_s),
    ],
)
def test_sizes_equal_those_of_the_library(name, build):
    with torch.device("meta"):
        model, reference = make(name, num_classes=5).model, build(num_classes=5)
    assert str(model) == str(reference)
    model.load_state_dict(reference.state_dict(), assign=True)


def test_mvit_for_other_clips_equals_a_library_model_of_that_size():
    """The library fixes the size at construction; its relative positions then equal the interpolated ones."""
    model = make("mvit_v2_small", num_classes=5)
    state = model.model.state_dict()
    settings = [
        video.mvit.MSBlockConfig(
            num_heads=block.attn.num_heads,
            input_channels=block.norm1.normalized_shape[0],
            output_channels=block.mlp[3].out_features,
            kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3],
            stride_q=list(block.attn.pool_q.pool.stride), stride_kv=list(block.attn.pool_k.pool.stride),
        )
        for block in model.model.blocks
    ]  # fmt: skip
    reference = video.MViT(
        spatial_size=(64, 64), temporal_size=8, block_setting=settings, residual_pool=True,
        residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True, num_classes=5,
    ).eval()  # fmt: skip
    for name, value in reference.state_dict().items():
        if state[name].shape != value.shape:
            assert "rel_pos" in name
            resampled = nn.functional.interpolate(state[name].T[None], size=len(value), mode="linear")[0].T
            state[name] = resampled
    reference.load_state_dict(state)
    x = clips(1, 8, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


def test_image_vit_equals_a_loop_over_frames(tmp_path):
    torch.manual_seed(1)
    reference = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=5).eval()
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    model = make("image_vit_tiny", img_size=(32, 48), num_classes=5, weights=str(tmp_path / "weights.safetensors"))
    x = clips(2, 8, 32, 48)
    with torch.no_grad():
        logits = torch.stack([reference(frame) for frame in x.unbind(2)]).mean(0)
        torch.testing.assert_close(model(x), logits, atol=1e-5, rtol=0)
        tokens = [reference.forward_features(frame)[:, 1:] for frame in x.unbind(2)]
        pooled = torch.cat([(tokens[i] + tokens[i + 1]) / 2 for i in range(0, 8, 2)], dim=1)
        torch.testing.assert_close(model.forward_features(x), pooled, atol=1e-5, rtol=0)


def test_image_vit_positions_are_resampled_as_in_timm(tmp_path):
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    model = make("image_vit_tiny", img_size=64, num_classes=5, weights=str(tmp_path / "weights.pth"))
    reference.set_input_size((64, 64))
    x = clips(1, 2, 64, 64)
    with torch.no_grad():
        expected = (reference(x[:, :, 0]) + reference(x[:, :, 1])) / 2
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_in_time_major_order(name):
    """A change of the last frames affects the last tokens most; shapes are those of grid_size."""
    model, x = make(name), clips(1, 14, 32, 64)
    t, h, w = model.grid_size(14, 32, 64)
    with torch.no_grad():
        tokens = model(x)
        assert tokens.shape == (1, t * h * w, model.embed_dim)
        assert torch.equal(model.forward_features(x), tokens)
        other = x.clone()
        other[:, :, -2:] += 3
        changed = (model(other) - tokens).abs().mean(-1).view(t, h * w).mean(1)
        assert changed.argmax() == t - 1 > 0
    assert model.embed_dim % model.num_heads == 0


@pytest.mark.parametrize("name", ["r3d_18", "s3d"])
def test_grid_of_convolutional_networks_equals_the_feature_shape(name):
    model = make(name)
    for frames, height, width in ((5, 17, 31), (9, 33, 50), (13, 49, 17)):
        x = clips(1, frames, height, width)
        with torch.no_grad():
            assert tuple(model.features(x).shape[2:]) == model.grid_size(frames, height, width)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("video_swin_tiny", {}),
        ("video_swin_tiny", {"patch": (2, 4, 2), "depths": (1, 1), "window_size": (2, 3, 3)}),
        ("mvit_v2_small", {}),
        ("mvit_v2_small", {"embed_dim": 32, "depths": (1, 2, 1)}),
    ],
)
def test_grid_of_transformers_equals_the_number_of_tokens(name, arguments):
    model = make(name, **arguments)
    for frames, height, width in ((2, 4, 8), (6, 36, 68)):
        with torch.no_grad():
            tokens = model(clips(1, frames, height, width))
        t, h, w = model.grid_size(frames, height, width)
        assert tokens.shape[1] == t * h * w


@pytest.mark.parametrize("num_classes", [0, 3, 5])
def test_head_is_loaded_if_the_number_of_classes_matches(num_classes, tmp_path):
    torch.manual_seed(1)
    reference = video.s3d(num_classes=5).eval()
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    model = make("s3d", num_classes=num_classes, weights=str(tmp_path / "weights.pth")).model
    assert torch.equal(model.features[0][0][0].weight, reference.features[0][0][0].weight)
    if num_classes:
        assert len(model.classifier[1].weight) == num_classes
        assert num_classes != 5 or torch.equal(model.classifier[1].weight, reference.classifier[1].weight)
    else:
        assert not any("classifier" in name for name in model.state_dict())


def test_invalid_weights_files_raise(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="no such file.*not downloaded"):
        make("s3d", weights=str(path))
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        make("s3d", weights=str(path))
    torch.save(nn.Linear(2, 2), path)  # a pickled module, which is not loaded because unpickling runs code
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        make("s3d", weights=str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="contains a list"):
        make("s3d", weights=str(path))
    state = video.s3d().state_dict()
    del state["features.0.0.0.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"do not match this S3D[^$]*Missing key[^$]*features.0.0.0.weight"):
        make("s3d", weights=str(path))
    (tmp_path / "weights.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        make("s3d", weights=str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("video_swin_tiny", (3, 32, 32), "patches of 2x4x4 for Video Swin"),
        ("video_swin_tiny", (4, 30, 32), "use multiples of these"),
        ("s3d", (4, 32, 32), "at least 5 frames"),
        ("s3d", (8, 16, 32), "at least 5 frames of 17x17"),
        ("image_vit_tiny", (3, 32, 32), "num_frames 3 is not divisible by tubelet_size 2"),
        ("image_vit_tiny", (8, 40, 32), "crop_size 40x32 is not divisible by patch_size 16"),
    ],
)
def test_invalid_clips_raise(name, size, message):
    with torch.device("meta"):
        model = make(name)
    with pytest.raises(ValueError, match=message):
        model(clips(1, *size))
    with pytest.raises(ValueError, match="takes clips"):
        model(clips()[:, :, 0])


def test_head_dim_of_video_swin_must_divide_the_width():
    with pytest.raises(ValueError, match="head_dim 32 does not divide embed_dim 48"):
        make("video_swin_tiny", embed_dim=48)


@pytest.mark.parametrize(
    ("timm_name", "message"),
    [("vit_tiny_patch16_225", "Did you mean 'vit_tiny_patch16_224'"), ("resnet18", "not an image ViT")],
)
def test_other_timm_models_raise(timm_name, message):
    with pytest.raises(ValueError, match=message):
        FramewiseViT(timm_name)


@pytest.mark.parametrize("name", sorted(name for name in vars(pretrained) if name in ENCODERS.available()))
def test_configuration_builds_every_factory(name):
    with torch.device("meta"):
        encoder = build_encoder({"name": name, "num_classes": 7}, ClipShape(16, 64))
    assert encoder.num_classes == 7


def test_a_weights_file_is_checked_on_the_meta_device(tmp_path, recwarn):
    torch.save(video.s3d().state_dict(), tmp_path / "weights.pth")
    weights = str(tmp_path / "weights.pth")
    with torch.device("meta"):
        build_encoder({"name": "s3d", "weights": weights}, ClipShape(16, 64))
        assert not [str(warning.message) for warning in recwarn if "no-op" in str(warning.message)]
        with pytest.raises(ValueError, match="do not match this VideoResNet"):
            build_encoder({"name": "r3d_18", "weights": weights}, ClipShape(16, 64))
