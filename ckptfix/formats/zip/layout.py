"""How zip archives are laid out in bytes: headers, end records, and the numbers in them.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct

LOCAL = struct.Struct("<4s5H3I2H")
"""Magic, version, flags, method, time, date; CRC, packed size, size; lengths of name and extra."""
CENTRAL = struct.Struct("<4s6H3I5H2I")
"""Magic and version of the writer; as in the local header; lengths of the comment too, disk,
attributes; where the local header begins."""
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")

LOCAL_MAGIC, CENTRAL_MAGIC, DESCRIPTOR_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
END_MAGIC, END64_MAGIC, LOCATOR_MAGIC = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"

CRC_IN_LOCAL, CRC_IN_CENTRAL = 14, 16

MAX16, MAX32 = 0xFFFF, 0xFFFFFFFF
"""What stands where the number itself is in a wider field."""

ENCRYPTED, DESCRIBED, UTF8 = 0x0001, 0x0008, 0x0800
"""Flags; `DESCRIBED`: CRC and sizes follow the data, in a descriptor."""

STORED, DEFLATED = 0, 8
"""Methods."""
