"""Data sets: what is loaded, how it is split, what each image draws, and what is refused."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from anybatch import data
from anybatch.data import Files, Images, Part, collate, load, load_image, parse_data, sets
from anybatch.data.images import _reported, fit, shift_flip
from anybatch.data.portions import balanced, set_aside
from anybatch.recipe import Data

REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _nothing_kept():
    data._loaded.clear()


def save(path: Path, color: int | tuple[int, int, int], size: tuple[int, int] = (12, 12)) -> Path:
    """An image of one colour; ``size`` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(color, int) else "RGB", size, color).save(path)
    return path


def folders(root: Path, parts: tuple[str, ...] = ("train", "val"), each: int = 4) -> Path:
    """Class folders cat (dark) and dog (bright), ``each`` PNG images in each; part "." is the root itself."""
    for k, part in enumerate(parts):
        for label, name in enumerate(("cat", "dog")):
            for i in range(each):
                save(root / part / name / f"{i}.png", (100 * label + 10 * i + k, 0, 0))
    return root


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def some_arrays(n: int = 20, shape: tuple[int, ...] = (6, 6, 3), classes: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.integers(0, 256, (n, *shape), dtype=np.uint8), "y": np.arange(n) % classes}


def everything(images: Images) -> torch.Tensor:
    return images.__getitems__(range(len(images)))[0]


# Images


def test_values_by_hand():
    x = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(1, 1, 2, 2)
    images = Images(x, torch.tensor([3]), size=2, mean=(0.2,), std=(0.4,))
    got, label = images[0]
    assert label == 3
    torch.testing.assert_close(got, torch.tensor([[[-0.5, 0.0], [2.0, 0.5]]]))


def test_a_batch_is_its_images_one_by_one():
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    images = Images(x, torch.arange(5), size=4, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    x_b, y_b = images.__getitems__([4, 0, 4])
    assert x_b.dtype == torch.float32
    assert y_b.dtype == torch.int64
    assert y_b.tolist() == [4, 0, 4]
    torch.testing.assert_close(x_b, torch.stack([images[4][0], images[0][0], images[4][0]]))


def test_float_images_come_back_as_they_are():
    x = torch.randn(3, 1, 2, 2)
    images = Images(x, torch.zeros(3, dtype=torch.int64), size=2, mean=(0.0,), std=(1.0,))
    assert torch.equal(everything(images), x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shift_and_flip_are_padding_by_reflection_and_cropping(dtype):
    x = torch.randint(0, 256, (16, 2, 5, 5)).to(dtype)
    torch.manual_seed(3)
    got = shift_flip(x, 2, flip=True)
    torch.manual_seed(3)
    moves, coins = torch.randint(-2, 3, (2, 16, 1)), torch.rand(16, 1) < 0.5
    padded = torch.nn.functional.pad(x.float(), (2, 2, 2, 2), mode="reflect").to(dtype)
    for i in range(16):
        top, left = (2 + moves[:, i, 0]).tolist()
        expected = padded[i, :, top : top + 5, left : left + 5]
        assert torch.equal(got[i], expected.flip(2) if coins[i] else expected)
    assert 0 < coins.sum() < 16


def test_shift_by_hand(monkeypatch):
    row = torch.tensor([[1, 2, 3]]).expand(3, 3)[None, None]
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor([[[0]], [[-1]]]))
    assert shift_flip(row, 1, flip=False)[0, 0, 0].tolist() == [2, 1, 2]
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor([[[0]], [[1]]]))
    assert shift_flip(row, 1, flip=False)[0, 0, 0].tolist() == [2, 3, 2]


@pytest.mark.parametrize(
    ("augment", "stored"), [(("crop",), 8), (("flip",), 8), (("randaugment",), 8), (("crop",), 12)], ids=str
)
def test_each_image_of_a_batch_draws_its_own_augmentation(augment, stored):
    one = torch.randint(0, 256, (1, 3, stored, stored), dtype=torch.uint8)
    images = Images(
        one.expand(32, -1, -1, -1),
        torch.zeros(32, dtype=torch.int64),
        size=8,
        mean=(0,) * 3,
        std=(1,) * 3,
        augment=augment,
    )
    torch.manual_seed(0)
    first = everything(images)
    assert first.shape == (32, 3, 8, 8)
    assert len({tuple(x.flatten().tolist()) for x in first}) > 1
    assert not torch.equal(first, everything(images))
    torch.manual_seed(0)
    assert torch.equal(first, everything(images))


def test_a_flip_happens_to_half_of_the_images():
    x = torch.tensor([0, 255], dtype=torch.uint8).expand(2000, 1, 2, 2)
    torch.manual_seed(0)
    images = Images(x, torch.zeros(2000, dtype=torch.int64), size=2, mean=(0,), std=(1,), augment=("flip",))
    flipped = everything(images)[:, 0, 0, 0].mean()
    assert abs(flipped - 0.5) < 4 * 0.5 / 2000**0.5


def test_evaluation_and_plain_training_draw_no_random_numbers():
    split = load(Data(augment=("crop", "flip"), val_size=20))
    before = torch.get_rng_state()
    assert torch.equal(everything(split.val), everything(split.val))
    everything(load(Data()).train)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loader_passes_whole_batches_through():
    split = load(Data(train_size=20))
    x, y = next(iter(DataLoader(split.train, 8, collate_fn=collate)))
    assert torch.equal(x, everything(split.train)[:8])
    assert torch.equal(y, split.train.labels[:8])
    x, _ = next(iter(DataLoader(Subset(split.train, [5, 3]), 2, collate_fn=collate)))
    assert torch.equal(x, everything(split.train)[[5, 3]])
    with pytest.raises(IndexError):
        split.train[20]


def test_images_can_be_sent_to_other_processes():
    split = load(Data(train_size=20, augment=("crop",)))
    copy = pickle.loads(pickle.dumps(split))
    assert torch.equal(everything(copy.val), everything(split.val))


def test_images_refuse_what_does_not_fit():
    grey, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must be one for each of the 2 images, got 1"):
        Images(grey, labels[:1], size=8, mean=(0,), std=(1,))
    with pytest.raises(ValueError, match=r"images are 8 pixels high.*must be size=6"):
        Images(grey, labels, size=6, mean=(0,), std=(1,))
    with pytest.raises(ValueError, match=r"images are 8 pixels high"):
        Images(grey, labels, size=9, mean=(0,), std=(1,), augment=("crop",))
    with pytest.raises(ValueError, match=r"'crop' needs images of at least 2 pixels"):
        Images(grey[:, :, :1, :1], labels, size=1, mean=(0,), std=(1,), augment=("crop",))
    with pytest.raises(ValueError, match=r"'randaugment' needs images of whole numbers"):
        Images(grey.float(), labels, size=8, mean=(0,), std=(1,), augment=("randaugment",))
    with pytest.raises(ValueError, match=r"'randaugment' needs 1 or 3 channels, the images have 4"):
        Images(grey.expand(2, 4, 8, 8), labels, size=8, mean=(0,) * 4, std=(1,) * 4, augment=("randaugment",))


# Image files


def test_load_image_by_hand(tmp_path):
    path = tmp_path / "wide.png"
    array = np.zeros((2, 6, 3), np.uint8)
    array[:, 2:4] = (10, 20, 30)  # the central square
    Image.fromarray(array).save(path)
    got = load_image(path, 2, 3)
    assert got.dtype == torch.uint8
    assert got.tolist() == [[[v, v], [v, v]] for v in (10, 20, 30)]
    assert load_image(path, 1, 3).shape == (3, 1, 1)
    assert load_image(save(tmp_path / "tall.png", 7, (4, 9)), 5, 1).unique().tolist() == [7]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".ppm"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_load_image_reads_many_formats(tmp_path, suffix, in_chans):
    path = save(tmp_path / f"a{suffix}", (120, 120, 120), (20, 16))
    got = load_image(path, 8, in_chans)
    assert got.shape == (in_chans, 8, 8)
    assert (got.int() - 120).abs().max() <= 2


def test_load_image_obeys_the_orientation_tag(tmp_path):
    array = np.zeros((8, 8, 3), np.uint8)
    array[:4] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    got = load_image(tmp_path / "a.png", 8, 3)
    assert int(got[0, 0, 0]) == 0
    assert int(got[0, 7, 0]) == 255


def test_load_image_of_a_large_jpeg_is_close_to_full_decoding(tmp_path):
    ramp = np.linspace(0, 255, 512).round().astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp, (512, 512)).copy()).save(tmp_path / "a.jpg", quality=95)
    got = load_image(tmp_path / "a.jpg", 16, 1).float()
    expected = torch.from_numpy(ramp.reshape(16, 32).mean(1)).float().expand(16, 16)
    assert (got[0] - expected).abs().max() < 4


def test_load_image_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read image .*none\.png: .*No such file"):
        load_image(tmp_path / "none.png", 8, 3)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read image .*text\.png: cannot identify"):
        load_image(tmp_path / "text.png", 8, 3)
    whole = save(tmp_path / "a.jpg", (1, 2, 3), (64, 64)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read image .*cut\.jpg"):
        load_image(tmp_path / "cut.jpg", 8, 3)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: it has more than 8 bits a channel"):
        load_image(tmp_path / "deep.png", 8, 3)
    with pytest.raises(ValueError, match=r"in_chans must be 1 \(grey\) or 3 \(RGB\) to read image files, got 2"):
        load_image(tmp_path / "a.jpg", 8, 2)


def test_fit_keeps_images_that_fit_and_keeps_their_dtype():
    x = torch.rand(3, 1, 4, 4)
    assert fit(x, 4) is x
    assert fit(x, 2).dtype == torch.float32
    small = fit(torch.full((2, 3, 4, 10), 9, dtype=torch.uint8), 8)
    assert small.shape == (2, 3, 8, 8)
    assert small.unique().tolist() == [9]


# Portions


def test_balanced_takes_the_same_of_each_class_and_fills_up_from_the_larger_ones():
    labels = torch.tensor([0] * 2 + [1] * 5 + [2] * 9)
    chosen, rest = balanced(labels, 9, torch.Generator().manual_seed(0))
    assert labels[chosen].bincount().tolist() == [2, 4, 3]
    assert sorted(chosen.tolist() + rest.tolist()) == list(range(16))
    more, _ = balanced(labels, 12, torch.Generator().manual_seed(0))
    assert set(chosen.tolist()) < set(more.tolist())


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_set_aside_takes_its_share_of_each_class(fraction):
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 50 + [3])
    part = Part(torch.arange(81).reshape(81, 1, 1, 1), labels)
    stays, aside = set_aside(part, fraction, 0)
    assert abs(len(aside.labels) - fraction * 81) <= 0.5
    assert sorted(stays.images[:, 0, 0, 0].tolist() + aside.images[:, 0, 0, 0].tolist()) == list(range(81))
    for label, n in enumerate((10, 20, 50)):
        assert abs(int((aside.labels == label).sum()) - fraction * n) <= 1
    assert 3 in stays.labels
    assert torch.equal(aside.labels, labels[aside.images[:, 0, 0, 0]])


def test_set_aside_refuses_when_nothing_may_go():
    part = Part(torch.zeros(3, 1, 1, 1), torch.arange(3))
    with pytest.raises(ValueError, match=r"no image can be set aside.*one image a class \(3 in all\)"):
        set_aside(part, 0.5, 0)


# Digits


def test_digits_by_default():
    split = load(Data())
    assert (len(split.train), len(split.val), split.size, split.in_chans) == (512, 1285, 8, 1)
    assert split.classes == tuple("0123456789")
    assert (split.mean, split.std) == ((0.0,), (1.0,))
    assert "exposure" in split.note
    counts = split.train.labels.bincount()
    assert counts.min() == 51
    assert counts.max() == 52


def test_digits_are_the_images_times_a_contrast_plus_a_shift():
    from sklearn.datasets import load_digits

    source = load_digits()
    raw = (source.images - source.images.mean()) / source.images.std()
    whole = sets.digits(Data(seed=4))
    assert whole.val is not None
    x = torch.cat([whole.train.images[:], whole.val.images[:]]).double().flatten(1)
    y = torch.cat([whole.train.labels, whole.val.labels])
    raw = torch.from_numpy(raw).flatten(1)

    def shape(v: torch.Tensor) -> torch.Tensor:  # what contrast and shift leave
        v = v - v.mean(1, keepdim=True)
        return v / v.norm(dim=1, keepdim=True)

    nearest = (shape(x) @ shape(raw).T).max(1)
    assert nearest.values.min() > 1 - 1e-9
    assert torch.equal(y, torch.from_numpy(source.target)[nearest.indices])
    contrast = x.std(1) / raw[nearest.indices].std(1)
    shift = x.mean(1) - contrast * raw[nearest.indices].mean(1)
    assert -1.5 < contrast.log().min() < -1.4
    assert 1.4 < contrast.log().max() < 1.5
    assert -2 < shift.min() < -1.9
    assert 1.9 < shift.max() < 2
    assert abs(np.corrcoef(contrast.log(), shift)[0, 1]) < 0.1


def rows_of(images: Images) -> set[tuple[float, ...]]:
    return {tuple(x.flatten().tolist()) for x in everything(images)}


def test_digits_are_decided_by_their_seed():
    first = load(Data(seed=1))
    data._loaded.clear()
    again = load(Data(seed=1))
    assert torch.equal(everything(first.train), everything(again.train))
    assert not torch.equal(everything(first.train), everything(load(Data(seed=2)).train))
    assert not rows_of(first.train) & rows_of(first.val)
    assert len(rows_of(first.train) | rows_of(first.val)) == 1797
    # an image's exposure does not depend on how many are chosen
    other = load(Data(seed=1, train_size=100))
    assert rows_of(other.train) < rows_of(first.train)


def test_digits_in_portions():
    split = load(Data(train_size=100, val_size=50))
    assert split.train.labels.bincount().tolist() == [10] * 10
    assert split.val.labels.bincount().tolist() == [5] * 10
    assert everything(load(Data(size=16, train_size=20, val_size=20)).train).shape == (20, 1, 16, 16)


def test_val_fraction_and_holdout_never_look_at_the_evaluation_images():
    whole = load(Data(train_size=200))
    for config in (Data(train_size=200, val_fraction=0.25), Data(train_size=200, holdout=0.25, val_size=600)):
        split = load(config)
        assert (len(split.train), len(split.val)) == (150, 50)
        assert rows_of(split.train) | rows_of(split.val) == rows_of(whole.train)
        assert not rows_of(split.train) & rows_of(split.val)
        assert split.val.labels.bincount().tolist() == [5] * 10


def test_refusals_of_any_data_set():
    with pytest.raises(ValueError, match=r"unknown data set 'digit'; did you mean digits\?"):
        load(Data(name="digit"))
    with pytest.raises(ValueError, match=r"data.batch_size=65 is larger than the 64 training images"):
        load(Data(train_size=64, batch_size=65))
    with pytest.raises(ValueError, match=r"data.train_size=1797 is more than the 1796 training images"):
        load(Data(train_size=1797))
    with pytest.raises(ValueError, match=r"data.val_size=1286 is more than the 1285 evaluation images"):
        load(Data(val_size=1286))
    with pytest.raises(ValueError, match=r"the 9 training images leave out class 9; use more images"):
        load(Data(train_size=9))
    with pytest.raises(ValueError, match=r"'randaugment' needs images of whole numbers"):
        load(Data(augment=("randaugment",)))
    with pytest.raises(ValueError, match=r"the images have 1 channel, the model was trained on 2"):
        load(Data(), statistics=((0, 0), (1, 1)))


def test_load_reads_once_and_keeps_two(monkeypatch):
    calls = []
    digits = data.DATASETS["digits"]
    monkeypatch.setitem(data.DATASETS, "digits", lambda *a: calls.append(a) or digits(*a))
    first = load(Data(batch_size=1))
    assert load(Data(batch_size=8, accumulate=2, workers=1, eval_batch_size=3)) is first
    load(Data(holdout=0.2))
    assert load(Data()) is first
    assert len(calls) == 2
    load(Data(seed=9))
    assert len(data._loaded) == 2


# Arrays


def test_arrays_with_their_own_split(tmp_path):
    a, b = some_arrays(20), some_arrays(6)
    split = load(Data(name="arrays", root=npz(tmp_path / "a.npz", **a, x_val=b["x"], y_val=b["y"])))
    assert (len(split.train), len(split.val), split.in_chans, split.size) == (20, 6, 3, 6)
    assert split.classes == ("0", "1")
    assert split.note == ""
    assert split.train.labels.tolist() == a["y"].tolist()
    np.testing.assert_allclose(split.mean, (a["x"] / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(split.std, (a["x"] / 255).std((0, 1, 2)))
    expected = ((a["x"] / 255 - split.mean) / split.std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(everything(split.train).numpy(), expected, atol=1e-5)
    given = load(Data(name="arrays", root=str(tmp_path / "a.npz")), statistics=((0.5,) * 3, (0.25,) * 3))
    np.testing.assert_allclose(
        everything(given.val).numpy(), ((b["x"] / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2), atol=1e-5
    )


@pytest.mark.parametrize(("shape", "chans"), [((6, 6), 1), ((6, 6, 1), 1), ((6, 6, 4), 4)])
def test_arrays_in_one_part_are_split(tmp_path, shape, chans):
    root = npz(tmp_path / "a.npz", **some_arrays(40, shape, 4))
    split = load(Data(name="arrays", root=root))
    assert (len(split.train), len(split.val), split.in_chans) == (32, 8, chans)
    assert "fifth" in split.note
    assert split.val.labels.bincount().tolist() == [2] * 4
    half = load(Data(name="arrays", root=root, val_fraction=0.5, train_size=8, val_size=4, holdout=0.5))
    assert (len(half.train), len(half.val), half.note) == (4, 4, "")


def test_arrays_are_resized_on_request(tmp_path):
    root = npz(tmp_path / "a.npz", **some_arrays(20, (6, 9)))
    with pytest.raises(ValueError, match=r"images are 6 x 9 pixels; set data.size"):
        load(Data(name="arrays", root=root))
    assert everything(load(Data(name="arrays", root=root, size=12)).val).shape[1:] == (1, 12, 12)


def test_arrays_that_were_written_again_are_read_again(tmp_path):
    import os

    root = npz(tmp_path / "a.npz", **some_arrays(20))
    assert len(load(Data(name="arrays", root=root)).train) == 16
    npz(tmp_path / "a.npz", **some_arrays(10))
    os.utime(root, ns=(1, 1))
    assert len(load(Data(name="arrays", root=root)).train) == 8


def test_a_channel_that_never_changes_stays_finite(tmp_path):
    arrays = some_arrays(20)
    arrays["x"][..., 1] = 77
    split = load(Data(name="arrays", root=npz(tmp_path / "a.npz", **arrays)))
    assert everything(split.train)[:, 1].abs().max() < 1e-3
    assert split.std[1] == 1 / 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 6, 6))}, r"x must be uint8 0\.\.255.*got float64 \(4, 6, 6\)"),
        ({"x": np.zeros((4, 3, 6, 6), np.uint8)}, r"\(N, H, W, C\) with C 1 to 4 last.*got uint8 \(4, 3, 6, 6\)"),
        ({"x": np.zeros((0, 6, 6), np.uint8)}, r"none of them 0; got uint8 \(0, 6, 6\)"),
        ({"y": np.array([0.0, 1, 0, 1])}, r"y must be 4 whole numbers, one an image, got float64 \(4,\)"),
        ({"y": np.array([0, 1, 0])}, r"y must be 4 whole numbers, one an image, got int64 \(3,\)"),
        ({"y": np.array([0, 1, -1, 1])}, r"y has the label -1; labels go from 0"),
        ({"y": np.array([0, 3, 0, 1])}, r"y goes up to 3 but has no image of class 2;"),
        ({"y": np.array([1, 2, 1, 2])}, r"has no image of class 0; number classes from 0 on"),
        ({"y": np.zeros(4, int)}, r"must have at least 2 classes, got 0"),
        ({"x_val": np.zeros((2, 6, 6), np.uint8)}, r"lacks the array y_val; it holds x, y, x_val"),
        (
            {"x_val": np.zeros((2, 6, 6), np.uint8), "y_val": np.array([0, 2])},
            r"y_val has the label 2, y only 0 to 1",
        ),
        (
            {"x_val": np.zeros((2, 5, 5), np.uint8), "y_val": np.array([0, 1])},
            r"x_val must have \(C, H, W\) \(1, 6, 6\) like x, got \(1, 5, 5\)",
        ),
    ],
)
def test_arrays_refuse(tmp_path, change, message):
    arrays = {"x": np.zeros((4, 6, 6), np.uint8), "y": np.array([0, 1, 0, 1])} | change
    with pytest.raises(ValueError, match=message):
        load(Data(name="arrays", root=npz(tmp_path / "a.npz", **arrays)))


def test_array_files_that_are_none(tmp_path):
    def refusal(root: str | Path | None) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            load(Data(name="arrays", root=None if root is None else str(root)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "data.root is None; arrays needs an .npz file" in refusal(None)
    assert "none.npz is not a file" in refusal(tmp_path / "none.npz")
    assert "lacks the array x and y; it holds nothing" in refusal(npz(tmp_path / "other.npz", images=np.zeros(3)))
    (tmp_path / "text.npz").write_text("hello")
    assert "it is not an .npz archive" in refusal(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    assert "it is not an .npz archive" in refusal(tmp_path / "one.npz")
    whole = Path(npz(tmp_path / "cut.npz", **some_arrays())).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "cannot read" in refusal(tmp_path / "cut.npz")
    spoiled = bytearray(whole)
    spoiled[300] ^= 255
    (tmp_path / "spoiled.npz").write_bytes(spoiled)
    assert "cannot read" in refusal(tmp_path / "spoiled.npz")


def test_nothing_is_unpickled(tmp_path):
    root = npz(tmp_path / "a.npz", x=np.array([{"a": 1}, None], dtype=object), y=np.array([0, 1]))
    with pytest.raises(ValueError, match=r"cannot read .*Object arrays cannot be loaded"):
        load(Data(name="arrays", root=root))


# Image folders


def test_image_folders_with_their_own_split(tmp_path):
    (folders(tmp_path) / "train" / "cat" / "readme.txt").write_text("no image")
    (tmp_path / "train" / "cat" / "._0.png").write_text("left by another system")
    split = load(Data(name="imagefolder", root=str(tmp_path)))
    assert (len(split.train), len(split.val), split.size, split.in_chans) == (8, 8, 64, 3)
    assert split.classes == ("cat", "dog")
    assert split.train.labels.tolist() == [0] * 4 + [1] * 4
    red = [100 * label + 10 * i for label in (0, 1) for i in range(4)]
    assert split.train.images[:][:, 0, 5, 5].tolist() == red
    np.testing.assert_allclose(split.mean, (np.mean(red) / 255, 0, 0))
    np.testing.assert_allclose(split.std, (np.std(red) / 255, 1 / 255, 1 / 255))
    torch.testing.assert_close(split.val[2][0][0, 0, 0], torch.tensor(((21 - np.mean(red)) / np.std(red)).astype("f4")))


def test_an_image_folder_may_have_test_for_val_or_class_folders_alone(tmp_path):
    folders(tmp_path / "a", ("train", "test"))
    assert len(load(Data(name="imagefolder", root=str(tmp_path / "a"), size=8)).val) == 8
    root = str(folders(tmp_path / "b", (".",), each=5))
    split = load(Data(name="imagefolder", root=root, size=8, val_fraction=0.2))
    assert split.train.labels.bincount().tolist() == [4, 4]
    assert split.val.labels.bincount().tolist() == [1, 1]
    assert not rows_of(split.train) & rows_of(split.val)
    told = r"has no val or test folder; data.val_fraction \(--val-fraction\), such as 0\.2"
    with pytest.raises(ValueError, match=told):
        load(Data(name="imagefolder", root=root))
    folders(tmp_path / "c", ("train",))
    with pytest.raises(ValueError, match=r"has no val or test folder"):
        load(Data(name="imagefolder", root=str(tmp_path / "c")))


def test_a_sample_is_balanced_and_decodes_no_other_images(tmp_path):
    root = str(folders(tmp_path / "a", each=6))
    (tmp_path / "a" / "train" / "cat" / "5.png").write_text("unreadable")
    config, given = Data(name="imagefolder", root=root, size=8), ((1 / 255,) * 3, (1 / 255,) * 3)
    taken = [data.sample(config.model_copy(update={"seed": seed}), 4, statistics=given) for seed in range(9)]
    readable = [images for images, _ in taken if not any("cat/5.png" in str(p) for p in images.images.paths)]
    assert 0 < len(readable) < 9  # a broken image that is not taken does not matter
    x, y = readable[0].__getitems__(range(4))
    assert x.shape == (4, 3, 8, 8)
    assert y.tolist() == [0, 0, 1, 1]
    assert all(round(value) % 10 == 9 for value in x[:, 0, 0, 0].tolist())  # of training: the others end in 0
    images, classes = data.sample(config, 100, statistics=given, evaluation=True)
    assert (len(images), classes) == (12, ("cat", "dog"))
    assert all(round(images[i][0][0, 0, 0].item()) % 10 == 0 for i in range(12))


def test_a_sample_of_images_in_one_part_takes_what_there_is(tmp_path):
    root = str(folders(tmp_path / "b", (".",), each=5))
    images, _ = data.sample(Data(name="imagefolder", root=root, size=8), 100, evaluation=True)
    assert len(images) == 10
    mean = everything(images).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)  # by their own statistics
    arrays = npz(tmp_path / "a.npz", **some_arrays(20))
    assert len(data.sample(Data(name="arrays", root=arrays), 100)[0]) == 20
    with pytest.raises(ValueError, match="the model was trained on the other kind"):
        data.sample(Data(name="digits"), 4, statistics=((0.5,), (0.2,)))
    with pytest.raises(ValueError, match="unknown data set 'digit'; did you mean digits"):
        data.sample(Data(name="digit"), 4)


def test_images_to_be_cropped_are_kept_larger(tmp_path):
    split = load(Data(name="imagefolder", root=str(folders(tmp_path)), size=16, augment=("crop", "flip")))
    assert split.train.images.shape == (8, 3, 19, 19)
    assert split.val.images.shape == (8, 3, 16, 16)
    assert everything(split.train).shape == (8, 3, 16, 16)


def test_predict_sees_an_image_as_evaluation_does(tmp_path):
    path = tmp_path / "val" / "cat" / "0.png"
    folders(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    split = load(Data(name="imagefolder", root=str(tmp_path), size=24))
    assert torch.equal(split.val.images[torch.tensor([0])][0], load_image(path, 24, 3))


@pytest.mark.parametrize("skip_bad", [False, True])
def test_folders_that_do_not_fit_into_memory_give_the_same_images(tmp_path, monkeypatch, skip_bad):
    config = Data(name="imagefolder", root=str(folders(tmp_path)), size=8, skip_bad=skip_bad, augment=("crop",))
    inside = load(config)
    data._loaded.clear()
    monkeypatch.setattr(data, "MEMORY", 100)
    outside = load(config)
    assert isinstance(inside.train.images, torch.Tensor)
    assert isinstance(outside.train.images, Files)
    assert (inside.mean, inside.std) == (outside.mean, outside.std)
    assert torch.equal(everything(inside.val), everything(outside.val))
    torch.manual_seed(0)
    first = everything(inside.train)
    torch.manual_seed(0)
    assert torch.equal(first, everything(outside.train))
    pickle.loads(pickle.dumps(outside))


@pytest.mark.parametrize("memory", [2**30, 100])
def test_unreadable_images_stop_or_are_left_out_and_counted(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(data, "MEMORY", memory)
    folders(tmp_path)
    (tmp_path / "train" / "dog" / "0.png").write_text("broken")
    (tmp_path / "val" / "cat" / "3.png").write_bytes(b"")
    config = Data(name="imagefolder", root=str(tmp_path), size=8)
    with pytest.raises(ValueError, match=r"cannot read image .*dog/0\.png: .*--skip-bad"):
        load(config)
    split = load(config.model_copy(update={"skip_bad": True}))
    assert split.train.labels.bincount().tolist() == [4, 3]
    assert split.val.labels.bincount().tolist() == [3, 4]
    assert len(everything(split.val)) == 7
    assert split.note == "2 unreadable images were left out."


def test_a_class_without_a_readable_image_is_refused(tmp_path):
    folders(tmp_path, each=1)
    (tmp_path / "train" / "dog" / "0.png").write_text("broken")
    with pytest.raises(ValueError, match=r"the 1 training images leave out class dog"):
        load(Data(name="imagefolder", root=str(tmp_path), skip_bad=True))
    (tmp_path / "train" / "cat" / "0.png").write_text("broken")
    with pytest.raises(ValueError, match=r"none of the 2 images can be read, such as .*0\.png"):
        load(Data(name="imagefolder", root=str(tmp_path), skip_bad=True))


def test_image_folders_refuse(tmp_path):
    def refusal(root: Path | None) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            load(Data(name="imagefolder", root=None if root is None else str(root)))
        return str(caught.value)

    assert "imagefolder needs a folder with train/ and val/" in refusal(None)
    assert "is not there; imagefolder needs a folder" in refusal(tmp_path / "none")
    assert "is a file; imagefolder needs a folder" in refusal(save(tmp_path / "a.png", 1))
    (tmp_path / "empty").mkdir()
    assert "has no class folders" in refusal(tmp_path / "empty")
    folders(tmp_path / "a")
    (tmp_path / "a" / "train" / "bird").mkdir()
    assert "bird holds no image (.bmp, .gif" in refusal(tmp_path / "a")
    save(tmp_path / "a" / "train" / "bird" / "0.png", 1)
    save(tmp_path / "a" / "val" / "fish" / "0.png", 1)
    assert "val lacks bird; train lacks fish" in refusal(tmp_path / "a")
    save(tmp_path / "one" / "train" / "bird" / "0.png", 1)
    save(tmp_path / "one" / "val" / "bird" / "0.png", 1)
    assert "at least 2 classes, got bird" in refusal(tmp_path / "one")


def test_long_decoding_is_reported(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("anybatch.data.images.time.monotonic", lambda: next(clock))
    told = []
    load(
        Data(name="imagefolder", root=str(folders(tmp_path)), size=8),
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    assert told[0] == (1, 8, "decode images")
    assert told[-1] == (8, 8, "decode images")
    monkeypatch.setattr("anybatch.data.images.time.monotonic", lambda: 0.0)
    told.clear()
    assert list(_reported(range(3), "x", lambda *a: told.append(a))) == [0, 1, 2]
    assert told == []


# CIFAR-10 and Fashion-MNIST


def idx(path: Path, array: np.ndarray) -> Path:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def fashion(folder: Path, suffix: str = "") -> Path:
    for part, n in (("train", 20), ("t10k", 10)):
        idx(folder / f"{part}-images-idx3-ubyte{suffix}", np.arange(n * 28 * 28).reshape(n, 28, 28) % 256)
        idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)
    return folder


@pytest.mark.parametrize(("inside", "suffix"), [("", ".gz"), ("", ""), ("FashionMNIST/raw", "")])
def test_fashion_mnist_from_its_files(tmp_path, inside, suffix):
    fashion(tmp_path / inside, suffix)
    split = load(Data(name="fashion-mnist", root=str(tmp_path)))
    assert (len(split.train), len(split.val), split.in_chans, split.size) == (20, 10, 1, 28)
    assert split.classes[0] == "T-shirt/top"
    assert split.train.images[torch.tensor([1])].flatten()[:3].tolist() == [16, 17, 18]  # 784 = 3 * 256 + 16
    assert split.val.labels.tolist() == list(range(10))


def test_idx_by_hand_and_its_refusals(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 2, 7, 9]))
    assert sets.read_idx(path).tolist() == [[7, 9]]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is cut off: its header says \[1, 2\], 1 bytes follow"):
        sets.read_idx(path)
    path.write_bytes(b"\x89PNG and more")
    with pytest.raises(ValueError, match=r"is not an IDX file of bytes; it starts with 89 50 4e 47"):
        sets.read_idx(path)
    path = idx(tmp_path / "b.gz", np.zeros(100))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"cannot read .*b\.gz: .*fetch it again"):
        sets.read_idx(path)


def test_fashion_mnist_files_must_agree(tmp_path):
    idx(fashion(tmp_path) / "t10k-labels-idx1-ubyte", np.arange(9))
    with pytest.raises(ValueError, match=r"the t10k files must hold N images .*got \(10, 28, 28\) and \(9,\)"):
        load(Data(name="fashion-mnist", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "torchvision_class", "expected"),
    [("cifar10", "CIFAR10", "cifar-10-batches-py"), ("fashion-mnist", "FashionMNIST", "train-images-idx3-ubyte")],
)
def test_a_failed_download_is_one_line_that_says_what_to_put_there(
    tmp_path, monkeypatch, name, torchvision_class, expected
):
    import torchvision.datasets

    def fail(*_, **__):
        raise OSError("<urlopen error\nno network>")

    monkeypatch.setattr(getattr(torchvision.datasets, torchvision_class), "__init__", fail)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in (None, str(tmp_path)):
        with pytest.raises(ValueError, match=rf"download .*no network.* should hold .*{expected}") as caught:
            load(Data(name=name, root=root))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"data.root=/none is not there; .* needs a folder"):
        load(Data(name=name, root="/none"))


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    import torchvision.datasets

    class Fake:
        def __init__(self, root, train, download):
            assert (root, download) == (str(tmp_path / ".cache/anybatch/cifar10"), True)
            self.data = np.arange(20 * 32 * 32 * 3).reshape(20, 32, 32, 3).astype(np.uint8)
            self.targets = [i % 10 for i in range(20)]
            self.classes = list("abcdefghij")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    monkeypatch.setenv("HOME", str(tmp_path))
    split = load(Data(name="cifar10"))
    assert split.classes == tuple("abcdefghij")
    assert split.train.images.shape == (20, 3, 32, 32)
    assert split.train.images[torch.tensor([0])][0, :, 0, 1].tolist() == [3, 4, 5]


def test_cifar10_from_folders_is_shifted_and_not_resized(tmp_path):
    for part in ("train", "test"):
        for i, name in enumerate(("airplane", "automobile")):
            for j in range(2):
                save(tmp_path / part / name / f"{j}.png", (i, j, 0), (32, 32))
    (tmp_path / "train" / "airplane" / "bad.png").write_text("")
    with pytest.raises(ValueError, match=r"bad\.png.*--skip-bad"):
        load(Data(name="cifar10", root=str(tmp_path)))
    split = load(Data(name="cifar10", root=str(tmp_path), augment=("crop",), skip_bad=True))
    assert split.train.images.shape == (4, 3, 32, 32)
    assert split.train.images[:][:, :2, 0, 0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert split.note == "1 unreadable image was left out."


# The command line's spelling


def test_parse_data(tmp_path):
    assert parse_data("digits", None) == ("digits", None)
    assert parse_data("cifar10", "/data") == ("cifar10", "/data")
    assert parse_data("fashion-mnist:/data", None) == ("fashion-mnist", "/data")
    assert parse_data("imagefolder:/a:b", None) == ("imagefolder", "/a:b")
    assert parse_data("some/images.npz", None) == ("arrays", "some/images.npz")
    (tmp_path / "train").mkdir()
    assert parse_data(str(tmp_path), None) == ("imagefolder", str(tmp_path))


def test_parse_data_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"unknown data set 'cifar'; did you mean cifar10"):
        parse_data("cifar", None)
    with pytest.raises(ValueError, match=r"unknown data set 'imagefolder:'; did you mean imagefolder"):
        parse_data("imagefolder:", None)
    with pytest.raises(ValueError, match=r"has no train folder; .* write imagefolder:"):
        parse_data(str(tmp_path), None)
    with pytest.raises(ValueError, match=r"says where the data are, and so does root=/b; give one of them"):
        parse_data("imagefolder:/a", "/b")


# Real data


@pytest.mark.skipif(not (REAL / "fashion-mnist").is_dir(), reason=f"{REAL / 'fashion-mnist'} is absent")
def test_fashion_mnist_has_its_known_statistics():
    split = load(Data(name="fashion-mnist", root=str(REAL / "fashion-mnist")))
    assert (len(split.train), len(split.val)) == (60_000, 10_000)
    assert split.train.labels.bincount().tolist() == [6000] * 10
    assert split.mean == pytest.approx((0.2860,), abs=5e-5)  # as commonly published
    assert split.std == pytest.approx((0.3530,), abs=5e-5)
