"""The tool that unpacks packed data sets."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anybatch.data import load
from anybatch.recipe import Data

REAL = Path(__file__).parents[2] / "shared" / "data"
_spec = importlib.util.spec_from_file_location("unpack", Path(__file__).parents[1] / "tools" / "unpack.py")
assert _spec is not None
assert _spec.loader is not None
unpack = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(unpack)


def webp(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "webp", lossless=True)
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_strips_become_single_images_and_the_rest_is_copied(tmp_path, mode, capsys):
    strip, photo = noise(96, 32), webp(noise(96, 64))
    archive = tar(
        tmp_path / "a.tar",
        {"train/cat/00.webp": webp(strip), "val/cat/photo.webp": photo, "CREDITS.txt": b"thanks"},
        mode,
    )
    out = tmp_path / "new" / "out"
    assert unpack.main([str(archive), "--out", str(out)]) == 0
    got = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert got == [
        "CREDITS.txt",
        "train/cat/00-000.png",
        "train/cat/00-001.png",
        "train/cat/00-002.png",
        "val/cat/photo.webp",
    ]
    for i in range(3):
        image = np.asarray(Image.open(out / f"train/cat/00-{i:03d}.png"))
        assert np.array_equal(image, strip[32 * i : 32 * (i + 1)])
    assert (out / "val/cat/photo.webp").read_bytes() == photo
    assert (out / "CREDITS.txt").read_bytes() == b"thanks"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a.tar: 5 files in" in captured.err
    assert unpack.main([str(archive), "--out", str(out)]) == 0  # again, over what is there


def test_one_small_image_is_no_strip(tmp_path):
    archive = tar(
        tmp_path / "a.tar", {"train/cat/a.webp": webp(noise(32, 32)), "train/cat/b.webp": webp(noise(33, 32))}
    )
    assert unpack.unpack(archive, tmp_path) == 2
    assert sorted(path.name for path in (tmp_path / "train" / "cat").iterdir()) == ["a.webp", "b.webp"]


@pytest.mark.parametrize("name", ["../outside.webp", "../outside.txt", "train/../../outside.webp"])
def test_nothing_lands_outside(tmp_path, name, capsys):
    archive = tar(tmp_path / "a.tar", {name: webp(noise(64, 32))})
    assert unpack.main([str(archive), "--out", str(tmp_path / "out")]) == 2
    assert "is not safe to unpack" in capsys.readouterr().err
    assert not list(tmp_path.glob("outside*"))


def test_nothing_is_written_through_a_link(tmp_path):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as file:
        link = tarfile.TarInfo("train")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        file.addfile(link)
    with pytest.raises(ValueError, match=r"is not safe to unpack: .*link to an absolute path"):
        unpack.unpack(archive, tmp_path / "out")


def test_refusals_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"cannot unpack .*none\.tar: .*No such file"):
        unpack.unpack(tmp_path / "none.tar", tmp_path)
    (tmp_path / "text.tar").write_text("hello")
    with pytest.raises(ValueError, match=r"cannot unpack .*text\.tar"):
        unpack.unpack(tmp_path / "text.tar", tmp_path)
    with pytest.raises(ValueError, match=r"cannot unpack .*train/cat/bad\.webp in it cannot be read"):
        unpack.unpack(tar(tmp_path / "bad.tar", {"train/cat/bad.webp": b"no image"}), tmp_path)
    whole = tar(tmp_path / "cut.tar.xz", {"train/cat/00.webp": webp(noise(640, 32))}, "w:xz").read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot unpack .*cut\.tar\.xz"):
        unpack.unpack(tmp_path / "cut.tar.xz", tmp_path)


@pytest.mark.skipif(not (REAL / "flowers").is_dir(), reason=f"{REAL / 'flowers'} is absent")
def test_flowers_unpacked_and_loaded(tmp_path):
    unpack.unpack(REAL / "flowers" / "flowers96.tar.xz", tmp_path)
    split = load(Data(name="imagefolder", root=str(tmp_path), augment=("crop", "flip", "randaugment")))
    assert split.classes == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    assert split.train.labels.bincount().tolist() == [506, 715, 507, 556, 637]
    assert split.val.labels.bincount().tolist() == [127, 180, 129, 140, 160]
    x, _ = split.train.__getitems__(range(0, 2921, 100))
    assert x.shape == (30, 3, 64, 64)
    assert x.isfinite().all()


@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason=f"{REAL / 'cifar10'} is absent")
def test_one_strip_of_each_class_of_cifar10(tmp_path):
    with tarfile.open(REAL / "cifar10" / "cifar10_test.tar") as archive:
        strips = {m.name: archive.extractfile(m).read() for m in archive if m.name.endswith("/00.webp")}
    both = strips | {name.replace("test/", "train/"): content for name, content in strips.items()}
    assert unpack.unpack(tar(tmp_path / "some.tar", both), tmp_path) == 2000
    split = load(Data(name="cifar10", root=str(tmp_path)))
    assert split.classes[0] == "airplane"
    assert split.val.labels.bincount().tolist() == [100] * 10
    assert split.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.02)  # 1,000 of the 50,000 images
    first = np.asarray(Image.open(io.BytesIO(strips["test/airplane/00.webp"])).convert("RGB"))[:32]
    assert np.array_equal(split.val.images[:][0].permute(1, 2, 0).numpy(), first)
