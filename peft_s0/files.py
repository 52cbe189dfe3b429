"""Files and folders that are there whole or not at all, and files that are in a folder or on the Hub."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError


def find_file(source: str | Path, name: str, subfolder: str | None = None, **options: Any) -> Path | None:
    """A file of a folder or of a Hub repository, downloaded if it is on the Hub; None if it is not there.

    Args:
        source: folder or Hub id.
        name: name of the file.
        subfolder: folder below the source that holds it.
        options: `revision`, `token` and the like, for the Hub.

    Raises:
        LocalEntryNotFoundError: if the Hub does not answer and the cache does not know of the file.
    """
    if Path(source).is_dir():
        file = Path(source, subfolder or "", name)
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **options))
    except LocalEntryNotFoundError:
        # The cache keeps also what was not on the Hub.
        place = {key: options.get(key) for key in ("cache_dir", "revision", "repo_type")}
        path = f"{subfolder}/{name}" if subfolder else name
        if try_to_load_from_cache(str(source), path, **place) is _CACHED_NO_EXIST:
            return None
        raise
    except EntryNotFoundError:
        return None


def check_place(place: str | Path, overwrite: bool, own: Collection[str] | None = None) -> None:
    """Refuse a place to write to in which something would be lost.

    Args:
        place: file or folder that is to be written.
        overwrite: whether what is there may be replaced.
        own: for a folder, names of the files that may be in one that is replaced; None for a file.

    Raises:
        FileExistsError: if there is something that may not be replaced; the message names it and says what to do.
    """
    place = Path(place)
    if not place.exists():
        return
    if (own is None) is place.is_dir():
        raise FileExistsError(f"'{place}' is a {'folder' if own is None else 'file'}; choose another name to write to.")
    if own is not None and (place.samefile(".") or place.resolve().is_mount()):
        # What is written takes the place of the folder itself.
        raise FileExistsError(f"'{place}' is the working directory or a mount point; name a folder in it to write to.")
    if own is None or any(place.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"'{place}' exists already. Choose another name, or replace it with overwrite=True (--overwrite)."
            )
        others = sorted({path.name for path in place.iterdir()} - set(own)) if own is not None else []
        if others:
            raise FileExistsError(
                f"'{place}' holds '{others[0]}', which is not among the files that are written there and would be "
                "lost. Choose another name, or move it."
            )


@contextmanager
def new_folder(folder: str | Path, overwrite: bool, own: Collection[str]) -> Iterator[Path]:
    """A folder to write into that takes its name when the block ends, and never if it raises.

    Args:
        folder: its name.
        overwrite: see `check_place`.
        own: see `check_place`.

    Raises:
        FileExistsError: see `check_place`.
        OSError: if it cannot be written, as on a full disk.
    """
    check_place(folder, overwrite, own)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
        place = Path(temporary) / "new" / folder.name  # model cards say the folder's name
        place.mkdir(parents=True)
        with _named(folder):
            yield place
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        place.rename(folder)


@contextmanager
def new_file(file: str | Path, overwrite: bool) -> Iterator[Path]:
    """A file to write to that takes its name when the block ends, and never if it raises.

    Args:
        file: its name.
        overwrite: see `check_place`.

    Raises:
        FileExistsError: see `check_place`.
        OSError: if it cannot be written, as on a full disk.
    """
    check_place(file, overwrite)
    file = Path(file).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=".writing-") as temporary:
        place = Path(temporary) / file.name
        with _named(file):
            yield place
        place.replace(file)


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Name what cannot be written, where errors of the system and of safetensors say only why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"'{place}' cannot be written ({error}).") from error
