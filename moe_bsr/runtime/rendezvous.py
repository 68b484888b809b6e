"""How processes that a launcher started find each other: through a store of keys and values that all of them reach.

torchrun's store outlives them. When it starts them again, what the dead ones wrote is still there, addresses too, and
whoever reads those waits for nobody. So the processes first agree on a name for their round, and use keys below it.
"""

import datetime
import os
import time
import uuid

import torch
import torch.distributed as dist

from moe_bsr.config import ConfigError

TIMEOUT = datetime.timedelta(minutes=10)  # after which a process that answers nothing counts as lost


def join(device: torch.device) -> dist.Store:
    """Make the default process group of torch.

    Returns:
        A store of this round alone.
    Raises:
        ConfigError: there is no launcher's environment, or the others cannot be reached.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # numbers and words need no GPU
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
    """The part of a store in which there is nothing but what these `world` processes write.

    The first one names the round, each other answers with a name of its own, and the first one confirms these. One that
    read the name of an older round is not among those confirmed there, and goes on reading.

    Raises:
        RuntimeError: the others have not come within `TIMEOUT`.
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
    raise RuntimeError("rank 0 has not begun")
