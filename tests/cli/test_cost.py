"""The `cost` command: predictions beside measurements, budgets, refusals."""

import itertools
import json
from types import SimpleNamespace

import pytest
from tiny_runs import make_config, make_trainer

from moe_bsr import config as configuration
from moe_bsr.benchmark import cost_check
from moe_bsr.cli.main import main
from moe_bsr.config import Config, ConfigError
from moe_bsr.cost import planner
from moe_bsr.cost.planner import answer, largest, parse_bytes
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.model.storage import STORAGES

CLASSES = {"shapes": 10, "fractals": 12}


def config_of(folder, **changes) -> Config:
    """With one layer of experts, because each prediction traces every block."""
    return make_config(folder, plan__moe_blocks=[5], **changes)


@pytest.fixture
def ask(tmp_path, capsys):
    """Run the command on a tiny configuration with overrides; returns (exit status, stdout, stderr)."""
    (tmp_path / "tiny.yaml").write_text(configuration.dump(config_of(tmp_path)))

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["cost", str(tmp_path / "tiny.yaml"), *arguments])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [("600MB", 600 * 2**20), ("1.5 GB", 1536 * 2**20), ("12kb", 12288), ("4000000", 4000000), ("7B", 7)],
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "0", "6 0MB0", "nan", "inf", "600MiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="^--budget = .*600MB"):
        parse_bytes(text)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 1000, 2**12, 2**20])
@pytest.mark.parametrize("peak", [lambda n: 70 + 13 * n, lambda n: 10 * n + n % 3 + max(0, n - 500) ** 2])
def test_the_largest_batch_is_found(limit, peak):
    assert largest(peak, peak(limit) if limit else peak(1) - 1) == min(limit, 2**12)


def test_the_table_adds_up_to_the_json(ask):
    status, out, _ = ask("--json")
    result = json.loads(out)
    assert status == 0
    assert sum(sum(kinds.values()) for kinds in result["kept_by_block"].values()) == result["kept"]
    config = configuration.from_dict({})
    assert result["batch"] == 8 and result["precision"] == "fp32" and config.storage == "exact"
    status, text, _ = ask()
    assert status == 0 and f"{result['peak'] / 2**20:.3f}" in text


def test_the_measurement_stands_beside_the_prediction(ask):
    status, out, _ = ask("--measure", "--json", "storage=recompute")
    compared = json.loads(out)["measured"]["quantities"]
    assert status == 0
    for quantity, tolerance in cost_check.TOLERANCES.items():
        assert abs(compared[quantity]["difference"]) <= tolerance, quantity


@pytest.fixture
def two_storages(monkeypatch):
    """Each that a change may name is traced: `test_registries` has them all."""
    monkeypatch.setattr(planner, "STORAGES", {name: STORAGES[name] for name in ("int8", "recompute")})


@pytest.mark.usefixtures("two_storages")
def test_a_budget_says_what_fits_and_every_change_keeps_its_word(tmp_path):
    config = config_of(tmp_path)
    model = build_on_meta(config, CLASSES)
    peak = predict(model, config, batch=64, precision="fp32", all_tasks=True).peak
    one = predict(model, config, batch=1, precision="fp32", all_tasks=True).peak
    told = answer(config, CLASSES, (one + peak) // 2, batch=64, precision="fp32")
    assert not told.fits and told.peak == peak and 0 < told.largest_batch < 64
    for images, fits in ((told.largest_batch, True), (told.largest_batch + 1, False)):
        assert (predict(model, config, batch=images, precision="fp32", all_tasks=True).peak <= told.budget) == fits
    assert {"drop one block earlier", "compute in bf16", "store recompute"} <= {c.what for c in told.changes}
    for change in told.changes:
        (tmp_path / "c.yaml").write_text(configuration.dump(config))
        changed = configuration.load(tmp_path / "c.yaml", change.overrides.split())
        cost = predict(
            build_on_meta(changed, CLASSES), changed, batch=64, precision=changed.runtime.precision, all_tasks=True
        )
        assert (peak - cost.peak, cost.peak <= told.budget) == (change.bytes, change.fits)
    free = [c.flops <= 0 for c in told.changes]
    assert free == sorted(free, reverse=True)
    rates = [c.bytes / c.flops for c in told.changes if c.flops > 0]
    assert rates == sorted(rates, reverse=True)


@pytest.fixture
def one_image_at_most(monkeypatch):
    """The largest batch is not looked for, where it is not asked for: each size is traced anew."""
    monkeypatch.setattr(planner, "largest", lambda peak, budget: int(peak(1) <= budget))


@pytest.fixture
def one_change(monkeypatch):
    """Only the first of the changes that a budget makes one think of is traced."""
    alternatives = planner._alternatives
    monkeypatch.setattr(planner, "_alternatives", lambda *arguments: itertools.islice(alternatives(*arguments), 1))


def suggested(tmp_path, **changes) -> dict[str, str]:
    """{what: overrides} of the changes that are tried for a configuration."""
    tried = planner._alternatives(make_config(tmp_path, **changes), CLASSES, 64, "fp32")
    return {what: overrides for what, overrides, _ in tried}


def test_changes_do_what_their_names_say(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "predict", lambda *_, **__: SimpleNamespace(written=0))
    changes = suggested(tmp_path, plan__drop_blocks=[4, 1, 2], plan__keep_rate=[0.9, 0.5, 0.7])
    assert changes["drop one block earlier"] == "plan.drop_blocks=[3,0,1]"
    changes = suggested(tmp_path, plan__drop_blocks=[], plan__keep_rate=0.9, plan__train_blocks="all")
    assert changes["drop half of the tokens"] == "plan.drop_blocks=[1] plan.keep_rate=0.5"
    assert "leave the embedding and block 0 frozen" in changes


@pytest.mark.usefixtures("one_image_at_most", "one_change")
def test_a_budget_just_missed_is_told_to_the_byte(ask):
    """The exit status tells whether it holds."""
    status, out, _ = ask("--json", "--budget", "1GB")
    told = json.loads(out)["budget"]
    assert status == 0
    status, out, _ = ask("--budget", str(told["peak"] - 1))
    assert (
        status == 1
        and "does not fit" in out
        and f"budget {told['peak'] - 1:,} B" in out
        and f"takes {told['peak']:,} B" in out
    )
    status, out, _ = ask("--budget", str(told["floor"]))
    assert status == 1 and f"not even one image fits, which takes {told['least']:,} B" in out
    status, _, error = ask("--budget", "1")
    assert status == 2 and "--budget = '1 B (0.000 MB)'" in error and f"{told['floor']:,} B" in error


def test_the_prediction_told_is_that_of_a_run(ask, tmp_path):
    config = config_of(tmp_path, train__ema_decay=0.9)
    trainer = make_trainer(config, tmp_path / "run")
    assert json.loads(ask("--json", "train.ema_decay=0.9")[1])["peak"] / 2**20 == trainer.costs["predicted_peak_mb"]
    assert "weights' average" in ask("train.ema_decay=0.9")[1]
    assert "10 MB (10^6 bytes) of cached features" in ask("data.augment=false", "data.feature_cache_mb=10")[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--sweep", "--batches", "0"], "--batches = [0]"), (["--classes", "-3"], "--classes = -3")],
)
def test_numbers_below_one_are_refused(ask, arguments, named):
    status, _, error = ask(*arguments)
    assert status == 2 and f"cost: {named}: at least 1" in error


def test_plans_are_of_no_one_configuration(ask):
    status, _, error = ask("--plans", "--budget", "1GB", "--measure", "--processes", "2")
    assert status == 2 and "--plans = '--measure --processes': none of these" in error


def test_a_budget_below_the_parameters_is_refused_with_the_floor(ask):
    status, _, error = ask("--budget", "100KB")
    assert status == 2 and "the parameters alone take" in error


def test_one_model_per_task_tells_the_largest(ask):
    one = json.loads(ask("--json", "mode=single_task")[1])
    both = json.loads(ask("--json")[1])
    assert one["parameters"] < both["parameters"]
    assert "this is the model of fractals" in ask("mode=single_task")[1]


def test_a_task_without_a_number_of_classes_needs_one(ask, tmp_path):
    (tmp_path / "mine.yaml").write_text("{title: Mine, source: folder, path: mine}\n")
    task = f"tasks=[{tmp_path / 'mine.yaml'}]"
    status, _, error = ask(task)
    assert status == 2 and "--classes" in error
    assert ask(task, "--classes", "7")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plan.train_blocks=[9]"], "plan.train_blocks"),
        (["backbone.name=vit_tiny"], "backbone.name"),
        (["--mode", "paper", "--measure"], "--mode"),
        (["moe.mlp_ratio=7"], "moe.mlp_ratio"),
    ],
)
def test_what_cannot_be_costed_is_named(ask, arguments, named):
    status, _, error = ask(*arguments)
    assert status == 2 and named in error and error.count("\n") == 1


def test_the_published_rules_need_no_machine_of_ours(ask):
    paper, ancestor = (json.loads(ask("--mode", mode, "--json")[1]) for mode in ("paper", "backrazor"))
    assert paper["total"] == paper["batch"] * paper["peak_per_image"] + paper["parameters"]
    assert ancestor["total"] > paper["total"]  # it charges q, k and v three times


@pytest.mark.parametrize("backbone", ["vit_base_patch16_clip_quickgelu_224", "vit_giant_patch14_dinov2"])
def test_backbones_with_other_activations_and_ffns_are_costed(ask, backbone):
    status, out, _ = ask(
        "--json",
        f"backbone.name={backbone}",
        "backbone.image_size=56" if "giant" in backbone else "backbone.image_size=64",
        "plan.moe_blocks=[]",
        "train.batch_size=2",
    )
    result = json.loads(out)
    assert status == 0 and 0 < result["kept"] < result["peak"] and result["forward_flops"] < result["step_flops"]


def test_grouped_experts_are_costed(ask):
    loop, grouped = (json.loads(ask("--json", f"moe.backend={backend}")[1]) for backend in ("loop", "grouped"))
    assert loop["parameters"] == grouped["parameters"] and loop["kept"] < grouped["kept"]


def test_a_run_for_a_gpu_is_costed_where_there_is_none(ask):
    """On a CPU's allocator the same step takes less: a GPU's hands out multiples of 512 bytes."""
    gpu, cpu = (
        json.loads(ask("--json", f"runtime.device={device}", "runtime.precision=bf16")[1]) for device in ("cuda", "cpu")
    )
    assert gpu["precision"] == "bf16" and gpu["parameters"] == cpu["parameters"]
    assert gpu["gradients"] == cpu["gradients"] and gpu["optimizer"] == cpu["optimizer"]
    assert all(size % 512 == 0 for kinds in gpu["kept_by_block"].values() for size in kinds.values())


def test_a_sweep_says_where_it_comes_from(ask, monkeypatch):
    plan = cost_check.plans(6)["last"]
    monkeypatch.setattr(cost_check, "plans", lambda depth: {"last": plan})
    status, out, _ = ask(
        "--sweep", "--json", "--batches", "2", "--storages", "exact", "--image-size", "32", "--precisions", "fp32"
    )
    result = json.loads(out)
    assert status in (0, 1) and [record["plan"] for record in result["records"]] == ["last"]
    assert result["config"]["backbone"]["name"] == "test_vit" and result["environment"]["threads"] == 1


def test_several_processes_and_what_would_send_less(ask):
    status, told, _ = ask("--processes", "4", "--machines", "2", "--step-seconds", "0.1", "--json")
    own, *others = json.loads(told)["several_processes"]
    assert status == 0 and own["overrides"] == "" and own["compute"] == pytest.approx(0.1)
    # 4 processes on 2 machines: half of twice the bytes within one, half of twice between the two.
    waited = own["exchanged"] * (1 / 300e9 + 1 / (0.85 * 1e9 / 8))
    assert own["efficiency"]["1 Gb/s"] == pytest.approx(0.1 / (0.1 + waited))
    halved = next(way for way in others if way["overrides"] == "train.exchange=bf16")
    assert halved["exchanged"] == own["exchanged"] / 2 and halved["compute"] == own["compute"]
    assert "as configured" in ask("--processes", "2")[1]
    wrongs = ["3", "--machines", "2"], ["2", "--tflops", "0"], ["2", "train.optimizer=mezo"]
    for wrong in (["--processes", *wrong] for wrong in wrongs):
        assert ask(*wrong)[0] == 2
