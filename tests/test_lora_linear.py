"""lora_linear and its backward on every backend: accuracy against float64 truth, shapes, strides, purity."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import INPUT_KINDS, LIMIT, assert_accurate, make_input, relative_error
from variants import FUSED_ON_A_CPU, ROUNDS_WEIGHTS, VARIANTS, variant

import lora_kernels as lk
from lora_kernels import panels, reference
from lora_kernels.backends import native, use_backend
from lora_kernels.backends.native import CPU_ISAS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case:
    """One random problem, its truth in float64 and the eager computation in the working dtype."""

    def __init__(self, t, n, k, r, dtype, kind="normal", nf4=True, p=0.0, adapter_dtype=None, bias=True):
        adapter_dtype = adapter_dtype or dtype
        self.x = make_input(kind, t, k, dtype=dtype)
        std = max(k, 1) ** -0.5
        dense = (torch.randn(n, k) * std).to(dtype)
        self.weight = lk.nf4_quantize(dense) if nf4 else dense
        self.A = (torch.randn(r, k) * std).to(adapter_dtype)
        self.B = (torch.randn(n, r) * 0.25 * r**-0.5).to(adapter_dtype)  # a delta of about a sixth of y
        self.bias = torch.randn(n).to(dtype) if bias else None
        self.dy = torch.randn(t, n).to(dtype)
        self.scaling, self.p, self.rng = 0.7, p, torch.randint(0, 2**63 - 1, (2,)) if p else None
        self.dtype = dtype

    def dense(self, dtype):
        if isinstance(self.weight, lk.NF4Weight):
            w = self.weight
            return reference.nf4_dequantize(*w.base_weight()[:4], tuple(w.shape), w.blocksize, dtype)
        return self.weight.to(dtype)

    def expected(self, dtype):
        """y, dx, dA, dB, dbias by the specification: truth in float64, eager in the working dtype."""
        cast = dtype if dtype == torch.float64 else None
        x, dy, A, B = (v.to(cast or v.dtype) for v in (self.x, self.dy, self.A, self.B))
        bias = None if self.bias is None else self.bias.to(cast or self.bias.dtype)
        weight = self.dense(dtype)
        y, h = reference.lora_linear(x, weight, A, B, self.scaling, bias, self.p, self.rng)
        grads = reference.lora_linear_backward(dy, x, h, weight, A, B, self.scaling, self.p, self.rng)
        return (y, *grads)

    def computed(self):
        """The same by the public function and autograd."""
        return self.computed_from(
            *(None if v is None else v.clone() for v in (self.x, self.A, self.B, self.bias))
        )

    def computed_from(self, x, A, B, bias):
        leaves = [v.requires_grad_() for v in (x, A, B, bias) if v is not None]
        y = lk.lora_linear(
            x,
            self.weight,
            A,
            B,
            scaling=self.scaling,
            bias=bias,
            dropout_p=self.p,
            rng=self.rng,
        )
        y.backward(self.dy)
        return (y.detach(), *(leaf.grad for leaf in leaves), *([None] if bias is None else []))

    def results(self):
        """What was computed, eager's and the truth, for each of y, dx, dA, dB, dbias."""
        return list(
            zip(self.computed(), self.expected(self.dtype), self.expected(torch.float64), strict=True)
        )


def check(*shape, draws=1, as_eager=False, **options):
    """Asserts the accuracy of every output on `draws` fresh problems, taken together."""
    cases = [Case(*shape, **options) for _ in range(draws)]
    results = zip(*(case.results() for case in cases), strict=True)
    for name, versions in zip(("y", "dx", "dA", "dB", "dbias"), results, strict=True):
        if versions[0][0] is not None:
            versions = (torch.cat(parts) for parts in zip(*versions, strict=True))
            # However many elements dA and dB have, they are made of T·r values of g and of h.
            few = name in ("dA", "dB") and cases[0].x.shape[0] * cases[0].A.shape[0] * draws < 1024
            concentrated = few or options.get("kind") == "outlier channel"
            judged = {"as_eager": as_eager and not few, "few": few, "concentrated": concentrated}
            assert_accurate(name, *versions, cases[0].dtype, **judged)


def draws_for(kind):
    """An outlier channel leaves dA with r values that matter: one draw cannot tell two error levels apart."""
    return 12 if kind == "outlier channel" else 1


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_forward_and_gradients_are_as_accurate_as_eager(kind, dtype, p, kernels):
    check(72, 256, 512, 16, dtype=dtype, kind=kind, p=p, draws=draws_for(kind))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_float32_adapters_on_a_16_bit_base(dtype, kind, kernels):
    options = {"dtype": dtype, "kind": kind, "p": 0.1, "adapter_dtype": torch.float32}
    check(64, 192, 448, 16, **options, draws=draws_for(kind))
    assert [out.dtype for out in Case(64, 192, 448, 16, **options).computed()] == [
        dtype,
        dtype,
        torch.float32,
        torch.float32,
        dtype,
    ]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_few_tokens(tokens, dtype, p, kernels):
    """Odd N, a rank beside the vector width, K of whole cache lines of codes; as accurate as eager."""
    for n, k, r in ((333, 768, 17), (1000, 256, 3)):
        check(tokens, n, k, r, draws=-(-4096 // (tokens * min(n, k))), dtype=dtype, kind="gelu", p=p)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("r", [40, 100, 256])
def test_large_ranks(r, tokens, p, kernels):
    """Several chunks of ranks; of a GPU's kernels others than for small ones."""
    check(tokens, 96, 128, r, dtype=torch.bfloat16, p=p)


@pytest.mark.parametrize("k", [50, 65, 67])
def test_masks_of_rows_of_odd_sizes(k, kernels):
    """Four elements share a counter of the mask, and so do the end of a row and the start of the next."""
    check(40, 33, k, 8, draws=4, dtype=torch.bfloat16, kind="gelu", p=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_of_tokens(dtype, kernels):
    """Masks, and sums of dA and dB, go on from block to block (up to 384 tokens; of bf16 units 4096)."""
    tokens = 4200 if kernels in FUSED_ON_A_CPU else 900
    check(tokens, 48, 64, 8, dtype=dtype, kind="gelu", p=0.2)


@pytest.mark.parametrize("blocksize", reference.NF4_BLOCKSIZES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_every_blocksize(blocksize, double_quant, kernels):
    """Blocks that a cache line holds several of, one of, and a part of; rows of whole blocks and not."""
    for tokens, k in ((1, 4096), (3, 8192), (20, 4096), (2, 4096 + 128), (20, 4096 + 128)):
        case = Case(
            tokens, 72, k, 16, torch.float32
        )  # of one token, h is r numbers: their norm must say something
        case.weight = lk.nf4_quantize(case.dense(torch.float32), blocksize, double_quant)
        for out, _, truth in case.results():
            assert relative_error(out, truth) <= LIMIT[torch.float32]


def assert_threads_do_not_matter(case):
    """Of kernels of our own: torch's GEMM promises nothing of the kind."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.computed())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("tokens", [2, 40, 500])
def test_results_do_not_depend_on_the_number_of_threads(tokens, kernels):
    if kernels in FUSED_ON_A_CPU:
        assert_threads_do_not_matter(Case(tokens, 520, 640, 16, torch.float32, p=0.1))
        assert_threads_do_not_matter(Case(tokens, 520, 640, 16, torch.bfloat16))


def test_a_row_does_not_depend_on_the_rows_beside_it(kernels):
    """Within one kernel: up to 4 (cpu), 47 (avx512bf16) and 8 (cuda) tokens have others; torch's is none."""
    pieces = {
        "simt": (slice(0, 1), slice(2, 7)),
        "cpu": (slice(0, 5), slice(7, 40), slice(380, 395)),
        "cpu-avx512bf16": (slice(0, 48), slice(7, 70), slice(380, 443)),
    }
    if kernels == "cpu-panels":
        return
    case = Case(600 if kernels in FUSED_ON_A_CPU else 8, 96, 256, 8, torch.bfloat16)
    whole = lk.lora_linear(case.x, case.weight, case.A, case.B, bias=case.bias)
    for rows in pieces.get(kernels) or pieces[kernels.partition("-")[0]]:
        part = lk.lora_linear(case.x[rows], case.weight, case.A, case.B, bias=case.bias)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_every_edge_of_the_tiles_of_bf16_units(nf4, adapter_dtype, kernels):
    """Counts beside a tile (16, 32), a panel (32), a span (128), a depth (512, or 640 at the end), a group of
    tokens (512); terms that share a P and, of a large rank, that do not."""
    for t, n, k, r in (
        (6, 31, 576, 3),
        (17, 33, 1056, 33),
        (33, 129, 128, 16),
        (129, 300, 544, 5),
        (530, 48, 64, 8),
        (65, 640, 672, 300),
    ):
        check(
            t,
            n,
            k,
            r,
            dtype=torch.bfloat16,
            nf4=nf4,
            adapter_dtype=adapter_dtype,
            as_eager=kernels in ROUNDS_WEIGHTS,
            draws=1 + 200 // t,
        )


def test_infinities_of_float32_adapters_do_not_become_numbers(kernels):
    """Nor what is beside them: where the adapters are split into bf16 parts, inf - inf would be a NaN."""
    case = Case(40, 32, 64, 4, torch.bfloat16, adapter_dtype=torch.float32)
    case.B[5, 0] = float("inf")
    y = lk.lora_linear(case.x, case.weight, case.A, case.B, bias=case.bias)
    wrong = ~torch.isfinite(y)
    assert bool(wrong[:, 5].all()) and not bool(wrong[:, :5].any()) and not bool(wrong[:, 6:].any())


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_tensors(offset, kernels):
    """Views that start anywhere in memory, with rows of any stride."""
    case = Case(9, 70, 192, 5, torch.bfloat16)
    wanted = case.computed()

    def moved(t):
        room = torch.empty(t.numel() + t.shape[0] * 7 + offset, dtype=t.dtype)
        stride = t.shape[-1] + (7 if t.dim() == 2 and t.shape[1] > 1 else 0)
        view = room[offset:].as_strided(t.shape, (stride, 1) if t.dim() == 2 else (1,))
        return view.copy_(t)

    w = case.weight
    packed = torch.empty(w.packed.numel() + offset, dtype=torch.uint8)[offset:].view(-1, 1).copy_(w.packed)
    absmax = torch.empty(w.absmax.numel() + offset, dtype=torch.uint8)[offset:].copy_(w.absmax)
    case.weight = lk.NF4Weight(packed, absmax, w.nested_absmax, w.offset, w.shape, w.blocksize, w.dtype)
    case.x, case.dy, case.bias = moved(case.x), moved(case.dy), moved(case.bias)
    for name in ("A", "B"):
        setattr(case, name, moved(getattr(case, name)))
    for out, other in zip(case.computed(), wanted, strict=True):
        # The CUDA kernels want codes on 16 bytes, as torch allocates them: others go another way.
        same = torch.equal(out, other) if kernels.startswith("cpu") else None
        assert same or (same is None and relative_error(out, other.double()) <= 2 * LIMIT[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_base(dtype, kernels):
    check(64, 160, 320, 16, dtype=dtype, kind="gelu", nf4=False, p=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["magnitudes", "gelu"])
def test_long_inner_dimensions(dtype, kind, kernels):
    """K = 14336 and, for dx, N = 14336: several panels and slabs, and sums long enough to show a bias."""
    # An element's largest error in float32 varies; of several draws together it is steady. The kernels' is
    # 0.7 to 1.0 times eager's; without the totals of kLongSum (csrc/cpu/gemm.h) dx's was 1.5 to 3 times.
    draws = 3 if dtype == torch.float32 else 1
    for shape in ((64, 80, 14336, 8), (64, 14336, 80, 8)):
        check(*shape, dtype=dtype, kind=kind, as_eager=kernels in ROUNDS_WEIGHTS, draws=draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_of_any_size_give_the_same_result(dtype, monkeypatch):
    case = Case(33, 300, 200, 5, dtype, "gelu", p=0.3)
    with variant("cpu-panels"):
        whole = case.computed()
        for panel_bytes in (1, 64 * 200 * 4, 130 * 200 * 2):
            monkeypatch.setattr(panels, "PANEL_BYTES", panel_bytes)
            check(33, 300, 200, 25, dtype=dtype, kind="gelu", p=0.3)
            for out, other in zip(case.computed(), whole, strict=True):
                assert relative_error(out, other.double()) <= LIMIT[dtype]


def test_the_workspace_is_a_panel_and_not_the_weight(monkeypatch):
    sizes, real = [], torch.empty

    def recording(*args, **kwargs):
        out = real(*args, **kwargs)
        sizes.append(out.nbytes)
        return out

    case = Case(8, 1024, 1024, 4, torch.float32)
    monkeypatch.setattr(panels, "PANEL_BYTES", 256 << 10)
    monkeypatch.setattr(panels.torch, "empty", recording)
    with variant("cpu-panels"):
        case.computed()
    assert sizes and max(sizes) <= 256 << 10


@pytest.mark.parametrize("isa", CPU_ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_workspaces_do_not_grow_with_the_tokens(dtype, isa):
    """Two blocks of 8 MiB at most (of x and dy packed, and of x dropped) and fp32 sums of dA and dB."""
    code, n, k, r, p = native.DTYPE_CODES[dtype], 4096, 4096, 16, True
    with variant(f"cpu-{isa}"):
        for tokens in (2048, 1 << 20):
            assert native._C.lora_linear_workspace(tokens, code, k, r) <= 9 << 20
            assert native._C.lora_linear_backward_workspace(tokens, code, n, k, r, p) <= 18 << 20
        small = native._C.lora_linear_backward_workspace(1 << 20, code, 576, 4096, r, p)
        assert small <= 18 << 20  # x dropped is as wide as K, whatever N is


@pytest.mark.parametrize("n, fails", [(64, True), (0, False)], ids=["an error", "no row"])
def test_a_shrink_that_was_started_is_waited_for_without_a_panel_too(n, fails):
    """It may run on another stream, where x, h and the workspace of whoever comes next are at stake."""
    waited = []

    def nf4_dequantize(*_):
        if fails:
            raise MemoryError
        raise AssertionError("W0 has no row")

    kernels = panels.Kernels(nf4_dequantize, None, lambda *_: lambda: waited.append(True))
    base = lk.nf4_quantize(torch.randn(n, 64)).base_weight()
    arguments = (torch.randn(3, 64), base, torch.randn(2, 64), torch.randn(n, 2))
    with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
        outputs = (torch.empty(3, n), torch.empty(3, 2))
        panels.lora_linear(kernels, *arguments, 1.0, None, 0.0, None, *outputs)
    assert waited == [True]


@settings(max_examples=50, deadline=None)
@given(
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    n=st.integers(0, 70),
    k=st.integers(0, 150),
    r=st.integers(1, 20),
    nf4=st.booleans(),
    p=st.sampled_from((0.0, 0.4)),
    dtype=st.sampled_from(DTYPES),
    backend_name=st.sampled_from(VARIANTS),
)
def test_any_shape_and_rank_of_x(leading, n, k, r, nf4, p, dtype, backend_name):
    t = 1
    for size in leading:
        t *= size
    case = Case(max(t, 1), n, k, r, dtype, nf4=nf4, p=p)
    case.x, case.dy = case.x[:t], case.dy[:t]
    with variant(backend_name):
        leaf = case.x.reshape(*leading, k).clone().requires_grad_()
        A, B = (m.clone().requires_grad_() for m in (case.A, case.B))
        y = lk.lora_linear(leaf, case.weight, A, B, scaling=0.7, bias=case.bias, dropout_p=p, rng=case.rng)
        assert y.shape == (*leading, n) and y.dtype == dtype and y.is_contiguous()
        y.backward(case.dy.reshape(y.shape))
    assert leaf.grad.shape == leaf.shape and A.grad.shape == A.shape and B.grad.shape == B.shape
    if t == 0:
        assert not A.grad.any() and not B.grad.any()
        return
    tolerance = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    truths = case.expected(torch.float64)[:4]
    outs = (y.detach().reshape(t, n), leaf.grad.reshape(t, k), A.grad, B.grad)
    for out, truth in zip(outs, truths, strict=True):
        if truth.numel():
            assert float((out.double() - truth).abs().max()) <= tolerance * (1 + float(truth.abs().max()))


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 5, 20])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_no_inputs_and_no_outputs(nf4, tokens, p, backend):
    """K = 0: y is the bias and nothing depends on A or B. N = 0: no y, and zero gradients."""
    case = Case(tokens, 7, 0, 3, torch.float32, nf4=nf4, p=p)
    y, dx, dA, dB, dbias = case.computed()
    assert torch.equal(y, case.bias.expand(tokens, 7)) and dx.shape == (tokens, 0) and dA.shape == (3, 0)
    assert not dB.any() and torch.allclose(dbias, case.dy.sum(dim=0))
    assert not lk.lora_linear(case.x, case.weight, case.A, case.B).any()
    case = Case(tokens, 0, 128, 3, torch.float32, nf4=nf4, p=p)
    y, dx, dA, dB, _ = case.computed()
    assert y.shape == (tokens, 0) and dB.shape == (0, 3) and not dx.any() and not dA.any()


def test_strides_do_not_matter(backend):
    case = Case(24, 40, 64, 4, torch.float32)
    wanted = case.computed()
    wide = torch.randn(24, 130)
    wide[:, 1:129:2] = case.x
    transposed = case.x.T.contiguous().T
    for x in (wide[:, 1:129:2], transposed):
        assert torch.equal(x, case.x)
        case.x = x
        A, B = (m.T.contiguous().T.requires_grad_() for m in (case.A, case.B))
        leaf = x.detach().requires_grad_()
        y = lk.lora_linear(leaf, case.weight, A, B, scaling=0.7, bias=case.bias)
        y.backward(case.dy.T.contiguous().T)
        for out, want in zip((y, leaf.grad, A.grad, B.grad), wanted, strict=False):
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_expanded_inputs_and_gradients(backend):
    """Stride 0 in x (expand) and in dy (the gradient of sum)."""
    case = Case(1, 40, 64, 4, torch.float32, p=0.2)
    leaf = case.x.clone().requires_grad_()
    arguments = {"scaling": 0.7, "dropout_p": 0.2, "rng": case.rng}
    y = lk.lora_linear(leaf.expand(6, 64), case.weight, case.A, case.B, **arguments)
    y.sum().backward()
    again = case.x.expand(6, 64).contiguous().requires_grad_()
    y2 = lk.lora_linear(again, case.weight, case.A, case.B, **arguments)
    y2.backward(torch.ones(6, 40))
    torch.testing.assert_close(y, y2)
    torch.testing.assert_close(leaf.grad, again.grad.sum(0, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_values_of_other_rows(dtype):
    case = Case(40, 96, 128, 8, dtype)
    arguments = {"scaling": 0.7, "bias": case.bias}
    with use_backend("cpu"):
        y = lk.lora_linear(case.x, case.weight, case.A, case.B, **arguments)
        other = case.x.clone()
        other[20:] = torch.randn(20, 128).to(dtype) * 50
        changed = lk.lora_linear(other, case.weight, case.A, case.B, **arguments)
    assert torch.equal(y[:20], changed[:20])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_deterministic(dtype, backend):
    case = Case(50, 200, 300, 12, dtype, p=0.1)
    first, second = case.computed(), case.computed()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_zero_B_gives_exactly_the_base(backend):
    for dtype in DTYPES:
        case = Case(16, 64, 128, 8, dtype)
        case.B.zero_()
        y = lk.lora_linear(case.x, case.weight, case.A, case.B, scaling=2.0, bias=case.bias)
        assert torch.equal(y, lk.lora_linear(case.x, case.weight, bias=case.bias))


def test_inputs_are_not_changed(backend):
    case = Case(16, 64, 96, 4, torch.bfloat16, p=0.3)
    tensors = [case.x, case.A, case.B, case.bias, case.dy, case.rng, *case.weight.tensors().values()]
    before = [t.clone() for t in tensors]
    case.computed()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("tokens", [3, 16, 40, 600])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_scaled_h_beyond_float16(tokens, p, backend):
    """h is 6400 and s·h 102400; y is not: eager rounds h, and scales h·Bᵀ. With B = 0 an infinity is NaN."""
    case = Case(tokens, 72, 64, 2, torch.float16, p=p, nf4=tokens % 16 == 0)
    case.x.fill_(100)
    case.A.fill_(1)
    case.scaling = 16.0
    for value in (0.0, 2.0**-12):
        case.B.fill_(value)
        y, truth = case.computed()[0], case.expected(torch.float64)[0]
        assert relative_error(y, truth) <= 2 * LIMIT[torch.float16]


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-3])
def test_any_finite_scaling(scaling, backend):
    case = Case(72, 64, 80, 8, torch.float32, p=0.1)
    case.scaling = scaling
    y, dx, dA, dB, _ = case.computed()
    for out, truth in zip((y, dx, dA, dB), case.expected(torch.float64), strict=False):
        torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-4)
