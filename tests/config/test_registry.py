"""Parts are found by name inside and outside of the package, and their options follow from their constructors."""

import functools
import importlib.metadata
import pickle
import sys
import textwrap

import pytest
import torch
from pydantic import ValidationError

from tubelet import config
from tubelet.config import Config, ConfigError
from tubelet.config.factories import Factory, product
from tubelet.config.registry import Module, find
from tubelet.grid import ClipShape
from tubelet.masks import MASKS, build_collator
from tubelet.models import ENCODERS, PREDICTORS, EncoderOptions, build_encoder, build_predictor

CLIP = ClipShape(num_frames=4, crop_size=(16, 32), patch_size=8, tubelet_size=2)

# As a user writes them: `from __future__` makes strings of the annotations, and `partial` is imported.
MY_ENCODER = """
    from __future__ import annotations

    from collections.abc import Callable, Sequence
    from functools import partial
    from typing import Literal

    import torch
    from pydantic import PositiveInt
    from torch import nn

    from tubelet.models.vision_transformer import vit_tiny


    class MyEncoder(nn.Module):
        accepts_masks = False

        def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int = 16,
            num_frames: int = 16,
            embed_dim: PositiveInt = 96,
            kind: Literal["a", "b"] = "a",
            window: tuple[int, int] = (2, 2),
            layers: Sequence[int] | None = None,
            act_layer: Callable[[], nn.Module] = nn.GELU,
            like: nn.Module | None = None,
            bias=False,
            *,
            scale: float = 1.0,
        ):
            super().__init__()
            self.given = (img_size, patch_size, num_frames, embed_dim, kind, window, layers, bias, scale)
            self.embed_dim, self.num_heads = embed_dim, 2


    my_tiny = partial(MyEncoder, embed_dim=24)
    my_tiny_b = partial(my_tiny, kind="b")


    def my_large(scale: float = 3.0) -> MyEncoder:
        return MyEncoder(embed_dim=768, scale=scale)


    def number() -> int:
        return 3
"""
MY_PREDICTOR = """
    from torch import nn


    class MyPredictor(nn.Module):
        use_mask_tokens = True

        def __init__(self, embed_dim: int, predictor_embed_dim: int = 8, num_heads: int = 4, num_mask_tokens: int = 1):
            super().__init__()
            self.given = (embed_dim, predictor_embed_dim, num_heads, num_mask_tokens)
"""
MY_MASK = """
    from tubelet.config import Config
    from tubelet.masks import random_tube


    class MaskConfig(Config):
        name: str = "my_package.my_mask"
        ratio: float = 0.5


    class Sampler(random_tube.Sampler):
        pass
"""


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    folder = tmp_path / "my_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name, text in (("my_encoder", MY_ENCODER), ("my_predictor", MY_PREDICTOR), ("my_mask", MY_MASK)):
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    (folder / "broken.py").write_text("import a_module_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_package"
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def test_a_class_and_a_factory_in_a_file_are_all_that_an_encoder_needs(my_package):
    for options in (
        {"name": "my_tiny", "module": "my_package.my_encoder", "window": [1, 3], "scale": 2.0},
        {"name": "my_package.my_encoder.my_tiny", "window": [1, 3], "scale": 2.0},
    ):
        encoder = build_encoder(options, CLIP)
        assert encoder.given == ((16, 32), 8, 4, 24, "a", (1, 3), None, False, 2.0)
        assert encoder.built_from["encoder"]["name"] == "my_package.my_encoder.my_tiny"
        assert (
            build_encoder(encoder.built_from["encoder"], ClipShape(**encoder.built_from["clip"])).given == encoder.given
        )
    assert build_encoder("my_package.my_encoder.my_tiny_b", CLIP).given[4] == "b"
    assert build_encoder("my_package.my_encoder.MyEncoder", CLIP).embed_dim == 96
    assert build_encoder("my_package.my_encoder.my_large", CLIP).given[-1] == 3.0


def test_options_are_the_arguments_that_yaml_can_express(my_package):
    schema = type(ENCODERS.parse("my_package.my_encoder.my_tiny"))
    assert list(schema.model_fields) == ["name", "embed_dim", "kind", "window", "layers", "bias", "scale"]
    assert schema.model_fields["embed_dim"].default == 24
    assert ENCODERS.parse({"name": "my_package.my_encoder.my_tiny", "layers": [1, 2]}).layers == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dm": 3}, r"embed_dm: unknown key\. Did you mean 'embed_dim'"),
        ({"embed_dim": "24"}, r"embed_dim: .*valid integer"),
        ({"embed_dim": 0}, r"embed_dim: .*greater than 0"),
        ({"kind": "c"}, r"kind: .*'a' or 'b'"),
        ({"window": [1, 2, 3]}, r"window"),
        ({"num_frames": 3}, r"num_frames: unknown key"),
        ({"act_layer": "gelu"}, r"act_layer: unknown key"),
        (
            {"name": "my_package.my_encoder.my_tin"},
            r"name: 'my_tin': not in my_package\.my_encoder\. Did you mean 'my_tiny",
        ),
        ({"name": "my_package.my_encoder.number"}, r"name: 'number': not one of the encoders"),
        ({"name": "my_package.my_encodr.my_tiny"}, r"name: 'my_package\.my_encodr': cannot be imported"),
        ({"name": "my_tin", "module": "my_package.my_encoder"}, r"name: 'my_tin': not in my_package\.my_encoder"),
    ],
)
def test_options_of_own_encoders_are_checked(my_package, options, message):
    class Options(Config):
        encoder: EncoderOptions

    with pytest.raises(ConfigError, match=rf"encoder\.{message}"):
        config.check({"encoder": {"name": "my_package.my_encoder.my_tiny", **options}}, Options, "file.yaml")


def test_an_error_inside_of_a_module_is_not_hidden(my_package):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
        find("masks", "my_package.broken")


def test_an_imported_factory_is_none_of_the_file(tmp_path, monkeypatch):
    """my_encoder.py imports vit_tiny and partial; listing takes what a file defines."""
    folder = tmp_path / "zoo_of_mine"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text(textwrap.dedent(MY_ENCODER))
    (folder / "b.py").write_text("from zoo_of_mine.a import my_tiny\nmine = my_tiny\n")
    monkeypatch.syspath_prepend(tmp_path)
    kind = Factory("encoders", "zoo_of_mine", marker="accepts_masks")
    assert sorted(kind.available()) == ["mine", "my_large", "my_tiny", "my_tiny_b"]
    with pytest.raises(ConfigError, match=r"'vit_tiny': not among the encoders"):
        kind.find("vit_tiny")


def test_a_name_in_two_files_needs_the_module(tmp_path, monkeypatch):
    folder = tmp_path / "two_files"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name in ("a", "b"):
        (folder / f"{name}.py").write_text(
            textwrap.dedent(MY_ENCODER).replace("embed_dim=24", f"embed_dim=2{len(name)}")
        )
    monkeypatch.syspath_prepend(tmp_path)
    kind = Factory("encoders", "two_files", marker="accepts_masks")
    with pytest.raises(ValidationError, match=r"'my_tiny' is defined in two_files\.a and two_files\.b; add module"):
        kind.parse("my_tiny")
    assert kind.parse({"name": "my_tiny", "module": "b"}).name == "two_files.b.my_tiny"


def test_factory_names_are_unique_in_the_package():
    names = [name for file in set(map(module_of, ENCODERS.available().values())) for name in defined_in(file)]
    assert len(names) == len(set(names)) == len(ENCODERS.available())


def module_of(factory):
    return product(factory).__module__


def defined_in(module):
    return ENCODERS._parts_of(module)


def test_own_predictors(my_package):
    encoder = build_encoder({"name": "vit_tiny", "depth": 1}, CLIP)
    for options, num_heads in (({}, encoder.num_heads), ({"num_heads": 5, "embed_dim": 16}, 5)):
        predictor = build_predictor({"name": "my_package.my_predictor.MyPredictor", **options}, encoder, CLIP, 7)
        assert predictor.given == (192, options.get("embed_dim", 8), num_heads, 7)
    with pytest.raises(ValidationError, match="not one of the predictors"):
        PREDICTORS.parse("tubelet.models.vision_transformer.vit_tiny")
    with pytest.raises(ValidationError, match="not among the predictors. Did you mean 'vision_transformer_predictor'"):
        PREDICTORS.parse("vision_transformer_predicto")


def test_own_masks(my_package):
    masks = build_collator(
        ["my_package.my_mask", {"name": "multiblock3d", "spatial_scale": [0.2, 0.2]}], ClipShape(4, 64)
    )
    assert [config.name for config in masks.configs] == ["my_package.my_mask", "multiblock3d"]
    assert masks.configs[0].ratio == 0.5


class EntryPoints:
    """Installed packages with these entry points: {(group, name): value}."""

    def __init__(self, values):
        self.values = values

    def __call__(self, group):
        return [
            importlib.metadata.EntryPoint(name, value, group)
            for (of_group, name), value in self.values.items()
            if of_group == group
        ]


def test_entry_points(my_package, monkeypatch):
    installed = {
        ("tubelet.encoders", "theirs"): "my_package.my_encoder:my_tiny",
        ("tubelet.masks", "their_mask"): "my_package.my_mask",
        ("tubelet.encoders", "vit_tiny"): "my_package.my_encoder:my_tiny",
    }
    monkeypatch.setattr(importlib.metadata, "entry_points", EntryPoints(installed))
    assert build_encoder("theirs", CLIP).embed_dim == 24
    assert build_encoder("vit_tiny", CLIP).embed_dim == 192, "the package's own come first"
    assert build_collator(["their_mask"], ClipShape(4, 64)).configs[0].name == "their_mask"
    with pytest.raises(ValidationError, match="Did you mean 'their_mask'"):
        MASKS.parse("their_mas")
    with pytest.raises(ValidationError, match="Did you mean 'theirs'"):
        ENCODERS.parse("theirss")


def test_an_options_class_declares_the_name(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("")
    text = "from tubelet.config import Config\nclass MaskConfig(Config):\n    x: int = 3\n"
    (tmp_path / "own" / "nameless.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"own\.nameless\.MaskConfig: has to be .* that declares `name: str`"):
        Module("masks", "MaskConfig").parse("own.nameless")


def test_options_travel_to_other_processes():
    options = ENCODERS.parse({"name": "windowed_tiny", "window_size": [1, 2, 2]})
    again = pickle.loads(pickle.dumps(options))
    assert again == options
    assert type(again) is type(options)


def test_the_options_class_of_a_factory_is_made_once():
    assert type(ENCODERS.parse("vit_tiny")) is type(ENCODERS.parse({"name": "vit_tiny", "depth": 3}))
    assert type(ENCODERS.parse("vit_tiny")) is not type(ENCODERS.parse("vit_small"))


def test_options_survive_being_written(tmp_path):
    class Options(Config):
        encoder: EncoderOptions

    for name in ENCODERS.available():
        options = Options(encoder=name)
        (tmp_path / "config.yaml").write_text(config.dump(options))
        assert config.load(tmp_path / "config.yaml", [], Options) == options


def test_options_of_a_partial_keep_what_it_binds():
    factory = functools.partial(ENCODERS.find("vit_tiny"), depth=2, use_rope=True)
    assert product(factory) is product(ENCODERS.find("vit_tiny"))
    from tubelet.config.factories import options_class

    options = options_class(ENCODERS, factory)(name="own")
    assert (options.depth, options.use_rope, options.embed_dim) == (2, True, 192)


def test_build_on_the_meta_device_uses_the_real_sizes():
    with torch.device("meta"):
        encoder = build_encoder({"name": "vit_large", "use_rope": True}, ClipShape(16, (224, 320)))
        assert encoder.grid == (8, 14, 20)
        predictor = build_predictor({}, encoder, ClipShape(16, (224, 320)), num_mask_tokens=2)
    assert predictor.positions.grid == (8, 14, 20)
    with pytest.raises(
        ValueError, match=r"crop_size 225 is not divisible by patch_size 16; the nearest valid size is 224"
    ):
        build_encoder("vit_tiny", ClipShape(16, 225))


@pytest.mark.parametrize("name", [".", "..x", "my_package..x", "my-package.x"])
@pytest.mark.parametrize("part", [MASKS, ENCODERS])
def test_names_that_are_no_module_are_refused(part, name):
    with pytest.raises(ValueError, match="not the name of a module|cannot be imported"):
        part.parse(name)


def test_module_without_a_package_is_found(tmp_path, monkeypatch):
    (tmp_path / "lone_mask.py").write_text(
        "from tubelet.config import Config\nclass MaskConfig(Config):\n    name: str = 'lone_mask'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert MASKS.parse("lone_mask").name == "lone_mask"


def test_importable_module_that_is_no_part_is_refused():
    with pytest.raises(
        ValueError, match="'json': not in tubelet/masks.*The importable module 'json' has no MaskConfig"
    ):
        MASKS.parse("json")


def test_options_that_are_no_config_are_refused(tmp_path, monkeypatch):
    (tmp_path / "plain_mask.py").write_text("class MaskConfig:\n    name: str = 'plain_mask'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="plain_mask.MaskConfig: has to be a subclass of tubelet.config.Config"):
        MASKS.parse("plain_mask")


def test_only_formats_are_listed_as_formats():
    part = Module("data", "FormatOptions", provides="Dataset")
    assert part.available() == [
        *("image_dataset", "kth", "mixed_dataset", "moving_mnist", "sounding_videos", "video_dataset", "webdataset")
    ]
