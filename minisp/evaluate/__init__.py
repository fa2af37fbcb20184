"""What a model is worth: perplexity, tokens per second, multiple choice, two models side by side."""
