"""Test that transforms agree with Pillow and that augmentation depends only on the image's name; test the loader."""

import threading

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from moe_bsr.data import ImageTransforms, Loader, Split, TaskData, TaskSpec
from moe_bsr.data.transforms import crop_box

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pixels:
    """Source of smooth random images of given sizes, which counts how often each one is decoded."""

    class_names = ["a", "b", "c"]
    names = sizes = None

    def __init__(self, sizes: list[tuple[int, int]]):
        rng = np.random.default_rng(0)
        self.labels = np.arange(len(sizes)) % 3
        self.decoded = np.zeros(len(sizes), dtype=int)
        self.pixels = []
        for width, height in sizes:
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            noise = rng.integers(-9, 10, (height, width, 3))
            smooth = np.asarray(coarse.resize((width, height)), dtype=int)
            self.pixels.append(np.clip(smooth + noise, 0, 255).astype(np.uint8))

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        self.decoded[i] += 1
        return self.pixels[i]


def task(name="dots", sizes=((40, 30),) * 12, **keys) -> TaskData:
    source = Pixels(list(sizes))
    index = np.arange(len(source))[::-1].copy()
    split = Split(source, index, source.labels[index])
    spec = TaskSpec(name=name, title=name, **keys)
    return TaskData(
        name=name, title=name, class_names=source.class_names, train=split, val=split, test=split,
        origin="test", spec=spec,
    )  # fmt: skip


def make_transforms(**fields) -> ImageTransforms:
    return ImageTransforms(**{"size": 24, "mean": MEAN, "std": STD, **fields})


def as_rows(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy().astype(int)


def close(ours, expected) -> None:
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 2 and difference.mean() < 0.5


SIZES = [(40, 30), (30, 41), (100, 37), (24, 24), (65, 65), (200, 150), (20, 90)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0, 0.875])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_evaluation_equals_the_transform_of_timm(interpolation, crop_pct, crop_mode):
    data = task(sizes=SIZES)
    how = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    theirs = timm.data.create_transform((3, 32, 32), mean=MEAN, std=STD, normalize=False, **how)
    ours = make_transforms(size=32, **how)
    (images, labels), = ours.eval_batches(data, "test", 50)  # fmt: skip
    assert images.dtype == torch.uint8 and images.shape == (len(SIZES), 3, 32, 32)
    assert labels.tolist() == data.test.labels.tolist()
    for image, index in zip(as_rows(images), data.test.index, strict=True):
        picture = Image.fromarray(data.test.source.pixels[index])
        if picture.size != (24, 24):  # small squares are not cropped: see the next test
            close(image, theirs(picture).permute(1, 2, 0))


@pytest.mark.parametrize("size, resize", [((64, 64), "timm"), ((90, 30), "squash")])
def test_small_squares_and_squashing_use_the_whole_image(size, resize):
    picture = Image.fromarray(Pixels([size]).pixels[0])
    image = make_transforms(resize=resize).eval_image(picture)
    expected = picture.resize((24, 24), Image.Resampling.BICUBIC)
    close(image.permute(1, 2, 0), expected)


def test_one_image_and_a_batch_give_the_same_pixels():
    data, transforms = task(sizes=SIZES), make_transforms()
    batches = list(transforms.eval_batches(data, "val", 3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert not list(transforms.eval_batches(data, "val", 3, range(0)))  # with few batches, a process may have none
    images = torch.cat([images for images, _ in batches])
    for image, index in zip(images, data.val.index, strict=True):
        alone = transforms.eval_image(Image.fromarray(data.val.source.pixels[index]))
        assert torch.equal(image, alone)


def test_training_crops_equal_pillow_on_the_same_box(monkeypatch):
    boxes = []

    def spy(*arguments):
        boxes.append(crop_box(*arguments))
        return boxes[-1]

    monkeypatch.setattr("moe_bsr.data.transforms.crop_box", spy)
    data = task(sizes=SIZES, flip=False)
    images, labels = make_transforms().train_batch(data, np.arange(7), np.zeros(7, dtype=int))
    assert labels.tolist() == data.train.labels.tolist() and len(boxes) == 7
    for image, index, (top, left, height, width) in zip(as_rows(images), data.train.index, boxes, strict=True):
        crop = data.train.source.pixels[index][top : top + height, left : left + width]
        close(image, Image.fromarray(crop).resize((24, 24), Image.Resampling.BICUBIC))


def test_crop_boxes_have_the_distribution_of_torchvision():
    rng, torchs = np.random.default_rng(0), torch.empty(3, 60, 90)
    torch.manual_seed(0)
    crop = RandomResizedCrop.get_params
    theirs = np.array([crop(torchs, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    ours = np.array([crop_box(60, 90, (0.3, 1.0), rng.random(22)) for _ in range(4000)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 60).all() and (ours[:, 1] + ours[:, 3] <= 90).all()
    for column in range(4):
        quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
        difference = np.quantile(ours[:, column], quantiles) - np.quantile(theirs[:, column], quantiles)
        assert np.abs(difference).max() <= 2.5


@pytest.mark.parametrize("size, box", [((100, 10), (0, 44, 10, 13)), ((10, 100), (44, 0, 13, 10))])
def test_when_no_crop_fits_the_center_is_taken(size, box):
    top, left, height, width = crop_box(size[1], size[0], (1.0, 1.0), np.random.rand(22))
    assert (height, width) == box[2:] and abs(top - box[0]) <= 1 and abs(left - box[1]) <= 1


def test_flip_mirrors_half_and_changes_nothing_else():
    data, positions, zeros = task(sizes=((40, 30),) * 60), np.arange(60), np.zeros(60, dtype=int)
    plain, _ = make_transforms(flip=False).train_batch(data, positions, zeros)
    mirrored, _ = make_transforms(flip=True).train_batch(data, positions, zeros)
    flipped = 0
    for a, b in zip(plain, mirrored, strict=True):
        assert torch.equal(a, b) or torch.equal(a.flip(2), b)
        flipped += not torch.equal(a, b)
    assert 15 < flipped < 45


POLICY = {"auto_augment": "rand-m9-mstd0.5", "color_jitter": 0.4, "erasing": 0.5}


@pytest.mark.parametrize("policy", [{}, POLICY])
def test_augmentation_depends_only_on_seed_task_image_and_epoch(policy):
    data, transforms, epochs = task(), make_transforms(seed=3, **policy), np.zeros(12, dtype=int)
    whole, labels = transforms.train_batch(data, np.arange(12), epochs)
    order = np.random.default_rng(0).permutation(12)
    for part in (order[:5], order[5:]):
        images, some = make_transforms(seed=3, **policy).train_batch(data, part, epochs[: len(part)])
        assert torch.equal(images, whole[part]) and torch.equal(some, labels[part])
    mixed, _ = transforms.train_batch(data, np.array([4, 4, 4]), np.array([0, 1, 0]))
    assert torch.equal(mixed[0], whole[4]) and torch.equal(mixed[2], whole[4])
    assert not torch.equal(mixed[1], whole[4])
    other_seed, _ = make_transforms(seed=4, **policy).train_batch(data, np.arange(12), epochs)
    other_task, _ = transforms.train_batch(task("lines"), np.arange(12), epochs)
    assert not torch.equal(other_seed, whole) and not torch.equal(other_task, whole)


def test_augmentation_follows_the_image_and_not_its_position():
    data = task()
    half = np.arange(6)
    fewer = TaskData(**{**vars(data), "train": Split(
        data.train.source, data.train.index[::2], data.train.labels[::2]
    )})  # fmt: skip
    expected, _ = make_transforms().train_batch(data, 2 * half, half)
    assert torch.equal(make_transforms().train_batch(fewer, half, half)[0], expected)


def test_crop_scale_comes_from_the_task_unless_overridden():
    data = task(sizes=((48, 36),) * 12, crop_scale=(0.05, 0.05), flip=False)
    arguments = (np.arange(12), np.zeros(12, dtype=int))
    own, _ = make_transforms().train_batch(data, *arguments)
    same, _ = make_transforms(crop_scale=(0.05, 0.05), flip=False).train_batch(data, *arguments)
    wider, _ = make_transforms(crop_scale=(0.9, 1.0)).train_batch(data, *arguments)
    assert torch.equal(own, same) and not torch.equal(own, wider)


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    expected = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    before = images.clone()
    torch.testing.assert_close(make_transforms().normalize(images), expected, rtol=0, atol=1e-5)
    assert torch.equal(images, before)


def test_images_are_decoded_once_within_the_cap():
    image_mb = 40 * 30 * 3 / 1e6
    for cache_mb, again in ((1, 0), (5.5 * image_mb, 7), (0, 12)):
        data, transforms = task(), make_transforms(cache_mb=cache_mb)
        for epoch in range(4):
            transforms.train_batch(data, np.arange(12), np.full(12, epoch))
        assert data.train.source.decoded.sum() == 12 + 3 * again
        assert transforms._cache.bytes_used <= cache_mb * 1e6


@pytest.mark.parametrize(
    "fields",
    [
        {"interpolation": "lanczos"},
        {"resize": "letterbox"},
        {"crop_pct": 1.2},
        {"crop_mode": "random"},
        {"unreadable": "ask"},
        {"crop_scale": (0, 1)},
    ],
)
def test_invalid_fields_are_refused_by_name(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        make_transforms(**fields)


def test_unknown_split():
    with pytest.raises(ValueError, match="train, val or test"):
        next(make_transforms().eval_batches(task(), "valid", 4))


def test_without_augmentation_training_images_equal_evaluation_images():
    data = task("dots", sizes=SIZES)
    transforms = make_transforms(augment=False)
    expected = torch.cat([images for images, _ in transforms.eval_batches(data, "train", 3)])
    positions = np.arange(len(data.train))
    for epoch in (0, 5):
        images, _ = transforms.train_batch(data, positions, np.full(len(positions), epoch))
        assert torch.equal(images, expected)


def plan(steps=10):
    rng = np.random.default_rng(0)
    for step in range(steps):
        yield ("dots", "lines")[step % 2], rng.integers(0, 12, 4), rng.integers(0, 3, 4)


TASKS = {"dots": task("dots"), "lines": task("lines", sizes=SIZES * 2)}


@pytest.mark.parametrize("prefetch", [1, 2, 20])
def test_batches_are_the_same_for_any_prefetch(prefetch):
    expected = list(Loader(TASKS, make_transforms(), plan()))
    got = list(Loader(TASKS, make_transforms(), plan(), prefetch))
    assert [batch.task for batch in got] == ["dots", "lines"] * 5
    for ours, theirs in zip(got, expected, strict=True):
        assert np.array_equal(ours.positions, theirs.positions)
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_with_cached_features_have_no_images(prefetch):
    whole = list(Loader(TASKS, make_transforms(), plan()))
    for ours, theirs in zip(
        Loader(TASKS, make_transforms(), plan(), prefetch, lambda task, *_: task == "dots"), whole, strict=True
    ):
        assert ours.images is None if ours.task == "dots" else torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_an_error_is_raised_at_its_batch_and_the_thread_ends(prefetch):
    def broken():
        yield from plan(2)
        raise KeyError("plan broke")

    batches = iter(Loader(TASKS, make_transforms(), broken(), prefetch))
    next(batches), next(batches)
    with pytest.raises(KeyError, match="plan broke"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name == "loader"]


def test_stopping_early_ends_the_thread_and_reads_no_further():
    read = []

    def endless():
        while True:
            read.append(0)
            yield "dots", np.arange(4), np.zeros(4, dtype=int)

    for _ in Loader(TASKS, make_transforms(), endless(), prefetch=2):
        if len(read) >= 3:
            break
    assert len(read) <= 5
    assert not [t for t in threading.enumerate() if t.name == "loader"]


def test_the_thread_does_not_change_the_number_of_compute_threads():
    before = torch.get_num_threads()
    inside, later = [], []

    def watch():
        inside.append(torch.get_num_threads())
        yield from plan(2)

    torch.set_num_threads(2)
    try:
        for _ in Loader(TASKS, make_transforms(), watch(), prefetch=1):
            assert torch.get_num_threads() == 2
            fresh = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            fresh.start()
            fresh.join()
    finally:
        torch.set_num_threads(before)
    assert inside == [1] and later == [2, 2]


def test_negative_prefetch():
    with pytest.raises(ValueError, match="prefetch"):
        Loader(TASKS, make_transforms(), plan(), -1)
