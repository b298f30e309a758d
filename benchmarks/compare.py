"""Two files of rows side by side: for what both measured, the second's ratio, time and kept bytes over the first's.

python benchmarks/compare.py before.jsonl after.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anybatch.bench import read
from anybatch.bench.tables import COMPARISON_HEADINGS, comparison, plain


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    try:
        for path in (args.first, args.second):
            if not path.is_file():
                raise ValueError(f"no such file: {path}")
        lines = comparison(read(args.first), read(args.second))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not lines:
        print(f"error: {args.first} and {args.second} have no measurement in common", file=sys.stderr)
        return 2
    print(*plain(COMPARISON_HEADINGS, lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
