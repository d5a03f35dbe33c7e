"""CRC-32 of bytes that stand together, from the CRCs of the pieces: nothing is read twice.

Source: zlib@crc32.c, crc32_combine: appending n zero bytes is a linear map over GF(2), n squarings of which are cheap.
"""

from __future__ import annotations

import functools
import zlib

from mbfn.storage.parts import Part

_POLYNOMIAL = 0xEDB88320  # of CRC-32, bits reversed
type Matrix = tuple[int, ...]  # column i: where bit i goes


def joined_crc(first: int, second: int, length: int) -> int:
    """The CRC-32 of bytes with CRC `first` followed by `length` bytes with CRC `second`."""
    bit = 0
    while length:
        if length & 1:
            first = _times(_zero_bytes(bit), first)
        length >>= 1
        bit += 1
    return first ^ second


def part_crc(part: Part, data_crc: int) -> int:
    """The CRC-32 of a written part: head, data of CRC `data_crc`, tail."""
    tail = part.tail(data_crc)
    whole = joined_crc(zlib.crc32(part.head), data_crc, part.nbytes)
    return joined_crc(whole, zlib.crc32(tail), len(tail))


@functools.cache
def _zero_bytes(power: int) -> Matrix:
    """The map that appending 2**power zero bytes is."""
    if power:
        half = _zero_bytes(power - 1)
        return tuple(_times(half, column) for column in half)
    bit = (_POLYNOMIAL, *(1 << place for place in range(31)))
    for _ in range(3):
        bit = tuple(_times(bit, column) for column in bit)
    return bit


def _times(matrix: Matrix, vector: int) -> int:
    result = 0
    for column in matrix:
        if not vector:
            break
        if vector & 1:
            result ^= column
        vector >>= 1
    return result
