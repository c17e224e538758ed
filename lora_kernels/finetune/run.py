"""One run from its settings to its results: the order of events, and who owns the output folder."""

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters.files import write_atomically
from lora_kernels.finetune import checkpoint, measure, models, report, stdlib_base
from lora_kernels.finetune.data import Rows
from lora_kernels.finetune.errors import Interrupted, RunError, UsageError, one_line, writing
from lora_kernels.finetune.inputs import Inputs, check_same, read_documents, tokenize_documents
from lora_kernels.finetune.output import ADAPTER, METRICS, PLOT, clear, locked, output_folder
from lora_kernels.finetune.settings import Settings, check, continued
from lora_kernels.finetune.training import StopSignal, Trainer, evaluate
from lora_kernels.finetune.verify import Verification, logits_of, verify

_VERIFY_ROWS = 4


def start(settings: Settings) -> int:
    """A new run. Returns the exit status."""
    output = Path(settings.output).absolute()
    with _stoppable() as stop, output_folder(output, settings.overwrite):
        return _Run(settings, output, stop).go(None)


def resume(given: dict[str, Any]) -> int:
    """Continue the run in --output from its checkpoint. Returns the exit status."""
    output = Path(given["output"]).absolute()
    state = checkpoint.load(output)
    try:
        settings = continued(state["settings"], given)
        check(settings)
    except (TypeError, AttributeError) as error:  # a value of another type than the option's
        raise UsageError(
            f"argument --resume: the checkpoint in {output} holds settings that cannot be: {one_line(error)}"
        ) from error
    with _stoppable() as stop, locked(output):
        try:
            return _Run(settings, output, stop).go(state)
        except Interrupted as interrupted:
            interrupted.note = interrupted.note or f"the checkpoint of step {state['step']} is as it was"
            raise


@contextmanager
def _stoppable() -> Iterator[StopSignal]:
    stop = StopSignal()
    models.silence_libraries()
    with stop.installed():
        yield stop


class _Run:
    """The state that the stages of one run share."""

    def __init__(self, settings: Settings, output: Path, stop: StopSignal):
        self.settings, self.output, self.stop = settings, output, stop
        self.device = models.device_of(settings)
        self.times: dict[str, float] = {}
        self.began = time.perf_counter()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.times[stage] = self.times.get(stage, 0.0) + time.perf_counter() - began

    def go(self, state: dict[str, Any] | None) -> int:
        """Everything, from the checkpoint's `state` or from the start."""
        s = self.settings
        with self._timed("reading_data"):
            files = stdlib_base.stdlib_files() if s.model is None or s.data is None else []
            documents = read_documents(s, files)
            if state is not None:
                check_same(state["sources"], documents.sources)
            self.sources = documents.sources
        with self._timed("base_model"):
            folder = Path(s.model) if s.model is not None else self._built_in_base(files)
        with self._timed("loading"):
            self.folder = folder
            self.tokenizer = models.load_tokenizer(folder)
            model = self._load_base()
            models.check_seq_len(model, s.seq_len)
            inputs = tokenize_documents(documents, self.tokenizer, folder, s, self._say)
            for rows in (inputs.train, inputs.heldout, inputs.base_text):
                if rows is not None:
                    models.check_token(model, int(rows.tokens.max()), folder)
            self.steps = self._steps(len(inputs.train))
            parameters = sum(p.numel() for p in model.parameters())
            buffers = sum(b.nbytes for b in model.buffers())
            itemsize = model.dtype.itemsize
            torch.manual_seed(s.seed)
            layers = models.add_adapters(model, s, self.device)
            # Not before: the adapters start from the same numbers on every device, and a GPU holds one dense
            # weight at a time.
            model.to(self.device)
        if s.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.pad = models.pad_id(self.tokenizer, model)
        trainer = Trainer(model, inputs.train, s, self.steps, self.pad, self.device, model.dtype)
        self._announce(model, inputs, layers, trainer, state)

        with self._timed("measuring_memory"):
            first = inputs.train.batch(list(range(min(s.batch_size, len(inputs.train)))), self.pad)
            activations, gradients = measure.pass_memory(model, first, self.device)
        trainer.restore_rng()
        if state is not None:
            try:
                trainer.load_state(state)
            except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise UsageError(
                    f"argument --resume: the checkpoint in {self.output} does not fit this run: "
                    f"{one_line(error)}"
                ) from error
            if state["threads"] != torch.get_num_threads():
                self._say(
                    f"note: the run had {state['threads']} threads and goes on with "
                    f"{torch.get_num_threads()}: losses agree with an uninterrupted run only to rounding"
                )
        elif s.sample_tokens:
            with self._timed("samples"):
                trainer.history.sample_before = self._sample(model, inputs.prompt)
        if state is None:
            clear(self.output)
        self._train(trainer, inputs)
        memory = measure.measured_memory(model, trainer.optimizer, gradients, activations)
        memory.full = measure.full_finetuning(parameters, buffers, itemsize, activations)
        return self._finish(trainer, inputs, memory, parameters, layers)

    def _built_in_base(self, files: list[tuple[str, str]]) -> Path:
        bar = None

        def progress(step: int, steps: int, loss: float, tokens_per_second: float) -> None:
            nonlocal bar
            bar = bar or report.Progress("base model", steps)
            bar.update(step, loss, tokens_per_second)

        try:
            return stdlib_base.cached_base(
                files, progress=progress, say=self._say, check_stop=self.stop.check
            )
        except Interrupted as interrupted:
            interrupted.note = "the base model was not complete, so nothing was kept"
            raise
        finally:
            if bar is not None:
                bar.close()

    def _load_base(self) -> nn.Module:
        return models.load_model(self.folder, self.settings.dtype)

    def _steps(self, rows: int) -> int:
        s = self.settings
        if s.steps is not None:
            return s.steps
        return max(1, round(s.epochs * rows / (s.batch_size * s.grad_accum)))

    # ---- training -----------------------------------------------------------------------------------------

    def _announce(self, model: nn.Module, inputs: Inputs, layers: list[str], trainer: Trainer, state) -> None:
        s = self.settings
        trainable = sum(p.numel() for p in trainer.parameters.values())
        base = "NF4" if s.quantize == "nf4" else "dense"
        dtype = str(model.dtype).removeprefix("torch.")
        tokens = f"{len(inputs.train.tokens):,} training and {len(inputs.heldout.tokens):,} held-out tokens"
        adapters = f"{len(layers)} layers with LoRA r = {s.r}, {trainable:,} trainable parameters"
        self._say(
            f"model   {self.folder}\n"
            f"        {dtype}, {base} base, on {self.device}; {adapters}\n"
            f"data    {self.sources['data']['source']}: {tokens}\n"
            f"output  {self.output}"
        )
        if state is not None:
            self._say(f"resuming after step {state['step']} of {self.steps}")

    def _train(self, trainer: Trainer, inputs: Inputs) -> None:
        s = self.settings
        history = trainer.history
        eval_every = max(1, self.steps // 5) if s.eval_every is None else s.eval_every
        bar = report.Progress("fine-tune", self.steps, done=trainer.step)

        def evaluate_now() -> None:
            with self._timed("evaluation"):
                for rows, results, name in (
                    (inputs.heldout, history.heldout, "held-out"),
                    (inputs.base_text, history.base_text, "base text"),
                ):
                    if rows is not None:
                        results[trainer.step] = evaluate(
                            trainer.model,
                            rows,
                            s.eval_rows,
                            s.batch_size,
                            self.pad,
                            self.device,
                            self.stop.check,
                        )
                        shown.append(f"{name} loss {results[trainer.step]:.4f}")
                bar.say(f"step {trainer.step}: " + ", ".join(shown))
                shown.clear()

        def progress(trainer: Trainer) -> None:
            recent = slice(-10, None)
            speed = sum(history.tokens[recent]) / sum(history.seconds[recent])
            bar.update(trainer.step, history.losses[-1], speed)

        shown: list[str] = []
        extra = {"settings": asdict(s), "sources": self.sources}
        try:
            trainer.run(self.output, extra, evaluate_now, eval_every, progress, self.stop)
        finally:
            bar.close()

    def _sample(self, model: nn.Module, prompt: str) -> str:
        ids = self.tokenizer(prompt)["input_ids"]
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids:
            ids = [self.pad]
        models.check_token(model, max(ids), self.folder)
        limit = (
            getattr(model.config, "max_position_embeddings", None) or len(ids) + self.settings.sample_tokens
        )
        room = min(self.settings.sample_tokens, limit // 2)
        prompt_ids = torch.tensor(ids[-(limit - room) :], device=self.device)
        model.eval()
        end, seed = self.tokenizer.eos_token_id, self.settings.seed
        drawn = models.sample(model, prompt_ids, room, end, seed, self.stop.check)
        return self.tokenizer.decode(drawn, skip_special_tokens=True)

    # ---- results ------------------------------------------------------------------------------------------

    def _finish(
        self, trainer: Trainer, inputs: Inputs, memory: measure.Memory, parameters: int, layers: list[str]
    ) -> int:
        s, history, model = self.settings, trainer.history, trainer.model
        advice = "free some space, then --resume finishes the run"
        try:
            sample_after = ""
            if s.sample_tokens:
                with self._timed("samples"):
                    sample_after = self._sample(model, inputs.prompt)
            with writing(self.output, advice):
                lk.save_adapter(model, self.output)
            with self._timed("verification"):
                indices = inputs.heldout.spread(_VERIFY_ROWS)
                trained = logits_of(model, inputs.heldout, indices, self.device)
                checks = verify(
                    trained,
                    self._load_base,
                    self.output,
                    models.quantize_argument(s),
                    inputs.heldout,
                    indices,
                    self.device,
                )
            self.stop.check()
        except Interrupted as interrupted:
            interrupted.note = (
                f"the training is complete and saved; --resume --output {self.output} finishes the run"
            )
            raise
        trainable = sum(p.numel() for p in trainer.parameters.values())
        self.times["training"] = sum(history.seconds)
        self.times["this_process"] = time.perf_counter() - self.began
        metrics = {
            "config": {**asdict(s), "model_folder": str(self.folder), "device": str(self.device)},
            "sources": self.sources,
            "steps": self.steps,
            "losses": history.losses,
            "learning_rates": history.learning_rates,
            "grad_norms": history.grad_norms,
            "step_seconds": history.seconds,
            "tokens": sum(history.tokens),
            "tokens_per_second": sum(history.tokens) / sum(history.seconds),
            "evaluation": {
                "heldout": _evaluation(history.heldout, inputs.heldout, s.eval_rows),
                "base_text": _evaluation(history.base_text, inputs.base_text, s.eval_rows),
            },
            "parameters": {
                "trainable": trainable,
                "total": parameters + trainable,
                "layers": len(layers),
                "adapted": layers,
            },
            "memory": {
                "labels": measure.PARTS,
                "measured": memory.measured,
                "full_finetuning": memory.full,
                "peak_rss": measure.peak_rss(),
            },
            "adapter_bytes": sum((self.output / name).stat().st_size for name in ADAPTER),
            "sample": {"prompt": inputs.prompt, "before": history.sample_before, "after": sample_after},
            "checks": {**asdict(checks), "passed": checks.passed},
            "times": self.times,
            "versions": _versions(),
        }
        for name, content in (
            (PLOT, report.loss_plot(metrics)),
            (METRICS, (json.dumps(metrics, indent=1) + "\n").encode()),
        ):
            with writing(self.output / name, advice):
                write_atomically(self.output / name, content)
        if s.sample_tokens:
            print(f"\n{report.samples(inputs.prompt, history.sample_before, sample_after)}")
        print(f"\n{report.summary(metrics)}\n")
        self._print_checks(checks)
        print(f"\n  results in {self.output}")
        sys.stdout.flush()
        if not checks.passed:
            raise RunError("a check failed: the adapter's files do not reproduce the model that was trained")
        checkpoint.remove(self.output)
        return 0

    def _print_checks(self, checks: Verification) -> None:
        reload = "logits identical, bit for bit" if checks.reload_identical else (
            f"logits DIFFER by up to {checks.reload_max_difference:.3g}"
        )  # fmt: skip
        merged = "within" if checks.merge_error <= checks.merge_limit else "ABOVE"
        back = "identical again" if checks.unmerge_identical else "NOT the same as before"
        print(
            f"  reload check  adapter from disk in a fresh base, {checks.rows} held-out rows: {reload}\n"
            f"  merge check   merged against unmerged: relative error {checks.merge_error:.1e}, {merged} "
            f"the limit {checks.merge_limit:.0e}\n"
            f"                (the adapter itself moves the logits by {checks.adapter_effect:.1e}); "
            f"unmerged: {back}"
        )

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _evaluation(by_step: dict[int, float], rows: Rows | None, limit: int) -> dict | None:
    if rows is None:
        return None
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    return {"before": first, "after": last, "rows": min(limit, len(rows)), "by_step": by_step}


def _versions() -> dict[str, str]:
    import safetensors
    import transformers

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "lora_kernels": lk.__version__,
        "threads": str(torch.get_num_threads()),
    }
