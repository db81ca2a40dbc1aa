"""What A2A messages and artifacts carry, as text and as metadata of limited size: never a file itself.

Pure. The numbers of the protocol's data are all floats; whole ones are made integers again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2a.types import Part

MAX_NAME_CHARACTERS = 500
_MAX_FILENAME_CHARACTERS = 200
_MAX_DATA_BYTES = 16 << 10
_MAX_PARTS = 50
_MAX_DEPTH = 16


def text_of(parts: Iterable["Part"], between: str = "") -> str:
    """Return the text of the parts that are text."""
    return between.join([part.text for part in parts if part.HasField("text")])


def other_than_text(parts: Iterable["Part"]) -> list["Part"]:
    """Return the parts that are files or data."""
    return [part for part in parts if not part.HasField("text")]


def described(parts: Sequence["Part"]) -> list[dict[str, Any]]:
    """Return what the files and data are, for metadata: at most fifty, with 16 KiB of addresses and data."""
    room = _MAX_DATA_BYTES
    found: list[dict[str, Any]] = []
    for part in parts[:_MAX_PARTS]:
        item: dict[str, Any] = {"kind": "data" if part.HasField("data") else "file"}
        if part.media_type:
            item["mediaType"] = part.media_type[:_MAX_FILENAME_CHARACTERS]
        if part.filename:
            item["filename"] = part.filename[:_MAX_FILENAME_CHARACTERS]
        if part.HasField("raw"):
            item["bytes"] = len(part.raw)
        elif (size := part.ByteSize()) > room:
            item["omittedBytes"] = size
        else:
            room -= size
            item |= {"data": _value(part.data)} if part.HasField("data") else {"url": part.url}
        found.append(item)
    if len(parts) > _MAX_PARTS:
        found.append({"omittedParts": len(parts) - _MAX_PARTS})
    return found


def said_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return the descriptions as words: `plan.pdf (application/pdf, 1200 bytes), data`."""
    words = []
    for part in parts:
        if "omittedParts" in part:
            words.append(f"{part['omittedParts']} more")
            continue
        size = f"{part['bytes']} bytes" if "bytes" in part else None
        about = ", ".join(said for said in (part.get("mediaType"), size) if said)
        name = part.get("filename") or part["kind"]
        words.append(f"{name} ({about})" if about else str(name))
    return ", ".join(words)


def plain(struct: Any) -> dict[str, Any]:
    """Return a protobuf Struct as a JSON object; one of more than 16 KiB only by its size."""
    size = struct.ByteSize()
    if size > _MAX_DATA_BYTES:
        return {"omittedBytes": size}
    return {name: _value(value) for name, value in struct.fields.items()}


def _value(value: Any, depth: int = 1) -> Any:
    """Return a protobuf Value as what JSON knows: what is nested too deeply, or no number of JSON, as null."""
    if depth > _MAX_DEPTH:
        return None
    match value.WhichOneof("kind"):
        case "struct_value":
            return {name: _value(each, depth + 1) for name, each in value.struct_value.fields.items()}
        case "list_value":
            return [_value(each, depth + 1) for each in value.list_value.values]
        case "number_value":
            number = value.number_value
            if number != number or number in (float("inf"), float("-inf")):
                return None
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
    return None
