"""Text of a module of the user's with a LightningDataModule; its options take away what a batch needs."""

SOURCE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


def row(number):
    return {
        "input_ids": torch.tensor([2, 5 + number % 3, 7 if number % 2 else 9, 3]),
        "attention_mask": torch.ones(4, dtype=torch.long), "labels": torch.tensor(number % 2),
        "row": torch.tensor(number),
    }


class MyData(LightningDataModule):
    label_names = ["cold", "hot"]

    def __init__(self, without: str = "", loaders: int = 1, same: bool = False, by_position: bool = False, lists=False):
        super().__init__()
        self.without, self.loaders, self.same, self.by_position, self.lists = without, loaders, same, by_position, lists

    def loader(self, count, first=0):
        rows = [{key: value for key, value in row(number).items() if key != self.without}
                for number in range(first, first + count)]
        if self.same:
            rows = [{**row, "row": torch.tensor(1)} for row in rows]
        if self.lists:
            rows = [list(row.values()) for row in rows]
        return DataLoader(rows, 4) if self.by_position else DataLoader(rows, batch_size=4)

    def train_dataloader(self):
        return self.loader(16)

    def val_dataloader(self):
        return self.loader(10) if self.loaders == 1 else [self.loader(10), self.loader(3, 10)]

    test_dataloader = predict_dataloader = val_dataloader


class Nothing:
    pass
"""
