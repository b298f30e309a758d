"""The command line. Everything heavy is imported inside the commands, so that ``--help`` is quick."""

# ruff: noqa: I001 (the order of imports is that of the commands in the help)

from anybatch.cli.common import UserError as UserError
from anybatch.cli.common import app as app
from anybatch.cli.common import main as main
from anybatch.cli import runs as runs
from anybatch.cli import predict as predict
from anybatch.cli import convert as convert
from anybatch.cli import diagnose as diagnose
from anybatch.cli import export as export
from anybatch.cli import machine as machine
