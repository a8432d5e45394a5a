"""Text as its tokens come: whole characters alone, and nothing that may turn out to be where the text is to stop."""

CONTEXT = 4  # tokens before, for a tokenizer whose words begin with a space or not, by what stands before them


class GrowingText:
    """The text of tokens that follow others.

    add(token) returns what can be said by now. `stopped`: a string of `stops` has come, and the text ends before it.
    `at_rest`: nothing is held back.
    """

    def __init__(self, tokenizer, before: list[int], stops: tuple[str, ...] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = before[-CONTEXT:]
        self.start, self.read = 0, len(self.ids)  # of the ids: the text of those before `read` is known
        self.text, self.said = "", 0
        self.stopped = False

    @property
    def at_rest(self) -> bool:
        return self.said == len(self.text) and self.read == len(self.ids)

    def add(self, token: int) -> str:
        """What is new and certain."""
        self.ids.append(token)
        known = self.tokenizer.decode(self.ids[self.start : self.read])
        now = self.tokenizer.decode(self.ids[self.start :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and len(self.ids) - self.read < 4:  # bytes of one to come
            return ""
        self.text += now[len(known) :]
        self.start, self.read = self.read, len(self.ids)
        found = [at for stop in self.stops if (at := self.text.find(stop, self.said)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self._say(len(self.text))
        return self._say(len(self.text) - self._held())

    def rest(self) -> str:
        """What was held back, when no token is to come."""
        if self.read < len(self.ids):
            known = self.tokenizer.decode(self.ids[self.start : self.read])
            self.text += self.tokenizer.decode(self.ids[self.start :])[len(known) :]
            self.read = len(self.ids)
        return self._say(len(self.text))

    def _say(self, end: int) -> str:
        said, self.said = self.text[self.said : end], max(self.said, end)
        return said

    def _held(self) -> int:
        """Characters at the end that may begin a stop."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(longest, len(self.text) - self.said), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stops):
                return length
        return 0
