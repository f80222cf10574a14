"""Downloads without a network: they end within a minute, with one message that says what was tried.

Libraries that download try each address again and again, which helps with a server that is busy and takes minutes where there
is no network at all, or one that lets nothing through. So before a library asks, `fault` looks whether a connection can be had.
Where it cannot, the hub's libraries are switched to their own offline mode, in which they give what their caches hold, and TFDS
is stopped by the adapter through which it downloads.
"""

import contextlib
import importlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from unittest import mock

SECONDS = 10.0  # for a connection to be had, and between two pieces of an answer six times as long
RETRIES = 4  # of what a busy server refused, by TFDS, 6 seconds in all

# Where the hub's libraries keep whether they are offline.
_SWITCHES = ("huggingface_hub.constants", "datasets.config")


class Unreachable(OSError):
    """No connection can be had to the host of an address, `url`."""

    def __init__(self, url: str, reason: str):
        super().__init__(reason)
        self.url = url


def fault(url: str) -> str:
    """Why no connection to an address can be had: "HOST cannot be reached (REASON)"; "" where one can. Where the environment
    names a proxy, what counts is a connection to it.
    """
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and parts.hostname and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = parts.port or {"http": 80}.get(parts.scheme, 443)
        socket.create_connection((parts.hostname, port), timeout=SECONDS).close()
    except OSError as error:
        return f"{parts.hostname} cannot be reached ({error.strerror or error})"
    return ""


@contextlib.contextmanager
def hub() -> Iterator[str]:
    """For the length of the block the hub's libraries are offline if no connection to the hub can be had; gives the reason, or
    "" where one can, or where they are offline anyway.
    """
    constants = importlib.import_module("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE or not (reason := fault(constants.ENDPOINT)):
        yield ""
        return
    with contextlib.ExitStack() as stack:
        for name in _SWITCHES:
            if name in sys.modules:
                stack.enter_context(mock.patch.object(sys.modules[name], "HF_HUB_OFFLINE", True))
        yield reason


@contextlib.contextmanager
def tfds() -> Iterator[None]:
    """For the length of the block TFDS gives up an address early: Unreachable where no connection can be had, few retries."""
    requests = importlib.import_module("requests")
    downloader = importlib.import_module("tensorflow_datasets.core.download.downloader")

    class Adapter(requests.adapters.HTTPAdapter):
        """requests' own, which looks for a connection first and does not wait for ever."""

        def send(self, request, *given, timeout=None, **options):
            if reason := fault(request.url):
                raise Unreachable(request.url, reason)
            return super().send(request, *given, timeout=timeout or (SECONDS, 6 * SECONDS), **options)

    with mock.patch.object(requests.adapters, "HTTPAdapter", Adapter), mock.patch.object(downloader, "MAX_RETRIES", RETRIES):
        yield
