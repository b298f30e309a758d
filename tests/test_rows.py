"""Rows are added whole or not at all, and read back with nothing dropped silently."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anybatch import rows
from rows_factory import make_row


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


ONE, TWO, THREE = (make_row("gn", batch_size, 0, 0.25) for batch_size in (1, 2, 32))


def test_what_is_appended_is_read_in_order(path: Path) -> None:
    assert rows.read(path) == []
    for row in (ONE, TWO, THREE):
        rows.append(path, row)
    assert rows.read(path) == [ONE, TWO, THREE]
    assert path.read_bytes().count(b"\n") == 3
    assert path.read_bytes().endswith(b"}\n")


def test_texts_with_line_ends_and_other_alphabets_stay_on_one_line(path: Path) -> None:
    row = make_row("gn", 2, 0, None, message="first line\nsecond line\r\u2028 é 数")
    rows.append(path, row)
    rows.append(path, ONE)
    assert rows.read(path) == [row, ONE]


def test_numbers_come_back_exactly(path: Path) -> None:
    row = make_row("gn", 2, 0, 0.1 + 0.2)
    rows.append(path, row)
    assert rows.read(path)[0]["error"] == 0.1 + 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_json_has_not_are_refused_before_the_file_is_touched(path: Path, value: float) -> None:
    rows.append(path, ONE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        rows.append(path, {**TWO, "error": value})
    assert path.read_bytes() == before


# A last line cut off half-way.


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_a_half_written_last_line_is_left_out_and_cut_off(path: Path, kept: int) -> None:
    rows.append(path, ONE)
    whole = path.read_bytes()
    half = json.dumps(TWO).encode()[:kept]
    path.write_bytes(whole + half)
    assert rows.read(path) == [ONE]
    assert rows.repair(path) == f"cut off a half-written last line of {len(half)} bytes in {path}"
    assert path.read_bytes() == whole
    rows.append(path, THREE)
    assert rows.read(path) == [ONE, THREE]


def test_a_half_written_first_line_leaves_an_empty_file(path: Path) -> None:
    path.write_bytes(b'{"format": 1, "id')
    assert rows.read(path) == []
    assert rows.repair(path) is not None
    assert path.read_bytes() == b""


def test_a_line_cut_inside_a_character_is_cut_off(path: Path) -> None:
    rows.append(path, ONE)
    whole = path.read_bytes()
    path.write_bytes(whole + '{"message": "é'.encode()[:-1])
    assert rows.read(path) == [ONE]
    rows.repair(path)
    assert path.read_bytes() == whole


def test_a_whole_last_line_without_its_end_is_kept_and_ended(path: Path) -> None:
    rows.append(path, ONE)
    path.write_bytes(path.read_bytes() + json.dumps(TWO).encode())
    assert rows.read(path) == [ONE, TWO]
    assert rows.repair(path) == f"ended the last line of {path}"
    rows.append(path, THREE)
    assert rows.read(path) == [ONE, TWO, THREE]


def test_repair_leaves_a_whole_file_alone(path: Path) -> None:
    assert rows.repair(path) is None
    assert not path.exists()
    rows.append(path, ONE)
    before = path.read_bytes()
    assert rows.repair(path) is None
    assert path.read_bytes() == before


# Lines before the last.


@pytest.mark.parametrize("bad", [b"garbage", b'{"format": 1}', b"[1]", b'{"half": ', b"\xff\xfe", b"null"])
def test_a_corrupt_line_in_the_middle_is_named(path: Path, bad: bytes) -> None:
    rows.append(path, ONE)
    path.write_bytes(path.read_bytes() + bad + b"\n")
    rows.append(path, TWO)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"line 2 of .*rows\.jsonl is not a row; mend or delete that line"):
        rows.read(path)
    assert rows.repair(path) is None
    assert path.read_bytes() == before


def test_empty_lines_are_passed_over_and_counted(path: Path) -> None:
    rows.append(path, ONE)
    path.write_bytes(b"\n" + path.read_bytes() + b"\n")
    assert rows.read(path) == [ONE]
    path.write_bytes(path.read_bytes() + b"garbage\n")
    with pytest.raises(ValueError, match="line 4 of"):
        rows.read(path)


def test_another_format_is_named(path: Path) -> None:
    rows.append(path, {**ONE, "format": 2})
    with pytest.raises(ValueError, match=r"line 1 of .* has format 2, this version reads 1"):
        rows.read(path)


def test_a_last_line_of_another_format_is_not_cut_off(path: Path) -> None:
    rows.append(path, ONE)
    path.write_bytes(path.read_bytes() + json.dumps({**TWO, "format": 2}).encode())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="has format 2"):
        rows.repair(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("last", [b"my notes", b'{"format": 1, "mine": 2}', b"[1]", b"7"])
def test_a_last_line_that_is_no_row_nor_the_beginning_of_one_is_not_cut_off(path: Path, last: bytes) -> None:
    rows.append(path, ONE)
    path.write_bytes(path.read_bytes() + last)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"line 2 of .* is not a row"):
        rows.repair(path)
    assert path.read_bytes() == before


# A full disk.


def test_a_write_that_ends_half_way_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows.append(path, ONE)
    before = path.read_bytes()
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
        with pytest.raises(OSError, match="No space left on device") as caught:
            rows.append(path, TWO)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    rows.append(path, THREE)
    assert rows.read(path) == [ONE, THREE]


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_an_error_of_the_disk_leaves_the_file_as_it_was(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rows.append(path, ONE)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, name, full)
        with pytest.raises(OSError, match="No space left"):
            rows.append(path, TWO)
    assert path.read_bytes() == before


def test_a_failed_write_takes_no_other_processs_row_along(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows.append(path, ONE)
    write = os.write
    expected = [ONE, TWO]
    code = "import json, pathlib, sys; from anybatch.rows import append; "
    code += "append(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))"

    def after_another_process(file: int, data: bytes) -> int:
        try:
            subprocess.run([sys.executable, "-c", code, str(path), json.dumps(TWO)], timeout=3, check=True)
        except subprocess.TimeoutExpired:  # `append` locks the file, which is as good
            expected.remove(TWO)
        return write(file, data[:10])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", after_another_process)
        with pytest.raises(OSError, match="No space left"):
            rows.append(path, THREE)
    assert rows.read(path) == expected


# Several processes.


def test_rows_of_several_processes_stay_whole(path: Path) -> None:
    code = """
import json, pathlib, sys
from anybatch import rows
row = json.loads(sys.stdin.read())
for i in range(50):
    rows.append(pathlib.Path(sys.argv[1]), {**row, "seed": 1000 * int(sys.argv[2]) + i, "message": sys.argv[2] * 5000})
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(i)], stdin=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    for worker in workers:
        worker.communicate(json.dumps(ONE), timeout=60)
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    got = rows.read(path)
    assert sorted(row["seed"] for row in got) == [1000 * i + j for i in range(3) for j in range(50)]
    assert all(row["message"] == str(row["seed"] // 1000) * 5000 for row in got)
