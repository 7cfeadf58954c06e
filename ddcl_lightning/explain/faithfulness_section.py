"""The section of the page that says how far the contributions may be believed."""

from collections.abc import Iterator

from ddcl_lightning.explain.explanation import Explanation
from ddcl_lightning.explain.faithfulness import Comparison
from ddcl_lightning.explain.signed import signed


def faithfulness_section(explanation: Explanation) -> str:
    """Deletion, insertion and knock-out of the model of the page; empty where they were not measured."""
    measured = explanation.faithfulness
    if measured is None:
        return ""
    rows = []
    if measured.deletion is not None and measured.insertion is not None:
        rows.append(("Deletion: area under the probability", "lower is better", measured.deletion, 3))
        rows.append(("Insertion: area under the probability", "higher is better", measured.insertion, 3))
    if measured.knock_out is not None:
        rows.append(("Knock-out: fall of the margin", "higher is better", measured.knock_out, 2))
    lines = "".join(_line(*row) for row in rows)
    table = (
        '<table class="levels measure"><thead><tr><th></th><th>by contribution</th><th>random</th>'
        f"<th>better by</th></tr></thead><tbody>{lines}</tbody></table>"
    )
    words = "".join(f"<p>{sentence}</p>" for sentence in _sentences(explanation))
    return (
        f'<section><h2 id="faithfulness">Are the contributions faithful?</h2>{words}{table if rows else ""}</section>'
    )


def _line(title: str, better: str, comparison: Comparison, digits: int) -> str:
    error = "" if comparison.error == float("inf") else f" ± {comparison.error:.{digits}f}"
    return (
        f'<tr><th scope="row">{title} <small>({better})</small></th><td>{comparison.value:.{digits}f}</td>'
        f"<td>{comparison.random:.{digits}f}</td><td>{signed(comparison.gain, digits)}{error}</td></tr>"
    )


def _sentences(explanation: Explanation) -> Iterator[str]:
    measured = explanation.faithfulness
    assert measured is not None
    yield (
        f"Measured for this model on {explanation.effects[0]} inputs of the {explanation.inputs_from}: does the "
        "prediction change when what is said to matter is taken away? ± is the standard error of the difference, over "
        "inputs."
    )
    if measured.deletion is None:
        yield (
            "Tokens were not masked out: the head sums over one token per input, or the inputs have one, so that there "
            "is no order to judge."
        )
    else:
        yield (
            f"Deletion masks the tokens of {measured.samples} inputs ({measured.tokens:.1f} on average) out at the "
            "head's input until one is left, first those that speak most for the predicted class against the "
            f"runner-up, and compares with {measured.draws} random orders of the same tokens; insertion puts them in. "
            "What the encoder has mixed into other tokens stays there. " + _verdict("token", measured.deletion)
        )
    if measured.knock_out is None:
        yield "Prototypes were not taken out: the head cannot leave one out."
    else:
        yield (
            f"Knock-out takes one prototype out of the bank, in {measured.knock_out_samples} inputs: the one that "
            "speaks most for the predicted class, against one drawn at random. "
            + _verdict("prototype", measured.knock_out)
        )


def _verdict(what: str, comparison: Comparison) -> str:
    if comparison.better:
        return f"<b>The contributions of {what}s are better than chance.</b>"
    return (
        f'<b class="bad">The contributions of {what}s are no better than chance on this sample: do not read them as '
        "reasons.</b>"
    )
