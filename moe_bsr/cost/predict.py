from moe_bsr.config import ConfigError


class Cost: pass
def predict(*a, **k):
    raise ConfigError("stub")
