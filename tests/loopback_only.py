"""Runs a command after the loopback device is up: `unshare --net python loopback_only.py COMMAND …`. Needs no `ip`."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys

SIOCSIFFLAGS = 0x8914
IFF_UP, IFF_RUNNING = 0x1, 0x40

if __name__ == "__main__":
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        sys.exit("this is not a network namespace with loopback alone")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING))
    os.execvp(sys.argv[1], sys.argv[1:])
