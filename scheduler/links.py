"""The core process's end of the ZeroMQ links: who is there, who has gone, frames to messages. No decisions."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from scheduler import plausible
from scheduler.curve import CoreKeys
from scheduler.errors import StartError
from wire import Message, Probe, WireError, decode, encode

log = logging.getLogger(__name__)

_HEARTBEAT_MS = 2_000  # a peer whose machine or network is gone is dropped after at most twice this
_MOST_BYTES = 256 << 20  # of one frame; a peer that sends a larger one is cut off
_MOST_LINES = 20  # about malformed messages of one peer; after that they are dropped in silence
NOBODY = 0  # a number that no peer has
_PROBE = encode(Probe())


@dataclass(frozen=True, slots=True)
class Peer:
    """One connection; `number` counts up and is never used again."""

    number: int
    identity: bytes


class PeerSocket:
    """A bound ROUTER socket that knows its peers, and notices at once when one's connection closes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: CoreKeys | None = None) -> None:
        """keys: for tcp://. A socket in the file system is for this user only."""
        assert endpoint.startswith("ipc://") or keys is not None, "a link that leaves this machine is encrypted"
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that is gone raises
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the core: two plans a worker, max_tokens a request
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        if keys is not None:
            keys.set(self.socket)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise StartError(f"{endpoint}: {error.strerror}") from None
        if endpoint.startswith("ipc://"):
            os.chmod(endpoint.removeprefix("ipc://"), 0o600)
        self._malformed: dict[int, int] = {}  # by the peer's number
        self.peers: dict[bytes, Peer] = {}
        self._next_number = NOBODY + 1

    def receive(self) -> list[tuple[Peer, Message | None]]:
        """All messages that have arrived; None for a malformed one, which is logged and dropped."""
        messages: list[tuple[Peer, Message | None]] = []
        while True:
            try:
                identity, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            if identity not in self.peers:
                self.peers[identity] = Peer(self._next_number, identity)
                self._next_number += 1
            try:
                message = decode(frames)
                plausible.check(message)
                messages.append((self.peers[identity], message))
            except WireError as error:
                self._note_malformed(self.peers[identity], error)
                messages.append((self.peers[identity], None))

    def _note_malformed(self, peer: Peer, error: WireError) -> None:
        count = self._malformed[peer.number] = self._malformed.get(peer.number, 0) + 1
        if count <= _MOST_LINES:
            more = "; no more is said of this peer's" if count == _MOST_LINES else ""
            log.warning("dropped a message from peer %d: %.200s%s", peer.number, error, more)

    def send(self, peer: Peer, message: Message) -> None:
        """Sends, or does nothing when the peer is gone: `lost` tells of that."""
        try:
            self.socket.send_multipart([peer.identity, *encode(message)], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise

    def lost(self) -> list[Peer]:
        """After the monitor became readable: the peers that are gone."""
        while self.monitor.poll(0):
            recv_monitor_message(self.monitor)
        gone = [peer for peer in self.peers.values() if not self._reachable(peer)]
        for peer in gone:
            del self.peers[peer.identity]
            self._malformed.pop(peer.number, None)
        return gone

    def _reachable(self, peer: Peer) -> bool:
        try:
            self.socket.send_multipart([peer.identity, *_PROBE], zmq.NOBLOCK)
        except zmq.Again:
            return True  # its queue is full: slow, not gone
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def close(self, linger_ms: int) -> None:
        """What was sent gets so long to leave; the context can be terminated afterwards."""
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=linger_ms)
