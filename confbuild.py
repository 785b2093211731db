#!/usr/bin/env python3
"""Build source code into an attested bundle, and verify such bundles, with the standard library alone.

Example, from the shell and from Python:

    $ python3 confbuild.py build hello
    $ python3 confbuild.py verify hello-build

    >>> import confbuild, datetime
    >>> files = confbuild.read_bundle("hello-build")
    >>> expected = confbuild.Expectations(source_commit="8f2b337c5cf2ab4e3bd0ec5f2d1f5fbb3a4ad3c0")
    >>> verdict = confbuild.verify_bundle(files, expected, datetime.datetime.now(datetime.UTC))
    >>> verdict.ok, verdict.verdict, verdict.failures
    (False, 'simulated', [])

Usage

    python3 confbuild.py build DIR                    build DIR on this machine and verify the bundle
    python3 confbuild.py build DIR --server URL       build DIR on a server and verify the bundle
    python3 confbuild.py verify BUNDLE                verify a bundle; opens no socket
    python3 confbuild.py serve                        run the build service
    python3 confbuild.py serve --tee --image D        run each build in a fresh SEV-SNP guest
    python3 confbuild.py image -o D ...               make the image that such a guest boots
    python3 confbuild.py measure --firmware F ...     compute the launch digest of a guest
    python3 confbuild.py attest FILE --nonce N        inside a guest: make evidence for a provenance
    python3 confbuild.py --version                    print the version and the SHA-256 of this file

A bundle is a directory: artifacts/ (the files that were built), provenance.json (which source, tools and dependencies
they were built from: an in-toto Statement with SLSA provenance) and evidence.json (what the processor signed: a report
about the VM that ran the build, with the digest of provenance.json and the nonce of the client).

What PASSED means

Every required check passed and no check failed. Three things require checks: the kind of hardware, the bundle, and each
option that the caller gives (but --crl, --vek and --collateral only supply documents). Together they say:

    - The files in artifacts/ are exactly the subjects of provenance.json, with the same digests.
    - evidence.json contains the digest of this provenance.json.
    - An AMD SEV-SNP or Intel TDX processor signed that evidence about a VM whose memory its host can neither read nor
      change (unless --allow-debug was given and the VM is in debug mode). On Azure it signed a report that names the
      key of a virtual TPM, and that key signed the digest.
    - The manufacturer certifies the key that signed. AMD certifies it for one processor or one cloud, and for one
      version of the firmware. Intel certifies the key of one machine.
    - Every value that the caller gave matches.

With --evidence-only, the first two are not checked: only the evidence is verified. With --at, all this holds as of that
time: certificates may have expired since. But a key on a given revocation list counts as revoked at any time.

What PASSED does not mean

    - Without --measurement, --image or --igvm it does not say which software ran in the VM. Anybody who rents such a
      machine can run software there that attests any provenance. For TDX the measurement covers only what the VM
      started with, which is its firmware; --rtmr covers what ran next, on Azure --pcr. Without --rtmr, anybody's
      operating system can claim any --compose-hash. On Azure, without these options, PASSED does not even say that a VM
      signed the digest: anybody can get a report that names a key of their own, which they keep outside of any VM.
    - Without --nonce the evidence may be old.
    - Without --crl and --require-crl, or --collateral for TDX, the key may have been revoked.
    - Without --min-tcb for SEV-SNP, or --collateral for TDX, the firmware may have known vulnerabilities.
    - Without --source, --source-commit or --source-tree any source may have been built.
    - It never says that the source is harmless.

SIMULATED means: everything matches, but no hardware signed the evidence. Whoever made the bundle could have invented
all of it.

Contents (a section uses only sections above it; 1-4 are vocabulary, which every section may use)

    Part I - Vocabulary
     1. Names and limits
     2. Errors
     3. Bytes and JSON
     4. Records
    Part II - Verifier: bytes in, verdict out
     5. DER
     6. Signatures
     7. Certificates
     8. SEV-SNP report
     9. TPM quote
    10. TDX quote
    11. TDX collateral
    12. Event logs
    13. Launch digest
    14. IGVM
    15. dm-verity
    16. Statement
    17. Verdict
    Part III - Build: a source in, a bundle out
    18. Processes
    19. Sandbox
    20. Programs
    21. Files
    22. This file
    23. Archives
    24. Git
    25. Toolchains
    26. Attester
    27. Bundle
    28. Pipeline
    29. Comparison
    Part IV - Service: jobs in, event streams out
    30. Metrics
    31. Event log
    32. Event streams
    33. Jobs
    34. Web page
    35. HTTP API
    36. Client
    37. Agent
    38. VMs
    Part V - Guest: how --tee runs
    39. Image
    40. QEMU
    41. Broker
    42. First process
    Part VI - Command line
    43. Rendering
    44. Server set-up
    45. Commands
    46. Options

Specifications

    [CONTRACT]  "The contract" in README.md; [CONTRACT 1.6] is its section 1.6
    [SNP-ABI]   AMD 56860, SEV Secure Nested Paging Firmware ABI, rev 1.58
    [VCEK]      AMD 57230, Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface, rev 1.00
    [GHCB]      AMD 56421, SEV-ES Guest-Hypervisor Communication Block, rev 2.03
    [APM2] [APM3]  AMD 24593 and 24594, AMD64 Architecture Programmer's Manual, volumes 2 and 3
    [TPM2-1] [TPM2-2]  TCG TPM 2.0 Library, Part 1: Architecture, Part 2: Structures, rev 1.59
    [TDX-QUOTE] Intel TDX DCAP, Quote Generation Library and Quote Verification Library, appendix A
    [TDX-MODULE] Intel 348551, TDX Module Base Architecture Specification, and 348550, its ABI reference
    [PCK]       Intel SGX PCK Certificate and Certificate Revocation List Profile Specification
    [PCS]       https://api.portal.trustedservices.intel.com/content/documentation.html, version 4
    [CCEL]      ACPI 6.5, CC Event Log table; TCG PC Client Platform Firmware Profile, event log
    [DSTACK]    https://github.com/Dstack-TEE/dstack, attestation guide
    [AZURE]     https://learn.microsoft.com/azure/confidential-computing/
                guest-attestation-confidential-virtual-machines-design
    [X680] [X690] [X520]  ITU-T X.680 ASN.1, X.690 DER, X.520 attribute types
    [RFC5280]   X.509 certificates and revocation lists; [RFC4055] and [RFC5480] define their RSA and EC keys
    [RFC3279] [RFC5758] ECDSA signatures in them    [RFC7468] PEM
    [RFC8017]   PKCS #1: RSASSA-PSS, RSASSA-PKCS1-v1_5
    [FIPS186-5] ECDSA    [SP800-186] NIST SP 800-186, P-256 and P-384    [SEC1] SEC 1, encoding of points
    [EFD]       Explicit-Formulas Database, https://hyperelliptic.org/EFD/g1p/auto-shortw-jacobian-3.html
    [RFC7517]   JSON Web Key    [RFC9334] RATS architecture
    [TSM]       Linux, Documentation/ABI/testing/configfs-tsm-report
    [SEV-GUEST] Linux, Documentation/virt/coco/sev-guest.rst
    [LINUX]     Linux 6.12: Documentation/ on dm-verity, EROFS, the initrd (cpio newc) and the boot protocol;
                headers in include/uapi/
    [QEMU]      QEMU 10.0.2    [QMP] its monitor, docs/interop/qmp-spec.rst    [KVM] Linux 6.12
    [EDK2]      edk2-stable202502    [PI] UEFI Platform Initialization 1.8
    [IGVM]      igvm_defs 0.4, https://docs.rs/igvm_defs    [PE] Microsoft PE Format
    [GPT]       UEFI 2.10    [DPS] UAPI Discoverable Partitions Specification
    [VERITY]    dm-verity on-disk format: https://gitlab.com/cryptsetup/cryptsetup/-/wikis/DMVerity
    [ELF]       System V ABI    [DEB] deb(5), dpkg-deb(1)    [POLICY] Debian Policy 4.7
    [CARGO]     The Cargo Book, https://doc.rust-lang.org/cargo
    [SLSA]      SLSA provenance v1, https://slsa.dev/spec/v1.0/provenance
    [VSA]       SLSA Verification Summary v1, https://slsa.dev/spec/v1.0/verification_summary
    [CYCLONEDX] CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json    [PURL] https://github.com/package-url/purl-spec
    [IN-TOTO]   in-toto Statement v1, https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
    [K]         Kettle, https://github.com/confidential-dot-ai/kettle
    [GIT]       git object format: gitformat-pack(5), git-hash-object(1), git-mktree(1)
    [SSE]       WHATWG HTML, 9.2 Server-sent events
    [SRI]       W3C Subresource Integrity, with sha1 and md5 as in npm
    [TOML]      https://toml.io/en/v1.1.0
    [RFC8259]   JSON      [RFC8785] its canonical form    [RFC4648] base64    [RFC9530] Repr-Digest
    [RFC9110]   HTTP      [RFC9112] HTTP/1.1        [RFC9457] problem details    [RFC6750] bearer tokens

Stable: the HTTP API, the files, the JSON, the command line and its exit statuses. Of the Python names, those in __all__
are stable within a minor version.
"""

# SPDX-License-Identifier: MIT
import sys

if sys.version_info < (3, 11):  # noqa: UP036  # before anything that an older Python could stumble over
    sys.stderr.write("confbuild: error: Python 3.11 or later is needed, this is %d.%d\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)

# Part I and II: what a verifier may use (no file, clock, process, thread or randomness).
import base64  # noqa: I001  # a group for each Part
import binascii
import hashlib
import itertools
import json
import re
import struct
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    NamedTuple,
    NoReturn,
    TypeVar,
)

# Parts III to VI. Modules that only some commands use are imported at their first use.
import _thread
import errno
import functools
import gc
import marshal
import os
import stat
import time
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from os.path import (
    abspath,
    basename,
    commonpath,
    commonprefix,
    dirname,
    exists,
    getmtime,
    getsize,
    isabs,
    isdir,
    isfile,
    islink,
    ismount,
    join,
    lexists,
    normpath,
    realpath,
    relpath,
    samefile,
)
from time import monotonic

if TYPE_CHECKING:
    import argparse
    import concurrent.futures
    import ctypes
    import email.utils
    import fcntl
    import fnmatch
    import gzip
    import hmac
    import http.client
    import io
    import ipaddress
    import logging
    import lzma
    import resource
    import secrets
    import select
    import selectors
    import shlex
    import shutil
    import signal
    import socket
    import ssl
    import subprocess
    import tempfile
    import threading
    import tomllib
    import unicodedata
    import urllib.error
    import urllib.parse
    import urllib.request
    import weakref
    import zipfile
    import zlib
else:

    class _Lazy:
        """A module that is imported at its first use. Importing all of them would double the time to start."""

        def __init__(self, *names):
            self._names = names

        def __getattr__(self, attribute):
            for name in self._names:
                __import__(name)
            globals()[self._names[0]] = sys.modules[self._names[0]]
            return getattr(sys.modules[self._names[0]], attribute)

    for _name in (
        "argparse ctypes fcntl fnmatch gzip hmac io ipaddress logging lzma resource secrets select selectors "
        "shlex shutil signal socket ssl subprocess tempfile threading tomllib unicodedata weakref zipfile zlib"
    ).split():
        globals()[_name] = _Lazy(_name)
    email = _Lazy("email", "email.utils")
    http = _Lazy("http", "http.client")
    urllib = _Lazy("urllib", "urllib.request")
    concurrent = _Lazy("concurrent", "concurrent.futures")

__version__ = "0.2.0"
# fmt: off
__all__ = [  # names of the verifier; each further part adds its own, so that a cut file exports what it has
    "BundleFiles", "Check", "ConfbuildError", "Endorsements", "Expectations", "ImageFacts", "Verdict", "verify_bundle",
]
# fmt: on

# ==============================================================================
# region 1. Names and limits                                      [uses nothing]
# ==============================================================================
# Numbers and words that several sections share. Sizes are in bytes, times in seconds.

# Exit statuses of the command line [CONTRACT 5.3].
EXIT_OK, EXIT_NO, EXIT_USAGE, EXIT_SIMULATED, EXIT_SERVER, EXIT_UNVERIFIED, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 256 * KIB  # one read of a pipe or a file
NONCE_SIZE = 16
WORKSPACE = "confbuild-vm-"  # prefix of a VM's folder, which is removed with the VM
WORK = "/work"  # where a build sees that folder, in guests and in mount namespaces
MAX_JSON = 4 * MIB  # of provenance.json and evidence.json; the largest seen in the field has 300 KiB
MAX_ARCHIVE = 64 * MIB  # of an uploaded source [CONTRACT 1.6]
MAX_UNPACKED = 4 * GIB
MAX_RATIO = 200  # unpacked to packed size above 64 MiB; source code packs about 5:1, zeros 1000:1
MAX_MEMBERS = 100_000  # of an archive or a repository
MAX_DEPTH = 64  # of nested folders; also keeps recursion far from Python's limit
MAX_LINE = 64 * KIB  # of build output in one event [CONTRACT 1.10]
BOOT_TIMEOUT_S, GUEST_BOOT_TIMEOUT_S, BUILD_TIMEOUT_S = 30.0, 120.0, 30 * 60.0
MAX_ATTEMPTS = 3  # of a job; a new attempt starts if the server died during the last one [CONTRACT 1.8]

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://confidential.ai/attested-builds/v1"  # of [K]
CONFBUILD_TYPE = "urn:confbuild:build:v1"  # of the toolchains that [K] does not have
# builder.id of the provenance [CONTRACT 3.3].
SIMULATED_BUILDER = "urn:confbuild:builder:simulated:v1"
QEMU_BUILDER = "urn:confbuild:builder:qemu:v1"  # a QEMU guest that is not confidential
SNP_BUILDER = "urn:confbuild:builder:sev-snp:v1"
TDX_BUILDER = "urn:confbuild:builder:tdx:v1"
# Platform that the host names to its agent -> builder.id of the provenance [CONTRACT 3.3].
BUILDERS: Mapping[str, str] = {"simulated": SIMULATED_BUILDER, "qemu": QEMU_BUILDER, "snp": SNP_BUILDER}
SIMULATED_NOTICE = (
    "Simulated evidence: no confidential VM, no hardware signature. "
    "It proves nothing about where or by whom this was built."
)

# Phases of a build, in order. Each is also the `type` of its events [CONTRACT 1.8].
PHASES = ("queued", "vm", "detect", "init", "build", "provenance", "attest", "complete")
# Every `error_type` of a failed build [CONTRACT 1.9].
FAILURES = frozenset(
    "BuildError UnsupportedToolchainError SourceError LimitError TimeoutError Cancelled NoArtifacts ProvenanceError "
    "AttestationError VmError InternalError".split()
)

# endregion 1
# ==============================================================================
# region 2. Errors                                                [uses nothing]
# ==============================================================================
# Every error that a caller may see is a ConfbuildError. Any other exception is a bug and keeps its traceback.
# Only two places turn these errors into output: `main`, by exit_code and hint, and the HTTP handler, by status.


class ConfbuildError(Exception):
    """An error that is reported to the caller in one sentence.

    hint: advice on how to fix it, or empty.
    """

    exit_code = EXIT_NO
    hint = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ConfbuildError):
    """An error in the command line, or in a file that the command line names."""

    exit_code = EXIT_USAGE


class Malformed(ConfbuildError, ValueError):
    """An error in the form of some input.

    structure: the name of the malformed structure, which begins the message.
    """

    def __init__(self, structure: str, message: str) -> None:
        super().__init__(f"{structure}: {message}")
        self.structure = structure


class BuildFailed(ConfbuildError):
    """A failure that ends a build.

    error_type: one of FAILURES, for the `complete` event.
    """

    def __init__(self, error_type: str, message: str, hint: str = "") -> None:
        # One line of bounded length, because the message may quote output of the build.
        super().__init__(" ".join(message[:4096].split()) or error_type, hint)
        self.error_type = error_type


class Refused(ConfbuildError):
    """An HTTP request that the server answers with problem details.  [RFC9457]

    status: the HTTP status.
    error_type: the stable word of [CONTRACT 1.4].
    headers: further fields of the response.
    """

    def __init__(self, status: int, error_type: str, message: str, headers: "Mapping[str, str] | None" = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status
        self.error_type = error_type
        self.headers = dict(headers or {})


class RemoteError(ConfbuildError):
    """A server that could not be reached, refused the request or broke the protocol.

    status: the HTTP status, or 0 without a response.
    """

    exit_code = EXIT_SERVER

    def __init__(self, message: str, status: int = 0, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status = status


def source_error(message: str, hint: str = "") -> BuildFailed:
    """Return the error for a source that cannot be used."""
    return BuildFailed("SourceError", message, hint)


def limit_error(message: str) -> BuildFailed:
    """Return the error for a source that exceeds a limit, and for a full disk."""
    return BuildFailed("LimitError", message)


def vm_error(message: str) -> BuildFailed:
    """Return the error for a VM that failed."""
    return BuildFailed("VmError", message)


# endregion 2
# ==============================================================================
# region 3. Bytes and JSON                                        [uses nothing]
# ==============================================================================
# Decoders for untrusted input: JSON [RFC8259], base64 [RFC4648], hexadecimal digits and binary fields, and
# check_schema, the one check of the form of a JSON document. Each needs time and memory linear in its input and
# raises Malformed for any input that it does not accept; the parameter `name` or `structure` names the input in that
# error. Also two hashes. Everything here is pure, and any thread may call it.

Json = Mapping[str, Any]  # a JSON object
Strings = Mapping[str, str]

# One string, bracket or brace. An unterminated string extends to the end, so no byte is scanned twice. The quantifiers
# are possessive because re would otherwise remember 120 bytes for each step that it could take back.
_JSON_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


def parse_json(
    data: bytes, name: str, max_depth: int = 127, max_integer: int = 10**20 - 1, surrogates: str = "strict"
) -> Any:
    """Return the value of one JSON document.  [RFC8259]

    data: at most MAX_JSON bytes of UTF-8 without a byte order mark. No duplicate names, NaN, Infinity or lone
        surrogates; each string has at most 1 MiB as written.
    max_depth: of nested arrays and objects.
    max_integer: the largest absolute value of an integer.
    surrogates: "surrogatepass" accepts lone ones, which are bytes of file names that are not UTF-8 (PEP 383).
    Raises Malformed.
    """

    def integer(text: str) -> int:
        # The length comes first: int() refuses more than 4300 digits with an error of its own.
        if len(text) > 21 or abs(int(text)) > max_integer:
            raise Malformed(name, f"an integer beyond {max_integer}")
        return int(text)

    def fraction(text: str) -> float:
        # NaN is not less than anything. json also calls this for NaN and Infinity, which are not JSON.
        if len(text) > 32 or not abs(float(text)) < float("inf"):
            raise Malformed(name, f"{text[:40]}, expected a finite number of at most 32 characters")
        return float(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise Malformed(name, f"the name {key[:80]!r} occurs twice in one object")
            found[key] = value
        return found

    if len(data) > MAX_JSON:
        raise Malformed(name, f"{len(data)} bytes, expected at most {MAX_JSON}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Malformed(name, f"not UTF-8 at byte {e.start}") from None
    depth = 0
    for token in _JSON_TOKEN.finditer(text):  # before json.loads, which would exhaust Python's stack
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if token.end() - token.start() - 2 > MIB:  # without the quotes
            raise Malformed(name, f"a string of more than {MIB} characters")
        if depth > max_depth:
            raise Malformed(name, f"nested deeper than {max_depth}")
    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=fraction, parse_int=integer, parse_float=fraction
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8", surrogates)
    except UnicodeEncodeError:
        raise Malformed(name, "a lone surrogate is not a character") from None
    except json.JSONDecodeError as e:
        raise Malformed(name, f"not JSON: {e}") from None
    return value


def compact_json(value: Any) -> str:
    """Return value as JSON: one line of ASCII without spaces, the form of events and responses."""
    return json.dumps(value, separators=(",", ":"))


def json_bytes(value: Any) -> bytes:
    """Return compact_json(value) as bytes."""
    return compact_json(value).encode("ascii")


NONCE_PATTERN = "[0-9a-fA-F]{32}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"  # the second form is a UUID


def parse_nonce(text: Any) -> str:
    """Return the nonce as 32 lower-case digits, or "" if text is neither 32 hexadecimal digits nor a UUID."""
    return text.replace("-", "").lower() if isinstance(text, str) and re.fullmatch(NONCE_PATTERN, text) else ""


def decode_base64(text: Any, name: str, urlsafe: bool = False) -> bytes:
    """Return the bytes of canonical base64.  [RFC4648 4, 5]

    text: in the standard alphabet, with padding. A JSON value that is not a string is refused.
    urlsafe: text uses the URL-safe alphabet instead, with or without padding.
    Raises Malformed.
    """
    if isinstance(text, str):
        standard = text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4) if urlsafe else text
        try:
            data = base64.b64decode(standard)
        except ValueError:  # also for text that is not ASCII
            data = b""
        # b64decode skips foreign characters and ignores spare bits. Encoding again finds both.
        whole = base64.b64encode(data, b"-_" if urlsafe else None).decode("ascii")
        if text == whole or (urlsafe and text == whole.rstrip("=")):
            return data
    raise Malformed(name, f"expected canonical {'base64url' if urlsafe else 'base64'}")


def decode_hex(text: Any, name: str) -> bytes:
    """Return the bytes of pairs of hexadecimal digits of either case.  [RFC4648 8]

    Raises Malformed.
    """
    # bytes.fromhex would also accept spaces.
    if not isinstance(text, str) or not re.fullmatch("(?:[0-9a-fA-F]{2})*+", text):
        raise Malformed(name, "expected pairs of hexadecimal digits")
    return bytes.fromhex(text)


# The value of a schema: text without control characters.
WORD = re.compile(r"[^\x00-\x1f\x7f]+")
_KINDS = {int: "an integer", str: "text", dict: "an object", list: "an array"}


def check_schema(value: Any, schema: Any, structure: str, path: str = "", ordered: bool = False) -> Any:
    """Return value, a parsed JSON document, if it matches schema.

    schema: one of
        a function, such as decode_base64: is called with the value and its place, and its result replaces the value
        a type: int, str, dict or list (True is not an int), or object: any value
        a compiled pattern: text that matches from its first to its last character
        a dict: an object with exactly these keys; a key that ends with "?" is optional; with the key "...", any further
            keys may follow. So keys that a sender chose must never become keys of a schema
        a list of one schema: an array of any length; of n copies of a schema: an array of n items
        a tuple of schemas: one of these alternatives
        anything else: this value
    structure: names the document in errors.
    path: where value stands in the document, such as ".parts.kernel"; "" is the whole document.
    ordered: keys must appear in the order of the schema.

    Raises Malformed, with the path of the first mismatch.
    """

    def refuse(problem: str) -> NoReturn:
        raise Malformed(structure, f"{path}: {problem}".removeprefix(": "))

    if callable(schema) and not isinstance(schema, type):
        return schema(value, structure + path)
    if isinstance(schema, tuple):
        errors: list[Malformed] = []
        for alternative in schema:
            try:
                return check_schema(value, alternative, structure, path, ordered)
            except Malformed as e:
                errors.append(e.with_traceback(None))  # whose frames hold this list, and all that the caller has
        # The alternative that matches deepest is the one that the writer meant.
        raise max(errors, key=lambda e: str(e)[len(structure) + 2 :].partition(":")[0].count(".")) from None
    if isinstance(schema, dict) and isinstance(value, dict):
        wanted = {k.rstrip("?"): v for k, v in schema.items() if not k.endswith("?") or k[:-1] in value}
        is_open = wanted.pop("...", None) is not None
        arrange = list if ordered else sorted
        if arrange(key for key in value if key in wanted or not is_open) != arrange(wanted):
            order = " in this order" if ordered else ""
            refuse(f"has the keys {', '.join(value)[:200] or 'none'}, expected {', '.join(wanted)}{order}")
        inner = {k: check_schema(value[k], v, structure, f"{path}.{k}", ordered) for k, v in wanted.items()}
        return value | inner
    if isinstance(schema, list) and isinstance(value, list):
        if len(schema) not in (1, len(value)):
            refuse(f"has {len(value)} items, expected {len(schema)}")
        return [check_schema(item, schema[0], structure, f"{path}[{i}]", ordered) for i, item in enumerate(value)]
    if isinstance(schema, re.Pattern):
        matches = isinstance(value, str) and schema.fullmatch(value) is not None
        expected = "text without control characters" if schema is WORD else f"the form {schema.pattern}"
    elif isinstance(schema, type | dict | list):
        kind = schema if isinstance(schema, type) else type(schema)
        matches, expected = kind is object or type(value) is kind, _KINDS.get(kind, "")
    else:
        matches, expected = type(value) is type(schema) and value == schema, json.dumps(schema)
    if not matches:
        refuse(f"{json.dumps(value)[:80]}, expected {expected}")
    return value


class Reader:
    """A bounds-checked cursor over the fields of a binary structure.

    structure: names the data in the Malformed that every method raises if the data does not fit.
    at: the offset of the next field, in bytes.
    """

    def __init__(self, data: bytes, structure: str) -> None:
        self.at = 0
        self.data = data
        self._structure = structure

    def require(self, holds: bool, message: str) -> None:
        """Raise Malformed with message unless holds."""
        if not holds:
            raise Malformed(self._structure, message)

    def left(self) -> int:
        """Return the number of bytes that have not been read."""
        return len(self.data) - self.at

    def take(self, size: int) -> bytes:
        """Return the next size bytes."""
        if size > self.left():
            raise Malformed(self._structure, f"ends at byte {len(self.data)}, inside a field")
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Return the next fields, in the notation of the struct module: "<" little-endian, ">" big-endian."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def end(self) -> None:
        """Raise unless every byte has been read."""
        self.require(not self.left(), f"{self.left()} bytes are left over")


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of data as 64 lower-case digits."""
    return hashlib.sha256(data).hexdigest()


def merkle_root(entries: Sequence[str]) -> str:
    """Return the root of the Merkle tree over entries, as 64 lower-case digits.  [CONTRACT 3.6]

    A leaf is the SHA-256 of an entry in UTF-8, a parent is SHA-256(left || right), and an unpaired node moves up
    unchanged.
    Raises ValueError if entries is empty.
    """
    level = [hashlib.sha256(entry.encode("utf-8")).digest() for entry in entries]
    if not level:
        raise ValueError("a Merkle tree needs at least one entry")
    while len(level) > 1:
        pairs = [b"".join(level[i : i + 2]) for i in range(0, len(level), 2)]
        level = [pair if len(pair) == 32 else hashlib.sha256(pair).digest() for pair in pairs]
    return level[0].hex()


# endregion 3
# ==============================================================================
# region 4. Records                                               [uses nothing]
# ==============================================================================
# Immutable values that pass between sections: what the verifier takes and returns, what a server accepts, and the
# forms of a time. None of them checks its fields: the code that creates one does. Only utc_now reads the clock.


class Check(NamedTuple):
    """One comparison of a verdict.

    status: "passed", "failed" or "not checked".
    expected, actual: the compared values as text, or empty.
    detail: the reason of the status, or empty.
    """

    name: str
    status: str
    expected: str = ""
    actual: str = ""
    detail: str = ""


class Verdict(NamedTuple):
    """The result of verify_bundle.

    verdict: "passed", "failed", or "simulated": nothing failed, but no hardware signed the evidence.
    claims: values from the evidence, as trustworthy as the verdict.
    checks: every comparison, including those that were not asked for ("not checked").
    """

    verdict: str
    platform: str
    claims: Mapping[str, Any]
    checks: Sequence[Check]

    def __bool__(self) -> NoReturn:
        """Raise TypeError: a tuple that is not empty would be true, even if the bundle failed."""
        raise TypeError("a Verdict is neither true nor false: use .ok")

    @property
    def ok(self) -> bool:
        """Whether the verdict is "passed". A simulated bundle is not ok."""
        return self.verdict == "passed"

    @property
    def failures(self) -> list[Check]:
        """The checks that failed, in their order."""
        return [check for check in self.checks if check.status == "failed"]

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object of `verify --format json`.  [CONTRACT 5.5]"""
        return {**self._asdict(), "checks": [check._asdict() for check in self.checks]}


class BundleFiles(NamedTuple):
    """The files of a bundle, as the verifier needs them.

    provenance: the bytes of provenance.json, or None if the file is absent.
    evidence: the bytes of evidence.json.
    artifacts: name -> SHA-256 in hexadecimal, or the reason why it has none ("not a regular file").
    others: for evidence alone, the names of the files next to it, which the verdict does not cover.
    """

    provenance: bytes | None
    evidence: bytes
    artifacts: Strings
    others: Sequence[str] = ()


class ImageFacts(NamedTuple):
    """The result of hashing the parts of an image directory.

    manifest_sha256: of image.json. It is the HOST_DATA of an SNP guest that boots the image.
    parts: empty, or why the parts differ from image.json.
    firmware: empty, or why the firmware may boot something that is not measured.
    launch_digests: "EPYC-v4, 1 vCPU" -> the recomputed launch digest in hexadecimal.
    """

    manifest_sha256: str
    parts: str
    firmware: str
    launch_digests: Strings


Text = str | None  # in Expectations


class Expectations(NamedTuple):
    """The reference values of the caller.

    None and False mean: not checked. An empty text or list is compared like any other. Bytes are written as hexadecimal
    digits: in either case for values of the evidence, in lower case for values of the provenance.
    """

    nonce: Text = None
    measurements: Sequence[str] | None = None  # one of them must be the report's
    image: ImageFacts | None = None  # the VM must have booted it
    igvm: Text = None  # the launch digest of the IGVM file that the VM must have booted
    disk: Text = None  # empty, or why the disk does not have the root hash of that file's command line
    # "snp" or "milan:snp" -> minimum level in each TCB of the report; "tdx" -> TEE_TCB_SVN, as one big-endian number.
    min_tcb: Mapping[str, int] | None = None
    host_data: Text = None
    guest_policy: Sequence[int] | None = None  # mask, value of these bits, minimum ABI (major << 8 | minor)
    platform_info: int | None = None  # the bits that may be set
    vmpl: int | None = None  # None: 0 for SEV-SNP
    guest_svn: int | None = None
    min_guest_svn: int | None = None
    min_firmware: Sequence[int] | None = None  # major, minor, build, of the current and the committed version
    min_mit_vector: int | None = None  # bits that both mitigation vectors must have
    chip_id: Text = None
    family_id: Text = None
    image_id: Text = None
    id_key_digest: Text = None
    author_key_digest: Text = None
    report_id: Text = None
    csp_id: Text = None  # of a VLEK, such as CN=cc-us-east-2.amazonaws.com
    report_data: Text = None  # all 64 bytes that the attester signed
    allow_debug: bool = False
    source_uri: Text = None
    source_commit: Text = None
    source_tree: Text = None
    lockfile_sha256: Text = None
    dependencies: Sequence[str] | None = None  # the uris of all dependencies
    packages: Sequence[str] | None = None  # some dependencies: NAME@VERSION of the default registry, or a uri
    builder_id: Text = None
    build_type: Text = None
    build_log_sha256: Text = None
    pcrs: Mapping[int, str] | None = None  # index -> value, on Azure
    rtmrs: Mapping[int, str] | None = None  # index -> value, of a TD
    mr_config_id: Text = None
    service_td: Text = None  # MRSERVICETD of the one service TD that may be bound
    compose_hash: Text = None  # of dstack
    accept_tcb: Sequence[str] = ()  # statuses of a TD's TCB that pass besides the harmless ones; never Revoked
    require_collateral: bool = False
    finished: tuple[str, str] | None = None  # earliest and latest finishedOn, as 2026-11-23T00:00:00Z
    allow_legacy_digest: bool = False
    evidence_only: bool = False  # provenance and artifacts are ignored and may be absent
    require_crl: bool = False
    require_tee: bool = False


def utc_time(seconds: float) -> str:
    """Return a time as UTC text, such as 2026-11-23T00:00:00Z.

    seconds: since 1970.
    """
    # %Y does not pad: year 203 would sort after 2026.
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)).rjust(20, "0")


SCHEMES = ("https", "http")


class BuildRequest(NamedTuple):
    """A validated POST /build.  [CONTRACT 1.6]

    repo_url: a git URL, or empty if the source is an archive called source_name.
    repo_ref: a branch, tag or commit, or empty for the default branch.
    toolchain: the name of a toolchain, or empty for the first whose marker exists.
    subdir: the folder of the source that is built, or empty for the source itself.
    artifacts: patterns of the files that are the artifacts, or empty for what the toolchain makes.
    """

    nonce: str
    repo_url: str = ""
    repo_ref: str = ""
    source_name: str = ""
    toolchain: str = ""
    subdir: str = ""
    artifacts: Sequence[str] = ()


class SourcePolicy(NamedTuple):
    """The limits of the sources that a server accepts.

    schemes: of URLs.
    loopback: whether a URL may lead to this machine.
    max_archive, max_unpacked: in bytes.
    max_ratio: of the unpacked to the packed size, above 64 MiB.
    allow_filters: accept repositories whose files have filters, such as git LFS.
    """

    schemes: Sequence[str] = SCHEMES
    loopback: bool = True
    max_archive: int = MAX_ARCHIVE
    max_unpacked: int = MAX_UNPACKED
    max_ratio: int = MAX_RATIO
    allow_filters: bool = False


def utc_now() -> str:
    """Return the current time in UTC with microseconds, in the form of the provenance.  [CONTRACT 3.3]"""
    return datetime.now(UTC).isoformat(timespec="microseconds")


# endregion 4
# ==============================================================================
# region 5. DER                                                   [uses nothing]
# ==============================================================================
# A reader of DER [X690], the encoding of certificates and revocation lists. An element is a tag, a length and that
# many contents octets; a constructed element contains elements. The reader accepts only what X.509 needs: tags of one
# byte, definite lengths, and each value in its shortest form. Every function raises Malformed for any other bytes. It
# takes time linear in the number of bytes, and does not recurse on its input.
#
# Why so strict: a signature covers bytes, but people trust what the bytes say. If a value had two encodings, or if
# bytes could be left over, two readers could find two different certificates in the same signed bytes.

# Tags [X680 8.4, X690 8.1.2].
BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID, SEQUENCE, SET = 0x01, 0x02, 0x03, 0x04, 0x06, 0x30, 0x31
UTF8_STRING, PRINTABLE_STRING, IA5_STRING, UTC_TIME, GENERALIZED_TIME = 0x0C, 0x13, 0x16, 0x17, 0x18
# The other string types, such as TeletexString, have alphabets that two readers decode differently. No certificate of
# AMD or Intel contains them.
_STRING_CODECS = {UTF8_STRING: "utf-8", PRINTABLE_STRING: "ascii", IA5_STRING: "ascii"}
_DER_TIME = re.compile(
    rb"""
    (\d{4}) (0[1-9]|1[0-2]) (0[1-9]|[12]\d|3[01])  # year, month, day
    ([01]\d|2[0-3]) ([0-5]\d) ([0-5]\d) Z          # hour, minute, second; no fraction, UTC only
    """,
    re.VERBOSE,
)
_T = TypeVar("_T")


class Der:
    """A cursor over DER elements that follow each other in data.

    structure: names the data in errors.
    Every method that reads the next element raises Malformed if that element has another tag or a bad encoding.
    """

    def __init__(self, data: bytes, structure: str) -> None:
        self._reader = Reader(data, structure)
        self._structure = structure

    def fail(self, message: str) -> NoReturn:
        """Raise Malformed with message and the offset that this cursor has reached."""
        raise Malformed(self._structure, f"{message} at byte {self._reader.at}")

    def require(self, holds: bool, message: str) -> None:
        """Raise Malformed unless holds."""
        if not holds:
            self.fail(message)

    def end(self) -> None:
        """Raise Malformed unless every element has been read."""
        self.require(not self._reader.left(), "bytes are left over")

    def peek(self) -> int:
        """Return the tag of the next element, or -1 at the end."""
        return self._reader.data[self._reader.at] if self._reader.left() else -1

    def element(self, tag: int) -> tuple[bytes, bytes]:
        """Return (the whole encoding, the contents octets) of the next element.  [X690 8.1, 10.1]"""
        # The caller names the tag that it expects, so a sender cannot pass off one kind of element as another.
        reader, start = self._reader, self._reader.at
        if self.peek() != tag:
            self.fail(f"tag {tag:#04x} is missing")
        length = reader.take(2)[1]
        # Below 0x80 this octet is the length. Above 0x80 it says how many octets follow that hold the length. 0x80
        # itself would mean the indefinite form, which DER forbids. DER wants the fewest octets: no leading zero, and
        # the short form for a length below 0x80.
        if length >= 0x80:
            octets = reader.take(length - 0x80)
            length = int.from_bytes(octets, "big")
            shortest = 1 <= len(octets) <= 4 and octets[0] > 0 and length >= 0x80
            self.require(shortest, "a length that is not definite and in the shortest form")
        contents = reader.take(length)
        return reader.data[start : reader.at], contents

    def contents(self, tag: int) -> bytes:
        """Return the contents octets of the next element."""
        return self.element(tag)[1]

    def enter(self, tag: int = SEQUENCE) -> "Der":
        """Return a cursor over the elements inside the next one."""
        return Der(self.contents(tag), self._structure)

    def read_all(self, parse: Callable[["Der"], _T]) -> _T:
        """Return parse(self), which must read every element."""
        # What a parser left unread would be signed bytes that nobody has looked at.
        value = parse(self)
        self.end()
        return value

    def each(self, tag: int = SEQUENCE) -> Iterator["Der"]:
        """Yield a cursor inside each element of the next SEQUENCE.

        The caller must read the whole element before it asks for the next one.

        tag: of the elements.
        """
        elements = self.enter()
        while elements.peek() != -1:
            inside = elements.enter(tag)
            yield inside
            inside.end()

    def integer(self) -> int:
        """Return an INTEGER, which is in two's complement.  [X690 8.3]"""
        octets = self.contents(INTEGER)
        # The first nine bits must differ, or the first octet could be left out.
        spare = len(octets) > 1 and octets[0] in (0x00, 0xFF) and octets[0] >> 7 == octets[1] >> 7
        self.require(bool(octets) and not spare, "an INTEGER that is empty or not in the fewest octets")
        return int.from_bytes(octets, "big", signed=True)

    def oid(self) -> str:
        """Return an OBJECT IDENTIFIER in dotted form, of at most 64 octets.  [X690 8.19]"""
        # The OIDs of AMD and Intel have about a dozen octets. Without a limit, one arc could become a number so long
        # that Python takes quadratic time to print it.
        octets, arcs = self.contents(OID), [0]
        ended = 0 < len(octets) <= 64 and octets[-1] < 0x80
        self.require(ended, "an OBJECT IDENTIFIER that is empty, unfinished or too long")
        for octet in octets:  # seven bits of an arc; the high bit says that more follow
            self.require(octet != 0x80 or arcs[-1] > 0, "an OBJECT IDENTIFIER that is not in the shortest form")
            arcs[-1] = arcs[-1] << 7 | octet & 0x7F
            if octet < 0x80:
                arcs.append(0)
        first = min(arcs[0] // 40, 2)  # the first number holds two arcs: 40 * first + second [X690 8.19.4]
        return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:-1])))

    def bit_string(self) -> bytes:
        """Return a BIT STRING of whole octets.  [X690 8.6]"""
        # The first octet is the number of unused bits at the end. Keys and signatures use all bits. KeyUsage does not,
        # but nothing here reads it.
        octets = self.contents(BIT_STRING)
        self.require(octets[:1] == b"\x00", "a BIT STRING with unused bits")
        return octets[1:]

    def text(self) -> str:
        """Return a UTF8String, PrintableString or IA5String."""
        tag = self.peek()
        self.require(tag in _STRING_CODECS, "expected a string")
        try:
            return self.contents(tag).decode(_STRING_CODECS[tag])
        except UnicodeDecodeError:
            self.fail("a string with bytes outside its alphabet")

    def time(self) -> str:
        """Return a UTCTime or GeneralizedTime as text such as 2026-11-23T00:00:00Z.  [RFC5280 4.1.2.5]

        Such texts sort like the times that they name.
        """
        short = self.peek() == UTC_TIME
        # Both types become the same form, so that not_before <= now <= not_after compares times. Days that do not
        # exist, such as February 31, are accepted: nothing calculates with these texts.
        octets = self.contents(UTC_TIME if short else GENERALIZED_TIME)
        if short:  # it has two digits for the year: 50 to 99 belong to the last century
            octets = (b"20" if octets < b"5" else b"19") + octets
        match = _DER_TIME.fullmatch(octets)
        if match is None:
            self.fail("expected a time in UTC")
        # Not match.expand: it parses its template anew for each of the 50,000 times that a list of 1 MiB may hold.
        return (b"%b-%b-%bT%b:%b:%bZ" % match.groups()).decode("ascii")


# endregion 5
# ==============================================================================
# region 6. Signatures                                            [uses nothing]
# ==============================================================================
# Verification of the signature schemes that AMD, Intel and TPMs use: RSASSA-PSS, RSASSA-PKCS1-v1_5 and ECDSA with
# P-384 or P-256. Only public keys occur here, and every input is public, so no step needs constant time and values are
# compared with `==`. The code is slow and has had no outside audit. Read it next to the standards: comments number
# their steps, variables have their symbols. "Inconsistent" or "invalid signature" in a standard is BadSignature here.


class BadSignature(ConfbuildError):
    """An error for a signature that the key did not make over the message."""


class RsaKey(NamedTuple):
    """An RSA public key: modulus and exponent.  [RFC8017 3.1]"""

    n: int
    e: int


class Curve(NamedTuple):
    """A curve y^2 = x^3 - 3x + b modulo p, and the hash that its signatures use.  [SP800-186 3.2.1]

    g: base point (x, y) of prime order n; the cofactor is 1.
    sha: a hashlib constructor; its digests have as many bits as n.
    """

    name: str
    p: int
    n: int
    b: int
    g: tuple[int, int]
    sha: Callable[[bytes], Any]


P256 = Curve(
    "P-256",
    2**256 - 2**224 + 2**192 + 2**96 - 1,
    0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
    (
        0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
        0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
    ),
    hashlib.sha256,
)
P384 = Curve(
    "P-384",
    2**384 - 2**128 - 2**96 + 2**32 - 1,
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
    0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF,
    (
        0xAA87CA22BE8B05378EB1C71EF320AD746E1D3B628BA79B9859F741E082542A385502F25DBF55296C3A545E3872760AB7,
        0x3617DE4A96262C6F5D9E98BF9292DC29F8F41DBD289A147CE9DA3113B5F0B8C00A60B1CE1D7E819D7A431D7C90EA0E5F,
    ),
    hashlib.sha384,
)


class Point(NamedTuple):
    """Affine coordinates; nothing has checked that they lie on the curve. A public key is Q of the standard."""

    curve: Curve
    x: int
    y: int


PublicKey = RsaKey | Point
# DER of DigestInfo up to the digest, for SHA-256 [RFC8017 9.2 note 1].
_SHA256_DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


def _require(holds: bool, message: str = "the signature does not match the key and the signed bytes") -> None:
    """Raise BadSignature unless holds."""
    if not holds:
        raise BadSignature(message)


def _rsavp1(key: RsaKey, signature: bytes) -> int:
    """Return the message representative m.  [RFC8017 5.2.2; steps 1 and 2 of 8.1.2 and 8.2.2]"""
    k = (key.n.bit_length() + 7) // 8
    _require(len(signature) == k, f"the signature has {len(signature)} bytes, expected {k} like the modulus")  # step 1
    s = int.from_bytes(signature, "big")
    _require(s < key.n, "the signature is not smaller than the modulus")  # otherwise s + n would be valid as well
    return pow(s, key.e, key.n)


def _mgf1(seed: bytes, size: int) -> bytes:
    """Return the mask of size bytes, made with SHA-384.  [RFC8017 B.2.1]"""
    blocks = (hashlib.sha384(seed + counter.to_bytes(4, "big")).digest() for counter in range((size + 47) // 48))
    return b"".join(blocks)[:size]


def verify_rsassa_pss(key: RsaKey, message: bytes, signature: bytes) -> None:
    """Raise BadSignature unless signature is key's RSASSA-PSS signature over message.  [RFC8017 8.1.2, 9.1.2]

    The parameters are those of AMD's certificates: SHA-384, MGF1 with SHA-384, a salt of 48 bytes, trailer field 0xBC.
    """
    h_len = s_len = 48
    m = _rsavp1(key, signature)
    em_bits = key.n.bit_length() - 1
    em_len = (em_bits + 7) // 8
    _require(m.bit_length() <= 8 * em_len)  # 8.1.2 step 2c: m fits in em, which may be a byte shorter than n
    em = m.to_bytes(em_len, "big")
    m_hash = hashlib.sha384(message).digest()  # 9.1.2 steps 1 and 2
    _require(em_len >= h_len + s_len + 2)  # step 3
    _require(em[-1] == 0xBC)  # step 4
    masked_db, h = em[: em_len - h_len - 1], em[em_len - h_len - 1 : -1]  # step 5
    spare = 8 * em_len - em_bits
    _require(masked_db[0] >> (8 - spare) == 0)  # step 6: the bits to the left of em_bits are zero
    db_mask = _mgf1(h, len(masked_db))  # step 7
    db = bytes(left ^ right for left, right in zip(masked_db, db_mask, strict=True))  # step 8
    db = bytes((db[0] & 0xFF >> spare,)) + db[1:]  # step 9
    _require(db[:-s_len] == bytes(em_len - h_len - s_len - 2) + b"\x01")  # step 10: zeros, then 0x01
    salt = db[-s_len:]  # step 11
    _require(h == hashlib.sha384(bytes(8) + m_hash + salt).digest())  # steps 12 to 14


def verify_rsassa_pkcs1_v1_5(key: RsaKey, message: bytes, signature: bytes) -> None:
    """Raise BadSignature unless signature is key's RSASSA-PKCS1-v1_5 signature over message.  [RFC8017 8.2.2, 9.2]

    The hash is SHA-256.
    """
    m = _rsavp1(key, signature)  # steps 1 and 2
    t = _SHA256_DIGEST_INFO + hashlib.sha256(message).digest()
    _require(len(signature) >= len(t) + 11, "the modulus is too short")  # step 3
    # Build the only correct encoding and compare. Parsing the encoding instead is how Bleichenbacher's forgery of 2006
    # got past verifiers: they ignored bytes after the digest.
    em = b"\x00\x01" + b"\xff" * (len(signature) - len(t) - 3) + b"\x00" + t
    _require(m.to_bytes(len(signature), "big") == em)  # step 4


# Points during a multiplication are in Jacobian coordinates: (x, y, z) stands for the affine point (x/z^2, y/z^3), and
# z = 0 for the point at infinity. They need one modular division at the end instead of one in each step. [EFD]


def _double(p: int, x: int, y: int, z: int) -> tuple[int, int, int]:
    """Return twice a Jacobian point.  [EFD, shortw-jacobian-3, dbl-2001-b]"""
    delta, gamma = z * z % p, y * y % p
    beta, alpha = x * gamma % p, 3 * (x - delta) * (x + delta) % p
    x3 = (alpha * alpha - 8 * beta) % p
    return x3, (alpha * (4 * beta - x3) - 8 * gamma * gamma) % p, 2 * y * z % p


def _add(p: int, x1: int, y1: int, z1: int, x2: int, y2: int) -> tuple[int, int, int]:
    """Return the sum of a Jacobian point and an affine one.  [EFD, shortw-jacobian-3, madd with Z2 = 1]"""
    if z1 == 0:
        return x2, y2, 1
    zz = z1 * z1 % p
    h, r = (x2 * zz - x1) % p, (y2 * z1 * zz - y1) % p
    if h == 0:  # the same point or its negative: the formula below holds for neither
        return _double(p, x1, y1, z1) if r == 0 else (1, 1, 0)
    hh = h * h % p
    hhh, v = h * hh % p, x1 * hh % p
    x3 = (r * r - hhh - 2 * v) % p
    return x3, (r * (v - x3) - y1 * hhh) % p, z1 * h % p


def _affine(p: int, x: int, y: int, z: int) -> tuple[int, int] | None:
    """Return the affine form of a Jacobian point, or None for the point at infinity."""
    if z == 0:
        return None
    w = pow(z, -1, p)
    return x * w * w % p, y * w * w * w % p


def verify_ecdsa(curve: Curve, q: PublicKey, message: bytes, r: int, s: int) -> None:
    """Raise BadSignature unless (r, s) is q's ECDSA signature over message.  [FIPS186-5 6.4.2]

    curve: the curve that q must lie on; it also determines the hash. Every other parameter may have any value.
    s may be above n / 2: the standard allows it, and AMD's firmware makes such signatures.
    """
    if not isinstance(q, Point) or q.curve is not curve:
        raise BadSignature(f"the public key is not of {curve.name}")
    p, n = curve.p, curve.n
    # q is valid [SP800-186 D.1.1]: in range and on the curve. Its order follows from the cofactor 1.
    in_range = 0 <= q.x < p and 0 <= q.y < p
    on_curve = (q.y * q.y - q.x**3 + 3 * q.x - curve.b) % p == 0
    _require(in_range and on_curve, f"the public key is not a point of {curve.name}")
    _require(0 < r < n and 0 < s < n, "r or s is out of range")  # step 1
    e = int.from_bytes(curve.sha(message).digest(), "big")  # steps 2 and 3: as long as n, so no bit is cut
    s_inverse = pow(s, -1, n)  # step 4
    u, v = e * s_inverse % n, r * s_inverse % n  # step 5
    # Step 6: R1 = [u]G + [v]Q. One pass over the bits of both factors: double, then add G, Q or G + Q (Shamir's trick).
    table = (None, curve.g, q[1:], _affine(p, *_add(p, *curve.g, 1, *q[1:])))
    point = (1, 1, 0)
    for bit in range(n.bit_length() - 1, -1, -1):
        point = _double(p, *point)
        term = table[(u >> bit & 1) + 2 * (v >> bit & 1)]
        if term is not None:
            point = _add(p, *point, *term)
    r1 = _affine(p, *point)
    _require(r1 is not None and r1[0] % n == r)  # steps 6 to 8


# endregion 6
# ==============================================================================
# region 7. Certificates                                             [uses 5, 6]
# ==============================================================================
# X.509 certificates and revocation lists of the key hierarchies of AMD and Intel [RFC5280, VCEK, PCK].
#
# AMD: two chains lead to the key that signs a report: ARK -> ASK -> VCEK (of one chip) and ARK -> ASVK -> VLEK (of one
# cloud provider). "VEK" stands for either. The CA keys (ARK, ASK, ASVK) are pinned in the table below; only the VEK
# comes with the evidence. The CA keys are RSA-4096 and sign with RSASSA-PSS; a VEK is a P-384 key.
#
# Intel: root -> PCK CA -> PCK (of one machine), and root -> TCB signer. Only the root's key is pinned; the other
# certificates come with the evidence. All are P-256 keys and sign with ECDSA and SHA-256.
#
# Functions named parse_* authenticate nothing. verify_* and make_anchors check signatures.
#
# This is not a validator for the Web: there are no policies, host names, or paths to search for. Each chain has a known
# length, and each certificate a known place in it. So little remains of path validation [RFC5280 6]: a certificate
# names its issuer, the issuer has signed it, the issuer may sign certificates, and the time lies in the certificate's
# period. The caller of these functions checks the time, and that the chain ends in the pinned key.

# Anybody who can replace a key in this table can forge every report. To audit it, compare the SHA-256 next to each key
# with the one that openssl prints; the tests recompute them. A new product of AMD needs a new row here.
#
# AMD's CA keys: role, common name, serial number, notBefore, notAfter, SHA-256 of the SubjectPublicKeyInfo, modulus.
# AMD publishes them: https://kdsintf.amd.com/vcek/v1/Milan/cert_chain holds the ASK and the ARK,
# vlek/v1/Milan/cert_chain the ASVK and the ARK. To print the SHA-256 of the key in a certificate:
#     openssl x509 -in FILE -noout -pubkey | openssl pkey -pubin -outform der | sha256sum
# fmt: off
_AMD_KEYS = (
    ("ark", "ARK-Milan", 0x010000, "2020-10-22T17:23:05Z", "2045-10-22T17:23:05Z",
     "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9", """
     0Ld52RJOdeiJlqK2JdsVmD7FktuotWwX1fNgW41XY9Xz1HEhSUmhLz9Cu9DHRlvgJSNxbeYYsnJfvyjx1MfU0V5tkKiU1EesNFta1kTA0szN
     isdYc9isqk7mXT5+KfGRbfc4V/9zRIcE8jlHN61S1ju8X93+6dxDUrG2SzxqJ4BhqyYmUDruPXJSX4vUc01P7j98MpqOS95rORdGHeI52Naz
     5m2B+O+vjsC060d37jY9LFeuOP4Meri8qgfi2S5kKqg/aF6aPtuAZQVR7u3KFYXP59XmJgtcog05gmI0T/OitLhuzVvpZcLph0odh/1IPXqx
     3+MnjD97A7fXpqGd/y8KxX7jksTEzAOgbKAeam3lm+3yKIcTYMlsRMXPcjNbIvmsBykD//xSniusuHBkgnlENEWx1UcbQQrs+gVDkuVPhsnz
     IRNgYvM48Y+7LGiJYnrmE8xcrexekBxrva2V9TJQqnN3Q53kt5viQi3+gCfmkwC0F0tirIZbLkXPrPwzZ0M9eNxhIySb2npJfgnqz55I0u33
     wh4r0ZNQeTGfw03MBUtyuzGesGkcw+loqMaq1qR4tjGbPYxCvpCq7+OgpCCoMNit2uLo9M18fHz10lOMT8nWAUvRZFzteXCm+7PHdYPlmQwU
     w3LvenJ/ILXoQPHfbkH0CyPfhl1jWhJFZas="""),
    ("ask", "SEV-Milan", 0x010001, "2020-10-22T18:24:20Z", "2045-10-22T18:24:20Z",
     "42491669ccb851d627ea9846cd24eccbeb7de7c2a62740120fff88001d38ebb6", """
     nU2drrNTfbhNQIllf+W2y+ROCbSzId1aKZft2T9zjZQOzjGccl17i1mIKWl7NTcB0VYXt3JxZSzOZjsjLNVAEN2MGj9TiedL+QewKZX0JmQE
     uYjm+WKksLtxgdLp9E7EZNwNDqV1r0qRP5tB8OWkyQbIdLeu4aCz7j/Sl1FkBytev9sbFGzt7cwnjzi9m7noqsk+uRVBp3+In35QPdcj8Yfl
     EmnHBNvuUDJhLCJMW8KOjP6++Phbs3iCitJcANEtW4qTNFoKW3CHlbcSCjTM8KsNbUx3A8ek5EVLjZWH1pt9E3TfpR6XyfQKnY6kl5aEIPwd
     W3eFYaqCFPrIo9pQT6WuDSP4JCYJbZneKKIbZjzXkJt3NQG32EukYImBb9SCkm9+fS5LZFg9ojzubMX3+NkBoSXI7OPvnHMxjup9mw5se6QU
     V7GqpCA2TNypolmuQ+cAaxV7JqHE8dl9pWf+Y3arb+9iiFCwFt4lAlJw5D0CTRTC1Y5YWFDBCrA/vGnmTnqG8C+jjUAS7cjjR8q4OPhyDmJR
     PnaC/ZG5uP0K0z6GoO/3uen9wqshCuHegLTpOeHEJRKrQFr4PVIwVOB0+ebO5FgoyOw43nyFD5UKBDxEB4BKo/0uAiKHLRvvgLbORbU8KARI
     s1EoqEjmF8UtrmQWV2hUjwzqwvHFei8rPxM="""),
    ("asvk", "SEV-VLEK-Milan", 0x010101, "2022-11-16T22:45:24Z", "2047-11-16T22:45:24Z",
     "66450a123ea5876206df67f2514a4fea224c0f63b18313423078b0edc4535e33", """
     1EUWkz5FTPz+uWT2hCEyisam8FRuXZAmS3l+rXgSCeS1Q0+1olcnFSJpiwfssfhoutJqePyicu+OhkX131PMeO/VOtH3upK4YNJmq36IJp7Z
     WIm5nK2fJNkYEHW0m/NXcIA9U2iHl5bAQ5cbGp97/FaOJ4VmGoTMV658Yox/plFmZRFfRcsw2hyNhqUl1gzdpnIIgPkygUovFEgaa0IVSgGL
     HQhZQiebNLLSVWRVReve0t94zlRIRRdrz84cckP9H9DTAUMyQaxSZbPINKbV6TPmtrwAV9UP1Qq418xn9I+C0SsWutP/5S1OiL8OTzQ4Cvgb
     HOfd2F3yVv4xDBza4SelF2igoDf+BF4XI/IIHJL2N5uKy3+gkSB2Xl6prohgVmqRFvBW9OTCEa32WhXu0t1Z1abEKDZ3LpZt9/Crg6zyPpXD
     LR/tLHHpSaPRj7CTzHieKMTz+Q6RrCCQcHGfaAD/ETNY56aHvNJRZgbzXDUJvnLr3dYyOvvn/DtKhCSimJynn7Len4ArDVQVwXRPe3hR/asC
     E2CajT7kGC1AOtUzQuIKZS2D0Qk74g297JhLHpEBlQiyjRJ+LCWZNx9uJcixGyzav6fiOWx4U8uWhRzHs8nvDAdcS4LW31tPlA9BeOK/BGim
     QTu7hM5MDFZL0C9dWK5puCUJex6I2vSqvyc="""),
    ("ark", "ARK-Genoa", 0x020000, "2022-01-26T15:34:37Z", "2047-01-26T15:34:37Z",
     "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831", """
     3Cd95S/uFOuRIskW9vz9VDBF69NDQF79oRhL/L2PVQGhK3YdfEBgpF/JiwWFBsT/fXDhzA01p3LkcT/7LdjcRfKXjHl+0Qq/M4dZkh6QDoUe
     KzNBLDcBKDDGWo3v35NyrxbA1DnkYwUKU5AAk4P94tKXLp80oxt84ahyHoLmc/LqsGsp+oq1Bz4PPsYLwTG4iMKVaaT90/oZ4I8oibSru92v
     JhlqWO27d/Rxc3iUMyhNeGToOvgx/iUo4gGpG61NDpkEUvIzuKcaMx8IdTpWg2DF6SwF0IgVMffnvtJmA68BwJNWo1E4PLJdaPfBifcJpuBF
     wNVQIPQEVX3aP89HJSp8YbY9lySS6PlVEqTBBtaQmi4ATGmMR+n2K/e+JAhU2Gj7jIpJhOkdH9firQDnmlA2SFfJ/Cc0mGNzW9RmIhyOUnNF
     oclmkRhl3/AQU5Ys9Qsan1jT/EiyT+pCpmnA+y9edvhDCbOG8F2oxHGRdTBkylungrkXJGYiwGrR8kaiqv7NN8QhOBMqYjcbrkEr0f8QMKkl
     IS5ruOfqlLMCBw8JLB3LkjpWgtD7OpxkzSsohN47Uom86RY6lp72g8eXHP1qYrnvhzaG1S70vw6OkbaaC9EjiH/uHgAJQGxon7u0Q7xgoREW
     A/e7JcBQwLg80Hq/sbRuqesxz7wBWSY254c="""),
    ("ask", "SEV-Genoa", 0x020002, "2022-10-31T13:33:48Z", "2047-10-31T13:33:48Z",
     "0324d55bcd48ba877a8fd87c0e1b4934dec8448e3807a24384a34dc6a6c9ebb8", """
     oHJhvk4Fwwkwb03AMfLySXJSXmEaCZMTRbLgPaj4oEzaD9tGfxCSw/nsCAiXHQaWUt++bnbjJO05TKT5d+Cdrz4/fiRBpbhf0xzvh11O+wJT
     BPj3uCzDm48vEZ8l5SXMO4wd/QqwsrejFERPD/Hdfv1mGCMW7ac0ug8trDzqGe+l+p8NMjp/EqBDY2vd8hLaVLmS+XjAqlYVNRksh9aTzSYL
     19/cTrBDmqQ2y8k23zNl2lW6q/BtQOpWGVs3EWvBHb/Qnf3f3S9+lC4H2jdDy9yn7kqyTWq4WCBnE4qhYJRokulYtzMZM1Ilk4Z6RPkOTR1M
     J4gdFtj7lKmrkSuOoJYmqhJIsQJ854lAbJybgU7zyzWAwu3uaslkYKUEAQf2ja5Hyl3IBqOzpqY31SpKzbl8NXveZybRMklwfe4iDLI25T9k
     u9CVetDYifCbdGeuHdTwZBBemW4NE57L7iEV8+zz8nxng8OMX//4pXntWqmQbEAnBLv2ToTgd1H2zYRthyDLc3V119/+FnTW17LK6bKzTCgE
     nCHQEcAt0hDQLLF799+2lZTxxfBEoduAZax6IjgAMCi6e1ZfKPJSkdvb2m3BwfP8bniG7+AEJv1WOEmnBJc1pVQCttbJUodbi07Vfen5JRUq
     AvSM3ObWQOzSAGzsGnpIigwFpW6m9F7uYVU="""),
    ("asvk", "SEV-VLEK-Genoa", 0x020101, "2022-11-18T20:48:34Z", "2047-11-18T20:48:34Z",
     "7d1633252ebbadaa75f96e9b4e6f7d43a90ceb3f843937482630f8da2459264e", """
     zL2/xihHscEpxS3+OsQZpAuNIJGSEQZrkoWPtqKMjjZOyXMMRHAheTm56Ei0Mb8TJZlbGDS5x/AdbowstGmpHqh2zvSvjZO7V4v6Ft84p71P
     6GXfOVEQgCuatiszfIwFrRQk/cmU7HuJadBq6XtYE+qBJMjus8C0WwW/IWY9j6pNbEA1SnUvVg6t89zfE+AcB5UDCKq09x7qw+rPt9pTpEch
     0f1bHdRFJlpgWGTq02ohH9bT+6au8kPpvMa3m2p8zdIIqtuuSG6srIimrpt24lsr4tLhQG65R/RbVJT9MsK4ULpbAUO5NwdlLwbnpLWHiUwo
     YrySMD8l3xRDvhPmInlXEFEo8lahcYllxiJJR8oqqA6x3jPFKmkfhEgaQefcn4P8nA4SScqAoLihn75iiDtU2+ZlkPnKgcNs5U1Le441ypen
     2n7BOnRyhmwyAUBGk3OcMXHsJ6KGpDJyTVCaC3fWX3ex4Iv4LkuKRA6O9yu3zHP23N/ubE8/YykffIjMbtBoOAzdWCn9lE4amo4VZ+8ewIut
     ZAYmC5TIQO+wWUqKYr0iAobccMnZdJjUORjVoqVQ+dLr+/1otk36gfPc0LpmhWZKfAXF9sgvYtQjcaR9wlGr8ySRtZ2YJWofuR7zgYFJPEXR
     wAnbAR/05hBmog7CMt1F9YKSmku6JfRecY8="""),
    ("ark", "ARK-Turin", 0x030000, "2023-05-15T20:03:12Z", "2048-05-15T20:03:12Z",
     "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08", """
     waAriB7EIuVc4ZB1wD3YfDxL+9eyS7+izm0Jj3W772NINCWl8Bj3w/JD2ZjmbRxWdIq/4d9iarCKorXloJUB1jRdgxqccTx1aOoig4+2w1Xh
     VVJT7K457wT5ZLNJgQaxqa9Etkwjd6+9sOhlCDE9l43kQ0R2BikVJa/uyyVOSwEk5w5tXKOuG9jvq6QtAMJasW38wlqRDaKEGtZ9VUgGon27
     ZuL4sTJuC/azz9/iQBw8kEilzOl95AiTkeY5jSEBDWbAqnZk5qlM7kISKG20kgQm14mhNKDI2p2oua+zuAG7i52epoRF2GfU0TYk/yf+vCNB
     2tnechFQuP2e8bLk95ZdqPi9/UWw4JXjtdEA4u2JYplSSUPQVAXKt6LVqujtJcM59JKr2u0XQ75KwxcMp15gSXhBfInvPAwuAY4dEwwGqT8o
     Ig4esPHwEsmChhYeDIxPG9R4fx9O0q6p8Gb+HXlTiS47P9YNeOpidOUKzDl/S1OvyhDtSL8LJc24QATFydo/iD/KUdvFTRlD0crkAMkZLoWQ
     8hLDGc6BZJXsdd7Zf2e4UW3tI/1oh/2t23Ot3zyhTcv5gDbABu0LjVe98uRnS15SMwK//lJt9e5BqKvgABkSoABf+B4VFtPVEX0ygrYaFaI9
     i5ABrxnVBmzXpRb21iI1NlNCfOGUPIhVpWE="""),
    ("ask", "SEV-Turin", 0x030001, "2023-05-15T20:25:21Z", "2048-05-15T20:25:21Z",
     "0000ead352025f208bf55297c4192c34cd1b878002107366d8f2065a9ae7d3a9", """
     nvg5Grv2Emd9lAhKdO64RXU3UESb6JTm0Hhzevx1PyxinxYqJL329qTJM0XmdozLYb7rsHxgM5I2pU18M8gect2pN/YB2LQ1/bIq37TPDbg7
     ym0MN6KkZ6aERxAX0voYtdDyNxjDAUjpRpCe1FccAev/Es2n/Fz1G1TmC2XepTQqaKpmt6mnDWSCHCVsQoY0gSibeaG6doM6OiNUCbKXaC7K
     HH5b/96BD1DJ84M+JHqPClFhHqUJwzKF5Qxj4wgWAZzK8UPhiNGjrF6+TBdlFGdSzEqw1jOrCTHduYyLK+5OQ3OIw4S+vZeOVoxJajTIWdsq
     YP2DLc0HkL0qWOumEOrrc2/4DeETShB0MyIpH05kSalyQN2eN5P6ptOB84hddCdbJPEepnD+FqQap1ukw3K8uBcgeBSAF23r6UtT8Uc5h7Ms
     WX3MoZiEHcSkDQQ8IedTk7CLjsK6S7b/lfKqfYiRhKgGkRvsEd/MDNcumHZKIgzasJwgagzSggiUo9jXp3EWm84fqyxNXzSutPB7qD5P/ULA
     B+q9QgvrzC8XneaLP0MNrHhM80UejmsBTIktMvFoWVIelYDLdcoi0eMD5DRccfsgrYaY6h/+/qf9tgg+mX09UJpuSPRF38oyqnNNFMl5v/tW
     LgUsChPU6NCQC17Qaqr8mu2ynyyuHEs5JVU="""),
    ("asvk", "SEV-VLEK-Turin", 0x030101, "2023-05-15T21:09:41Z", "2048-05-15T21:09:41Z",
     "bfc441408b2f806c5dbf180bd8920e6e60dd404d82141780d85dbf962954d386", """
     pjrui4l0ZogEh0fDdVfJ4unowGGolk2wXyzjbjC/fnqlhFqiFj1JSKdkYSvzPVfgDR0MU2WLlytrAGqOHYBdk4Moz3xHTXJus75Nef0EBZpG
     k9M4PQGF+nTqYi+hDguq14wQUEltN9wGunnUeaMz0e6hfCasDevkypILMponvTvaM49RAipCvTgmPRTkQA8hjl3tA6R7S/HKTn6/Q3T74A0B
     fygK49LLkdHF05Wo0pZ9qmPyhi0Rh9epY0L+/T2e17fohWcCavgE+KF5GO5XINzunwKolCCyH3930iAmb1vv5v4PimnGsfH4ic4kIApR1hZA
     pU3YG3qUE84qkb5SEASQsTZCT0Jv/AxC9So5h2wraVzWz6GvpPHEtRKvue5vehkwPjFipJMT5Z7CmNuXc+0lcVSZMHSbswFSHKKtp4F0UDoP
     nuIWw/djGDjkGXS9W5M2N3zVSbn94cJxCMzOTzILhcX/lJatooslfxvqucFH8PpS9xBMhuN4fTPlNk/oVbQ6w8pxEMibo0K8Q+gOqqzdVm6i
     7jotobsuYxH1Httjsc61vSskSDT4JkPjqTWiyOmsFI+6Ob/hya/fqpe0EPy68TPk85COC7uqNMzu58xb0uAtt0beejDx29mRRbiPNL5tnwK9
     KFmZDpeZWSZgzvn2K+SQTK80ZKn8Yq2SKfU="""),
)
# fmt: on
# Intel replaces its other certificates every few years, so they come with the quote and the collateral. Each chain must
# end in this key: the verdict compares the SHA-256 of the chain's last key with the one below. Only this SHA-256 is
# trusted; the coordinates are for readers and for the tests.
#
# Intel's root: serial number, notBefore, notAfter, SHA-256 of the SubjectPublicKeyInfo, key. To compare it with
# https://certificates.trustedservices.intel.com/Intel_SGX_Provisioning_Certification_RootCA.cer, use openssl as above.
_INTEL_KEY = (
    0x22650CD65A9D3489F383B49552BF501B392706AC,
    "2018-05-21T10:45:10Z",
    "2049-12-31T23:59:59Z",
    "a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e",
    Point(
        P256,
        0x0BA9C4C0C0C86193A3FE23D6B02CDA10A8BBD4E88E48B4458561A36E705525F5,
        0x67918E2EDC88E40D860BD0CC4EE26AACC988E505A953558C453F6B0904AE7394,
    ),
)
# Attribute types of names [X520].
_NAME_TYPES = {"2.5.4.3": "CN", "2.5.4.6": "C", "2.5.4.7": "L", "2.5.4.8": "ST", "2.5.4.10": "O", "2.5.4.11": "OU"}
Name = tuple[tuple[str, str], ...]  # (type, value) of each attribute, in the order of the certificate
# An algorithm is compared as a whole encoding. Its parameters are optional and have defaults. A parser of them would
# accept hashes and salt lengths that nobody uses, and an attacker would choose the weakest.
#
# AlgorithmIdentifier of RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes [RFC4055 3.1], without and
# with the trailer field. DER leaves out a field with its default value, but AMD's older certificates contain it.
_SHA384 = "300d06096086480165030402020500"
_PSS = "06092a864886f70d01010a 30{}a00f" + _SHA384 + "a11c301a06092a864886f70d010108" + _SHA384 + "a203020130"
_PSS_ALGORITHMS = (bytes.fromhex("3041" + _PSS.format("34")), bytes.fromhex("3046" + _PSS.format("39") + "a303020101"))
_ECDSA_ALGORITHM = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256 [RFC5758 3.2]
_RSA_ALGORITHM = bytes.fromhex("300d06092a864886f70d0101010500")  # rsaEncryption [RFC4055 1.2]
_EC_ALGORITHMS = {  # id-ecPublicKey with a named curve [RFC5480 2.1]
    bytes.fromhex("301006072a8648ce3d020106052b81040022"): P384,
    bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"): P256,
}
# One block of a PEM file [RFC7468]; a chain may end with a NUL. The quantifier is possessive: if no END line follows,
# re does not try every shorter block, which would take quadratic time.
_PEM = re.compile("-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\r\n]*+)-----END CERTIFICATE-----")
_ALGORITHMS_DIFFER = "the signed and the unsigned signature algorithm differ"
# BasicConstraints says whether a certificate is a CA's. KeyUsage says what its key may do; here, the place of the
# certificate in its chain decides that.
_BASIC_CONSTRAINTS, _KEY_USAGE = "2.5.29.19", "2.5.29.15"
# Extensions of a VEK [VCEK 3.1, tables 8 and 9]. They say which chip (HWID) or cloud (CSP_ID) has the key, and from
# which versions of the firmware it was derived. An SPL is a security patch level: one byte of TCB_VERSION.
_PRODUCT_NAME, _HWID, _SPL = "1.3.6.1.4.1.3704.1.2", "1.3.6.1.4.1.3704.1.4", "1.3.6.1.4.1.3704.1.3."
_CSP_ID = "1.3.6.1.4.1.3704.1.5"
# The GUIDs of the two kinds of VEK in the certificate table that a host gives to its guest [GHCB 4.1.8.1].
VEK_GUIDS = {"VCEK": "63da758d-e664-4564-adc5-f4b93be8accd", "VLEK": "a8074bc2-a25a-483e-aae6-39c045a0b8a1"}
_SPL_ARCS = {"bootloader": "1", "tee": "2", "snp": "3", "microcode": "8", "fmc": "9"}


class Anchor(NamedTuple):
    """A trusted CA key.

    not_before, not_after: as 2026-11-23T00:00:00Z.
    spki_sha256: of the SubjectPublicKeyInfo. For Intel's root, this is the value that a chain must end in. For AMD's
        keys, it is only there for auditors to compare.
    """

    subject: Name
    serial: int
    not_before: str
    not_after: str
    spki_sha256: str
    key: PublicKey


# Product ("Milan", "Intel") -> role ("ark", "ask", "asvk"; for Intel "root") -> its key.
Anchors = Mapping[str, Mapping[str, Anchor]]


class Endorsements(NamedTuple):
    """Statements of the manufacturer that the caller supplies besides the evidence.  [RFC9334 4.3]

    anchors: trusted CA keys that replace the pinned ones, or None.
    crls: (name for messages, bytes) of each revocation list; verified before use.
    vek: certificate of a VCEK or VLEK, for evidence that has none: in DER, PEM with its chain, or a certificate table;
        verified before use.
    collateral: file of Intel's statements about a kind of machine; verified before use.
    """

    anchors: Anchors | None = None
    crls: Sequence[tuple[str, bytes]] = ()
    vek: bytes | None = None
    collateral: bytes | None = None


class Certificate(NamedTuple):
    """The fields of an X.509 certificate. Nothing authenticates them yet.

    tbs_certificate, subject_public_key_info: DER, as signed.
    extensions: OID -> contents octets of extnValue.
    """

    tbs_certificate: bytes
    signature: bytes
    serial: int
    issuer: Name
    not_before: str
    not_after: str
    subject: Name
    subject_public_key_info: bytes
    key: PublicKey
    extensions: Mapping[str, bytes]


class RevocationList(NamedTuple):
    """The fields of a certificate revocation list.

    revoked: serial numbers. Not a set, because an attacker could choose numbers with equal hashes, which makes it slow.
    """

    tbs_cert_list: bytes
    signature: bytes
    issuer: Name
    this_update: str
    next_update: str
    revoked: tuple[int, ...]


def amd_name(common_name: str) -> Name:
    """Return the distinguished name of one of AMD's keys."""
    return (
        ("OU", "Engineering"),
        ("C", "US"),
        ("L", "Santa Clara"),
        ("ST", "CA"),
        ("O", "Advanced Micro Devices"),
        ("CN", common_name),
    )


def intel_name(common_name: str) -> Name:
    """Return the distinguished name of one of Intel's keys."""
    return (("CN", common_name), ("O", "Intel Corporation"), ("L", "Santa Clara"), ("ST", "CA"), ("C", "US"))


def pinned_anchors() -> Anchors:
    """Return the pinned keys of AMD and Intel."""
    # The tables hold only AMD's common names, which end with the product: the rest of each name is the same.
    anchors = {"Intel": {"root": Anchor(intel_name("Intel SGX Root CA"), *_INTEL_KEY)}}
    for role, common_name, serial, not_before, not_after, spki_sha256, modulus in _AMD_KEYS:
        key = RsaKey(int.from_bytes(base64.b64decode(modulus), "big"), 65537)
        anchor = Anchor(amd_name(common_name), serial, not_before, not_after, spki_sha256, key)
        anchors.setdefault(common_name.rpartition("-")[2], {})[role] = anchor
    return anchors


def name_text(name: Name) -> str:
    """Return a distinguished name for messages."""
    return ", ".join(f"{kind}={value}" for kind, value in name)


def _parse_attribute(der: Der) -> tuple[str, str]:
    """Return the type, abbreviated if known, and the value of an AttributeTypeAndValue.  [RFC5280 4.1.2.4]"""
    # Names are compared attribute by attribute, as they were written: case and spaces count, unlike in [RFC5280 7.1].
    oid = der.oid()
    return _NAME_TYPES.get(oid, oid), der.text()


def _parse_name(der: Der) -> Name:
    """Return a Name. Each RelativeDistinguishedName must have one attribute.  [RFC5280 4.1.2.4]"""
    return tuple(relative.enter().read_all(_parse_attribute) for relative in der.each(SET))


def _parse_extensions(der: Der) -> dict[str, bytes]:
    """Return OID -> value.  [RFC5280 4.2]

    An unknown extension may be ignored unless it is critical. The two known critical ones restrict CAs.
    """
    # A critical extension may restrict what the key may do. Ignoring an unknown one could give the key more rights than
    # its CA did. AMD's and Intel's own extensions are not critical, so a reader may skip those that it does not know.
    found: dict[str, bytes] = {}
    for extension in der.each():
        oid = extension.oid()
        critical = extension.peek() == BOOLEAN
        if critical:  # TRUE is FF, and FALSE, the default, must not be encoded [X690 11.1, 11.5]
            extension.require(extension.contents(BOOLEAN) == b"\xff", f"extension {oid}: critical is not TRUE")
        # If there were two HWIDs, one reader would take the first and another the last.
        extension.require(oid not in found, f"extension {oid} occurs twice")
        known = oid in (_BASIC_CONSTRAINTS, _KEY_USAGE)
        extension.require(known or not critical, f"extension {oid} is critical but unknown")
        found[oid] = extension.contents(OCTET_STRING)
    return found


def _parse_public_key(data: bytes, structure: str) -> PublicKey:
    """Return the key of a SubjectPublicKeyInfo.  [RFC5280 4.1.2.7]

    RSA with 2048 to 4096 bits and exponent 65537, or an uncompressed point, not checked to be on the curve.
    """
    # The algorithm decides how to read the bits. It is compared as a whole, so no key can pass as one of another kind.
    info = Der(data, structure).enter()
    algorithm, octets = info.read_all(lambda info: (info.element(SEQUENCE)[0], info.bit_string()))
    curve = _EC_ALGORITHMS.get(algorithm)
    if curve is not None:
        size = curve.p.bit_length() // 8
        uncompressed = len(octets) == 2 * size + 1 and octets[0] == 4
        info.require(uncompressed, f"expected an uncompressed point of {curve.name}")  # [SEC1 2.3.4]
        return Point(curve, int.from_bytes(octets[1 : size + 1], "big"), int.from_bytes(octets[size + 1 :], "big"))
    info.require(algorithm == _RSA_ALGORITHM, "expected a public key of RSA, P-384 or P-256")
    key = Der(octets, structure).read_all(Der.enter)  # RSAPublicKey [RFC8017 A.1.1]
    n, e = key.read_all(lambda key: (key.integer(), key.integer()))
    # The bounds keep the cost of a verification small. AMD's and Azure's keys are within them.
    usable = n > 0 and 2048 <= n.bit_length() <= 4096 and e == 65537
    key.require(usable, "expected an RSA key of 2048 to 4096 bits with exponent 65537")
    return RsaKey(n, e)


def _parse_signed(data: bytes, structure: str) -> tuple[bytes, Der, bytes, bytes]:
    """Return (tbs as signed, a cursor inside it, signature, AlgorithmIdentifier).  [RFC5280 4.1, 5.1]

    data: a certificate or a revocation list, SEQUENCE { tbs SEQUENCE, AlgorithmIdentifier, BIT STRING }.
    """
    # The signature covers the encoding of tbs from its tag on. It is kept as it was received: encoding it again could
    # give other bytes.
    signed = Der(data, structure).read_all(Der.enter)
    (tbs, contents), (algorithm, _), signature = signed.read_all(
        lambda signed: (signed.element(SEQUENCE), signed.element(SEQUENCE), signed.bit_string())
    )
    known = (*_PSS_ALGORITHMS, _ECDSA_ALGORITHM)
    signed.require(algorithm in known, "expected a signature by RSASSA-PSS (SHA-384, salt 48) or ECDSA (SHA-256)")
    return tbs, Der(contents, structure), signature, algorithm


def parse_certificate(data: bytes, structure: str) -> Certificate:
    """Parse an X.509 certificate, version 3.  [RFC5280 4.1]

    structure: names the certificate in errors.
    Raises Malformed, even if only the key or the signature algorithm is not one of AMD's or Intel's.
    """
    # Every field is parsed, even if no check uses it: signed bytes that nobody understands must not be skipped.
    tbs, der, signature, algorithm = _parse_signed(data, structure)
    der.require(der.enter(0xA0).read_all(Der.integer) == 2, "expected version 3")  # counted from 0
    serial = der.integer()
    # The algorithm occurs twice, and only this one is signed. [RFC5280 4.1.1.2]
    der.require(der.element(SEQUENCE)[0] == algorithm, _ALGORITHMS_DIFFER)
    issuer = _parse_name(der)
    not_before, not_after = der.enter().read_all(lambda validity: (validity.time(), validity.time()))
    subject = _parse_name(der)
    spki = der.element(SEQUENCE)[0]
    # issuerUniqueID and subjectUniqueID [RFC5280 4.1.2.8] would stand here. Neither AMD nor Intel writes them, so the
    # next element must be the extensions.
    extensions = der.enter(0xA3).read_all(_parse_extensions)
    der.end()
    key = _parse_public_key(spki, structure)
    return Certificate(tbs, signature, serial, issuer, not_before, not_after, subject, spki, key, extensions)


def parse_crl(data: bytes, structure: str) -> RevocationList:
    """Parse a certificate revocation list, version 2.  [RFC5280 5.1]

    structure: names the list in errors.
    Raises Malformed.
    """
    tbs, der, signature, algorithm = _parse_signed(data, structure)
    der.require(der.integer() == 1, "expected version 2")  # counted from 0
    der.require(der.element(SEQUENCE)[0] == algorithm, _ALGORITHMS_DIFFER)
    issuer, this_update, next_update = _parse_name(der), der.time(), der.time()
    # An entry has the serial number, the date, and perhaps extensions such as the reason. A listed key counts as
    # revoked at any time, whatever that date: a signature does not prove when it was made, so a thief could backdate.
    revoked = []
    if der.peek() == SEQUENCE:  # revokedCertificates is absent if empty
        for entry in der.each():
            revoked.append(entry.integer())
            entry.time()
            if entry.peek() != -1:
                _parse_extensions(entry)
    if der.peek() != -1:
        der.enter(0xA0).read_all(_parse_extensions)
    der.end()
    return RevocationList(tbs, signature, issuer, this_update, next_update, tuple(revoked))


def verify_signature(key: PublicKey, tbs: bytes, signature: bytes) -> None:
    """Raise Malformed or BadSignature unless key signed tbs, the signed part of a certificate or list.

    An RSA key signs with RSASSA-PSS, any other with ECDSA and P-256; the signature is then DER [RFC3279 2.2.3].
    """
    # The type of the trusted key decides, not the algorithm that the certificate claims.
    if isinstance(key, RsaKey):
        verify_rsassa_pss(key, tbs, signature)
    else:
        pair = Der(signature, "ECDSA signature").read_all(Der.enter)
        verify_ecdsa(P256, key, tbs, *pair.read_all(lambda pair: (pair.integer(), pair.integer())))


def verify_crl(data: bytes, structure: str, issuers: Mapping[Name, PublicKey]) -> RevocationList:
    """Return the revocation list in data if the issuer that it names has signed it.

    structure: names the list in errors.
    issuers: trusted keys.
    Raises Malformed, BadSignature.
    """
    # Another issuer's list could not hide a revocation, because lists only add revoked keys. But if it were shown as
    # verified, the reader would believe that this issuer has revoked nothing.
    crl = parse_crl(data, structure)
    if crl.issuer not in issuers:
        # Without the name, the error would only be a bad signature, and people would look for a damaged file.
        expected = " or ".join(map(name_text, issuers))
        raise Malformed(structure, f"issued by {name_text(crl.issuer)}, expected {expected}")
    verify_signature(issuers[crl.issuer], crl.tbs_cert_list, crl.signature)
    return crl


def make_anchors(product: str, **certificates: bytes) -> dict[str, Anchor]:
    """Return role -> key of one product, from certificates that the caller trusts.

    product: names the certificates in errors.
    certificates: role -> DER; the first one must have signed all of them, itself included.
    Raises Malformed, BadSignature.
    """
    # The caller trusts these files. That they belong together is checked so that a wrong file shows up here, and not
    # later as a VEK with a bad signature.
    made: dict[str, Anchor] = {}
    for role, data in certificates.items():
        structure = f"{product} {role}"
        certificate = parse_certificate(data, structure)
        if isinstance(certificate.key, RsaKey) is (product == "Intel"):
            raise Malformed(structure, "expected a P-256 key" if product == "Intel" else "expected an RSA key")
        anchor = Anchor(
            certificate.subject,
            certificate.serial,
            certificate.not_before,
            certificate.not_after,
            sha256_hex(certificate.subject_public_key_info),
            certificate.key,
        )
        made[role] = anchor
        verify_issued(certificate, next(iter(made.values())), structure)
    return made


def verify_issued(certificate: Certificate, issuer: Anchor | Certificate, structure: str) -> None:
    """Raise Malformed or BadSignature unless issuer has signed certificate.

    structure: names the certificate in errors.
    """
    if certificate.issuer != issuer.subject:
        issuers = f"{name_text(certificate.issuer)}, expected {name_text(issuer.subject)}"
        raise Malformed(structure, f"issued by {issuers}")
    verify_signature(issuer.key, certificate.tbs_certificate, certificate.signature)


def parse_pem_chain(text: str, length: int, structure: str) -> list[Certificate]:
    """Parse PEM with length certificates and nothing else but line breaks and NUL.  [RFC7468]

    Raises Malformed.
    """
    # Nothing may stand between the blocks. A second chain there would be read by some tools and not by others.
    *pieces, rest = _PEM.split(text)  # text, base64, text, base64, ..., text
    count = len(pieces) // 2
    if count != length or "".join([*pieces[::2], rest]).strip("\r\n\0"):
        raise Malformed(structure, f"{count} certificates in PEM, expected {length} and nothing else")
    return [parse_certificate(decode_base64("".join(base64.split()), structure), structure) for base64 in pieces[1::2]]


def verify_chain(chain: Sequence[Certificate], structure: str, verified: set[tuple[bytes, bytes]]) -> None:
    """Raise Malformed or BadSignature unless each certificate has signed the one before it, and the last one itself.

    All but the first must be CA certificates. The caller checks the time, and that the last key is a trusted one.
    structure: names the chain in errors.
    verified: (signed part, signature) of each certificate that earlier calls accepted; this call adds its own. These
        certificates are not verified again, not even against the issuer that follows them in this chain.
    """
    # Not verifying them again is safe: a verdict passes only if all its chains pass and end in the pinned root, also
    # the chain in which such a certificate was verified.
    # Without the check of cA, a key that Intel certified for another purpose, such as one machine's, would pass as a
    # CA's.
    for certificate, issuer in zip(chain, [*chain[1:], chain[-1]], strict=True):
        if (certificate.tbs_certificate, certificate.signature) not in verified:
            # BasicConstraints begins with cA; FALSE is the default, which must not be encoded. [RFC5280 4.2.1.9]
            if issuer.extensions.get(_BASIC_CONSTRAINTS, b"")[2:5] != b"\x01\x01\xff":
                raise Malformed(structure, f"{name_text(issuer.subject)} is not a CA")
            verify_issued(certificate, issuer, structure)
    verified.update((certificate.tbs_certificate, certificate.signature) for certificate in chain)


def _vek_extension(vek: Certificate, oid: str, structure: str) -> Der:
    """Return a cursor over the value of an extension that every VEK has.

    Raises Malformed if it is missing.
    """
    if oid not in vek.extensions:
        raise Malformed(structure, f"the certificate has no extension {oid}")
    return Der(vek.extensions[oid], structure)


def vek_tcb(vek: Certificate, names: Iterable[str]) -> dict[str, int]:
    """Return the security patch levels in a VEK: the firmware version that its key belongs to.  [VCEK 3.1]

    names: those that the product has, as in TCB_LAYOUTS.
    Raises Malformed.
    """
    # A level is one byte, as in TCB_VERSION; a larger number is an error.
    levels = {}
    for name in names:
        der = _vek_extension(vek, _SPL + _SPL_ARCS[name], f"VEK {name} SPL")
        levels[name] = der.read_all(Der.integer)
        # The number is not printed: str() refuses more than 4300 digits.
        der.require(0 <= levels[name] <= 255, "not in the range 0 to 255")
    return levels


def vek_product(vek: Certificate) -> str:
    """Return the productName of a VEK without its stepping: "Milan" for "Milan-B0".  [VCEK 3.1]

    Raises Malformed.
    """
    return _vek_extension(vek, _PRODUCT_NAME, "VEK productName").read_all(Der.text).partition("-")[0]


def vek_csp_id(vek: Certificate) -> str | None:
    """Return the CSP_ID of a VLEK, the name of the cloud that it belongs to, or None for a VCEK.  [VCEK 3.1]

    Raises Malformed.
    """
    return Der(vek.extensions[_CSP_ID], "VEK CSP_ID").read_all(Der.text) if _CSP_ID in vek.extensions else None


def vek_in_table(table: bytes, kind: str) -> bytes | None:
    """Return the certificate of kind "VCEK" or "VLEK" in a certificate table, or None.  [GHCB 4.1.8.1]

    An entry is a GUID (16 bytes), offset (u32) and length (u32); an entry of zeros ends the table. Hosts disagree about
    the byte order of the GUID, so both are accepted.
    table: any bytes; the host that wrote them is not trusted.
    """
    # A wrong certificate does no harm, because the report's signature is checked with its key. Nor do false offsets and
    # lengths: a slice in Python stops at the end of the table.
    wanted = uuid.UUID(VEK_GUIDS.get(kind, "0" * 32))
    for guid, offset, length in struct.iter_unpack("<16sII", table[: len(table) // 24 * 24]):
        if not any(guid):
            break
        if guid in (wanted.bytes, wanted.bytes_le):
            return table[offset : offset + length] or None
    return None


def find_vek(data: bytes, kind: str) -> Certificate:
    """Return the certificate of a VEK in DER, a PEM chain or a certificate table.

    kind: which one to return if there are several: "VCEK" or "VLEK".
    Raises Malformed.
    """
    # Callers have either the response of AMD's service (DER, or PEM with the chain) or the host's certificate table.
    # Decoding as latin-1 never fails, so any bytes can be searched for PEM. If no certificate has the right name, the
    # first one is returned, so that the check "signing key" shows its name.
    found = [decode_base64("".join(block.split()), "VEK") for block in _PEM.findall(data.decode("latin-1"))]
    certificates = [parse_certificate(der, "VEK") for der in found or [vek_in_table(data, kind) or data]]
    return next((vek for vek in certificates if ("CN", f"SEV-{kind}") in vek.subject), certificates[0])


def vek_chip_id(vek: Certificate) -> bytes:
    """Return the chip_id of a VCEK, 64 bytes.  [VCEK 3.1]

    Three encodings of HWID occur in the field: the 64 bytes as they are, the same in a DER OCTET STRING, and on Turin
    only the first 8 bytes.
    Raises Malformed.
    """
    # The other 56 bytes of a Turin report's chip_id are zero. So extend the 8 bytes with zeros, to compare all 64.
    hwid = vek.extensions.get(_HWID, b"")
    if len(hwid) == 66 and hwid[:2] == b"\x04\x40":
        hwid = hwid[2:]
    if len(hwid) not in (8, 64):
        raise Malformed("VEK HWID", f"{len(hwid)} bytes, expected 64 or 8")
    return hwid.ljust(64, b"\x00")


# endregion 7
# ==============================================================================
# region 8. SEV-SNP report                                              [uses 6]
# ==============================================================================
# ATTESTATION_REPORT [SNP-ABI 7.3]: what the firmware of an AMD processor states about a VM and signs with its VEK.
# Integers are little-endian. parse_report authenticates nothing; verify_report checks the signature with a key that
# the caller has traced to AMD. Simulated evidence has the same layout, with zeros where only hardware has a value.

REPORT_SIZE = 1184
SIGNED_SIZE = 0x2A0  # the signature covers the bytes before this offset; those from 0x330 on mean nothing
# The fields of Report, in the notation of the struct module; "x" is a reserved byte.
# fmt: off
_REPORT_LAYOUT = struct.Struct(
    "<IIQ 16s16s"        # 0x000 version to policy, family_id, image_id
    "II 8s QI 4x"        # 0x030 vmpl, signature_algo, current_tcb, platform_info, flags
    "64s48s32s"          # 0x050 report_data, measurement, host_data
    "48s48s 32s32s 8s"   # 0x0E0 two key digests, two report ids, reported_tcb
    "BBB 21x 64s"        # 0x188 CPUID, chip_id
    "8s 3sx 3sx 8s"      # 0x1E0 committed_tcb, two versions, launch_tcb
    "QQ 152x"            # 0x1F8 two mitigation vectors
    "72s72s 368x"        # 0x2A0 r, s
)
# fmt: on
# Names of bits: of the guest policy from bit 16 on (bit 17 is always set), and of PLATFORM_INFO. [SNP-ABI 4.3, 7.3]
# fmt: off
POLICY_NAMES = ("smt", "", "migrate-ma", "debug", "single-socket", "cxl", "aes-256-xts", "rapl-off",
                "ciphertext-hiding", "page-swap-off")
PLATFORM_NAMES = ("smt", "tsme", "ecc", "rapl-off", "ciphertext-hiding", "alias-check", "iommu-write-safe", "tio")
# fmt: on
POLICY_DEBUG, POLICY_MIGRATE_MA = 1 << 19, 1 << 18  # bits of the guest policy [SNP-ABI 4.3]
ECDSA_P384_SHA384 = 1  # a signature_algo [SNP-ABI 10, "Signature algorithms"]
SIGNING_KEYS = {0: "VCEK", 1: "VLEK"}  # bits 4:2 of the flags; 7 = none
# The byte of each security patch level in TCB_VERSION [SNP-ABI 2.2]. Turin added fmc in front.
_TCB_BEFORE_TURIN = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
TCB_LAYOUTS = {
    "Milan": _TCB_BEFORE_TURIN,
    "Genoa": _TCB_BEFORE_TURIN,
    "Turin": {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}
# (family, first model, last model) of CPUID -> product. Siena and Bergamo (models A0 to AF) use Genoa's keys. Venice is
# known by name only, to refuse it: AMD has published no keys for it. Its models are those of the crate sev 7.1.
_PRODUCTS = (
    (0x19, 0x00, 0x0F, "Milan"),
    (0x19, 0x10, 0x1F, "Genoa"),
    (0x19, 0xA0, 0xAF, "Genoa"),
    (0x1A, 0x00, 0x1F, "Turin"),
    (0x1A, 0x50, 0x57, "Venice"),
    (0x1A, 0x90, 0xAF, "Venice"),
    (0x1A, 0xC0, 0xC7, "Venice"),
)


class Report(NamedTuple):
    """The fields of an ATTESTATION_REPORT. A comment gives the offset of each.  [SNP-ABI 7.3]

    Nothing authenticates them yet.
    r, s: the signature. Each is read from all its 72 bytes, so that the 24 unused ones cannot hide a change.
    data: the whole report.
    """

    version: int  # 0x000
    guest_svn: int  # 0x004
    policy: int  # 0x008
    family_id: bytes  # 0x010
    image_id: bytes  # 0x020
    vmpl: int  # 0x030
    signature_algo: int  # 0x034
    current_tcb: bytes  # 0x038
    platform_info: int  # 0x040
    flags: int  # 0x048
    report_data: bytes  # 0x050
    measurement: bytes  # 0x090
    host_data: bytes  # 0x0C0
    id_key_digest: bytes  # 0x0E0
    author_key_digest: bytes  # 0x110
    report_id: bytes  # 0x140
    report_id_ma: bytes  # 0x160
    reported_tcb: bytes  # 0x180
    cpuid_fam_id: int  # 0x188
    cpuid_mod_id: int  # 0x189
    cpuid_step: int  # 0x18A
    chip_id: bytes  # 0x1A0
    committed_tcb: bytes  # 0x1E0
    current_version: bytes  # 0x1E8
    committed_version: bytes  # 0x1EC
    launch_tcb: bytes  # 0x1F0
    launch_mit_vector: int  # 0x1F8
    current_mit_vector: int  # 0x200
    r: int  # 0x2A0
    s: int  # 0x2E8
    data: bytes

    @property
    def signing_key(self) -> str:
        """The kind of key that signed the report, as the report claims."""
        kind = self.flags >> 2 & 7
        return SIGNING_KEYS.get(kind, f"key {kind}")

    @property
    def product(self) -> str:
        """The product according to CPUID, which reports contain since version 3; empty if unknown."""
        family, model = (self.cpuid_fam_id, self.cpuid_mod_id) if self.version >= 3 else (0, 0)
        return next((name for of, first, last, name in _PRODUCTS if family == of and first <= model <= last), "")


def parse_report(data: bytes) -> Report:
    """Parse a report of REPORT_SIZE bytes.  [SNP-ABI 7.3]

    Raises Malformed.
    """
    if len(data) != REPORT_SIZE:
        raise Malformed("attestation_report", f"{len(data)} bytes, expected {REPORT_SIZE}")
    *fields, r, s = _REPORT_LAYOUT.unpack(data)
    return Report._make([*fields, int.from_bytes(r, "little"), int.from_bytes(s, "little"), data])


def simulated_report(report_data: bytes, measurement: bytes) -> bytes:
    """Return a report of version 3 with these two fields and zeros elsewhere.  [CONTRACT 4.4]

    report_data: 64 bytes.
    measurement: 48 bytes.
    Raises ValueError if one has another length.
    """
    if (len(report_data), len(measurement)) != (64, 48):  # struct would cut or extend them
        raise ValueError("expected report_data of 64 bytes and measurement of 48 bytes")
    return struct.pack("<I76x64s48s992x", 3, report_data, measurement)


def tcb_levels(product: str, tcb: bytes) -> dict[str, int]:
    """Return the security patch levels in a TCB_VERSION.  [SNP-ABI 2.2]

    product: a key of TCB_LAYOUTS.
    tcb: 8 bytes.
    """
    return {name: tcb[offset] for name, offset in TCB_LAYOUTS[product].items()}


def bit_names(bits: int, names: Sequence[str]) -> list[str]:
    """Return the names of the bits that are set, for example those of PLATFORM_NAMES."""
    return [name for i, name in enumerate(names) if bits >> i & 1 and name]


def reserved_fields(report: Report) -> list[str]:
    """Return the names of the signed fields in which a reserved bit is set.  [SNP-ABI 4.3, 7.3]

    Bits that only a later version of the report defines count as reserved too. Before version 3 these are alias-check,
    iommu-write-safe and the bytes of CPUID; before version 5 they are tio, page-swap-off and the mitigation vectors.
    """
    # Defined bits: policy 0 to 24, and since version 5 page-swap-off (25); PLATFORM_INFO 0 to 4, since version 3 also 5
    # and 6, since version 5 also tio (7); flags 0 to 4. The shifts below use that True counts as 1.
    data, v3, v5 = report.data, report.version >= 3, report.version >= 5
    fields: dict[str, Any] = {
        "policy": report.policy >> 25 + v5,
        "platform_info": report.platform_info >> 5 + 2 * v3 + v5,
        "flags": report.flags >> 5,
        "bytes from 0x4C": any(data[0x4C:0x50]),
        "bytes from 0x188": any(data[0x188 + 3 * v3 : 0x1A0]),
        "byte 0x1EB": data[0x1EB],
        "byte 0x1EF": data[0x1EF],
        "bytes from 0x1F8": any(data[0x1F8 + 16 * v5 : SIGNED_SIZE]),
    }
    return [name for name, bits in fields.items() if bits]


def tcb_text(levels: Mapping[str, int]) -> str:
    """Return security patch levels in the form of --min-tcb: "bootloader=3,tee=0", of a TD "tdx=0501..."."""
    # A level has one byte, and the number of a TD 16.
    return ",".join(f"{name}={f'{level:032x}' if level > 255 else level}" for name, level in levels.items())


def vek_url(report: Report, product: str) -> str:
    """Return the URL of the report's VCEK at AMD's key distribution service.  [VCEK 4.1]

    product: a key of TCB_LAYOUTS.
    """
    short = {"bootloader": "bl", "microcode": "ucode"}  # the others keep their names in the URL
    query = "&".join(
        f"{short.get(name, name)}SPL={level:02d}" for name, level in tcb_levels(product, report.reported_tcb).items()
    )
    chip_id = report.chip_id[:8] if product == "Turin" else report.chip_id
    return f"https://kdsintf.amd.com/vcek/v1/{product}/{chip_id.hex()}?{query}"


def verify_report(report: Report, vek: PublicKey) -> None:
    """Raise BadSignature unless vek signed the report.  [SNP-ABI 10]

    vek: the public key of a VEK, which the caller authenticates.
    """
    verify_ecdsa(P384, vek, report.data[:SIGNED_SIZE], report.r, report.s)


# endregion 8
# ==============================================================================
# region 9. TPM quote                                                [uses 6, 8]
# ==============================================================================
# Evidence of confidential VMs on Azure [AZURE]. There a paravisor (HCL) runs below the VM, holds the hardware report
# and offers a virtual TPM. Three links lead from the processor to the caller's data:
#
#   1. the VEK signs the hardware report, whose report_data begins with the SHA-256 of the runtime data;
#   2. the runtime data contains HCLAkPub, the attestation key (AK) of the virtual TPM;
#   3. the AK signs a quote [TPM2-2 10.12.12]: the caller's data and a digest of the PCR values.
#
# The functions here parse the parts of that chain and authenticate none; the section "Verdict" checks the links.

TPM_GENERATED_VALUE, TPM_ST_ATTEST_QUOTE, TPM_ALG_SHA256 = 0xFF544347, 0x8018, 0x000B  # [TPM2-2 6.2, 6.9, 6.3]
PCR_COUNT, PCR_SIZE = 24, 32  # platform configuration registers of the SHA-256 bank
HCL_SNP, HCL_TDX = 2, 4  # report types
HCL_REQUEST = 2  # the request that produced the report; the same in every VM


class HclReport(NamedTuple):
    """The two parts of an HCL report.

    attestation_report: the report of SEV-SNP hardware. With TDX it is not used: the evidence has a quote instead.
    runtime_data: JSON. Its SHA-256 is the first half of the hardware report's report_data.
    """

    attestation_report: bytes
    runtime_data: bytes


class TpmQuote(NamedTuple):
    """The fields of a quote's TPMS_ATTEST that the verifier compares.

    pcr_select: indexes of the registers that pcr_digest covers, ascending.
    """

    extra_data: bytes
    pcr_select: Sequence[int]
    pcr_digest: bytes


def parse_hcl_report(data: bytes, expected: int = HCL_SNP) -> HclReport:
    """Parse the HCL report of an Azure VM.  [AZURE]

    expected: the report type.
    Integers are little-endian. The headers are not signed, so each of their fields must have a known value. Only two
    things may vary: the version (1 or 2), and the number of zeros after the runtime data.
    Raises Malformed.
    """
    r = Reader(data, "HCL report")
    magic, version, size, request, reserved = r.unpack("<4s3I16s")
    attestation_report = r.take(REPORT_SIZE)
    whole, header_version, report_type, hash_type, length = r.unpack("<5I")
    r.require(magic == b"HCLA", "does not begin with HCLA")
    r.require(version in (1, 2), f"version {version}, expected 1 or 2")
    r.require(report_type == expected, f"report type {report_type}, expected {expected} (2: SEV-SNP, 4: TDX)")
    r.require(0 < length <= r.left(), f"runtime data of {length} bytes, {r.left()} bytes are present")
    content, tail = r.take(length), data[r.at :]
    # One header counts everything up to here, the other its own 20 bytes and the content.
    r.require((size, whole) == (r.at, 20 + length), "the sizes in its headers contradict each other")
    r.require(
        (request, header_version, hash_type) == (HCL_REQUEST, 1, 1), "unknown request, header version or hash type"
    )
    r.require(not any(reserved), "reserved bytes are not zero")
    r.require(not any(tail), "bytes after the runtime data are not zero")
    # The hash in the hardware report covers the JSON without the NULs that may end it.
    return HclReport(attestation_report, content.rstrip(b"\x00"))


def parse_runtime_data(data: bytes) -> tuple[RsaKey, Any]:
    """Return (the attestation key of the virtual TPM, the whole document).  [AZURE, RFC7517]

    data: the runtime data of an HCL report, which has a JWK with the kid HCLAkPub.
    Raises Malformed.
    """
    # The verdict contains the document. Its depth is limited because indentation multiplies the size of a deep one.
    doc = parse_json(data, "runtime data", 16)
    keys = doc.get("keys") if isinstance(doc, dict) else None
    if not isinstance(keys, list):
        keys = []
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == "HCLAkPub"]
    if len(found) != 1 or found[0].get("kty") != "RSA":
        raise Malformed("runtime data", f"{len(found)} keys are called HCLAkPub, expected exactly one, of RSA")
    octets = (decode_base64(found[0].get(name), f"runtime data, {name}", urlsafe=True) for name in ("n", "e"))
    key = RsaKey(*(int.from_bytes(number, "big") for number in octets))
    if (key.n.bit_length(), key.e) != (2048, 65537):
        raise Malformed("runtime data", "expected HCLAkPub with 2048 bits and exponent 65537")
    return key, doc


def parse_quote(message: bytes) -> TpmQuote:
    """Parse the TPMS_ATTEST of a quote over one selection of the SHA-256 bank.  [TPM2-2 10.12.12]

    Integers are big-endian; a TPM2B field is a u16 size and that many bytes.
    Raises Malformed.
    """
    r = Reader(message, "TPMS_ATTEST")
    magic, tag = r.unpack(">IH")
    # An AK is a restricted key: with it, a TPM refuses to sign data from outside that begin with this magic. So the
    # magic proves that the TPM itself made the structure.  [TPM2-1, restricted signing keys]
    r.require(magic == TPM_GENERATED_VALUE, "magic is not TPM_GENERATED_VALUE")
    r.require(tag == TPM_ST_ATTEST_QUOTE, "type is not TPM_ST_ATTEST_QUOTE")
    r.take(*r.unpack(">H"))  # qualifiedSigner
    extra_data = r.take(*r.unpack(">H"))
    r.take(17 + 8)  # clockInfo, firmwareVersion
    selection = r.unpack(">IH")  # TPML_PCR_SELECTION: count, hash
    r.require(selection == (1, TPM_ALG_SHA256), "expected one selection of registers, in the SHA-256 bank")
    bits = r.take(*r.unpack(">B"))  # pcrSelect: register i is bit i % 8 of octet i // 8
    pcr_select = [i for i in range(8 * len(bits)) if bits[i // 8] >> i % 8 & 1]
    pcr_digest = r.take(*r.unpack(">H"))
    r.end()
    in_range = bool(pcr_select) and pcr_select[-1] < PCR_COUNT
    r.require(in_range, f"selects no register, or one above {PCR_COUNT - 1}")
    r.require(len(extra_data) <= 64, f"extraData has {len(extra_data)} bytes, expected at most 64")  # as report_data
    return TpmQuote(extra_data, pcr_select, pcr_digest)


def compute_pcr_digest(pcrs: Sequence[bytes], pcr_select: Sequence[int]) -> bytes:
    """Return the SHA-256 over the selected registers.  [TPM2-1 17.6.2]

    pcrs: the values of all PCR_COUNT registers.
    pcr_select: indexes, ascending.
    """
    return hashlib.sha256(b"".join(pcrs[i] for i in pcr_select)).digest()


# endregion 9
# ==============================================================================
# region 10. TDX quote                                            [uses 5, 6, 7]
# ==============================================================================
# The quote of an Intel TD [TDX-QUOTE]: what the TDX module states about a VM, signed by Intel's quoting enclave (QE).
# Integers are little-endian, keys and signatures big-endian. Three links lead from Intel's root to the TD:
#
#   1. the PCK certificate of the machine, whose key signs the report of its QE;
#   2. that report holds the hash of the QE's attestation key;
#   3. the attestation key signs the header and the body of the quote.
#
# The functions here parse the parts of that chain and authenticate none, except verify_raw; the section "Verdict"
# checks the links.

# TD Quote Body 1.0 (584 bytes), then the two fields that 1.5 appends [TDX-QUOTE, TD Quote Body].
_TD_BODY = struct.Struct("<16s 48s48s8s 8s8s 48s48s48s48s 192s 64s 16s48s")
_TD_BODIES = ((2, 584), (3, 648))  # type and size
QE_VENDOR = "939a7233f79c4ca9940a0db3957f0607"  # Intel's quoting enclave
TDX_TEE, ECDSA_P256 = 0x81, 2  # TEE type, attestation key type
_QE_CERTIFICATION, _PCK_CHAIN = 6, 5  # types of certification data
# Bits of TDATTRIBUTES [TDX-MODULE, ATTRIBUTES]. TD_FORBIDDEN holds the reserved bits, and all bits of the first byte,
# TUD ("TD under debug"), but DEBUG: they let the host profile a TD.
TD_DEBUG, TD_MIGRATABLE, TD_FORBIDDEN = 1, 1 << 29, 0x3FFFFFFF0780FF00 | 0xFE
XFAM_REQUIRED = 3  # x87 and SSE state, which every processor has
# The extension of a PCK certificate [PCK, SGX extensions]: PPID .1, TCB .2, PCEID .3, FMSPC .4.
_SGX = "1.2.840.113741.1.13.1"


class TdQuote(NamedTuple):
    """The fields of a quote.  [TDX-QUOTE]

    measurement: MRTD.
    rtmr: the four registers.
    tee_tcb_svn2, mr_service_td: zero in a body of TD 1.0, which has neither.
    signed: header and body, which the attestation key has signed.
    pck_chain: PEM, from the machine's certificate to the root.
    """

    quote_version: int
    key_type: int
    tee_type: int
    qe_vendor: bytes
    body_type: int
    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    measurement: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr: tuple[bytes, ...]
    report_data: bytes
    tee_tcb_svn2: bytes
    mr_service_td: bytes
    signed: bytes
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_signature: bytes
    authentication_data: bytes
    pck_chain: str


class Pck(NamedTuple):
    """The fields of a PCK certificate that describe its machine.

    svns: security version numbers of the 16 components of its TCB.
    """

    svns: tuple[int, ...]
    pcesvn: int
    pce_id: bytes
    fmspc: bytes


def parse_td_quote(data: bytes) -> TdQuote:
    """Parse a quote of version 4 or 5.  [TDX-QUOTE]

    Only zeros may follow it: Azure pads quotes.
    Raises Malformed.
    """

    def certification(inside: Reader, expected: int) -> Reader:
        kind, size = inside.unpack("<HI")
        inside.require(kind == expected, f"certification data of type {kind}, expected {expected}")
        content = inside.take(size)
        inside.end()
        return Reader(content, "TDX quote")

    # Header: version, attestation key type, TEE type, reserved, QE vendor, user data. Version 5 adds the type and the
    # size of the body. In version 4 it is always the body of TD 1.0.
    r = Reader(data, "TDX quote")
    version, key_type, tee_type, vendor = r.unpack("<HHI4x16s20x")
    r.require(version in (4, 5), f"version {version}, expected 4 or 5")
    body = r.unpack("<HI") if version == 5 else _TD_BODIES[0]
    r.require(body in _TD_BODIES, f"body type {body[0]} with {body[1]} bytes, expected 2 with 584 or 3 with 648")
    fields = list(_TD_BODY.unpack(r.take(body[1]).ljust(_TD_BODY.size, b"\x00")))
    registers = fields[10]
    fields[10] = tuple(registers[i : i + 48] for i in range(0, 192, 48))
    signed = data[: r.at]
    inside = Reader(r.take(*r.unpack("<I")), "TDX quote")
    r.require(not any(data[r.at :]), "bytes after its end are not zero")
    signatures = inside.unpack("<64s64s")
    inside = certification(inside, _QE_CERTIFICATION)
    *report, size = inside.unpack("<384s64sH")
    authentication_data = inside.take(size)
    inside = certification(inside, _PCK_CHAIN)
    # latin-1 decodes any byte; those that are not PEM are refused later.
    pem = inside.take(inside.left()).decode("latin-1")
    header = (version, key_type, tee_type, vendor, body[0])
    return TdQuote._make([*header, *fields, signed, *signatures, *report, authentication_data, pem])


def verify_raw(key: PublicKey, message: bytes, signature: bytes) -> None:
    """Raise BadSignature unless signature is key's ECDSA signature over message, with P-256.

    signature: r and s, of 32 bytes each.
    """
    verify_ecdsa(P256, key, message, *raw_pair(signature))


def raw_pair(data: bytes) -> tuple[int, int]:
    """Return the two big-endian numbers of 32 bytes each in a signature or a public key.

    Raises BadSignature unless data has 64 bytes.
    """
    # If bytes could follow s, one signature would have several encodings.
    if len(data) != 64:
        raise BadSignature(f"the signature has {len(data)} bytes, expected 64")
    return int.from_bytes(data[:32], "big"), int.from_bytes(data[32:], "big")


def _sgx_fields(der: Der) -> dict[str, Der]:
    """Return {OID: cursor over the value} of a SEQUENCE of pairs (OID, value).

    The values have several types, so any tag is accepted here. Whoever reads a value names the tag that it must have.
    """
    pairs = [(field.oid(), Der(field.element(field.peek())[0], "SGX extension")) for field in der.each()]
    fields = dict(pairs)
    if len(fields) != len(pairs):  # if there were two values, two readers could take different ones
        raise Malformed("SGX extension", "two fields have one OID")
    return fields


def parse_pck(certificate: Certificate) -> Pck:
    """Return what a PCK certificate says about its machine.  [PCK, SGX extensions]

    Raises Malformed.
    """
    # The TCB is a list of 16 component SVNs and the PCESVN, by OIDs that end in 1 to 17. Intel's TCB levels have the
    # same order.
    try:
        fields = Der(certificate.extensions[_SGX], "SGX extension").read_all(_sgx_fields)
        tcb = fields[f"{_SGX}.2"].read_all(_sgx_fields)
        *svns, pcesvn = (tcb[f"{_SGX}.2.{i}"].read_all(Der.integer) for i in range(1, 18))
        pce_id, fmspc = (fields[f"{_SGX}.{i}"].contents(OCTET_STRING) for i in (3, 4))
    except KeyError as e:
        raise Malformed("PCK certificate", f"extension {e.args[0]} is missing") from None
    return Pck(tuple(svns), pcesvn, pce_id, fmspc)


# endregion 10
# ==============================================================================
# region 11. TDX collateral                                      [uses 6, 7, 10]
# ==============================================================================
# Intel publishes four documents about each kind of machine [PCS]: the TCB info (levels of the firmware and of the TDX
# module, each with a status), the identity of the quoting enclave, and two revocation lists. The caller supplies them
# in one JSON file. parse_collateral authenticates nothing. verify_document returns a document only if the given key has
# signed it. The other functions expect documents that the caller has verified.
#
# How a status is found: a TCB info lists levels, and each level lists minimum version numbers. A machine has reached a
# level if none of its own numbers is lower. Its status is that of the highest level that it has reached. An old
# document does not know flaws that were found later, so each document is valid for a limited time.

TCB_STATUSES = (  # the best first [PCS, TCB info, tcbStatus]
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)
REFUSED_TCB = TCB_STATUSES[4:]  # unless the caller accepts one by name; never Revoked
# Status of a platform -> its status if the quoting enclave or the TDX module is out of date.
_OUT_OF_DATE = dict.fromkeys(TCB_STATUSES[:2], "OutOfDate")
_OUT_OF_DATE |= dict.fromkeys(TCB_STATUSES[2:4], "OutOfDateConfigurationNeeded")
TCB_SIGNER = intel_name("Intel SGX TCB Signing")
# The members of a collateral file: documents as signed, chains in PEM, the rest in hexadecimal digits. The names are
# those that Intel's quote verification library and the tools around it use. Other members are ignored.
_COLLATERAL = """
    tcb_info tcb_info_signature tcb_info_issuer_chain
    qe_identity qe_identity_signature qe_identity_issuer_chain
    root_ca_crl pck_crl pck_crl_issuer_chain
""".split()
_ISO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def _hex_of(size: int) -> re.Pattern[str]:
    return re.compile(f"[0-9A-Fa-f]{{{2 * size}}}")


# The members that are read. Intel may add others ("..."), and has done so. Only these versions and ids are accepted: in
# another version of a document, a member could have another meaning.
_LEVEL = {"tcbDate": _ISO_TIME, "tcbStatus": TCB_STATUSES, "advisoryIDs?": [str], "...": object}
_ISVSVN = [{**_LEVEL, "tcb": {"isvsvn": int}}]
_COMPONENTS = [{"svn": int, "...": object}] * 16
_WINDOW = {"issueDate": _ISO_TIME, "nextUpdate": _ISO_TIME, "...": object}
_MODULE = {"mrsigner": _hex_of(48), "attributes": _hex_of(8), "attributesMask": _hex_of(8), "...": object}
DOCUMENT_SCHEMAS = {
    "tcb_info": {
        **_WINDOW,
        "id": "TDX",
        "version": 3,
        "fmspc": _hex_of(6),
        "pceId": _hex_of(2),
        "tdxModule": _MODULE,
        "tdxModuleIdentities?": [{**_MODULE, "id": str, "tcbLevels": _ISVSVN}],
        "tcbLevels": [
            {
                **_LEVEL,
                "tcb": {"sgxtcbcomponents": _COMPONENTS, "pcesvn": int, "tdxtcbcomponents": _COMPONENTS, "...": object},
            }
        ],
    },
    "qe_identity": {
        **_WINDOW,
        "id": "TD_QE",
        "version": 2,
        "miscselect": _hex_of(4),
        "miscselectMask": _hex_of(4),
        "attributes": _hex_of(16),
        "attributesMask": _hex_of(16),
        "mrsigner": _hex_of(32),
        "isvprodid": int,
        "tcbLevels": _ISVSVN,
    },
}


class TcbStatus(NamedTuple):
    """The status of a machine's TCB.

    date: the date of the level that the platform has reached.
    days_behind: from that date to the date of the newest level in the TCB info.
    """

    status: str
    advisories: Sequence[str]
    date: str
    days_behind: int


def parse_collateral(data: bytes) -> Any:
    """Return the members of a collateral file: those of _COLLATERAL, and any others.

    Raises Malformed.
    """
    return check_schema(
        parse_json(data, "collateral"), {**dict.fromkeys(_COLLATERAL, str), "...": object}, "collateral"
    )


def verify_document(name: str, text: str, signature: str, signer: PublicKey) -> Any:
    """Return TCB info or a QE identity if signer has signed its text.  [PCS]

    name: a key of DOCUMENT_SCHEMAS.
    signature: in hexadecimal.
    Raises BadSignature, Malformed.
    """
    # The signature covers the text as Intel wrote it. So verify first and parse afterwards: a document that is parsed
    # and written again can have other bytes.
    data = text.encode("utf-8")
    verify_raw(signer, data, decode_hex(signature, f"{name}_signature"))
    return check_schema(parse_json(data, name), DOCUMENT_SCHEMAS[name], name)


def module_identity(info: Any, quote: TdQuote) -> Any:
    """Return the entry of the TDX module in TCB info.  [PCS, tdxModuleIdentities]

    The second component of TEE_TCB_SVN is the module's version. Version 0 has no entry of its own and no levels.
    Raises Malformed.
    """
    # The version selects the entry, and the MRSIGNER of the module must then be that of the entry. So a module gains
    # nothing if it claims another version: Intel must have signed it in any case.
    version = f"TDX_{quote.tee_tcb_svn[1]:02X}"
    if version == "TDX_00":
        return info["tdxModule"]
    for identity in info.get("tdxModuleIdentities", ()):
        if identity["id"] == version:
            return identity
    raise Malformed("tcb_info", f"no identity of TDX module {version}")


def _describe(document: Any, **fields: bytes) -> tuple[str, str]:
    """Return (the values of these fields in document, their actual values), both as text.

    If the document has a mask for a field, only the bits in the mask are compared.  [PCS]
    """
    # Bits outside of the mask may differ between machines, such as those that say which features are in use. Intel's
    # masks contain the bit DEBUG, and their documents say that it is zero. A signer is compared as a whole: a member
    # mrsignerMask has no meaning, and the schema lets it be anything.
    actual = []
    for name, data in fields.items():
        whole = "ff" * len(data)
        mask = bytes.fromhex(whole if name == "mrsigner" else document.get(f"{name}Mask", whole))
        actual.append(bytes(a & b for a, b in zip(data, mask, strict=True)).hex())
    return " ".join(document[name].lower() for name in fields), " ".join(actual)


def describe_module(module: Any, quote: TdQuote) -> tuple[str, str]:
    """Return (expected, actual) identity of the TDX module as text: of its entry in TCB info, and of the quote."""
    return _describe(module, mrsigner=quote.mr_signer_seam, attributes=quote.seam_attributes)


# If the caller gives no collateral, these stand in for its documents. So far, every QE identity has had these values
# for Intel's quoting enclave, and every TCB info has had them for the TDX module. [PCS, QE identity, TCB info]
INTEL_QE = {
    "mrsigner": "dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5",
    "attributes": "11000000000000000000000000000000",
    "attributesMask": "fbffffffffffffff0000000000000000",
    "miscselect": "00000000",
    "isvprodid": 2,
}
INTEL_MODULE = {"mrsigner": "00" * 48, "attributes": "00" * 8}


def describe_qe(identity: Any, report: bytes) -> tuple[str, str]:
    """Return (expected, actual) identity of the quoting enclave as text: of identity, and of its report.

    [PCS, QE identity]
    """
    # REPORTBODY of SGX: miscselect at 16, attributes at 48, MRSIGNER at 128, ISVPRODID at 256, ISVSVN at 258.
    fields = {"mrsigner": report[128:160], "attributes": report[48:64], "miscselect": report[16:20]}
    expected, actual = _describe(identity, **fields)
    return f"{expected} {identity['isvprodid']}", f"{actual} {int.from_bytes(report[256:258], 'little')}"


def _numbers(tcb: Any) -> list[int]:
    """Return the security version numbers of a level, in the order in which levels are sorted."""
    # A quoting enclave or a TDX module has one number. A platform has 16 for components of the processor's firmware,
    # the version of the PCE, and 16 for components of TDX.
    if "pcesvn" not in tcb:
        return [tcb["isvsvn"]]
    sgx, tdx = ([component["svn"] for component in tcb[f"{kind}tcbcomponents"]] for kind in ("sgx", "tdx"))
    return [*sgx, tcb["pcesvn"], *tdx]


def _reached_level(levels: Sequence[Any], actual: Sequence[int], what: str) -> Any:
    """Return the highest TCB level that the actual version numbers reach: none of them is lower.

    actual: in the order of _numbers.
    what: names the owner of these numbers in the error.
    Raises Malformed.
    """
    # Sort the levels, the highest first: a document may have them in another order.
    for level in sorted(levels, key=lambda level: _numbers(level["tcb"]), reverse=True):
        if all(have >= need for have, need in zip(actual, _numbers(level["tcb"]), strict=True)):
            return level
    raise Malformed("collateral", f"{what} is below every TCB level")


def evaluate_tcb(info: Any, identity: Any, module: Any, quote: TdQuote, pck: Pck) -> TcbStatus:
    """Return the status of the platform, merged with those of its TDX module and its quoting enclave.  [PCS]

    info, identity: verified documents.
    module: the entry of the quote's TDX module in info.
    Raises Malformed if one of the three is below every level, or if a date does not exist.
    """
    svn, minor = quote.tee_tcb_svn, quote.tee_tcb_svn[1]
    # The first two components belong to the module. From version 1 on, the module has levels of its own, so these two
    # must not count a second time here: 255 reaches every level.
    tdx = (255, 255, *svn[2:]) if minor else svn
    platform = _reached_level(info["tcbLevels"], [*pck.svns, pck.pcesvn, *tdx], "the platform")
    # The quoting enclave has levels in its own document, by its ISVSVN.
    isvsvn = int.from_bytes(quote.qe_report[258:260], "little")
    others = [_reached_level(identity["tcbLevels"], [isvsvn], "the quoting enclave")]
    if minor:
        others.append(_reached_level(module["tcbLevels"], [svn[0]], "the TDX module"))
    # A quoting enclave or a module that is revoked or out of date makes the whole platform so.
    status = platform["tcbStatus"]
    for level in others:
        if level["tcbStatus"] == "Revoked":
            status = "Revoked"
        elif level["tcbStatus"] in REFUSED_TCB:
            # A platform that is itself out of date, or revoked, stays so.
            status = _OUT_OF_DATE.get(status, status)
    # An advisory names a vulnerability of the firmware at that level. Return those of all three.
    advisories = {name for level in (platform, *others) for name in level.get("advisoryIDs", ())}
    # Intel decides when a level counts as out of date. The dates show how old it is, whatever Intel has decided.
    date, newest = platform["tcbDate"], max(level["tcbDate"] for level in info["tcbLevels"])
    try:
        days_behind = (datetime.fromisoformat(newest) - datetime.fromisoformat(date)).days
    except ValueError:  # such as February 31
        raise Malformed("tcb_info", f"{date} or {newest} is not a date") from None
    return TcbStatus(status, sorted(advisories), date, days_behind)


# endregion 11
# ==============================================================================
# region 12. Event logs                                                [uses 11]
# ==============================================================================
# Logs of the events that extended a TD's registers RTMR0 to RTMR3. A log is not signed. But if replaying it gives the
# registers of a quote, its digests and their order are proven. Another field of an event is proven only if the digest
# was recomputed from it here.
# Specifications: [CCEL], [DSTACK].

_CCEL_DIGESTS = {0x04: 20, 0x0B: 32, 0x0C: 48, 0x0D: 64}  # algorithm -> size [TPM2-2 6.3]
TPM_ALG_SHA384, _NO_ACTION = 0x0C, 3
DSTACK_EVENT = 0x08000001  # events of dstack and of the app that runs on it


def _extend(registers: list[bytes], index: int, digest: bytes) -> None:
    registers[index] = hashlib.sha384(registers[index] + digest).digest()


def replay_ccel(data: bytes) -> list[bytes]:
    """Return the registers RTMR0 to RTMR3 after the events of a CCEL log.  [CCEL]

    Integers are little-endian. The log ends at a register of 0xFFFFFFFF, at zeros, or at the end of data.
    Raises Malformed.
    """
    r = Reader(data, "cc_eventlog")
    # The first event has the old form, TCG_PCR_EVENT: register, type, SHA-1 digest, size of the data. Its data list the
    # log's algorithms and their sizes. They are not used: the sizes of the known algorithms are fixed.
    _, kind, size = r.unpack("<II20xI")
    r.require(kind == _NO_ACTION, f"first event of type {kind:#x}, expected {_NO_ACTION:#x}")
    r.take(size)
    registers = [bytes(48)] * 4
    while any(data[r.at : r.at + 8]) and data[r.at : r.at + 4] != b"\xff" * 4:
        register, kind, count = r.unpack("<III")
        digests = {}
        for _ in range(count):
            [algorithm] = r.unpack("<H")
            r.require(algorithm in _CCEL_DIGESTS, f"digest of unknown algorithm {algorithm:#x}")
            digests[algorithm] = r.take(_CCEL_DIGESTS[algorithm])
        r.take(*r.unpack("<I"))
        # An event of this type is only a remark: it extends no register. MRTD was final before the first event.
        if kind == _NO_ACTION or register == 0:  # register 0 is MRTD
            continue
        r.require(register <= 4, f"event of register {register}, expected at most 4")
        r.require(TPM_ALG_SHA384 in digests, "event without a SHA-384 digest")
        _extend(registers, register - 1, digests[TPM_ALG_SHA384])
    return registers


def replay_dstack(text: str) -> tuple[list[bytes], list[tuple[str, str]]]:
    """Return (the registers RTMR0 to RTMR3 after the events of a dstack log, (name, payload) of each proven event).

    The digest of an event of type DSTACK_EVENT is recomputed from its name and payload; some releases of dstack leave
    it out. Events after "system-ready" come from the app, which can give them any name; they are replayed but not
    returned.  [DSTACK]
    Raises Malformed.
    """
    event = {
        "imr": int,
        "event_type": int,
        "digest": (_hex_of(48), ""),
        "event": str,
        "event_payload": str,
        "version?": (1, 2),
        "...": object,
    }
    log = check_schema(parse_json(text.encode("utf-8"), "event_log"), [event], "event_log")
    registers, proven = [bytes(48)] * 4, []
    for entry in log:
        index, digest, name = entry["imr"], bytes.fromhex(entry["digest"]), entry["event"]
        if not 0 <= index <= 3:
            raise Malformed("event_log", f"event of register {index}, expected 0 to 3")
        # The type is not signed. If other types were allowed, somebody could hide a compose-hash by changing its type.
        # dstack extends register 3 with events of this type only.
        if index == 3 and entry["event_type"] != DSTACK_EVENT:
            raise Malformed("event_log", f"event of register 3 of type {entry['event_type']:#x}")
        if entry["event_type"] == DSTACK_EVENT:
            if re.match("(compose-hash|system-ready):", name):  # name a:b and payload c have the digest of a and b:c
                raise Malformed("event_log", f"the name {name[:80]!r} could be {name.partition(':')[0]} and a payload")
            payload = decode_hex(entry["event_payload"], "event_log, event_payload")
            content = b":".join((DSTACK_EVENT.to_bytes(4, "little"), name.encode("utf-8"), payload))
            if entry.get("version") == 2:  # an app chooses this form by the event_log_version of its compose file
                quoted = json.dumps(name, ensure_ascii=False)  # as in canonical JSON [RFC8785]
                content = f'{{"name":{quoted},"payload":"{payload.hex()}","type":{DSTACK_EVENT}}}'.encode()
            digest = hashlib.sha384(content).digest()
            if index == 3:
                proven.append((name, payload.hex()))
        _extend(registers, index, digest)
    # From system-ready on, the app runs and can add events of any name, such as a second compose-hash.
    return registers, [*itertools.takewhile(lambda event: event[0] != "system-ready", proven)]


# endregion 12
# ==============================================================================
# region 13. Launch digest                                        [uses nothing]
# ==============================================================================
# Computes the launch digest, the `measurement` of a report, of a guest that QEMU starts by measured direct boot. The
# processor measures the pages of the firmware, then the pages that the firmware's metadata asks for (one of them holds
# the hashes of kernel, initrd and command line), then a VMSA page for each vCPU. Integers are little-endian. Pure; any
# section and thread may call it.
#
# Not measured: memory size, devices, disks, CPU features, and everything else that the host provides. The firmware is
# the first link: if it starts anything but the measured kernel, the digest stays the same (see firmware_state).

PAGE_SIZE = 4096
MAX_FIRMWARE = 16 * MIB  # the limit of QEMU [QEMU hw/i386/pc.c, max-fw-size]; Debian's firmware has 4 MiB
MAX_SECTIONS = 16 * MIB  # sum of the sections in the metadata; edk2 asks for 192 KiB
MAX_VOLUME = 64 * MIB  # of a decompressed firmware volume; Debian's has 16 MiB
MAX_VCPUS = 4096  # [KVM arch/x86/include/asm/kvm_host.h, KVM_MAX_VCPUS]

# PAGE_TYPE of SNP_LAUNCH_UPDATE [SNP-ABI 8.17.2]. Only the contents of NORMAL and VMSA pages are measured. For other
# pages, the digest covers only their addresses and types.
PAGE_NORMAL, PAGE_VMSA, PAGE_ZERO, PAGE_UNMEASURED, PAGE_SECRETS, PAGE_CPUID = range(1, 7)
# Section type of the metadata -> name [EDK2 OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm], and the type that QEMU gives
# its pages [QEMU target/i386/sev.c].
SNP_SEC_MEM, SNP_CPUID, SNP_KERNEL_HASHES = 1, 3, 0x10
SECTION_TYPES = {
    SNP_SEC_MEM: ("SNP_SEC_MEM", PAGE_ZERO),
    2: ("SNP_SECRETS", PAGE_SECRETS),
    SNP_CPUID: ("CPUID", PAGE_CPUID),
    4: ("SVSM_CAA", PAGE_ZERO),
    SNP_KERNEL_HASHES: ("SNP_KERNEL_HASHES", PAGE_ZERO),
}
VMSA_GPA = 0xFFFFFFFFF000  # the address of every VMSA page [KVM arch/x86/kvm/svm/sev.c, snp_launch_update_vmsa]
BSP_RESET = 0xFFFFFFF0  # the first instruction of the first vCPU [APM2 14.1.5]


# GUIDs, in the mixed byte order of UEFI. First, the entries of the table near the end of a firmware
# [EDK2 OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm]; then the table of hashes and its entries
# [QEMU target/i386/sev.c, EDK2 OvmfPkg/AmdSev/BlobVerifierLibSevHashes]; last, LZMA
# [EDK2 MdeModulePkg/Include/Guid/LzmaDecompress.h].
(
    _TABLE_FOOTER,
    _SEV_METADATA,
    _HASHES_AREA,
    _RESET_BLOCK,
    _HASHES,
    _HASH_OF_CMDLINE,
    _HASH_OF_INITRD,
    _HASH_OF_KERNEL,
    _LZMA,
) = (
    uuid.UUID(text).bytes_le
    for text in """
    96b582de-1fb2-45f7-baea-a366c55a082d
    dc886566-984a-4798-a75e-5585a7bf67cc
    7255371f-3a3b-4b04-927b-1da6efa8d454
    00f771de-1a7e-4fcb-890e-68c77e2fb44e
    9438d606-4f22-4cc9-b479-a793d411fd21
    97d02dd8-bd20-4c94-aa78-e7714d36ab2a
    44baf731-3a2f-4bd7-9af1-41e29169781d
    4de79437-abd2-427f-b835-d5b172d2045b
    ee4e5898-3914-4259-9d6e-dc7bd79403cf
    """.split()
)
_HASHES_SIZE = 176  # 18 + 3 * 50 bytes, and zeros up to a multiple of 16
# The firmware's programs are compressed, so their names can only be found after decompression.
_LZMA_SECTION = re.compile(re.escape(b"\2" + _LZMA))  # of type EFI_SECTION_GUID_DEFINED
# The file name by which the host offers a program that the firmware starts, unmeasured, instead of the kernel. Firmware
# from edk2-stable202502 on may look for it.
SHIM_NAME = "shim\0".encode("utf-16-le")

# offset, size, name and value after a reset of the VMSA's fields that are not zero [APM2 table B-4; QEMU
# target/i386/cpu.c, x86_cpu_reset_hold]. KVM, from Linux 6.11 on, sets SVME in efer and MCE in cr4, and clears CD and
# NW in cr0 [KVM arch/x86/kvm/svm/sev.c, sev_es_sync_vmsa]. A segment register is base || limit || attributes ||
# selector. vmsa_page computes the values marked "-".
VMSA_FIELDS = [
    (int(offset, 16), int(size), name, None if value == "-" else int(value, 16))
    for offset, size, name, value in map(
        str.split,
        """
        0x000 16 es            0xFFFF_0093_0000
        0x010 16 cs            -
        0x020 16 ss            0xFFFF_0093_0000
        0x030 16 ds            0xFFFF_0093_0000
        0x040 16 fs            0xFFFF_0093_0000
        0x050 16 gs            0xFFFF_0093_0000
        0x060 16 gdtr          0xFFFF_0000_0000
        0x070 16 ldtr          0xFFFF_0082_0000
        0x080 16 idtr          0xFFFF_0000_0000
        0x090 16 tr            0xFFFF_008B_0000
        0x0D0  8 efer          0x1000
        0x148  8 cr4           0x40
        0x158  8 cr0           0x10
        0x160  8 dr7           0x400
        0x168  8 dr6           0xFFFF0FF0
        0x170  8 rflags        0x2
        0x178  8 rip           -
        0x268  8 g_pat         0x0007_0406_0007_0406
        0x310  8 rdx           -
        0x3B0  8 sev_features  -
        0x3E8  8 xcr0          0x1
        0x408  4 mxcsr         0x1F80
        0x410  2 x87_fcw       0x37F
        """.strip().splitlines(),
    )
]
# How other hypervisors differ from QEMU. Nobody specifies it: these are the values of sev-snp-measure 0.0.13.
_DIFFERENCES: Mapping[str, Mapping[str, int]] = {
    "QEMU": {},
    "ec2": {"ss": 0xFFFF_0092_0000, "tr": 0xFFFF_0083_0000, "rdx": 0x600, "mxcsr": 0, "x87_fcw": 0},
    "gce": {"g_pat": 0x00070106, "rdx": 0x600, "mxcsr": 0, "x87_fcw": 0},
}
VMMS = tuple(_DIFFERENCES)

# `-cpu` of QEMU -> rdx after a reset: CPUID Fn0000_0001_EAX of its family, model and stepping [APM3 E.3.2; QEMU
# target/i386/cpu.c, builtin_x86_defs]. The versions up to the last one, in QEMU 10.2, differ from the model in features
# only, which are not measured.
CPU_SIGNATURES: Mapping[str, int] = {
    name: signature
    for base, signature, last in (
        ("EPYC", 0x800F12, 5),  # 17h, model 01h, stepping 2
        ("EPYC-IBPB", 0x800F12, 0),
        ("EPYC-Rome", 0x830F10, 5),
        ("EPYC-Milan", 0xA00F11, 3),
        ("EPYC-Genoa", 0xA10F10, 2),
        ("EPYC-Turin", 0xB00F00, 2),  # 1Ah, model 00h, stepping 0
    )
    for name in (base, *(f"{base}-v{version}" for version in range(1, last + 1)))
}


class Firmware(NamedTuple):
    """A parsed firmware.

    sections: (gpa, size in bytes, type), in the order of the metadata.
    hashes_gpa, hashes_size: the area for the table of hashes, or 0.
    reset_eip: the first instruction of every vCPU but the first.
    """

    data: bytes
    sections: Sequence[tuple[int, int, int]]
    hashes_gpa: int
    hashes_size: int
    reset_eip: int


class BootHashes(NamedTuple):
    """The SHA-256 (32 bytes each) of the parts of a measured direct boot.

    cmdline: of the command line and a NUL.
    """

    kernel: bytes
    initrd: bytes
    cmdline: bytes


_require_form = Reader(b"", "firmware").require


def _footer_table(data: bytes) -> dict[bytes, bytes]:
    """Return {GUID: data} of the table of GUIDs in a firmware.  [EDK2 OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm]

    The table ends 32 bytes before the end of the firmware and is read backwards. An entry is data || u16 size || GUID,
    and size counts all three.
    Raises Malformed.
    """
    # The last 32 bytes are the reset vector, where the first vCPU starts. Before it comes the footer: an entry without
    # data, whose size is that of the whole table.
    at = len(data) - 32 - 18
    size, guid = struct.unpack_from("<H16s", data, at)
    _require_form(guid == _TABLE_FOOTER, "no table of GUIDs ends 32 bytes before its end: not OVMF")
    start = at + 18 - size
    _require_form(size >= 18 and start >= 0, f"its table of GUIDs cannot have {size} bytes")
    table: dict[bytes, bytes] = {}
    while at > start:
        size, guid = struct.unpack_from("<H16s", data, at - 18) if at - start >= 18 else (0, b"")
        _require_form(18 <= size <= at - start, f"entry of {size} bytes, its table of GUIDs has {at - start} left")
        # If there were two entries of one GUID, QEMU would take one, and another reader the other.
        _require_form(guid not in table, f"two entries {guid.hex()} in its table of GUIDs")
        table[guid] = data[at - size : at - 18]
        at -= size
    return table


def parse_firmware(data: bytes) -> Firmware:
    """Parse a firmware file.  [EDK2 OvmfPkg/ResetVector]

    Raises Malformed.
    """
    _require_form(
        0 < len(data) <= MAX_FIRMWARE and len(data) % PAGE_SIZE == 0,
        f"{len(data)} bytes, expected 1 to {MAX_FIRMWARE // PAGE_SIZE} pages of {PAGE_SIZE}",
    )
    table = _footer_table(data)

    def entry(guid: bytes, name: str, layout: str) -> tuple[Any, ...]:
        _require_form(guid in table, f"has no {name}")
        reader = Reader(table[guid], f"firmware, {name}")
        values = reader.unpack(layout)
        reader.end()
        return values

    # The metadata lie elsewhere in the firmware: their entry says how far from its end.
    [offset] = entry(_SEV_METADATA, "SEV metadata", "<I")
    [reset_eip] = entry(_RESET_BLOCK, "SEV-ES reset block", "<I")
    area, area_size = entry(_HASHES_AREA, "area for hashes", "<2I") if _HASHES_AREA in table else (0, 0)
    _require_form(16 <= offset <= len(data), f"its SEV metadata cannot be {offset} bytes before its end")
    metadata = data[len(data) - offset :]
    magic, size, version, count = struct.unpack_from("<4s3I", metadata)
    _require_form(magic == b"ASEV" and version == 1, "its SEV metadata does not begin with ASEV and version 1")
    fits = size == 16 + 12 * count and size <= offset
    _require_form(fits, f"its SEV metadata of {size} bytes cannot have {count} sections")
    sections = list(struct.iter_unpack("<3I", metadata[16:size]))
    # An unknown type is refused: QEMU may know it and add its pages in another way, which changes the digest.
    for gpa, length, kind in sections:
        _require_form(kind in SECTION_TYPES, f"section of unknown type {kind:#x}")
        whole = length and (gpa | length) % PAGE_SIZE == 0
        _require_form(whole, f"section of {length:#x} bytes at {gpa:#x}, expected whole pages")
    total = sum(length for _, length, _ in sections)
    _require_form(total <= MAX_SECTIONS, f"sections of more than {MAX_SECTIONS} bytes in total")
    return Firmware(data, sections, area, area_size, reset_eip)


def boot_hashes(kernel_sha256: bytes, initrd_sha256: bytes | None, append: str | None) -> BootHashes:
    """Return the hashes that QEMU computes for `-kernel`, `-initrd` and `-append`.

    kernel_sha256, initrd_sha256: 32 bytes each; initrd_sha256 and append are None if the option is absent.
    append: bytes that are not UTF-8 are surrogates, as in sys.argv.
    Raises Malformed if append cannot be a command line.  [QEMU target/i386/sev.c, build_kernel_loader_hashes]
    """
    # An absent option is not the same as no hash: QEMU then hashes an empty initrd, and a command line of one NUL.
    try:
        cmdline = (append or "").encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise Malformed("command line", "contains a lone surrogate") from None
    if b"\0" in cmdline:
        raise Malformed("command line", "contains a NUL")
    initrd = hashlib.sha256(b"").digest() if initrd_sha256 is None else initrd_sha256
    return BootHashes(kernel_sha256, initrd, hashlib.sha256(cmdline + b"\0").digest())


def hashes_page(firmware: Firmware, hashes: BootHashes) -> tuple[int, bytes]:
    """Return (GPA, PAGE_SIZE bytes) of the page that tells the firmware what it may boot.

    Raises Malformed if the firmware has no such page: then nothing measures the kernel.
    [QEMU target/i386/sev.c, build_kernel_loader_hashes]
    """
    # The metadata say which page is measured, the table of GUIDs where the firmware looks. Both must be the same page.
    section = f"of type {SNP_KERNEL_HASHES:#x} (SNP_KERNEL_HASHES)"
    places = [(gpa, size) for gpa, size, kind in firmware.sections if kind == SNP_KERNEL_HASHES]
    _require_form(bool(places), f"no measured direct boot: it has no section {section}")
    _require_form(firmware.hashes_gpa > 0, "no measured direct boot: its area for hashes has no address")
    gpa, size = places[0]
    single = len(places) == 1 and size == PAGE_SIZE
    _require_form(single, f"{len(places)} sections {section}, expected one of {PAGE_SIZE} bytes")
    offset = firmware.hashes_gpa - gpa
    # Elsewhere, the firmware would read hashes that nobody measures.
    inside = 0 <= offset <= PAGE_SIZE - _HASHES_SIZE and firmware.hashes_size >= _HASHES_SIZE
    _require_form(inside, f"its area for hashes lies outside its section {section}")
    # The table: GUID || u16 size of the whole || entries of GUID || u16 size || SHA-256. The firmware hashes what the
    # host hands it and starts it only if the hash is in this table, so the digest of this page stands for all three
    # files.
    rows = (_HASH_OF_CMDLINE, hashes.cmdline), (_HASH_OF_INITRD, hashes.initrd), (_HASH_OF_KERNEL, hashes.kernel)
    entries = b"".join(struct.pack("<16sH32s", guid, 50, digest) for guid, digest in rows)
    table = struct.pack("<16sH", _HASHES, 18 + len(entries)) + entries
    return gpa, (bytes(offset) + table).ljust(PAGE_SIZE, b"\0")


def vmsa_page(eip: int, signature: int, guest_features: int, vmm: str) -> bytes:
    """Return the page with the registers of a vCPU.  [APM2 table B-4]

    eip: its first instruction.
    The other parameters are those of compute_launch_digest.
    """
    # A vCPU starts in real mode: rip holds the low 16 bits of the address, and cs has the high ones as its base.
    accessed = 0 if vmm == "ec2" and eip == BSP_RESET else 1  # the lowest bit of the attributes of cs
    computed = {
        "cs": (eip & 0xFFFF0000) << 64 | 0xFFFF_009A_F000 | accessed << 16,
        "rip": eip & 0xFFFF,
        "rdx": signature,
        "sev_features": guest_features,
        **_DIFFERENCES[vmm],
    }
    # All other bytes are zero. The whole page is measured: a host that could choose registers could start the guest in
    # the middle of some code.
    page = bytearray(PAGE_SIZE)
    for offset, size, name, value in VMSA_FIELDS:
        page[offset : offset + size] = computed.get(name, value or 0).to_bytes(size, "little")
    return bytes(page)


class Step(NamedTuple):
    """Pages that the host adds to the guest in one step: size bytes from gpa on.

    data: their contents, which are measured only in pages of type NORMAL and VMSA.
    """

    name: str
    page_type: int
    gpa: int
    size: int
    data: bytes | memoryview = b""


Explain = Callable[[str, bytes], None]


def extend_digest(steps: Iterable[Step], explain: Explain) -> bytes:
    """Return the launch digest after these steps.  [SNP-ABI 8.17.2 PAGE_INFO]

    explain: called after each step, with its name and the digest so far.
    """
    # Each page is hashed together with the digest so far. So the order counts, and adding or leaving out a page shows.
    sha384, digest = hashlib.sha384, bytes(48)
    for name, page_type, gpa, size, data in steps:
        for at in range(0, size, PAGE_SIZE):
            # digest || contents || u16 length || page type || IMI_PAGE || three permissions || reserved || u64 GPA
            measured = page_type in (PAGE_NORMAL, PAGE_VMSA)
            contents = sha384(data[at : at + PAGE_SIZE]).digest() if measured else b""
            digest = sha384(struct.pack("<48s48sHB5xQ", digest, contents, 0x70, page_type, gpa + at)).digest()
        explain(name, digest)
    return digest


def compute_launch_digest(
    firmware: Firmware,
    hashes: BootHashes | None,
    vcpus: int,
    signature: int,
    guest_features: int = 1,
    vmm: str = "QEMU",
    explain: Explain = lambda step, digest: None,
) -> bytes:
    """Return the 48 bytes of the launch digest.  [SNP-ABI 8.17.2]

    hashes: None for a launch without `kernel-hashes=on`.
    vcpus: number of vCPUs at the launch.
    signature: of the CPU model; see CPU_SIGNATURES.
    guest_features: SEV_FEATURES of the VMSA.
    vmm: one of VMMS.
    explain: see extend_digest.
    Raises Malformed if a number is out of range, or if hashes is given but the firmware has no place for them.
    """
    # The bounds are those of the fields in the VMSA, and of KVM.
    if not (1 <= vcpus <= MAX_VCPUS and 0 <= signature < 1 << 32 and 0 <= guest_features < 1 << 64 and vmm in VMMS):
        found = f"{vcpus} vCPUs, signature {signature:#x}, guest features {guest_features:#x}, VMM {vmm}"
        raise Malformed("launch digest", f"out of range: {found}")
    page = b"" if hashes is None else hashes_page(firmware, hashes)[1]
    data, size = firmware.data, len(firmware.data)
    base = (1 << 32) - size
    steps = [Step(f"firmware: {size:#x} bytes at {base:#x}", PAGE_NORMAL, base, size, data)]
    # The firmware ends at 4 GiB, just below which the first vCPU starts. The sections follow in the order of the
    # metadata, but EC2 adds the CPUID page last, and GCE does not measure SNP_SEC_MEM.
    for gpa, size, kind in sorted(firmware.sections, key=lambda section: vmm == "ec2" and section[2] == SNP_CPUID):
        name, page_type = SECTION_TYPES[kind]
        if kind == SNP_KERNEL_HASHES and page:
            name, page_type = name + ", with the hashes of kernel, initrd and command line", PAGE_NORMAL
        elif kind == SNP_SEC_MEM and vmm == "gce":
            page_type = PAGE_UNMEASURED
        steps.append(Step(f"section: {size:#x} bytes at {gpa:#x}, type {kind:#x} {name}", page_type, gpa, size, page))
    # The first vCPU starts in the reset vector, the others where the firmware's metadata say.
    for number in range(vcpus):
        vmsa = vmsa_page(firmware.reset_eip if number else BSP_RESET, signature, guest_features, vmm)
        steps.append(Step(f"VMSA: vCPU {number}", PAGE_VMSA, VMSA_GPA, PAGE_SIZE, vmsa))
    return extend_digest(steps, explain)


def volume_place(data: bytes) -> tuple[int, int]:
    """Return (begin, end) of the compressed firmware volume in a firmware.  [PI volume 3, EFI_GUID_DEFINED_SECTION]

    Raises Malformed unless data has exactly one.
    """
    places: list[tuple[int, int]] = []
    for match in _LZMA_SECTION.finditer(data, 3):
        # u24 size || u8 type || GUID || u16 offset of the data || u16 attributes. The GUID also occurs in code.
        start = match.start() - 3
        size, offset = (int.from_bytes(data[at : at + n], "little") for at, n in ((start, 3), (match.end(), 2)))
        if 24 <= offset < size <= len(data) - start:
            places.append((start + offset, start + size))
    if len(places) != 1:  # of two, one could hide the other
        count = "more than one" if places else "no"
        raise Malformed("firmware volume", f"{count} compressed section, expected one")
    return places[0]


def volume_blocks(data: bytes) -> Iterator[bytes]:
    """Yield the decompressed firmware volume, which holds the firmware's programs, in blocks.

    Raises Malformed.
    """
    # An LZMA file of the old form: properties (5 bytes), u64 length of the contents, data. The length limits how much
    # memory a hostile firmware can fill.
    begin, end = volume_place(data)
    packed = data[begin:end]
    left = int.from_bytes(packed[5:13], "little")  # after the properties; edk2 always writes the length
    if not 0 < left <= MAX_VOLUME:
        raise Malformed("firmware volume", f"{left} bytes decompressed, expected 1 to {MAX_VOLUME}")
    try:
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=2 * MAX_VOLUME)
        block = decoder.decompress(packed, MIB)
        while block:
            left -= len(block)
            yield block
            block = b"" if decoder.eof or decoder.needs_input else decoder.decompress(b"", MIB)
    except ImportError:
        raise Malformed("firmware volume", "this Python has no lzma module") from None
    except lzma.LZMAError as e:
        raise Malformed("firmware volume", f"not LZMA data: {e}") from None
    if left:
        raise Malformed("firmware volume", f"its last {left} bytes are missing")


def firmware_state(data: bytes) -> str:
    """Return "" if the firmware admits no shim, else why its launch digest does not tell what it boots."""
    # The name can begin in one block and end in the next. A firmware that contains the name may not use it, but a
    # firmware without it cannot ask the host for that file.
    tail = b""
    try:
        for block in volume_blocks(data):
            if SHIM_NAME in tail + block:
                return (
                    "admits a shim: if the host offers one, the firmware starts it instead of the measured kernel, "
                    "with the same launch digest"
                )
            tail = block[1 - len(SHIM_NAME) :]
    except Malformed as e:
        return f"cannot be inspected: {e}"
    return ""


# endregion 13
# ==============================================================================
# region 14. IGVM                                                      [uses 13]
# ==============================================================================
# Computes the launch digest of an SEV-SNP guest that QEMU starts from an IGVM file, and reads the command line of its
# kernel out of the pages that this digest covers [IGVM]. A file consists of a fixed header, variable headers and file
# data, all little-endian. It can serve several platforms; a mask in each variable header says which ones it is for.
# A file that QEMU, KVM or the firmware would refuse is refused here too: no guest can have its digest.
# Pure; any section and thread may call it.

MAX_IGVM = GIB  # of a file, and of the memory that it fills
MAX_IGVM_HEADERS = 16 * MIB  # 1 GiB of pages has 8 MiB of headers
# Type of a variable header -> its fields. Relocations (0x102, 0x103) and CoRIM documents are for other platforms.
_IGVM_LAYOUTS = {
    0x001: "<I2BHQ",  # platform: mask, highest VTL, type, version, shared GPA boundary
    0x101: "<Q2I",  # guest policy: policy, mask, reserved
    0x301: "<Q2I",  # area: size, index, offset of its first contents
    0x302: "<Q3I2H",  # page: gpa, mask, offset of its contents or 0 for zeros, flags, data type, reserved
    0x303: "<Q2I",  # insert: gpa, mask, index of an area
    0x304: "<Q2I2H",  # VMSA: gpa, mask, offset of its contents, vCPU, reserved
    0x305: "<Q4I",  # required memory: gpa, mask, size, flags, reserved
    0x30B: "<I692x",  # ID block: mask, ...
    0x30D: "<Q2I",  # error range: gpa, mask, size
    0x311: "<I860x",  # VBS measurement: mask, ...
    # Parameters that a host writes to an area, which is not measured: index of the area, offset in it.
    **dict.fromkeys((0x307, 0x308, 0x309, 0x30A, 0x30C, 0x30E, 0x30F, 0x310, 0x312, 0x313), "<2I"),
}
_SEV_SNP, _SEV_ES = 2, 5  # types of platforms; the last one that is known
_DATA_TYPES = (PAGE_NORMAL, PAGE_SECRETS, PAGE_CPUID, PAGE_CPUID)  # of a page; the last one is CPUID_XF
_ZERO_PAGE = memoryview(bytes(PAGE_SIZE))
# The item of the HOB list by which the firmware finds the kernel: EFI_HOB_GUID_TYPE of 48 bytes [PI volume 3], then
# u64 address, u64 length, u32 type 0x201.
_KERNEL_ITEM = re.compile(
    b"\4\0\x30\0....%b(.{16})\1\2\0\0...." % re.escape(uuid.UUID("3dd177ff-b632-4e25-bef3-065063d55fc4").bytes_le),
    re.DOTALL,
)


_require_igvm = Reader(b"", "IGVM").require


def _igvm_headers(data: bytes) -> Iterator[tuple[int, tuple[Any, ...], memoryview]]:
    """Yield (type, fields, contents) of each variable header.  [IGVM IGVM_FIXED_HEADER, IGVM_VHS_VARIABLE_HEADER]

    contents: what the header names in the file data, or a page of zeros if it names nothing.
    Raises Malformed.
    """
    reader = Reader(data, "IGVM")
    magic, version, start, size, total, checksum = reader.unpack("<4s5I")
    _require_igvm(magic == b"IGVM" and version in (1, 2), "not an IGVM file of version 1 or 2")
    if version == 2:
        _require_igvm(reader.unpack("<2I") == (0, PAGE_SIZE), "not for x86-64 with pages of 4096 bytes")
    _require_igvm(total == len(data), f"{len(data)} bytes, its header says {total}")
    end = start + size
    inside = reader.at <= start and start % 8 == 0 and end < total and size <= MAX_IGVM_HEADERS
    _require_igvm(inside, f"it cannot have {size} bytes of headers at {start:#x} and data after them")
    # The field itself counts as zero.
    actual = binascii.crc32(data[:20] + bytes(4) + data[24 : reader.at] + data[start:end])
    _require_igvm(actual == checksum, f"CRC-32 {actual:#010x}, its header says {checksum:#010x}")
    reader, stage = Reader(data[start:end], "IGVM"), 0
    while reader.left():
        kind, length = reader.unpack("<2I")
        layout = _IGVM_LAYOUTS.get(kind, "")
        known = layout != "" and length == struct.calcsize(layout)
        _require_igvm(known, f"header of type {kind:#x} with {length} bytes: no SEV-SNP guest of QEMU has one")
        # Platforms, then initialization, then directives.
        _require_igvm(kind >> 8 >= stage, f"header of type {kind:#x} after those of a later stage")
        stage = kind >> 8
        fields = reader.unpack(layout)
        clean = not any(reader.take(-length % 8)) and not (kind in (0x101, 0x302, 0x305) and fields[-1])
        _require_igvm(clean, f"header of type {kind:#x}: its reserved bytes are not zero")
        # The 64-bit field with which a directive can begin is an address or a size of pages.
        whole = fields[: layout.count("Q")] if stage == 3 else ()
        for number in (*whole, fields[2]) if kind == 0x305 else whole:
            _require_igvm(number % PAGE_SIZE == 0, f"{number:#x} in a header of type {kind:#x}, expected whole pages")
        contents = _ZERO_PAGE
        if kind in (0x301, 0x302, 0x304) and fields[2]:
            offset, size = fields[2], fields[0] if kind == 0x301 else PAGE_SIZE
            _require_igvm(end <= offset <= total - size, f"{size} bytes at {offset:#x} lie outside of the file data")
            contents = memoryview(data)[offset : offset + size]
        yield kind, fields, contents


def _snp_steps(data: bytes) -> Iterator[tuple[Step, tuple[int, ...]]]:
    """Check all directives, and yield (step, key) for each one that SEV-SNP uses, in the order of the file.

    key: of a page, (number of the directive, GPA, attributes...); of a VMSA, (vCPU,); else empty.
    Raises Malformed.  [IGVM]
    """
    masks: dict[int, int] = {}  # type of a platform -> its mask
    areas: dict[int, int] = {}  # index -> size, or -1 after the insert
    for number, (kind, fields, contents) in enumerate(_igvm_headers(data)):
        snp = masks.get(_SEV_SNP, 0)
        if kind == 0x001:
            mask, vtl, platform, version, boundary = fields
            known = vtl in (0, 2) and platform <= _SEV_ES and version == 1 and (platform > 1 or not boundary)
            once = mask.bit_count() == 1 and platform not in masks
            _require_igvm(known and once, f"platform of type {platform}, mask {mask:#x}: unknown, or given twice")
            masks[platform] = mask
        elif kind == 0x301:
            size, index, _ = fields
            # An area of 2^60 bytes would keep a machine busy for years.
            _require_igvm(size <= MAX_IGVM and index not in areas, f"area {index} of {size} bytes, or declared twice")
            areas[index] = size
        elif kind == 0x302:
            gpa, mask, offset, flags, data_type, _ = fields
            _require_igvm(data_type < len(_DATA_TYPES), f"page of unknown type {data_type}")
            if mask & snp:
                # Flag 2 is `unmeasured`. QEMU ignores `shared` (4) and fills 2 MiB pages (1): the digest would seem to
                # cover more than it does.
                _require_igvm(flags in (0, 2), f"page with flags {flags:#x} at {gpa:#x}, expected 0 or 2")
                page_type = PAGE_UNMEASURED if flags and not data_type else _DATA_TYPES[data_type]
                step = Step(f"page at {gpa:#x}, type {page_type}", page_type, gpa, PAGE_SIZE, contents)
                yield step, (number, gpa, mask, flags, data_type, not offset)
        elif kind == 0x303:
            gpa, mask, index = fields
            size, areas[index] = areas.get(index, -1), -1
            _require_igvm(size >= 0, f"insert of area {index}, which does not exist or is inserted already")
            if mask & snp:
                yield Step(f"parameters: {size:#x} bytes at {gpa:#x}", PAGE_UNMEASURED, gpa, size), ()
        elif kind == 0x304:
            gpa, mask, _, vcpu, _ = fields
            of_sev = mask in (snp, masks.get(_SEV_ES))
            _require_igvm(of_sev, f"VMSA with mask {mask:#x}, expected that of one SEV-SNP or SEV-ES platform")
            if mask == snp:  # bit 0 of SEV_FEATURES, at 0x3B0, says that it is a VMSA of SNP
                active = gpa == VMSA_GPA and contents[0x3B0] & 1 == 1
                _require_igvm(active, f"VMSA of vCPU {vcpu} at {gpa:#x}: in the wrong place, or not of SNP")
                yield Step(f"VMSA: vCPU {vcpu}", PAGE_VMSA, gpa, PAGE_SIZE, contents), (vcpu,)
        elif len(fields) == 2:
            _require_igvm(areas.get(fields[0], -1) >= 0, f"parameter of area {fields[0]}, which does not exist")


def parse_igvm(data: bytes) -> tuple[list[Step], dict[int, memoryview]]:
    """Return (the steps in which QEMU adds pages to an SEV-SNP guest, {GPA: page} of the pages that are measured).

    Raises Malformed.  [IGVM; QEMU backends/igvm.c]
    """
    used: set[int] = set()  # the GPA of each page
    measured: dict[int, memoryview] = {}
    vmsas: dict[int, Step] = {}
    steps: list[Step] = []
    held: list[Step] = []  # the run of pages that QEMU holds back
    following: tuple[int, ...] = ()  # the page that continues it
    for step, key in _snp_steps(data):
        name, page_type, gpa, size, page = step
        # All VMSAs have the same GPA, so `used` does not count them.
        if page_type == PAGE_VMSA:
            vmsa = bytearray(page)
            vmsa[0x0D1] |= 0x10  # KVM sets EFER.SVME, CR4.MCE and bit 1 of RFLAGS; see VMSA_FIELDS
            vmsa[0x148] |= 0x40
            vmsa[0x170] |= 2
            _require_igvm(key[0] not in vmsas and key[0] < MAX_VCPUS, f"{name}: given twice, or beyond KVM's limit")
            vmsas[key[0]] = step._replace(data=bytes(vmsa))
            continue
        pages = range(gpa, gpa + size, PAGE_SIZE)
        fits = gpa + size <= 1 << 64 and len(used) + len(pages) <= MAX_IGVM // PAGE_SIZE
        _require_igvm(fits and used.isdisjoint(pages), f"{name}: beyond the limits of memory, or filled twice")
        used.update(pages)
        if not key:  # QEMU adds an insert at once, and so before the run
            steps.append(step)
            continue
        if key != following:
            steps += held
            held = []
        following = (key[0] + 1, gpa + PAGE_SIZE, *key[2:])
        held.append(step)
        if page_type == PAGE_NORMAL:
            measured[gpa] = memoryview(page)
    # KVM adds a VMSA for every vCPU, in order. If the file lacks one, nobody knows its registers.
    order = sorted(vmsas)
    _require_igvm(order == [*range(len(order) or 1)], f"{len(order)} VMSAs, expected one of each vCPU from 0 on")
    return [*steps, *held, *map(vmsas.__getitem__, order)], measured


def kernel_command_line(measured: Mapping[int, memoryview]) -> str:
    """Return the command line in the section `.cmdline` of the kernel that the firmware boots.  [PE; PI volume 3]

    measured: GPA -> page. Only these pages are read: the host can change any other.
    Raises Malformed.
    """
    items: list[bytes] = []
    for gpa, page in measured.items():
        # An item has 48 bytes, so up to 47 of them can lie in the next page.
        items += _KERNEL_ITEM.findall(bytes(page) + bytes(measured.get(gpa + PAGE_SIZE, b"")[:47]))
    require = Reader(b"", "kernel").require
    require(len(items) == 1, f"{len(items)} items in measured pages name one, expected 1")
    address, length = struct.unpack("<2Q", items[0])
    begin, image = address & -PAGE_SIZE, bytearray()
    for gpa in range(begin, address + length, PAGE_SIZE):
        require(gpa in measured, f"the page at {gpa:#x} is not measured")
        image += measured[gpa]
    reader = Reader(bytes(image[address - begin :][:length]), "kernel")
    magic, reader.at = reader.unpack("<2s58xI")
    signature, count, optional = reader.unpack("<4s2xH12xH2x")
    require(magic + signature == b"MZPE\0\0", "not a PE file")
    reader.at += optional
    sections = [reader.unpack("<8s4I16x") for _ in range(count)]
    found = [section for section in sections if section[0] == b".cmdline"]
    require(len(found) == 1, f"{len(found)} sections .cmdline, expected 1")
    [[_, virtual_size, _, size, reader.at]] = found
    raw = reader.take(size)
    # The kernel's stub reads only the first VirtualSize bytes; other readers take all.
    text = raw[:virtual_size].rstrip(b"\0\n")
    require(not any(raw[virtual_size:]) and 0 not in text, "section .cmdline has more text after its end")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Malformed("kernel", f"command line is not UTF-8 at byte {e.start}") from None


def root_hash_of(cmdline: str) -> str:
    """Return the value of `roothash=` in a kernel's command line, as 64 lower-case digits.

    Raises Malformed unless there is exactly one.
    """
    # Blanks in double quotes are part of a word [LINUX lib/cmdline.c, next_arg]. Possessive, as in _JSON_TOKEN: a
    # hostile command line may fill the file.
    words = re.findall(r'(?:"[^"]*(?:"|\Z)|[^\s"])++', cmdline)
    values = {word.replace('"', "").lower() for word in words if re.match('"?roothash=', word)}
    match = re.fullmatch("roothash=([0-9a-f]{64})", " ".join(values))
    if match is None:
        raise Malformed("kernel", "command line does not have one root hash of 64 hexadecimal digits")
    return match[1]


# endregion 14
# ==============================================================================
# region 15. dm-verity                                            [uses nothing]
# ==============================================================================
# Recomputes the dm-verity tree over a disk's root partition: every block of data, not only the stored root. The disk is
# read through a callable, in bounded memory, so it may have any size. Pure; any section and thread may call it.

ROOT_PARTITION, VERITY_PARTITION = (  # of x86-64 [DPS]
    uuid.UUID(text).bytes_le
    for text in ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "2c7357ed-ebd2-46d9-aec1-23d437ec2bf5")
)
SECTOR = 512
MAX_PARTITION_TABLE = MIB


_require_disk = Reader(b"", "disk").require


def _partitions(take: Callable[[int, int], bytes]) -> list[tuple[int, int]]:
    """Return (begin, size) in bytes of the root partition and of its verity partition.  [GPT 5.3]

    Raises Malformed unless there is exactly one of each.
    """
    # The partition table says which bytes the guest will mount. Nobody measures it, so a disk with two root partitions
    # is refused: the guest could take the other one.
    header = take(SECTOR, SECTOR)
    magic, size, checksum, table_lba, count, entry_size, table_checksum = struct.unpack("<8s4x2I52xQ3I420x", header)
    # The field itself counts as zero.
    actual = binascii.crc32(header[:16] + bytes(4) + header[20:size])
    whole = magic == b"EFI PART" and 92 <= size <= SECTOR and actual == checksum
    _require_disk(whole, "sector 1 is not a GPT header, or its CRC-32 is wrong")
    whole = entry_size >= 128 and count * entry_size <= MAX_PARTITION_TABLE
    table = take(table_lba * SECTOR, count * entry_size if whole else 0)
    whole = whole and binascii.crc32(table) == table_checksum
    _require_disk(whole, f"table of {count} partitions with {entry_size} bytes each: too large, or its CRC-32 is wrong")
    rows = [struct.unpack_from("<16s16x2Q", table, at) for at in range(0, len(table), entry_size)]
    places: list[tuple[int, int]] = []
    for kind in (ROOT_PARTITION, VERITY_PARTITION):
        found = [(first * SECTOR, (last + 1 - first) * SECTOR) for row, first, last in rows if row == kind]
        _require_disk(len(found) == 1, f"{len(found)} partitions of type {uuid.UUID(bytes_le=kind)}, expected 1")
        places += found
    return places


def verify_disk(read: Callable[[int, int], bytes], root_hash: str) -> int:
    """Raise Malformed unless the disk has this root hash, and return how many bytes its tree covers.  [VERITY]

    read: called with an offset and a size; returns that many bytes, or fewer at the end of the disk.
    root_hash: 64 lower-case digits.
    """

    def take(at: int, size: int) -> bytes:
        data = read(at, size) if at + size < 1 << 63 else b""  # a disk can name any offset of 64 bits
        _require_disk(len(data) == size, f"ends before byte {at + size}")
        return data

    (data_at, data_size), (area, area_size) = _partitions(take)
    # Magic, version, hash type, UUID, algorithm, block sizes of data and hashes, data blocks, size of the salt, salt.
    *known, algorithm, data_block, block, blocks, salt_size, salt = struct.unpack(
        "<8s2I16x32s2IQH6x256s168x", take(area, 512)
    )
    known.append(algorithm.rstrip(b"\0"))
    # Type 1 puts the salt in front.
    expected = [b"verity\0\0", 1, 1, b"sha256"]
    _require_disk(known == expected, "no superblock of version 1, type 1 and sha256 in the verity partition")
    sizes = {1 << n for n in range(9, 17)}
    possible = {data_block, block} <= sizes and salt_size <= len(salt)
    _require_disk(possible, f"blocks of {data_block} and {block} bytes, salt of {salt_size}: expected 512 to 65536")
    # Nothing would protect the rest of the partition.
    whole = blocks * data_block == data_size > 0
    _require_disk(whole, f"tree for {blocks} blocks of {data_block} bytes, the root partition has {data_size} bytes")
    counts: list[int] = []  # hash blocks of each level, the one of the data blocks first
    while blocks > 1:
        blocks = -(-blocks // (block // 32))
        counts.append(blocks)
    _require_disk((sum(counts) + 1) * block <= area_size, "the verity partition is too small for the tree")

    def digest_of(data: bytes) -> bytes:
        return hashlib.sha256(salt[:salt_size] + data).digest()

    def level(below: Iterator[bytes], begin: int, end: int) -> Iterator[bytes]:
        for at in range(begin, end, block):
            computed = b"".join(itertools.islice(below, block // 32)).ljust(block, b"\0")
            _require_disk(take(at, block) == computed, f"hash block at byte {at} differs from what it covers")
            yield digest_of(computed)

    # From the bottom up, in one pass: each level is a generator that reads blocks of its own level and compares them
    # with what the level below it yields. So memory holds one block of each level, and every byte of data is read once.
    # Where a stored hash block is wrong, the guest's reads would fail.
    digests: Iterator[bytes] = (
        digest_of(take(at, data_block)) for at in range(data_at, data_at + data_size, data_block)
    )
    end = area + block * (sum(counts) + 1)  # the superblock fills a block; the top level follows it
    for count in counts:
        digests = level(digests, end - count * block, end)
        end -= count * block
    actual = next(digests).hex()
    _require_disk(actual == root_hash, f"root hash {actual}, expected {root_hash}")
    return data_size


# endregion 15
# ==============================================================================
# region 16. Statement                                            [uses nothing]
# ==============================================================================
# The schema of provenance.json: an in-toto Statement [IN-TOTO] whose predicate is SLSA provenance [SLSA]. The schema is
# data, for check_schema, with the keys in the order of [CONTRACT 3.2]. The functions below it read a Statement. Pure;
# any section and thread may call them.
#
# The schema refuses unknown keys. Hardware has signed the digest of the whole file, so readers will believe everything
# in it, even a key that this verifier never looked at.

_HEX40, _HEX64 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_OBJECT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # the name of a git object, by SHA-1 or SHA-256
_TIME = re.compile(
    r"""(?ax)
    \d{4} - (0[1-9]|1[0-2]) - (0[1-9]|[12]\d|3[01])  # year, month, day
    T ([01]\d|2[0-3]) : [0-5]\d : [0-5]\d            # hour, minute, second
    (\.\d{1,9})?                                     # fraction
    (\+00:00|Z)                                      # UTC
    """
)
_SHA256 = {"sha256": _HEX64}
_PROGRAM = {"digest": _SHA256, "version": WORD}
# The toolchains of [K], with their keys in order. The older generation writes its whole banner as kettle's version.
_TOOLS = [
    {**dict.fromkeys(names.split(), _PROGRAM), "kettle": {"digest": {"sha256": str}, "version": str}}
    for names in ("nix", "cargo rustc", "pnpm node")
]
# `integrity` in pnpm-lock.yaml: a hash in the form of [SRI]. [K]
_INTEGRITY = r"(md5|sha1|sha256|sha384|sha512)-[A-Za-z0-9+/]{22,86}={0,2}(\?[\x21-\x7e]*)?"
# A digest is only a name here: nobody has the dependency at hand to hash it.
# [K] writes every nix hash as sha256, whatever its algorithm, in hexadecimal digits or base64. As sha512 it writes the
# integrity of a pnpm package, or the commit of a package that is a GitHub tarball.
_DIGEST = (
    {"sha256": re.compile(r"[0-9a-f]{32,128}|[A-Za-z0-9+/]{22,86}={0,2}")},
    {"sha512": re.compile(rf"[0-9a-f]{{128}}|[0-9a-f]{{40}}|{_INTEGRITY}( {_INTEGRITY})*")},
    {"gitCommit": _OBJECT},
    {"dirHash": _HEX64},  # of a Go module: its h1 in go.sum, in hexadecimal digits
    {"sha1": _HEX40},
    {"md5": re.compile(r"[0-9a-f]{32}")},
)
# Build types of the older generation, which are read but never written, and the toolchain that each requires
# [CONTRACT 3.8]. All build types have one schema; the caller decides which to accept (--build-type).
OLDER_BUILD_TYPES = {
    "https://lunal.dev/kettle/cargo@v1": "cargo",
    "https://lunal.dev/kettle/nix@v1": "nix",
    "https://lunal.dev/kettle/pnpm@v1": "pnpm",
}
# A WORD has no control characters, so no name can fake another line of output. A question mark means that the older
# generation lacks the key, or that only some toolchains write it. All other keys are required, so that no reader has to
# guess what a missing one means.
_STATEMENT = {
    "_type": STATEMENT_TYPE,
    "predicate": {
        "buildDefinition": {
            "buildType": WORD,
            "externalParameters": {
                "buildCommand": WORD,
                "source": {
                    "digest": {"gitCommit": re.compile(f"({_OBJECT.pattern})?"), "gitTree": _OBJECT},
                    "uri": str,
                },
            },
            "internalParameters": {
                "evaluation?": {"derivationCount": int, "fetchCount": int},
                "flakeInputs?": [{"name": WORD, "narHash": WORD}],
                "lockfileHash": _SHA256,
                "toolchain": dict,
            },
            "resolvedDependencies": [
                {
                    "annotations?": {"drvPath": WORD, "outputHashMode?": WORD, "url?": str, "urls?": str},
                    "digest": _DIGEST,
                    "name": WORD,
                    "uri": WORD,
                }
            ],
        },
        "runDetails": {
            "builder": {"id": WORD},
            "byproducts": [{"digest": _SHA256, "name": WORD}],
            "metadata": {
                "invocationId": re.compile(r"build-[0-9A-Za-z-]+"),
                "startedOn": _TIME,
                "finishedOn": (_TIME, None),
            },
        },
    },
    "predicateType": PREDICATE_TYPE,
    "subject": [{"digest": _SHA256, "name": WORD}],
}


def check_statement(doc: Any) -> Any:
    """Return doc, a parsed JSON document, if it has the schema of provenance.json.  [CONTRACT 3.2]

    The build types of the older generation are accepted too.  [CONTRACT 3.8]
    Raises Malformed.
    """
    structure = "provenance schema"
    check_schema(doc, _STATEMENT, structure, ordered=True)
    definition, run = doc["predicate"]["buildDefinition"], doc["predicate"]["runDetails"]
    build_type, toolchain = definition["buildType"], definition["internalParameters"]["toolchain"]
    path = ".predicate.buildDefinition.internalParameters.toolchain"
    # [K] has three toolchains, each with fixed programs. Our own toolchains name whatever programs they used: these
    # names become keys of a schema, so they must not have a special meaning there.
    names = (name for name in toolchain if WORD.fullmatch(name) and not re.search(r"^\.\.\.$|\?$", name))
    own = {**dict.fromkeys(names, _PROGRAM), "kettle": _PROGRAM}
    check_schema(toolchain, own if build_type == CONFBUILD_TYPE else tuple(_TOOLS), structure, path, ordered=True)
    if build_type not in OLDER_BUILD_TYPES:
        check_schema(toolchain["kettle"], _PROGRAM, structure, path + ".kettle", ordered=True)
    elif OLDER_BUILD_TYPES[build_type] not in toolchain:
        raise Malformed(structure, f"toolchain has the keys {', '.join(toolchain)}, but buildType is {build_type}")
    # Left to check: byproducts may have any names, but if two had the same one, two readers could look at different
    # byproducts.
    [(name, count), *_] = [*Counter(b["name"] for b in run["byproducts"]).most_common(1), ("", 0)]
    if count > 1:
        raise Malformed(structure, f"{count} byproducts are called {name[:80]}")
    return doc


def to_canonical(doc: Any) -> bytes:
    """Return the only bytes that provenance.json may have for doc.  [CONTRACT 3.1]"""
    return json.dumps(doc, indent=2, ensure_ascii=False).encode("utf-8")


def descriptor(name: str, digest: str, algorithm: str = "sha256", **more: Any) -> Json:
    """Return a ResourceDescriptor.  [IN-TOTO]

    digest: in the form that [CONTRACT 3.5] says for algorithm.
    more: further keys, such as uri.
    """
    return {"digest": {algorithm: digest}, "name": name, **more}


# In the following functions, `doc` is a Statement that check_statement has accepted.


def merkle_entries(doc: Any) -> list[str]:
    """Return the leaves of the byproduct input_merkle_root, in order.  [CONTRACT 3.6]"""
    definition = doc["predicate"]["buildDefinition"]
    source, parameters = definition["externalParameters"]["source"]["digest"], definition["internalParameters"]
    # The order is that of [K], in which nix differs from the others. A leaf holds neither its type nor its length. That
    # is safe because the root is always computed from the whole list: nobody proves a single leaf.
    tools = {name: (tool["digest"]["sha256"], tool["version"]) for name, tool in parameters["toolchain"].items()}
    del tools["kettle"]
    before, after = [source["gitCommit"], source["gitTree"]], [parameters["lockfileHash"]["sha256"]]
    nix = "nix" in tools and definition["buildType"] != CONFBUILD_TYPE
    for dependency in definition["resolvedDependencies"]:
        name, uri = dependency["name"], dependency["uri"]
        # The name is part of the separator because a name may itself contain `?hash=`.
        after.append(f"fetch:{name}:" + uri.partition(name + "?hash=")[2] if nix else uri)
    programs = [text for name in reversed(tools) for text in tools[name]]
    return [*before, *after, *programs] if nix else [*before, *programs, *after]


def byproduct(doc: Any, name: str) -> str | None:
    """Return the SHA-256 of the byproduct with this name, or None."""
    # Every name occurs only once: check_statement refuses anything else.
    byproducts = doc["predicate"]["runDetails"]["byproducts"]
    return {entry["name"]: entry["digest"]["sha256"] for entry in byproducts}.get(name)


def read_statement(data: bytes) -> Any:
    """Return the Statement in the bytes of provenance.json, or None if they are malformed."""
    try:
        return check_statement(parse_json(data, "provenance"))
    except Malformed:
        return None


def subject_names(data: bytes) -> list[str]:
    """Return the names of the subjects in the bytes of provenance.json, or [] if they are malformed."""
    return [subject["name"] for subject in (read_statement(data) or {"subject": []})["subject"]]


def package_of(uri: str) -> str:
    """Return NAME@VERSION (for nix: NAME) of a dependency of the default registry, or "".  [CONTRACT 3.5]

    uri: such as pkg:cargo/NAME@VERSION?checksum=...
    With a path, vcs_url or another URL, the result is "": anybody can give a fork the name of a package.
    """
    # The qualifiers of a purl [PURL] say where a package comes from. Without them, it comes from its type's registry.
    path, _, query = uri.partition("?")
    elsewhere = re.search(r"(?i)(^|&)(path|(vcs|repository|download)_url)=", query)
    return path.partition("/")[2] if re.match(r"pkg:[a-z-]+/", path) and not elsewhere else ""


# endregion 16
# ==============================================================================
# region 17. Verdict                           [uses 6, 7, 8, 9, 10, 11, 12, 16]
# ==============================================================================
# verify_bundle takes the bytes of a bundle and what a caller expects, and returns a verdict [CONTRACT 4.1, 5.5]. Every
# check runs and is shown, even after a failure; a check that could not run is shown as "not checked", with the reason.
# Each check compares two values that come from different places. The verdict is "passed" only if every required check
# has passed and no check has failed. Three things require checks: the platform of the evidence, the bundle, and each
# field that the caller sets. Any thread may call verify_bundle; it shares nothing.
#
# Read verify_bundle and _conclude first: they say what PASSED means. Then read _check_evidence, which looks up the
# platform in PLATFORMS. The row there names the function that checks this kind of evidence, from the manufacturer's key
# down to the 64 bytes that the VM had signed: the SHA-256 of provenance.json, the nonce, and zeros.

# The checks that must pass, whatever the caller expects: for all evidence, for each kind of hardware, and for a bundle.
# They are listed here, not collected from the checks that ran, because the maker of the evidence decides which checks
# can run. An attacker can skip any check whose name is missing here.
_REQUIRED_EVIDENCE = frozenset(("evidence form", "platform", "report form"))
_REQUIRED_SNP = _REQUIRED_EVIDENCE | set(
    "report version, signature algorithm, signing key, product, VEK form, VEK issuer, VEK signature, VEK validity, "
    "VEK product, VEK TCB, VEK chip_id, VEK CSP_ID, report signature, VMPL, migration agent, debug, reserved bits, "
    "unsigned bytes".split(", ")
)
_REQUIRED_TDX = _REQUIRED_EVIDENCE | set(
    "attestation key type, TEE type, QE vendor, PCK form, PCK chain, PCK root, PCK validity, PCK extension, "
    "QE signature, QE identity, TDX module identity, QE binding, quote signature, TD attributes, XFAM, service TD, "
    "debug".split(", ")
)
_REQUIRED_TPM = frozenset("runtime data, runtime data digest, TPM quote, TPM signature, PCR digest".split(", "))
REQUIRED_OF_BUNDLE = frozenset(
    "provenance form, canonical form, provenance schema, provenance digest, report data tail, input Merkle root, "
    "builder, subjects, artifacts, unlisted files".split(", ")
)
# The checks that must pass if the caller sets a field of Expectations, the most important first: the command line shows
# in this order what was not checked. The columns, two or more spaces apart, are: the field; the check; the option that
# requests it; where its value comes from ("provenance", or a pattern of the platforms whose evidence has it). "-" is an
# empty cell. If a check has the name of a claim, it compares that claim with the field.
# fmt: off
EXPECTED = [
    ["" if cell == "-" else cell for cell in re.split("  +", line.strip())]
    for line in """
    nonce               nonce                --nonce                  -
    measurements        measurement          --image, --measurement   -
    igvm                igvm measurement     -                        -
    disk                disk                 -                        -
    image               image parts          -                        -
    image               image firmware       -                        -
    image               image measurement    -                        -
    image               image host_data      -                        -
    pcrs                PCR values           --pcr                    az-
    source_tree         source tree          --source                 provenance
    min_tcb             minimum TCB          --min-tcb                snp|tdx|dstack
    require_collateral  TCB status           --collateral             tdx|dstack
    require_collateral  revocation           --collateral             tdx|dstack
    require_crl         revocation           --crl                    snp
    require_crl         revocation list age  --crl that is valid now  snp
    require_tee         hardware evidence    -                        -
    source_commit       source commit        --source-commit          provenance
    source_uri          source uri           --source-uri             provenance
    lockfile_sha256     lock file            -                        provenance
    dependencies        dependencies         -                        provenance
    packages            packages             --dep                    provenance
    builder_id          builder id           --builder-id             provenance
    build_type          build type           --build-type             provenance
    build_log_sha256    build log            -                        provenance
    finished            age                  --max-age                provenance
    guest_policy        guest_policy         --guest-policy           snp
    platform_info       platform_info bits   --platform-info          snp
    min_firmware        minimum firmware     --min-firmware           snp
    min_mit_vector      mitigations          --min-mit-vector         snp
    min_guest_svn       minimum guest_svn    --min-guest-svn          snp
    report_data         signed_data          --report-data            -
    rtmrs               RTMR values          --rtmr                   tdx|dstack
    mr_config_id        mr_config_id         --mr-config-id           tdx|dstack
    compose_hash        compose_hash         --compose-hash           dstack
    host_data           host_data            --host-data              snp
    guest_svn           guest_svn            --guest-svn              snp
    chip_id             chip_id              --chip-id                snp
    family_id           family_id            --family-id              snp
    image_id            image_id             --image-id               snp
    id_key_digest       id_key_digest        --id-key-digest          snp
    author_key_digest   author_key_digest    --author-key-digest      snp
    report_id           report_id            --report-id              snp
    csp_id              csp_id               --csp-id                 snp
    vmpl                VMPL                 --vmpl                   snp
    service_td          service TD           --service-td             tdx|dstack
    """.strip().splitlines()
]
# fmt: on
# Checks that need a provenance. With evidence_only, they are shown as not checked, with the reason ALONE.
OF_PROVENANCE = REQUIRED_OF_BUNDLE | {check for _, check, _, part in EXPECTED if part == "provenance"}
_CHECK_OF = {field: check for field, check, _, _ in EXPECTED}
MEASURED = {check for _, check, _, _ in EXPECTED if check.endswith("measurement")}  # they tie evidence to software
# A subject is a file directly in artifacts/. With "/" or "..", "\" on Windows, or a control character that a terminal
# hides, two readers could take one name for two different files.
PLAIN_NAME = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\x7f]{1,255}")
# Why a check did not run.
ALONE = "evidence alone: provenance and artifacts are not checked"
_BLOCKED = "it needs a check that failed"
_UNASKED = "no expectation given"
_UNUSED = "it was given, but no check of this evidence used it"
_MASKED = (
    "the host masks the chip_id of its reports (MASK_CHIP_ID), so no VCEK can be found or match: its operator can "
    "turn that off, or use a VLEK"
)
_LEGACY_DIGEST = (
    "legacy compact digest: a compact form of provenance.json was signed, as in the five oldest bundles; "
    "--allow-legacy-digest accepts it"
)


class _Checks(NamedTuple):
    """The state of the verification of one bundle: the caller's input, and the results so far.

    now: the time to verify at, such as 2026-11-23T00:00:00Z.
    anchors: the CA keys that are trusted.
    made: the checks, in the order in which they ran.
    claims: what the evidence and the provenance say, in the order in which the verdict shows it.
    traced: the certificates that verify_chain has accepted in one chain and need not verify again in the next. Another
        check of each chain ("PCK root" and so on) says whether it ends in Intel's root.
    """

    expected: Expectations
    now: str
    endorsements: Endorsements
    anchors: Anchors
    made: list[Check]
    claims: dict[str, Any]
    traced: set[tuple[bytes, bytes]]

    @property
    def ok(self) -> bool:
        """True if the last check passed."""
        return self.made[-1].status == "passed"

    def hold(self, name: str, holds: bool, expected: Any = "", actual: Any = None, detail: str = "") -> None:
        """Add a check that passes if holds is true.

        expected, actual: only shown, not compared; actual may be left out.
        """
        if actual is None:
            actual = expected if holds else "something else"
        self.made.append(Check(name, "passed" if holds else "failed", str(expected), str(actual), detail))

    def compare(self, name: str, expected: Any, actual: Any, detail: str = "") -> None:
        """Add a check that passes if both values are equal. They are public, so the time that this takes may vary.

        actual: a value, or a function that returns it; the check fails if it raises Malformed.
        """
        try:
            value = actual() if callable(actual) else actual
        except Malformed as e:
            value, detail = "unreadable", str(e)
        # The values are compared before they are turned into text: 1 and "1" differ.
        self.hold(name, expected == value, expected, value, detail)

    def current(self, name: str, periods: Iterable[tuple[str, str]], detail: str = "") -> None:
        """Add a check that passes if the time of the verification lies in every period, both ends included."""
        firsts, lasts = zip(*periods, strict=True)
        first, last = max(firsts), min(lasts)
        # A period that begins in the future is rarely a forgery. More often the clock of this machine is behind.
        if self.now < first:
            detail += "; is the clock of this machine behind?"
        self.hold(name, first <= self.now <= last, f"{first} to {last}", self.now, detail.removeprefix("; "))

    def registers(self, field: str, actual: Mapping[int, str]) -> None:
        """Add the check of the registers that a field of Expectations names, unless the field is None."""
        wanted = getattr(self.expected, field)
        if wanted is not None:
            values = {i: value.lower() for i, value in sorted(wanted.items())}
            # The quote does not cover every register. One that it does not cover has the actual value "none".
            found = {i: actual.get(i, "none") for i in values}
            self.compare(_CHECK_OF[field], compact_json(values), compact_json(found))

    def skip(self, name: str, why: str, actual: Any = "", expected: str = "", failed: bool = False) -> None:
        """Add a check that could not run.

        failed: the caller requires the check, so it fails.
        """
        self.made.append(Check(name, "failed" if failed else "not checked", expected, str(actual), why))

    def expect(self, field: str, actual: Any, shown: Any, holds: bool) -> None:
        """Add the check of a field of Expectations, as "not checked" if the caller left the field None.

        shown: the expected value as text.
        holds: whether actual is as expected.
        """
        if getattr(self.expected, field) is None:
            self.skip(_CHECK_OF[field], _UNASKED, actual)
        else:
            self.hold(_CHECK_OF[field], holds, shown, actual)

    def attempt(self, name: str, parse: Callable[..., Any], *arguments: Any) -> Any:
        """Add a check that passes unless parse raises, and return the value of parse, or None."""
        try:
            value = parse(*arguments)
        except (Malformed, BadSignature) as e:
            return self.hold(name, False, "", "", str(e))
        # Any other exception is a bug and keeps its traceback: a verdict that hides it could be wrong.
        self.hold(name, True)
        return value


def _claim_report(checks: _Checks, report: Report, product: str) -> None:
    """Add every field of the report to the claims. `tcb` is the reported TCB: the one that the VEK belongs to.

    product: empty if unknown; then the TCBs are shown as bytes.
    """
    claims = checks.claims
    claims.update(product=product, key_type=report.signing_key.lower(), debug=bool(report.policy & POLICY_DEBUG))
    for name, value in list(report._asdict().items())[:-3]:  # without the signature and the whole
        if name.endswith("_tcb") and product in TCB_LAYOUTS:
            value = tcb_levels(product, value)
        elif name.endswith("_version"):
            value = f"{value[2]}.{value[1]}.{value[0]}"  # build, minor, major
        elif name == "policy":
            claims["policy_abi"] = f"{value >> 8 & 255}.{value & 255}"
            claims["policy_bits"] = bit_names(value >> 16, POLICY_NAMES)
            value = f"{value:#x}"
        elif name == "platform_info":
            claims["platform_info_bits"] = bit_names(value, PLATFORM_NAMES)
        # `version` alone could be mistaken for that of the firmware.
        renamed = {"version": "report_version", "reported_tcb": "tcb"}.get(name, name)
        claims[renamed] = value.hex() if isinstance(value, bytes) else value


def _check_anchors(checks: _Checks) -> None:
    """Show whose keys are trusted."""
    # The caller's own keys are not shown as a passed check: nothing here can tell whether they are the manufacturer's.
    if checks.endorsements.anchors is None:
        checks.hold("trust anchors", True, "", "AMD's and Intel's, as pinned in this file")
    else:
        checks.skip("trust anchors", "the caller's keys, which may not be the manufacturer's", "given by --roots")


def _check_debug(checks: _Checks, debug: bool) -> None:
    """Check that the VM is not in debug mode, unless the caller allows it."""
    # The manufacturer's keys sign reports of such VMs too. Their host can read the nonce, and write any artifact.
    allowed = checks.expected.allow_debug
    checks.hold(
        "debug",
        not debug or allowed,
        "off, or --allow-debug" if allowed else "off",
        "on" if debug else "off",
        "the host may read and change the guest's memory" if debug else "",
    )


def _check_vek(checks: _Checks, report: Report, product: str, vek: Certificate) -> None:
    """Check that AMD's ASK or ASVK certifies vek for the report's chip and TCB, and that vek signed the report.

    vek: not authenticated yet.  [VCEK]
    """
    # The ASK or ASVK is pinned, not taken from the evidence, so nobody has to check the ARK's signature on it. The name
    # of the issuer has a check of its own, so that the verdict shows whether the name or the signature is wrong.
    roles, kind = checks.anchors[product], report.signing_key
    issuer = roles["asvk" if kind == "VLEK" else "ask"]
    chain = (vek, issuer, roles["ark"])
    checks.hold("VEK issuer", vek.issuer == issuer.subject, name_text(issuer.subject), name_text(vek.issuer))
    checks.attempt("VEK signature", verify_signature, issuer.key, vek.tbs_certificate, vek.signature)
    checks.current("VEK validity", ((c.not_before, c.not_after) for c in chain), "of the VEK, its issuer and the ARK")
    # The report itself said which product's keys to use. The certificate must name the same product.
    checks.compare("VEK product", product, lambda: vek_product(vek))
    # The key of a VEK is derived from the versions of the firmware. If they differ from those in the report, this key
    # belongs to another firmware.
    levels = tcb_levels(product, report.reported_tcb)
    checks.compare("VEK TCB", tcb_text(levels), lambda: tcb_text(vek_tcb(vek, levels)))
    if kind == "VLEK":  # it is loaded into many machines of a cloud, so it names no chip  [VCEK 3.1]
        checks.hold("VEK chip_id", _HWID not in vek.extensions, "none")
    else:
        masked = "" if any(report.chip_id) else _MASKED
        checks.compare("VEK chip_id", report.chip_id.hex(), lambda: vek_chip_id(vek).hex(), masked)
    # Everything above authenticates a key. Only this check makes the fields of the report mean anything.
    checks.attempt("report signature", verify_report, report, vek.key)


def _find_vek(checks: _Checks, report: Report, data: bytes | None) -> Any:
    """Return the certificate of the VEK, and check its form; None if there is none.

    data: the certificate in the evidence, or None. Only then is the caller's used: it completes evidence, but never
        replaces a part of it.
    """
    # Without a certificate, nobody knows who signed the report. So this check fails, and is not just "not checked".
    given = checks.endorsements.vek
    if data is not None:
        if given is not None:
            checks.skip("given VEK", "the evidence holds a certificate of its own, which was used")
        return checks.attempt("VEK form", parse_certificate, data, "VEK")
    if given is not None:
        return checks.attempt("VEK form", find_vek, given, report.signing_key)
    source = ""
    if report.signing_key == "VLEK":
        source = "; the cloud that runs the VM has its VLEK"
    elif report.signing_key == "VCEK" and report.product in TCB_LAYOUTS:
        source = f"; AMD has it at {vek_url(report, report.product)}" if any(report.chip_id) else "; " + _MASKED
    detail = f"the evidence holds no certificate, and none was given (--vek){source}"
    checks.hold("VEK form", False, "a certificate", "none", detail)
    return None


def _check_report(checks: _Checks, report: Report, certificate: bytes | None, oldest: int) -> None:
    """Check a report of real hardware, its signature and the caller's expectations of it.

    certificate: of the VEK, from the evidence, or None.
    oldest: the oldest report version that is accepted.  [SNP-ABI 7.3]
    """
    # Four questions: Which key signed the report? Is it AMD's? Is it still good? And what does the report say about the
    # VM?
    _check_anchors(checks)
    # parse_report knows these versions. In a later version, a field may have another offset or meaning.
    checks.hold("report version", oldest <= report.version <= 5, f"{oldest} to 5", report.version)
    checks.compare("signature algorithm", ECDSA_P384_SHA384, report.signature_algo, "1 is ECDSA P-384 with SHA-384")
    vek, product, kind = _find_vek(checks, report, certificate), report.product, report.signing_key
    known = [name for name in TCB_LAYOUTS if "ark" in checks.anchors.get(name, ())]
    if vek is not None:
        # The report names the kind of its key in signed bits; the certificate must be of the same kind.
        subject = dict(vek.subject).get("CN", "none")
        holds = subject == f"SEV-{kind}" and kind in SIGNING_KEYS.values()
        checks.hold("signing key", holds, f"SEV-{kind}", subject, "bits 4:2 of the flags, and the certificate's name")
        if report.version < 3:  # such a report has no CPUID: the issuer identifies the product
            issuers = {anchor.subject: name for name in known for anchor in checks.anchors[name].values()}
            product = issuers.get(vek.issuer, "")
    detail = "this version of confbuild cannot verify reports of Venice" if product == "Venice" else ""
    checks.hold("product", product in known, " or ".join(known) or "none: no keys", product or "unknown", detail)
    if vek is not None and checks.ok:
        _check_vek(checks, report, product, vek)
    # The name of the cloud in a VLEK is a claim like any other: the caller can require one (--csp-id).
    csp_id = None if vek is None else checks.attempt("VEK CSP_ID", vek_csp_id, vek)
    # A migration agent is another VM that may take this one's memory. Nothing here verifies it, so there must be none:
    # the policy's bit is off, or report_id_ma is all ones, since none was bound at launch.  [SNP-ABI 7.3]
    migrates = bool(report.policy & POLICY_MIGRATE_MA) and report.report_id_ma != b"\xff" * 32
    agent = report.report_id_ma.hex() if migrates else "none"
    checks.hold("migration agent", not migrates, "none", agent, "another VM that may take this VM's memory")
    # A bit that means nothing today may later mean that the guest is less protected.
    reserved = ", ".join(reserved_fields(report))
    checks.hold("reserved bits", not reserved, "zero", reserved or None, f"of a report of version {report.version}")
    # The signature does not cover these bytes. A value there would be a claim that nobody signed.
    checks.hold("unsigned bytes", not any(report.data[0x330:]), "zero", detail="of the report from 0x330 on")
    _check_revocation(checks, product, kind)
    _check_guest(checks, report, product)
    _claim_report(checks, report, product)
    checks.claims["csp_id"] = csp_id


def _check_revocation(checks: _Checks, product: str, kind: str) -> None:
    """Check that no revocation list names the ASK or ASVK, and that a list is valid now.  [VCEK, RFC5280 5]

    kind: VCEK or VLEK.
    A list that is not valid now fails only if the caller requires lists (require_crl); otherwise its period is shown.
    """
    # A list of another product is verified and shown, but it says nothing about this product. If the caller gave roots,
    # a product may lack an ARK.
    lists: list[RevocationList] = []
    own = checks.anchors.get(product, {})
    arks = {roles["ark"].subject: roles["ark"].key for roles in checks.anchors.values() if "ark" in roles}
    for name, data in checks.endorsements.crls:
        crl = checks.attempt(f"revocation list file {name}", verify_crl, data, "revocation list", arks)
        if crl is not None and own and crl.issuer == own["ark"].subject:
            lists.append(crl)
    if not lists:
        source = f"https://kdsintf.amd.com/{kind.lower()}/v1/{product}/crl" if own else "AMD's"
        why = f"no revocation list of this product's ARK was given: fetch {source} and pass it with --crl"
        checks.skip("revocation", why, failed=checks.expected.require_crl)
        return
    serial = own["asvk" if kind == "VLEK" else "ask"].serial
    # A key that any list names stays revoked, even if that list is old or another one does not name it.
    revoked = any(serial in crl.revoked for crl in lists)
    checks.hold(
        "revocation",
        not revoked,
        f"serial {serial:06x} not revoked",
        "revoked" if revoked else "not revoked",
        "of the ASK or ASVK; a list cannot name a VEK, whose serial number is always 0",
    )
    # One list that is valid now is enough. Tuples compare their first item first, so max prefers such a list.
    periods = ((crl.this_update <= checks.now <= crl.next_update, crl.this_update, crl.next_update) for crl in lists)
    current, first, last = max(periods)
    if current:
        checks.current("revocation list age", [(first, last)])
    else:
        detail = f"the list was valid from {first} to {last}: a newer one may revoke more"
        checks.skip("revocation list age", detail, checks.now, f"{first} to {last}", checks.expected.require_crl)


def _check_guest(checks: _Checks, report: Report, product: str) -> None:
    """Check VMPL and debug mode, and the expectations of the report that do more than compare a claim.

    product: decides the layout of the TCBs. A simulated report has no product; then any will do.
    """
    # Software at a higher VMPL has fewer rights in the guest, but it can ask for a report too, with data of its choice.
    # So VMPL 0 must have asked for the report, unless the caller expects another VMPL.
    checks.compare(
        "VMPL", checks.expected.vmpl or 0, report.vmpl, "of the software in the guest that asked for the report"
    )
    expected = checks.expected
    _check_debug(checks, bool(report.policy & POLICY_DEBUG))
    # The host passes the policy at launch, and could have passed a weaker one than the guest's owner wanted. If the
    # caller expects nothing, the zeros here are never compared: `expect` skips the check.
    policy, (mask, value, abi) = report.policy, expected.guest_policy or (0, 0, 0)
    words, said = bit_names(value >> 16, POLICY_NAMES), bit_names(policy >> 16, POLICY_NAMES)
    checks.expect(
        "guest_policy",
        f"{policy:#x} ({', '.join(said)}), ABI {policy >> 8 & 255}.{policy & 255}",
        f"{value:#x} ({', '.join(words)}) in the bits {mask:#x}, ABI at least {abi >> 8}.{abi & 255}",
        policy & mask == value and policy & 0xFFFF >= abi,
    )
    # A host can turn on features that help an attacker, such as SMT, so the caller names those that may be on.
    info, may = report.platform_info, expected.platform_info or 0
    shown = f"{info:#x} ({', '.join(bit_names(info, PLATFORM_NAMES))})"
    checks.expect("platform_info", shown, f"no bit outside {may:#x}", not info & ~may)
    # Bytes of a version are build, minor, major. The host can go back to the committed version at any time.
    version, least = min(report.current_version[::-1], report.committed_version[::-1]), expected.min_firmware or ()
    wanted = "at least {}, current and committed".format(".".join(map(str, least)))
    checks.expect("min_firmware", ".".join(map(str, version)), wanted, tuple(version) >= tuple(least))
    # A mitigation that is in place now may have been missing when the memory of the guest was measured.
    both, bits = report.launch_mit_vector & report.current_mit_vector, expected.min_mit_vector or 0
    checks.expect("min_mit_vector", f"{both:#x}", f"every bit of {bits:#x}, at launch and now", both & bits == bits)
    svn = expected.min_guest_svn or 0
    checks.expect("min_guest_svn", report.guest_svn, f"at least {svn}", report.guest_svn >= svn)
    if expected.min_tcb is not None and product in TCB_LAYOUTS:
        # A VM that was launched on old firmware stays suspect after an update, and the host can go back to any version
        # down to the committed one. So all four must reach the minimum.
        kinds = "reported committed current launch".split()
        tcbs = {kind: tcb_levels(product, getattr(report, f"{kind}_tcb")) for kind in kinds}
        # Levels for another product are skipped. A level that this product does not have counts as -1: never reached.
        # If levels are given but none is for this product, the check fails.
        named = [(key.rpartition(":"), level) for key, level in expected.min_tcb.items()]
        minimum = [(name, level) for (of, _, name), level in named if of in ("", product.lower()) and name != "tdx"]
        low = [kind for kind, levels in tcbs.items() if any(levels.get(name, -1) < level for name, level in minimum)]
        checks.hold(
            "minimum TCB",
            not low and bool(minimum or not expected.min_tcb),
            "at least " + tcb_text(expected.min_tcb),
            "; ".join(f"{kind} {tcb_text(tcbs[kind])}" for kind in low) or tcb_text(tcbs["reported"]),
            "the reported, committed, current and launch TCB must all reach it"
            if minimum
            else f"it names no level for {product}",
        )


def _check_tpm(checks: _Checks, evidence: Any, report_data: bytes) -> bytes | None:
    """Check that a hardware report binds the key of a virtual TPM, and that this key signed a quote.  [AZURE]

    evidence: with the decoded members `hcl_report` and `tpm_quote`.
    report_data: of the hardware report.
    Return the 64 bytes that the attester signed, or None.
    """
    tpm, runtime_data = evidence["tpm_quote"], evidence["hcl_report"].runtime_data
    # Step 1: the report binds the runtime data, which contain the key. Without this link, the quote could come from any
    # TPM, or from a program that imitates one.
    found = checks.attempt("runtime data", parse_runtime_data, runtime_data)
    digest, actual = sha256_hex(runtime_data), report_data[:32].hex()
    checks.compare("runtime data digest", digest, actual, "report_data[0:32] is the SHA-256 of the runtime data")
    # Step 2: the key signed the quote.
    quote = checks.attempt("TPM quote", parse_quote, tpm["message"])
    if found is not None:
        checks.attempt("TPM signature", verify_rsassa_pkcs1_v1_5, found[0], tpm["message"], tpm["signature"])
        checks.claims["vm_configuration"] = found[1].get("vm-configuration")
    if quote is None:
        return None
    # Step 3: the quote binds the registers and the caller's data. Only the registers that it selects are signed, so
    # only these become claims.
    pcrs = [bytes.fromhex(value) for value in tpm["pcrs"]]
    checks.compare("PCR digest", compute_pcr_digest(pcrs, quote.pcr_select).hex(), quote.pcr_digest.hex())
    quoted = {i: pcrs[i].hex() for i in quote.pcr_select}
    checks.claims["pcrs"] = {str(i): value for i, value in quoted.items()}
    checks.registers("pcrs", quoted)
    return bytes(quote.extra_data.ljust(64, b"\x00"))


def _check_chain(checks: _Checks, title: str, pem: str, length: int) -> list[Certificate]:
    """Check that certificates lead to Intel's root and are valid now.

    length: how many there must be, including the root.
    Return them, the root last, or [] if they have another form.
    """
    chain: list[Certificate] = checks.attempt(f"{title} form", parse_pem_chain, pem, length, title) or []
    if chain:
        checks.attempt(f"{title} chain", verify_chain, chain, title, checks.traced)
        # The root comes with the chain. Anybody can make a root with Intel's name, but not with Intel's key.
        root = checks.anchors.get("Intel", {}).get("root")
        expected = root.spki_sha256 if root else "none: no key of Intel"
        actual = sha256_hex(chain[-1].subject_public_key_info)
        checks.compare(f"{title} root", expected, actual, "SHA-256 of the root's public key")
        checks.current(f"{title} validity", ((c.not_before, c.not_after) for c in chain))
    return chain


def _check_document(checks: _Checks, title: str, name: str, collateral: Strings) -> tuple[Any, Sequence[Certificate]]:
    """Check a document of the collateral and its signer.

    title: begins the names of the checks.
    name: of the document in the collateral.
    Return (the document, its signer). The document is None if its signature is invalid; the signer is an empty list if
    the chain cannot be parsed.
    """
    text, signature, pem = (collateral[name + part] for part in ("", "_signature", "_issuer_chain"))
    signer = _check_chain(checks, f"{title} signer", pem, 2)[:1]
    if not signer:
        return None, signer
    # Intel's root also signs certificates for other purposes: a PCK CA must not be able to vouch for firmware.
    checks.compare(f"{title} signer", name_text(TCB_SIGNER), name_text(signer[0].subject))
    doc = checks.attempt(f"{title} signature", verify_document, name, text, signature, signer[0].key)
    if doc is not None:
        # Without this check, a TCB info from before an advisory would show an old machine as up to date for ever.
        checks.current(f"{title} validity", [(doc["issueDate"], doc["nextUpdate"])])
    return doc, signer


_OF_QE, _OF_MODULE = "MRSIGNER, attributes, miscselect, ISVPRODID", "MRSIGNERSEAM, SEAMATTRIBUTES"


def _check_quote(checks: _Checks, quote: TdQuote) -> None:
    """Check a TD's quote, from Intel's root to the TD, and the caller's expectations of it."""
    _check_anchors(checks)
    checks.compare("attestation key type", ECDSA_P256, quote.key_type, "2 is ECDSA P-256")
    # 0 would be a quote about an SGX enclave, whose body has other fields.
    checks.compare("TEE type", TDX_TEE, quote.tee_type, "129 is TDX")
    checks.compare("QE vendor", QE_VENDOR, quote.qe_vendor.hex(), "Intel's quoting enclave")
    # Link 1: Intel's root -> the machine -> the report of its quoting enclave.
    pck, chain = None, _check_chain(checks, "PCK", quote.pck_chain, 3)
    if chain:
        pck = checks.attempt("PCK extension", parse_pck, chain[0])
        checks.attempt("QE signature", verify_raw, chain[0].key, quote.qe_report, quote.qe_signature)
    # Link 2. Only this hash ties the attestation key to Intel: the quoting enclave puts it into its report.
    bound = sha256_hex(quote.attestation_key + quote.authentication_data) + "00" * 32
    checks.compare("QE binding", bound, quote.qe_report[320:].hex(), "the QE's report holds the attestation key's hash")
    # Link 3: the attestation key -> the header and the body of the quote.
    key = Point(P256, *raw_pair(quote.attestation_key))
    checks.attempt("quote signature", verify_raw, key, quote.signed, quote.signature)
    _check_td(checks, quote)
    # Collateral is about a kind of machine. Only the PCK certificate tells which kind this machine is.
    if checks.endorsements.collateral is None:
        for name in ("TCB status", "revocation"):
            checks.skip(name, "no collateral was given (--collateral)")
        # A machine's key signs reports of any enclave, and its owner can write an enclave that signs false quotes. So
        # these two checks run even without collateral.
        checks.compare("QE identity", *describe_qe(INTEL_QE, quote.qe_report), _OF_QE)
        checks.compare("TDX module identity", *describe_module(INTEL_MODULE, quote), _OF_MODULE)
    elif pck is not None:
        _check_collateral(checks, quote, chain, pck)
    if pck is not None:
        checks.claims["fmspc"] = pck.fmspc.hex()


def _check_td(checks: _Checks, quote: TdQuote) -> None:
    """Check the body of a quote.  [TDX-MODULE]"""
    attributes, xfam = (int.from_bytes(field, "little") for field in (quote.td_attributes, quote.xfam))
    # The first byte is TUD, "TD under debug": with any of its bits set, the host can observe the TD.
    detail = "bits that profile a TD, and reserved ones"
    checks.hold(
        "TD attributes", not attributes & TD_FORBIDDEN, f"none of {TD_FORBIDDEN:#x}", f"{attributes:#x}", detail
    )
    _check_debug(checks, bool(attributes & TD_DEBUG))
    # Every TD saves the state of these two: Intel has described no module that does not.
    checks.hold(
        "XFAM", xfam & XFAM_REQUIRED == XFAM_REQUIRED, f"all of {XFAM_REQUIRED:#x}", f"{xfam:#x}", "x87 and SSE"
    )
    # A service TD may take this TD's memory to another machine. A body of TD 1.0 does not tell whether one is bound.
    hidden = quote.body_type == _TD_BODIES[0][0] and attributes & TD_MIGRATABLE
    service = quote.mr_service_td.hex() if any(quote.mr_service_td) else "none"
    expected = (checks.expected.service_td or "none").lower()
    detail = "another TD that may migrate this one (--service-td)"
    checks.compare("service TD", expected, "unknown, and the TD is migratable" if hidden else service, detail)
    rtmr = [register.hex() for register in quote.rtmr]
    checks.registers("rtmrs", dict(enumerate(rtmr)))
    minimum = (checks.expected.min_tcb or {}).get("tdx")
    if minimum is not None:
        # If they were compared as one number, a high first component would make up for a low second one.
        least, svn = minimum.to_bytes(16, "big"), quote.tee_tcb_svn
        high = all(have >= need for have, need in zip(svn, least, strict=True))
        checks.hold("minimum TCB", high, f"at least {least.hex()}", svn.hex(), "each component of TEE_TCB_SVN")
    checks.claims.update(quote_version=quote.quote_version, debug=bool(attributes & TD_DEBUG))
    body = list(quote._asdict().items())[5:-7]  # from tee_tcb_svn to mr_service_td
    checks.claims.update({name: value.hex() for name, value in body if isinstance(value, bytes)}, rtmr=rtmr)


def _check_collateral(checks: _Checks, quote: TdQuote, chain: Sequence[Certificate], pck: Pck) -> None:
    """Check Intel's statements about the machine: revocation, and the status of its TCB.  [PCS]

    chain: from the machine's certificate to the root.
    pck: what the machine's certificate says.
    """
    # First the documents: who signed them, and are they valid now? Then the lists. Then what both say about this
    # machine.
    collateral = checks.attempt("collateral form", parse_collateral, checks.endorsements.collateral)
    if collateral is None:
        return
    # The chain of the PCK list is checked like the others, but its keys are not used: the key of the quote's PCK CA
    # verifies the list.
    info, info_signer = _check_document(checks, "TCB info", "tcb_info", collateral)
    identity, identity_signer = _check_document(checks, "QE identity", "qe_identity", collateral)
    _check_chain(checks, "PCK list signer", collateral["pck_crl_issuer_chain"], 2)
    # The root's list covers the certificates that the root signed, the PCK CA's list that of the machine. Both issuers
    # come from the quote's chain: a list by anybody else cannot clear this machine.
    lists, revoked = [], []
    for name, issuer, covered in (
        ("root_ca_crl", chain[2], (chain[1], *info_signer, *identity_signer)),
        ("pck_crl", chain[1], chain[:1]),
    ):
        keys = {issuer.subject: issuer.key}
        crl = checks.attempt(name, lambda: verify_crl(decode_hex(collateral[name], name), name, keys))  # noqa: B023  # called now
        if crl is not None:
            lists.append((crl.this_update, crl.next_update))
            revoked += [
                dict(c.subject).get("CN", "a certificate without a name") for c in covered if c.serial in crl.revoked
            ]
    # One list alone proves nothing: the other may name the CA, or the machine.
    if len(lists) == 2:
        checks.hold(
            "revocation", not revoked, "none revoked", ", ".join(revoked) or None, "the PCK, its CA, TCB signers"
        )
        checks.current("revocation list age", lists)
    if info is None or identity is None:
        return
    # Intel signs documents for other kinds of machines too, which could have more lenient levels.
    checks.compare("FMSPC", pck.fmspc.hex(), info["fmspc"].lower(), "the kind of machine")
    checks.compare("PCEID", pck.pce_id.hex(), info["pceId"].lower())
    # The PCK only tells which machine the enclave ran on. Intel's document tells which enclave may sign quotes there.
    checks.compare("QE identity", *describe_qe(identity, quote.qe_report), _OF_QE)
    module = checks.attempt("TDX module", module_identity, info, quote)
    if module is None:
        return
    # The module is what keeps the host out of the TD, so it must be one that Intel has signed, not in debug mode.
    checks.compare("TDX module identity", *describe_module(module, quote), _OF_MODULE)
    tcb = checks.attempt("TCB level", evaluate_tcb, info, identity, module, quote, pck)
    if tcb is not None:
        _check_tcb(checks, tcb)


def _check_tcb(checks: _Checks, tcb: TcbStatus) -> None:
    """Check the status of a TD's TCB."""
    # By default, a status passes if it is about settings or software of the machine, and fails if firmware updates are
    # missing.
    accepted = [s for s in TCB_STATUSES if s not in REFUSED_TCB or (s in checks.expected.accept_tcb and s != "Revoked")]
    # "Up to date" is relative to the given documents. So also show how old the level is, compared with the newest one.
    advisories = f" ({', '.join(tcb.advisories)})" if tcb.advisories else ""
    actual = f"{tcb.status}{advisories}, level of {tcb.date[:10]}, {tcb.days_behind} days behind the newest"
    detail = "firmware with known vulnerabilities; --accept-tcb accepts one status by name, never Revoked"
    holds = tcb.status in accepted
    checks.hold("TCB status", holds, " or ".join(accepted), actual, "" if holds else detail)
    checks.claims.update(
        tcb_status=tcb.status, advisories=tcb.advisories, tcb_date=tcb.date, tcb_days_behind=tcb.days_behind
    )


def _check_log(checks: _Checks, registers: Sequence[bytes], quote: TdQuote) -> None:
    """Check that replaying an event log gives the quote's registers."""
    # The log is not signed. It is true only if its events, in this order, give the registers that are signed.
    expected, actual = (" ".join(r.hex() for r in rows[: len(registers)]) for rows in (quote.rtmr, registers))
    checks.compare("RTMR replay", expected, actual, "the registers of the quote, and those that the event log gives")


# The checks of the platforms. Each returns the 64 bytes that the attester is said to have signed, or None if the
# evidence has none. They are proven only if all checks of the platform pass.


def _check_simulated(checks: _Checks, evidence: Any) -> bytes:
    """Check that simulated evidence does not look like a report of hardware.  [CONTRACT 4.4]"""
    report: Report = evidence["attestation_report"]
    # A reader who overlooks the platform must not find the report of a chip here.
    alike = report == parse_report(simulated_report(report.report_data, report.measurement))
    checks.hold("simulated report", alike, "nothing but version 3, report_data and measurement")
    _check_guest(checks, report, "Milan")
    _claim_report(checks, report, "")
    return report.report_data


def _check_snp(checks: _Checks, evidence: Any) -> bytes:
    """Check evidence of platforms snp and gcp-snp.  [CONTRACT 4.2, 4.5]"""
    # The ASK and ARK next to the VEK are ignored: an attacker can make a chain of his own with AMD's names. If the host
    # gives the VM no certificate, the evidence has none. Then the caller can give one (--vek).
    report: Report = evidence["attestation_report"]
    chain = evidence.get("cert_chain")
    _check_report(checks, report, chain and chain["vcek"], 3)
    return report.report_data


def _check_az_snp(checks: _Checks, evidence: Any) -> bytes | None:
    """Check evidence of platform az-snp.  [CONTRACT 4.3, 4.5]"""
    # The paravisor asks for the report when the VM starts, so the report cannot contain data that the caller chooses
    # later: the TPM signs those. Reports of version 2 still occur there.
    report = parse_report(evidence["hcl_report"].attestation_report)
    _check_report(checks, report, evidence.get("vcek"), 2)
    return _check_tpm(checks, evidence, report.report_data)


def _check_tdx(checks: _Checks, evidence: Any) -> bytes:
    """Check evidence of platforms tdx and gcp-tdx.  [CONTRACT 4.6]"""
    quote: TdQuote = evidence["quote"]
    log = evidence.get("cc_eventlog")
    _check_quote(checks, quote)
    if log is not None:
        registers = checks.attempt("event log", replay_ccel, log)
        if registers is not None:
            _check_log(checks, registers[:3], quote)  # programs extend RTMR3 without an entry in this log
    return quote.report_data


def _check_dstack(checks: _Checks, evidence: Any) -> bytes:
    """Check evidence of platform dstack.  [CONTRACT 4.6]"""
    # dstack boots one image for all apps, so the measurement does not tell which app runs. RTMR3 does, through the
    # event log. So the log is required.
    quote: TdQuote = evidence["quote"]
    _check_quote(checks, quote)
    replayed = checks.attempt("event log", replay_dstack, evidence["event_log"])
    if replayed is not None:
        registers, events = replayed
        _check_log(checks, registers, quote)
        if checks.ok:  # otherwise nothing proves the events
            # If there are several, the first counts: the others come from software that already runs.
            compose_hash = next((payload for name, payload in events if name == "compose-hash"), None)
            shown = [{"event": name, "payload": payload} for name, payload in events]
            checks.claims.update(events=shown, compose_hash=compose_hash)
            # _check_evidence compares only claims that have a value, so a missing one must fail here.
            if compose_hash is None:
                checks.expect("compose_hash", "none", checks.expected.compose_hash, False)
    return quote.report_data


def _check_az_tdx(checks: _Checks, evidence: Any) -> bytes | None:
    """Check evidence of platform az-tdx.  [CONTRACT 4.3, 4.6]"""
    _check_quote(checks, evidence["td_quote"])
    return _check_tpm(checks, evidence, evidence["td_quote"].report_data)


def _parsed(
    parse: Callable[[bytes], Any], decode: Callable[[Any, str], bytes] = decode_base64
) -> Callable[[Any, str], Any]:
    """Return a schema for text that decode turns into bytes, and parse into a record."""
    return lambda text, name: parse(decode(text, name))


def _base64url(text: Any, name: str) -> bytes:
    return decode_base64(text, name, urlsafe=True)


class Evidence(NamedTuple):
    """A kind of evidence that can be verified.

    schema: of `evidence`, for check_schema, which decodes it.
    check: adds the checks of the decoded evidence, and returns the 64 bytes that the attester signed, or None.
    required: the checks that must pass.
    """

    schema: Any
    check: Callable[[_Checks, Any], bytes | None]
    required: frozenset[str]


_TPM_QUOTE = {
    "signature": decode_hex,
    "message": decode_hex,
    "pcrs": [re.compile(rf"[0-9a-fA-F]{{{2 * PCR_SIZE}}}")] * PCR_COUNT,
}
# `ask` and `ark` belong to the format that all producers share. They may be anything, because nothing uses them.
_CHAIN = {"vcek": decode_base64, "ask?": object, "ark?": object}
_SNP = Evidence({"attestation_report": _parsed(parse_report), "cert_chain?": (_CHAIN, None)}, _check_snp, _REQUIRED_SNP)
_TDX = Evidence({"quote": _parsed(parse_td_quote), "cc_eventlog?": (decode_base64, None)}, _check_tdx, _REQUIRED_TDX)
# A schema accepts only what some producer writes: null for a certificate or log that a host did not provide, and, from
# dstack, a quote in hexadecimal digits or in base64.
PLATFORMS: Mapping[str, Evidence] = {
    "simulated": Evidence(
        {"version": 1, "notice": str, "attestation_report": _parsed(parse_report)},
        _check_simulated,
        _REQUIRED_EVIDENCE | {"simulated report"},
    ),
    "snp": _SNP,
    "gcp-snp": _SNP,
    "az-snp": Evidence(
        {
            "version": 1,
            "tpm_quote": _TPM_QUOTE,
            "hcl_report": _parsed(parse_hcl_report, _base64url),
            "vcek?": (_base64url, None),
        },
        _check_az_snp,
        _REQUIRED_SNP | _REQUIRED_TPM,
    ),
    "tdx": _TDX,
    "gcp-tdx": _TDX,
    "az-tdx": Evidence(
        {
            "version": 1,
            "tpm_quote": _TPM_QUOTE,
            "hcl_report": _parsed(lambda data: parse_hcl_report(data, HCL_TDX), _base64url),
            "td_quote": _parsed(parse_td_quote, _base64url),
        },
        _check_az_tdx,
        _REQUIRED_TDX | _REQUIRED_TPM,
    ),
    "dstack": Evidence(
        {
            "quote": (_parsed(parse_td_quote, decode_hex), _parsed(parse_td_quote)),
            "event_log": str,
            "vm_config?": object,
        },
        _check_dstack,
        _REQUIRED_TDX | {"event log", "RTMR replay"},
    ),
}


def _check_evidence(checks: _Checks, data: bytes) -> tuple[str, bytes | None]:
    """Check evidence.json, and return (platform, the 64 bytes that the attester signed or None)."""
    doc = checks.attempt("evidence form", parse_json, data, "evidence")
    if not checks.ok:
        return "unknown", None
    # The platform decides which checks run and which are required. It is not signed, and need not be: whichever it
    # names, the checks of that platform must pass.
    claimed = doc.get("platform") if isinstance(doc, dict) else None
    row, platform = PLATFORMS.get(str(claimed)), claimed if isinstance(claimed, str) else "unknown"
    problem = "the document has no `evidence`" if row else "unknown kind of evidence"
    known = row is not None and "evidence" in doc
    checks.hold("platform", known, ", ".join(PLATFORMS), str(claimed)[:80], "" if known else problem)
    if row is None or not known:
        return platform, None
    evidence = checks.attempt("report form", check_schema, doc["evidence"], row.schema, f"{platform} evidence")
    if evidence is None:
        return platform, None
    signed = row.check(checks, evidence)
    if signed is not None:
        checks.claims.update(signed_data=signed.hex(), nonce=signed[32:48].hex())
    # Now compare each claim for which the caller expects a value. This is done here for all platforms, so that none can
    # forget it.
    for field, check, _, _ in EXPECTED:
        actual, value = checks.claims.get(check), getattr(checks.expected, field)
        if actual is not None:  # one of the expected values must be the claim; upper and lower case are equal
            wanted = [str(v) for v in (value if isinstance(value, list | tuple) else [value])]
            checks.expect(field, actual, " or ".join(wanted), str(actual).lower() in [v.lower() for v in wanted])
    return platform, signed


def _check_provenance(checks: _Checks, data: bytes | None) -> Any:
    """Check the form of provenance.json, and return the Statement in it, or None."""
    if data is None:
        hint = "--evidence-only verifies evidence without it"
        checks.hold("provenance form", False, "provenance.json", "missing", hint)
        return None
    # A deeper document could grow to gigabytes in its canonical form, which is indented.
    doc = checks.attempt("provenance form", parse_json, data, "provenance", 16)
    if not checks.ok:
        return None
    # A document has only one form. Otherwise the same content could have two digests, and a file could contain
    # something that two parsers read differently, such as a number with 40 digits.
    canonical = sha256_hex(to_canonical(doc))
    checks.compare("canonical form", canonical, sha256_hex(data), "json.dumps(doc, indent=2, ensure_ascii=False)")
    return checks.attempt("provenance schema", check_statement, doc)


def _check_statement(checks: _Checks, doc: Any) -> None:
    """Check a Statement of the right schema against the caller's expectations."""
    definition, run = doc["predicate"]["buildDefinition"], doc["predicate"]["runDetails"]
    source, finished = definition["externalParameters"]["source"], run["metadata"]["finishedOn"]
    uris = [d["uri"] for d in definition["resolvedDependencies"]]
    # The builder computed this root over the source, the lock file, the tools and the dependencies. If it differs from
    # the root of what the Statement lists, the builder used other inputs.
    checks.compare("input Merkle root", merkle_root(merkle_entries(doc)), byproduct(doc, "input_merkle_root") or "none")
    # The fields of Expectations that name one value of the Statement. Their texts must be equal.
    said = {
        "source_uri": source["uri"],
        "source_commit": source["digest"]["gitCommit"],
        "source_tree": source["digest"]["gitTree"],
        "lockfile_sha256": definition["internalParameters"]["lockfileHash"]["sha256"],
        "builder_id": run["builder"]["id"],
        "build_type": definition["buildType"],
        "build_log_sha256": byproduct(doc, "build_log") or "none",
        "dependencies": "\n".join(uris),
    }
    for field, actual in said.items():
        value = getattr(checks.expected, field)
        wanted = value if isinstance(value, str | None) else "\n".join(value)
        checks.expect(field, actual, wanted, wanted == actual)
    # The list says what the build fetched, not what ended up in the artifacts. The caller names a package of the
    # default registry by NAME@VERSION, and any package by its uri.
    packages = checks.expected.packages or ()
    missing = sorted(set(packages) - {package_of(uri) or uri for uri in uris} - set(uris))
    found = ", ".join(f"{name!r} is missing" for name in missing) or f"{len(uris)} dependencies"
    checks.expect("packages", found, ", ".join(packages), not missing)
    # The builder's own clock says when the build finished, so this proves no more than the builder's word. Only a nonce
    # proves freshness.
    oldest, newest = checks.expected.finished or ("", "")
    recent = finished is not None and oldest <= finished[:19] + "Z" <= newest  # times of one form sort as text
    checks.expect("finished", finished or "none", f"finished from {oldest} to {newest}", recent)
    checks.claims.update(builder_id=said["builder_id"], build_type=said["build_type"])
    checks.claims.update(source=source, finished_on=finished)
    for word in ("none", "open"):  # the byproduct is the SHA-256 of a word  [CONTRACT 3.7]
        if byproduct(doc, "guest_network") == sha256_hex(word.encode("ascii")):
            checks.claims["guest_network"] = word


def _check_binding(checks: _Checks, signed: bytes | None, provenance: bytes | None, doc: Any) -> None:
    """Check that the attester signed this provenance, and that the nonce proves something.  [CONTRACT 4.1]

    signed: the 64 bytes that the attester signed, or None.
    doc: the Statement in provenance, or None.
    """
    # The nonce itself is compared like any other claim, in _check_evidence. Evidence that was made without a nonce has
    # zeros there, so a nonce of zeros would fit evidence of any age.
    nonce = checks.expected.nonce
    if nonce is not None:
        zero = nonce == bytes(NONCE_SIZE).hex()
        checks.hold("nonce is not zero", not zero, "not all zero", nonce, "an all-zero nonce does not prove freshness")
    if signed is None or provenance is None:
        return
    # This is the only link between the hardware and the build. It extends what the evidence proves to provenance.json,
    # and through its subjects to the artifacts.
    digest, actual, detail = sha256_hex(provenance), signed[:32].hex(), "signed[0:32] is the SHA-256 of provenance.json"
    holds = digest == actual
    compact = json.dumps(doc, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    if not holds and doc is not None and actual == sha256_hex(compact):
        holds, detail = checks.expected.allow_legacy_digest, _LEGACY_DIGEST
    checks.hold("provenance digest", holds, digest, actual, detail)
    # The rest is reserved. A value there could have a meaning that this verifier does not know.
    checks.compare("report data tail", bytes(16).hex(), signed[48:].hex(), "signed[48:64] is zero")


def _check_artifacts(checks: _Checks, doc: Any, artifacts: Strings) -> None:
    """Check that artifacts/ holds every subject and nothing else.

    artifacts: as in BundleFiles.
    """
    # Two subjects of one name, or a name that is a path, could make two readers look at different files.
    subjects = [(subject["name"], subject["digest"]["sha256"]) for subject in doc["subject"]]
    listed = Counter(name for name, _ in subjects)
    odd = [name for name in listed if listed[name] > 1 or not PLAIN_NAME.fullmatch(name)]
    shown = f"odd: {odd[:5]}" if odd else len(subjects)
    checks.hold("subjects", bool(subjects) and not odd, "at least one, unique, plain file names", shown)
    for name, digest in subjects:
        checks.compare(f"artifact {name[:255]}", digest, artifacts.get(name, "missing"))
    # Each artifact has a check of its own, so that the reader sees which one differs. But their names come from the
    # builder, so the required check is this one.
    wrong = [name for name, digest in subjects if artifacts.get(name) != digest]
    shown = f"missing or different: {', '.join(wrong[:5])}" if wrong else f"{len(subjects)} equal"
    checks.hold("artifacts", bool(subjects) and not wrong, "every subject exists and is equal", shown)
    # People would believe that a file was built, just because it lies in artifacts/.
    extra = sorted(artifacts.keys() - listed)
    checks.hold("unlisted files", not extra, "none", ", ".join(extra[:5]) or None, "that the provenance does not name")


def _check_builder(checks: _Checks, platform: str, doc: Any) -> None:
    """Check that provenance and evidence claim the same kind of builder.  [CONTRACT 3.3]"""
    # A builder that claims hardware needs evidence of that hardware, and the other way round.
    builder_id, of_no_vm = doc["predicate"]["runDetails"]["builder"]["id"], (SIMULATED_BUILDER, QEMU_BUILDER)
    if platform == "simulated":
        expected = " or ".join(of_no_vm)
        checks.hold("builder", builder_id in of_no_vm, expected, builder_id, "no hardware signed the evidence")
        return
    # Only evidence of TDX has the claim quote_version.
    ours, other = (TDX_BUILDER, SNP_BUILDER)[:: 1 if "quote_version" in checks.claims else -1]
    refused = (*of_no_vm, other)
    # A builder of somebody else may have any id: nothing here proves it. But none of our own ids may occur with another
    # kind of evidence.
    detail = "this builder has no such confidential VM"
    checks.hold("builder", builder_id not in refused, f"any but {' or '.join(refused)}", builder_id, detail)
    # The provenance may also name the measurement of the VM. Our builders always write this byproduct. For others it is
    # optional, but it must be right if present.
    claimed = byproduct(doc, "measurement")
    if claimed is not None or builder_id == ours:
        digest = sha256_hex(bytes.fromhex(checks.claims["measurement"]))
        checks.compare("measurement byproduct", digest, claimed or "none", "the SHA-256 of the report's measurement")


def _check_image(checks: _Checks, platform: str, image: ImageFacts) -> None:
    """Check that the image is intact and that the VM was launched from it.  [CONTRACT 5.6]"""
    # The caller has hashed the files of the image and computed these digests from them. If a file differs from
    # image.json, the digests are not those of the image that was published.
    checks.hold("image parts", not image.parts, "as image.json says", image.parts or None)
    checks.hold("image firmware", not image.firmware, "admits no shim", image.firmware or None)
    measurement = checks.claims["measurement"]
    if measurement is None:
        return
    hardware = platform != "simulated"
    why = "" if hardware else "simulated evidence: no hardware measured this VM"
    # The launch digest covers firmware, kernel, initrd and command line. HOST_DATA ties the VM to image.json, which
    # names the other parts of the image. The digest depends on the CPU model and the number of vCPUs, so an image has
    # several.
    digests = [f"{digest} ({label})" for label, digest in image.launch_digests.items()]
    actual = next((digest for digest in digests if digest[:96] == measurement), measurement)
    expected = " or ".join(digests) or "none: image.json lists no launch digest"
    checks.hold("image measurement", hardware and actual in digests, expected, actual, why)
    host_data = checks.claims.get("host_data", "none")
    holds = hardware and host_data == image.manifest_sha256
    why = why or "HOST_DATA is the SHA-256 of image.json"
    checks.hold("image host_data", holds, image.manifest_sha256, host_data, why)


def _conclude(checks: _Checks, platform: str) -> Verdict:
    """Show the checks that did not run, and return the verdict."""
    expected = checks.expected
    # An empty value is a request too: no evidence can fulfil measurements=[].
    requested = {
        check for field, check, _, _ in EXPECTED if getattr(expected, field) != Expectations._field_defaults[field]
    }
    of_platform = PLATFORMS[platform].required if platform in PLATFORMS else _REQUIRED_EVIDENCE
    of_bundle = frozenset() if expected.evidence_only else REQUIRED_OF_BUNDLE
    required = of_platform | of_bundle | requested
    # The plan: every check that a verdict shows, with the reason to show if the check has not run.
    given = checks.endorsements  # those of AMD are not used for evidence of Intel, nor the other way round
    unused = [f"revocation list file {name}" for name, _ in given.crls] + ["VEK form"] * (given.vek is not None)
    unused += ["collateral form"] * (given.collateral is not None)
    plan = {check: _UNASKED for _, check, _, _ in EXPECTED}
    plan |= dict.fromkeys(unused, _UNUSED) | dict.fromkeys(sorted(required), _BLOCKED)
    if expected.evidence_only:
        plan |= dict.fromkeys(sorted(OF_PROVENANCE), ALONE)
    made = {check.name for check in checks.made} | {"hardware evidence"}  # the verdict says whether it is of hardware
    for name, why in plan.items():
        if name not in made:
            checks.skip(name, why)
    # The verdict is a set inclusion. "No check failed" is not enough, because a check that never ran did not fail.
    passed, failed = ({check.name for check in checks.made if check.status == s} for s in ("passed", "failed"))
    # This line is what PASSED means: every name in `required` is also in `passed`.
    missing = required - passed
    if missing and not failed:
        checks.hold("required checks", False, "every required check ran", f"not checked: {', '.join(sorted(missing))}")
    # Two checks can have one name, such as those of two list files. If one of them failed, the name is in both sets.
    good = "simulated" if platform == "simulated" else "passed"
    return Verdict("failed" if missing or failed else good, platform, checks.claims, checks.made)


def verify_bundle(
    bundle: BundleFiles,
    expected: Expectations,
    now: datetime,
    endorsements: Endorsements = Endorsements(),
) -> Verdict:
    """Return the verdict over bundle, with every check, its expected value and its actual value.

    bundle: untrusted.
    expected: what the caller requires, in addition to what every bundle must fulfil.
    now: an aware datetime. Certificates must be valid at this time.
    endorsements: a VEK, revocation lists or trust anchors from the caller.

    Checks are required by the platform of the evidence, by a bundle (unless expected.evidence_only is true), and by
    each field that the caller sets in expected. The verdict is
        "passed"     if every required check passed, no check failed, and a processor signed the evidence
        "simulated"  if every required check passed and no check failed, but the evidence is simulated
        "failed"     in every other case

    Raises TypeError unless now is an aware datetime. No content of bundle or endorsements raises.  [CONTRACT 4.1, 5.5]
    """
    if not isinstance(now, datetime) or now.utcoffset() is None:
        raise TypeError(f"now is {now!r}, expected an aware datetime, such as datetime.now(UTC)")
    anchors = pinned_anchors() if endorsements.anchors is None else endorsements.anchors
    checks = _Checks(expected, utc_time(now.timestamp()), endorsements, anchors, [], {}, set())
    others = list(bundle.others)
    # With evidence alone, the verdict names the other files, so that nobody believes that they were verified.
    if expected.evidence_only:
        others += ["provenance.json"] * (bundle.provenance is not None)
        others += [f"artifacts/{name}" for name in bundle.artifacts]
        bundle = bundle._replace(provenance=None)

    # 1. Who signed the evidence, and what does it say? The result is the 64 bytes that the VM had signed. It may be
    # there even if the check of the signature failed, but then the verdict is "failed".
    platform, signed = _check_evidence(checks, bundle.evidence)
    claims = checks.claims
    if not claims:  # nothing could be read; these claims are always present
        claims.update(dict.fromkeys(("report_data", "measurement", "nonce", "chip_id")))
    # 2. Is provenance.json a Statement, and did the attester sign its digest? Then software in that VM vouches for it.
    doc = None if expected.evidence_only else _check_provenance(checks, bundle.provenance)
    if bundle.provenance is not None:
        claims["provenance_sha256"] = sha256_hex(bundle.provenance)
    _check_binding(checks, signed, bundle.provenance, doc)
    # 3. Does the Statement say what the caller expects, about these artifacts and this evidence?
    if doc is not None:
        _check_statement(checks, doc)
        _check_artifacts(checks, doc, bundle.artifacts)
        # No measurement means that the evidence could not be read. Then the required check "builder" does not run, so
        # the verdict is "failed".
        if claims["measurement"] is not None:
            _check_builder(checks, platform, doc)
    # 4. Does the evidence come from hardware, and from the caller's image? Only the image, or a measurement that the
    # caller gives, tells which software wrote the provenance.
    if expected.require_tee:
        hardware = platform in PLATFORMS and platform != "simulated"
        checks.hold("hardware evidence", hardware, "signed by hardware", platform, "--require-tee")
    if expected.igvm is not None and claims["measurement"] is not None:
        checks.compare("igvm measurement", expected.igvm.lower(), claims["measurement"])
    if expected.disk is not None:
        checks.hold("disk", not expected.disk, "the root hash of the measured command line", expected.disk or None)
    if expected.image is not None:
        _check_image(checks, platform, expected.image)
    # 5. Which other files lie next to evidence alone?
    if others:
        more = f" and {len(others) - 10} more" if len(others) > 10 else ""
        checks.skip("other files", "not covered: this is evidence alone", ", ".join(sorted(others)[:10]) + more)
    return _conclude(checks, platform)


# endregion 17
# ---- End of the verifier.
# ==============================================================================
# region 18. Processes                                            [uses nothing]
# ==============================================================================
# Finds, starts and kills processes, and splits their output into lines.  Programs that the source can influence are
# untrusted: only a Launcher starts them.  Whatever they start stays reachable: this process is a child subreaper
# (prctl(2)), so orphans, even those in sessions of their own, become its children and are found in /proc.

_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36  # linux/prctl.h


def logger() -> "logging.Logger":
    """Return the one logger. Build output, secrets and request bodies are never logged."""
    return logging.getLogger("confbuild")


@contextmanager
def survive(what: str) -> Iterator[None]:
    """Log any exception of the block and continue. For threads that must not die, and for clean-up.

    what: the consequence, for the log."""
    try:
        yield
    except Exception:  # noqa: BLE001  # whatever it is, the thread must go on
        logger().exception("%s", what)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def system_call(name: str, *arguments: Any, label: str = "") -> int:
    """Call a function of the C library and return its result. Raise OSError if it is negative.

    label: names the call in errors, if not name."""
    result = int(getattr(_libc(), name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{label or name}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(kind: str, target: str, flags: int, options: str, source: str = "none") -> None:
    """Mount a file system of type kind on target, which is made if it is absent. Raises OSError.

    flags, options, source: as for mount(2); the options are its data."""
    os.makedirs(target, exist_ok=True)
    arguments = os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    system_call("mount", *arguments, label=f"mount {target}")


def guard_process() -> None:
    """Become a child subreaper, and hide memory and environment from other processes of this user, except root."""
    with suppress(AttributeError):
        _libc().malloc_trim(0)  # return about 10 MB that compiling this file left behind
    system_call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    system_call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def read_processes(name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (process, contents of the file called name in its folder of /proc).

    Processes that end meanwhile are left out."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{entry}/{name}", "rb") as f:
            yield int(entry), f.read()


def descendants(root: int, dead: bool = False, without: "frozenset[int] | set[int]" = frozenset()) -> list[int]:
    """Return the processes below the process root, parents first.

    dead: include zombies.
    without: leave out these processes and everything below them."""
    children: dict[int, list[int]] = {}
    for pid, line in read_processes("stat"):
        fields = line.rpartition(b")")[2].split()  # the name before it may contain anything
        # A process whose first thread has ended is a zombie with more than one thread (num_threads).
        # [proc_pid_stat(5)]
        if dead or fields[0] not in (b"Z", b"X") or int(fields[17]) > 1:
            children.setdefault(int(fields[1]), []).append(pid)
    found = [root]
    for pid in found:
        found += [child for child in children.get(pid, []) if child not in without]
    return found[1:]


def kill_all(find: Callable[[], list[int]]) -> None:
    """Kill the processes that find returns until it returns none, for at most two seconds.

    find is called repeatedly because processes may fork meanwhile."""
    deadline = monotonic() + 2
    for pids in iter(find, []):
        if monotonic() > deadline:
            return
        for pid in pids:
            with suppress(OSError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


class Launcher:
    """Starts untrusted programs and kills them: here as plain children of this process."""

    def start(self, argv: Sequence[str], **options: Any) -> Any:
        """Start argv with the options of subprocess.Popen, and return a Popen or an object with the same methods."""
        return subprocess.Popen(argv, **options)

    def kill(self, child: Any) -> None:
        """Kill a child, and what is left of its process group."""
        with suppress(OSError):  # no process of the group is left
            os.killpg(child.pid, signal.SIGKILL)

    def kill_rest(self) -> None:
        """Kill everything that untrusted programs left behind."""
        kill_all(lambda: descendants(os.getpid()))

    def hand_over(self, paths: Sequence[str]) -> None:
        """Let untrusted programs own the files below paths; here they run as the same user."""

    def share(self, paths: Sequence[str]) -> None:
        """Let untrusted programs write below paths, which need not exist; here they may anyway."""

    def close_network(self) -> bool:
        """Take the network from programs that start later, and return whether that is possible; here it is not."""
        return False


_launchers = [Launcher()]  # the last one starts the untrusted programs of this process


def use_launcher(launcher: Launcher) -> None:
    """Start the untrusted programs of this process with launcher from now on."""
    _launchers.append(launcher)


# A line of more than SIZE bytes, up to where it is cut, or else a line. The cut is not before a continuation octet,
# unless this is not UTF-8 anyway: a character has at most four octets. A CR at the end of the data is not part of the
# line yet, since an LF may follow.
_CUT = rb"""(?x)
    ( (?= [^\n]{SIZE} (?!\r?\Z) [^\n] )
      (?: [^\n]{LEAST,SIZE} (?![\x80-\xbf]) | [^\n]{SIZE} ) )
    | [^\n]*\n?"""


class LineSplitter:
    """Incremental splitter of output into lines. [CONTRACT 1.10]

    LF, CRLF and a lone CR end a line; UTF-8 is decoded with replacement characters. A lone CR stays in its line, since
    a terminal would write the next line over it.
    A line of more than MAX_LINE bytes continues in the next one; the cut is between characters."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Take the next bytes and return the lines that they end."""
        data = self._rest + data
        if b"\r" in data:
            held = data[-1:] if data.endswith(b"\r") else b""  # an LF may follow
            data = data[: len(data) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\r\n") + held
        window = MAX_LINE // 2  # a line of more than MAX_LINE contains one of these
        windows = range(0, len(data) - window, window) if len(data) > MAX_LINE else ()
        if any(data.find(b"\n", at, at + window) < 0 for at in windows):
            form = _CUT.replace(b"SIZE", b"%d" % MAX_LINE).replace(b"LEAST", b"%d" % (MAX_LINE - 3))
            data = re.sub(form, lambda line: line[0] + b"\n" * bool(line[1]), data)
        complete, end, self._rest = data.rpartition(b"\n")
        return complete.decode("utf-8", "replace").split("\n") if end else []

    def end(self) -> list[str]:
        """Return the last line if it is unterminated."""
        rest, self._rest = self._rest, b""
        return self.feed(rest.removesuffix(b"\r") + b"\n") if rest else []


# endregion 18
# ==============================================================================
# region 19. Sandbox                                                   [uses 18]
# ==============================================================================
# Restricts the untrusted programs of a build in a simulated VM, which run as the user of the service ("both": Landlock
# and seccomp):
#
# files     Landlock   programs read the system and the toolchain, and write in the workspace; truncate(2) needs ABI 3
# ports     both       the port of the service is closed; seccomp refuses MPTCP, SMC and TCP Fast Open: they bypass it
# signals   both       only the build's own processes are reached; seccomp refuses prlimit(2): RLIMIT_CPU sends a signal
# sockets   both       no Unix sockets, as Docker and systemd obey clients: Landlock for abstract ones, seccomp for all
# rights    prctl      no_new_privs; of root's capabilities only those for its own files stay (capset)
# kernel    seccomp    no system calls that no build needs and that have let programs out
# limits    setrlimit  size of a file, number of processes, no core dumps
#
# So that a build can be repeated, the agent also enters namespaces in which its workspace is always WORK and the
# hostname is fixed, if the kernel lets it; they protect nothing.
#
# All but the limits apply to one thread, and its children inherit them.  So a thread of the agent restricts itself and
# starts the programs: nothing runs between fork and exec, and the agent stays unrestricted.
# [LINUX] Documentation/userspace-api/landlock.rst, seccomp_filter.rst
#
# Thread "sandbox": started by the first program of a build, starts all of them, ends with the process.

MAX_BUILD_FILE = 8 * GIB  # the size of one file; the agent's own files, log and result of a job, have 4 GiB
MAX_BUILD_PROCESSES = 4096  # threads, in addition to those that the user already has
SYSTEM_FOLDERS = (
    *"/usr /lib /lib32 /lib64 /bin /sbin /opt /etc /proc /sys /nix/store /gnu/store /var/lib/ca-certificates".split(),
    *"/etc/resolv.conf /etc/localtime /etc/ssl/certs".split(),  # links on some systems
)
_OPEN_DEVICES = tuple(f"/dev/{name}" for name in "null zero full random urandom tty".split())
# Next to the bin folder of nvm, Homebrew, pyenv and asdf.
_NEXT_TO_BIN = "lib lib64 libexec include share Cellar versions version plugins installs".split()
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, with these numbers on every architecture
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
# linux/landlock.h, LANDLOCK_ACCESS_FS_*: execute 0, write_file 1, read_file 2, read_dir 3, make_char 6,
# make_block 11, truncate 14, ioctl_dev 15.
_READ = 0b1101
_USE_DEVICE = 0b1100_0000_0000_0110
_OF_FILES = 0b1100_0000_0000_0111  # the rights that also apply to files
_NOT_IN_WORKSPACE = 0b1000_1000_0100_0000
# linux/capability.h: CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, KILL 5, SETGID 6, SETUID 7.
_KEPT_CAPABILITIES = 0b11111011
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000  # linux/sched.h
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MS_BIND, _MS_MOVE, _MS_REC, _MS_UNBINDABLE, _MS_SLAVE = 0x1000, 0x2000, 0x4000, 0x20000, 0x80000  # sys/mount.h
# fmt: off
_SECCOMP_NAMES = ("arch", "prlimit64", "socket", "socketpair", "sendto", "sendmsg", "sendmmsg")
_SECCOMP_NUMBERS = {  # linux/audit.h; arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
    "x86_64": (0xC000003E, 302, 41, 53, 44, 46, 307),
    "aarch64": (0xC00000B7, 261, 198, 199, 206, 211, 269),
}
# Interfaces whose bugs have let programs out, or that bypass Landlock: modify_ldt (x86 only), add_key, request_key,
# keyctl, perf_event_open, fanotify_init, open_by_handle_at, bpf, userfaultfd, io_uring_setup, io_uring_enter,
# io_uring_register.
_FORBIDDEN_CALLS = {
    "x86_64": (154, 248, 249, 250, 298, 300, 304, 321, 323, 425, 426, 427),
    "aarch64": (217, 218, 219, 241, 262, 265, 280, 282, 425, 426, 427),
}
# Calls to refuse by one argument: call, number of the argument, comparison, value, error.
_EQUAL, _ANY_BIT = 0x15, 0x45  # BPF_JMP | BPF_JEQ and BPF_JSET [linux/bpf_common.h]
_UNIX_SOCKETS = (
    ("socket", 0, _EQUAL, 1, errno.EACCES),  # AF_UNIX
    ("socketpair", 1, _ANY_BIT, 2, errno.EACCES),  # SOCK_DGRAM, SOCK_RAW: can send to other sockets
)
_IP_SOCKETS = tuple(("socket", 0, _EQUAL, family, errno.EACCES) for family in (2, 10, 40))  # IPv4, IPv6, VMs
_BYPASSES = (
    ("prlimit64", 0, _ANY_BIT, 0xFFFFFFFF, errno.EPERM),  # of another process
    ("socket", 0, _EQUAL, 43, errno.EAFNOSUPPORT),  # AF_SMC
    ("socket", 2, _EQUAL, 262, errno.EPROTONOSUPPORT),  # IPPROTO_MPTCP
    ("sendto", 3, _ANY_BIT, 0x20000000, errno.EOPNOTSUPP),  # MSG_FASTOPEN
    ("sendmsg", 2, _ANY_BIT, 0x20000000, errno.EOPNOTSUPP),
    ("sendmmsg", 3, _ANY_BIT, 0x20000000, errno.EOPNOTSUPP),
)
# fmt: on


class Sandbox(NamedTuple):
    """Restrictions of a build's programs.

    abi: the version of Landlock to use, or 0.
    filtered: use seccomp.
    readable: paths that may be read, except below hidden.
    hidden: beginnings of paths that may not be read.
    ports: the file descriptor of a Landlock ruleset for ports, or -1.
    file_bytes: size limit of a file.
    processes: number of threads in addition to the user's present ones."""

    abi: int = 0
    filtered: bool = False
    readable: Sequence[str] = ()
    hidden: Sequence[str] = ()
    ports: int = -1
    file_bytes: int = MAX_BUILD_FILE
    processes: int = MAX_BUILD_PROCESSES


def _create_ruleset(files: int, ports: int, scoped: int) -> int:
    """Create a ruleset that handles these rights, and return its file descriptor. Raises OSError."""
    # An older kernel accepts this longer structure if the fields that it does not know are zero.
    attributes = struct.pack("=QQQ", files, ports, scoped)
    return system_call("syscall", _CREATE_RULESET, attributes, len(attributes), 0, label="landlock_create_ruleset")


def _add_path(ruleset: int, path: str, rights: int) -> None:
    """Allow rights on path and everything below it, if it exists. Raises OSError."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rights &= -1 if stat.S_ISDIR(os.fstat(fd).st_mode) else _OF_FILES
        rule = struct.pack("=Qi", rights, fd)
        system_call("syscall", _ADD_RULE, ruleset, 1, rule, 0, label=f"landlock_add_rule {path}")
    finally:
        os.close(fd)


def close_port(closed: int) -> int:
    """Create a ruleset that keeps programs from connecting to one TCP port, or listening on it, on every address.

    closed: the port.
    Return the descriptor of the ruleset. It takes 0.1 s: rules can only allow, so every other port gets a rule.
    Raises OSError."""
    ruleset, rule = _create_ruleset(1 << 13, 0b11, 0), (ctypes.c_uint64 * 2)(0b11)
    _add_path(ruleset, "/", 1 << 13)  # every layer refuses moves between folders unless it allows them (refer 13)
    # PyDLL keeps the interpreter's lock: these 65,535 calls never wait.
    call = ctypes.PyDLL(None, use_errno=True).syscall
    for port in range(0x10000):
        rule[1] = port
        if port != closed and call(_ADD_RULE, ruleset, 2, rule, 0) < 0:
            raise OSError(ctypes.get_errno(), "landlock_add_rule")
    return ruleset


def _visible(path: str, hidden: Sequence[str]) -> Iterator[str]:
    """Yield path, or if hidden paths lie below it, the largest parts of it without them."""
    if any((path + "/").startswith(one) for one in hidden):
        return
    inside = path.rstrip("/") + "/"
    below = [one for one in hidden if one.startswith(inside)]
    if not below:
        yield path
    elif isdir(path):
        for name in os.listdir(path):
            if not islink(inside + name):  # a rule would apply to its target, which has a path of its own
                yield from _visible(inside + name, below)


def _private(folder: str) -> Iterator[str]:
    """Yield the paths below folder that only some users may read."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        mode = entry.stat(follow_symlinks=False).st_mode
        if not mode & stat.S_IROTH:
            yield entry.path + "/"
        elif stat.S_ISDIR(mode):
            yield from _private(entry.path)


def readable_paths(env: Strings, home: str) -> list[str]:
    """Return the paths that a build with the environment env must be able to read.

    These are the system, the folders of PATH and their neighbours, and every other path in a variable, such as
    RUSTUP_HOME.
    home: never returned, nor a folder above it."""
    folders = [folder for folder in env.get("PATH", "").split(os.pathsep) if folder.startswith("/")]
    found, home = [*(value for value in env.values() if value.startswith("/")), *folders], realpath(home)
    for parent, name in map(os.path.split, map(realpath, folders)):
        if name in ("bin", "sbin", "shims") and parent != home:
            found += [join(parent, neighbour) for neighbour in _NEXT_TO_BIN]
    toolchains = join(env.get("RUSTUP_HOME", "/nonexistent"), "toolchains")
    if isdir(toolchains):
        found += [entry.path for entry in os.scandir(toolchains) if entry.is_symlink()]  # `rustup toolchain link`
    # ~/.local/share holds the data of everything that this user runs.
    real = dict.fromkeys(realpath(path) for path in found if not path.endswith("/.local/share"))
    return [
        *SYSTEM_FOLDERS,
        *(path for path in real if exists(path) and commonpath((home, path)) != path),
    ]


def seccomp_filter(machine: str, unix: bool, network: bool = True) -> bytes:
    """Return a seccomp program that refuses the calls of the tables above, or b"" for an unknown machine.

    machine: as uname(2) names it.
    unix, network: leave sockets of Unix and of the Internet usable.
    Calls of other architectures have other numbers, so all of them are refused.
    [LINUX] include/uapi/linux/{seccomp,bpf_common}.h"""
    # A 32-bit program has other numbers.
    if machine not in _SECCOMP_NUMBERS or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return b""
    numbers = dict(zip(_SECCOMP_NAMES, _SECCOMP_NUMBERS[machine], strict=True))
    load, at_least, give = 0x20, 0x35, 0x06

    def refuse(code: int) -> tuple[int, int, int, int]:
        return give, 0, 0, 0x00050000 | code  # SECCOMP_RET_ERRNO

    # An instruction: code, how many to skip if true, if false, operand. In struct seccomp_data: nr 0, arch 4, args 16.
    program = [(load, 0, 0, 4), (_EQUAL, 1, 0, numbers["arch"]), refuse(errno.ENOSYS), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), refuse(errno.ENOSYS)]  # x32
    for forbidden in _FORBIDDEN_CALLS[machine]:
        program += [(_EQUAL, 0, 1, forbidden), refuse(errno.ENOSYS)]  # like a kernel built without the call
    sockets = [row for row, usable in ((_UNIX_SOCKETS, unix), (_IP_SOCKETS, network)) if not usable]
    for name, argument, comparison, value, code in itertools.chain(_BYPASSES, *sockets):
        program += [(_EQUAL, 0, 3, numbers[name]), (load, 0, 0, 16 + 8 * argument), (comparison, 0, 1, value)]
        program += [refuse(code), (load, 0, 0, 0)]
    program.append((give, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def apply_filter(unix: bool, network: bool = True) -> None:
    """Apply seccomp_filter to this thread and its children. Raises OSError."""
    program = seccomp_filter(os.uname().machine, unix, network)
    if not program:
        raise OSError(errno.ENOSYS, f"the system calls of {os.uname().machine} are unknown to confbuild")
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    system_call("prctl", _PR_SET_SECCOMP, 2, header, 0, 0, label="seccomp")


def _drop_capabilities() -> None:
    """Reduce root's capabilities in this thread and its children to those for its own files. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(0x20080522)  # _LINUX_CAPABILITY_VERSION_3
    data = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable for capabilities 0 to 31, then for the rest
    system_call("capget", header, data)
    before, data[:] = data[:], [*(word & _KEPT_CAPABILITIES for word in data[:3]), 0, 0, 0]
    if before != data[:]:  # systemd's filter forbids the call to a service, which has none anyway
        system_call("capset", header, data)


class Confinement(Launcher):
    """Starts the programs of a build in a sandbox.

    workspace: of the build.
    folders: the names of the folders in it that the build may write in."""

    def __init__(self, sandbox: Sandbox, workspace: str, folders: Sequence[str]) -> None:
        self.sandbox = sandbox
        self.writable = [join(workspace, folder) for folder in folders]
        self.devices = list(_OPEN_DEVICES)
        self.unix = False

    @functools.cached_property
    def _thread(self) -> "concurrent.futures.ThreadPoolExecutor":
        """The thread in the sandbox. Raises BuildFailed VmError if it cannot enter it."""
        thread = concurrent.futures.ThreadPoolExecutor(1, "sandbox")
        try:
            thread.submit(self.restrict).result()
        except OSError as e:
            raise BuildFailed("VmError", f"the sandbox cannot be entered: {e.strerror}") from None
        return thread

    def start(self, argv: Sequence[str], **options: Any) -> Any:
        """Start argv in the sandbox. Raises OSError like Popen, and BuildFailed VmError without a sandbox."""
        return self._thread.submit(lambda: subprocess.Popen(argv, **options)).result()

    def share(self, paths: Sequence[str]) -> None:
        """Let the build write below paths: where nix keeps its store and its state. Create them if they are missing.

        If nix's daemon runs, the build may use Unix sockets: the daemon builds as other users, in its own sandbox.
        Otherwise nix itself builds, and needs terminals."""
        if not paths:
            return
        for path in paths:
            with suppress(OSError):  # nix reports it if it matters
                os.makedirs(path, exist_ok=True)
        self.writable += paths
        self.unix = any(exists(join(path, "daemon-socket/socket")) for path in paths)
        self.devices += [] if self.unix else ["/dev/ptmx", "/dev/pts"]

    def close_network(self) -> bool:
        """Take sockets of the Internet, even to this machine, from programs that start later, if seccomp works."""
        if self.sandbox.filtered:
            self._thread.submit(apply_filter, self.unix, False).result()
        return self.sandbox.filtered

    def restrict(self) -> None:
        """Put this thread, and everything that it starts, into the sandbox. Raises OSError."""
        rulesets = [self._files_ruleset()] if self.sandbox.abi else []
        if self.sandbox.ports >= 0:
            _add_path(self.sandbox.ports, "/", 1 << 13)  # as close_port, for a root of our own (show_workspace)
            rulesets.append(self.sandbox.ports)  # this large one last: each layer copies those before it
        system_call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, label="no_new_privs")
        _drop_capabilities()
        for ruleset in rulesets:
            system_call("syscall", _RESTRICT_SELF, ruleset, 0, label="landlock_restrict_self")
            os.close(ruleset)
        if self.sandbox.filtered:
            apply_filter(self.unix)

    def _files_ruleset(self) -> int:
        """Create the ruleset for files and, with ABI 6, for signals and abstract sockets. Raises OSError."""
        abi = self.sandbox.abi
        handled = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1  # refer, truncate and ioctl_dev came later
        ruleset = _create_ruleset(handled, 0, 0b11 if abi >= 6 else 0)
        hidden = [*self.sandbox.hidden, *_private("/etc")]
        rules = [(path, _READ) for given in self.sandbox.readable for path in _visible(realpath(given), hidden)]
        rules += [(path, ~_NOT_IN_WORKSPACE) for path in self.writable] + [(path, _USE_DEVICE) for path in self.devices]
        for path, rights in rules:
            _add_path(ruleset, path, rights & handled)
        return ruleset


def confine_builds(sandbox: Sandbox, workspace: str, folders: Sequence[str]) -> None:
    """Start the untrusted programs of this process in sandbox from now on, and limit this process as well.

    For the agent of a simulated VM. workspace, folders: as in Confinement."""
    use_launcher(Confinement(sandbox, workspace, folders))
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, sandbox.file_bytes),
        (resource.RLIMIT_NPROC, _count_threads() + sandbox.processes),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _count_threads() -> int:
    """Return the number of this user's threads, which is what RLIMIT_NPROC limits."""
    pattern = re.compile(rb"\nUid:\t%d\t.*\nThreads:\t(\d+)\n" % os.getuid(), re.DOTALL)
    matches = (pattern.search(text) for _, text in read_processes("status"))
    return sum(int(match[1]) for match in matches if match)


def show_workspace(workspace: str, needed: Iterable[str]) -> str:
    """Show workspace at WORK to this process and its children, with a fixed hostname, and return the path to use.

    If this user gets no such namespaces, or one of the needed paths lies below WORK, nothing changes, and the result is
    workspace itself. If one lies in /dev/shm, that folder stays.
    The caller must have only one thread, and be dumpable: otherwise it may not write its own uid_map.
    """
    paths = [f"{path}/" for given in needed for path in (given, realpath(given))]
    if any(path.startswith(f"{WORK}/") for path in paths):
        return workspace
    own_memory = not any(path.startswith("/dev/shm/") for path in paths)
    trial = os.fork()  # half a change could not be undone
    if trial == 0:
        try:
            _enter_namespaces(workspace, own_memory)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(trial, 0)[1]:
        return workspace
    _enter_namespaces(workspace, own_memory)
    return WORK


def _enter_namespaces(workspace: str, own_memory: bool) -> None:
    """Get a root of our own: the folders and links of the present one, except WORK.

    own_memory: replace /dev/shm, where sem_open(3) and shm_open(3) make files, too.
    Raises OSError.
    [mount_namespaces(7), user_namespaces(7)]
    """
    user, group, root = os.geteuid(), os.getegid(), join(workspace, "tmp")
    # System V's shared memory would outlive its processes.
    system_call("unshare", _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | (_CLONE_NEWUSER if user else 0))
    for name, text in (("uid_map", f"{user} {user} 1"), ("setgroups", "deny"), ("gid_map", f"{group} {group} 1")):
        if user:  # root has the right to mount
            with open(f"/proc/self/{name}", "w", encoding="ascii") as f:
                f.write(text)
    socket.sethostname("localhost")
    mount("", "/", _MS_SLAVE | _MS_REC, "")  # a VM that waits sees what is mounted and unmounted meanwhile
    mount("tmpfs", root, 0, "mode=0755,size=64k")
    mount("", root, _MS_UNBINDABLE, "")  # or it would also appear inside itself
    for entry in os.scandir("/"):
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), root + entry.path)
        elif entry.is_dir() and entry.path != WORK:
            mount("", root + entry.path, _MS_BIND | _MS_REC, "", entry.path)
    mount("", root + WORK, _MS_BIND, "", workspace)
    if own_memory and isdir(f"{root}/dev/shm"):
        mount("", f"{root}/dev/shm", _MS_BIND, "", f"{root}{WORK}/tmp")
    os.chdir(root)
    mount("", "/", _MS_MOVE, "", ".")
    os.chroot(".")
    os.chdir(WORK)


def _trial(sandbox: Sandbox) -> str:
    """Return why a thread cannot enter sandbox, or "" if a trial thread could."""
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            for _ in range(2):  # a build takes two of Landlock's 16 layers
                thread.submit(Confinement(sandbox, "", ()).restrict).result()
        return ""
    except OSError as e:
        return str(e.strerror)


def probe_sandbox() -> tuple[Sandbox, str, str]:
    """Return (usable sandbox, why Landlock cannot be used or "", why seccomp cannot be used or "")."""
    abi = 0
    try:
        abi = system_call("syscall", _CREATE_RULESET, None, 0, 1, label="landlock_create_ruleset")
        landlock = _trial(Sandbox(abi))
    except OSError as e:
        landlock = f"this kernel has no Landlock ({e.strerror})"
    seccomp = _trial(Sandbox(filtered=True))
    return Sandbox(0 if landlock else abi, not seccomp), landlock, seccomp


def judge_protections(abi: int, landlock: str, seccomp: str, taken: str) -> dict[str, str]:
    """Return each protection of the host from builds in simulated VMs, with "" or the reason why it is not in effect.

    abi: of Landlock.
    landlock, seccomp: why they cannot be used, or "".
    taken: why the port of the service cannot be closed, or ""."""

    needed = {  # the version of Landlock and of Linux, and what else is missing
        "files": (3, "6.2", ""),
        "sockets": (6, "6.12", seccomp),
        "signals": (6, "6.12", seccomp),
        "ports": (4, "6.7", seccomp or taken),
    }
    old = f"Landlock has ABI {abi} here, and ABI %d (Linux %s) is required"
    found = {name: landlock or old % row[:2] * (abi < row[0]) or row[2] for name, row in needed.items()}
    return {**found, "limits": ""}


def protection_text(protections: Strings) -> str:
    """Return one line that lists which protections are in effect and which are not."""
    parts = []
    for label, lost in (("host protected", False), ("not protected", True)):
        names = [name for name, why in protections.items() if bool(why) == lost]
        parts += [f"{label}: {', '.join(names)}"] if names else []
    return "; ".join(parts)


# endregion 19
# ==============================================================================
# region 20. Programs                                                  [uses 18]
# ==============================================================================
# Runs programs to their end: capture for a program whose answer is needed whole, run_tool for a build tool whose lines
# are passed on as they come.  Both bound what they hold, and neither waits for processes that a program leaves behind.

Emit = Callable[[str, Sequence[str]], None]  # (phase, its messages)
PIPE_GRACE_S = 5.0  # how long processes that a tool left behind may keep its pipe open


def _run_to_end(
    launcher: Launcher,
    argv: Sequence[str],
    cwd: str,
    env: Strings,
    take: Callable[[int, bytes], None],
    merged: bool = False,
    watch: Callable[[], None] = lambda: None,
) -> int:
    """Run argv and return its exit status, which is negative if a signal ended it.

    take: called with (0, block of stdout) or (1, block of stderr) until both are closed. If other processes still hold
        one of them PIPE_GRACE_S after the end of the program, the last block is empty.
    merged: stderr goes where stdout goes.
    watch: called a few times per second.
    If take or watch raises, the program is killed."""
    child = launcher.start(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        start_new_session=True,
    )
    ended_at, watched_at = float("inf"), 0.0
    with selectors.DefaultSelector() as selector, ExitStack() as pipes:
        for index, pipe in enumerate(filter(None, (child.stdout, child.stderr))):
            selector.register(pipes.enter_context(pipe), selectors.EVENT_READ, index)
            with suppress(OSError, AttributeError):  # beyond the limit of the user, or not Linux
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, MIB)  # fewer, larger reads
        try:
            while selector.get_map():
                for key, _ in selector.select(0.25):
                    block = os.read(key.fd, BLOCK)
                    if block:
                        take(key.data, block)
                    else:
                        selector.unregister(key.fileobj)
                now = monotonic()
                if now - watched_at > 0.25:
                    watch()
                    watched_at = now
                if child.poll() is not None:
                    ended_at = min(ended_at, now)
                if selector.get_map() and now - ended_at > PIPE_GRACE_S:
                    take(0, b"")
                    break
            child.wait()
        finally:
            launcher.kill(child)
            child.wait()
    return int(child.returncode)


def capture(
    argv: Sequence[str],
    cwd: str,
    env: Strings,
    max_bytes: int = 64 * MIB,
    untrusted: bool = False,
    watch: Callable[[], None] = lambda: None,
    what: str = "",
) -> tuple[int, bytes, str]:
    """Run argv and return (exit status, stdout, the last 4 KiB of stderr).

    The exit status is negative if a signal ended the program.
    max_bytes: of stdout and stderr together.
    untrusted: the source can influence the program.
    watch: called a few times per second; if it raises, the program is killed.
    what: names the program in errors; its path by default.
    Raises OSError if it cannot be started, BuildFailed LimitError if it prints more than max_bytes."""
    texts, size = [bytearray(), bytearray()], 0

    def take(index: int, block: bytes) -> None:
        nonlocal size
        texts[index] += block
        del texts[1][:-4096]
        size += len(block)
        if size > max_bytes:
            raise limit_error(f"{what or argv[0]} printed more than {max_bytes} bytes")

    status = _run_to_end(_launchers[-1 if untrusted else 0], argv, cwd, env, take, watch=watch)
    return status, bytes(texts[0]), texts[1].decode("utf-8", "replace").strip()


def run_tool(
    argv: Sequence[str],
    cwd: str,
    env: Strings,
    lines_out: Callable[[list[str]], None],
    keep_stdout: bool,
) -> tuple[int, bytes]:
    """Run a build tool, pass its lines to lines_out as they come, and return (exit status, stdout if requested).

    keep_stdout: return the first 64 MiB of stdout, and pass its lines on at the end. Otherwise stdout and stderr are
        one stream.
    PIPE_GRACE_S after the tool has ended, processes that still hold its pipe are killed, and a line says so.
    If lines_out raises, the tool is killed."""
    splitter, kept, launcher = LineSplitter(), bytearray(), _launchers[-1]
    held = (
        f"confbuild: killed processes that {basename(argv[0])} left behind: "
        f"they held its output open for {PIPE_GRACE_S:.0f} s after its end"
    )

    def take(index: int, block: bytes) -> None:
        if keep_stdout and block and index == 0:
            kept.extend(block[: 64 * MIB - len(kept)])
        else:
            lines_out(splitter.feed(block) if block else [*splitter.end(), held])

    try:
        status = _run_to_end(launcher, argv, cwd, env, take, merged=not keep_stdout)
    finally:
        launcher.kill_rest()
    lines_out([*splitter.end(), *splitter.feed(bytes(kept)), *splitter.end()])
    return status, bytes(kept)


# endregion 20
# ==============================================================================
# region 21. Files                                                [uses nothing]
# ==============================================================================
# Reads, writes and removes files so that a crash loses nothing that was promised, a full disk is reported as such, and
# nothing that a build left behind can block or mislead the caller.  Free to all later sections; no threads.

TMPDIR, STATE = "the server's TMPDIR", "the server's state"  # the disks that errors name
STALE_S = 600.0  # much more than a VM needs until it has files in its folder


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_limited(path: str, limit: int) -> bytes:
    """Return the contents of a file. Raises OSError, and UsageError if it has more than limit bytes."""
    with open(path, "rb") as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise UsageError(f"{path}: more than {limit} bytes")
    return data


def write_file(path: str, data: bytes) -> None:
    """Replace the contents of path with data. Make its folder if it is missing."""
    os.makedirs(dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)


def write_durably(path: str, data: bytes) -> None:
    """Replace the contents of path with data, durably: a crash leaves either the old contents or the new."""
    with open(path + ".tmp", "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
    sync(dirname(path))


# O_BINARY is the only one of these that Windows has.
_OPEN_FLAGS = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Open the regular file at path without waiting, and return its descriptor.

    flags: as for open(2).
    Raises Malformed if path is a link, a pipe or the like, and OSError."""
    try:
        fd = os.open(path, flags | _OPEN_FLAGS, 0o600)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    except OSError as e:
        if e.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket or pipe, a directory
            raise
    raise Malformed(basename(path), "not a regular file")


def read_regular(path: str, limit: int) -> bytes:
    """Return the first bytes of the regular file at path, at most limit. Raises as open_regular does."""
    with open(open_regular(path), "rb", buffering=0) as f:
        return f.read(limit)


def is_full(error: OSError) -> bool:
    """Return whether a write failed because the disk, or the user's share of it, is full or read-only."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def room_on(disk: str) -> Iterator[None]:
    """Raise BuildFailed LimitError if the block finds the disk full.

    disk: TMPDIR or STATE."""
    try:
        yield
    except OSError as e:
        if is_full(e):
            raise limit_error(f"the disk of {disk} is full: {e.strerror}") from None
        raise


def has_room(folder: str) -> bool:
    """Return whether a file of 1 MiB and some more names fit into folder.

    If not, a full disk may be why something failed there."""
    try:
        disk = os.statvfs(folder)
        if disk.f_files and disk.f_favail < 16:  # 0 of 0: a file system without that limit
            return False
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(bytes(MIB))
    except OSError as e:
        return not is_full(e)
    return True


def lacks_room(error: Exception, folder: str) -> bool:
    """Return whether a full disk caused error.

    folder: its disk is examined if error comes from a program that failed there, and not from the system."""
    return is_full(error) if isinstance(error, OSError) else not has_room(folder)


def sync(path: str) -> None:
    """Make a file's contents, or the names in a directory, survive a crash of the machine."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(path: str) -> None:
    """Delete path recursively at any depth, even if a build removed its own permissions. Links are not followed.

    Folders are moved up inside path before they are emptied, so that no path becomes too long. Nothing outside is
    touched."""
    if isdir(path) and not islink(path):
        path = abspath(path)  # like the result of mkdtemp, since Python 3.12
        os.chmod(path, 0o700)
        with suppress(RecursionError):
            shutil.rmtree(path, ignore_errors=True)  # also makes room on a full disk for the heap
    elif lexists(path):
        os.unlink(path)
    if not lexists(path):
        return
    heap = tempfile.mkdtemp(dir=path)
    folders, moved = [path], 0
    while folders:
        folder = folders.pop()
        for entry in list(os.scandir(folder)):
            if entry.path == heap:
                continue
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                moved += 1
                folders.append(join(heap, str(moved)))
                os.rename(entry.path, folders[-1])
            else:
                os.unlink(entry.path)
        if folder != path:
            os.rmdir(folder)
    os.rmdir(heap)
    os.rmdir(path)


def make_workspace() -> str:
    """Make the folder of a VM in TMPDIR, and return its path.

    It is the first free one, so that builds that do not overlap have the same path.
    """
    for number in itertools.count():
        path = join(realpath(tempfile.gettempdir()), f"{WORKSPACE}{number}")
        with suppress(OSError):
            if time.time() - os.stat(path).st_mtime > STALE_S:
                os.rmdir(path)  # only if it is empty: a server was killed before it started the VM
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
            break
    return path


def remove_workspace(path: str) -> None:
    """Remove the folder of a VM, if it exists.

    Its name is free at once: what another VM then makes there stays.
    """
    with suppress(FileNotFoundError):
        moved = f"{path}-{secrets.token_hex(8)}"
        os.rename(path, moved)
        remove_tree(moved)


def walk_files(root: str, folder: str = "") -> list[str]:
    """Return the paths of everything below root but folders, relative to root, without a top-level `.git`.

    folder: the folder of root to begin in.
    A folder that cannot be read stands for what is in it.
    Raises BuildFailed LimitError if folders are nested deeper than MAX_DEPTH."""
    found = []
    try:
        entries = list(os.scandir(join(root, folder)))
    except PermissionError:
        return [folder]
    for entry in entries:
        name = join(folder, entry.name)
        if folder.count(os.sep) >= MAX_DEPTH:
            raise limit_error(f"{folder[:80]!r} lies deeper than {MAX_DEPTH} folders")
        if name != ".git":
            found += walk_files(root, name) if entry.is_dir(follow_symlinks=False) else [name]
    return found


# endregion 21
# ==============================================================================
# region 22. This file                                            [uses nothing]
# ==============================================================================
# Finds this file's own bytes, which every guest and every provenance contains, and runs the file again: as the agent of
# a VM and other helpers, always isolated from whatever surrounds it.  Free to all later sections; no threads.


@functools.cache
def own_source() -> bytes:
    """Return the bytes of this file, even if it is inside a zipapp."""
    if isfile(__file__):
        with open(__file__, "rb") as f:
            return f.read()
    return bytes(__loader__.get_data(__file__))  # type: ignore[name-defined]


# Run the file named after it.
_RUN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


# Run the compiled code in the file descriptor that is named first, of the file that is named second.
_RUN_CODE = (
    "import marshal, os.path, sys; [_, CODE, __file__, *_] = sys.argv; del sys.argv[:2]\n"
    "__file__ = os.path.abspath(__file__)  # agents run elsewhere\n"
    "with open(int(CODE), 'rb') as f: code = marshal.loads(f.read())\n"
    "exec(code)"
)


def own_program() -> list[str]:
    """Return the arguments that run this file again.

    It is isolated from the environment, the current directory and site-packages."""
    path = abspath(__file__)
    while not isfile(path) and path != "/":  # inside a zipapp; or removed
        path = dirname(path)
    return [sys.executable, "-I", "-S", "-c", _RUN, path]


def reexec_without_ast() -> None:
    """Replace this process with one that runs this file's compiled code, if it was started as `python FILE ...`.

    Python would keep the syntax tree of FILE, 10 MB, as long as the process lives."""
    options = len(sys.orig_argv) - len(sys.argv)
    before, script = sys.orig_argv[:options], sys.orig_argv[options : options + 1]
    if __name__ == "__main__" and script == sys.argv[:1] and "-c" not in before:
        frame: Any = sys._getframe()
        while frame.f_code.co_name != "<module>":  # its code is that of this file
            frame = frame.f_back
        code = os.memfd_create("confbuild", 0)  # without MFD_CLOEXEC
        with open(code, "wb", closefd=False) as f:
            f.write(marshal.dumps(frame.f_code))
        os.lseek(code, 0, os.SEEK_SET)
        # -P: with -c, Python would look for modules in the current directory.
        os.execv(sys.executable, [*before, "-P", "-c", _RUN_CODE, str(code), *sys.argv])


# endregion 22
# ==============================================================================
# region 23. Archives                                             [uses nothing]
# ==============================================================================
# Unpacks ZIP files and tarballs, which are hostile, and packs sources.  An archive that two readers would understand
# differently is refused, so that the bytes that were looked at are the bytes that are built.  TreeWriter also unpacks
# Debian packages for Part V.  Memory does not depend on the archive.  [POSIX.1-2017 pax], tar(5), [APPNOTE.TXT]; no
# threads.

IGNORED = frozenset(("__MACOSX", ".DS_Store"))


def is_archive(head: bytes) -> bool:
    """Return whether head begins a ZIP file, also an empty one, or a gzip stream with deflate. [RFC1952 2.3.1]"""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08"))


def safe_name(name: str) -> str:
    """Reduce name to a folder name of the characters [A-Za-z0-9._-] that is not empty, `.` or `..`. [CONTRACT 1.11]

    It does not begin with "-", so that it can be pasted into a command.
    """
    reduced = re.sub(r"[^A-Za-z0-9._-]|^-", "_", name)[:100]
    return reduced if reduced.strip(".") else "build"


def leads_out(root: str, name: str) -> bool:
    """Return whether the symbolic link name, relative to root, is absolute or leads out of root."""
    path, root = join(root, name), realpath(root)
    return isabs(os.readlink(path)) or commonpath((root, realpath(path))) != root


class _Member(NamedTuple):
    """One entry of an archive. kind: "file", "directory", "symlink" or "hardlink"."""

    name: str
    kind: str
    executable: bool
    target: str
    contents: Iterable[bytes]


class TreeWriter:
    """Writer of archive members below an empty directory. It never writes through a link: finish makes them.

    root: the directory.
    max_bytes: limit of all contents; a hard link counts as a copy.
    label: names the archive in errors.
    is_source: names must mean the same on every file system, and links must stay below root. False for a root file
    system.
    Every method raises BuildFailed SourceError or LimitError."""

    def __init__(self, root: str, max_bytes: int, label: str = "the archive", is_source: bool = True) -> None:
        self.kinds: dict[str, str] = {}  # name -> "file", "directory" or "symlink"
        self._root = root
        self._max_bytes = max_bytes
        self._bytes = 0
        self._label = label
        self._is_source = is_source
        self._folded: dict[str, str] = {}  # folded name -> name
        self._links: dict[str, str] = {}
        # Not again for each file of a folder.
        self._make_folder = functools.lru_cache(64)(functools.partial(os.makedirs, exist_ok=True))

    def add(self, member: _Member) -> None:
        """Write one member."""
        parts = self._parts(member.name)
        if not parts or self._is_source and IGNORED & set(parts):
            return
        *above, name = itertools.accumulate(parts, "{}/{}".format)
        kind, path = member.kind, join(self._root, name)
        if kind == "hardlink":
            kind, target = "file", "/".join(self._parts(member.target))
            if self.kinds.get(target) != "file":
                raise source_error(f"{name!r} is a link to {member.target!r}, which is not an earlier file")
        for folder in above:
            if self.kinds.get(folder) != "directory":
                self._claim(folder, "directory")
        self._claim(name, kind)
        self._make_folder(path if kind == "directory" else dirname(path))
        if member.kind == "hardlink":
            try:
                os.link(join(self._root, target), path)
            except OSError as e:  # file systems limit the links to a file
                raise limit_error(f"{name[:80]!r} cannot be a link to {target[:80]!r}: {e.strerror}") from None
            self._count(getsize(path))  # whatever hashes or packs the tree reads it again
        elif kind == "file":
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)  # half the time of open, which counts here
            try:
                os.fchmod(fd, 0o755 if member.executable else 0o644)
                for block in member.contents:  # count what really comes, not what a header announces
                    self._count(len(block))
                    while block:
                        block = block[os.write(fd, block) :]
            finally:
                os.close(fd)
        elif kind == "symlink":
            self._links[name] = member.target

    def finish(self) -> None:
        """Make the symbolic links."""
        for name, target in self._links.items():
            try:
                os.symlink(target, join(self._root, name))
            except (OSError, ValueError) as e:
                raise source_error(f"{name!r} cannot be a link to {target[:80]!r}: {e}") from None
        for name, target in self._links.items() if self._is_source else ():
            try:
                if leads_out(self._root, name):
                    raise source_error(f"{name!r} is a link to {target[:80]!r}, outside the archive")
                os.stat(join(self._root, name))
            except (OSError, RecursionError) as e:  # a dangling link is harmless
                if isinstance(e, RecursionError) or e.errno == errno.ELOOP:
                    raise source_error(f"{name!r} is a link through too many links") from None

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._max_bytes:
            raise limit_error(f"{self._label} unpacks to more than {self._max_bytes} bytes")

    def _parts(self, name: str) -> list[str]:
        """Return the components of name, which must be a relative path."""
        shown = repr(name[:80])
        parts = [part for part in name.rstrip("/").split("/") if part != "."]
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts or "" in parts and name.strip("./"):
            raise source_error(f"{shown} is not a plain relative path")
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name) or self._is_source and "\\" in name:
            raise source_error(f"{shown} has a control character or a backslash, or is not UTF-8")
        if len(parts) > MAX_DEPTH:
            raise limit_error(f"{shown} lies deeper than {MAX_DEPTH} folders")
        size = len(name.encode("utf-8"))
        if size > 2048 or size > 255 and any(len(part.encode("utf-8")) > 255 for part in parts):
            raise limit_error(f"{shown} is longer than 2048 bytes, or has a component of more than 255 bytes")
        return [part for part in parts if part]

    def _claim(self, name: str, kind: str) -> None:
        """Record the kind of a name. Only a directory may occur again."""
        # Some file systems ignore case and the form of accents.
        folded = unicodedata.normalize("NFC", name).casefold() if self._is_source else name
        known = self._folded.setdefault(folded, name)
        if known != name:
            kind = "in case" if known.casefold() == name.casefold() else "in the form of accents"
            raise source_error(f"{name[:80]!a} and {known[:80]!a} differ only {kind}")
        if len(self._folded) > MAX_MEMBERS:
            raise limit_error(f"{self._label} has more than {MAX_MEMBERS} members, counting the folders around them")
        if self.kinds.get(name, "directory") != "directory" or self.kinds.setdefault(name, kind) != kind:
            raise source_error(f"{name[:80]!r} occurs twice, as {self.kinds[name]} and as {kind}")


def unpack_archive(path: str, root: str, max_bytes: int = MAX_UNPACKED, max_ratio: int = MAX_RATIO) -> None:
    """Unpack the ZIP file or gzip tarball at path into the empty directory root.

    max_bytes: limit of the unpacked contents.
    max_ratio: limit of their size relative to the archive's, above 64 MiB.
    Raises BuildFailed SourceError or LimitError; root is then incomplete."""
    tree = TreeWriter(root, min(max_bytes, max(64 * MIB, max_ratio * getsize(path))))
    try:
        with open(path, "rb") as f:
            zipped = f.read(2) == b"PK"
            f.seek(0)
            # GzipFile.read is Python, and a header has 512 bytes.
            stream = f if zipped else io.BufferedReader(gzip.GzipFile(fileobj=f), MIB)
            members = _zip_members(f) if zipped else tar_members(stream, max_bytes)
            for count, member in enumerate(members, 1):
                if count > MAX_MEMBERS:
                    raise limit_error(f"the archive has more than {MAX_MEMBERS} members")
                tree.add(member)
    except BuildFailed:
        raise
    except Exception as e:  # zipfile, gzip and zlib raise a dozen kinds of errors for hostile bytes
        # An OSError with a number is the system's, except EINVAL: zipfile seeks to where the archive says.
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise
        raise source_error(f"the archive is damaged: {type(e).__name__}: {str(e)[:200]}") from None
    tree.finish()


def _zip_members(f: IO[bytes]) -> Iterator[_Member]:
    """Yield the members of a ZIP file. [APPNOTE.TXT 4.3.16]"""
    f.seek(max(0, os.fstat(f.fileno()).st_size - 65557))  # the end record is at most that far from the end
    tail = f.read()
    end = tail.rfind(b"PK\5\6")
    # zipfile would hold a directory of any size. ZIP64, which could announce a large one, is not needed below 4 GiB.
    zip64 = tail[max(0, end - 20) : end].startswith(b"PK\6\7")
    if zip64 or int.from_bytes(tail[end + 12 : end + 16], "little") > 8 * MIB:
        raise limit_error("the archive's directory has more than 8 MiB")
    with zipfile.ZipFile(f) as archive:
        for info in archive.infolist():
            shown = repr(info.filename[:80])
            if info.flag_bits & 1:
                raise source_error(f"{shown} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
                raise source_error(f"{shown} is compressed with another method than deflate")
            mode = info.external_attr >> 16 if info.create_system == 3 else 0  # 3: made on Unix
            kinds = {0: "", stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "symlink"}
            unix_kind = kinds.get(stat.S_IFMT(mode))
            if unix_kind is None:
                raise source_error(f"{shown} is a device or a pipe")
            kind = "directory" if info.is_dir() else unix_kind or "file"
            # Some readers believe the slash, some the mode, and some the attribute of MS-DOS.
            wrong = info.file_size if info.is_dir() else kind == "directory" or info.external_attr & 0x10
            if wrong or unix_kind not in ("", kind):
                raise source_error(f"{shown} is a file with a directory's name, or a directory with a file's name")
            with archive.open(info) as contents:
                target = contents.read(4097).decode("utf-8") if kind == "symlink" else ""
                blocks = iter(functools.partial(contents.read, BLOCK), b"")
                # orig_filename: zipfile ends the other at a NUL.
                yield _Member(info.orig_filename, kind, bool(mode & 0o100), target, blocks)


MAX_EXTENDED = 64 * MIB  # all headers that extend another one; 1 KB of an archive can hold 1 MiB of them
# Mode, uid, gid, size, mtime and checksum; with a magic, also the numbers of a device.
_TAR_NUMBERS = {False: "100x 8s 8s 8s 12s 12s 8s 356x", True: "100x 8s 8s 8s 12s 12s 8s 173x 8s 8s 167x"}
# Name, mode, uid, gid, size, mtime, checksum, type, target of a link, magic, version.
_USTAR = "100s 8s 8s 8s 12s 12s 8s 1s 100s 6s 2s 247x"
_TAR_KINDS = {b"0": "file", b"\0": "file", b"1": "hardlink", b"2": "symlink", b"5": "directory"}
_TAR_EXTENSIONS = {b"x": b"", b"g": b"", b"L": b"path", b"K": b"linkpath"}  # type -> the field that GNU's types extend
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,6}) ([^=\n\0]{1,255})=")
# Records of a global header that no reader needs: git's commit; `tar --pax-option=mtime=0`; star's archtype.
_HARMLESS_PAX = b"comment mtime atime ctime uid gid uname gname SCHILY.archtype".split()
# Names, kinds, sizes and holes that only some readers believe.
_DISPUTED_PAX = tuple(b"GNU.sparse. GNU.dumpdir GNU.volume. SCHILY.realsize SCHILY.filetype SUN.holesdata".split())


def _take(read: Callable[[int], bytes], size: int, label: str = "the archive") -> Iterator[bytes]:
    """Yield the next size bytes in blocks. read: returns at most so many bytes. label: names the data in errors."""
    while size:
        block = read(min(size, BLOCK))
        if not block:
            raise source_error(f"{label} is cut off")
        size -= len(block)
        yield block


def read_blocks(path: str, size: int) -> Iterator[bytes]:
    """Yield the first size bytes of a file in blocks. Raises BuildFailed SourceError if it has fewer, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # half the time of open, which counts for 60,000 small files
    try:
        yield from _take(functools.partial(os.read, fd), size, repr(path))
    finally:
        os.close(fd)


def tar_members(stream: Any, limit: int) -> Iterator[_Member]:
    """Yield the members of the tarball in stream, in one pass: ustar, pax and GNU's long names. [POSIX.1-2017 pax]

    limit: of all contents, also of those that nobody reads.
    It holds only one header and its extensions.
    Raises BuildFailed for anything that two readers understand differently."""
    spare, total, header = MAX_EXTENDED, 0, b""
    # Of the next member: its path, linkpath and size, and the types of the headers that contained them.
    extended: dict[bytes, bytes] = {}
    for header in iter(lambda: stream.read(512), b""):
        if not header.strip(b"\0"):
            break
        kind, (size, mode) = header[156:157], _read_tar_numbers(header)
        contents = _take(stream.read, size)
        if kind in _TAR_EXTENSIONS:
            spare -= 512 + size
            if size > MIB or spare < 0:
                raise limit_error(
                    f"the archive has more than {MIB} bytes in one extended header, "
                    f"or more than {MAX_EXTENDED} bytes of extended headers"
                )
            if kind in extended or b"x" in extended or extended and kind in b"xg":
                raise source_error("the archive has two headers for one member, and readers disagree which one counts")
            body = b"".join(contents)
            if kind in b"LK" and not re.fullmatch(rb"[^\0]+\0", body):  # GNU tar reads up to the first NUL
                raise source_error("the archive has a damaged long name")
            found = _read_pax(body, kind == b"g") if kind in b"xg" else {_TAR_EXTENSIONS[kind]: body[:-1]}
            extended |= {kind: b"", **found} if kind != b"g" else {}
        else:
            total += max(size, int(extended.get(b"size", size)))
            if total > limit:
                raise limit_error(f"the archive unpacks to more than {limit} bytes")
            yield _read_tar_member(header, size, mode, extended, contents)
            extended = {}
        deque(itertools.chain(contents, _take(stream.read, -size % 512)), 0)  # skip what nobody has read
    if not header or extended:
        raise source_error("the archive ends within a member" if extended else "the archive is empty")
    after = 0
    for block in iter(lambda: stream.read(BLOCK), b""):  # up to gzip's checksum, which comes after tar's end
        after += len(block)
        if block.strip(b"\0"):  # another reader would go on
            raise source_error("the archive goes on after its end")
        if after > 16 * MIB:
            raise limit_error("the archive goes on for more than 16 MiB after its last member")


@functools.lru_cache(4096)
def _tar_number(field: bytes) -> int:
    """Return a number of a header: octal, or positive in base-256. Raise BuildFailed SourceError for all others.

    Readers disagree about those: Python's int accepts `1_0`, GNU tar `-7`."""
    match = re.fullmatch(rb" *([0-7]+)[ \0]*|\0*|\x80(.+)", field, re.DOTALL)
    if not match:
        raise source_error(
            "the archive is not a tarball, or has a number that is neither octal nor positive in base-256"
        )
    return int.from_bytes(match[2], "big") if match[2] else int(match[1] or b"0", 8)


def _read_tar_numbers(header: bytes) -> tuple[int, int]:
    """Return (size, mode) of a header. Raise BuildFailed unless all its numbers and its checksum are valid."""
    fields = struct.unpack(_TAR_NUMBERS[header[257:262] == b"ustar"], header if len(header) == 512 else b"-" * 512)
    mode, _, _, size, _, checksum, *_ = map(_tar_number, fields)
    if checksum != sum(header[:148] + b" " * 8 + header[156:]):
        raise source_error("the archive is damaged: a header has a wrong checksum")
    return size, mode


def _read_pax(data: bytes, is_global: bool) -> dict[bytes, bytes]:
    """Return the path, linkpath and size in the records `length name=value` of a pax header. [POSIX.1-2017 pax]

    is_global: of a global header, which may contain only records that no reader needs."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        record = _PAX_RECORD.match(data, at)
        end = at + int(record[1]) if record else 0
        if not record or end <= record.end() or data[end - 1 : end] != b"\n":
            raise source_error("the archive has a damaged pax header")
        name, value, at = record[2], data[record.end() : end - 1], end
        needed = name in (b"path", b"linkpath", b"size")
        if (
            is_global
            and name not in _HARMLESS_PAX
            or name.startswith(_DISPUTED_PAX)
            or needed
            and (name in found or not value)
            or (name == b"size" and not re.fullmatch(rb"[0-9]{1,20}", value))
        ):
            raise source_error(
                f"pax header {name[:40].decode('ascii', 'replace')!r}: archive readers understand it differently"
            )
        found |= {name: value} if needed else {}
    return found


def _read_tar_member(
    header: bytes, size: int, mode: int, extended: Mapping[bytes, bytes], contents: Iterator[bytes]
) -> _Member:
    """Return the member of a header and its extensions."""
    fields = struct.unpack("100s57x100s88x155s12x", header)
    name, target, prefix = (field.partition(b"\0")[0] for field in fields)
    # GNU's format has other fields there, and star's format has more fields after it.
    if prefix and (header[257:263] != b"ustar\0" or header[500:].strip(b"\0")):
        raise source_error("the archive has a prefix in a header that is not in POSIX format")
    path = extended.get(b"path", prefix + b"/" * bool(prefix) + name).decode("utf-8", "surrogateescape")
    kind = _TAR_KINDS.get(header[156:157], "")
    if kind == "directory":
        path = path.rstrip("/") or path
    elif not kind or not path or path.endswith("/"):  # some readers make a directory of it
        raise source_error(f"{path[:80]!r} is a device, a pipe, a sparse file, or a file with a directory's name")
    if int(extended.get(b"size", size)) != size or size and kind != "file":
        raise source_error(f"{path[:80]!r} has two sizes, or is not a file and has contents")
    return _Member(
        path, kind, bool(mode & 0o100), extended.get(b"linkpath", target).decode("utf-8", "surrogateescape"), contents
    )


def without_suffix(name: str) -> str:
    """Return the file name of an archive without its suffix."""
    return re.sub(r"(?i)\.(tar\.gz|tgz|zip|gz)$", "", name)


def find_project(root: str, source_name: str) -> tuple[str, str]:
    """Return (directory, name) of the project in an unpacked source. [CONTRACT 1.11]

    It is the single top-level directory, else root with source_name without its suffix.
    source_name: the file name of the archive, unverified."""
    entries = [*os.scandir(root)]
    if len(entries) == 1 and entries[0].is_dir(follow_symlinks=False):
        return entries[0].path, safe_name(entries[0].name)
    base = without_suffix(basename(source_name.replace("\\", "/")))
    return root, safe_name(base or "build")


def _tar_block(name: str, kind: bytes, mode: int, size: int, target: str) -> bytes:
    """Return a header without an owner and a time. [POSIX.1-2017 pax, "ustar header block"]"""
    nobody, never, unset = b"0" * 7, b"0" * 11, b" " * 8
    path, link = (text.encode("ascii", "replace") for text in (name, target))
    fields = (b"%07o" % mode, nobody, nobody, b"%011o" % size, never, unset, kind, link, b"ustar", b"00")
    block = bytearray(struct.pack(_USTAR, path, *fields))
    block[148:156] = b"%06o\0 " % sum(block)  # the checksum, which counts its own field as spaces
    return bytes(block)


def tar_header(name: str, kind: bytes, mode: int, size: int = 0, target: str = "") -> bytes:
    """Return the header of a member, after a pax header for a name or target that does not fit. [POSIX.1-2017 pax]"""
    records = b""
    for key, value in ((b"path", os.fsencode(name)), (b"linkpath", os.fsencode(target))):
        if len(value) > 100 or not value.isascii():
            record = b" %b=%b\n" % (key, value)
            length = len(record) + len(str(len(record)))
            records += b"%d%b" % (len(record) + len(str(length)), record)  # a length counts its own digits
    if records:
        extension = _tar_block("././@PaxHeader", b"x", 0, len(records), "")
        records = extension + records + bytes(-len(records) % 512)
    return records + _tar_block(name, kind, mode, size, target)


def write_source(
    archive: str, root: str, name: str, files: Iterable[str] = ("",), git: str = "", level: int = 3
) -> None:
    """Write files into the gzip tarball archive, in a directory called name, without owners and times.

    files: relative to root, folders with all that is in them; all of root by default.
    git: the folder that becomes `.git`; empty for none.
    level: of the compression. 3 takes half the time of 6, and needs 3 % more for machine code, 20 % for headers.
    Raises BuildFailed SourceError or LimitError, OSError."""

    def add(path: str, member: str) -> None:
        found = os.lstat(path)
        mode = 0o755 if found.st_mode & 0o100 else 0o644
        if stat.S_ISREG(found.st_mode):
            if found.st_size >= 8 * GIB:
                raise limit_error(f"{path!r} has 8 GiB or more, which is too much for a tarball")
            out.write(tar_header(member, b"0", mode, found.st_size))
            for block in read_blocks(path, found.st_size):
                out.write(block)
            out.write(bytes(-found.st_size % 512))
        elif stat.S_ISLNK(found.st_mode):
            out.write(tar_header(member, b"2", mode, 0, os.readlink(path)))
        elif stat.S_ISDIR(found.st_mode):
            out.write(tar_header(f"{member}/", b"5", mode))
            for below in sorted(os.listdir(path)):
                add(join(path, below), f"{member}/{below}")
        else:
            raise source_error(f"{path!r} is neither a file nor a link")

    # GzipFile: modification time 0. The bytes depend only on the members and the level. tarfile would take three times
    # as long, and its bytes depend on its version.
    with open(archive, "wb") as f, gzip.GzipFile("", "wb", level, f, 0) as z, io.BufferedWriter(z, MIB) as out:
        if git:
            add(git, join(name, ".git"))
        for file in sorted(files):
            add(f"{root}/{file}", f"{name}/{file}".rstrip("/"))
        out.write(bytes(1024))
        out.write(bytes(-out.tell() % 10_240))  # the size of a record of tar(1)


# endregion 23
# ==============================================================================
# region 24. Git                                           [uses 16, 20, 21, 23]
# ==============================================================================
# Fetches a repository, computes the tree of files as git would, checks the history of a source, and packs a directory.
# The program git is used, but servers, repositories and work trees are hostile.  So git obeys no configuration of a
# repository, has limits of memory and of file size, and connects only to addresses that were checked.  If a repository
# has a configuration, only its objects are used, through a repository of our own.  The name of a tree or commit counts
# only after its bytes were hashed here.  [GIT]  Everything runs in the caller's thread.

# git-check-ref-format(1)
_REF = r"""(?x)
    (?!-)(?![./])                                   # not an option; no component begins with a dot
    (?!.*(\.\.|@\{|//|\.lock(/|$)|/\.|\.$|/$))      # no range, reflog, empty component or lock
    [^\x00-\x20\x7f~^:?*\[\\\ud800-\udfff]{1,255}   # no control character, revision syntax or pattern
    """
GITLINK = b"160000"  # the mode of a submodule [GIT]
MAX_TAGS = 100  # of one commit
MAX_COMMIT = MIB  # the largest commits in the field have some hundred KiB of parents and signatures
MAX_GIT_MEMORY = GIB  # address space of each process of git, which holds everything that a server announces


def repository_name(url: str) -> str:
    """Return the name of the project at a git URL."""
    return safe_name(url.rstrip("/").rpartition("/")[2].removesuffix(".git"))


def git_tree(
    root: str, files: Iterable[str], algorithm: str = "sha1", absent: Mapping[str, tuple[bytes, bytes]] | None = None
) -> str:
    """Return the object name of the tree that git would make of these files. [GIT]

    files: relative to root.
    algorithm: sha1 or sha256, the repository's object format.
    absent: the mode and object name of further entries, whose contents are not read.
    Raises BuildFailed SourceError for a file that git cannot store, such as a pipe."""
    found = {name: (mode, binascii.unhexlify(digest)) for name, (mode, digest) in (absent or {}).items()}
    for name in files:
        path = f"{root}/{name}"
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            target = os.fsencode(os.readlink(path))
            found[name] = b"120000", _git_object(algorithm, b"blob", len(target), [target])
        elif stat.S_ISREG(status.st_mode):
            mode = b"100755" if status.st_mode & 0o100 else b"100644"
            found[name] = mode, _git_object(algorithm, b"blob", status.st_size, read_blocks(path, status.st_size))
        else:
            raise source_error(f"{name!r} is neither a file nor a link, or cannot be read")

    def tree(entries: list[tuple[list[bytes], bytes, bytes]]) -> bytes:
        rows = []
        for name, group in itertools.groupby(sorted(entries), lambda entry: entry[0][0]):
            inner = [(path[1:], mode, digest) for path, mode, digest in group]
            # A folder sorts as if its name ended with a slash.
            rows.append((name + b"/", b"40000", tree(inner)) if inner[0][0] else (name, *inner[0][1:]))
        body = b"".join(b"%s %s\0%s" % (mode, name.rstrip(b"/"), digest) for name, mode, digest in sorted(rows))
        return _git_object(algorithm, b"tree", len(body), [body])

    return tree([(os.fsencode(name).split(b"/"), *entry) for name, entry in found.items()]).hex()


def _git_object(algorithm: str, kind: bytes, size: int, blocks: Iterable[bytes]) -> bytes:
    """Return the name of an object: the hash of its header and contents, which have size bytes. [GIT]"""
    digest = hashlib.new(algorithm, b"%s %d\0" % (kind, size), usedforsecurity=False)
    for block in blocks:
        digest.update(block)
    return digest.digest()


def object_format(name: str) -> str:
    """Return the object format of a repository in which an object has this name; sha1 if name is empty."""
    return "sha256" if len(name) == 64 else "sha1"


_READ_ONLY = "GIT_OPTIONAL_LOCKS=0 GIT_NO_REPLACE_OBJECTS=1 LC_ALL=C"


def variables(text: str) -> dict[str, str]:
    """Return the environment variables of a text that has NAME=VALUE for each of them."""
    return dict(word.split("=", 1) for word in text.split())


def git_environment(env: Strings, schemes: Sequence[str]) -> dict[str, str]:
    """Return env for a git that reads no configuration of a user or system, never prompts and runs no helpers.

    env: its HOME is an empty directory.
    schemes: the only URL schemes that git may use."""
    settings = f"""
        GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL={os.devnull} GIT_ATTR_NOSYSTEM=1 GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true
        GIT_ALLOW_PROTOCOL={":".join(schemes)} {_READ_ONLY}"""
    return {**env, **variables(settings)}


# The last two lines: little memory, and one pack for all objects, as each file of its own would have a limit of its
# own.
_SETTINGS = """
    core.hooksPath=/dev/null credential.helper= core.fsmonitor=false core.untrackedCache=false
    http.followRedirects=false http.lowSpeedLimit=100 http.lowSpeedTime=60 protocol.version=2
    gc.auto=0 maintenance.auto=false advice.detachedHead=false submodule.recurse=false
    core.packedGitWindowSize=32m core.packedGitLimit=256m core.bigFileThreshold=32m pack.threads=2
    fetch.unpackLimit=1 transfer.unpackLimit=1
""".split()
_GIT = ("git", *(word for setting in _SETTINGS for word in ("-c", setting)))
# setrlimit(2) for git and everything that it starts, in POSIX's units. Without SIGXFSZ, a write beyond the limit fails
# with a message. A limit that is already lower, or that a system does not have, stays.
_LIMIT = 'trap "" XFSZ; { ulimit -c 0; ulimit -f "$1"; ulimit -v "$2"; } 2>/dev/null; shift 2; exec "$@"'


def _git(
    arguments: Sequence[str],
    cwd: str,
    env: Strings,
    max_bytes: int = MAX_UNPACKED,
    max_output: int = 64 * MIB,
    watch: Callable[[], None] = lambda: None,
) -> bytes:
    """Run git on hostile input and return its output.

    max_bytes: size limit of each file that git writes.
    watch: called a few times per second; if it raises, git is killed.
    Raises BuildFailed SourceError with git's message, or LimitError."""
    if shutil.which("git", path=env.get("PATH")) is None:
        raise source_error("git is not installed here", "install git")
    limits = ["/bin/sh", "-c", _LIMIT, "sh", str(max_bytes // 512), str(MAX_GIT_MEMORY // KIB)]
    status, output, errors = capture(
        [*limits, *_GIT, *arguments], cwd, env, max_output, watch=watch, what=f"git {' '.join(arguments[:2])}"
    )
    if status == 0:
        return output
    lines = errors.splitlines() or [f"git ended with status {status}"]
    cause = next((line for line in lines if line.startswith(("fatal: ", "error: "))), lines[-1])  # the first one
    if cause.endswith(":"):  # the next line says what it is about
        cause += " ".join(["", *map(str.strip, lines[lines.index(cause) + 1 :][:1])])
    if re.search("(?i)out of memory|cannot allocate|file too large", errors):
        raise limit_error(
            f"git needs more than {MAX_GIT_MEMORY} bytes of memory, or a file of more than {max_bytes} bytes: {cause}"
        )
    raise source_error(cause, f"if you trust it: {lines[-1].strip()}" * ("safe.directory" in lines[-1]))


def check_ref(ref: str) -> None:
    """Raise Refused InvalidRef unless ref can name a branch, tag, full ref or commit, or is empty. [CONTRACT 1.6]"""
    if ref and not re.fullmatch(_REF, ref):
        raise Refused(400, "InvalidRef", f"repo_ref: {ref[:80]!r} is not a valid branch, tag or commit name")


def check_url(url: str, schemes: Sequence[str], loopback: bool) -> None:
    """Raise Refused ForbiddenUrl unless url may be fetched: an allowed scheme, a host and a path, no credentials.

    loopback: allow loopback addresses. Link-local, unspecified and multicast addresses and metadata services of clouds
    are never allowed. The addresses of names are checked by fetch_git."""

    def forbid(reason: str) -> NoReturn:
        raise Refused(400, "ForbiddenUrl", f"repo_url: {reason}")

    if not re.fullmatch(r"[\x21-\x7e]{1,2048}", url) or "\\" in url:
        forbid("not a URL in plain ASCII of at most 2048 characters")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as e:
        forbid(str(e))
    if parts.scheme not in schemes:
        forbid(f"scheme {parts.scheme!r}, expected {' or '.join(schemes)}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        forbid("credentials, queries and fragments are not accepted")
    if parts.scheme == "file":
        if host or not parts.path.startswith("/"):
            forbid("a file URL must have no host and an absolute path")
        return
    if not host or port == 0 or not parts.path.strip("/"):
        forbid("a host and a path are required")
    if not re.fullmatch(r"[a-z0-9_][a-z0-9._-]*|[0-9a-f:.]+", host):  # curl would decode or obey other characters
        forbid("the host must be a plain name or address")
    bare = host.rstrip(".")
    try:  # also 2130706433 and 0x7f.1, which resolvers take for addresses
        literals = socket.getaddrinfo(bare, None, flags=socket.AI_NUMERICHOST, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        literals = []
    for complaint in filter(None, (_forbidden_address(str(literal[4][0]), loopback) for literal in literals)):
        forbid(complaint)
    if ("." + bare).endswith(".localhost") and not loopback:
        forbid("loopback addresses are not accepted by this server")
    if re.fullmatch(_METADATA_NAMES, bare):
        forbid("metadata services of clouds are not accepted by this server")


# Metadata services, where a cloud gives its VMs their credentials. Nearly all others use 169.254.0.0/16 or fe80::/10.
_METADATA_NETWORKS = (
    "100.100.100.200/32",  # Alibaba
    "168.63.129.16/32",  # Azure
    "192.0.0.192/32",  # Oracle
    "fd00:c1::/32",  # Oracle
    "fd00:ec2::/32",  # AWS: ::254, and ::23 for the credentials of pods
    "fd20:ce::/32",  # Google
    "fd00:42::/32",  # Scaleway
    "fd00:a9fe:a9fe::/48",  # Akamai
)
_METADATA_NAMES = r"""(?x)
    metadata|instance-data|rancher-metadata
    |(.+\.)?(metadata\.google\.internal|metadata\.goog|metadata\.azure\.internal|metadata\.tencentyun\.com
    |metadata\.platformequinix\.com|metadata\.packet\.net|instance-data\.ec2\.internal)
    """
# IPv6 addresses that lead to an IPv4 address, in hexadecimal digits.
_IPV4_INSIDE = (
    r"(?:0{24}|0{20}ffff)(.{8})",  # IPv4-compatible and IPv4-mapped [RFC4291 2.5.5]
    r"0{16}ffff0000(.{8})",  # IPv4-translated [RFC2765 2.1]
    r"2002(.{8}).*",  # 6to4 [RFC3056 2]
    r"20010000(.{8}).*",  # the server of Teredo [RFC4380 4]
    r".{16}0[02]005efe(.{8})",  # ISATAP [RFC5214 6.1]
    r"0064ff9b0{16}(.{8})",  # NAT64 [RFC6052 2.1]
    # Local NAT64 [RFC8215] with prefixes of 48, 56, 64 and 96 bits; bits 64 to 71 are not used. [RFC6052 2.2]
    r"0064ff9b0001(.{4})..(.{4}).*",
    r"0064ff9b0001..(..)..(.{6}).*",
    r"0064ff9b0001.{4}..(.{8}).*",
    r"0064ff9b0001.{12}(.{8})",
)


def _forbidden_address(text: str, loopback: bool) -> str:
    """Return why the address must not be fetched from, or ""."""
    address = ipaddress.ip_address(text.partition("%")[0])
    for kind in ("link_local", "unspecified", "multicast", "loopback"):
        if getattr(address, "is_" + kind) and not (kind == "loopback" and loopback):
            return f"{kind.replace('_', '-')} addresses are not accepted by this server"
    if any(address in ipaddress.ip_network(network) for network in _METADATA_NETWORKS):
        return "addresses of metadata services of clouds are not accepted by this server"
    digits = address.packed.hex()
    matches = filter(None, (re.fullmatch(pattern, digits) for pattern in _IPV4_INSIDE))
    inside = ["".join(match.groups()) for match in matches]
    if address.version == 6 and digits.startswith("20010000"):  # the client of Teredo
        inside.append(f"{int(digits[24:], 16) ^ 0xFFFFFFFF:08x}")
    if digits.startswith("0064ff9b0001") and int(digits[12:], 16):  # zeros belong to a prefix of another length
        inside = [four for four in inside if int(four, 16)]
    complaints = (_forbidden_address(str(ipaddress.IPv4Address(int(four, 16))), loopback) for four in inside)
    return next(filter(None, complaints), "")


def _pinned_address(url: str, loopback: bool) -> list[str]:
    """Return options that make git connect to the addresses that were checked, whatever the name resolves to later."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname:
        return []
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    try:
        found = sorted({str(row[4][0]) for row in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as e:
        raise source_error(f"{parts.hostname}: {getattr(e, 'strerror', e)}") from None
    for address in found:
        complaint = _forbidden_address(address, loopback)
        if complaint:
            raise source_error(f"{parts.hostname} is {address}: {complaint}")
    if parts.scheme not in SCHEMES or ":" in parts.hostname or parts.hostname in found:
        return []  # an address needs no look-up
    # git before 2.37 ignores the option and resolves the name itself. Some versions of curl remove the name's last dot.
    return [
        option
        for name in sorted({parts.hostname, parts.hostname.rstrip(".")})
        for option in ("-c", f"http.curloptResolve={name}:{port}:{','.join(found)}")
    ]


def fetch_git(
    url: str, ref: str, root: str, env: Strings, policy: SourcePolicy, own: str = "", files: bool = True
) -> None:
    """Make the new directory root a repository with a commit as its HEAD, and a history of depth 1.

    The tags that point at the commit are fetched too, for `git describe`.
    url, ref: checked by check_url and check_ref. ref is a branch, tag, full ref or commit; empty means the default
    branch. url is recorded as the origin.
    own: a repository of our own to fetch from in place of url, which may then be empty; ref is a commit.
    files: write the files of HEAD, with the bytes of the repository. Submodules are empty folders.
    Raises BuildFailed SourceError or LimitError."""
    env, git = git_environment(env, policy.schemes), join(root, ".git")
    source = "file://" + urllib.parse.quote(own) if own else url
    pinned = _pinned_address(source, policy.loopback)
    os.mkdir(root)
    max_bytes = min(policy.max_unpacked, shutil.disk_usage(root).free // 2)

    def watch() -> None:
        if _folder_size(git) > max_bytes:
            raise limit_error(f"the repository's pack has more than {max_bytes} bytes")

    fetch = [*pinned, *"fetch -q --depth 1 --no-tags --no-recurse-submodules --".split(), source]
    for algorithm in sorted(("sha1", "sha256"), key=object_format(ref).__ne__):
        _init_repository(git, algorithm, f'[remote "origin"]\nurl = {_quoted(url)}\n' * bool(url))
        try:
            _git([*fetch, "+" + (ref or "HEAD")], root, env, max_bytes, watch=watch)
            break
        except BuildFailed as e:
            if "remote ref" in str(e) and re.fullmatch("[0-9a-f]{4,39}", ref):
                raise source_error(f"{e}: a commit needs all of its 40 or 64 digits") from None
            if "mismatched algorithms" not in str(e) or algorithm != object_format(ref):
                raise
            remove_tree(git)
    watch()
    if files:
        _check_listing(root, env, min(max_bytes, max(64 * MIB, policy.max_ratio * _folder_size(git))))
    commit = ref if own else _git(["rev-parse", "FETCH_HEAD^0"], root, env).decode("ascii").strip()
    write_file(join(git, "HEAD"), f"{commit}\n".encode("ascii"))
    _git(["read-tree", commit], root, env, max_bytes)
    if not policy.allow_filters:
        refuse_filters(root, env)
    # Keep the bytes that the tree hash covers.
    write_file(join(git, "info", "attributes"), b"* -text -eol -ident -filter -working-tree-encoding\n")
    if own:  # one process in place of three
        shown = _git(["log", "-1", "--format=%D", "--decorate=full", "--decorate-refs=refs/tags/", commit], own, env)
        tags = [name[5:] for name in os.fsdecode(shown).strip().split(", ") if name.startswith("tag: ")]
    else:
        shown = _git([*pinned, "ls-remote", "-q", "--tags", "--", url], root, env, watch=watch)
        rows = (row.removesuffix("^{}").split("\t") for row in os.fsdecode(shown).splitlines())
        tags = [tag for name, tag in rows if name == commit]
    tags = [f"+{tag}:{tag}" for tag in tags if re.fullmatch(_REF, tag)]
    if tags:
        _git([*fetch, *tags[:MAX_TAGS]], root, env, max_bytes, watch=watch)
        _git(["pack-refs", "--all"], root, env)  # archives refuse files whose names differ only in case
    os.unlink(join(git, "FETCH_HEAD"))  # it contains source
    if files:
        _git("checkout -q -f --detach HEAD --".split(), root, env, max_bytes)


def refuse_filters(directory: str, env: Strings) -> None:
    """Raise BuildFailed SourceError if .gitattributes gives a file of the index a filter, as that of git LFS.

    Filters are programs, which are never run, so a build would see other bytes than in a usual checkout."""
    others = (f":(exclude,attr:{mark}filter)" for mark in ("!", "-", ""))  # unspecified, unset, or set to no value
    name = os.fsdecode(_git(["ls-files", "-z", "--", ".", *others], directory, env)).partition("\0")[0]
    if name:
        _, _, value, _ = os.fsdecode(_git(["check-attr", "-z", "filter", "--", name], directory, env)).split("\0")
        raise source_error(
            f"{name[:80]!r} has the attribute filter={value[:40]}, and filters are never run",
            "--allow-filters builds with the bytes that are there, such as the pointers of git LFS",
        )


def _folder_size(folder: str) -> int:
    """Return the size of all files below folder, ignoring those that disappear meanwhile."""
    size = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                size += os.lstat(join(directory, name)).st_size
    return size


def _init_repository(git: str, algorithm: str, more: str) -> None:
    """Make git the folder of an empty repository with this object format. more: lines of its configuration."""
    config = "[core]\nrepositoryformatversion = 0\n"
    if algorithm == "sha256":
        config = "[core]\nrepositoryformatversion = 1\n[extensions]\nobjectformat = sha256\n"
    write_file(join(git, "config"), os.fsencode(config + more))
    write_file(join(git, "HEAD"), b"ref: refs/heads/main\n")
    for name in ("objects", "refs"):
        os.mkdir(join(git, name))


def _check_listing(root: str, env: Strings, max_bytes: int) -> None:
    """Raise BuildFailed unless the tree of FETCH_HEAD may be checked out. Called before any of its files is written.

    max_bytes: limit of all files."""
    rows = _list_tree("FETCH_HEAD", root, env, "-t", "-l")
    if len(rows) > MAX_MEMBERS:
        raise limit_error(f"the repository has more than {MAX_MEMBERS} files and folders")
    total = 0
    for name, (mode, _, _, size) in rows:
        if name.count("/") > MAX_DEPTH:
            raise limit_error(f"{name[:80]!r} lies deeper than {MAX_DEPTH} folders")
        if mode not in (b"040000", GITLINK):
            if not size.isdigit():
                raise source_error(f"the repository lacks {name[:80]!r}")
            total += int(size)
    if total > max_bytes:
        raise limit_error(f"the repository unpacks to more than {max_bytes} bytes")


def _quoted(text: str) -> str:
    """Return text in quotes, as git reads it in its files."""
    escaped = re.sub(r'(["\\])', r"\\\1", text).replace("\n", "\\n")
    return f'"{escaped}"'


def _read_config(folder: str, env: Strings, path: str = "") -> dict[str, str]:
    """Return settings of git, or {} if they are damaged.

    path: a file with settings, which may be missing. Otherwise return those that git obeys in folder."""
    try:
        listed = _git(["config", "-z", "--list", *(["--no-includes", "--file", path] if path else [])], folder, env)
    except BuildFailed:
        return {}
    rows = (row.partition("\n") for row in os.fsdecode(listed).split("\0"))
    return {name: value if has_value else "true" for name, has_value, value in rows}


# The settings that say how a repository is stored, how git converts the files of a work tree, and which it ignores;
# none of them names a program.
_OBEYED = """extensions.refstorage core.filemode core.ignorecase core.symlinks
    core.precomposeunicode core.autocrlf core.eol core.attributesfile core.excludesfile""".split()


def _borrow_repository(git: str, common: str, own: str, env: Strings, config: Strings) -> tuple[str, bytes]:
    """Make the empty folder own a repository with the objects and refs of another one.

    git: the folder that holds HEAD.
    common: the folder that holds objects and refs; it differs in a linked work tree.
    config: the other one's. Only _OBEYED is copied, since the rest could name programs.
    Return (the name of the commit of HEAD, which is computed here, its contents), both empty if there is none."""
    algorithm = "sha256" if config.get("extensions.objectformat") == "sha256" else "sha1"
    # Version 1 may have extensions. The last two settings make a fetch twice as fast, and hardly larger.
    settings = "[core]\nbare = true\nrepositoryformatversion = 1\n[pack]\nwindow = 0\ncompression = 1\n"
    for name in filter(config.__contains__, _OBEYED):
        settings += "[" + name.replace(".", "]\n") + f" = {_quoted(config[name])}\n"
    _init_repository(own, algorithm, settings)
    os.rmdir(join(own, "refs"))
    for name in ("refs", "packed-refs", "reftable"):
        os.symlink(abspath(join(common, name)), join(own, name))
    alternate = _quoted(abspath(join(common, "objects"))) + "\n"
    write_file(join(own, "objects", "info", "alternates"), os.fsencode(alternate))
    env = {**env, "GIT_DIR": git, "GIT_COMMON_DIR": own}  # the configuration is in the latter
    try:
        body = _git("cat-file commit HEAD".split(), own, env, max_output=MAX_COMMIT)
    except BuildFailed as e:
        if re.search("not a git repository|Not a valid object name", str(e)):  # HEAD is damaged, or names no commit yet
            return "", b""
        raise
    commit = _git_object(algorithm, b"commit", len(body), [body]).hex()
    write_file(join(own, "shallow"), f"{commit}\n".encode("ascii"))
    return commit, body


def _list_tree(commit: str, folder: str, env: Strings, *options: str) -> list[tuple[str, list[bytes]]]:
    """Return (name, facts) of the files, links and submodules of a commit.

    facts: mode, type, object name in hexadecimal, and what options add.
    A hostile tree may have a name twice."""
    listed = _git(["ls-tree", "-r", "-z", *options, commit], folder, env, max_output=MAX_MEMBERS * 320)
    rows = (row.partition(b"\t") for row in listed.split(b"\0")[:-1])
    return [(os.fsdecode(name), facts.split()) for facts, _, name in rows]


# For a repository of our own, whose objects may come from anybody.
_OWN_POLICY = SourcePolicy(("file",), max_ratio=MAX_UNPACKED, allow_filters=True)
EPOCH = 315532800  # 1980-01-01, the first day that a zip file can name: the time of what has no commit


class History(NamedTuple):
    """The history of a source, from its `.git`; or only the tree of files without one.

    commit, tree: their object names, which were computed here.
    uri: of the origin, an unverified claim without credentials.
    submodules: path -> entry of resolvedDependencies; also the submodules of submodules that are not empty.
    time: of the commit, as the committer says, in seconds since 1970; at least EPOCH."""

    commit: str
    tree: str
    uri: str = ""
    submodules: Mapping[str, Json] = {}  # never changed
    time: int = EPOCH


class Checkout(NamedTuple):
    """A work tree of git, read through a repository of our own, so that git never finds its configuration.

    root: the top of the work tree.
    own: the repository of our own.
    commit: of HEAD, or "". The index of our own is that commit's.
    body: its contents.
    config: the configuration of the work tree, as data.
    env: for a git that sees the work tree, and obeys the user's own configuration and _OBEYED.
    letters: those of `git ls-files -t` for the files of the folder that was asked for, from the work tree's index."""

    root: str
    own: str
    commit: str
    body: bytes
    config: Strings
    env: Strings
    letters: Strings = {}


def believe_history(project: str, env: Strings, prefix: str = "") -> History:
    """Return the history in project's own `.git` if the tree of its HEAD is that of project's files. [CONTRACT 3.4]

    Replace `.git` with a repository of our own with that commit and nothing else.
    prefix: of the paths of submodules.
    The commit is hashed here. A submodule is an empty folder, or has a history of its own that can be believed.
    The files that archives never contain (IGNORED) may be missing.
    Raises BuildFailed SourceError with the reason if the history cannot be believed, or LimitError."""
    git, env = join(project, ".git"), git_environment(env, ())
    if not isfile(join(git, "HEAD")) or islink(git):  # git would wait for a pipe
        raise source_error("there is no history")
    with tempfile.TemporaryDirectory(dir=dirname(project)) as own:
        config = _read_config(own, env, join(git, "config"))
        commit, body = _borrow_repository(git, git, own, env, config)
        if not commit:
            raise source_error("HEAD names no commit")
        checkout, head = Checkout(project, own, commit, body, config, env), dict(_list_tree(commit, own, env))
        history = _believe_commit(checkout, head, prefix)
        # A build may call git, which obeys programs in the configuration and believes any object and any ref.
        fetch_git(history.uri, commit, join(own, "clean"), env, _OWN_POLICY, own, files=False)
        remove_tree(git)
        os.rename(join(own, "clean", ".git"), git)
        return history


def _believe_commit(
    checkout: Checkout, head: Mapping[str, list[bytes]], prefix: str = "", files: Sequence[str] | None = None
) -> History:
    """Do what believe_history does, with a repository of our own that has the commit.

    head: from _list_tree.
    files: of the work tree; None for all."""
    project, own, commit, body, config, env, _ = checkout
    links = {name: digest.decode("ascii") for name, (mode, _, digest) in head.items() if mode == GITLINK}
    modules = _read_config(own, env, join(project, ".gitmodules")) if links else {}
    if files is None:
        files = [name for name in walk_files(project) if not name.startswith(tuple(link + "/" for link in links))]
    absent = {name: (row[0], row[2]) for name, row in head.items() if name in links or IGNORED & set(name.split("/"))}
    tree = git_tree(project, files, object_format(commit), absent)
    if not body.startswith(b"tree %s\n" % tree.encode("ascii")):
        raise source_error("the files differ from the tree of HEAD")
    urls = {path: modules.get(key[:-4] + "url", "") for key, path in modules.items() if key.endswith(".path")}
    origin = config.get("remote.origin.url", "").strip()
    *scheme, base = origin.rpartition("://")
    submodules: dict[str, Json] = {}
    for link, named in links.items():
        folder, path = join(project, link), prefix + link
        url = urls.get(link, "")
        if url.startswith(("./", "../")):  # relative to the origin [gitmodules(5)]
            url = "".join([*scheme, normpath(join(base, url))])
        url = without_credentials(url)
        uri = f"pkg:generic/{urllib.parse.quote(path)}@{named}?vcs_url=git+{url}@{named}"
        submodules[path] = descriptor(path, named, "gitCommit", uri=uri)
        if isdir(folder) and os.listdir(folder):
            inner = believe_history(folder, env, path + "/")
            if inner.commit != named:
                raise source_error(f"the submodule {path!r} is not at the commit that HEAD names")
            submodules |= inner.submodules
    committed = re.search(rb"(?m)^committer .* (\d{1,12}) [+-]\d+$", body)
    time_s = max(EPOCH, int(committed[1]) if committed else 0)
    return History(commit, tree, without_credentials(origin), submodules, time_s)


def _open_checkout(directory: str, own: str, allow_filters: bool) -> Checkout | None:
    """Return the work tree that contains directory, or None.

    own: an empty folder.
    allow_filters: accept files with filters, which are never run.
    Objects, HEAD, refs, the index, and the patterns of ignored files and of attributes are used as data. Of the
    configuration, only _OBEYED is used: the rest could name programs (core.fsmonitor, filters, a partial clone's
    remote). The configuration of the user is obeyed; its safe.directory decides which work trees of other users count.
    Raises BuildFailed with git's reason if git refuses the work tree."""
    root = directory = realpath(directory)

    def has_no_git() -> bool:
        git = join(root, ".git")  # git says what is wrong with a file, a broken link, or a folder that is not readable
        return lexists(git) is (isdir(git) and os.access(git, os.X_OK)) and not lexists(join(git, "HEAD"))

    while has_no_git():
        root, below = dirname(root), root
        if root == below or os.stat(root).st_dev != os.stat(below).st_dev:
            return None
    plain = {name: value for name, value in os.environ.items() if not re.match("GIT_(?!CONFIG_)", name)}
    plain |= variables(_READ_ONLY)
    env = {**plain, "GIT_CEILING_DIRECTORIES": dirname(root)}
    try:
        found = _git(["rev-parse", "--git-dir", "--git-common-dir"], root, env)
        git, common = (join(root, os.fsdecode(line)) for line in found.splitlines())
        # With what it includes, and what the user's own configuration includes for this work tree.
        config = _read_config(root, env)
        commit, body = _borrow_repository(git, common, own, git_environment(plain, ()), config)
        os.symlink(join(common, "info"), join(own, "info"))
        for name in os.listdir(git):
            if name.startswith("sharedindex."):  # the index refers to it
                os.symlink(join(git, name), join(own, name))
        env = {**plain, "GIT_DIR": own, "GIT_WORK_TREE": root}
        if commit:
            _git(["read-tree", commit], root, env)
            if not allow_filters:
                refuse_filters(directory, env)
        listed = "ls-files -t -z --cached --others --exclude-standard".split()
        rows = os.fsdecode(_git(listed, directory, {**env, "GIT_INDEX_FILE": join(git, "index")})).split("\0")
    except BuildFailed as e:
        e.hint = e.hint or f"repair it, or move {root}/.git away to build all files"
        raise
    return Checkout(root, own, commit, body, config, env, {row[2:]: row[0] for row in rows[:-1]})


def list_source(
    directory: str, own: str, submodules: bool, allow_filters: bool
) -> tuple[Checkout | None, dict[str, str]]:
    """Return the work tree that contains directory, and the files of directory that are its source, as they are.

    The files map names to the letters of `git ls-files -t`: "S" for a file that git was told to skip, which may be
    missing; "?" for one that git does not track but would track. Without a work tree, and in a folder that git
    ignores, these are all files, with "!".
    Bundles, the logs of failed builds, links out of directory, and IGNORED are not source unless git tracks them.
    own, allow_filters: as in _open_checkout. Those of submodules are made beside own.
    submodules: include the files of submodules that are checked out."""
    checkout, found = _open_checkout(directory, own, allow_filters), dict[str, str]()
    letters = checkout.letters if checkout else {}
    if not checkout or not letters and checkout.root != realpath(directory):
        letters = dict.fromkeys(walk_files(directory), "!")
    is_bundle = functools.cache(lambda folder: {*os.listdir(join(directory, folder))} == BUNDLE_FILES)
    for name, letter in letters.items():
        path, folder = join(directory, name), dirname(name)
        if isdir(path) and not islink(path):  # a submodule, or a repository that git does not track
            if lexists(join(path, ".git")) and (submodules or letter == "?"):
                _, inner = list_source(path, tempfile.mkdtemp(dir=dirname(own)), submodules, allow_filters)
                found |= {join(name, below): letter for below in inner}
        elif letter not in "?!" or not (
            # The .git folder of an inner repository may hold credentials.
            {".git", *IGNORED} & {*name.split(os.sep)}
            or name.endswith((UNVERIFIED, "-build.log"))
            or (islink(path) and leads_out(directory, name))
            or any(map(is_bundle, filter(None, (folder, dirname(folder)))))
        ):
            found[name] = letter
    return checkout, found


BUNDLE_FILES = {"artifacts", "provenance.json", "evidence.json"}
UNVERIFIED = ".unverified.tar.gz"  # added to the name of a bundle that fails to verify


def without_credentials(url: str) -> str:
    """Return url without user, password, query and fragment, or "" if it is not a URL."""
    scp = re.fullmatch(r"(?:[^@/]*@)?([A-Za-z0-9.-]+:(?!//)[^\x00-\x20\x7f@?#]+)", url)
    if scp:  # user@host:path
        return scp[1]
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#]*@)?([^\x00-\x20\x7f@?#]*)([?#][^@]*)?", url)
    return match[1] + match[2] if match else ""


class Source(NamedTuple):
    """The source in a directory.

    root: the folder with its bytes: the directory itself, or a checkout of HEAD of our own.
    files: relative to root.
    history: of HEAD, or without a commit: the files count as they are.
    note: which of the two and why, for the user.
    git: the folder with the history if root's own `.git` is another."""

    root: str
    files: Sequence[str]
    history: History
    note: str
    git: str = ""


def read_source(
    directory: str,
    scratch: str,
    outputs: Sequence[str],
    submodules: bool,
    allow_filters: bool,
) -> Source:
    """Find the source in directory. [CONTRACT 5.4]

    It is HEAD if the work tree of git differs from it only by git's own conversions (line ends, ident, mode bits), or
    in files that git was told to skip; otherwise the files as they are, without ignored ones.
    scratch: a directory for temporary files, which must outlive the result.
    outputs: the folders that a build removes first, relative to directory.
    submodules: include the submodules that are checked out; otherwise their folders are empty.
    allow_filters: accept files with filters, which are never run.
    Raises BuildFailed."""
    root, scratch = realpath(directory), realpath(scratch)
    if commonpath((root, scratch)) == root:
        raise source_error(f"it contains {scratch}, the folder of temporary files", "TMPDIR names another folder")
    checkout, listed = list_source(root, tempfile.mkdtemp(dir=scratch), submodules, allow_filters)
    why = "it is not a git work tree"
    # A build removes its outputs before it hashes the tree, so they are left out even if git tracks them.
    removed = tuple(f"{output}/" for output in outputs)
    found = {name: letter for name, letter in listed.items() if not f"{name}/".startswith(removed)}
    # A folder that has become a link is that link, and what git knows in it is gone.
    is_real = functools.cache(lambda folder: realpath(join(root, folder)) == normpath(join(root, folder)))
    present = (name for name in found if not IGNORED & {*name.split("/")} and is_real(dirname(name)))
    files = [name for name in present if lexists(join(root, name))]
    if checkout:
        why = "git has no commit"
    if checkout and checkout.commit:
        why = "it is a folder inside a git work tree"
        if checkout.root == root:
            try:
                return _read_head(checkout, scratch, found, files, removed, submodules, allow_filters)
            except BuildFailed as e:
                why = str(e)
                if why.startswith(("fatal: ", "error: ")):  # git has failed: never pack what just lies there
                    e.hint = e.hint or "`git fetch --refetch --no-filter` gets missing objects"
                    raise
    ignored = ", ignored ones too" if "!" in found.values() else ""
    return Source(
        root,
        files,
        History("", git_tree(root, files)),
        f"{len(files)} files as they are{ignored}, without history: {why}",
    )


def _skipped_files(checkout: Checkout, found: Strings, head: Mapping[str, list[bytes]]) -> set[str]:
    """Return the files that differ from HEAD or are missing because git was told to skip them.

    found: from list_source.
    head: from _list_tree.
    Raises BuildFailed SourceError for any other difference."""
    # The user's own filters must not run either, and the index of our own knows no times, so git reads every file.
    attributes = join(checkout.own, "info", "attributes")
    local = read_limited(attributes, MIB) if isfile(attributes) else b""
    os.unlink(dirname(attributes))
    status = "status --porcelain -z --no-renames --untracked-files=no --ignore-submodules=all".split()
    changed = {*head}
    # git itself calls a file modified that has the very bytes of HEAD, if it would convert them when it adds the file.
    for conversions in (b"", b"-text -ident -working-tree-encoding"):
        if changed:  # each look reads every file
            write_file(attributes, local + b"\n* -filter %b\n" % conversions)
            listed = _git(status, checkout.root, checkout.env)
            changed &= {row[3:] for row in os.fsdecode(listed).split("\0") if row[1:2] != " "}
    links = tuple(f"{name}/" for name, row in head.items() if row[0] == GITLINK)
    changed |= {name for name in found if name not in head and not name.startswith(links)}
    names = sorted(name if name.isprintable() else ascii(name) for name in changed if found.get(name) != "S")
    if names:
        more = f" and {len(names) - 5} more" * (len(names) > 5)
        raise source_error(f"it differs from HEAD in {', '.join(names[:5])}{more}")
    return changed


def _read_head(
    checkout: Checkout,
    scratch: str,
    found: Strings,
    files: Sequence[str],
    removed: tuple[str, ...],
    submodules: bool,
    allow_filters: bool,
) -> Source:
    """Return the HEAD of a work tree as its source.

    found: from list_source.
    files: those that are there.
    removed: the folders that a build removes first, each with a slash.
    Raises BuildFailed if the work tree differs from HEAD, or the history cannot be used."""
    head = dict(_list_tree(checkout.commit, checkout.own, checkout.env))
    for name in head:
        if name.startswith(removed):
            raise source_error(f"git tracks {name}, which is removed before a build")
    env, history = {"PATH": os.environ.get("PATH", os.defpath), "HOME": scratch}, None
    if found.keys() == head.keys() and not submodules and GITLINK not in (row[0] for row in head.values()):
        # Nearly every work tree has the very bytes of HEAD, and needs no second copy of its files. But submodules do:
        # believe_history replaces their `.git`, which must never be the user's.
        with suppress(BuildFailed, OSError):
            plain = checkout._replace(env=git_environment(env, ()))
            history = _believe_commit(plain, head, files=files)
    skipped = set() if history else _skipped_files(checkout, found, head)
    root = join(tempfile.mkdtemp(dir=scratch), safe_name(basename(checkout.root)))
    notes = [f"commit {checkout.commit}"]
    origin = without_credentials(checkout.config.get("remote.origin.url", ""))
    fetch_git(origin, checkout.commit, root, env, _OWN_POLICY, checkout.own, files=history is None)
    if history:
        return Source(checkout.root, files, history, notes[0], join(root, ".git"))
    for link in (name for name, row in head.items() if row[0] == GITLINK):
        path = join(checkout.root, link)
        if not submodules or not lexists(join(path, ".git")):
            how = (
                "`git submodule update --init` checks it out"
                if submodules
                else "--submodules packs it if it is checked out"
            )
            notes.append(f"without the submodule {link} ({how})")
            continue
        inner = read_source(path, scratch, (), True, allow_filters)
        if not inner.history.commit:
            raise source_error(f"the submodule {link}: {inner.note}")
        notes += [f"{link} {note}" for note in inner.note.split("; ")[1:]]
        os.rmdir(join(root, link))
        os.rename(inner.root, join(root, link))
    for name in skipped:
        if lexists(join(checkout.root, name)):
            notes.append(f"without the work tree's {name}: git was told to skip that")
    return Source(root, walk_files(root), believe_history(root, env), "; ".join(notes))


def pack_directory(
    directory: str,
    archive: str,
    workspace: str,
    outputs: Sequence[str],
    submodules: bool,
    allow_filters: bool,
) -> Source:
    """Pack the source in directory into the gzip tarball archive, and return it. [CONTRACT 5.4]

    workspace: an empty directory for temporary files.
    outputs, submodules, allow_filters: as in read_source.
    Raises UsageError."""
    try:
        source = read_source(directory, workspace, outputs, submodules, allow_filters)
        if not source.files:
            raise UsageError(f"{directory}: there is nothing to build")
        name = safe_name(basename(realpath(directory)))
        whole = source.history.commit and not source.git  # with the empty folders of submodules
        write_source(archive, source.root, name, [""] if whole else source.files, source.git)
    except BuildFailed as e:
        raise UsageError(f"{directory}: {e}", e.hint) from None
    return source


# endregion 24
# ==============================================================================
# region 25. Toolchains                                    [uses 16, 20, 21, 24]
# ==============================================================================
# Recognises a project's toolchain, and records its inputs before the build.  A toolchain is one row of TOOLCHAINS
# and two functions, such as go_dependencies, which reads the lock file and runs nothing, and collect_cargo, which finds
# the artifacts after the build.  A plan is a row that has been completed for one project: read_inputs adds what the
# source says.  prepare adds the programs, which it looks up once, in the project's directory; that same file is hashed,
# asked for its version and run.
# Callers: the pipeline builds with these rows; `verify --source` reads a checkout with source_expectations.
# Specifications: [CARGO] for Cargo.lock; the nix manual, "derivation show" (JSON formats 0 to 5); [NPM] for
# package-lock.json; [GO] for go.mod and go.sum; [K] for the uris.

_NIX_FEATURES = "--extra-experimental-features nix-command --extra-experimental-features flakes".split()
# The default registry of purl's type cargo, as Cargo.lock names it; some tools write the second form.
_CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index sparse+https://index.crates.io/".split()
# These programs read such files in the folders above a project, where the tree hash does not cover them.
_OUTSIDE = """
    .cargo/config .cargo/config.toml Cargo.toml rust-toolchain rust-toolchain.toml .git flake.nix
    pnpm-workspace.yaml .npmrc node_modules
""".split()
_OWN_OUTPUT = ".confbuild"  # folder of a project for what go and npm build
# Instead of --version.
_VERSION_OPTIONS = {"sh": ["-c", "echo sh"], **dict.fromkeys("go helm hugo openssl zig".split(), ["version"])}
_MAX_LOCKFILE = 64 * MIB
_NOT_SENT = (
    "is not part of what was sent; "
    "`confbuild build PARENT --subdir DIR` builds DIR in a folder PARENT that contains both"
)


Artifacts = list[tuple[str, str]]  # the (name, path) of each artifact


class Program(NamedTuple):
    """A program of a toolchain.

    path: of the file that runs. It may be a symbolic link: some programs behave as they are called.
    version: the first line that it prints for --version.
    sha256: the digest of the file, in hexadecimal.
    """

    path: str
    version: str
    sha256: str


class Toolchain(NamedTuple):
    """One kind of build: a row of TOOLCHAINS, or with the last four fields the plan of one project.

    marker: the file whose presence in a project selects this toolchain.
    lock_file: the file that pins the dependencies.
    tools: the names of the programs, in the order of the provenance.
    steps: the argument vectors, each beginning with the name of one of tools or the path of a file of the source; they
        run in the project's directory.
    read: called with the contents of lock_file, the directory of a source, the project's folder in it and the commit of
        the source, or ""; runs nothing and may read any checkout; returns dependencies.
    collect: called with the project's real path before the build and the build's stdout; returns the (name, path) of
        each artifact, sorted by name. A directory is packed. Not called if there are patterns.
    adapt: called with a project; returns those of the other fields that depend on it.
    evaluate: completes a plan with its programs; also called with the source and the folder.
    env: added to the environment of the build; {project} stands for its path, {home} for HOME, and the name of a tool
        for that Program. A v that a value begins with is left out: node prints v20.1.0, and pnpm calls it 20.1.0.
    fetches: how many of the steps need a network; 0 if all may use it.
    outputs: the directories of a project that are removed before the build.
    folders: where the build puts artifacts: patterns relative to the project.
    artifacts: patterns of the files that are the artifacts.
    build_type: of the provenance.
    store: directories outside of the workspace that a build writes to, and whose paths it prints on stdout:
        environment variable -> default. If such a toolchain is missing or its evaluation fails, the next one whose
        marker exists builds the project.
    locate: the command that prints the folder of the lock file that the tool reads, or a file in it; empty if that is
        certain.
    lock: the contents of lock_file.
    dependencies: the provenance's resolvedDependencies, or None if only an evaluation finds them.
    programs: those of tools.
    parameters: the internalParameters that come before lockfileHash.
    """

    name: str
    marker: str
    lock_file: str
    tools: Sequence[str] = ()
    steps: Sequence[Sequence[str]] = ()
    read: Callable[[bytes, str, str, str], Sequence[Json] | None] = lambda *_: None
    collect: Callable[[str, bytes], Artifacts] = lambda *_: []
    adapt: Callable[[str], Json] = lambda _: {}
    evaluate: "Callable[[Toolchain, str, str], Toolchain] | None" = None
    env: Strings = {}  # never changed, like those below
    fetches: int = 0
    outputs: Sequence[str] = ()
    folders: Sequence[str] = ()
    artifacts: Sequence[str] = ()
    build_type: str = BUILD_TYPE
    store: Strings = {}
    locate: Sequence[str] = ()
    lock: bytes = b""
    dependencies: Sequence[Json] | None = None
    programs: Mapping[str, Program] = {}
    parameters: Json = {}

    def adapted(self, project: str) -> "Toolchain":
        """Return this row for one project.  Raises BuildFailed SourceError."""
        return self._replace(**self.adapt(project))


@contextmanager
def _parsing(what: str, error_type: str = "SourceError") -> Iterator[None]:
    """Raise BuildFailed of error_type if the block fails because a document has an unexpected form.  what: its name."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "  # the others make no sense without it
        text = str(e).removeprefix(f"{what}: ")  # Malformed names it too
        raise BuildFailed(error_type, f"{what} has an unexpected form: {kind}{text}") from None


# Blanks and comments, and what follows them in TOML 1.1: a text with escapes, one without, a mark of inline tables, or
# the rest. Every alternative matches whatever follows, so nothing is ever tried in two ways.
_TOML_TOKEN = r"""(?sx)
    ((?:[ \t\r\n] | \#[^\n]*)*)
    ( ""\"(?:[^"\\]+|\\.?|"{1,2}(?!"))*"{0,5} | "(?:[^"\\\n]+|\\.?)*"?
    | '''(?:[^']+|'{1,2}(?!'))*'{0,5} | '[^'\n]*'?
    | [{},] | [^ \t\r\n"'{},\#]+ | \Z )
    """


def parse_toml(data: bytes) -> Json:
    """Return the contents of a file of cargo's, which reads TOML 1.1; Python before 3.15 reads TOML 1.0.

    Raises ValueError, also for a text of several lines that end with CRLF: cargo keeps them, and Python does not.
    """
    older = [" "]
    for gap, token in re.findall(_TOML_TOKEN, data.decode("utf-8-sig")):
        if token.startswith('"'):
            token = re.sub(
                r"(?s)\\.", lambda escape: {r"\e": r"\u001b", r"\x": r"\u00"}.get(escape[0], escape[0]), token
            )
        if older[-1] == "," and token == "}":
            older.pop()
        elif older[-1] not in "{," and token not in "},":
            older.append(gap)
        # A time without seconds. Only texts contain carriage returns, and the second one is refused.
        older.append(re.sub(r"^([^\"':]*:\d\d)(?!:)", r"\1:00", token.replace("\r", "\r\r")))
    return tomllib.loads("".join(older))


def _read_toml(path: str) -> Json:
    """Return the contents of a file of cargo's; {} if it cannot be read, which cargo reports if it matters."""
    with suppress(OSError, UsageError, ValueError, RecursionError):
        if isfile(path):  # a pipe would block
            return parse_toml(read_limited(path, MIB))
    return {}


def _with_above(folder: str) -> list[str]:
    """Return folder and those above it, up to the source root "", to which they are relative."""
    return [folder, *_with_above(dirname(folder))] if folder else [""]


def _find_workspace(root: str, folder: str) -> str:
    """Return the folder of the workspace that the cargo package in folder belongs to, as far as it can be read.

    It is folder itself or one above. Its Cargo.lock is the only one that cargo reads.  [CARGO: workspaces]
    Both are relative to root, which a workspace does not lie above.
    """

    def names(key: str) -> bool:
        paths = table.get(key, ()) if isinstance(table, dict) else ()
        return any(isinstance(path, str) and f"{inner}/".startswith(normpath(path) + "/") for path in paths)

    if not isfile(join(root, folder, "Cargo.toml")):
        return folder
    own = _read_toml(join(root, folder, "Cargo.toml"))
    package = own.get("package")
    pointer = package.get("workspace") if isinstance(package, dict) else None
    if isinstance(pointer, str):
        place = _locate(root, folder, pointer)
        return folder if place is None else place
    for place in _with_above(folder):
        table = (own if place == folder else _read_toml(join(root, place, "Cargo.toml"))).get("workspace")
        inner = relpath(folder or ".", place or ".")
        if table is not None:
            return folder if names("exclude") and not names("members") else place
    return folder


def _find_module(root: str, folder: str) -> str:
    """Return the folder whose go.mod counts in folder: itself or one above, up to root.  [GO: modules]"""
    return next((place for place in _with_above(folder) if isfile(join(root, place, "go.mod"))), folder)


def _find_rows(root: str, folder: str) -> list[Toolchain]:
    """Return TOOLCHAINS with the paths of their files as seen from the project in folder.

    Those of a cargo package lie in the folder of its workspace, and those of a go package in that of its module.
    """
    places, rows = {"cargo": _find_workspace(root, folder), "go": _find_module(root, folder)}, []
    is_inner = folder or places["cargo"]  # at the top of the source there is no other lock file that a tool could read
    for row in TOOLCHAINS:
        place = relpath(join(root, places.get(row.name, folder)), join(root, folder))
        marker, lock = (normpath(join(place, file)) for file in (row.marker, row.lock_file))
        rows.append(row._replace(marker=marker, lock_file=lock, locate=row.locate if is_inner else ()))
    return rows


def detect_toolchains(root: str, name: str = "", folder: str = "") -> list[Toolchain]:
    """Return those of TOOLCHAINS whose marker is a regular file of a project, in their order.  [CONTRACT 2.1]

    name: of the only one to return, or empty.
    folder: of the project in the source root, without links.
    Raises BuildFailed UnsupportedToolchainError if there is none.
    """

    def is_regular(path: str) -> bool:
        return isfile(path) and not islink(path)

    def with_marker(rows: Iterable[Toolchain], project: str) -> list[Toolchain]:
        return [row for row in rows if is_regular(join(project, row.marker))]

    project = normpath(join(root, folder))
    every = _find_rows(root, folder)
    rows = [row for row in every if name in ("", row.name)]
    found = with_marker(rows, project)
    if found:
        return found
    if not rows:
        names = ", ".join(toolchain.name for toolchain in TOOLCHAINS)
        raise BuildFailed("UnsupportedToolchainError", f"no toolchain is called {name[:40]!r}, expected {names}")
    near = [row.marker for row in with_marker(every, project)]
    near += [f"{row.marker}: a link, expected a file" for row in every if islink(join(project, row.marker))]
    near += [f"{file}: {advice}" for file, advice in _NEAR.items() if is_regular(join(project, file))]
    below = [path for path in match_files(project, "*/*") if basename(path) in [row.marker for row in TOOLCHAINS]]
    near += [f"{path}: --subdir {join(folder, dirname(path))} builds it" for path in below[:3]]
    message = f"the project has none of {', '.join(row.marker for row in rows)}; found " + (
        "; ".join(near) or "no file that one of these can be made from"
    )
    failure = BuildFailed("UnsupportedToolchainError", message)
    for path in (normpath(join(project, above)) for above in ("../../../..", "../../..", "../..", "..")):
        if with_marker(TOOLCHAINS, path):  # the last one counts
            inside = relpath(project, path)
            inner = ["--subdir", inside] * (with_marker(_find_rows(path, inside), project) != [])
            failure.hint = f"`{shlex.join(['confbuild', 'build', path, *inner])}` builds what is there"
    raise failure


def read_inputs(toolchain: Toolchain, root: str, folder: str, commit: str) -> Toolchain:
    """Return the plan of a project without its programs.

    folder: of the project in the source root.
    commit: of the source, or "".
    Raises BuildFailed.
    """
    project = join(root, folder)
    plan = toolchain.adapted(project)
    lock = read_lockfile(join(project, plan.lock_file))
    return plan._replace(lock=lock, dependencies=plan.read(lock, root, folder, commit))


def prepare(toolchain: Toolchain, root: str, folder: str, env: Strings, emit: Emit, commit: str) -> Toolchain:
    """Return the plan of a project with its programs, their environment and the result of an evaluation.

    folder: of the project in the source root.
    env: of the build.
    emit: called with a phase and its messages.
    commit: of the source, or "".
    Raises BuildFailed.
    """
    plan, project = read_inputs(toolchain, root, folder, commit), normpath(join(root, folder))

    def own_env() -> dict[str, str]:
        words = {"project": project, "home": env.get("HOME", ""), **programs}
        return {name: value.format(**words).removeprefix("v") for name, value in plan.env.items()}

    programs, path = dict.fromkeys(plan.tools, Program("", "", "")), env["PATH"]
    for name in plan.tools:
        programs[name] = found = find_program(name, project, {**env, **own_env(), "PATH": path}, emit)
        # For the next one, and for programs that call these by name, if a rustup shim stands for it. Any other folder
        # would go before the ones that come first in PATH, and may hold another npm or pnpm.
        if shutil.which(name, path=path) != found.path:
            path = dirname(found.path) + os.pathsep + path
    plan = plan._replace(env={**env, "PATH": path, **own_env()}, programs=programs)
    if plan.locate:  # a reading of our own is in doubt
        tool, *options = plan.locate
        status, output, _ = capture([programs[tool].path, *options], project, plan.env, MIB, untrusted=True)
        used = output.decode("utf-8", "replace").strip()
        used = used if isdir(used) else dirname(used)
        # If it fails, so will the build; versions of cargo before 1.48 lack the option.
        if status == 0 and isabs(used) and realpath(used) != realpath(dirname(join(project, plan.lock_file))):
            raise BuildFailed(
                "ProvenanceError", f"{tool} reads the lock file in {used}, not {join(folder, plan.lock_file)}"
            )
    return plan.evaluate(plan, root, folder) if plan.evaluate else plan


def without_colours(text: str) -> str:
    """Return text without the sequences that set colours; some programs print them to pipes, too."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def find_program(name: str, project: str, env: Strings, emit: Emit) -> Program:
    """Return the program that runs when name is called in project.  [CONTRACT 2.2]

    A rustup shim is replaced by the program that rustup chooses in this directory. If rustup lacks the toolchain that
    the project names, it installs it below HOME, which only this build has.
    Raises BuildFailed UnsupportedToolchainError if the program is not installed or does not print its version.
    """

    def ask(*argv: str, **more: str) -> str:
        try:
            status, output, errors = capture(argv, project, {**env, **more}, 64 * KIB, untrusted=True)
        except OSError as e:
            advice = "; --readable DIR lets builds read its folder" * (e.errno == errno.EACCES)
            raise BuildFailed("UnsupportedToolchainError", f"cannot run {argv[0]}: {e.strerror}{advice}") from None
        line = without_colours(output.decode("utf-8", "replace")).strip().partition("\n")[0]
        if status == 0 and line.isprintable() and line:
            return line
        lines = errors.splitlines() or [f"exit status {status}, expected one line of text"]
        # rustup and pnpm continue with advice.
        reason = next((line.strip() for line in lines if re.match("(?i) *error", line)), lines[-1])
        raise BuildFailed("UnsupportedToolchainError", f"`{' '.join(argv)}` failed: {reason}")

    found = shutil.which(name, path=env["PATH"])
    if found is None:
        raise BuildFailed("UnsupportedToolchainError", f"{name} is not installed on the builder")
    path = abspath(found)
    for link in (found, realpath(found)):  # a shim is a hard or symbolic link to the rustup in the same folder
        rustup = join(dirname(link), "rustup")
        if exists(rustup) and samefile(rustup, found):
            try:
                path = ask(rustup, "which", name, RUSTUP_AUTO_INSTALL="0")
            except BuildFailed as e:
                if "is not installed" not in str(e):
                    raise
                if env.get("RUSTUP_AUTO_INSTALL") == "0":
                    raise BuildFailed(e.error_type, f"{e}, and RUSTUP_AUTO_INSTALL=0 forbids installing it") from None
                own = join(env["HOME"], ".rustup")
                if not exists(own):  # it takes a while
                    emit("init", [f"Installing the toolchain for this build: {e}"])
                write_file(join(own, "settings.toml"), b'version = "12"\nprofile = "minimal"\n')
                try:
                    path = ask(rustup, "which", name, RUSTUP_AUTO_INSTALL="1", RUSTUP_HOME=own)
                except BuildFailed as failure:
                    raise BuildFailed(e.error_type, f"{e}; its installation failed: {failure}") from None
            path = realpath(path)
            break
    return Program(path, ask(path, *_VERSION_OPTIONS.get(name, ("--version",))), file_sha256(path))


def refuse_outside_influence(project: str) -> None:
    """Raise BuildFailed SourceError if a file in a folder above project would change the build.  [CONTRACT 2.2]"""
    for folder in _with_above(dirname(realpath(project))[1:]):
        for path in (join("/", folder, name) for name in _OUTSIDE):
            if lexists(path):
                raise source_error(f"{path} is outside of the source and would change the build")


def read_lockfile(path: str) -> bytes:
    """Return the contents of a lock file, or no bytes if it does not exist.

    Raises BuildFailed SourceError if path is not a regular file of at most 64 MiB.
    """
    try:
        data = read_regular(path, _MAX_LOCKFILE + 1)
    except FileNotFoundError:
        return b""
    except Malformed as e:
        raise source_error(str(e)) from None
    if len(data) > _MAX_LOCKFILE:
        raise source_error(f"{basename(path)}: more than {_MAX_LOCKFILE} bytes")
    return data


def match_files(root: str, pattern: str) -> list[str]:
    """Return the paths, relative to root, that match pattern in the way of a shell. No symbolic link is followed."""
    paths = [""]
    for part in (part for part in pattern.split("/") if part not in ("", ".")):
        folders = [path for path in paths if isdir(join(root, path))]
        found = [join(path, name) for path in folders for name in fnmatch.filter(os.listdir(join(root, path)), part)]
        paths = [path for path in found if not islink(join(root, path))]
    return sorted(filter(None, paths))


def find_artifacts(project: str, folders: Sequence[str], pattern: str) -> Artifacts:
    """Return (name, path) of the files and directories of project that match, sorted by name.  [CONTRACT 2.1]

    project: its real path before the build.
    folders: relative to project, with * for any name; "" is the project.
    pattern: relative to each folder.
    Raises BuildFailed ProvenanceError if the build replaced a part of a folder's path by a symbolic link.
    """
    found = []
    for folder in folders:
        path = join(project, folder).rstrip("/")
        if realpath(path) != path:
            raise BuildFailed(
                "ProvenanceError",
                f"{folder or 'the project'} is a symbolic link to {realpath(path)}, "
                "expected a directory that the build made",
            )
        for path in (join(project, match) for match in match_files(project, f"{folder}/{pattern}")):
            if isfile(path) or isdir(path):
                found.append((basename(path) + ".tar.gz" * isdir(path), path))
    return sorted(found)


def _is_executable(path: str) -> bool:
    return isfile(path) and os.stat(path).st_mode & 0o111 != 0


def collect_cargo(project: str, _: bytes) -> Artifacts:
    """Return (name, path) of each executable for which cargo was asked: without an extension, or .exe.

    With build.target, cargo puts them in target/TRIPLE/release.
    """
    return [
        (name, path)
        for name, path in find_artifacts(project, _CARGO_FOLDERS, "*")
        if re.fullmatch(r"(?s)(?!\.)([^.]*|.*\.exe)", name) and _is_executable(path)
    ]


def cargo_dependencies(lock: bytes, root: str, folder: str = "", commit: str = "") -> list[Json]:
    """Return the resolvedDependencies of a Cargo.lock, sorted by uri.  [CONTRACT 3.5]

    A package without a source must lie inside root, where the tree hash covers it. It has an entry if it lies outside
    of the workspace, and commit, the one of the source, is not empty.
    Raises BuildFailed ProvenanceError for an entry that cannot be recorded, SourceError for an invalid file.
    """
    with _parsing("Cargo.lock"):
        doc = parse_toml(lock)
        older = doc.get("metadata", {}).get  # before version 2 of the format, a table of its own held the checksums
        packages = doc.get("package", [])
        # As `replace` names them: without the commit. cargo ignores a name of nothing.
        ids = {
            f"{p['name']} {p['version']} ({str(p.get('source', '')).partition('#')[0]})".removesuffix(" ()")
            for p in packages
        }
        rows = [
            (p["name"], p["version"], p.get("source"), p.get("checksum"))
            for p in packages
            if p.get("replace") not in ids  # else that entry is compiled in its place
        ]
        if not all(isinstance(text, str) or text is None for row in rows for text in row):
            raise ValueError("name, version, source and checksum must be strings")
    found, workspace = [], join("/", _find_workspace(root, folder))
    inside, replaced, outside = _scan_cargo(root, folder, {row[0] for row in rows})
    for name, version, source, checksum in rows:
        if source is None:
            if name in outside or name not in inside:
                why = f": {outside[name][:80]}" if name in outside else ", as far as its files are TOML 1.1, and"
                raise BuildFailed(
                    "ProvenanceError",
                    f"Cargo.lock: {name[:80]} {version[:80]} has no source and is not a package inside the "
                    f"project{why} {_NOT_SENT}",
                )
            place, *others = inside[name]
            place = relpath(join("/", place), workspace)
            if not commit or others or not f"{place}/".startswith("../"):
                continue
            source = f"git+file:{urllib.parse.quote(place)}#{commit}"
        checksum = checksum or older(f"checksum {name} {version} ({source})")
        dependency = _cargo_dependency(name, version, source, checksum)
        place, vendored = replaced.get((name, "")) or replaced.get((name, version), ("", False))
        path = join(root, place)
        if place and not (vendored and _is_genuine(path, checksum)):
            uri = f"pkg:cargo/{name}@{version}?path={urllib.parse.quote(place)}"
            dependency = descriptor(name, git_tree(path, walk_files(path), "sha256"), uri=uri)
        found.append(dependency)
    return sorted(found, key=lambda dependency: str(dependency["uri"]))


def _is_genuine(folder: str, checksum: str | None) -> bool:
    """Return whether folder, made by `cargo vendor`, holds exactly the files of the package with this checksum."""
    files = {name: join(folder, name) for name in walk_files(folder)}
    # A checksum is missing for git repositories: nothing would tie the files to the commit.
    if checksum is None or any(map(islink, files.values())):
        return False
    found = {name: file_sha256(path) for name, path in files.items() if isfile(path)}
    found.pop(".cargo-checksum.json", None)
    with suppress(Malformed, BuildFailed):
        doc = parse_json(read_lockfile(join(folder, ".cargo-checksum.json")), "checksums")
        return bool(doc == {"files": found, "package": checksum})
    return False


def _cargo_dependency(name: str, version: str, source: str, checksum: Any) -> Json:
    """Return one entry of resolvedDependencies.  Raises BuildFailed ProvenanceError, which names the entry."""
    kind, _, url = source.partition("+")
    algorithm, digest, form, missing = "sha256", str(checksum), "[0-9a-f]{64}", "checksum"
    if kind == "git":
        url, _, digest = url.rpartition("#")
        algorithm, form, missing = "gitCommit", _OBJECT.pattern, "commit"
    for pattern, text, problem in (
        (
            r"[A-Za-z0-9_-]+ [0-9A-Za-z.+-]+",
            f"{name} {version}",
            f"invalid package name or version: {name[:80]!r} {version[:80]!r}",
        ),
        (
            "registry|sparse|git",
            kind,
            f"{name} {version} has the unknown source {source[:80]!r}, expected registry+, sparse+ or git+",
        ),
        (form, digest, f"{name} {version} has no {missing}"),
        (r"[\x21-\x7e]+", url, f"{name} {version} has a source whose URL is not printable ASCII"),
    ):
        if not re.fullmatch(pattern, text):
            raise BuildFailed("ProvenanceError", f"Cargo.lock: {problem}")
    url = re.sub(r"^([A-Za-z0-9+.-]+://)[^/?#]*@", r"\1", url)  # without credentials
    url = re.sub("[?#&]", lambda match: f"%{ord(match[0]):02X}", url)
    query = f"vcs_url=git+{url}@{digest}" if kind == "git" else f"checksum=sha256:{digest}"
    if kind != "git" and source not in _CRATES_IO:  # without repository_url, a purl means its type's default registry
        query += f"&repository_url={url}"
    return descriptor(name, digest, algorithm, uri=f"pkg:cargo/{name}@{version}?{query}")


def _locate(root: str, folder: str, target: str) -> str | None:
    """Return the path of target relative to root, "" if it is root, None if it lies outside.

    folder: target is relative to it.
    """
    if "\0" in target:
        return None
    base, real = realpath(root), realpath(join(root, folder, target))
    if commonpath((real, base)) != base:
        return None
    return "" if real == base else relpath(real, base)


def _read_settings(root: str, folder: str) -> list[tuple[str, str, Json]]:
    """Return (name, folder, contents) of the configuration files of cargo in the source that apply in folder.

    Raises BuildFailed for what cargo may read otherwise.  [CARGO: config, "hierarchical structure"]
    """
    found = list[tuple[str, str, Json]]()
    for place in _with_above(folder):
        home = join(place, ".cargo")
        names = [name for name in (join(home, "config"), join(home, "config.toml")) if lexists(join(root, name))]
        for name in names[:1]:  # cargo prefers the one without a suffix
            if islink(join(root, home)) or islink(join(root, name)):
                raise BuildFailed("ProvenanceError", f"{name}: a link, expected a file in a folder")
            with _parsing(name):
                found.append((name, place, parse_toml(read_lockfile(join(root, name)))))
    return found


def _replaced_folders(root: str, settings: Sequence[tuple[str, str, Json]]) -> dict[str, bool]:
    """Return the folders that cargo compiles in place of packages: folder -> whether a directory source.

    settings: from _read_settings.
    Raises BuildFailed ProvenanceError.
    """
    found = dict[str, bool]()
    with _parsing(".cargo/config.toml"):
        used = {str(source.get("replace-with")) for _, _, doc in settings for source in doc.get("source", {}).values()}
        used |= {"crates-io"}  # a folder of this name takes the place of the registry by itself
        for name, base, doc in settings:
            if "include" in doc or "lockfile-path" in doc.get("resolver", {}):
                raise BuildFailed(
                    "ProvenanceError",
                    f"{name}: include and resolver.lockfile-path are refused: they name more settings and another lock "
                    "file",
                )
            sources = doc.get("source", {}).items()
            rows = [(k, s[k], title in used) for title, s in sources for k in ("directory", "local-registry") if k in s]
            for kind, target, is_used in (*rows, *(("paths", target, True) for target in doc.get("paths", ()))):
                where = _locate(root, base, target)
                if where is None:
                    raise BuildFailed("ProvenanceError", f"{name}: {kind} leads to {target}, outside of the source")
                path = join(root, where)
                inside = os.listdir(path) if kind == "directory" and isdir(path) else ()
                if any(islink(join(path, entry)) for entry in inside):
                    raise BuildFailed("ProvenanceError", f"{name}: {target} contains links")
                if is_used:
                    found[where] = kind == "directory"
    return found


def _outside_paths(root: str, folder: str, doc: Json) -> dict[str, str]:
    """Return the packages outside of root that a file of cargo's in folder names, with their paths."""
    found, tables = dict[str, str](), [doc]
    for owner in (doc.get("package"), doc.get("workspace")):
        if isinstance(owner, dict):
            owner.pop("metadata", None)  # of other programs: packagers name paths of installed systems there
    for table in tables:  # it grows: `name = { path = ... }` may stand anywhere
        for key, value in table.items():
            if isinstance(value, dict):
                tables.append(value)
                target = value.get("path")
                if isinstance(target, str) and _locate(root, folder, target) is None:
                    found[str(value.get("package", key))] = target
    return found


def _scan_cargo(
    root: str, folder: str, locked: set[str]
) -> tuple[dict[str, list[str]], dict[tuple[str, str], tuple[str, bool]], dict[str, str]]:
    """Return the packages inside root, those that cargo compiles in place of others, and those that a file of cargo's
    takes from outside of root.

    The first are name -> folders. The second are (name, version) -> (folder, whether that is a copy of the package by
    `cargo vendor`), without a version for packages of any version. The third are name -> path.
    [CARGO: overriding dependencies, source replacement]
    Raises BuildFailed ProvenanceError if cargo would compile a folder outside of root.
    folder: in which cargo runs.
    locked: the names in Cargo.lock. What other packages of root, such as templates, name is not compiled.
    """
    packages, outside, settings = [], dict[str, str](), _read_settings(root, folder)
    for base in (dirname(name) for name in walk_files(root) if basename(name) == "Cargo.toml"):
        doc, name, version = _read_toml(join(root, base, "Cargo.toml")), "", ""
        package = doc.get("package", doc.get("project"))  # cargo still accepts the older name
        if isinstance(package, dict):
            name, version = str(package.get("name")), str(package.get("version"))
        if name or not doc:
            packages.append((name, version, base))
        if not name or name in locked or "workspace" in doc:  # its members inherit from it
            outside |= _outside_paths(root, base, doc)
    for _, base, doc in settings:
        outside |= _outside_paths(root, base, doc)
    replaced, folders = dict[tuple[str, str], tuple[str, bool]](), _replaced_folders(root, settings)
    inside = dict[str, list[str]]()
    for name, version, place in packages:
        inside.setdefault(name, []).append(place)
        # cargo searches the folders of paths, and replaces any version.
        above = _with_above(place)
        kinds = [vendored for where, vendored in folders.items() if where in ([dirname(place)] if vendored else above)]
        if not name and (kinds or place in (folder, _find_workspace(root, folder))):  # it may name any package
            raise BuildFailed(
                "ProvenanceError",
                f"{join(place, 'Cargo.toml')} cannot be read as TOML 1.1 of at most 1 MiB, so what it replaces is not "
                "known",
            )
        exact = re.fullmatch(r"\d\S*", version)  # cargo strips blanks, and asks the workspace for one that is inherited
        for vendored in kinds:
            copy = (place or ".", vendored)
            other = replaced.setdefault((name, version if vendored and exact else ""), copy)
            if other != copy and name in locked:  # settings outrank others, and cargo takes any of a folder
                raise BuildFailed(
                    "ProvenanceError", f"{other[0]} and {copy[0]} are both {name} {version}; remove one of them"
                )
    return inside, replaced, outside


def wider_source(root: str, folder: str) -> tuple[str, str]:
    """Return (source root, folder in it) of a cargo project: of the git work tree around it if it needs more of that.

    That is so if its Cargo.toml names packages in folders outside of root, and all of them lie in this work tree.
    """
    outside = _outside_paths(root, folder, _read_toml(join(root, folder, "Cargo.toml"))).values()
    top = realpath(root)
    while not lexists(join(top, ".git")):
        if top == dirname(top):
            return root, folder
        top = dirname(top)
    inner = relpath(realpath(join(root, folder)), top)
    if outside and all(_locate(top, inner, target) is not None for target in outside):
        return top, inner
    return root, folder


def evaluate_nix(plan: Toolchain, root: str, folder: str) -> Toolchain:
    """Return plan with the dependencies that nix finds.  Raises BuildFailed.

    A flake without inputs needs no flake.lock.

    The source's .git is moved away: with it, nix builds the files that git knows instead of those that were hashed,
    and refuses a history of depth 1.
    """
    program, lock = plan.programs["nix"], join(root, folder, "flake.lock")
    release = [int(digits) for digits in re.findall(r"\d+", program.version.rpartition(")")[2])] or [99]
    git, aside = join(root, ".git"), join(dirname(root), "history-set-aside")
    if lexists(git):
        os.rename(git, aside)
    show = "derivation show" if release >= [2, 15] else "show-derivation"
    argv = [program.path, *show.split(), "--recursive", *_NIX_FEATURES]
    status, output, errors = capture(argv, join(root, folder), plan.env, GIB, untrusted=True)
    if status != 0:  # another toolchain may follow: leave everything as it was
        if lexists(aside):
            os.rename(aside, git)
        remove_tree(lock)
        if plan.lock:
            write_file(lock, plan.lock)
        reasons = re.findall(r"(?m)^\s*(error:.*)", errors) or re.findall(r"(?m)\S.*", errors) or ["no message"]
        raise BuildFailed("BuildError", f"`nix {show}` failed: {reasons[-1]}")
    if read_lockfile(lock) != plan.lock:
        raise BuildFailed("ProvenanceError", "flake.lock is missing or out of date: run `nix flake lock` and commit it")
    count, fetches = parse_derivations(output)
    evaluation, inputs = {"derivationCount": count, "fetchCount": len(fetches)}, flake_inputs(plan.lock)
    parameters = {"evaluation": evaluation, **({"flakeInputs": inputs} if inputs else {})}
    command = [*plan.steps[0], "--print-out-paths" if release >= [2, 9] else "--json", *_NIX_FEATURES]
    return plan._replace(steps=[command], dependencies=fetches, parameters=parameters)


def parse_derivations(data: bytes) -> tuple[int, list[Json]]:
    """Parse the output of `nix derivation show --recursive`, in each of its forms since nix 2.8.  [CONTRACT 3.5]

    Return the number of derivations, and the fixed-output ones as resolvedDependencies, sorted by name.
    Raises BuildFailed ProvenanceError.
    """
    with _parsing("the output of `nix derivation show`", "ProvenanceError"):
        doc = json.loads(data)
        doc = doc.get("derivations", doc)  # nix 2.33 and later wrap the table
        fetches = []
        for path, derivation in doc.items():
            output = next((output for _, output in sorted(derivation["outputs"].items()) if output.get("hash")), None)
            if not output:
                continue
            env = {**derivation.get("env", {}), **(derivation.get("structuredAttrs") or {})}
            plain = re.sub(r"^[0-9a-z]{32}-|\.drv$", "", basename(path))
            name = derivation.get("name") or env.get("name") or plain
            recursive, _, algorithm = output.get("hashAlgo", "").rpartition(":")  # r:sha256 before nix 2.23
            algorithm, digest = _parse_hash(output["hash"], algorithm)
            annotations = {
                "drvPath": path,
                "outputHashMode": output.get("method") or ("nar" if recursive == "r" else "flat"),
            }
            if not isinstance(name + annotations["outputHashMode"], str):
                raise TypeError("name and method must be strings")
            for key in ("url", "urls"):
                value = env.get(key)
                value = value.get("value") if isinstance(value, dict) else value
                if value:
                    annotations[key] = ",".join(value) if isinstance(value, list) else str(value)
            uri = f"pkg:nix-fetch/{name}?hash={algorithm}:{digest}"
            fetches.append({"annotations": annotations, **descriptor(name, digest, algorithm, uri=uri)})
        return len(doc), sorted(fetches, key=lambda fetch: (fetch["name"], fetch["annotations"]["drvPath"]))


def _parse_hash(value: Any, algorithm: str = "") -> tuple[str, str]:
    """Return (algorithm, digest in hexadecimal).  Raises ValueError, KeyError, TypeError or AttributeError.

    value: hexadecimal digits of algorithm, an SRI string [SRI], or an object with the keys algorithm and hash.
    """
    if isinstance(value, dict):
        algorithm, value = value["algorithm"], value["hash"]
    if "-" in value:
        algorithm, _, value = value.partition("-")
    size = hashlib.new(algorithm, usedforsecurity=False).digest_size
    raw = bytes.fromhex(value) if len(value) == 2 * size else base64.b64decode(value, validate=True)
    if len(raw) != size:
        raise ValueError(f"{value[:100]!r} has {len(raw)} bytes, expected {size} for {algorithm}")
    return algorithm, raw.hex()


def flake_inputs(lock: bytes) -> list[Strings]:
    """Return name and narHash of the flake's direct inputs, sorted by name.  lock: a flake.lock, or no bytes.

    Raises BuildFailed SourceError.
    """
    with _parsing("flake.lock"):
        doc = json.loads(lock or b'{"nodes": {"": {}}, "root": ""}')
        nodes = doc["nodes"]
        return [
            {"name": name, "narHash": str(digest)}
            for name, node in sorted(nodes[doc["root"]].get("inputs", {}).items())
            # An input that follows another one is a list, and has no node of its own.
            if isinstance(node, str)
            for digest in [nodes[node].get("locked", {}).get("narHash")]
            if digest
        ]


def collect_nix(_: str, stdout: bytes) -> Artifacts:
    """Return (name, path) of each executable in bin/ of each output that nix printed.  [CONTRACT 2.1]

    stdout: one path per line, or JSON.
    """
    text = stdout.decode("utf-8", "replace").strip()
    outputs = text.split("\n")
    if text.startswith("["):
        outputs = [path for row in json.loads(text) for path in row["outputs"].values()]
    found = []
    for output in filter(None, outputs):
        folder = join(output, "bin")
        for name in os.listdir(folder) if isdir(folder) else ():
            path = realpath(join(folder, name))
            # Otherwise it is a link out of the store.
            if path.startswith(dirname(output) + "/") and _is_executable(path):
                found.append((name, path))
    return sorted(found)


# What pnpm writes of YAML 1.2: nested mappings, lists of texts, and one-line flow collections of texts.
_YAML_TEXT = r"""(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|(?:[^\s\-?:,\[\]{}#&*!|>'"%%@`]|[-?:](?=[^\s,\[\]{}]))%s*)"""
_YAML_KEY, _YAML_WORD = _YAML_TEXT % r"(?:(?!:\s|:$|\s\#).)", _YAML_TEXT % r"(?:(?!:\s|\s\#)[^,\[\]{}])"
_YAML_PAIR = f"({_YAML_WORD}): ({_YAML_WORD})"
_YAML_LIST = rf"\[(?:{_YAML_WORD}(?:, {_YAML_WORD})*)?\]"
_YAML_VALUE = rf"{_YAML_KEY}|[|>][+-]?|{_YAML_LIST}|\{{(?:{_YAML_PAIR}(?:, {_YAML_PAIR})*)?\}}"
_YAML_LINE = rf"( *)(?:- {_YAML_KEY}|({_YAML_KEY}):(?: ({_YAML_VALUE}))?)"


def parse_lock_yaml(data: bytes) -> Json:
    """Return the mappings of a pnpm-lock.yaml; every scalar is text, and lists are skipped.

    Raises ValueError for everything that pnpm does not write.
    """

    def scalar(text: str) -> str:
        if text.startswith("'"):
            return text[1:-1].replace("''", "'")
        return str(json.loads(text)) if text.startswith('"') else text

    top: dict[str, Any] = {}
    open_mappings, folded = [top], MIB  # the outermost first; lines deeper than folded belong to a text
    for number, line in enumerate(data.decode("utf-8").split("\n"), 1):
        depth = len(line) - len(line.lstrip(" "))
        if not line.strip() or depth > folded:
            continue
        folded, match = MIB, re.fullmatch(_YAML_LINE, line)
        if match and match[2] is None:
            continue  # an item of a list
        del open_mappings[depth // 2 + 1 :]
        mapping = open_mappings[-1]
        if not match or depth != 2 * len(open_mappings) - 2 or scalar(match[2]) in mapping:
            raise ValueError(f"line {number} is not what pnpm writes: {line[:80]!r}")
        value: Any = match[3] or {}
        if not value:
            open_mappings.append(value)
        elif value[0] == "{":
            value = {scalar(key): scalar(word) for key, word in re.findall(_YAML_PAIR, value)}
        elif value[0] in "|>":
            folded = depth
        mapping[scalar(match[2])] = scalar(value) if isinstance(value, str) else value
    return top


# Settings in pnpm-workspace.yaml, and escapes that may hide one. Lines that are comments do not count, but those with a
# quotation mark do: what begins like a comment may be the end of a text.
_PNPM_REFUSED = rb"""(?imx)
    ^ (?! [ \t]* \# [\t\x20!\#-&(-~]* \r? $ ) .*? (
    lockfile-?dir | branch-?lockfile | workspace-?lockfile | store-?dir | modules-?dir | node-?version
    | \\[ux] | \\(?=[\r\n]) )
    """


def pnpm_dependencies(lock: bytes, root: str, folder: str = "", _: str = "") -> list[Json]:
    """Return the resolvedDependencies of a pnpm-lock.yaml, exactly as [K] writes them.  [CONTRACT 3.5]

    Raises BuildFailed SourceError, also if settings of pnpm could name another lock file.
    """
    found = {}
    for path in (join(place, "pnpm-workspace.yaml") for place in _with_above(folder)):
        setting = re.search(_PNPM_REFUSED, read_lockfile(join(root, path)))
        if setting:
            raise source_error(
                f"{path}: {setting[1].decode()}: settings that may name another lock file, store, node_modules or node "
                "are refused"
            )
    for name in walk_files(root):
        path, matches = join(root, name), re.fullmatch(r"(?!.*node_modules/)(.*/)?package\.json", name)
        if matches and isfile(path) and b'"executionEnv"' in read_limited(path, GIB):
            raise source_error(f"{name}: executionEnv is refused: pnpm would fetch and run another node")
    with _parsing("pnpm-lock.yaml"):
        # pnpm 11 describes in a document of its own what it needs before it can install.
        for doc in map(parse_lock_yaml, lock.removeprefix(b"---\n").split(b"\n---\n")):
            if not doc["lockfileVersion"].startswith("9."):
                raise ValueError(
                    f"lockfileVersion is {doc['lockfileVersion']}, expected 9.0 of `pnpm install` of pnpm 9"
                )
            for key, entry in doc.get("packages", {}).items():
                resolution = entry.get("resolution", {})
                digest, tarball = resolution.get("integrity"), resolution.get("tarball", "")
                match = re.fullmatch("(@?[^@]+)@(.*)", key.partition("(")[0])
                kind = resolution.get("type", "tarball")
                if kind == "directory" and _locate(root, folder, resolution["directory"]) is not None:
                    continue  # the tree covers it
                if not match or kind != "tarball" or not (digest or "codeload.github.com" in tarball):
                    raise ValueError(
                        f"{key}: has neither an integrity nor a tarball of codeload.github.com, or is of another type"
                    )
                uri = f"pkg:npm/{match[1]}@{match[2]}?checksum={digest}" if digest else tarball
                # Without a digest, the commit.
                found[uri] = descriptor(match[1], digest or tarball.rpartition("/")[2], "sha512", uri=uri)
    return [found[uri] for uri in sorted(found)]


def _add_headers(plan: Toolchain, root: str, folder: str) -> Toolchain:
    """Return plan with the headers of node, if it has any: native addons are compiled without a network."""
    prefix = dirname(dirname(realpath(plan.programs["node"].path)))
    return plan._replace(env={"npm_config_nodedir": prefix, **plan.env}) if isdir(f"{prefix}/include/node") else plan


def adapt_npm(project: str) -> Json:
    """Return the steps `npm ci && npm run build`, or with `npm pack` if package.json has no script called build.

    Scripts run without a network, after everything is fetched. Without a script called build, dist is source.
    npm prefers an npm-shrinkwrap.json to the package-lock.json.
    Raises BuildFailed SourceError.
    """
    with _parsing("package.json"):
        scripts = dict(json.loads(read_lockfile(join(project, "package.json")) or b"{}").get("scripts", {}))
    builds = "build" in scripts
    steps = [
        "npm ci --ignore-scripts",
        "npm rebuild",
        *["npm run prepare"] * (builds and "prepare" in scripts),
        "npm run build" if builds else "npm pack",
    ]
    return {
        "steps": [*map(str.split, steps)],
        "outputs": ("node_modules", _OWN_OUTPUT, *["dist"] * builds),
        "lock_file": "npm-shrinkwrap.json" if isfile(join(project, "npm-shrinkwrap.json")) else "package-lock.json",
        "artifacts": [*["dist"] * builds, f"{_OWN_OUTPUT}/*.tgz"],
        "evaluate": _add_headers,
    }


def npm_dependencies(lock: bytes, root: str, folder: str = "", _: str = "") -> list[Json]:
    """Return the resolvedDependencies of a package-lock.json, sorted by uri.  [CONTRACT 3.5]

    A package inside project, or inside the tarball of another, has no entry.
    Raises BuildFailed SourceError.
    """
    found = {}
    with _parsing("package-lock.json"):
        doc = json.loads(lock)
        if doc["lockfileVersion"] not in (2, 3):
            raise ValueError(
                f"lockfileVersion is {doc['lockfileVersion']!r}, expected 2 or 3 of `npm install` of npm 7"
            )
        # Those whose tarballs contain others. What the project and its workspaces bundle is fetched as usual.
        bundlers = {
            path for path, p in doc["packages"].items() if "node_modules/" in path and p.get("bundleDependencies")
        }
        for path, entry in doc["packages"].items():
            if "integrity" not in entry and "inBundle" in entry and path.rpartition("/node_modules/")[0] in bundlers:
                bundlers.add(path)
                continue
            url, version = entry.get("resolved", ""), entry.get("version", "")
            local = url.removeprefix("file:") if entry.get("link") or url.startswith("file:") else ""
            if "node_modules/" not in path or local and _locate(root, folder, local) is not None:
                continue
            name = entry.get("name", path.rpartition("node_modules/")[2])
            place, _, commit = url.partition("#")
            if url.startswith("git+"):
                algorithm, digest, query = "gitCommit", commit, f"vcs_url={without_credentials(place)}@{commit}"
            elif local or not entry.get("integrity"):
                raise ValueError(f"{path}: {url or version} has no integrity, or lies outside of the source")
            else:
                *others, integrity = sorted(entry["integrity"].split())  # sha512 after sha1
                strongest = integrity.partition("-")[0]
                if any(other.startswith(strongest) for other in others):
                    raise ValueError(f"{path}: has several hashes of {strongest}, and npm accepts any")
                algorithm, digest = _parse_hash(integrity)
                query = f"checksum={integrity}"
                if url not in ("", f"https://registry.npmjs.org/{name}/-/{name.rpartition('/')[2]}-{version}.tgz"):
                    query += f"&download_url={without_credentials(place)}"
            uri = f"pkg:npm/{name}@{version}?{query}"
            found[uri] = descriptor(name, digest, algorithm, uri=uri)
    return [found[uri] for uri in sorted(found)]


def go_dependencies(lock: bytes, root: str, folder: str = "", _: str = "") -> list[Json]:
    """Return the modules of go.mod that have a hash in go.sum, as resolvedDependencies sorted by uri.  [CONTRACT 3.5]

    Before Go 1.17, go.mod does not list every module: then all modules of go.sum.  [GO: go.mod, replace, go.sum]
    Raises BuildFailed SourceError, also if a module is replaced by a folder outside of project.
    """
    with _parsing("go.mod and go.sum"):
        lines = filter(None, map(str.split, lock.decode("utf-8").splitlines()))
        sums = dict[tuple[str, str], str]()
        for name, version, value in lines:
            if not version.endswith("/go.mod") and sums.setdefault((name, version), value) != value:
                raise ValueError(f"{name} {version} has two hashes, and go accepts any")
        module = _find_module(root, folder)
        text = read_lockfile(join(root, module, "go.mod")).decode("utf-8")
        text = re.sub(r"""(["`])([^\s\\"`]*)\1|//.*""", r"\2", text)
        if re.search('["`]', text):
            raise ValueError("go.mod has a text with an escape or a blank")
        # Each line of a block begins with its verb, then as without a block. Only a folder may have parentheses.
        block = r"(?m)^[ \t\r]*(\w+)[ \t\r]*\(([^()]*)^[ \t\r]*\)"
        text = re.sub(block, lambda match: match[2].replace("\n", f"\n{match[1]} "), text)
        rows = re.findall(r"(?m)^[ \t\r]*(\w+)[ \t\r]+(\S.*)", text)
        complete = any([*map(int, re.findall(r"\d+", row))] >= [1, 17] for verb, row in rows if verb == "go")
        replaced: dict[Any, Any] = {}
        for old, _, new in (row.partition("=>") for verb, row in rows if verb == "replace"):
            target, *release = new.split()
            if not release and _locate(root, module, target) is None:
                raise source_error(f"go.mod: {old.strip()} is replaced: {target} {_NOT_SENT}")
            replaced[tuple(old.split())] = (target, *release)
        modules = {
            replaced.get((name, version), replaced.get((name,), (name, version)))
            for name, version in (row.split() for verb, row in rows if verb == "require")
        }
        return [
            descriptor(
                name,
                base64.b64decode(sums[name, version].removeprefix("h1:"), validate=True).hex(),
                "dirHash",
                uri=f"pkg:golang/{name}@{version}?checksum={sums[name, version]}",
            )
            for name, version in sorted(sums.keys() & modules if complete else sums)
        ]


def evaluate_go(plan: Toolchain, root: str, folder: str) -> Toolchain:
    """Return plan with what collects the executables of main packages.

    Of several packages whose executables have one name, go keeps any: none of them is an artifact.
    """
    argv = [plan.programs["go"].path, "list", "-e", "-find", "-f", '{{if eq .Name "main"}}{{.Target}}{{end}}', "./..."]
    _, listed, _ = capture(argv, join(root, folder), plan.env, untrusted=True)
    names = [basename(path) for path in listed.decode("utf-8", "replace").split("\n")]

    def collect(project: str, _: bytes) -> Artifacts:
        made = [row for row in find_artifacts(project, plan.folders, "*") if _is_executable(row[1])]
        taken = [row for row in made if names.count(row[0]) < 2]
        if made and not taken:
            raise BuildFailed(
                "NoArtifacts", f"several main packages are called {made[0][0]}; --subdir builds one of them"
            )
        return taken

    return plan._replace(collect=collect)


# confbuild.toml: the argument vector, patterns of the artifacts, lock files, programs, folders to remove.
_RECIPE = {"command": [WORD], "artifacts": [WORD], "inputs?": [WORD], "programs?": [WORD], "outputs?": [WORD]}


def _read_recipe(project: str) -> Json:
    """Return the contents of confbuild.toml.  Raises BuildFailed SourceError."""
    with _parsing("confbuild.toml"):
        recipe = check_schema(parse_toml(read_lockfile(join(project, "confbuild.toml"))), _RECIPE, "confbuild.toml")
        for path in (*recipe.get("inputs", ()), *recipe.get("outputs", ())):
            if not _locate(project, "", path):
                raise ValueError(f"{path} is not a path below the project")
        if not recipe["command"]:
            raise ValueError("command is empty")
        if any("/" in program for program in recipe.get("programs", ())):
            raise ValueError("programs has a path, expected names that are looked up in PATH")
        if "kettle" in (recipe["command"][0], *recipe.get("programs", ())):
            raise ValueError("kettle is the name of confbuild itself in a provenance")
    return dict(recipe)


def adapt_own(project: str) -> Json:
    """Return what confbuild.toml says.  [CONTRACT 2.1]  Raises BuildFailed SourceError."""
    recipe = _read_recipe(project)
    command, artifacts, outputs = recipe["command"], recipe["artifacts"], recipe.get("outputs", ())
    tools = dict.fromkeys(name for name in (command[0], *recipe.get("programs", ())) if "/" not in name)
    return {"steps": [command], "tools": [*tools], "artifacts": artifacts, "outputs": outputs}


def own_dependencies(_: bytes, root: str, folder: str = "", __: str = "") -> list[Json]:
    """Return the files that confbuild.toml names as inputs, as resolvedDependencies.  [CONTRACT 3.5]

    Raises BuildFailed SourceError.
    """
    project, found = join(root, folder), []
    for name in sorted(_read_recipe(project).get("inputs", ())):
        if not isfile(join(project, name)):
            raise source_error(f"confbuild.toml: there is no input {name}")
        digest = sha256_hex(read_lockfile(join(project, name)))
        found.append(descriptor(name, digest, uri=f"file:{urllib.parse.quote(name)}?checksum=sha256:{digest}"))
    return found


_CARGO_FOLDERS = ("target/release", "target/*/release")
# What leads to a marker: file -> how.
_NEAR = {
    "Cargo.toml": "`cargo generate-lockfile` makes Cargo.lock (`git add -f Cargo.lock` if git ignores it)",
    "package.json": "`npm install --package-lock-only` makes package-lock.json",
    "npm-shrinkwrap.json": "`cp npm-shrinkwrap.json package-lock.json` makes package-lock.json",
    "yarn.lock": "`npm install --package-lock-only` makes package-lock.json",
    **dict.fromkeys(
        ("Makefile", "CMakeLists.txt", "pyproject.toml", "pom.xml", "build.gradle"),
        "a confbuild.toml says how to build the project",
    ),
}

# Whatever package.json, .npmrc and pnpm-workspace.yaml say, pnpm runs this node, reads this lock file, and installs
# nothing that the source contains. pnpm 11 reads pnpm_config_.
_PNPM_SETTINGS = """
    npm_config_use_node_version={node.version}
    npm_config_lockfile_dir={project} npm_config_lockfile_only=false
    npm_config_git_branch_lockfile=false npm_config_shared_workspace_lockfile=true
    npm_config_store_dir={home}/.pnpm-store
    npm_config_modules_dir=node_modules npm_config_virtual_store_dir=node_modules/.pnpm
"""


# The first row whose marker exists wins [CONTRACT 2.1].
# fmt: off
TOOLCHAINS = (
    Toolchain("own", "confbuild.toml", "confbuild.toml", read=own_dependencies, adapt=adapt_own,
        build_type=CONFBUILD_TYPE),
    Toolchain("nix", "flake.nix", "flake.lock", ("nix",), ["nix build --no-link".split()], collect=collect_nix,
        evaluate=evaluate_nix, store={
            "NIX_STORE_DIR": "/nix/store", "NIX_STATE_DIR": "/nix/var/nix", "NIX_LOG_DIR": "/nix/var/log/nix"}),
    Toolchain("cargo", "Cargo.lock", "Cargo.lock", ("cargo", "rustc"), ["cargo build --locked --release".split()],
        cargo_dependencies, collect_cargo, outputs=("target",), folders=_CARGO_FOLDERS,
        # These outrank the project's own .cargo/config.toml, so the compiler that was hashed runs.
        env=variables("""
            RUSTC={rustc.path} CARGO_TARGET_DIR={project}/target CARGO_BUILD_BUILD_DIR={project}/target"""),
        locate="cargo locate-project --workspace --message-format plain".split()),
    Toolchain("pnpm", "pnpm-lock.yaml", "pnpm-lock.yaml", ("pnpm", "node"),
        ["pnpm install --frozen-lockfile".split(), ["pnpm", "build"]], pnpm_dependencies,
        env=variables(_PNPM_SETTINGS + _PNPM_SETTINGS.replace("npm_", "pnpm_")
            # Whoever finds COREPACK_ROOT leaves the choice of its version to corepack: pnpm since 9, whatever the
            # source says, and so in scripts. pnpm 11 would still refuse a version that package.json does not name.
            # pnpm 12 locks its store there, or else in /tmp, whatever TMPDIR says.
            + "CI=true COREPACK_ROOT={home} pnpm_config_pm_on_fail=ignore XDG_RUNTIME_DIR={home}"),
        fetches=1, outputs=("dist", "node_modules"), artifacts=("dist",)),
    Toolchain("npm", "package-lock.json", "package-lock.json", ("npm", "node"), read=npm_dependencies, adapt=adapt_npm,
        # The last three: whatever the project's .npmrc says, it installs, and here.
        env=variables(f"""
            CI=true npm_config_audit=false npm_config_fund=false npm_config_update_notifier=false
            npm_config_pack_destination={_OWN_OUTPUT}
            npm_config_dry_run=false npm_config_package_lock_only=false npm_config_global=false"""),
        locate=("npm", "prefix"), fetches=1, build_type=CONFBUILD_TYPE),
    # Neither the builder's settings nor a workspace file change the build.
    Toolchain("go", "go.mod", "go.sum", ("go",), ["go mod download".split(),
        f"go build -trimpath -buildvcs=false -mod=readonly -o {_OWN_OUTPUT}/ ./...".split()],
        go_dependencies, evaluate=evaluate_go,
        env=variables("GOFLAGS= GOTOOLCHAIN=local GOENV=off GOWORK=off"),
        fetches=1, outputs=(_OWN_OUTPUT,), folders=(_OWN_OUTPUT,), build_type=CONFBUILD_TYPE),
)
# fmt: on


def find_outputs(directory: str, name: str, subdir: str) -> list[str]:
    """Return the paths, relative to a source, of what its build removes first.

    name: of the toolchain, or empty.
    Raises BuildFailed UnsupportedToolchainError, with a hint.
    """
    outputs = detect_toolchains(directory, name, subdir)[0].adapted(join(directory, subdir)).outputs
    return [normpath(join(subdir, output)) for output in outputs]


def read_command(command: str, directory: str) -> tuple[str, str, list[str]]:
    """Return (source, folder, words) of a buildCommand. It begins with `cd FOLDER &&`, or folder is "".  [CONTRACT 2.1]

    The command is of a stranger: shlex takes quadratic time, and no source has a deeper folder.
    directory: the source, or that very folder.
    Raises ValueError.
    """
    folder, words = "", shlex.split(command[:MAX_LINE])
    if words[:1] == ["cd"]:
        _, folder, _, *words = words
    if folder.count("/") > MAX_DEPTH:
        raise ValueError(f"{folder[:80]!r} lies deeper than {MAX_DEPTH} folders")
    above = realpath(directory).removesuffix(f"/{folder}")
    if isdir(directory) and not isdir(join(directory, folder)):
        directory = above
    return directory, folder, words


def source_expectations(directory: str, expected: Expectations, provenance: bytes) -> tuple[Expectations, str]:
    """Return expected with the tree, lock file digest and dependencies of the source in directory.

    Also return which source that is, for the user.
    The dependencies of nix are known only after an evaluation: they stay "not checked", and the digest of the lock
    file stands for them.
    provenance: says which folder was built, by which toolchain, which hash names the tree, and which submodules were
        packed.
    Raises UsageError if directory is not a source, or contradicts expected.
    """
    if not isdir(directory):
        raise UsageError(f"--source {directory}: not a directory")
    doc, folder, tools, named, commit = read_statement(provenance), "", list[str](), expected.source_tree, ""
    if doc:
        definition = doc["predicate"]["buildDefinition"]
        parameters, tools = definition["externalParameters"], [*definition["internalParameters"]["toolchain"]]
        with suppress(ValueError):
            directory, folder, _ = read_command(parameters["buildCommand"], directory)
        folder = _locate(directory, "", folder) or ""
        commit = parameters["source"]["digest"]["gitCommit"]
        named = named or parameters["source"]["digest"]["gitTree"]
    algorithm, has_submodules = object_format(named or ""), b'"pkg:generic/' in provenance
    try:
        found = detect_toolchains(directory, folder=folder)
        matching = (t for t in found if [*t.adapted(join(directory, folder)).tools, "kettle"] == tools)
        toolchain = next(matching, found[0])
        with tempfile.TemporaryDirectory(prefix="confbuild-") as scratch:
            outputs = find_outputs(directory, toolchain.name, folder)
            # Files as they are may have been packed with or without those of submodules, whose changes count only then.
            for submodules in sorted({has_submodules, True}):
                source = read_source(directory, scratch, outputs, submodules, allow_filters=True)
                history = source.history
                tree = history.tree
                if object_format(tree) != algorithm:
                    tree = git_tree(source.root, source.files, algorithm)
                if tree.encode("ascii") in provenance:
                    break
            seen = source.root
            if {*walk_files(seen)} != {*source.files}:  # a build does not see what git ignores
                seen = join(scratch, "seen")
                for name in source.files:
                    os.makedirs(dirname(join(seen, name)), exist_ok=True)
                    shutil.copyfile(join(source.root, name), join(seen, name), follow_symlinks=False)
            plan = read_inputs(toolchain, seen, folder, commit)
    except BuildFailed as e:
        raise UsageError(
            f"--source {directory}: {e}", e.hint or "git submodule update --init --recursive" * has_submodules
        ) from None
    if expected.source_tree not in (None, tree):
        raise UsageError(f"--source-tree {expected.source_tree} contradicts --source {directory}, whose tree is {tree}")
    known = (str(row["uri"]) for row in history.submodules.values())
    packed = [uri for uri in known if json.dumps(uri).encode("ascii") in provenance]
    uris = None if plan.dependencies is None else [*(d["uri"] for d in plan.dependencies), *packed]
    expected = expected._replace(source_tree=tree, lockfile_sha256=sha256_hex(plan.lock), dependencies=uris)
    return expected, source.note + f"; the folder {folder}" * bool(folder)


# endregion 25
# ==============================================================================
# region 26. Attester                                 [uses 6, 7, 8, 10, 16, 22]
# ==============================================================================
# Makes the evidence for a provenance: simulated evidence, which says that it is simulated, the report of the SEV-SNP
# guest, or the quote of the TD that this process runs in.  The guest's host is hostile: the certificate table that it
# adds to a report is used only if a certificate in it verifies the report.  Callers: agents, the guest's first process
# and `attest`.
# Specifications: [TSM], [SEV-GUEST], [GHCB], [VCEK].  Everything runs in the caller's thread.

TSM_REPORTS = "/sys/kernel/config/tsm/report"  # configfs-tsm, Linux 6.7 and later [TSM]
SEV_GUEST = "/dev/sev-guest"  # [SEV-GUEST]
SNP_GET_REPORT, SNP_GET_EXT_REPORT = 0xC0205300, 0xC0205302  # ioctl requests [SEV-GUEST]
MAX_CERTIFICATES = 16 * KIB  # SEV_FW_BLOB_MAX_SIZE of the driver
CCEL = "/sys/firmware/acpi/tables/data/CCEL"  # a TD's log of measurements, for root [CCEL]
MAX_CCEL = 512 * KIB  # as base64 it must fit in one string of evidence.json; firmware sets 64 KiB aside


class NoAttester(ConfbuildError):
    """An error: no hardware on this machine attests, or it gave no valid report."""


class Attester(NamedTuple):
    """Source of evidence on this platform.

    builder: the builder's id in the provenance.
    attest: called with 64 bytes of report data; returns evidence.json, or raises NoAttester.
    byproducts: additions to the provenance: name -> SHA-256 in hexadecimal.
    """

    builder: str
    attest: Callable[[bytes], bytes]
    byproducts: Strings = {}  # never changed


def report_data(provenance: bytes, nonce: str) -> bytes:
    """Return the 64 bytes that evidence signs: SHA-256 of provenance, nonce, 16 zero bytes.  [CONTRACT 4.1]

    nonce: 32 hexadecimal digits.
    """
    return hashlib.sha256(provenance).digest() + bytes.fromhex(nonce) + bytes(16)


def waiting_report_data(nonce: str) -> bytes:
    """Return the report data of a VM that has built nothing yet: zeros stand for the digest.  [CONTRACT 1.14]"""
    return bytes(32) + bytes.fromhex(nonce) + bytes(16)


def _evidence(platform: str, **evidence: Any) -> bytes:
    """Return evidence.json.  [CONTRACT 4.1]"""
    return to_canonical({"platform": platform, "evidence": evidence})


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def simulated_measurement() -> bytes:
    """Return the stand-in for a launch digest: SHA-384 of this file.  [CONTRACT 4.4]"""
    return hashlib.sha384(own_source()).digest()


def simulated_evidence(data: bytes) -> bytes:
    """Return evidence.json of the platform `simulated`.  data: 64 bytes of report data.  [CONTRACT 4.4]"""
    report = _base64(simulated_report(data, simulated_measurement()))
    return _evidence("simulated", version=1, notice=SIMULATED_NOTICE, attestation_report=report)


def get_report(data: bytes) -> tuple[bytes, bytes | None]:
    """Return (report, certificate table), or (a TD's quote, None).

    From configfs-tsm or, if that fails, from /dev/sev-guest: configfs-tsm can exist without the guest's driver (ENXIO),
    deny this user (EACCES), or lack room for the certificates (EIO).
    data: 64 bytes of report data.
    Raises NoAttester if neither gives a report about data.
    """
    failures: list[str] = []
    for path, get in ((TSM_REPORTS, tsm_report), (SEV_GUEST, _device_report)):
        if exists(path):
            try:
                report, table = get(path, data)
                if (parse_td_quote if table is None else parse_report)(report).report_data == data:
                    return report, table
                failures.append(f"{path}: the report has other report data than requested")
            except (NoAttester, Malformed) as e:
                failures.append(str(e))
    raise NoAttester(
        "; ".join(failures) or f"not a confidential VM: neither {TSM_REPORTS} nor {SEV_GUEST} exists",
        "in an SEV-SNP guest, run `modprobe sev-guest` as root, in a TD `modprobe tdx-guest`",
    )


def _device_report(path: str, data: bytes) -> tuple[bytes, bytes]:
    """Return (report, certificate table or no bytes) from the device at path.  Raises NoAttester."""
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise NoAttester(f"{path}: {e.strerror}") from None
    try:
        return sev_guest_report(lambda request, argument: fcntl.ioctl(device, request, argument), data)
    finally:
        os.close(device)


def tsm_report(root: str, data: bytes) -> tuple[bytes, bytes | None]:
    """Return (report, certificate table or no bytes), or (a TD's quote, None), from configfs-tsm at root.  [TSM]

    The kernel limits each attribute to 32 KiB (TSM_OUTBLOB_MAX).
    Raises NoAttester.
    """

    def read(name: str) -> bytes:
        with open(join(folder, name), "rb", buffering=0) as f:  # a buffer would read when it likes
            return b"".join(iter(lambda: f.read(BLOCK), b""))

    folder = join(root, f"confbuild-{secrets.token_hex(8)}")
    try:
        os.mkdir(folder)
        try:
            provider = read("provider").strip()
            if provider not in (b"sev_guest", b"tdx_guest"):  # before any other request
                name = provider[:40].decode("ascii", "replace")
                raise NoAttester(f"{root}: the provider is {name!r}, expected sev_guest or tdx_guest")
            before = int(read("generation"))
            with open(join(folder, "inblob"), "wb", buffering=0) as f:
                # The kernel applies it at close(2), which hides an error; the generation then stays the same.
                written = f.write(data)
            report, table = read("outblob"), read("auxblob") if provider == b"sev_guest" else None
            requests = int(read("generation")) - before
        finally:
            os.rmdir(folder)
    except OSError as e:
        reason = "the report is larger than the kernel accepts" if e.errno == errno.EFBIG else e.strerror
        raise NoAttester(f"{e.filename or root}: {reason}") from None
    except ValueError:
        raise NoAttester(f"{folder}: generation is not a number") from None
    if written != len(data) or requests != 1:  # another process wrote between our write and our read
        raise NoAttester(f"{folder}: {requests} requests were made, expected only ours")
    return report, table


def sev_guest_report(ioctl: Callable[[int, Any], Any], data: bytes) -> tuple[bytes, bytes]:
    """Return (report, certificate table or no bytes) from /dev/sev-guest.  [SEV-GUEST]

    Asks for the report with certificates first, then for the report alone, since a host need not have certificates.
    ioctl: called with a request and its argument, a bytearray that the driver writes to.
    data: 64 bytes of report data.
    Raises NoAttester.
    """
    certificates = ctypes.create_string_buffer(MAX_CERTIFICATES)
    plain = data + bytes(32)  # snp_report_req: user_data[64], vmpl (u32, zero), reserved
    extended = plain + struct.pack(
        "<QI4x", ctypes.addressof(certificates), MAX_CERTIFICATES
    )  # certs_address, certs_len
    failures = []
    for request, content in ((SNP_GET_EXT_REPORT, extended), (SNP_GET_REPORT, plain)):
        question = ctypes.create_string_buffer(content, len(content))
        answer = ctypes.create_string_buffer(4000)
        # snp_guest_request_ioctl: msg_version (u8), req_data, resp_data, exitinfo2 = fw_error | vmm_error << 32
        argument = bytearray(struct.pack("<B7xQQQ", 1, ctypes.addressof(question), ctypes.addressof(answer), 0))
        try:
            ioctl(request, argument)
        except OSError as e:  # after the first failure, the driver may report only ENOTTY
            firmware, vmm = struct.unpack_from("<II", argument, 24)
            failures.append(f"{e.strerror} (firmware error {firmware:#x}, VMM error {vmm:#x})")
            continue
        status, size = struct.unpack_from("<II", answer)  # the report follows at 0x20 [SNP-ABI 7.3 MSG_REPORT_RSP]
        if status == 0 and size == REPORT_SIZE:
            return answer.raw[0x20 : 0x20 + size], certificates.raw if request == SNP_GET_EXT_REPORT else b""
        failures.append(f"status {status:#x}, a report of {size} bytes, expected {REPORT_SIZE}")
    raise NoAttester(f"{SEV_GUEST}: {', then '.join(failures)}")


def _read_ccel() -> str | None:
    """Return a TD's log of measurements as base64, or None if this process cannot read it."""
    with suppress(OSError), open(CCEL, "rb") as f:
        log = f.read(MAX_CCEL + 1)
        return _base64(log) if len(log) <= MAX_CCEL else None
    return None


def fetch_vek(url: str) -> bytes:
    """Return the response of AMD's key distribution service, at most MAX_CERTIFICATES bytes of it.  [VCEK 4.1]

    Raises NoAttester.
    """
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bytes(answer.read(MAX_CERTIFICATES))
    except urllib.error.HTTPError as e:
        with e:  # it holds the answer
            raise NoAttester(f"{url}: {e}") from None
    except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: redirected to an invalid URL
        raise NoAttester(f"{url}: {e}") from None


def hardware_evidence(
    report: bytes, table: bytes | None, platform: str, fetch: Callable[[str], bytes] | None, given: bytes | None = None
) -> bytes:
    """Return evidence.json of a platform, for snp with the VCEK or VLEK if one is found.  [CONTRACT 4.2, 4.6]

    The certificate comes from table, else given, else fetch; the first that verifies the report wins.  A certificate in
    table can be that of an older TCB, which has another key.
    table: the certificate table, from the hostile host; None if report is the quote of a TD.
    fetch: returns AMD's response for a URL.
    given: a certificate in DER.
    Raises NoAttester if this hardware does not have that platform, or if the last certificate does not verify the
    report; Malformed if report is not a report.
    """
    if platform.endswith("tdx") is not (table is None):
        raise NoAttester(f"this machine does not attest as {platform}", "leave --platform out")
    if table is None:
        return _evidence(platform, quote=_base64(report), cc_eventlog=_read_ccel())
    parsed = parse_report(report)
    kind, product = parsed.signing_key, parsed.product

    def certificates() -> Iterator[bytes | None]:
        yield vek_in_table(table, kind)
        yield given
        if fetch is not None:
            if product not in TCB_LAYOUTS or kind != "VCEK":
                raise NoAttester(
                    f"the report is signed by {kind} of {product or 'an unknown product'}; "
                    "AMD's key service has only the VCEKs of known products"
                )
            yield fetch(vek_url(parsed, product))

    chain, problem = None, ""
    for vek in certificates():
        if vek is not None:
            chain, problem = {"vcek": _base64(vek), "ask": None, "ark": None}, ""
            try:
                verify_report(parsed, parse_certificate(vek, "VEK").key)
                break
            except (Malformed, BadSignature) as e:
                problem = f"the certificate for the report does not verify it: {e}"
    if problem:
        raise NoAttester(problem)
    return _evidence(platform, attestation_report=_base64(report), cert_chain=chain)


# endregion 26
# ==============================================================================
# region 27. Bundle                                            [uses 16, 21, 23]
# ==============================================================================
# Writes the archive that a client downloads, and reads bundles for the verifier, from a directory or from the archive
# itself, which is never unpacked.  The pipeline writes; `build` and `verify` read.  Readers trust nothing: they follow
# no symbolic link, hash files in blocks, and hold at most MAX_JSON + 1 bytes of each document.
# Specifications: [CONTRACT 1.11] for the archive, [CONTRACT 5.5] for what counts as a bundle.

_DOCUMENTS = frozenset(("provenance.json", "evidence.json"))


def write_archive(path: str, project: str, provenance: bytes, evidence: bytes, folder: str) -> None:
    """Write the bundle's gzip tarball to path.  The same inputs give the same bytes.  [CONTRACT 1.11]

    project: the name of the top directory.
    folder: the directory with nothing but the folder artifacts; becomes the bundle.
    """
    for name, data in (("provenance.json", provenance), ("evidence.json", evidence)):
        write_file(join(folder, name), data)
    for name in os.listdir(join(folder, "artifacts")):
        os.chmod(join(folder, "artifacts", name), 0o755)
    write_source(path, folder, project)


def is_bare_evidence(path: str) -> bool:
    """Return whether path is an evidence.json without a provenance.json next to it.  [CONTRACT 5.5]"""
    folder, name = os.path.split(path)
    return name == "evidence.json" and isfile(path) and not lexists(join(folder, "provenance.json"))


__all__ += ["read_bundle"]


def read_bundle(path: str, max_unpacked: int = MAX_UNPACKED, evidence_only: bool = False) -> BundleFiles:
    """Return the bundle at path: a directory, its evidence.json, a gzip tarball, or "-" for a tarball on stdin.

    A directory or archive may hold the bundle in one directory of its own.  An artifact lies in artifacts/, next to
    provenance.json, or in both, as [K] reads it.
    max_unpacked: limit on the unpacked bytes of an archive.
    evidence_only: return evidence.json, and only the names of all other files.
    Raises UsageError if there is no bundle.
    """
    try:
        if path == "-":
            if sys.stdin is None:
                raise UsageError("-: stdin is closed")
            return _read_archive("stdin", sys.stdin.buffer, max_unpacked, evidence_only)
        if basename(path) == "evidence.json" and not isdir(path):
            return _read_directory(dirname(path) or ".", evidence_only)
        if isdir(path):
            return _read_directory(find_project(path, "")[0], evidence_only)
        with open(path, "rb") as f:
            return _read_archive(path, f, max_unpacked, evidence_only)
    except Malformed as e:
        raise UsageError(f"{path}: {e}") from None
    except OSError as e:
        raise UsageError(f"{e.filename or path or repr(path)}: {e.strerror or e}") from None


def _assemble(
    names: Sequence[str],
    digest: Callable[[str], str],
    document: Callable[[str], bytes],
    evidence_only: bool,
    strict: bool,
) -> BundleFiles:
    """Return the bundle that consists of these files.

    names: of all files, relative to the bundle; an empty folder `artifacts` counts as one.
    digest: returns the SHA-256 of a file, or the reason why it has none.
    document: returns the contents of a file.
    strict: every file next to artifacts/ belongs to the bundle. Otherwise those named like a subject or artifact do,
        or all of them if artifacts/ is empty.
    """
    evidence = document("evidence.json")
    if evidence_only:
        return BundleFiles(None, evidence, {}, sorted(set(names) - {"evidence.json"}))
    provenance = document("provenance.json") if "provenance.json" in names else None
    inside = {name[10:] for name in names if name.startswith("artifacts/")}
    beside = {name for name in names if "/" not in name} - _DOCUMENTS - {"artifacts"}
    if not strict and (inside or provenance is None):
        beside &= {*inside, *subject_names(provenance or b"")}
    artifacts = {}
    for name in sorted(inside | beside):
        found = {digest(path) for path, known in ((f"artifacts/{name}", inside), (name, beside)) if name in known}
        # Two of one name must be equal, since users may run either.
        artifacts[name] = found.pop() if len(found) == 1 else "differs from the file of this name next to artifacts/"
    return BundleFiles(provenance, evidence, artifacts)


def _read_directory(root: str, evidence_only: bool) -> BundleFiles:
    """Return the bundle in the directory root.  Raises UsageError, Malformed or OSError."""

    def digest(name: str) -> str:
        path = join(root, name)
        return file_sha256(path) if stat.S_ISREG(os.lstat(path).st_mode) else "not a regular file"

    folder, names = join(root, "artifacts"), os.listdir(root)
    if islink(folder):
        if not evidence_only:
            raise UsageError(f"{folder} is a symbolic link, expected a directory")
    elif isdir(folder) or "artifacts" in names and not evidence_only:
        inside = [f"artifacts/{name}" for name in os.listdir(folder)]
        names = inside + [name for name in names if not inside or name != "artifacts"]
    return _assemble(names, digest, lambda name: read_regular(join(root, name), MAX_JSON + 1), evidence_only, False)


def _read_archive(path: str, f: IO[bytes], max_unpacked: int, evidence_only: bool) -> BundleFiles:
    """Return the bundle in the gzip tarball f, in one pass.  path: for errors.  Raises UsageError or OSError."""
    documents: dict[str, bytes] = {}
    files: dict[str, str] = {}  # a folder has a name with a slash at its end, and no digest
    tops: set[str] = set()  # the first folder of each path: at most one, which also limits the documents that are held
    try:
        for count, member in enumerate(tar_members(gzip.GzipFile(fileobj=f), max_unpacked), 1):
            if count > MAX_MEMBERS:
                raise UsageError(f"{path}: more than {MAX_MEMBERS} members")
            folder = member.kind == "directory"
            name = (member.name + "/" * folder).removeprefix("./")
            top, slash, rest = name.partition("/")
            tops.update([top] if slash else [])
            if not (folder or member.kind == "file") or files.get(name) or len(tops) > 1 or tops & {"", ".", ".."}:
                raise UsageError(f"{path}: unexpected archive member {member.name[:80]!r}")
            digest, head = hashlib.sha256(), bytearray()
            limit = MAX_JSON + 1 if {name, rest} & _DOCUMENTS else 0
            for block in member.contents:
                digest.update(block)
                head += block[: limit - len(head)]
            files[name], documents[name] = "" if folder else digest.hexdigest(), bytes(head)
    except (UsageError, FileNotFoundError, PermissionError):
        raise
    except Exception as e:  # noqa: BLE001  # gzip, zlib and the reader raise several kinds for hostile bytes
        raise UsageError(f"{path}: neither a bundle nor its archive: {e}") from None
    root = "" if files.keys() & _DOCUMENTS else "".join(tops) + "/"
    place = re.compile(rf"({re.escape(root)}(?!artifacts\Z)(artifacts/)?[^/]*)?")
    for name in files:
        if not place.fullmatch(name):
            raise UsageError(f"{path}: unexpected archive member {name[:80]!r}")
    names = {name.removeprefix(root): digest for name, digest in files.items() if digest}
    for name in ("evidence.json",) if evidence_only else sorted(_DOCUMENTS):
        if name not in names:
            raise UsageError(f"{path}: no {name} in the archive")
    return _assemble([*names], names.__getitem__, lambda name: documents[root + name], evidence_only, True)


# endregion 27
# ==============================================================================
# region 28. Pipeline          [uses 16, 17, 18, 20, 21, 22, 23, 24, 25, 26, 27]
# ==============================================================================
# Turns a source into a bundle: source -> build -> provenance -> evidence -> archive.  The agent calls run_pipeline
# once, in a process that does nothing else and is thrown away afterwards; everything runs in the caller's thread.
# Specifications: provenance.json follows [SLSA] and [IN-TOTO] in the form of [CONTRACT 3.2].

# The server's environment variables that a build sees; --env adds to them [CONTRACT 2.2].  All others, and so every
# secret, are left out.
ALLOWED_ENVIRONMENT = """
    PATH SSL_CERT_FILE SSL_CERT_DIR NIX_SSL_CERT_FILE GIT_SSL_CAINFO CURL_CA_BUNDLE
    CARGO_HTTP_CAINFO CARGO_NET_OFFLINE RUSTUP_HOME RUSTUP_AUTO_INSTALL RUSTUP_DIST_SERVER
    NIX_CONF_DIR NIX_REMOTE NIX_STORE_DIR NIX_STATE_DIR NIX_LOG_DIR
    http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY
""".split()
FIXED_ENVIRONMENT = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
BUILD_FOLDERS = ("home", "tmp", "cargo")  # of a workspace, for what a build writes next to its source
# The variables of a build that --env cannot set.
OWN_VARIABLES = {"HOME", "TMPDIR", "CARGO_HOME", *(name for toolchain in TOOLCHAINS for name in toolchain.env)}
_MAX_CRATE = 64 * MIB  # crates.io accepts 10 MB
_MAX_REGISTRIES = 16  # folders of a cache; builds choose their names


def build_environment(workspace: str, environ: Strings, extra: Sequence[str]) -> dict[str, str]:
    """Return the environment of a build.  [CONTRACT 2.2]

    workspace: its BUILD_FOLDERS become HOME, TMPDIR and CARGO_HOME.
    environ: the server's environment.
    extra: the names of further variables that are passed on, from --env.
    """
    passed = {name: environ[name] for name in (*ALLOWED_ENVIRONMENT, *extra) if name in environ}
    rustup = join(environ.get("HOME") or os.path.expanduser("~"), ".rustup")  # from passwd(5)
    home, tmpdir, cargo_home = (join(workspace, folder) for folder in BUILD_FOLDERS)
    return {
        "PATH": os.defpath,
        **FIXED_ENVIRONMENT,
        "JAVA_TOOL_OPTIONS": f"-Duser.home='{home}'",  # otherwise from passwd(5)
        **({"RUSTUP_HOME": rustup} if isdir(rustup) else {}),
        # The URL of a proxy may contain a password.
        **{k: v for k, v in passed.items() if k in extra or "@" not in v or not k.lower().endswith("_proxy")},
        "HOME": home,
        "TMPDIR": tmpdir,
        "CARGO_HOME": cargo_home,
    }


# The first line of an error.
_CAUSE = r"""(?mx)
    ^[ \t\u2009]* ([\w./@+-]+[ ]\w+:[ ])? (       # pnpm begins lines of a package with its folder and its script
        error(\[\w+\]|\ TS\d+)?:      # cargo and rustc, rustup, nix, TypeScript
        | npm\ error\ (?!code|errno|syscall|path|Lifecycle|workspace|location|command\ failed)
        | \[?ERR_PNPM_ | ERROR[ ]{2} | \[ERROR\]
        | \w*Error(\ \[\w+\])?:\     # JavaScript and Python
        | \S+[:(][0-9]+[:,][0-9]+\)?:?\ (-\ |fatal\ )?error\b     # C, TypeScript
        | make(\[[0-9]+\])?:\ \*\*\*
        | go:\ (?!downloading|warning|no\ module\ dependencies) | \S+\.go:[0-9]+:[0-9]+:
    ) .*
    """


# Each cause has one of these words; searching a line for one takes 0.05 µs. "": of the toolchains that are not named.
_CAUSE_WORDS = {"cargo": ["rror"], "nix": ["rror"], "": ["rror", "ERR", "go:", "***"]}


class BuildLog:
    """Passes the lines of a build on to emit, and hashes them as UTF-8, each followed by LF.  [CONTRACT 3.7]

    cause: the first line that has the form of an error, or "".  Later errors usually follow from it.
    toolchain: the name of the one that prints the lines.
    """

    def __init__(self, emit: Emit, toolchain: str = "") -> None:
        self.cause = ""
        self._words = _CAUSE_WORDS.get(toolchain, _CAUSE_WORDS[""])
        self._emit = emit
        self._digest = hashlib.sha256()

    def __call__(self, lines: list[str]) -> None:
        """Emit lines as events of the phase `build`."""
        text = "\n".join([*lines, ""])
        self._digest.update(text.encode("utf-8"))
        if not self.cause and any(word in text for word in self._words):
            match = re.search(_CAUSE, without_colours(text))
            self.cause = match[0].strip() if match else ""
        if lines:
            self._emit("build", lines)

    def hexdigest(self) -> str:
        """Return the SHA-256 of the lines so far, in hexadecimal."""
        return self._digest.hexdigest()


def run_pipeline(
    request: BuildRequest,
    archive: str | None,
    workspace: str,
    env: Strings,
    policy: SourcePolicy,
    attester: Attester,
    emit: Emit,
    cache: str | None,
) -> str:
    """Build a source and return the path of the bundle's archive.

    When it returns, no process that the build has started is alive.
    archive: the path of the uploaded source, or None if the request names a repository.
    workspace: a directory that is empty except for `agent`, which the build cannot write to.
    env: the environment of the build.
    emit: called with a phase and its messages.
    cache: the directory of --cache.
    Raises BuildFailed.
    """
    started = utc_now()
    own = join(workspace, "agent")
    os.makedirs(own, exist_ok=True)
    # A real path, so that collect_cargo notices the symbolic links that a build makes.
    root = join(realpath(workspace), "source")
    name = _get_source(request, archive, root, env, policy)
    folder = _locate(root, "", request.subdir)
    if folder is None or not isdir(join(root, folder)):
        raise source_error(f"subdir {request.subdir[:80]!r} is not a folder of the source")
    project = normpath(join(root, folder))
    found = detect_toolchains(root, request.toolchain, folder)
    _launchers[-1].share([env.get(variable, default) for variable, default in found[0].store.items()])
    emit("detect", [found[0].name])
    emit("init", ["Verifying build inputs"])
    refuse_outside_influence(root)
    _remove_outputs(found[0], project)
    source, submodules, time_s = _describe_source(root, env, emit)
    env = {"SOURCE_DATE_EPOCH": str(time_s), **env}
    plan = _choose(found, root, folder, env, emit, source["digest"]["gitCommit"])
    plan = plan._replace(dependencies=[*(plan.dependencies or ()), *submodules])
    before, log = {*os.listdir(project), *plan.outputs}, BuildLog(emit, plan.name)
    with _cached_crates(plan, cache, own, emit):
        network, stdout = _run_steps(plan, project, log)
    emit("provenance", ["Generating provenance"])
    bundle = join(own, "bundle")
    patterns = request.artifacts or plan.artifacts
    try:
        matches = {pattern: find_artifacts(project, [*plan.folders, ""], pattern) for pattern in patterns}
        made = sorted({*itertools.chain(*matches.values())}) if patterns else plan.collect(project, stdout)
        if not made:
            raise BuildFailed("NoArtifacts", _explain_nothing(plan, project, patterns, before))
        if request.artifacts or plan.name == "own":  # those of the other rows are alternatives
            emit("provenance", [f"Nothing matches {pattern}" for pattern, rows in matches.items() if not rows])
        subjects = _take_artifacts(made, join(bundle, "artifacts"))
    except PermissionError as e:  # the build can take the permissions away
        raise BuildFailed("ProvenanceError", f"cannot read the artifacts: {e}") from None
    commands = [*[f"cd {shlex.quote(folder)}"] * bool(folder), *map(shlex.join, plan.steps)]
    commands[-1] += f" # artifacts: {shlex.join(request.artifacts)}" * bool(request.artifacts)
    digests = {"build_log": log.hexdigest(), "build_network": sha256_hex(network), **_conditions(root, plan.env)}
    digests |= attester.byproducts
    statement = _make_statement(plan, " && ".join(commands), source, attester.builder, digests, subjects, started)
    emit("attest", ["Generating attestation"])
    try:
        evidence = attester.attest(report_data(statement, request.nonce))
    except NoAttester as e:
        raise BuildFailed("AttestationError", str(e)) from None
    path = join(own, "result.tar.gz")
    write_archive(path, name, statement, evidence, bundle)
    return path


def _get_source(request: BuildRequest, archive: str | None, root: str, env: Strings, policy: SourcePolicy) -> str:
    """Make the directory root with the source of request, and return the name of the project.  Raises BuildFailed."""
    if archive is None:
        fetch_git(request.repo_url, request.repo_ref, root, env, policy)
        return repository_name(request.repo_url)
    os.mkdir(root)
    unpack_archive(archive, root, policy.max_unpacked, policy.max_ratio)
    project, name = find_project(root, request.source_name)
    if project != root:  # a build does not depend on the name of the checkout
        os.rename(project, root + ".moved")
        os.rename(root + ".moved", root)  # which is empty
    return name


def _remove_outputs(toolchain: Toolchain, project: str) -> None:
    """Remove what an earlier build may have left in project.  Raises BuildFailed SourceError."""
    for output in toolchain.adapted(project).outputs:
        remove_tree(join(project, output))


def _choose(found: Sequence[Toolchain], root: str, folder: str, env: Strings, emit: Emit, commit: str) -> Toolchain:
    """Return the plan of the toolchain that builds a project.  [CONTRACT 2.1]

    found: the toolchains whose markers exist.
    root, folder, env, commit: as for prepare.
    Raises BuildFailed, which names every marker.
    """
    markers = f" (found {', '.join(toolchain.marker for toolchain in found)})" if found[1:] else ""
    if markers:
        emit("init", [f"Building with {found[0].name}{markers}"])
    for toolchain in found:
        try:
            _remove_outputs(toolchain, join(root, folder))
            return prepare(toolchain, root, folder, env, emit, commit)
        except BuildFailed as e:
            if toolchain is found[-1] or not toolchain.store or e.error_type in ("LimitError", "ProvenanceError"):
                raise BuildFailed(e.error_type, f"{e}{markers}") from None
            emit("init", [f"Trying the next toolchain, since {toolchain.name} cannot build this: {e}"])
    raise ValueError("there is at least one toolchain")


@contextmanager
def _cached_crates(plan: Toolchain, cache: str | None, own: str, emit: Emit) -> Iterator[None]:
    """Give cargo copies of the crates in cache before the block, and add those that it has fetched afterwards.

    cargo takes CARGO_HOME/registry/cache/REGISTRY/NAME-VERSION.crate without looking at its checksum. Here such a
    file is cache/REGISTRY/SHA-256. Neither folder is trusted: only bytes with the digest of the lock file are copied.
    own: a folder that the build cannot write to.
    [CARGO: cargo home; CONTRACT 2.2]
    """
    uris = "\n".join(row["uri"] for row in plan.dependencies or () if cache)
    found = re.findall("(?m)^pkg:cargo/(.+)@(.+)[?]checksum=sha256:([0-9a-f]{64})", uris)
    crates = {f"{name}-{version}.crate": digest for name, version, digest in found}
    if len(crates) < len(found):  # a package of one registry could get into the folder of another one
        crates = {}
    cache, registries = cache or "", plan.env["CARGO_HOME"] + "/registry"
    known = {*match_files(cache, "*-*")[:_MAX_REGISTRIES]}
    taken = {
        f"cache/{registry}/{file}"
        for registry, (file, digest) in itertools.product(known, crates.items())
        if _copy_crate(f"{cache}/{registry}/{digest}", digest, f"{own}/registry/cache/{registry}/{file}")
    }
    with suppress(OSError):  # nothing was taken, or a program of the source was quicker
        os.rename(f"{own}/registry", registries)  # follows no link
    if crates:
        emit("init", [f"{len(taken)} of {len(crates)} crates come from the cache"])
    try:
        yield
    finally:
        with survive("the cache lacks crates of this build"):
            for path in match_files(registries, "cache/*-*/*.crate" * bool(crates)):
                registry, file = path.split("/")[1:]
                if path not in taken and file in crates and len({*known, registry}) <= _MAX_REGISTRIES:
                    known.add(registry)
                    _copy_crate(f"{registries}/{path}", crates[file], f"{cache}/{registry}/{crates[file]}")


def _copy_crate(path: str, digest: str, copy: str) -> bool:
    """Copy the file at path, at once, if it has this SHA-256, and return whether it has.  Raises OSError."""
    data = b""
    with suppress(OSError, Malformed):
        data = read_regular(path, _MAX_CRATE)
    right = sha256_hex(data) == digest
    if right:
        folder = dirname(copy)
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as new:  # another build may add the same crate
            new.write(data)
        os.replace(new.name, copy)
    return right


def _run_steps(plan: Toolchain, project: str, log: BuildLog) -> tuple[bytes, bytes]:
    """Run the steps of plan; return which of them may use the network, and the stdout of the last if it has paths.

    Raises BuildFailed.
    """
    network, stdout = b"all", b""
    if _OWN_OUTPUT in plan.outputs:
        os.mkdir(join(project, _OWN_OUTPUT))
    _launchers[-1].hand_over([project])
    for number, step in enumerate(plan.steps):
        if number == plan.fetches > 0 and _launchers[-1].close_network():
            network = b"fetch"
        program = plan.programs[step[0]].path if step[0] in plan.programs else join(project, step[0])
        try:
            status, stdout = run_tool([program, *step[1:]], project, plan.env, log, bool(plan.store))
        except OSError as e:
            if is_full(e):
                raise
            raise BuildFailed("BuildError", f"{step[0]} cannot be run: {e.strerror}") from None
        if status != 0:
            full = any(os.strerror(code) in log.cause for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
            ending = f"status {status}" if status > 0 else f"signal {-status}"
            needs = re.search(
                "(?i)network|resolve host|connect|fetch|dial|getaddrinfo|EAI_AGAIN|ENOTFOUND|^$", log.cause
            )
            closed = " (the network is closed in this step)" * (network == b"fetch" and bool(needs))
            raise BuildFailed(
                "LimitError" if full else "BuildError",
                f"{shlex.join(step)} ended with {ending}{closed}: {log.cause[:1000]}".removesuffix(": ")
                + " (builds may use no Unix socket unless --no-isolation lets them)" * ("listen EACCES" in log.cause),
            )
    return network, stdout


def _explain_nothing(plan: Toolchain, project: str, patterns: Sequence[str], before: set[str]) -> str:
    """Return the message for a build without artifacts, which names what it made instead.

    before: the names in project before the build, and of the folders that it makes.
    """
    found = find_artifacts(project, plan.folders or [""], "[!.]*.[!d]*" if plan.folders else "*")
    made = [relpath(path, project) for _, path in found if basename(path) not in before]
    return (
        f"the build succeeded but made no {' or '.join(patterns) or 'executable'}"
        + f"; it made {', '.join(made[:5])}, which --artifact can name" * bool(made)
    )


def _describe_source(project: str, env: Strings, emit: Emit) -> tuple[Json, list[Json], int]:
    """Return the `source` of externalParameters, the submodules with contents as resolvedDependencies, and the time.

    Delete a history that does not match the files, and set the times of all files to that of the commit.
    [CONTRACT 2.2, 3.4]
    """
    try:
        history = believe_history(project, env)
    except BuildFailed as e:
        git = join(project, ".git")
        if lexists(git):
            emit("init", [f"Commit not recorded: {e}"])
            remove_tree(git)
        history = History("", git_tree(project, walk_files(project)))
    packed = [row for path, row in history.submodules.items() if lexists(join(project, path, ".git"))]
    for above, folders, files in os.walk(project):
        for entry in (*folders, *files):
            os.utime(f"{above}/{entry}", (history.time, history.time), follow_symlinks=False)
    source = {"digest": {"gitCommit": history.commit, "gitTree": history.tree}, "uri": history.uri}
    return source, packed, history.time


def _conditions(root: str, env: Strings) -> dict[str, str]:
    """Return the digests, by name, of what may differ between two builds of one source.  [CONTRACT 3.7]

    root: the directory of the source.
    env: of the build.
    """
    system, _, release, _, machine = os.uname()
    text = read_limited("/proc/cpuinfo", 64 * MIB) if exists("/proc/cpuinfo") else b""
    cpu = {machine.encode(), *re.findall(rb"(?m)^(?:model name|CPU part|flags|Features)\s*: (.*)", text)}
    variables = sorted(os.fsencode(f"{name}={value}") for name, value in env.items())
    return {
        "build_path": sha256_hex(os.fsencode(root)),
        "build_environment": sha256_hex(b"\0".join(variables)),
        "build_kernel": sha256_hex(f"{system} {release}".encode()),
        "build_cpu": sha256_hex(b"\n".join(sorted(cpu))),
    }


def _take_artifacts(found: Artifacts, folder: str) -> dict[str, str]:
    """Copy artifacts into the new directory folder, and return the SHA-256 of each copy by its name.

    found: (name, path), by name.
    A directory becomes a gzip tarball.
    Raises BuildFailed ProvenanceError for an unusable name or a symbolic link.
    """
    os.makedirs(folder)
    taken = dict[str, str]()
    for name, path in found:
        if not PLAIN_NAME.fullmatch(name) or not name.isprintable():
            raise BuildFailed("ProvenanceError", f"the artifact name {name!r} is not a plain file name")
        copy = join(folder, name)
        if isdir(path):
            write_source(copy, path, basename(path), level=6)  # as always, so that builds repeat
        else:
            shutil.copyfile(path, copy, follow_symlinks=False)
        if islink(copy):
            raise BuildFailed("ProvenanceError", f"the artifact {name} has become a symbolic link")
        digest = file_sha256(copy)
        if taken.setdefault(name, digest) != digest:
            raise BuildFailed("ProvenanceError", f"two different artifacts are called {name}; --artifact can name one")
    return taken


def _make_statement(
    plan: Toolchain,
    command: str,
    source: Json,
    builder: str,
    byproducts: Strings,
    subjects: Strings,
    started: str,
) -> bytes:
    """Return the bytes of provenance.json.  [CONTRACT 3.2]

    source: as in externalParameters.
    builder: the builder's id.
    byproducts, subjects: name -> SHA-256 in hexadecimal; input_merkle_root is added here.
    started: the time of startedOn.
    Raises BuildFailed ProvenanceError if our own verifier would refuse the statement.
    """
    kettle = Program("", f"confbuild {__version__}", sha256_hex(own_source()))
    root = descriptor("input_merkle_root", "0" * 64)
    clock = re.sub("[-:]", "", started[:19]).replace("T", "-")
    doc = {
        "_type": STATEMENT_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": plan.build_type,
                "externalParameters": {
                    "buildCommand": command,
                    "source": source,
                },
                "internalParameters": {
                    **plan.parameters,
                    "lockfileHash": {"sha256": sha256_hex(plan.lock)},
                    "toolchain": {
                        name: {"digest": {"sha256": program.sha256}, "version": program.version}
                        for name, program in {**plan.programs, "kettle": kettle}.items()
                    },
                },
                "resolvedDependencies": plan.dependencies,
            },
            "runDetails": {
                "builder": {"id": builder},
                "byproducts": [root, *itertools.starmap(descriptor, byproducts.items())],
                "metadata": {
                    "invocationId": f"build-{clock}-{secrets.token_hex(4)}",
                    "startedOn": started,
                    "finishedOn": utc_now(),
                },
            },
        },
        "predicateType": PREDICATE_TYPE,
        "subject": [*itertools.starmap(descriptor, sorted(subjects.items()))],
    }
    try:
        check_statement(parse_json(to_canonical(doc), "provenance"))
    except (Malformed, UnicodeEncodeError) as e:
        raise BuildFailed("ProvenanceError", str(e)) from None
    root["digest"]["sha256"] = merkle_root(merkle_entries(doc))
    return to_canonical(doc)


# endregion 28
# ==============================================================================
# region 29. Comparison                                            [uses 16, 17]
# ==============================================================================
# Shows the facts of a bundle in other forms: the differences between two bundles, a CycloneDX bill of materials, and a
# SLSA Verification Summary.  Pure.  Only verify_bundle says whether the facts are true; callers print its verdict too.

_ALGORITHMS = {32: "MD5", 40: "SHA-1", 64: "SHA-256", 96: "SHA-384", 128: "SHA-512"}  # by digits [CYCLONEDX hash]


Facts = Mapping[str, Strings]  # part -> name -> value


def bundle_facts(doc: Any, verdict: Verdict) -> Facts:
    """Return what the bundle with the Statement doc says, without times, logs and nonces."""
    definition, run = doc["predicate"]["buildDefinition"], doc["predicate"]["runDetails"]
    external, internal = definition["externalParameters"], dict(definition["internalParameters"])
    lock, tools = internal.pop("lockfileHash"), internal.pop("toolchain")
    dependencies: dict[str, list[str]] = {}
    for dependency in definition["resolvedDependencies"]:
        package, version, query = split_uri(dependency["uri"])
        others = [f"{k}:{value}" for k, value in dependency["digest"].items() if value not in dependency["uri"]]
        dependencies.setdefault(package, []).append(" ".join(filter(None, [version, query, *others])))
    measured = {"measurement": str(verdict.claims["measurement"])} if verdict.claims.get("measurement") else {}
    return {
        "source": {"uri": external["source"]["uri"], **external["source"]["digest"]},
        "build": {
            "type": definition["buildType"],
            "command": external["buildCommand"],
            "builder": run["builder"]["id"],
            **{name: compact_json(value) for name, value in internal.items()},
        },
        "lock file": lock,
        "toolchain": {name: f"{tool['version']} sha256:{tool['digest']['sha256']}" for name, tool in tools.items()},
        "dependencies": {name: "; ".join(sorted(versions)) for name, versions in sorted(dependencies.items())},
        "platform": {"platform": verdict.platform, **measured},
        "artifacts": {subject["name"]: subject["digest"]["sha256"] for subject in doc["subject"]},
    }


def split_uri(uri: str) -> tuple[str, str, str]:
    """Return (package, version, qualifiers) of a dependency.  [PURL]

    The version follows the last @ of the last part of the path. That of npm may be a path or a URL with more of them.
    """
    path, _, query = uri.partition("?")
    [(package, version), *_] = re.findall(r"(pkg:npm/.[^@]*(?=@)|.*(?=@[^@/]*$)|.*)@?(.*)", path)
    return package, version, query


def differences(a: Facts, b: Facts) -> list[dict[str, str | None]]:
    """Return each fact that differs between two bundles; None stands for a fact that one of them lacks."""
    return [
        {"part": part, "name": name, "a": a[part].get(name), "b": b[part].get(name)}
        for part in a
        for name in {**a[part], **b[part]}
        if a[part].get(name) != b[part].get(name)
    ]


_EMBEDDED_TIME = re.compile(r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d|(?<!\d)[12]\d{9}(\d{9})?(?!\d)")  # the last: since 1970


def elf_sections(data: bytes) -> dict[str, bytes]:
    """Return name -> contents of the sections of a 64-bit little-endian ELF file; none for any other file.  [ELF]"""
    found = {}
    with suppress(struct.error, IndexError, OverflowError):
        # e_shoff, e_shentsize, e_shnum, e_shstrndx
        start, size, count, names = struct.unpack_from("<40xQ10xHHH", data)
        # sh_name, sh_type, sh_offset, sh_size; SHT_NOBITS, 8, has no contents
        rows = [struct.unpack_from("<II16xQQ", data, start + size * number) for number in range(count)]
        if data.startswith(b"\x7fELF\2\1") and sum(row[3] for row in rows if row[1] != 8) <= len(data):
            for name, kind, offset, length in rows:
                begin = rows[names][2] + name  # at most 256 bytes of a name: 65,535 of them could share one of 1 GiB
                text = data[begin : begin + 256].partition(b"\0")[0].decode("utf-8", "replace")
                found[text] = data[offset : offset + length * (kind != 8)]
    return found


def explain_difference(a: bytes, b: bytes) -> str:
    """Return where two files differ: the section of an ELF file, and the path, time or text that it contains there.

    Constants come first, since code refers to them by address, and notes last, since one is a hash of all the others.
    """
    where, old, new = "", elf_sections(a), elf_sections(b)
    for name in sorted({**old, **new}, key=lambda name: (name != ".rodata", name.startswith((".note", ".shstrtab")))):
        if old and new and old.get(name) != new.get(name):
            if name not in old or name not in new:
                return f"only one of them has the ELF section {name}"
            where, a, b = f"ELF section {name}, ", old[name], new[name]
            break
    at = len(commonprefix((a, b)))
    texts = [
        re.findall(rb"[ -~]*\Z", one[max(0, at - 100) : at])[0] + re.findall(rb"[ -~]*", one[at : at + 100])[0]
        for one in (a, b)
    ]
    kind, shown = "bytes", [one[at : at + 16].hex() for one in (a, b)]
    if min(map(len, texts)) > 3:
        shown = [text.decode("ascii") for text in texts]
        has_times, have_paths = all(map(_EMBEDDED_TIME.search, shown)), all("/" in text for text in shown)
        kind = "time" if has_times else ("path" if have_paths else "text")
    return f"{where}byte {at}: the {kind} {shown[0]!r} has become {shown[1]!r}"


def cyclonedx_hashes(digest: Strings) -> list[dict[str, str]]:
    """Return a DigestSet as hashes.  A commit and a directory's hash have no place there, and are left out.

    A value is in hexadecimal digits, in base64, or in the form of [SRI], as recorded.
    """
    found = []
    for value in [
        word for kind, text in digest.items() if kind not in ("gitCommit", "dirHash") for word in text.split()
    ]:
        if not re.fullmatch("[0-9a-f]+", value):
            encoded = value.partition("?")[0].rpartition("-")[2] + "=="  # if these are too many, they do not count
            with suppress(ValueError):  # the oldest bundles have texts that are no digests
                value = base64.b64decode(encoded).hex()
        if len(value) in _ALGORITHMS:
            found.append({"alg": _ALGORITHMS[len(value)], "content": value})
    return found


def make_sbom(doc: Any) -> Any:
    """Return a CycloneDX 1.6 document of the Statement doc.  [CYCLONEDX]

    Artifacts are of type `file`, dependencies `library`; the toolchain is `application` with the scope `excluded`.
    """
    definition = doc["predicate"]["buildDefinition"]
    source = definition["externalParameters"]["source"]

    def component(kind: str, ref: str, name: str, digest: Strings, **more: Any) -> Json:
        return {"type": kind, "bom-ref": ref, "name": name, **more, "hashes": cyclonedx_hashes(digest)}

    files = [component("file", f"artifact:{row['name']}", row["name"], row["digest"]) for row in doc["subject"]]
    libraries = []
    for number, row in enumerate(definition["resolvedDependencies"]):
        uri, digests = row["uri"], row["digest"]
        purl = {"purl": uri} if uri.startswith("pkg:") else {}
        properties = [{"name": f"digest:{kind}", "value": value} for kind, value in digests.items()]
        libraries.append(
            component(
                "library",
                f"dependency:{number}:{uri}",  # several may have one uri
                row["name"],
                digests,
                version=split_uri(uri)[1],
                properties=properties,
                **purl,
            )
        )
    tools = [
        component("application", f"tool:{name}", name, tool["digest"], version=tool["version"], scope="excluded")
        for name, tool in definition["internalParameters"]["toolchain"].items()
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(sha256_hex(to_canonical(doc))[:32])}",
        "version": 1,
        "metadata": {
            "timestamp": doc["predicate"]["runDetails"]["metadata"]["startedOn"],
            "lifecycles": [{"phase": "build"}],
            "component": {
                "type": "application",
                "bom-ref": "build",
                "name": source["uri"] or source["digest"]["gitTree"],
                "version": source["digest"]["gitCommit"] or source["digest"]["gitTree"],
            },
        },
        "components": [*files, *libraries, *tools],
        "dependencies": [{"ref": "build", "dependsOn": [part["bom-ref"] for part in (*files, *libraries)]}],
    }


def make_vsa(files: BundleFiles, verdict: Verdict, accepted: bool, expected: Expectations, now: datetime) -> Any:
    """Return a SLSA Verification Summary of the verdict over the bundle.  [VSA]

    It claims build level 1, and level 2 if hardware of AMD or Intel signed the evidence for a VM with a measurement
    that the caller named, and not in debug mode.  Level 3 is about the design of what was measured, which no check can
    prove.  Simulated evidence is marked as such.
    accepted: whether the caller counts the verdict as success.
    expected: the policy of the summary; its digest is the SHA-256 of it as JSON with sorted keys.
    """
    source = verdict.claims.get("source", {"uri": ""})["uri"]
    passed = {check.name for check in verdict.checks if check.status == "passed"}
    # The host of a VM in debug mode can make any bundle there, and so can whoever owns the keys of --roots. So can
    # anybody who starts the named firmware with software of their own: the registers of a TD or TPM tell what it was.
    registers = {"rtmr": "RTMR values", "pcrs": "PCR values"}
    if not {1, 2} <= (expected.rtmrs or {}).keys():
        passed.discard("RTMR values")  # the operating system extends RTMR1 and RTMR2; any can give RTMR3 a value
    needed = {registers.get(claim, "trust anchors") for claim in verdict.claims}
    proven = verdict.ok and passed & MEASURED and needed <= passed and not verdict.claims.get("debug")
    simulated = ["CONFBUILD_SIMULATED"] * (verdict.verdict == "simulated")
    policy = {name: v for name, v in expected._asdict().items() if v != Expectations._field_defaults[name]}
    documents = {"provenance.json": files.provenance or b"", "evidence.json": files.evidence}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [descriptor(name, digest) for name, digest in files.artifacts.items() if _HEX64.fullmatch(digest)],
        "predicateType": "https://slsa.dev/verification_summary/v1",
        "predicate": {
            "verifier": {"id": "urn:confbuild:verifier:v1", "version": {"confbuild": __version__}},
            "timeVerified": utc_time(now.timestamp()),
            "resourceUri": source or f"urn:sha256:{sha256_hex(documents['provenance.json'])}",
            "policy": {
                "uri": "urn:confbuild:expectations:v1",
                "digest": {"sha256": sha256_hex(json.dumps(policy, default=str, sort_keys=True).encode())},
            },
            "inputAttestations": [{"uri": n, "digest": {"sha256": sha256_hex(d)}} for n, d in documents.items()],
            "verificationResult": "PASSED" if accepted else "FAILED",
            "verifiedLevels": [f"SLSA_BUILD_LEVEL_{2 if proven else 1}", *simulated] if accepted else ["FAILED"],
            "slsaVersion": "1.0",
        },
    }


# endregion 29
# ==============================================================================
# region 30. Metrics                                              [uses nothing]
# ==============================================================================
# What an operator can alert on, in the text format of Prometheus [CONTRACT 1.17].  Counters that several threads change
# are kept here, under one lock, and none changes with each event or byte.  Such numbers belong to the objects that do
# the work; GET /metrics asks for them.  Any thread may call this.

_BUCKETS = "0.1 0.5 1 5 15 60 300 1800 +Inf".split()  # seconds
# fmt: off
METRICS = {  # name -> (type, help)
    "confbuild_build_info":                 ("gauge",     "The version, as a label."),
    "confbuild_queue_jobs":                 ("gauge",     "Builds that wait for a slot."),
    "confbuild_running_jobs":               ("gauge",     "Builds that run."),
    "confbuild_slots":                      ("gauge",     "Builds that can run at a time."),
    "confbuild_builds_total":               ("counter",   "Builds that ended, by toolchain, and ok or error_type."),
    "confbuild_wait_seconds":               ("histogram", "Time from the submission of a build to its start."),
    "confbuild_boot_seconds":               ("histogram", "Time until the agent of a VM answered."),
    "confbuild_build_seconds":              ("histogram", "Time from the start of a build to its end."),
    "confbuild_events_appended_total":      ("counter",   "Events in the logs of builds."),
    "confbuild_event_bytes_appended_total": ("counter",   "Bytes in the logs of builds."),
    "confbuild_events_sent_total":          ("counter",   "Events sent to watchers."),
    "confbuild_bytes_sent_total":           ("counter",   "Bytes of event streams and downloads."),
    "confbuild_watchers":                   ("gauge",     "Open event streams and downloads."),
    "confbuild_http_requests_total":        ("counter",   "Requests, by route and status."),
    "confbuild_vms_started_total":          ("counter",   "VMs that were started."),
    "confbuild_vms_lost_total":             ("counter",   "VMs that failed, with a build or while they waited."),
    "confbuild_disk_free_bytes":            ("gauge",     "Free space on the disk of the state."),
    "process_cpu_seconds_total":            ("counter",   "Processor time of the server."),
    "process_resident_memory_bytes":        ("gauge",     "Memory of the server."),
}
# fmt: on
_counting = _thread.allocate_lock()  # as of threading, which would be imported for it
# (sample, labels) -> value; for the holder of _counting.  A counter without labels exists from the start: if it first
# appeared as 1, an alert on its increase would miss that.
_counts: dict[tuple[str, str], float] = {("confbuild_vms_started_total", ""): 0, ("confbuild_vms_lost_total", ""): 0}


def count(sample: str, amount: float = 1, **labels: object) -> None:
    """Add amount to a sample of METRICS. labels: values without quotation marks, backslashes and line breaks."""
    text = ",".join(f'{name}="{value}"' for name, value in labels.items())
    with _counting:
        _counts[sample, text] = _counts.get((sample, text), 0) + amount


def observe(name: str, seconds: float) -> None:
    """Add an observation to a histogram of METRICS."""
    for bound in _BUCKETS:
        count(f"{name}_bucket", seconds <= float(bound), le=bound)
    count(f"{name}_sum", seconds)
    count(f"{name}_count")


def render_metrics(gauges: Mapping[str, float]) -> str:
    """Return the text of all metrics. gauges: the values of those that are not counted here."""
    with _counting:
        counts = dict(_counts)
    counts |= {(name, ""): value for name, value in gauges.items()}
    counts["confbuild_build_info", f'version="{__version__}"'] = 1
    lines = []
    for name, (kind, text) in METRICS.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        parts = (name, f"{name}_bucket", f"{name}_sum", f"{name}_count")
        lines += [f"{sample}{{{labels}}} {value}" for (sample, labels), value in counts.items() if sample in parts]
    return "\n".join([*lines, ""])


# endregion 30
# ==============================================================================
# region 31. Event log                                                 [uses 21]
# ==============================================================================
# A job's log is one append-only file that holds the frames of its event stream [SSE] exactly as they are sent.  It is
# the only record of the events; a reader is a position in it.  A frame is written whole before it is published, so no
# reader sees a part of one.  Frames carry their number: the last frame gives the count, and a binary search finds any
# other frame, so nothing is kept in memory and a log of any size opens in a few reads.
# Callers: jobs own the logs; the event streams and the host's relay read them.  Specifications: [SSE], [CONTRACT 1.7].
# Any thread may append or read.

MAX_FRAME = 4 * MIB  # more than the longest event that relay_events accepts
# Occurs only in the frame of a `complete` event: inside a message, JSON escapes the LF.
_COMPLETE_MARK = '\ndata: {"type":"complete",'
BUILD_START, BUILD_END = '{"type":"build","msg":"', '"}'  # of a `build` event, around its message
UNESCAPED = bytes(set(range(0x20, 0x7F)) - set(b'"\\'))  # the characters that compact_json does not escape


class Payloads(NamedTuple):
    """The JSON objects of some events: each of parts, between before and after, is one line of ASCII."""

    parts: Sequence[str]
    before: str = ""
    after: str = ""


def to_payloads(phase: str, messages: Sequence[str]) -> Payloads:
    """Return the events of one phase, as compact_json would write them; fast if no character needs an escape."""
    if phase in PHASES:
        joined = "".join(messages)
        if joined.isascii() and not joined.encode("ascii").translate(None, UNESCAPED):
            return Payloads(messages, f'{{"type":"{phase}","msg":"', '"}')
    return Payloads(list(map(json.encoder.encode_basestring_ascii, messages)), f'{{"type":"{phase}","msg":', "}")


def to_payload(event: Json) -> Payloads:
    """Return the Payloads of one event."""
    return Payloads([compact_json(event)])


def to_ndjson(frames: bytes) -> bytes:
    """Return the objects of frames as lines, each with its number as `id`.  [CONTRACT 1.7]"""
    return re.sub(rb"id: (\d+)\ndata: \{", rb'{"id":\1,', frames).replace(b"\n\n", b"\n")


def to_text(frames: bytes) -> bytes:
    """Return the lines of the `build` events in frames."""
    messages = re.findall(rb'\ndata: \{"type":"build","msg":(".*")\}\n\n', frames)
    lines = [*json.loads(b"[%b]" % b",".join(messages)), ""]
    return "\n".join(lines).encode("utf-8")


def find_log_end(fd: int, size: int) -> tuple[int, int, bool]:
    """Return (end, count, finished) of the log in the first size bytes of the file fd, from its last frame.

    end: the offset of the end of the last whole frame; bytes after it are a torn frame.
    count: the number of that frame.
    finished: whether it is a `complete` event.
    Raises Malformed if the file does not end with a frame, or with a frame and the beginning of the next one.
    """
    span, head = 4 * KIB, b"id: 1\ndata: {"
    while True:
        span = min(span, size)
        data = os.pread(fd, span, size - span)
        end = data.rfind(b"\n\n") + 2
        start = data.rfind(b"\n\n", 0, max(0, end - 2)) + 2
        if start >= 2 or span == size:
            break
        if span >= MAX_FRAME:
            raise Malformed("events", f"no frame begins in the last {span} bytes, expected one in {MAX_FRAME}")
        span *= 4
    if end < 2 and head.startswith(data[: len(head)]):
        return 0, 0, False
    frame = data[start if start >= 2 else 0 : end]
    match = re.match(rb"id: ([1-9][0-9]{0,17})\ndata: \{", frame)
    if not match or start < 2 and int(match[1]) != 1:
        raise Malformed("events", "the last frame is damaged, expected `id: N` and `data: {...}`")
    return size - span + end, int(match[1]), _COMPLETE_MARK.encode() in frame


class EventLog:
    """The log of one job, in the file at path.

    A torn frame at the end is cut off by the first append.  A crash of the machine can replace bytes with zeros; the
    log of an unfinished job then ends before them.
    on_append: called with the log after each append, by the thread that appended.
    flags: of open(2); by default a missing file is created.
    Raises OSError, and Malformed if the file is not a log.

    size, count and finished are written under _lock, in this order; a reader may read them without it.
    phases: the first event of each phase that this object appended -> its time, in seconds since 1970.
    owner: is kept alive by whoever reads the log.
    waiting: the watchers that have received everything so far; belongs to their streamer.
    """

    owner: Any = None

    def __init__(
        self, path: str, on_append: "Callable[[EventLog], None]" = lambda _: None, flags: int = os.O_RDWR | os.O_CREAT
    ) -> None:
        self.fd = open_regular(path, flags)
        weakref.finalize(self, os.close, self.fd)
        self._on_append = on_append
        self.waiting: set[Any] = set()
        self._lock = threading.Lock()
        length = os.fstat(self.fd).st_size
        try:
            found = find_log_end(self.fd, length)
        except Malformed:
            found = (0, 0, False)
        if not found[2]:
            found = find_log_end(self.fd, self._first_zero(length))
        self.size, self.count, self.finished = found
        self.phases: dict[str, float] = {}
        self._torn = length > self.size  # guarded by _lock; bytes follow the last frame

    def _first_zero(self, length: int) -> int:
        """Return the offset of the first zero byte, or length.  JSON has none; lost blocks of a file read as zeros."""
        for offset in range(0, length, BLOCK):
            at = os.pread(self.fd, BLOCK, offset).find(b"\0")
            if at >= 0:
                return offset + at
        return length

    def append(self, payloads: Payloads) -> None:
        """Append events.  Raises OSError, and then the log is unchanged; ValueError if the log is complete."""
        if not payloads.parts:
            return
        before, after = "\ndata: " + payloads.before, payloads.after + "\n\n"
        with self._lock:
            if self.finished:
                raise ValueError("the log is complete")
            frames = [f"id: {n}{before}{part}{after}" for n, part in enumerate(payloads.parts, self.count + 1)]
            data = memoryview("".join(frames).encode("ascii"))
            written = 0
            try:
                if self._torn:
                    os.ftruncate(self.fd, self.size)
                self._torn = True
                while written < len(data):
                    written += os.pwrite(self.fd, data[written:], self.size + written)
                finished = _COMPLETE_MARK in frames[-1]
                if finished:  # the whole log survives a crash of the machine before anybody is told
                    os.fsync(self.fd)
                self._torn = False
            except OSError:
                os.ftruncate(self.fd, self.size)
                raise
            self.count += len(frames)
            self.size += len(data)
            self.finished = finished
            self.phases.setdefault(frames[0].split('"', 4)[3], round(time.time(), 3))
        self._on_append(self)

    def lacks_only(self, event: Payloads) -> bool:
        """Return whether only the beginning of event's frame, or zeros, follow the last whole frame."""
        frame = f"id: {self.count + 1}\ndata: {event.parts[0]}\n\n".encode("ascii")
        rest = os.pread(self.fd, MIB, self.size)
        return len(rest) < MIB and frame.startswith(rest.rstrip(b"\0"))

    def offset_of(self, count: int) -> int:
        """Return the offset of event number count + 1, or the log's size if that does not exist yet.

        Raises OSError if the log is damaged.
        """
        with self._lock:
            if count >= self.count:
                return self.size
            low, high = 0, self.size  # the event begins at low or later, and before high
        while high - low > 64 * KIB:
            middle = (low + high) // 2
            start, number = self._next_frame(middle, high)
            if number > count + 1:
                high = middle
            else:
                low = start
        wanted = b"id: %d\n" % (count + 1)
        data = b"\n\n" + os.pread(self.fd, high - low + len(wanted), low)
        at = data.find(b"\n\n" + wanted)
        if at < 0:
            raise OSError("the log is damaged")
        return low + at

    def _next_frame(self, offset: int, end: int) -> tuple[int, float]:
        """Return (offset, number) of the first frame that begins at offset or later; (end, inf) if none does."""
        data, at = b"", max(0, offset - 2)
        while at + len(data) < end + 32:  # 32: the number of a frame that begins just before end
            more = os.pread(self.fd, max(4 * KIB, len(data)), at + len(data))
            data += more
            match = re.search(rb"\n\nid: ([0-9]{1,18})\n", data)
            if match:
                return at + match.start() + 2, int(match[1])
            if not more:
                break
        return end, float("inf")

    def last(self) -> Json:
        """Return the last event, or an empty object."""
        offset = self.offset_of(max(0, self.count - 1))
        frame = os.pread(self.fd, self.size - offset, offset)
        return dict(json.loads(frame.partition(b"\ndata: ")[2])) if frame else {}


# endregion 31
# ==============================================================================
# region 32. Event streams                                     [uses 18, 21, 31]
# ==============================================================================
# One thread serves every watcher of every job, and every download.  A request's thread hands over a socket and the head
# of its response; from then on the streamer's thread owns the socket and sends the bytes from the watcher's position to
# the end of the log, chunked [RFC9112 7.1] for HTTP/1.1 clients.  Large ranges go through sendfile; small ones, which
# many watchers want at once, are read once for all of them.  Appenders only enqueue a note, and wake the thread if it
# sleeps; they never wait for a reader.  A client that reads nothing for STALL_S is disconnected.
# Callers: the HTTP API; jobs through Streamer.grown.  Specifications: [CONTRACT 1.7], [SSE].
#
# Thread "streams": started by Streamer, owns its watchers and the selector, ended by stop().

KEEPALIVE_S = 15.0  # silence before a comment [CONTRACT 1.7]
STALL_S = 60.0  # until a client that reads nothing is disconnected [CONTRACT 1.7]
READ, WRITE = 1, 2  # selectors.EVENT_READ and EVENT_WRITE, without importing selectors for them
_SMALL = 64 * KIB
# The bytes that one watcher gets before the next one's turn.  A single watcher gets many, for few system calls; several
# get fewer, so that all of them get a range of the log while it is in the processor's cache (8 readers: 1.3 times the
# speed of turns of 1 MiB).
_TURN, _SHARED_TURN = MIB, 256 * KIB


def wait_mask(e: OSError, sending: bool) -> int:
    """Return the selector event to wait for before a socket operation that raised e is repeated, or 0 if it failed.

    sending: whether the operation was a send.
    """
    waits = {
        "BlockingIOError": WRITE if sending else READ,
        "SSLWantReadError": READ,  # by name: most servers never import ssl
        "SSLWantWriteError": WRITE,
    }
    return waits.get(type(e).__name__, 0)


class WakeableSelector:
    """A selector for one thread, which other threads wake by posting notes.

    A registered object has the attributes sock and mask; mask holds the events that the selector waits for.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._waker)  # not earlier: another thread may be about to write to it
        self._selector.register(self._waker, READ)
        self._notes: deque[Any] = deque()
        self._asleep = False

    def post(self, note: Any) -> None:
        """Enqueue note for the selector's thread.  Any thread may call this; it never waits."""
        self._notes.append(note)
        if self._asleep:  # wait() sets it before it looks at the notes for the last time, so no note is missed
            self._asleep = False
            os.eventfd_write(self._waker, 1)

    def wait(self, timeout: float | None) -> list[tuple[Any, int]]:
        """Wait for events, a note or the timeout in seconds.  Return the objects that have events, with the events."""
        self._asleep = True
        events = self._selector.select(0 if self._notes else timeout)
        self._asleep = False
        ready = [(key.data, mask) for key, mask in events if key.data is not None]
        if len(ready) < len(events):
            os.eventfd_read(self._waker)
        return ready

    def notes(self) -> Iterator[Any]:
        """Remove and yield the notes, oldest first."""
        while self._notes:
            yield self._notes.popleft()

    def set_mask(self, end: Any, mask: int) -> None:
        """From now on, wait for the events in mask on end.sock; 0 is none."""
        if mask == end.mask:
            return
        if end.mask:
            self._selector.unregister(end.sock)
        if mask:
            self._selector.register(end.sock, mask, end)
        end.mask = mask

    def close(self) -> None:
        """Close the selector.  Later notes are ignored."""
        self._selector.close()


class OpenFile:
    """A regular file, open for reading; it is closed with the last reference.  Raises Malformed, OSError.

    size: where a watcher's range ends; at first, the size of the file.
    count, finished, offset_of, waiting: as of a complete EventLog whose events are bytes.
    """

    count, finished = 0, True
    owner: Any = None

    def __init__(self, path: str) -> None:
        self.fd = open_regular(path)
        weakref.finalize(self, os.close, self.fd)
        self.waiting: set[Any] = set()
        self.size = os.fstat(self.fd).st_size

    def offset_of(self, count: int) -> int:
        """Return count: here, events are bytes."""
        return count


class Watcher:
    """A client that follows a log, or downloads a file up to its size.

    start: the number of events of the log, or of bytes of the file, that the client does not want.
    chunked: whether the stream uses the chunked transfer coding, and its last chunk is still to come.
    greeting: bytes to send first, in the framing of the stream.
    then: called when everything has been sent, instead of closing the socket.

    position: the offset in source; -1 until the log has start events.
    left: the number of bytes to send from there by sendfile.
    pending: bytes to send before those.
    peer_half_closed: the peer sends nothing more.
    ndjson: the stream has a line of JSON for each event, instead of its frame.
    since: the time of the last progress, by the monotonic clock.
    files: the number of its descriptors: a socket, and the source unless that is the log of a running job.
    """

    position = -1
    left = 0
    peer_half_closed = False
    mask = 0

    def __init__(
        self,
        sock: "socket.socket",
        source: EventLog | OpenFile,
        start: int,
        chunked: bool,
        tls: bool,
        greeting: bytes,
        then: "Callable[[], None] | None" = None,
        ndjson: bool = False,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.source = source
        self.start = start
        self.chunked = chunked
        self.tls = tls
        self.then = then
        self.ndjson = ndjson
        self.pending = self.frame(greeting) if greeting else b""
        self.since = monotonic()
        self.files = 1 + source.finished

    def frame(self, data: bytes) -> bytes:
        """Return data, as one chunk if the stream is chunked."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data


class Streamer:
    """The thread that serves watchers.

    keepalive_s: silence after which a comment is sent.
    stall_s: time without progress after which a watcher is disconnected; it can resume.
    files: the number of descriptors open for watchers.
    events, bytes: how many were sent; the thread alone writes them.
    grown: sends the new events of a log to its watchers.  Any thread may call this; it never waits.
    add: serves a watcher, whose socket now belongs to the streamer.  Any thread may call this.
    """

    _turn = _TURN
    files = 0
    events = 0

    def __init__(self, keepalive_s: float = KEEPALIVE_S, stall_s: float = STALL_S) -> None:
        self._keepalive_s = keepalive_s
        self._stall_s = stall_s
        self.bytes = 0
        self._selector = WakeableSelector()  # notes: a log has grown, a watcher is new, None: stop
        self.served: set[Watcher] = set()
        # Reads a range; keeps the last one for the other watchers that want it, and its file until one is dropped.
        self._read = functools.lru_cache(1)(lambda source, size, position: os.pread(source.fd, size, position))
        self.grown = self.add = self._selector.post
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close every watcher's socket, even in the middle of an event, and end the thread."""
        self._selector.post(None)
        self._thread.join()

    def _run(self) -> None:
        every = min(1.0, self._keepalive_s, self._stall_s)
        scan_at = monotonic() + every
        going = True
        while going:
            events = self._selector.wait(max(0.0, scan_at - monotonic()))
            self._turn = _TURN if len(events) < 2 else _SHARED_TURN
            for note in dict.fromkeys(self._selector.notes()):  # a log may have grown many times
                if isinstance(note, EventLog):
                    waiting, note.waiting = note.waiting, set()
                    while waiting:
                        self._pump(waiting.pop())
                elif note:
                    self.served.add(note)
                    self.files += note.files
                    self._pump(note)
                else:
                    going = False
                del note  # a log keeps its job in use, and there may be no other note for days
            for watcher, mask in events:
                if mask & watcher.mask & READ:  # the mask of a dropped watcher is 0
                    self._on_readable(watcher)
                if mask & watcher.mask & WRITE:
                    self._pump(watcher)
                del watcher
            if monotonic() >= scan_at:
                scan_at = monotonic() + every
                self._scan(monotonic())
        for watcher in list(self.served):
            self._drop(watcher)
        self._selector.close()

    def _want(self, watcher: Watcher, mask: int) -> None:
        """Wait for the events in mask of watcher's socket."""
        if watcher.peer_half_closed or isinstance(watcher.source, OpenFile):  # a download leaves the next request
            mask &= WRITE
        self._selector.set_mask(watcher, mask)

    def _on_readable(self, watcher: Watcher) -> None:
        """Discard input; on end of file, probe with a comment."""
        try:
            received = watcher.sock.recv(_SMALL)
        except OSError as e:
            if not wait_mask(e, False):
                self._drop(watcher)
            return
        if received:
            watcher.then = None  # a request that came too early is lost: close the connection at the end
        else:
            # The peer has closed its socket, or only its sending half: sending a comment shows which.
            watcher.peer_half_closed = True
            self._want(watcher, watcher.mask)
            if not watcher.mask & WRITE:  # it has everything so far
                self._comment(watcher)

    def _comment(self, watcher: Watcher) -> None:
        """Send a comment to a waiting watcher; this fails if the peer is gone."""
        watcher.pending = watcher.frame(b"\n" if watcher.ndjson else b": keepalive\n\n")
        self._pump(watcher)

    def _scan(self, now: float) -> None:
        """Send comments to watchers after a silence, and disconnect those that read nothing."""
        for watcher in [w for w in self.served if not w.mask & WRITE and w.since <= now - self._keepalive_s]:
            self._comment(watcher)
        for watcher in [w for w in self.served if w.mask & WRITE and w.since <= now - self._stall_s]:
            with suppress(OSError):  # the system discards the bytes that it holds for the peer
                watcher.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._drop(watcher)

    def _pump(self, watcher: Watcher) -> None:
        """Send to watcher until it has everything, the socket is full, or the turn is over."""
        turn, mask = self._turn, READ | WRITE
        try:
            while turn > 0:
                sent = 0
                if watcher.pending:
                    sent = watcher.sock.send(watcher.pending, socket.MSG_MORE if watcher.left else 0)
                    watcher.pending = watcher.pending[sent:]
                elif watcher.left:
                    asked = min(watcher.left, turn)
                    sent = os.sendfile(watcher.sock.fileno(), watcher.source.fd, watcher.position, asked)
                    if not sent:
                        raise OSError("the file ends before the range does")
                    watcher.position += sent
                    watcher.left -= sent
                    if watcher.chunked and not watcher.left:
                        watcher.pending = b"\r\n"
                    if sent < asked:
                        turn -= sent
                        break  # the socket is full
                elif not self._next(watcher):
                    return
                turn -= sent
            self._want(watcher, mask)
        except OSError as e:
            if wait_mask(e, True):
                self._want(watcher, mask)
            else:
                self._drop(watcher)
        except Exception:  # noqa: BLE001  # a bug in this code must not end the other streams
            logger().exception("stream")
            self._drop(watcher)
        finally:
            if turn < self._turn:
                self.bytes += self._turn - turn
                watcher.since = monotonic()

    def _next(self, watcher: Watcher) -> bool:
        """Set up the next bytes for watcher.  Return False if there are none now, or none any more."""
        source = watcher.source
        finished = source.finished  # read before size: a finished log has its final size
        if watcher.position < 0 and (finished or source.count >= watcher.start):
            watcher.position = source.offset_of(watcher.start)
        rest = source.size - watcher.position
        if watcher.position >= 0 and rest > 0:
            if rest > _SMALL and not (watcher.tls or watcher.ndjson):
                watcher.left = rest
                watcher.pending = b"%x\r\n" % rest if watcher.chunked else b""
                return True
            data = self._read(source, min(rest, _SMALL), watcher.position)  # TLS has no sendfile
            if not data:
                raise OSError("the file ends before the range does")
            if watcher.ndjson:
                if b"\n\n" not in data:  # a long event
                    data = os.pread(source.fd, min(rest, MAX_FRAME), watcher.position)
                data = data[: data.rfind(b"\n\n") + 2]
                if len(data) < 2:
                    raise OSError("the log is damaged")
            watcher.pending = watcher.frame(to_ndjson(data) if watcher.ndjson else data)
            watcher.position += len(data)
            return True
        if watcher.start < source.count:
            self.events += source.count - watcher.start
            watcher.start = source.count
        if finished and watcher.chunked:
            watcher.chunked = False  # after the last chunk
            watcher.pending = b"0\r\n\r\n"
            return True
        if finished:
            self._drop(watcher, watcher.then)
            return False
        watcher.since = monotonic()
        source.waiting.add(watcher)
        self._want(watcher, READ)
        return False

    def _drop(self, watcher: Watcher, then: "Callable[[], None] | None" = None) -> None:
        """Stop serving watcher, and call then instead of closing its socket."""
        watcher.source.waiting.discard(watcher)
        self._want(watcher, 0)
        self._read.cache_clear()
        self.served.discard(watcher)
        self.files -= watcher.files
        (then or watcher.sock.close)()


# endregion 32
# ==============================================================================
# region 33. Jobs                                  [uses 18, 21, 23, 30, 31, 32]
# ==============================================================================
# The jobs of a server, and their files [CONTRACT 1.15]: jobs/<id>/ holds job.json, written durably before the job is
# accepted; source, the uploaded archive; events, the log; and finally result.tar.gz.  A job has ended if its log has
# a `complete`; job.json holds the rest.  If the files of a job are invalid or contradict each other, the job is
# "damaged": it is listed, its files are left alone, and no other job is affected.  Any thread may call Job and Jobs.
#
# Files are written outside of Jobs._changed, so that a slow disk delays only callers that wait for that job.
# Job.writing serializes the writes of one job.  Lock order: Job.writing; then Jobs._changed, Job._halting or an
# EventLog's lock; JobTable._lock last.  Memory holds only the order of the jobs that have ended, so that a state of any
# size costs little.
#
# Threads, which Jobs.start starts and Jobs.stop ends; they survive any exception.  "slot N": runs one job at a time.
# "queue": announces positions, and completes jobs that a full disk has kept from ending.  "keeper": syncs logs, and
# removes finished builds that are not kept.

STATE_VERSION = 1
_STATE_MARKER = "confbuild-state"
_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MAX_SEQ = 10**18  # jobs with this number are ordered by their times
BUSY = {"Retry-After": "10"}
SYNC_S = 5.0  # time between two syncs of the logs of running builds; every 12th time, builds are removed
YOUNG_S = 60.0  # time that a finished build is kept in any case, for those who waited for it
RETRY_S = 5.0  # time until a job that could not end, because the disk is full, tries again
ANNOUNCE_S = 1.0  # minimum time between two positions that a job announces

_RESULT = {"size": int, "sha256": re.compile("[0-9a-f]{64}")}
_FAILURE = {"error": str, "error_type": str}
KEY_S = 24 * 3600.0  # how long an Idempotency-Key returns its job [CONTRACT 1.6]
IDEMPOTENCY_KEY = re.compile(r"[ !#-\[\]-~]{1,255}")  # printable ASCII, no quotation mark or backslash
# state -> (the states that may follow; in job.json: finished_at, result, failure).  [CONTRACT 1.12]
# A job that has not ended has a failure if its cancellation is recorded, but not published yet.
# fmt: off
JOB_STATES: Mapping[str, tuple[Sequence[str], Any, Any, Any]] = {
    "queued":  (("running", "failed"),       "",   None,    (None, _FAILURE)),  # failed: cancelled
    "running": (("queued", "ok", "failed"),  "",   None,    (None, _FAILURE)),  # queued: parked by Jobs.stop
    "ok":      ((),                          WORD, _RESULT, None),
    "failed":  ((),                          WORD, None,    _FAILURE),
}
# fmt: on
_JOB_SCHEMAS = {
    state: {
        "seq": int,
        "request": dict.fromkeys(BuildRequest._fields[:4], str)
        | {"toolchain?": str, "subdir?": str, "artifacts?": [str]},
        "attempts": int,
        "submitted_at": str,
        "started_at": str,
        "state": state,
        "finished_at": finished_at,
        "result": result,
        "failure": failure,
        "phases?": dict,
        "key?": ("", IDEMPOTENCY_KEY),
    }
    for state, (_, finished_at, result, failure) in JOB_STATES.items()
}


def claim_state(state: str) -> int:
    """Claim the directory state for this process, creating it if absent. Return the descriptor that holds the claim.

    Raises UsageError if another server uses it or it is not a state directory: it has no marker, and is neither empty
    nor written by confbuild 0.1, which wrote no marker. [CONTRACT 1.15] Raises OSError.
    """
    try:
        os.makedirs(state, mode=0o700, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{state} cannot be made: {e.strerror}", "choose another directory with --state") from None
    marker, jobs = join(state, _STATE_MARKER), join(state, "jobs")
    if lexists(marker):
        match = None
        with suppress(Malformed):
            match = re.fullmatch(rb"confbuild state ([1-9][0-9]{0,8})\n", read_regular(marker, 100))
        if not match:
            raise UsageError(f"{marker} is damaged: expected 'confbuild state {STATE_VERSION}'")
        if int(match[1]) > STATE_VERSION:
            raise UsageError(
                f"{state} was written by a newer confbuild: state version {int(match[1])}, expected {STATE_VERSION}"
            )
    else:  # it must be empty, a state of 0.1, or one that could not be marked before
        # `serve --state DIR > DIR/server.log` creates that file first.
        output = [realpath(f"/proc/self/fd/{fd}") for fd in (1, 2)]
        found = {name for name in os.listdir(state) if join(realpath(state), name) not in output}
        found -= {_STATE_MARKER + ".tmp", "lock"}
        is_state = isdir(jobs) and all(map(_JOB_ID.fullmatch, os.listdir(jobs)))
        if found and not (is_state and found <= {"incoming", "guests", "jobs"}):
            raise UsageError(
                f"{state} is neither empty nor a state directory of confbuild", "choose another directory with --state"
            )
    lock = os.open(join(state, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_durably(marker, b"confbuild state %d\n" % STATE_VERSION)
    except OSError as e:
        os.close(lock)
        busy = isinstance(e, BlockingIOError)
        reason = "is in use by another server" if busy else f"cannot be written: {e.strerror}"
        raise UsageError(f"{state} {reason}") from None
    return lock


class JobRecord(NamedTuple):
    """The contents of job.json.

    result: size and SHA-256 of the archive.
    failure: error and error_type of the `complete` event.
    phases: of a job that has ended, as of EventLog.
    key: the Idempotency-Key of its request, or empty.
    """

    seq: int
    request: BuildRequest
    attempts: int = 0
    state: str = "queued"
    submitted_at: str = ""
    started_at: str = ""
    finished_at: str = ""
    result: Json | None = None
    failure: Strings | None = None
    phases: Mapping[str, float] = {}
    key: str = ""

    def to_bytes(self) -> bytes:
        """Return job.json."""
        return json_bytes(self._asdict() | {"request": self.request._asdict()})

    @classmethod
    def parse(cls, data: bytes) -> "JobRecord":
        """Parse job.json. Raises Malformed."""
        doc = parse_json(data, "job.json")
        state = str(doc.get("state")) if isinstance(doc, dict) else ""
        check_schema(doc, _JOB_SCHEMAS.get(state, tuple(_JOB_SCHEMAS.values())), "job.json")
        record = cls(**doc | {"request": BuildRequest(**doc["request"])})
        if not (0 <= record.seq <= MAX_SEQ and 0 <= record.attempts <= MAX_SEQ):
            raise Malformed("job.json", f"seq {record.seq} or attempts {record.attempts}: not between 0 and {MAX_SEQ}")
        return record

    def complete_event(self) -> Payloads:
        """Return the last event of a job that has ended."""
        result = {"status": "failed", **self.failure} if self.failure else {"status": "ok"}
        return to_payload({"type": "complete", "result": result})

    @property
    def ended(self) -> bool:
        """Whether no other state can follow."""
        return not JOB_STATES[self.state][0]


End = BuildFailed | Json  # of a job: its failure or its result


class Job:
    """A build.

    record: as job.json holds it; replaced by update().
    log: None if the job has ended or is damaged.
    afterwards: what its slot does once the end of the job was published, or when that has failed.
    """

    position: Any = -1  # the last one announced
    tried_at = float("-inf")  # the time of the last try to announce a position, or to complete
    log: EventLog | None = None
    converted = 0  # bytes of the log that log.txt has; belongs to the holder of deriving

    def __init__(self, folder: str, record: JobRecord) -> None:
        self.id = basename(folder)
        self.folder = folder
        self.record = record
        self.afterwards = ExitStack()
        self.writing = threading.Lock()  # its holder writes job.json or an event about the job itself
        self.deriving = threading.Lock()  # its holder makes a file from the others
        self._halting = threading.Lock()
        self._reason: tuple[str, str] | None = None  # guarded by _halting; (error_type, error), why the build must stop
        self._stop: Callable[[], None] | None = None  # guarded by _halting; stops the build; called at most once

    def live_log(self) -> EventLog:
        """Return the log of a job that has not ended."""
        if self.log is None:
            raise ValueError("the job has ended")
        return self.log

    def path(self, name: str) -> str:
        """Return the path of the file called name in the job's folder."""
        return join(self.folder, name)

    @property
    def request(self) -> BuildRequest:
        """The request of the client."""
        return self.record.request

    @property
    def state(self) -> str:
        """A key of JOB_STATES, or "damaged"."""
        return self.record.state

    @property
    def source(self) -> str | None:
        """The path of the uploaded archive, or None for a repo_url."""
        return None if self.request.repo_url else self.path("source")

    def create(self, folder: str, grown: Callable[[EventLog], None], archive: str) -> None:
        """Move the job into folder, after its files and the uploaded archive were synced. Raises OSError."""
        os.mkdir(self.folder, 0o700)
        if self.source:
            sync(archive)
            os.rename(archive, self.source)
        self.log = EventLog(self.path("events"), grown)
        write_durably(self.path("job.json"), self.record.to_bytes())
        os.rename(self.folder, join(folder, self.id))
        self.folder = join(folder, self.id)
        sync(folder)
        self.tried_at = monotonic()  # whoever calls this announces the first position, not the thread "queue"

    def read(self, grown: Callable[[EventLog], None]) -> None:
        """Read the files of an earlier server, without changing them: record, and log if the job has not ended.

        Raises OSError, and Malformed if the files are invalid or contradict each other.
        """
        record = JobRecord.parse(read_regular(self.path("job.json"), MIB))
        self.record = record._replace(result=None)  # until the archive is there
        if record.result is not None:
            self.check_result(record.result["size"])
            self.record = record
        if not record.ended and self.source:
            OpenFile(self.source)
        log = EventLog(self.path("events"), grown, os.O_RDONLY if record.ended else os.O_RDWR)
        if record.ended and log.finished:
            return
        if log.finished:
            raise Malformed("job.json", f"the job is {record.state}, but its log is complete")
        if record.ended:
            if not log.lacks_only(record.complete_event()):
                raise Malformed("events", f"the job is {record.state}, but its log is not complete")
            log = EventLog(self.path("events"), grown, os.O_RDWR)
        if record.state == "queued":
            self.position = log.last().get("position", -1)
        self.log = log

    def check_result(self, size: int) -> OpenFile:
        """Return the archive. Raises OSError, and Malformed unless it has size bytes."""
        file = OpenFile(self.path("result.tar.gz"))
        if file.size != size:
            raise Malformed("result.tar.gz", f"not a regular file of {size} bytes")
        return file

    def open_log(self) -> EventLog:
        """Return the log. Raises OSError, and Refused 404 if it is damaged."""
        if self.log:
            return self.log
        with _refuse_damaged():  # the job has ended
            log = EventLog(self.path("events"), flags=os.O_RDONLY)
        if log.finished:
            return log
        raise Refused(404, "Damaged", (self.record.failure or {}).get("error", "the log of this build has no end"))

    def update(self, **changes: Any) -> None:
        """Change fields of the record: first in job.json, then in memory. Caller must hold writing.

        Raises ValueError for a step that JOB_STATES lacks; OSError, and then nothing has changed.
        """
        record = self.record._replace(**changes)
        if record.state not in (self.state, *JOB_STATES[self.state][0]):
            raise ValueError(f"a job that is {self.state} cannot become {record.state}")
        write_durably(self.path("job.json"), record.to_bytes())
        self.record = record

    def announce(self, position: int) -> None:
        """Append an event with the place in the queue, if it has changed. Caller must hold writing."""
        self.tried_at = monotonic()
        try:
            if self.log and position != self.position:
                self.log.append(to_payload({"type": "queued", "position": position}))
                self.position = position
        except OSError as e:  # the disk may be full; the next announcement makes up for it
            logger().error("job %s: cannot announce its position: %s", self.id, e)

    def halt(self, error_type: str, message: str) -> None:
        """Make a running build stop soon, for the first reason given.

        error_type: of FAILURES, or "Parked" if the next server runs the job again; "Cancelled" replaces it.
        Raises OSError if a cancellation cannot be recorded.
        """
        with self._halting:
            if self._reason is not None and (self._reason[0], error_type) != ("Parked", "Cancelled"):
                return
            self._reason = (error_type, message)
            stop = self._stop
        if stop:
            stop()
        if error_type == "Cancelled":  # holds even if the server dies before the build has stopped
            with self.writing:
                if not self.record.ended:
                    self.update(failure={"error": message, "error_type": error_type})

    def when_halted(self, stop: Callable[[], None]) -> None:
        """Call stop when the job is halted, or at once if it has been. Replaces an earlier stop."""
        with self._halting:
            self._stop = stop
            halted = self._reason is not None
        if halted:
            stop()

    def run(self, build: Callable[[], str]) -> End:
        """Run the build and return its failure or, once the archive is in the job's folder, its result.

        build: returns the path of the archive.
        """
        try:
            with self.writing:
                self.announce(0)
                self.update(state="running", started_at=utc_now(), attempts=self.record.attempts + 1)
            archive = build()
            end: End = {"size": getsize(archive), "sha256": file_sha256(archive)}
            shutil.move(archive, self.path("result.tar.gz"))
            sync(self.path("result.tar.gz"))
        except BuildFailed as e:
            end = e.with_traceback(None)  # whose frames hold end and the job, which would stay in use
        except Exception as e:  # noqa: BLE001  # a bug must not end the slot
            if isinstance(e, OSError) and is_full(e):
                end = limit_error(f"the disk of the server is full: {e.strerror}")
            else:
                logger().exception("job %s", self.id)
                end = BuildFailed("InternalError", "internal error; the log of the server has the details")
        with self._halting:
            if isinstance(end, BuildFailed) and self._reason:
                end = BuildFailed(*self._reason)
            self._reason = ("", "")  # nothing is left to halt
        return end

    def complete(self, end: End) -> None:
        """Record the end durably, then publish it as the last event; park the job if it was halted for that reason.

        Caller must hold writing. Raises OSError.
        """
        changes: dict[str, Any] = {"state": "ok", "failure": None, "result": end}
        if isinstance(end, BuildFailed):
            changes = {"state": "failed", "failure": {"error": str(end), "error_type": end.error_type}}
            if end.error_type == "Parked":  # the next server runs it again; this attempt does not count
                self.update(state="queued", attempts=self.record.attempts - 1)
                return
        log = self.live_log()
        if not self.record.ended:
            self.update(finished_at=utc_now(), phases=dict(log.phases), **changes)
        for left in ("source", "result.tmp"):  # before the last event: after it, the next server does not look
            with suppress(OSError):  # there is none, or it is gone already
                os.unlink(self.path(left))
        log.append(self.record.complete_event())
        _log_end(self, log)


def open_result(job: Job) -> OpenFile:
    """Return the archive. Raises OSError, and Refused 404 if there is none."""
    record = job.record
    if record.result is None:
        error_type = {"failed": "BuildFailed", "damaged": "Damaged"}.get(record.state, "NotReady")
        reason = (record.failure or {}).get("error", "it has not ended")
        raise Refused(404, error_type, f"the build has no result: {reason}")
    with _refuse_damaged():
        return job.check_result(record.result["size"])


def open_text(job: Job) -> OpenFile:
    """Return the lines of the build so far: log.txt. Raises OSError, and Refused 404 if the log is damaged."""
    log, path = job.open_log(), job.path("log.txt")
    with job.deriving, _refuse_damaged():
        if not exists(path):
            whole = log.finished  # read before size: a finished log has its final size
            at, job.converted = job.converted, 0  # if this fails, the next request begins the file anew
            with open(path + ".tmp", "ab" if at else "wb") as f:  # "wb": an earlier server has begun it
                while at < log.size:
                    frames = os.pread(log.fd, MAX_FRAME, at)
                    frames = frames[: frames.rfind(b"\n\n", 0, log.size - at) + 2]
                    if len(frames) < 2:
                        raise Malformed("events", f"no frame ends after byte {at}")
                    f.write(to_text(frames))
                    at += len(frames)
            job.converted = at
            if whole:
                os.rename(path + ".tmp", path)
            else:
                path += ".tmp"
        return OpenFile(path)


def open_member(job: Job, name: str) -> OpenFile:
    """Return the file of the bundle that is called name. Raises Refused 404, OSError."""
    open_result(job)  # raises if there is none
    path = job.path(f"file-{sha256_hex(name.encode('utf-8', 'replace'))}")
    with job.deriving, _refuse_damaged():
        if not exists(path):
            with gzip.open(job.path("result.tar.gz")) as stream:
                for member in tar_members(stream, MAX_UNPACKED):
                    if member.kind == "file" and member.name.partition("/")[2] == name:
                        with open(path + ".tmp", "wb") as f:
                            f.writelines(member.contents)
                        os.rename(path + ".tmp", path)
                        break
                else:
                    raise Refused(404, "NotFound", f"the bundle has no file {name[:80]!r}")
        return OpenFile(path)


@survive("a build that has ended is not counted")
def _log_end(job: Job, log: EventLog) -> None:
    """Log and count a build that has ended."""
    record = job.record
    times = [record.submitted_at, record.started_at or record.finished_at, record.finished_at]
    stamps = (datetime.fromisoformat(text).timestamp() for text in times)
    submitted, started, finished = itertools.accumulate(stamps, max)  # the clock may have been set back
    name = re.sub(r"(\.tar\.gz|\.tgz|\.zip|\.git)$", "", basename(job.request.repo_url or job.request.source_name))
    outcome = (record.failure or {}).get("error_type", "ok")
    toolchain = re.search(rb'"type":"detect","msg":"([a-z]+)"', os.pread(log.fd, 64 * KIB, 0))
    fields = {"job": job.id, "name": safe_name(name), "outcome": outcome, "seconds": round(finished - started, 3)}
    logger().info("job %s %s %s %.1f s", job.id[:4], *list(fields.values())[1:], extra={"fields": fields})
    count("confbuild_builds_total", toolchain=toolchain[1].decode() if toolchain else "", outcome=outcome)
    count("confbuild_vms_lost_total", outcome == "VmError")
    if record.started_at:
        observe("confbuild_wait_seconds", started - submitted)
        observe("confbuild_build_seconds", finished - started)


@contextmanager
def _refuse_damaged() -> Iterator[None]:
    """Raise Refused 404 if the block finds a file of a job missing or damaged."""
    try:
        yield
    except (FileNotFoundError, ValueError, BuildFailed, EOFError, gzip.BadGzipFile, zlib.error) as e:
        reason = f"{basename(e.filename)}: {e.strerror}" if isinstance(e, FileNotFoundError) else e
        raise Refused(404, "Damaged", f"the files of this build are damaged: {reason}") from None


def _read_job(folder: str, grown: Callable[[EventLog], None]) -> Job:
    """Return the job that an earlier server left in folder, damaged if its files are unusable."""
    job = Job(folder, JobRecord(0, BuildRequest("")))
    try:
        job.read(grown)
    except Exception as e:  # the folder of one job must not affect another job
        reason = str(e) or type(e).__name__
        if isinstance(e, OSError):
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise
            reason = f"{basename(e.filename or folder)}: {e.strerror}"
        failure = {"error": f"the files of this build are damaged: {reason}", "error_type": "Damaged"}
        job.record = job.record._replace(state="damaged", failure=failure)
    return job


Order = tuple[int, str, str]  # of a job: seq and submitted_at; and its key


def _order(job: Job) -> Order:
    return job.record.seq, job.record.submitted_at, job.record.key


# The job.json of a job that has ended.  It is only looked at: whoever asks for the job gets all checks.
_ENDED = (
    rb'\{"seq":([0-9]{1,18}),"request":\{.*\},"attempts":[0-9]+,"state":"(?:ok|failed)","submitted_at":"([^"]*)"'
    rb',"started_at":"[^"]*","finished_at":"[^"]+",(?:.*,"key":"([^"]*)"|.*)\}'
)


class JobTable:
    """The jobs of a state. Memory holds only the order of jobs that have ended; each is read when it is asked for.

    incoming: the folder of files that do not belong to a job yet.
    folder: of the jobs.
    """

    def __init__(self, state: str) -> None:
        self.incoming = join(state, "incoming")
        self.folder = join(state, "jobs")
        self._lock = threading.Lock()
        self._order: dict[str, Order] = {}  # guarded by _lock; of all jobs, by id
        self._live: set[Job] = set()  # guarded by _lock; those that have not ended, and damaged ones
        # guarded by _lock; those and the others that somebody uses, by id
        self._used: weakref.WeakValueDictionary[str, Job] = weakref.WeakValueDictionary()
        self._removed = join(state, "removed")  # an empty file for each job that was removed, at that time
        for path in (self.folder, self.incoming, self._removed):
            os.makedirs(path, mode=0o700, exist_ok=True)

    def read(self, grown: Callable[[EventLog], None]) -> tuple[list[Job], int]:
        """Read the jobs of earlier servers. Return those that have not ended, in their order, and the last number.

        The number is that of the last submission, or -1 if there was none.
        """
        for name in os.listdir(self.incoming):
            if re.fullmatch(r"[0-9a-f-]{32,36}", name):  # it was not accepted
                remove_tree(join(self.incoming, name))
        names = filter(_JOB_ID.fullmatch, os.listdir(self.folder))
        found = [_read_job(join(self.folder, name), grown) for name in names if not self._glance(name)]
        for job in found:
            self.add(job)
            if not job.log:
                logger().error("job %s: %s", job.id, (job.record.failure or {}).get("error"))
        with self._lock:
            last = max((seq for seq, *_ in self._order.values()), default=0 if os.listdir(self._removed) else -1)
        return sorted((job for job in found if job.log), key=_order), last

    def _glance(self, job_id: str) -> bool:
        """Add the job if a look at its files shows that it has ended, and return whether it was added."""
        folder = join(self.folder, job_id)
        with suppress(OSError, ValueError):  # damaged
            match = re.fullmatch(_ENDED, read_regular(f"{folder}/job.json", MIB))
            log = OpenFile(f"{folder}/events")
            if match and find_log_end(log.fd, log.size)[2]:
                with self._lock:
                    self._order[job_id] = (int(match[1]), match[2].decode(), (match[3] or b"").decode())
                return True
        return False

    def add(self, job: Job) -> None:
        """Add a job that has not ended, or is damaged."""
        with self._lock:
            self._order[job.id] = _order(job)
            self._used[job.id] = job
            self._live.add(job)

    def end(self, job: Job) -> None:
        """Forget a job that has ended, unless somebody uses it."""
        with self._lock:
            self._live.remove(job)

    def get(self, job_id: str) -> Job:
        """Return the job with this id, one object for all who use it. Raises Refused 404, or 410 if it was removed."""
        with self._lock:
            job = self._used.get(job_id)
            known = job_id in self._order
        if not known:
            marker = join(self._removed, job_id)
            if _JOB_ID.fullmatch(job_id) and exists(marker):
                raise Refused(410, "Gone", f"this build was removed at {utc_time(getmtime(marker))}")
            raise Refused(404, "NotFound", f"no such build: {job_id[:80]!r}")
        if not job:
            job = _read_job(join(self.folder, job_id), lambda _: None)
            with self._lock:
                job = self._used.setdefault(job_id, job)
        return job

    def live(self) -> list[Job]:
        """Return the jobs that have not ended, and damaged ones."""
        with self._lock:
            return list(self._live)

    def ids(self, after: str = "") -> list[str]:
        """Return the ids of all jobs, newest first. after: only those that are older than this one. Raises Refused."""
        with self._lock:
            order = dict(self._order)
        ids = sorted(order, key=order.__getitem__, reverse=True)
        return ids[ids.index(self.get(after).id) + 1 :] if after else ids

    def expire(self, keep_s: float, keep_bytes: float) -> None:
        """Remove jobs that ended more than keep_s ago, and the oldest ones while all have more than keep_bytes.

        Jobs in use stay, and so do those that are damaged or ended less than YOUNG_S ago.
        """
        live = {job.id for job in self.live()}
        sizes = {
            folder: sum(entry.stat().st_size for entry in os.scandir(folder))
            for folder in (join(self.folder, one) for one in reversed(self.ids()) if one not in live)
            if isfile(join(folder, "job.json"))
        }
        total = sum(sizes.values())
        for folder, size in sizes.items():
            one, age_s = basename(folder), time.time() - getmtime(join(folder, "job.json"))
            if age_s <= YOUNG_S or (age_s <= keep_s and total <= keep_bytes) or self.get(one).state == "damaged":
                continue
            write_file(join(self._removed, one), b"")
            with self._lock:
                if one in self._used:  # by now
                    continue
                del self._order[one]
            trash = join(self.incoming, one)  # which the next server empties if this one dies
            os.rename(folder, trash)
            remove_tree(trash)
            total -= size

    def find(self, key: str) -> Job | None:
        """Return the job that was accepted with this Idempotency-Key in the last KEY_S seconds."""
        since = datetime.fromtimestamp(time.time() - KEY_S, UTC).isoformat()
        with self._lock:
            found = [one for one, (_, at, known) in self._order.items() if key and known == key and at > since]
        return self.get(found[0]) if found else None


def describe_job(job: Job, positions: Mapping[Job, int]) -> Json:
    """Return the status of a job. positions: of the jobs that wait. [CONTRACT 1.12]"""
    record, log = job.record, job.log
    request, url = record.request, record.request.repo_url
    return {
        "job_id": job.id,
        "status": record.state,
        **({"repo_url": url, "repo_ref": request.repo_ref} if url else {"source_name": request.source_name}),
        "nonce": request.nonce,
        "attempts": record.attempts,
        "submitted_at": record.submitted_at,
        "started_at": record.started_at or None,
        "finished_at": record.finished_at or None,
        "result": record.result,
        "phases": record.phases if log is None or record.ended else dict(log.phases),
        **(record.failure or {}),
        **({"position": positions[job]} if job in positions and record.state == "queued" else {}),
    }


def list_jobs(jobs: "Jobs", limit: int, after: str = "") -> list[Json]:
    """Return the status of at most limit jobs, newest first. after: the id of the job before them, or empty."""
    positions, found = jobs.positions(), []
    for job_id in jobs.table.ids(after)[:limit]:
        with suppress(Refused):  # it is removed meanwhile
            found.append(describe_job(jobs.get(job_id), positions))
    return found


def _keep(jobs: "Jobs", keep_s: float, keep_bytes: float) -> None:
    """Thread "keeper": sync the logs of running builds, and remove finished builds that are not kept."""
    for _ in range(12):  # a minute
        jobs.stopping.wait(SYNC_S)
        for log in filter(None, [job.log for job in jobs.table.live()]):
            os.fdatasync(log.fd)
    if min(keep_s, keep_bytes) < float("inf"):
        jobs.table.expire(keep_s, keep_bytes)


def _try_to_complete(jobs: "Jobs", job: Job) -> None:
    try:
        jobs._complete(job)
    except OSError as e:
        logger().error("job %s: cannot record its end yet: %s", job.id, e)


def _repeat(work: Callable[[], None], stopping: "threading.Event") -> None:
    """Call work until the server stops, whatever it raises."""
    while not stopping.is_set():
        with survive(f"thread {threading.current_thread().name}"):
            work()
            continue
        stopping.wait(RETRY_S)


class Jobs:
    """All jobs of a server, and the threads that run them.

    run: builds a job and returns the path of its archive, which is moved away; appends to job.log; raises BuildFailed.
    grown: is called with every log after each append.
    slots: the number of builds at a time.
    keep_s, keep_bytes: how long and how much of finished builds is kept.
    """

    def __init__(
        self,
        state: str,
        run: Callable[[Job], str],
        grown: Callable[[EventLog], None],
        slots: int = 1,
        max_queue: int = 1000,
        single_use: bool = False,
        keep_s: float = float("inf"),
        keep_bytes: float = float("inf"),
    ) -> None:
        self.table = JobTable(state)
        self.get = self.table.get
        self._run = run
        self._grown = grown
        self._max_queue = max_queue
        self._single_use = single_use
        self.stopping = threading.Event()  # set under _changed
        self._changed = threading.Condition()
        self._queue: list[Job] = []  # guarded by _changed; sorted by _order
        self._running: set[Job] = set()  # guarded by _changed; from leaving the queue until run() has returned
        self._ending: dict[Job, End] = {}  # guarded by _changed; not yet published
        self._accepting: list[str] = []  # guarded by _changed; the keys of new jobs that are being written
        self._accepted = False  # guarded by _changed; whether there is a job
        self._seq = 0  # guarded by _changed; of the newest job
        self._events = self._bytes = 0  # guarded by _changed; of the logs of jobs that have ended
        work = [("queue", self._tend), ("keeper", lambda: _keep(self, keep_s, keep_bytes))]
        work += [(f"slot {number}", self._work) for number in range(slots)]
        self._threads = [
            threading.Thread(target=_repeat, args=(step, self.stopping), name=name, daemon=True) for name, step in work
        ]

    def start(self) -> None:
        """Read the jobs of earlier servers, and start the threads."""
        found, last = self.table.read(self._grown)
        with self._changed:
            self._accepted, self._seq = last >= 0, max(last, 0)
            for job in found:
                record = job.record
                if record.failure:  # cancelled, or the server died before it wrote the last event
                    self._ending[job] = BuildFailed(record.failure["error_type"], record.failure["error"])
                elif record.state == "running" and record.attempts >= MAX_ATTEMPTS:
                    reason = f"the server ended {record.attempts} times during this build"
                    self._ending[job] = BuildFailed("InternalError", reason)
                elif record.result:
                    self._ending[job] = record.result
                else:
                    self._queue.append(job)
        for thread in self._threads:
            thread.start()

    def check_open(self, key: str = "") -> None:
        """Raise Refused 409, 429 or 503 if no build can be accepted now, or one with this key is being accepted."""
        with self._changed:
            if key and key in self._accepting:
                raise Refused(503, "Busy", "a request with this Idempotency-Key is being accepted", BUSY)
            if self._single_use and (self._accepted or self._accepting):
                raise Refused(409, "AlreadyAccepted", "this server accepts one build, and has accepted it")
            if self.stopping.is_set():
                raise Refused(503, "ShuttingDown", "the server is shutting down", {"Retry-After": "30"})
            if len(self._queue) + len(self._accepting) >= self._max_queue:
                raise Refused(429, "QueueFull", f"the queue is full: {len(self._queue)} builds", {"Retry-After": "60"})

    def submit(self, request: BuildRequest, archive: str = "", key: str = "") -> Job:
        """Accept a build, durably, or return the one with the same key. Raises Refused, OSError.

        archive: the uploaded source; is moved.
        """
        with self._changed:
            self.check_open(key)
            self._accepting.append(key)
            self._seq = min(self._seq + 1, MAX_SEQ)
            record = JobRecord(self._seq, request, submitted_at=utc_now(), key=key)
        job, accepted = Job(join(self.table.incoming, str(uuid.uuid4())), record), False
        with job.writing:
            try:
                known = self.table.find(key)
                if known:
                    return known
                job.create(self.table.folder, self._grown, archive)
                self.table.add(job)
                accepted = True
            finally:
                with self._changed:
                    self._accepting.remove(key)
                    if accepted:
                        self._accepted = True
                        self._queue = sorted([*self._queue, job], key=_order)  # a later job may be written sooner
                        self._changed.notify_all()
                if not accepted:
                    remove_tree(job.folder)
            job.announce(self.positions().get(job, job.position))
        return job

    def positions(self) -> dict[Job, int]:
        """Return the place in the queue of each job that waits, from 0."""
        with self._changed:
            return {job: position for position, job in enumerate(self._queue)}

    def gauges(self) -> dict[str, float]:
        """Return metrics of the jobs."""
        with self._changed:
            logs = [job.live_log() for job in (*self._running, *self._ending)]
            return {
                "confbuild_queue_jobs": len(self._queue),
                "confbuild_running_jobs": len(self._running),
                "confbuild_events_appended_total": self._events + sum(log.count for log in logs),
                "confbuild_event_bytes_appended_total": self._bytes + sum(log.size for log in logs),
            }

    def cancel(self, job: Job) -> None:
        """Cancel a job, unless it has ended. Raises OSError if that cannot be recorded; the build stops anyway."""
        with self._changed:
            running = job in self._running
            if job in self._queue:
                self._queue.remove(job)
                self._end_locked(job, BuildFailed("Cancelled", "cancelled before it was started"))
        if running:
            job.halt("Cancelled", "cancelled")
        else:
            self._complete(job)

    def _tend(self) -> None:
        """Thread "queue": announce positions that have changed, and complete jobs that could not end before."""
        with self._changed:
            moved, now = [job for at, job in enumerate(self._queue) if job.position != at], monotonic()
            due = [job for job in moved if job.tried_at + ANNOUNCE_S <= now]
            late = [job for job in self._ending if job.tried_at + RETRY_S <= now]
            if not (due or late or self.stopping.is_set()):
                self._changed.wait(min(ANNOUNCE_S, RETRY_S) if moved or self._ending else None)
        for job in due:
            with job.writing:
                job.announce(self.positions().get(job, job.position))
        for job in late:
            _try_to_complete(self, job)

    def _work(self) -> None:
        """A slot: run the next job from its start to its end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self.stopping.is_set())
            if self.stopping.is_set():
                return
            job = self._queue.pop(0)
            self._running.add(job)
            self._changed.notify_all()
        with job.afterwards:
            end = job.run(lambda: self._run(job))
            with self._changed:
                self._running.discard(job)
                self._end_locked(job, end)
            _try_to_complete(self, job)

    def _end_locked(self, job: Job, end: End) -> None:
        """Make end the end of a job, which _complete publishes. Caller must hold _changed."""
        job.tried_at = monotonic()
        self._ending[job] = end
        self._changed.notify_all()

    def _complete(self, job: Job) -> None:
        """Publish the end of a job, if that is due: the only way to a `complete` event. Any thread. Raises OSError."""
        with job.writing:
            job.tried_at = monotonic()
            with self._changed:
                end = self._ending.get(job)
            if end:  # else another thread was faster
                log = job.live_log()
                job.complete(end)
                if log.finished:
                    self.table.end(job)
                with self._changed:
                    del self._ending[job]
                    if log.finished:
                        self._events += log.count
                        self._bytes += log.size
                        job.log = None
                    elif self.stopping.is_set():  # parked: it can still be cancelled
                        self._queue.append(job)

    def stop(self, grace_s: float) -> bool:
        """Accept no more builds, and park those still running after grace_s seconds. Return whether one ended."""
        with self._changed:
            self.stopping.set()
            self._changed.notify_all()
            before = len(self._running)
            self._changed.wait_for(lambda: not self._running, grace_s)
            left = list(self._running)
        for job in left:
            job.halt("Parked", "the server was stopped")
        for thread in self._threads:
            thread.join(10)
        return len(left) < before


# endregion 33
# ==============================================================================
# region 34. Web page                                             [uses nothing]
# ==============================================================================
# The page that browsers get for GET / [CONTRACT 1.18]: list, build, submit.  It is this one literal, without
# interpolation; whatever it shows, its script gets from the API, like any other client.  It loads nothing else:
# the policy in its headers allows its one script and its one style by their hashes, and no text can become HTML.
#
# The script keeps a log as chunks of bytes and draws only the rows that are visible, so a million lines stay small.

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>confbuild</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 16 16'%3E%3Cg fill='none' stroke='%23137a7f' stroke-width='2'%3E%3Cpath
 d='M5.5 2H2v12h3.5M10.5 2H14v12h-3.5'/%3E%3C/g%3E%3Cpath
 fill='%23137a7f' d='M6 6h4v4H6z'/%3E%3C/svg%3E">
<style>
:root {
  color-scheme: light dark;
  --ground: #fcfcfa; --raised: #f3f3ef; --line: #dedfd9; --text: #1c1f1e; --quiet: #5f6663; --accent: #0e6a6f;
  --on-accent: #fff; --bad: #b3261e;
  --c0: #24292b; --c1: #b3261e; --c2: #33731f; --c3: #8a5c00;
  --c4: #1f56b0; --c5: #8a2d86; --c6: #0b6b70; --c7: #6d7370;
 --c8: #7d8380; --c9: #cf3a31; --c10: #3c8a25; --c11: #a06c00; --c12: #2f6fd6; --c13: #a63ea1; --c14: #0e858b;
  --c15: #3a403e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #141716; --raised: #1c201f; --line: #303634; --text: #e3e6e3; --quiet: #98a09c; --accent: #5cc0c2;
    --on-accent: #0b1a1a; --bad: #ff8f85;
    --c0: #6d7572; --c1: #ff8f85; --c2: #8fcc76; --c3: #e0b65a;
    --c4: #8ab4f8; --c5: #d9a0dc; --c6: #6fcdd0; --c7: #c3c9c5;
    --c8: #858d89; --c9: #ffaba3; --c10: #a9dd94; --c11: #efcb80; --c12: #aac8fb; --c13: #e6bce8; --c14: #92dfe1;
    --c15: #f2f4f2;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--ground); color: var(--text); font: 14px/1.5 system-ui, sans-serif; }
pre, .mono, #log { font-family: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace; }
pre, .mono { font-size: 12.5px; overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: 2px; text-decoration-thickness: 1px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
header, main, #notice, #alert { padding-inline: max(16px, calc(50vw - 540px)); }
header { display: flex; align-items: baseline; gap: 12px; padding-block: 12px; border-bottom: 1px solid var(--line); }
header a { color: var(--text); font-size: 16px; font-weight: 650; letter-spacing: -.01em; text-decoration: none; }
#server { color: var(--quiet); margin-left: auto; }
#notice, #alert { margin: 0; padding-block: 8px; border-bottom: 1px solid var(--line); background: var(--raised); }
#alert, #failure { color: var(--bad); overflow-wrap: anywhere; }
#alert { position: sticky; top: 0; z-index: 1; }
#source, #failure { max-height: 9em; overflow: auto; }
main { padding-block: 20px 48px; }
h1 { margin: 0; font-size: 20px; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2, #home h1 { margin: 28px 0 8px; font-size: 14px; font-weight: 650; letter-spacing: 0; }
#home h1 { margin-top: 0; }
.quiet, th, dt { color: var(--quiet); }
.number, td { font-variant-numeric: tabular-nums; }

button, input, .button {
  font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--line); border-radius: 4px;
  padding: 4px 10px; min-height: 32px;
}
input { min-width: 0; }
button, .button { cursor: pointer; background: var(--raised); text-decoration: none; white-space: nowrap; }
button:hover, .button:hover { border-color: var(--quiet); }
button:disabled { opacity: .5; cursor: default; }
.primary { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600; }

form { display: flex; flex-wrap: wrap; gap: 8px; align-items: end; }
form label { display: grid; gap: 2px; color: var(--quiet); font-size: 12.5px; }
form label input { color: var(--text); font-size: 14px; }
#url { width: 26rem; max-width: 100%; }
label:has(#url) { flex: 0 1 26rem; }
#submit { padding: 14px 16px; border: 1px dashed var(--line); border-radius: 6px; }
#submit.over { border-color: var(--accent); background: var(--raised); }
form p { margin: 0; flex-basis: 100%; }
#login { margin-bottom: 20px; }
#file { position: absolute; width: 1px; height: 1px; opacity: 0; }
label.button { color: var(--text); font-size: 14px; display: inline-block; }
label.button:focus-within { outline: 2px solid var(--accent); outline-offset: 2px; }

.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 5px 16px 5px 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
tbody th { width: 10rem; }
td:last-child, th:last-child { padding-right: 0; }
[aria-label=Artifacts] td:nth-child(2) { white-space: nowrap; }
#rows td:first-child { width: 40%; overflow-wrap: anywhere; }
#rows td:last-child { text-align: right; }
#rows td { height: 43px; white-space: nowrap; }
#rows td:first-child { white-space: normal; }
#rows button { min-height: 26px; padding: 1px 8px; }
#rows a {
  font-weight: 600; color: var(--text); text-decoration: none;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
}
#rows a:focus-visible { outline-offset: -2px; }
#rows a:hover { text-decoration: underline; }
.state::before {
  content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 7px; border-radius: 50%;
  border: 2px solid var(--quiet);
}
.running::before { border-color: var(--accent); border-right-color: transparent; animation: turn 1.2s linear infinite; }
.ok::before { border-color: var(--accent); background: var(--accent); }
.failed::before, .damaged::before { border-color: var(--bad); background: var(--bad); border-radius: 1px; }
@keyframes turn { to { rotate: 1turn; } }
@media (prefers-reduced-motion: reduce) { .running::before { animation: none; } }

.title { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 16px; margin: 4px 0 2px; }
.title .right { display: flex; gap: 8px; margin-left: auto; }
#crumb { margin: 0; }
#failure { margin: 10px 0; padding: 8px 12px; border-left: 3px solid var(--bad); background: var(--raised); }
#phases { margin: 12px 0 16px; }
#phases th, #phases td { border: 0; padding-block: 0; }
#phases th { width: 7rem; font-weight: 400; }
#phases td:nth-child(2) { width: 7rem; }
#phases .now th { color: var(--text); font-weight: 600; }

.tools { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 8px; margin-bottom: 8px; }
.tools .right { margin-left: auto; }
.tools label { display: flex; align-items: center; gap: 5px; }
.tools [type=checkbox] { min-height: 0; accent-color: var(--accent); }
#log {
  position: relative; overflow: auto; overflow-anchor: none; min-height: 153px; max-height: max(320px, 68vh);
  font-size: 12px; line-height: 17px;
  background: var(--raised); border: 1px solid var(--line); border-radius: 4px; tab-size: 8;
}
#space { position: relative; min-width: max-content; }
#pane { position: sticky; top: 0; overflow-x: visible; overflow-y: clip; }
.row { display: flex; min-height: 17px; }
.row a {
  flex: none; width: 5.5rem; padding-right: 14px; text-align: right; color: var(--quiet); text-decoration: none;
  user-select: none;
}
.row a:hover { color: var(--accent); }
.row > span { white-space: pre; }
.row.hit { background: color-mix(in srgb, var(--accent) 14%, transparent); }
.row.target { background: color-mix(in srgb, var(--accent) 26%, transparent); }
.wrapped #space { min-width: 0; }
.wrapped .row > span { white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 8px; }
mark { background: var(--accent); color: var(--on-accent); }
#follow { position: absolute; right: 20px; bottom: 14px; }
#frame { position: relative; }
#blank { position: absolute; top: 8px; left: 14px; margin: 0; }
#link { min-height: 21px; margin: 6px 0 0; }
pre {
  margin: 0 0 6px; padding: 10px 12px; background: var(--raised); border: 1px solid var(--line); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
}
summary { cursor: pointer; }
@media (max-width: 640px) {
  #list thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  #rows tr { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 12px; padding: 8px 0; }
  #rows tr { border-bottom: 1px solid var(--line); }
  #rows td { border: 0; padding: 0; height: auto; }
  #rows td:first-child { width: 100%; }
  #rows tr:has(button) td:first-child { width: calc(100% - 90px); }
  #rows td:last-child { margin-left: auto; order: 1; }
  #rows td:not(:first-child, :last-child) { order: 2; }
  #rows td:empty { display: none; }
  label:has(#url), label:has(#ref) { flex: 1 1 100%; }
  #url { width: 100%; }
  #rows td:nth-child(3)::before { content: "queue: "; }
  #rows td:nth-child(5)::after { content: " ago"; }
  #rows td:nth-child(6)::before { content: "took "; }
  .row a { width: 3.6rem; padding-right: 8px; }
  #needle { flex: 1 1 40%; }
  tbody th { width: 6.5rem; padding-right: 8px; }
  #phases th, #phases td:nth-child(2) { width: 5.5rem; }
}
</style>
</head>
<body>
<header><a href="./">confbuild</a> <span id="server"></span></header>
<p id="notice" role="note" hidden></p>
<p id="alert" role="alert" hidden></p>
<main>
<form id="login" hidden>
  <label>Token of this server
    <input id="token" type="password" autocomplete="off" required pattern="[!-~]+" size="40"
      title="A token has only ASCII characters and no spaces."></label>
  <button class="primary">Continue</button>
  <p class="quiet" id="login-note"></p>
</form>

<section id="home" hidden>
  <h1 id="submit-title">New build</h1>
  <form id="submit" aria-labelledby="submit-title">
    <label>Git repository
      <input id="url" type="url" placeholder="https://github.com/owner/project" required></label>
    <label>Branch, tag or commit <input id="ref" placeholder="default branch"></label>
    <button class="primary" id="go">Build</button>
    <p class="quiet">Or drop a .tar.gz or .zip of the project here, or
      <label class="button">choose a file<input id="file" type="file" accept=".gz,.tgz,.zip"></label>
      <span id="limit"></span></p>
  </form>
  <h2 id="list-title">Latest builds</h2>
  <table id="list" aria-labelledby="list-title">
    <thead><tr><th scope="col">Source</th><th scope="col">Status</th><th scope="col">Position</th>
      <th scope="col">Phase or error</th><th scope="col">Age</th><th scope="col">Duration</th>
      <th scope="col"><span class="unseen">Cancel</span></th></tr></thead>
    <tbody id="rows"></tbody>
  </table>
  <p class="quiet" id="none" hidden>Nothing has been built here yet.</p>
  <p><button id="older" hidden>Older builds</button></p>
</section>

<p id="crumb" hidden><a href="./">All builds</a></p>
<section id="build" hidden>
  <div class="title">
    <h1 id="source"></h1>
    <span><span id="state" role="status" aria-label="Status of the build"></span>
      <span id="took" class="quiet"></span></span>
    <span class="right"><button id="cancel" hidden>Cancel build</button>
      <a id="download" class="button primary" download hidden>Download bundle</a></span>
  </div>
  <div class="quiet mono" id="facts"></div>
  <p id="failure" role="alert" hidden></p>
  <table id="phases" aria-label="Phases"><tbody></tbody></table>
  <div class="tools" role="toolbar" aria-label="Log">
    <input id="needle" type="search" placeholder="Search, or :line" size="22"
      aria-label="Search the log, or go to :line">
    <button id="previous" aria-label="Previous match">↑</button><button id="next" aria-label="Next match">↓</button>
    <span id="found" class="quiet" role="status" aria-label="Matches"></span>
    <button id="error">First error</button>
    <label><input id="wrap" type="checkbox"> Wrap</label>
    <span class="right"><span id="count" class="quiet">0 lines</span> <a id="text" download>Download log</a></span>
  </div>
  <div id="frame">
    <div id="log" role="log" aria-live="off" aria-label="Build log" tabindex="0"><div id="space">
      <div id="pane"><div></div></div></div></div>
    <p id="blank" class="quiet"></p>
    <button id="follow" hidden>Follow the end ↓</button>
  </div>
  <p id="link" class="quiet" role="status" aria-label="Connection"></p>
  <section id="result" hidden></section>
</section>
</main>
<script>
"use strict";
// All text from the server goes through textContent or text nodes. Nothing is ever parsed as HTML.
const $ = id => document.getElementById(id);
const job = new URLSearchParams(location.search).get("build");
const path = `build/${encodeURIComponent(job)}`;
const sleep = ms => new Promise(done => setTimeout(done, ms));

function el(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// Return text without the characters that change the direction of others: with them, gnp.exe looks like exe.png.
const forward = text => text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "");

// Change a text only if it is another one: screen readers announce every change, and it ends a selection.
function write(node, text) {
  text = forward(`${text ?? ""}`);
  if (node.textContent != text) node.textContent = text;
}

function say(id, text) {
  write($(id), text);
  if (id == "alert" || id == "failure" || id == "notice") $(id).hidden = !text;
}

// ---- Requests. The token stays in this tab.

let skew = 0;  // milliseconds that the server's clock is ahead of ours
let asking = null;  // the promise of a token that the user types

function askToken(refused) {
  asking ??= new Promise(done => {
    $("login-note").textContent = refused ? "The server refused this token." : "It is kept until this tab is closed.";
    $("login").hidden = false;
    $("token").value = "";
    $("token").focus();
    $("login").onsubmit = event => {
      event.preventDefault();
      sessionStorage.setItem("token", $("token").value);
      $("login").hidden = true;
      asking = null;
      done();
    };
  });
  return asking;
}

// Return the response. Throw an Error with its status if it is not a success.
async function ask(url, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = {...options.headers};
    if (token) headers.Authorization = `Bearer ${token}`;
    const answer = await fetch(url, {...options, headers}).catch(() => {
      throw new Error("the server cannot be reached");  // browsers say "Failed to fetch" and the like
    });
    if (answer.status == 401) {
      if (sessionStorage.getItem("token") === token) await askToken(token);
      continue;
    }
    const date = Date.parse(answer.headers.get("Date"));
    if (Math.abs(date - Date.now() - skew) > 2000) skew = date - Date.now();
    if (answer.ok) return answer;
    const problem = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(problem.detail || `status ${answer.status}`), {status: answer.status});
  }
}

const json = async (url, options) => (await ask(url, options)).json();

// A link cannot send the token, so with a token its file is fetched first.
document.addEventListener("click", async event => {
  const link = event.target.closest("a[download]");
  if (!link || !sessionStorage.getItem("token") || link.href.startsWith("blob:")) return;
  event.preventDefault();
  try {
    const url = URL.createObjectURL(await (await ask(link.href)).blob());
    el("a", {href: url, download: link.download}).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  } catch (e) {
    say("alert", `The download failed: ${e.message}`);
  }
});

// ---- Times, sizes, bytes.

const hex = bytes => Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join("");

const since = text => text ? Date.now() + skew - Date.parse(text) : 0;
const between = (from, to) => to ? Date.parse(to) - Date.parse(from) : since(from);

function span(ms) {
  const s = Math.max(0, ms / 1000), whole = Math.floor(s);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 60) return `${whole} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${whole % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor(s / 60) % 60} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor(s / 3600) % 24} h`;
}

function age(ms) {
  const [seconds, unit] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([n]) => ms >= n * 1000) || [1, "s"];
  return `${Math.max(0, Math.floor(ms / seconds / 1000))} ${unit}`;
}

function size(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let i = 0;
  for (; bytes >= 1024 && i < 3; i++) bytes /= 1024;
  return `${i && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${units[i]}`;
}

function sourceOf({repo_url, repo_ref, source_name}) {
  return forward((repo_url || source_name || "archive").replace("https://", "") + (repo_ref ? ` @ ${repo_ref}` : ""));
}

const isLive = ({status}) => status == "queued" || status == "running";
const stateOf = build => build.error_type == "Cancelled" && !isLive(build) ? "cancelled" : build.status;

async function cancel(build) {
  if (!confirm(`Cancel ${sourceOf(build)}?`)) return;
  await ask(`build/${build.job_id}`, {method: "DELETE"}).catch(e => say("alert", `Not cancelled: ${e.message}`));
}

// ---- The list.

const PAGE = 100;
const builds = new Map();  // id -> {build, cells}, in no order

function addRow(build, newest) {
  const cells = Array.from({length: 7}, () => el("td"));
  const name = sourceOf(build), link = el("a", {href: `?build=${build.job_id}`, textContent: name, title: name});
  cells[0].append(link, el("div", {className: "quiet mono", textContent: build.job_id.slice(0, 8)}));
  const button = el("button", {textContent: "Cancel", onclick: () => cancel(build)});
  button.setAttribute("aria-label", `Cancel ${name}`);
  cells[4].title = build.submitted_at;
  builds.set(build.job_id, {build, cells, button});
  $("rows")[newest ? "prepend" : "append"](el("tr", {}, ...cells));
}

function drawRow({build, cells, button}) {
  const texts = [
    stateOf(build),
    build.position === undefined ? "" : build.position ? `${build.position + 1}` : "next",
    ["failed", "damaged"].includes(stateOf(build)) ? build.error_type :
      build.status == "running" ? Object.keys(build.phases ?? {}).at(-1) : "",
    age(since(build.submitted_at)),
    build.started_at ? span(between(build.started_at, build.finished_at)) : "",
  ];
  texts.forEach((text, i) => write(cells[i + 1], text));
  cells[1].className = `state ${stateOf(build)}`;
  cells[3].title = build.error || "";
  const live = isLive(build);
  if (live != button.isConnected) live ? cells[6].append(button) : button.remove();
}

async function showList() {
  $("home").hidden = false;
  $("older").onclick = async () => {
    const last = $("rows").lastElementChild.querySelector("a").search.slice(7);
    try {
      const page = await json(`builds?limit=${PAGE}&after=${last}`);
      for (const build of page) if (!builds.has(build.job_id)) addRow(build, false);
      $("older").hidden = page.length < PAGE;
      builds.forEach(drawRow);
    } catch (e) {
      say("alert", `Older builds cannot be shown: ${e.message}`);
    }
  };
  setInterval(() => builds.forEach(drawRow), 1000);
  let lost = "";  // the alert of this loop, which ends with its reason; any other stays
  for (let first = true;; await sleep(1500)) {
    if (document.hidden && !first) continue;
    try {
      const limit = Math.min(1000, Math.max(PAGE, builds.size));
      const page = await json(`builds?limit=${limit}`), ids = new Set(page.map(build => build.job_id));
      const oldest = page.length < limit ? "" : page.at(-1).submitted_at;
      for (const [id, {build, cells}] of builds) {
        if (ids.has(id) || build.submitted_at <= oldest) continue;
        cells[0].parentNode.remove();  // the server has removed it
        builds.delete(id);
      }
      if (first) $("older").hidden = page.length < PAGE;
      for (const build of page.reverse()) {
        if (builds.has(build.job_id)) builds.get(build.job_id).build = build;
        else addRow(build, true);
      }
      builds.forEach(drawRow);
      $("none").hidden = builds.size > 0;
      $("list").hidden = !builds.size;
      if ($("alert").textContent == lost) say("alert", "");
      first = false;
    } catch (e) {
      say("alert", lost = `This list is not up to date: ${e.message}; trying again.`);
    }
  }
}

// ---- Submitting. The nonce comes from this browser and is kept with the job: the server's word is not needed for it.

async function submit(make) {
  const nonce = hex(crypto.getRandomValues(new Uint8Array(16)));
  const {url, ...options} = make(nonce);
  $("go").disabled = true;
  say("alert", "");
  try {
    const {job_id} = await json(url, {method: "POST", ...options});
    try {
      localStorage.setItem(`nonce:${job_id}`, nonce);
    } catch {
      // Full or forbidden: the page of the build will say that its nonce comes from the server.
    }
    location.href = `?build=${job_id}`;  // until that page is there, a second click submits nothing
  } catch (e) {
    say("alert", `Not accepted: ${e.message}`);
    $("go").disabled = false;
  }
}

async function submitArchive(file, limit) {
  if (!file || $("go").disabled) return;
  if (file.size > limit) {
    say("alert", `${file.name} has ${size(file.size)}; this server accepts at most ${size(limit)}.`);
    return;
  }
  const type = /\.zip$/i.test(file.name) ? "application/zip" : "application/gzip";
  const name = encodeURIComponent(file.name);
  const before = $("limit").textContent;
  $("limit").textContent = `uploading ${size(file.size)} …`;
  const request = {headers: {"Content-Type": type}, body: file};
  await submit(nonce => ({url: `build?nonce=${nonce}&source_name=${name}`, ...request}));
  $("limit").textContent = before;
}

function prepareSubmit(limit) {
  $("limit").textContent = limit < Infinity ? `(at most ${size(limit)})` : "";
  onpageshow = () => { $("go").disabled = false; };  // when the browser's "back" returns to this page as it was
  $("submit").onsubmit = event => {
    event.preventDefault();
    const body = {repo_url: $("url").value, repo_ref: $("ref").value.trim()};
    submit(nonce => ({
      url: "build", headers: {"Content-Type": "application/json"}, body: JSON.stringify({nonce, ...body}),
    }));
  };
  $("url").onchange = () => {
    if (/^\s*[\w-]+(\.[\w-]+)+\//.test($("url").value)) $("url").value = `https://${$("url").value.trim()}`;
  };
  $("file").onchange = async () => {
    await submitArchive($("file").files[0], limit);
    $("file").value = "";  // so that the same file can be chosen again, after a change
  };
  const files = event => event.dataTransfer.types.includes("Files");  // not text, which may go into a field
  document.ondragover = event => {
    if (!files(event)) return;
    event.preventDefault();
    $("submit").classList.add("over");
  };
  document.ondragleave = event => { if (!event.relatedTarget) $("submit").classList.remove("over"); };
  document.ondrop = event => {
    if (!files(event)) return;
    event.preventDefault();
    $("submit").classList.remove("over");
    const items = [...event.dataTransfer.items].filter(item => item.kind == "file");
    if (items.length > 1 || items[0].webkitGetAsEntry()?.isDirectory) {
      say("alert", "Drop one file, a .tar.gz or .zip of the project. A folder must be packed first.");
    } else {
      submitArchive(event.dataTransfer.files[0], limit);
    }
  };
}

// ---- The lines of the log, in chunks of UTF-8: a million strings would need several times the memory.
// A row is what the screen shows. The lines of a progress bar, which end with CR, are one row: its text is the last
// line's, after a CR for each line that is gone, so that numbers of lines can be counted.

const CHUNK = 1000, LARGE = 1 << 20;  // rows; characters
const chunks = [];  // full ones: {bytes, row: number of rows before it, line: of lines, style: of the text before it}
let tail = {texts: [], row: 0, line: 0, style: {}, size: 0};  // the last chunk
let lineCount = 0, byteCount = 0;
let bar = false;  // the next line replaces the last row
let gone = 0;  // lines that the last row has replaced

function addLine(text) {
  const replaces = bar;
  lineCount++;
  byteCount += text.length;
  bar = text.endsWith("\r");
  if (bar) text = text.slice(0, -1);
  const {texts} = tail;
  if (replaces) {
    gone++;
    if (text) texts[texts.length - 1] = text;
    return;
  }
  if (gone) texts.push("\r".repeat(gone) + texts.pop());
  gone = 0;
  if (texts.length == CHUNK || tail.size > LARGE) {
    const {row, line, style} = tail;
    chunks.push({bytes: new TextEncoder().encode(texts.join("\n")), row, line, style});
    let last = style;
    for (const one of texts) if (one.includes("\x1b")) last = paint(one, last, () => {});
    tail = {texts: [], row: row + texts.length, line: lineCount - 1, style: last, size: 0};
  }
  tail.size += text.length;
  tail.texts.push(text);
}

const rowCount = () => tail.row + tail.texts.length;
const chunkAt = i => i < chunks.length ? chunks[i] : tail;

// Return the index of the last chunk before which there are at most so many rows or lines, as name says.
function chunkOf(name, count) {
  let low = 0, high = chunks.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (chunkAt(middle)[name] <= count) low = middle; else high = middle - 1;
  }
  return low;
}

// Yield the rows from first up to, but not including, end.
function* rows(first, end) {
  for (let i = chunkOf("row", first); i <= chunks.length && chunkAt(i).row < end; i++) {
    let {bytes, texts, row, line, style} = chunkAt(i);
    texts ??= new TextDecoder("utf-8", {ignoreBOM: true}).decode(bytes).split("\n");
    for (let k = 0; k < texts.length && row < end; k++, row++) {
      const start = texts[k].lastIndexOf("\r") + 1;
      line += 1 + start + (row == rowCount() - 1 ? gone : 0);
      if (row >= first) yield {row, line, text: texts[k].slice(start), style};
      if (texts[k].includes("\x1b")) style = paint(texts[k], style, () => {});
    }
  }
}

// ---- Colours. A style has bold, fg (an index or [red, green, blue]) and so on. Other escape sequences are left out.

const ESCAPE = new RegExp([
  /\x1b\[([0-9;:]*)m/,  // SGR: colours
  /\x1b\[[0-?]*[ -/]*[@-~]/,  // another control sequence [ECMA-48 5.4]
  /\x1b[P\]X^_][^\x07\x1b]*(?:\x07|\x1b\\)?/,  // a control string, such as a link [ECMA-48 5.6]
  /\x1b[ -/]*[0-~]?|[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/,
].map(part => part.source).join("|"), "g");
const SGR = {
  1: {bold: true}, 2: {dim: true}, 3: {italic: true}, 4: {underline: true}, 7: {reverse: true}, 9: {strike: true},
  21: {underline: true}, 22: {bold: false, dim: false}, 23: {italic: false}, 24: {underline: false},
  27: {reverse: false}, 29: {strike: false}, 39: {fg: undefined}, 49: {bg: undefined},
};
for (let i = 0; i < 16; i++) {
  SGR[(i < 8 ? 30 : 82) + i] = {fg: i};
  SGR[(i < 8 ? 40 : 92) + i] = {bg: i};
}

// Return the style after an SGR sequence. Its codes are separated by ";". Parts of a code are separated by ":", but
// those of a colour often by ";" too.
function restyle(style, text) {
  const codes = text.split(";").map(code => code.split(":").map(Number));
  for (let i = 0; i < codes.length; i++) {
    const [code, ...parts] = codes[i];
    if (code == 38 || code == 48 || code == 58) {  // 58: of the underline, which has the colour of the text here
      if (!parts.length) {
        parts.push(...codes.slice(i + 1, i + (codes[i + 1]?.[0] == 2 ? 5 : 3)).flat());
        i += parts.length;
      }
      const colour = parts[0] == 2 && parts.length > 3 ? parts.slice(-3).map(value => Math.min(value, 255))
        : parts[0] == 5 ? parts[1] & 255 : undefined;
      if (code != 58) style = {...style, [code == 38 ? "fg" : "bg"]: colour};
    } else {
      style = code ? {...style, ...SGR[code == 4 && parts[0] === 0 ? 24 : code]} : {};
    }
  }
  return style;
}

// The 16 colours under other text or under their own. As colours of text alone they are variables of the style sheet.
const BASIC = [0x000000, 0xc23127, 0x2f7d1f, 0xd6a41e, 0x245cba, 0x92328e, 0x0d7d83, 0xd9dddb,
  0x666c69, 0xe8544b, 0x69be50, 0xf5d05a, 0x5894f0, 0xcd6ec8, 0x46bec3, 0xffffff];
const BLACK = [0, 0, 0], WHITE = [255, 255, 255], LIGHT = [243, 243, 239], DARK = [28, 32, 31];  // the last: of the log

function toRgb(colour) {
  const level = step => step ? 55 + 40 * step : 0;
  if (typeof colour == "object") return colour;
  if (colour < 16) return [16, 8, 0].map(shift => BASIC[colour] >> shift & 255);
  if (colour > 231) return Array(3).fill(10 * colour - 2312);
  return [36, 6, 1].map(step => level(Math.floor((colour - 16) / step) % 6));
}

// The contrast of two colours, from 1 to 21.  [WCAG 2.2, contrast ratio]
function contrast(...colours) {
  const [dark, light] = colours.map(colour => {
    const [r, g, b] = colour.map(value => value > 10 ? ((value / 255 + .055) / 1.055) ** 2.4 : value / 3294.6);
    return .2126 * r + .7152 * g + .0722 * b + .05;
  }).sort((a, b) => a - b);
  return light / dark;
}

// Return colour, moved away from ground until it is readable on it.
function readable(colour, ground) {
  const end = contrast(WHITE, ground) > contrast(BLACK, ground) ? 255 : 0;
  while (contrast(colour, ground) < 4) colour = colour.map(value => Math.round(value + (end - value) / 8 + end / 255));
  return `rgb(${colour.map(value => Math.min(value, 255))})`;
}

// Return the CSS properties of style. No program can make text unreadable.
function css({fg, bg, reverse, bold, dim, italic, underline, strike}) {
  const found = {};
  if (reverse) [fg, bg] = [bg, fg];
  if (bg !== undefined) {
    const ground = toRgb(bg), text = fg === undefined ? ground : toRgb(fg);  // ground: becomes black or white
    const best = contrast(WHITE, ground) > contrast(BLACK, ground) ? WHITE : BLACK;
    found.backgroundColor = `rgb(${ground})`;
    found.color = `rgb(${contrast(text, ground) < 3 ? best : text})`;
  } else if (reverse) {
    Object.assign(found, {color: "var(--ground)", backgroundColor: "var(--text)"});
  } else if (fg !== undefined) {
    found.color = fg < 16 ? `var(--c${fg})` : `light-dark(${readable(toRgb(fg), LIGHT)}, ${readable(toRgb(fg), DARK)})`;
  }
  if (bold) found.fontWeight = "bold";
  if (dim) found.opacity = ".7";
  if (italic) found.fontStyle = "italic";
  found.textDecoration = [underline && "underline", strike && "line-through"].filter(Boolean).join(" ");
  return found;
}

// Call emit with each part of text and its style. Return the style after text.
function paint(text, style, emit) {
  let at = 0;
  for (const match of text.matchAll(ESCAPE)) {
    if (match.index > at) emit(text.slice(at, match.index), style);
    at = match.index + match[0].length;
    if (match[1] !== undefined) style = restyle(style, match[1]);
  }
  if (at < text.length) emit(text.slice(at), style);
  return style;
}

// ---- The view of the log: only the visible rows are elements.
// The row at a certain part of the log is drawn at the same part of the window. With rows of one height that is
// ordinary scrolling. It also holds for wrapped rows, and for logs that are taller than browsers let an element be.

const ROW = 17, TALLEST = 17e6;  // pixels; Firefox ends at 17.8 million
const WIDEST = 4000;  // characters of a row that are drawn; browsers need a second for rows that are much longer
// The first line of an error of compilers, linkers, programs; tsc, vite, cmake, make; npm, pnpm; go; webpack, esbuild,
// maven; a shell; next.  "error::" is a path of Rust.
const ERROR = new RegExp([
  /error(\[\w+\])?:(?!:)|\bfatal:|\bpanicked at\b|undefined reference to|^Traceback |^panic: |\bpanic!/,
  /\berror (TS\d+|during build):|\bCMake Error\b|^make(\[\d+\])?: \*\*\* |\*\*\* .*\bError \d/,
  /^\s*npm (ERR!|error) (?!code|errno|syscall|path)|^\s*(ERR_PNPM_|ERROR {2}|ELIFECYCLE)/,
  /^go: (?!downloading|finding|extracting|warning|no module dependencies)|^(vet: )?\S+\.go:\d+(:\d+)?: |^--- FAIL: /,
  /^ERROR in |\[ERROR\]|^\S*sh: .*(not found|No such file|ermission denied)|^Failed to compile/,
].map(part => part.source).join("|"), "i");
let following = true;
let drawing = 0;  // the number of the animation frame that is asked for
let firstRow = 0;  // the first row of the window; if rows are wrapped, the row at the part of it that the log is at
let drawnAt = 0;  // the scrollTop that draw() left
let target = 0, awaited = false;  // the number of the line in the address, and whether it is still to come
let pattern = null, hits = [], searched = 0;  // what is searched for, the rows that have it, how many were searched

const redraw = () => { drawing ||= requestAnimationFrame(draw); };
const visible = () => $("log").clientHeight / ROW;
const isWrapped = () => $("log").classList.contains("wrapped");
const lastFirst = () => Math.max(0, rowCount() - (isWrapped() ? 0 : visible()));  // the largest value of firstRow
const counted = () => lineCount == 1 ? "1 line" : `${lineCount.toLocaleString("en")} lines`;
const plain = text => text.includes("\x1b") ? text.replace(ESCAPE, "") : text;

function draw() {
  drawing = 0;
  const log = $("log"), list = $("pane").firstElementChild, count = rowCount(), wrapped = isWrapped();
  const columns = Math.max(20, (log.clientWidth - 90) / 7.2);
  const most = (count + (wrapped ? byteCount / columns : 0)) * ROW;  // an upper bound of what wrapped rows need
  $("space").style.height = `${Math.min(TALLEST, most)}px`;
  const range = log.scrollHeight - log.clientHeight;
  const wanted = following ? range : range * firstRow / Math.max(1, lastFirst());
  if (Math.abs(log.scrollTop - wanted) >= 1) log.scrollTop = wanted;
  drawnAt = log.scrollTop;
  const height = log.clientHeight, part = range > 0 ? Math.min(1, wanted / range) : 0;
  const anchor = part * count, above = part * height / ROW;
  const first = Math.max(0, Math.floor(anchor - above)), end = Math.ceil(anchor - above + height / ROW) + 1;
  // What is drawn already stays, so that a selection of text does.
  const old = new Map(Array.from(list.children, node => [node.key, node])), nodes = [];
  let y = part * height, anchored = null;
  for (const one of rows(first, Math.min(count, end))) {
    const text = one.text.slice(0, WIDEST), key = JSON.stringify([{...one, text}, pattern?.source, one.line == target]);
    nodes.push(old.get(key) ?? Object.assign(drawLine(one), {key}));
    if (one.row == Math.min(count - 1, Math.floor(anchor))) anchored = nodes.at(-1);
  }
  const stay = new Set(nodes);
  for (const node of old.values()) if (!stay.has(node)) node.remove();
  nodes.forEach((node, i) => { if (list.children[i] != node) list.insertBefore(node, list.children[i] ?? null); });
  $("pane").style.height = `${height}px`;
  if (anchored) {
    const within = Math.min(1, anchor - Math.min(count - 1, Math.floor(anchor)));
    y -= anchored.offsetTop + within * anchored.offsetHeight;
    list.style.transform = `translateY(${y}px)`;
  }
  $("follow").hidden = following;
  say("count", counted());
  say("blank", count ? "" : complete ? "The build printed nothing." : "Nothing printed yet.");
  if (pattern && searched < count) search();
}

function drawLine({row, line, text, style}) {
  const body = el("span"), cut = text.length - WIDEST;
  let hit = false;
  paint(cut > 0 ? text.slice(0, WIDEST) : text, style, (part, style) => {
    const span = el("span");
    Object.assign(span.style, css(style));
    part.split(pattern || /$^/).forEach((piece, i) => span.append(i % 2 ? el("mark", {textContent: piece}) : piece));
    body.append(span);
  });
  if (cut > 0) body.append(el("i", {}, ` … ${cut.toLocaleString("en")} more characters: download the log`));
  if (pattern) hit = body.querySelector("mark") || plain(text).search(pattern) >= 0;
  const number = el("a", {href: `#L${line}`, textContent: line, ariaLabel: `Line ${line}`, tabIndex: -1});
  return el("div", {className: `row${hit ? " hit" : ""}${line == target ? " target" : ""}`}, number, body);
}

// Scroll to a row unless it is visible.
function goTo(row) {
  if (isWrapped()) firstRow = row * rowCount() / Math.max(1, rowCount() - 1);  // the whole row is in the window then
  else if (row < firstRow + 1 || row > firstRow + visible() - 2) firstRow = row - visible() / 3;
  firstRow = Math.max(0, Math.min(firstRow, lastFirst()));
  drawnAt = $("log").scrollTop;  // a scroll event that is still to come is older
  following = false;
  $("log").scrollIntoView({block: "nearest"});  // on a small screen it may be below the window
  redraw();
}

// Scroll to the line in the address, as soon as it is there.
function goToTarget() {
  target = Number(/^#L(\d+)$/.exec(location.hash)?.[1] || 0);
  awaited = target > lineCount;
  if (!target) return redraw();
  following = false;
  if (awaited) {
    if (complete) say("found", `there is no line ${target}`);
    else if (isLive(build)) say("found", `line ${target} is still to come`);
    return redraw();
  }
  for (const one of rows(chunkAt(chunkOf("line", target - 1)).row, rowCount())) {
    if (one.line < target) continue;
    target = one.line;  // of a progress bar, the line that is left
    return goTo(one.row);
  }
}

function goToLine(line) {
  if (location.hash == `#L${line}`) goToTarget(); else location.hash = `L${line}`;
}

// Call each with the rows that match, a chunk at a time, until it returns true. Return whether it did.
// Its second argument is the first row that is not final: the last row is not while it is a progress bar.
async function scan(first, matches, each) {
  let paused = performance.now();
  const count = rowCount();
  for (let row = first; row < count;) {
    const end = chunks[chunkOf("row", row) + 1]?.row ?? rowCount(), bars = bar && end == rowCount() ? 1 : 0;
    if (each([...rows(row, end)].filter(({text}) => matches(plain(text))), end - bars)) return true;
    row = end;
    if (performance.now() - paused > 20) {
      await sleep(0);
      paused = performance.now();
    }
  }
  return false;
}

// Search the rows that were not searched to their end. Return a promise of the end.
let searching = {};
function search() {
  if (searching.pattern !== pattern) searching = {pattern, done: searchRows(pattern)};
  return searching.done;
}

async function searchRows(mine) {
  await sleep(0);  // so that searching is there
  const matches = new RegExp(mine.source, "i");
  await scan(searched, text => matches.test(text), (found, end) => {
    if (pattern !== mine) return true;
    while (hits.at(-1) >= searched) hits.pop();  // of a progress bar
    for (const {row} of found) hits.push(row);
    searched = end;
    showHits();
    return false;
  });
  if (searching.pattern === mine) searching = {};
}

let current = -1;  // the row of the last match that was shown
let asked = 0;  // how often something else than the first error was asked for, or it again

function showHits() {
  const at = current < 0 ? 0 : hits.indexOf(current) + 1;
  const [number, count] = [at || "–", hits.length].map(one => one.toLocaleString("en"));
  say("found", !pattern ? "" : hits.length ? `${number} of ${count}` : "no match");
}

async function step(forward) {
  if (pattern && !hits.length) await search();
  const from = current >= 0 ? current : forward ? firstRow - 1 : firstRow;
  const next = forward ? hits.find(row => row > from) ?? hits[0] : hits.findLast(row => row < from) ?? hits.at(-1);
  if (next === undefined) return;
  current = next;
  showHits();
  goTo(next);
}

function prepareLog() {
  const log = $("log");
  log.onscroll = () => {
    const range = log.scrollHeight - log.clientHeight;
    if (Math.abs(log.scrollTop - drawnAt) < 1) return;  // draw() scrolled, not the reader
    following = log.scrollTop >= range - 2;
    firstRow = range > 0 ? log.scrollTop / range * lastFirst() : 0;
    redraw();
  };
  new ResizeObserver(redraw).observe(log);
  $("wrap").onchange = () => {
    const part = firstRow / Math.max(1, lastFirst());
    log.classList.toggle("wrapped", $("wrap").checked);
    firstRow = part * lastFirst();
    redraw();
  };
  $("follow").onclick = () => { following = true; target = 0; awaited = false; redraw(); log.focus(); };
  $("needle").oninput = () => {
    asked++;
    const text = $("needle").value.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    pattern = text && !/^:\d*$/.test(text) ? new RegExp(`(${text})`, "gi") : null;
    hits = [];
    searched = 0;
    current = -1;
    showHits();
    redraw();
  };
  $("needle").onkeydown = event => {
    const line = /^:(\d+)$/.exec($("needle").value);
    if (event.key == "Escape") { $("needle").value = ""; $("needle").oninput(); }
    if (event.key != "Enter") return;
    if (line) goToLine(line[1]);
    else step(!event.shiftKey);
  };
  $("previous").onclick = () => step(false);
  $("next").onclick = () => step(true);
  $("error").onclick = async () => {
    const go = (found, end) => {
      row = end;
      if (!found.length) return asked != mine;
      say("found", "");
      goToLine(found[0].line);
      return true;
    };
    const cause = text => text.trim() && build.error.endsWith(`: ${text.trim()}`);  // the server has found it
    const mine = ++asked;
    let row = 0, last = false;
    if (build.error && await scan(0, cause, go)) return;
    for (row = 0; asked == mine && !last; await sleep(200)) {  // the line may be still to come
      last = complete;
      if (await scan(row, text => ERROR.test(text), go)) return;
      say("found", last ? "no line looks like an error" : "no error so far");
    }
  };
  onhashchange = goToTarget;
  onkeydown = event => {
    if (event.key == "/" && event.target.tagName != "INPUT") { event.preventDefault(); $("needle").focus(); }
  };
  goToTarget();
}

// ---- A build: its status, its events, its result.

let build = null;  // the last status
let config = {};
const phases = new Map();  // type -> the last message, of this attempt
let refreshing = 0;
let complete = false;  // all events are here

function showBuild() {
  const took = build.started_at ? span(between(build.started_at, build.finished_at)) : "";
  const live = isLive(build), state = stateOf(build);
  say("source", sourceOf(build));
  document.title = `${state} · ${sourceOf(build)} · confbuild`;
  say("state", state);
  $("state").className = `state ${state}`;
  say("took", took + (build.attempts > 1 ? `, attempt ${build.attempts}` : ""));
  say("facts", `${build.job_id}, submitted ${new Date(build.submitted_at).toLocaleString()}`);
  say("failure", build.error && state != "cancelled" ? `${build.error_type}: ${build.error}` : "");
  $("cancel").hidden = !live;
  $("download").hidden = !build.result;
  $("build").hidden = false;
  showPhases(live);
}

function showPhases(live) {
  const began = build.phases || {};  // type -> seconds
  const order = Object.values(began).sort((a, b) => a - b);
  const end = build.finished_at ? Date.parse(build.finished_at) : Date.now() + skew;
  const names = [...phases.keys()], body = $("phases").tBodies[0];
  while (body.rows.length > names.length) body.deleteRow(-1);
  names.forEach((name, i) => {
    const row = body.rows[i] ?? body.appendChild(el("tr", {}, el("th", {scope: "row"}), el("td"), el("td")));
    const next = order.find(time => time > began[name]);
    const time = name in began ? span((next ? next * 1000 : end) - began[name] * 1000) : "";
    const waited = name == "queued" && build.status != "queued";
    const text = name == "build" ? counted() : waited ? "" : phases.get(name);
    [name, time, text].forEach((text, k) => write(row.cells[k], text));
    row.className = live && i == names.length - 1 ? "now" : "";
  });
}

async function refresh() {
  refreshing = 0;
  build = await json(path).catch(() => build);
  showBuild();
}

function onEvent(event) {
  if (event.type == "queued") {
    if (phases.size > 1) phases.clear();  // another attempt
    phases.set("queued", event.position ? `${event.position} before it` : "next");
  } else if (event.type != "complete") {
    phases.set(event.type, String(event.msg ?? JSON.stringify(event)));
  }
  refreshing ||= setTimeout(refresh, 150);
}

const BUILD = '{"type":"build","msg":"';
const SLICE = 65536;  // bytes; longer strings would stay in memory for longer
let position = 0;  // the number of the last event

// Take the whole frames from the beginning of text. Return the rest.
function takeFrames(text) {
  const frames = text.split("\n\n"), rest = frames.pop();
  for (const frame of frames) {
    if (frame.startsWith(":")) continue;  // a comment
    const end = frame.indexOf("\n"), data = frame.slice(end + 7);  // id: N, LF, data: {…}
    position = Number(frame.slice(4, end));
    if (data.startsWith(BUILD)) {
      if (!phases.has("build")) onEvent({type: "build", msg: ""});
      const plain = !data.includes("\\");
      addLine(plain ? data.slice(BUILD.length, -2) : JSON.parse(data).msg.replace(/[\r\n](?!$)|\n$/g, " "));
    } else {
      const event = JSON.parse(data);
      complete ||= event.type == "complete";
      onEvent(event);
    }
  }
  return rest;
}

// Follow the events to the end, over lost connections.
// Browsers open few connections to a server, and this takes one; so a hidden tab gives it up, and asks for the status.
async function follow() {
  let delay = 500, lost = false, paused = performance.now(), stop = null;
  document.addEventListener("visibilitychange", () => { if (document.hidden) stop?.abort(); });
  while (!complete) {
    if (document.hidden) {
      const seen = new Promise(done => document.addEventListener("visibilitychange", done, {once: true}));
      await Promise.race([seen, ...isLive(build) ? [sleep(5000)] : []]);
      await refresh();
      continue;
    }
    stop = new AbortController();
    let alarm = 0;
    try {
      const answer = await ask(`${path}/events?from=${position}`, {signal: stop.signal});
      if (answer.status == 204) { complete = true; break; }
      const reader = answer.body.getReader(), decoder = new TextDecoder();
      for (let rest = "";;) {
        clearTimeout(alarm);
        alarm = setTimeout(() => stop.abort(), 45000);  // the server sends a comment every 15 s
        const {done, value} = await reader.read();
        if (done) break;
        if (lost) say("link", `Connected again: resumed after event ${position}, nothing is missing.`);
        lost = false;
        delay = 500;
        for (let at = 0; at < value.length; at += SLICE) {
          rest = takeFrames(rest + decoder.decode(value.subarray(at, at + SLICE), {stream: true}));
        }
        redraw();
        if (awaited && target <= lineCount) { say("found", ""); goToTarget(); }
        if (performance.now() - paused > 30) {
          await sleep(0);  // so that the page is drawn and reacts
          paused = performance.now();
        }
      }
    } catch (e) {
      if (e.status && e.status < 500) throw e;
    } finally {
      clearTimeout(alarm);
    }
    if (complete) break;
    if (document.hidden) continue;
    say("link", `The connection was lost after event ${position}; resuming …`);
    lost = true;
    await sleep(delay);
    delay = Math.min(2 * delay, 8000);
  }
  say("link", lost ? "" : $("link").textContent);
}

// A table of cells, which are text or elements.
function table(ariaLabel, rows, names) {
  const head = names && el("thead", {}, el("tr", {}, ...names.map(name => el("th", {scope: "col"}, name))));
  const lines = rows.map(cells => el("tr", {}, ...cells.map((cell, i) =>
    i || names ? el("td", {className: "mono"}, cell ?? "") : el("th", {scope: "row"}, cell))));
  return el("table", {ariaLabel}, ...(head ? [head] : []), el("tbody", {}, ...lines));
}

const digestOf = item => Object.entries(item?.digest ?? {}).map(([name, value]) => `${name}:${value}`).join(" ");

function fileLink(name, textContent = name) {
  const href = `${path}/files/${name.split("/").map(encodeURIComponent).join("/")}`;
  return el("a", {href, textContent, download: name.split("/").pop()});
}

async function artifactTable(subjects) {
  const lines = await Promise.all(subjects.map(async (subject, i) => {
    const link = fileLink(`artifacts/${subject.name}`, subject.name);
    const head = i < 50 ? await ask(link.href, {method: "HEAD"}).catch(() => null) : null;
    return [link, head ? size(Number(head.headers.get("Content-Length"))) : "", subject.digest?.sha256];
  }));
  return table("Artifacts", lines, ["Name", "Size", "SHA-256"]);
}

function provenanceTable({predicate: {buildDefinition: {buildType, ...build}, runDetails}}) {
  const {externalParameters: {buildCommand, source}, internalParameters: {lockfileHash, toolchain}} = build;
  const dependencies = build.resolvedDependencies ?? [], {metadata} = runDetails;
  const rows = [
    ["Source", source?.uri], ["Commit", source?.digest?.gitCommit], ["Tree", source?.digest?.gitTree],
    ["Lock file", digestOf({digest: lockfileHash})], ["Command", buildCommand],
    ...Object.entries(toolchain ?? {}).map(([name, tool]) => [name, `${tool.version}  ${digestOf(tool)}`]),
    ["Builder", runDetails.builder?.id], ["Invocation", metadata?.invocationId], ["Started", metadata?.startedOn],
    ["Finished", metadata?.finishedOn], ["Build type", buildType],
    ...(runDetails.byproducts ?? []).map(one => [one.name, digestOf(one)]),
  ];
  const more = el("details", {hidden: !dependencies.length}, el("summary", {}, `Dependencies: ${dependencies.length}`));
  more.ontoggle = () => {
    if (more.children.length > 1) return;
    const rows = dependencies.map(one => [one.name, one.uri, digestOf(one)]);
    more.append(table("Dependencies", rows, ["Name", "URI", "Digest"]));
  };
  return [table("Provenance", rows.filter(([, value]) => value)), more];
}

// The fields of an SEV-SNP report: name, first byte, end; numbers are little-endian.  [SNP-ABI 7.3]
const REPORT = [
  ["Measurement", 0x90, 0xc0], ["Report data", 0x50, 0x90], ["Host data", 0xc0, 0xe0],
  ["Guest policy", 0x08, 0x10, true], ["VMPL", 0x30, 0x34, true], ["Reported TCB", 0x180, 0x188, true],
  ["Chip id", 0x1a0, 0x1e0],
];

function evidenceTable({platform, evidence: {notice, attestation_report, hcl_report, ...others}}) {
  const rows = [["Platform", platform]];
  if (notice) rows.push(["Notice", notice]);
  if (attestation_report || hcl_report) {
    const text = atob((attestation_report || hcl_report).replaceAll("-", "+").replaceAll("_", "/"));
    const report = Uint8Array.from(text, c => c.charCodeAt(0)).subarray(attestation_report ? 0 : 32);
    for (const [name, first, end, number] of REPORT) {
      const bytes = report.slice(first, end);
      rows.push([name, number ? `0x${hex(bytes.reverse())}` : hex(bytes)]);
    }
  }
  for (const [name, value] of Object.entries(others)) rows.push([name, JSON.stringify(value).slice(0, 200)]);
  return table("Evidence", rows);
}

function verifyCommand(nonce) {
  const options = ["python3 confbuild.py verify", `${job}.tar.gz`, `--nonce ${nonce || build.nonce}`];
  if (/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(build.repo_ref)) options.push(`--source-commit ${build.repo_ref}`);
  if (config.confidential && config.measurement) options.push(`--measurement ${config.measurement}`);
  const notes = ["This page checks nothing. Download the bundle, and run this next to it, with a confbuild.py that you",
    "trust, on a machine that you trust."];
  if (!nonce) notes.push("The nonce comes from the server, because this browser did not submit the build.");
  if (nonce && nonce != build.nonce) notes.push("The server names another nonce than the one that this browser chose!");
  notes.push(config.confidential ? "The measurement comes from the server: compare it with the one that you expect."
    : "The command ends with SIMULATED and status 3, because no hardware signed the evidence.");
  const command = el("pre", {className: "command"}, options.join(" "));
  const copy = el("button", {textContent: "Copy", onclick: () => {
    getSelection().selectAllChildren(command);
    write(copy, document.execCommand("copy") ? "Copied" : "Press Ctrl-C");  // navigator.clipboard needs https
  }});
  return [command, copy, el("p", {className: "quiet"}, notes.join(" "))];
}

async function showResult() {
  const box = $("result"), files = ["provenance.json", "evidence.json"];
  box.append(el("h2", {}, "Verify"), ...verifyCommand(localStorage.getItem(`nonce:${job}`)));
  box.hidden = false;
  try {
    const [statement, evidence] = await Promise.all(files.map(name => json(`${path}/files/${name}`)));
    box.append(el("h2", {}, "Artifacts"), await artifactTable(statement.subject));
    box.append(el("h2", {}, "Provenance ", fileLink(files[0])), ...provenanceTable(statement));
    box.append(el("h2", {}, "Evidence ", fileLink(files[1])), evidenceTable(evidence));
  } catch (e) {
    box.append(el("p", {}, `The bundle cannot be shown: ${e.message}`));
  }
}

async function main() {
  config = await json("config");
  say("server", [config.version, config.platform].filter(Boolean).join(" · "));
  say("notice", config.confidential ? "" : `Not confidential. ${config.notice || ""}`);
  if (!job) {
    prepareSubmit(config.limits?.archive_bytes ?? Infinity);
    return showList();
  }
  $("crumb").hidden = false;
  build = await json(path);
  showBuild();
  $("cancel").onclick = () => cancel(build);
  Object.assign($("download"), {href: `${path}/result`, download: `${job}.tar.gz`});
  Object.assign($("text"), {href: `${path}/log`, download: `${job}.log`});
  setInterval(() => { if (isLive(build)) showBuild(); }, 1000);
  prepareLog();
  await follow();
  if (awaited) goToTarget();
  for (await refresh(); isLive(build); await refresh()) await sleep(2000);  // the server may be lost just now
  if (build.result) await showResult();
}

main().catch(e => {
  say("alert", e.message);
  say("link", "");
  if (!build || !e.status) return;
  build.status = "gone";  // the server has removed it, or is another one
  showBuild();
});
</script>
</body>
</html>
"""


def page_headers() -> dict[str, str]:
    """Return the headers of the page, with the hashes of its script and its style.  [CONTRACT 1.18]"""
    texts = re.findall("(?s)<(?:style|script)>(.*?)</", PAGE)
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    # img-src is for the icon. Trusted types make the browser refuse innerHTML.
    policy = f"""default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; \
img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"""
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Vary": "Accept",
    }


# endregion 34
# ==============================================================================
# region 35. HTTP API                  [uses 18, 21, 23, 24, 30, 31, 32, 33, 34]
# ==============================================================================
# The HTTP server [CONTRACT 1.1].  Each row of ROUTES is a method of Api that takes a Request and returns a Response or
# raises Refused.  Api knows nothing about sockets; Server parses HTTP/1.1 [RFC9112] and knows nothing about builds.
# The agent and the server set-up make one Server each.
#
# A connection waits for its client in the thread "accept", without a thread of its own: for a request's head, and while
# an answer is being sent.  In between, a thread makes the answer and reads the body.  The streamer sends event streams
# and files.  So no client can make another one wait.
#
# Thread "accept": runs Server.serve_forever; owns the connections that wait for their clients; ends by Server.stop.
# Threads "request": started by Server, at most MAX_REQUESTS; each makes one answer and owns the connection meanwhile.

MAX_FIELDS = 64 * KIB  # bytes of the body of POST /build without source_data
MAX_LISTED = 1000  # builds in the answer of GET /builds [CONTRACT 1.12]
MAX_REQUESTS = 1024  # threads at a time
MAX_BODIES = MAX_REQUESTS // 2  # threads at a time that read a body, which a client may send slowly
MAX_CLIENTS = 16 * KIB  # connections that wait for their clients; beyond it, the oldest is closed
MAX_HELD = 64 * MIB  # bytes of heads and answers that these connections hold; beyond it, the oldest is closed
MAX_HEAD, MAX_HEADERS = 64 * KIB, 100  # bytes and fields of a request's head
HEAD_S = 10.0  # time for a whole head, from its first byte; for the first one, from the beginning of the connection
IDLE_S = 30.0  # time between two requests of a connection
LINGER_S = 5.0  # time for a client to close its end of a connection that the server has closed
REQUEST_TIMEOUT_S = 30.0  # silence inside a body
MIN_RATE = 16 * KIB  # bytes a second of a body, on average
_BATCH, _STARTS = 64, 8  # connections to accept or close, and threads to start, before others get a turn

JSON_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store"}
_FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
NO_BODY = (204, 304)  # statuses of responses without a body [RFC9110 6.4.1]
RAW_TYPES = ("application/gzip", "application/zip")  # of a body that is the archive itself
# Of POST /build [CONTRACT 1.6]; also artifacts, an array.
REQUEST_FIELDS = ("nonce", "repo_url", "repo_ref", "source_data", "source_name", "toolchain", "subdir")
_NONCE_FORM = "16 bytes in hexadecimal: 32 digits, or a UUID"
_ARCHIVE = {"query": "the body", "body": "source_data"}  # where the fields are -> where the archive is
_ONE_SOURCE = "exactly one of repo_url and source_data, or a body that is an archive, is required"
_KEY_FORM = 'Idempotency-Key: expected 1 to 255 printable ASCII characters, no \\, and " only around them'
_REQUEST = {"nonce": str, "artifacts?": ([WORD], None), "...": object}
_REQUEST |= dict.fromkeys((f"{name}?" for name in REQUEST_FIELDS[1:]), (str, None))


class Request(NamedTuple):
    """A request: its head, and what Api needs besides.

    target: in origin-form [RFC9112 3.2.1].
    minor: of the HTTP version, 0 or 1.
    headers: by names in lower case; a Content-Length consists of digits.
    arguments: the values of the {names} in the route's path.
    read: returns up to n bytes of the body; none if it ends early.
    """

    method: str
    target: str
    minor: int
    headers: Strings
    arguments: Sequence[str] = ()
    query: Strings = {}
    read: Callable[[int], bytes] = bytes


class Response(NamedTuple):
    """An answer: its body, and after it a source if it has one: an event stream or a range of a file.

    start: how many events of the log the client has, or the first byte of the range.
    ndjson: the form of the event stream.
    """

    status: int
    headers: Strings
    body: bytes = b""
    source: EventLog | OpenFile | None = None
    start: int = 0
    ndjson: bool = False


class Route(NamedTuple):
    """A row of the API.

    path: may contain {id}.
    name: of the method of Api.
    answers: status -> its meaning, for the OpenAPI document.
    query: name of a parameter -> its schema.
    """

    method: str
    path: str
    name: str
    summary: str
    answers: Mapping[int, str]
    media_type: str = "application/json"
    query: Json = {}


_PROBLEM = "application/problem+json"
_NAME = re.compile(r"\{(\w+)\}")  # in the path of a route
# The routes [CONTRACT 1.5], and their parts.
_ID = {"type": "string", "format": "uuid"}
_NONCE = {"type": "string", "pattern": f"^({NONCE_PATTERN})$"}
_RANGES = {206: "a range of it", 304: "unchanged", 416: "no such range", 503: "too many streams"}
# fmt: off
ROUTES = (
    Route("GET", "/", "page", "A page for people",
          {200: "the page", 404: "Accept does not name text/html"}, "text/html"),
    Route("GET", "/health", "health", "Whether the server answers", {200: "ok"}, "text/plain"),
    Route("POST", "/build", "submit", "Submit a build",
          {200: 'accepted: {"job_id": UUID}', 400: "not JSON, or an invalid nonce, source, URL, ref or archive",
           409: "a single-use server has accepted its build", 411: "no Content-Length", 413: "body too large",
           415: "neither JSON nor an archive", 422: "JSON of the wrong shape", 429: "queue full",
           503: "shutting down, or too many uploads", 507: "the disk of the server is full"}),
    Route("GET", "/build/{id}/events", "events", "Follow a build: Server-Sent Events, replayed from ?from=N, then live",
          {200: "events", 204: "complete, and no event after N", 400: "invalid from", 503: "too many streams"},
          "text/event-stream", {"from": {"type": "integer", "minimum": 0}}),
    Route("GET", "/build/{id}/result", "result", "Download the bundle",
          {200: "the archive", **_RANGES}, "application/gzip"),
    Route("GET", "/build/{id}/log", "log", "The output of a build so far, also while it runs",
          {200: "the text", **_RANGES}, "text/plain"),
    Route("GET", "/build/{id}/files/{file}", "file", "Download a file of the bundle, such as evidence.json",
          {200: "the file", **_RANGES}, "application/octet-stream"),
    Route("GET", "/build/{id}", "status", "The status of a build", {200: "status"}),
    Route("DELETE", "/build/{id}", "cancel", "Cancel a build",
          {200: "status", 507: "cancelled, but the disk is full, so a restart may run it again"}),
    Route("GET", "/builds", "list_builds", f"Builds, newest first, at most {MAX_LISTED}",
          {200: "an array of status", 400: "invalid limit"},
          query={"after": _ID, "limit": {"type": "integer", "minimum": 1}}),
    Route("GET", "/config", "config", "A description of the server", {200: "configuration"}),
    Route("GET", "/attestation", "attestation", "Evidence of the VM that waits for a build, for ?nonce=",
          {200: "evidence.json", 400: "invalid nonce", 503: "no VM, or it does not attest"},
          query={"nonce": _NONCE}),
    Route("GET", "/metrics", "metrics", "Metrics in the text format of Prometheus", {200: "metrics"}, "text/plain"),
    Route("GET", "/openapi.json", "openapi", "This API", {200: "OpenAPI 3.1"}),
)
# fmt: on


def problem(refused: Refused) -> Response:
    """Return the problem details [RFC9457] of refused, with the two names of the `complete` event [CONTRACT 1.4]."""
    doc = {
        "type": "about:blank",
        "title": http.HTTPStatus(refused.status).phrase,
        "status": refused.status,
        "detail": str(refused),
        "error": str(refused),
        "error_type": refused.error_type,
    }
    headers = {"Content-Type": _PROBLEM, **refused.headers}
    return Response(refused.status, headers, json_bytes(doc))


def to_refused(error: Exception, line: str) -> Refused:
    """Return the refusal that answers an exception of a request. Log it unless it is one.

    line: the first line of the request, for the log.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return Refused(503, "Busy", "the server has too many files open", BUSY)
    if isinstance(error, OSError) and is_full(error):
        logger().error("%s: %s", line, error)
        reason = f"the disk of the server is full: {error.strerror}"
        return Refused(507, "InsufficientStorage", reason, {"Retry-After": "60"})
    logger().error("%s", line, exc_info=error)
    return Refused(500, "InternalError", "internal error; the log of the server has the details")


def json_response(value: Any) -> Response:
    """Return 200 with value as JSON."""
    return Response(200, JSON_HEADERS, json_bytes(value) + b"\n")


# The strings and brackets in the first bytes of a JSON document.  A string that the end of the text cuts off counts as
# well, so that no byte is scanned twice.  All is possessive: re keeps 120 bytes for each step that it could undo.
_JSON_PART = rb"""(?sx)
    (?P<name>"source_data"[ \t\r\n]*+:[ \t\r\n]*+(?="))?+   # the name of the member whose value follows
    "[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)
    | [\[\]{}]
    """


def find_source_data(head: bytes) -> int:
    """Return the offset of the first character of the top-level string source_data, or 0 if it is not in head.

    head: the first bytes of a JSON object. Names with escapes are not found.
    """
    depth = 0
    for part in re.finditer(_JSON_PART, head):
        if part["name"] and depth == 1:
            return part.end("name") + 1
        depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(part[0], 0)
    return 0


def save_archive(body: IO[bytes], path: str, max_bytes: int) -> None:
    """Decode the rest of a JSON string of base64 [RFC4648 4] to the file at path.

    body: positioned inside the string; afterwards at the quote that ends it, or at the end of the body.
    Raises Refused if the string is not base64 or holds more than max_bytes; OSError.
    """
    rest, ended = b"", False
    try:
        with open(path, "wb") as file:
            while not ended:
                block = body.read(BLOCK)
                text, quote, _ = block.partition(b'"')
                ended = bool(quote) or not block
                escape = text.rfind(b"\\", -5)  # of up to 6 bytes; it may go on in the next block
                if escape > 0 and not ended:
                    text = text[:escape]
                body.seek(len(text) - len(block), os.SEEK_CUR)
                if b"\\" in text:  # \/ or \u002b, which some encoders write
                    text = json.loads(b'"%b"' % text).encode("ascii")
                text = rest + text
                cut = len(text) if ended else (len(text) - 1) & ~3  # before the last group, which may have padding
                text, rest = text[:cut], text[cut:]
                if rest and b"=" in text:
                    raise ValueError("base64 goes on after its padding")
                data = binascii.a2b_base64(text, strict_mode=True)
                if file.tell() + len(data) > max_bytes:
                    raise Refused(413, "PayloadTooLarge", f"the archive has more than {max_bytes} bytes")
                file.write(data)
    except ValueError:
        raise Refused(
            400, "InvalidSource", "source_data is not standard base64 with padding, without line breaks"
        ) from None


def read_fields(body: IO[bytes], archive: str, max_bytes: int) -> Any:
    """Return the JSON document in body, and write its source_data to the new file archive.

    Only source_data may be long. It is decoded in blocks, and the rest is parsed as if it were empty.
    Raises Refused if it is not JSON, or source_data has more than max_bytes; OSError.
    """
    body.seek(0)
    text = body.read(MAX_FIELDS)
    start = find_source_data(text)
    if start:
        body.seek(start)
        text = text[:start]
        save_archive(body, archive, max_bytes)
    text += body.read(MAX_FIELDS + 1)
    if len(text) > MAX_FIELDS:
        raise Refused(413, "PayloadTooLarge", f"the body has more than {MAX_FIELDS} bytes besides source_data")
    try:
        return parse_json(text, "body", 32, 2**53)
    except Malformed as e:
        raise Refused(400, "InvalidJson", str(e)) from None


def serve_file(request: Request, file: OpenFile, headers: dict[str, str]) -> Response:
    """Return the answer with file, or the range of it that request asks for.  [RFC9110 13.2, 14]

    headers: with the ETag. They are completed.
    Raises Refused 416.
    """
    headers["Accept-Ranges"] = "bytes"
    known = re.findall(r'"[^"]*"|\*', request.headers.get("if-none-match", ""))
    if headers["ETag"] in known or "*" in known:
        return Response(304, headers)
    asked = request.headers.get("range", "")
    if request.method == "HEAD" or request.headers.get("if-range", headers["ETag"]) != headers["ETag"]:
        asked = ""  # only GET has ranges
    size, match = file.size, re.fullmatch("(?i)bytes=([0-9]{0,20})-([0-9]{0,20})", asked.replace(" ", ""))
    first, last = match.groups() if match else ("", "")
    if not first + last or first and last and int(first) > int(last):
        return Response(200, headers, source=file)  # a server may ignore what is not one range of bytes
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        message = f"{asked[:80]}: there are {size} bytes"
        raise Refused(416, "RangeNotSatisfiable", message, {"Content-Range": f"bytes */{size}"})
    file.size = end
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(206, headers, source=file, start=start)


def accepts(headers: Strings, media_type: str) -> bool:
    """Return whether the Accept of a request names media_type. */*, which every client sends, does not count."""
    return bool(re.search(rf"(?i){media_type}(?!\s*;\s*q=0[.0]*(?![.0-9]))", headers.get("accept", "")))


def read_count(request: Request, name: str, default: str) -> int:
    """Return the number in the query's field called name. Raises Refused 400, Invalid and the name."""
    text = request.query.get(name, default)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise Refused(
            400, f"Invalid{name.title()}", f"{name}: {text[:80]!r} is not a number of at most 18 digits, such as 0"
        )
    return int(text)


class Api(NamedTuple):
    """The routes of ROUTES.

    description: the answer of GET /config.
    attest: called with a nonce; returns the evidence of the VM that waits, or raises ConfbuildError.
    greeting: the comment that begins every event stream, or nothing.
    crowded: returns whether there are too many event streams and downloads for another one.
    gauges: the metrics that are not counted.
    """

    jobs: Jobs
    policy: SourcePolicy
    description: Json
    attest: Callable[[str], bytes]
    greeting: bytes = b""
    crowded: Callable[[], bool] = bool
    gauges: Callable[[], Mapping[str, float]] = dict

    def page(self, request: Request) -> Response:
        """Return the page of browsers; other clients keep their 404. [CONTRACT 1.18]"""
        if not accepts(request.headers, "text/html"):
            raise Refused(404, "NotFound", "no such path: '/' is only for clients whose Accept names text/html")
        return Response(200, page_headers(), PAGE.encode())

    def health(self, _: Request) -> Response:
        """Return 200 `ok`."""
        return Response(200, {"Content-Type": "text/plain; charset=utf-8"}, b"ok")

    def config(self, _: Request) -> Response:
        """Return the description of the server. [CONTRACT 1.13]"""
        return json_response(self.description)

    def attestation(self, request: Request) -> Response:
        """Return the evidence of the VM that waits. [CONTRACT 1.14]"""
        nonce = parse_nonce(request.query.get("nonce"))
        if not nonce:
            raise Refused(400, "InvalidNonce", f"?nonce= must be {_NONCE_FORM}")
        try:
            return Response(200, JSON_HEADERS, self.attest(nonce))
        except Refused:
            raise
        except ConfbuildError as e:
            raise Refused(503, "AttestationError", str(e), {"Retry-After": "30"}) from None

    def metrics(self, _: Request) -> Response:
        """Return the metrics. [CONTRACT 1.17]"""
        text = render_metrics(self.gauges())
        return Response(200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}, text.encode("ascii"))

    def openapi(self, _: Request) -> Response:
        """Return the OpenAPI document of ROUTES."""
        return json_response(openapi_document())

    def list_builds(self, request: Request) -> Response:
        """Return the status of the last builds, newest first. [CONTRACT 1.12]"""
        limit = min(read_count(request, "limit", str(MAX_LISTED)), MAX_LISTED)
        return json_response(list_jobs(self.jobs, limit, request.query.get("after", "")))

    def status(self, request: Request) -> Response:
        """Return the status of a build. [CONTRACT 1.12]"""
        return json_response(describe_job(self.jobs.get(request.arguments[0]), self.jobs.positions()))

    def cancel(self, request: Request) -> Response:
        """Cancel a build. Return its status, which is still "running" until the build has stopped. [CONTRACT 1.12]"""
        self.jobs.cancel(self.jobs.get(request.arguments[0]))
        return self.status(request)

    def _open(self, request: Request, open_source: Callable[[Job], Any]) -> Any:
        """Return what open_source opens of the job for a watcher. Raises Refused 503 if too many are open."""
        job = self.jobs.get(request.arguments[0])
        source = open_source(job)
        source.owner = job  # in use, so it is not removed
        if self.crowded():
            raise Refused(503, "TooManyWatchers", "too many event streams and downloads are open", BUSY)
        return source

    def events(self, request: Request) -> Response:
        """Return the event stream of a build. [CONTRACT 1.7]"""
        start = read_count(request, "from", request.headers.get("last-event-id") or "0")
        log = self._open(request, Job.open_log)
        if log.finished and start >= log.count:
            return Response(204, {"Cache-Control": "no-store"})
        ndjson = accepts(request.headers, "application/x-ndjson")
        media_type = "application/x-ndjson" if ndjson else "text/event-stream"
        headers = {"Content-Type": media_type, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return Response(200, headers, b"" if ndjson else self.greeting, log, start, ndjson)

    def log(self, request: Request) -> Response:
        """Return the output of the build so far. [CONTRACT 1.16]"""
        file = self._open(request, open_text)
        headers = {"Content-Type": "text/plain; charset=utf-8", "ETag": f'"{file.size}"', "Cache-Control": "no-store"}
        return serve_file(request, file, headers)

    def file(self, request: Request) -> Response:
        """Return a file of the bundle. [CONTRACT 1.16]"""
        name = urllib.parse.unquote(request.arguments[1])
        file = self._open(request, lambda job: open_member(job, name))
        kind = "application/json" if name.endswith(".json") else "application/octet-stream"
        headers = {"Content-Type": kind, "ETag": f'"{sha256_hex(request.arguments[1].encode())}"', **_FOREVER}
        return serve_file(request, file, headers)

    def result(self, request: Request) -> Response:
        """Return the archive, or a range of it. [CONTRACT 1.11]"""
        file = self._open(request, open_result)
        digest = str(file.owner.record.result["sha256"])
        headers = {
            "Content-Type": "application/gzip",
            "ETag": f'"{digest}"',
            "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode('ascii')}:",  # [RFC9530 3]
            **_FOREVER,
            "Content-Disposition": f'attachment; filename="{file.owner.id}.tar.gz"',
        }
        return serve_file(request, file, headers)

    def submit(self, request: Request) -> Response:
        """Accept a build. [CONTRACT 1.6]"""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        raw, limit = media_type in RAW_TYPES, self.policy.max_archive
        if not raw and media_type != "application/json":  # a form of another site cannot send these [CONTRACT 1.2]
            expected = ", ".join(("application/json", *RAW_TYPES))
            raise Refused(415, "UnsupportedMediaType", f"Content-Type {media_type[:80]!r}: expected {expected}")
        if raw and "source_data" in request.query:
            raise Refused(400, "InvalidSource", _ONE_SOURCE)
        if "content-length" not in request.headers:
            raise Refused(411, "LengthRequired", "POST /build requires a Content-Length")
        length = int(request.headers["content-length"])
        key = re.sub('^"(.*)"$', r"\1", request.headers.get("idempotency-key", ""))
        if length > (limit if raw else limit * 4 // 3 + MAX_FIELDS):
            raise Refused(413, "PayloadTooLarge", f"the archive has more than {limit} bytes")
        if "idempotency-key" in request.headers and not IDEMPOTENCY_KEY.fullmatch(key):
            raise Refused(400, "InvalidKey", _KEY_FORM)
        job = self.jobs.table.find(key)
        if not job:
            archive = join(self.jobs.table.incoming, uuid.uuid4().hex)
            try:
                self.jobs.check_open(key)
                with open(archive, "wb") if raw else tempfile.TemporaryFile(dir=self.jobs.table.incoming) as body:
                    while body.tell() < length:
                        block = request.read(BLOCK)
                        if not block:
                            raise Refused(400, "InvalidSource" if raw else "InvalidJson", "the body ended early")
                        body.write(block)
                    if raw:  # the archive is the body; artifacts may come several times
                        patterns = urllib.parse.parse_qs(request.target.partition("?")[2]).get("artifacts")
                        fields = {"nonce": "", **request.query, "source_data": "", "artifacts": patterns}
                    else:
                        fields = read_fields(body, archive, limit)
                job = self.jobs.submit(self._check_fields(fields, "query" if raw else "body", archive), archive, key)
            except (Refused, OSError):  # a build with this key may be known by now
                job = self.jobs.table.find(key)
                if not job:
                    raise
            finally:
                remove_tree(archive)  # if it was not moved
        while request.read(BLOCK):  # if the build was known; many clients read no answer before they have sent all
            pass
        return json_response({"job_id": job.id})

    def _check_fields(self, fields: Any, where: str, archive: str) -> BuildRequest:
        """Return the build that fields of the body or query ask for, with source_data in the file archive.

        Raises Refused, OSError.
        """
        try:
            check_schema(fields, _REQUEST, where)
        except Malformed as e:
            raise Refused(422, "InvalidRequest", str(e)) from None
        text, url, ref, source, source_name, toolchain, subdir = map(fields.get, REQUEST_FIELDS)
        if source is not None and not exists(archive):  # the name was written with an escape
            save_archive(io.BytesIO(json_bytes(source)[1:]), archive, self.policy.max_archive)
        choices = toolchain or "", subdir or "", fields.get("artifacts") or ()
        nonce = parse_nonce(text)
        if not nonce:
            raise Refused(400, "InvalidNonce", f"the nonce in the {where} must be {_NONCE_FORM}")
        if (url is None) == (source is None):
            raise Refused(400, "InvalidSource", _ONE_SOURCE)
        if url is not None:
            check_url(url, self.policy.schemes, self.policy.loopback)
            check_ref(ref or "")
        elif ref:
            raise Refused(400, "InvalidRef", "repo_ref requires repo_url")
        else:
            with open(archive, "rb") as f:
                if not is_archive(f.read(4)):
                    raise Refused(400, "InvalidSource", f"{_ARCHIVE[where]} is neither a ZIP file nor a gzip tarball")
        return BuildRequest(nonce, url or "", ref or "", (not url and source_name or "")[:255], *choices)


def openapi_document() -> Json:
    """Return the OpenAPI 3.1 document of ROUTES."""
    paths: dict[str, Any] = {}
    text = {"type": "string"}
    schema = {
        "type": "object",
        "required": ["nonce"],
        "properties": dict.fromkeys(REQUEST_FIELDS, text)
        | {"nonce": _NONCE, "artifacts": {"type": "array", "items": text}},
        "oneOf": [{"required": ["repo_url"]}, {"required": ["source_data"]}],
    }
    content: dict[str, Any] = {"application/json": {"schema": schema}} | dict.fromkeys(RAW_TYPES, {})
    bodies = {"POST": {"requestBody": {"required": True, "content": content}}}
    for route in ROUTES:
        of_build = "{id}" in route.path or "after" in route.query
        common = (
            (401, "no valid bearer token", route.path not in ("/", "/health")),
            (408, "the body arrives too slowly", route.method in bodies),
            (404, "no such build, or what is asked for is not there, not yet, or damaged", of_build),
            (410, "the build was removed; the text says when", of_build),
            (421, "the Host is not a name of this server", True),
        )
        answers = {**route.answers, **{status: reason for status, reason, applies in common if applies}}
        places = [("path", name, {"id": _ID}.get(name, text)) for name in _NAME.findall(route.path)]
        places += [("query", *item) for item in route.query.items()]
        paths.setdefault(route.path, {})[route.method.lower()] = {
            "operationId": route.name,
            "summary": route.summary,
            "parameters": [
                {"name": name, "in": place, "required": place == "path", "schema": schema}
                for place, name, schema in places
            ],
            "responses": {
                str(status): {"description": reason}
                | ({} if status in NO_BODY else {"content": {route.media_type if status < 300 else _PROBLEM: {}}})
                for status, reason in sorted(answers.items())
            },
            **bodies.get(route.method, {}),
        }
    return {"openapi": "3.1.0", "info": {"title": "confbuild", "version": __version__}, "paths": paths}


def find_route(method: str, path: str) -> tuple[Route, Sequence[str]]:
    """Return the route of a request and the values of the {names} in its path. HEAD has the routes of GET.

    [CONTRACT 1.1]

    Raises Refused 404 or 405.
    """
    found = {}
    for route in ROUTES:
        match = re.fullmatch(route.path.replace("{id}", "([^/]+)").replace("{file}", "(.+)"), path)
        if match:
            found[route.method] = route, match.groups()
    if "GET" in found:
        found["HEAD"] = found["GET"]
    if method in found:
        return found[method]
    if found:
        allow = ", ".join(sorted(found))
        raise Refused(405, "MethodNotAllowed", f"method {method[:80]}: expected {allow}", {"Allow": allow})
    raise Refused(404, "NotFound", f"no such path: {path[:80]!r}")


class AccessPolicy(NamedTuple):
    """The access control of a server. [CONTRACT 1.2]

    tokens: the bearer tokens [RFC6750]; empty if none is required.
    hosts: names that the Host header may contain, in lower case.
    """

    tokens: Sequence[str]
    hosts: Sequence[str]

    def check(self, headers: Strings, path: str, local_address: str) -> None:
        """Raise Refused 421 for the name of another host, and 401 without a token where one is needed.

        Nobody needs one for /health, nor for the page, which has nothing to hide and asks for the token.
        """
        host = re.sub(r":\d*$", "", headers.get("host", "localhost").lower())  # HTTP/1.0 may omit it
        if host.strip("[]") not in (*self.hosts, "localhost", local_address):  # DNS rebinding
            message = f"Host {host[:80]!r} is not a name of this server; --public-host adds names"
            raise Refused(421, "MisdirectedRequest", message)
        if not self.tokens or path == "/health" or path == "/" and accepts(headers, "text/html"):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "replace")
        # Compare with every token, each in constant time: any() over a list, not over a generator.
        matches = [hmac.compare_digest(given, known.encode()) for known in self.tokens]
        if scheme.lower() != "bearer" or not any(matches):
            headers = {"WWW-Authenticate": 'Bearer realm="confbuild"'}
            raise Refused(401, "Unauthorized", "a valid bearer token is required", headers)


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # [RFC9110 5.6.2]
# uri-host [":" port] [RFC9110 4.1]
_AUTHORITY = re.compile(r"(?:\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
# The end of a head, or the first bytes that no head can have: they are refused at once.
_HEAD_END = re.compile(rb"\n\r?\n|\r[^\n]|\A[^!-~\r\n]")


def parse_head(data: bytes) -> Request:
    """Parse the head of a request. [RFC9112 2 to 5]

    data: includes the empty line at the end. A line may end with LF alone [RFC9112 2.2].
    A field that occurs twice becomes a list [RFC9110 5.3].
    Raises Refused.
    """

    def require(holds: Any, reason: str, status: int = 400) -> None:
        if not holds:
            raise Refused(status, "BadRequest", reason)

    require(len(data) <= MAX_HEAD, f"the head has more than {MAX_HEAD} bytes", 431 if b"\n" in data[:MAX_HEAD] else 414)
    bad = re.search(rb"\r(?!\n)|[\0-\x08\x0b\x0c\x0e-\x1f\x7f]", data)
    require(not bad, "the head has a control character, or a CR without LF")
    first, *rows = re.split("\r?\n", data.decode("latin-1"))
    line = re.fullmatch(rf"({_TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])", first)
    method, target, major, minor = line.groups() if line else [""] * 4
    require(method, f"the first line is {first[:80]!r}, expected METHOD TARGET HTTP/1.1")
    require(major == "1", f"HTTP/{major}.{minor}: expected HTTP/1.1", 505)
    require(len(rows) <= MAX_HEADERS + 2, f"the head has more than {MAX_HEADERS} fields", 431)
    headers: dict[str, str] = {}
    for row in rows[:-2]:
        name, colon, value = row.partition(":")
        require(colon and re.fullmatch(_TOKEN, name), f"{row[:80]!r} is not a header field")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    host = headers.get("host", "")
    require(
        _AUTHORITY.fullmatch(host) and (minor == "0" or "host" in headers), "expected one Host field, HOST or HOST:PORT"
    )
    path, absolute = target, re.match(r"https?://([^/?#]*)/?", target, re.IGNORECASE)
    if absolute:  # replaces the host of the field [RFC9112 3.2.2]
        headers["host"] = host = absolute[1]
        path = "/" + target[absolute.end() :]
    valid = path[0] == "/" or path == "*" or method == "CONNECT"
    require(valid and _AUTHORITY.fullmatch(host), f"the target {target[:80]!r} is neither a path nor a URL")
    return Request(method, path, min(int(minor), 1), headers)


def encode_head(response: Response, request: Request, close: bool) -> bytes:
    """Return the head of the answer to request. close: the connection ends after the answer."""
    request_id = request.headers.get("x-request-id", "")
    headers = {
        "Server": f"confbuild/{__version__}",
        "Date": email.utils.formatdate(usegmt=True),
        **response.headers,
        "X-Request-Id": request_id if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request_id) else uuid.uuid4().hex,
        "X-Content-Type-Options": "nosniff",
    }
    if isinstance(response.source, EventLog):
        headers |= {"Transfer-Encoding": "chunked"} if request.minor else {}
    elif response.status not in NO_BODY:
        size = response.source.size - response.start if response.source else len(response.body)
        headers["Content-Length"] = str(size)
    if close:
        headers["Connection"] = "close"
    first = f"HTTP/1.1 {response.status} {http.HTTPStatus(response.status).phrase}"
    return "\r\n".join([first, *map(": ".join, headers.items()), "", ""]).encode("latin-1")


class Connection:
    """The connection of a client. One thread owns it at a time: "accept", a "request" or the streamer's.

    A request's thread waits for the client only to read the body.

    deadline: of monotonic(), for what the client must do next.
    """

    searched = 0  # where the search for the end of the head goes on
    end = 0  # of the head, once it is there
    pending = b""  # bytes of an answer that remain to be sent
    closing = False  # after them
    unread = 0  # bytes of the body of a request
    route = ""  # of the request, if it has one
    expects_100 = False  # the client waits for 100 before it sends the body
    mask = 0  # the events that the selector waits for

    def __init__(self, sock: "socket.socket", address: str, tls: bool, deadline: float) -> None:
        self.sock = sock
        self.address = address
        self.tls = tls
        self.deadline = deadline
        self.shaking = tls  # the TLS handshake is not finished
        self.buffer = bytearray()  # received, not yet used

    def has_head(self) -> bool:
        """Return whether buffer holds the whole head of a request, or bytes that cannot become one."""
        if not self.searched:
            self.buffer[:] = re.sub(rb"\A(?:\r?\n)+", b"", self.buffer)  # empty lines before it [RFC9112 2.2]
        found = _HEAD_END.search(self.buffer, max(0, self.searched - 2))
        self.searched = len(self.buffer) if self.buffer != b"\r" else 0
        self.end = found.end() if found else self.searched * (self.searched > MAX_HEAD)
        return self.end > 0

    def take_head(self) -> bytes:
        """Remove the head from buffer and return it."""
        data = bytes(self.buffer[: self.end])
        del self.buffer[: self.end]
        self.searched = self.end = 0
        return data

    def answer(self, server: "Server", seated: bool) -> None:
        """Make the answer to a request, and hand it to server or its streamer. seated: release a seat of server."""
        self.route = ""
        self.closing, watcher = True, None  # the end of the request is not known yet
        try:
            watcher = self._make(server)
        except Exception:  # noqa: BLE001  # a bug
            logger().exception("request")
            self.pending = b""
        if seated:
            server.seats.release()  # before the thread "accept" wakes up and looks for one
        if watcher:
            server.streamer.add(watcher)
        else:
            server.take(self)

    def _make(self, server: "Server") -> Watcher | None:
        """Put the answer into pending, or return a watcher for the streamer."""
        request = Request("", "", 0, {})
        data = self.take_head()
        line = re.sub(r"[^\x20-\x7e]", "?", data[:4096].partition(b"\n")[0].decode("latin-1").rstrip("\r"))
        try:
            request = parse_head(data)
            response = self._respond(server, request)
        except Exception as e:  # noqa: BLE001  # of a bug
            response = problem(to_refused(e, line))
        logger().debug('%s "%s" %d', self.address, line, response.status)
        count("confbuild_http_requests_total", route=self.route, status=response.status)
        live = isinstance(response.source, EventLog)
        chunked = live and request.minor == 1
        self.closing |= live and not chunked or self.unread > 0
        self.pending = encode_head(response, request, self.closing)
        if request.method == "HEAD" or response.status in NO_BODY:
            return None
        if not response.source:
            self.pending += response.body
            return None
        then = functools.partial(server.take, self)
        watcher = Watcher(
            self.sock, response.source, response.start, chunked, self.tls, response.body, then, response.ndjson
        )
        watcher.pending = self.pending + watcher.pending
        self.pending = b""
        return watcher

    def _respond(self, server: "Server", head: Request) -> Response:
        """Return the answer of the API. Raises Refused."""
        length = head.headers.get("content-length", "0")
        # First of all: if the end of the request is not known, bytes after it must not be taken for another request.
        if "transfer-encoding" in head.headers or not re.fullmatch("[0-9]{1,18}", length):
            raise Refused(411, "LengthRequired", "expected one Content-Length and no Transfer-Encoding")
        self.unread = int(length)
        self.deadline = monotonic() + 60 + self.unread / MIN_RATE
        self.expects_100 = head.minor == 1 and head.headers.get("expect", "").lower() == "100-continue"
        connection = f",{head.headers.get('connection', '')},"
        self.closing = not head.minor or bool(re.search(r",[ \t]*close[ \t]*,", connection, re.IGNORECASE))
        path, _, query = head.target.partition("?")
        path = re.sub("^//+", "/", path)  # some clients add /build to a URL that ends with /
        local = (self.sock.getsockname() or ("localhost",))[0].removeprefix("::ffff:")
        server.access.check(head.headers, path, local)
        route, arguments = find_route(head.method, path)
        self.route = route.path
        fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True, errors="replace"))
        request = head._replace(arguments=arguments, query=fields, read=self._read_body)
        has_body = self.unread > 0
        if has_body and not server.bodies.acquire(blocking=False):
            raise Refused(503, "Busy", "too many uploads at a time", BUSY)
        try:
            return getattr(server.api, route.name)(request)  # type: ignore[no-any-return]
        finally:
            if has_body:
                server.bodies.release()

    def _read_body(self, size: int) -> bytes:
        """Return up to size bytes of the body, or none if it ends early. Raises Refused."""
        size = min(size, self.unread)
        block = bytes(self.buffer[:size])
        del self.buffer[:size]
        try:
            if not block:
                self.sock.settimeout(REQUEST_TIMEOUT_S)
                if self.expects_100:  # only now: the route may have refused the request
                    self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                if monotonic() > self.deadline:
                    raise TimeoutError
                block = self.sock.recv(size)
        except TimeoutError:
            raise Refused(408, "RequestTimeout", "the body arrives too slowly") from None
        except OSError:
            pass  # the client has disconnected
        finally:
            self.sock.setblocking(False)
        self.expects_100 = False
        self.unread -= len(block)
        return block


@functools.cache
def inherited_socket() -> "socket.socket | None":
    """Return the listening socket that systemd has handed to this process, or None.  [sd_listen_fds(3)]"""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    if count != "1":
        raise UsageError(f"LISTEN_FDS is {count!r}: expected one socket")
    try:
        sock = socket.socket(fileno=3)
        if sock.family == socket.AF_UNIX or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise UsageError("LISTEN_FDS: file descriptor 3 is not a TCP socket that listens")
        return sock
    except OSError as e:
        raise UsageError(f"LISTEN_FDS: file descriptor 3 is not a socket: {e.strerror}") from None


def listen(address: tuple[str, int] | None) -> "socket.socket":
    """Return a non-blocking socket that listens on address. None: one that nobody can reach. Raises OSError."""
    if address is None:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # unbound; a sandbox around us may refuse AF_UNIX
    sock = inherited_socket()
    if not sock:
        sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(4096)
        except BaseException:
            sock.close()
            raise
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections inherit it
    sock.setblocking(False)
    return sock


class Server:
    """Accepts connections, waits for their clients, and makes each answer in a thread.

    A connection that waits has a deadline. If too many wait, or hold too many bytes, the oldest goes. Raises OSError.
    """

    head_s, idle_s, linger_s, scan_s = HEAD_S, IDLE_S, LINGER_S, 0.25
    mask = _held = 0  # _held: the sum of the bytes of _waiting

    def __init__(
        self,
        address: tuple[str, int] | None,
        api: Api,
        access: AccessPolicy,
        streamer: Streamer,
        tls: "ssl.SSLContext | None" = None,
    ) -> None:
        self.api = api
        self.access = access
        self.seats = threading.BoundedSemaphore(MAX_REQUESTS)
        self.bodies = threading.BoundedSemaphore(MAX_BODIES)
        self.streamer = streamer
        self._tls = tls
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_fd = max(files - 512, files * 3 // 4) if files >= 0 else sys.maxsize  # the rest is for jobs and VMs
        self._selector = WakeableSelector()  # notes: a connection that waits for its client again; None: stop
        self._waiting: dict[Connection, int] = {}  # oldest first; how many bytes each holds
        self._ready: deque[Connection] = deque()  # those of _waiting that have a head and need a thread
        self._ended = threading.Event()
        self.sock = listen(address)
        self.server_address = self.sock.getsockname()

    def serve_forever(self) -> None:
        """Serve until stop() is called."""
        self._selector.set_mask(self, READ)
        scan_at, more = monotonic(), False
        while True:
            timeout = None if self.mask and not self._waiting else max(0.0, scan_at - monotonic())
            for end, mask in self._selector.wait(0 if more else timeout):
                if end is self:
                    self._accept()
                elif mask & end.mask:  # 0 if it has been closed meanwhile
                    self._advance(end, True)
            for note in self._selector.notes():
                if note is None:
                    while self._evict():
                        pass
                    self._selector.close()
                    self.sock.close()
                    self._ended.set()
                    for late in self._selector.notes():  # take() did not see the end
                        late.sock.close()
                    return
                self._set_deadline(note)
                self._hold(note)
                self._advance(note, note.tls)
            if monotonic() >= scan_at:
                scan_at = monotonic() + (0 if self._scan(monotonic()) else self.scan_s)
            more = self._start_requests()

    def stop(self) -> None:
        """Close the listening socket and the waiting connections, and end serve_forever."""
        self._selector.post(None)
        self._ended.wait()

    def take(self, connection: Connection) -> None:
        """Send the rest of an answer, then close connection or wait for its next request. Any thread; never waits."""
        self._selector.post(connection)
        if self._ended.is_set():
            connection.sock.close()

    def _set_deadline(self, c: Connection) -> None:
        rest_s = self.linger_s if c.closing else self.idle_s
        c.deadline = monotonic() + (STALL_S if c.pending else rest_s)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, address = self.sock.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as e:
                if e.errno not in (errno.EMFILE, errno.ENFILE) or not self._evict():
                    logger().warning("accept: %s", e)
                    self._selector.set_mask(self, 0)  # until the next scan, or select would return at once, forever
                return
            try:
                if sock.fileno() >= self.max_fd and not self._evict():  # the number is the lowest free one
                    raise OSError(errno.EMFILE, "too many files")
                sock.setblocking(False)
                if self._tls:
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except (OSError, ValueError) as e:
                logger().debug("%s: %r", address, e)
                sock.close()
                continue
            connection = Connection(sock, str(address[0]), bool(self._tls), monotonic() + self.head_s)
            self._hold(connection)
            self._selector.set_mask(connection, READ)

    def _advance(self, c: Connection, readable: bool) -> None:
        """Continue the handshake, the sending of an answer or the reading of a head, as far as c's client allows.

        readable: there may be something to read.
        """
        try:
            if c.shaking:
                c.sock.do_handshake()  # type: ignore[attr-defined]
                c.shaking = False
            while c.pending:
                c.pending = c.pending[c.sock.send(c.pending) :]
                self._set_deadline(c)
            if c.closing:
                with suppress(AttributeError, OSError, ValueError):  # no TLS; no answer yet; done before [RFC9112 9.8]
                    c.sock.unwrap()  # type: ignore[attr-defined]
                c.sock.shutdown(socket.SHUT_WR)  # closing could destroy the answer on its way [RFC9112 9.6]
                if not c.sock.recv(MAX_HEAD):
                    raise ConnectionError("the client has closed its end")
                self._selector.set_mask(c, READ)
                return
            while not c.has_head():
                if c.buffer:
                    c.deadline = min(c.deadline, monotonic() + self.head_s)
                if not readable:
                    raise BlockingIOError
                data = c.sock.recv(MAX_HEAD)
                if not data:
                    raise ConnectionError("the client has closed its end")
                c.buffer += data
                readable = c.tls  # the selector reports the rest, but not what a TLS socket has already read
            self._selector.set_mask(c, 0)
            self._hold(c)
            if c.buffer.startswith(b"GET /health "):  # in this thread: it works while all others are busy
                self._leave(c)
                c.answer(self, False)
            else:
                self._ready.append(c)
        except OSError as e:
            mask = wait_mask(e, bool(c.pending))
            if mask:
                self._selector.set_mask(c, mask)
                self._hold(c)
            else:
                self._close(c)
        except Exception:  # noqa: BLE001  # a bug must not end the connections of others
            logger().exception("connection")
            self._close(c)

    def _start_requests(self) -> bool:
        """Start threads for connections that have a head. Return whether to call it again at once."""
        for _ in range(_STARTS):
            if not self._ready or not self.seats.acquire(blocking=False):
                return False
            connection = self._ready.popleft()
            if connection not in self._waiting:  # closed meanwhile
                self.seats.release()
                continue
            self._leave(connection)
            try:
                threading.Thread(target=connection.answer, args=(self, True), name="request", daemon=True).start()
            except RuntimeError as e:  # the system has no thread left
                logger().warning("request: %s", e)
                self.seats.release()
                connection.sock.close()
        return True

    def _scan(self, now: float) -> bool:
        """Accept again after a pause, and close connections after their deadline. Return whether to call it again."""
        self._selector.set_mask(self, READ)
        late = list(itertools.islice((c for c in self._waiting if c.deadline <= now), _BATCH))
        for c in late:
            if c.buffer and not (c.end or c.pending or c.closing):
                response = problem(Refused(408, "RequestTimeout", f"the head took more than {self.head_s:g} seconds"))
                with suppress(OSError):  # the client has disconnected, or reads nothing
                    c.sock.send(encode_head(response, Request("", "", 0, {}), True) + response.body)
            self._close(c)
        return len(late) == _BATCH

    def _hold(self, c: Connection) -> None:
        """Let c wait for its client, and count what it holds; if that is too much, close the oldest connections."""
        held = len(c.buffer) + len(c.pending)
        self._held += held - self._waiting.get(c, 0)
        self._waiting[c] = held
        while len(self._waiting) > MAX_CLIENTS or self._held > MAX_HELD:
            self._evict()

    def _evict(self) -> bool:
        """Close the connection that has waited longest. Return False if none waits."""
        oldest = next(iter(self._waiting), None)
        if oldest:
            self._close(oldest)
        return bool(oldest)

    def _leave(self, c: Connection) -> None:
        self._held -= self._waiting.pop(c, 0)
        self._selector.set_mask(c, 0)

    def _close(self, c: Connection) -> None:
        self._leave(c)
        c.sock.close()


# endregion 35
# ==============================================================================
# region 36. Client                                                    [uses 31]
# ==============================================================================
# The only HTTP client: it submits a build, follows its events over lost connections and downloads its archive.  The
# commands use it towards a server, and VmHost towards its VMs.  Neither is trusted: whatever they send is bounded in
# size and in time.  The client starts no thread; one thread at a time may use an ApiClient.

MAX_RESULT = 4 * GIB
RECONNECT_S = 300.0  # how long events() looks for a lost server
READ_TIMEOUT_S = 60.0  # four keepalives
MAX_ANSWER = 2 * MAX_JSON  # bytes received for a head and a small body, or for one read of a stream
MAX_SILENCE = MAX_JSON + BLOCK  # bytes of an event stream without an event; weeks of keepalives are fewer


def request_body(request: BuildRequest, archive: str | None) -> tuple[Iterator[bytes], int]:
    """Return the body of POST /build, in blocks, and its size in bytes. [CONTRACT 1.6]

    archive: the path of the source, which is never held in memory as a whole; None for a repository.
    """
    fields = {name: value for name, value in request._asdict().items() if value}
    if archive is None:
        text = json_bytes(fields)
        return iter([text]), len(text)
    fields["source_data"] = ""
    head, tail = json_bytes(fields)[:-2], b'"}'

    def blocks() -> Iterator[bytes]:
        yield head
        with open(archive, "rb") as f:
            for block in iter(lambda: f.read(3 * BLOCK), b""):
                yield base64.b64encode(block)
        yield tail

    return blocks(), len(head + tail) + -(-getsize(archive) // 3) * 4


class BrokenProtocol(RemoteError):
    """The server violated the protocol of the API."""

    def __init__(self, message: str) -> None:
        super().__init__(f"the server broke the protocol: {message}")


class ResultTooLarge(BrokenProtocol):
    """The archive has more than MAX_RESULT bytes."""


class BoundedReader(io.RawIOBase):
    """Raw stream of what a socket receives: at most MAX_ANSWER bytes in READ_TIMEOUT_S from one renew() to the next.

    Without these bounds http.client reads interim responses, trailers and a chunk of negative size for ever.
    """

    def __init__(self, sock: "socket.socket") -> None:
        self._socket = sock
        self._stream = sock.makefile("rb", buffering=0)
        self.ended = False
        self.renew()

    def renew(self) -> None:
        """Allow MAX_ANSWER bytes in READ_TIMEOUT_S, from now on."""
        self._left = MAX_ANSWER
        self._deadline = monotonic() + READ_TIMEOUT_S

    def readable(self) -> bool:
        """Return True, for BufferedReader."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive into buffer and return the number of bytes, 0 at the end. Raises BrokenProtocol, OSError."""
        remaining_s = self._deadline - monotonic()
        if remaining_s <= 0:
            raise TimeoutError("timed out")
        if self._left <= 0:
            raise BrokenProtocol(f"more than {MAX_ANSWER} bytes without an end")
        self._socket.settimeout(remaining_s)
        size = self._stream.readinto(buffer) or 0
        self._left -= size
        self.ended = size == 0
        return size

    def close(self) -> None:
        """Close the socket's stream."""
        self._stream.close()
        super().close()

    def makefile(self, _: str) -> IO[bytes]:
        """Return the buffered stream, for http.client, which takes this object for a socket."""
        return io.BufferedReader(self)


@contextmanager
def _reading(received: BoundedReader) -> Iterator[None]:
    """Raise what happens to http.client in the block, which reads from received.

    That is BrokenProtocol if the bytes are not HTTP, OSError if the connection is lost.
    """
    try:
        yield
    except OSError:
        raise
    except (http.client.HTTPException, ValueError) as e:  # ValueError: a chunk of negative size
        if received.ended:
            raise ConnectionError("the connection broke") from None
        raise BrokenProtocol(f"{type(e).__name__}: {str(e)[:200]}") from None


@functools.cache
def bounded_response() -> "type[http.client.HTTPResponse]":
    """Return the class of a response with bounds."""

    class Response(http.client.HTTPResponse):
        """Response that ends. Its methods raise BrokenProtocol, OSError."""

        def __init__(self, sock: "socket.socket", *arguments: Any, **named: Any) -> None:
            self._received = BoundedReader(sock)
            super().__init__(self._received, *arguments, **named)  # type: ignore[arg-type]  # it only calls makefile

        def begin(self) -> None:
            with _reading(self._received):
                super().begin()
            if self._received.ended:  # http.client would take that for the end of the head
                raise ConnectionError("the connection broke")

        def read(self, amt: int | None = None) -> bytes:
            with _reading(self._received):
                return super().read(amt)

        def read1(self, n: int = -1) -> bytes:
            self._received.renew()
            with _reading(self._received):
                return super().read1(n)

    return Response


def _build_opener(proxies: bool) -> "urllib.request.OpenerDirector":
    """Return an opener with bounded responses, which returns the response of any status.

    It follows no redirect: urllib would send the token to another host.
    proxies: use those of the environment.
    """

    class Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        """Opens http and https URLs, with such responses."""

        def do_open(self, http_class: Any, req: Any, **named: Any) -> Any:
            bounded: Any = type("Bounded", (http_class,), {"response_class": bounded_response()})
            return super().do_open(bounded, req, **named)

    opener = urllib.request.OpenerDirector()
    opener.add_handler(Handler())
    opener.add_handler(urllib.request.ProxyHandler(None if proxies else {}))
    return opener


def connect_over(sock: Any) -> "http.client.HTTPConnection":
    """Return a connection over sock, with bounded responses. It never opens another one."""
    connection = http.client.HTTPConnection("localhost")
    connection.auto_open = 0
    connection.response_class = bounded_response()
    connection.sock = sock
    return connection


class StreamEvent(NamedTuple):
    """One event of an event stream. id: the last event id; empty if the server has sent none."""

    data: str
    id: str


class EventStreamParser:
    """Incremental parser of an event stream. retry_s: the delay that the server asked for, or None. [SSE 9.2.6]"""

    _id = ""
    _silence = 0  # bytes since the last event
    _mark = b"\xef\xbb\xbf"  # may precede the next line: a byte order mark
    _after_cr = False
    retry_s: float | None = None

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[str] = []

    def feed(self, block: bytes) -> list[StreamEvent]:
        """Return the events that block completes; an empty line ends an event. Raises BrokenProtocol."""
        self._rest += block
        self._silence += len(block)
        if self._silence > MAX_SILENCE:
            raise BrokenProtocol(f"more than {MAX_SILENCE} bytes without an event")
        if self._after_cr and self._rest:  # CR LF is one end of a line
            self._after_cr = False
            self._rest = self._rest.removeprefix(b"\n")
        if b"\n" not in block and b"\r" not in block:  # a line may come byte by byte
            return []
        self._after_cr = self._rest.endswith(b"\r")
        lines = self._rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            line, self._mark = line.removeprefix(self._mark), b""
            name, _, value = line.decode("utf-8", "replace").partition(":")
            value = value.removeprefix(" ")
            if not line and self._data:
                events.append(StreamEvent("\n".join(self._data), self._id))
                self._data = []
                self._silence = 0
            elif name == "data":
                self._data.append(value)
            elif name == "id" and "\0" not in value:
                self._id = value
            elif name == "retry" and re.fullmatch("[0-9]{1,9}", value):
                self.retry_s = int(value) / 1000
        return events

    @property
    def idle(self) -> bool:
        """Whether everything that was fed belongs to events that were returned."""
        return not (self._rest or self._data or self._after_cr)


# Answers of the server, for check_schema. It may add keys [CONTRACT 1.3].
_STATUS = {"job_id": str, "status": str, "submitted_at": str, "...": object}
_ACCEPTED = {"job_id": re.compile(r"[0-9A-Za-z-]{1,64}"), "...": object}


# The frame of a `build` event, around its number and its message.
_BEFORE, _AFTER = "\ndata: " + BUILD_START, BUILD_END + "\n\n"
# One whose message may have escapes, those of surrogates in pairs.
_BUILD_EVENT = re.compile(
    r"""
    id:\ \d+\n data:\ \{"type":"build","msg":"
    (
        [ !\#-\[\]-~]*                                  # printable ASCII, no quotation mark, no backslash
        (?:
            \\ (?:
                ["\\/bfnrt]
                | u (?:
                    [0-9a-ce-f][0-9a-f]{3}              # a UTF-16 code unit that is not a surrogate
                    | d[0-7][0-9a-f]{2}
                    | d[89ab][0-9a-f]{2} \\ud[c-f][0-9a-f]{2}
                )
            )
            [ !\#-\[\]-~]*
        )*
    )
    "\}\n\n
    """,
    re.VERBOSE,
)


def find_build_messages(frames: str) -> list[str]:
    """Return the messages of frames, still escaped, if all of them are `build` events, else [].  frames: ASCII."""
    # Nearly every block is nothing but such frames without escapes. Its quotation marks and line ends show that: if
    # they are those of `count` frames, none can stand in a message. This is faster than the regular expression.
    *parts, rest = frames.split(_AFTER)
    count, marks = len(parts), frames.encode("ascii").translate(None, UNESCAPED)
    if not rest and marks == b'\n""""""""\n\n' * count and frames.count(_BEFORE) == count:
        return [part.rpartition('"')[2] for part in parts]
    messages = _BUILD_EVENT.findall(frames)
    return messages if frames.count("\n") == 3 * len(messages) else []


class ApiClient:
    """Client of a server of the API. Its methods raise RemoteError.

    url: of the server; http if it names no scheme.
    token: the bearer token; empty for none.
    notify: is called with each message for the user.
    """

    def __init__(self, url: str, token: str = "", notify: Callable[[str], None] = lambda _: None) -> None:
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else "http://" + url)
            host = parts.hostname or ""
            valid = url.isascii() and parts.scheme in ("http", "https") and parts.port != 0 and host
        except ValueError:  # brackets, or an invalid port
            valid = False
        if not valid:
            raise UsageError(f"--server {url!r}: expected an http or https URL")
        if parts.username is not None:
            raise UsageError("--server: the URL contains credentials", "--token-file FILE names a file with the token")
        self._url = parts.geturl().rstrip("/")
        self._token = token
        self._notify = notify
        self._opener = _build_opener(not (host in ("localhost", "::1") or host.startswith("127.")))

    def open(self, method: str, path: str, body: Any = None, headers: Strings | None = None) -> Any:
        """Return the response, which the caller closes. Raises RemoteError, with the status of an HTTP error."""
        try:
            response = self._send(method, path, body, dict(headers or {}))
        except (OSError, http.client.InvalidURL, UnicodeError) as e:
            reason = getattr(e, "reason", e)
            text = f"{self._url}: {getattr(reason, 'strerror', None) or reason}"
            causes = {
                "SSLCertVerificationError": "SSL_CERT_FILE=FILE names a file with the certificate to trust",
                "SSLError": "try http://",
                "RemoteDisconnected": "try https://",
                "ConnectionResetError": "try https://",
            }
            hint = causes.get(type(reason).__name__, "is `confbuild serve` running there?")
            raise RemoteError(text, hint=hint) from None
        status = response.status
        if 200 <= status < 300:
            return response
        with response:
            try:
                detail = str(parse_json(response.read(MIB), "answer")["detail"])
            except (Malformed, KeyError, TypeError, OSError):
                detail = f"{method} {path}: {response.reason}"
        refused = "the token was refused: " if self._token else ""
        hints = {
            401: refused + "--token-file FILE or CONFBUILD_TOKEN_FILE names the file with the token",
            413: "--max-archive MIB raises the limit, of a build here or of `confbuild serve`",
        }
        raise RemoteError(f"the server said {status}: {detail}", status, hints.get(status, ""))

    def _send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Any:
        """Return the response, of any status. Raises OSError."""
        request = urllib.request.Request(self._url + path, body, headers, method=method)
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        return self._opener.open(request, timeout=READ_TIMEOUT_S)

    def _ask(self, method: str, path: str, body: Any = None, headers: Strings | None = None) -> bytes:
        """Return the body of the answer, at most MAX_JSON + 1 bytes of it."""
        with self.open(method, path, body, headers) as answer:
            try:
                return bytes(answer.read(MAX_JSON + 1))
            except OSError as e:
                raise BrokenProtocol(f"{method} {path}: {e}") from None

    def json(self, method: str, path: str, schema: Any, body: Any = None, headers: Strings | None = None) -> Any:
        """Return the JSON of the answer, which must match schema: see check_schema."""
        try:
            return check_schema(parse_json(self._ask(method, path, body, headers), "answer"), schema, "answer")
        except Malformed as e:
            raise BrokenProtocol(f"{method} {path}: {e}") from None

    def jobs(self, method: str, path: str, several: bool = False) -> list[Json]:
        """Return the status of the job at path, or of several jobs."""
        found = self.json(method, path, [_STATUS] if several else _STATUS)
        return list(found) if several else [found]

    def attestation(self, nonce: str) -> bytes:
        """Return evidence.json of a VM that waits there for a build. nonce: 32 hexadecimal digits."""
        return self._ask("GET", f"/attestation?nonce={nonce}")

    def submit(self, request: BuildRequest, archive: str | None) -> str:
        """Return the id of the accepted job. archive: the path of the source, or None for a repository."""
        body, size = request_body(request, archive)
        headers = {"Content-Type": "application/json", "Content-Length": str(size)}
        return str(self.json("POST", "/build", _ACCEPTED, body, headers)["job_id"])

    def events(self, job_id: str, start: int = 0, submitted: bool = False) -> Iterator[Json | list[str]]:
        """Yield the events after the first `start`, each once, up to `complete`.

        Consecutive `build` events come as the list of their messages, still escaped: decoding each by itself would
        take ten times as long.
        After a lost connection, the stream is resumed where it broke. Attempts are repeated with exponential back-off
        and jitter, for RECONNECT_S. An error of the first attempt is raised unless the job was submitted just now.
        """
        position = start
        delay_s = 0.0
        retry_s = 0.25
        lost_at: float | None = None  # None: something has come since the last loss
        notified = False  # of this loss
        while True:
            path = f"/build/{job_id}/events?from={position}"
            try:
                with self.open("GET", path, headers={"Accept": "text/event-stream"}) as stream:
                    submitted = True
                    if stream.status == 204:
                        return
                    if stream.headers.get_content_type() != "text/event-stream":
                        raise BrokenProtocol(f"GET {path}: not an event stream")
                    parser, held = EventStreamParser(), b""
                    for block in iter(lambda stream=stream: stream.read1(BLOCK), b""):  # type: ignore[misc]
                        lost_at = None  # a comment is a sign of life, too
                        block = held + block
                        end = block.rfind(b"\n\n") + 2
                        if end < 2:  # no event ends here, except after CR
                            end = len(block) if b"\r" in block or len(block) > 4 * KIB else 0
                        block, held = block[:end], block[end:]
                        messages = _build_messages(block, position) if parser.idle else []
                        if messages:
                            position += len(messages)
                            delay_s, notified, block = 0.0, False, b""
                            yield messages
                        for event in parser.feed(block):
                            doc = _parse_event(event, position)
                            position += 1
                            delay_s, notified = 0.0, False
                            yield doc
                            if doc["type"] == "complete":
                                return
                        retry_s = parser.retry_s or retry_s
            except RemoteError as e:
                if 0 < e.status < 500 or isinstance(e, BrokenProtocol) or not submitted:
                    raise
            except OSError:
                pass  # the connection broke
            now = monotonic()
            lost_at = now if lost_at is None else lost_at
            if not notified:
                notified = True
                self._notify(f"the connection was lost after event {position}; resuming")
            if now - lost_at > RECONNECT_S:
                raise RemoteError(f"{self._url}: lost for {RECONNECT_S:.0f} s, after event {position}")
            delay_s = min(30.0, max(retry_s, 2 * delay_s))
            time.sleep(delay_s * (0.5 + secrets.randbelow(512) / 1024))

    def download(self, job_id: str, path: str) -> None:
        """Write the archive of a finished build to path. Raises ResultTooLarge; OSError if path cannot be written."""
        digest = hashlib.sha256()
        size = 0

        def read() -> bytes:
            try:
                return bytes(answer.read1(BLOCK))
            except OSError as e:
                raise RemoteError(f"the download broke off after {size} bytes: {e}") from None

        with self.open("GET", f"/build/{job_id}/result") as answer, open(path, "wb") as f:
            for block in iter(read, b""):
                f.write(block)
                digest.update(block)
                size += len(block)
                if size > MAX_RESULT:
                    raise ResultTooLarge(f"the result has more than {MAX_RESULT} bytes")
            headers = answer.headers
        announced = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", headers.get("Repr-Digest", ""))
        found = base64.b64encode(digest.digest()).decode("ascii")
        if headers.get("Content-Length", str(size)) != str(size) or announced and announced[1] != found:
            raise RemoteError(f"the download of {size} bytes is not what the server announced")


def _build_messages(block: bytes, position: int) -> list[str]:
    """Return the messages, still escaped, if block is exactly `build` events after the first position; else []."""
    frames = block.decode("ascii", "replace").replace("\ufffd", "")
    messages = find_build_messages(frames)
    whole = [f'id: {n}\ndata: {{"type":"build","msg":"{text}"}}\n\n' for n, text in enumerate(messages, position + 1)]
    return messages if "".join(whole).encode("ascii") == block else []


def _parse_event(event: StreamEvent, position: int) -> Json:
    """Return the object of the event after `position` events. Kettle's server sends no ids. Raises BrokenProtocol."""
    try:
        doc: dict[str, Any] = parse_json(event.data.encode("utf-8"), "event", 32)
        check_schema(doc, {"type": str, "...": object}, f"event {position + 1}")
    except (Malformed, UnicodeEncodeError) as e:
        raise BrokenProtocol(f"{e}") from None
    if event.id not in ("", str(position + 1)):
        raise BrokenProtocol(f"event {event.id[:20]} after event {position}")
    return doc


# endregion 36
# ==============================================================================
# region 37. Agent      [uses 8, 18, 19, 21, 22, 23, 24, 26, 28, 31, 32, 33, 35]
# ==============================================================================
# The program that runs inside a VM: the same API, single-use, with the pipeline behind it, over its standard input and
# output [CONTRACT 6.2].  It reads its configuration from the first line and lives until its input ends.  The fetcher is
# another child of the server that lives as long: it fetches a repository for a VM without a network.  The fork server
# is a copy of the server that starts both if VMs are simulated.
#
# Thread "lifeline": started by serve_agent and run_fetcher.  It ends the process when standard input ends: then the
# process that started this one is dead, or does not need it any more.
# Threads "copy": started by _connect, if standard input and output are not one socket; each copies one direction.

MAX_CONFIGURATION = 64 * KIB  # bytes of the first line
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The first line of the host, for check_schema. [CONTRACT 6.2]
_CONFIG = {
    "token": re.compile(r"[0-9A-Za-z_-]{16,64}"),
    "policy": dict.fromkeys(SourcePolicy._fields, object),
    "platform": tuple(BUILDERS),
    "network?": ("none", "open"),
    "vek?": (str, None),  # base64 of a certificate
    "env?": [str],
    # Only for processes on the host's own machine:
    "workspace?": str,
    "sandbox?": (dict, None),
    "cache?": (str, None),
    "repo_url?": str,
    "repo_ref?": str,
}


def read_config(read: Callable[[], bytes]) -> Json:
    """Return the configuration, a line of JSON in the form _CONFIG.

    read: returns the next byte, which the host chooses.
    Raises Malformed.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = read()
        line += byte
        if not byte or len(line) > MAX_CONFIGURATION:
            raise Malformed("configuration", f"expected a line of at most {MAX_CONFIGURATION} bytes")
    config = parse_json(bytes(line), "configuration", 8, surrogates="surrogatepass")
    return dict(check_schema(config, _CONFIG, "configuration"))


def _connect(end: Callable[[], None]) -> "socket.socket":
    """Return a socket whose other end is standard input and output; call end when it is closed."""

    class Stream(socket.socket):
        """Ends the agent, which has no other connection."""

        def close(self) -> None:
            super().close()
            end()

    def copy(source: int, sink: int) -> None:
        with survive("the stream is broken"):
            for block in iter(lambda: os.read(source, BLOCK), b""):
                while block:
                    block = block[os.write(sink, block) :]
        end()

    out, single = os.dup(1), os.path.samestat(os.fstat(0), os.fstat(1))
    os.dup2(2, 1)  # for whatever else this process prints
    if single and stat.S_ISSOCK(os.fstat(0).st_mode):
        os.close(out)
        return Stream(fileno=os.dup(0))
    ours, theirs = socket.socketpair()
    for ends in ((0, theirs.fileno()), (os.dup(theirs.fileno()), out)):
        threading.Thread(target=copy, args=ends, name="copy", daemon=True).start()
    theirs.detach()
    return Stream(fileno=ours.detach())


def _start_lifeline(end: Callable[[], None]) -> None:
    """Call end, in the thread "lifeline", when standard input ends."""

    def follow() -> None:
        with survive("cannot watch standard input"):
            poll = select.poll()
            poll.register(0, select.POLLRDHUP)
            poll.poll()
        end()

    threading.Thread(target=follow, name="lifeline", daemon=True).start()


def _answer_host(**answer: Any) -> None:
    """Write the answer to the host's first line.  [CONTRACT 6.2]"""
    os.write(1, json_bytes(answer) + b"\n")


def _kill_and_sweep(sweeper: list[str]) -> NoReturn:
    """Kill every process that this one has started, and become the command sweeper, which removes the workspace."""
    with survive("processes of a build may live on"):
        kill_all(lambda: descendants(os.getpid()))
    _wake_with_parent()
    # Ends the other threads, which may still write there.
    os.execv(sys.executable, sweeper)


def _wake_with_parent() -> None:
    """Let the kernel continue this process when its parent dies, in case it was stopped.  [prctl(2)]

    Vm.kill stops an agent before it kills it, and the server may die in between. The kernel sends the signal when the
    *thread* ends that started this process, and keeps this setting for the calling thread alone, and over execve(2).
    """
    system_call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)


def _start() -> tuple[Json, str, Callable[[], None]]:
    """Protect this process, and return its configuration, its workspace, and what ends it and removes that.

    The workspace is the current directory from now on, if possible at WORK.
    Raises Malformed, OSError.
    """
    config = read_config(lambda: os.read(0, 1))
    outside = config.get("workspace") or make_workspace()
    os.chdir(outside)
    os.umask(0o022)
    for folder in BUILD_FOLDERS:
        os.mkdir(folder, 0o700)
    sweeper = [*own_program(), "sweep", outside]
    own_source()  # WORK may hide this file; the argument after the code is what the sweeper loads
    env = build_environment(outside, os.environ, config.get("env", ()))
    folders = itertools.chain.from_iterable(value.split(os.pathsep) for value in env.values())
    local = [WORK] * (exists(WORK) and "file" in config["policy"]["schemes"])  # a repository could lie there
    readable = (config.get("sandbox") or {}).get("readable", ())
    needed = [sys.executable, sweeper[5], *folders, *local, *readable, config.get("cache") or "/"]
    workspace = show_workspace(outside, needed)
    guard_process()
    _wake_with_parent()  # then the lifeline ends it
    env = build_environment(workspace, os.environ, config.get("env", ()))
    os.environ.clear()
    os.environ.update(env)
    return config, workspace, functools.partial(_kill_and_sweep, sweeper)


def choose_attester(config: Json, get: Callable[[bytes], tuple[bytes, bytes | None]]) -> Attester:
    """Return the attester of a VM with this configuration: its hardware for the platform "snp", else none.

    get: returns (report, certificate table) for report data; raises NoAttester.
    Raises NoAttester if the hardware gives no report; simulated evidence never replaces it.
    """
    platform = config["platform"]
    names = filter(os.environ.__contains__, config.get("env", ()))
    byproducts = {f"env:{name}": sha256_hex(os.fsencode(os.environ[name])) for name in names}
    byproducts |= {"guest_network": sha256_hex(config["network"].encode("ascii"))} if "network" in config else {}
    if platform != "snp":
        return Attester(BUILDERS[platform], simulated_evidence, byproducts)
    given = None if config.get("vek") is None else decode_base64(config["vek"], "vek")
    byproducts["measurement"] = sha256_hex(parse_report(get(bytes(64))[0]).measurement)
    return Attester(BUILDERS[platform], lambda data: hardware_evidence(*get(data), platform, None, given), byproducts)


def serve_agent(
    config: Json, workspace: str, attester: Attester, end: Callable[[], None], cache: str | None = None
) -> None:
    """Answer the host, and serve the API of one build over standard input and output until they end.

    workspace: the directory of the build, with the folders that it writes in.
    end: ends this process; is called by several threads when the stream has ended.
    cache: as for run_pipeline.
    """
    _start_lifeline(end)
    policy = SourcePolicy(**config["policy"])
    streamer = Streamer(stall_s=float("inf"))  # the host may be suspended; if it is lost, the stream ends
    state = join(workspace, "agent")
    reserve = join(state, "reserve")

    def build(job: Job) -> str:
        log = job.live_log()
        max_log = shutil.disk_usage(state).free // 2  # the rest is for the final events

        def emit(phase: str, messages: Sequence[str]) -> None:
            if log.size > max_log:
                reason = f"the build's log has more than {max_log} bytes, half of the free disk of its VM"
                raise limit_error(reason)
            log.append(to_payloads(phase, messages))

        try:
            with open(reserve, "wb") as f:
                f.write(bytes(MIB))  # room for the final events, if the build fills the disk
            return run_pipeline(job.request, job.source, workspace, os.environ, policy, attester, emit, cache)
        except (BuildFailed, OSError) as e:
            if not lacks_room(e, workspace):
                raise
            for name in ("source", *BUILD_FOLDERS, "agent/bundle", "agent/result.tar.gz"):
                # In a guest the build's user owns its files; they fill another disk than the agent's.
                with suppress(OSError):
                    remove_tree(join(workspace, name))
            reason = f"the disk of the VM ({TMPDIR} or a guest's memory) is full: {getattr(e, 'strerror', e)}"
            raise limit_error(reason) from None
        finally:
            remove_tree(reserve)

    def attest(nonce: str) -> bytes:
        evidence = attester.attest(waiting_report_data(nonce))
        jobs.check_open()  # afterwards: the VM was still waiting when the evidence was made
        return evidence

    jobs = Jobs(state, build, streamer.grown, single_use=True)
    api = Api(jobs, policy, {}, attest)
    server = Server(None, api, AccessPolicy([], []), streamer)
    server.idle_s = server.scan_s = 1e6  # the host decides how long this VM waits
    jobs.start()
    _answer_host(agent=config["token"], version=__version__)
    server.take(Connection(_connect(end), "host", False, 0.0))
    server.serve_forever()


def run_agent() -> None:
    """Run the agent over standard input and output until they end.

    Then kill everything that the build has started, and remove the workspace.
    """
    config, workspace, end = _start()
    try:
        if config.get("sandbox"):
            confine_builds(Sandbox(**config["sandbox"]), workspace, ("source", *BUILD_FOLDERS))
        serve_agent(config, workspace, choose_attester(config, get_report), end, config.get("cache"))
    except ConfbuildError as e:
        logger().error("%s", e)  # now: end() does not return
    finally:
        end()


def run_fetcher() -> None:
    """Fetch a repository, and stay until standard input ends.

    The archive in the workspace, with a history of depth 1, is source.tar.gz. The answer to the host's first line has
    `name`, or `error` and `error_type`.
    """
    config, workspace, end = _start()
    _start_lifeline(end)
    policy = SourcePolicy(**config["policy"])
    name = repository_name(config["repo_url"])
    root, archive = join(workspace, name), join(workspace, "source.tar.gz")
    try:
        fetch_git(config["repo_url"], config["repo_ref"], root, os.environ, policy)
        write_source(archive, root, name)
        if getsize(archive) > policy.max_archive:
            raise limit_error(f"the repository packs to more than {policy.max_archive} bytes (--max-archive)")
        answer = {"name": name}
    except (BuildFailed, OSError) as e:
        reason = getattr(e, "strerror", str(e))
        answer = {"error": reason, "error_type": getattr(e, "error_type", "VmError")}
        if lacks_room(e, workspace):
            answer = {"error": f"the disk of {TMPDIR} is full: {reason}", "error_type": "LimitError"}
    _answer_host(agent=config["token"], **answer)
    threading.Event().wait()  # until the lifeline ends this process


class ForkedProcess(NamedTuple):
    """A child of this process that another one has forked. It has what Vm uses of subprocess.Popen."""

    pid: int
    stderr: IO[bytes] | None = None

    def wait(self) -> None:
        """Wait for its end, and reap it."""
        os.waitpid(self.pid, 0)


class ForkServer:
    """A copy of this process that forks agents and fetchers in 5 ms; starting Python with this file takes 0.1 s.

    Made by a child subreaper that has one thread, before it has secrets.
    """

    def __init__(self) -> None:
        for module in (email, gzip, selectors, subprocess, urllib):
            module.__spec__  # noqa: B018  # loads it, as every agent needs it
        own_source()  # of the code that agents run, and name in provenance, even if an upgrade replaces the file
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(10)
        with theirs:
            # An interrupt in a hook of fork(), such as that of the module logging, would be lost, and its lock kept.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                self._pid = os.fork()
                if self._pid == 0:
                    try:
                        self._serve(theirs)
                    finally:
                        os._exit(1)
            except OSError:
                self._socket.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def start(
        self, command: str, stream: "socket.socket", cwd: str, env: Strings, fds: Sequence[int]
    ) -> ForkedProcess | None:
        """Fork a process that runs command, with stream as its standard input and output.

        fds: file descriptors that it inherits.
        Return None if that fails, and from then on: whoever calls this can start the program instead.
        """
        request = json_bytes([command, cwd, dict(env), *fds])
        try:
            with self._lock:
                socket.send_fds(self._socket, [request], [stream.fileno(), *fds])
                return ForkedProcess(int(self._socket.recv(20)))
        except (OSError, ValueError):
            self._socket.close()  # a late answer must not be taken for the next one
            return None

    def stop(self) -> None:
        """End it. What it has forked lives on."""
        self._socket.close()
        with suppress(ChildProcessError):  # it has died before, and VmPool has reaped it
            os.waitpid(self._pid, 0)

    def _serve(self, requests: "socket.socket") -> None:
        """Fork what the other end of requests asks for, until it closes that."""
        os.setsid()  # Ctrl-C is not for this process
        _keep_only(requests.fileno())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        while True:
            request, fds, *_ = socket.recv_fds(requests, MIB, 2)
            if not request:
                os._exit(0)
            answer, written = os.pipe()
            # The process in between ends at once, so that the server, which is a subreaper, becomes the parent.
            between = os.fork()
            if between == 0:
                pid = os.fork()
                if pid == 0:
                    self._become(fds, *json.loads(request))
                os.write(written, b"%d" % pid)
                os._exit(0)
            os.waitpid(between, 0)
            for fd in (written, *fds):
                os.close(fd)
            requests.send(os.read(answer, 20))
            os.close(answer)

    @staticmethod
    def _become(fds: Sequence[int], command: str, cwd: str, env: dict[str, str], *numbers: int) -> NoReturn:
        """Run command with these file descriptors: its standard input and output, then those with these numbers."""
        os.setsid()
        for fd, number in zip((fds[0], *fds), (0, 1, *numbers), strict=True):
            os.dup2(fd, number)
        _keep_only(*numbers)
        logger().setLevel(logging.WARNING)
        with survive(f"the {command} ends"):
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(env)
            system_call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # for show_workspace
            {"agent": run_agent, "fetcher": run_fetcher}[command]()
        os._exit(1)


def fork_server() -> ForkServer | None:
    """Return a new fork server, or None if there can be none, as in a process with several threads.

    The copy of such a process would have one of the threads, but the locks of all.  [fork(2)]
    """
    with suppress(OSError):
        return ForkServer() if threading.active_count() == 1 else None
    return None


def _keep_only(*fds: int) -> None:
    """Close all file descriptors but these and the standard ones."""
    for before, after in itertools.pairwise([2, *fds, 1 << 20]):
        os.closerange(before + 1, after)


# endregion 37
# ==============================================================================
# region 38. VMs       [uses 17, 18, 19, 21, 22, 27, 28, 30, 31, 32, 33, 36, 37]
# ==============================================================================
# The server never runs a build.  A VM does: a process whose standard input and output reach an agent, anywhere, which
# answers the API over that one stream, one request after the other.  Kinds of VM differ in how they are started, which
# is a VmKind: the simulated VM is a child process of this same file with a session and a workspace of its own, whose
# builds run as the server's user, in a sandbox that protects the server as far as its kernel can; another one is
# whatever an operator's command starts.  Neither the process nor what it reaches is trusted: only evidence tells what
# kind of VM made a bundle [CONTRACT 6.4].
#
# VmPool boots VMs and destroys them; VmHost runs jobs in them.  Whatever a VM sends is checked: its events, its
# failures, its bundle.  A VM costs this process one stream and no thread.
#
# Thread "spares", started by VmPool.start: boots the VMs that wait for a build, and keeps their streams alive; it ends
# by VmPool.stop.  No exception ends it.
# A VM dies with the *thread* that spawned it, which is "spares" or a slot of Jobs: both live as long as the server.
# Lock order: VmPool._changed or _spawning, then Vm._lock.

MAX_LOG = 4 * GIB  # of one job; 10^7 lines of 80 characters have 1.2 GB
MAX_WAITING = 32  # requests at a time that wait for a VM: each holds a thread of the server
MAX_EVENT = 2 * MIB
MAX_CONSOLE = MIB  # bytes of a VM's console that are kept
LAST_LINES = 8  # of the console, in an error message
GRACE_S, CLEAN_UP_S = 5.0, 60.0  # for a VM to end after its build, and for its clean-up
# Terminal sequences, whatever else could control a terminal, and a warning that an emulator prints a dozen times.
_CONSOLE_NOISE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[^ -~]|^.*: warning: TCG doesn't support requested feature.*")
FETCH = "fetch"  # in place of a job's id: the process is not a VM, but fetches a repository for one
_HOST_PHASES = PHASES[:2]  # events that only the server emits: queued and vm
_HOST_FAILURES = frozenset(("TimeoutError", "Cancelled", "VmError"))  # of FAILURES: those that only the server finds


class Platform(NamedTuple):
    """The evidence that a kind of VM gives; each is one row.

    name: in GET /config and in the agent's configuration; a key of BUILDERS.
    greeting: the comment at the head of each event stream; empty for none. [CONTRACT 1.7]
    notice: the notice of GET /config; empty for none. [CONTRACT 1.13]
    label: the start of its `vm` events; empty if only failures are reported. [CONTRACT 1.8]
    confidential: its evidence must come from hardware, and match the facts that the server gives to expectations().
    boot_timeout_s: the default time limit for its start.
    """

    name: str
    greeting: str = ""
    notice: str = ""
    label: str = ""
    confidential: bool = False
    boot_timeout_s: float = GUEST_BOOT_TIMEOUT_S

    def expectations(self, facts: ImageFacts | None) -> Expectations:
        """Return what a server requires of the bundles of its own VMs. facts: about what they boot."""
        tee = self.confidential
        return Expectations(builder_id=BUILDERS[self.name], image=facts if tee else None, require_tee=tee)


SIMULATED_PLATFORM = Platform(
    "simulated",
    "simulated VM: not confidential; the evidence is signed by no hardware",
    SIMULATED_NOTICE,
    boot_timeout_s=BOOT_TIMEOUT_S,
)
SNP_PLATFORM = Platform("snp", label="SEV-SNP guest", confidential=True)


class VmStart(NamedTuple):
    """How the process of a VM is started, whose standard input and output reach the agent.

    config: the agent's configuration besides the token and the platform.
    cwd: the current directory; None for this process's.
    fds: file descriptors that it inherits.
    foreign: it is not this program: its standard error is the VM's console, and the kernel kills it with this process.
    fork: starts it in another way, with its stream as standard input and output; returns None if it cannot.
    """

    argv: Sequence[str]
    env: Strings
    config: Json
    cwd: str | None = None
    fds: Sequence[int] = ()
    foreign: bool = True
    fork: "Callable[[socket.socket], ForkedProcess | None]" = lambda stream: None


class VmKind(NamedTuple):
    """A kind of VM. They differ in how they are started, and in nothing else.

    networked: whether it can fetch a repository.
    start: returns how one is started; called with its workspace and the id of its job.
    clean_up: starts the process that removes what a VM has left elsewhere, given its name and job; None for nothing.
    folder: the directory of the workspaces; empty for TMPDIR.
    grace_s: time that one gets to end by itself after a build.
    """

    platform: Platform
    networked: bool
    start: Callable[[str, str], VmStart]
    clean_up: "Callable[[str, str], subprocess.Popen[bytes] | None]" = lambda name, job: None
    folder: str = ""
    grace_s: float = 0.0


def own_vms(
    command: str,
    told: Json,
    env: Sequence[str] = (),
    sandbox: Callable[[], Sandbox | None] = lambda: None,
    forks: ForkServer | None = None,
) -> VmKind:
    """Return the kind of VM that is a child process of this same file, which stands in for a confidential VM.

    command: `agent`; or `fetcher`, which is not a VM, but fetches a repository for one without a network.
    told: its configuration.
    env: more names of the server's environment that a build may see.
    sandbox: returns that of the programs that a build runs; None for none.
    forks: starts them, if it can.
    """

    def start(workspace: str, _: str) -> VmStart:
        box = sandbox()
        config = {**told, "env": list(env), "sandbox": box and box._asdict(), "workspace": workspace}
        fds = () if box is None or box.ports < 0 else (box.ports,)
        own_env = build_environment(workspace, os.environ, env)

        def fork(stream: "socket.socket") -> ForkedProcess | None:
            return forks.start(command, stream, workspace, own_env, fds) if forks else None

        return VmStart([*own_program(), command], own_env, config, workspace, fds, foreign=False, fork=fork)

    return VmKind(SIMULATED_PLATFORM, True, start)


def command_vms(command: str, cleanup: str, platform: Platform, config: Json, folder: str, more: Strings) -> VmKind:
    """Return the kind of VM that an operator's command starts anywhere.  [CONTRACT 6.1]

    command, cleanup: arguments, quoted as for a shell; cleanup may be empty.
    folder: keeps the name of each VM, so that the next server can clean up if this one is killed.
    more: environment variables of both.
    """

    def fill(text: str, name: str, job: str) -> tuple[list[str], dict[str, str]]:
        words = [word.replace("{name}", name).replace("{job}", job) for word in shlex.split(text)]
        return words, {**os.environ, **more, "CONFBUILD_NAME": name, "CONFBUILD_JOB": job}

    def start(workspace: str, job: str) -> VmStart:
        return VmStart(*fill(command, basename(workspace), job), config)

    def clean_up(name: str, job: str) -> "subprocess.Popen[bytes] | None":
        argv, env = fill(cleanup, name, job)
        return (
            subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if argv
            else None
        )

    return VmKind(platform, True, start, clean_up, folder, GRACE_S)


def _bound_to_parent() -> Callable[[], None]:
    """Return a function for the child between fork and exec: it binds its life to its parent's and forbids core files.

    Everything is looked up here, before the fork: after it, a lock of another thread would stay locked.
    """
    prctl, set_limit, core = _libc().prctl, resource.setrlimit, resource.RLIMIT_CORE
    parent, kill = os.getpid(), int(signal.SIGKILL)

    def bind() -> None:
        set_limit(core, (0, 0))
        prctl(_PR_SET_PDEATHSIG, kill, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return bind


class VmStream:
    """The host's end of the stream to an agent, which http.client takes for a socket; reads the console as well.

    deadline, build_s: when operations raise BuildFailed TimeoutError, by the monotonic clock, and the limit to name.
    """

    console = b""  # the last MAX_CONSOLE bytes
    errors: IO[bytes] | None = None  # where the console comes from, if there is one
    over = False  # nothing will be received

    def __init__(self, sock: "socket.socket") -> None:
        self.deadline, self.build_s = float("inf"), 0.0
        self.used_at = monotonic()
        self._sock = sock
        self._timeout_s = READ_TIMEOUT_S
        weakref.finalize(self, sock.close)  # not sooner: another thread may wait in poll(2)

    def makefile(self, *_: Any, **__: Any) -> "VmStream":
        """Return this stream, for http.client."""
        return self

    def settimeout(self, timeout_s: float) -> None:
        """Limit the silence that the next readinto() accepts."""
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Leave the stream open: http.client calls this after each response."""

    def shut(self, how: int) -> None:
        """Shut down one direction or both, as socket.shutdown does; this wakes a thread that waits."""
        self.over |= how == socket.SHUT_RDWR
        with suppress(OSError):
            self._sock.shutdown(how)

    def readinto(self, buffer: Any) -> int:
        """Receive into buffer and return the number of bytes, 0 at the end. Raises OSError, BuildFailed."""
        until = monotonic() + self._timeout_s
        while not self.over:
            try:
                size = self._sock.recv_into(buffer, 0, socket.MSG_DONTWAIT)
                self.used_at = monotonic()
                return size
            except BlockingIOError:
                pass
            except ConnectionError:  # it has ended without reading everything
                break
            self._await(until, select.POLLIN)
        return 0

    def sendall(self, data: Any) -> None:
        """Send data. Raises OSError, BuildFailed."""
        until, rest = monotonic() + READ_TIMEOUT_S, memoryview(data)
        while rest:
            with suppress(BlockingIOError):
                rest = rest[self._sock.send(rest, socket.MSG_DONTWAIT) :]
                continue
            self._await(until, select.POLLOUT)

    def _await(self, until: float, events: int) -> None:
        """Wait as wait() does. Raises TimeoutError after until, and BuildFailed after the deadline.

        Not if this process was suspended, and there was something to read: then this is not called.
        """
        if monotonic() >= self.deadline:
            raise BuildFailed("TimeoutError", f"the build took longer than {self.build_s:g} s")
        if monotonic() >= until:
            raise TimeoutError(f"silent for {READ_TIMEOUT_S:.0f} s")
        self.wait(min(until, self.deadline), events)

    def wait(self, until: float, events: int = 0) -> None:
        """Wait until the time until, or until the console has more, which is read.

        events: of poll(2); or until the stream has one of them. The end of the stream, also by shut(), is any of them.
        """
        poll = select.poll()
        if events:
            poll.register(self._sock, events)
        if self.errors:
            poll.register(self.errors, select.POLLIN)
        ready = dict(poll.poll(max(0.0, min(until - monotonic(), 1e6)) * 1000))
        if self.errors and self.errors.fileno() in ready:
            block = os.read(self.errors.fileno(), BLOCK)
            self.console = (self.console + block)[-MAX_CONSOLE:]
            if not block:
                self.errors.close()
                self.errors = None


class VmClient(ApiClient):
    """Client of the agent at the other end of stream, its one connection: one request after the other."""

    def __init__(self, stream: VmStream) -> None:
        super().__init__("http://vm")
        self._connection = connect_over(stream)  # it has the methods that are called

    def _send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Any:
        try:
            self._connection.request(method, path, body, headers)
            return self._connection.getresponse()
        except http.client.HTTPException as e:  # the last response has not ended, or ended the stream
            raise BrokenProtocol(f"{type(e).__name__}: {e}") from None

    def check(self) -> None:
        """Ask whether the agent lives, which also keeps the stream alive. Raises RemoteError."""
        self._ask("GET", "/health")


class Vm:
    """A VM that runs one build: a process with a workspace, whose standard input and output reach an agent.

    [CONTRACT 6.3]

    job: the id of its job; `spare` if it is started before there is one; FETCH for a fetcher, which metrics leave out.
    Raises BuildFailed VmError, or LimitError if the disk is full.
    """

    ready = False
    used = False  # by a job
    console_log = ""  # the path that gets its console when it is destroyed; empty for none

    def __init__(self, kind: VmKind, job: str = "spare") -> None:
        self.kind = kind
        self.job = job
        self.name = WORKSPACE + secrets.token_hex(8)
        self._disk = STATE if kind.folder else TMPDIR
        try:
            with room_on(self._disk):
                if kind.folder:
                    self.workspace = join(realpath(kind.folder), self.name)  # empty once it is removed
                    os.mkdir(self.workspace, 0o700)
                    with open(join(self.workspace, "job"), "w", encoding="ascii") as f:
                        f.write(job)
                else:
                    self.workspace = make_workspace()
                self._folder = os.open(self.workspace, os.O_RDONLY)
        except OSError as e:
            raise vm_error(f"cannot make a workspace for the VM: {e.strerror}") from None
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | ForkedProcess | None = None  # guarded by _lock
        ours, self._theirs = socket.socketpair()
        self.stream = VmStream(ours)
        self.client = VmClient(self.stream)
        self._token = secrets.token_urlsafe(32)

    def spawn(self) -> int:
        """Start the process and return its id.

        Only for a thread that lives as long as the VM may: the kernel signals a child when the thread ends that
        started it (prctl(2), PR_SET_PDEATHSIG).
        Raises BuildFailed VmError, or LimitError if the disk is full.
        """
        with self._lock:
            if self.stream.over:
                raise vm_error("the VM was destroyed before it was started")
            count("confbuild_vms_started_total", self.job != FETCH)  # now: one that cannot be started is lost
            try:
                with room_on(self._disk), self._theirs as theirs:
                    start = self.kind.start(self.workspace, self.job)
                    line = compact_json({"token": self._token, "platform": self.kind.platform.name, **start.config})
                    if len(line) >= MAX_CONFIGURATION:
                        raise ValueError(f"its configuration has more than {MAX_CONFIGURATION} bytes")
                    # It is assigned here, so that destroy kills it whatever follows.
                    self._child = child = start.fork(theirs) or subprocess.Popen(
                        start.argv,
                        stdin=theirs.fileno(),
                        stdout=theirs.fileno(),
                        stderr=subprocess.PIPE if start.foreign else None,
                        cwd=start.cwd,
                        env=start.env,
                        start_new_session=True,
                        pass_fds=start.fds,
                        preexec_fn=_bound_to_parent() if start.foreign else None,
                    )
                    if child.stderr:
                        self.stream.errors = child.stderr
                        weakref.finalize(self.stream, child.stderr.close)
            except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as e:
                raise vm_error(f"the VM cannot be started: {e}") from None
            with suppress(OSError):  # it has ended, and greet() says so
                self.stream.sendall(line.encode("ascii") + b"\n")  # fits into the socket's buffer
            return int(child.pid)

    def greet(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the answer to the first line, and return it. What comes before is noise.  [CONTRACT 6.2]

        Raises BuildFailed VmError, or LimitError if the VM has ended and the disk is full.
        """
        expected = f'{{"agent":"{self._token}"'.encode("ascii")
        until, block, received, answer = monotonic() + timeout_s, bytearray(KIB), b"", None
        while not answer:  # after it, the agent says nothing until it is asked
            self.stream.settimeout(max(0.0, until - monotonic()))
            try:
                size = self.stream.readinto(block)
            except TimeoutError:
                said = f": it sent {len(received)} bytes, but not the agent's answer" if received else ""
                raise vm_error(f"the VM did not boot within {timeout_s:g} s{said}") from None
            if not size:
                raise (
                    vm_error("the VM ended while it booted")
                    if has_room(self.workspace)
                    else limit_error(f"the disk of {self._disk} is full")
                )
            received += block[:size]
            if len(received) > MAX_LINE:
                raise vm_error(f"the VM sent {MAX_LINE} bytes without the agent's answer")
            answer = re.search(re.escape(expected) + rb".*\n", received)
        if answer.end() < len(received):
            raise vm_error("the VM sent more than the agent's answer before it was asked")
        self.ready = True
        if self.job != FETCH:
            observe("confbuild_boot_seconds", timeout_s - until + monotonic())
        return dict(parse_json(answer[0], "answer of the VM", 8))

    def is_alive(self) -> bool:
        """Return whether the process may still answer. It is not reaped, so no other process can get its id."""
        with self._lock:
            try:
                options = os.WEXITED | os.WNOHANG | os.WNOWAIT
                return self._child is not None and os.waitid(os.P_PID, self._child.pid, options) is None
            except ChildProcessError:
                return False  # another thread has reaped it

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise BuildFailed VmError, with the last lines of the console, for what the VM does wrong in the block."""
        try:
            yield
        except (OSError, ValueError, RemoteError, BuildFailed) as e:
            if isinstance(e, BuildFailed) and e.error_type != "VmError":
                raise
            text = str(e) if isinstance(e, BuildFailed) else f"the VM failed: {str(e) or type(e).__name__}"
            self.kill()
            self._read_console()
            console = self.stream.console.decode("utf-8", "replace").split("\n")
            lines = [_CONSOLE_NOISE.sub("", line.replace("\t", " "))[:400].strip() for line in console]
            shown = " | ".join([line for line in lines if line][-LAST_LINES:])
            raise vm_error(f"{text}; last lines of the console: {shown}" if shown else text) from None

    def _read_console(self) -> None:
        """Read the console of a process that has been killed to its end, for at most a second."""
        until = monotonic() + 1
        while self.stream.errors and monotonic() < until:
            self.stream.wait(until)

    def kill(self) -> None:
        """End the VM and everything that it has started. For any thread, any number of times."""
        with self._lock:
            if self._child:
                pid = self._child.pid  # of no other process until destroy() reaps it
                with survive("processes of a build may live on"):
                    os.kill(pid, signal.SIGSTOP)  # so that it starts nothing more, not even the sweeper
                    kill_all(lambda: descendants(pid))
                os.kill(pid, signal.SIGKILL)
            self.stream.shut(socket.SHUT_RDWR)

    def destroy(self, clean_up: Callable[[], None] = lambda: None) -> None:
        """End the VM, and remove its workspace. Any number of times, for one thread at a time.

        If it lives, it gets some time to end by itself; then it is killed.
        clean_up: is called in between: while there is a workspace, the next server would clean up.
        """
        if self.kind.grace_s:
            self.stream.shut(socket.SHUT_WR)
        until = monotonic() + self.kind.grace_s
        while self.is_alive() and monotonic() < until:
            self.stream.wait(0)
            time.sleep(0.01)
        self.kill()
        with self._lock:
            child, self._child = self._child, None
        if child:
            child.wait()
            self._read_console()
            if self.console_log and self.stream.console:
                with survive(f"{self.console_log} is not written"), open(self.console_log, "wb") as f:
                    f.write(self.stream.console)
        self._theirs.close()
        if self.workspace:
            clean_up()
            with survive(f"cannot remove {self.workspace}"):
                # The agent may have removed it, or have begun to. Then this name may be that of another VM's folder.
                remove_workspace(os.readlink(f"/proc/self/fd/{self._folder}"))
                os.close(self._folder)
                self.workspace = ""


class VmPool:
    """The VMs of a server: boots and destroys them, and keeps some that wait for a build.

    make_vm: makes a VM that is not started, for the id of a job or for nobody yet.
    reap: this process is a child subreaper whose only children are VMs; any other is what a VM has left behind.
    warm: how many VMs wait for a build.
    """

    single_use = False  # there is one build: nobody needs a VM in place of the one that it takes

    def __init__(
        self, make_vm: Callable[..., Vm], boot_timeout_s: float = BOOT_TIMEOUT_S, reap: bool = False, warm: int = 0
    ) -> None:
        tempfile.gettempdir()  # looked up while there is room: on a full disk it raises another error
        self._make_vm = make_vm
        self._boot_timeout_s = boot_timeout_s
        self._reap = reap
        self._warm = warm  # guarded by _changed
        self._spawning = threading.Lock()
        self._alive: dict[Vm, int] = {}  # guarded by _spawning; VMs, with the ids of their processes or clean-ups
        self._foreign = frozenset(descendants(os.getpid()))  # of what exec'ed this program
        self._changed = threading.Condition()
        self._spares: list[Vm] = []  # guarded by _changed; ready, and not taken
        self._booting: Vm | None = None  # guarded by _changed; the next spare
        self._waiting = 0  # guarded by _changed; requests that wait for a spare, whatever warm is, and at most one job
        self._failures = 0  # guarded by _changed; spares that did not boot
        self._failure = ""  # guarded by _changed; why the last one did not
        self._stopping = False  # guarded by _changed
        self._thread = threading.Thread(target=self._keep_spares, name="spares", daemon=True)

    def start(self) -> None:
        """Begin to keep spares."""
        self._thread.start()

    def stop(self) -> None:
        """Destroy the spares, and make no more."""
        with self._changed:
            self._stopping = True
            spares, self._spares, booting = self._spares, list[Vm](), self._booting
            self._changed.notify_all()
        if booting:
            booting.kill()
        with concurrent.futures.ThreadPoolExecutor(64) as workers:  # at a time: each may take CLEAN_UP_S
            list(workers.map(self.destroy, spares))
        with suppress(RuntimeError):  # Ctrl-C came before start()
            self._thread.join(self._boot_timeout_s)

    def boot(self, vm: Vm, timeout_s: float = 0.0) -> dict[str, Any]:
        """Start vm, and return its answer. timeout_s: 0: that for booting. Raises BuildFailed."""
        with self._spawning:
            self._alive[vm] = vm.spawn()
        return vm.greet(timeout_s or self._boot_timeout_s)

    def destroy(self, vm: Vm) -> None:
        """Destroy vm, and kill what it has left behind, here and elsewhere."""

        @survive("what a VM has left behind elsewhere may live on")
        def clean_up() -> None:
            with self._spawning:
                cleaner = vm.kind.clean_up(vm.name, vm.job)
                self._alive[vm] = cleaner.pid if cleaner else 0  # the VM itself is dead
            finish_cleaning(cleaner)

        with survive("a VM is not destroyed"):
            vm.destroy(clean_up)
        with survive("what a VM has left behind may live on"):
            if self._reap and vm.used:  # not while a local `build` packs its source: git is no stray
                self._kill_strays()
        with self._spawning:
            self._alive.pop(vm, None)

    def _kill_strays(self) -> None:
        """Kill processes that outlived their VM's agent, which happens only if the build has killed the agent."""

        def strays(dead: bool = False) -> list[int]:
            with self._spawning:
                # One look: what a VM starts between two would be taken for a stray. Its processes are not ours.
                return descendants(os.getpid(), dead, set(self._alive.values()) | self._foreign)

        kill_all(strays)
        for pid in strays(dead=True):  # what was killed here, or lost its parent before, is our child now
            with suppress(ChildProcessError):  # its own parent reaps it
                os.waitpid(pid, os.WNOHANG)

    def _lacks_spares_locked(self) -> bool:  # caller must hold _changed
        return len(self._spares) < max(self._warm, min(self._waiting, 1))

    def _keep_spares(self) -> None:
        """Run the thread "spares"."""
        going = True
        while going:
            try:
                going = self._tend_spares()
            except Exception as e:  # noqa: BLE001  # a full disk, no more threads: whatever it is, this thread goes on
                with self._changed:
                    self._failures, self._failure = self._failures + 1, str(e) or type(e).__name__
                    if not self._stopping:
                        logger().error("no VM waits for a build: %s", self._failure)
                        count("confbuild_vms_lost_total")
                    self._changed.notify_all()
                    going = not self._changed.wait_for(lambda: self._stopping, RETRY_S)

    def _tend_spares(self) -> bool:
        """Look after the spares, and boot another one if it is wanted. Return False if this stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._lacks_spares_locked(), 1.0)
            if self._stopping:
                return False
            due = [vm for vm in self._spares if not vm.is_alive() or vm.stream.used_at < monotonic() - KEEPALIVE_S]
            self._spares = [vm for vm in self._spares if vm not in due]
            wanted = not due and self._lacks_spares_locked()
        for vm in due:
            try:
                vm.client.check()
            except RemoteError:
                logger().warning("a VM that waited for a build has ended")
                count("confbuild_vms_lost_total")
                self.destroy(vm)
            else:
                self._put_back(vm)
        if wanted:
            self._add_spare()
        return True

    def _add_spare(self) -> None:
        """Boot one more spare, unless this stops meanwhile."""
        vm = self._make_vm()
        try:
            with self._changed:
                self._booting = vm
                if self._stopping:
                    vm.kill()
            with vm.explained():
                self.boot(vm)
        finally:
            with self._changed:
                self._booting = None
            self._put_back(vm)

    def _put_back(self, vm: Vm) -> None:
        """Let vm wait for a build if it is ready and alive, else destroy it."""
        kept = False
        try:
            with self._changed:
                kept = vm.ready and vm.is_alive() and not self._stopping
                if kept:
                    self._spares.append(vm)
                    self._changed.notify_all()
        finally:
            if not kept:
                self.destroy(vm)

    def take(self, job: str, is_halted: Callable[[], bool] = lambda: False) -> Vm:
        """Return a VM that no other caller gets: one that is ready, or a new one, for this job. Raises BuildFailed."""
        with self._changed:
            if not self._waiting:  # else a new one is ready sooner than the spare after this one
                self._waiting += 1
                while self._booting and not self._spares and not is_halted():  # it is ready sooner than a new one
                    self._changed.wait(0.05)
                self._waiting -= 1
            vm = next((vm for vm in self._spares if vm.is_alive()), None)
            if vm:
                self._spares.remove(vm)
            self._warm *= not self.single_use
            self._changed.notify_all()
        return vm or self._make_vm(job)

    def _await_spare(self) -> Vm:
        """Return a VM that waits for a build, and take it; boot one if none does. Raises BuildFailed VmError."""
        with self._changed:
            if self._waiting == MAX_WAITING:
                raise vm_error(f"{MAX_WAITING} other requests wait for a VM")
            before, limit = self._failures, self._boot_timeout_s + RETRY_S
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._spares or self._failures > before or self._stopping, limit)
            self._waiting -= 1
            if self._spares and not self._stopping:
                return self._spares.pop(0)
            raise vm_error(self._failure if self._failures > before else "no VM is ready")

    def attestation(self, nonce: str) -> bytes:
        """Return evidence.json of a VM that waits or is booted. nonce: 32 hexadecimal digits. Raises BuildFailed."""
        left = MAX_ATTEMPTS
        while True:
            left -= 1
            vm = self._await_spare()
            try:
                evidence = vm.client.attestation(nonce)
                parse_json(evidence, "evidence of the VM")
            except (RemoteError, Malformed) as e:
                lost = not vm.is_alive()
                count("confbuild_vms_lost_total")
                self.destroy(vm)
                if not lost or not left:
                    error_type = "AttestationError" if getattr(e, "status", 0) else "VmError"
                    raise BuildFailed(error_type, f"the VM does not attest: {e}") from None
            else:
                self._put_back(vm)
                return evidence


class VmHost(NamedTuple):
    """Runs jobs in VMs, each in a fresh one.

    make_fetcher: makes the process that fetches a repository (URL, ref) for a VM without a network.
    expected: what every bundle must fulfil, besides the job's nonce.
    """

    pool: VmPool
    make_fetcher: Callable[[str, str], Vm]
    build_timeout_s: float = BUILD_TIMEOUT_S
    expected: Expectations = Expectations()

    def run(self, job: Job) -> str:
        """Build the job in a VM and return the path of its verified archive. Raises BuildFailed.

        job.afterwards destroys a VM that gets time to end: nobody who waits for the end of the build waits for that.
        A VM that fails before its first `build` event is replaced, twice at most.
        """
        request, source, log = job.request, job.source, job.live_log()
        current, halted, deadline = list[Vm](), threading.Event(), float("inf")

        def halt() -> None:
            halted.set()
            for vm in current:
                vm.kill()

        def use(vm: Vm) -> Vm:
            """Let halt() kill vm, which is not started yet, at any time from now on."""

            def destroy() -> None:
                if vm.workspace:  # it may be gone already
                    self.pool.destroy(vm)

            current.append(vm)
            job.afterwards.callback(destroy)
            vm.used, vm.stream.build_s = True, self.build_timeout_s
            job.when_halted(halt)  # at once if it has been
            return vm

        attempt = 0
        job.when_halted(halt)
        while True:
            attempt += 1
            vm = use(self.pool.take(job.id, halted.is_set))
            try:
                if not source and not vm.kind.networked:
                    self._tell(log, vm, f"fetching {request.repo_url}: the guest has no network")
                    fetcher = use(self.make_fetcher(request.repo_url, request.repo_ref))
                    deadline = fetcher.stream.deadline = monotonic() + self.build_timeout_s
                    with fetcher.explained():
                        answer = self.pool.boot(fetcher, self.build_timeout_s)
                    if "name" not in answer:
                        raise BuildFailed(answer.get("error_type", "VmError"), answer["error"])
                    request = request._replace(repo_url="", repo_ref="", source_name=answer["name"] + ".tar.gz")
                    source = join(fetcher.workspace, "source.tar.gz")
                with vm.explained():
                    vm.console_log = job.path("console.log")
                    if not vm.ready:
                        self._tell(log, vm, "booting")
                        self.pool.boot(vm)
                    self._tell(log, vm, "ready")
                    deadline = vm.stream.deadline = min(deadline, monotonic() + self.build_timeout_s)
                    return self._drive(vm, job, request, source)
            except BuildFailed as e:
                last = halted.is_set() or attempt == MAX_ATTEMPTS or e.error_type != "VmError"
                if last or PHASES.index(log.last().get("type", "vm")) >= PHASES.index("build"):
                    raise
                count("confbuild_vms_lost_total")
                self._tell(log, vm, f"attempt {attempt} of {MAX_ATTEMPTS} failed: {e}", always=True)
                self.pool.destroy(vm)
            finally:
                if not vm.kind.grace_s:  # it dies at once
                    self.pool.destroy(vm)

    @staticmethod
    @room_on(STATE)
    def _tell(log: EventLog, vm: Vm, message: str, always: bool = False) -> None:
        """Emit a `vm` event, if vm's platform has any or always is set."""
        label = vm.kind.platform.label
        if label or always:
            log.append(to_payloads("vm", [f"{label or vm.kind.platform.name + ' VM'}: {message}"]))

    @room_on(STATE)
    def _drive(self, vm: Vm, job: Job, request: BuildRequest, source: str | None) -> str:
        """Submit request to the agent, relay its events, and return the path of its verified archive.

        source: the path of the source, or None for a repository.
        Raises BuildFailed, RemoteError, OSError, ValueError.
        """
        log, agent = job.live_log(), vm.client
        try:
            agent_job = agent.submit(request, source)
        except RemoteError as e:
            if e.status == http.HTTPStatus.INSUFFICIENT_STORAGE:
                raise limit_error(f"the disk of the VM ({TMPDIR} or a guest's memory) is full: {e}") from None
            raise vm_error(f"the VM did not accept the build: {e}") from None
        with agent.open("GET", f"/build/{agent_job}/events") as stream:
            failure = relay_events(stream, log, MAX_LOG, job.id)
            if failure:
                raise failure
            if stream.read1(BLOCK):  # the next request needs the end of this response
                raise vm_error("the VM sent more after its last event")
        expected = self.expected._replace(nonce=request.nonce)
        return fetch_result(agent, agent_job, job.path("result.tmp"), expected)


def finish_cleaning(cleaner: "subprocess.Popen[bytes] | None") -> None:
    """Wait for a clean-up, if there is one, for a bounded time, and log its failure with its last line."""
    if not cleaner:
        return
    try:
        output, _ = cleaner.communicate(timeout=CLEAN_UP_S)
    except subprocess.TimeoutExpired:
        Launcher().kill(cleaner)  # with what it has started
        output, _ = b"", cleaner.wait()
    if cleaner.returncode:
        logger().warning(
            "--vm-cleanup ended with status %d: %.400s",
            cleaner.returncode,
            output.decode("utf-8", "replace").strip().rpartition("\n")[2],
        )


def relay_events(stream: Any, log: EventLog, max_log: int, name: str = "") -> BuildFailed | None:
    """Append the agent's events to log up to its `complete`, and return the failure that this reports, or None.

    The events are not trusted: their phases are known and never run backwards, and they have exactly their keys.
    `queued` and `vm` events are dropped, since only the server may emit them; its own log says so once.
    stream: the response, with read1().
    max_log: bytes of the log, and of the dropped events.
    name: the job's id.
    Raises BuildFailed VmError, or LimitError beyond max_log; OSError, ValueError.
    """
    text = ""
    reached = PHASES.index("detect")
    room = max_log - log.size
    warned = False
    while True:
        block = stream.read1(BLOCK)
        if not block:
            raise vm_error("the VM ended in the middle of the build")
        room -= len(block)
        if room < 0:
            raise limit_error(f"the build's log has more than {max_log} bytes")
        text += block.decode("ascii")
        end = text.rfind("\n\n", max(0, len(text) - len(block) - 1)) + 2  # the text before has none
        if len(text) - end > MAX_EVENT:
            raise vm_error(f"the VM sent an event of more than {MAX_EVENT} bytes")
        if end < 2:
            continue
        frames, text = text[:end], text[end:]
        messages = find_build_messages(frames)
        if messages and reached <= PHASES.index("build"):
            reached = PHASES.index("build")
            log.append(Payloads(messages, BUILD_START, BUILD_END))
            continue
        for frame in frames.split("\n\n")[:-1]:
            if frame.startswith(":"):
                continue
            event = parse_json(frame.partition("\ndata: ")[2].encode("ascii"), "event of the VM", 32)
            kind = event.get("type") if isinstance(event, dict) else None
            if kind == "complete":
                return _parse_complete(event)
            if kind in _HOST_PHASES:
                # Every agent emits this one, of its own queue.
                if not warned and event != {"type": "queued", "position": 0}:
                    warned = True
                    logger().warning("job %s: dropped an event that only the server may emit: %.200a", name, event)
                continue
            if kind not in PHASES[reached:] or event.keys() != {"type", "msg"} or not isinstance(event["msg"], str):
                raise vm_error(f"the VM sent an invalid event: {compact_json(event)[:200]}")
            reached, payloads = PHASES.index(kind), to_payloads(kind, [event["msg"]])
            if len(payloads.parts[0]) > MAX_EVENT:  # in the log, whose escapes are longer
                raise vm_error(f"the VM sent an event of more than {MAX_EVENT} bytes")
            log.append(payloads)


# The `complete` event of an agent, for check_schema [CONTRACT 1.9].
_FAILED = {"status": "failed", "error": str, "error_type": tuple(sorted(FAILURES))}
_COMPLETE = {"type": "complete", "result": ({"status": "ok"}, _FAILED)}


def _parse_complete(event: Json) -> BuildFailed | None:
    """Return the failure that a `complete` event reports, or None. Raises BuildFailed VmError if it is invalid."""
    try:
        result = check_schema(event, _COMPLETE, "complete")["result"]
    except Malformed:
        raise vm_error(f"the VM sent an invalid result: {compact_json(event)[:200]}") from None
    if result["status"] == "ok":
        return None
    error_type, error = result["error_type"], result["error"]
    if error_type in _HOST_FAILURES:
        raise vm_error(f"the VM reported {error_type}, which only the server may report: {error}")
    return BuildFailed(error_type, f"in the VM: {error}" if error_type == "InternalError" else error)


def fetch_result(agent: ApiClient, agent_job: str, path: str, expected: Expectations) -> str:
    """Download the archive of agent's job to path and return path, if its bundle verifies; else remove it.

    Raises BuildFailed; RemoteError if the download fails; OSError if path cannot be written.
    """
    verified = False
    try:
        agent.download(agent_job, path)
        verdict = verify_bundle(read_bundle(path), expected, datetime.now(UTC))
        verified = verdict.verdict != "failed"  # not only its checks: a required one may be missing
    except ResultTooLarge:
        raise limit_error(f"the result has more than {MAX_RESULT} bytes") from None
    except UsageError as e:
        raise BuildFailed("AttestationError", str(e).replace(path, "the result")) from None
    finally:
        if not verified:
            remove_tree(path)
    if not verified:
        # The detail of that check names the certificate that is missing.
        names = [c.name if c.name != "VEK form" else f"{c.name} ({c.detail})" for c in verdict.failures]
        raise BuildFailed("AttestationError", f"the VM's bundle does not verify: {', '.join(names)}")
    return path


# endregion 38
# ---- End of the service.
# ==============================================================================
# region 39. Image                                 [uses 13, 16, 20, 21, 22, 23]
# ==============================================================================
# Makes, reads and checks the directory that a guest boots from: a kernel, an initrd and a firmware, which the launch
# digest covers, and a disk of tools.  The dm-verity root hash of that disk is on the kernel's command line, which the
# digest also covers.  The same input gives the same bytes on every machine: no clock, owner, umask or directory order
# has an influence.
#
# The input is a root file system, given as a directory or as pinned Debian packages, which are unpacked without running
# their scripts.  Only the root file system's Python runs here: it compiles the standard library for the initrd.
#
# Called by the command line, and by the QEMU section, which only reads images.  No threads.
# Specifications: [LINUX], [ELF], [DEB], [POLICY], [EDK2].

MAX_LAUNCH_DIGESTS = 64  # of one image
MAX_MODULE = 64 * MIB  # of a kernel module, unpacked
MAX_MODULES = 64  # that a guest loads
MAX_KERNEL = 256 * MIB
MAX_COMMAND_LINE = 2047  # bytes; COMMAND_LINE_SIZE, arch/x86/include/asm/setup.h
_PARTS = {"firmware": "firmware.fd", "kernel": "vmlinuz", "initrd": "initrd", "tools": "tools.img"}  # name -> file
_AGENT = "usr/lib/confbuild"  # the folder of this program in the initrd and on the disk of tools

# Files of a root file system that no guest needs. Folders for variable data stay empty: the disk is read-only.
_DROPPED = r"""(?x)
    (dev|proc|sys|run|tmp|media|mnt|srv|home|root|var)/.+
    # documentation, translations and desktop files
    | usr/share/(doc|doc-base|man|locale|info|lintian|zoneinfo|bash-completion|bug|icons|pixmaps|applications|gdb)/.+
    # link-time optimisation and sanitizers of gcc, character sets of glibc
    | usr/libexec/gcc/.+/(lto1|lto-dump) | usr/bin/([a-z0-9_-]+-)?lto-dump(-[0-9]+)?
    | usr/lib/[a-z0-9_]+-linux-gnu/(lib[a-z]+san\.so[.0-9]*|gconv/.+) | usr/lib/gcc/.+/lib[a-z]+san(_preinit)?\.[ao]
    # parts of Python that no build needs
    | usr/lib/python3[.0-9]*/(test|idlelib|ensurepip|pydoc_data|tkinter|turtledemo|lib2to3)/.+ | (.+/)?__pycache__(/.*)?
    """
# Parts of the standard library that the agent does not need. Extension modules also bring shared libraries along.
_NOT_IN_INITRD = r"""(?x)
    config-3|dist-packages|site-packages|unittest|sqlite3|curses|dbm|xmlrpc|wsgiref|venv
    | _pyrepl|pdb|doctest|pydoc|turtle|antigravity
    | lib-dynload/(_?test|_xx|xx|_tkinter|_curses|_sqlite3|_dbm|_gdbm|readline|_ctypes_test)
    """
# In the order in which ld.so(8) searches them.
_LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64", "lib", "usr/lib")
_LOADER = "lib64/ld-linux-x86-64.so.2"  # the program interpreter [ELF, x86-64 supplement 5.2.1]
# sev_guest asks the crypto API for these without declaring it; newer kernels have them built into sev_guest.
_OPTIONAL = ("crypto_null", "gf128mul", "ghash_generic", "gcm")
# The kernel modules that a guest loads, besides their dependencies.
_MODULES = ("virtio_net", "virtio_blk", "dm_verity", "erofs", *_OPTIONAL, "sev_guest")

# /init. If PID 1 ended, the kernel would panic: in every case it ends the machine instead (QEMU runs with -no-reboot).
_INIT = b"""#!/usr/bin/python3 -IS
import sys
try:
    sys.path.insert(0, "/usr/lib/confbuild")
    import confbuild
    confbuild.run_guest()
except BaseException as error:
    sys.stderr.write(f"init: {error!r}\\n")
finally:
    import ctypes
    ctypes.CDLL(None).reboot(0x01234567)  # RB_AUTOBOOT
"""
# image.json, for check_schema.
_MANIFEST = {
    "version": 1,
    "parts": {
        # The name of a file in the same folder, as safe_name returns it.
        part: {"file": re.compile(r"(?!\.+\Z)[A-Za-z0-9._-]{1,100}"), "sha256": _HEX64, "size": int}
        for part in _PARTS
    },
    "firmware_origin_sha256": _HEX64,
    "append": re.compile(rf"[ -~]{{0,{MAX_COMMAND_LINE}}}"),
    "confbuild_sha256": _HEX64,
    "packages": [{"name": str, "version": str, "sha256": _HEX64}],
    "launch_digests": [{"vcpu_type": str, "vcpus": int, "launch_digest": re.compile(r"[0-9a-f]{96}")}],
    # Where the image comes from, for GET /config.  Whoever publishes an image adds them.
    **dict.fromkeys(("reference?", "igvm?", "disk?"), WORD),
}
_ACCOUNTS = (("root", 0, "/root"), ("agent", 1000, "/"), ("build", 1001, "/work/home"))


class ImageError(UsageError):
    """An image directory, or the input of a new one, that cannot be used."""


class Image(NamedTuple):
    """An image directory, as its image.json describes it; only check_image compares that with the files.

    append: the kernel's command line.
    firmware, kernel, initrd, tools: paths.
    launch_digests: (vCPU type, number of vCPUs, hexadecimal digest).
    parts: the part's name -> its row in image.json, with "sha256" and "size".
    origin: reference, igvm and disk, as far as image.json has them.
    """

    folder: str
    manifest_sha256: str
    append: str
    firmware: str
    kernel: str
    initrd: str
    tools: str
    launch_digests: Sequence[tuple[str, int, str]]
    parts: Mapping[str, Json]
    origin: Strings = {}


class Package(NamedTuple):
    """A line of a lock file. sha256: of the .deb file, hexadecimal."""

    name: str
    version: str
    sha256: str


class _Node(NamedTuple):
    """An entry of a file system that will be written.

    mode: type and permissions, as in an inode.
    content: the bytes of a file, the target of a link, or the path of the file to copy.
    size: of the content, in bytes.
    device: major and minor number.
    """

    mode: int
    content: bytes | str = b""
    size: int = 0
    device: tuple[int, int] = (0, 0)


_Tree = dict[str, _Node]  # by path, relative to the root; the root itself is not in it
_FOLDER = _Node(stat.S_IFDIR | 0o755)


def _new_file(data: bytes, mode: int = stat.S_IFREG | 0o644) -> _Node:
    return _Node(mode, data, len(data))


def _new_link(target: str) -> _Node:
    return _new_file(os.fsencode(target), stat.S_IFLNK | 0o777)


def _regular(path: str) -> str:
    """Return path. Raises ImageError unless it is a regular file (not a link), OSError."""
    if not stat.S_ISREG(os.lstat(path).st_mode):  # opening a pipe would block
        raise ImageError(f"{path}: not a regular file")
    return path


# ---- Packages.


def write_lock(names: Sequence[str], without: Iterable[str] = ()) -> bytes:
    """Return a lock file of the packages called names and of everything that they depend on, sorted by name.

    apt resolves the dependencies from the sources that it is configured with (APT_CONFIG names another configuration),
    on a system that has no package installed except those in without.
    Raises ImageError if apt does not know a name or finds no solution, OSError.
    """
    for name in (*names, *without):
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):  # [POLICY 5.6.1]; else apt could take it for an option
            raise ImageError(f"{name!r} is not the name of a package")
    with tempfile.TemporaryDirectory(prefix="confbuild-") as folder:
        status = join(folder, "status")
        installed = "Package: {}\nStatus: install ok installed\nArchitecture: all\nVersion: 9999:1\n\n"
        write_file(status, "".join(map(installed.format, without)).encode("ascii"))
        settings = (f"Dir::State::status={status}", "Acquire::ForceHash=SHA256", "APT::Install-Recommends=false")
        argv = ["apt-get", "-qq", *(f"-o{setting}" for setting in settings), "install", "--print-uris", *names]
        try:
            code, output, errors = capture(argv, folder, {**os.environ, "LC_ALL": "C"})
        except FileNotFoundError:
            raise ImageError("apt-get is not installed", "make the lock file on Debian or Ubuntu") from None
    if code != 0:
        raise ImageError("apt-get: " + "; ".join(re.findall(r"(?m)^E: (.*)", errors) or [f"exited with status {code}"]))
    rows = []
    for line in output.decode("utf-8", "replace").splitlines():  # 'URI' NAME_VERSION_ARCHITECTURE.deb SIZE SHA256:HEX
        match = re.fullmatch(r"'\S+' ([^\s_]+)_([^\s_]+)_\S+ [0-9]+ SHA256:([0-9a-f]{64})", line)
        if match is None:
            raise ImageError(f"apt-get printed {line[:200]!r}, not the URI of a package with its SHA-256")
        rows.append(f"{match[1]} {match[2].replace('%3a', ':')} {match[3]}\n")  # the colon after an epoch
    data = "".join(sorted(rows)).encode("ascii")
    parse_lock(data, "apt-get's answer")
    return data


def parse_lock(data: bytes, what: str) -> list[Package]:
    """Return the packages of a lock file: lines of NAME VERSION SHA256; # begins a comment.

    what: names the file in errors.
    Raises ImageError if a line has another form, or a name or SHA-256 occurs twice.
    """
    packages = []
    for number, line in enumerate(data.decode("utf-8", "replace").split("\n"), 1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"([a-z0-9][a-z0-9+.-]*) +([0-9A-Za-z.+~:-]+) +([0-9a-f]{64})", text)
        if match:
            packages.append(Package(*match.groups()))
        elif text:
            raise ImageError(f"{what}: line {number} is not NAME VERSION SHA256")
    if not packages:
        raise ImageError(f"{what}: lists no package")
    for column, word in ((0, "package"), (2, "SHA-256")):
        [(value, count)] = Counter(package[column] for package in packages).most_common(1)
        if count > 1:
            raise ImageError(f"{what}: the {word} {value} occurs twice")
    return packages


def unpack_packages(lock: str, debs: str, root: str) -> list[Package]:
    """Unpack the packages of a lock file into the empty directory root, and return them.

    lock: the lock file's path.
    debs: a folder with the .deb files, which may have any names.
    Also makes the files that the packages' scripts would make.
    Raises UsageError, OSError.
    """
    packages = parse_lock(read_limited(_regular(lock), MAX_JSON), lock)
    paths = {
        file_sha256(entry.path): entry.path for entry in list(os.scandir(debs)) if entry.is_file(follow_symlinks=False)
    }
    missing = [" ".join(package) for package in packages if package.sha256 not in paths]
    if missing:
        raise ImageError(f"{debs}: no file with the SHA-256 of " + ", ".join(missing))
    tree = TreeWriter(root, MAX_UNPACKED, "the root file system", is_source=False)
    for package in packages:
        try:
            for member in _deb_members(paths[package.sha256]):
                name = _merged_usr(member.name)
                # _run_scripts makes the link /bin -> usr/bin and the like.
                is_merged = re.fullmatch("usr/(bin|sbin|lib|lib64)", name) and member.kind == "symlink"
                if not is_merged and not re.fullmatch(_DROPPED, name):
                    target = _merged_usr(member.target) if member.kind == "hardlink" else member.target
                    tree.add(member._replace(name=name, target=target))
        except ConfbuildError as e:
            raise ImageError(f"{package.name}: {e}", e.hint) from None
    try:
        _run_scripts(tree, root)
        tree.finish()
    except BuildFailed as e:
        raise ImageError(f"{lock}: {e}") from None
    return packages


def _deb_members(path: str) -> Iterator[_Member]:
    """Yield the files of a .deb file. Raises ConfbuildError, OSError.  [DEB]"""
    with tempfile.TemporaryFile() as data:
        try:
            done = subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", path],
                stdin=subprocess.DEVNULL,
                stdout=data,
                stderr=subprocess.PIPE,
                check=False,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * GIB + MAX_UNPACKED,) * 2),
            )
        except FileNotFoundError:
            raise ImageError("dpkg-deb is not installed", "install the package dpkg") from None
        if done.returncode != 0:
            message = "; ".join(done.stderr.decode("utf-8", "replace").splitlines())
            raise ImageError(message[:500] or f"dpkg-deb exited with status {done.returncode}")
        data.seek(0)
        yield from tar_members(data, MAX_UNPACKED)


def _run_scripts(tree: TreeWriter, root: str) -> None:
    """Make what the packages' scripts would: alternatives, accounts, the bundle of certificates, links for merged /usr.

    Raises BuildFailed, OSError.
    """
    kinds = tree.kinds
    for name, target in (("cc", "gcc"), ("c++", "g++"), ("awk", "mawk")):
        if f"usr/bin/{name}" not in kinds and f"usr/bin/{target}" in kinds:
            tree.add(_Member(f"usr/bin/{name}", "symlink", False, target, ()))
    authorities = sorted(
        join(root, name)
        for name, kind in kinds.items()
        if kind == "file" and re.fullmatch(r"usr/share/ca-certificates/.+\.crt", name)
    )
    files = {
        "etc/passwd": "".join(f"{user}:x:{uid}:{uid}::{home}:/bin/sh\n" for user, uid, home in _ACCOUNTS).encode(),
        "etc/group": "".join(f"{user}:x:{uid}:\n" for user, uid, _ in _ACCOUNTS).encode(),
        "etc/hosts": b"127.0.0.1 localhost\n",
        "etc/ssl/certs/ca-certificates.crt": b"".join(read_limited(_regular(path), MIB) for path in authorities),
    }
    for name, data in files.items():
        if data and name not in kinds:
            tree.add(_Member(name, "file", False, "", [data]))
    for name in ("bin", "sbin", "lib", "lib64"):
        tree.add(_Member(f"usr/{name}", "directory", False, "", ()))
        tree.add(_Member(name, "symlink", False, f"usr/{name}", ()))


def _merged_usr(path: str) -> str:
    """Return the place of path on a system with merged /usr."""
    path = "/".join(part for part in path.split("/") if part != ".")
    return f"usr/{path}" if path.partition("/")[0] in ("bin", "sbin", "lib", "lib64") else path


# ---- File systems: collected as a tree, then written.


def scan_tree(root: str) -> _Tree:
    """Return the files, links and folders below root, except those that no guest needs.

    Permissions become 0755 or 0644, so that no umask has an influence and nothing is setuid.
    Raises ImageError for anything else below root (a pipe, a device), OSError.
    """
    tree: _Tree = {}
    folders = [""]
    for folder in folders:  # which grows meanwhile
        if folder.count("/") > MAX_DEPTH:
            raise ImageError(f"{root}: {folder[:80]!r} is more than {MAX_DEPTH} folders deep")
        for entry in list(os.scandir(join(root, folder))):
            name = folder + entry.name
            info = entry.stat(follow_symlinks=False)
            if re.fullmatch(_DROPPED, name):
                continue
            if stat.S_ISDIR(info.st_mode):
                tree[name] = _FOLDER
                folders.append(name + "/")
            elif stat.S_ISLNK(info.st_mode):
                tree[name] = _new_link(os.readlink(entry.path))
            elif stat.S_ISREG(info.st_mode):
                tree[name] = _Node(stat.S_IFREG | (0o755 if info.st_mode & 0o100 else 0o644), entry.path, info.st_size)
            else:
                raise ImageError(f"{entry.path}: not a file, folder or link")
    return tree


def _place(tree: _Tree, name: str, node: _Node) -> None:
    """Insert node under name, creating parent folders. Raises ImageError if a parent is not a folder."""
    for parent in (name[: match.start()] for match in re.finditer("/", name)):
        if not stat.S_ISDIR(tree.setdefault(parent, _FOLDER).mode):
            raise ImageError(f"the root file system's {parent} is not a folder")
    tree[name] = node


def _resolve(tree: _Tree, name: str) -> list[str]:
    """Return the path of every link and folder visited while resolving name, and last the path of its file.

    Some paths may repeat. Links stay inside of tree, as after chroot(2).
    Raises ImageError if name does not exist.
    """
    pending, done, passed, links = name.split("/")[::-1], list[str](), list[str](), 0
    while pending:
        part = pending.pop()
        if part == "..":
            del done[-1:]
        if part in ("", ".", ".."):
            continue
        here = "/".join([*done, part])
        node = tree.get(here)
        links += node is not None and stat.S_ISLNK(node.mode)
        if node is None or links > 40:  # as Linux's MAXSYMLINKS
            raise ImageError(f"the root file system has no {name}")
        passed.append(here)
        if stat.S_ISLNK(node.mode):
            target = os.fsdecode(_content(node))
            done = [] if target.startswith("/") else done
            pending += target.split("/")[::-1]
        else:
            done.append(part)
    return passed


def _blocks(node: _Node) -> Iterator[bytes]:
    """Yield the content, exactly node.size bytes. Raises ImageError if the file's size has changed, OSError."""
    if isinstance(node.content, bytes):
        yield node.content
        return
    size = 0
    with open(_regular(node.content), "rb") as f:
        for block in iter(lambda: f.read(BLOCK), b""):
            size += len(block)
            if size <= node.size:
                yield block
    if size != node.size:
        raise ImageError(f"{node.content}: changed while it was read")


def _content(node: _Node) -> bytes:
    """Return the whole content."""
    return b"".join(_blocks(node))


def write_cpio(path: str, tree: _Tree) -> None:
    """Write tree as a cpio archive in the newc format, sorted by name, with zero times and owners.

    [LINUX Documentation/driver-api/early-userspace/buffer-format.rst]
    """
    with open(path, "xb") as f:
        for number, name in enumerate([*sorted(tree, key=os.fsencode), "TRAILER!!!"], 1):
            node = tree.get(name, _Node(0))
            if node.size >= 1 << 32:
                raise ImageError(f"{name[:80]!r}: a file in an initrd must be smaller than 4 GiB")
            raw, links = os.fsencode(name) + b"\0", 2 if stat.S_ISDIR(node.mode) else 1
            # ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize, chksum
            inode = number if node.mode else 0
            fields = (inode, node.mode, 0, 0, links, 0, node.size, 0, 0, *node.device, len(raw), 0)
            header = b"070701" + b"%08X" * 13 % fields + raw
            f.write(header + bytes(-len(header) % 4))
            f.writelines(_blocks(node))
            f.write(bytes(-node.size % 4))
        f.write(bytes(-f.tell() % 512))


# ---- The disk of tools: EROFS, followed by a dm-verity tree.

VERITY_BLOCK = 4096
_EROFS_DIR = 2  # EROFS_FT_DIR
_EROFS_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: _EROFS_DIR, stat.S_IFLNK: 7}  # EROFS_FT_*


def block_digests(data: bytes) -> bytes:
    """Return the concatenated SHA-256 of each block of data."""
    view = memoryview(data)
    return b"".join(hashlib.sha256(view[at : at + VERITY_BLOCK]).digest() for at in range(0, len(data), VERITY_BLOCK))


def verity_tree(digests: bytes) -> tuple[bytes, bytes]:
    """Return (the hash blocks, root block first; the root hash) over data blocks with these digests, at least two.

    dm-verity version 1, SHA-256, no salt. [LINUX Documentation/admin-guide/device-mapper/verity.rst]
    """
    levels: list[bytes] = []
    while len(digests) > 32:
        levels.insert(0, digests + bytes(-len(digests) % VERITY_BLOCK))
        digests = block_digests(levels[0])
    return b"".join(levels), bytes(digests)


def write_erofs(path: str, tree: _Tree) -> tuple[str, int]:
    """Write tree as an EROFS image followed by its dm-verity tree, and return (root hash, number of data blocks).

    Layout: superblock, extended inodes of 64 bytes, then the contents, not compressed. Files are copied block by block.
    [LINUX Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h]
    """
    tree = {"": _FOLDER, **tree}
    order = sorted(tree, key=os.fsencode)
    numbers = {name: 2 * i for i, name in enumerate(order)}  # a nid counts 32 bytes
    entries = {
        name: [(b".", numbers[name], _EROFS_DIR), (b"..", numbers[name.rpartition("/")[0]], _EROFS_DIR)]
        for name in order
        if stat.S_ISDIR(tree[name].mode)
    }
    for name in order[1:]:
        parent, _, base = name.rpartition("/")
        entries[parent].append((os.fsencode(base), numbers[name], _EROFS_TYPES[stat.S_IFMT(tree[name].mode)]))
    for name, rows in entries.items():
        tree[name] = _new_file(_erofs_folder(rows), tree[name].mode)
    inodes = bytearray()
    block = 1 + -(-64 * len(order) // VERITY_BLOCK)
    for i, name in enumerate(order, 1):
        node = tree[name]
        links = sum(kind == _EROFS_DIR for _, _, kind in entries.get(name, ())) or 1  # `.` and `..` are folders, too
        # struct erofs_inode_extended: format (1: extended), xattrs, mode, size, first block, ino, nlink; else zero
        inodes += struct.pack("<HHH2xQII20xI16x", 1, 0, node.mode, node.size, block if node.size else 0, i, links)
        block += -(-node.size // VERITY_BLOCK)
    # struct erofs_super_block: magic, log2 of block size, root nid, inodes, blocks, first block of inodes, volume name
    superblock = struct.pack("<I8xBxHQ12xII20x16s48x", 0xE0F5E1E2, 12, numbers[""], len(order), block, 1, b"confbuild")
    with open(path, "x+b") as f:
        f.write((bytes(1024) + superblock).ljust(VERITY_BLOCK, b"\0") + inodes + bytes(-len(inodes) % VERITY_BLOCK))
        for name in order:
            f.writelines(_blocks(tree[name]))
            f.write(bytes(-tree[name].size % VERITY_BLOCK))
        f.seek(0)
        hashes, root_hash = verity_tree(b"".join(map(block_digests, iter(lambda: f.read(BLOCK), b""))))
        f.write(hashes)
    return root_hash.hex(), block


def _erofs_folder(entries: list[tuple[bytes, int, int]]) -> bytes:
    """Return the content of a directory. entries: (name, nid, EROFS_FT_*).

    Each block holds sorted entries (nid, offset of the name, type), then their names.
    """
    data, rest = b"", sorted(entries)
    while rest:
        sizes = itertools.accumulate(12 + len(name) for name, _, _ in rest)
        count = sum(size <= VERITY_BLOCK for size in sizes)
        block, rest = rest[:count], rest[count:]
        places = itertools.accumulate((len(name) for name, _, _ in block), initial=12 * count)
        data += bytes(-len(data) % VERITY_BLOCK)
        data += b"".join(
            struct.pack("<QHBx", number, at, kind) for (_, number, kind), at in zip(block, places, strict=False)
        )
        data += b"".join(name for name, _, _ in block)
    return data


# ---- The initrd.


def _run_in_root(root: str, *arguments: str) -> str:
    """Run the loader of the root file system with these arguments, and return what it prints. Raises ImageError."""
    # Relative: the loader and Python split paths at colons, and a .pyc file must not depend on root's path.
    argv = [f"./{_LOADER}", "--library-path", ":".join(_LIBRARY_FOLDERS), *arguments]
    try:
        status, output, errors = capture(argv, root, {"PYTHONHOME": "usr", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"})
    except OSError as e:
        raise ImageError(
            f"{root}: {_LOADER} cannot be run here: {e.strerror}", "make the image on Linux on x86-64"
        ) from None
    text = output.decode("utf-8", "replace")
    if status != 0:
        last = (errors or text.rstrip()).rpartition("\n")[2] or f"exited with status {status}"
        raise ImageError(f"the root file system's {arguments[-1]} does not run: {last}")
    return text


def _python_files(root: str, tree: _Tree) -> tuple[list[str], str]:
    """Return (paths that Python needs, with the links and folders on the way; its version, as "3.13")."""
    program = _resolve(tree, "usr/bin/python3")[-1]
    match = re.fullmatch(r"usr/bin/python(3\.[0-9]+)", program)
    if not match or not stat.S_ISREG(tree[program].mode):
        raise ImageError(f"the root file system's usr/bin/python3 is {program}: expected a file usr/bin/python3.N")
    library = f"usr/lib/python{match[1]}/"
    # glibc opens libgcc_s when a thread ends.
    names = ["usr/bin/python3", _LOADER, "usr/lib/x86_64-linux-gnu/libgcc_s.so.1"]
    names += (
        name
        for name in tree
        if name.startswith(library)
        and name.endswith((".py", ".so"))
        and not re.match(_NOT_IN_INITRD, name.removeprefix(library))
        and stat.S_ISREG(tree[name].mode)
    )
    chosen = list[str]()
    for name in names:
        chosen += _resolve(tree, name)
        listed = "" if name.endswith(".py") else _run_in_root(root, "--list", f"./{name}")
        for soname, found in re.findall(r"(?m)^\t(\S+) => (\S+)", listed):
            if found.startswith(("/", "not")):  # a file of this machine, or none
                raise ImageError(f"the root file system has no {soname}, which {name} needs")
            chosen += _resolve(tree, found)
    return list(dict.fromkeys(chosen)), match[1]


def _compile_python(root: str, version: str, sources: _Tree) -> _Tree:
    """Return the .pyc file of each of sources, next to its source, compiled by the Python of root.

    sources: by the path that they have in a guest. Each .pyc file names its source by this path.
    version: as _python_files returns it.
    """
    with tempfile.TemporaryDirectory(prefix="confbuild-") as scratch:
        for name, node in sources.items():
            write_file(join(scratch, name), _content(node))
        python = (f"./usr/bin/python{version}", "-S", "-s", "-B", "-m", "compileall", "-q", "-b")
        _run_in_root(root, *python, "--invalidation-mode=unchecked-hash", "-s", scratch, "-p", "/", scratch)
        return {f"{name}c": _new_file(read_limited(_regular(join(scratch, f"{name}c")), 64 * MIB)) for name in sources}


def kernel_release(data: bytes) -> str:
    """Return the version of the kernel in a bzImage, as `uname -r` prints it. Raises ImageError.

    [LINUX Documentation/arch/x86/boot.rst: header, kernel_version]
    """
    at = int.from_bytes(data[0x20E:0x210], "little") + 0x200
    release = re.match(rb"[0-9A-Za-z.+_~-]+", data[at : at + 128])
    if data[0x202:0x206] != b"HdrS" or not release:
        raise ImageError("the kernel is not a bzImage with a version")
    return release[0].decode("ascii")


def _kernel_modules(tree: _Tree) -> dict[str, bytes]:
    """Return name -> bytes of the modules that a guest loads, dependencies first.

    tree: the folder of one kernel's modules.
    Raises ImageError.
    """
    files: dict[str, str] = {}
    for name in sorted(tree):
        module = re.fullmatch(r"(?:.*/)?([^/]+)\.ko(\.[a-z]+)?", name)
        if module:
            files.setdefault(module[1].replace("-", "_"), name)
    listed = _content(tree.get("modules.builtin", _FOLDER)).decode("utf-8", "replace")
    built_in = {line.rpartition("/")[2].removesuffix(".ko").replace("-", "_") for line in listed.split("\n")}
    loaded: dict[str, bytes] = {}

    def load(name: str, wanted_by: str) -> None:
        if name in loaded or name in built_in:
            return
        if name not in files:
            raise ImageError(f"the kernel has no module {name}, which {wanted_by} needs")
        if len(loaded) == MAX_MODULES:  # also bounds the depth of this recursion
            raise ImageError(f"a guest would need more than {MAX_MODULES} modules")
        loaded[name] = data = _unpack_module(files[name], _content(tree[files[name]]))  # now, so that a circle ends
        depends = re.search(rb"\0depends=([A-Za-z0-9_,-]*)\0", data)
        for other in filter(None, depends[1].decode("ascii").split(",") if depends else []):
            load(other.replace("-", "_"), name)
        loaded[name] = loaded.pop(name)  # after its dependencies

    for name in _MODULES:
        if name in files or name not in _OPTIONAL:
            load(name, "a guest")
    return loaded


def _unpack_module(name: str, data: bytes) -> bytes:
    """Return a kernel module, decompressed if its file's name ends in .xz. Raises ImageError."""
    if name.endswith(".xz"):
        decoder = lzma.LZMADecompressor(memlimit=256 * MIB)
        try:
            data = decoder.decompress(data, MAX_MODULE)
        except lzma.LZMAError as e:
            raise ImageError(f"{name}: {e}") from None
        if not decoder.eof:
            raise ImageError(f"{name}: cut off, or more than {MAX_MODULE} bytes")
    if not data.startswith(b"\x7fELF"):
        raise ImageError(f"{name}: not a kernel module, plain or compressed with xz")
    return data


def _make_trees(root: str, tree: _Tree, modules: _Tree) -> tuple[_Tree, _Tree]:
    """Return (contents of the initrd, contents of the disk of tools).

    tree: of root.
    modules: the folder of the kernel's modules.
    """
    names, version = _python_files(root, tree)
    own, agent = f"{_AGENT}/confbuild.py", _new_file(own_source())
    sources = {name: tree[name] for name in names if name.startswith("usr/lib/python") and name.endswith(".py")}
    initrd = _compile_python(root, version, {**sources, own: agent})
    compiled = initrd.pop(own + "c")
    initrd |= {name: tree[name] for name in names if name not in sources}
    tools = {name: node for name, node in tree.items() if not re.match(r"boot(/|$)|(usr/)?lib/modules(/|$)", name)}
    for target in initrd, tools:
        _place(target, own, agent)
        _place(target, f"{_AGENT}/__pycache__/confbuild.cpython-{version.replace('.', '')}.pyc", compiled)
    loaded = _kernel_modules(modules)
    for name, data in loaded.items():
        _place(initrd, f"usr/lib/modules/{name}.ko", _new_file(data))
    _place(initrd, f"{_AGENT}/modules", _new_file("\n".join(loaded).encode("ascii")))
    initrd["init"] = _new_file(_INIT, stat.S_IFREG | 0o755)
    initrd |= dict.fromkeys(("dev", "proc", "sys", "tmp", "run", "sysroot"), _FOLDER)
    for name in "dev proc sys tmp run root work".split():  # mount points, since the disk is read-only
        _place(tools, name, tree.get(name, _FOLDER))
    _place(tools, "etc/resolv.conf", _new_link("../run/resolv.conf"))  # exists in a guest with a network
    # Needed before /dev is mounted: Python reads random numbers, and the kernel opens a console for messages.
    for name, device in (("dev/console", (5, 1)), ("dev/null", (1, 3)), ("dev/urandom", (1, 9))):
        initrd[name] = _Node(stat.S_IFCHR | 0o600, device=device)
    return initrd, tools


# ---- The firmware.

_NO_SHIM = "\u2603him\0".encode("utf-16-le")


def seal_firmware(data: bytes) -> bytes:
    """Return a firmware that starts only the measured kernel; data itself if it is already one.

    Since 2025, edk2 prefers an unmeasured file that the host offers as etc/boot/shim [EDK2
    OvmfPkg/Library/GenericQemuLoadImageLib]. The name that it looks for is changed to one that no host can offer,
    because it is not ASCII.
    Versions of liblzma compress differently: keep the result, and compare it with the origin after decompression.
    Raises ImageError.
    """
    if not firmware_state(data):
        return data
    try:
        volume = b"".join(volume_blocks(data))
        begin, end = volume_place(data)
    except Malformed as e:
        raise ImageError(f"the firmware cannot be inspected: {e}") from None
    best = {
        "id": lzma.FILTER_LZMA1,
        # liblzma reads smaller dictionaries, but does not write them
        "dict_size": max(int.from_bytes(data[begin + 1 : begin + 5], "little"), 4096),
        "preset": 9 | lzma.PRESET_EXTREME,
        "depth": 1000,
    }
    packed = lzma.compress(volume.replace(SHIM_NAME, _NO_SHIM), format=lzma.FORMAT_ALONE, filters=[best])
    # edk2 requires the length, which liblzma leaves unknown
    packed = packed[:5] + len(volume).to_bytes(8, "little") + packed[13:]
    if len(packed) > end - begin:
        raise ImageError(f"the firmware has {end - begin} bytes for its volume: without a shim it needs {len(packed)}")
    sealed = data[:begin] + packed.ljust(end - begin, b"\0") + data[end:]
    state = firmware_state(sealed)
    if state:
        raise ImageError(f"the firmware cannot be sealed: {state}")
    return sealed


# ---- The image.


class ImageInput(NamedTuple):
    """The input of an image.

    rootfs: a directory; if empty, the packages of the file lock are unpacked from the folder debs.
    kernel, firmware, modules: paths; if empty, those of the root file system.
    vcpus: (vCPU type, number of vCPUs) that guests may have.
    """

    rootfs: str = ""
    lock: str = ""
    debs: str = ""
    kernel: str = ""
    firmware: str = ""
    modules: str = ""
    vcpus: Sequence[tuple[str, int]] = (("EPYC-v4", 1),)


def make_image(folder: str, given: ImageInput) -> Image:
    """Make an image in the new directory folder. Raises UsageError, OSError; folder then does not exist."""
    if lexists(folder):
        raise ImageError(f"{folder} exists", "name a new directory with -o")
    if len(given.vcpus) > MAX_LAUNCH_DIGESTS:
        raise ImageError(f"{len(given.vcpus)} launch digests requested: expected at most {MAX_LAUNCH_DIGESTS}")
    parent = dirname(abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".confbuild-", dir=parent) as scratch:
        made = join(scratch, "image")
        os.mkdir(made)
        _write_image(made, given.rootfs and abspath(given.rootfs), given)
        os.chmod(made, 0o755)
        os.rename(made, folder)
    return read_image(folder)


def _write_image(made: str, root: str, given: ImageInput) -> None:
    """Write all files of an image into the empty directory made. Raises UsageError, OSError.

    root: absolute path of the root file system; if empty, the packages are unpacked next to made.
    """
    packages = list[Package]()
    if not root:
        root = made + "-root"
        packages = unpack_packages(given.lock, given.debs, root)
    tree = scan_tree(root)
    kernels = [name for name in tree if re.fullmatch(r"boot/vmlinuz-[^/]+", name)]
    if not given.kernel and len(kernels) != 1:
        raise ImageError(f"the root file system has {len(kernels)} files boot/vmlinuz-*, not one", "use --kernel FILE")
    kernel = read_limited(_regular(given.kernel or join(root, kernels[0])), MAX_KERNEL)
    origin_path = given.firmware or join(root, _resolve(tree, "usr/share/ovmf/OVMF.amdsev.fd")[-1])
    origin = read_limited(_regular(origin_path), MAX_FIRMWARE)
    firmware = seal_firmware(origin)
    modules = scan_tree(given.modules) if given.modules else _modules_of(tree, kernel_release(kernel))
    initrd, tools = _make_trees(root, tree, modules)
    paths = {part: join(made, file) for part, file in _PARTS.items()}
    write_cpio(paths["initrd"], initrd)
    root_hash, blocks = write_erofs(paths["tools"], tools)
    # Without ACPI the host cannot provide tables whose code the kernel would run. Only ACPI finds more processors.
    acpi = "" if any(count > 1 for _, count in given.vcpus) else "acpi=off "
    append = f"console=ttyS0 panic=-1 quiet rdinit=/init {acpi}confbuild.tools={root_hash},{blocks}"
    hashes = boot_hashes(hashlib.sha256(kernel).digest(), bytes.fromhex(file_sha256(paths["initrd"])), append)
    write_file(paths["firmware"], firmware)
    write_file(paths["kernel"], kernel)
    document = {
        "version": 1,
        "parts": {
            part: {"file": _PARTS[part], "sha256": file_sha256(path), "size": getsize(path)}
            for part, path in paths.items()
        },
        "firmware_origin_sha256": sha256_hex(origin),
        "append": append,
        "confbuild_sha256": sha256_hex(own_source()),
        "packages": [package._asdict() for package in packages],
        "launch_digests": [
            {"vcpu_type": kind, "vcpus": count, "launch_digest": _launch_digest(firmware, hashes, kind, count)}
            for kind, count in given.vcpus
        ],
    }
    write_file(join(made, "image.json"), to_canonical(document))
    for entry in list(os.scandir(made)):
        os.chmod(entry.path, 0o644)


def _modules_of(tree: _Tree, release: str) -> _Tree:
    """Return the folder of this kernel's modules in a root file system. Raises ImageError if there is none."""
    for folder in (f"usr/lib/modules/{release}/", f"lib/modules/{release}/"):
        found = {name.removeprefix(folder): node for name, node in tree.items() if name.startswith(folder)}
        if found:
            return found
    raise ImageError(f"the root file system has no modules of the kernel {release}", "use --modules DIR")


def vcpu_label(kind: str, count: int) -> str:
    """Return the label of a guest's processors: "EPYC-v4, 2 vCPUs"."""
    return f"{kind}, {count} vCPU{'s' if count > 1 else ''}"


def _launch_digest(firmware: bytes, hashes: BootHashes, kind: str, count: int) -> str:
    """Return the launch digest with count processors of type kind, in hexadecimal. Raises ImageError."""
    if kind not in CPU_SIGNATURES:
        raise ImageError(f"vCPU type {kind[:80]!r} is not one of {', '.join(sorted(CPU_SIGNATURES))}")
    try:
        return compute_launch_digest(parse_firmware(firmware), hashes, count, CPU_SIGNATURES[kind]).hex()
    except Malformed as e:
        raise ImageError(f"no launch digest of {vcpu_label(kind, count)}: {e}") from None


def read_image(folder: str) -> Image:
    """Return the image in a directory, as image.json describes it; nothing is hashed. Raises UsageError, OSError."""
    path = join(folder, "image.json")
    if not lexists(path):
        raise ImageError(f"{folder}: no image.json in it", "`confbuild image -o DIR` makes an image")
    data = read_limited(_regular(path), MAX_JSON)
    try:
        document = check_schema(parse_json(data, "image.json", max_depth=4), _MANIFEST, "image.json")
    except Malformed as e:
        raise ImageError(f"{folder}: {e}") from None
    if len(document["launch_digests"]) > MAX_LAUNCH_DIGESTS:
        raise ImageError(f"{folder}: image.json: expected at most {MAX_LAUNCH_DIGESTS} launch digests")
    paths = {part: join(folder, row["file"]) for part, row in document["parts"].items()}
    for path in paths.values():
        if not lexists(path):
            raise ImageError(f"{path} is missing")
        _regular(path)
    digests = [(row["vcpu_type"], row["vcpus"], row["launch_digest"]) for row in document["launch_digests"]]
    origin = {name: document[name] for name in ("reference", "igvm", "disk") if name in document}
    append, parts = document["append"], document["parts"]
    return Image(folder, sha256_hex(data), append, **paths, launch_digests=digests, parts=parts, origin=origin)


def check_image(folder: str) -> ImageFacts:
    """Return the facts about an image directory.

    Hashes every part, computes every launch digest, inspects the firmware, and compares the disk of tools with the root
    hash on the command line.
    Raises UsageError, OSError.
    """
    image = read_image(folder)
    firmware = read_limited(_regular(image.firmware), MAX_FIRMWARE)
    found = {part: file_sha256(getattr(image, part)) for part in _PARTS}
    parts = image.parts.items()
    wrong = [f"{part} does not match image.json" for part, row in parts if found[part] != row["sha256"]]
    for part, row in parts:
        size = getsize(getattr(image, part))
        wrong += [f"{part} has {size} bytes, not {row['size']}"] * (size != row["size"])
    tools = re.search(r"(?:^| )confbuild\.tools=([0-9a-f]{64}),([0-9]{1,10})(?: |$)", image.append)
    if not tools or _root_hash(image.tools, int(tools[2])) != tools[1]:
        wrong.append("the command line does not have the root hash of tools")
    hashes = boot_hashes(bytes.fromhex(found["kernel"]), bytes.fromhex(found["initrd"]), image.append)
    digests: dict[str, str] = {}
    for kind, count, claimed_digest in image.launch_digests:
        label = vcpu_label(kind, count)
        try:
            digests[label] = _launch_digest(firmware, hashes, kind, count)
        except ImageError as e:
            wrong.append(str(e))
        else:
            wrong += [f"the launch digest of {label} does not match"] * (digests[label] != claimed_digest)
    return ImageFacts(image.manifest_sha256, "; ".join(wrong), firmware_state(firmware), digests)


def _root_hash(path: str, blocks: int) -> str:
    """Return the root hash of the dm-verity tree over the first blocks of a file.

    It is "" unless the file has that many blocks and blocks is at least 2.
    Raises UsageError, OSError.
    """
    size = blocks * VERITY_BLOCK
    if blocks < 2 or size > getsize(path):
        return ""
    with open(_regular(path), "rb") as f:
        digests = b"".join(block_digests(f.read(min(BLOCK, size - at))) for at in range(0, size, BLOCK))
    return verity_tree(digests)[1].hex()


# endregion 39
# ==============================================================================
# region 40. QEMU                                      [uses 13, 20, 21, 38, 39]
# ==============================================================================
# A guest as a kind of VM: what this machine needs for it, QEMU's argument vector (a pure function), and qemu_vms.
#
# Nothing here makes a guest confidential: the processor does, and only the agent's evidence shows it.  The server, and
# so this section, can read and change whatever a guest sends or receives.
#
# The agent's standard input and output are a virtio-serial port that QEMU connects with its own.  The guest's console
# and QEMU's messages come through QEMU's standard error; they are not trusted.

QEMU = "qemu-system-x86_64"
# The first QEMU that gives the kernel's file to the firmware unchanged (fw_cfg etc/boot/kernel), so that its hash fits.
FIRMWARE_QEMU = (10, 0)

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# Modern virtio through the guest's DMA API: under SNP by pages that it shares with its host.
_VIRTIO = "disable-legacy=on,iommu_platform=on"
_SNP_POLICY = 0x30000  # bit 17 is always 1, bit 16 allows SMT; no debugging, no migration [SNP-ABI 4.3 GUEST_POLICY]
_KVM_CHECK_EXTENSION, _KVM_CAP_VM_TYPES, _KVM_X86_SNP_VM = 0xAE03, 235, 4  # linux/kvm.h, asm/kvm.h
_CPUID, _SEV_LEAF = "/dev/cpu/0/cpuid", 0x8000001F  # Encrypted Memory Capabilities [APM3 E.4.17]
QEMU_PLATFORM = Platform(
    "qemu",
    "QEMU guest: not confidential; the evidence is signed by no hardware",
    SIMULATED_NOTICE,
    "QEMU guest, not confidential",
)
GUEST_PLATFORMS = {platform.name: platform for platform in (QEMU_PLATFORM, SNP_PLATFORM)}


class Guest(NamedTuple):
    """A virtual machine for QEMU.

    platform: SNP_PLATFORM; or QEMU_PLATFORM, whose guests are emulated.
    network: the guest reaches the network, and with it its host's loopback interface.
    cbitpos: the position of the C-bit on this machine's processor; see sev_cpuid.
    firmware: False if QEMU boots the kernel itself, unmeasured; only for QEMU_PLATFORM.
    """

    platform: Platform
    image: Image
    vcpus: int = 1
    vcpu_type: str = "EPYC-v4"
    memory_mib: int = 2048
    network: bool = False
    cbitpos: int = 51
    firmware: bool = True


def qemu_argv(guest: Guest, hashes_page: str = "", hashes_gpa: int = 0) -> list[str]:
    """Return the argument vector of guest, whose agent is at standard input and output, its console at stderr. Pure.

    hashes_page, hashes_gpa: the file and guest address of the page with which the firmware of an emulated guest
        compares kernel, initrd and command line. For SEV-SNP guests QEMU makes that page itself.
    """

    def quoted(path: str) -> str:
        return path.replace(",", ",,")  # a single one separates QEMU's options

    image, memory, vcpu_type = guest.image, f"{guest.memory_mib}M", guest.vcpu_type
    network = ["-netdev", "user,id=net", "-device", f"virtio-net-pci,netdev=net,romfile=,{_VIRTIO}"] * guest.network
    # fmt: off
    if guest.platform.confidential:
        host_data = base64.b64encode(bytes.fromhex(image.manifest_sha256)).decode("ascii")
        accelerator = [
            "-accel", "kvm",
            "-machine",
            "q35,confidential-guest-support=sev0,memory-backend=ram0,kernel-irqchip=split,vmport=off,smm=off",
            "-object", f"memory-backend-memfd,id=ram0,size={memory},share=on,prealloc=off",
            "-object", f"sev-snp-guest,id=sev0,cbitpos={guest.cbitpos},reduced-phys-bits=1,policy={_SNP_POLICY:#x},"
                       f"kernel-hashes=on,host-data={host_data}",
            "-bios", image.firmware,
        ]
    else:
        # MiB of translated code: QEMU's default costs 280 MB for a seventh of the time.
        accelerator = ["-accel", "tcg,tb-size=64", "-machine", "q35,vmport=off"]
        if guest.firmware:
            loader = f"loader,file={quoted(hashes_page)},addr={hashes_gpa:#x},force-raw=on"
            accelerator += ["-bios", image.firmware, "-device", loader]
        else:
            vcpu_type = "max"  # which an older QEMU knows as well; nothing measures it
    return [
        QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-sandbox", _SANDBOX,
        *accelerator,
        "-cpu", vcpu_type,
        "-smp", str(guest.vcpus),
        "-m", memory,
        "-kernel", image.kernel,
        "-initrd", image.initrd,
        "-append", image.append,
        "-blockdev", f"driver=raw,node-name=tools,read-only=on,file.driver=file,file.filename={quoted(image.tools)}",
        "-device", f"virtio-blk-pci,drive=tools,{_VIRTIO}",
        *network,
        "-device", f"virtio-rng-pci,{_VIRTIO}",
        "-chardev", "stdio,id=agent,signal=off",
        "-device", f"virtio-serial-pci,{_VIRTIO}",
        "-device", "virtserialport,chardev=agent,name=confbuild",
        "-serial", "file:/dev/stderr",
    ]
    # fmt: on


def _ask_qemu(*arguments: str) -> tuple[int, bytes]:
    """Run QEMU without a guest and return (exit status, stdout); (-1, b"") if it is not installed."""
    try:
        return capture([QEMU, *arguments], "/", {"PATH": os.environ.get("PATH", os.defpath)}, MIB)[:2]
    except OSError:
        return -1, b""


def qemu_version() -> tuple[int, int] | None:
    """Return the major and minor version of the QEMU in PATH, or None."""
    found = re.match(rb"QEMU emulator version (\d{1,4})\.(\d{1,4})", _ask_qemu("--version")[1])
    return (int(found[1]), int(found[2])) if found else None


def sev_cpuid(path: str = _CPUID) -> tuple[int, int]:
    """Return EAX and EBX of CPUID 0x8000001F; (0, 0) if the kernel's file at path is missing or not open to this user.

    EAX bit 4 means SEV-SNP; EBX bits 5 to 0 are the position of the C-bit. [APM3 E.4.17]
    """
    try:
        with open(path, "rb", buffering=0) as f:
            # A leaf beyond the last one has no meaning: some processors answer with another leaf's contents.
            last = struct.unpack("<4I", os.pread(f.fileno(), 16, 0x80000000))[0]
            eax, ebx, _, _ = struct.unpack("<4I", os.pread(f.fileno(), 16, _SEV_LEAF))
    except (OSError, struct.error):
        return 0, 0
    return (eax, ebx) if last >= _SEV_LEAF else (0, 0)


def preflight(root: str = "") -> list[Check]:
    """Check whether this machine can run SEV-SNP guests. Starts only a QEMU that prints its version and its help.

    root: the folder that has /dev and /sys, without a slash at its end; tests name another one.
    A failed Check has the problem in `actual`, and in `detail` what to do.
    """

    def ask(path: str, mode: str, question: Callable[[IO[bytes]], str]) -> str:
        """Return the problem that question finds in the open file, or why it cannot be opened; "" if there is none."""
        try:
            with open(root + path, mode, buffering=0) as f:
                return question(f)
        except OSError as e:
            return f"{root}{path}: {e.strerror}"

    def kvm(f: IO[bytes]) -> str:  # this decides: KVM answers for kernel, processor and BIOS
        types = fcntl.ioctl(f.fileno(), _KVM_CHECK_EXTENSION, _KVM_CAP_VM_TYPES)
        return (
            "" if types >> _KVM_X86_SNP_VM & 1 else f"{f.name} offers the VM types {types:#x}, without bit 4, SEV-SNP"
        )

    def parameter(f: IO[bytes]) -> str:
        value = f.read(16).strip()
        return "" if value in (b"Y", b"1") else f"{f.name} is {value.decode('ascii', 'replace')!r}, expected 'Y'"

    version = qemu_version()
    problem = f"there is no {QEMU} in PATH"
    if _ask_qemu("-object", "sev-snp-guest,help")[0] == 0:
        problem = ""
    elif version:
        problem = f"{QEMU} {version[0]}.{version[1]} does not support sev-snp-guest"
    # If the file cannot be read, KVM alone decides: it answers for the processor, too.
    lacks_snp = os.access(root + _CPUID, os.R_OK) and not sev_cpuid(root + _CPUID)[0] >> 4 & 1
    rows = (
        ("QEMU", problem, "install QEMU 9.1 or later: apt-get install qemu-system-x86"),
        (
            "KVM",
            ask("/dev/kvm", "r+b", kvm),
            "needs an AMD EPYC 7003 or later, Linux 6.11 or later, SEV-SNP enabled in the BIOS (SMEE, SNP memory "
            "coverage), kvm_amd loaded with sev_snp=1, and /dev/kvm open to this user: usermod -aG kvm USER",
        ),
        (
            "kvm_amd",
            ask("/sys/module/kvm_amd/parameters/sev_snp", "rb", parameter),
            "load it with sev=1 sev_es=1 sev_snp=1; `dmesg | grep -i -e sev -e rmp` tells why it disabled SNP",
        ),
        (
            "/dev/sev",
            ask("/dev/sev", "r+b", lambda f: ""),
            'load ccp, and open the device to this user with a udev rule: KERNEL=="sev", MODE="0660", GROUP="kvm"',
        ),
        (
            "processor",
            "CPUID 0x8000001F reports no SEV-SNP" if lacks_snp else "",
            "run on an AMD EPYC 7003 or later, not inside another VM",
        ),
    )
    return [
        Check(name, "failed", "", found, remedy) if found else Check(name, "passed") for name, found, remedy in rows
    ]


def qemu_vms(guest: Guest, config: Json, folder: str = "") -> VmKind:
    """Return the kind of VM that is a guest of QEMU.

    config: the agent's configuration besides the network: `policy`, `vek`.
    folder: the directory of the workspaces; empty for TMPDIR.
    """

    def start(workspace: str, _: str) -> VmStart:
        image, page, gpa = guest.image, join(workspace, "hashes"), 0
        if guest.firmware and not guest.platform.confidential:
            firmware = parse_firmware(read_limited(image.firmware, MAX_FIRMWARE))
            kernel, initrd = (bytes.fromhex(file_sha256(part)) for part in (image.kernel, image.initrd))
            gpa, data = hashes_page(firmware, boot_hashes(kernel, initrd, image.append))
            write_file(page, data)
        argv = qemu_argv(guest, page, gpa)
        env = {"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": workspace}
        return VmStart(argv, env, {"network": "open" if guest.network else "none", **config}, workspace)

    return VmKind(guest.platform, guest.network, start, folder=folder)


# endregion 40
# ==============================================================================
# region 41. Broker                                        [uses 18, 19, 21, 26]
# ==============================================================================
# The socket over which the agent of a guest asks the guest's first process for things that the agent may not do itself.
# Both ends are here: Broker is the agent's.  GuestBroker is that of the first process, which is root and does not trust
# the agent.
#
# Protocol: a Unix socket of type SOCK_SEQPACKET.  A message is a JSON object; a connection carries one question.
#
#     question                                 its answer
#     {"op": "run", "argv", "cwd", "env",      {"pid"} once the program has started as the build user, then {"status"}
#       "network"}                             once it has ended; status is negative for a signal.  The question comes
#                                              with three file descriptors: its standard input, output and error
#     {"op": "kill"}                           {} once no process of the build user is left
#     {"op": "own", "paths"}                   {} once the build user owns these folders below /work, and all in them
#     {"op": "report", "data"}                 {"report", "table"}: a hardware report over 64 bytes of data and the
#                                              certificates that came with it, all of them in hexadecimal
#     any of these, or a malformed one         {"errno", "error"} if it fails
#
# No threads: the first process forks builds.

AGENT_UID, BUILD_UID = 1000, 1001
SYSROOT = "/sysroot"
_BROKER = "/run/broker/socket"  # below SYSROOT
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C  # linux/sockios.h
_IFF_UP = 1  # linux/if.h
MAX_PROCESSES = 4096  # of a build
MAX_PROGRAMS = 64  # that run for the agent at the same time
BROKER_TIMEOUT_S = 5.0  # for a question to arrive, and for its answer to be accepted


class Broker(Launcher):
    """The agent's end. Every method raises OSError if the first process refuses or has gone."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._network = True

    def close_network(self) -> bool:
        """Start later programs in a network of their own, where they reach only each other."""
        self._network = False
        return True

    def _open(self, question: Json, fds: Sequence[int] = ()) -> "socket.socket":
        """Return a connection over which question and file descriptors have been sent."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(self._path)
            socket.send_fds(connection, [json_bytes(question)], list(fds))
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, question: Json) -> Json:
        """Return the answer to question."""
        with self._open(question) as connection:
            return _receive(connection)

    def start(self, argv: Sequence[str], **options: Any) -> "BrokeredProcess":
        """Start argv as the build user. options: those of subprocess.Popen that section Programs uses; no stdin."""
        question = {"op": "run", "argv": argv, "network": self._network}
        question |= {"cwd": options["cwd"], "env": dict(options["env"])}
        fds, streams = [os.open(os.devnull, os.O_RDWR)], list[IO[bytes]]()
        with ExitStack() as ours:
            try:
                for _ in range(1 if options["stderr"] == subprocess.STDOUT else 2):
                    end, fd = os.pipe()
                    fds.append(fd)
                    streams.append(ours.enter_context(open(end, "rb")))
                connection = ours.enter_context(self._open(question, [*fds[:2], fds[-1]]))
            finally:
                for fd in fds:
                    os.close(fd)
            process = BrokeredProcess(connection, *streams)
            ours.pop_all()
        return process

    def kill(self, child: Any) -> None:
        """Kill child and every other process of the build user."""
        self.kill_rest()

    def kill_rest(self) -> None:
        """Kill every process of the build user."""
        self.ask({"op": "kill"})

    def hand_over(self, paths: Sequence[str]) -> None:
        """Let the build user own the folders paths and everything in them."""
        self.ask({"op": "own", "paths": paths})


def _receive(connection: "socket.socket") -> Json:
    """Return the next answer over connection. Raises OSError if the question failed or the first process has gone."""
    data = connection.recv(64 * KIB)
    answer: Json = json.loads(data) if data else {"errno": errno.EPIPE, "error": os.strerror(errno.EPIPE)}
    if "errno" in answer:
        raise OSError(answer["errno"], answer["error"])
    return answer


class BrokeredProcess:
    """A program that runs as the build user: the part of subprocess.Popen that section Programs uses."""

    def __init__(self, connection: "socket.socket", stdout: IO[bytes], stderr: IO[bytes] | None = None) -> None:
        _receive(connection)  # raises if it has not started
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._connection = connection

    def poll(self) -> int | None:
        """Return the exit status, or None while the program runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for the program to end and return its exit status."""
        if self.returncode is None:
            self.returncode = int(_receive(self._connection)["status"])
            self._connection.close()
        return self.returncode


def _set_up_interface(name: str, address: str, netmask: str) -> None:
    """Give a network interface an IPv4 address and start it.  [netdevice(7)] Raises OSError."""

    def ifreq(content: bytes) -> bytes:
        return struct.pack("16s24s", name.encode("ascii"), content)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for request, text in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, netmask)):
            fcntl.ioctl(s, request, ifreq(_sockaddr_in(text)))
        [flags] = struct.unpack_from("H", fcntl.ioctl(s, _SIOCGIFFLAGS, ifreq(b"")), 16)
        fcntl.ioctl(s, _SIOCSIFFLAGS, ifreq(struct.pack("H", flags | _IFF_UP)))


def _sockaddr_in(address: str) -> bytes:
    """Return the struct sockaddr_in of an IPv4 address.  [ip(7)]"""
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def give_up_rights() -> None:
    """Prevent this process and its children from gaining rights, and from using system calls that no build needs.

    Raises OSError.
    """
    system_call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    apply_filter(unix=True)


def _become(uid: int) -> None:
    """Make this process one of the user uid, with the root SYSROOT and no way to gain rights. Raises OSError."""
    os.chroot(SYSROOT)
    os.chdir("/")
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    give_up_rights()
    os.umask(0o022)


class GuestBroker:
    """The first process's end. network: whether builds have one."""

    def __init__(self, listener: "socket.socket", network: bool) -> None:
        self._listener = listener
        self._network = network
        self._running: dict[int, socket.socket] = {}  # pid -> the connection that waits for its end

    def answer(self) -> None:
        """Answer the next question, of any content.

        An agent that does not send or receive blocks this for at most BROKER_TIMEOUT_S.
        """
        connection, _ = self._listener.accept()
        connection.settimeout(BROKER_TIMEOUT_S)
        fds = list[int]()
        answer: Json = {}
        try:
            data, fds, _, _ = socket.recv_fds(connection, 256 * KIB, 3)
            question = json.loads(data)
            operations = {"run": self._run, "own": _own, "kill": _kill_builds, "report": _ask_hardware}
            answer = operations[question["op"]]({**question, "fds": fds})
        except (OSError, NoAttester) as e:
            answer = {"errno": getattr(e, "errno", None) or errno.EIO, "error": getattr(e, "strerror", None) or str(e)}
        except Exception as e:  # noqa: BLE001  # the agent may send anything, and the kernel panics if its PID 1 ends
            answer = {"errno": errno.EINVAL, "error": f"malformed question: {type(e).__name__}: {e}"[:500]}
        finally:
            for fd in fds:
                os.close(fd)
        self._send(connection, answer)
        if "pid" in answer:
            self._running[answer["pid"]] = connection
        else:
            connection.close()

    def reaped(self, pid: int, status: int) -> None:
        """Send the end of a process to the connection that waits for it. status: from os.waitstatus_to_exitcode."""
        if pid in self._running:
            with self._running.pop(pid) as connection:
                self._send(connection, {"status": status})

    @staticmethod
    def _send(connection: "socket.socket", answer: Json) -> None:
        with suppress(OSError):  # the agent has gone, or does not receive
            connection.send(json_bytes(answer))

    def _run(self, question: Json) -> Json:
        """Run a program as the build user. Raises OSError."""
        if len(self._running) >= MAX_PROGRAMS:
            raise OSError(errno.EAGAIN, f"{MAX_PROGRAMS} programs are already running")

        def enter() -> None:
            write_file("/proc/self/oom_score_adj", b"1000")  # if memory runs out, kill the build first
            resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
            # System V's shared memory would outlive its processes, and no mount option bounds its size.
            system_call("unshare", _CLONE_NEWIPC)
            if not (self._network and question["network"]):
                # A namespace with only a loopback interface, whatever network the host provides.
                system_call("unshare", _CLONE_NEWNET)
                _set_up_interface("lo", "127.0.0.1", "255.0.0.0")
            _become(BUILD_UID)
            os.chdir(question["cwd"])

        stdin, stdout, stderr = question["fds"]
        try:
            child = subprocess.Popen(
                question["argv"],
                env=question["env"],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                preexec_fn=enter,  # safe: this process has no threads
                start_new_session=True,
            )
        except subprocess.SubprocessError:  # enter has failed
            raise OSError(errno.EAGAIN, "cannot become the build user") from None
        child.returncode = 0  # _serve_guest reaps every process
        return {"pid": child.pid}


def _own(question: Json) -> Json:
    """Let the build user own folders below /work and everything in them. Raises OSError.

    Follows no link, even if one appears meanwhile.
    """
    for path in question["paths"]:
        parts = path.split("/")
        if parts[:2] != ["", "work"] or len(parts) < 3 or not {"", ".", ".."}.isdisjoint(parts[2:]):
            raise OSError(errno.EPERM, f"{path} is not a folder below /work")
        folder = os.open(f"{SYSROOT}/work", os.O_DIRECTORY)
        try:
            for part in parts[2:]:
                outer, folder = folder, os.open(part, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(outer)
            for _, folders, files, at in os.fwalk(".", follow_symlinks=False, dir_fd=folder):
                for name in (".", *folders, *files):
                    os.chown(name, BUILD_UID, BUILD_UID, dir_fd=at, follow_symlinks=False)
        finally:
            os.close(folder)
    return {}


def _kill_builds(_: Json) -> Json:
    """Kill every process of the build user.

    kill(2) by that user with pid -1 reaches all of them at once, however fast they fork.
    """
    child = os.fork()
    if child == 0:
        try:
            os.setuid(BUILD_UID)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(child, 0)

    def is_of_build(pid: int) -> bool:
        try:
            # The contents, since root owns the files of a process that has hidden its memory.
            with open(f"/proc/{pid}/status", "rb") as f:
                return f"\nUid:\t{BUILD_UID}\t".encode() in f.read()
        except OSError:
            return False  # it has ended

    kill_all(lambda: [pid for pid in descendants(1) if is_of_build(pid)])  # killed processes take a moment to end
    return {}


def _ask_hardware(question: Json) -> Json:
    """Return a hardware report. Raises NoAttester."""
    report, table = get_report(bytes.fromhex(question["data"]))
    return {"report": report.hex(), "table": (table or b"").hex()}


# endregion 41
# ==============================================================================
# region 42. First process                 [uses 18, 21, 22, 26, 28, 37, 39, 41]
# ==============================================================================
# The first process of a guest, as root, called by the initrd's /init.  It mounts the disk of tools, whose every block
# the kernel checks against the root hash on its command line, and empty file systems in it; reads the agent's
# configuration from a virtio-serial port; and starts the agent as an unprivileged user.  The agent's root has no /sys
# and no device that attests, and hides this process.  Then this process answers the agent's Broker and reaps processes
# until the agent ends.
#
# A build runs as a third user, by default in a network namespace without connections.
#
# run_guest returns in every case, and /init then ends the machine by reboot(2), which also works without ACPI.
#
# No threads: builds are forked from here.
_SYS_FINIT_MODULE = 313  # asm/unistd_64.h
_SIOCADDRT, _RTF_UP, _RTF_GATEWAY = 0x890B, 1, 2  # linux/sockios.h, linux/route.h
_DM_DEV_CREATE, _DM_TABLE_LOAD, _DM_DEV_SUSPEND, _DM_READONLY_FLAG = 3, 9, 6, 1  # linux/dm-ioctl.h
_DM_HEADER = 312  # bytes of struct dm_ioctl
# Sums of the mount flags RDONLY 1, NOSUID 2, NODEV 4 and NOEXEC 8 [sys/mount.h]; NOSUID is in all of them.
_MS_DATA, _MS_DEVICES, _MS_PROGRAMS, _MS_READONLY = 2 | 4 | 8, 2 | 8, 2 | 4, 1 | 2 | 4
# (type, target, flags, options) of the mounts before anything is read.
_MOUNTS = (
    ("proc", "/proc", _MS_DATA, ""),
    ("sysfs", "/sys", _MS_DATA, ""),
    ("devtmpfs", "/dev", _MS_DEVICES, "mode=0755"),
)
# The mounts below SYSROOT. Together those that a build can fill leave memory for the agent's log and result, the kernel
# and both our processes, which can then still report what happened.
_SYSROOT_MOUNTS = (
    ("proc", f"{SYSROOT}/proc", _MS_DATA, "hidepid=2"),
    ("tmpfs", f"{SYSROOT}/dev", _MS_DEVICES, "mode=0755,size=64k"),
    ("tmpfs", f"{SYSROOT}/run", _MS_DATA, "mode=0755,size=1m"),
    ("tmpfs", f"{SYSROOT}/tmp", _MS_PROGRAMS, "mode=1777,size=5%,nr_inodes=16k"),
    ("tmpfs", f"{SYSROOT}/work", _MS_PROGRAMS, "mode=0755,size=55%,nr_inodes=200k"),
    ("tmpfs", f"{SYSROOT}/work/agent", _MS_DATA, f"mode=0700,uid={AGENT_UID},gid={AGENT_UID},size=20%"),
)
# No user namespaces, which would make a build root towards much of the kernel; no kernel log for builds; no io_uring;
# no further modules.
_SYSCTL = (
    ("user/max_user_namespaces", "0"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/hostname", "localhost"),
    ("kernel/io_uring_disabled", "2"),
    ("kernel/modules_disabled", "1"),
)
# A mirror of cargo's registry in the image, as `cargo vendor` writes it. It replaces the registry, which a guest
# without a network cannot reach. [CARGO Source Replacement]
MIRROR = "/usr/share/cargo/registry"
MIRROR_CONFIG = f'[source.crates-io]\nreplace-with = "image"\n[source.image]\ndirectory = "{MIRROR}"\n'
_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))


class GuestError(ConfbuildError):
    """A reason why a guest cannot start."""


def parse_command_line(text: str) -> tuple[str, int]:
    """Return (root hash, number of data blocks) of the disk of tools from the kernel's command line.

    The firmware puts unmeasured words from the host before the measured ones, so a second such parameter is an error.
    Raises GuestError.
    """
    found = re.findall(r"(?<!\S)confbuild\.tools=(\S*)", text)
    match = re.fullmatch(r"([0-9a-f]{64}),([1-9][0-9]{0,9})", " ".join(found))
    if match is None:
        raise GuestError("expected confbuild.tools=ROOTHASH,BLOCKS exactly once on the kernel's command line")
    return match[1], int(match[2])


def _load_modules() -> None:
    """Load the kernel modules in the order of the initrd's list."""
    for name in read_limited(f"/{_AGENT}/modules", MIB).decode("ascii").split():
        with open(f"/usr/lib/modules/{name}.ko", "rb") as module:
            try:
                system_call("syscall", _SYS_FINIT_MODULE, module.fileno(), b"", 0)
            except OSError as e:
                # It is loaded already, or this machine has no such device. Code that needs a module reports errors.
                if e.errno not in (errno.EEXIST, errno.ENODEV):
                    sys.stderr.write(f"confbuild: module {name}: {e.strerror}\n")


def _await_device(name: str) -> str:
    """Wait for a device whose name begins with name, and return its path. Raises GuestError after ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for found in sorted(os.listdir("/dev")):
            if found.startswith(name):
                return f"/dev/{found}"
        time.sleep(0.02)
    raise GuestError(f"no device /dev/{name} appeared within 10 s")


def verity_target(device: str, blocks: int, root_hash: str) -> bytes:
    """Return the struct dm_target_spec of a dm-verity device whose hash tree follows its data.

    device: major:minor of the disk.
    blocks: of data, 4096 bytes each. Version 1, SHA-256, no salt.
    [LINUX Documentation/admin-guide/device-mapper/verity.rst; linux/dm-ioctl.h]
    """
    parameters = f"1 {device} {device} 4096 4096 {blocks} {blocks} sha256 {root_hash} -".encode("ascii") + b"\0"
    parameters += bytes(-(40 + len(parameters)) % 8)
    return struct.pack("=QQiI16s", 0, 8 * blocks, 0, 40 + len(parameters), b"verity") + parameters


def _device_mapper(command: int, target: bytes = b"", flags: int = 0) -> None:
    """Send one request about the device `tools`.  [struct dm_ioctl, linux/dm-ioctl.h] Raises OSError."""
    # version, data_size, data_start, target_count, flags, name
    header = struct.pack(
        "=I8xIII4xI16x128s136x", 4, _DM_HEADER + len(target), _DM_HEADER, bool(target), flags, b"tools"
    )
    with open("/dev/mapper/control", "r+b", buffering=0) as control:
        fcntl.ioctl(control, 3 << 30 | _DM_HEADER << 16 | 0xFD << 8 | command, bytearray(header + target), True)


def _mount_tools(root_hash: str, blocks: int) -> None:
    """Mount the disk of tools at SYSROOT through dm-verity, and empty file systems in it.

    Raises OSError, GuestError.
    """
    disk = os.stat(_await_device("vda")).st_rdev
    target = verity_target(f"{os.major(disk)}:{os.minor(disk)}", blocks, root_hash)
    _device_mapper(_DM_DEV_CREATE)
    _device_mapper(_DM_TABLE_LOAD, target, _DM_READONLY_FLAG)
    _device_mapper(_DM_DEV_SUSPEND)  # without its flag, this resumes
    mount("erofs", SYSROOT, _MS_READONLY, "", _await_device("dm-0"))
    for row in _SYSROOT_MOUNTS:
        mount(*row)
    for name, major, minor in _DEVICES:
        os.mknod(f"{SYSROOT}/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(f"{SYSROOT}/dev/{name}", 0o666)
    for name, link in (
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("shm", "/work/tmp"),  # sem_open(3) and shm_open(3) make files there
    ):
        os.symlink(link, f"{SYSROOT}/dev/{name}")
    folders = [(f"work/{name}", BUILD_UID, 0o755) for name in BUILD_FOLDERS]
    for name, uid, mode in (("run/broker", AGENT_UID, 0o700), *folders):
        os.mkdir(f"{SYSROOT}/{name}")
        os.chmod(f"{SYSROOT}/{name}", mode)
        os.chown(f"{SYSROOT}/{name}", uid, uid)
    os.chown(f"{SYSROOT}/work", AGENT_UID, AGENT_UID)
    if isdir(SYSROOT + MIRROR):
        write_file(f"{SYSROOT}/work/cargo/config.toml", MIRROR_CONFIG.encode("ascii"))


def _open_network() -> None:
    """Set up QEMU's user network: gateway, name server.  [struct rtentry, linux/route.h] Raises OSError."""
    _set_up_interface("eth0", "10.0.2.15", "255.255.255.0")
    anywhere, gateway = _sockaddr_in("0.0.0.0"), _sockaddr_in("10.0.2.2")
    # pad1, destination, gateway, netmask, flags
    route = struct.pack("=8x16s16s16sH62x", anywhere, gateway, anywhere, _RTF_UP | _RTF_GATEWAY)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCADDRT, route)
    write_file(f"{SYSROOT}/run/resolv.conf", b"nameserver 10.0.2.3\n")


def _run_guest_agent(config: Json) -> None:
    """Run the agent in this process, which _become has changed."""
    # Further modules come from the disk of tools, whose folders Python would take for the initrd's: all times are 0.
    sys.path_importer_cache.clear()
    guard_process()
    os.environ.clear()
    os.environ.update(build_environment("/work", {"PATH": "/usr/bin:/bin"}, ()))
    os.chdir("/work")
    broker = Broker(_BROKER)
    use_launcher(broker)

    def get(data: bytes) -> tuple[bytes, bytes]:
        try:
            answer = broker.ask({"op": "report", "data": data.hex()})
        except OSError as e:
            raise NoAttester(e.strerror or str(e)) from None
        return bytes.fromhex(answer["report"]), bytes.fromhex(answer["table"])

    serve_agent(config, "/work", choose_attester(config, get), lambda: os._exit(0))


def _serve_guest(agent: int, broker: GuestBroker, listener: "socket.socket") -> None:
    """Answer questions and reap processes until the process agent has ended."""
    sleeper, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    while True:
        pid, status = 1, 0
        while pid:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == agent:
                return
            broker.reaped(pid, os.waitstatus_to_exitcode(status))
        ready, _, _ = select.select([sleeper, listener], [], [])
        if sleeper in ready:
            sleeper.recv(4096)
        if listener in ready:
            broker.answer()


def _start_guest() -> None:
    """Start a guest, and serve its agent until that ends. Raises OSError, ConfbuildError."""
    for row in _MOUNTS:
        mount(*row)
    disk = parse_command_line(read_limited("/proc/cmdline", MIB).decode("ascii", "replace"))
    _load_modules()
    _mount_tools(*disk)
    channel = os.open(_await_device("vport"), os.O_RDWR)
    config = read_config(lambda: os.read(channel, 1))
    network = config.get("network") == "open"
    _set_up_interface("lo", "127.0.0.1", "255.0.0.0")
    if network:
        _open_network()
    if config["platform"] == "snp":
        mount("configfs", "/sys/kernel/config", _MS_DATA, "")
    for name, value in _SYSCTL:
        if exists(f"/proc/sys/{name}"):  # else the kernel was built without the feature
            write_file(f"/proc/sys/{name}", value.encode("ascii"))
    # Read this file and import the agent's modules now, from the initrd: its own root has no compiled ones.
    own_source()
    for module in (
        "gzip hmac http.client io logging resource secrets select selectors shutil subprocess tempfile "
        "threading tomllib unicodedata urllib.request uuid weakref zipfile"
    ).split():
        __import__(module)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(SYSROOT + _BROKER)
    os.chown(SYSROOT + _BROKER, AGENT_UID, AGENT_UID)
    listener.listen(16)
    agent = os.fork()
    if agent == 0:
        try:
            listener.close()
            os.dup2(channel, 0)
            os.dup2(channel, 1)
            os.close(channel)
            _become(AGENT_UID)
            _run_guest_agent(config)
        except BaseException as e:  # noqa: BLE001  # the first process only waits for the end of this one
            sys.stderr.write(f"confbuild: the agent has ended: {type(e).__name__}: {e}\n")
        finally:
            os._exit(1)
    os.close(channel)
    _serve_guest(agent, GuestBroker(listener, network), listener)


def run_guest() -> None:
    """Run as the first process of a guest. Returns when the guest should end; errors go to the console."""
    try:
        _start_guest()
    except BaseException as e:  # noqa: BLE001
        sys.stderr.write(f"confbuild: the guest cannot start: {type(e).__name__}: {e}\n")


# endregion 42
# ==============================================================================
# region 43. Rendering                                                 [uses 17]
# ==============================================================================
# Verdicts and events for people.  Text from builds and servers is stripped of everything that could steer a terminal.
#
# Thread "clock": started by a live Display; redraws while no event arrives; ends with the build.

_CONTROL = re.compile(
    r"""
      \x1b\[ [0-?]* [\ -/]* [@-~]           # CSI: colours, cursor movement
    | \x1b\] [^\x07\x1b]* (?:\x07|\x1b\\)   # OSC: titles, links
    | \x1b .?                               # every other escape sequence
    | [\x00-\x08\x0a-\x1f\x7f-\x9f]         # control characters except tab
    | [\u202a-\u202e\u2066-\u2069]          # bidirectional overrides
    """,
    re.VERBOSE,
)
TAIL = 40  # lines shown of a failed build


def plain_text(text: str) -> str:
    """Return text without ANSI sequences and control characters; tabs become spaces, and lone surrogates "?"."""
    return _CONTROL.sub("", text.encode("utf-8", "replace").decode()).expandtabs()


def own_command() -> list[str]:
    """Return the words with which this program was started, for commands that people can paste."""
    program = sys.argv[0]
    if program.endswith((".py", ".pyz")):
        return [*(sys.orig_argv[:1] or [sys.executable]), program]
    return [program if os.sep in program and shutil.which("confbuild") != program else "confbuild"]


def say(text: str, hint: str = "") -> None:
    """Write a line about confbuild's own work to stderr, and what to do about it.

    hint: commands in it begin with "`confbuild ", which is replaced by the words that started this program.
    """
    hint = hint.replace("`confbuild ", f"`{shlex.join(own_command())} ")
    sys.stderr.write(f"confbuild: {plain_text(text)}\n" + (f"confbuild: hint: {plain_text(hint)}\n" if hint else ""))
    sys.stderr.flush()


def cut_to_cells(text: str, width: int) -> str:
    """Return the beginning of text that fills at most width cells of a terminal."""
    cells = itertools.accumulate(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
    return text[: sum(1 for filled in cells if filled <= width)]


def _shorten(text: str) -> str:
    """Return text on one line of at most 128 characters."""
    return plain_text(text if len(text) <= 128 else text[:125] + "...")


def size_text(size: int) -> str:
    """Return a number of bytes for people, such as 435 KiB."""
    for unit, word in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.{0 if size >= 10 * unit else 1}f} {word}"
    return f"{size} bytes"


def wants_color(stream: IO[str]) -> bool:
    """Return True if output to stream is coloured: https://no-color.org and https://force-color.org.  [CONTRACT 5.2]"""
    wanted = os.environ.get("FORCE_COLOR") or stream.isatty() and os.environ.get("TERM") != "dumb"
    return bool(wanted) and not os.environ.get("NO_COLOR")


def not_requested(verdict: Verdict) -> list[str]:
    """Return the checks that the caller could have requested, each with its option: "nonce (--nonce)"."""
    skipped = {c.name for c in verdict.checks if c.status == "not checked" and c.detail not in (ALONE, _BLOCKED)}
    if ({c.name for c in verdict.checks} - skipped) & MEASURED:
        skipped.discard("measurement")
    if "revocation" in skipped:
        skipped.discard("revocation list age")
    return [
        option if "_" in check else f"{check} ({option})"
        for _, check, option, part in EXPECTED
        if option and check in skipped and (part == "provenance" or re.search(part, verdict.platform))
    ]


def render_verdict(verdict: Verdict, color: bool, verbose: bool = False, at: str = "") -> str:
    """Return the verdict in one sentence, the failed checks, and one line with the checks that nobody requested.

    verbose: show every field of the evidence and every check.
    at: the time of the verification if it is not now.
    """
    checks = [check for check in verdict.checks if verbose or check.status == "failed"]
    claims = verdict.claims if verbose and verdict.claims.keys() & {"report_version", "quote_version"} else {}
    width = min(40, max((len(name) for name in (*(check.name for check in checks), *claims)), default=0))
    rows = [_sentence(verdict, color, f" as of {at}" if at else "")]
    if claims:
        rows.append("The evidence says" + (":" if verdict.verdict == "passed" else " (not proven):"))
    unset = list[str]()
    for name, value in claims.items():
        if re.fullmatch("None|(0x)?[0.]*", str(value)):
            unset.append(name)
        else:
            text = value if isinstance(value, str) else compact_json(value)
            rows.append(f"     {plain_text(name):{width}}  {_shorten(text)}")
    if unset:
        rows.append(f"     zero or empty: {plain_text(', '.join(unset))}")
    skipped: dict[str, list[str]] = {}
    for check in checks:
        if check.status == "not checked" and (not check.actual or claims and check.detail == _UNASKED):
            skipped.setdefault(check.detail, []).append(check.name)  # one line for all with the same reason
        else:
            rows += _check_rows(check, width, color)
    for why, names in skipped.items():
        rows.append(_paint("--  ", "33", color) + " " + plain_text(f"{', '.join(names)}: {why}"))
    missing = not_requested(verdict)
    fields = [] if verbose else [name for name in missing if name.startswith("--")]
    missing = [name for name in missing if name not in fields] + [f"{len(fields)} more that -v names"] * bool(fields)
    rows += ["Not checked: " + ", ".join(missing)] * bool(missing)
    return "\n".join(rows)


def _check_rows(check: Check, width: int, color: bool) -> Iterator[str]:
    """Yield the line of a check, and for a failed one the expected and the actual value."""
    name, status, expected, actual, detail = check
    mark, sgr = {"passed": ("ok  ", "32"), "failed": ("FAIL", "31;1"), "not checked": ("--  ", "33")}[status]
    values = (("expected", expected), ("actual  ", actual)) if status == "failed" and expected else ()
    cells = [name.ljust(width), "" if values else _shorten(actual)]
    if status == "passed" and expected not in ("", actual) and len(expected) <= 128:
        cells.append(f"({expected})")  # for example a range
    if status != "passed" or detail.startswith("legacy"):
        cells.append(detail[:1000])
    yield _paint(mark, sgr, color) + " " + plain_text("  ".join(filter(None, cells))).rstrip()
    for word, value in values:
        yield f"     {'':{width}}{word} {plain_text(value[:1000]) or '(empty)'}"


def _sentence(verdict: Verdict, color: bool, when: str) -> str:
    """Return the verdict in one sentence: what is proven, and what is not."""
    passed = {check.name: check.actual for check in verdict.checks if check.status == "passed"}
    alone = ("provenance digest", "not checked") in [check[:2] for check in verdict.checks]
    others = "".join(
        f"; not covered: {plain_text(check.actual)[:1000]}" for check in verdict.checks if check.name == "other files"
    )
    if "quote_version" in verdict.claims:
        tcb = passed.get("TCB status")
        others += f"; TCB status {tcb}" if tcb else "; TCB status, revocation: not checked"
    if verdict.verdict == "failed":
        names = [plain_text(check.name) for check in verdict.failures]
        ran = sum(check.status != "not checked" for check in verdict.checks)
        shown = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
        sgr, said = "31;1", f"{len(names)} of {ran} checks failed ({shown}): nothing is proven"
    elif verdict.verdict == "simulated":
        agree = "the evidence is consistent" if alone else "artifacts, provenance and evidence agree"
        if verdict.claims.get("builder_id") == QEMU_BUILDER:
            agree += " that this was built in a QEMU guest, which is not confidential"
        sgr, said = (
            "33;1",
            (
                f"{agree}, but no hardware signed the evidence, "
                f"so it does not prove where or by whom this was built{others}"
            ),
        )
    else:
        proven = "the provenance lists exactly these artifacts, and it"
        if alone:
            proven = "the evidence alone (no provenance, no artifact)"
        sgr, said = "32;1", f"{proven} was signed {_signer(verdict, passed)}{others}"
    return _paint(verdict.verdict.upper(), sgr, color) + f"{when}: {said}"


def _signer(verdict: Verdict, passed: Strings) -> str:
    """Return where the evidence was signed, claiming only what the passed checks prove."""
    amd = f"AMD {plain_text(str(verdict.claims.get('product')))}"
    processor = f"an {'Intel' if 'quote_version' in verdict.claims else amd} processor"
    # On Azure, the report names a key, and that key signs. Anybody can obtain a report that names their own key, so
    # only a check of the measurement ties the key to a VM.
    if verdict.platform.startswith("az-") and MEASURED.isdisjoint(passed):
        place = (
            f"with a key that a report of {processor} names; anybody can obtain such a report for their own key, "
            "so it may not have been signed in a VM at all"
        )
    elif verdict.claims.get("debug"):
        place = f"in a VM in debug mode, which its host can read and change, on {processor}"
    else:
        place = f"in a confidential VM on {processor}"
    return place if "trust anchors" in passed else place + ", if the keys of --roots are the manufacturer's"


def _paint(text: str, sgr: str, color: bool) -> str:
    return f"\x1b[{sgr}m{text}\x1b[0m" if color else text


class Display:
    """Progress of one build.

    form: "plain" prints one line per event to stream; "live" draws one line per phase with its time, and the latest
    lines of the build below it; "auto" is "live" if stream is a terminal, else "plain"; "quiet" prints only failures;
    "json" prints nothing.
    timed: show how long phases took; False if the events may be older than the display.
    began: when it was made.
    """

    def __init__(self, stream: IO[str], form: str, timed: bool = True) -> None:
        if form == "auto":
            form = "live" if stream.isatty() and os.environ.get("TERM") != "dumb" else "plain"
        self.form = form
        self.began = time.monotonic()
        self._stream = stream
        self._color = wants_color(stream)
        self._timed = timed
        self._phase = ""
        self._since = 0.0  # when the phase began
        self._lines = 0  # of the phase
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._bar: list[str] = []  # the line that the next one replaces, such as a progress bar
        self._drawn = 0  # rows that the next output replaces
        self._drawn_at = 0.0
        self._lock = threading.RLock()  # held while writing to the stream
        self._over = threading.Event()
        if form == "live":
            threading.Thread(target=self._tick, name="clock", daemon=True).start()

    def _tick(self) -> None:
        while not self._over.wait(0.25):
            with self._lock:
                self._draw()

    def note(self, text: str) -> None:
        """Print a line of confbuild itself, unless the form is quiet or json."""
        if self.form in ("plain", "live"):
            with self._lock:
                self._put([f"confbuild: {plain_text(text)}"])

    def event(self, event: Json) -> None:
        """Show one event of the stream, also of an unknown type. end() shows `complete`."""
        kind = plain_text(str(event["type"]))[:20]
        if "msg" in event:
            text = str(event["msg"])
        elif kind == "queued" and set(event) == {"type", "position"}:
            text = "next" if event["position"] == 0 else f"place {event['position']} in line"
        else:
            text = compact_json({name: value for name, value in event.items() if name != "type"})
        if kind != "complete":
            self.show(kind, [text])

    def show(self, kind: str, lines: Sequence[str]) -> None:
        """Show lines of the phase kind. One that ends with CR is replaced by the next one."""
        with self._lock:
            if kind != self._phase:
                self._draw(final=True)
                self._phase, self._since, self._lines = kind, time.monotonic(), 0
                self._tail.clear()
            self._bar = [plain_text(line) for line in lines[-1:] if line.endswith("\r")]
            if "\r" in "".join(lines):
                lines = [line for line in lines if not line.endswith("\r")]
            self._lines += len(lines)
            if self.form != "plain":
                lines = lines[-TAIL:]  # no more are ever shown
            if not "".join(lines).isprintable():
                lines = [plain_text(line) for line in lines]
            self._tail.extend(lines[-TAIL:])
            if self.form == "plain" and lines:
                start = f"{kind:10} "
                self._put([start + line for line in lines])
            elif time.monotonic() - self._drawn_at > 0.05:
                self._draw()

    def end(self, failure: Json | None, where: Callable[[], str] | None = None) -> None:
        """Show the end of the build.

        failure: the result of `complete` if the build failed.
        where: returns where the earlier lines of the build are; called if only the last ones are shown. None: no line
            is shown.
        """
        self._over.set()
        with self._lock:
            self._draw(final=True)
            rows = []
            if failure and where and self._phase == "build" and self.form in ("live", "quiet"):
                if self._lines > TAIL:
                    rows.append(f"  ... {self._lines - TAIL:,} earlier lines {where()}")
                rows += [f"  {line}" for line in self._tail]
            if failure:
                word = "confbuild: error:" if self.form == "quiet" else _paint("failed", "31;1", self._color) + "    "
                rows.append(word + plain_text(f" {failure.get('error_type')}: {failure.get('error')}"))
            elif self.form != "quiet":
                rows.append(_paint("complete", "32", self._color) + "   ok")
            self._phase = ""
            if self.form != "json":
                self._put(rows)

    def _put(self, rows: Sequence[str], drawn: int = 0) -> None:
        """Replace what was drawn by rows; the next call replaces the last `drawn` of them."""
        erase = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        self._stream.write(erase + "\n".join([*rows, ""]))
        self._stream.flush()
        self._drawn = drawn

    def _draw(self, final: bool = False) -> None:
        """Draw the current phase, and its latest lines unless it is final."""
        if self.form != "live" or not self._phase:
            return
        self._drawn_at = time.monotonic()
        last = [*self._tail, *self._bar]
        said = "".join(last[-1:])
        if self._phase == "build":
            said = f"{self._lines} line{'s' if self._lines != 1 else ''}"
        took = f"{self._drawn_at - self._since:6.1f} s" if self._timed else ""
        rows = [f"{self._phase:10} {took}  {said}"]
        if self._phase == "build" and not final:
            rows += ["  " + line for line in last[-8:]]
        try:  # the terminal that is drawn on: stdout may be a pipe
            width = os.get_terminal_size(self._stream.fileno()).columns or 80  # 0: unknown
        except OSError:
            width = shutil.get_terminal_size().columns
        self._put([cut_to_cells(row, width - 1) for row in rows], 0 if final else len(rows))


# endregion 43
# ==============================================================================
# region 44. Server set-up  [uses 18, 19, 21, 25, 26, 28, 32, 33, 35, 36, 37, 38, 39, 40, 43]
# ==============================================================================
# From parsed options to a running server: check what the options ask of this machine, then wire VMs, jobs, streams, API
# and HTTP server together. `serve` and a local `build` both call prepare_platform and start_server.
#
# Thread "accept": started by start_server, runs Server.serve_forever, ends by Running.stop.


def _is_loopback(host: str) -> bool:
    """Return whether only this machine can reach host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# MiB. Measured with QEMU 10.0.2 and an initrd of 33 MB: a guest does not boot with 200, and builds with 384.
MIN_MEMORY = 384
_GUEST_OPTIONS = "--vcpus --vcpu-type --memory --guest-network"
_IMAGE_HINT = "`confbuild image --help` says how to make one"


def _refuse(options: "argparse.Namespace", names: str, why: str) -> None:
    """Raise UsageError if one of these options was given, since it would have no effect."""
    for name in names.split():
        if name in options.given:
            raise UsageError(name + why)


class BuildPlatform(NamedTuple):
    """The VMs that this machine can offer to builds.

    guest, facts, launch_digest: of QEMU guests: how each is started, its image, and its launch digest in hexadecimal.
    note: one sentence for people.
    sandbox, protections: of simulated VMs: how builds are confined, and for each protection "" or why it is missing.
    """

    platform: Platform
    guest: Guest | None
    facts: ImageFacts | None
    launch_digest: str
    note: str
    sandbox: Sandbox | None = None
    protections: Strings | None = None


def prepare_platform(options: "argparse.Namespace") -> BuildPlatform:
    """Return the platform that --vm, --tee and --image ask for.

    There is no fallback: raises UsageError if this machine or the image lacks something that the platform needs.
    """
    _refuse(options, "" if options.vm_command else "--vm-cleanup --expect", " requires --vm-command")
    for name in sorted(OWN_VARIABLES & {*options.env}):
        raise UsageError(f"--env {name} has no effect: builds have a {name} of their own")
    if options.vm_command:
        return _command_platform(options)
    kind = options.vm or ("snp" if options.tee else "sim")
    if options.tee and kind != "snp":
        raise UsageError(f"--tee is --vm snp, not --vm {kind}")
    platform = GUEST_PLATFORMS.get(kind)
    if not platform:
        _refuse(
            options,
            f"--image {_GUEST_OPTIONS} --cbitpos --vek --print-command",
            " requires --tee, --vm snp or --vm qemu",
        )
        return _simulated_platform(options)
    _refuse(
        options,
        "--env --readable --no-isolation --cache",
        " requires simulated VMs: a guest sees nothing of this machine",
    )
    if not platform.confidential:
        _refuse(options, "--cbitpos", " requires --tee or --vm snp")
    elif not options.print_command:
        _require_snp(options.image)
    if not options.image:
        raise UsageError(f"--vm {kind} requires --image DIR, the image that the guest boots", _IMAGE_HINT)
    facts, image = check_image(options.image), read_image(abspath(options.image))  # QEMU runs in another folder
    if facts.parts or facts.firmware:
        raise ImageError(
            f"{options.image}: {facts.parts or facts.firmware}",
            f"`confbuild image --check {shlex.quote(options.image)}` says what is wrong; a new image repairs it",
        )
    guest = Guest(platform, image, options.vcpus, options.vcpu_type, options.memory, options.guest_network)
    if guest.memory_mib < MIN_MEMORY:
        raise UsageError(f"--memory {guest.memory_mib}: a guest needs {MIN_MEMORY} MiB to boot")
    label = vcpu_label(guest.vcpu_type, guest.vcpus)
    digest = facts.launch_digests.get(label)
    if not digest:
        raise ImageError(
            f"{options.image} is made for {', '.join(facts.launch_digests)}, not for {label}",
            "--vcpu-type and --vcpus of `confbuild image -o` add launch digests for other vCPUs to a new image",
        )
    if platform.confidential:
        eax, ebx = sev_cpuid()
        found = ebx & 63 if eax >> 4 & 1 else guest.cbitpos
        guest = guest._replace(cbitpos=options.cbitpos or found)
        return BuildPlatform(platform, guest, facts, digest, "SEV-SNP guests")
    version = qemu_version()
    if not version:
        raise UsageError("qemu-system-x86_64 is not installed", "`apt-get install qemu-system-x86` or the like")
    guest = guest._replace(firmware=version >= FIRMWARE_QEMU)
    how = f"QEMU {version[0]}.{version[1]} itself (the image's firmware requires QEMU 10)"
    if guest.firmware:
        how = "the image's firmware, which checks kernel, initrd and command line"
    note = f"QEMU guests, booted by {how}: builds are not confidential, and no hardware signs their evidence"
    return BuildPlatform(platform, guest, facts, digest, note)


def _simulated_platform(options: "argparse.Namespace") -> BuildPlatform:
    """Return simulated VMs, with the protections that this kernel offers against their builds.

    Raises UsageError if --require-isolation asks for more.
    """
    env, (_, port) = build_environment("", os.environ, options.env), options.listen or ("", -1)
    for path in options.readable:
        if not exists(path):
            raise UsageError(f"--readable {path}: no such file or folder")
    if options.cache:
        os.makedirs(options.cache, 0o700, exist_ok=True)
    usable, landlock, seccomp = probe_sandbox()
    proxies = " ".join(value for name, value in env.items() if name.lower().endswith("_proxy"))
    shared = port in {80, 443, *map(int, re.findall(r":(\d{1,5})\b", proxies))}
    taken = f"builds fetch from port {port}, on which the service listens" * shared
    protections = judge_protections(usable.abi, landlock, seccomp, taken)
    if options.no_isolation:
        _refuse(options, "--readable", " has no effect with --no-isolation")
        protections = dict.fromkeys(protections, "switched off by --no-isolation")
    missing = [f"{name} ({why})" for name, why in protections.items() if why]
    if missing and options.require_isolation:
        raise UsageError(
            f"--require-isolation: this machine cannot protect {', '.join(missing)}",
            "leave the option out, or build in guests: --tee or --vm qemu",
        )
    sandbox = usable._replace(
        readable=[*readable_paths(env, os.path.expanduser("~")), *map(realpath, options.readable)]
    )
    return BuildPlatform(
        SIMULATED_PLATFORM,
        None,
        None,
        "",
        "simulated VMs: builds are not confidential, and run as this user; " + protection_text(protections),
        None if options.no_isolation else sandbox,
        protections,
    )


def _command_platform(options: "argparse.Namespace") -> BuildPlatform:
    """Return the VMs that --vm-command starts, with the evidence that --expect names. Raises UsageError, ImageError."""
    _refuse(
        options,
        "--tee --vm --readable --no-isolation --require-isolation --cache --guest-network --cbitpos --print-command",
        " cannot be combined with --vm-command",
    )
    for name, text in (("--vm-command", options.vm_command), ("--vm-cleanup", options.vm_cleanup)):
        try:
            program = (shlex.split(text or "") or [""])[0]
        except ValueError as e:
            raise UsageError(f"{name} {text}: {e}") from None
        if text and not shutil.which(program):
            raise UsageError(f"{name} {text}: there is no program {program!r}")
    facts = check_image(options.image) if options.image else None
    platform = {row.name: row for row in (SIMULATED_PLATFORM, SNP_PLATFORM)}[options.expect]
    digest = facts.launch_digests.get(vcpu_label(options.vcpu_type, options.vcpus), "") if facts else ""
    note = f"VMs of `{options.vm_command}`, whose evidence must be of the platform {platform.name}"
    note += "" if platform.confidential else ": builds are not confidential, and no hardware signs their evidence"
    return BuildPlatform(
        platform._replace(label=f"VM of {shlex.split(options.vm_command)[0]}", boot_timeout_s=GUEST_BOOT_TIMEOUT_S),
        None,
        facts,
        digest,
        note,
    )


def _require_snp(image: str | None) -> None:
    """Print a table and raise UsageError if this machine lacks something that an SEV-SNP guest needs."""
    checks = [*preflight(), Check("--image DIR", "passed" if image else "failed", "", "missing", _IMAGE_HINT)]
    missing = [check for check in checks if check.status != "passed"]
    if not missing:
        return
    for check in checks:
        if check in missing:
            say(f"MISS  {check.name}: {check.actual}", check.detail)
        else:
            say(f"ok    {check.name}")
    raise UsageError(
        f"this machine cannot run SEV-SNP guests: {len(missing)} of {len(checks)} requirements are missing; "
        "nothing was started",
        "`--vm qemu` boots the same image in a guest that is not confidential",
    )


class LocalClient(ApiClient):
    """Client of a server in this process. It needs no port that builds or other users could reach."""

    def __init__(self, server: Server, notify: Callable[[str], None]) -> None:
        super().__init__("http://localhost", notify=notify)
        self._server = server

    def _send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Any:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._server.take(Connection(theirs, "local", False, 0.0))
        connection = connect_over(ours)
        connection.request(method, path, body, {**headers, "Connection": "close"})
        return connection.getresponse()


class Running(NamedTuple):
    """A server in this process.

    url: empty if it listens on no port.
    stop: ends it; running builds get that many seconds.
    is_alive: whether it accepts requests.
    connect: called with a function for messages to the user; returns a client of the server.
    pool: keeps VMs waiting after start(), which only a caller that can also stop them should call.
    """

    url: str
    stop: Callable[[float], None]
    is_alive: Callable[[], bool]
    connect: Callable[[Callable[[str], None]], ApiClient]
    pool: VmPool


def _tls_context(options: "argparse.Namespace") -> "ssl.SSLContext | None":
    """Return the context of --tls-cert and --tls-key. Raises UsageError."""
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    if options.tls_cert is None:
        return None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        tls.load_cert_chain(options.tls_cert, options.tls_key)
    except OSError as e:  # also ssl.SSLError
        raise UsageError(
            f"--tls-cert {options.tls_cert}, --tls-key {options.tls_key}: {e.strerror or e}",
            "both must be readable PEM files that belong together",
        ) from None
    return tls


def _gauges(streamer: Streamer, state: str) -> dict[str, float]:
    """Return metrics of the process and of its disk and streams."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "confbuild_events_sent_total": streamer.events,
        "confbuild_bytes_sent_total": streamer.bytes,
        "confbuild_watchers": len(streamer.served),
        "confbuild_disk_free_bytes": shutil.disk_usage(state).free,
        "process_cpu_seconds_total": usage.ru_utime + usage.ru_stime,
        "process_resident_memory_bytes": int(read_limited("/proc/self/statm", KIB).split()[1]) * resource.getpagesize(),
    }


def _raise_file_limit() -> int:
    """Raise the limit of file descriptors, of which each watcher needs one, as far as possible, and return it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # some systems report no limit and have one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def start_server(options: "argparse.Namespace", state: str, tokens: Sequence[str], machine: BuildPlatform) -> Running:
    """Start a server on options.listen, with its state in the directory state.

    options.listen: None for no port: then only Running.connect reaches the server.
    tokens: accepted bearer tokens; if there are none, everybody may build.
    Raises UsageError, OSError.
    """
    address, port = options.listen or ("localhost", 0)
    host = address.strip("[]")
    files = _raise_file_limit()
    lock = claim_state(state)
    guard_process()
    forks = None if options.vm_command or machine.guest else fork_server()
    tls = _tls_context(options)
    sys.setswitchinterval(0.0005)  # lets the streamer run between two blocks of a build's output
    sizes = options.max_archive * MIB, MAX_UNPACKED, options.max_ratio
    local = _is_loopback(host) and not options.public_host  # a proxy brings clients of other machines
    policy = SourcePolicy((*SCHEMES, *options.allow_scheme), local, *sizes, options.allow_filters)
    pool = VmPool(
        functools.partial(Vm, vm_kind(options, state, policy, machine, lambda: int(server.server_address[1]), forks)),
        options.boot_timeout or machine.platform.boot_timeout_s,
        True,
        options.warm,
    )
    pool.single_use = options.single_use

    def make_fetcher(url: str, ref: str) -> Vm:
        told = {"policy": policy._asdict(), "repo_url": url, "repo_ref": ref}
        return Vm(own_vms("fetcher", told, forks=forks), FETCH)

    vms = VmHost(pool, make_fetcher, options.build_timeout, machine.platform.expectations(machine.facts))
    streamer = Streamer()
    limits = (options.slots, options.queue, options.single_use, options.keep_days, options.keep_bytes)
    jobs = Jobs(state, vms.run, streamer.grown, *limits)
    access = AccessPolicy(tokens, [host.lower(), *(name.lower() for name in options.public_host)])
    said = f"; {protection_text(machine.protections)}" if machine.protections else ""
    greeting = machine.platform.greeting and f": {machine.platform.greeting}{said}\n\n"
    api = Api(
        jobs,
        policy,
        _describe_server(options, machine),
        pool.attestation,
        greeting.encode("ascii"),
        lambda: streamer.files >= max(files - 1024, files // 2),  # the rest is for requests, jobs and VMs
        lambda: {**jobs.gauges(), "confbuild_slots": options.slots, **_gauges(streamer, state)},
    )
    try:
        server = Server((host, port) if options.listen else None, api, access, streamer, tls)
    except OSError as e:
        raise UsageError(
            f"--listen {address}:{port}: {e.strerror or e}", "--listen 127.0.0.1:0 takes a free port"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="accept", daemon=True)
    jobs.start()
    thread.start()

    def stop(grace_s: float) -> None:
        if jobs.stop(grace_s):
            time.sleep(min(grace_s, 2.0))  # for clients that followed the build and now download its result
        server.stop()
        streamer.stop()
        pool.stop()
        if forks:
            forks.stop()
        os.close(lock)

    url = f"{'https' if tls else 'http'}://{address}:{server.server_address[1]}" if options.listen else ""
    return Running(url, stop, thread.is_alive, functools.partial(LocalClient, server), pool)


def vm_kind(
    options: "argparse.Namespace",
    state: str,
    policy: SourcePolicy,
    machine: BuildPlatform,
    port: Callable[[], int],
    forks: ForkServer | None = None,
) -> VmKind:
    """Remove what VMs of an earlier server left behind, and return the kind of VM that builds run in.

    port: returns the port of the service; called when the first VM is made.
    """
    guest, folder = machine.guest, join(state, "guests")
    vek = options.vek and base64.b64encode(options.vek).decode("ascii")
    told = {"policy": policy._asdict(), "vek": vek}
    if options.vm_command:
        more = {
            "CONFBUILD_IMAGE": options.image or "",
            "CONFBUILD_VCPUS": str(options.vcpus),
            "CONFBUILD_MEMORY": str(options.memory),
        }
        told |= {"env": options.env}
        kind = command_vms(options.vm_command, options.vm_cleanup or "", machine.platform, told, folder, more)
    elif guest:
        kind = qemu_vms(guest, told, folder)
    else:
        # Builds do not see these, even in readable folders: state, cache, secrets of the service, and all workspaces.
        secret = [state, options.token_file, options.tls_key, options.cache]
        hidden = [realpath(path) + "/" for path in filter(None, secret)]
        hidden.append(join(realpath(tempfile.gettempdir()), "confbuild-"))
        box = machine.sandbox and machine.sandbox._replace(hidden=hidden)
        none = not options.listen or (machine.protections or {}).get("ports")
        ports = functools.cache(lambda: -1 if none else close_port(port()))  # one ruleset for all VMs
        told |= {"cache": options.cache and abspath(options.cache)}
        return own_vms("agent", told, options.env, lambda: box and box._replace(ports=ports()), forks)
    os.makedirs(folder, mode=0o700, exist_ok=True)

    def clean(name: str) -> None:
        path = join(folder, name)
        with suppress(OSError):
            finish_cleaning(kind.clean_up(name, read_limited(join(path, "job"), 100).decode("ascii", "replace")))
        remove_tree(path)

    with concurrent.futures.ThreadPoolExecutor(64) as workers:  # at a time: each may take CLEAN_UP_S
        list(workers.map(clean, [name for name in os.listdir(folder) if name.startswith(WORKSPACE)]))
    return kind


def _describe_server(options: "argparse.Namespace", machine: BuildPlatform) -> dict[str, Any]:
    """Return the document of GET /config.  [CONTRACT 1.13]"""
    facts, platform = machine.facts, machine.platform
    if options.vm_command:
        isolation = "a VM for each build, which a command of the operator starts; only its evidence says what it is"
    elif facts:
        network = "with" if options.guest_network else "without"
        isolation = f"a guest for each build, which runs there as another user, {network} a network"
        isolation += "" if platform.confidential else "; the host can read and change it"
    elif machine.protections and not machine.protections["files"]:
        isolation = (
            "Landlock, seccomp and limits: a build is a process of the server's user that writes only in its workspace"
        )
    else:
        isolation = "none: a build is a process of the server's user, with its own environment and folders"
    return {
        "platform": platform.name,
        "confidential": platform.confidential,
        "notice": platform.notice,
        "image": facts
        and {
            "manifest_sha256": facts.manifest_sha256,
            "launch_digests": dict(facts.launch_digests),
            **(machine.guest.image.origin if machine.guest else {}),
        },
        "measurement": machine.launch_digest or (None if platform.confidential else simulated_measurement().hex()),
        "limits": {
            "archive_bytes": options.max_archive * MIB,
            "unpacked_bytes": MAX_UNPACKED,
            "members": MAX_MEMBERS,
            "queue": options.queue,
            "slots": options.slots,
            "boot_s": options.boot_timeout or platform.boot_timeout_s,
            "build_s": options.build_timeout,
            "single_use": options.single_use,
        },
        "toolchains": machine.protections and {t.name: all(map(shutil.which, t.tools)) for t in TOOLCHAINS},
        "isolation": isolation,
        "protections": machine.protections and {name: why or "in effect" for name, why in machine.protections.items()},
        "version": __version__,
    }


def _read_tokens(path: str | None) -> list[str]:
    """Return the bearer tokens in the file at path; none without a path. Raises UsageError, OSError."""
    if not path:
        return []
    tokens = read_limited(path, MIB).split()
    if not tokens or not all(map(bytes.isascii, tokens)):
        raise UsageError(f"--token-file {path}: no token in it, or one that is not ASCII")
    return [token.decode("ascii") for token in tokens]


def _read_der(path: str) -> bytes:
    """Return the DER of a certificate or revocation list in a DER or PEM file. Raises Malformed, OSError."""
    data = read_limited(path, MAX_JSON)
    match = re.fullmatch(rb"\s*-----BEGIN [A-Z0-9 ]+-----([A-Za-z0-9+/=\s]+)-----END [A-Z0-9 ]+-----\s*", data)
    return decode_base64(b"".join(match[1].split()).decode("ascii"), path) if match else data


# endregion 44
# ==============================================================================
# region 45. Commands [uses 7, 8, 13, 14, 15, 16, 17, 18, 21, 22, 23, 24, 25, 26, 27, 29, 31, 35, 36, 39, 40, 43, 44]
# ==============================================================================
# The commands, which wire the sections together.  Results go to stdout, progress and diagnostics to stderr.

MAX_VERIFIED = 256 * GIB  # of an archive; its contents are only hashed, so this only limits the time
CLOCK_SKEW_S = 300  # by which the builder's clock may be ahead of ours


def _json_line(record: "logging.LogRecord") -> str:
    """Return a record of the log as a JSON object: `serve --log-format json`.  [CONTRACT 5.7]"""
    doc = {"time": utc_time(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
    if record.exc_info:
        doc["exception"] = logging.Formatter().formatException(record.exc_info)
    return compact_json(doc | getattr(record, "fields", {}))


def notify_systemd(state: str) -> None:
    """Report the state of the service to systemd, if it asked for that.  [sd_notify(3)]"""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode("ascii"), re.sub("^@", "\0", address))


UNIT = """[Unit]
Description=confbuild, a build service
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
ExecStart={} serve --state ${{STATE_DIRECTORY}}
Restart=always
WatchdogSec=30
TimeoutStopSec=60
KillMode=mixed
LimitNOFILE=1048576
DynamicUser=yes
StateDirectory=confbuild
StateDirectoryMode=0700
UMask=0077
# The toolchains of builds must lie outside of /home. Guests need more: DeviceAllow=/dev/kvm rw, or /dev/sev.
ProtectHome=yes
ProtectSystem=strict
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
PrivateDevices=yes
PrivateTmp=yes
PrivateUsers=yes
RemoveIPC=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
SOCKET_UNIT = """[Unit]
Description=confbuild, a build service

[Socket]
ListenStream=127.0.0.1:8080
Backlog=4096
NoDelay=yes

[Install]
WantedBy=sockets.target
"""


def cmd_unit(options: "argparse.Namespace") -> None:
    """Print a systemd unit.  [systemd.exec(5), systemd.socket(5)]"""
    program = [abspath(sys.executable), abspath(sys.argv[0])]
    print(SOCKET_UNIT if options.socket else UNIT.format(shlex.join(program)), end="")
    for path in program:
        if realpath(path).startswith(("/home/", "/root/")):
            say(f"the service cannot see {path}", "install Python for all users, and put confbuild.py into /opt")


def cmd_serve(options: "argparse.Namespace") -> None:
    """Run the build service until a signal."""
    reexec_without_ast()
    tokens = _read_tokens(options.token_file)
    logger().setLevel(logging.DEBUG if options.verbose else logging.INFO)
    report: Callable[[str], None] = say
    if options.log_format == "json":
        report, formatter = logger().info, logging.Formatter()
        formatter.format = _json_line  # type: ignore[method-assign]
        for handler in logging.getLogger().handlers:
            handler.setFormatter(formatter)
    inherited = inherited_socket()
    if inherited is not None:
        _refuse(options, "--listen", " has no effect: LISTEN_FDS passes a socket that already listens")
        host, port = inherited.getsockname()[:2]
        options.listen = f"[{host}]" if ":" in host else host, port
    host, port = options.listen
    if not _is_loopback(host) and not tokens and not options.insecure:
        raise UsageError(
            f"--listen {host}:{port}: other machines can reach this address",
            "give --token-file FILE, or --insecure to let everybody build",
        )
    machine = prepare_platform(options)
    if options.print_command and machine.guest:
        print(shlex.join(qemu_argv(machine.guest, "HASHES_PAGE")))
        return
    first_at = float("inf")
    stopped, stopper = os.pipe()

    def stop(*_: Any) -> None:
        nonlocal first_at
        # A second signal: VMs end with this process, and the next server runs their jobs again. One signal of
        # timeout(1) comes twice: for the process, and for its group.
        if monotonic() - first_at > 0.1:
            os._exit(EXIT_INTERRUPTED)
        first_at = min(first_at, monotonic())
        os.write(stopper, b"\0")  # takes no lock; this thread could hold that of an Event, waiting for it

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    running = start_server(options, options.state or join(data, "confbuild"), tokens, machine)
    running.pool.start()
    report(f"serving on {running.url}")
    report(machine.note)
    notify_systemd("READY=1")
    while not select.select([stopped], [], [], 1.0)[0]:  # if another thread gets the signal, stop() runs then
        if running.is_alive():
            notify_systemd("WATCHDOG=1")
    notify_systemd("STOPPING=1")
    report(f"stopping; running builds have {options.grace:g} s")
    running.stop(options.grace)


class Client(NamedTuple):
    """A server and how to talk about it. arguments: the options that name the server, for commands in hints."""

    service: ApiClient
    display: Display
    arguments: Sequence[str] = ()

    def command(self, *arguments: str) -> str:
        """Return a command line for this server that people can paste."""
        return shlex.join([*own_command(), *arguments, *self.arguments])


def _client(options: "argparse.Namespace", display: Display | None = None) -> Client:
    """Return the server that the options or the environment name. Raises UsageError."""
    if not options.server:
        raise UsageError("no server is given", "give --server URL, or set CONFBUILD_SERVER")
    [token, *_] = [*_read_tokens(options.token_file), ""]
    display = display or Display(sys.stderr, options.format)
    arguments = ["--server", options.server] + ["--token-file", options.token_file] * bool(options.token_file)
    return Client(ApiClient(options.server, token, display.note), display, arguments)


def _find_job(client: Client, job: str) -> str:
    """Return the id of the only job of the server that begins with job. Raises UsageError, RemoteError."""
    if not re.fullmatch("[0-9a-f-]{2,35}", job):  # an id, or a server's own kind of id
        return job
    ids = [str(row["job_id"]) for row in client.service.jobs("GET", "/builds", several=True)]
    found = [job_id for job_id in ids if job_id.startswith(job)]
    if len(found) != 1:
        raise UsageError(
            f"{job}: {len(found) or 'no'} build ids begin with it",
            " ".join(found[:5]) or f"`{client.command('list')}` shows the builds of the server",
        )
    return found[0]


class Delivery(NamedTuple):
    """A bundle that is to be fetched. checks: options, besides --nonce, with which `verify` checks it again."""

    bundle: str
    expected: Expectations
    endorsements: Endorsements = Endorsements()
    checks: Sequence[str] = ()


@contextmanager
def _undisturbed_end() -> Iterator[tuple[str, ExitStack]]:
    """Yield a folder for temporary files, and a stack of what to do at the end of the block.

    No signal interrupts that end: a second Ctrl-C would leave VMs and files behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with tempfile.TemporaryDirectory(prefix="confbuild-") as scratch, ExitStack() as stack:
            try:
                yield scratch, stack
            finally:
                for number in handlers:
                    signal.signal(number, signal.SIG_IGN)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def cmd_build(options: "argparse.Namespace") -> int:
    """Submit, follow, download and verify one build.

    Without --server, a temporary server in this process builds it, which listens on no port.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # they cancel, as Ctrl-C does; nohup ignores SIGHUP
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    source, is_url = options.source, "://" in options.source
    _check_build_options(options, is_url)
    nonce = options.nonce or secrets.token_hex(NONCE_SIZE)
    name = repository_name(source) if is_url else safe_name(basename(realpath(source)))
    bundle = options.out or name + "-build"
    _check_target(bundle)
    choices = (options.toolchain, options.subdir, options.artifacts)
    machine = None if options.server else prepare_platform(options)
    expected = Expectations(nonce)
    if options.tee:  # what the VM must be before it gets the source
        facts = machine.facts if machine else options.image and check_image(options.image)
        if not facts and not options.measurements:
            raise UsageError(
                "--tee needs --image DIR or --measurement HEX: without them, a VM with any contents would do"
            )
        expected = Expectations(nonce, options.measurements, facts, require_tee=True)
    else:
        _refuse(options, "--measurement" + " --image" * (machine is None), " requires --tee")
    endorsements = Endorsements(vek=options.vek)
    with _undisturbed_end() as (scratch, stack):
        archive, request = None, BuildRequest(nonce, source, options.ref, "", *choices)
        if machine:
            options.warm = int(not machine.guest)  # a simulated VM starts while the source is packed
            running = start_server(options, join(scratch, "state"), [], machine)  # before any other thread
            stack.callback(running.stop, 0.0)
            display = Display(sys.stderr, options.format)
            client = Client(running.connect(display.note), display)  # imports: an interrupt in one would break the next
            running.pool.start()
        else:
            client = _client(options)
            display = client.display
        if not is_url:
            archive = join(scratch, name + ".tar.gz")
            request = BuildRequest(nonce, "", "", basename(archive), *choices)
            packed = _pack(options, archive, scratch)
            display.note(
                f"packed {packed.note}"
                + f" of {options.source}, since {source} needs folders beside it" * (options.source != source)
            )
            if options.tree not in ("", packed.history.tree):
                raise UsageError(f"{source} has the tree {packed.history.tree}, the bundle records {options.tree}")
            if machine and "Cargo.lock" in map(basename, packed.files):
                _tell_cargo_settings(display)
            expected = expected._replace(source_tree=packed.history.tree, source_commit=packed.history.commit)
        if machine:
            display.note(machine.note)
        if options.tee:
            _check_waiting_vm(client, expected, endorsements)
        job_id = client.service.submit(request, archive)
        if client.arguments:
            display.note(f"submitted job {job_id}; to follow it again: " + client.command("watch", job_id))
        checks = ["--source", source] * (not is_url)
        checks += ["--image", options.image] * bool(options.image and options.tee)
        delivery = Delivery(bundle, expected, endorsements, checks)
        return _follow_and_fetch(client, job_id, delivery, join(scratch, "build.log"))


def _check_build_options(options: "argparse.Namespace", is_url: bool) -> None:
    """Raise UsageError for a source that cannot be built, and for options that would have no effect.

    Widen a source that is built on this machine if it needs folders beside it.
    """
    source = options.source
    if is_url:
        options.max_ratio = MAX_RATIO
        _refuse(options, "--submodules", " requires a directory")
    elif not isdir(source):
        hint = f"is it https://{source}?" if re.match(r"[\w-]+(\.[\w-]+)+/", source) else ""
        if ":" in source:
            hint = "a repository has a URL like https://example.org/a/b.git"
        raise UsageError(f"{source}: neither a directory nor a URL", hint)
    else:
        _refuse(options, "--ref --allow-scheme", " requires a URL")
    if options.nonce is not None and not options.nonce.strip("0"):
        raise UsageError("--nonce: a nonce of zeros proves nothing, and its verification fails", "leave --nonce out")
    if options.server:
        _refuse(
            options,
            f"--vm {_GUEST_OPTIONS} --cbitpos --readable --require-isolation --no-isolation --env --max-archive "
            "--build-timeout --boot-timeout --allow-scheme --cache" + " --allow-filters" * is_url,
            " cannot be combined with --server: the server decides it",
        )
        return
    _refuse(options, "--token-file", " requires --server")
    if is_url:
        try:
            check_url(source, (*SCHEMES, *options.allow_scheme), True)
            check_ref(options.ref)
        except Refused as e:
            hint = "--allow-scheme file and --allow-scheme git accept these schemes too" * ("scheme" in str(e))
            raise UsageError(str(e).replace("repo_url", "URL").replace("repo_ref", "--ref"), hint) from None
        return
    folder = _locate(source, "", options.subdir)
    if folder is None or not isdir(join(source, folder)):
        raise UsageError(f"--subdir {options.subdir}: not a folder of {source}")
    options.subdir = folder
    if os.listdir(source):
        try:
            find_outputs(source, options.toolchain, options.subdir)
        except BuildFailed as e:
            raise UsageError(f"{normpath(join(source, options.subdir))}: {e}", e.hint) from None
        options.source, options.subdir = wider_source(source, options.subdir)


def _pack(options: "argparse.Namespace", archive: str, scratch: str) -> Source:
    """Pack the directory that is the source into archive. Raises UsageError."""
    workspace, outputs, source, subdir = join(scratch, "pack"), list[str](), options.source, options.subdir
    os.mkdir(workspace)
    try:
        with suppress(BuildFailed):  # another server may know what this is
            outputs = find_outputs(source, options.toolchain, subdir)
        packed = pack_directory(source, archive, workspace, outputs, options.submodules, options.allow_filters)
        with suppress(BuildFailed):
            found = detect_toolchains(source, options.toolchain, subdir)
            path, *others = [normpath(join(subdir, toolchain.marker)) for toolchain in found]
            if path not in packed.files:
                if subdir and not options.submodules and lexists(join(source, subdir, ".git")):
                    raise UsageError(f"{source}: {subdir} is a submodule, which is not packed", "--submodules packs it")
                said, hint = f"git ignores {path}, so it is not in the source", ["git", "-C", source, "add", "-f", path]
                if not {*others} & {*packed.files}:
                    raise UsageError(f"{source}: {said}", f"`{shlex.join(hint)}`")
                say(said, f"`{shlex.join(hint)}`")
        return packed
    except OSError as e:  # a full disk names no file
        raise UsageError(
            f"{e.filename or scratch + ' cannot be written'}: {e.strerror or e}",
            "" if e.filename else "TMPDIR names the folder of temporary files",
        ) from None


def _tell_cargo_settings(display: Display) -> None:
    """Note that a build does not see the user's configuration of cargo, if that may make it fail. [CARGO]"""
    home = os.environ.get("CARGO_HOME") or join(os.path.expanduser("~"), ".cargo")
    for path in (join(home, "config.toml"), join(home, "config")):
        with suppress(OSError, UsageError):
            if re.search(rb"(?m)^[ \t]*\[(source|registr|http|net|patch)", read_limited(path, MIB)):
                display.note(
                    f"builds do not see {path}: put the settings that they need into the source's .cargo/config.toml"
                )


def _check_waiting_vm(client: Client, expected: Expectations, endorsements: Endorsements) -> None:
    """Raise ConfbuildError unless fresh evidence proves that the server's waiting VM is the expected one."""
    display, nonce = client.display, secrets.token_hex(NONCE_SIZE)
    wanted = Expectations(nonce, expected.measurements, expected.image, require_tee=True, evidence_only=True)
    evidence = BundleFiles(None, client.service.attestation(nonce), {})
    verdict = verify_bundle(evidence, wanted, datetime.now(UTC), endorsements)
    problem = ""
    if not verdict.ok:
        display.note("the evidence of the VM that waits for the source:")
        if display.form in ("plain", "live"):
            sys.stderr.write(render_verdict(verdict, wants_color(sys.stderr)) + "\n")
        problem = "the server's VM does not verify"
    elif verdict.claims.get("signed_data") != waiting_report_data(nonce).hex():
        problem = "the server's evidence is that of a VM that has built something, not of a waiting one"
    if problem:
        raise ConfbuildError(problem + ": no byte of the source was sent")
    display.note("the VM that waits for the source verifies")


def _check_target(path: str) -> None:
    """Raise UsageError unless path is free, an empty directory, or a bundle without foreign files."""
    hint = "name another directory with -o"
    if realpath(path) == realpath("."):
        raise UsageError(f"{path} is the current directory, which cannot be replaced", hint)
    ours = not lexists(path)
    if isdir(path) and not islink(path):
        if ismount(path) or not os.access(path, os.W_OK):  # it cannot be moved away
            raise UsageError(f"{path} cannot be replaced: it is a mount point, or read-only", hint)
        names = set(os.listdir(path))
        ours = not names
        if names == BUNDLE_FILES:
            listed = subject_names(read_limited(join(path, "provenance.json"), MAX_JSON))
            ours = set(walk_files(join(path, "artifacts"))) <= set(listed)
    if not ours:
        raise UsageError(f"{path} exists and is not a bundle", hint)
    folder = dirname(abspath(path))
    while not lexists(folder):
        folder = dirname(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".confbuild-", dir=folder) as trial:
            os.mkdir(join(trial, basename(abspath(path)) + UNVERIFIED))
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror}", hint) from None


def _follow(client: Client, job_id: str, log: str, start: int = 0) -> Json | None:
    """Show the events of a job after the first `start`. Return the result of `complete`; None if there is no event.

    log: the file that gets the lines of the build; "" for none. The job was then submitted earlier.
    """
    display = client.display
    for event in client.service.events(job_id, start, submitted=bool(log)):
        if isinstance(event, list):
            kind, text = "build", "\n".join(event)  # no message has a line end: JSON escapes it
            array = text.replace("\n", '","') if "\\" in text else ""
            lines = json.loads(f'["{array}"]') if array else event
        else:
            kind, lines = event["type"], [event["msg"]] if isinstance(event.get("msg"), str) else []
        # A new attempt after a crash of the server begins with `queued`: its log starts again.
        with open(log or os.devnull, "wb" if kind == "queued" else "ab") as f:
            if kind == "build":
                f.write("\n".join([*lines, ""]).encode("utf-8", "replace"))
        if display.form == "json":
            built = (
                isinstance(event, list) and BUILD_START + text.replace("\n", f"{BUILD_END}\n{BUILD_START}") + BUILD_END
            )
            print(built or compact_json(event), flush=True)
        elif isinstance(event, list):
            display.show(kind, lines)
        else:
            display.event(event)
        if kind == "complete" and isinstance(event, dict):
            result = event.get("result")
            if not isinstance(result, dict) or result.get("status") not in ("ok", "failed"):
                raise BrokenProtocol("a `complete` event without a valid result")
            return result
    return None


def _follow_and_fetch(client: Client, job_id: str, delivery: Delivery, log: str) -> int:
    """Follow a job to its end, and fetch its bundle. An interrupt cancels the job.

    log: the file for the lines of the build; it is kept if the build fails at a temporary server.
    """
    try:
        result = _follow(client, job_id, log)
    except KeyboardInterrupt:
        client.display.end({"error_type": "Cancelled", "error": "interrupted"})
        said = "is cancelled"
        try:
            client.service.jobs("DELETE", f"/build/{job_id}")
        except RemoteError as e:
            said = f"could not be cancelled: {e}"
        client.display.note(f"interrupted; job {job_id} {said}")
        raise

    def where() -> str:
        if client.arguments:
            return _on_server(client, job_id)
        shutil.copyfile(log, delivery.bundle + ".log")
        return f"in {delivery.bundle}.log"

    failure = result if result and result["status"] == "failed" else None
    client.display.end(failure, where)
    if failure:
        return EXIT_NO
    expected = delivery.expected._replace(build_log_sha256=file_sha256(log))
    return _fetch_bundle(client, job_id, delivery._replace(expected=expected))


def _on_server(client: Client, job_id: str) -> str:
    return "on the server: " + client.command("watch", job_id, "--format", "plain")


def _fetch_bundle(client: Client, job_id: str, delivery: Delivery) -> int:
    """Download, unpack and verify a bundle; print its path.

    Say what was built, how long it took, what the verdict is, and which command verifies the bundle again.
    """
    again, nonce = "", delivery.expected.nonce
    checks = ["--nonce", nonce] if nonce else []
    if client.arguments:
        again = "the result stays on the server: " + client.command("fetch", job_id, "-o", delivery.bundle, *checks)
    try:
        _check_target(delivery.bundle)
        if exists(delivery.bundle):
            client.display.note(f"{delivery.bundle} exists; the new bundle replaces it if it verifies")
        path, verdict = _hold_bundle(client.service, job_id, delivery)
    except RemoteError as e:
        e.hint = e.hint or ("" if e.status else again)
        raise
    except (OSError, UsageError) as e:
        problem = f"{delivery.bundle} cannot be written: {e.strerror or e}" if isinstance(e, OSError) else str(e)
        hint = getattr(e, "hint", again) if again else _keep_result(client.service, job_id)
        raise UsageError(problem, hint) from None
    display, good = client.display, verdict.verdict != "failed"
    shown = render_verdict(verdict, wants_color(sys.stderr)) + "\n"
    if display.form == "json":
        print(compact_json({"type": "bundle", "path": path, "nonce": nonce, **verdict.to_wire()}))
    elif not good:
        sys.stderr.write(shown)
        say(f"the result is kept as {path}")
    elif display.form != "quiet":
        folder = join(path, "artifacts")
        for name in walk_files(folder):
            file = join(folder, name)
            display.note(f"artifact {name}  {size_text(getsize(file))}  sha256:{file_sha256(file)}")
        sys.stderr.write(shown[: shown.index("\n") + 1])
        if nonce is None:
            display.note("not checked: nonce (--nonce)")
        display.note(f"took {time.monotonic() - display.began:.1f} s")
        command = [*own_command(), "verify", path, *delivery.checks, *checks]
        status = " (exit status 3: simulated)" * (verdict.verdict == "simulated")
        display.note("to verify it again: " + shlex.join(command) + status)
    if display.form != "json":
        print(path)
    return EXIT_OK if good else EXIT_UNVERIFIED


def _keep_result(service: ApiClient, job_id: str) -> str:
    """Save the result of a temporary server, which ends now, in TMPDIR, and return how to use it."""
    folder = tempfile.mkdtemp(prefix="confbuild-")
    archive = join(folder, "result.tar.gz")
    try:
        service.download(job_id, archive)
    except (OSError, RemoteError) as e:
        remove_tree(folder)
        return f"the temporary server and its result are gone ({e}): build again"
    return f"the result is kept: {shlex.join([*own_command(), 'verify', archive])}"


def _hold_bundle(service: ApiClient, job_id: str, delivery: Delivery) -> tuple[str, Verdict]:
    """Download a result; return its path and its verdict.

    A result that verifies replaces the directory delivery.bundle, with all artifacts in artifacts/. Any other one is
    kept as it came, as bundle + ".unverified.tar.gz".
    Raises OSError, RemoteError.
    """
    bundle = delivery.bundle
    parent = dirname(abspath(bundle))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".confbuild-", dir=parent) as scratch:
        archive, root = join(scratch, "result.tar.gz"), join(scratch, "bundle")
        os.mkdir(root)
        service.download(job_id, archive)
        try:
            files = read_bundle(archive, MAX_RESULT)
            verdict = verify_bundle(files, delivery.expected, datetime.now(UTC), delivery.endorsements)
            if verdict.verdict != "failed":
                unpack_archive(archive, root, MAX_RESULT)
        except (UsageError, BuildFailed) as e:
            why = str(e).replace(archive, "the result")
            verdict = Verdict("failed", "unknown", {}, [Check("result form", "failed", detail=why)])
        if verdict.verdict == "failed":  # it must not replace a good bundle
            bundle += UNVERIFIED
            os.replace(archive, bundle)
            return bundle, verdict
        root, _ = find_project(root, "")
        os.makedirs(join(root, "artifacts"), exist_ok=True)
        for name in set(os.listdir(root)) - BUNDLE_FILES:  # an artifact, or an equal copy of one
            os.replace(join(root, name), join(root, "artifacts", name))
        with suppress(FileNotFoundError):  # not removed here: an interrupt would leave a part of it
            os.rename(bundle, join(scratch, "old"))
        os.rename(root, bundle)
    return bundle, verdict


_OPEN = ("queued", "running")


def cmd_watch(options: "argparse.Namespace") -> int:
    """Follow a job."""
    client = _client(options, Display(sys.stderr, options.format, timed=False))
    job_id = _find_job(client, options.job)
    result = _follow(client, job_id, "", options.start)
    if result is not None:
        client.display.end(result if result["status"] == "failed" else None, lambda: _on_server(client, job_id))
    else:  # it had ended before
        [result] = client.service.jobs("GET", f"/build/{job_id}")
        client.display.note(f"there is nothing after event {options.start}; the build is {_status_text(result)}")
    return EXIT_OK if result["status"] == "ok" else EXIT_NO


def _status_text(job: Json) -> str:
    """Return the status of a job for people, who call a cancelled build cancelled."""
    return "cancelled" if job.get("error_type") == "Cancelled" else str(job["status"])


def cmd_list(options: "argparse.Namespace") -> None:
    """List the jobs of a server, newest first."""
    client = _client(options)
    jobs = client.service.jobs("GET", "/builds", several=True)
    if options.format in ("json", "quiet"):
        for job in jobs:
            print(compact_json(job) if options.format == "json" else plain_text(job["job_id"]))
        return
    if not jobs:
        client.display.note("no builds yet")
        return
    print(f"{'JOB':36}  {'STATUS':9}  {'SUBMITTED (UTC)':19}  {'TOOK':>8}  SOURCE")
    for job in jobs:
        source = job.get("repo_url") or job.get("source_name") or ""
        row = f"{job['job_id']:36}  {_status_text(job):9}  {job['submitted_at'][:19]}  {_took(job):>8}  {source}"
        print(plain_text(row).rstrip())


def _took(job: Json) -> str:
    """Return how long a finished job ran, or "" if its server does not say."""
    try:
        began, ended = (datetime.fromisoformat(job[f"{word}_at"]) for word in ("started", "finished"))
        return f"{max(0.0, (ended - began).total_seconds()):.1f} s"  # the clock may have been set back
    except (KeyError, TypeError, ValueError):
        return ""


def cmd_cancel(options: "argparse.Namespace") -> None:
    """Cancel a job."""
    client = _client(options)
    path = f"/build/{_find_job(client, options.job)}"
    [job] = client.service.jobs("DELETE", path)
    status = "" if job["status"] in _OPEN else f"already finished ({_status_text(job)})"
    deadline = time.monotonic() + 5
    while job["status"] in _OPEN and time.monotonic() < deadline:  # ending the build takes a moment
        time.sleep(0.1)
        [job] = client.service.jobs("GET", path)
    text = plain_text(f"{job['job_id']}  {status or _status_text(job)}")
    print(compact_json(job) if options.format == "json" else text)


def cmd_fetch(options: "argparse.Namespace") -> int:
    """Download and verify the bundle of a finished job."""
    client = _client(options)
    job_id = _find_job(client, options.job)
    bundle = options.out
    if not bundle:  # as `build` would have named it
        [job] = client.service.jobs("GET", f"/build/{job_id}")
        name = str(job.get("source_name") or job.get("repo_url") or job_id)
        bundle = repository_name(without_suffix(name)) + "-build"
    try:
        return _fetch_bundle(client, job_id, Delivery(bundle, Expectations(options.nonce)))
    except RemoteError as e:
        if e.status == 404:
            [job] = client.service.jobs("GET", f"/build/{job_id}")
            if job["status"] == "failed":
                raise ConfbuildError(f"the build failed: {job.get('error_type')}: {job.get('error')}") from None
        raise


def _read_roots(directory: str) -> Anchors:
    """Return the keys in <product>/{ark,ask,asvk}.der and intel/root.der of directory. Raises UsageError, OSError."""
    roles = {**dict.fromkeys(TCB_LAYOUTS, ("ark", "ask", "asvk")), "Intel": ("root",)}
    anchors = {}
    for name in os.listdir(directory):
        product = name.capitalize()
        files = {role: _read_der(join(directory, name, f"{role}.der")) for role in roles.get(product, ())}
        if files:
            anchors[product] = make_anchors(product, **files)
    if not anchors:
        products = ", ".join(name.lower() for name in roles)
        raise UsageError(f"--roots {directory}: expected a directory {products} in it")
    return anchors


def _read_expectations(options: "argparse.Namespace", now: float) -> Expectations:
    """Return what the options except --source require. The dest of an option names the field. Raises UsageError."""
    given = {name: value for name, value in vars(options).items() if name in Expectations._fields and value != []}
    for field in ("pcrs", "rtmrs"):
        registers = given[field]
        if registers is not None:
            given[field] = dict(registers)
            if len(given[field]) != len(registers):
                raise UsageError(f"--{field[:-1]}: one register is given twice")
    if options.igvm is not None:
        digest, _, _, problem = read_igvm(options.igvm, options.disk, lambda step, digest: None)
        given |= {"igvm": digest.hex(), "disk": None if options.disk is None else problem}
    elif options.disk is not None:
        raise UsageError("--disk requires --igvm")
    if options.max_age is not None:
        given["finished"] = utc_time(now - options.max_age), utc_time(now + CLOCK_SKEW_S)
    return Expectations(**given)


def _bundle_hint(path: str) -> str:
    """Return a hint for a path that is not a bundle: what the user may have meant."""
    with suppress(OSError):
        if isdir(path):
            for inside in (join(path, name) for name in sorted(os.listdir(path))):
                if isfile(join(inside, "evidence.json")):
                    return f"{inside} is a bundle"
        folder, name = os.path.split(path)
        if name in BUNDLE_FILES:
            return f"that is part of a bundle: verify {folder or '.'}"
        with open(path, "rb") as f:
            if b'"error_type"' in f.read(KIB):
                return "this is a server's error message, not a bundle: use curl -f"
    return "give a directory that holds evidence.json, or a gzip tarball of a bundle"


def _read_bundle(path: str, alone: bool = False) -> BundleFiles:
    """Return the bundle at path. Raises UsageError with a hint."""
    try:
        return read_bundle(path, MAX_VERIFIED, alone)
    except UsageError as e:
        raise UsageError(str(e), _bundle_hint(path)) from None


def cmd_verify(options: "argparse.Namespace") -> int:
    """Print the verdicts over bundles. Opens no socket."""
    when = options.at or datetime.fromtimestamp(time.time(), UTC)
    at = utc_time(when.timestamp()) if options.at else ""
    with suppress(OSError):  # an earlier summary must not seem to be about this bundle
        os.truncate(options.vsa or "", 0)
    expected = _read_expectations(options, when.timestamp())
    endorsements = Endorsements(options.roots, options.crl, options.vek, options.collateral)

    @functools.cache
    def of_source(provenance: bytes) -> Expectations:
        if options.source is None:
            return expected
        wanted, note = source_expectations(options.source, expected, provenance)
        if not re.fullmatch("commit [0-9a-f]+", note):
            say(f"--source {options.source}: {note}")
        return wanted

    statuses = []
    for path in options.bundles:
        alone = options.evidence_only or is_bare_evidence(path)
        if options.vsa is not None and (alone or len(options.bundles) > 1):
            raise UsageError("--vsa requires exactly one bundle, with a provenance")
        try:
            files = _read_bundle(path, alone)
            wanted = of_source(files.provenance or b"")
            verdict = verify_bundle(files, wanted._replace(evidence_only=alone), when, endorsements)
        except UsageError as e:
            say(f"error: {e}", e.hint)
            status, wire = EXIT_USAGE, {"verdict": "failed", "error": str(e)}
        else:
            simulated = EXIT_OK if options.allow_simulated else EXIT_SIMULATED
            status = {"passed": EXIT_OK, "failed": EXIT_NO, "simulated": simulated}[verdict.verdict]
            wire = verdict.to_wire()
            if options.format == "text":
                if len(options.bundles) > 1:
                    print(plain_text(path))
                print(render_verdict(verdict, wants_color(sys.stdout), options.verbose, at))
            if options.vsa is not None:
                summary = make_vsa(files, verdict, status == EXIT_OK, wanted, when)
                with open(options.vsa, "w") as f:  # in place: it may be /dev/stdout
                    f.write(json.dumps(summary, indent=2) + "\n")  # ASCII: a hostile file's name need not be UTF-8
        if options.format == "json":
            print(json.dumps({"schema": 1, "bundle": path, **({"at": at} if at else {}), **wire}))
        statuses.append(status)
    return max(statuses, key=(EXIT_OK, EXIT_SIMULATED, EXIT_NO, EXIT_USAGE).index)


def _read_verified(path: str) -> tuple[Any, Verdict]:
    """Return the Statement of the bundle at path, and the verdict without expectations.  Raises UsageError."""
    files = _read_bundle(path)
    doc = read_statement(files.provenance or b"")
    if doc is None:
        raise UsageError(
            f"{path}: provenance.json is missing or malformed", f"`confbuild verify {shlex.quote(path)}` says why"
        )
    return doc, verify_bundle(files, Expectations(), datetime.now(UTC))


def _report_failed(path: str, verdict: Verdict) -> int:
    """Return the exit status for a bundle, after reporting that it fails to verify if it does."""
    if verdict.verdict != "failed":
        return EXIT_OK
    say(f"error: {path} fails to verify", f"`confbuild verify {shlex.quote(path)}` says why")
    return EXIT_NO


def cmd_diff(options: "argparse.Namespace") -> int:
    """Print how two bundles differ; 0 if they are equal, and 1 if they differ or one of them fails to verify.

    [CONTRACT 5.9]
    """
    paths = options.a, options.b
    docs, verdicts = zip(*map(_read_verified, paths), strict=True)
    facts = [*map(bundle_facts, docs, verdicts)]
    rows = differences(*facts)
    equal = not any([rows, *map(_report_failed, paths, verdicts)])
    sides = [(*side, verdict.verdict) for *side, verdict in zip("ab", "-+", paths, verdicts, strict=True)]
    lines = [f"{sign} {path}: {verdict}" for _, sign, path, verdict in sides]
    for part in facts[0]:
        changed = [row for row in rows if row["part"] == part]
        lines.append(f"{part}: {'' if changed else 'the same'}".rstrip())
        for row in changed:
            lines.append(f"    {row['name']}")
            lines += [f"  {sign}     {row[x] or 'empty'}" for x, sign, *_ in sides if row[x] is not None]
    if options.format == "json":
        bundles = {x: {"bundle": path, "verdict": verdict} for x, _, path, verdict in sides}
        print(json.dumps({"schema": 1, **bundles, "equal": equal, "differences": rows}))
    else:
        print(*map(plain_text, lines), sep="\n")
    return EXIT_OK if equal else EXIT_NO


def _unpacked(path: str, scratch: str) -> str:
    """Return a new folder below scratch with the files of an archive, or "" if path is not one."""
    root = tempfile.mkdtemp(dir=scratch)
    try:
        unpack_archive(path, root, MAX_VERIFIED, MAX_UNPACKED)
        return root
    except BuildFailed:
        return ""


def _explain_artifact(folders: Sequence[str], name: str, scratch: str) -> str:
    """Return the first difference between the artifacts called name of the bundles in two folders."""
    pair = [next(filter(isfile, (join(f, "artifacts", name), join(f, name)))) for f in folders]
    where, roots = "", [_unpacked(path, scratch) for path in pair]
    if all(roots):
        one, other = (
            {file: file_sha256(join(root, file)) for file in walk_files(root) if not islink(join(root, file))}
            for root in roots
        )
        changed = sorted(file for file, _ in one.items() ^ other.items())
        if not changed:
            return "the archives have the same files; links, modes, times, order or compression differ"
        if changed[0] not in one.keys() & other.keys():
            return f"only one archive has {changed[0]}"
        where, pair = f"{changed[0]} in the archive, ", [join(root, changed[0]) for root in roots]
    return where + explain_difference(*(read_regular(path, GIB) for path in pair))


def _request_again(options: "argparse.Namespace", facts: Facts) -> None:
    """Set the options of `build` that request the build of a bundle once more.  Raises UsageError."""
    recorded, build = facts["source"], facts["build"]
    uri, commit = recorded["uri"], recorded.get("gitCommit")
    options.source = options.source or uri * ("://" in uri)
    is_url = "://" in options.source
    options.ref, options.tree = commit if is_url else "", recorded["gitTree"]
    options.submodules = any(name.startswith("pkg:generic/") for name in facts["dependencies"])
    for problem, found in (
        ("records no repository", not options.source),
        ("records no commit", is_url and not commit),
        ("was built with submodules, which no URL delivers", is_url and options.submodules),
    ):
        if found:
            raise UsageError(f"{options.bundle} {problem}", "--source DIR names a checkout of its source")
    try:
        options.source, options.subdir, words = read_command(build["command"], options.source)
    except ValueError as e:
        raise UsageError(f"{options.bundle}: buildCommand {build['command'][:200]!r}: {e}") from None
    options.artifacts = words[words.index("artifacts:") + 1 :] if "artifacts:" in words else []
    own_type = build["type"] == CONFBUILD_TYPE
    ours, theirs = ("npm ci --ignore-scripts &&", "go mod download &&"), ("cargo build", "nix build", "pnpm install")
    options.toolchain = words[0] if " ".join(words).startswith(ours if own_type else theirs) else "own"


def cmd_rebuild(options: "argparse.Namespace") -> int:
    """Build the source of a bundle again and compare: 0 if all artifacts are the same, and 1 if they differ."""
    path = options.bundle
    if basename(path) == "evidence.json":
        path = dirname(path) or "."
    if not isdir(path) and not isfile(path):  # such as "-": a pipe cannot be read twice
        raise UsageError(f"{path}: no such directory or archive")
    options.out = options.out or without_suffix(basename(realpath(path))) + "-rebuild"
    if realpath(options.out) == realpath(path):  # it would be replaced, and then compared with itself
        raise UsageError(f"-o {options.out} is the bundle to compare with", "name another directory with -o")
    doc, verdict = _read_verified(path)
    status = _report_failed(path, verdict)
    if status == EXIT_OK:
        before = bundle_facts(doc, verdict)
        _request_again(options, before)
        status = cmd_build(options)
    if status != EXIT_OK:
        return status
    again, verdict = _read_verified(options.out)
    after = bundle_facts(again, verdict)
    tree = after["source"]["gitTree"]
    if tree != options.tree:
        raise UsageError(f"{options.source} has the tree {tree}, the bundle records {options.tree}")
    others = [row for row in differences(before, after) if row["part"] == "toolchain" and row["name"] != "kettle"]
    for row in others:
        say(f"{row['name']}: recorded {row['a']}, here {row['b']}")
    if others and not options.any_toolchain:
        raise UsageError(
            "the compilers or tools differ from the recorded ones", "--any-toolchain compares the artifacts anyway"
        )
    names = "build_path build_environment build_kernel build_cpu".split()
    varied = [name for name in names if byproduct(doc, name) not in (None, byproduct(again, name))]
    one, other = before["artifacts"], after["artifacts"]
    if varied and one != other:
        say(f"these differ too: {', '.join(varied)}")
    with tempfile.TemporaryDirectory(prefix="confbuild-") as scratch:
        roots = [find_project(p if isdir(p) else _unpacked(p, scratch), "")[0] for p in (path, options.out)]
        for name in {**one, **other}:
            equal, said = one.get(name) == other.get(name), "only one bundle has it"
            if equal:
                said = f"the same, sha256:{one[name]}"
            elif name in one and name in other:
                said = f"different: {_explain_artifact(roots, name, scratch)}"
            line = compact_json({"type": "artifact", "name": name, "equal": equal, "detail": said})
            print(line if options.format == "json" else plain_text(f"{name}: {said}"))
    return EXIT_OK if one == other else EXIT_NO


def cmd_sbom(options: "argparse.Namespace") -> int:
    """Print the bill of materials of a bundle; 1 if the bundle fails to verify."""
    doc, verdict = _read_verified(options.bundle)
    print(json.dumps(make_sbom(doc), indent=2))
    return _report_failed(options.bundle, verdict)


def read_igvm(path: str, disk: str | None, explain: Explain) -> tuple[bytes, str, str, str]:
    """Return (launch digest, command line as JSON, its root hash, problem) of an IGVM file.

    disk: file whose dm-verity tree must have the root hash, or None.
    problem: why the disk does not have it, or why the command line or the root hash is empty; or empty.
    Raises UsageError if the file has no launch digest.
    """
    data, command_line, root_hash, problem = read_limited(path, MAX_IGVM), "", "", ""
    with open(disk or path, "rb") as d:
        try:
            steps, measured = parse_igvm(data)
        except Malformed as e:
            raise UsageError(f"{path}: {e}") from None
        try:
            text = kernel_command_line(measured)
            command_line = json.dumps(text)
            root_hash = root_hash_of(text)
            if disk is not None:
                verify_disk(lambda at, size: os.pread(d.fileno(), size, at), root_hash)
        except Malformed as e:
            problem = str(e)
    return extend_digest(steps, explain), command_line, root_hash, problem


_DIRECT_BOOT = "--kernel --initrd --append --vcpus --vcpu-type --vcpu-sig --guest-features --vmm"


def cmd_measure(options: "argparse.Namespace") -> int:
    """Print the launch digest of an IGVM file, or of a firmware, a kernel, an initrd and a command line."""
    digests: list[str] = []

    def explain(step: str, digest: bytes) -> None:
        digests.append(base64.b64encode(digest).decode("ascii") if options.output_format == "base64" else digest.hex())
        if options.explain:
            print(f"{digests[-1]}  {step}")

    if options.igvm is not None:
        _refuse(options, f"{_DIRECT_BOOT} --ovmf-hash", " has no effect with --igvm")
        _, command_line, root_hash, problem = read_igvm(options.igvm, options.disk, explain)
        found = f"command line  {command_line or 'none'}\nroot hash     {root_hash or 'none'}"
        print(f"{digests[-1]}\n{found}")
        if problem:
            say(f"warning: {options.disk or options.igvm}: {problem}")
        return EXIT_NO if problem and options.disk is not None else EXIT_OK
    _refuse(options, "--disk", " requires --igvm")
    if options.ovmf_hash:
        _refuse(options, _DIRECT_BOOT, " has no effect with --ovmf-hash")
        options.vcpus, options.vcpu_sig = 1, 0
    if options.kernel is None:
        _refuse(options, "--initrd --append", " requires --kernel")
    absent = [options.vcpu_type, options.vcpu_sig].count(None)
    if options.vcpus is None or absent == 0 or (absent == 2 and options.vmm == VMMS[0]):  # others have their own
        raise UsageError("measure: give --vcpus N, and exactly one of --vcpu-type MODEL and --vcpu-sig X")
    try:
        firmware, hashes = parse_firmware(options.firmware), None
        if options.kernel is not None:
            hashes = boot_hashes(options.kernel, options.initrd, options.append)
        signature = CPU_SIGNATURES.get(options.vcpu_type, options.vcpu_sig or 0)
        compute_launch_digest(firmware, hashes, options.vcpus, signature, options.guest_features, options.vmm, explain)
    except Malformed as e:
        raise UsageError(str(e)) from None
    # Without a kernel, only the firmware is measured.
    state = "" if hashes is None else firmware_state(options.firmware)
    if state:
        say(f"warning: firmware: {state}")
        say("warning: this digest proves nothing about the code that ran")
    print(digests[0 if options.ovmf_hash else -1])  # the firmware is the first step
    return EXIT_OK


def cmd_attest(options: "argparse.Namespace") -> None:
    """Print evidence for a provenance, from the hardware of this confidential VM."""
    report, table = get_report(report_data(options.provenance, options.nonce))
    platform = options.platform or ("tdx" if table is None else "snp")
    evidence = hardware_evidence(report, table, platform, fetch_vek if options.fetch_vek else None)
    if b'"cert_chain": null' in evidence:
        say("the host gave no certificate of the signing key: verifiers will need --vek")
    print(evidence.decode("ascii"), end="")


_IMAGE_PARTS = "--rootfs --packages --debs --kernel --modules --firmware --vcpus --vcpu-type"


def cmd_image(options: "argparse.Namespace") -> int:
    """Make an image, check one, or write the lock file of an image's packages."""
    if bool(options.names) is (options.lock is None):
        raise UsageError("--lock LOCK and the names of packages go together")
    _refuse(options, "--without" * (options.lock is None), " requires --lock")
    _refuse(options, _IMAGE_PARTS * (options.out is None), " requires -o")
    if options.lock is not None:
        data = write_lock(options.names, options.without or ())
        with open(options.lock, "wb") as f:
            f.write(data)
        print(f"{len(data.splitlines())} packages in {options.lock}")
        return EXIT_OK
    if options.out is not None:
        given = [name for name in ("rootfs", "packages", "debs") if getattr(options, name) is not None]
        if given not in (["rootfs"], ["packages", "debs"]):
            raise UsageError("image: give either --rootfs DIR, or --packages LOCK and --debs FOLDER")
        vcpus = [(kind, count) for kind in options.vcpu_type or ["EPYC-v4"] for count in options.vcpus or [1]]
        names = "rootfs packages debs kernel firmware modules".split()  # in the order of ImageInput
        make_image(options.out, ImageInput._make([*(getattr(options, name) or "" for name in names), vcpus]))
    facts = check_image(options.check or options.out)
    print(f"image.json  sha256 {facts.manifest_sha256}")
    print(f"parts       {plain_text(facts.parts) or 'ok: those of image.json'}")
    print(f"firmware    {plain_text(facts.firmware) or 'ok: starts only the measured kernel'}")
    for label, digest in facts.launch_digests.items():
        print(f"measured    {label}: {digest}")
    return EXIT_NO if facts.parts or facts.firmware else EXIT_OK


def cmd_sweep(options: "argparse.Namespace") -> None:
    """Remove the workspace of a VM; not for people."""
    if not basename(options.workspace).startswith(WORKSPACE):
        raise UsageError(f"{options.workspace} is not the workspace of a VM: expected the name {WORKSPACE}…")
    os.chdir("/")
    kill_all(lambda: descendants(os.getpid()))  # what the agent has started while it became this command
    remove_workspace(options.workspace)


# endregion 45
# ==============================================================================
# region 46. Options         [uses 8, 9, 11, 13, 21, 22, 25, 37, 39, 43, 44, 45]
# ==============================================================================
# The command line [CONTRACT 5.1]: the options of each command, their types, one row per command, help, completion, and
# main, which translates errors to exit statuses.


def _typed(pattern: str, expected: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Return an argparse type that converts a text that matches pattern and refuses any other.

    expected: names the accepted texts in errors.
    convert: may raise ValueError.
    """

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if re.fullmatch(pattern, text, re.ASCII):
                return convert(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    return parse


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type that reads the file or folder with this name."""

    def parse(path: str) -> Any:
        try:
            return read(path)
        except OSError as e:
            problem = f"{e.filename or repr(path)}: {e.strerror}"
        except ConfbuildError as e:
            problem = str(e)
        raise argparse.ArgumentTypeError(problem)

    return parse


def _hex(*digits: int) -> Callable[[str], Any]:
    """Return an argparse type for one of these numbers of hexadecimal digits, with or without 0x, in lower case."""
    pattern = "|".join(f"(0x)?[0-9a-fA-F]{{{count}}}" for count in digits)
    expected = f"{' or '.join(map(str, digits))} hexadecimal digits"
    return _typed(pattern, expected, lambda text: text.lower().removeprefix("0x"))


def _read_levels(text: str) -> dict[str, int]:
    levels, product = {}, ""
    for found, name, level in re.findall("(?:([a-z]+):)?([a-z]+)=([^,]+)", text):
        product, is_td = found or product, name == "tdx"
        key = name if is_td else f"{product}:{name}".lstrip(":")
        # All components of a TD in one number; those that are left out are 0.
        value = int(level.ljust(32, "0"), 16) if is_td else int(level)
        known = is_td or name in TCB_LAYOUTS["Turin"] and value < 256
        if key in levels or not known or product not in ("", *(p.lower() for p in TCB_LAYOUTS)):
            raise ValueError(text)
        levels[key] = value
    return levels


def _register(count: int, digits: int) -> Callable[[str], Any]:
    """Return an argparse type for one of count registers and its value."""

    def convert(text: str) -> tuple[int, str]:
        register, _, value = text.partition("=")
        if int(register) >= count:
            raise ValueError(text)
        return int(register), value.lower().removeprefix("0x")

    expected = f"a register below {count} and its value, such as {count // 6}=HEX with {digits} digits"
    return _typed(f"[0-9]{{1,2}}=(0x)?[0-9a-fA-F]{{{digits}}}", expected, convert)


def _read_guest_policy(text: str) -> tuple[int, int, int]:
    mask, value, abi = 0, 0, 0
    for part in text.split(","):
        name, _, given = part.partition("=")
        bits = wanted = 0
        if name == "abi":
            abi = max(abi, int.from_bytes(bytes(map(int, given.split("."))), "big"))
        elif name in POLICY_NAMES:
            bits = 1 << 16 + POLICY_NAMES.index(name)
            wanted = bits * int(given or "1")
        else:
            bits, wanted = int(name, 0), int(given, 0)
        if mask & bits or wanted & ~bits:
            raise ValueError(text)
        mask, value = mask | bits, value | wanted
    return mask, value, abi


def _read_platform_info(text: str) -> int:
    bits = 0
    for name in text.split(","):
        bits |= 1 << PLATFORM_NAMES.index(name) if name in PLATFORM_NAMES else int(name, 0)
    return bits


def _read_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if int(port) > 65535:
        raise ValueError(text)
    return host, int(port)


_text = _typed("(?s).+", "a value: it is empty")
_contents = _reader(lambda path: read_limited(path, MAX_JSON))
_der = _reader(_read_der)
_digest = _reader(lambda path: bytes.fromhex(file_sha256(path)))
_address = _typed(
    r"([^:\s]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}",
    "HOST:PORT or [IPV6]:PORT, with a port of at most 65535",
    _read_address,
)
_host = _typed(
    r"[0-9A-Za-z._-]+|\[?[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,7}\]?",
    "the name or address of a host, without a port",
    lambda text: text.strip("[]"),
)
_count = _typed("[0-9]{1,10}", "a whole number with at most 10 digits", int)
_positive = _typed(r"(?!0+\Z)[0-9]{1,9}", "a whole number above zero with at most 9 digits", int)
_integer = _typed(
    "0x[0-9a-fA-F]{1,16}|[0-9]{1,20}",
    "a whole number such as 33 or 0x21",
    lambda text: int(text, 16 if text[:2] == "0x" else 10),
)
_seconds = _typed(r"[0-9]{1,9}(\.[0-9]{1,3})?", "a number of seconds", float)
_age = _typed(
    "[0-9]{1,6}[smhd]",
    "an age such as 90m, 24h or 30d",
    lambda text: int(text[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[text[-1]],
)
_size = _typed(
    "[0-9]{1,9}[KMGT]",
    "a whole number with its unit, such as 500M or 20G",
    lambda text: int(text[:-1]) << 10 * " KMGT".index(text[-1]),
)
_nonce = _typed(NONCE_PATTERN, "a nonce: expected 32 hexadecimal digits or a UUID", parse_nonce)
_LEVEL_ITEM = "(([a-z]+:)?(?!tdx)[a-z]+=[0-9]{1,3}|tdx=([0-9a-fA-F]{2}){1,16})"
_levels = _typed(
    f"{_LEVEL_ITEM}(,{_LEVEL_ITEM})*",
    "a list of levels such as bootloader=4,snp=24 or milan:snp=24,genoa:snp=23,tdx=050104",
    _read_levels,
)
_NUMBER = "0x[0-9a-fA-F]{1,16}|[0-9]{1,19}"
_ITEM = rf"((?!abi)[a-z][a-z0-9-]+(=[01])?|abi=[0-9]{{1,3}}\.[0-9]{{1,3}}|(?!(0x)?0+=)({_NUMBER})=({_NUMBER}))"
_guest_policy = _typed(
    f"{_ITEM}(,{_ITEM})*",
    f"a list of NAME, NAME=0, MASK=VALUE and abi=MAJOR.MINOR; the names are {', '.join(filter(None, POLICY_NAMES))}",
    _read_guest_policy,
)
_ITEM = f"([a-z][a-z0-9-]+|{_NUMBER})"
_platform_info = _typed(
    f"{_ITEM}(,{_ITEM})*", f"a list of numbers and of the names {', '.join(PLATFORM_NAMES)}", _read_platform_info
)
_firmware = _typed(
    r"[0-9]{1,3}\.[0-9]{1,3}(\.[0-9]{1,3})?",
    "a version such as 1.55 or 1.55.40",
    lambda text: tuple(map(int, text.split("."))),
)


# Rows that several commands share  [CONTRACT 5.7, 5.8].
_FORMAT = (
    "--format --output FORMAT",
    "auto (live progress on a terminal), plain, json or quiet (default: auto)",
    ("auto", "plain", "json", "quiet"),
    "auto",
)
_CLIENT_TOKEN = ("--token-file FILE", "file with the server's bearer token (default: CONFBUILD_TOKEN_FILE)", str)
_CLIENT = (("--server URL", "the server (default: CONFBUILD_SERVER)", str), _CLIENT_TOKEN, _FORMAT)
_JOB = ("JOB job", "id of the job, or its first characters", _typed("[0-9A-Za-z-]{1,64}", "the id of a job"))
# Of a server that builds on this machine, temporary or not.
_MACHINE: Sequence[Any] = (
    "builds on this machine",
    ("--allow-scheme SCHEME...", "accept git URLs with this scheme too: file or git", ("file", "git"), []),
    ("--env NAME...", "pass this environment variable to builds", _typed("[^=]+", "the name of a variable"), []),
    ("--cache DIR", "keep the crates that cargo fetches, for later builds"),
    ("--readable DIR...", "let builds in simulated VMs read this folder too", _text, []),
    ("--require-isolation", "refuse to start if this machine cannot be protected from its builds"),
    ("--no-isolation", "let builds in simulated VMs do whatever this user may do"),
    (
        "--boot-timeout S",
        f"seconds that a VM may take to start (default: {BOOT_TIMEOUT_S:g}; a guest: {GUEST_BOOT_TIMEOUT_S:g})",
        _seconds,
    ),
    ("--build-timeout S", "seconds that a build may take (default: %(default)g)", _seconds, BUILD_TIMEOUT_S),
    ("--max-archive MIB", "maximum size of an uploaded archive (default: %(default)s)", _positive, MAX_ARCHIVE // MIB),
    ("--allow-filters", "accept sources with filters, such as git LFS; the filters are not run"),
    "VMs",
    ("--tee", "build in SEV-SNP guests, or name what this machine lacks for them (same as --vm snp)"),
    (
        "--vm KIND",
        "sim: simulated VMs (default); qemu: QEMU guests that are not confidential; snp: SEV-SNP guests",
        ("sim", "qemu", "snp"),
    ),
    ("--image DIR", "image that guests boot, made by `confbuild image`"),
    ("--vcpus N", "virtual processors of a guest; measured (default: %(default)s)", _positive, 1),
    ("--vcpu-type T", "their QEMU model; measured (default: %(default)s)", _text, "EPYC-v4"),
    ("--memory MIB", "memory of a guest (default: %(default)s)", _positive, 2048),
    ("--guest-network", "let guests reach the network; the provenance says so"),
    ("--cbitpos N", "position of the C-bit in an SEV-SNP guest (default: from /dev/cpu/0/cpuid, else 51)", _positive),
    ("--vek FILE", "VCEK certificate of this host, for guests that get none from QEMU", _der),
)


_SUBMISSION = (
    ("--server URL", "build on this server (default: CONFBUILD_SERVER; empty: build here)", str),
    _CLIENT_TOKEN,
    ("--nonce HEX", "32 hexadecimal digits or a UUID (default: random)", _nonce),
    _FORMAT,
    ("--measurement HEX... measurements", "with --tee: launch digest that the server's VM may have", _hex(96)),
    *_MACHINE,
)


class Command(NamedTuple):
    """A command of the program.

    group: its heading in the help; "" hides it.
    rows: its arguments and options. A text is the heading of the rows below it; below "one of", exactly one of them
        must be given. A row is (words, help, type or choices, default), where words are the names of the option, its
        metavar and its dest:
            "--verbose"              without a metavar: a flag
            "--crl FILE..."          repeatable
            "--vcpus N!"             required
            "--policy FILE?"         may be given once; its function refuses a second one
            "BUNDLE+ bundles"        without a name: an argument, here one or more; "*" is any number
            "--pcr N=HEX... pcrs"    a dest, if it is not the first long name; those of `verify` are fields of
                                     Expectations
    defaults: of options that the command does not have, but its function reads.
    """

    name: str
    run: "Callable[[argparse.Namespace], int | None]"
    rows: Sequence[Any] = ()
    group: str = ""
    summary: str = ""
    example: str = ""
    note: str = ""
    defaults: Json = {}


def cmd_completion(options: "argparse.Namespace") -> None:
    """Print a script that completes commands, options and choices."""
    shown = {row.name: command_parser(row)._actions for row in COMMANDS if row.group}
    # A row: the words to offer, if "(number of words before) (command) (word before) (this word)" has the form of the
    # pattern. Without a row, the shell offers files.
    rows = [("1 *", " ".join(shown))]
    for command, actions in shown.items():
        rows += [
            (f"* {command} {name} *", " ".join(action.choices))
            for action in actions
            for name in action.option_strings or [command]
            if action.choices
        ]
        rows.append((f"* {command} * -*", " ".join(name for action in actions for name in action.option_strings)))
    fish = options.shell == "fish"
    head, line, tail = _COMPLETION[fish]
    lines = [line % (pattern if fish else pattern.replace(" ", "\\ "), words) for pattern, words in rows]
    zsh = "autoload -Uz compinit bashcompinit\ncompinit -u\nbashcompinit\n" if options.shell == "zsh" else ""
    print(zsh + head + "".join(lines) + tail, end="")


# Head, row and tail of the script for bash and zsh, and of the one for fish.
_COMPLETION = (
    (
        """_confbuild() {
  local words=
  case "$COMP_CWORD ${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]} ${COMP_WORDS[COMP_CWORD]}" in
""",
        "    %s) words='%s';;\n",
        """  esac
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _confbuild confbuild confbuild.py
""",
    ),
    (
        """function __confbuild
  set -l words (commandline -opc)
  set -l word (commandline -ct)
  switch (count $words)" $words[2] $words[-1] $word"
""",
        "    case '%s'\n      string split -- ' ' '%s'\n",
        """    case '*'
      __fish_complete_path $word
  end
end
complete -c confbuild -c confbuild.py -f -a '(__confbuild)'
""",
    ),
)
_BUILD, _SERVICE, _CONFIDENTIAL = "Build and verify", "Service", "Confidential VMs"
# Of the temporary server of `build` and `rebuild`.
_TEMPORARY: Json = {
    "listen": None,
    "slots": 1,
    "queue": 1,
    "single_use": True,
    "public_host": [],
    "tls_cert": None,
    "tls_key": None,
    "warm": 0,  # build: 1 if the VM is simulated
    "keep_days": float("inf"),
    "keep_bytes": float("inf"),
    "print_command": False,
    "vm_command": None,
    "vm_cleanup": None,
    "max_ratio": MAX_UNPACKED,  # the user's own directory may be as compressible as it likes
}
_NAMES = tuple(toolchain.name for toolchain in TOOLCHAINS)
COMMANDS = (
    Command(
        "build",
        cmd_build,
        (
            ("DIR|URL source", "project directory or git URL"),
            ("--ref REF", "branch, tag or commit of the URL (default: its default branch)", str, ""),
            ("--submodules", "pack the submodules of DIR that are checked out; without it their folders are empty"),
            ("--toolchain NAME", f"{', '.join(_NAMES)} (default: the first whose file exists)", _NAMES, ""),
            ("--subdir DIR", "build this folder of the source", str, ""),
            ("--artifact GLOB... artifacts", "take these files as the artifacts (default: executables)", _text, []),
            ("-o --out DIR", "directory of the bundle (default: NAME-build)"),
            *_SUBMISSION,
        ),
        _BUILD,
        "build a directory or a git URL, and verify the bundle",
        "confbuild build hello",
        "With --tee, the evidence of the VM that waits at the server is verified before the source is sent. The server "
        "can still send the source elsewhere afterwards, since TLS does not end inside the VM yet.",
        {**_TEMPORARY, "tree": ""},
    ),
    Command(
        "verify",
        cmd_verify,
        (
            (
                "BUNDLE+ bundles",
                "directory or archive; - for an archive on stdin; or an evidence.json, which is verified alone if no "
                "provenance.json is next to it",
            ),
            (
                "--format FORMAT",
                "text, or json: a line with one object for each bundle (default: text)",
                ("text", "json"),
                "text",
            ),
            ("-v --verbose", "show every check, and every field of the evidence"),
            ("--vsa FILE", "write the verdict to this file too, as a SLSA Verification Summary"),
            ("--policy FILE?", "TOML file with any of the options below, without dashes; the command line wins"),
            ("--evidence-only", "verify evidence.json alone; the verdict names the other files as not covered"),
            "what was built",
            ("--nonce HEX", "nonce that was sent with the build: 32 hexadecimal digits or a UUID", _nonce),
            ("--source DIR", "checkout with the tree, lock file and dependencies of the provenance"),
            ("--source-uri URI", "origin of the source in the provenance", str),
            ("--source-commit HEX", "commit in the provenance", _hex(40, 64)),
            ("--source-tree HEX", "git tree in the provenance", _hex(40, 64)),
            ("--dep NAME@VERSION... packages", "dependency from the default registry, or a whole pkg: uri"),
            ("--builder-id ID", "builder in the provenance"),
            ("--build-type URI", "buildType in the provenance"),
            ("--max-age AGE", "maximum age of the build, by the builder's clock: 90m, 24h, 30d", _age),
            ("--allow-legacy-digest", "accept the compact digest that the five oldest bundles signed"),
            "where it was built",
            ("--measurement HEX... measurements", "launch digest of the VM; one must match", _hex(96)),
            ("--image DIR", "image that the VM booted, by its launch digest and HOST_DATA", _reader(check_image)),
            ("--igvm FILE", "IGVM file that QEMU started the VM from, by its launch digest"),
            ("--disk FILE", "disk whose whole dm-verity tree has the root hash in the IGVM file's command line"),
            (
                "--min-tcb LEVELS",
                "minimum security patch levels of each TCB, such as bootloader=4,tee=0,snp=24,microcode=219; for some "
                "products: milan:snp=24,genoa:snp=23",
                _levels,
            ),
            ("--min-firmware VERSION", "minimum version of the SNP firmware, such as 1.55.40", _firmware),
            ("--min-mit-vector X", "bits of the mitigations that must be in place, at launch and now", _integer),
            (
                "--guest-policy LIST",
                "bits of the guest policy and minimum ABI, such as debug=0,smt=0,abi=1.55 or 0xb0000=0x30000",
                _guest_policy,
            ),
            ("--platform-info LIST", "bits of PLATFORM_INFO that may be set, such as smt,ecc or 0x5", _platform_info),
            ("--vmpl N", "VMPL that asked for the report (default: 0)", _typed("[0-3]", "a VMPL: 0, 1, 2 or 3", int)),
            ("--report-data HEX", "all 64 bytes that the attester signed, for evidence alone", _hex(128)),
            ("--host-data HEX", "HOST_DATA of the report", _hex(64)),
            ("--guest-svn N", "GUEST_SVN of the report", _count),
            ("--min-guest-svn N", "minimum GUEST_SVN of the report", _count),
            ("--chip-id HEX", "CHIP_ID of the report", _hex(128)),
            ("--family-id HEX", "FAMILY_ID of the report", _hex(32)),
            ("--image-id HEX", "IMAGE_ID of the report", _hex(32)),
            ("--id-key-digest HEX", "ID_KEY_DIGEST of the report", _hex(96)),
            ("--author-key-digest HEX", "AUTHOR_KEY_DIGEST of the report", _hex(96)),
            ("--report-id HEX", "REPORT_ID of the report", _hex(64)),
            ("--csp-id NAME", "CSP_ID of the VLEK, such as CN=cc-us-east-2.amazonaws.com"),
            (
                "--pcr N=HEX... pcrs",
                "Azure: value of the virtual TPM's register N; all must match",
                _register(PCR_COUNT, 64),
            ),
            ("--rtmr N=HEX... rtmrs", "TDX: value of the register RTMR N; all must match", _register(4, 96)),
            ("--mr-config-id HEX", "TDX: MRCONFIGID", _hex(96)),
            ("--service-td HEX", "TDX: MRSERVICETD of the one service TD that may be bound", _hex(96)),
            ("--compose-hash HEX", "dstack: SHA-256 of the app's compose file, from the event log", _hex(64)),
            ("--allow-debug", "accept a VM that its host can read and change"),
            ("--require-tee", "fail for simulated evidence"),
            ("--allow-simulated", "exit with 0 instead of 3 for simulated evidence that matches"),
            "keys",
            ("--crl FILE...", "AMD's revocation list", _reader(lambda path: (basename(path), _read_der(path))), []),
            ("--require-crl", "fail without --crl of the right key that is valid now"),
            (
                "--vek FILE",
                "VCEK or VLEK, if the evidence has none: DER, PEM (with or without its chain), or a certificate table",
                _der,
            ),
            ("--collateral FILE", "Intel's TCB info, QE identity and revocation lists, as JSON", _contents),
            ("--require-collateral", "fail without --collateral"),
            (
                "--accept-tcb STATUS...",
                "accept this TCB status too: OutOfDate, ...; never Revoked",
                TCB_STATUSES[:-1],
                [],
            ),
            (
                "--at TIME",
                "verify an old bundle as of this time, such as 2026-11-23T12:00:00Z",
                _typed("[0-9]{4}-[0-9-]{5}T[0-9:]{8}Z", "a time such as 2026-11-23T12:00:00Z", datetime.fromisoformat),
            ),
            (
                "--roots DIR",
                "certificates to trust instead of the pinned keys: <product>/{ark,ask,asvk}.der, intel/root.der",
                _reader(_read_roots),
            ),
        ),
        _BUILD,
        "verify bundles, offline",
        "confbuild verify hello-build --source hello --allow-simulated",
        "PASSED: every required check ran and passed. The last line names the checks that you did not request: without "
        "--measurement or --image, any VM passes (on Azure, without --measurement, even evidence made outside of a "
        "VM); without --nonce, an old bundle passes.",
    ),
    Command(
        "diff",
        cmd_diff,
        (
            ("A a", "a bundle, as for verify"),
            ("B b", "another one"),
            ("--format FORMAT", "text, or json: one object (default: text)", ("text", "json"), "text"),
        ),
        _BUILD,
        "show how two bundles differ",
        "confbuild diff hello-build other-build",
        "Compares source, command, lock file, toolchain, dependencies, platform, measurement and artifacts. Exits with "
        "0 if they are equal, and with 1 if they differ or one of the bundles fails to verify.",
    ),
    Command(
        "rebuild",
        cmd_rebuild,
        (
            ("BUNDLE bundle", "a bundle, as for verify"),
            ("--source DIR|URL", "its source (default: the recorded repository)", str, ""),
            ("--any-toolchain", "compare the artifacts even if other compilers or tools built them"),
            ("-o --out DIR", "directory of the second bundle (default: NAME-rebuild)"),
            *_SUBMISSION,
        ),
        _BUILD,
        "build the source of a bundle again, and compare the artifacts",
        "confbuild rebuild hello-build --source hello",
        "Exits with 0 if all artifacts are the same, with 1 if they differ (the first difference of each is explained) "
        "or the bundle does not verify, and with 2 if the source or the tools are not the recorded ones. The second "
        "bundle is kept.",
        _TEMPORARY,
    ),
    Command(
        "sbom",
        cmd_sbom,
        (("BUNDLE bundle", "a bundle, as for verify"),),
        _BUILD,
        "print the bill of materials of a bundle, as CycloneDX 1.6",
        "confbuild sbom hello-build",
    ),
    Command(
        "serve",
        cmd_serve,
        (
            (
                "--listen HOST:PORT",
                "address (default: 127.0.0.1:8080); port 0 takes a free one",
                _address,
                ("127.0.0.1", 8080),
            ),
            ("--state DIR", "directory for jobs (default: ~/.local/share/confbuild)"),
            (
                "--slots N",
                "builds at a time (default: %(default)s)",
                _typed("[1-9][0-9]{0,3}", "a whole number from 1 to 9999", int),
                1,
            ),
            ("--queue N", "builds that may wait (default: %(default)s)", _positive, 1000),
            ("--single-use", "accept one build, ever"),
            ("--token-file FILE", "file with bearer tokens, one per line; a client needs one of them"),
            ("--insecure", "let other machines build without a token"),
            ("--tls-cert FILE", "certificate chain, PEM"),
            ("--tls-key FILE", "private key of the certificate, PEM"),
            ("--public-host NAME...", "name by which clients reach this server, without a port", _host, []),
            (
                "--grace S",
                "seconds that running builds get when the server is stopped (default: %(default)g)",
                _seconds,
                30.0,
            ),
            ("-v --verbose", "log requests"),
            ("--log-format FORMAT", "text, or json: an object per line (default: text)", ("text", "json"), "text"),
            (
                "--keep-days N",
                "remove builds that ended N days ago (default: keep them)",
                _typed("[0-9]{1,6}", "a number of days below a million", lambda text: int(text) * 24 * 3600),
                float("inf"),
            ),
            (
                "--keep-bytes SIZE",
                "remove the oldest builds while all that ended take more than SIZE, such as 20G (default: keep them)",
                _size,
                float("inf"),
            ),
            ("--warm N", "VMs that wait for a build, in addition to --slots (default: %(default)s)", _count, 0),
            ("--print-command", "print the command line of a guest, and exit"),
            *_MACHINE,
            "VMs elsewhere",
            (
                "--vm-command ARGV",
                "command that starts each VM; its stdin and stdout must reach `confbuild agent --stdio`",
            ),
            (
                "--vm-cleanup ARGV",
                "command to run after each VM, however it ended; both commands may contain {job} and {name}",
            ),
            (
                "--expect PLATFORM",
                "evidence that these VMs must give: simulated or snp (default: %(default)s)",
                ("simulated", "snp"),
                "simulated",
            ),
        ),
        _SERVICE,
        "run the build service",
        "confbuild serve --listen 127.0.0.1:8080",
        defaults={"max_ratio": MAX_RATIO},
    ),
    Command(
        "unit",
        cmd_unit,
        [("--socket", "print the unit of a socket that systemd opens for the service")],
        _SERVICE,
        "print a systemd unit that runs the service",
        "confbuild unit > /etc/systemd/system/confbuild.service",
    ),
    Command(
        "watch",
        cmd_watch,
        (_JOB, *_CLIENT, ("--from N start", "skip the first N events (default: 0)", _count, 0)),
        _SERVICE,
        "follow a build",
        "confbuild watch d3d8 --server http://127.0.0.1:8080",
    ),
    Command(
        "list",
        cmd_list,
        _CLIENT,
        _SERVICE,
        "list the builds of a server, newest first",
        "confbuild list --server http://127.0.0.1:8080",
    ),
    Command(
        "cancel",
        cmd_cancel,
        (_JOB, *_CLIENT),
        _SERVICE,
        "cancel a build",
        "confbuild cancel d3d8 --server http://127.0.0.1:8080",
    ),
    Command(
        "fetch",
        cmd_fetch,
        (
            _JOB,
            *_CLIENT,
            ("-o --out DIR", "directory of the bundle (default: NAME-build)"),
            ("--nonce HEX", "nonce that you sent with the build; without it the nonce is not checked", _nonce),
        ),
        _SERVICE,
        "download and verify the bundle of a finished build",
        "confbuild fetch d3d8 -o bundle --server http://127.0.0.1:8080",
    ),
    Command(
        "image",
        cmd_image,
        (
            ("NAME* names", "with --lock: a package; its dependencies are added"),
            "one of",
            ("-o --out DIR", "make an image in this new directory"),
            ("--check DIR", "recompute an image's hashes and launch digests, and look for a shim in its firmware"),
            ("--lock LOCK", "write a lock file: a line NAME VERSION SHA256 for each package"),
            "to make an image",
            ("--rootfs DIR", "the root file system"),
            ("--packages LOCK", "instead of --rootfs: Debian packages to unpack, by a lock file"),
            ("--debs FOLDER", "folder with the .deb files of --packages, found by SHA-256"),
            ("--kernel FILE", "kernel (default: boot/vmlinuz-* of the root file system)"),
            ("--modules DIR", "kernel modules (default: those of the root file system)"),
            ("--firmware FILE", "AmdSev firmware (default: usr/share/ovmf/OVMF.amdsev.fd of the root file system)"),
            ("--vcpus N...", "number of vCPUs to compute the launch digest for (default: 1)", _positive),
            ("--vcpu-type TYPE...", "QEMU model of the vCPUs (default: EPYC-v4)"),
            "to write a lock file",
            ("--without NAME...", "leave out this package, although others depend on it"),
        ),
        _CONFIDENTIAL,
        "make or check the image that guests boot",
        "confbuild image --check image",
        "An image is a firmware, a kernel, an initrd and a disk of tools. The same input gives the same bytes. "
        "Firmware that would start a file from the host instead of the measured kernel (edk2 since 2025) is sealed or "
        "refused. Of the root file system, only its Python is run.",
    ),
    Command(
        "measure",
        cmd_measure,
        (
            "one of",
            (
                "--firmware FILE",
                "OVMF, as for QEMU's -bios",
                _reader(lambda path: read_limited(path, MAX_FIRMWARE)),
            ),
            ("--igvm FILE", "IGVM file that QEMU starts; prints its kernel's command line too"),
            "with --firmware",
            ("--kernel FILE", "as for -kernel, with kernel-hashes=on (default: none is measured)", _digest),
            ("--initrd FILE", "as for -initrd", _digest),
            ("--append TEXT", "exactly as for -append", str),
            ("--vcpus N", "virtual processors at the launch: the first number of -smp", _positive),
            ("--vcpu-type MODEL", "as for -cpu, such as EPYC-v4", tuple(CPU_SIGNATURES)),
            ("--vcpu-sig X", "CPUID signature of another model: EAX of Fn0000_0001", _integer),
            ("--guest-features X", "SEV_FEATURES (default: %(default)s; with debug-swap 0x21)", _integer, 1),
            ("--vmm VMM", f"hypervisor: {', '.join(VMMS)} (default: %(default)s)", tuple(VMMS), VMMS[0]),
            ("--ovmf-hash", "print the digest of the firmware alone, which other tools call its OVMF hash"),
            "with --igvm",
            ("--disk FILE", "disk whose whole dm-verity tree must have the root hash of the command line"),
            "output",
            ("--output-format FORMAT", "hex or base64 (default: %(default)s)", ("hex", "base64"), "hex"),
            ("--explain", "print the digest after each step"),
        ),
        _CONFIDENTIAL,
        "compute the launch digest of firmware and kernel, or an IGVM file",
        "confbuild measure --firmware OVMF.fd --vcpus 1 --vcpu-type EPYC-v4",
    ),
    Command(
        "attest",
        cmd_attest,
        (
            ("FILE provenance", "provenance.json; its evidence.json is printed", _contents),
            ("--nonce HEX!", "32 hexadecimal digits or a UUID", _nonce),
            (
                "--platform PLATFORM",
                "snp, gcp-snp, tdx or gcp-tdx (default: snp or tdx, whichever this VM is)",
                ("snp", "gcp-snp", "tdx", "gcp-tdx"),
            ),
            ("--fetch-vek", "fetch a missing certificate from AMD's key service (opens a socket)"),
        ),
        _CONFIDENTIAL,
        "inside an SEV-SNP guest or a TD: get evidence for a provenance",
        "confbuild attest provenance.json --nonce 00112233445566778899aabbccddeeff",
    ),
    Command(
        "completion",
        cmd_completion,
        (("SHELL shell", "the shell that reads the script", ("bash", "zsh", "fish")),),
        "Shell",
        "print a completion script for bash, zsh or fish",
        'eval "$(confbuild completion bash)"',
    ),
    Command(
        "agent",
        lambda _: run_agent(),
        (("--stdio", "talk over standard input and output (always the case)"),),
        _SERVICE,
        "inside a VM: run one build for `confbuild serve --vm-command`",
        "confbuild agent --stdio",
    ),
    # For the machinery, not for people: fetch a repository for a VM, remove a workspace.
    Command("fetcher", lambda _: run_fetcher()),
    Command("sweep", cmd_sweep, [("DIR workspace", "the workspace")]),
)
_EXAMPLES = """
Examples
  confbuild build hello
  confbuild verify hello-build --source hello --allow-simulated
  confbuild serve --listen 127.0.0.1:8080

Exit status
  0    yes: built and verified, or verified
  1    no: the build failed, or the bundle does not verify
  2    usage error, unreadable input, or a machine without what --tee needs
  3    verify: everything matches, but the evidence is only simulated
  4    the server cannot be reached, refused a request, or broke the protocol
  5    built, but the bundle does not verify
  130  interrupted

`confbuild COMMAND --help` explains a command; `confbuild --version` prints the
version and the SHA-256 of this file."""
# Options of `verify` that a policy file cannot hold, and those that are paths, relative to the policy file.
_NOT_IN_POLICY = "help policy format verbose vsa".split()
_POLICY_PATHS = "source image igvm disk crl vek roots collateral".split()


def command_parser(command: Command) -> "argparse.ArgumentParser":
    """Return the parser of one command. Its errors are UsageErrors."""

    class Parser(argparse.ArgumentParser):
        """argparse would print its usage and exit."""

        def error(self, message: str) -> NoReturn:
            message = message.removeprefix("argument ").replace("unrecognized arguments:", "unexpected argument")
            message = message.replace("ignored explicit argument", "takes no value, but was given")
            raise UsageError(f"{command.name}: {message}", f"`confbuild {command.name} --help` lists the options")

        def print_help(self, file: Any = None) -> None:
            """Print the help. argparse would ignore that it cannot be written."""
            print(self.format_help(), end="")

    usage = [f"confbuild {command.name} [options]"]
    parser = Parser(
        prog=f"confbuild {command.name}",
        description=command.summary[:1].upper() + command.summary[1:] + ".",
        epilog=command.note,
        allow_abbrev=False,
    )
    section: Any = parser
    for row in command.rows:
        if isinstance(row, str):
            section = parser.add_argument_group(row)
            if row == "one of":
                section = section.add_mutually_exclusive_group(required=True)
        else:
            usage += _add_row(section, *row)
    parser.usage = " ".join(usage)
    parser.add_argument_group("example", command.example)
    parser.set_defaults(run=command.run, **command.defaults)
    return parser


# Mark after a metavar -> what it means to argparse.
_MARKS: Mapping[str, Json] = {
    "...": {"action": "append"},
    "?": {"action": "append"},
    "!": {"required": True},
    "+": {"nargs": "+"},
    "*": {"nargs": "*"},
}


def _add_row(parser: Any, words: str, text: str, kind: Any = _text, default: Any = None) -> list[str]:
    """Add the argument or option of a row of Command to parser, and return it for the usage if it is required."""
    [(names, metavar, mark, dest)] = re.findall(r"^((?:-\S+ ?)*)(?:(\S+?)(\.\.\.|[?!+*])?(?: (\w+))?)?$", words)
    variable = re.search(r"default: (CONFBUILD_\w+)", text)
    default = os.environ.get(variable[1], "") if variable else default
    named: dict[str, Any] = {"dest": dest} if names and dest else {}
    if metavar:
        # A file is read once, since it may be a pipe, although words next to a policy are parsed twice.
        named |= {"choices": kind} if isinstance(kind, tuple) else {"type": functools.cache(kind)}
        named |= {"metavar": metavar, "default": default}
    else:
        named["action"] = "store_true"
    text += " (repeatable)" if mark == "..." else ""
    parser.add_argument(*names.split() or [dest], help=text, **named, **_MARKS.get(mark, {}))
    many = f"[{metavar} ...]" if mark == "*" else metavar + " ..." * (mark == "+")
    return [names + many] if mark == "!" or not names else []


def help_text() -> str:
    """Return the help of the program: its commands in groups, examples and exit statuses."""
    rows = ["usage: confbuild COMMAND ...", "", "Build source code into an attested bundle, and verify such bundles."]
    for group in dict.fromkeys(command.group for command in COMMANDS if command.group):
        rows += ["", group, *(f"  {row.name:11} {row.summary}" for row in COMMANDS if row.group == group)]
    return "\n".join(rows) + "\n" + _EXAMPLES


def _similar(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return a hint that names the known word that was probably meant."""
    import difflib

    close = difflib.get_close_matches(word.lower(), known, 1)
    return f"did you mean {close[0]}?" if close else otherwise


def parse_arguments(arguments: Sequence[str]) -> "argparse.Namespace":
    """Return the options of a command; `run` is its function. Raises UsageError, and SystemExit after --help."""
    name, *words = arguments
    command = next((row for row in COMMANDS if row.name == name), None)
    if command is None:
        kind = "option" if name.startswith("-") else "command"
        # For an option of a command, `serve` would be a bad guess at --server: it only stands in the wrong place.
        names = [row.name for row in COMMANDS if row.group and kind == "command"] + ["--help", "--version"]
        more = "`confbuild --help` lists the commands; options follow the command"
        raise UsageError(f"unknown {kind} {name}", _similar(name, names, more))
    parser = command_parser(command)
    known = parser._option_string_actions
    given = set()
    for word in itertools.takewhile("--".__ne__, words):
        option, _, value = word.partition("=")
        if word.startswith("--") and " " not in word and option not in known:  # argparse would first miss others
            more = f"`confbuild {name} --help` lists the options"
            raise UsageError(f"{name}: unknown option {option}", _similar(option, known, more))
        if option in known and value == "--":  # argparse before 3.13 would take that for no value, and check nothing
            raise UsageError(f"{name}: {option}: '--' is not a value")
        given.add(option)
    options = parser.parse_args(words)
    if getattr(options, "policy", None):
        options = parser.parse_args(words, _read_policy(parser, options))  # the command line adds to it, or wins
    options.given = given
    return options


def _read_policy(parser: "argparse.ArgumentParser", options: "argparse.Namespace") -> "argparse.Namespace":
    """Return the values of the options in a policy file [TOML], unless the command line replaces them.

    Raises UsageError, OSError.
    """
    path, *others = options.policy
    if others:
        raise UsageError("--policy is given more than once")
    where = f"--policy {path}: "
    try:
        policy = parse_toml(read_limited(path, MIB))
    except (ValueError, RecursionError) as e:  # ValueError: also of UTF-8, and of a number with thousands of digits
        raise UsageError(f"{where}not TOML: {e}") from None
    known = {
        name[2:]: action
        for name, action in parser._option_string_actions.items()
        if name[:2] == "--" and name[2:] not in _NOT_IN_POLICY
    }
    found = dict[str, Any]()
    for name, value in policy.items():
        if name not in known:
            hint = _similar(name, known, "known options are " + ", ".join(sorted(known)))
            raise UsageError(f"{where}unknown option {name!r}", hint)
        action = known[name]
        added = isinstance(action, argparse._AppendAction) and name != "measurement"  # any of those would do
        if added or not getattr(options, action.dest):  # else the command line wins
            found[action.dest] = _policy_value(parser, action, value, where + name, dirname(path))
    for registers in ("pcrs", "rtmrs"):
        replaced = dict(getattr(options, registers) or ())
        found[registers] = [row for row in found.get(registers, ()) if row[0] not in replaced] or None
    return argparse.Namespace(**found)


def _policy_value(
    parser: "argparse.ArgumentParser", action: "argparse.Action", value: Any, where: str, folder: str
) -> Any:
    """Return value as the command line would read it for this option. Raises UsageError.

    folder: the one of the policy file.
    """
    if action.nargs == 0:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{where}: expected true or false")
    repeatable = isinstance(action, argparse._AppendAction)
    if isinstance(value, dict) and action.dest == "min_tcb":
        value = ",".join(f"{name}={level}" for name, level in value.items())
    items = value if isinstance(value, list) and repeatable else [value]
    folder *= action.dest in _POLICY_PATHS
    try:
        texts = [str(item) for item in items if type(item) in (str, int)]
        found = [
            parser._get_values(action, [text and join(folder, text)])
            for text in texts
            if "\0" not in text and text != "--"
        ]
    except ValueError:  # a number with thousands of digits
        found = []
    except argparse.ArgumentError as e:
        raise UsageError(f"{where}: {e.message}") from None
    # An empty list would require nothing, although its author probably means that nothing is good enough.
    if not found or len(found) < len(items):
        raise UsageError(f"{where}: expected text or a whole number" + ", or a list of them" * repeatable)
    return found if repeatable else found[0]


class _ErrorStream:
    """stderr whose failures do no harm: a full disk behind it must not end a build."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write text if possible."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()

    def flush(self) -> None:
        """Do nothing: write has done it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


__all__ += ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status [CONTRACT 5.3].

    Without argv, runs as the whole program: raises SystemExit with the status, since a zipapp's own start file drops
    what this returns.
    """
    if sys.stdin is None:  # another file would take its number, or that of stdout or stderr, and pass for it
        os.open(os.devnull, os.O_RDONLY)
    for name in ("stdout", "stderr"):
        # None: it was closed. To lose a result is an error (O_RDONLY, 0), to lose a message is not (O_WRONLY, 1).
        stream = getattr(sys, name) or open(os.open(os.devnull, name == "stderr"), "w")  # noqa: SIM115
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):  # a name that the locale cannot print must not end a build
            stream.reconfigure(errors="backslashreplace")
    if argv is None:
        if sys.getfilesystemencoding() != "utf-8":  # archives and provenances have names in UTF-8, whatever the locale
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        with suppress(AttributeError):  # Windows has neither
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignored it hid every exit status
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # one that blocked SIGTERM made `serve` deaf to it
        gc.freeze()  # what exists by now stays: looking at it again would cost a start with 10,000 jobs 0.15 s
        setattr(sys, "stderr", _ErrorStream(sys.stderr))  # noqa: B010  # mypy: it has all that is used of a stream
    try:
        try:
            status = _run(sys.argv[1:] if argv is None else list(argv))
        finally:  # --help raises
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except OSError as e:  # of stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest of the results there
        status = EXIT_USAGE
        if not isinstance(e, BrokenPipeError):
            say(f"error: stdout cannot be written: {e.strerror}")
        elif argv is None:  # their reader has gone: end as other programs do, which shells expect
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
    if argv is None:
        raise SystemExit(status)
    return status


_LINUX_ONLY = "build rebuild serve image agent".split()  # without --server


def _run(arguments: Sequence[str]) -> int:
    """Return the exit status of a command. Raises BrokenPipeError, and SystemExit after --help."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(help_text(), file=sys.stdout if arguments else sys.stderr)
        return EXIT_OK if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(f"confbuild {__version__} sha256:{sha256_hex(own_source())}")
        return EXIT_OK
    try:
        options = parse_arguments(arguments)
        if sys.platform != "linux" and arguments[0] in _LINUX_ONLY and not getattr(options, "server", ""):
            raise UsageError(f"{arguments[0]} needs Linux, this is {sys.platform}", "--server URL builds elsewhere")
        if options.run not in (cmd_verify, cmd_measure):
            logging.basicConfig(
                stream=sys.stderr,
                level=logging.INFO if getattr(options, "verbose", False) else logging.WARNING,
                format="confbuild: %(levelname)s: %(message)s",
            )
        return int(options.run(options) or EXIT_OK)
    except ConfbuildError as e:
        say(f"error: {e}", e.hint)
        return e.exit_code
    except BrokenPipeError:
        raise
    except OSError as e:
        words = ["--token-file", os.environ.get("CONFBUILD_TOKEN_FILE", "")]
        words += [word for argument in arguments for word in argument.split("=", 1)]
        before = {word: option + " " for option, word in itertools.pairwise(words) if option.startswith("-")}
        name = f"{before.get(e.filename, '')}{e.filename}: "
        say(f"error: {'' if e.filename is None else name}{e.strerror or e}")
        return EXIT_USAGE


if __name__ == "__main__":
    main()

# endregion 46
