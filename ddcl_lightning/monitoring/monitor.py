"""The health of any codebook in any loop, without Lightning."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning.monitoring.code_window import CodeWindow
from ddcl_lightning.monitoring.health_report import CodebookReport, MonitorReport
from ddcl_lightning.monitoring.recording import record_codebooks
from ddcl_lightning.monitoring.records import CodebookRecord, Geometry
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.finding import Named, find_codebooks


class CodebookMonitor:
    """Monitor of the health of every codebook of a model, or of what it is given.

        monitor = CodebookMonitor(model)  # before the loop
        ...
        print(monitor.report())  # whenever wanted

    It reads one in ``every_n_calls`` calls of each codebook that :func:`~ddcl_lightning.find_codebooks` finds; between
    them nothing is read, copied or synchronised. Its size is bounded: counts over the latest tokens, at least 50 for
    each code, and a sample of tokens. The model, its copies and its pickles stay as they are. Several processes have
    their own monitors; :meth:`report` puts them together and is to be called on all.

    Args:
        model: Where to look for codebooks, or None to use :meth:`update` alone.
        named: Codebooks that are not recognised, by the names of their modules, see
            :func:`~ddcl_lightning.find_codebooks`.
        kinds: Kinds of codebooks of your own.
        every_n_calls: Interval between readings of a codebook, at least 1.
        tokens_per_pass: Tokens of one pass over the data, if codes are to count as dead only after a whole pass: for
            data in an order, such as by class.
        duplicate_distance: Distance, relative to the spread of the tokens, up to which codes are near-duplicates.

    Attributes:
        armed: Whether calls are read. Set it to False for an evaluation that is not to count.
        codebooks: What was found, by name.

    Raises:
        ValueError: If there is no codebook in the model, a name is wrong, or a number out of its range.
    """

    @typed
    def __init__(
        self,
        model: nn.Module | None = None,
        named: Named = (),
        kinds: Sequence[type[CodebookSource]] = (),
        *,
        every_n_calls: int = 10,
        tokens_per_pass: int | None = None,
        duplicate_distance: float = 0.02,
    ) -> None:
        require_at_least(1, every_n_calls=every_n_calls, tokens_per_pass=tokens_per_pass)
        if not duplicate_distance >= 0:
            raise ValueError(f"duplicate_distance must be >= 0; got {duplicate_distance}.")
        self.duplicate_distance = duplicate_distance
        self._tokens_per_pass = tokens_per_pass or 0
        self._windows: dict[str, CodeWindow] = {}
        self.codebooks = {} if model is None else find_codebooks(model, named, kinds)
        if model is not None and not self.codebooks:
            raise ValueError(
                f"model must hold a codebook that is recognised; got none in {type(model).__name__}. Name its module "
                "(named=['quantizer.embedding']), with a function that reads its calls where it is neither nn.Linear "
                "nor nn.Embedding; or call update(tokens, codebook, indices) in the loop."
            )
        self._recorder = record_codebooks(self.codebooks, self._add, armed=True, every_n_calls=every_n_calls)

    @property
    def armed(self) -> bool:
        """True if calls are read."""
        return self._recorder.armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._recorder.armed = armed

    def update(
        self,
        tokens: Tensor | None,
        codebook: Tensor | None,
        indices: Tensor,
        mask: Tensor | None = None,
        name: str = "codebook",
        *,
        geometry: Geometry = "euclidean",
        num_codes: int = 0,
    ) -> None:
        """Add what a codebook saw and returned.

        Args:
            tokens: ``(*, d)``, for H heads ``(*, H * d)``, or None.
            codebook: ``(K, d)`` or ``(H, K, d)``, or None of an implicit one.
            indices: Integers ``(*)`` or ``(*, H)`` in [0, K), -1 at padding.
            mask: ``(*)`` boolean, True for valid tokens.
            name: Of the codebook in the report.
            geometry: ``"cosine"`` where only directions are compared.
            num_codes: K of an implicit codebook.

        Raises:
            TypeError: If the indices are not integers or the mask is not boolean.
            ValueError: If sizes do not fit.
        """
        self._add(
            name, CodebookRecord.of_codes(tokens, codebook, indices, mask, num_codes=num_codes, geometry=geometry)
        )

    def _add(self, name: str, record: CodebookRecord) -> None:
        window = self._windows.get(name)
        if window is None or not window.fits(record):  # one that was resized starts anew
            window = self._windows[name] = CodeWindow(record, self._tokens_per_pass)
        window.add(record)

    def report(self) -> MonitorReport:
        """Health of every codebook that was called, by name, one entry per head; ``print`` shows a table.

        Heads are ``name/head0`` and so on. Where several processes train, all have to call it.
        """
        called = gather_objects(list(self._windows))
        report = MonitorReport()
        for name, window in self._windows.items():
            if all(name in names for names in called):
                heads: list[CodebookReport] = window.report(self.duplicate_distance)
                single = len(heads) == 1
                report.update({name if single else f"{name}/head{head}": row for head, row in enumerate(heads)})
        return report

    def reset(self) -> None:
        """Forget what was read."""
        self._windows.clear()

    def close(self) -> None:
        """Read no further calls."""
        self._recorder.close()

    def __getstate__(self) -> dict[str, Any]:
        """State without the model: a copy, as of a module that holds a monitor, keeps the numbers and reads nothing."""
        return {**self.__dict__, "codebooks": {}}

    def __enter__(self) -> "CodebookMonitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
