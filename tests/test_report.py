"""Statistics by hand, verdicts that claim what they may, and the files of a report."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from anybatch import report
from anybatch.report.statistics import difference, estimate
from rows_factory import make_row, make_rows

CLEAR = {
    "bn": {1: [0.50, 0.52, 0.51], 32: [0.050, 0.052, 0.051]},
    "ws+gn": {1: [0.040, 0.042, 0.041], 32: [0.041, 0.042, 0.040]},
}
MIXED = {
    "bn": {1: [None, None, 0.5], 2: [0.07, 0.06, 0.08], 32: [0.05, 0.05, 0.06]},
    "none": {1: [None, None, None], 2: [0.89, 0.9, 0.91]},
    "gn": {2: [0.05, 0.05, 0.05], 32: [0.05]},
}
STUDIES = {
    "clear": CLEAR,
    "mixed": MIXED,
    "all failed": {"bn": {2: [None, None]}},
    "one seed": {"bn": {1: [0.5], 2: [0.1]}, "gn": {1: [0.05], 2: [0.05]}},
    "one batch size": {"bn": {4: [0.3, 0.31]}, "gn": {4: [0.2, 0.22]}},
    "one scheme": {"bn": {1: [0.3, 0.31], 32: [0.2, 0.22]}},
    "no errors": {"bn": {1: [0.0, 0.0], 2: [0.0, 0.0]}},
    "many schemes": {
        "bn": {1: [0.5, 0.52, 0.51], 32: [0.05, 0.052, 0.051]},
        **{f"scheme{i}": {1: [0.05, 0.06, 0.055], 32: [0.05, 0.06, 0.055]} for i in range(7)},
    },
    "nothing": {},
}


def cell(summary: report.Summary, scheme: str, batch: int) -> report.Cell:
    return next(c for c in summary["cells"] if (c["scheme"], c["batch_size"]) == (scheme, batch))


def verdict(study, **options) -> str:
    return "\n".join(report.summarize(make_rows(study, **options))["verdict"])


def test_many_schemes_are_told_in_a_few_sentences():
    said = report.summarize(make_rows(STUDIES["many schemes"]))["verdict"]
    assert len(said) == 4
    steady = ", ".join(f"scheme{i}" for i in range(1, 6)) + " and scheme6"
    assert said[0].startswith(f"At batch 1, {steady} cannot be told apart from scheme0, the lowest mean at 5.5 %")
    assert said[0].endswith("points more than scheme0.")
    assert "bn errs 45.5 ± " in said[0]
    assert said[2].startswith("bn loses 45.9 ± ")
    assert said[3].startswith("scheme0 (")
    assert "and scheme6 (" in said[3]
    assert "show no loss at batch 1: each stays within so many points of its own batch 32" in said[3]


def test_interval_of_three_seeds_by_hand():
    # errors 4, 5 and 6 %: mean 5, s = 1, t(0.975, 2 degrees of freedom) = 4.3027; so many images that they add nothing
    found = cell(report.summarize(make_rows({"gn": {2: [0.04, 0.05, 0.06]}}, val_images=10**12)), "gn", 2)
    assert found["mean"] == pytest.approx(5)
    assert found["sd"] == pytest.approx(1)
    assert found["interval"] == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert found["errors"] == pytest.approx([4, 5, 6])


def test_evaluation_images_widen_the_interval_by_hand():
    # 2 wrong of 96, as 4 of 100: 4 % x 96 % = 384 points²; over 96 images and 2 seeds, 2 points²
    found = estimate([200 / 96, 200 / 96], 96)
    assert found.images == pytest.approx(2)
    assert found.half_width() == pytest.approx(1.959964 * math.sqrt(2), rel=1e-6)
    spread = estimate([200 / 96 - 1, 200 / 96 + 1], 96)  # s² / n = 1, t(0.975, 1) = 12.7062
    assert spread.half_width() == pytest.approx(math.hypot(12.7062, 1.959964 * math.sqrt(2)), rel=1e-5)


def test_difference_is_welchs_t_where_images_add_nothing():
    a, b = [4.0, 5.0, 6.5, 4.2], [7.0, 7.1, 7.4]
    found, half = difference(estimate(a, 10**12), estimate(b, 10**12))
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found - half, found + half) == pytest.approx((low, high), abs=1e-4)


def test_more_comparisons_ask_for_more():
    a, b = estimate([4, 5, 6], 1000), estimate([7, 8, 8.5], 1000)
    halves = [difference(a, b, comparisons=count)[1] for count in (1, 3, 10)]
    assert halves == sorted(halves)
    assert difference(a, b, level=1 - 0.05 / 3)[1] == pytest.approx(halves[1])


def test_seeds_that_agree_are_not_certain():
    # 4.0 and 4.4 % of 1000 images differ by 4 images
    summary = report.summarize(make_rows({"bn": {2: [0.044] * 3}, "gn": {2: [0.04] * 3}}))
    assert cell(summary, "gn", 2)["interval"] > 0.5
    assert not summary["between_schemes"][0]["distinct"]
    none = report.summarize(make_rows({"bn": {2: [0.001] * 3}, "gn": {2: [0.0] * 3}}))
    assert cell(none, "gn", 2)["interval"] > 0
    assert "cannot be told apart" in none["verdict"][0]


def test_verdict_claims_a_clear_difference():
    said = verdict(CLEAR)
    assert re.search(r"At batch 1, ws\+gn has the lowest error, 4\.1 %: bn errs 46\.9 ± \d\.\d points more\.", said)
    assert re.search(r"bn loses 45\.9 ± \d\.\d points at batch 1 against its own batch 32\.", said)
    assert "ws+gn shows no loss at batch 1: it stays within" in said
    assert "is not ruled out" in said


def test_verdict_tells_ties_and_how_large_the_difference_may_be():
    said = verdict({"gn": {2: [0.044, 0.040, 0.047]}, "ws+gn": {2: [0.037, 0.041, 0.036]}})
    assert re.fullmatch(
        r"At batch 2, ws\+gn and gn cannot be told apart \(3\.8 % and 4\.4 %, 0\.6 ± \d\.\d points apart\)\.", said
    )


def test_verdict_names_ties_and_losers_together():
    study = {"bn": {2: [0.5, 0.51, 0.52]}, "gn": {2: [0.044, 0.040, 0.047]}, "ws+gn": {2: [0.037, 0.041, 0.036]}}
    assert re.search(
        r"ws\+gn and gn cannot be told apart .*; bn errs 47\.2 ± \d\.\d points more than ws\+gn\.", verdict(study)
    )
    summary = report.summarize(make_rows(study))
    assert {c["scheme"]: c["best"] for c in summary["cells"]} == {"bn": False, "gn": True, "ws+gn": True}


def test_verdict_says_where_a_small_batch_is_better():
    assert "gn gains 5.0 ±" in verdict({"gn": {1: [0.05, 0.05, 0.05], 32: [0.10, 0.10, 0.10]}})


def test_wide_scatter_claims_nothing():
    said = verdict({"bn": {1: [0.25, 0.40, 0.55]}, "gn": {1: [0.15, 0.16, 0.15]}})
    assert "cannot be told apart" in said


def test_one_seed_claims_nothing():
    summary = report.summarize(make_rows(STUDIES["one seed"]))
    assert summary["verdict"][0].startswith("No difference is claimed: one seed in each cell")
    assert not summary["between_schemes"]
    assert not summary["against_largest"]
    assert cell(summary, "bn", 1)["interval"] is None
    assert not any(c["best"] for c in summary["cells"])


def test_one_seed_in_one_cell_leaves_that_cell_out():
    said = verdict({"bn": {2: [0.5, 0.51]}, "gn": {2: [0.04, 0.041]}, "in": {2: [0.9]}}, classes=["a"] * 100)
    assert "At batch 2, in finished one seed only" in said
    assert "gn has the lowest error" in said


def test_failed_runs_are_named_and_their_cell_has_no_number():
    summary = report.summarize(make_rows(MIXED))
    said = "\n".join(summary["verdict"])
    assert (
        "bn at batch 1 failed in 2 of 3 runs: the loss is not a number. Its mean is over the runs that finished" in said
    )
    assert "none at batch 1 failed in 3 of 3 runs" in said
    assert cell(summary, "none", 1)["mean"] is None
    assert cell(summary, "bn", 1)["failed"] == [
        {"seed": seed, "message": "the loss is not a number"} for seed in (0, 1)
    ]
    assert summary["runs"]["failed"] == 5
    assert "bn loses" not in said


def test_errors_near_guessing_are_called_so():
    assert "none at batch 2 errs 90.0 %, close to guessing (90.0 %)." in verdict(MIXED)
    assert "guessing" not in verdict(CLEAR)


def test_a_row_that_repeats_a_run_replaces_it():
    rows = [make_row("gn", 2, 0, None), make_row("gn", 2, 1, 0.05), make_row("gn", 2, 0, 0.04)]
    found = cell(report.summarize(rows), "gn", 2)
    assert found["failed"] == []
    assert found["errors"] == pytest.approx([4, 5])


def test_order_of_schemes_and_batch_sizes():
    summary = report.summarize(make_rows({"ws+gn": {32: [0.1], 2: [0.1]}, "bn": {8: [0.1]}}))
    assert summary["schemes"] == ["ws+gn", "bn"]
    assert summary["batch_sizes"] == [2, 8, 32]


def test_tuning_is_listed_and_kept_out_of_the_cells():
    trials = [
        make_row("gn", 2, 0, error, purpose="tune", changes={"optim.lr": lr}) for lr, error in ((0.1, 0.2), (0.2, None))
    ]
    summary = report.summarize([*trials, *make_rows({"gn": {2: [0.04, 0.05]}})])
    assert [(t["peak_lr"], t["error"], t["chosen"]) for t in summary["tuning"]] == [
        (0.1 / 16, pytest.approx(20), True),
        (0.2 / 16, None, False),
    ]
    assert cell(summary, "gn", 2)["n"] == 2
    assert summary["runs"]["failed"] == 0


def test_settings_tell_what_is_shared_and_what_differs():
    rows = [make_row("gn", 2, 0, 0.05), make_row("bn", 2, 0, 0.05, changes={"optim.lr": 0.2})]
    settings = report.summarize(rows)["settings"]
    assert settings["varied"] == {"optim.lr": [0.1, 0.2]}
    assert settings["recipe"]["schedule.epochs"] == 8
    assert "model.scheme" not in settings["recipe"]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_schemes_are_rarely_told_apart(seeds):
    """Three schemes alike, on the same 500 images in every study: at most 1 study in 20 may claim a difference."""
    generator = np.random.default_rng(seeds)
    studies, claims = 300, 0
    for _ in range(studies):
        wrong = 1 / (1 + np.exp(-(2.5 * generator.normal(size=500) - 5)))  # each image's chance to be missed
        draws = generator.random((3, seeds, 500)) < np.clip(wrong * generator.lognormal(0, 0.2, (3, seeds, 1)), 0, 1)
        cells = [estimate(list(100 * runs.mean(axis=1)), 500) for runs in draws]
        found = [difference(a, b, comparisons=3) for a, b in zip(cells, [*cells[1:], cells[0]], strict=True)]
        claims += any(abs(value) > half for value, half in found)
    assert claims <= stats.binom.ppf(0.999, studies, 0.05)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES.keys())
def test_every_study_gives_all_files(study, tmp_path: Path):
    summary = report.write(make_rows(study), tmp_path / "new" / "out", title="a study", reproduce="anybatch compare")
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["figure.png", "figure.svg", "report.html", "summary.json"]
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary["verdict"]
    assert (
        "nan"
        not in (out / "report.html")
        .read_text(encoding="utf-8")
        .split("<main>")[1]
        .replace("base64", "")
        .split("data:")[0]
    )


def test_the_same_rows_give_the_same_bytes(tmp_path: Path):
    for name in "ab":
        report.write(make_rows(MIXED), tmp_path / name, title="a study", reproduce="anybatch compare")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_failed_write_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    report.write(make_rows(CLEAR), tmp_path, title="old", reproduce="x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write(make_rows(MIXED), tmp_path, title="new", reproduce="x")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


HOSTILE = "<script>alert('x')</script>$\\frac{\n&\"--> ünï"


def test_page_escapes_what_it_is_given(tmp_path: Path):
    rows = [
        make_row(HOSTILE, 2, 0, 0.05, classes=[HOSTILE, "b"]),
        make_row(HOSTILE, 2, 1, None, message=HOSTILE),
        make_row("</title><img src=x onerror=alert(1)>", 2, 0, 0.07),
    ]
    report.write(rows, tmp_path, title=HOSTILE, reproduce=HOSTILE, notes=[HOSTILE])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert "<script" not in (tmp_path / "figure.svg").read_text(encoding="utf-8")


def test_page_fetches_nothing(tmp_path: Path):
    report.write(make_rows(MIXED), tmp_path, title="a study", reproduce="see https://example.org")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    targets = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import\s+(\S+)""", page)
    assert targets
    for target in map("".join, targets):
        assert target.startswith(("data:", "#")), target


def test_page_shows_notes_and_failures_and_the_rate_rule(tmp_path: Path):
    notes = ["partial: 12 of 45 runs"]
    report.write(make_rows(MIXED), tmp_path, title="a study", reproduce="anybatch compare --seeds 3", notes=notes)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for expected in (notes[0], "Failed runs", "anybatch compare --seeds 3", "0.1 × (images a step / 32)", "not run"):
        assert expected in page


def test_figure_has_an_axis_for_errors_and_two_for_costs():
    drawn = report.figure(make_rows(CLEAR))
    errors, speed, memory = drawn.axes
    assert errors.get_xscale() == "log"
    assert list(errors.get_xticks()) == [1, 32]
    assert errors.get_yscale() == "log"  # 4 to 51 %
    assert speed.get_title(loc="left") == "training speed (images/s)"
    assert memory.get_title(loc="left") == "peak memory (MiB)"
    curves = {line.get_label(): line for line in errors.get_lines()}
    assert np.asarray(curves["bn"].get_ydata()) == pytest.approx([51, 5.1])
    assert {text.get_text() for text in errors.texts} >= {"bn", "ws+gn"}


def test_figure_is_linear_where_errors_are_alike():
    assert report.figure(make_rows({"gn": {1: [0.2, 0.3], 8: [0.25, 0.3]}})).axes[0].get_yscale() == "linear"


def test_labels_do_not_overlap():
    study = {name: {2: [0.05, 0.05], 8: [0.05, 0.05]} for name in ("bn", "gn", "in", "ln", "ws+gn", "ws+bn", "none")}
    heights = sorted(text.get_position()[1] for text in report.figure(make_rows(study)).axes[0].texts)
    assert len(heights) == 7
    assert min(np.diff(heights)) >= 0.07


def test_missing_cells_leave_gaps():
    curve = next(line for line in report.figure(make_rows(MIXED)).axes[0].get_lines() if line.get_label() == "none")
    assert np.isnan(np.asarray(curve.get_ydata())).tolist() == [True, False, True]
