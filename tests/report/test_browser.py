"""Report pages in a browser, on a desktop and a phone, in light and dark mode."""

import json

import pytest

from tests.report.test_study_figures import DATA
from tubelet import report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def addresses(run_folder, tmp_path_factory):
    """The pages of a run, of a comparison and of a study."""
    other = tmp_path_factory.mktemp("other") / "run"
    other.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        (other / name).write_bytes((run_folder / name).read_bytes())
    study = tmp_path_factory.mktemp("study")
    results = {**DATA, "verdict": ["It helps."], "notes": ["A note."], "random_scales": {}, "cost": {}}
    (study / "study.json").write_text(json.dumps({"title": "Study", "datasets": {"clips": results}}))
    pages = [report.write(run_folder), report.compare([run_folder, other], other), report.write(study)]
    return [page.resolve().as_uri() for page in pages]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_fit_and_follow_the_color_scheme(addresses, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else problems.append(asked.url))
    for address in addresses:
        page.goto(address)
        found = page.evaluate(
            """() => {
                const light = color => color.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) > 384;
                const style = element => getComputedStyle(element);
                return {
                    headings: document.querySelectorAll('h1').length,
                    wide: document.documentElement.scrollWidth > window.innerWidth,
                    page: light(style(document.querySelector('main')).backgroundColor),
                    text: light(style(document.body).color),
                    plots: [...document.querySelectorAll('img.plot')].map(i => style(i).filter !== 'none'),
                    narrow: [...document.querySelectorAll('img:not(.wide)')].every(
                        i => i.getBoundingClientRect().right <= window.innerWidth),
                };
            }"""
        )
        dark = scheme == "dark"
        assert found["headings"] == 1
        assert not found["wide"], address
        assert found["narrow"], address
        assert (found["page"], found["text"]) == (not dark, dark)
        assert found["plots"]
        assert set(found["plots"]) == {dark}
    context.close()
    assert not problems
