"""An explanation as one HTML page: nothing is fetched, and nothing from the data is ever markup."""

from html import escape

from ddcl_lightning.explain.explanation import Explanation, HeadView
from ddcl_lightning.explain.faithfulness_section import faithfulness_section
from ddcl_lightning.explain.guide import DECISION_GUIDE, GUIDE
from ddcl_lightning.explain.html import bar, matches_base_rate, three_digits
from ddcl_lightning.explain.input_cards import all_or_nothing, input_card
from ddcl_lightning.explain.page import Fact, document, fact_list, guide_section, health_lines
from ddcl_lightning.explain.prototype_cards import prototype_card
from ddcl_lightning.explain.vocabulary import vocabulary

_METRICS = {
    "acc": ("ACC", "clusters matched one to one with classes"),
    "nmi": ("NMI", "information shared with the classes"),
    "ari": ("ARI", "agreement of pairs, 0 by chance"),
}


def render(explanation: Explanation) -> str:
    """The page, a complete HTML document. The same explanation gives the same characters.

    Control characters and those that override the direction of writing appear as escapes such as that of U+202E.

    Args:
        explanation: From :func:`~ddcl_lightning.explain.collection`.
    """
    title = f"{explanation.data}: {_count(explanation)}"
    body = [_header(explanation, title), _vocabulary_section(explanation)]
    if explanation.inputs:
        body.append(_inputs_section(explanation))
    body.append(faithfulness_section(explanation))
    body += [_head_section(explanation, number, head) for number, head in enumerate(explanation.heads)]
    decides = explanation.predicts and explanation.no_contributions is None
    guide = {**DECISION_GUIDE, **GUIDE} if decides else GUIDE
    return document(title, [*filter(None, body), guide_section(guide)])


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
    links.insert(0, '<a href="#vocabulary">Vocabulary</a>')
    links += [f'<a href="#inputs">{count} input{"s" * (count != 1)}</a>'] if count else []
    links += ['<a href="#faithfulness">Are the contributions faithful?</a>'] if explanation.faithfulness else []
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
        f'<p class="note">Samples by their strongest prototype, as shares of all.{_what_shares_are(explanation)}</p>'
        f"{bar(shares, prefix, css='bar overview')}{note}{facts}"
        f'<p class="note">{_legend(head)}</p>'
        f'<div class="controls" data-controls="cards{number}" data-sort="{sort}"{only} hidden></div>'
        f'<div class="cards{" wide" * has_text}" id="cards{number}">\n{cards}\n</div></section>'
    )


def _what_shares_are(explanation: Explanation) -> str:
    """A sentence on shares where something is predicted."""
    if not explanation.predicts:
        return ""
    name = escape(explanation.model[1])
    if explanation.shows_shares:
        return f" The prediction reads the shares of a sample: {name} keeps nothing else of it."
    if explanation.no_contributions is not None:
        return " They describe the data, and are no reason for a prediction."
    return (
        f" They describe the data: {name} keeps something else of a sample than its shares, so that samples of the "
        "same shares can be predicted differently, and the other way round."
    )


def _vocabulary_section(explanation: Explanation) -> str:
    several = len(explanation.heads) > 1
    banks = []
    for number, head in enumerate(explanation.heads):
        title = f"<h3>Head {number}</h3>" if several else ""
        banks.append(title + vocabulary(head, f"{number}." if several else "", explanation.token_level))
    note = "All prototypes at a glance; a number leads to the prototype's card."
    if explanation.effects[0]:
        note += (
            f" What a prototype speaks for is the mean of its contributions over {explanation.effects[0]} inputs of "
            f"the {explanation.inputs_from}: to a class's logit, less the mean over classes."
        )
    return f'<section><h2 id="vocabulary">Vocabulary</h2><p class="note">{note}</p>{"".join(banks)}</section>'


def _legend(head: HeadView) -> str:
    words = "Examples are members of a prototype unless it has none; d is the distance to it, # the place in the data."
    if any(not matches_base_rate(prototype.classes) for prototype in head.prototypes):
        words += " The thin line across a class's bar marks its share of all data."
    return words


def _inputs_section(explanation: Explanation) -> str:
    texts = any(isinstance(view.sample.content, str) or view.decision is not None for view in explanation.inputs)
    wrong = any(view.wrong for view in explanation.inputs)
    only = ' data-only="wrong predictions only"' if wrong else ""
    shares = explanation.shows_shares
    cards = "\n".join(input_card(view, explanation.heads, shares) for view in explanation.inputs)
    note = _inputs_note(explanation)
    return (
        f'<section><h2 id="inputs">Inputs</h2><p class="note">{note}</p>'
        f'<div class="controls" data-controls="input-cards"{only} hidden></div>'
        f'<div class="inputs{" texts" * texts}" id="input-cards">\n{cards}\n</div></section>'
    )


def _inputs_note(explanation: Explanation) -> str:
    """Sentences on what the cards of inputs show."""
    if explanation.no_contributions is not None:
        return (
            f"No reasons are given for the predictions. {escape(explanation.no_contributions)} The shares of the "
            "prototypes are not shown beside them, since they would not explain them."
        )
    if explanation.predicts:
        note = (
            "Why each input is predicted as it is: the logit of the predicted class less that of the runner-up, as a "
            "sum over prototypes and tokens. Positive terms speak for the predicted class, negative ones for the "
            "runner-up."
        )
        if any(view.decision is not None and view.decision.without is not None for view in explanation.inputs):
            note += (
                ' "Without it" is the probability of the predicted class with and without the prototype in the bank.'
            )
        return note
    note = "What each input is made of; a prototype's number leads to its card."
    if all_or_nothing(explanation.inputs):
        note += " The temperature is so low that each belongs to one prototype alone."
    if any(view.tokens for view in explanation.inputs):
        note += " Every token is tinted by its strongest prototype, the fuller the larger the share."
    return note
