"""Terms of the page with their meaning."""

GUIDE = {
    "Prototype": "A point in the space of the embeddings that training has moved. A sample's shares say how much it "
    "resembles each of them; they sum to 100 %. They are a description of the data. Whether a prediction reads them "
    "depends on the head, and the page says so.",
    "Share of the samples": "How many samples have it as their strongest prototype. The mean share counts the weaker "
    "parts too: it is what the prototype holds of an average sample. A prototype to which no token is nearest is dead: "
    "it is nothing's first choice. Numbers are rounded, so sums can be off by one.",
    "Nearest": "Training samples at the smallest distance d to the prototype, as the prototypes see them, of those "
    "whose strongest prototype it is (its members), and tokens that it is nearest to; # is the place in the data. "
    "Where it has none, the nearest of all are shown and called so. A sample of several tokens stands at their mean; "
    '"largest shares" are the members that are made of it most.',
    "Classes of what it holds": "What the prototype's mass consists of, by true class. The thin line marks the class's "
    "share of all data: a bar far beyond it says what the prototype is about. Labels took no part in a clustering.",
    "Characteristic words": "Words that the prototype holds more of than of words in general, by the evidence for it; "
    "the factor says how many times as often it has them.",
    "Temperature": "T, in squared distance: the softness of the shares. Perplexity is the effective number of "
    "prototypes in use; it equals their number if all are equally large.",
}
DECISION_GUIDE = {
    "Contribution": "A linear classifier's logit is a sum: each token adds a term through each prototype, and there is "
    "a bias. An input's card shows the terms of the predicted class's logit less those of the runner-up's. They add "
    "up exactly; the last digits are rounded so that the numbers printed do too.",
    "Speaks for and against": "The mean over inputs of a prototype's contribution to each class's logit, less the mean "
    "over classes, since only differences of logits decide. The difference of two classes' terms is the mean of what "
    "an input's card shows for that pair.",
    "Without it": "The probability of the predicted class when the prototype is taken out of the bank and its tokens "
    "go to the others of its head: what really happens to this model, where a contribution is a term of a sum.",
}
