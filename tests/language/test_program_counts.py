"""What is counted in results.json, and what is refused before anything is computed."""

import re
import shutil
from pathlib import Path

import pytest

from app.language import train as program
from tests.language.runs import edited, run
from tubelet.config import ConfigError, UserError, check, load
from tubelet.language import packages

FROM_SCRATCH = {"pretrain": None, "encoder": {"name": "multiscale_tiny"}, "train_encoder": True}
NO_NAME = {"dataset": "x", "class_names": ["a", "b"], "template": "a class"}


def test_what_is_missing_empty_or_too_long_is_counted(raw, scenes, tmp_path):
    shutil.copytree(scenes / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "train_000000.mp4").unlink()
    (tmp_path / "videos" / "test_000001.mp4").write_bytes(b"no video")

    def change(content):
        content["sentences"][4]["caption"] = " "
        content["sentences"][6]["caption"] = "a caption of more than thirty tokens " * 9

    train = edited(scenes / "captions_train.json", tmp_path / "train.json", change)
    found = {}
    for cached in (False, True):
        data = {"dataset_train": train, "videos": str(tmp_path / "videos"), "cache_features": cached}
        found[cached] = run(raw(folder=str(tmp_path / str(cached)), data=data, text={"max_target": 60}))
    results = found[True]
    assert {name: results["lists"]["train"][name] for name in ("missing_videos", "empty_captions", "long_targets")} == {
        "missing_videos": 1,
        "empty_captions": 1,
        "long_targets": 1,
    }
    assert (results["num_train"], results["num_val"]) == (21, 5)
    assert [Path(file["path"]).name for file in results["excluded"]] == ["test_000001.mp4"]
    assert found[False] == found[True]


def test_long_questions_are_counted(raw):
    found = run(raw("question_answering", text={"max_prompt": 2}))
    assert (found["lists"]["train"]["long_prompts"], found["lists"]["val"]["long_prompts"]) == (72, 36)


def test_no_readable_validation_video_is_an_error(raw, scenes, tmp_path):
    shutil.copytree(scenes / "videos", tmp_path / "videos")
    for file in (tmp_path / "videos").glob("test_*"):
        file.write_bytes(b"no video")
    for cached in (False, True):
        data = {"videos": str(tmp_path / "videos"), "cache_features": cached}
        with pytest.raises(UserError, match=r"data\.dataset_val: none of its videos can be read"):
            run(raw(data=data, folder=str(tmp_path / str(cached))))


def test_other_texts_under_the_same_name_are_refused(raw, scenes, tmp_path):
    train = edited(scenes / "captions_train.json", tmp_path / "train.json", lambda content: None)
    run(raw(data={"dataset_train": train}))

    def change(content):
        content["sentences"][3]["caption"] = "something else"

    edited(scenes / "captions_train.json", tmp_path / "train.json", change)
    with pytest.raises(ConfigError, match="a run on other videos or texts"):
        run(raw(data={"dataset_train": train}))


@pytest.mark.parametrize(
    ("task", "sections", "message"),
    [
        ("captioning", {"answers": {"kind": "classified"}}, "answers.kind: captioning has no answers"),
        ("captioning", {"text": {"prompt": "{question}"}}, r"text.prompt: captioning has no {question}"),
        ("captioning", {"pretrain": None}, "give either `pretrain`"),
        ("captioning", {"decoding": {"temperature": 2.0}}, "need sample: true"),
        ("captioning", {"decoding": {"sample": True, "num_beams": 2}}, "remove num_beams"),
        ("captioning", {"data": {"cache_features": True}, "train_encoder": True}, "cache_features"),
        ("captioning", {"data": {"cache_features": True}, "data_aug": {}}, "cache_features"),
        ("captioning", FROM_SCRATCH | {"optimization": {"layer_decay": 0.5}}, "layer_decay: .* has no `blocks`"),
        ("captioning", {"language_model": {"num_heads": 3}}, "3 heads do not divide embed_dim 16"),
        ("captioning", {"language_model": {"folder": "nowhere"}}, "language_model.folder: nowhere"),
        ("captioning", {"distributed": "fsdp"}, "take ddp"),
        ("retrieval", {"optimization": {"accumulation_steps": 2}}, "accumulation_steps"),
        (
            "retrieval",
            {"evaluation": {"zero_shot": {"dataset": "x", "class_names": ["a", "b"], "template": "a"}}},
            "{}",
        ),
    ],
)
def test_what_cannot_work_is_an_error_before_anything_is_computed(raw, task, sections, message):
    configuration = raw(task, **sections)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        run(configuration)
    assert not Path(configuration["folder"]).exists()


def test_options_of_multiple_choice_are_not_classified(raw, scenes):
    data = {"dataset_train": str(scenes / "choices_train.csv")}
    with pytest.raises(ConfigError, match="does not read the options of multiple choice"):
        run(raw("question_answering", answers={"kind": "classified"}, data=data))


@pytest.mark.parametrize(("name", "sections"), [("transformers", {}), ("peft", {"language_model": {"tune": "lora"}})])
def test_a_missing_package_is_named_with_its_extra(raw, name, sections, monkeypatch):
    find_spec = packages.importlib.util.find_spec
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda asked: None if asked == name else find_spec(asked))
    with pytest.raises(ConfigError, match=rf"{name}: not installed. Run `pip install 'tubelet\[language\]'`"):
        run(raw(**sections))


def test_the_extras_have_the_packages():
    text = Path("pyproject.toml").read_text()
    for extra in ("language", "test"):
        (listed,) = re.findall(rf"^{extra} = \[(.*?)\]\n", text, re.DOTALL | re.MULTILINE)
        assert all(f'"{name}"' in listed for name in (*packages.MODELS, *packages.ADAPTERS, *packages.METRICS))


PATHS = sorted(set(Path("configs/language").glob("*.yaml")) - {Path("configs/language/pretrain_demo.yaml")})


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_accepted(path):
    options = load(path, [], program.Options)
    assert check(options.model_dump(), program.Options, "again") == options
