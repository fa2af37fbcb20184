"""`python -m minisp` is the `minisp` command."""

from minisp.cli.app import main

main()
