"""Decoding of request bodies in the formats that helm and kubectl send."""

import base64
from collections.abc import Iterator
from typing import Any

import yaml


def read_body(body: bytes) -> dict[str, Any]:
    """Decode JSON, YAML, or a Secret in protobuf, the format of helm's release records."""
    if not body.startswith(b"k8s\0"):
        found: dict[str, Any] = yaml.load(body, Loader=yaml.CSafeLoader)
        return found
    # runtime.Unknown: field 1 is the type, field 2 the object. Field numbers as in generated.proto.
    envelope = dict(_fields(body[4:]))
    kind = dict(_fields(envelope[1]))[2].decode()
    assert kind == "Secret", f"protobuf of a {kind}"
    secret = list(_fields(envelope[2]))
    metadata = list(_fields(dict(secret)[1]))
    return {
        "apiVersion": "v1",
        "kind": kind,
        "type": dict(secret)[3].decode(),
        "metadata": {
            "name": dict(metadata)[1].decode(),
            "labels": {k: v.decode() for k, v in _entries(metadata, 11)},
        },
        "data": {k: base64.b64encode(v).decode() for k, v in _entries(secret, 2)},
    }


def _entries(fields: list[tuple[int, bytes]], number: int) -> Iterator[tuple[str, bytes]]:
    for entry in (dict(_fields(value)) for n, value in fields if n == number):
        yield entry[1].decode(), entry.get(2, b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number, value) of the length-delimited fields of a protobuf message; skips varints."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        size = varint()
        if wire == 2:
            yield number, message[at : at + size]
            at += size
