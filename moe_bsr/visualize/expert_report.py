"""Draw all views of a trained run from its checkpoint and validation split, explain them, and write them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from moe_bsr.evaluation import ablation, interventions, probe
from moe_bsr.evaluation.mistakes import find_mistakes
from moe_bsr.evaluation.routing import RoutingStatistics
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runs.load import TrainedRun
from moe_bsr.runtime.files import write_whole
from moe_bsr.runtime.top_list import are_many, condensed, shown
from moe_bsr.visualize import accuracy, conclusions, many_tasks, mistakes, theme
from moe_bsr.visualize import experts as expert_figures
from moe_bsr.visualize import interventions as intervention_views
from moe_bsr.visualize.html import Picture, Section, Table, page
from moe_bsr.visualize.tokens import make_views, strip

MISTAKES = 2000  # most images of a task on which mistakes are counted


@dataclass(slots=True)
class Observed:
    """Counts over the whole validation split.

    Attributes:
        statistics: routing, by MoE block.
        kept: patches that the drops keep, by task.
        scores: number of images classified correctly and in all, by task.
    """

    statistics: dict[int, RoutingStatistics] = field(default_factory=dict)
    kept: dict[str, conclusions.KeptPatches] = field(default_factory=dict)
    scores: dict[str, tuple[int, int]] = field(default_factory=dict)


def sections(
    trained: TrainedRun, images: int, ablated: int, batch_size: int, say: Callable[[str], None]
) -> list[Section]:
    """Run the model over the validation splits, and draw the sections of the page.

    For many tasks, shares and accuracy include all; masking, mistakes and strips show the worst and the best tasks.

    Args:
        images: number of strips per task.
        ablated: images per task for masking experts; 0 leaves this out.
        say: called with a line of text at each stage.
    """
    reason, seen, results, taken = no_experts(trained), observe(trained, batch_size, say), {}, None
    drawn = shown({task: right / count for task, (right, count) in seen.scores.items()})
    everything, trained = trained, replace(trained, models={task: trained.models[task] for task in drawn})
    if ablated and not reason:
        say(f"masking each expert in turn, on at most {ablated} images per task")
        data = {task: probe.pick_probe_images(trained.data(task), ablated) for task in trained.models}
        model = next(iter(trained.models.values()))
        results = ablation.ablate(model, data, trained.transforms, trained.runtime, batch_size)
        say("merging the experts, swapping the routers, shuffling the choices")
        taken = interventions.intervene(model, data, trained.transforms, trained.runtime, batch_size)
    say("confusion matrices, and the most wrong answers")
    found = [_conclusions(seen, results, taken, reason), accuracy.section(seen.scores)]
    found.append(_mistakes_section(trained, batch_size))
    if not reason:
        found.append(_usage_section(seen.statistics, trained.step))
        found += [intervention_views.section(taken)] if taken else []
        found += [_ablation_section(results, trained.step, _only_class_token(model))] if results else []
        several = len(everything.models) > 1 and not are_many(everything.models)
        found += [_distances_section(seen.statistics, trained.step)] if several else []
    say(f"strips of {images} images per task")
    found.append(_token_section(trained, images))
    return found if reason else [*found, _numbers_section(seen.statistics)]


def no_experts(trained: TrainedRun) -> str:
    """Return why a run has no expert views; empty if it has."""
    if not trained.config.plan.moe_blocks:
        return (
            "This run has no mixture of experts: plan.moe_blocks is empty, so every block has one FFN for all "
            "tokens, and there is no routing to show. The token views are below."
        )
    if trained.config.mode == "single_task":
        return (
            "This run trained one model per task. Each model has its own experts, so tasks cannot share any, and "
            "there are no expert views. The token views are below."
        )
    return ""


def observe(trained: TrainedRun, batch_size: int, say: Callable[[str], None]) -> Observed:
    """Run the model once over the whole validation split of each task, and count."""
    seen, many = Observed(), are_many(trained.models)
    if many:
        say(f"{len(trained.models)} tasks: {sum(len(trained.data(t).val) for t in trained.models)} validation images")
    for task, model in trained.models.items():
        data, right, read = trained.data(task), 0, 0
        kept = seen.kept[task] = conclusions.KeptPatches(model.vit.patch_embed.grid_size)
        if not many:
            say(f"{task}: {len(data.val)} validation images")
        with torch.inference_mode(), trained.runtime.autocast():
            for images, labels in trained.transforms.eval_batches(data, "val", batch_size):
                output = model(trained.transforms.normalize(images, device=trained.runtime.device), task)
                right += int((output.logits.argmax(1).cpu() == labels).sum())
                read += len(labels)
                if not trained.config.tokens.merges:  # merging keeps all patches, each in some token
                    kept.add(output.records)
                for block, routing in output.routing.items():
                    if block not in seen.statistics:
                        seen.statistics[block] = RoutingStatistics(list(trained.models), len(routing.importance))
                    seen.statistics[block].add(task, routing)
        seen.scores[task] = right, read
    return seen


def write(trained: TrainedRun, sections: list[Section]) -> Path:
    """Write PNG files and the page to RUN/views, in place of earlier ones. Return the path of the page."""
    folder = trained.run / "views"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for picture in (picture for section in sections for picture in section.pictures):
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    which = "of each task" if trained.config.mode == "single_task" else f"of step {trained.step:,}"
    about = [f"{trained.run}, checkpoint {which} ({trained.weights} weights), validation split."]
    title = f"Experts and tokens of {trained.run.resolve().name}"
    write_whole(folder / "index.html", page(title, about, sections))
    return folder / "index.html"


def _picture(name: str, figure, alt: str) -> Picture:
    return Picture(name, theme.png(figure), alt)


def _conclusions(
    seen: Observed, results: dict[int, ablation.Ablation], taken: ablation.Ablation | None, reason: str
) -> Section:
    claims = [] if reason else [conclusions.of_load(seen.statistics), conclusions.of_tasks(seen.statistics)]
    claims += [intervention_views.claim(taken)] if taken else []
    claims += [conclusions.of_ablation(results)] if results else []
    claims.append(conclusions.of_drops(seen.kept))
    said = [claim for claim in claims if claim is not None]
    plain = ["Nothing stands out."] if not any(claim.notable for claim in said) else []
    return Section("Summary", [*plain, *said, *[reason] * bool(reason)])


def _mistakes_section(trained: TrainedRun, batch_size: int) -> Section:
    when = "validation" if trained.config.mode == "single_task" else f"validation, step {trained.step:,}"
    pictures, lines = [], []
    for task, model in trained.models.items():
        data = probe.pick_probe_images(trained.data(task), MISTAKES)
        found = find_mistakes(model, data, trained.transforms, trained.runtime, mistakes.WORST, batch_size)
        note = f"{when}, {len(data.val):,} images"
        pictures.append(
            _picture(f"confusion_{task}", mistakes.confusion(task, found, note), f"{task}: confusion matrix.")
        )
        if (worst := mistakes.worst(task, found, note)) is None:
            lines.append(f"{task}: no answer is wrong.")
        else:
            pictures.append(_picture(f"worst_{task}", worst, f"{task}: images with the most wrong answers."))
    return Section(
        "Which classes are confused",
        [
            "In the confusion matrix a row is a true class, and a column an answer; right answers are blue, and wrong "
            "ones red. Beside it are the images with the most wrong answers (the largest loss), the true class in "
            "bold and the answer in red. Wrong labels of the dataset show up there too.",
            *condensed(lines, trained.models),
        ],
        pictures,
    )


def _numbers_section(statistics: dict[int, RoutingStatistics]) -> Section:
    by_block = {block: s.numbers() for block, s in statistics.items()}
    names = list(next(iter(by_block.values())))
    rows = [["", *(f"block {block}" for block in by_block)]]
    rows += [
        [name.replace("_", " "), *(_format_number(numbers[name]) for numbers in by_block.values())] for name in names
    ]
    return Section(
        "All numbers",
        [
            *(f"Block {block}: {s.reading()}." for block, s in statistics.items()),
            "Load CV: standard deviation of how often the experts are chosen, divided by the mean. 0 is perfectly "
            "even; with E experts, sqrt(E - 1) means that one expert gets everything. Entropies are divided by log E. "
            "Mean entropy is that of the mean distribution: 1 means that all experts are used equally. Token entropy "
            "is that of single tokens: 0 means that the router is sure of each token, 1 that it cannot decide. Both "
            "high: undecided. Mean high and token low: confident and balanced. Both low: collapsed.",
            "Mutual information between task and expert: 0 if all tasks use the experts in the same way, 1 if the "
            "expert determines the task (or the task the expert, if there are fewer experts than tasks).",
        ],
        tables=[Table(rows)],
    )


def _format_number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}"


def _usage_section(statistics: dict[int, RoutingStatistics], step: int) -> Section:
    pictures = [
        _picture("overview", expert_figures.overview(statistics, "validation", step), "Share of each expert by block.")
    ]
    tables = []
    for block, s in statistics.items():
        pictures.append(
            _picture(
                f"use_block{block}",
                many_tasks.heatmap(s, block, "validation", step),
                f"Block {block}: share of each expert in each task's choices.",
            )
        )
        rows = [["% of choices", *map(str, range(s.experts))]]
        rows += [
            [task, *(f"{100 * share:.1f}" for share in row)]
            for task, row in zip(s.tasks, s.shares("count"), strict=True)
        ]
        tables.append(Table(rows, f"block {block} as numbers", folded=True))
    return Section(
        "Which experts each task uses",
        [
            "A row is a task, a column an expert, and a row sums to 100 %. If rows look alike, the tasks share "
            "experts. If rows are dark in different columns, experts have specialized in tasks. A column that is "
            "empty in all rows is a dead expert. The share of choices is how often an expert was among the top k, "
            "and the share of gate weight how much weight it got.",
            "Experts of different blocks are unrelated, even if they have the same number.",
        ],
        pictures,
        tables,
    )


def _distances_section(statistics: dict[int, RoutingStatistics], step: int) -> Section:
    return Section(
        "How far apart tasks route",
        [
            "The Jensen-Shannon distance between the rows of two tasks above: 0 means the same use of experts, 1 no "
            "common expert.",
        ],
        [
            _picture(
                f"distances_block{block}",
                expert_figures.distances(s, block, "validation", step),
                f"Block {block}: distance between the routing of each pair of tasks.",
            )
            for block, s in statistics.items()
        ],
    )


def _only_class_token(model: MultitaskViT) -> bool:
    """Return whether the last block has experts, and the heads read only the class token of its output."""
    return model.plan[-1].moe and model.vit.global_pool == "token"


def _ablation_section(results: dict[int, ablation.Ablation], step: int, only_class_token: bool) -> Section:
    pictures, tables = [], []
    for block, result in results.items():
        pictures.append(
            _picture(
                f"ablation_block{block}",
                expert_figures.ablation(result, block, "validation", step),
                f"Block {block}: accuracy that each task loses if an expert is masked.",
            )
        )
        rows = [["points lost", "top-1 %", "images", *map(str, range(result.lost.shape[1]))]]
        rows += [
            [
                task,
                f"{100 * result.right[i] / result.images[i]:.1f}",
                str(result.images[i]),
                *(f"{points:+.1f}" for points in result.points()[i]),
            ]
            for i, task in enumerate(result.tasks)
        ]
        tables.append(Table(rows, f"block {block} as numbers", folded=True))
    last = [
        f"Block {max(results)} is the last one, and the heads read only its class token. So there only the experts "
        "of the class token can matter, while the shares above count all tokens."
    ] * only_class_token
    least = 100 / min(int(r.images.min()) for r in results.values())
    return Section(
        "What each expert is worth",
        [
            "One expert at a time is masked: its router logit becomes minus infinity, and each token gets its next "
            "best expert instead. A cell is the accuracy that the task loses by this, in percentage points; negative "
            "values are gains. If an expert is often chosen and nothing is lost without it, the others can replace it.",
            f"One image is up to {least:.1f} points here. Bold cells differ from 0 by more than chance explains "
            "(McNemar's test at 5 %). Of many cells, one in twenty is bold by chance.",
            *last,
        ],
        pictures,
        tables,
    )


def _token_section(trained: TrainedRun, count: int) -> Section:
    """Return strips of a few images of each task, the same ones every time."""
    experts = trained.config.moe.num_experts if trained.config.plan.moe_blocks else 0
    when = "validation" if trained.config.mode == "single_task" else f"validation, step {trained.step:,}"
    pictures = []
    for task, model in trained.models.items():
        result = probe.run_probe(
            model, probe.pick_probe_images(trained.data(task), count), trained.transforms, trained.runtime
        )
        shown = make_views(result, trained.class_names[task], model.vit.patch_embed.grid_size)
        figure = strip(task, shown, experts, when)
        pictures.append(
            _picture(f"tokens_{task}", figure, f"{task}: what happens to the patches of {len(shown)} images.")
        )
    what = ["The images are chosen at random, and are the same ones whenever this page is made."]
    if trained.config.plan.drop_blocks and trained.config.tokens.merges:
        what.append("After a block: patches that were merged into one token have their mean color.")
    elif trained.config.plan.drop_blocks:
        fate = "dropped" if trained.config.tokens.fuse == "none" else "fused into one token"
        what.append(
            "Score: the attention that each patch gets at the first drop (from the class token if there is one), as "
            "the mean over heads; dark is high. After a block: the patches that its drop kept; the pale ones were "
            f"{fate}."
        )
    else:
        what.append("This run drops no patches.")
    if experts:
        what.append(
            "Experts: the best expert of each remaining patch, by color and, if there is room, by number. The other "
            "experts of a patch, and those of the class token and of fused tokens, are not shown. Experts of different "
            "blocks are unrelated, even if they have the same number."
        )
    return Section("What happens to the patches", what, pictures)
