import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ddcl_lightning import DDCLAttention
from ddcl_lightning.monitoring.token_sampling import collect_tokens, execution_order
from ddcl_lightning.nn.discovery import find_banks

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Net(pl.LightningModule):
    """Calls its banks in the order b, c, a; ``unused`` never."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: DDCLAttention(6, 3) for name in ("a", "b", "c")})
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        x = self.dropout(batch[0])
        return sum(self.layers[name](x).terms.loss.sum() for name in ("b", "c", "b", "a"))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def during_fit(module, look, data=None, **kwargs):
    """What ``look(trainer, module)`` returns when training starts."""

    class Looking(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.result = look(trainer, pl_module)

    looking = Looking()
    data = DataLoader(TensorDataset(X), batch_size=8) if data is None else data
    pl.Trainer(callbacks=[looking], **{**QUIET, "max_epochs": 1, **kwargs}).fit(module, data)
    return looking.result


def test_banks_in_the_order_of_their_first_call():
    order = during_fit(Net(), lambda trainer, module: execution_order(trainer, module, find_banks(module)))
    assert order == ["layers.b.bank", "layers.c.bank", "layers.a.bank"]


def test_all_tokens_once_in_an_order_of_their_own():
    module = Net()
    bank = module.layers["b"].bank

    def look(trainer, net):
        return [collect_tokens(trainer, net, "b", bank, max_tokens=1000) for _ in range(2)]

    shuffled = DataLoader(TensorDataset(X), batch_size=8, shuffle=True)
    first, again = during_fit(module, look, shuffled)
    assert first.shape == (1, 40, 6)
    assert torch.equal(first, again)
    assert {tuple(row) for row in first[0].tolist()} == {tuple(row) for row in X.tolist()}
    in_order = during_fit(
        Net(), lambda trainer, net: collect_tokens(trainer, net, "b", net.layers["b"].bank, max_tokens=99)
    )
    assert torch.equal(first, in_order)


def test_heads_stand_first():
    class Heads(Net):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"b": DDCLAttention(6, 3, num_heads=2)})
            self.layers["b"].input_projection.weight = nn.Parameter(torch.eye(6))

        def training_step(self, batch, batch_idx):
            return self.layers["b"](batch[0]).terms.loss.sum()

    tokens = during_fit(
        Heads(), lambda trainer, net: collect_tokens(trainer, net, "b", net.layers["b"].bank, max_tokens=99)
    )
    assert tokens.shape == (2, 40, 3)
    rows = torch.cat([tokens[0], tokens[1]], 1)
    assert {tuple(row) for row in rows.tolist()} == {tuple(row) for row in X.tolist()}


def test_the_sample_is_uniform_and_depends_on_the_seed():
    def look(trainer, net):
        bank = net.layers["b"].bank
        return [collect_tokens(trainer, net, "b", bank, max_tokens=10, seed=seed)[0] for seed in range(100)]

    samples = during_fit(Net(), look)
    assert all(len(sample) == 10 for sample in samples)
    hits = sum((sample[:, None] == X[None]).all(-1).any(0).float() for sample in samples)
    # 25 expected of 100, with a standard deviation of 4.3.
    assert 8 < float(hits.min()) < float(hits.max()) < 45


def test_the_step_stops_at_the_bank():
    class Stopping(Net):
        def training_step(self, batch, batch_idx):
            loss = self.layers["b"](batch[0]).terms.loss.sum()
            self.past = True
            return loss

    def look(trainer, net):
        collect_tokens(trainer, net, "b", net.layers["b"].bank, max_tokens=99)
        return hasattr(net, "past")

    assert during_fit(Stopping(), look) is False


@pytest.mark.parametrize("catch", [Exception, RuntimeError])
def test_a_step_that_catches_exceptions_is_stopped_all_the_same(catch):
    class Catching(Net):
        def training_step(self, batch, batch_idx):
            try:
                return super().training_step(batch, batch_idx)
            except catch:
                raise AssertionError from None

    during_fit(Catching(), lambda trainer, net: execution_order(trainer, net, find_banks(net)))


def test_limits_of_the_trainer_hold():
    module = Net()
    tokens = during_fit(
        module,
        lambda trainer, net: collect_tokens(trainer, net, "b", net.layers["b"].bank, max_tokens=99),
        limit_train_batches=2,
    )
    assert tokens.shape[1] == 16
    assert module.calls == 4  # two for the sample, two for training


def test_errors_of_the_step_come_through():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        during_fit(Failing(), lambda trainer, net: execution_order(trainer, net, find_banks(net)))


def test_a_mask_that_leaves_no_token_is_an_error():
    class Padded(Net):
        def training_step(self, batch, batch_idx):
            mask = torch.zeros(len(batch[0]), dtype=torch.bool)
            return self.layers["b"].bank(batch[0], mask=mask).terms.loss.sum()

    with pytest.raises(ValueError, match="gave no valid token"):
        during_fit(Padded(), lambda trainer, net: collect_tokens(trainer, net, "b", net.layers["b"].bank, max_tokens=9))


def test_no_observer_stays_behind():
    module = Net()

    def look(trainer, net):
        execution_order(trainer, net, find_banks(net))
        collect_tokens(trainer, net, "b", net.layers["b"].bank, max_tokens=9)
        return [len(bank._observers) for bank in find_banks(net).values()]

    assert during_fit(module, look) == [0, 0, 0]
