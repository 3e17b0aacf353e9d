"""A real S3 server on loopback, and s3fs pointed at it."""

import contextlib
import threading

import boto3
import fsspec
import fsspec.config
from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def s3_server(*, configured=True):
    """Serve an empty S3, and let every new `s3://` filesystem of this process use it.

    Args:
        configured: Else nobody here knows it but by its address, `client.meta.endpoint_url`.

    Yields:
        The bucket's URL and a boto3 client, to look at it from the outside.
    """
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Else a client that hangs up before it is accepted leaves the server waiting for another.
    server._server.socket.settimeout(1)
    access = {"endpoint_url": f"http://{host}:{port}"}
    secrets = {"key": "testing", "secret": "testing"}
    before = fsspec.config.conf.get("s3")
    if configured:
        fsspec.config.conf["s3"] = access | secrets
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        **access,
    )
    try:
        client.create_bucket(Bucket="pictures")
        yield "s3://pictures", client
    finally:
        client.close()
        fsspec.filesystem("s3").clear_instance_cache()
        if before is None:
            fsspec.config.conf.pop("s3", None)
        else:
            fsspec.config.conf["s3"] = before
        # On a busy machine it has been seen not to end, and nobody needs it any more.
        ending = threading.Thread(target=server.stop, daemon=True)
        ending.start()
        ending.join(10)
