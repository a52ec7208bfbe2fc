"""Which 32 bytes can be somebody's Ed25519 public key (RFC 8032 5.1): points of the curve -x² + y² = 1 + dx²y².

Libraries load any 32 bytes as a key. For a key of small order anybody can make a signature that holds for all messages
or one in eight of them, and a point with two spellings has two thumbprints, so that revoking one leaves the other.
"""

from __future__ import annotations

_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_SIGN_BIT = 1 << 255
# Of the eight points whose order divides 8, y is 1, -1, 0 or one of these two.
_ORDER_8_Y = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER_Y = frozenset({0, 1, _P - 1, _ORDER_8_Y, _P - _ORDER_8_Y})


def check_point(raw: bytes) -> None:
    """Raises ValueError where `raw` (32 bytes) is not the one spelling of a point of large order."""
    y = int.from_bytes(raw, "little") & (_SIGN_BIT - 1)
    if y >= _P:
        raise ValueError("not a canonical Ed25519 public key: its number is beyond the field; ask for the key again")
    if y in _SMALL_ORDER_Y:
        raise ValueError("an Ed25519 public key of small order: anybody can sign for it; ask for the key again")
    # x² = (y² - 1) / (dy² + 1); a product is a square exactly where the quotient is.
    square = (y * y - 1) * (_D * y * y + 1) % _P
    if pow(square, (_P - 1) // 2, _P) != 1:
        raise ValueError("not an Ed25519 public key: no point of the curve; was it copied whole?")
