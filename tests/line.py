"""A line to a real server that a test can make bad: a TCP proxy that hangs, is slow, breaks off, and is mended."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

BLOCK_BYTES = 16 * 2**10


class Line:
    """What is done to it holds for the connections there are and for those to come, until it is mended."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.breaks = 0
        """How many connections were broken off."""
        self._changed = threading.Condition()
        self._hung = False
        self._pause_seconds = 0.0
        self._broken_after_bytes = 0
        self._breaks_left = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def hang(self) -> None:
        """Connections are taken, and nothing comes through."""
        self._change(hung=True)

    def slow_down(self, *, bytes_per_second: int) -> None:
        self._change(pause_seconds=BLOCK_BYTES / bytes_per_second)

    def break_off(self, *, after_bytes: int, times: int) -> None:
        """That many connections end in the middle of what they send, each once it has sent so much."""
        self._change(after_bytes=after_bytes, breaks_left=times)

    def mend(self) -> None:
        self._change()

    def close(self) -> None:
        self.mend()
        self._listening.close()

    def _change(
        self, *, hung: bool = False, pause_seconds: float = 0.0, after_bytes: int = 0, breaks_left: int = 0
    ) -> None:
        with self._changed:
            self._hung, self._pause_seconds = hung, pause_seconds
            self._broken_after_bytes, self._breaks_left = after_bytes, breaks_left
            self._changed.notify_all()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._target)
                for source, sink in ((near, far), (far, near)):
                    carry = partial(self._carry, source, sink, sending=source is near)
                    threading.Thread(target=carry, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, *, sending: bool) -> None:
        sent = 0
        with contextlib.suppress(OSError):  # the other direction has ended
            while block := source.recv(BLOCK_BYTES):
                with self._changed:
                    self._changed.wait_for(lambda: not self._hung)
                    pause = self._pause_seconds
                    sent += len(block)
                    broken = sending and self._breaks_left > 0 and sent > self._broken_after_bytes
                    if broken:
                        self._breaks_left -= 1
                        self.breaks += 1
                if broken:
                    break
                time.sleep(pause)
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def run_line(port: int) -> Iterator[Line]:
    line = Line("127.0.0.1", port)
    try:
        yield line
    finally:
        line.close()
