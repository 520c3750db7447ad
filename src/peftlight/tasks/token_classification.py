"""Token classification: one class for each word, such as the part of an entity's name that it is."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from peftlight.errors import UserError
from peftlight.tasks.classifier import Classifier
from peftlight.tasks.columns import reads_columns
from peftlight.tasks.entities import EntityScores, marks_entities


class TokenClassification(Classifier):
    """One class for each word; logs loss and accuracy of the words, and precision, recall and F1 of the entities.

    Where the classes are not named as IOB2 and IO name them (O, B-type, I-type) there are no entities, and F1 is the
    mean over the classes.
    """

    auto_class = "AutoModelForTokenClassification"
    scores_tokens = True

    def scores(self, classes: int) -> dict[str, Metric]:
        of_words = super().scores(classes)
        if not marks_entities(self.label_names or ()):
            return of_words
        return {"accuracy": of_words["accuracy"], "entities": EntityScores(self.label_names or ())}

    @reads_columns
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """One record for each row: its id, its words, and a tag for each; none for words that were cut off."""
        words_of = getattr(self._datamodule(), "words_of", None)
        if words_of is None or "words" not in batch:
            raise UserError("TokenClassification predicts a tag for each word, and nothing says where the words "
                            "begin: predict rows of words, for example --data TaggedWords.")  # fmt: skip
        guesses = self.logits(batch).argmax(-1)
        columns = (batch["row"], batch["words"], guesses)
        return [
            {"id": row, **self._tagged(words_of(row), begins, tags)}
            for row, begins, tags in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def _tagged(self, words: list[str], begins: list[int], tags: list[int]) -> dict[str, Any]:
        """`begins` has for each token the number of the word that begins with it, or one below 0."""
        assert self.label_names is not None
        tag_of = {word: self.label_names[tag] for word, tag in zip(begins, tags, strict=True) if word >= 0}
        return {"words": words, "tags": [tag_of.get(number) for number in range(len(words))]}
