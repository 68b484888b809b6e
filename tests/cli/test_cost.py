"""Test moe-bsr cost: predictions, measurements, memory budgets and error messages."""

import itertools
import json
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_runs import make_config, make_trainer

from moe_bsr import config as configuration
from moe_bsr.benchmark import cost_check
from moe_bsr.cli.main import main
from moe_bsr.config import Config, ConfigError
from moe_bsr.config.probe import probe_config
from moe_bsr.cost import planner
from moe_bsr.cost.planner import answer, largest, parse_bytes
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import build_on_meta
from moe_bsr.model.storage import STORAGES

CLASSES = {"shapes": 10, "fractals": 12}


def config_of(folder, **changes) -> Config:
    """Return a configuration with one layer of experts, because each prediction traces every block."""
    return make_config(folder, plan__moe_blocks=[5], **changes)


@pytest.fixture
def ask(tmp_path, capsys):
    """Return a function that runs the command on a tiny configuration and returns (exit status, stdout, stderr)."""
    (tmp_path / "tiny.yaml").write_text(configuration.dump(config_of(tmp_path)))

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["cost", str(tmp_path / "tiny.yaml"), *arguments])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [("600MB", 600 * 2**20), ("1.5 GB", 1536 * 2**20), ("12kb", 12288), ("4000000", 4000000), ("7B", 7)],
)
def test_byte_sizes_are_parsed(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "0", "6 0MB0", "nan", "inf", "600MiB"])
def test_invalid_byte_sizes_are_refused(text):
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


def test_predictions_agree_with_measurements(ask):
    status, out, _ = ask("--measure", "--json", "storage=recompute")
    compared = json.loads(out)["measured"]["quantities"]
    assert status == 0
    for quantity, tolerance in cost_check.TOLERANCES.items():
        assert abs(compared[quantity]["difference"]) <= tolerance, quantity


@pytest.fixture
def two_storages(monkeypatch):
    """Trace only two of the storages that a change may name. `test_registries` covers all."""
    monkeypatch.setattr(planner, "STORAGES", {name: STORAGES[name] for name in ("int8", "recompute")})


@pytest.mark.usefixtures("two_storages")
def test_the_largest_batch_and_every_suggested_change_for_a_budget_are_exact(tmp_path):
    config = config_of(tmp_path)
    model = build_on_meta(config, CLASSES)
    peak = predict(model, config, batch=64, precision="fp32", all_tasks=True).peak
    one = predict(model, config, batch=1, precision="fp32", all_tasks=True).peak
    verdict = answer(config, CLASSES, (one + peak) // 2, batch=64, precision="fp32")
    assert not verdict.fits and verdict.peak == peak and 0 < verdict.largest_batch < 64
    for images, fits in ((verdict.largest_batch, True), (verdict.largest_batch + 1, False)):
        assert (predict(model, config, batch=images, precision="fp32", all_tasks=True).peak <= verdict.budget) == fits
    assert {"drop one block earlier", "compute in bf16", "store recompute"} <= {c.what for c in verdict.changes}
    for change in verdict.changes:
        (tmp_path / "c.yaml").write_text(configuration.dump(config))
        changed = configuration.load(tmp_path / "c.yaml", change.overrides.split())
        cost = predict(
            build_on_meta(changed, CLASSES), changed, batch=64, precision=changed.runtime.precision, all_tasks=True
        )
        assert (peak - cost.peak, cost.peak <= verdict.budget) == (change.bytes, change.fits)
    free = [c.flops <= 0 for c in verdict.changes]
    assert free == sorted(free, reverse=True)
    rates = [c.bytes / c.flops for c in verdict.changes if c.flops > 0]
    assert rates == sorted(rates, reverse=True)


@pytest.fixture
def one_image_at_most(monkeypatch):
    """Skip the search for the largest batch, which would trace each size, in tests of other things."""
    monkeypatch.setattr(planner, "largest", lambda peak, budget: int(peak(1) <= budget))


@pytest.fixture
def one_change(monkeypatch):
    """Trace only the first change that is suggested for a budget."""
    alternatives = planner._alternatives
    monkeypatch.setattr(planner, "_alternatives", lambda *arguments: itertools.islice(alternatives(*arguments), 1))


def suggested(tmp_path, **changes) -> dict[str, str]:
    """Return {description: overrides} of the changes that are tried for a configuration."""
    tried = planner._alternatives(make_config(tmp_path, **changes), CLASSES, 64, "fp32")
    return {what: overrides for what, overrides, _ in tried}


def test_suggested_changes_have_the_described_overrides(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "predict", lambda *_, **__: SimpleNamespace(written=0))
    changes = suggested(tmp_path, plan__drop_blocks=[4, 1, 2], plan__keep_rate=[0.9, 0.5, 0.7])
    assert changes["drop one block earlier"] == "plan.drop_blocks=[3,0,1]"
    changes = suggested(tmp_path, plan__drop_blocks=[], plan__keep_rate=0.9, plan__train_blocks="all")
    assert changes["drop half of the tokens"] == "plan.drop_blocks=[1] plan.keep_rate=0.5"
    assert "leave the embedding and block 0 frozen" in changes


@pytest.mark.parametrize(
    ("norm", "per", "added"),
    [(1.0, "model", ", clip per block"), (1.0, "parameter", ""), (None, "model", "")],
)
def test_a_suggested_step_in_the_backward_pass_keeps_clipping(norm, per, added, tmp_path, monkeypatch):
    """Clipping by the norm of the whole gradient is impossible then, so it becomes clipping of each block."""
    monkeypatch.setattr(planner, "predict", lambda *_, **__: SimpleNamespace(written=0))
    changes = suggested(tmp_path, train__grad_clip_norm=norm, train__grad_clip_per=per)
    overrides = "train.step_in_backward=true" + (" train.grad_clip_per=block" if added else "")
    assert changes[f"step in the backward pass{added}"] == overrides


@pytest.mark.usefixtures("one_image_at_most", "one_change")
def test_a_budget_missed_by_one_byte_does_not_fit(ask):
    """The exit status says whether the configuration fits the budget."""
    status, out, _ = ask("--json", "--budget", "1GB")
    budget = json.loads(out)["budget"]
    assert status == 0
    status, out, _ = ask("--budget", str(budget["peak"] - 1))
    assert (
        status == 1
        and "does not fit" in out
        and f"budget {budget['peak'] - 1:,} B" in out
        and f"takes {budget['peak']:,} B" in out
    )
    status, out, _ = ask("--budget", str(budget["floor"]))
    assert status == 1 and f"not even one image fits, which takes {budget['least']:,} B" in out
    status, _, error = ask("--budget", "1")
    assert status == 2 and "--budget = '1 B (0.000 MB)'" in error and f"{budget['floor']:,} B" in error


def test_the_predicted_peak_is_that_of_a_training_run(ask, tmp_path):
    config = config_of(tmp_path, train__ema_decay=0.9)
    trainer = make_trainer(config, tmp_path / "run")
    assert json.loads(ask("--json", "train.ema_decay=0.9")[1])["peak"] / 2**20 == trainer.costs["predicted_peak_mb"]
    assert "weights' average" in ask("train.ema_decay=0.9")[1]
    assert "10 MB (10^6 bytes) of cached features" in ask("data.augment=false", "data.feature_cache_mb=10")[1]


def test_only_a_run_with_training_steps_has_a_predicted_step(tmp_path):
    """With `lbfgs` (probe, add-task) no step is taken, and nothing is kept for a backward pass."""
    config = config_of(tmp_path)
    steps, solver = (make_trainer(each, tmp_path / "run") for each in (config, probe_config(config)))
    (line,) = (line for line in steps.about if line.startswith("predicted"))
    assert "MB kept for backward" in line and steps.costs["predicted_peak_mb"] > 0
    (line,) = (line for line in solver.about if line.startswith("predicted"))
    assert line == f"predicted: {solver.costs['gflops_per_image']:.2f} GFLOPs an image"
    assert solver.costs["predicted_peak_mb"] is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--sweep", "--batches", "0"], "--batches = [0]"), (["--classes", "-3"], "--classes = -3")],
)
def test_numbers_below_one_are_refused(ask, arguments, named):
    status, _, error = ask(*arguments)
    assert status == 2 and f"cost: {named}: at least 1" in error


def test_plans_excludes_options_of_a_single_configuration(ask):
    status, _, error = ask("--plans", "--budget", "1GB", "--measure", "--processes", "2")
    assert status == 2 and "--plans = '--measure --processes': none of these" in error


def test_a_budget_below_the_size_of_the_parameters_is_refused(ask):
    status, _, error = ask("--budget", "100KB")
    assert status == 2 and "the parameters alone take" in error


def test_single_task_mode_shows_the_cost_of_the_largest_model(ask):
    one = json.loads(ask("--json", "mode=single_task")[1])
    both = json.loads(ask("--json")[1])
    assert one["parameters"] < both["parameters"]
    assert "this is the model of fractals" in ask("mode=single_task")[1]


def test_classes_come_from_the_task_file_or_the_data_or_must_be_given(ask, tmp_path):
    (tmp_path / "mine.yaml").write_text("{title: Mine, source: folder, path: mine}\n")
    task, root = f"tasks=[{tmp_path / 'mine.yaml'}]", f"data.root={tmp_path}"
    status, _, error = ask(task, root)
    assert status == 2 and "--classes" in error
    given = json.loads(ask(task, root, "--classes", "3", "--json")[1])
    for name in "abc":
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "mine" / name / f"{number}.png")
    assert json.loads(ask(task, root, "--json")[1]) == given


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plan.train_blocks=[9]"], "plan.train_blocks"),
        (["backbone.name=vit_tiny"], "backbone.name"),
        (["--mode", "paper", "--measure"], "--mode"),
        (["moe.mlp_ratio=7"], "moe.mlp_ratio"),
    ],
)
def test_an_invalid_setting_is_named_in_one_line(ask, arguments, named):
    status, _, error = ask(*arguments)
    assert status == 2 and named in error and error.count("\n") == 1


def test_memory_by_the_published_rules(ask):
    paper, ancestor = (json.loads(ask("--mode", mode, "--json")[1]) for mode in ("paper", "backrazor"))
    assert paper["total"] == paper["batch"] * paper["peak_per_image"] + paper["parameters"]
    assert ancestor["total"] > paper["total"]  # BackRazor's rule counts q, k and v three times


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


def test_the_cost_of_a_gpu_run_is_predicted_without_a_gpu(ask):
    """The allocator of a GPU rounds sizes up to multiples of 512 bytes, so the same step takes less on a CPU."""
    gpu, cpu = (
        json.loads(ask("--json", f"runtime.device={device}", "runtime.precision=bf16")[1]) for device in ("cuda", "cpu")
    )
    assert gpu["precision"] == "bf16" and gpu["parameters"] == cpu["parameters"]
    assert gpu["gradients"] == cpu["gradients"] and gpu["optimizer"] == cpu["optimizer"]
    assert all(size % 512 == 0 for kinds in gpu["kept_by_block"].values() for size in kinds.values())


def test_a_sweep_records_its_configuration_and_environment(ask, monkeypatch):
    plan = cost_check.plans(6)["last"]
    monkeypatch.setattr(cost_check, "plans", lambda depth: {"last": plan})
    status, out, _ = ask(
        "--sweep", "--json", "--batches", "2", "--storages", "exact", "--image-size", "32", "--precisions", "fp32"
    )
    result = json.loads(out)
    assert status in (0, 1) and [record["plan"] for record in result["records"]] == ["last"]
    assert result["config"]["backbone"]["name"] == "test_vit" and result["environment"]["threads"] == 1


def test_communication_of_several_processes_and_ways_to_reduce_it(ask):
    status, out, _ = ask("--processes", "4", "--machines", "2", "--step-seconds", "0.1", "--json")
    own, *others = json.loads(out)["several_processes"]
    assert status == 0 and own["overrides"] == "" and own["compute"] == pytest.approx(0.1)
    # 4 processes on 2 machines: half of twice the bytes within a machine, half of twice the bytes between the two.
    waited = own["exchanged"] * (1 / 300e9 + 1 / (0.85 * 1e9 / 8))
    assert own["efficiency"]["1 Gb/s"] == pytest.approx(0.1 / (0.1 + waited))
    halved = next(way for way in others if way["overrides"] == "train.exchange=bf16")
    assert halved["exchanged"] == own["exchanged"] / 2 and halved["compute"] == own["compute"]
    assert "as configured" in ask("--processes", "2")[1]
    wrongs = ["3", "--machines", "2"], ["2", "--tflops", "0"], ["2", "train.optimizer=mezo"]
    for wrong in (["--processes", *wrong] for wrong in wrongs):
        assert ask(*wrong)[0] == 2
