"""The shortest proof that the build works on this machine's GPU; needs no pytest.

    python3 tests/gpu/smoke.py

Loads `_C`, asks whether torch's stream symbol is bound, runs nf4_dequantize, lora_linear forward and backward
on every route (float32; bf16 of few, some and many tokens, with dropout) and 64 adapters in one call on the
device against the specification, steps of a paged optimizer against the CPU's, and ops through
torch.library.opcheck. Exit status 0, or 1 with one line that says what is wrong.
"""

import sys

import torch

ROUTES = ((4, 0.0), (40, 0.0), (40, 0.1), (300, 0.1), (600, 0.1))  # T, dropout


def wrong_training_step(device: str = "cuda") -> str | None:
    """Each training kernel once or twice, against float64; what is off, if anything is."""
    import place  # noqa: F401  makes the tests' modules importable
    from problems import NAMES, BatchedCase, Case

    def off(out: torch.Tensor, truth: torch.Tensor) -> bool:
        return not float((out.cpu().double() - truth).norm()) <= 1e-2 * float(truth.norm())

    for t, p in ROUTES:
        case = Case("cpu", t, 200, 320, 16, torch.bfloat16, p=p, adapter_dtype=torch.float32)
        outs, truths = case.moved(device).computed(), case.expected(torch.float64)
        for name, out, truth in zip(NAMES, outs, truths, strict=True):
            if off(out, truth):
                return f"{name} of {t} tokens, p = {p}"
    case = BatchedCase("cpu", 150, 96, 128, [1 + i % 20 for i in range(64)], torch.bfloat16, p=0.1)
    outs, truths = case.moved(device).computed(), case.expected(torch.float64)
    for name, out, truth in zip(case.NAMES, outs, truths, strict=True):
        if isinstance(out, list):
            out, truth = (torch.cat([part.reshape(-1) for part in parts]) for parts in (out, truth))
        if off(out, truth):
            return f"{name} of 64 adapters"
    return None


def main() -> int:
    from lora_kernels.backends.native import _C

    print(f"loaded {_C.__name__} (built for {_C.cuda_archs or 'no GPU'}), torch {torch.__version__}")
    if not torch.cuda.is_available():
        print("smoke: no CUDA device")
        return 1
    if _C.cuda_stream_bound != 1:
        print("smoke: torch's stream symbol is not bound, so no kernel can be launched on torch's stream")
        return 1

    import lora_kernels as lk
    from lora_kernels import reference

    print(f"device {torch.cuda.get_device_name()}, stream symbol bound")
    for n, k in ((256, 512), (37, 91)):  # the aligned kernel, and the general one
        weight = lk.nf4_quantize(torch.randn(n, k))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            wanted = reference.nf4_dequantize(*weight.base_weight()[:4], (n, k), weight.blocksize, dtype)
            if not torch.equal(weight.to("cuda").dequantize(dtype).cpu(), wanted):
                print(f"smoke: nf4_dequantize [{n}, {k}] to {dtype} differs from the specification")
                return 1

    x, A, B = torch.randn(32, 512), torch.randn(8, 512), torch.randn(256, 8)
    weight, results = lk.nf4_quantize(torch.randn(256, 512)), []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, A, B)]
        y = lk.lora_linear(leaves[0], weight.to(device), *leaves[1:], scaling=0.5)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for name, on_cpu, on_cuda in zip(("y", "dx", "dA", "dB"), *results, strict=True):
        error = float((on_cuda.cpu().double() - on_cpu.double()).norm() / on_cpu.double().norm())
        if not error < 1e-5:
            print(f"smoke: {name} on the device is off by {error:.1e} from the CPU's")
            return 1
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 5000).to(device)) for device in ("cpu", "cuda"))
    for leaf in (p, q):
        optimizer = lk.optim.PagedAdamW8bit([leaf], lr=1e-2)
        for step in range(3):
            leaf.grad = torch.linspace(0.1, step + 1.0, 5000).to(leaf.device)
            optimizer.step()
        optimizer.close()
    if not torch.equal(q.detach().cpu(), p.detach()):
        print("smoke: three steps of PagedAdamW8bit on the device differ from the CPU's")
        return 1
    reason = wrong_training_step()
    if reason is not None:
        print(f"smoke: wrong result: {reason}")
        return 1
    w = weight.to("cuda")
    parts = (w.packed, w.absmax, w.nested_absmax, w.offset, w.blocksize)
    x, A, B = (t.detach().to("cuda").requires_grad_() for t in (x, A, B))
    for op, arguments in (
        (torch.ops.lora_kernels.nf4_dequantize.default, (*parts, [256, 512], torch.bfloat16)),
        (torch.ops.lora_kernels.lora_linear.default, (x, *parts, 256, A, B, 0.5, None, 0.0, None)),
    ):
        try:
            torch.library.opcheck(op, arguments)
        except Exception as error:
            print(f"smoke: opcheck of {op.name()}: {str(error).strip().splitlines()[0]}")
            return 1
    torch.cuda.synchronize()
    print("smoke: nf4_dequantize is bit-exact, lora_linear is right on every route; opcheck passes for both")
    return 0


if __name__ == "__main__":
    sys.exit(main())
