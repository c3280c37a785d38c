"""Homomorphic encryption of updates: the server adds what it cannot read, and the sites decrypt the sum.

CKKS (Cheon et al., ASIACRYPT 2017) by TenSEAL, with the keys and parameters that NVFlare provisions.
Departure from NVFlare's ``HEModelEncryptor``: all floating entries of a network are packed together, 4,096
values to a ciphertext, and no keys travel with them.

All sites hold the same secret key. The server must be trusted to add as it says: a sum looks like an update.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import FederationError, UsageError, needs_extra
from slidetl.federation.weights import Weights, is_floating

PLACES = 4096
"""Values in a ciphertext: half the degree of the polynomials."""
CIPHERTEXT_BYTES = 1 << 18
"""Most bytes of a ciphertext; serialised, a fresh one has about 235,000 and a sum 131,000."""
_LIMIT = 1e5  # of a value: the modulus holds 2^19, and a number above it comes back as another one


class Cipher:
    """Encrypts and decrypts at a site; adds at the server, whose keys cannot decrypt.

    Args:
        context: of TenSEAL, with the keys.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    @classmethod
    def read(cls, keys: bytes) -> Self:
        """Reads the keys of :func:`make_keys` or of a kit.

        Raises:
            UsageError: TenSEAL is not installed, or these are no keys.
        """
        try:
            return cls(_tenseal().context_from(keys, 1))
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"expected keys of homomorphic encryption: {error}") from error

    def encrypt(self, before: Weights, after: Weights) -> list[Any]:
        """Encrypts the changes of all floating entries, in float64.

        Args:
            before: the network that arrived.
            after: of the same names and shapes.

        Returns:
            A CKKSVector for each 4,096 values, in the order of ``before``.

        Raises:
            FederationError: a change is not finite, or above 100,000.
        """
        changes = [
            (after[name].astype(np.float64) - value.astype(np.float64)).ravel()
            for name, value in before.items()
            if is_floating(value)
        ]
        values = np.concatenate(changes) if changes else np.zeros(0)
        if not (np.abs(values) <= _LIMIT).all():
            raise FederationError(
                f"this site sends nothing: a change is not finite or above {_LIMIT:g}, which the encryption "
                "cannot carry; lower model.lr"
            )
        vector = _tenseal().ckks_vector
        parts = np.split(values, range(PLACES, len(values), PLACES))
        return [vector(self._context, part) for part in parts]

    def find_fault(self, ciphertexts: object, network: Weights) -> str | None:
        """Returns the reason why the ciphertexts of a site cannot be added, or None.

        Args:
            ciphertexts: came from a site; nothing in them is trusted.
            network: that was sent.
        """
        sizes = _sizes(network)
        if not isinstance(ciphertexts, list) or len(ciphertexts) != len(sizes):
            return f"expected {len(sizes)} ciphertexts"
        for number, (content, size) in enumerate(zip(ciphertexts, sizes, strict=True), 1):
            if not isinstance(content, bytes) or len(content) > CIPHERTEXT_BYTES:
                return f"ciphertext {number} of {len(sizes)} is not one of at most {CIPHERTEXT_BYTES} bytes"
            try:
                vector = self._load(content)
                scales = [part.scale for part in vector.ciphertext()]
                (vector * 0.5).size()  # another key's parameters, or no level left to multiply
            except (ValueError, RuntimeError) as error:
                return f"ciphertext {number} of {len(sizes)} is not usable: {error}"
            if vector.size() != size or scales != [self._context.global_scale]:
                return f"ciphertext {number} of {len(sizes)} has another form"
        return None

    def add(self, sites: Sequence[Sequence[bytes]], shares: Sequence[float]) -> list[bytes]:
        """Adds the ciphertexts of sites, each times the site's share.

        Args:
            sites: ciphertexts of each site, without fault.
            shares: of each site, which sum to 1.
        """
        summed = []
        for contents in zip(*sites, strict=True):
            first, *others = (
                self._load(content) * share for content, share in zip(contents, shares, strict=True)
            )
            for other in others:
                first += other
            summed.append(first.serialize())
        return summed

    def decrypt(self, ciphertexts: Sequence[bytes], before: Weights) -> dict[str, NDArray[Any]]:
        """Decrypts a mean change, and adds it to the network that the sites were sent.

        Entries of integers stay those of ``before``. The error of CKKS is about 1e-7, and 7e-7 of the change,
        since TenSEAL divides by 2^40 and not by the prime next to it. A variance that is below 0 by no more
        than such an error is 0.

        Raises:
            FederationError: a value is not finite or above 100,000, or the ciphertexts do not fit.
        """
        try:
            values = np.concatenate([self._load(content).decrypt() for content in ciphertexts])
        except (ValueError, RuntimeError) as error:
            raise FederationError(f"the sum cannot be decrypted: {error}") from error
        if len(values) != sum(_sizes(before)):
            raise FederationError(f"expected a sum of {sum(_sizes(before))} values, not {len(values)}")
        if not (np.abs(values) <= _LIMIT).all():
            raise FederationError(
                f"the sum has values that are not finite or above {_LIMIT:g}: a site has other keys, or sent "
                "something else than an update"
            )
        start, mean = 0, {}
        for name, value in before.items():
            if not is_floating(value):
                mean[name] = np.array(value)
                continue
            change = values[start : start + value.size].reshape(value.shape)
            start += value.size
            moved = value.astype(np.float64) + change
            if name.endswith("running_var"):
                moved = np.where((moved < 0) & (moved > -1e-6 * (1 + np.abs(change))), 0.0, moved)
            mean[name] = moved.astype(value.dtype)
        return mean

    def _load(self, content: bytes) -> Any:
        return _tenseal().ckks_vector_from(self._context, content)


def make_keys() -> tuple[bytes, bytes]:
    """Makes keys as NVFlare provisions them; returns those of all sites, and those of the server."""
    from nvflare.lighter.impl.he import HEBuilder

    builder = HEBuilder()
    builder.initialize(None, None)  # it reads neither
    return builder.get_serialized_context(is_client=True), builder.get_serialized_context()


def serialised(ciphertexts: object, network: Weights) -> list[bytes]:
    """Serialises the ciphertexts of an update. Nothing but an encrypted vector becomes bytes.

    Raises:
        FederationError: they are no ciphertexts of such a network.
    """
    kind = _tenseal().CKKSVector
    if (
        not isinstance(ciphertexts, list)
        or any(type(vector) is not kind for vector in ciphertexts)
        or [vector.size() for vector in ciphertexts] != _sizes(network)
    ):
        raise FederationError("expected the ciphertexts of an update")
    return [bytes(vector.serialize()) for vector in ciphertexts]


def count_ciphertexts(network: Weights) -> int:
    """Returns the number of ciphertexts of an update."""
    return len(_sizes(network))


def _sizes(network: Weights) -> list[int]:
    """Returns the number of values in each ciphertext."""
    left = sum(value.size for value in network.values() if is_floating(value))
    return [min(PLACES, left - start) for start in range(0, left, PLACES)]


def _tenseal() -> ModuleType:
    with needs_extra("averaged.encrypted needs TenSEAL", "federated"):
        return importlib.import_module("tenseal")
