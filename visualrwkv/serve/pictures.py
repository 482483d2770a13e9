"""Pictures that come with a request, and what is refused before it costs anything."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
import warnings
from collections.abc import Awaitable, Callable
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import httpx
from PIL import Image

from visualrwkv.serve.errors import bad
from visualrwkv.serve.limits import Limits
from visualrwkv.vision.processor import open_picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
REDIRECTS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Awaitable[list[str]]]


def from_data_uri(uri: str, limits: Limits) -> bytes:
    """The bytes of `data:image/…;base64,…`."""
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().startswith("data:image/"):
        raise bad(f"a picture's data URI begins data:image/TYPE;base64, not {head[:40]!r}", "image_url")
    if len(body) > limits.picture_mb * 1_400_000:
        raise bad(f"a picture is larger than {limits.picture_mb} MB", "image_url")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise bad("a picture's data URI is not valid base64", "image_url") from None


def decode_picture(data: bytes, limits: Limits) -> Image.Image:
    """Bytes -> an RGB picture; its size is looked at before its pixels are."""
    if len(data) > limits.picture_mb * 1_000_000:
        raise bad(f"a picture of {len(data) / 1e6:.1f} MB is larger than {limits.picture_mb} MB", "image_url")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise bad(f"a picture has more than {limits.megapixels} million pixels", "image_url") from None
    except Exception as error:  # on broken files Pillow raises whatever its decoders do
        raise bad(
            f"a picture is none of {', '.join(FORMATS)}, or broken ({type(error).__name__})", "image_url"
        ) from None
    if picture.width * picture.height > limits.megapixels * 1_000_000:
        size = f"{picture.width} x {picture.height}"
        raise bad(f"a picture of {size} pixels has more than {limits.megapixels} million", "image_url")
    try:
        return open_picture(picture)
    except Exception as error:
        raise bad(f"a picture is broken ({error})", "image_url") from None


# URLs ----------------------------------------------------------------------------------------------------------------


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where it is wrapped in another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in NAT64:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Fetcher:
    """Gets pictures from public addresses; what a name resolves to is checked, and that very address is connected to."""

    def __init__(self, limits: Limits, transport: httpx.AsyncBaseTransport | None = None, resolver: Resolve = resolve):
        self._limits, self._transport, self._resolve = limits, transport, resolver

    async def get(self, url: str) -> bytes:
        """The bytes that lie there."""
        try:
            return await asyncio.wait_for(self._get(url), self._limits.fetch_timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise bad(f"{url[:200]} gave no picture within {self._limits.fetch_timeout_s:g} s", "image_url") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            raise bad(f"{url[:200]} could not be fetched ({type(error).__name__})", "image_url") from None

    async def _get(self, url: str) -> bytes:
        # trust_env: a proxy would connect where nothing was checked
        async with httpx.AsyncClient(trust_env=False, transport=self._transport) as client:
            for _ in range(REDIRECTS + 1):
                address, host = await self._checked(url)
                headers = {"Host": host, "Accept": "image/*", "Accept-Encoding": "identity"}
                more = {"sni_hostname": urlsplit(url).hostname}
                async with client.stream("GET", address, headers=headers, extensions=more) as answer:
                    if answer.is_redirect:
                        url = urljoin(url, answer.headers["Location"])
                        continue
                    if answer.status_code != 200:
                        raise bad(f"{url[:200]} answered with status {answer.status_code}", "image_url")
                    return await self._body(answer, url)
        raise bad(f"{url[:200]} is reached by more than {REDIRECTS} redirects", "image_url")

    async def _body(self, answer: httpx.Response, url: str) -> bytes:
        data = bytearray()
        async for chunk in answer.aiter_raw():
            data += chunk
            if len(data) > self._limits.picture_mb * 1_000_000:
                raise bad(f"{url[:200]} is larger than {self._limits.picture_mb} MB", "image_url")
        return bytes(data)

    async def _checked(self, url: str) -> tuple[httpx.URL, str]:
        """The URL with the address in the host's place, and the host."""
        asked = httpx.URL(url)
        if asked.scheme not in ("http", "https") or not asked.host:
            raise bad(f"{url[:200]} is no http or https URL", "image_url")
        addresses = await self._resolve(asked.host, asked.port or (443 if asked.scheme == "https" else 80))
        if not addresses or not all(is_public(address) for address in addresses):
            raise bad(f"{url[:200]} is not at a public address", "image_url")
        return asked.copy_with(host=addresses[0], userinfo=b""), asked.netloc.decode().rpartition("@")[2]
