"""`python -m vlmtune` is `vlmtune`."""

from vlmtune.cli import main

main()
