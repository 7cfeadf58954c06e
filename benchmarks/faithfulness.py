"""Are explanations faithful and stable: word pieces and prototypes taken out of sentences of SST-2.

The heads are those of text_readouts, with five seeds, each trained on the 20,000 phrases that it draws: as many as the
search for their rates there took, which judges on held-out phrases. On the same validation sentences for all:

- word pieces are cut out of the text (deletion) or put in (insertion) in the order of a score, and the encoder reads
  what is left anew: area under the probability of the predicted class;
- the prototype that a score puts first is taken out of the bank: fall of the margin and of the probability;
- sentences are edited a little: are the same five prototypes named? Another seed: are the members the same ones,
  prototypes matched by the Hungarian method? Beside k-means with the same K on the encoder's tokens.

    python benchmarks/faithfulness.py --encoder FOLDER --texts FOLDER --cache FOLDER
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from _faithfulness_measures import (
    EDITS,
    Assigned,
    Encoder,
    Inputs,
    Numbers,
    curve_areas,
    knock_outs,
    matched_members,
    named_overlap,
    nearest,
    piece_overlap,
    purity,
    read_out,
)
from _study import Case, Options, Study
from _tables import Cell, Config, Results, Run, Table, extreme, joined, mean, read
from sklearn.cluster import KMeans
from text_readouts import READOUTS, TASKS, create_backbone, data_module, encoder_settings, fit_head
from torch import Tensor, nn

from ddcl_lightning.backbones import TransformersBackbone
from ddcl_lightning.explain.reencoding import word_pieces
from ddcl_lightning.explain.token_scores import contribution_scores
from ddcl_lightning.heads import DDCLReadout
from ddcl_lightning.heads.base import Head

SEEDS = range(5)
INPUTS = 100  # sentences of the validation split
STEPS = 6  # of a curve
DRAWS = 5  # random orders
SAMPLE = 8192  # tokens of training phrases that k-means clusters, as many as a head starts from
HEADS = {  # label, and the rate that the search of text_readouts finds on held-out phrases
    "ours-salience": ("histogram, salience", 0.03),
    "ours-mass": ("tokens + histogram, mass", 0.03),
    "ours-slots": ("slots", 0.03),
    "ours-both": ("centroid + histogram", 0.03),
    "attention": ("attention", 0.01),
    "pma": ("PMA", 0.003),
}
OURS = [name for name in HEADS if name.startswith("ours")]
NEEDS = ("encoder", "texts")
CASES = {
    **{
        name: Case(label, {**TASKS["sst2"], **READOUTS[name][1], "rate": rate}, NEEDS)
        for name, (label, rate) in HEADS.items()
    },
    **{
        f"kmeans-{number}": Case(
            f"k-means, K = {number}",
            {**TASKS["sst2"], "method": "kmeans", "prototypes": number, "restarts": 10},
            NEEDS,
        )
        for number in (14, 16)
    },
}
ORDERS = {
    "contribution": "exact contributions",
    "share": "share of the strongest prototype",
    "weight": "weights of the head",
    "gradient": "gradient x input",
    "leave-one-out": "leave-one-out, encoded anew",
    "random": "random",
}
KINDS = ("deletion", "insertion")
LOSSES = {"margin": ".2f", "probability": ".3f", "supports": ".2f"}
KNOCK_OUT_COLUMNS = (
    "fall of the margin",
    "fall of the probability",
    "supports the prediction",
    "margin less random",
    "correlation with the falls",
)
CHOICES = {"contribution": "largest contribution", "share": "largest share", "random": "random"}


@dataclass(frozen=True)
class Sentences:
    """All validation sentences.

    Attributes:
        inputs: Tokens ``(B, T, D)``, and their mask with special tokens.
        kept: ``(B, T)`` boolean, True for word pieces.
        labels: ``(B,)``.
    """

    inputs: tuple[Tensor, Tensor]
    kept: Tensor
    labels: Tensor

    @classmethod
    @cache
    def of(cls, max_length: int, options: Options) -> "Sentences":
        """Sentences of the data, encoded."""
        texts, labels = validation(options)
        pieces, kept = word_pieces(backbone_of(max_length, options), texts)
        mask = kept | (pieces[..., 1] == 1)
        ids = [row[valid] for row, valid in zip(pieces[..., 0], mask, strict=True)]
        return cls((encoder(max_length, options)(ids).values, mask), kept, labels)


def run(config: Config, seed: int, options: Options) -> Run:
    """One head or k-means with one seed; what is compared across seeds, with the next seed too."""
    torch.set_flush_denormal(True)
    case, seeds = json.dumps(config), (seed, SEEDS[(seed + 1) % len(SEEDS)])
    sentences = Sentences.of(config["max_length"], options)
    if config["method"] == "kmeans":
        assigned = [nearest(cluster(case, each, options), *sentences.inputs) for each in seeds]
        return members(assigned, sentences)
    (head, classifier, scores), (other, other_classifier, _) = (trained(case, each, options) for each in seeds)
    encode, chosen = encoder(config["max_length"], options), chosen_pieces(config["max_length"], options)
    inputs = Inputs.of(*chosen["none"], encode, head, classifier)
    steps, draws = (3, 2) if options.quick else (STEPS, DRAWS)
    result = {**scores, "orders": curve_areas(head, classifier, inputs, encode, steps, draws)}
    if "contribution" in result["orders"]:
        terms = [
            contribution_scores(*model, *inputs.compared) for model in ((head, classifier), (other, other_classifier))
        ]
        result["word_pieces"] = piece_overlap(terms, inputs.kept)
    if isinstance(head, DDCLReadout) and isinstance(other, DDCLReadout):
        result["knock_out"] = knock_outs(head, classifier, inputs)
        result["edits"] = {
            name: named_overlap(head, classifier, inputs, Inputs.of(*chosen[name], encode, head, classifier))
            for name in EDITS
        }
        result |= members([read_out(each, *sentences.inputs) for each in (head, other)], sentences)
    return result


# Models ------------------------------------------------------------------------------------------


@cache
def backbone_of(max_length: int, options: Options) -> TransformersBackbone:
    """The frozen encoder, one for all."""
    return create_backbone({"max_length": max_length}, options)


@cache
def encoder(max_length: int, options: Options) -> Encoder:
    """Encoder of sequences of ids, which keeps their tokens in memory."""
    return Encoder(backbone_of(max_length, options))


@cache
def trained(case: str, seed: int, options: Options) -> tuple[Head, nn.Linear, Numbers]:
    """Head and classifier in evaluation mode, with their accuracy on the validation sentences."""
    config = json.loads(case)
    backbone = backbone_of(config["max_length"], options)
    data = data_module("sst2", options, seed, limit=config["search"])
    epochs = 1 if options.quick else config["epochs"]
    module, scores = fit_head(backbone, data, config, config["rate"], seed, epochs)
    module.eval()
    classifier = module.task.classifier
    assert isinstance(classifier, nn.Linear)
    return module.head, classifier, {"acc": scores["val/acc"]}


@cache
def cluster(case: str, seed: int, options: Options) -> Tensor:
    """Centers ``(K, D)`` of k-means on tokens of training phrases."""
    config = json.loads(case)
    backbone, rows, number = backbone_of(config["max_length"], options), [], 0
    for batch in data_module("sst2", options, seed).train_dataloader():
        tokens = backbone(batch)
        rows.append(tokens.values if tokens.mask is None else tokens.values[tokens.mask])
        number += len(rows[-1])
        if number >= SAMPLE:
            break
    sample = torch.cat([chunk.flatten(0, -2) for chunk in rows])[:SAMPLE].float().numpy()
    restarts = 1 if options.quick else config["restarts"]
    kmeans = KMeans(config["prototypes"], n_init=restarts, random_state=seed).fit(sample)
    return torch.from_numpy(kmeans.cluster_centers_)


def members(assigned: Sequence[Assigned], sentences: Sentences) -> Numbers:
    """Agreement of the members of two models, and their purity in the first."""
    codes = [codes[sentences.kept] for codes, _ in assigned]  # (N, H) of word pieces
    shares, labels = assigned[0][1], sentences.labels
    sizes = shares.shape[-1]
    shuffled = codes[1][torch.randperm(len(codes[1]), generator=torch.Generator().manual_seed(0))]
    return {
        "members": matched_members(*codes, sizes),
        "chance": matched_members(codes[0], shuffled, sizes),
        "purity_pieces": purity(codes[0], labels.repeat_interleave(sentences.kept.sum(1)), sizes),
        "purity_texts": purity(shares.argmax(-1), labels, sizes),
    }


# Sentences ---------------------------------------------------------------------------------------


@cache
def validation(options: Options) -> tuple[list[str], Tensor]:
    """Validation sentences and their classes."""
    batches = list(data_module("sst2", options, 0).val_dataloader())
    return [text for batch in batches for text in batch["text"]], torch.cat([batch["y"] for batch in batches])


@cache
def chosen_pieces(max_length: int, options: Options) -> dict[str, tuple[Tensor, Tensor]]:
    """Word pieces of the sentences whose explanations are measured, as they are and after each edit."""
    texts = [text for text in validation(options)[0] if len(text.split()) >= 4]
    order = np.random.default_rng(0).permutation(len(texts))[: 8 if options.quick else INPUTS]
    pieces = {"none": word_pieces(backbone_of(max_length, options), [texts[place] for place in order])}
    for name, edit in EDITS.items():
        generator = np.random.default_rng(0)
        edited = [edit(texts[place], generator) for place in order]
        pieces[name] = word_pieces(backbone_of(max_length, options), edited)
    return pieces


# Tables ------------------------------------------------------------------------------------------


def orders_table(results: Results) -> Table:
    """Deletion and insertion of every order, a column per head."""
    heads = [name for name in HEADS if results.of(name)]
    rows = [["word pieces in the order of", *(results.labels[name] for name in heads)]]
    accuracy = mean("acc", deviation=False)
    for order, label in ORDERS.items():
        cell = joined(*(mean(f"orders.{order}.{kind}", deviation=False) for kind in KINDS))
        rows.append([label, *(cell(results.of(name)) for name in heads)])
    return [*rows, ["accuracy of the head", *(accuracy(results.of(name)) for name in heads)]]


def comparison_table(results: Results) -> Table:
    """The exact contributions less every other order, paired by seed."""
    heads = [name for name in HEADS if read(results.of(name), "orders.contribution.deletion")]
    rows = [["exact contributions less", *(results.labels[name] for name in heads)]]
    for order, label in ORDERS.items():
        if order != "contribution":
            cell = joined(*(difference("orders.contribution", f"orders.{order}", kind) for kind in KINDS))
            rows.append([label, *(cell(results.of(name)) for name in heads)])
    largest = extreme(max, lambda run: max(each["error"] for each in run["orders"].values()))
    return [*rows, ["largest standard error over sentences", *(largest(results.of(name)) for name in heads)]]


def knock_out_table(results: Results) -> Table:
    """Losses without a prototype, a row per head and choice."""
    rows = [["head, prototype by", *KNOCK_OUT_COLUMNS]]
    for name in OURS:
        for choice, label in CHOICES.items():
            columns = [
                *(mean(f"knock_out.{choice}.{key}", form) for key, form in LOSSES.items()),
                difference(f"knock_out.{choice}", "knock_out.random", "margin") if choice != "random" else lambda _: "",
                mean(f"knock_out.{choice}.correlation", ".2f"),
            ]
            if results.of(name):
                rows.append([f"{results.labels[name]}, {label}", *(cell(results.of(name)) for cell in columns)])
    return rows


def stability_table(results: Results) -> Table:
    """Overlap after an edit and with another seed, and the purity."""
    columns = {
        "named after: a word less": mean("edits.word", ".2f"),
        "full stop": mean("edits.stop", ".2f"),
        "two words swapped": mean("edits.swap", ".2f"),
        "largest word pieces, other seed": mean("word_pieces", ".2f"),
        "members, other seed": mean("members", ".2f"),
        "members by chance": mean("chance", ".2f"),
        "purity, word pieces": mean("purity_pieces"),
        "purity, sentences": mean("purity_texts"),
    }
    return results.table("prototypes", [name for name in CASES if name != "pma"], columns)


def kmeans_table(results: Results) -> Table:
    """Members and purity less those of k-means with the same K, paired by seed."""
    columns = {"members": "members", "purity, word pieces": "purity_pieces", "purity, sentences": "purity_texts"}
    rows = [["less k-means of the same K", *columns]]
    for name in OURS:
        if runs := results.of(name):
            baseline = {
                run["seed"]: run for run in results.of(f"kmeans-{CASES[name].config['arguments']['num_prototypes']}")
            }
            pairs = [(run, baseline[run["seed"]]) for run in runs if run["seed"] in baseline]
            rows.append(
                [results.labels[name], *(paired([a[key] - b[key] for a, b in pairs]) for key in columns.values())]
            )
    return rows


def difference(first: str, second: str, key: str) -> Cell:
    """Mean difference of two numbers of the same run, and its standard error over seeds."""
    return lambda runs: paired(
        [a - b for a, b in zip(read(runs, f"{first}.{key}"), read(runs, f"{second}.{key}"), strict=False)]
    )


def paired(differences: list[float]) -> str:
    """Mean and its standard error."""
    if not differences:
        return ""
    error = f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.3f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.3f}{error}"


STUDY = Study(
    "faithfulness",
    CASES,
    run,
    {
        "orders": orders_table,
        "comparison": comparison_table,
        "knock_out": knock_out_table,
        "stability": stability_table,
        "kmeans": kmeans_table,
    },
    seeds=SEEDS,
    settings=lambda options: {
        "encoder": encoder_settings(options),
        "inputs": INPUTS,
        "steps": STEPS,
        "draws": DRAWS,
        "sample": SAMPLE,
    },
    packages=("transformers",),
    quick={name: CASES[name] for name in ("ours-salience", "ours-slots", "attention", "pma", "kmeans-14")},
)

if __name__ == "__main__":
    STUDY.main(__doc__)
