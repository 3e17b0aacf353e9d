"""An S3 server on loopback, and s3fs configured for it."""

import contextlib
import threading

import boto3
import fsspec
import fsspec.config
from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def s3_server(*, configured=True):
    """Start an S3 server with an empty bucket, and configure `s3://` filesystems for it.

    Args:
        configured: Whether new `s3://` filesystems of this process use the server; otherwise only
            its address, `client.meta.endpoint_url`, leads to it.

    Yields:
        The bucket's URL and a boto3 client to inspect it.
    """
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Otherwise a client that disconnects before it is accepted blocks the server.
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
        # On a busy machine the server may not stop; it is not needed any more.
        ending = threading.Thread(target=server.stop, daemon=True)
        ending.start()
        ending.join(10)
