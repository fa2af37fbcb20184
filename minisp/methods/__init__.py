"""The mathematics: tensors in, tensors out. Knows neither files nor models."""
