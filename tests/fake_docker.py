"""A FAKE `docker`: version, info, image inspect, run, rm. A "container" is tests/fake_vllm.py in a session of its own.

FAKE_DOCKER names its directory, which stands for the daemon: `version`, `info` and `image` hold what those commands
print and, in the first line, their exit status; `record.json` is written by `run`, `NAME.pid` stands for a container.
As Docker's, the client passes SIGTERM on and ends with the container; killed, it leaves the container running.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_HERE = Path(__file__).parent
_IMAGE = "razerofficial/aikit:latest"


def main(words: list[str]) -> int:
    if words[0] == "shim":
        return shim(Path(words[1]), words[2], words[3:])
    daemon = Path(os.environ["FAKE_DOCKER"])
    if words[0] == "run":
        return run(words[1:], daemon)
    if words[:2] == ["rm", "--force"]:
        return remove(daemon / f"{words[2]}.pid")
    name = "image" if words[:2] == ["image", "inspect"] else words[0]
    status, _, text = (daemon / name).read_text(encoding="utf-8").partition("\n")
    sys.stdout.write(text)
    return int(status)


def run(words: list[str], daemon: Path) -> int:
    (daemon / "record.json").write_text(json.dumps({"argv": words, "key": os.environ.get("VLLM_API_KEY")}))
    refusal = daemon / "refusal"
    if refusal.exists():
        sys.stdout.write(refusal.read_text(encoding="utf-8"))
        return 125
    at = words.index(_IMAGE)
    options, inside = words[:at], words[at + 2 :]
    address, port, _ = options[options.index("--publish") + 1].rsplit(":", 2)
    given = [options[i + 1] for i, word in enumerate(options) if word == "--env"]
    env = dict(os.environ) | dict(pair.split("=", 1) for pair in given if "=" in pair)
    name = options[options.index("--name") + 1]
    command = [sys.executable, str(_HERE / "fake_vllm.py"), *inside, "--host", address, "--port", port]
    shim = [sys.executable, __file__, "shim", str(daemon), name, *command]
    (daemon / f"{name}.status").unlink(missing_ok=True)  # of the last container with this name
    subprocess.run(["setsid", "--fork", *shim], env=env, check=True)  # no descendant of ours: the daemon's
    return attend(daemon, name)


def attend(daemon: Path, name: str) -> int:
    """Until the container has ended, passing SIGTERM on."""
    pid_file, status_file = daemon / f"{name}.pid", daemon / f"{name}.status"
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    while not status_file.exists():
        if asked and pid_file.exists():
            os.kill(int(pid_file.read_text()), asked.pop())
        time.sleep(0.02)
    return int(status_file.read_text())


def shim(daemon: Path, name: str, command: list[str]) -> int:
    """What holds a container: it outlives the client."""
    container = subprocess.Popen(command)
    (daemon / f"{name}.draft").write_text(str(container.pid))
    (daemon / f"{name}.draft").replace(daemon / f"{name}.pid")
    status = container.wait()
    (daemon / f"{name}.pid").unlink(missing_ok=True)
    (daemon / f"{name}.ended").write_text(str(status if status >= 0 else 128 - status))
    (daemon / f"{name}.ended").replace(daemon / f"{name}.status")
    return 0


def remove(pid_file: Path) -> int:
    if not pid_file.exists():
        sys.stderr.write(f"Error response from daemon: No such container: {pid_file.stem}\n")
        return 1
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    while pid_file.exists():
        time.sleep(0.02)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
