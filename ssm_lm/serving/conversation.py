"""Messages as the tokens of one text, which a reply goes on from.

    [system text]
    User: what the user says
    Assistant: what the model says

A language model that was trained on plain text goes on with the next turn by itself: where it would speak for the
user, the reply ends. Other words than User: and Assistant: are the caller's to choose. A template of the tokenizer's is
a program that came with the model, and is not run.
"""

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Words:
    """What stands before what the user says, and before a reply."""

    user: str = "User:"
    reply: str = "Assistant:"

    @property
    def stops(self) -> tuple[str, ...]:
        """Where a reply is over."""
        return (f"\n{self.user}", f"\n{self.reply}")


class Conversations:
    """Turns messages into tokens, each message by itself, so that a longer conversation begins with the tokens of a
    shorter one. A reply keeps the tokens that the model chose for it, which may be others than those of its text.
    """

    most_replies = 10_000

    def __init__(self, tokenizer, words: Words = Words()):
        self.words = words
        self.replies: OrderedDict[bytes, list[int]] = OrderedDict()
        # the text before grows with every turn, and each turn reads it again
        self.encode = lru_cache(maxsize=10_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )

    def ids(self, messages: list[tuple[str, str]]) -> list[int]:
        """The tokens of (role, text) messages, up to where the assistant is to speak."""
        ids: list[int] = []
        for role, text in messages:
            line = "\n" if ids else ""
            if role == "assistant":
                ids += self.encode(line + self.words.reply)
                ids += self.replies.get(_key(ids, text)) or self.encode(f" {text.strip()}" if text.strip() else "")
            else:
                before = f"{self.words.user} " if role == "user" else ""
                ids += self.encode(f"{line}{before}{text.strip()}")
        return [*ids, *self.encode(("\n" if ids else "") + self.words.reply)]

    def remember(self, prompt: list[int], text: str, reply: list[int]) -> None:
        """`reply` stands for `text`, where it comes after `prompt`, which `ids` has made."""
        self.replies[_key(prompt, text)] = reply
        if len(self.replies) > self.most_replies:
            self.replies.popitem(last=False)


def _key(ids: list[int], text: str) -> bytes:
    hashed = hashlib.blake2b(array("q", ids).tobytes(), digest_size=16)
    hashed.update(text.encode("utf-8", "surrogatepass"))
    return hashed.digest()


class Reply:
    """Without the white space before its first word."""

    def __init__(self):
        self.text = ""

    def add(self, piece: str) -> str:
        """What of the piece is part of the reply."""
        piece = piece if self.text else piece.lstrip()
        self.text += piece
        return piece
