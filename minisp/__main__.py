"""`python -m minisp` is the `minisp` command."""

from minisp.cli import main

main()
