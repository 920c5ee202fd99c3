"""Folders that appear whole or not at all: written under another name, renamed when they are done.

    with written_aside(Path("out"), say=print) as folder:     # out.partial
        ...                                                   # an error: out.partial is removed
                                                              # success: out.partial becomes out

A run that was killed leaves `out.partial`, which nothing takes for a checkpoint; the next run removes it and
says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_room", "written_aside"]

_MARK = "unfinished-conversion"


@contextmanager
def written_aside(final: Path, *, say: Callable[[str], None]) -> Iterator[Path]:
    """A fresh folder beside `final` that takes its name when the block ends well.

    Raises ValueError where `final` exists and is not an empty folder, or where something that no conversion
    left is in the way; OSError where the disk or the permissions refuse.
    """
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"{final}: got something there already, expected a new or empty folder")
    aside = final.parent / f"{final.name}.partial"
    if aside.exists():
        if not (aside / _MARK).exists():
            raise ValueError(
                f"{aside}: got something no conversion left there, expected nothing; move it away"
            )
        shutil.rmtree(aside)
        say(f"removed {aside}, left by a run that did not finish; starting clean")
    aside.mkdir(parents=True)
    try:
        (aside / _MARK).touch()
        yield aside
        (aside / _MARK).unlink()
        os.replace(aside, final)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(aside)  # a write to an open file does not say which
        raise


def check_room(folder: Path, needed: int) -> None:
    """ValueError where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: got {free / 1e6:.1f} MB free on its disk, expected {needed / 1e6:.1f} MB"
        )
