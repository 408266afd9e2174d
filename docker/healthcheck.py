"""Exits with 0 if the server in this container answers that it is serving."""

import os
import sys

from polygraft_client import Client, Health, PolygraftError

port = os.environ.get("POLYGRAFT_LISTEN", "127.0.0.1:50051").rpartition(":")[2]
try:
    with Client(f"127.0.0.1:{port}") as client:
        sys.exit(client.health(timeout=4.0) is not Health.SERVING)
except PolygraftError as error:
    sys.exit(str(error))
