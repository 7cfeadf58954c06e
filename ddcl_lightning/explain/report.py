"""An explanation as one HTML page: nothing is fetched, and nothing from the data is ever markup."""

from html import escape

from ddcl_lightning.explain.explanation import Explanation, HeadView
from ddcl_lightning.explain.html import bar, matches_base_rate, three_digits
from ddcl_lightning.explain.input_cards import all_or_nothing, input_card
from ddcl_lightning.explain.page import Fact, document, fact_list, guide_section, health_lines
from ddcl_lightning.explain.prototype_cards import prototype_card

_METRICS = {
    "acc": ("ACC", "clusters matched one to one with classes"),
    "nmi": ("NMI", "information shared with the classes"),
    "ari": ("ARI", "agreement of pairs, 0 by chance"),
}
_GUIDE = {
    "Prototype": "A point in the space of the embeddings that training has moved. A sample's shares say how much it "
    "resembles each of them; they sum to 100 %.",
    "Share of the samples": "How many samples have it as their strongest prototype. The mean share counts the weaker "
    "parts too: it is what the prototype holds of an average sample. A prototype to which no token is nearest is dead: "
    "it is nothing's first choice. Numbers are rounded, so sums can be off by one.",
    "Nearest": "Training samples (or tokens) at the smallest distance d to the prototype, as the prototypes see them; "
    '# is the place in the data. A sample of several tokens stands at their mean; "largest shares" are the samples '
    "that are made of it most.",
    "Classes": "What the prototype's mass consists of, by true class. The thin line marks the class's share of all "
    "data: a bar far beyond it says what the prototype is about. Labels took no part in a clustering.",
    "Characteristic words": "Words that the prototype holds more of than of words in general, by the evidence for it; "
    "the factor says how many times as often it has them.",
    "Temperature": "T, in squared distance: the softness of the shares. Perplexity is the effective number of "
    "prototypes in use; it equals their number if all are equally large.",
}


def render(explanation: Explanation) -> str:
    """The page, a complete HTML document. The same explanation gives the same characters.

    Control characters and those that override the direction of writing appear as escapes such as that of U+202E.

    Args:
        explanation: From :func:`~ddcl_lightning.explain.collection`.
    """
    title = f"{explanation.data}: {_count(explanation)}"
    body = [_header(explanation, title)]
    body += [_head_section(explanation, number, head) for number, head in enumerate(explanation.heads)]
    if explanation.inputs:
        body.append(_inputs_section(explanation))
    return document(title, [*body, guide_section(_GUIDE)])


def _count(explanation: Explanation) -> str:
    heads = explanation.heads
    number = len(heads[0].prototypes)
    words = f"{number:,} prototype{'s' * (number != 1)}"
    return words if len(heads) == 1 else f"{len(heads)} heads of {words}"


def _header(explanation: Explanation, title: str) -> str:
    path = " → ".join(f"<b>{escape(name)}</b>" for name in explanation.model)
    weights = f" · weights {escape(explanation.checkpoint)}" if explanation.checkpoint else ""
    kind = "training samples" if explanation.complete else "training samples (a part of them)"
    extent = f"{explanation.samples:,} {kind}"
    if explanation.token_level:
        extent += f" with {explanation.tokens:,} tokens"
    lede = f"What the {_count(explanation)} of this model stand for, seen through {extent}."
    facts = _facts(explanation) if len(explanation.heads) == 1 else _shared_facts(explanation)
    count, heads = len(explanation.inputs), range(len(explanation.heads))
    links = [f'<a href="#head{number}">Head {number}</a>' for number in heads if len(heads) > 1]
    links += [f'<a href="#inputs">{count} input{"s" * (count != 1)}</a>'] if count else []
    links.append('<a href="#guide">How to read this</a>')
    return (
        f'<header><h1>{escape(title)}</h1><p class="path">{path}{weights}</p><p class="lede">{escape(lede)}</p>'
        f'<p class="soft">{" · ".join(links)}</p>{fact_list(facts)}{health_lines(explanation.health)}</header>'
    )


def _facts(explanation: Explanation) -> list[Fact]:
    return [*_shared_facts(explanation), *_head_facts(explanation.heads[0])]


def _shared_facts(explanation: Explanation) -> list[Fact]:
    facts = [("Samples", f"{explanation.samples:,}", "all training data" if explanation.complete else "not all data")]
    if explanation.token_level:
        facts.append(
            ("Tokens", f"{explanation.tokens:,}", f"{explanation.tokens / explanation.samples:.1f} per sample")
        )
    if explanation.accuracy is not None:
        facts.append(("Accuracy", f"{explanation.accuracy:.3f}", "predicted classes, on these samples"))
    return facts


def _head_facts(head: HeadView) -> list[Fact]:
    number, metrics = len(head.prototypes), head.metrics
    dead = sum(prototype.dead for prototype in head.prototypes)
    used = round(metrics["usage"] * number)
    alive = f"{dead} dead" if dead else "none is dead"
    facts = [
        ("In use", f"{used} of {number}", f"strongest of a sample; {alive}"),
        ("Perplexity", three_digits(metrics["perplexity"]), f"{number} if all were equally large"),
        ("Temperature", three_digits(head.temperature), "in squared distance"),
    ]
    return facts + [(name, f"{metrics[key]:.3f}", text) for key, (name, text) in _METRICS.items() if key in metrics]


def _head_section(explanation: Explanation, number: int, head: HeadView) -> str:
    several = len(explanation.heads) > 1
    prefix = f"{number}." if several else ""
    title = f"Head {number}" if several else "Prototypes"
    shares = [prototype.share for prototype in head.prototypes]
    dead = [prototype for prototype in head.prototypes if prototype.dead]
    note = ""
    if dead:
        names = ", ".join(str(prototype.number) for prototype in dead[:20])
        more = f" and {len(dead) - 20} more" if len(dead) > 20 else ""
        note = f'<p class="note">Dead, nearest to nothing in the data: {escape(names)}{more}.</p>'
    has_text = any(isinstance(n.sample.content, str) for p in head.prototypes for n in p.nearest)
    classes = any(prototype.classes for prototype in head.prototypes)
    cards = "\n".join(prototype_card(prototype, prefix, explanation.token_level) for prototype in head.prototypes)
    facts = fact_list(_head_facts(head)) if several else ""
    sort = "classes" if classes else "share"
    only = ' data-only="without dead ones"' if dead else ""
    return (
        f'<section><h2 id="head{number}">{title}</h2>'
        '<p class="note">Samples by their strongest prototype, as shares of all.</p>'
        f"{bar(shares, prefix, css='bar overview')}{note}{facts}"
        f'<p class="note">{_legend(head)}</p>'
        f'<div class="controls" data-controls="cards{number}" data-sort="{sort}"{only} hidden></div>'
        f'<div class="cards{" wide" * has_text}" id="cards{number}">\n{cards}\n</div></section>'
    )


def _legend(head: HeadView) -> str:
    words = "d is the distance of an example to the prototype, # its place in the data."
    if any(not matches_base_rate(prototype.classes) for prototype in head.prototypes):
        words += " The thin line across a class's bar marks its share of all data."
    return words


def _inputs_section(explanation: Explanation) -> str:
    texts = any(isinstance(view.sample.content, str) for view in explanation.inputs)
    wrong = any(view.wrong for view in explanation.inputs)
    only = ' data-only="wrong predictions only"' if wrong else ""
    cards = "\n".join(input_card(view, explanation.heads) for view in explanation.inputs)
    tinted = any(view.tokens for view in explanation.inputs)
    note = "What each input is made of; a prototype's number leads to its card."
    if all_or_nothing(explanation.inputs):
        note += " The temperature is so low that each belongs to one prototype alone."
    if tinted:
        note += " Every token is tinted by its strongest prototype, the fuller the larger the share."
    return (
        f'<section><h2 id="inputs">Inputs</h2><p class="note">{note}</p>'
        f'<div class="controls" data-controls="input-cards"{only} hidden></div>'
        f'<div class="inputs{" texts" * texts}" id="input-cards">\n{cards}\n</div></section>'
    )
