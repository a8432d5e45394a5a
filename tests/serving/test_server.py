"""OpenAI's own client talks to the server on loopback: answers, streams, two hundred at once, limits, refusals."""

import asyncio
import contextlib
import http.client
import json
import threading
import time

import openai
import pytest
import uvicorn

from ssm_lm.cli import main
from ssm_lm.serving.engine import Engine
from ssm_lm.serving.protocol import Limits, Refused, read_request
from ssm_lm.serving.serve import listen
from ssm_lm.serving.server import LOOPBACK, Service


@contextlib.contextmanager
def served(model, tokenizer, rows=16, queue=256, limits=Limits(), token=None, hosts=LOOPBACK):  # noqa: B008
    """(service, port) of a server in a thread."""
    service = Service(Engine(model, tokenizer, rows, queue), tokenizer, "tiny", limits=limits, token=token)
    config = uvicorn.Config(service.app(hosts), log_level="warning", timeout_graceful_shutdown=1)
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield service, listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def client_of(port, key="none", kind=openai.OpenAI, **options):
    return kind(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, **options)


def call(port, method, path, body=None, head=None):
    """(status, JSON or None) of a plain request."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, head or {})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else None


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with served(model, tokenizer) as found:
        yield found


@pytest.fixture
def client(server):
    with client_of(server[1]) as found:
        yield found


def greedy(model, tokenizer, text, tokens):
    import torch

    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(found[0, ids.shape[1] :])


def test_completions(client, model, tokenizer):
    answer = client.completions.create(model="tiny", prompt="the cat", max_tokens=10, temperature=0)
    assert answer.choices[0].text == greedy(model, tokenizer, "the cat", 10)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens == len(tokenizer("the cat")["input_ids"])
    several = client.completions.create(
        model="tiny", prompt=["the cat", "the dog"], max_tokens=5, n=2, seed=1, logprobs=None, user="me"
    )
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    ids = tokenizer("the dog")["input_ids"]
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=5, seed=3).choices[0].text == texts[2 + 1 - 1]
    assert [entry.id for entry in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ssm_lm"


def test_a_stream_is_the_answer_in_parts(client, model, tokenizer):
    wanted = {"model": "tiny", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.completions.create(prompt="the cat", max_tokens=12, **wanted))
    assert "".join(part.choices[0].text for part in parts[:-1]) == greedy(model, tokenizer, "the cat", 12)
    assert len(parts) > 3
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage.completion_tokens == 12
    messages = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    parts = list(client.chat.completions.create(messages=messages, max_tokens=12, **wanted))
    whole = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=12, temperature=0)
    assert parts[0].choices[0].delta.role == "assistant"
    said = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
    assert (
        said == whole.choices[0].message.content == greedy(model, tokenizer, "User: the cat\nAssistant:", 12).lstrip()
    )


def test_a_conversation_is_not_read_again(server, client):
    messages, read = [], []
    for turn in range(6):
        messages.append({"role": "user", "content": "the cat sat on the mat"})
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, seed=turn)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        read.append(answer.usage.prompt_tokens - answer.usage.prompt_tokens_details.cached_tokens)
    assert max(read[1:]) <= min(read[1:]) + 3, read
    assert answer.usage.prompt_tokens > 3 * max(read)


def test_two_hundred_at_once(server, model, tokenizer, monkeypatch):
    engine = server[0].engine
    before, most, step, come = engine.written, 0, engine.step, False

    def step_when_all_have_come():  # on a busy machine the first would be done before the last
        nonlocal most, come
        if not come:
            until(lambda: len(engine.waiting) == 200)
        come = True
        step()
        most = max(most, len(engine.rows))

    monkeypatch.setattr(engine, "step", step_when_all_have_come)

    async def ask(client, number):
        prompt = f"the {'cat dog mat'.split()[number % 3]} {number}"
        create = client.completions.create
        if number % 2:
            answer = await create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
            return prompt, answer.choices[0].text
        stream = await create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, stream=True)
        return prompt, "".join([part.choices[0].text async for part in stream])

    async def all_of_them():
        async with client_of(server[1], kind=openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(200)))

    answers = asyncio.run(all_of_them())
    assert len(answers) == 200
    assert most == 16
    assert engine.written - before == 200 * 8
    for prompt, text in answers[::9]:
        assert text == greedy(model, tokenizer, prompt, 8)


def test_whoever_leaves_is_not_waited_for(server):
    engine = server[0].engine
    body = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 1000})
    for stream in (True, False):
        body = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 1000, "stream": stream})
        connection = http.client.HTTPConnection("127.0.0.1", server[1])
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: engine.rows)
        written = engine.written
        connection.sock.close()
        connection.close()
        until(lambda: engine.is_idle)
        assert engine.written - written < 900


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_limits_of_length_queue_and_time(build, tokenizer):
    model = build(ssm="s4d", arch="s4-ffn")
    limits = Limits(prompt_tokens=20, new_tokens=100_000, seconds=600)
    with served(model, tokenizer, rows=1, queue=1, limits=limits) as (service, port), client_of(port) as client:
        with pytest.raises(openai.BadRequestError, match="at most 20"):
            client.completions.create(model="tiny", prompt="cat dog " * 20)
        with pytest.raises(openai.BadRequestError, match="at most 100000"):
            client.completions.create(model="tiny", prompt="cat", max_tokens=100_001)
        with pytest.raises(openai.APIStatusError, match="more than 1,280 bytes"):
            client.completions.create(model="tiny", prompt="cat " * 1000)
        service.limits = limits._replace(seconds=0.05)
        answer = client.completions.create(model="tiny", prompt="cat", max_tokens=100_000)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens < 100_000
        service.limits = limits
        endless = {"model": "tiny", "prompt": "cat", "max_tokens": 100_000, "stream": True}
        with client.completions.create(**endless), client.completions.create(**endless):
            until(lambda: service.engine.rows and service.engine.waiting)
            with pytest.raises(openai.InternalServerError, match="too many requests"):
                client.completions.create(model="tiny", prompt="cat")
        until(lambda: service.engine.is_idle)


def test_the_token_and_the_name_of_the_host(model, tokenizer):
    with served(model, tokenizer, token="sesame", hosts=("*",)) as (_, port):
        for key in ("none", "sesam", "sésame"):
            head = {"Authorization": f"Bearer {key}"}
            assert call(port, "GET", "/v1/models", head=head)[0] == 401
        assert call(port, "GET", "/health")[1]["status"] == "ok"
        with client_of(port, "sesame") as client:
            assert [entry.id for entry in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ({"Host": "evil.example"}, b"{}", 400),
        ({"Content-Type": "text/plain"}, b"{}", 415),  # what a page of another site may send unasked
        ({}, b"{", 400),
        ({}, b"[" * 500, 400),
        ({}, b"[]", 400),
        ({}, json.dumps({"model": "other", "prompt": "x"}).encode(), 404),
        ({}, json.dumps({"model": "tiny", "prompt": [999_999]}).encode(), 400),
    ],
)
def test_what_is_refused(server, head, body, status):
    head = {"Content-Type": "application/json"} | head
    found, answer = call(server[1], "POST", "/v1/completions", body, head)
    assert found == status
    assert "Host" in head or answer["error"]["message"]


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"tools": [{}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_what_a_request_has_wrong_is_named(values, param):
    good = {"messages": [{"role": "user", "content": "x"}], "presence_penalty": 0, "tools": [], "seed": 1, "stop": "x"}
    assert read_request(good, True, Limits()).stops == ("x",)
    with pytest.raises(Refused, match=f"^{param}") as refused:
        read_request(good | values, True, Limits())
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--token-file", "missing"], "--token-file missing"),
        (["--port", "70000"], "--port 70000"),
        (["--max-rows", "0"], "--max-rows 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--state-memory", "1GB"], "--state-memory 1GB"),
        ([], "model"),
    ],
)
def test_mistakes_of_the_verb_are_one_line(arguments, named, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SSM_LM_TOKEN", raising=False)
    assert main(["serve", str(tmp_path / "model"), *arguments]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
