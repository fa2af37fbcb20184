"""`minisp minify --export`: the check before the run, and the export after it."""

from pathlib import Path

from minisp.cli.console import errors
from minisp.config import MinifyConfig
from minisp.errors import MinispError
from minisp.export.targets import Exported, check_planned, export, output_beside
from minisp.store.hub import local_folder
from minisp.store.writer import check_output


def check_export(model: str, target: str, config: MinifyConfig, out: Path) -> Path:
    """Where the export of the result at `out` will go.

    Raises:
        MinispError: the target cannot express what the run may leave, or the place is taken.
    """
    check_planned(local_folder(model), target, config)
    return check_output(output_beside(out.expanduser().absolute(), target), 0, is_file=target == "gguf")


def export_result(out: Path, target: str, path: Path) -> Exported:
    """Export a complete result to `path`; a failure becomes an exit code, and says that the result is complete."""
    complete = f"The result at {out} is complete: minisp export {out} --to {target} --out {path} goes on from there."
    with errors(lambda: complete):
        try:
            return export(out, target, path)
        except MinispError as error:
            raise type(error)(f"{error} {complete}") from error
