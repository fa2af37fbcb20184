"""minisp itself for peers.py, called as its peers are: `defaults`, or `uniform`, for stock classes."""

import json

from peer_worker import arguments, read_windows

from minisp.fast import minify


def main() -> None:
    """The command line."""
    args = arguments(__doc__, ("defaults", "uniform"))
    options = {"widths": "uniform"} if args.variant == "uniform" else {}
    done = minify(args.model, keep=args.keep, out=args.out, calibration=read_windows(args.windows), **options)
    seconds = sum(taken for phase, taken in done.seconds.items() if phase not in ("loading", "writing"))
    found = {"settings": options, "seconds": seconds, "widths": [layer.kept for layer in done.layers]}
    args.result.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
