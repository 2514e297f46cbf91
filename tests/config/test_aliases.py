"""V-JEPA's keys and those of earlier versions mean the same as the present ones, whichever file they are in."""

import copy
import importlib
import logging
from pathlib import Path

import pytest
import yaml

from tubelet import config
from tubelet.config import ConfigError, translation
from tubelet.config.aliases import SHARED, TABLES
from tubelet.config.translation import to_canonical

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "vjepa": "app.vjepa.options",
    "classification": "app.classification.options",
    "generation": "app.generation.options",
    "video_classification_frozen": "evals.video_classification_frozen.eval",
    "image_classification_frozen": "evals.image_classification_frozen.eval",
}
# Pretrained encoders of torchvision, and programs without old keys.
PRETRAINED = ("image_vit", "mvit_v2", "r3d_18", "s3d", "video_swin")
NO_OLD_KEYS = (*PRETRAINED, "predictor_calibration_demo", "features", "knn", "retrieval", "clustering")
# What files that are bases of others leave out.
MISSING = ["folder=x"]
NO_ENCODER = ("supervised/demo", "supervised/real")  # studies fill it in
SHIPPED = [
    path
    for folder in ("pretrain", "generation", "supervised", "zoo", "evals")
    for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))
    if path.name != "base.yaml" and path.stem not in NO_OLD_KEYS
]


def options(raw):
    program = raw.get("app") or raw["eval_name"]
    return config.check(raw, importlib.import_module(PROGRAMS[program]).Options, "file.yaml")


def get(node, path):
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return ...
        node = node[key]
    return node


def pop(node, path):
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    return node.pop(last)


def put(node, path, value):
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value


def flat(raw):
    """Return a configuration with the old names of all keys that have one."""
    raw = copy.deepcopy(dict(raw))
    for alias in TABLES[raw.get("app") or raw["eval_name"]]:
        if not alias.new or alias.old.endswith(".*"):
            continue
        values = [get(raw, new) for new in alias.new]
        if all(value == values[0] is not ... for value in values):
            for new in alias.new:
                pop(raw, new)
            put(raw, alias.old, values[0])
    for section, encoder in (("model", "encoder"), ("pretrain", "pretrain.encoder")):
        rest = get(raw, encoder)
        if isinstance(rest, dict) and not SHARED.keys() & rest.keys():
            pop(raw, encoder)
            put(raw, f"{section}.encoder_args", rest)
    if raw.get("app") == "vjepa" and raw.get("mask"):
        names = {mask.pop("name") for mask in raw["mask"]}
        (raw["data"]["mask_type"],) = names
    return raw


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_files_mean_the_same_in_old_keys(path, tmp_path):
    encoder = ["encoder=vit_tiny"] if f"{path.parent.name}/{path.stem}" in NO_ENCODER else []
    raw = config.read(path, MISSING + encoder)
    old = flat(raw)
    if get(raw, "objective.name") in ("vjepa", ...):  # others have no predictor with the same options
        assert "encoder" not in old
        assert "model" in old or "encoder" not in raw
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    assert options(config.read(tmp_path / "old.yaml")) == options(raw)
    assert options(to_canonical(old)) == options(raw)
    assert to_canonical(to_canonical(old)) == to_canonical(old)


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


BASE = {
    "present": """
        app: vjepa
        folder: x
        data: {datasets: [v], sampling_rate: 4, format: kth}
        mask: [{name: multiblock3d, num_blocks: 2}, {name: multiblock3d}]
        encoder: {name: vit_small, depth: 3, use_rope: true, init_std: 0.1}
        objective: {predictor: {depth: 4, embed_dim: 96, use_rope: true, init_std: 0.1}, ema: [0.9, 1.0], loss_exp: 2.0}
    """,
    "old": """
        app: vjepa
        folder: x
        data: {datasets: [v], sampling_rate: 4, dataset_type: kth, mask_type: multiblock3d}
        mask: [{num_blocks: 2}, {}]
        model:
          encoder: vision_transformer
          model_name: vit_small
          encoder_args: {depth: 3}
          use_rope: true
          init_std: 0.1
          pred_depth: 4
          pred_embed_dim: 96
        loss: {loss_exp: 2.0}
        optimization: {ema: [0.9, 1.0]}
    """,
}
# In old and in present keys, and what it changes: {path: value}.
CHANGES = [
    ("model.model_name=vit_tiny", "encoder.name=vit_tiny", {"encoder.name": "vit_tiny", "encoder.depth": 3}),
    ("model.pred_depth=1", "objective.predictor.depth=1", {"objective.predictor.depth": 1}),
    ("model.encoder_args.depth=5", "encoder.depth=5", {"encoder.depth": 5, "encoder.use_rope": True}),
    ("loss.loss_exp=1.5", "objective.loss_exp=1.5", {"objective.loss_exp": 1.5, "objective.ema": (0.9, 1.0)}),
    ("loss.cov_coeff=1.5", "objective.cov_coeff=1.5", {"objective.cov_coeff": 1.5, "objective.loss_exp": 2.0}),
    ("optimization.ema=[0.5,0.6]", "objective.ema=[0.5,0.6]", {"objective.ema": (0.5, 0.6)}),
    ("data.dataset_type=VideoDataset", "data.format=video_dataset", {"data.format.name": "video_dataset"}),
    ("data.dataset_type=VideoDataset", "data.format.name=VideoDataset", {"data.format.name": "video_dataset"}),
    (
        "model.encoder_args={drop_rate: 0.1}",
        None,
        {"encoder.drop_rate": 0.1, "encoder.depth": 12, "encoder.use_rope": True},
    ),
    ("model.encoder_args=null", None, {"encoder.depth": 12, "encoder.name": "vit_small", "encoder.init_std": 0.1}),
    (
        "loss={reg_coeff: 0.1}",
        None,
        {"objective.reg_coeff": 0.1, "objective.loss_exp": 1.0, "objective.ema": (0.9, 1.0)},
    ),
    (
        "model={model_name: vit_tiny}",
        None,
        {"encoder.name": "vit_tiny", "encoder.depth": 12, "encoder.use_rope": False, "objective.predictor.depth": 12},
    ),
    (
        None,
        "encoder={name: vit_tiny}",
        {"encoder.name": "vit_tiny", "encoder.depth": 12, "objective.predictor.depth": 4},
    ),
    (None, "encoder=vit_tiny", {"encoder.name": "vit_tiny", "encoder.depth": 12, "encoder.use_rope": False}),
    ("model.init_std=0.02", None, {"encoder.init_std": 0.02, "objective.predictor.init_std": 0.02}),
    ("model.use_rope=false", None, {"encoder.use_rope": False, "objective.predictor.use_rope": False}),
    (None, "encoder.use_rope=false", {"encoder.use_rope": False, "objective.predictor.use_rope": True}),
    ("data.max_bad_share=0.2", "data.max_bad_fraction=0.2", {"data.max_bad_fraction": 0.2}),
    ("data.mask_type=multiblock3d", None, {"mask.0.num_blocks": 2, "mask.1.name": "multiblock3d"}),
]


def value_at(result, path):
    for key in path.split("."):
        result = result[int(key)] if key.isdigit() else getattr(result, key)
    return result


@pytest.mark.parametrize("base", ["present", "old"])
@pytest.mark.parametrize("change", [c for pair in CHANGES for c in ((pair[0], pair[2]), (pair[1], pair[2])) if c[0]])
def test_an_override_wins_in_whichever_keys(tmp_path, base, change):
    override, expected = change
    path = write(tmp_path, "base.yaml", BASE[base])
    result = options(config.read(path, [override]))
    assert {path: value_at(result, path) for path in expected} == expected


@pytest.mark.parametrize("base", ["present", "old"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {model_name: vit_tiny, pred_depth: 1}", {"encoder.name": "vit_tiny", "encoder.depth": 3}),
        ("encoder: {name: vit_tiny}", {"encoder.name": "vit_tiny", "encoder.depth": 3, "encoder.use_rope": True}),
        ("encoder: {replace: true, name: vit_tiny}", {"encoder.depth": 12, "encoder.use_rope": False}),
        ("model: {encoder_args: null}", {"encoder.depth": 12, "encoder.use_rope": True, "encoder.name": "vit_small"}),
        ("model: {encoder_args: {drop_rate: 0.1}}", {"encoder.depth": 3, "encoder.drop_rate": 0.1}),
        ("objective: vjepa", {"objective.loss_exp": 2.0}),
        ("objective: {predictor: {depth: 1}}", {"objective.predictor.depth": 1, "objective.predictor.embed_dim": 96}),
        ("mask: [{}]", {"mask.0.name": "multiblock3d"}),
        ("mask: [{ratio: 0.8}]\ndata: {mask_type: random_tube}", {"mask.0.ratio": 0.8}),
        ("mask: [{name: random_tube}, {num_blocks: 3}]", {"mask.0.ratio": 0.9, "mask.1.num_blocks": 3}),
    ],
)
def test_a_file_wins_over_its_base_in_whichever_keys(tmp_path, base, text, expected):
    write(tmp_path, "base.yaml", BASE[base])
    path = write(tmp_path, "file.yaml", f"base: base.yaml\n{text}\n")
    result = options(config.read(path))
    assert {path: value_at(result, path) for path in expected} == expected


@pytest.mark.parametrize("base", ["present", "old"])
def test_another_objective_drops_the_options_of_the_base(tmp_path, base):
    write(tmp_path, "base.yaml", BASE[base])
    path = write(tmp_path, "file.yaml", "base: base.yaml\nobjective: {name: videomae, normalize_targets: false}\n")
    for raw in (config.read(path), config.read(tmp_path / "base.yaml", ["objective=videomae"])):
        assert options(raw).objective.name == "videomae"
    changed = config.read(tmp_path / "base.yaml", ["objective.name=videomae", "objective.decoder.depth=2"])
    assert options(changed).objective.decoder.depth == 2
    assert options(config.read(tmp_path / "base.yaml", ["objective.name=vjepa"])).objective.loss_exp == 2.0
    assert options(config.read(tmp_path / "base.yaml", ["data.format=Kth"])).data.format.name == "kth"


def test_mask_type_names_all_masks_that_it_is_set_over(tmp_path):
    path = write(tmp_path, "base.yaml", BASE["present"])
    with pytest.raises(ConfigError, match=r"mask\.0\.num_blocks: unknown key\. Valid: name, ratio"):
        options(config.read(path, ["data.mask_type=random_tube"]))
    result = options(config.read(path, ["data.mask_type=random_tube", "mask=[{}, {ratio: 0.5}]"]))
    assert [mask.name for mask in result.mask] == ["random_tube", "random_tube"]
    with pytest.raises(ConfigError, match=r"data\.mask_type: 'random_tub'.*Did you mean 'random_tube'"):
        options(config.read(path, ["data.mask_type=random_tub", "mask=[{}]"]))


def test_flat_options_that_an_encoder_lacks_have_to_be_at_their_defaults(tmp_path):
    path = write(tmp_path, "base.yaml", BASE["present"].replace("use_rope: true, init_std: 0.1}\n", "}\n"))
    encoder = ["model.encoder=timesformer", "model.model_name=timesformer_tiny"]
    result = options(config.read(path, [*encoder, "model.use_rope=false", "model.uniform_power=true"]))
    assert result.encoder.name == "timesformer_tiny"
    with pytest.raises(ConfigError, match=r"model\.use_rope: unknown key"):
        options(config.read(path, [*encoder, "model.use_rope=true"]))
    with pytest.raises(ConfigError, match=r"encoder\.use_rope: unknown key"):
        options(config.read(path, [*encoder, "encoder.use_rope=false"]))


def test_flat_options_of_a_probe_change_those_of_the_weights(tmp_path):
    text = """
        eval_name: video_classification_frozen
        folder: x
        data: {dataset_train: a, dataset_val: b, num_classes: 3}
        pretrain: {folder: run, uniform_power: true, init_std: null, model_name: vit_tiny, encoder_args: {depth: 3}}
        classifier: {num_heads: 3}
        tasks:
          deep: {classifier: {num_probe_blocks: 2}}
          small: {classifier: {num_probe_blocks: 2}, head: linear}
    """
    path = write(tmp_path, "probe.yaml", text)
    result = options(config.read(path))
    assert result.pretrain.encoder == {"uniform_power": True, "name": "vit_tiny", "depth": 3}
    assert (result.head.name, result.head.num_heads) == ("attentive", 3)
    assert (result.task("deep").head.num_heads, result.task("deep").head.num_probe_blocks) == (3, 2)
    assert result.task("small").head.model_dump() == {"name": "linear"}  # which has no such options
    changed = options(config.read(path, ["pretrain.model_name=null", "pretrain.encoder_args=null"]))
    assert changed.pretrain.encoder == {"uniform_power": True}
    changed = options(config.read(path, ["pretrain.encoder={use_rope: true}"]))
    assert changed.pretrain.encoder == {"use_rope": True}


def test_a_pretraining_model_section_serves_supervised_training(tmp_path):
    text = """
        app: classification
        folder: x
        data: {dataset_train: a, dataset_val: b, num_classes: 3}
        model: {model_name: vit_tiny, encoder_args: {depth: 3}, pred_depth: 2, use_mask_tokens: true, use_rope: true}
    """
    result = options(config.read(write(tmp_path, "train.yaml", text)))
    assert (result.encoder.name, result.encoder.depth, result.encoder.use_rope) == ("vit_tiny", 3, True)
    assert options(config.read(tmp_path / "train.yaml", ["model=null", "pretrain.folder=run"])).encoder is None


@pytest.mark.parametrize("prefix", ["", "study."])
def test_floors_of_a_study_are_its_baselines(tmp_path, caplog, prefix):
    translation._warn_once.cache_clear()
    old = {"floors": {"num_frames": 4}, "seconds": {"floors": 7}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"study": old} if prefix else old))

    def read(*overrides):
        raw = config.read(path, overrides)
        return raw["study"] if prefix else dict(raw)

    assert read() == {"baselines": {"num_frames": 4}, "seconds": {"baselines": 7}}
    assert f"{prefix}floors is deprecated; use {prefix}baselines" in caplog.text
    assert read(f"{prefix}floors=null")["baselines"] is None
    assert read(f"{prefix}floors.kinds=[frame]")["baselines"] == {"num_frames": 4, "kinds": ["frame"]}
    assert read(f"{prefix}baselines.num_frames=6")["baselines"] == {"num_frames": 6}


def test_a_linear_probe_of_0_1_has_a_section_of_the_attentive_one(tmp_path):
    text = """
        eval_name: video_classification_frozen
        folder: x
        head: linear
        data: {dataset_train: a, dataset_val: b, num_classes: 3}
        classifier: {num_heads: null, num_probe_blocks: 1}
        pretrain: {folder: run, encoder: null, model_name: null, encoder_args: null, use_rope: null, init_seed: 0}
    """
    result = options(config.read(write(tmp_path, "probe.yaml", text)))
    assert (result.head.name, result.pretrain.encoder) == ("linear", {})


def test_a_program_that_was_renamed_is_found_under_its_old_name(tmp_path):
    read = config.read(write(tmp_path, "a.yaml", "eval_name: floors\nfloors: [frame]\n"))
    assert read == {"eval_name": "baselines", "kinds": ["frame"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {model_name: a}\nencoder: {name: b}", r"model\.model_name: the same as encoder\.name, which is given"),
        ("model: {pred_dept: 3}", r"model\.pred_dept: unknown key\. Did you mean 'pred_depth'"),
        ("model: vit_tiny", r"model: expected a mapping, got 'vit_tiny'"),
        ("model: {encoder_args: 3}", r"model\.encoder_args: expected a mapping, got 3"),
        ("objective: 3\nmodel: {pred_depth: 3}", r"objective: expected a mapping, got 3"),
        ("loss: {los_exp: 3}", r"loss\.los_exp: unknown key\. Did you mean 'loss_exp'"),
    ],
)
def test_old_sections_that_cannot_be_translated(tmp_path, text, message):
    path = write(tmp_path, "x.yaml", f"app: vjepa\n{text}\n")
    with pytest.raises(ConfigError, match=message) as error:
        config.read(path)
    assert "x.yaml" in str(error.value)


@pytest.mark.parametrize(
    "old", ["model: {use_silu: false}", "model: {pred_depth: 3}", "optimization: {ema: [0.9, 1.0]}"]
)
def test_old_keys_keep_the_name_of_a_part_that_stands_alone(tmp_path, old):
    path = write(tmp_path, "x.yaml", f"app: vjepa\nobjective: lejepa\n{old}\n")
    assert config.read(path)["objective"]["name"] == "lejepa"


def test_options_of_the_base_that_are_removed_beside_a_name(tmp_path):
    write(tmp_path, "base.yaml", "app: vjepa\nmodel: {model_name: vit_small, encoder_args: {depth: 3}}\n")
    path = write(tmp_path, "x.yaml", "base: base.yaml\nencoder: vit_tiny\nmodel: {encoder_args: null}\n")
    assert config.read(path)["encoder"] == {"name": "vit_tiny"}


def test_names_of_0_1_warn_once_and_those_of_v_jepa_do_not(tmp_path, caplog):
    translation._warn_once.cache_clear()
    path = write(tmp_path, "old.yaml", BASE["old"])
    with caplog.at_level(logging.WARNING):
        config.read(path)
        config.read(path)
        to_canonical({"app": "vjepa", "model": {"noise_steps": 3}})
    assert sorted(record.message.split()[0] for record in caplog.records) == [
        "model.encoder",
        "model.encoder_args.*",
        "model.init_std",
    ]


def test_keys_of_the_baselines_that_were_renamed(tmp_path):
    from evals.baselines.eval import Options

    text = "eval_name: floors\nfolder: x\nfloors: [frame]\ntasks: {a: {train: a, test: b, num_classes: 2}}\n"
    assert config.load(write(tmp_path, "a.yaml", text), [], Options).kinds == ["frame"]
