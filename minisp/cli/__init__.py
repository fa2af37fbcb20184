"""Words in, exit codes out: the command line and the demo. Nothing imports it."""
