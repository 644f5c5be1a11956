"""All that one life of a run consists of, and how it is put down and taken up again.

Its law: nothing live is touched before everything that a checkpoint holds was found to fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from streamtrain import rng as rngs
from streamtrain import state as trees
from streamtrain.averaging import Average
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.naming import alike, matched, unmatched
from streamtrain.compiling import Compiled
from streamtrain.data.source import Stream
from streamtrain.differences import differences, other_rate, refuse
from streamtrain.errors import CheckpointError, DataError, StreamtrainError, UserCodeError
from streamtrain.expanded import as_large
from streamtrain.freezing import Freezing
from streamtrain.learned import Learned
from streamtrain.optimizer_state import state_by_name
from streamtrain.progress import Progress
from streamtrain.refusing import refusing, refusing_for
from streamtrain.rng import Rng, RngState
from streamtrain.rollback import Rollback
from streamtrain.schedulers import LearningRate
from streamtrain.state import Copier, Snapshot, Tree, fresh
from streamtrain.step import TrainStep
from streamtrain.switching import Switch
from streamtrain.taking_up import VERSION, check_own_rng, check_schedule, check_state
from streamtrain.toggled import Toggled
from streamtrain.unkept import Unkept
from streamtrain.untrained import Untrained

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Life:
    """The live objects of a fit."""

    model: nn.Module
    optimizer: Optimizer
    lr: LearningRate
    step: TrainStep
    switch: Switch | None = None
    """Of an optimizer that learns with other weights than those to be judged by."""
    stream: Stream | None
    """None where it is saved outside of a fit that never was."""
    average: Average | None = None
    rollback: Rollback | None = None
    freezing: Freezing | None = None
    toggled: Toggled | None = None
    groups: int | None = None
    """Of the optimizer when it was made; None once it was said that it has others."""
    compiled: Compiled | None = None
    unkept: Unkept | None = None
    untrained: Untrained | None = None
    rng: Rng
    progress: Progress
    callbacks: dict[str, object]
    """By the names under which their states are kept."""
    settings: dict[str, Any]
    """What must not change between two lives, by name."""
    habits: dict[str, Any]
    """What may change, but is said: then the numbers are not the same to the bit."""
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each metric."""
    validated: set[str] = field(default_factory=set)
    """The names of what this life's validations have logged."""
    line_told: bool = False
    """The log has a line of its last step, though none was due there: what comes later is another line's."""
    epoch_rng: RngState | None = None
    """Of a source whose order may depend on torch's generator: how that stood when the epoch began."""
    own_rng: dict[str, Any] = field(default_factory=dict)
    """The generators that a foreign source keeps for itself: how they stood when the epoch began, or will."""
    resumed: bool = False
    """Those are still to be put into the source."""
    before_ahead: RngState | None = None
    """How `rng` stood before a batch was pulled that no burst has taken yet."""
    ended: tuple[str, str] | None = None
    """Reason and detail of an end that more epochs don't undo."""
    restores: str | None = None
    """The monitor whose best weights the end puts into the model, as a decider of this life or an earlier one said."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Those weights, where no checkpoint holds them."""
    restored: tuple[int, Path] | None = None
    """The step at which the model was given the best weights, and the checkpoint that has the last ones."""
    told_restored: bool = False
    """That was said."""
    asked: dict[str, Tree] = field(default_factory=dict)
    """While deciders are asked, and where that failed: the callbacks' states of before, for the next life tells and
    asks again."""
    left_behind: bool = False
    """A job that hangs was left behind: it may go on some day, and nobody counts what it makes of the weights."""

    @property
    def learned(self) -> Learned:
        """What its updates change."""
        return Learned(
            model=self.model,
            optimizer=self.optimizer,
            switch=self.switch,
            average=self.average,
            rollback=self.rollback,
        )

    def state(self, late: Collection[str] = ()) -> Tree:
        """All but the weights and the optimizer, as of the last finished update, and the states of the callbacks that
        are `late`."""
        return {
            "version": VERSION,
            "step": self.progress.step,
            "progress": self.progress.state_dict(),
            "stream": None if self.stream is None else self.stream.state_dict(),
            "rng": self.before_ahead or self.rng.state,
            "epoch_rng": self.epoch_rng,
            "own_rng": self.own_rng,
            "scheduler": self.lr.state_dict(),
            "scaler": None if self.step.scaler is None else self.step.scaler.state_dict(),
            "callbacks": {name: _state_of(name, each) for name, each in self.callbacks.items() if name not in late}
            | self.asked,
            "metrics": dict(self.metrics),
            "window": self.step.tally.window.state_dict(),
            "means": self.step.tally.epoch.state_dict(),
            "settings": self.settings,
            "habits": self.habits,
            "ended": self.ended,
            "restores": self.restores,
            "config": dict(self.config),
            "spikes": self.step.spikes.state_dict(),
            "kept": None,
            "average": None,  # the snapshot's: only between two jobs of the train thread is it where it belongs
        }

    def check_whole(self) -> None:
        """Raise CheckpointError unless the weights are those of the last update that was counted."""
        if self.step.torn or self.left_behind:
            raise CheckpointError(
                "the weights are those of no step: the fit ended in the middle of an update",
                hint="load_checkpoint() the last one first; where there is none, begin anew.",
            )

    def states(self, names: Iterable[str]) -> dict[str, Tree]:
        """Copies of the states of the callbacks of these names."""
        return {name: trees.clone(_state_of(name, self.callbacks[name])) for name in names}

    def check(self) -> None:
        """Raise CheckpointError if anything here can't be kept in a checkpoint; say whose states there only their order
        tells apart."""
        trees.check(self.state(), "state")
        trees.check(state_by_name(self.optimizer, self.model), "optimizer")
        trees.check(dict(self.model.state_dict()), "model")
        for group in alike({name: each for name, each in self.callbacks.items() if has_state(each)}):
            logger.warning(
                "%s: nothing but their order tells them apart at a resume, so keep it, or give each a `state_key`",
                ", ".join(group),
            )

    def try_loading(self) -> None:
        """Raise CheckpointError if the model does not take what it gives to be saved; on the train thread. It has its
        own values again, to the bit."""
        _put(self.model, self.model.state_dict(), "the model could not be loaded from a checkpoint of its own")

    def bytes(self) -> int:
        """About how large a snapshot is; on the train thread."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors())

    def snapshot(self, state: Tree, copier: Copier = fresh) -> Snapshot:
        """A copy of everything; on the train thread, between two updates."""
        if self.unkept is not None:
            self.unkept.tell()
        if self.untrained is not None:
            self.untrained.tell()
        self._tell_groups()
        if self.switch is not None:
            self.switch.judge()
        optimizer = state_by_name(self.optimizer, self.model)
        if self.switch is not None:
            optimizer = {"optimizer": optimizer, "learning": self.switch.state_dict()}
        if self.average is not None:
            state = {**state, "average": self.average.state_dict()}
        if self.toggled is not None:
            state = {**state, "habits": {**state["habits"], **self.toggled.state_dict()}}
        if self.rollback is not None:
            state = {**state, "kept": self.rollback.state_dict()}
        live = {"model": dict(self.model.state_dict()), "optimizer": optimizer, "state": state}
        return Snapshot(**trees.clone(live, copier))

    def _tell_groups(self) -> None:
        """Say once that groups were added in training, which no optimizer of a next life has when it is made."""
        made, now = self.groups, len(self.optimizer.param_groups)
        if made is not None and made != now:
            self.groups = None
            logger.warning(
                "the optimizer has %d groups, and had %d when the run began: no run can go on from a checkpoint with "
                "them. Give it all of them before the fit, and freeze what is to be trained later (freeze=)",
                *(now, made),
            )

    def tensors(self) -> list[Tensor]:
        """The large ones that a snapshot copies, as they are; on the train thread, once there was an update.

        Raises CheckpointError if an optimizer keeps what can't be kept: before its first update it has nothing.
        """
        live: dict[str, Tree] = {"model": dict(self.model.state_dict())}
        live["optimizer"] = state_by_name(self.optimizer, self.model)
        live["average"] = None if self.average is None else self.average.state_dict()
        live["kept"] = None if self.rollback is None else self.rollback.state_dict()
        return list(trees.encode(live)[1].values())

    def weights_to_keep(self) -> dict[str, Tensor]:
        """A copy of the model's state, with the weights to be judged by; on the train thread."""
        if self.switch is not None:
            self.switch.judge()
        weights: dict[str, Tensor] = trees.clone(dict(self.model.state_dict()))
        return weights

    def put_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model other weights to be judged by; on the train thread."""
        if self.switch is not None:
            self.switch.judge()
            self.switch.forget()
        as_large(self.model, weights)
        _put(self.model, weights, "the model can't take back weights that it had")

    def best_weights(self) -> dict[str, Tensor]:
        """A copy of the model's state with the weights that were validated; on the train thread."""
        with nullcontext() if self.average is None else self.average.swapped_in():
            return self.weights_to_keep()

    def load_weights(self, weights: Mapping[str, Tensor], average: Tree = None) -> None:
        """Have the model go on with these, and with the average of a checkpoint instead if there is one."""
        self.put_weights(weights)
        if self.average is None:
            return
        if average is None:
            self.average.restart()
        else:
            self.average.load_state_dict(average)
            self.average.into_model()

    @refusing
    def restore(
        self, snapshot: Snapshot, path: Path, checkpoints: Path | None, *, allow_data_change: bool = False
    ) -> None:
        """Go to where the snapshot stands. Raises CheckpointError with a table of the differences if it does not fit;
        DataError if the data have changed. With `allow_data_change` the epoch begins anew on those, which is said; the
        learning rate may be another: it is so from here on, in proportion to what a schedule has made of it."""
        state, learned = snapshot.state, self.learned
        check_state(state, path)
        rate = learned.check(snapshot, self.settings, path)
        check_schedule(self.lr, state["scheduler"])
        check_own_rng(self.stream, state["own_rng"])
        gone, unknown = unmatched(state["callbacks"], self.callbacks)
        with ExitStack() as back:
            self._load_callbacks(state["callbacks"], path, back)
            changed = self._go_to(state["stream"], path, allow_data_change=allow_data_change)
            back.pop_all()
        self._say_habits(state)
        learned.load(snapshot)
        self.lr.load_state_dict(state["scheduler"])
        self.rng.state = state["rng"]
        self.progress.load_state_dict(state["progress"], checkpoints, path.parent)
        self._say_lost_bests(path)
        if rate != 1.0:
            other_rate(self.optimizer, self.lr, self.settings, rate)
        self._take_up(state)
        if changed:
            self.progress.batch, self.progress.passed = 0, 0
            self.progress.owes, self.progress.verdicts = "", []
        else:
            self._go_there(state)
        if gone:
            logger.info("callbacks of the checkpoint that are not there now, with their states: %s", ", ".join(gone))
        if unknown:
            logger.warning(
                "nobody takes up these states of the checkpoint: which callback of now had them can't be known: %s",
                ", ".join(unknown),
            )
        if any(getattr(callback, "gives_up", False) for callback in self.callbacks.values()):
            self.ended = state["ended"]  # else whoever had ended it is gone, or more patient now

    def _say_lost_bests(self, path: Path) -> None:
        """The best of an older checkpoint goes once a newer one is better, which may be the one that is damaged now."""
        for best in self.progress.bests.values():
            if best.checkpoint is not None and not best.checkpoint.is_dir():
                logger.warning(
                    "%s names step %d as the best %s (%g), whose checkpoint is not there any more: from here on the "
                    "best of those that are there counts",
                    *(path.name, best.step, best.monitor, best.value),
                )

    def _say_habits(self, state: Mapping[str, Any]) -> None:
        both = state["habits"].keys() & self.habits.keys()  # a life before may have kept fewer
        then, now = ({name: habits[name] for name in both} for habits in (state["habits"], self.habits))
        for difference in differences(then, now):
            logger.warning("resumed with %s: the numbers are not the same to the bit", difference)

    def _load_callbacks(self, states: Mapping[str, Any], path: Path, back: ExitStack) -> None:
        """Give the callbacks their states; `back` gives them those of now again, where another or the stream refuses
        its own."""
        for name, saved in matched(states, self.callbacks).items():
            callback = self.callbacks[name]
            load = getattr(callback, "load_state_dict", None)
            if load is None:
                continue
            if has_state(callback):
                back.callback(_given_back, name, load, trees.clone(_state_of(name, callback)))
            with refusing_for(name, path):
                load(states[saved])

    def _go_to(self, position: Any, path: Path, *, allow_data_change: bool) -> bool:
        """Bring the stream to a position; whether it is of other data, on which the epoch begins anew."""
        if self.stream is None or position is None:
            return False
        try:
            self.stream.load_state_dict(position)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {path} does not fit: {error}", hint=error.hint) from error
        except DataError as error:
            if not allow_data_change:
                raise DataError(
                    str(error),
                    hint="Bring back the data that it was trained on, or go on with these, their epoch begun anew: "
                    "--allow-data-change, fit(..., allow_data_change=True).",
                ) from error
            logger.warning("going on with other data, the epoch begins anew: %s", error)
            return True
        return False

    def check_go_on(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError, as `restore` does, where a checkpoint whose weights are loaded already was trained by
        other rules: what only a fit asks of it. What the numbers may differ by is said."""
        saved = state["settings"]
        refuse(
            [told for name in ("precision", "seed") for told in differences(saved[name], self.settings[name], name)],
            path,
        )
        self._say_habits(state)

    def go_on(self, state: Mapping[str, Any]) -> bool:
        """Take up what a checkpoint holds beside weights, optimizer and progress, which are loaded already; whether its
        position is one in the stream of now."""
        self._take_up(state)
        try:
            if self.stream is not None and state["stream"] is not None:
                self.stream.load_state_dict(state["stream"])
        except (CheckpointError, DataError) as error:
            logger.info("the position of the checkpoint is none in this stream: %s", error)
            return False
        self._go_there(state)
        return True

    def ask_again(self, last: Life) -> None:
        """Where the life before ended in asking its deciders: its callbacks have their states of before, as in one that
        is restored, for they are told and asked again."""
        for name, state in last.asked.items():
            callback = self.callbacks.get(name)
            if callback is last.callbacks[name] and callable(load := getattr(callback, "load_state_dict", None)):
                _given_back(name, load, state)

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self.step.spikes.load_state_dict(state["spikes"])
        if self.step.scaler is not None and state["scaler"]:
            self.step.scaler.load_state_dict(state["scaler"])
        self.step.step = self.progress.step
        if self.toggled is not None:
            self.toggled.load_state_dict(state["habits"])
        self.metrics, self.restores = dict(state["metrics"]), state["restores"]

    def _go_there(self, state: Mapping[str, Any]) -> None:
        """What belongs to the position within the epoch."""
        self.epoch_rng = state["epoch_rng"]
        self.own_rng, self.resumed = state["own_rng"], True
        self.step.tally.window.load_state_dict(state["window"])
        self.step.tally.epoch.load_state_dict(state["means"])


def _put(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    try:
        model.load_state_dict(weights)
    except Exception as error:  # of a model's own
        why = " ".join(str(error).partition("\n")[2].split()) or str(error)
        raise CheckpointError(
            f"{what}: {why:.200}",
            hint="Its load_state_dict must take what its state_dict gives, and buffers keep their shapes.",
        ) from error


def first_rng(seed: int | None) -> Rng:
    """The random state of a fit that begins: seeded, or a copy of the caller's."""
    return Rng(rngs.capture() if seed is None else rngs.seeded(seed))


def has_state(callback: object) -> bool:
    """Whether a callback has a state of its own to keep."""
    own = getattr(type(callback), "state_dict", None)
    return own is not None and own is not Callback.state_dict


def _given_back(name: str, load: Callable[[Any], object], state: Tree) -> None:
    """What goes wrong here is logged: why it was refused is what the user gets."""
    try:
        load(state)
    except Exception:
        logger.exception("callback %s does not take back the state that it had", name)


def _state_of(name: str, callback: object) -> Tree:
    """Raises UserCodeError where it raises anything but our own errors."""
    get = getattr(callback, "state_dict", None)
    try:
        return get() if callable(get) else {}
    except StreamtrainError:
        raise
    except Exception as error:
        raise UserCodeError(
            f"callback {name}: state_dict raised {type(error).__name__}: {error}",
            hint="The traceback (--debug) shows the line in the callback.",
        ) from error
