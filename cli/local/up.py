"""`maskline up`: the local stack on a terminal, until Ctrl-C."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TextIO

from cli.local.child import StackError
from cli.local.logs import Follower
from cli.local.stack import Stack
from shared.config import SettingsError, load_settings

APPS = ("api", "upkeep", "io0", "webhooks0")
POLL_SECONDS = 0.1


def run_stack(
    path: Path,
    *,
    port: int | None = None,
    gpu_workers: int = 1,
    settings: Mapping[str, str] | None = None,
    output: TextIO | None = None,
) -> int:
    """Run until a signal asks to end; returns the exit status. Must be called from the main thread."""
    output = output or sys.stdout
    names = (*APPS, *(f"gpu{number}" for number in range(gpu_workers)))
    follower = Follower({name: path / "logs" / f"{name}.log" for name in names}, output=output)
    stack = Stack(path, port=port, gpu_workers=gpu_workers, settings=settings, report=follower.say)
    asked = _listen(stack, say=follower.say)
    try:
        load_settings()  # a misspelt variable is better told here than by four processes
        began = time.monotonic()
        stack.start()
        if not asked:
            follower.say(_describe(stack, seconds=time.monotonic() - began))
        while not asked:
            time.sleep(POLL_SECONDS)
    except (StackError, SettingsError) as error:
        follower.say(f"maskline: {error}")
        return 1
    else:
        stack.stop()
        follower.say("Stopped. What is queued stays queued: `maskline up` goes on with it.")
        return 0
    finally:
        stack.stop()
        follower.close()


def _listen(stack: Stack, *, say: Callable[[str], None]) -> list[int]:
    """The signals that came. The first asks to end, a second one at once."""
    asked: list[int] = []  # not an Event: a handler that interrupts its owner inside would wait for itself

    def end(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            stack.hurry()
            return
        say("Stopping: running work is finished or handed back. Ctrl-C again stops at once.")
        stack.give_up()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` leaves SIGHUP
            signal.signal(number, end)
    return asked


def _describe(stack: Stack, *, seconds: float) -> str:
    authorization = shlex.quote(f"@{os.path.relpath(stack.path / 'authorization')}")
    return f"""
Maskline is ready after {seconds:.1f} s:  {stack.url}

  API key    {stack.api_key[:9]}…  (whole in {os.path.relpath(stack.path / "stack.json")})
  Reference  {stack.url}/docs
  Logs       {os.path.relpath(stack.path / "logs")}/

  curl -H {authorization} -H 'Prefer: wait=60' -F file=@photo.jpg -F mode=demo {stack.url}/v1/jobs

Ctrl-C drains and stops.
"""
