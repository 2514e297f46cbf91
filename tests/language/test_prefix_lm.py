import pytest
import torch

from tubelet.config import ConfigError
from tubelet.language.prefix_lm import LanguageModelConfig, build_language_model
from tubelet.language.tokenizer import IGNORED, TextEncoder, learn_tokenizer, load_tokenizer, parse_tokenizer

TEXTS = ["three red squares drift left", "one blue disc drifts up", "the camera zooms in"]
SMALL = LanguageModelConfig(embed_dim=16, depth=2, num_heads=2, dropout=0.0)


@pytest.fixture(scope="module")
def text():
    return TextEncoder(parse_tokenizer(learn_tokenizer(TEXTS, 300)), max_prompt=5, max_target=8)


def build(text, options=SMALL, max_length=16):
    torch.manual_seed(0)
    return build_language_model(
        options, vocab_size=len(text.tokenizer), pad=text.pad, end=text.end, max_length=max_length
    ).eval()


def inputs(text, lm, prompts=("what is it", "where", ""), targets=("one disc", "three", "the camera")):
    prefix = torch.randn(len(prompts), 3, lm.embed_dim, generator=torch.Generator().manual_seed(0))
    return (prefix, *text.prompts(prompts), text.targets(targets))


def test_every_text_survives_the_tokenizer(text):
    for string in [*TEXTS, "naïve 日本 🎥 question?"]:
        ids = torch.tensor([text.tokenizer.encode(string)])
        assert text.decode(ids) == [string]


def test_prompts_are_padded_on_the_left_and_targets_end(text):
    """Up to the length of the longest one."""
    long, short = (text.tokenizer(words, add_special_tokens=False)["input_ids"] for words in ("one disc", "one"))
    padding = len(long) - len(short)
    assert padding > 0
    ids, used = text.prompts(["one disc", "one"])
    assert ids.tolist() == [long, [text.pad] * padding + short]
    assert used.tolist() == [[True] * len(long), [False] * padding + [True] * len(short)]
    targets = text.targets(["one disc", "one"])
    assert targets.tolist() == [[*long, text.end], [*short, text.end, *[IGNORED] * padding]]
    assert text.prompts(["", ""])[0].shape == (2, 0)


def test_long_texts_are_counted():
    text = TextEncoder(parse_tokenizer(learn_tokenizer(TEXTS, 300)), max_prompt=2, max_target=2)
    ids, _ = text.prompts(["three red squares drift left"])
    whole, _ = TextEncoder(text.tokenizer, 50, 50).prompts(["three red squares drift left"])
    assert ids[0].tolist() == whole[0, -2:].tolist()
    assert text.targets(["one blue disc", "one"]).shape == (2, 2)
    counts = text.count(["three red squares drift left", "one"], ["one blue disc", "one"])
    assert counts == {"long_prompts": 1, "long_targets": 1, "unknown_tokens": 0}


def test_logits_equal_those_of_the_model_called_with_the_same_embeddings(text):
    """One sample at a time, without padding."""
    lm = build(text)
    prefix, prompt, used, target = inputs(text, lm)
    logits = lm(prefix, prompt, used, target)
    for i in range(len(target)):
        length = int((target[i] != IGNORED).sum())
        ids = torch.cat([prompt[i][used[i]], target[i, :length]])
        embedded = torch.cat([prefix[i], lm.model.get_input_embeddings()(ids)])[None]
        expected = lm.model(inputs_embeds=embedded).logits[0, -length - 1 : -1]
        torch.testing.assert_close(logits[i, :length], expected, atol=1e-5, rtol=1e-5)


def test_likelihood_is_the_product_of_the_tokens_probabilities(text):
    lm = build(text)
    prefix, prompt, used, target = inputs(text, lm)
    logs = lm(prefix, prompt, used, target).log_softmax(-1)
    expected = [
        sum(logs[i, j, token] for j, token in enumerate(row) if token != IGNORED)
        for i, row in enumerate(target.tolist())
    ]
    likelihood = lm.log_likelihood(prefix, prompt, used, target)
    torch.testing.assert_close(likelihood, torch.stack(expected))
    lengths = (target != IGNORED).sum(1)
    torch.testing.assert_close(lm.loss(prefix, prompt, used, target), -(likelihood / lengths).mean())


def test_greedy_generation_takes_the_most_probable_token(text):
    lm = build(text)
    prefix, prompt, used, _ = inputs(text, lm)
    written = lm.generate(prefix, prompt, used, max_new_tokens=4, do_sample=False)
    for i, row in enumerate(written.tolist()):
        so_far = torch.full((1, 0), 0)
        for token in row:
            step = torch.cat([so_far, torch.zeros(1, 1, dtype=torch.int64)], 1)
            logits = lm(prefix[i : i + 1], prompt[i : i + 1], used[i : i + 1], step)[0, -1]
            assert token == int(logits.argmax())
            if token == text.end:
                break
            so_far = torch.cat([so_far, torch.tensor([[token]])], 1)


@pytest.mark.parametrize(("tune", "share"), [("all", (1, 1)), ("none", (0, 0)), ("lora", (0.001, 0.5))])
def test_what_is_trained(text, tune, share):
    lm = build(text, SMALL.model_copy(update={"tune": tune, "lora_rank": 2}))
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert share[0] <= trained / sum(p.numel() for p in lm.parameters()) <= share[1]
    prefix, prompt, used, target = inputs(text, lm)
    prefix.requires_grad_(True)
    lm.loss(prefix, prompt, used, target).backward()
    assert prefix.grad.abs().sum() > 0
    assert lm.generate(prefix, prompt, used, max_new_tokens=2).shape[0] == 3


def test_a_model_in_a_folder_gives_its_own_logits(text, tmp_path):
    lm = build(text, max_length=32)
    lm.model.save_pretrained(tmp_path)
    text.tokenizer.save_pretrained(tmp_path)
    loaded = TextEncoder(load_tokenizer(str(tmp_path)), 5, 8)
    assert loaded.decode(torch.tensor([text.tokenizer.encode(TEXTS[0])])) == [TEXTS[0]]
    again = build(loaded, SMALL.model_copy(update={"folder": str(tmp_path)}))
    torch.testing.assert_close(again(*inputs(loaded, again)), lm(*inputs(text, lm)))
    with pytest.raises(ConfigError, match="reads 32 positions, prefix, prompt and target have 40"):
        build(loaded, SMALL.model_copy(update={"folder": str(tmp_path)}), max_length=40)
    with pytest.raises(ConfigError, match=r"language_model\.folder"):
        build(loaded, SMALL.model_copy(update={"folder": str(tmp_path / "absent")}))
