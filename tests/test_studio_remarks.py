"""What the studio page tells of a run while it runs and when it fails, in a browser before a stand-in for ComfyUI."""

import json
import threading
from contextlib import contextmanager

import pytest
from fake_server import Broken, FakeServer, until
from web_page import Page, copy_web, needs_browser

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600), needs_browser]

CUT_OFF = "the generated views (seed 3) are faulty: the back panel is empty: try another seed"
MEMORY = "out of memory: choose a smaller texture"
DREW = "triptych-tiny drew front, left, back, right"


class Job:
    """Draws views with a warning, waits until it may go on, then fails in the reconstruction."""

    def __init__(self):
        self.go_on = threading.Event()
        self.speaks = True

    def __call__(self, server, prompt_id, graph):
        until(lambda: ("GET", f"/history/{prompt_id}") in server.requests, 60)
        (draw,) = (node for node, content in graph.items() if content["class_type"] == "Triptych_FluxViews")
        (make,) = (node for node, content in graph.items() if content["class_type"] == "Triptych_Reconstruct")
        facts = {"generated": ["front"], "seed": 3, "rerolls": 0, "warnings": [CUT_OFF]}
        shown = {"text": [f"{DREW}\n{CUT_OFF}"], "triptych_views": [facts]}
        if self.speaks:
            server.send("executed", prompt_id=prompt_id, node=draw, output=shown)
        assert self.go_on.wait(120)
        data = {"node_id": make, "exception_message": MEMORY, "prompt_id": prompt_id}
        raise Broken("execution_error", outputs={draw: shown}, **data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@contextmanager
def studio(page, folder, job):
    copy_web(folder)
    with FakeServer(job, pages=folder) as server:
        page.goto(f"{server.url}/extensions/triptych/studio.html")
        page.wait("document.getElementById('server').textContent.startsWith('Connected')")
        page.evaluate("document.getElementById('sentence').value = 'a red chair'; 0")
        yield server


def warnings(page):
    """Those that can be seen."""
    return page.evaluate("warnings.hidden ? [] : [...warnings.children].map(item => item.textContent)")


def test_warnings_of_the_views_are_shown_while_the_mesh_is_made_and_when_it_fails(page, tmp_path):
    job = Job()
    with studio(page, tmp_path, job):
        page.click("#make")
        page.wait("!warnings.hidden")
        assert warnings(page) == [CUT_OFF] and page.evaluate("make.disabled") is True
        assert page.evaluate("report.textContent") == DREW
        job.go_on.set()
        page.wait("!document.getElementById('error').hidden")
        assert page.evaluate("error.textContent") == f"Making the shape: {MEMORY}"
        assert warnings(page) == [CUT_OFF]
        page.keep("studio_failed_with_warning")

        job.go_on.clear()
        job.speaks = False
        page.click("#make")
        page.wait("document.getElementById('error').hidden")
        assert warnings(page) == [] and page.evaluate("report.hidden") is True, "nothing of the run before"
        job.go_on.set()
        page.wait("!document.getElementById('error').hidden")
        assert warnings(page) == [CUT_OFF], "the history tells what the websocket has not"


def test_a_sentence_of_the_loader_is_a_warning(page, tmp_path):
    note = "the LoRA chair was trained on another model"

    def job(server, prompt_id, graph):
        loader = next(node for node, content in graph.items() if content["class_type"] == "Triptych_LoadFlux")
        raise Broken("execution_error", outputs={loader: {"text": [note]}}, node_id=loader, exception_message="no")

    with studio(page, tmp_path, job):
        page.click("#make")
        page.wait("!document.getElementById('error').hidden")
        assert warnings(page) == [note]
        assert json.loads(page.evaluate("JSON.stringify(localStorage.getItem('triptych.job'))")) is None
