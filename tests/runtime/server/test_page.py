"""The page, in a browser: what a person sees, hears and does with a keyboard."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from crayon_runtime.customized import kept_examples
from tests.support import needs

playwright = needs.module("playwright.sync_api")
needs.module("fastapi")
needs.module("httpx")
needs.module("openai")
needs.module("uvicorn")

from crayon_runtime.errors import ServerError  # noqa: E402
from crayon_runtime.server.page import page as content  # noqa: E402
from tests.runtime.server.assistant import KNOWN, UNSURE, assistant  # noqa: E402
from tests.runtime.server.llm import Told  # noqa: E402
from tests.runtime.server.served import Served  # noqa: E402

expect = playwright.expect
expect.set_options(timeout=15_000)

ALARM = "wake me at half past seven"
RAIN = "will it rain in lisbon?"
FORECAST = "It will rain, <b>all</b> day."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = needs.chromium()
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root has no sandbox
        yield started
        started.close()


class Seen:
    """The page of a server in a tab of its own, held to what it may do: ask its own server, and run without an error."""

    def __init__(self, browser: Any, served: Served, **context: Any) -> None:
        self.served = served
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.errors: list[str] = []
        self.asked: list[Any] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.goto(served.url)

    def say(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> Any:
        """Say it, and wait for the answer."""
        before = self.page.locator(".answer").count()
        self.say(text)
        answer = self.page.locator(".answer").nth(before)
        expect(answer.locator(".facts")).to_be_visible()
        return answer

    def choose(self, label: str) -> None:
        self.page.get_by_label("Answer with").select_option(label=label)

    def example(self, prompt: str, completion: str) -> None:
        boxes = self.page.locator("#examples li").last
        boxes.get_by_label("You say").fill(prompt)
        boxes.get_by_label("It answers").fill(completion)

    def focused(self) -> Any:
        return self.page.locator(":focus")

    def bodies(self, path: str) -> list[Any]:
        """What was sent to an address."""
        return [request.post_data_json for request in self.asked if request.url.endswith(path)]

    def close(self) -> None:
        assert {request.url.split("/")[2] for request in self.asked if not request.url.startswith("data:")} == {
            self.served.url.removeprefix("http://")
        }
        self.context.close()


@pytest.fixture
def see(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Seen]]:
    """Opens the page of an assistant, which may fail in no way that is not `expected`."""
    with ExitStack() as stack:

        def start(
            *, expected: str = "$^", context: Any = None, ready: str = "#model option >> nth=0", **options: Any
        ) -> Seen:
            served = stack.enter_context(assistant(tmp_path, **options))
            seen = Seen(browser, served, **(context or {}))

            def end() -> None:
                seen.close()
                assert [error for error in seen.errors if not re.search(expected, error)] == []

            stack.callback(end)
            expect(seen.page.locator(ready)).to_be_attached()
            return seen

        yield start


# Talking


def test_a_message_is_answered_while_it_comes(see: Any) -> None:
    seen = see(delay=0.02)
    expect(seen.focused()).to_have_id("message")
    seen.say(ALARM)
    text = seen.page.locator(".answer .text")
    expect(text).to_have_text(re.compile(r"^alarm\.s.*[^)]$"))
    expect(seen.page.get_by_role("button", name="Stop")).to_be_visible()
    expect(text).to_have_text(KNOWN[ALARM][0])
    expect(seen.page.locator(".facts .badge")).to_have_text("Device")
    expect(seen.page.locator(".facts .speed")).to_have_text(re.compile(r"^[\d.,]+ tokens/s · \d\.\d s$"))
    expect(seen.page.get_by_role("button", name="Send")).to_be_visible()
    expect(seen.page.get_by_label("Message")).to_have_value("")


def test_what_was_said_is_sent_again_and_a_new_chat_forgets_it(see: Any) -> None:
    seen = see()
    for _ in range(2):
        seen.ask(ALARM)
    assert [m["role"] for m in seen.bodies("chat/completions")[-1]["messages"]] == ["user", "assistant", "user"]
    seen.page.get_by_role("button", name="New chat").click()
    expect(seen.page.locator(".answer")).to_have_count(0)
    expect(seen.focused()).to_have_id("message")
    seen.ask(ALARM)
    assert len(seen.bodies("chat/completions")[-1]["messages"]) == 1


def test_what_was_said_need_not_be_sent_again(see: Any) -> None:
    seen = see()
    seen.page.get_by_label("Remember the conversation").uncheck()
    for _ in range(2):
        seen.ask(ALARM)
    assert [len(body["messages"]) for body in seen.bodies("chat/completions")] == [1, 1]


def test_what_a_model_says_is_never_markup(see: Any) -> None:
    seen = see(server=Told(FORECAST, "<img src=x onerror=alert(1)>"))
    answer = seen.ask(RAIN + "<i>")
    expect(answer.locator(".text").first).to_have_text(FORECAST + "<img src=x onerror=alert(1)>")
    assert seen.page.locator("#log img, #log .text b, #log i:not(.scale i)").count() == 0


@pytest.mark.parametrize("key", [False, True])
def test_an_answer_can_be_stopped(see: Any, key: bool) -> None:
    seen = see(delay=0.05)
    seen.say(ALARM)
    expect(seen.page.locator(".answer .text")).to_have_text(re.compile("^ala"))
    if key:
        seen.page.keyboard.press("Escape")
    else:
        seen.page.get_by_role("button", name="Stop").click()
    expect(seen.page.locator(".speed")).to_contain_text("stopped")
    expect(seen.focused()).to_have_id("message")
    assert KNOWN[ALARM][0].startswith(seen.page.locator(".answer .text").inner_text())
    assert seen.ask("x").locator(".text").first.inner_text() == UNSURE, "the next one is answered"


def test_several_lines_are_one_message(see: Any) -> None:
    seen = see()
    seen.page.get_by_label("Message").fill("one")
    seen.page.keyboard.press("Shift+Enter")
    seen.page.keyboard.type("two")
    expect(seen.page.locator(".answer")).to_have_count(0)
    seen.page.keyboard.press("Enter")
    expect(seen.page.locator(".user .text")).to_have_text("one\ntwo", use_inner_text=True)


def test_an_error_is_said_and_can_be_tried_again(see: Any) -> None:
    seen = see(expected="503", waiting=0, delay=0.03)
    blocking = seen.served.post(
        "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": ALARM}]}
    )
    seen.served.wait(lambda: seen.served.answers.present == 1)
    seen.say(ALARM)
    expect(seen.page.get_by_role("alert")).to_contain_text("busy")
    expect(seen.page.locator(".user")).to_have_count(0)
    seen.served.wait(lambda: seen.served.answers.present == 0)
    blocking.close()
    seen.page.get_by_role("button", name="Ask again").click()
    expect(seen.page.locator(".answer .text")).to_have_text(KNOWN[ALARM][0])
    expect(seen.page.get_by_role("alert")).to_have_count(0)


def test_a_conversation_that_no_longer_fits_begins_anew(see: Any) -> None:
    seen = see(expected="400")
    seen.ask("long " * 150)
    seen.say(ALARM + " or " * 200)
    seen.page.get_by_role("button", name="Ask in a new chat").click()
    expect(seen.page.locator(".answer")).to_have_count(1)
    assert len(seen.bodies("chat/completions")[-1]["messages"]) == 1


def test_a_server_that_went_away_is_said(see: Any) -> None:
    seen = see(expected="ERR_")
    seen.page.route("**/chat/completions", lambda route: route.abort())
    seen.say(ALARM)
    expect(seen.page.get_by_role("alert")).to_contain_text("The server does not answer")


# Device or server


def test_who_answered_and_why(see: Any) -> None:
    server = Told("It will", " rain.")
    seen = see(server=server)
    expect(seen.page.locator("#model")).to_have_value("hybrid")
    sure = seen.ask(ALARM)
    expect(sure.locator(".badge")).to_have_text("Device")
    expect(sure.locator(".score .number")).to_have_text("−0.0137")
    unsure = seen.ask(RAIN)
    expect(unsure.locator(".text").first).to_have_text("It will rain.")
    expect(unsure.locator(".badge")).to_have_text("Server")
    assert [query for query, _ in server.queries] == [RAIN]
    more = unsure.get_by_role("button", name="Why?")
    expect(more).to_have_attribute("aria-expanded", "false")
    expect(unsure.locator(".why")).to_be_hidden()
    more.click()
    expect(more).to_have_attribute("aria-expanded", "true")
    why = unsure.locator(".why")
    expect(why).to_contain_text("is below the threshold")
    expect(why).to_contain_text("confidence")
    expect(why).to_contain_text("21 bytes")
    expect(why).to_contain_text(f"The device would have said: {UNSURE}")


def test_drafts_are_shown_until_it_is_decided(see: Any) -> None:
    decided = threading.Event()
    seen = see(server=Told(decided, "It will rain."))
    seen.say(RAIN)
    answer = seen.page.locator(".answer")
    expect(answer).to_have_class(re.compile("draft"))
    expect(answer.locator(".text")).to_have_text(UNSURE)
    decided.set()
    expect(answer.locator(".text").first).to_have_text("It will rain.")
    expect(answer).not_to_have_class(re.compile("draft"))


@pytest.mark.parametrize(
    "pieces", [[ServerError("the server is down")], ["It will r", ServerError("the server is down")]]
)
def test_a_fallback_is_said(see: Any, pieces: list[Any]) -> None:
    seen = see(server=Told(*pieces))
    answer = seen.ask(RAIN)
    expect(answer.locator(".text").first).to_have_text(UNSURE)
    expect(answer.locator(".badge")).to_have_text("Device, as the server could not")
    answer.get_by_role("button", name="Why?").click()
    expect(answer.locator(".why")).to_contain_text("the server is down")


def test_it_is_said_where_a_message_goes(see: Any) -> None:
    seen = see(server=Told("x"))
    expect(seen.page.locator("#where")).to_have_text("Asks the server if it is not sure")
    seen.choose("tiny, as it came")
    expect(seen.page.locator("#where")).to_have_text("Stays on this device")
    seen.ask(RAIN)
    assert seen.bodies("chat/completions")[-1]["model"] == "tiny"
    assert "crayon" not in seen.bodies("chat/completions")[-1]


def test_adapters_can_be_switched(see: Any) -> None:
    seen = see()
    assert seen.page.locator("#model option").all_inner_texts() == ["tiny, as it came", "alice", "bob"]
    seen.choose("bob")
    seen.ask(ALARM)
    assert seen.bodies("chat/completions")[-1]["model"] == "bob"


# Customizing


def test_customizing_from_examples(see: Any, tmp_path: Path) -> None:
    seen = see(to="https://pool.example")
    page = seen.page
    panel = page.get_by_role("complementary", name="Customization")
    expect(panel).to_contain_text("it is not customized")
    expect(page.get_by_role("button", name="See what would leave this device")).to_be_disabled()
    seen.example(ALARM, KNOWN[ALARM][1])
    page.get_by_role("button", name="Add an example").click()
    expect(seen.focused()).to_have_attribute("data-part", "prompt")
    seen.example(*[(said, own) for said, (_, own) in KNOWN.items()][1])
    page.get_by_role("button", name="See what would leave this device").click()

    leaving = page.locator("#reviewed")
    expect(leaving).to_be_focused()
    expect(leaving).to_contain_text("12 numbers, alpha")
    expect(leaving).to_contain_text("bytes to https://pool.example")
    body = json.loads(leaving.locator("pre").inner_text())
    assert {*body} == {"base_fingerprint", "pool_version", "alpha"}
    assert not (tmp_path / "customized").exists(), "nothing is done before it is asked for"

    page.get_by_role("button", name="Send this, and customize").click()
    expect(page.locator("#outcome")).to_contain_text("Customized. The next answer is yours.")
    expect(page.locator("#model")).to_have_value("customized")
    expect(panel).to_contain_text("Customized with 2 examples and the pool random")
    assert kept_examples(tmp_path / "customized")[0] == (f"{ALARM}\n", KNOWN[ALARM][1]), "as a chat asks it"
    bars = page.locator("#bars li")
    expect(bars).to_have_count(12)
    largest = max(range(12), key=body["alpha"].__getitem__)
    assert bars.nth(largest).text_content().startswith(f"LoRA {largest + 1}: ")
    expect(page.locator("#most span").first).to_contain_text(f"LoRA {largest + 1}: ")
    expect(bars.nth(largest).locator("i")).to_have_css("height", "87px")
    assert seen.ask(ALARM).locator(".text").first.inner_text() == KNOWN[ALARM][1]


def test_changed_examples_are_reviewed_again(see: Any) -> None:
    seen = see()
    page = seen.page
    seen.example(ALARM, "x")
    page.get_by_role("button", name="See what").click()
    expect(page.locator("#reviewed")).to_contain_text("Nothing: the pool is on this device")
    seen.example(ALARM, "y")
    expect(page.locator("#reviewed")).to_be_hidden()
    expect(page.get_by_role("button", name="See what")).to_be_enabled()


def test_an_adapter_that_is_not_installed_says_why(see: Any) -> None:
    seen = see()
    seen.example("of something else", "y")
    seen.page.get_by_role("button", name="See what").click()
    seen.page.locator("#reviewed").get_by_role("button", name="Customize").click()
    expect(seen.page.locator("#outcome")).to_contain_text("Not customized: it does not change what the model says.")
    expect(seen.page.locator("#model")).to_have_value("tiny")


def test_an_answer_becomes_an_example(see: Any) -> None:
    seen = see()
    seen.page.get_by_role("button", name="Customize").click()
    expect(seen.page.locator("#panel")).to_be_hidden()
    seen.ask(ALARM).get_by_role("button", name="Use as example").click()
    expect(seen.page.locator("#panel")).to_be_visible()
    last = seen.page.locator("#examples li").last
    expect(last.get_by_label("You say")).to_have_value(ALARM)
    expect(last.get_by_label("It answers")).to_have_value(KNOWN[ALARM][0])
    expect(last.get_by_label("It answers")).to_be_focused()


def test_kept_examples_can_be_taken_again_and_removed(see: Any) -> None:
    seen = see()
    page = seen.page
    seen.example(ALARM, KNOWN[ALARM][1])
    page.get_by_role("button", name="See what").click()
    page.locator("#reviewed").get_by_role("button", name="Customize").click()
    expect(page.locator("#outcome")).to_contain_text("Customized.")
    page.reload()
    page.get_by_role("button", name="Add the one kept from before").click()
    expect(page.locator("#examples li").get_by_label("You say")).to_have_value(ALARM)
    expect(page.locator("#examples li").get_by_label("It answers")).to_have_value(KNOWN[ALARM][1])
    page.get_by_role("button", name="Add an example").click()
    page.get_by_role("button", name="Remove example 1").click()
    expect(page.locator("#examples li")).to_have_count(1)
    expect(page.locator("#examples li").get_by_label("You say")).to_be_focused()
    expect(page.locator("#examples .numbered")).to_have_text("Example 1")


def test_without_a_pool_there_is_nothing_to_customize_with(see: Any) -> None:
    seen = see(pool=False)
    expect(seen.page.locator("#panel")).to_contain_text("cannot be customized here")
    expect(seen.page.get_by_role("button", name="See what")).to_have_count(0)


# For everybody


PARTS = {
    "complementary": ["Customization"],
    "combobox": ["Answer with"],
    "textbox": ["Message", "You say", "It answers"],
    "log": ["Conversation"],
    "button": [
        "New chat",
        "Customize",
        "Send",
        "Add an example",
        "See what would leave this device",
        "Remove example 1",
    ],
}


def test_everything_has_a_role_and_a_name(see: Any) -> None:
    seen = see()
    for role, names in PARTS.items():
        for name in names:
            expect(seen.page.get_by_role(role, name=name, exact=True)).to_have_count(1)
    nameless = "button:not([aria-label]), select, textarea, input"
    for element in seen.page.locator(nameless).all():
        assert element.evaluate("e => (e.labels?.[0] ?? e).textContent.trim() || e.ariaLabel"), element
    assert seen.page.locator("html").get_attribute("lang") == "en"


def test_a_screen_reader_is_told_of_the_answer_once(see: Any) -> None:
    seen = see(server=Told("It will rain."))
    status = seen.page.get_by_role("status")
    seen.ask(ALARM)
    expect(status).to_have_text(f"Answer of the device: {KNOWN[ALARM][0]}")
    seen.ask(RAIN)
    expect(status).to_have_text("Answer of the server: It will rain.")
    assert seen.page.get_by_role("log").get_attribute("aria-live") == "off"


def test_everything_can_be_done_with_a_keyboard(see: Any) -> None:
    seen = see()
    page = seen.page
    page.keyboard.type(ALARM)
    page.keyboard.press("Enter")
    expect(page.locator(".facts")).to_be_visible()
    reached: list[str] = []
    while len(reached) < 24:
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("(({ id, className, dataset }) => id || className || dataset.part)(document.activeElement)")
        )
        if reached[-1] in ("model", "anew"):
            ring = page.evaluate(
                "(({ outlineStyle, outlineWidth }) => outlineStyle + outlineWidth)(getComputedStyle(document.activeElement))"
            )
            assert ring == "solid2px"
    wanted = ["model", "anew", "toggle", "quiet use", "message", "send", "quiet remove", "prompt", "completion", "add"]
    around = reached[reached.index("model") :]
    assert [name for name in around if name in wanted][: len(wanted)] == wanted


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(see: Any, scheme: str) -> None:
    seen = see(server=Told("It will rain."), context={"color_scheme": scheme})
    seen.ask(ALARM)
    seen.ask(RAIN)
    seen.page.locator(".more").last.click()
    assert seen.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    background = seen.page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 384) == (scheme == "dark")
    for selector in (".text", ".badge", ".facts", "dt", "h1", "aside p", "#send", ".hint span", "option", "label"):
        for element in seen.page.locator(selector).all():
            assert element.evaluate(CONTRAST) >= 4.5, (selector, element.evaluate(CONTRAST))


CONTRAST = """(element) => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let below = element;
  while (numbers(getComputedStyle(below).backgroundColor)[3] === 0) below = below.parentElement;
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(below).backgroundColor)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""
"""As WCAG 2 has it."""


def test_it_fits_a_narrow_phone(see: Any) -> None:
    seen = see(server=Told("It will rain. " * 20 + "x" * 200), context={"viewport": {"width": 360, "height": 640}})
    page = seen.page
    wide = "document.documentElement.scrollWidth > innerWidth || [...document.querySelectorAll('#scroll, aside')].some(e => e.scrollWidth > e.clientWidth)"
    expect(page.locator("#panel")).to_be_hidden()
    seen.ask(ALARM)
    seen.ask(RAIN).get_by_role("button", name="Why?").click()
    assert not page.evaluate(wide)
    assert page.get_by_role("button", name="Send").bounding_box()["x"] < 330
    for button in page.locator("header button, #send").all():
        assert min(button.bounding_box()["width"], button.bounding_box()["height"]) >= 40

    page.get_by_role("button", name="Customize").click()
    expect(page.locator("#panel")).to_be_focused()
    assert page.locator("#main").evaluate("e => e.inert")
    seen.example(ALARM, "y" * 100)
    page.get_by_role("button", name="See what").click()
    expect(page.locator("#reviewed")).to_be_visible()
    assert not page.evaluate(wide)
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    expect(seen.focused()).to_have_id("toggle")
    assert not page.locator("#main").evaluate("e => e.inert")


def test_a_key_is_asked_for_and_kept_in_the_tab(see: Any) -> None:
    seen = see(expected="401", api_key="correct horse battery", ready="#locked")
    page = seen.page
    box = page.get_by_label("API key")
    expect(box).to_be_focused()
    box.fill("wrong")
    page.keyboard.press("Enter")
    expect(box).to_have_value("")
    box.fill("correct horse battery")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_label("Answer with")).to_have_value("tiny")
    seen.ask(ALARM)
    page.reload()
    expect(page.get_by_label("Answer with")).to_have_value("tiny")
    assert "correct horse battery" not in page.content()


# What the browser is held to


def test_the_page_is_one_file_that_may_do_little(see: Any) -> None:
    seen = see(expected="Security Policy|Trusted")
    page = seen.page
    headers = content()[1]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert not re.search(r"(src|href|action)\s*=\s*[\"'](https?:)?//", content()[0].decode())
    assert "innerHTML" not in content()[0].decode()
    blocked = page.evaluate(
        """async () => {
          const tried = [];
          const attempt = async (name, task) => { try { tried.push([name, await task()]); } catch { tried.push([name, 'blocked']); } };
          await attempt('other', () => fetch('http://127.0.0.1:9/').then(() => 'sent'));
          await attempt('markup', () => { document.body.innerHTML = '<p>'; return 'done'; });
          await attempt('script', () => new Promise((resolve, reject) => {
            const script = document.createElement('script'); script.append('window.ran = 1'); document.head.append(script);
            window.ran ? resolve('ran') : reject();
          }));
          return Object.fromEntries(tried);
        }"""
    )
    assert set(blocked.values()) == {"blocked"}
