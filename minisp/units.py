"""Counts and sizes as people read them."""


def millions(count: int) -> str:
    """A count of parameters for people: 134.5M, 7.24B."""
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"


def megabytes(size: int) -> str:
    """A size in bytes for people: 269 MB, 14.5 GB (decimal units)."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e3:,.0f} kB"
