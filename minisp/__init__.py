"""minisp makes Transformer language models physically smaller; start reading at `minisp.fast`."""

__version__ = "0.1.0"
