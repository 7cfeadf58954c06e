"""Base of quantizers of our own: the layout of inputs, the space of the codes, and their start."""

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.compat import exporting, recomputing
from ddcl_lightning._utils.distributed import joint_order
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.functional._common import accumulation_dtype, zero_padding
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.code_start import TOKENS_PER_CODE, CodeStart
from ddcl_lightning.nn.commitment import Commitment
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.gradient_watch import GradientWatch
from ddcl_lightning.nn.joint_moments import unbiased_error
from ddcl_lightning.nn.layout import ChannelLayout, Channels
from ddcl_lightning.nn.moving_bank import CodeUpdate, MovingBank, StepLook
from ddcl_lightning.nn.quantizer_base import Quantizer
from ddcl_lightning.nn.relocation import relocate_until_settled
from ddcl_lightning.nn.scaling import EmbeddingScale, ScaleMode
from ddcl_lightning.nn.step_statistics import StepCalls


class ProjectedQuantizer(Quantizer):
    """Quantizer of tokens of any layout, in a space of their own if need be, whose codes start on the first tokens.

    Args:
        dim: D, channels of the tokens.
        width: Dimension of the space of the codes; tokens are projected where it differs from D.
        channels: See :class:`~ddcl_lightning.nn.layout.ChannelLayout`.
        embedding_scale: A bound on the scale of what is quantized, see :class:`~ddcl_lightning.EmbeddingScale`.
    """

    def __init__(self, dim: int, width: int, channels: Channels | None, embedding_scale: ScaleMode) -> None:
        super().__init__()
        self.dim = dim
        self.layout = ChannelLayout(dim, channels)
        self.input_projection = nn.Linear(dim, width) if width != dim else None
        self.output_projection = nn.Linear(width, dim) if width != dim else None
        self.scale = EmbeddingScale(width, embedding_scale)
        self.code_start: CodeStart | None = None
        self.commitment: Commitment | None = None
        self._gradient_watch: GradientWatch | None = None

    def moving_banks(self) -> list[MovingBank]:
        """The banks that move their codes themselves, in the order in which they start."""
        return [bank for bank in self.modules() if isinstance(bank, MovingBank)]

    @property
    def waits_for_tokens(self) -> bool:
        """True if codes that start on tokens have not seen enough of them; frozen codes wait for none."""
        return any(not bool(bank.initialized) and not bank.is_frozen for bank in self.moving_banks())

    def _watch_gradients(self, z: Tensor, quantized: Tensor) -> None:
        """Learn of the encoder whether the gradients of a call are dropped before a step."""
        if self._gradient_watch is not None and self.training and quantized.requires_grad:
            self._gradient_watch.follow(z, quantized)

    def settle(self) -> None:
        """Move codes and temperature by the calls since the last step, for loops in which no optimizer steps."""
        for child in self.moving_banks():
            child.settle()
        if self.commitment is not None:
            self.commitment.settle()

    def _start_in_training(self, num_codes: int) -> None:
        """Have the codes start on the first tokens of a training run; once the banks exist."""
        self._gradient_watch = GradientWatch()
        for bank in self.moving_banks():
            bank.gradient_watch = self._gradient_watch
        first = self.moving_banks()[0]
        self.code_start = CodeStart(num_codes, first.num_heads * first.dim)
        first.look = StepLook(self.code_start.is_due, self._after_calls)

    def _commit(self, ratio: float) -> None:
        """Add a commitment to tokens of that ratio; once the banks exist."""
        if ratio:
            banks = self.moving_banks()
            self.commitment = Commitment(ratio, banks[0].resets if banks else None)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The projection into the codes' space, where there is one."""
        return [] if self.input_projection is None else list(self.input_projection.parameters())

    def start_codes(self, tokens: Tensor, *, final: bool) -> None:
        """Start the codes on tokens ``(N, width)``, the same on every process.

        Args:
            tokens: In the space of the codes, finite.
            final: Whether there are enough of them for k-means; a start on fewer is done again with the next batch.
        """
        for bank in self.moving_banks():
            bank.start(tokens, final=final)

    @torch.no_grad()
    def revive(self, tokens: Tensor, mask: Tensor | None = None, *, threshold: float = 0.5) -> None:
        """Move codes that hardly a token uses to where tokens are crowded, as training does bit by bit.

        Codes in use stay where they are.

        Args:
            tokens: A sample in the shape of the quantizer's input, of many more tokens than codes.
            mask: As for the forward pass.
            threshold: Share of the mean load in [0, 1) under which a code moves, see
                :class:`~ddcl_lightning.CodeUpdate`.

        Raises:
            ValueError: If there are fewer than four valid tokens per code, one is not finite, or the threshold is out
                of its range.
        """
        if not 0 <= threshold < 1:
            raise ValueError(
                f"threshold must be in [0, 1), a share of the mean load; got {threshold}. 0.5 suits codebooks."
            )
        with evaluating(self.scale):
            embedded = self._embed(self.layout.tokens(tokens, mask), mask)
        self._require_sample(embedded.flatten(0, -2) if mask is None else embedded[mask])
        for bank in find_banks(self).values():
            sample, valid = self.tokens_of(bank, embedded, mask)
            heads, flat_mask = bank.split_heads(sample, valid)
            order = joint_order(heads.shape[1], 1, 0, heads.device)
            relocate_until_settled(
                bank.prototypes, heads, flat_mask, order, threshold=threshold, exponent=CodeUpdate().load_exponent
            )
            embedded = self.next_tokens(bank, embedded, mask)

    def _require_sample(self, tokens: Tensor) -> None:
        """Raise a ValueError unless ``(N, width)`` tokens can say which codes are of use."""
        number, least = len(tokens), TOKENS_PER_CODE * self.num_codes
        if number < least:
            raise ValueError(
                f"tokens must be at least {TOKENS_PER_CODE} per code, {least}, or codes in use would look dead; got "
                f"{number}. Pass more, those of several batches for example."
            )
        if not bool(tokens.isfinite().all()):
            raise ValueError("tokens must be finite; got NaN or infinity among the valid ones. Leave them out.")

    def tokens_of(self, bank: PrototypeBank, embedded: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All tokens that a bank encodes of those ``(*, width)`` that come to it first, and their mask."""
        return embedded, mask

    def next_tokens(self, bank: PrototypeBank, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``(*, width)`` of the bank that follows: the same, where banks do not build on each other."""
        return embedded

    def _start(self, embedded: Tensor, mask: Tensor | None) -> None:
        """Start the codes in a training call, anew with each batch until there are enough tokens."""
        if self.code_start is not None and not exporting():
            self._start_if_due(self.code_start, embedded, mask)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start_if_due(self, start: CodeStart, embedded: Tensor, mask: Tensor | None) -> None:
        banks = self.moving_banks()
        first = banks[0]
        start.num_codes = first.num_prototypes
        if any(bank.is_frozen for bank in banks) or not (start.is_collecting or start.is_due()):
            return
        has_started, counts = start.has_started, torch.is_grad_enabled()
        if not start.is_collecting and not has_started:  # they started elsewhere: nothing is looked at
            return
        # Codes that have started are not moved by a call without gradients, whatever it shows them.
        if has_started and not counts:
            return
        if not has_started and all(bool(bank.initialized) for bank in banks):
            start.end()  # started elsewhere
            return
        added = start.add(embedded, mask, first.next_call() if counts else None, first.resets())
        if added and not recomputing() and start.may_start(first.num_steps):
            self._start_on(start)

    def _start_on(self, start: CodeStart) -> bool:
        """Start the codes on the tokens that were collected; True if these were enough."""
        sample, first = start.sample(), self.moving_banks()[0]
        enough = start.enough(sample)
        self.start_codes(sample, final=enough)
        error = None
        if enough:
            rows, _ = self.tokens_of(first, sample.to(first.prototypes.device), None)
            error = unbiased_error(residual_of(first, rows), rows)
        start.started(error, len(sample), first.num_steps)
        return enough

    @torch.no_grad()
    def _after_calls(self, calls: StepCalls) -> bool:
        """Start codes at a step: on its calls where those that they had started on do not belong to it, or anew."""
        start = self.code_start
        if start is None or not start.count(calls):
            return False
        if self._start_on(start):
            start.end()
        return True

    def _embed(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``(*, D)`` in the space of the codes, ``(*, width)``."""
        projected = tokens
        if self.input_projection is not None:
            projected = self.input_projection(tokens.to(self.input_projection.weight.dtype))
        scaled: Tensor = self.scale(projected, mask)
        return scaled

    def _squeeze(self, codes: Tensor) -> Tensor:
        """Codes with a last dimension of codebooks, without it where there is one."""
        return codes.squeeze(-1) if self.num_codebooks == 1 else codes

    def _restore(self, quantized: Tensor, mask: Tensor | None) -> Tensor:
        """Vectors ``(*, width)`` in the space and the layout of the tokens, zero at padding."""
        if self.output_projection is not None:
            quantized = self.output_projection(quantized.to(self.output_projection.weight.dtype))
        return self.layout.restore(zero_padding(quantized, mask))


@torch.no_grad()
def residual_of(bank: PrototypeBank, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Residual of tokens ``(*, width)``, on any device, after the hard codes of a bank, in float32 or wider."""
    tokens = tokens.to(accumulation_dtype(tokens))
    vectors: Tensor = bank.vectors(bank.encode(tokens.to(bank.prototypes.device), mask))
    return tokens - vectors.to(tokens)
