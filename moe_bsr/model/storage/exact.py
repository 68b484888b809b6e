"""Save what autograd saves: the plain forward, fastest, most memory."""

from moe_bsr.model.storage import STORAGES, Storage


def _run(forward, tokens, parameters, options):
    return forward(tokens)


STORAGES.register("exact")(Storage(_run))
