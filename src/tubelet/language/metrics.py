"""Metrics of captions: BLEU-4, ROUGE-L, CIDEr and exact match.

As is usual, texts are compared in lower case and without punctuation. The tokenizer of the COCO evaluation is a Java
program; here, words are runs of letters, digits and apostrophes, so that values may differ slightly from its own.
"""

import re
from collections.abc import Sequence

from tubelet.language.packages import METRICS, check_installed

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def normalized(text: str) -> str:
    """Return the words of a text in lower case, separated by spaces."""
    return " ".join(_WORD.findall(text.lower()))


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compare one predicted caption of each video with its reference captions.

    Args:
        predictions: A caption for each video.
        references: The captions of each video, at least one.

    Returns:
        `bleu4`, `rouge_l` and `exact_match` in percent, and `cider` (COCO's CIDEr-D, in percent as is usual).
    """
    check_installed(METRICS)
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from sacrebleu.metrics import BLEU

    predictions = [normalized(text) for text in predictions]
    references = [[normalized(text) for text in texts] for texts in references]
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    # sacrebleu leaves out references that are None, which its types do not say.
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    bleu = metric.corpus_score(predictions, streams)  # type: ignore[arg-type]
    gts, res = dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}
    exact = sum(text in texts for text, texts in zip(predictions, references, strict=True))
    return {
        "bleu4": min(bleu.score, 100.0),  # exp(log(100)) is above it
        "rouge_l": 100 * float(Rouge().compute_score(gts, res)[0]),
        "cider": 100 * float(Cider().compute_score(gts, res)[0]),
        "exact_match": 100 * exact / len(predictions),
    }
