"""A program under a pseudo terminal, and what a person would see there."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios


def run_on_terminal(command, columns=120, timeout=400, **more):
    """Run a program on a terminal; return (status, all that it wrote). more: environment."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    names = ("NO_COLOR", "COLUMNS", "RANK")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"TERM": "xterm"} | more
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    with subprocess.Popen(list(map(str, command)), env=environment, **streams) as process:
        os.close(slave)
        written = b""
        with contextlib.suppress(OSError):  # the last writer has gone
            while chunk := os.read(master, 2**16):
                written += chunk
        os.close(master)
        status = process.wait(timeout)
    return status, written.decode(errors="replace")


def screen(written):
    """The lines that a person sees in the end, styles aside."""
    lines, column = [""], 0
    for piece in re.split(r"(\r|\n)", re.sub(r"\x1b\[\d*m", "", written)):
        if piece == "\n":
            lines.append("")
        elif piece == "\r":
            column = 0
        else:
            line = lines[-1].ljust(column)
            lines[-1] = line[:column] + piece + line[column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines]


def transient(written):
    """All that ever stood on the transient line, in order."""
    return [text.rstrip() for text in re.findall(r"\r([^\r\n\x1b]+)\r", written) if text.strip()]
