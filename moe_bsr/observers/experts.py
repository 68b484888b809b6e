"""Expert use: how often each task chose each expert, counted over the training run.

Counts only, added up every update; nothing is drawn here.
"""

import torch

from moe_bsr.observers import Observer, Step


class ExpertUse(Observer):
    """Adds `expert_use` to the report: {block: {task: share of each expert, summing to 1}}."""

    def restore(self, state: dict) -> None:
        self.counts: dict[tuple[int, str], torch.Tensor] = {
            (int(block), task): torch.tensor(counts)
            for block, tasks in state.items() for task, counts in tasks.items()}

    def on_step(self, step: Step) -> None:
        for output in step.outputs:
            for block, routing in output.routing.items():
                chosen = torch.bincount(routing.experts.flatten(), minlength=len(routing.importance)).cpu()
                key = (block, step.task)
                self.counts[key] = self.counts[key] + chosen if key in self.counts else chosen

    def state(self) -> dict:
        tree: dict[str, dict[str, list[int]]] = {}
        for (block, task), counts in self.counts.items():
            tree.setdefault(str(block), {})[task] = counts.tolist()
        return tree

    def on_end(self, report: dict) -> None:
        report["expert_use"] = {
            block: {task: [round(c / sum(counts), 4) for c in counts] for task, counts in tasks.items()}
            for block, tasks in self.state().items()}
