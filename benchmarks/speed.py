"""docs/speed.md from the rows in benchmarks/rows/.

python benchmarks/speed.py --out docs/speed.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anybatch.bench import read
from anybatch.bench.tables import speed_page
from anybatch.files import write_file

COMMAND = "anybatch bench --out benchmarks/rows"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "rows", help="folder of .jsonl files")
    parser.add_argument("--out", type=Path, default=Path("docs/speed.md"))
    args = parser.parse_args()
    try:
        by_machine = {path.stem: read(path) for path in sorted(args.rows.glob("*.jsonl"))}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_file(args.out, speed_page(by_machine, COMMAND).encode())
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
