"""The dropout mask is one function of (seed, offset, element), on every backend, however x is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import VARIANTS, module, variant

import lora_kernels as lk
from lora_kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5000),
    first=st.one_of(st.integers(0, 9), st.integers(2**33, 2**33 + 9)),
    p=st.floats(0.001, 0.999),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(-(2**63), 2**63 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_dropout_mask_is_the_same_on_every_backend(n, first, p, seed, offset, dtype):
    """Compared with the words of just these counters: a start far into a large x needs no large mask."""
    x = torch.rand(n).to(dtype) + 1
    rng = torch.tensor([seed, offset])
    outs = []
    for name in VARIANTS:
        outs.append(torch.full_like(x, float("nan")))
        with variant(name):
            module().lora_dropout(x, p, rng, first, outs[-1])
    element = torch.arange(first, first + n)
    word = 0xFFFFFFFF
    counter = torch.stack(
        [
            element // 4 & word,
            element // 4 >> 32 & word,
            torch.full_like(element, offset & word),
            torch.full_like(element, offset >> 32 & word),
        ],
        dim=1,
    )
    words = reference.philox4x32_10(counter, torch.tensor([seed & word, seed >> 32 & word]))
    keep = words.gather(1, (element % 4)[:, None]).squeeze(1) >= int(p * 2**32)
    for out in outs:
        assert torch.equal(out, torch.where(keep, x, torch.zeros_like(x)))


def test_a_word_equal_to_the_threshold_is_kept(backend):
    """p = word / 2^32 is exact in a double: at the word itself it is kept, one above it is dropped."""
    rng, x = torch.tensor([21, 22]), torch.ones(1, 16)
    counter = torch.tensor([[i, 0, 22, 0] for i in range(4)])
    words = reference.philox4x32_10(counter, torch.tensor([21, 0])).reshape(-1)
    out = torch.empty_like(x)
    for i, word in enumerate(words.tolist()):
        for threshold, kept in ((word, 1.0), (word + 1, 0.0)):
            module().lora_dropout(x, threshold / 2**32, rng, 0, out)
            assert out[0, i] == kept


@pytest.mark.parametrize("p", [0.1, 0.75])
def test_pieces_of_x_draw_the_mask_of_the_whole(p, backend):
    x, rng = torch.randn(29, 37), torch.tensor([11, 12])
    whole = reference.lora_dropout(x, p, rng)
    for cuts in ([29], [1, 13, 15], [5, 5, 19]):
        row, parts = 0, []
        for rows in cuts:
            part = x[row : row + rows].contiguous()
            out = torch.full_like(part, float("nan"))
            module().lora_dropout(part, p, rng, row * 37, out)
            parts.append(out)
            row += rows
        assert torch.equal(torch.cat(parts), whole)


def test_dropped_elements_are_zero_even_where_x_is_not_finite(backend):
    x = torch.full((8, 64), float("inf"))
    out = torch.empty_like(x)
    module().lora_dropout(x, 0.5, torch.tensor([1, 2]), 0, out)
    assert set(out.unique().tolist()) == {0.0, float("inf")}


def test_the_mask_does_not_depend_on_the_number_of_threads(kernels):
    x, rng, results = torch.ones(300_001), torch.tensor([3, 4]), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = torch.empty_like(x)
            module().lora_dropout(x, 0.3, rng, 1, out)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_rng_is_drawn_from_torchs_generator():
    torch.manual_seed(5)
    first, second = lk.dropout_rng("cpu"), lk.dropout_rng("cpu")
    torch.manual_seed(5)
    assert torch.equal(lk.dropout_rng("cpu"), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,)
