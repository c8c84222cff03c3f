"""A stub of the Malmo protocol, as MineRL's client speaks it: neither Minecraft nor anything that could be learned.

python tests/minerl/protocol_stub.py [--port 0] [--log-steps] [--die-at 10 --die-after picture]

It accepts missions and answers each step by a picture that shows the number of the step. Printed on stdout, as JSON
lines: the port, each mission, and with --log-steps each step.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import threading

SIZE = 64 * 64 * 3


def picture(step: int) -> bytes:
    """64 x 64 pixels, bottom row first as Malmo sends them; the first row shows the low and high byte of the step."""
    pixels = bytearray(SIZE)
    pixels[-64 * 3 : -64 * 3 + 2] = struct.pack("<H", step)  # the last row sent is the first one shown
    return bytes(pixels)


class Stub:
    """One Minecraft: one mission at a time.

    Args:
        reward_every: a log each so many steps.
        logs: possessing so many ends the mission.
        time_up: step at which the mission ends by itself; 0: never.
        log_steps: print every step's commands.
        die_at: step at which the process ends.
        die_after: what of the answer to that step is still sent: nothing, picture, reward or all.
    """

    def __init__(
        self, reward_every: int, logs: int, time_up: int, log_steps: bool, die_at: int, die_after: str
    ) -> None:
        self.reward_every, self.logs, self.time_up, self.log_steps = reward_every, logs, time_up, log_steps
        self.die_at, self.die_after = die_at, die_after
        self.step = self.possessed = 0

    def serve(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            while (message := receive(connection)) is not None:
                if message.startswith(b"<StepClient"):
                    self._step(connection, message)
                elif message.startswith(b"<MissionInit"):
                    token = (receive(connection) or b"").decode()
                    self.step = self.possessed = 0
                    report({"mission": message.decode(), "token": token})
                    send(connection, struct.pack("!I", 1))
                elif message.startswith(b"<Quit"):
                    send(connection, struct.pack("!I", 1))
                elif message.startswith(b"<Peek"):
                    send(connection, picture(0))
                    send(connection, b"{}")
                    send(connection, struct.pack("!b", 0))
                elif message.startswith(b"<Disconnect"):
                    return

    def _step(self, connection: socket.socket, message: bytes) -> None:
        self.step += 1
        if self.log_steps:
            report({"step": self.step, "command": message.decode()})
        reward = float(self.step % self.reward_every == 0)
        self.possessed += int(reward)
        is_done = self.possessed >= self.logs or self.step == self.time_up
        answer = {
            "nothing": None,
            "picture": picture(self.step),
            "reward": struct.pack("!dbb", reward, is_done, 1),
            "all": b"{}",
        }
        for part, data in answer.items():
            if data is not None:
                send(connection, data)
            if self.step == self.die_at and part == self.die_after:
                os._exit(1)


def report(entry: dict[str, object]) -> None:
    print(json.dumps(entry), flush=True)


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(struct.pack("!I", len(data)) + data)


def receive(connection: socket.socket) -> bytes | None:
    header = receive_exactly(connection, 4)
    return None if header is None else receive_exactly(connection, struct.unpack("!I", header)[0])


def receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        try:
            part = connection.recv(size - len(data))
        except OSError:
            return None
        if not part:
            return None
        data += part
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--reward-every", type=int, default=200)
    parser.add_argument("--logs", type=int, default=64)
    parser.add_argument("--time-up", type=int, default=0)
    parser.add_argument("--log-steps", action="store_true")
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--die-after", default="nothing")
    arguments = vars(parser.parse_args())
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", arguments.pop("port")))
    server.listen()
    report({"port": server.getsockname()[1]})
    Stub(**arguments).serve(server)


if __name__ == "__main__":
    sys.exit(main())
