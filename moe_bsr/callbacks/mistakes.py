"""Draw confusion matrices and the worst mistakes of the selected weights at the end of a run."""

import time
from collections.abc import Mapping
from typing import Any

from moe_bsr.callbacks.writer import Writer
from moe_bsr.evaluation.mistakes import find_mistakes
from moe_bsr.evaluation.probe import pick_probe_images
from moe_bsr.training.callback import Callback, StartEvent
from moe_bsr.visualize import mistakes as figures
from moe_bsr.visualize import theme

IMAGES = 500  # most validation images per task, to keep this short
TASKS = 8  # most tasks with a picture: those with the lowest accuracy
# TensorBoard sections, sorted after the curves. They are the first in the Images tab, which opens with them.
ERRORS, CONFUSIONS = "what is most wrong", "what is taken for what"


class MistakeViews(Callback):
    """Writes pictures into the run's TensorBoard events; adds `mistakes_seconds` to the report."""

    name = "mistakes"

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def on_start(self, start: StartEvent) -> None:
        self.start = start

    def on_end(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Draw the pictures. The model has the weights that the report describes."""
        start, began = self.start, time.perf_counter()
        if not start.config.train.pictures or report["status"] != "finished":
            return {}
        tasks = sorted(start.data, key=lambda task: report["tasks"][task].get("top1", 0))[:TASKS]
        for task in (task for task in start.data if task in tasks):
            data = pick_probe_images(start.data[task], IMAGES)
            found = find_mistakes(start.model, data, start.transforms, start.runtime, figures.WORST)
            note = f"{len(data.val):,} validation images, step {report['selected_step']:,}"
            drawn = {CONFUSIONS: figures.confusion(task, found, note), ERRORS: figures.worst(task, found, note)}
            for section, figure in drawn.items():
                if figure is not None:
                    self.writer.picture(f"{section}/{task}", theme.png(figure, 256), report["selected_step"])
        return {"mistakes_seconds": time.perf_counter() - began}
