"""Parameters that are DTensors (FSDP2, tensor parallelism): this process's part, and tensors sharded
alike."""

from torch import Tensor

__all__ = ["local_of", "local_part", "sharded_like"]


def local_of(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, without a copy; another tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What of a tensor of the parameter's shape belongs to this process's part of the parameter: of a DTensor
    that lies otherwise, a sum of which every process has a summand for one, after communication."""
    if not hasattr(parameter, "to_local"):
        return local_of(tensor)
    if hasattr(tensor, "to_local"):
        if tensor.placements != parameter.placements:
            tensor = tensor.redistribute(placements=parameter.placements)
        return tensor.to_local()
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements).to_local()


def sharded_like(part: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of the parameter's shape of which each process has given its part."""
    if not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
