"""The scratch folder of a run: who may use it, what an earlier run left in it, and when it goes.

`minisp-run.json` in the folder says what the records belong to: what the statistics depend on, what only the results
depend on, and what decides their rounding. A run that was stopped is continued where all agree (`resume`); statistics
alone serve another ratio, damping or selection (`reuse`).
"""

import fcntl
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import minisp
from minisp.errors import CheckpointError, ConfigError, NumericalError, OutputError
from minisp.ranks import Ranks
from minisp.resources import Resources
from minisp.store.names import ANY, REUSABLE, SWEEP, Record
from minisp.store.records import DATA, INDEX, Folder, Memory, Scratch, no_room
from minisp.store.writer import read_json

IDENTITY, LOCK = "minisp-run.json", "minisp-lock"
TEXT = Record.WINDOWS.value

# How a run is made to be the earlier one.
SAME = {
    "version": "Run the earlier version of minisp",
    "statistics": "Repeat the earlier options on the unchanged model, with batch as it was then",
    "results": "Repeat the earlier options",
    "rounding": "Start as many processes, with as much memory, as before",
}

Identity = Mapping[str, Mapping[str, Any]]
"""{"statistics": …, "results": …, "rounding": …}: plain values that decide each, and the last bits of both."""


def scratch_path(out: Path | None, resources: Resources) -> Path | None:
    """Where a run keeps what waits: the folder that was named, or a hidden one beside the output, or nowhere."""
    if resources.scratch is not None:
        return Path(resources.scratch).expanduser().absolute()
    return out.with_name(f".{out.name}.scratch") if out is not None else None


@contextmanager
def open_scratch(
    out: Path | None, resources: Resources, identity: Identity | None, ranks: Ranks, needed_bytes: int = 0
) -> Iterator[tuple[Scratch, Scratch]]:
    """The scratch of one run, locked while it is in use: what its processes share, and what is this process's own.

    When the block ends well, a hidden folder goes, and a named one keeps what `reuse` needs. When it does not, whatever
    is complete stays for `resume`.

    Args:
        out: the output folder, or None.
        resources: scratch, resume, reuse.
        ranks: the processes of the run; the first one locks and clears the folder.
        needed_bytes: room that the folder's disk must have.
        identity: what the run is; None where it cannot be continued (a model in memory).

    Raises:
        ConfigError: resume or reuse where nothing can be continued.
        OutputError: the folder cannot be used, is in use, or holds another run.
    """
    path = scratch_path(out, resources)
    wanted = "resume" if resources.resume else "reuse" if resources.reuse else None
    if path is not None and out is not None and (path == out or out in path.parents or path in out.parents):
        raise ConfigError(
            f"Option scratch: expected a folder apart from the output {out}, got {path}. Name another one."
        )
    # Without an output the result is a model in memory, cut in place: of that nothing can be continued.
    if wanted and (identity is None or path is None or (out is None and resources.resume)):
        raise ConfigError(
            f"Option {wanted}: expected a checkpoint on disk and an output folder, whose runs leave something to "
            "continue, got a run in memory. Leave the option out."
        )
    if path is None:
        memory = Memory()
        yield memory, memory
        return
    with _made(path, hidden=resources.scratch is None), _locked(path) if ranks.first else nullcontext():
        # A folder that is refused is left exactly as it was found.
        if ranks.first:
            _check_room(path, needed_bytes)
            _claim(path, identity, resources)
        ranks.wait()
        try:
            with _folders(path, resources, ranks) as folders:
                yield folders
        except BaseException as error:
            useful = identity is not None and (resources.scratch is not None or _worth_keeping(path, error))
            if ranks.first and not useful:
                _clear(path)
            raise
        ranks.wait()
        if ranks.first:
            _clear(path, keep=REUSABLE if resources.scratch is not None and identity is not None else None)


@contextmanager
def _folders(path: Path, resources: Resources, ranks: Ranks) -> Iterator[tuple[Folder, Folder]]:
    """The folder that all processes share and the one of this process, without what is of no use in them."""
    own_path = path if ranks.size == 1 else path / f"rank-{ranks.rank}-of-{ranks.size}"
    with _made(own_path):
        shared = Folder(path)
        own = shared if own_path == path else Folder(own_path)
        try:
            mine = {shared, own} if ranks.first else {own}
            for folder in mine:
                _drop_useless(folder, resources)
            ranks.wait()
            if not shared.has(TEXT):
                # Without the windows nobody knows which text the other records belong to.
                for folder in mine:
                    for name in folder.names(ANY):
                        folder.drop(name)
            ranks.wait()
            yield shared, own
            shared.settle()
            own.settle()
        finally:
            shared.close()
            own.close()


def _check_room(path: Path, needed_bytes: int) -> None:
    """Raise `OutputError` where the disk has no room for what will wait there, beside what waits there already."""
    there = sum(file.stat().st_size for file in path.rglob(f"*{DATA}") if ANY.fullmatch(file.stem))
    free = shutil.disk_usage(path).free
    if free + there < needed_bytes:
        raise OutputError(
            f"Scratch folder {path}: expected {needed_bytes / 1e9:.2f} GB of disk, got {(free + there) / 1e9:.2f} GB. "
            "Free some space, or name a folder on another disk by --scratch."
        )


def _worth_keeping(path: Path, error: BaseException) -> bool:
    """Whether what a failed run leaves helps another one: not where the source is at fault, nor for a text alone.

    Once all statistics are there, a failed solve may be tried with other options.
    """
    if isinstance(error, CheckpointError | NumericalError):
        return isinstance(error, NumericalError) and any(
            file.stem.startswith(Record.STATISTICS.of(0)) for file in _records(path)
        )
    return any(file.stem != TEXT or isinstance(error, KeyboardInterrupt) for file in _records(path))


def _claim(path: Path, identity: Identity | None, resources: Resources) -> None:
    """Make sure that what lies in the folder belongs to this run, and say whose it is."""
    found = holds_records(path)
    if found and not (resources.resume or resources.reuse):
        raise OutputError(
            f"Scratch folder {path}: expected an empty one, got what an earlier run left. Continue that run by "
            "--resume, use its statistics with other options by --reuse, or delete the folder."
        )
    if resources.reuse and not resources.resume and not found:
        raise OutputError(
            f"Scratch folder {path}: expected statistics of an earlier run (--reuse), found none. Name the --scratch "
            "folder of a run that was given one, or leave --reuse out."
        )
    if identity is None:
        return
    plain = json.loads(json.dumps({**identity, "version": minisp.__version__}))
    earlier = _earlier(path)
    parts = ("version", "statistics") if resources.reuse else ("version", "statistics", "results", "rounding")
    for part in parts:
        if found and earlier.get(part) != plain[part]:
            raise OutputError(
                f"Scratch folder {path}: expected what a run with these options left, got another one: "
                f"{_difference(part, earlier.get(part), plain[part])}. {SAME[part]}, or delete the "
                "folder" + (", or use its statistics alone by --reuse." if part in ("results", "rounding") else ".")
            )
    unfinished = path / f"{IDENTITY}.unfinished"
    try:
        unfinished.write_text(json.dumps(plain, indent=1), encoding="utf-8")
        os.rename(unfinished, path / IDENTITY)
    except OSError as error:
        raise no_room(path, error) from error


def _drop_useless(folder: Folder, resources: Resources) -> None:
    """Drop records that a power failure has torn, and results where only statistics are wanted."""
    for name in folder.names(ANY):
        if resources.reuse and not (REUSABLE.fullmatch(name) or SWEEP.fullmatch(name)):
            folder.drop(name)
        elif not folder.intact(name):
            what = "everything" if name == TEXT else name
            warnings.warn(
                f"Scratch folder {folder.path}: {name} is damaged; {what} will be computed anew.", stacklevel=2
            )
            folder.drop(name)


def _difference(part: str, earlier: Any, now: Any) -> str:
    if not isinstance(earlier, dict) or not isinstance(now, dict):
        return f"{part} was {earlier!r}, is {now!r}"
    changed = [f"{key} was {earlier.get(key)!r}, is {now[key]!r}" for key in now if earlier.get(key) != now[key]]
    return ", ".join(changed)


def _earlier(path: Path) -> dict[str, Any]:
    value = read_json(path / IDENTITY)
    return value if isinstance(value, dict) else {}


def holds_records(path: Path) -> bool:
    """Whether a run has left something in this folder."""
    return any(_records(path))


def _records(path: Path) -> Iterator[Path]:
    """The index files of the records of a run, which prove that there is something to continue."""
    return (file for file in path.glob(f"*{INDEX}") if ANY.fullmatch(file.stem))


@contextmanager
def _made(path: Path, *, hidden: bool = False) -> Iterator[None]:
    """The folder exists within the block; where it was made here, or is a hidden one, and empty at the end, it goes."""
    try:
        existed = path.is_dir()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Scratch folder {path}: cannot be made ({error}). Name another one by --scratch.") from error
    try:
        yield
    finally:
        if not existed or hidden:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Nobody else uses the folder within the block; the system releases the lock of a process that dies."""
    try:
        # Without a buffer, which would be written again when the file is closed.
        handle = open(path / LOCK, "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"Scratch folder {path}: cannot be written ({error}). Name another one.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ends removes its lock file: what was locked must still be the one in the folder.
            taken = os.fstat(handle.fileno()).st_ino != (path / LOCK).stat().st_ino
        except OSError:
            taken = True
        if taken:
            handle.seek(0)
            user = handle.read().decode() or "?"
            raise OutputError(
                f"Scratch folder {path}: expected to be its only user, but process {user} has it. Wait for that run, "
                "or use another folder."
            )
        try:
            handle.truncate(0)
            handle.write(str(os.getpid()).encode())
        except OSError as error:
            (path / LOCK).unlink(missing_ok=True)
            raise no_room(path, error) from error
        try:
            yield handle
        finally:
            if not holds_records(path):
                (path / LOCK).unlink(missing_ok=True)


def _clear(path: Path, keep: re.Pattern[str] | None = None) -> None:
    """Remove what a run leaves, and nothing else, from its folder and those of its processes."""
    for folder in path.glob("rank-*-of-*"):
        # Its process may be removing it too.
        with suppress(OSError):
            _clear(folder)
            folder.rmdir()
    for file in list(path.iterdir()):
        ours = ANY.fullmatch(file.stem) and file.suffix in (DATA, INDEX, ".unfinished")
        if ours and not (keep and keep.fullmatch(file.stem) and file.suffix != ".unfinished"):
            file.unlink(missing_ok=True)
    if keep is None:
        for name in (IDENTITY, f"{IDENTITY}.unfinished", LOCK):
            (path / name).unlink(missing_ok=True)
