"""Configuration: reading, validation, and errors that name the key, the value and what is allowed."""

from pathlib import Path

import pytest
import yaml
from refusals import refusal

from moe_bsr.config import Config, ConfigError, dump, from_dict, load, replace, to_dict

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def nested(key: str, value) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


# --- reading ---


def test_an_empty_file_is_the_default(tmp_path):
    assert load(write(tmp_path, "empty.yaml", "# nothing\n")) == Config()


def test_dumped_configuration_loads_to_the_same(tmp_path):
    config = from_dict(
        {
            "tasks": ["a", "b.yaml"],
            "plan": {"train_blocks": "all", "drop_blocks": [1, 2], "keep_rate": [0.7, 0.5]},
            "data": {"crop_scale": [0.08, 1], "hflip": False},
            "train": {"lr": 1e-5, "ema_decay": 0.999, "grad_clip_norm": None, "task_weights": {"b": 2}},
        }
    )
    assert load(write(tmp_path, "run.yaml", dump(config))) == config
    assert from_dict(to_dict(config)) == config
    assert list(yaml.safe_load(dump(config)))[:3] == ["mode", "tasks", "seed"]


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "'1e-3'"])
def test_numbers_written_with_an_exponent_are_numbers(tmp_path, text):
    assert load(write(tmp_path, "c.yaml", f"train: {{lr: {text}}}")).train.lr == 0.001
    assert load(write(tmp_path, "e.yaml", ""), [f"train.lr={text}"]).train.lr == 0.001


def test_whole_numbers_are_accepted_as_floats():
    keep = from_dict({"plan": {"keep_rate": 1}}).plan.keep_rate
    assert keep == 1.0 and type(keep) is float


def test_overrides_set_nested_keys_and_are_typed(tmp_path):
    path = write(tmp_path, "c.yaml", "train: {steps: 5, lr: 0.5}")
    config = load(
        path,
        [
            "train.steps=7",
            "moe.router=task_conditioned",
            "plan.drop_blocks=[]",
            "train.grad_clip_norm=null",
            "train.task_weights.shapes=2",
            "seed = 3",
        ],
    )
    assert (config.train.steps, config.train.lr, config.seed) == (7, 0.5, 3)
    assert config.moe.router == "task_conditioned"
    assert config.plan.drop_blocks == [] and config.train.grad_clip_norm is None
    assert config.train.task_weights == {"shapes": 2.0}


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.steps", ["train.steps", "key=value"]),
        ("train.stepps=4", ["train.stepps", "'train.steps'"]),
        ("train.steps.more=4", ["train.steps.more", "'steps' is a value"]),
        ("train=4", ["train = 4", "section"]),
        ("plan.drop_blocks=[1", ["plan.drop_blocks", "YAML"]),
    ],
)
def test_a_wrong_override_is_refused_with_its_key(tmp_path, override, words):
    path = write(tmp_path, "c.yaml", "train: {steps: 5}")
    with pytest.raises(ConfigError) as error:
        load(path, [override])
    assert all(word in str(error.value) for word in words), error.value


def test_replace_validates_and_leaves_the_original_unchanged():
    config = Config()
    changed = replace(config, train__steps=3, seed=4)
    assert (changed.train.steps, changed.seed) == (3, 4)
    assert config == Config()
    with pytest.raises(ConfigError, match="moe.top_k = 99"):
        replace(config, moe__top_k=99)


# --- extends ---


def test_a_file_inherits_from_the_file_that_it_extends(tmp_path):
    write(tmp_path, "base.yaml", "seed: 1\ntrain: {steps: 5, lr: 0.5, task_weights: {shapes: 2}}")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", "middle.yaml", "extends: ../base.yaml\ntrain: {steps: 6}\nplan: {drop_blocks: [1]}")
    path = write(tmp_path / "more", "leaf.yaml", "extends: middle.yaml\nplan: {drop_blocks: [2]}")
    config = load(path, ["train.lr=0.25"])
    assert (config.seed, config.train.steps, config.train.lr) == (1, 6, 0.25)
    assert config.plan.drop_blocks == [2], "a list replaces, it does not grow"
    assert config.train.task_weights == {"shapes": 2.0}


def test_circular_extends_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml")
    write(tmp_path, "b.yaml", "extends: c.yaml")
    write(tmp_path, "c.yaml", "extends: a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml extends itself.*b\.yaml.*c\.yaml"):
        load(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load(write(tmp_path, "self.yaml", "extends: self.yaml"))


def test_loading_a_parent_again_is_not_circular(tmp_path):
    write(tmp_path, "base.yaml", "seed: 1")
    write(tmp_path, "one.yaml", "extends: base.yaml")
    for name in ("one", "base", "one"):
        assert load(tmp_path / f"{name}.yaml") == Config(seed=1), name


def test_a_missing_file_is_reported_with_the_nearest_name(tmp_path):
    write(tmp_path, "quickstart.yaml", "")
    with pytest.raises(ConfigError, match=r"quikstart\.yaml; did you mean quickstart\.yaml"):
        load(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"no configuration file .*bsae\.yaml"):
        load(write(tmp_path, "child.yaml", "extends: bsae.yaml"))
    with pytest.raises(ConfigError, match="no configuration file"):
        load(tmp_path / "no" / "folder.yaml")


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a\n- b", "expected keys and values, found list"),
        ("just words", "found str"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        load(write(tmp_path, "c.yaml", text))


@pytest.mark.parametrize("value", ["[a.yaml, b.yaml]", "3", "{a: 1}"])
def test_extends_takes_one_file_name(tmp_path, value):
    with pytest.raises(ConfigError, match="extends"):
        load(write(tmp_path, "c.yaml", f"extends: {value}"))


def test_a_key_written_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="train"):
        load(write(tmp_path, "c.yaml", "train: {steps: 5}\nseed: 1\ntrain: {lr: 0.5}"))


# --- strictness ---


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"sede": 1}, ["unknown key sede", "did you mean 'seed'"]),
        ({"steps": 4}, ["unknown key steps", "did you mean 'train.steps'"]),
        ({"train": {"learning_rte": 1}}, ["unknown key train.learning_rte", "allowed: steps, epochs"]),
        ({"moe": {"topk": 1}}, ["unknown key moe.topk", "did you mean 'moe.top_k'"]),
        ({"plan": {"trainabel": []}}, ["unknown key plan.trainabel", "did you mean 'plan.train_blocks'"]),
        ({"train.steps": 4}, ["unknown key train.steps", "in a file write train: {steps: ...}"]),
        ({"qqqq": 1}, ["unknown key qqqq", "allowed: mode, tasks"]),
        ({"extends": "x"}, ["unknown key extends"]),
        ({3: 1}, ["unknown key 3"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_spelling(tree, words):
    message = refusal(from_dict, tree)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("seed", 1.5, "whole number"),
        ("seed", True, "whole number"),
        ("seed", "1", "whole number"),
        ("train.steps", "1e3", "whole number"),
        ("train.lr", "fast", "number"),
        ("train.lr", True, "number"),
        ("train.lr", None, "number"),
        ("train.grad_clip_norm", "no", "number or null"),
        ("train.evaluate_test", 1, "true/false"),
        ("train.evaluate_test", "yes", "true/false"),
        ("backbone.name", 3, "text"),
        ("tasks", {"a": 1}, "a list of text"),
        ("tasks[1]", None, "text"),
        ("plan.drop_blocks", 3, "a list of whole number"),
        ("plan.drop_blocks[0]", "3", "whole number"),
        ("plan.train_blocks", "al", "'all' or a list of whole number"),
        ("plan.train_blocks", [1.0], "'all' or a list of whole number"),
        ("plan.keep_rate", ["x"], "number or a list of number"),
        ("train.task_weights", [1], "a mapping of names to number"),
        ("train.task_weights.shapes", "heavy", "number"),
        ("data.hflip", "maybe", "true/false value or null"),
        ("train", None, "section"),
        ("train", [1], "section"),
        ("moe.backend", "group", "did you mean 'grouped'"),
        ("moe.balance_loss", None, "one of per_task, across_tasks, none"),
        ("mode", True, "one of multitask, single_task"),
    ],
)
def test_a_wrong_type_is_refused_with_key_value_and_expectation(key, value, expected):
    plain = key.split("[")[0]
    if key == "tasks[1]":
        tree = {"tasks": ["a", value]}
    else:
        tree = nested(plain, [value] if "[" in key else value)
    message = refusal(from_dict, tree)
    assert message.startswith(f"{key} = {value!r}: ") and expected in message, message


REFUSED = [
    ("plan.train_blocks", [1, 1], "each block once"),
    ("plan.drop_blocks", [3, 3], "each block once"),
    ("plan.moe_blocks", [3, 7, 3], "each block once"),
    ("plan.keep_rate", 0, "(0, 1]"),
    ("plan.keep_rate", 1.01, "(0, 1]"),
    ("plan.keep_rate", -0.5, "(0, 1]"),
    ("plan.keep_rate", float("nan"), "finite"),
    ("plan.keep_rate", [0.5, 0.5, 0.0], "(0, 1]"),
    ("plan.keep_rate", [0.5, 0.5], "[3, 6, 9]"),
    ("plan.moe_blocks", [2, 3, 4], "[2, 4]"),
    ("moe.num_experts", 0, "at least 1"),
    ("moe.top_k", 0, "1 to moe.num_experts = 16"),
    ("moe.top_k", 17, "1 to moe.num_experts = 16"),
    ("moe.mlp_ratio", 0, "at least 1"),
    ("moe.gate_noise", -1.0, "at least 0"),
    ("moe.init_noise", -1.0, "at least 0"),
    ("moe.balance_loss_weight", -1.0, "at least 0"),
    ("data.val_fraction", 0.0, "below 0.5"),
    ("data.val_fraction", 0.5, "below 0.5"),
    ("data.crop_scale", [0.5], "[low, high]"),
    ("data.crop_scale", [0.9, 0.1], "[low, high]"),
    ("data.crop_scale", [0.0, 1.0], "(0, 1]"),
    ("data.crop_scale", [0.5, 1.1], "(0, 1]"),
    ("data.prefetch", -1, "at least 0"),
    ("sampler.temperature", 0.0, "above 0"),
    ("train.steps", 0, "at least 1"),
    ("train.batch_size", 0, "at least 1"),
    ("train.grad_accumulation_steps", 0, "at least 1"),
    ("train.grad_accumulation_steps", 3, "train.batch_size = 32"),
    ("train.eval_every", 0, "at least 1"),
    ("train.checkpoint_every", 0, "at least 1"),
    ("train.min_lr", -1.0, "0 to train.lr"),
    ("train.weight_decay", -1.0, "at least 0"),
    ("train.momentum", -1.0, "[0, 1)"),
    ("train.lr", 0.0, "above 0"),
    ("train.lr", float("nan"), "finite"),
    ("train.layer_decay", 0.0, "(0, 1]"),
    ("train.layer_decay", 1.5, "(0, 1]"),
    ("train.warmup_fraction", -0.1, "a share"),
    ("train.warmup_fraction", 1.5, "set train.warmup_steps"),
    ("train.warmup_steps", 1001, "0 to train.steps = 1000"),
    ("train.weight_decay", float("inf"), "finite"),
    ("seed", -1, "0 to 2**63"),
    ("train.grad_clip_norm", 0.0, "null or above 0"),
    ("train.label_smoothing", 1.0, "[0, 1)"),
    ("train.label_smoothing", -0.1, "[0, 1)"),
    ("train.ema_decay", 0.0, "null or a decay in (0, 1)"),
    ("train.ema_decay", 1.0, "null or a decay in (0, 1)"),
    ("train.task_weights", {"shapes": 0.0}, "above 0"),
    ("train.task_weights", {"shape": 1.0}, "['shape']"),
    ("tasks", [], "at least one"),
    ("tasks", ["a", "b", "a"], "each task once"),
    ("tasks", ["a", "elsewhere/a.yaml"], "each task once"),
]


@pytest.mark.parametrize("key, value, allowed", REFUSED)
def test_an_impossible_value_is_refused_with_what_is_allowed(key, value, allowed):
    message = refusal(from_dict, nested(key, value))
    assert message.startswith(f"{key} = ") and allowed in message, message


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.lr", float("inf")),
        ("train.momentum", 1.0),
        ("train.min_lr", 0.1),
        ("runtime.threads", 0),
        ("backbone.image_size", 0),
        ("data.image_cache_mb", -1),
    ],
)
def test_a_value_that_would_fail_late_is_refused_early(key, value):
    assert refusal(from_dict, nested(key, value)).startswith(f"{key} = {value!r}")


@pytest.mark.parametrize("fused_option", ["detach_fusion_weights", "protect_fused"])
def test_options_of_the_fused_token_need_a_fused_token(fused_option):
    message = refusal(from_dict, {"tokens": {"fuse": "none", fused_option: True}})
    assert message.startswith("tokens.fuse = 'none'") and f"tokens.{fused_option}" in message


def test_errors_state_the_settings_that_a_probe_needs():
    probe = {"train": {"optimizer": "lbfgs", "steps": 1}, "plan": {"train_blocks": [], "moe_blocks": []}}
    assert refusal(from_dict, probe).startswith("data.augment = True: false with train.optimizer = lbfgs")
    probe |= {"data": {"augment": False}, "adapter": "lora"}
    assert refusal(from_dict, probe).startswith("adapter = 'lora': null with train.optimizer = lbfgs")


def test_experts_need_no_list_of_trainable_blocks_when_all_train():
    plan = from_dict({"plan": {"train_blocks": "all", "moe_blocks": [0, 1]}}).plan
    assert plan.moe_blocks == [0, 1]


def test_top_k_is_checked_against_the_experts_of_the_same_file():
    assert from_dict({"moe": {"num_experts": 2, "top_k": 2}}).moe.top_k == 2
    assert "1 to moe.num_experts = 2" in refusal(from_dict, {"moe": {"num_experts": 2, "top_k": 4}})


def test_a_task_file_gives_the_task_its_name():
    assert from_dict({"tasks": ["a", "my/b.yaml", "c.yml"]}).task_names() == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["v1.5", "", "a/b"])
def test_a_task_name_that_cannot_be_a_folder_name_is_refused(name):
    assert refusal(from_dict, {"tasks": [name]}).startswith("tasks")


def test_a_folder_without_its_slash_and_a_forgotten_configuration_are_explained():
    assert "write a folder as photos/birds/, with a slash at its end" in refusal(from_dict, {"tasks": ["photos/birds"]})
    with pytest.raises(ConfigError, match="no configuration file tasks=...; name one before the overrides"):
        load(Path("tasks=photos/*"))
