"""One process of a distributed training run: distributed.py KIND RANK PROCESSES STORE FOLDER BITS.

KIND is ddp, partial, fsdp, save or load: replicated DTensors whose gradients are sums over the processes;
FSDP2 that saves a DCP checkpoint after three of six steps, and one that goes on from it. Process 0 writes the
trained parameters to FOLDER/trained.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_kernels as lk

STEPS = 6
SHAPES = (64, 193, 51)  # rows that two processes cannot share evenly


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SHAPES[0], SHAPES[1]), nn.GELU(), nn.Linear(SHAPES[1], SHAPES[2]))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, SHAPES[0], generator=generator), torch.randn(32, SHAPES[2], generator=generator))
        for _ in range(STEPS)
    ]


def optimizer_of(net: nn.Module, bits: int) -> lk.optim.PagedAdamW:
    return lk.optim.PagedAdamW(
        net.parameters(), lr=1e-2, state_bits=bits, resident_bytes=1 << 17, page_bytes=1 << 16
    )


def train(net: nn.Module, optimizer, given, rank: int = 0, processes: int = 1) -> None:
    for x, target in given:
        optimizer.zero_grad()
        (net(x[rank::processes]) - target[rank::processes]).square().mean().backward()
        optimizer.step()


def fsdp(rank: int, processes: int, folder: Path, kind: str, bits: int) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model()
    mesh = init_device_mesh("cpu", (processes,))
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    optimizer = optimizer_of(net, bits)
    given = batches()
    if kind == "load":
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        weights, state = get_state_dict(net, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
        set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
        given = given[STEPS // 2 :]
    elif kind == "save":
        given = given[: STEPS // 2]
    train(net, optimizer, given, rank, processes)
    if kind == "save":
        weights, state = get_state_dict(net, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    return {name: p.full_tensor().detach() for name, p in net.named_parameters()}


def partial(rank: int, processes: int, bits: int) -> dict[str, Tensor]:
    """As tensor parallelism has it for the weights of norms."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    net, mesh = model(), init_device_mesh("cpu", (processes,))
    whole = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])) for p in net.parameters()]
    optimizer = lk.optim.PagedAdamW(whole, lr=1e-2, state_bits=bits, page_bytes=1 << 16)
    for x, target in batches():
        net.zero_grad()
        (net(x[rank::processes]) - target[rank::processes]).square().mean().backward()
        for p, q in zip(whole, net.parameters(), strict=True):
            p.grad = DTensor.from_local(q.grad / processes, mesh, [Partial("sum")])
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(whole, net.parameters(), strict=True):
                q.copy_(p.to_local())
    return {name: p.detach() for name, p in net.named_parameters()}


def main(kind: str, rank: int, processes: int, store: str, folder: Path, bits: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(model())
        train(net, optimizer_of(net, bits), batches(), rank, processes)
        trained = {name: p.detach() for name, p in net.module.named_parameters()}
    elif kind == "partial":
        trained = partial(rank, processes, bits)
    else:
        trained = fsdp(rank, processes, folder, kind, bits)
    if rank == 0:
        torch.save(trained, folder / "trained.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    kind, rank, processes, store, folder, bits = sys.argv[1:]
    main(kind, int(rank), int(processes), store, Path(folder), int(bits))
    # Gloo's threads may still hold tensors, and abort an interpreter that is taken down under them: seen once
    # beside a busy neighbour, after all was done; pytorch/pytorch#179291.
    sys.stdout.flush()
    os._exit(0)
