"""The training loop: deterministic, interruptible between any two forward passes, resumable to the same
bits.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.finetune import checkpoint
from lora_kernels.finetune.data import IGNORED, Batch, Rows, row_order
from lora_kernels.finetune.errors import Interrupted, RunError, one_line
from lora_kernels.finetune.settings import Settings


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into an `Interrupted` at the next `check()`, where the state is whole.

    A second signal acts at once, as without this class.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.saves = False  # whether there is something to save

    @contextmanager
    def installed(self):
        """Handle the signals inside the block, except those that the caller's shell ignores (nohup)."""
        watched = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        before = {n: signal.getsignal(n) for n in watched if signal.getsignal(n) is not signal.SIG_IGN}

        def handle(signum: int, frame: Any) -> None:
            self.signum = signum
            for n, previous in before.items():
                signal.signal(n, previous)

        for n in before:
            signal.signal(n, handle)
        try:
            yield self
        finally:
            for n, previous in before.items():
                signal.signal(n, previous)

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@dataclass
class History:
    """What a run has measured so far; it travels in the checkpoint."""

    losses: list[float] = field(default_factory=list)  # nats per target token, one a step
    learning_rates: list[float] = field(default_factory=list)  # of A
    grad_norms: list[float] = field(default_factory=list)  # before clipping
    tokens: list[int] = field(default_factory=list)  # read in the step, padding excluded
    seconds: list[float] = field(default_factory=list)  # of the step
    heldout: dict[int, float] = field(default_factory=dict)  # steps done -> nats per token
    base_text: dict[int, float] = field(default_factory=dict)  # steps done -> nats per token
    sample_before: str = ""


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of the adapter's parameters. The one place that knows which optimizer it is."""
    groups = lk.optim.lora_plus_groups(
        model, settings.lr, settings.lora_plus_ratio, weight_decay=settings.weight_decay
    )
    for group in groups:
        group["peak_lr"] = group["lr"]
    if settings.optim == "adamw":
        return lk.optim.AdamW(groups)
    kinds = {
        "paged_adamw": lk.optim.PagedAdamW,
        "paged_adamw8bit": lk.optim.PagedAdamW8bit,
        "paged_lion": lk.optim.PagedLion,
    }
    budget = settings.optim_resident_mb
    resident_bytes = None if budget is None else max(1, int(budget * 2**20))
    return kinds[settings.optim](groups, resident_bytes=resident_bytes)


@contextmanager
def paging(settings: Settings) -> Iterator[None]:
    """Turns an error of the optimizer's pages inside the block into one line."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise RunError(
            f"--optim {settings.optim}: {one_line(error)}; make room, or name another folder in TMPDIR, then "
            "go on from the last checkpoint with --resume"
        ) from error


def lr_factor(step: int, steps: int, settings: Settings) -> float:
    """Learning rate of step 0 ... steps - 1, relative to its peak: a linear rise, then the chosen course to
    0.
    """
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.lr_scheduler == "constant":
        return 1.0
    left = (steps - step) / max(1, steps - warmup)
    return left if settings.lr_scheduler == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def target_loss(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, int]:
    """(summed loss in nats over the targets, their number). Logits are compared in float32."""
    logits = model(input_ids=batch.input_ids.to(device), use_cache=False).logits[
        :, :-1
    ]  # [rows, tokens - 1, V]
    labels = batch.labels[:, 1:].to(device)
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((batch.labels[:, 1:] != IGNORED).sum())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Rows,
    count: int,
    batch_size: int,
    pad: int,
    device: torch.device,
    check_stop: Callable[[], None],
) -> float:
    """Mean loss in nats per target over at most `count` rows, evenly spread; dropout off, mode restored.

    Raises:
        RunError: the loss is not finite.
    """
    training = model.training
    model.eval()
    total, targets = 0.0, 0
    indices = rows.spread(count)
    for at in range(0, len(indices), batch_size):
        check_stop()
        loss, n = target_loss(model, rows.batch(indices[at : at + batch_size], pad), device)
        total, targets = total + float(loss), targets + n
    model.train(training)
    mean = total / targets
    if not math.isfinite(mean):
        raise RunError(f"the loss on held-out text is {mean}; a lower --lr or another --dtype may help")
    return mean


class Trainer:
    """Steps an adapter through the data. All that decides the next step's bits is in `state()`."""

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        settings: Settings,
        steps: int,
        pad: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.model, self.rows, self.settings, self.steps, self.pad = model, rows, settings, steps, pad
        self.device = device
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(model, settings)
        # float16 gradients underflow without a scale; the other dtypes have float32's range.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.history = History()
        self.step = 0  # done
        self._rng = self._rng_state()

    def state(self) -> dict[str, Any]:
        """The state after the last whole step: adapter, optimizer, random numbers, position, history."""
        with paging(self.settings):
            optimizer = self.optimizer.state_dict()
        return {
            "step": self.step,
            "adapter": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "rng": self._rng,
            "threads": torch.get_num_threads(),
            "history": asdict(self.history),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["adapter"][name])
        with paging(self.settings):
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.history = History(**state["history"])
        self._rng = state["rng"]
        self.restore_rng()

    def _rng_state(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore_rng(self) -> None:
        """Put the random numbers where the last step left them; what ran in between may have drawn some."""
        torch.set_rng_state(self._rng["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._rng["cuda"], self.device)

    def train_step(self, check_stop: Callable[[], None]) -> None:
        """One optimizer step over grad_accum batches, each target counting the same.

        Raises:
            RunError: the loss is not finite, or the optimizer's pages have no room.
            Interrupted: from `check_stop`, with `state()` still that of the step before.
        """
        began = time.perf_counter()
        s = self.settings
        self.restore_rng()
        factor = lr_factor(self.step, self.steps, s)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        in_step = s.batch_size * s.grad_accum
        order = row_order(len(self.rows), s.seed, self.step * in_step, in_step)
        batches = [
            self.rows.batch(order[at : at + s.batch_size], self.pad) for at in range(0, in_step, s.batch_size)
        ]
        targets = sum(int((b.labels[:, 1:] != IGNORED).sum()) for b in batches)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        total = 0.0
        for batch in batches:
            check_stop()
            loss, _ = target_loss(self.model, batch, self.device)
            self.scaler.scale(loss / targets).backward()
            total += float(loss.detach())
        check_stop()
        mean = total / targets
        if not math.isfinite(mean):
            raise RunError(f"the loss is {mean} at step {self.step + 1}; a lower --lr may help")
        self.scaler.unscale_(self.optimizer)
        limit = s.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise RunError(f"the gradient's norm is {norm} at step {self.step + 1}; a lower --lr may help")
        with paging(self.settings):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self._rng = self._rng_state()
        h = self.history
        h.losses.append(mean)
        h.learning_rates.append(s.lr * factor)
        h.grad_norms.append(norm if math.isfinite(norm) else -1.0)  # float16: a skipped step
        h.tokens.append(sum(b.tokens for b in batches))
        h.seconds.append(time.perf_counter() - began)

    def run(
        self,
        output: Path,
        settings_to_save: dict[str, Any],
        evaluate_now: Callable[[], None],
        eval_every: int,
        progress: Callable[["Trainer"], None],
        stop: StopSignal,
    ) -> None:
        """Train to the last step, evaluating and writing checkpoints on the way.

        Raises:
            Interrupted: after a checkpoint of the last whole step was written; its note says how to go on.
        """
        saved_at = -1

        def save() -> None:
            nonlocal saved_at
            if saved_at != self.step:
                checkpoint.save(output, {**self.state(), **settings_to_save})
                saved_at = self.step

        try:
            while True:
                due = eval_every and self.step % eval_every == 0
                if (due or self.step in (0, self.steps)) and self.step not in self.history.heldout:
                    evaluate_now()
                if self.step % self.settings.save_every == 0 or self.step == self.steps:
                    save()
                if self.step == self.steps:
                    return
                self.train_step(stop.check)
                progress(self)
        except Interrupted as interrupted:
            save()
            interrupted.note = (
                f"saved after step {self.step} of {self.steps}; go on with --resume --output {output}"
            )
            raise
