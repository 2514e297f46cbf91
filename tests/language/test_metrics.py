import pytest

from tubelet.language.metrics import caption_metrics, normalized

pytest.importorskip("sacrebleu")


def test_normalized():
    assert normalized("A dog's  ball, the second_one!") == "a dog's ball the second one"


def test_bleu_equals_sacrebleu():
    from sacrebleu import corpus_bleu

    predictions = ["a man is riding a red bike", "two dogs play in the park"]
    references = [
        ["a man is riding a red bicycle", "a person is riding a bike down the road"],
        ["two dogs are playing in the park"],
    ]
    expected = corpus_bleu(
        predictions,
        [[references[0][0], references[1][0]], [references[0][1], None]],
        tokenize="none",
        smooth_method="none",
    ).score
    assert expected > 0
    assert caption_metrics(predictions, references)["bleu4"] == pytest.approx(expected)


def test_a_perfect_caption_has_full_marks_and_a_wrong_one_none():
    references = [["the red disc drifts left"], ["a blue square drifts up and flashes"]]
    perfect = caption_metrics([" ".join(texts).upper() + "." for texts in references], references)
    assert perfect["bleu4"] == perfect["rouge_l"] == perfect["exact_match"] == 100
    assert perfect["cider"] == pytest.approx(1000, rel=0.15)  # of 10, times 100
    wrong = caption_metrics(["something else entirely", "nothing of it here"], references)
    assert wrong == {"bleu4": 0, "rouge_l": 0, "cider": 0, "exact_match": 0}
