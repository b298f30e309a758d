"""Studies: what is run, what is left after an interruption, and what happens to a run that fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from anybatch import recipes, rows, study
from anybatch.study import Study


def small(**changes):
    values = {
        "base": recipes.quick(recipes.digits()),
        "schemes": ["bn", "gn"],
        "batch_sizes": [8, 32],
        "seeds": [0, 1],
        "tune": 0,
    }
    return Study.make(**{**values, **changes})


def test_a_study_is_written_and_read(tmp_path):
    (tmp_path / "s.yaml").write_text(small(tune=3).to_yaml())
    assert Study.read(tmp_path / "s.yaml") == small(tune=3)


def test_the_grid_by_hand():
    runs = small().runs({})
    assert len({recipe.id for recipe in runs}) == 8
    told = [(r.data.batch_size, r.model.scheme, r.train.seed) for r in runs]
    assert told == [(b, s, seed) for b in (8, 32) for s in ("bn", "gn") for seed in (0, 1)]
    assert runs[0].peak_lr == pytest.approx(recipes.digits().optim.lr / 4)  # linear in the batch, meant for 32


def test_trials_share_one_budget_and_never_see_the_evaluation_images():
    s = small(tune=3)
    for scheme, size in s.cells():
        trials = s.trials(scheme, size)
        base = s.base.optim.lr
        assert [t.optim.lr for t in trials] == pytest.approx([base / 2, base, base * 2])
        assert all(t.data.holdout == study.TUNE_HOLDOUT and t.train.seed not in s.seeds for t in trials)


def test_the_lowest_error_then_the_lowest_loss_chooses():
    s = small(tune=3)
    low, mid, high = s.trials("gn", 8)

    def row(recipe, error, loss):
        return {"error": error, "curve": [{"val_loss": loss}], "recipe": recipe.model_dump(mode="json")}

    assert s.chosen_lr("gn", 8, {}) == s.base.optim.lr
    done = {low.id: row(low, 0.1, 0.5), mid.id: row(mid, 0.1, 0.4), high.id: row(high, None, None)}
    assert s.chosen_lr("gn", 8, done) == mid.optim.lr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schemes": []}, "schemes"),
        ({"schemes": ["bn", "bn"]}, "schemes: .*twice"),
        ({"batch_sizes": [2, 2]}, "batch_sizes: .*twice"),
        ({"tune": -1}, "tune"),
        ({"sedes": [1]}, "sedes"),
    ],
)
def test_wrong_studies_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_what_cannot_work_is_told_before_anything_runs():
    with pytest.raises(ValueError, match="groups=32 does not divide 16 channels"):
        study.check(small(base=recipes.quick(recipes.digits()).replace({"model.options": {}})))
    with pytest.raises(ValueError, match=r"more than the 64 training images|larger than the 64 training images"):
        study.check(small(batch_sizes=[2, 128]))
    with pytest.raises(ValueError, match=r"more than the 51 training images|larger than the 51 training images"):
        study.check(small(batch_sizes=[60], tune=2))
    with pytest.raises(ValueError, match="unknown part"):
        study.check(small(schemes=["bm"]))
    with pytest.raises(ValueError, match="one device each"):
        study.check(small(base=recipes.quick(recipes.digits()).replace({"train.devices": 2})))


def test_a_study_runs_continues_and_repeats(tmp_path):
    s = small(schemes=["bn", "gn"], batch_sizes=[32], seeds=[0, 1], tune=2)
    done = study.run(s, tmp_path, jobs=2)
    assert [row["purpose"] for row in done] == ["tune"] * 4 + ["run"] * 4
    assert all(row["status"] == "ok" for row in done)
    assert all(row["data"]["val_images"] == 13 for row in done[:4])  # a fifth of 64 training images, set aside
    assert all(row["data"]["val_images"] == 64 for row in done[4:])

    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-1][: len(lines[-1]) // 2])  # killed while it wrote
    again = study.run(s, tmp_path, jobs=2)
    assert len(rows.read(path)) == 8
    before = {row["id"]: row for row in done}
    for row in again:
        assert row["curve"] == before[row["id"]]["curve"]  # a study repeats exactly, whatever ran beside it
    started = {row["started"] + str(row["seconds"]) for row in done}
    assert sum(row["started"] + str(row["seconds"]) not in started for row in again) == 2


def test_a_failing_cell_becomes_a_row_and_the_rest_goes_on(tmp_path):
    base = recipes.quick(recipes.digits()).replace({"optim.lr": 1e7, "optim.lr_scaling": "none"})
    done = study.run(small(base=base, schemes=["none", "bn"], batch_sizes=[8], seeds=[0]), tmp_path, jobs=1)
    failed, other = done
    assert failed["status"] == "failed"
    assert "the loss became" in failed["message"]
    assert other["recipe"]["model"]["scheme"] == "bn"
    again = study.run(
        small(base=base, schemes=["none", "bn"], batch_sizes=[8], seeds=[0]), tmp_path, jobs=1, retry_failed=True
    )
    assert len(again) == 2
    assert sum(row["id"] == failed["id"] for row in rows.read(tmp_path / "rows.jsonl")) == 2


@pytest.mark.slow
def test_a_killed_worker_is_a_row_too(tmp_path):
    s = small(schemes=["gn"], batch_sizes=[1], seeds=[0, 1], base=recipes.digits())

    def kill(event):
        if event.kind == "progress" and not killed:
            import multiprocessing

            killed.append(True)
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killed = []
    done = study.run(s, tmp_path, jobs=1, on_event=kill)
    assert killed
    assert [row["status"] for row in done] == ["failed", "ok"]
    assert "ended abruptly" in done[0]["message"]


def test_another_study_in_the_folder_is_refused(tmp_path):
    study.claim(small(), tmp_path)
    study.claim(small(), tmp_path)
    with pytest.raises(ValueError, match=r"holds another study \(tune is 0 there and 1 here\)"):
        study.claim(small(tune=1), tmp_path)


def test_rows_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "report.html").write_text("precious")
    with pytest.raises(ValueError, match=r"not empty and holds no study\.yaml"):
        study.claim(small(), tmp_path)


def test_two_at_once_are_refused(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process"):
        study.run(small(), tmp_path)


def wait_for_rows(path, count, process):
    for _ in range(2400):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no rows after four minutes")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_command_leaves_whole_rows_and_continues(tmp_path, sent):
    out = tmp_path / "study"
    command = [sys.executable, "-m", "anybatch.cli", "compare", "--schemes", "gn", "--batch-sizes", "2,32"]
    command += ["--seeds", "2", "--epochs", "1", "--out", str(out), "--json", "--jobs", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    )
    with process:
        try:
            wait_for_rows(out / "rows.jsonl", 1, process)
            process.send_signal(sent)
            _, told = process.communicate(timeout=240)
        finally:
            process.kill()
    if sent != signal.SIGKILL:
        assert process.returncode == 130
        assert "the same command goes on from there" in told
        assert "Traceback" not in told
        assert (out / "report.html").exists()
    before = len(rows.read(out / "rows.jsonl"))
    assert 1 <= before < 4
    again = subprocess.run(command, capture_output=True, text=True, timeout=480, check=True)
    summary = json.loads(again.stdout)
    assert len(summary["cells"]) == 2
    assert all(
        cell["n"] == 2 and cell["mean"] is not None and cell["interval"] is not None for cell in summary["cells"]
    )
    ids = [row["id"] for row in rows.read(out / "rows.jsonl")]
    assert len(ids) == len(set(ids)) == 4
