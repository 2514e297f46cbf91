import pytest


def test_numbers_stay_on_a_line_except_in_blocks_of_code():
    markdown = pytest.importorskip("markdown")
    text = "64.9 ± 0.1 and 12.5 % and a ± b\n\n```\n1 ± 2\n```\n"
    html = markdown.markdown(text, extensions=["fenced_code", "tools.docs.spaces"])
    assert html.startswith("<p>64.9&nbsp;±&nbsp;0.1 and 12.5&nbsp;% and a ± b</p>")
    assert "1 ± 2" in html
