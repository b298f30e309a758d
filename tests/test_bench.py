"""Benchmarks refuse what is wrong, and tell what they measured; no test looks at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anybatch import bench, cli, dispatch
from anybatch.bench import cases, choice, layers, networks, runner, settings, targets, timing
from anybatch.bench.cell import Cell, Checked
from anybatch.bench.figure import figure
from anybatch.bench.tables import comparison, line, speed_page
from anybatch.kernels import fused_kn_conv

ROOT = Path(__file__).parents[1]
WORDS = ["--quick", "--repeats", "1", "--contiguous", "--batch-sizes", "1"]


@pytest.fixture(autouse=True)
def _eager_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds, and the allocator's settings would stay with the tests that follow."""
    monkeypatch.setattr(timing, "settle_allocator", lambda: False)
    made = choice.settings

    def eager(**given: Any) -> choice.Settings:
        chosen = made(**{"device": "cpu", **given})
        object.__setattr__(chosen, "modes", ("eager",))
        object.__setattr__(chosen, "helpers", False)
        return chosen

    monkeypatch.setattr(bench, "settings", eager)


def call(capsys: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["anybatch", "bench", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    return ended.value.code or 0, told.out, told.err  # pyright: ignore[reportReturnType]


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    words_ = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)]
    return subprocess.run(
        words_, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def quick(**given: Any) -> list[bench.Row]:
    return runner.run(bench.settings(quick=True, repeats=1, batch_sizes=[1], channels_last=False, **given))


def test_a_bench_leaves_rows_a_table_and_a_figure(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, out, err = call(capsys, monkeypatch, *WORDS, "--cases", "norm,agc", "--schemes", "gn", "--out", tmp_path)
    assert code == 0, err
    assert "rows: " in out
    (file,) = tmp_path.glob("*.jsonl")
    assert file == runner.file_in(tmp_path, torch.device("cpu"))
    found = runner.read(file)
    assert file.with_suffix(".png").stat().st_size > 1000
    (gn,) = (row for row in found if row["variant"] == "gn")
    assert (gn["case"], gn["status"], gn["baseline"], gn["clock"]) == ("norm", "ok", "bn", "cpu")
    assert gn["ratio"] is not None
    assert gn["ratio"] > 0
    assert gn["error"] is not None
    assert gn["allowed"] is not None
    assert gn["error"] <= gn["allowed"]
    assert gn["saved_bytes"]
    assert {row["variant"] for row in found if row["case"] == "agc"} >= {"agc", "loop"}
    assert not any(targets.TARGETS[i].takes(row) for row in found for i in range(len(targets.TARGETS)))  # tiny shapes


def test_json_is_one_object_and_rows_add_up(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "here.jsonl"
    for _ in range(2):
        code, out, err = call(capsys, monkeypatch, *WORDS, "--cases", "accuracy", "--json", "--out", path)
        assert code == 0, err
        told = json.loads(out)
        assert told["file"] == str(path)
        assert {row["case"] for row in told["rows"]} == {"accuracy"}
    assert path.read_bytes().count(b"\n") == 2 * len(told["rows"])
    assert len(runner.read(path)) == len(told["rows"])  # of each measurement the last
    assert all(row["value"] < 1e-2 for row in told["rows"])


def test_whole_steps_and_inference_have_speed_and_memory() -> None:
    found = {(row["case"], row["variant"]): row for row in quick(cases=["step", "inference"], schemes=["kn(p=0)"])}
    plain = {("inference", f"{name}, not folded") for name in ("bn", "kn(p=0)")}
    assert found.keys() == {(case, name) for case in ("step", "inference") for name in ("bn", "kn(p=0)")} | plain
    for (case, _), row in found.items():
        assert row["status"] == "ok", row["message"]
        assert row["images_per_second"] is not None
        assert (row["peak_bytes"] is not None) == (row["saved_bytes"] is not None) == (case == "step")
    step = found["step", "kn(p=0)"]
    assert step["saved_ratio"] is not None
    assert step["saved_ratio"] < 1.5
    assert step["saved_bytes"] is not None
    assert step["peak_bytes"] is not None
    assert step["peak_bytes"] > step["saved_bytes"]


def test_filters_of_a_network_are_checked_and_timed() -> None:
    found = {row["variant"]: row for row in quick(cases=["weight_standardize"])}
    assert {"ws", "sws", "ws, in evaluation", "as timm", "as published"} < found.keys()
    assert all(row["status"] == "ok" for row in found.values()), [row["message"] for row in found.values()]
    assert found["ws"]["baseline"] == "a step with bn"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "norms"], "unknown case 'norms'; did you mean norm"),
        (["--models", "resnet81"], "unknown model 'resnet81'; did you mean resnet8"),
        (["--schemes", "bn,gm"], "unknown part 'gm'"),
        (["--precision", "bf16"], "unknown precision 'bf16'; did you mean bf16-mixed"),
        (["--batch-sizes", "two"], "--batch-sizes takes whole numbers"),
        (["--batch-sizes", "0"], "batch_sizes must be 1 or more"),
        (["--device", "tpu"], "device='tpu'"),
        (["--repeats", "0"], "--repeats"),
        (["--device", "cpu", "--autotune"], "autotune tunes Triton kernels, which run on CUDA; device='cpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    code, out, err = call(capsys, monkeypatch, *words, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


class _Slightly(nn.Module):
    """A normalization that is wrong where a kernel runs and right where a reference does."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from anybatch.dispatch import current

        return x * (1 if current() == "reference" else 1 + self.off)


@pytest.mark.parametrize(("off", "status"), [(0.0, "ok"), (1e-3, "refused"), (float("nan"), "refused")])
def test_what_disagrees_with_float64_is_refused(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, off: float, status: str
) -> None:
    right = layers._norm
    monkeypatch.setattr(
        layers, "_norm", lambda spec, channels: right(spec, channels) if spec == "bn" else _Slightly(off)
    )
    words = [*WORDS, "--cases", "norm", "--schemes", "gn", "--json", "--out", tmp_path / "rows.jsonl"]
    code, out, _ = call(capsys, monkeypatch, *words)
    assert code == (0 if status == "ok" else 1)
    bn, gn = json.loads(out)["rows"]
    assert (bn["status"], gn["status"]) == ("ok", status)
    if status == "refused":
        assert gn["seconds"] is None
        assert "relative to float64's" in gn["message"]


def test_steps_with_wrong_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused_kn_conv.pulled_back

    def wrong(*args: Any) -> fused_kn_conv.Gradients:
        found = right(*args)
        return found._replace(weight=None if found.weight is None else 1.001 * found.weight)

    monkeypatch.setattr(fused_kn_conv, "pulled_back", wrong)
    bn, kn = quick(cases=["step"], schemes=["kn(p=0)"])
    assert (bn["status"], kn["status"]) == ("ok", "refused")
    assert str(kn["message"]).startswith("the gradient of the parameters errs by")


def test_what_cannot_run_is_a_row_and_the_others_go_on() -> None:
    found = quick(cases=["norm", "accuracy"], schemes=["gn(groups=7)", "ln"])
    bad = [row for row in found if row["status"] != "ok"]
    assert [row["variant"] for row in bad] == ["gn(groups=7)"]
    assert "groups=7 does not divide" in str(bad[0]["message"])
    assert {row["variant"] for row in found} >= {"bn", "ln", "kn"}


def test_layers_go_both_ways_in_every_case() -> None:
    chosen = settings(device="cpu", cases=["layers"])
    made = list(cases.cells(chosen))
    assert {cell.case for cell in made} == set(choice.LAYERS)
    assert {cell.facts.get("memory_format") for cell in made if cell.case in ("conv", "norm")} == set(choice.FORMATS)
    default = settings(device="cpu")
    assert default.cases == choice.CASES
    assert {net.name for net in default.nets()} == set(choice.NETS)


def test_every_target_is_measured_by_some_default_cell() -> None:
    """With rows for every default cell no target of the CPU is left out."""
    chosen = settings(device="cpu")
    made: list[dict[str, Any]] = []
    for cell in cases.cells(chosen):
        for variant, mode in [*cell.build, *((name, "eager") for name in cell.values)]:
            row: dict[str, Any] = dict(runner._blank(cell, chosen, (variant, mode)))
            made.append(row | {"ratio": 1.0, "value": 1.0, "saved_ratio": 1.0})
    left = [one.target.what for one in bench.judged(made) if one.measured is None and not one.target.gpu]
    assert left == []
    assert all(one.measured is None for one in bench.judged(made) if one.target.gpu)


def _row(variant: str, ratio: float, **more: Any) -> dict[str, Any]:
    cell = Cell("conv", {"shape": "64-64 3x3 at 56", "batch_size": 2, "memory_format": "channels_last"}, {})
    row: dict[str, Any] = dict(runner._blank(cell, settings(device="cpu"), (variant, "eager")))
    return row | {"ratio": ratio, "quartiles": (ratio, ratio), "seconds": ratio / 1000, "baseline": "bn"} | more


def test_targets_take_the_faster_mode_and_mark_what_falls_short() -> None:
    rows = [
        _row("kn(p=0)", 1.5),
        _row("kn(p=0)", 1.0, mode="helpers"),
        _row("kn", 1.2),
        _row("kn", 0.1, status="refused"),
    ]
    by_what = {one.target.what: one for one in bench.judged(rows)}
    assert by_what["KNConv + ReLU, p = 0"].measured == pytest.approx(1.0)
    assert by_what["KNConv + ReLU, p = 0"].mark == "must"
    assert by_what["KNConv + ReLU, p > 0"].mark == "short"
    assert by_what["KNConv + ReLU, worst shape"].measured == pytest.approx(1.2)
    assert by_what["GN + ReLU, contiguous"].mark == "not measured"


def test_the_page_of_speed_is_made_of_rows(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    written = [_row("kn(p=0)", 1.5), _row("kn", 1.1), _row("gn", 1.0, status="failed", message="no reason | at all")]
    for row in written:
        runner.rows.append(tmp_path / "rows" / "cpu-a.jsonl", row)
    runner.rows.append(tmp_path / "rows" / "cpu-b.jsonl", _row("kn", 1.3, machine="cpu-b", device="CPU, B, 8 cores"))
    done = script("speed.py", "--rows", tmp_path / "rows", "--out", tmp_path / "speed.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "speed.md").read_text(encoding="utf-8")
    files = [tmp_path / "rows" / f"cpu-{name}.jsonl" for name in "ab"]
    assert text == speed_page({file.stem: runner.read(file) for file in files}, "anybatch bench --out benchmarks/rows")
    assert "| KNConv + ReLU, p = 0 | 1.4 | ≤ 1.08 | ≤ 0.97 | 1.5 |  | **falls short** |" in text
    assert "| KNConv + ReLU, p > 0 | 1.8 | ≤ 1.12 | ≤ 1 | 1.1 |  | holds |" in text
    assert (
        "| KNConv + ReLU, p > 0 | 1.8 | ≤ 1.12 | ≤ 1 | 1.3 |  | **falls short** |"
        in text.split("### CPU, B, 8 cores, 1 thread")[1]
    )
    assert "Nothing was measured on a GPU" in text
    whatever = [dict(row, machine="cpu-a") for row in written]
    assert "| KNConv + ReLU, p = 0 |" in speed_page({"mine": whatever, "empty": []}, "a command")  # a file of any name
    assert "no reason \\| at all" in text


def test_rows_of_tuned_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, plain, older = _row("kn", 1.0), _row("kn", 1.0), _row("kn", 1.0)
    tuned["autotuned"] = True
    del older["autotuned"]
    assert [line(row)[3] for row in (tuned, plain, older)] == ["eager, autotuned", "eager", "eager"]
    assert "| kn | eager, autotuned |" in speed_page({"a-gpu": [tuned]}, "a command")
    assert tuned["id"] == plain["id"]  # so that two files can be compared


@pytest.mark.parametrize("content", ["garbage\n", "my notes", '{"format": 99}\n', "[]\n", '{"format": 1, "mine": 2}'])
def test_a_file_of_something_else_is_refused_before_anything_is_measured(
    content: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text(content, encoding="utf-8")
    monkeypatch.setattr(runner, "_rows", lambda *_: pytest.fail("it measures"))
    code, _, told = call(capsys, monkeypatch, *WORDS, "--cases", "norm", "--schemes", "gn", "--out", file)
    assert code == 2
    assert "is not a row" in told
    assert file.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cases", ","], "--cases takes names separated by commas, got ','; leave it out for the default"),
        (["--schemes", ""], "--schemes takes names"),
        (["--models", " , "], "--models takes names"),
        (["-b", ","], "--batch-sizes takes whole numbers"),
        (["-b", str(2**31)], "batch_sizes must be below 2^31"),
        (["--threads", "9999999"], "threads=9999999 are more than this machine has processors"),
        (["--precision", ""], "unknown precision ''"),
    ],
)
def test_what_says_nothing_or_too_much_is_refused(
    words: list[str], told: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, error = call(capsys, monkeypatch, *words)
    assert code == 2
    assert told in " ".join(error.split())


def test_the_page_tells_what_was_not_measured_on_a_gpu() -> None:
    row = dict(_row("kn", 1.0), machine="nvidia-a")
    left = [case for case in choice.CASES if case != row["case"]]
    told = f"Not measured there: {', '.join(left)}; `a command --cases {','.join(left)}` does it."
    assert told in speed_page({"a": [row]}, "a command")
    everything = [dict(row, case=case) for case in choice.CASES]
    for rows in (everything, [dict(row, machine="cpu-a")]):
        assert "Not measured there" not in speed_page({"a": rows}, "a command")


@pytest.mark.parametrize("autotune", [False, True])
def test_kernels_are_tuned_within_a_run_alone(autotune: bool) -> None:
    chosen = replace(settings(device="cpu"), autotune=autotune)
    with runner._surroundings(chosen):
        assert dispatch.autotunes() == autotune
    assert not dispatch.autotunes()


@pytest.mark.parametrize(
    ("draws", "status", "count"),
    [
        ([("output", 2.0)], 2.0, 1),
        ([("gradient of the parameters", 0.5)], 0.5, 1),
        ([("gradient of the parameters", 3.0), ("gradient of the parameters", 0.5)], 0.5, 2),
        ([("gradient of the parameters", 3.0), ("output", 2.0)], 2.0, 2),
        ([("gradient of the parameters", 3.0 + i) for i in range(5)], 3.0, 5),
    ],
    ids=["output", "right", "right in the second draw", "output in the second draw", "wrong in all"],
)
def test_gradients_may_agree_in_a_later_draw_and_outputs_must_in_each(
    draws: list[tuple[str, float]], status: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def check(_: Any, __: Any, ___: Any, x: torch.Tensor, labels: Any) -> Checked:
        seen.append(x)
        what, error = draws[len(seen) - 1]
        return Checked(error, 1.0, what)

    monkeypatch.setattr(networks, "_one_check", check)
    x = torch.zeros(3, 1, 4, 4)
    found = networks._net_check(settings(device="cpu"), nn.Identity(), "eager", x, torch.arange(3))
    assert (found.error, len(seen)) == (status, count)
    assert len({tuple(one.flatten().tolist()) for one in seen}) == count, "images came twice"


def test_two_files_are_compared(tmp_path: Path) -> None:
    for name, ratio in (("a", 2.0), ("b", 1.0)):
        runner.rows.append(tmp_path / f"{name}.jsonl", _row("kn", ratio))
        runner.rows.append(tmp_path / f"{name}.jsonl", _row(f"only {name}", ratio))
    done = script("compare.py", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert done.returncode == 0, done.stderr
    heading, only = done.stdout.splitlines()
    assert heading.split()[:3] == ["case", "of", "variant"]
    assert only.split()[-5:] == ["2", "1", "0.5", "0.5", "–"]
    done = script("compare.py", tmp_path / "a.jsonl", tmp_path / "none.jsonl")
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert comparison([_row("kn", 1.0)], [_row("gn", 1.0)]) == []


def test_a_file_of_other_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"format": 1}\n{"format": 1}\n')
    done = script("compare.py", tmp_path / "rows.jsonl", tmp_path / "rows.jsonl")
    assert done.returncode == 2
    assert "line 1 of" in done.stderr


def test_the_figure_draws_bars_or_nothing() -> None:
    assert figure([]) is None
    assert figure([_row("bn", 1.0)]) is None
    drawn = figure([_row("kn", 1.2), _row("kn(p=0)", 0.9)])
    assert drawn is not None
    assert len(drawn.axes[0].patches) == 2


def test_the_script_needs_torch_alone(tmp_path: Path) -> None:
    code = (
        "import sys, runpy\n"
        "for name in ('pydantic', 'typer', 'rich', 'lightning', 'matplotlib', 'sklearn', 'torchvision', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['run.py', '--quick', '--repeats', '1', '--cases', 'accuracy', '--out', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'run.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert runner.read(runner.file_in(tmp_path, torch.device("cpu")))


def test_rounds_time_every_variant_and_prepare_it() -> None:
    prepared: list[int] = []
    done: list[str] = []
    works = {
        "a": timing.Work(lambda: done.append("a")),
        "b": timing.Work(lambda: done.append("b"), before=lambda: prepared.append(len(done))),
    }
    times = timing.interleaved(works, clock="wall", repeats=5, least=0)
    assert {name: len(found) for name, found in times.items()} == {"a": 5, "b": 5}
    assert done.count("b") == len(prepared) == 7
    assert timing.ratio([2.0], [1.0]) == (2.0, (2.0, 2.0))


def test_peak_counts_what_was_freed_again() -> None:
    def run() -> None:
        a = torch.zeros(1 << 20)
        b = a + 1
        del a
        b.sum()

    assert timing.peak_bytes(run, torch.device("cpu")) in range(8 << 20, (8 << 20) + 4096)


_FAULTS = """
import resource
import torch
from anybatch.bench.timing import settle_allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        x = torch.ones(10 << 20)  # 40 MiB, more than glibc keeps by itself
        for _ in range(3):
            x = x + 1
        del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
before = faults()
assert settle_allocator()
print(before, min(faults() for _ in range(20)))  # a small block may come to lie so that a large one no longer fits
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc to be told")
def test_a_settled_process_fetches_no_memory_again() -> None:
    told = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True).stdout
    before, after = map(int, told.split())
    assert after < 100 < before


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_the_time_of_python_is_told_without_a_gpu() -> None:
    done = script("host.py", "--repeats", 2)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert names == ["bn", "kn(p=0)", "kn", "kn(groups=32)", "gn", "bcn", "pn", "frn", "lcn"]
    ratios = [float(line.split()[-1]) for line in done.stdout.splitlines()[1:]]
    assert ratios[0] == 1
    assert min(ratios) > 0
    wrong = script("host.py", "--repeats", 0)
    assert wrong.returncode == 2
    assert "--repeats must be 1 or more, got 0" in wrong.stderr
