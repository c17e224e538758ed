"""Every training kernel by itself, through its launcher: float64 truth for each class of problem; the mask.

lora_shrink, lora_expand, the sweeps over dy and x, lora_linear_mixed, lora_linear_backward_dx. Every output
is full of NaN before the launch.
"""

import pytest
import torch
from numerics import assert_accurate
from problems import SCALING, base_of, dense_of, draws_of, matrix

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import cpu
from lora_kernels.backends.cuda_launchers import MOST_FUSED_RANK

pytestmark = pytest.mark.stand_in
HALVES = (torch.bfloat16, torch.float16)
TOKENS = (1, 9, 16, 33, 256, 2048)
RANKS = (1, 5, 8, 16, 64, 256)
# T, columns (K of x, N of dy), r: each T and each r, columns odd, of one element, and of many tiles.
LOW = (
    *((t, 333, 16) for t in TOKENS),
    *((70, 576, r) for r in RANKS),
    *((33, c, 5) for c in (1, 7, 64, 4100)),
    (2048, 130, 64),
    (300, 1000, 256),
)
# T, N, K, r: K of whole blocks, N of whole tiles, parts of one, and one row.
FUSED = (
    *((t, 333, 576, 16) for t in TOKENS),
    *((40, 200, 320, r) for r in (0, *RANKS)),
    *((33, n, 192, 5) for n in (1, 17, 127, 129)),
    (70, 70, 1088, 16),
    (9, 130, 4160, 8),
)


def poisoned(device, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def kept(x: torch.Tensor, p: float, rng: torch.Tensor | None) -> torch.Tensor:
    return reference.lora_dropout(x, p, rng)


def judge(dtype: torch.dtype, draws: int, draw) -> None:
    """`draw()` gives {name: (out, eager, truth)} of a fresh problem; several are judged together."""
    found = [draw() for _ in range(draws)]
    for name in found[0]:
        versions = [torch.cat([each[name][v] for each in found]) for v in range(3)]
        # Few rows of h or g decide all of dA and dB, and every rank one column of them.
        few = name in ("dA", "dB", "dbias")
        assert_accurate(name, *versions, dtype, few=few, concentrated=few)


@pytest.fixture(params=[None, torch.float32], ids=["own dtype", "float32"])
def adapter_dtype(request):
    """Of A and B: x's, or PEFT's default."""
    return request.param


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t, k, r", LOW)
def test_lora_shrink(t, k, r, dtype, p, adapter_dtype, device, launchers, affordable):
    affordable(t, k, r)

    def draw():
        x, A = matrix(device, t, k, 1.0, dtype), matrix(device, r, k, k**-0.5, adapter_dtype or dtype)
        rng = lk.dropout_rng(device) if p else None
        h = poisoned(device, t, r, dtype=dtype)
        launchers.lora_shrink(x, [A], p, rng, h)
        dropped = kept(x, p, rng)
        return {"h": (h, dropped @ A.to(dtype).T, dropped.double() @ A.double().T)}

    judge(dtype, draws_of(t * r), draw)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t, n, r", LOW)
def test_lora_expand_forward(t, n, r, dtype, add, adapter_dtype, device, launchers, affordable):
    affordable(t, n, r)

    def draw():
        h, B = matrix(device, t, r, 1.0, dtype), matrix(device, n, r, r**-0.5, adapter_dtype or dtype)
        before = matrix(device, t, n, 1.0, dtype)
        y = before.clone() if add else poisoned(device, t, n, dtype=dtype)
        launchers.lora_expand_forward(h, [B], [SCALING], y, add)
        eager, truth = SCALING * (h @ B.to(dtype).T), SCALING * (h.double() @ B.double().T)
        return {"y": (y, before + eager, before.double() + truth) if add else (y, eager, truth)}

    judge(dtype, draws_of(t * n), draw)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t, k, r", LOW)
def test_lora_expand_backward(t, k, r, dtype, p, add, device, launchers, affordable):
    affordable(t, k, r)

    def draw():
        g, A = matrix(device, t, r, 1.0, dtype), matrix(device, r, k, r**-0.5, dtype)
        rng = lk.dropout_rng(device) if p else None
        before = matrix(device, t, k, 1.0, dtype)
        dx = before.clone() if add else poisoned(device, t, k, dtype=dtype)
        launchers.lora_expand_backward(g, [A], p, rng, dx, add)
        eager, truth = kept(g @ A, p, rng), kept(g.double() @ A.double(), p, rng)
        return {"dx": (dx, before + eager, before.double() + truth) if add else (dx, eager, truth)}

    judge(dtype, draws_of(t * k), draw)


@pytest.mark.parametrize("wanted", ["g dB dbias", "g", "dB", "dbias", "g dB"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t, n, r", LOW)
def test_the_sweep_over_dy(t, n, r, dtype, wanted, adapter_dtype, device, launchers, affordable):
    affordable(t, n, r)

    def draw():
        dy, h = matrix(device, t, n, 1.0, dtype), matrix(device, t, r, 1.0, dtype)
        B = matrix(device, n, r, n**-0.5, adapter_dtype or dtype)
        g = poisoned(device, t, r, dtype=dtype) if "g" in wanted.split() else None
        dB = poisoned(device, n, r, dtype=B.dtype) if "dB" in wanted else None
        dbias = poisoned(device, n, dtype=torch.float32) if "dbias" in wanted else None
        outputs = (g, [] if dB is None else [dB], dbias)
        launchers.lora_linear_backward_dy(dy, None if dB is None else h, [B], [SCALING], *outputs)
        wide = dy.double()
        return {
            name: versions
            for name, versions in {
                "g": (g, SCALING * (dy @ B.to(dtype)), SCALING * (wide @ B.double())),
                "dB": (dB, (SCALING * (dy.T @ h)).to(B.dtype), SCALING * (wide.T @ h.double())),
                "dbias": (dbias, dy.sum(dim=0), wide.sum(dim=0)),
            }.items()
            if versions[0] is not None
        }

    judge(dtype, draws_of(t * r), draw)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t, k, r", LOW)
def test_the_sweep_over_x(t, k, r, dtype, p, adapter_dtype, device, launchers, affordable):
    affordable(t, k, r)

    def draw():
        x, g = matrix(device, t, k, 1.0, dtype), matrix(device, t, r, 1.0, dtype)
        rng = lk.dropout_rng(device) if p else None
        dA = poisoned(device, r, k, dtype=adapter_dtype or dtype)
        launchers.lora_linear_backward_x(x, g, p, rng, [dA])
        dropped = kept(x, p, rng)
        return {"dA": (dA, (g.T @ dropped).to(dA.dtype), g.double().T @ dropped.double())}

    judge(dtype, draws_of(r * k), draw)


def base_matrix(device, n: int, k: int, dtype: torch.dtype, nf4: bool):
    dense = matrix(device, n, k, k**-0.5, dtype)
    return lk.nf4_quantize(dense) if nf4 else dense


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t, n, k, r", FUSED)
def test_lora_linear_mixed(t, n, k, r, dtype, nf4, adapter_dtype, device, launchers, affordable):
    affordable(t, n, k)
    given = r > MOST_FUSED_RANK

    def draw():
        x, weight = matrix(device, t, k, 1.0, dtype), base_matrix(device, n, k, dtype, nf4)
        A = matrix(device, r, k, k**-0.5, adapter_dtype or dtype) if r else None
        B = matrix(device, n, r, 0.25 * r**-0.5, adapter_dtype or dtype) if r else None
        bias = matrix(device, 1, n, 1.0, dtype)[0]
        y, h = poisoned(device, t, n, dtype=dtype), poisoned(device, t, r, dtype=dtype)
        if given:
            h.copy_(x @ A.to(dtype).T)
        launchers.lora_linear_mixed(x, base_of(weight), A, B, SCALING, bias, y, h, given)
        found = {}
        for kind in (dtype, torch.float64):
            x_, bias_ = x.to(kind), bias.to(kind)
            A_, B_ = (None if m is None else m.to(kind) for m in (A, B))
            found[kind] = reference.lora_linear(x_, dense_of(weight, kind), A_, B_, SCALING, bias_)
        (y1, h1), (y2, h2) = found[dtype], found[torch.float64]
        return {"y": (y, y1, y2), **({"h": (h, h1, h2)} if r and not given else {})}

    judge(dtype, draws_of(t * min(n, r or n)), draw)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t, n, k, r", FUSED)
def test_lora_linear_backward_dx(t, n, k, r, dtype, nf4, p, device, launchers, affordable):
    affordable(t, n, k)

    def draw():
        dy, weight = matrix(device, t, n, 1.0, dtype), base_matrix(device, n, k, dtype, nf4)
        A = matrix(device, r, k, k**-0.5, dtype) if r else None
        g = matrix(device, t, r, 0.25, dtype) if r else None
        rng = lk.dropout_rng(device) if p else None
        dx = poisoned(device, t, k, dtype=dtype)
        launchers.lora_linear_backward_dx(dy, base_of(weight), A, g, p, rng, dx)
        found = []
        for kind in (dtype, torch.float64):
            product = dy.to(kind) @ dense_of(weight, kind)
            found.append(product + kept(g.to(kind) @ A.to(kind), p, rng) if r else product)
        return {"dx": (dx, *found)}

    judge(dtype, draws_of(t * k), draw)


@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_kernel_draws_the_cpus_mask_bit_for_bit(dtype, p, device, launchers):
    """Products with one-hot rows are exact, so the dropped x itself is what each kernel writes."""
    t, r, k = 301, 64, 64
    x = (torch.rand(t, k) + 1).to(dtype)  # no zeros but the mask's
    rng = lk.dropout_rng("cpu")
    wanted = torch.empty_like(x)
    cpu.lora_dropout(x, p, rng, 0, wanted)
    assert 0 < int((wanted == 0).sum()) < wanted.numel()
    there, eye, rng = x.to(device), torch.eye(k, dtype=dtype, device=device), rng.to(device)

    h = poisoned(device, t, r, dtype=dtype)
    launchers.lora_shrink(there, [eye], p, rng, h)
    assert torch.equal(h.cpu(), wanted), "lora_shrink"

    plain = poisoned(device, t, k, dtype=dtype)
    launchers.lora_dropout(there, p, rng, 0, plain)
    assert torch.equal(plain.cpu(), wanted), "lora_dropout"

    for first in (0, 120, t - r):  # r rows at a time, from there on
        g = torch.zeros(t, r, dtype=dtype, device=device)
        g[first : first + r] = eye
        dA = poisoned(device, r, k, dtype=dtype)
        launchers.lora_linear_backward_x(there, g, p, rng, [dA])
        assert torch.equal(dA.cpu(), wanted[first : first + r]), "lora_linear_backward_x"

    dx = poisoned(device, t, k, dtype=dtype)
    launchers.lora_expand_backward(there, [eye], p, rng, dx, add=False)  # g = x, A = 1
    assert torch.equal(dx.cpu(), wanted), "lora_expand"

    nothing = torch.zeros(96, k, dtype=dtype, device=device)
    for weight in (nothing, lk.nf4_quantize(nothing)):
        dx = poisoned(device, t, k, dtype=dtype)
        dy = torch.ones(t, 96, dtype=dtype, device=device)
        launchers.lora_linear_backward_dx(dy, base_of(weight), eye, there, p, rng, dx)
        assert torch.equal(dx.cpu(), wanted), "lora_linear_backward_dx"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_no_rows_between_the_strides_are_touched(dtype, device, launchers):
    """h, y and dx as columns of a wider tensor: what lies beside them stays NaN."""
    t, k, n, r = 70, 320, 130, 24
    x, A, B = (matrix(device, *s, 1.0, dtype, shift=3) for s in ((t, k), (r, k), (n, r)))
    room = poisoned(device, t, r + n + k + 40, dtype=dtype)
    h, y, dx = room[:, 8 : 8 + r], room[:, 40 : 40 + n], room[:, 48 + n : 48 + n + k]
    launchers.lora_shrink(x, [A], 0.0, None, h)
    launchers.lora_expand_forward(h, [B], [SCALING], y, False)
    launchers.lora_expand_backward(h, [A], 0.0, None, dx, False)
    inside = torch.zeros_like(room, dtype=torch.bool)
    for start, width in ((8, r), (40, n), (48 + n, k)):
        inside[:, start : start + width] = True
    assert bool(room[inside].isfinite().all()) and bool(room[~inside].isnan().all())
