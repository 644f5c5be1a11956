"""The trainer: what people give, read, override and call.

Its law: all that can be refused is refused before anything is written. What a fit does is in `fitting`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamtrain import outside, resume, signals, stacks
from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.defaults import with_defaults
from streamtrain.callbacks.json_logger import JSONLogger
from streamtrain.compiling import CompileSpec, parse_compile
from streamtrain.control import Control, Save
from streamtrain.data.batch import Batch
from streamtrain.data.handing import loop_runs
from streamtrain.data.iterable import as_stream
from streamtrain.device import check_deterministic, resolve_device
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.evaluation import Evaluator
from streamtrain.file_thread import file_thread
from streamtrain.fitting import Fit, Run
from streamtrain.freezing import FreezeSpec, parse_freeze
from streamtrain.keeping import last_weights
from streamtrain.notes import Notes
from streamtrain.objective import UserSteps
from streamtrain.optimizers import OptimizerSpec, check_lr
from streamtrain.options import (
    Limits,
    Options,
    computed_in,
    count,
    duration,
    every,
    flag,
    flag_or_regex,
    function,
    inner_share,
    one_of,
    place,
    positive,
    refuse_later,
    rehearsed,
    seconds,
    seeding,
    share_or_count,
    table,
)
from streamtrain.outcome import called, custom_outputs
from streamtrain.overfitting import same_batches
from streamtrain.parts import Parts
from streamtrain.prediction import Predictions
from streamtrain.progress import FitResult, Progress
from streamtrain.resume import Resume
from streamtrain.run_folder import RunFolder
from streamtrain.schedulers import LearningRate, SchedulerSpec
from streamtrain.streams import Streams, named_streams
from streamtrain.tasks import Losses
from streamtrain.threads import train_thread
from streamtrain.uncalled import say_uncalled
from streamtrain.under_training import training

__all__ = ["FitResult", "Trainer"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model on streams: `result = await Trainer(model, loss).fit(stream)`.

    The model is called `model(batch.inputs)`, the loss `loss(outputs, targets)`, or `loss(outputs, inputs)` without
    targets. Without any loss a model that takes `labels` gives its own, as those of Hugging Face do: it is called
    `model(**batch.inputs)` where inputs are a dict whose keys it takes, with targets as `labels`, and returns an object
    or dict with `loss` and perhaps `logits`. Anything else is a `step=` function `(model, batch) -> loss |
    {"loss": ..., "outputs": ..., "targets": ..., other names: logged}`, or an overridden `training_step`,
    `validation_step` or `predict_step`.

    A model with several outputs (a dict, or a tuple or list, by number) has a loss for each, `loss={"rain": "mse",
    "kind": "cross_entropy"}`, whose targets have the same names; their sum, weighted by `loss_weights={"kind": 0.1}`
    (1 where none is given), is the loss, and each is logged as `loss_<name>`. Metrics under an output's name,
    `metrics={"rain": {"mae": "mae"}}`, are of that output, and logged as `<output>_<metric>`.

    `ema`: validation, prediction and the best weights are those of a moving average of this decay, which checkpoints
    hold beside the weights that train (`average` gives it). `freeze`: regexes of names of parameters that are not
    trained, or {regex: "2epochs"} (or "500steps", "never") to train them after that.
    `optimizer={"gen": {...}, "disc": {...}}`, a table of several without a "name": each updates the submodule of its
    name (or the `"params"` regex of its spec), and `training_step` calls `manual_update(loss, name)` for each update
    instead of returning a loss.
    `compile`: true, a mode of `torch.compile` ("reduce-overhead", ...) or its keywords; the first update
    takes the time.
    `gradient_checkpointing`: blocks whose activations are computed again in the backward pass instead of being kept:
    the children of the `nn.Sequential` or `nn.ModuleList` that has most of them, or a regex of names of modules.
    `nonfinite`: an update whose loss or gradients are not finite is never made; "raise" ends the run with its weights
    of before, "skip" leaves the update out, "rollback" goes back to the weights of up to 100 updates ago and on with
    the next batch, 5 times at most.

    `watchdog`: seconds after which a hook, a save, a job of the train thread or the wait for a batch is named, with
    where it stands; 0: never. After an error, a save is waited for so long. (A stream's read has its `read_timeout`.)

    Raises ConfigError for arguments that cannot work, EnvironmentProblem for a device that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Losses | None = None,
        *,
        optimizer: OptimizerSpec = "adamw",
        lr: float = 1e-3,
        scheduler: SchedulerSpec = None,
        metrics: Mapping[str, Any] | None = None,
        callbacks: Sequence[object] = (),
        run_dir: str | os.PathLike[str] | None = None,
        loss_weights: Mapping[Any, float] | Sequence[float] | None = None,
        step: Callable[..., Any] | None = None,
        precision: str = "32",
        accumulate_grad_batches: int = 1,
        gradient_clip_norm: float | None = None,
        gradient_clip_value: float | None = None,
        device: str | torch.device = "auto",
        device_transform: Callable[[Batch], Any] | None = None,
        compile: CompileSpec = False,  # noqa: A002
        gradient_checkpointing: bool | str = False,
        ema: float | None = None,
        freeze: FreezeSpec = None,
        seed: int | None = None,
        deterministic: bool = False,
        nonfinite: str = "raise",
        log_every: int = 50,
        validate_every: str = "1epoch",
        fast_dev_run: bool | int = False,
        limit_batches: int | float | None = None,
        overfit_batches: int | None = None,
        sanity_batches: int = 2,
        grace: float = 25.0,
        watchdog: float = 300.0,
        strategy: str = "auto",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            of_class = isinstance(model, type) and issubclass(model, nn.Module)
            raise ConfigError(
                f"model must be a torch.nn.Module, got {model!r:.80}",
                hint=f"Make one of the class: {model.__name__}(...)." if of_class else "",
            )
        refuse_later(strategy=strategy)
        self.control = Control()
        options = self._options = Options(
            step=function(step, "step"),
            precision=computed_in(precision),
            accumulate=count(accumulate_grad_batches, "accumulate_grad_batches"),
            clip_norm=positive(gradient_clip_norm, "gradient_clip_norm"),
            clip_value=positive(gradient_clip_value, "gradient_clip_value"),
            device=resolve_device(device),
            device_transform=function(device_transform, "device_transform"),
            seed=seeding(seed),
            deterministic=flag(deterministic, "deterministic"),
            skip=one_of(nonfinite, ("raise", "skip", "rollback"), "nonfinite") == "skip",
            rollback=nonfinite == "rollback",
            log_every=count(log_every, "log_every"),
            validate_every=every(validate_every, "validate_every"),
            dev=rehearsed(fast_dev_run),
            limit=share_or_count(limit_batches, "limit_batches"),
            overfit=None if overfit_batches is None else count(overfit_batches, "overfit_batches"),
            sanity=count(sanity_batches, "sanity_batches", least=0),
            ema=inner_share(ema, "ema"),
            freeze=parse_freeze(freeze),
            compile=parse_compile(compile, resolve_device(device)),
            recompute=flag_or_regex(gradient_checkpointing, "gradient_checkpointing"),
            grace=seconds(grace, "grace"),
            watchdog=seconds(watchdog, "watchdog"),
            config=table(config, "config"),
        )
        if options.precision == "16" and options.device.type == "cpu":
            raise ConfigError("precision '16' needs a CUDA device", hint="On the CPU use 'bf16' or '32'.")
        if options.deterministic:
            check_deterministic(options.device)
        folder = place(run_dir, "run_dir")
        self.run_dir = None if options.dev else folder
        """The run's folder; None where nothing is written."""
        self.callbacks = with_defaults(callbacks, self.run_dir, dev=bool(options.dev))
        self._parts = Parts(
            model,
            loss,
            options,
            loss_weights=loss_weights,
            optimizer=optimizer,
            lr=lr,
            scheduler=scheduler,
            metrics=metrics or {},
            steps=UserSteps(
                training=self._overridden("training_step") or options.step,
                validation=self._overridden("validation_step"),
            ),
        )
        own_step = step is not None or self._overridden("training_step") is not None
        say_uncalled(type(self), Trainer, stepping=own_step, optimizing=optimizer != "adamw")
        state = Progress()
        self._run = Run(self._parts, state, self.control, Notes(state))
        self._fit: Fit | None = None
        """The one that runs."""

    def _overridden(self, name: str) -> Callable[..., Any] | None:
        """The method of a subclass in place of ours; None if it has none."""
        return None if getattr(type(self), name) is getattr(Trainer, name) else getattr(self, name)

    # --- what can be read ---

    @property
    def state(self) -> Progress:
        """Where the run stands: epoch, step, samples, best.

        Elsewhere it is of the last burst that was told; a training step is given the update before its own, exactly.
        """
        now, step = self._run.state, None if self._run.life is None else self._run.life.step
        made = None if step is None else step.made_here()
        if step is None or made is None:
            return now
        batches, samples = made
        return replace(now, step=step.step, batch=batches, samples=samples)

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self._parts.model

    @property
    def loss(self) -> Callable[..., Any] | None:
        """`loss(outputs, targets)`; another one can be set between two fits."""
        return self._parts.objective.loss

    @loss.setter
    def loss(self, loss: Losses | None) -> None:
        self._parts.set_loss(loss)

    @property
    def optimizer(self) -> Optimizer | None:
        """None while the model has parameters whose size only the first batch tells."""
        return self._parts.optimizer

    @property
    def scheduler(self) -> LearningRate | None:
        """Bound at the beginning of `fit`, which knows how long the run is."""
        return self._parts.scheduler

    @property
    def average(self) -> dict[str, Tensor] | None:
        """With `ema=`: a copy of the averaged parameters by name; to be asked while no fit runs."""
        self._parts.take_up()
        return None if self._parts.average is None else self._parts.average.weights()

    @property
    def checkpoint(self) -> Path | None:
        """The last committed checkpoint of this trainer's fits, or the one that it went on from; None before."""
        return (None if self._fit is None else self._fit.saved) or self._run.checkpoint

    @property
    def evaluator(self) -> Evaluator:
        """What `validate`, `evaluate` and `predict` compute with."""
        return self._parts.evaluator

    # --- what can be overridden ---

    def training_step(self, model: nn.Module, batch: Batch) -> Any:
        """The loss of a batch, or a dict with `loss`, `outputs`, `targets` and more to log; by default what the model
        and `loss=` give, as such a dict, which one of a subclass may go on with."""
        return self._parts.objective.judged(model)(batch).table()

    def validation_step(self, model: nn.Module, batch: Batch) -> Any:
        """The same for validation; by default what training does, without gradients."""
        return self._parts.objective.measured(batch).table()

    def predict_step(self, model: nn.Module, batch: Batch) -> Any:
        """What `predict` gives for a batch; by default `model(batch.inputs)`, or a model of its own loss' `logits`."""
        return self._parts.objective.outputs(batch)

    def manual_update(self, loss: Tensor, name: str, **backward: Any) -> bool:
        """In a training step, with `optimizer={"gen": ..., "disc": ...}`: one update of the optimizer `name`.

        As in a bare loop: gradients are dropped, `loss.backward(**backward)`, the gradients of what this optimizer
        holds are clipped, it is stepped, and all gradients are dropped. Whether it was made: one that is not finite
        raises NonFiniteError, or is left out (nonfinite="skip"). In validation only the loss is counted. The log's
        `loss` is the sum of the losses of a batch. Raises ConfigError outside of such a step.
        """
        if self._parts.objective.manual is None:
            raise ConfigError(
                "manual_update needs several optimizers by name",
                hint="Give optimizer={'gen': ..., 'disc': ...}; with one optimizer return the loss.",
            )
        return self._parts.objective.manual.update(loss, name, **backward)

    @property
    def logger(self) -> JSONLogger | None:
        """What writes `metrics.jsonl`; None without a run folder."""
        return next((callback for callback in self.callbacks if isinstance(callback, JSONLogger)), None)

    # --- fit ---

    def fit(
        self,
        stream: Streams,
        validation: Streams = None,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        max_time: float | str | None = None,
        resume: Resume = None,
        allow_data_change: bool = False,
    ) -> Coroutine[Any, Any, FitResult]:
        """Train until a limit; limits are totals over the run's life, and none means one epoch.

        `max_time` ("2h", or seconds) is the time on the clock while fits of this run were going on: waiting for data,
        validation, saves and pauses count, and a paused fit ends when it is reached; time between two lives does not.
        `validation`: a stream, or a dict of named ones. `resume`: "auto" (the newest valid checkpoint, else fresh),
        "best", or a path; refused, with a table of the differences, where data, order, model, optimizer, precision or
        loss are others, but the learning rate, limits, memory and callbacks may be; `allow_data_change` goes on with
        changed data, whose epoch begins anew.

        If the task is cancelled, what was trained is saved within `grace` seconds and CancelledError raised again; a
        callback that hangs is left behind after half of them. `stop` and `pause` are obeyed from this call on, even
        before the coroutine has begun to run.

        Another fit of the same trainer goes on where the last one ended, as one that is resumed would. Weights that the
        model was given in between are taken: an average (`ema`) begins anew with them, a rollback goes back to them at
        most, and that is said; momenta and the like are the optimizer's, and stay. One that ended in the middle of an
        update (an optimizer raised, or hung) is gone on from once a checkpoint is loaded, with `resume` or before.

        Raises ConfigError, CheckpointError, DataError, NonFiniteError, UserCodeError or EnvironmentProblem; a
        ConfigError too where another trainer's fit is training the same model object just now.
        """
        self.control.expect()
        limits = {"max_epochs": max_epochs, "max_steps": max_steps, "max_time": max_time}
        return self._begin_fit(stream, validation, limits, resume, allow_data_change=allow_data_change)

    async def _begin_fit(
        self,
        stream: Streams,
        validation: Streams,
        given: Mapping[str, Any],
        resume: Resume,
        *,
        allow_data_change: bool,
    ) -> FitResult:
        if self._fit is not None:
            raise ConfigError("fit is running already", hint="One fit at a time for each trainer.")
        try:
            epochs, steps, time = given["max_epochs"], given["max_steps"], given["max_time"]
            limits = Limits(
                None if epochs is None else count(epochs, "max_epochs"),
                None if steps is None else count(steps, "max_steps"),
                None if time is None else duration(time, "max_time"),
            )
            train, streams = as_stream(stream), named_streams(validation)
            if self._options.overfit is not None:
                train = same_batches(train, self._options.overfit)
            self._fit = Fit(
                self._run,
                train,
                streams,
                limits,
                resume,
                callbacks=self.callbacks,
                run_dir=self.run_dir,
                allow_data_change=allow_data_change,
            )
            with training(self.model):
                return await self._fit.run()
        finally:
            self._fit = None
            self.control.unbind()  # where it was refused too: it had been called for

    train = fit

    def fit_sync(self, *args: Any, **kwargs: Any) -> FitResult:
        """`fit` for scripts and notebooks without a running loop, with signal handlers while it runs, if this is the
        main thread and nobody else handles SIGINT and SIGTERM.

        The first SIGINT, SIGTERM or SIGHUP finishes the step, saves and returns; a second one ends the process.
        SIGUSR1 and SIGUSR2 save and go on; SIGQUIT writes the stacks of all threads and the tasks to stderr and to the
        log, and goes on. Handlers that were there before are called after ours, and stand again at the end. Raises
        ConfigError where a loop runs already, as in Jupyter: there `await trainer.fit(...)` can be typed as it is.
        """
        if loop_runs():
            raise ConfigError("fit_sync() where an event loop runs already", hint="Await it: await trainer.fit(...).")
        fit = self.fit(*args, **kwargs)  # first: a signal from now on is meant for it
        if not signals.untouched():
            return asyncio.run(fit)
        try:
            with signals.capture(self._asked_to_end, save=lambda number: self.control.save(), show=self._show):
                return asyncio.run(fit)
        finally:
            self.control.say_forgotten()

    def _asked_to_end(self, signum: int) -> None:
        self.control.stop("signal", signal.Signals(signum).name, within=self._options.grace)

    def _show(self, signum: int) -> None:
        """Where everything stands; in a signal handler, which may not log by itself."""
        loop, shown = self.control.loop, stacks.everything(self.control.loop)
        with suppress(OSError):
            os.write(2, f"\n{signal.Signals(signum).name}: where it stands, and goes on\n{shown}\n".encode())
        if loop is not None:
            loop.call_soon_threadsafe(partial(logger.info, "%s", shown, extra={"shown": True}))

    def train_epoch(self, stream: Streams) -> Coroutine[Any, Any, dict[str, float]]:
        """Train one more epoch and return its means; a stop or a pause from this call on is meant for it."""
        return _means_of_training(self.fit(stream, max_epochs=self.state.epoch + 1))

    # --- without learning ---

    async def validate(self, stream: Streams) -> dict[str, Any]:
        """The means over a stream, or a dict of named ones, as `val_<metric>`; tables are nested lists.

        Raises ConfigError for what is no stream, DataError for one that gives no batch.
        """
        return await outside.evaluate(self._parts, stream, "val_")

    async def evaluate(self, stream: Streams) -> dict[str, Any]:
        """The means over a stream, or a dict of named ones, as `test_<metric>`; tables are nested lists.

        With a `run_dir`, and outside of `fit`, its log gets a line of the means (split "test").
        """
        values = await outside.evaluate(self._parts, stream, "test_")
        if self.run_dir is not None and self._fit is None:
            numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
            await outside.log(RunFolder(self.run_dir, disk=self._run.disk), self.callbacks, self.state, numbers)
        return values

    def predict(
        self, stream: Streams, out: str | os.PathLike[str] | None = None, *, overwrite: bool = False
    ) -> Predictions:
        """`async for outputs in trainer.predict(stream)`: what the model makes of each batch, in order; or
        `path = await trainer.predict(stream, out="p.zarr")`: written to a Zarr 3 store as it comes.

        The store is a group with an array `prediction`, or one for each name of a dict, and the source's dimensions and
        coordinates, as xarray opens them. Each sample's row stands at its own number, whatever the order (of a mix, or
        of what is merely iterated, rows lie as they come); where none came is NaN. Outputs of windows and patches stand
        at the places that they cover, overlapping ones as their mean, weighted by a Hann window; outputs of another
        shape have a row for each window. Outputs of the shape of a normalised target (without targets: input) are in
        its units again, given or written. The store appears when it is whole and durable; one that stands there is
        refused, or with `overwrite` replaced then.

        Raises ConfigError for an `out` that is there, or within the source; EnvironmentProblem for a full disk.
        """
        path = place(out, "predict: out")
        if out is not None and "://" in os.fspath(out):
            raise ConfigError(f"predict(out={os.fspath(out)!r}): only folders of this machine are written to")
        source = as_stream(stream)
        compute = custom_outputs(called(self.predict_step, self.model))
        return Predictions(
            lambda give: outside.predict(self._parts, source, compute, path, overwrite=overwrite, give=give), path
        )

    # --- checkpoints ---

    async def save_checkpoint(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Save now (during `fit`: after the current update) and return where, once it is durable.

        It may be awaited in an `async def` hook. One that is asked for while deciders are asked has their states of
        before, so that the life that goes on from it asks them again. Where a fit has ended with the best weights in
        the model, the checkpoint of its last step stays and is returned, which is said once: the run goes on from its
        weights, not from the best. To a `path` goes what the model has.
        """
        target = place(path, "save_checkpoint: path")
        if target is None and self.run_dir is None:
            raise ConfigError("save_checkpoint() needs a run_dir or a path")
        saved: asyncio.Future[Path] = asyncio.get_running_loop().create_future()

        def done(path: Path | None, error: BaseException | None) -> None:
            if saved.done():
                return
            if path is not None:
                saved.set_result(path)
            else:
                saved.set_exception(error or CheckpointError("the fit ended before it was saved"))

        if self._fit is not None:
            self.control.save(Save(target, done))
            return await saved
        return await self._save_outside(target)

    async def _save_outside(self, target: Path | None) -> Path:
        if self.optimizer is None:
            raise ConfigError("the model has parameters whose size only the first batch tells: nothing to save yet")
        bus, limits = Bus(self.callbacks), Limits(max_steps=1)
        life = self._run.life or self._parts.life(None, self.state, bus, self.control, limits)
        if target is None and (kept := last_weights(life)) is not None:
            return kept
        position: Any = None
        if self._run.loaded is not None:
            life.go_on(self._run.loaded)
            position = self._run.loaded["stream"]
        elif self._run.position is not None:  # where the fit ended: somebody else may have read the stream since
            position = self._run.position[1]
        made = await outside.save(self._parts, life, position, target, self.run_dir, disk=self._run.disk)
        if target is None:
            self._run.saved.add(made)
        return made

    async def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Load model and optimizer from a checkpoint, or from the newest of a run's folder; of this trainer's run_dir
        by "auto" (the newest) or "best". Raises CheckpointError with a table of the differences if they are others than
        those of the trainer, or its loss is (if it has one), and has changed nothing then.

        The next `fit` goes on from there: with the very next batch if its stream is that of the checkpoint, else its
        epoch begins anew; newer checkpoints of its folder are set aside. As with `fit(resume=path)` the learning rate
        may be another, in proportion to what a schedule has made of it, and another precision or seed is refused;
        another schedule, which a run that is resumed refuses, takes over where it stands, and that is said. The
        callbacks' states are left to `fit(resume=path)`.
        """
        resume.check(path, "load_checkpoint: path")
        self._check_idle()
        async with file_thread() as files, train_thread() as thread:
            checkpoints = _NOWHERE if self.run_dir is None else RunFolder(self.run_dir, disk=self._run.disk).checkpoints
            found = await files(lambda: resume.find(checkpoints, path, disk=self._run.disk))
            if found is None:
                raise CheckpointError(f"there is no checkpoint in {checkpoints}", hint="Give the path of one.")
            where, snapshot = found
            self._check_idle()
            await thread.run(lambda: self._parts.load(where, snapshot, self.state))
            self._run.life, self._run.position, self._run.loaded, self._run.origin = None, None, snapshot.state, where

    async def load_weights(self, path: str | os.PathLike[str], *, partial: bool = False) -> None:
        """Begin a run with the weights alone of a checkpoint: its path, a run's folder (the newest), or what
        `import-pt` made of a foreign file; with those of its moving average if it has one. Optimizer, schedule, counts
        and random state begin fresh.

        `partial`: take the tensors that fit by name and shape; the names of those that the model keeps as they were,
        and of those that are unused, are said. Raises CheckpointError with a table of the differences if not all fit,
        or with `partial` if none does, and changes nothing then; ConfigError once the run has begun.
        """
        resume.check(path, "load_weights: path")
        self._check_fresh()
        async with file_thread() as files, train_thread() as thread:
            checkpoints = _NOWHERE if self.run_dir is None else RunFolder(self.run_dir).checkpoints
            where, weights = await files(lambda: resume.weights(checkpoints, path, disk=self._run.disk))
            self._check_fresh()
            await thread.run(lambda: self._parts.begin_with(weights, where, partial=partial))

    def _check_idle(self) -> None:
        """To be asked once more when a checkpoint is read: a fit may have begun meanwhile."""
        if self._fit is not None:
            raise ConfigError("load_checkpoint() while fit runs", hint="Stop it first, and fit with resume=path.")

    def _check_fresh(self) -> None:
        """The same for weights."""
        if self._fit is not None or self.state.step:
            raise ConfigError(
                f"load_weights() after {self.state.step} steps of the run: it begins with other weights, or not at all",
                hint="Make a new Trainer, or load_checkpoint() to go on from one.",
            )

    # --- plain, from any thread ---

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Add numbers to the next line of the log: outside of a fit, to the first one of the next.

        Raises ConfigError, and adds nothing, if one is no number, or is named as what each line tells itself: `loss`,
        `lr`, `step`, `epoch`, `samples`, `time`, `split`. Another name that the run logs itself (`grad_norm`, what the
        step returns) stays the run's, which is said once.
        """
        self._run.notes.metrics(values)

    def log_media(self, values: Mapping[str, Any]) -> None:
        """Log images, tables and histograms by name, as of the last finished update; they are copied right here.

        An array or tensor (H, W), (C, H, W) or (H, W, C) is an image, one of one axis a histogram of its values,
        `{column: cells}` or a list of `{column: cell}` a table; `streamtrain.media` has the classes to be explicit.
        TensorBoard and wandb show them; without such a logger they lie in `media/` in the run's folder. Outside of a
        fit they wait for the next one. Raises ConfigError, and logs nothing, for what is none of them.
        """
        self._run.notes.media(values)

    def stop(self, detail: str = "") -> None:
        """End the fit after the current update, and save.

        It is meant for the fit that runs, or was called for, or (before there was any) for the first: one whose task
        has not begun yet ends before its first update. Once a fit has ended it does nothing, so that a late stop does
        not end the next one.
        """
        self.control.stop("stopped", detail)

    def pause(self) -> None:
        """Stand still after the current update; for the same fit as a `stop` would be."""
        self.control.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self.control.resume()

    def request_checkpoint(self) -> None:
        """Save after the current update; for the same fit as a `stop` would be. One that comes after a fit's end is not
        made, which the next fit says: `save_checkpoint` saves then."""
        self.control.save()

    def set_lr(self, lr: float) -> None:
        """Bring the first group's learning rate to `lr` after the current update, the others and a schedule in
        proportion. Where a schedule's rate is 0 by then, or by an earlier call, no other can be, which is said; nor
        where the first group's is 0 and others' are not."""
        self.control.set_lr(check_lr(lr))


async def _means_of_training(fit: Coroutine[Any, Any, FitResult]) -> dict[str, float]:
    result = await fit
    return {name: value for name, value in result.metrics.items() if not name.startswith("val_")}


_NOWHERE = Path(os.devnull, "checkpoints")
"""A folder of checkpoints that none lies in."""
