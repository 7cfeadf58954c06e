"""What can be said of codebooks before the first step: facts, and what will not work."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ddcl_lightning.functional import assignment_statistics, critical_temperature, largest_stable_rate, total_variance
from ddcl_lightning.monitoring.records import head_name
from ddcl_lightning.monitoring.sources.finding import Recordable
from ddcl_lightning.nn.bank import PrototypeBank

ROUGHLY = 2.0  # times the rate that is stable with detached assignments, where assignments respond


class Remark(NamedTuple):
    """One thing that is known before training.

    Attributes:
        sign: Its name.
        codebook: Name of the codebook, or of its head.
        text: Figures and, of a problem, the remedy.
        problem: Whether it will not work, rather than a fact.
    """

    sign: str
    codebook: str
    text: str
    problem: bool


def remarks_on(
    codebooks: Mapping[str, Recordable],
    optimizers: Iterable[Optimizer],
    first_tokens: Mapping[str, Tensor],
    planned_ends: Mapping[str, float],
) -> list[Remark]:
    """All remarks, in the order of the codebooks.

    Args:
        codebooks: By name.
        optimizers: Those that will step.
        first_tokens: A sample of tokens ``(H, N, d)`` by name, where there is one.
        planned_ends: Temperature at the end of a schedule, by the name of a bank or head.
    """
    optimizers = list(optimizers)
    remarks: list[Remark] = []
    for name, codebook in codebooks.items():
        remarks += _unmoved(name, codebook, optimizers)
        tokens = first_tokens.get(name)
        if tokens is None or not tokens.shape[1]:
            continue
        if isinstance(codebook, PrototypeBank):
            remarks += _more_codes_than_tokens(name, tokens, codebook.num_prototypes)
            for head, label in enumerate(_labels(name, codebook.num_heads)):
                remarks += _schedule(label, codebook, head, tokens[head], planned_ends.get(label))
                remarks += _rate(label, codebook, head, tokens[head], optimizers)
        else:
            sizes = [p.shape[-2] for p in _codes_of(codebook) if p.dim() >= 2 and p.shape[-1] == tokens.shape[2]]
            remarks += _more_codes_than_tokens(name, tokens, max(sizes, default=0))
    return remarks


def _labels(name: str, num_heads: int) -> list[str]:
    return [head_name(name, head, num_heads) for head in range(num_heads)]


def _codes_of(codebook: Recordable) -> Iterator[nn.Parameter]:
    """Trainable parameters that are codes: those of the module itself, not of what it holds."""
    own = codebook if isinstance(codebook, PrototypeBank) else codebook.module
    yield from (p for p in own.parameters(recurse=False) if p.requires_grad and p.dim() >= 2)


def _unmoved(name: str, codebook: Recordable, optimizers: list[Optimizer]) -> list[Remark]:
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    times = [held[id(p)] for p in _codes_of(codebook)]
    if not optimizers or all(number == 1 for number in times):
        return []
    if max(times) > 1:
        text = (
            f"the codes are held {max(times)} times by the optimizers, so that each step moves them twice. Leave one."
        )
        return [Remark("moved_twice", name, text, True)]
    text = (
        "the codes are trainable, and in no optimizer: they will stay as they are. Add them to one, or freeze them "
        "with requires_grad_(False)."
    )
    return [Remark("unmoved", name, text, True)]


def _more_codes_than_tokens(name: str, tokens: Tensor, num_codes: int) -> list[Remark]:
    if tokens.shape[1] < 2 * num_codes:
        return []  # the sample is too small to tell
    distinct = min(len(head.unique(dim=0)) for head in tokens)
    if distinct >= num_codes:
        return []
    text = (
        f"there are {num_codes} codes and {distinct} different tokens among {tokens.shape[1]}: codes without a token "
        "of their own will be dead or duplicates. Use fewer codes, or check the encoder."
    )
    return [Remark("more_codes_than_tokens", name, text, True)]


def _schedule(label: str, bank: PrototypeBank, head: int, tokens: Tensor, end: float | None) -> list[Remark]:
    critical = float(critical_temperature(tokens, detach_assignments=bank.detach_assignments))
    rounding = 1e-10 * float(tokens.double().square().sum(-1).mean())
    if not float(total_variance(tokens.double())) > rounding:
        return [Remark("no_variance", label, "all tokens of the sample are one. Check the encoder.", True)]
    if not bank.temperature_state.is_measured:
        return []  # T follows from the first batch
    first = float(bank.temperature[head]) / critical
    last = first if end is None else end / critical
    course = f"T / T_c is {first:.3g}" + ("" if end is None else f", and {last:.3g} at the end of its schedule")
    if last >= 1:
        text = f"{course}: where the quantization loss is trained, it draws the prototypes to one point all the time."
        return [Remark("above_critical", label, text, False)]
    if first >= 1:
        course += ": deterministic annealing, during which merged prototypes are no sign"
    return [Remark("temperature", label, f"{course}.", False)]


def _rate(label: str, bank: PrototypeBank, head: int, tokens: Tensor, optimizers: list[Optimizer]) -> list[Remark]:
    """Plain gradient steps on L_q have a largest stable rate, roughly so with the full gradient; others none known."""
    rates = [
        float(group["lr"])
        for optimizer in optimizers
        if type(optimizer) is SGD
        for group in optimizer.param_groups
        if any(p is bank.prototypes for p in group["params"])
    ]
    if not rates:
        return []
    prototypes = bank.prototypes[head].detach().cpu().double()
    temperature = bank.temperature[head].detach().cpu().double()
    limit = float(largest_stable_rate(assignment_statistics(tokens.double(), prototypes, temperature).mass))
    about = "" if bank.detach_assignments else "about "
    text = f"plain gradient steps on L_q are stable up to a rate of {about}{limit:.3g}, 1 / the largest mean assignment"
    limit *= 1.0 if bank.detach_assignments else ROUGHLY
    if max(rates) <= limit:
        return [Remark("rate", label, f"{text}; the rate is {max(rates):.3g}.", False)]
    return [Remark("rate", label, f"{text}; the rate is {max(rates):.3g}. Lower it.", True)]
