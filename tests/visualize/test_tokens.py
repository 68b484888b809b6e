"""Traces of patches through drops and experts against loops over tokens, and the strips that show them."""

import numpy as np
import pytest
import torch
from tiny_models import make_model, normal, scale_routers

from moe_bsr.config import TokensConfig
from moe_bsr.visualize import theme
from moe_bsr.visualize.tokens import WIDTH, TokenTrace, View, strip, trace_tokens

PLANS = {
    "drops and experts": {"drop_blocks": [1, 2], "moe_blocks": [1, 3]},
    "three prefix tokens": {"kind": "registers", "drop_blocks": [0, 2], "moe_blocks": [0, 3], "train_blocks": "all"},
    "no class token": {"kind": "average-pool", "drop_blocks": [1], "moe_blocks": [1, 2], "train_blocks": "all"},
    "no drop": {"drop_blocks": [], "moe_blocks": [1, 3]},
    "no experts": {"drop_blocks": [0, 1, 2], "moe_blocks": []},
    "neither": {"drop_blocks": [], "moe_blocks": []},
    "every block": {"drop_blocks": [0, 1, 2], "moe_blocks": [0, 1, 2, 3], "train_blocks": "all", "keep_rate": 0.8},
}


def run(options: dict):
    model = make_model(**({"kind": "class-token"} | options)).eval()
    scale_routers(model, 100.0)
    with torch.inference_mode():
        return model, model(normal(3, 3, 16, 16), "one").records


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_a_trace_has_the_kept_patches_and_experts_of_every_block(options):
    model, records = run(options)
    prefix = model.vit.num_prefix_tokens
    for place in range(3):
        found = trace_tokens(records, place, 16)
        assert sorted(found.kept) == [i for i, plan in enumerate(model.plan) if plan.keep_rate < 1]
        assert sorted(found.experts) == model.balance.blocks
        origin = list(range(16))
        for index in sorted(records):
            if (dropped := records[index].dropped) is not None:
                if index == min(found.kept):
                    assert found.scores.tolist() == dropped.scores[place].tolist()
                origin = dropped.origin[place].tolist()
                kept, fused = found.kept[index]
                assert {i for i in range(16) if kept[i]} == set(origin) - {-1}
                assert fused == origin.count(-1)
            if (routing := records[index].routing) is not None:
                expected = [-1] * 16
                for token, patch in enumerate(origin):
                    if patch >= 0:
                        expected[patch] = int(routing.experts[place, prefix + token, 0])
                assert found.experts[index].tolist() == expected
    assert (found.scores is None) == (not found.kept)


MERGES = {"tokens": TokensConfig(reduce="merge"), "drop_blocks": [0, 1, 2], "keep_rate": 0.6}


def test_a_trace_of_merged_patches_has_the_expert_of_their_token():
    _, records = run(MERGES | {"moe_blocks": [1, 3]})
    for place in range(3):
        found = trace_tokens(records, place, 16)
        assert list(found.merged) == [0, 1, 2] and not found.kept and found.scores is None
        for merges, routes in ((1, 1), (2, 3)):
            token = records[merges].dropped.place[place].tolist()
            assert found.merged[merges].tolist() == token
            best = records[routes].routing.experts[place, 1:, 0]
            assert found.experts[routes].tolist() == [int(best[each]) for each in token]


def test_merged_patches_have_their_mean_color():
    image = normal(3, 20, 20).mul(60).add(128).clamp(0, 255).byte().numpy()
    view = View(image, (2, 2), "a", "b", TokenTrace(merged={2: np.array([1, 0, 1, 1])}))
    shown = panels(view, 0)
    assert list(shown) == ["image", "after block 2"]
    picture, after = image.transpose(1, 2, 0), shown["after block 2"]
    assert (after[:10, 10:] == picture[:10, 10:]).all()  # not merged with others
    there = np.ones((20, 20), bool)
    there[:10, 10:] = False
    assert np.abs(after[there] - picture[there].mean(0)).max() <= 1


@pytest.mark.parametrize("options", [*PLANS.values(), MERGES, MERGES | {"moe_blocks": [1, 3]}])
def test_a_strip_is_drawn_for_any_plan_and_number_of_images(options):
    _, records = run(options)
    heights = []
    for count in (1, 3):
        views = [
            View(np.full((3, 16, 16), 90, np.uint8), (4, 4), "a", "b", trace_tokens(records, i, 16))
            for i in range(count)
        ]
        picture = theme.pixels(strip("one", views, 4))
        assert picture.shape[1:] == (WIDTH, 3)
        heights.append(len(picture))
    assert heights[1] > 2 * heights[0]


def panels(view: View, experts: int) -> dict[str, np.ndarray]:
    """Return the pixels of each panel in the strip of one image, by the caption below it."""
    axes = strip("task", [view], experts).axes[0]
    words = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts}
    found = {}
    for image in axes.images:
        left, _, bottom, _ = image.get_extent()
        below = [text for (x, y), text in words.items() if x == round(left) and 0 < y - bottom < 20]
        found[below[0]] = np.asarray(image.get_array())
    return found


def test_kept_patches_are_unchanged_and_dropped_ones_are_gray():
    image = np.zeros((3, 20, 20), np.uint8)
    image[0] = 200  # pure red
    kept = np.array([True, False, False, True])
    view = View(image, (2, 2), "a", "b", TokenTrace(np.array([0.4, 0.1, 0.1, 0.2]), {2: (kept, 1)}))
    shown = panels(view, 0)
    assert list(shown) == ["image", "score, block 2", "after block 2"]
    after = shown["after block 2"]
    assert (after[:10, :10] == [200, 0, 0]).all() and (after[10:, 10:] == [200, 0, 0]).all()
    faded = after[:10, 10:].reshape(-1, 3)
    assert (faded == faded[:, :1]).all() and (faded > 150).all()
    heat = shown["score, block 2"].mean(-1)
    assert heat[0, 0] < heat[1, 1] < heat[0, 1] == heat[1, 0]  # darker means a higher score


def test_patches_have_the_color_of_their_expert_on_grids_that_are_not_square():
    chosen = np.array([0, 1, 2, -1, 5, 1])
    view = View(np.full((3, 24, 24), 128, np.uint8), (2, 3), "a", "a", TokenTrace(experts={4: chosen}))
    shown = panels(view, 6)["experts, block 4"]
    for patch, expert in enumerate(chosen):
        part = shown[patch // 3 * 12 : patch // 3 * 12 + 12, patch % 3 * 8 : patch % 3 * 8 + 8].reshape(-1, 3)
        assert (part == part[0]).all()
        if expert >= 0:
            assert np.abs(part[0] - 255 * theme.expert_colors(6)[expert]).max() <= 1
        else:
            assert len(set(part[0])) == 1


def test_class_names_are_shown_and_long_ones_are_cut():
    view = View(np.zeros((3, 8, 8), np.uint8), (2, 2), "x" * 90, "short", TokenTrace())
    texts = [t.get_text() for t in strip("pets", [view], note="step 7").axes[0].texts]
    assert texts[:2] == ["pets", "step 7"]
    assert any("xxx" in text and len(text) < 50 for text in texts)
    assert any("short" in text and "wrong" in text for text in texts)
