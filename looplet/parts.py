"""Images: what a tool may return beside text and JSON, and how a message holds it.

A tool returns an `Image`, alone or anywhere inside a list or a dict.  The boundary makes it a part of the GenAI
conventions: `{"type": "blob", "modality": "image", "mime_type", "content"}` (`BlobPart`, base64), or
`{"type": "uri", "modality": "image", "uri"}` (`UriPart`).  Where only text can stand, a marker stands for a blob:
`[image/png 12 kB #1]`.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as BadBase64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from looplet.errors import ToolError

if TYPE_CHECKING:
    from pathlib import Path

MAX_IMAGE_BYTES: Final = 3_750_000
"""5 MB once it is base64: what the strictest of the providers takes"""

_MAGIC: Final = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
"""the formats that models can see, and how their files begin"""
_BLOB_KEYS: Final = frozenset({"type", "modality", "mime_type", "content"})
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True, slots=True)
class Image:
    """A picture for the model: PNG, JPEG, GIF or WebP.

    `mime_type` is read from the data where it is not given.  Raises ToolError, in words for the model, for data that
    is too large or in no format that models can see.
    """

    data: bytes = field(default=b"", repr=False)
    mime_type: str = ""
    uri: str = ""
    """instead of data: where the provider finds the picture"""

    def __post_init__(self) -> None:
        if self.uri:
            return
        if len(self.data) > MAX_IMAGE_BYTES:
            raise _too_large(len(self.data))
        found = _mime_type_of(self.data[:12])
        if found is None or self.mime_type not in ("", found):
            raise ToolError(f"these {size_text(len(self.data))} are no {self._wanted()} image")
        object.__setattr__(self, "mime_type", found)

    @classmethod
    def from_path(cls, path: str | Path) -> Self:
        """Read a file; raises OSError, and ToolError as the class does."""
        from pathlib import Path

        file = Path(path)
        if (size := file.stat().st_size) > MAX_IMAGE_BYTES:
            raise _too_large(size)
        return cls(file.read_bytes())

    @classmethod
    def from_base64(cls, text: str, mime_type: str = "") -> Self:
        """Decode base64; raises ToolError as the class does."""
        try:
            return cls(b64decode("".join(text.split()), validate=True), mime_type)
        except BadBase64 as error:
            raise ToolError(f"the image is not valid base64: {error}") from None

    @classmethod
    def url(cls, url: str, mime_type: str = "") -> Self:
        """Return a picture that the provider fetches by itself; not all of them do."""
        if not url.startswith(("https://", "http://")):
            raise ToolError(f"the address of an image begins with https://, not {url[:20]!r}")
        return cls(mime_type=mime_type, uri=url)

    def __looplet_part__(self) -> dict[str, Any]:
        """Return the part of a message that the boundary lets through."""
        if self.uri:
            mime_type = {"mime_type": self.mime_type} if self.mime_type else {}
            return {"type": "uri", "modality": "image", **mime_type, "uri": self.uri}
        content = b64encode(self.data).decode()
        return {"type": "blob", "modality": "image", "mime_type": self.mime_type, "content": content}

    def _wanted(self) -> str:
        return self.mime_type or "PNG, JPEG, GIF or WebP"


def is_blob(value: Any) -> bool:
    """Tell whether a JSON-like value is an image that stands in it as base64."""
    return (
        isinstance(value, Mapping)
        and value.get("type") == "blob"
        and value.keys() == _BLOB_KEYS
        and isinstance(value["content"], str)
    )


def is_sealed(value: Any) -> bool:
    """Tell whether a value is a blob that really holds an image: there is nothing in it that could be redacted."""
    if not is_blob(value) or len(value["content"]) % 4 or not _BASE64.fullmatch(value["content"]):
        return False
    return bool(_mime_type_of(b64decode(value["content"][:16])) == value["mime_type"])


def describe(value: Any) -> str:
    """Return `image/png 12 kB` for a blob, `image https://...` for a picture elsewhere, else an empty string."""
    if is_blob(value):
        content = value["content"]
        return f"{value['mime_type']} {size_text(len(content) * 3 // 4 - content[-2:].count('='))}"
    if isinstance(value, Mapping) and value.get("type") == "uri" and isinstance(value.get("uri"), str):
        return f"{value.get('modality', 'file')} {value['uri']}"
    return ""


def blobs_of(value: Any) -> list[dict[str, Any]]:
    """Return the blobs in a JSON-like value, in order: for backends that can show them to the model."""
    found: list[dict[str, Any]] = []
    _mapped(value, is_blob, lambda blob: found.append(dict(blob)))
    return found


def with_markers(value: Any) -> Any:
    """Return a JSON-like value in which a marker stands for each blob: `[image/png 12 kB #1]`."""
    markers = iter(_markers(blobs_of(value)))
    return _mapped(value, is_blob, lambda _: next(markers))


def with_blobs(value: Any, original: Any) -> Any:
    """Put the blobs of `original` back where a marker stands for them; the inverse of `with_markers`."""
    blobs = blobs_of(original)
    known = dict(zip(_markers(blobs), blobs, strict=True))
    return _mapped(value, lambda v: isinstance(v, str) and v in known, lambda marker: known[marker])


def size_text(size: int) -> str:
    """Return bytes as `812 B`, `12 kB` or `3.8 MB`."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.0f} kB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"


def _markers(blobs: list[dict[str, Any]]) -> list[str]:
    return [f"[{describe(blob)} #{number}]" for number, blob in enumerate(blobs, 1)]


def _mapped(value: Any, fits: Callable[[Any], bool], change: Callable[[Any], Any]) -> Any:
    """Return a JSON-like value in which `change` has mapped what `fits`."""
    if fits(value):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, fits, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, fits, change) for item in value]
    return value


def _mime_type_of(head: bytes) -> str | None:
    return next((mime_type for mime_type, magic in _MAGIC.items() if magic.match(head)), None)


def _too_large(size: int) -> ToolError:
    most = size_text(MAX_IMAGE_BYTES)
    return ToolError(f"the image has {size_text(size)}, more than the {most} that models take; make it smaller")
