"""Remedies by the kind of a codebook: what somebody with codes of that kind can do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """Remedies for codes of one kind, each the end of a sentence; empty where there is nothing of the sort.

    Attributes:
        start: How to start the codes from tokens.
        revive: How to put tokens in the place of dead codes.
        spread: What spreads tokens over the codes.
        step: How to move the codes less.
        scale: How to bound the scale of the tokens.
        fewer: How to have fewer codes.
    """

    start: str = "start the codes from tokens"
    revive: str = "put tokens in the place of dead codes"
    spread: str = ""
    step: str = "lower the learning rate of the codes"
    scale: str = "bound the scale of the tokens (normalise them)"
    fewer: str = "use fewer codes"


GENERIC = Advice()
BANK = Advice(
    start="start the prototypes from tokens (in Lightning KMeansInitialization)",
    revive="step them with TokenNormalized(relocation_threshold=0.5)",
    step="lower the learning rate of the prototypes",
    scale="bound the scale of the tokens (in a readout embedding_scale='whiten')",
)
# FSQ and LFQ: the codes are fixed, and only the tokens move.
FIXED = Advice(start="", revive="", step="", fewer="use fewer levels or bits")
ENTROPY = Advice(start="", revive="", spread="raise entropy_loss_weight", step="", fewer="use a smaller codebook_size")
MAPPED = Advice(
    start="", revive="", step="lower the learning rate of the map of the codes", fewer="use a smaller codebook_size"
)
PARAMETERS = Advice(
    start="copy tokens, or their k-means, into the weight before training",
    revive="put tokens into the rows that none has",
    fewer="use fewer rows",
)
PROTOTYPES = Advice(
    start="",
    revive="",
    spread="balance the assignments (Sinkhorn-Knopp, or centred scores)",
    step="lower the learning rate of the prototypes",
    fewer="use fewer prototypes",
)
SAMPLED = Advice(start="", revive="", spread="raise the weight of the diversity loss", fewer="use fewer codes")


def sentence(*phrases: str) -> str:
    """Alternatives as one sentence with a capital and without a full stop; empty ones are left out."""
    given = [phrase for phrase in phrases if phrase]
    text = ", or ".join([", ".join(given[:-1]), given[-1]] if len(given) > 1 else given)
    return text[:1].upper() + text[1:]
