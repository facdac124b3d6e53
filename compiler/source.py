"""Reading a `.surg` file: the only place where a spec or a file that it uses is opened."""

from __future__ import annotations

import codecs
import errno
from pathlib import Path

from surgery.compiler.diagnostics import fail
from surgery.compiler.p1_parse import MAXIMUM_CHARACTERS
from surgery.compiler.span import Source, Span

MAXIMUM_BYTES = 4 * MAXIMUM_CHARACTERS + 4  # what holds one character too many in any spelling, so that p1 says so


def read(path: Path, span: Span | None = None, help: str | None = None) -> Source:
    """The text of a file, with or without a byte order mark; what is too long for p1 is read just so far.

    Raises SURG011, at `span`, for what is no file, cannot be read or is no UTF-8 text.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no file")
        with path.open("rb") as file:
            content = file.read(MAXIMUM_BYTES)
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        return Source(str(path), decoder.decode(content, final=len(content) < MAXIMUM_BYTES))
    except UnicodeDecodeError as error:
        reason = f"it is no UTF-8 text (byte {error.start})"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError:  # a NUL
        reason = "it is no name of a file"
    raise fail("SURG011", f"`{path}` cannot be read: {reason}", span, help=help)
