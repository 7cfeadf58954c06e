"""Recordings of short training runs: what a monitor could see at every tenth step, and the quality on held-out data.

A recording is a dictionary of plain values and tensors:

- ``config``, ``seed``, ``steps`` (planned), ``steps_per_pass`` (of one pass over the training data),
  ``calls_per_step`` (of the codebook that is called most often), ``has_task``, ``meaningful_start`` (the tokens mean
  something before the first step: PCA or raw features);
- ``losses`` of every step, and ``task_losses``, the same without what the codebook adds, None without a task;
- ``readings``: ``{"step", "records": {name: fields}}`` of the batches of steps 0, 10, 20 ..., of every codebook.
  The fields are those of a ``CodebookRecord``, several calls of one step behind each other, with at most 2,048 tokens
  drawn at random, and ``num_tokens`` and ``counts`` ``(H, K)`` of all of them; of a bank also ``detach_assignments``
  and ``planned_end``, T / T_c at the end of its schedule (T where it is absolute);
- ``probes``: the same of a fixed set of training samples in evaluation mode, after 0 steps, at 21 moments, at the end;
  they stay as they are where the data of a run change;
- ``quality``: pairs (steps done, value) at the same moments, and ``qualities``, all metrics by name;
- ``error``: why training ended early, or None. The quality is 0 from there on.
"""

import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _collapse_data import Data, batches, changed, load
from _collapse_models import FAR, Training, autoencoder, classification, clustering, move_far
from _collapse_networks import plain_autoencoder, start_embedding, swav
from _study import Options
from _tables import Config
from torch import Tensor

from ddcl_lightning import CodebookRecord, find_banks, find_codebooks, record_codebooks
from ddcl_lightning.callbacks import TemperatureAnnealing
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.nn.bank import PrototypeBank

Recording = dict[str, Any]
INTERVAL, MOMENTS = 10, 23
TOKENS, PROBE_TOKENS, PROBE_SAMPLES, START_SAMPLES = 2_048, 4_096, 512, 1_024
PROBE_IMAGES = 192  # of many tokens each
BUILDERS = {
    "clustering": clustering,
    "classification": classification,
    "autoencoder": autoencoder,
    "plain-autoencoder": plain_autoencoder,
    "swav": swav,
}
ERRORS = (FloatingPointError, ValueError, RuntimeError)


def recording(config: Config, seed: int, options: Options) -> Recording:
    """The recording of a run: that of the folder of recordings, or a new one, which it then holds too."""
    name = f"{config['kind']}-{config['variant']}-{seed}.pt"
    if options.recordings is None:
        return record_run(config, seed, options)
    path = options.recordings / name
    if path.is_file():
        kept: Recording = torch.load(path, weights_only=True)
        if kept["config"] == dict(config):
            return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    made = record_run(config, seed, options)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        torch.save(made, Path(folder) / name)
        (Path(folder) / name).replace(path)
    return made


def record_run(config: Config, seed: int, options: Options, look: bool = True) -> Recording:
    """Train, and record.

    Args:
        config: Configuration of the run.
        seed: Of the weights, the start of the codebook and the order of the data.
        options: Where the data are.
        look: Whether the fixed set and the quality are looked at, which changes nothing.
    """
    torch.set_flush_denormal(True)
    source = config["data"]
    data = load(source, getattr(options, source, None))
    torch.manual_seed(seed)  # behind the data, which draw when they are loaded first
    training = BUILDERS[config["model"]](config, data)
    run = _Run(config, seed, data, training)
    run.start()
    run.train(look)
    return run.recording


class _Run:
    """One run while it trains."""

    def __init__(self, config: Config, seed: int, data: Data, training: Training) -> None:
        self.config, self.seed, self.data, self.training = config, seed, data, training
        self.steps: int = config["steps"]
        self.banks = find_banks(training.model)
        self.codebooks = find_codebooks(training.model, training.named)
        self.received: dict[str, list[CodebookRecord]] = {}
        self.recorder = record_codebooks(self.codebooks, self._receive)
        self.draws = torch.Generator().manual_seed(seed)
        self.positions: dict[str, Tensor] = {}
        self.annealings = {
            name: _annealing(training.schedules, name, self.steps)
            for name, bank in self.banks.items()
            if bank.temperature_state.unit != "absolute"
        }
        self.recording: Recording = {
            "config": dict(config),
            "seed": seed,
            "steps": self.steps,
            "steps_per_pass": len(data.x) // config["batch"],
            "calls_per_step": 0,
            "has_task": True,
            "meaningful_start": training.meaningful_start,
            "losses": [],
            "task_losses": [],
            "readings": [],
            "probes": [],
            "quality": [],
            "qualities": {},
            "error": None,
        }

    def _receive(self, name: str, record: CodebookRecord) -> None:
        self.received.setdefault(name, []).append(record)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.get("bf16", False))

    @torch.no_grad()
    def start(self) -> None:
        """Start codebooks from training samples, as far as the configuration says so, and the temperatures."""
        config, training = self.config, self.training
        x = self.data.x[torch.randperm(len(self.data.x))[:START_SAMPLES]]
        training.model.train()
        for name, bank in self.banks.items():
            with record_codebooks({name: bank}, self._receive), self._autocast():
                training.observe(x)
            heads = self.received.pop(name)[0].valid_tokens().float()
            chosen = heads[:, torch.randperm(heads.shape[1])[: 6 * START_SAMPLES]]
            if config.get("start", "kmeans") == "kmeans":
                restarts = 3 if config["model"] == "clustering" else 1
                bank.initialize(chosen.transpose(0, 1).flatten(1), num_restarts=restarts, seed=self.seed)
            else:
                bank.temperature_state.start(chosen, bank.prototypes)
            if config.get("start") == "far":
                bank.prototypes.add_(FAR * chosen.var(1).sum(-1).sqrt().view(-1, 1, 1))
        if config.get("method") == "embedding" and config.get("start") == "tokens":
            start_embedding(training, x, self.seed)
        elif not self.banks and config["model"] != "swav":
            training.observe(x)  # codebooks that start at their first call
            if config.get("start") == "far":
                move_far(training)
        self._set_temperature(0)

    def _set_temperature(self, step: int) -> None:
        for name, annealing in self.annealings.items():
            value = annealing.value(step)
            self.banks[name].temperature_state.set_values(torch.tensor(value).expand(self.banks[name].num_heads))

    def _set_rate(self, step: int) -> None:
        """Raise the rate of encoder and task, up to the factor ``ramp`` at the end."""
        for group in self.training.optimizers[-1].param_groups:
            first = group.setdefault("first_lr", group["lr"])
            group["lr"] = first * self.config.get("ramp", 1.0) ** (step / self.steps)

    def train(self, look: bool) -> None:
        """Take all steps, or as many as there are without an error."""
        moments = [round(moment * self.steps / (MOMENTS - 1)) for moment in range(MOMENTS)]
        stream = batches(self.data, self.config["batch"], self.seed, self.config.get("order", "shuffled"))
        for step, (x, y) in enumerate(islice(stream, self.steps + 1)):
            try:
                if look and step in moments:
                    with torch.random.fork_rng(devices=[]):
                        self._look(step)
                if step < self.steps:
                    self._step(step, changed(x, self.config["shift"]) if self._is_shifted(step) else x, y)
            except ERRORS as error:
                self.recording["error"] = f"step {step}: {type(error).__name__}: {error}"[:400]
                break
        self.recorder.close()
        for moment in moments if look else ():
            for values in (self.recording["quality"], *self.recording["qualities"].values()):
                if len(values) < len(moments) and all(moment > step for step, _ in values):
                    values.append((moment, 0.0))
        if not self.recording["has_task"]:
            self.recording["task_losses"] = None

    def _is_shifted(self, step: int) -> bool:
        return "shift" in self.config and step >= self.steps // 2

    def _step(self, step: int, x: Tensor, y: Tensor) -> None:
        self._set_temperature(step)
        self._set_rate(step)
        self.training.model.train()
        self.recorder.armed = step % INTERVAL == 0
        with self._autocast():
            loss, task_loss = self.training.losses(x, y)
        self.recorder.armed = False
        if self.received:
            calls = max(map(len, self.received.values()))
            self.recording["calls_per_step"] = max(calls, self.recording["calls_per_step"])
            self.recording["readings"].append({"step": step, "records": self._records(self._drawn)})
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError("the loss is not finite")
        self.recording["losses"].append(float(loss.detach()))
        self.recording["has_task"] &= task_loss is not None
        self.recording["task_losses"].append(None if task_loss is None else float(task_loss))
        loss.backward()
        for optimizer in self.training.optimizers:
            optimizer.step()
        for optimizer in self.training.optimizers:
            optimizer.zero_grad()
        self.training.after_step()

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """Record the fixed training samples, and the quality."""
        training, x, y = self.training, self.data.test_x, self.data.test_y
        training.model.eval()
        with self._autocast():
            self.recorder.armed = True
            training.observe(self.data.x[: PROBE_SAMPLES if self.data.x.dim() == 2 else PROBE_IMAGES])
            self.recorder.armed = False
            self.recording["probes"].append({"step": step, "records": self._records(self._fixed)})
            qualities = training.evaluate(changed(x, self.config["shift"]) if self._is_shifted(step) else x, y)
        for number, (name, value) in enumerate(qualities.items()):
            value = value if value == value and abs(value) != float("inf") else 0.0
            self.recording["qualities"].setdefault(name, []).append((step, value))
            if number == 0:
                self.recording["quality"].append((step, value))

    def _records(self, choose: Any) -> dict[str, dict[str, Any]]:
        received, self.received = self.received, {}
        return {name: self._fields(name, calls, choose) for name, calls in received.items()}

    def _fields(self, name: str, calls: list[CodebookRecord], choose: Any) -> dict[str, Any]:
        """Plain fields of the calls of one codebook, with the tokens that are chosen."""
        first = calls[0]
        tokens = None if first.tokens is None else torch.cat([_plain(call.tokens) for call in calls], 1)
        codes = torch.cat([_codes(call) for call in calls], 1)
        masks = [call.mask for call in calls if call.mask is not None]
        mask = torch.cat(masks, 1) if masks else None
        rows = choose(name, codes.shape[1])
        valid = codes.clamp(min=0)
        counts = torch.zeros(len(codes), first.num_codes).scatter_add_(1, valid, (codes >= 0).float())
        bank = self.codebooks[name]
        fields: dict[str, Any] = {
            "tokens": None if tokens is None else tokens[:, rows].clone(),
            "mask": None if mask is None else mask[:, rows].clone(),
            "codebook": None if first.codebook is None else _plain(first.codebook),
            "codes": codes[:, rows].clone(),
            "num_codes": first.num_codes,
            "geometry": first.geometry,
            "temperature": None if first.temperature is None else _plain(first.temperature),
            "terms": None if first.terms is None else _terms(first.terms),
            "num_tokens": codes.shape[1],
            "counts": counts,
        }
        if isinstance(bank, PrototypeBank):
            annealing = self.annealings.get(name)
            fields["detach_assignments"] = bank.detach_assignments
            ends = bank.temperature_state.value if annealing is None else annealing.value(self.steps)
            fields["planned_end"] = float(torch.as_tensor(ends).max())
        return fields

    def _drawn(self, name: str, size: int) -> Tensor:
        return torch.randperm(size, generator=self.draws)[:TOKENS].sort().values

    def _fixed(self, name: str, size: int) -> Tensor:
        if name not in self.positions:
            generator = torch.Generator().manual_seed(0)
            self.positions[name] = torch.randperm(size, generator=generator)[:PROBE_TOKENS].sort().values
        return self.positions[name]


def _annealing(schedules: Mapping[str, tuple[float, float]], name: str, steps: int) -> TemperatureAnnealing:
    """The schedule of the last pattern that is in a bank's name, or of all banks."""
    start, end = next((ends for pattern, ends in reversed(schedules.items()) if pattern in name), schedules["*"])
    return TemperatureAnnealing(start=start, end=end, interval="step", duration=0.8 * steps)


def _plain(tensor: Any) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).clone()


def _codes(record: CodebookRecord) -> Tensor:
    """Codes of a call ``(H, N)``; of a bank that made none, the nearest."""
    if record.codes is not None:
        return record.codes
    assert record.tokens is not None
    assert record.codebook is not None
    codes = nearest_prototype(record.tokens.float(), record.codebook.float())
    return codes if record.mask is None else codes.masked_fill(~record.mask, -1)


def _terms(terms: Any) -> dict[str, Tensor]:
    return {name: _plain(getattr(terms, name)) for name in ("loss", "ols", "variance")}
