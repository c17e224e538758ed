"""An optimizer's state as files have it: torch's names for 32-bit state, bitsandbytes' for 8-bit."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kernels import optim_state
from lora_kernels.optim.sharded import local_of, local_part, sharded_like
from lora_kernels.optim_state import dequantize_blockwise, dynamic_map, quantize_blockwise

__all__ = ["KNOWN", "NAMES", "entry_of", "flattened", "names_of", "step_of", "values_of"]

# bitsandbytes hides what has not the parameter's shape in a dictionary of this name.
NESTED = "__bnb_optimizer_quant_state__"

# Of everything that an entry of these optimizers, torch's AdamW or bitsandbytes' may have.
NAMES = {"step", "exp_avg", "exp_avg_sq", "compensation", NESTED}
NAMES |= {f"{name}{i}" for name in ("state", "absmax", "qmap") for i in (1, 2)}
# Of these, what makes an entry one with a state.
KNOWN = {"step", "exp_avg", "exp_avg_sq", "state1", "state2"}

MOST_STEPS = 2**31 - 1  # the kernels' numbers of steps are int32


def flattened(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's entry without bitsandbytes' inner dictionary."""
    return {**{k: v for k, v in entry.items() if k != NESTED}, **entry.get(NESTED, {})}


def step_of(entry: Mapping[str, Any]) -> int:
    """The number of a parameter's last step. Raises ValueError where the next one cannot be counted."""
    step = float(entry.get("step", 0))
    if not 0 <= step < MOST_STEPS:
        raise ValueError(f"state_dict: step is {step:g}, expected 0 to 2^31 - 2")
    return int(step)


def entry_of(
    parameter: Tensor,
    parts: Mapping[str, Tensor],
    shape: torch.Size,
    states: tuple[str, ...],
    bits: int,
    step: int,
) -> dict[str, Any]:
    """What a file says of one parameter.

    Args:
        parts: flat, as PagedState.read gives them.
        shape: of this process's part of the state.
        states: torch's names of the states, in order.
        bits: of the optimizer: 32 names them as torch does, 8 as bitsandbytes does, state1, state2.
    """
    local = local_of(parameter)
    count = torch.tensor(step, dtype=torch.float32, device="cpu")
    entry: dict[str, Any] = {"step": count if bits == 32 else step}
    for i, name in enumerate(states, 1):
        label = name if bits == 32 else f"state{i}"
        if name in parts:
            entry[label] = sharded_like(parts[name].view(shape), parameter)
        elif local is parameter:
            entry[label], entry[f"absmax{i}"] = parts[f"state{i}"].view(shape), parts[f"absmax{i}"]
            entry[f"qmap{i}"] = dynamic_map(signed=i == 1).to(local.device)
        else:  # the blocks of a part of a parameter are not those of the whole: what they stand for is kept
            whole = dequantize_blockwise(parts[f"state{i}"], parts[f"absmax{i}"], signed=i == 1)
            entry[label] = sharded_like(whole.view(shape), parameter)
    if "compensation" in parts:
        entry["compensation"] = sharded_like(parts["compensation"].view(shape), parameter)
    return entry


def names_of(parameter: Tensor, parts: Collection[str], states: tuple[str, ...], bits: int) -> list[str]:
    """The names of entry_of's values, from the names of its parts."""
    names = ["step"]
    for i, name in enumerate(states, 1):
        names.append(name if bits == 32 else f"state{i}")
        if name not in parts and local_of(parameter) is parameter:
            names += [f"absmax{i}", f"qmap{i}"]
    return names + ["compensation"] * ("compensation" in parts)


def values_of(
    parameter: Tensor, entry: Mapping[str, Any], states: tuple[str, ...], eight_bits: bool
) -> dict[str, Tensor]:
    """A file's entry as the parts that PagedState.write takes, converted where the file has other bits.

    Raises:
        ValueError: a state that is missing, of another shape, of an unknown map or block size, or not a
            number that AdamW can have.
    """
    local, shape = local_of(parameter), tuple(parameter.shape)
    values: dict[str, Tensor] = {}
    if "max_exp_avg_sq" in entry:
        raise ValueError("state_dict: it is of AdamW with amsgrad=True, which these optimizers do not have")
    for i, name in enumerate(states, 1):
        given = entry.get(name, entry.get(f"state{i}"))
        if not isinstance(given, Tensor):
            raise ValueError(f"state_dict: a parameter of shape {shape} has neither {name} nor state{i}")
        # A flat one is taken; another shape of as many elements is another parameter's.
        if tuple(given.shape) not in (shape, (parameter.numel(),)):
            raise ValueError(f"state_dict: {name} has shape {tuple(given.shape)}, expected {shape}")
        flat = local_part(given.reshape(shape) if given.shape != parameter.shape else given, parameter)
        flat = flat.to(local.device).reshape(-1)
        if given.dtype != torch.uint8:
            if eight_bits:
                quantised = quantize_blockwise(flat.float(), signed=i == 1)
                values[f"state{i}"], values[f"absmax{i}"] = quantised
            else:
                values[name] = flat.float()
            continue
        scales = _scales(entry, i, parameter)
        if local is not parameter:  # blocks of the whole parameter: cut what they stand for
            whole = dequantize_blockwise(given.reshape(-1), scales.to(given.device), signed=i == 1)
            part = local_part(whole.view(shape), parameter).reshape(-1).to(local.device)
            if eight_bits:
                values[f"state{i}"], values[f"absmax{i}"] = quantize_blockwise(part, signed=i == 1)
            else:
                values[name] = part
        elif eight_bits:
            values[f"state{i}"], values[f"absmax{i}"] = flat, scales
        else:
            values[name] = dequantize_blockwise(flat, scales.to(flat.device), signed=i == 1)
    if "compensation" in entry:
        compensation = entry["compensation"]
        if compensation.numel() != parameter.numel():
            raise ValueError(
                f"state_dict: compensation has shape {tuple(compensation.shape)}, expected {shape}"
            )
        values["compensation"] = local_part(compensation, parameter).reshape(-1)
    return values


def _scales(entry: Mapping[str, Any], i: int, parameter: Tensor) -> Tensor:
    """The scales of 8-bit state i, if it is of the map and the blocks that are known."""
    scales, qmap = entry.get(f"absmax{i}"), entry.get(f"qmap{i}")
    if not isinstance(scales, Tensor):
        raise ValueError(f"state_dict: state{i} has 8 bits, but there is no absmax{i}")
    blocks = -(-parameter.numel() // optim_state.BLOCK)
    if scales.numel() != blocks:
        raise ValueError(
            f"state_dict: absmax{i} has {scales.numel()} elements, expected {blocks}, one for each block of "
            f"{optim_state.BLOCK}"
        )
    # A file of a 16-bit model may hold the map in 16 bits.
    known = dynamic_map(signed=i == 1)
    if qmap is not None and not torch.equal(qmap.cpu(), known.to(qmap.dtype)):
        raise ValueError(f"state_dict: qmap{i} is not bitsandbytes' dynamic map")
    return scales.float()
