"""`python -m anybatch.cli`."""

from anybatch.cli import main

main()
