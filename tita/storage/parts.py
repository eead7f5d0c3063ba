"""Objects written in parts, which stay with the server until they are put together or given up."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from tita.storage.bucket import SHA256, Bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderWay:
    """The parts of one object that nobody has put together yet."""

    key: str
    upload_id: str
    begun: datetime


def begin(bucket: Bucket, key: str, *, sha256: str) -> str:
    """The id of a new upload in parts; `sha256` is the whole object's."""
    answer = bucket.request("create_multipart_upload", key, Metadata={SHA256: sha256})
    return str(answer["UploadId"])


def send(bucket: Bucket, key: str, data: bytearray, *, upload_id: str, number: int) -> str:
    """Write part `number`, counted from 1; its ETag.

    Raises:
        FileNotFoundError: there is no such upload, or no longer.
    """
    answer = bucket.request("upload_part", key, Body=data, UploadId=upload_id, PartNumber=number)
    return str(answer["ETag"])


def finish(bucket: Bucket, key: str, etags: Mapping[int, str], *, upload_id: str) -> None:
    """Put the parts together.

    Raises:
        FileNotFoundError: there is no such upload, or no longer.
    """
    parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
    bucket.request(
        "complete_multipart_upload", key, UploadId=upload_id, MultipartUpload={"Parts": parts}
    )


def abort(bucket: Bucket, key: str, *, upload_id: str) -> None:
    """Give up an upload and free its parts; one that is gone is no error."""
    try:
        bucket.request("abort_multipart_upload", key, UploadId=upload_id)
    except FileNotFoundError:
        return


def listed(bucket: Bucket, key: str, *, upload_id: str) -> dict[int, str]:
    """ETags by number of the parts that are there."""
    found: dict[int, str] = {}
    marker: dict[str, int] = {}
    while True:
        page = bucket.request("list_parts", key, UploadId=upload_id, **marker)
        found |= {part["PartNumber"]: part["ETag"] for part in page.get("Parts", ())}
        following = page.get("NextPartNumberMarker")
        if (
            not page.get("IsTruncated")
            or not following
            or marker.get("PartNumberMarker") == following
        ):
            return found
        marker = {"PartNumberMarker": following}


def under_way(bucket: Bucket, prefix: str) -> list[UnderWay]:
    """All uploads whose key begins with `prefix`, oldest first."""
    found: list[UnderWay] = []
    markers: dict[str, str] = {}
    while True:
        page = bucket.search("list_multipart_uploads", prefix, **markers)
        found += [
            UnderWay(
                key=str(entry["Key"]).removeprefix(bucket.prefix),
                upload_id=entry["UploadId"],
                begun=entry["Initiated"],
            )
            for entry in page.get("Uploads") or ()
        ]
        following = {
            "KeyMarker": page.get("NextKeyMarker", ""),
            "UploadIdMarker": page.get("NextUploadIdMarker", ""),
        }
        if not page.get("IsTruncated") or not following["KeyMarker"] or following == markers:
            return sorted(found, key=lambda parts: parts.begun)
        markers = following
