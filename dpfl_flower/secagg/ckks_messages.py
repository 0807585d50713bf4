"""What server and nodes say to each other when ciphertexts of CKKS are summed.

>>> request = DecryptRequest(server_round=2, survivors=(5, 7, 9))
>>> decode_request(encode(request, [b"sum"]))
(DecryptRequest(server_round=2, survivors=(5, 7, 9)), [b'sum'])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from dpfl_flower import records
from dpfl_flower.secagg.wire import from_config, to_config
from dpfl_flower.wire import array_record, config_record, read_array, write_array

__all__ = [
    "DecryptRequest",
    "EncryptRequest",
    "Encrypted",
    "decode_encrypted",
    "decode_request",
    "encode",
]

_STAGE: Final = "stage"


@dataclass(frozen=True, kw_only=True)
class EncryptRequest:
    """Encrypt your vector.

    Attributes
    ----------
    server_round : int
    width, bits : int
        The vector to come has ``width`` entries and is summed mod 2^bits.
    parties : int
        How many nodes are asked.
    seconds : float
        After so long a node forgets the round.
    key : bytes
        The fingerprint of the key.
    """

    server_round: int
    width: int
    bits: int
    parties: int
    seconds: float
    key: bytes


@dataclass(frozen=True, kw_only=True)
class Encrypted:
    """A node's vector, under the key with this fingerprint; the ciphertexts travel beside it."""

    key: bytes


@dataclass(frozen=True, kw_only=True)
class DecryptRequest:
    """Decrypt the sum over ``survivors``; the ciphertexts travel beside it."""

    server_round: int
    survivors: tuple[int, ...]


_REQUESTS: Final[dict[str, type[EncryptRequest] | type[DecryptRequest]]] = {
    "encrypt": EncryptRequest,
    "decrypt": DecryptRequest,
}
_STAGES: Final = {EncryptRequest: "encrypt", Encrypted: "encrypt", DecryptRequest: "decrypt"}


def encode(
    message: EncryptRequest | Encrypted | DecryptRequest, ciphertexts: Sequence[bytes] = ()
) -> RecordDict:
    """Return the records that carry a message and the ciphertexts beside it."""
    config = to_config(message)
    config[_STAGE] = _STAGES[type(message)]
    content = RecordDict({records.SECAGG: config})
    if ciphertexts:
        arrays = {
            str(index): write_array(np.frombuffer(data, np.uint8))
            for index, data in enumerate(ciphertexts)
        }
        content[records.MASKED] = ArrayRecord(arrays)
    return content


def decode_request(content: RecordDict) -> tuple[EncryptRequest | DecryptRequest, list[bytes]]:
    """Return a request and the ciphertexts beside it.

    Raises
    ------
    ValueError
        If a field is missing, unknown, of another type or out of range.
    """
    fields = _fields(content)
    stage = fields.pop(_STAGE, None)
    if not isinstance(stage, str) or stage not in _REQUESTS:
        raise ValueError(f"stage={stage!r} must be one of {sorted(_REQUESTS)}")
    if stage == "encrypt":
        return from_config(EncryptRequest, fields), []
    return from_config(DecryptRequest, fields), _ciphertexts(content)


def decode_encrypted(content: RecordDict) -> tuple[Encrypted, list[bytes]]:
    """Return a node's vector; errors as for `decode_request`."""
    fields = _fields(content)
    stage = fields.pop(_STAGE, None)
    if stage != "encrypt":
        raise ValueError(f"stage={stage!r} must be 'encrypt'")
    return from_config(Encrypted, fields), _ciphertexts(content)


def _fields(content: RecordDict) -> dict[str, object]:
    record = config_record(content, records.SECAGG)
    if record is None:
        raise ValueError(f"a ConfigRecord {records.SECAGG!r} must be there")
    return dict(record)


def _ciphertexts(content: RecordDict) -> list[bytes]:
    try:
        record = array_record(content, records.MASKED)
    except KeyError as error:
        raise ValueError("the ciphertexts are missing") from error
    found = []
    for index in range(len(record)):
        try:
            data = read_array(record[str(index)])
        except (KeyError, TypeError) as error:
            raise ValueError(f"ciphertext {index} is missing or no array") from error
        if data.dtype != np.uint8 or data.ndim != 1:
            raise ValueError(f"ciphertext={data.dtype}{list(data.shape)} must be flat uint8")
        found.append(data.tobytes())
    return found
