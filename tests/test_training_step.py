"""A whole training step of FusedLoRALinear by the CUDA kernels, on the host stand-in: every launch, every
gradient."""

import collections
from typing import NamedTuple

import pytest
import simt_backend
import torch
from variants import variant

import lora_kernels as lk
from lora_kernels.backends.cuda import CROSSOVERS
from lora_kernels.backends.cuda_launchers import CudaLaunchers

NAMES = ("y", "dx", "dA", "dB", "dbias")
LAUNCHERS = [name for name in vars(CudaLaunchers) if name.startswith(("lora_", "nf4_"))]


class Step(NamedTuple):
    tokens: int
    r: int
    dropout: float
    quantize: str | None = "nf4"
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None


def layer_of(step: Step) -> lk.FusedLoRALinear:
    """320 -> 192 with a bias that learns and a B that is not zero."""
    torch.manual_seed(1)
    linear = torch.nn.Linear(320, 192, dtype=step.dtype)
    with torch.no_grad():  # every block of 64 of a size of its own: a wrong scale shows
        linear.weight.mul_(2.0 ** torch.randint(-2, 3, (192, 5)).repeat_interleave(64, dim=1))
    layer = lk.FusedLoRALinear.from_linear(
        linear, r=step.r, lora_alpha=2 * step.r, lora_dropout=step.dropout, quantize=step.quantize
    )
    layer.bias.requires_grad_(True)
    with torch.no_grad():
        for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            p.normal_(std=0.1)
            p.data = p.data.to(step.adapter_dtype or step.dtype)
    return layer.train()


def taken(step: Step) -> dict[str, torch.Tensor]:
    """The step's results: the same inputs and the same dropout on every backend."""
    layer = layer_of(step)
    torch.manual_seed(2)
    x = torch.randn(step.tokens, 320, dtype=step.dtype).requires_grad_()
    dy = torch.randn(step.tokens, 192, dtype=step.dtype)
    y = layer(x)
    y.backward(dy)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return dict(zip(NAMES, (y.detach(), x.grad, A.grad, B.grad, layer.bias.grad), strict=True))


@pytest.fixture
def launched(monkeypatch):
    """How often each launcher was called."""
    counts: collections.Counter[str] = collections.Counter()
    for name in LAUNCHERS:
        whole = getattr(simt_backend.backend._launchers, name)

        def counted(*args, name=name, whole=whole, **kwargs):
            counts[name] += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(simt_backend.backend._launchers, name, counted, raising=False)
    return counts


MOST = {crossover.kernel: crossover.tokens for crossover in CROSSOVERS}
GRADIENTS = {"lora_linear_backward_dy": 1, "lora_linear_backward_x": 1}
FEW = {**GRADIENTS, "lora_linear_backward_dx": 1}
STEPS = {
    Step(4, 8, 0.0): {"lora_linear_decode": 1, **FEW},
    Step(4, 8, 0.2): {"lora_shrink": 1, "lora_linear_mixed": 1, **FEW},
    Step(40, 8, 0.0): {"lora_linear_mixed": 1, **FEW},
    Step(40, 24, 0.2): {"lora_shrink": 1, "lora_linear_mixed": 1, **FEW},
    Step(40, 48, 0.2): {"lora_shrink": 1, "lora_linear_mixed": 1, **FEW},
    Step(40, 8, 0.2, quantize=None): {"lora_shrink": 1, "lora_linear_mixed": 1, **FEW},
    Step(4, 8, 0.0, quantize=None): {"lora_linear_decode": 1, **FEW},
    Step(40, 100, 0.2): {"lora_shrink": 1, "lora_linear_mixed": 1, **FEW},
    Step(40, 8, 0.2, adapter_dtype=torch.float32): {"lora_shrink": 1, "lora_linear_mixed": 1, **FEW},
    Step(40, 8, 0.2, dtype=torch.float16): {"lora_shrink": 1, "lora_linear_mixed": 1, **FEW},
    Step(MOST["lora_linear_mixed"] + 3, 8, 0.2): {
        "lora_shrink": 1,
        "nf4_dequantize": 2,
        "lora_expand_backward": 1,
        **GRADIENTS,
    },
    Step(MOST["lora_linear_mixed"] + 3, 8, 0.0): {"lora_shrink": 1, "nf4_dequantize": 2, **GRADIENTS},
    Step(MOST["lora_linear_mixed"] + 3, 100, 0.2): {
        "lora_shrink": 1,
        "nf4_dequantize": 2,
        "lora_expand_backward": 1,
        **GRADIENTS,
    },
}


@pytest.mark.parametrize("name", ["simt-80", "simt-90"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step)))
def test_a_training_step_gives_the_cpus_gradients_by_these_launches(step, name, launched):
    with variant("cpu"):
        wanted = taken(step)
    launched.clear()
    with variant(name):
        got = taken(step)
    quantised = {"nf4_quantize": 1} if step.quantize else {}
    assert dict(launched) == {**STEPS[step], **quantised}
    # Two roundings to the dtype, of results and of what they are made of; fp32 gradients too, since h and g
    # between them are of x's dtype.
    limit = 3 * torch.finfo(step.dtype).eps
    for key in NAMES:
        assert got[key].dtype == wanted[key].dtype
        difference = (got[key].double() - wanted[key].double()).norm() / wanted[key].double().norm()
        assert difference <= limit, f"{key}: {difference:.2e}"
    if step.dropout:  # the same elements are dropped: elsewhere the error would be of the size of the term
        with variant("cpu"):
            other = taken(step._replace(dropout=0.0))
        assert (other["dA"] - wanted["dA"]).norm() > 0.1 * wanted["dA"].norm()


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [4, 7, 12])
@pytest.mark.parametrize("tokens", [40, MOST["lora_linear_mixed"] + 3])
def test_kernels_get_what_has_rank_r_in_pieces_of_16_bytes_of_xs_dtype(tokens, r, adapter_dtype, monkeypatch):
    """Adapters of any dtype and rank, h and g: else they would be loaded piecemeal instead of copied."""
    low = []

    def watch(name, places):
        whole = getattr(simt_backend.backend._launchers, name)

        def watched(*args, **kwargs):
            given = [args[i] for i in places] + [kwargs[key] for key in ("g",) if key in kwargs]
            for one in given:
                low.extend(t for t in (one if isinstance(one, list) else [one]) if t is not None)
            return whole(*args, **kwargs)

        monkeypatch.setattr(simt_backend.backend._launchers, name, watched)

    # Where their arguments are: A; v and weights; h and B; g; A and g.
    watch("_shrink", [1]), watch("_expand", [0, 1]), watch("_backward_dy", [1, 2])
    watch("_backward_x", [1]), watch("_backward_dx", [6, 7])
    step = Step(tokens, r, 0.2, adapter_dtype=adapter_dtype)
    with variant("cpu"):
        wanted = taken(step)
    with variant("simt-80"):
        got = taken(step)
    assert len(low) >= 6
    for t in low:
        assert t.dtype == step.dtype and t.stride(1) == 1, (t.dtype, t.stride())
        assert t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0, t.stride()
    for key in NAMES:
        assert got[key].dtype == wanted[key].dtype
        difference = (got[key].double() - wanted[key].double()).norm() / wanted[key].double().norm()
        assert difference <= 3 * torch.finfo(step.dtype).eps, f"{key}: {difference:.2e}"


def test_an_adapter_may_lie_anywhere(launched):
    """Views whose rows do not start on 16 bytes, or whose elements do not lie side by side."""
    torch.manual_seed(0)
    weight = lk.nf4_quantize((torch.randn(96, 128) * 128**-0.5).bfloat16())
    x, dy = torch.randn(40, 128).bfloat16().requires_grad_(), torch.randn(40, 96).bfloat16()
    A = torch.randn(8, 129).bfloat16()[:, 1:].requires_grad_()
    B = torch.randn(8, 96).bfloat16().T.requires_grad_()
    results = []
    for name in ("reference", "simt-80"):
        launched.clear()
        with variant(name):
            y = lk.lora_linear(x, weight, A, B, scaling=0.5)
            results.append([y, *torch.autograd.grad(y, [x, A, B], dy)])
    assert dict(launched) == {"lora_linear_mixed": 1, **FEW}
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.detach().abs().max()))


SPLIT = {"_decode_scratch", "_mixed_scratch", "_backward_dx_scratch", "_shrink_scratch"}


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
def test_split_sums_have_one_order_and_nothing_is_left_out(nf4, capability):
    """Slices of K, of N for dx, and strips of tokens meet through memory (in a cluster, for decode on sm_90),
    whoever arrives last: on as many multiprocessors as an H100's, in several orders of blocks."""
    torch.manual_seed(0)
    n, k, r, scratch = 1024, 2048, 8, set()
    sizes = 2.0 ** torch.randint(-2, 3, (n, k // 64)).repeat_interleave(64, dim=1)  # of blocks
    weight = (torch.randn(n, k) * sizes * k**-0.5).bfloat16()
    weight = lk.nf4_quantize(weight) if nf4 else weight
    x, dy = torch.randn(40, k).bfloat16(), torch.randn(40, n).bfloat16()
    A, B = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((r, k), (n, r)))
    rng, launchers = torch.tensor([3, 0]), simt_backend.backend._launchers

    def step(tokens, p):
        given = x[:tokens].requires_grad_()
        y = lk.lora_linear(given, weight, A, B, dropout_p=p, rng=rng if p else None)
        return [y, *torch.autograd.grad(y, [given, A, B], dy[:tokens])]

    for tokens, p, orders in ((40, 0.0, 6), (40, 0.2, 6), (4, 0.0, 4)):
        with variant("cpu"):
            wanted = step(tokens, p)
        with variant(f"simt-{capability}"), pytest.MonkeyPatch.context() as patch:
            for name in SPLIT:
                whole = getattr(launchers, name)

                def asked(*args, name=name, whole=whole):
                    workspace, counters = whole(*args)
                    scratch.update([name] if counters > 0 else [])
                    return workspace, counters

                patch.setattr(launchers, name, asked)
            simt_backend.pretend(132, capability)
            results = []
            for seed in range(orders):
                simt_backend.set_seed(seed)
                results.append(step(tokens, p))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        for got, want in zip(results[0], wanted, strict=True):
            error = (got.double() - want.double()).norm() / want.double().norm()
            assert error <= 3 * torch.finfo(torch.bfloat16).eps, f"{tokens} tokens, p = {p}: {error:.2e}"
    assert scratch == (SPLIT if capability == 80 else SPLIT - {"_decode_scratch"})


def test_only_what_is_needed_is_launched(launched):
    with variant("simt-80"):
        layer = layer_of(Step(40, 8, 0.0))
        for p in layer.parameters():
            p.requires_grad_(False)
        launched.clear()
        x = torch.randn(40, 320, dtype=torch.bfloat16).requires_grad_()
        layer(x).sum().backward()
        assert dict(launched) == {
            "lora_linear_mixed": 1,
            "lora_linear_backward_dy": 1,  # g alone
            "lora_linear_backward_dx": 1,
        }
        launched.clear()
        layer.bias.requires_grad_(True)
        layer(x.detach()).sum().backward()
        assert dict(launched) == {"lora_linear_mixed": 1, "lora_linear_backward_dy": 1}


def test_64_adapters_in_one_call_are_two_launches_beside_the_base_product(launched):
    torch.manual_seed(0)
    k, n, adapters = 128, 96, 64
    weight = lk.nf4_quantize((torch.randn(n, k) * k**-0.5).bfloat16())
    ranks = [1 + i % 20 for i in range(adapters)]
    A = [torch.randn(r, k).bfloat16().requires_grad_() for r in ranks]
    B = [torch.randn(n, r).bfloat16().requires_grad_() for r in ranks]
    index = torch.randint(-1, adapters, (70,))
    x = torch.randn(70, k).bfloat16().requires_grad_()
    dy = torch.randn(70, n).bfloat16()
    results = []
    for name in ("reference", "simt-80"):
        launched.clear()
        with variant(name):
            y = lk.lora_linear_batched(x, weight, A, B, [1 / r for r in ranks], index)
            results.append([y, *torch.autograd.grad(y, [x, *A, *B], dy)])
    assert dict(launched) == {
        "lora_linear_mixed": 1,
        "lora_shrink": 1,
        "lora_expand_forward": 1,
        "lora_linear_backward_dx": 1,
        "lora_linear_backward_dy": 1,
        "lora_expand_backward": 1,
        "lora_linear_backward_x": 1,
    }
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05 * float(a.detach().abs().max()) + 1e-6)


@pytest.mark.parametrize("busy", [(0,), (37,), (63,), (36, 37)], ids=str)
def test_gradients_where_one_or_two_of_64_adapters_have_all_rows(busy):
    """Their rows are many spans, whose sums meet; the others get zeros. Twice the same bits."""
    torch.manual_seed(0)
    k, n, tokens = 96, 72, 700
    weight = torch.randn(n, k).bfloat16()
    A = [torch.randn(4, k).bfloat16().requires_grad_() for _ in range(64)]
    B = [torch.randn(n, 4).bfloat16().requires_grad_() for _ in range(64)]
    index = torch.tensor(busy).repeat(tokens)[:tokens]
    index[::100] = -1
    x, dy = torch.randn(tokens, k).bfloat16().requires_grad_(), torch.randn(tokens, n).bfloat16()
    results = []
    for name in ("reference", "simt-90", "simt-90"):
        with variant(name):
            simt_backend.pretend(132, 90)
            y = lk.lora_linear_batched(x, weight, A, B, [0.25] * 64, index)
            results.append([y, *torch.autograd.grad(y, [x, *A, *B], dy)])
    simt_backend.pretend(4, 80)
    for want, got, again in zip(*results, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.detach().abs().max()))


def test_more_adapters_than_a_launch_takes(launched):
    torch.manual_seed(0)
    k, n, adapters = 64, 40, 70
    weight = torch.randn(n, k).bfloat16()
    A, B = (
        [torch.randn(2, k).bfloat16() for _ in range(70)],
        [torch.randn(n, 2).bfloat16() for _ in range(70)],
    )
    index = torch.arange(adapters) - 1
    x = torch.randn(adapters, k).bfloat16()
    with variant("reference"):
        wanted = lk.lora_linear_batched(x, weight, A, B, [0.5] * adapters, index)
    launched.clear()
    with variant("simt-80"):
        got = lk.lora_linear_batched(x, weight, A, B, [0.5] * adapters, index)
    assert launched["lora_shrink"] == launched["lora_expand_forward"] == 2
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
