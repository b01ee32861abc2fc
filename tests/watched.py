"""A gate of one's own for --gate: HPT's, which also writes down what the process holds."""

import contextlib
import json
import os
from pathlib import Path

from upge import hpt_gate


def gate(rewards, step):
    """HPT's alpha and beta; a line on the process goes to the file that WATCHED names."""
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    row = {
        "step": step,
        "files": len(links_of_open_files()),
        "processes": sum(map(len, children)),
        "listening": listening(),
    }
    with open(os.environ["WATCHED"], "a") as file:
        file.write(json.dumps(row) + "\n")
    return hpt_gate(rewards, 0.0)


def links_of_open_files():
    """What each file descriptor of this process leads to."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which they are listed
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return links


def listening():
    """The addresses, as /proc/net writes them, at which this process waits for connections."""
    own, found = links_of_open_files(), []
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                found.append(words[1])
    return found
