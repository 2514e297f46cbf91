import inspect

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torchvision.models import video

from tubelet.config import ConfigError, check
from tubelet.models import ModelConfig, build_encoder, factories
from tubelet.models.pretrained import R3D, S3D, FramewiseViT, VideoSwin

# How the library makes the model, our adapter of it, and a clip size that the library's own forward pass takes.
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
    factory = factories("pretrained")[name]
    sizes = {size: value for size, value in SIZES.items() if size in inspect.signature(factory).parameters}
    return factory(**{**sizes, **arguments}).eval()


@pytest.mark.parametrize("name", LIBRARY)
def test_logits_equal_the_library_model_with_the_same_weights_from_a_file(name, tmp_path):
    torch.manual_seed(1)
    build, adapter, size = LIBRARY[name]
    theirs = build(5).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = adapter(num_classes=5, weights=str(tmp_path / "weights.pth")).eval()
    x = clips(1, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("video_swin_small", video.swin3d_s),
        ("video_swin_base", video.swin3d_b),
        ("mvit_v2_small", video.mvit_v2_s),
    ],
)
def test_published_sizes_are_those_of_the_library(name, build):
    with torch.device("meta"):
        ours, theirs = make(name, num_classes=5).model, build(num_classes=5)
    assert str(ours) == str(theirs)
    ours.load_state_dict(theirs.state_dict(), assign=True)


def test_mvit_at_another_size_equals_the_library_model_built_for_it():
    """The library fixes the size when building; its relative positions of that size are the interpolated ones."""
    ours = make("mvit_v2_small", num_classes=5)
    state = ours.model.state_dict()
    settings = [
        video.mvit.MSBlockConfig(
            num_heads=block.attn.num_heads,
            input_channels=block.norm1.normalized_shape[0],
            output_channels=block.mlp[3].out_features,
            kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3],
            stride_q=list(block.attn.pool_q.pool.stride), stride_kv=list(block.attn.pool_k.pool.stride),
        )
        for block in ours.model.blocks
    ]  # fmt: skip
    theirs = video.MViT(
        spatial_size=(64, 64), temporal_size=8, block_setting=settings, residual_pool=True,
        residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True, num_classes=5,
    ).eval()  # fmt: skip
    for name, value in theirs.state_dict().items():
        if state[name].shape != value.shape:
            assert "rel_pos" in name
            resampled = nn.functional.interpolate(state[name].T[None], size=len(value), mode="linear")[0].T
            state[name] = resampled
    theirs.load_state_dict(state)
    x = clips(1, 8, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_image_vit_equals_a_loop_over_frames(tmp_path):
    torch.manual_seed(1)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=5).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = make("image_vit_tiny", img_size=(32, 48), num_classes=5, weights=str(tmp_path / "weights.safetensors"))
    x = clips(2, 8, 32, 48)
    with torch.no_grad():
        logits = torch.stack([theirs(frame) for frame in x.unbind(2)]).mean(0)
        torch.testing.assert_close(ours(x), logits, atol=1e-5, rtol=0)
        tokens = [theirs.forward_features(frame)[:, 1:] for frame in x.unbind(2)]
        pooled = torch.cat([(tokens[i] + tokens[i + 1]) / 2 for i in range(0, 8, 2)], dim=1)
        torch.testing.assert_close(ours.forward_features(x), pooled, atol=1e-5, rtol=0)


def test_image_vit_positions_of_another_size_are_resampled_as_by_timm(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = make("image_vit_tiny", img_size=64, num_classes=5, weights=str(tmp_path / "weights.pth"))
    theirs.set_input_size((64, 64))
    x = clips(1, 2, 64, 64)
    with torch.no_grad():
        expected = (theirs(x[:, :, 0]) + theirs(x[:, :, 1])) / 2
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_tokens_fill_the_grid_in_time_major_order(name):
    """A change of the last frames changes the last tokens most; shapes are those of grid_size."""
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
def test_grid_is_that_of_the_features_for_all_sizes(name):
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
def test_grid_of_transformers_is_that_of_the_features(name, arguments):
    model = make(name, **arguments)
    for frames, height, width in ((2, 4, 8), (6, 36, 68)):
        with torch.no_grad():
            tokens = model(clips(1, frames, height, width))
        t, h, w = model.grid_size(frames, height, width)
        assert tokens.shape[1] == t * h * w


@pytest.mark.parametrize("num_classes", [0, 3, 5])
def test_head_of_a_file_is_taken_where_it_has_as_many_classes(num_classes, tmp_path):
    torch.manual_seed(1)
    theirs = video.s3d(num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = make("s3d", num_classes=num_classes, weights=str(tmp_path / "weights.pth")).model
    assert torch.equal(ours.features[0][0][0].weight, theirs.features[0][0][0].weight)
    if num_classes:
        assert len(ours.classifier[1].weight) == num_classes
        assert num_classes != 5 or torch.equal(ours.classifier[1].weight, theirs.classifier[1].weight)
    else:
        assert not any("classifier" in name for name in ours.state_dict())


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="no such file.*nothing is downloaded"):
        make("s3d", weights=str(path))
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        make("s3d", weights=str(path))
    torch.save(nn.Linear(2, 2), path)  # a whole module, which only unpickling code can restore: it is not run
    with pytest.raises(ValueError, match="cannot be read as weights"):
        make("s3d", weights=str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        make("s3d", weights=str(path))
    state = video.s3d().state_dict()
    del state["features.0.0.0.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"not of S3D of this size[^$]*Missing key[^$]*features.0.0.0.weight"):
        make("s3d", weights=str(path))
    (tmp_path / "weights.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        make("s3d", weights=str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("video_swin_tiny", (3, 32, 32), "patches of 2x4x4"),
        ("video_swin_tiny", (4, 30, 32), "take multiples of these"),
        ("s3d", (4, 32, 32), "at least 5 frames"),
        ("s3d", (8, 16, 32), "at least 5 frames of 17x17"),
        ("image_vit_tiny", (3, 32, 32), "take a multiple of the tubelet size"),
        ("image_vit_tiny", (8, 40, 32), "patches of 16"),
    ],
)
def test_clips_that_do_not_fit_are_refused(name, size, message):
    with torch.device("meta"):
        model = make(name)
    with pytest.raises(ValueError, match=message):
        model(clips(1, *size))
    with pytest.raises(ValueError, match="takes clips"):
        model(clips()[:, :, 0])


def test_heads_of_swin_divide_its_width():
    with pytest.raises(ValueError, match="heads of width 32 do not divide the width 48"):
        make("video_swin_tiny", embed_dim=48)


@pytest.mark.parametrize(
    ("timm_name", "message"),
    [("vit_tiny_patch16_225", "Did you mean 'vit_tiny_patch16_224'"), ("resnet18", "not an image ViT")],
)
def test_other_timm_models_are_refused(timm_name, message):
    with pytest.raises(ValueError, match=message):
        FramewiseViT(timm_name)


@pytest.mark.parametrize("name", sorted(factories("pretrained")))
def test_configuration_builds_every_factory(name):
    model = ModelConfig(encoder="pretrained", model_name=name, encoder_args={"num_classes": 7})
    with torch.device("meta"):
        encoder = build_encoder(model, crop_size=64, num_frames=16, patch_size=16, tubelet_size=2)
    assert encoder.num_classes == 7


def test_configuration_checks_a_weights_file_before_training(tmp_path, recwarn):
    torch.save(video.s3d().state_dict(), tmp_path / "weights.pth")
    arguments = {"weights": str(tmp_path / "weights.pth")}
    check({"encoder": "pretrained", "model_name": "s3d", "encoder_args": arguments}, ModelConfig, "file.yaml")
    assert not [str(warning.message) for warning in recwarn if "no-op" in str(warning.message)]
    with pytest.raises(ConfigError, match="not of VideoResNet of this size"):
        check({"encoder": "pretrained", "model_name": "r3d_18", "encoder_args": arguments}, ModelConfig, "file.yaml")
