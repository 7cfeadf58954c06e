"""Predictions as a table: for every sample its strongest prototypes."""

import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ddcl_lightning.distributed import gather_objects, is_first_process


class AssignmentWriter(Callback):
    """Writes what ``predict`` finds: one row per sample (and head), its top prototypes and their weights.

    Columns: ``index`` (place in the data set), ``head`` where there are several, ``prototype_1``, ``weight_1``,
    ``prototype_2``, ... by falling weight, and what the task predicts.

    Args:
        path: ``.csv`` or ``.parquet`` file; None writes nothing. Parquet needs ``pip install ddcl-lightning[parquet]``.
        top: Prototypes per row, at least 1.

    Raises:
        ValueError: If an argument is out of its range. Path and format are checked before prediction starts.
    """

    def __init__(self, path: str | None = "assignments.csv", top: int = 3) -> None:
        if top < 1:
            raise ValueError(f"top must be at least 1 prototype per row; got {top}.")
        if path is not None and Path(path).suffix not in (".csv", ".parquet"):
            raise ValueError(f"path must end in .csv or .parquet; got {path!r}.")
        self.path, self.top = path, top
        self._tables: list[pd.DataFrame] = []
        self._rows = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out now, not after the work, whether the file can be written."""
        if self.path is None:
            return
        if self.path.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
            raise ValueError(
                "path ends in .parquet but pyarrow is not installed. Run pip install 'ddcl-lightning[parquet]', or write "
                "a .csv file."
            )
        folder = Path(self.path).parent
        if not folder.is_dir():
            raise ValueError(f"path must lie in an existing folder; there is no {str(folder)!r}. Create it first.")
        self._tables, self._rows = [], 0

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Turn one batch into rows."""
        if self.path is None:
            return
        table = assignment_table(outputs, self.top, first_index=self._rows)
        self._rows += len(table)
        self._tables.append(table)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the rows of all processes, in the order of the data set."""
        if self.path is None:
            return
        tables = [table for part in gather_objects(self._tables) for table in part]
        if not is_first_process():
            return
        keys = ["index", "head"] if tables and "head" in tables[0] else ["index"]
        # A sampler that pads the last batch of a process repeats samples.
        table = pd.concat(tables).drop_duplicates(keys).sort_values(keys)
        if self.path.endswith(".parquet"):
            table.to_parquet(self.path, index=False)
        else:
            table.to_csv(self.path, index=False, float_format="%.6g")
        rank_zero_info(f"Wrote {len(table)} rows to {self.path}.")


def assignment_table(outputs: dict[str, Tensor], top: int, first_index: int = 0) -> pd.DataFrame:
    """Rows of one batch from what ``predict_step`` returns.

    Args:
        outputs: ``assignments`` ``(B, H, K)``, optionally ``index`` ``(B,)``, and columns ``(B,)``.
        top: Prototypes per row; at most K are written.
        first_index: Index of the first sample where the batch has none.
    """
    columns = {name: value for name, value in outputs.items() if name not in ("assignments", "index")}
    assignments = outputs.get("assignments")
    size = len(next(iter(outputs.values())))
    position = outputs.get("index", torch.arange(first_index, first_index + size))
    data: dict[str, Any] = {"index": position.cpu().numpy()}
    if assignments is None:
        return pd.DataFrame(data | {name: value.cpu().numpy() for name, value in columns.items()})
    heads = assignments.shape[1]
    weights, prototypes = assignments.float().topk(min(top, assignments.shape[2]), dim=-1)
    data = {"index": position.cpu().repeat_interleave(heads).numpy()}
    if heads > 1:
        data["head"] = torch.arange(heads).repeat(size).numpy()
    for rank in range(weights.shape[-1]):
        data[f"prototype_{rank + 1}"] = prototypes[..., rank].flatten().cpu().numpy()
        data[f"weight_{rank + 1}"] = weights[..., rank].flatten().cpu().numpy()
    for name, value in columns.items():
        data[name] = (
            value.cpu().repeat_interleave(heads).float().numpy()
            if value.is_floating_point()
            else (value.cpu().repeat_interleave(heads).numpy())
        )
    return pd.DataFrame(data)
