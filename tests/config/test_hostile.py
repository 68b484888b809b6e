"""Broken configurations are refused with one short line that names the position in the file, or the key."""

import dataclasses
import typing
from pathlib import Path

import pytest
from refusals import refusal

from moe_bsr.config import Config, from_dict, load
from moe_bsr.config.reader import LARGEST, convert
from moe_bsr.data import load_spec
from moe_bsr.data.spec import SOURCES
from moe_bsr.model.adapters import ADAPTERS
from moe_bsr.model.routers import ROUTERS
from moe_bsr.model.storage import STORAGES


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes, name: str = "c.yaml") -> Path:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return write


# --- YAML: the message names position and problem ---

PLACED = {
    "tab": ("tasks: [a]\ntrain:\n\tsteps: 3\n", ["line 3", "tab"]),
    "tab after spaces": ("train:\n  steps: 3\n \tlr: 1\n", ["line 3", "tab"]),
    "tab in what looks like a text": ("a: b\n\tc: d\n", ["line 2", "tab"]),
    "bracket": ("seed: 1\ntasks: [a\ntrain: {steps: 3}\n", ["line 3", "begins in line 2"]),
    "brace": ("seed: 1\ntrain: {steps: 3\n\n", ["begins in line 2"]),
    "other bracket": ("seed: 1\ntasks: [a}\n", ["line 2, column 10", "']'"]),
    "quote": ("data:\n  root: 'x\n", ["scanning a quoted scalar, which begins in line 2"]),
    "indent": ("train:\n  steps: 3\n lr: 1\n", ["line 3"]),
    "deeper indent": ("train:\n  steps: 3\n   lr: 1\n", ["line 3"]),
    "twice": ("train: {steps: 3}\ntasks: [a]\ntrain: {lr: 1e-3}\n", ["'train'", "line 3", "first in line 1"]),
    "twice within": ("train:\n  steps: 3\n  lr: 1\n  steps: 4\n", ["'steps'", "line 4", "first in line 2"]),
    "Latin-1": (b"tasks: [a]\n# f\xfcr\n", ["not UTF-8", "0xfc", "line 2"]),
    "UTF-16": ("tasks: [a]\n".encode("utf-16"), ["UTF-16", "line 1"]),
    "UTF-16 without its mark": ("tasks: [a]\n".encode("utf-16-le"), ["UTF-16"]),
    "UTF-32": ("tasks: [a]\n".encode("utf-32"), ["not UTF-8"]),
    "control letter": (b"seed: 1\ntasks: [a\x07]", ["line 2", "U+0007"]),
    "undefined alias": ("seed: 1\ntasks: *x", ["line 2", "'x'"]),
    "tag": ("seed: 1\nmode: !!python/object/apply:os.system [ls]", ["line 2", "tags"]),
    "tag of YAML": ("seed: !!int '010'", ["line 1", "tags"]),
    "two documents": ("seed: 1\n---\nseed: 2\n", ["line 2", "another document"]),
    "deep": ("seed: 1\nx: " + 5000 * "[", ["line 2", "nested"]),
    "thirty deep": ("seed: 1\nx: " + 30 * "[" + 30 * "]", ["line 2", "nested"]),
    "deep by aliases": ("\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 900)]), ["nested"]),
    "holds itself": ("seed: 1\ntasks: &a [*a]", ["line 2", "holds itself"]),
    "aliases that multiply": (
        "\n".join(["mode: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]" for i in range(1, 9)]),
        ["aliases"],
    ),
    "merges that multiply": (
        "\n".join(["a0: &a0 {x: 1}"] + [f"a{i}: &a{i}\n  <<: [{', '.join(10 * [f'*a{i - 1}'])}]" for i in range(1, 9)]),
        ["aliases"],
    ),
    "a key that is none": ("seed: 1\n[a, b]: 2", ["line 2", "unhashable key"]),
    "large": (b"# " + bytes(2**20).replace(b"\0", b"x"), ["bytes"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACED)
def test_invalid_yaml_is_refused_with_file_and_position(file, case):
    content, words = PLACED[case]
    message = refusal(load, file(content))
    assert "c.yaml" in message and all(word in message for word in words), message


@pytest.mark.parametrize("case", [case for case in PLACED if case != "large"])
def test_task_files_are_read_equally_strictly(file, case):
    content, words = PLACED[case]
    message = refusal(load_spec, file(content, "birds.yaml"))
    assert "birds.yaml" in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfseed: 3\r\ntrain:\r\n", "a: &a [1]\nseed: 3", "x: &x {seed: 3}\n<<: *x"]
)
def test_byte_order_marks_line_ends_and_anchors_are_valid_yaml(file, content):
    message = refusal(load, file(content))
    assert "YAML" not in message and ("train" in message or "unknown key" in message)


@pytest.mark.parametrize(
    "parent, words", [('"a\\0b"', "null byte"), (3000 * "x", "too long"), (".", "no configuration file")]
)
def test_extends_with_an_impossible_file_name_is_refused(file, parent, words):
    assert words in refusal(load, file(f"extends: {parent}"))


# --- values that YAML 1.1 turns into something else ---


@pytest.mark.parametrize("text", ["010", "0o10", "0x10", "0b11", "1_000", "12:30", "+08", "1e3", "3.", "8 ", "50%"])
@pytest.mark.parametrize("write", ["file", "override"])
def test_whole_numbers_accept_only_plain_digits(file, text, write):
    if text in ("8 ", "+08"):  # 8 is accepted, +08 is not
        text = text.strip()
    value = f"train.steps={text}" if write == "override" else None
    path = file("" if value else f"train: {{steps: {text}}}")
    if text == "8":
        assert load(path, [value] if value else []).train.steps == 8
    else:
        message = refusal(load, path, [value] if value else [])
        assert message.startswith("train.steps = ") and text.rstrip(".") in message


@pytest.mark.parametrize("text", ["010", "1_0", "0x1p3", "12:30", "1,5", "0.5 s", "infinity", "nan", "٣"])
def test_numbers_accept_only_plain_digits(file, text):
    message = refusal(load, file(f"train: {{lr: '{text}'}}"))
    assert message.startswith(f"train.lr = {text!r}: expected number")


@pytest.mark.parametrize("text", ["2024-01-01", "12:30", "010", "0x10"])
def test_such_values_are_text_where_text_is_expected(file, text):
    assert load(file(f"data: {{root: {text}}}")).data.root == text


@pytest.mark.parametrize("key", ["tasks: [{}]", "train: {{task_weights: {{{}: 2}}}}", "data: {{root: {}}}"])
@pytest.mark.parametrize("word", ["no", "on", "Yes", "true", "101", "1.5", "null", "~"])
def test_text_that_yaml_reads_as_another_type_needs_quotes(file, key, word):
    assert "quotes" in refusal(load, file(key.format(word)))
    loaded = load(file(f"data: {{root: '{word}'}}"))
    assert loaded.data.root == word


@pytest.mark.parametrize(
    "text", ["9" * 5000, "9" * 400, "99999999999999999999", "-9223372036854775808", "9223372036854775808"]
)
@pytest.mark.parametrize("key", ["seed", "train.steps", "plan.drop_blocks", "train.lr"])
def test_a_huge_number_is_refused_with_its_key(file, text, key):
    value = f"[{text}]" if key == "plan.drop_blocks" else text
    if key == "train.lr" and len(text) < 30:
        pytest.skip("a learning rate, if a strange one")
    assert refusal(load, file(""), [f"{key}={value}"]).startswith(key)


# --- every key of every section and of every part's options ---


def keys(cls: type, prefix: str = "") -> list[tuple[str, object]]:
    """Return (dotted key, type) of every field of a dataclass and of the sections within it."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found += keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [(prefix + name, hint)]
    return found


def kinds_within(hint: object) -> set:
    return {hint} | {kind for inner in typing.get_args(hint) for kind in kinds_within(inner)}


def wrap(hint: object, value: object) -> object:
    """Return the value in the shape that the type requires: itself, in a list or in a mapping."""
    if hint in (int, float, str, bool, dict):
        return value
    if typing.get_origin(hint) is list:
        return [value, value]
    if typing.get_origin(hint) is dict:
        return {"shapes": value}
    return wrap(next(inner for inner in typing.get_args(hint) if kinds_within(inner) & {type(value)}), value)


ALL = [
    (Config, key, hint)
    for key, hint in keys(Config)
] + [
    (cls, key, hint)
    for cls in [
        *(registry._entries[kind][1] for registry in (STORAGES, ADAPTERS, ROUTERS) for kind in registry),
        *(SOURCES[kind] for kind in SOURCES),
    ]
    for key, hint in keys(cls)
    if key != "name"
]  # fmt: skip


def with_key(cls: type, key: str, value: object) -> str:
    """Return the error message for this value of one key."""
    for name in reversed(key.split(".")[1:]):
        value = {name: value}
    first = key.split(".")[0]
    return refusal(lambda: convert(value, typing.get_type_hints(cls)[first], first))


@pytest.mark.parametrize("cls, key, hint", [each for each in ALL if float in kinds_within(each[2])])
def test_every_number_is_finite_and_of_a_usable_size(cls, key, hint):
    for number in (float("inf"), -float("inf"), float("nan"), 1e-320, 10 * LARGEST, 10**400):
        message = with_key(cls, key, replaced(wrap(hint, 1.0), number))
        assert key in message and "expected" in message, message


def replaced(shape: object, value: object) -> object:
    if isinstance(shape, list):
        return [value for _ in shape]
    return dict.fromkeys(shape, value) if isinstance(shape, dict) else value


STRANGE = [3 + 4j, object(), 100_000 * "x", 50 * [3000 * "y"], {3000 * "z": 1}, "a\x1b]0;b\x07", "\ud800", 10**4000]


@pytest.mark.parametrize("cls, key, hint", [each for each in ALL if each[1] not in ("storage", "adapter")])
def test_errors_for_strange_values_are_short_and_name_the_key(cls, key, hint):
    for value in STRANGE:
        assert key.split(".")[-1] in with_key(cls, key, value)


# --- overrides ---


@pytest.mark.parametrize(
    "override", [".steps=1", "train.=1", "train..steps=1", "=1", " = 1", "train steps=1", "train.steps", "", "[=1"]
)
def test_a_malformed_override_is_refused_with_an_example(file, override):
    message = refusal(load, file(""), [override])
    assert repr(override) in message and "key=value" in message


@pytest.mark.parametrize("value", ["/mnt/my #data", "#data", "a #b #c", "it's #1"])
def test_an_override_keeps_its_whole_value(file, value):
    assert load(file(""), [f"data.root={value}"]).data.root == value


def test_one_task_may_be_written_without_brackets(file):
    assert load(file(""), ["tasks=../x.yaml"]).tasks == ["../x.yaml"]
    assert "[a, b]" in refusal(load, file(""), ["tasks=a,b"])


# --- sizes that would hang or exhaust the memory ---


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.steps", 10**12),
        ("train.batch_size", 10**9),
        ("train.grad_accumulation_steps", 10**9),
        ("train.eval_every", 10**12),
        ("train.checkpoint_every", 10**12),
        ("moe.num_experts", 10**6),
        ("backbone.image_size", 100_000),
        ("data.prefetch", 10**6),
        ("data.image_cache_mb", 10**12),
        ("data.feature_cache_mb", 10**12),
        ("runtime.threads", 10_000),
        ("tasks", ["x" * 300]),
    ],
)
def test_an_absurd_size_is_refused_with_its_key(key, value):
    *section, name = key.split(".")
    message = refusal(from_dict, {section[0]: {name: value}} if section else {name: value})
    assert message.startswith(f"{key} = ") and "at most" in message


# --- settings that would switch learning off ---


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_a_single_renormalized_gate_is_refused_naming_both_keys(router):
    message = refusal(from_dict, {"moe": {"top_k": 1, "router": router}})
    assert "moe.top_k = 1" in message and "moe.renormalize_gates" in message


@pytest.mark.parametrize("moe", [{"renormalize_gates": False}, {"train_router": False}, {"num_experts": 1}])
def test_a_single_gate_is_allowed_if_it_is_not_renormalized_or_there_is_nothing_to_learn(moe):
    from_dict({"moe": {"top_k": 1} | moe})


@pytest.mark.parametrize(
    "train", [{"lr": 1.0, "weight_decay": 1.0}, {"lr": 0.1, "head_lr_scale": 100.0, "weight_decay": 0.1}]
)
def test_a_weight_decay_that_zeroes_the_weights_is_refused(train):
    assert refusal(from_dict, {"train": train}).startswith("train.weight_decay = ")
