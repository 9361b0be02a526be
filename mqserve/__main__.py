"""`python -m mqserve`."""

from .commands.cli import main

main()
