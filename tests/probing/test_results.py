import torch

from tubelet.probing import results


def test_confusion_counts_each_pair_of_label_and_prediction():
    labels, predicted = torch.tensor([0, 0, 2, 2, 2, 1]), torch.tensor([0, 3, 2, 2, 0, 1])
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for label, guess in zip(labels, predicted, strict=True):
        expected[label, guess] += 1
    assert torch.equal(results.confusion(labels, predicted, 4), expected)


def test_the_best_head_is_finite_and_has_the_lowest_loss_among_the_most_accurate():
    top1, loss = [50.0, 80.0, 80.0, 90.0], [0.1, 0.4, 0.3, 0.2]
    assert results.best_head(top1, loss, [True, True, True, False]) == 2
    assert results.best_head(top1, loss, [True, False, False, False]) == 0
    assert results.best_head(top1, loss, [False] * 4) is None


def test_numbers_that_not_all_seeds_have_are_not_averaged():
    measured = [{"top1": 10.0, "top5": None, "shuffled_top1": 4.0}, {"top1": 20.0, "top5": None, "shuffled_top1": 8.0}]
    summary = results.over_seeds([0, 1], measured)
    assert (summary["top1"], summary["shuffled_top1"]) == (15.0, 6.0)
    assert not {"top5", "train_loss", "train_top1"} & summary.keys()
