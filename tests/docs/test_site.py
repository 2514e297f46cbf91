"""The website: builds without warnings, and works in a browser on a desktop and a phone, in light and dark mode."""

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from urllib.parse import urljoin, urlsplit

import pytest

from tests.docs.pages import ROOT

NEEDED = ("zensical", "latex2mathml")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, NEEDED)), reason=f"{' and '.join(NEEDED)} are not installed"
    ),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the site is built from."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("reference"))
    for name in ("app", "evals", "src", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    return folder


def build(folder):
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "tools.docs"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(checkout):
    """The address of the site."""
    result = build(checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    handler = functools.partial(Quiet, directory=str(checkout / "build" / "docs"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_in_a_browser(site, browser, width, scheme):
    """Visits every page that links lead to, and collects what is wrong with each."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "response", lambda answer: problems.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
    )
    page.on("request", lambda asked: None if asked.url.startswith((site, "data:")) else problems.append(asked.url))
    waiting, seen = [site], set()
    while waiting:
        address = waiting.pop()
        if address in seen:
            continue
        seen.add(address)
        page.goto(address)
        ids = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        found = page.evaluate(
            """() => ({
                headings: document.querySelectorAll('h1').length,
                viewport: document.querySelector('meta[name=viewport]')?.content ?? '',
                broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
                links: [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href')),
                wide: document.documentElement.scrollWidth > window.innerWidth,
                background: getComputedStyle(document.body).backgroundColor,
            })"""
        )
        if found["headings"] != 1 or "width=device-width" not in found["viewport"] or found["broken"] or found["wide"]:
            problems.append(f"{address}: {found}")
        dark = sum(map(int, found["background"].strip("rgba()").split(",")[:3])) < 3 * 128
        if dark != (scheme == "dark"):
            problems.append(f"{address}: background {found['background']}")
        for link in found["links"]:
            target = urlsplit(urljoin(address, link))
            plain = target._replace(fragment="").geturl()
            if plain == address and target.fragment and target.fragment not in ids:
                problems.append(f"{address}: no element {target.fragment}")
            if plain.startswith(site):
                waiting.append(plain)
    context.close()
    assert len(seen) > 40
    assert not problems


def test_a_dead_link_is_an_error(checkout, site):
    with open(checkout / "docs" / "slurm.md", "a") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    result = build(checkout)
    assert result.returncode != 0
    assert "page does not exist" in result.stdout + result.stderr
