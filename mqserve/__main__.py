"""`python -m mqserve`."""

from .cli import main

main()
