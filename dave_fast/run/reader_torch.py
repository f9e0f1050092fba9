"""A run's maps as a torch Dataset: apart, so that reading maps needs no torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from dave_fast.errors import InputError
from dave_fast.run.reader import Maps


class MapDataset(Dataset[dict[str, Any]]):
    """Rows as dictionaries that torch's own collation takes."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.maps[index]
        if row.map is None:
            raise InputError(f"{row.id} has no map; choose with maps.filter(status='ok').torch().")
        item = {
            "id": row.id,
            "map": torch.from_numpy(row.map),
            "target": row.target,
            "prediction": row.prediction,
            "probability": row.probability,
        }
        return item if row.raw is None else item | {"raw": torch.from_numpy(row.raw)}
