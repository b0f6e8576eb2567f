"""Who calls: keys, known by their hashes only, the tenant that each stands for, and what being that tenant means for a request.

Pure but for reading the file; knows no gRPC. A key is 256 random bits, so one round of SHA-256 hides it well.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from scheduler.errors import PermissionDeniedError, StartError
from scheduler.frontend.validation import MAX_ID_CHARACTERS, Options

SEPARATOR = "/"  # between tenant and id, as the core knows a request; in no tenant's name


@dataclass(frozen=True, slots=True)
class Caller:
    """Who holds a key."""

    tenant: str
    is_admin: bool


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A line of the file."""

    sha256: str  # of the key, 64 hexadecimal digits
    tenant: str
    admin: bool = False


class Callers:
    """All who may call, by the hashes of their keys."""

    def __init__(self, entries: Iterable[tuple[bytes, Caller]]) -> None:
        self._entries = tuple(entries)

    @classmethod
    def load(cls, path: str) -> Callers:
        """A JSON object a line; empty lines, and those that begin with #, are left out. Raises StartError, which names the line
        and shows nothing of it: somebody may have put a key there."""
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as error:
            raise StartError(f"--tokens {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise StartError(f"--tokens {path} is not UTF-8 text") from None
        entries: dict[bytes, Caller] = {}
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.lstrip().startswith("#"):
                digest, caller = _entry(f"--tokens {path}, line {number}", line)
                if digest in entries:
                    raise StartError(f"--tokens {path}, line {number}: the same key stands in a line before")
                entries[digest] = caller
        if not entries:
            raise StartError(f"--tokens {path} has no entry: make one with `carousel token --tenant NAME >> {path}`")
        return cls(entries.items())

    def of(self, key: str) -> Caller | None:
        """Looks at every entry, so that the time says nothing about how near a wrong key came."""
        digest, found = hashlib.sha256(key.encode()).digest(), None
        for each, caller in self._entries:
            if hmac.compare_digest(each, digest):
                found = caller
        return found


def _entry(where: str, line: str) -> tuple[bytes, Caller]:
    try:
        entry = msgspec.json.decode(line, type=_Entry)
    except msgspec.DecodeError:
        what = 'must be a JSON object {"sha256": "…", "tenant": "…", "admin": false}, as `carousel token` prints it'
        raise StartError(f"{where}: {what}") from None
    try:
        digest = bytes.fromhex(entry.sha256)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise StartError(f"{where}: sha256 must be the 64 hexadecimal digits of a key's hash, not a key")
    tenant = entry.tenant
    if not 1 <= len(tenant) <= MAX_ID_CHARACTERS or not tenant.isprintable() or SEPARATOR in tenant:
        raise StartError(f"{where}: tenant must be 1 to {MAX_ID_CHARACTERS} printable characters, none of them {SEPARATOR!r}")
    return digest, Caller(tenant, entry.admin)


# ------------------------------------------------------------------------------------- what a tenant means for a request


def options_of(caller: Caller | None, options: Options) -> Options:
    """A request of a known caller is its tenant's, and shares cached prompts with that tenant's only, whatever the salt: the
    time to a first token tells whether somebody has sent a prompt before. Raises PermissionDeniedError."""
    if caller is None:
        return options
    if options.tenant not in ("", caller.tenant):
        raise PermissionDeniedError(f"scheduling.tenant is {options.tenant!r}, the token's tenant is {caller.tenant!r}")
    salt = options.cache_salt or caller.tenant
    return replace(options, tenant=caller.tenant, cache_salt=f"{caller.tenant}{SEPARATOR}{salt}")


def core_id(caller: Caller | None, request_id: str, tenant: str = "") -> str:
    """A request's id as the core knows it: two tenants may use the same one, and neither reaches the other's. tenant: whose
    request it is, where an admin asks; empty: the caller's."""
    return request_id if caller is None else f"{tenant or caller.tenant}{SEPARATOR}{request_id}"


def clear_id(caller: Caller | None, core_id: str) -> str:
    """… and as its tenant chose it. caller: whoever asks; all requests have a tenant's name before their id, or none has."""
    return core_id if caller is None else core_id.partition(SEPARATOR)[2]
