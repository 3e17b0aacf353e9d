"""Made-up names, addresses and connections, so that tests reach no network."""

import socket
import threading

import httpx

from prefect_flux_kontext.images.ssrf import Guard, GuardedTransport

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
    """A resolver with made-up addresses, which a test may change between queries."""

    def __init__(self, names=NAMES):
        self.names = {name: list(addresses) for name, addresses in names.items()}
        self.queries = []

    async def __call__(self, host, port):
        self.queries.append(host)
        if host not in self.names:
            raise OSError(f"{host} is not known here")
        return self.names[host]


class Network:
    """Creates sockets that end in this process, and records the addresses they connect to.

    Args:
        replies: The reply to each connection; the last one repeats.
        dead: Addresses that refuse connections.
        tls: TLS context of an https server.
    """

    def __init__(self, *replies, dead=(), tls=None):
        self.replies = list(replies) or [REPLY]
        self.connected = []
        self.written = b""
        self.dead = dead
        self._tls = tls

    def __call__(self, addr_info):
        ours, theirs = socket.socketpair()
        connection = _Socket(fileno=ours.detach())
        connection.network, connection.theirs = self, theirs
        return connection

    def serve(self, connection):
        """Read a request and answer it; runs in a thread."""
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        with connection:
            if self._tls is not None:
                try:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                except OSError:
                    return
            with connection:
                received = b""
                while b"\r\n\r\n" not in received and (piece := connection.recv(65_536)):
                    received += piece
                    if received[0] == _TLS_HANDSHAKE:
                        return
                self.written += received
                connection.sendall(reply)


class _Socket(socket.socket):
    """A socket whose other end is in this process."""

    def connect(self, address):
        host, port = address[:2]
        self.network.connected.append((host, port))
        if host in self.network.dead:
            self.theirs.close()
            raise ConnectionRefusedError(f"{host} does not answer")
        threading.Thread(target=self.network.serve, args=[self.theirs], daemon=True).start()


def redirect(target):
    """Return a redirect reply."""
    return f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()


def guarded_client(network=None, names=None, base_url=None):
    """Return a client whose connections are guarded."""
    guard = Guard(base_url, names or Names())
    transport = GuardedTransport(guard, socket_factory=network)
    return httpx.AsyncClient(transport=transport, follow_redirects=True, max_redirects=3)
