"""``jllama serve`` as a process of its own: the ready line, the official client, signals."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from process import KEY, Process
from serving import demo, wait_for

from jllama.cli import serve


@pytest.fixture
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(tmp_path_factory.getbasetemp() / "xla")
    yield made
    made.kill()


def test_the_official_client_and_a_drain(process: Process, capsys: pytest.CaptureFixture[str]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{process.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo"]
    made = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=8, temperature=0)
    assert made.choices[0].text == demo().generate("Once upon a time", max_new_tokens=8).text
    question = [{"role": "user", "content": "Who are you?"}]
    whole = client.chat.completions.create(model="demo", messages=question, max_tokens=12, temperature=0)
    options = {"include_usage": True}
    how = dict(max_tokens=12, temperature=0, stream=True, stream_options=options, extra_body={"top_k": 5})
    chunks = list(client.chat.completions.create(model="demo", messages=question, **how))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=question, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="x")

    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    assert 'api_key="none"' in code
    code = code.replace("http://127.0.0.1:8000", process.url).replace('"none"', repr(KEY))
    code = code.replace("max_tokens=60", "max_tokens=60, seed=1")  # some other answers are empty
    exec(code, {})
    assert len(capsys.readouterr().out) > 20

    body = {"prompt": "Once", "max_tokens": 300, "temperature": 0, "stream": True, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.stream("POST", f"{process.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        events = answer.iter_lines()
        next(events)
        process.process.send_signal(signal.SIGTERM)
        while httpx2.get(f"{process.url}/health").status_code == 200:
            time.sleep(0.01)
        late = httpx2.post(f"{process.url}/v1/completions", json=body, headers=headers)
        assert late.status_code == 503
        assert [line for line in events if line][-1] == "data: [DONE]"
    assert process.end() == 0
    out, err = process.out, process.err
    assert "takes no new requests" in err
    assert "Traceback" not in err
    assert KEY not in out + err
    assert out.count('"path": "/v1/completions"') == 4
    assert all(line.startswith("{") for line in out.splitlines())


def test_a_second_signal_ends_at_once(process: Process) -> None:
    body = {"prompt": "Once", "max_tokens": 500, "n": 64, "stream": True, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.stream("POST", f"{process.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        events = answer.iter_lines()  # held: the client leaves when it is collected
        next(events)
        process.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "takes no new requests" in process.err)
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == 128 + signal.SIGTERM, process.err
    assert process.err.endswith("ends at once\n")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "70000"], "--port: expected 0 to 65535"),
        (["--slots", "0"], "--slots: expected at least 1"),
        (["--budget", "0"], "--budget: expected at least 1"),
        (["--max-queue", "-1"], "--max-queue: expected at least 0"),
        (["--stream-interval", "nan"], "--stream-interval: expected 0 to 10 seconds, found nan"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "a b\n"], "--api-key"),
        (["--allow-origin", "example.com"], "--allow-origin"),
        (["--host", "256.0.0.1"], "--host: expected an address"),
        (["--slot", "3"], "did you mean --slots?"),
    ],
)
def test_flags_that_cannot_be_meant(capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as ended:
        serve.main([*flags, "--no-compilation-cache"])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken_is_known_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str], live) -> None:
    with pytest.raises(SystemExit):
        serve.main(["--port", str(live.port), "--model", "/no/such/model", "--no-compilation-cache"])
    assert f"cannot bind 127.0.0.1 port {live.port}" in capsys.readouterr().err


def test_help_is_by_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    out = capsys.readouterr().out
    for group in ("network:", "access:", "engine:", "model:", "environment:"):
        assert f"\n{group}\n" in out


def test_a_missing_extra_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        serve.main([])
    assert "pip install 'jllama[serve]'" in capsys.readouterr().err
