"""One answer, one stream and the list of adapters.

polygraft serve --adapters adapters
python clients/examples/python_quickstart.py [HOST:PORT]
"""

import sys

from polygraft_client import Client, PolygraftError

MESSAGE = [{"role": "user", "content": "Maria Lopez, 34, is a teacher from Madrid."}]


def main(address: str) -> None:
    with Client(address, timeout=60) as client:
        print("base:", client.generate(chat=MESSAGE, max_new_tokens=32).text)

        names = [adapter.name for adapter in client.adapters.list() if adapter.state == "READY"]
        for name in names:
            print(f"{name}: ", end="")
            with client.stream(chat=MESSAGE, adapter=name, max_new_tokens=32) as stream:
                for chunk in stream:
                    print(chunk.text, end="", flush=True)
            answer = stream.until_done()
            print(f"  [{answer.finish_reason}, {answer.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:] or ["127.0.0.1:50051"])
    except PolygraftError as error:
        sys.exit(f"error: {error}")
