"""A tree of semantic IDs as one HTML page."""

from collections.abc import Sequence
from html import escape

from ddcl_lightning.explain.explanation import Sample
from ddcl_lightning.explain.html import anchor, bar, caption, chip, hue, percent, picture, three_digits
from ddcl_lightning.explain.id_tree import DEPTH, Branch, IDTree, ItemView
from ddcl_lightning.explain.page import Fact, document, fact_list, guide_section, health_lines
from ddcl_lightning.explain.prototype_cards import neighbour_list, shortened

CHILDREN, CHILD_EXAMPLES = 6, 3  # branches of the second level in a card, and items of each
SNIPPET = 90  # characters of a text in a branch
_GUIDE = {
    "ID": "The codes of an item, one per level: the code of a level stands for what the levels before it have left. "
    "Items whose first codes are equal are alike; the later the level, the finer the difference.",
    "Colliding": "Items whose ID another item has too. An appended running number (the column disambiguation of ddcl "
    "predict) tells them apart; a small share says that the codes do so themselves.",
    "Relative error": "Mean squared error of what comes back from the codes over the variance of the items: 0 is "
    "exact, 1 is no better than the mean of all items. Fewer collisions can come with a larger error: read both.",
    "Perplexity": "Effective number of codes in use; given the prefix, that of the codes of a level among the items "
    "whose codes before are equal, averaged over items. It is small where the levels before say it already, and "
    "where a prefix has few items.",
    "Branch": "The items whose first code it is, with those at the smallest distance d to what the code decodes to; # "
    "is the place in the data. Below them its largest branches of the second level.",
}


def render_tree(tree: IDTree) -> str:
    """The page, a complete HTML document. The same tree gives the same characters.

    Args:
        tree: From :func:`~ddcl_lightning.explain.id_tree.collect_tree`.
    """
    distinct, items = int(tree.metrics["distinct_ids"]), int(tree.metrics["items"])
    title = f"{tree.data}: {distinct:,} IDs of {items:,} items"
    body = [_header(tree, title), _level_table(tree), _branches_section(tree)]
    if tree.items:
        body.append(_items_section(tree))
    return document(title, [*body, guide_section(_GUIDE)])


def _header(tree: IDTree, title: str) -> str:
    path = " → ".join(f"<b>{escape(name)}</b>" for name in tree.model)
    weights = f" · weights {escape(tree.checkpoint)}" if tree.checkpoint else ""
    extent = "training items" if tree.complete else "training items (a part of them)"
    lede = (
        f"What {tree.num_levels} level{'s' * (tree.num_levels != 1)} of {tree.num_codes:,} codes make of "
        f"{int(tree.metrics['items']):,} {extent}."
    )
    links = ['<a href="#levels">Levels</a>', '<a href="#tree">Tree</a>']
    links += [f'<a href="#items">{len(tree.items)} item{"s" * (len(tree.items) != 1)}</a>'] if tree.items else []
    links.append('<a href="#guide">How to read this</a>')
    return (
        f'<header><h1>{escape(title)}</h1><p class="path">{path}{weights}</p><p class="lede">{escape(lede)}</p>'
        f'<p class="soft">{" · ".join(links)}</p>{fact_list(_facts(tree))}{health_lines(tree.health)}</header>'
    )


def _facts(tree: IDTree) -> list[Fact]:
    metrics = tree.metrics
    largest = int(metrics["largest_group"])
    facts = [
        ("Items", f"{int(metrics['items']):,}", "all training data" if tree.complete else "not all data"),
        ("Distinct IDs", f"{int(metrics['distinct_ids']):,}", f"of {tree.num_codes**tree.num_levels:,} possible"),
        ("Colliding", percent(metrics["collisions"]), "of the items share their ID"),
        ("Largest group", f"{largest:,}", f"item{'s' * (largest != 1)} of one ID"),
    ]
    if metrics["relative_error"] == metrics["relative_error"]:
        facts.append(("Relative error", f"{metrics['relative_error']:.3f}", "squared error over variance"))
    return facts


def _level_table(tree: IDTree) -> str:
    rows = []
    for level in range(1, tree.num_levels + 1):
        values = {name: tree.metrics.get(f"level{level}_{name}") for name in ("usage", "perplexity")}
        given = tree.metrics.get(f"level{level}_conditional_perplexity")
        used = round((values["usage"] or 0.0) * tree.num_codes)
        cells = [str(level), f"{used:,} of {tree.num_codes:,}", three_digits(values["perplexity"] or 0.0)]
        cells.append("" if given is None else three_digits(given))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("Level", "Codes in use", "Perplexity", "given the prefix"))
    return (
        f'<section><h2 id="levels">Levels</h2><table class="levels"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )


def _branches_section(tree: IDTree) -> str:
    dead = [branch.codes[0] for branch in tree.branches if branch.dead]
    note = ""
    if dead:
        more = f" and {len(dead) - 20} more" if len(dead) > 20 else ""
        note = f'<p class="note">Dead, first code of no item: {", ".join(map(str, dead[:20]))}{more}.</p>'
    used = [branch for branch in tree.branches if not branch.dead]
    texts = any(isinstance(neighbour.sample.content, str) for branch in used for neighbour in branch.examples)
    cards = "\n".join(_branch_card(branch) for branch in used)
    sort = "classes" if any(branch.classes for branch in used) else "share"
    return (
        '<section><h2 id="tree">Tree</h2><p class="note">Items by the first code of their ID, as shares of all.</p>'
        f"{bar([branch.share for branch in tree.branches], '', css='bar overview')}{note}"
        '<p class="note">d is the distance of an item to what the codes decode to, # its place in the data.</p>'
        f'<div class="controls" data-controls="branches" data-sort="{sort}" hidden></div>'
        f'<div class="cards{" wide" * texts}" id="branches">\n{cards}\n</div></section>'
    )


def _branch_card(branch: Branch) -> str:
    code, about = branch.codes[0], caption(branch)
    purity = branch.classes[0].share if branch.classes else 0.0
    attributes = f'data-number="{code}" data-share="{branch.share:.6f}" data-purity="{purity:.6f}"'
    says = f'<span class="says">{escape(about)}</span>' if about else ""
    ids = f"{branch.distinct:,} ID{'s' * (branch.distinct != 1)}"
    elements = [
        f'<article class="card" id="{anchor("", code)}" {attributes} data-only><header>{chip(code)}'
        f"<h3>Branch {code}</h3>{says}</header>",
        f'<p class="share"><b>{percent(branch.share)}</b> of the items ({branch.items:,}), {ids}</p>',
        neighbour_list(branch.examples),
    ]
    if branch.words:
        words = "".join(f"<li>{escape(word.word)}</li>" for word in branch.words)
        elements.append(f'<h4>Characteristic words</h4><ul class="words">{words}</ul>')
    if branch.children:
        elements.append(_children(branch))
    return "".join(elements) + "</article>"


def _children(branch: Branch) -> str:
    rows = []
    for child in branch.children[:CHILDREN]:
        about = caption(child)
        says = f' <span class="soft">{escape(about)}</span>' if about else ""
        line = (
            f'<div class="line">{_path(child.codes)} {child.items:,} item{"s" * (child.items != 1)}{says}'
            f'<span class="track"><span class="fill hue" style="--h:{hue(branch.codes[0])};'
            f'width:{100 * child.items / branch.items:.1f}%"></span></span></div>'
        )
        rows.append(f"<li>{line}{_samples([near.sample for near in child.examples[:CHILD_EXAMPLES]])}</li>")
    rest = branch.children[CHILDREN:]
    if rest:
        items = sum(child.items for child in rest)
        rows.append(f'<li class="soft">{len(rest):,} more with {items:,} item{"s" * (items != 1)}</li>')
    return f'<h4>Level {DEPTH}</h4><ul class="tree">{"".join(rows)}</ul>'


def _samples(samples: Sequence[Sample]) -> str:
    texts = [sample.content for sample in samples if isinstance(sample.content, str)]
    if texts:
        return "".join(f'<div class="leaf">{escape(shortened(text, SNIPPET))}</div>' for text in texts)
    return f'<div class="leaves">{"".join(map(picture, samples))}</div>'


def _items_section(tree: IDTree) -> str:
    texts = any(isinstance(view.sample.content, str) for view in tree.items)
    cards = "\n".join(_item_card(view) for view in tree.items)
    return (
        '<section><h2 id="items">Items</h2><p class="note">The first code of an ID leads to its branch.</p>'
        '<div class="controls" data-controls="item-cards" hidden></div>'
        f'<div class="cards{" wide" * texts}" id="item-cards">\n{cards}\n</div></section>'
    )


def _item_card(view: ItemView) -> str:
    sample = view.sample
    label = f'<p class="verdict">Class <b>{escape(sample.label)}</b></p>' if sample.label else ""
    others = view.same - 1
    shared = f", shared with {others:,} other{'s' * (others != 1)}" if others > 0 else ""
    text = sample.content if isinstance(sample.content, str) else ""
    said = f'<div class="leaf">{escape(shortened(text, 4 * SNIPPET))}</div>' if text else ""
    return (
        f'<article class="card input">{picture(sample)}<div><h3>Item #{sample.index}</h3>{label}'
        f'<p class="words-of">{_path(view.codes, link=True)}{shared}</p>{said}</div></article>'
    )


def _path(codes: Sequence[int], link: bool = False) -> str:
    """The codes of an ID, each on its colour; the first may lead to its branch."""
    first = chip(codes[0], "" if link else None)
    return f'<span class="id">{first}{"".join(map(chip, codes[1:]))}</span>'
