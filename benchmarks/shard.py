"""A pytest plugin (`-p shard`): run every n-th test alone, MINISP_SHARD="i/n". Processes then share the tests out."""

import os
from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep tests i, i + n, …: neighbours, which compile the same kernels, go to different processes."""
    number, count = map(int, os.environ.get("MINISP_SHARD", "0/1").split("/"))
    config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % count != number])
    items[:] = items[number::count]
