"""`anybatch diagnose`: the page, the object on standard output, and one line for each mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import anybatch

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def diagnose(call: Command) -> Command:
    return partial(call, "diagnose")


@pytest.mark.slow
def test_all_probes_on_one_page(diagnose: Command) -> None:
    code, out, err = diagnose("resnet8", "--all", "--scheme", "bn", "-b", 4, "--out", "d", "--seed", 1)
    assert code == 0, err
    assert "mix samples in training" in out
    assert out.splitlines()[-1] == "d/report.html"
    page = Path("d/report.html").read_text()
    assert page.index("Findings") < page.index('id="batch_dependence"') < page.index('id="smoothness"')
    assert page.count("data:image/svg+xml;base64,") == 6
    assert not re.search(r'(src|href)="https?:', page)  # nothing is fetched
    assert "anybatch diagnose resnet8 --all --batch-size 4 --scheme bn --seed 1" in page
    assert "Tiles against the whole image" in page


def test_json_holds_numbers_and_findings(diagnose: Command) -> None:
    words = ["--probe", "batch-dependence,tile_consistency", "--scheme", "gn:auto", "-b", 2, "--size", 32, "--json"]
    code, out, err = diagnose("resnet8", *words)
    assert code == 0, err
    told = json.loads(out)
    assert told["report"] == "runs/diagnose-resnet8/report.html"
    assert Path(told["report"]).is_file()
    assert list(told["probes"]) == ["batch_dependence", "tile_consistency"]
    dependence, tiles = told["probes"].values()
    assert (dependence["mixes_in_training"], dependence["error"]) == (False, None)
    assert {f["level"] for f in dependence["findings"]} == {"good"}
    assert len(tiles["error_map"]) == len(tiles["error_map"][0]) == 48


def test_real_images_and_labels(diagnose: Command) -> None:
    words = ["--probe", "signal_propagation", "--size", "1x8x8", "--data", "digits", "--json"]
    Path("m.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())\n"
    )
    code, out, err = diagnose("m.py:make", *words)
    assert code == 0, err
    assert json.loads(out)["facts"]["inputs"] == "8 images of digits, 8 x 8 pixels"


def test_a_trained_network_is_laid_beside_a_new_one(diagnose: Command) -> None:
    model = anybatch.create_model("resnet8", "nf", num_classes=3)
    model.save_pretrained("kept")  # pyright: ignore[reportCallIssue]
    code, _, err = diagnose("./kept", "--probe", "signal_propagation", "-b", 2, "--out", "d")
    assert code == 0, err
    assert "of a file" in Path("d/report.html").read_text()


def test_a_probe_that_cannot_run_is_told_and_the_others_stay(diagnose: Command) -> None:
    Path("m.py").write_text(
        "from torch import nn\n\ndef make():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2), nn.BatchNorm1d(2))\n"
    )
    code, out, err = diagnose("m.py:make", "--size", "3x16x16", "--all", "--out", "d", "-b", 2)
    assert code == 1, err
    assert "tile_consistency: no map in the model" in " ".join(out.split())
    assert "Not run: no map in the model" in Path("d/report.html").read_text()
    assert "Training fails on a batch of one" in out


def test_half_precision_takes_float64_to_tell_rounding_apart(diagnose: Command) -> None:
    Path("m.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).half()\n"
    )
    words = ["--size", "3x8x8", "-b", 2, "--probe", "batch_dependence,split_invariance", "--json"]
    code, out, err = diagnose("m.py:make", *words)
    assert code == 0, err
    split = json.loads(out)["probes"]["split_invariance"]
    assert (split["dtype"], split["invariant"]) == ("float64", True)


@pytest.mark.parametrize(
    ("scheme", "given", "told"), [("bn", [], True), ("gn:auto", [], False), ("bn", ["DATA"], False)]
)
def test_statistics_of_noise_are_told_to_be_of_noise(
    scheme: str, given: list[object], told: bool, diagnose: Command
) -> None:
    x = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    np.savez("images.npz", x=x, y=np.arange(8) % 2, x_val=x, y_val=np.arange(8) % 2)
    words = ["--data", "images.npz"] if given else []
    words += ["--scheme", scheme, "--size", 16, "-b", 4, "--probe", "batch_dependence", "--out", "d"]
    code, out, err = diagnose("resnet8", *words)
    assert code == 0, err
    assert ("Inputs are noise" in out) == told
    assert ("Inputs are noise" in Path("d/report.html").read_text()) == told


def test_numbers_that_are_not_finite_still_make_a_page(diagnose: Command) -> None:
    Path("m.py").write_text(
        "from torch import nn\n\ndef make():\n    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "    model[0].weight.data.fill_(float('nan'))\n    return model\n"
    )
    code, out, err = diagnose("m.py:make", "--size", 16, "--all", "--out", "d", "-b", 2)
    assert code == 0, err
    assert "not finite" in out
    assert "Some numbers are not finite" in Path("d/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet9"], "unknown model 'resnet9'; did you mean resnet"),
        (["resnet8", "--probe", "tiles"], "unknown probe 'tiles'"),
        (["resnet8", "--probe", ","], "--probe names none"),
        (["resnet8", "--all", "--probe", "smoothness"], "--all runs every probe"),
        (["resnet8", "--out", "m.py"], "--out m.py is a file; name a folder"),
        (["resnet8", "--out", "m.py/d"], "cannot write m.py/d/report.html"),
        (["resnet8", "--size", "big"], "--size takes 224, 224x320 or 3x224x224"),
        (["resnet8", "--data-root", "."], "--data-root goes with --data"),
        (["resnet8", "--data", "nothing"], "unknown data set 'nothing'"),
        (["resnet8", "--data", "digits"], "images of digits have 1 channels, and resnet8 takes 3"),
        (["resnet8", "-b", 1], "--batch-size"),
        (["m.py:make"], "nothing is known of what m.py:make takes; give --size"),
        (["timm:nothing"], "unknown model of timm 'nothing'"),
    ],
)
def test_mistakes_are_one_line(diagnose: Command, words: list[object], told: str) -> None:
    Path("m.py").write_text("import torch\n\ndef make():\n    return torch.nn.Conv2d(3, 2, 3)\n")
    code, _, err = diagnose(*words)
    assert code == 2, err
    assert told in " ".join(err.split())
    assert not Path("runs").exists()


def test_what_several_probes_find_is_told_once(diagnose: Command) -> None:
    words = ["--size", 32, "-b", 2, "--probe", "tile_consistency,smoothness", "--out", "d", "--num-classes", 4]
    code, out, err = diagnose("nf_resnet26", *words)
    assert code == 0, err
    assert out.count("8 of 8 branches have gain 0") == 1
    assert "(tile consistency, smoothness)" in out
    assert Path("d/report.html").read_text().count("8 of 8 branches have gain 0") == 1
    assert "and they agree with the whole" not in out
