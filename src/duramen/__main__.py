"""``python -m duramen``: the command line, for torchrun and for machines without it on the path."""

from duramen.cli import main

main()
