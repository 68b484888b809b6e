"""Connect the processes that a launcher started, through a key-value store that all of them reach.

torchrun's store outlives the processes. When torchrun restarts them, the store still has the keys of the previous ones,
including their addresses, and a process that used those would wait in vain. So the processes first agree on a new name
(of this "round") and use it as a prefix of their keys.
"""

import datetime
import os
import time
import uuid

import torch
import torch.distributed as dist

from moe_bsr.config import ConfigError

TIMEOUT = datetime.timedelta(minutes=10)  # a process that does not answer for this long counts as lost


def join(device: torch.device) -> dist.Store:
    """Initialize torch's default process group.

    Returns:
        The store, with the prefix of this round.
    Raises:
        ConfigError: the launcher's environment variables are missing, or the other processes cannot be reached.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # objects and metrics are exchanged on the CPU
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        store = own_round(dist.PrefixStore("moe_bsr", store), rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"WORLD_SIZE = {os.environ.get('WORLD_SIZE')}, but the processes do not find each other ({said:.160}); "
            "start them with torchrun; between machines set GLOO_SOCKET_IFNAME to the network interface"
        ) from error
    return store


def own_round(store: dist.Store, rank: int, world: int) -> dist.Store:
    """Agree with the other processes on a prefix, and return the store with it. It has only keys of these processes.

    Rank 0 writes a new name for the round. Each other rank writes a name of its own below it, and rank 0 confirms
    these. A rank that read the name of an older round does not find its own name confirmed there, and reads again.

    Raises:
        RuntimeError: the other processes have not answered within `TIMEOUT`.
    """
    mine, answered = uuid.uuid4().hex, ""
    if rank == 0:
        store.set("round", mine)
        store.set(f"{mine}/all", " ".join(store.get(f"{mine}/{other}").decode() for other in range(1, world)))
        return dist.PrefixStore(mine, store)
    until = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < until:
        current = store.get("round").decode()
        if current != answered:
            store.set(f"{current}/{rank}", mine)
            answered = current
        if store.check([f"{current}/all"]) and mine.encode() in store.get(f"{current}/all"):
            return dist.PrefixStore(current, store)
        time.sleep(0.02)
    raise RuntimeError("rank 0 does not answer")
