"""A conversation costs its own turns' tokens, in the fiftieth turn as in the second."""

import io
import sys

import pytest

from ssm_lm.cli import main
from ssm_lm.serving.chat import Chat
from ssm_lm.serving.conversation import Conversations, Words
from ssm_lm.serving.sampling import Draw


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_messages_become_one_text_each_longer_one_beginning_as_the_shorter(tokenizer):
    conversations = Conversations(tokenizer)
    messages = [("system", "Be short."), ("user", "hello "), ("assistant", "hi"), ("user", "the cat")]
    ids = conversations.ids(messages)
    assert tokenizer.decode(ids) == "Be short.\nUser: hello\nAssistant: hi\nUser: the cat\nAssistant:"
    shorter = conversations.ids(messages[:2])
    assert ids[: len(shorter)] == shorter
    conversations.remember(shorter, "hi", [1, 2, 3])  # as the model wrote it
    assert conversations.ids(messages)[len(shorter) :][:3] == [1, 2, 3]
    other = conversations.ids([("user", "hello"), *messages[2:]])
    assert [1, 2, 3] != other[len(conversations.ids([("user", "hello")])) :][:3]  # after another prompt it is not known
    assert Words("Q:", "A:").stops == ("\nQ:", "\nA:")


def test_the_fiftieth_turn_reads_as_many_tokens_as_the_second(build, tokenizer):
    chat = Chat(build(ssm="s4", arch=["h3", "gated", "swiglu"]), tokenizer)
    turns = [chat.turn("the cat sat on the mat", 12, Draw(1.0, 1.0, seed), lambda piece: None) for seed in range(50)]
    own = len(tokenizer("\nUser: the cat sat on the mat")["input_ids"]) + len(tokenizer("\nAssistant:")["input_ids"])
    # a turn's own tokens, and the one that the model wrote last: it had not gone through it
    assert all(own <= turn.read <= own + 3 for turn in turns[1:]), [turn.read for turn in turns]
    assert len(chat.conversations.ids(chat.messages)) > 40 * own
    # what a step costs does not grow either: the states of one row
    assert chat.engine.batch.capacity == 1


def test_a_conversation_in_turns_is_the_text_in_one(model, tokenizer):
    chat = Chat(model, tokenizer, system="Be short.")
    for said in ("the cat", "the dog"):
        ended = chat.turn(said, 6, Draw(0), lambda piece: None)
    again = Chat(model, tokenizer, system="Be short.")
    again.messages = chat.messages[:-1]
    again.conversations = chat.conversations
    prompt = again.conversations.ids(again.messages)
    again.messages.pop()
    once = again.turn("the dog", 6, Draw(0), lambda piece: None)
    assert once.ids == ended.ids
    assert once.read == len(prompt) > ended.read


def say(monkeypatch, capsys, text, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    capsys.readouterr()
    code = main(["chat", *arguments])
    return code, capsys.readouterr()


def test_the_verb_answers_line_by_line(folder, monkeypatch, capsys):
    options = (folder, "--device", "cpu", "--max-new-tokens", "5", "--seed", "1", "--stats")
    code, said = say(monkeypatch, capsys, "the cat\nthe dog\n\nthe cat\n", *options)
    assert code == 0
    stats = said.err.splitlines()
    assert len(stats) == 3
    read = [int(line.split()[0][1:]) for line in stats]
    assert read[1] < read[0] + 3
    assert "5 written" in stats[0]
    assert read[2] == 1  # an empty line begins anew, and what was said first is known


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--user-prefix", " "], "--user-prefix"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, arguments, named):
    code, said = say(monkeypatch, capsys, "", folder, *arguments)
    assert code == 2
    assert named in said.err
    assert said.err.count("\n") == 1
