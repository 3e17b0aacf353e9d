"""Made-up names, addresses and connections: what a download meets, without anything reached."""

import httpcore
import httpx

from prefect_flux_kontext.api.connections import POOL_LIMITS, tls_context
from prefect_flux_kontext.guarded import Guard, GuardedTransport

NAMES = {
    "cdn.test": ["93.184.215.14"],
    "two.test": ["93.184.215.14", "93.184.215.15"],
    "six.test": ["2606:4700::1111"],
    "inside.test": ["10.0.0.7"],
    "half-inside.test": ["93.184.215.14", "10.0.0.7"],
    "metadata.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "nowhere.test": [],
}

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"


class Names:
    """Made-up addresses; they may change from one question to the next."""

    def __init__(self, names=NAMES):
        self.names = {name: list(addresses) for name, addresses in names.items()}
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append(host)
        if host not in self.names:
            raise OSError(f"{host} is not known here")
        return self.names[host]


class Stream(httpcore.AsyncMockStream):
    """A connection that answers from a list of bytes, and remembers the request."""

    def __init__(self, network, reply):
        super().__init__([reply])
        self._network = network

    async def write(self, buffer, **how):
        self._network.written += buffer

    async def start_tls(self, ssl_context, server_hostname=None, **how):
        self._network.tls_names.append((ssl_context, server_hostname))
        return self


class Network(httpcore.AsyncNetworkBackend):
    """Where connections went; some addresses do not answer."""

    def __init__(self, *replies, dead=()):
        self.replies = list(replies) or [REPLY]
        self.connected = []
        self.tls_names = []
        self.written = b""
        self._dead = dead

    async def connect_tcp(self, host, port, *how):
        self.connected.append((host, port))
        if host in self._dead:
            raise httpcore.ConnectError(f"{host} does not answer")
        return Stream(self, self.replies.pop(0) if len(self.replies) > 1 else self.replies[0])


def redirect(target):
    return f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()


def guarded(network=None, names=None, base_url=None):
    guard = Guard(base_url, names or Names())
    transport = GuardedTransport(guard, limits=POOL_LIMITS, tls=tls_context(), network=network)
    return httpx.AsyncClient(transport=transport, follow_redirects=True, max_redirects=3)
