"""Methods that other trainers call and this one does not; its law: none of them is left out in silence.

Whoever brings a class from Lightning, Keras or Hugging Face would train with another optimizer, or by another loss,
than what is written there.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

_STREAMS = "give the streams to fit"
_OPTIMIZER = "give optimizer= and scheduler="
_CALLBACK = "give a callback, callbacks=[...]"
_STEP = "override training_step, or give loss= or step="
INSTEAD: dict[str, str] = {
    "configure_optimizers": _OPTIMIZER,
    "create_optimizer": _OPTIMIZER,
    "create_scheduler": _OPTIMIZER,
    "create_optimizer_and_scheduler": _OPTIMIZER,
    "optimizer_step": "override the optimizer's own step",
    "lr_scheduler_step": "give scheduler= one with an interval",
    "configure_gradient_clipping": "give gradient_clip_norm= or gradient_clip_value=",
    "compute_loss": _STEP,
    "train_step": _STEP,
    "compute_metrics": "give metrics=",
    "test_step": "evaluate computes by validation_step",
    "prediction_step": "override predict_step",
    "training_epoch_end": _CALLBACK,
    "validation_epoch_end": _CALLBACK,
    "train_dataloader": _STREAMS,
    "val_dataloader": _STREAMS,
    "get_train_dataloader": _STREAMS,
    "get_eval_dataloader": _STREAMS,
}
"""What is done here in place of each; of names that begin with `on_` that is a callback's."""


def say_uncalled(kind: type, base: type, *, stepping: bool, optimizing: bool) -> None:
    """Say which methods of `kind`, a subclass of `base`, nothing calls.

    `stepping`: it has a step of its own, `optimizing`: an optimizer is given; either may well call those that make a
    loss or an optimizer.
    """
    aside = {_STEP} if stepping else set()
    aside |= {_OPTIMIZER} if optimizing else set()
    for name in sorted(set(dir(kind)).difference(dir(base))):
        instead = INSTEAD.get(name, _CALLBACK if name.startswith("on_") else "")
        if instead and instead not in aside and callable(getattr(kind, name, None)):
            logger.warning("%s.%s: nothing calls it here; %s", kind.__name__, name, instead)
