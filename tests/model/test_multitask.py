"""The whole model against timm's own network and a plain-loop reference."""

import copy
import itertools
import math

import pytest
import torch
from tiny_models import (
    CLASSES,
    KINDS,
    gradients,
    make_model,
    make_vit,
    normal,
    saved_for_backward,
    scale_routers,
)
from torch.nn import functional as F

from moe_bsr import ops
from moe_bsr.config import Config, ConfigError, MoEConfig, PlanConfig, TokensConfig
from moe_bsr.evaluation.ablation import _first_pass
from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.tokens import FUSED

# --- with keep rate 1.0 the model equals timm's network ---


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_dropping_and_experts_the_model_equals_timms_network(kind, training):
    theirs, images = make_vit(kind, num_classes=5).train(training), normal(3, 3, 16, 16)
    ours = make_vit(kind)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "head." not in k})
    model = make_model(vit=ours, keep_rate=1.0).train(training)
    model.heads["two"].load_state_dict(theirs.head.state_dict())
    output = model(images, "two")
    # The last block computes only the class token, in products of another shape.
    torch.testing.assert_close(output.logits, theirs(images), rtol=1e-5, atol=1e-5)
    assert output.records == {} and output.auxiliary_loss == 0


# --- with keep rate below 1 it equals a plain-loop reference ---


def reference_logits(model: MultitaskViT, images: torch.Tensor, task: str):
    """Compute logits and traces, one image and one token at a time, with explicit attention maps."""
    vit, config, prefix = model.vit, model.tokens_config, model.vit.num_prefix_tokens
    logits, traces = [], []
    for image in images:
        x = list(vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0])
        origin, trace, fused = list(range(len(x) - prefix)), {}, False
        for index, layer in enumerate(vit.blocks):
            attention, heads = layer.attn, layer.attn.num_heads
            qkv = [attention.qkv(layer.norm1(token)).view(3, heads, -1) for token in x]
            maps, mixed = [], [[] for _ in x]
            for h in range(heads):
                q = torch.stack([attention.q_norm(t[0, h]) for t in qkv])
                k = torch.stack([attention.k_norm(t[1, h]) for t in qkv])
                v = torch.stack([t[2, h] for t in qkv])
                maps.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1))
                for n in range(len(x)):
                    mixed[n].append(maps[h][n] @ v)
            x = [token + layer.ls1(attention.proj(attention.norm(torch.cat(mixed[n])))) for n, token in enumerate(x)]
            if model.plan[index].keep_rate < 1:
                rows = [0] if vit.has_class_token else range(len(x))
                scores = sum(m[r] for m in maps for r in rows) / (heads * len(rows))
                scores = scores[prefix:].detach() if config.detach_fusion_weights else scores[prefix:]
                count = len(origin) - (config.protect_fused and fused)
                order = sorted(range(count), key=lambda i, s=scores: (-s[i].item(), i))
                kept = sorted(order[: math.ceil(model.plan[index].keep_rate * count)])
                lost = sorted(set(range(count)) - set(kept))
                patches, last = x[prefix:], x[-1]
                x = x[:prefix] + [patches[i] for i in kept]
                origin = [origin[i] for i in kept]
                if config.fuse != "none":
                    total = sum(scores[i] for i in lost) if config.fuse == "normalized" else 1
                    token = sum(scores[i] / total * patches[i] for i in lost)
                    x.append(token + last if config.protect_fused and fused else token)
                    origin.append(FUSED)
                    fused = True
                trace[index] = list(origin)
            x = [token + layer.ls2(layer.mlp(layer.norm2(token))) for token in x]
        features = vit.forward_head(vit.norm(torch.stack(x))[None], pre_logits=True)[0]
        logits.append(model.heads[task](features))
        traces.append(trace)
    return torch.stack(logits), traces


@pytest.mark.parametrize(
    "kind, trainable, tokens",
    [
        ("class-token", "all", TokensConfig()),
        ("class-token", (1, 3), TokensConfig(fuse="normalized")),
        ("class-token", (2,), TokensConfig(protect_fused=True)),
        ("class-token", (0,), TokensConfig(fuse="none")),
        ("class-token", (0,), TokensConfig(detach_fusion_weights=True)),
        ("registers", (0, 3), TokensConfig()),
        ("average-pool", (1,), TokensConfig()),
        ("layer-scale", (1,), TokensConfig()),
        ("qk-norm", "all", TokensConfig()),
    ],
)
def test_dropping_equals_plain_loops_in_logits_trace_and_gradients(kernels, kind, trainable, tokens):
    model = make_model(kind, train_blocks=trainable, tokens=tokens)
    images, labels = normal(2, 3, 16, 16), torch.tensor([1, 4])
    output = model(images, "two")
    with ops.reference():
        slow, traces = reference_logits(model, images, "two")
    torch.testing.assert_close(output.logits, slow, rtol=1e-4, atol=1e-4)
    for index in (1, 2):
        assert output.records[index].dropped.origin.tolist() == [trace[index] for trace in traces]

    F.cross_entropy(output.logits, labels).backward()
    fast = gradients(model)
    model.zero_grad()
    F.cross_entropy(slow, labels).backward()
    exact = gradients(model)
    assert (
        fast.keys()
        == exact.keys()
        == {n for n, p in model.named_parameters() if p.requires_grad and "heads." not in n}
        | {"heads.two.weight", "heads.two.bias"}
    )
    for name, gradient in fast.items():
        torch.testing.assert_close(gradient, exact[name], rtol=2e-3, atol=2e-5, msg=name)


# --- upcycled experts equal the dense network ---


@pytest.mark.parametrize("kind, router", [("class-token", "task_conditioned"), ("layer-scale", "per_task")])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_upcycled_model_equals_the_dense_one_while_dropping(kind, scale, router):
    images = normal(4, 3, 16, 16)
    dense = make_model(kind)
    routed = make_model(kind, moe_blocks=(1, 3), router=router)
    scale_routers(routed, scale)
    assert all(error < 1e-5 for error in routed.upcycling_errors.values())
    for task in CLASSES:
        expected, output = dense(images, task), routed(images, task)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert set(output.routing) == {1, 3}
        assert output.routing[1].experts.shape == (4, 1 + 8 + 1, 2)


def test_raw_gates_and_ratio_one_report_their_upcycling_error():
    for options in ({"renormalize_gates": False}, {"mlp_ratio": 1}):
        errors = make_model(moe_blocks=(1, 3), **options).upcycling_errors
        assert set(errors) == {1, 3} and all(error > 0.05 for error in errors.values())


# --- seeding: a task does not depend on the other tasks ---


def test_head_and_router_of_a_task_do_not_depend_on_the_others():
    alone = make_model(moe_blocks=(1,), classes={"two": 5})
    among = make_model(moe_blocks=(1,))
    assert torch.equal(alone.heads["two"].weight, among.heads["two"].weight)
    assert torch.equal(alone.vit.blocks[1].mlp.router.weight["two"], among.vit.blocks[1].mlp.router.weight["two"])
    assert not torch.equal(among.heads["two"].weight[:3], among.heads["one"].weight)
    images = normal(2, 3, 16, 16)
    assert torch.equal(alone(images, "two").logits, among(images, "two").logits)


def test_images_do_not_depend_on_the_rest_of_the_batch():
    model, images = make_model(moe_blocks=(1, 3)).eval(), normal(4, 3, 16, 16)
    together = model(images, "one").logits
    apart = torch.cat([model(image[None], "one").logits for image in images])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


# --- forward pass in two parts ---


@pytest.mark.parametrize("trainable", ["all", (), (2, 3), (3,)], ids=str)
def test_the_two_parts_of_the_forward_pass_equal_the_whole(trainable):
    model, images = make_model(train_blocks=trainable), normal(3, 3, 16, 16)
    tokens, records = model.forward_features(images)
    for task in CLASSES:
        whole = model(images, task)
        parts = model.forward_from(tokens, task, records=dict(records))
        assert torch.equal(whole.logits, parts.logits)
        assert set(whole.records) == set(parts.records) == {1, 2}
        for index in (1, 2):
            assert torch.equal(whole.records[index].dropped.origin, parts.records[index].dropped.origin)
    assert all(index < model.path_start for index in records)


@pytest.mark.parametrize("storage", ["exact", "recompute"])
def test_blocks_before_the_gradient_path_keep_nothing(storage):
    model, images = make_model(train_blocks=(2, 3), storage=storage), normal(3, 3, 16, 16)
    outputs = []
    assert saved_for_backward(lambda: outputs.append(model.forward_features(images))) == []
    assert model.path_start == 2 and not outputs[0][0].x.requires_grad
    model(images, "one").logits.sum().backward()
    assert {name.split(".")[2] for name in gradients(model) if "blocks" in name} == {"2", "3"}


def test_training_only_the_heads_keeps_only_the_head_input():
    model, images = make_model(train_blocks=()), normal(3, 3, 16, 16)
    saved = saved_for_backward(lambda: model(images, "one"))
    assert model.path_start == 4
    assert sum(t.numel() for t in saved if not isinstance(t, torch.nn.Parameter)) == 3 * 16
    model(images, "one").logits.sum().backward()
    assert set(gradients(model)) == {"heads.one.weight", "heads.one.bias"}


def test_a_trainable_embedding_gets_its_gradient_through_frozen_blocks():
    vit = make_vit()
    model = make_model(vit=vit, train_blocks=())
    vit.pos_embed.requires_grad_(True)
    model.embedding_trains, model.path_start = True, 0
    model(normal(2, 3, 16, 16), "one").logits.square().sum().backward()
    assert set(gradients(model)) == {"vit.pos_embed", "heads.one.weight", "heads.one.bias"}
    assert vit.pos_embed.grad.abs().sum() > 0


# --- which parameters get gradients ---


@pytest.mark.parametrize("router", ["per_task", "task_conditioned"])
def test_inactive_tasks_get_no_gradient(router):
    model = make_model(moe_blocks=(1, 3), router=router, init_noise=0.1)
    output = model(normal(2, 3, 16, 16), "two")
    (output.logits.square().sum() + output.auxiliary_loss).backward()
    with_gradient = set(gradients(model))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    others = {n for n in trained if n.startswith("heads.") and "two" not in n}
    others |= {n for n in trained if ".router.weight." in n and not n.endswith(".two")}
    assert with_gradient == trained - others and len(others) == (4 if router == "task_conditioned" else 8)


def test_frozen_routers_get_no_gradient_but_experts_do():
    model = make_model(moe_blocks=(1, 3), train_router=False)
    output = model(normal(2, 3, 16, 16), "two")
    (output.logits.square().sum() + output.auxiliary_loss).backward()
    with_gradient = set(gradients(model))
    assert not [n for n in with_gradient if ".router." in n]
    assert "vit.blocks.1.mlp.experts.fc1_weight" in with_gradient


def test_the_balance_loss_alone_gives_the_router_a_gradient():
    model = make_model(moe_blocks=(1, 3), balance_loss_weight=1.0)
    scale_routers(model, 30.0)
    output = model(normal(2, 3, 16, 16), "two")
    output.auxiliary_loss.backward()
    assert output.auxiliary_loss > 0
    assert model.vit.blocks[1].mlp.router.weight["two"].grad.abs().sum() > 0
    assert model.vit.blocks[1].mlp.router.weight["one"].grad is None


# --- statistics ---


def test_only_commit_moves_the_running_statistics():
    model, images = make_model(moe_blocks=(1, 3), balance_loss="across_tasks"), normal(2, 3, 16, 16)
    output = model(images, "two")
    (output.logits.sum() + output.auxiliary_loss).backward()
    assert model.balance.importance.eq(0).all() and model.balance.load.eq(0).all()
    model.commit(output, "two")
    torch.testing.assert_close(model.balance.importance[1].sum(-1), torch.ones(2))
    for layer, index in enumerate((1, 3)):
        load = output.routing[index].load
        torch.testing.assert_close(model.balance.load[1, layer], load / load.sum())
    assert model.balance.load[[0, 2]].eq(0).all()
    make_model().commit(make_model()(images, "one"), "one")  # no statistics to update, and no error


def test_gate_noise_differs_between_blocks_and_follows_its_key():
    model, images = make_model(moe_blocks=(1, 3), gate_noise=4.0).train(), normal(2, 3, 16, 16)
    outputs = [model(images, "one", noise_key=key) for key in [(0, 1, 0), (0, 1, 0), (0, 2, 0)]]
    same, other = (
        [torch.equal(outputs[0].routing[i].probabilities, o.routing[i].probabilities) for i in (1, 3)]
        for o in outputs[1:]
    )
    assert same == [True, True] and other == [False, False]
    flat = make_model(moe_blocks=(1, 3), gate_noise=4.0).train()
    scale_routers(flat, 0.0)
    routing = flat(images, "one", noise_key=(0, 1, 0)).routing
    first, second = (routing[i].probabilities for i in (1, 3))
    assert not torch.equal(first[:, :6], second[:, :6])
    model.eval()
    assert torch.equal(model(images, "one").logits, model(images, "one", noise_key=(0, 9, 9)).logits)


# --- any shape ---


@pytest.mark.parametrize("experts, top_k, tasks", [*itertools.product([1, 5], [1, 5], [1, 3])])
def test_any_number_of_experts_and_tasks(experts, top_k, tasks):
    if top_k > experts:
        with pytest.raises(ConfigError, match="moe.top_k"):
            make_model(moe_blocks=(1,), top_k=top_k)
        return
    classes = dict(list(CLASSES.items())[:tasks])
    vit = make_vit()
    config = Config(
        moe=MoEConfig(num_experts=experts, top_k=top_k, renormalize_gates=top_k > 1, balance_loss="across_tasks"),
        plan=PlanConfig(train_blocks=[1], drop_blocks=[1], moe_blocks=[1]),
    )
    model = MultitaskViT(vit, config, classes)
    output = model(normal(1, 3, 16, 16), "one")
    (output.logits.sum() + output.auxiliary_loss).backward()
    assert output.logits.shape == (1, 3)
    assert all(g.isfinite().all() for g in gradients(model).values())
    assert isinstance(model.vit.blocks[1].mlp, MoE) and copy.deepcopy(model).tasks == list(classes)


def test_task_names_that_are_attributes_of_torch_modules_are_refused():
    with pytest.raises(ConfigError, match="tasks = .'half', 'train'.: attributes of torch modules"):
        make_model(classes={"half": 2, "fine": 3, "train": 2})


@pytest.mark.parametrize("head_blocks", [[0, 1], [0, 2], [2, 3]], ids=str)
def test_class_tokens_that_heads_read_are_read_on_every_path_to_the_logits(head_blocks):
    """In the whole forward pass, per task from the tokens of frozen blocks, and in the ablation of one expert."""
    plan = PlanConfig(train_blocks=[2, 3], drop_blocks=[], moe_blocks=[3], head_blocks=head_blocks)
    model = MultitaskViT(make_vit(), Config(plan=plan, moe=MoEConfig(num_experts=4, top_k=2)), CLASSES).eval()
    images = normal(3, 3, 16, 16)
    with torch.no_grad():
        expected = model(images, "two").logits
        tokens, _ = model.forward_features(images)
        assert torch.equal(model.classify(model.features_from(tokens, "two"), "two"), expected)
        assert torch.equal(model.forward_from(tokens, "two").logits, expected)
        assert torch.equal(_first_pass(model, images, "two")[1], expected)


@pytest.mark.parametrize("storage", ["exact", "segments", "recompute"])
def test_heads_that_read_blocks_of_the_gradient_path_send_gradients_into_them(storage):
    """The logits and all gradients equal those of a plain loop over the blocks, with autograd's own indexing."""
    plan = PlanConfig(train_blocks=[1, 3], drop_blocks=[2], moe_blocks=[3], head_blocks=[0, 1, 2, 3])
    moe = MoEConfig(num_experts=4, top_k=2, balance_loss="none")
    config, images = Config(plan=plan, moe=moe, storage=storage), normal(3, 3, 16, 16)
    model, slow = (MultitaskViT(make_vit(), config, CLASSES) for _ in range(2))
    logits = model(images, "two").logits
    with ops.reference():
        tokens, read = slow.forward_features(images, upto=0)[0], []
        for index in range(4):
            tokens = slow.run_block(index, tokens, "two")
            read.append(tokens.x[:, 0])
        expected = slow.heads["two"](torch.cat([slow.vit.norm(tokens.x)[:, 0], *read], 1))
    assert torch.allclose(logits, expected, atol=1e-5)
    for result in (logits, expected):
        (result * normal(*logits.shape, seed=1)).sum().backward()
    got, expected = gradients(model), gradients(slow)
    assert got.keys() == expected.keys() and {name.split(".")[2] for name in got if "blocks" in name} == {"1", "3"}
    assert all(torch.allclose(got[name], expected[name], atol=1e-4) for name in got)
