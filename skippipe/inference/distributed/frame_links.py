"""Connections between the processes that serve a model: frames of JSON and tensors, encrypted and authenticated.

Training proves the size of every message beforehand and ends when a peer goes, which is what gloo is made for. Here
lengths follow the text, and the others go on without a peer that was lost. They are too large for the members' links,
where heartbeats would wait behind them; who is lost is known from those links alone.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import zmq
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from skippipe.membership.epoch import Member
from skippipe.membership.keys import RunKeys, bind_port, parts_of, zmq_address
from skippipe.runtime.ranks import time_limits


class Frame(NamedTuple):
    """One message."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


class FrameLinks:
    """The connections of one process. One thread uses them; `wake` may be called from any.

    Frames to one process arrive in order. Where a connection breaks and stands again, as behind a router that forgets
    idle ones, the last frame is sent again: it may arrive twice.
    """

    def __init__(self, keys: RunKeys, silence_s: float) -> None:
        """Bind a port, `port`. After `silence_s` in which sent data is not received, a connection is made anew."""
        self._keys = keys
        self._silence_ms = round(silence_s * 1000)
        self._context = zmq.Context()
        self._router = keys.socket(self._context, zmq.ROUTER, server=True)
        self.port = bind_port(self._router)
        self._ways: dict[str, _Way] = {}
        self._wake_up = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_up, zmq.POLLIN)

    def send(self, member: Member, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Send a frame to a member's data port; waits for nothing, and one that is lost gets it never."""
        if member.name not in self._ways:
            self._ways[member.name] = way = _Way(self._dealer(member))
            self._poller.register(way.monitor, zmq.POLLIN)
        content = save({name: tensor.cpu().contiguous() for name, tensor in (tensors or {}).items()})
        self._ways[member.name].send(parts_of(json.dumps(header).encode() + b"\n" + content))

    def receive(self, limit_s: float | None = None) -> Frame | None:
        """Return the next frame; None if none came in time, or something else has happened."""
        ready = dict(self._poller.poll(None if limit_s is None else round(limit_s * 1000)))
        if self._wake_up in ready:
            os.eventfd_read(self._wake_up)
        for way in self._ways.values():
            if way.monitor in ready:
                way.repair()
        if self._router not in ready:
            return None
        _, *parts = self._router.recv_multipart()
        header, _, content = b"".join(parts).partition(b"\n")
        try:
            return Frame(dict(json.loads(header)), load(content))
        except (ValueError, TypeError, SafetensorError):
            return None  # a member of another version, at most: strangers have no connection

    def wake(self) -> None:
        """End a wait for a frame."""
        os.eventfd_write(self._wake_up, 1)

    def drop(self, name: str) -> None:
        """Close the connection to a member; what is not sent yet is lost."""
        if name in self._ways:
            way = self._ways.pop(name)
            self._poller.unregister(way.monitor)
            way.close()

    def close(self) -> None:
        """Close all connections."""
        for name in list(self._ways):
            self.drop(name)
        self._router.close()
        self._context.term()
        os.close(self._wake_up)

    def _dealer(self, member: Member) -> "zmq.Socket[bytes]":
        dealer = self._keys.socket(self._context, zmq.DEALER, server=False)
        # Not ZeroMQ's heartbeats: they would wait behind a large frame on a slow link, and end it.
        dealer.setsockopt(zmq.TCP_KEEPALIVE, 1)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_IDLE, time_limits.KEEP_ALIVE_IDLE_S)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_INTVL, time_limits.KEEP_ALIVE_INTERVAL_S)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_CNT, time_limits.KEEP_ALIVE_PROBES)
        dealer.setsockopt(zmq.TCP_MAXRT, self._silence_ms)
        dealer.connect(zmq_address(member.host, member.data_port))
        return dealer


class _Way:
    """The connection to one member."""

    def __init__(self, dealer: "zmq.Socket[bytes]") -> None:
        self._dealer = dealer
        self._last: Sequence[memoryview] = ()
        self.monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def send(self, parts: Sequence[memoryview]) -> None:
        self._last = parts
        with contextlib.suppress(zmq.Again):  # the queue may be full, as to one that is frozen
            self._dealer.send_multipart(parts, flags=zmq.DONTWAIT)

    def repair(self) -> None:
        """Send the last frame again: it may have been under way when the connection broke."""
        while self.monitor.poll(0):
            self.monitor.recv_multipart()
        self.send(self._last)

    def close(self) -> None:
        self._dealer.disable_monitor()
        self.monitor.close(linger=0)
        self._dealer.close(linger=0)
