"""Customization over the device's server: what it says would leave the device is what leaves it, and talking goes on meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from crayon_runtime.customized import STATE, kept_examples, read_state
from crayon_runtime.errors import ServerError
from crayon_runtime.remote import PoolClient
from tests.runtime import bundles, pools, services, tiny
from tests.support import needs

httpx = needs.module("httpx")
needs.module("fastapi")
needs.module("llguidance")
needs.module("openai")
needs.module("uvicorn")

from crayon_runtime.server import create_app  # noqa: E402
from crayon_runtime.server.customizing import around  # noqa: E402
from tests.runtime.server.assistant import KNOWN, TEMPLATE, assistant  # noqa: E402
from tests.runtime.server.llm import Told  # noqa: E402
from tests.runtime.server.served import Ask, Served, problem, wait  # noqa: E402

OWN = [{"prompt": f"{said}\n", "completion": own} for said, (_, own) in KNOWN.items()]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with assistant(tmp_path) as served:
        yield served


def get(served: Served, path: str = "") -> Any:
    return httpx.get(f"{served.url}/v1/customization{path}").raise_for_status().json()


def post(served: Served, path: str = "", examples: Any = OWN, **more: Any) -> Any:
    return httpx.post(f"{served.url}/v1/customization{path}", json={"examples": examples}, timeout=30, **more)


def said(served: Served, model: str) -> str:
    asked = [{"role": "user", "content": OWN[0]["prompt"].strip()}]
    return served.chat(model=model, messages=asked).choices[0].message.content  # type: ignore[no-any-return]


def test_customizing_and_what_is_told_of_it(served: Served, tmp_path: Path) -> None:
    before = get(served)
    assert before == {
        "customized": False,
        "pool": None,
        "alpha": [],
        "log_loss": None,
        "examples": 0,
        "possible": True,
        "to": None,
        "running": False,
        "template": {"before": "", "after": "\n"},
        "conversation": True,
    }
    assert get(served, "/examples") == {"examples": []}
    assert "customized" not in [model.id for model in served.client.models.list()]
    done = post(served).raise_for_status().json()
    assert done["installed"]
    assert done["log_loss"] < done["log_loss_before"] == done["log_loss_base"]
    assert (done["to"], done["sent_bytes"], done["received_bytes"]) == (None, 0, 0)
    state = read_state(tmp_path / "customized")
    after = get(served)
    assert after["customized"]
    assert after["pool"] == {"name": "random", "version": state.pool_version}
    assert after["alpha"] == state.alpha == done["alpha"]
    assert (after["log_loss"], after["examples"]) == (state.log_loss, 2)
    assert get(served, "/examples") == {"examples": OWN}
    assert said(served, "customized") == OWN[0]["completion"]
    assert said(served, "tiny") == KNOWN[OWN[0]["prompt"].strip()][0]


def test_what_is_not_installed_says_why_and_changes_nothing(served: Served, tmp_path: Path) -> None:
    done = post(served, examples=[{"prompt": "something else\n", "completion": "x"}]).raise_for_status().json()
    assert (done["installed"], done["reason"]) == (False, "it does not change what the model says")
    assert not (tmp_path / "customized").exists()
    assert not get(served)["customized"]


def test_hybrid_answers_with_what_was_customized(tmp_path: Path) -> None:
    with assistant(tmp_path, server=Told("server")) as served:
        assert said(served, "hybrid") == KNOWN[OWN[0]["prompt"].strip()][0]
        assert post(served).json()["installed"]
        assert said(served, "hybrid") == OWN[0]["completion"]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[services.Service]:
    pool = pools.write(tmp_path / "served", adapters=pools.loras(12), located=pools.projection(12), base=bundles.BASE)
    with services.Service(pool, None, tmp_path / "service") as service:
        yield service


def asking(service: services.Service, folder: Path, stack: ExitStack) -> Served:
    """A device that customizes with a service."""
    return stack.enter_context(assistant(folder, pool=lambda: PoolClient(service.url, trusted=None), to=service.url))


def test_what_is_foreseen_is_what_leaves_the_device(service: services.Service, tmp_path: Path) -> None:
    with ExitStack() as stack:
        served = asking(service, tmp_path / "device", stack)
        foreseen = post(served, "/preview").raise_for_status().json()
        assert [asked.method for asked in service.asked] == ["GET"] * len(service.asked), "nothing was sent"
        assert all(not asked.body for asked in service.asked)
        assert foreseen["to"] == service.url
        done = post(served).raise_for_status().json()
        [sent] = [asked.body for asked in service.asked if asked.path == services.POST]
        assert sent.decode() == foreseen["body"] == done["sent"]
        assert len(sent) == foreseen["bytes"] == done["sent_bytes"]
        assert {*json.loads(sent)} == {"base_fingerprint", "pool_version", "alpha"}
        assert all(len(str(number)) <= 6 for number in json.loads(sent)["alpha"]), "four decimals"
        assert done["installed"]
        everything = b"".join(asked.body + str(asked.headers).encode() for asked in service.asked)
        assert b"alarm" not in everything.lower()
        assert b"half past" not in everything


@pytest.mark.parametrize(
    "fault, status, message",
    [
        (services.refuses(403, "not for you"), 502, "not for you"),
        (services.answers(404), 502, "there is no customization service here"),
        (services.answers(200, b"<html>"), 502, ""),
    ],
)
def test_a_service_that_fails_is_said(
    service: services.Service, tmp_path: Path, fault: Any, status: int, message: str
) -> None:
    with ExitStack() as stack:
        served = asking(service, tmp_path / "device", stack)
        service.always["/v1/pool"] = fault
        for path in ("", "/preview"):
            refused = post(served, path)
            assert message in problem(refused)
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, "customization_failed")
        assert not get(served)["running"]
        assert said(served, "tiny")


def test_another_base_is_refused(tmp_path: Path) -> None:
    other = pools.write(tmp_path / "other", adapters=pools.loras(12), located=pools.projection(12), base="c" * 64)

    with assistant(tmp_path / "device", pool=lambda: nullcontext(other)) as served:
        assert "was built for another base model" in problem(post(served, "/preview"))
        assert post(served).status_code == 400


def test_one_at_a_time_and_talking_goes_on(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> Any:
        begun.set()
        assert go_on.wait(20)
        raise ServerError("it was slow")

    with assistant(tmp_path, pool=slow) as served:
        results: list[Any] = []
        asking = threading.Thread(target=lambda: results.append(post(served)))
        asking.start()
        assert begun.wait(10)
        assert get(served)["running"]
        for path in ("", "/preview"):
            refused = post(served, path)
            assert problem(refused).startswith("409 another customization is running")
            assert refused.json()["error"]["code"] == "customizing"
        assert said(served, "tiny"), "answers go on"
        go_on.set()
        asking.join(10)
        assert problem(results[0]) == "502 it was slow"
        assert not get(served)["running"]


def test_customizing_goes_on_without_its_client(tmp_path: Path) -> None:
    go_on = threading.Event()
    with assistant(tmp_path) as served:
        at_once = served.customizer._pool

        def slow() -> Any:
            assert go_on.wait(20)
            return at_once()

        served.customizer._pool = slow
        connection = served.post("/v1/customization", {"examples": OWN})
        wait(lambda: get(served)["running"])
        connection.close()
        go_on.set()
        wait(lambda: not get(served)["running"])
        assert get(served)["customized"]


def test_many_talk_while_it_is_customized(tmp_path: Path) -> None:
    with assistant(tmp_path, waiting=50) as served:
        stop, errors = threading.Event(), []

        def talk() -> None:
            while not stop.is_set():
                for model in [m.id for m in served.client.models.list() if m.id not in ("alice", "bob")]:
                    answer = said(served, model)
                    wanted = KNOWN[OWN[0]["prompt"].strip()][model == "customized"]
                    if answer != wanted:
                        errors.append((model, answer))

        threads = [threading.Thread(target=talk) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(5):
            assert post(served, examples=OWN[: 1 + turn % 2]).json()["installed"]
        stop.set()
        for thread in threads:
            thread.join(10)
        assert errors == []


@pytest.mark.parametrize(
    "body, said",
    [
        ({}, "400 Object missing required field `examples`"),
        ({"examples": []}, "400 examples: Expected `array` of length >= 1"),
        ({"examples": OWN * 501}, "400 examples: Expected `array` of length <= 1000"),
        ({"examples": [["a", "b"]]}, "400 examples[0]: Expected `object`, got `array`"),
        ({"examples": [{"prompt": "a"}]}, "400 examples[0]: Object missing required field `completion`"),
        ({"examples": [{"prompt": "", "completion": "b"}]}, "400 examples[0].prompt: Expected `str` of length >= 1"),
        ({"examples": [{"prompt": "  ", "completion": "b"}]}, "400 its prompt is empty"),
        ({"examples": OWN, "pool": "/etc"}, "400 this server does not know `pool`"),
        ({"examples": [*OWN, {"prompt": "a" * 2000, "completion": "b"}]}, "400 it has "),
    ],
)
def test_bad_examples_are_refused(served: Served, tmp_path: Path, body: Any, said: str) -> None:
    for path in ("", "/preview"):
        response = httpx.post(f"{served.url}/v1/customization{path}", json=body)
        assert problem(response).startswith(said)
    assert not (tmp_path / "customized").exists()


def test_without_a_pool(inside: Any) -> None:
    ask = Ask(create_app(tiny.engine(bundle=inside, chat_template=tiny.CHATML)))
    assert ask("GET", "/v1/customization").json()["possible"] is False
    refused = ask("POST", "/v1/customization", json={"examples": OWN})
    assert problem(refused).startswith("404 there is no pool to customize with")


def test_a_state_that_is_damaged_is_no_customization(served: Served, tmp_path: Path) -> None:
    assert post(served).json()["installed"]
    (tmp_path / "customized" / STATE).write_text("{")
    assert get(served)["customized"] is False
    assert kept_examples(tmp_path / "customized")


def test_requests_made_from_the_openapi_document(tmp_path: Path) -> None:
    """Of a server that has everything: a pool, and a server LLM."""
    schemathesis = needs.module("schemathesis")
    hypothesis = needs.module("hypothesis")
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    accepted: dict[str, int] = {}

    @hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "hybrid"
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        accepted[case.path] = accepted.get(case.path, 0) + (response.status_code == 200)

    with assistant(tmp_path, server=Told("x")) as served:
        for operation in schemathesis.openapi.from_url(f"{served.url}/openapi.json").get_all_operations():
            made = operation.ok()
            if "custom" in made.path or "chat" in made.path:
                hypothesis.given(case=made.as_strategy())(check)()
        assert len(accepted) == 4
        for path in ("/v1/chat/completions", "/v1/customization", "/v1/customization/preview"):
            assert accepted[path] > 3
        wait(lambda: served.answers.present == 0)


def test_customizing_needs_the_key_and_its_own_page(tmp_path: Path) -> None:
    with assistant(tmp_path, api_key="correct horse battery") as served:
        for path in ("", "/examples"):
            assert httpx.get(f"{served.url}/v1/customization{path}").status_code == 401
        assert post(served).status_code == post(served, "/preview").status_code == 401
        key = {"Authorization": "Bearer correct horse battery"}
        assert post(served, "/preview", headers=key).status_code == 200
        assert post(served, headers=key | {"Origin": "http://evil.example"}).status_code == 403


def test_the_log_tells_nothing_of_examples(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(0):
        post(served)
        post(served, examples=[{"prompt": "sesame", "completion": "x" * 2000}])
    ours = "".join(r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore")))
    assert "/v1/customization" in ours
    assert "sesame" not in ours
    assert "alarm" not in ours.lower()


@pytest.mark.parametrize(
    "template, wanted",
    [
        (TEMPLATE, ("", "\n")),
        (None, ("", "")),
        ("{{ bos_token }}[INST] {{ messages[0].content }} [/INST]", ("[INST] ", " [/INST]")),
        (tiny.CHATML, None),
        ("{{ messages[0].content | upper }}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_what_surrounds_a_message(template: str | None, wanted: Any) -> None:
    found = around(tiny.tokenizer(chat_template=template))
    assert (found and (found.before, found.after)) == wanted
    if found:
        tokenizer = tiny.tokenizer(chat_template=template)
        text = f"{found.before}the alarm{found.after}"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "the alarm"}]) if template else None
        assert chat in (None, tokenizer.encode(text))
