"""Lightning over the same batches: `lightning_loop.py BATCH COLUMNS WIDTH LAYERS LR FOLDER STEPS ...`.

It says how long `fit` took for each number of steps, in a line of JSON. It lives in an environment of its own and
imports nothing of ours; set up as its documentation says for a loop that shall not wait: a logger each 50 steps, a
checkpoint at the end, no progress bar and no summary.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn


def main() -> None:
    """Train, and say how long it took."""
    import lightning  # type: ignore[import-not-found]
    from lightning.pytorch.loggers import CSVLogger  # type: ignore[import-not-found]

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    batch, columns, width, layers = map(int, sys.argv[1:5])
    lr, folder, counts = float(sys.argv[5]), sys.argv[6], list(map(int, sys.argv[7:]))

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            parts: list[nn.Module] = [nn.Linear(columns, width), nn.ReLU()]
            for _ in range(layers):
                parts += [nn.Linear(width, width), nn.ReLU()]
            self.model = nn.Sequential(*parts, nn.Linear(width, 1))

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=lr, fused=True)

    torch.manual_seed(1)
    made = [(torch.randn(batch, columns), torch.randn(batch, 1)) for _ in range(64)]
    seconds = []
    for count in counts:
        data: Any = [made[number % len(made)] for number in range(count)]
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=CSVLogger(folder),
            log_every_n_steps=50,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        began = time.perf_counter()
        trainer.fit(Module(), loader)
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
