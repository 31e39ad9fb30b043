"""Rewards on a server: the protocol, its refusals, and the client component."""

import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.answers import numeric_answer
from rewards.api import Batched, Component, Problem, Status, Verdict, score_inline
from rewards.pool import RewardPool
from rewards.post import Refused, is_loopback, post_json
from rewards.remote import TOKEN_VARIABLE, RemoteReward, remote_reward
from rewards.serve import RewardServer, main

ROOT = Path(__file__).parent.parent
TOKEN = "a-secret"
WAIT_S = 10.0


def asked(reference: Any = None) -> Problem:
    return Problem("p", prompt="?", reference=reference)


def told(completion: str, problem: Problem, *, length_tokens: int = -1) -> float:
    """Does what the completion says, and leaves a line for each call."""
    if isinstance(problem.reference, str):
        with open(problem.reference, "a") as file:
            file.write(completion + "\n")
    if completion == "raise":
        raise ValueError("a bug")
    if completion == "hang":
        time.sleep(3_600)
    return Verdict(0.5, f"{length_tokens} tokens", completion)


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    components: list[Component] = [(1.0, told), (1.0, numeric_answer)]
    with (
        RewardPool(components, workers=2, deadline_s=0.3) as pool,
        RewardServer(pool, TOKEN) as started,
    ):
        thread = threading.Thread(target=started.serve)
        thread.start()
        yield started
        started.stop()
        thread.join()


@pytest.fixture(autouse=True)
def token(monkeypatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


def posted(server: RewardServer, payload: object, path: str = "/v1/score") -> Any:
    return post_json(server.url + path, payload, token=TOKEN, timeout_s=WAIT_S)


def item(name: str, completion: str, reference: Any = None, **more: Any) -> dict[str, Any]:
    problem = dataclasses.asdict(asked(reference))
    return {"id": name, "completion": completion, "problem": problem, **more}


def test_typed_verdicts_come_back(server, tmp_path):
    local: Component = (1.0, numeric_answer)
    components: list[Component] = [
        (1.0, remote_reward(server.url)),
        (1.0, remote_reward(server.url, "numeric_answer")),
        local,
    ]
    with RewardPool(components) as pool:
        assert pool.names == ("remote", "numeric_answer", "numeric_answer_2")
        rows = [("<answer>7</answer>", 7), ("\ud800\x00", 7), ("raise", 7), ("hang", 7)]
        facts = {"length_tokens": 3}
        futures = [
            pool.submit(text, Problem("p", prompt="?", reference=n), facts) for text, n in rows
        ]
        fine, odd, raised, hung = [future.result(WAIT_S) for future in futures]
    for far, near in (fine[1:], odd[1:]):
        assert far.value == near.value and far.status == near.status == Status.OK
    assert (fine[0].value, fine[0].reason) == (0.5, "3 tokens")
    assert odd[0].extracted == "\ud800\x00"
    assert raised[0].status == Status.CRASH and "a bug" in raised[0].detail
    assert (hung[0].status, hung[0].valid) == (Status.TIMEOUT, True)


def test_a_repeated_request_is_answered_from_memory(server, tmp_path):
    diary = tmp_path / "diary"
    request = {"items": [item("1", "once", str(diary)), item("2", "twice", str(diary))]}
    first, again = posted(server, request), posted(server, request)
    assert first == again and [r["id"] for r in first["results"]] == ["1", "2"]
    assert sorted(diary.read_text().split()) == ["once", "twice"]
    with pytest.raises(Refused, match="400.*'1' was used for something else"):
        posted(server, {"items": [item("1", "other", str(diary))]})


def test_the_clients_ids_follow_from_the_content(server, tmp_path):
    diary = tmp_path / "diary"
    client = RemoteReward(server.url, "told", WAIT_S)
    ask = [("a", asked(str(diary)))] * 3
    scores = client(
        *map(list, zip(*ask, strict=True)), length_tokens=[1, 1, 2], finish_reason=[None] * 3
    )
    assert [score.reason for score in scores] == ["1 tokens", "1 tokens", "2 tokens"]
    assert diary.read_text() == "a\na\n"


def test_health(server):
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]))
    connection.request("GET", "/v1/health", headers={"Authorization": f"Bearer {TOKEN}"})
    reply = connection.getresponse()
    said = json.loads(reply.read())
    connection.close()
    assert reply.status == 200 and said["rewards"] == ["told", "numeric_answer"]
    assert said["counts"]["crashes"] >= 0


@pytest.mark.parametrize("wrong", [None, "", "other", "\u00e9"])
def test_a_wrong_token_gets_nothing(server, wrong):
    with pytest.raises(Refused, match="HTTP 401.*REWARDS_TOKEN"):
        post_json(server.url + "/v1/score", {"items": []}, token=wrong, timeout_s=WAIT_S)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (None, "expected"),
        ({}, "expected"),
        ({"items": 1}, "expected"),
        ({"items": ["a"]}, "expected"),
        ({"items": [{"id": 1, "completion": "a"}]}, "needs an id"),
        ({"items": [{"id": "a"}]}, "needs an id"),
        ({"items": [{"id": "a", "completion": "a", "problem": {"messages": 3}}]}, "no problem"),
        ({"items": [{"id": "a", "completion": "a", "facts": []}]}, "^"),
        ({"items": [{}] * 2_000}, "HTTP 413.*at most 1024"),
    ],
)
def test_bad_requests_are_refused(server, request_, said):
    if said == "^":
        assert posted(server, request_)["results"][0]["id"] == "a"
        return
    with pytest.raises(Refused, match=said):
        posted(server, request_)


def test_other_addresses_and_bodies_are_refused(server):
    with pytest.raises(Refused, match="HTTP 404"):
        posted(server, {}, "/v2/score")
    host = server.url.removeprefix("http://")
    for headers, body, code in (
        ({"Content-Length": "1" * 20}, None, 413),
        ({"Content-Length": "-1"}, None, 400),
        ({}, b"{", 400),
        ({}, b"[" * 200_000, 400),
    ):
        connection = http.client.HTTPConnection(host)
        connection.request(
            "POST", "/v1/score", body, {**headers, "Authorization": f"Bearer {TOKEN}"}
        )
        reply = connection.getresponse()
        assert reply.status == code and "error" in json.loads(reply.read())
        connection.close()


def test_a_closing_server_is_worth_another_try():
    pool = RewardPool([(1.0, numeric_answer)], workers=1)
    with RewardServer(pool, TOKEN) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        pool.close()
        (score,) = score_inline([(1.0, remote_reward(server.url))], "", asked(1))
        server.stop()
        thread.join()
    assert score.status == Status.UNAVAILABLE and "HTTP 503" in score.detail


def test_a_server_that_comes_back_is_found_again(tmp_path):
    """Refused connections are tried again until the server listens."""
    with RewardPool([(1.0, numeric_answer)], workers=1) as far:
        with RewardServer(far, TOKEN) as first:
            url, port = first.url, int(first.url.rpartition(":")[2])
        client = remote_reward(url, retries=5, backoff_s=0.05)
        with RewardPool([(1.0, client)]) as near:
            future = near.submit("<answer>1</answer>", asked(1))
            while not near.counts()["retries"]:
                time.sleep(0.005)
            with RewardServer(far, TOKEN, port=port) as second:
                thread = threading.Thread(target=second.serve)
                thread.start()
                assert future.result(WAIT_S)[0].value == 1.0
                second.stop()
                thread.join()


def test_what_json_does_not_have_is_named():
    client = Batched(RemoteReward("http://127.0.0.1:9", None, 1.0))
    (score,) = score_inline([(1.0, client)], "", asked({1, 2}))
    assert score.status == Status.CRASH and "set is not JSON serializable" in score.detail


def test_another_service_is_noticed(server):
    client = Batched(RemoteReward(server.url, "no_such_reward", WAIT_S))
    (score,) = score_inline([(1.0, client)], "", asked())
    assert score.status == Status.CRASH and "no_such_reward" in score.detail


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback(host, loopback):
    assert is_loopback(host) is loopback


def test_other_machines_need_a_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(SystemExit, match="set REWARDS_TOKEN before listening on 0.0.0.0"):
        main(["rewards.answers:numeric_answer", "--host=0.0.0.0"])


def test_the_command_serves_until_it_is_told_to_stop(tmp_path, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    serving = subprocess.Popen(
        [sys.executable, "-m", "rewards.serve", "rewards.answers:numeric_answer", "--port=0"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert serving.stdout is not None
    with serving:
        variable, _, secret = serving.stdout.readline().strip().partition("=")
        name, _, url = serving.stdout.readline().strip().partition(" at ")
        assert variable == TOKEN_VARIABLE and name == "numeric_answer"
        assert url.startswith("http://127.0.0.1:")
        monkeypatch.setenv(TOKEN_VARIABLE, secret)
        components: list[Component] = [(1.0, remote_reward(url))]
        assert score_inline(components, "<answer>1</answer>", asked(1))[0].value == 1.0
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(WAIT_S) == 0
