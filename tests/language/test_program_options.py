"""Language models, ways of decoding, kinds of answers, zero-shot classification."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from app.language import train as program
from tests.language.runs import edited, last_weights, predictions, results, run
from tests.processes import run as run_on_processes
from tubelet.config import ConfigError, check
from tubelet.language.decoding import DecodingConfig, GumbelNoise
from tubelet.language.prefix_lm import LanguageModelConfig, build_language_model

WORDS = [
    "what",
    "color",
    "are",
    "the",
    "objects",
    "how",
    "many",
    "there",
    "red",
    "blue",
    "one",
    "two",
    "drift",
    "while",
]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Folder of a GPT-2 of transformers with words as tokens, of which it does not know all, and its own dropout."""
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=64, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config)
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=2.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("task", "tune"),
    [
        ("question_answering", "lora"),
        ("retrieval", "none"),
        ("retrieval", "all"),
        pytest.param("question_answering", "none", marks=pytest.mark.slow),
        pytest.param("question_answering", "all", marks=pytest.mark.slow),
        pytest.param("retrieval", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_language_model_of_a_folder(raw, language_model, task, tune):
    found = run(raw(task, language_model={"folder": str(language_model), "tune": tune, "lora_rank": 2}))
    assert found["lists"]["val"]["unknown_tokens"] > 0
    stored = last_weights(raw()["folder"]).get("language_model", {})
    names = {"none": 0, "lora": 2 * 2 * 4, "all": len(GPT2LMHeadModel.from_pretrained(language_model).state_dict())}
    assert len(stored) == names[tune]  # of LoRA two matrices for each of four layers in two blocks
    assert run(raw(task, language_model={"folder": str(language_model), "tune": tune, "lora_rank": 2})) == found


@pytest.mark.parametrize(("task", "answers"), [("retrieval", {}), ("question_answering", {"kind": "classified"})])
def test_processes_do_not_wait_for_weights_that_only_the_logits_use(raw, language_model, task, answers):
    sections = {"answers": answers, "optimization": {"num_epochs": 1, "warmup": 0}}
    configuration = raw(task, language_model={"folder": str(language_model)}, **sections)
    run_on_processes(program.main, check(configuration, program.Options, "test.yaml"), 2)
    assert results(configuration["folder"])["num_val"] > 0


def test_a_frozen_language_model_has_no_dropout(language_model):
    def loss(tune):
        options = LanguageModelConfig(folder=str(language_model), tune=tune, dropout=0.0)
        lm = build_language_model(options, vocab_size=30, pad=0, end=0, max_length=20).train()
        prefix = torch.ones(2, 3, 16)
        prompt = torch.ones(2, 4, dtype=torch.int64)
        return [float(lm.loss(prefix, prompt, prompt > 0, prompt).detach()) for _ in range(2)]

    first, second = loss("none")
    assert first == second
    first, second = loss("all")
    assert first != second


@pytest.mark.parametrize(
    ("decoding", "deterministic"),
    [({}, True), ({"num_beams": 3}, True), ({"sample": True, "top_p": 0.9, "temperature": 2.0}, False)],
)
def test_decoding(raw, tmp_path, decoding, deterministic):
    found = {}
    for seed, batch in ((0, 64), (0, 2), (1, 64)):
        folder = tmp_path / f"{seed}-{batch}"
        changes = {"decoding": decoding, "evaluation": {"batch_size": batch, "examples": 0}, "folder": str(folder)}
        if seed:  # the same weights, other draws
            shutil.copytree(tmp_path / "0-64" / "checkpoints", folder / "checkpoints")
        run(raw(**changes, meta={"seed": seed}))
        found[seed, batch] = predictions(folder)
    assert found[0, 64] == found[0, 2]
    assert (found[0, 64] == found[1, 64]) == deterministic


def test_draws_have_the_probabilities_of_the_model():
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).expand(20_000, 4)
    noisy = GumbelNoise(range(20_000))(torch.empty(0), logits)
    frequency = noisy.argmax(1).bincount(minlength=4) / 20_000
    torch.testing.assert_close(frequency, logits[0].softmax(0), atol=0.015, rtol=0)


def test_other_ways_of_decoding_of_the_folder_are_not_used(language_model):
    """Its generation_config.json would draw from the three best tokens."""
    lm = build_language_model(
        LanguageModelConfig(folder=str(language_model)), vocab_size=30, pad=0, end=0, max_length=20
    ).eval()
    prefix, prompt = torch.randn(4, 3, 16), torch.ones(4, 2, dtype=torch.int64)
    arguments = DecodingConfig().arguments(1, [0] * 4)
    written = lm.generate(prefix, prompt, prompt > 0, **arguments)
    expected = lm(prefix, prompt, prompt > 0, torch.zeros(4, 1, dtype=torch.int64)).argmax(2)
    assert torch.equal(written, expected)


def test_classified_answers(raw, scenes, tmp_path):
    def with_a_rare_answer(questions):
        questions[0]["answer"] = "a zeppelin"

    train = edited(scenes / "questions_train.json", tmp_path / "train.json", with_a_rare_answer)
    val = edited(scenes / "questions_test.json", tmp_path / "val.json", with_a_rare_answer)
    answers = {q["answer"] for q in json.loads(Path(train).read_text())}
    data = {"dataset_train": train, "dataset_val": val}
    sections = {"data": data, "optimization": {"num_epochs": 1, "warmup": 0}}
    found = run(raw("question_answering", answers={"kind": "classified", "vocabulary": len(answers) - 1}, **sections))
    assert set(predictions(raw()["folder"])) <= answers - {"a zeppelin"}
    assert found["lists"]["train"]["answers_outside_vocabulary"] == 1
    assert found["lists"]["val"]["answers_outside_vocabulary"] >= 1
    assert (found["num_train"], found["num_val"]) == (71, 36)
    assert set(found["by_type"]) == {"count", "color", "shape", "direction", "camera", "order"}
    rows = json.loads((Path(raw()["folder"]) / "predictions.json").read_text())
    right = sum(row["text"] in row["references"] for row in rows)
    assert found["accuracy"] == pytest.approx(100 * right / 36)


def test_multiple_choice_takes_the_most_probable_option(raw, scenes, monkeypatch):
    data = {
        f"dataset_{part}": str(scenes / f"choices_{name}.csv") for part, name in (("train", "train"), ("val", "test"))
    }
    likelihoods = []
    original = program.build_model

    def noted(*arguments):
        model = original(*arguments)
        log_likelihood = model.language_model.log_likelihood

        def note(prefix, prompt, used, target, **kwargs):
            values = log_likelihood(prefix, prompt, used, target, **kwargs)
            if not kwargs:
                likelihoods.append(values)
            return values

        model.language_model.log_likelihood = note
        return model

    monkeypatch.setattr(program, "build_model", noted)
    found = run(raw("question_answering", data=data))
    with (scenes / "choices_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    options = [[row[f"a{i}"] for i in range(5) if row.get(f"a{i}")] for row in rows]
    assert {len(listed) for listed in options} > {2}
    table = torch.full((len(rows), max(map(len, options))), -float("inf"))
    for number, values in enumerate(likelihoods):
        table[[i for i, listed in enumerate(options) if number < len(listed)], number] = values
    expected = [options[i][number] for i, number in enumerate(table.argmax(1).tolist())]
    assert predictions(raw()["folder"]) == expected
    right = [options[i][int(row["answer"])] == expected[i] for i, row in enumerate(rows)]
    assert found["accuracy"] == pytest.approx(100 * sum(right) / len(rows))


def test_zero_shot_classification(raw, scenes):
    zero_shot = {"dataset": str(scenes / "sounding_test.csv"), "template": "a {} thing"}
    zero_shot["class_names"] = ["red", "green", "blue", "yellow", "white", "cyan"]
    for cached in (False, True):
        found = run(raw("retrieval", evaluation={"zero_shot": zero_shot}, data={"cache_features": cached}))
        assert found["num_zero_shot"] == 6
        assert 0 <= found["zero_shot_top1"] <= 100
    zero_shot["class_names"] = ["red", "green"]
    with pytest.raises(ConfigError, match="the 2 class_names are labels 0 to 1"):
        run(raw("retrieval", evaluation={"zero_shot": zero_shot}))
