"""Keep the block input alone and run the block again in the backward pass.

Chen et al. 2016, "Training deep nets with sublinear memory cost". One more forward of the block for
nearly all of its activation memory; gradients are identical, because everything the block decided is
replayed and nothing in it draws random numbers.
"""

from torch.utils.checkpoint import checkpoint

from moe_bsr.storage import register


@register("recompute")
def run(forward, tokens):
    return checkpoint(forward, tokens, use_reentrant=False, preserve_rng_state=False)
