"""Read from the bytes of recordings how long they should be, and whether they are whole, which FFmpeg does not say.

Sources: xiph.org/ogg/doc/framing.html for the flag of the last page, the RIFF specification for the size of the data,
gabriel.mp3-tech.org/mp3infotag.html for the header that says how long an mp3 is.
"""

import os
import struct
from typing import BinaryIO

# WAV's formats whose byte rate is exact: PCM, floats, A-law, u-law, and PCM or floats in the extensible form.
_CONSTANT_RATE = (1, 3, 6, 7, 0xFFFE)
_UNKNOWN_SIZE = 0x7FFF0000  # programs that write a WAV to a pipe leave a size this large or larger in its header
_LEFTOVER = 4096  # bytes behind the samples of a WAV that may be anything
_ID3V1 = 128  # bytes of that tag
_LONGEST = 1 << 40  # bytes of a file; a size in 64 bits that is larger is damaged, or unknown
OGG_PAGE = 65_307  # bytes of the largest page
_PADDING_FRAMES = 3  # of an mp3, at most, that are no sound


def size_without_tag(file: BinaryIO) -> int:
    """Return the size of a seekable file without an APE tag at its end, which FFmpeg would decode as mp3."""
    size = file.seek(0, os.SEEK_END)
    for behind in (0, _ID3V1):  # an ID3v1 tag may follow the APE tag
        file.seek(max(0, size - behind - 32))
        tail = file.read(32 + behind)
        whole = len(tail) == 32 + behind
        if whole and tail.startswith(b"APETAGEX") and tail[32:35] == b"TAG"[:behind]:
            # A header of 32 bytes before the tag stays, in which no decoder finds sound.
            return max(0, size - behind - struct.unpack("<I", tail[12:16])[0])
    return size


def _data(file: BinaryIO) -> tuple[int, int, float] | None:
    """Find the samples of a WAV, RF64, W64 or CAF: where they begin, their bytes by the header, and bytes a second.

    Bytes a second are 0 where they are nominal, as those of ADPCM; the result is None where the header does not say.
    """
    file.seek(0)
    head = file.read(12)
    # Place of the first chunk, form of its header, bytes of the header that its size counts, and rounding of sizes.
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:] == b"WAVE":
        first, layout, counted, even = 12, struct.Struct("<4sI"), 0, 2
    elif head == b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb":
        first, layout, counted, even = 40, struct.Struct("<4s12xQ"), 24, 8
    elif head[:4] == b"caff":
        first, layout, counted, even = 8, struct.Struct(">4sq"), 0, 1
    else:
        return None
    file.seek(first)
    byte_rate, long_size, unknown = 0.0, 0, _UNKNOWN_SIZE if head[:4] == b"RIFF" else _LONGEST
    while len(header := file.read(layout.size)) == layout.size:
        kind, size = layout.unpack(header)
        size -= counted
        place = file.tell()
        if kind == b"data":
            size = long_size if head[:4] in (b"RF64", b"BW64") and size == 0xFFFFFFFF else size
            return (place, size, byte_rate) if 0 <= size < unknown else None
        content = file.read(min(max(size, 0), 28))
        if kind == b"ds64" and len(content) >= 16:
            (long_size,) = struct.unpack("<8xQ", content[:16])
        elif kind == b"fmt " and len(content) >= 12:
            format_tag, nominal_rate = struct.unpack("<H6xI", content[:12])
            byte_rate = nominal_rate if format_tag in _CONSTANT_RATE else 0.0
        elif kind == b"desc" and len(content) >= 24:
            rate, packet_bytes, packet_frames = struct.unpack(">d8xII", content[:24])
            byte_rate = rate * packet_bytes / max(1, packet_frames)
        if size < 0 or place + size >= _LONGEST:
            return None
        file.seek(place + size + -size % even)
    return None


def header_end(file: BinaryIO, size_of_file: int) -> tuple[float | None, bool]:
    """Return the length that a header with chunks says, and whether the file ends before its compressed samples do."""
    found = _data(file)
    if found is None:
        return None, False
    start, size, byte_rate = found
    if byte_rate > 0:
        return size / byte_rate, False
    return None, start + size > size_of_file


def outgrew_its_header(file: BinaryIO) -> bool:
    """Tell whether a WAV has samples behind those that its header counts, as one whose recorder was killed has."""
    found = _data(file)
    file.seek(0)
    if found is None or not found[1] or file.read(4) != b"RIFF":
        return False
    end = found[0] + found[1]
    left = file.seek(0, os.SEEK_END) - end
    file.seek(end)
    behind = file.read(5)
    # A chunk begins here, or after a byte of padding, with a name of four letters.
    chunk = any(all(32 <= byte < 127 for byte in name) for name in (behind[:4], behind[1:]))
    return left > _LEFTOVER and not chunk and not behind.startswith(b"ID3")


def has_last_page(tail: bytes) -> bool:
    """Tell whether an Ogg file that ends so ends with the page that is marked as its last."""
    start = tail.rfind(b"OggS")
    if start < 0 or len(tail) < start + 27:
        return False
    lacing_end = start + 27 + tail[start + 26]
    return len(tail) >= lacing_end + sum(tail[start + 27 : lacing_end]) and bool(tail[start + 5] & 4)


def mp3_seconds(file: BinaryIO, rate: int) -> float | None:
    """Return the length that an mp3's header says, less the encoder's padding; None where it does not say."""
    file.seek(0)
    head = file.read(10)
    size = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
    file.seek(10 + size if head.startswith(b"ID3") else 0)
    first = file.read(4096)
    place = next((first.find(mark) for mark in (b"Xing", b"Info") if mark in first), -1)
    if place < 0 or len(first) < place + 12:
        return None
    flags, frames = struct.unpack(">II", first[place + 4 : place + 12])
    samples = 1152 if rate >= 32_000 else 576
    return (frames - _PADDING_FRAMES) * samples / rate if flags & 1 else None
