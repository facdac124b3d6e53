"""Where a model's files are: in a folder, in a package or on the hub; and in plain words why they cannot be read."""

from __future__ import annotations

import importlib.util
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.compiler.diagnostics import Note, SurgError, fail
from surgery.compiler.plan import ModelPlan


def place_of(model: ModelPlan, folder: Path) -> str:
    """Where the files are: a folder if there is one, else the hub id. SURG030 for a path that does not exist."""
    name = model.name
    if name.startswith("package:"):
        return str(_package_folder(name))
    path = folder / Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise fail("SURG030", f'there is no model folder "{name}" ({path})')
    return name


def base_name(model: ModelPlan, folder: Path) -> str | None:
    """How others than surgery find the model: its hub id or its folder's whole path; None for one without weights."""
    if model.source != "hub":
        return None
    place = place_of(model, folder)
    return os.path.abspath(place) if Path(place).is_dir() else place


def find_file(model: ModelPlan, folder: Path, name: str) -> Path | None:
    """A file of the model's checkpoint, fetched where it is on the hub; None if there is none. Raises SURG030."""
    from transformers.utils.hub import cached_file

    with reading(model):
        place, options = place_of(model, folder), access(model, folder)
        found = cached_file(place, name, _raise_exceptions_for_missing_entries=False, **options)
    return None if found is None else Path(found)


def _package_folder(name: str) -> Path:
    package, _, inside = name.removeprefix("package:").partition("/")
    # Only the top-level name is looked up: for a dotted one Python would import the parents.
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise fail("SURG030", f'the package `{package}` of the model "{name}" is not installed')
    for location in found.submodule_search_locations:
        if (path := Path(location) / inside).is_dir():
            return path
    raise fail("SURG030", f"the package `{package}` has no folder `{inside}`")


def access(model: ModelPlan, folder: Path) -> dict[str, Any]:
    """How the files are fetched: the revision, and from the cache alone where the hub's name does not resolve."""
    if Path(place_of(model, folder)).is_dir():
        return {}
    options: dict[str, Any] = {} if model.revision is None else {"revision": model.revision}
    return options | ({} if hub_is_known() else {"local_files_only": True})


def hub_is_known() -> bool:
    """Whether the hub's name resolves; behind a proxy nobody can tell, and it is tried."""
    # The hub's client retries for half a minute before it says that there is no network.
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextmanager
def reading(model: ModelPlan, what: str = "model") -> Iterator[None]:
    """Turn what transformers and the hub raise into SURG030 in plain words, and keep their chatter off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars: Callable[[], None] = logging.enable_progress_bar if logging.is_progress_bar_enabled() else lambda: None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except SurgError:
        raise
    except Exception as error:  # the hub's client, the tokenizers and the configs each have errors of their own
        raise _unreadable(model, what, error) from error
    finally:
        logging.set_verbosity(level)
        bars()


def _unreadable(model: ModelPlan, kind: str, error: Exception) -> SurgError:
    text = " ".join(str(error).split())
    what, hint = f"it cannot be read: {type(error).__name__}", None
    if "gated repo" in text or "401" in text or "403" in text:
        what, hint = "access to it is restricted", "accept its licence on the hub and log in with `hf auth login`"
    elif "couldn't connect" in text or "local_files_only" in text or "offline" in text.lower():
        what = f"the hub cannot be reached, and the {kind} is not in the local cache"
        hint = "check the connection, or name a local folder"
    elif "is not a local folder and is not a valid model identifier" in text or "Repo id must" in text:
        what, hint = (
            f"there is no such {kind} on the hub and no such folder",
            "check the spelling; a path starts with ./",
        )
    elif "trust_remote_code" in text:
        what = "it needs code from the hub, which surgery does not run"
    elif "no file named" in text or "does not appear to have a file" in text:
        what, hint = "its files are incomplete", "the folder must hold config.json and the weights as safetensors"
    note = Note(text[:400])
    return fail("SURG030", f'the {kind} "{model.name}" cannot be loaded: {what}', notes=[note], help=hint)
