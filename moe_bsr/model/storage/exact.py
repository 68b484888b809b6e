"""Keep what autograd keeps: the plain forward, fastest, most memory."""

from moe_bsr.model.storage import register


def run(forward, tokens, parameters):
    return forward(tokens)


def cost(ledger, part, x):
    return part(x)


register("exact", run, cost=cost)
