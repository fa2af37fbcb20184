"""The run, in the order of time: calibrate, saliency, trials, refit."""
