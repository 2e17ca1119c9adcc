"""The page as somebody uses it, in a browser without a window: Debian's chromium, driven by Playwright."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from tests.server.conftest import Here

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path"),
    pytest.mark.filterwarnings("ignore"),  # Playwright's
]
NUMBERS = re.compile(r"^\d+ tokens? · [\d.]+ tokens/s · first after [\d.]+ m?s")

Page = Any  # of Playwright
Visit = Callable[[Page, Here], Coroutine[Any, Any, None]]


@asynccontextmanager
async def running(server: Here) -> AsyncIterator[None]:
    import os
    import signal

    task = asyncio.create_task(server.process.run())
    await server.ready()
    try:
        yield
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await task


def visit(server: Here, what: Visit, **context: Any) -> None:
    """Opens the page and does something there; afterwards nothing was said to the console, and no other host asked."""
    said: list[str] = []
    asked: set[str] = set()

    async def main() -> None:
        async with running(server), import_module("playwright.async_api").async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = await (await browser.new_context(**context)).new_page()
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
            page.on("request", lambda request: asked.add(request.url.split("/")[2]))
            await page.goto(server.url)
            await what(page, server)
            await browser.close()

    asyncio.run(main())
    assert [text for text in said if "status of 401" not in text and "status of 429" not in text] == []
    assert asked == {server.url.removeprefix("http://")}


async def sampled(page: Page) -> None:
    """Settings with which the tiny model says something: it repeats a line end otherwise."""
    await page.fill("[name=temperature]", "2")
    await page.fill("[name=seed]", "1")


async def ask(page: Page, question: str) -> None:
    await page.fill("#prompt", question)
    await page.keyboard.press("Enter")


async def answered(page: Page) -> str:
    """Waits for the end of the answer; the numbers below it."""
    await page.wait_for_selector("#send:not([hidden])")
    return await page.locator(".foot").last.inner_text()


async def scripted(page: Page, *pieces: str, status: int = 200) -> None:
    """Has the API answer this."""
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [], "usage": {"completion_tokens": len(pieces)}})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    if status != 200:
        body = json.dumps({"error": {"message": pieces[0], "code": status}})

    async def fulfil(route: Any) -> None:
        await route.fulfill(status=status, body=body, content_type="text/event-stream")

    await page.route("**/v1/chat/completions", fulfil)


def test_a_talk(here: Callable[..., Here]) -> None:
    bodies: list[dict[str, Any]] = []

    async def talk(page: Page, server: Here) -> None:
        page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
        await page.wait_for_selector("#state[data-state=ready]")
        assert await page.inner_text("#model") == "tiny"
        assert await page.evaluate("document.activeElement.id") == "prompt"
        await sampled(page)
        await page.fill("[name=max_completion_tokens]", "12")
        await page.fill("[name=system]", "S")
        await ask(page, "a")
        assert NUMBERS.match(await answered(page))
        await page.fill("[name=system]", "")
        await ask(page, "b")
        assert NUMBERS.match(await answered(page))
        assert await page.locator(".turn").count() == 2
        assert await page.locator(".again").count() == 1
        await page.click(".again")
        await answered(page)
        await page.click("#new-chat")
        assert await page.locator(".turn").count() == 0

    visit(here(), talk)
    first, second, again = bodies
    assert first["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    assert (first["temperature"], first["seed"], first["max_completion_tokens"]) == (2, 1, 12)
    assert "top_p" not in first  # an empty field leaves the decision to the server
    roles = [message["role"] for message in second["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert again == second


@pytest.mark.parametrize("how", ["key", "button"])
def test_stop(here: Callable[..., Here], how: str) -> None:
    async def stop(page: Page, server: Here) -> None:
        await sampled(page)
        await ask(page, "a")
        await page.wait_for_selector(".numbers:not(:empty)")
        await (page.keyboard.press("Escape") if how == "key" else page.click("#stop"))
        assert "stopped" in await answered(page)
        await server.until(lambda: not server.service.in_flight)
        await server.until(lambda: server.engine.scheduler_stats().pages_owned == 0)

    visit(here(slow=0.2), stop)


def test_the_live_view(here: Callable[..., Here]) -> None:
    async def look(page: Page, server: Here) -> None:
        await sampled(page)
        await ask(page, "a")
        await page.wait_for_selector("#running:text-is('1')")
        assert float(await page.get_attribute("#kv-meter", "aria-valuenow")) > 0
        await page.keyboard.press("Escape")
        await page.wait_for_selector("#running:text-is('0')")
        await page.wait_for_selector("#kv:text-is('0 %')")
        assert (await page.locator("#spark polyline").get_attribute("points")).count(",") >= 1

    visit(here(slow=0.15), look)


def test_what_a_model_writes_is_text(here: Callable[..., Here]) -> None:
    evil = '<img src=x onerror=alert(1)> <script>alert(1)</script> [a](javascript:alert(1)) `<b>` <a href="//x">'
    pieces = (
        f"# Head\n\n{evil}\n\n- one **bold**\n",
        "- two\n  1. deep\n\n```py",
        "thon\nx = '<i>'\n",
        "\ny = 2\n```\n> said",
    )

    async def look(page: Page, server: Here) -> None:
        await scripted(page, *pieces)
        await ask(page, evil)
        await answered(page)
        text = await page.inner_text(".answer")
        assert evil.replace("`", "") in text
        assert evil in await page.inner_text(".mine")
        inside = await page.evaluate("[...document.querySelectorAll('.turn *')].map((node) => node.localName)")
        assert not {"img", "script", "a", "b", "i"} & set(inside)
        assert {"h3", "li", "ol", "strong", "code", "pre", "blockquote"} <= set(inside)
        assert await page.inner_text(".block code") == "x = '<i>'\n\ny = 2"
        assert await page.inner_text(".block header span") == "python"

    visit(here(), look)


def test_pieces_of_any_size_make_the_same_page(here: Callable[..., Here]) -> None:
    text = "A *b* **c**\n\n1. x\n2. y\n\n   more\n\nend `d`\n\n~~~js\n```\n~~~\n\n---\n- p\n\n  - q\n\nz"

    async def look(page: Page, server: Here) -> None:
        seen = set[str]()
        for pieces in ([text], list(text), [text[at : at + 7] for at in range(0, len(text), 7)]):
            await page.evaluate("document.getElementById('new-chat').click()")
            await scripted(page, *pieces)
            await ask(page, "a")
            await answered(page)
            seen.add(await page.evaluate("document.querySelector('.answer').outerHTML"))
        assert len(seen) == 1
        (html,) = seen
        assert '<ol start="1"><li>x</li><li>y<p>more</p></li></ol>' in html

    visit(here(), look)


def test_a_key(here: Callable[..., Here]) -> None:
    async def unlock(page: Page, server: Here) -> None:
        await page.wait_for_selector("#key-dialog[open]")
        await page.fill("#key", "wrong")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#key-problem:not(:empty)")
        await page.fill("#key", "right")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#model:text-is('tiny')")
        await sampled(page)
        await page.fill("[name=max_completion_tokens]", "4")
        await ask(page, "a")
        assert "token" in await answered(page)
        assert "right" not in await page.evaluate("JSON.stringify(localStorage) + document.cookie")

    visit(here(api_key=("right",)), unlock)


def test_a_refusal_is_shown_and_the_question_may_be_asked_again(here: Callable[..., Here]) -> None:
    async def look(page: Page, server: Here) -> None:
        await scripted(page, "The queue is full.", status=429)
        await ask(page, "a")
        await answered(page)
        assert await page.inner_text(".turn .problem") == "The queue is full."
        await page.unroute("**/v1/chat/completions")
        await scripted(page, "yes")
        await page.click(".again")
        await answered(page)
        assert await page.locator(".turn .problem").count() == 0
        assert await page.inner_text(".answer") == "yes"

    visit(here(), look)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(here: Callable[..., Here], width: int) -> None:
    async def look(page: Page, server: Here) -> None:
        await scripted(page, "```\n" + "long " * 80 + "\n```\n\n" + "word" * 100)
        await ask(page, "much" * 60)
        await answered(page)
        for selector in ("html", "#scroll", ".turn"):
            wide = await page.evaluate(
                f"(([n]) => n.scrollWidth - n.clientWidth)(document.querySelectorAll('{selector}'))"
            )
            assert wide <= 0, selector
        toggle = page.locator("#panel-toggle")
        if width < 960:
            assert not await page.is_visible("#panel")
            await toggle.click()
            assert await toggle.get_attribute("aria-expanded") == "true"
        assert await page.is_visible("#panel")
        assert await page.is_visible("#send")

    visit(here(), look, viewport={"width": width, "height": 700})


def test_the_keyboard_reaches_everything_and_everything_has_a_name(here: Callable[..., Here]) -> None:
    async def look(page: Page, server: Here) -> None:
        await scripted(page, "```\nx\n```")
        await ask(page, "a")
        await answered(page)
        wanted = await page.evaluate(
            "[...document.querySelectorAll('button,input,textarea,a[href],pre')]"
            ".filter((n) => n.checkVisibility() && !n.disabled).length"
        )
        await page.evaluate("document.activeElement.blur()")
        reached: list[Any] = []
        for _ in range(wanted + 3):
            await page.keyboard.press("Tab")
            name = "document.activeElement.labels?.[0]?.textContent || document.activeElement.textContent"
            reached.append(await page.evaluate(f"[document.activeElement.outerHTML, {name}]"))
        found = {html: name for html, name in reached if not html.startswith("<body")}
        assert len(found) >= wanted - 1  # two buttons to copy are the same
        assert all(name.strip() for name in found.values()), found

    visit(here(), look)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(here: Callable[..., Here], scheme: str) -> None:
    """WCAG 2.2's contrast of 4.5, for every text that is on the page."""
    measure = """() => {
      const light = (color) => {
        const parts = color.match(/[\\d.]+/g).map(Number);
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = parts.slice(0, 3).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ground = (node) => {
        const color = getComputedStyle(node).backgroundColor;
        return /, 0\\)$/.test(color) && node.parentElement ? ground(node.parentElement) : color;
      };
      const nodes = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() && !node.disabled
        && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
      return nodes.map((node) => {
        const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
        return [node.outerHTML.slice(0, 80), (a + 0.05) / (b + 0.05)];
      });
    }"""

    async def look(page: Page, server: Here) -> None:
        await scripted(page, "text `code`\n\n```\nx\n```\n> said")
        await ask(page, "a")
        await answered(page)
        await page.fill("#prompt", "b")  # so that the button to send is no longer disabled
        contrasts = await page.evaluate(measure)
        assert len(contrasts) > 20
        assert [pair for pair in contrasts if pair[1] < 4.5] == []

    visit(here(), look, color_scheme=scheme)
