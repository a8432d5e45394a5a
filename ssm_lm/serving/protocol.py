"""OpenAI's protocol of completions and chat completions: what a request may ask for, and the objects of an answer.

https://platform.openai.com/docs/api-reference. What is not offered is refused by its name, unless it asks for nothing;
keys that no version of the protocol needs an answer to (`user`, `metadata`, ...) are passed over.
"""

import math
import time
import uuid
from dataclasses import dataclass
from typing import NamedTuple

from .conversation import ROLES

# what is not offered -> the values that ask for nothing
NOT_OFFERED = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
MOST_STOPS, MOST_CHOICES = 4, 16


class Refused(Exception):
    """A request that gets no answer: HTTP status, one line, and which key it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Limits(NamedTuple):
    """Tokens of a prompt and of an answer, and seconds from a request to the end of its answer."""

    prompt_tokens: int = 16384
    new_tokens: int = 1024
    seconds: float = 120.0


@dataclass(frozen=True)
class Wanted:
    """What a request asks for. prompts: texts or lists of ids, of completions; messages: (role, text), of a chat."""

    prompts: list[str | list[int]]
    messages: list[tuple[str, str]]
    max_new_tokens: int
    temperature: float
    top_p: float
    n: int
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_request(body, chat: bool, limits: Limits) -> Wanted:
    """Refused, with status 400 and the key, for whatever a request has wrong."""
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    for key, nothing in NOT_OFFERED.items():
        if body.get(key) is not None and body[key] not in nothing:
            raise Refused(400, f"{key}: is not offered here; leave it out", key)
    keys = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    key = next((key for key in keys if body.get(key) is not None), keys[-1])
    most = _whole(body, key, limits.new_tokens if chat else min(16, limits.new_tokens), 1)
    if most > limits.new_tokens:
        raise Refused(400, f"{key}: is {most}, and this server writes at most {limits.new_tokens}", key)
    stream = _boolean(body, "stream")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refused(400, "stream_options: must be an object", "stream_options")
    return Wanted(
        prompts=[] if chat else _prompts(body.get("prompt")),
        messages=_messages(body.get("messages")) if chat else [],
        max_new_tokens=most,
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 0, 1),
        n=_whole(body, "n", 1, 1, MOST_CHOICES),
        seed=_whole(body, "seed", None, -(2**63), 2**63),
        stops=_stops(body.get("stop")),
        stream=stream,
        include_usage=stream and _boolean(options, "include_usage"),
    )


def _number(body: dict, key: str, default: float, least: float, most: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise Refused(400, f"{key}: must be a number from {least} to {most}", key)
    return float(value)


def _whole(body: dict, key: str, default: int | None, least: int, most: float = math.inf) -> int | None:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        upper = "" if most == math.inf else f" to {most}"
        raise Refused(400, f"{key}: must be a whole number from {least}{upper or ' on'}", key)
    return value


def _boolean(body: dict, key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{key}: must be true or false", key)
    return bool(value)


def _stops(value) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise Refused(400, f"stop: must be a text or a list of at most {MOST_STOPS}, none of them empty", "stop")
    return tuple(stops)


def _prompts(value) -> list[str | list[int]]:
    def is_ids(prompt):
        return isinstance(prompt, list) and all(type(token) is int for token in prompt)

    prompts = [""] if value is None else [value] if isinstance(value, str) or (value and is_ids(value)) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or is_ids(p) for p in prompts):
        raise Refused(400, "prompt: must be a text, a list of texts, of token ids, or of lists of token ids", "prompt")
    return prompts


def _messages(value) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise Refused(400, "messages: must be a list of one message or more", "messages")
    found = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(400, f"{where}: must have a role, one of {', '.join(ROLES)}", "messages")
        content = message.get("content")
        if isinstance(content, list):  # of parts
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join(texts) if len(texts) == len(content) and all(isinstance(t, str) for t in texts) else None
        if not isinstance(content, str):
            raise Refused(400, f"{where}: content must be a text, or a list of parts of type text", "messages")
        found.append((message["role"], content))
    return found


class Answers:
    """The objects of one answer."""

    def __init__(self, model: str, chat: bool):
        self.model, self.chat, self.created = model, chat, int(time.time())
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, texts: list[str], reasons: list[str], usage: dict) -> dict:
        """Of all choices at once."""
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return self._object("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage}

    def part(self, index: int, text: str | None, reason: str | None = None, first: bool = False) -> dict:
        """Of a stream: some more of one choice, or its end."""
        delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
        said = {"delta": delta} if self.chat else {"text": text or ""}
        return self._of_stream([{"index": index, **said, "logprobs": None, "finish_reason": reason}])

    def usage(self, usage: dict) -> dict:
        """Of a stream: its last object, where it was asked for."""
        return self._of_stream([]) | {"usage": usage}

    def _of_stream(self, choices: list) -> dict:
        return self._object("chat.completion.chunk" if self.chat else "text_completion", choices)

    def _object(self, kind: str, choices: list) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict:
    """cached_tokens: of the prompts, those that were not read again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
