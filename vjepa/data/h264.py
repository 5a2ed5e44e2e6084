"""Which frames of an H.264 stream no other frame refers to: said by two bits in the header of each slice (7.3.1, 7.4.1)."""

from __future__ import annotations

from typing import Any

CONFIGURATION_VERSION = 1  # first byte of an avcC record; a stream with start codes begins with 0
SLICE, SLICE_OF_IDR = 1, 5  # types of NAL units
ASIDE = (6, 9, 12)  # supplemental information, delimiter, filler: nothing that decoding other frames needs


def length_bytes(extradata: bytes | None) -> int | None:
    """Bytes of the length before each NAL unit, from the avcC record of an MP4 or Matroska file; None without one."""
    if extradata is None or len(extradata) < 7 or extradata[0] != CONFIGURATION_VERSION:
        return None
    return (extradata[4] & 3) + 1


def is_disposable(packet: Any, prefix: int) -> bool:
    """Whether the packet holds nothing but a picture that no other picture refers to.

    Args:
        packet: bytes, or what gives them as a buffer.
        prefix: `length_bytes` of the stream.
    """
    data, at, found = memoryview(packet), 0, False
    while at + prefix < len(data):
        size = int.from_bytes(data[at : at + prefix], "big")
        header = data[at + prefix]
        kind = header & 31
        if kind in (SLICE, SLICE_OF_IDR):
            if header >> 5 & 3:  # nal_ref_idc
                return False
            found = True
        elif kind not in ASIDE:
            return False
        at += prefix + size
    return found and at == len(data)
