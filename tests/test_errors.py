"""Bad inputs, each with the error a user gets: the argument, the rule, the value and the way out."""

import ast
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ddcl_lightning import (
    Classification,
    Clustering,
    ClusteringMetrics,
    CodebookMetrics,
    CodeUpdate,
    ConvBackbone,
    ConvDecoder,
    DDCLAttention,
    DDCLReadout,
    DDCLReadoutModule,
    EmbeddingScale,
    IdentityBackbone,
    OptimizerConfig,
    PCABackbone,
    PrototypeBank,
    Reconstruction,
    ResidualVectorQuantizer,
    SoftVectorQuantizer,
    TokenNormalized,
    two_timescale_groups,
)
from ddcl_lightning import functional as F
from ddcl_lightning.callbacks import (
    AssignmentWriter,
    CollapseWarning,
    DecompositionCheck,
    KMeansInitialization,
    PrototypeFigures,
    RatioGuard,
    ReconstructionFigures,
    TemperatureAnnealing,
)
from ddcl_lightning.datamodules import DebrisDataModule, DigitsDataModule
from ddcl_lightning.heads import PMAPooling, VQPooling
from ddcl_lightning.nn.initialization import initial_prototypes
from ddcl_lightning.recipes import find_recipe
from tests.tiny import LinearBackbone, clustering_module, loader, quiet_trainer

ROOT = Path(__file__).parents[1]
TOKENS = torch.randn(2, 5, 4)
NAN_TOKENS = TOKENS.clone().index_fill(1, torch.tensor([2]), math.nan)
LAYER = DDCLAttention(4, 3)


def fit(module: Any, data: Any, *callbacks: Any, **kwargs: Any) -> None:
    quiet_trainer(max_epochs=kwargs.pop("max_epochs", 1), callbacks=list(callbacks), **kwargs).fit(module, data)


def frozen_module(num_prototypes: int = 4) -> DDCLReadoutModule:
    return DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(num_prototypes), Clustering(4))


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # Layer and mathematics
    "nan_tokens": (lambda: LAYER(NAN_TOKENS), ValueError, "tokens must be finite; got NaN"),
    "all_masked": (
        lambda: LAYER(TOKENS, torch.zeros(2, 5, dtype=torch.bool)),
        ValueError,
        "mask leaves no valid token",
    ),
    "no_tokens": (lambda: LAYER(torch.empty(2, 0, 4)), ValueError, "at least one token; got an empty batch"),
    "no_samples": (lambda: DDCLReadout(3, embed_dim=4)(TOKENS[:0]), ValueError, r"empty batch, of shape \(0, 5, 4\)"),
    "no_samples_for_a_rival": (lambda: VQPooling(3, embed_dim=4)(TOKENS[:0]), ValueError, "at least one token"),
    "no_samples_for_pma": (
        lambda: PMAPooling(embed_dim=4)(TOKENS[:0], torch.ones(0, 5, dtype=torch.bool)),
        ValueError,
        "at least one token",
    ),
    "nothing_to_quantize": (
        lambda: SoftVectorQuantizer(4, 3)(TOKENS[:, :0]),
        ValueError,
        "z must hold at least one token",
    ),
    "empty_map_to_quantize": (
        lambda: SoftVectorQuantizer(4, 3)(torch.ones(2, 4, 0, 3)),
        ValueError,
        "at least one token",
    ),
    "nothing_valid_to_quantize": (
        lambda: SoftVectorQuantizer(4, 3)(TOKENS, torch.zeros(2, 5, dtype=torch.bool)),
        ValueError,
        "mask leaves no valid token",
    ),
    "nothing_to_whiten": (lambda: EmbeddingScale(4, "whiten")(TOKENS[:0]), ValueError, "the first has 0"),
    "sample_without_tokens": (
        lambda: DDCLReadout(3, embed_dim=4)(TOKENS, torch.tensor([[True] * 5, [False] * 5])),
        ValueError,
        "none in 1 of 2 .the first is number 1 of the batch.",
    ),
    "wrong_dim": (lambda: LAYER(torch.randn(2, 5, 7)), ValueError, r"embed_dim = 4; got shape \(2, 5, 7\)"),
    "wrong_mask_shape": (
        lambda: LAYER(TOKENS, torch.ones(5, 2, dtype=torch.bool)),
        ValueError,
        r"\(2, 5\); got \(5, 2\)",
    ),
    "float_mask": (lambda: LAYER(TOKENS, torch.ones(2, 5)), TypeError, "mask must be boolean.*mask.bool"),
    "integer_tokens": (
        lambda: F.prototype_attention(torch.ones(5, 4, dtype=torch.int64), torch.ones(3, 4), 1.0),
        TypeError,
        "tokens must be floating point; got torch.int64",
    ),
    "temperature_zero": (
        lambda: DDCLAttention(4, 3, temperature=0.0),
        ValueError,
        "a temperature must be > 0, one number or one per head; got 0.0",
    ),
    "temperature_negative": (lambda: F.soft_assign(TOKENS[0], torch.ones(3, 4), -1.0), ValueError, "> 0.*got -1.0"),
    "temperatures_per_head": (
        lambda: LAYER.bank.set_temperature([1.0, 1.0, 1.0]),
        ValueError,
        "one number, or one per head, 1; got 3",
    ),
    "no_prototypes": (lambda: PrototypeBank(0, 4), ValueError, "num_prototypes must be at least 1; got 0"),
    "heads_do_not_divide": (
        lambda: DDCLAttention(10, 3, num_heads=4),
        ValueError,
        "divisible by num_heads; got 10 and 4",
    ),
    "residual_without_projection": (
        lambda: DDCLAttention(4, 3, residual=True, output_projection=False),
        ValueError,
        "output_projection must not be False with residual=True",
    ),
    "unknown_scale": (lambda: EmbeddingScale(4, "half"), ValueError, "mode must be one of.*got 'half'"),  # type: ignore[arg-type]
    "unknown_scale_of_a_layer": (
        lambda: DDCLAttention(4, 3, embedding_scale="half"),  # type: ignore[arg-type]
        ValueError,
        "embedding_scale must be one of.*got 'half'. Choose",
    ),
    "unknown_scale_of_a_quantizer": (
        lambda: ResidualVectorQuantizer(4, 3, 2, embedding_scale="half"),  # type: ignore[arg-type]
        ValueError,
        "embedding_scale must be one of.*got 'half'. Choose",
    ),
    "number_for_code_update": (
        lambda: SoftVectorQuantizer(4, 3, code_update=0.05),  # type: ignore[arg-type]
        ValueError,
        r"code_update must be .*got 0.05. Pass CodeUpdate\(...\)",
    ),
    "number_for_code_update_of_levels": (
        lambda: ResidualVectorQuantizer(4, 3, 2, code_update=0.05),  # type: ignore[arg-type]
        ValueError,
        r"code_update must be a CodeUpdate; got 0.05. Pass CodeUpdate\(...\)",
    ),
    "step_size_above_one": (
        lambda: CodeUpdate(step_size=2.0),
        ValueError,
        r"step_size of a CodeUpdate must be in \(0, 1\].*got 2.0. 0.05",
    ),
    "mask_of_a_map": (
        lambda: SoftVectorQuantizer(4, 3)(torch.ones(2, 4, 5, 3), torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        r"mask must have the shape of z without its channels, \(2, 5, 3\); got \(2, 3\). Give one",
    ),
    "no_tokens_for_levels": (
        lambda: ResidualVectorQuantizer(4, 3, 2)(TOKENS[:0]),
        ValueError,
        r"z must hold at least one token; got an empty batch, of shape \(0, 5, 4\). Drop",
    ),
    "prototypes_of_another_shape": (
        lambda: PrototypeBank(3, 4).set_prototypes(torch.ones(1, 2, 4)),
        ValueError,
        r"prototypes must have shape \(1, 3, 4\); got \(1, 2, 4\). Build",
    ),
    "batch_too_small_to_whiten": (
        lambda: EmbeddingScale(4, "whiten")(torch.randn(7, 4)),
        ValueError,
        "at least 2 D = 8 valid tokens; the first has 7",
    ),
    "repulsion_of_one": (lambda: F.repulsion_energy(torch.ones(1, 4)), ValueError, "at least 2 prototypes.*K = 1"),
    # Starts
    "more_prototypes_than_points": (
        lambda: initial_prototypes(torch.randn(3, 2).repeat(5, 1), 4),
        ValueError,
        "4 prototypes for 3 distinct among 15 collected tokens",
    ),
    "more_prototypes_than_points_in_fit": (
        lambda: fit(frozen_module(65), loader(), KMeansInitialization(progress=False)),
        ValueError,
        "65 prototypes for 64 distinct",
    ),
    "empty_loader": (
        lambda: fit(frozen_module(), EmptyLoader(), KMeansInitialization()),
        ValueError,
        "training data loader is empty|gave no valid token",
    ),
    "constant_tokens": (
        lambda: fit(frozen_module(), DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4), TemperatureAnnealing()),
        ValueError,
        "have no variance, so no temperature is critical",
    ),
    # Rates
    "rho_one": (lambda: clustering_module(rho=1.0), ValueError, "must be < 1.*got 1.0.*allow_unstable=True"),
    "rho_negative": (lambda: clustering_module(rho=-0.1), ValueError, ">= 0; got -0.1"),
    "rho_nan": (lambda: clustering_module(rho=math.nan), ValueError, "rho must be a finite number; got nan"),
    "lr_zero": (
        lambda: clustering_module(lr_prototypes=0.0),
        ValueError,
        "lr_prototypes must be finite and > 0; got 0.0",
    ),
    "lr_twice": (
        lambda: clustering_module(prototype_optimizer=OptimizerConfig("Adam", {"lr": 1.0})),
        ValueError,
        "prototype_optimizer.args must not contain lr",
    ),
    "unknown_optimizer": (lambda: clustering_module(encoder_optimizer="AdmW"), ValueError, "Did you mean 'AdamW'"),
    "unknown_optimizer_argument": (
        lambda: clustering_module(encoder_optimizer=OptimizerConfig("Adam", {"beta": 1})),
        ValueError,
        "encoder_optimizer.args has no argument 'beta'. Did you mean 'betas'",
    ),
    "encoder_without_gradients": (
        lambda: clustering_module(encoder_optimizer="TokenNormalized"),
        ValueError,
        "TokenNormalized moves prototypes only",
    ),
    "lbfgs": (lambda: clustering_module(encoder_optimizer="LBFGS"), ValueError, "must not be LBFGS"),
    "share_above_one": (lambda: TokenNormalized([LAYER.bank.prototypes], lr=1.5), ValueError, r"in \(0, 1\].*got 1.5"),
    "balance_above_one": (
        lambda: TokenNormalized([LAYER.bank.prototypes], relocation_threshold=0.5, load_exponent=2.0),
        ValueError,
        r"load_exponent must be in \[0, 1\].*got 2.0",
    ),
    "groups_without_bank": (
        lambda: two_timescale_groups(torch.nn.Linear(2, 2), 0.1),
        ValueError,
        "found none in Linear",
    ),
    "one_group_for_all": (
        lambda: fit_with_one_rate(),
        RuntimeError,
        r"rho = lr_encoder / lr_prototypes is 1 at step 0.*two_timescale_groups",
    ),
    "clip_negative": (lambda: clustering_module(gradient_clip_val=-1.0), ValueError, "gradient_clip_val must be > 0"),
    "accumulate_zero": (lambda: clustering_module(accumulate_grad_batches=0), ValueError, "at least 1; got 0"),
    "trainer_clips": (
        lambda: fit(clustering_module(), loader(), gradient_clip_val=1.0),
        Exception,
        "not supported for manual optimization",
    ),
    "cosine_without_end": (
        lambda: fit(clustering_module(lr_schedule="cosine"), loader(), max_epochs=-1),
        ValueError,
        "needs a run of known length",
    ),
    # Callbacks
    "increasing_temperature": (lambda: TemperatureAnnealing(0.1, 0.2), ValueError, "must not increase.*Swap them"),
    "increasing_callable": (
        lambda: fit(frozen_module(), loader(), TemperatureAnnealing(schedule=lambda epoch: 1.0 + epoch), max_epochs=3),
        ValueError,
        "schedule must not increase; it goes from 1 to 2 at epoch 1",
    ),
    "temperature_start_zero": (
        lambda: TemperatureAnnealing(start=0.0),
        ValueError,
        "start of the schedule: a temperature must be > 0",
    ),
    "annealing_without_end": (
        lambda: fit(frozen_module(), loader(), TemperatureAnnealing(), max_epochs=-1),
        ValueError,
        "length of the run is unknown.*duration",
    ),
    "no_bank": (
        lambda: fit(bankless_module(), loader(), CollapseWarning()),
        ValueError,
        "CollapseWarning found no codebook in ",
    ),
    "check_every_zero": (
        lambda: DecompositionCheck(every_n_batches=0),
        ValueError,
        "every_n_batches must be at least 1",
    ),
    "unknown_action": (lambda: CollapseWarning(on_collapse="panic"), ValueError, "'warn', 'stop' or 'raise'"),  # type: ignore[arg-type]
    "figures_every_zero": (lambda: PrototypeFigures(every_n_epochs=0), ValueError, "every_n_epochs must be at least 1"),
    "ratio_guard_two": (lambda: RatioGuard(max_ratio=2.0), ValueError, r"max_ratio must be in \(0, 1\]; got 2.0"),
    "unknown_table_format": (lambda: AssignmentWriter("a.xlsx"), ValueError, "end in .csv or .parquet"),
    "missing_folder": (
        lambda: quiet_trainer(callbacks=[AssignmentWriter("no/such/folder/a.csv")]).predict(frozen_module(), loader()),
        ValueError,
        "existing folder; there is no 'no/such/folder'",
    ),
    # Plug-ins and data
    "pca_too_wide": (lambda: PCABackbone(4, 5), ValueError, r"in \[1, in_features = 4\]; got 5"),
    "pca_not_fitted": (lambda: PCABackbone(4, 2)({"x": torch.ones(3, 4)}), RuntimeError, "not fitted"),
    "wrong_features": (
        lambda: IdentityBackbone(5)({"x": torch.ones(3, 4)}),
        ValueError,
        r"shape \(B, 5\) or \(B, T, 5\); got \(3, 4\)",
    ),
    "no_x_in_batch": (lambda: IdentityBackbone(5)({"y": 1}), TypeError, r"a dict with keys \['y'\]"),
    "labels_out_of_range": (
        lambda: fit(clustering_module(Classification(3)), loader()),
        ValueError,
        r"labels must be in \[0, num_classes = 3\)",
    ),
    "clustering_without_prototypes": (
        lambda: Clustering(4).build(HeadWithoutBank()),
        ValueError,
        "needs a head with prototypes",
    ),
    "code_out_of_range": (
        lambda: CodebookMetrics(4).update(torch.tensor([[[4]]])),
        ValueError,
        r"codes must be in \[0, num_codes = 4\), or -1 for padding; got values from 4 to 4",
    ),
    "decoder_of_another_size": (
        lambda: fit(autoencoder(ConvDecoder(1, (4, 4))), DigitsDataModule(as_images=True)),
        ValueError,
        r"the shape of the target 'x', \(256, 1, 8, 8\); got \(256, 1, 16, 16\)",
    ),
    "figures_of_no_reconstruction": (
        lambda: fit(clustering_module(), loader(), ReconstructionFigures()),
        ValueError,
        "whose task is Reconstruction; got DDCLReadoutModule with task Clustering",
    ),
    "metric_without_samples": (lambda: empty_metric(), RuntimeError, "update"),
    "val_fraction_one": (lambda: DigitsDataModule(val_fraction=1.0), ValueError, r"in \[0, 1\); got 1.0"),
    "negative_noise": (lambda: DebrisDataModule(noise=-1.0), ValueError, "noise"),
    "missing_catalogue": (
        lambda: DebrisDataModule(catalogue="nowhere.csv").setup(),
        (FileNotFoundError, ValueError),
        "nowhere.csv",
    ),  # type: ignore[dict-item]
    "unknown_recipe": (lambda: find_recipe("digitz"), ValueError, "Did you mean 'digits'"),
}


class HeadWithoutBank(DDCLReadout):
    def __init__(self) -> None:
        super().__init__(4)


class EmptyLoader:
    """An iterable without batches whose length says otherwise, as a filter that drops everything leaves it."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter(())


def autoencoder(decoder: ConvDecoder) -> DDCLReadoutModule:
    return DDCLReadoutModule(ConvBackbone(1, 4, (4,)), DDCLReadout(4), Reconstruction(decoder))


def bankless_module() -> Any:
    from lightning.pytorch.demos.boring_classes import BoringModel

    return BoringModel()


def fit_with_one_rate() -> None:
    class OneRate(DDCLReadoutModule):
        def __init__(self) -> None:
            super().__init__(LinearBackbone(), DDCLReadout(4), Clustering(4), rho=0.9)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    fit(OneRate(), loader(), RatioGuard(on_violation="raise"))


def empty_metric() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns before our error
        ClusteringMetrics(3, 3).compute()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_a_clear_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    action, kind, message = CASES[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        action()


def sentence(message: ast.expr) -> str:
    """The text of a message, with ``{}`` for values."""
    if isinstance(message, ast.JoinedStr):
        return "".join(map(sentence, message.values))
    return str(message.value) if isinstance(message, ast.Constant) else "{}"


def raised_messages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and message of every error that a file raises by a text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield node.lineno, sentence(node.exc.args[0])


def has_remedy(message: str) -> bool:
    """True unless a message ends with the value that it got; a value at the end stands for a sentence."""
    got = re.search(r"\bgot\b", message)
    return got is None or bool(re.search(r"\. [A-Z0-9`'{]|\{\}$", message[got.end() :]))


def test_messages_say_what_to_do_after_the_value_that_they_got() -> None:
    assert has_remedy("rate must be > 0; got {}. Pass 1.")
    assert not has_remedy("rate must be > 0; got {}.")
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {message}"
        for folder in ("ddcl_lightning", "callbacks", "datamodules", "recipes")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, message in raised_messages(path)
        if not has_remedy(message)
    ]
    assert missing == []
