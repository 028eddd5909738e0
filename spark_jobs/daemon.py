"""Spark's daemon of Python workers, without the stack trace of a worker whose job has ended.

When a session stops, Spark first closes its workers' sockets and then ends their daemon. A worker that runs in between
takes the closed socket for an error, and has nobody left to tell it to.
"""

import socket

from pyspark import daemon

_serve = daemon.worker


def _worker(sock: socket.socket, authenticated: bool) -> int:
    try:
        return _serve(sock, authenticated)
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    daemon.worker = _worker
    daemon.manager()
