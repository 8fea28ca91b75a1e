"""Routes beside the completions, and what holds for all: ids, keys, limits, error bodies."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from qserve.serve.protocol_completions import CompletionBody

HEALTH = ["/health", "/v1/health", "/healthz", "/livez", "/readyz", "/ping"]
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("path", HEALTH)
def test_health_is_good_while_requests_are_taken(client: Any, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", HEALTH)
def test_health_is_bad_once_the_server_drains(client: Any, path: str) -> None:
    client.service.admission.drain()
    assert client.get(path).status_code == 503


def test_health_is_bad_when_the_engine_has_died(client: Any) -> None:
    client.engine.dead = True
    assert client.get("/health").status_code == 503


def test_a_dead_engine_refuses_requests_for_good(client: Any, message_of: Any) -> None:
    client.engine.dead = True
    response = client.chat(stream=True)
    message_of(response, 503, None)
    assert response.headers["x-should-retry"] == "false"


def test_a_draining_server_sends_requests_away(client: Any, message_of: Any) -> None:
    client.service.admission.drain()
    response = client.chat()
    message_of(response, 503, None)
    assert int(response.headers["retry-after"]) > 0
    assert client.get("/v1/models").status_code == 200


def test_version(client: Any) -> None:
    assert client.get("/version").json() == {"version": version("qserve-llm")}


def test_every_name_of_the_model_has_a_card(client: Any) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "org/tiny-alias"]
    for card in body["data"]:
        assert {"id", "object", "created", "owned_by", "root", "parent"} <= set(card)
        assert card["max_model_len"] == 64
        assert client.get(f"/v1/models/{card['id']}").json() == card


def test_an_unknown_card_is_not_found(client: Any, message_of: Any) -> None:
    assert "`nope/x`" in message_of(client.get("/v1/models/nope/x"), 404, "model")


@pytest.mark.parametrize("name", ["tiny", "org/tiny-alias", ""])
def test_the_model_answers_to_its_names_and_to_none(client: Any, name: str) -> None:
    assert client.chat(model=name).json()["model"] == "tiny"


def test_an_unknown_model_is_not_found(client: Any, message_of: Any) -> None:
    for response in (client.chat(model="gpt-4"), client.complete(model="gpt-4", stream=True)):
        assert message_of(response, 404, "model") == "The model `gpt-4` does not exist."
    assert client.engine.added == []


def test_any_name_will_do_if_the_server_says_so(make_client: Any) -> None:
    assert make_client(allow_any_model_name=True).chat(model="gpt-4").status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/models/", "/health/"])
def test_an_unknown_route_is_not_found(client: Any, message_of: Any, path: str) -> None:
    assert message_of(client.post(path, {}), 405 if path == "/v1/models/" else 404, None)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/chat/completions"), ("PUT", "/v1/completions"), ("POST", "/v1/models"),
     ("DELETE", "/v1/models/tiny"), ("POST", "/health")],
)  # fmt: skip
def test_a_wrong_verb_is_refused(client: Any, message_of: Any, method: str, path: str) -> None:
    response = client.request(method, path)
    message_of(response, 405, None)
    assert "allow" in response.headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"not json", b"[1]", b'"text"', b"5", b"null", b"true", b'{"a": "\xff"}',
     b'{"prompt": "\\ud800"}', b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(
    client: Any, message_of: Any, path: str, raw: bytes
) -> None:
    assert len(message_of(client.post(path, content=raw, headers=JSON), 400, None)) < 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "x" * 900])
def test_another_media_type_is_refused(client: Any, message_of: Any, kind: str) -> None:
    headers = {"content-type": kind}
    response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert "application/json" in message_of(response, 400, None)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_the_media_type_may_have_parameters(client: Any, kind: str) -> None:
    headers = {"content-type": kind}
    response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused(
    make_client: Any, message_of: Any, declared: bool
) -> None:
    client = make_client(max_body_bytes=100)
    raw = b'{"prompt": "' + b"a" * 100 + b'"}'

    async def in_parts() -> Any:
        for start in range(0, len(raw), 10):
            yield raw[start : start + 10]

    content = raw if declared else in_parts()
    response = client.post("/v1/completions", content=content, headers=JSON)
    assert "100 bytes" in message_of(response, 413, None)
    assert response.headers["connection"] == "close"


def test_the_request_id_comes_back_always(client: Any) -> None:
    for response in (client.get("/health"), client.chat(), client.chat(n=0), client.get("/nope")):
        assert len(response.headers["x-request-id"]) == 32
    response = client.post("/v1/completions", {"prompt": "a"}, headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "cmpl-abc-1"


def test_an_unusable_request_id_is_replaced(client: Any) -> None:
    response = client.get("/health", headers={"X-Request-Id": "x" * 300})
    assert len(response.headers["x-request-id"]) == 32


GUARDED = [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
           ("POST", "/detokenize"), ("GET", "/nowhere")]  # fmt: skip
OPEN = [*HEALTH, "/version", "/metrics"]


@pytest.fixture
def locked(make_client: Any) -> Any:
    return make_client(api_keys=("first", "second"))


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"},
     {"Authorization": "first"}, {"Authorization": "Bearer "}, {"x-api-key": "wrong"}],
)  # fmt: skip
def test_without_a_known_key_nothing_is_told(
    locked: Any, message_of: Any, method: str, path: str, headers: dict[str, str]
) -> None:
    response = locked.request(method, path, headers=headers)
    message_of(response, 401, None)
    assert response.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in response.headers


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer first"}, {"authorization": "bearer second"},
     {"x-api-key": "second"}, {"Authorization": "Bearer wrong", "x-api-key": "first"}],
)  # fmt: skip
def test_any_of_the_keys_opens(locked: Any, headers: dict[str, str]) -> None:
    assert locked.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", OPEN)
def test_probes_need_no_key(locked: Any, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_preflight_requests_need_no_key(locked: Any) -> None:
    assert locked.request("OPTIONS", "/v1/models").status_code == 405


def test_browsers_are_let_in_only_where_it_was_said(make_client: Any) -> None:
    origin = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    path = "/v1/chat/completions"
    open_to = make_client(allowed_origins=("https://chat.example",), api_keys=("k",))
    preflight = open_to.request("OPTIONS", path, headers=origin)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
    closed = make_client().get("/health", headers=origin)
    assert "access-control-allow-origin" not in closed.headers


def test_a_full_queue_is_told_with_a_time_to_come_back(make_client: Any, message_of: Any) -> None:
    client = make_client(max_sequences=2)
    message_of(client.chat(n=3), 400, "n")

    async def three(http: Any) -> list[Any]:
        client.engine.holds = True
        body = {"prompt": "The", "n": 2, "stream": True}
        waiting = [
            client.service.generate([(5,)], CompletionBody(prompt=["x"]), None) for _ in range(2)
        ]
        refused = await http.post("/v1/completions", json=body)
        for generation in waiting:
            generation.close()
        client.engine.holds = False
        return [refused, await http.post("/v1/completions", json=body)]

    refused, taken = client.run(three)
    message_of(refused, 503, None)
    assert int(refused.headers["retry-after"]) > 0
    assert taken.status_code == 200
    metrics = client.get("/metrics").text
    assert (
        'qserve:admission_rejections_total{engine="0",model_name="tiny",reason="queue"}' in metrics
    )


def test_a_bug_is_a_500_without_details(
    client: Any, message_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("secret /path")

    monkeypatch.setattr(type(client.service.tokenizer), "encode", fail)
    response = client.chat()
    assert "secret" not in message_of(response, 500, None)
    assert "x-request-id" in response.headers
