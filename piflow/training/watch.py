"""A rank that dies takes the others with it, at once and with a message.

The others would wait for it in a collective: without end on several machines, and on one until the `deepspeed` launcher
has given each of them 30 seconds. Here every rank holds a TCP connection to rank 0, which the system closes when a
process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds, seconds, number: a machine without power is noticed after half a minute."""
CONNECT_TIMEOUT = 60


class RankWatch:
    """Watches the other ranks from a thread until `close`; ends this process with exit code 1 when one is gone."""

    def __init__(self, rank: int, world_size: int, broadcast: Callable[[Any], Any]) -> None:
        """Collective. `broadcast` gives rank 0's value on every rank."""
        self.rank, self._closed = rank, False
        self._peers: dict[int, socket.socket] = {}
        if world_size == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if rank == 0:
            with socket.create_server(("", 0), backlog=world_size) as server:
                server.settimeout(CONNECT_TIMEOUT)
                broadcast(server.getsockname()[1])
                for _ in range(world_size - 1):
                    peer, _ = server.accept()
                    self._peers[int.from_bytes(_receive(peer, 4), "big")] = peer
        else:
            peer = socket.create_connection((host, broadcast(None)), timeout=CONNECT_TIMEOUT)
            peer.sendall(rank.to_bytes(4, "big"))
            self._peers[0] = peer
        for peer in self._peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        os.register_at_fork(after_in_child=self._forget)  # a data worker would hold a dead rank's connection open
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()

    def close(self, exit_code: int) -> None:
        """This rank is about to end, and has said why: with another code than 0 the others end alike, in silence."""
        self._closed = True
        self._tell(exit_code)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    peer, last_word = self._peers[key.data], b""
                    selector.unregister(peer)
                    with contextlib.suppress(OSError):
                        last_word = peer.recv(1)
                    if last_word != b"\0" and not self._closed:
                        self._end_too(key.data, last_word)

    def _end_too(self, rank: int, last_word: bytes) -> NoReturn:
        if not last_word:
            print(
                f"\npiflow.train: rank {rank} has died (killed, out of memory, or an error above), so that the others "
                "end too. What was saved is there: run the same command again to go on from the last checkpoint.",
                file=sys.stderr,
            )
        exit_code = last_word[0] if last_word else 1
        self._tell(exit_code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    def _tell(self, exit_code: int) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(bytes([exit_code]))

    def _forget(self) -> None:
        for peer in self._peers.values():
            peer.close()


def _receive(peer: socket.socket, size: int) -> bytes:
    peer.settimeout(CONNECT_TIMEOUT)
    received = b""
    while len(received) < size:
        if not (part := peer.recv(size - len(received))):
            raise ConnectionError("a rank has ended during the start")
        received += part
    return received
