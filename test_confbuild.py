"""Tests of confbuild, section by section: known answers first, then properties, then the real thing."""
import argparse
import ast
import atexit
import base64
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import functools
import gzip
import hashlib
import http.client
import http.server
import importlib.util
import io
import ipaddress
import itertools
import json
import lzma
import marshal
import math
import mmap
import os
import pty
import py_compile
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import symtable
import sys
import tarfile
import tempfile
import termios
import threading
import time
import tracemalloc
import types
import urllib.parse
import uuid
import zipapp
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

import confbuild

# ==============================================================================
# region 0. Builders and fixtures
# ==============================================================================

settings.register_profile("confbuild", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("confbuild")

# Of the machine, what would change what tests see: who may read the files that they make, and below which folder these are. Unix sockets have short
# names, and scripts words without spaces; pytest names its folder after the user.
os.umask(0o022)
if len(tempfile.gettempdir()) > 12 or " " in tempfile.gettempdir():
    os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
for variable in [name for name in os.environ if name.startswith("GIT_")]:  # as of a hook that runs these tests
    del os.environ[variable]
if len(os.environ.get("LOGNAME") or os.environ.get("USER") or "") > 12:
    os.environ["LOGNAME"] = str(os.getuid())

FILE = Path(confbuild.__file__).resolve()
SHARED = FILE.parent.parent / "shared"
# confbuild.own_program() of the compiled file: a start of Python, of a server, of each of its VMs and of what sweeps up behind it takes half the time. What
# the first lines of a real start do is for the tests that name FILE.
COMPILED = Path(tempfile.mkdtemp(prefix="confbuild-test-"), "confbuild.pyc")
atexit.register(shutil.rmtree, COMPILED.parent)
py_compile.compile(str(FILE), str(COMPILED), doraise=True)
PROGRAM = (*confbuild.own_program()[:-1], str(COMPILED))
PATIENCE = 120  # seconds until what does not happen is a failure: a bound against hanging, also on a slow and busy machine
NONCE = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
DASHED = "0A1B2C3D-4e5f-6071-8293-a4b5c6d7e8f9"  # the same 16 bytes as a UUID [RFC 9562 4]
NOW = "2026-11-23T12:00:00Z"
INSTALL = {"cargo": "apt-get install cargo", "git": "apt-get install git", "nix": "apt-get install nix-bin", "curl": "apt-get install curl",
           "openssl": "apt-get install openssl", "tar": "apt-get install tar", "strace": "apt-get install strace",
           "python3": "apt-get install python3", "cpio": "apt-get install cpio", "fsck.erofs": "apt-get install erofs-utils",
           "veritysetup": "apt-get install cryptsetup-bin", "qemu-system-x86_64": "apt-get install qemu-system-x86", "cc": "apt-get install gcc",
           "QEMU 9.1": "apt-get install -t bookworm-backports qemu-system-x86", "QEMU 10.0": "apt-get install -t bookworm-backports qemu-system-x86"}


def needs(tool: str) -> pytest.MarkDecorator:
    """Skip, with the command that installs what is missing."""
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is missing: {INSTALL[tool]}")


def needs_qemu(major: int, minor: int) -> pytest.MarkDecorator:
    """Skip, with the command that installs it, where QEMU is missing or older."""
    tool = f"QEMU {major}.{minor}"
    return pytest.mark.skipif((confbuild.qemu_version() or (0, 0)) < (major, minor), reason=f"{tool} is missing: {INSTALL[tool]}")


def tarball(files: Mapping[str, str | bytes], top: str = "demo") -> bytes:
    """A gzip tarball of regular files; those called *.sh are executable."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(f"{top}/{name}" if top else name)
            info.size, info.mode = len(data), 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


LOCK = 'version = 4\n\n[[package]]\nname = "demo"\nversion = "0.1.0"\n'
MANIFEST = '[package]\nname = "demo"\nversion = "0.1.0"\nedition = "2021"\n'
# What the stub cargo runs: a build in a few milliseconds.
QUICK = "mkdir -p target/release; echo built > target/release/demo; chmod +x target/release/demo\n"


def project(build: str = QUICK, **more: str) -> dict[str, str | bytes]:
    """The files of a project that the stub cargo builds by running build.sh."""
    return {"Cargo.toml": MANIFEST, "Cargo.lock": LOCK, "src/main.rs": "fn main() {}\n", "build.sh": build, **more}


ORACLE_ENV = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent", "LC_ALL": "C",
              **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
                 for what, value in (("NAME", "n"), ("EMAIL", "e@example.org"), ("DATE", "1700000000 +0000"))}}


def git(folder: Path | str, *arguments: str) -> str:
    options = ("-c", "core.autocrlf=false", "-c", "core.protectNTFS=false", "-c", "protocol.file.allow=always", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *options, *arguments], cwd=folder, env=ORACLE_ENV, check=True, capture_output=True).stdout.decode().strip()


def write_files(folder: Path, files: Mapping[str, str | bytes], commit: bool = False) -> Path:
    """folder holds files; commit: in a new repository."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if commit:
        git(folder, "init", "-q", "-b", "main")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "one")
    return folder


@pytest.fixture(scope="session")
def stub_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH whose cargo runs the project's build.sh, so that a test decides what a build does."""
    folder = tmp_path_factory.mktemp("stub")
    for name, version in (("cargo", "cargo 1.90.0 (840b83a10 2025-07-30)"), ("rustc", "rustc 1.90.0 (1159e78c4 2025-09-14)")):
        (folder / name).write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "{version}"; exit 0; }}\nexec sh ./build.sh\n')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


class Server:
    """A real `serve` in its own process and session, with a fixed port, which can be killed and started again."""

    def __init__(self, state: Path, path: str, *options: str, env: Mapping[str, str] | None = None, program: Sequence[str] = PROGRAM) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.program, self.state, self.options, self.env = program, state, options, {**os.environ, "PATH": path, **(env or {})}
        self.headers: dict[str, str] = {}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> "Server":
        command = [*self.program, "serve", "--listen", f"127.0.0.1:{self.port}", "--state", str(self.state), *self.options]
        self.process = subprocess.Popen(command, env=self.env, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("confbuild: serving on "), line
        return self

    def stop(self, sign: int = signal.SIGTERM) -> str:
        """End the server; what it said on stderr."""
        assert self.process is not None
        self.process.send_signal(sign)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return errors

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
        """(status, headers, body); names of headers with `_` for `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            named = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
            if isinstance(body, dict):
                body, named = json.dumps(body), {"Content-Type": "application/json", **named}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def submit(self, files: Mapping[str, str | bytes] | None = None, **fields: Any) -> str:
        """The id of an accepted job; without fields, an archive of files."""
        archive = base64.b64encode(tarball(project() if files is None else files)).decode()
        body = {"nonce": NONCE, **(fields or {"source_data": archive, "source_name": "demo.tar.gz"})}
        status, _, answer = self.request("POST", "/build", body)
        assert status == 200, answer
        return str(json.loads(answer)["job_id"])

    def events(self, job: str, start: int = 0) -> list[dict[str, Any]]:
        """The events after the first start ones, to the end of the stream."""
        status, _, body = self.request("GET", f"/build/{job}/events?from={start}")
        assert status in (200, 204)
        return [json.loads(line[6:]) for line in body.decode().split("\n") if line.startswith("data: ")]

    def status(self, job: str) -> Any:
        return json.loads(self.request("GET", f"/build/{job}")[2])


@pytest.fixture
def server(tmp_path: Path, stub_path: str) -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends them with whatever they have started."""
    made: list[Server] = []

    def make(*options: str, **keywords: Any) -> Server:
        made.append(Server(tmp_path / f"state{len(made)}", stub_path, *options, **keywords))
        return made[-1].start()

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def wait_for(condition: Callable[[], Any]) -> Any:
    """What condition returns when it is true at last."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def statement(**changes: Any) -> dict[str, Any]:
    """A provenance that verifies: changes replace what `a__b` names in it, from the predicate's buildDefinition or runDetails."""
    digest = {"sha256": "ab" * 32}
    doc: dict[str, Any] = {
        "_type": confbuild.STATEMENT_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": confbuild.BUILD_TYPE,
                "externalParameters": {"buildCommand": "cargo build --locked --release",
                                       "source": {"digest": {"gitCommit": "", "gitTree": "12" * 20}, "uri": ""}},
                "internalParameters": {"lockfileHash": digest, "toolchain": {
                    name: {"digest": digest, "version": f"{name} 1"} for name in ("cargo", "rustc", "kettle")}},
                "resolvedDependencies": []},
            "runDetails": {"builder": {"id": confbuild.SIMULATED_BUILDER}, "byproducts": [], "metadata": {
                "invocationId": "build-20261123-000000-00000000", "startedOn": "2026-11-23T00:00:00.000000+00:00",
                "finishedOn": "2026-11-23T00:00:01.000000+00:00"}}},
        "predicateType": confbuild.PREDICATE_TYPE,
        "subject": [{"digest": {"sha256": hashlib.sha256(b"artifact").hexdigest()}, "name": "demo"}]}
    for path, value in changes.items():
        *folders, last = path.split("__")
        node: Any = doc
        for name in folders:
            node = node[name]
        node[last] = value
    details = doc["predicate"]["runDetails"]
    if not details["byproducts"]:
        details["byproducts"] = [{"digest": {"sha256": confbuild.merkle_root(confbuild.merkle_entries(doc))}, "name": "input_merkle_root"}]
    return doc


HARDWARE_BUILDER = "https://example.test/builder"  # one whose VMs are confidential


def attested() -> confbuild.BundleFiles:
    """The good bundle as HARDWARE_BUILDER says it made it; its evidence is yet to come."""
    return bundle(statement(predicate__runDetails__builder__id=HARDWARE_BUILDER))


def bundle(doc: Any = None, nonce: str = NONCE, provenance: bytes | None = None) -> confbuild.BundleFiles:
    """A simulated bundle of doc, with one artifact called demo."""
    data = confbuild.to_canonical(statement() if doc is None else doc) if provenance is None else provenance
    return confbuild.BundleFiles(data, confbuild.simulated_evidence(confbuild.report_data(data, nonce)), {"demo": hashlib.sha256(b"artifact").hexdigest()})


# A hierarchy like AMD's, whose private keys everybody may know, and what it signs. The signer is here and nowhere else.

TOY_PRIMES = tuple(int(digits, 16) for digits in (
    ("f761f90f345d179adb53229b54e2d01d9ccbb1c79085e5813318ed93cb04dc20c0aa77dcde2cb640c7b75ce37212d97bded4a8305f273eb4e72435701ec7d0db"
    "4e7ddc95f8a07529ea43df17edbb3530ba00ee172d0d6d6f57ad366725d808e9fb7e5cc60ad1beef25c02587dfc285944a19e849dd3a26188bf68f70b28a3af9"),
    ("c432c8096e5778d61242d6ab23591fa46fcd1f74f61d4561862b3b9545614e533469868f623b151e8e2ab8b46cb0f0eef8d4324d75660d23eaab0c513db5b54c"
    "470f13f2406b18952b3fcd8793e7fa1cfb2a66f40e54f57bba39b77adf11d78a0beec463bbdbaae5933f6cb1c390d86db8c51cb7e9251a93f24b183663d8423f"),
    ("f91fda9afda8c52aa3a67e392a5215ef1a69d9beb437a2086cc5cdcf06c83ebc466178a50c77fc5a6164508dcb8312bdf04aaf21abe31260ccdd3cbfc975d5c9"
    "008fc66ff0ade040c1998c4cfd3927b0b10889d60adb077a63c9d6e1eceb3b7bc9b6baae7b1525cd3c49e7842236f59eaa1d008fade7918b4d1f3f9255e4e6cf"),
    ("e97be790255738604e4ff538660a669e480172ed8bf7158d164f549e4e728569a452e835a0205c9e6f9285e548d82f68662c96bcc8a8cceef4f66c0a4099fa00"
    "08dc4c5b646c4fdb9325a4bb2f87a2a832cecf5e20b8f8eade162f1a50e1ce8ffbdb1566500faa203e2962606e3d51c74a5364aa0a722630f193858bb556f02d"),
    ("ed038c5bf1310838d78f0475fd21a7c40e7931a8d5c2b37ea4fbd6d35eb2dcf6c7183b2b389dc23d0af69bf08a3495bd43e2618315d91d85854ac8c672019719"
    "b8a819fa420695730d619ea76bf74df2e49c74aba3d77e4e4d768769983a778bbc7ece770baaedcf82d35287ba6d57598a5f5e86caed3127570efa7320f2045d"),
    ("eb45c6e9b0b63773bcd0555864c07552381689bce416d618a7f208181cb0b0dcf1c7295907c2a5322bd6912aa269b70d1e45817b71a590a68d0d6b8e9724a738"
    "0bb5808899a0eafc202151a74d8dcbeefb8ce08fb440c17d07f1bd98dca198a74fac7f1c3556fc633bbb791b60f8480bab0fe4dd595816d002c004daf514c12b"),
    ("ec96cf1ea0d269083751e6a65fef7e88637c7d0956a57ec185127669d757b48074cb48e62ec900e41db19e1993c4f8afb70be18411ad6a1a33043acdb2b41fc8"
    "0bce38e4fad0fd92f7c1139cc17a269cacc8067a62059f0846e5d3a1bcadddd626f99a25a52ca2431bf884bf13d9ac38f60f6219a429c31d9f3422ecfdba5aa5"),
    ("d52285f66fe5863879618f23a0408bf3c815c3b5a1626955537314bc3759d1aa9a7f7a311d927fb42c973ae9dd2e9fce34836b15cf1ca7734661e22454f1eab5"
    "7a41df04ce5bad1af1ccf40db097c3b923d3695eaba89e75f7af765223c1ccb0539c48643e3aa9a0f9feb8dfe722d93a8d327d8494f95802a7b94d402e03f933"),
))
PSS_SHA384 = bytes.fromhex("304106092a864886f70d01010a3034a00f300d06096086480165030402020500a11c301a06092a864886f70d010108300d06096086480165030402020500a203020130")
P384_SPKI, RSA_SPKI = bytes.fromhex("301006072a8648ce3d020106052b81040022"), bytes.fromhex("300d06092a864886f70d0101010500")


class ToyKey:
    """An RSA key that signs. index: of its primes, 0 to 3."""

    def __init__(self, index: int) -> None:
        p, q = TOY_PRIMES[2 * index:2 * index + 2]
        self.n, self.e, self.d = p * q, 65537, pow(65537, -1, (p - 1) * (q - 1))
        self.p, self.q = p, q
        self.public = confbuild.RsaKey(self.n, self.e)
        self.size = (self.n.bit_length() + 7) // 8

    def private(self, em: bytes) -> bytes:
        """RSASP1 by the Chinese remainders. [RFC8017 5.2.1]"""
        m = int.from_bytes(em, "big")
        m1, m2 = (pow(m, self.d % (prime - 1), prime) for prime in (self.p, self.q))
        return (m2 + self.q * ((m1 - m2) * pow(self.q, -1, self.p) % self.p)).to_bytes(self.size, "big")

    def pss(self, message: bytes, salt: bytes = b"salt" * 12) -> bytes:
        """[RFC8017 9.1.1]"""
        h = hashlib.sha384(bytes(8) + hashlib.sha384(message).digest() + salt).digest()
        size = self.size - len(h) - 1
        mask = b"".join(hashlib.sha384(h + i.to_bytes(4, "big")).digest() for i in range(size // 48 + 1))[:size]
        db = bytes(size - len(salt) - 1) + b"\x01" + salt
        masked = bytes(a ^ b for a, b in zip(db, mask, strict=True))
        return self.private(bytes((masked[0] & 0x7F,)) + masked[1:] + h + b"\xbc")

    def pkcs1(self, message: bytes) -> bytes:
        """[RFC8017 9.2]"""
        t = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(message).digest()
        return self.private(b"\x00\x01" + b"\xff" * (self.size - len(t) - 3) + b"\x00" + t)

    def spki(self) -> bytes:
        return seq(RSA_SPKI, bits(seq(number(self.n), number(self.e))))


P = confbuild.P384_P


def p384_multiply(k: int, point: tuple[int, int] | None = confbuild.P384_G) -> tuple[int, int] | None:
    """k times a point, by the formulas of the textbook."""
    total: tuple[int, int] | None = None
    while k:
        if k & 1:
            total = p384_add(total, point)
        point, k = p384_add(point, point), k >> 1
    return total


def p384_add(a: tuple[int, int] | None, b: tuple[int, int] | None) -> tuple[int, int] | None:
    if a is None or b is None:
        return a or b
    if a[0] == b[0] and (a[1] + b[1]) % P == 0:
        return None
    slope = (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, P) if a == b else (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


TOY_K = 2 ** 383 + 0x1234567
TOY_R = (p384_multiply(TOY_K) or (0, 0))[0] % confbuild.P384_N


class ToyVek:
    """A P-384 key that signs."""

    def __init__(self, d: int) -> None:
        self.d = d
        self.public = confbuild.Point(*(p384_multiply(d) or (0, 0)))

    def sign(self, message: bytes) -> tuple[int, int]:
        """(r, s) [FIPS186-5 6.4.1], with the same k every time, which gives the key away."""
        e, n, k, r = int.from_bytes(hashlib.sha384(message).digest(), "big"), confbuild.P384_N, TOY_K, TOY_R
        return r, pow(k, -1, n) * (e + r * self.d) % n

    def spki(self) -> bytes:
        return seq(P384_SPKI, bits(b"\x04" + b"".join(c.to_bytes(48, "big") for c in self.public)))


def tlv(tag: int, *parts: bytes) -> bytes:
    """One DER element."""
    body = b"".join(parts)
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes((tag, len(body))) + body if len(body) < 0x80 else bytes((tag, 0x80 | len(size))) + size + body


def seq(*parts: bytes) -> bytes:
    return tlv(0x30, *parts)


def number(value: int) -> bytes:
    return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def bits(body: bytes) -> bytes:
    return tlv(0x03, b"\x00", body)


def oid(text: str) -> bytes:
    first, second, *rest = map(int, text.split("."))
    body = b""
    for arc in (40 * first + second, *rest):
        octets = [arc & 0x7F]
        while arc := arc >> 7:
            octets.insert(0, 0x80 | arc & 0x7F)
        body += bytes(octets)
    return tlv(0x06, body)


def utc(text: str) -> bytes:
    """A UTCTime of 2026-11-23T12:00:00Z."""
    return tlv(0x17, re.sub(r"[-:T]", "", text)[2:].encode())


def x_name(common_name: str) -> bytes:
    """A Name as AMD writes it."""
    return seq(*(tlv(0x31, seq(oid(kind), tlv(0x13 if kind == "2.5.4.6" else 0x0C, text.encode()))) for kind, text in (
        ("2.5.4.11", "Engineering"), ("2.5.4.6", "US"), ("2.5.4.7", "Santa Clara"), ("2.5.4.8", "CA"), ("2.5.4.10", "Advanced Micro Devices"),
        ("2.5.4.3", common_name))))


def extension(name: str, value: bytes, critical: bool = False) -> bytes:
    return seq(oid(name), *([tlv(0x01, b"\xff")] if critical else []), tlv(0x04, value))


def x509(subject: str, issuer: str, spki: bytes, key: ToyKey, *extensions: bytes, serial: int = 0, valid: tuple[str, str] = (
        "2026-01-01T00:00:00Z", "2033-01-01T00:00:00Z"), algorithm: bytes = PSS_SHA384, sign: Callable[[bytes], bytes] | None = None) -> bytes:
    """A certificate."""
    tbs = seq(tlv(0xA0, number(2)), number(serial), algorithm, x_name(issuer), seq(*map(utc, valid)), x_name(subject), spki,
              tlv(0xA3, seq(*extensions)))
    return seq(tbs, algorithm, bits((sign or key.pss)(tbs)))


def crl_of(issuer: str, key: ToyKey, *serials: int, valid: tuple[str, str] = ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")) -> bytes:
    """A revocation list."""
    revoked = [seq(*(seq(number(serial), utc(valid[0])) for serial in serials))] if serials else []
    tbs = seq(number(1), PSS_SHA384, x_name(issuer), *map(utc, valid), *revoked, tlv(0xA0, seq(extension("2.5.29.20", number(1)))))
    return seq(tbs, PSS_SHA384, bits(key.pss(tbs)))


TOY_ARK, TOY_ASK, TOY_ASVK, TOY_AK = map(ToyKey, range(4))
TOY_VEK, OTHER_VEK = ToyVek(0x1234567), ToyVek(0x7654321)
TOY_CAS = {"ark": x509("ARK-Milan", "ARK-Milan", TOY_ARK.spki(), TOY_ARK, serial=0x010000),
           "ask": x509("SEV-Milan", "ARK-Milan", TOY_ASK.spki(), TOY_ARK, serial=0x010001),
           "asvk": x509("SEV-VLEK-Milan", "ARK-Milan", TOY_ASVK.spki(), TOY_ARK, serial=0x010101)}
TOY_ANCHORS = {"Milan": confbuild.make_anchors("Milan", **TOY_CAS)}
CHIP_ID = bytes(range(64))
MILAN_TCB = {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}


def vek_of(kind: str = "VCEK", tcb: Mapping[str, int] = MILAN_TCB, hwid: bytes | None = CHIP_ID, product: str = "Milan-B0", key: ToyVek = TOY_VEK,
           **changes: Any) -> bytes:
    """The certificate of a VCEK or VLEK of the toy hierarchy. changes: of x509."""
    arcs = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 8, "fmc": 9}
    extensions = [extension("1.3.6.1.4.1.3704.1.1", number(0)), extension("1.3.6.1.4.1.3704.1.2", tlv(0x16, product.encode())),
                  *(extension(f"1.3.6.1.4.1.3704.1.3.{arcs[name]}", number(level)) for name, level in tcb.items())]
    if hwid is not None and kind == "VCEK":
        extensions.append(extension("1.3.6.1.4.1.3704.1.4", hwid))
    issuer, signer = ("SEV-Milan", TOY_ASK) if kind == "VCEK" else ("SEV-VLEK-Milan", TOY_ASVK)
    arguments: dict[str, Any] = {"subject": f"SEV-{kind}", "issuer": issuer, "spki": key.spki(), "key": signer, **changes}
    return x509(arguments.pop("subject"), arguments.pop("issuer"), arguments.pop("spki"), arguments.pop("key"), *extensions, **arguments)


def snp_report(key: ToyVek = TOY_VEK, **changes: Any) -> bytes:
    """A signed report of version 5 of a Milan. changes: of its fields, as int or bytes."""
    tcb = bytes((4, 0, 0, 0, 0, 0, 24, 219))
    values = {"version": 5, "policy": 0x30000, "signature_algo": 1, "reported_tcb": tcb, "current_tcb": tcb, "committed_tcb": tcb, "launch_tcb": tcb,
              "cpuid_fam_id": 0x19, "cpuid_mod_id": 1, "cpuid_step": 1, "chip_id": CHIP_ID, "report_id_ma": b"\xff" * 32, "measurement": b"m" * 48,
              "report_data": confbuild.report_data(attested().provenance or b"", NONCE), **changes}
    data = bytearray(confbuild.REPORT_SIZE)
    for offset, size, name, _ in confbuild.REPORT_FIELDS:
        value = values.get(name, 0)
        data[offset:offset + size] = value.to_bytes(size, "little") if isinstance(value, int) else value.ljust(size, b"\0")
    if "r" not in changes:
        for offset, value in zip((0x2A0, 0x2E8), key.sign(bytes(data[:0x2A0])), strict=True):
            data[offset:offset + 72] = value.to_bytes(72, "little")
    return bytes(data)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def snp_bundle(report: bytes | None = None, vek: bytes | None = None, platform: str = "snp", **parts: Any) -> confbuild.BundleFiles:
    """The good bundle with hardware evidence of the toy hierarchy. parts: of BundleFiles."""
    chain = {"vcek": b64(vek_of() if vek is None else vek), "ask": None, "ark": None}
    doc = {"platform": platform, "evidence": {"attestation_report": b64(snp_report() if report is None else report), "cert_chain": chain}}
    return attested()._replace(evidence=json.dumps(doc).encode(), **parts)


def quote_of(extra_data: bytes, pcrs: Sequence[bytes], select: bytes = b"\xff\xff\xff") -> bytes:
    """A TPMS_ATTEST of a quote."""
    chosen = b"".join(pcrs[i] for i in range(24) if select[i // 8] >> i % 8 & 1)
    return (bytes.fromhex("ff5443478018") + b"\x00\x02qs" + len(extra_data).to_bytes(2, "big") + extra_data + bytes(25) + bytes.fromhex("00000001000b")
            + bytes((len(select),)) + select + b"\x00\x20" + hashlib.sha256(chosen).digest())


def hcl_of(report: bytes, runtime_data: bytes) -> bytes:
    """An HCL report of 2600 bytes."""
    words = [int.from_bytes(b"HCLA", "little"), 2, 0x4D4 + len(runtime_data), 2, 0, 0, 0, 0]
    header = [20 + len(runtime_data), 1, 2, 1, len(runtime_data)]
    return (b"".join(w.to_bytes(4, "little") for w in words) + report + b"".join(w.to_bytes(4, "little") for w in header) + runtime_data).ljust(2600, b"\0")


def azure_evidence(extra_data: bytes | None = None, **changes: Any) -> dict[str, Any]:
    """The value of `evidence` of az-snp. changes: runtime_data, report, hcl, pcrs, message, signature, vek (bytes)."""
    def url(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    jwk = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": url(TOY_AK.n.to_bytes(256, "big"))}
    runtime = changes.get("runtime_data", json.dumps({"keys": [jwk], "vm-configuration": {"secure-boot": True}, "user-data": "00" * 64}).encode())
    report = changes.get("report", snp_report(version=2, report_data=hashlib.sha256(runtime).digest()))
    pcrs = changes.get("pcrs", [hashlib.sha256(bytes((i,))).digest() for i in range(24)])
    signed = confbuild.report_data(attested().provenance or b"", NONCE)[:50] if extra_data is None else extra_data
    message = changes.get("message", quote_of(signed, pcrs))
    return {"version": 1, "tpm_quote": {"signature": changes.get("signature", TOY_AK.pkcs1(message)).hex(), "message": message.hex(),
                                        "pcrs": [value.hex() for value in pcrs]},
            "hcl_report": url(changes.get("hcl", hcl_of(report, runtime))), "vcek": url(changes.get("vek", vek_of()))}


def azure_bundle(extra_data: bytes | None = None, **changes: Any) -> confbuild.BundleFiles:
    """The good bundle with az-snp evidence of the toy hierarchy."""
    return attested()._replace(evidence=json.dumps({"platform": "az-snp", "evidence": azure_evidence(extra_data, **changes)}).encode())


def provenance_of(files: confbuild.BundleFiles) -> bytes:
    """Its provenance, which is there."""
    assert files.provenance is not None
    return files.provenance


def verdict_over(files: confbuild.BundleFiles, expected: confbuild.Expectations, now: str = NOW, **endorsements: Any) -> confbuild.Verdict:
    """The verdict at a time that lies in every genuine certificate's."""
    return confbuild.verify_bundle(files, expected, now, confbuild.Endorsements(**endorsements))


def status_of(verdict: confbuild.Verdict, name: str) -> str:
    """The status of a check."""
    return next(check.status for check in verdict.checks if check.name == name)



@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where a hostile input keeps the code under test busy; a generous deadline, no measurement.

    seconds: of this process's own processor time, whatever else the machine does. What stands still fails too, after PATIENCE.
    """
    def late(*_: object) -> None:
        pytest.fail(f"still busy after {seconds} s, or not moving")  # no Exception, which the code under test would catch

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, PATIENCE))
    before = [signal.signal(sign, late) for sign, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (sign, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(sign, handler)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node below value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from nodes(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of value with another node at path."""
    copy = json.loads(json.dumps(value))
    if not path:
        return new
    at(copy, path[:-1])[path[-1]] = new
    return copy


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10 ** 20 + 1, 10 ** 20 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)

# endregion 0
# ==============================================================================
# region 1. Names and limits
# ==============================================================================


class TestNames:
    def test_contract(self) -> None:
        """Transcribed from CONTRACT.md, sections 1 and 5, not from the code."""
        assert (confbuild.EXIT_OK, confbuild.EXIT_NO, confbuild.EXIT_USAGE, confbuild.EXIT_SIMULATED, confbuild.EXIT_SERVER,
                confbuild.EXIT_UNVERIFIED, confbuild.EXIT_INTERRUPTED) == (0, 1, 2, 3, 4, 5, 130)
        assert confbuild.PHASES == ("queued", "vm", "detect", "init", "build", "provenance", "attest", "complete")
        assert set(confbuild.FAILURES) == {
            "BuildError", "UnsupportedToolchainError", "SourceError", "LimitError", "TimeoutError", "Cancelled", "NoArtifacts", "ProvenanceError",
            "AttestationError", "VmError", "InternalError"}
        assert (confbuild.MAX_ARCHIVE, confbuild.MAX_LINE) == (64 << 20, 64 << 10)

# endregion 1
# ==============================================================================
# region 2. Errors
# ==============================================================================


class TestErrors:
    @pytest.mark.parametrize(("error", "code", "text"), [
        (confbuild.ConfbuildError("a", "do b"), 1, "a"),
        (confbuild.UsageError("a"), 2, "a"),
        (confbuild.Malformed("form", "a"), 1, "form: a"),
        (confbuild.BuildFailed("BuildError", " two\n lines "), 1, "two lines"),
        (confbuild.BuildFailed("BuildError", " \n"), 1, "BuildError"),
        (confbuild.Refused(400, "InvalidJson", "two\nlines"), 1, "two lines"),
        (confbuild.RemoteError("a", 503), 4, "a")])
    def test_exit_code_and_one_sentence(self, error: confbuild.ConfbuildError, code: int, text: str) -> None:
        assert (error.exit_code, str(error)) == (code, text)

    def test_attributes(self) -> None:
        assert confbuild.ConfbuildError("a", "do b").hint == "do b" and confbuild.RemoteError("a", 503, "later").hint == "later"
        assert confbuild.Malformed("form", "a").structure == "form" and isinstance(confbuild.Malformed("form", "a"), ValueError)
        refused = confbuild.Refused(429, "QueueFull", "full", {"Retry-After": "1"})
        assert (refused.status, refused.error_type, refused.headers) == (429, "QueueFull", {"Retry-After": "1"})
        assert confbuild.RemoteError("a").status == 0 and confbuild.BuildFailed("Cancelled", "x").error_type == "Cancelled"

# endregion 2
# ==============================================================================
# region 3. Bytes and JSON
# ==============================================================================


class TestJson:
    @pytest.mark.parametrize(("data", "message"), [
        (b"", "not JSON: Expecting value"), (b" ", "not JSON: Expecting value"), (b"tru", "not JSON: Expecting value"),
        (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM"), (b"\xff", "not UTF-8 at byte 0"), (b'{"\xed\xa0\x80":1}', "not UTF-8 at byte 2"),
        (b'"\xc0\x80"', "not UTF-8 at byte 1"), (b'"\xf4\x90\x80\x80"', "not UTF-8 at byte 1"), (b"{\x00}", "not JSON"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"\\udc00":1}', "lone surrogate"), (b'"\\udc00\\ud800"', "lone surrogate"), (b'{"a":1,"a":2}', "the name 'a' occurs twice in one object"),
        (b'{"a":1,"\\u0061":2}', "the name 'a' occurs twice"), (b'[{"x":{"b":0,"b":0}}]', "the name 'b' occurs twice"),
        (b'{"\\ud800":1,"\\ud800":2}', r"the name '\ud800' occurs twice"), (b"NaN", "NaN is not JSON"), (b"[Infinity]", "Infinity is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"), (b"100000000000000000000", f"an integer beyond {10 ** 20 - 1}"),
        (b"-100000000000000000000", "an integer beyond"), (b"[" + b"9" * 10_000 + b"]", "an integer beyond"),
        (b"1e999", "too many digits or too large"),
        (b"-1e999", "too many digits or too large"), (b"0." + b"1" * 31, "too many digits or too large"),
        (b"[" * 128 + b"]" * 128, "nested deeper than 127"),
        (b'{"a":' * 128 + b"1" + b"}" * 128, "nested deeper than 127"), (b"{} x", "not JSON: Extra data"), (b"1 2", "not JSON: Extra data"),
        (b"01", "not JSON: Extra data"), (b"+1", "not JSON"), (b".5", "not JSON"), (b"1.", "not JSON"), (b"0x1", "not JSON"), (b"'a'", "not JSON"),
        (b"[1,]", "not JSON"), (b'{"a":1,}', "not JSON"), (b"{a:1}", "not JSON"), (b"[1]//", "not JSON: Extra data"), (b"[}", "not JSON"),
        (b'"\n"', "not JSON: Invalid control character"), (b'"\\x"', "not JSON: Invalid \\escape"), (b'"\\u12"', "not JSON: Invalid \\uXXXX escape"),
        (b'"', "not JSON: Unterminated string"), (b'"\\', "not JSON: Unterminated string"), (b"\xc2\xa01", "not JSON"), (b"[1\x0b]", "not JSON"),
        (b"\xd9\xa1", "not JSON"), (b"[1\xd9\xa1]", "not JSON")])
    def test_every_rule_is_strict(self, data: bytes, message: str) -> None:
        with pytest.raises(confbuild.Malformed, match=f"^name: .*{re.escape(message)}") as caught:
            confbuild.parse_json(data, "name")
        assert caught.value.structure == "name"

    @pytest.mark.parametrize(("data", "value"), [
        (b" \t\r\n{ } ", {}), (b"99999999999999999999", 10 ** 20 - 1), (b"-99999999999999999999", -10 ** 20 + 1), (b"-0", 0), (b"1e2", 100.0),
        (b'"\\ud83d\\ude00\\u0000\\/"', "\U0001f600\0/"), (b'"' + b"[{" * 200 + b'"', "[{" * 200), (b'["\\"[", "\\\\", "]"]', ['"[', "\\", "]"]),
        (b'{"a":{"a":1},"b":{"a":1}}', {"a": {"a": 1}, "b": {"a": 1}}), (b"[[],[]]", [[], []]), (b"1.0e-5", 1e-05)])
    def test_the_edge_of_every_rule(self, data: bytes, value: Any) -> None:
        assert confbuild.parse_json(data, "name") == value

    def test_limits_of_the_caller(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a request may hold: 2^53 and a depth of 32 [CONTRACT 1]."""
        for data, most in ((b"[" * 32 + b"]" * 32, None), (b"[" * 33 + b"]" * 33, "nested deeper than 32"), (b"9007199254740992", None),
                           (b"9007199254740993", "an integer beyond 9007199254740992"), (b"-9007199254740993", "an integer beyond")):
            with contextlib.nullcontext() if most is None else pytest.raises(confbuild.Malformed, match=most):
                confbuild.parse_json(data, "body", 32, 2 ** 53)
        assert confbuild.parse_json(b"[" * 127 + b"]" * 127, "name")
        monkeypatch.setattr(confbuild, "MAX_JSON", 4)
        assert confbuild.parse_json(b"1234", "name") == 1234
        with pytest.raises(confbuild.Malformed, match="^name: 5 bytes, more than 4$"):
            confbuild.parse_json(b"12345", "name")

    @pytest.mark.parametrize("unit", ["a", "\u00e9", "\\n", '\\"', "\\\\"])
    def test_a_string_has_at_most_1_mib_as_written(self, unit: str) -> None:
        most = unit * (confbuild.MIB // len(unit))
        for template in ('["%s","%s"]', '{"%s":"%s"}'):
            data = (template % (most, unit)).encode()
            assert confbuild.parse_json(data, "name") == json.loads(data)
            for document in ((template % (most + "a", unit)), (template % (unit, most + "a"))):
                with pytest.raises(confbuild.Malformed, match="^name: a string of more than 1048576 characters$"):
                    confbuild.parse_json(document.encode(), "name")

    @pytest.mark.parametrize("read", [
        lambda: confbuild.parse_json(b'"' + b"a" * (confbuild.MAX_JSON - 1), "name"), lambda: confbuild.parse_json(b'"' + b"\\n" * 2_000_000, "name"),
        lambda: confbuild.decode_hex("0" * confbuild.MIB, "name"), lambda: confbuild.decode_hex("0" * confbuild.MIB + "g0", "name"),
        lambda: confbuild.decode_base64("A" * confbuild.MIB + "B=", "name"), lambda: confbuild.decode_base64("A" * confbuild.MIB + "B=", "name", True)],
        ids=["string", "escapes", "hex", "no hex", "base64", "base64url"])
    def test_long_strings_take_no_more_memory_than_they_have(self, read: Callable[[], object]) -> None:
        """What a regular expression may give back, it remembers: 120 bytes for each turn of a group."""
        tracemalloc.start()
        try:
            with contextlib.suppress(confbuild.Malformed):
                read()
            assert tracemalloc.get_traced_memory()[1] < 16 * confbuild.MIB
        finally:
            tracemalloc.stop()

    @given(value=JSON_VALUES, ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2]))
    def test_what_json_writes_comes_back(self, value: Any, ascii_only: bool, indent: int | None) -> None:
        assert confbuild.parse_json(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(), "name") == value
        line = confbuild.compact_json(value)
        assert line.isascii() and "\n" not in line and confbuild.parse_json(line.encode(), "name") == value

    @given(st.binary(max_size=40) | st.lists(st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u", b"d800", b",", b":", b"1", b"e9", b"-",
                                                              b".", b" ",
                                                             b"\xff", b"\xc3\xa9", b"null", b"NaN", b'"a":', b"\n"]), max_size=12).map(b"".join))
    @example(b'"\\')
    def test_any_bytes_give_a_value_or_malformed(self, data: bytes) -> None:
        with contextlib.suppress(confbuild.Malformed):
            assert confbuild.parse_json(data, "name") == json.loads(data)

    @pytest.mark.parametrize("data", [
        b'"' + b'\\"' * 1_000_000, b'["' + b"\\" * 1_000_001, b'"a' * 500_000, b"[" * 1_000_000, b'{"a":' * 200_000, b"9" * 1_000_000,
        b"-" * 1_000_000,
        b"1." + b"0" * 1_000_000, b'"' + b"[" * 1_000_000, b" " * 1_000_000, b"[" + b"0," * 300_000, b'"' + b"\\ud800" * 150_000 + b'"'],
        ids=lambda data: f"{bytes(data[:8])!r}x{len(data)}")
    def test_hostile_documents_take_linear_time(self, data: bytes) -> None:
        with within(20), pytest.raises(confbuild.Malformed):
            confbuild.parse_json(data, "name")

    @pytest.mark.parametrize("text", [NONCE, NONCE.upper(), DASHED, DASHED.lower(), str(uuid.UUID(NONCE))])
    def test_nonce(self, text: str) -> None:
        assert confbuild.parse_nonce(text) == NONCE and re.fullmatch(confbuild.NONCE_PATTERN, text)

    @pytest.mark.parametrize("text", [
        NONCE[:-1], NONCE + "0", NONCE[:-1] + "g", "", NONCE + "\n", "0x" + NONCE[2:], NONCE[:-1] + "\u0665", None, 1, NONCE.encode(), DASHED[:-1], DASHED + "0",
        DASHED + "\n", "{" + DASHED + "}", "urn:uuid:" + DASHED, DASHED.replace("-", "", 1), DASHED.replace("-", "--", 1), "-" + NONCE,
        NONCE[:16] + "-" + NONCE[16:], DASHED.replace("-", "\u2010"), DASHED[:-1] + "g", "-".join(NONCE[i:i + 4] for i in range(0, 32, 4))])
    def test_no_nonce(self, text: Any) -> None:
        assert confbuild.parse_nonce(text) == ""

    # Standard base64: RFC 4648, section 10. FB FF BF needs the two characters in which the alphabets differ.
    @pytest.mark.parametrize(("data", "standard", "urlsafe"), [
        (b"", "", ""), (b"f", "Zg==", "Zg"), (b"fo", "Zm8=", "Zm8"), (b"foo", "Zm9v", "Zm9v"), (b"foob", "Zm9vYg==", "Zm9vYg"),
        (b"fooba", "Zm9vYmE=", "Zm9vYmE"), (b"foobar", "Zm9vYmFy", "Zm9vYmFy"), (b"\xfb\xff\xbf", "+/+/", "-_-_"), (b"\xff", "/w==", "_w"),
        (b"\xfb\xf0", "+/A=", "-_A"), (bytes(4), "AAAAAA==", "AAAAAA")])
    def test_base64(self, data: bytes, standard: str, urlsafe: str) -> None:
        padded = urlsafe + "=" * (-len(urlsafe) % 4)
        assert (confbuild.decode_base64(standard, "name"), confbuild.decode_base64(urlsafe, "name", True),
                confbuild.decode_base64(padded, "name", urlsafe=True)) == (data, data, data)
        wrong = [(text, True) for text in (standard,) if standard != padded] + [(text, False) for text in (urlsafe, padded) if text != standard]
        for text, other in wrong:
            with pytest.raises(confbuild.Malformed, match="^name: not "):
                confbuild.decode_base64(text, "name", other)

    NO_TEXT: tuple[Any, ...] = (None, 1, True, [], {}, b"Zg==", bytearray(b"00"))

    # Of each: with the standard alphabet, with the other one.
    @pytest.mark.parametrize(("text", "messages"), [
        *[(text, ("not base64 text", "not base64 text")) for text in (
            *NO_TEXT, " Zg==", "Zg==\n", "Zg==\0", "Z\ng=", "Zm 9v", "Zm9v\r\n", "Zg=a", "=Zg=", "Zm=v", "Zg==Zg==", "Zg===", "====",
            "Zm9v===", "\u0400\u0401\u0402\u0403", "Zm9\uff36", "Zm9\u017f", "Zm9\ud800", "%5a", "Zm9.", "Zm9~", "Zm+_", "Zm/-", "\ufeffZm9v")],
        ("Zm+v", (None, "not base64 text")), ("Zm/v", (None, "not base64 text")), ("Zm-v", ("not base64 text", None)), ("Zm_v", ("not base64 text", None)),
        ("Zg", ("not base64: ", None)), ("Zm8", ("not base64: ", None)), ("Zm9vYg", ("not base64: ", None)),
        ("Zg=", ("not base64: ", "not canonical base64")),
        *[(text, ("not base64: ", "not base64: ")) for text in ("Z", "Zm9vY", "Z=", "Z==", "=", "==", "Zm8==")],
        ("Zm9v=", ("not ", "not ")), ("Zm9v==", ("not ", "not ")),  # which of the two depends on the version of Python
        # Spare bits that are not zero: four after one byte, two after two.
        *[(f"Z{c}==", ("not canonical base64", "not canonical base64")) for c in "hijklmnopqrstuv"],
        *[(f"Zm{c}=", ("not canonical base64", "not canonical base64")) for c in "5679"],
        ("Zh", ("not base64: ", "not canonical base64")), ("Zm9", ("not base64: ", "not canonical base64"))])
    def test_base64_has_one_form(self, text: Any, messages: tuple[str | None, str | None]) -> None:
        for urlsafe, message in enumerate(messages):
            with contextlib.nullcontext() if message is None else pytest.raises(confbuild.Malformed, match=f"^name: {re.escape(message)}"):
                confbuild.decode_base64(text, "name", bool(urlsafe))

    @pytest.mark.parametrize(("text", "data"), [
        ("", b""), ("666F6F626172", b"foobar"), ("666f6F", b"foo"), ("00ff", b"\0\xff"), *[(text, None) for text in (
            *NO_TEXT, "0", "000", "0g", "0x00", "00 00", " 0000", "00\n", "00\n\n", "0\n", "00:00", "0_0_", "+0", "-1",
            "\u0660\u0661", "\uff10\uff11", "\uff21\uff22", "0\0", "\ud800\ud800", "00\u00a0\u00a0")]])
    def test_hex(self, text: Any, data: bytes | None) -> None:
        """RFC 4648, section 8 and 10, in either case; bytes.fromhex would take blanks as well."""
        with contextlib.nullcontext() if data is not None else pytest.raises(confbuild.Malformed, match="^name: not pairs of hexadecimal digits$"):
            assert confbuild.decode_hex(text, "name") == data

    @given(data=st.binary(max_size=70), text=st.text(st.sampled_from("Ag0/+_-= \n\u0661") | st.characters(), max_size=9) | JSON_VALUES)
    def test_bytes_come_back_from_text_and_nothing_else_raises(self, data: bytes, text: Any) -> None:
        def url(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).decode().rstrip("=")

        def of_url(text: Any, what: str) -> bytes:
            return confbuild.decode_base64(text, what, urlsafe=True)

        assert confbuild.decode_hex(data.hex(), "name") == confbuild.decode_hex(data.hex().upper(), "name") == data
        assert confbuild.decode_base64(b64(data), "name") == of_url(url(data), "name") == data
        for encode, decode in ((b64, confbuild.decode_base64), (bytes.hex, confbuild.decode_hex), (url, of_url)):
            with contextlib.suppress(confbuild.Malformed):
                assert encode(decode(text, "name")) in (text, text.lower(), text.rstrip("="))

    @pytest.mark.parametrize(("value", "required", "optional", "message"), [
        ({"a": 1}, ("a",), (), None), ({"b": None, "a": 1}, ("a", "b"), (), None), ({"a": 1}, ("a",), ("b",), None), ({"b": 1, "a": 1}, ("a",), ("b",), None),
        ({}, (), (), None), ({}, ("a",), (), "not an object of a"), ({"b": 1}, ("a",), ("b",), "not an object of a, perhaps b"),
        ({"a": 1, "c": 1}, ("a",), ("b",), "not an object of a, perhaps b"), ({"A": 1}, ("a",), (), "not an object of a"),
        ({"a": 1, "": 1}, ("a",), (), "not an object of a"), *[(value, ("a", "b"), ("c",), "not an object of a, b, perhaps c") for value in (
            None, 1, "ab", ["a", "b"], True, 1.5)]])
    def test_parse_object(self, value: Any, required: Sequence[str], optional: Sequence[str], message: str | None) -> None:
        with contextlib.nullcontext() if message is None else pytest.raises(confbuild.Malformed, match=f"^name: {message}$"):
            assert confbuild.parse_object(value, "name", required, optional) is value

    def test_sha256_of_fips_180(self) -> None:
        assert confbuild.sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def test_merkle_roots_by_hand(self) -> None:
        """leaf = SHA-256(entry), parent = SHA-256(left || right), an unpaired node moves up unchanged [CONTRACT 3]."""
        def h(*parts: bytes) -> bytes:
            return hashlib.sha256(b"".join(parts)).digest()

        entries = ["", "b", "\u00e9", "d", "e", "f", "g"]
        a, b, c, d, e, f, g = (h(entry.encode()) for entry in entries)
        roots = {1: a, 2: h(a, b), 3: h(h(a, b), c), 4: h(h(a, b), h(c, d)), 5: h(h(h(a, b), h(c, d)), e), 6: h(h(h(a, b), h(c, d)), h(e, f)),
                 7: h(h(h(a, b), h(c, d)), h(h(e, f), g))}
        assert {n: confbuild.merkle_root(entries[:n]) for n in roots} == {n: root.hex() for n, root in roots.items()}
        assert confbuild.merkle_root([""]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        with pytest.raises(ValueError, match="a Merkle tree needs a leaf"):
            confbuild.merkle_root([])

# endregion 3
# ==============================================================================
# region 4. Records
# ==============================================================================


class TestRecords:
    def test_wire_forms(self) -> None:
        verdict = confbuild.Verdict("failed", "snp", {"nonce": None},
                                    [confbuild.Check("a", "failed", "1", "2", "why"), confbuild.Check("b", "not checked")])
        assert json.loads(confbuild.compact_json(verdict.to_wire())) == {
            "verdict": "failed", "platform": "snp", "claims": {"nonce": None}, "checks": [
                {"name": "a", "status": "failed", "expected": "1", "actual": "2", "detail": "why"},
                {"name": "b", "status": "not checked", "expected": "", "actual": "", "detail": ""}]}

# endregion 4
# ==============================================================================
# region 5. DER
# ==============================================================================


# method, encoding, value, source; what the tests' own writer makes of the value is the same encoding.
DER_GOOD: list[tuple[str, str, Any]] = [
    ("boolean", "0101ff", True), ("boolean", "010100", False),  # X.690 8.2, 11.1
    *[("integer", encoding, value) for encoding, value in (  # X.690 8.3
        ("020100", 0), ("02017f", 127), ("02020080", 128), ("020200ff", 255), ("02020100", 256), ("02027fff", 32767), ("0203008000", 32768),
        ("0201ff", -1), ("020180", -128), ("0202ff7f", -129), ("02028000", -32768), ("0203010000", 0x10000))],
    *[("oid", encoding, value) for encoding, value in (
        ("0603883703", "2.999.3"),  # the example of X.690 8.19.5
        ("06062a864886f70d", "1.2.840.113549"), ("06052b81040022", "1.3.132.0.34"), ("060a2b060104019c78010308", "1.3.6.1.4.1.3704.1.3.8"),
        ("060100", "0.0"), ("060127", "0.39"), ("060128", "1.0"), ("06014f", "1.39"), ("060150", "2.0"), ("06017f", "2.47"), ("06028100", "2.48"),
        ("0640" + "ff" * 63 + "7f", f"2.{2 ** 448 - 1 - 80}"))],
    ("bit_string", "030100", b""), ("bit_string", "0303000aff", b"\x0a\xff"),  # X.690 8.6
    ("text", "0c00", ""), ("text", "0c02c3a9", "\u00e9"), ("text", "0c04f09f9880", "\U0001f600"), ("text", "13025553", "US"), ("text", "16024040", "@@"),
    *[("time", "17" + tlv(0, text).hex()[2:], value) for text, value in (  # RFC 5280 4.1.2.5.1
        (b"261123120000Z", "2026-11-23T12:00:00Z"), (b"491231235959Z", "2049-12-31T23:59:59Z"), (b"500101000000Z", "1950-01-01T00:00:00Z"),
        (b"991231235959Z", "1999-12-31T23:59:59Z"), (b"000101000000Z", "2000-01-01T00:00:00Z"))],
    ("time", "180f" + b"20501231235959Z".hex(), "2050-12-31T23:59:59Z"), ("time", "180f" + b"00000101000000Z".hex(), "0000-01-01T00:00:00Z")]
NO_LENGTH, NO_END = "a length that is not definite and of the shortest form", "the element does not end"
NO_INTEGER = "an INTEGER that is empty or not of the fewest octets"
NO_TEXT, NO_TIME = "a string that is not of its alphabet", "no time in UTC"
DER_BAD: list[tuple[str, str, str]] = [
    *[("integer", encoding, message) for encoding, message in (
        ("", "tag 0x02 is missing"), ("0400", "tag 0x02 is missing"), ("2201ff", "tag 0x02 is missing"), ("02", NO_LENGTH), ("0280", NO_LENGTH),
        ("028001000000", NO_LENGTH), ("0281", NO_LENGTH), ("02810100", NO_LENGTH), ("02817f" + "01" * 127, NO_LENGTH), ("02820080" + "01" * 128, NO_LENGTH),
        ("0282ff", NO_LENGTH), ("028500000000010100", NO_LENGTH), ("02850100000000", NO_LENGTH), ("02ff" + "01" * 127, NO_LENGTH),
        ("0201", NO_END), ("027f" + "01" * 126, NO_END), ("028180" + "01" * 127, NO_END), ("0284ffffffff01", NO_END),
        ("0200", NO_INTEGER), ("02020000", NO_INTEGER), ("0202007f", NO_INTEGER), ("0202ffff", NO_INTEGER), ("0202ff80", NO_INTEGER))],
    *[("boolean", encoding, "a BOOLEAN that is neither 00 nor FF") for encoding in ("0100", "010101", "0101fe", "0102ffff", "01020000")],
    *[("oid", encoding, "an OBJECT IDENTIFIER that is empty, unfinished or too long") for encoding in (
        "0600", "060180", "06025581", "0641" + "ff" * 64 + "7f", "06822710" + "01" * 10000)],
    *[("oid", encoding, "an OBJECT IDENTIFIER that is not of the shortest form") for encoding in ("06028001", "0603558001", "060555048001" + "01",
                                                                                                  "06038080" + "01")],
    *[("bit_string", encoding, "a BIT STRING with unused bits") for encoding in ("0300", "030101", "03020780", "030208ff", "0302ff00")],
    *[("text", encoding, "no string") for encoding in ("", "0400", "140141", "1e020041", "3000")],
    *[("text", encoding, NO_TEXT) for encoding in ("0c01ff", "0c02c080", "0c03eda080", "0c01c3", "1302c3a9", "160180")],
    *[("time", f"{tag:02x}" + tlv(0, text).hex()[2:], NO_TIME) for tag, text in (
        (0x17, b""), (0x17, b"2611231200Z"), (0x17, b"2611231200000"), (0x17, b"261123120000+"), (0x17, b"261123120000+0000"), (0x17, b"261323120000Z"),
        (0x17, b"260023120000Z"), (0x17, b"261132120000Z"), (0x17, b"261100120000Z"), (0x17, b"261123240000Z"), (0x17, b"261123126000Z"),
        (0x17, b"261123120060Z"),
        (0x17, b" 61123120000Z"), (0x17, b"261123120000\n"), (0x17, b"\xd9\xa26112312000Z"), (0x18, b"20261123120000.5Z"), (0x18, b"20261123120000"),
        (0x18, b"20261123120000z"), (0x17, b"20261123120000Z"), (0x18, b"261123120000Z"), (0x18, b"20261123120000Z\0"))],
    ("time", "0400", "tag 0x18 is missing"), ("time", "", "tag 0x18 is missing")]
DER_METHODS = ("boolean", "integer", "oid", "bit_string", "text", "time")
DER_LIKE = st.binary(max_size=24) | st.builds(lambda tag, body: tlv(tag, body), st.sampled_from((1, 2, 3, 6, 12, 19, 22, 23, 24, 48)),
                                              st.binary(max_size=160)) | st.builds(
    lambda tag, text: tlv(tag, text.encode()), st.sampled_from((12, 19, 22, 23, 24)), st.from_regex(r"[0-9]{12,15}Z|[a-zA-Z\u00e9 ]*", fullmatch=True))


def der_write(method: str, tag: int, value: Any) -> bytes:
    """The one encoding of what a method of Der returned."""
    if method == "time":
        digits = re.sub(r"[-:T]", "", value).encode()
        return tlv(tag, digits[2:] if tag == 0x17 else digits)
    return {"boolean": lambda: tlv(1, b"\xff" if value else b"\0"),
            "integer": lambda: tlv(2, value.to_bytes((value if value >= 0 else ~value).bit_length() // 8 + 1, "big", signed=True)), "oid": lambda: oid(value),
            "bit_string": lambda: bits(value), "text": lambda: tlv(tag, value.encode())}[method]()


class TestDer:
    @pytest.mark.parametrize(("method", "encoding", "value"), DER_GOOD, ids=lambda value: str(value)[:30])
    def test_good_both_ways(self, method: str, encoding: str, value: Any) -> None:
        data = bytes.fromhex(encoding)
        assert der_write(method, data[0], value) == data
        der = confbuild.Der(data + b"\x05\x00", "x")
        assert getattr(der, method)() == value
        assert (der.peek(), der.element(5)) == (5, (b"\x05\x00", b""))
        der.end()
        assert der.peek() == -1
        for size in range(len(data)):
            with pytest.raises(confbuild.DerError):
                getattr(confbuild.Der(data[:size], "x"), method)()

    @pytest.mark.parametrize(("method", "encoding", "message"), DER_BAD, ids=lambda value: str(value)[:30])
    def test_bad(self, method: str, encoding: str, message: str) -> None:
        with pytest.raises(confbuild.DerError, match=f"^x y: {re.escape(message)} at byte [0-9]+$") as caught:
            getattr(confbuild.Der(bytes.fromhex(encoding), "x y"), method)()
        assert caught.value.structure == "x y"

    @pytest.mark.parametrize("size", [0, 1, 127, 128, 255, 256, 65535, 65536, 1 << 24])
    def test_lengths(self, size: int) -> None:
        """X.690 8.1.3, 10.1: the boundaries of each form, which the tests' writer knows."""
        data = tlv(4, bytes(size))
        assert confbuild.Der(data + b"x", "x").element(4) == (data, bytes(size))
        with pytest.raises(confbuild.DerError, match="^x: the element does not end at byte 0$|^x: a length that is not definite .* at byte 0$"):
            confbuild.Der(data[:-1], "x").element(4)

    def test_a_cursor(self) -> None:
        der = confbuild.Der(seq(number(1), tlv(0x31, number(2))) + number(3), "x")
        inner = der.enter()
        assert (inner.integer(), inner.enter(0x31).integer(), der.integer(), inner.peek(), der.peek()) == (1, 2, 3, -1, -1)
        inner.end()
        with pytest.raises(confbuild.DerError, match="^x: bytes are left over at byte 3$"):
            rest = confbuild.Der(number(1) + b"\0", "x")
            rest.integer()
            rest.end()
        with pytest.raises(confbuild.DerError, match="^x: why not at byte 0$"):
            confbuild.Der(b"", "x").fail("why not")

    @given(DER_LIKE, st.sampled_from(DER_METHODS))
    @settings(max_examples=120)
    def test_whatever_is_read_has_this_one_encoding(self, data: bytes, method: str) -> None:
        der = confbuild.Der(data, "x")
        try:
            value = getattr(der, method)()
        except confbuild.DerError:
            return
        written = der_write(method, data[0], value)
        assert data.startswith(written) and len(written) == len(data) - len(der._data[der._at:])

    @given(st.integers() | st.integers(-2 ** 3000, 2 ** 3000), st.lists(st.integers(0, 2 ** 40), max_size=6), st.integers(0, 2), st.integers(0, 39))
    def test_what_is_written_is_read(self, value: int, arcs: list[int], first: int, second: int) -> None:
        dotted = ".".join(map(str, (first, second, *arcs)))
        der = confbuild.Der(der_write("integer", 2, value) + oid(dotted), "x")
        assert (der.integer(), der.oid(), der.peek()) == (value, dotted, -1)

    def test_long_input_is_no_matter(self) -> None:
        """Nothing in it recurses, and nothing takes quadratic time."""
        data = b"\x30\x80" * 20_000
        with within(20), pytest.raises(confbuild.DerError):
            confbuild.Der(data, "x").enter()
        with within(20):
            assert confbuild.Der(number(1 << 8_000_000), "x").integer() == 1 << 8_000_000
            der = confbuild.Der(b"\x02\x01\x01" * 20_000, "x")
            assert sum(der.integer() for _ in range(20_000)) == 20_000

# endregion 5
# ==============================================================================
# region 6. Signatures
# ==============================================================================


MESSAGE = b"123400"  # of the rows of Wycheproof

# Wycheproof testvectors_v1/ecdsa_secp384r1_sha384_p1363_test.json, message "123400": tcId, comment, whether it is valid, x y r s.
WYCHEPROOF_ECDSA = (
    (1, "signature malleability", True,
     ("2da57dda1089276a543f9ffdac0bff0d976cad71eb7280e7d9bfd9fee4bdb2f20f47ff888274389772d98cc5752138aa4b6d054d69dcf3e25ec49df870715e34"
      "883b1836197d76f8ad962e78f6571bbc7407b0d6091f9e4d88f014274406174f12b30abef6b5476fe6b612ae557c0425661e26b44b1bfe19daf2ca28e3113083"
      "ba8e4ae4cc45a0320abd3394f1c548d71840da9fc1d2f8f8900cf485d5413b8c2574ee3a8d4ca03995ca30240e09513805bf6209b58ac7aa9cff54eecd82b9f1")),
    (147, "k*G has a large x-coordinate", True,
     ("4bf4e52f958427ebb5915fb8c9595551b4d3a3fdab67badd9d6c3093f425ba43630df71f42f0eb7ceaa94d9f6448a85dd30331588249fd2fdc0b309ec7ed8481"
      "bc16f27800c13d7db700fc82e1b1c8545aa0c0d3b56e3bfe789fc18a916887c2000000000000000000000000000000000000000000000000389cb27e0bc8d21f"
      "a7e5f24cb74f58851313e696333ad68bffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52970")),
    (148, "r too large", False,
     ("4bf4e52f958427ebb5915fb8c9595551b4d3a3fdab67badd9d6c3093f425ba43630df71f42f0eb7ceaa94d9f6448a85dd30331588249fd2fdc0b309ec7ed8481"
      "bc16f27800c13d7db700fc82e1b1c8545aa0c0d3b56e3bfe789fc18a916887c2fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffe"
      "ffffffff0000000000000000fffffffeffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52970")),
    (152, "small r and s", True,
     ("554f2fd0b700a9f4568752b673d9c0d29dc96c10fe67e38c6d6d339bfafe05f970da8c3d2164e82031307a44bd32251171312b61b59113ff0bd3b8a9a4934df2"
      "62aa8096f840e9d8bffa5d7491ded87b38c496f9b9e4f0ba1089f8d3ffc88a9f0000000000000000000000000000000000000000000000000000000000000000"
      "00000000000000000000000000000002000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001")),
    (180, "s == 1", True,
     ("bd3d91f003e18adbea73079d4eba23b91fc17fcec14c9eb15a193fbc9ca39c8c747cd7a2c9623e05dd587ccbb8ab4c443adb0a0706aa5ea7a68042082fccefc9"
      "79612a7a1a3d694b00793b03f89bff866a8b97c8e77990c29360ce795036c76455555555555555555555555555555555555555555555555542766f2b5167b9f5"
      "1d5e0490c2e58d28f9a40878eeec6326000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000001")),
    (197, "point at infinity during verify", False,
     ("f896353cc3a8afdd543ec3aef062ca97bc32ed1724ea38b940b8c0ea0e23b34187afbe70daf8dbaa5b511557e5d2bddac4bd265da67ceeafca636f6f4c0472f2"
      "2a9d02e2289184f73bbb700ae8fc921eff4920f290bfcb49fbb232cc13a210287fffffffffffffffffffffffffffffffffffffffffffffffe3b1a6c0fa1b96ef"
      "ac0d06d9245853bd76760cb5666294b955555555555555555555555555555555555555555555555542766f2b5167b9f51d5e0490c2e58d28f9a40878eeec6326")),
    (200, "u1 == 1", True,
     ("3ecfd58a3ce583866e0471d16eb3c10a411ec3b8671f3a04769b1ed8464a71cf1c76d8d9b7e3670bbe712d6f554a9383d980d8bedf57470d6b45cc1ad0c6426d"
      "c70a0e4be901106a36663bfcab04fcb86008777b92445120d5e3641d9739636255555555555555555555555555555555555555555555555542766f2b5167b9f5"
      "1d5e0490c2e58d28f9a40878eeec6326f9b127f0d81ebcd17b7ba0ea131c660d340b05ce557c82160e0f793de07d38179023942871acb7002dfafdfffc8deace")),
    (202, "u2 == 1", True,
     ("e78fe2c11beac7090ee0af7fed469a8ccebd3cccc4ee9fccc8ef3fc0455b69aaa082dc13e1d84f34026cb6f0af9e992ff34ebba71bf3a4050bf28e4084b5c5f5"
      "d4098ec46f10a31b02fb4bf20cc9362f6f02a66e802f817507535fac3ec0b09955555555555555555555555555555555555555555555555542766f2b5167b9f5"
      "1d5e0490c2e58d28f9a40878eeec632655555555555555555555555555555555555555555555555542766f2b5167b9f51d5e0490c2e58d28f9a40878eeec6326")),
    (228, "point duplication during verification", True,
     ("e585a067d6dff37ae7f17f81583119b61291597345f107acffe237a08f4886d4fdf94fe63182e6143c99be25a7b7d86b572c1e06dd2c7b94b873f0578fcb2b99"
      "d60e246e51245d0804edd44b32f0f000c8f8f88f1d4a65fea51dbbb4ab1e2823b37699e0d518a4d370dbdaaaea3788850fa03f8186d1f78fdfbae6540aa670b3"
      "1c8ada0fff3e737bd69520560fe0ce6064adb4d51a93f96bed4665de2d4e1169cc95819ec6e9333edfd5c07ca134ceef7c95957b719ae349fc439eaa49fbbe34")),
    (230, "point with x-coordinate 0", False,
     ("b4d78cccbced8065c0ebdc330b4670ec99309273e442b9be341196c1043e4441fc57b914085595bfc755c64fc409f0ba01fee31cbbbaed5c1323f09c87df9b07"
      "12c12e99733fa23ef91b4e6ca666b09dd7540ebf1068a15155bc069e3d595c8c0000000000000000000000000000000000000000000000000000000000000000"
      "0000000000000000000000000000000155555555555555555555555555555555555555555555555542766f2b5167b9f51d5e0490c2e58d28f9a40878eeec6326")),
    (232, "comparison with point at infinity", False,
     ("b101cdb3eba20e112adbb4bbd2cb479a69e590a44ea902631832abfab8af2c3041b3df7f1665b2c6eb533f546217100a1a61aa9951578ad4f00ae17339a8a6f1"
      "359bbd0ac355678ed4df21338f08763c1d3702ec132b634c7bcc0118efb1d0dd55555555555555555555555555555555555555555555555542766f2b5167b9f5"
      "1d5e0490c2e58d28f9a40878eeec632633333333333333333333333333333333333333333333333327e0a919fda4a2c644d202bd41bcee4bc8fc05155c276eb0")),
)
# NIST CAVP, FIPS 186-3 ECDSA SigVer.rsp, [P-384,SHA-384]: line of the file, result, message, x y r s.
CAVP_ECDSA = (
    (1943, "P (0 )",
     ("9dd789ea25c04745d57a381f22de01fb0abd3c72dbdefd44e43213c189583eef85ba662044da3de2dd8670e6325154480155bbeebb702c75781ac32e13941860"
      "cb576fe37a05b757da5b5b418f6dd7c30b042e40f4395a342ae4dce05634c33625e2bc524345481f7e253d9551266823771b251705b4a85166022a37ac28f1bd"),
     ("cb908b1fd516a57b8ee1e14383579b33cb154fece20c5035e2b3765195d1951d75bd78fb23e00fef37d7d064fd9af144cd99c46b5857401ddcff2cf7cf822121"
      "faf1cbad9a011bed8c551f6f59b2c360f79bfbe32adbcaa09583bdfdf7c374bb33f64fb65cd6a8918523f23aea0bbcf56bba1daca7aff817c8791dc92428d605"
      "ac629de2e847d43cee55ba9e4a0e83ba4428bb478a43ac73ecd6de51ddf7c28ff3c2441625a081714337dd44fea8011bae71959a10947b6ea33f77e128d3c6ae")),
    (1957, "F (4 - Q changed)",
     ("21eb31f2b34e4dde8d6c701e976d3fbbf4de6a3384329118d4ddb49adb2bb44465598abf6df25858b450c7767e282ccaca494088274e37353674eef58f583937"
      "d3d184ef727317d3672397a74c8fe327919a3df8fd65af0bc8cebbc40095adf89f1bf2c5e6dc6ba44633fd8433b25f065f5e3eb4840af23cc534415406745a31"),
     ("5140108b93b52d9ad572d6129ed6564766f8df3755e49fa53eba41a5a0d6c1d24a483c90070583a66e3cfa52b6fb1f31ff52498446a40c61e60c975542564726"
      "25633eda0c1a8b4061481fecfbe9c4503e99dfc69e86c9e85c8cc53dca6b8dc4b2726b2ba9da02de35e9953fc283d1e78700860d4c33dce8db04dd41499d9048"
      "66c1b8debb377f6c0dfcb0704252174f0775b027068d7ad55121a278a819f52099ace750d5e996eaec9dee7be72758736cf769650148fbd5c411beb9b88f979e")),
)
# Wycheproof testvectors_v1/rsa_pss_2048_sha384_mgf1_48_test.json, message "123400", e = 65537: n; tcId, comment, whether it is valid, signature.
WYCHEPROOF_PSS_N = int(
    "cda6fa5ca76bfe0492ec57e0a3bfff7272dc8d1e25ad1fb338aa050f02c104e63133d6b5b7c4985ebbae9ac036a5b9c03074d60aec8e25baf392a0c430ff05b8"
     "8e948805d3dd74511d8885250a7b574215ada015c559076686e253ccc96c0815b1291ee787cc3363b4f77d930eb998d7c582b24cea9ce21de9722791989863a2"
     "7ebc80a00de5bd2f9228775e5a4ceb054d58c9be36a054336971a13642dd9510dd696aa268db3aab2299d5d88f8e562434d1427094d3df8e72d1ef69b4ed34d1"
     "2bac375223b2a25cf227f735f816e85e17239304769a6082154cd15899fc1eaefb69b748a3e5ed24d38372597de3e4e2a27b951d6ac7db182d6809d8ff511b7f", 16)
WYCHEPROOF_PSS = (
    (4, "valid signature", True,
     ("9bc2fc58e6db83a04d327571189b835a63df65aa3a41918aebd7f97c069cd499978370e4a4e46b1c27165b51f703beb3beb1c0a3a83ed6613dc840b58612a996"
      "dee3a10e1907bbceb5960e4f7a0fa9cce69a3ac34cbbf10b404b685763ae3fbafb42f125a060626e1136742d4ccdb469b3a6b58fbb4cacd3f5fe88da8838e2d2"
      "645d11618067edc8eb6bf6f96e1055122cff85c423d113cb4e9e1303c268dd5ceca5a201bc17d582a84ffc14f7f5e654a25a89486d54991f85bd24a6112849f3"
      "8ccff768d1ca3c44e3e6e6a23e177426d26bb1173cba60a7938bde64b02432db83fab73c3fd4f10578f826ac3cea04172aaf43d60455c2632ae06c7665ef4537")),
    (99, "s_len changed to 0", False,
     ("69a1af712699465ff84ed85dbb35323df339f7627310b2b3cf2b8b9fd4fa5cb0f536680d7bf905347a642c1960c3e17495770bf939b7b3d426ed2209b5e47a60"
      "29af076a8e95f9a7fc959041d2e221d433f3836e37b6075a8388a2a6aed1785528cc79348d4dead276988f7f49d827c0ebbbfe7aae9d946f16c7a3598da58771"
      "0a8d9fc72ca537534959c76a35c91ea90989dd0fce6bbb0d0f8c439188e51e0c82debfab4ac1dd7df3c3e48627039a9d3829a7f08432da36b6ca6d9ba0f9a15f"
      "6a61afa09c1ad305c3182e0a88e128192d8d064af7037950574cfd21b1ddb5f562ceecefed4e62c6d12f82135aab2c0a6dba9a181945f56943b4a81faa42fff0")),
    (104, "s_len changed to 49", False,
     ("84f7ce7fd2dea710a2513ec4e326642eb8a467a4d94d2c35c50edb9623026ad40382b25a983d95bf6fcb8c13310deb1059f20f8fa8131480dd721842de05baeb"
      "43ef689225837acea2af91d66814be312fe0b0408fe1e4268c79092e6c1e45b5f9aa44615c0763bc76bf84272b8870259b2eb0660d841d6c45e11bcd521dccd7"
      "db749b440aab67d831ddbcc228aec2e80f173e798fc413c2bb980cf520e878ae4a1be675d187a799bb9aba6cd485aba6c0994ca0868116b12b192bb4f1b037b1"
      "b255669b9dc3bd885d2ea2752ec2839d2a09005083c5256ccb29bbee416a05f8d0128f27e018a943b52fc4890989ad18079ca24eeb22bcc7535167ccccf1037e")),
    (106, "salt is all 0", True,
     ("581afeec7d9ea6dc2999a2e3039fb2e7ebcb15a416129077ce1ec60e0f0d0dd9d81562d58e79be65d5227671c06ee1f065767fea6ffa543a68c7864f330f852e"
      "60c923b97433a416711a068236486f6e3005a456305a36e7160ab194b25de50761353e9f8e824e55bef6fcf3a455fae37a309af15ec9f094bb4cd51475449829"
      "d7363f573494e027f0f61c54073ec72dee7ff5f5b1ee952001eef2bc241c5fdb9977ee9b4a8e046d5e215db5148e442610744023ea1439021befd095b22b41bd"
      "129e17bb3e529e9d3e85ecc47f6c7c9f1bc4a41ad8001a0afb38186eb849c79e024f2f28933ef48325ebe25fbca14f01cbee722e5ae9a2ad2a8ffc9492f86d53")),
    (126, "including garbage", False,
     ("210c6cacce03e62cfd5509e6f13e62fe3f78c8f93e9dec45b4096cf494bcf6087485cbc19690e09f4fe2368c8a3a3554af5438d5ad18daf1e9786811ecd1af05"
      "0b06bd054ccbd7e609e5fdc2ad40d5ca775b76e145ff199ecef3bb94dbf5c013525367cb0c7c010436f24244db3efdbdf61fc3f4ea414191e921186c89bc5b87"
      "d3e2f0e016326f11a0bc750ed9ad1f5ed4eee7fd58dae803796952d9e410a28a79d12b2d18a6cbb4b7911d7e8a852273a15461ca824c3ed373e647d3d8db631c"
      "9d5b79af7568eb472fa443f85bd9a54c91c741964337c68703fb8ae95d35d12a4125f24537882582a2f0d00da45faa43eba465d94b052b0981ca2c60db7fbd06")),
    (141, "PKCS #1 v1.5 signature with SHA-384", False,
     ("682272b36ee1a6c7d4d73f0f3f153d8e84e2fa4ac812581fdda214a7b45d6ff7b7b3db0c89da96ce2e651fcfe25596761982799289b9fd2d69cf122e08404c9d"
      "b0bdf6f8240b1545e76302a5a401ad56522e0a6158157dc1f9445f8cafc161b25423d35671d9ef714c5d33f7fc155424ab2ac34e0cc93bf2ce385721dacdc625"
      "1c7e3a5618bdffc8ef3f278477083a96de83303b9d286e64d8297ef0948b996616d34036bdee5538ca0c06fa08c72f03739fbc578814b402671f5d625dc9050d"
      "61b389d1f0a32011ac0dbb53b9c2980d315bc16e2272206a1a955ee870df725e78a7c6e9f793f5428af92c670df8e3bb0d567699714b04fede399f49fe19d0e7")),
)
# Wycheproof testvectors_v1/rsa_signature_2048_sha256_test.json, message "123400", e = 65537: n; tcId, comment, whether it is valid, signature.
WYCHEPROOF_PKCS1_N = int(
    "a2b451a07d0aa5f96e455671513550514a8a5b462ebef717094fa1fee82224e637f9746d3f7cafd31878d80325b6ef5a1700f65903b469429e89d6eac8845097"
     "b5ab393189db92512ed8a7711a1253facd20f79c15e8247f3d3e42e46e48c98e254a2fe9765313a03eff8f17e1a029397a1fa26a8dce26f490ed81299615d981"
     "4c22da610428e09c7d9658594266f5c021d0fceca08d945a12be82de4d1ece6b4c03145b5d3495d4ed5411eb878daf05fd7afc3e09ada0f1126422f590975a19"
     "69816f48698bcbba1b4d9cae79d460d8f9f85e7975005d9bc22c4e5ac0f7c1a45d12569a62807d3b9a02e5a530e773066f453d1f5b4c2e9cf7820283f742b9d5", 16)
WYCHEPROOF_PKCS1 = (
    (4, "plain", True,
     ("1758eb94588e6fc4f50c1be1afcaa41027869f304cad513b1fb12c2f446d63cdc05c4830a7e3e630da7b2da4f7867cc173bf6420f9732277282596de41ded32e"
      "21d0cc31441174da8765f57419c7764ea758f55bc17646eb100c435d1ac0eed6fc7ba6de5f832094ee2f479979765e05ac9976788db3c241a9e32a0da864f001"
      "9a87646ba623d63f4411af5dee1be9ec488c7e3e1b231479de70b9ac5f78a17b1f4120aece45f26c07e7bb345fdfeb05e14bcaacc614672a465fc523624cb19f"
      "66f9c6c3f642b832ca44cb25176d679f0e05606c3fed022cac24c2bf960a406d48818e3eb7ed53b0446032469047dfed95fc18088c92d91d93722c47f88163a8")),
    (8, "Missing NULL in the ASN encoding", False,
     ("095dad1fd82bcd36652a381b7f4dd656bd89b40aa58b56da4f6aa8247874b935e65d2b86752d537df7103884d39dd9ad3d65f87404526b09094c5615c6249979"
      "b0dc58d2199ae8696a5b76b4bb03eaf08c2ab6aec686c6b1b289c9b44f648bd30cb1ac6a64a73d68e59cd05e7aa1b780f4bfd7b83dfe3b884ec11821a93dc5bb"
      "b47a00eea4557b6b96b5656276001f1f295ddbbbc511a99b9a665b9c2674c8af0d812286d0be3ce74817ba2cad283757de35dfb149f2835f60cb03ff155524a5"
      "7f78b148feceb84cd20b0ae22e3e48f433fbd9bfd60be8afec93165ee0310be961d3695f309d031320c830aa6ba08b5a51d943797097c57630be391bd23736cc")),
    (9, "length of digestInfo uses long form encoding", False,
     ("8a0e82d4f334aca72a718b6f8f643f69c6048d619d5eba71263a5d2d3ac7a7af133b780c7595ca2c982c006e861948f543cd0210c758691f9626842c25de2843"
      "ea314ca8eff285d47e0cffa54180af416004017034962a80a5959c3d3f1bfc154a4824462a93c014f6dfe920824f414a6e30e0e5944d480b99949ec7bf64c4a7"
      "461575933b17d7d6b0178b5192392ace3ed8469e8ac1dacae51ad5d3ad73dcb213e056d04596e64d8c0703def3110c7cecc93ba8ac8059f0f3d66b89d8712c62"
      "b41d407e4b4a104f4569558b0290c213cad6d0653898b9df8f4a453ab07d13bfb7598d505abbd0c4987e4f1ac66e1a523e113e370ab7cf990f0cc63f50f4f0a4")),
    (26, "appending unused 0's to digestInfo", False,
     ("51e52edd65ff6f2fb812d2fd4f3f9852eedd745630c9bf12e6f63347c2c80402ab0da654155046e4831ea02fec6dafffe94e6c450a96cf56831a0bf8e48b9945"
      "6da7e17b9f642e9d6e033153f740095a67c86f5fa4fb37eec9cffacd7dbc368bf07ee00050606748dc887fe0778871ff64953c249244e78ceb4b62efffd2e9ca"
      "e6803c25504a67fd94941eff1a320b1e0618eb9cc350d8241892adfc42790f24745be12ecdc63f891bb6c0066ee28895c78a9f1773ca527e976eb29abf4f649f"
      "83f0fdd7a7f72b7dd3343149b4c1b699588948e5508a58bbc481fbda5115cb5822cb10834cc01989264c79794ba032967271a7d2af9c12a493d1bf3c070b7207")),
    (240, "invalid PKCS#1 signature padding: 0001ff...ee00", False,
     ("4b140acb262c451b0761236b926afa2829e8a095828f7dcf196eaf7fa46fdcf7fbcaf194aa3000ae8d3dc7dacc26952502b1558a67fb692da5fcc7dbf48cbc52"
      "60e2b2a7041fdf7bf46f531d4ef48998dfcb65e182065535aaf182ae6abf6e819e7d96ec86178137a3c14383f89438ab35f0dc7698e1811c415e163f8bac5435"
      "dddba5db55aa6b393d538d31b34332fcc34ef8e6eb059d4cc453297d6895ba480593a5536a4e553a55417295b6f6798734df67e739e54d3092de4f476cc0f65a"
      "ac6950631081df1116097a7f6a9d00a1afbe0ce6b2bd32ef22acc95219f05df9fb7e9a8b391e6277cffeda298bf094730f5663172183dc5842056de36137ee90")),
    (243, "PKCS#1 padding too short: 000001ff...", False,
     ("3ca3dec31913ad3cc2f3bb5b9ebd5d1e4bf137df6e5ae55fc5220c2b6ff150c8e0fdd6e4a07dd955f67e65546550c6a9fb89b7edff36dd8dec900aa6ff41e691"
      "f42000cf1e49acef9f491edd5a3bed1fccc3a36d48c0615679e6f166d3fb957d04e5a8198dc1d6d9df9605bdb827c7d29fbe40f80ad44fcc63cf9f93a7038941"
      "065e9a000450a769c4f3daedfd5c16bd79e4b9311f4e8e75a36c7a4b6044ab219f42feff6ec4c06aac0df4ea9152b47834c344c3d7c6e9fbb234d0cbc0b40721"
      "11b55bfe4187599400ac34c1a24861ffcc556c21a7e5b93160f46c0fbd0616dfe6b244dc68693081a59047e11b80438c3517031754ef72e4ea9fa3fc86ae1bfd")),
)
# NIST CAVP, FIPS 186-3 RSA SigVer15_186-3.rsp, [mod = 2048], SHA256, e = 65537: n; line of the result, result, message, signature.
CAVP_PKCS1_N = int(
    "a911245a2cfb33d8ee375df9439f74e669c03a8d9acad25bd27acf3cd8bea7eb9dbe470155c7c72782c94861f7b573cd325639fb070e9ba6e621991aefa45106"
     "182e4d264be7068035595d7549052989b3e7fd04cabc94012c1278a0ef8672b1a51dd1a9e276816ba497dea24b4febe3dd8e977707bcd230ca6fb6f8a8bff9e6"
     "ba24fbadcd93f00126b19b396a38e6ef86d18fef945b9154c1963fb488c7025953511f86d05638bfe056493730bc6778446e59cd3c5c3acf07a0a3a649437936"
     "52f10e3292aa7a6d25a03181cc6f6ba0658d909e59ce2a02bacc9766fd8c4fbd4ed9c23a866844b8a794d49e505f9f944870a71aadbe5338039825c2dff81af3", 16)
CAVP_PKCS1 = (
    (1666, "P",
     ("6918d6328ca0a8b64bbe81d91cdea519911b59fc2dbd53af76006fec4b18a320787135ce883b2b2edb26041bf86aa52c230b9620335b6e7f9ec08c7ed6b70823"
      "d819e9ab019e9929249f966fdb2069311a0ddc680ac468f514d4ed873b04a6beb0985b91a0cfd8ed51b09f9e6d06da739eaa939d5a00275901c4f8cf25076339"),
     ("794d0a45bc9fc6febb586e319dfa6924c888594802b9deb9668963fdb309bf02817960a7457106fc474f91601436e8954cbb6815350b2c51b53c968d2c48cc17"
      "99550d5d03b41f6e5a8c3c264d2e2fe0b5b8ff53fdcb9dd111c985cb488d7086e6548b4077ec00721c9cb500fe07a031c2030e8ad1dd0112c34ffd9091d77a18"
      "7aac8661b298eee39eb615f9715c4c48a6762ede55a466ec7f3cdb6a937cfc80188a85d8f8d3a2a80b199ce5e6375af8f02f06d706a34d9cf38318903965db54"
      "aaa7d3fa7a7ee58034cd58c8435739c8906366e2ddba293f2fb2c15f07fa4951014471e7f677d3bdacffc4c68a906e08d68b39f9010746cbacd22980cee73e8d")),
    (1700, "00 on end of pad removed",
     ("ecb6731a006eb273f6c5404a2e2d1faa5232f7afdff5b69be1dc7927fe88af17b5077b11e84b5baf98db08d3f1c99d3b86e4fa55dd2e6b542e91858368cd51d9"
      "75b5adcebf9bee6ef309caac05b276f874a70b14cfce2e237891f003a8d3f3dcb328cff98d45b3d78db5507c72cef20aa4e4f094bcbc47304543824ec480dd48"),
     ("8831265bcd54bf33d8c46cbd48052e9357c31afee92276b1b744e2521da9b83968e9ca90446064d8f174b248f64e792f91f4fae15252688e0f8ad38b28a532dd"
      "c7dc59e77d81b7a51dda2df2f2cbd5195c87b66db297b74296d4058fd00a060377dc1ec286c21e4f84c17ef315d443e89912e6b5d5f7d4ade31cc2b1aaaebcf0"
      "9aaca20041b5f9b799b5b532391f85fd236ff3fa794baf4b25a2a188b0746728f1cfe0816b37d8dd648c53d76b81ee42ce27bf07baa27016b82c9ef3e1f5523d"
      "ed7d35622d4986a6699b261f483e9b68b9c99e17e4aeb1c7baa84be1177264894ed5aab8592dfaaa652898b37aec28c19d154df27956f604bb6a30d0964d4e97")),
)
P384 = (confbuild.P384_P, confbuild.P384_N, confbuild.P384_B)


def ecdsa_verifies(q: Sequence[int], message: bytes, r: int, s: int) -> bool:
    """Whether; and where not, for the reason that is no other."""
    try:
        confbuild.verify_ecdsa_p384(confbuild.Point(*q), message, r, s)
    except confbuild.BadSignature as e:
        assert str(e) == ("inconsistent" if 0 < r < P384[1] and 0 < s < P384[1] else "r or s is out of range")
        return False
    return True


def rsa_verdict(verify: Callable[[confbuild.RsaKey, bytes, bytes], None], key: confbuild.RsaKey, message: bytes, signature: bytes) -> str:
    """Empty, or why not."""
    try:
        verify(key, message, signature)
    except confbuild.BadSignature as e:
        return str(e)
    return ""


def four_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(text[i:i + 96], 16) for i in range(0, 384, 96))


def pss_em(bits: int = 2047, salt: bytes = b"s" * 48, message: bytes = MESSAGE, flip: Mapping[int, int] | None = None, db: bytes | None = None) -> bytes:
    """The encoded message of EMSA-PSS [RFC8017 9.1.1]. flip: of DB before it is masked; db: instead of the right one."""
    h = hashlib.sha384(bytes(8) + hashlib.sha384(message).digest() + salt).digest()
    size = (bits + 7) // 8 - 49
    data = bytearray(bytes(size - len(salt) - 1) + b"\x01" + salt if db is None else db)
    for place, change in (flip or {}).items():
        data[place] ^= change
    mask = b"".join(hashlib.sha384(h + i.to_bytes(4, "big")).digest() for i in range(size // 48 + 1))
    masked = bytearray(a ^ b for a, b in zip(data, mask, strict=False))
    masked[0] &= 0xFF >> (8 * (size + 49) - bits)
    return bytes(masked) + h + b"\xbc"


def bare_key(bits: int) -> confbuild.RsaKey:
    """A key whose signatures are the encoded messages themselves, so that a test can write any."""
    return confbuild.RsaKey(2 ** bits - 1, 1)


T = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(MESSAGE).digest()
EM_PKCS1 = b"\x00\x01" + b"\xff" * 202 + b"\x00" + T


class TestSignatures:
    def test_the_curve(self) -> None:
        """SP 800-186 3.2.1.4, recomputed: g lies on the curve, and has the order n, which is a prime near p (Hasse)."""
        p, n, b = P384
        x, y = confbuild.P384_G
        assert p == 2 ** 384 - 2 ** 128 - 2 ** 96 + 2 ** 32 - 1 and (y * y - x ** 3 + 3 * x - b) % p == 0
        assert p384_multiply(n) is None and p384_multiply(n - 1) == (x, p - y) and abs(n - p - 1) <= 2 * math.isqrt(p)
        assert all(pow(a, n - 1, n) == 1 == pow(a, p - 1, p) for a in (2, 3, 5, 7))  # Fermat
        seed = bytes.fromhex("a335926aa319a27a1d00896a6773a4827acdac73")  # of FIPS 186-4 D.1.2.4; b comes from it by X9.62 A.3.3.1
        z = int.from_bytes(seed, "big")
        hashes = [hashlib.sha1(((z + i) % 2 ** 160).to_bytes(20, "big")).digest() for i in range(3)]
        c = int.from_bytes(hashes[0], "big") % 2 ** 63 << 320 | int.from_bytes(hashes[1] + hashes[2], "big")
        assert (b * b * c + 27) % p == 0

    @pytest.mark.parametrize(("case", "comment", "valid", "row"), WYCHEPROOF_ECDSA)
    def test_ecdsa_wycheproof(self, case: int, comment: str, valid: bool, row: str) -> None:
        x, y, r, s = four_numbers(row)
        assert ecdsa_verifies((x, y), MESSAGE, r, s) == valid
        if case == 228:  # and 229: the negative of the key
            assert not ecdsa_verifies((x, P - y), MESSAGE, r, s)

    @pytest.mark.parametrize(("line", "result", "message", "row"), CAVP_ECDSA)
    def test_ecdsa_cavp(self, line: int, result: str, message: str, row: str) -> None:
        x, y, r, s = four_numbers(row)
        assert ecdsa_verifies((x, y), bytes.fromhex(message), r, s) == (result[0] == "P")

    def test_ecdsa_rfc_6979(self) -> None:
        """RFC 6979 A.2.6: P-384, SHA-384, message "sample"."""
        q = (0xEC3A4E415B4E19A4568618029F427FA5DA9A8BC4AE92E02E06AAE5286B300C64DEF8F0EA9055866064A254515480BC13,
             0x8015D9B72D7D57244EA8EF9AC0C621896708A59367F9DFB9F54CA84B3F1C9DB1288B231C3AE0D4FE7344FD2533264720)
        r, s = (0x94EDBB92A5ECB8AAD4736E56C691916B3F88140666CE9FA73D64C4EA95AD133C81A648152E44ACF96E36DD1E80FABE46,
                0x99EF4AEB15F178CEA1FE40DB2603138F130E740A19624526203B6351D0A3A94FA329C145786E679E7B82C71A38628AC8)
        assert ecdsa_verifies(q, b"sample", r, s) and not ecdsa_verifies(q, b"Sample", r, s)

    def test_ecdsa_ranges_and_symmetry(self) -> None:
        x, y, r, s = four_numbers(WYCHEPROOF_ECDSA[0][3])
        n = P384[1]
        assert ecdsa_verifies((x, y), MESSAGE, r, s) and ecdsa_verifies((x, y), MESSAGE, r, n - s)  # both halves of s are good
        swapped = [int.from_bytes(value.to_bytes(48, "big"), "little") for value in (r, s)]
        for bad in ((s, r), (r + n, s), (r, s + n), (r - n, s), (r, s - n), (-r, s), (r, -s), (n - r, s), (0, s), (r, 0), (0, 0), (n, s), (r, n), (n, n),
                    (P, s),
                    (r + 2 ** 384, s), (r, s + 2 ** 384), (1, 1), (n - 1, n - 1), (swapped[0], swapped[1]), (r, s ^ 1), (r ^ 1, s), (2 ** 576 - 1, s),
                    (r, 2 ** 576 - 1)):
            assert not ecdsa_verifies((x, y), MESSAGE, *bad), bad
        assert not ecdsa_verifies((x, P - y), MESSAGE, r, s) and not ecdsa_verifies((x, y), MESSAGE + b"\0", r, s)

    @pytest.mark.parametrize("q", [(0, 0), (1, 1), (0, 1), (-1, 1), (P, 0), (P, 1), (confbuild.P384_G.x, confbuild.P384_G.y + P),
                                   (confbuild.P384_G.x + P, confbuild.P384_G.y),
                                   (confbuild.P384_G.x - P, confbuild.P384_G.y), (confbuild.P384_G.x, -confbuild.P384_G.y),
                                   (confbuild.P384_G.y, confbuild.P384_G.x),
                                   (2 ** 384 - 1, 2 ** 384 - 1)])
    def test_ecdsa_no_key(self, q: tuple[int, int]) -> None:
        with pytest.raises(confbuild.BadSignature, match="^the public key is no point of P-384$"):
            confbuild.verify_ecdsa_p384(confbuild.Point(*q), MESSAGE, 1, 1)

    @pytest.mark.parametrize("d", [1, P384[1] - 1, 2, P384[1] - 2, (P384[1] + 1) // 2, 3])
    def test_ecdsa_keys_close_to_g(self, d: int) -> None:
        """Q = G, Q = -G, and multiples: the sums of the table and of the ladder meet the same point, its negative, and infinity."""
        key = ToyVek(d)
        r, s = key.sign(MESSAGE)
        assert ecdsa_verifies(key.public, MESSAGE, r, s) and not ecdsa_verifies(key.public, b"123401", r, s)

    def test_ecdsa_infinity(self) -> None:
        """u1 * G + u2 * Q = infinity, for Q = -(e / r) * G; and, with s doubled, still."""
        n, e, r = P384[1], int.from_bytes(hashlib.sha384(MESSAGE).digest(), "big"), 0x1234567
        q = p384_multiply(-e * pow(r, -1, n) % n)
        assert q is not None and not ecdsa_verifies(q, MESSAGE, r, 77) and not ecdsa_verifies(q, MESSAGE, r, 154)

    @given(st.integers(1, P384[1] - 1), st.binary(max_size=200), st.integers(0, 383))
    @settings(max_examples=6)
    def test_ecdsa_signed_here(self, d: int, message: bytes, bit: int) -> None:
        key = ToyVek(d)
        r, s = key.sign(message)
        assert ecdsa_verifies(key.public, message, r, s) and not ecdsa_verifies(key.public, message, r, s ^ 1 << bit)

    @given(st.integers(1, 50), st.integers(1, 50), st.integers(2, P384[1] - 1))
    @settings(max_examples=10)
    def test_group_law(self, a: int, b: int, z: int) -> None:
        """Jacobian sums, for any z, are those of the textbook."""
        first, second = p384_multiply(a), p384_multiply(b)
        assert first is not None and second is not None
        jacobian = (first[0] * z * z % P, first[1] * z ** 3 % P, z)
        assert confbuild._affine(*confbuild._add(*jacobian, confbuild.Point(*second))) == p384_add(first, second)
        assert confbuild._affine(*confbuild._add(*jacobian, confbuild.Point(second[0], P - second[1]))) == p384_add(first, (second[0], P - second[1]))
        assert confbuild._affine(*confbuild._double(*jacobian)) == p384_add(first, first)
        assert confbuild._affine(*confbuild._double(1, 1, 0)) is None and confbuild._affine(*confbuild._add(1, 1, 0, confbuild.Point(*second))) == second

    @pytest.mark.parametrize(("case", "comment", "valid", "signature"), WYCHEPROOF_PSS)
    def test_pss_wycheproof(self, case: int, comment: str, valid: bool, signature: str) -> None:
        verdict = rsa_verdict(confbuild.verify_rsassa_pss, confbuild.RsaKey(WYCHEPROOF_PSS_N, 65537), MESSAGE, bytes.fromhex(signature))
        assert verdict == ("" if valid else "inconsistent")

    @pytest.mark.parametrize(("case", "comment", "valid", "signature"), WYCHEPROOF_PKCS1)
    def test_pkcs1_wycheproof(self, case: int, comment: str, valid: bool, signature: str) -> None:
        verdict = rsa_verdict(confbuild.verify_rsassa_pkcs1_v1_5, confbuild.RsaKey(WYCHEPROOF_PKCS1_N, 65537), MESSAGE, bytes.fromhex(signature))
        assert verdict == ("" if valid else "inconsistent")

    @pytest.mark.parametrize(("line", "result", "message", "signature"), CAVP_PKCS1)
    def test_pkcs1_cavp(self, line: int, result: str, message: str, signature: str) -> None:
        key = confbuild.RsaKey(CAVP_PKCS1_N, 65537)
        verdict = rsa_verdict(confbuild.verify_rsassa_pkcs1_v1_5, key, bytes.fromhex(message), bytes.fromhex(signature))
        assert verdict == ("" if result == "P" else "inconsistent")

    @pytest.mark.parametrize("scheme", ["pss", "pkcs1"])
    def test_rsa_ranges(self, scheme: str) -> None:
        verify = {"pss": confbuild.verify_rsassa_pss, "pkcs1": confbuild.verify_rsassa_pkcs1_v1_5}[scheme]
        n, rows = {"pss": (WYCHEPROOF_PSS_N, WYCHEPROOF_PSS), "pkcs1": (WYCHEPROOF_PKCS1_N, WYCHEPROOF_PKCS1)}[scheme]
        key, good = confbuild.RsaKey(n, 65537), bytes.fromhex(rows[0][3])
        assert rsa_verdict(verify, key, MESSAGE, good) == "" and rsa_verdict(verify, key, MESSAGE + b"\0", good) == "inconsistent"
        for size, bad in ((0, b""), (255, good[:-1]), (255, good[1:]), (257, b"\0" + good), (257, good + b"\0"),
                          (257, (int.from_bytes(good, "big") + n).to_bytes(257, "big"))):
            assert rsa_verdict(verify, key, MESSAGE, bad) == f"the signature has {size} bytes, the modulus 256"
        for value in (n, n + 1, 2 ** 2048 - 1, int.from_bytes(good, "big") % (2 ** 2048 - n) + n):
            assert rsa_verdict(verify, key, MESSAGE, value.to_bytes(256, "big")) == "signature representative out of range"
        for value in (0, 1, n - 1, n - int.from_bytes(good, "big"), int.from_bytes(good, "little") % n):
            assert rsa_verdict(verify, key, MESSAGE, value.to_bytes(256, "big")) == "inconsistent"
        assert rsa_verdict(verify, confbuild.RsaKey(n - 2, 65537), MESSAGE, good) == rsa_verdict(verify, confbuild.RsaKey(n, 3), MESSAGE,
                                                                                                 good) == "inconsistent"
        for small in (0, 1, 2, 255, 256, 2 ** 391 - 1, 2 ** 400):  # keys that have no room: no error but this one
            size = (small.bit_length() + 7) // 8
            assert rsa_verdict(verify, confbuild.RsaKey(small, 65537), MESSAGE, bytes(size)) != ""

    @pytest.mark.parametrize("bits", [784, 785, 786, 791, 792, 2048, 2049, 2055, 4096])
    def test_pss_for_each_length_of_a_modulus(self, bits: int) -> None:
        """em_bits is one less than the modulus has: where that is a multiple of 8, the encoded message is a byte shorter than the signature."""
        size, em = (bits + 7) // 8, pss_em(bits - 1)
        assert len(em) == (bits + 6) // 8
        key, signature = bare_key(bits), em.rjust(size, b"\0")
        assert rsa_verdict(confbuild.verify_rsassa_pss, key, MESSAGE, signature) == ""
        if len(em) < size:
            assert rsa_verdict(confbuild.verify_rsassa_pss, key, MESSAGE, b"\1" + signature[1:]) == "inconsistent"

    def test_pss_of_a_modulus_too_short(self) -> None:
        """Step 3: 98 bytes are needed, so at least 777 bits of the 778 of the modulus."""
        for bits, verdict in ((776, "inconsistent"), (777, "inconsistent"), (778, "")):
            em = pss_em(bits - 1) if verdict == "" else bytes((bits + 7) // 8 - 1) + b"\xbc"
            assert rsa_verdict(confbuild.verify_rsassa_pss, bare_key(bits), MESSAGE, em.rjust((bits + 7) // 8, b"\0")) == verdict

    def test_pss_each_byte_counts(self) -> None:
        """Every single bit of an encoded message, and each part of what is under the mask."""
        em, key = pss_em(), bare_key(2048)
        assert rsa_verdict(confbuild.verify_rsassa_pss, key, MESSAGE, em) == ""
        for i in range(2048):
            changed = bytearray(em)
            changed[i // 8] ^= 0x80 >> i % 8
            assert rsa_verdict(confbuild.verify_rsassa_pss, key, MESSAGE, bytes(changed)) == "inconsistent", i
        for salt in (b"", b"s", b"s" * 20, b"s" * 32, b"s" * 47, b"s" * 49, b"s" * 64, b"s" * 206):
            assert rsa_verdict(confbuild.verify_rsassa_pss, key, MESSAGE, pss_em(salt=salt)) == "inconsistent"
        for flip in ({0: 1}, {80: 1}, {157: 1}, {157: 1, 158: 1}, {158: 1}, {158: 3}, {158: 0x80}, {159: 1}, {206: 1}):
            assert rsa_verdict(confbuild.verify_rsassa_pss, key, MESSAGE, pss_em(flip=flip)) == "inconsistent", flip
        assert rsa_verdict(confbuild.verify_rsassa_pss, key, MESSAGE, pss_em(flip={0: 0x80})) == ""  # a bit that step 9 clears

    @pytest.mark.parametrize(("em", "verdict"), [
        (EM_PKCS1, ""), (b"\x00\x00" + EM_PKCS1[2:], "inconsistent"), (b"\x00\x02" + EM_PKCS1[2:], "inconsistent"), (b"\x01" + EM_PKCS1[1:], "inconsistent"),
        (b"\x00\x01" + b"\xff" * 8 + b"\x00" + T + bytes(194), "inconsistent"),  # Bleichenbacher 2006: bytes after the digest
        (b"\x00\x01" + b"\xff" * 201 + b"\x00\x00" + T, "inconsistent"), (b"\x00\x01" + b"\xff" * 203 + T, "inconsistent"),
        (b"\x00\x01" + b"\xff" * 204 + b"\x00" + T[:1] + b"\x2f" + T[2:13] + T[15:], "inconsistent"),
        (b"\x00\x01" + b"\xff" * 221 + b"\x00" + T[19:], "inconsistent"), (EM_PKCS1[1:] + b"\0", "inconsistent")])
    def test_pkcs1_encodings(self, em: bytes, verdict: str) -> None:
        assert len(em) == 256 and rsa_verdict(confbuild.verify_rsassa_pkcs1_v1_5, bare_key(2048), MESSAGE, em) == verdict

    def test_pkcs1_each_bit_counts(self) -> None:
        for i in range(2048):
            em = bytearray(EM_PKCS1)
            em[i // 8] ^= 0x80 >> i % 8
            assert rsa_verdict(confbuild.verify_rsassa_pkcs1_v1_5, bare_key(2048), MESSAGE, bytes(em)) == "inconsistent"

    @pytest.mark.parametrize(("size", "verdict"), [(53, "the modulus is too short"), (54, "the modulus is too short"), (61, "the modulus is too short"),
                                                   (62, ""), (63, "")])
    def test_pkcs1_of_a_modulus_too_short(self, size: int, verdict: str) -> None:
        """RFC 8017 9.2 step 3: at least eight bytes of padding."""
        em = (b"\x00\x01" + b"\xff" * (size - len(T) - 3) + b"\x00" + T)[-size:]
        assert rsa_verdict(confbuild.verify_rsassa_pkcs1_v1_5, bare_key(8 * size), MESSAGE, em) == verdict

    def test_toy_keys(self) -> None:
        assert rsa_verdict(confbuild.verify_rsassa_pss, TOY_ARK.public, b"m", TOY_ARK.pss(b"m")) == ""
        assert rsa_verdict(confbuild.verify_rsassa_pss, TOY_ASK.public, b"m", TOY_ARK.pss(b"m")) != ""
        assert rsa_verdict(confbuild.verify_rsassa_pss, TOY_ARK.public, b"m", TOY_ARK.pkcs1(b"m")) == "inconsistent"
        assert rsa_verdict(confbuild.verify_rsassa_pkcs1_v1_5, TOY_ARK.public, b"m", TOY_ARK.pkcs1(b"m")) == ""
        assert rsa_verdict(confbuild.verify_rsassa_pkcs1_v1_5, TOY_ARK.public, b"m", TOY_ARK.pss(b"m")) == "inconsistent"

# endregion 6
# ==============================================================================
# region 7. Certificates
# ==============================================================================


PSS_TRAILER = bytes.fromhex("3046") + PSS_SHA384[2:13] + bytes.fromhex("3039") + PSS_SHA384[15:] + bytes.fromhex("a303020101")  # and the trailer field
SHA384_RSA = bytes.fromhex("300d06092a864886f70d01010c0500")
SPL = "1.3.6.1.4.1.3704.1.3."
NO_CERTIFICATE = (confbuild.DerError, confbuild.CertificateError)


def rsa_spki(n: int, e: int = 65537, octets: bytes | None = None) -> bytes:
    return seq(RSA_SPKI, bits(seq(number(n), number(e)) if octets is None else octets))


def certificate_of(outer: bytes = PSS_SHA384, tail: bytes = b"", signature: bytes = bits(b"s"), **parts: bytes) -> bytes:
    """A certificate that nobody signed. parts: what stands there instead, in whole."""
    tbs = {"version": tlv(0xA0, number(2)), "serial": number(7), "inner": PSS_SHA384, "issuer": x_name("ARK-Milan"),
           "validity": seq(utc("2026-01-01T00:00:00Z"), utc("2033-01-01T00:00:00Z")), "subject": x_name("SEV-Milan"), "spki": TOY_VEK.spki(),
           "extensions": tlv(0xA3, seq(extension("2.5.29.15", b"k", True))), **parts}
    return seq(seq(*tbs.values()), outer, signature) + tail


def crl_raw(outer: bytes = PSS_SHA384, tail: bytes = b"", **parts: bytes) -> bytes:
    """A revocation list that nobody signed."""
    tbs = {"version": number(1), "inner": PSS_SHA384, "issuer": x_name("ARK-Milan"), "this": utc("2026-11-01T00:00:00Z"), "next": utc("2026-12-01T00:00:00Z"),
           "revoked": b"",
           "extensions": tlv(0xA0, seq(extension("2.5.29.20", number(1)))), **parts}
    return seq(seq(*tbs.values()), outer, bits(b"s")) + tail


def extensions_of(*extensions: bytes) -> bytes:
    return tlv(0xA3, seq(*extensions))


def name_of(*relative: bytes) -> bytes:
    return seq(*relative)


CN = seq(oid("2.5.4.3"), tlv(0x0C, b"x"))
NO_PSS = "not signed with RSASSA-PSS, SHA-384, MGF1 with SHA-384 and a salt of 48 bytes"
NO_RSA = "the RSA key has not 2048 to 4096 bits and the exponent 65537"
ANOTHER, LEFT = "the signature algorithm inside is another one", "bytes are left over at byte "
BAD_SIGNED: list[tuple[dict[str, bytes], str]] = [
    ({"tail": b"\0"}, LEFT), ({"outer": SHA384_RSA, "inner": SHA384_RSA}, NO_PSS), ({"outer": SHA384_RSA}, NO_PSS), ({"inner": SHA384_RSA}, ANOTHER),
    ({"inner": PSS_TRAILER}, ANOTHER), ({"outer": PSS_TRAILER}, ANOTHER), ({"outer": PSS_SHA384[:-1] + b"\x20", "inner": PSS_SHA384[:-1] + b"\x20"}, NO_PSS),
    ({"outer": PSS_SHA384.replace(b"\4\2\2", b"\4\2\1")}, NO_PSS), ({"outer": RSA_SPKI}, NO_PSS), ({"issuer": b""}, "tag 0x")]
BAD_CERTIFICATES: list[tuple[dict[str, bytes], str]] = [
    *BAD_SIGNED, ({"signature": tlv(3, b"\1s")}, "a BIT STRING with unused bits"), ({"signature": bits(b"s") + b"\5\0"}, LEFT),
    ({"version": tlv(0xA0, number(1))}, "not of version 3"), ({"version": tlv(0xA0, number(3))}, "not of version 3"), ({"version": b""}, "tag 0xa0 is missing"),
    ({"version": tlv(0xA0, number(2), b"\0")}, LEFT), ({"serial": tlv(2, b"\0\1")}, "an INTEGER that is empty or not of the fewest octets"),
    ({"validity": seq(utc("2026-01-01T00:00:00Z"))}, "tag 0x18 is missing"), ({"validity": seq(*[utc("2026-01-01T00:00:00Z")] * 3)}, LEFT),
    ({"validity": seq(tlv(0x17, b"20260101000000Z"), tlv(0x18, b"20330101000000Z"))}, "no time in UTC"),
    ({"subject": name_of(tlv(0x31))}, "tag 0x30 is missing"), ({"subject": name_of(tlv(0x31, CN, CN))}, LEFT),
    ({"subject": name_of(CN)}, "tag 0x31 is missing"),
    ({"subject": name_of(tlv(0x31, seq(oid("2.5.4.3"), tlv(0x14, b"x"))))}, "no string"),
    ({"subject": name_of(tlv(0x31, seq(oid("2.5.4.3"), tlv(0x0C, b"x"), b"\5\0")))}, LEFT),
    ({"subject": name_of(tlv(0x31, seq(oid("2.5.4.3"), tlv(0x0C, b"\xff"))))}, "a string that is not of its alphabet"),
    ({"extensions": b""}, "tag 0xa3 is missing"), ({"extensions": tlv(0x81, b"\0") + extensions_of()}, "tag 0xa3 is missing"),
    ({"extensions": extensions_of() + b"\5\0"}, LEFT), ({"extensions": tlv(0xA3, seq(), seq())}, LEFT),
    ({"extensions": extensions_of(extension("2.5.29.14", b"a"), extension("1.2.3", b""), extension("2.5.29.14", b"b"))}, "extension 2.5.29.14 occurs twice"),
    ({"extensions": extensions_of(extension("2.5.29.30", b"", True))}, "extension 2.5.29.30 is critical, and not known here"),
    ({"extensions": extensions_of(extension(SPL + "1", number(1), True))}, f"extension {SPL}1 is critical, and not known here"),
    ({"extensions": extensions_of(seq(oid("2.5.29.15"), tlv(1, b"\0"), tlv(4)))}, "extension 2.5.29.15 spells out a default"),
    ({"extensions": extensions_of(seq(oid("2.5.29.15"), tlv(1, b"\1"), tlv(4)))}, "a BOOLEAN that is neither 00 nor FF"),
    ({"extensions": extensions_of(seq(oid("1.2.3"), tlv(4), b"\5\0"))}, LEFT), ({"extensions": extensions_of(seq(oid("1.2.3")))}, "tag 0x04 is missing"),
    *[({"spki": rsa_spki(n, e)}, NO_RSA) for n, e in ((2 ** 2047 - 1, 65537), (2 ** 4096, 65537), (1 - 2 ** 2048, 65537), (2 ** 2048 - 1, 3),
                                                      (2 ** 2048 - 1, -65537),
                                                   (2 ** 2048 - 1, 65539), (2 ** 2048 - 1, 2 ** 70000 + 1), (2 ** 70000, 65537), (0, 65537))],
    ({"spki": rsa_spki(0, octets=seq(number(2 ** 2047), number(65537), number(1)))}, LEFT),
    ({"spki": rsa_spki(0, octets=seq(number(2 ** 2047), number(65537)) + b"\0")}, LEFT),
    ({"spki": rsa_spki(0, octets=seq(number(2 ** 2047)))}, "tag 0x02 is missing"), ({"spki": seq(RSA_SPKI, bits(b""), b"\5\0")}, LEFT),
    *[({"spki": seq(P384_SPKI, bits(octets))}, "the public key is no uncompressed point of P-384") for octets in (
        b"", b"\4", b"\4" + bytes(95), b"\4" + bytes(97), b"\2" + bytes(48), b"\2" + bytes(96), b"\6" + bytes(96), b"\0")],
    *[({"spki": seq(algorithm, bits(b"\4" + bytes(96)))}, "the public key is neither RSA nor P-384") for algorithm in (
        seq(), bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"), bytes.fromhex("300b06092a864886f70d010101"), PSS_SHA384,
        P384_SPKI[:-1] + b"\x23")]]
ENTRY, REASON = seq(number(5), utc("2026-10-01T00:00:00Z")), extension("2.5.29.21", b"\x0a\1\1")
BAD_CRLS: list[tuple[dict[str, bytes], str]] = [
    *BAD_SIGNED, ({"version": number(0)}, "not of version 2"), ({"version": number(2)}, "not of version 2"), ({"version": b""}, "tag 0x02 is missing"),
    ({"next": b""}, "tag 0x18 is missing"), ({"extensions": tlv(0xA0, seq(), seq())}, LEFT), ({"extensions": tlv(0xA1, seq())}, "tag 0xa0 is missing"),
    ({"extensions": tlv(0xA0, seq()) + b"\5\0"}, LEFT), ({"extensions": tlv(0xA0, seq(extension("2.5.29.28", b"", True)))},
                                                         "extension 2.5.29.28 is critical, and not known here"),
    ({"extensions": tlv(0xA0, seq(extension("2.5.29.27", number(1), True)))}, "extension 2.5.29.27 is critical, and not known here"),
    ({"revoked": seq(ENTRY, seq(number(6)))}, "tag 0x18 is missing"),
    ({"revoked": seq(seq(number(5), utc("2026-10-01T00:00:00Z"), seq(REASON), b"\5\0"))}, LEFT),
    ({"revoked": seq(seq(number(5), utc("2026-10-01T00:00:00Z"), seq(extension("2.5.29.29", b"", True))))},
     "extension 2.5.29.29 is critical, and not known here"),
    ({"revoked": seq(number(5))}, "tag 0x30 is missing"), ({"revoked": seq(seq(tlv(2, b"\0\5"), utc("2026-10-01T00:00:00Z")))},
                                                           "an INTEGER that is empty or not of the fewest octets")]


def amd_files() -> Iterator[tuple[str, dict[str, bytes]]]:
    """(product, role -> certificate) of AMD, where the vectors are."""
    folder = SHARED / "vectors" / "amd"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: it is no part of the repository")
    for product in ("Milan", "Genoa", "Turin"):
        yield product, {role: (folder / product.lower() / f"{role}.der").read_bytes() for role in ("ark", "ask", "asvk")}


def vek_with(*extensions: bytes) -> confbuild.Certificate:
    return confbuild.parse_certificate(certificate_of(extensions=extensions_of(*extensions)), "VEK")


class TestCertificates:
    def test_the_pinned_keys(self) -> None:
        """Each digest is that of the SubjectPublicKeyInfo of the modulus beside it; sizes, serials and names are of one pattern."""
        rows = [(product, role, anchor) for product, roles in confbuild.amd_anchors().items() for role, anchor in roles.items()]
        assert [row[:2] for row in rows] == [(product, role) for product in ("Milan", "Genoa", "Turin") for role in ("ark", "ask", "asvk")]
        for product, role, anchor in rows:
            assert hashlib.sha256(rsa_spki(anchor.key.n)).hexdigest() == anchor.spki_sha256 and anchor.key.n.bit_length() == 4096 and anchor.key.n % 2
            assert anchor.key.e == 65537 and anchor.not_before < NOW < anchor.not_after and anchor.not_after[4:] == anchor.not_before[4:]
            assert anchor.name == confbuild.amd_name({"ark": "ARK-", "ask": "SEV-", "asvk": "SEV-VLEK-"}[role] + product)
        assert len({anchor.key.n for *_, anchor in rows} | {anchor.serial for *_, anchor in rows}) == 18

    def test_the_pinned_keys_are_amds(self) -> None:
        for product, files in amd_files():
            anchors = confbuild.amd_anchors()[product]
            assert confbuild.make_anchors(product, **files) == anchors  # the ARK signs itself, the ASK and the ASVK
            for role, data in files.items():  # and without the parser
                assert rsa_spki(anchors[role].key.n) in data and number(anchors[role].serial) in data
                assert x_name(anchors[role].name[-1][1]) in data and utc(anchors[role].not_before) + utc(anchors[role].not_after) in data

    @needs("openssl")
    def test_the_command_of_the_comment(self, tmp_path: Path) -> None:
        command = next(line for line in FILE.read_text().splitlines() if "openssl x509 -in FILE" in line).partition(":   ")[2]
        files = {"toy": TOY_CAS["ark"]}
        expected = {"toy": hashlib.sha256(TOY_ARK.spki()).hexdigest()}
        if (SHARED / "vectors" / "amd").is_dir():
            files |= {f"{product}-{role}": data for product, roles in amd_files() for role, data in roles.items() if product == "Turin"}
            expected |= {f"Turin-{role}": anchor.spki_sha256 for role, anchor in confbuild.amd_anchors()["Turin"].items()}
        for name, data in files.items():
            (tmp_path / name).write_bytes(ssl.DER_cert_to_PEM_cert(data).encode())
        run = subprocess.run(["sh", "-c", "; ".join(command.replace("FILE", name) for name in files)], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert dict(zip(files, (line.split()[0] for line in run.stdout.splitlines()), strict=True)) == expected

    def test_real_certificates_of_chips(self) -> None:
        """Every VEK of the field parses, and says of itself what the report beside it says."""
        folder = SHARED / "vectors" / "vectors"
        if not folder.is_dir():
            pytest.skip(f"{folder} is missing: it is no part of the repository")
        seen = set()
        for path in sorted(path for path in folder.glob("*/vek.der") if not path.parent.name.startswith(("neg", "mal", "testroot"))):
            vek = confbuild.parse_certificate(path.read_bytes(), path.parent.name)
            report = confbuild.parse_report((path.parent / "report.bin").read_bytes())
            product, kind = confbuild.vek_product(vek), dict(vek.subject)["CN"]
            role = {"SEV-VCEK": "ask", "SEV-VLEK": "asvk"}[kind]
            anchor = confbuild.amd_anchors()[product][role]
            assert vek.issuer == anchor.name and vek.serial == 0 and isinstance(vek.key, confbuild.Point)
            levels = confbuild.tcb_levels(product, report.reported_tcb)
            assert confbuild.vek_tcb(vek, levels) == levels
            assert confbuild.has_hwid(vek) == (kind == "SEV-VCEK") and (kind == "SEV-VLEK" or confbuild.vek_chip_id(vek) == report.chip_id)
            if (product, kind) not in seen:
                confbuild.verify_rsassa_pss(anchor.key, vek.tbs_certificate, vek.signature)
                with pytest.raises(confbuild.BadSignature):
                    confbuild.verify_rsassa_pss(anchor.key, vek.tbs_certificate + b"\0", vek.signature)
            seen.add((product, kind))
        assert seen == {("Milan", "SEV-VCEK"), ("Genoa", "SEV-VCEK"), ("Turin", "SEV-VCEK"), ("Milan", "SEV-VLEK")}

    def test_real_revocation_lists(self) -> None:
        folder = SHARED / "vectors" / "crl"
        if not folder.is_dir():
            pytest.skip(f"{folder} is missing: it is no part of the repository")
        rows = json.loads((folder / "expect.json").read_text())
        assert {f"{name}.crl" for name in rows} == {path.name for path in folder.glob("*.crl")}
        for name, row in rows.items():
            data = (folder / f"{name}.crl").read_bytes()
            assert hashlib.sha256(data).hexdigest() == row["sha256"]
            if not row["parse"]:
                with pytest.raises(NO_CERTIFICATE):
                    confbuild.parse_crl(data, name)
                continue
            crl = confbuild.parse_crl(data, name)
            assert (dict(crl.issuer)["CN"], crl.this_update, crl.next_update) == (row["issuer"], row["this_update"][:19] + "Z", row["next_update"][:19] + "Z")
            assert [f"{serial:x}" for serial in crl.revoked] == row["revoked_serials"]
            assert (crl.this_update <= NOW <= crl.next_update) == row["current_at_2026_11_23"]
            if row["signed_by"] is None:
                with pytest.raises((confbuild.BadSignature, confbuild.CertificateError),
                                   match="^inconsistent$|: issued by CN=ARK-Milan, which is no trusted ARK$"):
                    confbuild.verify_crl(data, name, confbuild.amd_anchors())
            else:
                assert row["signed_by"] == f"{row['issuer'].removeprefix('ARK-').lower()}/ark" and confbuild.verify_crl(data, name,
                    confbuild.amd_anchors()) == crl

    def test_a_certificate(self) -> None:
        data = vek_of(serial=0x1234)
        read = confbuild.parse_certificate(data, "VEK")
        assert (read.serial, read.issuer, read.subject, read.key) == (0x1234, confbuild.amd_name("SEV-Milan"), confbuild.amd_name("SEV-VCEK"), TOY_VEK.public)
        assert (read.not_before, read.not_after) == ("2026-01-01T00:00:00Z", "2033-01-01T00:00:00Z")
        assert read.subject_public_key_info == TOY_VEK.spki() and read.extensions[SPL + "8"] == number(219) and len(read.extensions) == 7
        assert data == seq(read.tbs_certificate, PSS_SHA384, bits(read.signature))
        confbuild.verify_rsassa_pss(TOY_ASK.public, read.tbs_certificate, read.signature)
        for data in (certificate_of(outer=PSS_TRAILER, inner=PSS_TRAILER), certificate_of(serial=number(-1)), certificate_of(subject=seq()),
                     certificate_of(spki=rsa_spki(2 ** 2047)), certificate_of(spki=rsa_spki(2 ** 4096 - 1)), certificate_of(extensions=extensions_of()),
                     certificate_of(extensions=extensions_of(extension("2.5.29.19", b"", True), extension("2.5.29.15", b"", True),
                                                             extension("2.5.29.30", b""))),
                     certificate_of(validity=seq(tlv(0x18, b"20510101000000Z"), tlv(0x18, b"20520101000000Z")))):
            assert confbuild.parse_certificate(data, "x").issuer == confbuild.amd_name("ARK-Milan")
        name = confbuild.parse_certificate(certificate_of(subject=name_of(tlv(0x31, CN), tlv(0x31, seq(oid("2.5.4.99"), tlv(0x13, b"y"))))), "x").subject
        assert confbuild.name_text(name) == "CN=x, 2.5.4.99=y"

    @pytest.mark.parametrize(("parts", "message"), BAD_CERTIFICATES, ids=lambda value: str(value)[:40])
    def test_a_bad_certificate(self, parts: dict[str, bytes], message: str) -> None:
        with pytest.raises(NO_CERTIFICATE, match=f"^VEK: {re.escape(message)}") as caught:
            confbuild.parse_certificate(certificate_of(**parts), "VEK")
        assert caught.value.structure == "VEK"

    @pytest.mark.parametrize(("parts", "message"), BAD_CRLS, ids=lambda value: str(value)[:40])
    def test_a_bad_revocation_list(self, parts: dict[str, bytes], message: str) -> None:
        with pytest.raises(NO_CERTIFICATE, match=f"^list: {re.escape(message)}"):
            confbuild.parse_crl(crl_raw(**parts), "list")

    @pytest.mark.parametrize(("parse", "data"), [(confbuild.parse_certificate, vek_of()), (confbuild.parse_crl, crl_of("ARK-Milan", TOY_ARK, 5, 6))],
                             ids=["vek", "crl"])
    def test_each_prefix_and_each_byte(self, parse: Callable[[bytes, str], Any], data: bytes) -> None:
        good = parse(data, "x")
        for size in range(len(data)):
            with pytest.raises(NO_CERTIFICATE):
                parse(data[:size], "x")
        for i, flip in itertools.product(range(len(data)), (1, 0x80)):
            try:
                read = parse(data[:i] + bytes((data[i] ^ flip,)) + data[i + 1:], "x")
            except NO_CERTIFICATE:
                continue
            assert (read[0], read[1]) != (good[0], good[1]), i  # what is signed, or the signature: no byte is without meaning

    @given(st.binary(max_size=300), st.integers(0, 2000), st.integers(0, 40))
    @settings(max_examples=60)
    def test_random_bytes(self, noise: bytes, at: int, cut: int) -> None:
        for data in (noise, seq(seq(noise), PSS_SHA384, bits(b"")), certificate_of()[:at] + noise + certificate_of()[at + cut:],
                     certificate_of(extensions=extensions_of(noise)),
                     certificate_of(subject=seq(noise)), certificate_of(spki=seq(RSA_SPKI, bits(noise)))):
            for parse in (confbuild.parse_certificate, confbuild.parse_crl):
                with contextlib.suppress(*NO_CERTIFICATE):
                    parse(data, "x")

    def test_revocation_lists(self) -> None:
        data = crl_of("ARK-Milan", TOY_ARK, 0x010001, 7)
        crl = confbuild.verify_crl(data, "list", TOY_ANCHORS)
        assert crl == confbuild.parse_crl(data, "list") and list(crl.revoked) == [0x010001, 7] and crl.issuer == confbuild.amd_name("ARK-Milan")
        assert (crl.this_update, crl.next_update) == ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
        assert list(confbuild.verify_crl(crl_of("ARK-Milan", TOY_ARK), "list", TOY_ANCHORS).revoked) == []
        for parts, revoked in (({"revoked": seq(ENTRY, seq(number(6), utc("2026-10-01T00:00:00Z"), seq(REASON)))}, [5, 6]), ({"revoked": seq()}, []),
                               ({"extensions": b""}, []),
                               ({"outer": PSS_TRAILER, "inner": PSS_TRAILER, "revoked": seq(ENTRY)}, [5])):
            assert list(confbuild.parse_crl(crl_raw(**parts), "list").revoked) == revoked
        with pytest.raises(confbuild.CertificateError, match="^list: issued by OU=Engineering, C=US, L=Santa Clara, ST=CA, "
                           "O=Advanced Micro Devices, CN=SEV-Milan, which is no trusted ARK$"):
            confbuild.verify_crl(crl_of("SEV-Milan", TOY_ASK), "list", TOY_ANCHORS)  # an ASK is no ARK
        for bad in (crl_of("ARK-Milan", TOY_ASK, 7), data[:-1] + bytes((data[-1] ^ 1,)), data.replace(number(0x010001), number(0x010002))):
            with pytest.raises(confbuild.BadSignature, match="^inconsistent$"):
                confbuild.verify_crl(bad, "list", TOY_ANCHORS)
        with pytest.raises(confbuild.BadSignature):
            confbuild.verify_crl(data, "list", confbuild.amd_anchors())

    @pytest.mark.parametrize(("changes", "error", "message"), [
        ({}, None, ""), ({"ark": "ask"}, confbuild.CertificateError, "Milan ark: issued by OU=Engineering, .*CN=ARK-Milan$"), ({"ask": "asvk"}, None, ""),
        ({"ark": x509("ARK-Milan", "ARK-Milan", TOY_ARK.spki(), TOY_ASK)}, confbuild.BadSignature, "inconsistent$"),
        ({"ark": x509("ARK-Milan", "ARK-Milan", TOY_VEK.spki(), TOY_ARK)}, confbuild.CertificateError, "Milan ark: not an RSA key$"),
        ({"ask": x509("SEV-Milan", "ARK-Milan", TOY_VEK.spki(), TOY_ARK)}, confbuild.CertificateError, "Milan ask: not an RSA key$"),
        ({"ask": x509("SEV-Milan", "ARK-Genoa", TOY_ASK.spki(), TOY_ARK)}, confbuild.CertificateError, "Milan ask: issued by .*CN=ARK-Genoa$"),
        ({"ask": x509("SEV-Milan", "SEV-Milan", TOY_ASK.spki(), TOY_ASK)}, confbuild.CertificateError, "Milan ask: issued by .*CN=SEV-Milan$"),
        ({"asvk": x509("SEV-VLEK-Milan", "ARK-Milan", TOY_ASVK.spki(), TOY_ASVK)}, confbuild.BadSignature, "inconsistent$"),
        ({"asvk": b""}, confbuild.DerError, "Milan asvk: tag 0x30 is missing at byte 0$"),
        ({"ask": certificate_of(tail=b"\0")}, confbuild.DerError, "Milan ask: bytes are left over")],
        ids=lambda value: "" if isinstance(value, dict) else str(value)[:30])
    def test_anchors(self, changes: dict[str, Any], error: type[Exception] | None, message: str) -> None:
        files = {**TOY_CAS, **{role: TOY_CAS[data] if isinstance(data, str) else data for role, data in changes.items()}}
        if error is not None:
            with pytest.raises(error, match="^" + message):
                confbuild.make_anchors("Milan", **files)
            return
        made = confbuild.make_anchors("Milan", **files)
        assert made["ark"] == confbuild.Anchor(confbuild.amd_name("ARK-Milan"), 0x010000, "2026-01-01T00:00:00Z", "2033-01-01T00:00:00Z",
                                               hashlib.sha256(TOY_ARK.spki()).hexdigest(), TOY_ARK.public)
        assert list(made) == ["ark", "ask", "asvk"]

    @pytest.mark.parametrize(("encoding", "level"), [
        ("020100", 0), ("02017f", 127), ("02020080", 128), ("020200ff", 255), ("02020100", "not in the range 0 to 255"),
        ("0201ff", "not in the range 0 to 255"),
        ("0203010000", "not in the range 0 to 255"), ("020180", "not in the range 0 to 255"), ("0202007f", "an INTEGER that"), ("02020000", "an INTEGER that"),
        ("", "tag 0x02 is missing"), ("05", "tag 0x02 is missing"), ("040105", "tag 0x02 is missing"), ("02010500", "bytes are left over"),
        ("0200", "an INTEGER that"),
        pytest.param("0282c351" + "7f" * 50001, "not in the range 0 to 255", id="more digits than str() bears"),
        pytest.param("0282c351" + "80" * 50001, "not in the range 0 to 255", id="as many, negative")])
    def test_security_patch_levels(self, encoding: str, level: int | str) -> None:
        """VCEK specification, table 8: an INTEGER, which from 128 on has two octets."""
        for name, arc in (("bootloader", "1"), ("tee", "2"), ("snp", "3"), ("microcode", "8"), ("fmc", "9")):
            vek = vek_with(extension(SPL + arc, bytes.fromhex(encoding)))
            if isinstance(level, int):
                assert confbuild.vek_tcb(vek, [name]) == {name: level}
            else:
                with pytest.raises(NO_CERTIFICATE, match=f"^VEK {name} SPL: {re.escape(level)}"):
                    confbuild.vek_tcb(vek, [name])
        with pytest.raises(confbuild.CertificateError, match="^VEK tee SPL: the extension is missing$"):
            confbuild.vek_tcb(vek_with(extension(SPL + "1", number(1))), ["tee"])
        assert confbuild.vek_tcb(vek_with(), []) == {}

    @pytest.mark.parametrize(("value", "product"), [
        (tlv(0x16, b"Milan-B0"), "Milan"), (tlv(0x16, b"Milan"), "Milan"), (tlv(0x16, b"Genoa"), "Genoa"), (tlv(0x0C, b"Turin-C1-x"), "Turin"),
        (tlv(0x16, b"milan"), "milan"),
        (tlv(0x16, b"Milan B0"), "Milan B0"), (tlv(0x16), ""), (tlv(0x16, b"-B0"), ""), (b"", "no string"), (tlv(4, b"Milan"), "no string"),
        (tlv(0x16, b"Milan") + b"\0", "bytes are left over"), (tlv(0x16, b"Mil\xe4n"), "a string that"), (b"\x16\x06Milan", "the element does not end"),
        (None, "no string")])
    def test_product(self, value: bytes | None, product: str) -> None:
        vek = vek_with(*([] if value is None else [extension("1.3.6.1.4.1.3704.1.2", value)]))
        if " " in product and product != "Milan B0":
            with pytest.raises(confbuild.DerError, match=f"^VEK productName: {product}"):
                confbuild.vek_product(vek)
        else:
            assert confbuild.vek_product(vek) == product

    @pytest.mark.parametrize(("value", "chip_id"), [
        (CHIP_ID, CHIP_ID), (tlv(4, CHIP_ID), CHIP_ID), (CHIP_ID[:8], CHIP_ID[:8] + bytes(56)), (b"\4\x40" + bytes(62), b"\4\x40" + bytes(62)),
        (bytes(8), bytes(64)),
        *[(value, len(value)) for value in (b"", bytes(7), bytes(9), bytes(10), tlv(4, bytes(8)), bytes(63), bytes(65), bytes(66), b"\4\x41" + bytes(64),
                                            tlv(4, bytes(63)),
                                            tlv(4, bytes(65)), tlv(3, CHIP_ID), tlv(4, CHIP_ID) + b"\0", bytes(67), bytes(128))]])
    def test_chip(self, value: bytes, chip_id: bytes | int) -> None:
        vek = vek_with(extension("1.3.6.1.4.1.3704.1.4", value))
        assert confbuild.has_hwid(vek)
        if isinstance(chip_id, bytes):
            assert confbuild.vek_chip_id(vek) == chip_id
        else:
            with pytest.raises(confbuild.CertificateError, match=f"^VEK HWID: {chip_id} bytes, neither 64 nor 8$"):
                confbuild.vek_chip_id(vek)

    def test_no_chip(self) -> None:
        assert not confbuild.has_hwid(vek_with())
        with pytest.raises(confbuild.CertificateError, match="^VEK HWID: 0 bytes, neither 64 nor 8$"):
            confbuild.vek_chip_id(vek_with())

    def test_a_hostile_number_is_a_failed_check(self) -> None:
        """An SPL of 5000 digits, in a certificate whose signature need not even hold."""
        vek = vek_of(tcb={**MILAN_TCB, "snp": 10 ** 5000}, sign=lambda tbs: bytes(256))
        verdict = verdict_over(snp_bundle(vek=vek), confbuild.Expectations())
        assert verdict.verdict == "failed" and status_of(verdict, "VEK TCB") == "failed"

    def test_large_input_takes_linear_time(self) -> None:
        """What a list or certificate of a few hundred KiB can hold, and numbers that would collide in a set."""
        step = 2 ** 61 - 1  # hash() of its multiples is 0
        with within(20):
            data = crl_raw(revoked=seq(b"".join(seq(number(i * step), utc("2026-10-01T00:00:00Z")) for i in range(1, 32_001))))
            assert len(confbuild.parse_crl(data, "list").revoked) == 32_000
        many = b"".join(extension(f"1.3.{i}", b"") for i in range(5_000))
        with within(20):
            assert len(confbuild.parse_certificate(certificate_of(extensions=extensions_of(many)), "x").extensions) == 5_000
        names = b"".join(tlv(0x31, CN) for _ in range(5_000))
        with within(20):
            assert len(confbuild.parse_certificate(certificate_of(subject=seq(names)), "x").subject) == 5_000
            with pytest.raises(NO_CERTIFICATE):
                confbuild.parse_certificate(certificate_of(extensions=b"\xa3\x80" * 50_000), "x")

# endregion 7
# ==============================================================================
# region 8. SEV-SNP report
# ==============================================================================


VECTORS = SHARED / "vectors" / "vectors"
REPORT_VECTORS = sorted(folder.name for folder in VECTORS.glob("*") if "report_version" in json.loads((folder / "expect.json").read_text()) and (
    "az-snp" in (folder / "evidence.json").read_text() or '"snp"' in (folder / "evidence.json").read_text())) if VECTORS.is_dir() else []
# The layout once more, as another reader would write it: SEV-SNP ABI, table "ATTESTATION_REPORT".
LAYOUT = struct.Struct("<IIQ16s16sII8sQI4x64s48s32s48s48s32s32s8sBBB21x64s8s3sx3sx8sQQ152x72s72s368x")


def real_bundle(name: str) -> Path:
    """The folder of a vector."""
    if not (folder := VECTORS / name).is_dir():
        pytest.skip(f"{folder} is missing: it is no part of the repository")
    return folder


def real_evidence(name: str) -> tuple[Any, Any]:
    """(what is known of a vector, its value of `evidence`)."""
    folder = real_bundle(name)
    return json.loads((folder / "expect.json").read_text()), json.loads((folder / "evidence.json").read_text())["evidence"]


def real_report(name: str) -> tuple[Any, bytes]:
    """(what is known of a vector, its report)."""
    expect, evidence = real_evidence(name)
    if "hcl_report" in evidence:
        return expect, base64.urlsafe_b64decode(evidence["hcl_report"] + "==")[0x20:0x4C0]
    return expect, base64.b64decode(evidence["attestation_report"])


def report_of(**values: Any) -> confbuild.Report:
    """A report that nobody has signed."""
    return confbuild.parse_report(snp_report(r=1, s=1, **values))


class TestReport:
    def test_the_table_is_the_record(self) -> None:
        ends = [0, *(offset + size for offset, size, _, _ in confbuild.REPORT_FIELDS)]
        starts = [*(offset for offset, _, _, _ in confbuild.REPORT_FIELDS), confbuild.REPORT_SIZE]
        reserved = [(end, start - end) for end, start in zip(ends, starts, strict=True) if end != start]
        assert reserved == [(0x4C, 4), (0x18B, 21), (0x1EB, 1), (0x1EF, 1), (0x208, 152), (0x330, 368)]  # none negative: no field overlaps another
        assert (*(name for _, _, name, _ in confbuild.REPORT_FIELDS), "data") == confbuild.Report._fields
        kinds = [kind for _, _, _, kind in confbuild.REPORT_FIELDS]
        assert [confbuild.Report.__annotations__[name] for name in confbuild.Report._fields] == [*kinds, bytes]
        assert LAYOUT.size == confbuild.REPORT_SIZE == 1184 and confbuild.SIGNED_SIZE == 0x2A0

    @settings(max_examples=10)
    @given(st.randoms(use_true_random=False))
    def test_every_byte_is_where_another_reader_finds_it(self, source: random.Random) -> None:
        data = source.randbytes(1184)
        *values, r, s = LAYOUT.unpack(data)
        assert confbuild.parse_report(data) == (*values, int.from_bytes(r, "little"), int.from_bytes(s, "little"), data)

    @pytest.mark.skipif(not REPORT_VECTORS, reason=f"{VECTORS} is missing: it is no part of the repository")
    def test_real_reports(self) -> None:
        """What two other readers found, of every report of the folder."""
        wrong = []
        for name in REPORT_VECTORS:
            expect, data = real_report(name)
            report = confbuild.parse_report(data)
            product = report.product or ("Milan" if report.version < 3 else "")
            actual: dict[str, Any] = {
                "report_version": report.version, "vmpl": report.vmpl, "policy": f"{report.policy:#x}", "debug": bool(report.policy & confbuild.POLICY_DEBUG),
                "chip_id": report.chip_id.hex(), "host_data": report.host_data.hex(), "launch_digest": report.measurement.hex(),
                "report_data": report.report_data.hex(), "product": product.lower(), "key_type": report.signing_key.lower()}
            if product:
                actual["tcb"] = confbuild.tcb_levels(product, report.reported_tcb)
            # A vector that must be refused may have another key's certificate, or no known product.
            wrong += [(name, key, value, expect[key]) for key, value in actual.items() if value != expect.get(key, value) and (
                key not in ("product", "key_type", "tcb") or expect["valid"])]
        assert wrong == [] and len(REPORT_VECTORS) > 100

    def test_a_simulated_report_is_zero_elsewhere(self) -> None:
        report = confbuild.simulated_report(b"d" * 64, b"m" * 48)
        assert report == b"\3" + bytes(0x4F) + b"d" * 64 + b"m" * 48 + bytes(1184 - 0xC0)
        zero = confbuild.parse_report(bytes(1184))
        assert confbuild.parse_report(report) == zero._replace(version=3, report_data=b"d" * 64, measurement=b"m" * 48, data=report)

    # TCB_VERSION: SEV-SNP ABI 2.2. Bytes 2 to 5 of Milan and Genoa and 4 to 6 of Turin are reserved.
    @pytest.mark.parametrize(("product", "text"), [("Milan", "bootloader=1,tee=2,snp=7,microcode=8"), ("Genoa", "bootloader=1,tee=2,snp=7,microcode=8"),
                                                   ("Turin", "fmc=1,bootloader=2,tee=3,snp=4,microcode=8")])
    def test_tcb_layouts(self, product: str, text: str) -> None:
        assert confbuild.tcb_text(confbuild.tcb_levels(product, bytes(range(1, 9)))) == text
        assert set(confbuild.tcb_levels(product, b"\xff" * 8).values()) == {255}

    @pytest.mark.parametrize(("family", "models", "product"), [
        (0x19, (0x00, 0x01, 0x0F), "Milan"), (0x19, (0x10, 0x11, 0x1F, 0xA0, 0xA1, 0xAF), "Genoa"), (0x1A, (0x00, 0x02, 0x11), "Turin"),
        (0x19, (0x20, 0x9F, 0xB0, 0xFF), ""), (0x1A, (0x12, 0xA0, 0xFF), ""), (0x18, (0x00, 0x11), ""), (0x1B, (0x00,), ""), (0x00, (0x00, 0x19), "")])
    def test_products(self, family: int, models: Sequence[int], product: str) -> None:
        for model in models:
            report = report_of(cpuid_fam_id=family, cpuid_mod_id=model)
            assert [report._replace(version=version).product for version in (0, 1, 2, 3, 5, 6)] == ["", "", "", product, product, product]

    @pytest.mark.parametrize(("flags", "kind"), [
        (0, "VCEK"), (1 << 2, "VLEK"), (2 << 2, "key 2"), (4 << 2, "key 4"), (5 << 2, "key 5"), (7 << 2, "key 7"), (0xFFFFFFE3, "VCEK"), (0xFFFFFFE7, "VLEK"),
        (1, "VCEK"), (3, "VCEK")])
    def test_signing_key(self, flags: int, kind: str) -> None:
        """Bits 4:2 of the flags; 0 is AUTHOR_KEY_EN, 1 is MASK_CHIP_KEY, the others are reserved."""
        assert report_of(flags=flags).signing_key == kind

    @pytest.mark.parametrize(("product", "url"), [
        ("Milan", f"https://kdsintf.amd.com/vcek/v1/Milan/{bytes(range(64)).hex()}?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219"),
        ("Turin", "https://kdsintf.amd.com/vcek/v1/Turin/0001020304050607?fmcSPL=04&blSPL=00&teeSPL=00&snpSPL=00&ucodeSPL=219")])
    def test_vek_url(self, product: str, url: str) -> None:
        """VCEK 4.1: the levels in at least two decimal digits; Turin's hwID has 8 bytes."""
        assert confbuild.vek_url(report_of(), product) == url

    @pytest.mark.parametrize("name", ["snp-milan-v3-dstack", "snp-genoa-v5-yaxi", "snp-turin-v5-openanolis", "snp-vlek-milan-v5-aws"])
    def test_real_signatures(self, name: str) -> None:
        _, data = real_report(name)
        key = confbuild.parse_certificate((VECTORS / name / "vek.der").read_bytes(), "VEK").key
        confbuild.verify_report(confbuild.parse_report(data), key)
        for changed in (data[:0x29F] + bytes((data[0x29F] ^ 1,)) + data[0x2A0:], data[:0x2A0] + data[0x2E8:0x330] + data[0x2A0:0x2E8] + data[0x330:]):
            with pytest.raises(confbuild.BadSignature, match="^inconsistent$"):
                confbuild.verify_report(confbuild.parse_report(changed), key)

    def test_what_a_signature_is_of(self) -> None:
        data = snp_report()
        report = confbuild.parse_report(data)
        confbuild.verify_report(report, TOY_VEK.public)
        confbuild.verify_report(report._replace(s=confbuild.P384_N - report.s), TOY_VEK.public)  # no rule of ECDSA is against it
        confbuild.verify_report(confbuild.parse_report(data[:0x330] + b"\xff" * 368), TOY_VEK.public)
        with pytest.raises(confbuild.BadSignature, match="^the certificate's key is not on P-384$"):
            confbuild.verify_report(report, TOY_AK.public)
        with pytest.raises(confbuild.BadSignature, match="^inconsistent$"):
            confbuild.verify_report(report, OTHER_VEK.public)
        for offset in (0, 0x30, 0x4F, 0x18B, 0x207, 0x29F):  # reserved bytes are signed as well
            with pytest.raises(confbuild.BadSignature, match="^inconsistent$"):
                confbuild.verify_report(confbuild.parse_report(data[:offset] + bytes((data[offset] ^ 0x80,)) + data[offset + 1:]), TOY_VEK.public)

    @pytest.mark.parametrize("offset", [0x2A0, 0x2E8])
    def test_no_other_number_is_r_or_s(self, offset: int) -> None:
        """Zero, n, n more, and each of the 24 bytes beyond the 48 that a number of P-384 has."""
        data, n = snp_report(), confbuild.P384_N
        value = int.from_bytes(data[offset:offset + 72], "little")
        for other in (0, n, value + n, 1 << 384, *(value | 1 << bit for bit in (384, 391, *range(392, 576, 8), 575))):
            with pytest.raises(confbuild.BadSignature, match="^r or s is out of range$"):
                confbuild.verify_report(confbuild.parse_report(data[:offset] + other.to_bytes(72, "little") + data[offset + 72:]), TOY_VEK.public)

    @pytest.mark.parametrize("size", [0, 1, 1183, 1185, 2368])
    def test_no_other_length_is_a_report(self, size: int) -> None:
        with pytest.raises(confbuild.ReportError, match=f"^attestation_report: {size} bytes, not 1184$"):
            confbuild.parse_report(bytes(size))

    @pytest.mark.parametrize(("sizes", "message"), [((63, 48), "report_data has 63 bytes, not 64"), ((64, 49), "measurement has 49 bytes, not 48")])
    def test_a_field_is_never_cut_or_shifted(self, sizes: tuple[int, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            confbuild.simulated_report(bytes(sizes[0]), bytes(sizes[1]))

# endregion 8
# ==============================================================================
# region 9. TPM quote
# ==============================================================================


RUNTIME_DATA = b'{"keys":[]}'
TOY_HCL = hcl_of(bytes(range(256)) * 4 + bytes(160), RUNTIME_DATA)
PCRS = [hashlib.sha256(bytes((i,))).digest() for i in range(24)]
TOY_QUOTE = quote_of(b"n" * 50, PCRS)
AT_EXTRA, AT_COUNT = 10, 10 + 2 + 50 + 25  # in TOY_QUOTE: the size of extraData, the number of selections
AK = {"kid": "HCLAkPub", "kty": "RSA", "e": "AQAB", "n": base64.urlsafe_b64encode(TOY_AK.n.to_bytes(256, "big")).decode()}


def hcl_with(*words: tuple[int, int], data: bytes = TOY_HCL) -> bytes:
    """The HCL report with other words at some offsets."""
    for offset, value in words:
        data = data[:offset] + value.to_bytes(4, "little") + data[offset + 4:]
    return data


def quote_with(at: int, new: bytes, old: int | None = None) -> bytes:
    """The quote with new in place of old bytes of it."""
    return TOY_QUOTE[:at] + new + TOY_QUOTE[at + (len(new) if old is None else old):]


def keys_of(*keys: Any) -> bytes:
    return json.dumps({"keys": keys}).encode()


class TestTpmQuote:
    def test_the_parts_of_an_hcl_report(self) -> None:
        found = confbuild.parse_hcl_report(TOY_HCL)
        assert found == (TOY_HCL[0x20:0x4C0], RUNTIME_DATA) and len(found.attestation_report) == confbuild.REPORT_SIZE
        assert confbuild.parse_hcl_report(hcl_with((4, 1))) == found  # both versions are in the field
        for zeros in (1, 2, 300):  # the content's length counts zeros at its end
            assert confbuild.parse_hcl_report(hcl_of(found.attestation_report, RUNTIME_DATA + bytes(zeros))) == found

    @pytest.mark.parametrize(("data", "message"), [
        (b"", "0 bytes, expected at least 1236"), (TOY_HCL[:0x4D3], "1235 bytes, expected at least 1236"),
        (TOY_HCL[:0x4D4], f"runtime data of {len(RUNTIME_DATA)} bytes, 0 are there"), (hcl_with((0, 0)), "does not begin with HCLA"),
        (b"hcla" + TOY_HCL[4:], "does not begin with HCLA"), *[(hcl_with((4, value)), f"version {value}, expected 1 or 2") for value in (0, 3, 0x01000000, 2 ** 32 - 1)],
        *[(hcl_with((0x4C8, value)), f"report type {value}, expected 2 (SEV-SNP)") for value in (0, 4, 2 ** 31)],
        *[(hcl_with((0x4D0, value)), f"runtime data of {value} bytes, {min(value, 1364)} are there") for value in (0, 2600, 2 ** 31, 2 ** 32 - 1)],
        (hcl_with((0x4D0, 0), (0x4C0, 20), (8, 0x4D4)), "runtime data of 0 bytes, 0 are there"),
        (hcl_with((0x4D0, 1365), (0x4C0, 1385), (8, 2601)), "runtime data of 1365 bytes, 1364 are there"),
        *[(hcl_with((0x4D0, size)), "the sizes in its headers contradict each other") for size in (1364, len(RUNTIME_DATA) - 1, len(RUNTIME_DATA) + 1)],
        *[(hcl_with((offset, value)), "the sizes in its headers contradict each other") for offset in (8, 0x4C0) for value in (0, 2, 2 ** 32 - 1)],
        *[(hcl_with((offset, value)), "unknown request, header version or hash type") for offset in (12, 0x4C4, 0x4CC) for value in (0, 4, 2 ** 32 - 1)],
        *[(hcl_with((offset, 1)), "reserved bytes are not zero") for offset in range(16, 32, 4)],
        *[(TOY_HCL[:at] + b"\1" + TOY_HCL[at + 1:], "bytes after the runtime data") for at in (0x4D4 + len(RUNTIME_DATA), 2599)],
        (TOY_HCL + b"\1", "bytes after the runtime data")])
    def test_each_rule_of_an_hcl_report_broken_once(self, data: bytes, message: str) -> None:
        with pytest.raises(confbuild.QuoteError, match=f"^HCL report: {re.escape(message)}$"):
            confbuild.parse_hcl_report(data)

    def test_no_bit_of_its_headers_and_no_byte_can_be_missing(self) -> None:
        end = 0x4D4 + len(RUNTIME_DATA)
        for bit in (*range(8 * 0x20), *range(8 * 0x4C0, 8 * 0x4D4), *range(8 * end, 8 * 2600, 61)):
            with pytest.raises(confbuild.QuoteError):
                confbuild.parse_hcl_report(TOY_HCL[:bit // 8] + bytes((TOY_HCL[bit // 8] ^ 1 << bit % 8,)) + TOY_HCL[bit // 8 + 1:])
        for size in range(end):
            with pytest.raises(confbuild.QuoteError):
                confbuild.parse_hcl_report(TOY_HCL[:size])
        assert confbuild.parse_hcl_report(TOY_HCL[:end]) == confbuild.parse_hcl_report(TOY_HCL + bytes(10)) == confbuild.parse_hcl_report(TOY_HCL)

    def test_the_attestation_key(self) -> None:
        """Among other keys and names; n with padding or without; whatever else the key says of itself."""
        others: list[Any] = [{**AK, "kid": "HCLEkPub", "n": "AA"}, {}, None, 1, "x", []]
        for keys in ([AK], [*others, AK], [{**AK, "n": AK["n"].rstrip("="), "key_ops": ["sign"]}, *others]):
            key, doc = confbuild.parse_runtime_data(json.dumps({"keys": keys, "vm-configuration": {"a": 1}}).encode())
            assert (key, doc["vm-configuration"]) == (TOY_AK.public, {"a": 1})

    @pytest.mark.parametrize(("data", "message"), [
        (b"", "not JSON: Expecting value"), (b"\xff", "not UTF-8 at byte 0"), (b"{}\0", "not JSON: Extra data"), (keys_of(AK)[:-1], "not JSON: "),
        (b"[" * 200, "nested deeper than 16"), (b'{"keys":[],"keys":[]}', "the name 'keys' occurs twice in one object"),
        (keys_of(AK).replace(b'"kty"', b'"n":"AA","kty"'), "the name 'n' occurs twice in one object"),
        (keys_of(AK).replace(b'"e"', b'"k\\u0069d":"x","e"'), "the name 'kid' occurs twice in one object"),
        *[(data, "0 keys are called HCLAkPub, not exactly one, of RSA") for data in (
            b"null", b"1", b"[]", b'"keys"', b"{}", b'{"keys":null}', b'{"keys":{"kid":"HCLAkPub"}}', b'{"keys":"HCLAkPub"}', keys_of(),
            keys_of(None, 1, "HCLAkPub", ["kid"]), keys_of([AK]), json.dumps(AK).encode(), *(
                keys_of({**AK, "kid": kid}) for kid in ("HCLAkPub\0", "hclakpub", ["HCLAkPub"], None)))],
        (keys_of(AK, AK), "2 keys are called HCLAkPub, not exactly one, of RSA"), (keys_of(AK, {"kid": "HCLAkPub"}), "2 keys are called HCLAkPub, not exactly one, of RSA"),
        *[(keys_of({**AK, "kty": kind}), "1 keys are called HCLAkPub, not exactly one, of RSA") for kind in ("EC", "rsa", None, ["RSA"])],
        *[(keys_of({**AK, "e": e}), "HCLAkPub has not 2048 bits and the exponent 65537") for e in ("Aw", "", "AQAC", "AQABAA", "AQ", "AAAAAAAA")],
        *[(keys_of({**AK, "n": base64.urlsafe_b64encode(n).decode()}), "HCLAkPub has not 2048 bits and the exponent 65537") for n in (
            b"", b"\1", bytes(256), b"\x7f" + b"\xff" * 255, b"\1" + bytes(256), b"\xff" * 512)],
        *[(keys_of({**AK, "n": n}), "n: not base64 text") for n in (
            None, 1, [AK["n"]], AK["n"] + "\n", " " + AK["n"], "+" + AK["n"][1:], "\u0663" + AK["n"][1:])],
        (keys_of({**AK, "n": AK["n"].replace("=", "") + "="}), "n: not "), (keys_of({**AK, "n": AK["n"].rstrip("=")[:-1]}), "n: not "),
        (keys_of({**AK, "e": "AQA"}), "HCLAkPub has not 2048 bits and the exponent 65537"), (keys_of({**AK, "e": "AQB"}), "e: not canonical base64"),
        (keys_of({**AK, "e": 65537}), "e: not base64 text"), (keys_of({name: AK[name] for name in ("kid", "kty", "n")}), "e: not base64 text")])
    def test_each_rule_of_the_runtime_data_broken_once(self, data: bytes, message: str) -> None:
        with pytest.raises(confbuild.Malformed, match=r"^runtime data(, |: )" + re.escape(message)) as caught:
            confbuild.parse_runtime_data(data)
        assert isinstance(caught.value, confbuild.QuoteError) == ("HCLAkPub" in message)

    def test_a_quote_by_hand(self) -> None:
        """TPM 2.0, part 2, 10.12.12 TPMS_ATTEST, 10.12.4 TPMS_QUOTE_INFO, 10.11.1 TPMS_CLOCK_INFO; what Azure's TPM fills in, byte by byte."""
        quote = bytes.fromhex(
            "ff544347 8018 0022 000b" + "51" * 32 + "0006 6e6f6e636521 0000000001c9a347 00000002 00000000 01 2020031200120003"
            "00000001 000b 03 0180a0 0020" + "d1" * 32)
        assert confbuild.parse_quote(quote) == (b"nonce!", [0, 15, 21, 23], b"\xd1" * 32)

    @pytest.mark.parametrize("size", [0, 1, 32, 50, 64])
    def test_extra_data(self, size: int) -> None:
        assert confbuild.parse_quote(quote_of(b"\0" * (size - 1) + b"n" * min(size, 1), PCRS)).extra_data == (b"n".rjust(size, b"\0") if size else b"")

    @pytest.mark.parametrize(("select", "found"), [
        (b"\1", [0]), (b"\x80", [7]), (b"\0\0\x80", [23]), (b"\xff\xff\xff", list(range(24))), (b"\2\0\0\0", [1]), (b"\0\1" + bytes(253), [8]),
        (b"", None), (b"\0", None), (bytes(3), None), (bytes(255), None), (b"\0\0\0\1", None), (b"\xff\xff\xff\x80", None), (bytes(254) + b"\x80", None)])
    def test_selections(self, select: bytes, found: list[int] | None) -> None:
        message = quote_with(AT_COUNT + 6, bytes((len(select),)) + select, 4)
        if found is not None:
            assert confbuild.parse_quote(message).pcr_select == found
        else:
            with pytest.raises(confbuild.QuoteError, match="^TPMS_ATTEST: selects no register, or one above 23$"):
                confbuild.parse_quote(message)

    @pytest.mark.parametrize(("message", "complaint"), [
        (b"\xfeTCG" + TOY_QUOTE[4:], "magic is not TPM_GENERATED_VALUE"), (TOY_QUOTE[3::-1] + TOY_QUOTE[4:], "magic is not TPM_GENERATED_VALUE"),
        *[(quote_with(4, kind), "type is not TPM_ST_ATTEST_QUOTE") for kind in (b"\x80\x17", b"\x80\x14", b"\x80\x19", b"\x18\x80", b"\0\0")],
        *[(quote_with(AT_COUNT, count), "expected one selection of registers, in the SHA-256 bank") for count in (
            bytes(4), b"\0\0\0\2", b"\1\0\0\0", b"\xff\xff\xff\xff")],
        *[(quote_with(AT_COUNT + 4, bank), "expected one selection of registers, in the SHA-256 bank") for bank in (b"\0\4", b"\0\x0c", b"\x0b\0", b"\0\0")],
        # SHA-1 and SHA-256: two selections are none that we know.
        (quote_with(AT_COUNT, bytes.fromhex("00000002 0004 03ffffff 000b 03ffffff"), 10), "expected one selection of registers, in the SHA-256 bank"),
        (TOY_QUOTE + b"\0", "1 bytes are left over"), (TOY_QUOTE + TOY_QUOTE, f"{len(TOY_QUOTE)} bytes are left over"),
        (quote_with(AT_COUNT + 10, b"\0\x1f"), "1 bytes are left over"),
        (quote_with(AT_COUNT + 10, b"\0\x21"), f"ends at byte {len(TOY_QUOTE)}, inside a field"), (quote_with(6, b"\xff\xff"), "ends at byte "),
        (quote_with(AT_EXTRA, b"\xff\xff"), "ends at byte "), (quote_with(AT_COUNT + 6, b"\xff"), "ends at byte "),
        (quote_of(b"n" * 65, PCRS), "extraData has 65 bytes, expected at most 64"), (quote_of(b"n" * 65535, PCRS), "extraData has 65535 bytes, expected at most 64")])
    def test_each_rule_of_a_quote_broken_once(self, message: bytes, complaint: str) -> None:
        with pytest.raises(confbuild.QuoteError, match=f"^TPMS_ATTEST: {re.escape(complaint)}"):
            confbuild.parse_quote(message)

    def test_no_prefix_is_a_quote(self) -> None:
        for size in range(len(TOY_QUOTE)):
            with pytest.raises(confbuild.QuoteError, match=f"^TPMS_ATTEST: ends at byte {size}, inside a field$"):
                confbuild.parse_quote(TOY_QUOTE[:size])

    @given(data=st.binary(max_size=120), start=st.sampled_from([b"", TOY_HCL[:0x4D0], TOY_QUOTE[:6], TOY_QUOTE[:AT_COUNT], keys_of(AK)[:60]]), value=JSON_VALUES,
           name=st.sampled_from(["kid", "kty", "n", "e", "keys"]))
    def test_any_bytes_raise_nothing_else(self, data: bytes, start: bytes, value: Any, name: str) -> None:
        for parse in (confbuild.parse_hcl_report, confbuild.parse_quote):
            with contextlib.suppress(confbuild.QuoteError):
                parse(start + data)
        for runtime in (start + data, json.dumps({"keys": value}).encode(), keys_of({**AK, name: value})):
            with contextlib.suppress(confbuild.Malformed):
                assert confbuild.parse_runtime_data(runtime)[0].n.bit_length() == 2048

    @given(bit=st.integers(0, 8 * len(TOY_QUOTE) - 1))
    def test_flipped_bits(self, bit: int) -> None:
        """A quote stays one only where the bit is of the signer, the clock, or a value that is compared later."""
        with contextlib.suppress(confbuild.QuoteError):
            found = confbuild.parse_quote(quote_with(bit // 8, bytes((TOY_QUOTE[bit // 8] ^ 1 << bit % 8,))))
            unread = bit // 8 in (*range(8, AT_EXTRA), *range(AT_COUNT - 25, AT_COUNT))
            assert (found == confbuild.parse_quote(TOY_QUOTE)) == unread

    def test_pcr_digests(self) -> None:
        """SHA-256 of 64 zero bytes; and of registers in ascending order, whatever was asked for. TPM 2.0, part 1, 17.6.2."""
        zeros = [bytes(32)] * 24
        assert confbuild.compute_pcr_digest(zeros, [4, 9]).hex() == "f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"
        assert confbuild.compute_pcr_digest(PCRS, [0, 23]) == hashlib.sha256(PCRS[0] + PCRS[23]).digest()
        assert confbuild.parse_quote(TOY_QUOTE).pcr_digest == confbuild.compute_pcr_digest(PCRS, range(24))

    @pytest.mark.parametrize("name", [name for name in REPORT_VECTORS if name.startswith("az-snp-")] or ["az-snp-kettle-kex"])
    def test_real_evidence_of_azure(self, name: str) -> None:
        expect, evidence = real_evidence(name)
        hcl = confbuild.parse_hcl_report(confbuild.decode_base64(evidence["hcl_report"], "hcl_report", urlsafe=True))
        quote, message = evidence["tpm_quote"], bytes.fromhex(evidence["tpm_quote"]["message"])
        found = confbuild.parse_quote(message)
        assert found.extra_data.hex() == expect["tpm_extra_data"] and len(found.extra_data) == expect["signed_data_len"]
        assert found.pcr_select == list(range(24))
        assert found.pcr_digest == confbuild.compute_pcr_digest([bytes.fromhex(value) for value in quote["pcrs"]], found.pcr_select)
        assert hcl.attestation_report[0x50:0x70] == hashlib.sha256(hcl.runtime_data).digest()
        key, doc = confbuild.parse_runtime_data(hcl.runtime_data)
        confbuild.verify_rsassa_pkcs1_v1_5(key, message, bytes.fromhex(quote["signature"]))
        assert doc["keys"][0]["kid"] == "HCLAkPub" and "vm-configuration" in doc

# endregion 9
# ==============================================================================
# region 10. Launch digest
# ==============================================================================

TOY_SECTIONS: Sequence[tuple[int, int, int]] = ((0x800000, 0x2000, 1), (0x802000, 0x1000, 2), (0x803000, 0x1000, 3), (0x804000, 0x1000, 4), (0x805000, 0x1000, 0x10))
RESET_BLOCK, HASHES_AREA, SEV_METADATA, TABLE_FOOTER = (uuid.UUID(text).bytes_le for text in (
    "00f771de-1a7e-4fcb-890e-68c77e2fb44e", "7255371f-3a3b-4b04-927b-1da6efa8d454", "dc886566-984a-4798-a75e-5585a7bf67cc", "96b582de-1fb2-45f7-baea-a366c55a082d"))
TOY_ENTRIES: Mapping[bytes, bytes] = {RESET_BLOCK: struct.pack("<I", 0x80B004), HASHES_AREA: struct.pack("<II", 0x805C00, 0x400), SEV_METADATA: struct.pack("<I", 0x600)}


def toy_firmware(sections: Sequence[tuple[int, int, int]] = TOY_SECTIONS, entries: Mapping[bytes, bytes | None] = TOY_ENTRIES,
                 header: bytes = b"", table: bytes | None = None) -> bytes:
    """The test firmware of shared/notes/launch-digest.md. entries: what is changed of its table, None = left out; header: other first bytes of the
    metadata; table: another one, without its footer."""
    size = 8192
    data = bytearray((7 * i + (i >> 8)) & 0xFF for i in range(size))

    def put(end: int, part: bytes) -> None:
        data[end - len(part):end] = part

    metadata = b"ASEV" + struct.pack("<III", 16 + 12 * len(sections), 1, len(sections)) + b"".join(struct.pack("<III", *section) for section in sections)
    put(size - 0x600 + len(metadata), header + metadata[len(header):])
    if table is None:
        table = b"".join(part + struct.pack("<H", len(part) + 18) + guid for guid, part in {**TOY_ENTRIES, **entries}.items() if part is not None)
    put(size - 32, table + struct.pack("<H", len(table) + 18) + TABLE_FOOTER)
    return bytes(data)


TOY_FIRMWARE = toy_firmware()
TOY_KERNEL, TOY_INITRD, TOY_APPEND = bytes(range(256)) * 20, b"initrd\n" * 1000, "console=ttyS0 panic=-1"
TOY_BOOT = confbuild.boot_hashes(hashlib.sha256(TOY_KERNEL).digest(), hashlib.sha256(TOY_INITRD).digest(), TOY_APPEND)
# Of that file, computed with sev-snp-measure 0.0.13: (vCPUs, model, SEV_FEATURES, hypervisor, what boots) -> launch digest.
TOY_DIGESTS = (
    (1, "EPYC-v4", 1, "QEMU", "all", "09fc6f75b7c73bf90dd069b7cdf9066ec3b88b7233ea17bde4d35aa56f32ed9d9e305a40b85f14c969a8a734ac9134ce"),
    (2, "EPYC-v4", 1, "QEMU", "all", "15cb2f852416c4c3ce1a3f422dbaac729e63a02e51aa973de45f422a940b2375b1ccc5943972b1deb575a7847436bcab"),
    (4, "EPYC-v4", 1, "QEMU", "all", "9abc133f923697df35a91023e86a7fe0724172c5ba2fdda143e876d97f7e97afd61ec6f88ab765e17ad40725a76a689d"),
    (64, "EPYC-v4", 1, "QEMU", "all", "50b0b47248d71533f7136e774d0e1cbe9cbe1c02fcdae31c367f287330e54cbe51545daf1ad6ae0719e5595877eb833c"),
    (1, "EPYC-Rome", 1, "QEMU", "all", "b74fa6601e2865e4edf84f61ad89c125b645388465e671b235238290b7ddfea67c9ef080e758a0883b40ab3c237bd41b"),
    (1, "EPYC-Milan", 1, "QEMU", "all", "67a91b5fb661902cb7763ed8dfaeed1c56fdc3ad07b34553b4b441c76bd1ca0ca4e225fcfb28fc1d0b517cdc74c12aab"),
    (2, "EPYC-Genoa", 1, "QEMU", "all", "cccdd77edfb4d27039385d242026e716c217f9bb4151ae36858517dc6db56018254788c60f9297d18c5d77b67233aea9"),
    (1, "EPYC-v4", 0x21, "QEMU", "all", "48cc4bb1d08928627f5dc90459e40fc7e26921178267fd18e6bd50253801d5438e3b0a7c6971a70194d2a1adcee353ac"),
    (1, "EPYC-v4", 1, "QEMU", "nothing", "222f7b7ec5222e72a13bf1a48975940c511cf9704f3041d791dc4eb057c119f9e5b22ee41eb4a58cceb447f98fe93a6e"),
    (1, "EPYC-v4", 1, "QEMU", "kernel", "3ac97b2c5db86240384161e483a7fd5bebae11b5c4e02d34da2577ff5a26d6edf869d84768010fc88a2c6cc2a271960c"),
    (2, "EPYC-Milan", 1, "ec2", "all", "2171267935ce38ef54a9b0d530174b567065e0e859549c195bf63cf6dfc839d1d5aa232dfbab9eb5e70c8bdb4b8df072"),
    (2, "EPYC-Milan", 1, "gce", "all", "2b0c4cda74534ccc54d673817b2fbb8e746524410293b1fa59193519c7307142bc081a67f6e7eaaea87f7054f7783caf"))
TOY_BOOTS: Mapping[str, confbuild.BootHashes | None] = {
    "all": TOY_BOOT, "nothing": None, "kernel": confbuild.boot_hashes(hashlib.sha256(TOY_KERNEL).digest(), None, None)}
# The same file, step by step, for one vCPU of EPYC-v4.
TOY_STEPS = (
    ("firmware: 0x2000 bytes at 0xffffe000", "c3c0df9e8d24233b000905e8195dc131c7ce0bccc2de52d6b5ab8e13ec1024284d88ede1e785b19e1d55e9a7c4a8c712"),
    ("section: 0x2000 bytes at 0x800000, type 0x1 SNP_SEC_MEM", "f526c91156bdf030be41157708b45a87bfd608735a1c63bc7b53239ae5d948286612f491598b696391be6d749350ac41"),
    ("section: 0x1000 bytes at 0x802000, type 0x2 SNP_SECRETS", "49c7ac4a1cc40c970b4cedf5337f8b9db5b2e5ca0cfc08f008928165477267ea0bf8ac37b20830fdc3ba0c8c0a96d20c"),
    ("section: 0x1000 bytes at 0x803000, type 0x3 CPUID", "bf7b665a053c76d40ca701bbe4ab090b2014cd55bd88b9f27602202d41fa1391241885c3368bba9686f437a1d45bcf30"),
    ("section: 0x1000 bytes at 0x804000, type 0x4 SVSM_CAA", "ea1901026138605ae2588d36982836543dd252a91cd36dac0f3d11aa0d4e490ef3859d4a435517ed9e2207e6b80851b6"),
    ("section: 0x1000 bytes at 0x805000, type 0x10 SNP_KERNEL_HASHES, with the hashes of kernel, initrd and command line",
     "abd08e12330de5d7aa5be56af89d3c8b3b7f0aab3b68dfe3ab41bcff656e0ce303cc543e263c3652f85abba946b135c4"),
    ("VMSA: vCPU 0", TOY_DIGESTS[0][-1]))
LZMA_GUID = uuid.UUID("ee4e5898-3914-4259-9d6e-dc7bd79403cf").bytes_le
SHIM = "shim\0".encode("utf-16-le")


def lzma_section(volume: bytes, length: int | None = None, cut: int = 0, properties: bytes = b"") -> bytes:
    """A compressed section as edk2 makes one. length: what it says; cut: bytes that are missing at its end; properties: other first bytes."""
    packed = lzma.compress(volume, lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}])
    packed = packed[:5] + struct.pack("<Q", len(volume) if length is None else length) + packed[13:]
    packed = properties + packed[len(properties):len(packed) - cut]
    return (len(packed) + 24).to_bytes(3, "little") + b"\2" + LZMA_GUID + struct.pack("<HH", 24, 1) + packed


def toy_volume(*sections: bytes) -> bytes:
    """The test firmware with such sections in front."""
    front = b"".join(section + bytes(-len(section) % 16) for section in sections)
    return front + bytes(-len(front) % 4096) + TOY_FIRMWARE


ADMITS = "it admits a shim: where the host names one, it starts that in place of the measured kernel, and its launch digest stays the same"


def short_id(value: object) -> str:
    """For pytest, in place of megabytes."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)[:60]


def firmware_file(name: str) -> Path:
    """A firmware of the vectors, of the very version."""
    wanted = json.loads((vectors() / "launch_digests.json").read_text())["firmware"][name]
    named = os.environ.get("CONFBUILD_TEST_FIRMWARE", "/nonexistent")
    found = [path for path in (Path(named), Path(named).with_name(name), Path("/usr/share/ovmf", name), Path("/var/lib/confbuild-test", name)) if path.is_file()]
    for path in found:
        if hashlib.sha256(path.read_bytes()).hexdigest() == wanted["sha256"]:
            return path
    package = wanted["debian_package"]
    pytest.skip(f"here is another version than {package}" if found else f"{package} is missing: .ci/run fetches it")


class TestLaunchDigest:
    def test_known_pages(self) -> None:
        """Of shared/notes/launch-digest.md."""
        assert hashlib.sha256(TOY_FIRMWARE).hexdigest() == "1ad9b93a9c0b0ace002bb73e3cf8fb085667dba4829199d379c02d86325b8943"
        assert [digest.hex() for digest in TOY_BOOT] == [
            "4345361085c730756d843f13849c50a996fe2f1fac3a7ac05fb063bb743a423e", "99e6a67bad2589ea8c3a38084be75372955cc409f033dd733c6bd7cf2f6c8437",
            "00be93b6c394121fedd2af6d5a11855ab20e05f560fe582cc6c91c706f5e957d"]
        gpa, page = confbuild.hashes_page(confbuild.parse_firmware(TOY_FIRMWARE), TOY_BOOT)
        assert (gpa, len(page), page.strip(b"\0")) == (0x805000, 4096, page[0xC00:0xC00 + 168].rstrip(b"\0"))
        assert hashlib.sha256(page[0xC00:0xC00 + 176]).hexdigest() == "f4317fa717751b93ecc0e58275cd05c458b388b60ee8c3f57d8ca70869adde88"
        for eip, signature, digest in (
                (0xFFFFFFF0, 0x800F12, "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a"),
                (0x80B004, 0x800F12, "8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4"),
                (0xFFFFFFF0, 0xA10F10, "7d39672d1b8a3e38353a8eef23af9a14a850be7b9c80bd29898aff5cd2386719e5ce72ad660a022def56b15e5e0f899e")):
            assert hashlib.sha384(confbuild.vmsa_page(eip, signature, 1, "QEMU")).hexdigest() == digest

    def test_fields(self) -> None:
        """No two fields of the VMSA overlap, and each has a value."""
        rows = sorted(confbuild.VMSA_FIELDS)
        assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(rows)) and rows[-1][0] + rows[-1][1] <= 4096
        assert confbuild.parse_firmware(TOY_FIRMWARE) == (TOY_FIRMWARE, list(TOY_SECTIONS), 0x805C00, 0x400, 0x80B004)

    def test_signatures(self) -> None:
        """[QEMU target/i386/cpu.c]; each version is the same."""
        known = {"EPYC": 0x800F12, "EPYC-Rome": 0x830F10, "EPYC-Milan": 0xA00F11, "EPYC-Genoa": 0xA10F10, "EPYC-Turin": 0xB00F00}
        assert {name: confbuild.CPU_SIGNATURES[name] for name in known} == known and confbuild.CPU_SIGNATURES["EPYC-IBPB"] == 0x800F12
        assert {name: known[re.sub(r"-v\d$|-IBPB$", "", name)] for name in confbuild.CPU_SIGNATURES} == confbuild.CPU_SIGNATURES
        assert len(confbuild.CPU_SIGNATURES) == 5 + 1 + 5 + 5 + 3 + 2 + 1

    @pytest.mark.parametrize(("vcpus", "model", "features", "vmm", "boots", "digest"), TOY_DIGESTS)
    def test_known_digests(self, vcpus: int, model: str, features: int, vmm: str, boots: str, digest: str) -> None:
        firmware = confbuild.parse_firmware(TOY_FIRMWARE)
        assert confbuild.compute_launch_digest(firmware, TOY_BOOTS[boots], vcpus, confbuild.CPU_SIGNATURES[model], features, vmm).hex() == digest

    def test_explain(self) -> None:
        steps: list[tuple[str, str]] = []
        confbuild.compute_launch_digest(confbuild.parse_firmware(TOY_FIRMWARE), TOY_BOOT, 1, 0x800F12, explain=lambda step, digest: steps.append((step, digest.hex())))
        assert tuple(steps) == TOY_STEPS
        steps.clear()
        digest = confbuild.compute_launch_digest(confbuild.parse_firmware(TOY_FIRMWARE), None, 2, 0x800F12, 1, "ec2", lambda step, digest: steps.append((step, digest.hex())))
        assert [step.rpartition(" ")[2] for step, _ in steps[1:]] == ["SNP_SEC_MEM", "SNP_SECRETS", "SVSM_CAA", "SNP_KERNEL_HASHES", "CPUID", "0", "1"]
        assert steps[-1][1] == digest.hex()

    @pytest.mark.parametrize("name", ["OVMF.amdsev.fd", "OVMF.fd"])
    def test_vectors(self, name: str) -> None:
        doc = json.loads((vectors() / "launch_digests.json").read_text())
        firmware = confbuild.parse_firmware(firmware_file(name).read_bytes())
        hashes = {}
        for file, of_file in doc["files"].items():
            seed, length = of_file["seed"].encode(), of_file["length"]
            stream = b"".join(hashlib.sha256(seed + i.to_bytes(8, "big")).digest() for i in range(length // 32 + 1))[:length]
            hashes[file] = hashlib.sha256(stream).digest()
        rows = [row for row in doc["rows"] if row["firmware"] == name]
        for row in rows:
            boots = None if row["kernel"] is None else confbuild.boot_hashes(
                hashes[row["kernel"]], row["initrd"] and hashes[row["initrd"]], row["append"] and doc["appends"][row["append"]])
            assert row["vcpu_type"] is None or confbuild.CPU_SIGNATURES[row["vcpu_type"]] == row["vcpu_sig"]
            arguments = (firmware, boots, row["vcpus"], row["vcpu_sig"], row["guest_features"], row["vmm"])
            if row["launch_digest"] is None:
                with pytest.raises(confbuild.FirmwareError, match="no section of type 0x10"):
                    confbuild.compute_launch_digest(*arguments)
            else:
                assert confbuild.compute_launch_digest(*arguments).hex() == row["launch_digest"], row
        assert len(rows) >= 20

    def test_step_by_step_of_a_real_one(self) -> None:
        """Of shared/notes/launch-digest.md."""
        steps: list[str] = []
        firmware = confbuild.parse_firmware(firmware_file("OVMF.amdsev.fd").read_bytes())
        digests = [confbuild.compute_launch_digest(firmware, TOY_BOOT, n, confbuild.CPU_SIGNATURES[model], explain=lambda _, digest: steps.append(digest.hex())).hex()
                   for n, model in ((1, "EPYC-v4"), (2, "EPYC-v4"), (4, "EPYC-v4"), (2, "EPYC-Genoa"))]
        assert steps[0] == "9d0dd8be18c86e3fe3bf0038ed75ebf5340bee69fd2632c8ff9409964575960ae1f7e84be387d2e3467bc3508d1e4806" and digests == [
            "3c575312d0351b449b91172ed20a4ab24ef0b49a9ce2c3b4c218c2ced9ea4feb31741f8b23a3ed2104af123468e88f71",
            "a954cf381dce90968f8b23dbe39376a81651af9a2520261057effb4bc8ab93b91d2fd91c6ff15e7b7778e6de19775e5b",
            "3a94e8b9e6c026863be4991f83fa0883eab32116fcc76f665d3feda8cded186f6b44e101e353fe30e78d2a6236c33528",
            "86942c08671ff268fdf66520a23386dfd33f46a3709da392b6ccb625475bd3e646d32ca8b6ce4078a7e71f9ff8b20770"]

    ENTRY = struct.pack("<I", 0x600) + struct.pack("<H", 22) + SEV_METADATA

    @pytest.mark.parametrize(("data", "message"), [
        (b"", "0 bytes, expected 1 to 4096 pages of 4096"), (TOY_FIRMWARE[:-1], "8191 bytes, expected 1 to"), (TOY_FIRMWARE + bytes(16 << 20), "16785408 bytes, expected 1 to"),
        (TOY_FIRMWARE[:4096], "no table of GUIDs ends 32 bytes before its end: not OVMF"), (bytes(4096), "not OVMF"),
        (TOY_FIRMWARE[:-50] + b"\x11\0" + TOY_FIRMWARE[-48:], "its table of GUIDs cannot have 17 bytes"),
        (TOY_FIRMWARE[:-50] + b"\xe1\x1f" + TOY_FIRMWARE[-48:], "its table of GUIDs cannot have 8161 bytes"),
        (TOY_FIRMWARE[:-50] + b"\x59\0" + TOY_FIRMWARE[-48:], "entry of 0 bytes, its table of GUIDs has 1"),
        (toy_firmware(table=b"\0" * 17), "entry of 0 bytes, its table of GUIDs has 17"), (toy_firmware(table=b"\0" * 18), "entry of 0 bytes, its table of GUIDs has 18"),
        (toy_firmware(table=b"\x11\0" + bytes(16)), "entry of 17 bytes, its table of GUIDs has 18"),
        (toy_firmware(table=b"\x13\0" + bytes(16)), "entry of 19 bytes, its table of GUIDs has 18"),
        (toy_firmware(table=ENTRY + ENTRY), f"two entries {SEV_METADATA.hex()} in its table of GUIDs"), (toy_firmware(table=b""), "has no SEV metadata"),
        (toy_firmware(entries={SEV_METADATA: None}), "has no SEV metadata"), (toy_firmware(entries={RESET_BLOCK: None}), "has no SEV-ES reset block"),
        (toy_firmware(entries={SEV_METADATA: bytes(3)}), "SEV metadata: ends at byte 3, inside a field"), (toy_firmware(entries={RESET_BLOCK: bytes(5)}), "SEV-ES reset block: 1 bytes are left over"),
        (toy_firmware(entries={HASHES_AREA: bytes(4)}), "area for hashes: ends at byte 4, inside a field"), (toy_firmware(entries={HASHES_AREA: b""}), "area for hashes: ends at byte 0, inside a field"),
        (toy_firmware(entries={SEV_METADATA: bytes(4)}), "its SEV metadata cannot be 0 bytes before its end"),
        (toy_firmware(entries={SEV_METADATA: b"\x0f\0\0\0"}), "its SEV metadata cannot be 15 bytes before its end"),
        (toy_firmware(entries={SEV_METADATA: b"\x01\x20\0\0"}), "its SEV metadata cannot be 8193 bytes before its end"),
        (toy_firmware(entries={SEV_METADATA: b"\xff" * 4}), "its SEV metadata cannot be 4294967295 bytes before its end"),
        (toy_firmware(entries={SEV_METADATA: b"\x10\0\0\0"}), "its SEV metadata does not begin with ASEV and version 1"),
        (toy_firmware(header=b"ASEW"), "does not begin with ASEV"), (toy_firmware(header=b"ASEV" + struct.pack("<II", 76, 2)), "does not begin with ASEV and version 1"),
        (toy_firmware(header=b"ASEV" + struct.pack("<I", 75)), "its SEV metadata of 75 bytes cannot have 5 sections"),
        (toy_firmware(header=b"ASEV" + struct.pack("<III", 76, 1, 4)), "its SEV metadata of 76 bytes cannot have 4 sections"),
        (toy_firmware(header=b"ASEV" + struct.pack("<III", 16 + 12 * 127, 1, 127)), "its SEV metadata of 1540 bytes cannot have 127 sections"),
        (toy_firmware(header=b"ASEV" + struct.pack("<III", 0xFFFFFFF4 + 16 & 0xFFFFFFFF, 1, 0xFFFFFFFF)), "cannot have 4294967295 sections"),
        (toy_firmware(sections=[(0x800000, 0x1000, 5)]), "section of unknown type 0x5"), (toy_firmware(sections=[(0, 0x1000, 0)]), "section of unknown type 0x0"),
        (toy_firmware(sections=[(0x800001, 0x1000, 1)]), "section of 0x1000 bytes at 0x800001, expected whole pages"),
        (toy_firmware(sections=[(0x800000, 0x1001, 1)]), "section of 0x1001 bytes at 0x800000, expected whole pages"),
        (toy_firmware(sections=[(0x800000, 0, 1)]), "section of 0x0 bytes at 0x800000, expected whole pages"),
        (toy_firmware(sections=[(0, 0x1000, 1), (0, 0x1000000, 1)]), "sections of more than 16777216 bytes in sum"),
        (toy_firmware(sections=[(0, 0xFFFFF000, 1)]), "sections of more than 16777216 bytes in sum")], ids=short_id)
    def test_what_is_no_firmware(self, data: bytes, message: str) -> None:
        with pytest.raises(confbuild.FirmwareError, match=f"^firmware(: .*|, ){re.escape(message)}") as caught:
            confbuild.parse_firmware(data)
        assert caught.value.structure .partition(", ")[0] == "firmware"

    @pytest.mark.parametrize(("changes", "message"), [
        ({"sections": TOY_SECTIONS[:4]}, "it has no section of type 0x10 (SNP_KERNEL_HASHES): it has no measured direct boot"),
        ({"entries": {HASHES_AREA: None}}, "its area for hashes has no address: it has no measured direct boot"),
        ({"entries": {HASHES_AREA: bytes(8)}}, "its area for hashes has no address"), ({"entries": {HASHES_AREA: struct.pack("<II", 0, 0x400)}}, "no address"),
        ({"sections": [*TOY_SECTIONS, TOY_SECTIONS[4]]}, "are not one page"), ({"sections": [(0x805000, 0x2000, 0x10)]}, "are not one page"),
        *[({"entries": {HASHES_AREA: struct.pack("<II", gpa, size)}}, "does not lie in its section of type 0x10")
          for gpa, size in ((0x804FFF, 0x400), (0x806000, 0x400), (0x805F51, 0x400), (0x805C00, 175), (0x805C00, 0), (0xFFFFFFFF, 0x400))]])
    def test_no_measured_direct_boot(self, changes: Mapping[str, Any], message: str) -> None:
        """It has a digest, and none that says what is booted."""
        firmware = confbuild.parse_firmware(toy_firmware(**changes))
        assert len(confbuild.compute_launch_digest(firmware, None, 1, 0)) == 48
        for attempt in (lambda: confbuild.hashes_page(firmware, TOY_BOOT), lambda: confbuild.compute_launch_digest(firmware, TOY_BOOT, 1, 0)):
            with pytest.raises(confbuild.FirmwareError, match=re.escape(message)):
                attempt()

    def test_limits(self) -> None:
        large = confbuild.parse_firmware(bytes((16 << 20) - 8192) + toy_firmware(sections=[(0x1000, 0x1000000, 1)]))
        assert len(large.data) == 16 << 20 and len(confbuild.compute_launch_digest(large, None, 4096, 0xFFFFFFFF, 2 ** 64 - 1)) == 48
        edge = confbuild.parse_firmware(toy_firmware(entries={HASHES_AREA: struct.pack("<II", 0x805F50, 176)}))
        assert confbuild.hashes_page(edge, TOY_BOOT)[1][0xF50:0xF60] == uuid.UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le
        firmware = confbuild.parse_firmware(TOY_FIRMWARE)
        for arguments in ((0, 0), (4097, 0), (1, -1), (1, 1 << 32), (1, 0, -1), (1, 0, 1 << 64), (1, 0, 1, "qemu")):
            with pytest.raises(confbuild.Malformed, match=rf"^launch digest: there is none of {arguments[0]} vCPUs of signature "):
                confbuild.compute_launch_digest(firmware, None, *arguments)

    @pytest.mark.parametrize(("append", "message"), [("a\0b", "it contains a NUL, which ends it"), ("\ud800", "a lone surrogate is no character")])
    def test_what_is_no_command_line(self, append: str, message: str) -> None:
        with pytest.raises(confbuild.Malformed, match=f"^command line: {message}"):
            confbuild.boot_hashes(bytes(32), None, append)

    @given(st.binary(max_size=20).filter(lambda data: 0 not in data))
    def test_command_lines(self, data: bytes) -> None:
        """As the system hands them out, whatever the bytes; none is an empty one."""
        assert confbuild.boot_hashes(bytes(32), None, data.decode("utf-8", "surrogateescape")).cmdline == hashlib.sha256(data + b"\0").digest()
        assert confbuild.boot_hashes(b"k" * 32, None, None) == confbuild.boot_hashes(b"k" * 32, hashlib.sha256().digest(), "") == (
            b"k" * 32, hashlib.sha256().digest(), hashlib.sha256(b"\0").digest())

    @settings(max_examples=300)
    @given(where=st.integers(0, 2 ** 16 - 1) | st.integers(8 * (8192 - 32 - 88), 8 * 8192 - 1) | st.integers(8 * (8192 - 0x600), 8 * (8192 - 0x600 + 76) - 1), cut=st.booleans())
    def test_no_bit_can_be_changed(self, where: int, cut: bool) -> None:
        data = bytearray(TOY_FIRMWARE[:where // 8] if cut else TOY_FIRMWARE)
        if not cut:
            data[where // 8] ^= 1 << where % 8
        try:
            digest = confbuild.compute_launch_digest(confbuild.parse_firmware(bytes(data)), TOY_BOOT, 2, 0x800F12).hex()
        except confbuild.FirmwareError:
            return
        assert not cut and digest != TOY_DIGESTS[1][-1]

    @given(st.dictionaries(st.sampled_from([0, 1, 4]), st.binary(min_size=32, max_size=32), min_size=1), st.binary(min_size=8, max_size=8))
    def test_what_is_measured(self, hashes: Mapping[int, bytes], area: bytes) -> None:
        """Another kernel, initrd or command line is another digest; any area that is taken lies in the page."""
        firmware = confbuild.parse_firmware(TOY_FIRMWARE)
        other = TOY_BOOT._replace(**{TOY_BOOT._fields[min(i, 2)]: digest for i, digest in hashes.items()})
        assert confbuild.compute_launch_digest(firmware, other, 2, 0x800F12).hex() != TOY_DIGESTS[1][-1]
        try:
            gpa, page = confbuild.hashes_page(confbuild.parse_firmware(toy_firmware(entries={HASHES_AREA: area})), TOY_BOOT)
        except confbuild.FirmwareError:
            return
        assert gpa == 0x805000 and len(page) == 4096 and TOY_BOOT.kernel in page


class TestFirmwareState:
    def test_the_stock_firmware(self) -> None:
        data = firmware_file("OVMF.amdsev.fd").read_bytes()
        volume = b"".join(confbuild.volume_blocks(data))
        assert confbuild.firmware_state(data) == ADMITS and len(volume) == 0xF50090 and volume.count(SHIM) == 2

    @pytest.mark.parametrize(("volume", "state"), [
        (b"x" * 100, ""), (SHIM, ADMITS), (b"x" + SHIM + b"y", ADMITS), ("shim".encode("utf-16-le"), ""), (b"shim\0", ""), ("\u2603him\0".encode("utf-16-le"), ""),
        *[(bytes(n) + SHIM, ADMITS) for n in ((1 << 20) - 10, (1 << 20) - 9, (1 << 20) - 5, (1 << 20) - 1, 1 << 20, (3 << 20) - 4)],
        (bytes(1 << 20), ""), (bytes(2 << 20), ""), ((1 << 20) * b"\1" + b"\2", "")], ids=short_id)
    def test_names(self, volume: bytes, state: str) -> None:
        """Wherever it lies, also across two blocks."""
        data = toy_volume(lzma_section(volume))
        assert (confbuild.firmware_state(data), b"".join(confbuild.volume_blocks(data)) == volume) == (state, True)

    def test_the_guid_elsewhere(self) -> None:
        """As it stands in code, too, and as what cannot be a section."""
        odd = [LZMA_GUID, b"\2" + LZMA_GUID, bytes(3) + b"\2" + LZMA_GUID + bytes(4), b"\xff\xff\xff\2" + LZMA_GUID + b"\x18\0\0\0",
               b"\x18\0\0\2" + LZMA_GUID + b"\x18\0\0\0", b"\x30\0\0\2" + LZMA_GUID + b"\x17\0\0\0"]
        assert b"".join(confbuild.volume_blocks(toy_volume(*odd, lzma_section(b"volume")))) == b"volume"
        assert b"".join(confbuild.volume_blocks(toy_volume(lzma_section(b"volume")) + b"\2" + LZMA_GUID)) == b"volume"

    @pytest.mark.parametrize(("data", "message"), [
        (TOY_FIRMWARE, "there is no compressed section"), (b"", "there is no compressed section"),
        (toy_volume(lzma_section(b"a"), lzma_section(b"b")), "there is more than one compressed section"),
        (toy_volume(lzma_section(b"a", 0)), "it says that it has 0 bytes, which is not 1 to 67108864"),
        (toy_volume(lzma_section(b"a", (64 << 20) + 1)), "it says that it has 67108865 bytes"), (toy_volume(lzma_section(b"a", 2 ** 64 - 1)), "which is not 1 to 67108864"),
        (toy_volume(lzma_section(b"a" * 5000, cut=12)), "bytes are missing"), (toy_volume(lzma_section(b"a" * 5000, 64 << 20)), "it cannot be decompressed: Corrupt"),
        (toy_volume(lzma_section(b"a", properties=b"\xff")), "it cannot be decompressed: Input format"),
        (toy_volume(lzma_section(b"a", properties=b"\x5d\0\0\0\x80")), "it cannot be decompressed: Memory usage limit exceeded")], ids=short_id)
    def test_what_cannot_be_looked_into(self, data: bytes, message: str) -> None:
        state = confbuild.firmware_state(data)
        assert state.startswith("cannot be looked into: firmware volume: ") and message in state
        with pytest.raises(confbuild.FirmwareError, match=re.escape(message)):
            b"".join(confbuild.volume_blocks(data))

    def test_no_lzma(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Python can be built without."""
        class Missing:
            def __getattr__(self, name: str) -> Any:
                raise ImportError("No module named '_lzma'")

        monkeypatch.setattr(confbuild, "lzma", Missing())
        assert confbuild.firmware_state(toy_volume(lzma_section(b"a"))) == "cannot be looked into: firmware volume: this Python has no lzma"

    @settings(max_examples=100)
    @given(st.integers(0, 10 ** 6), st.binary(max_size=4), st.integers(0, 4))
    def test_any_bytes_inside_never_raise(self, where: int, new: bytes, old: int) -> None:
        section = lzma_section(bytes(range(256)) * 4)
        at = where % len(section)
        state = confbuild.firmware_state(toy_volume(section[:at] + new + section[at + old:]))
        assert state == "" or state.startswith("cannot be looked into: ")

    def test_a_hostile_firmware_takes_bounded_time(self) -> None:
        """All of it GUIDs of sections that are none; and what unpacks to the most."""
        with within(20):
            assert "no compressed section" in confbuild.firmware_state((b"\2" + LZMA_GUID) * (1 << 18))
            assert confbuild.firmware_state(toy_volume(lzma_section(bytes(64 << 20)))) == ""

# endregion 10
# ==============================================================================
# region 11. Statement
# ==============================================================================


LOCKED = {"sha256": "ab" * 32}
TOOLS = {name: {"digest": {"sha256": str(i) * 64}, "version": f"{name} {i}"} for i,
         name in enumerate(("nix", "cargo", "rustc", "pnpm", "node", "kettle"), 1)}
DEFINITION = "predicate__buildDefinition__"


def parameters(*tools: str, **more: Any) -> dict[str, Any]:
    return {**more, "lockfileHash": LOCKED, "toolchain": {name: TOOLS[name] for name in (*tools, "kettle")}}


def dependency(name: str, uri: str, **digest: str) -> dict[str, Any]:
    return {"digest": digest or {"sha256": "cd" * 32}, "name": name, "uri": uri}


NIX_DEPENDENCY = {"annotations": {"drvPath": "/nix/store/a.drv", "outputHashMode": "recursive", "url": "u", "urls": "[u]"},
                  **dependency("a", "pkg:nix-fetch/a?hash=sha256:00ff", sha256="47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=")}
# Everything optional is there.
FULL = statement(**{
    DEFINITION + "internalParameters": parameters("nix", evaluation={"derivationCount": 3, "fetchCount": 1},
                                                  flakeInputs=[{"name": "nixpkgs", "narHash": "sha256-x="}]),
    DEFINITION + "resolvedDependencies": [NIX_DEPENDENCY]})
# Bundles that Kettle made on real hardware, and what is wrong with each.
REAL = {"bundle-ripgrep-2026-07-noartifact": {"artifact rg", "artifacts", "unlisted files"},  # expect.json, where there is no artifacts/
        "bundle-ripgrep-legacy-compact-a": {"provenance digest", "artifact rg", "artifacts", "unlisted files"},
        "bundle-ripgrep-snp-siena-no-vcek": {"VEK form", "artifact rg", "artifacts", "unlisted files"},
        "neg-bundle-artifact-renamed": {"artifact kex", "artifacts", "unlisted files"}}


class TestStatement:
    @pytest.mark.parametrize("name", REAL)
    def test_real_statements(self, name: str) -> None:
        """Both generations; the Merkle root is the one that Kettle computed, and the one that expect.json's author did."""
        folder = real_bundle(name)
        data = (folder / "provenance.json").read_bytes()
        doc = confbuild.parse_json(data, "provenance")
        confbuild.check_statement(doc)
        assert confbuild.to_canonical(doc) == data
        root = confbuild.merkle_root(confbuild.merkle_entries(doc))
        if "merkle_root" in (expect := json.loads((folder / "expect.json").read_text())):
            assert root == expect["merkle_root"]
        assert root == confbuild.byproduct(doc, "input_merkle_root") and confbuild.byproduct(doc, "build_log") is None

    @pytest.mark.parametrize(("name", "failed"), REAL.items())
    def test_real_bundles_fail_for_one_reason(self, name: str, failed: set[str]) -> None:
        verdict = verdict_over(confbuild.read_bundle(str(real_bundle(name))), confbuild.Expectations())
        assert (verdict.verdict, {check.name for check in verdict.checks if check.status == "failed"}) == ("failed", failed)

    @pytest.mark.parametrize(("build_type", "tools"), [
        *((kind, tools) for kind in (confbuild.BUILD_TYPE, "https://lunal.dev/kettle/go@v1", "x") for tools in (
            ("nix",), ("cargo", "rustc"), ("pnpm", "node"))),
        ("https://lunal.dev/kettle/nix@v1", ("nix",)), ("https://lunal.dev/kettle/cargo@v1", ("cargo", "rustc")),
        ("https://lunal.dev/kettle/pnpm@v1", ("pnpm", "node"))])
    def test_both_generations_and_no_mixture(self, build_type: str, tools: tuple[str, ...]) -> None:
        confbuild.check_statement(statement(**{DEFINITION + "buildType": build_type, DEFINITION + "internalParameters": parameters(*tools)}))
        if build_type in confbuild.OLDER_BUILD_TYPES:
            other = parameters("nix") if "nix" not in tools else parameters("cargo", "rustc")
            with pytest.raises(confbuild.Malformed, match=f"^provenance schema: buildType {re.escape(build_type)} with another toolchain$"):
                confbuild.check_statement(statement(**{DEFINITION + "buildType": build_type, DEFINITION + "internalParameters": other}))

    @pytest.mark.parametrize(("changes", "message"), [
        ({"_type": "https://in-toto.io/Statement/v0.1"},
         'provenance._type: "https://in-toto.io/Statement/v0.1", not "https://in-toto.io/Statement/v1"'),
        ({"predicateType": 1}, "provenance.predicateType: 1, not"), ({DEFINITION + "buildType": ""}, 'buildType: "" is not text'),
        ({DEFINITION + "buildType": "a\n"}, "buildType: "), ({DEFINITION + "buildType": None}, "buildType: null is not text"),
        ({DEFINITION + "buildType": ["a"]}, "buildType: "),
        ({DEFINITION + "internalParameters": {chr(i): 0 for i in range(64, 10_000)}}, "has the names @, A, B"),
        ({DEFINITION + "externalParameters__buildCommand": ""}, 'buildCommand: "" is not text'),
        ({DEFINITION + "externalParameters__buildCommand": "a\nb"}, "is not text"),
        ({DEFINITION + "externalParameters__source__uri": None}, "source.uri: null is not text"),
        ({DEFINITION + "externalParameters__source__digest__gitCommit": "12" * 16},
         'gitCommit: "12121212121212121212121212121212" is not of the form'),
        ({DEFINITION + "externalParameters__source__digest__gitTree": ""}, 'gitTree: "" is not of the form [0-9a-f]{40}|[0-9a-f]{64}'),
        *[({DEFINITION + f"externalParameters__source__digest__{name}": digits}, f"{name}: ") for name in ("gitCommit", "gitTree") for digits in (
            "1" * 39, "1" * 41, "1" * 63, "1" * 65, "A" * 64, "1" * 64 + "\n", " " * 64)],
        ({DEFINITION + "externalParameters__source__digest__gitTree": "12" * 20 + "\n"}, "gitTree: "),
        ({DEFINITION + "internalParameters__lockfileHash": {"sha256": "AB" * 32}}, "lockfileHash.sha256: "),
        ({DEFINITION + "internalParameters": parameters("cargo", "rustc", evaluation={"derivationCount": True, "fetchCount": 0})},
         "derivationCount: not an integer"),
        ({DEFINITION + "internalParameters": parameters("cargo", "rustc", flakeInputs={})}, "flakeInputs: not an array"),
        ({DEFINITION + "internalParameters": parameters("cargo", "rustc", extra=1)},
         "has the names extra, lockfileHash, toolchain, not lockfileHash, toolchain in this order"),
        ({DEFINITION + "internalParameters": parameters("rustc", "cargo")}, "has the names rustc, cargo, kettle, not"),
        ({DEFINITION + "internalParameters": 1}, "not an object"),
        ({DEFINITION + "internalParameters": parameters("cargo")}, "has the names cargo, kettle, not"),
        ({DEFINITION + "internalParameters": {}}, "has the names none, not lockfileHash"),
        ({DEFINITION + "resolvedDependencies": [dependency("a", "u", sha512="ab" * 32)]}, "resolvedDependencies[0].digest.sha512: "),
        ({DEFINITION + "resolvedDependencies": [dependency("a", "u", sha3="ab" * 32)]}, "resolvedDependencies[0].digest: has the names sha3"),
        ({DEFINITION + "resolvedDependencies": [dependency("a", "u"), dependency("", "u")]}, 'resolvedDependencies[1].name: "" is not text'),
        ({DEFINITION + "resolvedDependencies": [{"annotations": {"url": "u"}, **dependency("a", "u")}]},
         "annotations: has the names url, not drvPath, url in this order"),
        ({"predicate__runDetails__byproducts": [{"digest": LOCKED, "name": "a"}] * 2}, "a byproduct occurs twice"),
        *[({DEFINITION + "resolvedDependencies": [dependency("a", "u", sha512=text)]}, "resolvedDependencies[0].digest.sha512: ") for text in (
            "", "x", "ab" * 32, "AB" * 20, "sha512-", "sha512-" + "A" * 21, "sha512-" + "A" * 87, "sha512-" + "_" * 86 + "==", "sha3-" + "A" * 44, "SHA512-" + "A" * 86 + "==",
            "sha512-" + "A" * 86 + "==\n", "sha512-" + "A" * 86 + "==  sha1-" + "A" * 27 + "=", " sha1-" + "A" * 27 + "=", "sha1-" + "A" * 27 + "===", None, 1)],
        *[({"predicate__runDetails__metadata__invocationId": text}, "invocationId: ") for text in (
            "", "build-", "build", "Build-1", "build-1\n", "build-a_b", "build-a b", "build-\u0661", "xbuild-1", None, 1)],
        *[({"predicate__runDetails__metadata__finishedOn": text}, "finishedOn: ") for text in (
            "", "2026-11-23", "2026-11-23T00:00:00", "2026-11-23T00:00:00z", "2026-11-23t00:00:00Z", "2026-11-23 00:00:00Z", "2026-11-23T00:00:00Z\n",
            "2026-11-23T00:00:00.Z", "2026-11-23T00:00:00.1234567890Z", "2026-11-23T00:00:00-00:00", "2026-11-23T00:00:00+00:01",
            "12026-11-23T00:00:00Z", "2026-00-23T00:00:00Z",
            "2026-13-23T00:00:00Z", "2026-11-00T00:00:00Z", "2026-11-32T00:00:00Z", "2026-11-23T24:00:00Z", "2026-11-23T00:60:00Z", "2026-11-23T00:00:60Z",
            "2026-11-2\u0663T00:00:00Z", "2026-11-23T00:00:00.\u0661Z", 0)],
        ({"predicate__runDetails__metadata__startedOn": "2026-11-23T00:00:00+01:00"}, "startedOn: "),
        ({"predicate__runDetails__metadata__startedOn": None}, "startedOn: null is not of the form"),
        ({"predicate__runDetails__metadata__startedOn": "\u0662026-11-23T00:00:00+00:00"}, "startedOn: "),
        ({"predicate__runDetails__metadata__invocationId": "build-\u06620261123-000000-00000000"}, "invocationId: "),
        ({"subject": None}, "provenance.subject: not an array"),
        ({"subject": [{"digest": LOCKED}]}, "provenance.subject[0]: has the names digest, not digest, name in this order"),
        ({"subject": [{"digest": {"sha256": "AB" * 32}, "name": "demo"}]}, "provenance.subject[0].digest.sha256: "),
        ({"subject": [{"digest": LOCKED, "name": "a\x1b"}]}, "is not text")])
    def test_each_rule_broken_once(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(confbuild.Malformed, match=r"^provenance schema: .*" + re.escape(message)):
            confbuild.check_statement(statement(**{"predicate__runDetails__byproducts": [{"digest": LOCKED, "name": "a"}], **changes}))

    def test_no_node_may_be_anything_else(self) -> None:
        """Every node of a full statement replaced by every kind of value, every name dropped, doubled, or out of its order."""
        confbuild.check_statement(FULL)
        inner = "resolvedDependencies", "byproducts", "subject", "flakeInputs"
        free: dict[str, list[Any]] = {"finishedOn": [None], "derivationCount": [7], "fetchCount": [7], "uri": ["\0"], "url": ["\0"], "urls": ["\0"],
                                      **{name: [[]] for name in inner}}
        wrong: list[tuple[Any, ...]] = []
        values: list[Any] = [None, True, 7, 1.5, "\0", [], [[]], {}, {"": 1}]
        for path in ((), *nodes(FULL)):
            for value in values:
                # A dependency's uri is one word, the source's may be any text.
                allowed = path and value in free.get(path[-1],
                                                     []) and type(value) is not bool and not ("uri" in path and "resolvedDependencies" in path)
                try:
                    confbuild.check_statement(replaced(FULL, path, value))
                except confbuild.Malformed:
                    wrong += [(path, value, "refused")] if allowed else []
                else:
                    wrong += [] if allowed else [(path, value, "accepted")]
            node = at(FULL, path)
            for name in node if isinstance(node, dict) else ():
                for other in ({k: v for k, v in node.items() if k != name}, {**node, "extra": 1},
                              {name: node[name], **node} if name != next(iter(node)) else {"": 1, **node}):
                    optional = name in ("evaluation", "flakeInputs", "annotations", "outputHashMode", "url", "urls") and name not in other
                    try:
                        confbuild.check_statement(replaced(FULL, path, other))
                    except confbuild.Malformed:
                        wrong += [(path, list(other), "refused")] if optional else []
                    else:
                        wrong += [] if optional else [(path, list(other), "accepted")]
        assert wrong == []

    def test_the_inputs_that_the_root_binds(self) -> None:
        """The three orders, word for word from [CONTRACT 3]."""
        def entries(*tools: str) -> list[str]:
            return confbuild.merkle_entries(statement(**{
                DEFINITION + "internalParameters": parameters(*tools), DEFINITION + "externalParameters__source__digest__gitCommit": "c" * 40,
                DEFINITION + "resolvedDependencies": [dependency("x", "pkg:x@1?checksum=sha256:00"),
                                                      dependency("y", "pkg:nix-fetch/y?hash=sha1:11?hash=2")]}))

        start, lock, uris = ["c" * 40, "12" * 20], "ab" * 32, ["pkg:x@1?checksum=sha256:00", "pkg:nix-fetch/y?hash=sha1:11?hash=2"]
        assert entries("cargo", "rustc") == [*start, "3" * 64, "rustc 3", "2" * 64, "cargo 2", lock, *uris]
        assert entries("nix") == [*start, lock, "fetch:x:", "fetch:y:sha1:11?hash=2", "1" * 64, "nix 1"]
        name = "a?hash=b"  # nix allows it
        doc = statement(**{DEFINITION + "internalParameters": parameters("nix"), DEFINITION + "resolvedDependencies": [dependency(name, f"pkg:nix-fetch/{name}?hash=sha256:c=")]})
        assert confbuild.merkle_entries(doc)[3] == "fetch:a?hash=b:sha256:c="
        assert entries("pnpm", "node") == [*start, "5" * 64, "node 5", "4" * 64, "pnpm 4", lock, *uris]

    @pytest.mark.parametrize(("path", "values"), [
        ("buildDefinition__buildType", ["https://lunal.dev/kettle/go@v1", " ", "\u00e9" * 5000]),
        ("runDetails__metadata__invocationId", ["build-20261123-000000-00000000", "build-0", "build--", "build-f81d4fae-7dec-11d0-A765-00A0C91E6BF6"]),
        ("runDetails__metadata__finishedOn", [None, "2026-11-23T00:00:00Z", "2026-11-23T23:59:59.123456789+00:00", "0000-01-01T00:00:00.0Z",
                                              "9999-12-31T00:00:00Z"])])
    def test_what_is_free_within_bounds(self, path: str, values: Sequence[Any]) -> None:
        for value in values:
            confbuild.check_statement(statement(**{f"predicate__{path}": value}))

    @pytest.mark.parametrize(("build_type", "good"), [*((name, True) for name in confbuild.OLDER_BUILD_TYPES if "cargo" in name), (confbuild.BUILD_TYPE, False),
                                                      ("https://lunal.dev/kettle-tee/v1", False), ("https://lunal.dev/kettle/cargo@v2", False)])
    def test_only_the_older_generation_has_a_banner_for_its_own_digest(self, build_type: str, good: bool) -> None:
        inner = parameters("cargo", "rustc")
        inner["toolchain"]["kettle"] = {"digest": {"sha256": "\npkg_version:1.0.0\nbranch:"}, "version": "\npkg_version:1.0.0"}
        message = "^provenance schema: provenance.toolchain.kettle.digest.sha256: "
        with contextlib.nullcontext() if good else pytest.raises(confbuild.Malformed, match=message):
            confbuild.check_statement(statement(**{DEFINITION + "buildType": build_type, DEFINITION + "internalParameters": inner}))

    def test_a_complaint_is_no_longer_than_a_reader_can_bear(self) -> None:
        for doc in ({f"name {i}": 0 for i in range(100_000)}, replaced(FULL, ("predicate", "buildDefinition", "resolvedDependencies", 0, "digest"),
                                                                         {"x" * confbuild.MIB: 0})):
            with pytest.raises(confbuild.Malformed) as caught:
                confbuild.check_statement(doc)
            assert len(str(caught.value)) < 500

    # The forms of [CONTRACT 3]: cargo from a registry, from git, from a folder; nix; npm, also scoped, and as a commit's tarball.
    @pytest.mark.parametrize(("uri", "package"), [
        ("pkg:cargo/aho-corasick@1.1.3?checksum=sha256:8e60", "aho-corasick@1.1.3"), ("pkg:cargo/a@1.0.0+x?checksum=x", "a@1.0.0+x"), ("pkg:cargo/a@1?vcs_url=git+https://h/p/q%3Fr@12", ""),
        ("pkg:cargo/a@1?vcs_url=git+file:../b/c@12", ""), ("pkg:cargo/a@1", "a@1"), ("pkg:nix-fetch/a.tar.gz?hash=sha256:0/0", "a.tar.gz"),
        ("pkg:npm/left-pad@1.3.0?checksum=sha512-a/b+c==", "left-pad@1.3.0"), ("pkg:npm/@scope/name@1.0.0?checksum=x", "@scope/name@1.0.0"),
        ("pkg:npm/a@1??b", "a@1"), ("https://codeload.github.com/o/r/tar.gz/12", ""),
        *[(f"pkg:cargo/a@1?{query}", "") for query in ("checksum=x&repository_url=https://h", "repository_url=h", "checksum=x&Repository_URL=h&z", "checksum=x&vcs_url=h", "VCS_URL=h")],
        ("pkg:cargo/a@1?checksum=repository_url=", "a@1"), ("pkg:cargo/a@1?my_repository_url=h", "a@1"),
        ("evil/a@1", ""), ("x:y/a@1?z", ""), ("/a@1", ""), ("a@1", ""), ("", ""), ("pkg:", ""),
        ("pkg:/a@1", ""), (" pkg:cargo/a@1", ""), ("PKG:cargo/a@1", ""), ("?/a@1", ""), ("pkg:cargo?/a@1", "")])
    def test_package_of(self, uri: str, package: str) -> None:
        assert confbuild.package_of(uri) == package

    @pytest.mark.parametrize("size", [40, 64])
    def test_objects_of_both_kinds_of_repository(self, size: int) -> None:
        """SHA-1 and SHA-256, in the schema, the Merkle root, and what the caller wants of it."""
        source = {"digest": {"gitCommit": "34" * (size // 2), "gitTree": "56" * (size // 2)}, "uri": ""}
        files = bundle(statement(**{DEFINITION + "externalParameters__source": source}))
        wanted = confbuild.Expectations(nonce=NONCE, source_commit="34" * (size // 2), source_tree="56" * (size // 2))
        assert verdict_over(files, wanted).verdict == "simulated"
        for other in (wanted._replace(source_commit="34" * 32 if size == 40 else "34" * 20), wanted._replace(source_tree="56" * 20 + "5" * (size - 40) + "6" * (size == 40))):
            assert verdict_over(files, other).verdict == "failed"

    def test_canonical_form(self) -> None:
        assert confbuild.to_canonical({"b": ["\u00e9"], "a": {}}) == '{\n  "b": [\n    "\u00e9"\n  ],\n  "a": {}\n}'.encode()

# endregion 11
# ==============================================================================
# region 12. Verdict
# ==============================================================================


GOOD_BUNDLE = bundle()
ATTESTED = attested()
DEMO_SHA256 = hashlib.sha256(b"artifact").hexdigest()
REPORT = confbuild.simulated_report(confbuild.report_data(provenance_of(GOOD_BUNDLE), NONCE), confbuild.simulated_measurement())


def evidence(report: bytes | str | None = REPORT, extra: Mapping[str, Any] | None = None, **changes: Any) -> confbuild.BundleFiles:
    """The good bundle with evidence of another report or other keys."""
    text = base64.b64encode(report).decode() if isinstance(report, bytes) else report
    inner = {"version": 1, "notice": "n", "attestation_report": text, **changes}
    return GOOD_BUNDLE._replace(evidence=json.dumps({"platform": "simulated", "evidence": inner, **(extra or {})}).encode())


def report_with(offset: int, data: bytes) -> confbuild.BundleFiles:
    return evidence(REPORT[:offset] + data + REPORT[offset + len(data):])


def named(*names: str) -> confbuild.BundleFiles:
    """A bundle whose subjects have these names, all there."""
    made = bundle(statement(subject=[{"digest": {"sha256": DEMO_SHA256}, "name": name} for name in names]))
    return made._replace(artifacts=dict.fromkeys(names, DEMO_SHA256))


DOC = statement()
COMPLETE = statement(**{DEFINITION + "externalParameters__source": {"digest": {"gitCommit": "34" * 20, "gitTree": "12" * 20}, "uri": "https://a/b"},
                        DEFINITION + "resolvedDependencies": [dependency("x", "pkg:cargo/x@1?y"), dependency("y", "pkg:cargo/y@2")]})
COMPLETE["predicate"]["runDetails"]["byproducts"].append({"digest": {"sha256": "56" * 32}, "name": "build_log"})
ENCODED = base64.b64encode(REPORT).decode()  # 1184 = 3 * 394 + 2 bytes: ends with one "=" after two spare bits
OPTIONAL = {"nonce": "nonce", "measurements": "measurement", "min_tcb": "minimum TCB", "host_data": "host_data", "guest_svn": "guest_svn",
            "chip_id": "chip_id", "family_id": "family_id", "image_id": "image_id", "source_uri": "source uri", "source_commit": "source commit",
            "source_tree": "source tree", "lockfile_sha256": "lock file", "dependencies": "dependencies", "packages": "packages",
            "builder_id": "builder id", "build_type": "build type", "build_log_sha256": "build log", "finished": "age"}
# Of the provenance, then of the simulated report; the hardware's come with the class about it.
RIGHT_OF_STATEMENT: dict[str, Any] = {
    "nonce": NONCE.upper(), "source_uri": "https://a/b", "source_commit": "34" * 20, "source_tree": "12" * 20, "lockfile_sha256": "ab" * 32,
    "dependencies": ["pkg:cargo/x@1?y", "pkg:cargo/y@2"], "packages": ["y@2", "x@1", "pkg:cargo/x@1?y"], "builder_id": confbuild.SIMULATED_BUILDER,
    "build_type": confbuild.BUILD_TYPE, "build_log_sha256": "56" * 32, "finished": ("2026-11-23T00:00:01Z", "2026-11-23T00:00:01Z")}
RIGHT = {**RIGHT_OF_STATEMENT, "measurements": ["00" * 48, confbuild.simulated_measurement().hex().upper()], "min_tcb": {"snp": 0},
         "host_data": "00" * 32, "guest_svn": 0, "chip_id": "00" * 64, "family_id": "00" * 16, "image_id": "00" * 16}
WRONG_OF_STATEMENT: dict[str, Sequence[Any]] = {
    "nonce": ["ff" * 16, ""], "source_uri": ["https://a/b/", ""], "source_commit": ["34" * 19, ""], "source_tree": [""], "lockfile_sha256": ["00" * 32],
    "dependencies": [[], ["pkg:cargo/x@1?y"], ["pkg:cargo/y@2", "pkg:cargo/x@1?y"]], "packages": [["x@2"], ["x@1", "x"], ["y"], ["y@2 is missing"]],
    "builder_id": ["urn:confbuild:builder:sev-snp:v1", ""], "build_type": ["https://lunal.dev/kettle/cargo@v1", ""],
    "build_log_sha256": ["00" * 32, "None"],
    "finished": [("2026-11-23T00:00:02Z", "2027-01-01T00:00:00Z"), ("2026-01-01T00:00:00Z", "2026-11-23T00:00:00Z")]}
WRONG = {**WRONG_OF_STATEMENT, "measurements": [["00" * 48], ["", "00"]], "min_tcb": [{"snp": 1}, {"fmc": 0}, {"snp": 0, "x": 0}],
         "host_data": ["01" + "00" * 31, ""], "guest_svn": [1], "chip_id": ["01" + "00" * 63], "family_id": ["00" * 15], "image_id": ["00" * 17]}
Tampering = tuple[str, confbuild.BundleFiles, confbuild.Expectations, set[str]]
ANY = confbuild.Expectations(nonce=NONCE)
HARDWARE = confbuild.Expectations(nonce=NONCE, require_tee=True)
TAMPERINGS: list[Tampering] = [
    ("nonce", bundle(nonce="ff" * 16), ANY, {"nonce"}),
    ("zero nonce", bundle(nonce="00" * 16), confbuild.Expectations(nonce="00" * 16), {"nonce is not zero"}),
    ("report data tail, first byte", report_with(0x80, b"\1"), ANY, {"report data tail"}),
    ("report data tail, last byte", report_with(0x8F, b"\1"), ANY, {"report data tail"}),
    ("provenance byte", GOOD_BUNDLE._replace(provenance=provenance_of(GOOD_BUNDLE).replace(b"--release", b"--releasf")), ANY, {"provenance digest"}),
    ("report data", report_with(0x50, b"\0"), ANY, {"provenance digest"}),
    ("reordered keys", bundle({key: DOC[key] for key in sorted(DOC, reverse=True)}), ANY, {"provenance schema"}),
    ("extra key", bundle({**DOC, "extra": 1}), ANY, {"provenance schema"}),
    ("compact", bundle(provenance=json.dumps(DOC, separators=(",", ":")).encode()), ANY, {"canonical form"}),
    ("another indentation", bundle(provenance=json.dumps(DOC, indent=4).encode()), ANY, {"canonical form"}),
    ("final newline", bundle(provenance=provenance_of(GOOD_BUNDLE) + b"\n"), ANY, {"canonical form"}),
    ("CRLF", bundle(provenance=provenance_of(GOOD_BUNDLE).replace(b"\n", b"\r\n")), ANY, {"canonical form"}),
    ("escaped character", bundle(provenance=provenance_of(GOOD_BUNDLE).replace(b"demo", b"dem\\u006f")), ANY, {"canonical form"}),
    ("no provenance", GOOD_BUNDLE._replace(provenance=None), ANY, {"provenance form"}),
    ("not JSON", bundle(provenance=b"{"), ANY, {"provenance form"}), ("nested", bundle(provenance=b"[" * 100 + b"]" * 100), ANY, {"provenance form"}),
    ("two names", bundle(provenance=b'{"a":1,"a":1}'), ANY, {"provenance form"}), ("null", bundle(provenance=b"null"), ANY, {"provenance schema"}),
    ("a package without a name, beside a fork", bundle(statement(**{DEFINITION + "resolvedDependencies": [dependency("x", "pkg:cargo/x@1?vcs_url=git+https://h/x@12")]})),
     confbuild.Expectations(packages=[""]), {"packages"}),
    ("a package of another registry", bundle(statement(**{DEFINITION + "resolvedDependencies": [dependency("x", "pkg:cargo/x@1?checksum=sha256:00&repository_url=https://h")]})),
     confbuild.Expectations(packages=["x@1"]), {"packages"}),
    ("extra file", GOOD_BUNDLE._replace(artifacts={**GOOD_BUNDLE.artifacts, "extra": DEMO_SHA256}), ANY, {"unlisted files"}),
    *[(f"extra file called {name}", GOOD_BUNDLE._replace(artifacts={**GOOD_BUNDLE.artifacts, name: DEMO_SHA256}), ANY, {"unlisted files"})
      for name in ("none", "", "missing")],  # the first is what the check expects, in words
    ("extra file in other letters", GOOD_BUNDLE._replace(artifacts={**GOOD_BUNDLE.artifacts, "Demo": DEMO_SHA256}), ANY, {"unlisted files"}),
    ("missing artifact", GOOD_BUNDLE._replace(artifacts={}), ANY, {"artifact demo", "artifacts"}),
    ("changed artifact", GOOD_BUNDLE._replace(artifacts={"demo": "0" * 64}), ANY, {"artifact demo", "artifacts"}),
    ("digest in capitals", GOOD_BUNDLE._replace(artifacts={"demo": DEMO_SHA256.upper()}), ANY, {"artifact demo", "artifacts"}),
    ("linked artifact", GOOD_BUNDLE._replace(artifacts={"demo": "no regular file"}), ANY, {"artifact demo", "artifacts"}),
    ("renamed artifact", GOOD_BUNDLE._replace(artifacts={"Demo": DEMO_SHA256}), ANY, {"artifact demo", "artifacts", "unlisted files"}),
    ("duplicate subject", named("demo", "demo"), ANY, {"subjects"}), ("no subject", named(), ANY, {"subjects", "artifacts"}),
    *[(f"subject {name!r:.20}", named("demo", name), ANY, {"subjects"}) for name in ("../demo", "a/b", "/demo", "demo/", ".", "..", "a\\b",
                                                                                     "x" * 256)],
    ("subject with a control character", named("demo\n"), ANY, {"provenance schema"}),
    ("subject without a name", named(""), ANY, {"provenance schema"}),
    ("Merkle root", bundle(statement(predicate__runDetails__byproducts=[{"digest": LOCKED, "name": "input_merkle_root"}])), ANY,
     {"input Merkle root"}),
    ("no Merkle root", bundle(statement(predicate__runDetails__byproducts=[{"digest": LOCKED, "name": "other"}])), ANY, {"input Merkle root"}),
    *[(f"builder {name}", bundle(statement(predicate__runDetails__builder__id=name)), ANY, {"builder"}) for name in (confbuild.SNP_BUILDER, HARDWARE_BUILDER)],
    ("signature, first byte", report_with(0x2A0, b"\1"), ANY, {"simulated report"}),
    ("signature, last byte", report_with(1183, b"\1"), ANY, {"simulated report"}),
    ("chip_id, first byte", report_with(0x1A0, b"\1"), ANY, {"simulated report"}),
    ("chip_id, last byte", report_with(0x1DF, b"\1"), ANY, {"simulated report"}),
    ("report version 2", report_with(0, b"\2"), ANY, {"simulated report"}), ("report version 5", report_with(0, b"\5"), ANY, {"simulated report"}),
    ("short report", evidence(REPORT[:-1]), ANY, {"report form"}), ("long report", evidence(REPORT + b"\0"), ANY, {"report form"}),
    ("no report", evidence(b""), ANY, {"report form"}),
    ("spare bits of base64", evidence(ENCODED[:-2] + "B="), ANY, {"report form"}),
    ("no padding", evidence(ENCODED.rstrip("=")), ANY, {"report form"}),
    ("base64 with a newline", evidence(ENCODED + "\n"), ANY, {"report form"}), ("base64 with a blank", evidence(" " + ENCODED), ANY, {"report form"}),
    ("base64 twice", evidence(ENCODED + ENCODED), ANY, {"report form"}), ("not ASCII", evidence("\u00e9" + ENCODED[1:]), ANY, {"report form"}),
    ("URL-safe base64", evidence("-" + ENCODED[1:]), ANY, {"report form"}), ("null report", evidence(None), ANY, {"report form"}),
    ("notice", evidence(notice=1), ANY, {"report form"}),
    ("evidence version 2", evidence(version=2), ANY, {"report form"}), ("evidence version true", evidence(version=True), ANY, {"report form"}),
    ("evidence version 1.0", evidence(version=1.0), ANY, {"report form"}), ("extra key of evidence", evidence(more=1), ANY, {"report form"}),
    ("evidence list", evidence(extra={"evidence": []}), ANY, {"report form"}),
    *[(f"platform {name}", evidence(extra={"platform": name}), ANY, {"report form"}) for name in ("snp", "gcp-snp", "az-snp")],
    *[(f"platform {name}", evidence(extra={"platform": name}), ANY, {"platform"}) for name in ("tdx", "gcp-tdx", "az-tdx", "dstack", "snp ", "SNP", "")],
    ("platform object", evidence(extra={"platform": {"simulated": 1}}), ANY, {"platform"}),
    ("no evidence", GOOD_BUNDLE._replace(evidence=b'{"platform":"simulated"}'), ANY, {"platform"}),
    ("evidence is a list", GOOD_BUNDLE._replace(evidence=b"[]"), ANY, {"platform"}),
    ("evidence is not JSON", GOOD_BUNDLE._replace(evidence=b"\xff"), ANY, {"evidence form"}),
    ("evidence twice", GOOD_BUNDLE._replace(evidence=b'{"platform":"snp",' + GOOD_BUNDLE.evidence[1:]), ANY, {"evidence form"}),
    ("require_tee", GOOD_BUNDLE, confbuild.Expectations(nonce=NONCE, require_tee=True), {"hardware evidence"}),
    ("require_tee of an unknown platform", evidence(extra={"platform": "snq"}), confbuild.Expectations(require_tee=True),
     {"platform", "hardware evidence"}),
    *[(f"{key} of evidence alone", GOOD_BUNDLE, confbuild.Expectations(evidence_only=True, **{key: value}), {"required checks"})
      for key, value in [*((key, RIGHT[key]) for key in RIGHT_OF_STATEMENT if key != "nonce"), ("builder_id", ""), ("build_type", ""), ("source_uri", ""), ("dependencies", [])]],
    ("evidence alone, unasked", GOOD_BUNDLE._replace(provenance=None, artifacts={}), ANY, {"provenance form"}),
    ("age of a build that never finished", bundle(statement(predicate__runDetails__metadata__finishedOn=None)),
     confbuild.Expectations(finished=("0000-00-00T00:00:00Z", "9999-99-99T99:99:99Z")), {"age"}),
    ("require_crl", GOOD_BUNDLE, confbuild.Expectations(require_crl=True), {"required checks"}),
    *[(f"expected {key} {i}", bundle(COMPLETE), confbuild.Expectations(**{key: value}), {OPTIONAL[key]}) for key, values in WRONG.items() for i,
      value in enumerate(values)]]


def reports_are_equal_where_it_counts(doc: Any) -> bool:
    """Whether evidence still says the same: all but its notice."""
    good = json.loads(GOOD_BUNDLE.evidence)
    if isinstance(doc, dict) and isinstance(doc.get("evidence"), dict) and isinstance(doc["evidence"].get("notice"), str):
        good["evidence"]["notice"] = doc["evidence"]["notice"]
    return bool(doc == good and type(doc["evidence"]["version"]) is int)


UNASKED = {"revocation", "revocation list age", "PCR values", *confbuild.OF_IMAGE}


def failed_checks(verdict: confbuild.Verdict) -> set[str]:
    """The names of those that failed."""
    return {check.name for check in verdict.checks if check.status == "failed"}


def shown(platform: str) -> frozenset[str]:
    """What every verdict over a bundle shows, whatever fails."""
    known = confbuild.REQUIRED_OF_PLATFORM.get(platform, frozenset(("evidence form", "platform", "report form")))
    return known | confbuild.REQUIRED_OF_BUNDLE | {*OPTIONAL.values(), *UNASKED}


class TestVerdict:
    def test_a_good_bundle_is_simulated_and_never_passed(self) -> None:
        requested = {**OPTIONAL, "pcrs": "PCR values", "require_tee": "hardware evidence"}
        assert {**{field: (name,) for field, name in requested.items()}, "image": confbuild.OF_IMAGE,
                "require_crl": ("revocation", "revocation list age")} == confbuild.REQUESTED
        verdict = verdict_over(bundle(COMPLETE), confbuild.Expectations(**RIGHT))
        assert (verdict.verdict, verdict.platform) == ("simulated", "simulated")
        assert {check.name for check in verdict.checks if check.status != "passed"} == UNASKED
        assert shown("simulated") <= {check.name for check in verdict.checks}
        signed = hashlib.sha256(provenance_of(bundle(COMPLETE))).hexdigest() + NONCE + "00" * 16
        wanted = {
            "report_data": signed, "signed_data": signed, "measurement": hashlib.sha384(FILE.read_bytes()).hexdigest(), "nonce": NONCE, "product": "",
            "chip_id": "00" * 64, "tcb": "00" * 8, "current_version": "0.0.0", "policy": "0x0", "debug": False, "vmpl": 0, "report_version": 3,
            "key_type": "vcek", "builder_id": confbuild.SIMULATED_BUILDER, "build_type": confbuild.BUILD_TYPE, "finished_on": "2026-11-23T00:00:01.000000+00:00",
            "provenance_sha256": signed[:64], "source": {"digest": {"gitCommit": "34" * 20, "gitTree": "12" * 20}, "uri": "https://a/b"}}
        assert {name: verdict.claims[name] for name in wanted} == wanted

    def test_what_nobody_asks_for_is_shown_as_not_checked(self) -> None:
        verdict = verdict_over(bundle(COMPLETE), confbuild.Expectations())
        assert verdict.verdict == "simulated"
        assert {check.name for check in verdict.checks if check.status == "not checked"} == {*OPTIONAL.values(), *UNASKED}
        assert next(check for check in verdict.checks if check.name == "nonce") == confbuild.Check("nonce", "not checked", "", NONCE,
                                                                                                   "no expectation given")

    def test_further_names_beside_the_evidence_are_ignored(self) -> None:
        assert verdict_over(evidence(extra={"more": {"platform": "snp"}}), ANY).verdict == "simulated"

    @pytest.mark.parametrize("key", OPTIONAL)
    def test_each_expectation_alone(self, key: str) -> None:
        verdict = verdict_over(bundle(COMPLETE), confbuild.Expectations(**{key: RIGHT[key]}))
        assert (verdict.verdict, status_of(verdict, OPTIONAL[key])) == ("simulated", "passed")

    @pytest.mark.parametrize(("files", "expected", "failed"), [row[1:] for row in TAMPERINGS], ids=[row[0] for row in TAMPERINGS])
    def test_tampering_fails_the_check_that_is_about_it(self, files: confbuild.BundleFiles, expected: confbuild.Expectations,
                                                        failed: set[str]) -> None:
        verdict = verdict_over(files, expected)
        assert (verdict.verdict, failed_checks(verdict)) == ("failed", failed)
        assert all(check.expected != check.actual or check.detail for check in verdict.checks if check.status == "failed")
        assert shown(verdict.platform) <= {check.name for check in verdict.checks}

    @pytest.mark.parametrize(("files", "name", "detail"), [
        (evidence(more=1), "report form", "simulated evidence: not an object of version, notice, attestation_report"),
        (evidence(version=2), "report form", "version is not 1"),
        (evidence(notice=1), "report form", "simulated evidence: notice is no text"),
        (evidence("=" + ENCODED[1:]), "report form", "simulated evidence, attestation_report: not base64 text"),
        (evidence("\u00e9"), "report form", "attestation_report: not base64 text"),
        (evidence(ENCODED[:-2] + "B="), "report form", "attestation_report: not canonical base64"),
        (evidence(REPORT[1:]), "report form", "attestation_report: 1183 bytes, not 1184"),
        (GOOD_BUNDLE._replace(evidence=b"{"), "evidence form", "evidence: not JSON"),
        (evidence(version=2), "simulated report", "it needs a check that failed"),
        (bundle(provenance=b"{"), "artifacts", "it needs a check that failed"),
        (evidence(extra={"platform": "tdx"}), "platform", "this evidence is known and not supported by this version"),
        (evidence(extra={"platform": "snq"}), "platform", "no such evidence is known"),
        (GOOD_BUNDLE._replace(provenance=None), "provenance form", "--evidence-only verifies evidence without it"),
        (GOOD_BUNDLE._replace(provenance=None, artifacts={}), "artifacts", "it needs a check that failed"),
        (bundle(provenance=b"{"), "provenance form", "provenance: not JSON"),
        (bundle(provenance=b"[" * 17 + b"]" * 17), "provenance form", "nested deeper than 16")])
    def test_reasons(self, files: confbuild.BundleFiles, name: str, detail: str) -> None:
        assert detail in next(check for check in verdict_over(files, ANY).checks if check.name == name).detail

    def test_every_required_check_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The verdict is a set inclusion: a required name that nothing has made fails it."""
        assert verdict_over(GOOD_BUNDLE, ANY).verdict == "simulated"
        for table, changed in (("REQUIRED_OF_BUNDLE", confbuild.REQUIRED_OF_BUNDLE | {"another"}), ("REQUIRED_OF_PLATFORM", {"simulated": frozenset({"another"})})):
            with monkeypatch.context() as patch:
                patch.setattr(confbuild, table, changed)
                verdict = verdict_over(GOOD_BUNDLE, ANY)
                assert (verdict.verdict, failed_checks(verdict)) == ("failed", {"required checks"}) and "another" in verdict.checks[-1].actual

    def test_each_check_compares_two_values(self) -> None:
        """No check is given one value twice, nor words of its own as both: a file called `none` would then be as expected."""
        class_ = next(node for node in ast.parse(FILE.read_text("utf-8")).body if isinstance(node, ast.ClassDef) and node.name == "_Checks")
        calls = [node for top in ast.parse(FILE.read_text("utf-8")).body if top.lineno > class_.lineno for node in ast.walk(top)
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("compare", "expect", "derive")]
        assert len(calls) > 20
        for call in calls:
            if len(call.args) == 3:
                parts = [{ast.dump(inner) for inner in ast.walk(side)} for side in call.args[1:]]
                assert ast.dump(call.args[1]) not in parts[1], f"line {call.lineno}: the actual value is made of the expected one"
                assert ast.dump(call.args[2]) not in parts[0], f"line {call.lineno}: the expected value is made of the actual one"
                assert not isinstance(call.args[1], ast.Constant) or not isinstance(call.args[1].value, str), f"line {call.lineno}: words are compared"

    @pytest.mark.parametrize(("field", "value"), [("measurements", []), ("packages", []), ("dependencies", []), ("source_uri", ""), ("guest_svn", 1)])
    def test_an_empty_expectation_is_one(self, field: str, value: Any) -> None:
        """An empty list of measurements is met by none; no packages are all there."""
        verdict = verdict_over(bundle(COMPLETE), confbuild.Expectations(**{field: value}))
        assert (verdict.verdict, status_of(verdict, OPTIONAL[field])) == (("simulated", "passed") if field == "packages" else ("failed", "failed"))

    EXPECTED = confbuild.Expectations(nonce=NONCE, measurements=[confbuild.simulated_measurement().hex()])

    def check_change(self, files: confbuild.BundleFiles) -> None:
        """Not one bit of the provenance may change. Of the evidence: blanks between its tokens and the text of its notice."""
        verdict = verdict_over(files, self.EXPECTED)
        try:
            same = files.provenance == GOOD_BUNDLE.provenance and reports_are_equal_where_it_counts(json.loads(files.evidence.decode()))
        except ValueError:
            same = False
        assert verdict.verdict == ("simulated" if same else "failed")

    def test_flipped_bits(self) -> None:
        for i, byte in list(enumerate(provenance_of(GOOD_BUNDLE)))[::19]:
            self.check_change(GOOD_BUNDLE._replace(provenance=provenance_of(GOOD_BUNDLE)[:i] + bytes([byte ^ 1 << i % 8]) + provenance_of(GOOD_BUNDLE)[i + 1:]))
        for i, byte in list(enumerate(GOOD_BUNDLE.evidence))[::5]:
            self.check_change(GOOD_BUNDLE._replace(evidence=GOOD_BUNDLE.evidence[:i] + bytes([byte ^ 1 << i % 8]) + GOOD_BUNDLE.evidence[i + 1:]))

    @settings(max_examples=200)
    @given(part=st.sampled_from(["provenance", "evidence"]), where=st.floats(0, 1, exclude_max=True), old=st.integers(0, 3),
           new=st.binary(max_size=3) | st.sampled_from([b" ", b"\n", b"\\"]))
    def test_other_bytes_anywhere(self, part: str, where: float, old: int, new: bytes) -> None:
        data: bytes = getattr(GOOD_BUNDLE, part)
        i = math.floor(where * len(data))
        changes: dict[str, Any] = {part: data[:i] + new + data[i + old:]}
        self.check_change(GOOD_BUNDLE._replace(**changes))

    def test_every_proper_prefix_fails(self) -> None:
        for part in ("provenance", "evidence"):
            data: bytes = getattr(GOOD_BUNDLE, part)
            some = {*range(0, len(data), 9), *range(len(data) - 20, len(data))}
            cut: list[dict[str, Any]] = [{part: data[:n]} for n in some]
            assert {verdict_over(GOOD_BUNDLE._replace(**changes), ANY).verdict for changes in cut} == {"failed"}

    @given(st.binary(max_size=60), st.binary(max_size=60), st.dictionaries(st.text(st.characters(), max_size=6), st.text(max_size=6), max_size=3))
    def test_arbitrary_bytes_fail_and_never_raise(self, provenance: bytes, other: bytes, artifacts: dict[str, str]) -> None:
        for files in (confbuild.BundleFiles(provenance, other, artifacts), GOOD_BUNDLE._replace(artifacts={**GOOD_BUNDLE.artifacts, "\udcff": "", **artifacts})):
            wire = verdict_over(files, confbuild.Expectations(nonce=NONCE, require_tee=True)).to_wire()
            assert wire["verdict"] == "failed" and json.loads(confbuild.compact_json(wire))["verdict"] == "failed"

    @given(doc=st.sampled_from([FULL, COMPLETE, json.loads(GOOD_BUNDLE.evidence)]), where=st.integers(0, 10 ** 6), value=JSON_VALUES)
    def test_any_value_at_any_place_never_raises(self, doc: Any, where: int, value: Any) -> None:
        """The provenance is signed again, so that what remains is the shape."""
        paths = list(nodes(doc))
        data = confbuild.to_canonical(replaced(doc, paths[where % len(paths)], value))
        verdict = verdict_over(GOOD_BUNDLE._replace(evidence=data) if "platform" in doc else bundle(provenance=data), confbuild.Expectations())
        assert verdict.verdict in ("failed", "simulated") and (verdict.verdict == "failed") == any(check.status == "failed"
                                                                                                   for check in verdict.checks)

    @pytest.mark.parametrize("data", [
        confbuild.compact_json(statement(subject=[{"digest": LOCKED, "name": str(i % 30_000)} for i in range(38_000)])).encode(),
        confbuild.compact_json({str(i): 0 for i in range(100_000)}).encode(), b"[" * 126 + b"1," * 1_900_000 + b"1" + b"]" * 126],
        ids=["many subjects", "many names", "wide and deep"])
    def test_hostile_provenance_takes_bounded_time(self, data: bytes) -> None:
        files = bundle(provenance=data)
        with within(20):
            verdict = verdict_over(files, ANY)
        assert verdict.verdict == "failed" and max(len(check.name) for check in verdict.checks) < 300

    def test_the_cut_verifier_stands_alone(self) -> None:
        """The file up to `End of the verifier`, without this process's modules, under -O as well, says the same of every tampering, and of hardware."""
        def text(data: bytes | None) -> str | None:
            return None if data is None else b64(data)

        rows = [(files, wanted, False) for _, files, wanted, _ in TAMPERINGS] + [(bundle(COMPLETE), confbuild.Expectations(**RIGHT), False)]
        rows += [(files, HARDWARE, True) for files in (snp_bundle(), azure_bundle(), snp_bundle(vek=vek_of(product="Genoa")), azure_bundle(signature=bytes(256)))]
        cases = [[text(files.provenance), b64(files.evidence), dict(files.artifacts), expected._asdict(), toy] for files, expected, toy in rows]
        script = ("import sys, json, base64\ncases, cas = json.load(sys.stdin)\n"
                  "with open(sys.argv[1], encoding='utf-8') as f: text = f.read()\n"
                  "head, cut, _ = text.partition('\\n# ---- End of the verifier.')\nif not cut: sys.exit('no cut')\n"
                  "space = {'__name__': 'verifier'}\nexec(compile(head, 'verifier', 'exec'), space)\nun = base64.b64decode\n"
                  "toy = {'Milan': space['make_anchors']('Milan', *map(un, cas))}\nprint(json.dumps(["
                  "space['verify_bundle'](space['BundleFiles'](p and un(p), un(e), a), space['Expectations'](**x), sys.argv[2],"
                  " space['Endorsements'](toy if t else None)).to_wire() for p, e, a, x, t in cases]))")
        expected = [verdict_over(files, wanted, anchors=TOY_ANCHORS if toy else None).to_wire() for files, wanted, toy in rows]
        assert [wire["verdict"] for wire in expected[-5:]] == ["simulated", "passed", "passed", "failed", "failed"]
        for options in (["-I", "-W", "error"], ["-I", "-S", "-O", "-W", "error"]):
            done = subprocess.run([sys.executable, *options, "-c", script, str(FILE), NOW], capture_output=True, text=True, timeout=PATIENCE, check=True,
                                  input=json.dumps([cases, [b64(TOY_CAS[role]) for role in ("ark", "ask", "asvk")]]))
            assert json.loads(done.stdout) == json.loads(json.dumps(expected)) and done.stderr == ""

    def test_the_verifier_uses_no_impure_name(self) -> None:
        """Sections 1 to 12 use their own names, six modules without effects, and builtins that neither open, print, import nor run."""
        head, _, part = FILE.read_text("utf-8").partition("\n# region 1. ")
        tree = ast.parse("# " + part.partition("\n# ---- End of the verifier.")[0])
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
        pure = {alias.asname or alias.name for node in ast.parse("#" + head.partition("# Part I and II")[2].partition("# Part III")[0]).body
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names} - {"IO", "TYPE_CHECKING"}
        assert {"base64", "hashlib", "json", "re"} <= pure and not pure & {"os", "sys", "time", "random", "secrets", "socket", "subprocess",
                                                                           "threading", "io"}
        pure |= {"lzma"}  # bytes in, bytes out; it comes when a firmware is looked into
        builtin = {"ConfbuildError", "Exception", "ImportError", "KeyError", "TypeError", "UnicodeDecodeError", "UnicodeEncodeError", "ValueError", "abs", "all",
                   "any", "bool", "bytearray", "bytes", "dict", "enumerate", "filter", "float", "frozenset", "getattr", "int", "isinstance", "iter", "len", "list", "map", "max", "min", "next",
                   "pow", "property", "range", "reversed", "set", "sorted", "str",
                   "sum", "super", "tuple", "type", "zip"}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert used - own - pure - builtin == set()
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.Global | ast.Await)]

    def test_no_assert_that_dash_o_would_drop(self) -> None:
        assert [node.lineno for node in ast.walk(ast.parse(FILE.read_text("utf-8"))) if isinstance(node, ast.Assert)] == []


def toy_anchors(product: str, **roles: dict[str, Any]) -> confbuild.Anchors:
    """The toy hierarchy under the names of another product. roles: what is changed of an anchor."""
    return {product: {role: anchor._replace(**{"name": confbuild.amd_name(f"{prefix}-{product}"), **roles.get(role, {})}) for (role, anchor), prefix in zip(
        TOY_ANCHORS["Milan"].items(), ("ARK", "SEV", "SEV-VLEK"), strict=True)}}


TURIN_TCB = {"fmc": 1, "bootloader": 3, "tee": 2, "snp": 5, "microcode": 97}
TURIN: dict[str, Any] = {"cpuid_fam_id": 0x1A, "cpuid_mod_id": 2, "chip_id": CHIP_ID[8:16], "reported_tcb": bytes((1, 3, 2, 5, 0, 0, 0, 97))}
TURIN_VEK: dict[str, Any] = {"tcb": TURIN_TCB, "hwid": CHIP_ID[8:16], "product": "Turin", "issuer": "SEV-Turin"}
VLEK: dict[str, Any] = {"flags": 1 << 2, "chip_id": bytes(64)}
MADE: dict[str, bytes] = {}  # what the toy keys have signed: signing is what takes time here


def made(make: Callable[..., bytes], **changes: Any) -> bytes:
    """What make signs, made once."""
    key = f"{make.__name__} {changes}"
    if key not in MADE:
        MADE[key] = make(**changes)
    return MADE[key]


def snp(report: Mapping[str, Any] | None = None, vek: Mapping[str, Any] | bytes | None = None, platform: str = "snp", doc: Any = None) -> confbuild.BundleFiles:
    """A bundle of doc with evidence of the toy hierarchy. report: changes of the report; vek: changes of the certificate, or the one that is there."""
    data = provenance_of(ATTESTED) if doc is None else confbuild.to_canonical(doc)
    signed = made(snp_report, **{**({} if doc is None else {"report_data": confbuild.report_data(data, NONCE)}), **(report or {})})
    return snp_bundle(signed, vek if isinstance(vek, bytes) else made(vek_of, **(vek or {})), platform, provenance=data)


def vlek(report: Mapping[str, Any] | None = None, **vek: Any) -> confbuild.BundleFiles:
    return snp({**VLEK, **(report or {})}, {"kind": "VLEK", "product": "Milan", **vek})


def turin(report: Mapping[str, Any] | None = None, **vek: Any) -> confbuild.BundleFiles:
    return snp({**TURIN, **(report or {})}, {**TURIN_VEK, **vek})


def tail(offset: int) -> bytes:
    """The good report with a byte that nobody has signed."""
    report = bytearray(made(snp_report))
    report[offset] = 1
    return bytes(report)


def edited(files: confbuild.BundleFiles, *path: Any, new: Any = None, drop: bool = False) -> confbuild.BundleFiles:
    """files with another node in its evidence."""
    doc = json.loads(files.evidence)
    if drop:
        del at(doc, path[:-1])[path[-1]]
    return files._replace(evidence=json.dumps(doc if drop else replaced(doc, path, new)).encode())


def azure(**changes: Any) -> confbuild.BundleFiles:
    if not changes and "azure" not in MADE:
        MADE["azure"] = azure(vek=made(vek_of)).evidence
    return ATTESTED._replace(evidence=MADE["azure"]) if not changes else azure_bundle(**{
        "report": made(snp_report, version=2, report_data=RUNTIME_DIGEST), "vek": made(vek_of), **changes})


def url_of(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


AZURE = azure_evidence()
HCL = confbuild.parse_hcl_report(base64.urlsafe_b64decode(AZURE["hcl_report"] + "=="))
RUNTIME_DIGEST, QUOTE = hashlib.sha256(HCL.runtime_data).digest(), bytes.fromhex(AZURE["tpm_quote"]["message"])
OTHER_RUNTIME = HCL.runtime_data.replace(url_of(TOY_AK.n.to_bytes(256, "big")).encode(), url_of(TOY_ASVK.n.to_bytes(256, "big")).encode())
CHAIN = ("evidence", "cert_chain")
NOT_YET, EXPIRED = ("2026-11-23T12:00:01Z", "2033-01-01T00:00:00Z"), ("2026-01-01T00:00:00Z", "2026-11-23T11:59:59Z")
KDS = f"https://kdsintf.amd.com/vcek/v1/Milan/{CHIP_ID.hex()}?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219"
KDS_TURIN = "https://kdsintf.amd.com/vcek/v1/Turin/08090a0b0c0d0e0f?fmcSPL=01&blSPL=03&teeSPL=02&snpSPL=05&ucodeSPL=97"
THREE = {**TOY_ANCHORS, **toy_anchors("Turin"), **toy_anchors("Genoa")}


def another_ca(role: str, valid: tuple[str, str]) -> dict[str, Any]:
    """Endorsements whose CA of that role has another validity."""
    return {"anchors": toy_anchors("Milan", **{role: {"not_before": valid[0], "not_after": valid[1]}})}


def of(**fields: Any) -> dict[str, Any]:
    return {"expected": confbuild.Expectations(**fields)}


# (name, what makes the bundle, the checks that fail, none = "passed"; beside: `expected`, endorsements, `detail` of the first failure).
Change = tuple[str, Callable[[], confbuild.BundleFiles], set[str], dict[str, Any]]
SIGNED_BY_NOBODY = {"VEK signature"}
CHANGES: list[Change] = [
    *[(name, make, set(), {}) for name, make in (
        ("snp", snp), ("gcp-snp", lambda: snp(platform="gcp-snp")), ("az-snp", azure), ("VLEK", vlek), ("Turin", turin),
        ("version 3", lambda: snp({"version": 3})), ("version 4", lambda: snp({"version": 4})),
        ("HWID in an OCTET STRING", lambda: snp(vek={"hwid": b"\x04\x40" + CHIP_ID})), ("product without a stepping", lambda: snp(vek={"product": "Milan"})),
        ("other bits of the flags", lambda: snp({"flags": 0xFFFFFFE3})), ("other bits of the policy", lambda: snp({"policy": 2 ** 64 - 1 - (1 << 19)})),
        ("no chain names but the vcek", lambda: edited(snp(), *CHAIN, new={"vcek": b64(made(vek_of))})),
        ("whatever ask and ark say", lambda: edited(snp(), *CHAIN, new={"vcek": b64(made(vek_of)), "ask": b64(TOY_CAS["asvk"]), "ark": [1]})),
        ("az-snp version 3", lambda: azure(report=made(snp_report, version=3, report_data=RUNTIME_DIGEST))),
        ("az-snp version 5", lambda: azure(report=made(snp_report, version=5, report_data=RUNTIME_DIGEST))),
        ("pcrs in capitals", lambda: edited(azure(), "evidence", "tpm_quote", "pcrs", 0, new=AZURE["tpm_quote"]["pcrs"][0].upper())),
        ("NUL after the runtime data", lambda: azure(hcl=hcl_of(made(snp_report, version=2, report_data=RUNTIME_DIGEST), HCL.runtime_data + b"\0"))))],
    ("the VEK is only just valid", lambda: snp(vek={"valid": (NOW, NOW)}), set(), {}),
    ("VEK of the command line", lambda: edited(snp(), *CHAIN), set(), {"vek": lambda: made(vek_of)}),
    ("VEK of the command line, no cert_chain", lambda: edited(snp(), *CHAIN, drop=True), set(), {"vek": lambda: made(vek_of)}),
    ("VEK of another chip on the command line", lambda: edited(snp(), *CHAIN), {"VEK chip_id"}, {"vek": lambda: made(vek_of, hwid=bytes(64))}),
    ("VEK of the command line never replaces", lambda: snp(vek={"hwid": bytes(64)}), {"VEK chip_id"}, {"vek": lambda: made(vek_of)}),
    ("no VEK", lambda: edited(snp(), *CHAIN), {"VEK form"}, {"detail": f"none was given (--vek); AMD has it at {KDS}"}),
    ("no VEK, Turin", lambda: edited(turin(), *CHAIN), {"VEK form"}, {"detail": f"AMD has it at {KDS_TURIN}"}),
    ("no VLEK", lambda: edited(vlek(), *CHAIN), {"VEK form"}, {"detail": "holds no certificate, and none was given (--vek)"}),
    ("no VEK, unknown product", lambda: edited(snp({"cpuid_fam_id": 0x1B}), *CHAIN), {"VEK form", "product"}, {"detail": "none was given (--vek)"}),
    ("version 2", lambda: snp({"version": 2}), {"report version"}, {}), ("version 6", lambda: snp({"version": 6}), {"report version"}, {}),
    ("version 0", lambda: snp({"version": 0}), {"report version"}, {}), ("version 2^24 + 5", lambda: snp({"version": 0x1000005}), {"report version"}, {}),
    ("signature algorithm 0", lambda: snp({"signature_algo": 0}), {"signature algorithm"}, {}),
    ("signature algorithm 2", lambda: snp({"signature_algo": 2}), {"signature algorithm"}, {}),
    ("flags of a VLEK", lambda: snp({"flags": 4}), {"signing key", "VEK issuer", "VEK signature", "VEK chip_id"}, {}),
    ("flags of no key", lambda: snp({"flags": 7 << 2}), {"signing key"}, {}), ("flags of key 2", lambda: snp({"flags": 2 << 2}), {"signing key"}, {}),
    ("flags of key 4", lambda: snp({"flags": 4 << 2}), {"signing key"}, {}),
    ("subject of key 7", lambda: snp({"flags": 7 << 2}, {"subject": "SEV-key 7"}), {"signing key"}, {}),
    ("subject of a VLEK", lambda: snp(vek={"subject": "SEV-VLEK"}), {"signing key"}, {}), ("subject in other letters", lambda: snp(vek={"subject": "SEV-Vcek"}), {"signing key"}, {}),
    ("VMPL 1", lambda: snp({"vmpl": 1}), {"VMPL"}, {}), ("VMPL 2^31", lambda: snp({"vmpl": 1 << 31}), {"VMPL"}, {}),
    ("debug", lambda: snp({"policy": 0xB0000}), {"debug"}, {"detail": "the host may read and change the guest's memory"}),
    ("debug allowed", lambda: snp({"policy": 0xB0000}), set(), of(allow_debug=True)),
    ("migration agent", lambda: snp({"policy": 0x70000, "report_id_ma": bytes(32)}), {"migration agent"}, {"detail": "another VM"}),
    ("migration allowed, no agent", lambda: snp({"policy": 0x70000}), set(), {}), ("agent without permission", lambda: snp({"report_id_ma": bytes(32)}), set(), {}),
    ("a register", azure, set(), of(pcrs={4: hashlib.sha256(b"\4").hexdigest().upper()})),
    ("another value of a register", azure, {"PCR values"}, of(pcrs={3: hashlib.sha256(b"\3").hexdigest(), 4: "00" * 32})),
    ("a register that is not quoted", lambda: azure(message=quote_of(b"", [bytes(32)] * 24, b"\1\0\0"), pcrs=[bytes(32)] * 24), {"PCR values", "provenance digest"}, of(pcrs={4: "00" * 32})),
    ("a register of no TPM", snp, {"required checks"}, of(pcrs={4: "00" * 32})),
    *[(f"unsigned byte {offset:#x}", lambda offset=offset: snp_bundle(tail(offset), made(vek_of)), {"unsigned bytes"}, {}) for offset in (0x330, 0x400, 1183)],
    *[(f"high byte of r or s at {offset:#x}", lambda offset=offset: snp_bundle(tail(offset), made(vek_of)), {"report signature"}, {})
      for offset in (0x2A0 + 48, 0x2A0 + 71, 0x2E8 + 48, 0x2E8 + 71)],
    ("r and s are 0", lambda: snp({"r": 0}), {"report signature"}, {}), ("r and s are 1", lambda: snp({"r": 1, "s": 1}), {"report signature"}, {}),
    ("signed by another key", lambda: snp({"key": OTHER_VEK}), {"report signature"}, {}), ("VEK of another key", lambda: snp(vek={"key": OTHER_VEK}), {"report signature"}, {}),
    ("VEK with an RSA key", lambda: snp(vek={"spki": TOY_AK.spki()}), {"report signature"}, {"detail": "the certificate's key is not on P-384"}),
    ("issuer of another name", lambda: snp(vek={"issuer": "SEV-Genoa"}), {"VEK issuer"}, {}),
    ("VCEK by the ASVK", lambda: snp(vek={"sign": TOY_ASVK.pss}), SIGNED_BY_NOBODY, {}), ("VCEK by the ARK", lambda: snp(vek={"sign": TOY_ARK.pss}), SIGNED_BY_NOBODY, {}),
    ("VCEK by the ASVK that says so", lambda: snp(vek={"issuer": "SEV-VLEK-Milan", "sign": TOY_ASVK.pss}), {"VEK issuer", "VEK signature"}, {}),
    ("VCEK by nobody", lambda: snp(vek={"sign": TOY_AK.pss}), SIGNED_BY_NOBODY, {}), ("VCEK by PKCS #1", lambda: snp(vek={"sign": TOY_ASK.pkcs1}), SIGNED_BY_NOBODY, {}),
    ("salt of 32 bytes", lambda: snp(vek={"sign": lambda tbs: TOY_ASK.pss(tbs, bytes(32))}), SIGNED_BY_NOBODY, {}),
    ("the ASK as VEK", lambda: snp(vek=TOY_CAS["ask"]), {"signing key", "VEK issuer", "VEK signature", "VEK product", "VEK TCB", "VEK chip_id", "report signature"}, {}),
    ("sha256WithRSA", lambda: snp(vek={"algorithm": seq(oid("1.2.840.113549.1.1.11"), b"\5\0")}), {"VEK form"}, {"detail": "not signed with RSASSA-PSS"}),
    ("VEK empty", lambda: snp(vek=b""), {"VEK form"}, {}), ("VEK with a tail", lambda: snp(vek=made(vek_of) + b"\0"), {"VEK form"}, {}),
    ("AMD's keys", snp, {"VEK signature"}, {"anchors": None}), ("no keys", snp, {"product"}, {"anchors": {}}), ("keys of Genoa", snp, {"product"}, {"anchors": toy_anchors("Genoa")}),
    ("keys of no known layout", lambda: azure(vek=made(vek_of, issuer="SEV-Naples")), {"product"}, {"anchors": toy_anchors("Naples")}),
    ("VEK expired", lambda: snp(vek={"valid": EXPIRED}), {"VEK validity"}, {}), ("VEK not yet valid", lambda: snp(vek={"valid": NOT_YET}), {"VEK validity"}, {}),
    *[(f"{role} {word}", snp, {"VEK validity"}, another_ca(role, valid)) for role in ("ark", "ask") for word, valid in (("expired", EXPIRED), ("not yet valid", NOT_YET))],
    ("asvk of no use here", snp, set(), another_ca("asvk", EXPIRED)), ("ask of no use here", vlek, set(), another_ca("ask", EXPIRED)),
    ("asvk expired", vlek, {"VEK validity"}, another_ca("asvk", EXPIRED)),
    *[(f"TCB {name} {step:+}", lambda name=name, step=step: snp(vek={"tcb": {**MILAN_TCB, name: MILAN_TCB[name] + step}}), {"VEK TCB"}, {})
      for name in MILAN_TCB for step in (1, 256, -1)],
    *[(f"TCB without {name}", lambda name=name: snp(vek={"tcb": {n: v for n, v in MILAN_TCB.items() if n != name}}), {"VEK TCB"}, {}) for name in MILAN_TCB],
    ("TCB of 20,000 bits", lambda: snp(vek=vek_of(tcb={**MILAN_TCB, "snp": 1 << 20_000})), {"VEK TCB"}, {"detail": "VEK snp SPL: "}),
    *[(f"reported_tcb byte {i}", lambda i=i: snp({"reported_tcb": bytes((4, 0, 0, 0, 0, 0, 24, 219))[:i] + b"\7" + bytes((4, 0, 0, 0, 0, 0, 24, 219))[i + 1:]}),
       {"VEK TCB"}, {}) for i in (0, 1, 6, 7)],
    *[(f"HWID {name}", lambda hwid=hwid: snp(vek={"hwid": hwid}), {"VEK chip_id"}, {}) for name, hwid in (
        ("other", CHIP_ID[:-1] + b"\0"), ("none", None), ("short", CHIP_ID[:-1]), ("long", CHIP_ID + b"\0"), ("8 bytes", CHIP_ID[:8]), ("empty", b""))],
    ("product Genoa", lambda: snp(vek={"product": "Genoa-B0"}), {"VEK product"}, {}), ("product in other letters", lambda: snp(vek={"product": "milan"}), {"VEK product"}, {}),
    ("CPUID of Genoa", lambda: snp({"cpuid_mod_id": 0x11}), {"product"}, {"anchors": TOY_ANCHORS}),
    ("CPUID of Genoa, trusted too", lambda: snp({"cpuid_mod_id": 0x11}), {"VEK issuer", "VEK product"}, {}),
    ("CPUID of nothing", lambda: snp({"cpuid_mod_id": 0x20}), {"product"}, {}), ("CPUID zero", lambda: snp({"cpuid_fam_id": 0, "cpuid_mod_id": 0}), {"product"}, {}),
    ("VLEK by the ASK", lambda: vlek(sign=TOY_ASK.pss), SIGNED_BY_NOBODY, {}), ("flags of a VCEK", lambda: vlek({"flags": 0}), {"signing key", "VEK issuer", "VEK signature", "VEK chip_id"}, {}),
    ("VLEK with a HWID", lambda: vlek(kind="VCEK", subject="SEV-VLEK", issuer="SEV-VLEK-Milan", sign=TOY_ASVK.pss), {"VEK chip_id"}, {}),
    ("VLEK of another TCB", lambda: vlek(tcb={**MILAN_TCB, "snp": 23}), {"VEK TCB"}, {}),
    ("Turin, fmc", lambda: turin(tcb={**TURIN_TCB, "fmc": 2}), {"VEK TCB"}, {}), ("Turin without fmc", lambda: turin(tcb=MILAN_TCB), {"VEK TCB"}, {}),
    ("Turin, chip_id has a tail", lambda: turin({"chip_id": CHIP_ID[8:16] + bytes(55) + b"\1"}), {"VEK chip_id"}, {}),
    ("Turin by Milan's name", lambda: turin(issuer="SEV-Milan"), {"VEK issuer"}, {}),
    ("report data", lambda: snp({"report_data": hashlib.sha256(b"").digest() + bytes.fromhex(NONCE)}), {"provenance digest"}, {}),
    ("report data, first byte of the tail", lambda: snp({"report_data": confbuild.report_data(provenance_of(ATTESTED), NONCE)[:48] + b"\1"}), {"report data tail"}, {}),
    ("report data, last byte", lambda: snp({"report_data": confbuild.report_data(provenance_of(ATTESTED), NONCE)[:63] + b"\1"}), {"report data tail"}, {}),
    ("provenance", lambda: snp()._replace(provenance=provenance_of(ATTESTED).replace(b"--release", b"--releasf")), {"provenance digest"}, {}),
    ("no provenance", lambda: snp()._replace(provenance=None), {"provenance form"}, {}), ("artifact", lambda: snp()._replace(artifacts={}), {"artifact demo", "artifacts"}, {}),
    ("report short", lambda: snp_bundle(made(snp_report)[:-1], made(vek_of)), {"report form"}, {"detail": "attestation_report: 1183 bytes, not 1184"}),
    ("chain without a vcek", lambda: edited(snp(), *CHAIN, new={"ask": None}), {"report form"}, {"detail": "cert_chain: not an object of vcek, perhaps ask, perhaps ark"}),
    ("chain with a vlek", lambda: edited(snp(), *CHAIN, "vlek", new=""), {"report form"}, {}), ("chain a list", lambda: edited(snp(), *CHAIN, new=[]), {"report form"}, {}),
    ("chain false", lambda: edited(snp(), *CHAIN, new=False), {"report form"}, {}), ("vcek null", lambda: edited(snp(), *CHAIN, "vcek"), {"report form"}, {"detail": "vcek: not base64 text"}),
    ("more in the evidence", lambda: edited(snp(), "evidence", "more", new=1), {"report form"}, {}),
    ("snp as az-snp", lambda: edited(snp(), "platform", new="az-snp"), {"report form"}, {}), ("az-snp as snp", lambda: edited(azure(), "platform", new="snp"), {"report form"}, {}),
    ("snp as simulated", lambda: edited(snp(), "platform", new="simulated"), {"report form"}, {}),
    ("az-snp version 6", lambda: azure(report=made(snp_report, version=6, report_data=RUNTIME_DIGEST)), {"report version"}, {}),
    ("az-snp version 1", lambda: azure(report=made(snp_report, version=1, report_data=RUNTIME_DIGEST)), {"report version"}, {}),
    ("az-snp VMPL", lambda: azure(report=made(snp_report, version=2, vmpl=2, report_data=RUNTIME_DIGEST)), {"VMPL"}, {}),
    ("az-snp issuer of no product", lambda: azure(vek=made(vek_of, issuer="SEV-Naples")), {"product"}, {}),
    ("az-snp by the ASVK's name", lambda: azure(vek=made(vek_of, issuer="SEV-VLEK-Milan")), {"VEK issuer"}, {}),
    ("az-snp evidence version", lambda: edited(azure(), "evidence", "version", new=2), {"report form"}, {"detail": "az-snp evidence: version is not 1"}),
    ("az-snp evidence version true", lambda: edited(azure(), "evidence", "version", new=True), {"report form"}, {}),
    ("az-snp evidence version 1.0", lambda: edited(azure(), "evidence", "version", new=1.0), {"report form"}, {}),
    ("extraData", lambda: azure(extra_data=bytes(50)), {"provenance digest"}, {}), ("extraData empty", lambda: azure(extra_data=b""), {"provenance digest"}, {}),
    ("extraData of 32 bytes", lambda: azure(extra_data=confbuild.report_data(provenance_of(ATTESTED), NONCE)[:32]), set(), {}),
    ("extraData, tail", lambda: azure(extra_data=confbuild.report_data(provenance_of(ATTESTED), NONCE)[:49] + b"\1"), {"report data tail"}, {}),
    ("extraData of 65 bytes", lambda: azure(extra_data=bytes(65)), {"TPM quote"}, {"detail": "extraData has 65 bytes, expected at most 64"}),
    ("the report's own data", lambda: azure(report=made(snp_report)), {"runtime data digest"}, {}),
    ("value of a register", lambda: edited(azure(), "evidence", "tpm_quote", "pcrs", 5, new="00" * 32), {"PCR digest"}, {}),
    ("registers swapped", lambda: edited(azure(), "evidence", "tpm_quote", "pcrs", new=AZURE["tpm_quote"]["pcrs"][::-1]), {"PCR digest"}, {}),
    ("23 registers", lambda: edited(azure(), "evidence", "tpm_quote", "pcrs", 23, drop=True), {"report form"}, {"detail": "pcrs are not 24 values"}),
    ("a register of 31 bytes", lambda: edited(azure(), "evidence", "tpm_quote", "pcrs", 23, new="00" * 31), {"report form"}, {"detail": "a register has not 32 bytes"}),
    ("registers an object", lambda: edited(azure(), "evidence", "tpm_quote", "pcrs", new={}), {"report form"}, {}),
    ("register of blanks", lambda: edited(azure(), "evidence", "tpm_quote", "pcrs", 0, new="0 " * 32), {"report form"}, {"detail": "pcr 0: not pairs of hexadecimal digits"}),
    ("another AK, quote signed again", lambda: azure(runtime_data=OTHER_RUNTIME, signature=TOY_ASVK.pkcs1(QUOTE)), {"runtime data digest"}, {}),
    ("another AK signs", lambda: azure(signature=TOY_ASVK.pkcs1(QUOTE)), {"TPM signature"}, {}), ("signature by PSS", lambda: azure(signature=TOY_AK.pss(QUOTE)), {"TPM signature"}, {}),
    ("signature 0", lambda: azure(signature=bytes(256)), {"TPM signature"}, {}), ("signature short", lambda: azure(signature=b""), {"TPM signature"}, {"detail": "the signature has 0 bytes, the modulus 256"}),
    ("clock", lambda: azure(message=QUOTE[:-60] + b"\1" + QUOTE[-59:], signature=TOY_AK.pkcs1(QUOTE)), {"TPM signature"}, {}),
    ("runtime data", lambda: azure(runtime_data=HCL.runtime_data.replace(b"true", b"null")), {"runtime data digest"}, {}),
    ("runtime data, one blank more", lambda: azure(runtime_data=HCL.runtime_data + b" "), {"runtime data digest"}, {}),
    ("runtime data of no JSON", lambda: azure(report=made(snp_report, version=2, report_data=hashlib.sha256(b"{").digest()), runtime_data=b"{"), {"runtime data"}, {}),
    ("no quote", lambda: azure(message=b""), {"TPM quote"}, {"detail": "TPMS_ATTEST: ends at byte 0"}),
    ("HCL report of TDX", lambda: azure(hcl=hcl_of(made(snp_report), HCL.runtime_data).replace(b"\2\0\0\0\1\0\0\0", b"\4\0\0\0\1\0\0\0")), {"report form"}, {}),
    ("two checks at once", lambda: snp({"vmpl": 1, "policy": 0xB0000}, {"product": "Genoa", "valid": EXPIRED}), {"VMPL", "debug", "VEK product", "VEK validity"}, {})]


class Perfect:
    """Signature schemes that nobody can forge and that take no time: valid is what has been seen valid before freeze()."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: set[Any] = set()
        self.frozen = False
        for name in ("verify_ecdsa_p384", "verify_rsassa_pss", "verify_rsassa_pkcs1_v1_5"):
            patch.setattr(confbuild, name, functools.partial(self.verify, getattr(confbuild, name)))

    def verify(self, real: Callable[..., None], *arguments: Any) -> None:
        if not self.frozen:
            real(*arguments)
            self.seen.add((real, arguments))
        elif (real, arguments) not in self.seen:
            raise confbuild.BadSignature("inconsistent")


class TestHardwareVerdict:
    @pytest.mark.parametrize(("make", "failed", "more"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
    def test_a_change_fails_the_checks_that_are_about_it(self, make: Callable[[], confbuild.BundleFiles], failed: set[str], more: dict[str, Any]) -> None:
        endorsements: dict[str, Any] = {"anchors": THREE, **more}
        detail, expected = endorsements.pop("detail", ""), endorsements.pop("expected", confbuild.Expectations())
        if "vek" in endorsements:
            endorsements["vek"] = endorsements["vek"]()
        verdict = verdict_over(make(), expected, **endorsements)
        assert (failed_checks(verdict), verdict.verdict) == (failed, "failed" if failed else "passed")
        assert shown(verdict.platform) <= {check.name for check in verdict.checks}
        broken = [check for check in verdict.checks if check.status == "failed"]
        assert not broken or detail in broken[0].detail and all(check.expected != check.actual or check.detail for check in broken)

    @pytest.mark.parametrize("make", [snp, azure, vlek, turin], ids=["snp", "az-snp", "vlek", "turin"])
    def test_a_good_bundle_passes(self, make: Callable[[], confbuild.BundleFiles]) -> None:
        verdict = verdict_over(make(), HARDWARE, anchors=THREE)
        assert (verdict.verdict, failed_checks(verdict)) == ("passed", set())
        names = [check.name for check in verdict.checks]
        assert len(names) == len(set(names)) and shown(verdict.platform) | {"hardware evidence", "trust anchors"} <= set(names)
        digest, other = hashlib.sha256(provenance_of(ATTESTED)).hexdigest(), make is azure
        signed = digest + NONCE + "00" * 16
        wanted = {"nonce": NONCE, "signed_data": signed, "provenance_sha256": digest, "product": "Turin" if make is turin else "Milan", "vmpl": 0,
                  "report_data": RUNTIME_DIGEST.hex() + "00" * 32 if other else signed, "measurement": b"m".hex() * 48, "debug": False, "policy": "0x30000",
                  "tcb": TURIN_TCB if make is turin else MILAN_TCB, "key_type": "vlek" if make is vlek else "vcek", "report_version": 2 if other else 5,
                  "chip_id": (bytes(64) if make is vlek else CHIP_ID[8:16].ljust(64, b"\0") if make is turin else CHIP_ID).hex()}
        assert {name: verdict.claims[name] for name in wanted} == wanted
        if other:
            assert verdict.claims["vm_configuration"] == {"secure-boot": True} and len(verdict.claims["pcrs"]) == 24

    COMPLETE_RIGHT: Mapping[str, Any] = {**RIGHT_OF_STATEMENT, "builder_id": HARDWARE_BUILDER, "measurements": ["00" * 48, "6D" * 48], "min_tcb": MILAN_TCB, "host_data": "AB" + "00" * 31,
                                         "guest_svn": 7, "chip_id": CHIP_ID.hex().upper(), "family_id": "cd" + "00" * 15, "image_id": "EF" + "00" * 15}
    COMPLETE_WRONG: Mapping[str, Sequence[Any]] = {
        **WRONG_OF_STATEMENT, "measurements": [["00" * 48], ["6d" * 47], [""]], "host_data": ["00" * 32, "ab", ""], "guest_svn": [0, 8],
        "min_tcb": [{name: level + 1} for name, level in MILAN_TCB.items()] + [{"fmc": 0}, {"bootloader": 3, "fmc": 0}, {"x": 0}],
        "chip_id": [CHIP_ID[:8].hex(), ""], "family_id": ["00" * 16], "image_id": ["00" * 16]}

    def complete(self) -> confbuild.BundleFiles:
        fields = {"host_data": b"\xab", "guest_svn": 7, "family_id": b"\xcd", "image_id": b"\xef"}
        return snp(fields, doc=replaced(COMPLETE, ("predicate", "runDetails", "builder", "id"), HARDWARE_BUILDER))

    def test_every_expectation_both_ways(self, monkeypatch: pytest.MonkeyPatch) -> None:
        schemes = Perfect(monkeypatch)
        assert self.COMPLETE_RIGHT.keys() == self.COMPLETE_WRONG.keys() == OPTIONAL.keys()
        for right in (self.COMPLETE_RIGHT, *({key: value} for key, value in self.COMPLETE_RIGHT.items())):
            verdict = verdict_over(self.complete(), confbuild.Expectations(**right), anchors=TOY_ANCHORS)
            assert verdict.verdict == "passed" and {status_of(verdict, OPTIONAL[key]) for key in right} == {"passed"}
            schemes.frozen = True
        for key, value in ((key, value) for key, values in self.COMPLETE_WRONG.items() for value in values):
            for others in ({}, self.COMPLETE_RIGHT):  # one expectation that holds never makes up for another
                verdict = verdict_over(self.complete(), confbuild.Expectations(**{**others, key: value}), anchors=TOY_ANCHORS)
                assert (verdict.verdict, failed_checks(verdict)) == ("failed", {OPTIONAL[key]}), (key, value)

    @pytest.mark.parametrize(("tcb", "good"), [({}, True), ({"fmc": 1}, True), ({"fmc": 2}, False), ({"fmc": 0, "microcode": 97}, True), ({"microcode": 98}, False)])
    def test_minimum_tcb_of_turin(self, tcb: dict[str, int], good: bool) -> None:
        verdict = verdict_over(turin(), confbuild.Expectations(min_tcb=tcb), anchors=THREE)
        assert failed_checks(verdict) == (set() if good else {"minimum TCB"})

    @pytest.mark.parametrize("field", ["reported_tcb", "committed_tcb", "current_tcb", "launch_tcb"])
    def test_minimum_tcb_of_each_kind(self, field: str) -> None:
        """A VM launched on old firmware and updated later, or whose host may go back to the old one, is as bad as one that reports it."""
        for low, name in ((bytes((4, 0, 0, 0, 0, 0, 23, 219)), "snp"), (bytes((4, 0, 0, 0, 0, 0, 24, 218)), "microcode"), (bytes((3, 0, 0, 0, 0, 0, 24, 219)), "bootloader")):
            tcb = {**MILAN_TCB, name: MILAN_TCB[name] - 1}
            files = snp({field: low}, {"tcb": tcb} if field == "reported_tcb" else None)
            assert verdict_over(files, confbuild.Expectations(min_tcb=tcb), anchors=TOY_ANCHORS).verdict == "passed"
            verdict = verdict_over(files, confbuild.Expectations(min_tcb={name: MILAN_TCB[name]}), anchors=TOY_ANCHORS)
            assert failed_checks(verdict) == {"minimum TCB"}
            check = next(check for check in verdict.checks if check.name == "minimum TCB")
            assert check == ("minimum TCB", "failed", f"at least {name}={MILAN_TCB[name]}", f"{field[:-4]} {confbuild.tcb_text(tcb)}",
                             "the reported, committed, current and launch TCB must all reach it")

    @pytest.mark.parametrize(("nonce", "files", "failed"), [
        (NONCE, snp, set()), (NONCE.upper(), azure, set()), ("ff" * 16, snp, {"nonce"}), ("00" * 16, snp, {"nonce", "nonce is not zero"}),
        ("00" * 16, lambda: snp({"report_data": hashlib.sha256(provenance_of(ATTESTED)).digest()}), {"nonce is not zero"}),
        ("ffeeddccbbaa99887766554433220000", lambda: azure(extra_data=confbuild.report_data(provenance_of(ATTESTED), "ffeeddccbbaa99887766554433220000")[:46]), set()),
        (NONCE, lambda: azure(extra_data=confbuild.report_data(provenance_of(ATTESTED), NONCE)[:32]), {"nonce"}),
        (NONCE, lambda: azure(message=b""), {"TPM quote"})])
    def test_nonce(self, nonce: str, files: Callable[[], confbuild.BundleFiles], failed: set[str]) -> None:
        """The same of a bundle and of its evidence alone."""
        for alone in (False, True):
            verdict = verdict_over(files(), confbuild.Expectations(nonce=nonce, evidence_only=alone), anchors=TOY_ANCHORS)
            assert (verdict.verdict, failed_checks(verdict)) == ("failed" if failed else "passed", failed)

    def test_what_evidence_alone_proves_is_said(self) -> None:
        verdict = verdict_over(snp(), HARDWARE._replace(evidence_only=True), anchors=TOY_ANCHORS)
        assert verdict.verdict == "passed" and {check.name for check in verdict.checks if check.detail == confbuild.ALONE} == {
            *confbuild.REQUIRED_OF_BUNDLE, *(OPTIONAL[name] for name in RIGHT_OF_STATEMENT if name != "nonce")}
        assert "provenance_sha256" not in verdict.claims and "builder_id" not in verdict.claims

    @pytest.mark.parametrize(("others", "artifacts", "provenance", "names"), [
        ((), {}, None, ""), ((), {}, b"{", "provenance.json"), (("b", "a"), {"demo": "00" * 32}, b"{", "a, artifacts/demo, b, provenance.json"),
        ([f"{i:02}" for i in range(10)], {}, None, "00, 01, 02, 03, 04, 05, 06, 07, 08, 09"),
        ([f"{i:02}" for i in range(12)], {}, None, "00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 2 more"), (("\x1b[2J\n",), {}, None, "\x1b[2J\n")])
    def test_what_evidence_alone_does_not_cover(self, others: Sequence[str], artifacts: Mapping[str, str], provenance: bytes | None, names: str) -> None:
        """Whatever else is there is named, and never looked at."""
        verdict = verdict_over(confbuild.BundleFiles(provenance, snp().evidence, artifacts, others), HARDWARE._replace(evidence_only=True), anchors=TOY_ANCHORS)
        assert verdict.verdict == "passed"
        assert [check for check in verdict.checks if check.name == "other files"] == (
            [confbuild.Check("other files", "not checked", "", names, "not covered: this is evidence alone")] if names else [])
        last = confbuild.render_verdict(verdict, False).rpartition("\n")[2]
        assert last.startswith("PASSED: evidence alone: no provenance and no artifact, signed in a confidential VM on an AMD Milan processor")
        assert (f"; not covered: {names.replace(chr(27) + '[2J', '').strip()}; not checked: " in last) == bool(names) and "\x1b" not in last

    @pytest.mark.parametrize(("files", "allow", "failed"), [
        ("good", True, set()), ("good", False, set()), ("compact", True, set()), ("compact", False, {"provenance digest"}),
        ("other", True, {"provenance digest"}), ("not JSON", True, {"provenance form", "provenance digest"}), ("null", True, {"provenance schema", "provenance digest"})])
    def test_legacy_digest(self, files: str, allow: bool, failed: set[str]) -> None:
        doc = provenance_of(ATTESTED)
        data = {"compact": json.dumps(json.loads(doc), separators=(",", ":")).encode(), "good": doc}.get(files, b"x")
        bundle_ = snp({"report_data": confbuild.report_data(data, NONCE)})._replace(provenance={"not JSON": b"{", "null": b"null"}.get(files, doc))
        verdict = verdict_over(bundle_, confbuild.Expectations(nonce=NONCE, allow_legacy_digest=allow), anchors=TOY_ANCHORS)
        assert (failed_checks(verdict), verdict.verdict) == (failed, "failed" if failed else "passed")
        check = next(check for check in verdict.checks if check.name == "provenance digest")
        assert check.detail.startswith("legacy compact digest: ") == (files == "compact")

    # Name, uri, digest as Kettle derives them from a key of pnpm-lock.yaml and its resolution: integrity, or the commit of a GitHub tarball.
    INTEGRITY, SHORT = "sha512-" + base64.b64encode(bytes(range(64))).decode(), "sha1-" + base64.b64encode(bytes(range(20))).decode()
    TARBALL = "https://codeload.github.com/o/r/tar.gz/" + "12" * 20
    PNPM = (
        ("a", TARBALL, "12" * 20), ("@types/node", f"pkg:npm/@types/node@20.11.5?checksum={INTEGRITY}", INTEGRITY), ("left-pad", f"pkg:npm/left-pad@1.3.0?checksum={SHORT}", SHORT),
        ("o", f"pkg:npm/o@{TARBALL}?checksum={INTEGRITY}", INTEGRITY), ("semver", f"pkg:npm/semver@7.6.0?checksum={SHORT} {INTEGRITY}", f"{SHORT} {INTEGRITY}"))

    @pytest.mark.parametrize("build_type", [confbuild.BUILD_TYPE, "https://lunal.dev/kettle/pnpm@v1"])
    def test_a_pnpm_bundle_of_kettle(self, build_type: str) -> None:
        """Both generations, to the letter; the root is over the uris, in their order."""
        older = build_type != confbuild.BUILD_TYPE
        tools = {"pnpm": {"digest": LOCKED, "version": "9.15.4"}, "node": {"digest": LOCKED, "version": "v22.12.0"}, "kettle": {"digest": LOCKED, "version": "1.1.1"}}
        doc = statement(**{
            "predicate__runDetails__builder__id": "https://lunal.dev/kettle-tee/v1" if older else "https://confidential.ai/attested-builds",
            DEFINITION + "buildType": build_type, DEFINITION + "externalParameters__buildCommand": "pnpm build" if older else "pnpm install --frozen-lockfile && pnpm build",
            DEFINITION + "externalParameters__source": {"digest": {"gitCommit": "34" * 20, "gitTree": "12" * 20}, "uri": "https://github.com/o/p.git"},
            DEFINITION + "internalParameters": {"lockfileHash": LOCKED, "toolchain": tools},
            DEFINITION + "resolvedDependencies": [dependency(name, uri, sha512=digest) for name, uri, digest in self.PNPM],
            "subject": [{"digest": {"sha256": DEMO_SHA256}, "name": "dist.tar.gz"}]})
        leaves = ["34" * 20, "12" * 20, "ab" * 32, "v22.12.0", "ab" * 32, "9.15.4", "ab" * 32, *(uri for _, uri, _ in self.PNPM)]
        level = [hashlib.sha256(leaf.encode()).digest() for leaf in leaves]
        while len(level) > 1:
            level = [hashlib.sha256(b"".join(level[i:i + 2])).digest() if len(level[i:i + 2]) == 2 else level[i] for i in range(0, len(level), 2)]
        assert doc["predicate"]["runDetails"]["byproducts"] == [{"digest": {"sha256": level[0].hex()}, "name": "input_merkle_root"}]
        files = snp(doc=doc)._replace(artifacts={"dist.tar.gz": DEMO_SHA256})
        for packages, good in ((["@types/node@20.11.5", "left-pad@1.3.0", self.TARBALL, "semver@7.6.0"], True), (["a@1.0.0"], False), (["node@20.11.5"], False)):
            verdict = verdict_over(files, confbuild.Expectations(nonce=NONCE, source_commit="34" * 20, packages=packages), anchors=TOY_ANCHORS)
            assert (verdict.verdict, failed_checks(verdict)) == (("passed", set()) if good else ("failed", {"packages"}))

    ASK, ASVK, LATER = 0x010001, 0x010101, ("2026-11-23T12:00:00Z", "2026-11-23T12:00:00Z")
    LISTS: Sequence[tuple[Callable[[], confbuild.BundleFiles], Mapping[str, Callable[[], bytes]], str, str, set[str]]] = [
        (snp, {}, "not checked", "not checked", set()), (snp, {"a": lambda: crl_of("ARK-Milan", TOY_ARK)}, "passed", "passed", set()),
        (snp, {"a": lambda: crl_of("ARK-Milan", TOY_ARK, valid=("2026-11-23T12:00:00Z", "2026-11-23T12:00:00Z"))}, "passed", "passed", set()),
        (snp, {"a": lambda: crl_of("ARK-Milan", TOY_ARK, 1, 0x010101, 0)}, "passed", "passed", set()),
        (snp, {"a": lambda: crl_of("ARK-Milan", TOY_ARK, 1, 0x010001)}, "failed", "passed", {"revocation"}),
        (azure, {"a": lambda: crl_of("ARK-Milan", TOY_ARK, 0x010001)}, "failed", "passed", {"revocation"}),
        (vlek, {"a": lambda: crl_of("ARK-Milan", TOY_ARK, 0x010101)}, "failed", "passed", {"revocation"}),
        (vlek, {"a": lambda: crl_of("ARK-Milan", TOY_ARK, 0x010001)}, "passed", "passed", set()),
        (snp, {"a": lambda: crl_of("ARK-Milan", TOY_ARK), "b": lambda: crl_of("ARK-Milan", TOY_ARK, 0x010001, valid=("2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"))},
         "failed", "passed", {"revocation"}),
        (snp, {"a": lambda: crl_of("ARK-Milan", TOY_ARK, valid=EXPIRED)}, "passed", "not checked", set()),
        (snp, {"a": lambda: crl_of("ARK-Milan", TOY_ARK, valid=NOT_YET)}, "passed", "not checked", set()),
        (snp, {"a": lambda: crl_of("ARK-Turin", TOY_ARK)}, "not checked", "not checked", set()),
        (turin, {"a": lambda: crl_of("ARK-Turin", TOY_ARK), "b": lambda: crl_of("ARK-Genoa", TOY_ARK, 0x010001)}, "passed", "passed", set()),
        (snp, {"a": lambda: crl_of("ARK-Milan", TOY_ASK)}, "not checked", "not checked", {"revocation list file a"}),
        (snp, {"a": lambda: crl_of("SEV-Milan", TOY_ASK)}, "not checked", "not checked", {"revocation list file a"}),
        (snp, {"a": lambda: b"", "b": lambda: crl_of("ARK-Milan", TOY_ARK)}, "passed", "passed", {"revocation list file a"}),
        (snp, {"revocation": lambda: crl_of("ARK-Milan", TOY_ARK)[:-1]}, "not checked", "not checked", {"revocation list file revocation"})]

    @pytest.mark.parametrize(("files", "lists", "revocation", "age", "failed"), LISTS, ids=range(len(LISTS)))
    def test_revocation(self, files: Callable[[], confbuild.BundleFiles], lists: Mapping[str, Callable[[], bytes]], revocation: str, age: str, failed: set[str]) -> None:
        """No list, and none that is valid now, is only fatal where one is required."""
        crls = [(name, make()) for name, make in lists.items()]
        for required in (False, True):
            verdict = verdict_over(files(), confbuild.Expectations(require_crl=required), anchors=THREE, crls=crls)
            missing = {"required checks"} if required and revocation == "not checked" and not failed else set()
            stale = {"revocation list age"} if required and revocation != "not checked" and age == "not checked" else set()
            assert (failed_checks(verdict), status_of(verdict, "revocation")) == (failed | missing | stale, revocation)
            assert status_of(verdict, "revocation list age") == ("failed" if stale else age)
        if missing:
            assert verdict.checks[-1].actual == "not checked: revocation, revocation list age"

    @pytest.mark.parametrize(("valid", "second", "shown_"), [
        (EXPIRED, None, EXPIRED), (NOT_YET, None, NOT_YET), (("2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"), EXPIRED, EXPIRED)])
    def test_a_required_list_is_valid_now(self, valid: tuple[str, str], second: tuple[str, str] | None, shown_: tuple[str, str]) -> None:
        """The verdict says from when to when the latest one was."""
        lists = [(str(i), crl_of("ARK-Milan", TOY_ARK, valid=period)) for i, period in enumerate(filter(None, (valid, second)))]
        verdict = verdict_over(snp(), confbuild.Expectations(require_crl=True), anchors=THREE, crls=lists)
        check = next(check for check in verdict.checks if check.name == "revocation list age")
        assert verdict.verdict == "failed" and check == ("revocation list age", "failed", " to ".join(shown_), NOW,
                                                         f"the list was valid from {shown_[0]} to {shown_[1]}: another one may revoke more")
        assert verdict_over(snp(), confbuild.Expectations(require_crl=True), anchors=THREE, crls=[*lists, ("now", crl_of("ARK-Milan", TOY_ARK))]).verdict == "passed"

    DIGEST = hashlib.sha256(b"m" * 48).hexdigest()

    @pytest.mark.parametrize(("builder", "claimed", "failed"), [
        (HARDWARE_BUILDER, None, set()), (HARDWARE_BUILDER, DIGEST, set()), (HARDWARE_BUILDER, "00" * 32, {"measurement byproduct"}),
        (confbuild.SNP_BUILDER, DIGEST, set()), (confbuild.SNP_BUILDER, None, {"measurement byproduct"}), (confbuild.SNP_BUILDER, "00" * 32, {"measurement byproduct"}),
        (confbuild.SIMULATED_BUILDER, None, {"builder"}), (confbuild.QEMU_BUILDER, DIGEST, {"builder"}), (confbuild.QEMU_BUILDER, "00" * 32, {"builder", "measurement byproduct"})])
    def test_neither_half_claims_more_than_the_other(self, builder: str, claimed: str | None, failed: set[str]) -> None:
        """And what the evidence of a simulation says is no measurement, so that no byproduct is compared with it."""
        doc = statement(predicate__runDetails__builder__id=builder)
        doc["predicate"]["runDetails"]["byproducts"] += [] if claimed is None else [{"digest": {"sha256": claimed}, "name": "measurement"}]
        for make, other in ((snp, False), (bundle, True)):
            verdict = verdict_over(make(doc=doc), ANY, anchors=TOY_ANCHORS)
            wanted = failed if not other else set() if builder in (confbuild.SIMULATED_BUILDER, confbuild.QEMU_BUILDER) else {"builder"}
            assert (failed_checks(verdict), verdict.verdict) == (wanted, "failed" if wanted else "simulated" if other else "passed")
        unread = verdict_over(snp(doc=doc)._replace(evidence=b"{}"), ANY, anchors=TOY_ANCHORS)
        assert status_of(unread, "builder") == "not checked" and unread.verdict == "failed"

    @pytest.mark.parametrize(("word", "claim"), [(b"none", "none"), (b"open", "open"), (b"ajar", None), (None, None)])
    def test_what_the_guest_could_reach(self, word: bytes | None, claim: str | None) -> None:
        doc = statement()
        doc["predicate"]["runDetails"]["byproducts"] += [{"digest": {"sha256": hashlib.sha256(word).hexdigest()}, "name": "guest_network"}] if word else []
        assert verdict_over(bundle(doc), ANY).claims.get("guest_network") == claim

    IMAGE = confbuild.ImageFacts("ab" * 32, "", "", {"EPYC-v4, 1 vCPU": "00" * 48, "EPYC-v4, 2 vCPUs": "6d" * 48})
    BOOTED: Mapping[str, Any] = {"host_data": b"\xab" * 32}

    @pytest.mark.parametrize(("report", "changes", "failed", "said"), [
        (BOOTED, {}, set(), ""), ({}, {}, {"image host_data"}, "HOST_DATA is the SHA-256 of image.json"),
        (BOOTED, {"parts": "kernel: another file"}, {"image parts"}, "kernel: another file"), (BOOTED, {"firmware": "it admits"}, {"image firmware"}, "it admits"),
        (BOOTED, {"manifest_sha256": "00" * 32}, {"image host_data"}, "00" * 32), (BOOTED, {"launch_digests": {}}, {"image measurement"}, "none: image.json asks for no"),
        (BOOTED, {"launch_digests": {"EPYC-v4, 1 vCPU": "00" * 48}}, {"image measurement"}, "00" * 48 + " (EPYC-v4, 1 vCPU)"),
        ({"measurement": b"n" * 48}, {"parts": "x", "firmware": "y"}, set(confbuild.OF_IMAGE), "x")])
    def test_image(self, report: Mapping[str, Any], changes: Mapping[str, Any], failed: set[str], said: str) -> None:
        facts = self.IMAGE._replace(**changes)
        verdict = verdict_over(snp(report), confbuild.Expectations(image=facts), anchors=TOY_ANCHORS)
        assert (failed_checks(verdict), verdict.verdict) == (failed, "failed" if failed else "passed")
        checks = {check.name: check for check in verdict.checks}
        assert set(confbuild.OF_IMAGE) <= set(checks) and any(said in "".join(check) for check in checks.values() if check.status == "failed") == bool(failed)
        assert failed or checks["image measurement"] == confbuild.Check(
            "image measurement", "passed", "00" * 48 + " (EPYC-v4, 1 vCPU) or " + "6d" * 48 + " (EPYC-v4, 2 vCPUs)", "6d" * 48 + " (EPYC-v4, 2 vCPUs)")

    def test_image_of_what_nothing_has_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the simulation says what the image's measurement is, and where the evidence cannot be read."""
        facts = confbuild.ImageFacts("00" * 32, "", "", {"EPYC-v4, 1 vCPU": confbuild.simulated_measurement().hex()})
        verdict = verdict_over(GOOD_BUNDLE, confbuild.Expectations(image=facts))
        assert failed_checks(verdict) == {"image measurement", "image host_data"}
        assert {check.detail for check in verdict.checks if check.status == "failed"} == {"simulated evidence: nothing has measured that VM"}
        verdict = verdict_over(GOOD_BUNDLE._replace(evidence=b"{"), confbuild.Expectations(image=facts))
        assert [status_of(verdict, name) for name in confbuild.OF_IMAGE] == ["passed", "passed", "not checked", "not checked"]
        assert "no expectation" not in "".join(check.detail for check in verdict.checks if check.name in confbuild.OF_IMAGE)
        verdict = verdict_over(snp(self.BOOTED), confbuild.Expectations(image=self.IMAGE, evidence_only=True), anchors=TOY_ANCHORS)
        assert verdict.verdict == "passed", "of evidence alone as well"
        monkeypatch.setattr(confbuild, "_check_image", lambda *_: None)
        verdict = verdict_over(snp(self.BOOTED), confbuild.Expectations(image=self.IMAGE), anchors=TOY_ANCHORS)
        assert failed_checks(verdict) == {"required checks"} and verdict.checks[-1].actual == "not checked: " + ", ".join(sorted(confbuild.OF_IMAGE))

    def test_a_hostile_list_takes_linear_time(self) -> None:
        """Nobody signed it: numbers of one hash, which for Python are the multiples of 2^61 - 1."""
        when = utc(NOW)
        entries = b"".join(b"\x30" + bytes((len(one) + 17,)) + one + when + b"\x30\x00" for one in (number(i * (2 ** 61 - 1)) for i in range(40_000)))
        tbs = seq(number(1), PSS_SHA384, x_name("ARK-Milan"), when, when, seq(entries))
        with within(20):
            verdict = verdict_over(snp(), ANY, anchors=TOY_ANCHORS, crls=[("a", seq(tbs, PSS_SHA384, bits(b"")))])
        assert failed_checks(verdict) == {"revocation list file a"}

    def test_trust_anchors_are_shown(self) -> None:
        for files, anchors, status, actual in ((snp(), TOY_ANCHORS, "not checked", "given by --roots"), (snp(), None, "passed", "AMD's, as pinned in this file")):
            shown_ = next(check for check in verdict_over(files, ANY, anchors=anchors).checks if check.name == "trust anchors")
            assert (shown_.status, shown_.actual) == (status, actual)

    def test_require_tee(self) -> None:
        assert status_of(verdict_over(snp(), HARDWARE, anchors=TOY_ANCHORS), "hardware evidence") == "passed"
        verdict = verdict_over(snp({"vmpl": 1}), HARDWARE, anchors=TOY_ANCHORS)
        assert failed_checks(verdict) == {"VMPL"} and "hardware evidence" not in {check.name for check in verdict_over(snp(), ANY, anchors=TOY_ANCHORS).checks}

    def test_every_required_check_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for files in (snp(), azure()):
            platform = json.loads(files.evidence)["platform"]
            with monkeypatch.context() as patch:
                patch.setattr(confbuild, "REQUIRED_OF_PLATFORM", {platform: confbuild.REQUIRED_OF_PLATFORM[platform] | {"another"}})
                verdict = verdict_over(files, ANY, anchors=TOY_ANCHORS)
                assert (verdict.verdict, failed_checks(verdict)) == ("failed", {"required checks"})

    def test_nothing_is_required_that_does_not_run(self) -> None:
        """And what runs on hardware evidence is required, but for what is shown only."""
        for files in (snp(), azure(), vlek(), turin()):
            verdict = verdict_over(files, confbuild.Expectations(), anchors=THREE)
            ran = {check.name for check in verdict.checks if check.status == "passed"}
            assert ran == confbuild.REQUIRED_OF_PLATFORM[verdict.platform] | confbuild.REQUIRED_OF_BUNDLE | {"artifact demo"}


def parts_of(files: confbuild.BundleFiles) -> dict[str, tuple[bytes, Callable[[bytes], confbuild.BundleFiles]]]:
    """What hardware or its key signed, and how a bundle gets another one in its place."""
    doc = json.loads(files.evidence)["evidence"]

    def put(*path: Any, encode: Callable[[bytes], str] = b64) -> Callable[[bytes], confbuild.BundleFiles]:
        return lambda data: edited(files, "evidence", *path, new=encode(data))

    parts: dict[str, tuple[bytes, Callable[[bytes], confbuild.BundleFiles]]] = {
        "evidence": (files.evidence, lambda data: files._replace(evidence=data)), "provenance": (provenance_of(files), lambda data: files._replace(provenance=data))}
    if "tpm_quote" not in doc:
        return {**parts, "report": (base64.b64decode(doc["attestation_report"]), put("attestation_report")), "vek": (base64.b64decode(doc["cert_chain"]["vcek"]), put("cert_chain", "vcek"))}
    quote = doc["tpm_quote"]
    return {**parts, "hcl": (base64.urlsafe_b64decode(doc["hcl_report"] + "=="), put("hcl_report", encode=url_of)), "vek": (base64.urlsafe_b64decode(doc["vcek"] + "=="), put("vcek", encode=url_of)),
            **{name: (bytes.fromhex(quote[name]), put("tpm_quote", name, encode=bytes.hex)) for name in ("message", "signature")},
            "pcr 3": (bytes.fromhex(quote["pcrs"][3]), put("tpm_quote", "pcrs", 3, encode=bytes.hex))}


def case_of_hex_alone(old: bytes, new: bytes) -> bool:
    """Whether two documents of evidence differ in the case of the quote's hexadecimal digits alone."""
    def folded(data: bytes) -> Any:
        doc = json.loads(data)
        doc["evidence"]["tpm_quote"] = json.loads(json.dumps(doc["evidence"]["tpm_quote"]).lower())
        return doc

    try:
        return bool(old != new and folded(old) == folded(new) and all(a == b or a ^ b == 0x20 for a, b in zip(old, new, strict=True)))
    except (KeyError, TypeError, ValueError):
        return False


class TestForgery:
    """No bit of what is signed can be changed, and none can be left out."""

    @pytest.mark.parametrize("make", [snp, azure], ids=["snp", "az-snp"])
    def test_a_bit_of_every_byte_and_prefixes(self, make: Callable[[], confbuild.BundleFiles], monkeypatch: pytest.MonkeyPatch) -> None:
        files, schemes, random_ = make(), Perfect(monkeypatch), random.Random(3)
        assert verdict_over(files, HARDWARE, anchors=TOY_ANCHORS).verdict == "passed"
        schemes.frozen = True
        assert verdict_over(files, HARDWARE, anchors=TOY_ANCHORS).verdict == "passed"
        for name, (data, put) in parts_of(files).items():
            step = max(1, len(data) // 60)
            flipped = [(i, 1 << random_.randrange(8)) for i in range(random_.randrange(step), len(data), step)]
            changed = [data[:i] + bytes((data[i] ^ bit,)) + data[i + 1:] for i, bit in flipped]
            for new in changed + [data[:n] for n in {*range(0, len(data), 10 * step), *range(max(0, len(data) - 4), len(data))}]:
                same = case_of_hex_alone(data, new) if name == "evidence" else name == "hcl" and new.rstrip(b"\0") == data.rstrip(b"\0")
                wanted = "passed" if same else "failed"  # the zeros behind the runtime data are padding, signed by nobody
                assert verdict_over(put(new), HARDWARE, anchors=TOY_ANCHORS).verdict == wanted, (name, new)

    @pytest.mark.parametrize("make", [snp, azure, vlek, turin], ids=["snp", "az-snp", "vlek", "turin"])
    @settings(max_examples=10)
    @given(data=st.data())
    def test_bits_with_the_real_signatures(self, make: Callable[[], confbuild.BundleFiles], data: st.DataObject) -> None:
        parts = parts_of(make())
        name = data.draw(st.sampled_from(sorted(parts)))
        old, put = parts[name]
        i, bit, cut = data.draw(st.integers(0, len(old) - 1)), data.draw(st.integers(0, 7)), data.draw(st.booleans())
        new = old[:i] if cut else old[:i] + bytes((old[i] ^ 1 << bit,)) + old[i + 1:]
        same = case_of_hex_alone(old, new) if name == "evidence" else name == "hcl" and new.rstrip(b"\0") == old.rstrip(b"\0")
        wanted = "passed" if same else "failed"
        assert verdict_over(put(new), HARDWARE, anchors=THREE).verdict == wanted

    @settings(max_examples=20)
    @given(make=st.sampled_from([snp, azure]), where=st.integers(0, 10 ** 6), value=JSON_VALUES)
    def test_any_value_at_any_place_never_raises(self, make: Callable[[], confbuild.BundleFiles], where: int, value: Any) -> None:
        files = make()
        doc = json.loads(files.evidence)
        path = [(), *nodes(doc)][where % len(list(nodes(doc)))]
        new = replaced(doc, path, value)
        verdict = verdict_over(files._replace(evidence=json.dumps(new).encode()), ANY, anchors=TOY_ANCHORS)
        same = new == doc and json.dumps(new) == json.dumps(doc) or path[2:] in (("ask",), ("ark",))
        assert verdict.verdict == ("passed" if same else "failed") and json.loads(json.dumps(verdict.to_wire()))

    @settings(max_examples=20)
    @given(make=st.sampled_from([snp, azure]), part=st.integers(0, 9), where=st.floats(0, 1, exclude_max=True), old=st.integers(0, 8), new=st.binary(max_size=8))
    def test_any_bytes_inside_never_raise(self, make: Callable[[], confbuild.BundleFiles], part: int, where: float, old: int, new: bytes) -> None:
        parts = [value for name, value in sorted(parts_of(make()).items()) if name != "evidence"]
        data, put = parts[part % len(parts)]
        i = math.floor(where * len(data))
        changed = data[:i] + new + data[i + old:]
        assert verdict_over(put(changed), HARDWARE, anchors=TOY_ANCHORS).verdict == ("passed" if changed.rstrip(b"\0") == data.rstrip(b"\0") else "failed")


def vectors() -> Path:
    """Evidence of real hardware, with its verdicts."""
    folder = SHARED / "vectors"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: it is no part of the repository")
    return folder


def roots_of(folder: Path) -> confbuild.Anchors:
    """Anchors of every product in a folder of certificates."""
    return {name.capitalize(): confbuild.make_anchors(name.capitalize(), *((folder / name / f"{role}.der").read_bytes() for role in ("ark", "ask", "asvk")))
            for name in ("milan", "genoa", "turin")}


class TestVectors:
    # Where reasonable verifiers differ, we reject what could be changed unseen, and accept what the envelope may carry beside.
    AMBIGUOUS: Mapping[str, bool] = {
        "json-depth-127-ok": True, "json-unknown-top-key": True, "json-lone-surrogate": False, "json-unknown-evidence-key": False,
        "mal-az-kex-hcl-header-byte": False, "mal-az-kex-hcl-tail-byte": False, "mal-az-kex-pcr-extra": False, "mal-snp-genoa-unsigned-tail": False,
        "mal-snp-turin-unsigned-tail": False, "testroot-newline-raw-digest": False, "testroot-prov-bom": False, "testroot-subject-dup-same": False,
        "testroot-subject-uppercase-digest": False, "testroot-vek-issuer-name": False, "testroot-vek-spl-negative": False}

    def wrong_claims(self, verdict: confbuild.Verdict, expect: Mapping[str, Any]) -> list[str]:
        """The claims that are not what expect.json says."""
        names = ("signed_data", "report_data", "chip_id", "nonce", "product", "report_version", "vmpl", "tcb", "host_data", "key_type", "provenance_sha256",
                 "policy", "debug", "launch_digest")
        claims = {**verdict.claims, "product": str(verdict.claims["product"]).lower(), "launch_digest": verdict.claims["measurement"]}
        wanted = {name: expect[name] for name in names if name in expect}
        wanted.update({"signed_data": wanted.get("signed_data", expect["report_data"]).ljust(128, "0"), "nonce": wanted.get("nonce") or claims["nonce"]})
        return [f"{name}: {claims.get(name)}, not {value}" for name, value in wanted.items() if claims.get(name) != value]

    def test_verdicts_and_claims(self) -> None:
        folder, count = vectors(), 0
        roots, wrong = roots_of(folder / "testroots"), list[Any]()
        for path in sorted((folder / "vectors").iterdir()):
            expect = json.loads((path / "expect.json").read_text())
            for wanted, anchors in ((expect, None), (expect.get("with_test_roots"), roots)):
                if wanted is None:
                    continue
                alone = expect["kind"] == "evidence"
                wanted_here = confbuild.Expectations(nonce=expect.get("verify_nonce"), evidence_only=alone)
                verdict = verdict_over(confbuild.read_bundle(str(path), evidence_only=alone), wanted_here, anchors=anchors)
                good, count = verdict.verdict == "passed", count + 1
                if "tdx" in str(expect["platform"]):
                    wrong += [(path.name, verdict)] if good or status_of(verdict, "platform") != "failed" else []
                elif good != (self.AMBIGUOUS[path.name] if "ambiguous" in expect else wanted["valid"]) or verdict.verdict == "simulated":
                    wrong += [(path.name, verdict)]
                elif good:
                    wrong += [(path.name, claims) for claims in self.wrong_claims(verdict, {**expect, **wanted})]
        assert wrong == [] and count >= 349

    def real(self, name: str) -> confbuild.BundleFiles:
        """A bundle of the real service, as if its artifact, which is not in the folder, were there."""
        files = confbuild.read_bundle(str(real_bundle(name)))
        return files._replace(artifacts={subject["name"]: subject["digest"]["sha256"] for subject in json.loads(provenance_of(files))["subject"]})

    def test_a_whole_bundle_of_the_real_service(self) -> None:
        """With AMD's keys, as pinned; and no bit of it can be changed."""
        files = self.real("bundle-ripgrep-2026-07-noartifact")
        doc = json.loads(provenance_of(files))["predicate"]
        wanted = confbuild.Expectations(source_uri=doc["buildDefinition"]["externalParameters"]["source"]["uri"], builder_id=doc["runDetails"]["builder"]["id"],
                                        min_tcb=MILAN_TCB, require_tee=True)
        verdict = verdict_over(files, wanted)
        assert (verdict.verdict, failed_checks(verdict), status_of(verdict, "trust anchors")) == ("passed", set(), "passed")
        random_ = random.Random(5)
        for name, (data, put) in parts_of(files).items():
            for i in random_.sample(range(len(data)), 6):
                new = data[:i] + bytes((data[i] ^ 1 << random_.randrange(8),)) + data[i + 1:]
                if name == "pcr 3" or case_of_hex_alone(data, new) and name == "evidence":
                    continue
                assert verdict_over(put(new), wanted).verdict == "failed", (name, i)
        assert verdict_over(files, wanted, "2032-01-28T21:02:35Z").verdict == "failed" == verdict_over(files, wanted, "2025-01-28T21:02:33Z").verdict

    def test_a_compact_digest_of_the_real_service(self) -> None:
        files = self.real("bundle-ripgrep-legacy-compact-a")
        for allow, verdict, failed in ((False, "failed", {"provenance digest"}), (True, "passed", set())):
            got = verdict_over(files, confbuild.Expectations(allow_legacy_digest=allow))
            assert (got.verdict, failed_checks(got)) == (verdict, failed)
            assert next(check for check in got.checks if check.name == "provenance digest").detail.startswith("legacy compact digest: a compact form of")

    def test_revocation_lists_of_amd(self) -> None:
        """Of 2026-08, so valid no more; Genoa's names an ASK that is no longer in use."""
        folder, evidence_ = vectors(), confbuild.read_bundle(str(vectors() / "vectors" / "snp-genoa-v5-yaxi" / "evidence.json"), evidence_only=True)
        for name, revocation, list_ in (("amd-genoa-2026-08", "passed", "passed"), ("amd-milan-2026-08", "not checked", "passed"), ("neg-milan-sig", "not checked", "failed"),
                                        ("neg-attacker-empty", "not checked", "failed")):
            verdict = verdict_over(evidence_, confbuild.Expectations(require_crl=True, evidence_only=True), crls=[(name, (folder / "crl" / f"{name}.crl").read_bytes())])
            assert (status_of(verdict, "revocation"), status_of(verdict, f"revocation list file {name}")) == (revocation, list_)
            assert verdict.verdict == "failed" and ("revocation list age" in failed_checks(verdict)) == (revocation == "passed")
            crl = (name, (folder / "crl" / f"{name}.crl").read_bytes())
            for required in (False, True):
                got = verdict_over(evidence_, confbuild.Expectations(require_crl=required, evidence_only=True), "2026-08-25T00:00:00Z", crls=[crl])
                assert (got.verdict == "passed") == (list_ == "passed" and (revocation == "passed" or not required))

# endregion 12
# ==============================================================================
# region 13. Logging and processes
# ==============================================================================


DRIVER = """
import json, os, shutil, subprocess, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
import confbuild
def answer(value): print(json.dumps(value), flush=True)
"""
RUN = """
confbuild.guard_process()
confbuild.PIPE_GRACE_S = 0.2
lines = []
status, kept = confbuild.run_tool(["sh", "-c", sys.argv[2]], "/", dict(os.environ), lines.extend, sys.argv[3] == "keep")
answer([status, kept.decode(), lines[:9] + lines[-1:] if len(lines) > 9 else lines, len(confbuild.descendants(os.getpid()))])
"""
HELD = "confbuild: what sh left behind held its output open for 0 s after its end, and is killed"


def drive(code: str, *arguments: str, **environ: str) -> Any:
    """What code answers in a process of its own: run_tool kills all that descends from its caller."""
    done = subprocess.run([sys.executable, "-S", "-c", DRIVER + code, str(COMPILED.parent), *arguments], env={**os.environ, **environ}, timeout=PATIENCE, check=False,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def marked(mark: str) -> list[str]:
    """The living processes with mark in their environment: not what confbuild itself takes for its descendants."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if mark.encode() in path.read_bytes() else []
    return found


def lines_of(*blocks: bytes) -> list[str]:
    splitter = confbuild.LineSplitter()
    return [line for block in blocks for line in splitter.feed(block)] + splitter.end()


class TestLineSplitter:
    X = b"x" * confbuild.MAX_LINE

    @pytest.mark.parametrize("blocks, lines", [
        ([], []), ([b""], []), ([b"\n"], [""]), ([b"\r"], [""]), ([b"\r\n"], [""]), ([b"\r", b"\n"], [""]), ([b"\n\r"], ["", ""]),
        ([b"a\nb\r\nc\rd"], ["a", "b", "c", "d"]), ([b"a\n\n\nb\n"], ["a", "", "", "b"]), ([b"a\r\r\nb"], ["a", "", "b"]),
        ([b"a\r", b"\nb\n"], ["a", "b"]), ([b"a\r", b"b\n"], ["a", "b"]), ([b"a\r", b""], ["a"]), ([b"a", b"\r", b"\r", b"\n"], ["a", ""]),
        ([b"\xff\xc3\n"], ["\ufffd\ufffd"]), ([b"\xc3", b"\xa9\n"], ["\u00e9"]), ([b"a\x1b[31m\0\x0b\x0c\x85\n"], ["a\x1b[31m\0\x0b\x0c\ufffd"]),
        (["\u2028\x85\n".encode()], ["\u2028\x85"]),  # str.splitlines would end lines there
        ([X], [X.decode()]), ([X + b"\r\n"], [X.decode()]), ([X + b"\r", b"\n"], [X.decode()]), ([X, b"\r", b"y"], [X.decode(), "y"]),
        ([X + b"y\n"], [X.decode(), "y"]), ([X, b"\n\n"], [X.decode(), ""]), ([X * 2 + b"\n"], [X.decode()] * 2),
        ([X[1:] + "\u00e9".encode() + b"\n"], [X[1:].decode(), "\u00e9"]), ([X[3:] + "\U0001f600".encode()], [X[3:].decode(), "\U0001f600"]),
        ([X[4:] + "\U0001f600".encode()], [X[4:].decode() + "\U0001f600"])])
    def test_known_answers(self, blocks: list[bytes], lines: list[str]) -> None:
        assert lines_of(*blocks) == lines

    @staticmethod
    def expected(data: bytes, limit: int) -> list[str]:
        """The same, slowly: character by character. Only for UTF-8."""
        lines = []
        ended = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode().split("\n")
        for line in ended[:-1] if ended[-1] == "" else ended:
            piece = ""
            for character in line:
                if len((piece + character).encode()) > limit:
                    lines.append(piece)
                    piece = ""
                piece += character
            lines.append(piece)
        return lines

    @given(st.lists(st.sampled_from([b"\r", b"\n", b"a", b"xxxxxxx", "\u00e9".encode(), "\U0001f600".encode() * 5, b"\xff\x80"]), max_size=40),
           st.lists(st.integers(0, 300), max_size=12))
    def test_blocks_do_not_matter(self, tokens: list[bytes], cuts: list[int]) -> None:
        data = b"".join(tokens)
        at = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(confbuild, "MAX_LINE", 16)
            whole = lines_of(data)
            assert lines_of(*(data[a:b] for a, b in itertools.pairwise(at))) == whole
            assert lines_of(*(data[i:i + 1] for i in range(len(data)))) == whole
            if b"\xff" not in data:
                assert whole == self.expected(data, 16)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc and subreapers")
class TestProcesses:
    @pytest.mark.parametrize("script, keep, status, kept, lines", [
        ("echo 1; echo 2 >&2; echo 3; echo 4 >&2", "", 0, "", ["1", "2", "3", "4"]),
        ("echo out; echo err >&2; echo out", "keep", 0, "out\nout\n", ["err", "out", "out"]),
        ("printf 'a\\r\\nb'; exit 3", "", 3, "", ["a", "b"]),
        ("echo a; kill -9 $$", "", -9, "", ["a"]),
        ("cat; pwd", "", 0, "", ["/"]),
        ("sleep 60 & echo done", "", 0, "", ["done", HELD]),
        ("setsid sleep 60 & echo done", "", 0, "", ["done", HELD]),
        ("sleep 60 >&2 & echo done", "keep", 0, "done\n", [HELD, "done"]),
        ("setsid sh -c 'setsid sleep 60 & exec sleep 60' >/dev/null 2>&1 & echo done", "", 0, "", ["done"])])
    def test_run_tool(self, script: str, keep: str, status: int, kept: str, lines: list[str]) -> None:
        mark = f"mark-{os.urandom(8).hex()}"
        assert drive(RUN, script, keep, MARK=mark) == [status, kept, lines, 0]
        assert marked(mark) == []

    def test_output_that_nobody_wants(self) -> None:
        """If a line cannot be handed on, the tool is killed with all that it has started."""
        mark = f"mark-{os.urandom(8).hex()}"
        call = """
confbuild.guard_process()
def refuse(lines): raise ValueError("no more")
try:
    confbuild.run_tool(["sh", "-c", "setsid sleep 60 & echo one; exec sleep 60"], "/", dict(os.environ), refuse)
except ValueError as e:
    answer([str(e), len(confbuild.descendants(os.getpid()))])"""
        assert drive(call, MARK=mark) == ["no more", 0] and marked(mark) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        """A full disk is told from whatever else a write can meet, by the error and by a try."""
        assert confbuild.has_room(str(tmp_path)) and list(tmp_path.iterdir()) == []
        assert confbuild.has_room(str(tmp_path / "nowhere"))  # that is another complaint
        full = OSError(number, os.strerror(number))
        assert confbuild.lacks_room(full, str(tmp_path)) and not confbuild.lacks_room(OSError(errno.EIO, "I/O error"), str(tmp_path))
        assert not confbuild.lacks_room(confbuild.BuildFailed("BuildError", "no"), str(tmp_path))
        monkeypatch.setattr(tempfile, "TemporaryFile", raising(full))
        assert not confbuild.has_room(str(tmp_path)) and confbuild.lacks_room(confbuild.BuildFailed("BuildError", "no"), str(tmp_path))
        with pytest.raises(confbuild.BuildFailed, match=f"^the disk of the server's TMPDIR is full: {os.strerror(number)}$") as caught, confbuild.room_on(confbuild.TMPDIR):
            raise full
        assert caught.value.error_type == "LimitError"
        with pytest.raises(OSError, match="I/O error"), confbuild.room_on(confbuild.TMPDIR):
            raise OSError(errno.EIO, "I/O error")

    @pytest.mark.parametrize("how", ["", "setsid "])
    def test_a_flood_from_a_grandchild_ends(self, how: str) -> None:
        mark = f"mark-{os.urandom(8).hex()}"
        status, _, lines, left = drive(RUN, f"{how}sh -c 'while :; do echo flood; done' & exit 0", "", MARK=mark)
        assert (status, set(lines[:-1]), lines[-1], left, marked(mark)) == (0, {"flood"}, HELD, 0, [])

    def test_capture(self) -> None:
        call = "confbuild.PIPE_GRACE_S = 0.2\nanswer([*map(str, confbuild.capture(['sh', '-c', sys.argv[2]], '/', dict(os.environ)))])"
        assert drive(call, "echo out; echo err >&2; exit 4") == ["4", "b'out\\n'", "err"]
        assert drive(call, "head -c 9000 /dev/zero | tr '\\0' e >&2; echo last >&2") == ["0", "b''", "e" * 4091 + "last"]
        assert drive(call, "cat; kill -15 $$") == ["-15", "b''", ""]
        assert drive(call, "(sleep 3; echo late) & echo soon") == ["0", "b'soon\\n'", ""], "it waited for what a program left behind"

    def test_capture_has_a_limit(self) -> None:
        for size, expected in ((100, [0, 100]), (101, ["LimitError", "sh printed more than 100 bytes"])):
            assert drive("""
try:
    status, output, _ = confbuild.capture(["sh", "-c", f"head -c {sys.argv[2]} /dev/zero"], "/", dict(os.environ), max_bytes=100)
    answer([status, len(output)])
except confbuild.BuildFailed as e:
    answer([e.error_type, str(e)])""", str(size)) == expected

    def test_capture_watches(self) -> None:
        """What watch raises ends the program and what it has started; the errors that a program prints count as well, and only their end is held."""
        mark = f"mark-{os.urandom(8).hex()}"
        for command, watch, expected in (("sleep 300 | sleep 300", "lambda: 1 / 0", "ZeroDivisionError division by zero"),
                                         ("cat /dev/zero >&2", "lambda: None", "BuildFailed sh printed more than 1000000 bytes")):
            assert drive("""
try:
    confbuild.capture(["sh", "-c", sys.argv[2]], "/", dict(os.environ), 10 ** 6, watch=eval(sys.argv[3]))
except Exception as e:
    answer(f"{type(e).__name__} {e}")""", command, watch, MARK=mark) == expected
            assert marked(mark) == []

    def test_kill_all_ends_a_chain_of_forks(self, tmp_path: Path) -> None:
        """Fifty generations, each in a session of its own, of which some are born while the first ones die."""
        (tmp_path / "fork").write_text('[ "$1" -gt 0 ] && setsid sh "$0" $(($1 - 1)) &\nsleep 60\n')
        mark = f"mark-{os.urandom(8).hex()}"
        drive("""
confbuild.guard_process()
subprocess.Popen(["sh", sys.argv[2], "50"])
while len(confbuild.descendants(os.getpid())) < 8:
    pass
confbuild.kill_all(lambda: confbuild.descendants(os.getpid()))
answer(None)
os._exit(0)""", str(tmp_path / "fork"), MARK=mark)
        assert marked(mark) == []

    def test_kill_all_gives_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What cannot be killed holds nobody up for more than two seconds; a process id that is gone is no error."""
        now, gone = [0.0], 0x7fffffff
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
        confbuild.kill_all(lambda: [gone])
        assert 2 <= now[0] < 2.1

    def test_descendants_without_a_first_thread(self) -> None:
        """A process whose first thread has ended is a zombie in /proc, and lives, with all that is below it."""
        code = ("import ctypes, subprocess, threading, time; subprocess.Popen(['sleep', '300']); threading.Thread(target=lambda: time.sleep(300)).start(); "
                "ctypes.CDLL(None).syscall(60, 0)")
        with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as child:
            try:
                wait_for(lambda: ") Z " in Path(f"/proc/{child.pid}/stat").read_text())
                found = confbuild.descendants(child.pid)
                assert child.pid in confbuild.descendants(os.getpid()) and len(found) == 1
                confbuild.kill_all(lambda: confbuild.descendants(child.pid))
                wait_for(lambda: not living(found[0]))
            finally:
                os.killpg(child.pid, signal.SIGKILL)

    def test_descendants_with_a_hostile_name(self, tmp_path: Path) -> None:
        program = tmp_path / ") Z 1 ("
        shutil.copy(shutil.which("sleep") or "", program)
        with subprocess.Popen([str(program), "60"]) as child:
            try:
                wait_for(lambda: Path(f"/proc/{child.pid}/comm").read_text().strip() == program.name)
                assert child.pid in confbuild.descendants(os.getpid())
                assert confbuild.descendants(child.pid) == []
            finally:
                child.kill()


class TestFiles:
    def test_write_durably(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, calls = tmp_path / "f", list[str]()
        fsync, replace = os.fsync, os.replace

        def traced_fsync(fd: int) -> None:
            calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
            fsync(fd)

        def traced_replace(a: str, b: str) -> None:
            calls.append("replace")
            replace(a, b)
        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(os, "replace", traced_replace)
        for data in (b"one", b""):
            confbuild.write_durably(str(path), data)
            assert path.read_bytes() == data
        assert calls == ["f.tmp", "replace", tmp_path.name] * 2, "the file, its name, the directory"
        assert os.listdir(tmp_path) == ["f"]

    def test_a_failed_write_keeps_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        confbuild.write_durably(str(tmp_path / "f"), b"old")

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            confbuild.write_durably(str(tmp_path / "f"), b"new")
        assert (tmp_path / "f").read_bytes() == b"old"

    def test_file_sha256(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"abc")  # FIPS 180-2, B.1
        assert confbuild.file_sha256(str(tmp_path / "f")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def test_remove_tree_follows_no_link(self, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "file").write_text("kept")
        tree = tmp_path / "tree"
        (tree / "a/b").mkdir(parents=True)
        (tree / "a/b/link").symlink_to(kept)
        (tree / "a/file").symlink_to(kept / "file")
        (tree / "link").symlink_to(kept)
        os.mkfifo(tree / "pipe")
        (tmp_path / "single").symlink_to(kept)
        (tmp_path / "dangling").symlink_to("nowhere")
        (tmp_path / "plain").write_text("")
        for name in ("tree", "single", "dangling", "plain", "missing"):
            confbuild.remove_tree(str(tmp_path / name))
        assert os.listdir(tmp_path) == ["kept"] and (kept / "file").read_text() == "kept"

    def test_remove_tree_of_folders_that_were_closed(self) -> None:
        """As another user: root's permissions do not bind. The folder above keeps its own mode."""
        assert drive("""
top = tempfile.mkdtemp()
try:
    for name in ("tree", "tree/a", "tree/a/b", "tree/a/b/c", "tree/open"):
        os.mkdir(os.path.join(top, name))
    open(top + "/tree/a/b/c/file", "w").close()
    paths = [path for path, _, _ in os.walk(top, topdown=False)]
    if os.geteuid() == 0:
        for path in [top + "/tree/a/b/c/file", *paths]:
            os.chown(path, 65534, 65534)
    for path in paths[:-1]:
        os.chmod(path, 0)
    os.chmod(top, 0o755)
    if os.geteuid() == 0:
        os.seteuid(65534)
    confbuild.remove_tree(top + "/tree")
    answer([os.listdir(top), os.stat(top).st_mode & 0o7777])
finally:
    os.seteuid(os.getuid())
    subprocess.run(["rm", "-rf", top])""") == [[], 0o755]

    def test_remove_tree_of_a_deep_tree(self, tmp_path: Path) -> None:
        """Deeper than Python's stack and longer than PATH_MAX, as a build can make it."""
        drive("""
os.chdir(sys.argv[2])
for _ in range(1100):
    os.mkdir("dddd")
    os.chdir("dddd")
open("file", "w").close()
answer(None)""", str(tmp_path))
        try:
            confbuild.remove_tree(str(tmp_path / "dddd"))
            assert os.listdir(tmp_path) == []
        finally:
            subprocess.run(["rm", "-rf", str(tmp_path / "dddd")], check=True)

    def test_remove_tree_leaves_the_folder_above_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a live process keeps filling the tree, root must not change the mode of what may be /tmp."""
        (tmp_path / "above/tree").mkdir(parents=True)
        (tmp_path / "above").chmod(0o1777)

        def busy(path: Any, *_: Any, **__: Any) -> None:
            raise OSError(39, "Directory not empty", path)
        monkeypatch.setattr(os, "rmdir", busy)
        with contextlib.suppress(OSError):
            confbuild.remove_tree(str(tmp_path / "above/tree"))
        assert (tmp_path / "above").stat().st_mode & 0o7777 == 0o1777

    def test_own_program(self, tmp_path: Path) -> None:
        """Neither the current directory nor PYTHON* reach it."""
        for name in ("json.py", "re.py", "sitecustomize.py", "runpy.py"):
            (tmp_path / name).write_text("print('hostile')\n")
        program = confbuild.own_program()
        done = subprocess.run([*program, "--version"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PYTHONINSPECT": "1"},
                              capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert program[0] == sys.executable and done.stdout.startswith(f"confbuild {confbuild.__version__}"), done
        assert hashlib.sha256(confbuild.own_source()).hexdigest() in done.stdout and confbuild.own_source() == FILE.read_bytes()

    def test_logger(self) -> None:
        assert confbuild.logger().name == "confbuild"


class FakeLibc:
    """A kernel with Landlock of this ABI, which notes what it is asked; abi of less than 0: the error of who asks for it."""

    def __init__(self, abi: int) -> None:
        self.abi, self.asked = abi, list[tuple[Any, ...]]()

    def note(self, *asked: Any) -> int:
        self.asked.append((threading.current_thread().name.partition("_")[0], *asked))
        return 0

    def syscall(self, number: int, *arguments: Any) -> int:
        if number == 444 and arguments == (None, 0, 1):
            ctypes.set_errno(-min(self.abi, 0))
            return self.abi if self.abi > 0 else -1
        if number == 444:
            self.note("create", *struct.unpack("=QQQ", arguments[0]))
            return os.open("/dev/null", os.O_RDONLY)
        if number == 445:
            rights, fd = struct.unpack("=Qi", arguments[2])
            return self.note("rule", os.readlink(f"/proc/self/fd/{fd}"), rights)
        return self.note({446: "restrict"}[number])

    def prctl(self, option: int, *arguments: Any) -> int:
        return self.note({38: "no_new_privs", 22: "seccomp"}[option])

    def capget(self, header: Any, data: Any) -> int:
        data[:] = [0xFFFFFFFF] * 6
        return self.note("capget")

    def capset(self, header: Any, data: Any) -> int:
        return self.note("capset", *data)


def run_filter(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What seccomp's program (of the kinds of instructions that it may have) answers to a system call: an errno, 0 = it is let through."""
    rows = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    at = loaded = 0
    while True:
        code, yes, no, k = rows[at]
        at += 1
        if code == 0x20:
            loaded = struct.unpack_from("=I", data, k)[0]
        elif code == 0x06:
            return 0 if k == 0x7FFF0000 else k & 0xFFFF
        else:
            at += yes if {0x15: loaded == k, 0x35: loaded >= k, 0x45: bool(loaded & k)}[code] else no


FORBIDDEN: Mapping[str, Mapping[str, int]] = {
    "x86_64": {"modify_ldt": 154, "add_key": 248, "request_key": 249, "keyctl": 250, "perf_event_open": 298, "fanotify_init": 300, "open_by_handle_at": 304, "bpf": 321,
               "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    "aarch64": {"add_key": 217, "request_key": 218, "keyctl": 219, "perf_event_open": 241, "fanotify_init": 262, "open_by_handle_at": 265, "bpf": 280,
                "userfaultfd": 282, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has Landlock")
class TestSandbox:
    @pytest.mark.parametrize(("machine", "arch", "calls"), [
        ("x86_64", 0xC000003E, {"prlimit": 302, "socket": 41, "pair": 53, "sendto": 44, "sendmsg": 46, "sendmmsg": 307, "keyctl": 250, "read": 0, "kill": 62}),
        ("aarch64", 0xC00000B7, {"prlimit": 261, "socket": 198, "pair": 199, "sendto": 206, "sendmsg": 211, "sendmmsg": 269, "keyctl": 219, "read": 63, "kill": 129})])
    def test_filter(self, monkeypatch: pytest.MonkeyPatch, machine: str, arch: int, calls: Mapping[str, int]) -> None:
        """Source of the numbers: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h of Linux."""
        fast = 0x20000000
        table: list[tuple[str, tuple[int, ...], int]] = [
            ("prlimit", (0, 7, 1), 0), ("prlimit", (1, 0, 0), errno.EPERM), ("prlimit", (1 << 32, 0, 0), 0),  # a pid has 32 bits
            ("socket", (2, 1, 0), 0), ("socket", (10, 1 | 0x80000, 6), 0), ("socket", (16, 3, 0), 0), ("socket", (2, 1, 262), errno.EPROTONOSUPPORT),
            ("socket", (43, 1, 0), errno.EAFNOSUPPORT), ("socket", (1, 1, 0), errno.EACCES), ("pair", (1, 1 | 0x80800, 0), 0), ("pair", (1, 5, 0), 0),
            ("pair", (1, 2 | 0x80000, 0), errno.EACCES), ("pair", (1, 3, 0), errno.EACCES),
            ("sendto", (3, 0, 1, 0x4000), 0), ("sendto", (3, 0, 1, fast | 0x4000), errno.EOPNOTSUPP), ("sendmsg", (3, 0, fast), errno.EOPNOTSUPP),
            ("sendmsg", (3, fast, 0), 0), ("sendmmsg", (3, 0, 1, fast), errno.EOPNOTSUPP), ("sendmmsg", (3, 0, fast, 0), 0),
            ("keyctl", (0,), errno.ENOSYS), ("read", (0, 0, 0), 0), ("kill", (-1 & 0xFFFFFFFF, 9), 0)]
        program = confbuild.seccomp_filter(machine, False)
        assert [run_filter(program, arch, calls[name], *arguments) for name, arguments, _ in table] == [number for _, _, number in table]
        assert {n for n in range(600) if run_filter(program, arch, n) == errno.ENOSYS} == set(FORBIDDEN[machine].values())
        assert run_filter(program, 0x40000003, calls["read"]) == errno.ENOSYS  # another architecture, of other numbers
        assert run_filter(program, arch, 0x40000000 | calls["read"]) == errno.ENOSYS  # x32
        shared = confbuild.seccomp_filter(machine, True)  # for nix's daemon
        assert [run_filter(shared, arch, calls[name], *arguments) for name, arguments in (("socket", (1, 1, 0)), ("pair", (1, 2, 0)), ("socket", (2, 1, 262)))] == [
            0, 0, errno.EPROTONOSUPPORT]
        assert confbuild.seccomp_filter("riscv64", False) == b""
        monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
        assert confbuild.seccomp_filter(machine, False) == b""

    @pytest.mark.parametrize(("abi", "kept"), [(1, "limits"), (2, "limits"), (3, "files, limits"), (4, "files, ports, limits"), (5, "files, ports, limits"),
                                               (6, "files, sockets, signals, ports, limits"), (9, "files, sockets, signals, ports, limits")])
    def test_protections(self, abi: int, kept: str) -> None:
        """Which ABI of Landlock has what: Documentation/userspace-api/landlock.rst, "Previous limitations"."""
        found = confbuild.judge_protections(abi, "", "", "")
        assert confbuild.protection_text(found).partition(";")[0] == "host protected: " + kept
        assert abi >= 6 or found["signals"] == f"Landlock here has ABI {abi}, and ABI 6 is needed (Linux 6.12)"
        assert confbuild.judge_protections(abi, "", "no table", "taken")["limits"] == ""

    def test_protections_that_are_missing(self) -> None:
        assert confbuild.judge_protections(7, "", "no table", "taken") == {"files": "", "sockets": "no table", "signals": "no table", "ports": "no table", "limits": ""}
        assert confbuild.judge_protections(7, "", "", "taken") == {"files": "", "sockets": "", "signals": "", "ports": "taken", "limits": ""}
        assert confbuild.judge_protections(0, "no Landlock", "", "") == {**dict.fromkeys(("files", "sockets", "signals", "ports"), "no Landlock"), "limits": ""}
        assert confbuild.protection_text(confbuild.judge_protections(0, "no", "", "")) == "host protected: limits; not protected: files, sockets, signals, ports"

    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])  # built without, disabled, refused by a container's seccomp
    def test_no_landlock(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        monkeypatch.setattr(confbuild, "_libc", lambda: FakeLibc(-number))
        monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(machine="riscv64"))
        assert confbuild.probe_sandbox() == (confbuild.Sandbox(), f"this kernel has no Landlock (landlock_create_ruleset: {os.strerror(number)})",
                                             "system calls of riscv64 are not known here")
        monkeypatch.setattr(sys, "platform", "darwin")
        assert confbuild.probe_sandbox() == (confbuild.Sandbox(), "only Linux has Landlock", "only Linux has seccomp")

    def test_no_layer_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The trial takes as many layers as a build: one that is left is not enough."""
        libc, left = FakeLibc(7), [0]
        monkeypatch.setattr(confbuild, "_libc", lambda: libc)

        def note(*asked: Any) -> int:
            left[0] -= asked == ("restrict",)
            ctypes.set_errno(errno.E2BIG)
            return -1 if left[0] < 0 else 0

        monkeypatch.setattr(libc, "note", note)
        for layers, problem in ((1, "landlock_restrict_self: Argument list too long"), (2, "")):
            left[0] = layers
            assert confbuild.probe_sandbox()[1] == problem
        left[0] = 0
        with pytest.raises(confbuild.BuildFailed, match="the sandbox cannot be entered: landlock_restrict_self: Argument list too long") as caught:
            confbuild.Confinement(confbuild.Sandbox(7), "/nonexistent", ()).start(["/bin/true"])
        assert caught.value.error_type == "VmError"

    @pytest.mark.parametrize(("abi", "handled", "scoped"), [
        (1, 0x1FFF, 0), (2, 0x3FFF, 0), (3, 0x7FFF, 0), (4, 0x7FFF, 0), (5, 0xFFFF, 0), (6, 0xFFFF, 3), (7, 0xFFFF, 3)])
    def test_rules(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abi: int, handled: int, scoped: int) -> None:
        """What the kernel is asked, by one thread, before it starts the first program; a second one is started in the same sandbox."""
        libc = FakeLibc(abi)
        monkeypatch.setattr(confbuild, "_libc", lambda: libc)
        monkeypatch.setattr(confbuild, "_private", lambda _: iter(()))
        for name in ("work/tmp/", "tools/", "hidden/"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "file").touch()
        ports = os.open("/dev/null", os.O_RDONLY)
        box = confbuild.Sandbox(abi, True, [str(tmp_path / "tools"), str(tmp_path / "file"), str(tmp_path / "gone"), str(tmp_path / "hidden")],
                                [str(tmp_path / "hidden") + "/"], ports)
        confined = confbuild.Confinement(box, str(tmp_path / "work"), ("tmp", "gone"))
        for _ in range(2):
            assert confined.start([sys.executable, "-c", "pass"]).wait() == 0
        assert {who for who, *_ in libc.asked} == {"sandbox"}
        asked = [what for _, *what in libc.asked]
        rules = {path: rights for name, *rest in asked if name == "rule" for path, rights in [rest]}
        writable, device = handled & ~(1 << 6 | 1 << 11 | 1 << 15), handled & (1 << 1 | 1 << 2 | 1 << 14 | 1 << 15)
        assert {path: rights for path, rights in rules.items() if not path.startswith("/dev/")} == {
            str(tmp_path / "work/tmp"): writable, str(tmp_path / "tools"): 0b1101, str(tmp_path / "file"): 0b101}
        assert rules["/dev/null"] == device and "/dev/shm" not in rules and "/dev/pts" not in rules
        assert [what for what in asked if what[0] != "rule"] == [
            ["create", handled, 0, scoped], ["no_new_privs"], ["capget"], ["capset", 0xFB, 0xFB, 0xFB, 0, 0, 0], ["restrict"], ["restrict"], ["seccomp"]]

    def test_nix(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """nix writes in its store, and needs terminals; with a daemon, Unix sockets instead; what cannot be made is nix's to tell."""
        for daemon in (False, True):
            monkeypatch.setattr(confbuild, "_confinements", [confined := confbuild.Confinement(confbuild.Sandbox(), "/w", ("tmp",))])
            confbuild.open_to_build([])
            assert (confined.writable, confined.unix, "/dev/pts" in confined.devices) == (["/w/tmp"], False, False)
            if daemon:
                write_files(tmp_path, {"state/daemon-socket/socket": ""})
            folders = [str(tmp_path / "store"), str(tmp_path / "state"), "/proc/nowhere"]
            confbuild.open_to_build(folders)
            assert (confined.writable, confined.unix, "/dev/pts" in confined.devices) == (["/w/tmp", *folders], daemon, not daemon)
            assert os.path.isdir(folders[0]) and os.path.isdir(folders[1])

    def test_what_is_hidden(self, tmp_path: Path) -> None:
        """A folder that hides nothing is allowed whole, another by its parts; links in there are not followed."""
        files = {"opt/a/x": "", "opt/b/state/jobs": "", "opt/b/statement": "", "opt/b/other": "", "home/x": ""}
        write_files(tmp_path, files)
        (tmp_path / "opt/b/link").symlink_to(tmp_path / "home")
        root = str(tmp_path)

        def visible(path: str, *hidden: str) -> set[str]:
            return {found.removeprefix(root) for found in confbuild._visible(root + path, [root + one for one in hidden])}

        assert visible("/opt", "/opt/b/state/") == {"/opt/a", "/opt/b/other", "/opt/b/statement"}
        assert visible("/opt", "/opt/b/state") == {"/opt/a", "/opt/b/other"}  # the beginning of a name
        assert visible("/opt", "/home/") == {"/opt"} and visible("/opt/b/state", "/opt/b/state/") == visible("/opt/b/state/jobs", "/opt/b/state/") == set()
        assert visible("/opt/a", "/opt/b/state/") == {"/opt/a"}
        assert "/" not in confbuild._visible("/", [root + "/"]) and "/usr" in confbuild._visible("/", [root + "/"])

    def test_what_only_some_may_read(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"passwd": "", "shadow": "", "ssl/certs/a": "", "ssl/private/key": "", "ssh/host_key": ""})
        for name, mode in (("shadow", 0o640), ("ssl/private", 0o710), ("ssh/host_key", 0o600)):
            (tmp_path / name).chmod(mode)
        (tmp_path / "link").symlink_to("shadow")
        assert set(confbuild._private(str(tmp_path))) == {str(tmp_path / name) + "/" for name in ("shadow", "ssl/private", "ssh/host_key")}
        assert list(confbuild._private(str(tmp_path / "gone"))) == []

    def test_what_is_readable(self, tmp_path: Path) -> None:
        """The toolchain, wherever in the home it lies, and nothing else there."""
        home = tmp_path / "home"
        for name in (".cargo/bin", ".cargo/registry", ".rustup/toolchains/stable", "own-rust/bin", ".pyenv/shims", ".pyenv/versions/3.11", ".pyenv/libexec",
                     ".nvm/versions/node/v18/bin", ".nvm/versions/node/v18/lib", ".local/bin", ".local/lib", ".local/share", "bin", "lib", "share", "java", ".ssh"):
            (home / name).mkdir(parents=True)
        (home / ".pyenv/version").touch()
        (home / ".rustup/toolchains/mine").symlink_to(home / "own-rust")
        (tmp_path / "linked").symlink_to(home / ".nvm/versions/node/v18/bin")
        path = ":".join([str(home / ".cargo/bin"), str(home / ".pyenv/shims"), str(tmp_path / "linked"), str(home / ".local/bin"), str(home), str(tmp_path), "", ".",
                         str(home / "bin"), str(home / "gone/bin"), "/usr/bin"])
        env = {"PATH": path, "RUSTUP_HOME": str(home / ".rustup"), "JAVA_HOME": str(home / "java"), "LANG": "C", "OLDPWD": str(home), "ROOT": "/", "SOME": "bin"}
        found = confbuild.readable_paths(env, str(home))
        assert found[:len(confbuild.SYSTEM_FOLDERS)] == list(confbuild.SYSTEM_FOLDERS) and "/usr/bin" in found and "/" not in found
        assert {one.removeprefix(str(home)) for one in found if one.startswith(str(tmp_path))} == {
            "/.cargo/bin", "/.rustup", "/own-rust", "/java", "/bin", "/.pyenv/shims", "/.pyenv/versions", "/.pyenv/version", "/.pyenv/libexec",
            "/.nvm/versions/node/v18/bin", "/.nvm/versions/node/v18/lib", "/.local/bin", "/.local/lib"}

    def test_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The number of processes is beyond those that the user has, as many threads as RLIMIT_NPROC counts; a lower limit stays."""
        limits = {resource.RLIMIT_CORE: resource.RLIM_INFINITY, resource.RLIMIT_FSIZE: resource.RLIM_INFINITY, resource.RLIMIT_NPROC: resource.RLIM_INFINITY}
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
        monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.update({kind: pair[0]}) if pair[0] == pair[1] else None)
        monkeypatch.setattr(confbuild, "_confinements", [])
        monkeypatch.setattr(confbuild, "_count_threads", lambda: 300)
        confbuild.confine_builds(confbuild.Sandbox(file_bytes=1000, processes=50), "/w", ("tmp",))
        assert limits == {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 1000, resource.RLIMIT_NPROC: 350}
        confbuild.confine_builds(confbuild.Sandbox(), "/w", ())
        assert limits == {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 1000, resource.RLIMIT_NPROC: 350}
        assert [confined.writable for confined in confbuild._confinements] == [["/w/tmp"], []]

    def test_count_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert confbuild._count_threads() >= 1
        with subprocess.Popen([sys.executable, "-c", ("import threading; e = threading.Event(); [threading.Thread(target=e.wait, daemon=True).start() for _ in range(200)];"
                                                     "print(1, flush=True); input()")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"1\n"
            with monkeypatch.context() as patch:
                patch.setattr(os, "listdir", lambda _: [str(child.pid), "self", "4194305"])  # others of this user come and go
                assert confbuild._count_threads() == 201
                patch.setattr(os, "getuid", lambda: 54321)
                assert confbuild._count_threads() == 0
            child.communicate(b"\n")

# endregion 13
# ==============================================================================
# region 14. Source
# ==============================================================================


Member = tuple[str, str, str]  # (name, "file", "exec", "dir", "link", "hard", "fifo" or "char", contents or target)
TAR_TYPES = {"file": tarfile.REGTYPE, "exec": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE,
             "fifo": tarfile.FIFOTYPE, "char": tarfile.CHRTYPE}
ZIP_MODES = {"file": 0o100644, "exec": 0o100755, "dir": 0o40755, "link": 0o120777, "fifo": 0o10644, "char": 0o20644}


def tar_bytes(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file, not compressed. A NUL cannot stand in the name field, but in a pax record."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name.replace("\0", "_"))
            info.pax_headers = {"path": name} if "\0" in name else {}
            data = content.encode() if kind in ("file", "exec") else b""
            info.type, info.size, info.mode = TAR_TYPES[kind], len(data), 0o755 if kind == "exec" else 0o644
            info.linkname = content if kind in ("link", "hard") else ""
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_bytes(*members: Member, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A ZIP file as Unix makes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of duplicates
        for name, kind, content in members:
            info = zipfile.ZipInfo(name.replace("\0", "\x01") + "/" * (kind == "dir"))
            info.create_system, info.external_attr, info.compress_type = 3, ZIP_MODES[kind] << 16, method
            archive.writestr(info, content)
    return out.getvalue().replace(b"\x01NUL", b"\0NUL")


def pack(form: str, *members: Member) -> bytes:
    return zip_bytes(*members) if form == "zip" else gzip.compress(tar_bytes(*members), 1)


def unpack(folder: Path, data: bytes, **limits: int) -> dict[str, str]:
    """What an archive becomes: the mode and the contents or target of each path."""
    (folder / "archive").write_bytes(data)
    (folder / "root").mkdir()
    confbuild.unpack_archive(str(folder / "archive"), str(folder / "root"), **limits)
    found = {}
    for path in sorted((folder / "root").rglob("*")):
        mode = path.lstat().st_mode
        content = f"-> {os.readlink(path)}" if path.is_symlink() else "" if path.is_dir() else path.read_text(errors="replace")
        found[str(path.relative_to(folder / "root"))] = f"{mode if not path.is_symlink() else 0o120777:o} {content}".strip()
    return found


def refused(folder: Path, data: bytes, error_type: str, fragment: str, **limits: int) -> None:
    with pytest.raises(confbuild.BuildFailed, match=re.escape(fragment)) as caught:
        unpack(folder, data, **limits)
    assert caught.value.error_type == error_type, caught.value


def files(*names: str) -> tuple[Member, ...]:
    return tuple((name, "file", "x") for name in names)


PATHS: list[tuple[tuple[Member, ...], str, str]] = [
    (files("/etc/x"), "SourceError", "'/etc/x' is an absolute path"), (files("C:/x"), "SourceError", "is an absolute path"),
    (files("c:x"), "SourceError", "is an absolute path"), (files("../x"), "SourceError", "'../x' is not a plain relative path"),
    (files("a/../../x"), "SourceError", "not a plain relative path"), (files("a/b/.."), "SourceError", "not a plain relative path"),
    ((("..", "dir", ""),), "SourceError", "not a plain relative path"), (files("a//b"), "SourceError", "not a plain relative path"),
    (files("a\\..\\b"), "SourceError", "has a control character or a backslash"), (files("a\nb"), "SourceError", "has a control character"),
    (files("a\x7f"), "SourceError", "has a control character"), (files("a\0NUL"), "SourceError", "has a control character"),
    (files("a", "a"), "SourceError", "'a' occurs twice"), (files("a", "./a"), "SourceError", "'a' occurs twice"),
    (files("a", "a/b"), "SourceError", "'a' occurs twice"), (files("a/b", "a"), "SourceError", "'a' occurs twice"),
    ((("a", "dir", ""), *files("a")), "SourceError", "'a' occurs twice"), ((*files("a"), ("a", "link", "b")), "SourceError", "'a' occurs twice"),
    (files("a", "A"), "SourceError", "'A' and 'a' differ only in case"), (files("d/x", "D/y"), "SourceError", "'D' and 'd' differ only in case"),
    (files("stra\u00dfe", "STRASSE"), "SourceError", "differ only in case"), (files("\u00e9", "e\u0301"), "SourceError", "differ only in case"),
    (files("x" * 256), "LimitError", "has a component of more than 255 bytes"), (files("\u00e9" * 128), "LimitError", "more than 255 bytes"),
    (files("/".join("x" * confbuild.MAX_DEPTH) + "/f"), "LimitError", f"lies deeper than {confbuild.MAX_DEPTH} folders"),
    (files("/".join(["x" * 250] * 20)), "LimitError", "long"),
    ((("l", "link", "/etc/passwd"),), "SourceError", "'l' is a link to '/etc/passwd', outside of the archive"),
    ((("l", "link", "../x"),), "SourceError", "outside of the archive"), ((("d/l", "link", "../../x"),), "SourceError", "outside of the archive"),
    ((("d", "dir", ""), ("a", "link", "d/.."), ("b", "link", "a/../x")), "SourceError", "'b' is a link to 'a/../x', outside"),
    ((("a", "link", "missing/../../x"),), "SourceError", "outside"), ((("a", "link", "a/../../x"),), "SourceError", "outside"),
    ((("a", "link", ""),), "SourceError", "'a': no link can point to ''"), ((("a", "link", "x" * 4096),), "SourceError", "'a': no link can point"),
    ((("l", "link", "/tmp"), *files("l/x")), "SourceError", "'l' occurs twice"),
    (tuple((f"l{i}", "link", f"l{i + 1}") for i in range(1100)), "SourceError", "link"),
    ((("p", "fifo", ""),), "SourceError", "'p' is a device"), ((("c", "char", ""),), "SourceError", "'c' is a device")]
HARD: list[tuple[tuple[Member, ...], str, str]] = [
    ((("h", "hard", "/etc/passwd"),), "SourceError", "'/etc/passwd' is an absolute path"),
    ((("h", "hard", "../x"),), "SourceError", "'../x' is not a plain relative path"),
    ((("h", "hard", "f"), *files("f")), "SourceError", "'h' is a link to 'f', which is no earlier file of the archive"),
    ((("h", "hard", "missing"),), "SourceError", "no earlier file"), ((("h", "hard", "h"),), "SourceError", "no earlier file"),
    ((("l", "link", "f"), *files("f"), ("h", "hard", "l")), "SourceError", "no earlier file"),
    ((("d", "dir", ""), ("h", "hard", "d")), "SourceError", "no earlier file"), ((*files("a"), ("h", "hard", "A")), "SourceError", "no earlier file"),
    ((*files("a"), ("a", "hard", "a")), "SourceError", "'a' occurs twice"), ((*files(".DS_Store"),
    ("h", "hard", ".DS_Store")), "SourceError", "no earlier"),
    ((("h", "hard", ""),), "SourceError", "no earlier file")]
GOOD_MEMBERS = (("p", "dir", ""), ("p/a", "file", "A"), ("p/run", "exec", "#!"), ("p/d/b", "file", "B"), ("p/l", "link", "d/../a"), ("p/up", "link", ".."))


def patched(data: bytes, at: int, value: bytes) -> bytes:
    at %= len(data)
    return data[:at] + value + data[at + len(value):]


def central(data: bytes, offset: int, value: bytes) -> bytes:
    """A ZIP file with a field of its first central header changed."""
    return patched(data, data.index(b"PK\x01\x02") + offset, value)


def sparse_tar(blocks: int) -> bytes:
    """A file with so many blocks of sparse map, each of which is 21 more tuples for tarfile."""
    info = tarfile.TarInfo("s")
    info.type = tarfile.GNUTYPE_SPARSE
    head = patched(info.tobuf(tarfile.GNU_FORMAT), 482, b"\1")
    head = patched(head, 148, b" " * 8)
    head = patched(head, 148, b"%06o\0" % sum(head))
    row = (b"%011o\0" % 1 * 2) * 21
    return gzip.compress(head + (row + b"\1" + bytes(7)) * blocks + row + bytes(8 + 1024), 1)


def global_tar(members: int) -> bytes:
    """Folders, with a thousand global pax records before each, which tarfile remembers."""
    out = b""
    for i in range(members):
        info = tarfile.TarInfo("pax")
        body = b"".join(b"16 k%05d%04d=v\n" % (i, j) for j in range(5000))
        info.type, info.size = tarfile.XGLTYPE, len(body)
        folder = tarfile.TarInfo(f"d{i}")
        folder.type = tarfile.DIRTYPE
        out += info.tobuf() + body + bytes(-len(body) % 512) + folder.tobuf()
    return gzip.compress(out + bytes(1024), 1)


def extended_tar(*headers: tuple[bytes, bytes], name: str = "d/a") -> bytes:
    """A file behind headers of (type, content)."""
    out = b""
    for kind, body in headers:
        info = tarfile.TarInfo("header")
        info.type, info.size = kind, len(body)
        out += info.tobuf() + body + bytes(-len(body) % 512)
    return gzip.compress(out + tarfile.TarInfo(name).tobuf() + bytes(1024), 1)


def pax(name: str, value: str) -> bytes:
    """A pax record: its length counts its own digits."""
    rest = f" {name}={value}\n"
    return next(f"{size}{rest}".encode() for size in range(len(rest) + 1, len(rest) + 9) if len(f"{size}{rest}") == size)


def large_member(name: str) -> bytes:
    """The header of a file of 6 GiB, which nobody unpacks."""
    info = tarfile.TarInfo(name)
    info.size = 6 << 30
    return info.tobuf(tarfile.PAX_FORMAT)


class TestArchives:
    READ_DIFFERENTLY = "which readers understand differently"

    @pytest.mark.parametrize(("headers", "fragment"), [
        (((b"g", pax("comment", "12" * 20)),), ""), (((b"g", pax("mtime", "0")),), ""), (((b"g", pax("SCHILY.archtype", "exustar")),), ""),
        (((b"g", pax("comment", "x")), (b"x", pax("path", "d/long"))), ""), (((b"x", pax("path", "d/long") + pax("mtime", "1.5")),), ""),
        (((b"L", b"d/long\0"),), ""), (((b"L", b"d/long\0"), (b"K", b"target\0")), ""),
        (((b"g", pax("path", "d/b")),), READ_DIFFERENTLY), (((b"g", pax("size", "9")),), READ_DIFFERENTLY), (((b"g", pax("linkpath", "x")),), READ_DIFFERENTLY),
        (((b"x", pax("GNU.sparse.name", "d/b") + pax("path", "d/a")),), READ_DIFFERENTLY), (((b"x", pax("GNU.sparse.major", "1")),), READ_DIFFERENTLY),
        *[(pair, "two headers for one member") for pair in (
            ((b"L", b"d/b\0"), (b"x", pax("path", "d/c"))), ((b"x", pax("path", "d/c")), (b"L", b"d/b\0")), ((b"L", b"d/b\0"), (b"L", b"d/c\0")),
            ((b"x", pax("path", "d/b")), (b"x", pax("path", "d/c"))), ((b"L", b"d/b\0"), (b"g", pax("comment", "x"))), ((b"x", b""), (b"g", b"")),
            ((b"K", b"t\0"), (b"L", b"d/b\0"), (b"K", b"u\0")))],
        (((b"x", pax("path", "d/b")), (b"X", pax("path", "d/c"))), "is a device, a pipe, a sparse file"),
        *((((b"x", record),), "which readers understand differently") for record in (
            pax("size", "-1"), pax("size", ""), pax("size", "0x1"), pax("size", "9" * 21), pax("path", ""), pax("linkpath", ""), pax("SCHILY.filetype", "dir"),
            pax("path", "d/b") + pax("path", "d/c"))),
        (((b"x", pax("size", "1")),), "has two sizes"), (((b"x", pax("size", "00")),), ""), (((b"x", pax("path", "d/b") + b"\0"),), "a damaged pax header"),
        (((b"g", pax("comment", "x")), (b"g", pax("mtime", "0"))), ""), (((b"x", pax("path", "d/b/")),), "a file with a directory's name"),
        (((b"L", b"d/b/\0"),), "a file with a directory's name"), *((((kind, name),), "the archive has a damaged long name") for kind in (b"L", b"K")
                                                                   for name in (b"", b"\0", b"d/b", b"d/b\0\0", b"d\0b\0", b"d\0b")),
        (((b"x", pax("a", "1" * 300)),), "")])
    def test_headers_that_readers_understand_differently(self, tmp_path: Path, headers: tuple[tuple[bytes, bytes], ...], fragment: str) -> None:
        """GNU tar would unpack other bytes than those that were looked at."""
        data = extended_tar(*headers)
        if fragment:
            refused(tmp_path, data, "SourceError", fragment)
        else:
            assert len(unpack(tmp_path, data)) == 2

    @pytest.mark.parametrize("field", [(100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (329, 8), (337, 8)], ids=str)
    @pytest.mark.parametrize("value", [b"\xff" * 12, b"\xff" + bytes(11), b"-7", b"+7", b"0o7", b"1_0", b"8", b"7\0007", b" ", b"\x81" + bytes(11)])
    def test_numbers_that_readers_understand_differently(self, tmp_path: Path, field: tuple[int, int], value: bytes) -> None:
        """Of a negative size, tarfile reads the same header again for hours."""
        at, width = field
        data = gzip.compress(header("d/a", b"0", 0, {257: b"ustar\00000", at: value.ljust(width, value[-1:] if value[0] > 127 else b" ")[:width]}) + bytes(1024))
        refused(tmp_path, data, "SourceError", "the archive is no tarball, or has a number that is neither octal nor positive in base-256")

    @pytest.mark.parametrize("member, fragment", [
        (lambda: header("d/a/", b"0", 0), "'d/a/' is a device, a pipe, a sparse file, or a file with a directory's name"),
        (lambda: header("d/a/", b"\0", 0), "a file with a directory's name"), (lambda: header("d/a/", b"2", 0, {157: b"x"}), "a file with a directory's name"),
        (lambda: header("d/a/", b"1", 0, {157: b"x"}), "a file with a directory's name"), (lambda: header("", b"0", 0), "a file with a directory's name"),
        *((lambda kind=kind: header("d/a", kind, 0), "is a device") for kind in (b"3", b"4", b"6", b"7", b"S", b"D", b"M", b"V", b"N", b"X", b"A", b"\xff")),
        *((lambda kind=kind: header("d/a", kind, 5, {157: b"d/b"}, b"x" * 5), "'d/a' has two sizes, or contents that are no file's") for kind in (b"1", b"2", b"5")),
        (lambda: header("a", b"0", 0, {257: b"ustar\00000", 345: b"d", 500: b"0"}), "a prefix in a header that is not of POSIX's format"),
        (lambda: header("a", b"0", 0, {257: b"ustar  \0", 345: b"d"}), "a prefix in a header"), (lambda: header("a", b"0", 0, {257: bytes(8), 345: b"d"}), "a prefix")])
    def test_members_that_readers_understand_differently(self, tmp_path: Path, member: Callable[[], bytes], fragment: str) -> None:
        refused(tmp_path, gzip.compress(member() + bytes(1024)), "SourceError", fragment)

    @pytest.mark.parametrize("name, mode, attribute, content", [
        ("d/", 0o100644, 0, ""), ("d/", 0o120777, 0, "x"), ("d", 0o40755, 0, ""), ("d", 0o100644, 0x10, ""), ("d/", 0, 0, "x"), ("d/", 0o40755, 0x10, "x")])
    def test_zip_members_that_readers_understand_differently(self, tmp_path: Path, name: str, mode: int, attribute: int, content: str) -> None:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, mode << 16 | attribute
            archive.writestr(info, content)
        refused(tmp_path, out.getvalue(), "SourceError", f"'{name}' is a file with a directory's name, or a directory with a file's")

    @pytest.mark.parametrize("writer", ["ustar", "gnu", "pax", "v7"])
    @needs("tar")
    def test_as_tar_writes_them(self, tmp_path: Path, writer: str) -> None:
        """GNU tar is the oracle: names and targets of 99 to 101 bytes, and far longer ones if the format has them."""
        if "GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True, text=True, check=False).stdout:
            pytest.skip("needs GNU tar: apt-get install tar")
        tree = tmp_path / "d"
        long = [("n" * size)[:size] for size in (99 - 2, *((98, 99, 254) if writer in ("gnu", "pax") else ()))]
        write_files(tree, {name: name for name in ["\u00e9", *long]})
        (tree / "run").touch(0o755)
        (tree / "link").symlink_to(long[-1])
        os.link(tree / "run", tree / "twin")
        subprocess.run(["tar", f"--format={writer}", "-czf", tmp_path / "t.tgz", "d"], cwd=tmp_path, check=True)
        (tmp_path / "x").mkdir()
        found = unpack(tmp_path / "x", (tmp_path / "t.tgz").read_bytes())
        assert found == {"d": "40755", "d/run": "100755", "d/twin": "100755", "d/link": f"120777 -> {long[-1]}", **{
            f"d/{name}": f"100644 {name}" for name in ["\u00e9", *long]}}

    @pytest.mark.parametrize("tail", [b"", bytes(512), bytes(1024), bytes(10240), bytes(100)])
    def test_ends_of_other_writers(self, tmp_path: Path, tail: bytes) -> None:
        assert unpack(tmp_path, gzip.compress(header("a", b"0", 1, content=b"x") + tail)) == {"a": "100644 x"}

    def test_what_is_passed_over_is_not_held(self, tmp_path: Path) -> None:
        data = gzip.compress(tar_bytes(("d/.DS_Store", "file", "\0" * (20 << 20)), *files("d/a")), 1)
        tracemalloc.start()
        try:
            assert unpack(tmp_path, data) == {"d": "40755", "d/a": "100644 x"}
            assert tracemalloc.get_traced_memory()[1] < 10 << 20
        finally:
            tracemalloc.stop()

    def test_headers_without_contents_count_as_well(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(confbuild, "MAX_EXTENDED", 512 * 3)
        data = gzip.compress(header("x", b"g", 0) * 4 + header("d/a", b"0", 0) + bytes(1024))
        refused(tmp_path, data, "LimitError", "more than 1536 bytes of extended headers")

    @pytest.mark.parametrize("links", [2, 3])
    def test_links_count_for_each_name(self, tmp_path: Path, links: int) -> None:
        """Whoever hashes or packs the tree reads the file once for each."""
        data = pack("tar", ("a", "file", "12345"), *((f"h{i}", "hard", "a") for i in range(links)))
        if links == 2:
            assert len(unpack(tmp_path, data, max_bytes=15)) == 3
        else:
            refused(tmp_path, data, "LimitError", "the archive unpacks to more than 15 bytes, with what its links repeat", max_bytes=15)

    @pytest.mark.parametrize("form", ["zip", "tar"])
    def test_folders_around_members_count(self, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """64 folders for each of 100,000 members would be 6,400,000."""
        monkeypatch.setattr(confbuild, "MAX_MEMBERS", 8)
        data = pack(form, *files("a/b/c/d", "e/f/g/h"))
        (tmp_path / "x").mkdir()
        assert len(unpack(tmp_path / "x", data)) == 8
        refused(tmp_path, pack(form, *files("a/b/c/d", "e/f/g/h/i")), "LimitError", "more than 8 members, with the folders around them")

    @pytest.mark.parametrize(("count", "fits"), [(2, True), (3, False)])
    def test_extended_headers_have_a_budget(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, fits: bool) -> None:
        monkeypatch.setattr(confbuild, "MAX_EXTENDED", 2 * confbuild.MIB)
        block = gzip.decompress(extended_tar((b"g", pax("comment", "x" * (confbuild.MIB - 20_000)))))[:-1536]
        data = gzip.compress(b"".join(block + tarfile.TarInfo(f"d/{i}").tobuf() for i in range(count)) + bytes(1024), 1)
        if fits:
            assert len(unpack(tmp_path, data)) == count + 1
        else:
            refused(tmp_path, data, "LimitError", "more than 2097152 bytes of extended headers")

    @pytest.mark.parametrize("form, members, error_type, fragment", [
        *((form, *row) for form in ("zip", "tar") for row in PATHS), *(("tar", *row) for row in HARD)])
    def test_hostile_members(self, tmp_path: Path, form: str, members: tuple[Member, ...], error_type: str, fragment: str) -> None:
        refused(tmp_path, pack(form, *members), error_type, fragment)
        assert sorted(os.listdir(tmp_path)) == ["archive", "root"]

    @pytest.mark.parametrize("form", ["zip", "tar"])
    def test_limits(self, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(confbuild, "MAX_MEMBERS", 3)
        monkeypatch.setattr(confbuild, "MIB", 1 << 18)
        cases = [(files("a", "b", "__MACOSX/c", "d"), {}, "the archive has more than 3 members"),
                 ((("a", "file", "12345678901"),), {"max_bytes": 10}, "the archive unpacks to more than 10 bytes"),
                 ((("a", "file", "123456"), ("b", "file", "78901")), {"max_bytes": 10}, "the archive unpacks to more than 10 bytes"),
                 ((("a", "file", "\0" * (17 << 20)),), {}, f"the archive unpacks to more than {16 << 20} bytes")]
        for number, (members, limits, message) in enumerate(cases):
            (tmp_path / str(number)).mkdir()
            refused(tmp_path / str(number), pack(form, *members), "LimitError", message, **limits)
        (tmp_path / "most").mkdir()
        assert len(unpack(tmp_path / "most", pack(form, *files("a", "b", "c")), max_bytes=3)) == 3, "a limit itself is allowed"

    @pytest.mark.parametrize("data, error_type, fragment", [
        (central(zip_bytes(*files("a")), 8, b"\1"), "SourceError", "'a' is encrypted"),
        (central(zip_bytes(*files("a")), 10, b"\x63"), "SourceError", "compression"),
        (central(zip_bytes(("a", "file", "abc")), 16, b"\0\0\0\0"), "SourceError", "the archive is damaged: BadZipFile: Bad CRC-32"),
        (central(zip_bytes(("a", "file", "abc" * 99)), 24, b"\1\0\0\0"), "SourceError", "the archive is damaged: BadZipFile: Bad CRC-32"),
        (central(zip_bytes(("a", "file", "abc"), method=0), 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"), "SourceError", "the archive is damaged"),
        (central(zip_bytes(*files("a")), 46, b"b"), "SourceError", "the archive is damaged: BadZipFile: File name in directory"),
        (zip_bytes(*files("a"))[:-5], "SourceError", "the archive is damaged: BadZipFile: File is not a zip file"),
        (b"PK\x03\x04", "SourceError", "the archive is damaged"),
        (zip_bytes(("l", "link", "")).replace(b"l", b"l"), "SourceError", "'l': no link can point to ''"),
        (b"\x1f\x8b\x08", "SourceError", "the archive is damaged: EOFError"),
        (pack("tar", *GOOD_MEMBERS)[:60], "SourceError", "the archive is damaged: EOFError"),
        (pack("tar", *GOOD_MEMBERS)[:-8], "SourceError", "the archive is damaged: EOFError"),
        (patched(pack("tar", *GOOD_MEMBERS), -8, b"\0\0\0\0"), "SourceError", "the archive is damaged: CRC check failed"),
        (patched(pack("tar", *GOOD_MEMBERS), -4, b"\0\0\0\0"), "SourceError", "the archive is damaged: Incorrect length of data"),
        (gzip.compress(b"this is no tarball" * 99), "SourceError", "the archive is no tarball, or has a number that is neither octal nor positive"),
        (gzip.compress(b""), "SourceError", "the archive is empty"),
        (gzip.compress(patched(tar_bytes(*files("a")), 124, b"77777777777\0")), "SourceError", "the archive is damaged: a header has a wrong checksum"),
        (gzip.compress(tar_bytes(("a", "file", "x" * 600))[:1024]), "SourceError", "the archive is cut off"),
        (gzip.compress(tar_bytes(("a", "file", "x" * 600))[:1500]), "SourceError", "the archive is cut off"),
        (gzip.compress(tar_bytes(("a", "file", "x"))[:1023]), "SourceError", "the archive is cut off"),
        (gzip.compress(tar_bytes(*files("a", "b"))[:1036]), "SourceError", "the archive is no tarball, or has a number"),
        (gzip.compress(gzip.decompress(extended_tar((b"L", b"d/b\0")))[:1024]), "SourceError", "the archive ends within a member"),
        (gzip.compress(tar_bytes(("a", "link", "x" * (1 << 20)))), "LimitError", "the archive has a header of more than 1 MiB"),
        (gzip.compress(large_member(".DS_Store")), "LimitError", "the archive unpacks to more than 4294967296 bytes"),
        (gzip.compress(tar_bytes(("a", "link", "x" * (1 << 20)), form=tarfile.GNU_FORMAT)), "LimitError", "a header of more than 1 MiB"),
        (gzip.compress(tar_bytes(*files("a\udcff"), form=tarfile.GNU_FORMAT)), "SourceError", "'a\\udcff' is not UTF-8")])
    def test_damaged(self, tmp_path: Path, data: bytes, error_type: str, fragment: str) -> None:
        refused(tmp_path, data, error_type, fragment)

    @pytest.mark.parametrize("make", [
        lambda: zip_bytes(("a", "file", "\0" * (48 << 20)), method=zipfile.ZIP_BZIP2),  # 150 bytes of it are decompressed at once
        lambda: sparse_tar(8192), lambda: global_tar(16)], ids=["bzip2", "sparse", "global"])
    def test_memory_does_not_follow_the_archive(self, tmp_path: Path, make: Callable[[], bytes]) -> None:
        data = make()
        tracemalloc.start()
        try:
            with contextlib.suppress(confbuild.BuildFailed):
                unpack(tmp_path, data, max_bytes=1 << 20)
            assert tracemalloc.get_traced_memory()[1] < 10 << 20, f"from an archive of {len(data)} bytes"
        finally:
            tracemalloc.stop()

    def test_a_file_has_only_so_many_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """65,000 on ext4, fewer than MAX_MEMBERS."""
        def full(*_: Any, **__: Any) -> None:
            raise OSError(31, "Too many links")
        monkeypatch.setattr(os, "link", full)
        refused(tmp_path, pack("tar", *files("a"), ("h", "hard", "a")), "LimitError", "Too many links")

    @pytest.mark.parametrize("form", ["zip", "tar", "gnu"])
    def test_good(self, tmp_path: Path, form: str) -> None:
        long, members = "n" * 90 + "/" + "o" * 200, [
            *GOOD_MEMBERS, *files("__MACOSX/._a", "p/__MACOSX/x", "p/.DS_Store", "./q", "\u00e9"), ("./", "dir", ""), ("p", "dir", ""), ("e/", "dir", "")]
        members += [(long, "file", "long"), ("t", "link", long)]
        members += [] if form == "zip" else [("h", "hard", "p/run"), ("h2", "hard", "./h")]
        data = gzip.compress(tar_bytes(*members, form=tarfile.GNU_FORMAT)) if form == "gnu" else pack(form, *members)
        hard = {} if form == "zip" else {"h": "100755 #!", "h2": "100755 #!"}
        found = unpack(tmp_path, data)
        folders = {name for name, what in found.items() if what.startswith("40")}
        assert folders == {"p", "p/d", "e", "n" * 90}
        assert {name: what for name, what in found.items() if name not in folders} == {
            "p/a": "100644 A", "p/run": "100755 #!", "p/d/b": "100644 B", "p/l": "120777 -> d/../a", "p/up": "120777 -> ..", "q": "100644 x",
            "\u00e9": "100644 x", long: "100644 long", "t": f"120777 -> {long}", **hard}

    @pytest.mark.parametrize("data", [zip_bytes(), pack("tar"), pack("zip", *files("__MACOSX/a")), pack("tar", *files(".DS_Store"))])
    def test_empty(self, tmp_path: Path, data: bytes) -> None:
        assert unpack(tmp_path, data) == {}

    @pytest.mark.parametrize("head, expected", [
        (zip_bytes()[:4], True), (pack("zip", *GOOD_MEMBERS)[:4], True), (pack("tar")[:4], True), (b"", False), (b"PK", False), (b"BZh9", False),
        (b"\x1f\x8b\x07", False), (tar_bytes(*GOOD_MEMBERS)[:4], False), (b"PK\x07\x08", False)])
    def test_is_archive(self, head: bytes, expected: bool) -> None:
        assert confbuild.is_archive(head) is expected

    @given(st.sampled_from(["zip", "tar", "header"]), st.integers(0, 1 << 16), st.integers(1, 255), st.booleans())
    @settings(max_examples=100)
    def test_damage_stays_inside(self, tmp_path_factory: pytest.TempPathFactory, form: str, position: int, flip: int, cut: bool) -> None:
        """A flipped byte (in a tar header with its checksum made right again) or a missing end: a tree inside, or BuildFailed."""
        data = {"zip": zip_bytes(*GOOD_MEMBERS, method=0), "tar": pack("tar", *GOOD_MEMBERS)}.get(form) or tar_bytes(*GOOD_MEMBERS, ("h", "hard", "p/a"))[:9 * 512]
        at = position % len(data)
        data = data[:at] if cut else patched(data, at, bytes([data[at] ^ flip]))
        if form == "header":
            start = at // 512 * 512
            block = patched(data[start:start + 512].ljust(512, b"\0"), 148, b" " * 8)
            data = gzip.compress(data[:start] + patched(block, 148, b"%06o\0" % sum(block)) + data[start + 512:] + bytes(1024), 1)
        folder = tmp_path_factory.mktemp("damage")
        (folder / "outside").mkdir()
        (folder / "outside/file").write_text("kept")
        with contextlib.suppress(confbuild.BuildFailed):
            unpack(folder, data)
            root = os.path.realpath(folder / "root")
            for path in (folder / "root").rglob("*"):
                assert os.path.commonpath((root, os.path.realpath(path))) == root
        assert sorted(os.listdir(folder)) == ["archive", "outside", "root"]
        assert os.listdir(folder / "outside") == ["file"] and (folder / "outside/file").read_text() == "kept"
        shutil.rmtree(folder)


class TestProject:
    @pytest.mark.parametrize("entries, source_name, folder, name", [
        (["demo/"], "other.zip", "demo", "demo"), (["my demo\u00e9/"], "", "my demo\u00e9", "my_demo_"), (["a/", "b"], "demo.tar.gz", "", "demo"),
        (["a"], "demo.tgz", "", "demo"), (["a"], "x/y/Demo.ZIP", "", "Demo"), (["a"], "C:\\x\\demo.zip", "", "demo"), (["a"], "", "", "build"),
        (["a"], ".tar.gz", "", "build"), (["a"], "..", "", "build"), (["a"], "../..", "", "build"), (["a"], "demo", "", "demo"),
        ([], "a b.gz", "", "a_b"), (["link@"], "demo.zip", "", "demo"), (["../"], "...zip", "", "build")])
    def test_find_project(self, tmp_path: Path, entries: list[str], source_name: str, folder: str, name: str) -> None:
        for entry in entries:
            if entry.endswith("@"):
                (tmp_path / entry).symlink_to("/")
            elif entry.endswith("/"):
                (tmp_path / entry).mkdir(exist_ok=True)
            else:
                (tmp_path / entry).touch()
        assert confbuild.find_project(str(tmp_path), source_name) == (os.path.join(tmp_path, folder) if folder else str(tmp_path), name)

    @given(st.text() | st.text("./\\ \0-a", max_size=6))
    @example("..")
    @example("")
    @example("a" * 300)
    @example("a\n")
    def test_plain_name(self, name: str) -> None:
        plain = confbuild.plain_name(name)
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,100}", plain) and plain not in (".", "..")
        assert confbuild.plain_name(plain) == plain


# git that obeys nobody's configuration: the oracle.
NODE = st.one_of(st.tuples(st.sampled_from(["file", "exec"]), st.binary(max_size=8)), st.tuples(st.just("link"),
                 st.sampled_from([b"a", b"../x", b"\xff"])))
ODD = [b"a", b"a.b", b"a0", b"a-", b"a b", b"a/", b"A", b"\xc3\xa9", b"\xff\xfe", b"-x", b"~", b"a\\b", b'"q"', b"a\nb", b"\x01"]
TREES = st.recursive(NODE, lambda inner: st.dictionaries(st.sampled_from([name for name in ODD if b"/" not in name]), inner, max_size=7),
                     max_leaves=14)


def make_tree(path: bytes, node: Any) -> None:
    if isinstance(node, dict):
        os.makedirs(path, exist_ok=True)
        for name, inner in node.items():
            make_tree(path + b"/" + name, inner)
    elif node[0] == "link":
        os.symlink(node[1], path)
    else:
        with open(path, "wb") as f:
            f.write(node[1])
        os.chmod(path, 0o755 if node[0] == "exec" else 0o644)


class TestGitTree:
    def test_known_answers(self, tmp_path: Path) -> None:
        """Pro Git 10.2: the tree of test.txt with `version 1`; and the empty tree that git has built in."""
        assert confbuild.git_tree(str(tmp_path), []) == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git/HEAD").touch()
        (tmp_path / "empty/folder").mkdir(parents=True)
        (tmp_path / "test.txt").write_text("version 1\n")
        assert confbuild.walk_files(str(tmp_path)) == ["test.txt"]
        assert confbuild.git_tree(str(tmp_path), ["test.txt"]) == "d8329fc1cc938780ffdd9f94e0d364e0ea74f579"

    @needs("git")
    @given(st.lists(st.dictionaries(st.sampled_from([name for name in ODD if b"/" not in name]), TREES, max_size=7), min_size=1, max_size=1))
    @settings(max_examples=15)
    @example([{b"a": {b"b": ("file", b"")}, b"a.b": ("file", b"1"), b"a0": ("exec", b"2"), b"a-": {b"x": ("link", b"\xff")}, b"\xff\xfe": {}}])
    def test_as_git(self, tmp_path_factory: pytest.TempPathFactory, trees: list[Any]) -> None:
        folder = tmp_path_factory.mktemp("tree")
        git(folder, "init", "-q")
        for tree in trees:
            shutil.rmtree(folder / "w", ignore_errors=True)
            make_tree(os.fsencode(folder / "w"), tree)
            git(folder, "add", "-A", "-f", ".")
            whole = git(folder, "write-tree")
            assert confbuild.git_tree(str(folder), confbuild.walk_files(str(folder))) == whole

    def test_what_git_has_no_mode_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(confbuild.BuildFailed, match="'pipe' is neither a file nor a link") as caught:
            confbuild.git_tree(str(tmp_path), confbuild.walk_files(str(tmp_path)))
        assert caught.value.error_type == "SourceError"

    def test_a_deep_repository(self, tmp_path: Path) -> None:
        """A fetched one, which no archive's limit has seen: no RecursionError."""
        subprocess.run(["mkdir", "-p", "/".join("d" * 1200)], cwd=tmp_path, check=True)  # os.makedirs is recursive as well
        (tmp_path / "/".join("d" * 1200) / "f").touch()
        try:
            with pytest.raises(confbuild.BuildFailed, match="deeper") as caught:
                confbuild.git_tree(str(tmp_path), confbuild.walk_files(str(tmp_path)))
            assert caught.value.error_type == "LimitError"
        finally:
            subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


class TestChecks:
    @pytest.mark.parametrize("ref", ["", "main", "feature/x-1.2", "refs/heads/main", "refs/tags/v1", "a" * 40, "HEAD", "v1.0+build", "\u00e9",
                             "a@b", "a" * 255,
                                     "x.lock.y", "a{b}"])
    def test_refs_accepted(self, ref: str) -> None:
        confbuild.check_ref(ref)

    @pytest.mark.parametrize("ref", ["-x", "--upload-pack=x", "a b", "a\nb", "main\n", "\0", "\x7f", "a..b", "a:b", "^a", "a~1", "a?", "a*", "a[b",
                             "a\\b",
                                     "a@{1}", "a.lock", "a.lock/b", "a//b", "/a", "a/", ".a", "a/.b", "a.", "a" * 256, "..", "main\ud800"])
    def test_refs_refused(self, ref: str) -> None:
        with pytest.raises(confbuild.Refused, match="is no branch, tag or commit") as caught:
            confbuild.check_ref(ref)
        assert (caught.value.status, caught.value.error_type) == (400, "InvalidRef")

    @pytest.mark.parametrize("url, schemes, loopback", [
        ("https://github.com/a/b.git", "https http", False), ("http://10.0.0.1/x", "https http", False),
        ("https://192.168.1.1:8443/x", "https", False),
        ("http://[fd00::1]/x", "http", False), ("http://127.0.0.1:8080/x", "http", True), ("http://localhost/x", "http", True),
        ("http://[::1]:9/x", "http", True),
        ("file:///srv/x", "file", False), ("ssh://host/x", "ssh", False), ("https://example.org/a%20b", "https", False)])
    def test_urls_accepted(self, url: str, schemes: str, loopback: bool) -> None:
        confbuild.check_url(url, schemes.split(), loopback)

    @pytest.mark.parametrize("url, fragment", [
        ("", "not a URL in plain ASCII"), ("https://a/ b", "not a URL in plain ASCII"), ("https://a/\n", "not a URL"),
        ("https://\u00e9/x", "not a URL"),
        ("https://a\\b/x", "not a URL"), ("https://a/" + "x" * 2048, "at most 2048 characters"), ("https://[::1/x", "repo_url: "),
        ("https://h:99999/x", "ort"),
        ("https://h:x/x", "ort"), ("ssh://h/x", "the scheme must be one of https, http"), ("file:///x", "the scheme must be"),
        ("git@h:x", "the scheme must be"),
        ("ext::sh", "the scheme must be"), ("-x", "the scheme must be"), ("//h/x", "the scheme must be"),
        ("https://u:p@h/x", "credentials, queries and fragments"),
        ("https://u@h/x", "credentials"), ("https://@h/x", "credentials"), ("https://h/x?token=1", "credentials"), ("https://h/x#y", "credentials"),
        ("https:///x", "a host and a path are needed"), ("https://h", "a host and a path"), ("https://h//", "a host and a path"),
        ("https://h:0/x", "a host and"),
        ("http://169.254.169.254/x", "link-local addresses are not accepted"), ("http://[fe80::1]/x", "link-local"),
        ("http://2852039166/x", "link-local"),
        ("http://[::ffff:169.254.169.254]/x", "link-local"), ("http://0/x", "unspecified"), ("http://0.0.0.0/x", "unspecified"),
        ("http://[::]/x", "unspecified"),
        ("http://[::ffff:0:0]/x", "unspecified"), ("http://224.0.0.1/x", "multicast"), ("http://[ff02::1]/x", "multicast"),
        ("http://127.0.0.1/x", "loopback"),
        ("http://127.1/x", "loopback"), ("http://2130706433/x", "loopback"), ("http://0x7f.1/x", "loopback"), ("http://0177.0.0.1/x", "loopback"),
        ("http://[::1]/x", "loopback"), ("http://[::ffff:127.0.0.1]/x", "loopback"), ("http://localhost/x", "loopback"),
        ("http://LOCALHOST./x", "loopback"),
        ("http://a.localhost/x", "loopback"),
        # What curl decodes, or reads as an instruction, is not the name that was looked up and pinned.
        ("http://%31%32%37.0.0.1/x", "host"), ("http://-x.example.org/x", "host"), ("http://+x.example.org/x", "host"), ("http://*/x", "host"),
        ("http://a,b/x", "host")])
    def test_urls_refused(self, url: str, fragment: str) -> None:
        with pytest.raises(confbuild.Refused, match=re.escape(fragment)) as caught:
            confbuild.check_url(url, ("https", "http"), False)
        assert (caught.value.status, caught.value.error_type) == (400, "ForbiddenUrl")

    # Refused in every notation that a resolver, a tunnel or a translator takes for it. Alibaba, Azure, Oracle, link-local, loopback.
    REFUSED = ("100.100.100.200", "168.63.129.16", "192.0.0.192", "169.254.169.254", "169.254.170.2", "127.0.0.1")

    @staticmethod
    def notations(address: str) -> Iterator[str]:
        """The same IPv4 address otherwise, as RFC 6052 2.4, RFC 3056, RFC 4380, RFC 5214 and inet_aton(3) have it."""
        a, b, c, d = four = ipaddress.IPv4Address(address).packed
        number = int.from_bytes(four, "big")
        yield from (address, str(number), hex(number), f"0{number:o}", f"{a:#x}.{b:#x}.{c:#x}.{d:#x}", f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"{a}.{number & 0xFFFFFF}",
                    f"{a}.{b}.{c << 8 | d}", address + ".", f"0x{number:08X}")
        high, low = f"{a:02x}{b:02x}", f"{c:02x}{d:02x}"
        complement = (~number & 0xFFFFFFFF).to_bytes(4, "big").hex(":", 2)
        for text in (f"::{address}", f"::ffff:{address}", f"::FFFF:{high}:{low}", f"0:0:0:0:0:ffff:{high}:{low}", f"::ffff:0:{address}", f"2002:{high}:{low}::", f"2002:{high}:{low}::1",
                     f"2001::{high}:{low}:0:0:1:1", f"2001:0:102:304::{complement}", f"64:ff9b::{address}", f"64:ff9b::{high}:{low}", f"64:ff9b:1::{address}",
                     f"64:ff9b:1:{high}:{c:x}:{d:02x}00::", f"64:ff9b:1:{a:x}:{b:x}:{c:02x}{d:02x}::", f"64:ff9b:1:0:{a:x}:{b:02x}{c:02x}:{d:02x}00::", f"fd12::5efe:{address}",
                     f"2001:db8::200:5efe:{address}"):
            yield f"[{text}]"

    @pytest.mark.parametrize("address", REFUSED)
    def test_every_notation(self, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for text in self.notations(address):
            with pytest.raises(confbuild.Refused, match="are not accepted by this server"):
                confbuild.check_url(f"https://{text}/x", ("https",), False)
                pytest.fail(text)
            monkeypatch.setattr(socket, "getaddrinfo", self.resolver([text.strip("[]")]))  # a name that leads to it
            if "[" in text or text == address:
                for scheme in ("https", "git"):
                    with pytest.raises(confbuild.BuildFailed, match="are not accepted by this server"):
                        confbuild._pinned_address(f"{scheme}://h/x", False)
            monkeypatch.undo()

    def test_every_notation_of_another(self) -> None:
        """What is only like them is fetched from: GitHub's address, behind a translator too."""
        for text in self.notations("140.82.121.4"):
            confbuild.check_url(f"https://{text}/x", ("https",), False)

    @pytest.mark.parametrize("host", [
        "[fd00:ec2::254]", "[FD00:0EC2:0:0:0:0:0:254]", "[fd00:ec2::23]", "[fd20:ce::254]", "[fd00:c1::a9fe:a9fe]", "[fd00:42::42]", "[fd00:a9fe:a9fe::1]", "[fe80::1]",
        "[febf::1]", "[::]", "[64:ff9b::]", "[64:ff9b:1::]", "[ff02::1]", "metadata.google.internal", "METADATA.Google.Internal.", "x.metadata.google.internal",
        "metadata", "metadata.", "metadata.goog", "instance-data", "instance-data.ec2.internal", "metadata.tencentyun.com"])
    def test_metadata_services(self, host: str) -> None:
        with pytest.raises(confbuild.Refused, match="not accepted by this server") as caught:
            confbuild.check_url(f"https://{host}/x", ("https",), True)
        assert caught.value.error_type == "ForbiddenUrl"

    @pytest.mark.parametrize("host", ["metadata.example.org", "my-metadata.google.internal", "100.100.100.201", "168.63.129.17", "[fd00:ec3::254]", "[64:ff9b:1::1.2.3.4]"])
    def test_no_metadata_services(self, host: str) -> None:
        confbuild.check_url(f"https://{host}/x", ("https",), True)

    def test_file_urls(self) -> None:
        for url in ("file://host/x", "file:x", "file://localhost/x"):
            with pytest.raises(confbuild.Refused, match="a file URL has no host and an absolute path"):
                confbuild.check_url(url, ("file",), True)

    @pytest.mark.parametrize("addresses, loopback, fragment", [
        (["10.0.0.1", "169.254.169.254"], True, "h is 169.254.169.254: link-local"), (["127.0.0.1"], False, "h is 127.0.0.1: loopback"),
        (["::1"], False, "loopback"), (["::ffff:127.0.0.1"], False, "loopback"), (["0.0.0.0"], True, "unspecified"),
        (["ff02::1%eth0"], True, "multicast"),
        (["fe80::1%2"], True, "link-local"), ([], True, "h: [Errno -2] unknown")])
    def test_names_that_lead_elsewhere(self, addresses: list[str], loopback: bool, fragment: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", self.resolver(addresses))
        with pytest.raises(confbuild.BuildFailed, match=re.escape(fragment)) as caught:
            confbuild._pinned_address("https://h/x", loopback)
        assert caught.value.error_type == "SourceError"

    @staticmethod
    def resolver(addresses: list[str]) -> Callable[..., list[Any]]:
        def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
            if not addresses:
                raise socket.gaierror(-2, "unknown")
            return [(2, 1, 6, "", (address, 443)) for address in addresses]
        return resolve

    def test_pinned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", self.resolver(["10.0.0.2", "10.0.0.1", "10.0.0.1"]))
        assert confbuild._pinned_address("https://h/x", False)[-1] == "http.curloptResolve=h:443:10.0.0.1,10.0.0.2"
        assert confbuild._pinned_address("http://h:81/x", False)[-1] == "http.curloptResolve=h:81:10.0.0.1,10.0.0.2"
        assert confbuild._pinned_address("http://h.:81/x", False)[1::2] == ["http.curloptResolve=h:81:10.0.0.1,10.0.0.2", "http.curloptResolve=h.:81:10.0.0.1,10.0.0.2"]
        assert confbuild._pinned_address("file:///x", False) == confbuild._pinned_address("git://h/x", False) == []
        assert confbuild._pinned_address("http://10.0.0.1/x", False) == confbuild._pinned_address("http://[fd12:0::1]/x", False) == []

    @pytest.mark.parametrize("url, shown", [
        ("https://h/x.git", "https://h/x.git"), ("https://u:p@h:8443/x", "https://h:8443/x"), ("https://token@h/x", "https://h/x"),
        ("https://u:@h/x", "https://h/x"),
        ("https://h/x?private_token=s", "https://h/x"), ("https://h/x#s", "https://h/x"), ("ssh://git@h:22/x", "ssh://h:22/x"),
        ("git@h:a/b.git", "h:a/b.git"),
        ("u:p@h:a", "h:a"), ("h:a?token=s", ""), ("file:///srv/x", "file:///srv/x"), ("https://u:p%40@h/x", "https://h/x"),
        ("https://u:p@q@h/x", "https://h/x"),
        ("https://u:p/q@h/x", ""), ("https://u:p#q@h/x", ""), ("https://u:p?q@h/x", ""), ("", ""), ("/srv/x", ""), ("../x", ""),
        ("https://h/x\ny", ""), ("a b", "")])
    def test_without_credentials(self, url: str, shown: str) -> None:
        assert confbuild.without_credentials(url) == shown

    @given(st.sampled_from(["https://", "ssh://", "", "http://h/", "u@"]),
           *[st.text("ab:@#?%[]\\", max_size=3)] * 3, st.sampled_from(["@h/x", "@h:x", "@h"]))
    def test_no_credential_is_shown(self, scheme: str, user: str, before: str, after: str, host: str) -> None:
        assert "SECRET" not in confbuild.without_credentials(f"{scheme}{user}:{before}SECRET{after}{host}")


BACKEND = Path(subprocess.check_output(["git", "--exec-path"], text=True).strip() if shutil.which("git") else "/") / "git-http-backend"
needs_backend = pytest.mark.skipif(not BACKEND.is_file(), reason="git http-backend is missing: apt-get install git")


REQUESTS: list[str] = []  # the paths that GitHandler was asked for


class GitHandler(http.server.BaseHTTPRequestHandler):
    """git http-backend as a CGI program; below /moved everything is elsewhere, below /secret a password is wanted."""

    root = ""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        REQUESTS.append(path)
        status, headers, rest = 200, dict[str, str](), b""
        if path.startswith("/moved"):
            status, headers = 302, {"Location": self.path.replace("/moved", "")}
        elif path.startswith("/secret"):
            status, headers = 401, {"WWW-Authenticate": 'Basic realm="r"'}
        else:
            out = subprocess.run([str(BACKEND)], input=body, capture_output=True, check=False, env={
                **ORACLE_ENV, "GIT_PROJECT_ROOT": self.root, "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path, "QUERY_STRING": query,
                "REQUEST_METHOD": self.command, "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", "")}).stdout
            head, _, rest = out.partition(b"\r\n\r\n")
            headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
            status = int(headers.pop("Status", "200").split()[0])
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(rest))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(rest)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


class Ipv6Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A folder of repositories, what they hold, and where they are served: demo (branches main, side and tag; tags v1 and light), modules."""
    root = tmp_path_factory.mktemp("origin")
    demo, facts = root / "demo", {"root": str(root)}
    demo.mkdir()
    git(demo, "init", "-q")
    (demo / "lf.txt").write_bytes(b"one\ntwo\n$Id$\n")
    (demo / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    (demo / "run.sh").write_bytes(b"#!/bin/sh\n")
    (demo / "run.sh").chmod(0o755)
    (demo / "sub").mkdir()
    (demo / "sub/link").symlink_to("../lf.txt")
    git(demo, "add", "-A")
    (demo / ".gitattributes").write_text("*.txt text eol=crlf ident filter=evil working-tree-encoding=UTF-16\n")
    (demo / "sub/.gitattributes").write_text("* text eol=crlf\n")
    git(demo, "-c", "filter.evil.clean=cat", "add", ".gitattributes", "sub/.gitattributes")
    git(demo, "commit", "-q", "-m", "one")
    facts["light"] = facts["v1"] = facts["first"] = git(demo, "rev-parse", "HEAD")
    git(demo, "tag", "-a", "-m", "v1", "v1")
    git(demo, "tag", "light")
    for name in ("side", "main"):
        git(demo, "checkout", "-q", "-B", name, facts["first"])
        git(demo, "commit", "-q", "--allow-empty", "-m", name)
        facts[name] = git(demo, "rev-parse", "HEAD")
    git(demo, "branch", "tag", "side")
    facts["tag"] = facts["side"]
    modules = root / "modules"
    modules.mkdir()
    git(modules, "init", "-q")
    git(modules, "submodule", "--quiet", "add", str(demo), "sub")
    git(modules, "commit", "-q", "-m", "modules")
    git(root, "init", "-q", "--object-format=sha256", "sha256")
    write_files(root / "sha256", {"a": "a", "sub/b": "b"})
    git(root / "sha256", "add", "-A")
    git(root / "sha256", "commit", "-q", "-m", "one")
    handler = type("Handler", (GitHandler,), {"root": str(root)})
    servers = []
    for name, kind, host in (("http", http.server.ThreadingHTTPServer, "127.0.0.1"), ("ipv6", Ipv6Server, "::1")):
        with contextlib.suppress(OSError):  # no IPv6 here
            servers.append(kind((host, 0), handler))
            facts[name] = f"http://{f'[{host}]' if ':' in host else host}:{servers[-1].server_port}"
            threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
    facts["file"] = f"file://{root}"
    yield facts
    for one in servers:
        one.shutdown()
        one.server_close()


def fetch(folder: Path, url: str, ref: str = "", schemes: tuple[str, ...] = ("http", "file"), **environ: str) -> Path:
    (folder / "home").mkdir(exist_ok=True)
    confbuild.fetch_git(url, ref, str(folder / "got"), {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), **environ}, schemes, True)
    return folder / "got"


@needs("git")
class TestFetch:
    @needs_backend
    @pytest.mark.parametrize("where, ref, name", [
        ("http", "", "main"), ("http", "side", "side"), ("http", "v1", "v1"), ("http", "refs/heads/side", "side"), ("http", "refs/tags/v1", "v1"),
        ("http", "COMMIT", "first"), ("ipv6", "", "main"), ("file", "", "main"), ("file", "light", "light"), ("file", "COMMIT", "first"),
        ("file", "tag", "tag")])
    def test_refs(self, tmp_path: Path, origin: dict[str, str], where: str, ref: str, name: str) -> None:
        if where not in origin:
            pytest.skip("there is no IPv6 here")
        url = f"{origin[where]}/demo/.git"
        got = fetch(tmp_path, url, origin[name] if ref == "COMMIT" else ref)
        assert git(got, "rev-parse", "HEAD") == origin[name]
        assert git(got, "rev-list", "HEAD") == origin[name], "a history of one commit"
        assert (got / "lf.txt").read_bytes() == b"one\ntwo\n$Id$\n" and (got / "crlf.txt").read_bytes() == b"one\r\ntwo\r\n"
        assert os.access(got / "run.sh", os.X_OK) and os.readlink(got / "sub/link") == "../lf.txt"
        tree = confbuild.git_tree(str(got), confbuild.walk_files(str(got)))
        assert tree == git(got, "rev-parse", "HEAD^{tree}")
        assert confbuild.believe_history(str(got), tree, ORACLE_ENV) == (origin[name], url)

    @needs_backend
    @pytest.mark.parametrize("url, ref, schemes, fragment", [
        ("{http}/demo/.git", "missing", "http", "couldn't find remote ref missing"), ("{http}/demo/.git", "0" * 39 + "1", "http", "not our ref"),
        ("{http}/none", "", "http", "repository '{http}/none/' not found"),
        ("{http}/moved/demo/.git", "", "http", "unable to access '{http}/moved/demo/.git/'"),
        ("{http}/secret/x", "", "http", "Authentication failed for '{http}/secret/x/'"),
        ("{http}/demo/.git", "", "https", "transport 'http' not allowed"),
        ("{file}/demo", "", "https http", "transport 'file' not allowed"),
        ("{file}/none", "", "file", "the remote end hung up|does not appear|repository exists"),
        ("{file}/modules", "", "file", "the repository has submodules, which are not fetched")])
    def test_refused(self, tmp_path: Path, origin: dict[str, str], url: str, ref: str, schemes: str, fragment: str) -> None:
        REQUESTS.clear()
        wanted = "|".join(re.escape(part) for part in fragment.format(**origin).split("|"))
        with pytest.raises(confbuild.BuildFailed, match=wanted) as caught:
            fetch(tmp_path, url.format(**origin), ref, tuple(schemes.split()))
        assert caught.value.error_type == "SourceError"
        assert not any(path.startswith("/demo") for path in REQUESTS) or "/demo" in url and "/moved" not in url, "a redirect was followed"

    def test_nobody_answers(self, tmp_path: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            with pytest.raises(confbuild.BuildFailed, match="(?i)(failed|could ?n.t) (to )?connect"):
                fetch(tmp_path, f"http://127.0.0.1:{s.getsockname()[1]}/x")

    def test_without_git(self, tmp_path: Path) -> None:
        with pytest.raises(confbuild.BuildFailed, match="git is not installed here") as caught:
            fetch(tmp_path, "http://127.0.0.1/x", PATH=str(tmp_path))
        assert caught.value.error_type == "SourceError"

    @needs_backend
    def test_the_name_is_looked_up_once(self, tmp_path: Path, origin: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        """git connects to the address that was checked: nobody else knows this name."""
        monkeypatch.setattr(socket, "getaddrinfo", TestChecks.resolver(["127.0.0.1"]))
        got = fetch(tmp_path, origin["http"].replace("127.0.0.1", "demo.invalid") + "/demo/.git")
        assert git(got, "rev-parse", "HEAD") == origin["main"]
        (tmp_path / "b").mkdir()
        monkeypatch.setattr(socket, "getaddrinfo", TestChecks.resolver(["169.254.169.254"]))
        with pytest.raises(confbuild.BuildFailed, match="demo.invalid is 169.254.169.254: link-local"):
            fetch(tmp_path / "b", "http://demo.invalid/x")

    def test_foreign_configuration_is_ignored(self, tmp_path: Path, origin: dict[str, str]) -> None:
        """Hooks, templates, filters and rewritten URLs of a home, and git's own variables."""
        evil = tmp_path / "evil"
        (evil / "hooks").mkdir(parents=True)
        for hook in ("post-checkout", "reference-transaction", "post-index-change"):
            (evil / "hooks" / hook).write_text(f"#!/bin/sh\ntouch {tmp_path}/touched\n")
            (evil / "hooks" / hook).chmod(0o755)
        (tmp_path / "home").mkdir()
        (tmp_path / "home/.gitconfig").write_text(
            f'[core]\nhooksPath={evil}/hooks\nfsmonitor="touch {tmp_path}/touched"\n[init]\ntemplateDir={evil}\n'
            f'[filter "evil"]\nsmudge="touch {tmp_path}/touched"\n[url "file:///nonexistent/"]\ninsteadOf=file:///\n')
        got = fetch(tmp_path, f"{origin['file']}/demo", GIT_TEMPLATE_DIR=str(evil))
        assert not (got / ".git/hooks").exists() and not (tmp_path / "touched").exists()
        assert git(got, "config", "remote.origin.url") == f"{origin['file']}/demo"


    @pytest.mark.parametrize("where", ["file", "http"])
    @pytest.mark.parametrize("ref", ["", "main", "COMMIT"])
    @needs_backend
    def test_sha256_repository(self, tmp_path: Path, origin: dict[str, str], where: str, ref: str) -> None:
        head = git(Path(origin["root"], "sha256"), "rev-parse", "HEAD")
        got = fetch(tmp_path, f"{origin[where]}/sha256/.git", head if ref == "COMMIT" else ref)
        tree = confbuild.git_tree(str(got), confbuild.walk_files(str(got)), "sha256")
        assert len(head) == 64 and tree == git(got, "rev-parse", "HEAD^{tree}")
        assert confbuild.believe_history(str(got), tree, ORACLE_ENV) == (head, f"{origin[where]}/sha256/.git")


    @staticmethod
    def fails(folder: Path, url: str, error_type: str, fragment: str, **limits: Any) -> None:
        with pytest.raises(confbuild.BuildFailed, match=fragment) as caught:
            confbuild.fetch_git(url, "", str(folder / "got"), {"PATH": os.environ["PATH"], "HOME": str(folder)}, ("http", "file"), True, **limits)
        assert caught.value.error_type == error_type, caught.value

    def test_limits_of_git(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of git, and so of all that it starts: here a program of its own."""
        monkeypatch.setattr(confbuild, "MAX_GIT_MEMORY", 300 << 20)
        env = confbuild.git_environment({"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, ())
        script(tmp_path / "limits", f"exec {sys.executable} -c 'from resource import *; print(*map(getrlimit, (RLIMIT_AS, RLIMIT_FSIZE, RLIMIT_CORE)))'\n")
        found = confbuild._git(["-c", f"alias.x=!{tmp_path}/limits", "x"], str(tmp_path), env, 7 << 20)
        assert found.decode().partition(") ")[2] == f"{((7 << 20),) * 2} (0, 0)\n"
        assert sys.platform != "linux" or found.decode().startswith(f"{(300 << 20,) * 2} ")

    @pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
    @pytest.mark.parametrize("kind", ["application/x-git-upload-pack-advertisement", "text/plain"])
    def test_an_endless_advertisement(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        """Of a server that speaks git's protocol, and of a dumb one: git would hold all of it."""
        monkeypatch.setattr(confbuild, "MAX_GIT_MEMORY", 300 << 20)

        class Endless(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                if kind != "text/plain":
                    self.wfile.write(b"001e# service=git-upload-pack\n0000000eversion 2\n")
                line = b"1111111111111111111111111111111111111111 refs/heads/x\n"
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write((b"%04x" % (len(line) + 4) + line if kind != "text/plain" else line) * 10_000)

            def log_message(self, *_: Any) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            try:
                self.fails(tmp_path, f"http://127.0.0.1:{server.server_port}/x", "LimitError", "git needs more than 314572800 bytes of memory")
            finally:
                server.shutdown()

    def test_a_bomb_of_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ten billion files in twelve objects."""
        repository = write_files(tmp_path / "bomb", {"f": "x"}, commit=True)
        row = f"100644 blob {git(repository, 'rev-parse', 'HEAD:f')}"
        for _ in range(10):
            made = subprocess.run(["git", "mktree"], cwd=repository, input="".join(f"{row}\tf{i}\n" for i in range(10)), env=ORACLE_ENV, text=True,
                                  capture_output=True, check=True)
            row = f"040000 tree {made.stdout.strip()}"
        git(repository, "reset", "-q", "--soft", git(repository, "commit-tree", "-m", "bomb", made.stdout.strip()))
        monkeypatch.setattr(confbuild, "MAX_MEMBERS", 5000)
        self.fails(tmp_path, f"file://{repository}", "LimitError", "the repository has more than 5000 files and folders, or very long names")

    def test_limits_of_a_tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        repository = write_files(tmp_path / "r", {"a/b/c": "x" * 300_000, "d": "y" * 100_000, ".gitmodules": ""}, commit=True)
        url, folders = f"file://{repository}", [tmp_path / str(i) for i in range(9)]
        for folder in folders:
            folder.mkdir()
        self.fails(folders[0], url, "LimitError", "the repository unpacks to more than 399999 bytes", max_bytes=399_999)
        confbuild.fetch_git(url, "", str(folders[1] / "got"), {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, ("file",), max_bytes=400_000)
        assert (folders[1] / "got/d").stat().st_size == 100_000
        with monkeypatch.context() as patch:
            patch.setattr(confbuild, "MAX_MEMBERS", 4)
            self.fails(folders[2], url, "LimitError", "the repository has more than 4 files and folders")
            patch.setattr(confbuild, "MAX_MEMBERS", 5)  # two of them are folders
            patch.setattr(confbuild, "MAX_DEPTH", 1)
            self.fails(folders[3], url, "LimitError", "'a/b/c' lies deeper than 1 folders")
        with monkeypatch.context() as patch:
            patch.setattr(confbuild, "MIB", 1000)
            patch.setattr(confbuild, "MAX_RATIO", 1)
            self.fails(folders[4], url, "LimitError", "the repository unpacks to more than 64000 bytes")
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=500_000))
            self.fails(folders[5], url, "LimitError", "the repository unpacks to more than 250000 bytes")
        with monkeypatch.context() as patch:
            patch.setattr(confbuild, "_folder_size", lambda _: 1001)
            self.fails(folders[6], url, "LimitError", "the repository's pack has more than 1000 bytes", max_bytes=1000)

    def test_a_large_pack(self, tmp_path: Path) -> None:
        repository = write_files(tmp_path / "r", {"noise": os.urandom(1 << 20)}, commit=True)
        limit = "pack has more than 204800 bytes|a file of more than 204800 bytes: .*"  # whichever is reached first
        self.fails(tmp_path, f"file://{repository}", "LimitError", limit, max_bytes=200 << 10)
        (repository / "noise").write_bytes(os.urandom(1 << 20))
        with pytest.raises(confbuild.BuildFailed, match="or a file of more than 204800 bytes: .*File too large") as caught:
            confbuild._git(["hash-object", "-w", "noise"], str(repository), ORACLE_ENV, 200 << 10)
        assert caught.value.error_type == "LimitError"

    def test_a_repository_that_lacks_a_file(self, tmp_path: Path, origin: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        """No server of git's own sends such a pack."""
        monkeypatch.setattr(confbuild, "_git", lambda *_, **__: b"100644 blob 0123456789012345678901234567890123456789     BAD\tsrc/main.rs\0")
        with pytest.raises(confbuild.BuildFailed, match="the repository lacks 'src/main.rs'"):
            confbuild._check_listing(str(tmp_path), {}, 1000)


def forge(clone: Path, body: bytes, name: str) -> None:
    """A loose commit under a name that it does not hash to; HEAD is it."""
    path = clone / ".git/objects" / name[:2] / name[2:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zlib.compress(b"commit %d\0" % len(body) + body))
    (clone / ".git/HEAD").write_text(name + "\n")


def hostile_config(clone: Path) -> None:
    touch = f"touch {clone.parent}/touched"
    (clone / "included").write_text('[remote "origin"]\nurl = https://included/\n')
    with open(clone / ".git/config", "a") as f:
        f.write(f'[core]\nfsmonitor = "{touch}"\nhooksPath = hooks\nsshCommand = "{touch}"\npager = "{touch}"\nalternateRefsCommand = "{touch}"\n'
                f'[alias]\ncat-file = "!{touch}"\nconfig = "!{touch}"\n[include]\npath = ../included\n[extensions]\npartialClone = origin\n')
    os.unlink(clone / "included")


def replaced_object(clone: Path) -> None:
    git(clone, "replace", "HEAD", git(clone, "commit-tree", "-m", "other", git(clone, "mktree")))


def write(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text)


def emptied(clone: Path) -> Path:
    (clone / ".git/HEAD").unlink()
    return clone


def moved_away(clone: Path) -> Path:
    (clone / ".git").rename(clone.parent / "g")
    return clone / ".git"


HISTORIES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("clean", lambda clone: None, ""),
    ("packed refs", lambda clone: git(clone, "pack-refs", "--all"), ""),
    ("packed objects", lambda clone: git(clone, "repack", "-adq"), ""),
    ("detached", lambda clone: git(clone, "checkout", "-q", "--detach"), ""),
    ("hostile configuration", hostile_config, ""),
    ("replaced_object", replaced_object, ""),
    ("modified", lambda clone: (clone / "lf.txt").write_bytes(b"x"), "the files differ from the tree of HEAD"),
    ("untracked", lambda clone: (clone / "new").touch(), "the files differ from the tree of HEAD"),
    ("ignored", lambda clone: write(clone, {".git/info/exclude": "new\n", "new": ""}), "the files differ from the tree of HEAD"),
    ("assumed unchanged", lambda clone: write(clone, {"lf.txt": git(clone, "update-index", "--assume-unchanged", "lf.txt") + "x"}),
    "the files differ"),
    ("deleted", lambda clone: (clone / "lf.txt").unlink(), "the files differ"),
    ("mode", lambda clone: (clone / "run.sh").chmod(0o644), "the files differ from the tree of HEAD"),
    ("no .git", lambda clone: shutil.rmtree(clone / ".git"), "there is no history"),
    ("link", lambda clone: moved_away(clone).symlink_to("../g"), "there is no history"),
    ("file", lambda clone: moved_away(clone).write_text("gitdir: ../g\n"), "there is no history"),
    ("HEAD", lambda clone: (clone / ".git/HEAD").write_text("x"), "HEAD names no commit"),
    ("no HEAD", lambda clone: (clone / ".git/HEAD").unlink(), "HEAD names no commit"),
    ("branch", lambda clone: (clone / ".git/HEAD").write_text("ref: refs/heads/none\n"), "HEAD names no commit"),
    ("outside", lambda clone: write(clone, {"../o": "1" * 40, ".git/HEAD": "ref: refs/../../../o\n"}), "HEAD names no commit"),
    ("missing", lambda clone: (clone / ".git/HEAD").write_text("1" * 40), "fatal: git cat-file: could not get object info"),
    ("of SHA-256", lambda clone: (clone / ".git/HEAD").write_text("1" * 64), "wrong index|could not get object info"),
    ("a pipe", lambda clone: os.mkfifo(emptied(clone) / ".git/HEAD"), "HEAD names no commit"),
    ("a tree", lambda clone: (clone / ".git/HEAD").write_text(git(clone, "rev-parse", "HEAD^{tree}")), "fatal: git cat-file"),
    ("forged", lambda clone: forge(clone, b"tree %s\n" % git(clone, "rev-parse", "HEAD^{tree}").encode(), "ab" * 20),
     "the commit is not what its name says|mismatch"),
    ("replacement", lambda clone: forge(clone, git(clone, "cat-file", "commit", "HEAD").encode() + b"\nmore", "ab" * 20),
     "the commit is not what its name says|mismatch")]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, origin: dict[str, str]) -> Path:
    """A clean clone on a branch, whose origin has credentials."""
    clone = fetch(tmp_path_factory.mktemp("pristine"), f"{origin['file']}/demo")
    git(clone, "checkout", "-q", "-b", "main")
    git(clone, "config", "remote.origin.url", "https://user:secret@example.org/demo.git?token=secret")
    return clone


@needs("git")
class TestHistory:
    @pytest.mark.parametrize("name, change, complaint", HISTORIES, ids=[row[0] for row in HISTORIES])
    def test_belief(self, tmp_path: Path, origin: dict[str, str], pristine: Path, name: str, change: Callable[[Path], Any], complaint: str) -> None:
        clone = tmp_path / "source" / 'a "clone"'
        shutil.copytree(pristine, clone, symlinks=True)
        change(clone)
        tree = confbuild.git_tree(str(clone), confbuild.walk_files(str(clone)))
        before = sorted(os.listdir(clone.parent))
        if complaint:
            with pytest.raises(confbuild.BuildFailed, match=complaint):
                confbuild.believe_history(str(clone), tree, ORACLE_ENV)
        else:
            assert confbuild.believe_history(str(clone), tree, ORACLE_ENV) == (origin["main"], "https://example.org/demo.git")
        assert sorted(os.listdir(clone.parent)) == before, "nothing ran, nothing is left"

    def test_a_large_commit(self, tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of which no more than the size is read."""
        tree, size = git(pristine, "rev-parse", "HEAD^{tree}"), int(git(pristine, "cat-file", "-s", "HEAD"))
        monkeypatch.setattr(confbuild, "MAX_COMMIT", size)
        assert confbuild.believe_history(str(pristine), tree, ORACLE_ENV)[0] == git(pristine, "rev-parse", "HEAD")
        monkeypatch.setattr(confbuild, "MAX_COMMIT", size - 1)
        asked = list[Sequence[str]]()
        monkeypatch.setattr(confbuild, "_git", lambda arguments, *rest, _git=confbuild._git, **more: asked.append(arguments) or _git(arguments, *rest, **more))
        with pytest.raises(confbuild.BuildFailed, match=f"the commit has more than {size - 1} bytes") as caught:
            confbuild.believe_history(str(pristine), tree, ORACLE_ENV)
        assert caught.value.error_type == "LimitError" and [row[:2] for row in asked if row[0] == "cat-file"] == [["cat-file", "-s"]]

    def test_no_origin(self, tmp_path: Path, origin: dict[str, str]) -> None:
        clone = fetch(tmp_path, f"{origin['file']}/demo")
        git(clone, "config", "--unset", "remote.origin.url")
        assert confbuild.believe_history(str(clone), git(clone, "rev-parse", "HEAD^{tree}"), ORACLE_ENV) == (origin["main"], "")

# endregion 14
# ==============================================================================
# region 15. Toolchains
# ==============================================================================


REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"
SHA, COMMIT = "ab" * 32, "c0ffee" + "0" * 34


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def on_path(*folders: Path) -> dict[str, str]:
    """An environment with these folders first."""
    return {**os.environ, "PATH": ":".join((*map(str, folders), os.environ["PATH"]))}


def failure(call: Callable[[], Any]) -> tuple[str, str]:
    """The (error_type, message) of the BuildFailed that call raises."""
    with pytest.raises(confbuild.BuildFailed) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value.error_type, str(caught.value)


class TestDetect:
    @pytest.mark.parametrize(("markers", "name"), [
        (["flake.nix", "Cargo.lock"], "nix"), (["flake.nix"], "nix"), (["Cargo.lock", "Cargo.toml"], "cargo")])
    def test_order(self, tmp_path: Path, markers: list[str], name: str) -> None:
        for marker in markers:
            (tmp_path / marker).touch()
        assert confbuild.detect_toolchain(str(tmp_path)).name == name

    def test_a_marker_is_a_regular_file(self, tmp_path: Path) -> None:
        (tmp_path / "flake.nix").mkdir()
        (tmp_path / "other").touch()
        (tmp_path / "Cargo.lock").symlink_to("other")
        kind, message = failure(lambda: confbuild.detect_toolchain(str(tmp_path)))
        assert (kind, message) == ("UnsupportedToolchainError", "no flake.nix and no Cargo.lock in the project")
        (tmp_path / "Cargo.lock").unlink()
        os.mkfifo(tmp_path / "Cargo.lock")
        assert failure(lambda: confbuild.detect_toolchain(str(tmp_path)))[0] == "UnsupportedToolchainError"


# As rustup: what it stands for depends on the directory in which it is asked.
RUSTUP = """[ "${0##*/}" = rustup ] && [ "$1" = which ] || { echo "rustup was run as ${0##*/} $1"; exit 0; }
[ -f rust-toolchain ] || { echo "info: looking" >&2; echo "error: no default toolchain" >&2; exit 1; }
echo "@/$(cat rust-toolchain)/bin/$2"
"""


class TestPrograms:
    @pytest.fixture
    def rustup(self, tmp_path: Path) -> Path:
        """A folder whose cargo is a link to rustup, with the toolchains old and new."""
        script(tmp_path / "bin" / "rustup", RUSTUP.replace("@", str(tmp_path)))
        (tmp_path / "bin" / "cargo").symlink_to("rustup")
        for name in ("old", "new"):
            script(tmp_path / name / "bin" / "cargo", f"echo cargo {name}\n")
            (tmp_path / ("project-" + name)).mkdir()
            (tmp_path / ("project-" + name) / "rust-toolchain").write_text(name)
        return tmp_path / "bin"

    def test_a_shim_is_asked_inside_of_the_project(self, tmp_path: Path, rustup: Path) -> None:
        for name in ("old", "new"):
            project_path = str(tmp_path / ("project-" + name))
            found = confbuild.resolve_program("cargo", project_path, on_path(rustup))
            assert found == str(tmp_path / name / "bin" / "cargo")
            digest = hashlib.sha256((tmp_path / name / "bin" / "cargo").read_bytes()).hexdigest()
            assert confbuild.describe_program(found, project_path, on_path(rustup)) == confbuild.Digest(f"cargo {name}", digest)
            assert confbuild.Digest(f"cargo {name}", digest).to_wire() == {"digest": {"sha256": digest}, "version": f"cargo {name}"}

    def test_a_shim_by_hard_link_or_by_a_chain_of_links(self, tmp_path: Path, rustup: Path) -> None:
        """`ln -s ~/.cargo/bin/cargo /usr/local/bin/cargo` is common; the file at its end is rustup, which is no cargo."""
        (tmp_path / "hard").mkdir()
        os.link(rustup / "rustup", tmp_path / "hard" / "rustup")
        os.link(rustup / "rustup", tmp_path / "hard" / "cargo")
        (tmp_path / "local").mkdir()
        (tmp_path / "local" / "cargo").symlink_to(rustup / "cargo")
        for folder in ("hard", "local"):
            found = confbuild.resolve_program("cargo", str(tmp_path / "project-old"), on_path(tmp_path / folder))
            assert found == str(tmp_path / "old" / "bin" / "cargo"), folder

    def test_what_rustup_has_not(self, tmp_path: Path, rustup: Path) -> None:
        def ask() -> str:
            return confbuild.resolve_program("cargo", str(tmp_path), on_path(rustup))
        assert failure(ask) == ("UnsupportedToolchainError", "rustup which cargo: error: no default toolchain")
        (tmp_path / "rust-toolchain").write_text("gone")  # rustup says where, and there is nothing
        assert failure(ask) == ("UnsupportedToolchainError", "rustup which cargo: no answer")

    def test_links_are_resolved_and_a_stranger_called_rustup_is_not_asked(self, tmp_path: Path) -> None:
        script(tmp_path / "real", "echo cargo 1\n")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "cargo").symlink_to(tmp_path / "real")
        script(tmp_path / "bin" / "rustup", "echo /bin/false\n")
        assert confbuild.resolve_program("cargo", str(tmp_path), on_path(tmp_path / "bin")) == str(tmp_path / "real")

    @pytest.mark.parametrize("name", ["cargo", "rustc", "nix"])
    def test_not_installed(self, tmp_path: Path, name: str) -> None:
        assert failure(lambda: confbuild.resolve_program(name, str(tmp_path), {"PATH": str(tmp_path)})) == (
            "UnsupportedToolchainError", f"{name} is not installed on the builder")

    @pytest.mark.parametrize(("body", "kind", "fragment"), [
        ("echo one >&2; echo 'two words' >&2; exit 3", "UnsupportedToolchainError", "--version: two words"),
        ("exit 3", "UnsupportedToolchainError", "--version: status 3"),
        ("", "UnsupportedToolchainError", "--version: "),
        ("printf 'cargo \\033[31m1'", "UnsupportedToolchainError", "--version: "),
        ("printf 'cargo \\0001'", "UnsupportedToolchainError", "--version: "),
        ("yes", "LimitError", "printed more than 65536 bytes"),
        ("kill -9 $$", "UnsupportedToolchainError", "--version: status -9"),
    ])
    def test_a_program_that_does_not_tell_its_version(self, tmp_path: Path, body: str, kind: str, fragment: str) -> None:
        path = str(script(tmp_path / "cargo", body + "\n"))
        found = failure(lambda: confbuild.describe_program(path, str(tmp_path), dict(os.environ)))
        assert found[0] == kind and fragment in found[1]

    def test_the_version_is_the_first_line(self, tmp_path: Path) -> None:
        path = script(tmp_path / "nix", "pwd; echo nix\n")
        assert confbuild.describe_program(str(path), str(tmp_path), dict(os.environ)).version == str(tmp_path)


class TestOutsideInfluence:
    NAMES = (".cargo/config", ".cargo/config.toml", "Cargo.toml", "rust-toolchain", "rust-toolchain.toml", ".git", "flake.nix")

    @pytest.mark.parametrize("name", NAMES)
    def test_each_name_above_the_project(self, tmp_path: Path, name: str) -> None:
        inside = tmp_path / "a" / "b" / "project"
        (inside / name).parent.mkdir(parents=True)
        (inside / name).touch()
        confbuild.refuse_outside_influence(str(inside))  # its own files are part of the source
        for folder, make in ((tmp_path / "a" / "b", Path.touch), (tmp_path, lambda path: path.symlink_to("nowhere"))):
            (folder / name).parent.mkdir(exist_ok=True)
            make(folder / name)
            assert failure(lambda: confbuild.refuse_outside_influence(str(inside))) == (
                "SourceError", f"{folder / name}, outside of the source, would change the build")
            (folder / name).unlink()

    def test_through_a_link(self, tmp_path: Path) -> None:
        """cargo looks above the real directory."""
        (tmp_path / "real" / "project").mkdir(parents=True)
        (tmp_path / "real" / "Cargo.toml").touch()
        (tmp_path / "link").symlink_to("real/project")
        assert "real/Cargo.toml" in failure(lambda: confbuild.refuse_outside_influence(str(tmp_path / "link")))[1]


class TestLockfile:
    def test_none_and_some(self, tmp_path: Path) -> None:
        assert confbuild.read_lockfile(str(tmp_path / "flake.lock")) == b""
        (tmp_path / "flake.lock").write_bytes(b"\xff\0")
        assert confbuild.read_lockfile(str(tmp_path / "flake.lock")) == b"\xff\0"

    @pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.symlink_to("/etc/passwd"), lambda p: p.symlink_to("nowhere"), os.mkfifo,
                                      lambda p: subprocess.run(["truncate", "-s", str((64 << 20) + 1), p], check=True)],
                             ids=["folder", "link", "dangling", "pipe", "large"])
    def test_other_things(self, tmp_path: Path, make: Callable[[Path], Any]) -> None:
        make(tmp_path / "Cargo.lock")
        assert failure(lambda: confbuild.read_lockfile(str(tmp_path / "Cargo.lock"))) == (
            "SourceError", "Cargo.lock is no regular file of at most 64 MiB")


def entry(name: str = "libc", version: str = "0.2.1", **more: str) -> str:
    """One [[package]] of a Cargo.lock."""
    return "[[package]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"name": name, "version": version, **more}.items())


def vcs(version: str, url: str) -> dict[str, Any]:
    return {"digest": {"gitCommit": COMMIT}, "name": "usize", "uri": f"pkg:cargo/usize@{version}?vcs_url=git+{url}@{COMMIT}"}


LIBC = {"digest": {"sha256": SHA}, "name": "libc", "uri": f"pkg:cargo/libc@0.2.1?checksum=sha256:{SHA}"}


class TestCargoDependencies:
    @pytest.mark.parametrize(("lock", "expected"), [
        ("", []),
        ("version = 4\n", []),
        # Version 1: checksums in a table of their own; no `version` key [cargo, core/resolver/encode.rs].
        (entry(source=REGISTRY) + f'[metadata]\n"checksum libc 0.2.1 ({REGISTRY})" = "{SHA}"\n', [LIBC]),
        ("version = 3\n" + entry(source=REGISTRY, checksum=SHA), [LIBC]),
        ("version = 4\n" + entry(source="sparse+https://index.crates.io/", checksum=SHA), [LIBC]),
        # Another registry: a purl without repository_url would be one of crates.io [purl-spec, known qualifiers].
        *[("version = 4\n" + entry(source=source, checksum=SHA), [{**LIBC, "uri": f"{LIBC['uri']}&repository_url={url}"}]) for source, url in (
            ("registry+ssh://git@example.org/index", "ssh://example.org/index"), ("sparse+https://example.invalid", "https://example.invalid"),
            ("sparse+https://u:secret@h/i/?a=1&b#c", "https://h/i/%3Fa=1%26b%23c"), ("registry+file:///srv/index", "file:///srv/index"),
            *((f"{kind}+https://{url}", f"https://{url}") for kind, url in (
                ("registry", "index.crates.io/"), ("sparse", "index.crates.io"), ("sparse", "index.crates.io/x"), ("sparse", "github.com/rust-lang/crates.io-index"),
                ("registry", "github.com/rust-lang/crates.io-index.git"), ("registry", "h/crates.io-index"))))],
        # Version 1 of the format, from another registry; and one name in two registries.
        (entry(source="registry+https://h/i") + f'[metadata]\n"checksum libc 0.2.1 (registry+https://h/i)" = "{SHA}"\n', [{**LIBC, "uri": f"{LIBC['uri']}&repository_url=https://h/i"}]),
        (entry(source="registry+https://h/i", checksum=SHA) + entry(source=REGISTRY, checksum=SHA), [LIBC, {**LIBC, "uri": f"{LIBC['uri']}&repository_url=https://h/i"}]),
        # The encoding of Kettle's own fixture: the query stays, and only ? # & and the space are escaped.
        (entry("usize", "1.0.0", source=f"git+https://github.com/o/rs?branch=usize#{COMMIT}"),
         [vcs("1.0.0", "https://github.com/o/rs%3Fbranch=usize")]),
        (entry("usize", "1.0.0+b", source=f"git+https://h/r?branch=a%20b&rev=c#d#{COMMIT}"),
         [vcs("1.0.0+b", "https://h/r%3Fbranch=a%20b%26rev=c%23d")]),
        (entry("usize", "1.0.0", source=f"git+https://user:se@cret@h/r@2#{COMMIT}"), [vcs("1.0.0", "https://h/r@2")]),
        (entry("usize", "1.0.0", source=f"git+ssh://git@h/r.git#{COMMIT}"), [vcs("1.0.0", "ssh://h/r.git")]),
        # One name in two versions; by uri, bytewise.
        (entry("b", "2.0.0", source=REGISTRY, checksum=SHA) + entry("a", "10.0.0", source=REGISTRY, checksum=SHA)
         + entry("b", "10.0.0", source=REGISTRY, checksum=SHA),
         [{"digest": {"sha256": SHA}, "name": n, "uri": f"pkg:cargo/{n}@{v}?checksum=sha256:{SHA}"}
          for n, v in (("a", "10.0.0"), ("b", "10.0.0"), ("b", "2.0.0"))]),
        # A workspace member and the root: inside, so the tree's hash covers them.
        (entry("demo", "0.1.0") + entry("member", "9.9.9"), []),
    ])
    def test_what_is_recorded(self, tmp_path: Path, lock: str, expected: list[dict[str, Any]]) -> None:
        (tmp_path / "Cargo.toml").write_text(MANIFEST)
        (tmp_path / "crates" / "x").mkdir(parents=True)
        (tmp_path / "crates" / "x" / "Cargo.toml").write_text('[package]\nname = "member"\n')
        assert confbuild.cargo_dependencies(lock.encode(), str(tmp_path)) == expected

    @pytest.mark.parametrize(("file", "text"), [
        ("Cargo.toml", MANIFEST + '[dependencies]\nevil = { path = "../evil" }\n'), ("Cargo.toml", MANIFEST + '[dependencies]\nx = { package = "evil", path = "/evil" }\n'),
        ("Cargo.toml", MANIFEST + '[target."cfg(unix)".build-dependencies.evil]\npath = "link"\n'),
        ("Cargo.toml", '[workspace.dependencies]\nevil = { path = ".." }\n'), (".cargo/config.toml", '[patch.crates-io]\nevil = { path = "../evil" }\n'),
        ("crates/x/Cargo.toml", '[dependencies]\nevil = { path = "../../../evil" }\n')])
    def test_nothing_from_outside(self, tmp_path: Path, file: str, text: str) -> None:
        """A package outside of the project is refused by name, also where a namesake inside would excuse it."""
        write_files(tmp_path / "demo", {"fixture/Cargo.toml": '[package]\nname = "evil"\n', "inner/Cargo.toml": '[package]\nname = "inner"\n',
                                 "y/Cargo.toml": '[dependencies]\ninner = { path = "../inner" }\n', file: text})
        (tmp_path / "demo" / "link").symlink_to(tmp_path)
        assert confbuild.cargo_dependencies(entry("inner").encode(), str(tmp_path / "demo")) == []
        kind, message = failure(lambda: confbuild.cargo_dependencies(entry("evil").encode(), str(tmp_path / "demo")))
        assert kind == "ProvenanceError" and "evil" in message and "no package inside the project" in message

    @pytest.mark.parametrize(("lock", "kind", "fragment"), [
        (entry("other", "1.0.0"), "ProvenanceError", "other 1.0.0 has no source and is no package inside the project"),
        (entry("None", "1.0.0"), "ProvenanceError", "None 1.0.0 has no source"),  # a virtual workspace has no [package]
        (entry("large", "1.0.0"), "ProvenanceError", "large 1.0.0 has no source"),
        (entry("broken", "1.0.0"), "ProvenanceError", "broken 1.0.0 has no source"),
        (entry("fetched", "1.0.0"), "ProvenanceError", "fetched 1.0.0 has no source"),  # a manifest below .git
        (entry(source=REGISTRY), "ProvenanceError", "libc 0.2.1 has no checksum"),
        (entry(source="sparse+https://i/"), "ProvenanceError", "libc 0.2.1 has no checksum"),
        *[(entry(source=source, checksum=SHA), "ProvenanceError", "libc 0.2.1 is from a registry whose URL is not plain ASCII") for source in (
            "sparse+", "registry+https://h/\u00e9", "sparse+https://h/ x", "registry+https://h/\x1b")],
        (entry(source=REGISTRY, checksum=""), "ProvenanceError", "libc 0.2.1 has no checksum"),
        (entry(source=REGISTRY, checksum="AB" * 32), "ProvenanceError", "libc 0.2.1 has no checksum"),
        (entry(source=REGISTRY, checksum=SHA + "\n"), "ProvenanceError", "libc 0.2.1 has no checksum"),
        (entry(source=REGISTRY) + f'[metadata]\n"checksum libc 0.2.1 ({REGISTRY})" = "<none>"\n', "ProvenanceError", "libc 0.2.1 has no checksum"),
        (entry(source="git+https://h/r"), "ProvenanceError", "libc 0.2.1 has no commit"),
        (entry(source="git+https://h/r#main"), "ProvenanceError", "libc 0.2.1 has no commit"),
        (entry(source=f"git+https://h/\u00e9#{COMMIT}"), "ProvenanceError", "libc 0.2.1 has no commit"),
        (entry(source="path+file:///x"), "ProvenanceError", "libc 0.2.1 has the unknown source 'path+file:///x'"),
        (entry(source="" + "x" * 200), "ProvenanceError", "has the unknown source '" + "x" * 80 + "'"),
        (entry(source=""), "ProvenanceError", "libc 0.2.1 has the unknown source ''"),
        (entry("a b", source=REGISTRY, checksum=SHA), "ProvenanceError", "'a b' '0.2.1' is no name and version"),
        (entry("a/../b", source=REGISTRY, checksum=SHA), "ProvenanceError", "is no name and version"),
        (entry("a", "1?x=1", source=REGISTRY, checksum=SHA), "ProvenanceError", "'a' '1?x=1' is no name and version"),
        ("[[package]", "SourceError", "Cargo.lock: TOMLDecodeError: "),
        ("version = 4\nversion = 4\n", "SourceError", "Cargo.lock: TOMLDecodeError: "),
        ("[[package]]\nname = 'a'\n", "SourceError", "Cargo.lock: KeyError: 'version'"),
        ("[[package]]\nname = 1\nversion = '1'\n", "SourceError", "a name, version, source or checksum is no text"),
        ("[[package]]\nname = 'a'\nversion = '1'\nsource = ['x']\n", "SourceError", "a name, version, source or checksum is no text"),
        ("metadata = 3\n", "SourceError", "a name, version, source or checksum is no text"),
        ("package = 3\n", "SourceError", "Cargo.lock: TypeError: "),
        ("package = ['x']\n", "SourceError", "Cargo.lock: TypeError: "),
        ("[package]\nname = 'a'\n", "SourceError", "Cargo.lock: TypeError: "),
        ("x = " + "[" * 5000, "SourceError", "Cargo.lock: RecursionError: "),
        ("\udcff", "SourceError", "Cargo.lock: UnicodeDecodeError: "),
    ], ids=lambda value: value[-30:])
    def test_what_is_refused(self, tmp_path: Path, lock: str, kind: str, fragment: str) -> None:
        for folder, text in ((".", "[workspace]\nmembers = []\n"), ("large", '[package]\nname = "large"\n#' + "x" * (1 << 20)),
                             ("broken", '[package]\nname = "broken"\n['), (".git/x", '[package]\nname = "fetched"\n'), ("odd", "package = 3\n")):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "Cargo.toml").write_text(text)
        found = failure(lambda: confbuild.cargo_dependencies(lock.encode(errors="surrogateescape"), str(tmp_path)))
        assert found[0] == kind and fragment in found[1]

    WORD = st.sampled_from(["[[package]]\n", "[metadata]\n", "name", "version", "source", "checksum", "package", " = ", '"', "'", "\n", REGISTRY,
                            SHA, "git+",
                            "https://u:p@h/r", "#" + COMMIT, "libc", "1.0", "[", "]", "{", "}", ",", "1979-05-27", "\\u00e9", "\x1b", "=", "."])

    @given(st.one_of(st.binary(max_size=60), st.lists(WORD, max_size=25).map(lambda words: "".join(words).encode()),
                     st.lists(st.builds(lambda *v: entry(**dict(zip(("name", "version", "source", "checksum"), v, strict=True))),
                                        *[st.one_of(st.text(max_size=5), st.lists(WORD, max_size=3).map("".join))] * 4), max_size=3)
                     .map(lambda rows: "".join(rows).encode())))
    @settings(max_examples=200)
    @example(b"package = [{name = '', version = ''}]")
    def test_any_bytes(self, lock: bytes) -> None:
        """Whatever stands there: a list that the statement's schema takes, or BuildFailed."""
        try:
            found = confbuild.cargo_dependencies(lock, str(SHARED / "nowhere"))
        except confbuild.BuildFailed as e:
            assert e.error_type in ("SourceError", "ProvenanceError")
            return
        assert [d["uri"] for d in found] == sorted(d["uri"] for d in found)
        confbuild.check_statement(statement(predicate__buildDefinition__resolvedDependencies=found))
        assert all("@" not in d["uri"].partition("vcs_url=")[2].rpartition("@")[0].partition("://")[2].partition("/")[0] for d in found)


class TestPlanCargo:
    def test_the_plan(self, tmp_path: Path, stub_path: str) -> None:
        (tmp_path / "Cargo.lock").write_text(LOCK + entry(source=REGISTRY, checksum=SHA))
        (tmp_path / "Cargo.toml").write_text(MANIFEST)
        stub = stub_path.partition(":")[0]
        plan = confbuild.plan_cargo(str(tmp_path), {"PATH": stub_path, "RUSTC": "/evil", "CARGO_TARGET_DIR": "/evil"})
        assert plan.argv == (f"{stub}/cargo", "build", "--locked", "--release") and plan.command == "cargo build --locked --release"
        assert list(plan.programs.items()) == [
            (name, confbuild.Digest(version, hashlib.sha256(Path(stub, name).read_bytes()).hexdigest()))
            for name, version in (("cargo", "cargo 1.90.0 (840b83a10 2025-07-30)"), ("rustc", "rustc 1.90.0 (1159e78c4 2025-09-14)"))]
        assert plan.env == {"PATH": f"{stub}:{stub_path}", "RUSTC": f"{stub}/rustc", "CARGO_TARGET_DIR": str(tmp_path / "target")}
        assert plan.lockfile_sha256 == hashlib.sha256((tmp_path / "Cargo.lock").read_bytes()).hexdigest()
        assert (plan.dependencies, plan.parameters, plan.keep_stdout) == ([LIBC], {}, False)
        assert plan.collect(b"") == []  # no target/release at all
        release = tmp_path / "target" / "release"
        (release / "deps").mkdir(parents=True)
        for name, mode in (("b", 0o755), ("a.exe", 0o100), ("demo.d", 0o755), ("lib-x.so", 0o755), ("plain", 0o644), (".hidden", 0o755),
                           ("v-1.2", 0o755)):
            (release / name).touch()
            (release / name).chmod(mode)
        (release / "link").symlink_to("b")
        (release / "dangling").symlink_to("nowhere")
        os.mkfifo(release / "pipe", 0o755)
        assert plan.collect(b"") == [("a.exe", str(release / "a.exe")), ("b", str(release / "b"))]

    @pytest.mark.parametrize("link", ["demo/target/release", "demo/target", "demo", "."])
    @pytest.mark.parametrize("target", ["/usr/bin", "real", "nowhere", "itself"])
    def test_a_link_on_the_way(self, tmp_path: Path, stub_path: str, link: str, target: str) -> None:
        """Whatever part of target/release a build replaces by a link, absolute or relative, also to what looks right: nothing behind it is an artifact."""
        project = write_files(tmp_path / "source/demo", {"Cargo.lock": LOCK, "Cargo.toml": MANIFEST})
        plan = confbuild.plan_cargo(str(project), {"PATH": stub_path})
        script(project / "target/release/demo", "")
        assert [name for name, _ in plan.collect(b"")] == ["demo"]
        place = tmp_path / "source" / link
        place.rename(tmp_path / "real")
        place.symlink_to({"real": str(tmp_path / "real"), "itself": place.name}.get(target, target))
        if target == "itself":  # leads nowhere: there are no artifacts
            assert plan.collect(b"") == []
            return
        with pytest.raises(confbuild.BuildFailed, match="^target/release is /.*: a link, which is not followed$") as caught:
            plan.collect(b"")
        assert caught.value.error_type == "ProvenanceError"

    def test_a_link_before_the_build(self, tmp_path: Path, stub_path: str) -> None:
        """The folder of a server's state may lie behind one."""
        project = write_files(tmp_path / "real/demo", {"Cargo.lock": LOCK, "Cargo.toml": MANIFEST})
        (tmp_path / "link").symlink_to("real")
        plan = confbuild.plan_cargo(str(tmp_path / "link/demo"), {"PATH": stub_path})
        script(project / "target/release/demo", "")
        assert plan.collect(b"") == [("demo", str(project / "target/release/demo"))]


# Known answers: printf 'known content\\n' hashed, as nix 2.8.0 writes it in hexadecimal and newer ones as SRI.
KNOWN_DIGESTS = {name: hashlib.new(name, b"known content\n", usedforsecurity=False).hexdigest() for name in ("md5", "sha1", "sha256", "sha512")}
SRI = {name: f"{name}-" + base64.b64encode(bytes.fromhex(digest)).decode() for name, digest in KNOWN_DIGESTS.items()}
DATA, HELLO = "988sb856nlf2qw174hxxfrsj3rv810dj-data-1.0.txt.drv", "gayfz6wm0hv029frwg0iwh8xbbzb986b-hello-1.0.drv"


def shape(output: Any, store: str = "/nix/store/", name: Any = "data-1.0.txt", version: int = 0, env: Any = None, **more: Any) -> bytes:
    """`nix derivation show --recursive` of a program and the one file that it fetches. version: that of the format."""
    env = {"name": "data-1.0.txt", "url": "https://h/d", "urls": "https://h/d"} if env is None else env
    data = {"outputs": {"out": output}, "env": env, **({"name": name} if name else {}), **more}
    table = {store + DATA: data, store + HELLO: {"outputs": {"out": {"path": "/nix/store/bn0l-hello-1.0"}, "dev": {}}, "env": {"name": "hello-1.0"}}}
    return json.dumps({"derivations": table, "version": version} if version >= 4 else table).encode()


SHAPES = {
    "2.8": (shape({"path": "/nix/store/x", "hashAlgo": "sha256", "hash": KNOWN_DIGESTS["sha256"]}, name=None), "/nix/store/", "flat", "sha256"),
    "2.8 recursive": (shape({"path": "/nix/store/x", "hashAlgo": "r:sha256", "hash": KNOWN_DIGESTS["sha256"]}, name=None), "/nix/store/", "nar", "sha256"),
    "2.15": (shape({"path": "/nix/store/x", "hashAlgo": "sha256", "hash": KNOWN_DIGESTS["sha256"]}), "/nix/store/", "flat", "sha256"),
    "2.23": (shape({"method": "nar", "hashAlgo": "sha256", "hash": KNOWN_DIGESTS["sha256"]}), "/nix/store/", "nar", "sha256"),
    "2.32": (shape({"method": "flat", "hashAlgo": "sha256", "hash": KNOWN_DIGESTS["sha256"]}, "", version=3), "", "flat", "sha256"),
    "2.33": (shape({"method": "flat", "hash": SRI["sha256"]}, "", version=4), "", "flat", "sha256"),
    "2.33 pre": (shape({"method": "nar", "hash": {"algorithm": "sha256", "format": "base64", "hash": SRI["sha256"][7:]}}, "", version=4), "", "nar",
                 "sha256"),
    "master": (shape({"method": "text", "hash": SRI["sha256"]}, "", version=5,
                     env={"url": {"value": "https://h/d"}, "urls": {"value": "https://h/d"}}),
               "", "text", "sha256"),
    "structured": (shape({"method": "flat", "hash": SRI["sha256"]}, "", version=4, env={},
                         structuredAttrs={"url": "https://h/d", "urls": ["https://h/d"]}),
                   "", "flat", "sha256"),
    "nameless": (shape({"method": "flat", "hash": SRI["sha256"]}, name=None, env={"url": "https://h/d", "urls": "https://h/d"}),
                 "/nix/store/", "flat", "sha256"),
    **{f"{name} {form}": (shape({"hashAlgo": algorithm, "hash": digest[name]}), "/nix/store/", mode, name) for name in ("md5", "sha1", "sha512")
       for form, digest, algorithm, mode in (("hex", KNOWN_DIGESTS, name, "flat"), ("r:hex", KNOWN_DIGESTS, "r:" + name, "nar"), ("SRI", SRI, "", "flat"))},
}


FIELDS = st.sampled_from(["outputs", "out", "hash", "hashAlgo", "method", "name", "env", "url", "urls", "value", "x.drv"])


class TestNixDerivations:
    def test_the_vector(self) -> None:
        """What nix 2.8.0 printed, and the SRI in the flake that it was given."""
        assert KNOWN_DIGESTS["sha256"] == "a5e29604a88ef9dace3ea3de21aa0cfb09946846146070b9a9fe17f2f9701212"
        assert SRI["sha256"] == "sha256-peKWBKiO+drOPqPeIaoM+wmUaEYUYHC5qf4X8vlwEhI="

    @pytest.mark.parametrize("name", SHAPES)
    def test_every_shape_gives_the_same(self, name: str) -> None:
        """Kettle counts the two names of the wrapper since 2.33, and writes base64 there."""
        data, store, mode, algorithm = SHAPES[name]
        count, fetches = confbuild.parse_derivations(data)
        assert count == 2
        assert fetches == [{
            "annotations": {"drvPath": store + DATA, "outputHashMode": mode, "url": "https://h/d", "urls": "https://h/d"},
            "digest": {algorithm: KNOWN_DIGESTS[algorithm]}, "name": "data-1.0.txt", "uri": f"pkg:nix-fetch/data-1.0.txt?hash={algorithm}:{KNOWN_DIGESTS[algorithm]}"}]
        assert list(fetches[0]) == ["annotations", "digest", "name", "uri"] and list(fetches[0]["annotations"])[:2] == ["drvPath", "outputHashMode"]
        confbuild.check_statement(statement(predicate__buildDefinition__resolvedDependencies=fetches))

    def test_three_are_three_and_sorted_by_name(self) -> None:
        row = {"outputs": {"out": {"method": "nar", "hash": SRI["sha256"]}}}
        table = {f"{i:032}-{name}.drv": {**row, "name": name, "env": {"urls": ["https://a/", "https://b/"]}} for i, name in enumerate("cabb")}
        count, fetches = confbuild.parse_derivations(json.dumps({"version": 4, "derivations": table}).encode())
        assert count == 4 and [f["name"] for f in fetches] == ["a", "b", "b", "c"]
        assert fetches[1]["annotations"] == {"drvPath": f"{2:032}-b.drv", "outputHashMode": "nar", "urls": "https://a/,https://b/"}
        assert confbuild.parse_derivations(b'{"derivations":{},"version":4}') == (0, [])

    @pytest.mark.parametrize("data", [
        b"", b"[]", b"nix", b"\xff", b"[" * 100_000, b'{"version":4}', b'{"derivations":null}', b'{"a":{}}', b'{"a":{"outputs":[]}}',
        b'{"a":{"outputs":{"o":"x"}}}',
        shape({"hash": SRI["sha256"]}, env=[]), shape({"hash": SRI["sha256"]}, structuredAttrs="x"), shape({"hash": SRI["sha256"]}, name=["x"]),
        *(shape({"hashAlgo": algorithm, "hash": value}) for algorithm, value in (
            ("sha256", 5), ("sha256", ["x"]), ("sha256", KNOWN_DIGESTS["sha256"][:-2]), ("sha256", KNOWN_DIGESTS["sha512"]), ("sha512", KNOWN_DIGESTS["sha256"]),
            ("sha256", "zz" * 32), ("", KNOWN_DIGESTS["sha256"]),
            ("blake3", KNOWN_DIGESTS["sha256"]), (5, KNOWN_DIGESTS["sha256"]), ("sha256", "sha256-"), ("sha256", SRI["sha256"] + "!"),
            ("sha256", "blake3-" + SRI["sha256"][7:]),
            ("sha256", "04wy2fws4gyib9hmdzyg8v8s4a2c2wrnya0d7cpgvvk8p0wx7pc5"), ("sha256", {"hash": "x"}),
            ("sha256", {"algorithm": [], "hash": "x"}))),
    ], ids=range(28))
    def test_other_shapes(self, data: bytes) -> None:
        kind, message = failure(lambda: confbuild.parse_derivations(data))
        assert kind == "ProvenanceError" and message.startswith("nix derivation show: ")

    JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.sampled_from(["", "x", "sha256", SRI["sha256"], KNOWN_DIGESTS["md5"]]),
                        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(FIELDS, inner, max_size=4))

    @given(JSON, JSON, JSON)
    @settings(max_examples=200)
    @example({"hash": SRI["sha256"]}, 5, {})
    @example({"hash": SRI["sha256"], "method": ["x"]}, "a", {})
    def test_any_json(self, output: Any, name: Any, env: Any) -> None:
        """Whatever it is: entries that the statement's schema takes, or BuildFailed."""
        data = shape(output, name=name, env=env)
        try:
            _, fetches = confbuild.parse_derivations(data)
        except confbuild.BuildFailed as e:
            assert e.error_type == "ProvenanceError"
        else:
            confbuild.check_statement(statement(predicate__buildDefinition__resolvedDependencies=fetches))


def flake_lock(inputs: Any, root: str = "root", /, **nodes: Any) -> bytes:
    return json.dumps({"nodes": {**nodes, root: {"inputs": inputs}}, "root": root, "version": 7}).encode()


class TestFlakeInputs:
    @pytest.mark.parametrize(("lock", "expected"), [
        (b"", []),
        (json.dumps({"nodes": {"root": {}}, "root": "root"}).encode(), []),
        # The name is the input's, not the node's; one that follows another has no node; relative paths have no narHash since 2.26.
        (flake_lock({"z": "n_2", "a": "n", "f": ["z", "a"], "rel": "r", "bare": "b"}, n_2={"locked": {"narHash": "sha256-Z="}},
                    n={"locked": {"narHash": "sha256-A="}},
                    r={"locked": {"path": "./x"}}, b={}, unused={"locked": {"narHash": "sha256-U="}}),
         [{"name": "a", "narHash": "sha256-A="}, {"name": "z", "narHash": "sha256-Z="}]),
        (flake_lock({"a": "root"}, "top", root={"locked": {"narHash": "sha256-A="}}), [{"name": "a", "narHash": "sha256-A="}]),
    ])
    def test_known(self, lock: bytes, expected: list[dict[str, str]]) -> None:
        assert confbuild.flake_inputs(lock) == expected

    @pytest.mark.parametrize(("lock", "fragment"), [
        (b"{", "JSONDecodeError"), (b"\xff", "UnicodeDecodeError"), (b"[]", "TypeError"), (b"{}", "KeyError: 'nodes'"),
        (b'{"nodes":{}}', "KeyError: 'root'"),
        (b'{"nodes":{},"root":"r"}', "KeyError: 'r'"), (b'{"nodes":{},"root":[]}', "TypeError"), (flake_lock([]), "AttributeError"),
        (flake_lock({"a": "b"}), "KeyError: 'b'"),
        (flake_lock({"a": "b"}, b={"locked": 5}), "AttributeError"), (b"[" * 100_000, "RecursionError")])
    def test_broken(self, lock: bytes, fragment: str) -> None:
        kind, message = failure(lambda: confbuild.flake_inputs(lock))
        assert kind == "SourceError" and message.startswith("flake.lock: " + fragment)


# A nix that notes how it was called, and answers what the test has put beside it.
NIX = """here="${0%/*}"; printf '%s\\n' "$*" >> "$here/calls"
case "$1" in
--version) cat "$here/version" ;;
build) cat "$here/stdout"; echo building >&2 ;;
*) [ -e .git ] && { echo "error: nix would ask git" >&2; exit 1; }
   [ -f "$here/lock" ] && cp "$here/lock" flake.lock
   [ -f "$here/error" ] && { cat "$here/error" >&2; exit 1; }
   cat "$here/derivations" ;;
esac
"""
FEATURES = "--extra-experimental-features nix-command --extra-experimental-features flakes"


@pytest.fixture
def nix(tmp_path: Path) -> Path:
    """The folder of a fake nix 2.34.7 and its answers; the flake without inputs beside it is the project."""
    folder = script(tmp_path / "nix" / "nix", NIX).parent
    (folder / "version").write_text("nix (Nix) 2.34.7\n")
    (folder / "derivations").write_bytes(SHAPES["2.33"][0])
    (folder / "stdout").touch()
    (tmp_path / "source" / "flake").mkdir(parents=True)
    (tmp_path / "source" / "flake" / "flake.nix").write_text("{ outputs = _: { }; }\n")
    return folder


class TestPlanNix:
    @pytest.mark.parametrize(("version", "show", "printing"), [
        ("nix (Nix) 2.8.0", "show-derivation", "--json"), ("nix (Nix) 2.9.0", "show-derivation", "--print-out-paths"),
        ("nix (Nix) 2.14.1", "show-derivation", "--print-out-paths"), ("nix (Nix) 2.15.0pre2", "derivation show", "--print-out-paths"),
        ("nix (Nix) 2.34.7", "derivation show", "--print-out-paths"), ("nix (Lix, like Nix) 2.91.1", "derivation show", "--print-out-paths"),
        ("nix (Determinate Nix 3.0.0) 2.26.1", "derivation show", "--print-out-paths"), ("nix of tomorrow", "derivation show", "--print-out-paths")])
    def test_each_version_in_its_own_words(self, tmp_path: Path, nix: Path, version: str, show: str, printing: str) -> None:
        (nix / "version").write_text(version + "\n")
        (nix / "derivations").write_bytes(SHAPES["2.8" if printing == "--json" else "2.33"][0])
        plan = confbuild.plan_nix(str(tmp_path / "source" / "flake"), on_path(nix))
        assert (nix / "calls").read_text().splitlines() == ["--version", f"{show} --recursive {FEATURES}"]
        assert plan.command == f"nix build --no-link {printing} {FEATURES}"
        assert [*plan.argv] == [str(nix / "nix"), *plan.command.split()[1:]] and plan.keep_stdout
        assert plan.programs == {"nix": confbuild.Digest(version, hashlib.sha256((nix / "nix").read_bytes()).hexdigest())}
        assert plan.parameters == {"evaluation": {"derivationCount": 2, "fetchCount": 1}}
        assert plan.dependencies[0]["digest"] == {"sha256": KNOWN_DIGESTS["sha256"]}
        assert plan.lockfile_sha256 == hashlib.sha256(b"").hexdigest()

    def test_inputs_and_lock(self, tmp_path: Path, nix: Path) -> None:
        lock = flake_lock({"dep": "d"}, d={"locked": {"narHash": "sha256-A="}})
        (tmp_path / "source" / "flake" / "flake.lock").write_bytes(lock)
        plan = confbuild.plan_nix(str(tmp_path / "source" / "flake"), on_path(nix))
        assert list(plan.parameters) == ["evaluation", "flakeInputs"] and plan.parameters["flakeInputs"] == [{"name": "dep", "narHash": "sha256-A="}]
        assert plan.lockfile_sha256 == hashlib.sha256(lock).hexdigest()

    def test_history_is_set_aside(self, tmp_path: Path, nix: Path) -> None:
        """The fake nix fails where it finds a .git, as the real one would read only what git knows."""
        (tmp_path / "source" / "flake" / ".git").mkdir()
        (tmp_path / "source" / "flake" / ".git" / "HEAD").touch()
        confbuild.plan_nix(str(tmp_path / "source" / "flake"), on_path(nix))
        assert [*tmp_path.glob("source/*/HEAD")] == [tmp_path / "source" / "history-set-aside" / "HEAD"]

    @pytest.mark.parametrize(("files", "kind", "message"), [
        ({"lock": "{}"}, "ProvenanceError", "flake.lock is missing or out of date: run `nix flake lock` and commit it"),
        ({"error": "error: first\nwarning: x\n\n       error: attribute 'x'\n   missing\n"}, "BuildError",
         "nix derivation show: error: attribute 'x'"),
        ({"error": "Segmentation\nfault\n"}, "BuildError", "nix derivation show: fault"),
        ({"error": "\n"}, "BuildError", "nix derivation show: no message"),
        ({"derivations": "[]"}, "ProvenanceError", "nix derivation show: AttributeError: 'list' object has no attribute 'get'"),
        ({"derivations": "x" * 2000}, "LimitError", "@/nix printed more than 1000 bytes")])
    def test_errors(self, tmp_path: Path, nix: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], kind: str, message: str) -> None:
        monkeypatch.setattr(confbuild, "GIB", 1000)
        for name, text in files.items():
            (nix / name).write_text(text)
        assert failure(lambda: confbuild.plan_nix(str(tmp_path / "source" / "flake"), on_path(nix))) == (kind, message.replace("@", str(nix)))

    def test_artifacts(self, tmp_path: Path) -> None:
        """Executables in bin/ of each output, also those that lie in another output; nothing that a link takes out of the store."""
        store = tmp_path / "store"
        tool = script(store / "b-tool" / "libexec" / "tool", "echo tool\n")
        hello = script(store / "a-hello" / "bin" / "hello", "echo hello\n")
        hidden = script(store / "a-hello" / "bin" / ".hello-wrapped", "")
        (store / "a-hello" / "bin" / "readme").touch(0o644)
        (store / "a-hello" / "bin" / "folder").mkdir()
        for name, target in (("tool", "../../b-tool/libexec/tool"), ("sh", "/bin/sh"), ("up", "../../../outside"), ("dangling", "nothing"),
                             ("sibling", str(tmp_path / "store-evil"))):
            (store / "a-hello" / "bin" / name).symlink_to(target)
        script(tmp_path / "outside", "")
        script(tmp_path / "store-evil", "")
        (store / "c-empty").mkdir()
        (store / "d-linked").mkdir()
        (store / "d-linked" / "bin").symlink_to("/bin")
        (store / "e-file").touch()
        paths = [str(store / name) for name in ("a-hello", "c-empty", "d-linked", "e-file", "f-gone")]
        expected = [(".hello-wrapped", str(hidden)), ("hello", str(hello)), ("tool", str(tool))]
        collect = confbuild._nix_executables

        rows = [{"drvPath": "x", "outputs": {"out": paths[0], "doc": None}}, {"drvPath": "y", "outputs": dict(enumerate(paths[1:]))}]
        assert collect(("\n".join(paths) + "\n").encode()) == collect(json.dumps(rows).encode()) == expected
        assert collect(b"") == collect(b"[]\n") == []
        other = script(store / "g-other" / "bin" / "hello", "echo hello\n")
        assert collect(f"{paths[0]}\n{store}/g-other\n".encode())[1] == ("hello", str(other))  # the same bytes
        other.write_text("#!/bin/sh\nrm -rf /\n")
        assert failure(lambda: collect(f"{paths[0]}\n{store}/g-other\n".encode())) == (
            "ProvenanceError", "two outputs have different executables called hello")

# endregion 15
# ==============================================================================
# region 16. Attester
# ==============================================================================


class Configfs:
    """root becomes like /sys/kernel/config/tsm/report [TSM; drivers/virt/coco/tsm.c, fs/configfs/file.c of Linux 6.12]: mkdir makes the attributes, which only
    rmdir removes; what is written to inblob counts when it is closed, which hides its error; the first read of outblob or auxblob makes the report.
    fail: errno by attribute, or by "mkdir", "rmdir", "write"; generations: writes of others before an attribute is read; short: bytes that a
    write takes; claim: that it says it took; generation: what that reads instead; other, size: of the report."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, auxblob: bytes = b"", provider: bytes = b"sev_guest\n", fail: Mapping[str, int] | None = None,
                 generations: Mapping[str, int] | None = None, short: int = 64, claim: int | None = None, generation: bytes | None = None, other: bool = False,
                 size: int = 1184) -> None:
        self.root, self.auxblob, self.provider, self.fail, self.generations = root, auxblob, provider, fail or {}, generations or {}
        self.short, self.claim, self.said, self.other, self.size = short, claim, generation, other, size
        self.made: list[str] = []
        self.written, self.inblob, self.asked = 0, b"", 0
        mkdir, rmdir = os.mkdir, os.rmdir

        def make(path: str, *arguments: Any) -> None:
            if os.path.dirname(path) != str(root):
                return mkdir(path, *arguments)
            self.check("mkdir", path)
            mkdir(path)
            self.made.append(path)
            self.written, self.inblob = 0, b""
            for name in ("generation", "inblob", "outblob", "privlevel", "privlevel_floor", "provider", *(["auxblob"] if provider.strip() == b"sev_guest" else [])):
                Path(path, name).touch()

        def remove(path: str, *arguments: Any, **keywords: Any) -> None:
            if os.path.dirname(path) != str(root):
                return rmdir(path, *arguments, **keywords)
            self.check("rmdir", path)
            for attribute in Path(path).iterdir():
                attribute.unlink()
            rmdir(path)

        monkeypatch.setattr(os, "mkdir", make)
        monkeypatch.setattr(os, "rmdir", remove)
        monkeypatch.setattr(confbuild, "open", self.open, raising=False)

    def check(self, name: str, path: str | None = None) -> None:
        if name in self.fail:
            raise OSError(self.fail[name], os.strerror(self.fail[name]), *([path] if path else []))

    def report(self, data: bytes) -> bytes:
        return (bytes(0x50) + (b"other" * 13)[:64] + bytes(1184) if self.other else bytes(0x50) + data + bytes(1184))[:self.size]

    def open(self, path: str, mode: str, buffering: int = -1) -> Any:
        if not path.startswith(f"{self.root}/"):
            return open(path, mode, buffering)
        name = os.path.basename(path)
        if not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        assert (mode, buffering) == ("wb" if name == "inblob" else "rb", 0), "a buffer would write and read when it likes"
        return Attribute(self, name)


class Attribute(io.RawIOBase):
    """An open attribute of Configfs."""

    def __init__(self, tsm: Configfs, name: str) -> None:
        self.tsm, self.name, self.content, self.wrote = tsm, name, None if name != "inblob" else b"", False

    def readable(self) -> bool:
        return self.name != "inblob"

    def writable(self) -> bool:
        return self.name == "inblob"

    def readinto(self, buffer: Any) -> int:
        if self.content is None:
            self.tsm.check(self.name)
            self.tsm.written += self.tsm.generations.get(self.name, 0)
            self.content = getattr(self, f"show_{self.name}")()
            if len(self.content) > 1 << 15:  # TSM_OUTBLOB_MAX
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        part = self.content[:min(len(buffer), 1000)]  # a read may be short
        buffer[:len(part)], self.content = part, self.content[len(part):]
        return len(part)

    def show_generation(self) -> bytes:
        return b"%d\n" % self.tsm.written if self.tsm.said is None else self.tsm.said

    def show_provider(self) -> bytes:
        return self.tsm.provider

    def show_outblob(self) -> bytes:
        self.tsm.asked += 1
        if len(self.tsm.inblob) != 64:  # sev_report_new
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self.tsm.report(self.tsm.inblob)

    def show_auxblob(self) -> bytes:
        self.show_outblob()
        return self.tsm.auxblob

    def write(self, data: Any) -> int:
        self.tsm.check("write")
        if len(data) > 64:  # TSM_INBLOB_MAX
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        taken = bytes(data)[:self.tsm.short]
        self.content, self.wrote = (self.content or b"") + taken, True
        return len(taken) if self.tsm.claim is None else self.tsm.claim

    def close(self) -> None:
        if not self.closed and self.wrote and "inblob" not in self.tsm.fail:
            self.tsm.inblob = self.content or b""
            self.tsm.written += 1
        super().close()


class SevGuest:
    """An ioctl of /dev/sev-guest [SEV-GUEST; drivers/virt/coco/sev-guest/sev-guest.c]. answers: to each request in turn, an errno with exitinfo2, or the 4000 bytes;
    then it answers well."""

    def __init__(self, table: bytes = b"", *answers: Any) -> None:
        self.table, self.answers, self.requests = table, list(answers), list[int]()

    @staticmethod
    def answer(report: bytes, status: int = 0, size: int | None = None) -> bytes:
        return struct.pack("<II24x", status, len(report) if size is None else size) + report

    @staticmethod
    def report(data: bytes) -> bytes:
        return bytes(0x50) + data + bytes(1184 - 0x90)

    def of(self, data: bytes) -> tuple[bytes, bytes]:
        return confbuild.sev_guest_report(self, data)

    def __call__(self, request: int, argument: bytearray) -> int:
        self.requests.append(request)
        version, question, response, exitinfo2 = struct.unpack("<B7xQQQ", argument)
        assert (version, exitinfo2) == (1, 0) and request in (0xC0205300, 0xC0205302) and request >> 16 & 0x3FFF == len(argument) == 32
        extended = request == 0xC0205302
        content = ctypes.string_at(question, 112 if extended else 96)
        assert content[64:96] == bytes(32), "VMPL 0"
        answer = self.answers.pop(0) if self.answers else self.answer(self.report(content[:64]))
        if isinstance(answer, tuple):
            argument[24:32] = answer[1].to_bytes(8, "little")
            raise OSError(answer[0], os.strerror(answer[0]))
        if extended:
            address, room = struct.unpack("<QI4x", content[96:])
            assert 0 < room <= 0x4000 and room % 4096 == 0, "EINVAL of the driver"
            ctypes.memmove(address, self.table.ljust(room, b"\0"), room)
        ctypes.memmove(response, answer.ljust(4000, b"\0"), 4000)
        return 0


def table_entry(kind: str, offset: int, length: int, little: bool = False) -> bytes:
    guid = uuid.UUID(confbuild.VEK_GUIDS[kind])
    return (guid.bytes_le if little else guid.bytes) + offset.to_bytes(4, "little") + length.to_bytes(4, "little")


def table_of(*certificates: tuple[str, bytes], little: bool = False) -> bytes:
    """A certificate table [GHCB 4.1.8.1]."""
    at = 24 * (len(certificates) + 1)
    entries = b""
    for i, (kind, data) in enumerate(certificates):
        entries += table_entry(kind, at + sum(len(earlier) for _, earlier in certificates[:i]), len(data), little)
    return entries + bytes(24) + b"".join(data for _, data in certificates)


class TestAttester:
    def test_report_data(self) -> None:
        """[CONTRACT 4], with the digest of "abc" from FIPS 180-2."""
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" + NONCE + "00" * 16
        assert confbuild.report_data(b"abc", NONCE).hex() == expected == confbuild.report_data(b"abc", NONCE.upper()).hex()

    def test_evidence_says_what_it_is(self) -> None:
        doc = json.loads(confbuild.simulated_evidence(confbuild.report_data(b"abc", NONCE)))
        assert list(doc) == ["platform", "evidence"] and doc["platform"] == "simulated"
        assert list(doc["evidence"]) == ["version", "notice", "attestation_report"] and "no hardware signature" in doc["evidence"]["notice"]
        report = base64.b64decode(doc["evidence"]["attestation_report"], validate=True)
        assert report == b"\3" + bytes(0x4F) + confbuild.report_data(b"abc", NONCE) + hashlib.sha384(FILE.read_bytes()).digest() + bytes(1184 - 0xC0)

    @pytest.mark.parametrize("auxblob", [b"", table_of(("VCEK", b"certificate")), bytes(1 << 15)], ids=["no certificates", "certificates", "largest"])
    def test_configfs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auxblob: bytes) -> None:
        """Once more in the same folder: each request has an item of its own, and none is left."""
        tsm = Configfs(tmp_path, monkeypatch, auxblob=auxblob)
        for data in (bytes(range(64)), bytes(64)):
            assert confbuild.tsm_report(str(tmp_path), data) == (tsm.report(data), auxblob)
        assert list(tmp_path.iterdir()) == [] and len(set(tsm.made)) == 2

    @pytest.mark.parametrize(("changes", "message"), [
        ({"fail": {"mkdir": errno.ENXIO}}, "{root}/confbuild-{id}: No such device or address"), ({"fail": {"mkdir": errno.EACCES}}, "{root}/confbuild-{id}: Permission denied"),
        ({"fail": {"outblob": errno.EFBIG}}, "{root}: the report is larger than the kernel takes"), ({"fail": {"auxblob": errno.EFBIG}}, "{root}: the report is larger"),
        ({"fail": {"outblob": errno.EINVAL}}, "{root}: Invalid argument"), ({"fail": {"outblob": errno.ENXIO}}, "{root}: No such device or address"),
        ({"fail": {"outblob": errno.EIO}}, "{root}: Input/output error"), ({"fail": {"outblob": errno.ENOTTY}}, "{root}: Inappropriate ioctl for device"),
        ({"fail": {"outblob": errno.EBUSY}}, "{root}: Device or resource busy"), ({"fail": {"provider": errno.ENOENT}}, "{root}: No such file or directory"),
        ({"fail": {"inblob": errno.EBUSY}}, "{root}: Invalid argument"),  # which close(2) does not tell: there is nothing to report on
        ({"fail": {"write": errno.EFBIG}}, "{root}: the report is larger"), ({"fail": {"rmdir": errno.EBUSY}}, "{root}/confbuild-{id}: Device or resource busy"),
        ({"provider": b"tdx_guest\n"}, "{root}: its provider is 'tdx_guest', not sev_guest"), ({"provider": b""}, "its provider is '', not sev_guest"),
        ({"provider": b"arm_cca_guest" * 9}, "its provider is 'arm_cca_guestarm_cca_guestarm_cca_guesta', not"),
        ({"provider": b"\xff\x1b[2J"}, "its provider is '\ufffd\\x1b[2J', not"),
        ({"generations": {"outblob": 1}}, "{root}/confbuild-{id}: 2 requests were made, not our one"), ({"generations": {"auxblob": 2}}, "3 requests were made"),
        ({"generations": {"outblob": -1}}, "0 requests were made"), ({"short": 63}, "{root}: Invalid argument"), ({"short": 64, "claim": 32}, "1 requests were made"),
        ({"generation": b"one\n"}, "{root}/confbuild-{id}: generation is no number"), ({"generation": b""}, "generation is no number")])
    def test_configfs_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str) -> None:
        tsm = Configfs(tmp_path, monkeypatch, **changes)
        pattern = re.escape(message.format(root=tmp_path, id="ID")).replace("confbuild\\-ID", "confbuild-[0-9a-f]{16}")
        with pytest.raises(confbuild.NoAttester, match=pattern):
            confbuild.tsm_report(str(tmp_path), bytes(64))
        assert "rmdir" in tsm.fail or list(tmp_path.iterdir()) == [], "what mkdir made, rmdir removes, whatever happens"
        assert tsm.provider.strip() == b"sev_guest" or tsm.asked == 0, "no report is asked of a stranger"

    @pytest.mark.parametrize("data", [bytes(63), bytes(65), b""], ids=len)
    def test_configfs_takes_64_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
        Configfs(tmp_path, monkeypatch)
        with pytest.raises(confbuild.NoAttester, match="Invalid argument|larger than the kernel takes"):
            confbuild.tsm_report(str(tmp_path), data)

    def test_device(self) -> None:
        """The requests as [SEV-GUEST] has them: the extended one first, with room for the certificates."""
        device = SevGuest(table_of(("VCEK", b"certificate")))
        report, table = confbuild.sev_guest_report(device, bytes(range(64)))
        assert (report, table) == (device.report(bytes(range(64))), device.table.ljust(0x4000, b"\0")) and device.requests == [0xC0205302]
        assert SevGuest().of(bytes(64))[1] == bytes(0x4000), "a host that has none"

    EXTENDED = 0xC0205302

    @pytest.mark.parametrize(("answers", "message"), [
        ([(errno.EIO, 0x1_0000_0000)], ""), ([(errno.EINVAL, 0xFF)], ""), ([b""], ""), ([SevGuest.answer(b"r" * 1184, status=0x16)], ""),
        ([(errno.EIO, 0x1_0000_0000), (errno.ENOTTY, 0xFF)],
         "Input/output error (firmware error 0x0, VMM error 0x1), then Inappropriate ioctl for device (firmware error 0xff, VMM error 0x0)"),
        ([(errno.EIO, 0x2_0000_0000), SevGuest.answer(b"r" * 1184, status=0x16)], "Input/output error (firmware error 0x0, VMM error 0x2), then status 0x16, a report of 1184 bytes"),
        ([b"", b""], "status 0x0, a report of 0 bytes, then status 0x0, a report of 0 bytes"),
        ([SevGuest.answer(b"r" * 1183)] * 2, "a report of 1183 bytes"), ([SevGuest.answer(b"r" * 1185)] * 2, "a report of 1185 bytes"),
        ([SevGuest.answer(b"r" * 1184, size=2 ** 32 - 1)] * 2, "a report of 4294967295 bytes")])
    def test_device_that_fails(self, answers: list[Any], message: str) -> None:
        """Where the extended request fails, the plain one may not."""
        device = SevGuest(b"certificates", *answers)
        if message:
            with pytest.raises(confbuild.NoAttester, match=re.escape(f"/dev/sev-guest: {message}") if " then " in message else message):
                device.of(bytes(64))
        else:
            assert device.of(bytes(64)) == (device.report(bytes(64)), b"")
        assert device.requests == [self.EXTENDED, 0xC0205300]

    def test_a_real_ioctl(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel looks at the request, not at us: of a file that is no such device, ENOTTY, and of none at all, the reason."""
        (tmp_path / "device").write_bytes(b"")
        monkeypatch.setattr(confbuild, "TSM_REPORTS", str(tmp_path / "none"))
        for name, message in (("device", "ioctl for device (firmware error 0x0, VMM error 0x0), then "), ("", "Is a directory")):
            monkeypatch.setattr(confbuild, "SEV_GUEST", str(tmp_path / name))
            with pytest.raises(confbuild.NoAttester, match=re.escape(message)) as caught:
                confbuild.get_report(bytes(64))
            assert "modprobe sev-guest" in caught.value.hint
        monkeypatch.setattr(confbuild, "SEV_GUEST", str(tmp_path / "none"))
        with pytest.raises(confbuild.NoAttester, match=r"this is no SEV-SNP guest: neither \S+/none nor \S+/none is here"):
            confbuild.get_report(bytes(64))

    @pytest.mark.parametrize(("tsm", "device", "expected"), [
        ({}, True, b"from configfs"), ({"fail": {"mkdir": errno.ENXIO}}, True, b"from the device"), ({"fail": {"mkdir": errno.EACCES}}, True, b"from the device"),
        ({"fail": {"outblob": errno.EIO}}, True, b"from the device"), (None, True, b"from the device"), ({}, False, b"from configfs"),
        ({"other": True}, False, "its report is about other data"), ({"size": 1000}, False, "attestation_report: 1000 bytes, not 1184"),
        ({"fail": {"mkdir": errno.ENXIO}}, False, "No such device or address"), ({"provider": b"tdx_guest"}, False, "its provider is 'tdx_guest'")])
    def test_whom_to_ask(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tsm: dict[str, Any] | None, device: bool, expected: bytes | str) -> None:
        """configfs-tsm, else the device; and a report about anything else than was asked is none."""
        (tmp_path / "device").write_bytes(b"")
        monkeypatch.setattr(confbuild, "SEV_GUEST", str(tmp_path / ("device" if device else "none")))
        monkeypatch.setattr(confbuild, "TSM_REPORTS", str(tmp_path / ("none" if tsm is None else "report")))
        if tsm is not None:
            (tmp_path / "report").mkdir()
            Configfs(tmp_path / "report", monkeypatch, **{"auxblob": b"from configfs", **tsm})
        stand_in = SevGuest(b"from the device")
        monkeypatch.setattr(confbuild, "fcntl", types.SimpleNamespace(ioctl=lambda _, request, argument: stand_in(request, argument)))
        if isinstance(expected, bytes):
            report, table = confbuild.get_report(bytes(range(64)))
            assert (confbuild.parse_report(report).report_data, table.rstrip(b"\0")) == (bytes(range(64)), expected)
        else:
            with pytest.raises(confbuild.NoAttester, match=expected):
                confbuild.get_report(bytes(range(64)))

    GOOD_TABLE = table_of(("VLEK", b"the vlek"), ("VCEK", b"the vcek"))

    @pytest.mark.parametrize(("table", "expected"), [
        (GOOD_TABLE, b"the vcek"), (table_of(("VCEK", b"the vcek"), little=True), b"the vcek"), (table_of(("VLEK", b"the vlek")), None), (b"", None), (bytes(0x4000), None),
        (bytes(24) + GOOD_TABLE, None), (GOOD_TABLE[:47], None), (GOOD_TABLE[:48], None), (b"\xff" * 0x4000, None),
        (table_of(("VCEK", b"one"), ("VCEK", b"two")), b"one"), (table_entry("VCEK", 24, 8) + b"the vcek", b"the vcek"),  # without a terminator
        (table_entry("VCEK", 0, 16), uuid.UUID(confbuild.VEK_GUIDS["VCEK"]).bytes), (table_entry("VCEK", 20, 2 ** 32 - 1), b"\xff" * 4),
        (table_entry("VCEK", 2 ** 32 - 1, 2 ** 32 - 1), None), (table_entry("VCEK", 24, 8), None), (table_entry("VCEK", 4, 0), None)])
    def test_certificate_table(self, table: bytes, expected: bytes | None) -> None:
        assert confbuild.vek_in_table(table, "VCEK") == expected
        assert confbuild.vek_in_table(table_of(("VLEK", b"the vlek"), little=True), "VLEK") == b"the vlek"

    @given(st.lists(st.sampled_from([table_entry(kind, *sizes) for kind in ("VCEK", "VLEK") for sizes in ((0, 24), (30, 7), (2 ** 31, 9))]) | st.binary(max_size=30), max_size=6))
    def test_hostile_tables(self, parts: list[bytes]) -> None:
        found = confbuild.vek_in_table(b"".join(parts), "VCEK")
        assert found is None or found and found in b"".join(parts)

    @staticmethod
    def chain(evidence: bytes) -> Any:
        return json.loads(evidence)["evidence"]["cert_chain"]

    def test_evidence(self) -> None:
        """Of a VCEK and of a VLEK: with what the host hands out, with what AMD's service has, and with nothing."""
        for report, vek, kind in ((made(snp_report), made(vek_of), "VCEK"), (made(snp_report, **VLEK), made(vek_of, kind="VLEK", product="Milan"), "VLEK")):
            table = table_of((kind, vek), ("VLEK" if kind == "VCEK" else "VCEK", b"other"))
            evidence = confbuild.hardware_evidence(report, table, "gcp-snp", None)
            assert self.chain(evidence) == {"vcek": b64(vek), "ask": None, "ark": None} and list(json.loads(evidence)) == ["platform", "evidence"]
            assert verdict_over(ATTESTED._replace(evidence=evidence), confbuild.Expectations(nonce=NONCE, require_tee=True), anchors=TOY_ANCHORS).verdict == "passed"
            bare = confbuild.hardware_evidence(report, b"", "snp", None)
            assert self.chain(bare) is None
            assert verdict_over(ATTESTED._replace(evidence=bare), ANY, anchors=TOY_ANCHORS, vek=vek).verdict == "passed"
            assert verdict_over(ATTESTED._replace(evidence=bare), ANY, anchors=TOY_ANCHORS).verdict == "failed"
        asked: list[str] = []

        def fetch(url: str) -> bytes:
            asked.append(url)
            return made(vek_of)

        assert confbuild.hardware_evidence(made(snp_report), table_of(("VCEK", made(vek_of))), "snp", fetch) and asked == []
        assert self.chain(confbuild.hardware_evidence(made(snp_report), b"", "snp", fetch))["vcek"] == b64(made(vek_of)) and asked == [KDS]
        for stale in (made(vek_of, key=OTHER_VEK), b"junk"):  # that of before a firmware update, which the host still hands out
            assert self.chain(confbuild.hardware_evidence(made(snp_report), table_of(("VCEK", stale)), "snp", fetch))["vcek"] == b64(made(vek_of))
        unsigned = made(snp_report, flags=7 << 2)
        assert self.chain(confbuild.hardware_evidence(unsigned, table_of(("VCEK", b"x")), "snp", None)) is None

    @pytest.mark.parametrize(("report", "table", "fetched", "message"), [
        ({}, {"key": OTHER_VEK}, None, "the certificate that came with the report does not verify it: "), ({}, b"junk", None, "does not verify it: VEK: "),
        ({}, TOY_CAS["ask"], None, "does not verify it: the certificate's key is not on P-384"), ({}, None, b"", "does not verify it: VEK: "),
        ({}, None, b"<html>", "does not verify it: VEK: "), ({"version": 2}, None, b"", "this report is signed by VCEK of an unknown product"),
        ({**VLEK}, None, b"", "this report is signed by VLEK of Milan"), ({"flags": 7 << 2}, None, b"", "this report is signed by key 7 of Milan")])
    def test_foreign_certificates(self, report: dict[str, Any], table: Any, fetched: bytes | None, message: str) -> None:
        certificate = made(vek_of, **table) if isinstance(table, dict) else table
        with pytest.raises(confbuild.NoAttester, match=re.escape(message)):
            confbuild.hardware_evidence(made(snp_report, **report), b"" if certificate is None else table_of(("VCEK", certificate)), "snp",
                                        None if fetched is None else lambda url: fetched or b"")

    def test_no_report(self) -> None:
        with pytest.raises(confbuild.ReportError, match="attestation_report: 1183 bytes, not 1184"):
            confbuild.hardware_evidence(bytes(1183), b"", "snp", None)

# endregion 16
# ==============================================================================
# region 17. Bundle
# ==============================================================================


TarEntry = tuple[str, bytes | str, bytes] | bytes


def tar_of(*members: TarEntry) -> bytes:
    """A tarball, not yet compressed: (name, content or target, type), or raw blocks."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, bytes):
                out.write(member)
                tar.offset += len(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.type = member[2]
            if isinstance(member[1], bytes):
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
            else:
                info.linkname = member[1]
                tar.addfile(info)
    return out.getvalue()


def header(name: str, kind: bytes, size: int, fields: Mapping[int, bytes] | None = None, content: bytes = b"") -> bytes:
    """Raw blocks of a member that tarfile would not write."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, max(size, 0)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    for offset, data in {**({124: (256 ** 12 + size).to_bytes(12, "big")} if size < 0 else {}), **(fields or {})}.items():
        block[offset:offset + len(data)] = data
    block[148:156] = b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:512])
    return bytes(block) + content + bytes(-len(content) % 512)


FILE_TYPE, LINK, SYMLINK, DEVICE, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"5", b"6"
DEMO: TarEntry = ("demo/artifacts/demo", b"artifact", FILE_TYPE)
EVIDENCE: TarEntry = ("demo/evidence.json", GOOD_BUNDLE.evidence, FILE_TYPE)
PROVENANCE: TarEntry = ("demo/provenance.json", provenance_of(GOOD_BUNDLE), FILE_TYPE)
WHOLE: tuple[TarEntry, ...] = (("demo", "", FOLDER), ("demo/artifacts", "", FOLDER), DEMO, EVIDENCE, PROVENANCE)
SPARSE = header("demo/artifacts/hole", b"S", 0, {386: b"00000000000\0" * 2, 482: b"\0", 483: b"\x80" + (1 << 50).to_bytes(11, "big")})
DIGITS = b"1" * (1 << 20)


def folder_of(root: Path, files: confbuild.BundleFiles, artifacts: Mapping[str, bytes]) -> Path:
    """A bundle as a directory."""
    (root / "artifacts").mkdir(parents=True)
    for name, content in artifacts.items():
        (root / "artifacts" / name).write_bytes(content)
    (root / "provenance.json").write_bytes(provenance_of(files))
    (root / "evidence.json").write_bytes(files.evidence)
    return root


def archive_of(folder: Path, project_name: str = "demo") -> bytes:
    """What write_archive makes of a bundle's directory."""
    files = sorted((path.name, str(path)) for path in (folder / "artifacts").iterdir())
    target = folder.parent / f"{folder.name}.archive"
    confbuild.write_archive(str(target), project_name, (folder / "provenance.json").read_bytes(), (folder / "evidence.json").read_bytes(), files)
    return target.read_bytes()


def packed(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


class TestBundle:
    def test_the_archive_is_deterministic(self, tmp_path: Path) -> None:
        """Whatever the files' times, modes, owner, folder, or the archive's own name are."""
        contents = {"a.sh": b"1", "demo": b"artifact", "n" * 150: b"", "\u00e9": b"\0" * 70_000}
        one, two = folder_of(tmp_path / "one", GOOD_BUNDLE, contents), folder_of(tmp_path / "other" / "two", GOOD_BUNDLE, dict(reversed(contents.items())))
        for path in (two / "artifacts").iterdir():
            os.utime(path, (1, 2))
            path.chmod(0o400)
        data = archive_of(one)
        assert data == archive_of(one) == archive_of(two)
        assert data[:10] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00" + data[8:10]  # no name, no time [RFC 1952]
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
        assert [(info.name, info.mode, info.isdir()) for info in members] == [
            ("demo", 0o755, True), ("demo/artifacts", 0o755, True), *((f"demo/artifacts/{name}", 0o755, False) for name in sorted(contents)),
            ("demo/evidence.json", 0o644, False), ("demo/provenance.json", 0o644, False)]
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in members} == {(0, 0, 0, "", "")}

    @settings(max_examples=20)
    @given(st.dictionaries(st.from_regex(r"[a-z. \u00e9-]{1,12}", fullmatch=True).filter(lambda name: name not in (".", "..")) | st.just("x" * 200),
                           st.binary(max_size=600), max_size=4))
    @example({"evidence.json": b"1", "provenance.json": b"2"})
    def test_archive_and_directory_are_the_same_bundle(self, tmp_path_factory: pytest.TempPathFactory, artifacts: dict[str, bytes]) -> None:
        root = tmp_path_factory.mktemp("bundle")
        folder = folder_of(root / "made", GOOD_BUNDLE, artifacts)
        archive = packed(root / "a.tar.gz", archive_of(folder))
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python has no filters
            tar.extractall(root / "unpacked")
        expected = GOOD_BUNDLE._replace(artifacts={name: hashlib.sha256(content).hexdigest() for name, content in artifacts.items()})
        found = confbuild.read_bundle(archive)
        assert found == confbuild.read_bundle(str(folder)) == confbuild.read_bundle(str(root / "unpacked" / "demo")) == expected

    @pytest.mark.parametrize("size", [(1 << 20) + 1, confbuild.MAX_JSON, confbuild.MAX_JSON + 1, confbuild.MAX_JSON + 2_000_000])
    def test_large_documents(self, tmp_path: Path, size: int) -> None:
        """Read to one byte more than a document may have, and then refused by the verifier."""
        files = GOOD_BUNDLE._replace(provenance=b" " * size)
        folder = folder_of(tmp_path / "made", files, {"demo": b"artifact"})
        found = confbuild.read_bundle(str(folder))
        assert found == confbuild.read_bundle(packed(tmp_path / "a", archive_of(folder)))
        assert len(provenance_of(found)) == min(size, confbuild.MAX_JSON + 1)

    @pytest.mark.parametrize(("members", "message"), [
        ((DEMO, PROVENANCE), "provenance.json or evidence.json is missing"), ((EVIDENCE, DEMO), "provenance.json or evidence.json is missing"),
        ((), "provenance.json or evidence.json is missing"),
        ((*WHOLE, DEMO), "'demo/artifacts/demo' is out of place"), ((*WHOLE, PROVENANCE), "'demo/provenance.json' is out of place"),
        ((*WHOLE, ("demo/artifacts", b"", FILE_TYPE)), "'demo/artifacts' is out of place"), ((*WHOLE, ("demo/artifacts/sub/x", b"", FILE_TYPE)), "'demo/artifacts/sub/x' is out of place"),
        ((*WHOLE, ("extra", b"", FILE_TYPE)), "'extra' is out of place"), ((*WHOLE, ("./demo/artifacts/demo", b"", FILE_TYPE)), "'./demo/artifacts/demo' is out of place"),
        ((*WHOLE, ("././x", b"", FILE_TYPE)), "'././x' is out of place"), ((("artifacts/demo", b"", FILE_TYPE), ("evidence.json", b"", FILE_TYPE), ("x/y", b"", FILE_TYPE)), "'x/y' is out"),
        ((("evidence.json", b"", FILE_TYPE), PROVENANCE), "'demo/provenance.json' is out of place"),
        ((*WHOLE, ("demo/more", "", FOLDER)), "'demo/more' is out of place"),
        ((*WHOLE, ("demo/artifacts/sub", "", FOLDER)), "'demo/artifacts/sub' is out of place"),
        ((*WHOLE, ("demo/demo/provenance.json", b"", FILE_TYPE)), "is out of place"),
        ((*WHOLE, ("demo/artifacts/link", "demo", SYMLINK)), "'demo/artifacts/link' is out of place"),
        ((*WHOLE, ("demo/artifacts/link", "demo/artifacts/demo", LINK)), "is out of place"),
        ((("demo", "/", SYMLINK), *WHOLE[1:]), "'demo' is out of place"),
        ((*WHOLE, ("demo/artifacts/dev", "", DEVICE)), "'demo/artifacts/dev' is a device"),
        ((*WHOLE, ("demo/artifacts/pipe", "", FIFO)), "'demo/artifacts/pipe' is a device"),
        ((("provenance.json", b"", FILE_TYPE),), "provenance.json or evidence.json is missing"),
        ((("/provenance.json", b"", FILE_TYPE),), "'/provenance.json' is out of place"),
        ((("./provenance.json", b"", FILE_TYPE),), "provenance.json or evidence.json is missing"),
        ((("../provenance.json", b"", FILE_TYPE),), "'../provenance.json' is out of place"),
        ((("demo/./provenance.json", b"", FILE_TYPE),), "is out of place"),
        ((*WHOLE, ("demo/../demo/artifacts/demo", b"", FILE_TYPE)), "is out of place"),
        ((DEMO, EVIDENCE, ("other/provenance.json", GOOD_BUNDLE.provenance, FILE_TYPE)), "'other/provenance.json' is out of place"),
        ((*WHOLE, ("other", "", FOLDER)), "'other' is out of place"), ((*WHOLE, ("other/artifacts/demo2", b"", FILE_TYPE)), "is out of place"),
        ((*WHOLE, header("demo/artifacts/x", b"0", -1024)), "neither a bundle nor its archive"),
        ((*WHOLE, header("x", b"x", -1024)), "a number that is neither octal nor positive in base-256"),
        ((*WHOLE, header("x", b"x", 1 << 40)), "a header of more than"), ((*WHOLE, header("x", b"L", 1 << 40)), "a header of more than"),
        ((*WHOLE, SPARSE), "neither a bundle nor its archive"),
        ((*WHOLE, header("x", b"x", len(DIGITS), content=DIGITS)), "neither a bundle nor its archive"),
        ((*WHOLE, header("x", b"x", 50_000, content=DIGITS[:50_000])), "damaged pax header"),
        ((*WHOLE, *[header("x", b"x", 7, content=b"7 a=bb\n")] * 2000), "neither a bundle nor its archive"),
        # What libarchive reads as another size, with other holes, and GNU tar under another name.
        *(((*WHOLE[:2], header("demo/artifacts/demo", b"0", 8, {124: size}, b"artifact"), *WHOLE[3:]), "a number that is neither octal nor positive in base-256")
          for size in (b"00000001_0\0\0", b"00000000o10\0", b"+0000000010\0", b"-0000000010\0", b"10\0000000000")),
        *(((*WHOLE[:2], header("x", b"x", len(record), content=record), *WHOLE[2:]), f"the pax header '{name}', which readers understand differently")
          for name, record in (("size", b"12 size=0_8\n"), ("size", b"11 size=+8\n"), ("SCHILY.realsize", b"21 SCHILY.realsize=4\n"),
                               ("SUN.holesdata", b"24 SUN.holesdata= 0 4 8\n"), ("GNU.sparse.name", b"21 GNU.sparse.name=x\n"))),
        ((*WHOLE[:2], header("x", b"x", 29, content=b"29 path=demo/artifacts/demo/\n"), *WHOLE[2:]), "'demo/artifacts/demo/' is a device, a pipe, a sparse file, or a file with a"),
        *(((*WHOLE[:2], header("demo", b"0", 8, {257: magic, 345: b"demo/artifacts"}, b"artifact"), *WHOLE[3:]), "a prefix in a header that is not of POSIX's format")
          for magic in (b"ustar  \0", bytes(8))),
        # What another reader would unpack over what has been verified.
        ((*WHOLE, b"\1" * 512, ("demo/artifacts/demo", b"evil", FILE_TYPE)), "neither a bundle nor its archive"),
        ((*WHOLE, bytes(1024), ("demo/artifacts/demo", b"evil", FILE_TYPE)), "neither a bundle nor its archive")])
    def test_odd_archives(self, tmp_path: Path, members: tuple[TarEntry, ...], message: str) -> None:
        path = packed(tmp_path / "a.tar.gz", gzip.compress(tar_of(*members), 1))
        with within(20), pytest.raises(confbuild.UsageError, match=f"^{re.escape(path)}: .*({'|'.join(map(re.escape, message.split('|')))})"):
            confbuild.read_bundle(path)

    @pytest.mark.parametrize(("data", "message"), [
        (b"", "neither a bundle nor its archive: the archive is empty"), (b"hello", "neither a bundle nor its archive: Not a gzipped file"),
        (b"PK\3\4", "neither a bundle nor its archive: Not a gzipped file"),
        (gzip.compress(b""), "neither a bundle nor its archive: the archive is empty"), (gzip.compress(b"hello" * 300), "neither a bundle nor its archive"),
        (gzip.compress(tar_of(*WHOLE))[:-9], "neither a bundle nor its archive"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0\xff\xff", "neither a bundle nor its archive"),
        (gzip.compress(tar_of(*WHOLE))[:-5] + b"\0" * 5, "neither a bundle nor its archive: CRC check failed")])
    def test_bytes_that_are_no_archive(self, tmp_path: Path, data: bytes, message: str) -> None:
        path = packed(tmp_path / "a", data)
        with pytest.raises(confbuild.UsageError, match=f"^{re.escape(path)}: {re.escape(message)}"):
            confbuild.read_bundle(path)

    @pytest.mark.parametrize("fields", [{124: b"         10 "}, {124: b"00000000010 "}, {124: b"\x80" + bytes(10) + b"\x08"}, {257: b"ustar\00000", 345: b"demo"}])
    def test_archives_of_other_writers(self, tmp_path: Path, fields: dict[int, bytes]) -> None:
        """Numbers with blanks, in base-256, and a name in two fields."""
        name = "artifacts/demo" if 345 in fields else "demo/artifacts/demo"
        digits = b"50000 a=" + DIGITS[:49_991] + b"\n"  # for which tarfile takes quadratic time
        data = tar_of(*WHOLE[:2], header("x", b"x", len(digits), content=digits) if 345 in fields else b"", header(name, b"0", 8, fields, b"artifact"), *WHOLE[3:])
        assert confbuild.read_bundle(packed(tmp_path / "a.tar.gz", gzip.compress(data))) == GOOD_BUNDLE

    def test_an_archive_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = packed(tmp_path / "a", gzip.compress(tar_of(*WHOLE, ("demo/artifacts/zeros", bytes(3_000_000), FILE_TYPE)), 1))
        assert confbuild.read_bundle(path).artifacts["zeros"] == hashlib.sha256(bytes(3_000_000)).hexdigest()
        whole = len(b"artifact") + len(GOOD_BUNDLE.evidence) + len(provenance_of(GOOD_BUNDLE)) + 3_000_000
        assert confbuild.read_bundle(path, whole).evidence == GOOD_BUNDLE.evidence
        with pytest.raises(confbuild.UsageError, match=f"unpacks to more than {whole - 1} bytes"):
            confbuild.read_bundle(path, whole - 1)
        monkeypatch.setattr(confbuild, "MAX_MEMBERS", 6)
        assert confbuild.read_bundle(path).provenance == GOOD_BUNDLE.provenance
        monkeypatch.setattr(confbuild, "MAX_MEMBERS", 5)
        with pytest.raises(confbuild.UsageError, match="more than 5 members"):
            confbuild.read_bundle(path)

    @given(where=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255) | st.none())
    def test_a_damaged_archive_is_refused_or_the_same(self, tmp_path_factory: pytest.TempPathFactory, where: float, change: int | None) -> None:
        """Both at the level of gzip and, compressed again, at that of tar, where a header's checksum hides nothing that matters."""
        raw = tar_of(*WHOLE)
        for data, pack in ((gzip.compress(raw), bytes), (raw, gzip.compress)):
            i = math.floor(where * len(data))
            broken = data[:i] if change is None else data[:i] + bytes([data[i] ^ change]) + data[i + 1:]
            try:
                found = confbuild.read_bundle(packed(tmp_path_factory.mktemp("a") / "a", pack(broken)))
            except confbuild.UsageError:
                continue
            assert pack is gzip.compress or found == GOOD_BUNDLE
            assert found == GOOD_BUNDLE or verdict_over(found, ANY).verdict == "failed" or found.evidence != GOOD_BUNDLE.evidence

    def test_odd_directories(self, tmp_path: Path) -> None:
        def made(name: str) -> Path:
            return folder_of(tmp_path / name, GOOD_BUNDLE, {"demo": b"artifact"})

        odd = made("odd")
        (odd / "artifacts" / "link").symlink_to("demo")
        (odd / "artifacts" / "dangling").symlink_to("nowhere")
        (odd / "artifacts" / "sub").mkdir()
        os.mkfifo(odd / "artifacts" / "pipe")
        (odd / "README").write_text("beside a bundle, and no part of it")
        found = confbuild.read_bundle(str(odd))
        assert found == GOOD_BUNDLE._replace(artifacts={**GOOD_BUNDLE.artifacts, **dict.fromkeys(("link", "dangling", "sub", "pipe"), "no regular file")})
        assert status_of(verdict_over(found, ANY), "unlisted files") == "failed"
        bare = made("bare")
        shutil.rmtree(bare / "artifacts")
        assert confbuild.read_bundle(str(bare)) == GOOD_BUNDLE._replace(artifacts={})

    OLDER: Sequence[tuple[str, Callable[[str], str]]] = [
        ("at the root", lambda name: name), ("with ./", lambda name: "./" + name), ("in one directory", lambda name: "demo/" + name),
        ("in one directory with ./", lambda name: "./demo/" + name)]

    @pytest.mark.parametrize("place", [place for _, place in OLDER], ids=[name for name, _ in OLDER])
    @pytest.mark.parametrize("where", [("artifacts/demo",), ("demo",), ("demo", "artifacts/demo")], ids=" and ".join)
    def test_older_layouts(self, tmp_path: Path, where: Sequence[str], place: Callable[[str], str]) -> None:
        """As an archive and as a directory; an artifact in artifacts/, next to the provenance, or in both. A file more is one that nobody lists."""
        def both(more: Mapping[str, bytes]) -> Iterator[confbuild.BundleFiles]:
            files = {"evidence.json": GOOD_BUNDLE.evidence, "provenance.json": provenance_of(GOOD_BUNDLE), **dict.fromkeys(where, b"artifact"), **more}
            folders = {os.path.dirname(place(name)) for name in files} - {""}
            for members in ([(place(name), data, FILE_TYPE) for name, data in files.items()],
                            [*((folder, "", FOLDER) for folder in sorted(folders)), *((place(name), data, FILE_TYPE) for name, data in reversed(files.items()))]):
                yield confbuild.read_bundle(packed(tmp_path / "a.tar.gz", gzip.compress(tar_of(*members), 1)))
            shutil.rmtree(tmp_path / "d", ignore_errors=True)
            yield confbuild.read_bundle(str(write_files(tmp_path / "d", {place(name): data for name, data in files.items()})))

        for found in both({}):
            assert found == GOOD_BUNDLE and verdict_over(found, ANY).verdict == "simulated"
        for more in ("none", "x.json", "artifacts/none"):
            for i, found in enumerate(both({more: b"artifact"})):
                ignored = i == 2 and "/" not in more and "artifacts/demo" in where  # next to artifacts/, in a directory
                assert failed_checks(verdict_over(found, ANY)) == (set() if ignored else {"unlisted files"}), (i, more)
        for copy in {"demo", "artifacts/demo"} - set(where) if len(where) == 1 else where:
            for found in both({copy: b"another"}):
                assert found.artifacts == {"demo": "a file of this name beside artifacts/ is another one"}
                assert failed_checks(verdict_over(found, ANY)) == {"artifact demo", "artifacts"}

    def test_an_artifact_at_the_root_beside_others(self, tmp_path: Path) -> None:
        """Some in artifacts/, some next to the provenance; what else lies there is no part of it, and is never opened."""
        files = named("demo", "second")
        root = folder_of(tmp_path / "b", files, {"demo": b"artifact"})
        (root / "second").write_bytes(b"artifact")
        os.mkfifo(root / "pipe")
        assert confbuild.read_bundle(str(root)) == files
        (root / "second").unlink()
        os.mkfifo(root / "second")
        with within(3):
            assert confbuild.read_bundle(str(root)).artifacts == {**GOOD_BUNDLE.artifacts, "second": "no regular file"}
        (root / "artifacts/demo").unlink()  # nothing in artifacts/: all that lies at the root counts
        assert confbuild.read_bundle(str(root)).artifacts == {"second": "no regular file", "pipe": "no regular file"}

    @pytest.mark.parametrize("copy", [b"artifact", b"artifacT", "artifacts/demo", "nowhere", None])
    def test_every_copy_is_equal(self, tmp_path: Path, copy: bytes | str | None) -> None:
        """Somebody may run the one beside artifacts/. copy: contents, the target of a link, or None for a pipe."""
        root = folder_of(tmp_path / "b", GOOD_BUNDLE, {"demo": b"artifact"})
        if isinstance(copy, bytes):
            (root / "demo").write_bytes(copy)
        elif copy is None:
            os.mkfifo(root / "demo")
        else:
            (root / "demo").symlink_to(copy)
        found, equal = confbuild.read_bundle(str(root)), copy == b"artifact"
        assert found.artifacts == (GOOD_BUNDLE.artifacts if equal else {"demo": "a file of this name beside artifacts/ is another one"})
        assert (verdict_over(found, ANY).verdict == "failed") is not equal

    def test_evidence_alone(self, tmp_path: Path) -> None:
        """Only on request: the names of all other files then come with it, and none of them is opened."""
        root = write_files(tmp_path / "b", {"evidence.json": GOOD_BUNDLE.evidence})
        assert confbuild.read_bundle(str(root)) == confbuild.BundleFiles(None, GOOD_BUNDLE.evidence, {})
        assert status_of(verdict_over(confbuild.read_bundle(str(root)), ANY), "provenance form") == "failed"
        steps: Sequence[tuple[Callable[[], Any], list[str]]] = [
            (lambda: None, []), (lambda: os.mkfifo(root / "pipe"), ["pipe"]), (lambda: (root / "artifacts").symlink_to("nowhere"), ["artifacts", "pipe"]),
            (lambda: (root / "artifacts").unlink() or (root / "artifacts").mkdir(), ["artifacts", "pipe"]), (lambda: os.mkfifo(root / "artifacts/demo"), ["artifacts/demo", "pipe"]),
            (lambda: (root / "provenance.json").symlink_to("nowhere"), ["artifacts/demo", "pipe", "provenance.json"])]
        for step, others in steps:
            step()
            with within(3):
                for path in (root, root / "evidence.json"):
                    assert confbuild.read_bundle(str(path), evidence_only=True) == confbuild.BundleFiles(None, GOOD_BUNDLE.evidence, {}, others)
        with pytest.raises(confbuild.UsageError, match="provenance.json is no regular file"):
            confbuild.read_bundle(str(root))
        with pytest.raises(confbuild.UsageError, match="evidence.json: No such file"):
            confbuild.read_bundle(str(root / "artifacts"), evidence_only=True)

    def test_evidence_alone_of_an_archive(self, tmp_path: Path) -> None:
        for members, others in ((WHOLE, ["artifacts/demo", "provenance.json"]), ((EVIDENCE,), []), ((("./evidence.json", GOOD_BUNDLE.evidence, FILE_TYPE), ("./rg", b"", FILE_TYPE)), ["rg"])):
            path = packed(tmp_path / "a.tar.gz", gzip.compress(tar_of(*members), 1))
            assert confbuild.read_bundle(path, evidence_only=True) == confbuild.BundleFiles(None, GOOD_BUNDLE.evidence, {}, others)
        with pytest.raises(confbuild.UsageError, match=r"provenance.json or evidence.json is missing"):
            confbuild.read_bundle(packed(tmp_path / "a.tar.gz", gzip.compress(tar_of(PROVENANCE), 1)), evidence_only=True)

    def test_bare_evidence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The path of an evidence.json means evidence alone, unless it is that of a bundle."""
        monkeypatch.chdir(write_files(tmp_path, {"evidence.json": b"", "other.json": b"", "b/evidence.json": b"", "b/provenance.json": b""}))
        (tmp_path / "c/evidence.json").mkdir(parents=True)
        assert [path for path in ("evidence.json", "./evidence.json", "other.json", "b/evidence.json", "b", "c/evidence.json", "d/evidence.json", "", "-") if confbuild.is_bare_evidence(path)] == [
            "evidence.json", "./evidence.json"]

    def test_stdin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = gzip.compress(tar_of(*WHOLE))
        for data, message in ((archive, ""), (archive[:-1], "stdin: neither a bundle nor its archive"), (b"", "stdin: neither a bundle nor its archive: the archive is empty")):
            monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
            if message:
                with pytest.raises(confbuild.UsageError, match=message):
                    confbuild.read_bundle("-")
            else:
                assert confbuild.read_bundle("-") == GOOD_BUNDLE
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(confbuild.UsageError, match="stdin is closed"):
            confbuild.read_bundle("-")

    @pytest.mark.parametrize(("steps", "message"), [
        ([shutil.rmtree], "No such file or directory"),
        ([lambda root: (root / "evidence.json").unlink(), lambda root: (root / "evidence.json").symlink_to("provenance.json")], "evidence.json is no regular file"),
        ([lambda root: (root / "evidence.json").unlink(), lambda root: (root / "evidence.json").mkdir()], "evidence.json is no regular file"),
        ([lambda root: (root / "provenance.json").unlink(), lambda root: (root / "provenance.json").symlink_to("evidence.json")], "provenance.json is no regular file"),
        ([lambda root: (root / "evidence.json").unlink()], "No such file or directory"),
        ([lambda root: shutil.rmtree(root / "artifacts"), lambda root: (root / "artifacts").write_text("")], "Not a directory"),
        ([lambda root: (root / "provenance.json").unlink(), lambda root: (root / "provenance.json").mkdir()], "regular file|Is a directory"),
        # A link of the whole folder is none of a file in it.
        ([lambda root: (root / "artifacts").rename(root.parent / "other"), lambda root: (root / "artifacts").symlink_to("../other")], "link"),
        ([lambda root: (root / "evidence.json").unlink(), lambda root: os.mkfifo(root / "evidence.json")], "no regular file")],
        ids=["nothing", "evidence is a link", "evidence is a folder", "provenance is a link", "no evidence", "artifacts is a file", "provenance is a folder", "artifacts is a link", "evidence is a pipe"])
    def test_directories_that_are_no_bundle(self, tmp_path: Path, steps: Sequence[Callable[[Path], Any]], message: str) -> None:
        root = folder_of(tmp_path / "bundle", GOOD_BUNDLE, {"demo": b"artifact"})
        for step in steps:
            step(root)
        with within(20), pytest.raises(confbuild.UsageError, match=message):
            confbuild.read_bundle(str(root))

# endregion 17
# ==============================================================================
# region 18. Pipeline
# ==============================================================================


class Built:
    """What `confbuild build` left behind. events: by type."""

    def __init__(self, source: Path, out: Path, *options: str, **env: str) -> None:
        command = [*PROGRAM, "build", str(source), "-o", str(out), "--output", "json", "--nonce", NONCE, *options]
        run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)
        self.status, self.errors, self.out = run.returncode, run.stderr, out
        self.rows = [json.loads(line) for line in run.stdout.splitlines()]
        self.result = next((row["result"] for row in self.rows if row["type"] == "complete"), None)

    def told(self, phase: str) -> list[str]:
        return [row["msg"] for row in self.rows if row["type"] == phase]

    def provenance(self) -> Any:
        """The provenance of a bundle that verifies."""
        assert self.status == 0, (self.errors, self.rows)
        data = (self.out / "provenance.json").read_bytes()

        log = "".join(line + "\n" for line in self.told("build"))
        assert confbuild.byproduct(json.loads(data), "build_log") == hashlib.sha256(log.encode()).hexdigest()

        assert confbuild.main(["verify", str(self.out), "--nonce", NONCE, "--allow-simulated"]) == 0
        return json.loads(data)["predicate"]


def commit_all(folder: Path) -> Path:
    git(folder, "init", "-q", ".")
    git(folder, "add", "-A", "-f")
    git(folder, "commit", "-q", "-m", "all")
    git(folder, "remote", "add", "origin", "https://user:secret@example.org/demo.git")
    return folder


class TestBuildEnvironment:
    def test_what_passes(self, tmp_path: Path) -> None:
        (tmp_path / ".rustup").mkdir()
        environ = {"PATH": "/bin", "LANG": "C", "HOME": str(tmp_path), "TMPDIR": "/t", "CARGO_HOME": "/c", "AWS_SECRET": "s",
                   "CARGO_REGISTRY_TOKEN": "s", "NIX_CONFIG": "s",
                   "SSH_AUTH_SOCK": "s", "RUSTC_WRAPPER": "s", "RUSTFLAGS": "s", "LD_PRELOAD": "s", "PYTHONPATH": "s", "GIT_DIR": "s",
                   "GREETING": "hi", "NIX_CONF_DIR": "/n",
                   "http_proxy": "http://h:1", "HTTPS_PROXY": "http://u:secret@h:1", "all_proxy": "http://u@h", "no_proxy": "h"}
        own = {"HOME": "/w/home", "TMPDIR": "/w/tmp", "CARGO_HOME": "/w/cargo"}
        expected = {"PATH": "/bin", "LANG": "C", "NIX_CONF_DIR": "/n", "http_proxy": "http://h:1", "no_proxy": "h",
                    "RUSTUP_HOME": str(tmp_path / ".rustup"), **own}
        assert confbuild.build_environment("/w", environ, ()) == expected
        more = confbuild.build_environment("/w", environ, ("GREETING", "HTTPS_PROXY", "HOME", "ABSENT"))  # --env adds; the folders stay ours
        assert more == {**expected, "GREETING": "hi", "HTTPS_PROXY": "http://u:secret@h:1"}
        assert confbuild.build_environment("/w", {**environ, "RUSTUP_HOME": "/r"}, ())["RUSTUP_HOME"] == "/r"
        assert confbuild.build_environment("/w", {}, ()) == {"PATH": os.defpath, **own}

    def test_no_allowed_name_sounds_like_a_secret(self) -> None:

        secret = re.compile("TOKEN|SECRET|PASS|KEY|AUTH|CRED|WRAPPER|FLAGS|PRELOAD", re.IGNORECASE)
        assert not [name for name in confbuild.ALLOWED_ENVIRONMENT if secret.search(name)]


class TestLogDigest:
    def test_lines_and_cause(self) -> None:
        got: list[tuple[str, list[str]]] = []
        log = confbuild._LogDigest(lambda phase, lines: got.append((phase, [*lines])))
        assert log.hexdigest() == hashlib.sha256(b"").hexdigest()
        blocks = [["warning: an error: x", ""], [], ["\u00e9\ufffd"], ["  error[E0425]: cannot find  ", "error: later"], ["error: last"]]
        for block in blocks:
            log(block)
        assert got == [("build", block) for block in blocks if block]  # nothing is emitted for nothing
        assert log.hexdigest() == hashlib.sha256("".join(line + "\n" for block in blocks for line in block).encode()).hexdigest()
        assert log.cause == "error[E0425]: cannot find"

    @pytest.mark.parametrize(("line", "cause"), [
        ("error: x", "error: x"), ("   error[E0001]: x ", "error[E0001]: x"), ("errors: x", ""), ("the error: x", ""), ("error x", ""),
        ("error[]: x", ""),
        ("\x1b[1m\x1b[91merror\x1b[0m\x1b[1m: x\x1b[0m", "error: x")])  # cargo's config.toml may have term.color = "always"
    def test_cause(self, line: str, cause: str) -> None:
        log = confbuild._LogDigest(lambda *_: None)
        log([line])
        assert log.cause == cause

    @given(st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n")), max_size=3), max_size=5))
    def test_blocks_do_not_matter(self, blocks: list[list[str]]) -> None:
        whole, parts = confbuild._LogDigest(lambda *_: None), confbuild._LogDigest(lambda *_: None)
        whole([line for block in blocks for line in block])
        for block in blocks:
            parts(block)
        assert whole.hexdigest() == parts.hexdigest()


class TestTakeArtifacts:
    def test_copies(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"artifact")
        taken = confbuild._take_artifacts([("a b", str(tmp_path / "x")), ("\u00e9", str(tmp_path / "x"))], str(tmp_path / "copies"))
        digest = hashlib.sha256(b"artifact").hexdigest()
        assert taken == [(name, str(tmp_path / "copies" / name), digest) for name in ("a b", "\u00e9")]
        assert (tmp_path / "copies" / "a b").read_bytes() == b"artifact"
        assert failure(lambda: confbuild._take_artifacts([], str(tmp_path / "none"))) == ("NoArtifacts", "the build succeeded and left no executable")

    @pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "..", ".", "", "a/b", "a\\b", "\udcff", "\u202e", "\x7f"])
    def test_odd_names(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "x").touch()
        assert failure(lambda: confbuild._take_artifacts([(name, str(tmp_path / "x"))], str(tmp_path / "copies"))) == (
            "ProvenanceError", f"an artifact is called {name!r}")

    def test_a_link_is_never_followed(self, tmp_path: Path) -> None:
        """What is a file when it is found and a link when it is copied must not bring in what it points to."""
        (tmp_path / "link").symlink_to("/etc/passwd")
        assert failure(lambda: confbuild._take_artifacts([("demo", str(tmp_path / "link"))], str(tmp_path / "copies")))[0] == "ProvenanceError"


def plan(**changes: Any) -> confbuild.Plan:
    """A plan of cargo."""
    digest = confbuild.Digest("tool 1", SHA)

    made = confbuild.Plan((), "cargo build --locked --release", {}, {"cargo": digest, "rustc": digest}, SHA, [LIBC], {}, lambda _: [], False)
    return made._replace(**changes)


class TestMakeStatement:
    STARTED = "2026-11-23T20:21:22.000001+00:00"

    def make(self, made: confbuild.Plan, commit: str = COMMIT, uri: str = "https://h/r") -> bytes:
        return confbuild._make_statement(made, "12" * 20, commit, uri, confbuild.SIMULATED_BUILDER, {"build_log": "34" * 32}, {"b": SHA, "a": SHA}, self.STARTED)

    def test_known(self) -> None:
        data = self.make(plan())
        doc = json.loads(data)
        assert data == json.dumps(doc, indent=2, ensure_ascii=False).encode()
        run = doc["predicate"]["runDetails"]
        assert re.fullmatch(r"build-20261123-202122-[0-9a-f]{8}", run["metadata"]["invocationId"])
        assert run["metadata"]["startedOn"] == self.STARTED and list(run["metadata"]) == ["invocationId", "startedOn", "finishedOn"]
        kettle = {"digest": {"sha256": hashlib.sha256(FILE.read_bytes()).hexdigest()}, "version": f"confbuild {confbuild.__version__}"}
        tool = {"digest": {"sha256": SHA}, "version": "tool 1"}
        assert doc["predicate"]["buildDefinition"] == {
            "buildType": "https://confidential.ai/attested-builds/v1",
            "externalParameters": {"buildCommand": "cargo build --locked --release",
                                   "source": {"digest": {"gitCommit": COMMIT, "gitTree": "12" * 20}, "uri": "https://h/r"}},
            "internalParameters": {"lockfileHash": {"sha256": SHA}, "toolchain": {"cargo": tool, "rustc": tool, "kettle": kettle}},
            "resolvedDependencies": [LIBC]}
        # The tree of CONTRACT 3, by hand: commit, tree, rustc hash and version, cargo hash and version, lock file, uris.
        level = [hashlib.sha256(text.encode()).digest() for text in (COMMIT, "12" * 20, SHA, "tool 1", SHA, "tool 1", SHA, str(LIBC["uri"]))]
        while len(level) > 1:
            level = [hashlib.sha256(level[i] + level[i + 1]).digest() for i in range(0, len(level), 2)]

        assert run["byproducts"] == [{"digest": {"sha256": level[0].hex()}, "name": "input_merkle_root"},
                                     {"digest": {"sha256": "34" * 32}, "name": "build_log"}]
        assert doc["subject"] == [{"digest": {"sha256": SHA}, "name": "a"}, {"digest": {"sha256": SHA}, "name": "b"}]
        assert run["builder"] == {"id": "urn:confbuild:builder:simulated:v1"}

    @pytest.mark.parametrize(("changes", "fragment"), [
        ({"command": "cargo\tbuild"}, "buildCommand"), ({"lockfile_sha256": ""}, "lockfileHash"),
        ({"parameters": {"extra": 1}}, "internalParameters"),
        ({"programs": {"nix": confbuild.Digest("nix 1", "x")}}, "toolchain"), ({"dependencies": [{**LIBC, "extra": 1}]}, "resolvedDependencies[0]"),
        ({"dependencies": [{**LIBC, "name": "\ud800"}]}, ""), ({"dependencies": [{**LIBC, "uri": "\ud800"}]}, ""),
        ({"dependencies": [{**LIBC, "uri": 5}]}, ""),
        ({"dependencies": [LIBC] * 20_000}, "")],  # more than MAX_JSON, which the verifier would not read
        ids=["command", "lock", "parameters", "tools", "names", "surrogate", "surrogate in uri", "type", "size"])
    def test_what_our_own_verifier_would_not_take(self, changes: dict[str, Any], fragment: str) -> None:
        kind, message = failure(lambda: self.make(plan(**changes)))
        assert kind == "ProvenanceError" and fragment in message

    def test_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: 1_795_465_282_000_001_999)
        assert confbuild.utc_now() == time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(1_795_465_282)) + ".000001+00:00"


INTO_RELEASE = "mkdir -p target/release; cd target/release; "


class TestPipeline:
    FAILURES: tuple[tuple[Mapping[str, str | bytes], str, str], ...] = (
        ({"README": "x"}, "UnsupportedToolchainError", "no flake.nix and no Cargo.lock in the project"),
        (project("exit 7"), "BuildError", "cargo build --locked --release ended with status 7"),
        (project("kill -9 $$"), "BuildError", "cargo build --locked --release ended with signal 9"),
        (project("echo 'error[E1]: cause' >&2; echo error: after; exit 1"), "BuildError",
         "cargo build --locked --release ended with status 1: error[E1]: cause"),
        (project(f"printf 'error: %02000d' 1; {QUICK} exit 1"), "BuildError",
         "cargo build --locked --release ended with status 1: error: " + "0" * 993),
        (project("true"), "NoArtifacts", "the build succeeded and left no executable"),
        (project(INTO_RELEASE + "ln -s /bin/sh demo; ln -s /etc/passwd x; touch plain; mkdir dir"), "NoArtifacts",
         "the build succeeded and left no executable"),
        (project("mkdir target; ln -s /nowhere target/release"), "ProvenanceError", "target/release is /nowhere: a link, which is not followed"),
        (project(INTO_RELEASE + "f=$(printf 'a\\033b'); touch \"$f\"; chmod +x \"$f\""), "ProvenanceError", r"an artifact is called 'a\x1bb'"),
        (project(INTO_RELEASE + "f=$(printf 'a\\377b'); touch \"$f\"; chmod +x \"$f\""), "ProvenanceError", r"an artifact is called 'a\udcffb'"),
        ({**project(), "Cargo.lock": LOCK + entry("gone", "1.0.0")}, "ProvenanceError",
         "Cargo.lock: gone 1.0.0 has no source and is no package inside the project"),
        # of a length that fits in an event
        ({**project(), "Cargo.lock": LOCK + entry("n" * 9_000_000, "1.0.0")}, "ProvenanceError", "Cargo.lock: nnn"),
        ({**project(), "Cargo.lock": "["}, "SourceError", "Cargo.lock: TOMLDecodeError: "),
    )

    def test_failures(self, server: Callable[..., Server]) -> None:
        running = server("--slots", "2")
        jobs = [running.submit(files) for files, _, _ in self.FAILURES]
        for job, (_, kind, message) in zip(jobs, self.FAILURES, strict=True):
            last = running.events(job)[-1]
            assert last["type"] == "complete" and last["result"]["error_type"] == kind, last

            error = last["result"]["error"]
            assert error == message or message.endswith((": ", "nnn")) and error.startswith(message) and len(error) < 5000
            assert running.request("GET", f"/build/{job}/result")[0] == 404

    def test_a_build(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """Its events; no secret in its environment; a history that proves nothing is told and gone; what was planted is gone."""

        environ = {"AWS_SECRET": "s3cret", "http_proxy": "http://u:s3cret@h", "GREETING": "hi", "RUSTC_WRAPPER": "s3cret"}
        running = server("--env", "GREETING", "--env", "ABSENT", env=environ)
        build = ('test -e .git && exit 9; test -e target && exit 8; env; echo "$PWD $HOME $TMPDIR $CARGO_HOME"; echo odd >&2; '
                 'printf "\\377\\r\\nlast"\n' + QUICK + "chmod +x target/release/*\n")
        job = running.submit({**project(build), ".git/HEAD": "1" * 64, "target/release/evil": "x", "target/evil": "x"})
        events = running.events(job)
        order = [confbuild.PHASES.index(event["type"]) for event in events]
        assert order == sorted(order) and events[-1] == {"type": "complete", "result": {"status": "ok"}}
        told = {phase: [event["msg"] for event in events if event["type"] == phase] for phase in ("detect", "init", "build", "provenance", "attest")}
        assert told["detect"] == ["cargo"] and told["init"] == ["Verifying build inputs", "Commit not recorded: there is no history"]
        assert "GREETING=hi" in told["build"] and not [line for line in told["build"] if "s3cret" in line]
        cwd, *folders = next(line for line in told["build"] if line.startswith("/")).split()
        assert [os.path.relpath(folder, cwd) for folder in folders] == ["../../home", "../../tmp", "../../cargo"] and not os.path.exists(cwd)
        assert told["build"][-3:] == ["odd", "\ufffd", "last"]
        (tmp_path / "result").write_bytes(running.request("GET", f"/build/{job}/result")[2])
        found = confbuild.read_bundle(str(tmp_path / "result"))
        assert found.artifacts == {"demo": hashlib.sha256(b"built\n").hexdigest()}
        assert verdict_over(found, confbuild.Expectations(nonce=NONCE)).verdict == "simulated"
        doc = json.loads(provenance_of(found))
        source = doc["predicate"]["buildDefinition"]["externalParameters"]["source"]
        assert source["digest"]["gitCommit"] == source["uri"] == "" and b"s3cret" not in provenance_of(found)
        assert len(source["digest"]["gitTree"]) == 40, "the object format of a history that proves nothing does not count"
        assert confbuild.byproduct(doc, "build_log") == hashlib.sha256("".join(line + "\n" for line in told["build"]).encode()).hexdigest()

    @pytest.mark.parametrize("history", ["none", "untracked", "committed"])
    @needs("git")
    def test_a_planted_output(self, tmp_path: Path, stub_path: str, history: str) -> None:
        """A target directory of earlier builds, whatever git thinks of it, is no part of the source; and what is built verifies."""
        demo = write_files(tmp_path / "demo", project(QUICK + "chmod +x target/release/*\n"))
        if history == "untracked":
            commit_all(demo)
        write_files(demo, {"target/release/evil": "#!/bin/sh\n"})
        if history == "committed":
            commit_all(demo)
        built = Built(demo, tmp_path / "out", PATH=stub_path)
        source = built.provenance()["buildDefinition"]["externalParameters"]["source"]
        assert os.listdir(tmp_path / "out" / "artifacts") == ["demo"]
        assert source["digest"]["gitCommit"] == source["uri"] == ""

    def test_a_nix_project_may_have_a_folder_called_target(self, tmp_path: Path, nix: Path) -> None:
        """Only the output folders of the toolchain that builds are left out."""
        script(tmp_path / "store" / "a-demo" / "bin" / "demo", "echo demo\n")
        (nix / "stdout").write_text(f"{tmp_path}/store/a-demo\n")
        demo = write_files(tmp_path / "demo", {"flake.nix": "{ }", "Cargo.lock": LOCK, "target/linux/Makefile": "all:\n"})
        built = Built(demo, tmp_path / "out", PATH=on_path(nix)["PATH"], NIX_STATE_DIR=str(nix), NIX_STORE_DIR=str(tmp_path / "store"), NIX_LOG_DIR=str(tmp_path / "log"))
        definition = built.provenance()["buildDefinition"]
        assert built.told("detect") == ["nix"] and built.told("build") == ["building", f"{tmp_path}/store/a-demo"]
        assert definition["internalParameters"]["evaluation"] == {"derivationCount": 2, "fetchCount": 1}

        tree = confbuild.git_tree(str(demo), ["flake.nix", "Cargo.lock", "target/linux/Makefile"])
        assert definition["externalParameters"]["source"]["digest"]["gitTree"] == tree


WORKSPACE = {
    ".gitignore": "/target\n", "Cargo.toml": '[workspace]\nmembers = ["app", "part"]\nresolver = "2"\n',
    "app/Cargo.toml": '[package]\nname = "app"\nversion = "0.1.0"\nedition = "2021"\n[dependencies]\npart = { path = "../part" }\ntiny = "1"\n',
    "app/build.rs": 'fn main() { eprintln!("to stderr"); println!("cargo:warning=from build.rs"); }\n',
    "app/src/main.rs": 'fn main() { println!("{} {}", part::name(), tiny::name()); }\n',
    "part/Cargo.toml": '[package]\nname = "part"\nversion = "0.2.0"\nedition = "2021"\n',
    "part/src/lib.rs": 'pub fn name() -> &\'static str { "part" }\n',
    "vendor/tiny/Cargo.toml": '[package]\nname = "tiny"\nversion = "1.0.0"\nedition = "2021"\n',
    "vendor/tiny/src/lib.rs": 'pub fn name() -> &\'static str { "tiny" }\n',
    "vendor/tiny/.cargo-checksum.json": json.dumps({"files": {}, "package": SHA}),
    ".cargo/config.toml": '[source.crates-io]\nreplace-with = "vendored"\n[source.vendored]\ndirectory = "vendor"\n'
                          '[build]\nrustc = "/evil"\ntarget-dir = "elsewhere"\n',
    "Cargo.lock": ('version = 3\n' + entry("app", "0.1.0") + 'dependencies = ["part", "tiny"]\n' + entry("part", "0.2.0")
                   + entry("tiny", "1.0.0", source=REGISTRY, checksum=SHA))}


class TestRealCargo:
    @needs("cargo")
    @needs("git")
    def test_a_clean_checkout(self, tmp_path: Path) -> None:
        demo = commit_all(write_files(tmp_path / "demo", WORKSPACE))
        script(demo / "target" / "release" / "evil", "")  # which git ignores
        built = Built(demo, tmp_path / "out", AWS_SECRET="s3cret")
        predicate = built.provenance()
        definition = predicate["buildDefinition"]
        assert definition["externalParameters"] == {"buildCommand": "cargo build --locked --release", "source": {
            "digest": {"gitCommit": git(demo, "rev-parse", "HEAD"), "gitTree": git(demo, "rev-parse", "HEAD^{tree}")},
            "uri": "https://example.org/demo.git"}}
        assert definition["resolvedDependencies"] == [{"digest": {"sha256": SHA}, "name": "tiny",
                                                       "uri": f"pkg:cargo/tiny@1.0.0?checksum=sha256:{SHA}"}]
        assert definition["internalParameters"]["lockfileHash"]["sha256"] == hashlib.sha256((demo / "Cargo.lock").read_bytes()).hexdigest()
        tools = definition["internalParameters"]["toolchain"]
        assert list(tools) == ["cargo", "rustc", "kettle"]
        for name in ("cargo", "rustc"):

            which = ["rustup", "which", name] if shutil.which("rustup") else ["which", name]
            asked = subprocess.run(which, capture_output=True, text=True, check=True).stdout.strip()
            assert tools[name]["digest"]["sha256"] == hashlib.sha256(Path(asked).resolve().read_bytes()).hexdigest()
            assert tools[name]["version"] == subprocess.run([asked, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        # Debian 12's cargo does not say of which package.
        assert [line for line in built.told("build") if re.fullmatch(r"warning: (app@0\.1\.0: )?from build\.rs", line)] and "Finished" in built.told("build")[-1]

        subjects = json.loads((tmp_path / "out" / "provenance.json").read_bytes())["subject"]
        assert os.listdir(tmp_path / "out" / "artifacts") == ["app"] == [subject["name"] for subject in subjects]
        assert subprocess.run([tmp_path / "out" / "artifacts" / "app"], capture_output=True, text=True, check=True).stdout == "part tiny\n"
        assert not [path for path in (tmp_path / "out").rglob("*.json") if b"secret" in path.read_bytes()]
        assert not (demo / "elsewhere").exists() and git(demo, "status", "--porcelain") == ""

    @needs("cargo")
    def test_a_mirror(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a guest whose image has a mirror of the registry tells cargo: the lock's crate comes from there, and no other one."""
        project_files = {name: content for name, content in WORKSPACE.items() if not name.startswith((".cargo", "vendor/"))}
        demo = write_files(tmp_path / "demo", project_files)
        write_files(tmp_path / "mirror/tiny-1.0.0", {name.removeprefix("vendor/tiny/"): content for name, content in WORKSPACE.items() if name.startswith("vendor/")})
        write_files(tmp_path / "cargo", {"config.toml": confbuild.MIRROR_CONFIG.replace(confbuild.MIRROR, str(tmp_path / "mirror"))})
        env = {**os.environ, "CARGO_HOME": str(tmp_path / "cargo"), "CARGO_TARGET_DIR": str(tmp_path / "target")}
        done = subprocess.run(["cargo", "metadata", "--locked", "--format-version=1"], cwd=demo, env=env, capture_output=True, text=True, check=True)
        [tiny] = [package for package in json.loads(done.stdout)["packages"] if package["name"] == "tiny"]
        assert tiny["manifest_path"] == str(tmp_path / "mirror/tiny-1.0.0/Cargo.toml")

    @needs("cargo")
    @pytest.mark.parametrize(("files", "kind", "cause"), [
        ({"src/main.rs": 'fn main() { let unused = 1; }\nfn other() -> u8 { "x" }\n'}, "BuildError", r"error\[E0308\]: mismatched types"),
        ({"src/lib.rs": "pub fn nothing() {}\n"}, "NoArtifacts", "the build succeeded and left no executable"),
        ({"src/main.rs": "fn main() {}\n", "Cargo.toml": MANIFEST.replace("0.1.0", "0.2.0")}, "BuildError", r"error: .*--locked.*"),
    ], ids=["compile error", "library", "old lock"])
    def test_failures(self, tmp_path: Path, files: dict[str, str], kind: str, cause: str) -> None:
        built = Built(write_files(tmp_path / "demo", {"Cargo.toml": MANIFEST, "Cargo.lock": LOCK.replace("version = 4", "version = 3"), **files}), tmp_path / "out")
        assert built.status == 1 and built.result is not None and built.result["error_type"] == kind and not (tmp_path / "out").exists()
        prefix = "cargo build --locked --release ended with status 101: " if kind == "BuildError" else ""
        assert re.fullmatch(re.escape(prefix) + cause, built.result["error"]), built.result
        first = next((line for line in built.told("build") if line.startswith("error")), "")
        assert kind == "NoArtifacts" or built.result["error"] == prefix + first

    @needs("git")
    def test_a_dirty_tree(self, tmp_path: Path, stub_path: str) -> None:
        demo = commit_all(write_files(tmp_path / "demo", project()))
        write_files(demo, {"src/main.rs": "fn main() { evil() }\n", "new": ""})
        said = subprocess.run([*PROGRAM, "build", str(demo), "-o", str(tmp_path / "out")], env={**os.environ, "PATH": stub_path},
                              capture_output=True, text=True, timeout=PATIENCE, check=True).stderr
        assert "packed 5 files as they are, without history: git has modified or untracked files" in said
        git(demo, "add", "-A")

        source = json.loads((tmp_path / "out" / "provenance.json").read_bytes())["predicate"]["buildDefinition"]["externalParameters"]["source"]
        assert source == {"digest": {"gitCommit": "", "gitTree": git(demo, "write-tree")}, "uri": ""}


FLAKE = """{ outputs = { self }: let
  system = "@-linux";
  base = { inherit system; builder = "/bin/sh"; PATH = "/usr/bin:/bin"; };
  data = derivation (base // { name = "data-1.0.txt"; args = [ "-c" "printf 'known content\\\\n' > $out" ]; url = "https://example.org/data-1.0.txt";
    outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "@SRI"; });
in { packages.${system}.default = derivation (base // { name = "hello-1.0"; args = [ "-c" ''
  echo to the log >&2; mkdir -p $out/bin; { echo '#!/bin/sh'; echo "echo $(cat ${data})"; } > $out/bin/hello
  chmod 755 $out/bin/hello; ln -s /bin/sh $out/bin/out '' ]; });
}; }
"""


class TestRealNix:
    @needs("nix")
    @needs("git")
    def test_a_flake(self, tmp_path: Path) -> None:
        """No nixpkgs, no network: one fixed-output derivation, in a store of its own."""
        conf = "sandbox = false\nsubstituters =\nbuild-users-group =\nexperimental-features = nix-command flakes\n"
        write_files(tmp_path / "conf", {"nix.conf": conf})
        flake = FLAKE.replace("@SRI", SRI["sha256"]).replace("@", os.uname().machine)
        demo = commit_all(write_files(tmp_path / "demo", {"flake.nix": flake, "target/kept": "x"}))
        try:
            built = Built(demo, tmp_path / "out", NIX_CONF_DIR=str(tmp_path / "conf"), NIX_STORE_DIR=str(tmp_path / "store"),
                          NIX_STATE_DIR=str(tmp_path / "state"), NIX_LOG_DIR=str(tmp_path / "log"))
            definition = built.provenance()["buildDefinition"]
            command = definition["externalParameters"]["buildCommand"]
            program = Path(shutil.which("nix") or "").resolve()
            version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
            assert definition["internalParameters"] == {
                "evaluation": {"derivationCount": 2, "fetchCount": 1}, "lockfileHash": {"sha256": hashlib.sha256(b"").hexdigest()},
                "toolchain": {"nix": {"digest": {"sha256": hashlib.sha256(program.read_bytes()).hexdigest()}, "version": version},
                              "kettle": definition["internalParameters"]["toolchain"]["kettle"]}}
            fetch, = definition["resolvedDependencies"]
            assert re.search(r"[0-9a-z]{32}-data-1\.0\.txt\.drv$", fetch["annotations"].pop("drvPath"))
            assert fetch == {"annotations": {"outputHashMode": "flat", "url": "https://example.org/data-1.0.txt"},
                             "digest": {"sha256": KNOWN_DIGESTS["sha256"]},
                             "name": "data-1.0.txt", "uri": f"pkg:nix-fetch/data-1.0.txt?hash=sha256:{KNOWN_DIGESTS['sha256']}"}
            assert definition["externalParameters"]["source"] == {
                "digest": {"gitCommit": git(demo, "rev-parse", "HEAD"), "gitTree": git(demo, "rev-parse", "HEAD^{tree}")},
                "uri": "https://example.org/demo.git"}
            # The command was really run: nix itself, given it again, names the output whose program is the artifact.
            assert re.fullmatch(rf"nix build --no-link (--json|--print-out-paths) {FEATURES}", command)
            assert "hello-1.0" in built.told("build")[-1] and str(tmp_path / "store") in built.told("build")[-1]
            assert os.listdir(tmp_path / "out" / "artifacts") == ["hello"]
            assert subprocess.run([tmp_path / "out" / "artifacts" / "hello"], capture_output=True, text=True, check=True).stdout == "known content\n"
        finally:  # the store is read-only
            subprocess.run(["chmod", "-R", "u+w", str(tmp_path)], check=False)

# endregion 18
# ==============================================================================
# region 19. Image
# ==============================================================================


def elf(interpreter: str = "", needed: Sequence[str] = (), address: int = 0x400000) -> bytes:
    """A file for x86-64 that asks for these, and does nothing."""
    strings, names = b"\0", []
    for name in needed:
        names.append(len(strings))
        strings += name.encode() + b"\0"
    begin = 64 + 3 * 56
    interp = interpreter.encode() + b"\0"
    at = begin + len(interp) + len(strings)
    dynamic = b"".join(struct.pack("<QQ", *row) for row in (*((1, name) for name in names), (5, address + begin + len(interp)), (0, 0)))
    rows = [(1, 0, address, at + len(dynamic)), (2, at, address + at, len(dynamic))] + ([(3, begin, 0, len(interp))] if interpreter else [])
    headers = b"".join(struct.pack("<IIQQQQQQ", kind, 0, offset, where, 0, size, size, 0) for kind, offset, where, size in rows).ljust(3 * 56, b"\0")
    return struct.pack("<6s10xHHIQQQIHHHHHH", b"\x7fELF\2\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, len(rows), 0, 0, 0) + headers + interp + strings + dynamic


def bzimage(release: str = "6.1.0-toy") -> bytes:
    data = bytearray(1024)
    data[0x202:0x206], data[0x20E:0x210] = b"HdrS", struct.pack("<H", 0x40)
    return bytes(data[:0x240]) + release.encode() + b" (nobody@nowhere) #1 SMP\0" + bytes(512)


def module_file(depends: str = "") -> bytes:
    return b"\x7fELF module\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


MODULES: Mapping[str, bytes] = {
    "net/virtio_net.ko": module_file("net_failover"), "net/net_failover.ko": module_file("failover"), "net/failover.ko": module_file(),
    "block/virtio_blk.ko": module_file(), "md/dm-verity.ko.xz": lzma.compress(module_file("dm-bufio,dm-mod")), "md/dm-mod.ko": module_file(),
    "md/dm-bufio.ko": module_file("dm-mod"), "virt/sev-guest.ko": module_file("tsm"), "virt/tsm.ko": module_file(),
    "crypto/gcm.ko": module_file("gf128mul"), "crypto/gf128mul.ko": module_file("gcm"), "modules.builtin": b"kernel/fs/erofs/erofs.ko\n"}
TOY_AMDSEV = toy_volume(lzma_section(b"volume " * 300 + b"\0" + SHIM + b"between" + SHIM + random.Random(1).randbytes(500)))
PYTHON = "usr/lib/python3.13"
ROOT_FILES: Mapping[str, str | bytes] = {
    "usr/bin/python3.13": elf("/lib64/ld-linux-x86-64.so.2", ["libm.so.6", "libc.so.6"]), "usr/lib/x86_64-linux-gnu/libc.so.6": elf(needed=["ld-linux-x86-64.so.2"]),
    "usr/lib/x86_64-linux-gnu/libm.so.6.1": elf(needed=["libc.so.6"]), "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": elf(),
    "usr/lib/x86_64-linux-gnu/libgcc_s.so.1": elf(needed=["libc.so.6"]), "usr/lib/x86_64-linux-gnu/libffi.so.8": elf(), "usr/lib/x86_64-linux-gnu/libunused.so": elf(),
    f"{PYTHON}/os.py": "import x\n", f"{PYTHON}/json/decoder.py": "pass\n", f"{PYTHON}/test/test_os.py": "pass\n", f"{PYTHON}/unittest/case.py": "pass\n",
    f"{PYTHON}/lib-dynload/_ctypes.so": elf(needed=["libffi.so.8"]), f"{PYTHON}/lib-dynload/_sqlite3.so": elf(needed=["libsqlite3.so.0"]),
    f"{PYTHON}/__pycache__/os.pyc": b"stale", "usr/bin/gcc.sh": b"#!/bin/sh\n" * 1000, "usr/share/doc/gcc/README": b"dropped", "usr/share/ovmf/OVMF.amdsev.fd": TOY_AMDSEV,
    "var/lib/dpkg/status": b"dropped", "boot/vmlinuz-6.1.0-toy": bzimage(), "etc/empty": b"", "etc/\udce9": b"no UTF-8",
    **{f"usr/lib/modules/6.1.0-toy/kernel/{name}" if "/" in name else f"usr/lib/modules/6.1.0-toy/{name}": data for name, data in MODULES.items()}}
ROOT_LINKS: Mapping[str, str] = {
    "lib": "usr/lib", "lib64": "usr/lib64", "bin": "usr/bin", "usr/bin/python3": "python3.13", "usr/lib64/ld-linux-x86-64.so.2": "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    "usr/lib/x86_64-linux-gnu/libm.so.6": "libm.so.6.1", "etc/loop": "loop", "etc/away": "/nowhere/" + "x" * 100}


def toy_root(folder: Path, changes: Mapping[str, str | bytes | None] | None = None, links: Mapping[str, str] | None = None, backwards: bool = False) -> Path:
    """A root file system of which no program runs. changes: files that are other, None = that are not there."""
    files = {name: data for name, data in {**ROOT_FILES, **(changes or {})}.items() if data is not None}
    order = sorted(files, reverse=backwards)
    folder.mkdir()
    write_files(folder, {name: files[name] for name in order})
    for name, target in {**ROOT_LINKS, **(links or {})}.items():
        if name not in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(target)
    for path in folder.rglob("*.sh"):
        path.chmod(0o4755)
    return folder


def toy_compiler(argv: Sequence[str], cwd: str, env: Mapping[str, str], **_: Any) -> tuple[int, bytes, str]:
    """In place of the Python of a toy root, which does not run."""
    assert argv[0] == "./usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" and argv[3] == "./usr/bin/python3.13" and env["PYTHONHASHSEED"] == "0"
    for source, target, shown in json.loads(Path(argv[-1]).read_text()):
        Path(target).write_bytes(b"compiled " + shown.encode() + b" " + hashlib.sha256(Path(source).read_bytes()).digest())
    return 0, b"", ""


@pytest.fixture
def toy_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confbuild, "capture", toy_compiler)


def read_cpio(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """name -> (mode, content, device) of an archive in the form newc, in its order."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert data[at:at + 6] == b"070701" and at % 4 == 0
        inode, mode, uid, gid, _, mtime, size, _, _, major, minor, length, check = (int(data[at + 6 + 8 * i:at + 14 + 8 * i], 16) for i in range(13))
        name = data[at + 110:at + 110 + length]
        begin = at + 110 + length + -(110 + length) % 4
        at = begin + size + -size % 4
        assert name.endswith(b"\0") and uid == gid == mtime == check == 0
        if name == b"TRAILER!!!\0":
            assert len(data) % 512 == 0 and not data[at:].strip(b"\0") and len(data) - at < 512
            return found
        assert inode == len(found) + 1
        found[os.fsdecode(name[:-1])] = mode, data[begin:begin + size], (major, minor)


def read_erofs(data: bytes) -> dict[str, tuple[int, bytes]]:
    """path -> (mode, content) of a file system that is not compressed."""
    magic, _, _, bits, _, root, inodes, _, _, blocks, meta = struct.unpack_from("<IIIBBHQQIII", data, 1024)
    assert (magic, bits, meta) == (0xE0F5E1E2, 12, 1) and len(data) >= blocks << 12
    found: dict[str, tuple[int, bytes]] = {}

    def visit(path: str, number: int, parent: int) -> None:
        layout, _, mode, _, size, block, _, uid, gid, mtime, nsec, _ = struct.unpack_from("<HHHHQIIIIQII", data, 4096 + 32 * number)
        content = data[block << 12:(block << 12) + size]
        assert layout == 1 and uid == gid == mtime == nsec == 0 and len(content) == size and path not in found
        found[path] = mode, content
        if not mode & 0o40000:
            return
        names: list[bytes] = []
        for at in range(0, size, 4096):
            part = content[at:at + 4096]
            rows = [struct.unpack_from("<QHBB", part, i) for i in range(0, struct.unpack_from("<H", part, 8)[0], 12)]
            ends = [row[1] for row in rows[1:]] + [len(part.rstrip(b"\0")) if at + 4096 < size else len(part)]
            for (child, begin, _, _), end in zip(rows, ends, strict=True):
                names.append(part[begin:end])
                if names[-1] in (b".", b".."):
                    assert child == (number if names[-1] == b"." else parent)
                else:
                    visit(f"{path}/{os.fsdecode(names[-1])}".lstrip("/"), child, number)
        assert names == sorted(names)

    visit("", root, root)
    assert len(found) == inodes
    return found


def deb_of(data: bytes, name: str = "data.tar.xz") -> bytes:
    """A .deb file with this data."""
    def member(name: str, content: bytes) -> bytes:
        return f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    return b"!<arch>\n" + member("debian-binary", b"2.0\n") + member("control.tar.xz", b"odd") + member(name, data)


def deb(*members: TarEntry) -> bytes:
    return deb_of(lzma.compress(tar_of(*members), preset=0))


def unpack_debs(folder: Path, *debs: bytes) -> Path:
    """The root file system that these packages make."""
    (folder / "debs").mkdir()
    lines = []
    for i, data in enumerate(debs):
        (folder / "debs" / f"{len(debs) - i}.bin").write_bytes(data)
        lines.append(f"p{i} 1.0 {hashlib.sha256(data).hexdigest()}")
    (folder / "lock").write_text("# a comment\n\n" + "\n".join(lines) + "  # the last\n")
    (folder / "root").mkdir()
    rows = confbuild.unpack_packages(str(folder / "lock"), str(folder / "debs"), str(folder / "root"))
    assert [row[0] for row in rows] == [f"p{i}" for i in range(len(debs))]
    return folder / "root"


def stub_apt(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """apt-get is a shell script."""
    write_files(folder, {"bin/apt-get": "#!/bin/sh\n" + script})
    (folder / "bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


class TestLock:
    # The package, its version, and what it depends on.
    PACKAGES = (("git", "1:2.47-1", "libc6 (>= 2.38), perl, editor | pager"), ("libc6", "2.41", "libgcc-s1"), ("libgcc-s1", "14.2.0-19", ""), ("perl", "5.9-1", ""),
                ("perl", "5.40~rc1-1", ""), ("pager", "1.0", "absent | kmod, kmod, zz | libc6"), ("kmod", "1.0", "libkmod"), ("libkmod", "2.0", ""))

    @pytest.fixture
    def archive(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A package archive of our own is the one source of apt."""
        if shutil.which("apt-get") is None:
            pytest.skip("apt-get is missing: it comes with Debian")
        index = "\n".join(f"Package: {name}\nVersion: {version}\nArchitecture: all\nFilename: ./{name}.deb\nSize: 1\nSHA256: {self.sha256(name, version)}\n"
                          + (f"Depends: {depends}\n" if depends else "") for name, version, depends in self.PACKAGES)
        root = tmp_path / "apt"
        write_files(root, {"Packages": index, "lists/partial/x": "", "cache/archives/partial/x": "", "status": "",
                           "sources.list": f"deb [trusted=yes] file:{urllib.parse.quote(str(root))} ./\n",
                           "apt.conf": f'Dir::Etc::sourcelist "{root}/sources.list"; Dir::Etc::sourceparts "-"; Dir::Etc::preferencesparts "-"; Dir::State::lists "{root}/lists"; '
                                       f'Dir::Cache "{root}/cache"; Dir::State::status "{root}/status"; APT::Sandbox::User "";'})
        monkeypatch.setenv("APT_CONFIG", str(root / "apt.conf"))
        subprocess.run(["apt-get", "-qq", "update"], check=True, capture_output=True)

    @staticmethod
    def sha256(name: str, version: str) -> str:
        return hashlib.sha256(f"{name} {version}".encode()).hexdigest()

    @pytest.mark.usefixtures("archive")
    def test_closure(self) -> None:
        """The newest version, with its epoch; alternatives; sorted by name; nothing that only a package in without needs."""
        everything = [("git", "1:2.47-1"), ("kmod", "1.0"), ("libc6", "2.41"), ("libgcc-s1", "14.2.0-19"), ("libkmod", "2.0"), ("pager", "1.0"), ("perl", "5.40~rc1-1")]
        for without, names in ((), everything), (("kmod",), [row for row in everything if "kmod" not in row[0]]):
            assert confbuild.parse_lock(confbuild.write_lock(["git"], without), "lock") == [(*row, self.sha256(*row)) for row in names]

    @pytest.mark.usefixtures("archive")
    def test_unknown_name(self) -> None:
        with pytest.raises(confbuild.ImageError, match="^apt-get: Unable to locate package xx; Unable to locate package yy$"):
            confbuild.write_lock(["git", "xx", "yy"])

    @pytest.mark.parametrize(("script", "message"), [
        ("echo E: no; exit 7", "apt-get: ended with status 7"), ("echo W: a >&2; echo E: no >&2; exit 100", "apt-get: no"), ("exit 0", "apt-get's answer: no package in it"),
        *[(f'printf "%s\n" "{line}"', "apt-get printed .*, not the URI of a package with its SHA-256") for line in (
            "'x' a_1_all.deb 1 MD5Sum:0", f"'x' a_1.deb 1 SHA256:{SHA}", f"x aa_1_all.deb 1 SHA256:{SHA}", f"'x' aa_1_all.deb 1 SHA256:{SHA} x")],
        (f"echo \"'x' A_1_all.deb 1 SHA256:{SHA}\"", "apt-get's answer: line 1 is not NAME VERSION SHA256")], ids=short_id)
    def test_odd_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
        stub_apt(tmp_path, monkeypatch, script)
        with pytest.raises(confbuild.ImageError, match=f"^{message}$"):
            confbuild.write_lock(["git"])

    def test_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        stub_apt(tmp_path, monkeypatch, f"echo \"'x' all_1.0_all.deb 1 SHA256:{SHA}\"")
        assert confbuild.main(["image", "--lock", str(tmp_path / "lock"), "--without", "none", "all"]) == 0
        assert capsys.readouterr().out == f"1 packages in {tmp_path}/lock\n" and (tmp_path / "lock").read_text() == f"all 1.0 {SHA}\n"

    def test_no_apt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(confbuild.ImageError, match="^apt-get is not installed$") as caught:
            confbuild.write_lock(["git"])
        assert caught.value.hint == "make the lock file on Debian or Ubuntu"

    @pytest.mark.parametrize("name", ["", "-h", "A", "a", "x y", "../x", "x\ny"])
    def test_no_option_by_name(self, name: str) -> None:
        for names, without in ([name], []), (["git"], [name]):
            with pytest.raises(confbuild.ImageError, match="is not the name of a package"):
                confbuild.write_lock(names, without)

    @pytest.mark.parametrize(("text", "message"), [
        ("a 1 " + "0" * 63, "line 1 is not NAME"), ("\n#\na 1 " + "0" * 64 + " x", "line 3 is not NAME"), ("# nothing", "no package in it"), ("A 1 " + "0" * 64, "line 1"),
        (f"a 1 {'0' * 64}\na 2 {'1' * 64}", "the package a occurs twice"), (f"a 1 {'0' * 64}\nb 2 {'0' * 64}", "the SHA-256 0000000000000000000000000000000000000000000000000000000000000000 occurs twice")])
    def test_no_rows(self, text: str, message: str) -> None:
        with pytest.raises(confbuild.ImageError, match=f"^L: {message}"):
            confbuild.parse_lock(text.encode(), "L")


class TestDebs:
    TREE: tuple[TarEntry, ...] = (
        ("./", "", FOLDER), ("./usr/bin/", "", FOLDER), ("./usr/bin/gcc", b"gcc", FILE_TYPE), ("./usr/bin/gcc-14", "./usr/bin/gcc", LINK), ("./bin/mawk", b"mawk", FILE_TYPE),
        ("./bin/sh", "dash", SYMLINK), ("./usr/lib/ld.so", "/lib/x.so", SYMLINK), ("./usr/share/doc/gcc/README", b"dropped", FILE_TYPE), ("./lib", "usr/lib", SYMLINK),
        ("./usr/share/ca-certificates/b.crt", b"B\n", FILE_TYPE), ("./usr/share/ca-certificates/a.crt", b"A\n", FILE_TYPE), ("./var/lib/x", b"dropped", FILE_TYPE))

    @pytest.mark.parametrize("compress", [("data.tar.xz", lzma.compress), ("data.tar.gz", gzip.compress), ("data.tar", bytes), ("data.tar/", bytes)], ids=lambda c: c[0])
    def test_unpack(self, tmp_path: Path, compress: tuple[str, Callable[[bytes], bytes]]) -> None:
        """What is there afterwards, by whatever umask."""
        before = os.umask(0o077)
        try:
            root = unpack_debs(tmp_path, deb_of(compress[1](tar_of(*self.TREE)), compress[0]), deb(("./usr/bin/dash", b"dash", FILE_TYPE)))
        finally:
            os.umask(before)
        found = {str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in root.rglob("*") if path.is_symlink() or path.is_file()}
        assert found == {
            "bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/bin/gcc": b"gcc", "usr/bin/gcc-14": b"gcc", "usr/bin/mawk": b"mawk",
            "usr/bin/dash": b"dash", "usr/bin/sh": "dash", "usr/lib/ld.so": "/lib/x.so", "usr/bin/cc": "gcc", "usr/bin/awk": "mawk",
            "usr/share/ca-certificates/a.crt": b"A\n", "usr/share/ca-certificates/b.crt": b"B\n", "etc/ssl/certs/ca-certificates.crt": b"A\nB\n", "etc/hosts": b"127.0.0.1 localhost\n",
            "etc/passwd": b"root:x:0:0::/root:/bin/sh\nagent:x:1000:1000::/:/bin/sh\nbuild:x:1001:1001::/work/home:/bin/sh\n", "etc/group": b"root:x:0:\nagent:x:1000:\nbuild:x:1001:\n"}
        assert (root / "usr/bin/gcc").stat().st_mode & 0o777 == 0o644 and not list((root / "var").iterdir() if (root / "var").exists() else [])

    def test_own_files_win(self, tmp_path: Path) -> None:
        root = unpack_debs(tmp_path, deb(("usr/bin/gcc", b"", FILE_TYPE), ("usr/bin/cc", b"mine", FILE_TYPE), ("etc/passwd", b"mine", FILE_TYPE)))
        assert (root / "usr/bin/cc").read_bytes() == (root / "etc/passwd").read_bytes() == b"mine" and not (root / "etc/ssl").exists()

    def test_missing(self, tmp_path: Path) -> None:
        """All at once; a link to a file is none."""
        (tmp_path / "debs").mkdir()
        (tmp_path / "debs/x.deb").symlink_to("/etc/passwd")
        (tmp_path / "lock").write_text(f"a 1 {'a' * 64}\nb 2 {'b' * 64}\n")
        with pytest.raises(confbuild.ImageError, match=f"debs: no file with the SHA-256 of a 1 {'a' * 64}, b 2 {'b' * 64}$"):
            confbuild.unpack_packages(str(tmp_path / "lock"), str(tmp_path / "debs"), str(tmp_path))

    @pytest.mark.parametrize(("members", "message"), [
        ([("../x", b"", FILE_TYPE)], "'../x' is not a plain relative path"), ([("/x", b"", FILE_TYPE)], "'/x' is not a plain relative path"),
        ([("usr/../../x", b"", FILE_TYPE)], "is not a plain relative path"), ([("a/" * 70 + "x", b"", FILE_TYPE)], "is not a plain relative path"),
        ([("etc", "/tmp", SYMLINK), ("etc/x", b"", FILE_TYPE)], "'etc/x' lies in what is no directory"), ([("etc", "/tmp", SYMLINK)], "'etc/passwd' lies in what is no directory"),
        ([("a", b"", FILE_TYPE), ("a/x", b"", FILE_TYPE)], "'a/x' lies in what is no directory"), ([("bin/x", "/tmp", SYMLINK), ("usr/bin/x/y", b"", FILE_TYPE)], "lies in what is no directory"),
        ([("x", "/tmp/y", SYMLINK), ("x", b"", FILE_TYPE)], "'x' occurs twice"), ([("x", b"", FILE_TYPE), ("./x", b"", FILE_TYPE)], "'x' occurs twice"),
        ([("x", "a", SYMLINK), ("x", "b", SYMLINK)], "'x' occurs twice"), ([("x", b"", FILE_TYPE), ("x", "", FOLDER)], "'x' occurs twice"),
        ([("bin/x", b"", FILE_TYPE), ("usr/bin/x", b"", FILE_TYPE)], "'usr/bin/x' occurs twice"), ([("y", b"", FILE_TYPE), ("x", "y", LINK), ("x", "y", LINK)], "'x' occurs twice"),
        ([("x", "../../etc/passwd", LINK)], "'x' is a link to '../../etc/passwd', which is no earlier file"), ([("x", "y", LINK)], "which is no earlier file"),
        ([("y", "/etc/passwd", SYMLINK), ("x", "y", LINK)], "which is no earlier file"), ([("usr/bin", b"", FILE_TYPE)], "File exists|Not a directory"), ([("x" * 300, b"", FILE_TYPE)], "File name too long"),
        ([("x", "", DEVICE)], "'x' is a device, a pipe, a sparse file"), ([("x", "", FIFO)], "'x' is a device, a pipe, a sparse file"), ([SPARSE], "is a device, a pipe, a sparse file")])
    def test_hostile_members(self, tmp_path: Path, members: Sequence[TarEntry], message: str) -> None:
        """Nothing outside of the root is touched, and nothing through a link."""
        with pytest.raises((confbuild.ImageError, OSError), match=message):
            unpack_debs(tmp_path, deb(*members))
        assert {path.name for path in tmp_path.iterdir()} == {"debs", "lock", "root"} and not Path("/tmp/x").exists()

    def test_names_with_a_nul(self, tmp_path: Path) -> None:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("x")
            info.type, info.pax_headers = SYMLINK, {"linkpath": "a\0b"}
            tar.addfile(info)
        with pytest.raises(confbuild.ImageError, match="'x' is not a plain relative path"):
            unpack_debs(tmp_path, deb_of(data.getvalue(), "data.tar"))

    @pytest.mark.parametrize(("data", "message"), [
        (b"", "p0: not a .deb file"), (b"PK\3\4", "p0: not a .deb file"), (b"!<arch>\n", "p0: not a .deb file, or one without data.tar"),
        (deb_of(b"")[:150], "p0: not a .deb file, or one without"), (deb_of(b"", "other.tar.xz"), "or one without data.tar"), (deb_of(b"").replace(b"`", b"'"), "or one without data.tar"),
        (deb_of(b"x", "data.tar.zst"), "p0: data.tar.zst cannot be read: only .gz and .xz can"), (deb_of(b"x" * 1000)[:-500], "p0: data.tar.xz is cut off"),
        (deb_of(b"x" * 1000), "p0: damaged: LZMAError"), (deb_of(b"x" * 1000, "data.tar.gz"), "p0: damaged: Not a gzipped file"), (deb_of(b"x" * 1000, "data.tar"), "p0: the archive is no tarball"),
        (deb_of(lzma.compress(large_member("usr/share/doc/x"))), "p0: the archive unpacks to more than 4294967296 bytes"),
        (deb_of(lzma.compress(tar_of(("x", b"y", FILE_TYPE)))[:-20]), "p0: damaged: EOFError"), (deb_of(lzma.compress(tar_of(("x", b"y", FILE_TYPE)) + b"more")), "goes on after its end")], ids=short_id)
    def test_damaged(self, tmp_path: Path, data: bytes, message: str) -> None:
        with pytest.raises(confbuild.ImageError, match=message):
            unpack_debs(tmp_path, data)

    def test_limits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(confbuild, "MAX_UNPACKED", 1000)
        with pytest.raises(confbuild.ImageError, match="p1: the packages unpack to more than 1000 bytes"):
            unpack_debs(tmp_path, deb(("x", b"x" * 600, FILE_TYPE)), deb(("y", b"y" * 401, FILE_TYPE)))
        monkeypatch.setattr(confbuild, "MAX_MEMBERS", 3)
        with pytest.raises(confbuild.ImageError, match="p0: the packages have more than 3 files"):
            (tmp_path / "more").mkdir()
            unpack_debs(tmp_path / "more", deb(*((str(i), b"", FILE_TYPE) for i in range(4))))

    @settings(max_examples=40)
    @given(st.integers(0, 10 ** 6), st.integers(0, 255), st.booleans())
    def test_any_damage(self, at: int, value: int, cut: bool) -> None:
        whole = deb_of(tar_of(("x/y", b"content", FILE_TYPE), ("z", "x", SYMLINK)), "data.tar")
        data = whole[:at % len(whole)] if cut else whole[:at % len(whole)] + bytes((value,)) + whole[at % len(whole) + 1:]
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(confbuild.ImageError):
            unpack_debs(Path(folder), data)


class TestElf:
    def test_needs(self) -> None:
        assert confbuild.elf_needs(elf("/lib64/ld.so", ["liba.so", "b.so.1"])) == ("/lib64/ld.so", ["liba.so", "b.so.1"]) and confbuild.elf_needs(elf()) == ("", [])

    def test_this_python(self) -> None:
        data = Path(os.path.realpath(sys.executable)).read_bytes()
        if sys.platform != "linux" or data[:4] != b"\x7fELF" or data[18] != 62:
            pytest.skip("this Python is not for Linux on x86-64")
        interpreter, needed = confbuild.elf_needs(data)
        assert "libc.so.6" in needed and Path(interpreter).is_file()

    @pytest.mark.parametrize(("data", "message"), [
        (b"", "not a file for x86-64"), (b"#!/bin/sh\n", "not a file"), (elf()[:19], "cut off"), (elf()[:40], "cut off"), (elf()[:100], "cut off"),
        (elf()[:18] + b"\3" + elf()[19:], "not a file for x86-64"), (elf("/x", ["y"])[:-40], "cut off"), (elf(needed=["y"]).replace(struct.pack("<QQ", 5, 0x400000 + 233), bytes((5,)) + bytes(15)),
                                                                                                      "no segment holds the names"),
        (elf(needed=["y"]).replace(struct.pack("<QQ", 1, 1), struct.pack("<QQ", 1, 1 << 40)), "a name without an end"), (elf("x" * 5000), "a name without an end"),
        (elf()[:54] + b"\0\0\2\0" + elf()[58:], "2 program headers of 0 bytes, not at most 64 of 56"), (elf()[:56] + b"\x41\0" + elf()[58:], "65 program headers of 56 bytes")], ids=short_id)
    def test_damaged(self, data: bytes, message: str) -> None:
        with pytest.raises(confbuild.Malformed, match=f"^ELF: {message}"):
            confbuild.elf_needs(data)

    @settings(max_examples=200)
    @given(st.data())
    def test_any_damage(self, data: st.DataObject) -> None:
        whole = elf("/lib64/ld.so", ["liba.so"])
        at = data.draw(st.integers(0, len(whole) - 1))
        with contextlib.suppress(confbuild.Malformed):
            confbuild.elf_needs(whole[:at] if data.draw(st.booleans()) else whole[:at] + data.draw(st.binary(min_size=1, max_size=8)) + whole[at + 1:])


class TestFileSystems:
    TREE: confbuild._Tree = {  # noqa: RUF012
        "a": confbuild._FOLDER, "a/b": confbuild._new_file(b"x" * 5000, True), "a-b": confbuild._new_file(b""), "a/link": confbuild._Node(0o120777, b"b", 1),
        **{f"a/{i:060}": confbuild._new_file(b"%d" % i) for i in range(300)}, "a/\udcff": confbuild._new_file(b"y"), "z": confbuild._FOLDER}

    @needs("cpio")
    def test_cpio(self, tmp_path: Path) -> None:
        device = confbuild._Node(0o20600, device=(1, 3))
        tree = {**self.TREE, "null": device}
        confbuild.write_cpio(str(tmp_path / "x"), tree)
        data = (tmp_path / "x").read_bytes()
        names = subprocess.run(["cpio", "-t", "--quiet"], input=data, capture_output=True, check=True).stdout.split(b"\n")[:-1]
        assert names == sorted(map(os.fsencode, tree))
        assert read_cpio(data) == {name: (tree[name].mode, tree[name].content, tree[name].device) for name in map(os.fsdecode, names)}

    def test_cpio_limit(self, tmp_path: Path) -> None:
        with pytest.raises(confbuild.ImageError, match="'big': more than an initrd can hold in one file"):
            confbuild.write_cpio(str(tmp_path / "x"), {"big": confbuild._Node(0o100644, "nowhere", 1 << 32)})

    def test_erofs(self, tmp_path: Path) -> None:
        root_hash, blocks = confbuild.write_erofs(str(tmp_path / "x"), self.TREE)
        data = (tmp_path / "x").read_bytes()
        found = read_erofs(data)
        assert {name: node for name, node in found.items() if not node[0] & 0o40000} == {
            name: (node.mode, node.content) for name, node in self.TREE.items() if node is not confbuild._FOLDER}
        assert set(found) == {"", *self.TREE} and root_hash == verity_root(data, blocks)

    @needs("fsck.erofs")
    @needs("veritysetup")
    def test_their_tools(self, tmp_path: Path) -> None:
        """fsck.erofs and veritysetup take it; a changed byte they do not."""
        big = {**self.TREE, "big": confbuild._new_file(random.Random(1).randbytes(1 << 20))}  # two levels of hashes
        root_hash, blocks = confbuild.write_erofs(str(tmp_path / "x"), big)
        data = (tmp_path / "x").read_bytes()
        assert subprocess.run(["fsck.erofs", str(tmp_path / "x")], capture_output=True, check=False).returncode == 0
        (tmp_path / "hashes").write_bytes(data[blocks * 4096:])
        for change, status in ((b"", 0), (b"\1", 1)):
            (tmp_path / "data").write_bytes(data[:blocks * 4096 - len(change)] + change)
            done = subprocess.run(["veritysetup", "verify", "--no-superblock", f"--data-blocks={blocks}", "--hash=sha256", "--salt=-", str(tmp_path / "data"), str(tmp_path / "hashes"),
                                   root_hash], capture_output=True, check=False)
            assert (done.returncode == 0) == (status == 0), done.stderr

    def test_files_that_change(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"abc")
        for size in (2, 4):
            with pytest.raises(confbuild.ImageError, match="f: has changed meanwhile"):
                confbuild.write_erofs(str(tmp_path / str(size)), {"f": confbuild._Node(0o100644, str(tmp_path / "f"), size)})

    def test_scan(self, tmp_path: Path) -> None:
        """What is dropped, and what no image holds."""
        root = toy_root(tmp_path / "root")
        tree = confbuild.scan_tree(str(root))
        assert {"usr/share/doc", "var", "usr/bin/gcc.sh", "bin", f"{PYTHON}/os.py"} <= set(tree)
        assert not {"usr/share/doc/gcc", "var/lib", f"{PYTHON}/test/test_os.py", f"{PYTHON}/__pycache__"} & set(tree) and tree["usr/bin/gcc.sh"].mode == 0o100755
        os.mkfifo(root / "etc/pipe")
        with pytest.raises(confbuild.ImageError, match="etc/pipe: neither a file nor a folder nor a link"):
            confbuild.scan_tree(str(root))
        (root / "etc/pipe").unlink()
        (root / ("d/" * 66)).mkdir(parents=True)
        with pytest.raises(confbuild.ImageError, match="lies deeper than 64 folders"):
            confbuild.scan_tree(str(root))


def verity_root(data: bytes, blocks: int) -> str:
    """The root hash, level by level, and that the levels are where the kernel looks for them."""
    level, at = data[:blocks * 4096], len(data)
    while True:
        level = b"".join(hashlib.sha256(level[i:i + 4096]).digest() for i in range(0, len(level), 4096))
        if len(level) == 32:
            assert at == blocks * 4096
            return level.hex()
        level += bytes(-len(level) % 4096)
        assert data[at - len(level):at] == level
        at -= len(level)


class TestSealing:
    def test_sealed(self) -> None:
        sealed = confbuild.seal_firmware(TOY_AMDSEV)
        assert confbuild.firmware_state(TOY_AMDSEV) == ADMITS and confbuild.firmware_state(sealed) == "" and len(sealed) == len(TOY_AMDSEV)
        volume, before = b"".join(confbuild.volume_blocks(sealed)), b"".join(confbuild.volume_blocks(TOY_AMDSEV))
        assert volume == before.replace(SHIM, "\u2603him\0".encode("utf-16-le")) and volume.count(b"\x03\x26h\0i\0m\0\0\0") == 2
        begin, end = confbuild.volume_place(TOY_AMDSEV)
        assert sealed[:begin] == TOY_AMDSEV[:begin] and sealed[end:] == TOY_AMDSEV[end:]
        assert struct.unpack_from("<Q", sealed, begin + 5)[0] == len(volume) and confbuild.seal_firmware(sealed) is sealed

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 5000])
    def test_small_dictionaries(self, size: int) -> None:
        """Which liblzma reads, and from 4096 on makes."""
        data = toy_volume(lzma_section(b"x" * 100 + SHIM + b"y" * 30000 + bytes(range(256)) * 10, properties=b"\x5d" + struct.pack("<I", size)))
        assert confbuild.firmware_state(data) == ADMITS and confbuild.firmware_state(confbuild.seal_firmware(data)) == ""

    @pytest.mark.parametrize(("data", "message"), [
        (TOY_FIRMWARE, "the firmware cannot be looked into: firmware volume: there is no compressed section"), (b"", "cannot be looked into"),
        (toy_volume(lzma_section(SHIM + random.Random(1).randbytes(3000), cut=500)), "cannot be looked into: firmware volume: its last"),
        (toy_volume(lzma_section(b"a"), lzma_section(SHIM)), "cannot be looked into: firmware volume: there is more than one")], ids=short_id)
    def test_not_looked_into(self, data: bytes, message: str) -> None:
        with pytest.raises(confbuild.ImageError, match=message):
            confbuild.seal_firmware(data)

    def test_no_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compress = lzma.compress
        monkeypatch.setattr(lzma, "compress", lambda *given, **named: compress(*given, **named) + bytes(5000))
        with pytest.raises(confbuild.ImageError, match=r"the firmware has no room for its volume without a shim: \d+ bytes, \d+ are there"):
            confbuild.seal_firmware(TOY_AMDSEV)

    def test_not_sealed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(confbuild, "firmware_state", lambda data: "it is odd")
        with pytest.raises(confbuild.ImageError, match="the firmware cannot be sealed: it is odd"):
            confbuild.seal_firmware(TOY_AMDSEV)

    def test_a_real_one(self) -> None:
        data = firmware_file("OVMF.amdsev.fd").read_bytes()
        sealed = confbuild.seal_firmware(data)
        assert confbuild.firmware_state(data) == ADMITS and confbuild.firmware_state(sealed) == "" and len(sealed) == len(data)


@pytest.mark.usefixtures("toy_python")
class TestImage:
    def make(self, tmp_path: Path, name: str = "image", root: Path | None = None, **given: Any) -> confbuild.Image:
        return confbuild.make_image(str(tmp_path / name), confbuild.ImageInput(str(root or toy_root(tmp_path / (name + "-root"))), **given))

    def test_image(self, tmp_path: Path) -> None:
        image = self.make(tmp_path)
        assert sorted(os.listdir(image.folder)) == ["firmware.fd", "image.json", "initrd", "tools.img", "vmlinuz"] and sorted(os.listdir(tmp_path)) == ["image", "image-root"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in Path(image.folder).iterdir()} == {0o644}
        text = (tmp_path / "image/image.json").read_bytes()
        document = json.loads(text)
        assert list(document) == ["version", "parts", "firmware_origin_sha256", "append", "confbuild_sha256", "packages", "launch_digests"]
        assert text == json.dumps(document, indent=2, ensure_ascii=False).encode() and list(document["parts"]) == ["firmware", "kernel", "initrd", "tools"]
        for part in document["parts"].values():
            data = (tmp_path / "image" / part["file"]).read_bytes()
            assert list(part) == ["file", "sha256", "size"] and part["sha256"] == hashlib.sha256(data).hexdigest() and part["size"] == len(data)
        assert document["confbuild_sha256"] == hashlib.sha256(FILE.read_bytes()).hexdigest() and document["packages"] == []
        assert document["firmware_origin_sha256"] == hashlib.sha256(TOY_AMDSEV).hexdigest() and image.manifest_sha256 == hashlib.sha256(text).hexdigest()
        tools = Path(image.tools).read_bytes()
        match = re.fullmatch(r"console=ttyS0 panic=-1 quiet rdinit=/init acpi=off confbuild\.tools=([0-9a-f]{64}),(\d+)", image.append)
        assert match and verity_root(tools, int(match[2])) == match[1] and Path(image.kernel).read_bytes() == bzimage()
        kernel, initrd = (hashlib.sha256(Path(path).read_bytes()).digest() for path in (image.kernel, image.initrd))
        boots = confbuild.boot_hashes(kernel, initrd, image.append)
        digest = confbuild.compute_launch_digest(confbuild.parse_firmware(Path(image.firmware).read_bytes()), boots, 1, 0x800F12).hex()
        assert image.launch_digests == [("EPYC-v4", 1, digest)] == [tuple(row.values()) for row in document["launch_digests"]]
        assert confbuild.check_image(image.folder) == (image.manifest_sha256, "", "", {"EPYC-v4, 1 vCPU": digest}) and confbuild.read_image(image.folder) == image

    def test_initrd(self, tmp_path: Path) -> None:
        """Python and what it needs, and nothing else; sources only of this file."""
        found = read_cpio(Path(self.make(tmp_path).initrd).read_bytes())
        lib, here = "usr/lib/x86_64-linux-gnu", "usr/lib/confbuild"
        base, snp_ = ("failover", "net_failover", "virtio_net", "virtio_blk", "dm_mod", "dm_bufio", "dm_verity"), ("gcm", "gf128mul", "tsm", "sev_guest")
        files = {name for name, node in found.items() if node[0] & 0o170000 in (0o100000, 0o120000)}
        assert files == {
            "init", "lib", "lib64", "usr/bin/python3", "usr/bin/python3.13", f"{lib}/libc.so.6", f"{lib}/libm.so.6", f"{lib}/libm.so.6.1", f"{lib}/libffi.so.8", f"{lib}/libgcc_s.so.1",
            f"{lib}/ld-linux-x86-64.so.2", "usr/lib64/ld-linux-x86-64.so.2", f"{PYTHON}/os.pyc", f"{PYTHON}/json/decoder.pyc", f"{PYTHON}/lib-dynload/_ctypes.so",
            f"{here}/confbuild.py", f"{here}/__pycache__/confbuild.cpython-313.pyc", f"{here}/modules", *(f"usr/lib/modules/{name}.ko" for name in base + snp_)}
        lines = found[f"{here}/modules"][1].decode().splitlines()
        assert lines == [f"base /usr/lib/modules/{name}.ko" for name in base] + [f"snp /usr/lib/modules/{name}.ko" for name in snp_]
        assert found["usr/lib/modules/dm_verity.ko"][1] == module_file("dm-bufio,dm-mod") and found[f"{here}/confbuild.py"][1] == FILE.read_bytes()
        assert found[f"{PYTHON}/os.pyc"][1] == b"compiled /usr/lib/python3.13/os.py " + hashlib.sha256(b"import x\n").digest()
        assert {name for name, node in found.items() if "/" not in name and node[0] == 0o40755} == {"dev", "proc", "run", "sys", "sysroot", "tmp", "usr"}
        assert [found[f"dev/{name}"] for name in ("console", "null", "urandom")] == [(0o20600, b"", (5, 1)), (0o20600, b"", (1, 3)), (0o20600, b"", (1, 9))]
        mode, init, _ = found["init"]
        assert mode == 0o100755 and init.startswith(b"#!/usr/bin/python3 -IS\n") and compile(init, "init", "exec")

    def test_init_never_ends(self, tmp_path: Path) -> None:
        """Whatever confbuild does, reboot is called; elsewhere than in a guest it is refused to a user that is nobody."""
        for body in ("def main(argv): print(argv)", "def main(argv): raise SystemExit(2)", "raise KeyboardInterrupt", "syntax error"):
            (tmp_path / "confbuild.py").write_text(body)
            stub = confbuild._INIT.decode().replace("/usr/lib/confbuild", str(tmp_path)).replace("ctypes.CDLL(None).reboot(0x01234567)", "print('reboot', 0x01234567)")
            done = subprocess.run([sys.executable, "-IS", "-B", "-c", stub], capture_output=True, text=True, check=False)
            assert done.stdout.endswith("reboot 19088743\n") and done.returncode == 0 and ("['guest']" in done.stdout or "init: " in done.stderr), done

    def test_tools(self, tmp_path: Path) -> None:
        """All that the root has, but the kernel, and nothing setuid."""
        root = toy_root(tmp_path / "root")
        found = read_erofs(Path(self.make(tmp_path, root=root).tools).read_bytes())
        assert found["usr/bin/gcc.sh"] == (0o100755, ROOT_FILES["usr/bin/gcc.sh"]) and found["usr/bin/python3"] == (0o120777, b"python3.13")
        assert found["etc/\udce9"][1] == b"no UTF-8" and found["etc/empty"] == (0o100644, b"") and found["usr/lib/confbuild/confbuild.py"][1] == FILE.read_bytes()
        assert {"dev", "proc", "sys", "tmp", "run", "root", "work", "usr/lib/confbuild/__pycache__/confbuild.cpython-313.pyc"} <= set(found)
        assert not [name for name in found if name.startswith(("boot", "usr/lib/modules", "var/", "usr/share/doc/"))]

    def test_same_bytes(self, tmp_path: Path) -> None:
        """Whatever the folder, the umask, the times and the order in which files were made."""
        before = os.umask(0o077)
        try:
            one = self.make(tmp_path, "one", toy_root(tmp_path / "a", backwards=True))
        finally:
            os.umask(before)
        (tmp_path / "deeper").mkdir()
        two = self.make(tmp_path, "deeper/two", toy_root(tmp_path / "deeper/b"))
        for name in os.listdir(one.folder):
            assert Path(one.folder, name).read_bytes() == Path(two.folder, name).read_bytes(), name
        assert one.manifest_sha256 == two.manifest_sha256

    def test_from_packages(self, tmp_path: Path) -> None:
        """A file of one package and one of another, and what they are called in image.json."""
        entries: list[TarEntry] = [(name, data if isinstance(data, bytes) else data.encode(), FILE_TYPE) for name, data in ROOT_FILES.items() if "\udce9" not in name and "etc/" not in name]
        links: list[TarEntry] = [(name, target, SYMLINK) for name, target in ROOT_LINKS.items()]
        (tmp_path / "debs").mkdir()
        lines = []
        for name, data in (("a", deb(*entries)), ("b", deb(*links))):
            (tmp_path / "debs" / name).write_bytes(data)
            lines.append(f"{name} 1:2.3-4 {hashlib.sha256(data).hexdigest()}\n")
        (tmp_path / "lock").write_text("".join(lines))
        image = confbuild.make_image(str(tmp_path / "image"), confbuild.ImageInput(lock=str(tmp_path / "lock"), debs=str(tmp_path / "debs")))
        packages = json.loads((tmp_path / "image/image.json").read_text())["packages"]
        assert packages == [{"name": line.split()[0], "version": "1:2.3-4", "sha256": line.split()[2]} for line in lines]
        assert read_erofs(Path(image.tools).read_bytes())["etc/hosts"][1] == b"127.0.0.1 localhost\n" and confbuild.check_image(image.folder).parts == ""

    def test_more_processors(self, tmp_path: Path) -> None:
        """They are found by ACPI only."""
        image = self.make(tmp_path, vcpus=[("EPYC-v4", 1), ("EPYC-Genoa", 2)])
        assert image.append.startswith("console=ttyS0 panic=-1 quiet rdinit=/init confbuild.tools=")
        assert [row[:2] for row in image.launch_digests] == [("EPYC-v4", 1), ("EPYC-Genoa", 2)] and list(confbuild.check_image(image.folder).launch_digests) == [
            "EPYC-v4, 1 vCPU", "EPYC-Genoa, 2 vCPUs"]

    def test_named_parts(self, tmp_path: Path) -> None:
        """A kernel, its modules and a firmware from elsewhere."""
        sealed = confbuild.seal_firmware(TOY_AMDSEV)
        write_files(tmp_path, {"k": bzimage("7.0"), "f": sealed, "m/x/virtio_net.ko": module_file(), **{f"m/{name}": data for name, data in MODULES.items() if "virtio_net" not in name}})
        root = toy_root(tmp_path / "root", {"boot/vmlinuz-6.1.0-toy": None, "usr/share/ovmf/OVMF.amdsev.fd": None})
        image = self.make(tmp_path, root=root, kernel=str(tmp_path / "k"), firmware=str(tmp_path / "f"), modules=str(tmp_path / "m"))
        assert Path(image.firmware).read_bytes() == sealed and Path(image.kernel).read_bytes() == bzimage("7.0")
        assert "usr/lib/modules/net_failover.ko" not in read_cpio(Path(image.initrd).read_bytes())

    @pytest.mark.parametrize(("changes", "links", "message"), [
        ({"usr/bin/python3.13": None}, {}, "the root file system has no usr/bin/python3"), ({}, {"usr/bin/python3": "/etc/loop"}, "the root file system has no usr/bin/python3"),
        ({"usr/bin/pypy": b""}, {"usr/bin/python3": "../../usr/./bin/pypy"}, "usr/bin/python3 is usr/bin/pypy, not a file usr/bin/python3.N"),
        ({"usr/bin/python3.13": b"#!"}, {}, "usr/bin/python3: ELF: not a file for x86-64"), ({"usr/bin/python3.13": elf(needed=["libc.so.6"])}, {}, "usr/bin/python3.13 is linked statically"),
        ({f"{PYTHON}/lib-dynload/_ctypes.so": elf(needed=["liby.so"])}, {}, f"no liby.so, which {PYTHON}/lib-dynload/_ctypes.so needs"),
        ({"usr/lib/x86_64-linux-gnu/libgcc_s.so.1": None}, {}, "no libgcc_s.so.1, which Python needs"), ({"boot/vmlinuz-6.1.0-toy": None}, {}, "has 0 kernels boot/vmlinuz-"),
        ({"boot/vmlinuz-7": b""}, {}, "has 2 kernels boot/vmlinuz-"), ({"boot/vmlinuz-6.1.0-toy": b"MZ"}, {}, "the kernel is no bzImage that says its version"),
        ({"boot/vmlinuz-6.1.0-toy": bzimage("")}, {}, "the kernel is no bzImage"), ({"boot/vmlinuz-6.1.0-toy": bzimage("9")}, {}, "has no modules of the kernel 9"),
        ({"usr/share/ovmf/OVMF.amdsev.fd": None}, {}, "the root file system has no usr/share/ovmf/OVMF.amdsev.fd"), ({"usr/share/ovmf/OVMF.amdsev.fd": b"x"}, {}, "firmware cannot be looked into"),
        ({"usr/share/ovmf/OVMF.amdsev.fd": lzma_section(b"x") + bytes(9000)}, {}, "no launch digest of EPYC-v4, 1 vCPU: firmware: "), ({"usr/lib/confbuild": b""}, {}, "usr/lib/confbuild is no folder"),
        ({"usr/lib/modules/6.1.0-toy/kernel/block/virtio_blk.ko": None}, {}, "the kernel has no module virtio_blk, which a guest needs"),
        ({"usr/lib/modules/6.1.0-toy/kernel/virt/tsm.ko": None}, {}, "the kernel has no module tsm, which sev_guest needs"),
        ({"usr/lib/modules/6.1.0-toy/modules.builtin": None}, {}, "the kernel has no module erofs, which a guest needs"),
        ({"usr/lib/modules/6.1.0-toy/kernel/block/virtio_blk.ko": None, "usr/lib/modules/6.1.0-toy/kernel/block/virtio_blk.ko.zst": b"(\xb5/\xfd"}, {}, "virtio_blk.ko.zst: neither a module nor one that"),
        ({"usr/lib/modules/6.1.0-toy/kernel/md/dm-verity.ko.xz": b"x"}, {}, "dm-verity.ko.xz: Input format not supported"),
        ({"usr/lib/modules/6.1.0-toy/kernel/md/dm-verity.ko.xz": MODULES["md/dm-verity.ko.xz"][:-9]}, {}, "dm-verity.ko.xz: cut off, or more than 67108864 bytes")])
    def test_what_makes_no_image(self, tmp_path: Path, changes: Mapping[str, bytes | None], links: Mapping[str, str], message: str) -> None:
        """And nothing is left of the attempt."""
        root = toy_root(tmp_path / "root", changes, links)
        with pytest.raises(confbuild.ImageError, match=re.escape(message)):
            self.make(tmp_path, root=root)
        assert os.listdir(tmp_path) == ["root"]

    def test_its_python_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = toy_root(tmp_path / "root")
        monkeypatch.setattr(confbuild, "capture", lambda *_: (1, b"", "one\ntwo"))
        with pytest.raises(confbuild.ImageError, match="the root file system's Python does not run: two"):
            self.make(tmp_path, root=root)
        monkeypatch.undo()
        with pytest.raises(confbuild.ImageError, match=r"ld-linux-x86-64\.so\.2 cannot be run here: "):
            self.make(tmp_path, root=root)

    def test_large_modules(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(confbuild, "MAX_MODULE", len(module_file("dm-bufio,dm-mod")) - 1)
        with pytest.raises(confbuild.ImageError, match=r"dm-verity\.ko\.xz: cut off, or more than 54 bytes"):
            self.make(tmp_path)

    @pytest.mark.parametrize(("count", "message"), [
        (53, "the kernel has no module m53, which m52 needs"), (54, "a guest would need more than 64 modules"), (2000, "a guest would need more than 64 modules")])
    def test_many_modules(self, tmp_path: Path, count: int, message: str) -> None:
        """A chain of them is no deep recursion. Eleven are loaded before it, and its last is missing."""
        chain = {f"usr/lib/modules/6.1.0-toy/kernel/virt/m{i}.ko": module_file(f"m{i + 1}") for i in range(count)}
        root = toy_root(tmp_path / "root", {**chain, "usr/lib/modules/6.1.0-toy/kernel/virt/tsm.ko": module_file("m0")})
        with pytest.raises(confbuild.ImageError, match=message):
            self.make(tmp_path, root=root)

    def test_other_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        with pytest.raises(confbuild.ImageError, match="there exists"):
            confbuild.make_image(str(tmp_path / "there"), confbuild.ImageInput())
        with pytest.raises(confbuild.ImageError, match="65 launch digests are asked for, more than 64"):
            confbuild.make_image(str(tmp_path / "new"), confbuild.ImageInput(vcpus=[("EPYC", 1)] * 65))
        root = toy_root(tmp_path / "root")
        with pytest.raises(confbuild.ImageError, match="'host' is no vCPU type with a known signature: EPYC, EPYC-"):
            self.make(tmp_path, root=root, vcpus=[("host", 1)])
        with pytest.raises(confbuild.ImageError, match="no launch digest of EPYC, 9999 vCPUs: launch digest: there is none of 9999 vCPUs"):
            self.make(tmp_path, root=root, vcpus=[("EPYC", 9999)])
        with pytest.raises(confbuild.ImageError, match=f"more than {confbuild.MAX_FIRMWARE} bytes"):
            (tmp_path / "f").write_bytes(bytes(confbuild.MAX_FIRMWARE + 1))
            self.make(tmp_path, root=root, firmware=str(tmp_path / "f"))

    @pytest.mark.parametrize(("part", "words"), [
        ("firmware.fd", "firmware is not the one of image.json; the launch digest of EPYC-v4, 1 vCPU is another"), ("vmlinuz", "kernel is not the one of image.json; the launch digest"),
        ("initrd", "initrd is not the one of image.json; the launch digest"), ("tools.img", "tools is not the one of image.json; the command line has not the root hash of tools")])
    def test_damaged_parts(self, tmp_path: Path, part: str, words: str) -> None:
        """A bit, and a missing byte."""
        image = self.make(tmp_path)
        path = Path(image.folder, part)
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes((data[4] ^ 1,)) + data[5:])
        facts = confbuild.check_image(image.folder)
        assert facts.parts.startswith(words) and facts.manifest_sha256 == image.manifest_sha256
        assert (facts.launch_digests["EPYC-v4, 1 vCPU"] == image.launch_digests[0][2]) == (part == "tools.img")
        path.write_bytes(data[:-1])
        assert f"{words.partition(' ')[0]} has another size" in confbuild.check_image(image.folder).parts
        path.unlink()
        for attempt in (confbuild.check_image, confbuild.read_image):
            with pytest.raises(confbuild.ImageError, match=f"{part} is missing"):
                attempt(image.folder)
        path.symlink_to("/dev/zero")
        with pytest.raises(confbuild.ImageError, match=f"{part}: not a regular file"):
            confbuild.read_image(image.folder)

    def test_another_disk(self, tmp_path: Path) -> None:
        """image.json fits together, but the machine takes another disk than the one that lies there; or a firmware with a shim."""
        image = self.make(tmp_path)
        manifest = Path(image.folder, "image.json")
        document = json.loads(manifest.read_text())
        other = re.sub("tools=.{8}", "tools=00000000", image.append)
        for append in (other, image.append + "9", image.append[:-1], "quiet", image.append.replace(" confbuild", "confbuild"), image.append.partition(",")[0] + ",1"):
            manifest.write_text(json.dumps({**document, "append": append, "launch_digests": []}))
            assert confbuild.check_image(image.folder).parts == "the command line has not the root hash of tools", append
        manifest.write_text(json.dumps({**document, "launch_digests": [{"vcpu_type": "host", "vcpus": 0, "launch_digest": "00" * 48}]}))
        assert "'host' is no vCPU type" in confbuild.check_image(image.folder).parts
        Path(image.firmware).write_bytes(TOY_AMDSEV)
        facts = confbuild.check_image(image.folder)
        assert facts.firmware == ADMITS and "firmware is not the one" in facts.parts and facts.launch_digests == {}

    @pytest.mark.parametrize(("change", "message"), [
        ({"version": 2}, "its version is not 1"), ({"version": True}, "its version is not 1"), ({"more": 1}, "not an object of version, parts"), ({"parts": []}, "image.json: parts: not an object of"),
        ({"parts.kernel": 1}, "a part: not an object of file, sha256, size"), ({"parts.kernel.file": "../vmlinuz"}, "a part is no plain file name"), ({"parts.kernel.file": "a/b"}, "plain file name"),
        ({"parts.kernel.file": ".."}, "plain file name"), ({"parts.kernel.file": 1}, "plain file name"), ({"parts.tools.sha256": "0" * 63}, "a part has no SHA-256"), ({"parts.tools.size": True}, "or no size"),
        ({"append": 1}, "append is not at most 2047 printable"), ({"append": "a\nb"}, "append is not at most 2047"), ({"append": "\u00e9"}, "append is not"), ({"append": "x" * 2048}, "append is not"),
        ({"firmware_origin_sha256": ""}, "a SHA-256 is none"), ({"confbuild_sha256": "A" * 64}, "a SHA-256 is none"), ({"packages": {}}, "packages is no list"), ({"launch_digests": 1}, "launch_digests is no list"),
        ({"packages": [1]}, "a package: not an object of name"), ({"packages": [{"name": 1, "version": "", "sha256": "0" * 64}]}, "a package is none"),
        ({"launch_digests": [{}]}, "a launch digest: not an object of vcpu_type"), ({"launch_digests": [{"vcpu_type": "EPYC", "vcpus": "1", "launch_digest": "0" * 96}]}, "a launch digest is none"),
        ({"launch_digests": [{"vcpu_type": "EPYC", "vcpus": 1, "launch_digest": "0" * 96}] * 65}, "more than 64 launch digests")])
    def test_bad_manifests(self, tmp_path: Path, change: Mapping[str, Any], message: str) -> None:
        digest = {"file": "x", "sha256": "0" * 64, "size": 1}
        document: dict[str, Any] = {"version": 1, "parts": {part: dict(digest) for part in ("firmware", "kernel", "initrd", "tools")}, "firmware_origin_sha256": "0" * 64, "append": "",
                                    "confbuild_sha256": "0" * 64, "packages": [], "launch_digests": []}
        (tmp_path / "x").write_bytes(b"")
        (tmp_path / "image.json").write_text(json.dumps(document))
        assert confbuild.read_image(str(tmp_path)).kernel == str(tmp_path / "x")
        for path, value in change.items():
            *folders, last = path.split(".")
            place = document
            for folder in folders:
                place = place[folder]
            place[last] = value
        (tmp_path / "image.json").write_text(json.dumps(document))
        with pytest.raises(confbuild.ImageError, match=re.escape(message)):
            confbuild.read_image(str(tmp_path))

    def test_no_manifest(self, tmp_path: Path) -> None:
        for data, message in ((None, "no image.json in it"), (b"{", "image.json: not JSON"), (b"x" * (confbuild.MAX_JSON + 1), "image.json: more than 4194304 bytes")):
            if data is not None:
                (tmp_path / "image.json").write_bytes(data)
            with pytest.raises(confbuild.ImageError, match=message):
                confbuild.check_image(str(tmp_path))


def test_a_real_python(tmp_path: Path) -> None:
    """The Python that runs this makes the .pyc files of an image of itself, twice the same."""
    program = os.path.realpath(sys.executable)
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False) if sys.platform == "linux" and shutil.which("ldd") else None
    if listed is None or listed.returncode or "libc.so.6" not in listed.stdout or "ld-linux-x86-64" not in listed.stdout:
        pytest.skip("this Python is not one for glibc on x86-64")
    version = "{}.{}".format(*sys.version_info)
    loaded = json.loads(subprocess.run([program, "-IS", "-c", "import json, py_compile, sys; print(json.dumps([(n, getattr(m, '__file__', None)) for n, m in sys.modules.items()]))"],
                                       capture_output=True, text=True, check=True).stdout)
    library = os.path.dirname(os.__file__)
    # By their names too: collections.abc, for one, has replaced itself by another module.
    files = {path for name, file in loaded for path in (file, *(os.path.join(library, name.replace(".", "/") + end) for end in (".py", "/__init__.py"))) if path and os.path.isfile(path)}
    root = toy_root(tmp_path / "root", {name: None for name in ROOT_FILES if name.startswith(("usr/lib/python", "usr/bin/python", "usr/lib/x86_64-linux-gnu/"))}, {"usr/bin/python3": f"python{version}"})
    copies = {f"usr/lib/python{version}/{os.path.relpath(path, library)}": path for path in files if path.startswith(library)}
    copies.update({f"usr/lib/x86_64-linux-gnu/{os.path.basename(path)}": path for path in re.findall(r"(?:=> |^\s+)(/.+) \(0x", listed.stdout, re.MULTILINE) if "ld-linux" not in path})
    copies.update({"usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": "/lib64/ld-linux-x86-64.so.2", f"usr/bin/python{version}": program})
    for name, path in copies.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / name)
    if not (root / "usr/lib/x86_64-linux-gnu/libgcc_s.so.1").exists():
        (root / "usr/lib/x86_64-linux-gnu/libgcc_s.so.1").write_bytes(elf())
    found = [read_cpio(Path(confbuild.make_image(str(tmp_path / name), confbuild.ImageInput(str(root))).initrd).read_bytes()) for name in ("one", "two")]
    assert found[0] == found[1]
    code = found[0][f"usr/lib/confbuild/__pycache__/confbuild.cpython-{version.replace('.', '')}.pyc"][1]
    assert code[:8] == importlib.util.MAGIC_NUMBER + b"\1\0\0\0" and marshal.loads(code[16:]).co_filename == "/usr/lib/confbuild/confbuild.py"
    assert f"usr/lib/python{version}/json/decoder.pyc" in found[0] and f"usr/lib/python{version}/json/decoder.py" not in found[0]

# endregion 19
# ==============================================================================
# region 20. Event log
# ==============================================================================


def sent(payloads: confbuild.Payloads) -> list[str]:
    """The JSON texts that payloads stands for."""
    return [payloads.before + part + payloads.after for part in payloads.parts]


def frames(texts: list[str], first: int = 1) -> list[bytes]:
    """The frames of CONTRACT 1, written independently: id, data, an empty line."""
    return [f"id: {n}\ndata: {text}\n\n".encode() for n, text in enumerate(texts, first)]


def filled(path: Path, count: int, size: int = 0) -> tuple[confbuild.EventLog, list[bytes]]:
    """A log of count build lines of about size bytes, and its frames."""
    log = confbuild.EventLog(str(path))
    payloads = confbuild.to_payloads("build", [f"{n} " + "x" * size for n in range(count)])
    log.append(payloads)
    return log, frames(sent(payloads))


COMPLETE_EVENT = confbuild.to_payload({"type": "complete", "result": {"status": "ok"}})


class TestEventLog:
    def test_known_bytes(self, tmp_path: Path) -> None:
        """Source: the example in CONTRACT.md, section 1."""
        log = confbuild.EventLog(str(tmp_path / "log"))
        log.append(confbuild.to_payload({"type": "queued", "position": 0}))
        log.append(confbuild.to_payloads("detect", ["cargo"]))
        log.append(confbuild.to_payloads("build", ["a\tb", "é\"\\\x7f"]))
        log.append(confbuild.to_payloads("build", []))
        assert (tmp_path / "log").read_bytes() == (
            b'id: 1\ndata: {"type":"queued","position":0}\n\nid: 2\ndata: {"type":"detect","msg":"cargo"}\n\n'
            b'id: 3\ndata: {"type":"build","msg":"a\\tb"}\n\nid: 4\ndata: {"type":"build","msg":"\\u00e9\\"\\\\\\u007f"}\n\n')
        assert (log.count, log.finished, log.last()) == (4, False, {"type": "build", "msg": "é\"\\\x7f"})

    @given(st.sampled_from(confbuild.PHASES), st.lists(st.text()), st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126)), min_size=1))
    def test_payloads(self, phase: str, texts: list[str], plain: list[str]) -> None:
        for messages in (texts, plain, [text.replace('"', "").replace("\\", "") for text in plain]):
            payloads = confbuild.to_payloads(phase, messages)
            assert sent(payloads) == [confbuild.compact_json({"type": phase, "msg": message}) for message in messages]
        assert payloads.before.endswith(':"')  # the quick path

    @settings(max_examples=25)
    @given(st.lists(st.tuples(st.integers(1, 150), st.integers(0, 400), st.booleans()), max_size=6))
    def test_offsets(self, appends: list[tuple[int, int, bool]]) -> None:
        """Offsets are those of the bytes, whatever was appended at once, also by the next process."""
        with tempfile.TemporaryDirectory() as folder:
            told: list[int] = []
            path, naive = f"{folder}/log", [0]
            log = confbuild.EventLog(path, lambda log: told.append(log.count))
            for number, size, reopen in appends:
                payloads = confbuild.to_payloads("build", ["y" * (size * n % 401) + "é" * (n % 2) for n in range(number)])
                for frame in frames(sent(payloads), len(naive)):
                    naive.append(naive[-1] + len(frame))
                log.append(payloads)
                if reopen:
                    log = confbuild.EventLog(path, lambda log: told.append(log.count))
                assert (log.size, log.count, told[-1]) == (naive[-1], len(naive) - 1, log.count)
                assert [log.offset_of(n) for n in range(log.count + 2)] == [*naive, naive[-1]]
            assert len(told) == len(appends)

    @pytest.mark.parametrize("count", [1, 2, 64, 65, 129])
    def test_torn(self, tmp_path: Path, count: int) -> None:
        """Whatever is missing of the last frame, the others are there, and the log goes on after them."""
        _, whole = filled(tmp_path / "log", count)
        for cut in range(len(whole[-1])):
            (tmp_path / "log").write_bytes(b"".join(whole)[:-len(whole[-1])] + whole[-1][:cut])
            log = confbuild.EventLog(str(tmp_path / "log"))
            assert (log.count, log.size, log.finished) == (count - 1, sum(map(len, whole[:-1])), False)
            log.append(COMPLETE_EVENT)
            assert (tmp_path / "log").read_bytes() == b"".join(whole[:-1]) + frames(sent(COMPLETE_EVENT), count)[0]
            assert confbuild.EventLog(str(tmp_path / "log")).finished

    @pytest.mark.parametrize("data", [b"hello", b"hello\n\n", b"id: 2\ndata: {}\n\n", b"\n\n", b"id: 1\nretry: 5\n\n", b"id: 11\ndata: {}\n\n", b"x" * 9_000_000])
    def test_garbage(self, tmp_path: Path, data: bytes) -> None:
        """What is not a log is refused, and stays as it is."""
        (tmp_path / "log").write_bytes(data)
        with pytest.raises(confbuild.Malformed, match=r"events: (the last frame is damaged|no frame begins in the last \d+ bytes)"):
            confbuild.EventLog(str(tmp_path / "log"))
        assert (tmp_path / "log").read_bytes() == data

    @pytest.mark.parametrize("lost", [1, 2, 30, 64, 65, 66, 128, 129, 130, 200])
    def test_damaged(self, tmp_path: Path, lost: int) -> None:
        """A frame whose bytes a crashed machine has lost, which are then zero, ends the log before it."""
        _, whole = filled(tmp_path / "log", 200)
        whole[lost - 1] = bytes(len(whole[lost - 1]))
        (tmp_path / "log").write_bytes(b"".join(whole))
        log = confbuild.EventLog(str(tmp_path / "log"))
        assert (log.count, log.size) == (lost - 1, sum(map(len, whole[:lost - 1])))

    def test_failed_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk that fills up in the middle of an append: nothing was emitted, nobody was told."""
        told: list[int] = []
        log = confbuild.EventLog(str(tmp_path / "log"), lambda log: told.append(log.count))
        log.append(confbuild.to_payloads("build", ["first"]))
        before, pwrite, calls = (tmp_path / "log").read_bytes(), os.pwrite, []

        def full(fd: int, data: memoryview, offset: int) -> int:
            calls.append(offset)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
            return pwrite(fd, data[:1000], offset)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            log.append(confbuild.to_payloads("build", ["z" * 90] * 100))
        monkeypatch.undo()
        assert (log.count, log.size, told, (tmp_path / "log").read_bytes(), len(calls)) == (1, len(before), [1], before, 3)
        log.append(COMPLETE_EVENT)
        assert (tmp_path / "log").read_bytes() == before + frames(sent(COMPLETE_EVENT), 2)[0]

    def test_complete(self, tmp_path: Path) -> None:
        """Only a real `complete` finishes a log; nothing comes after it."""
        log = confbuild.EventLog(str(tmp_path / "log"))
        log.append(confbuild.to_payloads("build", ['{"type":"complete",', '\ndata: {"type":"complete",']))
        assert not log.finished and not confbuild.EventLog(str(tmp_path / "log")).finished
        log.append(COMPLETE_EVENT)
        for one in (log, confbuild.EventLog(str(tmp_path / "log"))):
            assert one.finished and one.last()["result"] == {"status": "ok"}
            with pytest.raises(ValueError, match="the log is complete"):
                one.append(COMPLETE_EVENT)

# endregion 20
# ==============================================================================
# region 21. Event streams
# ==============================================================================


def dechunk(data: bytes) -> bytes:
    """The content of a chunked body [RFC9112 7.1] which must have ended properly."""
    out, at = b"", 0
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        out, at = out + data[end + 2:end + 2 + size], end + 2 + size
        assert data[at:at + 2] == b"\r\n"
        if size == 0:
            assert at + 2 == len(data)
            return out
        at += 2


def read_all(sock: socket.socket, seconds: float = 30) -> bytes:
    """Everything to the end."""
    sock.settimeout(seconds)
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def keep(bodies: dict[int, bytes], n: int, sock: socket.socket) -> None:
    """For a thread: what sock gives."""
    bodies[n] = read_all(sock)


class Desk:
    """A streamer with one log and the sockets of its watchers."""

    def __init__(self, path: Path, **options: float) -> None:
        self.streamer = confbuild.Streamer(**options)
        self.path = path
        self.log = confbuild.EventLog(str(path), self.streamer.grown)
        self.ends: list[socket.socket] = []

    def watch(self, start: int = 0, chunked: bool = True, kind: str = "tcp", rcvbuf: int = 0) -> tuple[socket.socket, confbuild.Watcher]:
        if kind == "pair":
            ours, theirs = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                ours = socket.socket()
                if rcvbuf:
                    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
                ours.connect(listener.getsockname())
                theirs = listener.accept()[0]
        watcher = confbuild.Watcher(theirs, self.log, start, chunked, False, b"")
        self.streamer.add(watcher)
        self.ends.append(ours)
        return ours, watcher

    def append(self, *lines: str) -> None:
        self.log.append(confbuild.to_payloads("build", lines))

    def finish(self) -> bytes:
        """The bytes of the log, which is complete now."""
        self.log.append(COMPLETE_EVENT)
        return self.path.read_bytes()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(**keywords: Any) -> Desk:
        made.append(Desk(tmp_path / f"log{len(made)}", **keywords))
        return made[-1]

    yield make
    for one in made:
        one.streamer.stop()
        for sock in one.ends:
            sock.close()


class TestStreamer:
    @pytest.mark.parametrize("chunked", [True, False])
    @pytest.mark.parametrize(("kind", "size"), [("tcp", 5), ("pair", 5), ("tcp", 60_000), ("pair", 60_000)])
    def test_replay_then_live(self, desk: Callable[..., Desk], chunked: bool, kind: str, size: int) -> None:
        """The same bytes whether they were there or come, little ones and some MiB of them."""
        d = desk()
        d.append(*(f"{n}" * size for n in range(9)))
        sock, watcher = d.watch(2, chunked, kind)
        wait_for(lambda: sock.recv(1, socket.MSG_PEEK))
        d.append(*("live" * size for _ in range(70)))
        data, got = d.finish(), read_all(sock)
        assert (dechunk(got) if chunked else got) == data[d.log.offset_of(2):]
        assert wait_for(lambda: watcher.sock.fileno() == -1) and d.streamer.files == 0

    def test_slow_reader(self, desk: Callable[..., Desk]) -> None:
        """One who does not read holds up neither the appender nor others, and gets all in the end."""
        d = desk()
        slow = [d.watch(rcvbuf=4096, chunked=chunked)[0] for chunked in (True, False)]
        fast, _ = d.watch()
        for _ in range(40):
            d.append(*["s" * 4000] * 64)
        data = d.finish()
        assert dechunk(read_all(fast)) == data and d.streamer.files == 2
        assert dechunk(read_all(slow[0])) == data == read_all(slow[1])

    def test_keepalive_and_departures(self, desk: Callable[..., Desk]) -> None:
        """Silence is broken by comments, which also find out who has gone; one who only says no more is served on."""
        d = desk(keepalive_s=0.2)
        d.append("one")
        (stays, _), (closed, closing), (reset, resetting), (half, _) = (d.watch(start) for start in (0, 0, 1, 1))
        d.append("two")
        for sock in (stays, closed, reset, half):
            sock.settimeout(10)
            assert sock.recv(1, socket.MSG_PEEK)
        closed.close()
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        half.shutdown(socket.SHUT_WR)
        wait_for(lambda: closing.sock.fileno() == resetting.sock.fileno() == -1)
        assert d.streamer.files == 2
        got = b""
        while got.count(b": keepalive\n\n") < 2:
            got += stays.recv(4096)
        data = d.finish()
        assert dechunk(got + read_all(stays)).replace(b": keepalive\n\n", b"") == data
        assert dechunk(read_all(half)).replace(b": keepalive\n\n", b"") == data[d.log.offset_of(1):]

    def test_stalled_reader(self, desk: Callable[..., Desk], tmp_path: Path) -> None:
        """One who takes nothing is disconnected after a while, of a log as of a file, and can resume; one who waits for events is not."""
        d = desk(stall_s=0.2)
        d.append(*["s" * 500] * 20_000)
        waits, waiting = d.watch(20_000)
        (whole, _), _ = stuck = [d.watch(0, chunked, rcvbuf=4096) for chunked in (False, True)]
        (tmp_path / "file").write_bytes(bytes(9 << 20))
        ours, theirs = socket.socketpair()
        d.ends.append(ours)
        d.streamer.add(confbuild.Watcher(theirs, None, 0, False, False, b"", confbuild.OpenFile(str(tmp_path / "file")), (1, 8 << 20), lambda: None))
        wait_for(lambda: theirs.fileno() == -1 and all(watcher.sock.fileno() == -1 for _, watcher in stuck))
        assert waiting.sock.fileno() >= 0
        wait_for(lambda: d.streamer.files == 1)
        got = b""
        with contextlib.suppress(ConnectionError):
            for block in iter(lambda: whole.recv(1 << 20), b""):
                got += block
        data = d.finish()
        resumed, _ = d.watch(got.count(b"\n\n"), False)
        assert b"".join(got.rpartition(b"\n\n")[:2]) + read_all(resumed) == data and len(got) < len(data)
        assert dechunk(read_all(waits)) == data[d.log.offset_of(20_000):]

    def test_download(self, desk: Callable[..., Desk], tmp_path: Path) -> None:
        """A range of a file; then the socket belongs to somebody else, with what its client has sent meanwhile. A file that shrinks ends it."""
        d, data = desk(), random.Random(1).randbytes(3 << 20)
        (tmp_path / "file").write_bytes(data)
        file = confbuild.OpenFile(str(tmp_path / "file"))
        (tmp_path / "file").unlink()  # whoever has it open still gets it
        for span in ((0, len(data)), (5, 1), (1 << 20, 2 << 20), (7, 0)):
            ours, theirs = socket.socketpair()
            ours.sendall(b"the next request")
            done = threading.Event()
            watcher = confbuild.Watcher(theirs, None, 0, False, False, b"head", file, span, done.set)
            d.streamer.add(watcher)
            ours.settimeout(20)
            got = b""
            while len(got) < 4 + span[1]:
                got += ours.recv(1 << 20)
            assert done.wait(20) and got == b"head" + data[span[0]:][:span[1]] and theirs.recv(99) == b"the next request" and d.streamer.files == 0
            ours.close()
            theirs.close()
        ours, theirs = socket.socketpair()
        d.streamer.add(confbuild.Watcher(theirs, None, 0, False, False, b"", file, (len(data) - 1, 2), lambda: None))
        assert read_all(ours) == data[-1:]
        ours.close()

    def test_beyond_the_end(self, desk: Callable[..., Desk]) -> None:
        d = desk()
        d.append("a", "b", "c")
        sock, _ = d.watch(10)
        probe, _ = d.watch(3)  # served after it: when this one has the event, the other one has been looked at
        d.append(*"defghij")
        probe.settimeout(10)
        assert probe.recv(1)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        d.append("k", "l")
        sock.setblocking(True)
        data = d.finish()
        assert dechunk(read_all(sock)) == data[d.log.offset_of(10):]
        late, _ = d.watch(99)
        assert dechunk(read_all(late)) == b""

    def test_stop(self, desk: Callable[..., Desk]) -> None:
        """The idle, the one in the middle of much, and the one who waits for what never came: all are closed."""
        d = desk()
        d.append(*["m" * 9000] * 500)
        socks = [d.watch(500)[0], d.watch(0, rcvbuf=4096)[0], d.watch(900)[0]]
        wait_for(lambda: d.streamer.files == 3 and socks[1].recv(1, socket.MSG_PEEK))
        d.streamer.stop()
        assert d.streamer.files == 0 and read_all(socks[0]) == read_all(socks[2]) == b""
        assert len(read_all(socks[1])) < d.log.size

    def test_random_readers(self, desk: Callable[..., Desk]) -> None:
        """Readers come at any time and begin anywhere; each gets the bytes from its start, and nothing else."""
        for seed in range(8):
            rng, d = random.Random(seed), desk()
            readers: list[tuple[int, bool, socket.socket]] = []
            for _ in range(12):
                for _ in range(rng.randrange(3)):
                    start, chunked = rng.randrange(d.log.count + 40), rng.random() < 0.5
                    readers.append((start, chunked, d.watch(start, chunked, rng.choice(("tcp", "pair")), rng.choice((0, 4096)))[0]))
                d.append(*("r" * rng.choice((0, 10, 1000, 50_000)) for _ in range(rng.randrange(80))))
            bodies: dict[int, bytes] = {}
            threads = [threading.Thread(target=keep, args=(bodies, n, sock)) for n, (_, _, sock) in enumerate(readers)]
            for thread in threads:
                thread.start()
            data = d.finish()
            for n, (start, chunked, _) in enumerate(readers):
                threads[n].join(PATIENCE)
                assert (dechunk(bodies[n]) if chunked else bodies[n]) == data[d.log.offset_of(start):], (seed, n)

# endregion 21
# ==============================================================================
# region 22. Jobs
# ==============================================================================


def living(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gated(gate: Path, then: str = QUICK) -> str:
    """A build.sh that waits for a file."""
    return f"echo waiting; while [ ! -e {gate} ]; do sleep 0.02; done\n{then}"


def until(server: Server, job: str, kind: str = "build") -> dict[str, Any]:
    """The first event of a kind, as soon as it is there."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request("GET", f"/build/{job}/events")
        answer = connection.getresponse()
        while line := answer.readline():
            if line.startswith(b"data: ") and (event := json.loads(line[6:]))["type"] == kind:
                return dict(event)
        raise AssertionError(f"no {kind}")
    finally:
        connection.close()


class Follower(threading.Thread):
    """A client that resumes with from=N whenever the connection is lost, to the end."""

    def __init__(self, server: Server, job: str) -> None:
        super().__init__(daemon=True)
        self.server, self.job, self.frames, self.losses = server, job, list[bytes](), 0

    def run(self) -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
            try:
                connection.request("GET", f"/build/{self.job}/events?from={len(self.frames)}")
                answer = connection.getresponse()
                if answer.status == 204:
                    return
                frame = b""
                while line := answer.readline():
                    frame += line
                    if line == b"\n":
                        self.frames += [frame] if frame.startswith(b"id: ") else []
                        frame = b""
            except (OSError, http.client.HTTPException):
                self.losses += 1
                time.sleep(0.02)  # the server is away
            finally:
                connection.close()


def has_finished(log: confbuild.EventLog) -> Callable[[], bool]:
    """For wait_for: whether log has its `complete`."""
    return lambda: log.finished


class TestJobs:
    def test_example_stream(self, server: Callable[..., Server]) -> None:
        """Source: the example of the public documentation, in CONTRACT.md; and what it says of from, HEAD and the end."""
        s = server()
        job = s.submit(project("echo one; echo two >&2; echo 'some data: x'\n" + QUICK))
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", job)
        url = f"/build/{job}/events"
        status, headers, body = s.request("GET", url)
        comment, _, stream = body.decode("ascii").partition("\n\n")
        assert status == 200 and re.match(r": .*simulated", comment) and "\r" not in stream
        assert {name: headers[name] for name in ("Content-Type", "Cache-Control", "X-Accel-Buffering", "Content-Encoding")} == {
            "Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no", "Content-Encoding": None}
        texts = ['{"type":"queued","position":0}', '{"type":"detect","msg":"cargo"}', '{"type":"init","msg":"Verifying build inputs"}',
                 '{"type":"build","msg":"one"}', '{"type":"build","msg":"two"}', '{"type":"build","msg":"some data: x"}',
                 '{"type":"provenance","msg":"Generating provenance"}',
                 '{"type":"attest","msg":"Generating attestation"}', '{"type":"complete","result":{"status":"ok"}}']
        lines = stream.split("\n\n")[:-1]
        assert [line for line in lines if '"type":"vm"' not in line] == [line for line in lines if line.partition("data: ")[2] in texts]
        assert [text for text in (line.partition("data: ")[2] for line in lines) if '"type":"vm"' not in text] == texts
        assert [line.partition("\n")[0] for line in lines] == [f"id: {n}" for n in range(1, len(lines) + 1)]
        for n in range(len(lines)):
            for path, more in ((f"{url}?from={n}", {}), (url, {"Last_Event_ID": str(n)}), (f"{url}?from={n}", {"Last_Event_ID": "3"})):
                got = s.request("GET", path, **more)[2].decode()
                assert got == comment + "\n\n" + "".join(line + "\n\n" for line in lines[n:])
        for path, more in ((f"{url}?from={len(lines)}", {}), (f"{url}?from=999", {}), (url, {"Last_Event_ID": str(len(lines))})):
            assert s.request("GET", path, **more)[::2] == (204, b"") == s.request("HEAD", path, **more)[::2]
        for bad in ("-1", "x", "", "1.5", "%D9%A1", "1" * 19):
            status, headers, body = s.request("GET", f"{url}?from={bad}")
            assert (status, json.loads(body)["error_type"]) == (400, "InvalidFrom"), bad

    def test_failures(self, server: Callable[..., Server]) -> None:
        """Each error_type that a build can bring about, end to end; a slot outlives them all."""
        s = server("--slots", "2", "--build-timeout", "2")
        depth = "a/" * 70 + "x"
        bad = base64.b64encode(b"\x1f\x8b\x08 and no more").decode()
        lock = LOCK + '\n[[package]]\nname = "lost"\nversion = "1.0.0"\n'
        table: list[tuple[str, str, Any, dict[str, str]]] = [
            ("BuildError", "ended with status 3: error[E0425]: no value", project("echo 'error[E0425]: no value'; exit 3"), {}),
            ("BuildError", "ended with signal 9", project("kill -9 $$"), {}),
            ("UnsupportedToolchainError", "", {"README": "hello"}, {}),
            ("SourceError", "damaged", None, {"source_data": bad}),
            ("LimitError", "deeper than 64", {depth: "x"}, {}),
            ("TimeoutError", "the build took longer than 2 s", project("sleep 60"), {}),
            ("NoArtifacts", "no executable", project("true"), {}),
            ("ProvenanceError", "lost 1.0.0", {**project(), "Cargo.lock": lock}, {}),
        ]
        jobs = [s.submit(files, **fields) for _, _, files, fields in table]
        for (error_type, fragment, _, _), job in zip(table, jobs, strict=True):
            event = s.events(job)[-1]
            assert (event["type"], list(event["result"])) == ("complete", ["status", "error", "error_type"])
            assert (event["result"]["status"], event["result"]["error_type"]) == ("failed", error_type), event
            assert fragment in event["result"]["error"] and "\n" not in event["result"]["error"], event
            status, _, body = s.request("GET", f"/build/{job}/result")
            assert (status, json.loads(body)["error_type"]) == (404, "BuildFailed")
            assert s.status(job).items() >= {"status": "failed", "error_type": error_type, "error": event["result"]["error"]}.items()
        assert s.events(s.submit())[-1]["result"] == {"status": "ok"}
        assert "Traceback" not in s.stop()

    def test_boot_timeout(self, server: Callable[..., Server]) -> None:
        s = server("--boot-timeout", "0.001")
        assert s.events(s.submit())[-1]["result"] == {"status": "failed", "error": "the VM did not boot within 0.001 s", "error_type": "VmError"}

    def test_order(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """First in, first out; each waiting job hears of its place on entry and on every change, also by a cancelled one."""
        s = server()
        jobs = []
        for n in range(5):
            jobs.append(s.submit(project(gated(tmp_path / f"gate{n}"))))
            until(s, jobs[0])
        assert [s.status(job).get("position") for job in jobs] == [None, 0, 1, 2, 3]
        listed = json.loads(s.request("GET", "/builds")[2])
        assert [one["job_id"] for one in listed] == jobs[::-1] and [one["status"] for one in listed] == ["queued"] * 4 + ["running"]
        assert s.request("GET", f"/build/{jobs[1]}/result")[0] == 404
        assert json.loads(s.request("DELETE", f"/build/{jobs[2]}")[2])["status"] == "failed"
        for n in range(5):
            (tmp_path / f"gate{n}").touch()
        streams = [s.events(job) for job in jobs]
        told = [[e["position"] for e in stream if e["type"] == "queued"] for stream in streams]
        assert told[:3] == [[0], [0], [1]] and [(one[0], one[-1]) for one in told[3:]] == [(2, 0), (3, 0)]
        assert told[3:] == [sorted(set(one), reverse=True) for one in told[3:]]  # in between, no more than one a second
        outcome = {"status": "failed", "error": "cancelled before it was started", "error_type": "Cancelled"}
        assert streams[2][1:] == [{"type": "complete", "result": outcome}]
        ends = [s.status(jobs[n])[key] for n in (0, 1, 3, 4) for key in ("started_at", "finished_at")]
        assert ends == sorted(ends)
        assert s.request("DELETE", f"/build/{jobs[0]}")[0] == 200 and s.status(jobs[0])["status"] == "ok"

    def test_slots(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """Two builds at once: each waits for the other. Neither has the other's files in its workspace, nor a secret of the server."""
        s = server("--slots", "2", "--env", "ALLOWED",
                   env={"SECRET_TOKEN": "hunter2", "ALLOWED": "seen", "http_proxy": "http://u:hunter2@127.0.0.1:9"})
        jobs = [s.submit(project(f"touch marker-{a}\n{gated(tmp_path / 'gate')}\nenv\nfind .. -name 'marker-*'\n{QUICK}")) for a in ("a", "b")]
        for job in jobs:
            until(s, job)
        (tmp_path / "gate").touch()
        for name, other, job in (("a", "b", jobs[0]), ("b", "a", jobs[1])):
            events = s.events(job)
            text = "\n".join(event["msg"] for event in events if event["type"] == "build")
            assert events[-1]["result"] == {"status": "ok"}, events
            assert f"marker-{name}" in text and f"marker-{other}" not in text
            assert "ALLOWED=seen" in text and "hunter2" not in text and "SECRET" not in text
            home = re.search(r"^HOME=(.*)$", text, re.MULTILINE)
            assert home and not os.path.exists(home[1])  # the VM is gone, and its workspace

    def test_killed_server(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """kill -9 at two moments of two builds of 10,000 lines: each client ends with every event once, and each job is complete."""
        s, rng = server("--slots", "2"), random.Random(4)
        build = "echo pid $$\nfor i in $(seq 0 99); do seq $((i*100+1)) $((i*100+100)); sleep 0.006; done\n" + QUICK
        followers = [Follower(s, s.submit(project(build))) for _ in range(2)]
        for follower in followers:
            follower.start()
        for _ in range(2):
            time.sleep(rng.uniform(0.05, 1.2))  # the moment is the point
            s.stop(signal.SIGKILL)
            s.start()
        for follower in followers:
            follower.join(PATIENCE)
            assert not follower.is_alive() and follower.losses
            assert [frame.split(b"\n")[0] for frame in follower.frames] == [b"id: %d" % n for n in range(1, len(follower.frames) + 1)]
            body = s.request("GET", f"/build/{follower.job}/events")[2]
            assert body.partition(b"\n\n")[2] == b"".join(follower.frames)
            events = [json.loads(frame.partition(b"data: ")[2]) for frame in follower.frames]
            lines = [event["msg"] for event in events if event["type"] == "build"]
            assert lines[-10_000:] == [str(n) for n in range(1, 10_001)]
            assert [event for event in events if event["type"] == "complete"] == [events[-1]] == [OK_EVENT]
            assert s.request("GET", f"/build/{follower.job}/result")[0] == 200 and s.status(follower.job)["attempts"] <= 3
            wait_for(lambda lines=lines: not any(living(int(line[4:])) for line in lines if line.startswith("pid ")))

    def test_killed_thrice(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """A build under which the server dies three times has failed; what waits keeps its order, what is finished its bytes."""
        s = server()
        done = s.submit()
        s.events(done)
        before = [s.request("GET", f"/build/{done}/{name}")[2] for name in ("events", "result")] + [s.status(done)]
        fatal = s.submit(project(f"echo $$; {gated(tmp_path / 'never')}"))
        waiting, pids, log = [s.submit() for _ in range(3)], list[int](), s.state / "jobs" / fatal / "events"
        for attempt in range(1, 4):
            wait_for(lambda attempt=attempt: log.read_bytes().count(b'"waiting"') == attempt)
            pids = [int(pid) for pid in re.findall(rb'"msg":"(\d+)"', log.read_bytes())]
            assert s.status(fatal)["attempts"] == attempt
            s.stop(signal.SIGKILL)
            s.start()
        events = s.events(fatal)
        assert events[-1]["result"] == {"status": "failed", "error": "the server ended 3 times during this build", "error_type": "InternalError"}
        assert [event["type"] for event in events].count("queued") == 3
        for job in waiting:
            assert s.events(job)[-1]["result"] == {"status": "ok"}
        starts = [s.status(job)["started_at"] for job in waiting]
        assert starts == sorted(starts)
        assert [s.request("GET", f"/build/{done}/{name}")[2] for name in ("events", "result")] + [s.status(done)] == before
        assert [job["job_id"] for job in json.loads(s.request("GET", "/builds")[2])] == [*waiting[::-1], fatal, done]
        assert len(pids) == 3
        wait_for(lambda: not any(map(living, pids)))

    def test_grace(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """SIGTERM: nothing more is accepted, the running build finishes, the waiting one waits for the next server."""
        s = server("--grace", "30")
        first, second = s.submit(project(gated(tmp_path / "gate"))), s.submit()
        until(s, first)
        assert s.process is not None
        s.process.send_signal(signal.SIGTERM)
        refused = wait_for(lambda: [answer for answer in [s.request("POST", "/build", {})] if answer[0] != 422])[0]  # {}: never accepted
        assert refused[0] == 503 and json.loads(refused[2])["error_type"] == "ShuttingDown" and int(refused[1]["Retry-After"]) > 0
        (tmp_path / "gate").touch()
        assert "Traceback" not in s.process.communicate(timeout=PATIENCE)[1] and s.process.returncode == 0
        s.start()
        assert s.status(first).items() >= {"status": "ok", "attempts": 1}.items()
        assert s.events(second)[-1]["result"] == {"status": "ok"}

    def test_parked(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """A build that the grace did not suffice for is run by the next server, at no cost; one server at a time has the state."""
        s = server("--grace", "0.1")
        job = s.submit(project(f"echo $$; {gated(tmp_path / 'gate')}"))
        pid = int(until(s, job)["msg"])
        second = subprocess.run([*PROGRAM, "serve", "--listen", "127.0.0.1:0", "--state", str(s.state)], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (second.returncode, second.stderr) == (2, f"confbuild: error: {s.state} is in use by another server\n")
        assert "Traceback" not in s.stop()
        assert not living(pid)
        stored = json.loads((s.state / "jobs" / job / "job.json").read_text())
        assert (stored["state"], stored["attempts"]) == ("queued", 0)
        s.start()
        (tmp_path / "gate").touch()
        events = s.events(job)
        assert [event["type"] for event in events].count("queued") == 2 and events[-1]["result"] == {"status": "ok"}
        assert s.status(job)["attempts"] == 1

    def test_unexpected(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A bug of ours ends its job with InternalError, is logged, and leaves the slot alive."""

        def run(jobs: confbuild.Jobs, job: confbuild.Job) -> str:
            raise RuntimeError("a bug")

        jobs = confbuild.Jobs(str(tmp_path), run, lambda log: None)
        jobs.start()
        for _ in range(2):
            log = jobs.log_of(jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None))
            wait_for(has_finished(log))
            assert log.last()["result"] == {"status": "failed", "error": "the server failed; its log tells more", "error_type": "InternalError"}
        assert "a bug" in caplog.text
        jobs.stop(0)
        with pytest.raises(confbuild.Refused, match="shutting down") as refused:
            jobs.check_open()
        assert refused.value.status == 503

    @pytest.mark.parametrize("what", ["submit", "cancel waiting", "cancel running", "run", "end"])
    def test_a_slow_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        """While one job is being written down, everything else is answered, and another job is accepted, built and cancelled."""
        go, blocked, release, real = threading.Event(), threading.Event(), threading.Event(), confbuild.write_durably
        slow: list[str] = []

        def run(jobs: confbuild.Jobs, job: confbuild.Job) -> str:
            if job.request.repo_ref == "slow":
                jobs.when_halted(job, go.set)
                assert go.wait(30)
            return build_quickly(jobs, job)

        def write(path: str, data: bytes) -> None:
            state = json.loads(data)["state"]
            if '"repo_ref":"slow"' in data.decode() and slow and state == slow[0]:
                blocked.set()
                assert release.wait(30)
            real(path, data)

        monkeypatch.setattr(confbuild, "write_durably", write)
        request = confbuild.BuildRequest(NONCE, "http://127.0.0.1/x", "slow")
        with started(tmp_path, run, slots=1 if what == "cancel waiting" else 2) as jobs, concurrent.futures.ThreadPoolExecutor() as pool:
            if what in ("submit", "run"):
                slow.append({"submit": "queued", "run": "running"}[what])
                task: Any = pool.submit(jobs.submit, request, None)
            else:
                first = jobs.submit(request, None)
                wait_for(lambda: first.state == "running")
                job = jobs.submit(request, None) if what == "cancel waiting" else first
                slow.append({"cancel waiting": "failed", "cancel running": "running", "end": "ok"}[what])
                task = pool.submit(go.set if what == "end" else lambda: jobs.cancel(job))
            assert blocked.wait(30)
            other = jobs.submit(request._replace(repo_ref=""), None)
            assert jobs.newest(10)[0]["job_id"] == other.id and jobs.describe(other)["status"] in ("queued", "running", "ok")
            for known in list(jobs._jobs.values()):
                assert jobs.log_of(known).count >= 0 and jobs.get(known.id) is known
            if what == "cancel waiting":
                jobs.cancel(other)
            wait_for(lambda: other.log is None)
            assert other.state == ("failed" if what == "cancel waiting" else "ok")
            assert task.done() == (what in ("run", "end"))
            release.set()
            go.set()
            task.result(30)
            wait_for(lambda: all_ended(jobs))
        for folder in (tmp_path / "jobs").iterdir():
            assert (folder / "events").read_bytes().count(b'"type":"complete"') == 1

    def test_positions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A position is told on entry, exactly before the start, and in between at most once in ANNOUNCE_S."""
        clock, gate = [1000.0], threading.Semaphore(0)
        monkeypatch.setattr(confbuild, "time", types.SimpleNamespace(**{**vars(time), "monotonic": lambda: clock[0]}))

        def run(jobs: confbuild.Jobs, job: confbuild.Job) -> str:
            jobs.when_halted(job, gate.release)
            assert gate.acquire(timeout=30)
            return build_quickly(jobs, job)

        def told(job: confbuild.Job) -> list[int]:
            return [json.loads(frame.partition(b"data: ")[2])["position"] for frame in Path(job.events_path).read_bytes().split(b"\n\n") if b'"queued"' in frame]

        def step(seconds: float) -> None:
            clock[0] += seconds
            with jobs._changed:
                jobs._changed.notify_all()

        with started(tmp_path, run) as jobs:
            all_jobs = [jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)]
            wait_for(lambda: all_jobs[0].state == "running")
            all_jobs += [jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None) for _ in range(40)]
            last = all_jobs[-1]
            for job in all_jobs[1:31]:  # 30 cancelled at once
                jobs.cancel(job)
            assert sum(len(told(job)) for job in all_jobs) == 41 and told(last) == [39]
            step(confbuild.ANNOUNCE_S)
            wait_for(lambda: told(last) == [39, 9])
            jobs.cancel(all_jobs[31])
            step(confbuild.ANNOUNCE_S / 2)
            gate.release()  # the first ends, the second starts: it is told at once
            wait_for(lambda: all_jobs[32].state == "running")
            assert told(all_jobs[32]) == [31, 1, 0] and told(last) == [39, 9]
            step(confbuild.ANNOUNCE_S / 2)
            wait_for(lambda: told(last) == [39, 9, 7])
            for job in all_jobs:
                jobs.cancel(job)
        assert [told(job) for job in all_jobs[:3]] == [[0], [0], [1]]

    @pytest.mark.parametrize("name", ["queue", "slot 0"])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError(), RuntimeError("a bug")])
    def test_threads_outlive_everything(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, error: Exception) -> None:
        """An exception anywhere in a thread's work is logged, and the thread goes on."""
        monkeypatch.setattr(confbuild, "RETRY_S", 0.01)
        thrown = threading.Event()
        method = "_tend" if name == "queue" else "_work"
        real = getattr(confbuild.Jobs, method)

        def throw(jobs: confbuild.Jobs) -> None:
            if not thrown.is_set():
                thrown.set()
                raise error
            real(jobs)

        monkeypatch.setattr(confbuild.Jobs, method, throw)
        with started(tmp_path) as jobs:
            assert thrown.wait(30)
            job = jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)
            wait_for(lambda: job.log is None)
            assert job.state == "ok" and f"thread {name}" in caplog.text and all(thread.is_alive() for thread in jobs._threads)

    @pytest.mark.parametrize("status", ["running", "queued", "ok"])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error"), RuntimeError("a bug")])
    def test_a_slot_outlives_every_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, error: Exception) -> None:
        """Whatever goes wrong when a job starts, ends or is parked, the slot takes the next one."""
        monkeypatch.setattr(confbuild, "RETRY_S", 0.01)
        real, thrown, waits = confbuild.write_durably, threading.Event(), threading.Event()

        def write(path: str, data: bytes) -> None:
            if json.loads(data)["state"] == status and json.loads(data)["started_at"] and not thrown.is_set():
                thrown.set()
                raise error
            real(path, data)

        def run(jobs: confbuild.Jobs, job: confbuild.Job) -> str:
            if status == "queued" and not thrown.is_set():
                jobs.when_halted(job, waits.set)
                jobs.halt(job, "Parked", "the server was stopped")
                raise confbuild.BuildFailed("VmError", "gone")
            return build_quickly(jobs, job)

        monkeypatch.setattr(confbuild, "write_durably", write)
        request = confbuild.BuildRequest(NONCE, "http://127.0.0.1/x")
        with started(tmp_path, run) as jobs:
            first = jobs.submit(request, None)
            assert thrown.wait(30)
            second = jobs.submit(request, None)
            wait_for(lambda: second.log is None)
            assert second.state == "ok"
            if status != "queued":
                wait_for(lambda: first.log is None)
            full = ("LimitError", "the disk of the server is full: No space left on device")
            ended = (first.record.failure or {"error_type": "", "error": ""})
            assert (first.state, ended["error_type"], ended["error"]) == {
                "queued": ("running", "", ""), "ok": ("ok", "", ""),
                "running": ("failed", *(full if getattr(error, "errno", 0) == 28 else ("InternalError", "the server failed; its log tells more")))}[status]


def job_id(n: int) -> str:
    """The id of the n-th stored job."""
    return f"00000000-0000-4000-8000-{n:012d}"


def store(state: Path, n: int, status: str = "ok", events: list[str] | None = None, /, **changes: Any) -> Path:
    """The folder of a job as confbuild 0.1 leaves it [CONTRACT 1.15]. changes: of job.json."""
    folder = state / "jobs" / job_id(n)
    folder.mkdir(parents=True)
    ended = status in ("ok", "failed")
    doc = {"seq": n, "request": {"nonce": NONCE, "repo_url": "", "repo_ref": "", "source_name": "x.tgz"}, "attempts": int(status != "queued"),
           "state": status, "submitted_at": "2020-01-02T03:04:05.678901+00:00", "started_at": "" if status == "queued" else "2020-01-02T03:04:06.678901+00:00",
           "finished_at": "2020-01-02T03:04:07.678901+00:00" if ended else "",
           "result": {"size": 6, "sha256": hashlib.sha256(b"result").hexdigest()} if status == "ok" else None,
           "failure": {"error": "no", "error_type": "BuildError"} if status == "failed" else None}
    (folder / "job.json").write_text(json.dumps(doc | changes, separators=(",", ":")))
    if status == "ok":
        (folder / "result.tar.gz").write_bytes(b"result")
    if not ended:
        (folder / "source").write_bytes(b"archive")
    told = ['{"type":"queued","position":0}', *(['{"type":"build","msg":"one"}'] if status != "queued" else []),
            *{"ok": ['{"type":"complete","result":{"status":"ok"}}'],
              "failed": ['{"type":"complete","result":{"status":"failed","error":"no","error_type":"BuildError"}}']}.get(status, [])]
    (folder / "events").write_bytes(b"".join(frames(told if events is None else events)))
    return folder


def build_quickly(jobs: confbuild.Jobs, job: confbuild.Job) -> str:
    """A run for Jobs: one line of output and a result."""
    assert job.log
    job.log.append(confbuild.to_payloads("build", ["built"]))
    path = Path(job.folder) / "made"
    path.write_bytes(b"result")
    return str(path)


@contextlib.contextmanager
def started(state: Path, run: Callable[[confbuild.Jobs, confbuild.Job], str] = build_quickly, **options: Any) -> Iterator[confbuild.Jobs]:
    """Jobs on a state."""
    jobs = confbuild.Jobs(str(state), run, lambda log: None, **options)
    jobs.start()
    try:
        yield jobs
    finally:
        jobs.stop(0)


def all_ended(jobs: confbuild.Jobs) -> bool:
    """For wait_for."""
    return not jobs._ending and not jobs._queue and not jobs._running


def contents(folder: Path) -> dict[str, Any]:
    """What is in a folder: kind, size and first bytes of each file; of nothing else is read."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        found[str(path.relative_to(folder))] = stat.S_IFMT(info.st_mode)
        if stat.S_ISREG(info.st_mode):
            with path.open("rb") as f:
                found[str(path.relative_to(folder))] = (info.st_size, f.read(100_000))
    return found


def replace(path: Path, kind: str) -> None:
    """Put something else in a file's place."""
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
        (path / "mine").write_text("precious")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock, contextlib.chdir(path.parent):
            sock.bind(path.name)
    elif kind == "sparse":
        with path.open("wb") as f:
            f.truncate(1 << 42)
    elif kind != "nothing":
        path.symlink_to({"device": "/dev/zero", "dangling link": "nowhere", "link": "/etc/passwd"}[kind])


KINDS = ("FIFO", "directory", "socket", "sparse", "device", "dangling link", "link", "nothing")


class TestState:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("status", "name"), [("ok", "job.json"), ("ok", "events"), ("ok", "result.tar.gz"), ("failed", "events"),
                                                  ("queued", "job.json"), ("queued", "events"), ("queued", "source"), ("running", "events")])
    def test_foreign_files(self, tmp_path: Path, kind: str, status: str, name: str) -> None:
        """What is no file of ours makes its job damaged, and is left alone; the others are built."""
        store(tmp_path, 1)
        folder = store(tmp_path, 2, status)
        store(tmp_path, 3, "queued")
        replace(folder / name, kind)
        before = contents(folder)
        with started(tmp_path) as jobs:
            listed = {one["job_id"]: one for one in jobs.newest(10)}
            assert set(listed) == {job_id(1), job_id(2), job_id(3)} and listed[job_id(1)]["status"] == "ok"
            # Zeros in a log are what a crashed machine leaves: the build begins again. A source is what it is.
            if kind != "sparse" or name == "job.json" or status in ("ok", "failed"):
                job = jobs.get(job_id(2))
                assert listed[job_id(2)].items() >= {"status": "damaged", "error_type": "Damaged"}.items(), listed[job_id(2)]
                assert re.fullmatch(rf"the files of this build are damaged: {name}: .+", listed[job_id(2)]["error"])
                assert str(tmp_path) not in listed[job_id(2)]["error"]
                jobs.cancel(job)
                assert jobs.describe(job) == listed[job_id(2)] and contents(folder) == before
                if name != "events" and status in ("ok", "failed") and name != "job.json":
                    assert jobs.log_of(job).finished
                elif name != "job.json" or status == "queued":
                    with pytest.raises(confbuild.Refused, match="damaged") as refused:
                        jobs.log_of(job)
                    assert (refused.value.status, refused.value.error_type) == (404, "Damaged")
            wait_for(lambda: jobs.get(job_id(3)).log is None)
            assert jobs.log_of(jobs.get(job_id(3))).last() == OK_EVENT and jobs.describe(jobs.get(job_id(3)))["status"] == "ok"

    @pytest.mark.parametrize("changes", [
        {"seq": "1"}, {"seq": None}, {"seq": -1}, {"seq": True}, {"seq": 10 ** 30}, {"seq": 1.5}, {"request": {}}, {"request": []}, {"attempts": None}, {"attempts": -1},
        {"state": "queued"}, {"state": "running"}, {"state": "failed"}, {"state": "damaged"}, {"state": "x"}, {"state": []}, {"finished_at": ""}, {"started_at": 5},
        {"result": None}, {"result": {}}, {"result": []}, {"result": {"size": 7, "sha256": "0" * 64}}, {"result": {"size": 6, "sha256": "é" * 64}}, {"failure": {}},
        {"result": {"size": "6", "sha256": "0" * 64}}, {"failure": {"error": "x", "error_type": "y"}}, {"failure": 0}, {"more": 1},
        {"request": {"nonce": None, "repo_url": "", "repo_ref": "", "source_name": ""}}, {"request": {"nonce": NONCE, "repo_url": "", "repo_ref": "", "name": ""}}])
    def test_shapes(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        """Each field of job.json is checked; of a job that has ended nothing is ever run again."""
        folder = store(tmp_path, 1, **changes)
        store(tmp_path, 2, "queued")
        before = contents(folder)
        with started(tmp_path) as jobs:
            [other, one] = jobs.newest(10)
            assert (one["job_id"], one["status"], one["error"]) in {
                (job_id(1), "damaged", f"the files of this build are damaged: {why}") for why in (
                    "job.json: not the record of a job", "result.tar.gz: not a regular file of 7 bytes")}, one
            wait_for(lambda: all_ended(jobs))
            assert jobs.describe(jobs.get(other["job_id"]))["status"] == "ok" and contents(folder) == before

    @pytest.mark.parametrize("seq", [0, 7, confbuild.MAX_SEQ])
    def test_any_seq(self, tmp_path: Path, seq: int) -> None:
        """Two jobs may have one seq, and a large one harms nobody: what is accepted afterwards is read again."""
        for n, status in ((1, "ok"), (2, "queued"), (3, "queued")):
            store(tmp_path, n, status, seq=seq, submitted_at=f"2020-01-0{4 - n}T03:04:05.678901+00:00")
        order: list[str] = []

        def run(jobs: confbuild.Jobs, job: confbuild.Job) -> str:
            order.append(job.id)
            return build_quickly(jobs, job)

        with started(tmp_path, run) as jobs:
            wait_for(lambda: all_ended(jobs))
            new = jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)
            wait_for(lambda: all_ended(jobs))
        assert order == [job_id(3), job_id(2), new.id]  # by their times
        with started(tmp_path) as jobs:
            assert {one["status"] for one in jobs.newest(10)} == {"ok"} and len(jobs.newest(10)) == 4

    @settings(max_examples=60)
    @given(st.sampled_from(["ok", "failed", "queued", "running"]), st.sampled_from(["job.json", "events"]), st.floats(0, 1), st.integers(0, 60),
           st.one_of(st.binary(max_size=40), st.sampled_from([b"\0" * 5000, b"\n\n", b"null", b'"', b"[" * 9000, b"9" * 5000, b"id: 7\ndata: {}\n\n"])))
    def test_mutations(self, status: str, name: str, where: float, length: int, put: bytes) -> None:
        """Whatever bytes are lost, changed or added: the server starts, answers, builds the others, and cuts no log that has ended."""
        with tempfile.TemporaryDirectory() as name_:
            state = Path(name_)
            folder, other = store(state, 1, status), store(state, 2, "queued")
            data = (folder / name).read_bytes()
            at = int(where * len(data))
            (folder / name).write_bytes(data[:at] + put + data[at + length:])
            before = (folder / "events").read_bytes()
            with started(state) as jobs:
                json.dumps(jobs.newest(10))
                wait_for(lambda: all_ended(jobs))
                assert jobs.describe(jobs.get(job_id(2)))["status"] == "ok" and (other / "events").read_bytes().endswith(sent(COMPLETE_EVENT)[0].encode() + b"\n\n")
                job = jobs.get(job_id(1))
                try:
                    log = jobs.log_of(job)
                    for n in (0, 1, 2, 3):
                        with contextlib.suppress(OSError):
                            log.offset_of(n)
                except confbuild.Refused as e:
                    assert e.status == 404
                jobs.cancel(job)
            if status in ("ok", "failed"):
                assert (folder / "events").read_bytes().startswith(before.rstrip(b"\0"))

    @pytest.mark.parametrize("status", ["ok", "failed"])
    def test_killed_before_complete(self, tmp_path: Path, status: str) -> None:
        """A server that died between job.json and the last event, or within it: the next one completes it, to the byte."""
        folder = store(tmp_path, 1, status)
        whole = (folder / "events").read_bytes()
        start = whole.index(b"id: 3\n")
        for cut in range(start, len(whole)):
            for lost in (b"", bytes(len(whole) - cut)):  # zeros: the machine died as well
                (folder / "events").write_bytes(whole[:cut] + lost)
                with started(tmp_path, slots=0) as jobs:
                    wait_for(lambda: (folder / "events").read_bytes() == whole and all_ended(jobs))
                    assert jobs.describe(jobs.get(job_id(1)))["status"] == status

    def test_never_accepted(self, tmp_path: Path) -> None:
        """Only what a server leaves that died while it accepted a build is removed: nothing else, and nothing elsewhere."""
        jobs_, incoming = tmp_path / "jobs", tmp_path / "incoming"
        for n, names in enumerate([("source",), ("source", "events", "job.json.tmp"), (), ("result.tar.gz",), ("source", "notes"), ("events",)], 1):
            (jobs_ / job_id(n)).mkdir(parents=True)
            for name in names:
                (jobs_ / job_id(n) / name).touch()
        (jobs_ / job_id(6) / "events").write_bytes(frames(['{"type":"queued","position":0}'])[0])
        (jobs_ / "config").mkdir()
        (jobs_ / "config" / "config.xml").touch()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "source").touch()
        (jobs_ / job_id(7)).symlink_to(tmp_path / "elsewhere")
        incoming.mkdir()
        (incoming / ("a" * 32)).touch()
        (incoming / "letter.txt").touch()
        with started(tmp_path) as jobs:
            assert {one["job_id"]: one["status"] for one in jobs.newest(10)} == dict.fromkeys(map(job_id, (4, 5, 6, 7)), "damaged")
        assert sorted(os.listdir(jobs_)) == [*map(job_id, (4, 5, 6, 7)), "config"] and os.listdir(incoming) == ["letter.txt"]
        assert os.listdir(jobs_ / "config") == ["config.xml"] and os.listdir(tmp_path / "elsewhere") == ["source"]
        assert sorted(os.listdir(jobs_ / job_id(5))) == ["notes", "source"]

    def test_claim(self, tmp_path: Path) -> None:
        """A new, an empty and a 0.1 state are taken, and marked; one server at a time."""
        (tmp_path / "empty").mkdir()
        store(tmp_path / "old", 1)
        (tmp_path / "old" / "incoming").mkdir()
        (tmp_path / "old" / "lock").touch()
        for name in ("new/er", "empty", "old", "old"):
            lock = confbuild.claim_state(str(tmp_path / name))
            assert (tmp_path / name / "confbuild-state").read_text() == "confbuild state 1\n"
            with pytest.raises(confbuild.UsageError, match=r"is in use by another server"):
                confbuild.claim_state(str(tmp_path / name))
            os.close(lock)
        assert (tmp_path / "old" / "jobs" / job_id(1) / "job.json").exists()

    @pytest.mark.parametrize(("names", "message"), [
        (["jobs/my-app/config.xml", "secrets/key"], "is neither empty nor a state directory"), (["jobs/my-app/config.xml"], "is neither empty nor"),
        (["notes"], "is neither empty nor"), (["incoming/letter"], "is neither empty nor"), (["jobs"], "is neither empty nor"),
        (["guests/list"], "is neither empty nor"), (["jobs/" + job_id(1) + "/job.json", "README"], "is neither empty nor"),
        (["confbuild-state=confbuild state 2\n"], "was written by a newer confbuild: version 2, this one knows 1"),
        (["confbuild-state=confbuild state x\n"], "is damaged: expected 'confbuild state 1'"), (["confbuild-state/x"], "confbuild-state is damaged")])
    def test_foreign_directory(self, tmp_path: Path, names: list[str], message: str) -> None:
        """A directory of somebody else, and of a newer version, is refused, and nothing in it is touched."""
        for name in names:
            path, _, text = (tmp_path / "state" / name).as_posix().partition("=")
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
        before = contents(tmp_path / "state")
        with pytest.raises(confbuild.UsageError, match=message):
            confbuild.claim_state(str(tmp_path / "state"))
        assert contents(tmp_path / "state") == before

    def test_our_own_log(self, tmp_path: Path) -> None:
        """`serve --state DIR > DIR/server.log` finds a directory that is not empty; a log of somebody else is refused."""
        code = "import sys; sys.path.insert(0, sys.argv[1]); import confbuild; confbuild.claim_state(sys.argv[2])"
        for fd in (1, 2):
            (tmp_path / f"state{fd}").mkdir()
            with open(tmp_path / f"state{fd}/server.log", "wb") as log:
                subprocess.run([sys.executable, "-c", code, str(FILE.parent), str(tmp_path / f"state{fd}")], stdout=log if fd == 1 else None, stderr=log if fd == 2 else None,
                               check=True, timeout=30)
            assert sorted(os.listdir(tmp_path / f"state{fd}")) == ["confbuild-state", "lock", "server.log"]
        (tmp_path / "other").mkdir()
        (tmp_path / "other/server.log").touch()
        with pytest.raises(confbuild.UsageError, match="is neither empty nor a state directory"):
            confbuild.claim_state(str(tmp_path / "other"))

    def test_a_large_state_is_read_quickly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a job that has ended, job.json and the end of its log are read, once each, however large the log is."""
        lines = ['{"type":"build","msg":"%s"}' % ("x" * 1000)] * 3000
        store(tmp_path, 1, "ok", [*lines, *sent(COMPLETE_EVENT)])
        read: list[int] = []
        real = {"read": os.read, "pread": os.pread}
        for name in real:
            monkeypatch.setattr(os, name, lambda fd, n, *at, name=name: (read.append(n), real[name](fd, n, *at))[1])
        with started(tmp_path, slots=0) as jobs:
            assert jobs.newest(1)[0]["status"] == "ok" and read == [confbuild.MIB, 4096]
            log = jobs.log_of(jobs.get(job_id(1)))
            assert (log.count, log.finished, read[2:]) == (3001, True, [4096])
            for n in (0, 1, 1500, 2999, 3000):
                read.clear()
                assert log.offset_of(n) == sum(map(len, frames(lines[:n])))
                assert sum(read) < 256 * 1024

# endregion 22
# ==============================================================================
# region 23. QEMU
# ==============================================================================

# A QEMU in Python: it boots by running what a test gives it, with the agent's streams and the monitor that the argument vector names.
QEMU_STAND_IN = '''#!%s -IS
import json, os, select, signal, socket, sys
def say(text):
    os.write(2, text.encode())
def agent(text):
    os.write(1, text.encode())
def monitor():
    """One conversation; returns the command that it was about."""
    peer, _ = listener.accept()
    with peer, peer.makefile("rwb", 0) as stream:
        stream.write(b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\\r\\n')
        for line in stream:
            name = json.loads(line)["execute"]
            stream.write(b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}\\r\\n')
            stream.write(json.dumps({"return": USERNET if name == "human-monitor-command" else {}}).encode() + b"\\r\\n")
            if name != "qmp_capabilities":
                return name
def wait(*heeded):
    """Until one of what is heeded happens: stdin, quit."""
    while True:
        ready = select.select([listener, *([0] if "stdin" in heeded else [])], [], [])[0]
        if 0 in ready and not os.read(0, 4096) or listener in ready and monitor() in heeded:
            return
USERNET = "Hub -1 (net):\\r\\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\\r\\n" \\
    "  TCP[HOST_FORWARD]  14       127.0.0.1 40261       10.0.2.15  8080     0     0\\r\\n"
path = sys.argv[sys.argv.index("-qmp") + 1].removeprefix("unix:").removesuffix(",server=on,wait=off")
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
%s
'''
BOOTED = 'config = os.read(0, 4096); open(os.path.join(os.path.dirname(sys.argv[0]), "told"), "wb").write(config)\nagent("8080\\n")\n'
SNP_CPUID = (0x80000021, 0x1F | 1 << 4, 51)  # the last leaf, EAX and EBX of 0x8000001F


def guest_image(folder: str = "/image") -> confbuild.Image:
    return confbuild.Image(folder, "5a" * 32, "console=ttyS0 panic=-1", f"{folder}/firmware.fd", f"{folder}/vmlinuz", f"{folder}/initrd", f"{folder}/tools", [])


def small_image(folder: Path) -> confbuild.Image:
    """An image whose parts QEMU loads; nothing would run."""
    kernel = bytearray(8192)  # the header of a bzImage: Linux, Documentation/arch/x86/boot.rst
    kernel[0x1F1], kernel[0x1FE:0x200], kernel[0x202:0x206], kernel[0x206:0x208], kernel[0x211] = 1, b"\x55\xaa", b"HdrS", b"\x0c\x02", 1
    kernel[0x22C:0x230] = b"\xff\xff\xff\x7f"
    write_files(folder, {"firmware.fd": bytes(0x10000 - len(TOY_FIRMWARE)) + TOY_FIRMWARE, "vmlinuz": bytes(kernel), "initrd": TOY_INITRD, "tools": bytes(1 << 16)})
    return guest_image(str(folder))


class TestQemuArgv:
    HEAD = ("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
    TAIL = ("-kernel", "/image/vmlinuz", "-initrd", "/image/initrd", "-append", "console=ttyS0 panic=-1",
            "-blockdev", "driver=raw,node-name=tools,read-only=on,file.driver=file,file.filename=/image/tools",
            "-device", "virtio-blk-pci,drive=tools,disable-legacy=on,iommu_platform=on",
            "-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-10.0.2.15:8080",
            "-device", "virtio-net-pci,netdev=net,romfile=,disable-legacy=on,iommu_platform=on",
            "-device", "virtio-rng-pci,disable-legacy=on,iommu_platform=on",
            "-chardev", "stdio,id=agent,signal=off", "-device", "virtio-serial-pci,disable-legacy=on,iommu_platform=on",
            "-device", "virtserialport,chardev=agent,name=confbuild",
            "-chardev", "file,id=console,path=/dev/stderr", "-serial", "chardev:console", "-qmp", "unix:/w/qmp,server=on,wait=off")

    def test_emulated(self) -> None:
        tcg = [*self.HEAD, "-accel", "tcg,tb-size=64", "-machine", "q35,vmport=off"]
        sizes = ["-cpu", "EPYC-v4", "-smp", "1", "-m", "2048M"]
        assert confbuild.qemu_argv(confbuild.Guest("qemu", guest_image()), "/w/qmp", "/dev/stderr", "/w/hashes", 0x810000) == [
            *tcg, "-bios", "/image/firmware.fd", "-device", "loader,file=/w/hashes,addr=0x810000,force-raw=on", *sizes, *self.TAIL]
        assert confbuild.qemu_argv(confbuild.Guest("qemu", guest_image(), firmware=False), "/w/qmp", "/dev/stderr") == [*tcg, "-cpu", "max", *sizes[2:], *self.TAIL]

    def test_snp(self) -> None:
        """kernel-hashes is off by default; host-data is the digest of image.json."""
        guest = confbuild.Guest("snp", guest_image(), vcpus=4, vcpu_type="EPYC-Genoa", memory_mib=4096, cbitpos=47)
        assert confbuild.qemu_argv(guest, "/w/qmp", "/dev/stderr") == [
            *self.HEAD, "-accel", "kvm",
            "-machine", "q35,confidential-guest-support=sev0,memory-backend=ram0,kernel-irqchip=split,vmport=off,smm=off",
            "-object", "memory-backend-memfd,id=ram0,size=4096M,share=on,prealloc=off",
            "-object", ("sev-snp-guest,id=sev0,cbitpos=47,reduced-phys-bits=1,policy=0x30000,kernel-hashes=on,"
                        "host-data=WlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlo="),
            "-bios", "/image/firmware.fd", "-cpu", "EPYC-Genoa", "-smp", "4", "-m", "4096M", *self.TAIL]
        assert confbuild.qemu_argv(guest._replace(firmware=False), "/w/qmp", "/dev/stderr") == confbuild.qemu_argv(guest, "/w/qmp", "/dev/stderr")

    @pytest.mark.parametrize("mode", ["qemu", "snp"])
    def test_network(self, mode: str) -> None:
        closed = confbuild.qemu_argv(confbuild.Guest(mode, guest_image()), "q", "c", "h", 1)
        opened = confbuild.qemu_argv(confbuild.Guest(mode, guest_image(), network=True), "q", "c", "h", 1)
        assert opened == [argument.replace("restrict=on", "restrict=off") for argument in closed] != closed

    def test_commas(self) -> None:
        """In an option of QEMU a comma is doubled; what is an argument of its own goes as it is."""
        argv = confbuild.qemu_argv(confbuild.Guest("qemu", guest_image("/a,b")), "/c,d/qmp", "/e,f", "/g,h", 1)
        assert [a for a in argv if "/" in a] == [
            "/a,b/firmware.fd", "loader,file=/g,,h,addr=0x1,force-raw=on", "/a,b/vmlinuz", "/a,b/initrd",
            "driver=raw,node-name=tools,read-only=on,file.driver=file,file.filename=/a,,b/tools", "file,id=console,path=/e,,f",
            "unix:/c,,d/qmp,server=on,wait=off"]


class TestPreflight:
    @staticmethod
    def stub(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "QEMU emulator version 10.0.2 (Debian)", status: int = 0) -> None:
        """The QEMU in PATH, and no other."""
        (folder / "qemu-system-x86_64").write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "{version}"; exit 0; }}\n'
                                                   f'[ "$*" = "-object sev-snp-guest,help" ] || exit 9\nexit {status}\n')
        (folder / "qemu-system-x86_64").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    @staticmethod
    def host(folder: Path, cpuid: tuple[int, int, int] = SNP_CPUID, parameter: str = "Y\n", types: int | OSError = 0b10001) -> confbuild.Host:
        def ioctl(fd: int, request: int, argument: int) -> int:
            assert os.readlink(f"/proc/self/fd/{fd}") == str(folder / "kvm") and (request, argument) == (0xAE03, 235)
            if isinstance(types, OSError):
                raise types
            return types

        write_files(folder, {"kvm": "", "sev": "", "sev_snp": parameter})
        with open(folder / "cpuid", "wb") as f:  # sparse: each leaf at its own number
            os.pwrite(f.fileno(), struct.pack("<IIII", cpuid[0], 1, 2, 3), 0x80000000)
            os.pwrite(f.fileno(), struct.pack("<IIII", cpuid[1], cpuid[2] | 0x140, 2, 3), 0x8000001F)
        kvm, sev_snp, sev, leaves = (str(folder / name) for name in ("kvm", "sev_snp", "sev", "cpuid"))
        return confbuild.Host(kvm, sev_snp, sev, leaves, ioctl)

    @staticmethod
    def failed(checks: Sequence[confbuild.Check]) -> list[tuple[str, str]]:
        """(name, what is wrong) of each that failed; a check says what to do if and only if it failed."""
        for check in checks:
            assert check.status in ("passed", "failed") and bool(check.detail) == bool(check.actual) == (check.status == "failed")
        return [(check.name, check.actual) for check in checks if check.status == "failed"]

    def test_all_good(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stub(tmp_path, monkeypatch)
        checks = confbuild.preflight(self.host(tmp_path))
        assert self.failed(checks) == [] and [check.name for check in checks] == ["QEMU", "KVM", "kvm_amd", "/dev/sev", "processor"]

    @pytest.mark.parametrize(("change", "name", "fragment"), [
        ({"types": 0b1}, "KVM", "kvm offers the VM types 0x1, without bit 4, SEV-SNP"),
        ({"types": OSError(errno.EINVAL, "Invalid argument")}, "KVM", "kvm: Invalid argument"),
        ({"parameter": "N\n"}, "kvm_amd", "sev_snp is 'N'"),
        ({"parameter": "\xff"}, "kvm_amd", "sev_snp is"),
        ({"cpuid": (0x80000008, 0x1F, 51)}, "processor", "CPUID 0x8000001F has no SEV-SNP"),
        ({"cpuid": (0x80000021, 0xF, 51)}, "processor", "CPUID 0x8000001F has no SEV-SNP"),
    ])
    def test_one_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], name: str, fragment: str) -> None:
        self.stub(tmp_path, monkeypatch)
        [(which, problem)] = self.failed(confbuild.preflight(self.host(tmp_path, **change)))
        assert which == name and fragment in problem

    @pytest.mark.parametrize(("file", "name"), [("kvm", "KVM"), ("sev_snp", "kvm_amd"), ("sev", "/dev/sev")])
    def test_no_such_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str) -> None:
        self.stub(tmp_path, monkeypatch)
        host = self.host(tmp_path)
        (tmp_path / file).unlink()
        assert self.failed(confbuild.preflight(host)) == [
            (name, f"{tmp_path / file}: No such file or directory")]

    @pytest.mark.parametrize(("version", "status", "found", "problem"), [
        ("QEMU emulator version 8.2.0", 1, (8, 2), "qemu-system-x86_64 is 8.2, and has no sev-snp-guest"), ("QEMU emulator version 9.2.1", 0, (9, 2), ""),
        ("cheese", 1, None, "there is no qemu-system-x86_64 in PATH"),
        (None, 0, None, "there is no qemu-system-x86_64 in PATH")])
    def test_qemu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, status: int, found: tuple[int, int] | None, problem: str) -> None:
        if version is None:
            monkeypatch.setenv("PATH", str(tmp_path))
        else:
            self.stub(tmp_path, monkeypatch, version, status)
        assert confbuild.qemu_version() == found
        assert self.failed(confbuild.preflight(self.host(tmp_path))) == ([("QEMU", problem)] if problem else [])

    def test_cpuid(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the processor itself: its vendor in EBX, EDX, ECX of leaf 0, as /proc/cpuinfo has it."""
        assert confbuild.sev_cpuid(self.host(tmp_path).cpuid) == (0x1F, 51 | 0x140)
        monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(machine="riscv64"))
        assert confbuild.sev_cpuid("/nonexistent") == (0, 0)
        monkeypatch.undo()
        if os.uname().machine == "x86_64":
            registers = confbuild._run_cpuid(0)
            vendor = (registers[4:8] + registers[12:16] + registers[8:12]).decode()
            assert re.search(rf"^vendor_id\s*: {vendor}$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
            monkeypatch.setattr(mmap, "mmap", raising(PermissionError(errno.EACCES, "no")))
            assert confbuild._run_cpuid(0) == b""


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error
    return fail


class TestMonitor:
    GREETING = b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}\r\n'
    OK = b'{"return": {}}\r\n'
    EVENT = b'{"timestamp": {"seconds": 1764000000, "microseconds": 5}, "event": "NIC_RX_FILTER_CHANGED", "data": {"name": "x"}}\r\n'

    def ask(self, folder: Path, *blocks: bytes, timeout_s: float = 20) -> tuple[Any, list[Any]]:
        """What ask_monitor returns from a monitor that sends the blocks, a command before each but the first; and the commands."""
        asked: list[Any] = []

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, peer.makefile("rwb") as stream, contextlib.suppress(OSError):
                for n, block in enumerate(blocks):
                    if n:
                        asked.append(json.loads(stream.readline()))
                    stream.write(block)
                    stream.flush()
                if timeout_s < 1:
                    stream.readline()  # until the other side has had enough

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "qmp"))
            listener.listen()
            thread = threading.Thread(target=serve)
            thread.start()
            try:
                return confbuild.ask_monitor(str(folder / "qmp"), "human-monitor-command", timeout_s, **{"command-line": "info usernet"}), asked
            finally:
                thread.join()

    @pytest.mark.parametrize("blocks", [(GREETING, OK, b'{"return": "text"}\r\n'), (GREETING, EVENT + OK, EVENT * 3 + b'{"return": "text"}\n' + EVENT)])
    def test_conversation(self, tmp_path: Path, blocks: Sequence[bytes]) -> None:
        assert self.ask(tmp_path, *blocks) == ("text", [
            {"execute": "qmp_capabilities", "arguments": {}},
            {"execute": "human-monitor-command", "arguments": {"command-line": "info usernet"}}])

    @pytest.mark.parametrize(("blocks", "message"), [
        ((b"",), "QEMU's monitor: it was closed"),
        ((OK,), "QEMU's monitor: it did not greet"),
        ((b"hello\n",), "QEMU's monitor: message: not JSON: Expecting value: line 1 column 1 (char 0)"),
        ((b"\xff\n",), "QEMU's monitor: message: not UTF-8 at byte 0"),
        ((b'["QMP"]\n',), "QEMU's monitor: message: not an object"),
        ((b'{"QMP":1,"QMP":1}\n',), "QEMU's monitor: message: the name 'QMP' occurs twice in one object"),
        ((b"[" * 40 + b"\n",), "QEMU's monitor: message: nested deeper than 32"),
        ((b" " * (1 << 17),), "QEMU's monitor: a line of more than 65536 bytes"),
        ((GREETING, b'{"error": {"class": "GenericError", "desc": "no"}}\n'),
         'QEMU\'s monitor: qmp_capabilities: {"error":{"class":"GenericError","desc":"no"}}'),
        ((GREETING, OK, b'{"error": {"class": "CommandNotFound"}}\n'), 'QEMU\'s monitor: human-monitor-command: {"error":{"class":"CommandNotFound"}}'),
        ((GREETING, OK, b'{"cheese": 1}\n'), 'QEMU\'s monitor: human-monitor-command: {"cheese":1}'),
        ((GREETING, OK, EVENT), "QEMU's monitor: it was closed"),
    ])
    def test_refused(self, tmp_path: Path, blocks: Sequence[bytes], message: str) -> None:
        with pytest.raises(confbuild.BuildFailed) as caught:
            self.ask(tmp_path, *blocks)
        assert (caught.value.error_type, str(caught.value)) == ("VmError", message)

    def test_out_of_reach(self, tmp_path: Path) -> None:
        with pytest.raises(confbuild.BuildFailed, match="^QEMU's monitor: timed out$"):
            self.ask(tmp_path, self.GREETING, self.EVENT, timeout_s=0.05)
        (tmp_path / "qmp").unlink()
        with pytest.raises(confbuild.BuildFailed, match="No such file"):
            confbuild.ask_monitor(str(tmp_path / "qmp"), "quit", 1)

    def test_forwarded_port(self) -> None:
        """As QEMU 10.0.2 prints it, with a connection that goes through it."""
        text = ("Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
                "  TCP[ESTABLISHED]   20       127.0.0.1 33333       10.0.2.15  8080     0     0\r\n"
                "  TCP[HOST_FORWARD]  14       127.0.0.1 40261       10.0.2.15  8080     0     0\r\n")
        assert confbuild.forwarded_port(text) == 40261
        for bad in ("", None, text.replace("8080", "80"), text.replace("127.0.0.1", "0.0.0.0"), text * 2):
            with pytest.raises(confbuild.BuildFailed, match="QEMU does not say which port it forwards"):
                confbuild.forwarded_port(bad)

    @pytest.mark.parametrize(("line", "shown"), [
        ("[    0.000000] Linux version 6.12", "[    0.000000] Linux version 6.12"), ("\x1b[2J\x1b[001;001H\x1b[=3h", ""), ("a\tb\x00\x9b\u202ec é\x1b]0;t\x07", "a bc ]0;t"),
        ("x" * 500, "x" * 400), ("", "")])
    def test_console_text(self, line: str, shown: str) -> None:
        assert confbuild.console_text(line) == shown


class TestQemuVm:
    @pytest.fixture
    def vm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., confbuild.QemuVm]]:
        """A guest of the stand-in that boots by running code; afterwards neither process nor folder is left of any."""
        made: list[tuple[confbuild.QemuVm, Path]] = []
        others = frozenset(confbuild.descendants(os.getpid(), dead=True))  # of tests that run beside
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

        def make(code: str, **options: Any) -> confbuild.QemuVm:
            (tmp_path / "qemu-system-x86_64").write_text(QEMU_STAND_IN % (sys.executable, code))
            (tmp_path / "qemu-system-x86_64").chmod(0o755)
            monkeypatch.setenv("PATH", str(tmp_path))
            image = options.pop("image", guest_image())
            guest = confbuild.Guest("qemu", image, firmware=options.pop("firmware", False), **options.pop("guest", {}))
            vm = confbuild.QemuVm(guest, {"policy": {"max_archive": 5}}, options.pop("folder", None))
            vm.console = options.pop("console", None)
            assert not options
            made.append((vm, Path(vm._workspace)))
            return vm

        yield make
        for one, workspace in made:
            one.destroy()
            assert not workspace.exists() and one._child is None and (one._reader is None or not one._reader.is_alive())
        assert list((tmp_path / "tmp").iterdir()) == [] and confbuild.descendants(os.getpid(), dead=True, without=others) == []

    def test_life(self, tmp_path: Path, vm: Callable[..., confbuild.QemuVm]) -> None:
        """Configured at its standard input, ready with the port that the monitor tells, and powered off when the input ends."""
        lines: list[str] = []
        one = vm(BOOTED + 'wait("stdin"); say("qemu-system-x86_64: warning: TCG doesn\'t support requested feature: x\\nreboot: Power down\\n")', console=lines.append)
        assert stat.S_IMODE(os.stat(one._workspace).st_mode) == 0o700
        pid = one.spawn()
        assert os.getsid(pid) == pid and resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        one.wait_ready(PATIENCE)
        assert (one.platform, one.port) == ("qemu", 40261)
        assert json.loads((tmp_path / "told").read_text()) == {"token": one.token, "policy": {"max_archive": 5}, "platform": "qemu", "network": "none"}
        one.destroy(clean=True)
        assert lines == ["reboot: Power down"] and not living(pid)
        one.destroy()
        with pytest.raises(confbuild.BuildFailed, match="the VM is gone"):
            one.wait_ready(1)

    def test_network_is_told(self, tmp_path: Path, vm: Callable[..., confbuild.QemuVm]) -> None:
        one = vm(BOOTED + 'wait("stdin")', guest={"network": True})
        one.spawn()
        one.wait_ready(PATIENCE)
        assert json.loads((tmp_path / "told").read_text())["network"] == "open"

    def test_cancelled(self, vm: Callable[..., confbuild.QemuVm]) -> None:
        """Killed at once, though the guest would not power off; while it boots, too."""
        one = vm(BOOTED + "monitor(); signal.pause()")
        pid = one.spawn()
        one.wait_ready(PATIENCE)
        one.destroy()
        assert not living(pid)
        two: confbuild.QemuVm = vm("say('booting\\n'); signal.pause()", console=lambda _: threading.Thread(target=two.destroy).start())
        pid = two.spawn()
        with pytest.raises(confbuild.BuildFailed, match="the VM ended while it booted; its last words: booting"):
            two.wait_ready(PATIENCE)
        two.destroy()
        assert not living(pid)

    @pytest.mark.parametrize("heeded", ["quit", "nothing"])
    def test_will_not_power_off(self, vm: Callable[..., confbuild.QemuVm], monkeypatch: pytest.MonkeyPatch, heeded: str) -> None:
        """A guest that ignores the end of its input is ended by the monitor, and one whose monitor does nothing is killed."""
        monkeypatch.setattr(confbuild, "POWER_OFF_S", 0.05)
        asked: list[str] = []
        ask = confbuild.ask_monitor
        one = vm(BOOTED + f'wait("{heeded}"); say("quit\\n")' if heeded == "quit" else BOOTED + "monitor(); listener.close(); signal.pause()")
        pid = one.spawn()
        one.wait_ready(PATIENCE)

        def hear(path: str, command: str, timeout_s: float) -> Any:
            asked.append(command)
            return ask(path, command, timeout_s)

        monkeypatch.setattr(confbuild, "ask_monitor", hear)
        one.destroy(clean=True)
        assert asked == ["quit"] and not living(pid) and list(one._last) == (["quit"] if heeded == "quit" else [])

    def test_impatient(self, vm: Callable[..., confbuild.QemuVm]) -> None:
        """A destroy without clean ends the waiting of one with it."""
        one: confbuild.QemuVm = vm(BOOTED + "monitor()\nwhile os.read(0, 100): pass\nsay('ignored\\n'); signal.pause()", console=lambda _: threading.Thread(target=one.destroy).start())
        one.spawn()
        one.wait_ready(PATIENCE)
        one.destroy(clean=True)
        assert list(one._last) == ["ignored"]

    @pytest.mark.parametrize(("code", "timeout_s", "message"), [
        (r"say('qemu-system-x86_64: bad option\n\x1b[2J\n')", PATIENCE, "the VM ended while it booted; its last words: qemu-system-x86_64: bad option"),
        ("", PATIENCE, "the VM ended while it booted"),
        ("say('Linux version\\n' * 3); signal.pause()", 0.5, "the VM did not boot within 0.5 s"),
        ("agent('80'); signal.pause()", 0.1, "the VM did not boot within 0.1 s"),
        ("agent('22\\n')", PATIENCE, r"the agent said b'22\n', not its port"),
        ("agent('8080'); say('x')", PATIENCE, "the agent said b'8080', not its port; its last words: x"),
        ("agent('x' * 100000)", PATIENCE, f"the agent said b'{'x' * 16}', not its port"),
        ("listener.close(); agent('8080\\n'); signal.pause()", PATIENCE, "QEMU's monitor: [Errno 111] Connection refused"),
        ("USERNET = 'none'\n" + BOOTED + "monitor(); signal.pause()", PATIENCE, "QEMU does not say which port it forwards"),
    ])
    def test_will_not_boot(self, vm: Callable[..., confbuild.QemuVm], code: str, timeout_s: float, message: str) -> None:
        one = vm(code)
        one.spawn()
        with pytest.raises(confbuild.BuildFailed) as caught:
            one.wait_ready(timeout_s)
        assert caught.value.error_type == "VmError" and str(caught.value).partition("; its last words: Linux")[0] == message

    def test_flood(self, vm: Callable[..., confbuild.QemuVm]) -> None:
        """A guest's console is always read, and never kept without a bound."""
        count = [0]
        one = vm("say(('y' * 99 + '\\n') * 30000)\n" + BOOTED + 'wait("stdin")', console=lambda line: count.__setitem__(0, count[0] + (line == "y" * 99)))
        one.spawn()
        one.wait_ready(PATIENCE)
        workspace = Path(one._workspace)
        assert (workspace / "console").stat().st_size == confbuild.MAX_CONSOLE
        one.destroy(clean=True)
        assert count == [30000] and len(one._last) == confbuild.LAST_LINES

    def test_full_disk(self, vm: Callable[..., confbuild.QemuVm]) -> None:
        """The console is still read, and told."""
        lines: list[str] = []
        one = vm(BOOTED + "say('one\\n'); wait('stdin'); say('two')", console=lines.append)
        os.symlink("/dev/full", os.path.join(one._workspace, "console"))
        one.spawn()
        one.wait_ready(PATIENCE)
        one.destroy(clean=True)
        assert lines == ["one", "two"]

    def test_console_that_raises(self, vm: Callable[..., confbuild.QemuVm], caplog: pytest.LogCaptureFixture) -> None:
        """Who is told of the console may fail: the guest boots all the same, its console is read on, and nobody is told any more."""
        told: list[str] = []

        def tell(line: str) -> None:
            told.append(line)
            raise ValueError("the log is complete")

        one = vm("say('one\\n')\n" + BOOTED + "wait('stdin'); say('two\\n')", console=tell)
        one.spawn()
        one.wait_ready(20)
        one.destroy(clean=True)
        assert told == ["one"] and list(one._last) == ["one", "two"]
        assert "a guest's console is not told any more" in caplog.text and "the log is complete" in caplog.text

    @pytest.mark.parametrize("broken", ["selector", "read"])
    def test_console_that_is_not_read(self, vm: Callable[..., confbuild.QemuVm], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                      broken: str) -> None:
        """Whatever happens to the thread "console", nobody waits for what it will not say."""
        owner, name = (confbuild.selectors, "DefaultSelector") if broken == "selector" else (os, "read")
        real = getattr(owner, name)

        def refuse(*arguments: Any) -> Any:
            if threading.current_thread().name == "console":
                raise OSError(errno.EMFILE, "Too many open files")
            return real(*arguments)

        monkeypatch.setattr(owner, name, refuse)
        one = vm("say('one\\n'); signal.pause()")
        pid = one.spawn()
        with pytest.raises(confbuild.BuildFailed, match="^the VM ended while it booted$"):
            one.wait_ready(100_000)
        one.destroy()
        assert not living(pid) and "a guest's console is not read any more" in caplog.text and "Too many open files" in caplog.text

    @pytest.mark.parametrize("kind", ["qemu", "simulated"])
    def test_long_configuration(self, vm: Callable[..., confbuild.QemuVm], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        """What does not fit into a pipe is not written: whoever writes holds the lock that destroy needs."""
        one = vm("signal.pause()")
        other = confbuild.SimulatedVm(confbuild.SourcePolicy())
        for each in (one, other):
            each._config = {"vek": "x" * 65536}
        monkeypatch.setattr(confbuild, "own_program", lambda: ["/bin/sh", "-c", "kill -STOP $$"])
        with pytest.raises(confbuild.BuildFailed, match="^the VM's configuration has more than 65536 bytes$") as caught:
            (one if kind == "qemu" else other).spawn()
        other.destroy()
        assert caught.value.error_type == "VmError" and not os.path.exists(other.workspace)

    def test_no_thread(self, vm: Callable[..., confbuild.QemuVm], monkeypatch: pytest.MonkeyPatch) -> None:
        one = vm("signal.pause()")
        with monkeypatch.context() as m:
            m.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
            with pytest.raises(confbuild.BuildFailed, match="^QEMU's console cannot be read: can't start new thread$") as caught:
                one.spawn()
        assert caught.value.error_type == "VmError"

    def test_not_started(self, vm: Callable[..., confbuild.QemuVm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one = vm("")
        with pytest.raises(confbuild.BuildFailed, match="the VM is gone"):
            one.wait_ready(1)
        one.destroy(clean=True)
        with pytest.raises(confbuild.BuildFailed, match="the VM was destroyed before it was started"):
            one.spawn()
        two: confbuild.QemuVm = vm("")
        monkeypatch.setenv("PATH", "/nonexistent")
        with pytest.raises(confbuild.BuildFailed, match="^QEMU cannot be started: .Errno 2. No such file or directory: 'qemu-system-x86_64'$"):
            two.spawn()
        with pytest.raises(confbuild.BuildFailed, match="^QEMU cannot be started: .Errno 2. No such file or directory: '/image/firmware.fd'$"):
            vm("", firmware=True).spawn()
        with pytest.raises(confbuild.BuildFailed, match="^QEMU cannot be started: firmware: "):
            vm("", firmware=True, image=guest_image()._replace(firmware=os.devnull)).spawn()
        long = tmp_path / "tmp" / ("d" * 100)
        long.mkdir()
        three = vm("", folder=str(long))
        with pytest.raises(confbuild.BuildFailed, match="is too long for a socket: set TMPDIR to a folder with a shorter name"):
            three.spawn()
        three.destroy()
        long.rmdir()

    def test_hashes(self, vm: Callable[..., confbuild.QemuVm], tmp_path: Path) -> None:
        """Through the firmware, an emulated guest gets the page that SNP would measure."""
        image = small_image(tmp_path / "image")
        one = vm(BOOTED + 'open(os.path.dirname(sys.argv[0]) + "/argv", "w").write("\\n".join(sys.argv)); wait("stdin")', image=image, firmware=True)
        one.spawn()
        one.wait_ready(PATIENCE)
        [loader] = [a for a in (tmp_path / "argv").read_text().split("\n") if a.startswith("loader,")]
        assert loader == f"loader,file={one._workspace}/hashes,addr=0x805000,force-raw=on"
        page = (Path(one._workspace) / "hashes").read_bytes()
        for part in ("vmlinuz", "initrd"):
            assert hashlib.sha256((tmp_path / "image" / part).read_bytes()).digest() in page
        assert len(page) == 4096 and hashlib.sha256(image.append.encode() + b"\0").digest() in page

    def test_dies_with_the_server(self, vm: Callable[..., confbuild.QemuVm], tmp_path: Path) -> None:
        """No signal is caught: the kernel kills QEMU."""
        vm("signal.pause()")
        code = ("import sys; sys.path.insert(0, sys.argv[1])\nimport confbuild, signal\n"
                "vm = confbuild.QemuVm(confbuild.Guest('qemu', confbuild.Image('', '', '', '', '', '', '', []), firmware=False), {})\n"
                "print(vm.spawn(), vm._workspace, flush=True)\nsignal.pause()\n")
        server = subprocess.Popen([sys.executable, "-c", code, str(FILE.parent)], stdout=subprocess.PIPE, text=True,
                                  env={"PATH": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")})
        assert server.stdout is not None
        with server.stdout:
            pid, workspace = server.stdout.readline().split()
        fd = os.pidfd_open(int(pid))
        try:
            server.kill()
            server.wait()
            assert select.select([fd], [], [], 20)[0] == [fd]
        finally:
            os.close(fd)
        confbuild.remove_tree(workspace)


def measured(record: bytes, reset_eip: int, signature: int) -> str:
    """The launch digest over what QEMU had measured, as tools/fakesnp.c recorded it, and the VMSA of each vCPU, which KVM adds."""
    digest, at, items = bytes(48), 0, []
    while at < len(record):
        size = int.from_bytes(record[at + 1:at + 5], "little")
        items.append((record[at:at + 1], record[at + 5:at + 5 + size]))
        at += 5 + size

    def extend(contents: bytes, kind: int, gpa: int) -> None:
        nonlocal digest
        digest = hashlib.sha384(digest + contents + struct.pack("<HB5xQ", 112, kind, gpa)).digest()

    for n, (tag, data) in enumerate(items):
        if tag == b"U":
            gpa, size, kind = struct.unpack("<QQQ", data)
            for start in range(0, size, 4096):
                extend(hashlib.sha384(items[n + 1][1][start:start + 4096]).digest() if kind == 1 else bytes(48), kind, gpa + start)
    for n, data in enumerate(data for tag, data in items if tag == b"r"):
        registers = struct.unpack("<18Q", data)  # struct kvm_regs: RDX is the fourth, RIP the seventeenth
        assert registers[3] == signature and registers[16] == (0xFFF0 if n == 0 else reset_eip & 0xFFFF)
        extend(hashlib.sha384(confbuild.vmsa_page(0xFFFFFFF0 if n == 0 else reset_eip, signature, 1, "QEMU")).digest(), 2, 0xFFFFFFFFF000)
    return digest.hex()


@needs("qemu-system-x86_64")
class TestRealQemu:
    @staticmethod
    def run(argv: Sequence[str], **env: str) -> tuple[int, str]:
        done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
                              env={**os.environ, **env})
        return done.returncode, done.stdout.decode()

    def test_emulated(self, tmp_path: Path) -> None:
        """QEMU takes the whole argument vector, and its monitor says what we expect of it."""
        (tmp_path / "a,b").mkdir()
        guest = confbuild.Guest("qemu", small_image(tmp_path / "a,b"), memory_mib=64, firmware=False)
        child = subprocess.Popen([*confbuild.qemu_argv(guest, str(tmp_path / "q,mp"), "/dev/stderr"), "-S"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT)
        usernet = None
        try:
            while usernet is None:
                assert child.poll() is None, child.communicate()
                with contextlib.suppress(confbuild.BuildFailed):  # it does not listen yet
                    usernet = confbuild.ask_monitor(str(tmp_path / "q,mp"), "human-monitor-command", PATIENCE, **{"command-line": "info usernet"})
            assert 0 < confbuild.forwarded_port(usernet) < 65536
            with pytest.raises(confbuild.BuildFailed, match="human-monitor-command.*command-line"):
                confbuild.ask_monitor(str(tmp_path / "q,mp"), "human-monitor-command", PATIENCE)
            confbuild.ask_monitor(str(tmp_path / "q,mp"), "quit", PATIENCE)
            assert child.wait(PATIENCE) == 0
        finally:
            child.kill()
            child.communicate()

    @needs_qemu(9, 1)
    def test_snp_is_refused(self, tmp_path: Path) -> None:
        """Where there is no SNP: all of sev-snp-guest is parsed, and nothing is started."""
        guest = confbuild.Guest("snp", small_image(tmp_path), memory_mib=64)
        if confbuild.preflight()[1].status == "passed":
            pytest.skip("this machine has SEV-SNP")
        argv = confbuild.qemu_argv(guest, str(tmp_path / "qmp"), "/dev/stderr")
        status, output = self.run(argv)
        assert status == 1 and re.search("vm-type SEV-SNP not supported by KVM|Could not access KVM kernel module", output)
        for old, new, complaint in [("host-data=Wlpa", "host-data=", "length of 29 not equal to 32"), ("kernel-hashes=on", "kernel-hashes=perhaps", "kernel-hashes"),
                                    ("cbitpos", "seabitpos", "seabitpos")]:
            status, output = self.run([a.replace(old, new) for a in argv])
            assert status == 1 and complaint in output and "not supported by KVM" not in output

    @staticmethod
    def with_cbitpos(run: Callable[[int], tuple[int, str]]) -> tuple[int, str]:
        """What run returns with the position of the C-bit that QEMU takes for this machine's: EBX[5:0] of CPUID leaf 0x8000001F, and where the processor
        has no such leaf, as Intel's, any value, of each processor perhaps another one. Only QEMU knows, and says so. [QEMU target/i386/sev.c]"""
        position = 51  # AMD's, and a wrong one wherever SEV is not
        for _ in range(8):
            status, output = run(position)
            wanted = re.search(rf"cbitpos check failed, host '(\d+)' requested '{position}'", output)
            if wanted is None:
                break
            position = int(wanted[1])
        return status, output

    @pytest.mark.parametrize("hosts", [[51], [0, 0], [1, 1], [63, 63], [0, 1, 1], [1, 0, 1, 0, 0]])
    def test_cbitpos(self, hosts: list[int]) -> None:
        """Where the machine's is 51, where it is another one, as an Intel host's, and where processors disagree."""
        left = list(hosts)

        def run(position: int) -> tuple[int, str]:
            host = left.pop(0)
            return (0, "done") if host == position else (1, f"qemu: sev_common_kvm_init: cbitpos check failed, host '{host}' requested '{position}'\nqemu: failed to initialize kvm")

        assert (self.with_cbitpos(run), left) == ((0, "done"), [])
        assert self.with_cbitpos(lambda position: (1, f"cbitpos check failed, host '{position ^ 1}' requested '{position}'"))[0] == 1
        assert self.with_cbitpos(lambda _: (1, "another error")) == (1, "another error")

    @needs("cc")
    @needs_qemu(9, 1)
    @pytest.mark.skipif(not (SHARED / "tools/fakesnp.c").exists(), reason="the shared folder is missing")
    @pytest.mark.skipif(os.uname().machine != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK),
                        reason="no KVM for x86-64 here: modprobe kvm_amd or kvm_intel, usermod -aG kvm USER")
    @pytest.mark.parametrize(("vcpus", "vcpu_type"), [(1, "EPYC-v4"), (2, "EPYC-Genoa")])
    def test_what_snp_would_measure(self, tmp_path: Path, vcpus: int, vcpu_type: str) -> None:
        """QEMU's own launch sequence for the production argument vector, against an imitation of KVM's SNP ioctls: its pages give our digest."""
        subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "fakesnp.so", SHARED / "tools/fakesnp.c", "-ldl"], check=True, timeout=PATIENCE)
        guest = confbuild.Guest("snp", small_image(tmp_path), vcpus, vcpu_type, memory_mib=64)
        status, output = self.with_cbitpos(lambda position: self.run(
            confbuild.qemu_argv(guest._replace(cbitpos=position), str(tmp_path / "qmp"), "/dev/stderr"), LD_PRELOAD=str(tmp_path / "fakesnp.so"), FAKESNP_OUT=str(tmp_path / "record")))
        assert status == 0 and f"host_data {'5a' * 32} vcpus {vcpus}" in output and "LAUNCH_START policy 0x30000" in output, output
        firmware = confbuild.parse_firmware((tmp_path / "firmware.fd").read_bytes())
        kernel, initrd = (hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("vmlinuz", "initrd"))
        signature = confbuild.CPU_SIGNATURES[vcpu_type]
        ours = confbuild.compute_launch_digest(firmware, confbuild.boot_hashes(kernel, initrd, guest.image.append), vcpus, signature)
        assert measured((tmp_path / "record").read_bytes(), 0x80B004, signature) == ours.hex()

# endregion 23

# ==============================================================================
# region 24. VMs
# ==============================================================================


class Blocks:
    """What relay_events reads, in blocks of our choice."""

    def __init__(self, *blocks: bytes) -> None:
        self.blocks = [block for block in blocks if block]
        self.headers = {"Content-Length": str(sum(map(len, blocks)))}

    def read1(self, _: int) -> bytes:
        return self.blocks.pop(0) if self.blocks else b""


def relayed(tmp: Path, *blocks: bytes, max_log: int = 1 << 30) -> tuple[confbuild.BuildFailed | None, list[Any]]:
    """(what relay_events returns, the events of the log)."""
    with tempfile.TemporaryDirectory(dir=tmp) as folder:
        log = confbuild.EventLog(f"{folder}/log")
        failure = confbuild.relay_events(Blocks(*blocks), log, max_log)  # type: ignore[arg-type]
        return failure, [json.loads(frame.partition("data: ")[2]) for frame in Path(f"{folder}/log").read_text().split("\n\n")[:-1]]


def ev(kind: str, msg: str = "m") -> dict[str, Any]:
    return {"type": kind, "msg": msg}


def wire(*events: Any) -> bytes:
    return b"".join(frames([event if isinstance(event, str) else confbuild.compact_json(event) for event in events]))


OK_EVENT = {"type": "complete", "result": {"status": "ok"}}


def failed_event(error: Any, error_type: Any) -> dict[str, Any]:
    return {"type": "complete", "result": {"status": "failed", "error": error, "error_type": error_type}}


def no_fetcher(url: str, ref: str) -> confbuild.SimulatedVm:
    raise AssertionError("a simulated VM fetches by itself")


class TestVm:
    @pytest.mark.parametrize(("blocks", "error", "fragment"), [
        ([wire(ev("build"), ev("init"))], confbuild.BuildFailed, "event that is none"),
        ([wire(ev("attest"), ev("build"))], confbuild.BuildFailed, "event that is none"),
        ([wire(ev("cheese"))], confbuild.BuildFailed, "event that is none"),
        ([wire({**ev("build"), "x": 1})], confbuild.BuildFailed, "event that is none"),
        ([wire({"type": "build", "msg": 1})], confbuild.BuildFailed, "event that is none"),
        ([wire({"type": ["build"], "msg": ""})], confbuild.BuildFailed, "event that is none"),
        ([wire({"type": "build"})], confbuild.BuildFailed, "event that is none"),
        ([wire("[1]")], confbuild.BuildFailed, "event that is none"),
        ([wire(ev("detect"))], confbuild.BuildFailed, "ended in the middle"),
        ([wire(OK_EVENT)[:-1]], confbuild.BuildFailed, "ended in the middle"),
        ([], confbuild.BuildFailed, "ended in the middle"),
        ([b"id: 1\ndata: " + b"x" * (1 << 20)] * 3, confbuild.BuildFailed, "more than 2 MiB"),
        ([wire("{")], ValueError, "not JSON"),
        ([b"\n\n"], ValueError, "not JSON"),
        ([wire('{"type":"build","type":"build"}')], ValueError, "occurs twice"),
        ([wire(r'{"type":"build","msg":"\ud83d\ude00 \ud83d"}')], ValueError, "lone surrogate"),
        ([wire(r'{"type":"build","msg":"\ude00"}')], ValueError, "lone surrogate"),
        ([wire(ev("build")).replace(b'"m"', '"é"'.encode())], ValueError, "ascii"),
        ([wire({"type": "complete", "result": {"status": "great"}})], confbuild.BuildFailed, "a result that is none"),
        ([wire({"type": "complete", "result": ["ok"]})], confbuild.BuildFailed, "a result that is none"),
        ([wire({"type": "complete"})], confbuild.BuildFailed, "a result that is none"),
        ([wire(failed_event("e", "Parked"))], confbuild.BuildFailed, "a result that is none"),
        ([wire(failed_event(1, "BuildError"))], confbuild.BuildFailed, "a result that is none"),
        ([wire(failed_event("e", ["BuildError"]))], confbuild.BuildFailed, "a result that is none"),
        ([wire({**OK_EVENT, "msg": "extra"})], confbuild.BuildFailed, "none"),
        ([wire(failed_event("it ran\nout", "TimeoutError"))], confbuild.BuildFailed, "ended the build with TimeoutError, which only its host can say: it ran out$"),
        ([wire(failed_event("", "Cancelled"))], confbuild.BuildFailed, "ended the build with Cancelled, which only its host can say"),
        ([wire(failed_event("the VM went away", "VmError"))], confbuild.BuildFailed, "ended the build with VmError, which only its host can say"),
    ])
    def test_bad_streams(self, tmp_path: Path, blocks: list[bytes], error: type[Exception], fragment: str) -> None:
        """What a VM says is checked; VmHost turns the ValueErrors into VmError as well."""
        with pytest.raises(error, match=fragment) as caught:
            relayed(tmp_path, *blocks)
        assert getattr(caught.value, "error_type", "VmError") == "VmError"

    @pytest.mark.parametrize(("size", "limit", "error"), [(100, 1 << 20, ""), (100, 3000, "more than 3000 bytes")])
    def test_max_log(self, tmp_path: Path, size: int, limit: int, error: str) -> None:
        data = wire(*[ev("build", "x" * size)] * 50, OK_EVENT)
        with pytest.raises(confbuild.BuildFailed, match=error) if error else contextlib.nullcontext() as caught:
            assert relayed(tmp_path, data, max_log=limit)[0] is None
        assert caught is None or caught.value.error_type == "LimitError"

    @pytest.mark.parametrize("error_type", sorted(confbuild.FAILURES - confbuild.HOST_FAILURES))
    def test_told(self, tmp_path: Path, error_type: str) -> None:
        failure, events = relayed(tmp_path, wire(ev("detect"), failed_event("two\nlines\té", error_type), ev("build")))
        told = "in the VM: two lines é" if error_type == "InternalError" else "two lines é"  # which otherwise would blame the server
        assert failure is not None and (failure.error_type, str(failure), events) == (error_type, told, [ev("detect")])

    @pytest.mark.parametrize("lie", [ev("vm", "SEV-SNP guest: ready"), {"type": "vm"}, {"type": "vm", "msg": ["ready"], "x": 1}, {"type": "queued", "position": 7},
                                     ev("queued", "\x1b[2J\x7f"), {"type": "queued", "position": 0, "msg": ""}])
    @pytest.mark.parametrize("before", [[], [ev("init")], [ev("attest")]])
    def test_the_host_s_word(self, tmp_path: Path, caplog: pytest.LogCaptureFixture, lie: Any, before: list[Any]) -> None:
        """What only the host may say is dropped wherever a guest says it, however it is cut, and the server's log tells it once."""
        data = wire({"type": "queued", "position": 0}, *before, lie, lie, ev("attest"), OK_EVENT)
        for blocks in ([data], [data[n:n + 1] for n in range(len(data))]):
            caplog.clear()
            assert relayed(tmp_path, *blocks) == (None, [*before, ev("attest")])
            [record] = caplog.records
            assert "said what only its host may say, which is dropped: {'type': " in record.getMessage() and record.getMessage().isprintable()

    def test_an_honest_agent(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Its own queue is dropped without a word."""
        assert relayed(tmp_path, wire({"type": "queued", "position": 0}, ev("build"), OK_EVENT)) == (None, [ev("build")])
        assert caplog.records == []

    @pytest.mark.parametrize("idle", [b": x\n\n", wire(ev("vm")), wire({"type": "queued", "position": 0})])
    def test_max_dropped(self, tmp_path: Path, idle: bytes) -> None:
        """What is dropped counts as well: nothing keeps a slot busy for ever."""
        with pytest.raises(confbuild.BuildFailed, match="^the build's log has more than 3000 bytes$") as caught:
            relayed(tmp_path, *[idle] * 1000, max_log=3000)
        assert caught.value.error_type == "LimitError"

    @example([(2, "x"), (3, "data: x"), (4, "id: 1"), (4, "\ndata: {}\n\n"), (5, "data: ")], [], False)  # what a message may say
    @given(st.lists(st.tuples(st.integers(2, 6), st.text(max_size=20)), max_size=12), st.lists(st.integers(0, 2000), max_size=8), st.booleans())
    def test_any_split(self, tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, str]], cuts: list[int], comments: bool) -> None:
        """The same log however the stream is cut into blocks: `queued` and comments are left out, all else is taken over."""
        events = [ev(confbuild.PHASES[phase], text) for phase, text in sorted(drawn, key=lambda pair: pair[0])]
        whole = [{"type": "queued", "position": 0}, *events, OK_EVENT]
        comment = b": keepalive\n\n" * comments
        data = comment + b"".join(frame + comment for frame in frames([confbuild.compact_json(event) for event in whole]))
        at = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
        for blocks in ([data], [data[a:b] for a, b in itertools.pairwise(at)], [data[n:n + 1] for n in range(len(data))]):
            failure, got = relayed(tmp_path_factory.getbasetemp(), *blocks)
            assert failure is None and got == events

    @pytest.mark.parametrize("size", [0, 1, 2, 3, 786_431, 786_432, 786_433])
    def test_request_body(self, tmp_path: Path, size: int) -> None:
        data = random.Random(size).randbytes(size)
        (tmp_path / "source").write_bytes(data)
        blocks, length = confbuild.request_body(confbuild.BuildRequest(NONCE, source_name="é.zip"), str(tmp_path / "source"))
        body = b"".join(blocks)
        assert len(body) == length and json.loads(body) == {"nonce": NONCE, "source_name": "é.zip", "source_data": base64.b64encode(data).decode()}
        blocks, length = confbuild.request_body(confbuild.BuildRequest(NONCE, "https://x/y", "main"), None)
        assert json.loads(b"".join(blocks)) == {"nonce": NONCE, "repo_url": "https://x/y", "repo_ref": "main"}

    @pytest.mark.parametrize(("made", "cut", "error_type", "fragment"), [
        (bundle(), None, "", ""), (bundle(nonce="ff" * 16), None, "AttestationError", "does not verify"),
        (bundle(), 40, "AttestationError", "the result: "), (bundle(), 0, "AttestationError", "the result: "),
        (None, None, "LimitError", "more than 10 bytes")])
    def test_result(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: confbuild.BundleFiles | None, cut: int | None,
                    error_type: str, fragment: str) -> None:
        """A bundle of another nonce, or none at all, never becomes a result."""
        (tmp_path / "demo").write_bytes(b"artifact")
        files = made or bundle()
        confbuild.write_archive(str(tmp_path / "a"), "demo", provenance_of(files), files.evidence, [("demo", str(tmp_path / "demo"))])
        data = (tmp_path / "a").read_bytes()[:cut]
        if made is None:
            monkeypatch.setattr(confbuild, "MAX_RESULT", 10)
        job = confbuild.Job("id", str(tmp_path), confbuild.JobRecord(1, confbuild.BuildRequest(NONCE)))
        with pytest.raises(confbuild.BuildFailed, match=fragment) if error_type else contextlib.nullcontext() as caught:
            assert Path(confbuild._fetch_result(Blocks(data), job, confbuild.Expectations(nonce=NONCE))).read_bytes() == data  # type: ignore[arg-type]
        assert caught is None or caught.value.error_type == error_type and str(tmp_path) not in str(caught.value)

    def test_a_result_that_breaks_off(self, tmp_path: Path) -> None:
        answer = Blocks(b"some")
        answer.headers["Content-Length"] = "5"
        with pytest.raises(confbuild.BuildFailed, match="broke off after 4 bytes") as caught:
            confbuild._fetch_result(answer, confbuild.Job("id", str(tmp_path), confbuild.JobRecord(1, confbuild.BuildRequest(NONCE))), confbuild.Expectations())  # type: ignore[arg-type]
        assert caught.value.error_type == "VmError"

    @pytest.mark.parametrize(("program", "fragment"), [
        (["false"], "ended while it booted|went away"), (["sh", "-c", "read x; exit 1"], "ended while it booted"),
        (["sh", "-c", "read x; echo hello; sleep 60"], "ended while it booted"),
        (["sh", "-c", "read x; sleep 60"], "did not boot within 0.3 s"), (["sh", "-c", "read x; echo 1; sleep 60"], "went away")])
    def test_no_vm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: list[str], fragment: str) -> None:
        """A VM that does not boot, or that does not answer, is VmError, and nothing of it is left."""
        monkeypatch.setattr(confbuild, "own_program", lambda: program)
        made: list[confbuild.SimulatedVm] = []

        def make() -> confbuild.SimulatedVm:
            made.append(confbuild.SimulatedVm(confbuild.SourcePolicy()))
            return made[-1]

        jobs = confbuild.Jobs(str(tmp_path), confbuild.VmHost(make, no_fetcher, boot_timeout_s=0.3).run, lambda log: None)
        job = jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)
        with pytest.raises(confbuild.BuildFailed, match=fragment) as caught:
            confbuild.VmHost(make, no_fetcher, boot_timeout_s=0.3).run(jobs, job)
        assert caught.value.error_type == "VmError" and not os.path.exists(made[0].workspace)
        made[0].destroy()
        for call in (made[0].spawn, lambda: made[0].wait_ready(1)):
            with pytest.raises(confbuild.BuildFailed, match="destroyed before it was started|the VM is gone"):
                call()

    @pytest.mark.parametrize(("where", "disk"), [("make", "TMPDIR"), ("spawn", "TMPDIR"), ("tell", "state"), ("events", "state"), ("result", "state"),
                                                  ("guest", "state"), ("guest in TMPDIR", "TMPDIR"), ("guest's hashes", "state")])
    def test_no_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, disk: str) -> None:
        """Whatever a full disk forbids the host of a build, the build ends with LimitError, which names the disk by what it is for, and nothing is left of the VM."""
        full = OSError(errno.ENOSPC, "No space left on device", "/secret/path")
        (tmp_path / "vms").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "vms"))
        guest = confbuild.Guest("qemu", small_image(tmp_path / "image") if where == "guest's hashes" else guest_image(), network=True)

        def make() -> Any:
            with monkeypatch.context() as m:
                if where in ("make", "guest", "guest in TMPDIR"):
                    m.setattr(tempfile, "mkdtemp", raising(full))
                vm = confbuild.QemuVm(guest, {}, None if "TMPDIR" in where else str(tmp_path / "vms")) if "guest" in where else confbuild.SimulatedVm(confbuild.SourcePolicy())
            if where == "spawn":
                monkeypatch.setattr(os, "mkdir", raising(full))
            elif where == "guest's hashes":
                os.symlink("/dev/full", os.path.join(vm._workspace, "hashes"))  # type: ignore[union-attr]
            elif "guest" not in where:
                vm.label, vm.port = "stand-in", 1  # type: ignore[misc]
                monkeypatch.setattr(vm, "is_alive", lambda: True)
            return vm

        def drive(*_: Any) -> str:
            if where == "events":
                job.log = types.SimpleNamespace(size=0, append=raising(full))  # type: ignore[assignment]
                confbuild.relay_events(Blocks(wire(ev("build"))), job.log, 1000)  # type: ignore[arg-type]
            monkeypatch.setattr(confbuild, "_check_result", raising(full))
            return confbuild._fetch_result(None, job, confbuild.Expectations())  # type: ignore[arg-type]

        host = confbuild.VmHost(make, no_fetcher)
        monkeypatch.setattr(host, "_drive", confbuild.room_on(confbuild.STATE)(drive))
        jobs = confbuild.Jobs(str(tmp_path / "state"), host.run, lambda log: None)
        job = jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)
        if where == "tell":
            job.log = types.SimpleNamespace(append=raising(full))  # type: ignore[assignment]
        with pytest.raises(confbuild.BuildFailed) as caught:
            host.run(jobs, job)
        assert (caught.value.error_type, str(caught.value)) == ("LimitError", f"the disk of the server's {disk} is full: No space left on device")
        assert list((tmp_path / "vms").iterdir()) == []

    def test_no_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
        with pytest.raises(confbuild.BuildFailed, match="^there is no folder for the VM: No such file or directory$") as caught:
            confbuild.SimulatedVm(confbuild.SourcePolicy())
        assert caught.value.error_type == "VmError"

    def test_no_room_to_boot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A VM that ends at once on a full disk has ended for that."""
        monkeypatch.setattr(confbuild, "own_program", lambda: ["true"])
        vm = confbuild.SimulatedVm(confbuild.SourcePolicy())
        vm.spawn()
        with monkeypatch.context() as m:
            m.setattr(confbuild, "has_room", lambda folder: folder != vm.workspace)
            with pytest.raises(confbuild.BuildFailed, match="^the disk of the server's TMPDIR is full$") as caught:
                vm.wait_ready(20)
        assert caught.value.error_type == "LimitError"
        vm.destroy()

    @pytest.mark.parametrize(("status", "error_type"), [(507, "LimitError"), (503, "VmError")])
    def test_not_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, error_type: str) -> None:
        """An agent that has no room for the source says so."""
        class Connection:
            def request(self, *_: Any) -> None:
                pass

            def getresponse(self) -> Any:
                return types.SimpleNamespace(status=status, read=lambda _: b'{"detail":"no"}')

            def close(self) -> None:
                pass

        monkeypatch.setattr(http.client, "HTTPConnection", lambda *_, **__: Connection())
        host = stand_in_host(tmp_path)
        with pytest.raises(confbuild.BuildFailed, match=f"the VM did not take the build: {status} ") as caught:
            host._drive(StandInVm(), confbuild.Job("id", str(tmp_path), confbuild.BuildRequest(NONCE, "u")), confbuild.BuildRequest(NONCE, "u"), None)  # type: ignore[arg-type]
        assert caught.value.error_type == error_type

    def test_long_in_the_log(self, tmp_path: Path) -> None:
        """An event that is short as it comes, and long as the log writes it, is too long; the longest line of a build is not."""
        with pytest.raises(confbuild.BuildFailed, match="more than 2 MiB"):
            relayed(tmp_path, wire('{"type":"build","msg":"' + "\x7f" * (1 << 19) + '"}'))
        line = "\U0001f600\x7f" * (confbuild.MAX_LINE // 2)
        assert relayed(tmp_path, wire(ev("build", line), OK_EVENT)) == (None, [ev("build", line)])

    @pytest.mark.parametrize("how", ["delete", "murder"])
    def test_everything_dies(self, server: Callable[..., Server], how: str) -> None:
        """A cancelled build, and one whose agent is killed: all that it started is dead within two seconds, daemons too, reaped
        as well, and so is the workspace; the server then builds on."""
        s = server()
        daemon = "setsid sh -c 'echo $$ >> pids; setsid sh -c \"echo \\$\\$ >> pids; sleep 300\" & sleep 300' &\n"
        many = "mkdir -p m; cd m; for i in $(seq 1500); do : > $i; done; cd ..\n"
        job = s.submit(project(f"{many}echo $$ > pids; {daemon}while [ $(wc -l < pids) -lt 3 ]; do sleep 0.01; done; echo $PPID $(cat pids) $PWD; sleep 300"))
        agent, *pids, workspace = until(s, job)["msg"].split()
        if how == "delete":
            answer = s.request("DELETE", f"/build/{job}")
            assert answer[0] == 200, answer
        else:
            os.kill(int(agent), signal.SIGKILL)
        wait_for(lambda: not any(living(int(pid)) for pid in pids))
        result = s.events(job)[-1]["result"]
        assert result["error_type"] == ("Cancelled" if how == "delete" else "VmError") and len(pids) == 3
        assert not os.path.exists(workspace)
        assert s.events(s.submit())[-1]["result"] == {"status": "ok"}
        assert s.process is not None
        assert Path(f"/proc/{s.process.pid}/task/{s.process.pid}/children").read_text() == ""  # no zombie either
        assert "Traceback" not in s.stop()


# Run by a build: each attack, then what every build needs. Prints a line of JSON: name -> the error's name, or what it got, or nothing where it was to work.
HOSTILE = r'''
import ctypes, errno, json, os, signal, socket, subprocess, sys, tempfile
given, libc, got = json.load(open("given.json")), ctypes.CDLL(None, use_errno=True), {}
state, job, port = given["state"], given["job"], given["port"]
agent, log = os.path.join(os.environ["HOME"], "../agent"), f"{state}/jobs/{job}/events"
ancestors = [os.getppid()]
while ancestors[-1] > 1:
    ancestors.append(int(open(f"/proc/{ancestors[-1]}/stat").read().rpartition(")")[2].split()[1]))
outside = [pid for pid in ancestors if pid > 1 and b"confbuild" in open(f"/proc/{pid}/cmdline", "rb").read()][:2]

def attempt(name, act, fine=False):
    try:
        result = act()
        got[name] = "" if fine else f"succeeded: {result!r:.100}"
    except OSError as e:
        got[name] = errno.errorcode.get(e.errno, str(e))

def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result

def connect(family, protocol, address, flags=None):
    with socket.socket(family, socket.SOCK_STREAM, protocol) as s:
        s.settimeout(5)
        return s.connect(address) if flags is None else s.sendto(b"x", flags, address) if flags else s.sendmsg([b"x"], [], 0x20000000, address)

def listen(address):
    with socket.socket(socket.AF_INET6) as s:
        s.bind(address)
        s.listen()

def through_link(target):
    os.path.lexists("link") and os.unlink("link")
    os.symlink(target, "link")
    return open("link", "rb").read(1)

for path in (f"{state}/jobs/{job}/job.json", log, given["secret"], given["token"]):
    attempt(f"read {path}", lambda: open(path, "rb").read(1))
    attempt(f"read {path} by a link", lambda: through_link(path))
    attempt(f"read {path} by way of /proc", lambda: open(f"/proc/self/root{path}", "rb").read(1))
    attempt(f"link {path}", lambda: os.link(path, "hard"))
    attempt(f"move {path}", lambda: os.rename(path, "moved"))
for path in (state, f"{state}/jobs", agent, os.path.join(os.environ["HOME"], ".."), tempfile.gettempdir() + "/../..", given["home"]):
    attempt(f"list {path}", lambda: os.listdir(path))
    attempt(f"write in {path}", lambda: open(path + "/planted", "w"))
    attempt(f"make a folder in {path}", lambda: os.mkdir(path + "/planted"))
attempt("write the log", lambda: open(log, "ab"))
attempt("truncate the log", lambda: os.truncate(log, 0))
attempt("remove the log", lambda: os.unlink(log))
attempt("write in /dev/shm", lambda: open("/dev/shm/planted", "w"))
attempt("write in /tmp", lambda: open("/tmp/planted", "w"))
attempt("change the kernel", lambda: open("/proc/sys/kernel/core_pattern", "r+"))
attempt("make a device", lambda: os.mknod("device", 0o600 | 0o20000, os.makedev(1, 3)))
attempt("mount", lambda: call("mount", b"none", os.getcwd().encode(), b"tmpfs", 0, None))
attempt("enter namespaces", lambda: (call("unshare", 0x10000000 | 0x20000), call("mount", b"/", os.getcwd().encode(), None, 4096, None)))
for pid in outside:
    attempt(f"signal {pid}", lambda: os.kill(pid, 0))
    attempt(f"signal {pid} by its descriptor", lambda: signal.pidfd_send_signal(os.pidfd_open(pid), 0))
    attempt(f"limit {pid}", lambda: call("prlimit", pid, 7, b"\xff" * 16, None))
    attempt(f"trace {pid}", lambda: call("ptrace", 16, pid, None, None))
    attempt(f"read the memory of {pid}", lambda: call("process_vm_readv", pid, None, 0, None, 0, 0) or open(f"/proc/{pid}/mem", "rb"))
    attempt(f"take a file of {pid}", lambda: call("syscall", 438, os.pidfd_open(pid), 0, 0))
    for name in ("environ", "fd/0", "root/etc", "cwd/agent"):
        path = f"/proc/{pid}/{name}"
        attempt(path, lambda: os.listdir(path) if "/" in name[2:] else open(path, "rb").read())
for name, address in (("127.0.0.1", (socket.AF_INET, ("127.0.0.1", port))), ("mapped", (socket.AF_INET6, ("::ffff:127.0.0.1", port)))):
    for protocol in (0, 262):
        attempt(f"connect to {name} over {protocol}", lambda: connect(address[0], protocol, address[1]))
    for flags in (0x20000000, 0):
        attempt(f"fast open to {name} {flags}", lambda: connect(address[0], 0, address[1], flags))
attempt("connect with SMC", lambda: connect(43, 0, ("127.0.0.1", port)))
attempt("listen in the service's place", lambda: listen(("::1", port)))
attempt("io_uring", lambda: call("syscall", 425, 1, b"\0" * 120))
attempt("keys", lambda: call("syscall", given["keyctl"], 0, -4, 0))
attempt("an abstract socket", lambda: connect(socket.AF_UNIX, 0, "\0" + given["abstract"]))
attempt("a socket with a path", lambda: connect(socket.AF_UNIX, 0, given["socket"]))
attempt("a datagram to a path", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", given["socket"]))
attempt("raise a limit", lambda: call("prlimit", 0, 1, b"\xff" * 16, None))
attacks, got = got, {}

def own_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        connect(socket.AF_INET, 0, s.getsockname())

def own_child():
    with subprocess.Popen(["sleep", "300"]) as child:
        child.kill()

for path in ("file", os.environ["HOME"] + "/file", os.environ["TMPDIR"] + "/file", os.environ["CARGO_HOME"] + "/file", "/dev/null"):
    attempt(f"write {path}", lambda: open(path, "w").write("x"), True)
for path in ("/etc/passwd", "/proc/self/status", "/proc/meminfo", "/dev/urandom", given["readable"] + "/file", "/etc/resolv.conf"):
    attempt(f"read {path}", lambda: open(path, "rb").read(1), True)
attempt("list /usr", lambda: os.listdir("/usr"), True)
attempt("move between folders", lambda: os.rename(os.environ["TMPDIR"] + "/file", os.environ["HOME"] + "/other"), True)
attempt("link between folders", lambda: os.link("file", os.environ["HOME"] + "/linked"), True)
attempt("a pair of sockets", socket.socketpair, True)
attempt("a port of its own", own_port, True)
attempt("a process of its own", own_child, True)
attempt("a shell", lambda: subprocess.run(["sh", "-c", "cd / && echo x | cat > /dev/null"], check=True), True)
print(json.dumps([attacks, got]))
'''
REFUSALS = {"EACCES", "EPERM", "EXDEV", "ENOSYS", "ENOTSUP", "EPROTONOSUPPORT", "EAFNOSUPPORT"}
SANDBOX, NO_LANDLOCK, NO_SECCOMP = confbuild.probe_sandbox()
KEPT = confbuild.judge_protections(SANDBOX.abi, NO_LANDLOCK, NO_SECCOMP, "")
needs_sandbox = pytest.mark.skipif(any(KEPT.values()), reason=f"{KEPT}: boot Linux 6.12 or later with landlock in `lsm=`")


class TestSandboxedBuilds:
    @needs_sandbox
    def test_hostile_build(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """What a build tries against its host is refused, each for its own reason, and what builds need works."""
        for name in ("secret", "token", "readable/file"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("t0")
        s = server("--token-file", str(tmp_path / "token"), "--readable", sys.base_prefix, "--readable", str(tmp_path / "readable"), "--readable", str(Path(sys.executable).resolve().parent))
        s.headers = {"Authorization": "Bearer t0"}
        finished = s.submit()
        assert s.events(finished)[-1] == OK_EVENT
        before = {path: path.read_bytes() for path in (s.state / "jobs" / finished).iterdir()}
        with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
            for listener, address in ((abstract, "\0confbuild-test-" + tmp_path.name), (named, str(tmp_path / "socket"))):
                listener.bind(address)
                listener.listen()
            given = {"state": str(s.state), "job": finished, "port": s.port, "secret": str(tmp_path / "secret"), "token": str(tmp_path / "token"),
                     "home": os.path.expanduser("~"), "readable": str(tmp_path / "readable"), "socket": str(tmp_path / "socket"), "abstract": "confbuild-test-" + tmp_path.name,
                     "keyctl": FORBIDDEN[os.uname().machine]["keyctl"]}
            job = s.submit(project(f"{os.path.realpath(sys.executable)} -I -S hostile.py || exit 9\n{QUICK}", **{"hostile.py": HOSTILE, "given.json": json.dumps(given)}))
            events = s.events(job)
        assert events[-1] == OK_EVENT, "\n".join(event.get("msg", "") for event in events)
        attacks, needed = json.loads(next(event["msg"] for event in events if event["type"] == "build" and event["msg"].startswith("[")))
        assert len(attacks) > 70 and {name: what for name, what in attacks.items() if what not in REFUSALS} == {}
        assert {name: what for name, what in needed.items() if what} == {}
        assert {path: path.read_bytes() for path in before} == before

    @needs_sandbox
    def test_limits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub_path: str) -> None:
        """A file of more than the limit ends the tool; no core is dumped; root's processes are not counted, those of other users are."""
        monkeypatch.setenv("PATH", stub_path)
        box = SANDBOX._replace(readable=confbuild.readable_paths({"PATH": stub_path}, "/nonexistent"), file_bytes=1 << 20, processes=1000)

        def run(build: str) -> tuple[list[str], str]:
            host = confbuild.VmHost(lambda: confbuild.SimulatedVm(confbuild.SourcePolicy(), sandbox=box), no_fetcher)
            jobs = confbuild.Jobs(tempfile.mkdtemp(dir=tmp_path), host.run, lambda log: None)
            archive = tmp_path / "archive"
            archive.write_bytes(tarball(project(build)))
            job = jobs.submit(confbuild.BuildRequest(NONCE, source_name="demo.tar.gz"), str(archive))
            jobs.start()
            wait_for(lambda: jobs.describe(job)["status"] in ("ok", "failed"))
            jobs.stop(0)
            log = (Path(job.folder) / "events").read_text()
            return [json.loads(line[6:])["msg"] for line in log.split("\n") if '"build"' in line], jobs.describe(job).get("error", "")

        lines, error = run(f"grep -E 'processes|core|file size' /proc/self/limits; head -c 1000000 /dev/zero > fits\n{QUICK}")
        limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
        assert limits["Max file size"] == ["1048576"] * 2 and limits["Max core file size"] == ["0"] * 2 and int(limits["Max processes"][0]) >= 1000
        assert error == ""
        assert run(f"exec head -c 2000000 /dev/zero > big\n{QUICK}")[1] == f"cargo build --locked --release ended with signal {signal.SIGXFSZ.value}"

    @needs_sandbox
    def test_nested(self, tmp_path: Path, stub_path: str) -> None:
        """A service in a sandbox of the same kind has one for its builds."""
        write_files(tmp_path / "work/demo", project("cat ../../../secret || echo refused\n" + QUICK))
        (tmp_path / "secret").write_text("secret")
        outer = confbuild.Confinement(SANDBOX._replace(readable=["/"]), str(tmp_path), ("work",))
        env = {**os.environ, "PATH": stub_path, "TMPDIR": str(tmp_path / "work")}
        with outer.start([*PROGRAM, "build", "demo", "--require-isolation", "--output", "plain"], cwd=tmp_path / "work", env=env, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True) as child:
            text = child.communicate()[0]
        assert child.returncode == 0 and "host protected: files, sockets, signals, ports, limits" in text and "refused" in text

    def test_require_isolation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """Without the protections nothing is started, and the refusal names each; without the option, everybody is told."""
        monkeypatch.setattr(confbuild, "probe_sandbox", lambda: (confbuild.Sandbox(), "no Landlock", "no seccomp"))
        (tmp_path / "demo").mkdir()
        for command in (["serve", "--state", str(tmp_path / "state")], ["build", str(tmp_path / "demo")]):
            monkeypatch.setattr(sys, "orig_argv", [])
            assert confbuild.main([*command, "--require-isolation"]) == 2
            assert capsys.readouterr() == ("", (
                "confbuild: error: --require-isolation: builds here would run without the protection of files (no Landlock), sockets (no Landlock), "
                "signals (no Landlock), ports (no Landlock)\n"
                "confbuild: hint: leave the option out to build without it, or build in guests: --tee or --vm qemu\n"))
            assert os.listdir(tmp_path) == ["demo"]
        options = confbuild.build_parser().parse_args(["serve"])
        machine = confbuild._prepare_machine(options)
        assert machine.note.endswith("host protected: limits; not protected: files, sockets, signals, ports")
        described = confbuild._describe_server(options, machine)
        assert described["isolation"].startswith("none: ") and described["protections"] == {
            **dict.fromkeys(("files", "sockets", "signals", "ports"), "no Landlock"), "limits": "in effect"}

    @pytest.mark.parametrize(("listen", "env", "why"), [
        ("[::1]:443", {}, "builds fetch from port 443, on which the service listens"), ("127.0.0.1:0", {}, ""), ("127.0.0.1:8080", {}, ""),
        ("127.0.0.1:3128", {"https_proxy": "http://127.0.0.1:3128"}, "builds fetch from port 3128, on which the service listens")])
    def test_port_that_builds_need(self, monkeypatch: pytest.MonkeyPatch, listen: str, env: Mapping[str, str], why: str) -> None:
        monkeypatch.setattr(confbuild, "probe_sandbox", lambda: (confbuild.Sandbox(7, True), "", ""))
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        machine = confbuild._prepare_machine(confbuild.build_parser().parse_args(["serve", "--listen", listen]))
        assert machine.protections == {"files": "", "sockets": "", "signals": "", "ports": why, "limits": ""}

    def test_options(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        for arguments, said in (
                (["serve", "--readable", str(tmp_path / "gone")], f"--readable {tmp_path}/gone: there is no such file or folder"),
                (["build", str(tmp_path), "--server", "http://127.0.0.1:1", "--readable", "/usr"], "--readable: that is the server's to say"),
                (["build", str(tmp_path), "--server", "http://127.0.0.1:1", "--require-isolation"], "--require-isolation: that is the server's to say"),
                (["serve", "--vm", "qemu", "--readable", "/usr"], "--readable goes with simulated VMs"),
                (["serve", "--tee", "--no-isolation"], "--no-isolation goes with simulated VMs"),
                (["build", str(tmp_path), "--server", "http://127.0.0.1:1", "--no-isolation"], "--no-isolation: that is the server's to say")):
            assert confbuild.main(arguments) == 2 and capsys.readouterr().err == f"confbuild: error: {said}\n"

    def test_no_isolation(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """For builds that need more than a sandbox lets them: they do what the server's user may, and everybody is told."""
        s = server("--no-isolation")
        job = s.submit(project(f"echo written > {tmp_path}/outside\n{QUICK}"))
        assert s.events(job)[-1] == OK_EVENT and (tmp_path / "outside").read_text() == "written\n"
        assert set(json.loads(s.request("GET", "/config")[2])["protections"].values()) == {"switched off by --no-isolation"}
        assert b"; not protected: files, sockets, signals, ports, limits\n" in s.request("GET", f"/build/{job}/events")[2]
        assert s.events(s.submit(project("kill -9 $PPID; sleep 60")))[-1]["result"]["error_type"] == "VmError"

    def test_what_is_said(self, server: Callable[..., Server]) -> None:
        """/config and the first comment of a stream say which protections are in effect, and no others."""
        s = server()
        protections = json.loads(s.request("GET", "/config")[2])["protections"]
        assert protections == {name: why or "in effect" for name, why in KEPT.items()}
        body = s.request("GET", f"/build/{s.submit()}/events")[2].decode()
        assert body.partition("\n")[0] == (": simulated VM: not confidential; the evidence is signed by no hardware; " + confbuild.protection_text(KEPT))
        assert s.process is not None and s.process.stderr is not None
        assert s.process.stderr.readline() == f"confbuild: simulated VMs: builds are not confidential, and run as this user; {confbuild.protection_text(KEPT)}\n"


def counted(s: Server) -> int:
    """How many agents the server has."""
    assert s.process is not None
    return len(confbuild.descendants(s.process.pid))


def test_limit_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many lines of each second, and how many are left out."""
    now, told = [100.2], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limited = confbuild._limit_rate(told.append)
    for n in range(confbuild.CONSOLE_RATE + 5):
        limited(str(n))
    assert told == [str(n) for n in range(confbuild.CONSOLE_RATE)]
    now[0] = 101.0
    limited("next")
    limited("last")
    assert told[confbuild.CONSOLE_RATE:] == ["next (5 lines before it are left out)", "last"]


class StandInVm:
    """A VM that is ready at once."""

    platform, networked, label, port, token, alive, destroyed = "simulated", True, "", 0, "", True, False

    def __init__(self) -> None:
        self.gone = threading.Event()

    def spawn(self) -> int:
        return -1

    def wait_ready(self, timeout_s: float) -> None:
        self.port = 1

    def is_alive(self) -> bool:
        return self.alive

    def destroy(self, clean: bool = False) -> None:
        self.destroyed = True
        self.gone.set()


def stand_in_host(tmp: Path, *failures: Exception) -> confbuild.VmHost:
    """A host of VMs that are none; the first ones cannot be made."""
    left = list(failures)

    def make() -> Any:
        if left:
            raise left.pop(0)
        return StandInVm()

    return confbuild.VmHost(make, no_fetcher, 30)


@pytest.mark.parametrize(("error", "said"), [(http.client.IncompleteRead(b""), "its answer broke off"), (ConnectionResetError(104, "reset"), r"\[Errno 104\] reset"),
                                             (TimeoutError(), "TimeoutError")])
def test_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    """A VM that ends under a build is told of in words."""
    host = stand_in_host(tmp_path)
    monkeypatch.setattr(host, "_drive", raising(error))
    jobs = confbuild.Jobs(str(tmp_path), host.run, lambda log: None)
    with pytest.raises(confbuild.BuildFailed, match=f"^the VM went away: {said}$"):
        host.run(jobs, jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None))


class TestSpares:
    def test_warm(self, server: Callable[..., Server]) -> None:
        """A VM waits; one that dies is replaced; a build takes it, another one follows; what waits attests; nothing is left in the end."""
        s = server("--warm", "1")
        assert s.process is not None
        [first] = wait_for(lambda: confbuild.descendants(s.process.pid) if s.process else None)
        answer = s.request("GET", f"/attestation?nonce={NONCE}")
        assert answer[0] == 200 and answer[1]["Content-Type"] == "application/json"
        verdict = confbuild.verify_bundle(confbuild.BundleFiles(None, answer[2], {}), confbuild.Expectations(nonce=NONCE, evidence_only=True), NOW)
        assert verdict.verdict == "simulated" and verdict.claims["signed_data"] == "00" * 32 + NONCE + "00" * 16
        os.kill(first, signal.SIGKILL)
        [second] = wait_for(lambda: [pid for pid in confbuild.descendants(s.process.pid) if pid != first] if s.process else None)
        wait_for(lambda: s.request("GET", f"/attestation?nonce={NONCE}")[0] == 200)
        seen = {}
        job = s.submit(project(f"grep PPid /proc/$$/status; {QUICK}"))
        for event in s.events(job):
            seen[event["type"]] = event
        assert seen["complete"] == OK_EVENT
        wait_for(lambda: not living(second) and counted(s) == 1)
        left = confbuild.descendants(s.process.pid)
        assert second not in left and "has ended" in s.stop()
        wait_for(lambda: not any(map(living, left)))

    def test_on_demand(self, server: Callable[..., Server]) -> None:
        """Without --warm, the question boots the one VM that answers, which then waits for the next build."""
        s = server()
        assert counted(s) == 0
        assert s.request("GET", f"/attestation?nonce={NONCE}")[0] == s.request("HEAD", f"/attestation?nonce={NONCE}")[0] == 200
        assert counted(s) == 1
        assert s.events(s.submit())[-1] == OK_EVENT
        wait_for(lambda: counted(s) == 0)

    def test_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A VM that a build takes while it is asked is no answer: the next one is asked. One that stays, and fails, is."""
        host, asked = stand_in_host(tmp_path), []

        def ask(vm: Any, nonce: str) -> bytes:
            asked.append(vm)
            if len(asked) == 1:
                host._take_spare()
            if len(asked) in (1, 3):
                raise confbuild.BuildFailed("AttestationError", "accepts one build, and has accepted it")
            return b"{}"

        monkeypatch.setattr(host, "_ask_evidence", ask)
        host.start()
        assert host.attestation(NONCE) == b"{}" and asked[0] is not asked[1]
        with pytest.raises(confbuild.BuildFailed, match="accepts one build"):
            host.attestation(NONCE)
        host.stop()
        assert asked[1].destroyed and not host._alive.keys() - {asked[0]}

    def test_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Whatever keeps a spare from being made, the next is tried."""
        monkeypatch.setattr(confbuild, "RETRY_S", 0)
        host = stand_in_host(tmp_path, OSError(errno.ENOSPC, "No space left on device"), ValueError("closed file"), RuntimeError("can't start new thread"))
        host._warm = 1
        host.start()
        wait_for(lambda: host._spares)
        assert all(text in caplog.text for text in ("No space left", "closed file", "new thread"))
        host.stop()

    def test_stop_while_one_boots(self, tmp_path: Path) -> None:
        """A stop does not wait until a VM has booted."""
        host = stand_in_host(tmp_path)
        host._warm, made = 1, []

        class Slow(StandInVm):
            def wait_ready(self, timeout_s: float) -> None:
                made.append(self)
                assert self.gone.wait(PATIENCE)
                raise confbuild.BuildFailed("VmError", "the VM ended while it booted")

        host._make_vm = Slow  # type: ignore[assignment]
        host.start()
        wait_for(lambda: made)
        host.stop()
        assert not host._thread.is_alive() and made[0].destroyed and not host._alive

    def test_dead_before_the_build(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A build whose spare has died gets another VM."""
        host, driven = stand_in_host(tmp_path), list[Any]()

        def drive(vm: Any, *_: Any) -> str:
            driven.append(vm)
            return "path"

        monkeypatch.setattr(host, "_drive", drive)

        class Dying(StandInVm):
            def is_alive(self) -> bool:
                self.alive, alive = False, self.alive
                return alive

        dead = Dying()
        dead.port = 1
        host._spares.append(dead)  # type: ignore[arg-type]
        jobs = confbuild.Jobs(str(tmp_path), host.run, lambda log: None)
        assert host.run(jobs, jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)) == "path"
        assert dead.destroyed and driven[0] is not dead and driven[0].destroyed

    def test_crowd(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(confbuild, "MAX_WAITING", 0)
        with pytest.raises(confbuild.BuildFailed, match="0 others wait for a VM"):
            stand_in_host(tmp_path).attestation(NONCE)

    def test_destroyed_while_read(self) -> None:
        """Who waits for a VM's word learns at once that it is gone."""
        for _ in range(5):
            vm = confbuild.SimulatedVm(confbuild.SourcePolicy(), command="fetcher")
            vm._config = {}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(confbuild, "own_program", lambda: ["sh", "-c", "read x; exec sleep 300"])
                vm.spawn()
            with concurrent.futures.ThreadPoolExecutor() as pool:
                said = pool.submit(vm.read_line, 60)
                vm.destroy()
                try:
                    assert said.result(30) == b""
                except confbuild.BuildFailed as e:
                    assert str(e) == "the VM is gone"  # it was destroyed before it was asked

    def test_destroyed_before_it_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who is about to read, and who destroys meanwhile, do not wait for each other."""
        monkeypatch.setattr(confbuild, "own_program", lambda: ["sh", "-c", "read x; exec sleep 300"])
        vm = confbuild.SimulatedVm(confbuild.SourcePolicy())
        pid, lock, about = vm.spawn(), vm._reading, threading.Event()

        class Interrupted:
            def __enter__(self) -> None:
                lock.acquire()
                if not about.is_set():  # the reader
                    about.set()
                    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))  # killed and reaped

            def __exit__(self, *_: object) -> None:
                lock.release()

        vm._reading = Interrupted()  # type: ignore[assignment]
        said: list[bytes] = []
        threads = [threading.Thread(target=lambda: said.append(vm.read_line(60)), daemon=True), threading.Thread(target=vm.destroy, daemon=True)]
        threads[0].start()
        assert about.wait(20)
        threads[1].start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads) and said == [b""] and not os.path.exists(vm.workspace)

    @pytest.mark.parametrize("how", ["cancel", "stop"])
    def test_halted_while_it_boots(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        """The slot is free again: the next job is taken, or the server stops."""
        monkeypatch.setattr(confbuild, "own_program", lambda: ["sh", "-c", "read x; exec sleep 300"])
        made: list[confbuild.SimulatedVm] = []

        def make() -> confbuild.SimulatedVm:
            made.append(confbuild.SimulatedVm(confbuild.SourcePolicy()))
            return made[-1]

        jobs = confbuild.Jobs(str(tmp_path), confbuild.VmHost(make, no_fetcher, 60).run, lambda log: None)
        jobs.start()
        for number in range(3):
            job = jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)
            wait_for(lambda number=number: len(made) == number + 1 and made[number].is_alive())
            if how == "stop":
                break
            jobs.cancel(job)
            wait_for(lambda job=job: jobs.describe(job).get("error_type") == "Cancelled")
        jobs.stop(0)
        assert not any(thread.is_alive() for thread in jobs._threads)
        assert not any(os.path.exists(vm.workspace) for vm in made)

    def test_half_a_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A child that does not finish what it says is waited for as long as one that says nothing."""
        monkeypatch.setattr(confbuild, "own_program", lambda: ["sh", "-c", "read x; printf 80; exec sleep 300"])
        vm = confbuild.SimulatedVm(confbuild.SourcePolicy())
        vm.spawn()
        with pytest.raises(confbuild.BuildFailed, match="did not boot within 0.2 s"):
            vm.wait_ready(0.2)
        vm.destroy()

    def test_no_look_at_processes(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """A VM dies also where what it has started cannot be found."""
        monkeypatch.setattr(confbuild, "own_program", lambda: ["sh", "-c", "read x; exec sleep 300"])
        vm = confbuild.SimulatedVm(confbuild.SourcePolicy())
        pid = vm.spawn()
        with monkeypatch.context() as m:
            m.setattr(confbuild, "descendants", raising(OSError(errno.EMFILE, "Too many open files")))
            vm.destroy()
        assert not living(pid) and not os.path.exists(vm.workspace) and "Too many open files" in caplog.text

    @pytest.mark.parametrize("thrower", ["is_alive", "destroy", "spawn", "wait_ready"])
    def test_thread_that_is_thrown_into(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, thrower: str) -> None:
        """The thread "spares" survives whatever a VM raises, and keeps another one ready."""
        monkeypatch.setattr(confbuild, "RETRY_S", 0)
        host, thrown = stand_in_host(tmp_path), threading.Event()
        host._warm = 1

        class Throwing(StandInVm):
            def __getattribute__(self, name: str) -> Any:
                if name == thrower and not thrown.is_set():
                    thrown.set()
                    raise SystemError("thrown")
                return super().__getattribute__(name)

            def is_alive(self) -> bool:
                return thrower != "destroy" or thrown.is_set()  # else it is not destroyed

        host._make_vm = Throwing  # type: ignore[assignment]
        host.start()
        wait_for(lambda: thrown.is_set() and host._spares and "thrown" in caplog.text)
        assert host._thread.is_alive()
        host.stop()
        assert not host._thread.is_alive() and not host._alive

    def test_reaped_by_another(self) -> None:
        """A VM whose process somebody else has waited for is one that has ended."""
        child = subprocess.Popen(["true"])
        os.waitpid(child.pid, 0)
        assert confbuild._is_running(child) is False
        child.wait()

    def test_timer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """A build's timer dies of nothing, and neither does its slot of a VM that cannot be destroyed."""
        died: list[Any] = []
        monkeypatch.setattr(threading, "excepthook", died.append)
        over = threading.Event()

        class Stubborn(StandInVm):
            def destroy(self, clean: bool = False) -> None:
                raise SystemError("it will not go")

        def halt(*_: Any) -> None:
            over.set()
            raise SystemError("thrown")

        host = confbuild.VmHost(Stubborn, no_fetcher, 30, 0.01)  # type: ignore[arg-type]
        monkeypatch.setattr(host, "_drive", lambda *_: str(over.wait(20)))
        jobs = confbuild.Jobs(str(tmp_path), host.run, lambda log: None)
        job = jobs.submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)
        monkeypatch.setattr(jobs, "halt", halt)
        assert host.run(jobs, job) == "True"
        wait_for(lambda: f"job {job.id} is not stopped" in caplog.text)
        assert died == [] and "a VM is not destroyed" in caplog.text and not host._alive

    def test_dies_at_every_question(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody is kept waiting for evidence for ever."""
        host, asked = stand_in_host(tmp_path), list[Any]()

        def ask(vm: Any, nonce: str) -> bytes:
            asked.append(vm)
            vm.alive = False
            raise confbuild.BuildFailed("VmError", "the VM does not attest: reset")

        monkeypatch.setattr(host, "_ask_evidence", ask)
        host.start()
        with pytest.raises(confbuild.BuildFailed, match="reset"):
            host.attestation(NONCE)
        host.stop()
        assert len(asked) == confbuild.MAX_ATTEMPTS

    def test_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no VM boots, the reason is told."""
        monkeypatch.setattr(confbuild, "own_program", lambda: ["false"])
        host = confbuild.VmHost(lambda: confbuild.SimulatedVm(confbuild.SourcePolicy()), no_fetcher, 5)
        host.start()
        with pytest.raises(confbuild.BuildFailed, match="ended while it booted|Broken pipe"):
            host.attestation(NONCE)
        host.stop()
        with pytest.raises(confbuild.BuildFailed, match="no VM is ready"):
            host.attestation(NONCE)

# endregion 24
# ==============================================================================
# region 25. HTTP API
# ==============================================================================


GZIP = base64.b64encode(gzip.compress(b"any")).decode()
GOOD_REQUEST = {"nonce": NONCE, "source_data": GZIP, "source_name": "x.tgz"}
URL = {"nonce": NONCE, "repo_url": "http://127.0.0.1/x.git"}


class Site:
    """The API on a real socket in this process. Its builds wait for the gate, and then have a result."""

    def __init__(self, folder: Path, tokens: tuple[str, ...] = (), max_archive: int = 1 << 20, crowded: bool = False,
                 tls: ssl.SSLContext | None = None, **options: Any) -> None:
        self.gate = threading.Event()
        self.streamer = confbuild.Streamer()
        self.folder = folder
        (folder / "demo").write_bytes(b"artifact")
        options.pop("build_state", lambda _: None)(folder / "state")
        self.jobs = confbuild.Jobs(str(folder / "state"), self.build, self.streamer.grown, **options)
        policy = confbuild.SourcePolicy(max_archive=max_archive)
        api = confbuild.Api(self.jobs, policy, {"platform": "simulated"}, self.attest, b": hello\n\n", lambda: crowded)
        gate = confbuild.Gate(tokens, ["127.0.0.1", "build.example"])
        self.server = confbuild.Server(("127.0.0.1", 0), api, gate, self.streamer, tls)
        self.port = self.server.server_address[1]
        self.jobs.start()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def attest(self, nonce: str) -> bytes:
        """Of a VM that answers to one nonce alone."""
        if nonce != NONCE:
            raise confbuild.NoAttester("it is tired")
        return b"{}"

    def build(self, jobs: confbuild.Jobs, job: confbuild.Job) -> str:
        assert self.gate.wait(PATIENCE) and job.log
        job.log.append(confbuild.to_payloads("build", ["é", "two"]))
        files = bundle()
        confbuild.write_archive(str(self.folder / "made"), "demo", provenance_of(files), files.evidence, [("demo", str(self.folder / "demo"))])
        return str(self.folder / "made")

    def raw(self, data: bytes, method: str = "GET") -> tuple[int, Any, bytes]:
        """One answer to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), 30) as sock:
            sock.sendall(data)
            answer = http.client.HTTPResponse(sock, method=method)
            answer.begin()
            return answer.status, answer.headers, answer.read()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
        """One request, with exactly these headers beside Host and Content-Length; a dict goes as JSON."""
        named = {"Host": f"127.0.0.1:{self.port}", **({} if body is None else {"Content-Type": "application/json"})}
        named.update({name.replace("_", "-"): value for name, value in headers.items()})
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        if body is not None:
            named.setdefault("Content-Length", str(len(data)))
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value != "-")
        return self.raw(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + data, method)

    def finished(self) -> str:
        """The id of a build with a result."""
        job = str(json.loads(self.ask("POST", "/build", GOOD_REQUEST)[2])["job_id"])
        self.gate.set()
        wait_for(lambda: self.jobs.get(job).state == "ok")
        return job

    @staticmethod
    def large_result(job: confbuild.Job, size: int) -> bytes:
        """Give job another archive, of size bytes."""
        data = random.Random(1).randbytes(size)
        Path(job.result_path).write_bytes(data)
        job.record = job.record._replace(result={"size": size, "sha256": hashlib.sha256(data).hexdigest()})
        return data


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(**options: Any) -> Site:
        folder = tmp_path / f"site{len(made)}"
        folder.mkdir()
        made.append(Site(folder, **options))
        return made[-1]

    yield make
    for one in made:
        one.gate.set()
        one.jobs.stop(10)
        one.server.stop()
        one.streamer.stop()


def is_problem(answer: tuple[int, Any, bytes], status: int, error_type: str, fragment: str = "") -> None:
    """answer is problem details [RFC9457], with the two names of `complete`."""
    assert answer[0] == status, answer
    assert answer[1]["Content-Type"] == "application/problem+json" and re.fullmatch(r"[A-Za-z0-9._-]+", answer[1]["X-Request-Id"])
    doc = json.loads(answer[2])
    assert set(doc) == {"type", "title", "status", "detail", "error", "error_type"} and doc["status"] == status and doc["title"], doc
    assert doc["error_type"] == error_type and doc["error"] and fragment in doc["error"], doc


def jsonish(text: str) -> bytes:
    """A body whose keys beside the nonce are text."""
    return f'{{"nonce": "{NONCE}", {text}}}'.encode()


BODIES: list[tuple[Any, int, str, str]] = [
    (b"", 400, "InvalidJson", "not JSON"), (b"{", 400, "InvalidJson", "not JSON"), (b"\xff", 400, "InvalidJson", "not UTF-8"),
    (jsonish('"a": 1, "a": 2'), 400, "InvalidJson", "occurs twice"),
    (jsonish(f'"source_data": "{GZIP}", "source_data": "{GZIP}"'), 400, "InvalidJson", "occurs twice"),
    (jsonish('"a": NaN'), 400, "InvalidJson", "NaN"), (jsonish('"a": -Infinity'), 400, "InvalidJson", "Infinity"),
    (jsonish(f'"a": {2 ** 53 + 1}'), 400, "InvalidJson", "an integer beyond"),
    (jsonish(f'"a": {-2 ** 53 - 1}'), 400, "InvalidJson", "an integer beyond"),
    (jsonish('"a": ' + "[" * 32 + "]" * 32), 400, "InvalidJson", "nested deeper than 32"),
    (b"[]", 422, "InvalidRequest", "not an object"), (b"{}", 422, "InvalidRequest", "nonce is missing"),
    ({"nonce": 1}, 422, "InvalidRequest", "nonce is not a string"),
    ({"nonce": None}, 422, "InvalidRequest", "nonce is not a string"), ({**URL, "repo_ref": 1}, 422, "InvalidRequest", "repo_ref is not a string"),
    ({**GOOD_REQUEST, "source_data": 5}, 422, "InvalidRequest", "source_data is not a string"),
    ({**GOOD_REQUEST, "source_name": []}, 422, "InvalidRequest", "source_name is not a string"),
    *(({**URL, "nonce": nonce}, 400, "InvalidNonce", "16 bytes in hexadecimal: 32 digits, or a UUID") for nonce in (
        "", "ab", "g" * 32, NONCE + "00", NONCE[:-1] + "\u0661", NONCE + "\n", "{" + DASHED + "}", DASHED[:-1], DASHED.replace("-", "", 1))),
    ({"nonce": NONCE}, 400, "InvalidSource", "exactly one"), ({**URL, **GOOD_REQUEST}, 400, "InvalidSource", "exactly one"),
    ({"nonce": NONCE, "source_data": ""}, 400, "InvalidSource", "neither a ZIP"),
    ({"nonce": NONCE, "source_data": "aGVsbG8="}, 400, "InvalidSource", "neither a ZIP"),
    *(({"nonce": NONCE, "source_data": text}, 400, "InvalidSource", "not standard base64") for text in (
        GZIP[:-1], GZIP + "AAAA" if GZIP.endswith("=") else GZIP + "A", "H4s=" + GZIP, GZIP[:8] + "\n" + GZIP[8:], GZIP[:8] + "-_" + GZIP[10:],
        GZIP[:4] + "é" + GZIP[4:], "H4sI\\")),
    ({"nonce": NONCE, "repo_url": "ftp://x/y"}, 400, "ForbiddenUrl", ""), ({"nonce": NONCE, "repo_url": "https://u:p@x/y"}, 400, "ForbiddenUrl", ""),
    ({"nonce": NONCE, "repo_url": ""}, 400, "ForbiddenUrl", ""), ({"nonce": NONCE, "repo_url": "http://169.254.169.254/x"}, 400, "ForbiddenUrl", ""),
    ({**URL, "repo_ref": "--upload-pack=x"}, 400, "InvalidRef", ""), ({**GOOD_REQUEST, "repo_ref": "main"}, 400, "InvalidRef", "with repo_url only"),
    (jsonish('"a": "' + "x" * (64 << 10) + '"'), 413, "PayloadTooLarge", "beside source_data"),
    ({"nonce": NONCE, "source_data": base64.b64encode(gzip.compress(random.Random(1).randbytes(1 << 20))).decode()}, 413, "PayloadTooLarge",
     "more than 1048576"),
    (b" " * (2 << 20), 413, "PayloadTooLarge", "may have 1048576"),
]


# (first line, fields, status, what the answer has)
_HOST = [b"Host: localhost"]
HEADS: list[tuple[bytes, list[bytes], int, bytes]] = [
    *((b"GET /health HTTP/1.1", fields, 200, b"\r\n\r\nok") for fields in (
        _HOST, [b"host:localhost"], [b"HOST:\t localhost \t"], [b"Host: localhost:"], [b"Host: 127.0.0.1:1"], [*_HOST, b"X:"], [*_HOST, b"X: \xe9"],
        [*_HOST, b"Content-Length: 0"], [*_HOST, b"Expect: 100-continue"], [*_HOST, b"Connection: Keep-Alive, x"], [*_HOST, b"X: a", b"X: b"],
        [*_HOST, b"Upgrade: h2c"], [*_HOST, b"A!#$%&'*+-.^_`|~1: x"])),
    *((line, _HOST, 200, b"\r\n\r\nok") for line in (
        b"GET /health?x=%00 HTTP/1.1", b"GET /health? HTTP/1.1", b"GET //health HTTP/1.1", b"GET /health HTTP/1.2", b"GET /health HTTP/1.9",
        b"GET http://localhost/health HTTP/1.1", b"GET HTTP://LOCALHOST:80/health?x HTTP/1.1", b"GET https://127.0.0.1:/health HTTP/1.1",
        b"GET http://build.example/health HTTP/1.1")),
    (b"GET http://build.example/health HTTP/1.1", [b"Host: evil.example"], 200, b"ok"),  # [RFC9112 3.2.2]
    (b"GET http://build.example/health HTTP/1.0", [], 200, b"ok"), (b"GET /health HTTP/1.0", [], 200, b"ok"),
    (b"GET /health HTTP/1.0", [b"Connection: keep-alive"], 200, b"Connection: close"), (b"GET /health HTTP/1.0", [b"Expect: 100-continue"], 200, b"ok"),
    *((line, _HOST, 404, b"NotFound") for line in (
        b"GET http://localhost HTTP/1.1", b"GET http://localhost?/health HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT localhost:80 HTTP/1.1", b"GET / HTTP/1.1",
        b"GET /health#x HTTP/1.1")),
    (b"get /health HTTP/1.1", _HOST, 405, b"MethodNotAllowed"), (b"M-SEARCH /health HTTP/1.1", _HOST, 405, b"MethodNotAllowed"),
    *((line, [b"Host: localhost"], 421, b"MisdirectedRequest") for line in (
        b"GET http://evil.example/health HTTP/1.1", b"GET http://localhost.evil.example HTTP/1.1", b"GET http:///health HTTP/1.1")),
    *((b"GET /health HTTP/1.1", [field], 421, b"MisdirectedRequest") for field in (
        b"Host: evil.example", b"Host:", b"Host: localhost,evil.example", b"Host: [fe80::1%25eth0]:80", b"Host: localhost.")),
    *((b"GET /health HTTP/1.1", fields, 400, b"one Host field") for fields in (
        [], _HOST * 2, [*_HOST, b"hOST: evil.example"], [b"Host:", b"Host:"], [b"Host: a b"], [b"Host: user@localhost"], [b"Host: localhost/x"],
        [b"Host: localhost:80:80"], [b"Host: localhost:x"], [b"Host: [::1"], [b"Host: ::1"], [b"Host: http://localhost"], [b"Host: local\xe9"],
        [b"Host: localhost, localhost"], [b"X-Host: localhost"])),
    (b"GET /health HTTP/1.0", _HOST * 2, 400, b"one Host field"), (b"GET http://localhost/health HTTP/1.1", [], 400, b"one Host field"),
    *((b"GET /health HTTP/1.1", [*_HOST, field], 400, b"not a header field") for field in (
        b" folded", b"\tfolded", b"X: a\r\n b", b"X: a\r\n\tContent-Length: 5", b"X : a", b"X\t: a", b"Transfer-Encoding : chunked", b"X", b": a", b"X y: z",
        b"X\xe9: a", b"X(: a", b"GET /config HTTP/1.1")),
    (b"GET /health HTTP/1.1", [b" Host: localhost"], 400, b"not a header field"),
    *((b"GET /health HTTP/1.1", [*_HOST, field], 400, b"control character") for field in (
        b"X: a\rContent-Length: 5", b"X: a\r", b"X: \r", b"X: a\rHost: evil.example", b"\r", b"X: a\0b", b"X\0: a", b"X: \x0b", b"X: \x7f", b"X: \x1b[31m")),
    (b"GET /health HTTP/1.1\r", _HOST, 400, b"control character"), (b"GET /health\0 HTTP/1.1", _HOST, 400, b"control character"),
    (b"GET\r/health HTTP/1.1", _HOST, 400, b"control character"),
    *((line, _HOST, 400, b"first line") for line in (
        b"HELLO", b"GET /health", b"GET  /health HTTP/1.1", b"GET /health  HTTP/1.1", b"GET /health HTTP/1.1 ", b"GET\t/health\tHTTP/1.1", b"GET / b HTTP/1.1",
        b"GET /health http/1.1", b"GET /health HTTP/x.y", b"GET /health HTTP/1", b"GET /health HTTP/1.10", b"GET /health HTTP/01.1", b"GET /health HTTP/1,1",
        b"GET /health HTTP/+1.1", b"GET /health FTP/1.1", b"GET /h\xe9 HTTP/1.1", b"G@T /health HTTP/1.1", b"GET: /health HTTP/1.1", b"{} /health HTTP/1.1",
        b"Host: localhost")),
    *((line, _HOST, 400, b"neither a path nor a URL") for line in (
        b"GET health HTTP/1.1", b"GET localhost/health HTTP/1.1", b"GET ftp://localhost/health HTTP/1.1", b"GET http:/health HTTP/1.1",
        b"GET http://u:p@localhost/health HTTP/1.1", b"GET http://local|host/health HTTP/1.1", b"GET ** HTTP/1.1", b"GET ?x HTTP/1.1")),
    *((line, _HOST, 505, b"HTTP/1.1") for line in (
        b"GET /health HTTP/0.9", b"GET /health HTTP/2.0", b"GET /health HTTP/3.0", b"PRI * HTTP/2.0")),
    *((b"GET /health HTTP/1.1", [*_HOST, *fields], 411, b"LengthRequired") for fields in (
        [b"Content-Length: 1, 1"], [b"Content-Length: 5"] * 2, [b"Content-Length: 5", b"Content-Length: 6"], [b"Content-Length: +5"], [b"Content-Length: -1"],
        [b"Content-Length: 0x5"], [b"Content-Length: 5 5"], [b"Content-Length: 1_0"], [b"Content-Length:"], [b"Content-Length: 5;x"],
        [b"Content-Length: " + b"9" * 19], [b"Content-Length: \xb2"], [b"Content-Length: 5.0"], [b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: identity"], [b"Transfer-Encoding:"], [b"transfer-encoding: x", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 5"], [b"Content-Length: 5", b"Transfer-Encoding: xchunked"])),
    (b"GET /health HTTP/1.0", [b"Transfer-Encoding: chunked"], 411, b"LengthRequired"),
    (b"GET /health HTTP/1.1", [b"X: y"] * 101, 431, b"more than 100 fields"),
]


class TestBody:
    """The body of POST /build, in blocks."""

    TRICKS = (lambda t: t, lambda t: t.replace("/", "\\/"), lambda t: "".join(f"\\u{ord(c):04x}" if c in "+/=" else c for c in t),
              lambda t: "".join(f"\\u{ord(c):04X}" for c in t))

    @example(b"\xff\xef\xbe" * 3, 3, [], False)  # all escaped
    @given(st.binary(max_size=60), st.integers(0, 3), st.lists(st.integers(0, 10 ** 6), max_size=9), st.booleans())
    def test_any_split(self, tmp_path_factory: pytest.TempPathFactory, data: bytes, trick: int, cuts: list[int], late: bool) -> None:
        """However JSON writes the same string, and however it is cut: the same file, and the rest of the object is kept."""
        text = self.TRICKS[trick](base64.b64encode(b"\x1f\x8b\x08" + data).decode())
        other = '"x": {"source_data": ["source_data", "a\\"b"]}, "nonce": "source_data"'
        body = ("{" + (f'{other}, "source_data" : "{text}"' if late else f'"source_data":"{text}", {other}') + "}").encode()
        path = tmp_path_factory.getbasetemp() / "sink"
        at = sorted({0, len(body), *(cut % len(body) for cut in cuts)})
        for blocks in ([body[a:b] for a, b in itertools.pairwise(at)], [body[n:n + 1] for n in range(len(body))]):
            sink = confbuild.Base64File(str(path), 1000)
            reader = confbuild.BodyReader(sink)
            for block in blocks:
                reader.feed(block)
            sink.close()
            assert path.read_bytes() == b"\x1f\x8b\x08" + data and reader.captured
            assert json.loads(reader.kept) == {**json.loads(body), "source_data": ""}

    @pytest.mark.parametrize("pieces",
                             [["H4sI", "AA=="] + ["AAAA"], ["H4sIAA=", "=AAAA"], ["H4sI", "A"], ["H4sI", "A A="], ["H4s=I"], ["H4sI", "====", "AAAA"],
                                        ["H4sI\\u00"], ["H4sI\\x41AAA"], ["H4sI\\u00e9AAA"], ["H4sI\r\nAAAA"], ["H4sI-_AA"]])
    def test_bad_base64(self, tmp_path: Path, pieces: list[str]) -> None:
        for parts in (pieces, list("".join(pieces))):
            sink = confbuild.Base64File(str(tmp_path / "sink"), 1000)
            with pytest.raises(confbuild.Refused, match="not standard base64") as caught:
                for piece in parts:
                    sink.feed(piece.encode())
                sink.close()
            sink.abandon()
            assert (caught.value.status, caught.value.error_type) == (400, "InvalidSource")


class TestHttp:
    def test_bodies(self, site: Callable[..., Site]) -> None:
        """Every row of the first table of CONTRACT 1 that a body can bring about. None of them uses up a single-use server."""
        s = site(single_use=True)
        for body, status, error_type, fragment in BODIES:
            is_problem(s.ask("POST", "/build", body), status, error_type, fragment)
        assert os.listdir(s.jobs.incoming) == []
        status, headers, answer = s.ask("POST", "/build", {**GOOD_REQUEST, "nonce": DASHED, "unknown": [{"key": 1.5}], "repo_url": None, "a": 2 ** 53})
        assert status == 200 and headers["Content-Type"] == "application/json" and list(json.loads(answer)) == ["job_id"]
        is_problem(s.ask("POST", "/build", GOOD_REQUEST), 409, "AlreadyAccepted", "accepts one build")
        assert [job["nonce"] for job in s.jobs.newest(2)] == [NONCE]

    def test_escaped_name(self, site: Callable[..., Site]) -> None:
        """The same JSON, the same build: with escapes in the name, or in the value."""
        s = site()
        escaped = GZIP.replace("/", "\\/").replace("+", "\\u002b")
        for text in (f'"source_data": "{escaped}"', f'"source\\u005fdata": "{escaped}"', f'"source\\u005fdata": "\\u{ord(GZIP[0]):04x}{GZIP[1:]}"'):
            answer = s.ask("POST", "/build", jsonish(text))
            assert answer[0] == 200, (text, answer)
            source = s.jobs.get(s.jobs.newest(1)[0]["job_id"]).source
            assert source and Path(source).read_bytes() == base64.b64decode(GZIP)

    @pytest.mark.parametrize(("method", "path", "body", "headers", "status", "error_type", "more"), [
        ("POST", "/build", URL, {"Content_Type": "text/plain"}, 415, "UnsupportedMediaType", {}),
        ("POST", "/build", URL, {"Content_Type": "-"}, 415, "UnsupportedMediaType", {}),
        ("POST", "/build", URL, {"Content_Type": "application/x-www-form-urlencoded"}, 415, "UnsupportedMediaType", {}),
        ("POST", "/build", URL, {"Content_Length": "-"}, 411, "LengthRequired", {}),
        ("POST", "/build", URL, {"Content_Length": "-5"}, 411, "LengthRequired", {}),
        ("POST", "/build", URL, {"Content_Length": "+5"}, 411, "LengthRequired", {}),
        ("POST", "/build", b"0\r\n\r\n", {"Content_Length": "-", "Transfer_Encoding": "chunked"}, 411, "LengthRequired", {"Connection": "close"}),
        ("GET", "/health", None, {"Transfer_Encoding": "identity"}, 411, "LengthRequired", {"Connection": "close"}),
        ("GET", "/builds", None, {"Host": "evil.example"}, 421, "MisdirectedRequest", {}),
        ("GET", "/builds", None, {"Host": "127.0.0.1.evil.example:80"}, 421, "MisdirectedRequest", {}),
        ("POST", "/build", URL, {"Host": "evil.example:8080"}, 421, "MisdirectedRequest", {}),
        ("PUT", "/build", None, {}, 405, "MethodNotAllowed", {"Allow": "POST"}),
        ("GET", "/build", None, {}, 405, "MethodNotAllowed", {"Allow": "POST"}),
        ("HEAD", "/build", None, {}, 405, "", {"Allow": "POST"}),
        ("POST", "/health", None, {}, 405, "MethodNotAllowed", {"Allow": "GET, HEAD"}),
        ("PATCH", "/build/x", None, {}, 405, "MethodNotAllowed", {"Allow": "DELETE, GET, HEAD"}),
        ("OPTIONS", "/builds", None, {}, 405, "MethodNotAllowed", {"Allow": "GET, HEAD"}),
        ("BREW", "/builds", None, {}, 405, "MethodNotAllowed", {"Allow": "GET, HEAD"}),
        ("GET", "/nothing", None, {}, 404, "NotFound", {}), ("GET", "/v1/health", None, {}, 404, "NotFound", {}),
        ("GET", "/health/", None, {}, 404, "NotFound", {}),
        *((method, path, None, {}, 404, "NotFound", {}) for method, path in (
            ("GET", "/build/x"), ("DELETE", "/build/x"), ("GET", "/build/x/events"), ("GET", "/build/x/result"), ("GET", "/build/../x"),
            ("GET", "/build/%2e%2e/result"))),
    ])
    def test_refusals(self, site: Callable[..., Site], method: str, path: str, body: Any, headers: dict[str, str], status: int,
                      error_type: str, more: dict[str, str]) -> None:
        s = site(single_use=True)
        answer = s.ask(method, path, body, **headers)
        if method == "HEAD":
            assert (answer[0], answer[2]) == (status, b"")
        else:
            is_problem(answer, status, error_type)
        assert {name: answer[1][name] for name in more} == more
        assert s.ask("POST", "/build", URL)[0] == 200  # it is not used up

    def test_heads(self, site: Callable[..., Site]) -> None:
        """What RFC 9112 says of a head, or leaves to the server. Where a request is malformed, there is one answer, and nothing after it counts."""
        s = site()
        for line, fields, status, fragment in HEADS:
            data = line + b"\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n"
            with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
                sock.sendall(data + b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                got = read_all(sock)
            statuses = [int(code) for code in re.findall(rb"HTTP/1.1 (\d+) ", got)]
            assert statuses == ([status, 200] if status in (200, 404, 405, 421) and b"1.0" not in line else [status]), (line, fields, got)
            assert fragment in got, (line, fields, got)
            if status not in (200, 404, 405, 411, 421):
                assert json.loads(got.partition(b"\r\n\r\n")[2])["error_type"] == "BadRequest" and b"\r\nConnection: close\r\n" in got

    @pytest.mark.parametrize(("data", "status"), [
        (b"GET /health HTTP/1.1\rHost: localhost\r\r", 400), (b"\x16\x03\x01\x02\x00", 400), (b" ", 400), (b"\t", 400), (b"\0", 400), (b"\xff", 400),
        (b"\r\n\n\r\nGET /health HTTP/1.1\nHost: localhost\n\n", 200), (b"\rGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000, 414), (b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
        (b"GET /health HTTP/1.1\r\n" + (b"X: " + b"y" * 1000 + b"\r\n") * 70, 431)])
    def test_no_end_is_needed(self, site: Callable[..., Site], data: bytes, status: int) -> None:
        """What cannot become a request is refused at once. Empty lines before a request, and lines that end with LF, are allowed."""
        answer = site().raw(data)
        if status == 200:
            assert answer[::2] == (200, b"ok")
        else:
            is_problem(answer, status, "BadRequest")

    def test_parse_head(self) -> None:
        head = b"GET http://Build.example:80?from=1 HTTP/1.2\r\nHost: x\r\nA: 1\r\nb:\t2 3 \r\na:\r\n\r\n"
        assert confbuild.parse_head(head) == ("GET", "/?from=1", 1, {"host": "Build.example:80", "a": "1, ", "b": "2 3"})
        assert confbuild.parse_head(head.replace(b"\r\n", b"\n")) == confbuild.parse_head(head)
        fields = b"X:\r\n" * (confbuild.MAX_HEADERS - 1)
        assert confbuild.parse_head(b"GET / HTTP/1.1\r\nHost:x\r\n" + fields + b"\r\n").target == "/"
        size = confbuild.MAX_HEAD - len(b"GET / HTTP/1.0\r\n\r\n")
        assert confbuild.parse_head(b"GET /" + b"x" * size + b" HTTP/1.0\r\n\r\n").minor == 0
        for data, status in ((b"GET / HTTP/1.1\r\nHost:x\r\nX:\r\n" + fields + b"\r\n", 431), (b"GET /" + b"x" * (size + 1) + b" HTTP/1.0\r\n\r\n", 431)):
            with pytest.raises(confbuild.Refused) as e:
                confbuild.parse_head(data)
            assert e.value.status == status

    @given(st.lists(st.sampled_from([b"GET / HTTP/1.1", b"\r\n", b"\n", b"\r", b"Host: x", b"Host:", b" ", b"\0", b"a: b", b":", b"\t", b"http://", b"\xe9"])))
    def test_any_head(self, parts: list[bytes]) -> None:
        """A head is parsed or refused, and what is parsed has no line break, no NUL, and a host."""
        try:
            head = confbuild.parse_head(b"".join(parts) + b"\r\n\r\n")
        except confbuild.Refused as e:
            assert e.status in (400, 505)
        else:
            assert not set("\r\n\0") & set(head.target + "".join([*head.headers, *head.headers.values()])) and "host" in head.headers

    @pytest.mark.parametrize(("head", "status"), [
        (b"POST /build HTTP/1.1\r\nTransfer-Encoding: chunked", 411), (b"GET /health HTTP/1.1\r\nContent-Length: +%d", 411),
        (b"GET /health HTTP/1.1\r\nContent-Length: %d, 9", 411), (b"GET /health HTTP/1.1\r\nX y: z\r\nContent-Length: %d", 400),
        (b"GET /health HTTP/1.1\r\nTransfer-Encoding : chunked", 400), (b"GET /builds HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: %d", 411)])
    def test_smuggling(self, site: Callable[..., Site], head: bytes, status: int) -> None:
        """RFC 9112 11.2: where the end of a request is not certain, nothing after it is taken for another."""
        s = site(tokens=("secret",))
        inner = b"GET /config HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\nConnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
            sock.sendall((head % len(inner) if b"%d" in head else head) + b"\r\nHost: localhost\r\n\r\n" + inner)
            got = read_all(sock)
        assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"%d" % status] and b"platform" not in got

    @pytest.mark.parametrize("cancelled", [False, True])
    def test_a_full_disk(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, cancelled: bool) -> None:
        """A job that has ended says so when there is room again."""
        monkeypatch.setattr(confbuild, "RETRY_S", 0.05)
        s = site()
        ids = [json.loads(s.ask("POST", "/build", URL)[2])["job_id"] for _ in range(2)]
        job = s.jobs.get(ids[1 if cancelled else 0])
        wait_for(lambda: s.jobs.describe(s.jobs.get(ids[0]))["status"] == "running")
        log, real = s.jobs.log_of(job), confbuild.write_durably
        full = threading.Event()
        full.set()

        def write(path: str, data: bytes) -> None:
            if full.is_set() and job.id in path:
                raise OSError(28, "No space left on device")
            real(path, data)

        monkeypatch.setattr(confbuild, "write_durably", write)
        if cancelled:
            with pytest.raises(OSError, match="No space left"):
                s.jobs.cancel(job)
        s.gate.set()
        wait_for(lambda: job in s.jobs._ending)
        assert not log.finished
        full.clear()
        wait_for(lambda: log.finished)
        assert log.last()["result"]["status"] == ("failed" if cancelled else "ok")

    def test_a_full_disk_stops_no_cancel(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
        """That a build is cancelled is told to it first of all, also where it cannot be written down."""
        s = site()
        job = s.jobs.get(json.loads(s.ask("POST", "/build", URL)[2])["job_id"])
        wait_for(lambda: s.jobs.describe(job)["status"] == "running")
        told = threading.Event()
        s.jobs.when_halted(job, told.set)
        with monkeypatch.context() as m:
            m.setattr(confbuild, "write_durably", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            is_problem(s.ask("DELETE", f"/build/{job.id}"), 507, "InsufficientStorage", "the disk of the server is full: No space left on device")
            assert told.is_set()
        s.gate.set()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
    @pytest.mark.parametrize("where", ["confbuild.open", "write", "confbuild.sync", "os.mkdir", "os.rename", "confbuild.write_durably"])
    def test_insufficient_storage(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, number: int) -> None:
        """A full disk refuses a build, with the reason and without a traceback, and leaves nothing behind; a single-use server is not used up."""
        s, names, opened = site(single_use=True), where.rpartition("."), list[Any]()

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        def open_full(path: str, mode: str = "r") -> Any:
            opened.append(open(path, mode))  # noqa: SIM115
            return types.SimpleNamespace(write=fail, close=lambda: (opened[0].close(), fail()))

        with monkeypatch.context() as m:
            m.setattr(confbuild if names[0] != "os" else os, names[2] if where != "write" else "open", fail if where != "write" else open_full, raising=False)
            answer = s.ask("POST", "/build", GOOD_REQUEST)
        is_problem(answer, 507, "InsufficientStorage", f"the disk of the server is full: {os.strerror(number)}")
        assert answer[1]["Retry-After"] == "60" and "Traceback" not in caplog.text
        assert os.listdir(s.jobs.incoming) == [] == os.listdir(s.folder / "state" / "jobs") and s.ask("GET", "/builds")[2] == b"[]\n"
        assert s.ask("POST", "/build", GOOD_REQUEST)[0] == 200

    def test_a_damaged_job(self, site: Callable[..., Site]) -> None:
        """It is listed with the reason; its stream and its result are 404."""
        s = site(build_state=lambda state: replace(store(state, 1) / "events", "FIFO"))
        job = job_id(1)
        for path in ("/builds", f"/build/{job}"):
            answer = s.ask("GET", path)
            doc = json.loads(answer[2])
            doc = doc[0] if path == "/builds" else doc
            assert answer[0] == 200 and doc["status"] == "damaged" and doc["error_type"] == "Damaged"
            assert doc["error"] == "the files of this build are damaged: events: not a regular file"
        is_problem(s.ask("GET", f"/build/{job}/events"), 404, "Damaged", "events: not a regular file")
        assert s.ask("GET", f"/build/{job}/result")[::2] == (200, b"result")  # whose size is right
        assert json.loads(s.ask("DELETE", f"/build/{job}")[2])["status"] == "damaged"

    def test_no_thread(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
        """A connection that gets no thread gives its seat back."""
        s = site()
        seats = s.server.seats._value
        with monkeypatch.context() as m:
            m.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
            with socket.create_connection(("127.0.0.1", s.port), 20) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(b"GET /config HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert read_all(sock) == b""
        assert s.server.seats._value == seats and s.ask("GET", "/health")[0] == 200

    def test_deadlines(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
        """A head must come within a time as a whole, however it comes; so must the next request; and an answer must be taken."""
        s = site()
        s.server.scan_s = 0.02
        get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for sent, left, limit in ((b"", 0, 10), (b"\r\n", 0, 10), (b"G", 1, 10), (get[:-2], len(get) - 2, 10), (get, 0, 30), (get + get[:-1], len(get) - 1, 10)):
            with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
                sock.sendall(sent)
                if sent.startswith(get):
                    assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
                waiting = wait_for(lambda n=left, most=limit: [c for c in list(s.server._waiting)  # type: ignore[misc]
                                                               if len(c.buffer) == n and not c.closing and most - 10 < c.deadline - time.monotonic() <= most])
                waiting[0].deadline = 0
                got = read_all(sock)
            assert (got.startswith(b"HTTP/1.1 408 ") and got.endswith(b'"error_type":"RequestTimeout"}')) if left else got == b"", sent
        s.server.head_s = 0.1
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock, contextlib.suppress(ConnectionError):
            letters = itertools.chain(get[:-2], itertools.repeat(65))
            while not select.select([sock], [], [], 0.01)[0]:  # a byte now and then keeps nothing open
                sock.send(bytes([next(letters)]))
        s.server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        monkeypatch.setattr(confbuild, "STALL_S", 0.1)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", s.port))
            sock.settimeout(20)
            with pytest.raises(ConnectionError):  # one who asks, and takes no answer
                while True:
                    sock.sendall(get.replace(b"health", b"openapi.json") * 100)
        wait_for(lambda: not s.server._waiting)
        s.server.head_s = 10
        assert s.server._held == 0 and s.ask("GET", "/health")[0] == 200

    def test_waiting_needs_no_thread(self, site: Callable[..., Site]) -> None:
        """Those who send nothing, half a head, or a body slowly, and those who take a download slowly, leave the threads to others."""
        s = site()
        job = s.jobs.get(s.finished())
        data = s.large_result(job, 300_000)
        s.server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        s.server.seats, s.server.bodies = threading.BoundedSemaphore(2), threading.BoundedSemaphore(1)
        get = f"GET /build/{job.id}/result HTTP/1.1\r\nHost: localhost\r\nRange: bytes=1-\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        post = b"POST /build HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        socks = []
        for sent in [b"", b"GET /", get, post] * 8:
            socks.append(socket.socket())
            socks[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            socks[-1].connect(("127.0.0.1", s.port))
            socks[-1].sendall(sent)
            socks[-1].settimeout(20)
        wait_for(lambda: len([sock for sock in socks[3::4] if select.select([sock], [], [], 0)[0]]) == 7)
        refused = [sock for sock in socks[3::4] if select.select([sock], [], [], 0)[0]]
        assert s.ask("GET", "/health")[0] == 200
        wait_for(lambda: s.streamer.files == 16)
        for sock in refused:
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            is_problem((answer.status, answer.headers, answer.read()), 503, "Busy", "too many uploads")
            assert answer.headers["Retry-After"] == "10" and answer.headers["Connection"] == "close"
        last = next(sock for sock in socks[3::4] if sock not in refused)
        last.sendall(b" " * 8)
        assert last.recv(100).startswith(b"HTTP/1.1 400")
        wait_for(lambda: s.server.seats._value == 2 and s.server.bodies._value == 1)
        for sock in socks[2::4]:
            with sock.makefile("rb") as f:
                assert f.readline() == b"HTTP/1.1 206 Partial Content\r\n"
                while f.readline() != b"\r\n":
                    pass
                assert f.read(len(data) - 1) == data[1:] and f.readline() == b"HTTP/1.1 200 OK\r\n"
        assert s.streamer.files == 0
        for sock in socks:
            sock.close()

    def test_all_threads_are_busy(self, site: Callable[..., Site]) -> None:
        """Whether the server lives can be asked then as well; other requests wait for a thread."""
        s = site()
        s.server.seats = threading.BoundedSemaphore(1)
        with s.server.seats, socket.create_connection(("127.0.0.1", s.port), 20) as sock:
            sock.sendall(b"GET /config HTTP/1.0\r\n\r\n")
            wait_for(lambda: s.server._ready)
            assert s.ask("GET", "/health")[::2] == (200, b"ok") and s.server._ready
            s.server.seats.release()
            assert read_all(sock).startswith(b"HTTP/1.1 200 ")
            s.server.seats.acquire()

    def test_oldest_gives_way(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
        """Where connections are too many, hold too much, or leave too few files, the one that waits longest is closed."""
        s = site()

        def connect(sent: bytes = b"") -> socket.socket:
            before = set(s.server._waiting)
            sock = socket.create_connection(("127.0.0.1", s.port), 20)
            sock.sendall(sent)
            wait_for(lambda: [c for c in s.server._waiting if c not in before and len(c.buffer) == len(sent)])
            return sock

        socks = [connect() for _ in range(3)]
        monkeypatch.setattr(confbuild, "MAX_CLIENTS", 3)
        socks.append(connect())
        assert read_all(socks[0]) == b""
        monkeypatch.setattr(confbuild, "MAX_CLIENTS", 99)
        monkeypatch.setattr(confbuild, "MAX_HELD", 3000)
        socks += [connect(b"GET /" + b"x" * 1000) for _ in range(3)]
        assert [read_all(sock) for sock in socks[1:5]] == [b""] * 4
        monkeypatch.setattr(confbuild, "MAX_HELD", 99999)
        s.server.max_fd = 0
        socks.append(connect())
        with contextlib.suppress(ConnectionError):
            assert read_all(socks[5]) == b""
        for sock in socks[6:]:
            sock.sendall(b" HTTP/1.0\r\n\r\n" if sock is socks[6] else b"GET /health HTTP/1.0\r\n\r\n")
            assert read_all(sock).startswith(b"HTTP/1.1 404" if sock is socks[6] else b"HTTP/1.1 200")
            sock.close()
        wait_for(lambda: not s.server._waiting)
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock, contextlib.suppress(ConnectionError):
            assert read_all(sock) == b""  # there is none to close but itself
        for sock in socks:
            sock.close()

    def test_no_files(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
        """With no file left, accept closes who waits, and then waits itself; a request that needs a file can be repeated."""
        s = site()
        job = s.finished()
        idle = socket.create_connection(("127.0.0.1", s.port), 20)
        wait_for(lambda: s.server._waiting)
        calls = []

        class Listener:
            """Without files."""

            def __init__(self, real: socket.socket) -> None:
                self.real = real

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def accept(self) -> Any:
                calls.append(1)
                raise OSError(errno.EMFILE, "Too many open files")

        listener = s.server.sock
        s.server.sock = Listener(listener)  # type: ignore[assignment]
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
            assert read_all(idle) == b""
            idle.close()
            wait_for(lambda: s.server.mask == 0)
            assert len(calls) == 2  # it does not spin
            s.server.sock = listener
            sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert read_all(sock).endswith(b"ok")
        with monkeypatch.context() as m:
            m.setattr(confbuild, "OpenFile", lambda _: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
            answer = s.ask("GET", f"/build/{job}/result")
        is_problem(answer, 503, "Busy", "too many files")
        assert answer[1]["Retry-After"] == "10" and s.ask("GET", f"/build/{job}/result")[0] == 200

    @pytest.mark.parametrize("name", ["has_head", "take_head"])
    def test_a_bug_ends_one_connection(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                       name: str) -> None:
        s = site()
        with monkeypatch.context() as m:
            m.setattr(confbuild.Connection, name, lambda self: 1 / 0)
            with socket.create_connection(("127.0.0.1", s.port), 20) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert read_all(sock) == b""
        assert "ZeroDivisionError" in caplog.text and s.ask("GET", "/health")[0] == 200

    def test_a_slow_body(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
        """Silence in a body, and less than MIN_RATE, end it, and say so."""
        s = site()
        for name, value in (("REQUEST_TIMEOUT_S", 0.1), ("MIN_RATE", -1)):
            with monkeypatch.context() as m:
                m.setattr(confbuild, name, value)
                is_problem(s.raw(b"POST /build HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"),
                           408, "RequestTimeout", "too slowly")

    def test_answer_before_the_body(self, site: Callable[..., Site]) -> None:
        """A client that sends on gets a refusal whole, and then the end."""
        s = site(tokens=("secret",))
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
            sock.sendall(b"POST /build HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n")
            for _ in range(9):
                sock.sendall(b"x" * 1_000_000)
            got = read_all(sock)
        assert got.startswith(b"HTTP/1.1 401 ") and b"\r\nConnection: close\r\n" in got and got.endswith(b'"error_type":"Unauthorized"}')

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_result_is_gone(self, site: Callable[..., Site], method: str) -> None:
        """The head of an answer promises nothing that is not there."""
        s = site()
        path = Path(s.jobs.get(s.finished()).result_path)
        url = f"/build/{path.parent.name}/result"
        size = path.stat().st_size
        for make, status, error_type, fragment in (
                (lambda: path.write_bytes(b"cut"), 500, "InternalError", f"3 bytes instead of {size}"), (path.unlink, 404, "NotFound", "no longer"),
                (lambda: os.mkfifo(path), 500, "InternalError", "not a regular file"), (path.unlink, 404, "NotFound", "no longer"),
                (path.mkdir, 500, "InternalError", "not a regular file")):
            make()
            answer = s.ask(method, url)
            assert answer[0] == status and (method == "HEAD" or json.loads(answer[2])["error_type"] == error_type), answer
            assert method == "HEAD" or fragment in json.loads(answer[2])["error"]

    def test_connections(self, site: Callable[..., Site]) -> None:
        """Pipelined, kept alive, with 100-continue, cut off, HTTP/1.0: who may go on, goes on; who may not is told so."""
        s = site()
        host = b"Host: localhost\r\n"
        body = json.dumps(URL).encode()
        post = b"POST /build HTTP/1.1\r\n" + host + b"Content-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\n" + host + b"X-Request-Id: mine-1\r\n\r\n" + post + b"\r\n" + body
                         + b"GET /nope HTTP/1.1\r\n" + host + b"X-Request-Id: bad id\r\n\r\n"
                         + b"GET /health HTTP/1.1\r\nConnection: close\r\n" + host + b"\r\n")
            got = read_all(sock)
        assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"200", b"404", b"200"] and got.endswith(b"\r\n\r\nok")
        ids = re.findall(rb"X-Request-Id: (.*)\r\n", got)
        assert ids[0] == b"mine-1" and b"bad id" not in ids and len(set(ids)) == 4
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
            sock.sendall(post + b"Expect: 100-continue\r\n\r\n")
            assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(body)
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock:  # refused: the body is never asked for
            sock.sendall(post.replace(b"application/json", b"text/plain") + b"Expect: 100-continue\r\n\r\n")
            got = read_all(sock)
        assert got.startswith(b"HTTP/1.1 415") and b"\r\nConnection: close\r\n" in got
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
            sock.sendall(post + b"\r\n" + body[:-1])
            sock.shutdown(socket.SHUT_WR)
            assert b'"detail":"the body ended early"' in read_all(sock)
        for line in (b"", b"Connection: keep-alive\r\n"):
            with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
                sock.sendall(b"GET /health HTTP/1.0\r\n" + line + b"\r\n")
                got = read_all(sock, 5)
            assert got.startswith(b"HTTP/1.1 200") and b"\r\nConnection: close\r\n" in got
        job = s.finished()
        log = s.jobs.log_of(s.jobs.get(job))
        wait_for(lambda: log.finished)
        start = log.count - 3
        with socket.create_connection(("127.0.0.1", s.port), 20) as sock:
            sock.sendall(f"GET /build/{job}/events?from={start} HTTP/1.0\r\n\r\n".encode())
            head, _, stream = read_all(sock).partition(b"\r\n\r\n")
        assert b"chunked" not in head and b"Connection: close" in head
        assert stream == b": hello\n\n" + b"".join(frames([
            '{"type":"build","msg":"\\u00e9"}', '{"type":"build","msg":"two"}', sent(COMPLETE_EVENT)[0]], start + 1))

    def test_tokens(self, site: Callable[..., Site]) -> None:
        s = site(tokens=("alpha", "bêta"))
        assert s.ask("GET", "/health")[0] == 200
        for given_token in ("-", "Bearer", "Bearer gamma", "Basic alpha", "Bearer alphaa", "alpha", "Bearer alpha bêta"):
            answer = s.ask("GET", "/builds", Authorization=given_token)
            is_problem(answer, 401, "Unauthorized")
            assert answer[1]["WWW-Authenticate"].startswith("Bearer")
        is_problem(s.ask("GET", "/nothing"), 401, "Unauthorized")
        assert [s.ask("GET", "/builds", Authorization=text)[0] for text in ("Bearer alpha", "bearer  alpha")] == [200, 200]

    def test_hosts(self, site: Callable[..., Site]) -> None:
        s = site()
        for host in ("localhost", "LOCALHOST:99", "127.0.0.1", "build.example", "Build.Example:443"):
            assert s.ask("GET", "/builds", Host=host)[0] == 200, host

    def test_full(self, site: Callable[..., Site]) -> None:
        """429 with one build running and one waiting; 503 where streams are too many, and while stopping."""
        s = site(max_queue=1, crowded=True)
        first = json.loads(s.ask("POST", "/build", URL)[2])["job_id"]
        wait_for(lambda: s.jobs.get(first).state == "running")
        assert s.ask("POST", "/build", URL)[0] == 200
        for path, body, status, error_type in (("/build", URL, 429, "QueueFull"), (f"/build/{first}/events", None, 503, "TooManyWatchers")):
            answer = s.ask("POST" if body else "GET", path, body)
            is_problem(answer, status, error_type)
            assert int(answer[1]["Retry-After"]) > 0
        is_problem(s.ask("GET", f"/build/{first}/result"), 404, "NotReady")
        s.gate.set()
        wait_for(lambda: s.jobs.get(first).state == "ok")
        is_problem(s.ask("GET", f"/build/{first}/result"), 503, "TooManyWatchers")
        s.jobs.stop(10)
        answer = s.ask("POST", "/build", URL)
        is_problem(answer, 503, "ShuttingDown")
        assert int(answer[1]["Retry-After"]) > 0

    def test_bug(self, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(confbuild.Api, "health", lambda self, request: 1 / 0)
        is_problem(site().ask("GET", "/health"), 500, "InternalError", "its log tells more")
        assert "ZeroDivisionError" in caplog.text

    def test_result(self, site: Callable[..., Site]) -> None:
        """Headers, ranges [RFC9110 14] and the archive itself, deterministic."""
        s = site()
        job = s.finished()
        url = f"/build/{job}/result"
        status, headers, data = s.ask("GET", url)
        etag = headers["ETag"]
        assert status == 200 and etag == f'"{hashlib.sha256(data).hexdigest()}"' and int(headers["Content-Length"]) == len(data)
        assert (headers["Content-Type"], headers["Accept-Ranges"]) == ("application/gzip", "bytes") and "attachment" in headers["Content-Disposition"]
        assert headers["Repr-Digest"] == "sha-256=:" + base64.b64encode(hashlib.sha256(data).digest()).decode() + ":"
        n = len(data)
        for asked, expected in (("bytes=0-0", (0, 1)), ("bytes=5-", (5, n)), ("bytes=-7", (n - 7, n)), (f"bytes=-{n + 5}", (0, n)),
                                (f"bytes=3-{n + 99}", (3, n)),
                                (f"bytes={n - 1}-", (n - 1, n))):
            status, headers, part = s.ask("GET", url, Range=asked)
            assert (status, part) == (206, data[slice(*expected)]) and headers["Content-Range"] == f"bytes {expected[0]}-{expected[1] - 1}/{n}", asked
        for asked in ("bytes=5-2", "bytes=-", "bytes=a-b", "lines=0-1", "bytes=0-1,3-4", "bytes=0"):
            assert s.ask("GET", url, Range=asked)[::2] == (200, data), asked
        for asked in (f"bytes={n}-", f"bytes={n + 7}-{n + 9}", "bytes=-0"):
            answer = s.ask("GET", url, Range=asked)
            is_problem(answer, 416, "RangeNotSatisfiable", f"{n} bytes")
            assert answer[1]["Content-Range"] == f"bytes */{n}"
        assert s.ask("GET", url, Range="bytes=0-0", If_Range=etag)[0] == 206
        assert s.ask("GET", url, Range="bytes=0-0", If_Range='"x"')[::2] == (200, data)
        for tag in (etag, "*", f'"x", {etag}', f"W/{etag}"):
            status, headers, body = s.ask("GET", url, If_None_Match=tag)
            assert (status, headers["ETag"], body) == (304, etag, b""), tag
        assert s.ask("GET", url, If_None_Match='"x"')[::2] == (200, data)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            assert [(m.name, m.mode, m.isdir(), m.mtime, m.uid, m.gid, m.uname, m.gname) for m in archive] == [
                ("demo", 0o755, True, 0, 0, 0, "", ""), ("demo/artifacts", 0o755, True, 0, 0, 0, "", ""),
                ("demo/artifacts/demo", 0o755, False, 0, 0, 0, "", ""),
                ("demo/evidence.json", 0o644, False, 0, 0, 0, "", ""), ("demo/provenance.json", 0o644, False, 0, 0, 0, "", "")]
        again = s.finished()
        assert s.ask("GET", f"/build/{again}/result")[2] == data and data[4:8] == bytes(4)

    def test_attestation(self, site: Callable[..., Site]) -> None:
        """The evidence as it is; the nonce is the asker's; a VM that does not attest is told of."""
        s = site()
        status, headers, body = s.ask("GET", f"/attestation?nonce={NONCE}")
        assert (status, headers["Content-Type"], headers["Cache-Control"], body) == (200, "application/json", "no-store", b"{}")
        for spelled in (NONCE.upper(), DASHED):
            assert s.ask("GET", f"/attestation?nonce={spelled}")[2] == b"{}"
        for query in ("", "?nonce=", "?nonce=00", f"?nonce={NONCE}0", "?Nonce=" + NONCE, f"?nonce={DASHED}0"):
            is_problem(s.ask("GET", "/attestation" + query), 400, "InvalidNonce")
        tired = s.ask("GET", "/attestation?nonce=" + "0" * 32)
        is_problem(tired, 503, "AttestationError")
        assert json.loads(tired[2])["detail"] == "it is tired" and tired[1]["Retry-After"] == "30"

    def test_every_get(self, site: Callable[..., Site]) -> None:
        """HEAD wherever GET works, with the same headers and no body; and the OpenAPI document tells of every route."""
        s = site()
        job = s.finished()
        doc = json.loads(s.ask("GET", "/openapi.json")[2])
        assert doc["openapi"].startswith("3.1.") and doc["info"]["version"] == confbuild.__version__
        listed = {(method.upper(), path) for path, methods in doc["paths"].items() for method in methods}
        assert listed == {(route.method, route.path) for route in confbuild.ROUTES}
        names = []
        for path, methods in doc["paths"].items():
            for method, operation in methods.items():
                names.append(operation["operationId"])
                assert operation["responses"]
                assert all(re.fullmatch(r"\d{3}", code) and answer["description"] for code, answer in operation["responses"].items())
                assert {p["name"] for p in operation["parameters"] if p["in"] == "path"} == set(re.findall(r"\{(\w+)\}", path))
                if method == "get":
                    get, head = (s.ask(verb, path.replace("{id}", job) + (f"?nonce={NONCE}" if path == "/attestation" else "")) for verb in ("GET", "HEAD"))
                    for answer in (get, head):
                        for name in ("Date", "X-Request-Id"):
                            del answer[1][name]
                    assert (get[0], sorted(get[1].items())) == (head[0], sorted(head[1].items())) and get[2] and not head[2]
                    assert str(get[0]) in operation["responses"]
                    assert get[1]["Content-Type"].partition(";")[0] in operation["responses"]["200"]["content"]
        assert len(set(names)) == len(names)
        assert s.ask("GET", "/health")[2] == b"ok" and json.loads(s.ask("GET", "/config")[2]) == {"platform": "simulated"}

    def test_options(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """What the command line promises of the tables: --max-archive, --token-file, --queue, --single-use; /config says so."""
        (tmp_path / "tokens").write_text("t0\nt1\n")
        s = server("--max-archive", "1", "--token-file", str(tmp_path / "tokens"), "--queue", "1", "--public-host", "Build.Example")
        assert s.request("GET", "/config")[0] == 401
        s.headers = {"Authorization": "Bearer t1"}
        config = json.loads(s.request("GET", "/config", Host="build.example")[2])
        assert set(config) >= {"platform", "image", "measurement", "limits", "toolchains", "isolation", "version"}
        assert config["platform"] == "simulated"
        assert config["limits"].items() >= {"archive_bytes": 1 << 20, "queue": 1, "slots": 1}.items() and config["toolchains"]["cargo"] is True
        big = {**GOOD_REQUEST, "source_data": base64.b64encode(gzip.compress(random.Random(2).randbytes(2 << 20))).decode()}
        is_problem(s.request("POST", "/build", big), 413, "PayloadTooLarge")
        jobs = [s.submit(project(gated(tmp_path / "gate")))]
        status = wait_for(lambda: [x for x in [s.status(jobs[0])] if x["status"] == "running"])[0]
        assert status["nonce"] == NONCE and status["source_name"] == "demo.tar.gz" and status["finished_at"] is None
        jobs.append(s.submit())
        is_problem(s.request("POST", "/build", URL), 429, "QueueFull")
        (tmp_path / "gate").touch()
        assert [s.events(job)[-1]["result"] for job in jobs] == [{"status": "ok"}] * 2
        verdict = verdict_over(*self.unpacked(s, jobs[0], tmp_path))
        assert verdict.verdict == "simulated"

    @staticmethod
    def unpacked(s: Server, job: str, folder: Path) -> tuple[confbuild.BundleFiles, confbuild.Expectations]:
        (folder / "result.tar.gz").write_bytes(s.request("GET", f"/build/{job}/result")[2])
        return confbuild.read_bundle(str(folder / "result.tar.gz")), confbuild.Expectations(nonce=NONCE)

    @staticmethod
    def certificate(folder: Path) -> tuple[str, str]:
        """The paths of a certificate for 127.0.0.1 and its key."""
        cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                        "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert], check=True, capture_output=True)
        return cert, key

    @needs("openssl")
    def test_tls_connections(self, site: Callable[..., Site], tmp_path: Path) -> None:
        """A handshake holds up nobody and has a deadline; then all is as without TLS: pipelined, bodies, downloads, and what follows them."""
        cert, key = self.certificate(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        s = site(tls=context)
        s.server.scan_s = 0.02
        socks = [socket.create_connection(("127.0.0.1", s.port), 20) for _ in range(3)]
        socks[1].sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        socks[2].sendall(b"GET /health HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"HTTP/1.1" not in read_all(socks[2])
        host = b"Host: localhost\r\n"
        body = json.dumps({**GOOD_REQUEST, "source_data": base64.b64encode(gzip.compress(random.Random(1).randbytes(500_000))).decode()}).encode()
        with ssl.create_default_context(cafile=cert).wrap_socket(socket.create_connection(("127.0.0.1", s.port), 20), server_hostname="127.0.0.1") as sock:
            for part in (b"GET /hea", b"lth HTTP/1.1\r\n" + host + b"\r\nPOST /build HTTP/1.1\r\nContent-Type: application/json\r\n" + host,
                         b"Content-Length: %d\r\n\r\n" % len(body) + body[:99], body[99:]):
                sock.sendall(part)
            answers = sock.makefile("rb")
            answer = answers.read(len(b"HTTP/1.1 200"))
            while not answer.endswith(b"\r\n\r\nok"):
                answer += answers.read(1)
            while not answer.endswith(b'"}\n'):
                answer += answers.read(1)
            job = s.jobs.get(json.loads(answer[answer.rindex(b"{"):])["job_id"])
            s.gate.set()
            wait_for(lambda: job.state == "ok")
            data = s.large_result(job, 4 << 20)
            sock.sendall(b"GET /build/%s/result HTTP/1.1\r\n%s\r\nGET /health HTTP/1.1\r\nConnection: close\r\n%s\r\n" % (job.id.encode(), host, host))
            got = answers.read()
        assert got.partition(b"\r\n\r\n")[2][:len(data)] == data and got.endswith(b"\r\n\r\nok") and s.streamer.files == 0
        for waiting in list(s.server._waiting):
            waiting.deadline = 0
        assert read_all(socks[0]) == read_all(socks[1]) == b""
        for one in socks:
            one.close()

    @needs("openssl")
    def test_tls(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """Events, of 2 MiB, and the result over TLS are those of the files; a client without TLS gets nothing and hurts nobody."""
        cert, key = self.certificate(tmp_path)
        s = server("--tls-cert", cert, "--tls-key", key)
        context = ssl.create_default_context(cafile=cert)

        def ask(method: str, path: str, body: str | None = None) -> bytes:
            connection = http.client.HTTPSConnection("127.0.0.1", s.port, timeout=PATIENCE, context=context)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                assert answer.status == 200
                data = answer.read()
            connection.close()
            return data

        with socket.create_connection(("127.0.0.1", s.port), 10) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert b"HTTP/1.1" not in read_all(plain)
        lines = "seq 1000000 1050000; sleep 0.3; seq 2000000 2003000\n"
        archive = base64.b64encode(tarball(project(lines + QUICK))).decode()
        job = json.loads(ask("POST", "/build", json.dumps({**GOOD_REQUEST, "source_data": archive})))["job_id"]
        live = ask("GET", f"/build/{job}/events")
        assert len(live) > 2 << 20 and live == ask("GET", f"/build/{job}/events")
        assert live.partition(b"\n\n")[2] == (s.state / "jobs" / job / "events").read_bytes()
        assert ask("GET", f"/build/{job}/result") == (s.state / "jobs" / job / "result.tar.gz").read_bytes()

# endregion 25
# ==============================================================================
# region 26. Agent
# ==============================================================================


class TestAgent:
    def test_lifeline(self, tmp_path: Path, stub_path: str) -> None:
        """The API of one build, for whoever has the token; when stdin ends, whatever it has started and its workspace are gone."""
        workspace = tmp_path / f"{confbuild.WORKSPACE}1"
        for name in ("home", "tmp", "cargo"):
            (workspace / name).mkdir(parents=True)
        env = confbuild.build_environment(str(workspace), {"PATH": stub_path}, ())
        with subprocess.Popen([*confbuild.own_program(), "agent"], cwd=workspace, env=env, start_new_session=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
            assert agent.stdin and agent.stdout
            agent.stdin.write(json.dumps({"token": "once", "policy": confbuild.SourcePolicy()._asdict()}).encode() + b"\n")
            agent.stdin.flush()
            s = Server(tmp_path / "none", stub_path)
            s.port = int(agent.stdout.readline())
            is_problem(s.request("GET", "/builds"), 401, "Unauthorized")
            s.headers = {"Authorization": "Bearer once"}
            assert s.request("GET", f"/attestation?nonce={NONCE}")[0] == 200
            script = (f"setsid sh -c 'echo $$ > {tmp_path}/daemon; sleep 300' & while [ ! -s {tmp_path}/daemon ]; do sleep 0.01; done\n"
                      f"echo $$ > {tmp_path}/tool; echo up; sleep 300")
            job = s.submit(project(script))
            connection = http.client.HTTPConnection("127.0.0.1", s.port, timeout=PATIENCE)
            connection.request("GET", f"/build/{job}/events", headers=s.headers)
            answer = connection.getresponse()
            while b'"up"' not in answer.readline():
                assert not answer.isclosed()
            connection.close()
            is_problem(s.request("POST", "/build", GOOD_REQUEST), 409, "AlreadyAccepted")
            is_problem(s.request("GET", f"/attestation?nonce={NONCE}"), 409, "AlreadyAccepted")  # it waits for no build any more
            agent.stdin.close()
            assert agent.wait(PATIENCE) == 0
        pids = [int((tmp_path / name).read_text()) for name in ("daemon", "tool")]
        assert not any(map(living, pids)) and not workspace.exists()


    @pytest.mark.parametrize(("error", "room", "error_type", "message"), [
        (OSError(errno.ENOSPC, "No space left on device"), 1 << 20, "LimitError",
         "the disk of the VM, which is the server's TMPDIR or a guest's memory, is full: No space left on device"),
        (OSError(errno.EIO, "I/O error"), 1 << 20, "InternalError", None),
        (confbuild.BuildFailed("BuildError", "make ended with status 2"), 0, "LimitError",
         "the disk of the VM, which is the server's TMPDIR or a guest's memory, is full: make ended with status 2"),
        (confbuild.BuildFailed("BuildError", "make ended with status 2"), 1 << 20, "BuildError", "make ended with status 2"),
        (None, 100, "LimitError", "the build's log has more than 50 bytes, half of the room in its VM")])
    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, room: int, error_type: str, message: str | None) -> None:
        """A build that has filled the disk, or whose log would, fails for that, and leaves room to say so."""
        folders = ("source", *confbuild.BUILD_FOLDERS, "agent/artifacts")

        def pipeline(*arguments: Any) -> str:
            assert (tmp_path / "agent/reserve").stat().st_blocks * 512 >= 1 << 20
            for name in folders:
                write_files(tmp_path / name, {"a/b": "x"})
            if error is not None:
                raise error
            for _ in range(20):
                arguments[-1]("build", ["x" * 20])
            raise AssertionError("the log has no limit")

        made: list[Any] = []

        class Api(confbuild.Api):
            def __init__(self, jobs: confbuild.Jobs, *arguments: Any) -> None:
                made.append(jobs)
                super().__init__(jobs, *arguments)

        served = types.SimpleNamespace(server_address=("", 1), serve_forever=lambda: None)
        for name, value in (("run_pipeline", pipeline), ("Api", Api), ("Server", lambda *_: served)):
            monkeypatch.setattr(confbuild, name, value)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=room))
        monkeypatch.setattr(confbuild, "has_room", lambda folder: folder != str(tmp_path) or room > 0)
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=types.SimpleNamespace(read=lambda _: threading.Event().wait(0))))
        confbuild.serve_agent({"token": "t", "policy": confbuild.SourcePolicy()._asdict()}, str(tmp_path), ("", 0),
                              confbuild.Attester(confbuild.SIMULATED_BUILDER, confbuild.simulated_evidence), lambda: None)
        job = made[0].submit(confbuild.BuildRequest(NONCE, "http://127.0.0.1/x"), None)
        wait_for(lambda: made[0].describe(job)["status"] == "failed")
        status = made[0].describe(job)
        assert status["error_type"] == error_type and message in (None, status["error"])
        assert [(tmp_path / name).exists() for name in folders] == ["disk of the VM" not in (message or "")] * len(folders)
        assert not (tmp_path / "agent/reserve").exists()
        made[0].stop(0)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_said_by_the_tool(self, server: Callable[..., Server], number: int) -> None:
        """A tool that has removed what filled the disk has said why it failed."""
        said = f"error: failed to write x: {os.strerror(number)} (os error {number})"
        result = (s := server()).events(s.submit(project(f"echo '{said}'; exit 1")))[-1]["result"]
        assert (result["error_type"], result["error"]) == ("LimitError", f"cargo build --locked --release ended with status 1: {said}")

    def test_small_disk(self, server: Callable[..., Server], tmp_path: Path) -> None:
        """A build that fills TMPDIR ends at once with LimitError, whatever its tool makes of it; the slot and the disk are free for the next one."""
        (tmp_path / "small").mkdir()
        mounted = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-c",
                   f'mount -t tmpfs -o size=16m,nr_inodes=600 none {shlex.quote(str(tmp_path / "small"))} && exec "$@"', "sh"]
        if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], check=False, capture_output=True).returncode != 0:
            pytest.skip("nothing can be mounted: run as root, or allow user namespaces: sysctl user.max_user_namespaces=1000")
        s = server(program=[*mounted, *PROGRAM], env={"TMPDIR": str(tmp_path / "small")})
        for script in ("cat /dev/zero > $TMPDIR/big; exit 1", f"cat /dev/zero > big; {QUICK.replace('echo built', 'cat big')}", "cat /dev/zero > $HOME/big; exit 0",
                       "for i in $(seq 600); do : > $i || exit 2; done"):
            result = s.events(s.submit(project(script)))[-1]["result"]
            assert result["error_type"] == "LimitError" and result["error"].startswith("the disk of the VM, which is the server's TMPDIR"), (script, result)
        assert s.events(s.submit())[-1] == OK_EVENT

    def test_lifeline_that_breaks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A standard input that cannot be read is one that has ended."""
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=types.SimpleNamespace(read=raising(OSError(errno.EIO, "Input/output error")))))
        ended = threading.Event()
        confbuild._start_lifeline(ended.set)
        assert ended.wait(20)

    def test_sweep_after_all(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The workspace is swept also where the processes cannot be found."""
        swept: list[Any] = []
        monkeypatch.setattr(os, "execv", lambda *arguments: swept.append(arguments))
        monkeypatch.setattr(confbuild, "descendants", raising(OSError(errno.EMFILE, "Too many open files")))
        confbuild._kill_and_sweep(str(tmp_path))
        assert swept == [(sys.executable, [*confbuild.own_program(), "sweep", str(tmp_path)])]


class TestFetcher:
    def run(self, tmp_path: Path, stub_path: str, url: str) -> tuple[Any, str]:
        """(what it says, its workspace), which is gone afterwards."""
        vm = confbuild.SimulatedVm(confbuild.SourcePolicy(("file",)), command="fetcher", config={"repo_url": url, "repo_ref": "main"})
        vm.spawn()
        try:
            answer = json.loads(vm.read_line(30))
            if "name" in answer:
                shutil.copy(f"{vm.workspace}/source.tar.gz", tmp_path / "fetched")
            return answer, vm.workspace
        finally:
            vm.destroy()

    @needs("git")
    def test_fetched(self, tmp_path: Path, stub_path: str) -> None:
        """A repository as an archive, whose history a builder believes."""
        origin = write_files(tmp_path / "hello.git", project(), commit=True)
        answer, workspace = self.run(tmp_path, stub_path, f"file://{origin}")
        assert answer == {"name": "hello"} and not os.path.exists(workspace)
        (tmp_path / "s").mkdir()
        confbuild.unpack_archive(str(tmp_path / "fetched"), str(tmp_path / "s"))
        found, name = confbuild.find_project(str(tmp_path / "s"), "")
        tree = confbuild.git_tree(found, confbuild.walk_files(found))
        env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        assert name == "hello" and confbuild.believe_history(found, tree, env) == (git(origin, "rev-parse", "HEAD"), f"file://{origin}")

    @pytest.mark.parametrize(("raised", "room", "answer"), [
        ("OSError(28, 'No space left on device', '/tmp/x')", True, {"error": "the disk of the server's TMPDIR is full: No space left on device", "error_type": "LimitError"}),
        ("confbuild.source_error('fatal: write error')", False, {"error": "the disk of the server's TMPDIR is full: fatal: write error", "error_type": "LimitError"}),
        ("confbuild.source_error('fatal: no')", True, {"error": "fatal: no", "error_type": "SourceError"}),
        ("OSError(5, 'I/O error', '/tmp/x')", True, {"error": "I/O error", "error_type": "VmError"})])
    def test_what_fails(self, monkeypatch: pytest.MonkeyPatch, raised: str, room: bool, answer: Any) -> None:
        """A full TMPDIR is LimitError, whoever met it."""
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import confbuild\n"
                f"def fetch(*_): raise {raised}\nconfbuild.fetch_git, confbuild.has_room = fetch, lambda folder: {room}\nconfbuild.run_fetcher()")
        monkeypatch.setattr(confbuild, "own_program", lambda: [sys.executable, "-S", "-c", code, str(COMPILED.parent)])
        vm = confbuild.SimulatedVm(confbuild.SourcePolicy(), command="fetcher", config={"repo_url": "file:///x", "repo_ref": ""})
        vm.spawn()
        try:
            assert json.loads(vm.read_line(PATIENCE)) == answer
        finally:
            vm.destroy()

    @needs("git")
    def test_nothing_there(self, tmp_path: Path, stub_path: str) -> None:
        answer, workspace = self.run(tmp_path, stub_path, f"file://{tmp_path}/nowhere")
        assert answer["error_type"] == "SourceError" and "nowhere" in answer["error"] and not os.path.exists(workspace)

# endregion 26

# ==============================================================================
# region 27. Guest
# ==============================================================================

root_only = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="the first process of a guest is root")


FILTERS = sys.platform == "linux" and os.uname().machine == "x86_64"


class TestRights:
    @pytest.mark.skipif(not FILTERS, reason="the filter is one for Linux on x86-64")
    def test_by_the_kernel(self) -> None:
        """In a child of this process, with whatever rights that has."""
        code = ("import ctypes, errno, json, os, sys; sys.path.insert(0, sys.argv[1]); import confbuild\nlibc = ctypes.CDLL(None, use_errno=True)\n"
                "def ask(n):\n ctypes.set_errno(0)\n return libc.syscall(n, -1, -1, -1, -1, -1) < 0 and errno.errorcode[ctypes.get_errno()]\n"
                "confbuild.give_up_rights()\n"
                "print(json.dumps([{n: ask(n) for n in map(int, sys.argv[2].split(','))}, ask(39), ask(0), ask(0x40000000 + 39), os.system('exit 3')]))")
        done = subprocess.run([sys.executable, "-c", code, str(FILE.parent), ",".join(map(str, FORBIDDEN["x86_64"].values()))], capture_output=True, text=True, timeout=PATIENCE,
                              check=True)
        assert '["kernel/io_uring_disabled", "2"]' in json.dumps(confbuild._SYSCTL)
        forbidden, getpid, read, x32, ended = json.loads(done.stdout)
        assert set(forbidden.values()) == {"ENOSYS"} and (getpid, read, x32, ended) == (False, "EBADF", "ENOSYS", 3 << 8)


class TestGuest:
    @pytest.mark.parametrize("text", ["", "confbuild.tools=", "confbuild.tools=" + "0" * 64, "confbuild.tools=" + "0" * 64 + ",0", f"confbuild.tools={'0' * 63}g,1",
                                      f"confbuild.tools={'0' * 64},1 confbuild.tools={'1' * 64},1", f"xconfbuild.tools={'0' * 64},1"])
    def test_bad_command_lines(self, text: str) -> None:
        with pytest.raises(confbuild.GuestError, match="has not one confbuild.tools=ROOTHASH,BLOCKS"):
            confbuild.parse_command_line(text)

    def test_command_line(self) -> None:
        """The firmware puts `initrd=` in front of it."""
        assert confbuild.parse_command_line(f"initrd=initrd console=ttyS0 confbuild.tools={'0a' * 32},1234 quiet\n") == ("0a" * 32, 1234)

    def test_verity_target(self) -> None:
        """Source: struct dm_target_spec of linux/dm-ioctl.h, and the table line of the kernel's verity.rst."""
        target = confbuild.verity_target("254:0", 1000, "ab" * 32)
        sector, length, status, following, kind = struct.unpack_from("=QQiI16s", target)
        assert (sector, length, status, following, kind.rstrip(b"\0")) == (0, 8000, 0, len(target), b"verity") and len(target) % 8 == 0
        assert target[40:].rstrip(b"\0").decode() == f"1 254:0 254:0 4096 4096 1000 1000 sha256 {'ab' * 32} -"

    @pytest.mark.parametrize(("line", "message"), [
        (b"", "the configuration does not end"), (b"{}", "the configuration does not end"), (b" " * 70_000, "the configuration does not end"),
        (b"{\n", "configuration: not JSON"), (b"[]\n", "configuration: not an object of token, policy, platform, network, perhaps vek"),
        (b'{"token":"t","policy":{},"platform":"snp","network":"none","more":1}\n', "not an object of"),
        (b'{"token":"t","policy":{},"platform":"tdx","network":"none"}\n', "platform or network is none"),
        (b'{"token":"t","policy":{},"platform":"qemu","network":[]}\n', "platform or network is none")])
    def test_bad_configurations(self, line: bytes, message: str) -> None:
        """The host writes it."""
        with pytest.raises(confbuild.GuestError, match=message):
            confbuild.read_config(functools.partial(io.BytesIO(line).read, 1))

    def test_configuration(self) -> None:
        given: dict[str, Any] = {"token": "t", "policy": {}, "platform": "snp", "network": "open", "vek": None}
        assert confbuild.read_config(functools.partial(io.BytesIO(json.dumps(given).encode() + b"\nmore").read, 1)) == given

    @pytest.mark.parametrize("network", ["none", "open"])
    def test_attester(self, network: str) -> None:
        """What the host calls a QEMU guest never looks like hardware, and what it calls SEV-SNP never falls back."""
        attester = confbuild.guest_attester({"platform": "qemu", "network": network}, confbuild.Broker("/nowhere"))
        assert attester.builder == confbuild.QEMU_BUILDER and attester.byproducts == {"guest_network": hashlib.sha256(network.encode()).hexdigest()}
        assert json.loads(attester.attest(bytes(64)))["platform"] == "simulated"
        with pytest.raises(confbuild.NoAttester, match="No such file"):
            confbuild.guest_attester({"platform": "snp", "network": network}, confbuild.Broker("/nowhere"))

    def test_hardware_attester(self) -> None:
        """The measurement is that of the report; the certificate may come from the host, where the firmware has none."""
        asked: list[Any] = []

        class Stand(confbuild.Broker):
            def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
                asked.append(question)
                return {"report": snp_report(report_data=bytes.fromhex(question["data"])).hex(), "table": ""}

        vek = b64(vek_of())
        attester = confbuild.guest_attester({"platform": "snp", "network": "none", "vek": vek}, Stand(""))
        assert attester.builder == confbuild.SNP_BUILDER and attester.byproducts["measurement"] == hashlib.sha256(b"m" * 48).hexdigest()
        evidence = json.loads(attester.attest(b"x" * 64))
        assert evidence["platform"] == "snp" and evidence["evidence"]["cert_chain"]["vcek"] == vek
        assert [question["data"] for question in asked] == ["00" * 64, "78" * 64]


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[confbuild.Broker]:
    """A guest's first process, in a process of this machine, for which only /work is below tmp_path; its agent is this one."""
    if os.geteuid() != 0:
        pytest.skip("the first process of a guest is root")
    monkeypatch.setattr(confbuild, "SYSROOT", str(tmp_path))
    (tmp_path / "work").mkdir()

    def become(uid: int) -> None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        if FILTERS:
            confbuild.give_up_rights()

    monkeypatch.setattr(confbuild, "_become", become)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = tempfile.mkdtemp(prefix="broker-") + "/socket"
    listener.bind(path)
    listener.listen(16)
    ready, agent = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(agent)
            stand_in = os.fork()  # the agent that it waits for: lives until this test ends
            if stand_in == 0:
                os.read(ready, 1)
                os._exit(0)
            confbuild._serve_guest(stand_in, confbuild.GuestBroker(listener, False), listener)
        finally:
            os._exit(0)
    os.close(ready)
    listener.close()
    found = confbuild.Broker(path)
    monkeypatch.setattr(confbuild, "_brokers", [found])
    yield found
    os.close(agent)
    os.waitpid(pid, 0)
    shutil.rmtree(os.path.dirname(path))


@root_only
class TestBroker:
    ENV: Mapping[str, str] = types.MappingProxyType({"PATH": "/usr/bin:/bin"})

    def run(self, script: str, keep_stdout: bool = False) -> tuple[int, bytes, list[str]]:
        lines: list[str] = []
        status, kept = confbuild.run_tool(["/bin/sh", "-c", script], "/", self.ENV, lines.extend, keep_stdout)
        return status, kept, lines

    def test_builds(self, broker: confbuild.Broker) -> None:
        """A program of the build is another user, without groups and network; streams and status are its own."""
        status, _, lines = self.run("id -u; id -G; ls /sys/class/net | wc -l; cut -d: -f1 /proc/net/dev | tail -n +3; echo wrong >&2; exit 7")
        uid = str(confbuild.BUILD_UID)
        assert (status, lines[:2], lines[-2:]) == (7, [uid, uid], ["    lo", "wrong"])
        assert self.run("echo out; echo err >&2; kill -9 $$", keep_stdout=True) == (-9, b"out\n", ["err", "out"])
        assert confbuild.capture(["/bin/sh", "-c", "pwd; echo e >&2"], "/usr", self.ENV, untrusted=True) == (0, b"/usr\n", "e")
        assert confbuild.capture(["/usr/bin/id", "-u"], "/", self.ENV)[1] == b"0\n"  # git, for one, is the agent's

    def test_leftovers(self, broker: confbuild.Broker, tmp_path: Path) -> None:
        """What a build leaves behind is dead when it has ended, in whatever session."""
        tmp = tempfile.mkdtemp()
        os.chmod(tmp, 0o777)
        status, _, _ = self.run(f"setsid sh -c 'echo $$ > {tmp}/a; exec sleep 300' >/dev/null 2>&1 & while [ ! -s {tmp}/a ]; do sleep 0.01; done")
        assert status == 0 and not living(int(Path(tmp, "a").read_text()))
        with pytest.raises(confbuild.BuildFailed, match="printed more than 1000 bytes"):
            confbuild.capture(["/bin/sh", "-c", f"echo $$ > {tmp}/b; exec cat /dev/zero"], "/", self.ENV, 1000, untrusted=True)
        assert not living(int(Path(tmp, "b").read_text()))
        shutil.rmtree(tmp)

    @pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="python3 is missing: apt-get install python3")  # a build cannot read /root
    def test_hidden_leftovers(self, broker: confbuild.Broker) -> None:
        """What hides its memory, and so has files of root in /proc, is dead as well; shared memory of System V goes with who made it."""
        tmp = tempfile.mkdtemp()
        os.chmod(tmp, 0o777)
        code = (f"import ctypes, os, time; libc = ctypes.CDLL(None); libc.shmget(0, 4096, 0o1600)\nif os.fork(): os._exit(0)\nos.setsid(); libc.prctl(4, 0)\n"
                f"open('{tmp}/pid', 'w').write(str(os.getpid())); os.close(1); os.close(2); time.sleep(300)")
        before = Path("/proc/sysvipc/shm").read_text()
        assert self.run(f"/usr/bin/python3 -c \"{code}\" && while [ ! -s {tmp}/pid ]; do sleep 0.01; done")[0] == 0
        assert not living(int(Path(tmp, "pid").read_text())) and Path("/proc/sysvipc/shm").read_text() == before
        shutil.rmtree(tmp)

    def test_refusals(self, broker: confbuild.Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        for argv, number in ((["/nowhere"], errno.ENOENT), (["/"], errno.EACCES)):
            with pytest.raises(OSError, match="No such file|Permission denied") as caught:
                confbuild.capture(argv, "/", self.ENV, untrusted=True)
            assert caught.value.errno == number
        with pytest.raises(OSError, match="cannot be entered"):
            confbuild.capture(["/bin/true"], "/nowhere", self.ENV, untrusted=True)
        with pytest.raises(OSError, match="this is no SEV-SNP guest"):
            broker.ask({"op": "report", "data": "00" * 64})
        with pytest.raises(FileNotFoundError):
            confbuild.Broker("/nowhere/socket").ask({"op": "kill"})

    def test_own(self, broker: confbuild.Broker, tmp_path: Path) -> None:
        """Files change hands, links are not followed."""
        outside = tmp_path / "outside"
        outside.write_bytes(b"")
        work = write_files(tmp_path / "work", {"deep/tree/a/b": "", "deep/tree/c": "", "deep/d": ""})
        (work / "deep/tree/a/link").symlink_to(outside)
        (work / "deep/tree/folder").symlink_to(tmp_path)
        confbuild.give_to_build("/work/deep/tree")
        owners = {path.relative_to(tmp_path).as_posix(): path.lstat().st_uid for path in tmp_path.rglob("*") if path.lstat().st_uid != 0}
        assert set(owners.values()) == {confbuild.BUILD_UID} and tmp_path.stat().st_uid == 0
        assert set(owners) == {f"work/deep/tree{name}" for name in ("", "/a", "/a/b", "/c", "/a/link", "/folder")}

    @pytest.mark.parametrize("path", ["/", "/work", "/work/", "/work/.", "/work/..", "/work/../other", "/work/in/../../other", "/work//in", "//work/in", "/worker", "work/in", "", "in",
                                      "/other", "/other/work/in", "/work/out", "/work/out/", "/work/out/folder", "/work/in/out/folder", "/work/in/file", "/work/in/none"])
    def test_own_is_confined(self, broker: confbuild.Broker, tmp_path: Path, path: str) -> None:
        """The agent names the paths, and writes in /work: neither dots nor its links lead out."""
        write_files(tmp_path, {"other/folder/file": "", "work/in/file": ""})
        for link in ("work/out", "work/in/out"):
            (tmp_path / link).symlink_to(tmp_path / "other")
        with pytest.raises(OSError, match="is not a folder below /work|Not a directory|symbolic links|No such file"):
            confbuild.give_to_build(path)
        assert {path.lstat().st_uid for path in tmp_path.rglob("*")} == {0}

    @pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="python3 is missing: apt-get install python3")  # a build cannot read /root
    @pytest.mark.skipif(not FILTERS, reason="the filter is one for Linux on x86-64")
    def test_forbidden_calls(self, broker: confbuild.Broker) -> None:
        """A build, and what it starts, has them no more than a kernel that was built without."""
        numbers = sorted(FORBIDDEN["x86_64"].values())
        code = f"import ctypes, errno; libc = ctypes.CDLL(None, use_errno=True)\n" \
               f"print(*(errno.errorcode[ctypes.get_errno()] for n in {numbers} if libc.syscall(n, -1, -1, -1, -1, -1) < 0))"
        assert self.run(f"/bin/sh -c \"exec /usr/bin/python3 -c '{code}'\"; grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status") == (
            0, b"", [" ".join(["ENOSYS"] * len(numbers)), "NoNewPrivs:\t1", "Seccomp:\t2"])


class TestQuestions:
    """What a first process makes of an agent that asks anything."""

    @staticmethod
    def asked(tmp_path: Path, *messages: bytes, fds: Sequence[int] = (), running: int = 0, close: bool = False, run: Any = None) -> tuple[Any, confbuild.GuestBroker]:
        """(the answer to messages, each a question at the same connection, or None where there is none, the broker)."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
            listener.bind(str(tmp_path / "socket"))
            listener.listen()
            broker = confbuild.GuestBroker(listener, False)
            broker._running.update({-n: socket.socket() for n in range(running)})
            if run is not None:
                broker._run = run  # type: ignore[method-assign]
            agent.connect(str(tmp_path / "socket"))
            for message in messages:
                socket.send_fds(agent, [message], list(fds))
            if close:
                agent.close()
            broker.answer()
            for connection in broker._running.values() if running else ():
                connection.close()
            return None if close else json.loads(agent.recv(1 << 16) or b"null"), broker

    @pytest.mark.parametrize("question", [
        b"", b"{", b"\xff\xfe", b"null", b"1", b"[]", b"{}", b'"op"', b"[" * 100_000, b'{"op": null}', b'{"op": []}', b'{"op": {}}', b'{"op": "reboot"}', b'{"op": "__init__"}',
        b'{"op": "own"}', b'{"op": "own", "paths": null}', b'{"op": "own", "paths": [1]}', b'{"op": "own", "paths": ["/work/a\\u0000b"]}', b'{"op": "own", "paths": "/work/a"}',
        b'{"op": "own", "paths": ["/work/\\ud800"]}', b'{"op": "report"}', b'{"op": "report", "data": 1}', b'{"op": "report", "data": "xy"}', b'{"op": "report", "data": ""}',
        b'{"op": "run"}', b'{"op": "run", "argv": ["x"], "env": {}, "cwd": "/"}', b'{"op": "own", "paths": [' + b"9" * 5000 + b"]}"],
        ids=lambda question: repr(question[:40]))
    def test_malformed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: bytes) -> None:
        """Each is answered, with what is wrong, and no descriptor is left."""
        monkeypatch.setattr(confbuild, "SYSROOT", str(tmp_path))
        (tmp_path / "work").mkdir()
        before = len(os.listdir("/proc/self/fd"))
        answer, _ = self.asked(tmp_path, question, fds=(0, 1))
        assert set(answer) == {"errno", "error"} and answer["errno"] in (errno.EINVAL, errno.EPERM, errno.EIO, errno.ENOTTY, errno.ENOENT) and 0 < len(answer["error"]) <= 500
        assert len(os.listdir("/proc/self/fd")) == before
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "socket").unlink()
        assert self.asked(tmp_path, b'{"op": "own", "paths": []}')[0] == {}, "the next one is answered too"

    @pytest.mark.parametrize("question", [
        {"argv": []}, {"argv": None}, {"argv": [1]}, {"argv": ["a\0b"]}, {"env": None}, {"env": {"A": 1}}, {"env": {"A": "a\0b"}}, {"env": {"A=": ""}, "argv": ["/nowhere"]}, {"cwd": 1},
        {"cwd": "/nowhere"}, {"argv": ["/nowhere"]}, {"argv": ["/bin/true", "x" * 140_000]}])
    @root_only
    def test_malformed_programs(self, tmp_path: Path, question: Mapping[str, Any]) -> None:
        whole = {"op": "run", "argv": ["/bin/true"], "env": {}, "cwd": "/", **question}
        with open(os.devnull, "r+b") as null:
            answer, broker = self.asked(tmp_path, json.dumps(whole).encode(), fds=[null.fileno()] * 3)
        assert set(answer) == {"errno", "error"} and broker._running == {}

    def test_silent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that asks nothing is given up, and told so."""
        monkeypatch.setattr(confbuild, "BROKER_TIMEOUT_S", 0.01)
        assert self.asked(tmp_path)[0] == {"errno": errno.EIO, "error": "timed out"}

    def test_deaf(self, tmp_path: Path) -> None:
        """One that goes away before the answer, or before the end of its program."""
        for question in (b"{", b'{"op": "own", "paths": []}'):
            self.asked(tmp_path, question, close=True)
            (tmp_path / "socket").unlink()
        _, broker = self.asked(tmp_path, b'{"op": "run"}', close=True, run=lambda *_: {"pid": 7})
        assert set(broker._running) == {7}
        broker.reaped(8, 0)
        broker.reaped(7, 0)
        assert broker._running == {}

    def test_many_programs(self, tmp_path: Path) -> None:
        assert self.asked(tmp_path, b'{"op": "run"}', running=confbuild.MAX_PROGRAMS)[0] == {"errno": errno.EAGAIN, "error": "64 programs run already"}


IMAGE = Path(os.environ.get("CONFBUILD_TEST_IMAGE", "/var/cache/confbuild-test/image"))
IS_IMAGE = (IMAGE / "image.json").is_file() and json.loads((IMAGE / "image.json").read_bytes())["confbuild_sha256"] == hashlib.sha256(FILE.read_bytes()).hexdigest()
needs_image = pytest.mark.skipif(not IS_IMAGE, reason="a guest image with this confbuild.py is missing: .ci/run makes one")
# What the compiler's wrapper finds out before it compiles for the first time: it runs as the build, and leaves what it saw as an artifact.
SPY = """#!/bin/sh
report=target/release/report
if [ ! -e $report ]; then
  mkdir -p target/release
  {
    echo user $(id -u) $(id -G)
    echo devices $(ls /dev)
    echo interfaces $(tail -n +3 /proc/net/dev | cut -d: -f1)
    echo others $(cat /proc/[0-9]*/status 2>/dev/null | grep '^Uid:' | grep -v 1001)
    for file in /run/broker/socket /work/agent /sys/kernel /dev/sev-guest /dev/vda /proc/1/environ /etc/shadow; do [ -r $file ] && echo reads $file; done
    for folder in / /usr /etc /work /work/agent /work/artifacts /run /dev /work/home /tmp; do [ -w $folder ] && echo writes $folder; done
    python3 -c 'import socket
for address in ("10.0.2.2", 22), ("10.0.2.15", 8080), ("127.0.0.1", 8080):
    try: socket.create_connection(address, 5); print("reaches", address)
    except OSError as e: print(e.strerror)'
    grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status
    echo io_uring $(cat /proc/sys/kernel/io_uring_disabled)
    python3 -c 'import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
print(*(errno.errorcode[ctypes.get_errno()] for n in (154, 250, 323, 425) if libc.syscall(n, -1, -1, -1, -1, -1) < 0))'
    python3 -c 'import os; [os.fork() for _ in range(3)]; os.setsid() if os.getpgrp() != os.getpid() else 0; os.close(1); os.close(2); import time; time.sleep(300)' &
  } > $report 2>&1
  chmod +x $report
fi
exec "$@"
"""


class GuestRuns(NamedTuple):
    """What guest_runs found. shim, other_kernel: (what the agent said, or nothing; the console)."""

    config: Any
    attestation: Any
    events: Sequence[Any]
    result: str
    left: Sequence[int]
    folders: Sequence[str]
    shim: tuple[str, str]
    other_kernel: tuple[str, str]


def guest_runs(folder: Path) -> GuestRuns:
    """Real QEMU guests: a build of origin.git by a server with one that waits, and two that a hostile host boots with other files."""
    s = Server(folder / "state", os.environ["PATH"], "--vm", "qemu", "--image", str(IMAGE), "--warm", "1", "--allow-scheme", "file", "--memory", "1536").start()
    config = json.loads(s.request("GET", "/config")[2])
    attestation = json.loads(s.request("GET", f"/attestation?nonce={NONCE}")[2])
    job = s.submit(repo_url=f"file://{folder}/spy.git")
    events = s.events(job)
    (folder / "result").write_bytes(s.request("GET", f"/build/{job}/result")[2])
    assert s.process is not None
    left = confbuild.descendants(s.process.pid)
    s.stop()
    folders = os.listdir(folder / "state/guests")
    (folder / "shim.efi").write_bytes(b"MZ" + bytes(4094))
    image = confbuild.read_image(str(IMAGE))
    (folder / "vmlinuz").write_bytes(Path(image.kernel).read_bytes() + b"\0")
    shim = boot_as_measured(folder, image, 5 * PATIENCE, "-shim", str(folder / "shim.efi"))
    other = boot_as_measured(folder, image._replace(kernel=str(folder / "vmlinuz")), 15)  # twice what the right one takes
    return GuestRuns(config, attestation, events, str(folder / "result"), [pid for pid in left if living(pid)], folders, shim, other)


def boot_as_measured(folder: Path, image: confbuild.Image, seconds: float, *options: str) -> tuple[str, str]:
    """(what the agent says within so many seconds, or empty; the console) of a guest that boots image, while the hashes are those of IMAGE."""
    config = {"token": "t", "policy": confbuild.SourcePolicy()._asdict()}
    honest = confbuild.QemuVm(confbuild.Guest("qemu", confbuild.read_image(str(IMAGE))), config, str(folder))
    argv = confbuild.qemu_argv(confbuild.Guest("qemu", image, memory_mib=1024), str(folder / "qmp"), "/dev/stderr", *honest._write_hashes())
    child = subprocess.Popen([*argv, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps({"platform": "qemu", "network": "none", **config}).encode() + b"\n")
        child.stdin.flush()
        said = child.stdout.readline().decode() if select.select([child.stdout], [], [], seconds)[0] else ""
    finally:
        child.kill()
        console = child.communicate()[1].decode("utf-8", "replace")
        honest.destroy()
    return said, console


@pytest.fixture(scope="session", autouse=True)
def guests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], GuestRuns]]:
    """guest_runs, in a process of its own beside all the other tests: emulation takes most of a minute, and a second processor has nothing to do."""
    if not any(getattr(item, "cls", None) is TestRealGuest for item in request.session.items) or (confbuild.qemu_version() or (0, 0)) < (10, 0) or (
            shutil.which("git") is None or not IS_IMAGE):
        yield lambda: pytest.fail("nothing was started")
        return
    folder = tmp_path_factory.mktemp("guests")
    origin = write_files(folder / "spy.git", {**project(), ".cargo/config.toml": '[build]\nrustc-wrapper = "./spy.sh"\n', "spy.sh": SPY})
    (origin / "spy.sh").chmod(0o755)
    write_files(origin, {}, commit=True)
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); from test_confbuild import *; print(json.dumps(guest_runs(Path(sys.argv[2]))))"
    with open(folder / "errors", "wb") as errors:
        child = subprocess.Popen([sys.executable, "-c", code, str(FILE.parent), str(folder)], stdout=subprocess.PIPE, stderr=errors, start_new_session=True)

    @functools.cache
    def collect() -> GuestRuns:
        output = child.communicate(timeout=10 * PATIENCE)[0]
        assert child.returncode == 0, (folder / "errors").read_text()
        return GuestRuns(*json.loads(output))

    yield collect
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@needs_qemu(10, 0)
@needs("git")
@needs_image
class TestRealGuest:
    def test_config(self, guests: Callable[[], GuestRuns]) -> None:
        """What a server of guests says before anything is built."""
        runs, image = guests(), confbuild.read_image(str(IMAGE))
        assert runs.config["platform"] == "qemu" and runs.config["confidential"] is False and "no hardware" in runs.config["notice"]
        assert (runs.config["image"]["manifest_sha256"], runs.config["measurement"]) == (image.manifest_sha256, image.launch_digests[0][2])
        assert runs.attestation["platform"] == "simulated"

    def test_events(self, guests: Callable[[], GuestRuns]) -> None:
        """A repository, fetched by the host, in a guest that waited; and nothing of any guest is left."""
        runs = guests()
        assert runs.events[-1] == OK_EVENT, runs.events
        vm = [event["msg"].partition(" file:")[0] for event in runs.events if event["type"] == "vm"]
        assert vm == ["QEMU guest, not confidential: fetching", "QEMU guest, not confidential: ready"]
        assert (runs.left, runs.folders) == ([], [])

    def test_bundle(self, guests: Callable[[], GuestRuns], tmp_path: Path) -> None:
        """Built by a user who reaches neither the network nor the agent, the attestation or the guest's other files; the bundle says what it is."""
        result = Path(guests().result)
        confbuild.unpack_archive(str(result), str(tmp_path))
        files = confbuild.read_bundle(str(tmp_path / "spy"))
        origin = result.parent / "spy.git"
        source = json.loads(provenance_of(files))["predicate"]["buildDefinition"]["externalParameters"]["source"]
        assert source == {"digest": {"gitCommit": git(origin, "rev-parse", "HEAD"), "gitTree": git(origin, "rev-parse", "HEAD^{tree}")}, "uri": f"file://{origin}"}
        verdict = confbuild.verify_bundle(files, confbuild.Expectations(nonce=NONCE, builder_id=confbuild.QEMU_BUILDER), NOW)
        assert verdict.verdict == "simulated" and verdict.claims["guest_network"] == "none"
        assert "QEMU guest, which is not confidential" in confbuild.render_verdict(verdict, False)
        assert (tmp_path / "spy/artifacts/report").read_text().split("\n") == [
            "user 1001 1001", "devices fd full null random stderr stdin stdout tty urandom zero", "interfaces lo", "others", "writes /work/home", "writes /tmp",
            "Network is unreachable", "Network is unreachable", "Connection refused", "NoNewPrivs:\t1", "Seccomp:\t2",
            "io_uring 2", "ENOSYS ENOSYS ENOSYS ENOSYS", ""]
        with_image = confbuild.verify_bundle(files, confbuild.Expectations(image=confbuild.check_image(str(IMAGE))), NOW)
        assert with_image.verdict == "failed" and status_of(with_image, "image parts") == status_of(with_image, "image firmware") == "passed"

    def test_shim(self, guests: Callable[[], GuestRuns]) -> None:
        """The firmware of an image boots the measured kernel, whatever file the host offers in its place."""
        assert guests().shim[0] == "8080\n", guests().shim[1]

    def test_another_kernel(self, guests: Callable[[], GuestRuns]) -> None:
        """Nothing comes up where the kernel is not the one that was measured."""
        said, console = guests().other_kernel
        assert said == "" and "confbuild" not in console and "Linux" not in console, console

# endregion 27
# ==============================================================================
# region 28. Client
# ==============================================================================


Answer = tuple[int, Mapping[str, str], bytes]
SSE = {"Content-Type": "text/event-stream"}
PROBLEM = {"Content-Type": "application/problem+json"}
CHUNKED = {"Transfer-Encoding": "chunked"}  # the bodies below then break off inside of a chunk


def frame(n: int, kind: str = "build", more: str = '"msg":"x"') -> bytes:
    """An event as the contract frames it."""
    return b'id: %d\ndata: {"type":"%s",%s}\n\n' % (n, kind.encode(), more.encode())


END = '"result":{"status":"ok"}'


class StandIn:
    """A small server that gives the next of answers to each request, the last one for ever, and closes the connection."""

    def __init__(self, *answers: Answer | Callable[[str, str], Answer]) -> None:
        self.seen: list[tuple[str, str, Mapping[str, str]]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.seen.append((self.command, self.path, dict(self.headers)))
                chosen = answers[min(len(outer.seen), len(answers)) - 1]
                status, headers, body = chosen(self.command, self.path) if callable(chosen) else chosen
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Endless:
    """A server that answers every request with head, and then with the same bytes for ever, until the client hangs up."""

    def __init__(self, head: bytes, again: bytes) -> None:
        self._head, self._again = head, again * max(1, 4096 // len(again or b"x"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url, self.asked = f"http://127.0.0.1:{self._listener.getsockname()[1]}", 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.asked += 1
                with sock, contextlib.suppress(OSError):
                    sock.recv(1 << 16)
                    sock.sendall(self._head)
                    while self._again:
                        sock.sendall(self._again)


def parsed(*blocks: bytes) -> list[tuple[str, str]]:
    """(data, id) of each event."""
    parser = confbuild.EventStreamParser()
    return [(event.data, event.id) for block in blocks for event in parser.feed(block)]


def standard_events(stream: bytes) -> list[tuple[str, str]]:
    """The same by the algorithm of HTML 9.2.6, step by step, over the whole stream."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, _ = re.split("\r\n|\r|\n", text)
    data, last_id, found = "", "", []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:  # "if the data buffer is an empty string ... return"; a line of empty data has left an LF there
                found.append((data[:-1], last_id))
            data = ""
        elif name == "data":
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            last_id = value
    return found


class TestEventStream:
    # WHATWG HTML, 9.2.6 "Interpreting an event stream": the four examples at its end, with what the text says of each.
    STANDARD = (
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("YHOO\n+2\n10", "")]),
        (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
         [("first event", "1"), ("second event", ""), (" third event", "")]),
        (b"data\n\ndata\ndata\n\ndata:", [("", ""), ("\n", "")]),
        (b"data:test\n\ndata: test\n\n", [("test", ""), ("test", "")]))
    RULES: tuple[tuple[bytes, list[tuple[str, str]]], ...] = (  # the same section's grammar and steps
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\ndata: d\r\n\rdata: e\n\r\n", [("a", ""), ("b", ""), ("c", ""), ("d", ""), ("e", "")]),
        (b"\xef\xbb\xbfdata: bom\n\n", [("bom", "")]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: two\n\ndata: b\n\n", [("b", "")]),  # the second one belongs to the field's name
        (b"\n\xef\xbb\xbfdata: late\n\n", []),
        (b"data:   x \n\ndata:\tx\n\n", [("  x ", ""), ("\tx", "")]),
        (b"data:\n\n", [("", "")]), (b"data: \n\n", [("", "")]), (b"\n\n\n", []),
        (b"id: 7\n\ndata: a\n\ndata: b\n\n", [("a", "7"), ("b", "7")]),  # persists, also over a block without data
        (b"id: 7\nid: 8\0\ndata: a\n\n", [("a", "7")]),
        (b"event: odd\ndata: a\nfoo: bar\nDATA: b\n data: c\n:data: d\n\n", [("a", "")]),
        (b"data: whole\n\ndata: half\n", [("whole", "")]), (b"data: half", []),
        (b"data: \xff\xe2\x82\n\n", [("\ufffd\ufffd", "")]))

    @pytest.mark.parametrize("stream, events", STANDARD + RULES)
    def test_known_answers(self, stream: bytes, events: list[tuple[str, str]]) -> None:
        assert parsed(stream) == parsed(*(stream[i:i + 1] for i in range(len(stream)))) == standard_events(stream) == events

    @pytest.mark.parametrize("value, seconds", [
        (b"1500", 1.5), (b"0", 0.0), (b"", None), (b"-1", None), (b"1.5", None), (b"1_0", None), (b" 5", None), (b"\xd9\xa3", None)])
    def test_retry(self, value: bytes, seconds: float | None) -> None:
        """ASCII digits only; `\\d` and int() would take more."""
        parser = confbuild.EventStreamParser()
        assert parser.feed(b"retry: " + value + b"\n") == []
        assert parser.retry_s == seconds

    @given(st.lists(st.sampled_from([b"data", b"id", b"retry", b":", b" ", b"\r", b"\n", b"\r\n", b"\n\n", b"x", b"\0", b"\xc3", b"\xa9", b"\xef\xbb\xbf"]),
                    max_size=60).map(b"".join), st.lists(st.integers(0, 200), max_size=12))
    @example(b"\xef\xbb\xbfdata\n\n", [1, 2])
    @example(b"data: a\r\n\r\n", [8, 9, 10])
    def test_any_split(self, stream: bytes, cuts: list[int]) -> None:
        ends = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        assert parsed(*(stream[a:b] for a, b in itertools.pairwise(ends))) == standard_events(stream)

    @settings(max_examples=30)
    @given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=5), max_size=5), st.integers(1, 40))
    @example([["\u2028\r\n\x85\0", "plain", "\x1b[1m"]], 3)
    def test_frames_of_the_server(self, tmp_path_factory: pytest.TempPathFactory, blocks: list[list[str]], size: int) -> None:
        log = confbuild.EventLog(str(tmp_path_factory.mktemp("log") / "events"))
        for messages in blocks:
            log.append(confbuild.to_payloads("build", messages))
        sent = os.pread(log.fd, log.size, 0)
        events = parsed(*(sent[i:i + size] for i in range(0, len(sent), size)))
        assert [json.loads(data)["msg"] for data, _ in events] == list(itertools.chain.from_iterable(blocks))
        assert [n for _, n in events] == [str(i + 1) for i in range(log.count)]

    @pytest.mark.parametrize("again", [b"x", b"data: x\n", b"data\n", b": keepalive\n\n", b"\n", b"\r", b"event: x\n\n", b"id: 7\n", b"retry: 1\n\n", b"\xff"])
    @pytest.mark.parametrize("size", [1, 1000])
    def test_no_event(self, monkeypatch: pytest.MonkeyPatch, again: bytes, size: int) -> None:
        """A server that never ends an event costs neither unlimited memory nor quadratic time; each event allows as much again."""
        monkeypatch.setattr(confbuild, "MAX_SILENCE", 2000)
        parser = confbuild.EventStreamParser()
        for _ in range(3):
            assert len([event for n in range(0, 1000, size) for event in parser.feed((again * 1000)[n:min(n + size, 1000)])]) == 0
            assert len(parser.feed(b"\n\ndata: x\n\n")) in (1, 2)
        stream = again * (2001 // len(again) + 1)
        with pytest.raises(confbuild.BrokenProtocol, match="more than 2000 bytes without an event"):
            for n in range(0, len(stream), size):
                parser.feed(stream[n:n + size])

    def test_a_long_line_in_pieces(self) -> None:
        """Byte by byte, a line is looked at once, not as a whole for each of its bytes."""
        parser, line = confbuild.EventStreamParser(), b"data: " + bytes(1 << 18)
        with within(20):
            for n in range(len(line)):
                parser.feed(line[n:n + 1])
            assert [len(event.data) for event in parser.feed(b"\n\n")] == [1 << 18]


class TestService:
    @pytest.fixture
    def naps(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """How long the client would have slept."""
        taken: list[float] = []
        monkeypatch.setattr(confbuild, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=taken.append))
        return taken

    def follow(self, *answers: Answer, start: int = 0) -> tuple[list[str], list[str], list[str]]:
        """(types of the events, what the user was told, paths asked for)."""
        told: list[str] = []
        with StandIn(*answers) as server:
            kinds = [event["type"] for event in confbuild.Service(server.url, "secret", told.append).events("j", start)]
            return kinds, told, [path for _, path, _ in server.seen]

    @pytest.mark.parametrize("broken", [
        (200, SSE, frame(1) + frame(2) + b'id: 3\ndata: {"type":"bu'),  # an unfinished event never was
        (200, {**SSE, **CHUNKED}, b"%x\r\n%s\r\n" % (len(frame(1)), frame(1)) + b"100\r\n" + frame(2)),
        (200, {**SSE, "Content-Length": "9999"}, frame(1) + frame(2))])
    def test_resumes(self, naps: list[float], broken: Answer) -> None:
        kinds, told, paths = self.follow(broken, (503, PROBLEM, b'{"detail":"I am busy"}'), (502, {}, b""),
                                         (200, SSE, frame(3) + frame(4, "complete", END)))
        assert kinds == ["build"] * 3 + ["complete"]
        assert paths == ["/build/j/events?from=0"] + ["/build/j/events?from=2"] * 3
        assert told == ["the connection was lost after event 2; resuming"]
        assert all(low <= nap < 2 * low for nap, low in zip(naps, (0.125, 0.25, 0.5), strict=True))  # exponential, with jitter

    def test_words_decide_nothing(self, naps: list[float]) -> None:
        """A busy server is waited for, whatever words it uses."""
        assert self.follow((503, PROBLEM, b'{"detail":"switching the protocol"}'), (200, SSE, frame(1, "complete", END)))[0] == ["complete"]

    def test_each_loss_is_told(self, naps: list[float]) -> None:
        """And the server's wish for a pause is heard, within reason."""
        _, told, paths = self.follow((200, SSE, b"retry: 4000\n" + frame(6)), (200, SSE, frame(7)), (200, SSE, frame(8, "complete", END)), start=5)
        assert paths == [f"/build/j/events?from={n}" for n in (5, 6, 7)]
        assert told == [f"the connection was lost after event {n}; resuming" for n in (6, 7)]
        assert [2 <= nap < 4 for nap in naps] == [True, True]

    def test_ends(self) -> None:
        assert self.follow((204, {}, b""), start=9) == ([], [], ["/build/j/events?from=9"])
        assert self.follow((200, SSE, frame(1, "complete", END) + frame(2)))[0] == ["complete"], "nothing comes after complete"

    def test_without_ids(self, naps: list[float]) -> None:
        """Kettle's server numbers nothing: its events are counted."""
        plain = b'data: {"type":"build","msg":"x"}\n\n'
        kinds, _, paths = self.follow((200, SSE, plain * 3), (200, SSE, b'data: {"type":"complete",' + END.encode() + b"}\n\n"))
        assert (kinds, paths[1]) == (["build"] * 3 + ["complete"], "/build/j/events?from=3")

    @pytest.mark.parametrize("answer, message", [
        ((200, SSE, frame(2)), "the server broke the protocol: event 2 after event 0"),
        ((200, SSE, frame(1) + frame(1)), "the server broke the protocol: event 1 after event 1"),
        ((200, SSE, frame(1) + frame(3)), "the server broke the protocol: event 3 after event 1"),
        ((200, SSE, b"data: nope\n\n"), "the server broke the protocol: event: not JSON"),
        ((200, SSE, b"data: " + b"[" * 33 + b"\n\n"), "nested deeper than 32"),
        ((200, SSE, b"data: [1]\n\n"), "an event without a type"), ((200, SSE, b'data: {"type":1}\n\n'), "an event without a type"),
        ((200, {"Content-Type": "text/html"}, b"<p>"), "the server broke the protocol: no event stream"),
        ((401, PROBLEM, b'{"detail":"who are you?"}'), "the server said 401: who are you?"),
        ((404, PROBLEM, b"[]"), "the server said 404: GET /build/j/events?from=0: Not Found"),
        ((302, {"Location": "/elsewhere"}, b""), "the server said 302: ")])
    def test_refused(self, answer: Answer, message: str) -> None:
        with pytest.raises(confbuild.RemoteError) as e:
            self.follow(answer)
        assert message in str(e.value) and e.value.exit_code == 4 and (e.value.status or 200) == answer[0]

    OPEN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    @pytest.mark.parametrize(("head", "again", "message"), [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "more than 20000 bytes without an end|HTTPException: got more than 100 interim responses"),  # of a Python that counts them
        (b"", b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n", "more than 20000 bytes|HTTPException: got more than 100 interim responses"),
        (b"", b"x", "LineTooLong: got more than 65536 bytes when reading status line"), (b"SSH-2.0-x\r\n", b"", "BadStatusLine: SSH-2.0-x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", "HTTPException: got more than 100 headers"), (b"HTTP/1.1 200 OK\r\n", b"x", "LineTooLong: got more than 65536 bytes"),
        (OPEN + b"0\r\n", b"X: y\r\n", "more than 20000 bytes without an end|HTTPException: got more than 100 trailers"), (OPEN + b"0\r\n", b"x", "LineTooLong: got more than 65536 bytes when reading trailer line"),
        (OPEN, b"1;", "LineTooLong: got more than 65536 bytes when reading chunk size"), (OPEN, b"1\r\n:\r\n", "more than 50000 bytes without an event"),
        (OPEN, b"d\r\n: keepalive\n\n\r\n", "more than 50000 bytes without an event"), (OPEN, b"8\r\ndata: x\n\r\n", "more than 50000 bytes without an event"),
        (OPEN, b"5\r\ndata:\r\n", "more than 50000 bytes without an event"), (OPEN + b"ffffffffffff\r\n", b"data: x\n", "more than 50000 bytes without an event"),
        (OPEN + b"-5\r\n", b"data: x\n", "more than 50000 bytes without an event"), (OPEN + b"d\r\n: keepalive\n\n\r\nzz\r\n", b"x", "IncompleteRead: ")])
    def test_endless(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], head: bytes, again: bytes, message: str) -> None:
        """What has no end is no answer, and is not asked for a second time."""
        monkeypatch.setattr(confbuild, "MAX_ANSWER", 200_000 if "LineTooLong" in message or "event" in message else 20_000)
        monkeypatch.setattr(confbuild, "MAX_SILENCE", 50_000)
        with Endless(head, again) as server, within(20):
            assert confbuild.main(["watch", "j", "--server", server.url]) == 4
        said = capsys.readouterr().err
        assert said.startswith(tuple("confbuild: error: the server broke the protocol: " + one for one in message.split("|"))) and server.asked == 1

    @pytest.mark.parametrize(("head", "again", "message"), [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "more than"), (b"HTTP/1.1 404 Not Found\r\n", b"X: y\r\n", "HTTPException: got more than 100 headers"),
        (OPEN + b"2\r\n{}\r\n0\r\n", b"X: y\r\n", "more than"), (OPEN + b"-1\r\n", b"x", "more than"), (OPEN + b"-5\r\n", b"x", "")])
    @pytest.mark.parametrize("command", ["list", "cancel j", "fetch j", "build https://example.org/x", "build https://example.org/x --tee --measurement " + "0" * 96])
    def test_endless_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, head: bytes, again: bytes,
                             message: str) -> None:
        """Nor is it to any other question, as far as it was asked for."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(confbuild, "MAX_ANSWER", 20_000)
        monkeypatch.setattr(confbuild, "MAX_RESULT", 100_000)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with Endless(head, again) as server, within(20):
            assert confbuild.main([*command.split(), "--server", server.url]) == 4
        assert "the server broke the protocol: " in (said := capsys.readouterr().err) and "Traceback" not in said and os.listdir() == []

    @pytest.mark.parametrize(("head", "again"), [(b"HTTP/1.1 20", b""), (OPEN[:-4], b""), (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (OPEN + b"0\r\n", b"X: y\r\n")])
    def test_slow_answers(self, monkeypatch: pytest.MonkeyPatch, naps: list[float], head: bytes, again: bytes) -> None:
        """An answer that takes longer than READ_TIMEOUT_S, however it passes the time, is a lost connection."""
        monkeypatch.setattr(confbuild, "READ_TIMEOUT_S", 0.05)
        monkeypatch.setattr(confbuild, "MAX_ANSWER", sys.maxsize)
        monkeypatch.setattr(confbuild, "RECONNECT_S", 0.0)
        with Endless(head, again) as server, within(20), pytest.raises(confbuild.RemoteError, match="lost for 0 s|got more than 100 (interim responses|trailers)"):
            list(confbuild.Service(server.url).events("j"))

    def test_gone(self, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> None:
        monkeypatch.setattr(confbuild, "RECONNECT_S", 0.0)
        with pytest.raises(confbuild.RemoteError, match="lost for 0 s, after event 1") as e:
            self.follow((200, SSE, frame(1)), (503, {}, b""))
        assert e.value.exit_code == 4
        with StandIn() as server:
            url = server.url
        with pytest.raises(confbuild.RemoteError, match="refused"):
            confbuild.Service(url).json("GET", "/builds")

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_no_redirect(self, status: int) -> None:
        """The token goes to the server that it is for, and nowhere else."""
        with StandIn((200, {}, b"{}")) as other, StandIn((status, {"Location": other.url + "/builds"}, b"")) as server:
            service = confbuild.Service(server.url, "secret")
            for method in ("GET", "POST", "DELETE"):
                with pytest.raises(confbuild.RemoteError, match=f"the server said {status}"):
                    service.open(method, "/builds")
            assert [headers["Authorization"] for _, _, headers in server.seen] == ["Bearer secret"] * 3
            assert other.seen == []

    @pytest.mark.parametrize("headers, body, message", [
        ({}, b"whole", ""), ({"Content-Length": "5"}, b"whole", ""), ({"Repr-Digest": "md5=:AA==:"}, b"whole", ""),
        ({"Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(b'whole').digest()).decode()}:"}, b"whole", ""),
        ({"Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(b'other').digest()).decode()}:"}, b"whole", "not what the server announced"),
        ({"Content-Length": "6"}, b"whole", "not what the server announced"), (CHUNKED, b"100\r\nwho", "broke off after"),
        ({"Content-Length": "many"}, b"whole", "not what the server announced")])
    def test_download(self, tmp_path: Path, headers: Mapping[str, str], body: bytes, message: str) -> None:
        with StandIn((200, headers, body)) as server, contextlib.ExitStack() as stack:
            if message:
                stack.enter_context(pytest.raises(confbuild.RemoteError, match=message))
            confbuild.Service(server.url).download("j", str(tmp_path / "file"))
        assert message or (tmp_path / "file").read_bytes() == body

    @pytest.mark.parametrize("headers, body", [({}, b"nope"), ({}, b"[]"), ({}, b"{}"), ({}, b'{"job_id":5}'), ({}, b'{"job_id":"../x"}'), ({}, b""),
                                               (CHUNKED, b'100\r\n{"job'), ({"Content-Length": "99"}, b'{"job')])
    def test_submit_and_json_of_garbage(self, headers: Mapping[str, str], body: bytes) -> None:
        request = confbuild.BuildRequest(NONCE, "https://example.com/x", "")
        with StandIn((200, headers, body)) as server:
            with pytest.raises(confbuild.RemoteError, match="broke"):
                confbuild.Service(server.url).submit(request, None)
            if not body.endswith((b"]", b"}")):
                with pytest.raises(confbuild.RemoteError, match="the server broke the protocol"):
                    confbuild.Service(server.url).json("GET", "/builds")

    def test_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A proxy of the environment is for other hosts, never for this machine."""
        with StandIn((200, {}, b'"ok"')) as server:
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
            for host in ("127.0.0.1", "localhost"):
                assert confbuild.Service(server.url.replace("127.0.0.1", host)).json("GET", "/builds") == "ok"
            monkeypatch.setenv("http_proxy", server.url)
            assert confbuild.Service("http://builds.invalid").json("GET", "/x") == "ok"
            assert server.seen[-1][1] == "http://builds.invalid/x"

    @pytest.mark.parametrize("url", ["ftp://x", "http://", "file:///etc", "http://[::1", "http://h:x/", "http://h:99999/"])
    def test_bad_url(self, url: str) -> None:
        with pytest.raises(confbuild.UsageError, match="is no http or https URL"):
            confbuild.Service(url)


@pytest.fixture
def plain_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """git with nobody's configuration."""
    for name, value in {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.com",
                        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.com"}.items():
        monkeypatch.setenv(name, value)


# Every kind of key by which git's configuration names a program, and what leads git to another configuration or work tree.
HOSTILE_CONFIG = """
[core]
    fsmonitor = {run}
    hooksPath = {hooks}
    pager = {run}
    sshCommand = {run}
    editor = {run}
    askPass = {run}
    gitProxy = {run}
    alternateRefsCommand = {run}
    worktree = {elsewhere}
    attributesFile = {attributes}
    excludesFile = {elsewhere}/secret
[filter "evil"]
    clean = {run}
    smudge = {run}
    process = {run}
    required = true
[diff]
    external = {run}
[diff "evil"]
    command = {run}
    textconv = {run}
[merge "evil"]
    driver = {run}
[pager]
    status = {run}
    ls-files = {run}
    config = {run}
[alias]
    ls-files = !{run}
    status = !{run}
    cat-file = !{run}
[gpg]
    program = {run}
[gpg "ssh"]
    program = {run}
[log]
    showSignature = true
[credential]
    helper = !{run}
[extensions]
    partialClone = origin
[remote "origin"]
    url = ext::{run}
    promisor = true
    partialclonefilter = blob:none
    uploadpack = {run}
    vcs = evil
[uploadpack]
    packObjectsHook = {run}
[protocol "ext"]
    allow = always
[protocol "file"]
    allow = always
[url "ext::{run} "]
    insteadOf = file://
[submodule "vendor"]
    update = !{run}
    ignore = none
[status]
    submoduleSummary = true
[trailer "evil"]
    command = {run}
[interactive]
    diffFilter = {run}
[include]
    path = {elsewhere}/included
[includeIf "gitdir:/"]
    path = {elsewhere}/included
"""


def make_hostile(root: Path, git_folder: Path, marker: Path) -> None:
    """Whatever obeys this configuration, its hooks, or that of a repository inside of it, touches marker."""
    run = script(marker.parent / "run", f"touch {marker}\ncat\n")
    elsewhere = write_files(marker.parent / "elsewhere", {"secret": "*\n", "included": f"[core]\n\tfsmonitor = {run}\n"})
    for hook in ("post-index-change", "post-checkout", "reference-transaction", "fsmonitor-watchman", "pre-auto-gc", "query-watchman"):
        script(elsewhere / "hooks" / hook, f"touch {marker}\n")
        script(git_folder / "hooks" / hook, f"touch {marker}\n")
    (elsewhere / "attributes").write_text("* filter=evil diff=evil merge=evil\n")
    config = HOSTILE_CONFIG.format(run=run, hooks=elsewhere / "hooks", elsewhere=elsewhere, attributes=elsewhere / "attributes")
    with open(git_folder / "config", "a") as f:
        f.write(config)
    for inner in (root / "vendor", root / "nested"):
        if inner.exists():
            with open(Path(git(inner, "rev-parse", "--absolute-git-dir")) / "config", "a") as f:
                f.write(config.replace("worktree", "nothing"))


@needs("git")
@pytest.mark.usefixtures("plain_git")
class TestCheckout:
    """What is said of a checkout, by a git that never finds its configuration."""
    @staticmethod
    def source(directory: Path, tmp_path: Path) -> tuple[list[str], str]:
        """The files of a source, and the commit, as `verify --source` reads them."""
        with tempfile.TemporaryDirectory(dir=tmp_path) as own:
            checkout = confbuild.open_checkout(str(directory), own)
            return sorted(confbuild.list_source(str(directory), checkout)), checkout.commit if checkout else ""

    @staticmethod
    def pack(directory: Path, tmp_path: Path) -> confbuild.Packed:
        with tempfile.TemporaryDirectory(dir=tmp_path) as scratch:
            return confbuild.pack_directory(str(directory), str(tmp_path / "packed.tar.gz"), scratch)

    @pytest.mark.parametrize("state", ["clean", "modified", "missing", "unborn"])
    @pytest.mark.parametrize("kind", ["plain", "linked", "file", "submodule"])
    def test_no_program_of_a_checkout_runs(self, tmp_path: Path, kind: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
        root, marker = write_files(tmp_path / "demo", {"a.txt": "a", ".gitattributes": "* filter=evil diff=evil merge=evil\n", "Cargo.lock": LOCK,
                                                       "Cargo.toml": MANIFEST}), tmp_path / "ran"
        git(root, "init", "-q", "-b", "main")
        if kind == "submodule":
            git(root, "submodule", "-q", "add", str(write_files(tmp_path / "library", {"lib.rs": "x"}, commit=True)), "vendor")
            write_files(root / "nested", {"x": "x"}, commit=True)
        git(root, "add", "a.txt", ".gitattributes", "Cargo.lock", "Cargo.toml")
        git(root, "commit", "-qm", "one")
        git_folder = root / ".git"
        if kind == "linked":
            git(root, "worktree", "add", "-q", "-b", "other", str(tmp_path / "linked"))
            root = tmp_path / "linked"
        elif kind == "file":
            git_folder.rename(tmp_path / "away")
            git_folder.write_text(f"gitdir: {tmp_path}/away\n")
            git_folder = tmp_path / "away"
        if state == "missing":
            name = git(root, "rev-parse", "HEAD:a.txt")
            (git_folder / "objects" / name[:2] / name[2:]).unlink()
        elif state == "unborn":
            git(root, "update-ref", "-d", "HEAD")
        make_hostile(root, git_folder, marker)
        os.utime(root / "Cargo.lock", (1, 1))  # so that git compares its contents
        if state == "modified":
            (root / "a.txt").write_text("b")
        packed = self.pack(root, tmp_path)
        assert bool(packed.commit) == (state == "clean" and kind != "submodule"), packed.note
        found, _ = self.source(root, tmp_path)
        assert {"a.txt", "Cargo.lock"} <= set(found) and ("vendor/lib.rs" in found) == (kind == "submodule")
        assert confbuild._expect_source(str(root), confbuild.Expectations(), "sha1").source_tree == packed.tree == confbuild.git_tree(str(root), found)
        assert confbuild.main(["verify", str(write_bundle(tmp_path / "bundle", bundle())), "--source", str(root)]) == 1
        with contextlib.suppress(confbuild.BuildFailed):
            confbuild.believe_history(str(root), packed.tree, ORACLE_ENV)
        assert not marker.exists(), "a program that the checkout names ran"

    def test_the_configuration_is_hostile(self, tmp_path: Path) -> None:
        """The test above would notice: git itself runs the programs."""
        root = write_files(tmp_path / "demo", {"a.txt": "a"}, commit=True)
        make_hostile(root, root / ".git", tmp_path / "ran")
        subprocess.run(["git", "-c", f"core.worktree={root}", "status"], cwd=root, env=ORACLE_ENV, capture_output=True, check=False)
        assert (tmp_path / "ran").exists()

    def test_what_works(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Kinds of checkouts: a linked work tree, a shallow one, one without some blobs, a link to one, one of SHA-256, odd names and forms."""
        origin = write_files(tmp_path / "origin", {"a.txt": "a", "sub/b.txt": "b", ".gitignore": "ignored\n"}, commit=True)
        git(origin, "commit", "-q", "--allow-empty", "-m", "two")
        git(origin, "config", "uploadpack.allowFilter", "true")
        head, tree = git(origin, "rev-parse", "HEAD"), git(origin, "rev-parse", "HEAD^{tree}")

        def clone(name: str, *options: str) -> Path:
            git(tmp_path, "clone", "-q", *options, f"file://{origin}", name)
            return tmp_path / name

        made = {"plain": origin, "shallow": clone("shallow", "--depth", "1"), "partial": clone("partial", "--filter=blob:none"),
                "shared": clone("shared", "--shared"), "odd": clone('o"d\nd\\\u00e9 '), "detached": clone("detached"), "packed": clone("packed"),
                "split": clone("split"), "v4": clone("v4"), "sparse index": clone("sparse"), "excluded": clone("excluded"), "mode": clone("mode")}
        git(origin, "worktree", "add", "-q", "--detach", str(tmp_path / "linked"))
        made["linked"] = tmp_path / "linked"
        (tmp_path / "link").symlink_to(origin)
        made["link"] = tmp_path / "link"
        git(made["detached"], "checkout", "-q", "--detach")
        git(made["packed"], "pack-refs", "--all")
        git(made["packed"], "repack", "-adq")
        git(made["split"], "update-index", "--split-index")
        git(made["v4"], "update-index", "--index-version", "4")
        git(made["sparse index"], "config", "index.sparse", "true")
        write_files(made["excluded"], {".git/info/exclude": "private\n", "private": "x"})
        git(made["mode"], "config", "core.fileMode", "false")
        (made["mode"] / "a.txt").chmod(0o755)
        (origin / "ignored").touch()
        for name, root in made.items():
            with monkeypatch.context() as patch:
                patch.chdir(root)
                packed = self.pack(Path("."), tmp_path)
            assert (packed.commit, packed.tree, packed.note) == (head, tree, f"commit {head} as git has it"), name
            assert self.source(root, tmp_path) == ([".gitignore", "a.txt", "sub/b.txt"], head), name
        assert self.source(made["linked"] / "sub", tmp_path) == (["b.txt"], head)

    def test_sha256(self, tmp_path: Path) -> None:
        root = tmp_path / "demo"
        git(tmp_path, "init", "-q", "--object-format=sha256", "demo")
        write_files(root, {"a.txt": "a", "Cargo.lock": LOCK, "Cargo.toml": MANIFEST})
        assert self.pack(root, tmp_path)[1:] == (confbuild.git_tree(str(root), ["a.txt", "Cargo.lock", "Cargo.toml"]), ""), "no commit: as elsewhere"
        git(root, "add", "-A")
        assert "git has no commit" in self.pack(root, tmp_path).note and self.source(root, tmp_path) == (["Cargo.lock", "Cargo.toml", "a.txt"], "")
        git(root, "commit", "-qm", "one")
        head, tree = git(root, "rev-parse", "HEAD"), git(root, "rev-parse", "HEAD^{tree}")
        assert len(head) == 64 and self.pack(root, tmp_path)[1:] == (tree, head)
        assert confbuild._expect_source(str(root), confbuild.Expectations(), "sha256").source_tree == tree
        (root / "a.txt").write_text("b")
        packed = self.pack(root, tmp_path)
        assert (len(packed.tree), packed.commit) == (40, "") and confbuild._expect_source(str(root), confbuild.Expectations(), "sha1").source_tree == packed.tree

    @pytest.mark.parametrize("broken", ["no objects", "link to nothing", "file to nothing", "damaged index", "damaged configuration"])
    def test_a_broken_repository(self, tmp_path: Path, broken: str) -> None:
        """Then all files are the source, as without git."""
        root = write_files(tmp_path / "demo", {"a.txt": "a", ".gitignore": "ignored\n", "ignored": ""})
        git(root, "init", "-q")
        if broken in ("link to nothing", "file to nothing"):
            shutil.rmtree(root / ".git")
            if broken == "file to nothing":
                (root / ".git").write_text("gitdir: nowhere\n")
            else:
                (root / ".git").symlink_to("nowhere")
        elif broken == "no objects":
            shutil.rmtree(root / ".git/objects")
        elif broken == "damaged index":
            (root / ".git/index").write_text("no index")
        else:
            (root / ".git/config").write_text("[core\n")
        everything = broken != "damaged configuration"  # which nobody needs
        assert self.source(root, tmp_path)[0] == [".gitignore", "a.txt", *(["ignored"] if everything else [])]
        assert self.pack(root, tmp_path).commit == ""

    def test_the_environment_leads_nowhere_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root, other = write_files(tmp_path / "demo", {"a": "a"}, commit=True), write_files(tmp_path / "other", {"b": "b"}, commit=True)
        for name in ("GIT_DIR", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_SHALLOW_FILE", "GIT_GRAFT_FILE"):
            monkeypatch.setenv(name, str(other / ".git"))
        monkeypatch.setenv("GIT_LITERAL_PATHSPECS", "1")
        monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
        monkeypatch.setenv("GIT_WORK_TREE", str(other))
        assert self.source(root, tmp_path)[0] == ["a"] and self.pack(root, tmp_path).commit == git(root, "rev-parse", "HEAD")

    def test_the_users_own_configuration_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = write_files(tmp_path / "demo", {"a": "a"}, commit=True)
        (tmp_path / "ignore").write_text("*.swp\n")
        (tmp_path / "gitconfig").write_text(f"[core]\n\texcludesFile = {tmp_path}/ignore\n[status]\n\tshowUntrackedFiles = no\n")
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
        (root / "a.swp").touch()
        assert self.source(root, tmp_path)[0] == ["a"] and self.pack(root, tmp_path).commit
        (root / "new").touch()
        assert self.source(root, tmp_path)[0] == ["a", "new"] and not self.pack(root, tmp_path).commit

    def test_an_embedded_repository_is_no_commit(self, tmp_path: Path) -> None:
        """git has a commit for it where others have files, whether or not .gitmodules names it."""
        root = write_files(tmp_path / "demo", {"a": "a"}, commit=True)
        write_files(root / "inner", {"b": "b"}, commit=True)
        git(root, "add", "inner")
        git(root, "commit", "-qm", "two")
        packed = self.pack(root, tmp_path)
        assert packed.commit == "" and "the repository has submodules, which are not fetched" in packed.note
        assert packed.tree == confbuild.git_tree(str(root), ["a", "inner/b"])


@needs("git")
@pytest.mark.usefixtures("plain_git")
class TestPackDirectory:
    BASE: Mapping[str, str] = {".gitignore": "ignored\ntarget\n", "a.txt": "a", "sub/b.txt": "b", "run.sh": "x"}

    @staticmethod
    def repository(tmp_path: Path) -> Path:
        root = write_files(tmp_path / "demo", TestPackDirectory.BASE)
        (root / "run.sh").chmod(0o755)
        (root / "link").symlink_to("a.txt")
        write_files(root, {}, commit=True)
        return write_files(root, {"ignored": "no", "target/x": "no"})

    def pack(self, directory: Path, tmp_path: Path) -> tuple[confbuild.Packed, dict[str, tarfile.TarInfo], bytes]:
        """What was packed, the members, and all their bytes."""
        scratch = tmp_path / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        packed = confbuild.pack_directory(str(directory), str(tmp_path / "packed.tar.gz"), str(scratch))
        with tarfile.open(tmp_path / "packed.tar.gz") as tar:
            members = {m.name.partition("/")[2]: m for m in tar.getmembers()}
            assert {m.name.partition("/")[0] for m in members.values()} == {"demo"}
            assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members.values()} == {(0, 0, "", "", 0)}
            return packed, members, b"\n".join(f.read() for m in members.values() if m.isreg() and (f := tar.extractfile(m)))

    @pytest.mark.parametrize("origin, kept", [
        ("", ""), ("https://user:hunter2@example.com/x.git", "https://example.com/x.git"), ("https://hunter2@example.com/x?token=hunter2", "https://example.com/x"),
        ("git@example.com:x.git", "example.com:x.git")], ids=["none", "password", "token", "scp"])
    def test_clean(self, tmp_path: Path, origin: str, kept: str) -> None:
        root = self.repository(tmp_path)
        git(root, "commit", "-q", "--allow-empty", "-m", "two")
        if origin:
            git(root, "remote", "add", "origin", origin)
        git(root, "config", "http.extraHeader", "Authorization: hunter2")
        packed, members, everything = self.pack(root, tmp_path)
        head = git(root, "rev-parse", "HEAD")
        assert packed == confbuild.Packed(f"commit {head} as git has it", git(root, "rev-parse", "HEAD^{tree}"), head)
        assert {n for n in members if not n.startswith(".git/") and n != ".git"} == {".gitignore", "a.txt", "sub/b.txt", "run.sh", "link"}
        assert members["link"].issym() and members["run.sh"].mode & 0o100 and not members["a.txt"].mode & 0o111
        assert b"hunter2" not in everything
        with tarfile.open(tmp_path / "packed.tar.gz") as tar:
            tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)  # Debian 12's Python has no filters
            tar.extractall(tmp_path / "out")
        out = tmp_path / "out/demo"
        assert git(out, "log", "--format=%H") == head, "the history has depth 1"
        assert git(out, "status", "--porcelain") == ""
        assert subprocess.run(["git", "config", "--get", "remote.origin.url"], cwd=out, capture_output=True, text=True, check=False).stdout.strip() == kept
        assert confbuild.believe_history(str(out), packed.tree, dict(os.environ)) == (head, kept)

    @pytest.mark.parametrize("change, why, gone, new", [
        (lambda r: (r / "a.txt").write_text("b"), "git has modified or untracked files", "", ""),
        (lambda r: (r / "new").write_text("b"), "git has modified or untracked files", "", "new"),
        (lambda r: (r / "a.txt").unlink(), "git has modified or untracked files", "a.txt", ""),
        (lambda r: git(r, "rm", "-q", "a.txt"), "git has modified or untracked files", "a.txt", ""),
        (lambda r: git(r, "update-ref", "-d", "HEAD"), "git has no commit", "", "")])
    def test_as_they_are(self, tmp_path: Path, change: Callable[[Path], Any], why: str, gone: str, new: str) -> None:
        root = self.repository(tmp_path)
        git(root, "remote", "add", "origin", "https://user:hunter2@example.com/x.git")
        change(root)
        packed, members, everything = self.pack(root, tmp_path)
        wanted = {".gitignore", "a.txt", "sub/b.txt", "run.sh", "link", new} - {gone, ""}
        assert (packed.note, packed.commit) == (f"{len(wanted)} files as they are, without history: {why}", "")
        assert set(members) == wanted and b"hunter2" not in everything
        git(root, "add", "-A")
        assert packed.tree == git(root, "write-tree"), "git is the oracle for what git would track"

    def test_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = self.repository(tmp_path)
        inner = write_files(root / "demo", {"Cargo.toml": "", "target/y": "no"})
        packed, members, _ = self.pack(inner, tmp_path)
        assert (set(members), packed.commit) == ({"Cargo.toml"}, "") and "a folder inside a git work tree" in packed.note
        shutil.rmtree(inner)
        everything = {".gitignore", "a.txt", "sub/b.txt", "run.sh", "link", "ignored", "target/x"}
        with monkeypatch.context() as m:
            m.setenv("PATH", str(tmp_path))
            packed, members, _ = self.pack(root, tmp_path)
        assert set(members) == everything and "there is no git" in packed.note
        shutil.rmtree(root / ".git")
        os.link(root / "a.txt", root / "twin")
        packed, members, _ = self.pack(root, tmp_path)
        assert set(members) == everything | {"twin"} and "it is no git work tree" in packed.note
        os.makedirs(tmp_path / "unpacked")
        confbuild.unpack_archive(str(tmp_path / "packed.tar.gz"), str(tmp_path / "unpacked"))
        project = str(tmp_path / "unpacked/demo")
        assert confbuild.git_tree(project, confbuild.walk_files(project)) == packed.tree

    def test_the_last_bundle_is_no_source(self, tmp_path: Path) -> None:
        """`build .` twice: the bundle of the first run makes the tree neither dirty nor larger."""
        root = self.repository(tmp_path)
        write_files(root / "demo-build", {"provenance.json": "{}", "artifacts/demo": "x"})
        for bundle_at, commit in ((str(root / "demo-build"), True), (str(tmp_path / "elsewhere"), False), ("", False)):
            shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
            os.mkdir(tmp_path / "scratch")
            packed = confbuild.pack_directory(str(root), str(tmp_path / "packed.tar.gz"), str(tmp_path / "scratch"), bundle_at)
            assert bool(packed.commit) == commit
        shutil.rmtree(root / ".git")
        shutil.rmtree(tmp_path / "scratch")
        os.mkdir(tmp_path / "scratch")
        confbuild.pack_directory(str(root), str(tmp_path / "packed.tar.gz"), str(tmp_path / "scratch"), str(root / "demo-build"))
        with tarfile.open(tmp_path / "packed.tar.gz") as tar:
            assert not [name for name in tar.getnames() if "demo-build" in name]

    def test_nothing_of_this_machine(self, tmp_path: Path) -> None:
        """A name of a folder here is nobody's business, nor are the credentials of a repository inside of the directory."""
        assert str(tmp_path).encode() not in self.pack(self.repository(tmp_path), tmp_path)[2]

    def test_inner_repository(self, tmp_path: Path) -> None:
        root = write_files(tmp_path / "demo", {"a": "a"})
        git(write_files(root / "vendor/dep", {"x": "y"}, commit=True), "remote", "add", "origin", "https://hunter2@example.com/")
        _, members, everything = self.pack(root, tmp_path)
        assert {"a", "vendor/dep/x"} <= set(members) and b"hunter2" not in everything

    def test_submodule(self, tmp_path: Path) -> None:
        library = write_files(tmp_path / "library", {"lib.rs": "x"}, commit=True)
        root = self.repository(tmp_path)
        git(root, "submodule", "-q", "add", str(library), "vendor")
        git(root, "commit", "-qm", "two")
        packed, members, _ = self.pack(root, tmp_path)
        assert "vendor/lib.rs" in members and "vendor/.git" not in members and packed.commit == ""
        assert "its history cannot be packed (the repository has submodules" in packed.note

    def test_nothing(self, tmp_path: Path) -> None:
        for folder in (tmp_path / "demo", write_files(tmp_path / "other" / "demo", {".git/x": ""})):
            folder.mkdir(exist_ok=True)
            with pytest.raises(confbuild.UsageError, match="there is nothing to build"):
                self.pack(folder, tmp_path)

    def test_other_repository_of_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in a hook of git, which sets GIT_DIR: the directory that was named is what is packed."""
        root = self.repository(tmp_path)
        other = write_files(tmp_path / "other", {"secret": "x"}, commit=True)
        head = git(root, "rev-parse", "HEAD")
        monkeypatch.setenv("GIT_DIR", str(other / ".git"))
        packed, members, _ = self.pack(root, tmp_path)
        assert packed.commit == head and "secret" not in members

# endregion 28
# ==============================================================================
# region 29. Rendering
# ==============================================================================


def screen(text: str, width: int = 10_000) -> list[str]:
    """What a terminal of that width shows at last: LF, cursor up to the start of a line, erase below, and nothing else."""
    rows, at = [""], 0
    for part in re.findall(r"\x1b\[\d+F|\x1b\[J|\n|\r|[^\x1b\n\r]+", re.sub(r"\x1b\[[\d;]*m", "", text)):
        if part == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif part.endswith("F") and part[0] == "\x1b":
            at = max(0, at - int(part[2:-1]))
        elif part == "\x1b[J":
            rows[at:] = [""]
        elif part != "\r":  # (that of a pty's CR LF)
            for start in range(0, len(part), width):
                if start:
                    at += 1
                rows[at:at + 1] = [part[start:start + width]]
    return [row for row in rows if row]


class TestRendering:
    def test_cells(self) -> None:
        """UAX 11: a wide character fills two cells."""
        assert [confbuild.cut_to_cells("a\u4e2db\uff21", n) for n in range(7)] == ["", "a", "a", "a\u4e2d", "a\u4e2db", "a\u4e2db", "a\u4e2db\uff21"]

    def test_the_clock_goes_on(self) -> None:
        """In the silence of a long link step the last lines and the time are still drawn."""
        stream = io.StringIO()
        display = confbuild.Display(stream, True, False)
        for n in range(3):
            display.event({"type": "build", "msg": f"line {n}"})
        wait_for(lambda: "line 2" in stream.getvalue() and re.search(r"build +0\.[3-9] s", stream.getvalue()))
        display.end(None)
        shown = stream.getvalue()
        assert shown.endswith("3 lines\ncomplete   ok\n")

    @pytest.mark.parametrize("text, plain", [
        ("plain \u00e9\u4e2d", "plain \u00e9\u4e2d"), ("\x1b[1;31mred\x1b[0m", "red"), ("\x1b[2J\x1b[1;1Hx\x1b[?25l", "x"), ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://e\x1b\\x\x1b]8;;\x1b\\", "x"), ("\x1bPq\x1b\\", "q"), ("a\x1bcb", "ab"), ("\x1b", ""), ("\x1b]0;never ended", "0;never ended"),
        ("a\rb\nc\x08\x00\x7f", "abc"), ("\x9b31mx\x85", "31mx"), ("\u202eevil\u202c\u2066x\u2069", "evilx"), ("a\tb", "a       b"), ("\x1b\x1b[31mx", "[31mx")])
    def test_plain_text(self, text: str, plain: str) -> None:
        assert confbuild.plain_text(text) == plain

    @given(st.text(st.sampled_from("\x1b[]m;0?\x07\\a\n\r\t\x9b\x9d\u202e\u2067"), max_size=30))
    def test_nothing_steers_a_terminal(self, text: str) -> None:
        shown = confbuild.plain_text(text)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown) and confbuild.plain_text(shown) == shown

    CHECKS = (confbuild.Check("short", "passed", "a", "a", "why it is so"), confbuild.Check("long", "passed", "x", "y" * 101),
              confbuild.Check("third one", "not checked", "", "v", "no expectation given"))
    GOLDEN = (
        ("simulated", (*CHECKS, confbuild.Check("longest", "passed", "x", "y" * 129), confbuild.Check("nonce", "passed", "1", "1")),
         ("ok   short      a\nok   long       " + "y" * 101 + "  (x)\n--   third one  v  no expectation given\nok   longest    " + "y" * 60 + " ...  (x)\nok   nonce      1\n"
          "SIMULATED: artifacts, provenance and evidence agree, but no hardware signed the evidence: it does not prove where or by whom this was built")),
        ("simulated", CHECKS[:1], ("ok   short  a\nSIMULATED: artifacts, provenance and evidence agree, but no hardware signed the evidence: "
                                  "it does not prove where or by whom this was built; not checked: nonce (--nonce)")),
        ("failed", (*CHECKS[:1], confbuild.Check("longer", "failed", "\x1b[1mx", "y\nz", "why"), confbuild.Check("form", "failed", detail="not \x1b]0;\x07JSON")),
         ("ok   short   a\nFAIL longer  why\n           expected x\n           actual   yz\nFAIL form    not JSON\n"
         "FAILED: 2 of 3 checks failed (longer, form): nothing is proven")),
        ("failed", tuple(confbuild.Check(f"n{i}", "failed") for i in range(5)),
         "".join(f"FAIL n{i}\n" for i in range(5)) + "FAILED: 5 of 5 checks failed (n0, n1, n2, n3, ...): nothing is proven"))

    @pytest.mark.parametrize("verdict, checks, text", GOLDEN)
    def test_verdict(self, verdict: str, checks: tuple[confbuild.Check, ...], text: str) -> None:
        record = confbuild.Verdict(verdict, "simulated", {}, checks)
        assert confbuild.render_verdict(record, False) == text
        colored = confbuild.render_verdict(record, True)
        assert re.sub(r"\x1b\[[\d;]+m", "", colored) == text
        marks = {"passed": "\x1b[32mok  \x1b[0m", "failed": "\x1b[31;1mFAIL\x1b[0m", "not checked": "\x1b[33m--  \x1b[0m"}
        marked = [row for row in colored.split("\n") if row[:1] == "\x1b"][:-1]
        assert all(row.startswith(marks[check.status]) for row, check in zip(marked, checks, strict=True))
        last = {"simulated": "\x1b[33;1mSIMULATED", "failed": "\x1b[31;1mFAILED"}[verdict]
        assert colored.rpartition("\n")[2].startswith(last + "\x1b[0m")

    ALL = ("provenance digest", "nonce", "measurement", "image measurement", "PCR values", "minimum TCB", "revocation", "revocation list age", "source tree", "trust anchors")
    THESE = "PASSED: these artifacts are those that the provenance lists, and it was signed in a confidential VM on an AMD Milan processor"
    NAMES = THESE.replace("in a confidential VM on an AMD Milan processor", "with a key that a report of an AMD Milan processor names, which anybody can have for a key of their own") + (
        "; not checked: whether it was signed in a VM at all (--measurement)")

    @pytest.mark.parametrize(("platform", "missing", "claims", "text"), [
        ("snp", "", {}, THESE), ("az-snp", "", {}, THESE), ("snp", "PCR values", {}, THESE), ("az-snp", "measurement", {}, THESE), ("az-snp", "image measurement", {}, THESE),
        ("az-snp", "measurement,image measurement", {}, NAMES), ("az-snp", "measurement,image measurement", {"debug": True}, NAMES), ("az-tdx", "measurement,image measurement", {}, NAMES),
        ("az-snp", "measurement,image measurement,trust anchors", {}, NAMES.replace("own;", "own, if the keys of --roots are AMD's;")), ("snp", "nonce", {}, THESE + "; not checked: nonce, so it may be old (--nonce)"),
        ("snp", "measurement,image measurement", {}, THESE + "; not checked: what the VM was launched with (--image, --measurement)"),
        ("snp", "measurement", {}, THESE), ("snp", "image measurement", {}, THESE),
        ("az-snp", "PCR values", {}, THESE + "; not checked: what booted in the VM (--pcr)"),
        ("snp", "minimum TCB", {}, THESE + "; not checked: how old the processor's firmware is (--min-tcb)"),
        ("snp", "revocation", {}, THESE + "; not checked: whether the keys are revoked (--crl)"),
        ("snp", "revocation list age", {}, THESE + "; not checked: whether the keys are revoked today: the list is not valid now"),
        ("snp", "source tree", {}, THESE + "; not checked: what the source is (--source)"),
        ("snp", "nonce,source tree", {}, THESE + "; not checked: nonce, so it may be old (--nonce), what the source is (--source)"),
        ("snp", "trust anchors", {}, THESE + ", if the keys of --roots are AMD's"),
        ("snp", "provenance digest,source tree", {}, THESE.replace("these artifacts are those that the provenance lists, and it was signed in",
                                                                   "evidence alone: no provenance and no artifact, signed in")),
        ("snp", "", {"debug": True}, THESE.replace("a confidential VM", "a VM in debug mode, which its host could read and change,")),
        ("snp", "", {"product": "Mi\x1b[2J\nlan"}, THESE)])
    def test_what_is_proven(self, platform: str, missing: str, claims: Mapping[str, Any], text: str) -> None:
        """The last line, in colour too, tells what nobody has asked for."""
        checks = [confbuild.Check(name, "not checked" if name in missing.split(",") else "passed", "1", "1") for name in self.ALL]
        record = confbuild.Verdict("passed", platform, {"product": "Milan", "debug": False, **claims}, checks)
        assert confbuild.render_verdict(record, False).rpartition("\n")[2] == text
        assert confbuild.render_verdict(record, True).rpartition("\n")[2] == "\x1b[32;1mPASSED\x1b[0m" + text[6:]

    def test_no_vm_is_claimed_of_a_key_that_anybody_may_have_made(self) -> None:
        """One report whose data is the digest of runtime data that somebody wrote: its key then signs whatever they like, in no VM."""
        other = {"report": made(snp_report, version=2, report_data=hashlib.sha256(OTHER_RUNTIME).digest()), "vek": made(vek_of), "runtime_data": OTHER_RUNTIME}
        files = azure_bundle(**other, signature=TOY_ASVK.pkcs1(QUOTE))
        for expected, claimed in ((HARDWARE, False), (HARDWARE._replace(measurements=["6d" * 48]), True)):
            verdict = verdict_over(files, expected, anchors=TOY_ANCHORS)
            said = confbuild.render_verdict(verdict, False).rpartition("\n")[2]
            assert verdict.verdict == "passed" and ("in a confidential VM" in said) == claimed and ("anybody can have" in said) != claimed

    @pytest.mark.parametrize(("builder", "guest"), [
        (confbuild.SIMULATED_BUILDER, ""), (confbuild.QEMU_BUILDER, " that this was built in a QEMU guest, which is not confidential")])
    def test_what_a_guest_is(self, builder: str, guest: str) -> None:
        verdict = verdict_over(bundle(statement(predicate__runDetails__builder__id=builder)), ANY)
        assert confbuild.render_verdict(verdict, False).rpartition("\n")[2] == (
            f"SIMULATED: artifacts, provenance and evidence agree{guest}, but no hardware signed the evidence: it does not prove where or by whom this was built")

    def test_skipped_checks_share_a_line(self) -> None:
        checks = [confbuild.Check(name, "not checked", detail=why) for name, why in (("a", "x"), ("b", "y"), ("c", "x"), ("\x1b[2Jd", "z\n\x07"))]
        rows = confbuild.render_verdict(confbuild.Verdict("simulated", "simulated", {}, [*checks, confbuild.Check("provenance digest", "not checked", detail="x")]), False)
        assert rows.split("\n")[:-1] == ["--   a, c, provenance digest: x", "--   b: y", "--   d: z"]
        assert rows.split("\n")[-1].startswith("SIMULATED: evidence alone: no provenance and no artifact, but no hardware signed the evidence: ")

    def test_claims(self) -> None:
        """Aligned with the checks, cut, on one line each; JSON for what is no text."""
        claims = {"report_version": 5, "text\x1b[2J": "a\nb\u202ec", "long": "x" * 129, "just": "y" * 128, "n" * 60: {"a": ["\x1b"]}}
        rows = confbuild.render_verdict(confbuild.Verdict("failed", "snp", claims, [confbuild.Check("check", "failed", "e" * 1001, "")]), False).split("\n")
        pad = " " * 5
        assert rows.pop(0) == "what the evidence says, and nothing proves:"
        assert rows[:4] == [f"{pad}{'report_version':40}  5", f"{pad}{'text':40}  abc", f"{pad}{'long':40}  {'x' * 125}...", f"{pad}{'just':40}  {'y' * 128}"]
        assert rows[4] == pad + "n" * 60 + '  {"a":["\\u001b"]}' and rows[6:8] == [f"{pad}{'':40}expected {'e' * 1000}", f"{pad}{'':40}actual   (empty)"]
        assert "report_version" not in confbuild.render_verdict(confbuild.Verdict("failed", "snp", {"report_version": None}, [confbuild.Check("check", "failed")]), False)

    @given(st.lists(st.tuples(st.text(max_size=50), st.sampled_from(["passed", "failed", "not checked"]), *[st.text(max_size=9) for _ in "123"]), min_size=1, max_size=4),
           st.dictionaries(st.text(max_size=9), JSON_VALUES, max_size=3))
    def test_no_verdict_steers_a_terminal(self, checks: list[tuple[str, ...]], claims: dict[str, Any]) -> None:
        for verdict in ("passed", "failed", "simulated"):
            record = confbuild.Verdict(verdict, "snp", {"report_version": 5, **claims}, [confbuild.Check(*check) for check in checks])
            text = confbuild.render_verdict(record, False)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
            assert all(row[:5] in ("ok   ", "FAIL ", "--   ", " " * 5) or row in ("ok", "FAIL", "--") for row in text.split("\n")[1:-1]), "one check, one line"

    EVENTS: tuple[Mapping[str, Any], ...] = (
        {"type": "queued", "position": 2}, {"type": "queued", "position": 0}, {"type": "vm", "msg": "boot\x1b[2J"},
        *({"type": "build", "msg": f"line {n} " + "x" * 90} for n in range(50)))
    FAILED: Mapping[str, str] = {"status": "failed", "error": "no \x1b[31mluck", "error_type": "BuildError"}

    @staticmethod
    def shown(monkeypatch: pytest.MonkeyPatch, live: bool, *events: Mapping[str, Any], end: bool = False) -> str:
        """What a display writes for events, a second apart, as `build` and `watch` call it."""
        out, clock = io.StringIO(), itertools.count()
        monkeypatch.setattr(confbuild, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
        monkeypatch.setenv("COLUMNS", "40")
        display = confbuild.Display(out, live, False)
        for event in events:
            display.event(event)
            if event["type"] == "complete":
                display.end(event["result"] if event["result"]["status"] == "failed" else None)
        if end:
            display.note("a\x1b[2J note")
        return out.getvalue()

    def test_live(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = self.shown(monkeypatch, True, *self.EVENTS)
        rows = screen(text)
        assert [row[:10].rstrip() for row in rows[:3]] == ["queued", "vm", "build"]
        assert rows[0].endswith(" s  next") and rows[1].endswith(" s  boot") and rows[2].endswith(" s  50 lines")
        assert all(re.fullmatch(r" +\d+\.\d s", row[10:19]) for row in rows[:3])
        assert rows[3:] == [f"  line {n} ".ljust(39, "x") for n in range(42, 50)], "the latest eight, cut to the terminal"
        assert len(screen(text, 40)) == len(rows), "no row wraps, which would spoil the erasing"
        done = screen(self.shown(monkeypatch, True, *self.EVENTS, {"type": "complete", "result": {"status": "ok"}}, end=True))
        assert [row[:10].rstrip() for row in done] == ["queued", "vm", "build", "complete", "confbuild:"] and done[-1] == "confbuild: a note"

    def test_live_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = screen(self.shown(monkeypatch, True, *self.EVENTS, {"type": "complete", "result": self.FAILED}))
        assert rows[-1] == "failed     BuildError: no luck"
        assert [row.split()[1] for row in rows[3:-1]] == [str(n) for n in range(10, 50)], "the last 40 lines and the root cause"

    def test_plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = self.shown(monkeypatch, False, *self.EVENTS[:4], {"type": "complete", "result": self.FAILED}, end=True)
        assert text == ("queued     place 2 in line\nqueued     next\nvm         boot\nbuild      line 0 " + "x" * 90 + "\n"
                        "failed     BuildError: no luck\nconfbuild: a note\n")

    @pytest.mark.parametrize("live", [False, True])
    @pytest.mark.parametrize("event, text", [
        ({"type": "novel\x1b[2J", "msg": "hello"}, "hello"), ({"type": "novel", "size": 5, "of": [1]}, '{"size":5,"of":[1]}'), ({"type": "novel"}, "{}"),
        ({"type": "queued", "position": "soon"}, "place soon in line"), ({"type": "build", "msg": 5, "more": 1}, "5")])
    def test_unknown_events(self, monkeypatch: pytest.MonkeyPatch, event: Mapping[str, Any], text: str, live: bool) -> None:
        """Clients ignore unknown keys and show an unknown type as text [CONTRACT 1]."""
        shown = self.shown(monkeypatch, live, event)
        assert shown.startswith(str(event["type"])[:5]) and text[:18] in shown and "\x1b[2J" not in shown

# endregion 29
# ==============================================================================
# region 30. Command line
# ==============================================================================


Shell = Callable[..., "subprocess.CompletedProcess[str]"]
PASSABLE = "SIMULATED: artifacts, provenance and evidence agree"
LONG = project("setsid sleep 600 & echo started $$ $!; sleep 600\n")


@pytest.fixture
def shell(tmp_path: Path, stub_path: str) -> Shell:
    """Runs confbuild in tmp_path, which holds the project `demo`, with a TMPDIR that must be empty afterwards."""
    write_files(tmp_path / "demo", project())
    (tmp_path / "tmp").mkdir()

    def run(*arguments: str | Path, how: Sequence[str] = PROGRAM[1:], **env: str) -> "subprocess.CompletedProcess[str]":
        everything = {**os.environ, "PATH": stub_path, "TMPDIR": str(tmp_path / "tmp"), **env}
        done = subprocess.run([sys.executable, *how, *map(str, arguments)], cwd=tmp_path, env=everything, text=True, capture_output=True, timeout=PATIENCE,
                              errors="replace", check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert list((tmp_path / "tmp").iterdir()) == [] and not [p for p in tmp_path.iterdir() if p.name.startswith(".confbuild-")]
        return done

    return run


def write_bundle(folder: Path, files: confbuild.BundleFiles) -> Path:
    """The bundle of `bundle()` as a directory."""
    return write_files(folder, {"artifacts/demo": b"artifact", "provenance.json": provenance_of(files), "evidence.json": files.evidence})


def result_archive(files: confbuild.BundleFiles) -> bytes:
    """The same as a server hands it out."""
    return tarball({"artifacts/demo": b"artifact", "provenance.json": provenance_of(files), "evidence.json": files.evidence})


def agreeing(nonce: str = NONCE) -> confbuild.BundleFiles:
    """What a server would hand out for the project `demo`, whose tree and (empty) log it has seen."""
    files = {name: content for name, content in project().items() if isinstance(content, str)}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        doc = statement(predicate__buildDefinition__externalParameters__source__digest__gitTree=confbuild.git_tree(folder, files))
    root = {"digest": {"sha256": confbuild.merkle_root(confbuild.merkle_entries(doc))}, "name": "input_merkle_root"}
    doc["predicate"]["runDetails"]["byproducts"] = [root, {"digest": {"sha256": hashlib.sha256(b"").hexdigest()}, "name": "build_log"}]
    return bundle(doc, nonce)


def gone(pid: int) -> bool:
    """Whether no such process lives."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


BUILD_AND_SERVE = (
    ("build", 2, "required: DIR|URL"),
    ("build demo --outpu json", 2, "unrecognized arguments"), ("build nowhere", 2, "nowhere: neither a directory nor a URL"),
    ("build demo --ref x", 2, "--ref goes with a URL"), ("build demo --nonce 00", 2, "--nonce: 32 hexadecimal digits or a UUID are needed"),
    ("build demo -o demo", 2, "demo exists, and is no bundle"), ("build demo -o demo/Cargo.toml", 2, "exists, and is no bundle"),
    ("build empty", 2, "empty: there is nothing to build"), ("build demo --build-timeout soon", 2, "invalid number of seconds value"),
    ("build demo --max-archive 0", 2, "argument --max-archive: invalid number above zero"), ("build https://u:p@example.com/x", 4, "credentials, queries and fragments are not accepted"),
    ("serve --listen 0.0.0.0:0", 2, "other machines can reach that\nconfbuild: hint: give --token-file FILE, or --insecure"),
    ("serve --listen [::]:0", 2, "other machines can reach that"), ("serve --listen example.com:0", 2, "other machines can reach that"),
    ("serve --listen nonsense", 2, "--listen nonsense: not HOST:PORT"), ("serve --listen 127.0.0.1:70000", 2, "not HOST:PORT"),
    ("serve --slots 0", 2, "argument --slots: invalid number above zero"), ("serve --token-file empty/../blank", 2, "no token in it"),
    ("serve --token-file nowhere", 2, "nowhere: No such file or directory"), ("serve --token-file binary", 2, "binary"),
    ("serve --listen 127.0.0.1:0 --state s --tls-cert blank", 2, "--tls-cert and --tls-key go together"),
    ("serve --listen 127.0.0.1:0 --state s --tls-cert blank --tls-key blank", 2, "error: "),
    ("serve --listen 127.0.0.1:0 --state blank", 2, "blank: File exists"),
    ("serve --tee --vm qemu", 2, "--tee is --vm snp, not --vm qemu"), ("build demo --tee", 2, "this machine cannot run SEV-SNP guests: "),
    *[(f"serve --state new {option}", 2, f"{option.split()[0]} goes with --tee, --vm snp or --vm qemu: a simulated VM is no guest") for option in (
        "--image empty", "--vcpus 1", "--vcpu-type EPYC", "--memory 2048", "--guest-network", "--vek blank", "--console")],
    ("serve --vm qemu", 2, "--vm qemu needs --image DIR: what the guest boots\nconfbuild: hint: `confbuild image` makes one"),
    ("serve --vm qemu --image empty", 2, "empty: no image.json in it"), ("serve --vm qemu --image empty --env X", 2, "--env: a guest sees nothing of this machine's environment"),
    ("serve --print-command", 2, "--print-command goes with --vm qemu, --vm snp or --tee"), ("build demo --measurement 0", 2, "--measurement goes with --tee"),
    *[(f"build demo --server http://127.0.0.1:1 {options}", 2, message) for options, message in (
        ("--image empty", "--image goes with --tee"), ("--vm sim", "--vm: that is the server's to say"), ("--tee --vcpus 2", "--vcpus: that is the server's to say"),
        ("--tee", "--tee needs --image DIR or --measurement HEX: else a VM that runs anything would do"), ("--tee --image empty", "empty: no image.json in it"),
        ("--tee --measurement 0", "--measurement: 96 hexadecimal digits are needed"))])
TEE = "serve --tee --state new"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """[status, stdout, stderr] of TEE and each of BUILD_AND_SERVE, which change the process that they run in: a fork each, and one start of Python for all."""
    folder = tmp_path_factory.mktemp("messages")
    write_files(folder, {"blank": "", "binary": b"\xff\xfe", "tmp/out": "", "tmp/err": "", **{f"demo/{name}": content for name, content in project().items()}})
    (folder / "empty").mkdir()
    found = drive("""
os.chdir(sys.argv[2])
found = {}
for line in sys.argv[3:]:
    child = os.fork()
    if child == 0:
        for fd, name in ((1, "tmp/out"), (2, "tmp/err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_TRUNC), fd)
        try:
            status = confbuild.main(line.split())
        except SystemExit as e:  # argparse's own
            status = e.code
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[line] = [status, *(open(f"tmp/{name}", encoding="utf-8").read() for name in ("out", "err"))]
answer(found)""", str(folder), TEE, *[line for line, _, _ in BUILD_AND_SERVE], TMPDIR=str(folder / "tmp"), NO_PROXY="*")
    assert sorted(os.listdir(folder / "tmp")) == ["err", "out"] and not list(folder.glob(".confbuild-*")) and not (folder / "new").exists()
    return dict(found)


class TestUsage:
    @pytest.mark.parametrize("line, status, message", [
        ("", 2, "the following arguments are required: COMMAND"), ("no-such", 2, "invalid choice"), ("list", 2, "required: --server"),
        ("list --server ftp://x", 2, "is no http or https URL"), ("list --server http://127.0.0.1:1", 4, "refused"),
        ("list --server http://127.0.0.1:1 --token-file binary", 2, "binary"), ("watch j --server http://127.0.0.1:1 --from -1", 2, "--from"),
        ("watch \u00e9 --server http://127.0.0.1:1", 2, "invalid job value"), ("verify nowhere", 2, "nowhere: No such file"), ("verify demo", 2, "demo/evidence.json: No such file"),
        ("verify blank", 2, "blank: neither a bundle nor its archive"), ("verify b --nonce 1", 2, "--nonce: 32 hexadecimal digits"),
        ("verify b --source-commit 1", 2, "--source-commit: 40 or 64 hex"), ("verify b --source-tree 1", 2, "--source-tree: 40 or 64 hex"),
        ("verify b --measurement 1", 2, "--measurement: 96 hex"), ("verify b --source nowhere", 2, "--source nowhere: no directory"),
        ("verify b --source empty", 2, "--source empty: "), (f"verify b --source demo --source-tree {'0' * 40}", 2, "which --source-tree contradicts"),
        ("verify b --format xml", 2, "invalid choice"), ("verify", 2, "required: BUNDLE"), ("verify -", 2, "stdin: neither a bundle nor its archive: the archive is empty"),
        ("verify b --host-data 1", 2, "--host-data: 64 hex"), (f"verify b --chip-id {'0' * 127}", 2, "--chip-id: 128 hex"), ("verify b --family-id x", 2, "--family-id: 32 hex"),
        (f"verify b --image-id {'g' * 32}", 2, "--image-id: 32 hex"), (f"verify b --measurement {'0' * 96} --measurement 0", 2, "--measurement: 96 hex"),
        ("verify b --guest-svn -1", 2, "--guest-svn"), ("verify b --guest-svn 1234567890", 2, "invalid number value"), ("verify b --guest-svn \u0661", 2, "invalid number value"),
        *[(f"verify b --min-tcb {levels}", 2, "invalid list of levels such as") for levels in (
            "snp", "snp=", "snp=256", "snp=-1", "snp=1,snp=1", "x=1", "snp=1,", "=1", "snp=0001", "snp=\u0661")],
        *[(f"verify b --max-age={age}", 2, "invalid age such as 30d value") for age in ("30", "d", "1.5h", "1234567d", "-1d", "1D", "\u0661d")],
        *[(f"verify b --pcr {pcr}", 2, "invalid register such as 4=HEX value") for pcr in ("4", "24=" + "0" * 64, "4=" + "0" * 63, "4=" + "g" * 64, "x=" + "0" * 64)],
        (f"verify b --pcr 4={'0' * 64} --pcr 4={'0' * 64}", 2, "--pcr: a register is given twice"),
        ("verify b --crl nowhere", 2, "nowhere: No such file"), ("verify b --vek nowhere", 2, "nowhere: No such file"), ("verify b --vek demo", 2, "demo: Is a directory"),
        ("verify b --roots nowhere", 2, "nowhere: No such file"), ("verify b --roots empty", 2, "--roots empty: no directory of milan, genoa, turin in it"),
        ("verify b --roots blank", 2, "blank: Not a directory"), ("verify b --policy nowhere", 2, "nowhere: No such file"),
        ("verify b --image nowhere", 2, "nowhere"), ("measure", 2, "required: --firmware, --vcpus"), ("measure --firmware f --vcpus 1", 2, "one of the arguments --vcpu-type --vcpu-sig"),
        ("measure --firmware f --vcpus 1 --vcpu-type EPYC-v4 --vcpu-sig 1", 2, "--vcpu-sig: not allowed with argument --vcpu-type"),
        ("measure --firmware f --vcpus 0 --vcpu-type EPYC-v4", 2, "--vcpus: invalid number above zero"), ("measure --firmware f --vcpus 1 --vcpu-type EPYC-v6", 2, "--vcpu-type: invalid choice"),
        ("measure --firmware f --vcpus 1 --vcpu-sig 0 --vmm xen", 2, "--vmm: invalid choice"),
        *[(f"measure --firmware f --vcpus 1 --vcpu-sig={text}", 2, "--vcpu-sig: invalid number such as 33 or 0x21 value") for text in (
            "", "-1", "0x", "x1", "1_0", "0X1", "0x" + "1" * 17, "1" * 21, "\u0661")],
        ("measure --firmware f --vcpus 1 --vcpu-sig 0 --initrd x", 2, "--initrd and --append go with --kernel"),
        ("measure --firmware f --vcpus 1 --vcpu-sig 0 --append=", 2, "--initrd and --append go with --kernel"),
        ("measure --firmware nowhere --vcpus 1 --vcpu-sig 0", 2, "nowhere: No such file"), ("measure --firmware empty --vcpus 1 --vcpu-sig 0", 2, "empty: Is a directory"),
        ("measure --firmware binary --vcpus 1 --vcpu-sig 0", 2, "error: binary: firmware: 2 bytes, expected 1 to 4096 pages"),
        *[(f"image {options}", 2, "exactly one of -o, --check and --lock is needed") for options in ("", "name", "-o i --check i", "-o i --lock l x", "--check i --lock l")],
        ("image --lock l", 2, "--lock needs the names of packages"), ("image --lock l -- -x", 2, "'-x' is not the name of a package"),
        ("image -o i x", 2, "the names of packages go with --lock"), ("image --check b x", 2, "the names of packages go with --lock"),
        *[(f"image -o i {options}", 2, "either --rootfs DIR or --packages LOCK and --debs FOLDER is needed") for options in (
            "", "--packages blank", "--debs empty", "--rootfs empty --packages blank --debs empty")],
        ("image -o i --rootfs empty --vcpus 0", 2, "--vcpus: invalid number above zero"), ("image -o i --rootfs nowhere", 2, "nowhere/: No such file"),
        ("image -o i --rootfs empty", 2, "has 0 kernels boot/vmlinuz-*, not one\nconfbuild: hint: name one with --kernel"), ("image -o empty --rootfs empty", 2, "empty exists"),
        ("image -o i --packages blank --debs empty", 2, "blank: no package in it"), ("image --check nowhere", 2, "nowhere: no image.json in it"),
        ("verify b --policy blank --policy blank", 2, "--policy is given more than once"), ("verify b --policy binary", 2, "--policy binary: not TOML: "),
        ("attest", 2, "required: FILE, --nonce"), ("attest blank --nonce 1", 2, "--nonce: 32 hex"), (f"attest nowhere --nonce {NONCE}", 2, "nowhere: No such file"),
        (f"attest demo --nonce {NONCE}", 2, "demo: Is a directory"), (f"attest blank --nonce {NONCE} --platform az-snp", 2, "invalid choice"),
        pytest.param(f"attest blank --nonce {NONCE}", 1, "this is no SEV-SNP guest: ", marks=pytest.mark.skipif(os.path.exists(confbuild.SEV_GUEST), reason="it is one"))])
    def test_messages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, status: int, message: str) -> None:
        (tmp_path / "empty").mkdir()
        write_files(tmp_path, {"blank": "", "binary": b"\xff\xfe", **{f"demo/{name}": content for name, content in project().items()}})
        write_bundle(tmp_path / "b", bundle())
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO()))
        try:
            returned: Any = confbuild.main(line.split())
        except SystemExit as e:  # argparse's own
            returned = e.code
        said = capsys.readouterr()
        assert (returned, said.out) == (status, "") and message in said.err, said.err

    @pytest.mark.parametrize("line, status, message", BUILD_AND_SERVE)
    def test_messages_of_build_and_serve(self, elsewhere: Mapping[str, Any], line: str, status: int, message: str) -> None:
        returned, out, errors = elsewhere[line]
        assert (returned, out) == (status, "") and message in errors and "Traceback" not in errors, errors

    def test_the_log_of_the_last_attempt(self) -> None:
        """A build that its server did not survive begins again: build_log covers the attempt that ended."""
        told: list[dict[str, Any]] = [{"type": "queued", "position": 0}, {"type": "build", "msg": "old"}, {"type": "queued", "position": 0},
                                      {"type": "build", "msg": "new"}, {"type": "complete", "result": {"status": "ok"}}]
        service: Any = types.SimpleNamespace(events=lambda job, start: iter(told))
        _, digest = confbuild._follow(argparse.Namespace(output="quiet"), service, "j", 0, None)
        assert digest == hashlib.sha256(b"new\n").hexdigest()

    @pytest.mark.parametrize(("put", "ours"), [
        ({}, True), ({"artifacts/demo": "changed"}, True), ({"artifacts/notes": "mine"}, False), ({"notes": "mine"}, False), ({"provenance.json": "{}"}, False),
        ({"provenance.json": None}, False), ({"evidence.json": None}, False), ({"artifacts/demo": None}, True)])
    def test_what_is_replaced(self, tmp_path: Path, put: dict[str, str | None], ours: bool) -> None:
        """An earlier bundle, an empty directory; nothing that holds a file of somebody else."""
        path = write_bundle(tmp_path / "b", bundle())
        for name, text in put.items():
            if text is None:
                (path / name).unlink()
            else:
                (path / name).write_text(text)
        (tmp_path / "empty").mkdir()
        confbuild._check_target(str(tmp_path / "empty"))
        (tmp_path / "link").symlink_to("b")
        (tmp_path / "only" / "artifacts").mkdir(parents=True)
        for name in ["link", "only", *([] if ours else ["b"])]:
            with pytest.raises(confbuild.UsageError, match=f"{name} exists, and is no bundle"):
                confbuild._check_target(str(tmp_path / name))
        if ours:
            confbuild._check_target(str(path))

    @pytest.mark.parametrize("command", ["agent", "fetcher", "sweep FOLDER"])
    def test_inner_commands_of_a_curious_user(self, tmp_path: Path, command: str) -> None:
        """They remove the workspace of a VM, and no other folder in which they are started."""
        write_files(tmp_path / "home", {"letter": "precious"})
        done = subprocess.run([*PROGRAM, *command.replace("FOLDER", str(tmp_path / "home")).split()], cwd=tmp_path / "home", stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 2 and "is not the workspace of a VM: expected the name confbuild-vm-" in done.stderr or command == "fetcher"
        assert (tmp_path / "home" / "letter").read_text() == "precious"

    def test_state_in_use(self, shell: Shell, server: Callable[..., Server], tmp_path: Path) -> None:
        one = server()
        done = shell("serve", "--listen", "127.0.0.1:0", "--state", one.state)
        assert done.returncode == 2 and "is in use by another server" in done.stderr
        write_files(tmp_path / "foreign", {"notes": ""})
        done = shell("serve", "--listen", "127.0.0.1:0", "--state", "foreign")
        assert done.returncode == 2 and done.stderr.splitlines() == [
            "confbuild: error: foreign is neither empty nor a state directory of confbuild", "confbuild: hint: name another directory with --state"]
        assert os.listdir(tmp_path / "foreign") == ["notes"]
        done = shell("serve", "--listen", f"127.0.0.1:{one.port}", "--state", "other")
        assert done.returncode == 2 and "Address already in use" in done.stderr

    def test_help(self, shell: Shell) -> None:
        commands = next(a for a in confbuild.build_parser()._actions if isinstance(a.choices, dict)).choices
        assert isinstance(commands, dict)
        top = shell("--help").stdout
        for name in sorted(set(commands) - {"agent", "fetcher", "sweep"}):
            text = shell(name, "--help").stdout
            assert re.search(rf"^ +{name} ", top, re.MULTILINE)
            for action in commands[name]._actions:
                assert all(re.search(rf"(^|[\s\[]){option}\b", text) for option in action.option_strings), (name, action.option_strings)
                assert action.help or not action.option_strings or action.choices, f"{name} {action.option_strings} says nothing"

    def test_broken_pipe(self, shell: Shell, tmp_path: Path) -> None:
        """Who reads the answer may go away: no noise."""
        write_bundle(tmp_path / "b", bundle())
        noise: list[tuple[list[str], bytes]] = []
        for arguments in (["verify", "b"], ["verify", "b", "--format", "json"], ["--version"], ["verify", "--help"]):
            reader, writer = os.pipe()
            os.close(reader)
            done = subprocess.run([*PROGRAM, *arguments], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE, check=False)
            os.close(writer)
            noise += [(arguments, done.stderr)] if done.stderr else []
            assert done.returncode != 3, "what nobody could read is no verdict"
        assert noise == []

    def test_old_pythons(self) -> None:
        """Those that are here, and one that is called so: an old Python reads the whole file before it runs the first line."""
        ast.parse(FILE.read_text(encoding="utf-8"), feature_version=(3, 7))
        found = [[str(p)] for p in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python")) if int(p.parts[-3].split(".")[1]) < 11]
        found += [[path] for n in range(6, 11) if (path := shutil.which(f"python3.{n}")) and "shims" not in path]
        found.append([sys.executable, "-c", "import runpy, sys; sys.version_info = (3, 10, 13, 'final', 0); runpy.run_path(sys.argv[1], run_name='__main__')"])
        for python in found:
            for arguments in (["--version"], ["verify", "x"]):
                done = subprocess.run([*python, str(FILE), *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
                assert (done.returncode, done.stdout) == (2, "")
                assert re.fullmatch(r"confbuild: error: Python 3\.11 or later is needed, this is 3\.\d+\n", done.stderr), (python, done.stderr)

    def test_imports(self) -> None:
        errors = subprocess.run([sys.executable, "-I", "-S", "-X", "importtime", str(FILE), "--version"], capture_output=True, text=True, check=True).stderr
        imported = {line.rpartition("|")[2].strip() for line in errors.splitlines()}
        assert "hashlib" in imported and not imported & {"http", "http.client", "tarfile", "subprocess", "ssl", "socket", "threading", "urllib", "logging"}


def pem(data: bytes, label: str) -> bytes:
    """[RFC7468]"""
    lines = re.findall(".{1,64}", b64(data))
    return "\r\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()


def bind(path: Path) -> None:
    """path is a socket."""
    before = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made_here:
        made_here.bind(os.fsencode(path.name))
    os.chdir(before)


PCR_4 = hashlib.sha256(bytes((4,))).hexdigest()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of every kind, and what may come beside: for bench alone."""
    folder = tmp_path_factory.mktemp("workshop")
    compact = json.dumps(statement(), separators=(",", ":"), ensure_ascii=False).encode()
    bare = snp_bundle(made(snp_report), made(vek_of))
    for name, files in {"b": snp(), "az": azure(), "sim": bundle(COMPLETE), "debug": snp({"policy": 0x30000 | 1 << 19}),
                        "bare": edited(bare, "evidence", "cert_chain"), "stripped": snp(), "alone": snp(),
                        "legacy": GOOD_BUNDLE._replace(evidence=confbuild.simulated_evidence(confbuild.report_data(compact, NONCE)))}.items():
        write_bundle(folder / name, files)
    (folder / "b.tar.gz").write_bytes(result_archive(snp()))
    for name in ("stripped", "alone"):
        (folder / name / "provenance.json").unlink()
    shutil.rmtree(folder / "alone/artifacts")
    ders = {f"{role}.der": data for role, data in TOY_CAS.items()}
    crl, revoked = made(toy_crl), made(toy_crl, serial=0x010001)
    write_files(folder, {
        "crl.der": crl, "crl.pem": pem(crl, "X509 CRL"), "revoked.der": revoked, "vek.der": made(vek_of), "vek.pem": b"\n" + pem(made(vek_of), "CERTIFICATE"),
        "other.der": made(vek_of, key=OTHER_VEK), "junk": b"junk", "forged.pem": b"-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n", "files/milan": b"",
        **{f"roots/milan/{name}": data for name, data in ders.items()}, "roots/README": b"", **{f"pem/Milan/{name}": pem(data, "CERTIFICATE") for name, data in ders.items()},
        **{f"hollow/milan/{name}": b"" for name in ders}, "partial/milan/ark.der": ders["ark.der"], "partial/milan/ask.der": ders["ask.der"],
        **{f"swapped/milan/{name}": made(vek_of) if name == "ask.der" else data for name, data in ders.items()}})
    (folder / "folder").mkdir()
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def bench(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, at NOW: a copy of workshop."""
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1795435200.0)
    return tmp_path


def toy_crl(serial: int | None = None) -> bytes:
    return crl_of("ARK-Milan", TOY_ARK, *([] if serial is None else [serial]))


class TestMachine:
    """What --tee and --vm are answered with; the guests themselves are in 23 and 27."""

    def test_no_snp_here(self, elsewhere: Mapping[str, Any]) -> None:
        """One screen that says what is missing and what to do about each; nothing was started."""
        status, out, errors = elsewhere[TEE]
        rows = errors.splitlines()
        found = re.findall(r"^confbuild: (ok   |MISS ) (QEMU|KVM|kvm_amd|/dev/sev|processor|image)(?:: .+)?$", errors, re.MULTILINE)
        missing = [name for word, name in found if word == "MISS "]
        assert (status, out, len(found)) == (2, "", 6) and missing[-1] == "image" and len(rows) == 6 + len(missing) + 2 < 24
        assert [n for n, row in enumerate(rows) if " MISS " in row] == [n - 1 for n, row in enumerate(rows) if row.startswith("confbuild:       -> ")]
        assert rows[-2:] == [f"confbuild: error: this machine cannot run SEV-SNP guests: {len(missing)} of 6 conditions are not met, and nothing was started",
                             "confbuild: hint: `--vm qemu` boots the same image in a guest that is not confidential"]

    @pytest.fixture
    def image(self, toy_python: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> confbuild.Image:
        """An image, on a machine that can do everything."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(confbuild, "preflight", list)
        monkeypatch.setattr(confbuild, "qemu_version", lambda: (10, 0))
        monkeypatch.setattr(confbuild, "sev_cpuid", lambda: (1 << 4, 7 << 6 | 47))
        monkeypatch.setattr(confbuild, "shed_syntax_tree", lambda: None)
        toy_root(tmp_path / "root")
        confbuild.make_image("image", confbuild.ImageInput("root", firmware=str(write_files(tmp_path, {"f": TOY_AMDSEV}) / "f"), vcpus=[("EPYC-v4", 1), ("EPYC-Milan", 2)]))
        return confbuild.read_image(str(tmp_path / "image"))

    @staticmethod
    def prepare(*options: str) -> confbuild.Machine:
        return confbuild._prepare_machine(confbuild.build_parser().parse_args(["serve", "--image", "image", *options]))

    def test_what_is_asked_for(self, image: confbuild.Image, monkeypatch: pytest.MonkeyPatch) -> None:
        """QEMU runs in a folder of its own, so that paths are absolute."""
        digests = {(kind, count): digest for kind, count, digest in image.launch_digests}
        plain, other = self.prepare("--tee"), self.prepare("--vm", "snp", "--vcpus", "2", "--vcpu-type", "EPYC-Milan", "--memory", "4096", "--guest-network")
        assert plain[:2] + plain[3:] == ("snp", confbuild.Guest("snp", image, cbitpos=47), digests["EPYC-v4", 1], "SEV-SNP guests", None, None) and plain.facts is not None
        assert plain.facts.manifest_sha256 == image.manifest_sha256
        assert other.guest == confbuild.Guest("snp", image, 2, "EPYC-Milan", 4096, True, 47) and other.launch_digest == digests["EPYC-Milan", 2]
        monkeypatch.setattr(confbuild, "sev_cpuid", lambda: (0, 0))
        assert self.prepare("--tee", "--print-command").guest == confbuild.Guest("snp", image)
        emulated = self.prepare("--vm", "qemu")
        assert emulated.guest == confbuild.Guest("qemu", image) and "the image's firmware, which checks kernel" in emulated.note and "not confidential" in emulated.note
        monkeypatch.setattr(confbuild, "qemu_version", lambda: (9, 2))
        emulated = self.prepare("--vm", "qemu")
        assert emulated.guest == confbuild.Guest("qemu", image, firmware=False) and "QEMU 9.2 itself, without the image's firmware: that takes QEMU 10" in emulated.note

    @pytest.mark.usefixtures("image")
    def test_what_cannot_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for options, message in (("--vcpus 2", "image is made for EPYC-v4, 1 vCPU, EPYC-Milan, 2 vCPUs, not for EPYC-v4, 2 vCPUs"),
                                 ("--vcpu-type host", ", not for host, 1 vCPU"), ("--memory 383", "--memory 383: a guest needs 384 MiB to boot")):
            with pytest.raises(confbuild.UsageError, match=re.escape(message)):
                self.prepare("--vm", "qemu", *options.split())
        monkeypatch.setattr(confbuild, "qemu_version", lambda: None)
        with pytest.raises(confbuild.UsageError, match="qemu-system-x86_64 is not installed"):
            self.prepare("--vm", "qemu")
        Path("image/initrd").write_bytes(b"another")
        with pytest.raises(confbuild.ImageError, match="image: initrd is not the one of image.json") as e:
            self.prepare("--tee")
        assert "makes the image anew" in e.value.hint

    def test_print_command(self, image: confbuild.Image, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """To be pasted into a shell; also where nothing could run it."""
        monkeypatch.setattr(confbuild, "preflight", raising(AssertionError("asked")))
        for options, guest in ((("--tee",), confbuild.Guest("snp", image, cbitpos=47)), (("--vm", "qemu"), confbuild.Guest("qemu", image))):
            assert confbuild.main(["serve", "--image", "image", "--print-command", *options]) == 0
            assert shlex.split(capsys.readouterr().out) == confbuild.qemu_argv(guest, "QMP", "CONSOLE", "HASHES_PAGE")


class TestBeforeTheSource:
    """`build --tee`: what the waiting VM's evidence must be before a byte of the source is sent."""

    BOOTED = confbuild.Expectations(measurements=["6d" * 48], require_tee=True)

    @staticmethod
    def waiting(nonce: str = NONCE, **report: Any) -> bytes:
        return snp({"report_data": confbuild.waiting_report_data(nonce), **report}).evidence

    @pytest.mark.parametrize(("evidence", "failed", "message"), [
        (lambda: TestBeforeTheSource.waiting(), "", ""), (lambda: TestBeforeTheSource.waiting("ab" * 16), "nonce", "does not verify"),
        (lambda: TestBeforeTheSource.waiting(measurement=b"x" * 48), "measurement", "does not verify"),
        (lambda: TestBeforeTheSource.waiting(policy=0xB0000), "debug", "does not verify"),
        (lambda: confbuild.simulated_evidence(confbuild.waiting_report_data(NONCE)), "hardware evidence", "does not verify"),
        (lambda: snp().evidence, "", "is of a VM that has built something, not of one that waits")])
    def test_evidence(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], evidence: Callable[[], bytes], failed: str, message: str) -> None:
        monkeypatch.setattr(confbuild, "utc_time", lambda _: NOW)
        monkeypatch.setattr(secrets, "token_hex", lambda _: NONCE)
        service: Any = types.SimpleNamespace(attestation=lambda nonce: evidence() if nonce == NONCE else b"")
        with pytest.raises(confbuild.ConfbuildError, match=message + ".*: no byte of the source was sent$") if message else contextlib.nullcontext():
            confbuild._check_waiting_vm(service, self.BOOTED, confbuild.Endorsements(THREE), confbuild._display(argparse.Namespace(output="plain")))
        said = capsys.readouterr().err
        assert (f"\nFAIL {failed}" in said) == bool(failed) and ("the VM that waits for the source verifies" in said) == (not message)

    def test_what_it_does_not_promise(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            confbuild.main(["build", "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert ("the evidence of the VM that waits at the server is verified before the source is sent. The server can still send the source elsewhere afterwards, "
                "since TLS does not end inside the VM yet.") in said
        readme = " ".join((FILE.parent / "README.md").read_text(encoding="utf-8").split())
        assert "can still send it elsewhere afterwards" in readme and "no byte of" not in readme

    def test_on_the_wire(self, shell: Shell) -> None:
        """A server whose VM is simulated is asked for evidence, and told nothing else."""
        def attest(_: str, path: str) -> Answer:
            return 200, {}, confbuild.simulated_evidence(confbuild.waiting_report_data(path.rpartition("=")[2]))

        with StandIn(attest) as server:
            done = shell("build", "demo", "--server", server.url, "--tee", "--measurement", "6d" * 48)
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.endswith("error: the server's VM does not verify: no byte of the source was sent\n")
        assert re.search(r"\nFAIL hardware evidence +--require-tee\n", done.stderr)
        assert [request[:2] for request in server.seen] == [("GET", server.seen[0][1])] and re.fullmatch("/attestation\\?nonce=[0-9a-f]{32}", server.seen[0][1])


class TestVerify:
    ZERO = "0" * 32

    @pytest.mark.parametrize("options, status, check", [
        ("", 3, ""), ("--allow-simulated", 0, ""), (f"--nonce {DASHED}", 3, ""), (f"--nonce {NONCE.upper()} --allow-simulated", 0, ""),
        (f"--nonce {'1' * 32}", 1, "nonce"), (f"--nonce {ZERO}", 1, "nonce is not zero"), ("--require-tee --allow-simulated", 1, "hardware evidence"),
        ("--measurement {m}", 3, ""), ("--measurement {M} --measurement " + "0" * 96, 3, ""), ("--measurement " + "0" * 96, 1, "measurement"),
        ("--source-uri https://x", 1, "source uri"), ("--source-commit " + "1" * 40, 1, "source commit"), ("--source-tree " + "12" * 20, 3, ""),
        ("--source-tree " + "13" * 20, 1, "source tree"), ("--source-tree " + "12" * 32, 1, "source tree"), ("--source-commit " + "AB" * 32, 1, "source commit"), ("--builder-id x", 1, "builder id"), ("--builder-id urn:confbuild:builder:simulated:v1", 3, "")])
    def test_flags(self, tmp_path: Path, options: str, status: int, check: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Of the directory in words, and of the archive as JSON."""
        measurement = confbuild.simulated_measurement().hex()
        options = options.format(m=measurement, M=measurement.upper())
        write_bundle(tmp_path / "b", bundle())
        (tmp_path / "b.tar.gz").write_bytes(result_archive(bundle()))
        assert confbuild.main(["verify", str(tmp_path / "b"), *options.split()]) == status
        assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED" if check else PASSABLE)
        returned = confbuild.main(["verify", str(tmp_path / "b.tar.gz"), "--format", "json", *options.split()])
        doc = json.loads(capsys.readouterr().out)
        assert (returned, doc["verdict"], doc["platform"]) == (status, "failed" if check else "simulated", "simulated")
        assert [c["name"] for c in doc["checks"] if c["status"] == "failed" and c["name"] not in {check} - {""}] in ([], ["nonce"])
        assert not check or {c["name"]: c["status"] for c in doc["checks"]}[check] == "failed"
        assert list(doc) == ["verdict", "platform", "claims", "checks"] and {"measurement", "report_data", "nonce", "chip_id"} <= set(doc["claims"])
        assert all(list(c) == ["name", "status", "expected", "actual", "detail"] for c in doc["checks"])
        assert doc["claims"]["nonce"] == NONCE and doc["claims"]["measurement"] == measurement

    @pytest.mark.parametrize("name, content, message", [
        ("artifacts/demo", b"other", "artifact demo"), ("artifacts/extra", b"", "unlisted files"), ("provenance.json", b"{", "provenance form"),
        ("evidence.json", b'{"platform":"snp"}', "platform"), (os.fsdecode(b"artifacts/\xff\x1b[2J"), b"", "unlisted files")])
    def test_tampered(self, shell: Shell, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        write_files(write_bundle(tmp_path / "b", bundle()), {name: content})
        done = shell("verify", "b", "--allow-simulated")
        assert done.returncode == 1 and re.search(rf"^FAIL {message}", done.stdout, re.MULTILINE) and "\x1b" not in done.stdout

    def test_no_socket(self, shell: Shell, tmp_path: Path) -> None:
        """Python's own audit events, raised at any use of a socket."""
        write_bundle(tmp_path / "b", bundle())
        (tmp_path / "b.tar.gz").write_bytes(result_archive(bundle()))
        watched = ("import sys\ndef hook(event, arguments):\n    if event.startswith('socket.'): raise SystemExit('a socket: ' + event)\n"
                   f"sys.addaudithook(hook); sys.path.insert(0, {str(FILE.parent)!r}); import confbuild; sys.exit(confbuild.main(sys.argv[1:]))")
        for path in ("b", "b.tar.gz"):
            done = shell("verify", path, "--source", "demo", "--format", "json", how=("-c", watched))
            assert (done.returncode, done.stderr) == (1, "") and '"name": "source tree",\n      "status": "failed"' in done.stdout
        assert "a socket: " in shell("list", "--server", "http://127.0.0.1:1", how=("-c", watched)).stderr, "the watch watches"

    def test_color(self, tmp_path: Path) -> None:
        """On a terminal only, and NO_COLOR counts."""
        write_bundle(tmp_path / "b", bundle())
        for env, colored in (({}, True), ({"NO_COLOR": "1"}, False)):
            master, slave = pty.openpty()
            base = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
            subprocess.run([sys.executable, str(FILE), "verify", "b"], cwd=tmp_path, stdout=slave, env={**base, "TERM": "xterm", **env}, check=False)
            os.close(slave)
            text = os.read(master, 65536)
            os.close(master)
            assert b"ok" in text and (b"\x1b[32m" in text) == colored

    @pytest.mark.parametrize("bundle_name, options, status, check", [
        ("b", "", 1, "VEK signature"), ("b", "--roots roots", 0, ""), ("b", f"--roots roots --nonce {NONCE} --require-tee", 0, ""),
        ("b", f"--roots roots --nonce {'1' * 32}", 1, "nonce"), ("b", "--roots pem", 0, ""), ("sim", "--require-tee", 1, "hardware evidence"),
        ("b", f"--roots roots --measurement {'6d' * 48}", 0, ""), ("b", f"--roots roots --measurement {'6d' * 47}6e", 1, "measurement"),
        ("b", "--roots roots --min-tcb snp=24,microcode=219", 0, ""), ("b", "--roots roots --min-tcb snp=25", 1, "minimum TCB"),
        ("b", "--roots roots --min-tcb fmc=0", 1, "minimum TCB"), ("b", f"--roots roots --host-data {'0' * 64}", 0, ""),
        ("b", f"--roots roots --host-data {'0' * 63}1", 1, "host_data"), ("b", "--roots roots --guest-svn 0", 0, ""), ("b", "--roots roots --guest-svn 1", 1, "guest_svn"),
        ("b", f"--roots roots --chip-id {CHIP_ID.hex().upper()}", 0, ""), ("b", f"--roots roots --chip-id {'0' * 128}", 1, "chip_id"),
        ("b", f"--roots roots --family-id {'0' * 32}", 0, ""), ("b", f"--roots roots --family-id {'1' * 32}", 1, "family_id"),
        ("b", f"--roots roots --image-id {'0' * 32}", 0, ""), ("b", f"--roots roots --image-id {'1' * 32}", 1, "image_id"),
        ("az", f"--roots roots --pcr 4={PCR_4}", 0, ""), ("az", f"--roots roots --pcr 4={'0' * 64}", 1, "PCR values"),
        ("az", f"--roots roots --pcr 04={PCR_4.upper()} --pcr 5={'0' * 64}", 1, "PCR values"), ("b", f"--roots roots --pcr 4={PCR_4}", 1, "required checks"),
        ("debug", "--roots roots", 1, "debug"), ("debug", "--roots roots --allow-debug", 0, ""),
        ("b", "--roots roots --crl crl.der --require-crl", 0, ""), ("b", "--roots roots --crl crl.pem", 0, ""), ("b", "--roots roots --crl revoked.der", 1, "revocation"),
        ("b", "--roots roots --crl crl.der --crl revoked.der", 1, "revocation"), ("b", "--roots roots --require-crl", 1, "required checks"),
        ("b", "--roots roots --crl junk", 1, "revocation list file junk"), ("b", "--roots roots --crl vek.der", 1, "revocation list file vek.der"),
        ("b", "--crl crl.der", 1, "revocation list file crl.der"), ("bare", "--roots roots", 1, "VEK form"), ("bare", "--roots roots --vek vek.der", 0, ""),
        ("bare", "--roots roots --vek vek.pem", 0, ""), ("bare", "--roots roots --vek junk", 1, "VEK form"), ("bare", "--roots roots --vek other.der", 1, "report signature"),
        ("b", "--roots roots --max-age 12h", 0, ""), ("b", "--roots roots --max-age 719m", 1, "age"), ("b", "--roots roots --max-age 43199s", 0, ""),
        ("b", "--roots roots --max-age 43198s", 1, "age"), ("b", f"--roots roots --build-type {confbuild.BUILD_TYPE}", 0, ""), ("b", "--roots roots --build-type x", 1, "build type"),
        ("sim", "--dep x@1 --dep pkg:cargo/y@2", 3, ""), ("sim", "--dep x@1 --dep y@1", 1, "packages"), ("sim", "--source-uri https://a/b", 3, ""),
        ("sim", f"--source-commit {'34' * 20}", 3, ""), ("legacy", "", 1, "provenance digest"), ("legacy", "--allow-legacy-digest", 3, ""),
        *[(f"{name}{path}", f"--roots roots{option}{more}", status, check) for name in ("alone", "stripped") for path, option in (("", " --evidence-only"), ("/evidence.json", ""))
          for more, status, check in (("", 0, ""), (" --build-type x", 1, "required checks"), (f" --nonce {'1' * 32}", 1, "nonce"))],
        ("stripped", "--roots roots", 1, "provenance form"), ("alone", "--roots roots", 1, "provenance form"), ("b/evidence.json", "--roots roots", 0, ""),
        ("b/evidence.json", f"--roots roots --build-type {confbuild.BUILD_TYPE}", 0, ""), ("b.tar.gz", "--roots roots --evidence-only", 0, "")])
    def test_options(self, bench: Path, capsys: pytest.CaptureFixture[str], bundle_name: str, options: str, status: int, check: str) -> None:
        """Both ways, over the toy hierarchy at a fixed time."""
        assert confbuild.main(["verify", bundle_name, "--format", "json", *options.split()]) == status
        doc = json.loads(capsys.readouterr().out)
        failed = {c["name"] for c in doc["checks"] if c["status"] == "failed"}
        assert (doc["verdict"], check in failed or not check) == ("failed" if check else "simulated" if status == 3 else "passed", True), failed
        assert not check or failed <= {check, "VEK signature", "nonce is not zero"}, failed

    @pytest.mark.parametrize(("path", "option", "others"), [
        ("stripped/evidence.json", "", "artifacts/demo"), ("stripped", "--evidence-only", "artifacts/demo"), ("b", "--evidence-only", "artifacts/demo, provenance.json"),
        ("b/evidence.json", "--evidence-only", "artifacts/demo, provenance.json"), ("b.tar.gz", "--evidence-only", "artifacts/demo, provenance.json"), ("alone/evidence.json", "", "")])
    def test_what_is_not_covered(self, bench: Path, capsys: pytest.CaptureFixture[str], path: str, option: str, others: str) -> None:
        (bench / "folder/policy.toml").write_text('roots = "../roots"\n' + ("evidence-only = true" if option else ""))
        for options in (["--roots", "roots", *option.split()], ["--policy", "folder/policy.toml"]):
            assert confbuild.main(["verify", path, *options]) == 0
            last = capsys.readouterr().out.splitlines()[-1]
            assert last.startswith("PASSED: evidence alone: no provenance and no artifact, signed") and (f"; not covered: {others}; not checked: " in last) == bool(others)
            assert others or "not covered" not in last
        assert confbuild.main(["verify", path, "--roots", "roots", "--format", "json", *option.split()]) == 0
        assert [check["actual"] for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "other files"] == ([others] if others else [])

    def test_image(self, bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """What is found in the directory is compared; of a policy, it is relative to that."""
        write_bundle(bench / "booted", snp({"host_data": b"\xab" * 32}))
        (bench / "folder/policy.toml").write_text('image = "../image"')
        folders: list[str] = []

        def check(folder: str) -> confbuild.ImageFacts:
            folders.append(folder)
            return TestHardwareVerdict.IMAGE

        monkeypatch.setattr(confbuild, "check_image", check)
        for name, options, status in (("booted", "--image image", 0), ("b", "--image image", 1), ("booted", "--policy folder/policy.toml", 0),
                                      ("booted", "--policy folder/policy.toml --image other", 0), ("booted", "--image=", 0), ("sim", "--image image", 1)):
            assert confbuild.main(["verify", name, "--roots", "roots", *options.split()]) == status
            said = capsys.readouterr().out
            assert ("FAIL image host_data" in said) == bool(status) and ("launched with" in said) == (status == 0 and "image measurement" not in said)
        assert folders == ["image", "image", "folder/../image", "other", "", "image"]

    @pytest.mark.parametrize("options, message", [
        ("--roots swapped", "Milan ask: not an RSA key"), ("--roots partial", "asvk.der: No such file"), ("--roots hollow", "Milan ark: "), ("--roots files", "Not a directory"),
        ("--vek forged.pem", "forged.pem: not base64: "), ("--roots=", "No such file"), ("--vek=", "No such file"), ("--source=", "--source : no directory"),
        ("--policy=", "No such file")])
    def test_endorsements_that_cannot_be_used(self, bench: Path, capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
        """An option whose shell variable is empty is not one that was left out."""
        assert confbuild.main(["verify", "b", "--roots", "roots", *options.split()]) == 2 and message in capsys.readouterr().err

    MANY = "\n".join(f'{name} = "{value}"' for name, value in (
        ("nonce", NONCE), ("builder-id", HARDWARE_BUILDER), ("source-tree", "12" * 20), ("build-type", confbuild.BUILD_TYPE), ("host-data", "0" * 64),
        ("chip-id", CHIP_ID.hex()), ("family-id", "0" * 32), ("image-id", "0" * 32), ("vek", "../vek.pem"), ("roots", "../roots"), ("max-age", "12h"), ("min-tcb", "bootloader=4,snp=24"))) + """
        guest-svn = 0
        require-tee = true
        require-crl = true
        allow-debug = false
        crl = ["../crl.der", "../crl.pem"]
        measurement = ["{}", "{}"]""".format("00" * 48, "6d" * 48)

    @pytest.mark.parametrize("toml, options, status, message", [
        (MANY, "", 0, "PASSED"), ("", "--roots roots", 0, "PASSED"), ("# nothing", "", 1, "VEK signature"), ('roots = "../roots"', "", 0, "PASSED"),
        ('roots = "../nowhere"', "", 2, "folder/../nowhere: No such file"), ('roots = "../nowhere"', "--roots roots", 0, "PASSED"),
        (MANY.replace(NONCE, "1" * 32), "", 1, "nonce"), (MANY.replace(NONCE, "1" * 32), f"--nonce {NONCE}", 0, "PASSED"), (MANY, f"--nonce {'1' * 32}", 1, "(nonce)"),
        (MANY, f"--measurement {'00' * 48}", 1, "measurement"), (MANY, f"--measurement {'6d' * 48}", 0, "PASSED"), (MANY, "--crl revoked.der", 1, "revocation"),
        (MANY, "--min-tcb snp=25", 1, "minimum TCB"), (MANY.replace("snp=24", "snp=25"), "--min-tcb snp=24", 0, "PASSED"),
        (MANY.replace("snp=24", "snp=25"), "", 1, "minimum TCB"), (MANY.replace("guest-svn = 0", "guest-svn = 1"), "", 1, "guest_svn"),
        ("require-crl = true", "--roots roots", 1, "revocation"), ("require-crl = false", "--roots roots", 0, "PASSED"), ("min-tcb = { bootloader = 4, snp = 24 }", "--roots roots", 0, "PASSED"), ("min-tcb = { snp = 25 }", "--roots roots", 1, "minimum TCB"),
        ('dep = "pkg:x"', "--roots roots", 1, "packages"), ('dep = ["pkg:x"]', "--dep pkg:y", 1, "packages"), ('builder-id = "x"', "--builder-id y", 1, "y"),
        ('source = "../empty"', "--roots roots", 2, "--source folder/../empty: "), (f'pcr = "4={"0" * 64}"', f"--roots roots --pcr 4={PCR_4}", 0, "PASSED"),
        (f'pcr = ["4={PCR_4}", "5={PCR_4}"]', "--roots roots", 1, "PCR values"), (f'pcr = ["4={PCR_4}", "4={PCR_4}"]', "", 2, "--pcr: a register is given twice"),
        ("allow-simulated = true", "--roots roots", 0, "PASSED"), ('crl = "../nowhere"', "--roots roots", 2, "nowhere: No such file")])
    def test_policy(self, bench: Path, capsys: pytest.CaptureFixture[str], toml: str, options: str, status: int, message: str) -> None:
        (bench / "folder/policy.toml").write_text(toml)
        assert confbuild.main(["verify", "az" if "pcr" in toml else "b", "--policy", "folder/policy.toml", *options.split()]) == status
        said = capsys.readouterr()
        assert message in (said.err if status == 2 else said.out.splitlines()[-1] if message == "PASSED" else said.out)

    @pytest.mark.parametrize("toml, message", [
        ("x", "not TOML: "), ("nonce = 1\nnonce = 1", "not TOML: "), ("\ufeffnonce = 1", "not TOML: "), ("x = " + "[" * 5000, "not TOML: "), ("nonce = 2026-13-45", "not TOML: "),
        ("guest-svn = " + "1" * 5000, "not TOML: Exceeds the limit"), ("guest-svn = 0x" + "f" * 5000, "guest-svn is neither text nor a whole number"),
        (f"guest-svn = {1 << 63}", "guest-svn is neither"), ("x = 1", "'x' is unknown\nconfbuild: hint: known are allow-debug, "), ('"\\u001b[2J" = 1', "is unknown"),
        *[(f'{name} = "x"', f"{name!r} is unknown") for name in ("policy", "format", "bundles", "run", "version", "source_uri", "help", "-o", "Nonce")], ("[verify]\nnonce = 1", "'verify' is unknown"),
        *[(f"nonce = {value}", "nonce is neither text nor a whole number, nor a list of them") for value in (
            "true", "1.5", "nan", "2026-11-23", "{a = 1}", '"a\\u0000"')], ("crl = []", "crl is an empty list"), *[(f"dep = {value}", "dep is neither text nor a whole number, nor a list")
          for value in ("[[]]", "[true]", '["a", 1.5]')], *[(f"{name} = {value}", f"{name} is given once, not as a list") for name, value in (
            ("nonce", "[]"), ("nonce", '["a"]'), ("min-tcb", '["snp=255", "tee=0"]'), ("guest-svn", "[99, 10]"), ("vek", '["a"]'))],
        ('min-tcb = {snp = "24"}', "min-tcb is neither"), ("min-tcb = {snp = true}", "min-tcb is neither"), ("min-tcb = {snp = 256}", "min-tcb is neither"),
        ("min-tcb = {snp = -1}", "min-tcb is neither"), ("min-tcb = {x = 1}", "argument --min-tcb: invalid list of levels"), ("min-tcb = {}", "argument --min-tcb: invalid list of levels"),
        ('source-uri = {a = "b"}', "source-uri is neither"), ('require-tee = "yes"', "require-tee is neither true nor false"), ("require-tee = 1", "require-tee is neither true"),
        ("max-age = 30", "argument --max-age: invalid age"), ('nonce = "x"', "--nonce: 32 hex"), ('roots = "a\\u0000b"', "roots is neither"), ('vek = "\\u001b[2J"', "No such file")])
    def test_policies_that_are_none(self, bench: Path, capsys: pytest.CaptureFixture[str], toml: str, message: str) -> None:
        (bench / "p.toml").write_text(toml)
        try:
            status: Any = confbuild.main(["verify", "b", "--policy", "p.toml"])
        except SystemExit as e:  # argparse's own
            status = e.code
        said = capsys.readouterr()
        assert (status, said.out) == (2, "") and message in said.err and "\x1b" not in said.err, said.err

    @pytest.mark.parametrize("size, status", [(1 << 20, 0), ((1 << 20) + 1, 2)])
    def test_large_policies(self, bench: Path, capsys: pytest.CaptureFixture[str], size: int, status: int) -> None:
        (bench / "p.toml").write_text("#" * size)
        assert confbuild.main(["verify", "b", "--policy", "p.toml", "--roots", "roots"]) == status
        assert status == 0 or "p.toml: more than 1048576 bytes" in capsys.readouterr().err

    @pytest.mark.parametrize("bundles, options, status", [
        ("b b.tar.gz", "", 0), ("b sim", "", 3), ("sim b", "--allow-simulated", 0), ("b stripped", "", 1), ("sim stripped b", "", 1), ("nowhere b", "", 2),
        ("stripped sim junk b", "", 2), ("- b", "", 0), ("b - -", "", 2), ("- -", "--allow-simulated", 2)])
    def test_several(self, bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundles: str, options: str, status: int) -> None:
        """The worst of all is the status: unreadable, failed, simulated, passed. Each is told, whatever the others are."""
        verdicts = {"b": "passed", "b.tar.gz": "passed", "sim": "simulated", "-": "passed"}
        for form in ("text", "json"):
            monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO((bench / "b.tar.gz").read_bytes())))
            assert confbuild.main(["verify", *bundles.split(), "--roots", "roots", "--format", form, *options.split()]) == status
            said = capsys.readouterr()
            names = bundles.split()
            unreadable = [name for i, name in enumerate(names) if name in ("nowhere", "junk") or name == "-" and name in names[:i]]
            assert said.err.count("confbuild: error: ") == len(unreadable)
            if form == "json":
                docs = json.loads(said.out)
                assert [doc["bundle"] for doc in docs] == names and list(docs[0])[:2] == ["bundle", "verdict"]
                assert [doc["verdict"] for doc in docs] == ["failed" if name == "-" and "-" in names[:i] else verdicts.get(name, "failed") for i, name in enumerate(names)]
                assert [name for name, doc in zip(names, docs, strict=True) if "error" in doc] == unreadable
                assert all(list(doc) == ["bundle", "verdict", "platform", "claims", "checks"] for doc in docs if "error" not in doc)
            else:
                readable = [name for name in names if name not in ("nowhere", "junk")][:len(names) - len(unreadable)]
                assert [row for row in said.out.splitlines() if row in names] == readable
                assert len(re.findall(r"^(PASSED|FAILED|SIMULATED): ", said.out, re.MULTILINE)) == len(readable)

    def test_one(self, bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One bundle is one object, and one that cannot be read is no verdict."""
        assert confbuild.main(["verify", "b", "--roots", "roots", "--format", "json"]) == 0
        assert list(json.loads(capsys.readouterr().out)) == ["verdict", "platform", "claims", "checks"]
        for form in ("json", "text"):
            assert confbuild.main(["verify", "nowhere", "--format", form]) == 2
            said = capsys.readouterr()
            assert said.out == "" and said.err.startswith("confbuild: error: nowhere: ")

    def test_bundles_with_odd_names(self, bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = ["a\nPASSED: all", "\x1b[2Jx", os.fsdecode(b"\xff"), "--", "\u202egpj"]
        for name in names:
            shutil.copytree(bench / "b", bench / name)
            shutil.copy(bench / "junk", bench / f"{name}.tar.gz")
        paths = [f"./{name}" for name in names] + [f"./{name}.tar.gz" for name in names]
        assert confbuild.main(["verify", "--roots", "roots", *paths]) == 2
        said = capsys.readouterr()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", said.out + said.err)
        assert said.out.count("\nPASSED: ") == len(names) and said.err.count("\nconfbuild: hint: ") == len(names)

    def test_hostile_artifacts(self, bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """`verify DIR && DIR/artifacts/x`: whatever x is, if the statement does not list its very bytes, no."""
        def fails(*checks: str) -> None:
            with within(20):
                assert confbuild.main(["verify", "b", "--roots", "roots", "--format", "json"]) == 1
            text = capsys.readouterr().out
            assert {c["name"] for c in json.loads(text)["checks"] if c["status"] == "failed"} == set(checks) and text.isascii()

        folder = bench / "b/artifacts"
        for name in ("x", ".hidden", "demo ", "Demo", "demo\n", "\x1b[2J", os.fsdecode(b"demo\xff"), "x" * 255, "-rf"):
            for make in (lambda path: path.write_bytes(b"artifact"), lambda path: path.mkdir(), lambda path: path.symlink_to("demo"), os.mkfifo, bind):
                if make is bind and len(name) > 50:
                    continue  # an address has 107 bytes
                make(folder / name)
                fails("unlisted files")
                (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
        (folder / "demo").rename(bench / "elsewhere")
        for make in (lambda path: path.symlink_to(bench / "elsewhere"), lambda path: path.mkdir(), os.mkfifo, lambda path: path.write_bytes(b"Artifact")):
            make(folder / "demo")
            fails("artifact demo", "artifacts")
            (folder / "demo").rmdir() if (folder / "demo").is_dir() else (folder / "demo").unlink()
        os.link(bench / "elsewhere", folder / "demo")
        assert confbuild.main(["verify", "b", "--roots", "roots"]) == 0

    def test_long_output(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = [f"{i:05}" + "n" * 200 for i in range(3000)]
        doc = statement(subject=[{"digest": {"sha256": DEMO_SHA256}, "name": name} for name in names])
        write_files(tmp_path, {"evidence.json": bundle(doc).evidence, "provenance.json": provenance_of(bundle(doc))})
        with within(20):
            assert confbuild.main(["verify", str(tmp_path), "--nonce", NONCE]) == 1
        rows = capsys.readouterr().out.splitlines()
        assert max(map(len, rows)) < 1300 and sum(row.startswith("FAIL artifact ") for row in rows) == 3000

    @pytest.mark.parametrize("flags", [("-O", "-W", "error"), ("-I", "-OO", "-W", "error", "-X", "dev")], ids=" ".join)
    def test_interpreter_flags(self, bench: Path, flags: tuple[str, ...]) -> None:
        """Nothing rests on assert, on the environment, or on what Python only warns of."""
        (bench / "folder/policy.toml").write_text('roots = "../roots"\ncrl = "../crl.der"\nallow-simulated = true\n')
        done = subprocess.run([sys.executable, *flags, str(FILE), "verify", "b", "sim", "az", "bare", "stripped", "--policy", "folder/policy.toml", "--vek", "vek.pem",
                               "--format", "json"], cwd=bench, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stderr) == (1, "")
        assert [doc["verdict"] for doc in json.loads(done.stdout)] == ["passed", "simulated", "passed", "passed", "failed"]

    @needs("strace")
    @pytest.mark.parametrize("form", ["text", "json"])
    def test_no_socket_by_the_kernel(self, bench: Path, form: str) -> None:
        (bench / "folder/policy.toml").write_text('roots = "../roots"\ncrl = "../crl.der"\n')
        command = [sys.executable, str(FILE), "verify", "b", "b.tar.gz", "bare", "--policy", "folder/policy.toml", "--vek", "vek.der", "--format", form]
        done = subprocess.run(["strace", "-f", "-q", "-e", "trace=network,execve", "-o", "trace", *command], cwd=bench, capture_output=True, text=True,
                              env={"HOME": str(bench), **os.environ}, timeout=PATIENCE, check=False)  # without a HOME Python asks the C library, and that nscd
        if done.returncode == 1 and "ptrace" in done.stderr:
            pytest.skip("no process may be traced here")
        trace = (bench / "trace").read_text().splitlines()
        assert (done.returncode, done.stderr) == (0, "") and len([row for row in trace if "execve(" in row]) == 1
        assert [row for row in trace if "execve(" not in row and "+++" not in row and "---" not in row] == []

    @pytest.mark.skipif(not (SHARED / "vectors").is_dir(), reason="shared/vectors is missing: it is no part of the repository")
    @pytest.mark.parametrize("name, options, status", [
        ("snp-milan-v3-oak-release", "--crl {v}/crl/amd-milan-2026-08.crl", 0), ("snp-genoa-v3-tav", "--crl {v}/crl/amd-genoa-2026-08.crl --require-crl", 1),
        ("snp-genoa-v3-tav", "--crl {v}/crl/amd-milan-2026-08.crl --require-crl", 1), ("snp-milan-v3-oak-release", "--crl {v}/crl/neg-milan-sig.crl", 1),
        ("snp-milan-v3-oak-release", "--roots {v}/testroots", 1), ("snp-milan-v3-oak-release", "--roots {v}/amd", 0),
        ("bundle-ripgrep-snp-siena-no-vcek", "", 1), ("snp-turin-v5-openanolis", "--min-tcb fmc=0,snp=0", 0), ("snp-turin-v5-openanolis", "--min-tcb snp=255", 1),
        ("az-snp-kettle-kex", f"--pcr 4={'0' * 64}", 1), ("snp-vlek-milan-v3-aws-expired", "", 1)])
    def test_real_evidence(self, capsys: pytest.CaptureFixture[str], name: str, options: str, status: int) -> None:
        folder = SHARED / "vectors"
        path = folder / "vectors" / name
        assert confbuild.main(["verify", str(path if name.startswith("bundle") else path / "evidence.json"), *(option.format(v=folder) for option in options.split())]) == status, capsys.readouterr().out


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a firmware and what it boots."""
    write_files(tmp_path, {"fw": TOY_FIRMWARE, "volume": toy_volume(lzma_section(b"none")), "shim": toy_volume(lzma_section(SHIM)), "bare": toy_firmware(sections=TOY_SECTIONS[:4]),
                           "kernel": TOY_KERNEL, "initrd": TOY_INITRD, "large": TOY_FIRMWARE + bytes(16 << 20)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("toy_python")
class TestImageCommand:
    def test_from_the_lock_to_the_check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """A lock file's image, and what is said of it, whole and damaged."""
        monkeypatch.chdir(tmp_path)
        files: list[TarEntry] = [(name, data if isinstance(data, bytes) else data.encode(), FILE_TYPE) for name, data in ROOT_FILES.items() if "etc/" not in name]
        package = deb(*files, *((name, target, SYMLINK) for name, target in ROOT_LINKS.items()))
        write_files(tmp_path, {"debs/any": package})
        Path("lock").write_text(f"all 1.0 {hashlib.sha256(package).hexdigest()}\n")
        assert confbuild.main(["image", "-o", "image", "--packages", "lock", "--debs", "debs", "--vcpus", "1", "--vcpus", "2", "--vcpu-type", "EPYC-v4", "--vcpu-type", "EPYC-Milan"]) == 0
        said = capsys.readouterr().out
        first = f"image.json  sha256 {hashlib.sha256(Path('image/image.json').read_bytes()).hexdigest()}\n"
        assert re.fullmatch(first + "".join(rf"measured    {label}: [0-9a-f]{{96}}\n" for label in (
            "EPYC-v4, 1 vCPU", "EPYC-v4, 2 vCPUs", "EPYC-Milan, 1 vCPU", "EPYC-Milan, 2 vCPUs")), said)
        assert confbuild.main(["image", "--check", "image"]) == 0
        assert capsys.readouterr().out == said.replace("measured", "parts       ok: those of image.json\nfirmware    ok: starts nothing but the kernel that is measured\nmeasured", 1)
        Path("image/firmware.fd").write_bytes(TOY_AMDSEV)
        assert confbuild.main(["image", "--check", "image"]) == 1
        said = capsys.readouterr().out
        assert "\nparts       firmware is not the one of image.json; the launch digest" in said and f"\nfirmware    {ADMITS}\n" in said

    def test_root_file_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """Also by a relative path, and with parts from elsewhere."""
        monkeypatch.chdir(tmp_path)
        toy_root(tmp_path / "root", {"boot/vmlinuz-6.1.0-toy": None})
        write_files(tmp_path, {"k": bzimage(), "f": confbuild.seal_firmware(TOY_AMDSEV)})
        assert confbuild.main(["image", "-o", "deep/image", "--rootfs", "root", "--kernel", "k", "--firmware", "f", "--modules", "root/usr/lib/modules/6.1.0-toy"]) == 0
        assert capsys.readouterr().out.count("\n") == 2 and confbuild.check_image("deep/image").parts == ""


class TestMeasure:
    BOOT = ("--kernel", "kernel", "--initrd", "initrd", "--append", TOY_APPEND)
    WARNING = "confbuild: warning: {}: {}\nconfbuild: warning: this digest proves nothing about the code that ran\n"

    @pytest.mark.parametrize("row", TOY_DIGESTS)
    def test_known_digests(self, machine: Path, capsys: pytest.CaptureFixture[str], row: tuple[int, str, int, str, str, str]) -> None:
        vcpus, model, features, vmm, boots, digest = row
        options = ["--firmware", "fw", "--vcpus", str(vcpus), *{"all": self.BOOT, "kernel": self.BOOT[:2], "nothing": ()}[boots], "--vmm", vmm]
        for more in (["--vcpu-type", model, "--guest-features", hex(features)], ["--vcpu-sig", str(confbuild.CPU_SIGNATURES[model]), "--guest-features", str(features)]):
            assert confbuild.main(["measure", *options, *more]) == 0
            said = capsys.readouterr()
            assert said.out == digest + "\n" and ("no compressed section" in said.err) == (boots != "nothing")
        assert confbuild.main(["measure", *options, "--vcpu-sig", "0x0", "--vmm", "QEMU"]) == 0 and digest not in capsys.readouterr().out

    def test_explain(self, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert confbuild.main(["measure", "--firmware", "fw", *self.BOOT, "--vcpus", "1", "--vcpu-type", "EPYC-v4", "--explain"]) == 0
        assert capsys.readouterr().out == "".join(f"{digest}  {step}\n" for step, digest in TOY_STEPS) + TOY_STEPS[-1][1] + "\n"

    @pytest.mark.parametrize("name, state", [("volume", ""), ("shim", ADMITS), ("fw", "cannot be looked into: firmware volume: there is no compressed section")])
    def test_what_the_firmware_admits(self, machine: Path, capsys: pytest.CaptureFixture[str], name: str, state: str) -> None:
        for boots in (self.BOOT, ()):
            assert confbuild.main(["measure", "--firmware", name, *boots, "--vcpus", "1", "--vcpu-sig", "0x800f12"]) == 0
            said = capsys.readouterr()
            assert said.err == (self.WARNING.format(name, state) if state and boots else "") and re.fullmatch(r"[0-9a-f]{96}\n", said.out)

    @pytest.mark.parametrize("name, options, message", [
        ("bare", (), "bare: firmware: it has no section of type 0x10 (SNP_KERNEL_HASHES)"), ("large", (), "large: firmware: 16777217 bytes, expected 1 to"),
        ("fw", ("--vcpus", "4097"), "launch digest: there is none of 4097 vCPUs"), ("fw", ("--vcpu-sig", "0x100000000"), "launch digest: there is none of 1 vCPUs"),
        ("fw", ("--append", "\udcff\ud800"), "command line: a lone surrogate"), ("fw", ("--kernel", "nowhere"), "nowhere: No such file"), ("fw", ("--initrd", "."), ".: Is a directory")])
    def test_what_has_no_digest(self, machine: Path, capsys: pytest.CaptureFixture[str], name: str, options: tuple[str, ...], message: str) -> None:
        assert confbuild.main(["measure", "--firmware", name, *self.BOOT, "--vcpus", "1", "--vcpu-sig", "1", *options]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(f"confbuild: error: {message}")

    def test_memory(self, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A kernel and an initrd are never held."""
        with open("kernel", "r+b") as f:
            f.truncate(64 << 20)
        tracemalloc.start()
        try:
            assert confbuild.main(["measure", "--firmware", "volume", *self.BOOT, "--vcpus", "1", "--vcpu-type", "EPYC-v4"]) == 0
            assert tracemalloc.get_traced_memory()[1] < 32 << 20  # a read asks for as much as a firmware may have
        finally:
            tracemalloc.stop()

    def test_bytes_of_the_command_line(self, machine: Path) -> None:
        """As the system hands them over, whatever the locale."""
        for locale in ("C", "C.UTF-8"):
            done = subprocess.run([os.fsencode(sys.executable), os.fsencode(FILE), b"measure", b"--firmware", b"fw", b"--kernel", b"kernel", b"--append", b"caf\xc3\xa9 \xff",
                                   b"--vcpus", b"1", b"--vcpu-type", b"EPYC-v4"], capture_output=True, env={**os.environ, "LC_ALL": locale}, check=True)
            boots = confbuild.BootHashes(TOY_BOOT.kernel, hashlib.sha256().digest(), hashlib.sha256(b"caf\xc3\xa9 \xff\0").digest())
            assert done.stdout.decode().strip() == confbuild.compute_launch_digest(confbuild.parse_firmware(TOY_FIRMWARE), boots, 1, 0x800F12).hex()

    def test_imports(self, machine: Path) -> None:
        """Who measures waits for no server."""
        command = [sys.executable, "-I", "-S", "-X", "importtime", str(FILE), "measure", "--firmware", "fw", "--vcpus", "1", "--vcpu-type", "EPYC-v4"]
        errors = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        imported = {line.rpartition("|")[2].strip() for line in errors.splitlines()}
        assert "hashlib" in imported and not imported & {"http", "tarfile", "subprocess", "ssl", "socket", "threading", "urllib", "logging"}


class TestAttest:
    @pytest.mark.parametrize("options", [(), ("--platform", "gcp-snp")], ids=["snp", "gcp-snp"])
    @pytest.mark.parametrize("host_has_it", [True, False])
    def test_from_the_device_to_the_verdict(self, bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...],
                                            host_has_it: bool) -> None:
        """What `attest` writes in a guest verifies as a bundle, and with another nonce does not."""
        root = bench / "folder/report"
        root.mkdir()
        tsm = Configfs(root, monkeypatch, auxblob=table_of(("VCEK", made(vek_of)), little=True) if host_has_it else b"")
        monkeypatch.setattr(tsm, "report", lambda data: made(snp_report, report_data=data))
        monkeypatch.setattr(confbuild, "TSM_REPORTS", str(root))
        monkeypatch.setattr(confbuild, "fetch_vek", lambda url: made(vek_of) if url == KDS else b"")
        arguments = ["attest", "bare/provenance.json", "--nonce", DASHED, *options]
        for fetch in ([], ["--fetch-vek"]):
            assert confbuild.main(arguments + fetch) == 0
            said = capsys.readouterr()
            known = host_has_it or bool(fetch)
            assert (said.err == "") == known and ("verifiers will need --vek" in said.err) != known
            (bench / "bare/evidence.json").write_text(said.out)
            for more, status in (([], 0 if known else 1), (["--vek", "vek.pem"], 0)):
                assert confbuild.main(["verify", "bare", "--roots", "roots", "--nonce", NONCE, "--require-tee", *more]) == status
            capsys.readouterr()
            assert json.loads(said.out)["platform"] == (options[-1] if options else "snp")
        assert confbuild.main(["verify", "bare", "--roots", "roots", "--nonce", "1" * 32, "--vek", "vek.pem"]) == 1

    def test_large_provenance(self, bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """Never evidence about the beginning of a file."""
        asked: list[bytes] = []

        def get(data: bytes) -> tuple[bytes, bytes]:
            asked.append(data)
            return made(snp_report), b""

        monkeypatch.setattr(confbuild, "get_report", get)
        for size, status in ((confbuild.MAX_JSON, 0), (confbuild.MAX_JSON + 1, 2)):
            (bench / "large").write_bytes(b" " * size)
            assert confbuild.main(["attest", "large", "--nonce", NONCE]) == status
        assert asked == [confbuild.report_data(b" " * confbuild.MAX_JSON, NONCE)] and "large: more than 4194304 bytes" in capsys.readouterr().err

    @pytest.mark.parametrize("answer, message", [
        ((404, {}, b""), "HTTP Error 404"), ((429, {"Retry-After": "10"}, b""), "HTTP Error 429"), ((500, {}, b""), "HTTP Error 500"),
        ((302, {"Location": "file:///etc/passwd"}, b""), "HTTP Error 302"), ((302, {"Location": "http://[::1"}, b""), "Invalid IPv6 URL|does not appear|netloc"),
        ((302, {"Location": "/again"}, b""), "HTTP Error 302"), ((302, {"Location": "http://127.0.0.1:1/"}, b""), "refused"),
        ((200, {"Content-Length": "5", "Transfer-Encoding": "chunked"}, b"zz\r\n"), "IncompleteRead|invalid literal")])
    def test_services_that_say_no(self, monkeypatch: pytest.MonkeyPatch, answer: Answer, message: str) -> None:
        monkeypatch.setenv("NO_PROXY", "*")
        with StandIn(answer) as one, within(20), pytest.raises(confbuild.NoAttester, match=f"^{one.url}/vcek: .*({message})"):
            confbuild.fetch_vek(one.url + "/vcek")

    @pytest.mark.parametrize("reply", [b"nonsense\r\n\r\n", b"", b"HTTP/1.1 200 " + b"x" * 70_000, b"HTTP/1.1 999999 x\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n"],
                             ids=["nonsense", "nothing", "long line", "odd status", "many headers"])
    def test_services_that_break_the_protocol(self, monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
        monkeypatch.setenv("NO_PROXY", "*")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            def serve() -> None:
                with listening.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(reply)

            thread = threading.Thread(target=serve)
            thread.start()
            with within(20), pytest.raises(confbuild.NoAttester):
                confbuild.fetch_vek(f"http://127.0.0.1:{listening.getsockname()[1]}/")
            thread.join()

    def test_fetch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_PROXY", "*")
        vek = made(vek_of)
        with StandIn((302, {"Location": "/there"}, b""), (200, {"Content-Type": "application/octet-stream"}, vek), (200, {}, bytes(100_000))) as one:
            assert self.evidence(one) == b64(vek) and one.seen[0][:2] == ("GET", KDS.partition("amd.com")[2]) and one.seen[1][:2] == ("GET", "/there")
            assert confbuild.fetch_vek(one.url) == bytes(0x4000), "no more is read than a certificate can have"
            with pytest.raises(confbuild.NoAttester, match="does not verify it: VEK: "):
                self.evidence(one)

    @staticmethod
    def evidence(one: "StandIn") -> Any:
        fetched = confbuild.hardware_evidence(made(snp_report), b"", "snp", lambda url: confbuild.fetch_vek(url.replace("https://kdsintf.amd.com", one.url)))
        return json.loads(fetched)["evidence"]["cert_chain"]["vcek"]


class TestBuild:
    def test_private_server(self, shell: Shell, tmp_path: Path) -> None:
        """stdout is the answer, stderr is the talk; an old bundle is replaced."""
        done = shell("build", "demo", how=(str(FILE),))
        assert (done.returncode, done.stdout) == (0, "demo-build\n")
        assert done.stderr.startswith("confbuild: packed 4 files as they are, ignored ones too, without history: it is no git work tree\nconfbuild: simulated VM on this machine")
        assert "\ndetect     cargo\n" in done.stderr and f"\n{PASSABLE}" in done.stderr and "\x1b" not in done.stderr
        again = re.search(r"verify it again, offline: (python .*)\n", done.stderr)
        python, program, *arguments = shlex.split(again[1]) if again else ("", "")
        assert (python, program, arguments[:-1]) == ("python", str(FILE), ["verify", "demo-build", "--nonce"])
        assert shell(*arguments, "--source", "demo", "--allow-simulated").returncode == 0
        write_files(tmp_path, {"demo/src/main.rs": "fn changed() {}"})
        assert shell("verify", "demo-build", "--source", "demo", "--allow-simulated").returncode == 1
        assert (tmp_path / "demo-build/artifacts/demo").read_text() == "built\n"
        write_files(tmp_path, {"demo-build/artifacts/demo": "old"})
        done = shell("build", "demo", "--output", "json", "--nonce", DASHED, "-o", "demo-build")
        docs = [json.loads(line) for line in done.stdout.splitlines()]
        assert (done.returncode, done.stderr) == (0, "")
        assert [d["type"] for d in docs] == ["queued", "detect", "init", "provenance", "attest", "complete", "bundle"]
        assert (docs[-1]["path"], docs[-1]["nonce"], docs[-1]["verdict"]) == ("demo-build", NONCE, "simulated")
        assert sorted(p.name for p in (tmp_path / "demo-build").rglob("*")) == ["artifacts", "demo", "evidence.json", "provenance.json"]
        done = shell("build", "demo/", "--output", "quiet", "-o", "deep/er")
        assert (done.returncode, done.stdout, done.stderr) == (0, "deep/er\n", "")

    @needs("git")
    def test_a_repository_of_sha256(self, shell: Shell, tmp_path: Path) -> None:
        """Built from a directory and from its URL, and verified against a checkout; without its history, the tree has the hash of others."""
        root = tmp_path / "demo"
        git(root, "init", "-q", "--object-format=sha256")
        git(root, "add", "-A")
        git(root, "commit", "-qm", "one")
        head, tree = git(root, "rev-parse", "HEAD"), git(root, "rev-parse", "HEAD^{tree}")
        for source, more in (("demo", []), (f"file://{root}", ["--allow-scheme", "file", "-o", "demo-build"])):
            done = shell("build", source, *more)
            assert done.returncode == 0, done.stderr
            digest = json.loads((tmp_path / "demo-build/provenance.json").read_text())["predicate"]["buildDefinition"]["externalParameters"]["source"]["digest"]
            assert digest == {"gitCommit": head, "gitTree": tree}
        for option, status in ((["--source", "demo"], 0), (["--source", "demo", "--source-tree", tree], 0), (["--source-commit", head], 0),
                               (["--source", "demo", "--source-tree", confbuild.git_tree(str(root), confbuild.walk_files(str(root)))], 1)):
            assert shell("verify", "demo-build", "--allow-simulated", *option).returncode == status, option
        write_files(root, {"src/main.rs": "fn changed() {}"})
        assert shell("verify", "demo-build", "--source", "demo", "--allow-simulated").returncode == 1
        done = shell("build", "demo")
        assert done.returncode == 0 and "without history: git has modified or untracked files" in done.stderr
        assert shell("verify", "demo-build", "--source", "demo", "--allow-simulated").returncode == 0

    def test_failed(self, shell: Shell, tmp_path: Path) -> None:
        write_files(tmp_path / "demo", {"build.sh": "echo one; echo two >&2; exit 3"})
        done = shell("build", "demo")
        assert (done.returncode, done.stdout) == (1, "") and "\nbuild      one\nbuild      two\nfailed     BuildError: " in done.stderr
        done = shell("build", "demo", "--output", "quiet")
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("confbuild: error: ") and done.stderr.count("\n") == 1
        assert not (tmp_path / "demo-build").exists()

    def test_too_large(self, shell: Shell, tmp_path: Path) -> None:
        """The server's reason arrives, although it does not read what it refuses."""
        write_files(tmp_path / "demo", {"big": random.Random(1).randbytes(8 << 20)})
        done = shell("build", "demo", "--max-archive", "1")
        assert done.returncode == 4 and "413" in done.stderr

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
    @pytest.mark.parametrize("remote", [False, True])
    def test_interrupted(self, tmp_path: Path, stub_path: str, server: Callable[..., Server], remote: bool) -> None:
        """By itself, and on a server that goes on: the job is cancelled, and nothing of it is left."""
        write_files(tmp_path / "demo", LONG)
        (tmp_path / "tmp").mkdir()
        env = {**os.environ, "PATH": stub_path, "TMPDIR": str(tmp_path / "tmp")}
        one = server() if remote else None
        where = ["--server", f"http://127.0.0.1:{one.port}"] if one else []
        child = subprocess.Popen([sys.executable, str(FILE), "build", "demo", *where], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        started = next(line for line in child.stderr if "started" in line)
        child.send_signal(signal.SIGINT)
        out, errors = child.communicate(timeout=PATIENCE)
        assert (child.returncode, out) == (130, "") and "is cancelled" in errors and "Traceback" not in errors, errors
        pids = [int(word) for word in started.split()[2:]]
        wait_for(lambda: len(pids) == 2 and all(map(gone, pids)))
        assert list((tmp_path / "tmp").iterdir()) == []
        if one:
            job, = json.loads(one.request("GET", "/builds")[2])
            assert one.events(job["job_id"])[-1]["result"]["error_type"] == "Cancelled"

    def test_interrupted_elsewhere(self, tmp_path: Path, stub_path: str) -> None:
        """A server that cannot cancel, such as Kettle's, is no reason for another status."""
        reached = threading.Event()

        def answer(method: str, path: str) -> Answer:
            if method == "GET":
                reached.set()
                return 503, {}, b""
            return (200, {}, b'{"job_id":"j"}') if method == "POST" else (405, {}, b"")

        write_files(tmp_path / "demo", project())
        with StandIn(answer) as one:
            child = subprocess.Popen([sys.executable, str(FILE), "build", "demo", "--server", one.url], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
            assert reached.wait(PATIENCE)
            time.sleep(0.2)
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=PATIENCE)
            assert child.returncode == 130 and "DELETE" in [method for method, _, _ in one.seen], errors

    OK = (200, SSE, frame(1, "complete", END))

    @pytest.mark.parametrize("result, status, message", [
        ((200, {}, result_archive(agreeing(nonce="f" * 32))), 5, " checks failed (nonce): "), ((200, {}, result_archive(agreeing())), 0, PASSABLE),
        ((200, {}, tarball({"evidence.json": "{}"})), 5, "no provenance.json"), ((404, {}, b""), 4, "the server said 404")])
    def test_what_a_server_hands_out(self, shell: Shell, tmp_path: Path, result: Answer, status: int, message: str) -> None:
        with StandIn((200, {}, b'{"job_id":"j"}'), self.OK, result) as one:
            done = shell("build", "demo", "--server", one.url, "--nonce", NONCE)
            submitted = one.seen[0]
        assert done.returncode == status and message in done.stderr, done.stderr
        assert done.stdout == {0: "demo-build\n", 5: "demo-build.unverified\n"}.get(status, "") and submitted[:2] == ("POST", "/build")
        assert sorted(p.name for p in tmp_path.glob("demo-build*")) == done.stdout.split() and not (tmp_path / "evil").exists()

    @staticmethod
    def fetch(answer: bytes, *options: str) -> int:
        """Return the exit status of `fetch j -o out`, here, of a server that hands out answer."""
        with StandIn((200, {}, answer)) as one:
            return confbuild.main(["fetch", "j", "--server", one.url, "-o", "out", *options])

    @staticmethod
    def linked(**links: str) -> bytes:
        """A bundle without evidence.json, but with links."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            for name in ("demo/provenance.json", *links):
                info = tarfile.TarInfo(name.replace("__", "/"))
                info.type, info.linkname = tarfile.SYMTYPE if name in links else tarfile.REGTYPE, links.get(name, "")
                tar.addfile(info, io.BytesIO())
        return out.getvalue()

    PARTS: Mapping[str, str | bytes] = {"artifacts/demo": b"artifact", "provenance.json": provenance_of(bundle())}

    @pytest.mark.parametrize(("answer", "status", "message", "kept"), [
        (tarball(PARTS), 5, "error: the result has no evidence.json: nothing is verified; it is kept as out.unverified\n", "artifacts artifacts/demo provenance.json"),
        (tarball({"evidence.json": "{}", "artifacts/a": "x"}), 5, "the result has no provenance.json: ", "artifacts artifacts/a evidence.json"),
        (tarball({"artifacts/a": "x"}), 5, "the result has no evidence.json and no provenance.json: ", "artifacts artifacts/a"),
        (tarball({**PARTS, "evidence.json": "{}", "a/README": "x"}), 5, "error: the result: 'demo/a/README' is out of place in a bundle: nothing is verified", "result.tar.gz"),
        (tarball({**PARTS, "evidence.json": bundle().evidence, "README": "x"}), 5, "FAILED", "result.tar.gz"),
        (tarball({"evil.sh": "x"}), 5, "the result has no evidence.json and no provenance.json: ", "result.tar.gz"),
        (tarball({}), 5, "the result has no evidence.json and no provenance.json: ", "result.tar.gz"),
        # Unpacked one folder higher, this link would lead out of the folder that it is kept in.
        (linked(demo__artifacts__x="../../other"), 5, "the result has no evidence.json: ", "result.tar.gz"),
        (linked(demo__evidence__json="provenance.json"), 5, "the result has no evidence.json: ", "result.tar.gz"),
        (tarball({"../evil": "x"}), 4, "error: the server broke the protocol: 'demo/../evil' is not a plain relative path; what it sent is kept as out.unverified\n", "result.tar.gz"),
        (b"<html>", 4, "error: the server broke the protocol: the archive is damaged: ", "result.tar.gz"), (b"", 4, "the archive is empty", "result.tar.gz"),
        (tarball(PARTS)[:-9], 4, "the archive is damaged: ", "result.tar.gz"), (result_archive(bundle(nonce="f" * 32)), 5, "FAILED", "artifacts artifacts/demo evidence.json provenance.json")])
    def test_what_does_not_verify_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: bytes, status: int,
                                          message: str, kept: str) -> None:
        """As it came, where it can do no harm, in the place of what was kept before; what verified earlier stays."""
        monkeypatch.chdir(tmp_path)
        assert self.fetch(result_archive(bundle())) == 0
        for more in ([], ["--output", "quiet"], ["--output", "json"]):
            capsys.readouterr()
            assert self.fetch(answer, "--nonce", NONCE, *more) == status
            said = capsys.readouterr()
            if "json" in more and status == 5:
                doc = json.loads(said.out)
                assert (doc["path"], doc["verdict"], said.err) == ("out.unverified", "failed", "") and (message == "FAILED" or doc["error"] in message or message[:-2] in doc["error"])
            else:
                assert message in said.err and said.out == ("out.unverified\n" if status == 5 else "")
            assert sorted(str(path.relative_to("out.unverified")) for path in Path("out.unverified").rglob("*")) == kept.split()
        if kept == "result.tar.gz":
            assert Path("out.unverified/result.tar.gz").read_bytes() == answer
        assert sorted(os.listdir()) == ["out", "out.unverified"] and self.fetch(result_archive(bundle()), "--nonce", NONCE) == 0
        write_files(tmp_path, {"out.unverified/mine": "x"})
        assert self.fetch(answer, "--nonce", NONCE) == 2 and "error: out.unverified exists, and is no bundle" in capsys.readouterr().err

    @pytest.mark.parametrize("names", [["demo"], ["demo", "artifacts/demo"]])
    @pytest.mark.parametrize("top", ["demo", "", "."])
    def test_an_older_layout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Sequence[str], top: str) -> None:
        """Is held as any other bundle, and so may be replaced."""
        monkeypatch.chdir(tmp_path)
        answer = tarball({**dict.fromkeys(names, b"artifact"), "provenance.json": provenance_of(bundle()), "evidence.json": bundle().evidence}, top)
        for _ in range(2):
            assert self.fetch(answer, "--nonce", NONCE) == 0
            assert sorted(str(path) for path in Path("out").rglob("*")) == ["out/artifacts", "out/artifacts/demo", "out/evidence.json", "out/provenance.json"]
            assert confbuild.main(["verify", "out", "--nonce", NONCE, "--allow-simulated"]) == 0

    FULL = "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import confbuild; full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "

    @pytest.mark.parametrize("content", [random.Random(1).randbytes(20_000), bytes(20_000)], ids=["the download", "unpacked"])
    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
        """As a limit to the size of files imitates it: the message names the path, and the command that gets the result, which is not lost."""
        monkeypatch.chdir(tmp_path)
        Path("token").write_text("secret")
        monkeypatch.setattr(sys, "argv", ["confbuild"])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with StandIn((200, {}, tarball({**self.PARTS, "artifacts/big": content}))) as one:
            command = ["fetch", "j", "--server", one.url, "--token-file", "token", "-o", "deep/out", "--nonce", NONCE]
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
            try:
                assert confbuild.main(command) == 2
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert capsys.readouterr().err == ("confbuild: error: deep/out cannot be written: File too large\n"
                                               f"confbuild: hint: the result stays on the server: confbuild {shlex.join(command)}\n")
            assert os.listdir("deep") == [] and confbuild.main(command) == 5 and Path("deep/out.unverified/artifacts/big").read_bytes() == content

    def test_a_full_disk_after_a_build(self, shell: Shell) -> None:
        """Of another server, which keeps the result, and of a private one, which does not."""
        how = ("-c", self.FULL + "hold = confbuild._hold_bundle; confbuild._hold_bundle = lambda *a: (full(), hold(*a))[-1]; sys.exit(confbuild.main())", str(FILE.parent))
        with StandIn((200, {}, b'{"job_id":"j"}'), self.OK, (200, {}, tarball({"artifacts/big": random.Random(1).randbytes(20_000)}))) as one:
            said = shell("build", "demo", "--server", one.url, "--nonce", NONCE, how=how)
            assert said.returncode == 2 and said.stderr.endswith(
                "error: demo-build cannot be written: File too large\n"
                f"confbuild: hint: the result stays on the server: -c fetch j --server {one.url} -o demo-build --nonce {NONCE}\n"), said.stderr
        said = shell("build", "demo", how=(*how[:1], how[1].replace("full()", "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))"), *how[2:]))
        assert said.returncode == 2 and said.stderr.endswith(
            "error: demo-build cannot be written: File too large\nconfbuild: hint: the private server and its result are gone: build again\n"), said.stderr

    def test_a_full_tmpdir(self, tmp_path: Path, shell: Shell) -> None:
        write_files(tmp_path, {"large/x": random.Random(1).randbytes(20_000)})
        said = shell("build", "large", how=("-c", self.FULL + "full(); sys.exit(confbuild.main())", str(FILE.parent)))
        assert said.returncode == 2 and re.search(rf"error: {re.escape(str(tmp_path))}/tmp/confbuild-\w+ cannot be written: File too large\n"
                                                  "confbuild: hint: TMPDIR names the folder of temporary files\n$", said.stderr), said.stderr

    def test_fetch_without_a_nonce(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """The server's own nonce is no check: it is not even asked for."""
        monkeypatch.chdir(tmp_path)
        with StandIn((200, {}, result_archive(bundle()))) as one:
            def fetch(status: int, *options: str) -> tuple[str, str]:
                assert confbuild.main(["fetch", "j", "--server", one.url, *options]) == status
                return capsys.readouterr()

            out, err = fetch(0)
            assert out == "j-build\n" and "; not checked: nonce (--nonce)\n" in err
            assert err.endswith(" verify j-build\n"), "no nonce that nobody chose"
            doc = json.loads(fetch(0, "--output", "json")[0])
            assert doc["nonce"] is None and [check["status"] for check in doc["checks"] if check["name"] == "nonce"] == ["not checked"]
            _, err = fetch(0, "--nonce", DASHED)
            assert "not checked: nonce" not in err and err.endswith(f" verify j-build --nonce {NONCE}\n")
            assert "FAILED" in fetch(5, "--nonce", "f" * 32)[1]
            assert "--nonce: 32 hexadecimal digits or a UUID are needed" in fetch(2, "--nonce", "f" * 31)[1]
            assert [path for _, path, _ in one.seen] == ["/build/j/result"] * 4

    def test_a_good_bundle_stays(self, shell: Shell, tmp_path: Path) -> None:
        """What does not verify takes no good bundle's place, nor does a bundle take the current directory's."""
        for nonce, status in ((NONCE, 0), ("f" * 32, 5)):
            with StandIn((200, {}, b'{"job_id":"j"}'), self.OK, (200, {}, result_archive(agreeing(nonce=nonce)))) as one:
                assert shell("build", "demo", "--server", one.url, "--nonce", NONCE).returncode == status
        assert shell("verify", "demo-build", "--nonce", NONCE).returncode == 3 and shell("verify", "demo-build.unverified", "--nonce", NONCE).returncode == 1
        done = shell("build", "demo", "-o", ".")
        assert done.returncode == 2 and "is the current directory" in done.stderr

    def test_odd_streams(self, shell: Shell, tmp_path: Path) -> None:
        """stdout closed, or in an encoding that lacks a letter: no traceback."""
        program = [sys.executable, str(COMPILED), "verify", "b\u00fc"]
        closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *program], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
        ascii_only = subprocess.run(program, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=PATIENCE, check=False)
        for done in (closed, ascii_only):
            assert done.returncode == 2 and done.stderr.startswith("confbuild: error: b") and "Traceback" not in done.stderr

    @pytest.mark.parametrize("command", ["list", "cancel j", "watch j", "fetch j", "fetch j --nonce " + NONCE, "list --output json"])
    @pytest.mark.parametrize("answer", [b"[5]", b'[{"job_id":"x"}]', b'{"a":1}', b"5"])
    def test_servers_that_talk_nonsense(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, answer: bytes) -> None:
        with StandIn((200, {"Content-Type": "application/json"}, answer)) as one:
            status = confbuild.main([*command.split(), "--server", one.url, *(["-o", str(tmp_path / "b")] if "fetch" in command else [])])
        assert status == 4, capsys.readouterr().err

    @needs("git")
    @pytest.mark.usefixtures("plain_git")
    def test_url(self, shell: Shell, tmp_path: Path) -> None:
        repository = write_files(tmp_path / "origin", project(), commit=True)
        git(repository, "tag", "v1")
        commit = git(repository, "rev-parse", "HEAD")
        git(repository, "commit", "-q", "--allow-empty", "-m", "two")
        url = f"file://{repository}"
        done = shell("build", url, "--allow-scheme", "file", "--ref", "v1", "--output", "quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "origin-build\n", "")
        done = shell("verify", "origin-build", "--source-commit", commit, "--source-uri", url, "--source", repository, "--allow-simulated")
        assert done.returncode == 0, done.stdout
        done = shell("build", url)
        assert done.returncode == 4 and "the scheme must be one of https, http" in done.stderr

    @needs("git")
    @pytest.mark.usefixtures("plain_git")
    def test_service(self, shell: Shell, tmp_path: Path, server: Callable[..., Server]) -> None:
        """One server, every command of a client."""
        (tmp_path / "tokens").write_text("secret other\n")
        one = server("--token-file", str(tmp_path / "tokens"), program=(sys.executable, str(FILE)))
        assert one.process is not None and confbuild._RUN.encode() in Path(f"/proc/{one.process.pid}/cmdline").read_bytes()  # it has shed its syntax tree
        one.headers = {"Authorization": "Bearer other"}
        to = ("--server", f"127.0.0.1:{one.port}", "--token-file", "tokens")
        write_files(tmp_path / "demo", {"build.sh": QUICK + "echo '\x1b[1mhello'\n"})
        commit = git(write_files(tmp_path / "demo", {}, commit=True), "rev-parse", "HEAD")
        done = shell("build", "demo", *to)
        assert (done.returncode, done.stdout) == (0, "demo-build\n") and f"packed commit {commit}" in done.stderr and "\nbuild      hello\n" in done.stderr
        done = shell("build", "demo", "--server", to[1])
        assert done.returncode == 4 and "the server said 401" in done.stderr
        job = json.loads(shell("list", *to, "--output", "json").stdout)["job_id"]
        assert re.fullmatch(rf"{job}  \w+ +\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d  source.tar.gz\n", shell("list", *to).stdout)
        done = shell("watch", job, *to, "--from", "2", "--output", "json")
        assert [json.loads(line) for line in done.stdout.splitlines()] == one.events(job, 2)
        assert (done.returncode, done.stderr) == (0, "")
        done = shell("watch", job, *to, "--from", str(len(one.events(job))))
        assert (done.returncode, done.stdout) == (0, "") and done.stderr.startswith("confbuild: there is nothing after event ")
        done = shell("fetch", job, *to, "-o", "fetched")
        assert (done.returncode, done.stdout) == (0, "fetched\n")
        assert all((tmp_path / "fetched" / name).read_bytes() == (tmp_path / "demo-build" / name).read_bytes()
                   for name in ("provenance.json", "evidence.json", "artifacts/demo"))
        assert shell("fetch", job, *to, "-o", "fetched", "--nonce", NONCE).returncode == 5
        done = shell("fetch", job, *to, "-o", "demo")
        assert done.returncode == 2 and "is no bundle" in done.stderr
        long = one.submit(LONG)
        log = one.state / "jobs" / long / "events"
        wait_for(lambda: log.exists() and b"started" in log.read_bytes())
        assert shell("fetch", long, *to).returncode == 4
        done = shell("cancel", long, *to)
        assert done.returncode == 0 and done.stdout.startswith(f"{long}  ")
        done = shell("watch", long, *to)
        assert (done.returncode, done.stdout) == (1, "") and "failed     Cancelled: " in done.stderr
        done = shell("cancel", "00000000-0000-4000-8000-000000000000", *to)
        assert done.returncode == 4 and "the server said 404" in done.stderr

    LAUNCHERS = (("-m", "confbuild"), ("demo.pyz",), ("-c", "import sys, confbuild; sys.exit(confbuild.main())"), ("-I", "-O", "-W", "error", str(FILE)))

    @pytest.mark.parametrize("how", LAUNCHERS, ids=["module", "zipapp", "console script", "isolated, optimised"])
    def test_launchers(self, shell: Shell, tmp_path: Path, how: tuple[str, ...]) -> None:
        """All the same: what they say, what they build, and above all their exit status."""
        if how == ("demo.pyz",):
            (tmp_path / "app").mkdir()
            shutil.copy(FILE, tmp_path / "app")
            zipapp.create_archive(tmp_path / "app", tmp_path / "demo.pyz", main="confbuild:main")
        env = {} if how[0] in ("-I", "demo.pyz") else {"PYTHONPATH": str(FILE.parent)}
        done = shell("--version", how=how, **env)
        assert done.stdout == f"confbuild {confbuild.__version__} sha256:{hashlib.sha256(FILE.read_bytes()).hexdigest()}\n"
        if how[0] == "-m":  # as the console script does
            write_bundle(tmp_path / "demo-build", bundle(nonce="00" * 16))
        else:
            done = shell("build", "demo", how=how, **env)
            assert (done.returncode, done.stdout) == (0, "demo-build\n"), done.stderr
            toolchain = json.loads((tmp_path / "demo-build/provenance.json").read_text())["predicate"]["buildDefinition"]["internalParameters"]["toolchain"]
            assert toolchain["kettle"]["digest"]["sha256"] == hashlib.sha256(FILE.read_bytes()).hexdigest()
        assert shell("verify", "demo-build", "--nonce", NONCE, how=how, **env).returncode == 1, "above all, a bundle that does not verify is no success"

    @pytest.mark.parametrize("flags", [("-O",), ("-OO",), ("-I",), ("-W", "error"), ("-S",)])
    def test_flags(self, shell: Shell, flags: tuple[str, ...]) -> None:
        done = shell("--version", how=(*flags, str(FILE)))
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("confbuild ")

    def test_terminal(self, tmp_path: Path, stub_path: str) -> None:
        """A narrow terminal, and stdout in a pipe as in `path=$(confbuild build demo)`: what was drawn is erased."""
        write_files(tmp_path / "demo", project(QUICK + "for n in 1 2 3 4 5; do echo " + "x" * 70 + "; sleep 0.1; done\n"))
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        with subprocess.Popen([sys.executable, str(FILE), "build", "demo"], cwd=tmp_path, env={**env, "PATH": stub_path, "TERM": "xterm"},
                              stdout=subprocess.PIPE, stderr=slave) as child:
            os.close(slave)
            text = b""
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while block := os.read(master, 65536):
                    text += block
            assert child.stdout is not None and child.stdout.read() == b"demo-build\n"
        os.close(master)
        assert child.returncode == 0 and b"\x1b[J" in text
        assert [row for row in screen(text.decode(), 30) if "xxxx" in row] == []

# endregion 30
# ==============================================================================
# region 31. Layout and README
# ==============================================================================


BANNER = re.compile(r"^# region (\d+)\. (.+?)(?: +\[uses ([\d, ]+|nothing)\])?$")


class Region:
    """One section: its number, title, what its banner says it uses, its first and last line."""

    def __init__(self, number: int, title: str, uses: str | None, first: int) -> None:
        self.number, self.title, self.first, self.last = number, title, first, 0
        self.uses = {int(n) for n in re.findall(r"\d+", uses or "")}


def regions_of(source: str) -> list[Region]:
    """The sections of a file, each opened and closed in turn."""
    found: list[Region] = []
    for n, line in enumerate(source.splitlines(), 1):
        if match := BANNER.match(line):
            assert not found or found[-1].last, f"line {n} opens a section inside another"
            found.append(Region(int(match[1]), match[2], match[3], n))
        elif match := re.match(r"^# endregion (\d+)$", line):
            assert found and not found[-1].last and found[-1].number == int(match[1]), f"line {n} closes nothing"
            found[-1].last = n
        else:
            assert not line.startswith(("# region", "# endregion")), f"line {n}: {line}"
    assert found[-1].last
    return found


def defined(tree: ast.Module) -> dict[str, int]:
    """Each name that the module defines, and its line."""
    found: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, node.lineno)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found.update({n.id: node.lineno for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)})
    return found


def names_read(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each global that is read, annotations included; the line is that of a function for what it contains."""
    def inside(table: symtable.SymbolTable) -> Iterator[tuple[int, str]]:
        for child in table.get_children():
            if child.get_name() != "__annotate__":  # of Python 3.14, on the line of the first annotation [PEP 649]; all of them come below
                yield from ((child.get_lineno(), s.get_name()) for s in child.get_symbols() if s.is_referenced() and s.is_global())
                yield from inside(child)

    yield from inside(symtable.symtable(source, "confbuild", "exec"))
    for node in ast.walk(tree := ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            for n in ast.walk(part) if part else ():
                quoted = ast.walk(ast.parse(n.value)) if isinstance(n, ast.Constant) and isinstance(n.value, str) else ()
                yield from ((part.lineno, name.id) for name in (n, *quoted) if isinstance(name, ast.Name))
    pending: list[ast.AST] = [tree]  # what is read when the file is imported: bases, defaults, decorators, tables
    for node in pending:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.lineno, node.id
        skipped = node.body if isinstance(node, ast.FunctionDef) else [node.body] if isinstance(node, ast.Lambda) else []
        pending += [child for child in ast.iter_child_nodes(node) if child not in skipped]


def unguarded(source: str) -> list[str]:
    """Where what is `# guarded by` a lock is touched without it, or a *_locked method is called without any. Lexically:
    each method but __init__ holds what its `with self.lock:` names; *_locked methods, and only they, begin with all of them."""
    lines, bad = source.splitlines(), []
    for cls in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)):
        notes = (re.search(r"self\.(\w+)\b.*#\s*guarded by (\w+)", line) for line in lines[cls.lineno - 1:cls.end_lineno])
        locks = {note[1]: note[2] for note in notes if note}

        def visit(node: ast.AST, held: frozenset[str], where: str, locks: dict[str, str] = locks) -> None:
            inner = held
            if isinstance(node, ast.With):
                inner = held | {i.context_expr.attr for i in node.items if isinstance(i.context_expr, ast.Attribute)}
            elif isinstance(node, ast.Lambda | ast.FunctionDef):
                inner = frozenset()  # it may be called later
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                if locks.get(node.attr, "") not in {"", *held}:
                    bad.append(f"{node.lineno}: {where} touches {node.attr} without {locks[node.attr]}")
                if node.attr.endswith("_locked") and not held & set(locks.values()):
                    bad.append(f"{node.lineno}: {where} calls {node.attr} without a lock")
            for child in ast.iter_child_nodes(node):
                waits = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "wait_for"
                visit(child.body if waits and isinstance(child, ast.Lambda) else child, inner, where)

        for method in (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name != "__init__"):
            for statement_ in method.body if locks else []:
                visit(statement_, frozenset(locks.values()) if method.name.endswith("_locked") else frozenset(), f"{cls.name}.{method.name}")
    return bad


class LockOrder:
    """The order in which a file's classes take their locks, from its text: `edges` has (held, taken) for each lock, "Class._name", that is taken
    while another is held, in the same method or by what it calls.  What is called is found by the receiver's type, as annotations and constructors
    tell it; of an unknown type it may be any class's method of that name.  callbacks: name of a callable that is handed over -> what it may be."""

    CONTAINERS = frozenset(dir(dict) + dir(list) + dir(set) + dir(str) + dir(threading.Thread) + dir(threading.Condition) + dir(io.BytesIO) + dir(re.Match)) - {"is_alive"}

    def __init__(self, source: str, callbacks: Mapping[str, set[str]]) -> None:
        tree = ast.parse(source)
        self.callbacks, self.locks, self.fields = callbacks, dict[str, str](), dict[str, set[str]]()
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.bodies: dict[str, ast.FunctionDef] = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        self.unions = {node.targets[0].id: {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)} for node in tree.body
                       if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.BinOp)}
        for name, cls in self.classes.items():
            self.bodies |= {f"{name}.{node.name}": node for node in cls.body if isinstance(node, ast.FunctionDef)}
        for _ in range(2):  # fields that come from the fields of other classes
            for name, cls in self.classes.items():
                for method in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
                    self._learn(name, method)
        self.takes: dict[str, set[str]] = {}
        self.calls: dict[str, set[str]] = {}
        self.held: set[tuple[str, str, bool]] = set()  # (held, lock or function, whether it is a function)
        for key in list(self.bodies):
            self._visit_function(key, {"self": {key.partition(".")[0]} & set(self.classes)} if "." in key else {})
        while True:
            before = sum(map(len, self.takes.values()))
            for key, called in self.calls.items():
                self.takes[key] |= {lock for one in called for lock in self.takes.get(one, ())}
            if before == sum(map(len, self.takes.values())):
                break
        self.edges = {(held, lock) for held, what, called in self.held for lock in (self.takes.get(what, ()) if called else (what,))
                      if held != lock or self.locks[lock] == "Lock"}  # the others may be taken again by who holds them

    def cycles(self) -> list[str]:
        """Each way back to a lock from itself."""
        found = []
        for start in sorted({held for held, _ in self.edges}):
            paths = [(start,)]
            for path in paths:
                for taken in sorted(taken for held, taken in self.edges if held == path[-1]):
                    if taken == start:
                        found.append(" -> ".join((*path, taken)))
                    elif taken not in path:
                        paths.append((*path, taken))
        return found

    def _types(self, node: ast.expr | None) -> set[str] | None:
        """The classes that an annotation names; empty: others."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._types(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.BinOp):
            return (self._types(node.left) or set()) | (self._types(node.right) or set())
        if isinstance(node, ast.Name):
            return self.unions.get(node.id, {node.id}) & set(self.classes)
        return None if node is None else set()

    def _type_of(self, node: ast.expr, known: Mapping[str, set[str] | None]) -> set[str] | None:
        """The classes of an expression; None: unknown."""
        if isinstance(node, ast.Name):
            return known.get(node.id, set() if node.id in sys.stdlib_module_names else None)
        if isinstance(node, ast.Attribute):
            of = self._type_of(node.value, known)
            found = [self.fields[key] for key in (f"{name}.{node.attr}" for name in (self.classes if of is None else of)) if key in self.fields]
            return set().union(*found) if found else None
        if isinstance(node, ast.Call):
            returned = [self._types(self.bodies[key].returns) if not key.endswith(".__init__") else {key.partition(".")[0]} for key in self._called(node.func, known)]
            foreign = isinstance(node.func, ast.Attribute) and self._type_of(node.func.value, known) == set()
            return set().union(*(one or set() for one in returned)) if returned or foreign else None
        return set() if isinstance(node, ast.Constant | ast.List | ast.Dict | ast.Set | ast.JoinedStr) else None

    def _called(self, function: ast.expr, known: Mapping[str, set[str] | None]) -> set[str]:
        """The functions that a call may reach."""
        if isinstance(function, ast.Name):
            name = function.id
            found = self.callbacks.get(name, set()) | {name} | {f"{one}.__init__" for one in self.unions.get(name, {name})}
            return found & set(self.bodies)
        if not isinstance(function, ast.Attribute):
            return set()
        of = self._type_of(function.value, known)
        if of is None:
            of = set() if function.attr in self.CONTAINERS else set(self.classes)
        return self.callbacks.get(function.attr, set()) | {f"{name}.{function.attr}" for name in of} & set(self.bodies)

    def _parameters(self, function: ast.FunctionDef) -> dict[str, set[str] | None]:
        return {a.arg: self._types(a.annotation) for a in (*function.args.args, *function.args.kwonlyargs) if a.annotation is not None}

    def _learn(self, cls: str, method: ast.FunctionDef) -> None:
        """The locks and the types of fields that a method assigns."""
        known = {"self": {cls}, **self._parameters(method)}
        for node in ast.walk(method):
            pairs: list[tuple[ast.expr, ast.expr]] = []
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                self.fields[f"{cls}.{node.target.attr}"] = self._types(node.annotation) or set()
            elif isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
                pairs = list(zip(target.elts, value.elts, strict=True)) if both else [(target, value)]  # type: ignore[attr-defined]
            for target, value in pairs:
                if not (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"):
                    continue
                lock = re.fullmatch(r"threading\.(Lock|RLock|Condition)\(\)", ast.unparse(value))
                if lock:
                    self.locks[f"{cls}.{target.attr}"] = lock[1]
                else:
                    types_ = self._type_of(value, known)
                    if types_ is not None:
                        self.fields.setdefault(f"{cls}.{target.attr}", types_)

    def _visit_function(self, key: str, outer: Mapping[str, set[str] | None]) -> None:
        self.takes[key], self.calls[key] = set(), set()
        function = self.bodies[key]
        known = {**outer, **self._parameters(function)}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                known.setdefault(node.targets[0].id, self._type_of(node.value, known))
        for statement_ in function.body:
            self._visit(key, statement_, (), known)

    def _visit(self, key: str, node: ast.AST, held: tuple[str, ...], known: Mapping[str, set[str] | None]) -> None:
        if isinstance(node, ast.FunctionDef):
            inner = f"{key}.{node.name}"
            self.bodies[inner] = node
            self._visit_function(inner, known)
            return
        if isinstance(node, ast.With):
            for item in node.items:
                at = item.context_expr
                of = self._type_of(at.value, known) if isinstance(at, ast.Attribute) else set()
                locks = {f"{name}.{at.attr}" for name in (self.classes if of is None else of)} & set(self.locks) if isinstance(at, ast.Attribute) else set()
                for lock in locks:
                    self.takes[key].add(lock)
                    self.held |= {(one, lock, False) for one in held}
                self._visit(key, at, held, known)
                held = (*held, *locks)
            for statement_ in node.body:
                self._visit(key, statement_, held, known)
            return
        called = self._called(node.func, known) if isinstance(node, ast.Call) else set()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):  # a function inside of this one, which is called or handed on
            called = {one for one in (f"{key}.{node.id}", f"{key.rpartition('.')[0]}.{node.id}") if one in self.bodies and one.count(".") > 1}
        self.calls[key] |= called
        self.held |= {(one, function, True) for one in held for function in called}
        for child in ast.iter_child_nodes(node):
            self._visit(key, child, held, known)


# The callables that are handed over to where a lock may be held: their names there -> what they are.
CALLBACKS = {"_on_append": {"Streamer.grown"}, "stop": {"SimulatedVm.destroy", "QemuVm.destroy"}, "tell": {"VmHost._tell"}, "_run": {"VmHost.run"},
             "_make_vm": {"SimulatedVm.__init__", "QemuVm.__init__"}, "_make_fetcher": {"SimulatedVm.__init__"}}


class TestLayout:
    SOURCE = FILE.read_text(encoding="utf-8")
    TREE = ast.parse(SOURCE)
    REGIONS = regions_of(SOURCE)
    FREE = 4  # the vocabulary, which a banner need not name
    CUT = SOURCE[:SOURCE.index("# ---- End of the verifier.")].count("\n") + 1

    def region(self, line: int) -> Region | None:
        return next((r for r in self.REGIONS if r.first <= line <= r.last), None)

    def test_contents(self) -> None:
        titles = [(r.number, r.title) for r in self.REGIONS]
        assert [n for n, _ in titles] == list(range(1, len(titles) + 1))
        assert [(int(n), t) for n, t in re.findall(r"^ +(\d+)\. (.+)$", ast.get_docstring(self.TREE, clean=False) or "", re.MULTILINE)] == titles
        mine = [(r.number, r.title) for r in regions_of(Path(__file__).read_text(encoding="utf-8"))]
        assert mine[0][0] == 0 and mine[-1] == (31, "Layout and README") and len(set(mine)) == len(mine)
        rest = iter(titles)
        assert all(one in rest for one in mine[1:-1]), "the tests' sections are the file's, in its order"

    def test_names_read(self) -> None:
        """The same of every Python, whichever evaluates annotations and when: each on its own line, or on that of the function around it."""
        source = ("A = B = C = D = E = F = G = H = 0\n"
                  "x: A = 0\n\n"
                  "class K:\n y: 'B' = 0\n"
                  " def f(self, z: 'C | None') -> D:\n  def g(a: E) -> 'list[F]':\n   b: G = H\n   return b\n  return g\n")
        assert {(line, name) for line, name in names_read(source) if name.isupper() and len(name) == 1} >= {
            (2, "A"), (5, "B"), (6, "C"), (6, "D"), (7, "E"), (7, "F"), (8, "G"), (7, "H")}
        assert {line for line, name in names_read(source) if name in "ABCD"} <= {2, 4, 5, 6}
        assert {line for line, name in names_read(source) if name in "EFGH"} <= {6, 7, 8}

    def test_top_down(self) -> None:
        names, reached = defined(self.TREE), {r.number: set[int]() for r in self.REGIONS}
        for line, name in names_read(self.SOURCE):
            here, there = self.region(line), self.region(names.get(name, 0))
            if here and there and here is not there:
                assert there.number < here.number, f"line {line} uses {name} of the later section {there.number}"
                assert there.number <= self.FREE or there.number in here.uses, f"line {line} uses {name} of section {there.number}, unlike its banner"
                reached[here.number].add(there.number)
        assert {r.number: r.uses - reached[r.number] for r in self.REGIONS if r.uses - reached[r.number]} == {}, "banners that promise too much"
        for node in self.TREE.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno > self.REGIONS[0].first:
                assert self.region(node.lineno), f"{node.name} lies outside of every section"

    def test_pure_half(self) -> None:
        """Bytes in, verdict out: no file, clock, process, thread or randomness; and the half is a program by itself."""
        names = defined(self.TREE)
        impure = {"open", "print", "input", "exec", "eval", "__import__"} | {
            alias.asname or alias.name.partition(".")[0] for node in ast.walk(self.TREE) if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names} - {"base64", "binascii", "hashlib", "json", "re", "struct", "uuid", "Callable", "Iterable", "Iterator", "Mapping", "Sequence",
                                        "IO", "TYPE_CHECKING", "Any", "NamedTuple", "NoReturn", "Counter", "lzma"}
        assert {"os", "time", "socket", "subprocess", "threading", "secrets"} <= impure
        begin = self.REGIONS[0].first
        assert [(line, name) for line, name in names_read(self.SOURCE) if begin < line < self.CUT and name in impure and name not in names] == []
        assert self.region(self.CUT - 1) is self.REGIONS[11] and self.region(self.CUT + 2) is self.REGIONS[12]
        half: dict[str, Any] = {"__name__": "half", "__file__": "half"}
        exec(compile("\n".join(self.SOURCE.splitlines()[:self.CUT]), "half", "exec"), half)  # noqa: S102
        files = bundle()
        assert half["verify_bundle"](half["BundleFiles"](*files), half["Expectations"](nonce=NONCE), NOW).verdict == "simulated"

    def test_habits(self) -> None:
        long: list[str] = []
        for node in ast.walk(self.TREE):
            assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert is gone under -O"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                length, limit = (node.end_lineno or 0) - node.lineno + 1, 280 if isinstance(node, ast.ClassDef) else 60
                long += [f"{node.name} has {length} lines"] if length > limit else []
                assert not re.search(r"(?i)todo|fixme|xxx", ast.get_docstring(node) or "")
        for top in self.TREE.body:
            if isinstance(top, ast.FunctionDef | ast.ClassDef) and not top.name.startswith("_"):
                assert ast.get_docstring(top), f"line {top.lineno}: {top.name} says nothing about itself"
        assert long == []

    def test_guards(self) -> None:
        """And the check itself finds what is planted."""
        assert unguarded(self.SOURCE) == [] and len(re.findall(r"# guarded by _\w+", self.SOURCE)) >= 5
        demo = ("class Job:\n def __init__(self):\n  self._log = []  # guarded by _changed\n def add(self):\n  with self._changed:\n   self._add_locked()\n"
                " def _add_locked(self):\n  self._log.append(1)\n def wait(self):\n  with self._changed:\n   self._changed.wait_for(lambda: self._log)\n")
        assert unguarded(demo) == []
        assert unguarded(demo + " def bad(self):\n  return self._log\n") == ["13: Job.bad touches _log without _changed"]
        assert unguarded(demo + " def bad(self):\n  self._add_locked()\n") == ["13: Job.bad calls _add_locked without a lock"]
        assert len(unguarded(demo + " def bad(self):\n  with self._changed:\n   return lambda: self._log\n")) == 1

    def test_lock_order(self) -> None:
        """No two threads can wait for each other's lock; and the check itself finds what is planted."""
        order = LockOrder(self.SOURCE, CALLBACKS)
        assert order.cycles() == []
        assert len(order.locks) == len(re.findall(r"threading\.(?:R?Lock|Condition)\(\)", self.SOURCE)) >= 8
        assert {(held, taken) for held, taken in order.edges if taken.endswith("Vm._lock") or held.endswith("Vm._telling")} == {
            ("VmHost._changed", "SimulatedVm._lock"), ("VmHost._changed", "QemuVm._lock"), ("VmHost._spawning", "SimulatedVm._lock"),
            ("VmHost._spawning", "QemuVm._lock"), ("QemuVm._telling", "EventLog._lock")}
        assert {("Job.writing", "EventLog._lock"), ("Job.writing", "Jobs._changed")} <= order.edges
        assert [taken for held, taken in order.edges if held == "Jobs._changed"] == []  # nor is a file written under it
        assert all(re.search(rf"\b{name}\(", self.SOURCE) for name in CALLBACKS)
        demo = ("import threading\nclass Log:\n def __init__(self, done):\n  self._lock = threading.Lock()\n  self._done = done\n def append(self):\n  with self._lock:\n   pass\n"
                "class Job:\n def __init__(self, log: Log):\n  self._changed, self._log = threading.Condition(), log\n def add(self):\n  with self._changed:\n   self._add()\n"
                " def _add(self):\n  self._log.append()\n def over(self):\n  with self._changed:\n   self.add()\n")
        assert LockOrder(demo, {}).edges == {("Job._changed", "Log._lock")} and LockOrder(demo, {}).cycles() == []
        both = ["Job._changed -> Log._lock -> Job._changed", "Log._lock -> Job._changed -> Log._lock"]
        for bad in (" def bad(self):\n  with self._log._lock:\n   with self._changed:\n    pass\n",
                    " def bad(self):\n  def later():\n   with self._changed:\n    pass\n  with self._log._lock:\n   run(later)\n",
                    "class More:\n def bad(self, log: Log, jobs: 'list[Job] | None'):\n  with log._lock:\n   [job._changed_of_all() for job in jobs]\nclass Other:\n def _changed_of_all(self, job: 'Job | None'):\n  with job._changed:\n   pass\n"):
            assert LockOrder(demo + bad, {}).cycles() == both
        called_back = demo.replace("   pass\n", "   self._done()\n")
        assert LockOrder(called_back, {}).cycles() == [] and set(both) < set(LockOrder(called_back, {"_done": {"Job.add"}}).cycles())
        again = demo.replace("   pass\n", "   self.append()\n")
        assert LockOrder(again, {}).cycles() == ["Log._lock -> Log._lock"]

    def test_standard_library_alone(self) -> None:
        imported = {name.partition(".")[0] for node in ast.walk(self.TREE) for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])}
        lazy = set(re.findall(r'"(\w+)"', self.SOURCE[self.SOURCE.index("map(_Lazy"):self.SOURCE.index("__version__ =")]))
        assert "tarfile" in lazy and imported | lazy <= set(sys.stdlib_module_names) | {"http"}


class TestReadme:
    def test_what_ci_installs(self) -> None:
        """.ci/run runs the README's command, and installs whatever a test that skips says is missing."""
        script = (FILE.parent / ".ci/run").read_text(encoding="utf-8")
        named = set(re.findall(r"apt-get install (?:-t [a-z-]+ )?([a-z0-9-]+)", Path(__file__).read_text(encoding="utf-8")))
        assert named >= {"git", "gcc", "qemu-system-x86", "strace"} and {name for name in named if not re.search(rf"[ :]{name}[ ;\n]", script)} == set()
        assert "sed -n 's/^    \\(python -m pytest.*\\)$/\\1/p' README.md" in script and "\n    python -m pytest\n" in self.TEXT

    TEXT = (FILE.parent / "README.md").read_text(encoding="utf-8")

    def test_a_real_verification(self) -> None:
        """What the README shows is what the program says, but for what it cuts and the time."""
        folder = SHARED / "vectors/vectors/az-snp-kettle-kex"
        if not folder.is_dir():
            pytest.skip("shared/vectors is not beside the project")
        files = confbuild.read_bundle(str(folder), evidence_only=True)._replace(others=())  # expect.json, which is ours
        rows = confbuild.render_verdict(verdict_over(files, confbuild.Expectations(evidence_only=True)), False).split("\n")
        said = self.TEXT[self.TEXT.index("    $ python confbuild.py verify kex/evidence.json\n"):].split("\n\n")[0].replace("\n    ", "\n").split("\n")[1:]
        shown = [re.escape(row).replace("\\ …", " …").replace("…", ".*") for row in said if "the other fields" not in row]
        shown = [re.sub(r"20\d\d\\-\d\d\\-\d\dT[\d:]+Z(?=\\ \\ )", r"[-0-9TZ:]+", row) for row in shown]
        missing = [row for row in rows if not any(re.fullmatch(pattern, row) for pattern in shown)]
        assert [row for row in missing if not row.startswith("     ")] == [], "the README leaves out a check"
        assert [pattern for pattern in shown if not any(re.fullmatch(pattern, row) for row in rows)] == [], "the README shows what is not said"

    def test_commands(self) -> None:
        assert re.search(r"^    (\$ )?python confbuild\.py build \S+$", self.TEXT, re.MULTILINE) and re.search(r"^    python -m pytest$", self.TEXT, re.MULTILINE)
        commands = next(a for a in confbuild.build_parser()._actions if isinstance(a.choices, dict)).choices
        assert isinstance(commands, dict)
        for name in set(commands) - {"agent", "fetcher", "sweep"}:
            row = re.search(rf"^\| `{name}\b.*$", self.TEXT, re.MULTILINE)
            assert row, f"README does not name {name}"
            for option in (max(a.option_strings, key=len) for a in commands[name]._actions if a.option_strings and a.dest != "help"):
                assert re.search(rf"`{option}[ `]", row[0] if f"`{option}`" in row[0] else self.TEXT), f"README does not name {name} {option}"
        known = {o for parser in commands.values() for a in parser._actions for o in a.option_strings} | {"--version"}
        table = "\n".join(line for line in self.TEXT.splitlines() if re.match(r"\| `(build|serve|verify|watch|list|cancel|fetch)\b", line))
        assert set(re.findall(r"`(--?[a-z-]+)`", table)) <= known, "README names what does not exist"

    def test_routes(self) -> None:
        listed = re.findall(r"^\| `(GET|POST|DELETE|PUT|HEAD) (/[^`]*)` \|", self.TEXT, re.MULTILINE)
        assert sorted(listed) == sorted((route.method, route.path) for route in confbuild.ROUTES)

    def test_words(self) -> None:
        """Statuses, failures and verdicts are all there."""
        assert set(re.findall(r"^\| (\d+) \|", self.TEXT, re.MULTILINE)) == {"0", "1", "2", "3", "4", "5", "130"}
        assert [word for word in (*confbuild.FAILURES, "SIMULATED", "FAILED", "PASSED") if f"`{word}`" not in self.TEXT] == []

# endregion 31
