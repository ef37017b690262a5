"""Tars at addresses: read in passing, sample by sample."""

from __future__ import annotations

import http.client
import itertools
import os
import re
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urljoin, urlsplit

from tuner.data.blob import Held
from tuner.data.samples import Sample, Say
from tuner.data.sources.group import (
    DamagedError,
    Finding,
    Group,
    Made,
    Part,
    StrictInfo,
    is_text,
    is_wanted,
    make,
    refusal,
    split,
)
from tuner.data.sources.retry import Broken
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.stream import Fault, Stream
from tuner.errors import UserError

PATIENCE = 60.0
"""Seconds without a byte after which a connection counts as broken."""
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may be another one later."""
AT_ONCE = 16
"""Addresses that are asked for their tags together."""
POINTS = 5
"""How often a server may point to another address."""


def open_urls(spec: SourceSpec, say: Say, source: int) -> Stream:
    """The samples of tars at addresses, `https://host/{000..009}.tar`; nothing is asked for yet.

    Raises:
        UserError: the braces cannot be read.
    """
    finding = Finding(spec.condition_from, spec.mask_from)
    return Stream(TarShards(spec.path, expand(spec.path), finding), spec, say, source)


def expand(pattern: str) -> list[str]:
    """What braces stand for: {000..009} for numbers, {a,b} for words, as a shell does.

    Raises:
        UserError: a brace that is neither.
    """
    choices: list[list[str]] = []
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if i % 2 == 0:
            choices.append([part])
        elif found := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = int(found[1]), int(found[2])
            width = len(found[1]) if found[1].startswith("0") else 0
            choices.append([f"{number:0{width}d}" for number in range(first, last + 1)])
        else:
            choices.append(part.split(",") if "," in part else [])
    if not all(choices) or re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", pattern)):
        raise UserError(f"{pattern}: expected braces such as {{000..009}} or {{a,b}}")
    return ["".join(one) for one in itertools.product(*choices)]


class TarShards:
    """Tars at addresses."""

    def __init__(self, place: str, addresses: list[str], finding: Finding) -> None:
        self.place, self.addresses, self.finding = place, addresses, finding
        self.masked = finding.mask is not None

    @property
    def count(self) -> int:
        """How many tars there are."""
        return len(self.addresses)

    def name(self, shard: int) -> str:
        """Its address."""
        return self.addresses[shard]

    def read(self, shard: int, skip: int) -> Iterator[Sample | Fault]:
        """The samples of a tar in their order.

        Raises:
            Broken: the connection, or a server that has no time.
            UserError: there is no such address, or the archive is damaged.
        """
        address = self.addresses[shard]
        with _opened(address) as answer:
            reader = _Whole(answer)
            try:
                with tarfile.open(fileobj=reader, mode="r|*", tarinfo=StrictInfo, errorlevel=2) as tar:  # type: ignore[call-overload]
                    for group in itertools.islice(groups(tar, address, self.finding), skip, None):
                        yield sample(address, group, self.finding, held)
            except (DamagedError, tarfile.TarError, zlib.error, EOFError) as error:
                raise UserError(f"{address}: the archive is damaged: {error}") from error
            except (OSError, http.client.HTTPException) as error:
                raise Broken(_reason(error)) from error

    def identity(self) -> Iterator[str]:
        """Each address with what the server calls its bytes (ETag) and their number, as far as it says."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(_tag, self.addresses)


def groups(tar: tarfile.TarFile, place: str, finding: Finding, whole: bool = True) -> Iterator[Group]:
    """The samples of an archive; the members of one lie side by side.

    Args:
        whole: read all bytes; else only texts, of pictures the place.

    Raises:
        UserError: a member that is refused.
    """
    group: Group | None = None
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep an object for each
        if problem := refusal(member):
            raise UserError(f"{place}: {member.name}: {problem}")
        parts = split(member.name) if member.isreg() else None
        if parts is None or not is_wanted(parts[1], finding):
            continue
        key, ending = parts
        if group is not None and group.key != key:
            yield group
            group = None
        group = group or Group(key)
        data = None
        if whole or is_text(ending):
            opened = tar.extractfile(member)
            assert opened is not None
            data = opened.read()
        group.parts[ending] = Part(member.name, member.offset_data, member.size, data)
    if group is not None:
        yield group


def sample(place: str, group: Group, finding: Finding, hold: Callable[[Made, str], Sample]) -> Sample | Fault:
    """A group as a sample, whose bytes `hold` has."""
    wrong: list[str] = []
    made = make(group, finding, wrong)
    if made is None:
        alone = len(group.parts) == 1
        hint = "; in a streamed tar the members of a sample lie side by side" if alone else ""
        return Fault(f"{place}: {'; '.join(wrong)}{hint}")
    return hold(made, place)


def held(made: Made, place: str) -> Sample:
    """A sample whose bytes are in memory."""
    import json

    blobs = [
        None if part is None else Held(f"{place}: {part.name}", part.data or b"")
        for part in (made.picture, made.condition, made.mask)
    ]
    assert blobs[0] is not None
    scene = None if made.scene is None else json.loads(made.scene)
    captions, kinds = tuple(made.captions), tuple(made.kinds)
    return Sample(blobs[0], captions, blobs[1], blobs[2], scene, weight=made.weight, kinds=kinds)


class _Whole:
    """An answer's bytes; one that ends before its length is a broken connection, not the archive's end."""

    def __init__(self, answer: Any) -> None:
        length = answer.headers.get("Content-Length")
        self.answer, self.left = answer, None if length is None else int(length)

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data: bytes = self.answer.read(size)
        if self.left is not None:
            self.left -= len(data)
            if not data and self.left > 0:
                raise ConnectionResetError(f"{self.left} bytes are missing")
        return data


class _Stay(urllib.request.HTTPRedirectHandler):
    """Does not go where a server points: urllib would ask there for the bytes, not for their tag."""

    def redirect_request(self, *_: Any) -> None:
        """Nowhere."""
        return


def _tag(address: str) -> str:
    """What a server calls the bytes at an address; the address alone where it does not say."""
    at = address
    for _ in range(POINTS):
        try:
            with _opened(at, "HEAD", urllib.request.build_opener(_Stay).open) as answer:
                told = answer.headers
        except urllib.error.HTTPError as error:
            told = error.headers
            if error.code in (403, 405, 501):  # an address that is signed for reading only; no HEAD there
                return address
        tag = told.get("X-Linked-ETag") or (None if told.get("Location") else told.get("ETag"))
        size = told.get("X-Linked-Size") or (None if told.get("Location") else told.get("Content-Length"))
        if tag or size or not told.get("Location"):
            return f"{address} {tag} {size}"
        at = urljoin(at, told["Location"])
    raise UserError(f"{address}: the server points from one address to the next, {POINTS} times")


def _opened(address: str, method: str = "GET", opener: Callable[..., Any] = urllib.request.urlopen) -> Any:
    """An answer. Raises Broken, UserError, or, where not the bytes are asked for, HTTPError."""
    request = urllib.request.Request(address, method=method)
    if token := _token(address):
        # Not sent on to where the server may point: storage of others has no business with it.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return opener(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in AGAIN:
            raise Broken(_reason(error)) from error
        if method == "HEAD" and (error.code < 400 or error.code in (403, 405, 501)):
            raise
        hint = " (is HF_TOKEN set, and may it read this?)" if error.code in (401, 403, 404) else ""
        raise UserError(f"{address}: the server answered {error.code} {error.reason}{hint}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(_reason(error)) from error


def _token(address: str) -> str | None:
    """The user's token, for addresses of the Hub only."""
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    there = urlsplit(address)
    if (there.scheme, there.netloc) != (hub.scheme, hub.netloc):
        return None
    from huggingface_hub import get_token

    return get_token()


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error) or type(error).__name__
