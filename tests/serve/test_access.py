"""Keys, limits, probes, figures and the log: what whoever runs the server relies on."""

import hmac
import json
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Live, http, wait_for

from jllama.serve import front

KEY = "sk-secret"
GOOD = f"Bearer {KEY}"


@pytest.fixture(scope="module")
def keyed(make_live: Callable[..., Live]) -> Live:
    return make_live(api_keys=("sk-other", KEY), origins=("https://page.example",))


@pytest.mark.parametrize(
    "value",
    [None, "", "Bearer", "Bearer x y", "Bearer sk-secre", f"{GOOD}2", f"Basic {KEY}", KEY, "Bearer \xff"],
)
def test_every_route_but_health_wants_the_key(keyed: Live, value: str | None) -> None:
    headers = {} if value is None else {"authorization": value.encode("latin-1")}
    for path in ("/v1/models", "/v1/models/demo", "/metrics", "/version", "/ready", "/openapi.json", "/nothing"):
        answer = keyed.client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert keyed.client.post(path, content=b"x" * 9999, headers=headers).status_code == 401
    assert keyed.client.get("/health", headers=headers).status_code == 200


def test_each_key_opens(keyed: Live) -> None:
    for key in (KEY, "sk-other"):
        assert keyed.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert keyed.client.get("/v1/models", headers={"Authorization": f"bearer  {key}"}).status_code == 200


def test_keys_are_compared_whole_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, equal = [], hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return equal(a, b)

    monkeypatch.setattr(front.hmac, "compare_digest", compare)
    keys = front.Keys(("a", "bb", "ccc"))
    for given in ("", "a", "bb", "x" * 1000):
        compared.clear()
        keys.tenant(front.Headers({"authorization": f"Bearer {given}"}))
        assert compared == [(32, 32)] * 3


def test_tenants_do_not_share_cached_prompts(keyed: Live) -> None:
    prompt = " ".join(["a bird in a tree"] * 40)

    def hits(key: str) -> int:
        before = keyed.service.engine.statistics.prefix_hits
        body = {"prompt": prompt, "max_tokens": 1, "cache_salt": "same"}
        assert keyed.post("/v1/completions", body, Authorization=f"Bearer {key}").status_code == 200
        return keyed.service.engine.statistics.prefix_hits - before

    assert hits(KEY) == 0
    assert hits(KEY) > 64
    assert hits("sk-other") == 0


def test_other_origins_are_not_let_in_by_browsers(live: Live, keyed: Live) -> None:
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    headers = {"access-control-request-headers": "authorization,content-type"}
    allowed = keyed.client.options("/v1/completions", headers=asks | headers)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = keyed.client.options("/v1/completions", headers=asks | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert not any(
        name.startswith("access-control") for name in live.client.options("/v1/models", headers=asks).headers
    )
    assert not any(name.startswith("access-control") for name in live.client.get("/v1/models", headers=asks).headers)


def test_a_body_has_a_limit_of_bytes(make_live: Callable[..., Live]) -> None:
    small = make_live(body_bytes=1000)
    assert "1000 bytes" in small.refused("/v1/completions", {"prompt": "a" * 1000}, 413)["message"]
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    chunked, announced = head + b"transfer-encoding: chunked\r\n\r\n", head + b"content-length: 99999999999\r\n\r\n"
    with small.raw(chunked) as connection:  # no length is announced
        connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert b" 413 " in connection.recv(4096)
    with small.raw(announced) as connection:
        assert b" 413 " in connection.recv(4096)


def test_all_bodies_together_have_a_limit_of_bytes(make_live: Callable[..., Live]) -> None:
    narrow = make_live(body_bytes=1000, bodies_bytes=1500)
    half = http("/v1/completions", {"prompt": "a" * 900})[:-10]
    with narrow.raw(half):
        wait_for(lambda: narrow.service.gate.bytes > 900)
        error = narrow.refused("/tokenize", {"prompt": "a" * 900}, 429)
        assert (error["code"], error["type"]) == ("busy", "rate_limit_error")
        assert narrow.post("/tokenize", {"prompt": "a"}).status_code == 200
    wait_for(lambda: narrow.service.gate.bytes == 0)
    assert narrow.post("/tokenize", {"prompt": "a" * 900}).status_code == 200


def test_a_body_must_come_in_time(make_live: Callable[..., Live]) -> None:
    hasty = make_live(body_seconds=0.2)
    with hasty.raw(http("/v1/completions", {"prompt": "a"})[:-3]) as connection:
        assert b" 408 " in connection.recv(4096)
    assert hasty.complete("a")


def test_a_full_queue_refuses_and_recovers(make_live: Callable[..., Live]) -> None:
    few = make_live(queue=1)  # and two slots
    error = few.refused("/v1/completions", {"prompt": "a", "n": 4}, 429)
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    body = {"prompt": "a", "n": 3, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with few.raw(http("/v1/completions", body)) as held:
        assert held.recv(1)
        answer = few.post("/v1/completions", {"prompt": "a"})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert few.client.get("/ready").json()["status"] == "full"
    wait_for(few.idle)
    assert few.complete("a")


def test_a_draining_server_takes_nothing_new(make_live: Callable[..., Live]) -> None:
    ending = make_live()
    ending.service.gate.draining = True
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        error = ending.refused(path, {"prompt": "a"}, 503)
        assert (error["code"], error["type"]) == ("shutting_down", "server_error")
    assert ending.client.get("/health").status_code == 503
    assert ending.client.get("/ready").json()["status"] == "draining"
    assert ending.client.get("/metrics").status_code == 200


def test_models_and_version(live: Live) -> None:
    models = live.client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["demo", "alias"]
    assert models["data"][0]["max_model_len"] == 512
    assert live.client.get("/v1/models/alias").json()["root"] == "demo"
    assert live.client.get("/v1/models/other").status_code == 404
    assert live.client.get("/version").json().keys() == {"version"}
    schema = live.client.get("/openapi.json").json()
    assert "temperature" in json.dumps(schema["paths"]["/v1/completions"])


def test_figures_count_what_happens(make_live: Callable[..., Live]) -> None:
    counted = make_live()
    counted.complete("Once", n=2, temperature=1, max_tokens=20)
    counted.refused("/v1/completions", {"prompt": 1})
    counted.client.get("/no/such/place")

    def read() -> dict[str, float]:
        families = text_string_to_metric_families(counted.client.get("/metrics").text)
        return {
            ",".join([sample.name, *(v for k, v in sample.labels.items() if k != "model_name")]): sample.value
            for family in families
            for sample in family.samples
        }

    found = read()
    assert found["vllm:request_success_total,length"] + found.get("vllm:request_success_total,stop", 0) == 2
    assert found["vllm:time_to_first_token_seconds_count"] == 1
    assert found["vllm:inter_token_latency_seconds_count"] > 2
    assert found["vllm:request_generation_tokens_sum"] <= 40
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert 0 <= found["vllm:kv_cache_usage_perc"] <= 1
    assert found["vllm:generation_tokens_total"] >= found["vllm:request_generation_tokens_sum"]
    assert found["jllama:http_requests_total,/v1/completions,200"] == 1
    assert found["jllama:http_requests_total,/v1/completions,400"] == 1
    assert found["jllama:http_requests_total,other,404"] == 1
    assert found["process_resident_memory_bytes"] > 1e6


def test_the_log_has_a_line_a_request_without_texts(
    make_live: Callable[..., Live], capsys: pytest.CaptureFixture[str]
) -> None:
    logged = make_live(access_log=True)
    answer = logged.post("/v1/completions", {"prompt": "private", "max_tokens": 3, "user": 'u"\n1', "temperature": 0})
    for path in ("/ready", "/health", "/metrics"):
        logged.client.get(path)
    logged.client.get("/a%0a%22b?secret=1")
    wait_for(lambda: logged.idle())
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["id"] == answer.headers["x-request-id"]
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/completions", 200)
    assert (first["completion_tokens"], first["finish"], first["user"]) == (3, "length", 'u"\n1')
    assert first["seconds"] > 0
    assert second["status"] == 404
    assert "private" not in json.dumps(first)
    assert "secret" not in json.dumps(second)
