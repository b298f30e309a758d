"""`anybatch bench` without its table and figure: needs torch alone.

PYTHONPATH=src python benchmarks/run.py --cases conv,norm --batch-sizes 2,8 --out benchmarks/rows
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from anybatch.bench import CASES, judged, run, settings
from anybatch.bench.runner import Row, file_in, read
from anybatch.bench.tables import TARGET_HEADINGS, line, plain, target_line
from anybatch.suggest import listed_in


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=listed_in, default=[], help=f"of {', '.join(CASES)}, or layers; all by default")
    parser.add_argument("--schemes", type=listed_in, default=[])
    parser.add_argument("--models", type=listed_in, default=[])
    parser.add_argument("--batch-sizes", "-b", type=lambda text: [int(part) for part in listed_in(text)], default=[])
    parser.add_argument("--device")
    parser.add_argument("--precision", help="32-true, bf16-mixed or 16-mixed")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--autotune", action="store_true", help="tune Triton kernels first; on CUDA")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="a .jsonl file or a folder")
    given = vars(parser.parse_args())
    out = given.pop("out")
    try:
        chosen = settings(**given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = file_in(out, chosen.device)
    began = time.monotonic()

    def got(row: Row) -> None:
        print(*(word for word in line(row) if word), sep="  ", flush=True)

    last = [""]

    def tell(done: int, total: int, text: str) -> None:
        if text != last[0]:
            last[0] = text
            print(f"[{done}/{total}, {time.monotonic() - began:.0f} s] {text}", file=sys.stderr, flush=True)

    rows = run(chosen, path, tell=tell, got=got)
    known = [one for one in judged(read(path)) if one.measured is not None]
    if known:
        print("", *plain(TARGET_HEADINGS, map(target_line, known)), sep="\n")
    print(f"rows: {path}")
    return 1 if any(row["status"] != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
