"""Builds for pipelines: a recipe in, a model that passed its gates out, or an error that says which gate it failed."""
