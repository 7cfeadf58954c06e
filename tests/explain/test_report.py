"""The page: complete, harmless, reproducible, readable; looked at by a real browser where there is one."""

import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explain_toys import PointsDataModule, points_module, text_data, texts_module, with_prototypes

from ddcl_lightning.explain import Explanation, collect, render
from ddcl_lightning.explain.explanation import ClassShare, Neighbour, PrototypeView, Sample, TokenView, WordShare
from ddcl_lightning.explain.html import bar, caption, hue, percent, sentence, three_digits
from ddcl_lightning.explain.prototype_cards import prototype_card

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
    for text in ("In use 2 of 2", "Perplexity 2.00", "ACC 1.000", "NMI 1.000", "Temperature 1.00"):
        assert text in page.text
    assert "Prototype 0" in page.text
    assert "mostly low" in page.text
    assert "50 % of the samples (6)" in page.text
    assert page.tags.count("img") == 2 * 2 + 2 * 2 + 3  # members in the vocabulary and the cards, and inputs
    assert {"vocabulary", "head0", "inputs", "guide", "p0", "p1"} <= set(page.ids)
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
    explanation = points()
    sample = dataclasses.replace(explanation.inputs[0].sample, label=evil)
    view = dataclasses.replace(explanation.inputs[0], sample=sample, predicted=evil)
    page = Page(render(dataclasses.replace(explanation, data=evil, model=[evil], checkpoint=evil, inputs=[view])))
    assert all(name not in ("onerror", "onclick", "onload") for _, name, _ in page.attributes)
    assert page.tags.count("img") == 2 * 2 + 2 * 2 + 1


def test_controls_and_overrides_of_direction_are_shown() -> None:
    strange = "a\0b\x1b[2Jc\u202egnp.exe\u2066d\x9b"
    html = render(dataclasses.replace(points(), data=strange, checkpoint=strange))
    assert html.count(r"a\x00b\x1b[2Jc\u202egnp.exe\u2066d\x9b") >= 2
    assert not set(strange) & set(html) - set("ab[2Jcgnp.exed")


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
    explanation = texts(indices=[0])
    tokens = [
        TokenView((4, 7), 0, 0.9),
        TokenView((0, 5), 1, 0.9),
        TokenView((8, 11), 2, 0.3),
        TokenView((12, 15), 2, 0.3),
    ]
    view = dataclasses.replace(explanation.inputs[0], tokens=[tokens])
    page = Page(render(dataclasses.replace(explanation, inputs=[view])))
    assert page.text.count("the cat saw the dog") >= 1
    spans = re.findall(r'<span class="t"[^>]*>([^<]*)</span>', render(dataclasses.replace(explanation, inputs=[view])))
    assert spans == ["the c", "saw the"]


def test_a_quote_is_cut_between_words() -> None:
    text = "abcdefgh " * 20 + "here it is " + "ijklmnop " * 20
    at = text.index("it")
    quoted = Neighbour(Sample(0, text, None), 0.1, 0.5, (at, at + 2))
    page = Page(prototype_card(prototype(tokens=[quoted]), "", token_level=True))
    assert "Nearest tokens … abcdefgh" in page.text
    assert " here it is " in page.text
    assert "ijklmnop … #0" in page.text
    assert {"abcdefgh", "ijklmnop"} == set(re.findall(r"[a-p]*(?:gh|bc|jk|op)[a-p]*", page.text))


def test_dead_prototypes_are_named() -> None:
    html = render(texts())
    assert "Dead, nearest to nothing in the data: 3." in html
    assert "Dead: nearest to no token of the data." in html
    assert "Nearest, though not members" in html
    alive = render(points())
    assert "Dead, nearest" not in alive
    assert "none is dead" in alive
    module = with_prototypes(points_module(), [[50.0, 0.0], [9e3, 0.0]])
    assert "nearest to no sample of the data" in render(collect(module, PointsDataModule()))


def test_heads_have_a_section_each() -> None:
    page = Page(render(collect(points_module(heads=2), PointsDataModule(), inputs=1)))
    assert "2 heads of 2 prototypes" in page.text
    assert {"head0", "head1", "p0.1", "p1.1"} <= set(page.ids)
    # "8.0 % prototype 0.2" would be two numbers of which one is a name.
    assert "Head 1: 100 % prototype 0" in page.text
    assert "Prototype 1 of head 0" in page.text
    assert not re.search(r"rototype \d\.\d", page.text)
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert {"#head0", "#head1", "#inputs", "#p0.0"} <= set(links)
    assert all(link.removeprefix("#") in page.ids for link in links)


def test_predictions_are_judged() -> None:
    explanation = points()
    views = [
        dataclasses.replace(explanation.inputs[0], predicted="low"),
        dataclasses.replace(explanation.inputs[0], predicted="other"),
    ]
    page = Page(render(dataclasses.replace(explanation, inputs=views, accuracy=0.5)))
    label = explanation.inputs[0].sample.label
    assert f"Predicted low, true class {label}" in page.text
    assert "✗ wrong" in page.text
    assert "wrong predictions only" in [value for _, name, value in page.attributes if name == "data-only"]


def test_samples_without_anything_to_show_are_numbers() -> None:
    explanation = points()

    def bare(sample: Any) -> Any:
        return dataclasses.replace(sample, content=None, label=None)

    prototypes = [
        dataclasses.replace(p, nearest=[dataclasses.replace(n, sample=bare(n.sample)) for n in p.nearest])
        for p in explanation.heads[0].prototypes
    ]
    head = dataclasses.replace(explanation.heads[0], prototypes=prototypes)
    inputs = [dataclasses.replace(view, sample=bare(view.sample)) for view in explanation.inputs]
    page = Page(render(dataclasses.replace(explanation, heads=[head], inputs=inputs, complete=False)))
    assert "img" not in page.tags
    assert "#1 d 0.00" in page.text
    assert "(a part of them)" in page.text


def test_shares_in_words() -> None:
    def words(shares: list[float]) -> str:
        return sentence(shares).replace("\u00a0", " ")

    assert words([0.0, 0.62, 0.28, 0.06, 0.04]) == "62 % prototype 1, 28 % prototype 2, 10 % in 2 others"
    assert words([1.0, 0.0]) == "100 % prototype 0"
    assert words([0.3, 0.29, 0.21, 0.2]) == "30 % prototype 0, 29 % prototype 1, 21 % prototype 2, 20 % in 1 other"
    # Even shares need no list, and a thousand small ones are still a part.
    assert words([0.02] * 50) == "2.0 % prototype 0, 98 % in 49 others"
    assert words([0.4, *[0.0006] * 1000]) == "40 % prototype 0, 60 % in 1000 others"


def test_numbers_are_rounded_alike_and_kept_with_their_sign() -> None:
    texts = [percent(share) for share in (0.0, 0.0002, 0.004, 0.0994, 0.0996, 0.5, 1.0)]
    assert texts == ["0\u00a0%", "<0.1\u00a0%", "0.4\u00a0%", "9.9\u00a0%", "10\u00a0%", "50\u00a0%", "100\u00a0%"]
    assert [three_digits(value) for value in (2.0, 2.09, 2.1, 0.0202, 99.96, 104.2, 1234.5)] == [
        *["2.00", "2.09", "2.10", "0.0202", "100", "104", "1,234"]
    ]
    words = [WordShare("a", 3.0), WordShare("b", 3.31), WordShare("c", 14.2)]
    page = Page(prototype_card(prototype(words=words), "", token_level=False))
    assert "a \u00d73.0 b \u00d73.3 c \u00d714" in page.text


def test_a_bar_leads_to_the_cards_and_leaves_out_what_cannot_be_seen() -> None:
    html = bar([0.9, 0.099, 0.001], "1.")
    assert re.findall(r'href="(.*?)"', html) == ["#p1.0", "#p1.1"]
    assert len({hue(number) for number in range(60)}) > 55


def prototype(**kwargs: Any) -> PrototypeView:
    return PrototypeView(number=0, samples=5, share=0.5, weight=0.5, token_share=0.5, nearest=[], **kwargs)


def test_what_a_prototype_stands_for_in_a_few_words() -> None:
    mostly = [ClassShare("9", 0.9, 0.1), ClassShare("4", 0.1, 0.1)]
    assert caption(prototype(classes=mostly)) == "mostly class 9"  # a bare 9 reads as a prototype
    assert caption(prototype(classes=[ClassShare("sad", 0.9, 0.5)])) == "mostly sad"
    pair = [ClassShare("8", 0.48, 0.1), ClassShare("1", 0.34, 0.1)]
    assert caption(prototype(classes=pair)) == "class 8 and class 1"
    scattered = [ClassShare("a", 0.2, 0.1), ClassShare("b", 0.15, 0.1)]
    assert caption(prototype(classes=scattered)) == ""
    # Classes as large as in all data say nothing, however large.
    common = [ClassShare("sad", 0.61, 0.6), ClassShare("glad", 0.39, 0.4)]
    assert caption(prototype(classes=common)) == ""
    assert caption(prototype(classes=common, words=[WordShare("tears", 3.0)])) == "tears"
    assert caption(prototype()) == ""
    assert "As in all data: none stands out." in prototype_card(prototype(classes=common), "", token_level=False)
    assert "As in all data" not in prototype_card(prototype(classes=mostly), "", token_level=False)


def test_an_input_says_what_its_prototypes_stand_for() -> None:
    page = Page(render(points(indices=[3])))
    assert "100 % prototype 0 (mostly low)" in page.text
    assert "each belongs to one prototype alone" in page.text
    explanation = points(indices=[3])
    view = dataclasses.replace(explanation.inputs[0], shares=explanation.inputs[0].shares * 0 + [[0.6, 0.4]])
    page = Page(render(dataclasses.replace(explanation, inputs=[view])))
    assert "60 % prototype 0 (mostly low), 40 % prototype 1 (mostly <i>high</i>)" in page.text
    assert "one prototype alone" not in page.text


def test_signs_on_the_cards_are_explained_where_they_are() -> None:
    page = Page(render(points()))
    assert "unless it has none; d is the distance to it, # the place in the data." in page.text
    assert "The thin line across a class's bar" in page.text


def browse(file: Path) -> "subprocess.CompletedProcess[str]":
    """Load a page on a narrow screen, and print what its scripts made of it."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={file.parent / 'profile'}"]
    assert CHROMIUM is not None
    return subprocess.run(
        [CHROMIUM, *options, "--enable-logging=stderr", "--window-size=500,900", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def tried(explanation: Explanation, script: str, tmp_path: Path) -> Any:
    """What a script finds out on the page, as JSON; it runs after the page's own, without the policy."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(explanation))
    file = tmp_path / "tried.html"
    element = f"<script>document.title = JSON.stringify((function () {{ {script} }})());</script>"
    file.write_text(html.replace("</body>", f"{element}</body>"), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browse(file).stdout, re.DOTALL)
    assert title is not None
    return json.loads(unescape(title.group(1)))


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
@pytest.mark.slow
def test_numbers_in_a_bar_are_whole_or_hidden_and_nothing_is_wider_than_the_page(tmp_path: Path) -> None:
    explanation = points(inputs=1)
    many = [dataclasses.replace(explanation.heads[0].prototypes[0], number=k, share=1 / 60) for k in range(60)]
    shares = explanation.inputs[0].shares[:, :1] * 0 + [[0.5, *[0.5 / 59] * 59]]
    wide = dataclasses.replace(
        explanation,
        heads=[dataclasses.replace(explanation.heads[0], prototypes=many, positions=np.ones((60, 2)))],
        inputs=[dataclasses.replace(explanation.inputs[0], shares=shares)],
    )
    script = """
        var cut = [], whole = 0;
        document.querySelectorAll(".bar > *").forEach(function (part) {
          var box = part.getBoundingClientRect(), text = part.firstChild.getBoundingClientRect();
          if (text.top >= box.bottom - 1) { return; }  // on the hidden second line
          whole += 1;
          if (text.left < box.left - 1 || text.right > box.right + 1) { cut.push(part.textContent); }
        });
        return {cut: cut, whole: whole, page: document.documentElement.scrollWidth - window.innerWidth};
    """
    result = tried(wide, script, tmp_path)
    assert result["cut"] == []
    assert 0 < result["whole"] < 120
    assert result["page"] <= 0


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
@pytest.mark.slow
def test_cards_are_found_sorted_and_reached_by_links(tmp_path: Path) -> None:
    script = """
        var controls = document.querySelector("[data-controls=cards0]");
        var list = document.getElementById("cards0");
        function shown() {
          return Array.prototype.filter.call(list.children, function (card) { return !card.hidden; })
            .map(function (card) { return card.id; });
        }
        function enter(field, value) {
          field.value = value;
          field.dispatchEvent(new Event("input", {bubbles: true}));
          return shown();
        }
        var search = controls.querySelector("input"), sort = controls.querySelector("select"), found = {};
        found.all = shown();
        found.high = enter(search, "mostly  <i>HIGH");
        found.percent = enter(search, "50 % of the samples");
        found.none = enter(search, "no such word");
        found.status = controls.querySelector("[role=status]").textContent;
        enter(search, "mostly <i>high");
        location.hash = "#p0";
        window.dispatchEvent(new Event("hashchange"));
        found.linked = shown();
        found.purity = enter(sort, "purity");
        found.share = enter(sort, "share");
        return found;
    """
    explanation = points()
    first, second = explanation.heads[0].prototypes
    purer = dataclasses.replace(first, classes=[dataclasses.replace(first.classes[0], share=0.9)])
    head = dataclasses.replace(explanation.heads[0], prototypes=[purer, second])
    assert tried(dataclasses.replace(explanation, heads=[head]), script, tmp_path) == {
        "all": ["p0", "p1"],
        "high": ["p1"],
        "percent": ["p0", "p1"],
        "none": [],
        "status": "0 of 2",
        "linked": ["p0", "p1"],
        "purity": ["p1", "p0"],
        "share": ["p0", "p1"],
    }


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
@pytest.mark.slow
@pytest.mark.parametrize("make", [points, texts])
def test_a_browser_shows_it_without_complaint(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(make()), encoding="utf-8")
    finished = browse(file)
    assert "CONSOLE" not in finished.stderr, finished.stderr  # neither errors of the script nor refusals of the policy
    page = Page(finished.stdout)
    assert {"head0", "inputs", "guide", "p0"} <= set(page.ids)
    # The script ran: it has filled the controls and shown them.
    assert "Find" in page.text
    assert not [1 for tag, name, _ in page.attributes if (tag, name) == ("div", "hidden")]
