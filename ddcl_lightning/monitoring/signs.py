"""Signs that speak of a collapse: what may be harmless by itself, each with its figures and a remedy."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from ddcl_lightning._utils.arguments import require_at_least
from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.history import HeadHistory


@dataclass(frozen=True)
class CollapseRules:
    """Thresholds of the signs of a collapse, and of the harm that makes an alarm of a sign.

    Attributes:
        duplicate_distance: Distance, relative to the spread of the tokens, up to which codes are near-duplicates.
        max_drop: Share of its highest value that the separation Delta may lose.
        max_entropy: Largest H / ln K.
        min_rank: Smallest effective rank, of tokens and of codes, relative to its highest value.
        min_perplexity: Smallest perplexity relative to K.
        max_dead: Largest share of dead codes.
        max_growth: Largest growth of the tokens' spread since the start; its inverse is the smallest.
        max_extent: Largest distance of a code to the mean of the tokens, relative to their spread.
        patience: Readings for which a sign must hold.
        min_explained: Smallest share of a probe's first variance that codes explain, relative to its highest value.
        min_information: Smallest logarithm of the perplexity relative to ln K.
        min_fall: Smallest fall of the loss, relative to its first value, before it may stall.
        max_regain: Largest share of its fall that the loss may rise again.

    Raises:
        ValueError: If a number is out of its range.
    """

    duplicate_distance: float = 0.02
    max_drop: float = 0.5
    max_entropy: float = 0.98
    min_rank: float = 0.5
    min_perplexity: float = 0.25
    max_dead: float = 0.1
    max_extent: float = 10.0
    max_growth: float = 10.0
    patience: int = 3
    min_explained: float = 0.9
    min_information: float = 0.25
    min_fall: float = 0.65
    max_regain: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), field.name == "patience"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value < math.inf:
                kind = "a whole number" if whole else "a finite number"
                raise ValueError(f"{field.name} must be {kind}; got {value!r}. Its default is {field.default}.")
        for name in ("max_drop", "max_entropy", "min_rank", "min_perplexity", "min_explained", "min_information"):
            _require_share(name, getattr(self, name))
        _require_share("min_fall", self.min_fall)
        if not 0 <= self.max_dead <= 1:
            raise ValueError(
                f"max_dead must be in [0, 1], a share of the codes; got {self.max_dead}. Pass a number in that range."
            )
        for name in ("duplicate_distance", "max_extent", "max_growth", "max_regain"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}. Pass 0 or more.")
        require_at_least(1, patience=self.patience)


def _require_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1]; got {value}. Pass a number in that range.")


FEW, FEWEST = 1.5, 1.1  # a perplexity that is low however few codes there are, and of two or three
Sign = Callable[[CodebookReport, HeadHistory, CollapseRules], str]


def non_finite(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Values that are no numbers."""
    if not past.is_new:
        return ""
    return (
        f"{now.non_finite} tokens or codes were NaN or infinite, or codes out of [0, {now.num_codes}). Lower the "
        "learning rates, clip the gradients, or check what makes the codes."
    )


def above_critical(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """A temperature at which the prototypes are drawn to the mean."""
    if now.bank is None or not now.bank.temperature_ratio >= 1:
        return ""
    return (
        f"T = {now.bank.temperature:.4g} is {now.bank.temperature_ratio:.2f} times the critical temperature "
        f"{now.bank.critical:.4g}, so the prototypes are drawn to the mean whatever the learning rates. Lower the "
        "temperature (TemperatureAnnealing(start=0.1) starts at a tenth of the critical one)."
    )


def falling(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """A separation Delta that has fallen from its best, and still falls."""
    name = "separation" if now.bank is None else "delta"
    share = past.share_of_best(name)
    if not share < 1 - rules.max_drop or not past.is_falling(name):
        return ""
    assert now.closest is not None
    first = past.first.get("spread", math.nan)
    spread = f"{first:.4g} -> {now.spread:.4g}" if "spread" in past.first else "not known"
    if past.share_of_best("spread") < 1 - 0.5 * rules.max_drop:
        cause = (
            f"the tokens shrink with it (spread {spread}). Bound their scale (embedding_scale='whiten'), add a task "
            "loss, or freeze the encoder (rho=0)"
        )
    elif now.spread > 2 * first:
        cause = f"the tokens spread ({spread}), and the codes stay behind. Lower the learning rate of the encoder"
    else:
        lower = "the temperature or the learning rate" if now.bank is not None else "the learning rate"
        cause = (
            f"the spread of the tokens does not ({spread}), so codes {now.closest[0]} and {now.closest[1]} approach "
            f"each other. Lower {lower} of the encoder"
        )
    return f"Delta fell to {share:.2g} of its highest value {past.best[name]:.4g}; {cause}."


def flat(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens that use fewer directions than at their best."""
    share = past.share_of_best("token_rank")
    if not share < rules.min_rank:
        return ""
    return (
        f"the effective rank of the tokens fell from {past.best['token_rank']:.3g} to {now.token_rank:.3g} of "
        f"{now.dim}: they become copies of a few. Lower the learning rate of the encoder or the weight of the "
        "commitment loss, bound the scale of the tokens (embedding_scale='whiten'), or freeze the encoder; ignore it "
        "where a task with few classes asks for few directions."
    )


def flat_codes(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Codes that span fewer directions than at their best."""
    share = past.share_of_best("code_rank")
    if not share < rules.min_rank:
        return ""
    return (
        f"the effective rank of the codes fell from {past.best['code_rank']:.3g} to {now.code_rank:.3g} of {now.dim}. "
        "Lower the learning rate of the codes, or start them from tokens (KMeansInitialization for a bank, "
        "kmeans_init=True in vector-quantize-pytorch)."
    )


def merged(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Codes that are near-duplicates of others."""
    if not now.duplicates or now.closest is None:
        return ""
    return (
        f"{now.duplicates} of {now.num_codes} codes are within {rules.duplicate_distance:g} of the tokens' spread of "
        f"another one (the closest are {now.closest[0]} and {now.closest[1]}, {now.separation:.2g}). "
        + ("Lower the temperature so that they split, or use" if now.bank is not None else "Start from tokens, or use")
        + " fewer codes."
    )


def uniform(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Soft assignments that say nothing."""
    if now.bank is None or not now.bank.entropy_ratio > rules.max_entropy:
        return ""
    return (
        f"H = {now.bank.entropy:.4g} is {now.bank.entropy_ratio:.3f} of ln K, so every token is assigned to every "
        f"prototype alike. Lower the temperature (T / T_c = {now.bank.temperature_ratio:.3g})."
    )


def dead(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Codes that no token has had for long."""
    if not now.dead or len(now.dead) <= rules.max_dead * now.num_codes:
        return ""
    shown = ", ".join(map(str, now.dead[:8])) + (", ..." if len(now.dead) > 8 else "")
    remedy = (
        "Start with KMeansInitialization, step prototypes with TokenNormalized(relocation_threshold=0.5), lower the "
        "rates of encoder and prototypes"
        if now.bank is not None
        else "Start the codes from tokens, and put tokens in the place of dead ones (in vector-quantize-pytorch "
        "kmeans_init=True and threshold_ema_dead_code=2)"
    )
    return f"{len(now.dead)} of {now.num_codes} codes ({shown}) have had no token for long. {remedy}, or use fewer."


def few_codes(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens on few of the codes."""
    least = max(rules.min_perplexity * now.num_codes, FEW if now.num_codes > 3 else FEWEST)
    if now.dead is None or not now.perplexity < least:
        return ""
    return (
        f"the perplexity is {now.perplexity:.1f} of {now.num_codes}: few codes have nearly all tokens. Start from "
        "tokens, lower the learning rate of the encoder, or use fewer codes."
    )


def drifting(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens that are farther from their codes than from their mean."""
    if not now.commitment > 1:
        return ""
    return (
        f"the mean squared distance of tokens to their codes is {now.commitment:.3g} of their variance: the codes do "
        "not follow the tokens. Add or raise a quantization (commitment) loss, check that an optimizer steps the "
        "codes, or lower the learning rate of the encoder."
    )


def diverging(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Codes far out of the tokens."""
    if not now.extent > rules.max_extent or not math.isfinite(now.spread):
        return ""
    return (
        f"code {now.farthest} is {now.extent:.3g} times the tokens' spread away from their mean. Lower the learning "
        "rate of the codes (plain gradient steps are stable below 1 / the largest mean assignment), or start them from "
        "tokens."
    )


def _growth(now: CodebookReport, past: HeadHistory) -> float:
    """The tokens' spread over what it was first; NaN where that is not known."""
    return now.spread / past.first["spread"] if past.first.get("spread") else math.nan


def shrinking(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens whose spread has become a small part of what it was."""
    share = _growth(now, past)
    if not share < 1 / rules.max_growth:
        return ""
    return (
        f"the spread of the tokens has fallen to {share:.2g} of {past.first['spread']:.4g}. Bound their scale "
        "(embedding_scale='whiten'), add a task loss, or freeze the encoder."
    )


def exploding(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens whose spread has grown many times."""
    growth = _growth(now, past)
    if not growth > rules.max_growth:
        return ""
    return (
        f"the spread of the tokens has grown {growth:.3g} times, from {past.first['spread']:.4g} to {now.spread:.4g}. "
        "Lower the learning rate of the encoder, clip its gradients, or bound the scale (embedding_scale='whiten')."
    )


SIGNS: Mapping[str, Sign] = {
    sign.__name__: sign
    for sign in (
        non_finite,
        above_critical,
        falling,
        flat,
        flat_codes,
        merged,
        uniform,
        dead,
        few_codes,
        drifting,
        diverging,
        exploding,
        shrinking,
    )
}
# What a temperature that was planned to start above the critical one looks like until it has fallen.
OF_ANNEALING = ("above_critical", "falling", "flat_codes", "merged", "uniform", "dead", "few_codes")
SEVERAL_CODES = ("above_critical", "falling", "merged", "uniform", "dead", "few_codes", "drifting")  # one is the mean
