"""What a run will take, from shapes alone: memory, work, traffic, and the layout that fits."""
