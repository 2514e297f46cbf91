import pytest
import torch
from transformers import VJEPA2Config, VJEPA2ForVideoClassification

from tubelet import hub
from tubelet.models.attentive_pooler import AttentiveClassifier, AttentivePooler


def test_pooler_equals_transformers(tmp_path):
    torch.manual_seed(0)
    config = VJEPA2Config(
        crop_size=32, frames_per_clip=4, hidden_size=48, num_attention_heads=2, num_hidden_layers=1,
        pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1, num_pooler_layers=2,
        num_labels=5, initializer_range=0.1,
    )  # fmt: skip
    reference = VJEPA2ForVideoClassification(config).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    reference.save_pretrained(tmp_path)
    model = hub.load_probe(tmp_path)
    assert len(model.pooler.blocks) == 2
    tokens = torch.randn(3, 11, 48)
    with torch.no_grad():
        expected = reference.classifier(reference.pooler(tokens))
        assert expected.std() > 0.1
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("complete_block", [True, False])
@pytest.mark.parametrize("use_proj", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_self_attention_over_tokens_precedes_cross_attention(complete_block, use_proj, depth):
    pooler = AttentivePooler(3, 24, 2, depth=depth, complete_block=complete_block, use_proj=use_proj)
    x = torch.randn(2, 7, 24)
    tokens = x
    for block in pooler.blocks:
        tokens = block(tokens)
    assert len(pooler.blocks) == depth - 1
    queries = pooler.query_tokens.repeat(2, 1, 1)
    torch.testing.assert_close(pooler(x), pooler.cross_attention_block(queries, tokens))
    assert pooler(x).shape == (2, 3, 24)


def test_logits_do_not_depend_on_the_order_of_tokens():
    classifier = AttentiveClassifier(24, 2, depth=2, num_classes=5, init_std=0.2)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(classifier(x[:, torch.randperm(7)]), classifier(x), atol=1e-5, rtol=0)


def test_output_layers_are_rescaled_by_depth():
    for depth in (1, 4):
        block = AttentivePooler(1, 192, 2, depth=depth).cross_attention_block
        for layer in (block.xattn.proj, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02 * (2 * depth) ** -0.5, rel=0.05)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for use_checkpointing in (False, True):
        torch.manual_seed(0)
        classifier = AttentiveClassifier(24, 2, depth=3, num_classes=5, use_activation_checkpointing=use_checkpointing)
        classifier(torch.ones(2, 7, 24).cumsum(1).sin()).square().sum().backward()
        gradients.append([parameter.grad for parameter in classifier.parameters()])
    for expected, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, expected)


def test_num_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide the width 24"):
        AttentiveClassifier(24, 5)
