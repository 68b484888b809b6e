"""Train the bundled backbone to predict the classes of generated images, and the edges inside each patch."""

import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import VisionTransformer
from tqdm import tqdm

from moe_bsr.data.generated import Generated

ARCHITECTURE = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 12, "num_heads": 4, "mlp_ratio": 4.0}
MEAN, STD = [0.5] * 3, [0.5] * 3
PATCHES = 64
REDRAWN = 0.2  # share of the pool that is replaced after each pass
WEIGHT_DECAY = 0.05


def draw(source, start, count):
    """Return `count` images from number `start` on, uint8 (count, 3, 64, 64), and their labels, int64 (count,)."""
    chosen = np.arange(start, start + count)
    bar = tqdm(chosen, desc="draw", leave=False, disable=None)
    images = torch.from_numpy(np.stack([source.image(i) for i in bar]))
    return images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(source.labels[chosen])


def crop(images, generator):
    """Take one random crop per image (60 to 100 % of the area), and normalize it: uint8 to float32."""
    area, aspect, x, y = torch.rand(4, len(images), generator=generator)
    side, ratio = (0.6 + 0.4 * area).sqrt(), torch.exp((aspect - 0.5) * math.log(4 / 3))
    wide, high = (side * ratio).clamp(max=1), (side / ratio).clamp(max=1)
    rows = [wide, 0 * x, (2 * x - 1) * (1 - wide), 0 * y, high, (2 * y - 1) * (1 - high)]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    images = (images / 255 - mean) / std
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def edges(images):
    """Return the targets of the patch tokens: edge strength and direction in 2 x 2 cells, (B, patches, 12)."""
    gray = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    x = gray[:, :, 1:-1, 2:] - gray[:, :, 1:-1, :-2]
    y = gray[:, :, 2:, 1:-1] - gray[:, :, :-2, 1:-1]
    size = (x.square() + y.square() + 1e-6).sqrt()
    maps = torch.cat((size, (x * x - y * y) / size, 2 * x * y / size), 1)  # strength, cos and sin of twice the angle
    maps = maps / size.mean((1, 2, 3), keepdim=True)
    return F.pixel_unshuffle(F.avg_pool2d(maps, 4).clamp(-4, 4), 2).flatten(2).transpose(1, 2)


def tokens_of(model, images, keep):
    """Return the normalized tokens of the patches with indices `keep`, class token first: (B, 1 + len(keep), dim)."""
    patches = (model.patch_embed(images) + model.pos_embed[:, 1:])[:, keep]
    first = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
    return model.norm(model.blocks(torch.cat((first, patches), 1)))


def optimizers(model, edge_head, lr):
    """Return Muon for the matrices of the blocks, and AdamW for the rest. Only matrices have weight decay."""
    inner = [p for p in model.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in inner}
    rest = [p for p in (*model.parameters(), *edge_head.parameters()) if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim in (2, 4)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in rest if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    return (
        torch.optim.Muon(inner, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True),
    )


def save(model, path, source):
    state = {k: v.half() for k, v in model.state_dict().items() if not k.startswith("head")}
    described = {"architecture": ARCHITECTURE, "mean": MEAN, "std": STD}
    metadata = {key: json.dumps(value) for key, value in described.items()} | {"source": source}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(state, part, metadata)
    part.chmod(0o644)
    part.replace(path)


def pretrain(options, command):
    """Train and write the backbone.

    Args:
        options: out (path), images, pool, batch, lr, seed, threads: the arguments of `moe-bsr pretrain`.
        command: the command line, for the metadata of the file.
    """
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    source = Generated("source", "pretrain", 2 * options.pool + 2 * options.images, options.seed)
    classes = len(source.class_names)
    model = VisionTransformer(**ARCHITECTURE, num_classes=classes, weight_init="jax")
    for block in model.blocks:
        block.attn.fused_attn = False  # the backward pass of plain attention is much faster on the CPU here
    edge_head = torch.nn.Linear(model.embed_dim, 12)
    steppers = optimizers(model, edge_head, options.lr)

    images, labels = draw(source, 0, options.pool)
    drawn, fresh, seen = options.pool, int(REDRAWN * options.pool), 0
    begin = saved = time.monotonic()
    order, report, average = [], 0, math.log(classes)
    while seen < options.images:
        if not order:
            if seen:
                place = torch.randperm(options.pool, generator=generator)[:fresh]
                images[place], labels[place] = draw(source, drawn, fresh)
                drawn += fresh
            order = list(torch.randperm(options.pool, generator=generator).split(options.batch))
            order.reverse()
        chosen = order.pop()
        progress = seen / options.images
        rate = options.lr * min(progress / 0.03, 1) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in (group for stepper in steppers for group in stepper.param_groups):
            group["lr"] = rate

        kept = PATCHES // 2 if progress < 0.9 else PATCHES
        keep = torch.randperm(PATCHES, generator=generator)[:kept]
        batch = crop(images[chosen], generator)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = tokens_of(model, batch, keep)
            logits, guess = model.head(tokens[:, 0]), edge_head(tokens[:, 1:])
        class_loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
        edge_loss = F.mse_loss(guess.float(), edges(batch)[:, keep])
        for stepper in steppers:
            stepper.zero_grad()
        (class_loss + edge_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()

        seen += len(chosen)
        average += 0.02 * (class_loss.item() - average)
        if seen >= report:
            report += options.images // 50
            speed = seen / (time.monotonic() - begin)
            losses = f"class loss {average:.3f}  edge loss {edge_loss.item():.3f}"
            print(f"{progress:6.1%}  {seen} images  {losses}  {speed:.0f} images/s", flush=True)
        if time.monotonic() - saved > 120:
            saved = time.monotonic()
            save(model, options.out, f"unfinished: {seen} images seen")
    said = f"{classes} classes of generated images, {seen} seen, {drawn} drawn"
    save(model, options.out, f"{said}: {command}")
    print(f"wrote {options.out}")
