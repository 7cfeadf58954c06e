"""Observers of the calls of a bank."""

from typing import TYPE_CHECKING

from torch import Tensor

from ddcl_lightning.functional import BankOutput

if TYPE_CHECKING:
    from ddcl_lightning.nn.bank import PrototypeBank


class BankObserver:
    """Is shown the calls of banks that it was added to; both methods do nothing here.

    Attributes:
        breaks_graphs: Whether it is shown calls from inside of compiled modules, whose graphs break there.
    """

    breaks_graphs: bool = False

    def before(self, bank: "PrototypeBank", tokens: Tensor, mask: Tensor | None) -> None:
        """See the tokens ``(*, H * d)`` and the mask ``(*)`` of a call that is about to be computed."""

    def after(self, bank: "PrototypeBank", tokens: Tensor, mask: Tensor | None, output: BankOutput) -> BankOutput:
        """See a call that was computed, and return what it returns."""
        return output
