"""Sum tensors over all processes (all-reduce), in messages of some MB. Many small ones would each wait for the network.

Exchange `fp32` sends float32. `bf16` sends half as many bytes: each process receives its part of all others' values in
bfloat16, adds them in float32 in the order of the ranks, and sends the sum in bfloat16. Adding in bfloat16 would double
the error. With either, all processes have the same bits afterwards.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**25  # bytes of float32 in one message at most, unless a single tensor is larger


def sum_all(tensors: list[Tensor], exchange: str) -> int:
    """Sum float32 tensors over all processes, in place. All processes pass the same shapes in the same order.

    Args:
        exchange: "fp32" or "bf16", see above.
    Returns:
        Size of this process's summands in bytes, in the dtype in which they are sent.
    """
    sent = 0
    for piece in _pieces(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in piece])
        if exchange == "bf16":
            _sum_in_bf16(flat)
            sent += 2 * flat.numel()
        else:
            dist.all_reduce(flat)
            sent += flat.nbytes
        for tensor, part in zip(piece, flat.split([tensor.numel() for tensor in piece]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return sent


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    piece: list[Tensor] = []
    for tensor in tensors:
        if piece and sum(each.nbytes for each in piece) + tensor.nbytes > PIECE:
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece


def _sum_in_bf16(flat: Tensor) -> None:
    world = dist.get_world_size()
    size = -(-flat.numel() // world)
    values = flat.new_zeros(world * size, dtype=torch.bfloat16)
    values[: flat.numel()] = flat
    received = torch.empty_like(values)
    # Sent as bytes, since gloo does not support bfloat16.
    dist.all_to_all_single(received.view(torch.uint8), values.view(torch.uint8))
    total = received.view(world, size).float().sum(0).bfloat16()
    dist.all_gather(list(values.view(torch.uint8).chunk(world)), total.view(torch.uint8))
    flat.copy_(values[: flat.numel()])
