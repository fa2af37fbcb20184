"""What a model is, one row of data per family, and a model that streams."""
