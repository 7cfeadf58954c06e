"""Predictions as a table: for every sample its strongest prototypes, or its semantic ID."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ddcl_lightning._utils import compat
from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import labels
from ddcl_lightning._utils.distributed import from_first_process, gather_objects
from ddcl_lightning._utils.files import check_file, refuse_input, whole_file
from ddcl_lightning.callbacks._id_table import (
    collision_note,
    fill_disambiguation,
    residual_quantizer,
    with_id_columns,
)
from ddcl_lightning.checkpoints.codebook_files import check_codebook_path, save_codebooks
from ddcl_lightning.datamodules._origin import check_names, listing, writable
from ddcl_lightning.nn.quantizer_base import require_started


class AssignmentWriter(BasePredictionWriter):
    """Writer of predictions: one row per sample (and head) with its top prototypes and their weights.

    Columns: ``dataloader`` where there are several, ``index``, ``head`` where there are several, ``prototype_1``,
    ``weight_1``, ``prototype_2``, ... by falling weight, what the task predicts, and what was asked for.

    ``index`` is the number of the row in the user's file, from 0, to join by: rows that the data module drops, holds
    out or leaves out change no other row's number. A line says how many of them there are, and which.

    ``predict_step`` must return a dict of tensors: ``assignments`` ``(B, H, K)`` where there are prototypes, and
    columns ``(B,)``. A sample's number is its ``index`` ``(B,)`` among them, or else what the loader's sampler drew;
    a loader without a sampler is counted through.

    Where there is a ``semantic_id`` ``(B, L)`` (the task :class:`~ddcl_lightning.SemanticIDs`), a row has its codes in
    the place of prototypes, ``code_1`` to the last level, and ``disambiguation``, the running number of the item among
    those with the same codes, in the order of the data set: all of them together are another tuple for every item.

    Args:
        path: ``.csv`` or ``.parquet`` file; None writes nothing. Parquet needs ``pip install ddcl-lightning[parquet]``.
        top: Prototypes per row, at least 1.
        columns: What else to write of each row: names of columns of the user's file (an id, say), ``label``, ``text``,
            ``file``, ``split``; of other data modules, keys of the batch (``label`` is ``y``).
        dropped: Add the rows that the data module left out, with ``columns``, the reason in a column ``left_out`` and
            no prototypes.
        codebooks: ``.safetensors`` file for the codes of a residual quantizer, see
            :func:`~ddcl_lightning.checkpoints.codebook_files.load_codebooks`; None writes none.

    Raises:
        ImportError: Before prediction starts, if codebooks are to be written and safetensors is missing.
        ValueError: If an argument is out of its range; before prediction starts, if a path or format does not do, or
            the codes of a quantizer have not started.
        TypeError: During prediction, if ``predict_step`` returns something else.
    """

    @typed
    def __init__(
        self,
        path: str | None = "assignments.csv",
        top: int = 3,
        columns: list[str] | None = None,
        dropped: bool = False,
        codebooks: str | None = None,
    ) -> None:
        super().__init__("batch")
        if top < 1:
            raise ValueError(f"top must be at least 1 prototype per row; got {top}. Pass 1 or more.")
        if path is not None and Path(path).suffix not in (".csv", ".parquet"):
            raise ValueError(f"path must end in .csv or .parquet; got {path!r}. Name it assignments.csv, say.")
        self.path, self.top, self.columns, self.dropped, self.codebooks = path, top, columns, dropped, codebooks
        self._tables: list[pd.DataFrame] = []
        self._counted: dict[int, int] = {}  # samples so far, by loader

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the file can be written, before the work and not after it."""
        self._tables, self._counted = [], {}
        for name, child in pl_module.named_modules():
            require_started(child, f"{name or 'the module'} of a prediction")
        if self.codebooks is not None:
            check_codebook_path(self.codebooks, "codebooks")
            check_place(self.codebooks, "codebooks", compat.current_datamodule(trainer))
            residual_quantizer(pl_module)
        if self.path is None:
            return
        if self.path.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
            raise ValueError(
                "path ends in .parquet but pyarrow is not installed. Run pip install 'ddcl-lightning[parquet]', or "
                "write a .csv file."
            )
        data = compat.current_datamodule(trainer)
        check_place(self.path, "path", data)
        known = getattr(data, "row_names", None)
        if known is not None:
            check_names(self.columns or (), known)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Turn one batch into rows."""
        if self.path is None:
            return
        if not (isinstance(prediction, dict) and prediction and all(map(torch.is_tensor, prediction.values()))):
            raise TypeError(
                "predict_step must return a dict of tensors, 'assignments' (B, H, K) and columns (B,), for "
                f"AssignmentWriter; got {type(prediction).__name__}. Return one (the layer gives assignments for "
                "need_weights=True), or set path to None."
            )
        size, done = len(next(iter(prediction.values()))), self._counted.get(dataloader_idx, 0)
        self._counted[dataloader_idx] = done + size
        places = torch.tensor(batch_indices) if batch_indices else torch.arange(done, done + size)
        table = assignment_table(with_id_columns({"index": places, **prediction}), self.top)
        for name, cells in self._requested_columns(trainer, batch, table["index"].tolist(), size).items():
            table[name] = cells
        table.insert(0, "dataloader", dataloader_idx)
        self._tables.append(table)

    def _requested_columns(
        self, trainer: pl.Trainer, batch: Any, numbers: list[int], size: int
    ) -> dict[str, list[Any]]:
        """Cells of the columns asked for, one for each of the numbers: those of B samples, each as often as heads."""
        data: Any = compat.current_datamodule(trainer)
        if hasattr(data, "describe_rows"):
            cells: dict[str, list[Any]] = data.describe_rows(numbers, [*data.row_columns, *(self.columns or ())])
            return cells
        return {
            name: [cell for cell in batch_column(batch, name, size) for _ in range(len(numbers) // size)]
            for name in self.columns or ()
        }

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the rows of all processes, in the order of the data set, and the codebooks."""
        codebooks = self.codebooks
        if codebooks is not None:
            from_first_process(
                lambda: save_codebooks(residual_quantizer(pl_module), codebooks), "the codebooks cannot be written"
            )
        if self.path is None:
            return
        gathered = gather_objects(self._tables)
        self._tables = []
        tables = [table for tables_of_process in gathered for table in tables_of_process]
        if tables:
            from_first_process(lambda: self._write(trainer, tables, len(gathered)), "the predictions cannot be written")

    def _write(self, trainer: pl.Trainer, tables: list[pd.DataFrame], processes: int) -> None:
        assert self.path is not None
        table = pd.concat(tables)
        keys = ["dataloader", "index"] + ["head"] * ("head" in table)
        if processes > 1:  # a sampler that pads the last batches of processes repeats samples
            table = table.drop_duplicates(keys)
        table = fill_disambiguation(table.sort_values(keys, kind="stable"))
        data: Any = compat.current_datamodule(trainer)
        left_out: dict[str, list[int]] = data.left_out() if hasattr(data, "left_out") else {}
        if self.dropped:
            numbers = [number for numbers in left_out.values() for number in numbers]
            known = hasattr(data, "describe_rows")
            table = with_left_out(
                table, left_out, self._requested_columns(trainer, None, numbers, len(numbers)) if known else {}
            )
        if table["dataloader"].nunique() == 1:
            table = table.drop(columns="dataloader")
        with whole_file(self.path) as draft:
            if self.path.endswith(".parquet"):
                table.to_parquet(draft, index=False)
            else:
                table.to_csv(draft, index=False, float_format="%.6g", errors="backslashreplace")
        missing = [f"{len(numbers):,} by {reason} ({listing(numbers)})" for reason, numbers in left_out.items()]
        rank_zero_info(
            f"Wrote {len(table)} rows to {self.path}."
            + collision_note(table)
            + f" Not predicted: {'; '.join(missing)}." * bool(missing)
        )


def check_place(path: str, argument: str, data: pl.LightningDataModule | None) -> None:
    """Raise unless a file can be written, which is none that the data module reads.

    Raises:
        ValueError: Naming the argument.
    """
    check_file(path, argument)
    refuse_input(path, data, argument)


def assignment_table(outputs: dict[str, Tensor], top: int) -> pd.DataFrame:
    """Table of one batch from the output of ``predict_step``.

    Args:
        outputs: ``index`` ``(B,)``, ``assignments`` ``(B, H, K)`` or none, and columns ``(B,)``, or ``(B, C)`` for C of
            them.
        top: Prototypes per row; at most K are written.
    """
    rest = {name: _to_numpy(value) for name, value in outputs.items() if name != "assignments"}
    columns = {"index": rest.pop("index")}
    heads = 1
    if "assignments" in outputs:
        size, heads, prototypes = outputs["assignments"].shape
        columns["index"] = columns["index"].repeat(heads)
        if heads > 1:
            columns["head"] = np.tile(np.arange(heads), size)
        weights, codes = outputs["assignments"].float().topk(min(top, prototypes), dim=-1)
        for rank in range(weights.shape[-1]):
            columns[f"prototype_{rank + 1}"] = _to_numpy(codes[..., rank].flatten())
            columns[f"weight_{rank + 1}"] = _to_numpy(weights[..., rank].flatten())
    for name, value in rest.items():
        columns_of_value = (
            {name: value} if value.ndim == 1 else {f"{name}_{i}": column for i, column in enumerate(value.T)}
        )
        columns |= {part_name: column.repeat(heads) for part_name, column in columns_of_value.items()}
    return pd.DataFrame(columns)


def with_left_out(
    table: pd.DataFrame, left_out: Mapping[str, Sequence[int]], cells: Mapping[str, Sequence[Any]]
) -> pd.DataFrame:
    """The table with a row for each number of a row that was left out, in their order, and a column that says why.

    Args:
        table: What was predicted.
        left_out: Numbers by reason.
        cells: What else is known of these rows, by column.
    """
    reasons = [reason for reason, numbers in left_out.items() for _ in numbers]
    numbers = [number for numbers in left_out.values() for number in numbers]
    # An integer beside a gap stays an integer.
    table = table.astype({name: "Int64" for name in table if pd.api.types.is_integer_dtype(table[name])})
    more = pd.DataFrame({"dataloader": 0, "index": numbers, **cells, "left_out": reasons})
    return pd.concat([table, more.astype({"dataloader": "Int64", "index": "Int64"})]).sort_values(
        ["dataloader", "index"], kind="stable"
    )


def batch_column(batch: Any, name: str, size: int) -> list[Any]:
    """One cell per sample of what a batch holds under a name; ``label`` is what the batch convention calls so.

    Raises:
        ValueError: If it holds nothing of the kind.
    """
    value = labels(batch) if name == "label" else None
    if value is None and isinstance(batch, dict):
        value = batch.get(name)
    if not isinstance(value, (Tensor, list, tuple)) or len(value) != size:
        keys = sorted(map(str, batch)) if isinstance(batch, dict) else [type(batch).__name__]
        raise ValueError(
            f"columns must be of the batch where the data module describes no rows; it has {', '.join(keys)}, and no "
            f"{name!r} of one cell for each of its {size} samples. Leave it out, or add it to the batch."
        )
    return [writable(cell) for cell in (value.tolist() if isinstance(value, Tensor) else value)]


def _to_numpy(value: Tensor) -> "npt.NDArray[Any]":
    # NumPy has no bfloat16.
    array: npt.NDArray[Any] = (value.float() if value.is_floating_point() else value).cpu().numpy()
    return array
