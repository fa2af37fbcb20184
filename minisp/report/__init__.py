"""What is said before, during and after a run: plan, progress, table, plot."""
