"""Test moe-bsr views on runs with and without experts: picture files, HTML page and TensorBoard events."""

import base64
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME, parse_session_start_info_plugin_data
from tiny_data import folder_task
from tiny_runs import TASKS, make_config

import moe_bsr
from moe_bsr.callbacks import hparams
from moe_bsr.callbacks.writer import Writer
from moe_bsr.cli.main import main
from moe_bsr.evaluation.evaluate import evaluate
from moe_bsr.runs import report
from moe_bsr.visualize import expert_report as gallery
from moe_bsr.visualize.html import Picture, Section, Table, page

pytestmark = pytest.mark.usefixtures("light")

KINDS = {
    "experts": {},
    "dense, no drops": {"plan__moe_blocks": [], "plan__drop_blocks": []},
    "stl": {"mode": "single_task"},
}
SHORT = {"train__steps": 2, "train__evaluate_test": False, "train__pictures": False}


def draw(run: Path, *arguments: str) -> None:
    assert main(["views", str(run), "--no-serve", "--images", "2", "--ablation-images", "8", *arguments]) == 0


def test_a_zip_file_is_refused_before_it_is_loaded(tmp_path, capsys):
    (tmp_path / "a.zip").write_bytes(b"")
    assert main(["views", str(tmp_path / "a.zip"), "--no-serve"]) == 2
    assert "pictures are written into the folder of the run; unpack it first" in capsys.readouterr().err


@pytest.fixture(scope="module", params=KINDS)
def drawn(request, tmp_path_factory):
    """Train a tiny run of each kind and draw its views. Returns (kind, run folder)."""
    folder = tmp_path_factory.mktemp("drawn")
    run = folder / "run"
    moe_bsr.train(make_config(folder, **SHORT, **KINDS[request.param]), run)
    draw(run)
    return request.param, run


class Reader(HTMLParser):
    """Parse a page: collect images, links and text, and check that tags are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images, self.links, self.words, self.open = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_every_picture_is_a_file_and_in_the_page(drawn):
    kind, run = drawn
    written = {file.stem: file.read_bytes() for file in (run / "views").glob("*.png")}
    expected = {f"{name}_{task}" for name in ("confusion", "worst", "tokens") for task in TASKS}
    if kind == "experts":
        expected |= {"overview"} | {
            f"{name}_block{block}" for block in (3, 5) for name in ("use", "distances", "ablation")
        }
    assert written.keys() == expected
    reader = Reader((run / "views" / "index.html").read_text())
    shown = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in reader.images]
    assert sorted(shown) == sorted(written.values()) and all(image["alt"] for image in reader.images)


def test_the_page_is_self_contained_and_says_why_there_are_no_expert_views(drawn):
    kind, run = drawn
    reader = Reader((run / "views" / "index.html").read_text())
    assert reader.open == [] and all(link.startswith(("#", "data:")) for link in reader.links)
    words = " ".join(reader.words)
    assert ("no mixture of experts" in words) == (kind == "dense, no drops")
    assert ("one model per task" in words) == (kind == "stl")
    assert ("drops no patches" in words) == (kind == "dense, no drops")
    assert ("read only its class token" in words) == (kind == "experts")


def test_the_page_starts_with_a_summary(drawn):
    kind, run = drawn
    html = (run / "views" / "index.html").read_text(encoding="utf-8")
    heading, words = re.search(r"<main><h2 id=[^>]*>(.*?)</h2>(.*?)<h2", html, re.S).groups()
    assert heading == "Summary"
    for phrase in ("xperts are ", "Mutual information", "by itself"):
        assert (phrase in words) == (kind == "experts")
    assert {"dense, no drops": "no mixture of experts", "stl": "one model per task"}.get(kind, "") in words


@pytest.mark.parametrize("drawn", ["stl"], indirect=True)
def test_drawing_again_replaces_and_leaves_training_events_alone(drawn):
    _, run = drawn
    before = {path: path.read_bytes() for path in run.rglob("*tfevents*")}
    names = sorted(path.relative_to(run) for path in run.rglob("*"))
    draw(run, "--images", "1")
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == names
    assert {path: path.read_bytes() for path in run.rglob("*tfevents*")} == before


@pytest.mark.parametrize("drawn", ["stl"], indirect=True)
def test_the_accuracy_counts_only_images_that_can_be_read(drawn):
    loaded = moe_bsr.load(drawn[1], skip_unreadable=True)
    task = next(iter(loaded.models))
    data = loaded.data(task)
    index = np.array([-1, *data.val.index[1:]])
    loaded._data[task] = replace(data, val=replace(data.val, index=index))
    with pytest.warns(UserWarning, match="it is skipped"):
        seen = gallery.observe(loaded, 7, lambda line: None)
    assert seen.scores[task][1] == len(index) - 1


def test_statistics_and_accuracy_are_those_of_the_whole_validation_split(drawn):
    kind, run = drawn
    loaded = moe_bsr.load(run)
    seen = gallery.observe(loaded, 7, lambda line: None)
    for task, (right, count) in seen.scores.items():
        result = evaluate(loaded.models[task], loaded.data(task), "val", loaded.transforms, loaded.runtime)
        assert (100 * right / count, count) == (pytest.approx(result["top1"]), result["n"])
        for block, share in result["expert_share"].items():
            mine = seen.statistics[int(block)].shares("count")[list(seen.scores).index(task)]
            assert np.allclose(mine, share)
        if result["tokens_kept_after"]:
            assert seen.kept[task].share() == pytest.approx(result["tokens_kept"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "not a run folder"),
        (["--checkpoint", "99"], "no checkpoint 99"),
    ],
)
def test_invalid_runs_and_checkpoints_are_refused_in_one_line(tmp_path, capsys, arguments, words):
    run = tmp_path / "run"
    if arguments[0].startswith("--"):
        moe_bsr.train(make_config(tmp_path, **SHORT), run)
        arguments = [str(run), *arguments]
    assert main(["views", *arguments, "--no-serve"]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_html_text_is_escaped_and_tables_are_complete():
    section = Section(
        "A & B",
        ["1 < 2"],
        [Picture("p", b"\x89PNG", 'say "so"')],
        [Table([["", "x"], ["<y>", "3"]], "more", folded=True)],
    )
    html = page("<title>", ["about"], [section])
    reader = Reader(html)
    words = " ".join(reader.words)
    assert all(text in words for text in ("<title>", "A & B", "1 < 2", "<y>", "3"))
    assert reader.images[0]["alt"] == 'say "so"' and "<details>" in html
    assert re.search(r'href="#(.+?)"', html)[1] == re.search(r'h2 id="(.+?)"', html)[1]


def test_hparams_are_written_without_a_tensorboard_run_of_their_own(tmp_path):
    config = make_config(
        tmp_path,
        plan__keep_rate=[0.5, 0.75],
        storage=[{"kind": "recompute", "blocks": [3, 4]}, {"kind": "int8", "blocks": [5]}],
    )
    report = {
        "mean_top1": 12.5,
        "selected_mean_val_top1": 25.0,
        "selected_step": 4,
        "environment": {"precision": "fp32"},
        "measured_peak_mb": 300.0,
        "gflops_per_image": 0.25,
        "train_seconds": 4.0,
    }
    writer = Writer(tmp_path / "tensorboard")
    hparams.write(writer, config, report, {"shapes": 20.0, "fractals": 30.0})
    writer.flush()
    assert [path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == []
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert content.plugin_name == PLUGIN_NAME
    values = parse_session_start_info_plugin_data(content.content).hparams
    assert values["drop keeps"].string_value == "0.5, 0.75" and values["expert blocks"].string_value == "3, 5"
    assert values["storage"].string_value == "recompute 3, 4; int8 5" and values["with adapter"].string_value == "none"
    assert values["experts"].string_value == "top 2 of 4" and values["steps"].number_value == 8
    assert values["backbone"].string_value == "test_vit (random)" and values["precision"].string_value == "fp32"
    assert values["images augmented"].string_value == "cropped and mirrored"
    scalars = {
        tag.removeprefix("with what result/"): [(s.step, s.value) for s in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert scalars["mean val top-1 %"] == [(4, 25.0)] and scalars["fractals val top-1 %"] == [(4, 30.0)]
    assert scalars["peak MB"] == [(4, 300.0)] and len(scalars) == 6


def test_a_run_with_unusual_class_names_is_trained_drawn_and_evaluated(tmp_path, capsys):
    """Class names that look like broken formulas, use other scripts or are long do not stop training or drawing."""
    classes = ["$$", "$$$$", r"$\frac{$", "a$b$c", "été", "日本 語", "x" * 200]
    folder_task(tmp_path, classes, each=3)
    config = make_config(tmp_path, data__root=str(tmp_path), train__steps=2, plan__moe_blocks=[])
    config = moe_bsr.config.replace(config, tasks=[str(tmp_path / "pictures.yaml")], data__val_fraction=0.34)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert moe_bsr.train(config, tmp_path / "run")["status"] == "finished"
        draw(tmp_path / "run")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    confusions = report.read(tmp_path / "run")["tasks"]["pictures"]["confusions"]
    assert {c["true"] for c in confusions} <= set(classes) and any(name in printed for name in classes)
    drawn = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Tags()["images"]
    assert {"what is taken for what/pictures", "where patches go/pictures"} <= set(drawn)
