"""The ways in which panels bring the LoRA term to y, on the host stand-in: all right, and what each costs."""

import pytest
import simt_backend
import torch
from numerics import LIMIT, assert_accurate

import lora_kernels as lk
from lora_kernels import panels, reference
from lora_kernels.backends.cuda import CROSSOVERS, LOW_RANK_WAY, CudaBackend

WAYS = (panels.FIRST, panels.LAST, panels.JOINED)
NO_FUSED = tuple(row._replace(tokens=0) for row in CROSSOVERS)
S = 1.7


def backend_with(way, panel_bytes=16 << 10):
    return CudaBackend(simt_backend.backend._launchers, "forced", NO_FUSED, panel_bytes, way)


def calls_of(monkeypatch, name):
    """The arguments of every call of torch's `name` from here on."""
    found, real = [], getattr(panels.torch, name)
    monkeypatch.setattr(panels.torch, name, lambda *a, **kw: found.append(a) or real(*a, **kw))
    return found


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("r", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_as_accurate_as_eager(way, dtype, r, with_bias, p):
    t, n, k = 70, 300, 91
    x = torch.randn(t, k + 5).to(dtype)[:, 5:]  # rows apart, and not on 16 bytes
    weight = lk.nf4_quantize((torch.randn(n, k) * k**-0.5).to(dtype))
    A, B = (torch.randn(r, k) * k**-0.5).to(dtype), (torch.randn(n, r) * r**-0.5).to(dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    rng = lk.dropout_rng("cpu") if p else None
    y, h = (torch.full(shape, float("nan"), dtype=dtype) for shape in ((t, n), (t, r)))
    backend_with(way).lora_linear(x, weight.base_weight(), A, B, S, bias, p, rng, y, h)
    found = []
    for kind in (dtype, torch.float64):
        parts = (None if v is None else v.to(kind) for v in (A, B))
        dense = reference.nf4_dequantize(*weight.base_weight()[:4], (n, k), weight.blocksize, kind)
        start = None if bias is None else bias.to(kind)
        found.append(reference.lora_linear(x.to(kind), dense, *parts, S, start, p, rng))
    assert_accurate("y", y, found[0][0], found[1][0], dtype)
    assert float((h.double() - found[1][1]).norm()) <= LIMIT[dtype] * float(found[1][1].norm())


def test_joined_is_one_product_for_each_panel_and_the_others_two_passes(monkeypatch):
    t, n, k, r = 40, 256, 64, 5
    weight = lk.nf4_quantize(torch.randn(n, k).bfloat16()).base_weight()
    x, A, B = torch.randn(t, k).bfloat16(), torch.randn(r, k).bfloat16(), torch.randn(n, r).bfloat16()
    y, h = torch.empty(t, n).bfloat16(), torch.empty(t, r).bfloat16()
    products, sums = calls_of(monkeypatch, "mm"), calls_of(monkeypatch, "addmm")
    for way, of_mm, of_addmm in ((panels.JOINED, 4, 0), (panels.FIRST, 0, 4), (panels.LAST, 4, 0)):
        products.clear(), sums.clear()
        backend = backend_with(way, panel_bytes=2 * n * k // 4)  # four panels
        backend.lora_linear(x, weight, A, B, S, None, 0.0, None, y, h)
        assert (len(products), len(sums)) == (of_mm, of_addmm), way
        columns = k + 16 if way == panels.JOINED else k  # r = 5, rounded up
        assert {a[0].shape[1] for a in products} <= {columns}, way


def test_a_weight_twice_as_wide_as_long_is_joined_where_the_copy_of_x_is_small():
    backend = backend_with(None)
    x = torch.empty(64, 64).bfloat16()
    wide, square = (lk.nf4_quantize(torch.randn(n, 64)).base_weight() for n in (128, 64))
    assert backend._low_rank_way(x, wide, 16) == LOW_RANK_WAY.way == panels.JOINED
    assert backend._low_rank_way(x, square, 16) == panels.FIRST
    assert backend._low_rank_way(x, wide, 0) == panels.FIRST  # no adapter
    assert backend._low_rank_way(x.float(), wide, 16) == panels.FIRST
    assert backend._low_rank_way(torch.empty(257, 64).bfloat16(), wide, 16) == panels.FIRST  # over 32 KiB
    dense = wide._replace(data=torch.randn(128, 64).bfloat16(), absmax=None, blocksize=0)
    assert not dense.quantized and backend._low_rank_way(x, dense, 16) == panels.FIRST
    text = "\n".join(backend.explain(wide, 64, torch.bfloat16))
    assert "in the same GEMM" in text and "not measured" in text
    assert "is written first" in "\n".join(backend.explain(square, 64, torch.bfloat16))


@pytest.mark.parametrize("way", WAYS)
def test_no_tokens_and_no_rows(way):
    backend = backend_with(way)
    for t, n in ((0, 64), (3, 0)):
        weight = lk.nf4_quantize(torch.randn(n, 64).bfloat16()).base_weight()
        x, A, B = (torch.randn(*s).bfloat16() for s in ((t, 64), (4, 64), (n, 4)))
        y, h = torch.empty(t, n).bfloat16(), torch.zeros(t, 4).bfloat16()
        backend.lora_linear(x, weight, A, B, S, None, 0.0, None, y, h)
        assert y.numel() == 0 and h.isfinite().all()
