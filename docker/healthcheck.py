"""Exits with 0 if the server in this container answers that it is serving."""

import os
import sys

from polygraft_client import Client, Health, PolygraftError

# Every address of the container includes its loopback.
EVERY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}  # noqa: S104 - asked, not listened on

host, _, port = (os.environ.get("POLYGRAFT_LISTEN") or "127.0.0.1:50051").strip().rpartition(":")
try:
    with Client(f"{EVERY.get(host, host)}:{port}") as client:
        sys.exit(client.health(timeout=4.0) is not Health.SERVING)
except PolygraftError as error:
    sys.exit(str(error))
