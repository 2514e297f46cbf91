"""Configurations: errors are raised before anything is read, with the file, the key and the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tubelet import config
from tubelet.config import ConfigError

ROOT = Path(__file__).parents[2]


def options_of(program):
    if program == "vjepa":
        from app.vjepa.options import Options
    else:
        from evals.video_classification_frozen.eval import Options
    return Options


# What is changed in configs/pretrain/base.yaml, and what the error must say.
BROKEN = [
    ("data.bach_size=4", r"data\.bach_size: unknown key\. Did you mean 'batch_size'\?"),
    ("dat.batch_size=4", r"dat: unknown key\. Did you mean 'data'\?"),
    ("optimization.learning_rate=1", r"optimization\.learning_rate: unknown key"),
    ("data.batch_size=twenty", r"data\.batch_size: .*valid integer.*'twenty'"),
    ("data.batch_size=2.5", r"data\.batch_size: .*integer.*2\.5"),
    ("data.batch_size=0", r"data\.batch_size: .*greater than or equal to 1"),
    ("optimization.lr='1e-3'", r"optimization\.lr: .*valid number"),
    ("optimization.lr=0", r"optimization\.lr: .*greater than 0"),
    ("optimization.ema=[0.9]", r"optimization\.ema\.1: required"),
    ("optimization.ema=[0.9, 1.2]", r"optimization\.ema: momentum lies between 0 and 1"),
    ("optimization.warmup=1000", r"optimization: warmup: 1000.* do not fit into 300 epochs"),
    ("optimization.accumulation_steps=5", r"accumulation_steps: 5 does not divide batch_size 24"),
    ("data.crop_size=225", r"data: crop_size 225 is not divisible by patch_size 16; the nearest valid size is 224"),
    ("data.num_frames=15", r"data: num_frames 15 is not divisible by tubelet_size 2"),
    ("data.fps=4.0", r"data: sampling_rate and fps given; keep exactly one"),
    ("data.sampling_rate=null", r"data: .*give one of sampling_rate, fps, clip_duration"),
    ("data.datasets=[]", r"data\.datasets: .*at least 1 item"),
    ("data.datasets=videos", r"data\.datasets: .*valid list"),
    ("data.datasets_weights=[1.0, 2.0]", r"data: datasets_weights has 2 entries for 1 datasets"),
    ("data.decoder=ffmpeg", r"data\.decoder.*'decord', 'pyav' or 'torchcodec'"),
    ("data.decoder.seek_mode=approximate", r"data\.decoder: seek_mode approximate is an option of torchcodec"),
    (
        "data.decoder={name: torchcodec, device: cuda}",
        r"data: decoder.device cuda with num_workers .* set num_workers to 0",
    ),
    ("data.dataset_type=VideoDatset", r"'VideoDatset'.*Did you mean 'video_dataset'\?"),
    ("data.mask_type=multiblok3d", r"data\.mask_type: 'multiblok3d'.*Did you mean 'multiblock3d'\?"),
    ("data.mask_type=default", r"data\.mask_type: 'default'.*Valid: multiblock3d, random_tube\."),
    ("data.dataset_type=generated", r"data\.dataset_type: 'generated': not in tubelet/data"),
    ("meta.seed=-1", r"meta\.seed: .*greater than or equal to 0"),
    ("data_aug.random_resize_scale=[1.0, 0.3]", r"data_aug: random_resize_scale .*0 < low <= high"),
    ("mask=[]", r"mask: this objective needs at least 1 mask"),
    ("mask.0.num_block=3", r"mask\.0\.num_block: unknown key\. Did you mean 'num_blocks'\?"),
    ("mask.1.spatial_scale=[0.5, 1.5]", r"mask\.1\.spatial_scale: .*no range of fractions"),
    ("mask.2.num_blocks=3", r"'2' is no index of a list of 2"),
    ("model.model_name=vit_larg", r"model\.model_name: 'vit_larg'.*Did you mean 'vit_large'\?"),
    ("model.encoder=vision_transformr", r"model\.encoder: 'vision_transformr'.*Did you mean 'vision_transformer'\?"),
    ("model.encoder_args={num_heads: 7}", r"7"),
    (
        "model={encoder: vivit, model_name: vivit_tiny, encoder_args: {num_classes: 5}}",
        r"encoder\.num_classes: .*last tokens.*remove it",
    ),
    ("model.encoder_args={out_layers: [1]}", r"encoder\.out_layers: .*last tokens.*remove it"),
    ("model.encoder_args={dept: 3}", r"model\.encoder_args\.dept: unknown key\. Did you mean 'depth'\?"),
    ("model.pred_num_heads=7", r"objective\.predictor: 7 heads"),
    ("model.pred_embed_dim=200", r"objective\.predictor: 16 heads do not divide the width 200"),
    ("model={use_mask_tokens: false, noise_beta: [0.1, 0.2]}", r"objective\.predictor: noise_beta"),
    (
        "model={use_mask_tokens: false, noise_schedule: vjepa, noise_beta: [0.9, 0.2]}",
        r"objective\.predictor: noise_beta",
    ),
    ("model.encoder=jepa", r"model\.encoder: 'jepa'.*Valid: .*vision_transformer"),
    ("model.pred_dept=3", r"model\.pred_dept: unknown key\. Did you mean 'pred_depth'\?"),
    ("model.use_silu=maybe", r"model\.use_silu: .*valid boolean"),
    ("loss.loss_ex=2.0", r"loss\.loss_ex: unknown key\. Did you mean 'loss_exp'\?"),
    ("encoder.name=vit_larg", r"encoder\.name: 'vit_larg'.*Did you mean 'vit_large'\?"),
    ("encoder={name: vit_larg}", r"encoder\.name: 'vit_larg'.*Did you mean 'vit_large'\?"),
    ("encoder.dept=3", r"encoder\.dept: unknown key\. Did you mean 'depth'\?"),
    ("encoder=3", r"encoder: expected the name of a part"),
    ("encoder.img_size=64", r"encoder\.img_size: unknown key"),
    ("encoder.use_rope=1", r"encoder\.use_rope: .*valid boolean"),
    ("encoder.depth=0", r"encoder\.depth: .*greater than 0"),
    ("encoder.name=nowhere.vit", r"encoder\.name: 'nowhere': cannot be imported"),
    ("encoder.name=tubelet.models.vivit.viv", r"encoder\.name: 'viv': not in tubelet\.models\.vivit"),
    ("encoder.name=tubelet.layers.Block", r"encoder\.name: 'Block': not one of the encoders.*accepts_masks"),
    ("objective.predictor.dept=1", r"objective\.predictor\.dept: unknown key\. Did you mean 'depth'\?"),
    ("objective.predictor.noise_schedule=cosin", r"objective\.predictor\.noise_schedule: .*'cosine', 'linear' or"),
    ("data.format=video_datset", r"data\.format\.name: .*Did you mean 'video_dataset'\?"),
    ("data.crop_size=[224]", r"data\.crop_size: expected pixels, one number for a square or \[height, width\], got"),
    ("data.crop_size=[224, 0]", r"data\.crop_size: expected pixels, one number for a square or \[height, width\], got"),
    ("mask.0.name=multiblock", r"mask\.0\.name: 'multiblock'.*Did you mean 'multiblock3d'\?"),
    ("meta.dtype=fp8", r"meta\.dtype: .*'bfloat16', 'float16' or 'float32'"),
    ("loss.loss_exp=-1", r"loss\.loss_exp: .*greater than 0"),
    ("folder", r"an override is written key\.path=value"),
    ("optimization.lr.x=1", r"'lr' is a single value, it has no key below it"),
]


@pytest.mark.parametrize(("override", "message"), BROKEN, ids=[override for override, _ in BROKEN])
def test_broken_pretraining(override, message):
    good = ["folder=runs/x", "data.datasets=[/videos]"]
    with pytest.raises(ConfigError, match=message) as error:
        config.load(ROOT / "configs/pretrain/base.yaml", [*good, override], options_of("vjepa"))
    assert "base.yaml" in str(error.value) or override in str(error.value)


def test_every_error_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        config.load(ROOT / "configs/pretrain/base.yaml", ["data.bach_size=1", "meta.sed=2"], options_of("vjepa"))
    assert "data.bach_size" in str(error.value)
    assert "meta.sed" in str(error.value)
    assert "folder: required" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- a list", "expected a mapping"),
        ("base: missing.yaml", r"missing\.yaml: no such file \(named as base"),
        ("base: self.yaml", "in a circle"),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.read(tmp_path / "self.yaml")


def test_bases_are_merged_key_by_key_and_lists_replaced(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {a: 1, b: 2}\nmask: [1, 2]\nlr: 1e-3\n")
    (tmp_path / "x.yaml").write_text("base: base.yaml\ndata: {b: 3}\nmask: [4]\n")
    assert config.read(tmp_path / "x.yaml", ["data.c=[5]"]) == {
        "data": {"a": 1, "b": 3, "c": [5]},
        "mask": [4],
        "lr": 0.001,
    }


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pretrain").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_pretraining_is_valid_and_survives_being_written(path, tmp_path):
    options = config.load(path, ["folder=runs/x"] + (["data.datasets=[v]"] if path.name == "base.yaml" else []),
                          options_of("vjepa"))  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.dump(options))
    assert config.load(tmp_path / "config.yaml", [], options_of("vjepa")) == options


PUBLISHED = {
    "vjepa_vitl16": ("vit_large", 224, 24, 384),
    "vjepa_vith16": ("vit_huge", 224, 24, 384),
    "vjepa_vith16_384": ("vit_huge", 384, 10, 384),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_v_jepa_select_what_was_published(name):
    encoder, crop_size, batch_size, predictor_width = PUBLISHED[name]
    options = config.load(ROOT / f"configs/pretrain/{name}.yaml", [], options_of("vjepa"))
    assert (options.encoder.name, options.data.crop_size, options.data.batch_size) == (encoder, crop_size, batch_size)
    assert options.data.mask_batch_size == batch_size
    assert [mask.num_blocks for mask in options.mask] == [8, 2]
    assert [mask.spatial_scale for mask in options.mask] == [(0.15, 0.15), (0.7, 0.7)]
    assert [mask.truncate for mask in options.mask] == ["first", "first"]
    objective, optimization = options.objective, options.optimization
    for part in (options.encoder, objective.predictor):
        assert (part.uniform_power, part.use_rope, part.depth_scaled_init, part.init_std) == (True, False, False, 0.02)
    assert (objective.predictor.depth, objective.predictor.embed_dim) == (12, predictor_width)
    assert objective.predictor.num_heads is None, "the encoder's"
    assert (objective.ema, objective.loss_exp, objective.predictor.use_mask_tokens) == ((0.998, 1.0), 1.0, True)
    assert (optimization.start_lr, optimization.lr, optimization.final_lr) == (2e-4, 6.25e-4, 1e-6)
    assert (optimization.warmup, optimization.epochs, optimization.ipe, optimization.ipe_scale) == (40, 300, 300, 1.25)
    assert (optimization.clip_grad, optimization.clip_separately, optimization.clip_start_epoch) == (10.0, True, 41)


def test_the_file_of_v_jepa_2_selects_what_was_published():
    options = config.load(ROOT / "configs/pretrain/vjepa2_vitl16_256.yaml", [], options_of("vjepa"))
    for part in (options.encoder, options.objective.predictor):
        assert (part.use_rope, part.rope_pairing, part.depth_scaled_init) == (True, "vjepa2", True)
    assert options.objective.predictor.num_heads == 12
    assert options.optimization.clip_grad is None


def test_an_error_on_the_command_line_is_one_message(tmp_path):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"app": "vjepaa"}))
    command = [sys.executable, "-m", "app.main", "--fname", str(tmp_path / "x.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Did you mean 'vjepa'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_videos_is_refused(tmp_path):
    from app.vjepa.train import main
    from tubelet.runtime.distributed import World

    (tmp_path / "empty").mkdir()
    overrides = [f"data.datasets=[{tmp_path}/empty]", f"folder={tmp_path}/run", "model.model_name=vit_tiny"]
    options = config.load(ROOT / "configs/pretrain/vitt16.yaml", overrides, options_of("vjepa"))
    with pytest.raises(ConfigError, match=r"data\.datasets: .*empty': no file of a known type"):
        main(options, World())


def test_an_override_of_one_mask_leaves_its_alias_alone():
    masks = config.read("configs/pretrain/demo.yaml", ["mask.0.num_blocks=7"])["mask"]
    assert masks[0]["num_blocks"] == 7
    assert masks[1]["num_blocks"] != 7


@pytest.mark.parametrize("name", ["motion", "my-task"])
def test_unknown_keys_are_told_in_sections_with_names_of_the_users(name):
    from app.study.options import Options as Study

    task = {"train": "a.csv", "test": "b.csv", "num_classes": 3, "num_clases": 3}
    with pytest.raises(ConfigError, match=rf"tasks\.{name}\.num_clases: unknown key\. Did you mean 'num_classes'"):
        config.check(
            {"folder": "x", "pretrain": {"fname": "f"}, "probe": {"fname": "g"}, "tasks": {name: task}}, Study, "f"
        )


def test_what_is_run_together_must_be_comparable():
    few = ["folder=x", "data.datasets=[x]", "loss.cov_coeff=1.0", "optimization.accumulation_steps=24"]
    options = config.load("configs/pretrain/base.yaml", few, options_of("vjepa"))
    options.check_batch_size(2)
    with pytest.raises(ConfigError, match="data.batch_size, or lower optimization.accumulation_steps"):
        options.check_batch_size(1)
    small = ["data.datasets=[x]", "data.batch_size=12"]
    options = config.load("configs/pretrain/vjepa_vith16.yaml", small, options_of("vjepa"))
    options.check_batch_size(2)
    with pytest.raises(ConfigError, match="data.mask_batch_size: 24 does not divide the 12 samples of 1 process"):
        options.check_batch_size(1)


def test_an_encoder_can_be_pretrained_on_rectangles():
    wide = ["folder=x", "data.datasets=[v]", "data.crop_size=[128,192]", "encoder.name=vit_tiny"]
    options = config.load(ROOT / "configs/pretrain/base.yaml", wide, options_of("vjepa"))
    assert options.mask_collator().grid == options.data.clip_shape.grid == (8, 8, 12)
