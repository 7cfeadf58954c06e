"""The Perceiver readout against the layers of an independent implementation."""

import pytest
import torch
from torch import nn

from ddcl_lightning.heads import PerceiverPooling
from ddcl_lightning.heads.perceiver import PerceiverBlock

TOKENS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()


def copy_block(block: PerceiverBlock, layer: nn.Module) -> None:
    """Weights of our block into a layer of transformers."""
    own, reference = block.attention, layer.attention.self
    if own.in_proj_weight is not None:
        weights = own.in_proj_weight.chunk(3)
    else:
        weights = (own.q_proj_weight, own.k_proj_weight, own.v_proj_weight)
    pairs = list(
        zip((reference.query, reference.key, reference.value), weights, own.in_proj_bias.chunk(3), strict=True)
    )
    pairs += [
        (target, source.weight, source.bias)
        for target, source in (
            (layer.attention.output.dense, own.out_proj),
            (reference.layernorm1, block.norm_queries),
            (layer.layernorm, block.norm_hidden),
            (layer.mlp.dense1, block.hidden[0]),
            (layer.mlp.dense2, block.hidden[2]),
        )
    ]
    if block.norm_source is not None:
        pairs.append((reference.layernorm2, block.norm_source.weight, block.norm_source.bias))
    for target, weight, bias in pairs:
        target.weight.data.copy_(weight)
        target.bias.data.copy_(bias)


def test_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    head = PerceiverPooling(num_latents=4, num_heads=2, num_blocks=2, dim=8, embed_dim=6).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    config = transformers.PerceiverConfig(
        num_latents=4,
        d_latents=8,
        d_model=6,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        qk_channels=8,
        v_channels=8,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.PerceiverModel(config).eval()
    model.embeddings.latents.data.copy_(head.latents[0])
    copy_block(head.read, model.encoder.cross_attention)
    for block, layer in zip(head.blocks, model.encoder.self_attends, strict=True):
        copy_block(block, layer)
    with torch.no_grad():
        reference = model(TOKENS, attention_mask=MASK.long()).last_hidden_state.mean(1)
        ours = head(TOKENS, MASK).pooled
    # They mask with a large negative number, we leave the padding out.
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_latents_start_small_and_blocks_count() -> None:
    head = PerceiverPooling(num_latents=200, num_heads=2, num_blocks=0, embed_dim=6)
    assert float(head.latents.detach().std()) == pytest.approx(0.02, rel=0.1)
    more = PerceiverPooling(num_latents=200, num_heads=2, num_blocks=3, embed_dim=6)
    block = 4 * 6 * 6 + 4 * 6 + 2 * (6 * 6 + 6) + 2 * 2 * 6
    assert more.num_parameters() - head.num_parameters() == 3 * block


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_latents": 0}, "num_latents must be at least 1; got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1; got 0"),
        ({"num_blocks": -1}, "num_blocks must be at least 0; got -1"),
        ({"num_heads": 4}, r"dim \(by default embed_dim\) must be a multiple of num_heads = 4; got 6"),
    ],
)
def test_perceiver_pooling_refuses_sizes_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceiverPooling(**{"embed_dim": 6, **options})
