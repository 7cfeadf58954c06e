"""The page: complete, harmless, reproducible, readable; looked at by a real browser where there is one."""

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from explain_toys import PointsDataModule, points_module, text_data, texts_module, with_prototypes

from ddcl_lightning.explain import Explanation, collect, render
from ddcl_lightning.explain.explanation import TokenView
from ddcl_lightning.explain.views import bar, hue, percent, sentence

VOID = {"meta", "img", "br", "input", "link"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Checks that every element is closed, and notes elements, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        words = " ".join(" ".join(self.words).split())
        return re.sub(r" ([,.])", r"\1", words)


def points(**kwargs: Any) -> Explanation:
    return collect(points_module(), PointsDataModule(), **{"examples": 2, "inputs": 3, **kwargs})


def texts(**kwargs: Any) -> Explanation:
    return collect(texts_module(), text_data(), **{"examples": 2, "indices": [4, 2], **kwargs})


def test_two_runs_give_the_same_bytes() -> None:
    assert render(points()) == render(points())
    assert render(texts()) == render(texts())


def test_page_is_well_formed_and_says_what_was_collected() -> None:
    page = Page(render(points(checkpoint="last.ckpt")))
    assert "Points: 2 prototypes" in page.text
    assert "IdentityBackbone → DDCLReadout → Clustering · weights last.ckpt" in page.text
    assert "seen through 12 training samples." in page.text
    for part in ("In use 2 of 2", "Perplexity 2", "ACC 1.000", "NMI 1.000", "Temperature 1"):
        assert part in page.text
    assert "Prototype 0" in page.text
    assert "mostly low" in page.text
    assert "50 % of the samples (6)" in page.text
    assert page.tags.count("img") == 2 * 2 + 3
    assert {"head0", "inputs", "guide", "p0", "p1"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_links_lead_somewhere() -> None:
    page = Page(render(points()))
    targets = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert targets
    assert all(target.removeprefix("#") in page.ids for target in targets)


def test_nothing_is_fetched() -> None:
    html = render(points())
    page = Page(html)
    assert not {"link", "iframe", "object", "base", "form"} & set(page.tags)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "action", "srcset")]
    assert sources
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in html


def test_texts_and_names_of_the_data_are_never_markup() -> None:
    html = render(texts())
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(&#x27;pwned&#x27;)&lt;/script&gt;" in html
    assert Page(html).tags.count("script") == 1
    assert "<b>cow" not in html
    assert "<i>high" not in render(points())
    evil = '"><img src=x onerror=alert(1)>'
    found = points()
    sample = dataclasses.replace(found.inputs[0].sample, label=evil)
    view = dataclasses.replace(found.inputs[0], sample=sample, predicted=evil)
    page = Page(render(dataclasses.replace(found, data=evil, model=[evil], checkpoint=evil, inputs=[view])))
    assert all(name not in ("onerror", "onclick", "onload") for _, name, _ in page.attributes)
    assert page.tags.count("img") == 2 * 2 + 1


def test_tokens_are_tinted_and_marked() -> None:
    page = Page(html := render(texts()))
    assert re.findall(r"<mark>(\w+)</mark>", html)[:2] == ["cat", "cat"]
    tinted = re.findall(r'title="prototype (\d)">([^<]*)<', html)
    assert ("0", "cat") in tinted
    assert ("0", "dog") in tinted
    assert ("2", "the") in tinted
    assert "every token is tinted" in page.text.lower()
    assert "Characteristic words" in page.text
    # The whole text is there, once, whatever its tokens.
    assert "the <b>cow</b> and the cat & the dog" in page.text


def test_tokens_that_overlap_or_leave_gaps_do_not_repeat_or_lose_text() -> None:
    found = texts(indices=[0])
    tokens = [
        TokenView((4, 7), 0, 0.9),
        TokenView((0, 5), 1, 0.9),
        TokenView((8, 11), 2, 0.3),
        TokenView((12, 15), 2, 0.3),
    ]
    view = dataclasses.replace(found.inputs[0], tokens=[tokens])
    page = Page(render(dataclasses.replace(found, inputs=[view])))
    assert page.text.count("the cat saw the dog") >= 1
    spans = re.findall(r'<span class="t"[^>]*>([^<]*)</span>', render(dataclasses.replace(found, inputs=[view])))
    assert spans == ["the c", "saw the"]


def test_dead_prototypes_are_named() -> None:
    html = render(texts())
    assert "Dead, nearest to nothing in the data: 3." in html
    assert "Dead: nearest to no token of the data." in html
    assert "Nearest, though not near" in html
    alive = render(points())
    assert "Dead, nearest" not in alive
    assert "none is dead" in alive
    module = with_prototypes(points_module(), [[50.0, 0.0], [9e3, 0.0]])
    assert "nearest to no sample of the data" in render(collect(module, PointsDataModule()))


def test_heads_have_a_section_each() -> None:
    page = Page(render(collect(points_module(heads=2), PointsDataModule(), inputs=1)))
    assert "2 heads of 2 prototypes" in page.text
    assert {"head0", "head1", "p0.1", "p1.1"} <= set(page.ids)
    assert "prototype 1.0" in page.text


def test_predictions_are_judged() -> None:
    found = points()
    views = [
        dataclasses.replace(found.inputs[0], predicted="low"),
        dataclasses.replace(found.inputs[0], predicted="other"),
    ]
    page = Page(render(dataclasses.replace(found, inputs=views, accuracy=0.5)))
    label = found.inputs[0].sample.label
    assert f"Predicted low, true class {label}" in page.text
    assert "✗ wrong" in page.text
    assert "wrong predictions only" in [value for _, name, value in page.attributes if name == "data-only"]


def test_samples_without_anything_to_show_are_numbers() -> None:
    found = points()

    def bare(sample: Any) -> Any:
        return dataclasses.replace(sample, content=None, label=None)

    prototypes = [
        dataclasses.replace(p, nearest=[dataclasses.replace(n, sample=bare(n.sample)) for n in p.nearest])
        for p in found.heads[0].prototypes
    ]
    head = dataclasses.replace(found.heads[0], prototypes=prototypes)
    inputs = [dataclasses.replace(view, sample=bare(view.sample)) for view in found.inputs]
    page = Page(render(dataclasses.replace(found, heads=[head], inputs=inputs, complete=False)))
    assert "img" not in page.tags
    assert "#1 d 0" in page.text
    assert "(a part of them)" in page.text


def test_shares_in_words() -> None:
    assert (
        sentence([0.0, 0.62, 0.28, 0.06, 0.04])
        == "62 % prototype 1, 28 % prototype 2, 6.0 % prototype 3, 4.0 % in 1 other"
    )
    assert sentence([1.0, 0.0]) == "100 % prototype 0"
    assert sentence([0.02] * 50).startswith("2.0 % prototype 0, 98 % in 49 others")
    assert sentence([0.4, 0.6], "1.") == "60 % prototype 1.1, 40 % prototype 1.0"
    assert [percent(share) for share in (0.0, 0.0002, 0.004, 0.0994, 0.0996, 0.5, 1.0)] == [
        *["0 %", "<0.1 %", "0.4 %", "9.9 %", "10 %", "50 %", "100 %"]
    ]
    assert bar([0.999, 0.001], "").count("<span") == 1
    assert len({hue(number) for number in range(60)}) > 55


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
@pytest.mark.slow
@pytest.mark.parametrize("make", [points, texts])
def test_a_browser_shows_it_without_complaint(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(make()), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    assert CHROMIUM is not None
    found = subprocess.run(
        [CHROMIUM, *options, "--enable-logging=stderr", "--window-size=390,900", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in found.stderr, found.stderr  # neither errors of the script nor refusals of the policy
    page = Page(found.stdout)
    assert {"head0", "inputs", "guide", "p0"} <= set(page.ids)
    # The script ran: it has filled the controls and shown them.
    assert "Find" in page.text
    assert not [1 for tag, name, _ in page.attributes if (tag, name) == ("div", "hidden")]
