"""IDs of all items at once, spread where they would be shared."""

import pytest
import torch

from ddcl_lightning import SoftVectorQuantizer
from ddcl_lightning.functional import assign_balanced, group_tuples
from ddcl_lightning.nn.balanced_ids import encode_balanced
from tests.tiny_ids import CODEBOOK, IDS, ITEMS, GivenCodes


def test_shared_ids_are_spread_by_hand() -> None:
    """Items 0, 2 and 5 are all nearest to code 2 of prefix 1, where item 3 is alone on code 0."""
    quantizer = GivenCodes(CODEBOOK)
    balanced = encode_balanced(quantizer, ITEMS)
    assert balanced[[1, 4]].tolist() == [IDS[1], IDS[4]]
    assert len(group_tuples(encode_balanced(quantizer, ITEMS[[0, 2, 3]])).tuples) == 3
    # Four items of a prefix of three codes: one code has two of them.
    assert sorted(group_tuples(balanced).counts.tolist()) == [1, 1, 1, 1, 2]


def test_balanced_ids_are_the_matching_of_written_out_costs() -> None:
    torch.manual_seed(0)
    quantizer, vectors = GivenCodes(torch.randn(2, 8, 3)), torch.randn(50, 3)
    ids = quantizer.encode(vectors)
    costs = torch.stack(
        [
            torch.stack([(vector - quantizer.decode(torch.cat([row[:1], code]))).square().sum() for code in CODES])
            for vector, row in zip(vectors, ids, strict=True)
        ]
    )
    assert int(group_tuples(ids).counts.max()) > 2
    for capacity in (1, 2):
        balanced = encode_balanced(quantizer, vectors, capacity)
        assert torch.equal(balanced, assign_balanced(ids[:, :1], costs, capacity))
    assert torch.equal(encode_balanced(quantizer, vectors, capacity=50), ids)


CODES = torch.arange(8).unsqueeze(1)


def test_balancing_refuses_vectors_of_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"vectors must have shape \(N, D\), .*; got \(2, 3, 2\)\. Flatten"):
        encode_balanced(GivenCodes(CODEBOOK), ITEMS.view(2, 3, 2))
    with pytest.raises(ValueError, match="capacity must be at least 1; got 0"):
        encode_balanced(GivenCodes(CODEBOOK), ITEMS, capacity=0)
    with pytest.raises(ValueError, match=r"capacity must be an integer.*; got 1.5"):
        encode_balanced(GivenCodes(CODEBOOK), ITEMS, capacity=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="vectors must be a tensor"):
        encode_balanced(GivenCodes(CODEBOOK), ITEMS.numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"quantizer must have at least two levels.* got SoftVectorQuantizer"):
        encode_balanced(SoftVectorQuantizer(2, 4), ITEMS)  # type: ignore[arg-type]
