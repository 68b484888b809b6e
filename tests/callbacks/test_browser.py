"""TensorBoard on a run, with a real server and a real browser that opens the pages."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny_runs import TASKS, make_config

import moe_bsr

webdriver = pytest.importorskip("selenium.webdriver", reason="the browser test drives Chromium with selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here")

TOOL = Path(__file__).resolve().parents[2] / "tools" / "expert_views.py"
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1400,1000"
).split()
# TensorBoard's cards are in shadow roots, which selectors cannot search.
EVERYTHING = """
const all = [];
const walk = root => root.querySelectorAll('*').forEach(
    e => { all.push(e); if (e.shadowRoot) walk(e.shadowRoot); });
walk(document);
return [all.filter(e => e.tagName === 'IMG' && e.naturalWidth > 0).map(e => [e.src, e.naturalWidth]),
        all.filter(e => !['STYLE', 'SCRIPT'].includes(e.tagName)).flatMap(e => [...e.childNodes])
           .filter(n => n.nodeType === 3).map(n => n.data.trim()).filter(t => t)];
"""


@pytest.fixture(scope="module")
def run(light, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    moe_bsr.train(make_config(folder, train__steps=4, train__eval_every=2), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    """Return the address of the TensorBoard that the tool starts, once it has read the events."""
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as stream:
        tool = subprocess.Popen(
            [sys.executable, TOOL, run, *"--images 1 --ablation-images 4 --port 0".split()],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        url = wait(lambda: re.search(r"http://localhost:\d+", log.read_text()), tool, log)[0]
        wait(lambda: "which experts work/all blocks" in get(url, "images/tags").get("tensorboard", {}), tool, log)
        yield url
    finally:
        os.killpg(tool.pid, signal.SIGTERM)
        tool.wait()


def wait(what, tool: subprocess.Popen, log: Path, seconds: float = 60):
    """Return the value of `what()` once it is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert tool.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.2)
    return found


def get(url: str, path: str):
    """Return the JSON data of one of TensorBoard's plugins."""
    with urllib.request.urlopen(f"{url}/data/plugin/{path}") as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in [*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(option)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def look(browser, url: str, enough, seconds: float = 20) -> tuple[list, list[str]]:
    """Return a page's pictures (source, width) and words once `enough(pictures, words)`, or after `seconds`."""
    browser.get("about:blank")  # otherwise a change only after the # would not load the page
    browser.get(url)
    until = time.monotonic() + seconds
    while True:
        pictures, words = browser.execute_script(EVERYTHING)
        if enough(pictures, words) or time.monotonic() > until:
            return pictures, words
        time.sleep(0.2)


def test_the_images_tab_opens_on_mistakes(address, browser):
    tags = set(get(address, "images/tags")["tensorboard"])
    sections = ("what is most wrong", "what is taken for what", "where patches go")
    assert {f"{section}/{task}" for section in sections for task in TASKS} <= tags
    assert not [tag for tag in tags if tag.startswith("views/")]  # they are on the page
    pictures, words = look(browser, f"{address}/#images", lambda pictures, words: len(pictures) >= 4)
    assert len(pictures) >= 4
    assert all("individualImage" in source and width >= 300 for source, width in pictures)
    assert any(word.startswith("what is most wrong/") for word in words)


def test_the_first_charts_compare_training_with_validation(address, browser):
    sections = ["accuracy", "loss", "train", "val", "which experts work"]
    wanted = {*sections, "tensorboard/in training", "tensorboard/on validation"}
    _, words = look(browser, f"{address}/#timeseries", lambda _, words: wanted <= set(words))
    assert wanted <= set(words)
    assert list(dict.fromkeys(word for word in words if word in sections)) == sections


def test_a_chart_has_a_run_for_each_task_and_their_mean(address):
    runs = get(address, "scalars/tags")
    with_top1 = {run for run, tags in runs.items() if "val/top1" in tags}
    assert with_top1 == {f"tensorboard/{name}" for name in (*TASKS, "mean of tasks", "selected step")}


def test_the_hparams_tab_has_the_settings_and_results_of_the_run(address, browser):
    _, words = look(browser, f"{address}/#hparams", lambda _, words: "test_vit (random)" in words)
    assert {"backbone", "drop keeps", "expert blocks", "1, 3", "3, 5", "mean val top-1 %"} <= set(words)


def test_the_page_opens_without_a_server(address, run, browser):
    pictures, words = look(browser, (run / "views" / "index.html").as_uri(), lambda pictures, _: len(pictures) > 10)
    assert len(pictures) == len(list((run / "views").glob("*.png")))
    assert {"What happens to the patches", "What each expert is worth"} <= set(words)
