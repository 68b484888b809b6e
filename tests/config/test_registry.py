"""Registries: a kind is chosen by name or with options, and errors name the key, the value and what is allowed."""

from dataclasses import dataclass

import pytest

from moe_bsr.config import ConfigError, require
from moe_bsr.config.registry import Registry


@dataclass(frozen=True)
class Options:
    keep: float = 0.1
    name: str = "top"

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, "thing.keep", self.keep, "in (0, 1]")


@pytest.fixture
def registry() -> Registry:
    things = Registry("thing")
    things.register("plain")("the plain one")
    things.register("topk", Options)("the one with options")
    return things


def test_a_kind_is_chosen_by_name_or_with_options(registry):
    assert str(registry.choose("plain")) == "plain"
    assert registry.choose({"kind": "topk"}) == registry.choose("topk")
    chosen = registry.choose({"kind": "topk", "keep": 0.5})
    assert chosen.options == Options(keep=0.5) and str(chosen) == "topk(keep=0.5, name=top)"
    assert registry[chosen.kind] == "the one with options" and list(registry) == ["plain", "topk"]
    assert len({registry.choose("topk"), registry.choose({"kind": "topk", "keep": 0.1})}) == 1  # equal hashes


@pytest.mark.parametrize(
    "value, message",
    [
        ("topp", "thing = 'topp': one of plain, topk; did you mean 'topk'?"),
        ({"kind": "topp"}, "did you mean 'topk'"),
        ({"keep": 0.5}, "thing = {'keep': 0.5}: one of plain, topk, or a mapping with kind"),
        ({"kind": "topk", "kep": 0.5}, "unknown key thing.kep; did you mean 'thing.keep'?"),
        ({"kind": "plain", "keep": 0.5}, "unknown key thing.keep (allowed: none)"),
        ({"kind": "topk", "keep": "much"}, "thing.keep = 'much': expected number"),
        ({"kind": "topk", "keep": 2.0}, "thing.keep = 2.0: in (0, 1]"),
        (3, "thing = 3: one of plain, topk"),
    ],
)
def test_an_invalid_choice_is_refused(registry, value, message):
    with pytest.raises(ConfigError) as error:
        registry.choose(value)
    assert message in str(error.value)


def test_a_kind_is_registered_once(registry):
    with pytest.raises(ValueError, match="'plain' is registered already"):
        registry.register("plain")("another")
