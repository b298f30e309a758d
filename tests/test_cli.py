"""The command line: quick to start, one line for each mistake, exit code 2, never a traceback."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import anybatch
import anybatch.models


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Two easy classes, dark and bright, as an .npz file and as a folder of images."""
    folder = tmp_path_factory.mktemp("arrays")
    generator = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = (generator.integers(0, 80, (80, 12, 12, 3)) + 150 * y[:, None, None, None]).astype(np.uint8)
    np.savez(folder / "two.npz", x=x, y=y)
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        target = folder / "images" / ("train" if i < 60 else "val") / ("dark", "bright")[label]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i}.png")
    return folder


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys, time; t = time.perf_counter(); sys.argv = ['anybatch', '--help']\n"
        "from anybatch import cli\n"
        "try: cli.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'lightning', 'torchvision', 'matplotlib', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    began = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "heavy: []" in told
    assert "compare" in told
    assert time.perf_counter() - began < 5  # 0.4 s here; loose for a loaded machine


def test_train_eval_predict_on_arrays(call, arrays):
    code, out, err = call(
        "train", "--data", arrays / "two.npz", "-b", 4, "--epochs", 3, "--out", "run", "--val-fraction", 0.25, "--json"
    )
    assert code == 0, err
    row = json.loads(out)
    assert row["error"] < 0.3
    assert row["data"]["val_images"] == 20

    code, out, _ = call("eval", "run", "--json")
    assert code == 0
    assert json.loads(out)["error"] == pytest.approx(row["error"], abs=1e-6)
    code, out, _ = call("eval", "run")
    assert "on 20 images" in out

    bright = arrays / "images" / "val" / "bright"
    code, out, _ = call("predict", "run", bright, "--json", "--top", 1)
    found = json.loads(out)["images"]
    assert len(found) == 10
    assert sum(item["classes"][0]["class"] == "1" for item in found) >= 7
    code, out, _ = call("predict", "run", bright)
    assert code == 0


def test_train_on_a_folder_with_a_recipe_file(call, arrays, tmp_path):
    from anybatch import recipes

    recipe = recipes.images().replace(
        {"schedule.epochs": 1, "data.root": str(arrays / "images"), "data.size": 16, "model.name": "resnet8"}
    )
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    code, out, err = call("train", "r.yaml", "--set", "data.batch_size=16", "--out", "run", "--tensorboard")
    assert code == 0, err
    assert "model in run" in out
    assert list(Path("run").glob("events.out.tfevents*"))
    assert Path("run/metrics.csv").read_text().startswith("epoch,")


@pytest.mark.parametrize(
    ("words", "scheme"),
    [
        (["--model", "resnet8_kn"], "kn(p=0.1,eps=1e-5)"),
        (["--set", "model.name=resnet8_kn"], "kn(p=0.1,eps=1e-5)"),
        (["digits-quick", "--model", "resnet8_kn"], "kn(p=0.1,eps=1e-5)"),
        (["r.yaml"], "kn(p=0.1,eps=1e-5)"),
        (["--model", "resnet8_kn", "--scheme", "gn:4"], "gn(groups=4)"),
        (["--model", "resnet8_kn", "--set", "model.scheme=gn:4"], "gn:4"),
        (["gn.yaml", "--model", "resnet8_kn"], "gn:4"),
        (["kn-cifar100-quick", "--model", "resnet8_kn"], "kn(eps=1e-5)"),
        (["--model", "resnet8"], "ws+gn"),
    ],
)
def test_a_network_comes_with_its_own_scheme_where_none_is_named(call, arrays, words, scheme):
    Path("r.yaml").write_text("model: {name: resnet8_kn, options: {width: 8}}")
    Path("gn.yaml").write_text("model: {name: resnet8, scheme: 'gn:4'}")
    small = [
        "--data",
        arrays / "two.npz",
        "--train-size",
        16,
        "--epochs",
        1,
        "--set",
        "model.options.width=32",
        "-b",
        8,
    ]
    small += ["--val-fraction", 0.25, "--set", "data.size=16", "--set", "data.val_size=null"]
    code, out, err = call("train", *words, *small, "--out", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["recipe"]["model"]["scheme"] == scheme
    assert f"scheme: {scheme}" in Path("run/recipe.yaml").read_text().replace("'", "")


def test_compare_prints_one_json_object(call, arrays):
    words = ["compare", "--data", arrays / "two.npz", "--schemes", "bn,gn:8", "-b", "8,16", "--seeds", 2, "--epochs", 1]
    code, out, err = call(*words, "--out", "study", "--json", "--jobs", 2)
    assert code == 0, err
    summary = json.loads(out)
    assert [(c["scheme"], c["batch_size"]) for c in summary["cells"]] == [
        ("bn", 8),
        ("bn", 16),
        ("gn(groups=8)", 8),
        ("gn(groups=8)", 16),
    ]
    assert {file.name for file in Path("study").iterdir()} >= {
        "rows.jsonl",
        "figure.png",
        "figure.svg",
        "report.html",
        "summary.json",
        "study.yaml",
    }
    assert json.loads(Path("study/summary.json").read_text()) == summary
    code, _, err = call(*words, "--out", "study", "--set", "optim.lr=1")
    assert code == 2
    assert "holds another study" in err
    code, _, err = call("compare", "--study", "study/study.yaml", "--out", "study", "--seeds", 3)
    assert code == 2
    assert "leave out --seeds" in err
    code, out, err = call("compare", "--study", "study/study.yaml", "--out", "study")  # nothing is left to do
    assert code == 0, err
    assert "report: study/report.html" in out


def test_eval_and_predict_take_the_models_own_scale_and_size(call, arrays):
    """Images on 0..1, trained at 16 pixels and evaluated at 20."""
    changes = ("model.options.width=8", "data.eval_size=20", "data.val_fraction=0.25", "schedule.epochs=1")
    words = [word for change in changes for word in ("--set", change)]
    code, _, err = call(
        "train", "kn-cifar100-quick", "--data", arrays / "two.npz", "--out", "run", "--json", *words,
        "--set", "data.train_size=null", "--set", "data.val_size=null", "--set", "data.size=16",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(Path("run/model.json").read_text(encoding="utf-8"))
    assert (facts["size"], facts["mean"], facts["std"]) == (20, [0, 0, 0], [1, 1, 1])
    code, told, _ = call("eval", "run", "--json")
    assert code == 0
    assert json.loads(told)["error"] == pytest.approx(facts["error"], abs=1e-6)
    code, told, _ = call("predict", "run", next((arrays / "images" / "val" / "bright").iterdir()), "--json")
    assert code == 0
    assert len(json.loads(told)["images"]) == 1


def test_predict_takes_what_save_pretrained_and_push_to_hub_wrote(call, arrays, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    torch.manual_seed(0)
    model = anybatch.create_model("resnet8", num_classes=5).eval()
    torch.nn.init.normal_(model.fc.weight)
    model.default_cfg |= {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}
    model.save_pretrained("net")
    image = next((arrays / "images" / "val" / "bright").iterdir())
    with torch.no_grad():
        wanted = model(anybatch.models.transforms(model)(Image.open(image))[None]).softmax(1)[0]
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained("net")
        code, out, err = call("predict", "net", image, "--json", "--top", 5)
        assert code == 0, err
        (found,) = json.loads(out)["images"]
        got = {item["class"]: item["probability"] for item in found["classes"]}
        assert got == pytest.approx(
            {str(i): p for i, p in enumerate(wanted.tolist())}, abs=3e-2 if dtype.itemsize < 4 else 1e-5
        )
    asked = []

    def download(repository: str, name: str, **_: object) -> str:
        asked.append((repository, name))
        if repository == "someone/nothing":
            raise huggingface_hub.errors.EntryNotFoundError("404\nis not there")
        return f"net/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert call("predict", "hf-hub:someone/net", image, "--json", "--top", 5) == (0, out, "")
    assert asked == [("someone/net", "config.json"), ("someone/net", "model.safetensors")]
    code, _, err = call("predict", "hf-hub:someone/nothing", image)
    assert (code, err.strip()) == (2, "error: cannot get someone/nothing from the Hub: 404 is not there")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = call("predict", "hf-hub:someone/net", image)
    assert code == 2
    assert "pip install 'anybatch[hub]'" in err
    anybatch.create_model("resnet8", num_classes=0).save_pretrained("headless")
    code, _, err = call("predict", "headless", image)
    assert code == 2
    assert "holds a network that tells no images apart: resnet8" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compar"], "Did you mean 'compare'"),
        (["compare", "--scheme", "bn"], "--schemes"),
        (["compare", "--schemes", "bn,gm"], "unknown part 'gm' in scheme 'gm'; did you mean gn?"),
        (["compare", "--schemes", "bn+gn"], "both fill the slot 'norm'"),
        (["compare", "--schemes", "ws"], "needs a norm"),
        (["compare", "--schemes", "bn,BN"], "twice"),
        (["compare", "--data", "didgits"], "unknown data set 'didgits'; did you mean digits"),
        (["compare", "--data", "imagefolder:nowhere"], "nowhere"),
        (["compare", "--data", "no.npz"], "no.npz"),
        (["compare", "--batch-sizes", "1,two"], "--batch-sizes takes whole numbers"),
        (["compare", "--batch-sizes", "0"], "greater than or equal to 1"),
        (["compare", "--batch-sizes", "1000"], "larger than the 512 training images"),
        (["compare", "--schemes", ","], "--schemes takes schemes separated by commas, such as bn,gn,ws+gn; got ','"),
        (["compare", "--out", f"{__file__}/x"], f"cannot write {__file__}/x/rows.jsonl: {__file__} is a file"),
        (["train", "--out", __file__], f"cannot write {__file__}/rows.jsonl: {__file__} is a file"),
        (["compare", "--seeds", "0"], "--seeds"),
        (["compare", "--model", "resnet9"], "unknown model 'resnet9'; did you mean resnet8"),
        (["compare", "--study", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["compare", "--set", "train.seed=3"], "a study varies train.seed; give --seeds"),
        (["compare", "--set", "model.options.width=abc"], "option width of resnet8 must be a whole number, got 'abc'"),
        (["compare", "--set", "train.devices=2"], "one device each"),
        (["compare", "--data", "imagefolder:nowhere"], "needs a folder with train/ and val/"),
        (["compare", "--set", "optim.lr"], "--set takes key=value"),
        (["compare", "--set", "optim.lrr=1"], "did you mean lr?"),
        (["compare", "--lr", "-1"], "optim.lr"),
        (["train", "resnet.yaml"], "cannot read resnet.yaml"),
        (["train", "cifar"], "unknown recipe 'cifar'; did you mean cifar10"),
        (["train", "--scheme", "knn"], "unknown part 'knn'"),
        (["train", "--precision", "bf16"], "train.precision"),
        (["train", "--model", "knresnet18_seg"], "knresnet18_seg gives a map of logits, for segmentation"),
        (["train", "--set", "model.options.num_classes=3"], "unknown option of resnet8 'num_classes'"),
        (["train", "--set", "model.options.name=x"], "unknown option of resnet8 'name'"),
        (["train", "--set", "model.options.features_only=true"], "unknown option of resnet8 'features_only'"),
        (["eval", "nowhere"], "nowhere is not there"),
        (["predict", "nowhere", "a.png"], "nowhere is not there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(call, words, message):
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert not Path("runs").exists()  # refused before anything was written


def test_divergence_is_told(call, arrays):
    words = ["train", "--data", arrays / "two.npz", "--val-fraction", 0.2, "--scheme", "none", "--lr", "1e12", "-b", 32]
    code, _, err = call(*words, "--out", "run")
    assert code == 2
    assert "the loss became" in err
    assert json.loads(Path("run/rows.jsonl").read_text())["status"] == "failed"


def test_other_data_is_refused_by_its_classes(call, arrays):
    call("train", "--data", arrays / "two.npz", "--val-fraction", 0.2, "--epochs", 1, "--out", "run")
    code, _, err = call("eval", "run", "--data", "digits")
    assert code == 2
    assert "digits holds images that come normalized, the model was trained on the other kind" in err
    call("train", "--data", "digits", "--epochs", 1, "-b", 64, "--out", "grey")
    generator = np.random.default_rng(0)
    np.savez("grey.npz", x=generator.integers(0, 255, (9, 8, 8), dtype=np.uint8), y=np.arange(9) % 3)
    code, _, err = call("eval", "grey", "--data", "grey.npz", "--set", "data.val_fraction=0.5")
    assert code == 2
    assert "arrays holds images of whole numbers 0..255, the model was trained on the other kind" in err
    call("train", "--data", "grey.npz", "--val-fraction", 0.4, "--epochs", 1, "-b", 2, "--out", "three")
    np.savez("two.npz", x=generator.integers(0, 255, (9, 8, 8), dtype=np.uint8), y=np.arange(9) % 2)
    code, _, err = call("eval", "three", "--data", "two.npz", "--set", "data.val_fraction=0.5")
    assert code == 2
    assert "knows the classes 0, 1, 2; the data has 0, 1" in err


def test_an_unreadable_image_is_named_and_skipped_on_request(call, arrays, tmp_path):
    call("train", "--data", arrays / "two.npz", "--val-fraction", 0.2, "--epochs", 1, "--out", "run")
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = next((arrays / "images" / "val" / "dark").iterdir())
    code, _, err = call("predict", "run", "broken.png", good)
    assert code == 2
    assert "broken.png" in err
    code, out, err = call("predict", "run", "broken.png", good, "--skip-bad", "--json")
    assert code == 0
    assert "skipped: " in err
    assert len(json.loads(out)["images"]) == 1


def test_lists_and_doctor(call):
    for words, name in (
        (["list"], "resnet50"),
        (["list", "--schemes"], "gn"),
        (["list", "--recipes"], "cifar10"),
        (["list", "--recipes"], "NAME-quick"),
    ):
        code, out, _ = call(*words)
        assert code == 0
        assert name in out
    tables = json.loads(call("list", "--json")[1])
    assert set(tables) == {"models", "schemes", "recipes", "data"}
    assert all(text for table in tables.values() for text in table.values())
    facts = json.loads(call("doctor", "--json")[1])
    assert "kernels in C" in facts["devices"]
    assert facts["versions"]["torch"]
    assert call("--version")[1].startswith("anybatch ")


def test_a_full_disk_keeps_the_rows_and_says_so(call, arrays, monkeypatch):
    from anybatch import rows

    append = rows.append

    def full(path, row):
        if path.read_bytes().count(b"\n") if path.exists() else 0:
            raise OSError(28, "No space left on device", str(path))
        append(path, row)

    monkeypatch.setattr(rows, "append", full)
    words = ["compare", "--data", arrays / "two.npz", "--schemes", "gn", "-b", 16, "--seeds", 2, "--epochs", 1]
    code, _, err = call(*words, "--out", "study")
    assert code == 2
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert len(rows.read(Path("study/rows.jsonl"))) == 1
