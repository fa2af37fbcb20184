"""OptiPFair for peers.py: `MLP_GLU` pruning to a uniform width.

`data-driven` is what its documentation recommends where there is calibration text: peak-to-peak magnitude (MAW) times
activation norms from a dataloader. `static` is its default, MAW of the weights alone. No `expansion_divisor`: rounding
would change the budget.
"""

import time

from peer_worker import arguments, first_loss, load_dense, read_windows, report, truncates_to, uniform_width
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """The command line."""
    args = arguments(__doc__, ("data-driven", "static"))
    # Here, so that --help works where it is not installed.
    from optipfair import prune_model

    model, windows = load_dense(args.model), read_windows(args.windows)
    loss, full = first_loss(model, windows), model.config.intermediate_size
    width = uniform_width(model, args.keep)
    # It removes int(percentage / 100 · m) units.
    percentage = 100 * truncates_to(full - width, full)
    start = time.perf_counter()
    loader = DataLoader(TensorDataset(windows), batch_size=2) if args.variant == "data-driven" else None
    settings = {"pruning_type": "MLP_GLU", "neuron_selection_method": "MAW", "pruning_percentage": percentage}
    model = prune_model(model, **settings, dataloader=loader, show_progress=False)
    seconds = time.perf_counter() - start
    settings["dataloader"] = None if loader is None else f"{len(windows)} windows"
    report(args.result, model, {"first_loss": loss, "settings": settings, "seconds": seconds})
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
