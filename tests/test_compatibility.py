"""The table of what works with what says what happens."""

import pytest

from compatibility import COLUMNS, documented, outcome
from recipes import RECIPES
from tasks.small import QUIET

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_table_is_true(recipe: str) -> None:
    for task, architecture in COLUMNS:
        assert outcome(recipe, task, architecture) == documented()[recipe, task, architecture], (task, architecture)
