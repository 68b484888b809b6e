"""What a configuration costs, as a person asks: predictions beside measurements, budgets, refusals."""

import json

import pytest
import torch
from tiny_models import make_vit
from tiny_runs import make_config, make_trainer

from moe_bsr import config as configuration
from moe_bsr.benchmark import sweep
from moe_bsr.benchmark.measure import held, trace
from moe_bsr.cli.main import main
from moe_bsr.config import ConfigError
from moe_bsr.cost import predict as exact
from moe_bsr.cost.planner import answer, largest, parse_bytes
from moe_bsr.cost.predict import predict
from moe_bsr.data import Loader
from moe_bsr.model.multitask import MultitaskViT, build_on_meta
from moe_bsr.model.storage import STORAGES
from moe_bsr.runtime import cpu_features as cpu

CLASSES = {"shapes": 10, "fractals": 12}


@pytest.fixture
def ask(tmp_path, capsys):
    """Run tools/cost.py on a tiny configuration with overrides; returns (exit status, stdout, stderr)."""
    (tmp_path / "tiny.yaml").write_text(configuration.dump(make_config(tmp_path)))

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


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 1000, 2**16, 2**20])
def test_the_largest_batch_is_found(limit):
    assert largest(lambda n: n <= limit) == min(limit, 2**16)


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
    for quantity, tolerance in sweep.TOLERANCES.items():
        assert abs(compared[quantity]["difference"]) <= tolerance, quantity


def test_a_budget_says_what_fits_and_every_change_keeps_its_word(tmp_path):
    config = make_config(tmp_path)
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


def suggested(tmp_path, **changes) -> dict[str, str]:
    """{what: overrides} of the changes proposed for a configuration."""
    told = answer(make_config(tmp_path, **changes), CLASSES, 2**30, batch=64, precision="fp32")
    return {change.what: change.overrides for change in told.changes}


def test_changes_do_what_their_names_say(tmp_path):
    changes = suggested(tmp_path, plan__drop_blocks=[4, 1, 2], plan__keep_rate=[0.9, 0.5, 0.7])
    assert changes["drop one block earlier"] == "plan.drop_blocks=[3,0,1]"
    changes = suggested(tmp_path, plan__drop_blocks=[], plan__keep_rate=0.9, plan__train_blocks="all")
    assert changes["drop half of the tokens"] == "plan.drop_blocks=[1] plan.keep_rate=0.5"
    assert "leave the embedding and block 0 frozen" in changes


def test_a_budget_just_missed_is_told_to_the_byte(ask):
    told = json.loads(ask("--json", "--budget", "1GB")[1])["budget"]
    status, out, _ = ask("--budget", str(told["peak"] - 1))
    assert status == 1 and f"budget {told['peak'] - 1:,} B" in out and f"takes {told['peak']:,} B" in out
    status, out, _ = ask("--budget", str(told["floor"]))
    assert status == 1 and f"not even one image fits, which takes {told['least']:,} B" in out
    status, _, error = ask("--budget", "1")
    assert status == 2 and "--budget = '1 B (0.000 MB)'" in error and f"{told['floor']:,} B" in error


def test_the_prediction_told_is_that_of_a_run(ask, tmp_path):
    config = make_config(tmp_path, train__ema_decay=0.9)
    trainer = make_trainer(config, tmp_path / "run")
    assert json.loads(ask("--json", "train.ema_decay=0.9")[1])["peak"] == trainer.predicted.peak
    assert "weights' average" in ask("train.ema_decay=0.9")[1]
    assert "10 MB of kept stems" in ask("data.augment=false", "data.feature_cache_mb=10")[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--sweep", "--batches", "0"], "--batches = [0]"), (["--classes", "-3"], "--classes = -3")],
)
def test_numbers_below_one_are_refused(ask, arguments, named):
    status, _, error = ask(*arguments)
    assert status == 2 and error.startswith(f"cost.py: {named}: at least 1")


def test_the_exit_status_tells_whether_a_budget_holds(ask):
    assert ask("--budget", "1GB")[0] == 0
    status, out, _ = ask("--budget", "3MB", "train.batch_size=512")
    assert status == 1 and "does not fit" in out


def test_a_budget_below_the_parameters_is_refused_with_the_floor(ask):
    status, _, error = ask("--budget", "100KB")
    assert status == 2 and "the parameters alone take" in error


def test_one_model_per_task_tells_the_largest(ask):
    one = json.loads(ask("--json", "mode=stl")[1])
    both = json.loads(ask("--json")[1])
    assert one["parameters"] < both["parameters"]
    assert "this is the one of fractals" in ask("mode=stl")[1]


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


@pytest.mark.parametrize(("batch", "noise", "storage"), [(1, 0.0, "exact"), (16, 1.0, "recompute")])
def test_every_row_of_experts_and_the_noise_they_decided_by_is_counted(tmp_path, batch, noise, storage):
    """One image's rows do not divide by the experts; noise is kept for the second pass."""
    config = make_config(tmp_path, storage=storage, moe__num_experts=16, moe__top_k=1, moe__gate_noise=noise)
    assert abs(sweep.compare(*sweep.run(config, CLASSES, batch=batch))["kept"]["difference"]) <= 0.02


def test_engine_auto_is_refused_where_it_means_grouped(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    model = build_on_meta(config, CLASSES)
    monkeypatch.setattr(exact, "find_device", lambda name: torch.device("cuda"))
    predict(model, config, batch=2, precision="fp32")
    with pytest.raises(ConfigError, match="moe.backend = 'auto': grouped products state no cost"):
        predict(model, config, batch=2, precision="bf16")


def test_grouped_experts_are_refused_where_they_would_be_used(ask):
    status, _, error = ask("moe.backend=grouped")
    assert status == 2 and error.startswith(
        "cost.py: moe.backend = 'grouped': grouped products state no cost; use loop"
    )
    assert ask("moe.backend=grouped", "plan.moe_blocks=[]")[0] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"train__grad_accumulation_steps": 4},
        {"sampler__kind": "joint"},
        {"train__grad_accumulation_steps": 4, "storage": "recompute", "plan__moe_blocks": []},
    ],
    ids=["accumulated", "joint", "recomputed"],
)
def test_the_peak_of_a_run_counts_its_average_and_what_earlier_micro_batches_left(tmp_path, changes):
    config = make_config(tmp_path, train__batch_size=20, train__ema_decay=0.9, **changes)
    trainer = make_trainer(config, tmp_path / "run")
    batches = iter(Loader(trainer.tasks, trainer.transforms, trainer.sampler.batches(0), 0))
    for _ in range(3):
        trainer._update(batches)
    standing = held(
        [
            *trainer.model.parameters(),
            *trainer.model.buffers(),
            *trainer.average.average.values(),
            *(v for s in trainer.optimizer.state.values() for v in s.values()),
        ]
    )
    peak = trace({"update": lambda: trainer._update(batches)}, trainer.runtime.device).peak()
    cost = trainer.predicted
    assert cost.parameters + cost.optimizer + cost.average == standing
    images = 4 * 3 * 32 * 32 * 20 // config.train.grad_accumulation_steps
    assert cost.peak + images == pytest.approx(standing + peak, rel=0.03)


@pytest.mark.parametrize("storage", ["exact", "recompute"])
def test_a_drop_of_one_token_that_is_fused_is_counted(tmp_path, monkeypatch, storage):
    """It leaves as many tokens as it found."""
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: False)  # oneDNN takes some scratch memory, which shows here
    config = make_config(tmp_path, storage=storage, plan__keep_rate=0.7, plan__moe_blocks=[])  # 3 of 4 patches, fused 1
    compared = sweep.compare(*sweep.run(config, CLASSES, batch=40))
    assert abs(compared["kept"]["difference"]) < 1e-3 and abs(compared["transients"]["difference"]) < 5e-3


@pytest.mark.parametrize("plan", ["full", "bsr"])
@pytest.mark.parametrize(
    ("precision", "storage"),
    [("fp32", "exact"), ("fp32", "int8"), ("fp32", "recompute"), ("bf16", "exact"), ("bf16", "int8")],
)
def test_predictions_hold_with_layer_scale(tmp_path, plan, precision, storage):
    """In bf16 they would not if its float32 factors made the stream float32."""
    keys = (
        sweep.plans(4)["full"] if plan == "full" else {"train_blocks": [1, 3], "drop_blocks": [1, 2], "moe_blocks": []}
    )
    config = make_config(
        tmp_path, storage=storage, runtime__precision=precision, **{f"plan__{k}": v for k, v in keys.items()}
    )
    compared = sweep.compare(*sweep.run(config, CLASSES, batch=40, vit=make_vit("layer-scale")))
    for quantity, tolerance in sweep.TOLERANCES.items():
        assert abs(compared[quantity]["difference"]) <= tolerance, (quantity, compared[quantity])


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("qk-norm", "norm of queries and keys"),
        ("pre-norm", "norm before the blocks"),
        ("scaled-attention-norm", "norm within the attention"),
        ("average-pool", "norm after pooling"),
        ("average-pool", "scores of tokens without a class token"),
        ("attention-pool", "pooling by attention"),
    ],
)
def test_a_part_that_states_no_cost_is_refused_by_name(tmp_path, kind, part):
    config = make_config(tmp_path, plan__train_blocks=[1, 3], plan__drop_blocks=[1], plan__moe_blocks=[])
    model = MultitaskViT(make_vit(kind), config, CLASSES)
    with pytest.raises(ConfigError, match=f"backbone.name = 'test_vit': states no cost for its .*{part}"):
        predict(model, config, batch=2, precision="fp32")


@pytest.mark.parametrize(
    ("backbone", "precision", "part"),
    [("vit_base_patch16_clip_quickgelu_224", "fp32", "QuickGELU"), ("vit_giant_patch14_dinov2", "fp32", "GluMlp")],
)
def test_a_backbone_that_cannot_be_costed_is_named(ask, backbone, precision, part):
    status, _, error = ask(
        f"backbone.name={backbone}", "backbone.image_size=null", "plan.moe_blocks=[]", f"runtime.precision={precision}"
    )
    assert status == 2 and error.startswith(f"cost.py: backbone.name = '{backbone}'") and part in error


@pytest.mark.parametrize(("batch", "storages"), [(24, list(STORAGES)), (40, ["exact"])])
def test_predictions_hold_for_every_plan_precision_batch_and_storage(tmp_path, batch, storages):
    """The sweep of `cost.py --sweep` at a width of 64 and 64 px."""
    records = list(
        sweep.sweep(
            make_config(tmp_path), CLASSES, backbones=["test_vit"], image_size=64, batches=[batch], storages=storages
        )
    )
    assert len(records) == 6 * 2 * len(storages)
    # Of experts in bf16, values decide how many rows are padding, and kernels take other scratch on other CPUs.
    loose = [r for r in records if r["precision"] == "bf16" and r["plan"].startswith("moe")]
    for group, factor in ((loose, 2), ([r for r in records if r not in loose], 1)):
        total = sweep.summary(group)
        for quantity, tolerance in sweep.TOLERANCES.items():
            assert total[quantity]["worst"] <= factor * tolerance, (quantity, total[quantity])
