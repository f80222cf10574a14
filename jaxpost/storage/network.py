"""Downloads without a network: they fail within a minute, with one message.

Libraries retry each address many times. That helps with a busy server, but takes minutes where there is no network or a
firewall blocks it. So `fault` first tries to connect. Where that fails, the hub's libraries are switched to their offline mode,
in which they use their caches, and TFDS is stopped by its HTTP adapter.
"""

import contextlib
import importlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from unittest import mock

SECONDS = 10.0  # to connect; between two pieces of a response six times as long
RETRIES = 4  # TFDS's, of requests that a busy server refused; 6 seconds in all

# The modules that hold the offline flags of the hub's libraries.
_SWITCHES = ("huggingface_hub.constants", "datasets.config")


class Unreachable(OSError):
    """The host of an address, `url`, cannot be reached."""

    def __init__(self, url: str, reason: str):
        super().__init__(reason)
        self.url = url


def fault(url: str) -> str:
    """Why an address cannot be reached: "HOST cannot be reached (REASON)"; "" where it can. Where the environment names a
    proxy, the connection to that is tried.
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
    """During the block the hub's libraries are offline if the hub cannot be reached. Yields the reason, or "" where it can be
    reached or the libraries are offline already.
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
    """During the block TFDS gives up early: it raises Unreachable where it cannot connect, and retries only a few times."""
    requests = importlib.import_module("requests")
    downloader = importlib.import_module("tensorflow_datasets.core.download.downloader")

    class Adapter(requests.adapters.HTTPAdapter):
        """requests' adapter, with a connection test first and a timeout."""

        def send(self, request, *arguments, timeout=None, **options):
            if reason := fault(request.url):
                raise Unreachable(request.url, reason)
            return super().send(request, *arguments, timeout=timeout or (SECONDS, 6 * SECONDS), **options)

    with mock.patch.object(requests.adapters, "HTTPAdapter", Adapter), mock.patch.object(downloader, "MAX_RETRIES", RETRIES):
        yield
