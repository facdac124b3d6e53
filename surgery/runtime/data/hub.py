"""Rows of the `datasets` library: a dataset of the hub, or a folder, by its split. The library is an extra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.compiler.diagnostics import SurgError
from surgery.compiler.plan import Place
from surgery.runtime.data.files import Row, Rows
from surgery.runtime.extras import needed
from surgery.runtime.model_files import hub_is_known
from surgery.runtime.places import span_of

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder


class DataSet(Rows):
    """One split of a dataset; `streamed`: its rows are fetched one after the other, and nothing is kept on the disk."""

    def __init__(
        self, path: str | Path, folder: Path, place: Place | None = None, *,
        split: str = "train", subset: str | None = None, streamed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(path, folder, place)
        self.dataset, self.split, self.subset, self.streamed = str(path), split, subset, streamed
        self.name = f"{path}, split {split}"

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The rows with their numbers from 1; SURG050 where the dataset cannot be read, SURG063 without the library."""
        number = 0
        try:
            for number, row in enumerate(self._opened(), start=1):
                yield number, dict(row)
        except SurgError:
            raise
        except Exception as error:  # the library, its readers and the hub's client raise errors of their own
            raise self._unreadable(error, number) from error

    def _opened(self) -> Any:
        datasets = needed("datasets", "data", f"reading {self.name}", span_of(self.place, self.folder))
        with _quiet(datasets):
            if not self.path.is_dir():
                return datasets.load_dataset(self.dataset, self.subset, split=self.split, streaming=self.streamed)
            if not any((self.path / name).exists() for name in SAVED):
                # A folder is there already: streamed it is not copied into the library's cache.
                return datasets.load_dataset(str(self.path), self.subset, split=self.split, streaming=True)
            found = datasets.load_from_disk(str(self.path))
            if not isinstance(found, datasets.DatasetDict):
                return found
            if self.split not in found:
                raise ValueError(f'Unknown split "{self.split}". Should be one of {list(found)}.')
            return found[self.split]

    def _unreadable(self, error: Exception, number: int) -> SurgError:
        said, help = " ".join(str(error).split()), None
        what = f"{type(error).__name__}: {said[:300]}"
        if isinstance(error, ConnectionError) or "offline" in said.lower():
            what = "the hub cannot be reached, and the dataset is not in the local cache"
            help = "check the connection and the spelling; a folder's path is relative to the spec"
        elif "gated" in said or "401" in said or "403" in said:
            what, help = "access to it is restricted", "accept its licence on the hub and log in with `hf auth login`"
        elif any(word in said for word in ("Unknown split", "Bad split", "Config name is missing", "BuilderConfig")):
            help = "write `split = NAME` and, where the dataset has several, `subset = NAME`"
        return self.fail("SURG050", what, number + 1 if number else None, help)


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without bars on the terminal; and from the cache alone where the hub's name does not resolve.

    The hub's client would try again for half a minute, and ask before it looks into its cache.
    """
    from huggingface_hub import constants

    bars, offline = datasets.is_progress_bar_enabled(), (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    datasets.disable_progress_bars()
    if not hub_is_known():
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = offline
        if bars:
            datasets.enable_progress_bars()
