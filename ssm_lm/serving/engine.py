"""Many texts continued at once by one model: rows join and leave the batch between two tokens.

    submit -> waiting -> a prompt is read, some tokens at a time, from the longest beginning that is known
           -> a row of the batch, a token a step -> Finished

A prompt is read but for its last token, which is the row's first: what `Prefixes` keeps of it serves the same prompt
again, and any that goes on from there.
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..modeling.native_step import programs_of
from .prefixes import Prefixes
from .sampling import Draw, choose
from .states import Batch, StateRoom, States, put, take
from .text import GrowingText

READ_AT_ONCE = 512  # tokens of prompts between two steps of the others
AS_DEAR_AS = 64  # a prompt of fewer tokens takes about the time of so many


class Full(Exception):
    """As many texts wait as may."""


class Piece(NamedTuple):
    """Some more of a text."""

    text: str


class Finished(NamedTuple):
    """The end of a text. reason: "stop", by the model or a stop string; "length", by `max_new_tokens` or the time
    limit; "cancelled"; "queue", it waited too long; or "error", the model's output is no number.

    ids: those that stand for the text in a prompt that goes on from it. read, written: tokens that went through the
    model for this text's prompt, and tokens that it has.
    """

    reason: str
    ids: list[int]
    read: int
    written: int


@dataclass(eq=False)
class Request:
    """A text to be continued. ids: at least one. deadline: of time.monotonic(). receive: is called with every event, in
    the thread of the engine.
    """

    ids: list[int]
    max_new_tokens: int
    draw: Draw
    receive: Callable[[Piece | Finished], None]
    stops: tuple[str, ...] = ()
    deadline: float = float("inf")
    cancelled: bool = False
    read: int = field(default=0, init=False)

    def is_over(self) -> bool:
        return self.cancelled or time.monotonic() > self.deadline


class _Row:
    """A text in the batch. token: to go through the model next. fed: the tokens that have."""

    def __init__(self, request: Request, tokenizer):
        self.request = request
        self.text = GrowingText(tokenizer, request.ids, request.stops)
        self.token, self.fed = request.ids[-1], request.ids[:-1]
        self.written: list[int] = []
        # before the first of the tokens that may be part of a stop: (tokens fed, characters of text, states)
        self.safe: tuple[int, int, States] | None = None


class Engine:
    """Works in the thread that calls `step`. `submit` may be called from any.

    rows: of the batch, at most. queue: texts that may wait for one. state_bytes: for the states of prompts and texts
    that may go on. read, written, kept: tokens so far: read by the model as prompts, written, and spared by a known
    beginning.
    """

    def __init__(self, model, tokenizer, rows: int = 32, queue: int = 256, state_bytes: int = 1 << 30):
        self.model, self.queue = model, queue
        self.tokenizer = copy.deepcopy(tokenizer)  # two threads in one disturb each other
        ends = model.generation_config.eos_token_id
        self.ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        self.room = StateRoom(model)
        self.reading_cache = self.room.cache(1)
        self.prefixes = Prefixes(state_bytes)
        self.waiting: deque[Request] = deque()
        self.lock = threading.Lock()  # of `waiting`
        self.reading: tuple[Request, int] | None = None  # and how many of its tokens are in the cache
        self.read = self.written = self.kept = 0
        self.batch, self.rows = Batch(self.room, rows), []

    def submit(self, request: Request) -> None:
        """Full where too many wait; those for whom a row is free, and which the next step takes, are not among them."""
        with self.lock:
            free = self.batch.most - len(self.rows) - (self.reading is not None)
            if len(self.waiting) >= self.queue + free:
                raise Full
            self.waiting.append(request)

    @property
    def is_idle(self) -> bool:
        return not (self.rows or self.waiting or self.reading)

    def run(self, request: Request) -> None:
        """Submit a request and work until nothing is left."""
        self.submit(request)
        with self.unchanged():
            while not self.is_idle:
                self.step()

    def unchanged(self):
        """Within it the model is not looked at before every step: nobody changes it."""
        return programs_of(self.model.base_model).unchanged()

    @torch.inference_mode()
    def step(self) -> None:
        """Read some tokens of prompts, then write one of every row."""
        with self.lock:
            over = [request for request in self.waiting if request.is_over()]
            for request in over:
                self.waiting.remove(request)
        if self.reading and self.reading[0].is_over():
            over.append(self.reading[0])
            self.reading = None
        for request in over:
            self._finish(request, "cancelled" if request.cancelled else "queue")
        self._read()
        for number in reversed(range(len(self.rows))):
            request = self.rows[number].request
            if request.is_over():
                self._end(number, "cancelled" if request.cancelled else "length")
        if self.rows:
            self._decode()

    def fail(self) -> None:
        """End all that is in work, after an error that nothing was prepared for."""
        requests = [row.request for row in self.rows] + ([self.reading[0]] if self.reading else [])
        with self.lock:
            requests += self.waiting
            self.waiting.clear()
        self.reading = None
        self.batch, self.rows = Batch(self.room, self.batch.most), []
        for request in requests:
            self._finish(request, "error")

    # ---- reading

    def _read(self) -> None:
        """Prompts, or a part of one."""
        budget = READ_AT_ONCE
        while budget > 0 and len(self.rows) < self.batch.most and (self.reading or self._begin_reading()):
            budget -= max(self._read_on(), AS_DEAR_AS)

    def _begin_reading(self) -> bool:
        """From the longest beginning of the next prompt that is known; whether there is one."""
        with self.lock:
            request = self.waiting.popleft() if self.waiting else None
        if request is None:
            return False
        known, states = self.prefixes.longest(request.ids)
        put(self.reading_cache, 0, self.room.zero if states is None else states)
        self.kept += known
        self.reading = request, known
        return True

    def _read_on(self) -> int:
        """Read some tokens of a prompt, and with the last of them let it be a row; how many."""
        request, done = self.reading
        part = request.ids[done : len(request.ids) - 1][:READ_AT_ONCE]
        if part:
            ids = torch.tensor([part], device=self.model.device)
            self.model.base_model(input_ids=ids, past_key_values=self.reading_cache, use_cache=True)
            request.read += len(part)
            self.read += len(part)
        done += len(part)
        self.reading = request, done
        if done == len(request.ids) - 1:
            self.reading = None
            states = take(self.reading_cache, 0)
            self.prefixes.keep(request.ids[:-1], states)
            self.batch.join(states)
            self.rows.append(_Row(request, self.tokenizer))
        return len(part)

    # ---- writing

    def _decode(self) -> None:
        tokens = [row.token for row in self.rows]
        tokens += [0] * (self.batch.capacity - len(tokens))
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        logits = self.model(input_ids=ids, past_key_values=self.batch.cache, use_cache=True).logits
        found = choose(logits[: len(self.rows), -1], [row.request.draw for row in self.rows])
        for row in self.rows:
            row.fed.append(row.token)
            if not row.written:
                row.request.read += 1  # the last token of the prompt
                self.read += 1
        for number in reversed(range(len(self.rows))):  # a row that leaves has the last one take its place
            self._take_token(number, found[number])

    def _take_token(self, number: int, token: int | None) -> None:
        row = self.rows[number]
        if token is None:
            return self._end(number, "error")
        if token in self.ends:
            return self._end(number, "stop")
        said_before = len(row.text.text)
        if piece := row.text.add(token):
            row.request.receive(Piece(piece))
        row.token = token
        row.written.append(token)
        self.written += 1
        if row.text.at_rest and not row.text.stopped:
            row.safe = None
        elif row.safe is None and row.request.stops:
            row.safe = len(row.fed), said_before, self.batch.take(number)
        if row.text.stopped:
            return self._end(number, "stop")
        if len(row.written) >= row.request.max_new_tokens:
            return self._end(number, "length")
        return None

    def _end(self, number: int, reason: str) -> None:
        """A row ends. What may go on from its text is kept."""
        row = self.rows[number]
        if not row.text.stopped and (piece := row.text.rest()):
            row.request.receive(Piece(piece))
        prompt = len(row.request.ids)
        if row.text.stopped:
            fed, characters, states = row.safe
            rest = self.tokenizer(row.text.text[characters:], add_special_tokens=False)["input_ids"]
            ids = row.fed[prompt:fed] + rest
            self.prefixes.keep(row.fed[:fed], states)
        else:
            ids = row.written
            if reason != "error":
                self.prefixes.keep(row.fed, self.batch.take(number))
        self.batch.leave(number)
        last = self.rows.pop()
        if number < len(self.rows):
            self.rows[number] = last
        self._finish(row.request, reason, ids, len(row.written))

    def _finish(self, request: Request, reason: str, ids: list[int] | None = None, written: int = 0) -> None:
        request.receive(Finished(reason, ids or [], request.read, written))
