"""What is said during and after a run: progress, table, plot."""
