"""Signs that speak of a collapse: what may be harmless by itself, each with its figures and a remedy."""

import math
from collections.abc import Callable, Mapping

from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.history import HeadHistory
from ddcl_lightning.monitoring.remedies import sentence
from ddcl_lightning.monitoring.rules import CollapseRules

FEW, FEWEST = 1.5, 1.1  # a perplexity that is low however few codes there are, and of two or three
Sign = Callable[[CodebookReport, HeadHistory, CollapseRules], str]


def non_finite(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Values that are no numbers."""
    if not past.is_new:
        return ""
    texts = []
    if numbers := now.non_finite - now.out_of_range:
        texts.append(
            f"{numbers} tokens or codes were NaN or infinite. Lower the learning rates, clip the gradients, or check "
            "what makes the codes."
        )
    if now.out_of_range:
        texts.append(
            f"{now.out_of_range} indices were neither in [0, {now.num_codes}) nor -1, that of padding. Check what "
            "makes them, and how many codes there are."
        )
    return " ".join(texts)


def above_critical(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """A temperature at which the prototypes are drawn to the mean."""
    if now.bank is None or not now.bank.temperature_ratio >= 1:
        return ""
    return (
        f"T = {now.bank.temperature:.4g} is {now.bank.temperature_ratio:.2f} times the critical temperature "
        f"{now.bank.critical:.4g}, so the prototypes are drawn to the mean whatever the learning rates. Lower the "
        "temperature (TemperatureAnnealing(start=0.1) starts at a tenth of the critical one)."
    )


def out_of_scale(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens of a bank whose squared distances its dtype cannot hold, from the first reading on."""
    if now.bank is None or now.bank.fits_dtype or not past.starts_out_of_scale:
        return ""
    return (
        f"the spread of the tokens is {now.bank.scale:.3g}, and the bank's dtype cannot hold its square: neither its "
        "assignments nor its temperature mean anything, and no other sign is judged. "
        f"{sentence('Scale the tokens to a spread near 1', now.advice.scale)}."
    )


def falling(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """A separation (without a temperature that over the spread) that has fallen from its best, and still falls."""
    name = "separation" if now.bank is None else "delta"
    share = past.share_of_best(name)
    if not share < 1 - rules.max_drop or not past.is_falling(name):
        return ""
    best, then = past.best[name], past.at_best.get(name, {})
    spread = then.get("spread", math.nan)
    grown, tokens = now.spread / spread if spread > 0 else math.nan, f"from {spread:.4g} to {now.spread:.4g}"
    pair = "two codes" if now.closest is None else f"codes {now.closest[0]} and {now.closest[1]}"
    fell = f"fell to {share:.2g} of its highest value {best:.4g}"
    if now.bank is not None:
        since = f"Delta {fell}" + ("" if math.isnan(grown) else f"; the spread of the tokens went {tokens}")
        behind = False
    elif math.isnan(grown):
        return f"the separation of the codes {fell}: {pair} approach each other. {_slower(now)}."
    else:
        distance = f"from {best * spread:.4g} to {now.separation * now.spread:.4g}"
        since = (
            f"the separation of the codes relative to the spread of the tokens {fell}; since then the smallest "
            f"distance of two codes went {distance}, and the spread {tokens}"
        )
        behind = grown * grown * share >= 1  # the spread accounts for more of it than the distance does
    if grown < 1 - 0.5 * rules.max_drop:
        freeze = "freeze the encoder (rho=0)" if now.bank is not None else "freeze the encoder"
        return f"{since}: the tokens shrink too. {sentence(now.advice.scale, 'add a task loss', freeze)}."
    if behind:
        return f"{since}: the tokens spread, and the codes stay behind. Lower the learning rate of the encoder."
    before = then.get("temperature_ratio", math.nan)
    if now.bank is not None and now.bank.temperature_ratio > before:
        heat = f"T / T_c rose from {before:.3g} to {now.bank.temperature_ratio:.3g}"
        return f"{since}, and {heat}: {pair} approach each other. Lower the temperature, or the learning rates."
    return f"{since}: {pair} approach each other. {_slower(now)}."


def _slower(now: CodebookReport) -> str:
    """Remedy where it is not measured whether codes or tokens moved."""
    moved = sentence(now.advice.step, "lower the learning rate of the encoder")
    return f"Whether tokens or codes moved them is not measured: {moved[0].lower()}{moved[1:]}"


def flat(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens that use fewer directions than at their best."""
    share = past.share_of_best("token_rank")
    if not share < rules.min_rank:
        return ""
    return (
        f"the effective rank of the tokens fell from {past.best['token_rank']:.3g} to {now.token_rank:.3g} of "
        f"{now.dim}: they become copies of a few. Lower the learning rate of the encoder or the weight of the "
        f"commitment loss, {now.advice.scale}, or freeze the encoder; ignore it where a task with few classes asks for "
        "few directions."
    )


def flat_codes(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Codes that span fewer directions than at their best."""
    share = past.share_of_best("code_rank")
    if not share < rules.min_rank:
        return ""
    return (
        f"the effective rank of the codes fell from {past.best['code_rank']:.3g} to {now.code_rank:.3g} of {now.dim}. "
        f"{sentence(now.advice.step, now.advice.start)}."
    )


def merged(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Codes that are near-duplicates of others."""
    if not now.duplicates or now.closest is None:
        return ""
    heat = "" if now.bank is None else f"{now.bank.temperature_ratio:.3g}"
    split = f"lower the temperature so that they split (T / T_c = {heat})" if heat else ""
    return (
        f"{now.duplicates} of {now.num_codes} codes are within {rules.duplicate_distance:g} of the tokens' spread of "
        f"another one (the closest are {now.closest[0]} and {now.closest[1]}, {now.separation:.2g}). "
        + f"{sentence(split, now.advice.start, now.advice.fewer)}."
    )


def uniform(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Soft assignments that say nothing."""
    if now.bank is None or not now.bank.entropy_ratio > rules.max_entropy:
        return ""
    ratio = now.bank.temperature_ratio
    remedy = (
        "Lower the temperature"
        if ratio >= 1
        else "The temperature alone does not do that: lower the learning rates of encoder and prototypes, or the "
        "temperature"
    )
    return (
        f"H = {now.bank.entropy:.4g} is {now.bank.entropy_ratio:.3f} of ln K, so every token is assigned to every "
        f"prototype alike, at T / T_c = {ratio:.3g}. {remedy}."
    )


def dead(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Codes that no token has had for long."""
    if not now.dead or len(now.dead) <= rules.max_dead * now.num_codes:
        return ""
    shown = ", ".join(map(str, now.dead[:8])) + (", ..." if len(now.dead) > 8 else "")
    remedy = sentence(
        now.advice.start,
        now.advice.revive,
        now.advice.spread,
        "lower the learning rate of the encoder",
        now.advice.fewer,
    )
    return f"{len(now.dead)} of {now.num_codes} codes ({shown}) have had no token for long. {remedy}."


def few_codes(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens on few of the codes."""
    least = max(rules.min_perplexity * now.num_codes, FEW if now.num_codes > 3 else FEWEST)
    if now.dead is None or not now.perplexity < least:
        return ""
    return (
        f"the perplexity is {now.perplexity:.1f} of {now.num_codes}: few codes have nearly all tokens. "
        + sentence(now.advice.start, now.advice.spread, "lower the learning rate of the encoder", now.advice.fewer)
        + "."
    )


def drifting(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens that are farther from their codes than from their mean."""
    if not now.commitment > 1:
        return ""
    moved = "check that an optimizer steps the codes"
    if now.extent > rules.max_extent:
        remedy = f"code {now.farthest} is {now.extent:.3g} times the tokens' spread away. "
        remedy += sentence(now.advice.step, moved)
    else:
        raised = "add or raise a quantization (commitment) loss"
        remedy = "which of them moved is not measured. "
        remedy += sentence(now.advice.step, "lower the learning rate of the encoder", moved, raised)
    return (
        f"the mean squared distance of tokens to their codes is {now.commitment:.3g} of their variance: the codes do "
        f"not follow the tokens; {remedy}."
    )


def diverging(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Codes far out of the tokens."""
    if not now.extent > rules.max_extent or not math.isfinite(now.spread):
        return ""
    stable = "" if now.bank is None else " (plain steps are stable below 1 / the largest mean assignment)"
    return (
        f"code {now.farthest} is {now.extent:.3g} times the tokens' spread away from their mean. "
        f"{sentence(now.advice.step + stable, now.advice.start)}."
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
        f"the spread of the tokens has fallen to {share:.2g} of {past.first['spread']:.4g}. "
        f"{sentence(now.advice.scale, 'add a task loss', 'freeze the encoder')}."
    )


def exploding(now: CodebookReport, past: HeadHistory, rules: CollapseRules) -> str:
    """Tokens whose spread has grown many times."""
    growth = _growth(now, past)
    if not growth > rules.max_growth:
        return ""
    return (
        f"the spread of the tokens has grown {growth:.3g} times, from {past.first['spread']:.4g} to {now.spread:.4g}. "
        f"Lower the learning rate of the encoder, clip its gradients, or {now.advice.scale}."
    )


SIGNS: Mapping[str, Sign] = {
    sign.__name__: sign
    for sign in (
        non_finite,
        out_of_scale,
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
