"""Content of the protocol as text and metadata of limited size: no picture and no file goes into the log whole."""

from typing import Any, TypeAlias

import msgspec
from acp.schema import (
    AudioContentBlock,
    BlobResourceContents,
    EmbeddedResourceContentBlock,
    ImageContentBlock,
    ResourceContentBlock,
    TextContentBlock,
)

ContentBlock: TypeAlias = (
    TextContentBlock | ImageContentBlock | AudioContentBlock | ResourceContentBlock | EmbeddedResourceContentBlock
)

MAX_JSON_BYTES = 16_384
_MAX_DEPTH = 24
_MAX_RESOURCE_CHARACTERS = 16_384
_MAX_NAME_CHARACTERS = 1_000


def cut(text: str, characters: int) -> str:
    """Return the text; where it has more characters, their beginning and a note."""
    if len(text) <= characters:
        return text
    return f"{text[:characters]}… [cut: {len(text):,} characters in all]"


def cut_json(value: Any, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return a JSON value; where it is longer or nested deeper, the beginning of its text and a note."""
    try:
        text = msgspec.json.encode(value)
    except RecursionError:
        return {"cut": "", "bytes": None}
    if len(text) <= max_bytes and not _is_deeper(value, _MAX_DEPTH):
        return value
    return {"cut": text[:max_bytes].decode(errors="ignore"), "bytes": len(text)}


def text_of(block: ContentBlock) -> str:
    """Return what a block says; of what is no text, what it is."""
    match block:
        case TextContentBlock():
            return block.text
        case ImageContentBlock() | AudioContentBlock():
            return f"[{_name(block.mime_type)}, {_decoded_bytes(block.data):,} bytes]"
        case ResourceContentBlock():
            return f"[{_name(block.title or block.name)}]({_name(block.uri)})"
        case EmbeddedResourceContentBlock():
            resource = block.resource
            if isinstance(resource, BlobResourceContents):
                kind = _name(resource.mime_type or "data")
                return f"[{_name(resource.uri)}: {kind}, {_decoded_bytes(resource.blob):,} bytes]"
            return f"[{_name(resource.uri)}]\n{cut(resource.text, _MAX_RESOURCE_CHARACTERS)}"


def description_of(block: ContentBlock) -> dict[str, Any] | None:
    """Return what a block is that is no text, without its data; None for a text."""
    match block:
        case TextContentBlock():
            return None
        case ImageContentBlock() | AudioContentBlock():
            described = {"type": block.type, "mimeType": block.mime_type, "bytes": _decoded_bytes(block.data)}
        case ResourceContentBlock():
            described = {"type": block.type, "uri": block.uri, "name": block.name, "mimeType": block.mime_type}
        case EmbeddedResourceContentBlock():
            resource = block.resource
            is_blob = isinstance(resource, BlobResourceContents)
            size = _decoded_bytes(resource.blob) if is_blob else len(resource.text.encode())
            described = {"type": block.type, "uri": resource.uri, "mimeType": resource.mime_type, "bytes": size}
    named = {key: _name(value) if isinstance(value, str) else value for key, value in described.items()}
    return {key: value for key, value in named.items() if value is not None}


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and (levels == 0 or any(_is_deeper(each, levels - 1) for each in value))


def _name(text: str) -> str:
    return cut(text, _MAX_NAME_CHARACTERS)


def _decoded_bytes(base64: str) -> int:
    return len(base64) * 3 // 4 - base64[-2:].count("=")
