"""Fake names, addresses and connections, so that downloads reach nothing outside."""

import socket
import threading

import httpx

from prefect_flux_kontext.images.ssrf import AddressGuard, GuardedTransport

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

_TLS_HANDSHAKE = 0x16
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"


class Names:
    """A fake resolver; its addresses may change between calls."""

    def __init__(self, names=NAMES):
        self.names = {name: list(addresses) for name, addresses in names.items()}
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append(host)
        if host not in self.names:
            raise OSError(f"{host} is unknown")
        return self.names[host]


class Network:
    """Makes sockets that end in this process, and records where they should connect to.

    Args:
        replies: The reply of each connection; the last one repeats.
        dead: Addresses that refuse connections.
        tls: The TLS context of the server; None for http.
    """

    def __init__(self, *replies, dead=(), tls=None):
        self.replies = list(replies) or [REPLY]
        self.connected = []
        self.written = b""
        self.dead = dead
        self._tls = tls

    def __call__(self, addr_info):
        local, remote = socket.socketpair()
        fake = _Socket(fileno=local.detach())
        fake.network, fake.remote = self, remote
        return fake

    def serve(self, connection):
        """Read a request and answer it, in a thread."""
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        with connection:
            if self._tls is not None:
                try:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                except OSError:
                    return
            with connection:
                request = b""
                while b"\r\n\r\n" not in request and (piece := connection.recv(65_536)):
                    request += piece
                    if request[0] == _TLS_HANDSHAKE:
                        return
                self.written += request
                connection.sendall(reply)


class _Socket(socket.socket):
    """A socket whose other end is in this process."""

    def connect(self, address):
        host, port = address[:2]
        self.network.connected.append((host, port))
        if host in self.network.dead:
            self.remote.close()
            raise ConnectionRefusedError(f"{host} refuses connections")
        threading.Thread(target=self.network.serve, args=[self.remote], daemon=True).start()


def redirect(target):
    return f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()


def open_guarded_client(network=None, names=None, base_url=None):
    guard = AddressGuard(base_url, names or Names())
    transport = GuardedTransport(guard, socket_factory=network)
    return httpx.AsyncClient(transport=transport, follow_redirects=True, max_redirects=3)
