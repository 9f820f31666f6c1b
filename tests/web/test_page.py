"""The page as users have it: a process, a browser, another program, and a killed page. One run trains meanwhile."""
from __future__ import annotations

import json
import shutil
import signal
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.page_process import ROOT, PageProcess
from PIL import Image

from ldm.concepts.storage import load_concepts
from ldm.inference.output_folder import read_metadata
from ldm.web.run_queue import RunQueue

pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]

PHOTOS = sorted((ROOT / "models" / "mini" / "examples" / "teddy").glob("*.png"))
CONCEPT = ROOT / "tests" / "integrations" / "my-teddy.safetensors"
WAIT = 120_000  # milliseconds; machines are shared
SECRET = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageProcess]:
    runs = tmp_path_factory.mktemp("page") / "runs"
    (runs / "concepts").mkdir(parents=True)
    shutil.copy(CONCEPT, runs / "concepts")
    served = PageProcess.start(runs)
    yield served
    served.kill()
    queue = RunQueue(runs)
    for run in queue.runs():
        if (process := queue.process_of(run)) is not None:
            process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def tab(page: PageProcess, browser: Any) -> Any:
    """The page in a tab that notes which hosts it asks."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(WAIT)
    opened.hosts = set()
    opened.on("request", lambda request: opened.hosts.add(request.url.split("/")[2]))
    opened.goto(page.address)
    opened.locator("#run-status").get_by_text("No concept yet").wait_for()  # what it loads is there
    return opened


@pytest.fixture(scope="module")
def client(page: PageProcess) -> Any:
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(page.address, verbose=False)


def test_photos_become_a_draft_that_a_reload_keeps(tab: Any, page: PageProcess) -> None:
    tab.locator("#photo-files input[type=file]").set_input_files([str(path) for path in PHOTOS])
    tab.locator("#reviewed-photos img").nth(len(PHOTOS) - 1).wait_for()
    kind, word = tab.get_by_label("What is it?"), tab.get_by_label("Its word in prompts")
    playwright.expect(kind).to_have_value("teddy bear", timeout=WAIT)
    assert word.input_value() == "<my-teddy-bear>"
    word.fill("<my-bear>")
    word.press("Tab")
    _wait_for(lambda: "<my-bear>" in next(page.runs.glob("2*/form.json")).read_text())
    tab.reload()
    tab.locator("#reviewed-photos img").nth(len(PHOTOS) - 1).wait_for()
    assert kind.input_value() == "teddy bear"
    assert word.input_value() == "<my-bear>"


def test_files_that_are_no_photos_are_named(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (tmp_path / "b.png").write_bytes(b"\x80\x04K\x01.")
    Image.new("1", (22_400, 22_400)).save(tmp_path / "c.png")
    with zipfile.ZipFile(tmp_path / "d.jpg", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("zeros", bytes(10_000_000))
    tab.locator("#photo-files input[type=file]").set_input_files([str(path) for path in sorted(tmp_path.iterdir())])
    problems = tab.locator("#photo-problems")
    for name in ("a.svg:", "b.png:", "c.png:", "d.jpg:"):
        problems.get_by_text(name).wait_for()
    assert tab.locator("#reviewed-photos img").count() == len(PHOTOS)


def test_keys_alone_teach(tab: Any) -> None:
    tab.get_by_role("button", name="Advanced").locator("visible=true").first.press("Enter")
    steps = tab.get_by_role("spinbutton", name="Training steps")
    steps.fill("400")
    steps.press("Tab")
    button = tab.get_by_role("button", name="Teach", exact=True)
    for _ in range(20):
        if button.evaluate("button => button === document.activeElement"):
            break
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.get_by_text("is in the list of your concepts").wait_for()
    assert "main.py" in tab.locator("#teach-command .cm-content").inner_text()


def test_a_reload_and_a_second_tab_show_the_progress(tab: Any, page: PageProcess, browser: Any) -> None:
    tab.reload()
    tab.locator("#run-status progress").wait_for()
    other = browser.new_page()
    other.goto(page.address)
    other.locator("#run-status").get_by_text("<my-bear>").first.wait_for(timeout=WAIT)
    other.close()


def test_keys_alone_generate(tab: Any) -> None:
    tab.get_by_role("tab", name="Generate").press("Enter")
    concepts = tab.get_by_label("Concepts").locator("visible=true").first
    concepts.focus()
    tab.get_by_role("option", name=CONCEPT.name).wait_for()
    concepts.press_sequentially("teddy")
    tab.keyboard.press("Enter")
    chip = tab.locator("#chips button").first
    chip.press("Enter")
    prompt = tab.locator("#prompt textarea")
    playwright.expect(prompt).to_have_value("a photo of a <my-teddy>", timeout=WAIT)
    prompt.press("Enter")
    tab.get_by_text("4 images, in").wait_for()
    assert tab.locator("#images img").count() >= 4
    assert "--prompt 'a photo of a <my-teddy>'" in tab.locator("#generate-command .cm-content").inner_text()


def test_moving_the_bias_makes_the_same_images_anew(tab: Any, page: PageProcess) -> None:
    before = _settings(page)
    assert len(before) == 4
    number = tab.locator("#bias input[type=number]")
    number.fill("0.9")
    number.press("Tab")  # as letting the slider go
    _wait_for(lambda: len(_settings(page)) == 2 * len(before))
    tab.locator("#before-after img").first.wait_for()
    after = _settings(page)
    assert [one["seed"] for one in after[-4:]] == [one["seed"] for one in before[-4:]]
    assert after[-1]["concepts"][0]["bias"] == 0.9


def test_nothing_is_asked_of_another_host(tab: Any, page: PageProcess) -> None:
    assert tab.hosts == {page.address.removeprefix("http://")}


@pytest.mark.parametrize("width", WIDTHS)
def test_no_tab_is_wider_than_the_window(tab: Any, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    for name in ("Teach", "Generate", "Combine", "Compare"):
        target = tab.get_by_role("tab", name=name)
        if not target.is_visible():
            tab.locator(".overflow-menu button").first.click()
            target = tab.locator(".overflow-dropdown button", has_text=name)
        target.click()
        tab.wait_for_timeout(300)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(UNNAMED) == []
    tab.set_viewport_size({"width": 1280, "height": 900})


def test_other_programs_generate_and_merge(client: Any, tmp_path: Path) -> None:
    titles = client.predict(api_name="/list_concepts")
    assert titles == [CONCEPT.name]
    made = client.predict("a photo of a <my-teddy>", titles, 0.6, 5, 1, 3, api_name="/generate")
    assert read_metadata(made[0])["seed"] == 5
    merged = client.predict(titles, ["<bear>"], "../../merged", api_name="/merge")
    assert [concept.placeholder for concept in load_concepts(merged)] == ["<bear>"]


@pytest.mark.parametrize(("endpoint", "arguments", "message"), [
    ("generate", ["a dog", ["/etc/passwd"]], "no such concept"),
    ("generate", ["word " * 100_000], "at most 2000"),
    ("generate", ["a dog", [], -1, -1, -4], "images: give a number"),
    ("download", ["../../etc/passwd"], "no such concept"),
    ("stop", ["../concepts"], "this run is gone"),
    ("teach", [[{"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}], "dog"], "hostname: cannot be read")])
def test_hostile_calls_get_one_line(client: Any, endpoint: str, arguments: list[Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        client.predict(*arguments, api_name=f"/{endpoint}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "setup.py"), str(Path.home() / ".bashrc"),
                                  "{runs}/../secret.txt"])
def test_no_file_outside_of_the_runs_is_served(page: PageProcess, path: str) -> None:
    (page.runs.parent / "secret.txt").write_text("secret")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{page.address}/gradio_api/file={path.format(runs=page.runs)}")
    assert caught.value.code in (403, 404)


@pytest.mark.parametrize(("event", "data", "message"), [
    ("add_files", [[SECRET], None, "", "balanced", "", 0, 23, "subject"], "not uploaded"),
    ("add_file", [SECRET, []], "not uploaded"),
    ("delete_run", ["../concepts"], "this run is gone"),
    ("toggle_photo", ["../../../etc/passwd", None, "", "balanced", "", 0, 23, "subject"], "this photo is gone"),
    ("merge_1", [["/etc/passwd"], {"headers": ["a", "b"], "data": [["x", "<y>"]]}, "m"], "this concept is gone")])
def test_events_of_the_page_reach_nothing_outside(page: PageProcess, event: str, data: list[Any], message: str) -> None:
    with urllib.request.urlopen(f"{page.address}/config") as answer:
        events = {one["api_name"]: one["id"] for one in json.load(answer)["dependencies"]}
    body = json.dumps({"data": data, "fn_index": events[event], "session_hash": event}).encode()
    request = urllib.request.Request(f"{page.address}/gradio_api/queue/join", body,
                                     {"content-type": "application/json"})
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{page.address}/gradio_api/queue/data?session_hash={event}", timeout=60) as lines:
        result = next(line.decode() for line in lines if b"process_completed" in line)
    assert message in json.loads(result.removeprefix("data:"))["output"]["error"]


def test_a_killed_page_and_a_killed_training_lose_nothing(page: PageProcess, client: Any) -> None:
    from gradio_client import Client

    queue = RunQueue(page.runs)
    run = queue.prepared_runs()[0]
    _wait_for(lambda: run.checkpoint is not None)
    page.kill()
    training = queue.process_of(run)
    assert training is not None and training.is_running()
    restarted = PageProcess.start(page.runs)
    page.process, page.address = restarted.process, restarted.address
    other = Client(page.address, verbose=False)
    assert [one["state"] for one in other.predict(api_name="/runs")] == ["training"]
    training.send_signal(signal.SIGKILL)
    _wait_for(lambda: other.predict(api_name="/runs")[0]["state"] == "interrupted")
    other.predict(run.name, api_name="/go_on")
    _wait_for(lambda: queue.process_of(run) is not None)
    assert "--resume" in queue.process_of(run).cmdline()


def _settings(page: PageProcess) -> list[dict[str, Any]]:
    return [read_metadata(path) for path in sorted((page.runs / "images" / "samples").glob("*.png"))]


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + WAIT / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


# Visible controls and images without a name for screen readers.
UNNAMED = """() => [...document.querySelectorAll('button, input, textarea, img')].filter(element => {
    if (!element.checkVisibility() || element.type === 'hidden' || element.getClientRects().length === 0) return false
    if (element.tagName === 'IMG') return !element.hasAttribute('alt')
    const labels = element.labels ? [...element.labels].map(label => label.textContent).join('') : ''
    const images = [...element.querySelectorAll('img')].map(image => image.alt).join('')
    return !(labels + images + element.textContent + (element.ariaLabel || '') + (element.title || '')
             + (element.getAttribute('aria-labelledby') || '')).trim()
}).map(element => element.outerHTML.slice(0, 200))"""
